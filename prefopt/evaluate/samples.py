"""How far a policy is from a reference on the policy's own samples, through the forward that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefopt.data.collate import collate
from prefopt.settings import KernelConfig
from prefopt.training.forward import PolicyWithReference, pair_stats, to_device
from prefopt.training.models import evaluation_mode
from prefopt.types import Completion, EncodedPair, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefopt.training.adapters import Frozen

_WANT = ("ref_logp", "reverse_kl", "entropy")


@dataclass(frozen=True)
class SampleFigures:
    """Of each sample, in nats and summed over its tokens; float64, shape `(N,)` in the samples' order.

    Args:
        tokens: completion tokens.
        log_ratio: log pi(y|x) - log ref(y|x). Its mean over samples of pi is the Monte Carlo estimate of
            KL(pi || ref), without bias; single ones may be negative. NaN where there is no reference, as is `kl`.
        kl: sum over positions of KL(pi(.|prefix) || ref(.|prefix)), each over the whole vocabulary. Its mean has the
            same expectation and less variance, and no sample is below 0 but by rounding.
        entropy: sum over positions of the entropy of pi(.|prefix). Its mean estimates the entropy of whole completions.
    """

    tokens: np.ndarray
    log_ratio: np.ndarray
    kl: np.ndarray
    entropy: np.ndarray


def score_samples(
    policy: PreTrainedModel,
    reference: PreTrainedModel | Frozen | None,
    samples: Sequence[tuple[Prompt, Completion]],
    *,
    batch: int = 16,
    pad_id: int = 0,
    kernel: KernelConfig | None = None,
) -> SampleFigures:
    """Divergence of the policy from the reference, and its entropy, on samples of the policy.

    E_{y ~ pi} sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t)) = KL(pi(.|x) || ref(.|x)), the chain rule of KL

    The means are those of KL(pi || ref) only for samples at temperature 1 with nothing cut off the distribution; a
    limit on tokens makes it the KL of completions up to that limit. A sample without a token counts as zeros.

    Args:
        policy: on its device; with an adapter, or without. Its head becomes one that answers with statistics, as in
            training; weights and mode are left as they are.
        reference: another model on the same device, frozen by this, or which weights of the policy are frozen; None:
            entropy alone is known.
        samples: prompts with `ids`, and completions of them.
        batch: sequences per forward pass, sorted by length: speed only.
        pad_id: any id of the vocabulary.
        kernel: tiles of the fused head: memory and speed only.
    Returns: see `SampleFigures`.
    Reference: the two estimators, and that the second is the first with each token's expectation taken (Rao-Blackwell):
        Amini, Vieira and Cotterell, Better Estimation of the KL Divergence Between Language Models, arXiv 2504.10637.
    """
    model = PolicyWithReference(policy, reference, kernel or KernelConfig())
    return score_within(model, samples, batch=batch, pad_id=pad_id)


def score_within(
    policy: PolicyWithReference, samples: Sequence[tuple[Prompt, Completion]], *, batch: int = 16, pad_id: int = 0
) -> SampleFigures:
    """`score_samples` of a policy that knows its reference.

    It may be called where an engine gathers the policy's weights as modules need them.
    """
    compared = policy.frozen is not None or policy.reference is not None
    table = np.zeros((4, len(samples)))
    table[1:3] = 0.0 if compared else np.nan
    want = _WANT if compared else ("entropy",)
    lengths = [len(prompt.ids) + len(completion.token_ids) for prompt, completion in samples]
    order = [i for i in np.argsort(lengths, kind="stable")[::-1] if samples[i][1].token_ids]
    device = policy.lm.device
    with evaluation_mode(policy):
        for first in range(0, len(order), batch):
            chunk = order[first : first + batch]
            laid = collate([_pair(*samples[i]) for i in chunk], pad_id=pad_id, need_rejected=False)
            # not its call, which may be what an engine has wrapped and is under way
            stats = pair_stats(policy.forward, to_device(laid, device), want)
            columns = (
                stats.chosen_lengths,
                stats.chosen_logratios if compared else None,
                stats.chosen_reverse_kl,
                stats.chosen_entropy,
            )
            for row, column in zip(table, columns, strict=True):
                if column is not None:
                    row[chunk] = column.double().cpu().numpy()
    return SampleFigures(*table)


def _pair(prompt: Prompt, completion: Completion) -> EncodedPair:
    ids = list(completion.token_ids)
    return EncodedPair(list(prompt.ids), ids, None, [True] * len(ids), None, where=prompt.where)
