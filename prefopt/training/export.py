"""What goes with an exported model beside its weights, so that other tools ask it and read it as it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.structure import terminators

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"


def describe_answers(
    folder: Path, tokenizer: PreTrainedTokenizerBase, card: Mapping[str, Any], stop: Sequence[str] = ()
) -> None:
    """Write card and what ends an answer into the generation config.

    Tools that read `eos_token_id` and `stop_strings` end where training ended, so nothing follows a response; those
    that know nothing of thoughts find the markers to strip them by under `thought`.

    Args: folder: of the model, or of its adapter. card: `RoundsMethod.card()`; where it is empty nothing is written.
        stop: texts that ended a completion in training's rounds.
    """
    if not card:
        return
    file = folder / GENERATION
    settings = json.loads(file.read_text()) if file.exists() else {}
    named = settings.get("eos_token_id")
    ends = {*(named if isinstance(named, list) else [named])} - {None} | terminators(tokenizer)
    settings.pop("_from_model_config", None)  # with it transformers may take the model config's word again
    settings |= {"eos_token_id": sorted(ends), **card}
    if stop:
        settings["stop_strings"] = list(stop)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
