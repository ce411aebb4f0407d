"""Token statistics of a language-model head. Depends on torch (and Triton if available), not on methods or data."""
