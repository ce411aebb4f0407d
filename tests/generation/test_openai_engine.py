"""The official client against a server over transformers; what real servers drop or break, it drops and breaks."""

import contextlib
import dataclasses
import functools
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from prefopt import generation
from prefopt.errors import ConfigError, RoundError
from prefopt.generation.base import Sampling
from prefopt.generation.server import Server
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.settings import GenerateConfig, ModelConfig
from prefopt.training import models
from tests.openai_server import OpenAIServer


@pytest.fixture
def server(policy):
    with OpenAIServer(policy.lm, policy.tokenizer, name=str(policy.folder)) as server:
        yield server


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("prefopt.generation.server._LONGEST_PAUSE", 0.05)


@pytest.fixture
def connect(policy):
    """Opens engines, which are closed at the end."""
    with contextlib.ExitStack() as stack:

        def connect(server, **settings):
            settings = GenerateConfig(engine="openai", url=getattr(server, "url", server), **{"retries": 2, **settings})
            generation.check(settings)
            return stack.enter_context(contextlib.closing(make(policy, settings)))

        yield connect


def make(policy, settings):
    load = functools.partial(models.load_model, str(policy.folder), ModelConfig())
    return generation.make(
        settings, path=str(policy.folder), load=load, model=ModelConfig(), tokenizer=policy.tokenizer
    )


@pytest.fixture
def engine(server, connect):
    engine = connect(server, logprobs=True)
    server.requests.clear()
    return engine


def here(policy, sampling, which=slice(None)):
    return [
        TransformersEngine(policy.lm, policy.tokenizer).generate([prompt], sampling, [seed])[0]
        for prompt, seed in zip(policy.prompts[which], policy.seeds[which], strict=True)
    ]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}], ids=str)
def test_a_server_gives_what_the_engine_in_this_process_gives(policy, engine, sampling):
    sampling = Sampling(n=3, max_tokens=12, stop=("an", "<|im_start|>"), logprobs=True, **sampling)
    assert engine.generate(policy.prompts, sampling, policy.seeds) == here(policy, sampling)


def test_what_is_known_of_a_prompt_is_told_before_the_next_one_fails(policy, server, connect):
    engine, told = connect(server, concurrency=1, retries=0), {}
    server.fail("", "", "500")
    with pytest.raises(RoundError):
        engine.generate(policy.prompts, Sampling(n=2, max_tokens=4), policy.seeds, told.__setitem__)
    assert [*told.values()] == here(policy, Sampling(n=2, max_tokens=4), slice(2))


def test_all_fields_of_the_sampling_reach_the_server(policy, server, engine):
    sampling = Sampling(2, 0.7, 0.9, 20, 9, ("end", "<|im_start|>"), True)
    engine.generate(policy.prompts[:1], sampling, [41])
    ((path, body),) = server.requests
    eos, begin, end = policy.tokenizer.convert_tokens_to_ids(["</s>", "<|im_start|>", "<|im_end|>"])
    assert path == "/v1/completions"
    assert body == {
        **{"model": str(policy.folder), "prompt": policy.prompts[0], "n": 2, "seed": 41, "temperature": 0.7},
        **{"top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 9, "stop": ["end"]},
        **{"stop_token_ids": sorted([eos, begin, end]), "logprobs": 1, "return_token_ids": True},
    }
    engine.generate(policy.prompts[:1], Sampling(1), [0])
    assert not {"stop", "logprobs"} & server.requests[1][1].keys()
    assert server.requests[1][1]["stop_token_ids"] == sorted([eos, end])


def test_without_token_ids_the_text_is_encoded_again_with_its_terminator(policy, server, connect):
    server.drops.add("return_token_ids")
    engine = connect(server)
    assert engine.describe()["token_ids"] == "the text's, encoded again"
    sampling = Sampling(n=3, max_tokens=12)
    eos = policy.tokenizer.eos_token_id
    ended = 0
    for mine, theirs in zip(
        itertools.chain(*here(policy, sampling)),
        itertools.chain(*engine.generate(policy.prompts, sampling, policy.seeds)),
        strict=True,
    ):
        assert (theirs.text, theirs.finish_reason) == (mine.text, mine.finish_reason)
        again = policy.tokenizer(mine.text, add_special_tokens=False)["input_ids"]
        assert list(theirs.token_ids) == again + [eos] * (mine.finish_reason == "stop")
        ended += mine.finish_reason == "stop"
    assert ended
    with pytest.raises(RoundError, match=r"generate.stop: .* gives no token ids.*leave it out"):
        engine.generate(policy.prompts, dataclasses.replace(sampling, stop=("an",)), policy.seeds)


def test_without_token_ids_an_answer_in_a_chat_ends_as_its_turns_do(policy, server, connect):
    server.drops.add("return_token_ids")
    turns = [{"role": "user", "content": "the red answer"}]
    prompt = policy.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    (group,) = connect(server).generate([prompt], Sampling(n=8, max_tokens=32), [0])
    ended = [c.token_ids[-1] for c in group if c.finish_reason == "stop"]
    assert {*ended} == {policy.tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "half", "garbage", "no_index"])
def test_what_passes_is_tried_again_and_nothing_is_asked_twice_beside_it(policy, server, engine, fault):
    sampling = Sampling(n=2, max_tokens=8)
    server.fail(fault, fault)
    assert engine.generate(policy.prompts[:4], sampling, policy.seeds[:4]) == here(policy, sampling, slice(4))
    assert len(server.requests) == 6


def test_a_request_that_takes_too_long_is_tried_again(policy, server, connect):
    engine = connect(server, timeout=1.0)
    server.fail("slow")
    sampling = Sampling(n=2, max_tokens=8)
    assert engine.generate(policy.prompts[:1], sampling, [0]) == here(policy, sampling, slice(1))


def test_a_server_that_asks_to_wait_is_waited_for(policy, server, engine):
    server.retry_after = "1"
    server.fail("429")
    begun = time.monotonic()
    engine.generate(policy.prompts[:1], Sampling(n=1, max_tokens=2), [0])
    assert time.monotonic() - begun >= 1
    server.retry_after = "4000"
    server.fail("429")
    with pytest.raises(RoundError, match=r"asks to wait 4000 s \(429: told to fail\), longer than generate.timeout"):
        engine.generate(policy.prompts[:1], Sampling(n=1), [0])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fewer", r"generate.n: http.* gave 1 of 2 completions of a prompt, expected all"),
        ("no_logprobs", r"generate.logprobs: http.* gave none, expected one for each token"),
        ("no_token_ids", r"gave a completion without token ids, expected them with each, as it gave them at first"),
        (
            "page",
            r"gave an answer of another form \(its content type is text/html\), expected the JSON of OpenAI",
        ),
        ("filtered", r"ended a completion with 'content_filter', expected 'stop' or 'length'"),
        ("beyond", r"gave token 99999999, and the policy has [\d,]+; expected tokens of the policy"),
        ("401", r"generate.api_key_env: http.* refuses the key \(401: told to fail\).*OPENAI_API_KEY"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused_at_once(policy, server, engine, fault, words):
    server.fail(fault)
    with pytest.raises(RoundError, match=words) as error:
        engine.generate(policy.prompts[:1], Sampling(n=2, max_tokens=4, logprobs=True), [0])
    assert "\n" not in str(error.value)
    assert len(server.requests) == 1


def test_a_server_that_always_drops_a_field_is_found_out_before_anything_is_asked_of_it(policy, server, connect):
    server.drops = {"n"}
    with pytest.raises(RoundError, match=r"generate.n: .* gave 1 of 2 .*drops `n`"):
        connect(server)
    server.drops = {"logprobs"}
    engine = connect(server, logprobs=True)
    with pytest.raises(RoundError, match=r"generate.logprobs: .* gives none"):
        engine.generate(policy.prompts[:1], Sampling(n=1, logprobs=True), [0])
    server.drops = {"max_tokens"}
    with pytest.raises(RoundError, match=r"generate.max_tokens: .* expected at most 2 .*drops `max_tokens`"):
        connect(server).generate([[0, 5]], Sampling(n=4, max_tokens=2), [0])


def test_a_server_that_fails_for_good_is_given_up_in_one_line(policy, server, engine):
    server.fail("", *["500"] * 100)
    with pytest.raises(
        RoundError, match=r"does not answer after 3 attempts \(500: told to fail\).*run the same command again"
    ):
        engine.generate(policy.prompts, Sampling(n=1, max_tokens=2), policy.seeds)


# a shell that starts this suite in the background has SIGINT ignored, and children would inherit that
TWO_QUESTIONS = """
import signal
import sys

signal.signal(signal.SIGINT, signal.default_int_handler)
from prefopt.generation.server import Server

server = Server(sys.argv[1], group="judge", api_key_env="NO_KEY", concurrency=2, retries=0, timeout=300)
message = [{"role": "user", "content": "hello"}]
server.map(lambda _: server.ask(lambda c: c.chat.completions.create(model="m", messages=message).choices), range(2))
"""


@pytest.mark.parametrize("end", ["error", "Ctrl-C"])
def test_a_process_ends_while_the_server_still_holds_a_request_of_it(end):
    with OpenAIServer(name="m", answer=lambda messages, body: "hi") as server:
        server.slow = 120
        server.fail("slow", *(["401"] if end == "error" else []))
        asking = subprocess.Popen([sys.executable, "-c", TWO_QUESTIONS, server.url], stderr=subprocess.PIPE, text=True)
        assert server.holds.wait(60)
        if end == "Ctrl-C":
            asking.send_signal(signal.SIGINT)
        _, said = asking.communicate()
        assert server.holds.is_set(), "the process has waited for the answer"
    assert ("refuses the key (401: told to fail)" if end == "error" else "KeyboardInterrupt") in said.splitlines()[-1]


def test_a_connection_that_is_being_opened_when_all_is_given_up_is_closed_too(monkeypatch):
    opened, opening, given_up = [], threading.Event(), threading.Event()
    real = socket.create_connection

    def late(*args, **kwargs):
        opening.set()
        assert given_up.wait(60)
        opened.append(real(*args, **kwargs))
        return opened[-1]

    def work(item):
        if item == 0:
            return connection.models()
        assert opening.wait(60)
        raise RoundError("the other one fails")

    monkeypatch.setattr(socket, "create_connection", late)
    with OpenAIServer(name="m", answer=lambda messages, body: "hi") as server:
        connection = Server(server.url, group="judge", api_key_env="NO_KEY", concurrency=2, retries=0, timeout=60)
        with pytest.raises(RoundError, match="the other one fails"):
            connection.map(work, [0, 1])
        given_up.set()
        deadline = time.monotonic() + 60
        while not (opened and opened[0].fileno() == -1) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert opened[0].fileno() == -1, "the connection is still open"


def test_an_unreachable_server_is_named_with_what_to_do(connect):
    with pytest.raises(
        RoundError,
        match=r"generate.url: http://127.0.0.1:9/v1 does not answer after 2 .*refused.*work is not lost",
    ):
        connect("http://127.0.0.1:9/v1", retries=1)


def test_a_server_with_another_model_is_named_with_what_it_serves(policy, server, connect):
    server.name = "other"
    with pytest.raises(RoundError, match=rf"generate.served_model: .* serves other, expected '{policy.folder}'"):
        connect(server)
    assert connect(server, served_model="other").describe()["served_model"] == "other"


def test_an_address_without_its_end_is_guessed(server, connect):
    with pytest.raises(
        RoundError, match=r"refuses the request \(404: no such path /models\) \(should it end in /v1\?\)"
    ):
        connect(server.url.removesuffix("/v1"))


def test_an_address_where_a_page_is_shown_is_one_line(server, connect):
    server.front = True
    with pytest.raises(
        RoundError, match=r"^generate.url: .* of another form .*JSON of OpenAI's interface \(should it end in /v1\?\)$"
    ):
        connect(server.url.removesuffix("/v1"))


def test_the_key_comes_from_the_environment(server, monkeypatch, connect):
    server.key = "secret"
    with pytest.raises(RoundError, match=r"refuses the key \(401: wrong key\).*variable MY_KEY"):
        connect(server, api_key_env="MY_KEY")
    monkeypatch.setenv("MY_KEY", "secret")
    connect(server, api_key_env="MY_KEY")


def test_the_servers_context_bounds_the_answers(policy, server, connect):
    server.max_model_len = 32
    engine = connect(server)
    server.requests.clear()
    engine.generate(policy.prompts[2:4], Sampling(n=1, max_tokens=20), [0, 5])
    asked = {len(body["prompt"]): body["max_tokens"] for _, body in server.requests}
    assert asked == {30: 2, 7: 20}
    with pytest.raises(RoundError, match=r"1 of 1 prompts fill the model's 32 positions"):
        engine.generate([[0] * 32], Sampling(n=1), [0])


def test_a_server_that_states_no_context_has_that_of_the_weights(policy, server, connect):
    engine = connect(server)
    server.requests.clear()
    engine.generate([[0] + [5] * 508], Sampling(n=1, max_tokens=20), [0])
    assert [body["max_tokens"] for _, body in server.requests] == [3]
    with pytest.raises(RoundError, match=r"1 of 1 prompts fill the model's 512 positions"):
        engine.generate([[5] * 512], Sampling(n=1), [0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "openai"}, r"generate.url: found none, expected the server's address, e.g. http"),
        ({"engine": "openai", "url": "localhost:8000"}, r"generate.url: found 'localhost:8000'"),
        ({"engine": "openai", "url": "http://x/v1", "batch": 3}, r"generate.batch: .*'openai' does not read"),
        (
            {"url": "http://x/v1"},
            r"generate.url: found 'http://x/v1', .* \(leave it out, or --generate.engine openai\)",
        ),
        ({"engine": "openai", "url": "http://me:secret@x/v1"}, r"found a user.* that generate.api_key_env names"),
        ({"engine": "openai", "url": "http://x/v1?key=secret"}, r"found a user, a query"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        generation.check(GenerateConfig(**settings))
    assert "secret" not in str(error.value)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"'openai' package, which is not installed \(pip install 'prefopt\[openai\]'"
    ):
        generation.check(GenerateConfig(engine="openai", url="http://x/v1"))


def test_the_engine_in_this_process_gets_the_policy_and_its_settings(policy):
    engine = make(policy, GenerateConfig(batch=5, continuous=True))
    assert (engine.batch, engine.continuous) == (5, True)
    sampling = Sampling(n=2, max_tokens=6)
    mine = TransformersEngine(policy.lm, policy.tokenizer, batch=5, continuous=True)
    assert engine.generate(policy.prompts, sampling, policy.seeds) == mine.generate(
        policy.prompts, sampling, policy.seeds
    )
