"""What may leave the program: texts without secrets, and without characters that steer who reads them.

`printable` is the one way out for a line, a table's cell or a page's text; `hidden` is for nested values in files.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

HIDDEN = "***"
_VARIABLES = re.compile(
    r"(?:^|_)(?:api_?key|access_?key|key|token|secret|password|passwd|passphrase|credentials?|auth|authorization|pat)"
    r"(?:_\d+|_[a-z]{1,4})?$|(?:api_?key|token|secret|password|passwd)$",
    re.IGNORECASE,
)
_NO_VALUES = re.compile(r"_(path|file|dir|name|id|env|type|url|sock)$", re.IGNORECASE)  # they say where a secret is
_SETTINGS = re.compile(r"(^|[._-])(api[_-]?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s@\"']+@")  # https://user:password@host
_QUERY = re.compile(
    r"([?&;][\w.-]*(?:key|token|secret|password|passwd|signature|sig|auth|credential)=)[^&#\s\"']+", re.IGNORECASE
)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-api-key|api-key|set-cookie|cookie)(\\?[\"']?\s*[:=]\s*\\?[\"']?)"
    r"((?:bearer|basic|token|digest)\s+)?[^\s\"',;}\\]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)(\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{12,}", re.IGNORECASE)
_SHAPES = re.compile(  # of services that people of this field use
    r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{24,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{16,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
)
_LONG = 8  # a shorter value of a variable is hidden as a whole word only, and where it is no common word
_SHORTEST = 4

_named: set[str] = set()  # environment variables that settings name as those of a key
_told: set[str] = set()  # secrets that came in some other way


def named_variable(name: str) -> None:
    """From here on the value of this environment variable is a secret, whatever its name."""
    _named.add(name)


def learn_from(name: str, value: str) -> None:
    """From here on what is secret of a setting is one wherever it stands: its value, or the password of a URL."""
    if names_a_secret(name):
        _told.add(value)
    elif "://" in value:
        _told.add(_password(value))


def _password(url: str) -> str:
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).password or "")
    except ValueError:
        return ""


def hidden(value: Any, variables: Iterable[str] = ()) -> Any:
    """Nested values without their secrets, each of which has become `***`.

    A secret is the value of an environment variable whose name is like that of a key or token, or that settings name as
    one (`generate.api_key_env`); the value of a setting with such a name; a login in a URL, or a key in its query; the
    value of a header such as Authorization; and what has the form of a well-known service's key. It is found as it is,
    quoted for URLs, escaped for JSON, and inside base64. Names of variables stay.

    Args: value: mappings, lists and plain values. variables: further environment variables that hold secrets.
    """
    return _hidden(value, _known(variables))


def names_a_secret(setting: str) -> bool:
    """Whether a setting's value is a secret, by its name alone."""
    return _SETTINGS.search(setting) is not None


def _known(variables: Iterable[str] = ()) -> frozenset[str]:
    """All secrets that this process knows of."""
    found = {os.environ.get(name, "") for name in (*variables, *_named)} | _told
    for name, value in os.environ.items():
        if _VARIABLES.search(name) and not _NO_VALUES.search(name):
            found.add(value)
        elif "://" in value and "@" in value:  # DATABASE_URL, HTTPS_PROXY
            found.add(_password(value))
    return frozenset(text for text in found if _is_secret(text))


def _is_secret(text: str) -> bool:
    return len(text) >= _LONG or (len(text) >= _SHORTEST and not text.isalpha() and not text.isdecimal())


@functools.lru_cache(maxsize=16)
def _forms(secrets: frozenset[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[re.Pattern[str], ...]]:
    """(texts to be replaced wherever they stand, parts of base64 whose whole word goes, short ones as words)."""
    plain: set[str] = set()
    inside: set[str] = set()
    words: list[re.Pattern[str]] = []
    for secret in secrets:
        quoted = urllib.parse.quote(secret, safe="")
        forms = {secret, quoted, urllib.parse.quote(secret), urllib.parse.quote_plus(secret)}
        forms |= {re.sub("%..", lambda code: code[0].lower(), quoted), json.dumps(secret)[1:-1], repr(secret)[1:-1]}
        forms |= {json.dumps(secret, ensure_ascii=False)[1:-1]}
        if len(secret) < _LONG:
            words += [re.compile(rf"(?<![\w-]){re.escape(form)}(?![\w-])") for form in forms]
            continue
        plain |= forms
        data = secret.encode("utf-8", "surrogateescape")
        for before in range(3):  # of a group of three bytes, whatever stands before it
            whole = base64.b64encode(b"\0" * before + data).decode().rstrip("=")
            part = whole[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
            inside |= {part, part.translate(_URL_SAFE)}
    return tuple(sorted(plain, key=len, reverse=True)), tuple(inside), tuple(words)


_URL_SAFE = str.maketrans("+/", "-_")


def _hidden(value: Any, known: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if names_a_secret(str(key)) and isinstance(item, str) and item else _hidden(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_hidden(item, known) for item in value]
    return _without(value, known) if isinstance(value, str) else value


def _without(text: str, known: frozenset[str]) -> str:
    plain, inside, words = _forms(known)
    for form in plain:
        text = text.replace(form, HIDDEN)
    for part in inside:
        if part in text:
            text = re.sub(rf"[\w+/=-]*{re.escape(part)}[\w+/=-]*", HIDDEN, text)
    for word in words:
        text = word.sub(HIDDEN, text)
    text = _SHAPES.sub(HIDDEN, text)
    text = _HEADER.sub(rf"\g<1>\g<2>\g<3>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<1>\g<2>{HIDDEN}", text)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", text))


# Characters that are not seen, or that move what is ------------------------------------------------------------------

# C0 and C1 with line separators, marks of direction, characters of no width, tags, halves of pairs, no characters at
# all. Variation selectors and the accents of any script stay.
_UNSEEN = (
    "\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff"
)
_ONE_LINE = re.compile(f"[{_UNSEEN}]")
_LINES = re.compile(f"(?![\n\t])[{_UNSEEN}]")
_JOINERS = "\u200c\u200d"  # letters of Persian and Hindi, and families of emoji, are written with them
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escaped(text: str, *, lines: bool = False, joiners: bool = False) -> str:
    r"""The text with each character that is not seen, or that steers a terminal or a page, as `\x1b` or `\u202e`.

    Args: lines: line breaks and tabs stay, for a text of several lines that is ours or stands by itself. joiners: so do
        U+200C and U+200D, for a text that is to be read as its language writes it.
    """

    def escape(found: re.Match[str]) -> str:
        char = found[0]
        if joiners and char in _JOINERS:
            return char
        code = ord(char)
        return _SHORT.get(char) or (
            f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
        )

    return (_LINES if lines else _ONE_LINE).sub(escape, text)


def printable(text: Any, *, lines: bool = False, joiners: bool = False) -> str:
    """A text as it may leave the program: no secret in it, nothing in it that steers. Args: as of `escaped`."""
    return escaped(_without(str(text), _known()), lines=lines, joiners=joiners)


def markdown_cell(text: Any) -> str:
    """A text as the cell of a table in Markdown, which it cannot leave."""
    return re.sub(r"([\\|`<>])", r"\\\1", printable(text))


# Standard output and error --------------------------------------------------------------------------------------------


class _Redacted:
    """A stream that hides secrets in all that is written to it, by whichever library; it dies of no character."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = _without(text, _known())
        try:
            self._stream.write(shown)
        except UnicodeEncodeError:
            coding = getattr(self._stream, "encoding", None) or "utf-8"
            self._stream.write(shown.encode(coding, "backslashreplace").decode(coding))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


_lock = threading.Lock()
_guards = 0


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """While it lasts, nothing that Python prints holds a secret. May be entered by several threads."""
    global _guards
    with _lock:
        _guards += 1
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and not isinstance(stream, _Redacted):
                setattr(sys, name, _Redacted(stream))
    try:
        yield
    finally:
        with _lock:
            _guards -= 1
            for name in ("stdout", "stderr") if _guards == 0 else ():
                stream = getattr(sys, name)
                if isinstance(stream, _Redacted):
                    setattr(sys, name, stream._stream)
