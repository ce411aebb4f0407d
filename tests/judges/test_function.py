"""A Python function as judge: what it is called with, and everything that it can do wrong."""

import math
import sys

import pytest

from prefopt import judges
from prefopt.errors import ConfigError, RoundError
from prefopt.judges import function
from prefopt.judges.function import FunctionJudge, source_of
from prefopt.settings import JudgeConfig
from tests.judges.conftest import question

HERE = "tests.judges.rewards:"
ASKED = [question("6", "7", answer="7", key="one"), question("5", "8", "9", answer="9", key="two")]


@pytest.fixture
def judge():
    made = []

    def judge(name, timeout=10.0):
        made.append(FunctionJudge(HERE + name, timeout))
        return made[-1]

    yield judge
    for one in made:
        one.close()


def test_function_when_asked_then_it_gets_prompt_response_and_answer(judge):
    found = judge("exact").judge(ASKED)
    assert [judgement.scores for judgement in found] == [(0.0, 1.0), (0.0, 0.0, 1.0)]
    assert [judgement.problems for judgement in found] == [{}, {}]


def test_function_when_it_takes_any_keyword_then_it_gets_the_answer_only(judge):
    assert judge("keywords").judge(ASKED[:1])[0].scores == (1.0, 1.0)


def test_function_when_it_takes_many_then_it_is_called_once_for_all(judge):
    found = judge("many").judge([question("a", "bb", answer="x"), question("ccc", answer="y")])
    assert [judgement.scores for judgement in found] == [(1.0, 2.0), (3.0,)]


def test_function_when_a_score_is_not_finite_then_it_is_nan_and_counted(judge):
    first, second = judge("sometimes_nan").judge(ASKED)
    assert first.scores[0] == 1.0
    assert math.isnan(first.scores[1])
    assert math.isnan(second.scores[1])
    assert (first.problems, second.problems) == ({"nan": 1}, {"nan": 1})


def test_function_when_a_call_takes_too_long_then_it_is_counted_and_the_others_are_judged(judge):
    first, second = judge("hangs", timeout=0.3).judge(ASKED)
    assert first.problems == {"timeout": 1}
    assert math.isnan(first.scores[1])
    assert second.scores == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dies", r"^judge.path: tests.judges.rewards:dies raised ValueError: seven for prompt one$"),
        ("leaves", r"^judge.path: tests.judges.rewards:leaves raised SystemExit: 3 for prompt one$"),
        ("too_few", r"^judge.path: tests.judges.rewards:too_few gave 4 numbers for 5 responses, expected one each$"),
        (
            "says_nothing",
            r"^judge.path: tests.judges.rewards:says_nothing gave None for prompt one, expected a number$",
        ),
        (
            "says_much",
            r"^judge.path: .*:says_much gave None for 5 responses, expected one number each$",
        ),
        ("quits", r"^judge.path: tests.judges.rewards:quits ended its process \(exit status 0\) for prompt one$"),
        (
            "crashes",
            r"^judge.path: .*:crashes ended its process \(killed by SIGSEGV\) for prompt one$",
        ),
    ],
)
def test_function_when_it_fails_then_one_line_names_it(name, message, judge):
    with pytest.raises(RoundError, match=message):
        judge(name).judge(ASKED)


def test_function_when_it_holds_the_interpreter_then_it_is_ended_all_the_same(judge):
    (found,) = judge("backtracks", timeout=0.5).judge([question("x", "y" * 60, "z")])
    assert found.problems == {"timeout": 1}
    assert (found.scores[0], found.scores[2]) == (1.0, 1.0)
    assert math.isnan(found.scores[1])


def test_function_when_a_number_is_beyond_a_float_then_it_is_counted(judge):
    (found,) = judge("huge").judge([question("x")])
    assert found.problems == {"nan": 1}


def test_function_when_its_module_ends_the_process_then_it_is_refused(tmp_path, monkeypatch):
    (tmp_path / "module_that_leaves.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^judge.path: importing 'module_that_leaves' failed: SystemExit: 0$"):
        function.find("module_that_leaves:f")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rewards", r"^judge.path: found 'rewards', expected module:function, such as my_lab.rewards:exact$"),
        ("no_such_module:f", r"^judge.path: no module named 'no_such_module' \(looked in "),
        (HERE + "exakt", r"^judge.path: 'exakt' is not there in module '.*'; did you mean 'exact'\?$"),
        (HERE + "NUMBER", r"^judge.path: 'NUMBER' is no function in module 'tests.judges.rewards'$"),
        (None, r"^judge.path: found none, expected module:function$"),
    ],
)
def test_function_when_there_is_none_then_it_is_refused_before_anything_is_loaded(path, message):
    with pytest.raises(ConfigError, match=message):
        judges.check(JudgeConfig(kind="function", path=path))


def test_function_when_described_then_its_source_is_known_by_its_hash(judge):
    first, other = judge("exact").describe(), judge("many").describe()
    assert first["kind"] == "function"
    assert first["path"] == HERE + "exact"
    assert first["source"] != other["source"]


def test_function_when_a_file_beside_it_has_a_librarys_name_then_the_library_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text(
        "import a_library\nfrom_where = a_library.WHERE\ndef f(prompt, response): return 1"
    )
    theirs = tmp_path / "site"
    theirs.mkdir()
    for folder, where in ((tmp_path, "here"), (theirs, "the library")):
        (folder / "a_library.py").write_text(f"WHERE = {where!r}")
    monkeypatch.setattr(sys, "path", [str(theirs), *(path for path in sys.path if path)])
    monkeypatch.chdir(tmp_path)
    assert function.find("rewards_of_mine:f").__globals__["from_where"] == "the library"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package of a user's, found in the folder that the command is typed in."""
    name = f"lab_{tmp_path.name}".replace("-", "_")
    files = {
        "__init__.py": "",
        "rewards.py": f"from . import words\nfrom {name}.deep.table import SCORES\nimport helper_{name}\n"
        "def score(prompt, response):\n    return words.count(response) + SCORES[0]\n",
        "words.py": "def count(text):\n    import json\n    return len(text.split())\n",
        "deep/table.py": "SCORES = [1]\n",
        "unused.py": "SCORES = [1]\n",
    }
    for file, text in files.items():
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).write_text(text)
    (tmp_path / f"helper_{name}.py").write_text("try:\n    import nowhere_to_be_found\nexcept ImportError:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / name, name


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("rewards.py", True),
        ("words.py", True),
        ("deep/table.py", True),
        ("__init__.py", True),
        ("../helper_NAME.py", True),
        ("unused.py", False),
    ],
)
def test_function_is_known_by_its_module_and_all_that_it_imports_from_its_folder(file, matters, lab):
    folder, name = lab
    before = source_of(f"{name}.rewards:score")
    path = folder / file.replace("NAME", name)
    path.write_text(path.read_text() + "# edited\n")
    assert (source_of(f"{name}.rewards:score") != before) == matters


def test_function_without_a_module_that_can_be_read_has_no_source():
    assert source_of("builtins:len") is None
