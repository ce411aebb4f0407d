"""Render a `PairRow` as text: the end of the prompt, and the spans that the loss reads. No token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.data.bad_rows import DROP, RowProblem
from prefopt.data.rows import Messages
from prefopt.data.structure import Structure
from prefopt.data.templates import Rendering, unread_args

REASONING = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Rendered:
    """Prompt and one completion as text.

    Args:
        text: prompt and completion.
        spans: of the text that the loss reads, (begin, end) in characters; the first begins where the prompt ends, the
            last ends where the text ends.
        terminated: whether the text ends with the template's end-of-turn token, so that no EOS is added.
        chat: whether a chat template rendered it.
        notes: remarks that the report counts.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    terminated: bool
    chat: bool = False
    notes: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.text[: self.spans[0][0]]


def render(
    prompt: str | Messages,
    completion: str | Messages,
    tokenizer: Any,
    key: str = "chosen",
    *,
    rendering: Rendering | None = None,
    args: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
) -> Rendered:
    """Render prompt and completion, by the tokenizer's chat template if they are messages.

    The loss reads assistant turns only, each up to the end-of-turn token after its content; what the template writes
    after that token is never generated. The beginning and end of a turn are found by rendering the conversation up to
    it, so the template needs no generation tags; each such rendering must be a prefix of the full one up to that token.

    Args:
        prompt, completion: of a `PairRow`; a prompt that ends with an assistant turn is the beginning of the answer.
        tokenizer: one of transformers'.
        key: for error lines.
        rendering: arguments of the template; args: the example's own arguments.
        structure: of the tokenizer, if known.
    Raises: RowProblem when the template refuses the example, changes earlier turns or drops content of the completion;
        DataError when there is no template.
    """
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        ended = structure is not None and bool(structure.final_end_token(completion))
        span = (len(prompt), len(prompt) + len(completion))
        return Rendered(prompt + completion, (span,), ended, notes=structure.text_notes(prompt) if structure else ())
    assert isinstance(completion, list)
    rendering = rendering or Rendering()
    structure = structure or Structure(tokenizer, rendering)

    def text(messages: Messages, **how: bool) -> str:
        return rendering.render(tokenizer, messages, args, key=key, **how)

    messages, first = [*prompt, *completion], len(prompt)
    opened = bool(prompt) and prompt[-1]["role"] == "assistant"
    if opened:
        content = f"{prompt[-1].get('content') or ''}{completion[0].get('content') or ''}"
        messages, first = [*prompt[:-1], {**completion[0], "content": content}, *completion[1:]], first - 1
    whole = text(messages)
    spans: list[tuple[int, int]] = []
    notes = ["the chat template writes an answer more than once"] * structure.template_tokens.repeats
    notes += [f"the chat template does not read the example's '{name}'" for name in unread_args(tokenizer, args)]
    terminated = False
    for i in range(first, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        if i == first:
            before = prompt_text(prompt, tokenizer, rendering, args, key)
            notes += ["the chat template omits the content of a prompt turn"] * _vanished(prompt, before)
        else:
            before = text(messages[:i], generation_prompt=True)
        after = whole if i == len(messages) - 1 else text(messages[: i + 1])
        if not whole.startswith(before):
            raise _rewritten(key, "prompt", i)
        if len(after) <= len(before):
            raise RowProblem("empty completion", key, "the chat template renders nothing", "a non-empty completion")
        content_end, closing = _closing(after, len(before), structure)
        begin = 0 if i == first and opened else len(before)
        lost = _lost(messages[i], after, begin, content_end)
        if lost is not None:
            raise _dropped(key, i, lost, tokenizer, args)
        notes += _unread(messages[i], after[:content_end])
        if whole[: content_end + len(closing)] != after[: content_end + len(closing)]:
            # Some templates end the last turn differently from earlier ones.
            closing = structure.next_special(whole, content_end)
            if not closing or whole[:content_end] != after[:content_end]:
                raise _rewritten(key, "beginning", i)
        terminated = bool(closing)
        spans.append((len(before), content_end + len(closing)))
    return Rendered(whole[: spans[-1][1]], tuple(spans), terminated, True, tuple(dict.fromkeys(notes)))


def prompt_text(
    prompt: Messages,
    tokenizer: Any,
    rendering: Rendering | None = None,
    args: Mapping[str, Any] | None = None,
    key: str = "prompt",
) -> str:
    """Render the messages of a prompt with the generation prompt; a final assistant turn is left open instead.

    Raises: RowProblem when the template refuses them; DataError when there is no template.
    """
    opened = bool(prompt) and prompt[-1]["role"] == "assistant"
    how = {"continued": True} if opened else {"generation_prompt": True}
    return (rendering or Rendering()).render(tokenizer, prompt, args, key=key, **how)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a message, or in an argument of a template."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name != "role":
                yield from texts_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from texts_in(part)


def _closing(after: str, begin: int, structure: Structure) -> tuple[int, str]:
    """(begin of the last turn's end-of-turn token, that token) in a rendering that ends with this turn.

    The first of the template's usual token after the beginning of the turn; else the special token that ends the
    rendering; else "" at its end.
    """
    end = structure.template_tokens.end
    at = after.find(end, begin) if end else -1
    if at >= 0:
        return at, end
    bare = after.rstrip()
    last = structure.last_special(bare, begin)
    return (len(bare) - len(last), last) if last else (len(after), "")


def _rewritten(key: str, name: str, turn: int) -> RowProblem:
    return RowProblem(
        "template rewrites the prompt",
        key,
        f"the chat template renders the {name} of turn {turn + 1} differently when more turns follow",
        "a template that renders a prompt as a prefix of the conversation",
        "use another one: --data.chat_template FILE",
    )


# Omitted content ------------------------------------------------------------------------------------------------------


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds(text: str, content: str) -> bool:
    """Whether a rendering contains a content, ignoring white space."""
    if content in text or _squeezed(content) in _squeezed(text):
        return True
    return _squeezed(json.dumps(content, ensure_ascii=False)[1:-1]) in _squeezed(text)


def _lost(message: Mapping[str, Any], after: str, begin: int, end: int) -> str | None:
    """Content of an assistant turn that is not in its rendering, or None."""
    content = message.get("content")
    content = content.strip() if isinstance(content, str) else ""
    # The prompt may have opened the turn with the first characters of the content, such as <think>.
    parts = (after[begin:end], after[max(begin - len(content) + 1, 0) : end])
    if content and not any(_holds(part, content) for part in parts):
        return content
    for call in message.get("tool_calls") or ():
        name = (call.get("function") or call).get("name") if isinstance(call, Mapping) else None
        if isinstance(name, str) and name not in after[begin:end]:
            return name
    return None


def _vanished(prompt: Messages, before: str) -> bool:
    contents = (turn["content"].strip() for turn in prompt if isinstance(turn.get("content"), str))
    return not all(_holds(before, content) for content in contents)


def _unread(message: Mapping[str, Any], rendered: str) -> Iterator[str]:
    for name in REASONING:
        value = message.get(name)
        if isinstance(value, str) and value.strip() and not _holds(rendered, value.strip()):
            yield f"the chat template omits '{name}' of an answer"


_CUTS = re.compile(
    r"[\w.\[\]'\"]+\s*\.\s*(?:r?split|replace|r?partition|removeprefix|removesuffix)"
    r"\((?:[^()'\"]|'[^']*'|\"[^\"]*\")*\)(?:\s*\[[^\]]*\])?"
    r"|\w[\w.\[\]'\"]*\[\s*-?\d*\s*:\s*-?\d*\s*\]"
    r"|\|\s*(?:truncate|replace|striptags|first|last|regex_replace)\b(?:\([^)]*\))?"
)


def _dropped(key: str, turn: int, lost: str, tokenizer: Any, args: Mapping[str, Any] | None) -> RowProblem:
    """The error for a turn whose content is not fully rendered, with the line of the template that may be the cause."""
    source = tokenizer.get_chat_template(None, (args or {}).get("tools"))
    cuts = [(n, cut[0]) for n, line in enumerate(source.splitlines(), 1) for cut in _CUTS.finditer(line)]

    def matches(cut: str) -> bool:
        """Whether it cuts at a text that the lost content contains."""
        return any(part in lost for pair in re.findall(r"'([^']+)'|\"([^\"]+)\"", cut) for part in pair if part.strip())

    mine = next((cut for cut in cuts if matches(cut[1])), next(iter(cuts), None))
    line = "" if mine is None else f"; see line {mine[0]} of the template: {mine[1]}"
    return RowProblem(
        "template drops content",
        key,
        f"the chat template omits '{_short(lost)}' of turn {turn + 1}{line}",
        "all of the content in the rendered turn",
        f"use another one: --data.chat_template FILE; or {DROP}",
    )


def _short(text: str, most: int = 40) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 4] + " ..."
