"""The exported model of a finished run: weights, tokenizer, generation config and model card."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.structure import completion_end_tokens
from prefopt.rounds_method import in_rounds
from prefopt.training import (
    adapter_loading,
    adapter_saving,
    adapters,
    checkpoint,
    extension,
    model_card,
    model_sources,
    sharded_io,
)
from prefopt.training.best_checkpoint import SELECTED
from prefopt.training.launcher import print_rank_0
from prefopt.training.run import TrainingRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def write_generation_config(
    folder: Path, tokenizer: PreTrainedTokenizerBase, card: Mapping[str, Any], stop: Sequence[str] = ()
) -> None:
    """Add the method's card, the end tokens and the stop strings to the generation config of an exported model.

    Tools that read `eos_token_id` and `stop_strings` then end an answer where completions ended in training. The
    markers under `thought` let them remove the thought.

    Args:
        folder: the model's or the adapter's.
        card: `RoundsMethod.card()`; if it is empty nothing is written.
        stop: stop strings of generation in the rounds.
    """
    if not card:
        return
    file = folder / GENERATION
    settings = json.loads(file.read_text()) if file.exists() else {}
    named = settings.get("eos_token_id")
    eos = {*(named if isinstance(named, list) else [named])} - {None} | completion_end_tokens(tokenizer)
    settings.pop("_from_model_config", None)  # with it transformers may read the model config instead
    settings |= {"eos_token_id": sorted(eos), **card}
    if stop:
        settings["stop_strings"] = list(stop)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


class ModelExport:
    """Exports the policy of a run in the format of transformers or peft; a folder is complete or absent."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def write(self, folder: Path) -> list[Path]:
        """Write the current policy to a folder; called on all ranks. Returns: the files that this rank wrote."""
        run = self.run
        mine = sharded_io.save_model(
            run.backend, folder, run.config.train.max_shard_mb, run.config.model.export_dtype, original=True
        )
        if run.is_main:
            self._describe(folder)
        return mine

    def export(self, best: Path | None, step: int | None) -> Path:
        """Export the final model to `model/`; with lora.merge also the adapter itself, to `adapter/`.

        Args: best, step: the folder and the step of the model that eval.select chose; None for the current policy.
        """
        run = self.run
        source: checkpoint.Write = self.write if best is None else functools.partial(self._copy, best)
        if run.config.lora.merge:
            adapter = run.output / "adapter"
            self._write_folder(adapter, source)
            print_rank_0(f"merged: the adapter itself is in {adapter}")
            source = functools.partial(self._write_merged, adapter=adapter, step=step)
        model = run.output / "model"
        self._write_folder(model, source)
        return model

    def _copy(self, best: Path, folder: Path) -> None:
        if self.run.is_main:
            checkpoint.copy(best, folder, without=(SELECTED,))

    def _write_folder(self, folder: Path, source: checkpoint.Write) -> None:
        aside = checkpoint.export(folder, source, self.run.runtime)
        if aside is not None:
            print_rank_0(
                f"{folder}: was damaged, or held files that this run did not write; its old content is in {aside}"
            )

    def _write_merged(self, folder: Path, adapter: Path, step: int | None) -> None:
        """Write the policy with an exported adapter merged. Args: step: step of the adapter; None: the last one."""
        run = self.run
        if run.is_main:
            lm: Any = run.policy.lm
            if run.backend.sharded:  # a copy in host memory, on this rank only
                lm = adapter_loading.load_frozen(
                    model_sources.find(str(adapter), run.config.model), run.config.model, "lora.merge"
                )
            adapter_saving.merge(lm, adapter, run.config.model)
            adapter_saving.save_merged(lm, folder, run.config.model.export_dtype)
            self._describe(folder, step, merged=True)

    def _describe(self, folder: Path, step: int | None = None, merged: bool = False) -> None:
        run = self.run
        run.tokenizer.save_pretrained(folder)
        write_generation_config(folder, run.tokenizer, in_rounds(run.method).card(), run.config.generate.stop)
        lines = [line for line in run.metrics.lines() if step is None or line["step"] <= step]
        adapter = adapters.has_adapter(run.policy.lm) and not merged
        contents = model_card.contents(
            run.config, run.tokenizer, lines, run.train.fingerprint, adapter=adapter, merged=merged
        )
        contents = replace(contents, data=[*contents.data, *extension.schedule_notes(run.output / "run_card.json")])
        (folder / model_card.FILE).write_text(model_card.page(contents), encoding="utf-8")
