"""A policy whose answers are written in the test, a judge that keeps what it is told, and small models in folders."""

import json
import math

import pytest

from prefopt.types import Completion, Judgement, Prompt
from tests.helpers import CHATML, byte_bpe_tokenizer, tiny_llama

TEXTS = [f"say the {word} number {i}, and why" for i, word in enumerate(["red", "green", "blue", "amber"])]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_bpe_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def chat_tokenizer():
    return byte_bpe_tokenizer(TEXTS, 300, chat_template=CHATML)


class Scripted:
    """An engine that says what `say(prompt text, number of the sample, seed)` says, a token for each character."""

    def __init__(self, tokenizer, say, context=None):
        self.tokenizer, self.say, self.context = tokenizer, say, context
        self.calls = []  # (kind, prompt text, sampling, seed)

    def generate(self, prompts, sampling, seeds, done=None):
        out = []
        for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            self.calls.append((kind_of(text), text, sampling, seed))
            said = [self.say(text, i, seed) for i in range(sampling.n)]
            out.append([Completion(tuple(range(min(len(t), sampling.max_tokens))), t, "stop") for t in said])
            if done is not None:
                done(number, out[-1])
        return out

    def describe(self):
        return {"engine": "scripted"}

    def close(self):
        pass

    def count(self, kind):
        return sum(call[0] == kind for call in self.calls)


def kind_of(text):
    if "Put the new text between" in text:
        return "update"
    if "You give advice only" in text:
        return "gradient"
    return "loss" if "You review responses to requests" in text else "answer"


class Spy:
    """A judge that scores by `score(text)` and keeps all questions."""

    def __init__(self, score):
        self.score, self.questions = score, []

    def judge(self, questions):
        self.questions += questions
        return [Judgement(scores=tuple(self.score(r.text) for r in q.responses)) for q in questions]

    def describe(self):
        return {"kind": "spy"}

    def close(self):
        pass

    @property
    def texts(self):
        return [response.text for question in self.questions for response in question.responses]


class Compares(Spy):
    """The same, but it only says which of two is better."""

    def judge(self, questions):
        self.questions += questions

        def wins(a, b):
            return math.nan if math.isnan(a - b) else 0.5 + 0.4 * ((a > b) - (a < b))

        out = []
        for question in questions:
            scores = [self.score(response.text) for response in question.responses]
            table = [[0.5 if i == j else wins(a, b) for j, b in enumerate(scores)] for i, a in enumerate(scores)]
            out.append(Judgement(probs=tuple(map(tuple, table))))
        return out


def value(text):
    """The number that a response ends with."""
    return float(text.split()[-1])


@pytest.fixture(scope="session")
def prompt_of(tokenizer):
    def prompt_of(text="say a number", key="k0"):
        return Prompt(text, (0, *tokenizer(text, add_special_tokens=False)["input_ids"]), key, "prompts.jsonl:1")

    return prompt_of


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A tiny model that answers at random in a folder, and a file of prompts."""
    place = tmp_path_factory.mktemp("infer")
    rows = [{"prompt": f"say {i}"} for i in range(6)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_bpe_tokenizer(TEXTS, 300)
    tiny_llama(len(tokenizer), hidden=16, layers=1, max_position_embeddings=4096).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place
