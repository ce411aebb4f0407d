"""Render the terminal output of a command as an SVG without scripts. It generates docs/training_screen.svg:

    python benchmarks/screen.py docs/training_screen.svg -- \
        python scripts/train.py --method tdpo --eval.generate 2 --train.max_steps 100 --output runs/tdpo
"""

import fcntl
import html
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

COLUMNS, SIZE, LINE = 112, 12, 17
PAPER, INK, DIM, GREEN = "#1b1e24", "#d8dde3", "#8b95a1", "#9ad29a"


def typed(command):
    """The output of the command in a terminal of `COLUMNS` columns."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 60, COLUMNS, 0, 0))
        os.execvp(command[0], command)
    parts = []
    while True:
        try:
            parts.append(os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if not parts[-1]:
            break
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"the command ended with status {status}")
    return b"".join(parts).decode("utf-8", "replace")


def lines_of(text):
    """The final lines: text after a carriage return overwrites the line."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    out = []
    for line in text.replace("\r\n", "\n").split("\n"):
        cells = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        out.append("".join(cells).rstrip())
    return "\n".join(out).strip("\n").split("\n")


def svg(command, lines):
    """An SVG of the command and its output."""
    shown = [f"$ {command}", *lines]
    wide = [line[i : i + COLUMNS] for line in shown for i in range(0, max(1, len(line)), COLUMNS)]
    width, height = round(COLUMNS * SIZE * 0.602) + 32, LINE * len(wide) + 28
    rows = []
    for number, line in enumerate(wide):
        colour = GREEN if line.startswith("$ ") else DIM if line.startswith("  ") or "%|" in line else INK
        y = 26 + LINE * number
        rows.append(f'<text x="16" y="{y}" fill="{colour}" xml:space="preserve">{html.escape(line)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{SIZE}">\n'
        f"<title>{html.escape(command)}</title>\n"
        f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    command = sys.argv[3:]
    Path(sys.argv[1]).write_text(svg(" ".join(command), lines_of(typed(command))))
