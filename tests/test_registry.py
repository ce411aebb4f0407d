import re
import sys

import pytest

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.method import Method


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Writes files of a folder `a_lab` that lies where the command is typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "a_lab"
    folder.mkdir()

    def write(name, text):
        (folder / f"{name}.py").write_text(text)
        return f"a_lab.{name}"

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_lab"]:
        del sys.modules[name]


ONE = """
from dataclasses import dataclass
from prefopt.method import Method

@dataclass(frozen=True)
class One(Method):
    "One."
"""
TWO = ONE + ONE.replace("One", "Two")


def refusal(name):
    with pytest.raises(ConfigError) as error:
        registry.get(name)
    assert "\n" not in str(error.value)
    return str(error.value)


# Built-in methods.


def test_get_when_any_name_of_the_folder_then_its_one_method():
    found = [registry.get(name) for name in registry.names()]
    assert all(issubclass(cls, Method) and cls is not Method for cls in found)
    assert [cls.__module__ for cls in found] == [f"prefopt.methods.{name}" for name in registry.names()]


def test_get_when_the_name_is_misspelt_then_the_nearest_is_offered_and_all_are_named():
    known = ", ".join(registry.names())
    assert refusal("tdop") == f"unknown method 'tdop'; did you mean 'tdpo'? known: {known} (or a dotted module path)"


def test_get_when_the_name_is_like_no_other_then_all_are_named():
    said = refusal("kangaroo")
    assert "did you mean" not in said
    assert said.startswith("unknown method 'kangaroo'; known: ")


@pytest.fixture
def claims(tmp_path, monkeypatch):
    """A folder of methods in which two claim one short name."""
    for name in ("thoughtful", "timely"):
        (tmp_path / f"{name}.py").write_text(f'{ONE}    ambiguous = ("tpo",)\n')
    (tmp_path / "plain.py").write_text(ONE)
    (tmp_path / "annotated.py").write_text(f'{ONE}    ambiguous: "ClassVar[tuple[str, ...]]" = ("ann",)\n')
    monkeypatch.setattr(registry, "_FOLDER", tmp_path)
    monkeypatch.setattr(registry, "_INFERENCE", tmp_path / "none")
    registry.ambiguous_names.cache_clear()
    yield
    registry.ambiguous_names.cache_clear()


@pytest.mark.usefixtures("claims")
def test_get_when_several_methods_claim_the_name_then_it_is_refused_and_they_are_named():
    assert refusal("tpo") == "method 'tpo' is ambiguous; it could mean thoughtful or timely: name one of them"
    assert "annotated" in refusal("ann")
    assert refusal("tpoo").startswith("unknown method")


def test_a_short_name_that_a_method_and_a_strategy_claim_names_both():
    assert refusal("tpo") == "method 'tpo' is ambiguous; it could mean thought_po or test_time_po: name one of them"
    with pytest.raises(ConfigError, match=r"--strategy: 'tpo' is ambiguous.*thought_po or test_time_po.*train.py"):
        registry.check_strategy("tpo")


def test_what_trains_nothing_is_no_method_and_what_is_trained_no_strategy():
    assert refusal("test_time_po") == (
        "'test_time_po' is not a method: it is a strategy that answers prompts without training; "
        "use scripts/infer.py --strategy test_time_po"
    )
    with pytest.raises(ConfigError, match=r"--strategy: 'dpo' is a method, which is trained: scripts/train.py"):
        registry.check_strategy("dpo")
    with pytest.raises(ConfigError, match=r"unknown strategy 'best_of_m'; did you mean 'best_of_n'\?"):
        registry.check_strategy("best_of_m")


# Dotted paths.


def test_get_when_a_dotted_path_then_the_file_beside_the_command_is_imported(lab):
    path = lab("mine", ONE)
    assert registry.get(path).__name__ == "One"
    assert registry.get(f"{path}.One") is registry.get(path)


def test_get_when_two_methods_in_a_file_then_the_class_must_be_named(lab):
    path = lab("two", TWO)
    said = f"method '{path}': expected exactly one Method class in the file, found 2: One, Two (name one: {path}.One)"
    assert refusal(path) == said
    assert registry.get(f"{path}.Two").__name__ == "Two"


def test_get_when_no_method_in_the_file_then_that_is_said(lab):
    path = lab("empty", "from prefopt.method import Method\n")
    assert refusal(path) == f"method '{path}': expected exactly one Method class in the file, found none"


def test_get_when_there_is_no_such_module_then_where_it_looked_is_said(lab, tmp_path):
    lab("mine", ONE)
    assert refusal("a_lab.yours") == f"method 'a_lab.yours': no module named 'a_lab.yours' (looked in {tmp_path} too)"
    assert refusal("b_lab.mine") == f"method 'b_lab.mine': no module named 'b_lab' (looked in {tmp_path} too)"


def test_get_when_the_module_has_no_such_class_then_that_is_said(lab):
    path = lab("mine", ONE)
    assert refusal(f"{path}.Three") == f"method '{path}.Three': module '{path}' has no Method class 'Three'"


def test_get_when_the_class_is_no_method_then_that_is_said(lab):
    path = lab("mine", ONE + "\nclass Other: pass\n")
    assert refusal(f"{path}.Other") == f"method '{path}.Other': module '{path}' has no Method class 'Other'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_library\n", "importing it failed: no module named 'no_such_library'"),
        ("import a_lab.helper\n", "importing it failed: no module named 'a_lab.helper'"),
        ("1 / 0\n", "importing it failed: ZeroDivisionError: division by zero"),
        ("def f(:\n", r"importing it failed: SyntaxError: invalid syntax \(broken.py, line 1\)"),
    ],
)
def test_get_when_importing_fails_inside_the_file_then_the_cause_is_said(lab, text, said):
    path = lab("broken", text)
    assert re.fullmatch(f"method '{path}': {said}", refusal(path))
    assert re.fullmatch(f"method '{path}.One': {said}", refusal(f"{path}.One"))


@pytest.mark.parametrize("path", [".", "a_lab.", ".mine", "a lab.mine", "my_lab/my_method.py"])
def test_get_when_the_path_is_malformed_then_it_is_a_users_mistake(lab, path):
    lab("mine", ONE)
    assert path in refusal(path)


def test_get_when_a_files_path_is_given_then_its_dotted_form_is_offered(lab):
    lab("mine", ONE)
    assert refusal("a_lab/mine.py").endswith("; did you mean 'a_lab.mine'?")
