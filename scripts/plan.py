"""Estimate memory and time of a run: `python scripts/plan.py --method dpo --model.path DIR --gpus 8`."""

import sys
from pathlib import Path

try:
    from prefopt.cli import plan
except ModuleNotFoundError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prefopt.cli import plan

if __name__ == "__main__":
    sys.exit(plan(sys.argv[1:]))
