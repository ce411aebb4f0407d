"""Parquet files and datasets whose columns are of other types than text: read rightly, or refused in one line."""

import pickle
from decimal import Decimal

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from prefopt.data import content, sources
from prefopt.data.encode import encode_file
from prefopt.data.rows import DROP, RowReader, open_source, read_rows
from prefopt.errors import DataError
from prefopt.types import Column

TEXT = {"prompt": ["Q:", "R:"], "chosen": [" a", " b"], "rejected": [" c", " d"]}


def turn(role, text, **more):
    return {"role": role, "content": text, **more}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes columns (arrow arrays or lists) to rows.parquet."""
    monkeypatch.chdir(tmp_path)

    def table(**columns):
        arrays = {**TEXT, **columns}
        parquet.write_table(pa.table({name: pa.array(v) if isinstance(v, list) else v for name, v in arrays.items()}),
                            "rows.parquet")  # fmt: skip
        return "rows.parquet"

    return table


def read(path, **settings):
    return [(row.prompt, row.chosen, row.rejected) for row in read_rows(path, **settings).rows]


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())],
    ids=["large string", "dictionary", "dictionary of large strings"],
)
def test_text_when_stored_in_another_way_then_reads_as_text(table, kind):
    expected = read(table())
    assert read(table(**{name: pa.array(values).cast(kind) for name, values in TEXT.items()})) == expected


def test_categorical_column_of_pandas_reads_as_text(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame({**TEXT, "prompt": pandas.Categorical(["Q:", "Q:"])}).to_parquet("rows.parquet")
    assert [prompt for prompt, _, _ in read("rows.parquet")] == ["Q:", "Q:"]


def test_messages_when_a_list_of_structs_then_read_and_keys_that_are_null_are_left_out(table):
    kind = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.string()), ("name", pa.string())]))
    prompt = pa.array([[turn("user", "Hi", name=None)], [turn("system", "S"), turn("user", "Hi", name="n")]], kind)
    good, bad = (pa.array([[turn("assistant", text)]] * 2, kind) for text in "ac")
    got = read(table(prompt=prompt, chosen=good, rejected=bad))
    assert got[0] == ([turn("user", "Hi")], [turn("assistant", "a")], [turn("assistant", "c")])
    assert got[1][0] == [turn("system", "S"), turn("user", "Hi", name="n")]


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ([3, 4], "found the number 3, expected a string or a list of messages"),
        ([True, False], "found the truth value true, expected a string or a list of messages"),
        ([b"a", b"b"], "found binary data, expected a string or a list of messages"),
        ([Decimal("1.50"), Decimal("2.50")], "found the decimal 1.50, expected a string or a list of messages"),
        (pa.array([0, 1], pa.timestamp("s")), "found a time, expected a string or a list of messages"),
        ([{"text": "a"}, {"text": "b"}], "found an object, expected a string or a list of messages"),
        (["a", None], None),
    ],
    ids=["int", "bool", "binary", "decimal", "time", "struct", "null"],
)
def test_completion_when_of_another_type_then_row_and_type_are_named(table, column, found):
    path = table(chosen=column)
    with pytest.raises(DataError) as error:
        read_rows(path)
    if found is None:
        assert str(error.value).startswith("rows.parquet:2: 'chosen': missing, expected a completion; the example has")
    else:
        assert str(error.value) == f"rows.parquet:1: 'chosen': {found} ({DROP}); 1 more bad row in the file"


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (pa.array([[("role", "user")]] * 2, pa.map_(pa.string(), pa.string())),
         "'prompt[0]': found a map's entry, expected an object with 'role' and 'content'"),
        (pa.array([[{"role": "user", "content": 7}]] * 2),
         "'prompt[0].content': found the number 7, expected a string"),
        (pa.array([[{"role": "user", "content": [{"type": "text"}]}]] * 2),
         "'prompt[0].content[0]': found null for its text, expected a text part"),
        (pa.array([{"role": ["user"], "content": ["Hi"]}] * 2),
         "'prompt': found an object, expected a string or a list of messages"),
        (pa.array([["Hi"]] * 2), "'prompt[0]': found a string, expected an object with 'role' and 'content'"),
    ],
    ids=["map", "number", "parts", "struct of lists", "list of texts"],
)  # fmt: skip
def test_messages_when_of_another_shape_then_row_and_place_are_named(table, turns, found):
    with pytest.raises(DataError) as error:
        read_rows(table(prompt=turns))
    assert str(error.value) == f"rows.parquet:1: {found} ({DROP}); 1 more bad row in the file"


def test_number_when_an_integer_or_null_or_text_column_then_read_or_named(table):
    extra = (Column("win", low=0, high=1),)
    assert [row.columns["win"] for row in read_rows(table(win=pa.array([0, 1], pa.int8())), extra=extra).rows] == [0, 1]
    with pytest.raises(DataError, match=r"^rows.parquet:1: 'win': found a string, expected a number"):
        read_rows(table(win=["0.5", "0.7"]), extra=extra)
    with pytest.raises(DataError, match=r"^rows.parquet:2: 'win': missing, expected a number"):
        read_rows(table(win=[0.5, None]), extra=extra)
    with pytest.raises(DataError, match=r"^rows.parquet:1: 'win': found the decimal 0.50, expected a number"):
        read_rows(table(win=[Decimal("0.50"), Decimal("0.25")]), extra=extra)


def test_file_when_two_columns_have_one_name_or_there_are_no_rows_then_one_line_says_so(table):
    two = pa.Table.from_arrays([pa.array(["Q:"]), pa.array([" a"]), pa.array([" b"])], ["prompt", "chosen", "chosen"])
    parquet.write_table(two, "rows.parquet")
    with pytest.raises(DataError, match=r"^rows.parquet: two columns are named 'chosen', expected unique names"):
        read_rows("rows.parquet")
    struct = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["Hi"])], ["role", "role"])
    prompt = pa.ListArray.from_arrays(pa.array([0, 1]), struct)
    parquet.write_table(pa.table({"prompt": prompt, "chosen": [" a"], "rejected": [" b"]}), "rows.parquet")
    with pytest.raises(DataError, match=r"^rows.parquet") as error:
        read_rows("rows.parquet")
    assert "\n" not in str(error.value)
    parquet.write_table(two.select([0]).slice(0, 0), "rows.parquet")
    with pytest.raises(DataError, match=r"^rows.parquet: the file has no rows$"):
        read_rows("rows.parquet")


def test_saved_dataset_when_opened_again_then_its_files_are_hashed_once_and_no_row_is_read(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(content, "SETTLED", -1.0)
    datasets.Dataset.from_dict(TEXT).save_to_disk("saved")
    first = encode_file("saved", tokenizer, max_length=20, cache_dir="cache")
    monkeypatch.setattr(content, "_read", None)
    monkeypatch.setattr(sources.Table, "_batches", None)
    again = encode_file("saved", tokenizer, max_length=20, cache_dir="cache")
    assert (again.fingerprint, list(again.pairs)) == (first.fingerprint, list(first.pairs))
    assert all(file["filename"].endswith(".arrow") for file in open_source("saved").table.cache_files), "in memory"


def test_dataset_on_the_hub_when_it_was_downloaded_then_stays_memory_mapped(tokenizer, tmp_path, monkeypatch):
    """`datasets.load_dataset` of a folder of files is what it is of a hub id: Arrow files in its cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_dict(TEXT).to_parquet("repo/train.parquet")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name: real("repo", cache_dir="hub"))
    source = open_source("someone/pairs")
    assert source.table.cache_files
    assert source.content() == open_source("someone/pairs").content()
    assert [row.where for row in RowReader("someone/pairs")] == ["someone/pairs:1", "someone/pairs:2"]
    assert len(encode_file("someone/pairs", tokenizer, max_length=20, cache_dir="cache").pairs) == 2


def test_content_of_a_table_in_memory_is_that_of_its_rows():
    def source(**columns):
        return sources.Table("memory", datasets.Dataset.from_dict({**TEXT, **columns}))

    assert source().content() == pickle.loads(pickle.dumps(source())).content()
    assert source().content() != source(chosen=[" a", " B"]).content()
    assert source().content() != sources.Table("memory", source().table.select([1, 0])).content()
