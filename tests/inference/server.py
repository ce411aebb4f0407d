"""A server with OpenAI's interface whose policy says what a function says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tests.openai_server import OpenAIServer


class ScriptedServer(OpenAIServer):
    """Answers completions by `say(prompt text, number of the sample, seed)`.

    Args: delay: seconds that a request takes.
    """

    def __init__(self, tokenizer: Any, say: Callable[[str, int, int], str], *, name: str, delay: float = 0.0) -> None:
        super().__init__(tokenizer=tokenizer, name=name, max_model_len=4096)
        self.say, self.delay = say, delay

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.delay)
        text, choices = self.tokenizer.decode(body["prompt"], skip_special_tokens=True), []
        for number in range(body["n"]):
            said = self.say(text, number, body["seed"])
            ids = [*self.tokenizer(said, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
            cut = len(ids) > body["max_tokens"]
            ids = ids[: body["max_tokens"]]
            choice = {"text": said, "finish_reason": "length" if cut else "stop", "logprobs": None}
            choices.append(choice | {"token_ids": ids})
        return {"object": "text_completion", "choices": choices}

    @property
    def seeds(self) -> list[int]:
        """Of all requests but the engine's first one, which asks what the server can do."""
        return [body["seed"] for _, body in self.requests if body["max_tokens"] > 1]
