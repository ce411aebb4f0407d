"""The loss and its gradient by the book: each row alone, unpadded, all logits, plain log-softmax.

Shares no code with prefopt's collate, forward and kernel: it reads encoded pairs and calls `method.loss`.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import torch

from prefopt.types import LossState, PairStats, TokenStats, TokenView


def oracle_step(policy, reference, method, pairs):
    """(loss, gradient by parameter name, averages that are logged) of one step on `pairs`; models are not changed.

    Args: policy, reference: plain causal language models of transformers; a method that reads scores is given the
        classifier that `scorer_of` makes of the policy.
    """
    if method.needs.output == "scores":
        policy = scorer_of(policy)
    policy.zero_grad(set_to_none=True)
    stats = oracle_stats(policy, reference, pairs, method.needs)
    columns = {
        c.name: torch.tensor([p.columns[c.name] for p in pairs], dtype=torch.float64) for c in method.needs.columns
    }
    per_token = {
        c.name: torch.tensor([x for key in c.keys for p in pairs for x in p.token_columns[key]], dtype=torch.float64)
        for c in method.needs.token_columns
    }
    batch = SimpleNamespace(
        pairs=len(pairs),
        columns=columns,
        token_columns=per_token,
        chosen_lengths=stats.chosen_lengths,
        rejected_lengths=stats.rejected_lengths,
        where=tuple(p.where for p in pairs),
    )
    output = method.loss_of(stats, batch, oracle_state(policy, reference, method, pairs, stats, batch))
    loss = sum(term.weight * term.value.sum() / term.count.sum() for term in output.terms)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    averages = {"loss": loss} | ({} if stats.chosen_logps is None else {"logps/chosen": stats.chosen_logps.mean()})
    averages |= {name: value.sum() / count.sum() for name, (value, count) in output.metrics.items()}
    return loss.item(), gradients, {name: float(value.detach()) for name, value in averages.items()}


def oracle_state(policy, reference, method, pairs, stats, batch):
    """What the loss reads of the whole step, whose pairs are one batch here."""
    if method.needs.mismatched:
        with torch.no_grad():
            others = [replace(p, chosen_ids=p.rejected_ids, chosen_mask=p.rejected_mask) for p in pairs]
            stats = oracle_stats(policy, reference, others, method.needs)
    with torch.no_grad():
        values = {name: value.double() for name, value in method.batch_values(stats, batch).items()}
    return LossState(values, ranks=(len(pairs),), state=method.next_state(method.needs.state, values))


def oracle_stats(policy, reference, pairs, needs):
    sides = ["chosen", "rejected"] if needs.rows == "pairs" else ["chosen"]
    tokens = []
    members = {"chosen_logps": None, "rejected_logps": None, "rejected_lengths": None}
    for side in sides:
        if needs.output == "scores":
            members[f"{side}_lengths"] = torch.tensor([sum(mask(p, side)) for p in pairs])
            whole = [[*p.prompt_ids, *getattr(p, f"{side}_ids")] for p in pairs]
            members[f"{side}_scores"] = torch.stack([oracle_score(policy, ids) for ids in whole])
            continue
        rows = [oracle_row(policy, reference, p.prompt_ids, getattr(p, f"{side}_ids"), mask(p, side)) for p in pairs]
        members[f"{side}_lengths"] = torch.tensor([sum(mask(p, side)) for p in pairs])
        members[f"{side}_logps"] = torch.stack([row["logp"].sum() for row in rows])
        if needs.reference != "none":
            members[f"{side}_ref_logps"] = torch.stack([row["ref_logp"].sum() for row in rows])
        if needs.reference == "token":
            members[f"{side}_kl"] = torch.stack([row["kl"].sum() for row in rows])
        for name in needs.statistics:
            members[f"{side}_{name}"] = torch.stack([row[name].sum() for row in rows])
        tokens += rows
    if tokens:
        lengths = torch.tensor([len(row["logp"]) for row in tokens])
        stats = TokenStats(**{name: torch.cat([row[name] for row in tokens]) for name in tokens[0]})
        members["token_view"] = TokenView(
            stats, torch.arange(len(tokens)).repeat_interleave(lengths), lengths, len(pairs)
        )
    return PairStats(**members)


def scorer_of(lm, seed=3):
    """A classifier with one logit and the weights of a language model, but for its head, which `seed` draws.

    What is one already is given back as it is.
    """
    if hasattr(lm, "score"):
        return lm
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    config.get_text_config().pad_token_id = None
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=lm.dtype).eval()
    setattr(classifier, classifier.base_model_prefix, copy.deepcopy(lm.base_model))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        classifier.score.weight.copy_(torch.randn(classifier.score.weight.shape, generator=generator))
    return classifier


def oracle_score(classifier, ids):
    """The classifier's answer to one sequence, of which it reads the last token."""
    return classifier(input_ids=torch.tensor([ids])).logits[0, 0]


def mask(pair, side):
    return getattr(pair, f"{side}_mask")


def oracle_row(policy, reference, prompt, completion, scored):
    """Statistics of the scored tokens of one completion, each (tokens,)."""
    ids = torch.tensor([[*prompt, *completion]])
    at = torch.tensor([len(prompt) + i - 1 for i, keep in enumerate(scored) if keep], dtype=torch.long)
    tokens = [token for token, keep in zip(completion, scored, strict=True) if keep]
    labels = torch.tensor(tokens, dtype=torch.long)[:, None]
    log_p = policy(input_ids=ids).logits[0, at].log_softmax(-1)  # (tokens, V)
    row = {"logp": log_p.gather(1, labels)[:, 0], "entropy": -(log_p.exp() * log_p).sum(-1)}
    row["log_sum_p2"] = log_p.exp().square().sum(-1).log()
    if reference is not None:
        with torch.no_grad():
            log_q = reference(input_ids=ids).logits[0, at].log_softmax(-1)
        row["ref_logp"] = log_q.gather(1, labels)[:, 0]
        row["kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        row["reverse_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
    return row
