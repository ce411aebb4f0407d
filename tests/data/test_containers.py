"""One file's rows, whatever it is: arrays, CSV, compressed, columns of extension types; or one line that names it."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from prefopt.data import containers
from prefopt.data.rows import read_rows
from prefopt.errors import DataError
from prefopt.types import Column

ROWS = [{"prompt": f"q{i}:", "chosen": " a", "rejected": ' "b", [c]\\'} for i in range(3)]
EXPECTED = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS).encode()
CSV = b"prompt,chosen,rejected\r\n" + b"".join(b'q%d:, a," ""b"", [c]\\"\r\n' % i for i in range(3))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def file(name, content):
        Path(name).write_bytes(content)
        return name

    return file


def read(path, **settings):
    return [(row.prompt, row.chosen, row.rejected) for row in read_rows(path, **settings).rows]


def packed(content):
    return gzip.compress(content, mtime=0)  # a test's name holds it, and must be the same in every process


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("a.json", ARRAY, 2),
        ("a.jsonl", b"\xef\xbb\xbf  " + ARRAY + b" \n", 2),
        ("a.json", json.dumps(ROWS, indent=2).encode(), 2),
        ("a.json", "".join(json.dumps(row, indent=2) + "\n" for row in ROWS).encode(), 2),
        ("a.json", LINES, 2),
        ("a.csv", CSV, 3),
        ("a.csv", b"\r\n\r\n" + CSV, 5),
        ("a.csv", b"\xef\xbb\xbf" + CSV.replace(b",", b";", 2).replace(b":,", b":;").replace(b" a,", b" a;"), 3),
        ("a.tsv", CSV.replace(b",", b"\t", 2).replace(b":,", b":\t").replace(b" a,", b" a\t"), 3),
        ("a.jsonl.gz", packed(LINES[:50]) + packed(LINES[50:]), 2),
        ("no suffix", packed(LINES), 2),
        ("a.json.bz2", bz2.compress(ARRAY), 2),
        ("a.csv.xz", lzma.compress(CSV), 3),
        ("a.jsonl.zst", zstd(LINES), 2),
    ],
)
def test_rows_when_a_file_is_of_any_container_then_they_are_those_of_the_lines(
    file, monkeypatch, name, content, second
):
    monkeypatch.setattr(containers, "_CHUNK", 7)  # an element, a string and an escape over several blocks
    path = file(name, content)
    assert read(path) == EXPECTED
    assert read_rows(path).rows[1].where == f"{path}:{second}"


def test_rows_when_a_zip_archive_holds_one_file_then_it_is_read_and_several_are_refused(file):
    with zipfile.ZipFile(file("a.zip", b""), "w") as archive:
        archive.writestr("folder/a.jsonl", LINES)
    assert read("a.zip") == EXPECTED
    with zipfile.ZipFile("a.zip", "a") as archive:
        archive.writestr("b.jsonl", LINES)
    with pytest.raises(DataError, match=r"^a.zip: cannot be read: a zip archive of 2 files: unpack it"):
        read("a.zip")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", ARRAY[:-20], "a.json: the JSON ends too early, in its last element: is the file complete?"),
        ("a.json", ARRAY + ARRAY, "a.json: more text after the JSON array, expected one array, or one object per "
         "line"),
        ("a.json", b"[]", "a.json: the file has no rows"),
        ("a.csv", b"", "a.csv: the file has no rows"),
        ("a.csv", CSV[:-4], "a.csv:4: broken CSV (unexpected end of data), expected rows whose quotes are closed"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv: two columns are named 'prompt', "
         "expected unique names"),
        ("a.jsonl", b"\xff\xfe" + LINES.decode().encode("utf-16-le"),
         "a.jsonl: UTF-16 text, expected UTF-8 (iconv -f UTF-16 -t UTF-8)"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"),
         "a.jsonl: UTF-16LE text, expected UTF-8 (iconv -f UTF-16LE -t UTF-8)"),
        ("a.gz", packed(packed(LINES)), "a.gz: gzip inside a compressed file: decompress it first"),
        ("a.gz", packed(b"x" * 257 + b"ustar" + b"x" * 250), "a.gz: a tar archive: unpack it and give the file "
         "or folder"),
        ("a.arrow", b"ARROW1", "a.arrow: a single Arrow file; give the folder that datasets.save_to_disk has written"),
    ],
)  # fmt: skip
def test_file_when_it_cannot_be_read_then_one_line_names_what_it_is(file, name, content, message):
    with pytest.raises(DataError) as error:
        read(file(name, content))
    assert str(error.value) == message


def test_file_when_it_is_cut_off_inside_the_compression_then_one_line_says_behind_which_row(file):
    many = b"".join(json.dumps({**ROWS[0], "chosen": f" {i * 7919 % 10007}"}).encode() + b"\n" for i in range(9000))
    for name, content in (("a.gz", gzip.compress(many)), ("a.xz", lzma.compress(many)), ("a.bz2", bz2.compress(many))):
        with pytest.raises(DataError, match=rf"^{name}: cannot be read( as \w+ after row [\d,]+)?: .*") as error:
            read(file(name, content[:-30]))
        assert "\n" not in str(error.value)


def test_rows_when_some_elements_are_broken_or_too_large_then_the_others_are_read(file, monkeypatch):
    monkeypatch.setattr(containers, "_CHUNK", 64)
    good = json.dumps(ROWS[0])
    text = f'[{good}, {{"a": nope}}, {{"a": "{"x" * 5000}"}}, {{"a": {"[" * 2000}{"]" * 2000}}}, {good}]'
    report = read_rows(file("a.json", text.encode()), on_bad_row="skip", max_row_bytes=4500)
    assert [row.where for row in report.rows] == ["a.json:1", "a.json:5"]
    assert report.dropped == {"broken JSON": 1, "row too large": 1, "nested too deeply": 1}


def test_rows_of_csv_when_fields_or_bytes_are_wrong_then_they_are_bad_rows_and_numbers_are_read(file):
    content = b'prompt,chosen,rejected,win\n"q\nr", a, b,0.5\nq, a, b\nq, \xff, b,1\nq, a, b,much\n'
    settings = {"extra": (Column("win", low=0, high=1),), "on_bad_row": "skip"}
    report = read_rows(file("a.csv", content), **settings)
    assert [(row.prompt, row.columns["win"], row.where) for row in report.rows] == [("q\nr", 0.5, "a.csv:2")]
    assert [bad.message.partition(", expected")[0] for bad in report.bad] == [
        "a.csv:4: 3 fields",
        "a.csv:5: bytes that are not UTF-8",
        "a.csv:6: 'win': text that is not a number",
    ]


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1" + "0" * 5000, "NaN", "-Infinity", "1e999"])
def test_rows_when_a_number_is_beyond_all_floats_then_one_line_says_so(file, number):
    line = json.dumps(ROWS[0])[:-1]
    extra = (Column("win"),)
    with pytest.raises(DataError, match=r"^a.jsonl:1: .*(digits|finite)") as error:
        read_rows(file("a.jsonl", f'{line}, "win": {number}}}'.encode()), extra=extra)
    assert len(str(error.value)) < 200
    chosen = json.dumps({**ROWS[0], "chosen": 0}).replace('"chosen": 0', f'"chosen": {number}')
    with pytest.raises(DataError, match=r"^a.jsonl:1: .*expected"):
        read_rows(file("a.jsonl", chosen.encode()))


# Extension types.

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", 'q "0"\n'), ("assistant", "a"), ("assistant", "b")))
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def test_columns_of_json_when_saved_or_in_parquet_then_are_decoded_at_every_depth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from datasets import Features, Json, List

    rows = [CHAT, {"prompt": "p:", "chosen": " c", "rejected": " d"}]
    datasets.Dataset.from_list(rows, features=Features({key: Json() for key in CHAT})).save_to_disk("json")
    datasets.load_from_disk("json").to_parquet("json.parquet")
    datasets.Dataset.from_list([CHAT], features=Features({key: List(Json()) for key in CHAT})).save_to_disk("list")
    parts = Features({key: List({"role": datasets.Value("string"), "content": Json()}) for key in CHAT})
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    datasets.Dataset.from_list([{**CHAT, "prompt": [{"role": "user", "content": two}]}], features=parts).save_to_disk(
        "in"
    )
    chat = ([USER], [GOOD], [BAD])
    assert read("json") == read("json.parquet") == [chat, ("p:", " c", " d")]
    assert read("list") == [chat]
    assert read("in") == [([{"role": "user", "content": "ab"}], [GOOD], [BAD])]


def test_column_of_another_extension_type_when_it_is_read_then_its_type_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unknown = {b"ARROW:extension:name": b"someone.text"}
    fields = [pa.field(key, pa.string()) for key in ("prompt", "chosen", "rejected")]
    columns = [["q:"], [" a"], [" b"]]
    for place, message in (
        (fields, "'chosen': found a value of the extension type 'someone.text', which is not decoded"),
        ([*fields, pa.field("id", pa.string())], None),
    ):
        at = 1 if message else 3
        schema = pa.schema([f.with_metadata(unknown) if i == at else f for i, f in enumerate(place)])
        parquet.write_table(pa.table([*columns, ["x"]][: len(place)], schema=schema), "a.parquet")
        if message is None:
            assert read("a.parquet") == [("q:", " a", " b")]
        else:
            with pytest.raises(DataError, match=f"^a.parquet:1: {message}"):
                read("a.parquet")
