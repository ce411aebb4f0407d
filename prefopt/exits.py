"""How every command ends: its exit status, one line for an error that a user can fix, a report file for any other."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import PrefoptError, TrainError
from prefopt.redaction import HIDDEN, guarded_output, hidden, names_a_secret, printable
from prefopt.training import launcher, versions

DEBUG = "PREFOPT_DEBUG"  # set to 1: tracebacks are printed too
_FAILED = 1
# Hints for errors of the operating system that a user can fix, where the error names the file.
_HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "expected a path that this user can read and write"),
    errno.ENAMETOOLONG: "expected a shorter name",
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP), "expected another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space and run the same command again"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "the disk or the file server failed; run the same command again"),
    **dict.fromkeys((errno.ENXIO, errno.ENODEV), "expected a regular file"),
}
_recorded: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("recorded")


def record_settings(settings: Mapping[str, Any], output: Path | None = None) -> None:
    """Record the command's settings and output folder, for the report of an unexpected error."""
    found = _recorded.get(None)
    if found is not None:
        found |= {"settings": settings, "output": output}


def exit_status(command: str, argv: Sequence[str], run: Callable[[], int]) -> int:
    """Run a command and turn its errors into an exit status. KeyboardInterrupt and SystemExit are not caught.

    Returns: the status of `run`; 2 for an error that a user can fix; 1 for any other error.
    """
    token = _recorded.set({})
    with guarded_output():
        try:
            return run()
        except PrefoptError as error:
            _debug(error)
            return launcher.print_error(error)
        except OSError as error:
            fix = _HINTS.get(error.errno or 0)
            if error.filename is None or fix is None:
                return _unexpected(command, argv, error)
            _debug(error)
            _print_line(str(TrainError(f"{_text(error.filename)}: {error.strerror}; {fix}")))
            return 2
        except Exception as error:
            return _unexpected(command, argv, error)
        finally:
            _recorded.reset(token)


def _text(name: Any) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else f"file descriptor {name}"


def _debug(error: BaseException) -> None:
    if os.environ.get(DEBUG, "") not in ("", "0"):
        print(_traceback(error), file=sys.stderr, flush=True)


def _traceback(error: BaseException) -> str:
    return printable("".join(traceback.format_exception(error)).rstrip(), lines=True)


def _unexpected(command: str, argv: Sequence[str], error: Exception) -> int:
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # so that Python does not write there when it exits
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _print_line("standard output or a connection was closed by the other end")
        return _FAILED
    _debug(error)
    path = _write(f"{_report(command, argv)}\n\n{_traceback(error)}\n")
    where = (
        f"a report is in {printable(path)}" if path else f"no report could be written; {DEBUG}=1 shows the traceback"
    )
    fix = ""
    if type(error).__name__ == "OutOfMemoryError":
        fix = "; GPU memory is exhausted; lower train.micro_batch, data.max_length or generate.batch"
    elif isinstance(error, MemoryError):
        fix = "; host memory is exhausted"
    found = printable(str(error).strip())[:300]
    _print_line(f"{command} failed: {type(error).__name__}{f': {found}' if found else ''} (unexpected; {where}){fix}")
    return _FAILED


def _print_line(line: str) -> None:
    """Print an error's line. Ranks other than 0 wait first, since a launcher ends all ranks when one has exited."""
    number = launcher.rank()
    if number:
        time.sleep(launcher.RANK_0_GRACE)
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {f'rank {number}: ' if number else ''}{line}", file=sys.stderr, flush=True)


def _report(command: str, argv: Sequence[str]) -> str:
    """Command, settings, versions and environment of the failed run, with secrets removed."""
    import yaml

    found = _recorded.get({})
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if name.startswith("-") and names_a_secret(name.lstrip("-")):
            if equals:
                arguments[i] = f"{name}={HIDDEN}"
            elif i + 1 < len(arguments):
                arguments[i + 1] = HIDDEN
    lines = [
        time.strftime("prefopt failed, %Y-%m-%d %H:%M:%S %z"),
        f"command: prefopt {command} {shlex.join(arguments)}",
        f"rank {launcher.rank()} of {launcher.world_size()}, process {os.getpid()}, folder {Path.cwd()}",
        "versions: "
        + ", ".join(f"{name} {version}" for name, version in versions.versions(("openai", "deepspeed")).items()),
    ]
    if found.get("settings"):
        lines += ["", "settings:", yaml.safe_dump(hidden(found["settings"]), sort_keys=False, allow_unicode=True)]
    return printable("\n".join(lines), lines=True)


def _write(text: str) -> str | None:
    """Write the report to the output folder, else to prefopt's cache, else to the folder for temporary files.

    Returns: its path; None where none of them can be written.
    """
    from prefopt.testbed.cache import cache_root

    output = _recorded.get({}).get("output")
    places = [output] if output is not None and output.is_dir() else []
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-rank{launcher.rank()}-{os.getpid()}.txt"
    for folder in (*places, cache_root() / "crashes", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return str((folder / name).absolute())
    return None
