"""Chat messages of a data file, and the conversion of dialogues to messages. No templates, no tokenizer.

Messages are `{"role": ..., "content": ...}` or ShareGPT's `{"from": ..., "value": ...}`. What else a message has goes
on to the chat template as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from prefopt.data.bad_rows import RowProblem, check_text, kind, plain

Messages = list[dict[str, Any]]

HH_TURN = "\n\nAssistant:"
_MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_SHAREGPT |= {role: role for role in ("user", "assistant", "system", "tool")}


def is_turn(value: object) -> bool:
    """Whether it looks like one message."""
    return isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), str)


def read_messages(value: list[Any], name: str) -> Messages:
    """Messages of a data file as they are passed to the chat template.

    Text-only content parts are joined, `tool_calls` that are a JSON string are decoded, empty ones are removed, and so
    are values that JSON cannot represent. Content may be None where there are tool calls.

    Args: name: of the value, for error lines.
    Raises: RowProblem.
    """
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowProblem("bad message", name, f"found {kind(message)}", "an object with 'role' and 'content'")
    if message.get("role") is None and message.get("from") is not None:
        message = _sharegpt(message, name)
    out: dict[str, Any] = {}
    for key, value in message.items():
        if key == "tool_calls":
            value = _tool_calls(value, f"{name}.tool_calls") or None
        elif key == "content":
            value = _content(value, f"{name}.content")
        else:
            value = plain(value, f"{name}.{key}")
        if value is not None:  # tables store missing keys as null
            out[key] = value
    if "tool_calls" in out:
        out.setdefault("content", None)
    for key in ("role", "content"):
        if key not in out:
            keys = ", ".join(f"'{key}'" for key in sorted(out)) or "nothing"
            raise RowProblem("bad message", name, f"a message with {keys}", "'role' and 'content'")
    if not isinstance(out["role"], str):
        raise RowProblem("bad message", f"{name}.role", f"found {kind(out['role'])}", "a string")
    return out


def _sharegpt(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    who = message["from"]
    role = _SHAREGPT.get(who) if isinstance(who, str) else None
    if role is None:
        found = f"found '{who}'" if isinstance(who, str) else f"found {kind(who)}"
        raise RowProblem("bad message", f"{name}.from", found, "human, gpt, system or tool")
    return {"role": role, "content": message.get("value"), **_others(message, "from", "value", "role", "content")}


def _others(message: Mapping[str, Any], *known: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in known}


def _content(value: object, name: str) -> str | None:
    """Content as text: a string, or a list of text parts."""
    if value is None:
        return None
    if isinstance(value, str):
        check_text(value, name)
        return value
    if not isinstance(value, list):
        raise RowProblem("bad message", name, f"found {kind(value)}", "a string")
    texts = []
    for i, part in enumerate(value):
        what = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(what, str) and what not in ("text", "input_text", "output_text"):
            raise RowProblem("content is not text", f"{name}[{i}]", f"a part of type '{what}'", "text parts only")
        if not isinstance(text, str):
            found = f"found {kind(text)}" + (" for its text" if isinstance(part, dict) else "")
            raise RowProblem("bad message", f"{name}[{i}]", found, "a text part")
        check_text(text, f"{name}[{i}]")
        texts.append(text)
    return "".join(texts)


def _tool_calls(value: object, name: str) -> list[Any] | None:
    """Tool calls as a list of objects whose arguments are objects, as chat templates expect them."""
    value = decoded(value, name, "tool calls") if isinstance(value, str) else value
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        found = f"found {kind(value)}" if not isinstance(value, list) else "a list of other things than objects"
        raise RowProblem("bad tool calls", name, found, "a list of objects, as JSON or as text")
    return [_call(call) for call in plain(value, name)]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose `arguments` are decoded where they are an object as text, as OpenAI's servers write them."""
    out: dict[str, Any] = {
        key: _call(value) if key == "function" and isinstance(value, dict) else value for key, value in call.items()
    }
    if isinstance(out.get("arguments"), str):
        try:
            found = json.loads(out["arguments"])
        except (ValueError, RecursionError):
            found = None
        out["arguments"] = plain(found, "arguments") if isinstance(found, dict) else out["arguments"]
    return out


def decoded(text: str, name: str, what: str) -> Any:
    """Decode a value that is stored as JSON text; None where the text is empty.

    Raises: RowProblem where it is not JSON.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowProblem(
            f"bad {what}", name, "text that is not JSON", f"{what} as JSON or as text that is JSON"
        ) from None


def dialogue_turns(text: str, name: str) -> Messages:
    """The turns of an HH dialogue, by its `\\n\\nHuman:` and `\\n\\nAssistant:`; white space around a turn is removed.

    Raises: RowProblem where there is text before the first turn.
    """
    marks = [*_MARK.finditer(text)]
    if not marks or text[: marks[0].start()].strip():
        found = "text before the first turn" if marks else "no turn"
        raise RowProblem("not a dialogue", name, found, "a dialogue that begins with '\\n\\nHuman:'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        {"role": _HH_ROLES[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    ]


def is_dialogue_prompt(text: str) -> bool:
    """Whether a text is an HH dialogue that ends with the header of an assistant turn."""
    return text.endswith(HH_TURN) and any(mark[1] == "Human" for mark in _MARK.finditer(text))


def as_turn(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]
