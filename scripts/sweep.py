"""Run all runs of a sweep file: `python scripts/sweep.py configs/sweeps/losses.yaml --launcher local`."""

import sys
from pathlib import Path

try:
    from prefopt.cli import sweep
except ModuleNotFoundError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prefopt.cli import sweep

if __name__ == "__main__":
    sys.exit(sweep(sys.argv[1:]))
