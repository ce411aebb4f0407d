"""vLLM itself, in its own environment, offline and as a server: `make test-engines`, or name its Python."""

import contextlib
import copy
import itertools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt import generation
from prefopt.data.structure import completion_end_tokens
from prefopt.errors import ConfigError, RoundError
from prefopt.generation.base import Sampling
from prefopt.generation.transformers_engine import TransformersEngine
from prefopt.generation.vllm_engine import _arguments, _Copy, _share_devices
from prefopt.settings import GenerateConfig, ModelConfig
from prefopt.training.model_sources import ModelSource

PYTHON = os.environ.get("PREFOPT_VLLM_PYTHON", "")


def make(policy, settings, path=None):
    generation.check(settings)
    return generation.make(
        settings,
        path=str(path or policy.folder),
        load=lambda: pytest.fail("loaded in this process"),
        model=ModelConfig(),
        tokenizer=policy.tokenizer,
    )


def vllm(policy, path=None, **settings):
    return contextlib.closing(make(policy, GenerateConfig(engine="vllm", python=PYTHON, **settings), path))


@pytest.fixture(scope="module")
def offline(policy):
    with vllm(policy) as engine:
        yield engine


@pytest.fixture(scope="module")
def online(policy, tmp_path_factory):
    """vLLM's own server, asked by the official client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy.folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    command += ["--max-num-batched-tokens", "4096", "--gpu-memory-utilization", "0.2"]
    env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        settings = GenerateConfig(engine="openai", url=f"http://127.0.0.1:{port}/v1", retries=0, logprobs=True)
        for _ in range(150):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(2)
        with contextlib.closing(make(policy, settings)) as engine:
            yield engine
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(params=["offline", "online"])
def engine(request):
    return request.getfixturevalue(request.param)


def here(policy):
    return TransformersEngine(policy.lm, policy.tokenizer)


@pytest.mark.engines
def test_greedy_tokens_and_log_probabilities_are_those_of_transformers(policy, engine):
    sampling = Sampling(n=1, temperature=0, max_tokens=16, logprobs=True)
    ours = here(policy).generate(policy.prompts, sampling, policy.seeds)
    theirs = engine.generate(policy.prompts, sampling, policy.seeds)
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert a.logps == pytest.approx(b.logps, abs=2e-5)


@pytest.mark.engines
def test_sampled_tokens_have_the_log_probabilities_that_the_model_gives_them(policy, engine):
    import torch

    sampling = Sampling(n=3, temperature=0.7, top_p=0.9, top_k=50, max_tokens=16, logprobs=True)
    answers = engine.generate(policy.prompts, sampling, policy.seeds)
    for prompt, group in zip(policy.prompts, answers, strict=True):
        assert len(group) == 3
        for c in group:
            with torch.no_grad():
                logits = policy.lm(torch.tensor([[*prompt, *c.token_ids]])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
            assert c.logps == pytest.approx(expected.tolist(), abs=2e-5)
            assert (c.finish_reason == "stop") == (c.token_ids[-1] in completion_end_tokens(policy.tokenizer))
    assert {c.finish_reason for group in answers for c in group} == {"stop", "length"}


@pytest.mark.engines
def test_completion_i_draws_with_seed_plus_i_whatever_is_beside_it(policy, engine):
    sampling = Sampling(n=4, max_tokens=12)
    all_of_them = engine.generate(policy.prompts, sampling, policy.seeds)
    assert engine.generate(policy.prompts, sampling, policy.seeds) == all_of_them
    (last,) = engine.generate(policy.prompts[3:4], Sampling(n=1, max_tokens=12), [policy.seeds[3] + 2])[0]
    assert last.token_ids == all_of_them[3][2].token_ids
    assert len({c.token_ids for c in itertools.chain(*all_of_them)}) > 40


@pytest.mark.engines
def test_stop_texts_and_stop_tokens_end_a_completion(policy, engine):
    # prompts of whole characters: after half of one, vLLM looks for stop texts in the end of the prompt too
    prompts = [policy.tokenizer(f"the {word} answer")["input_ids"] for word in ("red", "blue", "green")]
    sampling, seeds = Sampling(n=8, max_tokens=24), [0, 10, 20]
    whole = list(itertools.chain(*engine.generate(prompts, sampling, seeds)))
    letters = [letter for c in whole for letter in c.text if letter.isascii()]
    text = max({*letters}, key=letters.count)
    stops = Sampling(n=8, max_tokens=24, stop=(text, "<|im_start|>"))
    cut = list(itertools.chain(*engine.generate(prompts, stops, seeds)))
    end = policy.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert any(text in a.text for a in whole)
    for a, b in zip(whole, cut, strict=True):
        at = a.token_ids.index(end) if end in a.token_ids else None
        until = policy.tokenizer.decode(a.token_ids[:at], skip_special_tokens=True)
        assert b.text == until.split(text)[0]
        assert a.token_ids[: len(b.token_ids)] == b.token_ids
        assert b.finish_reason == ("stop" if text in until or at is not None else a.finish_reason)


@pytest.mark.engines
def test_each_prompt_is_told_as_it_is_read(policy, offline):
    told = {}
    whole = offline.generate(policy.prompts, Sampling(n=2, max_tokens=6), policy.seeds, told.__setitem__)
    assert [told[number] for number in range(len(policy.prompts))] == whole


@pytest.mark.engines
def test_two_copies_give_what_one_gives(policy, offline):
    sampling = Sampling(n=2, max_tokens=12)
    with vllm(policy, replicas=2) as two:
        assert two.generate(policy.prompts[:7], sampling, policy.seeds[:7]) == offline.generate(
            policy.prompts[:7], sampling, policy.seeds[:7]
        )


@pytest.mark.engines
def test_the_models_positions_end_a_completion(policy, offline):
    prompt = [0] + [5] * 509
    ((completion,),) = offline.generate([prompt], Sampling(n=1, max_tokens=20, temperature=0), [0])
    assert len(completion.token_ids) <= 2
    with pytest.raises(RoundError, match=r"1 of 1 prompts fill the model's 512 positions"):
        offline.generate([[*prompt, 5, 5]], Sampling(n=1), [0])


@pytest.mark.engines
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_policy_with_an_adapter_answers_with_it(policy, tmp_path):
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    lm = copy.deepcopy(policy.lm)
    lm.name_or_path = str(policy.folder)
    adapted = peft.get_peft_model(lm, lora)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    sampling = Sampling(n=1, temperature=0, max_tokens=12, logprobs=True)
    ours = TransformersEngine(adapted, policy.tokenizer).generate(policy.prompts, sampling, policy.seeds)
    with vllm(policy, path=tmp_path / "adapter") as engine:
        theirs = engine.generate(policy.prompts, sampling, policy.seeds)
    assert [g[0].token_ids for g in ours] == [g[0].token_ids for g in theirs]
    assert [g[0].token_ids for g in ours] != [
        g[0].token_ids for g in here(policy).generate(policy.prompts, sampling, policy.seeds)
    ]


@pytest.mark.engines
def test_an_argument_that_vllm_refuses_is_named_with_its_words(policy):
    with pytest.raises(RoundError, match=r"vllm process ended with status 1: .*not_an_argument.*its log is") as error:
        make(policy, GenerateConfig(engine="vllm", python=PYTHON, args={"not_an_argument": 1}))
    assert "\n" not in str(error.value)
    Path(str(error.value).split("its log is ")[1].split(";")[0]).unlink()


@pytest.mark.engines
def test_a_process_that_is_killed_is_named_and_its_log_kept(policy):
    engine = make(policy, GenerateConfig(engine="vllm", python=PYTHON))
    engine._copies[0]._process.kill()
    with pytest.raises(RoundError, match=r"ended with status -9: .*its log is .*run the same command again") as error:
        engine.generate(policy.prompts, Sampling(n=1), policy.seeds)
    engine.close()
    log = Path(str(error.value).split("its log is ")[1].split(";")[0])
    assert log.read_text()
    log.unlink()


def test_a_python_without_vllm_is_refused_before_anything_is_loaded():
    for python, words in (
        (sys.executable, r"generate.python: '.*' has no vLLM"),
        ("/nowhere/python", r"generate.python: '/nowhere/python' cannot be run \(No such file or directory\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            generation.check(GenerateConfig(engine="vllm", python=python))


def test_a_process_that_answers_no_more_but_does_not_end_is_killed(tmp_path, monkeypatch):
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\necho trouble >&2\nexec sleep 1000 >&-\n")
    hangs.chmod(0o700)
    monkeypatch.setattr("prefopt.generation.vllm_engine._LEAVING", 0.1)
    copy = _Copy(str(hangs), None)
    with pytest.raises(RoundError, match=r"ended with status -9: trouble; its log is") as error:
        copy.answer()
    copy.close()
    Path(str(error.value).split("its log is ")[1].split(";")[0]).unlink()


def test_room_for_the_highest_rank_of_an_adapter_is_asked_for(policy):
    import peft

    for pattern, room in (({}, 8), ({"down_proj": 20}, 32)):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern=pattern)
        weights = ModelSource("adapter", str(policy.folder), adapter=lora)
        assert _arguments(GenerateConfig(), weights, ModelConfig())["max_lora_rank"] == room


def test_devices_are_shared_between_copies_in_order(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert _share_devices(2, 2) == ["4,5", "6,7"]
    assert _share_devices(3, 1) == ["4", "5", "6"]
    with pytest.raises(RoundError, match=r"3 copies of the model on 2 GPUs each need 6, found 4"):
        _share_devices(3, 2)
