"""A server that sends, request by request, the bytes that a test has written, as slowly as it says."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any


def http(body: bytes | str, *headers: str, status: str = "200 OK", kind: str = "application/json") -> bytes:
    """A whole answer."""
    data = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", "Connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


def chat(content: Any = "hi", **other: Any) -> str:
    """The body of an answer to chat messages."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"id": "a", "created": 0, "model": "m", "object": "chat.completion", "choices": [choice | other]})


class RawServer:
    """Serves while its `with` block lasts; the last answer is given to all further requests.

    Args: answers: what is sent. drip: seconds between its bytes, from byte `after` on; None: all at once.
    """

    def __init__(self, *answers: bytes, drip: float | None = None, after: int = 0) -> None:
        self.answers, self.drip, self.after = answers, drip, after
        self.requests: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._done = threading.Event()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._socket.close()

    def _serve(self) -> None:
        while not self._done.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(30)
            got = b""
            while b"\r\n\r\n" not in got:
                got += connection.recv(65536)
            head, _, body = got.partition(b"\r\n\r\n")
            size = next((int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-l")), 0)
            while len(body) < size:
                body += connection.recv(65536)
            number = len(self.requests)
            self.requests.append(got)
            answer = self.answers[min(number, len(self.answers) - 1)]
            try:
                if self.drip is None:
                    connection.sendall(answer)
                    return
                connection.sendall(answer[: self.after])
                for byte in answer[self.after :]:
                    if self._done.wait(self.drip):
                        return
                    connection.sendall(bytes([byte]))
            except OSError:
                pass
