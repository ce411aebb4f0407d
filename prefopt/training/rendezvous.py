"""Where the processes of a run meet: one address, a bounded wait, and one line when they do not come together.

torch's own way (env://) waits for ever where another program listens at the port. And where torchrun starts processes
again after one died, they find the addresses of those before in the store that its agent keeps
(https://github.com/pytorch/pytorch/issues/135712). Here each attempt has a name of its own, whatever the agents count.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlparse

from prefopt.errors import RendezvousError

if TYPE_CHECKING:
    from torch.distributed import Store

_T = TypeVar("_T")
_SCHEME = "prefopt"
_PAUSE = 0.1  # seconds between two looks
_MEND = (
    "name another one for all of them: MASTER_PORT, or accelerate's --main_process_port, or torchrun's --master_port"
)


def init_method(seconds: float) -> str:
    """What `init_process_group` takes to meet like this. Args: seconds: that processes wait for each other."""
    _register()
    return f"{_SCHEME}://?seconds={seconds}"


@functools.cache  # torch refuses a second time
def _register() -> None:
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(_SCHEME, _handler)


def _handler(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    yield meet(rank, world, float(parse_qs(urlparse(url).query)["seconds"][0])), rank, world


def meet(rank: int, world: int, seconds: float) -> Store:
    """A store that the processes of this attempt share, and nobody else. On every process together.

    Raises: RendezvousError, one line, on a process that does not find all others, or process 0, within these seconds.
    """
    from torch.distributed import DistError, TCPStore

    who, until = f"process {rank} of {world} on {socket.gethostname()}", time.monotonic() + seconds
    host, port = _address(who)
    # torchrun's agent keeps the store for its processes, and says so; else the first process does
    mine = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if mine:
        _check_free(who, host, port)
    else:
        _wait_for_listener(who, host, port, seconds)

    def joined() -> Store:
        left = timedelta(seconds=max(1.0, until - time.monotonic()))
        store = TCPStore(host, port, world, mine, left, wait_for_workers=False, multi_tenant=True)
        return _named(store, rank, world, until)

    try:
        return _within(until, joined)
    except (DistError, TimeoutError) as error:
        others = str(error) if isinstance(error, _Missing) else "process 0 of this run does not answer there"
        raise RendezvousError(
            f"{who} waited {seconds:g} s at {host}:{port}: {others}; start all of them with the same MASTER_ADDR and "
            "MASTER_PORT, or give them longer (--train.rendezvous_timeout)"
        ) from error


class _Missing(TimeoutError):
    """Processes that did not come."""


def _address(who: str) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host:
        raise RendezvousError(f"{who}: MASTER_ADDR is not set, expected the address of process 0's node")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise RendezvousError(f"{who}: MASTER_PORT: found '{port}', expected a port from 1 to 65535")
    return host, int(port)


def _check_free(who: str, host: str, port: int) -> None:
    """Before the first process listens. Raises: RendezvousError where it cannot."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise RendezvousError(
            f"{who}: MASTER_ADDR: '{host}' cannot be resolved ({error.strerror}), expected the name or address of "
            "process 0's node"
        ) from error
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise RendezvousError(
            f"{who}: cannot listen at port {port} ({os.strerror(error.errno or 0)}); {_MEND}"
        ) from error


def _wait_for_listener(who: str, host: str, port: int, seconds: float) -> None:
    """The others may be sooner than the first process, or than its name. Raises: RendezvousError."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RendezvousError(
                    f"{who} cannot reach process 0 at {host}:{port} within {seconds:g} s ({error.strerror or error}); "
                    "expected it running there, and the same MASTER_ADDR and MASTER_PORT for all (or give it longer, "
                    "--train.rendezvous_timeout)"
                ) from error
        time.sleep(_PAUSE)


def _named(store: Store, rank: int, world: int, until: float) -> Store:
    """The store under a name that the first process draws, in which there is nothing of an attempt before this one.

    Each other process leaves a word that it draws, is answered with the name under that word, and confirms it. A word
    that a killed process left is answered too, but nobody confirms.
    """
    from torch.distributed import PrefixStore

    if rank != 0:
        word = uuid.uuid4().hex
        store.set(f"word/{rank}", word)
        name = store.get(f"name/{word}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
        return PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, [*range(1, world)]
    while missing := [other for other in missing if not store.check([f"{name}/confirmed/{other}"])]:
        for other in missing:
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", name)
        if time.monotonic() > until:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise _Missing(f"process {', '.join(map(str, missing[:8]))}{more} did not come")
        time.sleep(_PAUSE / 10)
    return PrefixStore(name, store)


def _within(until: float, work: Callable[[], _T]) -> _T:
    """The result of `work`, on a thread, since a client of torch's has no limit once something has let it connect.

    Raises: TimeoutError; the thread is then left behind, and the process must end.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, until - time.monotonic()) + 2)  # what knows more says it first
    for error in failed:
        raise error
    if not done:
        raise TimeoutError
    return done[0]
