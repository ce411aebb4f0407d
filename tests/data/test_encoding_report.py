import json

from prefopt.data.collate import collate
from prefopt.data.encode import encode_file
from prefopt.data.encoder import Encoder
from prefopt.data.encoding_report import DataReport, show_batch
from prefopt.types import PairRow
from tests.data.conftest import PAIR


def test_report_when_printed_then_every_count_is_there(write, bare_tokenizer):
    long = {**PAIR, "prompt": "x " * 30}
    path = write(PAIR, PAIR, {**PAIR, "chosen": " "}, long, {**PAIR, "chosen": " 1" * 40})
    report = encode_file(path, bare_tokenizer, max_length=24, on_bad_row="skip", cache_dir="cache").report
    lengths = [
        f"  {name:<10}{''.join(f'{n:>8}' for n in report.lengths[name])}" for name in ("prompt", "chosen", "rejected")
    ]
    assert report.lines() == [
        "data pairs.jsonl: 5 examples read, 4 kept, 1 dropped",
        "  format      text, explicit prompt",
        "  dropped     1 empty completion: pairs.jsonl:3",
        "  tokens          p5     p50     p95     max",
        *lengths,
        "  truncated   to 24 tokens: 2 (50.0%) with a left-truncated prompt, "
        "1 (25.0%) with a right-truncated completion",
        "  unfinished  1 of 8 completions have no EOS or end-of-turn token",
        "  duplicates  1; chosen == rejected: 0",
        "  note        the tokenizer has no pad token; EOS '</s>' is used for padding",
        "  note        warning: 50.0% of the pairs are truncated; raise data.max_length, or see data.overlong",
        "  note        the prompt is truncated to one token because a completion fills data.max_length: 1 example, "
        "the first pairs.jsonl:5",
    ]
    assert str(report) == "\n".join(report.lines())
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_show_batch_when_printed_then_brackets_stand_around_what_is_scored(tokenizer):
    user = {"role": "user", "content": "Name a fruit"}
    one, two = ({"role": "assistant", "content": c} for c in ("An apple", "Pears"))
    rows = [PairRow([user], [one, user, two], [two], {"win": 0.5}, "f:1")]
    batch = collate([Encoder(tokenizer, 99).pair(row) for row in rows], pad_id=2, columns=("win",))
    lines = show_batch(batch, tokenizer).splitlines()
    real, scored = batch.attention_mask.sum(1).tolist(), [*batch.chosen_lengths, *batch.rejected_lengths]
    assert lines == [
        "pair 0 of 1, f:1",
        f"  chosen: {real[0]} tokens, {scored[0]} scored, 0 of padding",
        "    <s><|im_start|>user",
        "    Name a fruit<|im_end|>",
        "    <|im_start|>assistant",
        "    ⟦An apple<|im_end|>⟧",
        "    <|im_start|>user",
        "    Name a fruit<|im_end|>",
        "    <|im_start|>assistant",
        "    ⟦Pears<|im_end|>⟧",
        f"  rejected: {real[1]} tokens, {scored[1]} scored, {real[0] - real[1]} of padding",
        "    <s><|im_start|>user",
        "    Name a fruit<|im_end|>",
        "    <|im_start|>assistant",
        "    ⟦Pears<|im_end|>⟧",
        "  win = 0.5",
    ]
    assert "\x1b[1;32mPears<|im_end|>\x1b[0m" in show_batch(batch, tokenizer, color=True)
    assert show_batch(collate([], pad_id=2), tokenizer) == "an empty batch"
