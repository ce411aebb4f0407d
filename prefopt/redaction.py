"""Output without secrets, and without control characters that change a terminal or the direction of text.

Every printed line, table cell and page goes through `printable`; nested values for files go through `hidden`.
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
_NO_VALUES = re.compile(
    r"_(path|file|dir|name|id|env|type|url|sock)$", re.IGNORECASE
)  # they name the place of a secret
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
_SHAPES = re.compile(  # keys of services such as OpenAI, Hugging Face, GitHub and AWS
    r"\b(?:sk-[\w-]{20,}|hf_[A-Za-z0-9]{24,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{16,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
)
_LONG = 8  # a shorter secret is replaced as a whole word only, and only if it is no plain word or number
_SHORTEST = 4

_named: set[str] = set()  # environment variables that settings name as holding a key
_learned: set[str] = set()  # secrets from elsewhere, such as URLs


def named_variable(name: str) -> None:
    """Treat the value of this environment variable as a secret, whatever its name."""
    _named.add(name)


def learn_from(name: str, value: str) -> None:
    """Hide the secret of a setting wherever it occurs from here on: its value, or the password in its URL."""
    if names_a_secret(name):
        _learned.add(value)
    elif "://" in value:
        _learned.add(_password(value))


def _password(url: str) -> str:
    try:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).password or "")
    except ValueError:
        return ""


def hidden(value: Any, variables: Iterable[str] = ()) -> Any:
    """Nested values with each secret replaced by `***`.

    A secret is the value of an environment variable whose name is like that of a key or token, or that settings name as
    one (`generate.api_key_env`); the value of a setting with such a name; a login in a URL, or a key in its query; the
    value of a header such as Authorization; and any text in the format of a well-known service's key. Secrets are found
    in plain text, quoted for URLs, escaped for JSON, and inside base64. Names of variables stay.

    Args: value: mappings, lists and plain values. variables: further environment variables that hold secrets.
    """
    return _hidden(value, _known(variables))


def names_a_secret(setting: str) -> bool:
    """Whether a setting's value is a secret, by the setting's name."""
    return _SETTINGS.search(setting) is not None


def _known(variables: Iterable[str] = ()) -> frozenset[str]:
    """All secrets that are known to this process."""
    found = {os.environ.get(name, "") for name in (*variables, *_named)} | _learned
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
    """(texts to replace anywhere, fragments of base64 whose whole word is replaced, patterns of short secrets)."""
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
        for before in range(3):  # base64 encodes groups of three bytes, so a secret has three encodings
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


# Invisible and control characters -------------------------------------------------------------------------------------

# C0 and C1 controls, line separators, direction marks, zero-width characters, tags, surrogates and noncharacters.
# Variation selectors and combining accents of any script stay.
_INVISIBLE = (
    "\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff\ud800-\udfff"
)
_ONE_LINE = re.compile(f"[{_INVISIBLE}]")
_LINES = re.compile(f"(?![\n\t])[{_INVISIBLE}]")
_JOINERS = "\u200c\u200d"  # Persian, Hindi and emoji sequences need them
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def escaped(text: str, *, lines: bool = False, joiners: bool = False) -> str:
    r"""The text with each invisible or control character as an escape such as `\x1b` or `\u202e`.

    Args:
        lines: whether line breaks and tabs stay, for a text of several lines.
        joiners: whether U+200C and U+200D stay, which some languages need for correct display.
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
    """A text for output, with secrets removed and control characters escaped. Args: as of `escaped`."""
    return escaped(_without(str(text), _known()), lines=lines, joiners=joiners)


def markdown_cell(text: Any) -> str:
    """A text as a cell of a Markdown table, with the table's own characters escaped."""
    return re.sub(r"([\\|`<>])", r"\\\1", printable(text))


# Standard output and error --------------------------------------------------------------------------------------------


class _Redacted:
    """A stream that removes secrets from everything written to it, and escapes what its encoding lacks."""

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
    """Remove secrets from everything that Python prints within the block. Several threads may enter it."""
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
