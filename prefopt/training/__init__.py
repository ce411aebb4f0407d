"""The loop and what it stands on: runtime, models, forward, metrics, checkpoint, trainer."""
