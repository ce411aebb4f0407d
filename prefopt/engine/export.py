"""What goes with an exported model beside its weights, so that other tools ask it and read it as it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.data.encode import terminators
from prefopt.thoughts import ThoughtFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation_config.json"
CARD = "README.md"


def describe_answers(
    folder: Path, tokenizer: PreTrainedTokenizerBase, card: Mapping[str, Any], stop: Sequence[str] = ()
) -> None:
    """Write card and what ends an answer into the generation config, and a model card for people.

    Tools that read `eos_token_id` and `stop_strings` end where training ended, so nothing follows a response; those
    that know nothing of thoughts find the markers to strip them by under `thought`.

    Args: folder: of the model, or of its adapter. card: `Method.card()`; where it is empty nothing is written.
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
    if "thought" in card:
        (folder / CARD).write_text(_thought_card(card["thought"]))


def _thought_card(thought: Mapping[str, Any]) -> str:
    """The model card of a policy that thinks before it answers."""
    response, before = thought["response_marker"], thought["thought_marker"]
    first = f" Its thought begins with `{before}`." if before else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [prefopt, thought-preference-optimization]
---

# A model that thinks before it answers

It was trained to write its thoughts, then `{response}`, then its response.{first} Only the response is meant for a
reader. `prefopt infer --model FOLDER` asks it and shows the response alone; `--thought show` shows both.

With other tools, put the prompt into this text where it says `{{prompt}}`; without that mark it is a system message:

```
{ThoughtFormat(**thought).asking()}
```

and show what follows `{response}`. A completion without it, or with nothing behind it, holds no response: sample again.

```python
thought, marker, response = completion.partition({response!r})
answer = response.strip() if marker and {response!r} not in response else None  # None: sample again
```

The same stands in `{GENERATION}` under `thought`, and `eos_token_id` there names all tokens that end an answer.
"""
