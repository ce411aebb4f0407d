"""Prompts, completions, and judges that need no model."""

from collections.abc import Callable
from dataclasses import dataclass, field

from prefopt.types import Completion, Judgement, Prompt, Question


def prompts(n):
    return [Prompt(f"question {i}", (1, 2 + i), f"{i:016x}", f"file:{i + 1}", answer=str(i)) for i in range(n)]


def completion(text, ids=None, reason="stop"):
    return Completion(tuple(ids if ids is not None else range(len(text.split()))), text, reason)


def groups(*texts):
    """One group per argument, of one completion per line."""
    return [[completion(line) for line in text.split("\n")] for text in texts]


@dataclass
class Asked:
    """A judge that says of a question what `answer` says, and remembers what it was asked."""

    answer: Callable[[Question], Judgement]
    questions: list[Question] = field(default_factory=list)

    def judge(self, questions):
        self.questions += questions
        return [self.answer(question) for question in questions]

    def describe(self):
        return {"kind": "asked"}

    def close(self):
        pass


def word_count(question):
    """Scores: the number of words, NaN for the word `nan`."""
    texts = [response.text for response in question.responses]
    scores = tuple(float("nan") if text == "nan" else float(len(text.split())) for text in texts)
    bad = sum(score != score for score in scores)
    return Judgement(scores=scores, problems={"nan": bad} if bad else {})


def first_is_favoured(question):
    """Logits: the longer wins by its surplus of words, and whoever stands first gets 3 on top."""
    words = [len(response.text.split()) for response in question.responses]
    logits = [[0.0 if i == j else a - b + 3.0 for j, b in enumerate(words)] for i, a in enumerate(words)]
    return Judgement(logits=tuple(map(tuple, logits)))
