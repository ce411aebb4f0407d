"""A small server with OpenAI's interface over a model of transformers, which can be told to fail.

    with OpenAIServer(lm, tokenizer, name="policy") as server:
        server.url                    # http://127.0.0.1:PORT/v1
        server.fail("500", "cut")     # what becomes of the next two requests
        server.drops.add("n")         # what it ignores without a word from now on
        server.requests               # (path, body) of all that were asked

`/v1/models`, `/v1/completions` (prompt as token ids or text, n, seed, temperature, top_p, top_k, max_tokens, stop,
stop_token_ids, logprobs, return_token_ids) and `/v1/chat/completions`, whose answers come from the model, or from
`answer(messages, body) -> str`. Completion i of a request draws with seed + i.
"""

from __future__ import annotations

import copy
import json
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prefopt.generation.base import Sampling

FAULTS = ("429", "500", "503", "401", "cut", "half", "slow", "garbage", "page", "fewer", "no_logprobs", "no_token_ids")
FAULTS += ("no_index", "filtered", "beyond")


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are what these tests are about."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(*_)


class OpenAIServer:
    """Serves while its `with` block lasts.

    Args:
        lm, tokenizer: a model; None where only `answer` is asked.
        name: of the model, as `/v1/models` lists it.
        answer: what the assistant says to chat messages; None: what the model says.
        key: the only API key that is taken; None: any.
        max_model_len: the model's positions, as vLLM tells them; chat messages of as many words are refused. None: not
            told, and prompts that leave too little of what the model has are refused.
    """

    def __init__(
        self,
        lm: Any = None,
        tokenizer: Any = None,
        *,
        name: str = "policy",
        answer: Callable[[list[dict[str, str]], dict[str, Any]], str] | None = None,
        key: str | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self.tokenizer, self.name, self.answer, self.key = tokenizer, name, answer, key
        self.max_model_len = max_model_len
        self.drops: set[str] = set()
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.retry_after: str | None = None
        self.front = False  # whether there is a page wherever there is nothing else
        self.slow = 30.0  # seconds
        self.holds = threading.Event()  # set while a slow answer is under way
        self._faults: deque[str] = deque()
        self._lock = threading.Lock()
        self._engine = None
        if lm is not None:
            from prefopt.generation.transformers_engine import TransformersEngine

            # as real ones do, it ends where generation config and tokenizer say, whatever the template writes
            bare = copy.deepcopy(tokenizer)
            bare.chat_template = None
            self._engine = TransformersEngine(lm, bare)
        self._done = threading.Event()
        self._http = _Quiet(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def positions(self) -> int:
        """Of a prompt and its answer together."""
        return self.max_model_len or self._engine.context

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def fail(self, *faults: str) -> None:
        """The next requests for completions fail so, one each, of FAULTS; "" answers one of them properly."""
        unknown = set(faults) - {*FAULTS, ""}
        assert not unknown, f"unknown fault {unknown}, expected one of {FAULTS}"
        self._faults.extend(faults)

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    # What is answered ---------------------------------------------------------------------------------------------

    def completions(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        choices = []
        for completion in self._generate(prompt, body):
            tokens = self.tokenizer.convert_ids_to_tokens(list(completion.token_ids))
            logprobs = {"tokens": tokens, "token_logprobs": completion.logps, "top_logprobs": None, "text_offset": []}
            asked = body.get("logprobs") is not None and "logprobs" not in self.drops
            choice = {"text": completion.text, "finish_reason": completion.finish_reason}
            choice |= {"logprobs": logprobs if asked else None}
            if body.get("return_token_ids") and "return_token_ids" not in self.drops:
                choice["token_ids"] = list(completion.token_ids)
            choices.append(choice)
        return {"object": "text_completion", "choices": choices}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.answer is not None:
            texts = [self.answer(body["messages"], body) for _ in range(self._n(body))]
            ended = ["stop"] * len(texts)
        else:
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            done = self._generate(ids, body)
            texts, ended = [c.text for c in done], [c.finish_reason for c in done]
        choices = [
            {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for text, reason in zip(texts, ended, strict=True)
        ]
        return {"object": "chat.completion", "choices": choices}

    def _n(self, body: dict[str, Any]) -> int:
        return 1 if "n" in self.drops else body.get("n") or 1

    def _generate(self, prompt: list[int], body: dict[str, Any]) -> list[Any]:
        assert self._engine is not None, "this server has no model"
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        limit = None if "max_tokens" in self.drops else body.get("max_tokens") or body.get("max_completion_tokens")
        sampling = Sampling(
            n=self._n(body),
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            top_k=max(0, body.get("top_k") or 0),
            max_tokens=limit or 16,
            stop=(*stop, *map(self.tokenizer.convert_ids_to_tokens, body.get("stop_token_ids") or [])),
            logprobs=True,
        )
        with self._lock:
            return self._engine.generate([prompt], sampling, [body.get("seed") or 0])[0]

    # HTTP ---------------------------------------------------------------------------------------------------------

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                if self.path != "/v1/models" and server.front:
                    return self._send(200, {}, "page")
                if self.path != "/v1/models":
                    return self._problem(404, f"no such path {self.path}")
                model = {"id": server.name, "object": "model", "created": 0, "owned_by": "tests"}
                if server.max_model_len is not None:
                    model["max_model_len"] = server.max_model_len
                self._send(200, {"object": "list", "data": [model]})

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                data = self.rfile.read(size)
                if len(data) < size:  # the client has hung up
                    self.close_connection = True
                    return None
                body = json.loads(data)
                with server._lock:
                    server.requests.append((self.path, body))
                    fault = server._faults.popleft() if server._faults else ""
                    if fault == "slow":
                        server.holds.set()
                answers = {"/v1/completions": server.completions, "/v1/chat/completions": server.chat}
                if self.path not in answers:
                    return self._problem(404, f"no such path {self.path}")
                if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                    return self._problem(401, "wrong key")
                if body["model"] != server.name:
                    return self._problem(404, f"the model {body['model']} does not exist")
                words = sum(len(message["content"].split()) for message in body.get("messages", ()))
                if server.max_model_len is not None and words >= server.max_model_len:
                    return self._problem(400, f"This model's maximum context length is {server.max_model_len} tokens.")
                asked = len(body.get("prompt", "")) + body.get("max_tokens", 0)
                if self.path == "/v1/completions" and asked > server.positions:
                    return self._problem(400, f"This model's maximum context length is {server.positions} tokens.")
                if fault.isdigit():
                    return self._problem(int(fault), "told to fail")
                if fault == "cut":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                if fault == "slow":
                    server._done.wait(server.slow)
                    server.holds.clear()
                answer = answers[self.path](body)
                if fault == "fewer":
                    answer["choices"].pop()
                for index, choice in enumerate(answer["choices"]):
                    choice["index"] = None if fault == "no_index" else index
                    if fault == "no_token_ids":
                        del choice["token_ids"]
                    if fault == "beyond":
                        choice["token_ids"] = [99999999]
                    if fault == "no_logprobs":
                        choice["logprobs"] = None
                    if fault == "filtered":
                        choice["finish_reason"] = "content_filter"
                answer |= {"id": "answer", "created": 0, "model": server.name}
                return self._send(200, answer, fault)

            def _problem(self, status: int, message: str) -> None:
                self._send(status, {"error": {"message": message, "code": status}})

            def _send(self, status: int, answer: dict[str, Any], fault: str = "") -> None:
                broken = {"garbage": b"{ no JSON", "page": b"<html>Welcome!</html>"}
                data = broken.get(fault, json.dumps(answer).encode())
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if fault == "page" else "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status in (429, 503) and server.retry_after is not None:
                    self.send_header("Retry-After", server.retry_after)
                self.end_headers()
                if fault == "half":
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.wfile.write(data)

        return Handler
