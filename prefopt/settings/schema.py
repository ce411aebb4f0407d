"""All settings of a run, and the same as plain nested values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from prefopt.method import Method
from prefopt.settings.groups import (
    SEED_LIMIT,
    DataConfig,
    EvalConfig,
    KernelConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    TestbedConfig,
    TrackConfig,
    TrainConfig,
)
from prefopt.settings.ranges import Group, ranged
from prefopt.settings.sampling_groups import GenerateConfig, JudgeConfig, RoundsConfig


@dataclass(frozen=True)
class RunConfig(Group):
    """All settings of a training run."""

    method: Method
    method_name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    kernel: KernelConfig = field(default_factory=KernelConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)
    seed: int = ranged(0, at_least=0, below=SEED_LIMIT)
    """Random seed of the data order and of everything else in the run."""
    output: str = ""
    """Output folder; running the same command again resumes the run in it. Empty: a name under runs/ that is derived
    from the settings."""
    dry_run: bool | Literal["config"] = False
    """Print the data report, the settings that differ from the defaults and the plan of the run, then stop. config:
    also print all settings as YAML."""

    @property
    def on_testbed(self) -> bool:
        return self.model.path is None and self.data.train is None

    @property
    def tied_at_start(self) -> tuple[str, ...]:
        """Metrics that have nothing to compare before training, because the policy still equals its reference."""
        return self.method.tied_at_reference if self.reference.path in (None, self.model.path) else ()

    def to_dict(self) -> dict[str, Any]:
        """As nested plain values: the content of a YAML file that gives the same run."""
        plain = {
            f.name: as_plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in NOT_SETTINGS
        }
        return {"method": {"name": self.method_name, **as_plain(self.method)}, **plain}

    def to_yaml(self) -> str:
        return yaml_of(self.to_dict())


def yaml_of(settings: Mapping[str, Any]) -> str:
    """Settings as the text of a YAML file."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


NOT_SETTINGS = ("method", "method_name")


def sources(named: str | None) -> tuple[str, ...]:
    """What data.train or data.eval names: one source, or several with commas between."""
    if named is None:
        return ()
    return (named,) if Path(named).exists() else tuple(part.strip() for part in named.split(","))


def all_defaults() -> dict[str, Any]:
    """The default of every setting but the method's, nested."""
    fields = [field for field in dataclasses.fields(RunConfig) if field.name not in NOT_SETTINGS]
    given = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    return {name: as_plain(value) for name, value in given.items() if value is not dataclasses.MISSING}


def type_hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def as_plain(value: Any) -> Any:
    if hasattr(value, "to_plain"):
        return value.to_plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: as_plain(v) for k, v in value.items()}
    return [as_plain(item) for item in value] if isinstance(value, tuple) else value
