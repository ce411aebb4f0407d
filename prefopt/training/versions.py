"""Versions of the packages that decide the numbers of a run."""

from __future__ import annotations


def versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of Python, of the packages that affect results, and of those in `extra`."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("prefopt", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "numpy", *extra):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
