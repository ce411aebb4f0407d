"""Answer prompts with a model and hide its thoughts: `python scripts/infer.py --model DIR --prompts prompts.jsonl`."""

import sys
from pathlib import Path

try:
    from prefopt.cli import infer
except ModuleNotFoundError:  # run from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from prefopt.cli import infer

if __name__ == "__main__":
    sys.exit(infer(sys.argv[1:]))
