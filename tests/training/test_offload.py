"""Offloaded activations: one copy of a tensor however often it is saved, work in proportion to what is saved."""

import pytest
import torch
from torch import nn

from prefopt.training import offload

MODEL = nn.Linear(1, 1)  # lives as long as who looks where its weights are


def passed(tensors, offloading, shared=False):
    """The sum of so many products; each saves its own factor, or all save the same one."""
    leaf = torch.ones(offload.SMALL, requires_grad=True)
    one = torch.full((offload.SMALL,), 2.0)
    with offloading:
        total = sum((leaf * (one if shared else one * k)).sum() for k in range(tensors))
    return leaf, total


@pytest.mark.parametrize("tensors", [50, 200])
def test_work_is_linear_in_saved_tensors(tensors, monkeypatch):
    looked_at = []
    expired = offload.StorageWeakRef.expired
    monkeypatch.setattr(offload.StorageWeakRef, "expired", lambda self: looked_at.append(1) or expired(self))
    offloading = offload.Offloading(MODEL, pin_memory=False)
    leaf, total = passed(tensors, offloading)
    assert offloading.copied == tensors * offload.SMALL * 4
    assert len(looked_at) <= 2 * tensors
    total.backward()
    assert torch.equal(leaf.grad, torch.full((offload.SMALL,), 2.0 * sum(range(tensors))))


def test_tensor_that_is_saved_many_times_is_copied_once_and_its_copy_goes_with_the_graph():
    offloading = offload.Offloading(MODEL, pin_memory=False)
    leaf, total = passed(20, offloading, shared=True)
    assert offloading.copied == offload.SMALL * 4
    assert len(offloading.copies) == 1
    total.backward()
    del total
    assert torch.equal(leaf.grad, torch.full((offload.SMALL,), 40.0))
    assert len(offloading.copies) == 0
