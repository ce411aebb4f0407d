"""TDPO2 computed from full logits as in the paper, and by prefopt: the loss and the gradient are equal.

Run it: python examples/tdpo_by_hand.py
"""

import torch

from prefopt.kernels.token_stats import token_stats
from prefopt.losses import tdpo

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
PAIRS, LENGTH, WIDTH, VOCAB = 4, 7, 16, 100
BETA, ALPHA = 0.1, 0.5

# Hidden states of policy and reference at every position that predicts a completion token, (sequences, tokens, width):
# first the chosen sequences, then the rejected ones.
hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH)
ref_hidden = hidden + 0.3 * torch.randn_like(hidden)
head = torch.randn(VOCAB, WIDTH).requires_grad_()
ref_head = head.detach().clone()
tokens = torch.randint(VOCAB, (2 * PAIRS, LENGTH))

# 1. By hand, with all logits in memory.
logp = (hidden @ head.T).log_softmax(-1)  # (sequences, tokens, vocabulary)
ref_logp = (ref_hidden @ ref_head.T).log_softmax(-1)
logratios = (logp - ref_logp).gather(-1, tokens[..., None]).squeeze(-1).sum(-1)  # (sequences,)
seq_kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1).sum(-1)  # forward KL, summed over tokens
logit = logratios[:PAIRS] - logratios[PAIRS:] - ALPHA * (seq_kl[PAIRS:] - seq_kl[:PAIRS].detach())
by_hand = -torch.sigmoid(BETA * logit).log()
(hand_gradient,) = torch.autograd.grad(by_hand.mean(), head)

# 2. With prefopt: the kernel does not hold all logits, and the loss is a function of four vectors of shape (pairs,).
stats = token_stats(
    hidden.flatten(0, 1),
    head,
    tokens.flatten(),
    ref_hidden=ref_hidden.flatten(0, 1),
    ref_weight=ref_head,
    want=("ref_logp", "kl"),
    token_tile=16,
    vocab_tile=32,
)
ratio = (stats.logp - stats.ref_logp).view(2 * PAIRS, LENGTH).sum(-1)
kl = stats.kl.view(2 * PAIRS, LENGTH).sum(-1)
by_prefopt = tdpo(ratio[:PAIRS], ratio[PAIRS:], kl[:PAIRS], kl[PAIRS:], beta=BETA, alpha=ALPHA, detach_chosen_kl=True)
(gradient,) = torch.autograd.grad(by_prefopt.mean(), head)

print("loss by hand    ", [round(x, 6) for x in by_hand.tolist()])
print("loss by prefopt ", [round(x, 6) for x in by_prefopt.tolist()])
print(f"largest difference of the loss      {(by_hand - by_prefopt).abs().max().item():.1e}")
print(f"largest difference of the gradient  {(hand_gradient - gradient).abs().max().item():.1e}")
assert torch.allclose(by_hand, by_prefopt, rtol=0, atol=1e-12)
assert torch.allclose(hand_gradient, gradient, rtol=0, atol=1e-12)
