"""The groups of settings for rounds of generate, judge, pair, train. The string under a field is its `--help` text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings.ranges import Group, ranged

ROUND_GROUPS = ("rounds", "generate", "judge")
# Settings of `generate` that samples at evaluations (eval.generate) also use.
EVAL_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens", "stop", "batch")


@dataclass(frozen=True)
class RoundsConfig(Group):
    """Iterative training in rounds of generate, judge, pair, train. A round's initial policy samples the completions
    and is the round's reference."""

    prefix = "rounds."

    count: int = ranged(0, at_least=0, at_most=99)
    """Number of rounds. 0: train once, on the pairs of data.train. Otherwise the policy answers the prompts of
    data.train."""
    prompts: int | None = ranged(None, at_least=1)
    """Prompts per round; every prompt is used in one round only. None: all prompts, split evenly over the rounds."""
    eval_prompts: int = ranged(64, at_least=0)
    """Number of held-out prompts on which policies are compared after each round, from data.eval if given. 0: none."""
    shard: int = ranged(32, at_least=1)
    """Prompts per shard: an interrupted stage repeats at most one shard."""
    pairs: Literal["best_worst", "data_worst", "data_sampled"] = "best_worst"
    """How pairs are built. best_worst: chosen and rejected are the judge's best and worst completion. data_worst: the
    data's completion against the judge's worst. data_sampled: the data's completion against a sampled one, unjudged."""
    max_similarity: float | None = ranged(None, above=0, at_most=1)
    """Drop pairs whose completions share more than this fraction of their tokens. None: drop only identical ones."""
    resample: int = ranged(3, at_least=0)
    """Maximum retries for a held-out prompt whose completion contains no response."""
    select_prompts: int = ranged(0, at_least=0)
    """Number of further held-out prompts for choosing a round's checkpoint: the policy whose answers the judge scores
    best among those at every eval.every steps. 0: the final one."""
    compare: str | None = None
    """Output folder of another run with the same held-out prompts; its policies are compared round by round."""
    candidates: str | None = None
    """Output folder of another run of rounds whose candidates and scores are reused wherever policy, prompts, sampling
    and judge are the same."""
    launcher: str = ""
    """Command with which scripts/rounds.py starts each train stage, e.g. "accelerate launch --num_processes 8".
    Empty: python."""


@dataclass(frozen=True)
class GenerateConfig(Group):
    """Sampling of completions, in rounds and for eval.generate. Engine-specific settings name their engine first."""

    prefix = "generate."

    engine: str = field(default="transformers", metadata={"kinds": registry.ENGINES})
    """Inference engine, or the dotted path of a module with your own."""
    n: int = ranged(5, at_least=1)
    """Completions per prompt."""
    temperature: float = ranged(1.0, at_least=0)
    """Softmax temperature; 0 decodes greedily."""
    top_p: float = ranged(1.0, above=0, at_most=1)
    """Nucleus sampling: cumulative probability of the most likely tokens to sample from; 1 turns it off."""
    top_k: int = ranged(0, at_least=0)
    """Number of most likely tokens to sample from; 0 turns it off."""
    max_tokens: int = ranged(512, at_least=1)
    """Maximum tokens of a completion."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to the model's EOS and end-of-turn tokens."""
    logprobs: bool = False
    """Store the log-probability of each sampled token."""
    batch: int = ranged(64, at_least=1)
    """transformers: completions per forward pass."""
    continuous: bool = False
    """transformers: continuous batching, for completions of very different lengths."""
    python: str | None = None
    """vllm: Python executable of the environment that vLLM is installed in. None: this environment."""
    tensor_parallel: int = ranged(1, at_least=1)
    """vllm: GPUs per model replica (tensor parallelism)."""
    replicas: int = ranged(1, at_least=1)
    """vllm: model replicas, each in its own process (data parallelism)."""
    args: dict[str, Any] = field(default_factory=dict)
    """vllm: extra argument KEY of vLLM's LLM class, e.g. `--generate.args.gpu_memory_utilization 0.8`."""
    url: str | None = None
    """openai: base URL of the server, e.g. http://localhost:8000/v1."""
    served_model: str | None = None
    """openai: name of the policy on the server. None: the policy's folder, which the server must list as a model."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the API key, if the server requires one."""
    concurrency: int = ranged(16, at_least=1)
    """openai: maximum concurrent requests."""
    retries: int = ranged(5, at_least=0)
    """openai: retries of a failed request, with exponential backoff."""
    timeout: float = ranged(300.0, above=0)
    """openai: seconds after which a request fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine != type(self).engine:
            registry.ENGINES.check(self.engine)
        if not all(self.stop):
            raise self.error("stop", f"found {list(self.stop)!r}, expected strings of at least one character")
        check_variable_name(self.api_key_env, self.error)


@dataclass(frozen=True)
class JudgeConfig(Group):
    """The judge that ranks completions in rounds. It receives prompt and response, never a thought. Settings of one
    kind of judge name it first."""

    prefix = "judge."

    kind: str | None = field(default=None, metadata={"kinds": registry.JUDGES})
    """Kind of judge, or the dotted path of a module with your own. None: the testbed's judge on the testbed; otherwise
    a judge must be named."""
    args: dict[str, Any] = field(default_factory=dict)
    """Argument KEY of the judge, as its class declares it, e.g. `--judge.args.KEY VALUE`."""
    path: str | None = None
    """reward_model, pairwise: folder or Hub id. function: module:callable. llm: `policy` uses the round's policy."""
    mode: Literal["pairwise", "score"] = "pairwise"
    """llm: compare two responses, in both orders, or score each response."""
    scale: tuple[float, ...] = (1.0, 10.0)
    """llm, mode score: lowest and highest score; answers outside of this range count as failed."""
    reward_scale: float | Literal["std"] = 1.0
    """Factor on score differences before the sigmoid that gives win probabilities. std: 1 / the standard deviation of
    scores within a prompt, over the round; for judges with closely spaced scores."""
    template: str | None = None
    """llm: file with the judge's prompt template. None: prefopt's template for the mode."""
    batch: int = ranged(16, at_least=1)
    """reward_model, pairwise: sequences per forward pass."""
    max_length: int | None = None
    """reward_model, pairwise: maximum tokens of a sequence. None: the limit of the model or its tokenizer."""
    trust_remote_code: bool = False
    """reward_model, pairwise: execute model code that is distributed with the weights."""
    url: str | None = None
    """llm: base URL of a server with an OpenAI-compatible API, e.g. http://localhost:8000/v1."""
    model: str | None = None
    """llm: model name on the server. None: the only model that it serves."""
    api_key_env: str = "OPENAI_API_KEY"
    """llm with a url: environment variable that holds the API key, if the server requires one."""
    temperature: float = ranged(0.0, at_least=0)
    """llm: softmax temperature of the judge's answers; 0 decodes greedily."""
    max_tokens: int = ranged(512, at_least=1)
    """llm: maximum tokens of the judge's answer."""
    concurrency: int = ranged(16, at_least=1)
    """llm with a url: maximum concurrent requests."""
    retries: int = ranged(3, at_least=0)
    """llm with a url: retries of a failed request, with exponential backoff."""
    timeout: float = ranged(120.0, above=0)
    """llm with a url, function: seconds after which a request, or a call of the function, fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in (None, "none"):
            registry.JUDGES.check(self.kind)
        check_variable_name(self.api_key_env, self.error)


def check_variable_name(name: str, error: Any) -> None:
    """Refuse an API key given in place of the variable that holds it, without repeating it in the message."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        problem: ConfigError = error("api_key_env", "expected the name of an environment variable (value not shown)")
        raise problem
