"""`python -m prefopt COMMAND ...` and the console command `prefopt`: the installed form of scripts/."""

from __future__ import annotations

import sys

from prefopt import __version__, cli

COMMANDS = {
    "train": cli.train,
    "rounds": cli.rounds,
    "infer": cli.infer,
    "data": cli.data,
    "sweep": cli.sweep,
    "plan": cli.plan,
    "methods": cli.methods,
}
USAGE = f"""prefopt {__version__}: train language models on preferences, and measure which loss is better

usage: prefopt train --method NAME [--config FILE] [--GROUP.SETTING VALUE ...]
       prefopt rounds --method NAME --rounds.count N [--GROUP.SETTING VALUE ...]
       prefopt infer [--model DIR] [--prompts FILE | --prompt TEXT] [--strategy NAME] [--GROUP.SETTING VALUE ...]
       prefopt data FILE[,FILE ...] --model.path DIR [--html PAGE]
       prefopt sweep FILE.yaml [--launcher local|slurm]
       prefopt plan --method NAME --model.path DIR [--gpus N] [--gpu_memory GB] [--GROUP.SETTING VALUE ...]
       prefopt methods
       prefopt COMMAND --help"""


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns: its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(argv[0])
    if command is None:
        from prefopt.errors import ConfigError, did_you_mean
        from prefopt.training.launcher import print_error

        near = did_you_mean(argv[0], COMMANDS) or ";"
        return print_error(ConfigError(f"unknown command '{argv[0]}'{near} known: {', '.join(COMMANDS)}"))
    return command(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
