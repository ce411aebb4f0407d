"""Data sources: a file, a folder of files, a saved dataset, a hub id; and the split of each.

A source yields (where, record or problem) for each row, and a hash of its content for the cache. Its `base` is the
prefix of all places of its rows.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from prefopt.data.bad_rows import short
from prefopt.data.containers import COMPRESSED, MAX_ROW_BYTES, SUFFIXES, Container, container, error_line, rows_of
from prefopt.data.content import file_hash
from prefopt.errors import DataError, did_you_mean
from prefopt.storage import running_hash, text_hash

_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
_SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLITS |= {"eval": "eval", "evaluation": "eval"}
# Metadata files of datasets and the hub.
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]{16})?")
_NUMBER = re.compile(r"(.*?[a-z])(?:[-_. ]+|[-_. ]*(?:part|shard|chunk)[-_. ]*)\d+", re.IGNORECASE)


class Files:
    """Files that are read one after the other.

    Args: base: prefix of the places of their rows.
    """

    def __init__(self, base: str, files: Sequence[Container], max_row_bytes: int) -> None:
        self.base, self.files, self.max_row_bytes = base, files, max_row_bytes

    def notes(self) -> list[str]:
        """Notes of the report about their folders."""
        folders = dict.fromkeys(str(file.path.parent) for file in self.files)
        names = [folder.removeprefix(self.base).strip("/") or "the folder itself" for folder in folders]
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        return [f"files of {len(names):,} folders are read as one source: {listed}"] if len(names) > 1 else []

    def content(self, memory: Path | None = None) -> str:
        """A hash of the files' content and containers; `memory` as in `file_hash`."""
        parts = [f"{file} {file.name.removeprefix(self.base)} {file_hash(file.path, memory)}" for file in self.files]
        return text_hash("\n".join(parts).encode(errors="surrogateescape"))

    def records(self) -> Iterator[tuple[str, object]]:
        for file in self.files:
            for number, item in file.records(self.max_row_bytes):
                yield f"{file.name}:{number}", item


class Table:
    """A `datasets.Dataset`, from a folder or from the hub."""

    def __init__(self, name: str, table: Any) -> None:
        self.base, self.table = name, table

    def notes(self) -> list[str]:
        """None: one split of a dataset is one table."""
        return []

    def content(self, memory: Path | None = None) -> str:
        """A hash of the rows, or of the files that they are mapped from."""
        files = [Path(file["filename"]) for file in self.table.cache_files]
        if files and self.table._indices is None:
            hashes = "\n".join(file_hash(file, memory) for file in files)
            return text_hash(f"arrow {len(self.table)}\n{hashes}")
        import pyarrow

        digest = _Digest()
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(digest, mode="w"), self.table.features.arrow_schema) as writer:
            for batch in self._batches():
                writer.write_table(batch)
        return digest.hexdigest()

    def records(self) -> Iterator[tuple[str, object]]:
        number = 0
        for batch in self._batches():
            for row in rows_of(batch):
                number += 1
                yield f"{self.base}:{number}", row

    def _batches(self) -> Iterator[Any]:
        """Tables of 256 rows, as they are stored: nothing is decoded."""
        return iter(self.table.with_format("arrow").iter(256))


class _Digest(io.RawIOBase):
    """A writable file that only hashes what is written to it."""

    def __init__(self) -> None:
        self._digest = running_hash()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def open_source(name: str, max_row_bytes: int = MAX_ROW_BYTES) -> Files | Table:
    """Open the source `name`: a file, a folder or a hub id, with `:split` after it where there are several.

    Raises: DataError when it does not exist or contains nothing that can be read.
    """
    path, split = _path(name), ""
    mode = _mode(path, name)
    if mode is None and ":" in name:
        base, split = name.rsplit(":", 1)
        path = _path(base)
        mode = _mode(path, name)
    if mode is None:
        base = name.rsplit(":", 1)[0]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not path.parent.is_dir() and path.suffix not in SUFFIXES:
            return _hub(name, base, split)
        raise DataError(f"{short(name)}: no such file or folder{_near_files(path)}")
    if stat.S_ISDIR(mode):
        return _folder(name, path, split, max_row_bytes)
    _refuse_unless_file(mode, name)
    if split:
        raise DataError(f"{name}: a file has no splits; give the file without a split: {path}")
    return Files(name, [container(path, name)], max_row_bytes)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # `~user` of an unknown user
        raise DataError(f"{name}: {str(error).rstrip('.').lower()}") from None


def _mode(path: Path, name: str) -> int | None:
    """The file mode at a path; None where nothing exists."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise DataError(f"{name!r}: a name with a NUL character, expected a file or folder") from None
    except OSError as error:
        raise DataError(f"{short(name)}: cannot be read: {error.strerror}") from None


def _refuse_unless_file(mode: int, name: str) -> None:
    """Raises: DataError for a path that is not a regular file, with its kind."""
    kinds = {
        stat.S_IFIFO: "a FIFO (a pipe), which can be read only once",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(mode):
        raise DataError(f"{name}: {kinds.get(stat.S_IFMT(mode), 'not a file')}, expected a file or folder")


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder '{short(str(path.parent))}' does not exist either"
    try:
        others = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, others, n=1, cutoff=0.6)
    return f"; did you mean '{path.parent / near[0]}'?" if near else ""


# Folders


def _folder(name: str, path: Path, split: str, max_row_bytes: int) -> Files | Table:
    saved = (path / "dataset_info.json").exists() and (path / "state.json").exists()
    if saved or (path / "dataset_dict.json").exists():
        import datasets

        try:
            table = datasets.load_from_disk(str(path))
        except Exception as error:
            raise DataError(f"{name}: cannot be read by datasets: {error_line(error)}") from None
        return Table(name, _one_split(name, table, split))
    found = _data_files(path, name)
    if not found:
        one = next(path.rglob("state.json"), None)
        hint = "" if one is None else f"; datasets.save_to_disk has written {one.parent}: give that folder"
        raise DataError(f"{name}: no data files in this folder, expected .jsonl or .parquet files{hint}")
    # train.jsonl beside test.jsonl must never be read as one file.
    splits = {file: _split_of(file.relative_to(path)) for file in found}
    known = sorted({s for s in splits.values() if s})
    if split:
        files = [file for file in found if splits[file] in (split, _SPLITS.get(split.lower(), split))]
        if not files:
            there = ", ".join(known) or "no splits"
            near = [other for other in known if split.lower() in re.split(r"[^a-z]+", other.lower())]
            which = f"; choose one: {path}:{_likeliest(near)}" if near else did_you_mean(split, known)
            raise DataError(f"{name}: no split '{split}' in this folder; it has {there}{which}")
    elif len(set(splits.values())) > 1:
        no_split = sum(not s for s in splits.values())
        beside = f" and {no_split:,} file{'s' * (no_split > 1)} without a split" if no_split else ""
        raise DataError(
            f"{name}: the folder has several splits ({', '.join(known)}){beside}; "
            f"choose one: {path}:{_likeliest(known)}"
        )
    else:
        files = found
    _refuse_shards_that_are_not_all(name, files)
    _refuse_several_configurations(name, path, files)
    return Files(str(path), [container(file, str(file)) for file in files], max_row_bytes)


def _likeliest(splits: Sequence[str]) -> str:
    """The split that is most likely meant for training on preferences."""
    return max(splits, key=lambda split: ("train" in split.lower(), "pref" in split.lower(), split))


def _data_files(path: Path, name: str) -> list[Path]:
    """The data files below a folder, without hidden ones, sorted by name.

    Raises: DataError where a folder cannot be listed, or a file is a broken link or not a regular file: its rows would
    be missing silently.
    """

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for folder, below, files in os.walk(path, onerror=unreadable, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:  # a link to a parent folder
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below[:] = sorted(one for one in below if not one.startswith("."))
        found += [Path(folder, file) for file in files if not file.startswith(".") and _stem(file) is not None]
    for file in found:
        mode = _mode(file, str(file))
        if mode is None:
            raise DataError(f"{file}: a link to a file that is not there (needed for {name})")
        _refuse_unless_file(mode, str(file))
    return sorted(found)


def _stem(file: str) -> str | None:
    """The name of a data file without its suffixes; None where it is not the name of a data file."""
    bare = file
    for suffix in COMPRESSED:
        bare = bare.removesuffix(suffix)
    stem, suffix = os.path.splitext(bare)
    return stem if suffix in SUFFIXES and file not in _METADATA else None


def _split_of(file: Path) -> str:
    """The split of a file in a folder: the whole name of the file, or of the nearest folder, that contains the word of
    a split. `data/train_prefs-00000-of-00001.parquet` is of `train_prefs`, `valid/part-3.jsonl` of `validation`."""
    stem = _stem(file.name) or ""
    for part in (stem, *reversed(file.parts[:-1])):
        numbered = _SHARD.fullmatch(part) or _NUMBER.fullmatch(part)
        whole = numbered[1] if numbered else part
        if {*re.split(r"[^a-z]+", whole.lower())} & {*_SPLITS}:
            return _SPLITS.get(whole.lower(), whole)
    shard = _SHARD.fullmatch(stem)
    return shard[1] if shard else ""


def _refuse_shards_that_are_not_all(name: str, files: Sequence[Path]) -> None:
    """Raises: DataError where a shard is missing, or a file is there in two formats."""
    shards: dict[tuple[Path, str], dict[str, set[str]]] = {}
    stems: dict[tuple[Path, str], Path] = {}
    for file in files:
        stem = _stem(file.name) or ""
        other = stems.setdefault((file.parent, stem), file)
        if other != file:
            raise DataError(f"{name}: {other.name} and {file.name} are one file in two formats, expected one of them")
        if shard := _SHARD.fullmatch(stem):
            shards.setdefault((file.parent, shard[1]), {}).setdefault(shard[3], set()).add(shard[2])
    for (folder, stem), by_number in shards.items():
        if len(by_number) > 1:
            counts = " and of ".join(str(int(of)) for of in sorted(by_number))
            raise DataError(f"{folder / stem}: shards of {counts} files, expected those of one download")
        ((of, there),) = by_number.items()
        missing = [f"{i:05d}" for i in range(int(of)) if f"{i:05d}" not in there]
        if missing:
            raise DataError(
                f"{folder / stem}-{missing[0]}-of-{of}: missing, expected all {int(of):,} shards (download it again)"
            )


def _refuse_several_configurations(name: str, path: Path, files: Sequence[Path]) -> None:
    """Raises: DataError where the README of a downloaded dataset assigns these files to several configurations."""
    patterns = _configurations(path / "README.md")
    places = [file.relative_to(path).as_posix() for file in files]
    mine = [{key for key, globs in patterns.items() if any(fnmatch(place, one) for one in globs)} for place in places]
    if len(patterns) > 1 and all(mine) and not set.intersection(*mine):
        there = sorted(set.union(*mine))
        raise DataError(
            f"{name}: the folder has several configurations ({', '.join(there)}) according to its README.md; give the "
            f"folder of one, or its files separated by commas: {files[0].parent}"
        )


def _configurations(readme: Path) -> dict[str, list[str]]:
    """The file patterns of each configuration in the metadata of a dataset's README."""
    import yaml

    found: dict[str, list[str]] = {}
    try:
        head = readme.read_text(encoding="utf-8")[:1_000_000].split("---", 2)[1]
        for config in yaml.safe_load(head)["configs"]:
            named = config["data_files"]
            named = [named] if isinstance(named, str | dict) else named
            paths = [one["path"] if isinstance(one, dict) else one for one in named]
            found[str(config["config_name"])] = [
                str(path).removeprefix("./") for one in paths for path in (one if isinstance(one, list) else [one])
            ]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError, RecursionError):
        return {}  # no README, or one without configurations
    return found


# The hub, and splits of a dataset


def _hub(name: str, base: str, split: str) -> Table:
    import datasets

    try:
        table = datasets.load_dataset(base)
    except Exception as error:
        raise DataError(
            f"{name}: neither an existing file or folder nor a dataset that can be reached on the hub "
            f"({error_line(error)}); download it on a machine with network access (hf download --repo-type dataset "
            f"{base} --local-dir DIR) and give DIR; with HF_HUB_OFFLINE=1 only datasets in the local cache are found"
        ) from None
    return Table(name, _one_split(name, table, split))


def _one_split(name: str, table: Any, split: str) -> Any:
    if not isinstance(table, Mapping):
        if split:
            raise DataError(f"{name}: this dataset has no splits; remove ':{split}'")
        return table
    splits = sorted(map(str, table))
    if not split and len(splits) == 1:
        return table[splits[0]]
    if split not in splits:
        found = f"no split '{split}'{did_you_mean(split, splits)}" if split else "several splits"
        known = ", ".join(splits)
        raise DataError(f"{name}: {found}; choose one of: {known} (as in {name.split(':')[0]}:{splits[-1]})")
    return table[split]
