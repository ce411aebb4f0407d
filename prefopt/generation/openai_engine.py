"""Completions from a server with OpenAI's interface. Prompts go as token ids, so that BOS and template stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from prefopt.errors import RoundError
from prefopt.generation.base import Done, Engine, EngineKind, PolicySource, Sampling, limits
from prefopt.generation.ends import Ends, end_tokens_of, positions_of, vocabulary_of
from prefopt.generation.server import Server, check_server, read
from prefopt.settings import GenerateConfig, ModelConfig
from prefopt.training import model_sources
from prefopt.training.model_sources import ModelSource
from prefopt.training.versions import versions
from prefopt.types import Completion

if TYPE_CHECKING:
    import openai


@dataclass(frozen=True)
class _Choice:
    """What is read of a completion in an answer."""

    text: str
    finish_reason: str | None
    token_ids: list[int] | None
    logps: Sequence[float | None] | None

    @classmethod
    def of(cls, choice: Any) -> _Choice:
        """The same of the client's choice. Raises: ValueError, AttributeError or TypeError for one of another form."""
        ids, logps = getattr(choice, "token_ids", None), getattr(choice.logprobs, "token_logprobs", None)
        if ids is not None and not all(0 <= read(token, "a token id", int) < 2**31 for token in ids):
            raise ValueError("a token id is out of all range")
        text = read(choice.text, "a completion's text", str)
        text.encode()  # half of a surrogate pair is no character, and no file could hold it
        return cls(
            text=text,
            finish_reason=read(choice.finish_reason, "finish_reason", str, None),
            token_ids=None if ids is None else [*ids],
            logps=None if logps is None else [read(logp, "a log-probability", float, int, None) for logp in logps],
        )


class OpenAIEngine(EngineKind):
    """A policy that a server has.

    Which of its fields a server honours is asked of it once, in a request for two completions of one token, and
    counted again in every answer: several servers drop `n` and `logprobs` without a word.

    Args:
        settings: with the address of the server.
        weights, model, tokenizer: of the policy, which the server must list as `served_model` or by its folder's path.

    Raises: RoundError when the server cannot be reached, has another model, or drops `n`.
    """

    reads: ClassVar[tuple[str, ...]] = ("url", "served_model", "api_key_env", "concurrency", "retries", "timeout")

    @classmethod
    def check(cls, settings: GenerateConfig) -> None:
        """See `EngineKind`."""
        check_server(settings.url, "generate")

    @classmethod
    def open(cls, settings: GenerateConfig, policy: PolicySource) -> Engine:
        """See `EngineKind`."""
        return cls(settings, model_sources.find(policy.path, policy.model), policy.model, policy.tokenizer)

    def __init__(self, settings: GenerateConfig, weights: ModelSource, model: ModelConfig, tokenizer: Any) -> None:
        assert settings.url is not None, "`check` has been called"
        self.tokenizer = tokenizer
        self._end_tokens = end_tokens_of(weights, model, tokenizer)
        self._rows = vocabulary_of(weights, model)
        self._server = Server(
            settings.url,
            group="generate",
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            retries=settings.retries,
            timeout=settings.timeout,
        )
        try:
            self._model, stated = self._find(settings.served_model, weights.path)
            self.context = stated or positions_of(weights, model)
            probe = Sampling(n=2, max_tokens=1, logprobs=settings.logprobs)
            choices = self._ask([min(self._end_tokens, default=0)], probe, 1, 0, Ends(tokenizer, ()))
        except BaseException:
            self.close()
            raise
        self._gives_logps = all(choice.logps is not None for choice in choices)  # if it was asked for them
        self._gives_ids = all(choice.token_ids is not None for choice in choices)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order; each prompt is one request, with its seed.

        `done` is called in the thread of the request.

        Raises: RoundError when the server cannot be reached, refuses, or gives less than was asked for.
        """
        if sampling.logprobs and not self._gives_logps:
            raise RoundError(f"generate.logprobs: {self._server.url} gives none, expected one for each token")
        if sampling.stop and not self._gives_ids:
            raise RoundError(
                f"generate.stop: {self._server.url} gives no token ids, so a stop text cannot be told from the model's "
                "own EOS token, expected a server that does, such as vLLM's (or leave it out)"
            )
        room = limits(prompts, self.context, sampling.max_tokens)
        ends = Ends(self.tokenizer, self._end_tokens, sampling.stop)

        def ask(p: int) -> list[Completion]:
            choices = self._ask(list(prompts[p]), sampling, room[p], seeds[p], ends)
            completions = [self._completion(choice, prompts[p], sampling, room[p], ends) for choice in choices]
            if done is not None:
                done(p, completions)
            return completions

        return self._server.map(ask, range(len(prompts)))

    def describe(self) -> dict[str, Any]:
        """Name, server and model; where the token ids come from."""
        return {
            "engine": "openai",
            "url": self._server.url,
            "served_model": self._model,
            "token_ids": "the server's" if self._gives_ids else "the text's, encoded again",
            "versions": {"openai": versions(("openai",))["openai"]},
        }

    def close(self) -> None:
        """Let the connections go."""
        self._server.close()

    def _find(self, name: str | None, path: str) -> tuple[str, int | None]:
        """(the policy's name on the server, the positions it has there if the server reports them)."""
        served = self._server.models()
        wanted = path if name is None else name
        for id, positions in served.items():
            if id == wanted or (name is None and Path(path).is_dir() and Path(id).resolve() == Path(path).resolve()):
                return id, positions
        raise RoundError(
            f"generate.served_model: {self._server.url} serves {', '.join(served) or 'nothing'}, expected '{wanted}'; "
            f"start it with the policy {path}"
        )

    def _ask(self, prompt: list[int], sampling: Sampling, limit: int, seed: int, ends: Ends) -> list[_Choice]:
        """The choices of one request, as many as were asked for."""
        # Fields beyond OpenAI's own, and those for which servers take defaults from the model's generation config.
        extra: dict[str, Any] = {
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
        }
        if ends.tokens:
            extra["stop_token_ids"] = sorted(ends.tokens)
        optional: dict[str, Any] = {"stop": list(ends.texts)} if ends.texts else {}
        if sampling.logprobs:
            optional["logprobs"] = 1

        def request(client: openai.OpenAI) -> list[_Choice]:
            answer = client.completions.create(
                model=self._model,
                prompt=prompt,
                n=sampling.n,
                seed=seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                extra_body=extra,
                **optional,
            )
            return [
                _Choice.of(choice)
                for choice in sorted(answer.choices, key=lambda choice: read(choice.index, "a choice's index", int))
            ]

        choices = self._server.ask(request)
        if len(choices) != sampling.n:
            raise RoundError(
                f"generate.n: {self._server.url} gave {len(choices)} of {sampling.n} completions of a prompt, expected "
                "all of them (this server drops `n`; vLLM's does not)"
            )
        return choices

    def _completion(
        self, choice: _Choice, prompt: Sequence[int], sampling: Sampling, limit: int, ends: Ends
    ) -> Completion:
        if choice.finish_reason not in ("stop", "length"):
            raise RoundError(
                f"generate.url: {self._server.url} ended a completion with '{choice.finish_reason}', "
                "expected 'stop' or 'length'"
            )
        ids, stopped = choice.token_ids, choice.finish_reason == "stop"
        beyond = next((token for token in ids or () if token >= self._rows), None)
        if beyond is not None:
            raise RoundError(
                f"generate.url: {self._server.url} gave token {beyond}, and the policy has {self._rows:,}; "
                "expected tokens of the policy (serve that model)"
            )
        if ids is None and self._gives_ids:
            raise RoundError(
                f"generate.url: {self._server.url} gave a completion without token ids, expected them with each, as it "
                "gave them at first"
            )
        if ids is None:
            ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
            # in a chat the one that ends the turns before
            end = next((token for token in reversed(prompt) if token in ends.tokens), self.tokenizer.eos_token_id)
            if stopped and end is not None:
                ids = [*ids, end]
        logps = [logp for logp in choice.logps or () if logp is not None]
        if sampling.logprobs and not len(ids) == len(logps) == len(choice.logps or ()):
            found = f"{len(logps)} for {len(ids)} tokens" if logps else "none"
            raise RoundError(
                f"generate.logprobs: {self._server.url} gave {found}, expected one for each token of a completion "
                "(leave generate.logprobs out, or use a server that gives them with its token ids, such as vLLM's)"
            )
        if self._gives_ids and len(ids) > limit:
            raise RoundError(
                f"generate.max_tokens: {self._server.url} gave {len(ids)} tokens, expected at most {limit} "
                "(this server drops `max_tokens`)"
            )
        return ends.completion(ids, logps if sampling.logprobs else None, stopped=stopped)
