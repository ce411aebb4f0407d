"""Train a model on preferences: `python scripts/train.py --method tdpo`; `--help` lists the settings."""

import sys
from pathlib import Path

try:
    from prefopt.cli import train
except ModuleNotFoundError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prefopt.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
