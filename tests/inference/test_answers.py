"""One answer to each prompt: what is asked again, with which seeds, and what is said of it."""

from prefopt.generation.base import Sampling
from prefopt.inference.answers import answer_all
from prefopt.inference.test_time_po import seed_of
from prefopt.thoughts import Answer, ThoughtFormat
from tests.inference.conftest import Scripted

THOUGHT = ThoughtFormat("Think. {prompt}", response_marker="<R>")


def answers(tokenizer, prompts, say, retries=3, context=None, **more):
    engine = Scripted(tokenizer, say, context)
    how = {"thought": THOUGHT, "sampling": Sampling(n=7, max_tokens=50), "retries": retries, "seed": 0}
    return engine, answer_all(prompts, engine, **how | more)


def test_only_what_holds_no_response_is_sampled_again_with_other_seeds(tokenizer, prompt_of):
    prompts = [prompt_of(f"say {i}", f"k{i}") for i in range(3)]
    good = {seed_of(0, "k0", "answer", 0, 1), seed_of(0, "k1", "answer", 2, 1)}
    told = []
    engine, found = answers(
        tokenizer,
        prompts,
        lambda text, number, seed: "so <R> yes" if seed in good else "so",
        progress=lambda phase, number: told.append(number),
    )
    assert [one.tries for one in found] == [1, 3, 4]
    assert [one.answer for one in found] == [Answer("so", "yes")] * 2 + [None]
    assert [text for _, text, _, _ in engine.calls] == [f"say {i}" for i in (0, 1, 2, 1, 2, 1, 2, 2)]
    assert len({seed for _, _, _, seed in engine.calls}) == 8
    assert {sampling.n for _, _, sampling, _ in engine.calls} == {1}
    assert sum(told) == 3
    assert found[2].to_dict()["reason"] == "no response marker in each of 4 completions"
    assert found[2].to_dict()["response"] is None
    assert "thought" not in found[0].to_dict()
    assert found[0].to_dict(thoughts=True)["thought"] == "so"


def test_without_retries_each_is_asked_once(tokenizer, prompt_of):
    engine, found = answers(tokenizer, [prompt_of()], lambda *_: "<R>", retries=0)
    assert len(engine.calls) == 1
    assert found[0].to_dict()["reason"] == "empty response"


def test_a_prompt_without_room_is_not_asked_and_the_others_are(tokenizer, prompt_of):
    told = []
    prompts = [prompt_of("say it " * 20, "long"), prompt_of("say", "short")]
    engine, found = answers(
        tokenizer, prompts, lambda *_: "<R> a", context=20, progress=lambda phase, number: told.append(number)
    )
    assert [text for _, text, _, _ in engine.calls] == ["say"]
    assert found[0].answer is None
    assert found[0].to_dict()["reason"].endswith("tokens leave no room in the model's 20 positions")
    assert found[1].answer == Answer("", "a")
    assert sum(told) == 2
    none = answers(tokenizer, prompts[:1], lambda *_: "<R> a", context=20)
    assert none[0].calls == []
