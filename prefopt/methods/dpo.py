"""Direct Preference Optimization (arXiv 2305.18290) and the losses that read the same two log-ratios."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prefopt.batch_losses import Delta, Shift, WholeBatch
from prefopt.dpo_variants import VARIANTS, DpopPenalty, ExoTarget, Sign
from prefopt.dpo_variants import Variant as Spec
from prefopt.method import Method, logit_accuracy, pair_term, reward_metrics
from prefopt.types import NO_STATE, LossOutput, LossState, Needs, PairBatch, PairStats

if TYPE_CHECKING:
    import torch

Variant = Literal[
    "sigmoid",
    "cdpo",
    "robust",
    "ipo_sum",
    "ipo_mean",
    "hinge",
    "sigmoid_norm",
    "r_dpo",
    "dpop",
    "apo_zero",
    "apo_down",
    "exo",
    "nca",
    "bco",
    "aot",
    "aot_unpaired",
    "discopop",
    "f_forward_kl",
    "f_js",
    "f_alpha",
    "chi_po",
    "dpo_shift",
    "cal_dpo",
]
_SMOOTHED = ("cdpo", "robust")
_MAY_SMOOTH = ("aot", "aot_unpaired")
_REFERENCE_FREE = ("sigmoid", "cdpo", "robust", "ipo_sum", "ipo_mean", "hinge")


def dpo(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    *,
    beta: float,
    variant: Variant = "sigmoid",
    chosen_lengths: torch.Tensor | None = None,
    rejected_lengths: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The DPO loss of each pair, or the loss of one of its relatives.

    -log s(beta (D_w - D_l)),  D = log pi(y|x) - log pi_ref(y|x)

    The other variants are functions of their own in `prefopt.dpo_variants`, each with its equation.

    Args:
        chosen_logratios, rejected_logratios: log policy minus log reference, summed over tokens. Shape `(pairs,)`.
        beta: KL-regularisation strength.
        variant: which loss, see `prefopt.dpo_variants.VARIANTS`.
        chosen_lengths, rejected_lengths: tokens of the completions, for variants that read them. Shape `(pairs,)`.
        options: hyper-parameters of the variant, such as `label_smoothing` (cdpo, robust; default 0) or `tau`.
    Returns: unreduced loss, shape `(pairs,)`.
    Raises: ValueError for an unknown variant, one that is a loss of the whole batch, lengths missing or superfluous, an
        option that the variant does not read.
    Reference: Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, eq. 7. Differs from the authors' code:
        nothing.
    """
    spec = VARIANTS.get(variant)
    if spec is None:
        raise ValueError(f"unknown variant {variant!r}")
    if spec.whole is not None:
        raise ValueError(f"variant {variant!r} is a loss of the whole batch, call prefopt.losses.{variant}")
    if variant not in _SMOOTHED and options.get("label_smoothing") == 0:
        del options["label_smoothing"]
    for name in options.keys() - spec.options.keys():
        readers = " and ".join(key for key, one in VARIANTS.items() if name in one.options) or "no variant"
        raise ValueError(f"{name} is not read by variant {variant!r}, only by {readers}")
    if "label_smoothing" in spec.options:
        options.setdefault("label_smoothing", 0.0)
        if not 0 <= options["label_smoothing"] < 0.5:
            found = options["label_smoothing"]
            raise ValueError(f"label_smoothing: found {found}, expected 0 <= label_smoothing < 0.5")
    if spec.lengths:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"variant {variant!r} needs chosen_lengths and rejected_lengths")
        options |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    elif chosen_lengths is not None or rejected_lengths is not None:
        raise ValueError(f"variant {variant!r} reads no lengths")
    return spec.loss(chosen_logratios, rejected_logratios, beta=beta, **{**spec.options, **options})


@dataclass(frozen=True)
class DPO(Method):
    """Direct Preference Optimization: a logistic loss on the difference of two log-ratios, and its relatives."""

    ambiguous: ClassVar[tuple[str, ...]] = ("rdpo",)

    beta: float | None = None
    """KL-regularisation strength; > 0. Default: the variant's, 0.1 for sigmoid."""
    # 0.1 in the authors' README and, for all tasks but TL;DR (0.5), in the paper's appendix on hyper-parameters

    variant: Variant = "sigmoid"
    """Loss of the two log-ratios: sigmoid is DPO's; docs/methods/dpo.md has the equation of each."""
    # arXiv 2305.18290, eq. 7

    label_smoothing: float = 0.0
    """Assumed probability that a label is wrong, between 0 and 0.5: cdpo, robust, aot, aot_unpaired."""
    # 0 in the authors' config

    reference_free: bool = False
    """Remove the reference from the loss; logged rewards still use it. For the first six variants."""
    # false in the authors' config

    alpha: float | None = None
    """r_dpo: reward per token of length difference (0.05). f_alpha: the divergence's alpha, 0 to 1 (0.5)."""

    sign: Sign | None = None
    """r_dpo: plus is the paper's; minus reproduces public codes that have the opposite sign."""

    penalty_weight: float | None = None
    """dpop: weight lambda of the penalty (50)."""

    penalty: DpopPenalty | None = None
    """dpop: where the penalty stands; inside_beta is the corrected paper's."""

    eps: float | None = None
    """exo: probability of the rejected completion in the label (0.001); TRL's label_smoothing."""

    target: ExoTarget | None = None
    """exo: authors is the unnormalised label of the authors' code, (1, e^-10)."""

    biased: bool | None = None
    """nca: the form without the chosen side's second term (false); this is TRL's bco_pair."""

    delta: Delta | None = None
    """bco: running subtracts the running mean of rewards, none is TRL's bco_pair (running)."""

    shift: Shift | None = None
    """dpo_shift: fixed uses `factor`; increase and decrease go from low to high or back over the run (fixed)."""

    factor: float | None = None
    """dpo_shift: factor of the rejected log-ratio; 1 is DPO (0.95)."""

    low: float | None = None
    """dpo_shift: smallest factor of increase and decrease (0.5)."""

    high: float | None = None
    """dpo_shift: largest factor of increase and decrease (1)."""

    tau: float | None = None
    """discopop: temperature of the gate (0.05)."""

    r_max: float | None = None
    """chi_po: range R of rewards; margins are clipped to 2 R, which stops gradients beyond it (no clip)."""

    exponent: float | None = None
    """chi_po: factor of the log-ratio in the exponential (1; 1.25 in practice)."""

    log_weight: float | None = None
    """chi_po: weight of the log-ratio itself (1; 0.1 in practice)."""

    calibration_weight: float | None = None
    """cal_dpo: weight of the two squares (0.5)."""

    def __post_init__(self) -> None:
        self._require_choice("variant", Variant)
        if self.beta is None:
            object.__setattr__(self, "beta", self._spec.beta)
        self._require_positive("beta")
        if self.variant in _SMOOTHED:
            self._require(
                0 < self.label_smoothing < 0.5,
                "label_smoothing",
                f"a number between 0 and 0.5 for variant {self.variant} (with 0 it would be sigmoid)",
            )
        elif self.variant in _MAY_SMOOTH:
            self._require(0 <= self.label_smoothing < 0.5, "label_smoothing", "a number from 0 to below 0.5")
        else:
            self._require(
                self.label_smoothing == 0,
                "label_smoothing",
                f"0 for variant {self.variant}; {', '.join(_SMOOTHED + _MAY_SMOOTH)} read it",
            )
        if self.reference_free:
            known = ", ".join(_REFERENCE_FREE)
            self._require(
                self.variant in _REFERENCE_FREE, "reference_free", f"false for variant {self.variant}; one of {known}"
            )
        for name in _OPTIONS:
            if getattr(self, name) is not None:
                readers = [key for key, one in VARIANTS.items() if name in one.options]
                self._require(
                    self.variant in readers, name, f"nothing for variant {self.variant}; {', '.join(readers)} read it"
                )
        options = self.options
        for name, low, high in _RANGES:
            value = options.get(name)
            if value is not None and getattr(self, name, None) is not None:
                expected = f"a number > {low:g}" + ("" if high is None else f" and < {high:g}")
                self._require(value > low and (high is None or value < high), name, expected)
        if self.variant == "f_alpha":
            self._require(0 < options["alpha"] < 1, "alpha", "a number > 0 and < 1 for f_alpha")
        if self.variant == "dpo_shift":
            self._require(options["low"] <= options["high"], "low", f"a number <= method.high ({options['high']:g})")
        for name, literal in _CHOICES:
            if getattr(self, name) is not None:
                self._require_choice(name, literal)

    @property
    def _spec(self) -> Spec:
        return VARIANTS[self.variant]

    @property
    def options(self) -> dict[str, Any]:
        """The variant's own hyper-parameters, with its defaults where none was given."""
        given = {name: getattr(self, name) for name in self._spec.options}
        return {name: self._spec.options[name] if value is None else value for name, value in given.items()}

    @property
    def needs(self) -> Needs:
        whole = self._whole
        if whole is None:
            return Needs(reference="sequence")
        return Needs("sequence", batch_values=tuple(whole.values), state=whole.state, step=whole.step)

    @property
    def _whole(self) -> WholeBatch | None:
        """How the variant reads the global batch, unless its options switch that off."""
        whole = self._spec.whole
        return None if whole is None or whole.unused(self.options) else whole

    def batch_values(self, stats: PairStats, batch: PairBatch) -> Mapping[str, torch.Tensor]:
        assert self.beta is not None
        values = {} if self._whole is None else self._whole.values
        return {name: of(stats, self.beta) for name, of in values.items()}

    def next_state(self, state: Mapping[str, float], values: Mapping[str, torch.Tensor]) -> Mapping[str, float]:
        return state if self._whole is None else self._whole.update(state, values)

    def loss(self, stats: PairStats, batch: PairBatch, state: LossState = NO_STATE) -> LossOutput:
        assert stats.chosen_logps is not None
        assert stats.rejected_logps is not None
        assert stats.rejected_lengths is not None
        assert self.beta is not None
        chosen, rejected = stats.chosen_logratios, stats.rejected_logratios
        if self.reference_free:
            chosen, rejected = stats.chosen_logps, stats.rejected_logps
        lengths = self._spec.lengths
        if self._spec.whole is not None:
            losses = self._spec.whole.loss(stats, state, beta=self.beta, **self.options)
        else:
            losses = dpo(
                chosen,
                rejected,
                beta=self.beta,
                variant=self.variant,
                chosen_lengths=stats.chosen_lengths if lengths else None,
                rejected_lengths=stats.rejected_lengths if lengths else None,
                **self.options,
            )
        if self.variant in ("ipo_mean", "sigmoid_norm"):
            chosen, rejected = chosen / stats.chosen_lengths, rejected / stats.rejected_lengths
        metrics = reward_metrics(stats, self.beta) | logit_accuracy(chosen - rejected)
        return LossOutput(terms=(pair_term(losses),), metrics=metrics)

    def loss_at_reference(self) -> float | None:
        return None if self.reference_free else self._spec.at_reference(beta=self.beta, **self.options)

    @property
    def tied_at_reference(self) -> tuple[str, ...]:
        tied = super().tied_at_reference
        # without the reference in the loss, its logit compares the policy's own log-probabilities from the start
        return tuple(name for name in tied if name != "accuracy/logit") if self.reference_free else tied

    def other_optimum(self) -> str:
        if self.variant == "sigmoid" and not self.reference_free:
            return ""
        free = " without the reference" if self.reference_free else ""
        return f"pi* is where DPO's sigmoid loss leads; {self.variant}{free} has another optimum."

    @property
    def _function(self) -> Any:
        return dpo if self.variant == "sigmoid" else inspect.unwrap(self._spec.loss)

    def describe(self) -> str:
        own = {name: value for name, value in self.options.items() if value is not None}
        shown = "".join(f", {name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in own.items())
        free = ", reference_free" if self.reference_free else ""
        return f"{self.variant}, beta {self.beta:g}{shown}{free}"


_OPTIONS = sorted({name for one in VARIANTS.values() for name in one.options} - {"label_smoothing"})
_CHOICES = (("sign", Sign), ("penalty", DpopPenalty), ("target", ExoTarget), ("delta", Delta), ("shift", Shift))
_RANGES = (
    ("factor", 0.0, None),
    ("low", 0.0, None),
    ("penalty_weight", 0.0, None),
    ("eps", 0.0, 0.5),
    ("tau", 0.0, None),
    ("r_max", 0.0, None),
    ("exponent", 0.0, None),
    ("calibration_weight", 0.0, None),
)
