"""The settings of the `infer` command, read by the same rules as those of a training run."""

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
from prefopt.settings.groups import SEED_LIMIT, ModelConfig, TestbedConfig, check_template
from prefopt.settings.help import Option, OptionGroup, about, help_page, options_of, program, split_topics
from prefopt.settings.nested import flatten, lookup, merge, nest
from prefopt.settings.ranges import Group, ranged
from prefopt.settings.reader import build, origin, read_config_file, split_flags, unknown_keys, unknown_setting
from prefopt.settings.round_rules import protect_api_keys
from prefopt.settings.sampling_groups import GenerateConfig, JudgeConfig
from prefopt.settings.schema import as_plain, type_hints
from prefopt.settings.train import normalized
from prefopt.storage import text_hash


@dataclass(frozen=True)
class InferConfig(Group):
    """All settings of an inference run. `--model DIR` is short for `--model.path DIR`."""

    strategy: str = "plain"
    """Inference strategy, one of the list above."""
    n: int | None = ranged(None, at_least=1)
    """Samples per step. None: 1 for strategy plain, 5 for the others."""
    depth: int | None = ranged(None, at_least=0)
    """Revision steps after the first samples. None: 2 for strategies that revise, 0 for the others."""
    prompts: str | None = None
    """JSONL file with a `prompt` in each row, a string or chat messages; or a .txt file with one prompt per line."""
    prompt: str | None = None
    """A single prompt. Without --prompt and --prompts, prompts are read from the terminal; without a model, or with
    --judge.kind world, they are the testbed's."""
    limit: int | None = ranged(None, at_least=1)
    """Maximum number of prompts to answer. None: all prompts of the file, or 64 of the testbed's."""
    as_chat: bool | None = None
    """Render string prompts with the chat template, as a user turn. None: yes for the terminal and .txt files if the
    model has a template, no for JSONL, as in training."""
    thought: Literal["hide", "show"] = "hide"
    """Hide or show the thoughts of a model that thinks before its response."""
    retries: int = ranged(3, at_least=0)
    """Strategy plain: how often a completion without a response is resampled, with another seed."""
    critique_tokens: int | None = ranged(None, at_least=1)
    """Maximum tokens of a critique or a list of improvements. None: generate.max_tokens."""
    quoted_tokens: int = ranged(2048, at_least=1)
    """Maximum tokens of a response quoted in a prompt; longer ones are right-truncated."""
    templates: str | None = None
    """Folder of .txt files that replace prefopt's prompt templates of the same names."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Extra chat template argument KEY, e.g. `--template_args.enable_thinking false`; a prompt's own value takes
    precedence."""
    template_date: str | None = None
    """Date passed to chat templates that ask for the current date, e.g. 2026-11-30. None: the day the run started."""
    template_timeout: float = ranged(10.0, above=0)
    """Maximum CPU seconds for rendering one conversation."""
    output: str = ""
    """Output JSONL file or folder. Empty: the terminal for strategy plain with a model, else a folder under runs/ whose
    name is derived from the settings."""
    seed: int = ranged(0, at_least=0, below=SEED_LIMIT)
    """Random seed of all samples."""
    threads: int | None = ranged(None, at_least=1)
    """CPU threads. None: OMP_NUM_THREADS, else 1 for models below 3M parameters, else all cores."""
    model: ModelConfig = field(default_factory=ModelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)

    @property
    def on_testbed(self) -> bool:
        """Whether prompts and judge are the testbed's: without a model, or with --judge.kind world."""
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
        """As nested plain values: the content of a YAML file that gives the same run."""
        plain = {f.name: as_plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for key in ("generate.n", *_UNREAD):
            group, _, leaf = key.partition(".")
            del plain[group][leaf]
        return plain


# Defaults on the testbed, where a response is three words and the EOS token.
TESTBED_DEFAULTS: dict[str, Any] = {"limit": 64, "generate": {"max_tokens": 4, "batch": 512}}
# Settings of a run's groups that inference does not read.
_UNREAD = (
    "generate.logprobs",
    "model.gradient_checkpointing",
    "model.router_aux_weight",
    "testbed.pairs",
    "testbed.eval_pairs",
)
# Settings that may change when a run is resumed, in addition to those of a training run.
FREE_TO_CHANGE = ("thought", "threads")


def parse_infer(argv: Sequence[str]) -> InferConfig:
    """The settings of the `infer` command from its command line.

    Raises: ConfigError, one line that names the setting, what was found, what was expected and a fix.
    """
    flags = split_flags(argv)
    if "method.name" in flags:
        registry.get(str(flags["method.name"]))  # a strategy's name has an error of its own
        raise ConfigError("--method: inference trains no model; name a trained one (--model DIR)")
    file = flags.pop("config", None)
    if file is True:
        raise ConfigError("--config: found no value, expected a YAML file")
    layers = [(str(file), read_config_file(Path(str(file))))] if file is not None else []
    if "model" in flags and any(key.startswith("model.") for key in flags):
        flags["model.path"] = flags.pop("model")
    layers.append(("", nest(flags)))
    merged: dict[str, Any] = {}
    for where, layer in layers:
        if isinstance(layer.get("model"), (str, bool)):  # --model DIR; without a value, the error is that of model.path
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
            raise ConfigError(f"{origin(where, key)}: the number of samples is the setting n of inference (--n 5)")
        raise unknown_setting(key, known, where)


def _known_keys() -> list[str]:
    keys = ["config", "help"]
    for name, hint in type_hints(InferConfig).items():
        group = dataclasses.is_dataclass(hint)
        keys += [f"{name}.{leaf}" for leaf in type_hints(hint)] if group else [name]
    return [key for key in keys if key not in ("generate.n", *_UNREAD)]


def _completed(found: InferConfig, named: bool) -> InferConfig:
    """The settings with defaults that depend on others filled in, after all rules are checked."""

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {lookup(found.to_dict(), key)!r}, expected {expected}")

    registry.check_strategy(found.strategy)
    usual = registry.strategies()[found.strategy]
    one = usual.n == 1
    if one and found.n not in (None, 1):
        more = " or ".join(name for name, other in registry.strategies().items() if other.n > 1)
        raise ConfigError(
            f"n: found {found.n}, but strategy '{found.strategy}' uses one sample; choose another (--strategy {more})"
        )
    if found.depth and not usual.depth:
        more = " or ".join(name for name, other in registry.strategies().items() if other.depth)
        raise ConfigError(
            f"depth: found {found.depth}, but strategy '{found.strategy}' does not revise; choose another "
            f"(--strategy {more})"
        )
    n = usual.n if found.n is None else found.n
    depth = usual.depth if found.depth is None else found.depth
    found = dataclasses.replace(found, n=n, depth=depth, generate=dataclasses.replace(found.generate, n=n))
    check_template(found, "")
    protect_api_keys(found.generate, found.judge)
    if found.prompts is not None and found.prompt is not None:
        raise ConfigError("--prompt: given with --prompts; leave one out")
    need(found.prompt is None or bool(found.prompt.strip()), "prompt", "text that is not empty")
    if found.on_testbed:
        for key in ("prompts", "prompt", "as_chat", "chat_template", "template_args", "template_date"):
            if getattr(found, key) not in (None, {}):
                raise ConfigError(
                    f"--{key}: given without --model or with the testbed's judge, but the testbed has its own "
                    "prompts; name a model (--model DIR) and another judge"
                )
    elif found.testbed != TestbedConfig():
        raise ConfigError("testbed: given with --model; leave one out, or use the testbed's judge (--judge.kind world)")
    if found.typed and found.output:
        raise ConfigError("--output: given without prompts; name them (--prompts FILE, or --prompt TEXT)")
    found = dataclasses.replace(
        found, judge=_named_judge(found, one), model=normalized(found.model, "path"), **_local(found)
    )
    _refuse_unread(found, bool(usual.depth))
    if found.output.endswith(".jsonl") and found.judged:
        raise ConfigError(
            f"--output {found.output}: strategy '{found.strategy}' with a judge writes several files; expected a folder"
        )
    if not found.output and found.judged and not found.typed:
        found = dataclasses.replace(found, output=f"runs/{_default_folder(found)}")
    return found


def _refuse_unread(found: InferConfig, revises: bool) -> None:
    """Raises: ConfigError for a setting that the strategy does not use."""
    reads = {
        "retries": not found.judged,
        **dict.fromkeys(("critique_tokens", "quoted_tokens", "templates"), revises),
    }
    for key, read in reads.items():
        value = getattr(found, key)
        if not read and value != getattr(InferConfig(), key):
            judge = " with a judge" if found.judged else ""
            raise ConfigError(
                f"{key}: found {value!r}, but strategy '{found.strategy}'{judge} does not use it; leave it out"
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
        raise ConfigError("judge.reward_scale: found 'std', which is computed over a round; expected a number")
    return found.judge


def _local(found: InferConfig) -> dict[str, Any]:
    """Paths in their normal form."""
    named = {key: getattr(found, key) for key in ("prompts", "templates", "chat_template", "output")}
    return {key: str(Path(path)) for key, path in named.items() if path}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting in which two runs differ and that may not change in a run."""
    lines = identity.differences(old, new)
    return [line for line in lines if line.partition(":")[0] not in FREE_TO_CHANGE]


def _default_folder(found: InferConfig) -> str:
    """An output folder named by a hash of the settings, so that the same command resumes the same run."""
    lines = differences({}, found.to_dict())
    digest = text_hash(json.dumps(lines))[:8]
    task = found.testbed.world if found.on_testbed else Path(found.prompts or "prompt").stem
    return f"infer-{task}-{found.strategy}-{digest}"


def infer_help(argv: Sequence[str] = ()) -> str:
    """The `--help` page of the command; `--help GROUP` prints that group alone."""
    usage = (
        f"usage: {program('infer')} [--model DIR] [--prompts FILE | --prompt TEXT] [--strategy NAME] "
        "[--GROUP.SETTING VALUE ...]\n"
    )
    strategies = [Option(name, "", "", strategy.about) for name, strategy in registry.strategies().items()]
    groups = [
        OptionGroup("strategies", "How prompts can be answered (--strategy NAME).", strategies),
        OptionGroup("run", "", [*_RUN_OPTIONS, *options_of(InferConfig, "")]),
    ]
    for name, hint in type_hints(InferConfig).items():
        if dataclasses.is_dataclass(hint):
            groups.append(OptionGroup(name, _ABOUT.get(name) or about(hint), options_of(hint, f"{name}.", _HIDDEN)))
    return help_page([usage], groups, split_topics(argv)[0])


_HIDDEN = ("--model.path", "--generate.n", *(f"--{key}" for key in _UNREAD))
_RUN_OPTIONS = (
    Option("--config", "FILE", "", "YAML file of settings; flags take precedence over it."),
    Option(
        *("--model", "DIR", ""),
        "Folder or Hub id of a causal language model or a LoRA adapter. None: the testbed's base policy.",
    ),
)
_ABOUT = {
    "model": "Loading of the model.",
    "generate": "Sampling of completions. Engine-specific settings name their engine first.",
    "judge": "The judge that scores the responses. It receives prompt and response, never a thought.",
    "testbed": "Synthetic task with a known optimum, used if no model is given.",
}
