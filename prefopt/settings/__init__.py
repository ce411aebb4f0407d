"""One vocabulary for settings: YAML path = flag = sweep key. Strict, and read without importing torch.

A run's settings are dataclass defaults, then the testbed's departures when no model and no data are named, then the
YAML file, then the flags. A flag is a one-key YAML file: both pass through the same checks and coercions.
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import difflib
import hashlib
import inspect
import itertools
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from prefopt import redaction, registry
from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method
from prefopt.settings import other_names
from prefopt.storage import read_text


@dataclass(frozen=True)
class ModelConfig:
    """The policy at the start of the run."""

    path: str | None = None
    """Folder or hub id of a causal language model or a LoRA adapter. None: the testbed's base policy."""
    revision: str | None = None
    """Revision of a hub model."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision in which weights are held and updated."""
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Precision of the exported weights. None: that in which they are held."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation, as transformers names it; eager in place of sdpa where a family has none."""
    quantize: Literal["nf4", "fp4"] | None = None
    """QLoRA: hold the weights below the head in 4 bits (bitsandbytes), doubly quantised, under an adapter. None: no."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of products with quantised weights. None: that of train.mixed_precision, else of model.dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload_activations: bool = False
    """Keep what the backbone saves for the backward pass in the host's memory: less on the GPU, more time."""
    router_aux_weight: float | None = None
    """Of a mixture-of-experts: coefficient of its routers' load-balancing loss. None: the one in the model's config."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""


@dataclass(frozen=True)
class ReferenceConfig:
    """The frozen model that a method compares the policy with, loaded only if the method needs one."""

    path: str | None = None
    """Folder or hub id. None: the policy's starting weights; with LoRA no second copy of them is held."""
    cache: Literal["none", "logps", "hidden"] = "none"
    """Compute its log-probabilities, or for token-level KL its hidden states, once, and keep them for all runs."""
    cache_dir: str | None = None
    """Where caches lie. None: `reference` in prefopt's cache."""
    cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of kept hidden states."""
    sync_every: int | None = None
    """Optimizer steps after which the reference is drawn to the policy. None: it never moves."""
    sync_weight: float = 1.0
    """Weight of the policy then; 1 replaces the reference, less mixes."""


@dataclass(frozen=True)
class LoraConfig:
    """Train a low-rank adapter (peft) on frozen weights. An adapter that model.path holds is continued as it is."""

    r: int | None = None
    """Rank; naming it turns LoRA on. None: train all weights, or the adapter that model.path holds."""
    alpha: int | None = None
    """The adapter counts alpha / r. None: 2 r."""
    use_rslora: bool | None = None
    """The adapter counts alpha / sqrt(r) instead. None: false."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training steps; never in the reference, never in evaluations."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, e.g. q_proj,v_proj. None, or all-linear: all but the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapter, and saved with it, e.g. lm_head."""
    merge: bool = False
    """Export a plain model, the adapter merged into its weights; the adapter itself goes to `adapter/` beside it."""


@dataclass(frozen=True)
class DataConfig:
    """Pairs and how they become tokens."""

    train: str | None = None
    """JSON, CSV or Parquet file, folder or hub id; several with commas between. None: the testbed's pairs."""
    weights: tuple[float, ...] | None = None
    """Of each source of data.train, its share of the pairs of an epoch. None: each pair once."""
    eval: str | None = None
    """Held-out pairs, named like data.train. None: a share of the training pairs, split by prompt."""
    eval_fraction: float = 0.05
    """Share of prompts held out where no eval file is named; 0 holds out none."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our key -> the file's key, e.g. `--data.columns.chosen good`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a bad row, or drop it and count it in the report."""
    max_length: int = 1024
    """Tokens of prompt and completion together; a longer prompt loses its head first."""
    overlong: Literal["cut_prompt", "drop", "cut_completion"] = "cut_prompt"
    """Of a longer pair, what goes: the beginning of the prompt first, all of it, or the end of completions."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the text of the data may hold, e.g. [THINK],[/THINK]; any other one makes a bad row."""
    chat_template: str | None = None
    """Jinja file that replaces the tokenizer's chat template."""
    dialogues: Literal["text", "messages"] = "text"
    """Train on HH dialogues as the text that they are, or as the turns of the chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template, e.g. `--data.template_args.enable_thinking false`; those of a row win."""
    template_date: str | None = None
    """The date, e.g. 2026-11-30, that a chat template which asks for today's is told. None: that of the run's start."""
    template_seconds: float = 10.0
    """Processor time, in seconds, that the chat template may take to render a conversation."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning rate; the same for every method unless you say otherwise."""

    name: str = "adamw"
    """adamw, adamw_8bit, paged_adamw_8bit, adafactor, rmsprop, sgd, or the dotted path of a torch optimizer class."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After warm-up: down to 0 over `train.schedule_epochs`, or constant."""
    warmup_ratio: float = 0.1
    """Warm-up as a share of the schedule's steps."""
    warmup_steps: int | None = None
    """Warm-up in steps; takes the place of warmup_ratio."""
    weight_decay: float = 0.0
    """Decay of weight matrices, vectors are left alone; decoupled in adamw, part of the gradient in rmsprop and sgd."""
    clip: float = 1.0
    """Largest gradient norm, over all parameters; 0 turns clipping off."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer class, e.g. `--optim.args.eps 1e-6`."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    global_batch: int = 64
    """Pairs per optimizer step over all processes; accumulation is derived from it."""
    tokens_per_batch: int | None = None
    """Tokens per step: as many pairs as fit, prompts counted with either completion. Takes global_batch's place."""
    micro_batch: int = 8
    """Pairs per forward pass and process: memory only, the result does not depend on it."""
    layout: Literal["auto", "padded", "packed", "prefix_shared", "packed_prefix_shared"] = "auto"
    """How sequences stand in rows: memory and speed only. auto: the fastest exact one for each micro-batch."""
    group_by_length: bool = False
    """Put pairs of like length into one step: less padding, the same expected gradient."""
    train_epochs: float = 1.0
    """Passes over the training pairs."""
    schedule_epochs: float | None = None
    """Passes that the learning-rate schedule is laid out for. None: the run's own length."""
    max_steps: int | None = None
    """Optimizer steps; takes the place of train_epochs. Required for an endless stream."""
    max_tokens: int | None = None
    """Train until so many tokens are processed (`tokens_processed`), in place of epochs or steps, schedule included."""
    max_seconds: float | None = None
    """Train until optimizer steps have taken so long, over all attempts, in place of epochs or steps; the same."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass, in fp16 with a gradient scaler; statistics stay float32."""
    compile: bool = False
    """Compile the layers of the backbone (torch.compile); compiling takes its time at the start."""
    save_every: int = 100
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept."""
    file_mb: float = 2000
    """MB of a file of weights; each process holds and writes one at a time."""
    check_memory: bool = True
    """On a GPU, refuse before any model is loaded what cannot fit there by the plan of its memory."""
    join_seconds: float = 300.0
    """Seconds that processes wait for each other at the start."""
    threads: int | None = None
    """CPU threads per process. None: OMP_NUM_THREADS, else 1 for models under 3M parameters, else cores / processes."""
    show_batch: bool = False
    """Print the first batch, decoded, with its masks."""
    check_first_batch: bool = True
    """Before step 1, score the first rows a second time by an independent path and stop if they differ."""
    deterministic: bool = False
    """Only deterministic algorithms on a GPU (slower)."""
    callbacks: tuple[str, ...] = ()
    """Callback classes to call during training, by dotted path, e.g. `my_callbacks.LogWeightNorm`."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation; its figures do not depend on batch or process count."""

    every: int = 100
    """Optimizer steps between evaluations; there is always one at the end, and one at the start by eval.at_start."""
    at_start: bool = True
    """Evaluate before the first step too, which figures at the end are compared with."""
    max_pairs: int | None = None
    """Score at most so many held-out pairs: a random sample, the same at every evaluation and for every run and seed on
    the same pairs. None: all."""
    batch: int = 16
    """Pairs per forward pass and process."""
    select: str | None = None
    """Export the model of the evaluation with the best of this metric: the lowest loss, the highest of any other, or as
    `kl/chosen:min` or `samples/kl:max` say. None: the last model."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better eval.select. None: train to the end."""
    generate: int = 0
    """Held-out prompts that policy and reference answer at each evaluation, as generate.* says. 0: none."""


@dataclass(frozen=True)
class KernelConfig:
    """Tiles of the fused head: memory and speed only, never results."""

    token_tile: int | None = None
    """Scored tokens per tile. None: what suits the device."""
    vocab_tile: int | None = None
    """Vocabulary entries per tile. None: what suits the device."""
    cache_mb: int = 1024
    """MiB of logits per forward pass that may be kept for the backward pass, which then has less to compute."""


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of generate, judge, pair, train. The policy at a round's start samples, and is the round's reference."""

    count: int = 0
    """Rounds. 0: train once, on the pairs of data.train. Else its rows' prompts are what the policy is asked."""
    prompts: int | None = None
    """Prompts of a round; no prompt is used twice. None: an equal share of all."""
    eval_prompts: int = 64
    """Held-out prompts on which policies are compared after each round; 0: none. From data.eval if that is given."""
    shard: int = 32
    """Prompts per shard: the most that a killed stage does again."""
    pairs: Literal["best_worst", "data_worst", "data_sampled"] = "best_worst"
    """Chosen against rejected: the judge's first against its last; the data's own completion against the judge's last;
    or the data's own against a sampled one, which needs no judge."""
    max_similarity: float | None = None
    """Drop pairs whose sides share more than this of their tokens (0 to 1). None: only those that are equal."""
    resample: int = 3
    """Held-out prompts whose answer holds no response are asked again, at most so many times."""
    select_prompts: int = 0
    """Further held-out prompts: each round then keeps, of the policies at every eval.every steps, the one whose answers
    to them the judge scores best. 0: the last one."""
    compare: str | None = None
    """Folder of another run with the same held-out prompts, whose policies are compared with, round by round."""
    candidates: str | None = None
    """Folder of another run of rounds, whose candidates and scores are taken over where policy, prompts, sampling and
    judge agree, so that only what comes after is done again."""
    launcher: str = ""
    """What scripts/rounds.py starts each train stage with, e.g. "accelerate launch --num_processes 8". None: python."""


@dataclass(frozen=True)
class GenerateConfig:
    """How completions are sampled: in rounds, and at evaluations where eval.generate asks for samples."""

    engine: Literal["transformers", "vllm", "openai"] = "transformers"
    """In process; vLLM in a process and an environment of its own; or a server with OpenAI's interface."""
    n: int = 5
    """Completions per prompt."""
    temperature: float = 1.0
    """Of the softmax; 0 takes the most likely token."""
    top_p: float = 1.0
    """Share of the probability that is kept, from the most likely token down."""
    top_k: int = 0
    """Tokens that are kept, from the most likely down; 0: all."""
    max_tokens: int = 512
    """Most tokens of a completion."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion beside the model's own terminators."""
    logprobs: bool = False
    """Keep the log-probability of each token."""
    batch: int = 64
    """transformers: completions per forward pass."""
    continuous: bool = False
    """transformers: continuous batching, for completions of very different length."""
    python: str | None = None
    """vllm: Python of the environment that holds it. None: this one."""
    tensor_parallel: int = 1
    """vllm: GPUs that share one copy of the model."""
    replicas: int = 1
    """vllm: copies of the model, each in a process of its own."""
    args: dict[str, Any] = field(default_factory=dict)
    """vllm: further arguments of its LLM class, e.g. `--generate.args.gpu_memory_utilization 0.8`."""
    url: str | None = None
    """openai: the server, e.g. http://localhost:8000/v1."""
    served_model: str | None = None
    """openai: name of the policy on the server. None: its folder, which the server must then list as a model."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key, if the server wants one."""
    concurrency: int = 16
    """openai: requests at the same time."""
    retries: int = 5
    """openai: attempts after the first one, with growing pauses."""
    timeout: float = 300.0
    """openai: seconds until a request counts as lost."""


@dataclass(frozen=True)
class JudgeConfig:
    """Who ranks the completions of rounds. It sees prompt and response, never a thought."""

    kind: Literal["none", "reward_model", "pairwise", "llm", "function", "length", "world"] | None = None
    """A classifier with one logit; one that reads two responses; a language model that is asked; a Python function; the
    shorter response; or the testbed's own. None: `world` on the testbed, else it must be named."""
    path: str | None = None
    """reward_model, pairwise: folder or hub id. function: module:callable. llm: `policy` asks the round's policy."""
    mode: Literal["pairwise", "score"] = "pairwise"
    """llm: a verdict on two responses, asked in both orders, or a score of each."""
    scale: tuple[float, ...] = (1.0, 10.0)
    """llm, mode score: the lowest and the highest score; another one is not counted as an answer."""
    reward_scale: float | Literal["std"] = 1.0
    """Factor on scores and logits before the sigmoid that makes win probabilities of them; std: 1 / their standard
    deviation among the responses of a prompt, over a round. For judges whose scores lie close together."""
    template: str | None = None
    """llm: file with the question that is asked. None: the one that comes with prefopt for this mode."""
    batch: int = 16
    """reward_model, pairwise: texts per forward pass."""
    max_length: int | None = None
    """reward_model, pairwise: most tokens of a text. None: what the model has positions for, or its tokenizer names."""
    trust_remote_code: bool = False
    """reward_model, pairwise: run model code that comes with the weights."""
    url: str | None = None
    """llm: a server with OpenAI's interface, e.g. http://localhost:8000/v1."""
    model: str | None = None
    """llm: name of the model on the server. None: the only one it serves."""
    api_key_env: str = "OPENAI_API_KEY"
    """llm with a url: environment variable that holds the key, if the server wants one."""
    temperature: float = 0.0
    """llm: of the judge's own answers."""
    max_tokens: int = 512
    """llm: most tokens of an answer of the judge."""
    concurrency: int = 16
    """llm with a url: requests at the same time."""
    retries: int = 3
    """llm with a url: attempts after the first one, with growing pauses."""
    timeout: float = 120.0
    """llm with a url, function: seconds until an attempt, or a call, counts as lost."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers beside metrics.jsonl, which is always written."""

    to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers to log to, e.g. `--track.to wandb`."""
    project: str = "prefopt"
    """Project name in the tracker."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """wandb writes to the output folder, or also to its server."""


@dataclass(frozen=True)
class TestbedConfig:
    """The exactly solvable world, used when no model and no data are named."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    world: Literal["bandit", "cyclic", "scratchpad"] = "bandit"
    """Which world. In rounds cyclic, or the one that the method names."""
    pairs: int | None = None
    """Size of a fixed training set. None: a fresh stream, no pair seen twice."""
    seed: int = 0
    """Of the reward and the base policy."""
    eval_pairs: int = 512
    """Held-out pairs."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    method: Method
    method_name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)
    seed: int = 0
    """Of the data order and everything random in the run."""
    output: str = ""
    """Output folder; the same command continues the run it holds."""
    dry_run: bool | Literal["config"] = False
    """Print the data report, what differs from the defaults and a plan of the run, and stop. config: every setting too,
    as YAML."""

    @property
    def on_testbed(self) -> bool:
        return self.model.path is None and self.data.train is None

    @property
    def tied_at_start(self) -> tuple[str, ...]:
        """Metrics that have nothing to compare before training, because the policy still equals its reference."""
        return self.method.tied_at_reference if self.reference.path in (None, self.model.path) else ()

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values: what a YAML file that gives this very run would hold."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in _NOT_SETTINGS}
        return {"method": {"name": self.method_name, **_plain(self.method)}, **plain}

    def to_yaml(self) -> str:
        return yaml_of(self.to_dict())


def yaml_of(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a YAML file."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


class TemplateSettings(Protocol):
    """Settings of a run that reach its chat template: those of `data`, or of `infer`."""

    @property
    def template_args(self) -> Mapping[str, Any]: ...
    @property
    def template_date(self) -> str | None: ...
    @property
    def template_seconds(self) -> float: ...


ROUND_GROUPS = ("rounds", "generate", "judge")
FOLDED = (*ROUND_GROUPS, "lora", "kernel", "track", "testbed")  # one line each in a `--help` that does not ask for them
SAMPLES_READ = ("temperature", "top_p", "top_k", "max_tokens", "stop", "batch")  # of `generate`, by eval.generate
_NOT_SETTINGS = ("method", "method_name")

# What a run on the testbed departs in from the defaults: a model of 60k parameters wants other steps than one of 8B.
TESTBED_DEPARTURES: dict[str, Any] = {
    "method": {"beta": 1.0},
    "optim": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 20},
    "train": {"global_batch": 512, "micro_batch": 512, "max_steps": 600},
    "eval": {"every": 50, "batch": 512},
}

# What rounds on the testbed depart in beside these.
ROUNDS_ON_TESTBED: dict[str, Any] = {
    "method": {"beta": 0.2},
    "optim": {"lr": 3e-3, "schedule": "linear", "warmup_steps": 3},
    "train": {"global_batch": 256, "micro_batch": 256, "max_steps": None, "train_epochs": 6},
    "eval": {"every": 1000},
    "rounds": {"prompts": 1024, "eval_prompts": 256, "shard": 512},
    "generate": {"max_tokens": 4, "batch": 2560},
}
ROUNDS_WORLD = "cyclic"  # unless the method names one

# What rounds in one world depart in beside those.
ROUNDS_IN_WORLD: dict[str, dict[str, Any]] = {
    "scratchpad": {
        "method": {"beta": 0.5, "thought_prompt": "scratchpad"},
        "optim": {"lr": 5e-4},
        "train": {"global_batch": 128, "micro_batch": 128, "train_epochs": 2},
        "rounds": {"prompts": 1000, "shard": 500},
        "generate": {"n": 8, "max_tokens": 20, "batch": 4000},
    },
}

# A departure gives way when the user names the setting that it would silently overrule.
_GIVES_WAY = {
    "optim.warmup_ratio": "optim.warmup_steps",
    **{f"train.{name}": "train.max_steps" for name in ("train_epochs", "max_tokens", "max_seconds")},
}

# Arguments of `apply_chat_template` that decide what is rendered, or how it comes back, and are not the template's.
RESERVED_ARGS = (
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
)

# Short names of optimizers; engine/optimizers.py makes them.
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "rmsprop", "sgd")

# Settings of a run's length: a finished run is trained on where they are raised.
LENGTHS = ("train.max_steps", "train.train_epochs", "train.max_tokens", "train.max_seconds")

# Settings that may change between the attempts at one run: they do not move the trajectory by more than rounding.
FREE_TO_CHANGE = (
    *("dry_run", "output", "track", "kernel", "eval.batch", "model.gradient_checkpointing", "reference.cache_dir"),
    *("model.offload_activations", "train.compile", "train.check_memory", "train.join_seconds"),
    *("train.show_batch", "train.keep_last", "train.file_mb", "train.save_every", "train.micro_batch", "train.threads"),
    *(
        "train.layout",
        "rounds.launcher",
        "rounds.compare",
        "rounds.candidates",
        "generate.python",
        "generate.url",
        "generate.api_key_env",
    ),
    *("generate.concurrency", "generate.retries", "generate.timeout", "judge.url", "judge.api_key_env"),
    *("judge.concurrency", "judge.retries", "judge.timeout"),
)


def parse(argv: Sequence[str]) -> RunConfig:
    """The settings of a run from its command line.

    Args:
        argv: flags without the program's name, e.g. `["--method", "dpo", "--optim.lr", "1e-6"]`.
    Raises: ConfigError, one line that names the key, what was found, what was expected and the nearest mend.
    """
    flags = _split(argv)
    file = flags.pop("config", None)
    if file is True:
        raise ConfigError("--config: found no value, expected a YAML file")
    layers = [(str(file), _read_yaml(Path(str(file))))] if file is not None else []
    layers.append(("", _nest(flags)))
    named = [_method_name(layer, where) for where, layer in layers]
    name = next((n for n in reversed(named) if n), None)
    if name is None:
        for where, layer in layers:
            _check_keys(layer, "", Method, where)  # a mistyped --method is one of the unknown keys
        raise ConfigError(
            f"--method: not given, expected one of {', '.join(registry.names())} (or a dotted module path)"
        )
    method_class = registry.get(name)
    merged: dict[str, Any] = _own_defaults(method_class)
    for where, layer in layers:
        _check_keys(layer, name, method_class, where)
        merged = _merge(merged, _with_sources(layer, where))
    if _at(merged, "model.path") is None and _at(merged, "data.train") is None:
        given = merged
        merged = _merge(_own_defaults(method_class), _testbed_defaults(method_class, given))
        for where, layer in layers:
            merged = _merge(merged, _with_sources(layer, where))
    sources = {key: where for where, layer in layers for key in _leaves(layer)}
    config = _build(
        RunConfig,
        {k: v for k, v in merged.items() if k != "method"},
        "",
        sources,
        given={
            "method": _build(method_class, merged.get("method", {}), "method.", sources),
            "method_name": name,
        },
    )
    config = dataclasses.replace(config, judge=_named_judge(config), model=_compute_dtype(config))
    _validate(config)
    _validate_rounds(config)
    config = dataclasses.replace(
        config,
        model=_normal(config.model, "path"),
        reference=_normal(config.reference, "path"),
        data=_normal(_normal_sources(config.data), "chat_template"),
        rounds=_normal(config.rounds, "compare", "candidates"),
    )
    if not config.output:
        config = dataclasses.replace(config, output=f"runs/{_default_folder(config)}")
    return config


def _own_defaults(method_class: type[Method]) -> dict[str, Any]:
    """Settings that a method has defaults of its own for."""
    return {} if method_class.default_lr is None else {"optim": {"lr": method_class.default_lr}}


def _testbed_defaults(method_class: type[Method], named: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have defaults of their own on the testbed. Args: named: what the user has given."""
    known = {f.name for f in dataclasses.fields(method_class)}
    hidden = {over for named_key, over in _GIVES_WAY.items() if _at(named, named_key) is not None}
    departures = TESTBED_DEPARTURES
    if _at(named, "rounds.count") not in (None, 0, "0"):
        world = _at(named, "testbed.world") or method_class.testbed_world or ROUNDS_WORLD
        rounds = _merge(ROUNDS_ON_TESTBED, ROUNDS_IN_WORLD.get(str(world), {}))
        departures = _merge(departures, _merge(rounds, {"testbed": {"world": world}}))
    departures = {
        group: {k: v for k, v in settings.items() if f"{group}.{k}" not in hidden}
        for group, settings in departures.items()
    }
    departures["method"] = {k: v for k, v in departures["method"].items() if k in known}
    return departures


@dataclass(frozen=True)
class Override:
    """A setting that is not at its default. `default` is None where the setting must be given."""

    key: str
    value: Any
    default: Any
    on_testbed: bool  # it is the testbed's own default

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]


def overrides(config: RunConfig) -> list[Override]:
    """The settings of a run that differ from the defaults, in the order of `--help`."""
    plain = RunConfig(config.method, config.method_name).to_dict()
    plain["method"] = {f.name: _plain(f.default) for f in dataclasses.fields(config.method) if f.init}
    defaults = _leaves(_merge(plain, _own_defaults(type(config.method))))
    given = {"rounds": {"count": config.rounds.count}, "testbed": {"world": config.testbed.world}}
    testbed = _leaves(_testbed_defaults(type(config.method), given)) if config.on_testbed else {}
    return [
        Override(key, value, None if (d := defaults.get(key)) is dataclasses.MISSING else d, testbed.get(key) == value)
        for key, value in _leaves(config.to_dict()).items()
        if key not in ("method.name", "output", "dry_run") and value != defaults.get(key)
    ]


def rate_source(config: RunConfig) -> str:
    """Where the learning rate comes from, in a few words."""
    lr, own = config.optim.lr, type(config.method)
    named = {"rounds": {"count": config.rounds.count}, "testbed": {"world": config.testbed.world}}
    if config.on_testbed:
        if lr == _testbed_defaults(own, named)["optim"]["lr"]:
            return "the testbed's default"
    elif own.default_lr is not None:
        if lr == own.default_lr:
            return f"the default of method {config.method_name}: {own.default_lr_source}"
    elif lr == OptimConfig.lr:
        return "prefopt's default for all methods without one of their own"
    return "given as optim.lr"


def sources(named: str | None) -> tuple[str, ...]:
    """What data.train or data.eval names: one source, or several with commas between."""
    if named is None:
        return ()
    return (named,) if Path(named).exists() else tuple(part.strip() for part in named.split(","))


def from_dict(settings: Mapping[str, Any]) -> RunConfig:
    """The config that `RunConfig.to_dict` came from."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    name = plain["method"].pop("name")
    method = _build(registry.get(name), plain.pop("method"), "method.", {})
    return _build(RunConfig, plain, "", {}, given={"method": method, "method_name": name})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting in which two runs' dictionaries differ and that may not change in a run.

    A setting that the old run did not have yet counts as its default.
    """
    before, after = _leaves(old), _leaves(new)
    for key, value in _leaves(_defaults()).items():
        if key in after and _at(old, key, before) is before:
            before[key] = value
    # what dropout drops, and how many tokens are fed, depends on how a step is cut and laid out
    cut = before.get("lora.dropout") or before.get("train.max_tokens")
    held = ("train.micro_batch", "train.layout", "train.compile") if cut else ()
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and (key in held or not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE))
    ]


def _defaults() -> dict[str, Any]:
    """The default of every setting but the method's, nested."""
    fields = [field for field in dataclasses.fields(RunConfig) if field.name not in _NOT_SETTINGS]
    given = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    return {name: _plain(value) for name, value in given.items() if value is not dataclasses.MISSING}


def help_text(argv: Sequence[str]) -> str:
    """The grouped `--help`, with the settings of the method that `argv` names if it names one.

    The groups in `FOLDED` are one line each, but for those that `argv` asks for (`--help lora`, `--help all`) or names
    a setting of.
    """
    words, topics = [], set()
    for before, word in zip(["", *argv], argv, strict=False):
        if before in ("--help", "-h") and not word.startswith("--"):
            topics.add(word)
        elif word not in ("--help", "-h"):
            words.append(word)
    hints = {key: hint for key, hint in _hints(RunConfig).items() if key not in _NOT_SETTINGS}
    known = [key for key, hint in hints.items() if dataclasses.is_dataclass(hint)]
    for topic in topics - {"all", *known}:
        raise ConfigError(f"--help: found '{topic}', expected {', '.join(known)} or all{did_you_mean(topic, known)}")
    flags = _split(words)
    open_groups = topics | {key.partition(".")[0] for key in flags}
    if open_groups & {*ROUND_GROUPS}:
        open_groups |= {*ROUND_GROUPS}
    name = flags.get("method.name")
    if name is None and "config" in flags:
        name = _method_name(_read_yaml(Path(str(flags["config"]))), str(flags["config"]))
    general = [("--config", "FILE", "", "YAML file of settings; flags take precedence over it.")]
    groups: list[tuple[str, str, list[_HelpRow]]] = []
    for key, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            asked = open_groups & {key, "all"} or (key == "generate" and "eval.generate" in flags)
            folded = key in FOLDED and not asked
            rows = [] if folded else _help_rows(hint, f"{key}.")
            more = f" (--help {key} lists its settings)" if folded else ""
            groups.append((key, (hint.__doc__ or "").strip() + more, rows))
    general += [row for row in _help_rows(RunConfig, "") if row[0] != "--method_name"]
    if name is not None:
        method_class = registry.get(str(name))
        title = (method_class.__doc__ or "").strip().partition("\n")[0]
        groups.insert(0, (f"method {name}", title, _help_rows(method_class, "method.")))
        own = {f"--{key}": f"{value:g}" for key, value in _leaves(_own_defaults(method_class)).items()}
        groups = [
            (group, about, [(row[0], row[1], own.get(row[0], row[2]), row[3]) for row in rows])
            for group, about, rows in groups
        ]
    methods = f"methods: {', '.join(registry.names())}, or a dotted module path"
    more = "" if name else " (--method NAME --help lists its own settings)"
    here = ", ".join(f"{key} {value}" for key, value in _leaves(TESTBED_DEPARTURES).items())
    groups = [(t, f"{about} Its own defaults: {here}." if t == "testbed" else about, rows) for t, about, rows in groups]
    head = ["usage: train.py --method NAME [--config FILE] [--GROUP.SETTING VALUE ...]", "", methods + more, ""]
    return _help_page(head, [("run", "", general), *groups])


_HelpRow = tuple[str, str, str, str]  # flag, kind, default, help


def _help_page(head: Sequence[str], groups: Sequence[tuple[str, str, Sequence[_HelpRow]]]) -> str:
    """The text of `--help`: its first lines, then a block per group."""
    lines = [*head]
    for (title, about, rows), after in itertools.zip_longest(groups, groups[1:]):
        lines.append(f"{title}: {about}" if about else title)
        lines += [
            f"  {flag + ' ' + kind:<42} {text}{f' [{default}]' if default else ''}"
            for flag, kind, default, text in rows
        ]
        if rows or (after and after[2]):  # those without settings of their own here stand together
            lines.append("")
    return "\n".join(lines).rstrip()


def _help_rows(cls: Any, prefix: str) -> list[_HelpRow]:
    """(flag, kind, default, help) of each setting; the help is the string under the field."""
    kinds = {int: "INT", float: "FLOAT", str: "TEXT", bool: "BOOL"}

    def kind(hint: Any) -> str:
        args = [a for a in typing.get_args(hint) if a is not type(None)]
        if typing.get_origin(hint) is Literal:
            return "|".join(map(str, args))
        if typing.get_origin(hint) is dict:
            return "TEXT"
        if args and typing.get_origin(hint) in (types.UnionType, typing.Union):
            return "|".join(dict.fromkeys(map(kind, args)))
        return kinds.get(hint) or (kind(args[0]) if args else "TEXT")

    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base) and base is not Method:
            body = ast.parse(textwrap.dedent(inspect.getsource(typing.cast(type, base)))).body[0]
            nodes = getattr(body, "body", [])
            for node, after in itertools.pairwise(nodes):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and documented:
                    texts[node.target.id] = " ".join(str(after.value.value).split())
    rows = []
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        if f.init and not dataclasses.is_dataclass(hints[f.name]) and hints[f.name] is not Method:
            default = "" if f.default in (dataclasses.MISSING, "") else _plain(f.default)
            shown = (
                "none"
                if default is None
                else str(default).lower()
                if isinstance(default, bool)
                else str(default or ("" if default != 0 else 0))
            )
            key = f"{f.name}.KEY" if typing.get_origin(hints[f.name]) is dict else f.name
            rows.append((f"--{prefix}{key}", kind(hints[f.name]), shown, texts.get(f.name, "")))
    return rows


# Reading ------------------------------------------------------------------------------------------------------------


def _split(argv: Sequence[str]) -> dict[str, Any]:
    """Flags to `{dotted key: text}`; a flag without a value is True."""
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"found '{word}', expected a flag such as --optim.lr 1e-6")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            value_follows = words and (not words[0].startswith("--"))
            flags_value: Any = words.pop(0) if value_follows else True
        else:
            flags_value = value
        key = "method.name" if key == "method" else key
        if key in flags:
            raise ConfigError(f"--{key}: given twice")
        flags[key] = flags_value
    return flags


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        if len(parents) > _DEEPEST:
            raise ConfigError(f"--{key[:40]}...: unknown setting; --help lists them all")
        room = nested
        for parent in parents:
            room = room.setdefault(parent, {})
            if not isinstance(room, dict):
                raise ConfigError(f"--{key}: '{parent}' is given as a value and as a group")
        room[leaf] = value
    return nested


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice or that is no text, and reads 1e-6 as a number."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check a mapping's own keys before those that `<<` merges into it, which they may repeat, join them."""
        if id(node) not in self._checked:
            self._checked.add(id(node))
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    found = f"found {key!r}, expected text as a key (put it in quotes)"
                    raise yaml.constructor.ConstructorError(None, None, found, key_node.start_mark)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key '{key}' given twice", key_node.start_mark)
                seen.add(key)
        super().flatten_mapping(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
            if isinstance(value, int) and value.bit_length() > 4096:
                raise ValueError("a number that nobody writes out")
            return value
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:  # such as !!int x, 2020-99-99
            found = f"cannot be read as {node.tag.rpartition(':')[2]} ({type(error).__name__})"
            raise yaml.constructor.ConstructorError(None, None, found, node.start_mark) from None


_MOST_TEXT, _DEEPEST, _MOST_NODES = 4_000_000, 100, 200_000  # characters, levels, values of a YAML text


def _read_as_yaml(text: str) -> Any:
    """A YAML text as plain values, each of which stands there once: aliases are counted as what they stand for.

    Raises: yaml.YAMLError, also where it is too long, too deep, or grows without bound.
    """

    def refuse(found: str, mark: Any) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, found, mark)

    if len(text) > _MOST_TEXT:
        raise yaml.YAMLError(f"found {len(text):,} characters, expected at most {_MOST_TEXT:,}")
    sizes: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # (anchor, values before it) of each collection that is not closed
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise refuse(f"alias '*{event.anchor}' stands inside what it names", event.start_mark)
            count += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(opened) > _DEEPEST:
            raise refuse(f"nested more than {_DEEPEST} levels deep", event.start_mark)
        if count > _MOST_NODES:
            raise refuse(f"more than {_MOST_NODES:,} values, aliases counted as what they stand for", event.start_mark)
    return yaml.load(text, Loader=_UniqueKeys)


_UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    loaded = load_yaml(path, "--config ", "keys such as 'method:' and 'optim:'")
    if isinstance(loaded.get("method"), str):
        loaded["method"] = {"name": loaded["method"]}
    return _nest_dotted(loaded)


def load_yaml(path: Path, flag: str, expected: str) -> dict[str, Any]:
    """The mapping in a YAML file, as it stands there. Raises: ConfigError, one line.

    Args: flag: what names the file, before a path that cannot be read. expected: what a mapping would hold.
    """
    try:
        text = read_text(path)
    except OSError as error:
        near = difflib.get_close_matches(
            path.name,
            [p.name for p in path.parent.glob("*") if p != path] if path.parent.is_dir() else [],
            1,
        )
        hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
        raise ConfigError(f"{flag}{path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{flag}{path}: not a text file (byte {error.start + 1} is not UTF-8)") from error
    try:
        loaded = _read_as_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not readable as YAML: {getattr(error, 'problem', error)}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: found a {type(loaded).__name__}, expected {expected}")
    return loaded


def _nest_dotted(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """`{'optim.lr': 1}` beside `{'optim': {...}}`: both spellings are one vocabulary."""
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        value = _nest_dotted(value) if isinstance(value, dict) else value
        nested = _nest({str(key): value})
        twice = _leaves(out).keys() & _leaves(nested).keys()
        if twice:
            raise ConfigError(f"{sorted(twice)[0]}: given twice in one file")
        out = _merge(out, nested)
    return out


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(low)
    for key, value in high.items():
        if value is None and isinstance(out.get(key), dict):
            continue  # a group's name with nothing under it
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            out.update(_leaves(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _at(mapping: Mapping[str, Any], dotted: str, missing: Any = None) -> Any:
    value: Any = mapping
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return missing
        value = value[part]
    return value


def _with_sources(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """The layer with a list of sources written as a flag is: with commas between."""
    for key in ("train", "eval"):
        named = _at(layer, f"data.{key}")
        if isinstance(named, (list, tuple)):
            texts = [str(item) for item in named]
            bad = next((text for text in texts if "," in text or not text.strip()), None)
            if bad is not None or not texts:
                found = "an empty list" if bad is None else repr(bad)
                raise ConfigError(
                    f"{_source(where, f'data.{key}')}: found {found}, expected names of sources without a comma"
                )
            layer = {**layer, "data": {**layer["data"], key: ",".join(texts)}}
    return layer


def _method_name(layer: dict[str, Any], where: str) -> str | None:
    group = layer.get("method")
    if group is not None and not isinstance(group, dict):
        raise ConfigError(f"{_source(where, 'method')}: found {group!r}, expected a name or a group of settings")
    name = group.pop("name", None) if group else None
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{_source(where, 'method')}: expected a method's name: {', '.join(registry.names())}")
    return name


def _source(where: str, key: str) -> str:
    return f"{where}: {key}" if where else f"--{key}"


# Checking -----------------------------------------------------------------------------------------------------------


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _known_keys(method_class: type[Method]) -> list[str]:
    keys = ["method", "config", "help", *(f"method.{name}" for name in _hints(method_class))]
    for name, hint in _hints(RunConfig).items():
        if name not in _NOT_SETTINGS:
            keys += [f"{name}.{leaf}" for leaf in _hints(hint)] if dataclasses.is_dataclass(hint) else [name]
    return keys


def _check_keys(layer: Mapping[str, Any], name: str, method_class: type[Method], where: str) -> None:
    known = [key for key in _known_keys(method_class) if not (where and key in ("config", "help"))]
    for key in _unknown(layer, known, where):
        if not name and key.startswith("method."):
            continue
        if key.startswith("method."):
            leaf = key.removeprefix("method.")
            owners = [m for m in registry.names() if m != name and leaf in _hints(registry.get(m))]
            if owners:
                raise ConfigError(
                    f"{_source(where, key)}: method '{name}' has no '{leaf}'; it belongs to {', '.join(owners)}"
                )
        raise _refuse_key(key, known, where)


def _unknown(layer: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    """The keys of a layer that no setting has. Raises: ConfigError for a group's name with a value."""
    names = ("data.columns", "data.template_args", "optim.args", "generate.args", "template_args")
    mappings = tuple(f"{name}." for name in names if name in known)
    for key in _leaves(layer):
        if key in known or key.startswith(mappings):
            continue
        if key in {k.partition(".")[0] for k in known if "." in k}:
            if _at(layer, key) in ({}, None):
                continue
            raise ConfigError(
                f"{_source(where, key)}: '{key}' is a group; name a setting in it, such as "
                f"{next(k for k in known if k.startswith(key + '.'))}"
            )
        yield key


def _refuse_key(key: str, known: Sequence[str], where: str) -> ConfigError:
    same_name = [k for k in known if "." in k and k.rpartition(".")[2] == key.rpartition(".")[2]]
    near = other_names.ours(key, known)
    if near is None or (len(same_name) == 1 and not other_names.is_whole(key)):
        near = f"; did you mean '{same_name[0]}'?" if same_name else did_you_mean(key, known)
    return ConfigError(f"{_source(where, key)}: unknown setting{near or '; --help lists them all'}")


def _build(
    cls: type,
    values: Mapping[str, Any],
    prefix: str,
    sources: Mapping[str, str],
    given: Mapping[str, Any] | None = None,
) -> Any:
    ready: dict[str, Any] = dict(given or {})
    for name, hint in _hints(cls).items():
        if name not in values or name in ready:
            continue
        key = prefix + name
        if dataclasses.is_dataclass(hint):
            ready[name] = _build(typing.cast(type, hint), values[name] or {}, f"{key}.", sources)
        else:
            where = next((w for k, w in sources.items() if k == key or k.startswith(f"{key}.")), "")
            ready[name] = coerce(values[name], hint, _source(where, key))
    for f in dataclasses.fields(cls):
        required = f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in ready:
            raise ConfigError(f"{prefix}{f.name}: not given, expected {_type_name(_hints(cls)[f.name])}")
    return cls(**ready)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`, or a ConfigError that begins with `where`. Text is read as a flag's value is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str):
        redaction.learn_from(where, value)

    def refuse(expected: str) -> ConfigError:
        return ConfigError(f"{where}: found {value!r}, expected {expected}")

    if hint is Any:
        try:
            return _read_as_yaml(value) if isinstance(value, str) else value
        except yaml.YAMLError:
            raise refuse("a number, a word or a list such as [0.9, 0.95]") from None
    if origin in (types.UnionType, typing.Union):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in args:
                return None
            raise refuse(_type_name(hint))
        inner = [a for a in args if a is not type(None)]
        for option in inner:
            try:
                return coerce(value, option, where)
            except ConfigError:
                if option is inner[-1]:
                    raise refuse(_type_name(hint)) from None
    if origin is Literal:
        if value in args:
            return value
        # YAML reads a bare `no` as false
        if value is False and "no" in args:
            return "no"
        raise ConfigError(
            f"{where}: found {value!r}, expected one of {', '.join(map(str, args))}"
            f"{did_you_mean(str(value), map(str, args))}"
        )
    if origin is tuple:
        items = [v for v in re.split(r"[,\s]+", value) if v] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise refuse("a list")
        return tuple(coerce(item, args[0], where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise refuse("a mapping of keys to values")
        return {str(k): coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if hint is bool:
        text = str(value).lower()
        if text not in ("true", "false"):
            raise refuse("true or false")
        return text == "true"
    if isinstance(value, bool):
        raise (
            refuse(_type_name(hint))
            if value is False
            else ConfigError(f"{where}: found no value, expected {_type_name(hint)}")
        )
    if hint is int:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise refuse("a whole number") from None
        except OverflowError:
            number = float("inf")
        if number != number or number in (float("inf"), float("-inf")) or number != int(number):
            raise refuse("a whole number")
        if abs(number) >= 2**63:
            raise refuse("a whole number below 2^63")
        return int(value) if isinstance(value, int) or str(value).lstrip("+-").isdigit() else int(number)
    if hint is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise refuse("a number") from None
        except OverflowError:
            raise refuse("a number that a float holds") from None
    if hint is str:
        if isinstance(value, (str, int, float)):
            if "\0" in str(value):
                raise refuse("text without a NUL character")
            if not str(value).isascii() and any("\ud800" <= letter <= "\udfff" for letter in str(value)):
                raise refuse("text in UTF-8, which the run's files can hold")
            return str(value)
        raise refuse("text")
    raise ConfigError(
        f"{where}: settings of type {_type_name(hint)} are not supported; use numbers, text, Literal, bool"
    )


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return "one of " + ", ".join(map(str, choices)) if len(choices) > 1 else str(choices[0])
    if typing.get_origin(hint) is tuple:
        kind = _type_name(typing.get_args(hint)[0]).removeprefix("a ")
        return f"a list of {kind}s" if kind != "text" else "a list"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_type_name(a) for a in typing.get_args(hint))
    return str(hint)


def check_template_settings(settings: TemplateSettings, prefix: str) -> None:
    """Raises: ConfigError, naming the setting."""
    reserved = next((name for name in settings.template_args if name in RESERVED_ARGS), None)
    if reserved is not None:
        raise ConfigError(f"{prefix}template_args.{reserved}: is decided here, expected an argument of the template")
    if not 0 < settings.template_seconds < float("inf"):
        raise ConfigError(
            f"{prefix}template_seconds: found {settings.template_seconds}, expected a number of seconds above 0"
        )
    try:
        if settings.template_date is not None:
            datetime.date.fromisoformat(settings.template_date)
    except ValueError:
        raise ConfigError(
            f"{prefix}template_date: found {settings.template_date!r}, expected a date such as 2026-11-30"
        ) from None


def _validate(config: RunConfig) -> None:
    def need(holds: bool, key: str, value: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {value!r}, expected {expected}")

    positive = (
        "train.global_batch",
        "train.micro_batch",
        "train.save_every",
        "train.keep_last",
        "train.file_mb",
        "train.join_seconds",
        "eval.every",
        "eval.batch",
        "testbed.eval_pairs",
        "optim.lr",
        "train.train_epochs",
    )
    optional = (
        *("train.schedule_epochs", "train.max_steps", "train.max_tokens", "train.max_seconds"),
        *("train.threads", "train.tokens_per_batch", "testbed.pairs"),
        *("kernel.token_tile", "kernel.vocab_tile", "lora.r", "lora.alpha", "reference.sync_every", "eval.patience"),
        *("eval.max_pairs",),
    )
    seeds = ("seed", "testbed.seed")
    values = _leaves(config.to_dict())
    for key in positive:
        need(0 < values[key] < float("inf"), key, values[key], "a number > 0")
    for key in optional:
        need(values[key] is None or 0 < values[key] < float("inf"), key, values[key], "a number > 0, or none")
    for key in seeds:
        need(0 <= values[key] < 2**31, key, values[key], "a whole number from 0 to 2147483647")
    if config.rounds.count and config.model.export_dtype is not None:
        raise ConfigError(
            f"model.export_dtype: found '{config.model.export_dtype}', with rounds, each of which starts from what the "
            "one before has exported, expected none"
        )
    layout = config.train.layout
    if "prefix_shared" in layout:
        if config.lora.dropout:
            raise ConfigError(
                f"train.layout: found '{layout}' with lora.dropout, which would drop the same of a shared prompt for "
                "both sides of a pair; expected auto, padded or packed"
            )
        if config.method.needs.rows == "chosen_only":
            raise ConfigError(
                f"train.layout: found '{layout}', but this method reads no rejected side that could share a prompt; "
                "expected auto, padded or packed"
            )
        if config.model.attention == "flash_attention_2":
            raise ConfigError(
                f"train.layout: found '{layout}', but flash_attention_2 cannot share prompts; "
                "expected auto, padded or packed (or --model.attention sdpa)"
            )
    check_template_settings(config.data, "data.")
    need(config.data.max_length >= 2, "data.max_length", config.data.max_length, "at least 2")
    need(
        0 <= config.data.eval_fraction < 1, "data.eval_fraction", config.data.eval_fraction, "a share from 0 to below 1"
    )
    need(0 <= config.optim.warmup_ratio <= 1, "optim.warmup_ratio", config.optim.warmup_ratio, "a share from 0 to 1")
    need(
        config.optim.warmup_steps is None or config.optim.warmup_steps >= 0,
        "optim.warmup_steps",
        config.optim.warmup_steps,
        "a number >= 0, or none",
    )
    router = config.model.router_aux_weight
    need(
        router is None or 0 <= router < float("inf"),
        "model.router_aux_weight",
        router,
        "a number >= 0 (0: the loss is left out), or none",
    )
    need(config.kernel.cache_mb >= 0, "kernel.cache_mb", config.kernel.cache_mb, "a number >= 0 (0: none is kept)")
    need(config.optim.clip >= 0, "optim.clip", config.optim.clip, "a number >= 0 (0: no clipping)")
    need(config.optim.weight_decay >= 0, "optim.weight_decay", config.optim.weight_decay, "a number >= 0")
    need(0 <= config.lora.dropout < 1, "lora.dropout", config.lora.dropout, "a share from 0 to below 1")
    both = sorted({*config.lora.target_modules} & {*config.lora.modules_to_save})
    if both:
        raise ConfigError(
            f"lora.modules_to_save: '{both[0]}' is in lora.target_modules too, expected it in one of them"
        )
    mixed, dtype = config.train.mixed_precision, config.model.dtype
    if mixed != "no" and dtype != "float32" and (mixed, dtype) != ("bf16", "bfloat16"):
        raise ConfigError(
            f"train.mixed_precision: found '{mixed}' with model.dtype '{dtype}', which it would not autocast, expected "
            "float32 weights"
        )
    if config.model.attention == "flash_attention_2" and mixed == "no" and dtype != "bfloat16":
        raise ConfigError(
            f"model.attention: 'flash_attention_2' computes in 16 bits, found {dtype} weights and "
            "train.mixed_precision 'no'; expected train.mixed_precision bf16 or fp16 (or --model.attention sdpa)"
        )
    _validate_reference(config)
    schedule = config.train.schedule_epochs
    ends = [name for name in ("max_steps", "max_tokens", "max_seconds") if getattr(config.train, name) is not None]
    if len(ends) > 1:
        raise ConfigError(f"train.{ends[1]}: given with train.{ends[0]}, and one thing ends a run; leave one out")
    need(
        schedule is None or schedule >= config.train.train_epochs or bool(ends),
        "train.schedule_epochs",
        schedule,
        f"at least train.train_epochs ({config.train.train_epochs})",
    )
    if config.optim.name not in OPTIMIZERS and not re.fullmatch(r"\w+(\.\w+)+", config.optim.name):
        raise ConfigError(
            f"optim.name: found '{config.optim.name}', expected one of {', '.join(OPTIMIZERS)} or a dotted path"
            f"{did_you_mean(config.optim.name, OPTIMIZERS)}"
        )
    _validate_memory(config)
    if config.data.train is not None and config.model.path is None:
        raise ConfigError(
            "data.train is given without model.path; name the model to train (--model.path DIR), "
            "or neither for the testbed"
        )
    if config.model.path is not None and config.data.train is None:
        raise ConfigError(
            "model.path is given without data.train; name the pairs to train on (--data.train FILE), "
            "or neither for the testbed"
        )
    if config.on_testbed and config.rounds.count == 0 and config.testbed.world == "scratchpad":
        raise ConfigError(
            "testbed.world: 'scratchpad' has no pairs of its own, the policy makes them in rounds; name how many "
            "(--rounds.count 3), or another world"
        )
    streamed = config.on_testbed and config.testbed.pairs is None and config.rounds.count == 0
    if streamed and not ends:
        raise ConfigError(
            "train.max_steps: found none, expected a number of steps: the testbed's stream of pairs has no end "
            "(or name the size of a fixed set, testbed.pairs)"
        )
    if streamed and schedule is not None:
        raise ConfigError(
            "train.schedule_epochs: the testbed's stream of pairs has no epochs (name the size of a fixed set, "
            "testbed.pairs, or leave it out)"
        )
    if config.train.group_by_length and streamed:
        raise ConfigError(
            "train.group_by_length: the testbed's stream of pairs has no lengths to group by (name the size of a fixed "
            "set, testbed.pairs, or leave it out)"
        )
    if config.train.group_by_length and config.method.needs.coupled:
        raise ConfigError(
            f"train.group_by_length: method '{config.method_name}' compares the pairs of a batch with each other, so "
            "which pairs meet there changes what is learned (leave it out)"
        )
    if config.train.tokens_per_batch is not None and streamed:
        raise ConfigError(
            "train.tokens_per_batch: the testbed's stream of pairs has no lengths to plan by (name the size of a fixed "
            "set, testbed.pairs, or leave it out)"
        )
    if config.train.tokens_per_batch is not None and config.method.needs.coupled:
        raise ConfigError(
            f"train.tokens_per_batch: method '{config.method_name}' compares the pairs of a batch with each other, and "
            "such steps have now more of them, now fewer (leave it out)"
        )
    _validate_sources(config)
    if config.on_testbed and config.data.eval is not None:
        raise ConfigError("data.eval is given without data.train; the testbed makes its own held-out pairs")
    _validate_evaluation(config)


def _validate_evaluation(config: RunConfig) -> None:
    """What is chosen by, and what is sampled. Raises: ConfigError."""
    select, patience, samples = config.eval.select, config.eval.patience, config.eval.generate
    metric, colon, direction = (select or "loss").partition(":")
    if not metric or (colon and direction not in ("min", "max")):
        raise ConfigError(
            f"eval.select: found '{select}', expected a metric's name, or it with a direction, such as "
            f"{metric or 'kl/chosen'}:min or {metric or 'kl/chosen'}:max"
        )
    if patience is not None and select is None and not (config.rounds.count and config.rounds.select_prompts):
        mend = "eval.select, e.g. --eval.select loss" if config.rounds.count == 0 else "rounds.select_prompts"
        raise ConfigError(f"eval.patience: found {patience}, but nothing says what better means; name {mend}")
    if samples < 0:
        raise ConfigError(f"eval.generate: found {samples}, expected a number >= 0")
    if samples == 0:
        return
    if config.rounds.count:
        raise ConfigError(
            f"eval.generate: found {samples}, with rounds, which answer rounds.eval_prompts prompts after each; "
            "leave it out"
        )
    if config.method.needs.output == "scores":
        raise ConfigError(
            f"eval.generate: found {samples}, but method '{config.method_name}' trains a judge, which answers no "
            "prompts; leave it out"
        )
    if not config.on_testbed and config.data.eval is None and config.data.eval_fraction == 0:
        raise ConfigError(
            f"eval.generate: found {samples}, but nothing is held out to ask; name data.eval or data.eval_fraction"
        )
    _validate_sampling(config.to_dict())


def _validate_reference(config: RunConfig) -> None:
    reference, plain = config.reference, ReferenceConfig()
    for key in ("cache", "sync_every"):
        found = getattr(reference, key)
        if found != getattr(plain, key) and config.method.needs.reference == "none":
            raise ConfigError(
                f"reference.{key}: found {found!r}, but method '{config.method_name}' reads no reference; leave it out"
            )
    if reference.cache == "logps" and config.method.needs.reference == "token":
        raise ConfigError(
            f"reference.cache: found 'logps', but method '{config.method_name}' reads the reference's whole "
            "distribution at each token; expected hidden, or none for a live reference"
        )
    streamed = config.on_testbed and config.testbed.pairs is None and config.rounds.count == 0
    if reference.cache != "none" and streamed:
        raise ConfigError(
            f"reference.cache: found '{reference.cache}', but no pair of the testbed's stream comes twice; name the "
            "size of a fixed set (--testbed.pairs 40000), or leave it out"
        )
    if reference.cache != "none" and reference.sync_every is not None:
        raise ConfigError(
            "reference.cache: given with reference.sync_every, but what moves cannot be kept; leave one out"
        )
    for key, needed in (("cache_dtype", "cache"), ("cache_dir", "cache"), ("sync_weight", "sync_every")):
        found = getattr(reference, key)
        if found != getattr(plain, key) and getattr(reference, needed) == getattr(plain, needed):
            raise ConfigError(
                f"reference.{key}: found {found!r} without reference.{needed}; name that too, or leave it out"
            )
    if reference.cache_dtype != plain.cache_dtype and reference.cache == "logps":
        raise ConfigError("reference.cache_dtype: is of hidden states, found reference.cache 'logps'; leave it out")
    if not 0 < reference.sync_weight <= 1:
        raise ConfigError(f"reference.sync_weight: found {reference.sync_weight!r}, expected above 0, up to 1")


def _validate_memory(config: RunConfig) -> None:
    """What quantised weights and compiled layers go together with."""
    model = config.model
    if config.train.compile and model.attention == "flex_attention":
        raise ConfigError(
            "train.compile: found true with model.attention 'flex_attention', which compiles itself; leave one out"
        )
    if model.quantize is None:
        if model.compute_dtype is not None:
            raise ConfigError(
                f"model.compute_dtype: found '{model.compute_dtype}' without model.quantize; name how weights are held "
                "(--model.quantize nf4), or leave it out"
            )
        return
    if model.dtype == "float64":
        raise ConfigError(
            f"model.dtype: found 'float64' with model.quantize '{model.quantize}', expected float32 or bfloat16"
        )
    if config.train.compile:
        raise ConfigError(
            f"train.compile: found true with model.quantize '{model.quantize}', whose products are not compiled; leave "
            "one out"
        )


def _compute_dtype(config: RunConfig) -> ModelConfig:
    """The model's settings with the precision of quantised products named."""
    model = config.model
    if model.quantize is None or model.compute_dtype is not None or model.dtype == "float64":
        return model
    mixed: dict[str, Any] = {"bf16": "bfloat16", "fp16": "float16"}
    return dataclasses.replace(model, compute_dtype=mixed.get(config.train.mixed_precision, model.dtype))


def _validate_sources(config: RunConfig) -> None:
    weights, named = config.data.weights, {key: sources(getattr(config.data, key)) for key in ("train", "eval")}
    for key, names in named.items():
        for i, name in enumerate(names):
            if not name:
                raise ConfigError(f"data.{key}: found a comma with nothing before or behind it, expected a source")
            if name in names[:i]:
                raise ConfigError(f"data.{key}: '{name}' is named twice (a larger share is for data.weights to give)")
    if weights is None:
        return
    if config.rounds.count:
        raise ConfigError("data.weights: given with rounds, which ask each prompt once; leave it out")
    if not named["train"]:
        raise ConfigError("data.weights: given without data.train, expected the sources that they are of")
    if len(weights) != len(named["train"]):
        raise ConfigError(
            f"data.weights: found {len(weights)} numbers, expected one for each of the {len(named['train'])} sources "
            f"of data.train ({', '.join(named['train'])})"
        )
    for name, weight in zip(named["train"], weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"data.weights: found {weight:g} for '{name}', expected a finite number >= 0")
    if not any(weights):
        raise ConfigError("data.weights: all are 0, expected one above it at least")


def _named_judge(config: RunConfig) -> JudgeConfig:
    """The judge's settings with its kind named, where rounds leave no choice."""
    if config.judge.kind is not None or config.rounds.count < 1:
        return config.judge
    if config.rounds.pairs == "data_sampled":
        return dataclasses.replace(config.judge, kind="none")
    if config.on_testbed:
        return dataclasses.replace(config.judge, kind="world")
    raise ConfigError(
        "judge.kind: not given, expected who ranks the completions: reward_model, pairwise, llm, function or length"
    )


def _validate_rounds(config: RunConfig) -> None:
    rounds, generate, judge = config.rounds, config.generate, config.judge

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            found = _at(config.to_dict(), key)
            raise ConfigError(f"{key}: found {found!r}, expected {expected}")

    need(0 <= rounds.count <= 99, "rounds.count", "0 to 99 rounds")
    if rounds.count == 0:
        for name in ROUND_GROUPS:
            group = getattr(config, name)
            plain = type(group)()
            for f in dataclasses.fields(group):
                if getattr(group, f.name) == getattr(plain, f.name):
                    continue
                if name != "generate" or f.name not in SAMPLES_READ:
                    also = f" (eval.generate reads {', '.join(SAMPLES_READ)})" if name == "generate" else ""
                    raise ConfigError(
                        f"{name}.{f.name}: given without rounds; name how many (--rounds.count 3), or leave it out"
                        f"{also if config.eval.generate else ''}"
                    )
                if config.eval.generate == 0:
                    raise ConfigError(
                        f"{name}.{f.name}: given without rounds and without samples at evaluations; name how many "
                        "(--rounds.count 3 or --eval.generate 8), or leave it out"
                    )
        return
    need(rounds.shard >= 1, "rounds.shard", "a number >= 1")
    for key in ("rounds.eval_prompts", "rounds.select_prompts", "rounds.resample"):
        need(_at(config.to_dict(), key) >= 0, key, "a number >= 0")
    _validate_sampling(config.to_dict())
    need(rounds.prompts is None or rounds.prompts >= 1, "rounds.prompts", "a number >= 1, or none")
    need(rounds.max_similarity is None or 0 < rounds.max_similarity <= 1, "rounds.max_similarity", "above 0, up to 1")
    needs = config.method.needs
    if needs.output == "scores":
        raise ConfigError(
            f"rounds.count: found {rounds.count}, but method '{config.method_name}' trains a judge, which answers no "
            "prompts; train it first, and name its folder as judge.path of the rounds of another method"
        )
    if config.data.eval_fraction != DataConfig().eval_fraction:
        raise ConfigError(
            "data.eval_fraction: given with rounds, which hold out rounds.eval_prompts prompts; leave it out"
        )
    if config.eval.select is not None:
        raise ConfigError("eval.select: given with rounds, which choose by rounds.select_prompts; leave it out")
    need(rounds.select_prompts == 0 or judge.kind != "none", "judge.kind", "a judge: rounds.select_prompts needs one")
    for key in ("testbed.pairs", "testbed.eval_pairs"):
        if _at(config.to_dict(), key) != getattr(TestbedConfig(), key.partition(".")[2]):
            raise ConfigError(f"{key}: given with rounds, whose pairs the policy makes; leave it out")
    if rounds.pairs == "data_sampled":
        need(generate.n == 1, "generate.n", "1: rounds.pairs data_sampled reads one completion of each prompt")
    if rounds.pairs == "best_worst":
        need(generate.n >= 2, "generate.n", "at least 2: a pair is the best of them against the worst")
        need(judge.kind != "none", "judge.kind", "a judge: rounds.pairs best_worst ranks the completions")
    else:
        if config.method.thinks:
            raise ConfigError(
                f"rounds.pairs: '{rounds.pairs}', but the data's own completions hold no thought; expected best_worst "
                "(or --method.thought_prompt none)"
            )
        need(rounds.pairs != "data_worst" or judge.kind != "none", "judge.kind", "a judge: it ranks the completions")
        if config.on_testbed:
            raise ConfigError(f"rounds.pairs: '{rounds.pairs}' needs completions in data.train; the testbed has none")
        if needs.columns:
            raise ConfigError(
                f"rounds.pairs: '{rounds.pairs}', but method '{config.method_name}' reads {needs.columns[0].name}, "
                "which nobody knows of the data's own completion; expected best_worst"
            )
    need(judge.kind != "world" or config.on_testbed, "judge.kind", "another judge: `world` is the testbed's own")
    compares = judge.kind == "world" or (judge.kind == "llm" and judge.mode == "pairwise")
    if config.method.ranks_by == "blender_score" and compares:
        raise ConfigError(
            f"method.win_prob: 'blender_score' reads a judge's logits or scores, and judge '{judge.kind}' gives "
            "probabilities; expected pairwise_sigmoid"
        )
    need(
        config.data.max_length > generate.max_tokens,
        "generate.max_tokens",
        f"less than data.max_length ({config.data.max_length}), which holds the prompt too",
    )


def _validate_sampling(settings: Mapping[str, Any]) -> None:
    """The numbers of the groups `generate` and `judge`, wherever they are used. Raises: ConfigError."""

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {_at(settings, key)!r}, expected {expected}")

    for key in (
        *("generate.n", "generate.max_tokens", "generate.batch", "generate.concurrency", "generate.tensor_parallel"),
        *("generate.replicas", "judge.batch", "judge.max_tokens", "judge.concurrency"),
    ):
        need(_at(settings, key) >= 1, key, "a number >= 1")
    for key in ("generate.retries", "judge.retries", "generate.top_k"):
        need(_at(settings, key) >= 0, key, "a number >= 0")
    for key in ("generate.timeout", "judge.timeout"):
        need(0 < _at(settings, key) < float("inf"), key, "seconds > 0")
    for key in ("generate.temperature", "judge.temperature"):
        need(0 <= _at(settings, key) < float("inf"), key, "a number >= 0")
    need(all(_at(settings, "generate.stop")), "generate.stop", "texts of at least one character")
    for key in ("generate.api_key_env", "judge.api_key_env"):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", _at(settings, key)):
            raise ConfigError(f"{key}: expected the name of an environment variable (what was found is not shown)")
        redaction.named_variable(_at(settings, key))
    need(0 < _at(settings, "generate.top_p") <= 1, "generate.top_p", "a share above 0, up to 1")


def _normal(group: Any, *names: str) -> Any:
    """The group with local paths in one spelling: `./pairs.jsonl` and `pairs.jsonl` are the same run."""
    paths = {name: getattr(group, name) for name in names}
    local = {name: str(Path(path)) for name, path in paths.items() if path is not None and Path(path).exists()}
    return dataclasses.replace(group, **local)


def _normal_sources(data: DataConfig) -> DataConfig:
    """The same of data.train and data.eval, source by source."""
    spelt: dict[str, Any] = {
        key: ",".join(str(Path(name)) if Path(name).exists() else name for name in sources(getattr(data, key))) or None
        for key in ("train", "eval")
    }
    return dataclasses.replace(data, **spelt)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _default_folder(config: RunConfig) -> str:
    """A name that the same settings give again, so that the same command continues the same run."""
    settings = {
        k: v
        for k, v in _leaves(config.to_dict()).items()
        if not any(k == free or k.startswith(free + ".") for free in FREE_TO_CHANGE)
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    task = "testbed" if config.on_testbed else "-".join(Path(name).stem for name in sources(config.data.train)[:3])
    return f"{task}-{config.method_name.rpartition('.')[2]}-{digest}"
