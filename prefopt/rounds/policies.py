"""The policies of a run of rounds: where each round's weights are, how they are verified, opened and exported."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefopt import generation, storage
from prefopt.errors import RoundError
from prefopt.generation.base import Engine
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig
from prefopt.training import adapter_loading, adapter_saving, checkpoint, model_card, model_hashes, model_sources
from prefopt.training.export import write_generation_config


@dataclass
class RoundPolicies:
    """The policy after each round, numbered as the rounds are; number 0 is the policy that the run begins with.

    Args:
        config: of the whole run.
        output: its folder.
        tokenizer: of the policy.
        start: the first policy.
        start_hash: of its weights.
        device: where models run.
    """

    config: RunConfig
    output: Path
    tokenizer: Any
    start: model_sources.ModelSource
    start_hash: str
    device: torch.device
    _loaded: tuple[int, Any] | None = field(default=None, init=False)  # the number of a round, and its policy
    _verified: set[int] = field(default_factory=set, init=False)  # rounds whose policy is as its training left it

    def __post_init__(self) -> None:
        start = self.start
        hash_of = model_hashes.generation_config_hash
        self._start_generation = hash_of(start.path) or hash_of(start.base)

    # Places -----------------------------------------------------------------------------------------------------------

    def folder(self, number: int) -> Path:
        """The folder of a round."""
        return self.output / f"round_{number:02d}"

    def model(self, number: int) -> Path:
        """The policy after a round; after round 0 the one that the run began with."""
        return self.folder(number) / "train" / "model" if number else Path(self.start.path)

    def is_trained(self, number: int) -> bool:
        """Whether the policy after a round is there."""
        return number == 0 or storage.is_there(self.model(number) / storage.MANIFEST)

    def hash(self, number: int) -> str:
        """A hash of the policy's weights."""
        return self.start_hash if number == 0 else storage.sha256(self.model(number) / storage.MANIFEST)

    def generation_config(self, number: int) -> Any:
        """A hash of the first policy's generation config; None for later ones, whose manifests have it."""
        return self._start_generation if number == 0 else None

    def weights(self, number: int) -> model_sources.ModelSource:
        """Where the policy after a round is. Raises: RoundError where it is not as its training left it."""
        if number == 0:
            return self.start
        if number not in self._verified:
            wrong = storage.damage(self.model(number))
            if wrong is not None:
                train = self.folder(number) / "train"
                raise RoundError(
                    f"{self.model(number)}: {wrong}: the policy of round {number} is damaged; put it back from a copy, "
                    f"or delete {train} and run again: the round is trained again"
                )
            self._verified.add(number)
        return model_sources.find(str(self.model(number)), self.config.model)

    # Models -----------------------------------------------------------------------------------------------------------

    def load(self, number: int) -> Any:
        """The policy after a round; it stays in memory until another one is loaded or a round trains."""
        if self._loaded is None or self._loaded[0] != number:
            self.unload()
            self._loaded = (number, self.open(number))
        return self._loaded[1]

    def unload(self) -> None:
        """Free the memory of the loaded policy."""
        self._loaded = None
        free_gpu_memory()

    def open(self, number: int) -> Any:
        """A new copy of the policy after a round, frozen, on its device."""
        lm: Any = adapter_loading.load_frozen(self.weights(number), self.config.model, "model.path")
        return lm.to(self.device).eval()

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the policy is trained in."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.train.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def engine(self, number: int) -> Engine:
        """The inference engine that `generate` names, with the policy after a round."""
        self.weights(number)  # verified, for engines that read the folder themselves
        return generation.make(
            self.config.generate,
            path=str(self.model(number)),
            load=lambda: self.load(number),
            model=self.config.model,
            tokenizer=self.tokenizer,
        )

    # Export -----------------------------------------------------------------------------------------------------------

    def export(self, card: Callable[[bool], str], log: Callable[[str], None]) -> None:
        """Export the policy of the last round, merged into its base where `lora.merge` asks for it.

        Args: card: from whether the folder holds an adapter to the text of its model card.
        """
        if storage.damage(self.output / "model") is None:
            return
        number = self.config.rounds.count
        adapted = self.weights(number).adapter is not None

        def write(folder: Path) -> None:
            checkpoint.copy(self.model(number), folder)
            _write_card(folder, card(adapted))

        def write_merged(folder: Path) -> None:
            adapter_saving.save_merged(lm, folder)
            self.tokenizer.save_pretrained(folder)
            write_generation_config(
                folder, self.tokenizer, in_rounds(self.config.method).card(), self.config.generate.stop
            )
            _write_card(folder, card(False))

        if not (self.config.lora.merge and adapted):
            checkpoint.export(self.output / "model", write)
            return
        checkpoint.export(self.output / "adapter", write)
        lm = adapter_loading.load_frozen(self.weights(number), self.config.model, "model.path")
        adapter_saving.merge(lm, self.output / "adapter", self.config.model)
        checkpoint.export(self.output / "model", write_merged)
        log(f"merged: the adapter itself is in {self.output / 'adapter'}")

    def drop_scratch(self, number: int) -> None:
        """Remove what a round's training no longer needs once its model is exported."""
        for name in ("checkpoints", "best"):
            checkpoint.drop_all(self.folder(number) / "train" / name)


def _write_card(folder: Path, text: str) -> None:
    (folder / model_card.FILE).write_text(text, encoding="utf-8")


def free_gpu_memory() -> None:
    """Give a GPU's memory back before the next model is loaded."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
