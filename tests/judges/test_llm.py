"""A language model as judge: what it is asked, how its answer is read, what is kept, and everything that goes wrong."""

import json
import math
import re

import pytest
import torch

from prefopt import judges
from prefopt.data.encoder import Encoder
from prefopt.errors import ConfigError, RoundError
from prefopt.judges import llm
from prefopt.placeholders import filled
from prefopt.ranking import win_probabilities
from prefopt.settings import JudgeConfig
from prefopt.types import Completion
from tests.helpers import CHATML, byte_bpe_tokenizer
from tests.judges.conftest import question
from tests.openai_server import OpenAIServer

ASKED = [question("short", "a longer one", "the longest of them", key="one"), question("x", "yy", key="two")]


def prefers_longer(messages, body):
    """An honest judge: the longer response, wherever it stands."""
    (message,) = messages
    a, b = re.search(
        r"\[Response A\]\n(.*?)\n\[End.*\[Response B\]\n(.*?)\n\[End", message["content"], re.DOTALL
    ).groups()
    return f"I like length. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


@pytest.fixture
def make(tmp_path):
    made = []

    def make(server, **settings):
        usual = {"kind": "llm", "url": server.url, "retries": 1, "timeout": 5.0}
        config = JudgeConfig(**usual | settings)
        made.append(judges.make(config, device=torch.device("cpu"), cache=tmp_path / "cache"))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


# Reading answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("[[A]]", 1.0),
        ("so: [[ b ]].", 0.0),
        ("[[C]]", 0.5),
        ("[[A]], yes, [[A]]", 1.0),
        ("[[A]] or [[B]]?", None),
        ("A", None),
        ("", None),
        ("[[D]]", None),
    ],
)
def test_verdict_is_the_only_one_in_double_brackets(answer, verdict):
    assert llm.verdict_of(answer) == verdict


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        *(("[[7]]", 7.0), ("Well. [[ 7.5 ]]", 7.5), ("[[1]]", 1.0), ("[[11]]", None), ("[[0]]", None), ("7", None)),
        *(("[[7]] of [[10]]", None), ("[[good]]", None), ("[[nan]]", None), ("[[7]], I said [[7]]", 7.0)),
    ],
)
def test_score_is_the_only_number_in_double_brackets_if_it_lies_on_the_scale(answer, score):
    assert llm.score_of(answer, (1.0, 10.0)) == score


def test_template_when_filled_then_what_looks_like_a_mark_in_a_text_is_left_alone():
    assert filled("{prompt}: {response}", prompt="{response}", response="{prompt}") == "{response}: {prompt}"


# Pairwise -------------------------------------------------------------------------------------------------------------


def test_verdicts_when_the_judge_is_consistent_then_both_orders_were_asked_and_agree(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        found = make(server).judge(ASKED)
        assert found[0].probs == ((0.5, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 0.5))
        assert found[1].probs == ((0.5, 0.0), (1.0, 0.5))
        assert [judgement.problems for judgement in found] == [{}, {}]
        assert len(server.requests) == 2 * 3 + 2
        path, body = server.requests[0]
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 512)
        assert win_probabilities(found[1]).tolist() == [[0.5, 0.0], [1.0, 0.5]]


def test_verdicts_when_the_first_place_always_wins_then_each_pair_is_a_tie_and_a_contradiction(make):
    with OpenAIServer(name="judge", answer=lambda messages, body: "[[A]]") as server:
        found = make(server).judge(ASKED)
    assert found[0].probs == ((0.5,) * 3,) * 3
    assert [judgement.problems for judgement in found] == [{"contradiction": 3}, {"contradiction": 1}]


def test_verdicts_when_one_order_is_a_tie_then_the_other_counts_half(make):
    def answer(messages, body):
        return "[[A]]" if "[Response A]\nx\n" in messages[0]["content"] else "[[C]]"

    with OpenAIServer(name="judge", answer=answer) as server:
        (found,) = make(server).judge(ASKED[1:])
    assert found.probs == ((0.5, 0.75), (0.25, 0.5))
    assert found.problems == {}


def test_verdicts_when_an_answer_has_none_then_the_pair_is_nan_and_counted(make):
    def answer(messages, body):
        return "I cannot decide." if "[Response A]\nx\n" in messages[0]["content"] else "[[A]]"

    with OpenAIServer(name="judge", answer=answer) as server:
        (found,) = make(server).judge(ASKED[1:])
    assert found.problems == {"unparsed": 1}
    assert math.isnan(found.probs[0][1])
    assert math.isnan(found.probs[1][0])
    assert found.probs[0][0] == found.probs[1][1] == 0.5


def test_verdicts_when_two_responses_are_equal_then_nobody_is_asked(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        (found,) = make(server).judge([question("same", "same")])
        assert server.requests == []
    assert found.probs == ((0.5, 0.5), (0.5, 0.5))


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_when_asked_then_the_scale_is_stated_and_an_answer_off_it_is_counted(make):
    def answer(messages, body):
        text = messages[0]["content"]
        assert "from 0 (worst) to 5 (best)" in text
        assert "[Request]\nuser: Hi\n\nassistant: Hello\n\nuser: Name a colour" in text
        return "[[9]]" if "[Response]\nbad" in text else "[[4.5]]" if "[Response]\nred" in text else "no number"

    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Name a colour")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    with OpenAIServer(name="judge", answer=answer) as server:
        judge = make(server, mode="score", scale=(0.0, 5.0))
        (found,) = judge.judge([question("red", "bad", "blue", prompt=prompt)])
        assert judge.describe()["scale"] == [0.0, 5.0]
    assert found.scores[0] == 4.5
    assert all(math.isnan(score) for score in found.scores[1:])
    assert found.problems == {"unparsed": 2}


# What is kept ---------------------------------------------------------------------------------------------------------


def test_answers_when_asked_again_then_they_come_from_the_disk_unless_something_changed(make, tmp_path):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        first = make(server).judge(ASKED)
        asked = len(server.requests)
        again = make(server).judge(ASKED)
        assert again == first
        assert len(server.requests) == asked
        make(server, temperature=0.5).judge(ASKED[1:])
        assert len(server.requests) == asked + 2
        with OpenAIServer(name="judge", answer=prefers_longer) as other:
            assert make(other).judge(ASKED[1:]) == first[1:]
            assert len(other.requests) == 2, "a model of the same name elsewhere may be another one"
        files = sorted((tmp_path / "cache").rglob("*.json"))
        assert len(files) == asked + 2 + 2
        for file in files:
            file.write_text('{"answer"')
        assert make(server).judge(ASKED) == first, "damaged files are asked again"
        assert len(server.requests) == 2 * asked + 2


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_answers_when_they_are_empty_then_they_are_not_kept(nothing, make):
    with OpenAIServer(name="judge", answer=lambda messages, body: nothing) as server:
        for times in (1, 2):
            (found,) = make(server).judge(ASKED[1:])
            assert found.problems == {"unparsed": 2}
            assert len(server.requests) == 2 * times


def test_answers_when_the_server_fails_in_between_then_what_was_answered_is_kept(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        judge = make(server, concurrency=1, retries=0)
        server.fail("", "", "", "500")
        with pytest.raises(
            RoundError, match=r"^judge.url: http://127.* does not answer after 1 attempts \(500: told to"
        ):
            judge.judge(ASKED)
        asked = len(server.requests)
        found = make(server, concurrency=1).judge(ASKED)
        assert len(server.requests) == asked + 8 - 3
        assert [judgement.problems for judgement in found] == [{}, {}]


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_server_when_it_stumbles_then_it_is_asked_again(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        server.fail("429", "500", "cut", "garbage")
        found = make(server, retries=4).judge(ASKED[1:])
        assert found[0].problems == {}
        assert len(server.requests) == 2 + 4


def test_server_when_one_question_takes_too_long_then_it_is_counted_and_when_all_do_the_judge_stops(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        server.slow = 2.0
        server.fail("slow")
        judge = make(server, retries=0, timeout=0.5, concurrency=1)
        (found,) = judge.judge(ASKED[1:])
        assert found.problems == {"timeout": 1}
        assert math.isnan(found.probs[0][1])
        server.fail("slow", "slow")
        with pytest.raises(RoundError, match=r"^judge.timeout: http://127.* has answered none of 2 questions in time"):
            judge.judge([question("m", "nn")])


def test_server_when_a_question_is_too_long_for_the_model_then_it_is_counted(make):
    with OpenAIServer(name="judge", answer=prefers_longer, max_model_len=150) as server:
        (found,) = make(server).judge([question("a", "bb", "much longer " * 50)])
    assert found.problems == {"too_long": 4}
    assert (found.probs[0][1], found.probs[1][0]) == (0.0, 1.0)
    assert math.isnan(found.probs[0][2])


def test_server_when_it_is_gone_then_one_line_says_so(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        judge = make(server, retries=0)
    with pytest.raises(RoundError, match=r"^judge.url: http://127.* does not answer after 1 attempts"):
        judge.judge(ASKED)


def test_model_when_none_is_named_then_it_is_the_only_one(make):
    with OpenAIServer(name="judge", answer=prefers_longer) as server:
        assert make(server).describe()["model"] == "judge"
        judge = make(server, model="other")
        with pytest.raises(
            RoundError, match=r"^judge.url: .* refuses the request \(404: the model other does not exist\)"
        ):
            judge.judge(ASKED)


# The policy as its own judge ------------------------------------------------------------------------------------------


class Echo:
    """An engine that answers [[A]] where the question is about this word, and keeps what it was asked."""

    def __init__(self, tokenizer, word, context=None):
        self.context = context
        self.tokenizer, self.word, self.asked, self.closed = tokenizer, word, [], False

    def generate(self, prompts, sampling, seeds):
        self.asked += zip(map(self.tokenizer.decode, prompts), [sampling] * len(prompts), seeds, strict=True)
        first = [f"[Response A]\n{self.word}\n" in self.tokenizer.decode(ids) for ids in prompts]
        return [[Completion((), "[[A]]" if it else "[[B]]", "stop")] for it in first]

    def describe(self):
        return {"engine": "echo"}

    def close(self):
        self.closed = True


@pytest.mark.parametrize("template", [CHATML, None], ids=["chat", "plain"])
def test_policy_when_it_judges_itself_then_it_is_asked_through_its_own_template(template):
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300, chat_template=template)
    engine = Echo(tokenizer, "yy")
    settings = JudgeConfig(kind="llm", path="policy", max_tokens=7, temperature=0.3)
    judge = judges.make(settings, device=torch.device("cpu"), policy=lambda: (engine, Encoder(tokenizer, 2**31)))
    (found,) = judge.judge(ASKED[1:])
    assert found.probs == ((0.5, 0.0), (1.0, 0.5))
    texts, samplings, seeds = zip(*engine.asked, strict=True)
    begin = "<s><|im_start|>user\nCompare two responses" if template else "<s>Compare two responses"
    assert all(text.startswith(begin) for text in texts)
    assert all(text.endswith("<|im_start|>assistant\n") == bool(template) for text in texts)
    assert (samplings[0].n, samplings[0].max_tokens, samplings[0].temperature) == (1, 7, 0.3)
    judge.judge(ASKED[1:])
    assert [seed for _, _, seed in engine.asked] == [*seeds, *seeds], "the seed depends on the question alone"
    assert len(set(seeds)) == 2
    assert judge.describe() | {"template": ""} == {
        "kind": "llm",
        "mode": "pairwise",
        "template": "",
        "model": "policy",
        "temperature": 0.3,
        "max_tokens": 7,
        "engine": {"engine": "echo"},
    }
    judge.close()
    assert engine.closed


def test_policy_when_a_question_leaves_no_room_for_an_answer_then_it_is_counted_and_the_others_are_asked():
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300, chat_template=CHATML)
    engine = Echo(tokenizer, "yy")
    judge = llm.LLMJudge(
        JudgeConfig(kind="llm"), llm.PolicyJudge(engine, Encoder(tokenizer, 2**31), JudgeConfig(max_tokens=7))
    )
    asked = question("x", "yy", "z" * 10)
    judge.judge([asked])
    lengths = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text, _, _ in engine.asked)
    assert lengths[1] < lengths[-2]
    engine.asked.clear()
    engine.context = lengths[1] + 7
    (found,) = judge.judge([asked])
    assert len(engine.asked) == 2
    assert found.problems == {"too_long": 4}
    assert (found.probs[0][1], found.probs[1][0]) == (0.0, 1.0)
    assert math.isnan(found.probs[0][2])
    engine.context = 9
    assert judge.judge([asked])[0].problems == {"too_long": 6}
    assert len(engine.asked) == 2, "nobody was asked"


def test_policy_when_its_template_refuses_a_question_then_it_is_counted():
    refuses = "{% if 'qqq' in messages[0]['content'] %}{{ raise_exception('no qqq') }}{% endif %}" + CHATML
    tokenizer = byte_bpe_tokenizer(["any text"], vocab_size=300, chat_template=refuses)
    judge = llm.LLMJudge(
        JudgeConfig(kind="llm"), llm.PolicyJudge(Echo(tokenizer, "yy"), Encoder(tokenizer, 2**31), JudgeConfig())
    )
    (found,) = judge.judge([question("x", "yy", "qqq")])
    assert found.problems == {"unreadable": 4}
    assert (found.probs[0][1], found.probs[1][0]) == (0.0, 1.0)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({"url": "http://me:secret@x/v1"}, None, r"^judge.url: found a user.* that judge.api_key_env names\)$"),
        ({}, None, r"^judge.url: found none, expected the server's address, e.g. http://localhost:8000/v1$"),
        (
            {"path": "m"},
            None,
            r"^judge.path: found 'm', expected 'policy' or none: another language model is asked thr",
        ),
        (
            {"path": "policy", "url": "http://x"},
            None,
            r"^judge.url: found 'http://x', which judge 'llm with judge.path policy' does not read; it belo",
        ),
        (
            {"mode": "score", "scale": (5.0, 1.0)},
            None,
            r"^judge.scale: found 5, 1, expected the lowest and the highest score: 1,10$",
        ),
        (
            {"mode": "score", "scale": (5.0,)},
            None,
            r"^judge.scale: found 5, expected the lowest and the highest score: 1,10$",
        ),
        (
            {"scale": (0.0, 5.0)},
            None,
            r"^judge.scale: found 0, 5, which mode 'pairwise' does not read \(--judge.mode s",
        ),
        ({"template": "none.txt"}, None, r"^judge.template: 'none.txt': No such file or directory$"),
        (
            {"template": "t"},
            "{prompt} {response_a}",
            r"^judge.template: 't' has no \{response_b\}, expected \{prompt\}, ",
        ),
        (
            {"template": "t", "mode": "score"},
            "{prompt} {response} {hihg}",
            r"^judge.template: 't' has \{hihg\}; did you mean 'high'\?, expected \{high\}, \{low\}, \{prompt\}, ",
        ),
    ],
)
def test_settings_when_wrong_then_they_are_refused_before_anything_is_loaded(
    settings, text, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=message):
        judges.check(JudgeConfig(kind="llm", **settings))


def test_template_when_a_file_is_named_then_it_is_what_is_asked(make, tmp_path):
    (tmp_path / "mine.txt").write_text("Q: {prompt}\n1: {response_a}\n2: {response_b}\n{prompt}")
    with OpenAIServer(name="judge", answer=lambda messages, body: "[[C]]") as server:
        make(server, template=str(tmp_path / "mine.txt")).judge([question("x", "yy", prompt="p")])
        asked = sorted(json.dumps(body["messages"]) for _, body in server.requests)
    assert asked == [
        json.dumps([{"role": "user", "content": f"Q: p\n1: {a}\n2: {b}\np"}]) for a, b in (("x", "yy"), ("yy", "x"))
    ]
