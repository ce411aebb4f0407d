"""The types that all layers share: frozen dataclasses without behaviour. torch is imported for annotations only.

Letters in shapes: B pairs, S sequences (B chosen, then B rejected if there are any), R rows and T columns of a batch,
N loss tokens. Log-probabilities, KL and entropy are in nats.
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


LABEL = Column("label", low=0.0, high=1.0)  # of unpaired examples: 1 for a desirable completion, 0 for another one


@dataclass(frozen=True)
class TokenColumn:
    """Two lists of numbers per pair in the data file, one number per completion token of either side.

    Args:
        name: the key under which `PairBatch.token_columns` carries them; the file has `chosen_NAME` and
            `rejected_NAME`.
        neutral: the number of every token on the testbed, whose pairs have no such lists.
    """

    name: str
    neutral: float = 0.0

    @property
    def keys(self) -> tuple[str, str]:
        """The names of the two columns in a data file."""
        return f"chosen_{self.name}", f"rejected_{self.name}"


Rows = Literal["pairs", "chosen_only", "unpaired"]


@dataclass(frozen=True)
class Needs:
    """What a method reads; everything else is not computed, loaded or carried.

    Args:
        reference: `none`: no reference model is loaded. `sequence`: the reference's log-probabilities of the
            completions, which may be cached. `token`: its full distribution at each token, computed live or from cached
            hidden states.
        output: the model's output: `token_stats`, or `scores`, one number per sequence; the latter is a classifier with
            one logit, and has no reference.
        statistics: token statistics that the loss reads beyond log-probabilities and the forward KL of a `token`
            reference: `reverse_kl` (which needs that reference too), `entropy`, `log_sum_p2`.
        rows: `pairs`; `chosen_only` for a method that does not read the rejected completion; `unpaired` for single
            completions with the label whether they are desirable, as the column `label`.
        mismatched: whether each unpaired example also carries the completion of another prompt, as its rejected one.
        sequences: `completions`: the two sequences of a pair are the prompt with either completion. `both_orders`: they
            are the prompt with both completions, with the chosen one first and with the rejected one first.
        batch_values: names of the values that `Method.batch_values` computes of each pair. Those of the whole global
            batch are collected before the loss, if need be by a pass without gradient.
        state: names and initial values of the numbers that a method keeps from step to step, see `Method.next_state`.
        step: whether the loss depends on the step, through `LossState.progress`.
        columns: extra numbers per pair that the loss reads.
        token_columns: extra numbers per loss token that the loss reads.
    """

    reference: Literal["none", "sequence", "token"]
    output: Literal["token_stats", "scores"] = "token_stats"
    statistics: tuple[str, ...] = ()
    rows: Rows = "pairs"
    mismatched: bool = False
    sequences: Literal["completions", "both_orders"] = "completions"
    batch_values: tuple[str, ...] = ()
    state: Mapping[str, float] = field(default_factory=dict)
    step: bool = False
    columns: tuple[Column, ...] = ()
    token_columns: tuple[TokenColumn, ...] = ()

    @property
    def with_state(self) -> bool:
        """Whether `Method.loss` takes a LossState."""
        return bool(self.batch_values or self.state or self.step)


@dataclass(frozen=True)
class PairRow:
    """One example as it was read, not yet tokenized. Prompt and completions are text, or lists of chat messages.

    `rejected` is None in data for methods that need the chosen completion only; `chosen` is None where only prompts are
    read and the example has no completion. `where` is `file:line`. `ids` are the token ids of prompt, chosen and
    possibly rejected completion, if the example has them and they are this tokenizer's, so that sampled tokens are
    trained on unchanged. `template_args` are the example's own arguments of the chat template: `tools`, `documents`,
    and the members of `chat_template_kwargs`. Messages may also have `tool_calls`, and content None. `prompt_key` is a
    hash of the prompt in the file, independent of tokenizer and template; "" where no file was read. `token_columns`
    has the lists of the example by the name of their key, such as `chosen_weights`.
    """

    prompt: str | list[dict[str, Any]]
    chosen: str | list[dict[str, Any]] | None
    rejected: str | list[dict[str, Any]] | None
    columns: Mapping[str, float]
    where: str
    ids: tuple[list[int], ...] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    prompt_key: str = ""
    token_columns: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodedPair:
    """One example as token ids. Completions end with EOS or an end-of-turn token if it fits, prompts begin with BOS.

    `chosen_mask` and `rejected_mask` are the loss masks of the completions: True on all tokens, but for completions of
    several turns, where only the assistant's tokens are. `prompt_key` is a hash of the rendered prompt,
    `raw_prompt_key` one of the prompt in the file, if the pair comes from one. `token_columns` has lists by the name of
    their key, such as `chosen_weights`, with one number per loss token.
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
    token_columns: Mapping[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class PairBatch:
    """A batch of token rows and the positions of its loss tokens, in the same form for every layout.

    The hidden state at flat position `loss_index[n]` of the (R * T) grid predicts the token `labels[n]` of sequence
    `sequence_index[n]`. Sequences 0..B-1 are the chosen completions, B..2B-1 the rejected ones. A batch of no pairs is
    legal: one row of padding, N = 0.
    """

    input_ids: torch.Tensor  # (R, T) int64
    attention_mask: torch.Tensor  # (R, T) int64, 1 on real tokens
    position_ids: torch.Tensor  # (R, T) int64
    loss_index: torch.Tensor  # (N,) int64 into R * T
    labels: torch.Tensor  # (N,) int64
    sequence_index: torch.Tensor  # (N,) int64 into S
    last_index: torch.Tensor  # (S,) int64 into R * T, position of the last token of each sequence
    chosen_lengths: torch.Tensor  # (B,) int64, loss tokens
    rejected_lengths: torch.Tensor | None  # (B,) int64, None when rows are chosen_only
    columns: Mapping[str, torch.Tensor]  # each (B,) float64
    where: tuple[str, ...]  # (B,) file:line of each pair
    token_columns: Mapping[str, torch.Tensor] = field(default_factory=dict)  # each (N,) float64
    weights: torch.Tensor | None = None  # (B,) float64, of each pair in the loss; None: all are 1
    segments: np.ndarray | None = (
        None  # (U, 4) int64 on the host, see `data.layouts.Grid`; None: each row is one sequence
    )
    # Cached values of the reference, see `training.reference_cache`.
    ref_logps: torch.Tensor | None = None  # (N,) log-probability of each label
    ref_hidden: torch.Tensor | None = None  # (N, H of the reference) final hidden state at each loss_index

    @property
    def pairs(self) -> int:
        return int(self.chosen_lengths.shape[0])


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each loss token; every member is (N,) in float32 or better, or None if it was not requested."""

    logp: torch.Tensor
    ref_logp: torch.Tensor | None = None
    kl: torch.Tensor | None = None  # forward: KL(reference || policy)
    reverse_kl: torch.Tensor | None = None  # KL(policy || reference)
    entropy: torch.Tensor | None = None  # of the policy
    log_sum_p2: torch.Tensor | None = None  # log sum_v p^2 of the policy


@dataclass(frozen=True)
class TokenView:
    """The loss tokens of a batch, one after the other, for losses that read more than sums over a completion.

    Tokens of a sequence are in their order and adjacent; sequences 0..B-1 are the chosen completions, then B rejected
    ones if there are any. Gradients flow through all statistics of the policy.

    Args:
        stats: statistics of each token, (N,).
        sequence_index: the sequence of each token, (N,) int64.
        lengths: loss tokens of each sequence, (S,) int64.
        pairs: B.
    """

    stats: TokenStats
    sequence_index: torch.Tensor
    lengths: torch.Tensor
    pairs: int

    @property
    def logratios(self) -> torch.Tensor:
        """log policy minus log reference of each token, (N,)."""
        assert self.stats.ref_logp is not None, "this method declared no reference in its needs"
        return self.stats.logp - self.stats.ref_logp

    @property
    def positions(self) -> torch.Tensor:
        """The place of each token among the loss tokens of its sequence, from 0; (N,) int64."""
        starts = self.lengths.cumsum(0) - self.lengths
        count = self.sequence_index.new_ones(self.sequence_index.shape).cumsum(0) - 1
        return count - starts[self.sequence_index]

    @property
    def is_chosen(self) -> torch.Tensor:
        """Whether a token belongs to a chosen completion, (N,) bool."""
        return self.sequence_index < self.pairs

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the tokens of each sequence, (N,) -> (S,)."""
        return values.new_zeros(self.lengths.shape).index_add(0, self.sequence_index, values)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Means over the tokens of each sequence, (N,) -> (S,); 0 where it has none."""
        return self.sums(values) / self.lengths.clamp(min=1)

    def prefix_sums(self, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Sums over the first `tokens` loss tokens of each sequence. Args: tokens: (S,). Returns: (S,)."""
        inside = self.positions < tokens[self.sequence_index]
        return self.sums(values * inside)

    def of_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """The value of each token's sequence, (S,) -> (N,)."""
        return values[self.sequence_index]

    def sides(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected) of values per sequence, (2B,) -> twice (B,)."""
        return values[: self.pairs], values[self.pairs :]


@dataclass(frozen=True)
class LossState:
    """What a loss may read beyond its micro-batch.

    Args:
        batch_values: what `Method.batch_values` returned for the pairs of the whole global batch, without gradient.
            Shape `(G,)` each, float64.
        offset: index among them of this micro-batch's first pair.
        ranks: how many of these pairs each rank has, in order of ranks.
        state: the numbers that the method keeps from step to step, updated by this global batch already. An evaluation
            does not update them.
        progress: finished share of the optimizer steps, from 0 to 1.
    """

    batch_values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    offset: int = 0
    ranks: tuple[int, ...] = ()
    state: Mapping[str, float] = field(default_factory=dict)
    progress: float = 0.0


NO_STATE = LossState()


@dataclass(frozen=True)
class PairStats:
    """The inputs of a loss per sequence: its score, or sums of token statistics. Every member is (B,) or None.

    `tokens` has the same statistics token by token. Log-probabilities are None if the output is scores, and scores
    are None otherwise. Members of the rejected completion are None if rows are chosen_only, those of the reference
    if there is none.
    """

    chosen_logps: torch.Tensor | None
    rejected_logps: torch.Tensor | None
    chosen_lengths: torch.Tensor  # loss tokens
    rejected_lengths: torch.Tensor | None
    chosen_ref_logps: torch.Tensor | None = None
    rejected_ref_logps: torch.Tensor | None = None
    chosen_kl: torch.Tensor | None = None  # summed forward KL(reference || policy), "SeqKL"
    rejected_kl: torch.Tensor | None = None
    chosen_reverse_kl: torch.Tensor | None = None
    rejected_reverse_kl: torch.Tensor | None = None
    chosen_entropy: torch.Tensor | None = None
    rejected_entropy: torch.Tensor | None = None
    chosen_log_sum_p2: torch.Tensor | None = None
    rejected_log_sum_p2: torch.Tensor | None = None
    chosen_scores: torch.Tensor | None = None
    rejected_scores: torch.Tensor | None = None
    token_view: TokenView | None = None

    @property
    def tokens(self) -> TokenView:
        """The token statistics of which the other members are sums."""
        assert self.token_view is not None, "this method declared output='scores' in its needs"
        return self.token_view

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

    @property
    def chosen_mean_logps(self) -> torch.Tensor:
        """log policy per completion token of the chosen completion, (B,)."""
        assert self.chosen_logps is not None, "this method declared output='scores' in its needs"
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> torch.Tensor:
        """log policy per completion token of the rejected completion, (B,)."""
        assert self.rejected_logps is not None, "this method declared rows='chosen_only' in its needs"
        assert self.rejected_lengths is not None
        return self.rejected_logps / self.rejected_lengths


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight * global sum of value / global sum of count`.

    `value` (B,) carries the gradient. `count` (B,) is the normalizer per pair: 1 for an average over pairs, the number
    of tokens for one over tokens. It may depend on the batch's lengths and columns, never on the model.
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
        prompt: the prompt as it was read, text or chat messages, which a judge receives.
        ids: the token ids that the policy reads: the prompt rendered by the method and the chat template, with one BOS.
        key: 16 hexadecimal digits, equal for equal prompts.
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


WinProb = Literal["pairwise_sigmoid", "blender_score"]  # how win probabilities are computed from scores, see `ranking`


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
    """A pair of completions of a group by their indices, and the columns that a loss reads."""

    chosen: int
    rejected: int
    columns: Mapping[str, float] = field(default_factory=dict)
