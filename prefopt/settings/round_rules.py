"""Rules that hold between the settings of a run with rounds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from prefopt import redaction, registry
from prefopt.errors import ConfigError
from prefopt.rounds_method import in_rounds
from prefopt.settings.groups import DataConfig, TestbedConfig
from prefopt.settings.nested import lookup
from prefopt.settings.sampling_groups import ROUND_GROUPS, SAMPLES_READ
from prefopt.settings.schema import RunConfig


def check_rounds(config: RunConfig) -> None:
    rounds, generate, judge, method = config.rounds, config.generate, config.judge, in_rounds(config.method)

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            found = lookup(config.to_dict(), key)
            raise ConfigError(f"{key}: found {found!r}, expected {expected}")

    need(0 <= rounds.count <= 99, "rounds.count", "0 to 99 rounds")
    if rounds.count == 0:
        for name in ROUND_GROUPS:
            group = getattr(config, name)
            plain = type(group)()
            for f in dataclasses.fields(group):
                if getattr(group, f.name) == getattr(plain, f.name):
                    continue
                if name != "generate" or f.name not in SAMPLES_READ:
                    also = f" (eval.generate reads {', '.join(SAMPLES_READ)})" if name == "generate" else ""
                    raise ConfigError(
                        f"{name}.{f.name}: given without rounds; name how many (--rounds.count 3), or leave it out"
                        f"{also if config.eval.generate else ''}"
                    )
                if config.eval.generate == 0:
                    raise ConfigError(
                        f"{name}.{f.name}: given without rounds and without samples at evaluations; name how many "
                        "(--rounds.count 3 or --eval.generate 8), or leave it out"
                    )
        return
    need(rounds.shard >= 1, "rounds.shard", "a number >= 1")
    for key in ("rounds.eval_prompts", "rounds.select_prompts", "rounds.resample"):
        need(lookup(config.to_dict(), key) >= 0, key, "a number >= 0")
    check_sampling(config.to_dict())
    need(rounds.prompts is None or rounds.prompts >= 1, "rounds.prompts", "a number >= 1, or none")
    need(rounds.max_similarity is None or 0 < rounds.max_similarity <= 1, "rounds.max_similarity", "above 0, up to 1")
    needs = config.method.needs
    if needs.output == "scores":
        raise ConfigError(
            f"rounds.count: found {rounds.count}, but method '{config.method_name}' trains a judge, which answers no "
            "prompts; train it first, and name its folder as judge.path of the rounds of another method"
        )
    if config.data.eval_fraction != DataConfig().eval_fraction:
        raise ConfigError(
            "data.eval_fraction: given with rounds, which hold out rounds.eval_prompts prompts; leave it out"
        )
    if config.eval.select is not None:
        raise ConfigError("eval.select: given with rounds, which choose by rounds.select_prompts; leave it out")
    need(rounds.select_prompts == 0 or judge.kind != "none", "judge.kind", "a judge: rounds.select_prompts needs one")
    for key in ("testbed.pairs", "testbed.eval_pairs"):
        if lookup(config.to_dict(), key) != getattr(TestbedConfig(), key.partition(".")[2]):
            raise ConfigError(f"{key}: given with rounds, whose pairs the policy makes; leave it out")
    if rounds.pairs == "data_sampled":
        need(generate.n == 1, "generate.n", "1: rounds.pairs data_sampled reads one completion of each prompt")
    if rounds.pairs == "best_worst":
        need(generate.n >= 2, "generate.n", "at least 2: a pair is the best of them against the worst")
        need(judge.kind != "none", "judge.kind", "a judge: rounds.pairs best_worst ranks the completions")
    else:
        if method.thinks:
            raise ConfigError(
                f"rounds.pairs: '{rounds.pairs}', but the data's own completions hold no thought; expected best_worst "
                "(or --method.thought_prompt none)"
            )
        need(rounds.pairs != "data_worst" or judge.kind != "none", "judge.kind", "a judge: it ranks the completions")
        if config.on_testbed:
            raise ConfigError(f"rounds.pairs: '{rounds.pairs}' needs completions in data.train; the testbed has none")
        if needs.columns:
            raise ConfigError(
                f"rounds.pairs: '{rounds.pairs}', but method '{config.method_name}' reads {needs.columns[0].name}, "
                "which nobody knows of the data's own completion; expected best_worst"
            )
    own = registry.is_testbed_judge(judge.kind)
    need(not own or config.on_testbed, "judge.kind", f"another judge: `{judge.kind}` is the testbed's own")
    compares = judge.mode in registry.JUDGES.declared(str(judge.kind), "verdicts", ())
    if method.ranks_by == "blender_score" and compares:
        raise ConfigError(
            f"method.win_prob: 'blender_score' reads a judge's logits or scores, and judge '{judge.kind}' gives "
            "probabilities; expected pairwise_sigmoid"
        )
    need(
        config.data.max_length > generate.max_tokens,
        "generate.max_tokens",
        f"less than data.max_length ({config.data.max_length}), which holds the prompt too",
    )


def check_sampling(settings: Mapping[str, Any]) -> None:
    """The numbers of the groups `generate` and `judge`, wherever they are used. Raises: ConfigError."""

    def need(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{key}: found {lookup(settings, key)!r}, expected {expected}")

    for key in (
        *("generate.n", "generate.max_tokens", "generate.batch", "generate.concurrency", "generate.tensor_parallel"),
        *("generate.replicas", "judge.batch", "judge.max_tokens", "judge.concurrency"),
    ):
        need(lookup(settings, key) >= 1, key, "a number >= 1")
    for key in ("generate.retries", "judge.retries", "generate.top_k"):
        need(lookup(settings, key) >= 0, key, "a number >= 0")
    for key in ("generate.timeout", "judge.timeout"):
        need(0 < lookup(settings, key) < float("inf"), key, "seconds > 0")
    for key in ("generate.temperature", "judge.temperature"):
        need(0 <= lookup(settings, key) < float("inf"), key, "a number >= 0")
    need(all(lookup(settings, "generate.stop")), "generate.stop", "texts of at least one character")
    for key in ("generate.api_key_env", "judge.api_key_env"):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", lookup(settings, key)):
            raise ConfigError(f"{key}: expected the name of an environment variable (what was found is not shown)")
        redaction.named_variable(lookup(settings, key))
    need(0 < lookup(settings, "generate.top_p") <= 1, "generate.top_p", "a share above 0, up to 1")
