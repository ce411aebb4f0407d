"""The groups of settings for rounds of generate, judge, pair, train: sampling and judging."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from prefopt import registry


@dataclass(frozen=True)
class RoundsConfig:
    """Rounds of generate, judge, pair, train. The policy at a round's start samples, and is the round's reference."""

    count: int = 0
    """Rounds. 0: train once, on the pairs of data.train. Else its rows' prompts are what the policy is asked."""
    prompts: int | None = None
    """Prompts of a round; no prompt is used twice. None: an equal share of all."""
    eval_prompts: int = 64
    """Held-out prompts on which policies are compared after each round; 0: none. From data.eval if that is given."""
    shard: int = 32
    """Prompts per shard: the most that a killed stage does again."""
    pairs: Literal["best_worst", "data_worst", "data_sampled"] = "best_worst"
    """Chosen against rejected: the judge's first against its last; the data's own completion against the judge's last;
    or the data's own against a sampled one, which needs no judge."""
    max_similarity: float | None = None
    """Drop pairs whose sides share more than this of their tokens (0 to 1). None: only those that are equal."""
    resample: int = 3
    """Held-out prompts whose answer holds no response are asked again, at most so many times."""
    select_prompts: int = 0
    """Further held-out prompts: each round then keeps, of the policies at every eval.every steps, the one whose answers
    to them the judge scores best. 0: the last one."""
    compare: str | None = None
    """Folder of another run with the same held-out prompts, whose policies are compared with, round by round."""
    candidates: str | None = None
    """Folder of another run of rounds, whose candidates and scores are taken over where policy, prompts, sampling and
    judge agree, so that only what comes after is done again."""
    launcher: str = ""
    """What scripts/rounds.py starts each train stage with, e.g. "accelerate launch --num_processes 8". None: python."""


@dataclass(frozen=True)
class GenerateConfig:
    """How completions are sampled: in rounds, and at evaluations where eval.generate asks for samples."""

    engine: str = field(default="transformers", metadata={"kinds": registry.ENGINES})
    """Inference engine: a file of prefopt/generation, or a dotted path to a module of your own."""
    n: int = 5
    """Completions per prompt."""
    temperature: float = 1.0
    """Of the softmax; 0 takes the most likely token."""
    top_p: float = 1.0
    """Share of the probability that is kept, from the most likely token down."""
    top_k: int = 0
    """Tokens that are kept, from the most likely down; 0: all."""
    max_tokens: int = 512
    """Most tokens of a completion."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion beside the model's own terminators."""
    logprobs: bool = False
    """Keep the log-probability of each token."""
    batch: int = 64
    """transformers: completions per forward pass."""
    continuous: bool = False
    """transformers: continuous batching, for completions of very different length."""
    python: str | None = None
    """vllm: Python of the environment that holds it. None: this one."""
    tensor_parallel: int = 1
    """vllm: GPUs that share one copy of the model."""
    replicas: int = 1
    """vllm: copies of the model, each in a process of its own."""
    args: dict[str, Any] = field(default_factory=dict)
    """vllm: further arguments of its LLM class, e.g. `--generate.args.gpu_memory_utilization 0.8`."""
    url: str | None = None
    """openai: the server, e.g. http://localhost:8000/v1."""
    served_model: str | None = None
    """openai: name of the policy on the server. None: its folder, which the server must then list as a model."""
    api_key_env: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key, if the server wants one."""
    concurrency: int = 16
    """openai: requests at the same time."""
    retries: int = 5
    """openai: attempts after the first one, with growing pauses."""
    timeout: float = 300.0
    """openai: seconds until a request counts as lost."""

    def __post_init__(self) -> None:
        if self.engine != type(self).engine:
            registry.ENGINES.check(self.engine)


@dataclass(frozen=True)
class JudgeConfig:
    """The judge that ranks the completions of rounds. It sees prompt and response, never a thought."""

    kind: str | None = field(default=None, metadata={"kinds": registry.JUDGES})
    """The judge: a file of prefopt/judges, or a dotted path to a module of your own. None: the testbed's own on the
    testbed; it must be named elsewhere."""
    args: dict[str, Any] = field(default_factory=dict)
    """Settings of the judge's own, as its class declares them, e.g. `--judge.args.NAME VALUE`."""
    path: str | None = None
    """reward_model, pairwise: folder or hub id. function: module:callable. llm: `policy` asks the round's policy."""
    mode: Literal["pairwise", "score"] = "pairwise"
    """llm: a verdict on two responses, asked in both orders, or a score of each."""
    scale: tuple[float, ...] = (1.0, 10.0)
    """llm, mode score: the lowest and the highest score; another one is not counted as an answer."""
    reward_scale: float | Literal["std"] = 1.0
    """Factor on scores and logits before the sigmoid that makes win probabilities of them; std: 1 / their standard
    deviation among the responses of a prompt, over a round. For judges whose scores lie close together."""
    template: str | None = None
    """llm: file with the question that is asked. None: the one that comes with prefopt for this mode."""
    batch: int = 16
    """reward_model, pairwise: texts per forward pass."""
    max_length: int | None = None
    """reward_model, pairwise: most tokens of a text. None: what the model has positions for, or its tokenizer names."""
    trust_remote_code: bool = False
    """reward_model, pairwise: run model code that comes with the weights."""
    url: str | None = None
    """llm: a server with OpenAI's interface, e.g. http://localhost:8000/v1."""
    model: str | None = None
    """llm: name of the model on the server. None: the only one it serves."""
    api_key_env: str = "OPENAI_API_KEY"
    """llm with a url: environment variable that holds the key, if the server wants one."""
    temperature: float = 0.0
    """llm: of the judge's own answers."""
    max_tokens: int = 512
    """llm: most tokens of an answer of the judge."""
    concurrency: int = 16
    """llm with a url: requests at the same time."""
    retries: int = 3
    """llm with a url: attempts after the first one, with growing pauses."""
    timeout: float = 120.0
    """llm with a url, function: seconds until an attempt, or a call, counts as lost."""

    def __post_init__(self) -> None:
        if self.kind not in (None, "none"):
            registry.JUDGES.check(self.kind)


ROUND_GROUPS = ("rounds", "generate", "judge")


SAMPLES_READ = ("temperature", "top_p", "top_k", "max_tokens", "stop", "batch")  # of `generate`, by eval.generate
