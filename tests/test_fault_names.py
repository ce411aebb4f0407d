"""Faults are put into functions by name, `module:function`: each name that a test holds leads to a function."""

import ast
import importlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
NAME = re.compile(r"prefopt(\.\w+)+:\w+(\.\w+)*")


def names(path):
    """`module:function` as literals, or as a literal behind a constant of the module, such as ROUNDS + "store:f"."""
    tree = ast.parse(path.read_text())
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.BinOp) and isinstance(node.left, ast.Name) and isinstance(node.right, ast.Constant):
            yield f"{constants.get(node.left.id, '')}{node.right.value}"


FOUND = sorted({name for path in TESTS.rglob("*.py") for name in names(path) if NAME.fullmatch(name)})


@pytest.mark.parametrize("name", FOUND)
def test_the_place_of_a_fault_is_there(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert callable(found)
