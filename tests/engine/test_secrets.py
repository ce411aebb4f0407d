import pytest

from prefopt.engine.secrets import hidden


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://anna:pass@host:8000/v1", "http://***@host:8000/v1"),
        ("https://token@host/v1?model=a", "https://***@host/v1?model=a"),
        ("https://host/v1?api_key=abc&model=a", "https://host/v1?api_key=***&model=a"),
        ("https://host/v1?model=a&access_token=abc#x", "https://host/v1?model=a&access_token=***#x"),
        ("https://host/a@b", "https://host/a@b"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ({"hf_token": "abc", "max_tokens": 5, "n": 1}, {"hf_token": "***", "max_tokens": 5, "n": 1}),
        ({"generate": {"api_key_env": "MY_KEY"}}, {"generate": {"api_key_env": "MY_KEY"}}),
        ({"kernel": {"token_tile": None}, "tokenizer": "x"}, {"kernel": {"token_tile": None}, "tokenizer": "x"}),
        ({"password": None, "args": ["--key", "http://a:b@c"]}, {"password": None, "args": ["--key", "http://***@c"]}),
    ],
)
def test_secrets_are_hidden_and_nothing_else(value, shown):
    assert hidden(value) == shown


def test_values_of_variables_with_keys_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "sk-1234567890")
    monkeypatch.setenv("OTHER", "plain-1234567890")
    monkeypatch.setenv("USE_TOKEN", "true")
    found = hidden({"a": ["x sk-1234567890 y"], "b": "plain-1234567890 true"})
    assert found == {"a": ["x *** y"], "b": "plain-1234567890 true"}
    assert hidden("plain-1234567890", ["OTHER"]) == "***"
