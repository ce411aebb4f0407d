from prefopt.data.structure import Structure
from prefopt.judges.base import Judge
from prefopt.judges.length import LengthJudge
from prefopt.methods.sppo import SPPO
from prefopt.rounds.stages import MISPLACED, JudgedView, judge_rows
from prefopt.types import Completion, Prompt
from tests.helpers import family_tokenizer


def test_candidates_that_could_not_be_trained_on_are_counted_and_no_judge_is_asked_about_them():
    tokenizer = family_tokenizer("smollm2")
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    word = tokenizer("fruit", add_special_tokens=False)["input_ids"]
    sampled = [[*word, end], [*word, start, *word, end], [*word, end, *word, end], [*word, end, end], word]
    view = JudgedView(SPPO(), Structure(tokenizer))
    seen = view.of([Completion(tuple(ids), "fruit", "stop") for ids in sampled])
    assert seen.judged == (0, 4)
    assert seen.why == {MISPLACED: 3}
    asked = []

    class Spy(LengthJudge):
        def judge(self, questions):
            asked.extend(len(question.responses) for question in questions)
            return super().judge(questions)

    judge: Judge = Spy()
    row = {"candidates": [{"text": "fruit", "ids": ids, "finish_reason": "stop"} for ids in sampled]}
    prompt = Prompt([{"role": "user", "content": "Name a fruit"}], (start, *word), "0" * 16, "f:1")
    (said,) = judge_rows(judge, view, [prompt], [row])
    assert asked == [2]
    assert (said["judged"], said["unseen"]) == ([0, 4], {MISPLACED: 3})
