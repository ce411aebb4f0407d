"""Thoughts before answers: the prompt that requests them, and splitting completions into thought and response.

This module works on text only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt import placeholders, storage
from prefopt.errors import ConfigError, did_you_mean

Messages = list[dict[str, Any]]
OnRepeat = Literal["error", "first"]
NONE = "none"  # the name of no thought prompt: prompts are unchanged, and the policy answers directly
_FOLDER = Path(__file__).parent / "thought_prompts"
_PLACEHOLDERS = ("prompt", "thought_marker", "response_marker")
_HEADER_KEYS = ("thought_marker", "response_marker")

# Reasons why a completion has no response; such completions are counted under these texts.
NO_MARKER = "no response marker"
REPEATED = "response marker repeated"
THOUGHT_AFTER = "thought marker in the response"
EMPTY = "empty response"


@dataclass(frozen=True)
class Answer:
    """A completion split in two; both parts are stripped."""

    thought: str
    response: str


@dataclass(frozen=True)
class ThoughtFormat:
    """How a policy is prompted to think, and how thought and response are separated.

    Args:
        template: the thought prompt. If it contains `{prompt}`, it is wrapped around the last user turn; otherwise it
            becomes a system message. None: no thought is requested, and the whole completion is the response.
        response_marker: the text between thought and response.
        thought_marker: the text before the thought, which is removed from it; "" for none.
        on_repeated_marker: `error` rejects a completion with a marker in its response, which usually holds several
            drafts; `first` starts the response after the first marker.
    """

    template: str | None
    response_marker: str = ""
    thought_marker: str = ""
    on_repeated_marker: OnRepeat = "error"

    def render(self, prompt: str | Messages) -> str | Messages:
        """The prompt as the policy receives it, with the thought prompt.

        Raises: ValueError when the prompt contains a marker, which the policy would confuse with its own.
        """
        if self.template is None:
            return prompt
        texts = [prompt] if isinstance(prompt, str) else [turn.get("content", "") for turn in prompt]
        for marker in (self.response_marker, self.thought_marker):
            if marker and any(marker in text for text in texts if isinstance(text, str)):
                raise ValueError(f"contains the marker '{marker}'")
        if "{prompt}" not in self.template:
            asked: Any = self._filled("")
            if isinstance(prompt, str):
                return f"{asked}\n\n{prompt}"
            if prompt and prompt[0]["role"] == "system":
                return [{**prompt[0], "content": f"{asked}\n\n{prompt[0]['content']}"}, *prompt[1:]]
            return [{"role": "system", "content": asked}, *prompt]
        if isinstance(prompt, str):
            return self._filled(prompt)
        last = max((i for i, turn in enumerate(prompt) if turn["role"] == "user"), default=None)
        if last is None:
            raise ValueError("has no user turn around which the thought prompt could be put")
        asked = {**prompt[last], "content": self._filled(prompt[last]["content"])}
        return [*prompt[:last], asked, *prompt[last + 1 :]]

    def parse(self, text: str) -> Answer | str:
        """Thought and response of a completion, or one of the reasons above why it has no response.

        Reference: Wu et al., Thinking LLMs, arXiv 2410.10630: a completion without the marker, or without a response
            after it, is a parse error. The paper does not mention repeated markers.
        """
        if self.template is None:
            return Answer("", text.strip()) if text.strip() else EMPTY
        thought, marker, response = text.partition(self.response_marker)
        if not marker:
            return NO_MARKER
        if self.on_repeated_marker == "error":
            if self.response_marker in response:
                return REPEATED
            if self.thought_marker and self.thought_marker in response:
                return THOUGHT_AFTER
        if not response.strip():
            return EMPTY
        if self.thought_marker:
            thought = thought.replace(self.thought_marker, "", 1)
        return Answer(thought.strip(), response.strip())

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible form, which is exported with a model so that other tools can hide its thoughts."""
        return {
            "template": self.template,
            "thought_marker": self.thought_marker,
            "response_marker": self.response_marker,
            "on_repeated_marker": self.on_repeated_marker,
        }

    def _filled(self, prompt: str) -> str:
        return placeholders.filled(self.filled_template(), prompt=prompt)

    def filled_template(self) -> str:
        """The thought prompt with its markers filled in; `{prompt}` remains a placeholder."""
        assert self.template is not None
        return placeholders.filled(
            self.template, thought_marker=self.thought_marker, response_marker=self.response_marker
        )


def names() -> list[str]:
    """Names of the thought prompts that are included in prefopt."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_format(
    name: str,
    *,
    key: str,
    response_marker: str | None = None,
    thought_marker: str | None = None,
    on_repeated_marker: OnRepeat = "error",
) -> ThoughtFormat:
    """Read the thought prompt with this name, or the file at this path.

    A file begins with lines `thought_marker: TEXT` and `response_marker: TEXT`, then a line `---`, then the prompt.

    Args:
        key: name of the setting, for error messages.
        response_marker, thought_marker: override those of the file.
    Raises: ConfigError for a file that is missing, unreadable or invalid.
    """
    if name == NONE:
        return ThoughtFormat(None)
    path = _FOLDER / f"{name}.txt" if name in names() else Path(name)
    try:
        text = storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not text" if isinstance(error, UnicodeDecodeError) else str(error.strerror).lower()
        known = (NONE, *names())
        raise ConfigError(
            f"{key}: '{name}': {reason}, expected one of {', '.join(known)} or a file{did_you_mean(name, known)}"
        ) from error
    head, line, template = text.partition("\n---\n")
    own: dict[str, str] = {}
    for number, entry in enumerate(head.splitlines() if line else (), 1):
        field, colon, value = entry.partition(":")
        if not colon or field.strip() not in _HEADER_KEYS:
            raise ConfigError(f"{key}: {path}:{number}: found '{entry}', expected 'response_marker: TEXT' or '---'")
        own[field.strip()] = value.strip()
    template = (template if line else text).strip("\n")
    what = placeholders.problem(template, (), _PLACEHOLDERS)
    if what is not None:
        raise ConfigError(f"{key}: {path}: {what}, expected {placeholders.listed(_PLACEHOLDERS)}")
    response = own.get("response_marker", "") if response_marker is None else response_marker
    thought = own.get("thought_marker", "") if thought_marker is None else thought_marker
    if not response.strip():
        raise ConfigError(
            f"{key}: {path}: has no response marker, expected a first line 'response_marker: TEXT' and a line '---' "
            "below it"
        )
    if thought and (thought in response or response in thought):
        raise ConfigError(
            f"{key}: one of the markers '{thought}' and '{response}' contains the other, expected distinct markers"
        )
    return ThoughtFormat(template, response, thought, on_repeated_marker)
