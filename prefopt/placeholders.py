"""Templates with placeholders in braces, such as {prompt}."""

from __future__ import annotations

import re
from collections.abc import Collection

from prefopt.errors import did_you_mean

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def filled(template: str, **texts: str) -> str:
    """The template with its placeholders filled in; braces inside the texts and unknown placeholders are unchanged."""
    return _PLACEHOLDER.sub(lambda match: texts.get(match[1], match[0]), template)


def listed(names: Collection[str]) -> str:
    """Placeholders with braces, sorted."""
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def problem(template: str, required: Collection[str], allowed: Collection[str]) -> str | None:
    """What is wrong with the placeholders of a template, as a predicate after its name; None where nothing is."""
    found = {*_PLACEHOLDER.findall(template)}
    missing, odd = sorted({*required} - found), sorted(found - {*allowed})
    if missing:
        return f"has no {{{missing[0]}}}"
    return f"has {{{odd[0]}}}{did_you_mean(odd[0], allowed)}" if odd else None
