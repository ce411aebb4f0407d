"""The forward pass: backbone -> hidden states of the loss tokens -> statistics of the head -> sums per completion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prefopt.errors import TrainError
from prefopt.kernels.head import HeadRequest, StatsLinear, make_head_aware, make_score_precise
from prefopt.settings import KernelConfig
from prefopt.training import adapters, experts
from prefopt.training.attention import Kind, Rows, attention_kind
from prefopt.training.logits import head_scaling
from prefopt.types import Needs, PairBatch, PairStats, TokenStats, TokenView

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

ALL_STATISTICS = ("ref_logp", "kl", "reverse_kl", "entropy")
SCORES = ("scores",)
SUMS = {"logp": "logps", "ref_logp": "ref_logps"}  # names in PairStats of the sums of statistics; else the same name


class Policy(nn.Module):
    """The module that accelerate wraps: a model, and a frozen reference if the method needs one during training.

    Its forward computes the inputs of a loss from token ids. The head is applied inside of it, because the wrapper's
    hooks (gradient all-reduce, gathering of sharded weights) run in forward.
    """

    # accelerate's FSDP2 finds embedding, backbone and head by this name, get_input_embeddings and get_output_embeddings
    base_model_prefix = "backbone"

    def __init__(self, lm: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        super().__init__()
        for model in (lm, reference):
            _check_backbone(model)
        self.lm = lm
        self.reference = reference
        # a context manager around the backbone's forward pass, such as one that offloads saved activations
        self.saved_tensors_context: AbstractContextManager[Any] = contextlib.nullcontext()
        self.attention = self.reference_attention = attention_kind(adapters.base_of(lm))
        if reference is not None:
            reference.requires_grad_(False).eval()
            self.reference_attention = attention_kind(reference)

    @property
    def backbone(self) -> nn.Module:
        return _backbone(self.lm)

    @property
    def config(self) -> Any:
        """The config of the text model; backends size their buffers by it."""
        return adapters.base_of(self.lm).config.get_text_config()

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layer classes that FSDP2 shards one by one."""
        names = getattr(adapters.base_of(self.lm), "_no_split_modules", None) or ()
        return sorted({*names} & {type(module).__name__ for module in self.modules()})

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def forward(self, *, run: Callable[[], Any] | None = None, **inputs: Any) -> Any:
        """The inputs of a loss; or the result of `run`, which is called here because sharded weights are gathered by
        hooks of this module's forward."""
        return self._outputs(**inputs) if run is None else run()

    def _outputs(self, *args: Any, **inputs: Any) -> Any:
        raise NotImplementedError

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel | None]:
        """Context manager that yields a model which computes as the reference, or None; for use without gradients."""
        yield self.reference

    def train(self, mode: bool = True) -> Policy:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self


class Scorer(Policy):
    """A classifier whose single logit is read at the last token of each sequence.

    Args: lm: its head is a linear layer named `score`, which is made precise in place; or a model with an adapter from
        `adapter_loading`.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm, None)
        if not adapters.has_adapter(lm):  # as in PolicyWithReference
            make_score_precise(lm)

    def _outputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        last_index: torch.Tensor,
        segments: np.ndarray | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The score of each sequence, (S,), in float32 or better, and the routing if token weights are given.

        Args: as in PairBatch, and as in `experts.routing`.
        """
        rows = Rows(input_ids, attention_mask, position_ids, segments)
        with self.saved_tensors_context:
            hidden, routing = _states_and_routing(self.lm, self.attention, rows, last_index, token_weights)
        head: Any = adapters.base_of(self.lm).score
        return (head(hidden, precise=True).squeeze(-1), *routing)


class ReferenceHead(nn.Module):
    """A frozen copy of the output head of a reference whose hidden states are cached.

    Args: lm: the reference.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        head: Any = lm.get_output_embeddings()
        self.head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        if head.bias is not None:
            self.head.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
        self.scaling = head_scaling(lm)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class PolicyWithReference(Policy):
    """A language model and an optional reference, whose forward returns token statistics.

    Args:
        lm: a causal language model whose output head is a plain linear layer, which is changed to a StatsLinear in
            place; or a model with an adapter from `adapter_loading`.
        reference: another model, which is frozen here; or which weights of `lm` itself are the reference; or None.
        kernel: tile sizes of the head and size of its cache of logits.
        reference_head: the head for cached hidden states in batches; None if it is that of the frozen weights of `lm`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        reference: PreTrainedModel | adapters.Frozen | None,
        kernel: KernelConfig,
        reference_head: ReferenceHead | None = None,
    ) -> None:
        super().__init__(lm, None if isinstance(reference, adapters.Frozen) else reference)
        if not adapters.has_adapter(lm):  # with an adapter, the head was changed before the adapter was added
            make_head_aware(lm)
        self.frozen = reference if isinstance(reference, adapters.Frozen) else None
        self.kernel = kernel
        self.reference_head = reference_head
        self._scaling = self._reference_scaling = head_scaling(lm)
        if self.reference is not None:
            self._reference_scaling = head_scaling(self.reference)
        elif reference_head is not None:
            self._reference_scaling = reference_head.scaling

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel | None]:
        if self.frozen is None:
            yield self.reference
        else:
            with adapters.as_reference(self.lm, self.frozen):
                yield self.lm

    def _outputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        loss_index: torch.Tensor,
        labels: torch.Tensor,
        want: tuple[str, ...],
        segments: np.ndarray | None = None,
        ref_hidden: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Token statistics of the N loss tokens, in the order of TokenStats, each (N,) or None.

        If token weights are given, the members of the policy's routing follow.

        Args: as in PairBatch and `experts.routing`; `want` names statistics in addition to the log-probability.
        """
        rows = Rows(input_ids, attention_mask, position_ids, segments)
        reads = bool(set(want) & {"ref_logp", "kl", "reverse_kl"})
        # a live reference runs before the policy, so that its activations are freed before the policy's are saved
        live = reads and ref_hidden is None
        ref = self._reference_request(rows, loss_index) if live else {}
        with self.saved_tensors_context:
            hidden, routing = _states_and_routing(self.lm, self.attention, rows, loss_index, token_weights)
        # with cached states, the request is made after the policy's forward, in which a sharding backend gathers the
        # weights of a head that policy and reference share
        if reads and not live:
            ref = self._reference_request(rows, loss_index, ref_hidden)
        scale, softcap = self._scaling
        request = HeadRequest(
            labels=labels,
            want=want,
            scale=scale,
            softcap=softcap,
            token_tile=self.kernel.token_tile,
            vocab_tile=self.kernel.vocab_tile,
            cache_mb=self.kernel.cache_mb,
            **ref,
        )
        head = cast(StatsLinear, self.lm.get_output_embeddings())
        return (*head(hidden, request=request), *routing)

    def _reference_request(
        self, rows: Rows, loss_index: torch.Tensor, hidden: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """The reference's members of a HeadRequest; empty if there is no reference.

        The head is read inside `as_reference`, because a policy whose adapter has the head in `modules_to_save` holds
        two heads.

        Args: hidden: the reference's hidden states, (N, H), where they are cached.
        """
        with torch.no_grad(), self.as_reference() as reference:
            owner = reference if self.reference_head is None else self.reference_head
            if owner is None:
                return {}
            head = owner.get_output_embeddings()
            if hidden is None:
                assert reference is not None, "the batch carries no hidden states of the reference"
                hidden = _hidden_of_rows(reference, self.reference_attention, rows, loss_index)
            scale, softcap = self._reference_scaling
            return {
                "ref_hidden": hidden.to(head.weight.dtype),
                "ref_weight": head.weight,
                "ref_bias": head.bias,
                "ref_scale": scale,
                "ref_softcap": softcap,
            }


def _check_backbone(lm: Any) -> None:
    """Raises: TrainError for a model whose backbone cannot be called without its head."""
    if lm is None:
        return
    base = adapters.base_of(lm)
    if base.base_model is base:
        raise TrainError(
            f"model.path: {type(base).__name__} names '{base.base_model_prefix}' as its backbone and has no such "
            "module, so its hidden states cannot be computed without the head; expected a causal language model such "
            "as Llama or Qwen"
        )


def _backbone(lm: PreTrainedModel) -> nn.Module:
    """The backbone of a causal language model, without its head."""
    return adapters.base_of(lm).base_model


def _hidden_of_rows(lm: PreTrainedModel, kind: Kind, rows: Rows, loss_index: torch.Tensor) -> torch.Tensor:
    """Final hidden states that predict the loss tokens, (N, H); the head is applied to no other position."""
    return _states_and_routing(lm, kind, rows, loss_index)[0]


def _states_and_routing(
    lm: PreTrainedModel,
    kind: Kind,
    rows: Rows,
    loss_index: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """`_hidden_of_rows`, and the members of `experts.Routing` if token weights are given."""
    more = {} if token_weights is None else {"output_router_logits": True}
    outputs = _backbone(lm)(**rows.arguments(kind, lm.dtype), use_cache=False, **more)
    # (R, T, H) -> (R * T, H) -> (N, H): the head's cost is proportional to N, so other positions are dropped before it
    hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, loss_index)
    if token_weights is None:
        return hidden, ()
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise TrainError(
            f"model.router_aux_weight: {type(adapters.base_of(lm)).__name__} returns no router logits, expected "
            "them for the load-balancing loss (--model.router_aux_weight 0 turns it off)"
        )
    found = experts.routing(logits, adapters.base_of(lm).config, token_weights)
    return hidden, (found.chosen, found.probabilities, found.tokens)


def loss_token_states(lm: PreTrainedModel, kind: Kind, batch: PairBatch) -> torch.Tensor:
    """Hidden states of the loss tokens of a batch, (N, H). Args: kind: the kind of the model's attention."""
    rows = Rows(batch.input_ids, batch.attention_mask, batch.position_ids, batch.segments)
    return _hidden_of_rows(lm, kind, rows, batch.loss_index)


def token_stats_of(model: Callable[..., Any], batch: PairBatch, want: tuple[str, ...]) -> TokenStats:
    """Run the (wrapped) model over a batch.

    Args:
        model: a PolicyWithReference, wrapped or not.
        batch: on the model's device.
        want: statistics in addition to the policy's log-probability; see TokenStats. The reference's log-probability is
            taken from the batch if it is cached there.
    """
    return _token_stats(model, batch, want)[0]


def _token_stats(
    model: Callable[..., Any], batch: PairBatch, want: tuple[str, ...], **more: Any
) -> tuple[TokenStats, Sequence[torch.Tensor]]:
    """(token statistics, further outputs of the model). Args: more: further inputs of the model."""
    cached = batch.ref_logps if "ref_logp" in want else None
    if cached is not None:
        want = tuple(name for name in want if name != "ref_logp")
    returned = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        loss_index=batch.loss_index,
        labels=batch.labels,
        want=want,
        segments=batch.segments,
        ref_hidden=batch.ref_hidden,
        **more,
    )
    members = len(fields(TokenStats))
    found = TokenStats(*returned[:members])
    return found if cached is None else replace(found, ref_logp=cached.to(found.logp.dtype)), returned[members:]


def scores_of(model: Callable[..., Any], batch: PairBatch) -> torch.Tensor:
    """The score of each sequence, (S,). Args: model: a Scorer, wrapped or not; batch: on the model's device."""
    return _scores(model, batch)[0]


def _scores(model: Callable[..., Any], batch: PairBatch, **more: Any) -> tuple[torch.Tensor, ...]:
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        last_index=batch.last_index,
        segments=batch.segments,
        **more,
    )


def pair_stats(model: Callable[..., Any], batch: PairBatch, want: tuple[str, ...]) -> PairStats:
    """The inputs of a loss: token statistics summed per completion, or scores if `want` is SCORES."""
    return _pair_stats(model, batch, want)[0]


def pair_stats_and_routing(
    model: Callable[..., Any], batch: PairBatch, want: tuple[str, ...]
) -> tuple[PairStats, experts.Routing]:
    """`pair_stats`, and the routing of the policy's experts in this pass."""
    stats, routing = _pair_stats(model, batch, want, token_weights=experts.token_weights(batch))
    return stats, experts.Routing(*routing)


def _pair_stats(
    model: Callable[..., Any], batch: PairBatch, want: tuple[str, ...], **more: Any
) -> tuple[PairStats, Sequence[torch.Tensor]]:
    if want != SCORES:
        tokens, further = _token_stats(model, batch, want, **more)
        return sum_by_sequence(tokens, batch), further
    (scores, *further), pairs = _scores(model, batch, **more), batch.pairs
    stats = PairStats(
        None,
        None,
        batch.chosen_lengths,
        batch.rejected_lengths,
        chosen_scores=scores[:pairs],
        rejected_scores=None if batch.rejected_lengths is None else scores[pairs:],
    )
    return stats, further


def sum_by_sequence(tokens: TokenStats, batch: PairBatch) -> PairStats:
    """Token statistics (N,) -> sums per completion, (B,) each: sequences 0..B-1 are chosen, B..2B-1 rejected."""
    pairs, rejected = batch.pairs, batch.rejected_lengths
    sequences = pairs if rejected is None else 2 * pairs

    def sums(value: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if value is None:
            return None, None
        total = value.new_zeros(sequences).index_add(0, batch.sequence_index, value)
        return total[:pairs], None if rejected is None else total[pairs:]

    members: dict[str, Any] = {}
    for token_name in (one.name for one in fields(TokenStats)):
        name = SUMS.get(token_name, token_name)
        members[f"chosen_{name}"], members[f"rejected_{name}"] = sums(getattr(tokens, token_name))
    lengths = batch.chosen_lengths if rejected is None else torch.cat((batch.chosen_lengths, rejected))
    view = TokenView(tokens, batch.sequence_index, lengths, pairs)
    return PairStats(**members, chosen_lengths=batch.chosen_lengths, rejected_lengths=rejected, token_view=view)


def statistics_for(needs: Needs) -> tuple[str, ...]:
    """The statistics that a training step computes for a method with these needs: those that its loss reads."""
    if needs.output == "scores":
        return SCORES
    of_reference = {"none": (), "sequence": ("ref_logp",), "token": ("ref_logp", "kl")}[needs.reference]
    return (*of_reference, *needs.statistics)


def statistics_to_evaluate(needs: Needs, cache: str = "none") -> tuple[str, ...]:
    """The statistics that an evaluation computes: all that are available. Args: cache: the setting reference.cache."""
    if needs.output == "scores":
        return SCORES
    if needs.reference == "none":
        known: tuple[str, ...] = ("entropy",)
    else:
        known = ("ref_logp", "entropy") if cache == "logps" else ALL_STATISTICS
    return tuple(dict.fromkeys((*known, *needs.statistics)))


def to_device(batch: PairBatch, device: torch.device) -> PairBatch:
    """The batch with its tensors on `device`."""
    moved = {
        f.name: getattr(batch, f.name).to(device)
        for f in fields(batch)
        if isinstance(getattr(batch, f.name), torch.Tensor)
    }
    columns = {name: column.to(device) for name, column in batch.columns.items()}
    token_columns = {name: column.to(device) for name, column in batch.token_columns.items()}
    return replace(batch, **moved, columns=columns, token_columns=token_columns)
