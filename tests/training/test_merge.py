"""`lora.merge`: a plain model that says what its adapter says, and the adapter beside it."""

import json
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt import registry
from prefopt.settings import ModelConfig
from prefopt.training import adapter_saving
from prefopt.training.metrics import read_lines
from tests.helpers import tiny_llama

# what peft says of itself and of a tied head when others use it as it is
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*tie_word_embeddings.*")
RUN = {"lora__r": 4, "lora__merge": "true", "train__max_steps": 6}
JUDGE = next(n for n in registry.names() if registry.get(n)().needs.output == "scores")


def assert_same_logits(plain, adapted, bound=2e-5):
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (2, 12))
    with torch.no_grad():
        one, two = plain(input_ids=ids).logits, adapted(input_ids=ids).logits
    assert (one - two).abs().max() <= bound * one.abs().max()
    return one


def opened(run):
    assert not list((run / "model").glob("adapter*")), "a plain model"
    return (
        AutoModelForCausalLM.from_pretrained(run / "model").eval(),
        peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter").eval(),
    )


@pytest.mark.parametrize(
    "more",
    [
        {"lora__use_rslora": "true"},
        {"lora__modules_to_save": "lm_head"},
        pytest.param({}, marks=pytest.mark.slow),
    ],
)
def test_merged_model_says_what_its_adapter_says(more, server, command, task, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", **RUN, **more))
    assert ended.status == 0, ended.err
    assert f"merged: the adapter itself is in {tmp_path}/run/adapter\n" in ended.out
    plain, adapted = opened(tmp_path / "run")
    logits = assert_same_logits(plain, adapted)
    base = AutoModelForCausalLM.from_pretrained(task.model).eval()
    with pytest.raises(AssertionError):  # training has moved it by far more than rounding
        assert (assert_same_logits(base, plain, 2) - logits).abs().max() < 1e-3 * logits.abs().max()
    last = tmp_path / "run/checkpoints/step_00000006/adapter_model.safetensors"
    assert last.read_bytes() == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()


def test_merged_model_is_the_best_one(server, command, tmp_path):
    flags = RUN | {"eval__select": "rewards/rejected", "eval__every": 2, "train__max_steps": 24}
    ended = server.train(command("dpo", tmp_path / "run", train__save_every=2, train__keep_last=20, **flags))
    assert ended.status == 0, ended.err
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    found = {line["step"]: line["rewards/rejected"] for line in lines if line["split"] == "eval" and line["step"]}
    best = max(found, key=lambda step: found[step])
    assert best < 24
    weights = load_file(tmp_path / f"run/checkpoints/step_{best:08d}/adapter_model.safetensors")
    kept = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert all((weights[name] == kept[name]).all() for name in weights)
    assert_same_logits(*opened(tmp_path / "run"))
    assert f"This model (step {best})" in (tmp_path / "run/model/README.md").read_text()
    assert not (tmp_path / "run/best").exists()


@pytest.mark.parametrize(
    "place",
    [
        "prefopt.training.adapter_saving:save_merged",
        pytest.param("prefopt.training.adapter_saving:merge", marks=pytest.mark.slow),
    ],
)
def test_run_when_killed_while_it_merges_then_ends_the_same(place, server, command, tmp_path):
    for name, status, fault in (
        ("straight", 0, None),
        ("run", -signal.SIGKILL, {"at": place, "when": "after", "do": "SIGKILL"}),
        ("run", 0, None),
    ):
        ended = server.train(command("dpo", tmp_path / name, eval__select="loss", **RUN), fault)
        assert ended.status == status, ended.err
    for part in ("model", "adapter"):
        one, two = (json.loads((tmp_path / name / part / "manifest.json").read_text()) for name in ("straight", "run"))
        assert one == two


def test_adapter_that_goes_on_is_merged_without_the_snapshot_that_it_started_from(server, command, task, tmp_path):
    first = {name: value for name, value in RUN.items() if name != "lora__merge"}
    assert server.train(command("dpo", tmp_path / "first", **first)).status == 0
    again = {"model__path": tmp_path / "first/model", "lora__merge": "true", "train__max_steps": 6}
    ended = server.train(command("dpo", tmp_path / "run", **again))
    assert ended.status == 0, ended.err
    assert_same_logits(*opened(tmp_path / "run"))


def test_judge_is_merged_too(server, command, tmp_path):
    ended = server.train(command(JUDGE, tmp_path / "run", **RUN))
    assert ended.status == 0, ended.err
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run/adapter", num_labels=1).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert plain(input_ids=ids).logits.item() == pytest.approx(adapted(input_ids=ids).logits.item(), rel=1e-4)


def test_head_that_was_trained_whole_stays_apart_from_a_tied_embedding(tmp_path):
    tiny_llama(64, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    lm = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    lm.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = lm.eval()(input_ids=ids).logits
    adapter_saving.merge(lm, tmp_path / "adapter", ModelConfig())
    adapter_saving.save_merged(lm, tmp_path / "merged")
    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids=ids).logits
    assert (after - before).abs().max() < 2e-5 * before.abs().max()


def test_merging_without_an_adapter_is_refused(server, command, tmp_path):
    ended = server.train(command("dpo", tmp_path / "run", lora__merge="true"))
    assert ended.status == 2
    assert "lora.merge: found True without lora.r; name the rank (--lora.r 16) to turn LoRA on" in ended.err


def test_rounds_merge_their_last_policy_and_go_on_from_adapters(server, command, task, tmp_path):
    flags = {"rounds__count": 2, "rounds__prompts": 6, "rounds__eval_prompts": 4, "judge__kind": "length"}
    flags |= {"generate__n": 3, "generate__max_tokens": 8, "data__max_length": 256, "lora__r": 4, "lora__merge": "true"}
    argv = command("dpo", tmp_path / "run", without=("data.eval_fraction", "train.max_steps"), **flags)
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert (tmp_path / "run/round_02/train/model/adapter_model.safetensors").exists()
    assert_same_logits(*opened(tmp_path / "run"))
    page = (tmp_path / "run/model/README.md").read_text()
    assert "- 2 rounds: the policy answered prompts of `pairs.jsonl`" in page
    assert "Trained from `model` on preferences" in page
    assert "| `tokens` |" in page
    assert "library_name: peft" in (tmp_path / "run/adapter/README.md").read_text()
