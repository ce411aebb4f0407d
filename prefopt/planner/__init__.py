"""The plan of one run, before it starts: memory per GPU and backend, time per step, and what `--dry_run` prints."""
