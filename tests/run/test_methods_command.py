"""`prefopt methods`: every method once, under its kind, with what its declarations say."""

import pytest

from prefopt import registry
from prefopt.__main__ import main


def test_methods_are_listed_once_each_with_their_data_reference_and_paper(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line and line.split()[0] in registry.names()}
    assert sorted(rows) == registry.names()
    assert "log-probabilities, mismatched too " in rows["kto"]
    assert " chosen_score, rejected_score " in rows["rebel"]
    assert rows["simpo"].split()[1] == "-"
    assert rows["tdpo"].split()[1] == "distribution"
    assert rows["dpo"].endswith("2305.18290")
    assert max(map(len, lines)) <= 130


def test_kinds_hold_every_method_once():
    kinds = registry.by_kind()
    assert sorted(name for names in kinds.values() for name in names) == registry.names()
    assert {"kto": "unpaired", "simpo": "reference-free", "sppo": "rounds", "dpo": "pairs"}.items() <= {
        name: kind for kind, names in kinds.items() for name in names
    }.items()


def test_an_argument_is_refused(capsys):
    assert main(["methods", "dpo"]) == 2
    assert "prefopt methods: found 'dpo', expected no arguments" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_table(flag, capsys):
    assert main(["methods", flag]) == 0
    assert "thought_po" in capsys.readouterr().out
