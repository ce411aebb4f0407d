"""A prefopt loss in your own training loop: the functions of prefopt.losses take tensors and need torch alone.

Run it: python examples/one_loss_alone.py
"""

import torch

from prefopt.losses import dpo

torch.manual_seed(0)
VOCAB, LENGTH, PAIRS = 20, 6, 64

# A "language model" without context: one logit per token. Chosen completions have more of the even tokens.
reference = torch.randn(VOCAB)
policy = reference.clone().requires_grad_()
even = 2 * torch.randint(VOCAB // 2, (PAIRS, LENGTH))
chosen = torch.where(torch.rand(PAIRS, LENGTH) < 0.7, even, even + 1)  # (pairs, tokens)
rejected = torch.where(torch.rand(PAIRS, LENGTH) < 0.3, even, even + 1)


def logps(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each completion, summed over its tokens. Shape (pairs,)."""
    return logits.log_softmax(-1)[tokens].sum(-1)


optimizer = torch.optim.Adam([policy], lr=0.05)
for step in range(51):
    losses = dpo(  # (pairs,), unreduced; the caller takes the mean
        logps(policy, chosen) - logps(reference, chosen),
        logps(policy, rejected) - logps(reference, rejected),
        beta=0.5,
    )
    if step % 10 == 0:
        print(f"step {step:2d}  loss {losses.mean().item():.4f}")
    optimizer.zero_grad()
    losses.mean().backward()
    optimizer.step()

print(f"probability of even tokens: {reference.softmax(-1)[::2].sum():.2f} -> {policy.softmax(-1)[::2].sum():.2f}")
