"""The card of a run decides what its folder is: missing, of another shape or damaged it is refused."""

import errno
import json
import re

import pytest

from prefopt import storage
from prefopt.errors import TrainError
from prefopt.run.card import CARD, write_or_check_card
from prefopt.run.output_checks import check_same_run
from prefopt.settings import parse
from prefopt.storage import Unreadable

LEFT = ["metrics.jsonl", "checkpoints", "best", "model", "adapter", "round_00", "round_01"]
LEFT += ["eval_pairs.jsonl", "samples.jsonl", "rounds.md", "frontier.png"]


@pytest.fixture
def config():
    return parse(["--method", "dpo"])


@pytest.fixture
def output(tmp_path, config):
    """A folder with a card."""
    card = {"config": config.to_dict(), "data": {"train": "abc"}, "model": {"sha256": "def"}, "reference": None}
    storage.write_sealed(tmp_path / CARD, card)
    return tmp_path


@pytest.mark.parametrize("left", LEFT)
def test_card_when_gone_from_a_folder_that_a_run_has_written_to_then_refused(left, output, config):
    (output / left).mkdir()
    if left in ("model", "adapter"):
        (output / left / "manifest.json").write_text("{}")
    check_same_run(config, output)
    (output / CARD).unlink()
    with pytest.raises(
        TrainError, match=f"holds '{left}' without a run_card.json, so the run that wrote it is unknown"
    ):
        check_same_run(config, output)
    with pytest.raises(TrainError):
        write_or_check_card({"config": config.to_dict()}, output)


def test_card_when_any_bit_of_it_is_flipped_then_refused_or_the_same(output, config):
    (output / "checkpoints").mkdir()
    whole = (output / CARD).read_bytes()
    for bit in range(3, 8 * len(whole), 97):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (output / CARD).write_bytes(data)
        found = _json(data)
        if found == json.loads(whole) or (found is not None and "sha256" not in found):
            continue  # white space; or the name of the hash, without which a card is as those before it had one
        with pytest.raises(TrainError, match=re.escape(str(output / CARD))) as caught:
            check_same_run(config, output)
        assert "\n" not in str(caught.value)


def _json(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize(
    "card",
    [
        *(None, [], 3, "text", {}, {"config": {}, "data": {}, "reference": None}),
        {"config": [], "data": {}, "model": {}, "reference": None},
        {"config": {}, "data": {}, "model": {}, "reference": []},
    ],
)
@pytest.mark.parametrize("left", [True, False])
def test_card_when_of_another_shape_then_refused(card, left, output, config):
    if left:
        (output / "checkpoints").mkdir()
    (output / CARD).write_text(json.dumps(card))
    with pytest.raises(TrainError, match=re.escape(str(output / CARD))):
        check_same_run(config, output)
    assert json.loads((output / CARD).read_text()) == card


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", [CARD, "checkpoints"])
def test_card_when_it_cannot_be_read_just_now_then_stops(name, number, output, config, unreadable):
    (output / "checkpoints").mkdir()
    unreadable(name, number)
    with pytest.raises(Unreadable, match="cannot be read just now"):
        check_same_run(config, output)


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_output_when_it_holds_a_model_that_no_run_has_exported_then_refused(name, output, config):
    (output / name).mkdir()
    (output / name / "model.safetensors").write_text("the base model of somebody")
    with pytest.raises(TrainError, match=f"/{name}: was not written by a run, or lost its manifest.json"):
        check_same_run(config, output)


def test_output_when_it_holds_a_config_of_a_user_then_it_is_not_written_over(tmp_path, config):
    (tmp_path / "config.yaml").write_text("method: dpo")
    with pytest.raises(TrainError, match=r"holds a config\.yaml that no run has written"):
        check_same_run(config, tmp_path)


def test_card_when_several_parts_of_a_stage_begin_a_run_then_each_finds_the_first_ones(tmp_path, config):
    """Array tasks share a run; any of them may be the first."""
    card = {"config": config.to_dict(), "data": {"train": "abc"}, "model": {}, "reference": None}
    write_or_check_card(card, tmp_path, write=False)
    write_or_check_card(card | {"started": "later"}, tmp_path, write=False)
    assert "started" not in json.loads((tmp_path / CARD).read_text())
    with pytest.raises(TrainError, match="the training data is not what this run began with"):
        write_or_check_card(card | {"data": {"train": "other"}}, tmp_path, write=False)
