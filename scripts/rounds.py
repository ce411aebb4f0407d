"""Run rounds, each stage in a process of its own: `python scripts/rounds.py --method sppo --rounds.count 3`."""

import sys
from pathlib import Path

try:
    from prefopt.cli import rounds
except ModuleNotFoundError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prefopt.cli import rounds

if __name__ == "__main__":
    sys.exit(rounds(sys.argv[1:]))
