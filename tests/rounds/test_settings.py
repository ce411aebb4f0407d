"""What is refused before any prompt is read."""

import pytest

from prefopt.errors import ConfigError
from prefopt.settings import parse

FILES = ["--model.path", "m", "--data.train", "pairs.jsonl"]
ROUNDS = ["--rounds.count", "2", "--judge.kind", "length"]


def refused(*argv):
    with pytest.raises(ConfigError) as caught:
        parse(["--method", "dpo", *argv])
    return str(caught.value)


def test_rounds_with_files_are_read():
    config = parse(["--method", "dpo", *FILES, *ROUNDS, "--rounds.prompts", "100"])
    assert (config.rounds.count, config.rounds.prompts, config.judge.kind) == (2, 100, "length")
    assert config.rounds.pairs == "best_worst"


def test_rounds_on_the_testbed_have_their_own_defaults():
    config = parse(["--method", "sppo", "--rounds.count", "2"])
    assert (config.testbed.world, config.judge.kind, config.train.max_steps) == ("cyclic", "world", None)
    assert parse(["--method", "sppo"]).testbed.world == "bandit"


def test_pairs_against_the_data_need_no_judge():
    argv = ["--method", "dpo", *FILES, "--rounds.count", "1", "--rounds.pairs", "data_sampled", "--generate.n", "1"]
    assert parse(argv).judge.kind == "none"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--rounds.prompts", "5"], "rounds.prompts: given without rounds; set their number (--rounds.count 3)"),
        (["--judge.kind", "length"], "judge.kind: given without rounds"),
        (
            [*FILES, "--rounds.count", "2"],
            "judge.kind: not given, expected the judge",
        ),
        (
            [*FILES, *ROUNDS, "--generate.n", "1"],
            "generate.n: found 1, expected at least 2: a pair is the best against the worst",
        ),
        (
            [*FILES, "--rounds.count", "2", "--judge.kind", "none"],
            "judge.kind: not given, expected the judge",
        ),
        (
            [*FILES, "--rounds.count", "2", "--judge.kind", "world"],
            "found 'world', which judges the testbed only",
        ),
        ([*FILES, *ROUNDS, "--judge.kid", "x"], "did you mean 'judge.kind'?"),
        ([*FILES, "--rounds.count", "-1"], "rounds.count: found -1, expected a number >= 0 and <= 99"),
        ([*FILES, *ROUNDS, "--rounds.shard", "0"], "rounds.shard: found 0, expected a number >= 1"),
        ([*FILES, *ROUNDS, "--generate.max_tokens", "1024"], "expected less than data.max_length (1024)"),
        ([*FILES, *ROUNDS, "--generate.n", "0"], "generate.n: found 0, expected a number >= 1"),
        ([*FILES, *ROUNDS, "--generate.batch", "0"], "generate.batch: found 0, expected a number >= 1"),
        ([*FILES, *ROUNDS, "--generate.temperature", "-1"], "generate.temperature: found -1.0, expected a number >= 0"),
        ([*FILES, *ROUNDS, "--generate.temperature", "inf"], "generate.temperature: found inf, expected a number >= 0"),
        ([*FILES, *ROUNDS, "--generate.top_p", "0"], "generate.top_p: found 0.0, expected a number > 0 and <= 1"),
        (
            [*FILES, *ROUNDS, "--rounds.max_similarity", "2"],
            "rounds.max_similarity: found 2.0, expected a number > 0",
        ),
        ([*FILES, *ROUNDS, "--data.eval_fraction", "0.2"], "data.eval_fraction: given with rounds, which hold out"),
        (["--rounds.count", "2", "--testbed.pairs", "100"], "testbed.pairs: given with rounds, whose pairs"),
        ([*FILES, "--rounds.count", "1", "--rounds.pairs", "data_sampled"], "generate.n: found 5, expected 1: rounds"),
        (
            ["--rounds.count", "2", "--rounds.pairs", "data_worst"],
            "rounds.pairs: found 'data_worst', but the testbed has no completions of its own",
        ),
    ],
)
def test_bad_settings_of_rounds_are_one_line(argv, line):
    assert line in refused(*argv)


def test_a_stop_text_without_a_character_is_refused(tmp_path):
    (tmp_path / "settings.yaml").write_text("generate: {stop: ['']}\n")
    line = refused("--config", str(tmp_path / "settings.yaml"), *FILES, *ROUNDS)
    assert "generate.stop: found [''], expected strings of at least one character" in line


def test_sppo_cannot_learn_from_the_datas_completion_or_sharpen_probabilities():
    with pytest.raises(ConfigError, match="reads chosen_win_prob, which is not known for the data's completions"):
        parse(["--method", "sppo", *FILES, *ROUNDS, "--rounds.pairs", "data_worst"])
    with pytest.raises(ConfigError, match="'blender_score', which reads logits or scores, but judge 'world' returns"):
        parse(["--method", "sppo", "--rounds.count", "1", "--method.win_prob", "blender_score"])
