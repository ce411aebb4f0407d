"""Where a thought ends and a response begins, and what of a prompt file is refused."""

import pytest

from prefopt.errors import ConfigError
from prefopt.thoughts import EMPTY, NO_MARKER, REPEATED, THOUGHT_AFTER, Answer, ThoughtFormat, names, read_format

KEY = "method.thought_prompt"
SPECIFIC, GENERIC, SYSTEM, DIRECT = (read_format(name, key=KEY) for name in ("specific", "generic", "system", "none"))
BEFORE, AFTER = "Here is my thought process:", "Here is my response:"


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        (SPECIFIC, "Draft: 5. Wrong.\n<R> It is 4.\n", Answer("Draft: 5. Wrong.", "It is 4.")),
        (SPECIFIC, "<R>4", Answer("", "4")),
        (SPECIFIC, "It is 4.", NO_MARKER),
        (SPECIFIC, "", NO_MARKER),
        (SPECIFIC, "a thought that was cut of", NO_MARKER),
        (SPECIFIC, "hm <R>", EMPTY),
        (SPECIFIC, "hm <R> \n\t", EMPTY),
        (SPECIFIC, "hm <R> 4 <R> 5", REPEATED),
        (SPECIFIC, "hm <R><R> 5", REPEATED),
        (SPECIFIC, "hm <r> 4", NO_MARKER),
        (GENERIC, f"{BEFORE} two and two. {AFTER} 4", Answer("two and two.", "4")),
        (GENERIC, f"two and two. {AFTER} 4", Answer("two and two.", "4")),
        (GENERIC, f"{BEFORE} a {BEFORE} b {AFTER} 4", Answer(f"a {BEFORE} b", "4")),
        (GENERIC, f"{AFTER} 4. {BEFORE} now I think", THOUGHT_AFTER),
        (GENERIC, f"{BEFORE} a {AFTER} 4 {AFTER} 5", REPEATED),
        (DIRECT, " 4 ", Answer("", "4")),
        (DIRECT, "hm <R> 4", Answer("", "hm <R> 4")),
        (DIRECT, " \n", EMPTY),
    ],
)
def test_completion_is_cut_in_two_or_counted_by_what_is_wrong(form, text, found):
    assert form.parse(text) == found


def test_first_marker_counts_where_repeated_ones_are_allowed():
    first = read_format("generic", key=KEY, on_repeated_marker="first")
    assert first.parse(f"a {AFTER} 4 {AFTER} 5") == Answer("a", f"4 {AFTER} 5")
    assert first.parse(f"a {AFTER} 4 {BEFORE} b") == Answer("a", f"4 {BEFORE} b")
    assert first.parse(f"a {AFTER}") == EMPTY


def test_prompt_is_put_into_the_thought_prompt():
    asked = SPECIFIC.render("What is {2}+2?")
    assert asked.endswith("User query: What is {2}+2?")
    assert "write <R> once" in asked
    assert DIRECT.render("What is 2+2?") == "What is 2+2?"
    generic = GENERIC.render("hello")
    assert BEFORE in generic
    assert AFTER in generic


def test_thought_prompt_stands_around_the_last_user_turn():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "2+2?"},
    ]
    asked = SPECIFIC.render(turns)
    assert asked[:3] == turns[:3]
    assert asked[3]["role"] == "user"
    assert asked[3]["content"].endswith("User query: 2+2?")
    assert turns[3]["content"] == "2+2?", "the prompt itself is left as it was"


def test_system_prompt_stands_before_all_else():
    turns = [{"role": "user", "content": "2+2?"}]
    asked = SYSTEM.render(turns)
    assert [turn["role"] for turn in asked] == ["system", "user"]
    assert AFTER in asked[0]["content"]
    both = SYSTEM.render([{"role": "system", "content": "Be brief."}, *turns])
    assert [turn["role"] for turn in both] == ["system", "user"]
    assert both[0]["content"].endswith("\n\nBe brief.")
    assert SYSTEM.render("2+2?").endswith("\n\n2+2?")


@pytest.mark.parametrize("prompt", ["what does <R> mean?", [{"role": "user", "content": "what does <R> mean?"}]])
def test_prompt_that_holds_a_marker_is_refused(prompt):
    with pytest.raises(ValueError, match="contains the marker '<R>'"):
        SPECIFIC.render(prompt)
    assert DIRECT.render(prompt) == prompt


def test_conversation_without_a_user_turn_is_refused():
    with pytest.raises(ValueError, match="has no user turn"):
        SPECIFIC.render([{"role": "system", "content": "Be brief."}])


def test_what_goes_with_a_model_gives_the_same_format_again():
    assert ThoughtFormat(**GENERIC.to_dict()) == GENERIC


def test_markers_of_the_file_give_way_to_those_that_are_named(tmp_path):
    form = read_format("specific", key=KEY, response_marker="[answer]", thought_marker="[thought]")
    assert "write [answer] once" in form.render("x")
    assert form.parse("[thought] a [answer] b") == Answer("a", "b")
    file = tmp_path / "mine.txt"
    file.write_text("response_marker: =>\n---\nThink, write {response_marker}, answer: {prompt}\n")
    own = read_format(str(file), key=KEY)
    assert own.render("2+2?") == "Think, write =>, answer: 2+2?"
    assert own.parse("a => b") == Answer("a", "b")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Think: {prompt}", "has no response marker, expected a first line 'response_marker: TEXT'"),
        ("response_marker:\n---\n{prompt}", "has no response marker"),
        ("respons_marker: <R>\n---\n{prompt}", "mine.txt:1: found 'respons_marker: <R>', expected 'response_marker"),
        ("response_marker: <R>\n---\n{promt}", "has {promt}; did you mean 'prompt'?, expected {prompt}"),
        (
            "thought_marker: R\nresponse_marker: <R>\n---\n{prompt}",
            "one of the markers 'R' and '<R>' contains the other",
        ),
    ],
)
def test_prompt_file_that_cannot_be_used_is_one_line(text, line, tmp_path):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_format(str(tmp_path / "mine.txt"), key=KEY)
    assert line in str(caught.value)
    assert str(caught.value).startswith("method.thought_prompt: ")


def test_prompt_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"'specifc': no such file.*expected one of none, .*did you mean 'specific'"):
        read_format("specifc", key=KEY)
    assert {"generic", "specific", "system"} <= {*names()}
