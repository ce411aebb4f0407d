"""The groups of settings that every training run has. The string under a field is its `--help` text."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from prefopt.errors import ConfigError, did_you_mean
from prefopt.settings.ranges import Group, ranged

SEED_LIMIT = 2**31  # seeds are below it

# Arguments of `apply_chat_template` that prefopt sets itself, so a user cannot pass them to the template.
RESERVED_ARGS = (
    *("messages", "conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "sanitize_control_tokens", "strftime_now"),
)

# Short names of optimizers; training/optimizers.py makes them.
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "rmsprop", "sgd")


@dataclass(frozen=True)
class ModelConfig(Group):
    """The policy at the start of training."""

    prefix = "model."

    path: str | None = None
    """Folder or Hugging Face Hub id of a causal language model or a LoRA adapter. None: the testbed's base policy."""
    revision: str | None = None
    """Hub revision of the model: a branch, tag or commit. None: the default branch."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type in which weights are stored and updated."""
    export_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """Data type of the exported weights. None: model.dtype."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation, named as in transformers. Models without sdpa use eager."""
    quantize: Literal["nf4", "fp4"] | None = None
    """QLoRA: store the frozen weights below the head in 4 bits (bitsandbytes, double quantisation). None: off."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of matrix products with quantised weights. None: that of train.mixed_precision, else model.dtype."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses less GPU memory and takes more time."""
    offload_activations: bool = False
    """Keep saved activations in host memory until the backward pass: uses less GPU memory and takes more time."""
    router_aux_weight: float | None = ranged(None, at_least=0, note="0 turns the loss off")
    """Coefficient of the router load-balancing loss of mixture-of-experts models. None: the model config's value."""
    trust_remote_code: bool = False
    """Execute model code that is distributed with the weights."""


@dataclass(frozen=True)
class ReferenceConfig(Group):
    """The frozen reference model of the method, loaded only if the method reads one."""

    prefix = "reference."

    path: str | None = None
    """Folder or Hub id of the reference model. None: the policy's initial weights; LoRA runs then load no copy."""
    cache: Literal["none", "logps", "hidden"] = "none"
    """Precompute the reference once for all runs: its log-probabilities, or its hidden states for token-level KL."""
    cache_dir: str | None = None
    """Folder of the reference caches. None: `reference` in prefopt's cache folder."""
    cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of cached hidden states."""
    sync_every: int | None = ranged(None, above=0)
    """Optimizer steps between synchronisations of the reference with the policy. None: the reference stays fixed."""
    sync_weight: float = ranged(1.0, above=0, at_most=1)
    """Weight of the policy in each synchronisation: 1 copies the policy, less averages (EMA, as in TR-DPO)."""


@dataclass(frozen=True)
class LoraConfig(Group):
    """Low-rank adapter (PEFT) on frozen weights. An adapter in model.path keeps its own settings."""

    prefix = "lora."

    r: int | None = ranged(None, above=0)
    """Rank of the adapter; setting it turns LoRA on. None: train all weights, or the adapter that model.path holds."""
    alpha: int | None = ranged(None, above=0)
    """LoRA alpha: the adapter's output is scaled by alpha / r. None: 2 r."""
    use_rslora: bool | None = None
    """Rank-stabilised LoRA: scale by alpha / sqrt(r) instead. None: false."""
    dropout: float = ranged(0.0, at_least=0, below=1)
    """Dropout probability of the adapter's inputs in training steps; off in the reference and in evaluations."""
    target_modules: tuple[str, ...] = ()
    """Linear layers that receive an adapter, e.g. q_proj,v_proj. Empty or all-linear: all of them except the head."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, e.g. lm_head."""
    merge: bool = False
    """Export a plain model with the adapter merged into its weights; the adapter is saved in `adapter/` next to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = sorted({*self.target_modules} & {*self.modules_to_save})
        if twice:
            raise self.error("modules_to_save", f"'{twice[0]}' is also in lora.target_modules; name it in one of them")


@dataclass(frozen=True)
class SourceConfig(Group):
    """The data files, and the split into training and held-out pairs."""

    train: str | None = None
    """Training pairs: a JSON, CSV or Parquet file, a folder or a Hub id; separate several sources with commas.
    None: the testbed's pairs."""
    weights: tuple[float, ...] | None = None
    """Sampling weight of each source in data.train. None: every pair once per epoch."""
    weight_column: str | None = None
    """Column with the weight of each pair in the loss, a number >= 0. None: all pairs count alike."""
    eval: str | None = None
    """Held-out pairs, named as in data.train. None: split off from the training pairs, by prompt."""
    eval_fraction: float = ranged(0.05, at_least=0, below=1)
    """Fraction of prompts held out for evaluation if data.eval is not given; 0 holds out none."""


@dataclass(frozen=True)
class ExampleConfig(Group):
    """Reading, tokenization and truncation of examples: the settings that training and previews share."""

    columns: dict[str, str] = field(default_factory=dict)
    """Column of the data file to read as KEY, e.g. `--data.columns.chosen good` reads column good as chosen."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Invalid examples: stop with an error, or skip them and count them in the data report."""
    max_length: int = ranged(1024, at_least=2)
    """Maximum tokens of prompt plus completion; data.overlong applies to longer pairs."""
    overlong: Literal["truncate_prompt", "drop", "truncate_completion"] = "truncate_prompt"
    """Pairs above data.max_length: left-truncate the prompt, drop the pair, or right-truncate the completions."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the data's text may contain, e.g. [THINK],[/THINK]; any other makes an example invalid."""
    chat_template: str | None = None
    """Jinja file to use instead of the tokenizer's chat template."""
    dialogues: Literal["text", "messages"] = "text"
    """Format of Human/Assistant dialogues (HH): plain text, or messages rendered by the chat template."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Extra chat template argument KEY, e.g. `--data.template_args.enable_thinking false`; an example's own value
    takes precedence."""
    template_date: str | None = None
    """Date passed to chat templates that ask for the current date, e.g. 2026-11-30. None: today."""
    template_timeout: float = ranged(10.0, above=0)
    """Maximum CPU seconds for rendering one conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_template(self, self.prefix)


@dataclass(frozen=True)
class DataConfig(ExampleConfig, SourceConfig):  # fields are those of the last base first: sources, then examples
    """Preference pairs and their tokenization."""

    prefix = "data."

    template_date: str | None = None
    """Date passed to chat templates that ask for the current date, e.g. 2026-11-30. None: the day the run started."""


@dataclass(frozen=True)
class OptimConfig(Group):
    """Optimizer and learning rate schedule."""

    prefix = "optim."

    name: str = "adamw"
    """adamw, adamw_8bit, paged_adamw_8bit, adafactor, rmsprop, sgd, or the dotted path of a torch optimizer class."""
    lr: float = ranged(1e-6, above=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after warm-up: decay to 0 over train.schedule_epochs, or constant."""
    warmup_ratio: float = ranged(0.1, at_least=0, at_most=1)
    """Warm-up length as a fraction of the schedule's steps."""
    warmup_steps: int | None = ranged(None, at_least=0)
    """Warm-up length in optimizer steps. None: from optim.warmup_ratio."""
    weight_decay: float = ranged(0.0, at_least=0)
    """Weight decay of matrices (biases and norms have none): decoupled in adamw, an L2 gradient in rmsprop and sgd."""
    clip: float = ranged(1.0, at_least=0, note="0 turns clipping off")
    """Maximum global gradient norm; 0 turns gradient clipping off."""
    args: dict[str, Any] = field(default_factory=dict)
    """Extra argument KEY of the optimizer class, e.g. `--optim.args.eps 1e-6`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in OPTIMIZERS and not re.fullmatch(r"\w+(\.\w+)+", self.name):
            known = f"expected one of {', '.join(OPTIMIZERS)} or a dotted path"
            raise self.error("name", f"found '{self.name}', {known}{did_you_mean(self.name, OPTIMIZERS)}")


@dataclass(frozen=True)
class TrainConfig(Group):
    """The training loop."""

    prefix = "train."

    global_batch: int = ranged(64, above=0)
    """Pairs per optimizer step over all ranks; gradient accumulation is derived from it."""
    tokens_per_batch: int | None = ranged(None, above=0)
    """Tokens per optimizer step, counting the prompt with each completion; replaces train.global_batch. None: off."""
    micro_batch: int = ranged(8, above=0)
    """Pairs per forward pass and rank. It changes memory and speed, not results."""
    layout: Literal["auto", "padded", "packed", "prefix_shared", "packed_prefix_shared"] = "auto"
    """How sequences are arranged in batch rows. It changes memory and speed, not results. auto: the fastest exact
    layout for each micro-batch."""
    group_by_length: bool = False
    """Batch pairs of similar length in one step: less padding, the same expected gradient."""
    epochs: float = ranged(1.0, above=0)
    """Passes over the training pairs."""
    schedule_epochs: float | None = ranged(None, above=0)
    """Schedule length in epochs, if it should exceed the run. None: the length of the run."""
    max_steps: int | None = ranged(None, above=0)
    """Stop after this many optimizer steps, instead of train.epochs. Required for endless streams. None: no limit."""
    max_tokens: int | None = ranged(None, above=0)
    """Stop after processing this many tokens (`tokens_processed`), instead of train.epochs; it is also the schedule's
    length. None: no limit."""
    max_seconds: float | None = ranged(None, above=0)
    """Stop after this many seconds in optimizer steps, summed over restarts, instead of train.epochs; it is also the
    schedule's length. None: no limit."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward pass; fp16 adds a gradient scaler. Log-probabilities and losses stay in float32."""
    compile: bool = False
    """Compile the decoder layers with torch.compile; the first steps are slower."""
    save_every: int = ranged(100, above=0)
    """Optimizer steps between checkpoints."""
    keep_last: int = ranged(2, above=0)
    """Number of most recent checkpoints to keep."""
    max_shard_mb: float = ranged(2000, above=0)
    """Maximum size of a weight file in MB; each rank holds and writes one file at a time."""
    check_memory: bool = True
    """On GPUs, stop before loading any model if the memory plan does not fit."""
    rendezvous_timeout: float = ranged(300.0, above=0)
    """Seconds that ranks wait for each other when the run starts."""
    threads: int | None = ranged(None, above=0)
    """CPU threads per rank. None: OMP_NUM_THREADS, else 1 for models below 3M parameters, else cores / ranks."""
    show_batch: bool = False
    """Print the first batch as text with its loss masks."""
    check_first_batch: bool = True
    """Before step 1, recompute the first examples' log-probabilities by an independent path; stop if they differ."""
    deterministic: bool = False
    """Use only deterministic GPU algorithms (slower)."""
    callbacks: tuple[str, ...] = ()
    """Callback classes to call during training, by dotted path, e.g. `my_callbacks.LogWeightNorm`."""


@dataclass(frozen=True)
class EvalConfig(Group):
    """Evaluation on held-out pairs; metrics do not depend on batch size or world size."""

    prefix = "eval."

    every: int = ranged(100, above=0)
    """Optimizer steps between evaluations. The end of training is always evaluated."""
    at_start: bool = True
    """Also evaluate before the first step, as the baseline of the final metrics."""
    max_pairs: int | None = ranged(None, above=0)
    """Maximum number of held-out pairs to score: a random sample that is the same at every evaluation and for every
    run on these pairs. None: all."""
    batch: int = ranged(16, above=0)
    """Pairs per forward pass and rank."""
    select: str | None = None
    """Export the model of the best evaluation by this metric: lowest loss, highest otherwise, or with a direction, e.g.
    `kl/chosen:min`. None: the final model."""
    patience: int | None = ranged(None, above=0)
    """Early stopping: number of evaluations without improvement of eval.select. None: off."""
    generate: int = ranged(0, at_least=0)
    """Number of held-out prompts for which policy and reference generate samples at each evaluation, using generate.*.
    0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        metric, colon, direction = (self.select or "loss").partition(":")
        if not metric or (colon and direction not in ("min", "max")):
            such = metric or "kl/chosen"
            expected = f"a metric, optionally with a direction, e.g. {such}:min or {such}:max"
            raise self.error("select", f"found '{self.select}', expected {expected}")


@dataclass(frozen=True)
class KernelConfig(Group):
    """Tile sizes of the fused output head; they change memory and speed, not results."""

    prefix = "kernel."

    token_tile: int | None = ranged(None, above=0)
    """Completion tokens per tile. None: chosen for the device."""
    vocab_tile: int | None = ranged(None, above=0)
    """Vocabulary entries per tile. None: chosen for the device."""
    cache_mb: int = ranged(1024, at_least=0, note="0 caches none")
    """MiB of logits per forward pass to cache for the backward pass, which then recomputes fewer of them."""


@dataclass(frozen=True)
class TrackConfig(Group):
    """Experiment trackers, in addition to metrics.jsonl, which is always written."""

    prefix = "track."

    to: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Trackers to log to, e.g. `--track.to wandb`; separate several with commas."""
    project: str = "prefopt"
    """Project name in the tracker."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """offline: wandb writes to the output folder only. online: it also uploads to its server."""


@dataclass(frozen=True)
class TestbedConfig(Group):
    """Synthetic task with a known optimum, used if neither model.path nor data.train is given."""

    __test__ = False  # not a test class, whatever pytest thinks of its name
    prefix = "testbed."

    world: Literal["bandit", "cyclic", "scratchpad"] = "bandit"
    """Synthetic task. The default in rounds is cyclic, or the world that the method declares."""
    pairs: int | None = ranged(None, above=0)
    """Size of a fixed training set. None: an endless stream in which no pair repeats."""
    seed: int = ranged(0, at_least=0, below=SEED_LIMIT)
    """Random seed of the reward and the base policy."""
    eval_pairs: int = ranged(512, above=0)
    """Number of held-out pairs."""


class TemplateSettings(Protocol):
    """Settings that configure the chat template: `data` of a run, or those of `infer`."""

    @property
    def template_args(self) -> Mapping[str, Any]: ...
    @property
    def template_date(self) -> str | None: ...
    @property
    def template_timeout(self) -> float: ...


def check_template(settings: TemplateSettings, prefix: str) -> None:
    """Check the chat template's arguments and date. Raises: ConfigError, naming the setting."""
    reserved = next((name for name in settings.template_args if name in RESERVED_ARGS), None)
    if reserved is not None:
        raise ConfigError(f"{prefix}template_args.{reserved}: prefopt sets this argument itself; leave it out")
    try:
        if settings.template_date is not None:
            datetime.date.fromisoformat(settings.template_date)
    except ValueError:
        raise ConfigError(
            f"{prefix}template_date: found {settings.template_date!r}, expected a date such as 2026-11-30"
        ) from None
