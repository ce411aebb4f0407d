"""What the `data` command shows of a pair: each token as what it is, in a terminal and on a page."""

import re
from html import unescape
from html.parser import HTMLParser

import pytest

from prefopt.data.encoder import Encoder
from prefopt.data.preview import page, preview_pair, spread, terminal
from prefopt.data.rows import read_rows
from prefopt.errors import DataError
from prefopt.types import EncodedPair, PairRow

USER = {"role": "user", "content": "Why?"}
ANSWERS = [{"role": "assistant", "content": text} for text in ("Because é🙂.", "So.", "No.")]


@pytest.fixture
def pair(tokenizer):
    row = PairRow([USER], [ANSWERS[0], USER, ANSWERS[1]], [ANSWERS[2]], {"win": 0.75}, "pairs.jsonl:7")
    return Encoder(tokenizer, 200).pair(row)


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_pieces_are_all_tokens_in_order_with_their_masks(pair, tokenizer):
    found = preview_pair(pair, tokenizer)
    for ids, pieces in zip(
        (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids), (found.prompt, found.chosen, found.rejected), strict=True
    ):
        assert [i for piece in pieces for i in piece.ids] == ids
        assert "".join(piece.text for piece in pieces) == decoded(tokenizer, ids)
    scored = [piece.kind == "scored" for piece in found.chosen for _ in piece.ids]
    assert scored == pair.chosen_mask
    assert {piece.text for piece in found.chosen if piece.special} == {"<|im_start|>", "<|im_end|>"}
    assert found.prompt[0].text == "<s>"
    assert found.prompt[0].special
    emoji = next(piece for piece in found.chosen if "🙂" in piece.text)
    assert len(emoji.ids) > 1, "its bytes are several tokens, shown as one character"
    assert emoji.position == len(pair.prompt_ids) + [i for p in found.chosen for i in p.ids].index(emoji.ids[0])


def test_piece_when_a_character_is_cut_in_the_middle_then_its_tokens_are_still_shown(tokenizer):
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    pair = Encoder(tokenizer, 200).pair(PairRow("Q:", " yes", " no", {}, "x:1"))
    cut = preview_pair(
        type(pair)(pair.prompt_ids, ids[:2], pair.rejected_ids, [True] * 2, pair.rejected_mask), tokenizer
    )
    assert [i for piece in cut.chosen for i in piece.ids] == ids[:2]


def test_terminal_without_colour_has_brackets_around_what_is_scored(pair, tokenizer):
    text = terminal([preview_pair(pair, tokenizer)], color=False)
    assert "\x1b" not in text
    assert "pairs.jsonl:7: prompt" in text
    assert "⟦Because é🙂.‹<|im_end|>›⟧" in text
    assert "\n  ‹<|im_start|>›user\n  Why?‹<|im_end|>›\n  ‹<|im_start|>›assistant\n  ⟦So.‹<|im_end|>›⟧\n" in text
    assert f"{len(pair.chosen_ids)} tokens, {sum(pair.chosen_mask)} loss tokens" in text
    assert text.endswith(" win = 0.75")


def test_terminal_with_colour_says_the_same(pair, tokenizer):
    text = terminal([preview_pair(pair, tokenizer)], color=True)
    assert "\x1b[1;32mBecause é🙂.\x1b[0m\x1b[1;32;7m<|im_end|>\x1b[0m" in text
    assert "\x1b[33;7m<|im_start|>\x1b[0m\x1b[33muser\x1b[0m\n  \x1b[33mWhy?" in text
    bare = re.sub(r"\x1b\[[\d;]*m", "", text)
    marked = re.sub("[⟦⟧‹›]", "", terminal([preview_pair(pair, tokenizer)], color=False))
    assert bare.splitlines()[2:] == marked.splitlines()[2:]


@pytest.mark.parametrize("color", [False, True])
def test_terminal_when_the_data_holds_control_characters_then_they_steer_nothing(tokenizer, color):
    pair = Encoder(tokenizer, 200).pair(PairRow("Q:", " a\x1b[2J\x07\r", " b", {}, "x:1"))
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal([preview_pair(pair, tokenizer)], color=color))
    assert r"a\x1b[2J\x07\r" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


class _Page(HTMLParser):
    """The tokens of a page by class, and whatever it would load."""

    def __init__(self):
        super().__init__()
        self.tokens, self.loads, self._inside = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loads += [v for k, v in attrs.items() if k in ("src", "href")] + ([tag] if tag == "script" else [])
        if tag == "span" and "title" in attrs:
            self.tokens.append([attrs["class"].split()[1:], ""])
            self._inside.append(True)
        elif tag == "span":
            self._inside.append(False)

    def handle_endtag(self, tag):
        if tag == "span":
            self._inside.pop()

    def handle_data(self, data):
        if self._inside and self._inside[-1]:
            self.tokens[-1][1] += data


def test_page_has_each_token_in_its_colour_and_loads_nothing(pair, tokenizer):
    text = page("<pairs>", ["data <x>: 1 row"], [preview_pair(pair, tokenizer)])
    assert "<title>&lt;pairs&gt;</title>" in text
    assert "data &lt;x&gt;: 1 row" in text
    found = _Page()
    found.feed(text)
    assert found.loads == []
    assert "url(" not in text
    assert "@import" not in text
    for kind, ids in (
        ("prompt", pair.prompt_ids),
        ("scored", [i for i, on in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if on] + pair.rejected_ids),
        ("unscored", [i for i, on in zip(pair.chosen_ids, pair.chosen_mask, strict=True) if not on]),
    ):
        assert "".join(unescape(t) for classes, t in found.tokens if kind in classes) == decoded(tokenizer, ids)
    assert {t for classes, t in found.tokens if "special" in classes} == {"<s>", "<|im_start|>", "<|im_end|>"}


def test_page_when_the_data_holds_markup_then_it_is_text(tokenizer):
    pair = Encoder(tokenizer, 200).pair(PairRow("Q:", " <script>alert(1)</script>", " b", {}, '"><img src=x>'))
    text = page("x", [], [preview_pair(pair, tokenizer)])
    assert "<script" not in text
    assert "<img" not in text


def test_pieces_when_the_tokenizer_has_no_special_tokens_beyond_the_end(bare_tokenizer):
    pair = Encoder(bare_tokenizer, 200).pair(PairRow("Q:", " yes", " no", {}, "x:1"))
    found = preview_pair(pair, bare_tokenizer)
    assert [piece.text for piece in found.chosen if piece.special] == ["</s>"]
    assert not [piece for piece in found.prompt if piece.special]


def test_pieces_when_words_carry_their_spaces_as_sentencepiece_has_them():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(["one two three, why one", "two three one"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    pair = Encoder(tokenizer, 200).pair(PairRow("why one", " two three", " one", {}, "x:1"))
    found = preview_pair(pair, tokenizer)
    assert "".join(piece.text for piece in found.prompt) == "why one"
    assert "".join(piece.text for piece in found.chosen).strip() == "two three</s>"
    assert [i for piece in found.chosen for i in piece.ids] == pair.chosen_ids


def test_rows_are_spread_over_all():
    assert spread(3, 9) == [0, 3, 6]
    assert spread(5, 2) == [0, 1]
    assert spread(0, 9) == []


def test_pieces_when_a_row_is_long_then_no_token_is_decoded_more_often_than_in_a_short_one(tokenizer):
    """And bytes that make no character end a piece after some of them."""

    class Counting:
        added_tokens_decoder, all_special_ids = tokenizer.added_tokens_decoder, tokenizer.all_special_ids
        decoded = 0

        def decode(self, ids, **settings):
            self.decoded += len(ids)
            return tokenizer.decode(ids, **settings)

    byte = tokenizer.convert_tokens_to_ids("ģ")  # 0x80, which begins no character
    words = tokenizer("An apple is a fruit. ", add_special_tokens=False)["input_ids"]
    for ids, most in ((words * 60, 6), ([byte] * 900, 40)):
        pair = EncodedPair([0], ids, None, [True] * len(ids), None)
        counting = Counting()
        found = preview_pair(pair, counting)
        assert [i for piece in found.chosen for i in piece.ids] == ids
        assert "".join(piece.text for piece in found.chosen) == tokenizer.decode(ids)
        assert counting.decoded < most * len(ids)


def test_complaint_when_a_name_holds_hidden_characters_or_has_no_end_then_is_one_short_line(write):
    role = "rejected\n\x1b[2J\u202e" + "y" * 9000
    with pytest.raises(DataError) as error:
        read_rows(write({"prompt": "q", "chosen": "a", role: "b"}))
    line = str(error.value)
    assert line.startswith("pairs.jsonl:1: 'rejected': missing, expected a completion; the example has ")
    assert len(line) < 1500
    assert not re.search("[\x00-\x1f\u202e]", line)
