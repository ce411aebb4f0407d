"""All settings of a run: one vocabulary for YAML keys, flags and sweep keys, read strictly and without torch.

This module only re-exports the public names. `groups`, `sampling_groups` and `schema` declare the settings, `reader`
and `yaml_files` read them, `defaults` holds what depends on method and testbed, `rules` and `round_rules` hold what
must agree between groups, `help` makes the `--help` pages; `train`, `infer`, `data` and `plan` are one command each.
"""

from prefopt.settings.coercion import coerce
from prefopt.settings.defaults import TESTBED_DEFAULTS, Override, overrides, rate_source
from prefopt.settings.groups import (
    OPTIMIZERS,
    RESERVED_ARGS,
    DataConfig,
    EvalConfig,
    KernelConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    TemplateSettings,
    TestbedConfig,
    TrackConfig,
    TrainConfig,
)
from prefopt.settings.help import program
from prefopt.settings.identity import FREE_TO_CHANGE, LENGTHS, differences
from prefopt.settings.sampling_groups import GenerateConfig, JudgeConfig, RoundsConfig
from prefopt.settings.schema import RunConfig, sources, yaml_of
from prefopt.settings.train import from_dict, parse
from prefopt.settings.train_help import FOLDED, help_text
from prefopt.settings.yaml_files import load_yaml

__all__ = [
    "FOLDED",
    "FREE_TO_CHANGE",
    "LENGTHS",
    "OPTIMIZERS",
    "RESERVED_ARGS",
    "TESTBED_DEFAULTS",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "JudgeConfig",
    "KernelConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "Override",
    "ReferenceConfig",
    "RoundsConfig",
    "RunConfig",
    "TemplateSettings",
    "TestbedConfig",
    "TrackConfig",
    "TrainConfig",
    "coerce",
    "differences",
    "from_dict",
    "help_text",
    "load_yaml",
    "overrides",
    "parse",
    "program",
    "rate_source",
    "sources",
    "yaml_of",
]
