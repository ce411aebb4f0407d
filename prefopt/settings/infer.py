"""The settings of the `infer` command: the vocabulary of `config`, read by the same rules, for who answers prompts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings import identity
from prefopt.settings.groups import ModelConfig, TestbedConfig, check_template_settings
from prefopt.settings.help import Option, help_page, options_of
from prefopt.settings.nested import flatten, lookup, merge, nest
from prefopt.settings.reader import build, origin, read_config_file, split_flags, unknown_keys, unknown_setting
from prefopt.settings.round_rules import check_sampling
from prefopt.settings.sampling_groups import GenerateConfig, JudgeConfig
from prefopt.settings.schema import as_plain, type_hints
from prefopt.settings.train import normalized
from prefopt.storage import text_hash


@dataclass(frozen=True)
class InferConfig:
    """Everything that decides how prompts are answered. `--model DIR` is short for `--model.path DIR`."""

    strategy: str = "plain"
    """How a prompt is answered; see above."""
    n: int | None = None
    """Samples of each step; takes the place of generate.n. None: 1 for strategy plain, else 5."""
    depth: int | None = None
    """Steps after the first samples. None: 2 for strategies that revise, 0 for the others."""
    prompts: str | None = None
    """JSONL file with `prompt` in each row, text or chat messages; or a .txt file with one prompt per line."""
    prompt: str | None = None
    """One prompt. With neither, prompts are read from the terminal. Without a model, or with --judge.kind world, they
    are the testbed's."""
    limit: int | None = None
    """Most prompts that are answered. None: all of the file; 64 of the testbed."""
    as_chat: bool | None = None
    """Whether a text is a user's turn for the chat template. None: typed ones and lines of a .txt file are, where the
    model has a template, and texts in JSONL stand for themselves, as in training."""
    thought: Literal["hide", "show"] = "hide"
    """Whether the thoughts of a model that thinks first are shown beside its responses."""
    retries: int = 3
    """Strategy plain: how often a completion without a response is sampled again, with another seed."""
    critique_tokens: int | None = None
    """Most tokens of a critique and of a list of improvements. None: generate.max_tokens."""
    quoted_tokens: int = 2048
    """Most tokens of a response that is quoted in a prompt; it loses its tail."""
    templates: str | None = None
    """Folder whose .txt files take the place of the prompts that come with prefopt, each by its name."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, e.g. `--template_args.enable_thinking false`; those of a row win."""
    template_date: str | None = None
    """The date, e.g. 2026-11-30, that a chat template which asks for today's is told. None: that of the run's start."""
    template_timeout: float = 10.0
    """Processor time, in seconds, that the chat template may take to render a conversation."""
    output: str = ""
    """JSONL file or folder. None: the terminal for strategy plain with a model, else a folder named by the settings."""
    seed: int = 0
    """Of all samples."""
    threads: int | None = None
    """CPU threads. None: OMP_NUM_THREADS, else 1 for models under 3M parameters, else all cores."""
    model: ModelConfig = field(default_factory=ModelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)

    @property
    def on_testbed(self) -> bool:
        """Whether prompts and judge are the testbed's: without a model, or where that judge is named."""
        return self.model.path is None or registry.is_testbed_judge(self.judge.kind)

    @property
    def typed(self) -> bool:
        """Whether prompts are read from the terminal."""
        return not self.on_testbed and self.prompts is None and self.prompt is None

    @property
    def judged(self) -> bool:
        """Whether responses are scored."""
        return self.judge.kind not in (None, "none")

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values: what a YAML file that gives this very run would hold."""
        plain = {f.name: as_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for key in ("generate.n", *_UNREAD):
            group, _, leaf = key.partition(".")
            del plain[group][leaf]
        return plain


# What answers on the testbed depart in: a response is three words and a terminator.
TESTBED_DEFAULTS: dict[str, Any] = {"limit": 64, "generate": {"max_tokens": 4, "batch": 512}}
# Settings of a run's groups that nothing reads here.
_UNREAD = (
    "generate.logprobs",
    "model.gradient_checkpointing",
    "model.router_aux_weight",
    "testbed.pairs",
    "testbed.eval_pairs",
)
# Settings that may change between the attempts at one run, beside those of any run.
FREE_TO_CHANGE = ("thought", "threads")
_ABOUT = {
    "--config": ("FILE", "YAML file of settings; flags take precedence over it."),
    "--model": (
        "DIR",
        "Folder or hub id of a language model or a LoRA adapter. None: the testbed's base policy.",
    ),
}


def parse_infer(argv: Sequence[str]) -> InferConfig:
    """The settings of the `infer` command from its command line, as `config.parse` reads those of a run.

    Raises: ConfigError, one line that names the key, what was found, what was expected and the nearest mend.
    """
    flags = split_flags(argv)
    if "method.name" in flags:
        registry.get(str(flags["method.name"]))  # says of a strategy that it is one
        raise ConfigError("--method: nothing is trained here; name the trained model (--model DIR)")
    file = flags.pop("config", None)
    if file is True:
        raise ConfigError("--config: found no value, expected a YAML file")
    layers = [(str(file), read_config_file(Path(str(file))))] if file is not None else []
    if "model" in flags and any(key.startswith("model.") for key in flags):
        flags["model.path"] = flags.pop("model")
    layers.append(("", nest(flags)))
    merged: dict[str, Any] = {}
    for where, layer in layers:
        if isinstance(layer.get("model"), (str, bool)):  # --model DIR; without a value it is refused as model.path is
            layer["model"] = {"path": layer["model"]}
        _check_keys(layer, where)
        merged = merge(merged, layer)
    if lookup(merged, "model.path") is None or registry.is_testbed_judge(lookup(merged, "judge.kind")):
        merged = merge(TESTBED_DEFAULTS, merged)
    sources = {key: where for where, layer in layers for key in flatten(layer)}
    return _completed(build(InferConfig, merged, "", sources), "strategy" in merged)


def _check_keys(layer: Mapping[str, Any], where: str) -> None:
    known = [key for key in _known_keys() if not (where and key in ("config", "help"))]
    for key in unknown_keys(layer, known, where):
        if key == "generate.n":
            raise ConfigError(f"{origin(where, key)}: here the number of samples is called n (--n 5)")
        raise unknown_setting(key, known, where)


def _known_keys() -> list[str]:
    keys = ["config", "help"]
    for name, hint in type_hints(InferConfig).items():
        group = dataclasses.is_dataclass(hint)
        keys += [f"{name}.{leaf}" for leaf in type_hints(hint)] if group else [name]
    return [key for key in keys if key not in ("generate.n", *_UNREAD)]


def _completed(found: InferConfig, named: bool) -> InferConfig:
    """The settings with what follows from them, held to each other."""

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {lookup(found.to_dict(), key)!r}, expected {expected}")

    registry.check_strategy(found.strategy)
    usual = registry.strategies()[found.strategy]
    one = usual.n == 1
    need(found.n is None or found.n >= 1, "n", "a number >= 1")
    need(found.depth is None or found.depth >= 0, "depth", "a number >= 0")
    if one and found.n not in (None, 1):
        more = " or ".join(name for name, other in registry.strategies().items() if other.n > 1)
        raise ConfigError(f"n: found {found.n}, but strategy '{found.strategy}' draws one sample (--strategy {more})")
    if found.depth and not usual.depth:
        more = " or ".join(name for name, other in registry.strategies().items() if other.depth)
        raise ConfigError(
            f"depth: found {found.depth}, but strategy '{found.strategy}' takes no step after its samples "
            f"(--strategy {more})"
        )
    n = usual.n if found.n is None else found.n
    depth = usual.depth if found.depth is None else found.depth
    found = dataclasses.replace(found, n=n, depth=depth, generate=dataclasses.replace(found.generate, n=n))
    for key in ("limit", "critique_tokens", "threads"):
        value = getattr(found, key)
        need(value is None or value >= 1, key, "a number >= 1, or none")
    need(found.retries >= 0, "retries", "a number >= 0")
    need(found.quoted_tokens >= 1, "quoted_tokens", "a number >= 1")
    for key in ("seed", "testbed.seed"):
        need(0 <= lookup(found.to_dict(), key) < 2**31, key, "a whole number from 0 to 2147483647")
    check_template_settings(found, "")
    check_sampling({**found.to_dict(), "generate": as_plain(found.generate)})
    if found.prompts is not None and found.prompt is not None:
        raise ConfigError("--prompt: given beside --prompts; name one of them")
    need(found.prompt is None or bool(found.prompt.strip()), "prompt", "a text")
    if found.on_testbed:
        for key in ("prompts", "prompt", "as_chat", "chat_template", "template_args", "template_date"):
            if getattr(found, key) not in (None, {}):
                raise ConfigError(
                    f"--{key}: given without --model or with the testbed's judge, and the testbed has prompts of its "
                    "own; name the model (--model DIR) and another judge"
                )
    elif found.testbed != TestbedConfig():
        raise ConfigError(
            "testbed: given beside --model; leave one of them out, or let the testbed judge too (--judge.kind world)"
        )
    if found.typed and found.output:
        raise ConfigError("--output: given without prompts to write of (--prompts FILE, or --prompt TEXT)")
    found = dataclasses.replace(
        found, judge=_named_judge(found, one), model=normalized(found.model, "path"), **_local(found)
    )
    _refuse_unread(found, bool(usual.depth))
    if found.output.endswith(".jsonl") and found.judged:
        raise ConfigError(
            f"--output {found.output}: strategy '{found.strategy}' with a judge writes several files, expected a folder"
        )
    if not found.output and found.judged and not found.typed:
        found = dataclasses.replace(found, output=f"runs/{_default_folder(found)}")
    return found


def _refuse_unread(found: InferConfig, revises: bool) -> None:
    """Raises: ConfigError for a setting that the strategy does not read."""
    reads = {
        "retries": not found.judged,
        **dict.fromkeys(("critique_tokens", "quoted_tokens", "templates"), revises),
    }
    for key, read in reads.items():
        value = getattr(found, key)
        if not read and value != getattr(InferConfig(), key):
            judge = " with a judge" if found.judged else ""
            raise ConfigError(
                f"{key}: found {value!r}, which strategy '{found.strategy}'{judge} does not read (leave it out)"
            )


def _named_judge(found: InferConfig, one: bool) -> JudgeConfig:
    kind = found.judge.kind
    if kind is None and found.on_testbed:
        return dataclasses.replace(found.judge, kind=registry.testbed_judge())
    if kind in (None, "none") and not one:
        raise ConfigError(
            f"judge.kind: {'not given' if kind is None else repr(kind)}, expected the judge that scores the samples "
            f"of strategy '{found.strategy}', one of {', '.join(registry.judges_of_files())}"
        )
    if found.judge.reward_scale == "std":
        raise ConfigError("judge.reward_scale: found 'std', which is of the candidates of a round, expected a number")
    return found.judge


def _local(found: InferConfig) -> dict[str, Any]:
    """Paths in one spelling."""
    named = {key: getattr(found, key) for key in ("prompts", "templates", "chat_template", "output")}
    return {key: str(Path(path)) for key, path in named.items() if path}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting in which two runs differ and that may not change in a run."""
    lines = identity.differences(old, new)
    return [line for line in lines if line.partition(":")[0] not in FREE_TO_CHANGE]


def _default_folder(found: InferConfig) -> str:
    """A name that the same settings give again, so that the same command continues the same run."""
    lines = differences({}, found.to_dict())
    digest = text_hash(json.dumps(lines))[:8]
    task = found.testbed.world if found.on_testbed else Path(found.prompts or "prompt").stem
    return f"infer-{task}-{found.strategy}-{digest}"


def infer_help() -> str:
    """The grouped `--help` of the command."""
    general = [(flag, kind, "", text) for flag, (kind, text) in _ABOUT.items()]
    general += options_of(InferConfig, "")
    head = [
        "usage: infer.py [--model DIR] [--prompts FILE | --prompt TEXT] [--strategy NAME] [--GROUP.SETTING VALUE ...]",
        "",
        "strategies:",
        *(f"  {name:<42} {strategy.about}" for name, strategy in registry.strategies().items()),
        "",
    ]
    groups: list[tuple[str, str, list[Option]]] = [("run", "", general)]
    for name, hint in type_hints(InferConfig).items():
        if dataclasses.is_dataclass(hint):
            about = _GROUPS.get(name) or (hint.__doc__ or "").strip()
            rows = [row for row in options_of(hint, f"{name}.") if row[0] not in _HIDDEN]
            groups.append((name, about, rows))
    return help_page(head, groups)


_HIDDEN = ("--model.path", "--generate.n", *(f"--{key}" for key in _UNREAD))
_GROUPS = {
    "model": "How the policy is loaded.",
    "generate": "How completions are sampled.",
    "judge": "Who scores the responses. It sees prompt and response, never a thought.",
    "testbed": "The exactly solvable world, used when no model is named.",
}
