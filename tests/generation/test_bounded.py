"""Servers that never end, send too much, send nonsense, or send their clients elsewhere: a failed attempt each."""

import gzip
import json
import ssl
import time
import zlib

import pytest

from prefopt.errors import RoundError
from prefopt.generation import bounded
from prefopt.generation.server import Server, TimedOut, UnreadableAnswer, read
from tests.generation.raw_server import RawServer, chat, http

KEY = "the-key-of-this-lab"


@pytest.fixture(scope="module")
def certificates():
    return ssl.create_default_context()


@pytest.fixture(autouse=True)
def short(monkeypatch, certificates):
    monkeypatch.setattr("ssl.create_default_context", lambda *_, **__: certificates)  # reading them takes its time
    monkeypatch.setattr("prefopt.generation.server._LONGEST_PAUSE", 0.01)
    monkeypatch.setattr("prefopt.generation.bounded.LARGEST", 100_000)
    monkeypatch.setattr("prefopt.redaction._named", set())
    monkeypatch.setenv("LAB_KEY", KEY)


def ask(server, retries=1, timeout=5.0):
    asked = Server(server.url, group="judge", api_key_env="LAB_KEY", concurrency=1, retries=retries, timeout=timeout)
    message = [{"role": "user", "content": "hello"}]
    try:
        return asked.ask(
            lambda client: [
                read(choice.message.content, "a message's content", str, None)
                for choice in client.chat.completions.create(model="m", messages=message).choices
            ]
        )
    finally:
        asked.close()


@pytest.mark.parametrize("after", [0, 20, 200])
def test_an_answer_that_drips_counts_as_late_wherever_it_begins_to(after):
    with RawServer(http(chat("x" * 1000)), drip=0.05, after=after) as server:
        with pytest.raises(TimedOut, match=r"does not answer after 2 attempts \(no answer within 0.3 s\)"):
            ask(server, timeout=0.3)
        assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chat("x" * 100_001), ()),
        (gzip.compress(chat("x" * 100_001).encode(), mtime=0), ("Content-Encoding: gzip",)),
        (gzip.compress(bytes(20 * 2**20), mtime=0), ("Content-Encoding: gzip",)),
        (gzip.compress(bytes(60_000), mtime=0) * 2, ("Content-Encoding: gzip",)),
        (zlib.compress(bytes(20 * 2**20)), ("Content-Encoding: deflate",)),
    ],
    ids=["plain", "packed", "bomb", "two members", "deflate"],
)
def test_an_answer_that_is_too_large_is_a_failed_attempt_and_never_unpacked_whole(body, headers):
    with (
        RawServer(http(body, *headers)) as server,
        pytest.raises(UnreadableAnswer, match=r"after 2 attempts \(an answer of more than 100,000 bytes"),
    ):
        ask(server)


def test_after_an_answer_that_cannot_be_read_the_next_one_is():
    with RawServer(http(chat("x" * 100_001)), http("{"), http(chat())) as server:
        assert ask(server, retries=2) == ["hi"]


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_packed_answer_is_read(pack):
    coding = "gzip" if pack is gzip.compress else "deflate"
    with RawServer(http(pack(chat("packed").encode()), f"Content-Encoding: {coding}")) as server:
        assert ask(server) == ["packed"]
        assert b"accept-encoding: gzip\r\n" in server.requests[0].lower()


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (chat().replace('"hi"', DEEP), ()),
        (DEEP, ()),
        ('{"choices": ' * 5000 + "1" + "}" * 5000, ()),
        (chat(content=["hi"]), ()),
        (chat(content=7), ()),
        (chat(content={"text": "hi"}), ()),
        (chat(message=None), ()),
        (chat(message="hi"), ()),
        (json.dumps({"choices": None}), ()),
        (json.dumps({"choices": 3}), ()),
        (json.dumps({"choices": "hi"}), ()),
        (json.dumps([1, 2]), ()),
        ("null", ()),
        ("1" * 400, ()),
        ("1" * 9000, ()),
        ("NaN", ()),
        ("", ()),
        ("{", ()),
        (b"\xff\xfe{}", ()),
        (chat(KEY), ()),
        (b"not packed", ("Content-Encoding: gzip",)),
        (gzip.compress(chat().encode(), mtime=0)[:-9], ("Content-Encoding: gzip",)),
        (chat(), ("Content-Encoding: br",)),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_answer_of_another_form_is_a_failed_attempt(body, headers):
    with RawServer(http(body, *headers)) as server, pytest.raises(UnreadableAnswer) as caught:
        ask(server)
    assert str(caught.value).startswith(f"judge.url: {server.url} does not answer after 2 attempts (")
    assert KEY not in str(caught.value)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "body",
    [
        '{"data": 3}',
        '{"data": [{"id": 3}]}',
        '{"data": [{"id": "m", "max_model_len": "many"}]}',
        '{"data": [{"id": "m", "max_model_len": -1}]}',
        '{"data": [{"id": "m", "max_model_len": true}]}',
        '{"data": [{"id": "m", "max_model_len": %s}]}' % ("9" * 400),
    ],
)
def test_a_list_of_models_of_another_form_is_a_failed_attempt(body):
    with RawServer(http(body), http('{"data": [{"id": "m", "max_model_len": 5}, {"id": "n"}]}')) as server:
        asked = Server(server.url, group="judge", api_key_env="NO_KEY", concurrency=1, retries=1, timeout=5)
        assert asked.models() == {"m": 5, "n": None}
        asked.close()


@pytest.mark.parametrize("status", ["401 Unauthorized", "500 Oops"])
@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"message": f"{'x ' * 90}wrong key {KEY}\x1b[2J\n\u202e"}}),
        json.dumps({"error": {"message": [KEY]}}),
        json.dumps({"error": KEY}),
        DEEP,
        f"<html>{KEY}</html>",
        '{"error": {"message": "%s"}}' % (KEY * 2000),
    ],
    ids=lambda value: value[:24],
)
def test_a_refusal_is_one_line_without_the_key_and_what_steers(status, body):
    with RawServer(http(body, status=status)) as server, pytest.raises(RoundError) as caught:
        ask(server)
    line = str(caught.value)
    assert status[:3] in line
    assert "the-key" not in line
    assert line.isprintable()
    assert len(line) < 700


def test_a_redirect_to_another_server_is_refused_and_one_to_itself_followed():
    with RawServer(http(chat())) as other:
        there = other.url.replace("127.0.0.1", "localhost")
        with RawServer(http("", f"Location: {there}/chat/completions", status="307 Moved")) as server:
            with pytest.raises(RoundError, match=r"judge.url: .* redirects to another server, localhost, expected the"):
                ask(server)
            assert len(server.requests) == 1
        assert other.requests == []
    with RawServer(http("", "Location: /v1/other", status="307 Moved"), http(chat())) as server:
        assert ask(server, retries=0) == ["hi"]


@pytest.mark.parametrize("after", ["1e400", "nan", "-5", "soon", "Wed, 21 Oct 9999999 07:28:00 GMT", "9" * 400])
def test_how_long_a_server_asks_to_wait_may_be_anything(after):
    with RawServer(http("{}", f"Retry-After: {after}", status="429 Slow"), http(chat())) as server:
        if after in ("1e400", "9" * 400):
            with pytest.raises(RoundError, match="asks to wait inf s"):
                ask(server)
        else:
            assert ask(server) == ["hi"]


def test_a_client_that_is_closed_while_a_request_is_under_way_closes_its_connection_afterwards():
    with RawServer(http(chat()), drip=0.01) as server:
        http_client = bounded.client(server.url, 0.1, None)
        transport = http_client._transport
        with pytest.raises(transport._library.ReadTimeout):
            http_client.get(server.url)
        http_client.close()
        assert transport._under_way == 1
        for _ in range(1000):
            if transport._under_way == 0 and not transport._inner._pool.connections:
                break
            time.sleep(0.01)
        assert not transport._inner._pool.connections
