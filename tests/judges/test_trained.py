"""A judge of one's own: what a method of this house has trained says as a judge what it said in its last evaluation."""

import json

import pytest
import torch

from prefopt import judges, registry
from prefopt.errors import ConfigError
from prefopt.judges.reward_model import RewardModelJudge
from prefopt.settings import JudgeConfig, parse
from prefopt.training.metrics import read_lines
from tests.judges.conftest import question

KINDS = {"completions": "reward_model", "both_orders": "pairwise"}
SCORERS = [name for name in registry.names() if registry.get(name)().needs.output == "scores"]


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("name", SCORERS)
def test_judge_when_it_was_trained_here_then_its_scores_are_those_of_its_evaluation(
    name, adapter, server, command, task, tmp_path
):
    lora = {"lora__r": 2} if adapter else {}
    ended = server.train(
        command(name, tmp_path / "run", train__max_steps=8, eval__every=8, data__eval=task.pairs, **lora)
    )
    assert ended.status == 0, ended.err
    kind = KINDS[registry.get(name)().needs.sequences]
    judge = judges.make(JudgeConfig(kind=kind, path=str(tmp_path / "run/model")), device=torch.device("cpu"))
    assert isinstance(judge, RewardModelJudge) == (kind == "reward_model")
    rows = [json.loads(line) for line in task.pairs.read_text().splitlines()]
    found = judge.judge([question(row["chosen"], row["rejected"], prompt=row["prompt"]) for row in rows])
    assert all(judgement.problems == {} for judgement in found)
    if kind == "reward_model":
        chosen = [judgement.scores[0] for judgement in found]
    else:
        chosen = [(judgement.logits[0][1] - judgement.logits[1][0]) / 2 for judgement in found]
    known = {line["index"]: line["rewards/chosen"] for line in read_lines(tmp_path / "run/eval_pairs.jsonl")}
    spread = max(chosen) - min(chosen)
    assert spread > 1e-5
    assert chosen == pytest.approx([known[i] for i in range(len(rows))], abs=1e-2 * spread)


@pytest.mark.parametrize("name", SCORERS)
def test_rounds_when_the_method_trains_a_judge_then_they_are_refused(name):
    with pytest.raises(
        ConfigError, match=rf"^rounds.count: found 2, but method '{name}' trains a judge, which generates no text"
    ):
        parse(
            [
                "--method",
                name,
                "--model.path",
                "m",
                "--data.train",
                "d",
                "--rounds.count",
                "2",
                "--judge.kind",
                "length",
            ]
        )
