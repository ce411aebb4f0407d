"""Hashes name files and caches and seed draws: their values are the same in every version."""

import io
from array import array

from prefopt import storage


def test_hashes_are_those_of_every_version(tmp_path):
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, appendix B.1
    (tmp_path / "file").write_text("abc")
    running = storage.running_hash(b"a")
    running.update(b"bc")
    assert storage.text_hash("abc") == storage.text_hash(b"abc") == running.hexdigest() == abc
    assert storage.sha256(tmp_path / "file") == storage.stream_hash(io.BytesIO(b"abc")) == abc
    assert storage.text_number("abc") == 0xBA7816BF8F01CFEA
    assert storage.text_number("abc", 4) == 0xBA7816BF
    assert storage.digest({"b": 1, "a": [None, "x"]}) == storage.text_hash('{"a": [null, "x"], "b": 1}')
    assert storage.sequence_hash([]).hex() == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b-128 of nothing
    assert storage.sequence_hash([array("i", [1, 2]), bytearray([1])]) == storage.sequence_hash(
        [array("i", [1, 2]).tobytes() + b"\x01"]
    )
