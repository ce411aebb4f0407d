"""Makes the rounds of a run from its settings: cheap checks, then prompts; models are loaded by their stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from prefopt import generation, judges
from prefopt.data.encoder import pad_token
from prefopt.data.round_prompts import Prompts, read_prompts
from prefopt.data.templates import Rendering
from prefopt.errors import ConfigError, TrainError
from prefopt.judges.base import Judge
from prefopt.rounds.held_out_evaluation import OtherRun
from prefopt.rounds.rounds import Rounds
from prefopt.rounds.shards import Workers
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig, from_dict, sources
from prefopt.training import adapter_checks, layout_choice, model_checks, model_hashes, model_sources, models
from prefopt.training.metrics import Evaluator
from prefopt.training.runtime import set_threads
from prefopt.training.signals import Stop
from prefopt.types import Prompt


@dataclass(frozen=True)
class _Asked:
    """The prompts, and the policy that answers them. `config` is the run's, with what the prompts have decided."""

    config: RunConfig
    start: model_sources.ModelSource
    tokenizer: Any
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt] | None
    report: list[str]
    judge: Judge | None = None
    evaluators: Sequence[Evaluator] = ()


def set_up(
    config: RunConfig,
    output: Path,
    *,
    workers: Workers,
    device: torch.device,
    train: Callable[[RunConfig, Sequence[Evaluator]], int],
    stop: Stop,
    log: Callable[[str], None],
    track: Callable[[Mapping[str, float], int], None],
    cache: Path,
    day: date,
    generates: bool = True,
) -> tuple[Rounds, list[str]]:
    """The rounds, and lines to print about the prompts.

    Args:
        day: that the run began, for a chat template that asks for the date.
        generates: whether these processes are to sample completions.
    Raises: ConfigError, DataError or TrainError for whatever can be seen before any model is loaded.
    """
    judges.check(config.judge)
    generation.check(config.generate)
    in_ranks = generation.in_ranks(config.generate)
    if generates and workers.runtime is not None and workers.count > 1 and not in_ranks:
        raise ConfigError(
            f"generate.engine: '{config.generate.engine}' cannot run inside the {workers.count} ranks of a "
            "training run; use scripts/rounds.py with the same flags"
        )
    other = None if config.rounds.compare is None else _other_run(config.rounds.compare, "rounds.compare")
    if config.rounds.candidates is not None:
        _other_run(config.rounds.candidates, "rounds.candidates")
    asked = _from_testbed(config, cache) if config.on_testbed else _from_files(config, day)
    config = asked.config
    judges.check_prompts(config.judge, (prompt.prompt for prompt in (*asked.prompts, *(asked.held_out or ()))))
    judges.check_weights(config.judge)
    start_hash = workers.first_alone(lambda: _weights_hash(asked.start, config))
    # once, for all stages: what a sum rounds to depends on the threads, which must not depend on what is left to do
    set_threads(config.train.threads, models.parameter_count(asked.start.base, asked.start.base_settings(config.model)))
    rounds = Rounds(
        config=config,
        output=output,
        tokenizer=asked.tokenizer,
        start=asked.start,
        start_hash=start_hash,
        prompts=asked.prompts,
        held_out=asked.held_out,
        workers=workers,
        device=device,
        train=lambda settings, more: train(settings, [*asked.evaluators, *more]),
        stop=stop,
        log=log,
        track=track,
        world_judge=asked.judge,
        evaluators=asked.evaluators,
        other=other,
    )
    return rounds, asked.report


def _other_run(folder: str, key: str) -> OtherRun:
    """The run in a folder. Args: key: the setting that names it. Raises: ConfigError when it holds none."""
    path = Path(folder) / "run_card.json"
    try:
        settings = from_dict(json.loads(path.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{key}: '{path}': {reason}, expected the folder of a run of rounds") from None
    return OtherRun(Path(folder), in_rounds(settings.method))


def _from_testbed(config: RunConfig, cache: Path) -> _Asked:
    from prefopt.testbed import build_world

    world = build_world(config.testbed.world, seed=config.testbed.seed, cache_dir=cache)
    start = model_sources.ModelSource(str(world.base_model_path), str(world.base_model_path))
    each, beta = config.rounds.prompts, float(getattr(config.method, "beta", 1.0))
    assert each is not None, "the testbed's defaults name it"
    render, more = in_rounds(config.method).render_prompt, config.rounds.eval_prompts + config.rounds.select_prompts
    prompts = world.prompts(config.rounds.count * each, config.seed, render)
    held_out = world.prompts(more, config.seed + 2**31, render)
    what = f"testbed world '{config.testbed.world}': {len(prompts):,} prompts drawn for {config.rounds.count} rounds"
    return _Asked(
        config, start, world.tokenizer, prompts, held_out, [what], world.judge(), [lambda lm: world.evaluate(lm, beta)]
    )


def _from_files(config: RunConfig, day: date) -> _Asked:
    assert config.model.path is not None
    assert config.data.train is not None
    start = model_sources.find(config.model.path, config.model)
    architecture = models.load_config(start.base, start.base_settings(config.model))
    adapter_checks.check(config, start, architecture)
    layout_choice.check_architecture(config, architecture)
    limit = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.data.max_length > limit:
        raise TrainError(
            f"data.max_length: found {config.data.max_length}, but the model has {limit} positions; "
            f"use --data.max_length {limit}"
        )
    tokenizer = models.load_tokenizer(*model_sources.tokenizer_path(start, config.model), config.data.chat_template)
    tokenizer.pad_token_id, note = pad_token(tokenizer, model_checks.vocabulary_size(architecture))
    rendering = Rendering.of(config.data, tokenizer, day)
    if rendering.date is not None:  # each round's training uses the same date
        config = replace(config, data=replace(config.data, template_date=rendering.date.isoformat()))

    def read(named: str, with_answers: bool) -> tuple[list[Prompt], list[str]]:
        """The prompts of all sources that are named, each prompt once."""
        prompts: dict[str, Prompt] = {}
        report: list[str] = []
        for path in sources(named):
            found = one(path, with_answers)
            for prompt in found.prompts:
                prompts.setdefault(prompt.key, prompt)
            report += found.report
        return [*prompts.values()], report

    def one(path: str, with_answers: bool) -> Prompts:
        return read_prompts(
            path,
            tokenizer,
            render=in_rounds(config.method).render_prompt,
            max_prompt=config.data.max_length - config.generate.max_tokens,
            max_length=config.data.max_length,
            columns=config.data.columns,
            on_bad_row=config.data.on_bad_row,
            dialogues=config.data.dialogues,
            with_answers=with_answers,
            rendering=rendering,
            special_tokens=config.data.special_tokens,
        )

    prompts, report = read(str(config.data.train), config.rounds.pairs != "best_worst")
    held_out = None
    if config.data.eval is not None:
        held_out, more = read(config.data.eval, False)
        seen = {prompt.key for prompt in prompts}
        both = sum(prompt.key in seen for prompt in held_out)
        report += more + ([f"warning: {both:,} held-out prompts are in the training data"] if both else [])
    report = [*([note] if note else []), *rendering.lines(tokenizer), *report]
    return _Asked(config, start, tokenizer, prompts, held_out, report)


def _weights_hash(start: model_sources.ModelSource, config: RunConfig) -> str:
    """A hash of the first policy's weights, base and adapter."""
    parts = [start.base] + ([start.path] if start.adapter is not None else [])
    settings = start.base_settings(config.model)
    return "-".join(
        model_hashes.fingerprint(path, None if Path(path).is_dir() else models.load_config(path, settings))
        for path in parts
    )
