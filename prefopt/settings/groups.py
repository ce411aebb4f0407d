"""The groups of settings that every training run has."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prefopt.errors import ConfigError


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
    overlong: Literal["truncate_prompt", "drop", "truncate_completion"] = "truncate_prompt"
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
    template_timeout: float = 10.0
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
    epochs: float = 1.0
    """Passes over the training pairs."""
    schedule_epochs: float | None = None
    """Passes that the learning-rate schedule is laid out for. None: the run's own length."""
    max_steps: int | None = None
    """Optimizer steps; takes the place of train.epochs. Required for an endless stream."""
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
    max_shard_mb: float = 2000
    """MB of a file of weights; each process holds and writes one at a time."""
    check_memory: bool = True
    """On a GPU, refuse before any model is loaded what cannot fit there by the plan of its memory."""
    rendezvous_timeout: float = 300.0
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


class TemplateSettings(Protocol):
    """Settings of a run that reach its chat template: those of `data`, or of `infer`."""

    @property
    def template_args(self) -> Mapping[str, Any]: ...
    @property
    def template_date(self) -> str | None: ...
    @property
    def template_timeout(self) -> float: ...


# Arguments of `apply_chat_template` that decide what is rendered, or how it comes back, and are not the template's.
RESERVED_ARGS = (
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
)


# Short names of optimizers; engine/optimizers.py makes them.
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "rmsprop", "sgd")


def check_template_settings(settings: TemplateSettings, prefix: str) -> None:
    """Raises: ConfigError, naming the setting."""
    reserved = next((name for name in settings.template_args if name in RESERVED_ARGS), None)
    if reserved is not None:
        raise ConfigError(f"{prefix}template_args.{reserved}: is decided here, expected an argument of the template")
    if not 0 < settings.template_timeout < float("inf"):
        raise ConfigError(
            f"{prefix}template_timeout: found {settings.template_timeout}, expected a number of seconds above 0"
        )
    try:
        if settings.template_date is not None:
            datetime.date.fromisoformat(settings.template_date)
    except ValueError:
        raise ConfigError(
            f"{prefix}template_date: found {settings.template_date!r}, expected a date such as 2026-11-30"
        ) from None
