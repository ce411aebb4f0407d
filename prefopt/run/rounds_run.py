"""Rounds in the ranks of this run: all stages one after the other, or the one that was named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prefopt.planner import dry_run
from prefopt.redaction import printable
from prefopt.rounds.setup import set_up
from prefopt.rounds.shards import Workers
from prefopt.run.card import CARD, first_day, write_or_check_card
from prefopt.run.card_contents import rounds_card
from prefopt.run.output_checks import check_same_run
from prefopt.run.stage_slice import StageSlice
from prefopt.run.training_run import print_dry_run, train_run
from prefopt.settings import RunConfig
from prefopt.testbed.cache import cache_root
from prefopt.training import output_folder, preflight
from prefopt.training import runtime as rt
from prefopt.training.launcher import print_rank_0
from prefopt.training.metrics import Evaluator
from prefopt.training.tracking import Trackers


def rounds_run(config: RunConfig, runtime: rt.Runtime, only: StageSlice | None = None) -> int:
    """Run all rounds on the ranks of this run, or one stage of one round. Returns: the exit status."""
    output = Path(config.output)
    part = only.part if only is not None else None
    workers = Workers(*part) if part is not None else Workers(runtime.rank, runtime.world, runtime)

    def train(settings: RunConfig, evaluators: Sequence[Evaluator]) -> int:
        folder = Path(settings.output)
        output_folder.prepare_output(folder)
        # the paths of policy and pairs may be written differently; the card has hashes of their contents
        check_same_run(settings, folder, but=("model.path", "data.train"))
        try:
            return train_run(settings, runtime, evaluators)
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
        log=print_rank_0,
        track=track,
        cache=cache_root(),
        day=runtime.from_main(first_day(output)),
        generates=only is None or only.name in ("generate", "evaluate"),
    )
    for line in report if only is None else ():
        print_rank_0(printable(line))
    if config.dry_run:
        total, each = preflight.gpu_memory(runtime.device), rounds.prompts_of_rounds()
        print_dry_run(config, dry_run.of_rounds(config, runtime, each, rounds.start.path, total))
        return 0
    card = rounds_card(config, runtime, rounds, report)
    runtime.on_main(lambda: write_or_check_card(card, output, write=part is None or workers.first))
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
