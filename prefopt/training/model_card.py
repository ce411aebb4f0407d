"""The model card of an exported model: what it is, how it was trained and how to open it, in the hub's format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefopt.figures import NOTHING, readable
from prefopt.method import Method
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig, rate_source
from prefopt.thoughts import ThoughtFormat
from prefopt.training.metrics import WALL_CLOCK_KEYS
from prefopt.training.versions import versions

FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_NO_FIGURES = ("step", "split", "pairs", "seconds", *WALL_CLOCK_KEYS)
_PACKAGES = ("prefopt", "torch", "transformers", "peft", "datasets", "tokenizers")


@dataclass(frozen=True)
class CardContents:
    """The contents of a model card. Nothing in it depends on the time or the place of the run.

    Args:
        method, method_name: the method with its settings, and its name.
        base: what training started from: a hub id or a description.
        base_id, datasets: ids on the hub, where there are any.
        data: lines on the training data.
        adapter: whether the folder holds an adapter only. merged: whether one was merged into these weights.
        chat: whether prompts go through a chat template.
        start, end: metrics by name, before training and of this model. step: of this model.
    """

    method: Method
    method_name: str
    base: str
    base_id: str | None
    datasets: Sequence[str]
    data: Sequence[str]
    adapter: bool
    merged: bool
    chat: bool
    start: Mapping[str, float] = field(default_factory=dict)
    end: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None


def contents(
    config: RunConfig,
    tokenizer: Any,
    lines: Sequence[Mapping[str, Any]],
    fingerprint: str,
    *,
    adapter: bool,
    merged: bool = False,
) -> CardContents:
    """The contents of the card of a training run.

    Args: lines: of metrics.jsonl, up to the step of this model. fingerprint: of the training pairs. adapter, merged: as
        in `CardContents`.
    """
    evaluations = [line for line in lines if line["split"] == "eval"]
    steps = [line for line in lines if line["split"] == "train"]
    data = [
        f"Training pairs: {_named(config.data.train, config)}, fingerprint `{fingerprint}`.",
        f"{len(steps):,} steps, {sum(line['pairs'] for line in steps):,} pairs in them"
        + (f" ({readable(steps[-1]['epoch'])} epochs)." if steps and "epoch" in steps[-1] else "."),
    ]
    data.append(f"Peak learning rate: {readable(config.optim.lr)}, {rate_source(config)}.")
    if evaluations and "pairs" in evaluations[-1]:
        data.append(f"Held-out pairs: {evaluations[-1]['pairs']:,}.")
    return CardContents(
        **_of_any_run(config, tokenizer),
        data=data,
        adapter=adapter,
        merged=merged,
        start=_figures(evaluations[0], config.tied_at_start) if evaluations and evaluations[0]["step"] == 0 else {},
        end=_figures(evaluations[-1]) if evaluations else {},
        step=int(steps[-1]["step"]) if steps else None,
    )


def _of_any_run(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """The fields that a training run and a run of rounds have in common."""
    return {
        "method": config.method,
        "method_name": config.method_name,
        "base": _base(config),
        "base_id": _hub_id(config.model.path),
        "datasets": [one for one in (_hub_id(config.data.train),) if one is not None],
        "chat": bool(tokenizer.chat_template),
    }


def contents_of_rounds(
    config: RunConfig, tokenizer: Any, figures: Sequence[Mapping[str, float]], fingerprint: str, *, adapter: bool
) -> CardContents:
    """The contents of the card of a run of rounds.

    Args: figures: on held-out prompts, of the policy before the first round and after each; maybe none. fingerprint:
        of the prompts. adapter: as in `CardContents`.
    """
    rounds = config.rounds
    path = config.judge.path
    judge = f"`{config.judge.kind}`" if path is None else f"`{config.judge.kind}` {_hub_id(path) or Path(path).name}"
    data = [
        f"{rounds.count} rounds: the policy answered prompts of {_named(config.data.train, config)} (fingerprint "
        f"`{fingerprint}`), judge: {judge}, pairs: `{rounds.pairs}`.",
    ]
    if figures and "prompts" in figures[-1]:
        data.append(f"Held-out prompts: {int(figures[-1]['prompts']):,}.")
    return CardContents(
        **_of_any_run(config, tokenizer),
        data=data,
        adapter=adapter,
        merged=config.lora.merge and not adapter,
        start={name: value for name, value in figures[0].items() if name != "prompts"} if figures else {},
        end={name: value for name, value in figures[-1].items() if name != "prompts"} if figures else {},
    )


def page(known: CardContents) -> str:
    """The card: Markdown with YAML metadata, in the hub's format."""
    name = known.method_name.rpartition(".")[2]
    judge = known.method.needs.output == "scores"
    head: dict[str, Any] = {
        "library_name": "peft" if known.adapter else "transformers",
        "pipeline_tag": "text-classification" if judge else "text-generation",
        "tags": ["prefopt", "preference-optimization", name.replace("_", "-")],
    }
    head["tags"] += ["lora"] if known.adapter or known.merged else []
    head["tags"] += ["thought-preference-optimization"] if "thought" in in_rounds(known.method).card() else []
    head |= {"base_model": known.base_id} if known.base_id else {}
    head |= {"datasets": list(known.datasets)} if known.datasets else {}
    kind = "An adapter (LoRA) of" if known.adapter else "Trained from"
    merged = " An adapter was trained and merged into the weights." if known.merged else ""
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {_title(known)}",
        f"{kind} {known.base} on preferences with prefopt, method `{name}`.{merged}",
        *_thought_section(known.method),
        *_objective(known),
        "## Data",
        "\n".join(f"- {line}" for line in known.data),
        *_results(known),
        "## How to load it",
        f"```python\n{_code(known)}```",
        "## Versions",
        ", ".join(f"{package} {version}" for package, version in versions().items() if package in _PACKAGES),
    ]
    return "\n\n".join(sections) + "\n"


def _title(known: CardContents) -> str:
    if "thought" in in_rounds(known.method).card():
        return "A model that thinks before it answers"
    if known.method.needs.output == "scores":
        return f"A judge of answers ({known.method_name.rpartition('.')[2]})"
    return f"A language model trained on preferences ({known.method_name.rpartition('.')[2]})"


def _objective(known: CardContents) -> list[str]:
    """The loss, its settings and its reference."""
    method = known.method
    lines = ["## Objective", " ".join((type(method).__doc__ or "").strip().partition("\n\n")[0].split())]
    if method.describe():
        lines[-1] += f" Here: {method.describe()}."
    if method.equation():
        lines.append(f"```\n{method.equation()}\n```")
    settings = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    if settings:
        lines.append("\n".join(f"- `{key}`: {value}" for key, value in settings.items()))
    if method.paper():
        lines.append(f"Reference: {method.paper()}")
    return lines


def _results(known: CardContents) -> list[str]:
    """Metrics on held-out data, before training and of this model."""
    if not known.end:
        return []
    of = "This model" if known.step is None else f"This model (step {known.step:,})"
    rows = [f"| Held-out metric | Start | {of} |", "| --- | ---: | ---: |"]
    for name, value in known.end.items():
        before = readable(known.start[name]) if name in known.start else NOTHING
        rows.append(f"| `{name}` | {before} | {readable(value)} |")
    return ["## Results", "\n".join(rows)]


def _code(known: CardContents) -> str:
    """Python code that loads the folder and uses the model."""
    judge = known.method.needs.output == "scores"
    module = "peft" if known.adapter else "transformers"
    auto = f"Auto{'Peft' if known.adapter else ''}ModelFor{'SequenceClassification' if judge else 'CausalLM'}"
    imports = f"from transformers import {auto}, AutoTokenizer\n"
    if known.adapter:
        imports = f"from {module} import {auto}\nfrom transformers import AutoTokenizer\n"
    head = (
        f'{imports}\nfolder = "."  # this folder, or the name of the model on the hub\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"model = {auto}.from_pretrained(folder{', num_labels=1' if known.adapter and judge else ''})\n\n"
    )
    if judge:
        what = "prompt and answer" if known.method.needs.sequences == "completions" else "prompt and two answers"
        return head + (
            f"# the score of a text of {what}; as `judge.path`, prefopt writes the text as in training\n"
            'inputs = tokenizer("How are you? Fine.", return_tensors="pt")\n'
            'print(model(input_ids=inputs["input_ids"]).logits[0, 0].item())\n'
        )
    if known.chat:
        asked = (
            'messages = [{"role": "user", "content": "How are you?"}]\n'
            "text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)\n"
            'inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)\n'
        )
    else:
        asked = 'inputs = tokenizer("How are you?", return_tensors="pt")\n'
    return (
        head
        + asked
        + (
            'answer = model.generate(input_ids=inputs["input_ids"], max_new_tokens=40, do_sample=True)\n'
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
        )
    )


def _thought_section(method: Method) -> list[str]:
    """How a policy that thinks is prompted, and how its response is separated from its thought."""
    if "thought" not in in_rounds(method).card():
        return []
    thought = in_rounds(method).card()["thought"]
    response, before = thought["response_marker"], thought["thought_marker"]
    first = f" Its thought begins with `{before}`." if before else ""
    return [
        f"""## Thought and response

It was trained to write its thoughts, then `{response}`, then its response.{first} Only the response is meant for a
reader. `prefopt infer --model FOLDER` prompts it and prints the response only; `--thought show` prints both.

With other tools, replace `{{prompt}}` in this text by the prompt; a text without `{{prompt}}` is a system message:

```
{ThoughtFormat(**thought).filled_template()}
```

and show what follows `{response}`. A completion without it, or with nothing behind it, holds no response: sample again.

```python
thought, marker, response = completion.partition({response!r})
answer = response.strip() if marker and {response!r} not in response else None  # None: sample again
```

`generation_config.json` has the same under `thought`, and `eos_token_id` there names all tokens that end an
answer."""
    ]


def _figures(line: Mapping[str, Any], excluded: Sequence[str] = ()) -> dict[str, float]:
    excluded = (*_NO_FIGURES, *excluded)
    return {name: float(v) for name, v in line.items() if name not in excluded and isinstance(v, (int, float))}


def _hub_id(path: str | None) -> str | None:
    """`path` if it is an id on the hub, which no folder or file and nothing that looks like one is."""
    if path is None or Path(path).exists() or not _HUB_ID.fullmatch(path) or Path(path).suffix in (".jsonl", ".json"):
        return None
    return path


def _base(config: RunConfig) -> str:
    """What training started from, without its local path."""
    path = config.model.path
    if path is None:
        return f"the base policy of the testbed's world `{config.testbed.world}`"
    return f"[{path}](https://huggingface.co/{path})" if _hub_id(path) else f"`{Path(path).name}`"


def _named(path: str | None, config: RunConfig) -> str:
    if path is None:
        return f"the testbed's world `{config.testbed.world}`"
    return f"[{path}](https://huggingface.co/datasets/{path})" if _hub_id(path) else f"`{Path(path).name}`"
