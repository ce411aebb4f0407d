import errno
import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt.data import encode
from prefopt.data.encode import encode_file, tokenizer_content
from prefopt.data.encoder import Encoder, pad_token
from prefopt.data.rows import prompt_key
from prefopt.data.structure import Structure, check_row_structure
from prefopt.errors import DataError
from prefopt.storage import Unreadable
from prefopt.types import Column, PairRow
from tests.data.conftest import PAIR
from tests.helpers import CHATML, byte_bpe_tokenizer

BOS, EOS = 0, 1
USER = {"role": "user", "content": "Name a fruit"}
ONE, TWO = ({"role": "assistant", "content": c} for c in ("An apple", "Blue pears"))


def row(prompt="A question:", chosen=" good", rejected=" bad", **columns):
    return PairRow(prompt, chosen, rejected, columns, "f:1")


def problem(tokenizer, *args, max_length=99):
    with pytest.raises(DataError) as error:
        Encoder(tokenizer, max_length).pair(row(*args))
    return str(error.value)


# Tokens of one row.


def test_pair_when_text_then_bos_once_terminator_once_and_ids_of_the_whole(tokenizer):
    pair = Encoder(tokenizer, 99).pair(row())
    assert pair.prompt_ids + pair.chosen_ids == [*tokenizer("A question: good")["input_ids"], EOS]
    assert tokenizer.decode(pair.rejected_ids) == " bad</s>"
    assert pair.prompt_ids.count(BOS) == 1
    assert pair.chosen_mask == [True] * len(pair.chosen_ids)
    assert check_row_structure(pair, Structure(tokenizer)) is None


@pytest.mark.parametrize("prompt", ["A question:", "<s>A question:", "<s><s>A question:"])
def test_pair_when_the_text_has_bos_or_not_then_it_stands_there_once(tokenizer, bare_tokenizer, prompt):
    assert Encoder(tokenizer, 99).pair(row(prompt)) == replace(
        Encoder(tokenizer, 99).pair(row()), prompt_key=Encoder(tokenizer, 99).pair(row(prompt)).prompt_key
    )
    assert BOS not in Encoder(bare_tokenizer, 99).pair(row()).prompt_ids


def test_pair_when_the_text_has_eos_at_its_end_then_it_is_not_doubled_and_never_inside(tokenizer):
    assert Encoder(tokenizer, 99).pair(row(chosen=" good</s>")) == Encoder(tokenizer, 99).pair(row())
    assert problem(tokenizer, "q:", " a</s> b") == (
        "f:1: 'chosen': '</s>' inside a completion, expected it at the end only "
        "(drop the example, or --data.on_bad_row skip)"
    )


def test_pair_when_chat_then_the_templates_terminator_and_no_eos(tokenizer):
    pair = Encoder(tokenizer, 99).pair(row([USER], [ONE], [TWO]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pair.prompt_ids[0] == BOS
    assert pair.prompt_ids.count(BOS) == 1
    assert pair.chosen_ids[-1] == end
    assert EOS not in pair.chosen_ids
    assert tokenizer.decode(pair.chosen_ids) == "An apple<|im_end|>"
    assert check_row_structure(pair, Structure(tokenizer)) is None
    forged = {"role": "assistant", "content": "x<|im_end|>y"}
    assert "'<|im_end|>' inside a completion" in problem(tokenizer, [USER], [forged], [TWO])


def test_pair_when_several_turns_then_the_mask_covers_the_assistants_tokens(tokenizer):
    pair = Encoder(tokenizer, 99).pair(row([USER], [ONE, USER, TWO], [TWO]))
    scored = [token for token, mask in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if mask]
    assert tokenizer.decode(scored) == "An apple<|im_end|>Blue pears<|im_end|>"
    assert tokenizer.decode(pair.chosen_ids).count("Name a fruit") == 1
    assert check_row_structure(pair, Structure(tokenizer)) is None


def test_pair_when_a_token_spans_the_boundary_then_the_row_is_bad(tokenizer):
    assert problem(tokenizer, "The s", "ky") == (
        "f:1: 'chosen': its first characters and the end of the prompt are one token, expected prompt tokens "
        "that are a prefix of the tokens of prompt and completion (move white space from the end "
        "of the prompt to the beginning of the completions)"
    )


def test_pair_when_the_prompt_is_empty_then_bos_is_the_prompt_or_the_row_is_bad(tokenizer, bare_tokenizer):
    assert Encoder(tokenizer, 99).pair(row("")).prompt_ids == [BOS]
    assert problem(bare_tokenizer, "") == (
        "f:1: 'prompt': no token, expected at least one (this tokenizer adds no BOS) "
        "(drop the example, or --data.on_bad_row skip)"
    )


# Truncation.


def test_pair_when_too_long_then_the_prompts_head_goes_first_alike_on_both_sides(tokenizer, bare_tokenizer):
    for tok, kept_bos in ((tokenizer, 1), (bare_tokenizer, 0)):
        full = Encoder(tok, 999).pair(row("One two three four five six seven:", " a", " a b c"))
        size = len(full.prompt_ids) + len(full.rejected_ids)
        (cut,) = Encoder(tok, size - 3).rows([row("One two three four five six seven:", " a", " a b c")])
        assert (cut.cut_prompt, cut.cut_completion, cut.unterminated) == (True, False, 0)
        assert cut.pair.prompt_ids == full.prompt_ids[:kept_bos] + full.prompt_ids[kept_bos + 3 :]
        assert (cut.pair.chosen_ids, cut.pair.rejected_ids) == (full.chosen_ids, full.rejected_ids)
        assert cut.lengths == (len(full.prompt_ids), len(full.chosen_ids), len(full.rejected_ids))
        assert cut.pair.prompt_key == full.prompt_key


@pytest.mark.parametrize("max_length", [2, 3, 5])
def test_pair_when_the_completion_alone_is_too_long_then_its_tail_goes(tokenizer, max_length):
    (cut,) = Encoder(tokenizer, max_length).rows([row("One two three:", " 1 2 3 4 5 6 7", " x")])
    assert (cut.cut_prompt, cut.cut_completion) == (True, True)
    assert cut.pair.prompt_ids == [BOS]
    assert len(cut.pair.chosen_ids) == len(cut.pair.chosen_mask) == max_length - 1
    assert len(cut.pair.rejected_ids) >= 1
    assert cut.unterminated == 1 + (max_length < 4)
    assert check_row_structure(cut.pair, Structure(tokenizer)) is None


def test_a_sampled_row_when_it_ends_with_the_templates_terminator_or_eos_then_it_is_terminated():
    tokenizer = byte_bpe_tokenizer(["hello"], 290, chat_template=CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for ends, unterminated in (((end, EOS), 0), ((end, 9), 1), ((8, 9), 2)):
        sampled = replace(row(), ids=([BOS, 5], *([7, last] for last in ends)))
        (cut,) = Encoder(tokenizer, 99).rows([sampled])
        assert cut.unterminated == unterminated
    tokenizer.chat_template = None
    (cut,) = Encoder(tokenizer, 99).rows([replace(row(), ids=([BOS, 5], [7, end], [7, EOS]))])
    assert cut.unterminated == 1


def test_encoder_when_there_is_no_room_for_two_tokens_then_it_refuses(tokenizer):
    with pytest.raises(DataError, match=r"^data.max_length: found 1, expected at least 2: "):
        Encoder(tokenizer, 1)


# The independent look.


def test_check_row_structure_when_a_row_is_damaged_then_it_says_how(tokenizer):
    pair = Encoder(tokenizer, 99).pair(row())
    mask = [*pair.chosen_mask, True]
    cases = [
        (replace(pair, prompt_ids=[BOS, *pair.prompt_ids]), "prompt: BOS (0) is twice at the start"),
        (replace(pair, prompt_ids=pair.prompt_ids[1:]), "prompt: BOS (0) is not the first token"),
        (replace(pair, prompt_ids=[]), "prompt: the prompt has no token"),
        (replace(pair, chosen_ids=[BOS, *pair.chosen_ids], chosen_mask=mask), "chosen: BOS (0) inside the sequence"),
        (replace(pair, prompt_ids=[*pair.prompt_ids, 2]), "prompt: the pad token (2) inside the sequence"),
        (
            replace(pair, chosen_ids=[*pair.chosen_ids, EOS], chosen_mask=mask),
            "chosen: EOS or an end-of-turn token (1) before the end of the completion",
        ),
        (
            replace(pair, chosen_ids=[*pair.chosen_ids[:-1], 4, EOS], chosen_mask=mask),
            "chosen: two EOS or end-of-turn tokens (4, 1)",
        ),
        (
            replace(pair, chosen_mask=mask),
            f"chosen: {len(mask) - 1} tokens, a mask of {len(mask)}, {len(mask)} loss tokens",
        ),
    ]
    for damaged, complaint in cases:
        assert str(check_row_structure(damaged, Structure(tokenizer))).startswith(complaint)


def test_pad_token_when_there_is_none_then_eos_and_a_sentence(tokenizer, bare_tokenizer):
    assert pad_token(tokenizer) == (2, None)
    assert pad_token(bare_tokenizer) == (EOS, "the tokenizer has no pad token; EOS '</s>' is used for padding")


# Files and the cache.


def rows_of(number):
    return [{**PAIR, "prompt": f"Question {i}:", "win": i / 10} for i in range(number)]


def test_encode_file_when_read_back_then_rows_are_what_the_encoder_gives(write, tokenizer, tmp_path):
    several = {"prompt": [USER], "chosen": [ONE, USER, TWO], "rejected": [TWO], "win": 0.5}
    path = write(*rows_of(3), several)
    got = encode_file(path, tokenizer, max_length=20, extra=(Column("win"),), cache_dir="cache")
    expected = [
        Encoder(tokenizer, 20).pair(
            PairRow(
                *(r["prompt"], r["chosen"], r["rejected"], {"win": r["win"]}, f"{path}:{i}"),
                prompt_key=prompt_key(r["prompt"]),
            )
        )
        for i, r in enumerate([*rows_of(3), several], 1)
    ]
    assert list(got.pairs) == expected == got.pairs[:]
    assert got.pairs[-1] == expected[-1]
    assert list(pickle.loads(pickle.dumps(got.pairs))) == expected
    with pytest.raises(IndexError):
        got.pairs[4]
    chosen = encode_file(path, tokenizer, max_length=20, need_rejected=False, cache_dir="cache")
    assert chosen.pairs[0].rejected_ids is None
    assert "rejected" not in chosen.report.lengths


def test_encode_file_when_warm_then_nothing_is_tokenised_and_the_report_is_the_same(write, tokenizer, monkeypatch):
    path = write(*rows_of(30), b"{")
    settings = {"max_length": 20, "on_bad_row": "skip", "cache_dir": "cache"}
    cold = encode_file(path, tokenizer, **settings)
    monkeypatch.setattr(encode, "_build", None)
    warm = encode_file(path, tokenizer, **settings)
    assert (warm.report, warm.fingerprint, list(warm.pairs)) == (cold.report, cold.fingerprint, list(cold.pairs))
    moved = encode_file(str(Path(path).rename("other.jsonl")), tokenizer, **settings)
    assert moved.fingerprint == cold.fingerprint
    assert moved.report.examples == {"broken JSON": ("other.jsonl:31",)}
    assert moved.pairs[0].where == "other.jsonl:1"
    assert [p.name for p in Path("cache").glob("*.tmp")] == []


def test_encode_file_when_content_or_settings_differ_then_it_encodes_anew(write, tokenizer):
    path = write(*rows_of(3))
    first = encode_file(path, tokenizer, max_length=20, cache_dir="cache")
    assert encode_file(path, tokenizer, max_length=8, cache_dir="cache").fingerprint != first.fingerprint
    write(*rows_of(2))
    assert len(encode_file(path, tokenizer, max_length=20, cache_dir="cache").pairs) == 2


def test_tokenizer_content_when_it_has_padded_then_unchanged_and_another_template_changes_it(tokenizer):
    before = tokenizer_content(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_content(tokenizer) == before
    other = byte_bpe_tokenizer(["abc"], vocab_size=300, chat_template=CHATML)
    with_template = tokenizer_content(other)
    other.chat_template = "x"
    assert tokenizer_content(other) != with_template


@pytest.mark.parametrize(
    "damage", [*(f"bit {i}" for i in range(0, 100, 7)), "cut", "page", "report", "edited", "arrow", "no report"]
)
def test_encode_file_when_the_cache_is_damaged_then_it_is_made_again_and_said_to_be(write, tokenizer, damage):
    path = write(*rows_of(5))
    first = encode_file(path, tokenizer, max_length=20, cache_dir="cache")
    expected = list(first.pairs)
    (arrow,) = Path("cache").glob("*/rows.arrow")
    content, report = bytearray(arrow.read_bytes()), arrow.parent / "report.json"
    what, _, percent = damage.partition(" ")
    if what == "bit":  # any of them
        content[len(content) * int(percent) // 100] ^= 4
    elif what == "cut":
        del content[-100:]
    elif what == "page":
        content[1024:2048] = bytes(1024)
    arrow.unlink()  # the mapped file stays as it is for who holds it
    if damage != "arrow":
        arrow.write_bytes(content)
    if damage == "report":
        report.write_text("{")
    elif damage == "edited":
        report.write_text(report.read_text().replace('"read": 5', '"read": 6'))
    elif damage == "no report":
        report.unlink()
    again = encode_file(path, tokenizer, max_length=20, cache_dir="cache")
    assert list(again.pairs) == expected
    assert again.fingerprint == first.fingerprint
    assert again.report.notes[-1].startswith(f"the encoded data in {arrow.parent} was damaged (")
    assert encode_file(path, tokenizer, max_length=20, cache_dir="cache").report == first.report


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["rows.arrow", "report.json"])
def test_encode_file_when_the_cache_cannot_be_read_just_now_then_stops(name, number, write, tokenizer, unreadable):
    path = write(*rows_of(5))
    encode_file(path, tokenizer, max_length=20, cache_dir="cache")
    unreadable(name, number)
    with pytest.raises(Unreadable, match=f"{name}: cannot be read just now: "):
        encode_file(path, tokenizer, max_length=20, cache_dir="cache")


def _encode(path, tokenizer, queue):
    queue.put(encode_file(path, tokenizer, max_length=20, cache_dir="cache").fingerprint)


def test_encode_file_when_two_processes_start_then_one_encodes(write, tokenizer):
    path = write(*rows_of(200))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_encode, args=(path, tokenizer, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(fingerprints) == 1
    assert len(list(Path("cache").glob("*/rows.arrow"))) == 1


def test_encode_file_when_the_cache_cannot_be_written_then_one_line_says_so(write, tokenizer):
    path = write(*rows_of(2))
    with pytest.raises(DataError) as error:
        encode_file(path, tokenizer, max_length=20, cache_dir=f"{path}/cache")
    assert str(error.value) == f"{path}/cache: cannot store the encoded data here: Not a directory"


def test_encode_file_when_a_token_has_no_row_in_the_model_then_row_token_and_sizes_are_named(write, tokenizer):
    path = write(*rows_of(2))
    largest = max(max(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in encode_file(
        path, tokenizer, max_length=20, cache_dir="cache", vocab_rows=10_000).pairs)  # fmt: skip
    with pytest.raises(DataError) as error:
        encode_file(path, tokenizer, max_length=20, cache_dir="cache", vocab_rows=largest)
    text = tokenizer.convert_ids_to_tokens(largest)
    assert str(error.value) == (
        f"pairs.jsonl:1: token {largest} ('{text}') is outside the model's vocabulary: the tokenizer has "
        f"{len(tokenizer)} tokens, the model's embedding {largest} rows (use the model's own tokenizer)"
    )


def test_encode_file_when_no_row_is_left_then_it_says_why(write, tokenizer):
    with pytest.raises(DataError) as error:
        encode_file(
            write(b"{", b"{", {**PAIR, "chosen": ""}), tokenizer, max_length=20, on_bad_row="skip", cache_dir="c"
        )
    assert str(error.value) == (
        "pairs.jsonl: none of the 3 examples is usable: 2 broken JSON, 1 empty completion; pairs.jsonl:1: broken JSON "
        "(Expecting property name enclosed in double quotes at column 2), expected one JSON object (drop the example, "
        "or --data.on_bad_row skip); pairs.jsonl:3: 'chosen': empty, expected a non-empty completion (drop the "
        "example, or --data.on_bad_row skip)"
    )


def test_encode_file_when_a_row_is_bad_for_the_tokenizer_then_error_stops_and_skip_counts(write, tokenizer):
    path = write(PAIR, {**PAIR, "prompt": "The s", "chosen": "ky"}, PAIR, {**PAIR, "chosen": "a</s>b"})
    with pytest.raises(DataError, match=r"^pairs.jsonl:2: 'chosen': its first characters and the end"):
        encode_file(path, tokenizer, max_length=20, cache_dir="cache")
    report = encode_file(path, tokenizer, max_length=20, on_bad_row="skip", cache_dir="cache").report
    assert report.dropped == {"token spans the boundary": 1, "EOS inside the completion": 1}
    assert (report.read, report.kept, report.duplicates) == (4, 2, 1)
    assert json.loads(next(Path("cache").glob("*/report.json")).read_text())["report"]["read"] == 4
