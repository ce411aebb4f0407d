"""What stands at a name: folders and their splits, and what is no file."""

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from prefopt.data import sources
from prefopt.data.encode import encode_file
from prefopt.data.rows import RowReader, read_rows
from prefopt.errors import DataError

GOOD = {"prompt": "p:", "chosen": " a", "rejected": " b"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Makes files with a row each, whose prompt is the file's name."""
    monkeypatch.chdir(tmp_path)

    def folder(*names):
        for name in names:
            path = Path("d", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({**GOOD, "prompt": name}).encode() + b"\n"
            path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)

    return folder


def asked(name):
    return [row.prompt for row in read_rows(name).rows]


def refused(name):
    with pytest.raises(DataError) as error:
        read_rows(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_folder_when_it_holds_shards_of_six_splits_then_a_split_is_a_whole_name(folder):
    names = [
        f"data/{a}_{b}-{i:05d}-of-00002.jsonl"
        for a in ("train", "test")
        for b in ("gen", "prefs", "sft")
        for i in (0, 1)
    ]
    folder(*names)
    assert asked("d:train_prefs") == ["data/train_prefs-00000-of-00002.jsonl", "data/train_prefs-00001-of-00002.jsonl"]
    listed = "test_gen, test_prefs, test_sft, train_gen, train_prefs, train_sft"
    assert refused("d") == f"d: the folder has several splits ({listed}); choose one: d:train_prefs"
    assert refused("d:train") == f"d:train: no split 'train' in this folder; it has {listed}; choose one: d:train_prefs"


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        (["train.jsonl", "train_sft.jsonl", "test.jsonl"], "train", ["train.jsonl"]),
        (["train-part1.jsonl", "train-part2.jsonl", "dev.jsonl"], "train", ["train-part1.jsonl", "train-part2.jsonl"]),
        (["hh_train.jsonl", "hh_test.jsonl"], "hh_test", ["hh_test.jsonl"]),
        (["valid/part-0.jsonl", "train/part-0.jsonl"], "validation", ["valid/part-0.jsonl"]),
        (["harmless-base/train.jsonl.gz", "harmless-base/test.jsonl.gz"], "test", ["harmless-base/test.jsonl.gz"]),
        (["train/part-00000-of-00001.jsonl", "test/part-00000-of-00001.jsonl"], "test",
         ["test/part-00000-of-00001.jsonl"]),
        (["train_v1.jsonl", "train_v2.jsonl"], "train_v2", ["train_v2.jsonl"]),
        (["a.jsonl", "b.csv.gz", ".cache/train.jsonl", "dataset_infos.json", "latest.txt"], "", None),
    ],
)  # fmt: skip
def test_folder_when_split_is_named_then_no_other_is_read(folder, names, split, read):
    folder(*names)
    if read is None:
        assert [file.name for file in sources.open_source("d").files] == ["d/a.jsonl", "d/b.csv.gz"]
        return
    assert "several splits" in refused("d")
    assert asked(f"d:{split}") == read


def test_folder_when_shards_are_missing_or_a_file_is_there_twice_then_it_is_refused(folder):
    folder("data/train-00000-of-00003.jsonl", "data/train-00002-of-00003.jsonl")
    assert refused("d") == ("d/data/train-00001-of-00003: missing, expected all 3 shards (download it again)")
    folder("data/train-00001-of-00003.jsonl")
    assert len(asked("d")) == 3
    folder("data/train-00000-of-00001.jsonl")
    assert refused("d").startswith("d/data/train: shards of 1 and of 3 files, expected those of one download")
    folder("e/train.jsonl", "e/train.jsonl.gz")
    assert refused("d/e") == "d/e: train.jsonl and train.jsonl.gz are one file in two formats, expected one of them"


def test_folder_when_a_file_cannot_be_read_then_it_is_never_left_out_in_silence(folder, monkeypatch):
    folder("a.jsonl")
    Path("d/b.jsonl").symlink_to("nowhere")
    assert refused("d") == "d/b.jsonl: a link to a file that is not there (needed for d)"
    Path("d/b.jsonl").unlink()
    os.mkfifo("d/b.jsonl")
    assert refused("d").startswith("d/b.jsonl: a FIFO (a pipe), which can be read only once, expected a file or folder")
    Path("d/b.jsonl").unlink()
    Path("d/below").mkdir()
    Path("d/below/above").symlink_to("..")
    assert asked("d") == ["a.jsonl"]
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert refused("d") == "d/below: cannot be read: Permission denied"


def test_name_when_it_is_no_file_then_one_line_says_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert refused("socket") == "socket: a socket, expected a file or folder"
    assert refused("pipe").startswith("pipe: a FIFO (a pipe), which can be read only once")
    assert refused("/dev/zero") == "/dev/zero: a device, expected a file or folder"
    assert refused("/proc/self/mem") == "/proc/self/mem: cannot be read: Input/output error"
    assert refused("x" * 300 + ".jsonl").endswith("...: cannot be read: File name too long")
    assert refused("a\0b.jsonl") == "'a\\x00b.jsonl': a name with a NUL character, expected a file or folder"
    assert refused("~nobody_here/x.jsonl").startswith("~nobody_here/x.jsonl: could not determine home directory")


def test_place_of_a_row_when_a_split_is_named_then_is_a_path_and_a_row(folder, tokenizer):
    folder("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    with Path("d/data/train-00000-of-00001.jsonl").open("a") as file:
        file.write("{\n")
    settings = {"max_length": 20, "on_bad_row": "skip", "cache_dir": "cache"}
    for _ in range(2):  # from the file, then from the cache
        encoded = encode_file("d:train", tokenizer, **settings)
        assert [pair.where for pair in encoded.pairs] == ["d/data/train-00000-of-00001.jsonl:1"]
        assert encoded.report.examples == {"broken JSON": ("d/data/train-00000-of-00001.jsonl:2",)}
    Path("d").rename("e")
    assert [pair.where for pair in encode_file("e:train", tokenizer, **settings).pairs] == [
        "e/data/train-00000-of-00001.jsonl:1"
    ]


def test_folder_when_its_readme_names_configurations_then_they_are_never_mixed(folder):
    folder("main/train-00000-of-00001.jsonl", "more/train-00000-of-00001.jsonl")
    assert RowReader("d").unread.notes(chat=False) == ["files of 2 folders are read as one source: main, more"]
    configs = [("main", "main/train-*"), ("more", "more/train-*"), ("all", "*/train-*")]
    for named, mixed in ((configs[:2], False), (configs, True)):
        lines = "".join(
            f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}\n" for name, path in named
        )
        Path("d/README.md").write_text(f"---\nlicense: mit\nconfigs:\n{lines}---\n# Pairs\n")
        if mixed:
            assert len(asked("d")) == 2
        else:
            assert refused("d:train") == (
                "d:train: the folder has several configurations (main, more) according to its README.md; give the "
                "folder of one, or its files separated by commas: d/main"
            )
            assert asked("d/main:train") == ["main/train-00000-of-00001.jsonl"]
    Path("d/README.md").write_text("---\nconfigs: [\n---\n")
    assert len(asked("d")) == 2


def test_folder_when_datasets_has_saved_into_one_below_then_that_one_is_named(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([GOOD]).save_to_disk("d/saved")
    assert refused("d").endswith("; datasets.save_to_disk has written d/saved: give that folder")
    assert asked("d/saved") == ["p:"]
