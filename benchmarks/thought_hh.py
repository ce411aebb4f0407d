"""Thought PO on real text, and its direct baseline, judged by a reward model that was trained on the same pairs.

    python benchmarks/thought_hh.py --data.train train.jsonl --data.eval test.jsonl --output runs/hh

Starts from the SFT policy and the reward model of `rounds_hh.py` (trained here if the folder has none). A policy this
small does not follow a thought prompt that it was not trained on, so it is first fine-tuned on the format: the training
pairs' chosen sides, once unchanged and once with the thought prompt and the first words of the answer as the draft. Of
three epochs the model with the lowest held-out loss is used. Both arms start from this policy, and differ in
`method.thought_prompt` alone. The same command resumes a killed study.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from rounds_hh import JUDGES, accuracy, arguments, begin, figures
from study import lines, machine, train_all

from prefopt.thoughts import read_format

ROUNDS = 2
ARMS = {"direct": "none", "thought": "specific"}
DRAFT = 12  # words of the answer that form its thought
TURN = "\n\nAssistant:"


def main() -> None:
    parser = arguments(__doc__, prompts=512, eval_prompts=200, max_tokens=128, lr=3e-5)
    parser.add_argument("--n", default=5, type=int, help="completions of a prompt")
    parser.add_argument("--select_prompts", default=48, type=int, help="held-out prompts that choose a round's policy")
    parser.add_argument("--form_lr", default=3e-4, type=float)
    parser.add_argument("--form_epochs", default=3, type=float)
    args = parser.parse_args()
    folder = args.output / "thoughts"
    folder.mkdir(parents=True, exist_ok=True)
    _, flags = begin(args, {"reward_model": JUDGES["reward_model"]})

    form = flags_with(
        flags,
        data_train=show_form(args.train, folder / "form_train.jsonl"),
        data_eval=show_form(args.eval, folder / "form_eval.jsonl"),
    )
    form += ["--method", "sft", "--optim.lr", str(args.form_lr), "--train.epochs", str(args.form_epochs)]
    train_all({"form": [*form, "--eval.select", "loss", "--eval.every", "125"]}, folder, 1)

    common = flags_with(flags, model_path=folder / "form" / "model")
    common += ["--method", "thought_po", "--method.beta", str(args.beta), "--optim.lr", str(args.lr)]
    common += ["--eval.every", "8"]
    common += ["--judge.kind", "reward_model", "--judge.path", str(args.output / "rounds" / "reward_model" / "model")]
    common += ["--rounds.count", str(ROUNDS), "--rounds.prompts", str(args.prompts), "--generate.n", str(args.n)]
    common += ["--rounds.eval_prompts", str(args.eval_prompts), "--rounds.select_prompts", str(args.select_prompts)]
    common += ["--generate.max_tokens", str(args.max_tokens), "--generate.temperature", "0.8"]
    common += ["--generate.top_p", "0.95"]  # sampling as in the paper
    runs = {arm: [*common, "--method.thought_prompt", prompt] for arm, prompt in ARMS.items()}
    train_all(runs, folder, args.jobs)
    # when both are finished, the same command writes the win rates between them without training again
    from prefopt.cli import train

    status = train(
        [
            *runs["thought"],
            *("--train.threads", "1", "--output", str(folder / "thought"), "--rounds.compare", str(folder / "direct")),
        ]
    )
    if status != 0:
        raise SystemExit("the comparison did not finish")

    names = (
        "prompts",
        "n",
        "max_tokens",
        "judge_lr",
        "form_lr",
        "form_epochs",
        "lr",
        "beta",
        "eval_prompts",
        "select_prompts",
    )
    result = {
        "machine": machine(),
        "settings": {name: getattr(args, name) for name in names},
        "reward_model": accuracy(args.output / "rounds" / "reward_model"),
        "form": {"loss": [line["loss"] for line in lines(folder / "form")]},
        "runs": {arm: [figures(folder / arm, number) for number in range(ROUNDS + 1)] for arm in ARMS},
        "pairs": {arm: [made(folder / arm, number) for number in range(1, ROUNDS + 1)] for arm in ARMS},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    table = render(result)
    (folder / "result.md").write_text(table)
    print(table)


def flags_with(flags: Sequence[str], **values: Path) -> list[str]:
    """Flags with other values of some; `data_train` is `--data.train`."""
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    named |= {f"--{name.replace('_', '.', 1)}": str(value) for name, value in values.items()}
    return [word for pair in named.items() for word in pair]


def show_form(file: Path, out: Path) -> Path:
    """The chosen sides of a file of dialogues, unchanged and in the format of a thought prompt."""
    if out.exists():
        return out
    form, rows = read_format(ARMS["thought"], key="benchmarks"), []
    for line in file.read_text().splitlines():
        dialogue = json.loads(line)["chosen"]
        prompt, turn, answer = dialogue.rpartition(TURN)
        if not (turn and answer.strip()) or form.response_marker in dialogue:
            continue
        rows.append({"prompt": prompt + turn, "completion": answer})
        draft = " ".join(answer.split()[:DRAFT])
        asked = form.render(prompt + turn)
        rows.append({"prompt": asked, "completion": f" {draft} {form.response_marker}{answer}"})
    scratch = out.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scratch.replace(out)
    return out


def made(run: Path, number: int) -> dict[str, Any]:
    """The pairs of a round: their number, prompts without a pair by reason, and the method's metrics."""
    manifest = json.loads((run / f"round_{number:02d}" / "pairs.json").read_text())
    return {"counts": manifest["counts"], "figures": manifest["figures"]}


def render(result: Mapping[str, Any]) -> str:
    """The tables of the study in Markdown."""

    def spread(row: Mapping[str, float], name: str, spec: str = ".3f") -> str:
        if name not in row:
            return "-"
        return f"{row[name]:{spec}} [{row[f'{name}_low']:{spec}}, {row[f'{name}_high']:{spec}}]"

    out = ["| arm | round | score [95%] | win rate vs start [95%] | vs direct [95%] | parsed | thought | response |"]
    out += ["|---" * 8 + "|"]
    for arm, rounds in result["runs"].items():
        for number, row in enumerate(rounds):
            cells = [spread(row, name) for name in ("score", "win_probability/vs_start", "win_probability/vs_other")]
            cells += [f"{row['parsed']:.1%}", f"{row.get('thought_characters', 0):.0f}"]
            out.append(f"| {arm} | {number} | {' | '.join(cells)} | {row['response_characters']:.0f} |")
    out += [
        "",
        "| arm | round | pairs | rho | chosen | rejected | rejected without response | KL to start | distinct-1 |",
    ]
    out += ["|---" * 9 + "|"]
    for arm, rounds in result["runs"].items():
        for number, pairs in enumerate(result["pairs"][arm], 1):
            of, row = pairs["figures"], rounds[number]
            lengths = [
                f"{of[name]:.0f}" if name in of else "-" for name in ("chosen_characters", "rejected_characters")
            ]
            cells = [f"{pairs['counts']['pairs']}", f"{of['rho']:.2f}", *lengths, f"{of['rejected_unparsed']:.1%}"]
            cells += [f"{row['kl/to_first']:.2f}", f"{row['distinct_1']:.3f}"]
            out.append(f"| {arm} | {number} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
