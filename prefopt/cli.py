"""Puts a run together from its settings: cheap checks first, then data, then models, then the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import settings, storage
from prefopt.errors import ConfigError, TrainError, did_you_mean
from prefopt.exits import about, answered
from prefopt.redaction import hidden, printable
from prefopt.settings import RunConfig
from prefopt.storage import write_sealed, write_whole
from prefopt.testbed.cache import cache_root
from prefopt.training import launcher, output_folder, random_state, signals, versions, weight_files
from prefopt.training import runtime as rt
from prefopt.training.launcher import print_rank_0
from prefopt.training.slurm_environment import join_step

if TYPE_CHECKING:
    from prefopt.data.loader import Batches
    from prefopt.rounds.rounds import Rounds
    from prefopt.settings.data import LookConfig
    from prefopt.testbed.words import WordWorld
    from prefopt.training.adapters import Frozen, Weights
    from prefopt.training.forward import ReferenceHead
    from prefopt.training.metrics import Evaluator
    from prefopt.training.reference import ReferenceValues, Source
    from prefopt.training.tracking import Trackers
    from prefopt.types import EncodedPair

CARD = "run_card.json"
_OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ROUNDS_PATIENCE = timedelta(hours=24)  # what one process judges alone may take longer than any step of training
_HELD_OUT = 2**31  # seed of the testbed's held-out pairs: the same for every run, and no training set's


def train(argv: Sequence[str]) -> int:
    """The `train` command. Returns the exit status: 0 finished, 2 a user's mistake, 75 saved but not finished."""

    def trained() -> int:
        join_step()
        return _train(settings.parse(argv))

    return _answer("train", argv, lambda: settings.help_text(argv), trained)


def _answer(command: str, argv: Sequence[str], help_text: Callable[[], str], run: Callable[[], int]) -> int:
    """A command's help where it is asked for, else its exit status, see `answered`."""

    def helped() -> int:
        if "--help" in argv or "-h" in argv:
            with contextlib.suppress(BrokenPipeError):
                print(help_text())
            return 0
        rt.silence_deepspeed()
        return run()

    return answered(command, argv, helped)


def _train(config: RunConfig, only: StageSlice | None = None) -> int:
    about(config.to_dict(), Path(config.output))
    launcher.check_launcher()
    stop = signals.Stop()
    stop.install(launcher.world_size())
    _check_paths(config)
    output = Path(config.output)
    lock = output_folder.OutputLock(output, "" if only is None or only.part is None else f"-{only}")
    if not config.dry_run:
        output_folder.prepare_output(output)
        if launcher.rank() == 0:
            lock.acquire()
    try:
        if not config.dry_run:
            _refuse_another_run(config, output)
        status = _prepared(config, output, stop, only)
        if status == 0:
            stop.ignore_late_signal()
        return status
    except OSError as error:
        if error.errno in _OUT_OF_REACH and error.filename:
            with storage.reading(Path(error.filename)):
                raise
        if error.errno not in _NO_ROOM:
            raise
        place = error.filename or f"--output {output} (or the cache in {cache_root()})"
        raise TrainError(f"{place}: {error.strerror}; free space and run the same command again") from error
    finally:
        lock.release()


def _prepared(config: RunConfig, output: Path, stop: signals.Stop, only: StageSlice | None) -> int:
    from prefopt.training import compiling, layout_choice, optimizers, preflight

    runtime = rt.start(
        stop,
        seed=config.seed,
        mixed_precision=config.train.mixed_precision,
        deterministic=config.train.deterministic,
        trackers=() if config.dry_run else config.track.to,
        output=output,
        join_seconds=config.train.join_seconds,
        patience=_ROUNDS_PATIENCE if config.rounds.count else None,
    )
    try:
        print_rank_0(_first_line(config, runtime))
        optimizers.check_optimizer(config.optim, runtime.device)
        layout_choice.check_settings(config, runtime.device)
        if not config.dry_run:
            preflight.check(config, runtime, output)
        if config.train.compile:
            compiling.check(runtime.device)
        if config.model.offload_activations and runtime.device.type == "cpu":
            print_rank_0("warning: model.offload_activations copies what is in the host's memory already on a CPU")
        if config.rounds.count:
            return _run_rounds(config, runtime, output, only)
        return _run_once(config, runtime, output)
    finally:
        if runtime.world > 1:
            import torch.distributed as dist

            if dist.is_initialized() and sys.exc_info()[0] is None:
                runtime.wait()
                dist.destroy_process_group()


def _run_once(config: RunConfig, runtime: rt.Runtime, output: Path, evaluators: Sequence[Evaluator] = ()) -> int:
    """One training, from its data to its model."""
    from prefopt.training import checkpoint
    from prefopt.training.tracking import Trackers

    if config.train.check_memory and not config.on_testbed:
        _check_memory(config, runtime)
    day = runtime.from_main(_first_day(output))
    task = runtime.on_main_first(lambda: _testbed_task(config)) if config.on_testbed else _file_task(config, day)
    _hold_out_at_most(config, task)
    for line in task.report:
        print_rank_0(printable(line))
    if config.dry_run:
        from prefopt.planner import dry_run
        from prefopt.training import preflight

        total = preflight.gpu_memory(runtime.device)
        lines = dry_run.of_run(config, runtime, task.train, len(task.eval_pairs), task.start.path, total)
        _say_dry(config, lines)
        return 0
    resume_from = checkpoint.latest(output / "checkpoints", print_rank_0, runtime)

    def keep() -> dict[str, str] | None:
        card = _run_card(config, runtime, task)
        _keep_card(card, output)
        return card["reference"]

    hashes = runtime.on_main(keep)  # hashing weights reads all of them: once, on one process
    note = runtime.on_main(lambda: _extend(config, task, output))
    if note is not None:
        print_rank_0(note)
    if runtime.on_main(lambda: checkpoint.damage(output / "model") is None):
        print_rank_0(f"{output}: this run is finished; the model is in {output / 'model'}")
        _report_figures(config, runtime, task, output)
        return 0
    trackers, failed = Trackers(runtime, config, output, output / CARD), True
    try:
        status = _fit(config, runtime, task, output, resume_from, evaluators, trackers, hashes)
        if status == 0:
            print_rank_0(f"finished: model in {output / 'model'}, metrics in {output / 'metrics.jsonl'}")
            _report_figures(config, runtime, task, output, trackers)
        failed = False
    finally:
        trackers.finish(failed)
    return status


def _extend(config: RunConfig, task: _Task, output: Path) -> str | None:
    """Make a finished run one that goes on, where its length was raised. Returns: a line on its schedule, or None."""
    from prefopt.training import extension
    from prefopt.training.schedule import learning_rate, total_steps

    steps = None if task.train.steps_per_epoch is None else task.train.steps

    def rate(settings: RunConfig, step: int) -> float | None:
        return None if total_steps(settings, steps) is None else learning_rate(settings, steps, step)

    return extension.begin(output, output / CARD, config, rate)


def _say_dry(config: RunConfig, plan: Sequence[str]) -> None:
    """What `--dry_run` prints behind the report of the data. Args: plan: lines of what the run will do and need."""
    from prefopt.planner import dry_run

    whole = [] if config.dry_run != "config" else ["", "resolved config:", settings.yaml_of(hidden(config.to_dict()))]
    changed = [printable(line) for line in dry_run.differences(config)]
    print_rank_0("\n".join(["", *changed, *plan, *whole]))
    if not whole:
        print_rank_0("(--dry_run config prints every setting as YAML)")


def _hold_out_at_most(config: RunConfig, task: _Task) -> None:
    """Keep eval.max_pairs of the held-out pairs, and put into the report what so many can decide."""
    from prefopt.data.split import sample
    from prefopt.evaluate.held_out import too_few

    most, there = config.eval.max_pairs, len(task.eval_pairs)
    if most is not None and most < there:
        task.eval_pairs = sample(task.eval_pairs, most)
        task.eval_fingerprint = f"{most}-of-{task.eval_fingerprint}"  # its end tells the version of a split
        task.report.append(f"eval.max_pairs: {most:,} of {there:,} held-out pairs are scored, a random sample")
    warning = too_few(config, len(task.eval_pairs))
    task.report += [warning] if warning is not None else []


def _check_memory(config: RunConfig, runtime: rt.Runtime) -> None:
    """Say it where the run may not fit on its GPUs. Raises: TrainError where it cannot."""
    from prefopt.training import preflight

    total = preflight.gpu_memory(runtime.device)
    if total is None:
        return
    from prefopt.planner import fit

    engine = fit.backend_of(runtime)
    if engine is not None:
        warning = runtime.on_main(lambda: fit.check(config, engine, runtime.world, total))
        if warning is not None:
            print_rank_0(warning)


# Rounds ---------------------------------------------------------------------------------------------------------------


def _run_rounds(config: RunConfig, runtime: rt.Runtime, output: Path, only: StageSlice | None = None) -> int:
    """All rounds in the processes of this run, or one stage of one of them."""
    from prefopt.rounds.setup import set_up
    from prefopt.rounds.shards import Workers
    from prefopt.training.tracking import Trackers

    part = only.part if only is not None else None
    workers = Workers(*part) if part is not None else Workers(runtime.rank, runtime.world, runtime)

    def train(settings: RunConfig, evaluators: Sequence[Evaluator]) -> int:
        folder = Path(settings.output)
        output_folder.prepare_output(folder)
        # where the policy and its pairs lie may be spelled in another way; the card holds what they are
        _refuse_another_run(settings, folder, but=("model.path", "data.train"))
        try:
            return _run_once(settings, runtime, folder, evaluators)
        finally:
            runtime.accelerator.free_memory()

    def track(figures: Mapping[str, float], number: int) -> None:
        trackers = Trackers(runtime, config, output, output / CARD)
        trackers.start()
        trackers.log({f"rounds/{name}": value for name, value in figures.items()}, number)
        trackers.finish()

    rounds, report = set_up(
        config,
        output,
        workers=workers,
        device=runtime.device,
        train=train,
        stop=runtime.stop,
        say=print_rank_0,
        track=track,
        cache=cache_root(),
        day=runtime.from_main(_first_day(output)),
        generates=only is None or only.name in ("generate", "evaluate"),
    )
    for line in report if only is None else ():
        print_rank_0(printable(line))
    if config.dry_run:
        from prefopt.planner import dry_run
        from prefopt.training import preflight

        total, each = preflight.gpu_memory(runtime.device), rounds.prompts_of_rounds()
        _say_dry(config, dry_run.of_rounds(config, runtime, each, rounds.start.path, total))
        return 0
    card = _rounds_card(config, runtime, rounds, report)
    runtime.on_main(lambda: _keep_card(card, output, write=part is None or workers.first))
    if only is not None:
        if part is None:
            rounds.clean()
        status = rounds.stage(only.name, only.round)
        if status == 0 and only.name == "evaluate" and only.round == config.rounds.count:
            rounds.finish()
        return status
    status = rounds.run()
    if status == 0:
        print_rank_0(
            f"finished: model in {output / 'model'}, rounds in {output / 'rounds.md'} and {output / 'rounds.png'}"
        )
    return status


@dataclasses.dataclass(frozen=True)
class StageSlice:
    """One stage of one round, as `rounds --stage` names it. `part`: (which, of how many) processes share its shards."""

    name: str
    round: int
    part: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.round}" + ("" if self.part is None else f"-{self.part[0]}of{self.part[1]}")


def rounds(argv: Sequence[str]) -> int:
    """The `rounds` command: each stage in a process of its own, or the one that `--stage` names. Status as `train`."""

    def help_text() -> str:
        named = any(word.partition("=")[0] == "--rounds.count" for word in argv)
        return ROUNDS_USAGE + "\n" + settings.help_text([*argv, *([] if named else ["--rounds.count", "1"])])

    def conducted() -> int:
        from prefopt.sweeps import rounds_jobs as on_slurm

        join_step()
        flags, how = on_slurm.options_of(argv)
        flags, stage = _stage_of(flags)
        config = settings.parse(flags)
        about(config.to_dict(), Path(config.output))
        if config.rounds.count == 0:
            raise ConfigError("--rounds.count: not given, expected how many rounds")
        if stage is not None and stage.round > config.rounds.count:
            raise ConfigError(f"--round: found {stage.round}, but there are {config.rounds.count} (--rounds.count)")
        if how is not None and stage is not None:
            raise ConfigError("--launcher: given with --stage; a stage that is named runs here, leave one out")
        if how is not None:
            return on_slurm.submit(config, flags, how, print_rank_0)
        return _conduct(config, flags) if stage is None and not config.dry_run else _train(config, stage)

    return _answer("rounds", argv, help_text, conducted)


ROUNDS_USAGE = """usage: rounds.py --method NAME --rounds.count N [--GROUP.SETTING VALUE ...]
       rounds.py --stage generate|judge|pair|train|evaluate --round K [--part I/N] (the same flags)
       rounds.py --launcher slurm [--parts N] [--sbatch FLAGS] [--sbatch.STAGE FLAGS] (the same flags)

Without --stage: every stage of every round that is not done yet, each in a process of its own; the train stage is
started by --rounds.launcher. With --stage: that one; --part 0/4 to 3/4 share its shards among four processes. With
--launcher slurm: a job for each stage, each after the one before; N array tasks share generate and judge.
"""
_STAGES = ("generate", "judge", "pair", "train", "evaluate")


def _stage_of(argv: Sequence[str]) -> tuple[list[str], StageSlice | None]:
    """(all other flags, the stage that these name)."""
    flags, own = [], {}
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        word = words.pop(0)
        if word in ("--stage", "--round", "--part"):
            if not words:
                raise ConfigError(f"{word}: found no value")
            own[word] = words.pop(0)
        else:
            flags.append(word)
    if not own:
        return flags, None
    name, number, part = own.get("--stage"), own.get("--round"), own.get("--part")
    if name not in _STAGES:
        near = did_you_mean(str(name), _STAGES)
        raise ConfigError(f"--stage: found {name!r}, expected one of {', '.join(_STAGES)}{near}")
    if number is None or not number.isdigit() or (int(number) == 0 and name != "evaluate"):
        raise ConfigError(f"--round: found {number!r}, expected the number of a round, from 1 (evaluate: from 0)")
    if part is None:
        return flags, StageSlice(name, int(number))
    which, _, of = part.partition("/")
    if not (which.isdigit() and of.isdigit() and int(which) < int(of)):
        raise ConfigError(f"--part: found {part!r}, expected such as 0/4, 1/4, 2/4, 3/4")
    if name not in ("generate", "judge"):
        raise ConfigError(f"--part: the {name} stage is one process's work, or one launch's; leave it out")
    return flags, StageSlice(name, int(number), (int(which), int(of)))


def _conduct(config: RunConfig, flags: Sequence[str]) -> int:
    """Start the stages that are not done, one after the other. A killed conductor is started again as it was."""
    from prefopt.rounds.store import done

    _check_paths(config)
    try:
        launcher = shlex.split(config.rounds.launcher) or [sys.executable]
    except ValueError as error:
        raise ConfigError(f"rounds.launcher: found {config.rounds.launcher!r}: {error}") from None
    if shutil.which(launcher[0]) is None:
        raise ConfigError(f"rounds.launcher: there is no program '{launcher[0]}' here")
    output = Path(config.output)
    _refuse_another_run(config, output)
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, signals.FOLLOW: "1"}
    for number in range(config.rounds.count + 1):
        for name in _STAGES if number else ("evaluate",):
            last = number == config.rounds.count and name == "evaluate"
            if done(config, output / f"round_{number:02d}", name) and not (last and not (output / "model").exists()):
                continue
            command = [*(launcher if name == "train" else [sys.executable]), "-m", "prefopt", "rounds"]
            print_rank_0(f"round {number}: {name}")
            status = _run_stage([*command, "--stage", name, "--round", str(number), *flags], environment)
            if status != 0:
                return status if status in (2, signals.EXIT_UNFINISHED) else 1
    print_rank_0(f"finished: model in {output / 'model'}, rounds in {output / 'rounds.md'} and {output / 'rounds.png'}")
    return 0


def _run_stage(command: list[str], environment: Mapping[str, str]) -> int:
    """Start a stage and wait for its end; signals that ask to save are passed on to it. Returns its exit status."""
    with subprocess.Popen(command, env=dict(environment)) as process:
        asked: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(number)

        numbers = signals.SAVE_SIGNALS if signals.handles_signals() else ()
        before = {number: signal.signal(number, pass_on) for number in numbers}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return signals.EXIT_UNFINISHED if asked and status != 0 else status


@dataclasses.dataclass
class _Task:
    """What a run trains on, wherever it came from."""

    start: Weights
    reference: Frozen | Weights | None
    tokenizer: Any
    train: Batches
    eval_pairs: Sequence[EncodedPair]
    eval_fingerprint: str
    sources: Sequence[Source]
    report: list[str]
    world: WordWorld | None = None
    day: date | None = None  # that the chat template is told, where it asks


def _testbed_task(config: RunConfig) -> _Task:
    from prefopt.data.comparison import BothOrders
    from prefopt.data.loader import Converted, FileBatches
    from prefopt.testbed import build_world
    from prefopt.testbed.words import WordWorld
    from prefopt.training import adapters, models
    from prefopt.training.reference import Source

    test = config.testbed
    world = build_world(test.world, seed=test.seed, cache_dir=cache_root())
    assert isinstance(world, WordWorld), "the settings refuse a world without pairs"
    start = adapters.Weights(str(world.base_model_path), str(world.base_model_path))
    adapters.check(config, start, models.load_config(start.base, config.model))
    batch, seed = config.train.global_batch, config.seed
    needs = config.method.needs
    eval_pairs = world.file_pairs(test.eval_pairs, _HELD_OUT)
    missing = [column.name for column in needs.columns if column.name not in eval_pairs[0].columns]
    if missing:
        raise ConfigError(f"method {_described(config)}: the testbed's pairs have no column '{missing[0]}'")
    both = BothOrders(world.tokenizer, config.data.max_length) if needs.sequences == "both_orders" else None
    if both is not None:
        eval_pairs = [both.reread(pair) for pair in eval_pairs]
    sources = [Source(eval_pairs, f"{world.fingerprint}-{test.eval_pairs}-held-out")]
    if test.pairs is None:
        train: Batches = world.stream(batch, seed)
        train = train if both is None else Converted(train, both.reread, needs.sequences)
        what = "a fresh stream of pairs"
    else:
        fingerprint = f"{world.fingerprint}-{test.pairs}-{seed}"
        pairs = world.file_pairs(test.pairs, seed)
        pairs = pairs if both is None else [both.reread(pair) for pair in pairs]
        group, tokens = config.train.group_by_length, config.train.tokens_per_batch
        if tokens is not None and needs.rows == "chosen_only":  # it counts what is fed
            pairs = [dataclasses.replace(pair, rejected_ids=None, rejected_mask=None) for pair in pairs]
        train = FileBatches(pairs, batch, seed, fingerprint, group, tokens)
        sources.append(Source(pairs, fingerprint))
        what = f"a fixed set of {test.pairs:,} pairs"
    return _Task(
        start=start,
        reference=adapters.reference(config, start),
        tokenizer=world.tokenizer,
        train=train,
        eval_pairs=eval_pairs,
        eval_fingerprint=f"{world.fingerprint}-{test.eval_pairs}",
        sources=sources,
        report=[f"no model and no data named: training on the testbed world '{test.world}', {what}"],
        world=world,
    )


def _first_day(output: Path) -> date:
    """The day that a run began: what a chat template that asks for the date is told, however long the run takes."""
    card = _read_card(output)
    kept = None if card is None else card.get("template_date")
    return date.today() if kept is None else date.fromisoformat(kept)


def _file_task(config: RunConfig, day: date) -> _Task:
    from prefopt.data import split
    from prefopt.data.comparison import encoder_for
    from prefopt.data.encode import encode_file, joined
    from prefopt.data.encoder import pad_token
    from prefopt.data.loader import FileBatches
    from prefopt.data.mixture import mixture_of
    from prefopt.data.split import shared_prompts, split_by_prompt
    from prefopt.data.templates import Rendering
    from prefopt.training import adapters, layout_choice, model_checks, models
    from prefopt.training.reference import Source

    assert config.model.path is not None
    start = adapters.find(config.model.path, config.model)
    architecture = models.load_config(start.base, start.base_settings(config.model))
    adapters.check(config, start, architecture)
    layout_choice.check_architecture(config, architecture)
    reference = adapters.reference(config, start)
    if isinstance(reference, adapters.Weights) and reference != start:
        other = models.load_config(reference.base, reference.base_settings(config.model), key="reference.path")
        model_checks.check_same_vocabulary(architecture, other, reference.path)
        if reference.adapter is None:
            models.check_model(reference.base, reference.base_settings(config.model), "reference.path")
    tokenizer = models.load_tokenizer(*adapters.tokenizer_path(start, config.model), config.data.chat_template)
    if isinstance(reference, adapters.Weights) and reference != start:
        model_checks.check_same_tokens(tokenizer, *adapters.tokenizer_path(reference, config.model))
    tokenizer.pad_token_id, note = pad_token(tokenizer, model_checks.vocabulary(architecture))
    rendering = Rendering.of(config.data, tokenizer, day)
    needs = config.method.needs
    report: list[str] = [*([note] if note else []), *rendering.lines(tokenizer)]

    def encode(path: str) -> Any:
        encoded = encode_file(
            path,
            tokenizer,
            max_length=config.data.max_length,
            kind=encoder_for(needs),
            need_rejected=needs.rows == "pairs",
            extra=needs.columns,
            columns=config.data.columns,
            on_bad_row=config.data.on_bad_row,
            vocab_rows=model_checks.vocabulary(architecture),
            cache_dir=cache_root() / "encoded",
            dialogues=config.data.dialogues,
            rendering=rendering,
            overlong=config.data.overlong,
            special_tokens=config.data.special_tokens,
        )
        report.extend(encoded.report.lines())
        return encoded

    weights = config.data.weights or (1.0,) * len(settings.sources(config.data.train))
    named = {name: w for name, w in zip(settings.sources(config.data.train), weights, strict=True) if w > 0}
    files = [encode(name) for name in named]
    train = joined(files)
    pairs: Sequence[EncodedPair] = train.pairs
    if (thought := config.method.card().get("thought")) is not None:
        report += _thoughtless(pairs, tokenizer, thought["response_marker"])
    if config.data.eval is not None:
        more = [encode(name) for name in settings.sources(config.data.eval)]
        held_out = joined(more)
        files += more
        eval_pairs, eval_fingerprint = held_out.pairs, held_out.fingerprint
        shared = shared_prompts(pairs, eval_pairs)
        if shared:
            report.append(
                f"warning: {shared:,} of {len(eval_pairs):,} eval pairs have a prompt that is in the training data"
            )
    elif config.data.eval_fraction == 0:
        eval_pairs, eval_fingerprint = [], "none"
    else:
        version = _split_version(Path(config.output))
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
    return _Task(
        start, reference, tokenizer, batches, eval_pairs, eval_fingerprint, sources, report, day=rendering.date
    )


def _split_version(output: Path) -> int:
    """How prompts are held out: as now, or as the run that the output holds has begun with."""
    from prefopt.data import split

    card = _read_card(output)
    return split.VERSION if card is None else split.version_of(str(card["data"].get("eval", "")))


def _fit(
    config: RunConfig,
    runtime: rt.Runtime,
    task: _Task,
    output: Path,
    resume_from: Path | None,
    evaluators: Sequence[Evaluator] = (),
    trackers: Trackers | None = None,
    hashes: Mapping[str, str] | None = None,
) -> int:
    from prefopt.training import adapters, models, preflight, sharding
    from prefopt.training.forward import PolicyWithReference, Scorer
    from prefopt.training.trainer import Trainer

    if config.lora.r is None and task.start.adapter is None:
        base = task.start
        runtime.on_main(
            lambda: preflight.room_for_checkpoints(
                config, models.parameter_count(base.base, base.base_settings(config.model)), output
            )
        )
    reference: Any = task.reference
    key = "model.path" if config.reference.path is None else "reference.path"
    cached = reference is not None and config.reference.cache != "none"
    second = isinstance(reference, adapters.Weights) and not cached
    if second:
        preflight.room_for_two_models(runtime)
    with runtime.sharded_loading():
        lm = adapters.load_policy(config, task.start, task.reference, resume_from)
    if second:
        with runtime.sharded_loading():
            reference = adapters.load_frozen(reference, config.model, key)
    # drawn numbers are dropout's: each process has its own, whatever was drawn until here
    random_state.set_seed(config.seed + runtime.rank)
    parameters = sum(sharding.numel(p) for p in lm.parameters())
    threads = rt.set_threads(config.train.threads, parameters)
    if resume_from is not None:
        print_rank_0(f"continuing from {resume_from}")
    name, adapter = type(adapters.base_of(lm)).__name__, adapters.describe_policy(lm)
    of_them = f", {adapter}" if adapter else ""
    print_rank_0(
        f"policy: {name}, {parameters:,} parameters{of_them}, {threads} thread(s) per process; output: {output}"
    )
    if config.model.attention == "sdpa" and adapters.base_of(lm).config._attn_implementation == "eager":
        print_rank_0(f"attention: eager, since {name} computes what SDPA cannot (a soft-cap of attention, say)")
    for line in adapters.remarks(lm):
        print_rank_0(line)
    if task.reference is not None:
        print_rank_0(f"reference: {adapters.describe(task.reference, task.start, config)}")
    if config.model.dtype == "bfloat16" and not adapter:
        print_rank_0(
            "warning: weights in bfloat16 lose updates smaller than 1/256 of a weight; "
            "float32 weights with train.mixed_precision bf16 do not"
        )
    values: ReferenceValues | None = None
    reference_head: ReferenceHead | None = None
    if cached:
        values, reference_head = _kept_reference(config, runtime, task, lm, resume_from is None, key, hashes or {})
        reference = reference if isinstance(reference, adapters.Frozen) else None
    scores = config.method.needs.output == "scores"
    if scores:
        models.set_padding(adapters.base_of(lm), task.tokenizer)
    evaluators = [*evaluators]
    if task.world is not None and not scores:  # a world's truth is about what a policy writes
        world, beta = task.world, _beta(config)
        evaluators.append(lambda policy: world.evaluate(policy, beta))
    policy = Scorer(lm) if scores else PolicyWithReference(lm, reference, config.kernel, reference_head)
    if config.eval.generate and isinstance(policy, PolicyWithReference):
        from prefopt.evaluate.sampler import sampler

        agree = runtime.from_main if runtime.backend in rt.SHARDING else None
        precision = runtime.accelerator.autocast
        evaluators.append(sampler(config, policy, task.tokenizer, task.eval_pairs, precision, agree))
    trainer = Trainer(
        config=config,
        runtime=runtime,
        policy=policy,
        tokenizer=task.tokenizer,
        train=task.train,
        eval_pairs=task.eval_pairs,
        output=output,
        resume_from=resume_from,
        evaluators=evaluators,
        values=values,
        trackers=trackers,
    )
    return trainer.run()


def _kept_reference(
    config: RunConfig, runtime: rt.Runtime, task: _Task, lm: Any, fresh: bool, key: str, hashes: Mapping[str, str]
) -> tuple[ReferenceValues, ReferenceHead | None]:
    """(what is kept of the reference, its head where that is needed and the policy does not hold it).

    Args: lm: the policy, which answers for the reference as long as it is the same. fresh: whether it has not moved.
        key: names the reference in errors. hashes: of the reference's weights.
    """
    import torch

    from prefopt.training import adapters, sharding
    from prefopt.training.forward import ReferenceHead
    from prefopt.training.reference import Oracle, obtain

    what = task.reference
    assert what is not None
    if isinstance(what, adapters.Frozen):
        oracle = Oracle(lm, what, hashes)
    elif fresh and what == task.start:
        oracle = Oracle(lm, None, hashes)
    else:
        with runtime.sharded_loading():
            oracle = Oracle(adapters.load_frozen(what, config.model, key), None, hashes)
    if not sharding.is_sharded(oracle.lm):
        torch.nn.Module.to(oracle.lm, runtime.device)
    cache_dir = Path(config.reference.cache_dir) if config.reference.cache_dir else cache_root() / "reference"
    with sharding.gathered_by_layer(oracle.lm):
        values = obtain(config, runtime, oracle, task.sources, cache_dir, int(task.tokenizer.pad_token_id))
    if config.reference.cache != "hidden" or oracle.frozen is not None:
        return values, None
    with sharding.gathered(oracle.lm.get_output_embeddings()):
        return values, ReferenceHead(oracle.lm)


def _beta(config: RunConfig) -> float:
    """The beta whose optimum a testbed run is measured against: the method's own, or the world's usual one."""
    return float(getattr(config.method, "beta", settings.TESTBED_DEFAULTS["method"]["beta"]))


def _report_figures(
    config: RunConfig, runtime: rt.Runtime, task: _Task, output: Path, trackers: Trackers | None = None
) -> None:
    """What a finished run ends with: its figures, and on the testbed how far they are from the exact optimum."""
    from prefopt.evaluate.held_out import final_figures

    lines = runtime.on_main(lambda: final_figures(config, output))
    if lines:
        print_rank_0("\n".join(lines))
        if trackers is not None:
            text = "\n".join(lines)
            last = max((line["step"] for line in _lines(output, "train")), default=0)
            trackers.page("figures/end", f"```\n{text}\n```", last)
    _report_testbed(config, runtime, task, output, trackers)


def _lines(output: Path, split: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one split."""
    from prefopt.training.metrics import read_lines

    path = output / "metrics.jsonl"
    return [line for line in read_lines(path) if line["split"] == split] if path.exists() else []


def _report_testbed(
    config: RunConfig, runtime: rt.Runtime, task: _Task, output: Path, trackers: Trackers | None = None
) -> None:
    """The table at the end of a run on the testbed, and the frontier plot where there is a frontier."""
    lines = _lines(output, "eval") if task.world is not None and runtime.is_main else []
    if task.world is None or not lines:
        return
    from prefopt.training.best_checkpoint import Selection

    chosen = None if config.eval.select is None else Selection.of(config.eval.select).best(lines)
    end = next((line for line in lines if line["step"] == chosen), lines[-1])  # of the model that is exported
    from prefopt.testbed.bandit import Bandit
    from prefopt.testbed.world_report import PlotLine, frontier_plot, summary_table

    if config.method.needs.output == "scores":
        won = [pair.columns["pair_win_prob"] for pair in task.eval_pairs]
        best = sum(1.0 if p > 0.5 else 0.5 * (p == 0.5) for p in won) / len(won)
        print_rank_0(
            f"held-out accuracy {end['rewards/accuracies']:.3f} at the end; "
            f"of the true reward on the same pairs {best:.3f}"
        )
        return
    beta = _beta(config)
    start = lines[0] if lines[0]["step"] == 0 else None
    table = summary_table(task.world, start, end, beta)
    print_rank_0("\n" + table)
    if isinstance(task.world, Bandit):
        if config.method.other_optimum():
            print_rank_0(f"\n{config.method.other_optimum()}")
        frontier_plot(output / "frontier.png", task.world, [PlotLine(_described(config), beta, lines)])
        print_rank_0(f"\nreward-KL frontier: {output / 'frontier.png'}")
    if trackers is not None:
        trackers.page("testbed/end", f"```\n{table}\n```", lines[-1]["step"])
        trackers.picture("testbed/frontier", output / "frontier.png", lines[-1]["step"])


# Before anything heavy is imported ------------------------------------------------------------------------------------


def _check_paths(config: RunConfig) -> None:
    """Refuse a model or data path that can be nothing, or a tracker that is missing, while that costs no import."""
    from prefopt.data.rows import open_source

    for key, path in (("model.path", config.model.path), ("reference.path", config.reference.path)):
        if path is not None:
            weight_files.check_path(key, path)
    for tracker in config.track.to:
        if importlib.util.find_spec(tracker) is None:
            extra = f"prefopt[{tracker}]" if tracker == "wandb" else tracker
            raise ConfigError(f"track.to: '{tracker}' is not installed; pip install '{extra}', or leave it out")
    in_bits = {"model.quantize": config.model.quantize, "optim.name": config.optim.name}
    for key, value in in_bits.items():
        needed = value is not None if key == "model.quantize" else str(value).endswith("adamw_8bit")
        if needed and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"{key}: '{value}' needs bitsandbytes; pip install 'prefopt[qlora]', or leave it out")
    for path in settings.sources(config.data.train) + settings.sources(config.data.eval):
        if Path(path).suffix or path.startswith((".", "/", "~")):
            open_source(path)


def _refuse_another_run(config: RunConfig, output: Path, but: Sequence[str] = ()) -> None:
    """Raises: TrainError when the output holds a run with other settings, naming the first differences.

    Args: but: settings that may differ.
    """
    card = _read_card(output)
    if card is None:
        _refuse_files_of_others(output)
        return
    _refuse_models_of_others(output)
    changed = settings.differences(hidden(card["config"]), hidden(config.to_dict()))
    changed = [line for line in changed if line.partition(":")[0] not in but]
    keys = [line.partition(":")[0] for line in changed]
    if keys and not but and config.rounds.count == 0 and set(keys) <= set(settings.LENGTHS):
        from prefopt.training import extension

        lengths = extension.changes(card["config"], config.to_dict())
        extension.check(output, settings.from_dict(card["config"]), lengths)
        return
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"--output {output}: holds a run with other settings ({'; '.join(changed[:3])}{more}); "
            "choose another --output, or the settings of that run to continue it"
        )


def _refuse_files_of_others(output: Path) -> None:
    """Raises: TrainError where a new run would write over what no run has written."""
    if storage.is_there(output / "config.yaml") and not storage.is_there(output / CARD):
        raise TrainError(
            f"--output {output}: holds a config.yaml that no run has written, and a run writes its own there; "
            "choose another --output"
        )


def _refuse_models_of_others(output: Path) -> None:
    """Raises: TrainError where a run would export its model to the place of one that no run has exported."""
    for name in ("model", "adapter"):
        if storage.is_there(output / name) and not storage.is_there(output / name / storage.MANIFEST):
            raise TrainError(
                f"{output / name}: was not written by a run, or lost its {storage.MANIFEST}; a run exports to this "
                "place: move it away, or choose another --output"
            )


def _thoughtless(pairs: Sequence[EncodedPair], tokenizer: Any, marker: str, most: int = 64) -> list[str]:
    """A warning where a policy that is to think would be trained on pairs without thoughts."""
    first = [pairs[i] for i in range(min(most, len(pairs)))]
    if any(marker in tokenizer.decode(pair.chosen_ids) for pair in first):
        return []
    return [
        f"warning: none of the first {len(first)} chosen completions holds the response marker '{marker}': they are "
        "trained on as they stand, without a thought (--rounds.count, or the pairs.jsonl of a round)"
    ]


def _read_card(output: Path) -> dict[str, Any] | None:
    """The card of the run that the output holds; None where nothing has come of one: a mistake may be mended.

    Raises: TrainError for what a run has left without its card, or with a card that is not as it was written.
    """
    names = [
        *("metrics.jsonl", "checkpoints", "best", "model", "adapter", "round_00", "round_01"),
        *("eval_pairs.jsonl", "samples.jsonl", "rounds.jsonl", "rounds.md", "rounds.png", "frontier.png"),
    ]
    left = next((name for name in names if storage.is_there(output / name)), None)
    path = output / CARD
    try:
        card = storage.read_sealed(path, unsealed=True)
    except storage.Damaged as error:
        raise TrainError(f"{error}; choose another --output, or put it back from a copy") from None
    if card is None:
        if left is not None:
            raise TrainError(
                f"--output {output}: holds '{left}' without a {CARD}, so which run it is of is not known; choose "
                "another --output, or put the card back"
            )
        return None
    groups = [card.get(key, 0) for key in ("config", "data", "model")]
    if not all(isinstance(group, dict) for group in groups) or not isinstance(card.get("reference", 0), dict | None):
        raise TrainError(f"{path}: is not a run card; choose another --output, or put it back from a copy")
    return card if left is not None else None


# The run card ---------------------------------------------------------------------------------------------------------


def _run_card(config: RunConfig, runtime: rt.Runtime, task: _Task) -> dict[str, Any]:
    """What a reader needs to trust and repeat the run."""
    from prefopt.training import adapters, model_hashes, models

    @functools.cache  # the reference is the policy's start unless another is named
    def digest(path: str, revision: str | None) -> str:
        if Path(path).is_dir():
            return model_hashes.fingerprint(path, None)
        return model_hashes.fingerprint(
            path, models.load_config(path, dataclasses.replace(config.model, revision=revision))
        )

    def card(weights: adapters.Weights) -> dict[str, str]:
        path, base = weights.path, digest(weights.base, weights.revision)
        if weights.adapter is None:
            return {"path": path, "sha256": base}
        own = model_hashes.fingerprint(path, None) if Path(path).is_dir() else weights.commit or path
        return {"path": path, "sha256": own, "base": weights.base, "base_sha256": base}

    def reference_card() -> dict[str, str] | None:
        what, start = task.reference, task.start
        if what is None:
            return None
        return {**card(adapters.weights_of(what, start)), "is": adapters.describe(what, start, config)}

    return {
        "method": _described(config),
        "config": config.to_dict(),
        "learning_rate": {"peak": config.optim.lr, "from": settings.rate_source(config)},
        "batch": _batch_card(config.train, runtime.world),
        "data": {
            "train": task.train.fingerprint,
            "order": task.train.order_hash,
            "eval": task.eval_fingerprint,
            "report": task.report,
        },
        "model": card(task.start),
        "reference": reference_card(),
        "template_date": None if task.day is None else task.day.isoformat(),
        **_circumstances(runtime),
    }


def _batch_card(train: settings.TrainConfig, world: int) -> dict[str, int]:
    """What a step takes. Where tokens bound it, how many pairs and passes that are differs from step to step."""
    card = {"processes": world}
    if train.tokens_per_batch is not None:
        return card | {"tokens_per_step": train.tokens_per_batch, "most_pairs_per_pass_and_process": train.micro_batch}
    return {
        "pairs_per_step": train.global_batch,
        **card,
        "pairs_per_pass_and_process": min(train.micro_batch, -(-train.global_batch // world)),
        "passes_per_step": -(-train.global_batch // (train.micro_batch * world)),
    }


def _rounds_card(config: RunConfig, runtime: rt.Runtime, rounds: Rounds, report: list[str]) -> dict[str, Any]:
    """The same of a run of rounds; each round's training has a card of its own beside it."""
    return {
        "method": _described(config),
        "config": config.to_dict(),
        "data": {**rounds.data_hashes(), "report": report},
        "model": {"path": rounds.start.path, "sha256": rounds.start_hash},
        "reference": None,
        "judge": {"sha256": rounds.judge_hash},
        "template_date": rounds.config.data.template_date,
        **_circumstances(runtime),
    }


def _circumstances(runtime: rt.Runtime) -> dict[str, Any]:
    return {
        "versions": versions.versions(),
        "git_commit": _git_commit(),
        "engine": runtime.described_backend,
        "device": str(runtime.device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _keep_card(card: dict[str, Any], output: Path, write: bool = True) -> None:
    """Write the card of a new run; hold a continued run to the data and weights of its card.

    Args: write: whether this process begins the run; another one writes the card only where there is none yet.
    """
    card = hidden(json.loads(json.dumps(card, default=str)))
    old = _read_card(output)
    if old is None:
        write_sealed(output / CARD, card, only_new=not write)
        if write:
            write_whole(output / "config.yaml", [settings.from_dict(card["config"]).to_yaml()])
            return
        old = storage.read_sealed(output / CARD) or {}
    held = {"training data": ("data", "train"), "held-out data": ("data", "eval")}
    held |= {"order of the training pairs": ("data", "order")}
    held |= {"model": ("model", "sha256"), "reference": ("reference", "sha256")}
    held |= {"judge": ("judge", "sha256")}
    held |= {"base model": ("model", "base_sha256"), "reference's base": ("reference", "base_sha256")}
    for what, (group, key) in held.items():
        before, now = ((one.get(group) or {}).get(key) for one in (old, card))
        if before != now:
            raise TrainError(
                f"--output {output}: the {what} is not what this run began with ({before} -> {now}); "
                "choose another --output"
            )


def _git_commit() -> str | None:
    """The commit of prefopt's own sources, with a plus sign if they were changed; None where they are no repository."""
    try:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def _first_line(config: RunConfig, runtime: rt.Runtime) -> str:
    return (
        f"prefopt: world size {runtime.world}, backend {runtime.described_backend}, device {runtime.device.type}, "
        f"method {_described(config)}, seed {config.seed}"
    )


def _described(config: RunConfig) -> str:
    """The method's name with its variant and main settings."""
    more = config.method.describe()
    return f"{config.method_name} ({more})" if more else config.method_name


# Answers from a model as it is ----------------------------------------------------------------------------------------


def infer(argv: Sequence[str]) -> int:
    """The `infer` command: answers prompts. Status 0: done; 2: a user's mistake; 75: stopped, run the same again."""
    from prefopt.settings.infer import infer_help, parse_infer

    def inferred() -> int:
        config = parse_infer(argv)
        about(dataclasses.asdict(config), Path(config.output) if config.output else None)
        from prefopt.inference.infer import run

        return run(config)

    return _answer("infer", argv, infer_help, inferred)


# Looking at data ------------------------------------------------------------------------------------------------------


def data(argv: Sequence[str]) -> int:
    """The `data` command: what training would say of the data, and some rows with their masks. Status as `infer`."""
    from prefopt.settings.data import look_help, parse_look

    def looked() -> int:
        config = parse_look(argv)
        about(dataclasses.asdict(config))
        return _look(config)

    return _answer("data", argv, look_help, looked)


def _look(config: LookConfig) -> int:
    from prefopt import registry
    from prefopt.data.rows import open_source
    from prefopt.types import Needs

    if config.model.path is not None:
        weight_files.check_path("model.path", config.model.path)
    if config.tokenizer is not None:
        weight_files.check_path("tokenizer", config.tokenizer)
    for name in config.sources:
        if Path(name).suffix or name.startswith((".", "/", "~")):
            open_source(name)

    from prefopt.data.comparison import encoder_for
    from prefopt.data.encode import encode_file, joined
    from prefopt.data.encoder import pad_token
    from prefopt.data.preview import page, shown, spread, terminal
    from prefopt.data.templates import Rendering
    from prefopt.training import adapters, model_checks, models

    vocab_rows = None
    if config.model.path is not None:
        start = adapters.find(config.model.path, config.model)
        vocab_rows = model_checks.vocabulary(models.load_config(start.base, start.base_settings(config.model)))
        path, at = adapters.tokenizer_path(start, config.model)
        tokenizer = models.load_tokenizer(path, at, config.data.chat_template)
    else:
        assert config.tokenizer is not None
        tokenizer = models.load_tokenizer(config.tokenizer, config.model, config.data.chat_template, key="tokenizer")
    tokenizer.pad_token_id, _ = pad_token(tokenizer, vocab_rows)
    rendering = Rendering.of(config.data, tokenizer)
    needs = Needs(reference="none") if config.method is None else registry.get(config.method)().needs
    sources = [
        encode_file(
            name,
            tokenizer,
            max_length=config.data.max_length,
            kind=encoder_for(needs),
            need_rejected=needs.rows == "pairs",
            extra=needs.columns,
            columns=config.data.columns,
            on_bad_row=config.data.on_bad_row,
            vocab_rows=vocab_rows,
            cache_dir=cache_root() / "encoded",
            dialogues=config.data.dialogues,
            rendering=rendering,
            overlong=config.data.overlong,
            special_tokens=config.data.special_tokens,
        )
        for name in config.sources
    ]
    lines = [*rendering.lines(tokenizer), *(line for source in sources for line in source.report.lines())]
    report = [printable(line) for line in lines]
    pairs = joined(sources).pairs
    rows = [shown(pairs[i], tokenizer) for i in spread(config.rows, len(pairs))]
    if config.html is not None:
        try:
            write_whole(Path(config.html), [hidden(page(", ".join(config.sources), report, rows))])
        except OSError as error:
            raise TrainError(f"--html: '{config.html}' cannot be written: {error.strerror}") from None
        print("\n".join([*report, printable(f"written: {config.html}")]))
        return 0
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    with contextlib.suppress(BrokenPipeError):
        print("\n".join([*report, *(["", terminal(rows, color=color)] if rows else [])]))
    return 0


# Many runs ------------------------------------------------------------------------------------------------------------


def sweep(argv: Sequence[str]) -> int:
    """The `sweep` command. Status 0: all runs are done; 1: some failed; 2: a user's mistake; 75: run the same again."""
    from prefopt.sweeps import command

    return answered("sweep", argv, lambda: command.sweep(argv))


def plan(argv: Sequence[str]) -> int:
    """The `plan` command: memory and time of a run under each engine. Status: 0, or 2 for a user's mistake."""
    from prefopt.settings.plan import parse_plan, plan_help

    def planned() -> int:
        own, config = parse_plan(argv)
        about(config.to_dict())
        weight_files.check_path("model.path", str(config.model.path))
        from prefopt.planner.plan_report import report

        with contextlib.suppress(BrokenPipeError):
            print(printable(report(own, config), lines=True))
        return 0

    return _answer("plan", argv, plan_help, planned)
