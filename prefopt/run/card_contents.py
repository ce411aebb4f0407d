"""Contents of the run card: what a reader needs to trust and repeat a run."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt import settings
from prefopt.run.card import described_method
from prefopt.run.task import Task
from prefopt.settings import RunConfig
from prefopt.training import model_hashes, model_sources, models, versions
from prefopt.training import runtime as rt

if TYPE_CHECKING:
    from prefopt.rounds.rounds import Rounds


def run_card(config: RunConfig, runtime: rt.Runtime, task: Task) -> dict[str, Any]:
    """The card of a training run."""

    @functools.cache  # the reference is usually the policy's starting weights
    def digest(path: str, revision: str | None) -> str:
        if Path(path).is_dir():
            return model_hashes.fingerprint(path, None)
        return model_hashes.fingerprint(
            path, models.load_config(path, dataclasses.replace(config.model, revision=revision))
        )

    def card(weights: model_sources.ModelSource) -> dict[str, str]:
        path, base = weights.path, digest(weights.base, weights.revision)
        if weights.adapter is None:
            return {"path": path, "sha256": base}
        own = model_hashes.fingerprint(path, None) if Path(path).is_dir() else weights.commit or path
        return {"path": path, "sha256": own, "base": weights.base, "base_sha256": base}

    def reference_card() -> dict[str, str] | None:
        what, start = task.reference, task.start
        if what is None:
            return None
        return {
            **card(model_sources.source_of(what, start)),
            "is": model_sources.describe_reference(what, start, config),
        }

    return {
        "method": described_method(config),
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
        **_environment(runtime),
    }


def _batch_card(train: settings.TrainConfig, world: int) -> dict[str, int]:
    """The effective batch. Where tokens bound a step, its numbers of pairs and micro-batches vary between steps."""
    card = {"world_size": world}
    if train.tokens_per_batch is not None:
        return card | {"tokens_per_step": train.tokens_per_batch, "max_pairs_per_micro_batch": train.micro_batch}
    return {
        "pairs_per_step": train.global_batch,
        **card,
        "pairs_per_micro_batch": min(train.micro_batch, -(-train.global_batch // world)),
        "micro_batches_per_step": -(-train.global_batch // (train.micro_batch * world)),
    }


def rounds_card(config: RunConfig, runtime: rt.Runtime, rounds: Rounds, report: list[str]) -> dict[str, Any]:
    """The card of a run of rounds; the training of each round has a card of its own in its folder."""
    return {
        "method": described_method(config),
        "config": config.to_dict(),
        "data": {**rounds.data_hashes(), "report": report},
        "model": {"path": rounds.start.path, "sha256": rounds.start_hash},
        "reference": None,
        "judge": {"sha256": rounds.judge.hash},
        "template_date": rounds.config.data.template_date,
        **_environment(runtime),
    }


def _environment(runtime: rt.Runtime) -> dict[str, Any]:
    """Versions, backend, device and time."""
    return {
        "versions": versions.versions(),
        "git_commit": _git_commit(),
        "backend": runtime.described_backend,
        "device": str(runtime.device),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _git_commit() -> str | None:
    """The commit of prefopt's sources, with a plus sign if they were changed; None outside a git repository."""
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
