"""Loss kernels: torch only, independent of models, methods and data."""
