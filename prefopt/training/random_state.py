"""Random generators of Python, NumPy and torch: seeding, saving and restoring their states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def set_seed(seed: int) -> None:
    """Seed every random generator."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random generator, as plain JSON values."""
    import base64

    import numpy
    import torch

    version, keys, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=True)
    _, np_keys, position, has_gauss, cached = numpy_state
    state = {
        "python": [version, list(keys), gauss],
        "numpy": [np_keys.tolist(), position, has_gauss, cached],
        "torch": base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [base64.b64encode(bytes(s.tolist())).decode() for s in torch.cuda.get_rng_state_all()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    import base64

    import numpy
    import torch

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)

    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np_keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state(("MT19937", numpy.array(np_keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor(text) for text in state["cuda"]])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """The states of all random generators are restored afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
