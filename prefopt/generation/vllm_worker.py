"""vLLM in a process and an environment of its own: run as a file there, it reads JSON lines and writes JSON lines.

Knows nothing of prefopt, which that environment does not have. First line in: what to load. Line out: versions. Then a
line in for each batch of requests, and for each of them a line out. An error is a line `{"error": ...}`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import IO, Any

# Python puts a script's folder first where it looks for modules, and there are modules of other people's names in it.
sys.path = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

_CPU_ONLY = {  # what its build for CPUs needs: chunked prefill with seeds ends the process there
    "gpu_memory_utilization": 0.2,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "max_num_batched_tokens": 4096,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints belongs to the log
    _end_with_parent()
    try:
        settings = json.loads(sys.stdin.readline())
        llm, lora = _load(settings)
        _say(answers, _versions())
        for line in sys.stdin:
            for answer in _generate(llm, lora, json.loads(line)):
                _say(answers, answer)
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        raise


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _load(settings: dict[str, Any]) -> tuple[Any, Any]:
    from vllm import LLM
    from vllm.platforms import current_platform

    args = settings["args"]
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        args = _CPU_ONLY | args
        args["max_num_batched_tokens"] = max(args["max_num_batched_tokens"], args.get("max_model_len") or 0)
    lora = None
    if settings["adapter"] is not None:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("policy", 1, settings["adapter"])
    return LLM(**args), lora


def _versions() -> dict[str, str]:
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__}


def _generate(llm: Any, lora: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": request["prompt"]} for request in batch["requests"]],
        [
            SamplingParams(**batch["sampling"], seed=request["seed"], max_tokens=request["max_tokens"])
            for request in batch["requests"]
        ],
        lora_request=lora,
        use_tqdm=False,
    )
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(completion: Any) -> dict[str, Any]:
    ids, logps = list(completion.token_ids), None
    if completion.logprobs is not None:
        logps = [at[token].logprob for at, token in zip(completion.logprobs, ids, strict=True)]
    return {"token_ids": ids, "logps": logps, "finish_reason": completion.finish_reason}


def _end_with_parent() -> None:
    """Nobody reads the answers once the parent is gone, and the memory of a GPU is wanted elsewhere."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGTERM), 0, 0, 0)


if __name__ == "__main__":
    main()
