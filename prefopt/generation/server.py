"""A server with OpenAI's interface: requests side by side, tried again while that can help, given up in one line.

For engines and judges alike. Knows the `openai` client, which is imported when a server is met and not before.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any, TypeVar

from prefopt.errors import ConfigError, RoundError

if TYPE_CHECKING:
    import openai

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_AGAIN = (408, 409, 425, 429)  # and 5xx: what a second attempt may mend
_LONGEST_PAUSE = 30.0  # seconds
_ABOUT_LENGTH = re.compile(r"context|too long|too many tokens|maximum .*(length|tokens)", re.IGNORECASE)


def check_server(url: str | None, group: str) -> None:
    """Refuse what cannot be asked, before anything is loaded. Args: group: of the settings, `generate` or `judge`.

    Raises: ConfigError naming the setting.
    """
    if url is None or not url.startswith(("http://", "https://")):
        found = "none" if url is None else f"'{url}'"
        raise ConfigError(f"{group}.url: found {found}, expected the server's address, e.g. http://localhost:8000/v1")
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(
            f"{group}: a server is asked through the 'openai' package, which is not installed "
            "(pip install 'prefopt[openai]')"
        )


class TimedOut(RoundError):
    """A request whose last attempt took too long, where others may not."""


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
        timeout: seconds until a request counts as lost, and the longest pause that a server may ask for.
    """

    def __init__(
        self, url: str, *, group: str, api_key_env: str, concurrency: int, retries: int, timeout: float
    ) -> None:
        import openai

        self.url, self.group = url, group
        self._key_env, self._concurrency, self._retries, self._timeout = api_key_env, concurrency, retries, timeout
        self._given_up = threading.Event()
        self._chance = random.Random()  # not the run's
        key = os.environ.get(api_key_env) or "none"  # the client wants one, most servers of one's own do not
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=timeout)

    def models(self) -> list[Any]:
        """The models that it serves, each with an `id`."""
        return list(self.ask(lambda client: client.models.list()).data)

    def ask(self, request: Callable[[openai.OpenAI], _Result]) -> _Result:
        """The answer to a request.

        Raises: RoundError when the server refuses it, or has failed on every attempt; TimedOut if the last was late;
            TooLong where it says so of the prompt.
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
            except openai.APIConnectionError as error:
                found = _reason(error)
            except (openai.APIResponseValidationError, ValueError) as error:
                found = f"an answer that cannot be read: {_reason(error)}"
            if self._given_up.is_set():
                break
            if attempt < self._retries:
                self._given_up.wait(pause)
        raise failure(
            f"{self.group}.url: {self.url} does not answer after {attempt + 1} attempts ({found}), expected a running "
            "server; what is done is kept: start it and run the same command again"
        )

    def map(self, work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
        """`work` done for each item, several at the same time; results in order. The first error ends all of it."""
        pool = ThreadPoolExecutor(self._concurrency)
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            self.close()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Give up what is under way."""
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
        mend = "" if error.status_code != 404 or self.url.rstrip("/").endswith("/v1") else " (should it end in /v1?)"
        return RoundError(f"{self.group}.url: {self.url} refuses the request ({found}){mend}")


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    text = body.get("message") if isinstance(body, dict) else None
    return textwrap.shorten(str(text or error.message), 200, placeholder=" ...")


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error: the client wraps what the network said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")


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
    except ValueError:
        return 0.0
