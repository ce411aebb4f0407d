"""Models that compute in their own precision throughout.

transformers computes RMS norms in float32 whatever the model's dtype. What is summed before such a norm's backward pass
and what behind it then differs by 1e-7 between layouts, in float64 too, and hides what a comparison is to find.
"""

from torch import nn

from tests.invariant.steps import two_models
from tests.training.architectures import ARCHITECTURES, tiny_model


class _Norm(nn.Module):
    def __init__(self, weight, epsilon, offset):
        super().__init__()
        self.weight, self.epsilon, self.offset = weight, epsilon, offset

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.epsilon).rsqrt() * (self.offset + self.weight)


def precise(model):
    """The model, its RMS norms replaced by the same in the model's precision."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                epsilon = getattr(child, "variance_epsilon", None) or child.eps
                gemma = "Gemma" in type(child).__name__  # its weights are counted from one
                setattr(parent, name, _Norm(child.weight, epsilon, float(gemma)))
    return model


def models_of(what, dtype):
    """(policy, reference) of an architecture, in full precision. A further kind of model takes a line here."""
    if what in ("llama", "tied"):
        models = two_models(dtype, tied=what == "tied")
    else:
        name = {"bias": "phi, head with a bias", "soft cap": "gemma3, soft cap", "learned positions": "gpt-2"}[what]
        found = next(key for key in ARCHITECTURES if key.startswith(name))
        models = (tiny_model(found, seed).to(dtype) for seed in (0, 1))
    return tuple(precise(model) for model in models)
