"""A judge with a bias towards long responses, as real ones have, for the study of length control."""

from __future__ import annotations

from prefopt.testbed.scratchpad import FILLER, is_right

PER_FILLER = 0.1  # score of each filler; a correct response scores 1


def score(prompt: str, response: str) -> float:
    """1 for a correct response of the world `scratchpad`, plus `PER_FILLER` for each filler, correct or not."""
    return is_right([int(digit) for digit in prompt.split()], response) + PER_FILLER * response.split().count(FILLER)
