from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefopt.testbed import build_world
from prefopt.testbed.bandit import Bandit


@pytest.fixture(scope="session")
def cache(worlds: Path) -> Path:
    return worlds


@pytest.fixture(scope="session")
def world(cache: Path) -> Bandit:
    world = build_world("bandit", cache_dir=cache)
    world.base_model_path  # noqa: B018  trained here, once
    return world


@pytest.fixture
def base(world: Bandit) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(world.base_model_path, dtype=torch.float32)


@pytest.fixture
def other(base: torch.nn.Module) -> torch.nn.Module:
    """A policy that is not the base policy, with more mass outside the world."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return base
