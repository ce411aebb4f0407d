"""The world of running sums: who is right, what its judge says, and how often a policy is right, by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from prefopt.errors import ConfigError, RoundError
from prefopt.settings import parse
from prefopt.testbed import build_world
from prefopt.testbed.scratchpad import Scratchpad, ScratchpadSettings, chain_share, is_right, running_sums
from prefopt.thoughts import read_format
from prefopt.types import Question, Response

DIGITS = [3, 5, 9, 1, 0, 7]  # running sums 3 8 7 8 8 5


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three digits, and a base policy that has hardly learned."""
    return Scratchpad(ScratchpadSettings(digits=3, base_steps=3, hidden=16, layers=1), tmp_path_factory.mktemp("world"))


def test_running_sums_by_hand():
    assert running_sums(DIGITS) == [3, 8, 7, 8, 8, 5]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("5", True),
        ("well 5", True),
        ("well well well 5", True),
        ("well " * 8 + "5", True),
        ("well " * 9 + "5", False),
        ("4", False),
        ("5 well", False),
        ("5 5", False),
        ("8 5", False),
        ("well", False),
        ("", False),
        ("think 5", False),
    ],
)
def test_response_is_right_when_fillers_and_one_digit_say_the_sum(response, right):
    assert is_right(DIGITS, response) is right


@pytest.mark.parametrize(
    ("thought", "share"),
    [("3 8 7 8 8 5", 1.0), ("3 8 7 8 8", 5 / 6), ("3 8 0 8 8 5", 5 / 6), ("", 0.0), ("3 8 7 8 8 5 5 5", 6 / 8)],
)
def test_share_of_running_sums(thought, share):
    assert chain_share(DIGITS, thought) == pytest.approx(share)


def test_judge_grades_responses_and_what_is_leaked_to_it():
    judge = build_world("scratchpad").judge()
    texts = ("5", "well 5", "6", "", "3 8 7 8 8 5 <R> 5", "3 8 7 8 8 6 <R> 6", "<R> 5")
    question = Question(" ".join(map(str, DIGITS)), tuple(map(Response, texts)))
    (found,) = judge.judge([question])
    assert found.scores == pytest.approx((1, 1, 0, 0, 2, 5 / 6, 1))
    with pytest.raises(RoundError, match=r"judge.kind world: found prompt '1 2', expected 6 digits, such as '0 1 2 3"):
        judge.judge([Question("1 2", (Response("3"),))])


class Table(torch.nn.Module):
    """A language model whose next token hangs on the last one alone, by a table of logits, (V, V)."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=None)


def test_probability_of_a_right_response_is_the_sum_over_all_that_are(small):
    torch.manual_seed(0)
    lm = Table(torch.randn(len(small.vocabulary), len(small.vocabulary), dtype=torch.float64))
    digits = torch.tensor([[3, 5, 9], [1, 0, 7]])
    prompts = small._prompt_ids(digits, thinks=False)
    found = small.right_probability(lm, prompts, digits).detach()
    logps = lm.logits.detach().log_softmax(-1)
    word = {name: i for i, name in enumerate(small.vocabulary)}
    for row, numbers in enumerate(digits.tolist()):
        total = 0.0
        for fillers in range(9):
            tokens = [int(prompts[row, -1]), *[word["well"]] * fillers, word[str(sum(numbers) % 10)], small._eos]
            total += math.exp(sum(float(logps[a, b]) for a, b in itertools.pairwise(tokens)))
        assert float(found[row]) == pytest.approx(total, rel=1e-9)


class Adder(torch.nn.Module):
    """Writes the running sums, the marker and the sum where it is asked to think, and a wrong digit where not."""

    def __init__(self, world):
        super().__init__()
        self.world, self.weight = world, torch.nn.Parameter(torch.zeros(1))
        self.word = {name: i for i, name in enumerate(world.vocabulary)}

    def forward(self, input_ids, past_key_values=None, **_):
        rows = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.full((*input_ids.shape, len(self.world.vocabulary)), -50.0)
        for i, row in enumerate(rows.tolist()):
            for at in range(len(row) - input_ids.shape[1], len(row)):
                logits[i, at - len(row), self.next(row[: at + 1])] = 50.0
        return SimpleNamespace(logits=logits, past_key_values=rows)

    def next(self, row):
        words = [self.world.vocabulary[token] for token in row][1:]
        thinks = words[:1] == ["think"]
        prompt, rest = words[thinks : thinks + 3], words[thinks + 3 :]
        numbers = [int(word) for word in prompt if word.isdigit()]
        sums = running_sums(numbers) if len(numbers) == 3 else [0, 0, 0]
        answer = [*map(str, sums), "<R>", str(sums[-1])] if thinks else [str((sums[-1] + 1) % 10)]
        return self.word[answer[len(rest)]] if len(rest) < len(answer) else self.world._eos


def test_policy_that_adds_is_always_right_with_a_thought(small):
    lm = Adder(small).train()
    found = small.evaluate(lm, 1.0)
    assert lm.training, "its mode is left as it was"
    assert {name: found[f"exact/{name}"] for name in ("accuracy", "parsed", "chain")} == {
        "accuracy": 1.0,
        "parsed": 1.0,
        "chain": 1.0,
    }
    assert found["exact/accuracy_direct"] == pytest.approx(0.0, abs=1e-12)


def test_measures_are_the_same_each_time(small):
    one, other = (small.evaluate(Table(torch.zeros(len(small.vocabulary), len(small.vocabulary))), 1.0) for _ in "ab")
    assert one == other


def test_base_policy_is_the_same_in_another_cache(small, tmp_path):
    again = Scratchpad(small.settings, tmp_path)
    files = [world.base_model_path / "model.safetensors" for world in (small, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_prompts_are_asked_as_the_method_asks(small):
    form = read_format("scratchpad", key="test")
    plain, asked = small.prompts(4, 1), small.prompts(4, 1, form.render)
    assert [p.prompt for p in plain] == [p.prompt for p in asked]
    assert [p.key for p in plain] == [p.key for p in asked]
    assert small.vocabulary[asked[0].ids[1]] == "think"
    assert asked[0].ids[2:] == plain[0].ids[1:]
    assert len({p.key for p in plain} | {p.key for p in small.prompts(4, 2)}) == 8


def test_world_that_does_not_know_the_words_of_a_thought_prompt_says_so():
    form = read_format("specific", key="test")
    with pytest.raises(ConfigError, match=r"'cyclic': the method asks with the word 'Answer'.*thought_prompt none"):
        build_world("cyclic").prompts(2, 0, form.render)


@pytest.mark.parametrize("settings", [{"digits": 1}, {"digits": 17}, {"slip": -0.1}, {"slip": 1.5}])
def test_settings_of_which_no_world_can_be_made_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Scratchpad(ScratchpadSettings(**settings))


def test_method_that_thinks_has_this_world_in_rounds_by_default():
    config = parse(["--method", "thought_po", "--rounds.count", "3"])
    assert (config.testbed.world, config.method.thought_prompt, config.judge.kind) == (
        "scratchpad",
        "scratchpad",
        "world",
    )
    direct = parse(["--method", "thought_po", "--rounds.count", "3", "--method.thought_prompt", "none"])
    assert direct.method.thought_prompt == "none"
    assert direct.testbed.world == "scratchpad"
    assert parse(["--method", "dpo", "--rounds.count", "3"]).testbed.world == "cyclic"
    other = parse(["--method", "dpo", "--rounds.count", "3", "--testbed.world", "scratchpad"])
    assert other.generate.max_tokens == config.generate.max_tokens


def test_world_has_no_pairs_without_rounds():
    with pytest.raises(ConfigError, match=r"testbed.world: 'scratchpad' has no training pairs.*rounds.count"):
        parse(["--method", "dpo", "--testbed.world", "scratchpad"])
