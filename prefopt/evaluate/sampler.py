"""Samples of a policy in training on held-out prompts, beside those of its reference: a table, and figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from prefopt.data.structure import added_bos
from prefopt.errors import ConfigError
from prefopt.evaluate.samples import score_within
from prefopt.evaluate.texts import ORDERS, describe_texts
from prefopt.generation.base import Sampling, seeds_of
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.rounds_method import in_rounds
from prefopt.settings import RunConfig
from prefopt.thoughts import Answer, ThoughtFormat
from prefopt.training.forward import PolicyWithReference
from prefopt.training.metrics import Evaluation
from prefopt.types import Completion, EncodedPair, Prompt, Response

TABLE = "samples"
_PRINTED = 3  # samples that are printed
_HALF = "\ufffd"  # what is left of a character that a limit on tokens has cut in two
_WIDTH = 100  # characters of each of their lines


@dataclass
class Sampler:
    """An evaluator that samples from the policy in training, in this process.

    The seeds are the same at each evaluation, so that tables compare. The reference answers once, unless it moves.

    Args:
        prompts: `prompt` being the text of the tokens that the policy reads.
        config: of the run.
        policy: what is trained, not wrapped; it knows its reference.
        tokenizer: the one of its vocabulary.
        precision: in which it is trained.
        agree: makes all ranks continue with the tokens of rank 0, where they answer together.
    """

    prompts: Sequence[Prompt]
    config: RunConfig
    policy: PolicyWithReference
    tokenizer: Any
    precision: Callable[[], AbstractContextManager[Any]]
    agree: Callable[[list[int]], list[int]] | None = None
    inside: ClassVar[bool] = True  # where the weights are sharded all processes call it, inside the policy's forward
    _of_reference: list[Completion] | None = field(default=None, init=False)

    def __call__(self, lm: Any) -> Evaluation:
        method, reference = self.config.method, self.policy.frozen or self.policy.reference
        moves = self.config.reference.sync_every is not None
        if reference is not None and (moves or self._of_reference is None):
            with self.policy.as_reference() as other:
                self._of_reference = self._answers(other)
        answers = self._answers(lm)
        with self.precision():
            samples = list(zip(self.prompts, answers, strict=True))
            found = score_within(self.policy, samples, batch=self.config.eval.batch)
        texts = describe_texts([[completion] for completion in answers])
        figures = {"tokens": texts.tokens, "ended": 1 - texts.cut}
        if found.tokens.sum() > 0:
            figures["entropy"] = float(found.entropy.sum() / found.tokens.sum())
        if reference is not None:
            figures["kl"] = float(found.kl.mean())
        figures |= {f"distinct_{n}": value for n, value in zip(ORDERS, texts.distinct, strict=True)}
        figures |= dict(in_rounds(method).text_figures([completion.text for completion in answers]))
        rows = [self._row(i, answers[i], None if reference is None else found.kl) for i in range(len(answers))]
        return Evaluation(
            figures={f"samples/{name}": value for name, value in figures.items() if math.isfinite(value)},
            tables={TABLE: rows},
            shown=_shown(rows),
        )

    def _answers(self, lm: Any) -> list[Completion]:
        engine = TransformersEngine(lm, self.tokenizer, batch=self.config.generate.batch, agree=self.agree)
        sampling = Sampling.of(self.config.generate, n=1, logprobs=False)
        seeds = [seeds_of(self.config.seed, TABLE, i, 1, 1)[0] for i in range(len(self.prompts))]  # however many
        with self.precision():
            return [one for (one,) in engine.generate([prompt.ids for prompt in self.prompts], sampling, seeds)]

    def _row(self, i: int, answer: Completion, kl: np.ndarray | None) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self.prompts[i].prompt}
        sides = {"policy": answer}
        if self._of_reference is not None:
            sides = {"reference": self._of_reference[i], **sides}
        thoughts: dict[str, Any] = {}
        for side, completion in sides.items():
            text = completion.text if completion.finish_reason == "stop" else completion.text.rstrip(_HALF)
            row[side], thoughts[f"{side}_thought"] = self._seen(text)
        row |= thoughts if in_rounds(self.config.method).thinks else {}
        row |= {"tokens": len(answer.token_ids), "ended": answer.finish_reason == "stop"}
        row |= {} if kl is None else {"kl": float(kl[i])}
        row["prompt_ids"] = list(self.prompts[i].ids)
        return row | {f"{side}_ids": list(completion.token_ids) for side, completion in sides.items()}

    def _seen(self, text: str) -> tuple[str, str]:
        """The response as rounds show it, and the thought before it; where there is no response, why, and all of it."""
        method = in_rounds(self.config.method)
        view = method.judge_view(text)
        if not isinstance(view, Response):
            return f"[{view}]", text
        form = method.card().get("thought")
        answer = None if form is None else ThoughtFormat(**form).parse(text)
        return view.text, answer.thought if isinstance(answer, Answer) else ""


def sampler(
    config: RunConfig,
    policy: PolicyWithReference,
    tokenizer: Any,
    pairs: Sequence[EncodedPair],
    precision: Callable[[], AbstractContextManager[Any]],
    agree: Callable[[list[int]], list[int]] | None = None,
) -> Sampler:
    """The evaluator of a run with `eval.generate`: it answers the first distinct prompts of the held-out pairs.

    Args: see `Sampler`.
    Raises: ConfigError when nothing is held out.
    """
    prompts: dict[Any, Prompt] = {}
    bos = added_bos(tokenizer)  # one that the chat template writes, such as a turn's first token, is shown
    for pair in pairs:
        if len(prompts) == config.eval.generate:
            break
        ids = tuple(pair.prompt_ids)
        key = pair.prompt_key or ids
        if key not in prompts:
            read = ids[1:] if bos is not None and ids[:1] == (bos,) else ids
            text = tokenizer.decode(list(read), clean_up_tokenization_spaces=False)
            prompts[key] = Prompt(text.lstrip(_HALF), ids, pair.prompt_key, pair.where)
    if not prompts:
        raise ConfigError(
            f"eval.generate: found {config.eval.generate}, but no pair is held out; name data.eval, or a larger "
            "data.eval_fraction"
        )
    return Sampler([*prompts.values()], config, policy, tokenizer, precision, agree)


def _shown(rows: Sequence[dict[str, Any]]) -> str:
    """The first rows, for a terminal."""
    lines = [f"{len(rows)} held-out prompts answered" + (f", the first {_PRINTED}" if len(rows) > _PRINTED else "")]
    for row in rows[:_PRINTED]:
        texts = {name: row[name] for name in ("prompt", "reference", "policy") if name in row}
        lines += [f"  {name:<10}{_short(text, tail=name == 'prompt')}" for name, text in texts.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


def _short(text: str, tail: bool) -> str:
    """One line of a text; too long a text is right-truncated, or left-truncated where `tail` asks for its end."""
    line = " ".join(text.split())
    if tail and len(line) > _WIDTH:
        return "... " + line[-(_WIDTH - 4) :]
    return textwrap.shorten(line, _WIDTH, placeholder=" ...") if " " in line else line[:_WIDTH]
