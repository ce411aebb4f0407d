"""HTTP for the `openai` client whose answers end, in time and in size, and come from the server that was named.

It stands below the client, as the transport of its HTTP library. Knows nothing of OpenAI's interface.
"""

from __future__ import annotations

import importlib
import threading
import urllib.parse
import urllib.request
import zlib
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

LARGEST = 64 * 2**20  # bytes of an answer, as it comes and unpacked


class Unusable(Exception):
    """An answer that is not read: another attempt may give a better one."""


class Elsewhere(Exception):
    """The server sends its clients to another one, which is to see neither prompts nor a key."""


class NotJSON(Exception):
    """Something else is served at this address, such as a page."""


RAISED = (Unusable, Elsewhere, NotJSON)


def client(url: str, timeout: float, secret: str | None) -> Any:
    """The HTTP client that `openai.OpenAI(http_client=...)` takes.

    Args: url: the server's address. timeout: seconds for a whole request, from the first byte sent to the last one
        read. secret: an answer that repeats it is not read.
    """
    import openai

    library = importlib.import_module(openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0])
    transport: Any = _Bounded(library, url, timeout, secret)
    return openai.DefaultHttpxClient(transport=transport)


class _Bounded:
    """A transport. A request that is late is left behind, in a thread that ends when the connection does."""

    def __init__(self, library: Any, url: str, timeout: float, secret: str | None) -> None:
        self._library, self._timeout, self._secret = library, timeout, secret
        parts = urllib.parse.urlsplit(url)
        self._host = parts.hostname
        proxies = urllib.request.getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy is not None and urllib.request.proxy_bypass(parts.netloc):
            proxy = None
        self._inner = library.HTTPTransport(proxy=proxy, limits=library.Limits(max_keepalive_connections=100))
        self._under_way, self._closed, self._lock = 0, False, threading.Lock()

    def handle_request(self, request: Any) -> Any:
        """The answer to a request, read to its end. Raises: the library's ReadTimeout, or one of the above."""
        if request.url.host != self._host:
            raise Elsewhere(f"it redirects to another server, {request.url.host}")
        request.headers["Accept-Encoding"] = "gzip"
        box: SimpleQueue[Any] = SimpleQueue()
        late = monotonic() + self._timeout
        with self._lock:
            self._under_way += 1
        threading.Thread(target=self._fetch, args=(request, late, box), daemon=True).start()
        try:
            found = box.get(timeout=self._timeout)
        except Empty:
            raise self._library.ReadTimeout("no whole answer in time", request=request) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _fetch(self, request: Any, late: float, box: SimpleQueue[Any]) -> None:
        try:
            box.put(self._answer(request, late))
        except BaseException as error:
            box.put(error)
        finally:
            with self._lock:
                self._under_way -= 1
                last = self._closed and self._under_way == 0
            if last:
                self._inner.close()

    def _answer(self, request: Any, late: float) -> Any:
        response = self._inner.handle_request(request)
        parts, size = [], 0
        try:
            for part in response.stream:
                size += len(part)
                if size > LARGEST:
                    raise Unusable(f"an answer of more than {LARGEST:,} bytes")
                if monotonic() > late:
                    raise self._library.ReadTimeout("no whole answer in time", request=request)
                parts.append(part)
        finally:
            response.close()
        data = _unpacked(b"".join(parts), response.headers.get("content-encoding", "identity"))
        if 200 <= response.status_code < 300:
            kind = response.headers.get("content-type", "none").partition(";")[0].strip()
            if not kind.endswith("json"):
                raise NotJSON(f"its content type is {kind}")
            if self._secret is not None and self._secret.encode() in data:
                raise Unusable("an answer that repeats the API key")
        gone = (b"content-encoding", b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in gone]
        return self._library.Response(response.status_code, headers=headers, content=data)

    def close(self) -> None:
        """Let the connections go, once no request is under way: one that is being opened would stay open for good."""
        with self._lock:
            self._closed = True
            last = self._under_way == 0
        if last:
            self._inner.close()


def _unpacked(data: bytes, coding: str) -> bytes:
    """The answer's bytes, however it was packed. Raises: Unusable where it is too large, or not packed so."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return data
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise Unusable(f"an answer packed as {coding[:40]}, which was not asked for")
    out, rest = b"", data
    try:
        while rest:
            unpacker = zlib.decompressobj(wbits=47)  # gzip and zlib
            out += unpacker.decompress(rest, LARGEST + 1 - len(out))
            if len(out) > LARGEST or unpacker.unconsumed_tail:
                raise Unusable(f"an answer of more than {LARGEST:,} bytes, unpacked")
            if not unpacker.eof:
                raise Unusable("a packed answer that ends in the middle")
            rest = unpacker.unused_data
    except zlib.error as error:
        raise Unusable(f"an answer that is not packed as its header claims: {error}") from None
    return out
