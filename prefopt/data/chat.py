"""From a `PairRow` to text: where the prompt ends, which stretches of the text are scored. Knows templates, no ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefopt.data.rows import Messages, RowProblem
from prefopt.errors import DataError


@dataclass(frozen=True)
class Rendered:
    """One side of a row as text.

    `text` is the prompt and the completion. `spans` are the scored stretches as (begin, end) in characters; the first
    begins where the prompt ends and the last ends where the text ends. `terminated` says that the template has written
    its own terminator, so none must be added.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    terminated: bool

    @property
    def prompt(self) -> str:
        return self.text[: self.spans[0][0]]


def render(
    prompt: str | Messages,
    completion: str | Messages,
    tokenizer: Any,
    key: str = "chosen",
    *,
    ends: tuple[str, ...] | None = None,
) -> Rendered:
    """The text of one side, by the tokenizer's chat template where the row is made of messages.

    Only the assistant's turns are scored, each with its terminator. Where they begin and end is found by rendering the
    conversation up to them, so the template needs no generation marks; each such rendering must be a prefix of the
    whole.

    Args: prompt, completion: of a `PairRow`; tokenizer: one of transformers'; key: named in complaints;
        ends: what `end_tokens` gives, if it is at hand.
    Raises: RowProblem when the template refuses the row or rewrites what came before; DataError when there is no
    template.
    """
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        return Rendered(prompt + completion, ((len(prompt), len(prompt) + len(completion)),), terminated=False)
    assert isinstance(completion, list)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(NO_TEMPLATE)
    messages = prompt + completion
    whole = _apply(tokenizer, messages, key)
    ends = end_tokens(tokenizer) if ends is None else ends
    spans: list[tuple[int, int]] = []
    terminated = False
    for i in range(len(prompt), len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:i], key, add_generation_prompt=True)
        after = whole if i == len(messages) - 1 else _apply(tokenizer, messages[: i + 1], key)
        for part, name in ((before, "prompt"), (after, "beginning")):
            if not whole.startswith(part):
                raise RowProblem(
                    "template rewrites the prompt",
                    key,
                    f"the chat template renders the {name} of turn {i + 1} otherwise alone than in the whole",
                    "a template whose prompt is a prefix of the whole",
                    "use another one: --data.chat_template FILE",
                )
        # What a template writes after its terminator (a line break) is never generated, so it is never scored.
        bare = after.rstrip()
        terminated = len(bare) > len(before) and bare.endswith(ends)
        spans.append((len(before), len(bare) if terminated else len(after)))
    if any(end <= begin for begin, end in spans):
        raise RowProblem("empty completion", key, "the chat template renders nothing", "a non-empty completion")
    return Rendered(whole[: spans[-1][1]], tuple(spans), terminated)


def render_prompt(prompt: Messages, tokenizer: Any) -> str:
    """Chat messages as the text that an assistant's turn follows, by the tokenizer's chat template.

    Raises: RowProblem when the template refuses them; DataError when there is no template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(NO_TEMPLATE)
    return _apply(tokenizer, prompt, "prompt", add_generation_prompt=True)


NO_TEMPLATE = (
    "the rows are chat messages and the tokenizer has no chat template, expected one (--data.chat_template FILE)"
)


def _apply(tokenizer: Any, messages: Messages, key: str, *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of its own and raises what it likes
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RowProblem("template refuses the row", key, f"the chat template says: {line}", "a row it takes") from None


def end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that can be a terminator: every special token but those that mean something else."""
    added = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | {*tokenizer.all_special_tokens}
    others = {tokenizer.bos_token, tokenizer.unk_token} - {tokenizer.eos_token}
    return tuple(sorted(added - others))
