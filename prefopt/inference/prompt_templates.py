"""What a policy is asked when it improves a response: template files, and the tags that its answers are read by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt import placeholders, storage
from prefopt.errors import ConfigError, did_you_mean
from prefopt.storage import text_hash
from prefopt.types import Response

_FOLDER = Path(__file__).parent / "templates"
_TAG = re.compile(r"</?[A-Z][A-Z_]*>")
_OPEN, _CLOSE = "<IMPROVED_VARIABLE>", "</IMPROVED_VARIABLE>"
# Of each file: the marks that it must have, and further ones that it may have.
_MARKS: dict[str, tuple[set[str], set[str]]] = {
    "loss": ({"query", "rejected", "chosen"}, set()),
    "loss_alone": ({"query", "chosen"}, set()),
    "gradient": ({"chosen", "critique"}, {"query", "evaluation", "short"}),
    "update": ({"chosen", "feedback"}, {"query", "evaluation", "critique", "short", "constraints"}),
    "constraints": (set(), set()),
    "constraints_alone": (set(), set()),
}
_ONE_PART = ("constraints", "constraints_alone")

# Why an answer holds no new response. They are counted under these words.
NO_TAGS = "no improved variable between its tags"
EMPTY = "empty response"


@dataclass(frozen=True)
class Template:
    """A question in two parts, with marks in braces where texts are put."""

    system: str
    user: str

    def filled(self, **texts: str) -> tuple[str, str]:
        """(system text, user text); what looks like a mark in the texts is left as it is."""
        return placeholders.filled(self.system, **texts), placeholders.filled(self.user, **texts)


@dataclass(frozen=True)
class Templates:
    """The texts of all questions to a policy, and the tags around their parts.

    Args:
        loss: judges a response beside a worse one; `loss_alone` does so without.
        gradient: asks what should change. update: asks for the new response.
        constraints: of the answer; `constraints_alone` where there is no worse response.
        tags: all that the files hold, such as <CONTEXT>.
    """

    loss: Template
    loss_alone: Template
    gradient: Template
    update: Template
    constraints: str
    constraints_alone: str
    tags: frozenset[str]

    def escaped(self, text: str) -> str:
        """A text as it may stand in a template: it cannot open or close a part of it."""
        return _TAG.sub(lambda tag: f"&lt;{tag[0][1:-1]}&gt;" if tag[0] in self.tags else tag[0], text)

    def improved(self, answer: str) -> Response | str:
        """The new response in an answer, or in a few words why there is none.

        It stands between the first opening tag and the last closing one, so that a response may mention these tags.
        What `escaped` has done to the response that it was made from is undone.
        """
        begin, end = answer.find(_OPEN), answer.rfind(_CLOSE)
        if begin < 0 or end < begin + len(_OPEN):
            return NO_TAGS
        text = answer[begin + len(_OPEN) : end].strip()
        for tag in self.tags:
            text = text.replace(f"&lt;{tag[1:-1]}&gt;", tag)
        return Response(text) if text else EMPTY

    def digest(self) -> str:
        """A hash of all of them."""
        parts = [(name, getattr(self, name)) for name in _MARKS]
        return text_hash(repr(parts))[:16]


def read_templates(folder: str | None = None) -> Templates:
    """The templates that come with prefopt, those in a folder taking the places of the ones of their names.

    A file has a system part, a line `---`, and a user part; those of constraints have one part.

    Raises: ConfigError for a folder or file that cannot be read or is not one of them, and for marks or tags that are
        missing or unknown.
    """
    own: dict[str, Path] = {}
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError(f"templates: '{folder}' is no folder, expected one with files such as update.txt")
        own = {path.stem: path for path in sorted(Path(folder).glob("*.txt"))}
        odd = sorted(own.keys() - _MARKS.keys())
        if odd or not own:
            found = f"'{own[odd[0]]}'{did_you_mean(odd[0], _MARKS)}" if odd else f"no .txt file in '{folder}'"
            raise ConfigError(f"templates: found {found}, expected {', '.join(f'{name}.txt' for name in _MARKS)}")
    paths = {name: own.get(name, _FOLDER / f"{name}.txt") for name in _MARKS}
    texts = {name: _read(path, name) for name, path in paths.items()}
    parts: dict[str, Any] = {
        name: texts[name] if name in _ONE_PART else _parts(path, texts[name]) for name, path in paths.items()
    }
    for tag in (_OPEN, _CLOSE):
        if tag not in texts["update"]:
            raise ConfigError(
                f"templates: '{paths['update']}' has no {tag}, expected an instruction to put the new response between "
                f"{_OPEN} and {_CLOSE}"
            )
    return Templates(**parts, tags=frozenset(tag for text in texts.values() for tag in _TAG.findall(text)))


def short_value(text: str, words: int = 10) -> str:
    """A text in short: its first and last words, and (...) between them; whole where it has no more than these.

    Args: words: on either side; words are what single spaces part.
    Reference: zou-group/textgrad, the short form of a variable. Differs from the authors' code: nothing.
    """
    found = text.split(" ")
    if len(found) <= 2 * words:
        return text
    return f"{' '.join(found[:words])} (...) {' '.join(found[-words:])}"


def _read(path: Path, name: str) -> str:
    try:
        text = storage.read_text(path).strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigError(f"templates: '{path}': {reason}") from error
    required, more = _MARKS[name]
    what = placeholders.problem(text, required, required | more) or (None if text.strip() else "is empty")
    if what is not None:
        expected = placeholders.listed(required | more) or "a text without marks"
        raise ConfigError(f"templates: '{path}' {what}, expected {expected}")
    return text


def _parts(path: Path, text: str) -> Template:
    system, line, user = text.partition("\n---\n")
    if not line or not system.strip() or not user.strip():
        raise ConfigError(f"templates: '{path}' has one part, expected a system part, a line '---' and a user part")
    return Template(system.strip("\n"), user.strip("\n"))
