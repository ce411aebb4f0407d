"""Rounds of SPPO on real text, with judges that were trained on the same pairs.

    python benchmarks/rounds_hh.py --data.train train.jsonl --data.eval test.jsonl --output runs/hh

Starts from the SFT policy of `hh.py` (trained here if the folder has none). Trains a reward model and a pairwise judge
on the training pairs and measures their accuracy on the held-out ones; then runs rounds with each of them as the judge,
and compares every policy of both runs by both judges on the held-out prompts, because a policy may overoptimise the
judge that it was trained with. The same command resumes a killed study.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from hh import make_base, train_sft
from study import lines, machine, train_all

from prefopt.evaluate.intervals import Interval, bootstrap
from prefopt.evaluate.win_rate import Scores, WinRate, judge_scores, judged_win_rate
from prefopt.settings import JudgeConfig

JUDGES = {"reward_model": "reward_model", "pairwise": "pairwise_judge"}  # kind of judge -> method that trains it
LENGTH = 512  # tokens of prompt and completion, and positions of the models
ROUNDS = 2


def main() -> None:
    args = arguments(__doc__, prompts=512, eval_prompts=256, max_tokens=96, lr=1e-4).parse_args()
    folder = args.output / "rounds"
    policy, common = begin(args, JUDGES)

    rounds = [*common, "--optim.lr", str(args.lr), "--method", "sppo", "--method.beta", str(args.beta)]
    rounds += ["--rounds.count", str(ROUNDS), "--rounds.prompts", str(args.prompts), "--generate.n", "5"]
    rounds += ["--generate.max_tokens", str(args.max_tokens), "--rounds.eval_prompts", str(args.eval_prompts)]
    runs = {
        f"sppo-{kind}": [*rounds, "--judge.kind", kind, "--judge.path", str(folder / kind / "model")] for kind in JUDGES
    }
    train_all(runs, folder, args.jobs)

    result = {
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in ("prompts", "max_tokens", "judge_lr", "lr", "beta")},
        "judges": {kind: accuracy(folder / kind) for kind in JUDGES},
        "runs": {name: [figures(folder / name, number) for number in range(ROUNDS + 1)] for name in runs},
        "pairs": {name: [pairs(folder / name, number) for number in range(1, ROUNDS + 1)] for name in runs},
        "compared": compare(folder, policy, args),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (folder / "result.md").write_text(table)
    print(table)


def arguments(
    about: str | None, *, prompts: int, eval_prompts: int, max_tokens: int, lr: float
) -> argparse.ArgumentParser:
    """The flags of a study of rounds on HH, with its defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.train", dest="train", required=True, type=Path)
    parser.add_argument("--data.eval", dest="eval", required=True, type=Path)
    parser.add_argument("--output", default=Path("runs/hh"), type=Path, help="the folder of hh.py, or a new one")
    parser.add_argument("--jobs", default=max(1, len(os.sched_getaffinity(0))), type=int, help="runs at the same time")
    parser.add_argument("--prompts", default=prompts, type=int, help="prompts of a round")
    parser.add_argument("--eval_prompts", default=eval_prompts, type=int, help="held-out prompts")
    parser.add_argument("--max_tokens", default=max_tokens, type=int, help="most tokens of a completion")
    parser.add_argument("--judge_lr", default=3e-4, type=float)
    parser.add_argument("--lr", default=lr, type=float)
    parser.add_argument("--beta", default=0.1, type=float)
    return parser


def begin(args: argparse.Namespace, kinds: Mapping[str, str]) -> tuple[Path, list[str]]:
    """(the SFT policy, the flags that all trainings from it share); trains judges in `rounds/` if there are none.

    Args: kinds: kinds of judges, each with the method that trains it.
    """
    data = ["--data.train", str(args.train), "--data.eval", str(args.eval), "--data.on_bad_row", "skip"]
    data += ["--data.max_length", str(LENGTH)]
    policy, _ = train_sft(make_base(args.train, args.output / "base"), data, args.output / "sft", 1e-3)
    common = ["--model.path", str(policy), *data, "--train.global_batch", "16", "--train.micro_batch", "4"]
    judging = [*common, "--optim.lr", str(args.judge_lr), "--eval.every", "1000", "--eval.batch", "16"]
    judges = {kind: ["--method", method, *judging] for kind, method in kinds.items()}
    train_all(judges, args.output / "rounds", args.jobs)
    return policy, common


def accuracy(run: Path) -> dict[str, Any]:
    """Accuracy of a judge on held-out pairs, before and after its training."""
    rows = [json.loads(text) for text in (run / "eval_pairs.jsonl").read_text().splitlines()]
    found = bootstrap([row["rewards/accuracies"] for row in rows])
    first, last = lines(run)[0], lines(run)[-1]
    return {
        "accuracy": vars(found),
        "before": first["rewards/accuracies"],
        "loss": last["loss"],
        "steps": last["step"],
    }


def figures(run: Path, number: int) -> dict[str, float]:
    """The run's own metrics of its policy after a round, by its own judge."""
    rows = [json.loads(text) for text in (run / "rounds.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["round"] == number)


def pairs(run: Path, number: int) -> dict[str, Any]:
    """Number of pairs of a round, and prompts without a pair by reason."""
    return json.loads((run / f"round_{number:02d}" / "pairs.json").read_text())["counts"]


def compare(folder: Path, policy: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Compare every policy of both runs with the start, and the two last ones with each other, by each judge."""
    import torch
    from transformers import AutoTokenizer

    from prefopt import judges
    from prefopt.data.round_prompts import hold_out, read_prompts
    from prefopt.rounds.stages import completions_of
    from prefopt.rounds.store import read_rows
    from prefopt.rounds_method import RoundsMethod

    method, names = RoundsMethod(), [f"sppo-{kind}" for kind in JUDGES]
    read = read_prompts(
        str(args.eval),
        AutoTokenizer.from_pretrained(policy),
        render=method.render_prompt,
        max_prompt=LENGTH - args.max_tokens,
        max_length=LENGTH,
        on_bad_row="skip",
    )
    prompts = hold_out(read.prompts, args.eval_prompts)[1]

    def answers(name: str, number: int) -> list[Any]:
        shards = sorted((folder / name / f"round_{number:02d}" / "held_out").glob("*.jsonl"))
        rows = [row for shard in shards for row in read_rows(shard)]
        assert [row["key"] for row in rows] == [prompt.key for prompt in prompts]
        return [completions_of(row) for row in rows]

    start = answers(names[0], 0)
    policies = {f"{name} round {k}": answers(name, k) for name in names for k in range(1, ROUNDS + 1)}
    out: dict[str, Any] = {}
    for kind in JUDGES:
        settings = JudgeConfig(kind=kind, path=str(folder / kind / "model"))
        judge = judges.make(settings, device=torch.device("cpu"))
        rates = {label: judged_win_rate(judge, prompts, now, start, method) for label, now in policies.items()}
        last = [policies[f"{name} round {ROUNDS}"] for name in names]
        rates[f"{names[0]} against {names[1]}"] = judged_win_rate(judge, prompts, *last, method)
        scores = {
            label: judge_scores(judge, prompts, now, method) for label, now in {"start": start, **policies}.items()
        }
        out[kind] = {
            "win_rates": {label: plain(rate) for label, rate in rates.items()},
            "scores": {label: vars(mean_score(found)) for label, found in scores.items() if found},
        }
        judge.close()
    return out


def mean_score(scores: Scores) -> Interval:
    """Mean score of the completions that have one."""
    return bootstrap([value for group in scores.values for value in group if value == value])


def plain(rate: WinRate) -> dict[str, Any]:
    return {**vars(rate), "rate": vars(rate.rate)}


def render(result: Mapping[str, Any]) -> str:
    """The tables of the study in Markdown."""
    out = ["| judge | held-out accuracy [95%] | before training | held-out loss | pairs |", "|---|---|---|---|---|"]
    for kind, row in result["judges"].items():
        found = Interval(**row["accuracy"])
        out.append(f"| {kind} | {found} | {row['before']:.3f} | {row['loss']:.3f} | {found.count} |")
    out += ["", "| policy, trained by | by the reward model | by the pairwise judge |", "|---|---|---|"]
    compared = result["compared"]
    for label in compared["reward_model"]["win_rates"]:
        out.append(f"| {label} | {' | '.join(_rate(compared[kind]['win_rates'][label]) for kind in JUDGES)} |")
    out += ["", "| policy | score of the reward model [95%] |", "|---|---|"]
    for label, score in compared["reward_model"]["scores"].items():
        out.append(f"| {label} | {Interval(**score)} |")
    out += _own_table(result)
    return "\n".join(out) + "\n"


def _rate(rate: Mapping[str, Any]) -> str:
    interval = Interval(**rate["rate"])
    verdict = "" if interval.excludes(0.5) else ", no difference shown"
    left_out = f", {rate['left_out']} left out" if rate["left_out"] else ""
    return f"{interval} ({rate['wins']}/{rate['ties']}/{rate['losses']}{left_out}{verdict})"


def _own_table(result: Mapping[str, Any]) -> Sequence[str]:
    out = ["", "| run | round | pairs | tokens | cut | KL to start | entropy | distinct-1 | distinct-2 | empty |"]
    out += ["|---" * 10 + "|"]
    for name, rounds in result["runs"].items():
        kept = ["-", *(str(counts["pairs"]) for counts in result["pairs"][name])]
        for number, row in enumerate(rounds):
            kl = f"{row['kl/to_first']:.2f}" if "kl/to_first" in row else "-"
            entropy = f"{row['entropy']:.3f}" if "entropy" in row else "-"
            cells = [f"{row['tokens']:.1f}", f"{row['cut']:.1%}", kl, entropy]
            cells += [f"{row['distinct_1']:.3f}", f"{row['distinct_2']:.3f}", f"{row['empty']:.1%}"]
            out.append(f"| {name} | {number} | {kept[number]} | {' | '.join(cells)} |")
    return out


if __name__ == "__main__":
    main()
