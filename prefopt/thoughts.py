"""Thoughts before answers: the prompt that asks for them, and the cut before the response. Knows text alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt import placeholders, storage
from prefopt.errors import ConfigError, did_you_mean

Messages = list[dict[str, Any]]
OnRepeat = Literal["error", "first"]
NONE = "none"  # in the place of a thought prompt: the policy is asked as it is, and answers at once
_FOLDER = Path(__file__).parent / "thought_prompts"
_MARKS = ("prompt", "thought_marker", "response_marker")
_HEAD = ("thought_marker", "response_marker")

# Why a completion holds no response. They are counted under these words.
NO_MARKER = "no response marker"
REPEATED = "response marker repeated"
THOUGHT_AFTER = "thought marker in the response"
EMPTY = "empty response"


@dataclass(frozen=True)
class Answer:
    """A completion cut in two, each part without white space at its ends."""

    thought: str
    response: str


@dataclass(frozen=True)
class ThoughtFormat:
    """How a policy is asked to think, and how its thoughts are told from its response.

    Args:
        template: the thought prompt. With `{prompt}` in it, it is put around the last user turn; without, it is a
            system message. None: no thought is asked for, and a completion is all response.
        response_marker: stands between thought and response.
        thought_marker: stands before the thought, and is taken off it; "": nothing does.
        on_repeated_marker: `error`: a completion with a marker in its response is none, since several drafts and not
            one answer follow it; `first`: the response begins after the first one.
    """

    template: str | None
    response_marker: str = ""
    thought_marker: str = ""
    on_repeated_marker: OnRepeat = "error"

    def render(self, prompt: str | Messages) -> str | Messages:
        """The prompt as the policy reads it, the thought prompt around it.

        Raises: ValueError when the prompt holds a marker, which the policy could not tell from the one it is to write.
        """
        if self.template is None:
            return prompt
        texts = [prompt] if isinstance(prompt, str) else [turn.get("content", "") for turn in prompt]
        for marker in (self.response_marker, self.thought_marker):
            if marker and any(marker in text for text in texts if isinstance(text, str)):
                raise ValueError(f"the marker '{marker}' stands in it")
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
            raise ValueError("no user turn in it, around which the thought prompt could be put")
        asked = {**prompt[last], "content": self._filled(prompt[last]["content"])}
        return [*prompt[:last], asked, *prompt[last + 1 :]]

    def parse(self, text: str) -> Answer | str:
        """Thought and response of a completion, or in a few words why it holds no response.

        Reference: Wu et al., Thinking LLMs, arXiv 2410.10630: a completion without the marker, or without a response
            after it, is a parse error. Repeated markers are not spoken of there.
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
        """As JSON holds it: what goes with an exported model, so that whoever runs it can hide its thoughts."""
        return {
            "template": self.template,
            "thought_marker": self.thought_marker,
            "response_marker": self.response_marker,
            "on_repeated_marker": self.on_repeated_marker,
        }

    def _filled(self, prompt: str) -> str:
        return placeholders.filled(self.asking(), prompt=prompt)

    def asking(self) -> str:
        """The thought prompt with its markers in it; `{prompt}`, where it has that, is left to be filled."""
        assert self.template is not None
        return placeholders.filled(
            self.template, thought_marker=self.thought_marker, response_marker=self.response_marker
        )


def names() -> list[str]:
    """The thought prompts that come with prefopt."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def read_format(
    name: str,
    *,
    key: str,
    response_marker: str | None = None,
    thought_marker: str | None = None,
    on_repeated_marker: OnRepeat = "error",
) -> ThoughtFormat:
    """The thought prompt of that name, or in the file at that path.

    A file begins with lines `thought_marker: TEXT` and `response_marker: TEXT`, then a line `---`, then the prompt.

    Args: key: the setting, for complaints. response_marker, thought_marker: in the place of the file's own.
    Raises: ConfigError for a file that is not there, that cannot be read, or without what it needs.
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
        word, colon, value = entry.partition(":")
        if not colon or word.strip() not in _HEAD:
            raise ConfigError(f"{key}: {path}:{number}: found '{entry}', expected 'response_marker: TEXT' or '---'")
        own[word.strip()] = value.strip()
    template = (template if line else text).strip("\n")
    what = placeholders.problem(template, (), _MARKS)
    if what is not None:
        raise ConfigError(f"{key}: {path}: {what}, expected {placeholders.listed(_MARKS)}")
    response = own.get("response_marker", "") if response_marker is None else response_marker
    thought = own.get("thought_marker", "") if thought_marker is None else thought_marker
    if not response.strip():
        raise ConfigError(
            f"{key}: {path}: names no response marker, expected a first line 'response_marker: TEXT' and a line '---' "
            "below it"
        )
    if thought and (thought in response or response in thought):
        raise ConfigError(
            f"{key}: the markers '{thought}' and '{response}' hold one another, expected two that can be told apart"
        )
    return ThoughtFormat(template, response, thought, on_repeated_marker)
