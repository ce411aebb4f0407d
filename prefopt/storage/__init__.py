"""Files that can be damaged, stale or out of reach, behind one door.

`readers`: as written, missing, damaged and unreadable just now are four different results. `writers`: the one atomic
write. `sealed_json`: JSON objects with their own hash. `hashing`: the one hash. `folders`: folders that are built aside
and renamed, with a manifest. `locks`: the one lock.
"""

from prefopt.storage.folders import (
    MANIFEST,
    built_beside,
    damage,
    difference,
    discard,
    empty_folder,
    entries_of,
    flushed,
    make_room,
    put_in_place,
    remove_ours,
    seal,
)
from prefopt.storage.hashing import digest, running_hash, sequence_hash, sha256, stream_hash, text_hash, text_number
from prefopt.storage.locks import Lock, is_held, locked, owner_of
from prefopt.storage.readers import (
    Damaged,
    Unreadable,
    check_regular,
    is_there,
    listing,
    opened,
    other_line,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    reading,
    sums_of,
)
from prefopt.storage.sealed_json import finite, read_sealed, sealed, unseal, write_sealed
from prefopt.storage.writers import flush_file, flush_folder, sweep, write_by, write_whole

__all__ = [
    "MANIFEST",
    "Damaged",
    "Lock",
    "Unreadable",
    "built_beside",
    "check_regular",
    "damage",
    "difference",
    "digest",
    "discard",
    "empty_folder",
    "entries_of",
    "finite",
    "flush_file",
    "flush_folder",
    "flushed",
    "is_held",
    "is_there",
    "listing",
    "locked",
    "make_room",
    "opened",
    "other_line",
    "owner_of",
    "put_in_place",
    "read_bytes",
    "read_json",
    "read_lines",
    "read_sealed",
    "read_text",
    "reading",
    "remove_ours",
    "running_hash",
    "seal",
    "sealed",
    "sequence_hash",
    "sha256",
    "stream_hash",
    "sums_of",
    "sweep",
    "text_hash",
    "text_number",
    "unseal",
    "write_by",
    "write_sealed",
    "write_whole",
]
