"""Judges, behind one interface; `make` opens the one that the settings name. A judge never sees a thought."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.errors import ConfigError
from prefopt.settings import JudgeConfig
from prefopt.storage import text_hash

if TYPE_CHECKING:
    import torch

    from prefopt.data.encoder import Encoder
    from prefopt.data.rows import Messages
    from prefopt.generation.base import Engine
    from prefopt.judges.base import Judge
    from prefopt.types import Judgement, Question

_CLASSIFIERS = ("reward_model", "pairwise")
_SERVER, _POLICY = "llm with judge.url", "llm with judge.path policy"
_LLM = (_SERVER, _POLICY)
# Settings that only some kinds read; for any other they must stand as they are.
_READ_BY = {
    "path": (*_CLASSIFIERS, "function", *_LLM),
    "mode": _LLM,
    "scale": _LLM,
    "reward_scale": (*_CLASSIFIERS, "function", "length", *_LLM),
    "template": _LLM,
    "batch": _CLASSIFIERS,
    "max_length": _CLASSIFIERS,
    "trust_remote_code": _CLASSIFIERS,
    "url": (_SERVER,),
    "model": (_SERVER,),
    "api_key_env": (_SERVER,),
    "temperature": _LLM,
    "max_tokens": _LLM,
    "concurrency": (_SERVER,),
    "retries": (_SERVER,),
    "timeout": (_SERVER, "function"),
}


def check(settings: JudgeConfig) -> None:
    """Refuse what can be seen to be wrong before any model is loaded.

    Raises: ConfigError or TrainError naming the setting.
    """
    kind = settings.kind
    reader: str | None = kind
    if kind == "llm":
        from prefopt.judges import llm

        reader = _POLICY if settings.path == llm.POLICY else _SERVER
    for name, readers in _READ_BY.items():
        given = getattr(settings, name)
        if reader not in readers and given != getattr(JudgeConfig(), name):
            raise ConfigError(
                f"judge.{name}: found {given!r}, which judge '{reader}' does not read; it belongs to "
                f"{', '.join(readers)}"
            )
    scale = settings.reward_scale
    if scale != "std" and not 0 < scale < float("inf"):
        raise ConfigError(f"judge.reward_scale: found {scale!r}, expected a finite number above 0, or std")
    if kind == "llm" and settings.mode == "pairwise" and scale != 1:
        raise ConfigError(
            f"judge.reward_scale: found {scale!r}, but mode 'pairwise' gives verdicts, which are probabilities; "
            "leave it out (or --judge.mode score)"
        )
    if kind in _CLASSIFIERS:
        from prefopt.training.weight_files import check_path

        if settings.path is None:
            raise ConfigError("judge.path: found none, expected the folder or hub id of a classifier with one logit")
        if settings.max_length is not None and settings.max_length < 2:
            raise ConfigError(f"judge.max_length: found {settings.max_length}, expected at least 2")
        check_path("judge.path", settings.path)
    elif kind == "function":
        from prefopt.judges.function import find

        if settings.path is None:
            raise ConfigError("judge.path: found none, expected module:function")
        find(settings.path)
    elif kind == "llm":
        llm.check(settings)


def check_prompts(settings: JudgeConfig, prompts: Iterable[str | Messages]) -> None:
    """Refuse prompts that the judge cannot read, before any model is loaded.

    Raises: DataError for conversations without a chat template; TrainError when the judge's tokenizer is not there.
    """
    if settings.kind == "reward_model" and not all(isinstance(prompt, str) for prompt in prompts):
        from prefopt.judges.reward_model import check_conversations

        assert settings.path is not None
        check_conversations(settings.path, settings.trust_remote_code)


def check_weights(settings: JudgeConfig) -> None:
    """Refuse a judge whose weights are not whole, by their names and shapes, before completions are sampled for it.

    Raises: TrainError naming the weight.
    """
    if settings.kind in _CLASSIFIERS:
        from prefopt.judges.reward_model import check_weights

        assert settings.path is not None
        check_weights(settings.path, settings.trust_remote_code, *([_pairrm] if settings.kind == "pairwise" else []))


def _pairrm(config: Any) -> Any:
    """The class of a model that compares, where transformers has none."""
    from prefopt.judges import pairrm

    return pairrm.PairRM if pairrm.is_pairrm(config) else None


def identity(settings: JudgeConfig) -> str:
    """A hash of what the settings name by a path: weights, a function's source, a template. Cheap enough for each run.

    Raises: ConfigError when it cannot be read.
    """

    parts = [settings.kind, settings.path]
    if settings.kind == "function" and settings.path is not None:
        from prefopt.judges.function import source_of

        parts.append(source_of(settings.path))
    elif settings.kind in _CLASSIFIERS and settings.path is not None and Path(settings.path).is_dir():
        from prefopt.training.model_hashes import fingerprint

        parts.append(fingerprint(settings.path, None))
    if settings.template is not None:
        parts.append(Path(settings.template).read_text())
    return text_hash(repr(parts))[:16]


def make(
    settings: JudgeConfig,
    *,
    device: torch.device,
    policy: Callable[[], tuple[Engine, Encoder]] | None = None,
    world: Judge | None = None,
    cache: Path | None = None,
) -> Judge:
    """The judge that the settings name.

    Args:
        device: where a classifier is to be.
        policy: gives the policy as an engine, and how it reads prompts, where the judge is the policy itself.
        world: the testbed's own judge.
        cache: folder in which a server's answers are kept; None: one in the cache of the user.

    Raises: ConfigError, DataError or TrainError when it cannot be opened; RoundError when a server does not answer.
    """
    check(settings)
    judge = _opened(settings, device, policy, world, cache)
    # the spread of a round is known once the round is judged
    return judge if settings.reward_scale in (1, "std") else Scaled(judge, float(settings.reward_scale))


class Scaled:
    """A judge whose judgements name the factor on their scores. Args: judge: gives them. scale: the factor."""

    def __init__(self, judge: Judge, scale: float) -> None:
        self._judge, self._scale = judge, scale

    def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """See `Judge`."""
        return [dataclasses.replace(one, scale=self._scale) for one in self._judge.judge(questions)]

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return self._judge.describe()

    def close(self) -> None:
        """See `Judge`."""
        self._judge.close()


def _opened(
    settings: JudgeConfig,
    device: torch.device,
    policy: Callable[[], tuple[Engine, Encoder]] | None,
    world: Judge | None,
    cache: Path | None,
) -> Judge:
    if settings.kind == "length":
        from prefopt.judges.length import LengthJudge

        return LengthJudge()
    if settings.kind == "function":
        from prefopt.judges.function import FunctionJudge

        assert settings.path is not None
        return FunctionJudge(settings.path, settings.timeout)
    if settings.kind in _CLASSIFIERS:
        return _classifier(settings, device)
    if settings.kind == "llm":
        from prefopt.judges import llm

        return llm.make(settings, policy, cache)
    if settings.kind == "world" and world is not None:
        return world
    raise ConfigError(f"judge.kind: found {settings.kind!r}, which judges nothing here")


def _classifier(settings: JudgeConfig, device: torch.device) -> Judge:
    from prefopt.judges.reward_model import Classifier, RewardModelJudge

    assert settings.path is not None
    opening: dict[str, Any] = {
        "device": device,
        "max_length": settings.max_length,
        "batch": settings.batch,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.kind == "reward_model":
        return RewardModelJudge(Classifier(settings.path, **opening))
    from prefopt.data.comparison import BothOrders
    from prefopt.judges import pairrm
    from prefopt.judges.pairwise import PairwiseJudge, encode_both

    classifier = Classifier(settings.path, **opening, kind=_pairrm)
    if pairrm.is_pairrm(classifier.config):
        encode = pairrm.encode(classifier.tokenizer, classifier.config, classifier.max_length)
    else:
        encode = encode_both(BothOrders(classifier.tokenizer, classifier.max_length))
    return PairwiseJudge(classifier, encode)
