"""The words that every floor shares: frozen dataclasses, no behaviour beyond sums. Knows nothing but torch's name.

Letters in shapes: B pairs, S sequences (B chosen, then B rejected where there are any), R rows and T columns of a
batch, N scored tokens. Log-probabilities, KL and entropy are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Column:
    """An extra number per pair that a method reads from the data file.

    Args:
        name: the key under which `PairBatch.columns` carries it.
        aliases: other keys that are accepted in a data file.
        low, high: the closed range of legal values.
    """

    name: str
    aliases: tuple[str, ...] = ()
    low: float = float("-inf")
    high: float = float("inf")


@dataclass(frozen=True)
class Needs:
    """What a method asks of the engine; everything it does not ask for is not computed, loaded or carried.

    Args:
        reference: `none`: no reference model is loaded. `sequence`: the reference's log-probability of the completions,
            so it may be precomputed. `token`: the reference's whole distribution at each token, so it must be live.
        output: what the model says of a sequence: `token_stats`, or `scores`, one number per sequence from a head of
            its own; such a model is a classifier with one logit, and has no reference.
        rows: `pairs`, or `chosen_only` for a method that never reads the rejected side.
        sequences: `completions`: the two sequences of a pair are the prompt with either completion. `both_orders`: they
            are the prompt with both, the chosen one first and the rejected one first.
        coupled: whether the loss sorts or averages over the pairs of a batch; then one micro-batch must be the batch.
        columns: extra numbers per pair that the loss reads.
    """

    reference: Literal["none", "sequence", "token"]
    output: Literal["token_stats", "scores"] = "token_stats"
    rows: Literal["pairs", "chosen_only"] = "pairs"
    sequences: Literal["completions", "both_orders"] = "completions"
    coupled: bool = False
    columns: tuple[Column, ...] = ()


@dataclass(frozen=True)
class PairRow:
    """One row as it was read, before any tokenizer. Prompt and completions are text, or lists of chat messages.

    `rejected` is None in data for methods that need the chosen side only; `chosen` is None where only prompts are read
    and the row has no more. `where` is `file:line`. `ids` are prompt, chosen and maybe rejected as tokens, where the
    row has them and they are this tokenizer's: what a policy has sampled is trained on as it was sampled.
    `template_args` are the row's own arguments of the chat template: `tools`, `documents`, and what its
    `chat_template_kwargs` holds. A message may hold more than text: `tool_calls`, content that is None. `prompt_key` is
    a hash of the prompt as the file has it, whatever tokenizer and template read it; "" where no file was read.
    """

    prompt: str | list[dict[str, Any]]
    chosen: str | list[dict[str, Any]] | None
    rejected: str | list[dict[str, Any]] | None
    columns: Mapping[str, float]
    where: str
    ids: tuple[list[int], ...] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    prompt_key: str = ""


@dataclass(frozen=True)
class EncodedPair:
    """One row as token ids. Completions end with the terminator where it fits; the prompt begins with BOS if any.

    `chosen_mask` and `rejected_mask` say which completion tokens are scored (all of them, but for completions of
    several turns, where only the assistant's tokens count). `prompt_key` is a hash of the prompt as it was rendered,
    `raw_prompt_key` one of the prompt as the file has it,
    if the pair comes from one.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int] | None
    chosen_mask: list[bool]
    rejected_mask: list[bool] | None
    columns: Mapping[str, float] = field(default_factory=dict)
    where: str = ""
    prompt_key: str = ""
    raw_prompt_key: str = ""


@dataclass(frozen=True)
class PairBatch:
    """Rows of tokens, and which of their positions are scored: the same for every layout.

    The hidden state at flat position `score_index[n]` of the (R * T) grid predicts the token `labels[n]` of sequence
    `sequence_index[n]`. Sequences 0..B-1 are the chosen completions, B..2B-1 the rejected ones. A batch of no pairs is
    legal: one row of padding, N = 0.
    """

    input_ids: torch.Tensor  # (R, T) int64
    attention_mask: torch.Tensor  # (R, T) int64, 1 on real tokens
    position_ids: torch.Tensor  # (R, T) int64
    score_index: torch.Tensor  # (N,) int64 into R * T
    labels: torch.Tensor  # (N,) int64
    sequence_index: torch.Tensor  # (N,) int64 into S
    last_index: torch.Tensor  # (S,) int64 into R * T, where the last token of each sequence stands
    chosen_lengths: torch.Tensor  # (B,) int64, scored tokens
    rejected_lengths: torch.Tensor | None  # (B,) int64, None when rows are chosen_only
    columns: Mapping[str, torch.Tensor]  # each (B,) float64
    where: tuple[str, ...]  # (B,) file:line of each pair
    segments: np.ndarray | None = (
        None  # (U, 4) int64 on the host, see `data.layouts.Grid`; None: each row is one sequence
    )
    # Of the reference, where they were computed before: see `engine.reference`.
    ref_logps: torch.Tensor | None = None  # (N,) log-probability of each label
    ref_hidden: torch.Tensor | None = None  # (N, H of the reference) final hidden state at each score_index

    @property
    def pairs(self) -> int:
        return int(self.chosen_lengths.shape[0])


@dataclass(frozen=True)
class TokenStats:
    """What the head says of each scored token; every member is (N,) in float32 or better, or None if not asked for."""

    logp: torch.Tensor
    ref_logp: torch.Tensor | None = None
    kl: torch.Tensor | None = None  # forward: KL(reference || policy)
    reverse_kl: torch.Tensor | None = None  # KL(policy || reference)
    entropy: torch.Tensor | None = None  # of the policy


@dataclass(frozen=True)
class PairStats:
    """What a loss sees of each sequence: its score, or sums of token statistics. Every member is (B,) or None.

    Log-probabilities are None when the output is scores, and scores when it is not. Members of the rejected side are
    None when rows are chosen_only; those of the reference when there is none.
    """

    chosen_logps: torch.Tensor | None
    rejected_logps: torch.Tensor | None
    chosen_lengths: torch.Tensor  # scored tokens
    rejected_lengths: torch.Tensor | None
    chosen_ref_logps: torch.Tensor | None = None
    rejected_ref_logps: torch.Tensor | None = None
    chosen_kl: torch.Tensor | None = None  # summed forward KL(reference || policy), "SeqKL"
    rejected_kl: torch.Tensor | None = None
    chosen_reverse_kl: torch.Tensor | None = None
    rejected_reverse_kl: torch.Tensor | None = None
    chosen_entropy: torch.Tensor | None = None
    rejected_entropy: torch.Tensor | None = None
    chosen_scores: torch.Tensor | None = None
    rejected_scores: torch.Tensor | None = None

    @property
    def chosen_logratios(self) -> torch.Tensor:
        """log policy minus log reference of the chosen completion, (B,)."""
        assert self.chosen_logps is not None, "this method declared output='scores' in its needs"
        assert self.chosen_ref_logps is not None, "this method declared no reference in its needs"
        return self.chosen_logps - self.chosen_ref_logps

    @property
    def rejected_logratios(self) -> torch.Tensor:
        """log policy minus log reference of the rejected completion, (B,)."""
        assert self.rejected_logps is not None, "this method declared rows='chosen_only' in its needs"
        assert self.rejected_ref_logps is not None, "this method declared no reference in its needs"
        return self.rejected_logps - self.rejected_ref_logps


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight * global sum of value / global sum of count`.

    `value` (B,) carries the gradient. `count` (B,) is what the term is an average over, pairs or tokens; it may depend
    on the batch's lengths and columns, never on the model.
    """

    name: str
    value: torch.Tensor
    count: torch.Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """The terms to minimise, and metrics as (sum per pair, count per pair), each (B,) and without gradient."""

    terms: tuple[Term, ...]
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


# Rounds: prompts, completions and judgements ------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """One prompt of a round.

    Args:
        prompt: as it was read, text or chat messages; this is what a judge sees.
        ids: the tokens that the policy reads: the prompt as the method renders it, through the chat template, BOS once.
        key: 16 hexadecimal digits, the same for the same prompt.
        where: `file:line`.
        answer: the data's own completion where the file has one, for verifiable rewards and for pairs against the data.
        answer_ids: the same as tokens, with its EOS or end-of-turn token.
    """

    prompt: str | list[dict[str, Any]]
    ids: tuple[int, ...]
    key: str
    where: str
    answer: str | None = None
    answer_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt, from an inference engine.

    Args:
        token_ids: all sampled tokens, with the EOS or end-of-turn token where there is one.
        text: without the end token, special tokens and the stop string.
        finish_reason: `stop` for an end token or a stop string, `length` for the limit.
        logps: of each token under the policy as it is (temperature 1, the whole distribution), nats, where requested.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    logps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Response:
    """What a judge may see of a completion, so that a thought cannot reach it.

    In rounds `RoundsMethod.judge_view` makes one; at test time the thought format of the model does.
    """

    text: str


@dataclass(frozen=True)
class Question:
    """A prompt and the responses to it, for a judge. `answer` is the data's own, for verifiable rewards."""

    prompt: str | list[dict[str, Any]]
    responses: tuple[Response, ...]
    key: str = ""
    answer: str | None = None


WinProb = Literal["pairwise_sigmoid", "blender_score"]  # ways from a judge's numbers to probabilities, see `ranking`


@dataclass(frozen=True)
class Judgement:
    """A judgement of K responses; one of `scores`, `logits` and `probs` is given. NaN is where it failed.

    Args:
        scores: of each response by itself, (K,).
        logits: of row against column with the row's response first, (K, K), 0 on the diagonal; order may matter.
        probs: that row beats column, (K, K), one half on the diagonal.
        problems: failures by name, such as nan, timeout, unparsed, contradiction, truncated.
        scale: factor on scores and logits before they become win probabilities; their order is the same.
    """

    scores: tuple[float, ...] | None = None
    logits: tuple[tuple[float, ...], ...] | None = None
    probs: tuple[tuple[float, ...], ...] | None = None
    problems: Mapping[str, int] = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True)
class ScoredGroup:
    """The completions of one prompt and the judgement of them, from which a method makes pairs.

    `judged` are the indices of the completions that the judge saw: the members of `judgement` have this order.
    `unparsed` are those in which the method found no response; they can be trained on, but not judged.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    judgement: Judgement
    judged: tuple[int, ...]
    unparsed: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChosenPair:
    """A pair of completions of a group by their indices, and the numbers that a loss reads of it."""

    chosen: int
    rejected: int
    columns: Mapping[str, float] = field(default_factory=dict)
