"""Keys, tokens and passwords, kept out of what trackers are told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

HIDDEN = "***"
_VARIABLES = re.compile(r"(key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_SETTINGS = re.compile(r"(^|[._-])(api[_-]?key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s@]+@")  # https://user:password@host
_QUERY = re.compile(r"([?&][\w.-]*(?:key|token|secret|password|passwd|signature|sig)=)[^&#\s]+", re.IGNORECASE)
_SHORTEST = 8  # a shorter value of a variable is a word such as "true"


def hidden(value: Any, variables: Iterable[str] = ()) -> Any:
    """Nested values without their secrets, each of which has become `***`.

    A secret is the value of an environment variable whose name ends like that of a key or token, the value of a setting
    with such a name, a login in a URL, or a key in its query. Names of variables, such as `generate.api_key_env`, stay.

    Args: value: mappings, lists and plain values. variables: further environment variables that hold secrets.
    """
    names = {*variables, *(name for name in os.environ if _VARIABLES.search(name))}
    known = {os.environ.get(name, "") for name in names}
    return _hidden(value, sorted((text for text in known if len(text) >= _SHORTEST), key=len, reverse=True))


def names_a_secret(setting: str) -> bool:
    """Whether a setting's value is a secret, by its name alone."""
    return _SETTINGS.search(setting) is not None


def _hidden(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if names_a_secret(str(key)) and isinstance(item, str) and item else _hidden(item, known)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_hidden(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", value))
