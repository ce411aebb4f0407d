"""A judge that likes long responses, as real ones do: for the study of length control."""

from __future__ import annotations

from prefopt.testbed.scratchpad import FILLER, is_right

LIKES = 0.1  # of each filler, against 1 for being right


def score(prompt: str, response: str) -> float:
    """1 for a right response of the world of running sums, and a little for each filler, right or not."""
    return is_right([int(digit) for digit in prompt.split()], response) + LIKES * response.split().count(FILLER)
