"""What worlds of words share: every response can be listed, so every sum over a policy's responses is exact.

A prompt is one word, a response a fixed number of words from a small list. Whatever else a model could write is one
further outcome, "outside", so that the outcomes of a prompt always have total probability one. A world adds what is
preferred to what. This room does not know the trainer: it hands out prompts, pairs and verdicts, and evaluates any
causal language model over its tokenizer.
"""

from __future__ import annotations

import abc
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import LlamaForCausalLM

from prefopt.data.loader import Shares
from prefopt.errors import DataError, RoundError
from prefopt.settings import ModelConfig
from prefopt.testbed import truth
from prefopt.testbed.world import World, WorldSettings, no_progress_bars
from prefopt.training import models
from prefopt.types import EncodedPair, Judgement, Question


class WordWorld(World):
    """A world of P prompts with K = words ** length responses each.

    Outcomes are numbered 0..K-1 in the order of `itertools.product(words, repeat=length)`; outcome K is "outside", all
    sequences that are none of the K. It takes part in every sum. Entropy and KL are those of the K + 1 outcomes:
    sequences inside "outside" are not distinguished, so they are lower bounds on the sequence values, exact as far as
    `exact/outside` is small.

    Args:
        settings: which world.
        cache_dir: folder of the cached base policies; None is the user's cache directory.
        base: what the base policy is trained on, log-probabilities up to a constant per prompt, (P, K).
    """

    goal: ClassVar[str]  # what `optimum` is called
    columns: ClassVar[Mapping[str, tuple[str, str]]]  # of a table of policies: title -> (measure, format)
    prompt_words: ClassVar[Sequence[str]]
    words: ClassVar[Sequence[str]]
    length: ClassVar[int]  # words per response

    def __init__(self, settings: WorldSettings, cache_dir: Path | str | None, base: np.ndarray) -> None:
        super().__init__(settings, cache_dir, (*self.prompt_words, *self.words))
        vocabulary = self.vocabulary
        self.base_target = torch.tensor(base).log_softmax(-1)  # (P, K), what the base policy is trained on
        self._first_word = vocabulary.index(self.words[0])
        self.prompt_ids = [[self._bos, vocabulary.index(prompt)] for prompt in self.prompt_words]
        self.response_texts = [" ".join(some) for some in itertools.product(self.words, repeat=self.length)]
        self.response_ids = [[*map(vocabulary.index, text.split()), self._eos] for text in self.response_texts]

    @functools.cached_property
    @abc.abstractmethod
    def preference(self) -> torch.Tensor:
        """P(row is preferred to column), of each prompt, (P, K + 1, K + 1) float64, one half on the diagonal."""

    @abc.abstractmethod
    def optimum(self, beta: float) -> torch.Tensor:
        """Log-probabilities of the policy that training is measured against, (P, K + 1)."""

    @abc.abstractmethod
    def measures(self, log_policy: torch.Tensor, beta: float) -> dict[str, float]:
        """Everything worth knowing about a policy, averaged over prompts; KL and entropy in nats.

        Args: log_policy: table (P, K + 1). beta: of the method in use, for worlds whose optimum depends on it.
        Returns: `exact/...` -> value.
        """

    @abc.abstractmethod
    def _judgement(self, prompt: int, outcomes: Sequence[int]) -> Judgement:
        """The exact verdict on these outcomes of a prompt."""

    # ---------------------------------------------------------------------------------------------- base policy

    def _fit(self, model: LlamaForCausalLM) -> None:
        """Maximum likelihood on `base_target`: its expectation exactly, but for the word that EOS follows, drawn."""
        steps, words, prompts = self.settings.base_steps, len(self.words), len(self.prompt_words)
        target = self.base_target.exp().float()  # (P, K)
        by_depth = [target]  # probability of each prefix of 0, 1, ... words
        for _ in range(self.length):
            by_depth.insert(0, by_depth[0].view(prompts, -1, words).sum(-1))
        generator = torch.Generator().manual_seed(self.settings.seed)
        # beta2 and eps are small so that the weights of tokens that never occur go on moving however small
        # their gradients become: mass outside the world then ends near 1e-5, not 1e-3
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.9), eps=1e-16, weight_decay=0.0)
        prefixes = torch.tensor([*itertools.product(range(words), repeat=self.length - 1)]) + self._first_word
        head = torch.cat(
            [
                torch.tensor(self.prompt_ids)[:, None, :].expand(-1, len(prefixes), -1),
                prefixes.expand(prompts, -1, -1),
            ],
            -1,
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
            last = torch.multinomial(target.reshape(-1, words), 1, generator=generator) + self._first_word
            rows = torch.cat([head, last.view(prompts, -1, 1)], -1).flatten(0, 1)
            logps = model(input_ids=rows, use_cache=False).logits[:, 1:].log_softmax(-1)  # (rows, 1 + length, V)
            likelihood = (by_depth[-2] * logps[:, -1, self._eos].view(prompts, -1)).sum()
            for depth, share in enumerate(by_depth[1:]):
                there = logps.view(prompts, words**depth, -1, *logps.shape[1:])[:, :, 0, depth]
                likelihood = likelihood + (share * there[..., self._first_word :].flatten(1)).sum()
            loss = -likelihood / prompts
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    # ---------------------------------------------------------------------------------------------- exact values

    @torch.no_grad()
    def log_probs(self, lm: torch.nn.Module) -> torch.Tensor:
        """Log-probability of each outcome under a causal LM, from one forward over the leaves of the prefix tree.

        A prefix's next-token distribution is read in the first leaf that passes through it. What falls off the tree is
        summed as such, not as 1 minus the rest, so it is right however small it is. The model's mode is restored.

        Args: lm: called as `lm(input_ids=..., use_cache=False)`, answers with `.logits`.
        Returns: float64 table on the CPU, (P, K + 1), "outside" last.
        """
        prompts, words, length = len(self.prompt_ids), len(self.words), self.length
        leaves = torch.tensor([p + r[:-1] for p in self.prompt_ids for r in self.response_ids])
        device = next(lm.parameters()).device
        with models.evaluation_mode(lm):
            logits = lm(input_ids=leaves.to(device), use_cache=False).logits[:, -1 - length :]
        logps = logits.cpu().double().log_softmax(-1)  # (P * K, length + 1, V)

        reach = torch.zeros(prompts, 1, dtype=torch.float64)  # log-probability of each prefix of `depth` words
        fallen = []
        for depth in range(1 + length):
            there = logps.view(prompts, words**depth, -1, *logps.shape[1:])[:, :, 0, depth]
            allowed = torch.zeros(len(self.vocabulary), dtype=torch.bool)
            allowed[slice(self._first_word, self._first_word + words) if depth < length else self._eos] = True
            fallen.append((reach + there[..., ~allowed].logsumexp(-1)).logsumexp(-1))
            reach = (reach[..., None] + there[..., allowed]).flatten(1)
        return torch.cat([reach, torch.stack(fallen).logsumexp(0)[:, None]], -1)

    @functools.cached_property
    def log_ref(self) -> torch.Tensor:
        """The base policy's log-probability of each outcome, (P, K + 1) float64: the reference of every truth here."""
        return self.log_probs_of(self.base_model_path)

    def log_probs_of(self, path: Path | str) -> torch.Tensor:
        """The same of a policy in a folder, such as a run's exported model."""
        with no_progress_bars():
            return self.log_probs(models.load_model(str(path), ModelConfig(), "testbed"))

    @functools.cached_property
    def win_prob(self) -> torch.Tensor:
        """Probability that each outcome is preferred to a draw from the reference, (P, K + 1)."""
        return truth.win_probability(self.log_ref, self.preference)

    def evaluate(self, lm: torch.nn.Module, beta: float) -> dict[str, float]:
        """The exact values of a causal LM over this world's tokenizer; see `measures`."""
        return self.measures(self.log_probs(lm), beta)

    # ---------------------------------------------------------------------------------------------- pairs

    @property
    def scores(self) -> torch.Tensor | None:
        """The reward of each outcome, (P, K + 1), in a world whose preferences come from one; else None."""
        return None

    @functools.cached_property
    def _sampling(self) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative reference probabilities of the K responses (P, K), and P(row is preferred to column)."""
        inside = self.log_ref[:, :-1].softmax(-1).numpy().cumsum(-1)
        return inside / inside[:, -1:], self.preference.numpy()

    def draw(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Preference pairs as numbers.

        The prompt is uniform; two responses are drawn from the reference within the world, both again until they
        differ; the first wins with the probability that it is preferred.

        Args: n: how many. rng: where the randomness comes from.
        Returns: prompt, chosen, rejected, and P(chosen > rejected), each `(n,)`.
        """
        cumulative, preference = self._sampling
        prompt, two = rng.integers(len(self.prompt_ids), size=n), np.zeros((n, 2), dtype=np.int64)
        todo = np.arange(n)
        while todo.size:
            points = rng.random((todo.size, 2))
            for x in range(len(self.prompt_ids)):
                mine = prompt[todo] == x
                two[todo[mine]] = np.searchsorted(cumulative[x], points[mine], side="right")
            todo = todo[two[todo, 0] == two[todo, 1]]
        first_wins = preference[prompt, two[:, 0], two[:, 1]]
        won = rng.random(n) < first_wins
        chosen, rejected = np.where(won, two[:, 0], two[:, 1]), np.where(won, two[:, 1], two[:, 0])
        return prompt, chosen, rejected, np.where(won, first_wins, 1 - first_wins)

    def encoded(self, n: int, seed: list[int], where: str) -> list[EncodedPair]:
        """`n` drawn pairs as token ids, with their columns; `where` names them together with their number."""
        prompt, chosen, rejected, probability = self.draw(n, np.random.default_rng(seed))
        win, mask = self.win_prob.numpy(), [True] * (self.length + 1)
        columns = {
            "chosen_win_prob": win[prompt, chosen],
            "rejected_win_prob": win[prompt, rejected],
            "pair_win_prob": probability,
        }
        if self.scores is not None:
            scores = self.scores.numpy()
            columns |= {"chosen_score": scores[prompt, chosen], "rejected_score": scores[prompt, rejected]}
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [
            EncodedPair(
                prompt_ids=self.prompt_ids[x],
                chosen_ids=self.response_ids[c],
                rejected_ids=self.response_ids[r],
                chosen_mask=mask,
                rejected_mask=mask,
                columns=dict(zip(columns, row, strict=True)),
                where=f"{where}:{i + 1}",
            )
            for i, (x, c, r, row) in enumerate(
                zip(prompt.tolist(), chosen.tolist(), rejected.tolist(), rows, strict=True)
            )
        ]

    def file_pairs(self, n: int, seed: int) -> list[EncodedPair]:
        """A fixed set of `n` encoded pairs; other seeds give other pairs, so one can be held out from another.

        Their columns are `chosen_win_prob` and `rejected_win_prob`, each response's exact probability of being
        preferred to a draw from the reference, and `pair_win_prob`, that of the chosen one against the rejected one; in
        a world with rewards also `chosen_score` and `rejected_score`, these rewards.
        """
        return self.encoded(n, [0, seed], f"{self.name}-{seed}")

    def stream(self, global_batch: int, seed: int) -> Stream:
        """Fresh pairs at every step, never the same twice."""
        return Stream(self, global_batch, seed)

    def write_jsonl(self, path: Path | str, n: int, seed: int) -> None:
        """Write the pairs of `file_pairs(n, seed)` as text, one JSON row each: prompt, chosen, rejected and columns."""
        texts = {tuple(ids): f" {text}" for ids, text in zip(self.response_ids, self.response_texts, strict=True)}
        names = {tuple(ids): name for ids, name in zip(self.prompt_ids, self.prompt_words, strict=True)}
        try:
            with open(path, "w", encoding="utf-8") as file:
                for pair in self.file_pairs(n, seed):
                    assert pair.rejected_ids is not None
                    row: dict[str, Any] = {
                        "prompt": names[tuple(pair.prompt_ids)],
                        "chosen": texts[tuple(pair.chosen_ids)],
                        "rejected": texts[tuple(pair.rejected_ids)],
                    }
                    file.write(json.dumps({**row, **pair.columns}) + "\n")
        except OSError as error:
            raise DataError(f"{path}: cannot write pairs: {error.strerror}") from None

    # ---------------------------------------------------------------------------------------------- rounds

    def _texts(self, n: int, seed: int) -> list[str]:
        """The world's own prompts in turn. The same again draws other answers, so it counts as another prompt."""
        return [self.prompt_words[i % len(self.prompt_words)] for i in range(n)]

    def judge(self) -> WorldJudge:
        """Who knows the preferences of this world exactly."""
        return WorldJudge(self)


class Stream:
    """An endless supply of pairs; those of a step are a function of (world, seed, step) alone, so a run can be resumed.

    Args: world: where they come from. global_batch: pairs per optimizer step. seed: another seed, other pairs.
    """

    steps_per_epoch: int | None = None
    grouped: Shares | None = None

    def __init__(self, world: WordWorld, global_batch: int, seed: int) -> None:
        self.world, self.size, self.seed = world, global_batch, seed
        self.fingerprint = self.order_hash = f"{world.fingerprint}-stream-{global_batch}-{seed}"

    def steps(self, epochs: float) -> int:
        raise NotImplementedError("a stream has no epochs")

    def epochs(self, steps: int) -> float:
        raise NotImplementedError("a stream has no epochs")

    def counted_pairs(self, step: int) -> float:
        return self.size

    def global_batch(self, step: int) -> list[EncodedPair]:
        return self.world.encoded(self.size, [1, self.seed, step], f"{self.world.name}:{step}")


class WorldJudge:
    """Judges texts by the world's own preferences, exactly; a text that is no response is "outside"."""

    def __init__(self, world: WordWorld) -> None:
        self._world = world
        self._prompts = {text: x for x, text in enumerate(world.prompt_words)}
        self._outcomes = {text: y for y, text in enumerate(world.response_texts)}

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """One judgement per question. Raises: RoundError for a prompt that is none of the world's."""
        outside = len(self._outcomes)
        out = []
        for question in questions:
            text = question.prompt.strip() if isinstance(question.prompt, str) else None
            if text not in self._prompts:
                raise RoundError(
                    f"judge.kind world: found prompt {question.prompt!r}, expected one of the testbed's "
                    f"({', '.join(self._world.prompt_words)})"
                )
            outcomes = [self._outcomes.get(" ".join(r.text.split()), outside) for r in question.responses]
            out.append(self._world._judgement(self._prompts[text], outcomes))
        return out

    def describe(self) -> dict[str, Any]:
        """What decides its judgements: the world."""
        return {"kind": "world", "world": self._world.name, **asdict(self._world.settings)}

    def close(self) -> None:
        """Nothing is held open."""
