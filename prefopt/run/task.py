"""What a training run needs: model, reference, tokenizer and pairs, from files or from the testbed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import settings
from prefopt.data import split
from prefopt.data.comparison import BothOrders
from prefopt.data.encode import Encoded, joined
from prefopt.data.encoder import pad_token
from prefopt.data.loader import Batches, Converted, FileBatches
from prefopt.data.mixture import mixture_of
from prefopt.data.split import sample, shared_prompts, split_by_prompt
from prefopt.data.templates import Rendering
from prefopt.data.unpaired import Mismatched, UnpairedStream, encoded_as_two
from prefopt.errors import ConfigError
from prefopt.evaluate.held_out import too_few
from prefopt.rounds_method import in_rounds
from prefopt.run.card import described_method, split_version
from prefopt.run.encoding import encode_source
from prefopt.settings import RunConfig
from prefopt.testbed import build_world
from prefopt.testbed.cache import cache_root
from prefopt.testbed.words import WordWorld
from prefopt.training import adapter_checks, layout_choice, model_checks, model_sources, models
from prefopt.training.adapters import Frozen
from prefopt.training.model_sources import ModelSource
from prefopt.training.reference import Source
from prefopt.types import LABEL, Column, EncodedPair, Needs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HELD_OUT = 2**31  # seed of the testbed's held-out pairs: equal in every run, different from every training set's


@dataclasses.dataclass
class Task:
    """Model, reference, tokenizer and pairs of a training run.

    Args:
        start: the weights that training starts from.
        reference: a frozen part of the policy, weights of its own, or None where the method needs no reference.
        train: batches of training pairs.
        eval_pairs: held-out pairs.
        eval_fingerprint: identifies the held-out pairs in the run card.
        sources: all encoded pairs by file, for the reference cache.
        report: lines on the data that are printed before training.
        world: the testbed world, None for data from files.
        day: the date that the chat template receives, None where it asks for none.
    """

    start: ModelSource
    reference: Frozen | ModelSource | None
    tokenizer: Any
    train: Batches
    eval_pairs: Sequence[EncodedPair]
    eval_fingerprint: str
    sources: Sequence[Source]
    report: list[str]
    world: WordWorld | None = None
    day: date | None = None


def testbed_task(config: RunConfig) -> Task:
    """The task of a run that names neither a model nor data. Raises: ConfigError."""
    test = config.testbed
    world = build_world(test.world, seed=test.seed, cache_dir=cache_root())
    assert isinstance(world, WordWorld), "the settings refuse a world without pairs"
    start = model_sources.ModelSource(str(world.base_model_path), str(world.base_model_path))
    adapter_checks.check(config, start, models.load_config(start.base, config.model))
    batch, seed = config.train.global_batch, config.seed
    needs = config.method.needs
    held_out = world.file_pairs(test.eval_pairs, _HELD_OUT)
    given = {*held_out[0].columns, *([LABEL.name] if needs.rows == "unpaired" else [])}
    missing = [column.name for column in needs.columns if column.name not in given]
    if missing:
        raise ConfigError(f"method {described_method(config)}: the testbed's pairs have no column '{missing[0]}'")
    convert = _form_of(needs, world, config.data.max_length)

    def read(pairs: list[EncodedPair]) -> Sequence[EncodedPair]:
        """The pairs of the testbed in the form that the method reads."""
        if convert is not None:
            return [convert(pair) for pair in pairs]
        if needs.rows != "unpaired":
            return pairs
        examples = [example for pair in pairs for example in encoded_as_two(pair)]
        return Mismatched(examples, config.data.max_length, "testbed.world") if needs.mismatched else examples

    eval_pairs = read(held_out)
    sources = [Source(eval_pairs, f"{world.fingerprint}-{test.eval_pairs}-held-out")]
    if test.pairs is None:
        train: Batches = world.stream(batch if needs.rows != "unpaired" else _half(batch), seed)
        if convert is not None:
            train = Converted(train, convert, needs.sequences)
        elif needs.rows == "unpaired":
            train = UnpairedStream(train, config.data.max_length, needs.mismatched)
        what = "an unlimited stream of pairs"
    else:
        fingerprint = f"{world.fingerprint}-{test.pairs}-{seed}"
        pairs = read(world.file_pairs(test.pairs, seed))
        group, tokens = config.train.group_by_length, config.train.tokens_per_batch
        if tokens is not None and needs.rows == "chosen_only":  # it counts processed tokens
            pairs = [dataclasses.replace(pair, rejected_ids=None, rejected_mask=None) for pair in pairs]
        train = FileBatches(pairs, batch, seed, fingerprint, group, tokens)
        sources.append(Source(pairs, fingerprint))
        what = f"a fixed set of {test.pairs:,} pairs"
    return Task(
        start=start,
        reference=model_sources.choose_reference(config, start),
        tokenizer=world.tokenizer,
        train=train,
        eval_pairs=eval_pairs,
        eval_fingerprint=f"{world.fingerprint}-{test.eval_pairs}",
        sources=sources,
        report=[f"no model or data given: training on the testbed world '{test.world}' with {what}"],
        world=world,
    )


def _half(batch: int) -> int:
    """Pairs of a step that are read as `batch` unpaired examples. Raises: ConfigError."""
    if batch % 2:
        raise ConfigError(
            f"train.global_batch: found {batch}, expected an even number: the method reads each pair of the testbed as "
            "two examples"
        )
    return batch // 2


def _form_of(needs: Needs, world: WordWorld, max_length: int) -> Callable[[EncodedPair], EncodedPair] | None:
    """How the testbed's pairs become those that a method reads; None: they are."""
    if needs.sequences == "both_orders":
        return BothOrders(world.tokenizer, max_length).reread
    if not needs.token_columns:
        return None

    def with_neutral(pair: EncodedPair) -> EncodedPair:
        lengths = sum(pair.chosen_mask), sum(pair.rejected_mask or ())
        columns = {
            key: [column.neutral] * length
            for column in needs.token_columns
            for key, length in zip(column.keys, lengths, strict=True)
        }
        return dataclasses.replace(pair, token_columns=columns)

    return with_neutral


def file_task(config: RunConfig, day: date) -> Task:
    """The task of a run on a model and on data files; the data is encoded, or found encoded in the cache.

    Args: day: the date that a chat template receives where it asks for one.
    Raises: ConfigError, DataError or TrainError for whatever can be found out before a model is loaded.
    """
    start, reference, architecture, tokenizer = _open_models(config)
    tokenizer.pad_token_id, note = pad_token(tokenizer, model_checks.vocabulary_size(architecture))
    rendering = Rendering.of(config.data, tokenizer, day)
    needs = config.method.needs
    weight = config.data.weight_column
    if weight is not None and weight not in (column.name for column in needs.columns):
        needs = dataclasses.replace(needs, columns=(*needs.columns, Column(weight, low=0.0)))
    report: list[str] = [*([note] if note else []), *rendering.lines(tokenizer)]

    def encode(name: str) -> Encoded:
        encoded = encode_source(
            name, tokenizer, config.data, needs, rendering, model_checks.vocabulary_size(architecture)
        )
        report.extend(encoded.report.lines())
        return encoded

    weights = config.data.weights or (1.0,) * len(settings.sources(config.data.train))
    named = {name: w for name, w in zip(settings.sources(config.data.train), weights, strict=True) if w > 0}
    files = [encode(name) for name in named]
    train = joined(files)
    pairs: Sequence[EncodedPair] = train.pairs
    if (thought := in_rounds(config.method).card().get("thought")) is not None:
        report += without_thoughts(pairs, tokenizer, thought["response_marker"])
    if config.data.eval is not None:
        more = [encode(name) for name in settings.sources(config.data.eval)]
        held_out = joined(more)
        files += more
        eval_pairs, eval_fingerprint = held_out.pairs, held_out.fingerprint
        shared = shared_prompts(pairs, eval_pairs)
        if shared:
            report.append(
                f"warning: {shared:,} of {len(eval_pairs):,} held-out pairs have a prompt that is also in the "
                "training data"
            )
    elif config.data.eval_fraction == 0:
        eval_pairs, eval_fingerprint = [], "none"
    else:
        version = split_version(Path(config.output))
        pairs, eval_pairs = split_by_prompt(pairs, config.data.eval_fraction, version=version)
        eval_fingerprint = f"{train.fingerprint}-{config.data.eval_fraction}{split.mark(version)}"
        report.append(f"held out by prompt: {len(eval_pairs):,} of {len(train.pairs):,} pairs")
    for encoded in files:
        model_checks.check_positions(architecture, encoded.report, config.data.max_length)
    mixture = None
    if config.data.weights is not None:
        mixture = mixture_of(pairs, named, config.seed)
        report += mixture.lines(named)
    batches = FileBatches(
        pairs,
        config.train.global_batch,
        config.seed,
        f"{train.fingerprint}-{len(pairs)}",
        config.train.group_by_length,
        config.train.tokens_per_batch,
        mixture,
    )
    if config.train.tokens_per_batch is not None:
        report.append(batches.described())
    sources = [Source(encoded.pairs, encoded.fingerprint) for encoded in files]
    return Task(start, reference, tokenizer, batches, eval_pairs, eval_fingerprint, sources, report, day=rendering.date)


def _open_models(config: RunConfig) -> tuple[ModelSource, Frozen | ModelSource | None, PretrainedConfig, Any]:
    """Check policy and reference by their small files. Returns: (start, reference, the policy's config, tokenizer)."""
    assert config.model.path is not None
    start = model_sources.find(config.model.path, config.model)
    architecture = models.load_config(start.base, start.base_settings(config.model))
    adapter_checks.check(config, start, architecture)
    layout_choice.check_architecture(config, architecture)
    reference = model_sources.choose_reference(config, start)
    if isinstance(reference, model_sources.ModelSource) and reference != start:
        other = models.load_config(reference.base, reference.base_settings(config.model), key="reference.path")
        model_checks.check_same_vocabulary(architecture, other, reference.path)
        if reference.adapter is None:
            models.check_model(reference.base, reference.base_settings(config.model), "reference.path")
    tokenizer = models.load_tokenizer(*model_sources.tokenizer_path(start, config.model), config.data.chat_template)
    if isinstance(reference, model_sources.ModelSource) and reference != start:
        model_checks.check_same_tokens(tokenizer, *model_sources.tokenizer_path(reference, config.model))
    return start, reference, architecture, tokenizer


def without_thoughts(pairs: Sequence[EncodedPair], tokenizer: Any, marker: str, most: int = 64) -> list[str]:
    """A warning for a method with thoughts whose pairs have none.

    Args: marker: begins the response, after the thought. most: number of pairs that are looked at.
    """
    examined = [pairs[i] for i in range(min(most, len(pairs)))]
    if any(marker in tokenizer.decode(pair.chosen_ids) for pair in examined):
        return []
    return [
        f"warning: none of the first {len(examined)} chosen completions contains the response marker '{marker}', so "
        "the policy is trained on completions without a thought (use --rounds.count, or the pairs.jsonl of a round)"
    ]


def limit_held_out(config: RunConfig, task: Task) -> None:
    """Sample eval.max_pairs of the held-out pairs; the report warns where they are too few to tell models apart."""
    most, there = config.eval.max_pairs, len(task.eval_pairs)
    if most is not None and most < there:
        task.eval_pairs = sample(task.eval_pairs, most)
        task.eval_fingerprint = f"{most}-of-{task.eval_fingerprint}"  # it must end with the version of the split
        task.report.append(f"eval.max_pairs: {most:,} of {there:,} held-out pairs are evaluated, a random sample")
    warning = too_few(config, len(task.eval_pairs))
    task.report += [warning] if warning is not None else []
