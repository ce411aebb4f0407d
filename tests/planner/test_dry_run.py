"""What --dry_run prints: the differences, steps, schedule, tokens, and the planner's memory and time."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from prefopt.data.loader import FileBatches
from prefopt.planner import dry_run
from prefopt.planner.memory import GB
from prefopt.settings import from_dict, parse, rate_source
from prefopt.types import EncodedPair

REAL = ["--model.path", "m", "--data.train", "d.jsonl"]
CPU = SimpleNamespace(backend="single process", described_backend="single process", world=1, offloaded=())


def some_pairs(count=10):
    return [EncodedPair([1] * 4, [2] * 3, [3] * 5, [True] * 2 + [False], [True] * 5) for _ in range(count)]


def lines_of(argv, task, runtime=CPU, total=None, count=10):
    config = parse(["--method", *argv, *REAL])
    train = FileBatches(some_pairs(count), config.train.global_batch, 0, "f")
    return dict(
        line.strip().split(": ", 1) for line in dry_run.of_run(config, runtime, train, 7, str(task.model), total)[1:]
    )


def test_differences_when_settings_are_given_then_stand_with_their_defaults_and_nothing_else():
    config = parse(["--method", "tdpo", *REAL, "--optim.lr", "2e-5", "--method.alpha", "0.3", "--track.to", "wandb"])
    assert dry_run.differences(config) == [
        "settings that differ from the defaults:",
        "  method.alpha: 0.3 (default none)",
        "  model.path: m (default none)",
        "  data.train: d.jsonl (default none)",
        "  optim.lr: 2e-5 (default 1e-6)",
        "  track.to: [wandb] (default [])",
    ]


def test_differences_on_the_testbed_keep_its_own_defaults_apart():
    _, *lines = dry_run.differences(parse(["--method", "dpo", "--seed", "3"]))
    assert lines[0] == "  seed: 3 (default 0)"
    assert lines[1].startswith("  testbed defaults: method.beta 1, optim.lr 0.002, ")
    assert len(lines) == 2


def test_plan_when_the_data_is_read_then_counts_steps_rates_and_tokens_by_hand(task):
    flags = ["dpo", "--train.global_batch", "4", "--train.micro_batch", "2", "--train.epochs", "2"]
    found = lines_of([*flags, "--optim.lr", "1e-3", "--eval.every", "4"], task)
    assert found["steps"] == "6 of 4 pairs, 2 epochs of 3 steps, 2 forward passes per step and rank"
    # warm-up of ceil(0.1 x 6) = 1 step, then 5 steps down from the peak: the last one at 1/5 of it
    assert found["schedule"] == (
        "linear, peak 0.001 (given as optim.lr) from step 1, 0.001 at step 1, 0.0002 at step 6"
    )
    assert found["evaluations"] == "3: one before step 1, every 4 steps and at the end, on 7 held-out pairs"
    # (4 + 3) + (4 + 5) input tokens, 2 + 5 of them in completions; 10 pairs, twice
    assert (
        found["tokens"]
        == "16 input tokens and 7 completion tokens per pair on average; about 320 input tokens in the run"
    )
    assert re.match(r"[\d.]+ (kB|MB) per rank \(single process\): ", found["memory"])
    assert found["time"].startswith("not estimated for a CPU; under 1 ms per step")


def test_plan_when_a_run_is_longer_than_anybody_waits_then_it_is_there_at_once(task):
    found = lines_of(["dpo", "--train.global_batch", "4", "--train.epochs", "1e15"], task)
    assert " from step 300,000,000,000,000, " in found["schedule"]  # a tenth of 3e15


def test_plan_when_only_the_chosen_side_is_read_then_counts_that(task):
    found = lines_of(["sft", "--eval.at_start", "false", "--train.max_steps", "100"], task)
    assert found["tokens"].startswith("7 input tokens and 2 completion tokens per pair")
    assert "peak 2e-5 (the default of method sft: Tülu 2, arXiv 2311.10702)" in found["schedule"]
    assert found["evaluations"] == "1: every 100 steps and at the end, on 7 held-out pairs"


def test_plan_when_there_is_a_gpu_then_holds_the_memory_to_it_and_has_a_time(task):
    found = lines_of(["tdpo"], task, total=int(80 * GB))
    assert " of the GPU's 80 GB per rank" in found["memory"]
    assert found["time"].startswith("under 1 ms per step, ")
    assert found["time"].endswith("on 1 GPU(s) of 20 to 45 TFLOPS")


@pytest.mark.parametrize("flags", [["--train.max_tokens", "5000"], ["--train.max_seconds", "60"]])
def test_plan_when_a_budget_ends_the_run_then_says_so(flags, task):
    found = lines_of(["dpo", *flags], task)
    assert found["steps"].startswith(("until 5,000 input tokens are spent", "until 60 s are spent"))
    assert found["schedule"].endswith("as a function of the fraction of the budget that is spent")


def test_plan_where_none_can_be_made_is_one_line_with_the_reason(task, monkeypatch):
    unknown = SimpleNamespace(**vars(CPU) | {"backend": "zero2", "described_backend": "ZeRO-2 + offload"})
    unknown.offloaded = ("optimizer",)
    assert lines_of(["dpo"], task, runtime=unknown)["memory and time"] == (
        "not estimated for the parallel backend ZeRO-2 + offload"
    )

    def refuse(*_):
        raise ValueError("no list of layers\nmore")

    monkeypatch.setattr(dry_run, "read_model", refuse)
    assert lines_of(["dpo"], task)["memory and time"] == "not estimated for this model: no list of layers"


def test_plan_of_rounds_counts_what_is_sampled_at_most(task):
    flags = ["--rounds.count", "2", "--judge.kind", "length", "--generate.n", "3", "--generate.max_tokens", "6"]
    config = parse(["--method", "sppo", *REAL, *flags, "--train.global_batch", "8"])
    found = dry_run.of_rounds(config, CPU, [20, 21], str(task.model), None)
    assert found[1:5] == [
        "  rounds: 2, of 20 to 21 prompts with 3 completions each",
        "  steps: at most 3 per round, of 8 pairs each; each prompt gives at most one pair",
        "  schedule: linear, peak 1e-6 (prefopt's default for all methods without one of their own), in each round",
        "  tokens: at most 738 sampled in 123 completions",
    ]
    assert found[-1].startswith("  time: not estimated; ")


def test_dry_run_prints_the_plan_and_every_setting_only_where_asked(server, command, tmp_path):
    ended = server.train(command("sft", tmp_path / "run", dry_run="config", without=("optim.lr",)))
    assert ended.status == 0, ended.err
    shown, _, resolved = ended.out.partition("resolved config:\n")
    assert "settings that differ from the defaults:" in shown
    assert "schedule: linear, peak 2e-5 (the default of method sft" in shown
    assert "kernel:" in resolved
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "lr", "source"),
    [
        (["--method", "sft", *REAL], 2e-5, "the default of method sft: Tülu 2, arXiv 2311.10702"),
        (["--method", "sft", *REAL, "--optim.lr", "1e-6"], 1e-6, "given as optim.lr"),
        (["--method", "dpo", *REAL], 1e-6, "prefopt's default for all methods without one of their own"),
        (["--method", "sft"], 2e-3, "the testbed's default"),
        (["--method", "thought_po", "--rounds.count", "1"], 5e-4, "the testbed's default"),
    ],
)
def test_learning_rate_when_not_given_then_is_the_methods_own_and_its_source_is_known(argv, lr, source):
    config = parse(argv)
    assert (config.optim.lr, rate_source(config)) == (lr, source)
    assert from_dict(config.to_dict()) == config
    assert rate_source(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5))) == (
        "given as optim.lr"
    )
