"""Single completions with a label: how they are read, and pairs as two of them."""

import json

import pytest

from prefopt.data.rows import RowReader, read_rows
from prefopt.types import LABEL


def file_of(tmp_path, *records):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path, **more):
    report = read_rows(path, need_rejected=False, labelled=True, extra=(LABEL,), on_bad_row="skip", **more)
    return [(row.prompt, row.chosen, row.columns["label"], row.where) for row in report.rows], report


def test_rows_of_trls_columns_are_read_with_their_label(tmp_path):
    path = file_of(
        tmp_path,
        {"prompt": "a", "completion": " b", "label": True},
        {"prompt": "a", "completion": " c", "label": False},
        {"prompt": "d", "completion": " e", "label": 1},
    )
    rows, _ = read(path)
    assert [row[:3] for row in rows] == [("a", " b", 1.0), ("a", " c", 0.0), ("d", " e", 1.0)]


def test_a_pair_is_read_as_two_examples(tmp_path):
    chat = [{"role": "user", "content": "q"}]
    path = file_of(
        tmp_path,
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": chat, "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
        {"prompt": chat, "chosen": "x", "rejected": "y"},
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4], "tokenizer": "t"},
    )
    report = read_rows(path, need_rejected=False, labelled=True, extra=(LABEL,), on_bad_row="skip", tokenizer="t")
    labels = [row.columns["label"] for row in report.rows]
    assert labels == [1.0, 0.0] * (len(labels) // 2)
    assert [row.ids for row in report.rows[-2:]] == [([1], [2, 3]), ([1], [4])]
    assert [row.chosen for row in report.rows[:2]] == [" b", " c"]
    assert all(row.rejected is None for row in report.rows)
    assert {bad.reason for bad in report.bad} == {"mixed types"}


def test_other_names_are_mapped(tmp_path):
    path = file_of(tmp_path, {"prompt": "a", "text": " b", "good": "true"})
    rows, _ = read(path, columns={"completion": "text", "label": "good"})
    assert rows[0][:3] == ("a", " b", 1.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "completion": " b"},
            "'label': missing, expected true or false beside 'completion'",
        ),
        ({"prompt": "a", "completion": " b", "label": 0.5}, "'label': found 0.5, expected true for a desirable"),
        ({"prompt": "a", "completion": " b", "label": "yes"}, "'label': found a string, expected true for a desirable"),
        ({"prompt": "a", "completion": " b", "label": [1]}, "'label': found a list, expected true for a desirable"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_place(tmp_path, record, message):
    path = file_of(tmp_path, record)
    _, report = read(path)
    assert f"rows.jsonl:1: {message}" in report.bad[0].message
    with pytest.raises(Exception, match=r"rows\.jsonl:1"):
        read_rows(path, need_rejected=False, labelled=True, extra=(LABEL,))


def test_without_labels_nothing_changes(tmp_path):
    path = file_of(tmp_path, {"prompt": "a", "chosen": " b", "rejected": " c", "label": "no matter"})
    (row,) = RowReader(path)
    assert (row.chosen, row.rejected, dict(row.columns)) == (" b", " c", {})
