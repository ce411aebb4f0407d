"""Completions from a server with OpenAI's interface. Prompts go as token ids, so that BOS and template stay exact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.config import GenerateConfig, ModelConfig
from prefopt.engine.adapters import Weights
from prefopt.engine.runtime import versions
from prefopt.errors import RoundError
from prefopt.generation.base import Capabilities, Sampling, limits
from prefopt.generation.ends import Ends, terminators_of
from prefopt.generation.server import Server
from prefopt.types import Completion


class OpenAIEngine:
    """A policy that a server has.

    Which of its fields a server honours is asked of it once, in a request for two completions of one token, and
    counted again in every answer: several servers drop `n` and `logprobs` without a word.

    Args:
        settings: with the address of the server.
        weights, model, tokenizer: of the policy, which the server must list as `served_model` or by its folder's path.

    Raises: RoundError when the server cannot be reached, has another model, or drops `n`.
    """

    def __init__(self, settings: GenerateConfig, weights: Weights, model: ModelConfig, tokenizer: Any) -> None:
        assert settings.url is not None, "`check` has been called"
        self.tokenizer = tokenizer
        self._terminators = terminators_of(weights, model, tokenizer)
        self._server = Server(
            settings.url,
            group="generate",
            api_key_env=settings.api_key_env,
            concurrency=settings.concurrency,
            retries=settings.retries,
            timeout=settings.timeout,
        )
        try:
            self._model, self.context = self._find(settings.served_model, weights.path)
            probe = Sampling(n=2, max_tokens=1, logprobs=settings.logprobs)
            choices = self._ask([min(self._terminators, default=0)], probe, 1, 0, Ends(tokenizer, ()))
        except BaseException:
            self.close()
            raise
        self.capabilities = Capabilities(
            seeded=False,  # it is sent seeds; what it makes of them is its own
            logprobs=settings.logprobs and all(_logprobs(choice) is not None for choice in choices),
            token_ids=all(_token_ids(choice) is not None for choice in choices),
            in_ranks=False,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order; each prompt is one request, with its seed.

        Raises: RoundError when the server cannot be reached, refuses, or gives less than was asked for.
        """
        if sampling.logprobs and not self.capabilities.logprobs:
            raise RoundError(f"generate.logprobs: {self._server.url} gives none, expected one for each token")
        if sampling.stop and not self.capabilities.token_ids:
            raise RoundError(
                f"generate.stop: {self._server.url} gives no token ids, so a stop text cannot be told from the model's "
                "own terminator, expected a server that does, such as vLLM's (or leave it out)"
            )
        room = limits(prompts, self.context, sampling.max_tokens)
        ends = Ends(self.tokenizer, self._terminators, sampling.stop)

        def ask(p: int) -> list[Completion]:
            choices = self._ask(list(prompts[p]), sampling, room[p], seeds[p], ends)
            return [self._completion(choice, sampling, room[p], ends) for choice in choices]

        return self._server.map(ask, range(len(prompts)))

    def describe(self) -> dict[str, Any]:
        """Name, server and model; where the token ids come from."""
        return {
            "engine": "openai",
            "url": self._server.url,
            "served_model": self._model,
            "token_ids": "the server's" if self.capabilities.token_ids else "the text's, encoded again",
            "versions": {"openai": versions(("openai",))["openai"]},
        }

    def close(self) -> None:
        """Let the connections go."""
        self._server.close()

    def _find(self, name: str | None, path: str) -> tuple[str, int | None]:
        """(the policy's name on the server, the positions it has there if the server says so)."""
        served = {str(model.id): model for model in self._server.models()}
        wanted = path if name is None else name
        for id, model in served.items():
            if id == wanted or (name is None and Path(path).is_dir() and Path(id).resolve() == Path(path).resolve()):
                return id, getattr(model, "max_model_len", None)
        raise RoundError(
            f"generate.served_model: {self._server.url} serves {', '.join(served) or 'nothing'}, expected '{wanted}'; "
            f"start it with the policy {path}"
        )

    def _ask(self, prompt: list[int], sampling: Sampling, limit: int, seed: int, ends: Ends) -> list[Any]:
        """The choices of one request, as many as were asked for."""
        # Fields beyond OpenAI's own, and those for which servers take defaults from the model's generation config.
        extra: dict[str, Any] = {
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "return_token_ids": True,
        }
        if ends.stop_tokens:
            extra["stop_token_ids"] = list(ends.stop_tokens)
        optional: dict[str, Any] = {"stop": list(ends.texts)} if ends.texts else {}
        if sampling.logprobs:
            optional["logprobs"] = 1
        answer = self._server.ask(
            lambda client: client.completions.create(
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
        )
        choices = sorted(getattr(answer, "choices", None) or [], key=lambda choice: choice.index)
        if len(choices) != sampling.n:
            raise RoundError(
                f"generate.n: {self._server.url} gave {len(choices)} of {sampling.n} completions of a prompt, expected "
                "all of them (this server drops `n`; vLLM's does not)"
            )
        return choices

    def _completion(self, choice: Any, sampling: Sampling, limit: int, ends: Ends) -> Completion:
        if choice.finish_reason not in ("stop", "length"):
            raise RoundError(
                f"generate.url: {self._server.url} ended a completion with '{choice.finish_reason}', "
                "expected 'stop' or 'length'"
            )
        ids, logps = _token_ids(choice), _logprobs(choice) if sampling.logprobs else None
        stopped = choice.finish_reason == "stop"
        if ids is None:
            ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
            if stopped and self.tokenizer.eos_token_id is not None:
                ids = [*ids, self.tokenizer.eos_token_id]
        if sampling.logprobs and (logps is None or len(logps) != len(ids) or None in logps):
            found = "none" if logps is None else f"{sum(logp is not None for logp in logps)} for {len(ids)} tokens"
            raise RoundError(
                f"generate.logprobs: {self._server.url} gave {found}, expected one for each token of a completion "
                "(leave generate.logprobs out, or use a server that gives them with its token ids, such as vLLM's)"
            )
        if self.capabilities.token_ids and len(ids) > limit:
            raise RoundError(
                f"generate.max_tokens: {self._server.url} gave {len(ids)} tokens, expected at most {limit} "
                "(this server drops `max_tokens`)"
            )
        return ends.completion(ids, logps, stopped=stopped)


def _token_ids(choice: Any) -> list[int] | None:
    ids = getattr(choice, "token_ids", None)
    return None if ids is None else [int(token) for token in ids]


def _logprobs(choice: Any) -> list[float] | None:
    return None if choice.logprobs is None else choice.logprobs.token_logprobs
