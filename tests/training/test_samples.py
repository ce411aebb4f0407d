"""Samples at evaluations: written once each, the same after any kill, and nothing to the training itself."""

import json
import signal

import pytest
from safetensors.torch import load_file

from prefopt import registry
from prefopt.errors import ConfigError
from prefopt.settings import parse
from prefopt.training.metrics import WALL_CLOCK_KEYS, read_lines
from prefopt.training.signals import EXIT_UNFINISHED

# an adapter whose dropout draws random numbers in every step: sampling must not draw any of them
DROPOUT = {"lora__r": 4, "lora__dropout": 0.3}
SAMPLES = {"eval__generate": 3, "generate__max_tokens": 12, "generate__temperature": 0.9, **DROPOUT}
STEPS = [0, 4, 8, 12, 16, 20, 24]
METHOD = next(n for n in registry.names() if registry.get(n)().needs.reference == "token")
NO_REFERENCE = next(n for n in registry.names() if registry.get(n)().needs.rows == "chosen_only")
JUDGE = next(n for n in registry.names() if registry.get(n)().needs.output == "scores")


def table(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def weights(output):
    return next((output / "model").glob("*.safetensors")).read_bytes()


def evaluations(output):
    lines = [line for line in read_lines(output / "metrics.jsonl") if line["split"] == "eval"]
    return [{k: v for k, v in line.items() if k not in WALL_CLOCK_KEYS} for line in lines]


@pytest.fixture(scope="module")
def straight(server, command, tmp_path_factory):
    output = tmp_path_factory.mktemp("sampled") / "run"
    ended = server.train(command(METHOD, output, **SAMPLES))
    assert ended.status == 0, ended.err
    (output.parent / "out.txt").write_text(ended.out)
    return output


def test_table_has_a_row_per_evaluation_and_prompt_and_the_reference_always_says_the_same(straight):
    rows = table(straight)
    assert [row["step"] for row in rows] == [step for step in STEPS for _ in range(3)]
    ids = ["prompt_ids", "reference_ids", "policy_ids"]
    assert list(rows[0]) == ["step", "prompt", "reference", "policy", "tokens", "ended", "kl", *ids]
    assert all(len(row["policy_ids"]) == row["tokens"] for row in rows)
    first, last = rows[:3], rows[-3:]
    assert len({row["prompt"] for row in first}) == 3
    assert all(row["prompt"].startswith("Human: name colour") for row in first), "BOS is no text to read"
    assert [row["reference"] for row in rows] == [row["reference"] for row in first] * len(STEPS)
    assert all(row["policy"] == row["reference"] and row["kl"] == 0 for row in first), "equal weights, equal seeds"
    assert any(row["policy"] != row["reference"] for row in last)
    assert all(0 < row["tokens"] <= 12 for row in rows)


def test_figures_of_the_samples_are_in_the_metrics_of_each_evaluation(straight):
    lines, rows = evaluations(straight), table(straight)
    for line in lines:
        here = [row for row in rows if row["step"] == line["step"]]
        assert line["samples/kl"] == pytest.approx(sum(row["kl"] for row in here) / 3)
        assert line["samples/tokens"] == pytest.approx(sum(row["tokens"] for row in here) / 3)
        assert line["samples/ended"] == pytest.approx(sum(row["ended"] for row in here) / 3)
        assert line["samples/entropy"] > 0
        assert 0 < line["samples/distinct_2"] <= 1
    assert lines[0]["samples/kl"] == 0 < lines[-1]["samples/kl"]


def test_samples_are_printed_once_per_evaluation(straight):
    said = (straight.parent / "out.txt").read_text()
    for step in STEPS:
        assert said.count(f"\nstep {step}: 3 held-out prompts answered\n  prompt    Human: name colour") == 1


def test_training_is_the_one_without_samples(straight, server, command, tmp_path):
    ended = server.train(command(METHOD, tmp_path / "run", **DROPOUT))
    assert ended.status == 0, ended.err
    assert weights(tmp_path / "run") == weights(straight)
    assert not (tmp_path / "run/samples.jsonl").exists()
    for plain, sampled in zip(evaluations(tmp_path / "run"), evaluations(straight), strict=True):
        assert plain == {name: v for name, v in sampled.items() if not name.startswith("samples/")}


@pytest.mark.parametrize(
    "place",
    [
        ("prefopt.evaluate.sampler:Sampler.__call__", "before", 3),
        ("prefopt.training.metrics:MetricsFile.replace", "after", 3),  # the table is written, the metrics line is not
        pytest.param(("prefopt.training.trainer:Trainer._step", "before", 10), marks=pytest.mark.slow),
        pytest.param(("prefopt.training.trainer:Trainer._export", "before", 1), marks=pytest.mark.slow),
    ],
)
def test_run_when_killed_and_restarted_then_samples_are_bit_identical(place, straight, server, command, tmp_path):
    at, when, count = place
    argv = command(METHOD, tmp_path / "run", **SAMPLES)
    assert server.train(argv, {"at": at, "when": when, "count": count, "do": "SIGKILL"}).status == -signal.SIGKILL
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    assert evaluations(tmp_path / "run") == evaluations(straight)
    assert weights(tmp_path / "run") == weights(straight)


def test_run_when_asked_to_stop_while_it_samples_then_it_leaves_at_once_and_ends_the_same(
    straight, server, command, tmp_path
):
    argv = command(METHOD, tmp_path / "run", **SAMPLES)
    place = "prefopt.generation.transformers_engine:TransformersEngine._draw"
    ended = server.train(argv, {"at": place, "count": 40, "do": "SIGTERM"})  # of 12 an answer, the reference's too
    assert ended.status == EXIT_UNFINISHED, ended.err
    assert "left at step 8 of 24; the same command continues" in ended.out
    assert [line["step"] for line in evaluations(tmp_path / "run")] == [0, 4]
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert (tmp_path / "run/samples.jsonl").read_bytes() == (straight / "samples.jsonl").read_bytes()
    assert weights(tmp_path / "run") == weights(straight)


def test_two_processes_have_one_table(straight, server, command, tmp_path):
    settings = {name: value for name, value in SAMPLES.items() if name != "lora__dropout"}
    for ranks in (1, 2):
        ended = server.train(command(METHOD, tmp_path / f"{ranks}", train__max_steps=4, **settings), ranks=ranks)
        assert ended.status == 0, ended.err
    one, two = (table(tmp_path / f"{n}") for n in (1, 2))
    assert [{k: v for k, v in row.items() if k != "kl"} for row in one] == [
        {k: v for k, v in row.items() if k != "kl"} for row in two
    ]
    for mine, theirs in zip(one, two, strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-3, abs=1e-6)


def test_method_without_reference_has_no_column_of_it(server, command, tmp_path):
    settings = {name: value for name, value in SAMPLES.items() if name not in DROPOUT}
    ended = server.train(command(NO_REFERENCE, tmp_path / "run", train__max_steps=4, **settings))
    assert ended.status == 0, ended.err
    rows = table(tmp_path / "run")
    assert list(rows[0]) == ["step", "prompt", "policy", "tokens", "ended", "prompt_ids", "policy_ids"]
    line = evaluations(tmp_path / "run")[-1]
    assert line["samples/entropy"] > 0
    assert "samples/kl" not in line


def test_best_model_may_be_chosen_by_a_figure_of_the_samples(server, command, tmp_path):
    settings = SAMPLES | {"eval__select": "samples/kl:max", "train__save_every": 4, "train__keep_last": 20}
    ended = server.train(command(METHOD, tmp_path / "run", **settings))
    assert ended.status == 0, ended.err
    found = {line["step"]: line["samples/kl"] for line in evaluations(tmp_path / "run") if line["step"]}
    best = max(found, key=lambda step: found[step])
    (one, two) = (
        load_file(tmp_path / "run" / place / "adapter_model.safetensors")
        for place in ("model", f"checkpoints/step_{best:08d}")
    )
    assert all((one[name] == two[name]).all() for name in one)


FILES = ["--model.path", "m", "--data.train", "pairs.jsonl"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--eval.generate", "-1"], "eval.generate: found -1, expected a number >= 0"),
        (
            [*FILES, "--eval.generate", "2", "--data.eval_fraction", "0"],
            "eval.generate: found 2, but no prompts are held",
        ),
        (["--eval.generate", "2", "--generate.temperature", "-1"], "generate.temperature: found -1.0, expected a"),
        (
            ["--eval.generate", "2", "--generate.n", "3"],
            "generate.n: given without rounds; set their number (--rounds.count 3), or leave it out (eval.generate "
            "reads temperature, top_p, top_k, max_tokens, stop, batch)",
        ),
        (["--eval.generate", "2", "--generate.engine", "vllm"], "generate.engine: given without rounds"),
        (
            ["--generate.temperature", "0.5"],
            "generate.temperature: given without rounds and without samples at evaluations; set their number "
            "(--rounds.count 3 or --eval.generate 8), or leave it out",
        ),
        (["--rounds.count", "2", "--eval.generate", "2"], "eval.generate: found 2 with rounds, which already sample"),
        (
            ["--eval.generate", "2", "--generate.api_key_env", "sk-12345678"],
            "generate.api_key_env: expected the name of an environment variable (value not shown)",
        ),
    ],
)
def test_bad_settings_of_samples_are_one_line(argv, line):
    with pytest.raises(ConfigError) as caught:
        parse(["--method", METHOD, *argv])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "12345678" not in str(caught.value)


def test_method_that_scores_answers_no_prompts():
    with pytest.raises(ConfigError, match="trains a judge, which generates no text; leave it out"):
        parse(["--method", JUDGE, "--eval.generate", "2"])
