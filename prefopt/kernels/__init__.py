"""Loss kernels: torch only. Knows nothing of models, methods or data."""
