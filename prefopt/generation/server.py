"""A server with OpenAI's interface: requests side by side, tried again while that can help, given up in one line.

For inference engines and judges. Knows the `openai` client, which is imported when a server is met and not before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import random
import re
import textwrap
import threading
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from time import time
from typing import TYPE_CHECKING, Any, TypeVar

from prefopt.errors import ConfigError, RoundError
from prefopt.generation import bounded
from prefopt.redaction import named_variable, printable

if TYPE_CHECKING:
    import openai

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_AGAIN = (408, 409, 425, 429)  # and 5xx: what a second attempt may fix
_LONGEST_PAUSE = 30.0  # seconds
_OTHER_FORM = (ValueError, AttributeError, TypeError, KeyError, OverflowError, RecursionError)
_ABOUT_LENGTH = re.compile(r"context|too long|too many tokens|maximum .*(length|tokens)", re.IGNORECASE)


def check_server(url: str | None, group: str) -> None:
    """Refuse what cannot be asked, before anything is loaded. Args: group: of the settings, `generate` or `judge`.

    Raises: ConfigError naming the setting.
    """
    if url is None or not url.startswith(("http://", "https://")):
        found = "none" if url is None else f"'{url}'"
        raise ConfigError(f"{group}.url: found {found}, expected the server's address, e.g. http://localhost:8000/v1")
    if any(mark in url for mark in "@?#"):
        raise ConfigError(
            f"{group}.url: found a user, a query or a fragment in it, and settings are written beside the results, "
            f"expected the address alone (a key is read from the environment variable that {group}.api_key_env names)"
        )
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(
            f"{group}: a server is asked through the 'openai' package, which is not installed "
            "(pip install 'prefopt[openai]')"
        )


class TimedOut(RoundError):
    """A request whose last attempt took too long, where others may not."""


class UnreadableAnswer(RoundError):
    """A request whose last answer could not be read, where others may be."""


class TooLong(RoundError):
    """A request whose prompt leaves the model no position for an answer, where others may."""


class Server:
    """A server and the patience one has with it.

    Args:
        url: its address, with `/v1`.
        group: of the settings that name it, `generate` or `judge`; complaints begin with it.
        api_key_env: environment variable that holds the key, if there is one.
        concurrency: requests at the same time.
        retries: attempts after the first one. Pauses double from half a second, by chance up to a half shorter, and
            are never shorter than the server asks for.
        timeout: seconds until a request counts as lost that has not been answered whole, and the longest pause that a
            server may ask for.
    """

    def __init__(
        self, url: str, *, group: str, api_key_env: str, concurrency: int, retries: int, timeout: float
    ) -> None:
        import openai

        self.url, self.group = url, group
        self._key_env, self._concurrency, self._retries, self._timeout = api_key_env, concurrency, retries, timeout
        self._given_up = threading.Event()
        self._chance = random.Random()  # not the run's
        named_variable(api_key_env)
        key = os.environ.get(api_key_env, "")
        http = bounded.client(url, timeout, key if len(key) >= 8 else None)
        # the client wants a key, most servers of one's own do not
        self._client = openai.OpenAI(
            base_url=url, api_key=key or "none", max_retries=0, timeout=timeout, http_client=http
        )

    def models(self) -> dict[str, int | None]:
        """The names of the models that it serves, each with its positions where the server states them."""

        def request(client: openai.OpenAI) -> dict[str, int | None]:
            served = {}
            for model in client.models.list().data:
                name = read(model.id, "a model's id", str)
                served[name] = read(getattr(model, "max_model_len", None), "max_model_len", int, None)
                if not 0 < (served[name] or 1) < 2**31:
                    raise ValueError(f"max_model_len is {served[name]}")
            return served

        return self.ask(request)

    def ask(self, request: Callable[[openai.OpenAI], _Result]) -> _Result:
        """What a request gives. It must read of the answer what it needs, so that one of another form fails here.

        Raises: RoundError when the server refuses it, or has failed on every attempt; TimedOut if the last was late,
            UnreadableAnswer if its answer was of another form; TooLong where the prompt does not fit.
        """
        import openai

        for attempt in range(self._retries + 1):
            pause, failure = min(_LONGEST_PAUSE, 0.5 * 2**attempt) * self._chance.uniform(0.5, 1), RoundError
            try:
                return request(self._client)
            except openai.APIStatusError as error:
                if error.status_code not in _AGAIN and error.status_code < 500:
                    raise self._refused(error) from None
                found, asked = f"{error.status_code}: {_message(error)}", _retry_after(error.response.headers)
                if asked > self._timeout:
                    raise RoundError(
                        f"{self.group}.url: {self.url} asks to wait {asked:.0f} s ({found}), longer than "
                        f"{self.group}.timeout; run the same command again then"
                    ) from None
                pause = max(pause, asked)
            except openai.APITimeoutError:
                failure = TimedOut
                found = f"no answer within {self._timeout:g} s"
            # newer clients let what the transport raises through, older ones wrap it
            except (openai.APIConnectionError, *bounded.RAISED) as error:
                found, cause = _reason(error), _bottom(error)
                if isinstance(cause, bounded.NotJSON):
                    raise RoundError(
                        f"{self.group}.url: {self.url} gave an answer of another form ({found}), expected the "
                        f"JSON of OpenAI's interface{self._hint()}"
                    ) from None
                if isinstance(cause, bounded.Elsewhere):
                    raise RoundError(
                        f"{self.group}.url: {self.url} is not where the answers come from: {found}, expected the "
                        "address of the server itself"
                    ) from None
                if isinstance(cause, bounded.Unusable):
                    failure = UnreadableAnswer
            # JSON of something else, with fields of other types, or nested without end
            except (openai.APIResponseValidationError, *_OTHER_FORM) as error:
                found, failure = f"an answer that cannot be read: {_reason(error)}", UnreadableAnswer
            if self._given_up.is_set():
                break
            if attempt < self._retries:
                self._given_up.wait(pause)
        raise failure(
            f"{self.group}.url: {self.url} does not answer after {attempt + 1} attempts ({found}), expected a running "
            "server; finished work is not lost: start it and run the same command again"
        )

    def map(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`work` done for each item, several at the same time; results in order. The first error ends all of it."""
        waiting: SimpleQueue[int] = SimpleQueue()
        done: SimpleQueue[tuple[int, _Result] | BaseException] = SimpleQueue()
        for at in range(len(items)):
            waiting.put(at)

        def go_on() -> None:
            with contextlib.suppress(Empty):
                while not self._given_up.is_set():
                    at = waiting.get_nowait()
                    try:
                        done.put((at, work(items[at])))
                    except BaseException as error:
                        done.put(error)
                        return

        results: dict[int, _Result] = {}
        try:
            # not a pool's threads: the process would wait for them at its end, as long as a server holds a request
            for _ in range(min(self._concurrency, len(items))):
                threading.Thread(target=go_on, daemon=True).start()
            while len(results) < len(items):
                one = done.get()
                if isinstance(one, BaseException):
                    raise one
                results[one[0]] = one[1]
        except BaseException:
            self.close()
            raise
        return [results[at] for at in range(len(items))]

    def close(self) -> None:
        """Try nothing again, and let the connections go once no request is under way on one."""
        self._given_up.set()
        self._client.close()

    def _refused(self, error: openai.APIStatusError) -> RoundError:
        found = f"{error.status_code}: {_message(error)}"
        if error.status_code in (401, 403):
            return RoundError(
                f"{self.group}.api_key_env: {self.url} refuses the key ({found}), expected one that it takes in the "
                f"environment variable {self._key_env}"
            )
        if error.status_code in (400, 413, 422) and _ABOUT_LENGTH.search(found):
            return TooLong(f"{self.group}.url: {self.url} refuses a prompt as too long ({found})")
        hint = self._hint() if error.status_code == 404 else ""
        return RoundError(f"{self.group}.url: {self.url} refuses the request ({found}){hint}")

    def _hint(self) -> str:
        return "" if self.url.rstrip("/").endswith("/v1") else " (should it end in /v1?)"


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    return _short(text if isinstance(text, str) and text else error.message)


def _reason(error: BaseException) -> str:
    """The innermost cause of an error: the client wraps that of the network."""
    error = _bottom(error)
    return _short(str(error) or type(error).__name__)


def _bottom(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _short(text: str) -> str:
    """The beginning of a server's words. Secrets go first, lest one be cut and then not be known as one."""
    return textwrap.shorten(printable(text[:100_000]), 200, placeholder=" ...")


def read(value: Any, what: str, *kinds: type | None) -> Any:
    """A value of an answer as it stands there. Raises: ValueError where it is of another kind than those named."""
    fits = (None if value is None else type(value)) in kinds
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{what} is {repr(value)[:100] if isinstance(value, (int, float)) else type(value).__name__}")
    return value


def _retry_after(headers: Any) -> float:
    """Seconds that the server asks to wait, given as such or as a date; 0 if it does not."""
    value = headers.get("retry-after")
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
