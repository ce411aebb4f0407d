"""Objects with their own hash: an edit or a flipped bit is seen."""

import contextlib
import re

import pytest

from prefopt import storage
from prefopt.storage import Damaged


def test_sealed_object_when_read_again_then_is_what_was_written(sealed):
    assert storage.read_sealed(sealed) == {"step": 3, "names": ["a", "b"], "loss": 0.1}
    assert storage.read_sealed(sealed.with_name("other.json")) is None


def test_sealed_object_when_any_bit_of_it_is_flipped_then_it_is_damaged(sealed):
    whole = sealed.read_bytes()
    found = []
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        sealed.write_bytes(data)
        with contextlib.suppress(Damaged):
            found.append(storage.read_sealed(sealed))
    assert found == [{"step": 3, "names": ["a", "b"], "loss": 0.1}] * len(found), "white space alone"
    assert len(found) < 30


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 4096, b"[]", b"{}", b"null", b'"text"', b"{" * 5000, b"\xff\xfe", b"1" * 9999]
)
def test_sealed_object_when_the_file_holds_something_else_then_it_is_damaged(content, sealed):
    sealed.write_bytes(content)
    with pytest.raises(Damaged, match=re.escape(str(sealed))):
        storage.read_sealed(sealed)


def test_object_of_an_older_version_is_read_only_where_that_is_asked_for(sealed):
    sealed.write_text('{"step": 3}')
    assert storage.read_sealed(sealed, unsealed=True) == {"step": 3}
    with pytest.raises(Damaged):
        storage.read_sealed(sealed)
    sealed.write_text('{"step": 3, "sha256": "edited"}')
    with pytest.raises(Damaged):
        storage.read_sealed(sealed, unsealed=True)
