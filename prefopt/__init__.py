"""prefopt: train language models on preferences, and measure which loss is better."""

__version__ = "0.1.0"
