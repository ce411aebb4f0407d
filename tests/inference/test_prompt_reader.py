import json
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.inference import prompt_templates
from prefopt.inference.prompt_templates import read_templates, short_value
from prefopt.types import Response

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "test_time_po_short_value.json").read_text())
FILES = Path(prompt_templates.__file__).parent / "templates"


@pytest.mark.parametrize("words", GOLDEN["cases"])
def test_short_value_is_the_authors(words):
    assert short_value(" ".join(f"w{i}" for i in range(int(words)))) == GOLDEN["cases"][words]


def test_a_template_leaves_what_looks_like_a_mark_in_a_text_alone():
    templates = read_templates()
    system, user = templates.loss.filled(query="{chosen}", rejected="{query}", chosen="{rejected}")
    assert "\n{chosen}\n" in system
    assert system.endswith("{query}")
    assert user == "{rejected}"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("<IMPROVED_VARIABLE> new </IMPROVED_VARIABLE>", Response("new")),
        ("Well.\n<IMPROVED_VARIABLE>\na\n\nb\n</IMPROVED_VARIABLE> Done.", Response("a\n\nb")),
        # a response that speaks of the tags
        (
            "<IMPROVED_VARIABLE>write <IMPROVED_VARIABLE>x</IMPROVED_VARIABLE> in it</IMPROVED_VARIABLE>",
            Response("write <IMPROVED_VARIABLE>x</IMPROVED_VARIABLE> in it"),
        ),
        ("<IMPROVED_VARIABLE>a &lt;/CONTEXT&gt; b &lt;i&gt;</IMPROVED_VARIABLE>", Response("a </CONTEXT> b &lt;i&gt;")),
        ("new", prompt_templates.NO_TAGS),
        ("<IMPROVED_VARIABLE>cut off", prompt_templates.NO_TAGS),
        ("</IMPROVED_VARIABLE>no<IMPROVED_VARIABLE>", prompt_templates.NO_TAGS),
        ("<improved_variable>small</improved_variable>", prompt_templates.NO_TAGS),
        ("", prompt_templates.NO_TAGS),
        ("<IMPROVED_VARIABLE> \n </IMPROVED_VARIABLE>", prompt_templates.EMPTY),
    ],
)
def test_the_new_response_stands_between_the_first_opening_tag_and_the_last_closing_one(answer, found):
    assert read_templates().improved(answer) == found


def test_a_response_cannot_open_or_close_a_part_of_a_template_and_comes_back_as_it_was():
    templates = read_templates()
    text = "x </VARIABLE><CONTEXT> <IMPROVED_VARIABLE>y</IMPROVED_VARIABLE> <b>fat</b> <OTHER>"
    escaped = templates.escaped(text)
    assert escaped == (
        "x &lt;/VARIABLE&gt;&lt;CONTEXT&gt; &lt;IMPROVED_VARIABLE&gt;y&lt;/IMPROVED_VARIABLE&gt; <b>fat</b> <OTHER>"
    )
    assert templates.improved(f"<IMPROVED_VARIABLE>{escaped}</IMPROVED_VARIABLE>") == Response(text)


def test_a_folder_takes_the_places_of_the_files_it_has(tmp_path):
    (tmp_path / "loss.txt").write_text("Mine. {query} {rejected}\n---\n{chosen}\n")
    found, usual = read_templates(str(tmp_path)), read_templates()
    assert found.loss.system == "Mine. {query} {rejected}"
    assert found.update == usual.update
    assert found.digest() != usual.digest()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "loss.txt",
            "{query}\n---\n{chosen}",
            r"templates: '.*loss.txt' has no {rejected}, expected {chosen}, {query}",
        ),
        ("loss.txt", "{query}{rejected}{choosen}\n---\n{chosen}", r"has {choosen}; did you mean 'chosen'\?"),
        (
            "loss.txt",
            "{query}{rejected}{chosen}",
            r"has one part, expected a system part, a line '---' and a user part",
        ),
        ("update.txt", "a\n---\n{chosen}{feedback}", r"has no <IMPROVED_VARIABLE>, expected an instruction"),
        ("constraints.txt", "\n", r"'.*constraints.txt' is empty"),
        ("losss.txt", "x", r"templates: found '.*losss.txt'; did you mean 'loss'\?, expected loss.txt, loss_alone.txt"),
        ("readme.md", "x", r"templates: found no .txt file in '.*', expected loss.txt"),
        ("loss.txt", b"\xff\xfe", r"'.*loss.txt': is not text"),
    ],
)
def test_a_template_that_cannot_work_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=words) as error:
        read_templates(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_one_line():
    with pytest.raises(ConfigError, match=r"^templates: 'nowhere' is no folder"):
        read_templates("nowhere")


def test_every_template_is_packed_with_prefopt():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"inference/templates/*.txt"' in text
    assert {path.stem for path in FILES.iterdir()} == set(prompt_templates._MARKS)
