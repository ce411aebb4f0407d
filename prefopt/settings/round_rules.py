"""Rules that hold between the settings of a run with rounds, and that settings of rounds are used at all."""

from __future__ import annotations

import dataclasses

from prefopt import redaction, registry
from prefopt.errors import ConfigError
from prefopt.rounds_method import in_rounds
from prefopt.settings.groups import DataConfig, TestbedConfig
from prefopt.settings.sampling_groups import EVAL_SAMPLING, ROUND_GROUPS, GenerateConfig, JudgeConfig
from prefopt.settings.schema import RunConfig


def check_rounds(config: RunConfig) -> None:
    """Raises: ConfigError for the first rule that the settings of rounds break."""
    if config.rounds.count == 0:
        _check_unused(config)
        if config.eval.generate:
            protect_api_keys(config.generate, config.judge)
        return
    protect_api_keys(config.generate, config.judge)
    rounds, method = config.rounds, config.method_name
    if config.method.needs.output == "scores":
        raise ConfigError(
            f"rounds.count: found {rounds.count}, but method '{method}' trains a judge, which generates no text; train "
            "it first, then name its folder as judge.path in the rounds of another method"
        )
    if config.method.needs.token_columns:
        raise ConfigError(
            f"rounds.count: found {rounds.count}, but method '{method}' reads "
            f"{config.method.needs.token_columns[0].keys[0]}, numbers per token that the pairs of rounds do not have"
        )
    if config.data.eval_fraction != DataConfig().eval_fraction:
        raise ConfigError(
            "data.eval_fraction: given with rounds, which hold out rounds.eval_prompts prompts; leave it out"
        )
    if config.eval.select is not None:
        raise ConfigError("eval.select: given with rounds, which use rounds.select_prompts instead; leave it out")
    for key in ("pairs", "eval_pairs"):
        if getattr(config.testbed, key) != getattr(TestbedConfig(), key):
            raise ConfigError(f"testbed.{key}: given with rounds, whose pairs the policy generates; leave it out")
    _check_pairs(config)
    _check_judge(config)
    if config.data.max_length <= config.generate.max_tokens:
        raise ConfigError(
            f"generate.max_tokens: found {config.generate.max_tokens}, expected less than data.max_length "
            f"({config.data.max_length}), which includes the prompt"
        )


def _check_unused(config: RunConfig) -> None:
    """Without rounds, settings of rounds must be left at their defaults, but for those of eval.generate."""
    for name in ROUND_GROUPS:
        group = getattr(config, name)
        default = type(group)()
        for field in dataclasses.fields(group):
            if getattr(group, field.name) == getattr(default, field.name):
                continue
            key = f"{name}.{field.name}"
            if name != "generate" or field.name not in EVAL_SAMPLING:
                also = f" (eval.generate reads {', '.join(EVAL_SAMPLING)})" if name == "generate" else ""
                raise ConfigError(
                    f"{key}: given without rounds; set their number (--rounds.count 3), or leave it out"
                    f"{also if config.eval.generate else ''}"
                )
            if config.eval.generate == 0:
                raise ConfigError(
                    f"{key}: given without rounds and without samples at evaluations; set their number "
                    "(--rounds.count 3 or --eval.generate 8), or leave it out"
                )


def _check_pairs(config: RunConfig) -> None:
    """Whether the pairs of rounds.pairs can be built."""
    how, n = config.rounds.pairs, config.generate.n
    if how == "data_sampled" and n != 1:
        raise ConfigError(
            f"generate.n: found {n}, expected 1: rounds.pairs data_sampled uses one completion of each prompt"
        )
    if how == "best_worst":
        if n < 2:
            raise ConfigError(f"generate.n: found {n}, expected at least 2: a pair is the best against the worst")
        return
    if in_rounds(config.method).thinks:
        raise ConfigError(
            f"rounds.pairs: found '{how}', but the data's completions contain no thoughts; expected best_worst (or "
            "--method.thought_prompt none)"
        )
    if config.on_testbed:
        raise ConfigError(f"rounds.pairs: found '{how}', but the testbed has no completions of its own")
    columns = config.method.needs.columns
    if columns:
        raise ConfigError(
            f"rounds.pairs: found '{how}', but method '{config.method_name}' reads {columns[0].name}, which is not "
            "known for the data's completions; expected best_worst"
        )


def _check_judge(config: RunConfig) -> None:
    rounds, judge = config.rounds, config.judge
    if judge.kind == "none":
        if rounds.select_prompts:
            raise ConfigError("judge.kind: found 'none', expected a judge: rounds.select_prompts needs one")
        if rounds.pairs != "data_sampled":
            raise ConfigError(
                f"judge.kind: found 'none', expected a judge: rounds.pairs {rounds.pairs} ranks the completions"
            )
    if registry.is_testbed_judge(judge.kind) and not config.on_testbed:
        raise ConfigError(f"judge.kind: found '{judge.kind}', which judges the testbed only; expected another judge")
    probabilities = judge.mode in registry.JUDGES.declared(str(judge.kind), "verdicts", ())
    if in_rounds(config.method).ranks_by == "blender_score" and probabilities:
        raise ConfigError(
            f"method.win_prob: found 'blender_score', which reads logits or scores, but judge '{judge.kind}' returns "
            "probabilities; expected pairwise_sigmoid"
        )


def protect_api_keys(generate: GenerateConfig, judge: JudgeConfig) -> None:
    """Keep the API keys in these environment variables out of everything that is printed or saved."""
    for name in (generate.api_key_env, judge.api_key_env):
        redaction.named_variable(name)
