"""Texts with marks in braces, such as {prompt}, where other texts are put."""

from __future__ import annotations

import re
from collections.abc import Collection

from prefopt.errors import did_you_mean

_MARK = re.compile(r"\{([a-z_]+)\}")


def filled(template: str, **texts: str) -> str:
    """The template with its marks replaced; what stands in the texts is left as it is, and so is a mark without one."""
    return _MARK.sub(lambda mark: texts.get(mark[1], mark[0]), template)


def listed(names: Collection[str]) -> str:
    """Marks as a person reads them, in the alphabet's order."""
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def problem(template: str, required: Collection[str], allowed: Collection[str]) -> str | None:
    """What is wrong with the marks of a template, as the words after its name; None where all is well."""
    found = {*_MARK.findall(template)}
    missing, odd = sorted({*required} - found), sorted(found - {*allowed})
    if missing:
        return f"has no {{{missing[0]}}}"
    return f"has {{{odd[0]}}}{did_you_mean(odd[0], allowed)}" if odd else None
