"""QLoRA in whole runs: what is said, saved, continued and refused."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefopt.errors import TrainError
from prefopt.settings import ModelConfig
from prefopt.training import models, quantized
from prefopt.training.metrics import read_lines

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="not installed")
RUN = {"model__quantize": "nf4", "lora__r": 4, "train__max_steps": 6, "eval__every": 6, "optim__lr": 3e-2}


@pytest.fixture
def error(server, command, tmp_path):
    def error(**settings):
        ended = server.train(command("tdpo", tmp_path / "refused", **settings))
        assert ended.status == 2, ended.out + ended.err
        assert ended.err.count("\n") == 1, ended.err
        return ended.err.removeprefix("error: ").rstrip("\n")

    return error


@needs_bitsandbytes
def test_run_when_the_base_is_quantised_then_it_says_so_learns_and_saves_an_adapter_of_the_base(
    server, command, task, tmp_path
):
    output = tmp_path / "run"
    ended = server.train(command("tdpo", output, **RUN))
    assert ended.status == 0, ended.err
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(task.model).parameters())
    trained = sum(w.numel() for w in load_file(output / "model/adapter_model.safetensors").values())
    assert (
        f" {count + trained:,} parameters, the other matrices quantised in nf4, {trained:,} of them trained"
        in ended.out
    )
    assert f"under the disabled adapter (no second copy), {task.model}, the base held in nf4\n" in ended.out
    assert "agree to 0.0001, loss 0.6931 as expected" in ended.out
    assert "kernels" not in ended.err
    card = json.loads((output / "run_card.json").read_text())
    assert card["config"]["model"]["compute_dtype"] == "float32"
    assert card["reference"]["is"].endswith("the base held in nf4")
    assert json.loads((output / "model/adapter_config.json").read_text())["base_model_name_or_path"] == str(task.model)
    evals = [line for line in read_lines(output / "metrics.jsonl") if line["split"] == "eval"]
    assert evals[-1]["loss"] < 0.9 * evals[0]["loss"]
    # the adapter is continued on a base that is quantised in the same way, and by another one on the plain base
    for quantize in ("nf4", "none"):
        again = {"model__path": output / "model", "model__quantize": quantize, "train__max_steps": 1}
        ended = server.train(command("tdpo", tmp_path / quantize, **again))
        assert ended.status == 0, ended.err
        assert ("held in nf4" in ended.out) == (quantize == "nf4")


@needs_bitsandbytes
def test_run_when_the_base_is_quantised_and_products_are_in_bfloat16_then_its_check_allows_what_they_round(
    server, command, tmp_path
):
    ended = server.train(command("tdpo", tmp_path / "run", **RUN, model__compute_dtype="bfloat16"))
    assert ended.status == 0, ended.err
    assert "agree to 0.1, " in ended.out


@needs_bitsandbytes
def test_model_when_quantised_then_heads_and_embeddings_are_not_and_sizes_are_those_of_the_weights(task):
    plain = models.load_model(str(task.model), ModelConfig())
    for load, head in ((models.load_model, "lm_head"), (models.load_scorer, "score")):
        lm = load(str(task.model), ModelConfig(quantize="nf4", compute_dtype="bfloat16"))
        assert type(lm.get_submodule(head)) is torch.nn.Linear
        assert type(lm.get_input_embeddings()) is torch.nn.Embedding
        held = {name for name, module in lm.named_modules() if quantized.quantization_type(module) == "nf4"}
        assert {name.rpartition(".")[2] for name in held} == {
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        }
        assert quantized.precision(lm) == torch.bfloat16
        shared = dict(plain.named_parameters())
        sizes = {name: quantized.numel(weight) for name, weight in lm.named_parameters() if name in shared}
        assert sizes == {name: shared[name].numel() for name in sizes}


@needs_bitsandbytes
def test_model_when_a_quantised_weight_is_not_finite_then_refused_by_its_name(task, tmp_path):
    lm = models.load_model(str(task.model), ModelConfig())
    lm.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainError, match=rf"holds weights that are not finite \({name}\)"):
        models.load_model(str(tmp_path), ModelConfig(quantize="nf4"))


# Refused --------------------------------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_quantised_weights_when_nothing_else_is_trained_then_refused_in_one_line(error):
    assert error(model__quantize="nf4") == (
        "model.quantize: found 'nf4' without LoRA; quantised weights are frozen, so name a rank (--lora.r 16) or an "
        "adapter as model.path, or leave it out"
    )


@needs_bitsandbytes
def test_quantised_weights_when_they_are_to_be_trained_whole_then_refused_in_one_line(error):
    assert error(model__quantize="nf4", lora__r=4, lora__target_modules="q_proj", lora__modules_to_save="up_proj") == (
        "lora.modules_to_save: 'up_proj' is held in nf4, which cannot be trained; expected the output head or an "
        "embedding (or give it an adapter by lora.target_modules)"
    )


def test_model_when_it_is_quantised_already_then_refused_in_one_line(error, task, tmp_path):
    config = json.loads((task.model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for path in task.model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert error(model__path=tmp_path, lora__r=4) == (
        f"model.path: '{tmp_path}' is quantised (bitsandbytes), expected the model it was made from "
        "(--model.quantize nf4 quantises it when it is loaded)"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.quantize": "nf4"}, "model.quantize: 'nf4'"),
        ({"optim.name": "adamw_8bit"}, "optim.name: 'adamw_8bit'"),
        ({"optim.name": "paged_adamw_8bit"}, "optim.name: 'paged_adamw_8bit'"),
    ],
)
def test_run_when_bitsandbytes_is_not_installed_then_refused_before_anything_is_loaded(
    settings, message, command, monkeypatch, tmp_path, capsys
):
    from prefopt import cli
    from prefopt.training import signals

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    monkeypatch.setattr(signals.Stop, "install", lambda *args: None)  # the signals are pytest's here
    assert cli.train(command("dpo", tmp_path / "run", lora__r=4, **settings)) == 2
    assert capsys.readouterr().err == (
        f"error: {message} needs bitsandbytes; pip install 'prefopt[qlora]', or leave it out\n"
    )


@needs_bitsandbytes
def test_optimizer_when_it_would_page_on_a_cpu_then_refused_in_one_line(error):
    assert error(optim__name="paged_adamw_8bit") == (
        "optim.name: 'paged_adamw_8bit' pages its state to the host's memory, where a CPU run keeps it in any "
        "case; use adamw_8bit"
    )
