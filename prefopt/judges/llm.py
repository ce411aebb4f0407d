"""A language model that is prompted for a verdict: on a server with OpenAI's interface, or the policy itself.

It is prompted from a template, and its answer is parsed for a verdict (`[[A]]`, `[[B]]` or `[[C]]`) or a
number (`[[7]]`). A server's answers are cached on disk, so no question is sent twice.
"""

from __future__ import annotations

import enum
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from prefopt import placeholders, storage
from prefopt.data.comparison import plain_text
from prefopt.data.encoder import Encoder
from prefopt.data.rows import RowProblem
from prefopt.errors import ConfigError, RoundError
from prefopt.generation.base import Sampling
from prefopt.generation.server import Server, TimedOut, TooLong, UnreadableAnswer, check_server, read
from prefopt.judges.base import Judge, JudgeContext, JudgeKind
from prefopt.settings import JudgeConfig
from prefopt.storage import Damaged, read_sealed, text_hash, text_number, write_sealed
from prefopt.testbed.cache import cache_root
from prefopt.types import Judgement, Question

if TYPE_CHECKING:
    from prefopt.generation.base import Engine

POLICY = "policy"
_SERVER = ("url", "model", "api_key_env", "concurrency", "retries", "timeout")  # settings that only a server reads
_TEMPLATES = Path(__file__).parent / "templates"
_REQUIRED = {"pairwise": {"prompt", "response_a", "response_b"}, "score": {"prompt", "response"}}
_ALLOWED = {"pairwise": _REQUIRED["pairwise"], "score": _REQUIRED["score"] | {"low", "high"}}
_BRACKETS = re.compile(r"\[\[([^\[\]]+)\]\]")
_VALUE = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the response that stands first
_SEEDS = 2**31


def read_template(settings: JudgeConfig) -> str:
    """The text of the question. Raises: ConfigError for a file that cannot be read, or has not the marks it needs."""
    path = Path(settings.template) if settings.template else _TEMPLATES / f"{settings.mode}.txt"
    try:
        text = storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigError(f"judge.template: '{path}': {reason}") from error
    allowed = _ALLOWED[settings.mode]
    what = placeholders.problem(text, _REQUIRED[settings.mode], allowed)
    if what is not None:
        raise ConfigError(
            f"judge.template: '{path}' {what}, expected {placeholders.listed(allowed)} in mode {settings.mode}"
        )
    return text


def verdict_of(answer: str) -> float | None:
    """1 if the first response is better, 0 if the second one is, 1/2 for a tie; None without one and only verdict."""
    found = {text.strip().upper() for text in _BRACKETS.findall(answer)} & _VALUE.keys()
    return _VALUE[found.pop()] if len(found) == 1 else None


def score_of(answer: str, scale: Sequence[float]) -> float | None:
    """The number in the answer, if there is exactly one in brackets and it lies on the scale."""
    found = set()
    for text in _BRACKETS.findall(answer):
        try:
            found.add(float(text))
        except ValueError:
            continue
    score = found.pop() if len(found) == 1 else math.nan
    return score if scale[0] <= score <= scale[1] else None


class Lost(enum.Enum):
    """Why there is no answer to a question."""

    TIMEOUT = "timeout"
    TOO_LONG = "too_long"
    UNREADABLE = "unreadable"


class Asked(Protocol):
    """The model that answers the questions."""

    def answers(self, texts: Sequence[str]) -> list[str | Lost]:
        """The answer to each text. Raises: RoundError when there are none."""

    def describe(self) -> dict[str, Any]:
        """What decides its answers."""

    def close(self) -> None:
        """Free what it holds."""


class LLMJudge(JudgeKind):
    """Asks a language model for verdicts on two responses, each two in both orders, or for a score of each.

    A verdict for the same place in both orders is a `contradiction`, and a tie. Without a verdict in both orders, or
    without a score on the scale, nothing is known: that is NaN, and counted as `unparsed`, or as why there is no answer
    (see `Lost`).

    Args:
        settings: mode, template and scale.
        asked: the model.
    """

    reads: ClassVar[tuple[str, ...]] = (
        *("path", "mode", "scale", "reward_scale", "template", "temperature", "max_tokens"),
        *("url", "model", "api_key_env", "concurrency", "retries", "timeout"),
    )
    verdicts: ClassVar[tuple[str, ...]] = ("pairwise",)

    @classmethod
    def check(cls, settings: JudgeConfig) -> None:
        """See `JudgeKind`."""
        if settings.path == POLICY:
            for name in _SERVER:
                given = getattr(settings, name)
                if given != getattr(JudgeConfig(), name):
                    raise ConfigError(
                        f"judge.{name}: found {given!r}, which judge '{settings.kind} with judge.path policy' does not "
                        f"read; it belongs to {settings.kind} with judge.url"
                    )
        found = ", ".join(f"{number:g}" for number in settings.scale)
        if settings.mode != "score" and settings.scale != JudgeConfig().scale:
            raise ConfigError(
                f"judge.scale: found {found}, which mode '{settings.mode}' does not read (--judge.mode score)"
            )
        if len(settings.scale) != 2 or not settings.scale[0] < settings.scale[1] < math.inf:
            raise ConfigError(
                f"judge.scale: found {found or 'nothing'}, expected the lowest and the highest score: 1,10"
            )
        read_template(settings)
        if settings.path is None:
            check_server(settings.url, "judge")
        elif settings.path != POLICY:
            raise ConfigError(
                f"judge.path: found '{settings.path}', expected '{POLICY}' or none: another language model is asked "
                "through a server (--judge.url)"
            )

    @classmethod
    def open(cls, settings: JudgeConfig, context: JudgeContext) -> Judge:
        """See `JudgeKind`."""
        if settings.path != POLICY:
            return cls(settings, Chat(settings, context.cache or cache_root() / "judge"))
        assert context.policy is not None, "a judge that is the policy needs the policy"
        return cls(settings, PolicyJudge(*context.policy(), settings))

    def __init__(self, settings: JudgeConfig, asked: Asked) -> None:
        self.mode, self.scale, self.asked = settings.mode, settings.scale, asked
        self.template = read_template(settings)

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        return self._scores(questions) if self.mode == "score" else self._verdicts(questions)

    def _ask(self, texts: Sequence[str]) -> list[str | Lost]:
        """The answer to each, each text asked once."""
        distinct = list(dict.fromkeys(texts))
        answers = dict(zip(distinct, self.asked.answers(distinct), strict=True)) if distinct else {}
        return [answers[text] for text in texts]

    def _scores(self, questions: Sequence[Question]) -> list[Judgement]:
        low, high = (f"{number:g}" for number in self.scale)
        texts = [
            placeholders.filled(self.template, prompt=plain_text(q.prompt), response=response.text, low=low, high=high)
            for q in questions
            for response in q.responses
        ]
        answers = iter(self._ask(texts))
        out = []
        for question in questions:
            problems: Counter[str] = Counter()
            scores = []
            for _ in question.responses:
                answer = next(answers)
                score = None if isinstance(answer, Lost) else score_of(answer, self.scale)
                if score is None:
                    problems[answer.value if isinstance(answer, Lost) else "unparsed"] += 1
                scores.append(math.nan if score is None else score)
            out.append(Judgement(scores=tuple(scores), problems=dict(problems)))
        return out

    def _verdicts(self, questions: Sequence[Question]) -> list[Judgement]:
        def text(question: Question, first: int, second: int) -> str:
            return placeholders.filled(
                self.template,
                prompt=plain_text(question.prompt),
                response_a=question.responses[first].text,
                response_b=question.responses[second].text,
            )

        places = [
            (n, i, j)
            for n, question in enumerate(questions)
            for i, j in combinations(range(len(question.responses)), 2)
            if question.responses[i].text != question.responses[j].text  # else neither is better
        ]
        found = self._ask([text(questions[n], *order) for n, i, j in places for order in ((i, j), (j, i))])
        tables = [[[0.5] * len(q.responses) for _ in q.responses] for q in questions]
        problems: list[Counter[str]] = [Counter() for _ in questions]
        for (n, i, j), answers in zip(places, zip(found[::2], found[1::2], strict=True), strict=True):
            first, second = (None if isinstance(answer, Lost) else verdict_of(answer) for answer in answers)
            for answer, verdict in zip(answers, (first, second), strict=True):
                if verdict is None:
                    problems[n][answer.value if isinstance(answer, Lost) else "unparsed"] += 1
            if first is None or second is None:
                won = math.nan
            else:
                won = (first + 1 - second) / 2
                problems[n]["contradiction"] += first == second != 0.5
            tables[n][i][j], tables[n][j][i] = won, 1 - won
        return [
            Judgement(probs=tuple(map(tuple, table)), problems={name: n for name, n in counts.items() if n})
            for table, counts in zip(tables, problems, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        digest = text_hash(self.template)[:16]
        scale = {"scale": list(self.scale)} if self.mode == "score" else {}
        return {"kind": "llm", "mode": self.mode, "template": digest, **scale, **self.asked.describe()}

    def close(self) -> None:
        """Free what answers."""
        self.asked.close()


class Chat:
    """A model on a server, with a cache of answers by address, model, sampling and messages. Empty ones are not cached.

    Args:
        settings: the server's address, and how it samples.
        cache: the folder for its answers.

    Raises: RoundError when the server cannot be reached, or serves no such model.
    """

    def __init__(self, settings: JudgeConfig, cache: Path) -> None:
        assert settings.url is not None
        self.server = Server(
            settings.url,
            group="judge",
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            retries=settings.retries,
            timeout=settings.timeout,
        )
        try:
            self.model = settings.model or self._only_model()
        except BaseException:
            self.close()
            raise
        self.sampling = {"temperature": settings.temperature, "max_tokens": settings.max_tokens, "seed": 0}
        self.cache = cache
        self._unreadable: UnreadableAnswer | None = None  # the last one

    def _only_model(self) -> str:
        served = [*self.server.models()]
        if len(served) != 1:
            raise RoundError(
                f"judge.model: found none, and {self.server.url} serves {', '.join(served) or 'nothing'}; name one"
            )
        return served[0]

    def answers(self, texts: Sequence[str]) -> list[str | Lost]:
        """See `Asked`. Answers before an error are in the cache."""
        answers = self.server.map(self._answer, texts)
        if texts and all(answer is Lost.UNREADABLE for answer in answers):
            assert self._unreadable is not None
            raise self._unreadable
        if texts and all(answer is Lost.TIMEOUT for answer in answers):
            raise RoundError(
                f"judge.timeout: {self.server.url} has answered none of {len(texts)} questions in time, expected a "
                "server that does (or a longer judge.timeout)"
            )
        return answers

    def _answer(self, text: str) -> str | Lost:
        messages: Any = [{"role": "user", "content": text}]
        key = json.dumps([self.server.url, self.model, self.sampling, messages], sort_keys=True)
        name = text_hash(key)
        file = self.cache / name[:2] / f"{name}.json"
        cached = _cached(file)
        if cached is not None:
            return cached
        settings: Any = self.sampling
        try:
            choices = self.server.ask(
                lambda client: [
                    read(choice.message.content, "a message's content", str, None) or ""
                    for choice in client.chat.completions.create(
                        model=self.model, messages=messages, **settings
                    ).choices
                ]
            )
        except TimedOut:
            return Lost.TIMEOUT
        except UnreadableAnswer as error:
            self._unreadable = error
            return Lost.UNREADABLE
        except TooLong:
            return Lost.TOO_LONG
        if not choices:
            raise RoundError(f"judge.url: {self.server.url} gave an answer without a choice, expected one")
        answer = choices[0]
        if not answer.strip():
            return answer
        write_sealed(file, {"of": name, "model": self.model, "messages": messages, "answer": answer})
        return answer

    def describe(self) -> dict[str, Any]:
        """See `Asked`."""
        return {"url": self.server.url, "model": self.model, **self.sampling}

    def close(self) -> None:
        """Let the connections go."""
        self.server.close()


def _cached(file: Path) -> str | None:
    """An answer that was given before. Raises: UnreadableAnswer."""
    try:
        cached = read_sealed(file)
    except Damaged:
        cached = {}
    if cached is not None and (cached.get("of") != file.stem or not isinstance(cached.get("answer"), str)):
        print(f"warning: {file}: was edited or damaged; the judge is asked again", file=sys.stderr, flush=True)
        return None
    return None if cached is None else str(cached["answer"])


class PolicyJudge:
    """A policy that is asked through its own chat template, or in plain text where it has none.

    A question that leaves it less than `max_tokens` positions is too long, one that its template refuses unreadable.

    Args: engine: of the policy. encoder: how it reads prompts. settings: how it samples.
    """

    def __init__(self, engine: Engine, encoder: Encoder, settings: JudgeConfig) -> None:
        self.engine, self.encoder = engine, encoder
        self.sampling = Sampling(n=1, temperature=settings.temperature, max_tokens=settings.max_tokens)

    def answers(self, texts: Sequence[str]) -> list[str | Lost]:
        """See `Asked`. The seed of an answer depends on its question alone."""
        read = [self._read(text) for text in texts]
        prompts = [ids for ids in read if not isinstance(ids, Lost)]
        seeds = [
            text_number(text, 4) % _SEEDS for text, ids in zip(texts, read, strict=True) if not isinstance(ids, Lost)
        ]
        answers = iter(self.engine.generate(prompts, self.sampling, seeds) if prompts else [])
        return [ids if isinstance(ids, Lost) else next(answers)[0].text for ids in read]

    def _read(self, text: str) -> list[int] | Lost:
        """The tokens of a question."""
        chat = getattr(self.encoder.tokenizer, "chat_template", None)
        try:
            ids = self.encoder.prompt([{"role": "user", "content": text}] if chat else text)
        except RowProblem:
            return Lost.UNREADABLE
        context = self.engine.context
        return ids if context is None or len(ids) + self.sampling.max_tokens <= context else Lost.TOO_LONG

    def describe(self) -> dict[str, Any]:
        """See `Asked`. The policy's weights are recorded by the round."""
        sampling = {"temperature": self.sampling.temperature, "max_tokens": self.sampling.max_tokens}
        return {"model": POLICY, **sampling, "engine": self.engine.describe()}

    def close(self) -> None:
        """Free the inference engine."""
        self.engine.close()
