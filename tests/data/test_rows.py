import json
from pathlib import Path

import pytest

from prefopt.data.rows import read_rows
from prefopt.errors import DataError
from prefopt.types import Column

U1, A1, A2, U2 = (
    {"role": role, "content": text}
    for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"), ("user", "r"))
)
SYSTEM = {"role": "system", "content": "be kind"}
GOOD = {"prompt": "p:", "chosen": " a", "rejected": " b"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
DROP = "(drop the example, or --data.on_bad_row skip)"


def one(path, **kw):
    report = read_rows(path, **kw)
    (row,) = report.rows
    (kind,) = report.formats
    return row, kind


# Formats.


def test_rows_when_explicit_strings_then_taken_as_they_are(write):
    row, kind = one(write(GOOD))
    assert (row.prompt, row.chosen, row.rejected, row.where) == ("p:", " a", " b", "pairs.jsonl:1")
    assert kind == "text, explicit prompt"


def test_rows_when_dialogue_then_prompt_ends_at_the_last_assistant_turn(write):
    # Both completions begin alike: a character-wise common prefix would move the boundary into them.
    row, kind = one(write({"chosen": HH + " So long", "rejected": HH + " So what"}))
    assert (row.prompt, row.chosen, row.rejected) == (HH, " So long", " So what")
    assert kind == "text, dialogue (prompt up to the last '\\n\\nAssistant:')"


def test_rows_when_implicit_messages_then_prompt_is_what_both_share(write):
    row, kind = one(write({"chosen": [SYSTEM, U1, A1, U2, A1], "rejected": [SYSTEM, U1, A1, U2, A2, U1, A1]}))
    assert (row.prompt, row.chosen, row.rejected) == ([SYSTEM, U1, A1, U2], [A1], [A2, U1, A1])
    assert kind == "messages, implicit prompt"


@pytest.mark.parametrize(
    ("record", "expected", "kind"),
    [
        ({"prompt": [SYSTEM], "chosen": [A1], "rejected": [A2]}, ([SYSTEM], [A1], [A2]), "messages, explicit prompt"),
        ({"prompt": [U1], "chosen": "a", "rejected": "b"}, ([U1], [A1], [A2]), "messages, explicit prompt"),
        ({"prompt": "q", "chosen": [A1], "rejected": [A2]}, ([U1], [A1], [A2]), "messages, explicit prompt text"),
        ({"prompt": [U1, A1], "chosen": "a", "rejected": "b"}, ([U1, A1], [A1], [A2]),
         "messages, explicit prompt, the prompt begins the answer"),
        ({"prompt": "q", "chosen": [U1, A1], "rejected": [U1, A2]}, ([U1], [A1], [A2]), "messages, implicit prompt"),
    ],
)  # fmt: skip
def test_rows_when_messages_have_a_prompt_then_it_is_used(write, record, expected, kind):
    row, found = one(write(record))
    assert ((row.prompt, row.chosen, row.rejected), found) == (expected, kind)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "p:", "completion": " a"}, ("p:", " a")),
        ({"prompt": "p:", "chosen": " a"}, ("p:", " a")),
        (GOOD, ("p:", " a")),
        ({"chosen": HH + " x"}, (HH, " x")),
        ({"messages": [SYSTEM, U1, A1, U2, A2]}, ([SYSTEM, U1], [A1, U2, A2])),
        ({"prompt": [U1], "completion": "a"}, ([U1], [A1])),
    ],
)
def test_rows_when_only_chosen_is_needed_then_rejected_is_neither_required_nor_carried(write, record, expected):
    row, _ = one(write(record), need_rejected=False)
    assert (row.prompt, row.chosen, row.rejected) == (*expected, None)


def test_rows_when_only_chosen_is_needed_then_a_pair_file_gives_the_rows_that_pairs_give(write):
    path = write(GOOD, {**GOOD, "rejected": " "}, {**GOOD, "rejected": " a"})
    pairs, chosen = (read_rows(path, need_rejected=need, on_bad_row="skip") for need in (True, False))
    assert [row.where for row in pairs.rows] == [row.where for row in chosen.rows] == ["pairs.jsonl:1"]
    assert pairs.dropped == chosen.dropped == {"empty completion": 1, "chosen equals rejected": 1}


def test_rows_when_keys_have_other_names_then_columns_map_them(write):
    path = write({"question": "p:", "best": " a", "worst": " b", "extra": 3})
    row, _ = one(path, columns={"prompt": "question", "chosen": "best", "rejected": "worst"})
    assert (row.prompt, row.chosen, row.rejected) == ("p:", " a", " b")
    with pytest.raises(DataError, match=r"^data.columns: unknown key 'chose'; did you mean 'chosen'\? known: prompt, "):
        read_rows(path, columns={"chose": "best"})


def test_rows_when_extra_columns_are_asked_then_they_travel_under_their_name(write):
    extra = (Column("win", aliases=("old_win",), low=0, high=1),)
    report = read_rows(write({**GOOD, "win": 0.25}, {**GOOD, "old_win": 1}), extra=extra)
    assert [row.columns for row in report.rows] == [{"win": 0.25}, {"win": 1.0}]


def test_rows_when_lines_are_blank_or_end_oddly_then_they_count_as_lines_only(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"", b"  ", GOOD)
    Path(path).write_bytes(Path(path).read_bytes().rstrip(b"\n"))
    assert [row.where for row in read_rows(path).rows] == ["pairs.jsonl:1", "pairs.jsonl:4"]


# Bad rows: whole lines.

BAD = [
    (b'{"prompt": ', "broken JSON", "broken JSON (Expecting value at column 12), expected one JSON object " + DROP),
    (
        b"[" * 100_000,
        "nested too deeply",
        "JSON nested too deeply, expected fewer levels of lists and objects " + DROP,
    ),
    (
        b"[1]",
        "not an object",
        "found a list, expected a JSON object, one per line (write the file as JSONL)",
    ),
    (
        b'{"prompt": "\xff"}',
        "invalid UTF-8",
        "byte 13 is not UTF-8, expected UTF-8 text (convert the file, or --data.on_bad_row skip)",
    ),
    (
        {"prompt": "p", "chosen": "a", "rejeted": "b"},
        "missing key",
        "'rejected': missing, expected a completion; the example has 'chosen', 'prompt', 'rejeted'; did you mean "
        "'rejeted'? (rename it, or map it with data.columns)",
    ),
    (
        b'{"prompt": "p", "chosen": "a", "id": 1, "id": 2, "chosen": "c", "rejected": "b"}',
        "key twice",
        f"'chosen': is in the example twice, expected each key once {DROP}",
    ),
    ({**GOOD, "chosen": ""}, "empty completion", f"'chosen': empty, expected a non-empty completion {DROP}"),
    ({**GOOD, "rejected": " \n"}, "empty completion", f"'rejected': empty, expected a non-empty completion {DROP}"),
    (
        {**GOOD, "rejected": " a"},
        "chosen equals rejected",
        f"'rejected': the same as 'chosen', expected two different completions {DROP}",
    ),
    (
        {**GOOD, "rejected": 7},
        "not a string",
        f"'rejected': found the number 7, expected a string or a list of messages {DROP}",
    ),
    (
        {**GOOD, "chosen": "\ud800"},
        "invalid text",
        f"'chosen': half of a surrogate pair, expected valid Unicode {DROP}",
    ),
    (
        {"chosen": HH + " a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
        "different dialogues",
        "'rejected': a dialogue that differs from 'chosen' before the last '\\n\\nAssistant:', expected one prompt for "
        f"both sides {DROP}",
    ),
    (
        {"chosen": "a", "rejected": "b"},
        "no prompt",
        "'chosen': text without a '\\n\\nAssistant:' turn in an example without a prompt, expected a key 'prompt', or "
        "a dialogue (add the prompt, or map its key with data.columns)",
    ),
    (
        {"chosen": [U1, A1, U1, A1], "rejected": [U1, A1, U2, A1]},
        "different dialogues",
        "'rejected': messages that differ from 'chosen' at turn 3, which is not an answer in both to a shared "
        f"question, expected the same messages up to two different answers {DROP}",
    ),
    (
        {"prompt": [U1, {**A1, "tool_calls": [{"name": "x"}]}], "chosen": [A1], "rejected": [A2]},
        "prompt without a question",
        "'prompt': ends with a tool call without a result, expected messages that end with a turn to answer, "
        f"or with the beginning of the answer {DROP}",
    ),
    (
        {"prompt": [U1], "chosen": [A1], "rejected": [A1, U1]},
        "not an answer",
        f"'rejected': ends with a 'user' turn, expected an assistant turn at both ends {DROP}",
    ),
    (
        {"prompt": [U1], "chosen": [A1], "rejected": [{"who": "gpt", "value": "x"}]},
        "bad message",
        f"'rejected[0]': a message with 'value', 'who', expected 'role' and 'content' {DROP}",
    ),
    (
        {"prompt": [U1], "chosen": [A1], "rejected": [{"role": "assistant", "content": [7]}]},
        "bad message",
        f"'rejected[0].content[0]': found the number 7, expected a text part {DROP}",
    ),
    (
        {"prompt": [U1], "chosen": [A1], "rejected": [{"role": "assistant", "content": " "}]},
        "empty completion",
        f"'rejected': an empty assistant turn, expected a non-empty completion {DROP}",
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": [A1]},
        "mixed types",
        f"'rejected': found a list, but 'chosen' is a string, expected both completions of the same type {DROP}",
    ),
]


@pytest.mark.parametrize(("record", "reason", "complaint"), BAD)
def test_rows_when_a_row_is_bad_then_one_line_says_so(write, record, reason, complaint):
    path = write(GOOD, b"", record, GOOD)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value) == f"pairs.jsonl:3: {complaint}"
    report = read_rows(path, on_bad_row="skip")
    assert (len(report.rows), report.dropped, report.bad[0].where) == (2, {reason: 1}, "pairs.jsonl:3")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (
            {},
            "'win': missing, expected a number; the example has 'chosen', 'prompt', 'rejected' "
            "(rename it, or map it with data.columns)",
        ),
        ({"win": "0.5"}, f"'win': found a string, expected a number {DROP}"),
        ({"win": True}, f"'win': found the truth value true, expected a number {DROP}"),
        ({"old_win": 1.5}, f"'old_win': found 1.5, expected 0 to 1 {DROP}"),
        ({"win": float("nan")}, f"'win': found nan, expected a finite number {DROP}"),
    ],
)
def test_rows_when_an_extra_column_is_bad_then_one_line_says_so(write, values, complaint):
    with pytest.raises(DataError) as error:
        read_rows(write({**GOOD, **values}), extra=(Column("win", aliases=("old_win",), low=0, high=1),))
    assert str(error.value) == f"pairs.jsonl:1: {complaint}"


def test_rows_when_a_row_has_ten_megabytes_then_it_is_refused_with_its_size(write):
    path = write(GOOD, {**GOOD, "chosen": "x" * 10_500_000}, GOOD)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value) == f"pairs.jsonl:2: a row of 10.5 MB, expected at most 10.0 MB {DROP}"
    assert [row.where for row in read_rows(path, on_bad_row="skip").rows] == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_rows_when_several_are_bad_then_the_error_counts_the_others(write):
    with pytest.raises(DataError, match=r"^pairs.jsonl:1: .*skip\); 2 more bad rows in the file$"):
        read_rows(write(b"{", b"{", GOOD, b"{"))


# Files and folders.


def test_rows_when_the_file_is_missing_then_the_nearest_name_is_suggested(write):
    write(GOOD, name="train.jsonl")
    with pytest.raises(DataError, match=r"^trian.jsonl: no such file or folder; did you mean 'train.jsonl'\?$"):
        read_rows("trian.jsonl")
    with pytest.raises(DataError, match=r"^x/y.jsonl: no such file or folder; the folder 'x' does not exist either$"):
        read_rows("x/y.jsonl")


def test_rows_when_the_file_is_empty_then_it_says_so(write):
    for rows in ([], [b"", b" "]):
        with pytest.raises(DataError, match=r"^pairs.jsonl: the file is empty, expected one JSON object per line$"):
            read_rows(write(*rows))


def test_rows_when_a_folder_has_nothing_readable_then_it_says_so(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r": no data files in this folder, expected .jsonl or .parquet files$"):
        read_rows(tmp_path)


def test_rows_when_a_folder_has_splits_then_they_are_never_mixed(write):
    Path("d").mkdir()
    write(GOOD, name="d/train.jsonl")
    write(GOOD, GOOD, name="d/test-00000.jsonl")
    with pytest.raises(DataError, match=r"^d: the folder has several splits \(test, train\); choose one: d:train$"):
        read_rows("d")
    with pytest.raises(DataError, match=r"^d:dev: no split 'dev' in this folder; it has test, train$"):
        read_rows("d:dev")
    assert [row.where for row in read_rows("d:test").rows] == ["d/test-00000.jsonl:1", "d/test-00000.jsonl:2"]


def test_rows_when_parquet_or_saved_by_datasets_then_they_read_as_jsonl_does(write, tmp_path):
    import datasets

    records = [{"prompt": [U1], "chosen": [A1], "rejected": [A2]}, {"prompt": [U1], "chosen": [], "rejected": [A2]}]
    table = datasets.Dataset.from_list(records)
    table.to_parquet("rows.parquet")
    table.save_to_disk("one")
    datasets.DatasetDict(train=table, test=table).save_to_disk("two")
    expected = [(row.prompt, row.chosen, row.rejected) for row in read_rows(write(*records), on_bad_row="skip").rows]
    for path in ("rows.parquet", "one", "two:test"):
        report = read_rows(path, on_bad_row="skip")
        assert [(row.prompt, row.chosen, row.rejected) for row in report.rows] == expected
        assert report.bad[0].message == f"{path}:2: 'chosen': no messages, expected a non-empty completion {DROP}"
    with pytest.raises(DataError, match=r"^two: several splits; choose one of: test, train \(as in two:train\)$"):
        read_rows("two")
    (tmp_path / "broken.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"^broken.parquet: cannot be read as Parquet: "):
        read_rows("broken.parquet")


def test_rows_when_a_hub_id_is_out_of_reach_then_one_line_says_so(monkeypatch, tmp_path):
    import datasets

    def unreachable(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as error:
        read_rows("someone/pairs")
    assert str(error.value) == (
        "someone/pairs: neither an existing file or folder nor a dataset that can be reached on the hub (no route); "
        "download it on a machine with network access (hf download --repo-type dataset someone/pairs "
        "--local-dir DIR) and give DIR; with HF_HUB_OFFLINE=1 only datasets in the local cache are found"
    )


# Real dialogues.

HARMLESS = Path(__file__).parents[3] / "shared" / "data" / "hh-harmless"


@pytest.mark.skipif(not HARMLESS.is_dir(), reason="the dialogues are not on this machine")
@pytest.mark.parametrize("need_rejected", [True, False])
@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        ("train.jsonl", 1992, {"empty completion": 4, "different dialogues": 4}),
        ("test.jsonl", 311, {"different dialogues": 1}),
    ],
)
def test_rows_when_hh_dialogues_then_exactly_the_known_rows_are_dropped(name, kept, dropped, need_rejected):
    report = read_rows(HARMLESS / name, need_rejected=need_rejected, on_bad_row="skip")
    assert (len(report.rows), report.dropped) == (kept, dropped)
    assert all(str(row.prompt).endswith("\n\nAssistant:") for row in report.rows)
