"""What is known and done before a run starts on a cluster."""
