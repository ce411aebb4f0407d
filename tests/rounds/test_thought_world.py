"""Thoughts are learned by what they do for the answer, where a judge sees the answer alone."""

import json

import pytest


@pytest.mark.slow  # a minute
def test_thought_po_gains_a_quarter_in_three_rounds_and_its_direct_baseline_nothing(server, tmp_path):
    def exact(name, *more):
        flags = {"method": "thought_po", "rounds.count": 3, "rounds.eval_prompts": 32, "output": tmp_path / name}
        argv = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        ended = server.train([*argv, *more])
        assert ended.status == 0, ended.err
        return [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]

    thinking = exact("thought")
    accuracy = [line["exact/accuracy"] for line in thinking]
    assert accuracy[3] - accuracy[0] >= 0.25
    assert all(line["exact/parsed"] > 0.9 for line in thinking)
    direct = exact("direct", "--method.thought_prompt", "none", "--rounds.prompts", "200")
    assert accuracy[3] > 0.3 + max(line["exact/accuracy_direct"] for line in direct)
