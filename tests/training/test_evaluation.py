"""Which evaluations a run has, of which pairs, and what a person sees of them."""

import json
from types import SimpleNamespace

import tqdm

from prefopt.training.metrics import read_lines
from prefopt.training.progress_bar import evaluation_bar


def test_run_without_an_evaluation_at_the_start_scores_the_sample_and_ends_with_its_figures(server, command, tmp_path):
    flags = {"eval__at_start": "false", "eval__max_pairs": 3, "train__max_steps": 2, "eval__every": 100}
    argv = command("dpo", tmp_path / "run", **flags)
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    evaluations = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if line["split"] == "eval"]
    assert [(line["step"], line["pairs"]) for line in evaluations] == [(2, 3)]
    assert "held-out pairs are evaluated, a random sample" in ended.out
    assert "warning: 3 held-out pairs are few" in ended.out
    rows = [json.loads(line) for line in (tmp_path / "run/eval_pairs.jsonl").read_text().splitlines()]
    assert len({row["where"] for row in rows}) == 3
    assert all(row["counts"]["entropy"] > 1 for row in rows)
    table = ended.out[ended.out.index("figures of the model of step 2, with 95% intervals over 3 held-out pairs:") :]
    assert "held out" in table
    assert "at the start" not in table
    assert f"{evaluations[0]['loss']:.4g} (" in table
    assert "| `rewards/accuracies` | - |" in (tmp_path / "run/model/README.md").read_text()
    again = server.train(argv)
    assert table in again.out, "a finished run shows its figures again"


def test_progress_bar_of_an_evaluation_counts_all_pairs_whatever_the_batches_and_processes(monkeypatch):
    seen = SimpleNamespace(made=None, n=0)

    class Bar:
        n = 0

        def __init__(self, **settings):
            seen.made = settings

        def __enter__(self):
            return self

        def __exit__(self, *_):
            seen.n = self.n

        def update(self, count):
            self.n += count

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    batches = [([0, 1], "a"), ([4, 5], "b")]
    assert [*evaluation_bar(iter(batches), 7, SimpleNamespace(world=2, is_main=True))] == batches
    assert seen.n == seen.made["total"] == 7
    assert seen.made["disable"] is False
