"""Worlds with an exactly known answer. They hand out prompts and pairs, judge and measure; they know no trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefopt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from prefopt.testbed.world import World

WORLDS = ("bandit", "cyclic", "scratchpad")


def build_world(name: str = "bandit", *, seed: int = 0, cache_dir: Path | str | None = None) -> World:
    """Open a world; its base policy is trained on first use and found in the cache afterwards.

    Args: name: which world. seed: of the world itself; another seed is another world and another base policy.
        cache_dir: folder of the cached base policies, None for the user's cache directory.
    Returns: the world.
    Raises: ConfigError when there is no world of that name.
    """
    if name not in WORLDS:
        raise ConfigError(f"unknown testbed world '{name}'{did_you_mean(name, WORLDS)}; known: {', '.join(WORLDS)}")
    if name == "scratchpad":  # imported here: only who trains on a world waits for torch
        from prefopt.testbed.scratchpad import Scratchpad, ScratchpadSettings

        return Scratchpad(ScratchpadSettings(seed=seed), cache_dir)
    if name == "cyclic":
        from prefopt.testbed.cyclic import Cyclic, CyclicSettings

        return Cyclic(CyclicSettings(seed=seed), cache_dir)
    from prefopt.testbed.bandit import Bandit, BanditSettings

    return Bandit(BanditSettings(seed=seed), cache_dir)
