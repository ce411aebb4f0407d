"""A weighted sum of losses, each with its own settings: of pairs, and the likelihood of the chosen completions."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from prefopt import registry
from prefopt.dpo_variants import VARIANTS
from prefopt.errors import ConfigError, did_you_mean
from prefopt.method import Method, Reduction, nll_term
from prefopt.methods.dpo import DPO
from prefopt.rounds_method import in_rounds
from prefopt.types import NO_STATE, LossOutput, LossState, Needs, PairBatch, PairStats, Term

if TYPE_CHECKING:
    import torch

NLL = "nll"  # the part that is no method
Reference = Literal["none", "sequence", "token"]  # in ascending order
_HINT = "a name and a weight such as nll:0.5, or a mapping such as {name: nll, weight: 0.5}, with a part's own settings"


def mix(losses: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted sum of the losses of several methods.

    L = sum_i weight_i L_i

    Args:
        losses: of each part, normalised as that part is: a mean over pairs, or over tokens. Shape `()` each.
        weights: of each part.
    Returns: the loss, shape `()`.
    Reference: Wang et al., MPO, arXiv 2411.10442, for the default parts. Differs from TRL's lists of `loss_type`: every
        part has its own beta, and the mean over tokens is one over those of the global batch.
    """
    return sum((weight * loss for weight, loss in zip(weights, losses, strict=True)), start=0 * losses[0])


@dataclass(frozen=True)
class Part:
    """One loss of a mixture.

    Args:
        name: of a method, of a variant of DPO's loss, or `nll`.
        weight: factor of all its terms; > 0.
        settings: its own settings that are given, sorted by name.
    """

    name: str
    weight: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()
    form: ClassVar[str] = "NAME:WEIGHT"  # on help pages

    @classmethod
    def from_plain(cls, value: Any, where: str, convert: Callable[[Any, Any, str], Any]) -> Part:
        """A part from `name:weight`, or from a mapping with `name`, `weight` and the part's own settings.

        Args: where: the setting's name, for errors. convert: converts a value to a type, `(value, type, where)`.
        Raises: ConfigError.
        """
        if isinstance(value, str):
            name, _, weight = value.rpartition(":") if ":" in value else (value, "", 1.0)
            value = {"name": name, "weight": weight}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"].strip():
            raise ConfigError(f"{where}: found {value!r}, expected {_HINT}")
        name = value["name"].strip()
        hints = settings_of(name, where)
        given = {}
        for key, one in value.items():
            if key in ("name", "weight"):
                continue
            if key not in hints:
                known = ", ".join(["weight", *hints])
                raise ConfigError(
                    f"{where}: part '{name}' has no setting '{key}'{did_you_mean(key, hints)}; expected {known}"
                )
            given[key] = convert(one, hints[key], f"{where}: part '{name}': {key}")
        weight = convert(value.get("weight", 1.0), float, f"{where}: part '{name}': weight")
        return cls(name, weight, tuple(sorted(given.items())))

    def to_plain(self) -> Any:
        """The inverse of `from_plain`: text where the part has no settings of its own, else a mapping."""
        return {"name": self.name, "weight": self.weight, **dict(self.settings)} if self.settings else str(self)

    def __str__(self) -> str:
        return f"{self.name}:{self.weight!r}"


class Likelihood:
    """The NLL of the chosen completions as a part: the members of Method that a mixture asks for.

    Args: reduction: see `nll_term`.
    """

    needs = Needs(reference="none", rows="chosen_only")
    tied_at_reference: tuple[str, ...] = ()

    def __init__(self, reduction: Reduction = "token_mean") -> None:
        known = get_args(Reduction)
        if reduction not in known:
            raise ConfigError(f"method.reduction: found {reduction!r}, expected one of {', '.join(known)}")
        self.reduction: Reduction = reduction

    def loss_of(self, stats: PairStats, batch: PairBatch, state: LossState) -> LossOutput:
        return LossOutput(nll_term(stats, 1.0, self.reduction))

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        return {}

    def next_state(self, state: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return state

    def loss_at_reference(self) -> float | None:
        return None

    def equation(self) -> str:
        return "-log pi(y_w|x)"

    def paper(self) -> str:
        return ""

    def describe(self) -> str:
        return self.reduction


def settings_of(name: str, where: str) -> dict[str, Any]:
    """The settings that a part of this name may have, with their types. Raises: ConfigError for an unknown name."""
    cls, preset = _kind(name, where)
    if cls is Likelihood:
        return {"reduction": Reduction}
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init and f.name not in preset}


def _kind(name: str, where: str) -> tuple[Any, dict[str, Any]]:
    """(the class of a part, the settings that its name implies). Raises: ConfigError."""
    if name == NLL:
        return Likelihood, {}
    if name in registry.names() or "." in name or name not in VARIANTS:
        try:
            return registry.get(name), {}
        except ConfigError as error:
            text = str(error)
            if not text.startswith("unknown"):
                raise ConfigError(f"{where}: {text}") from None
            known = [NLL, *registry.names(), *VARIANTS]
            near = did_you_mean(name, known) or ";"
            raise ConfigError(
                f"{where}: unknown part '{name}'{near} expected {NLL}, a method or a variant of DPO's, such as sigmoid"
            ) from None
    return DPO, {"variant": name}


# MPO, arXiv 2411.10442, as TRL runs it: without a running shift in BCO, one beta for both
MPO = (
    Part("sigmoid", 0.8, (("beta", 0.1),)),
    Part("bco", 0.2, (("beta", 0.1), ("delta", "none"))),
    Part(NLL, 1.0),
)


@dataclass(frozen=True)
class Mix(Method):
    """A weighted sum of losses, such as DPO with the likelihood of the chosen completions."""

    parts: tuple[Part, ...] = MPO
    """The losses, as name:weight: methods, variants of dpo, nll. With settings: a list of mappings in YAML."""
    # the default is MPO's, arXiv 2411.10442

    def __post_init__(self) -> None:
        self._require(len(self.parts) > 0, "parts", _HINT)
        names = [part.name for part in self.parts]
        for part in self.parts:
            if not (math.isfinite(part.weight) and part.weight > 0):
                raise _refusal(part, f"weight: found {part.weight!r}, expected a finite number > 0")
            if names.count(part.name) > 1:
                raise _refusal(part, "found it twice, expected each part once")
        _ = self._losses  # builds and checks the method of each

    @cached_property
    def _losses(self) -> tuple[tuple[Part, Any], ...]:
        """(part, its method) of all parts."""
        return tuple((part, _built(part)) for part in self.parts)

    @property
    def needs(self) -> Needs:
        needs = [(part, loss.needs) for part, loss in self._losses]
        reads: Any = max((one.reference for _, one in needs), key=get_args(Reference).index)
        columns = {column.name: column for _, one in needs for column in one.columns}
        tokens = {column.name: column for _, one in needs for column in one.token_columns}
        return Needs(
            reference=reads,
            statistics=tuple(dict.fromkeys(name for _, one in needs for name in one.statistics)),
            batch_values=tuple(f"{part.name}/{name}" for part, one in needs for name in one.batch_values),
            state={f"{part.name}/{name}": value for part, one in needs for name, value in one.state.items()},
            step=any(one.step for _, one in needs),
            columns=tuple(columns.values()),
            token_columns=tuple(tokens.values()),
        )

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        return _joined((part.name, loss.batch_values(stats, batch)) for part, loss in self._losses)

    def next_state(self, state: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return _joined(
            (part.name, loss.next_state(_of_part(state, part), _of_part(values, part)))
            for part, loss in self._losses
            if loss.needs.state
        )

    def loss(self, stats: PairStats, batch: PairBatch, state: LossState = NO_STATE) -> LossOutput:
        terms: list[Term] = []
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        rewards: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for part, loss in self._losses:
            values, kept = _of_part(state.batch_values, part), _of_part(state.state, part)
            output = loss.loss_of(stats, batch, replace(state, batch_values=values, state=kept))
            terms += (
                replace(term, name=f"{part.name}/{term.name}", weight=part.weight * term.weight)
                for term in output.terms
            )
            metrics |= {f"{part.name}/{name}": value for name, value in output.metrics.items()}
            rewards = rewards or {name: value for name, value in output.metrics.items() if name.startswith("rewards/")}
        return LossOutput(tuple(terms), rewards | metrics)

    def loss_at_reference(self) -> float | None:
        known = [loss.loss_at_reference() for _, loss in self._losses]
        if None in known:
            return None
        return sum(part.weight * value for part, value in zip(self.parts, known, strict=True))

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        tied = [(part, loss.tied_at_reference) for part, loss in self._losses]
        first: tuple[str, ...] = next((names for part, names in tied if part.name != NLL), ())
        return (
            *(name for name in first if name.startswith("rewards/")),
            *(f"{part.name}/{name}" for part, names in tied for name in names),
        )

    def other_optimum(self) -> str:
        return "pi* is where DPO's sigmoid loss alone leads; a mixture has another optimum."

    def equation(self) -> str:
        return "\n".join(f"{part}  {loss.equation()}" for part, loss in self._losses)

    def paper(self) -> str:
        return "; ".join(dict.fromkeys(text for _, loss in self._losses if (text := loss.paper())))

    def describe(self) -> str:
        return " + ".join(f"{part.weight:g} {part.name} ({loss.describe()})" for part, loss in self._losses)


def _built(part: Part) -> Any:
    """The method of a part, with its settings. Raises: ConfigError."""
    cls, preset = _kind(part.name, "method.parts")
    try:
        method = cls(**preset, **dict(part.settings))
    except TypeError as error:
        raise _refusal(part, str(error)) from None
    except ConfigError as error:
        raise _refusal(part, str(error).removeprefix("method.")) from None
    if cls is Likelihood:
        return method
    needs = method.needs
    if isinstance(method, Mix):
        raise _refusal(part, "a mixture is no part of a mixture; name its parts")
    if needs.output == "scores":
        raise _refusal(part, "it trains a classifier, expected a loss of a language model")
    if needs.rows != "pairs":
        hint = f" (likelihood of the chosen completions: {NLL})" if needs.rows == "chosen_only" else ""
        raise _refusal(part, f"it reads rows {needs.rows}, expected a loss of pairs{hint}")
    if in_rounds(method).thinks:
        raise _refusal(part, "it trains completions with thoughts, which its own rounds make; expected a plain loss")
    return method


def _refusal(part: Part, what: str) -> ConfigError:
    return ConfigError(f"method.parts: part '{part.name}': {what}")


def _joined(parts: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {f"{name}/{key}": value for name, values in parts for key, value in values.items()}


def _of_part(values: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """The values of one part, without its prefix."""
    own = f"{part.name}/"
    return {name.removeprefix(own): value for name, value in values.items() if name.startswith(own)}
