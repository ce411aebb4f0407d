"""The terminal of the `infer` command: typed prompts, printed answers, warnings and the progress bar."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefopt.redaction import printable
from prefopt.thoughts import Answer

if TYPE_CHECKING:
    from prefopt.inference.answers import Answered
    from prefopt.inference.test_time_po import Progress
    from prefopt.inference.trace import Trace


def typed_lines() -> Iterator[str]:
    """Lines of the terminal, or of what is piped into it, that are not empty; ends at Ctrl-D and Ctrl-C."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return
        except UnicodeDecodeError:
            warn("refused: prompt: is not text")
            continue
        if line.strip():
            yield line.strip()


def warn(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def print_answered(one: Answered, shows: bool, name: bool = False) -> None:
    if name:
        print(f"[{printable(one.prompt.where)}]")
    if one.answer is None:
        print(f"gave up: {printable(one.gave_up)}", flush=True)
        return
    print_answer(one.answer, shows)


def print_best(trace: Trace, shows: bool) -> None:
    best = trace.best
    if best is None:
        print("no response with a score", flush=True)
        return
    assert best.text is not None, "it has a score"
    print_answer(Answer(best.thought, best.text), shows)


def print_answer(answer: Answer, shows: bool) -> None:
    """Print the text without characters that would control a terminal. Files hold each character."""
    if shows and answer.thought:
        print(f"[thought]\n{printable(answer.thought, lines=True, joiners=True)}\n[response]")
    print(printable(answer.response, lines=True, joiners=True), flush=True)


@contextmanager
def progress_bar(total: int, unit: str, shown: bool = True) -> Iterator[Progress]:
    """A bar on stderr; several threads may advance it."""
    from tqdm import tqdm

    lock = threading.Lock()
    seconds = 0.2 if os.isatty(2) else 10
    with tqdm(total=total, unit=unit, disable=not shown, mininterval=seconds, dynamic_ncols=True) as bar:

        def advance(phase: str, samples: int) -> None:
            with lock:
                bar.set_description(phase, refresh=False)
                bar.update(samples)

        yield advance
