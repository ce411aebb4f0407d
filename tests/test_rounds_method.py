"""What a method decides about rounds: a mixin that a plain loss does not see, with defaults for such a loss."""

import importlib
import sys

import pytest

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.rounds_method import MEMBERS, RoundsMethod, in_rounds

OWN = """
from dataclasses import dataclass
from prefopt.method import Method

@dataclass(frozen=True)
class Own(Method):
    "Own."
    def make_pairs(self, group):
        return "none"
"""


def test_a_plain_loss_has_no_member_of_the_mixin_and_works_in_rounds_by_its_defaults():
    method = registry.get("dpo")()
    assert not MEMBERS & {*dir(method)}
    assert type(in_rounds(method)) is RoundsMethod
    assert in_rounds(method).judge_view("text").text == "text"


def test_a_method_with_the_mixin_is_its_own_half_of_rounds():
    method = registry.get("sppo")()
    assert in_rounds(method) is method
    assert "make_pairs" in MEMBERS


def test_a_class_that_defines_a_member_without_the_mixin_is_refused(tmp_path, monkeypatch):
    (tmp_path / "own_pairs.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(
        ConfigError, match=r"^method 'own_pairs.Own': it defines make_pairs, .* class Own\(RoundsMethod, Met"
    ):
        registry.get("own_pairs.Own")
    sys.modules.pop("own_pairs")
