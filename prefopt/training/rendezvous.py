"""The rendezvous of a run's ranks, registered with torch as an init method: a bounded wait, then an error of one line.

torch's `env://` has two problems that this module avoids. It waits forever if another program listens at the port. And
when torchrun restarts ranks after a failure, they read stale addresses of the previous attempt from the store that its
agent keeps (https://github.com/pytorch/pytorch/issues/135712). Here each attempt uses a random prefix in the store.
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
_PAUSE = 0.1  # seconds between two attempts to connect
_HINT = "choose another port for all ranks: MASTER_PORT, accelerate's --main_process_port or torchrun's --master_port"


def init_method(seconds: float) -> str:
    """The `init_method` of `init_process_group` for this rendezvous. Args: seconds: how long ranks wait."""
    _register()
    return f"{_SCHEME}://?seconds={seconds}"


@functools.cache  # torch refuses to register a scheme twice
def _register() -> None:
    from torch.distributed.rendezvous import register_rendezvous_handler

    register_rendezvous_handler(_SCHEME, _handler)


def _handler(url: str, **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    yield shared_store(rank, world, float(parse_qs(urlparse(url).query)["seconds"][0])), rank, world


def shared_store(rank: int, world: int, seconds: float) -> Store:
    """A store that the ranks of this attempt share, without keys of earlier attempts. All ranks must call it together.

    Raises: RendezvousError, one line: on rank 0 if other ranks do not join within these seconds, on others if rank 0
        does not answer.
    """
    from torch.distributed import DistError, TCPStore

    who, until = f"rank {rank} of {world} on {socket.gethostname()}", time.monotonic() + seconds
    host, port = _address(who)
    # under torchrun with this variable the agent hosts the store, otherwise rank 0 does
    hosts_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosts_store:
        _check_free(who, host, port)
    else:
        _wait_for_listener(who, host, port, seconds)

    def joined() -> Store:
        left = timedelta(seconds=max(1.0, until - time.monotonic()))
        store = TCPStore(host, port, world, hosts_store, left, wait_for_workers=False, multi_tenant=True)
        return _attempt_store(store, rank, world, until)

    try:
        return _run_until(until, joined)
    except (DistError, TimeoutError) as error:
        others = str(error) if isinstance(error, _MissingRanks) else "rank 0 of this run does not answer there"
        raise RendezvousError(
            f"{who} waited {seconds:g} s at {host}:{port}: {others}; start all ranks with the same MASTER_ADDR and "
            "MASTER_PORT, or raise the time limit (--train.rendezvous_timeout)"
        ) from error


class _MissingRanks(TimeoutError):
    """Some ranks did not join in time."""


def _address(who: str) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host:
        raise RendezvousError(f"{who}: MASTER_ADDR is not set, expected the address of rank 0's node")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise RendezvousError(f"{who}: MASTER_PORT: found '{port}', expected a port from 1 to 65535")
    return host, int(port)


def _check_free(who: str, host: str, port: int) -> None:
    """Check, before rank 0 starts the store, that it can. Raises: RendezvousError if it cannot listen at the port."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise RendezvousError(
            f"{who}: MASTER_ADDR: '{host}' cannot be resolved ({error.strerror}), expected the name or address of "
            "rank 0's node"
        ) from error
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise RendezvousError(
            f"{who}: cannot listen at port {port} ({os.strerror(error.errno or 0)}); {_HINT}"
        ) from error


def _wait_for_listener(who: str, host: str, port: int, seconds: float) -> None:
    """Wait until rank 0 listens, which may start later than other ranks. Raises: RendezvousError after the limit."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, until - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise RendezvousError(
                    f"{who} cannot reach rank 0 at {host}:{port} within {seconds:g} s ({error.strerror or error}); "
                    "start it there, with the same MASTER_ADDR and MASTER_PORT for all ranks, or raise the time limit "
                    "(--train.rendezvous_timeout)"
                ) from error
        time.sleep(_PAUSE)


def _attempt_store(store: Store, rank: int, world: int, until: float) -> Store:
    """The store under a random prefix chosen by rank 0, so that it holds no key of an earlier attempt.

    Every other rank sets a random nonce, reads the prefix that rank 0 stores under this nonce, and confirms it. A nonce
    left by a killed rank is answered too, but never confirmed, so rank 0 waits for the nonce of the live rank.
    """
    from torch.distributed import PrefixStore

    if rank != 0:
        nonce = uuid.uuid4().hex
        store.set(f"word/{rank}", nonce)
        name = store.get(f"name/{nonce}").decode()
        store.set(f"{name}/confirmed/{rank}", "")
        return PrefixStore(name, store)
    name, missing = uuid.uuid4().hex, [*range(1, world)]
    while missing := [other for other in missing if not store.check([f"{name}/confirmed/{other}"])]:
        for other in missing:
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", name)
        if time.monotonic() > until:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise _MissingRanks(f"rank {', '.join(map(str, missing[:8]))}{more} did not join")
        time.sleep(_PAUSE / 10)
    return PrefixStore(name, store)


def _run_until(until: float, work: Callable[[], _T]) -> _T:
    """The result of `work`, run on a thread: once connected, torch's store client may wait without a limit.

    Raises: TimeoutError after the deadline; the thread keeps running, so the process must end.
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
    # two more seconds, so that an error with more detail is raised before this timeout
    thread.join(max(0.0, until - time.monotonic()) + 2)
    for error in failed:
        raise error
    if not done:
        raise TimeoutError
    return done[0]
