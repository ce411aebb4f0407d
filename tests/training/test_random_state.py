"""The state of all random generators."""

import torch

from prefopt.training.random_state import random_state, set_random_state


def test_random_state_when_set_again_then_every_generator_repeats_itself():
    import random

    import numpy

    def draw():
        return random.random(), float(numpy.random.rand()), torch.rand(3).tolist()

    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first
