"""Completions from vLLM, which runs in processes and an environment of its own, one process per copy of the model."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from prefopt.errors import ConfigError, RoundError
from prefopt.generation import vllm_worker
from prefopt.generation.base import Done, Engine, EngineKind, PolicySource, Sampling, limits
from prefopt.generation.ends import Ends, end_tokens_of, positions_of
from prefopt.settings import GenerateConfig, ModelConfig
from prefopt.training import model_sources, models
from prefopt.training.model_sources import ModelSource
from prefopt.types import Completion

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, for which vLLM has kernels
_LEAVING = 20.0  # seconds that a process may take to end by itself


def check_python(python: str | None) -> None:
    """Refuse a Python without vLLM, before anything is loaded. Raises: ConfigError."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    named = python or sys.executable
    try:
        done = subprocess.run([named, "-c", look], capture_output=True, cwd="/")
    except OSError as error:
        raise ConfigError(
            f"generate.python: '{named}' cannot be run ({error.strerror}), expected the Python of an environment that "
            "holds vLLM, e.g. .venv-vllm/bin/python"
        ) from None
    if done.returncode:
        raise ConfigError(
            f"generate.python: {'this Python' if python is None else repr(python)} has no vLLM, expected the Python of "
            "an environment that holds it, e.g. .venv-vllm/bin/python (`make .venv-vllm` makes one for a CPU)"
        )


class VllmEngine(EngineKind):
    """A policy that vLLM has loaded, once or several times.

    Prompts are assigned to the copies in turn. Every completion is a request with a seed of its own, so that it
    depends on the number of copies, and on the rest of its batch, by rounding alone.

    Args:
        settings: with the Python that has vLLM, GPUs per copy, copies, and further arguments of vLLM's LLM class.
        weights, model, tokenizer: of the policy; vLLM computes in `model.dtype` unless `generate.args.dtype` is given.

    Raises: RoundError when a copy cannot be loaded.
    """

    reads: ClassVar[tuple[str, ...]] = ("python", "tensor_parallel", "replicas", "args")

    @classmethod
    def check(cls, settings: GenerateConfig) -> None:
        """See `EngineKind`."""
        check_python(settings.python)

    @classmethod
    def open(cls, settings: GenerateConfig, policy: PolicySource) -> Engine:
        """See `EngineKind`."""
        weights = model_sources.find(policy.path, policy.model)
        models.check_model(weights.base, weights.base_settings(policy.model), "generate")
        return cls(settings, weights, policy.model, policy.tokenizer)

    def __init__(self, settings: GenerateConfig, weights: ModelSource, model: ModelConfig, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._end_tokens = end_tokens_of(weights, model, tokenizer)
        self._args = _arguments(settings, weights, model)
        positions = self._args.get("max_model_len") or positions_of(weights, model)
        self.context = None if positions is None else int(positions)
        loading = {
            "args": self._args,
            "adapter": None if weights.adapter is None else str(Path(weights.path).resolve()),
        }
        self._copies: list[_Copy] = []
        try:
            for devices in _share_devices(settings.replicas, settings.tensor_parallel):
                self._copies.append(_Copy(settings.python or sys.executable, devices))
                self._copies[-1].ask(loading)
            self._versions, *_ = [copy.answer() for copy in self._copies]
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order; completion i of a prompt draws with its seed + i.

        `done` is called as answers are read, one copy after the other.

        Raises: RoundError when a process ends, with the last line of its log.
        """
        room = limits(prompts, self.context, sampling.max_tokens)
        ends = Ends(self.tokenizer, self._end_tokens, sampling.stop)
        shared = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": list(ends.texts),
            "stop_token_ids": sorted(ends.tokens),
            "logprobs": 0 if sampling.logprobs else None,  # of the token itself and no other
            "detokenize": bool(ends.texts),
        }
        shares = [range(c, len(prompts), len(self._copies)) for c in range(len(self._copies))]
        for copy, share in zip(self._copies, shares, strict=True):
            requests = [
                {"prompt": list(prompts[p]), "seed": seeds[p] + i, "max_tokens": room[p]}
                for p in share
                for i in range(sampling.n)
            ]
            copy.ask({"sampling": shared, "requests": requests})
        answers: list[list[Completion]] = [[] for _ in prompts]
        for copy, share in zip(self._copies, shares, strict=True):
            for p in share:
                answers[p] = [self._completion(copy.answer(), ends) for _ in range(sampling.n)]
                if done is not None:
                    done(p, answers[p])
        return answers

    def describe(self) -> dict[str, Any]:
        """Name, versions, precision and the other arguments of its LLM class."""
        args = {name: value for name, value in self._args.items() if name not in ("model", "tokenizer", "revision")}
        return {"engine": "vllm", "args": args, "versions": self._versions}

    def close(self) -> None:
        """End its processes, and free what they hold."""
        for copy in self._copies:
            copy.close()

    def _completion(self, answer: dict[str, Any], ends: Ends) -> Completion:
        if answer["finish_reason"] not in ("stop", "length"):
            raise RoundError(
                f"generate.engine: vllm ended a completion with '{answer['finish_reason']}', "
                "expected 'stop' or 'length'"
            )
        return ends.completion(answer["token_ids"], answer["logps"], stopped=answer["finish_reason"] == "stop")


def _arguments(settings: GenerateConfig, weights: ModelSource, model: ModelConfig) -> dict[str, Any]:
    """The arguments of vLLM's LLM class."""
    tokenizer, _ = model_sources.tokenizer_path(weights, model)
    base = weights.base_settings(model)
    args: dict[str, Any] = {
        "model": _absolute(weights.base),
        "tokenizer": _absolute(tokenizer),
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "tensor_parallel_size": settings.tensor_parallel,
        "generation_config": "vllm",  # no sampling defaults that come with the model
        "seed": 0,
    }
    if base.revision is not None:
        args["revision"] = base.revision
    if weights.adapter is not None:
        if weights.adapter.modules_to_save:
            raise RoundError(
                f"generate.engine: the adapter '{weights.path}' holds whole modules beside its low-rank parts, which "
                "vllm cannot load, expected an adapter without lora.modules_to_save (or --generate.engine transformers)"
            )
        rank = max([weights.adapter.r, *(weights.adapter.rank_pattern or {}).values()])
        args |= {"enable_lora": True, "max_lora_rank": next((r for r in _RANKS if r >= rank), rank)}
    return args | settings.args


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _share_devices(copies: int, each: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each copy; None where there is no GPU. Raises: RoundError when there are too few."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    if not devices:
        return [None] * copies
    if len(devices) < copies * each:
        raise RoundError(
            f"generate.replicas: {copies} copies of the model on {each} GPUs each need {copies * each}, found "
            f"{len(devices)} (lower generate.replicas or generate.tensor_parallel)"
        )
    return [",".join(devices[c * each : (c + 1) * each]) for c in range(copies)]


class _Copy:
    """One process with one copy of the model."""

    def __init__(self, python: str, devices: str | None) -> None:
        # one process schedules and computes, so that the same requests meet in the same batches
        env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | os.environ
        if devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = devices
        handle, name = tempfile.mkstemp(prefix="prefopt-vllm-", suffix=".log")
        self._log = Path(name)
        self._process = subprocess.Popen(
            [python, str(Path(vllm_worker.__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=handle,
            env=env,
            text=True,
        )
        os.close(handle)

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self) -> dict[str, Any]:
        """The next line that it writes. Raises: RoundError when it has ended instead, or reports an error."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise self._ended(answer["error"])
        return answer

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._status()
        self._log.unlink(missing_ok=True)

    def _status(self) -> int:
        """What the process ended with, if need be by force."""
        try:
            return self._process.wait(_LEAVING)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _ended(self, error: str | None = None) -> RoundError:
        """The error of an ended process; its log is preserved."""
        status = self._status()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        preserved = self._log.with_suffix(".failed.log")
        self._log.replace(preserved)
        found = " ".join((error or (lines[-1] if lines else "its log is empty")).split())
        return RoundError(
            f"generate.engine: a vllm process ended with status {status}: "
            f"{textwrap.shorten(found, 300, placeholder=' ...')}; its log is {preserved}; "
            "finished work is not lost: fix it and run the same command again"
        )
