"""A world that takes thought: the last digit of a sum, which a small policy finds by running sums and not at once.

A prompt is six digits, a thought their running sums modulo 10, a response any number of filler words and one digit. The
policy knows how to think, but slips; without a thought it has to guess. The judge sees the response alone, so
whatever thoughts get better at is learned from answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefopt import thoughts
from prefopt.errors import ConfigError, RoundError
from prefopt.testbed.world import World, WorldSettings
from prefopt.thoughts import Answer
from prefopt.training.models import evaluation_mode
from prefopt.types import Judgement, Question

DIGITS = tuple("0123456789")
THINK, MARKER, FILLER = "think", "<R>", "well"
MOST_FILLERS = 8  # of a response; the base policy writes up to half as many
BATCH = 64  # prompts with the thought prompt, and as many without, per step of the base policy's training
SAMPLED, SUMMED = 1024, 256  # held-out prompts that are answered, and those whose answers are summed over
_HELD_OUT = 2**33  # the seed of their list, beyond those of rounds


@dataclass(frozen=True)
class ScratchpadSettings(WorldSettings):
    """What makes one scratchpad world; another value of any field is another world with its own base policy."""

    hidden: int = 64
    """Width of the base policy."""
    base_steps: int = 350
    """Optimizer steps of the base policy's maximum-likelihood training."""
    digits: int = 6
    """Digits of a prompt, and steps of a thought."""
    slip: float = 0.2
    """Fraction of the steps in the base policy's data with a random digit; the next step continues from it."""


def running_sums(digits: Sequence[int]) -> list[int]:
    """Of the digits, modulo 10: the last one is the answer."""
    return [int(total) % 10 for total in np.cumsum(digits)]


def is_right(digits: Sequence[int], response: str) -> bool:
    """Whether a response is up to 8 fillers and then one digit, the right one."""
    *fillers, last = response.split() or [""]
    return len(fillers) <= MOST_FILLERS and {*fillers} <= {FILLER} and last == str(running_sums(digits)[-1])


def chain_share(digits: Sequence[int], thought: str) -> float:
    """Share of the running sums that a thought has right, each in its place; what is too much counts as wrong."""
    words, sums = thought.split(), [str(total) for total in running_sums(digits)]
    right = sum(word == total for word, total in zip(words, sums, strict=False))
    return right / max(len(words), len(sums))


class Scratchpad(World):
    """One scratchpad world: its base policy, its judge, and how often a policy is right.

    Args:
        settings: which world.
        cache_dir: folder of the cached base policies; None is the user's cache directory.
    Raises: ConfigError for settings of which no world can be made.
    """

    name = "scratchpad"

    def __init__(self, settings: ScratchpadSettings | None = None, cache_dir: Path | str | None = None) -> None:
        settings = settings or ScratchpadSettings()
        if not 2 <= settings.digits <= 16:
            raise ConfigError(f"digits: found {settings.digits!r}, expected 2 to 16")
        if not 0 <= settings.slip <= 1:
            raise ConfigError(f"slip: found {settings.slip!r}, expected a fraction from 0 to 1")
        super().__init__(settings, cache_dir, (*DIGITS, THINK, MARKER, FILLER))
        self.digits, self.slip = settings.digits, settings.slip
        self.max_tokens = settings.digits + MOST_FILLERS + 6  # thought, marker, response, end, and 3 to spare
        self.format = thoughts.read_format(self.name, key="testbed.world")
        self._zero, self._marker, self._filler = (self.vocabulary.index(word) for word in ("0", MARKER, FILLER))

    # ---------------------------------------------------------------------------------------------- base policy

    def _model_config(self, **other: Any) -> LlamaConfig:
        # four heads, and rotations that differ within 20 tokens: with the usual ones adding is learned twice as slowly
        turns = {"rope_type": "default", "rope_theta": 100.0}
        return super()._model_config(num_attention_heads=4, num_key_value_heads=4, rope_parameters=turns, **other)

    def _fit(self, model: LlamaForCausalLM) -> None:
        """Maximum likelihood on what a sloppy writer answers, half of it with the thought prompt and half without.

        Either answer is the last sum of a chain with slips in it. The first 40% of the steps have none: adding is
        learned sooner from chains that are right. Thoughts and responses count alike, though thoughts are longer: else
        some seeds do not learn to copy the last sum.
        """
        steps, generator = self.settings.base_steps, torch.Generator().manual_seed(self.settings.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
            loss = torch.zeros(())
            for thinks in (True, False):
                rows, asked = self._rows(BATCH, thinks, self.slip if step >= 0.4 * steps else 0.0, generator)
                logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, asked - 1 :].transpose(1, 2)
                labels, cut = rows[:, asked:], self.digits + 1  # the marker belongs to the thought
                for part in (slice(0, cut), slice(cut, None)) if thinks else (slice(None),):
                    loss = loss + torch.nn.functional.cross_entropy(
                        logits[..., part], labels[:, part], ignore_index=self._pad
                    )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def _rows(self, n: int, thinks: bool, slip: float, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """What a sloppy writer answers to random prompts: rows of tokens, padded at the end, and where they answer."""

        def draw(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator)

        digits, noise = draw(10, n, self.digits), draw(10, n, self.digits)
        slips = torch.rand(n, self.digits, generator=generator) < slip
        total, chain = torch.zeros(n, dtype=torch.int64), []
        for i in range(self.digits):
            total = torch.where(slips[:, i], noise[:, i], (total + digits[:, i]) % 10)
            chain.append(total)
        most = MOST_FILLERS // 2
        fillers, place = draw(most + 1, n)[:, None], torch.arange(most + 2)
        response = torch.where(place < fillers, self._filler, self._pad)
        response = torch.where(place == fillers, self._zero + total[:, None], response)
        response = torch.where(place == fillers + 1, self._eos, response)
        prompt = self._prompt_ids(digits, thinks)
        thought = [self._zero + torch.stack(chain, 1), torch.full((n, 1), self._marker)] if thinks else []
        return torch.cat([prompt, *thought, response], 1), prompt.shape[1]

    def _prompt_ids(self, digits: torch.Tensor, thinks: bool) -> torch.Tensor:
        """Tokens of prompts from their digits, `(n, digits)`."""
        head = [self._bos, self.vocabulary.index(THINK)] if thinks else [self._bos]
        return torch.cat([torch.tensor([head]).expand(len(digits), -1), self._zero + digits], 1)

    # -------------------------------------------------------------------------------------------- how good a policy is

    @functools.cached_property
    def held_out(self) -> torch.Tensor:
        """Digits of the prompts that policies are measured on, the same for every policy, `(1024, digits)`."""
        return torch.from_numpy(self._digits(SAMPLED, _HELD_OUT))

    def evaluate(self, lm: torch.nn.Module, beta: float) -> dict[str, float]:
        """How often a causal LM over this world's tokenizer is right, with a thought and without.

        Answers with a thought are sampled, one answer to each of 1,024 prompts at temperature 1 from the same
        random numbers each time: its standard error is at most 0.016. Answers without one are summed exactly over all
        right responses to 256 of the prompts.

        Args: lm: its modes are left as they were found. beta: not read, what is right does not depend on it.
        Returns: `exact/...` -> fraction. `accuracy`: asked with this world's thought prompt, the response is right;
            `parsed`: there is a response; `chain`: of the running sums before the marker those that are right;
            `accuracy_direct`: asked without the thought prompt; `accuracy_no_thought`: asked with it, and the marker
            put in the place of a thought.
        """
        digits = self.held_out
        with evaluation_mode(lm):
            texts = self._sample(lm, self._prompt_ids(digits, thinks=True))
            few = digits[:SUMMED]
            asked, marker = self._prompt_ids(few, thinks=True), torch.full((len(few), 1), self._marker)
            direct = self.right_probability(lm, self._prompt_ids(few, thinks=False), few)
            forced = self.right_probability(lm, torch.cat([asked, marker], 1), few)
        numbers, answers = digits.tolist(), [self.format.parse(text) for text in texts]
        right = [isinstance(a, Answer) and is_right(d, a.response) for d, a in zip(numbers, answers, strict=True)]
        chain = [chain_share(d, text.partition(MARKER)[0]) for d, text in zip(numbers, texts, strict=True)]
        return {
            "exact/accuracy": float(np.mean(right)),
            "exact/accuracy_direct": float(direct.mean()),
            "exact/accuracy_no_thought": float(forced.mean()),
            "exact/parsed": float(np.mean([isinstance(answer, Answer) for answer in answers])),
            "exact/chain": float(np.mean(chain)),
        }

    def right_probability(self, lm: torch.nn.Module, prompts: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        """Probability of a right response and its end after these tokens: a sum over 0 to 8 fillers before the digit.

        Args: prompts: tokens `(n, width)`. digits: `(n, digits)`.
        Returns: `(n,)` float64 on the CPU.
        """
        (n, width), kinds = prompts.shape, MOST_FILLERS + 1
        right = self._zero + digits.sum(1, keepdim=True) % 10  # (n, 1)
        place = torch.arange(kinds)
        # one row per number of fillers; what stands after the digit is read by nothing that counts
        tails = torch.where(place == place[:, None], right[:, :, None], self._filler)  # (n, kinds, kinds)
        rows = torch.cat([prompts[:, None].expand(-1, kinds, -1), tails], 2).flatten(0, 1)
        device = next(lm.parameters()).device
        logits = lm(input_ids=rows.to(device), use_cache=False).logits[:, width - 1 :]
        logps = logits.cpu().double().log_softmax(-1).view(n, kinds, kinds + 1, -1)
        each = logps[:, :, :-1].gather(-1, tails[..., None])[..., 0]  # (n, kinds, kinds), of each word of the tail
        written = torch.where(place <= place[:, None], each, 0.0).sum(-1)
        ends = logps[:, place, place + 1, self._eos]
        return (written + ends).exp().sum(-1)

    def _sample(self, lm: torch.nn.Module, prompts: torch.Tensor) -> list[str]:
        """One completion of each row of tokens at temperature 1, without its end, from the same draws each time."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        device = next(lm.parameters()).device
        out = lm(input_ids=prompts.to(device), use_cache=True)
        tokens: list[torch.Tensor] = []
        while True:
            probabilities = out.logits[:, -1].cpu().double().softmax(-1)
            tokens.append(torch.multinomial(probabilities, 1, generator=generator))
            ended = (torch.cat(tokens, 1) == self._eos).any(1)
            if len(tokens) == self.max_tokens or bool(ended.all()):
                break
            out = lm(input_ids=tokens[-1].to(device), past_key_values=out.past_key_values, use_cache=True)
        texts = []
        for row in torch.cat(tokens, 1).tolist():
            end = row.index(self._eos) if self._eos in row else len(row)
            texts.append(" ".join(self.vocabulary[token] for token in row[:end]))
        return texts

    # ---------------------------------------------------------------------------------------------- rounds

    def _digits(self, n: int, seed: int) -> np.ndarray:
        return np.random.default_rng([2, seed]).integers(10, size=(n, self.digits))

    def _texts(self, n: int, seed: int) -> list[str]:
        """Random digits: of a million prompts each is as likely, so one of another seed's is hardly met again."""
        return [" ".join(map(str, row)) for row in self._digits(n, seed).tolist()]

    def judge(self) -> ScratchpadJudge:
        """Who can add."""
        return ScratchpadJudge(self)


class ScratchpadJudge:
    """Scores responses: 1 for a right one, 0 for any other.

    A text that still holds a thought, because a method does not remove it, is graded as a whole: the fraction of the
    running sums that it has right, and 1 more for a right response. That is for experiments on what it would be worth
    to let a judge see thoughts.
    """

    def __init__(self, world: Scratchpad) -> None:
        self._world = world

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement per question. Raises: RoundError for a prompt that is none of the world's."""
        out = []
        for question in questions:
            digits = self._digits_of(question.prompt)
            out.append(Judgement(scores=tuple(score(digits, response.text) for response in question.responses)))
        return out

    def describe(self) -> dict[str, Any]:
        """What decides its judgements: the world."""
        return {"kind": "world", "world": self._world.name, **asdict(self._world.settings)}

    def close(self) -> None:
        """Nothing is held open."""

    def _digits_of(self, prompt: Any) -> list[int]:
        words = prompt.split() if isinstance(prompt, str) else []
        if len(words) != self._world.digits or not {*words} <= {*DIGITS}:
            raise RoundError(
                f"judge.kind world: found prompt {prompt!r}, expected {self._world.digits} digits, such as "
                f"'{' '.join(DIGITS[: self._world.digits])}'"
            )
        return [int(word) for word in words]


def score(digits: Sequence[int], text: str) -> float:
    """The score of the world's judge for a response, or of a text with its thought, see `ScratchpadJudge`."""
    thought, marker, response = text.partition(MARKER)
    if not marker:
        return float(is_right(digits, text))
    return chain_share(digits, thought) + is_right(digits, response)
