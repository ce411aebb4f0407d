"""Where the `infer` command writes: the folder of its cache and card, the file with the answers, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from prefopt import storage
from prefopt.errors import ConfigError
from prefopt.inference.answer_cache import writing
from prefopt.redaction import hidden
from prefopt.settings import infer as settings

CARD = "infer.json"


@dataclass(frozen=True)
class Place:
    """Where a run writes. Args: folder: of its cache and card. answers: the file with the answers."""

    folder: Path
    answers: Path

    @classmethod
    def of(cls, output: str) -> Place:
        """A folder, or a JSONL file, beside which the cache has a folder of its own."""
        path = Path(output)
        if path.suffix == ".jsonl":
            return cls(path.with_name(path.name + ".cache"), path)
        return cls(path, path / "answers.jsonl")

    def refuse_what_is_not_ours(self) -> None:
        """Raises: ConfigError for an output that something else has written."""
        ours = storage.is_there(self.folder / CARD)
        others = ("run_card.json", "metrics.jsonl")
        other = next((name for name in others if storage.is_there(self.folder / name)), None)
        if other is not None:
            raise ConfigError(f"--output {self.folder}: holds a training run ({other}); choose another --output")
        names = (self.answers.name, "summary.json", "traces.jsonl", "traces.html", "pairs.jsonl")
        taken = next((path for name in names if storage.is_there(path := self.answers.with_name(name))), None)
        if taken is not None and not ours and (taken == self.answers or self.answers.parent == self.folder):
            raise ConfigError(f"--output {taken}: exists, and is not this command's; choose another --output")

    def day(self) -> date | None:
        """The date that the chat template of the run here has used; None for a new run."""
        try:
            found = json.loads((self.folder / CARD).read_text(encoding="utf-8"))["template_date"]
            return None if found is None else date.fromisoformat(found)
        except (OSError, ValueError, KeyError, TypeError):  # `hold` refuses a card that cannot be read
            return None

    def hold(self, card: Mapping[str, Any]) -> None:
        """Write the card of a new run, or compare a resumed one with its card.

        Raises: ConfigError naming the first differences.
        """
        path = self.folder / CARD
        now = hidden(json.loads(json.dumps(card, default=str)))
        try:
            before = storage.read_sealed(path, unsealed=True)
            if before is None:
                with writing(path):
                    storage.write_sealed(path, now)
                return
            changed = settings.differences(hidden(before["config"]), now["config"])
            changed += [
                f"{key}: {before[key]!r} -> {now[key]!r}"
                for key in ("model", "prompts", "judge", "templates")
                if before[key] != now[key]
            ]
        except storage.Damaged as error:
            raise ConfigError(f"{error}; choose another --output, or put it back from a copy") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: is not the card of such a run: {error!r}; choose another --output") from None
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"--output {self.folder}: holds answers made with other settings ({'; '.join(changed[:3])}{more}); "
                "choose another --output, or use the settings of that run to resume it"
            )
