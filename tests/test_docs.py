"""Fenced command blocks of README and docs do what they say: they are run, at the size that a comment above them names.

`<!-- test: FLAGS -->` appends flags to each train command of the block, in place of those that it has; `ARGS="..."`
hands them to make; `run` runs the block as it stands; `dry_run` adds that flag; `skip, REASON` is for what needs a
network, a GPU or a scheduler. A block without a comment is an error, but for the test command itself.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import byte_bpe_tokenizer, tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- test: (?P<how>[^\n]*?) -->\n)?```bash\n(?P<body>.*?)```", re.DOTALL)


SLOW = "slow"  # begins the comment above a block that `make test-all` alone runs


def blocks():
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            how = match["how"]
            marks = [pytest.mark.slow] if how and how.startswith(SLOW) else []
            how = how and how.removeprefix(SLOW).strip()
            yield pytest.param(page, how, match["body"], id=f"{page.relative_to(ROOT)}-{number}", marks=marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a clone, with the model and the files that the pages speak of."""
    place = tmp_path_factory.mktemp("clone")
    for name in (
        "scripts",
        "configs",
        "examples",
        "benchmarks",
        "prefopt",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):
        (place / name).symlink_to(ROOT / name)
    lines = [
        f'{{"prompt": "say {i}", "chosen": " it is number {i}", "rejected": " no {i * 7 % 11}", '
        '"chosen_win_prob": 0.8, "rejected_win_prob": 0.3}\n'
        for i in range(24)
    ]
    (place / "pairs.jsonl").write_text("".join(lines[:16]))
    (place / "heldout.jsonl").write_text("".join(lines[16:]))
    tokenizer = byte_bpe_tokenizer(lines)
    torch.manual_seed(0)
    tiny_llama(len(tokenizer)).save_pretrained(place / "path/to/model")
    tokenizer.save_pretrained(place / "path/to/model")
    yield place
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.parametrize(("page", "how", "body"), list(blocks()))
def test_a_command_block_does_what_the_page_says(page, how, body, place, server, tmp_path):
    if body.strip() in ("make test", "make test-all"):
        return
    assert how, f"{page.name}: a command block without a `<!-- test: ... -->` line above it:\n{body}"
    if how.startswith("skip,"):
        assert len(how) > len("skip, ") + 5, "name the reason"
        return
    extra = "" if how == "run" else "--dry_run true" if how == "dry_run" else how.replace("{tmp}", str(tmp_path))
    commands = re.sub(r"\\\n\s*", " ", body).strip().splitlines()
    ready = f"{sys.prefix}/.ready"
    for number, command in enumerate(commands):
        command = command.partition("  #")[0].strip()
        if command.startswith("make "):
            command = (
                f"{command} VENV={sys.prefix} -o {ready} {extra.replace('--output', '--train.threads 1 --output')}"
            )
        elif "train" in command and extra:
            for flag in re.findall(r"--[\w.]+", extra):
                command = re.sub(rf" {re.escape(flag)} \S+", "", command)
            command = f"{command} {extra}{number}" if "--output" in extra else f"{command} {extra}"
        if command.startswith("python "):  # as the interpreter would run it, but for the imports, which are there
            ended = server.python(shlex.split(command)[1:], place)
            assert ended.status == 0, f"{command}\n{ended.out[-2000:]}\n{ended.err[-2000:]}"
            continue
        env = os.environ | {
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PREFOPT_CACHE": str(server.cache),
        }
        done = subprocess.run(command, shell=True, cwd=place, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
