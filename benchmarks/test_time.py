"""Answers at test time at equal inference cost: one sample, best-of-N, revision, test-time PO, and a trained policy.

    python benchmarks/test_time.py --output runs/test_time
    python benchmarks/test_time.py --output runs/my_model --model DIR --prompts FILE --reward_model DIR

The first is on the testbed's bandit, where the expected reward of best-of-N is known exactly and a policy is trained
with DPO on the same world. The second uses your own model, with the authors' temperature and top-p. Every table row is
one run of `scripts/infer.py`; the same command resumes a killed study. Writes result.json and result.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study import lines, machine, train_all

TAKEN = (1, 2, 4, 8, 16)
IMPROVED = {"revision D2-N5": "revision", "test_time_po D2-N5": "test_time_po"}
BETAS = (1.0, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=Path("runs/test_time"), type=Path)
    parser.add_argument("--limit", default=2048, type=int, help="prompts")
    parser.add_argument("--steps", default=400, type=int, help="optimizer steps of 512 pairs of the trained policy")
    parser.add_argument("--model", help="folder or hub id of a model to ask, instead of the bandit's base policy")
    parser.add_argument("--prompts", help="its prompts")
    parser.add_argument("--reward_model", help="who scores its answers")
    parser.add_argument("--max_tokens", default=512, type=int, help="of an answer of it; any other flag is infer's")
    args, args.more = parser.parse_known_args()
    if (args.model is None) != (args.prompts is None) or (args.model is None) != (args.reward_model is None):
        parser.error("--model, --prompts and --reward_model go together")
    result = of_a_model(args) if args.model else of_the_bandit(args)
    result = {"machine": machine(), "prompts": args.limit, **result}
    (args.output / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (args.output / "result.md").write_text(table)
    print(table)


def of_the_bandit(args: argparse.Namespace) -> dict[str, Any]:
    from prefopt.testbed import build_world, truth
    from prefopt.testbed.cache import cache_root

    world: Any = build_world("bandit", cache_dir=cache_root())
    rows = [answered(args, "base policy, one sample", ["--strategy", "plain"])]
    for n in TAKEN:
        row = answered(args, f"base policy, best of {n}", ["--strategy", "best_of_n", "--n", str(n)])
        rows.append(row | {"exact": float(truth.best_of_n(world.log_ref, world.reward, n).mean())})
    rows[0]["exact"] = rows[1]["exact"]
    rows += [
        answered(args, f"base policy, {name}", ["--strategy", strategy, "--n", "5", "--depth", "2"])
        for name, strategy in IMPROVED.items()
    ]
    budget = ["--method", "dpo", "--train.max_steps", str(args.steps), "--eval.every", str(args.steps)]
    runs = {f"dpo-beta{beta:g}": [*budget, "--method.beta", str(beta)] for beta in BETAS}
    train_all(runs, args.output, 1)
    fed = {}
    for name, beta in zip(runs, BETAS, strict=True):
        model = args.output / name / "model"
        log_policy = world.log_probs_of(model)
        for n in (1, 5):
            how = ["--strategy", "best_of_n", "--n", str(n), "--model", str(model), "--judge.kind", "world"]
            row = answered(args, f"DPO beta {beta:g}, {'one sample' if n == 1 else f'best of {n}'}", how)
            rows.append(row | {"exact": float(truth.best_of_n(log_policy, world.reward, n).mean())})
        fed[name] = sum(line["tokens_processed"] for line in lines(args.output / name, "train"))
    return {"of": "the testbed's bandit", "rows": rows, "training_tokens": fed}


def of_a_model(args: argparse.Namespace) -> dict[str, Any]:
    asked = ["--model", args.model, "--prompts", args.prompts, "--generate.max_tokens", str(args.max_tokens)]
    asked += ["--generate.temperature", "0.7", "--generate.top_p", "0.95"]
    asked += ["--judge.kind", "reward_model", "--judge.path", args.reward_model, *args.more]
    rows = [answered(args, f"best of {n}", [*asked, "--strategy", "best_of_n", "--n", str(n)]) for n in TAKEN]
    rows += [
        answered(args, name, [*asked, "--strategy", strategy, "--n", "5", "--depth", "2"])
        for name, strategy in IMPROVED.items()
    ]
    return {"of": f"{args.model} on {args.prompts}, scored by {args.reward_model}", "rows": rows}


def answered(args: argparse.Namespace, name: str, flags: list[str]) -> dict[str, Any]:
    """A table row: the result of a run with these flags."""
    output = args.output / name.replace(",", "").replace(" ", "_")
    command = [sys.executable, "-m", "prefopt", "infer", *flags, "--limit", str(args.limit), "--output", str(output)]
    print(f"{name}: {' '.join(flags)}", flush=True)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise SystemExit(f"{name} ended with status {done.returncode}")
    summary = json.loads((output / "summary.json").read_text())
    return {"name": name, "prompts": summary["prompts"], "depths": summary["depths"]}


def render(result: dict[str, Any]) -> str:
    """The table in Markdown; samples, tokens and FLOP are per prompt."""
    exact = any("exact" in row for row in result["rows"])
    head = [
        "answers of",
        "score",
        *(["exact"] if exact else []),
        "newest samples",
        "parsed",
        "samples",
        "tokens",
        "FLOP",
    ]
    out = [f"{result['of']}, {result['prompts']:,} prompts. {result['machine']}.", ""]
    out += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        last, prompts = row["depths"][-1], row["prompts"]
        drawn = sum(depth["drawn"] for depth in row["depths"])
        parsed = sum(depth["parsed"] for depth in row["depths"])
        skipped = sum(depth["skipped"] for depth in row["depths"])
        tokens, flops = last["prompt_tokens"] + last["generated_tokens"], last["flops"]
        cells = [row["name"], interval(last["best"])]
        cells += [f"{row['exact']:.3f}" if "exact" in row else ""] if exact else []
        cells += [
            interval(last["newest"]),
            f"{parsed / drawn:.0%}" + (f", {skipped:,} steps skipped" if skipped else ""),
        ]
        cells += [f"{last['samples'] / prompts:,.1f}", f"{tokens / prompts:,.0f}"]
        cells += ["" if flops is None else f"{flops / prompts:.3g}"]
        out.append(f"| {' | '.join(cells)} |")
    for name, tokens in result.get("training_tokens", {}).items():
        out += ["", f"{name}: training processed {tokens:,} tokens."]
    return "\n".join(out) + "\n"


def interval(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


if __name__ == "__main__":
    main()
