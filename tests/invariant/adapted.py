"""Policies with an adapter, as a run makes them."""

import torch

from prefopt.settings import LoraConfig, RunConfig
from prefopt.training import adapter_loading, model_sources


def adapted_policy(method, model, **lora):
    """(policy with an adapter that is far from nothing, the same weights without it as the reference).

    Args: model: settings, with a path.
    """
    lora = LoraConfig(**({"r": 4, "alpha": 6} | lora))
    settings = RunConfig(method=method, method_name="under_test", model=model, lora=lora)
    start = model_sources.find(model.path, model)
    reference = model_sources.choose_reference(settings, start)
    policy = adapter_loading.load_policy(settings, start, reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy, reference
