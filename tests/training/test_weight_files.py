"""Models whose files are not whole, not theirs, or not to be read: refused by name, whatever loads them."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt import judges
from prefopt.errors import TrainError
from prefopt.settings import JudgeConfig, ModelConfig, parse
from prefopt.training import adapter_loading, adapter_saving, model_sources, models, sharded_io, weight_files
from tests.dist.ranks import run_ranks
from tests.helpers import tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"
LOADERS = {
    "policy": models.load_model,
    "scorer": models.load_scorer,
    "sampler elsewhere": models.check_model,
    "judge": lambda path, settings, key="judge.path": models.load_classifier(path, settings, key),
    "judge of a later stage": lambda path, settings: judges.check_weights(JudgeConfig(kind="reward_model", path=path)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(40, hidden=16, layers=1, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A classifier made from it."""
    folder = tmp_path_factory.mktemp("trained")
    models.load_scorer(str(base), ModelConfig()).save_pretrained(folder)
    return folder


@pytest.fixture
def changed(tmp_path):
    def changed(source, change, name="changed"):
        """A copy of a model whose weights, by name, `change` has changed."""
        folder = shutil.copytree(source, tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return changed


def rename(prefix):
    def change(weights):
        for name in [*weights]:
            weights[prefix + name] = weights.pop(name)

    return change


@pytest.mark.parametrize("who", LOADERS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop(Q), f"no weights for {Q}, which would be initialised at random"),
        (lambda w: [w.pop(Q), w.pop("model.norm.weight")], f"no weights for {Q} and 1 more"),
        (lambda w: w.update({"model.layers.9.x": torch.ones(2)}), "holds model.layers.9.x, which Llama"),
        (
            lambda w: w.update({"model.embed_tokens.weight": torch.ones(41, 16)}),
            "holds model.embed_tokens.weight of shape 41 x 16, but its config.json requires 40 x 16",
        ),
        (rename("_orig_mod."), "'_orig_mod.' is a prefix that torch.compile adds to names; save model._orig_mod"),
        (rename("module."), "'module.' is a prefix that DDP adds to names; save model.module"),
        (lambda w: w.update({"model._orig_mod.layers.0.x": w.pop(Q)}), "'_orig_mod.' is a prefix that torch.compile"),
    ],
)
def test_load_when_weights_are_missing_unknown_or_of_another_shape_then_the_line_names_one(
    who, change, says, base, trained, changed
):
    path = changed(trained if who.startswith("judge") else base, change)
    with pytest.raises(TrainError, match=says.replace("(", r"\(")) as error:
        LOADERS[who](path, ModelConfig())
    assert "\n" not in str(error.value)


def test_load_when_what_differs_is_known_to_be_harmless_then_the_weights_are_those_of_the_file(base, changed):
    """Tables of older checkpoints, a value head beside a language model."""
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "v_head.summary.weight": torch.ones(1, 16)}
    lm = models.load_model(changed(base, lambda w: w.update(more)), ModelConfig())
    held = load_file(base / "model.safetensors")
    assert all(torch.equal(weight, held[name]) for name, weight in lm.named_parameters())


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_load_when_a_head_is_tied_then_either_of_the_two_may_be_missing(kept, tmp_path, changed):
    tiny_llama(40, hidden=16, layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    weight = torch.randn(40, 16)

    def change(weights):
        weights.pop("model.embed_tokens.weight")
        weights[kept] = weight

    lm = models.load_model(changed(tmp_path / "tied", change), ModelConfig())
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert torch.equal(lm.lm_head.weight, weight)


def test_load_when_the_head_of_an_untied_model_is_missing_then_it_is_refused(base, changed):
    with pytest.raises(TrainError, match=r"no weights for lm_head.weight"):
        models.load_model(changed(base, lambda w: w.pop("lm_head.weight")), ModelConfig())


def test_scorer_when_a_language_model_has_no_score_then_it_is_new_but_a_trained_one_must_have_it(
    base, trained, changed
):
    assert models.load_scorer(str(base), ModelConfig()).score.weight.isfinite().all()
    path = changed(trained, lambda w: w.pop("score.weight"))
    for load in (LOADERS["scorer"], LOADERS["judge"]):
        with pytest.raises(TrainError, match=r"no weights for score.weight.*expected a trained classifier"):
            load(path, ModelConfig())


def test_policy_when_the_model_is_a_classifier_then_it_is_refused(trained):
    with pytest.raises(TrainError, match=r"no weights for lm_head.weight"):
        models.load_model(str(trained), ModelConfig())


def test_encoder_judge_when_a_weight_is_missing_then_it_is_refused(tmp_path, changed):
    config = AutoConfig.for_model(
        "bert", vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(TrainError, match=r"judge.path: .* no weights for bert.pooler.dense.bias"):
        LOADERS["judge"](changed(tmp_path / "bert", lambda w: w.pop("bert.pooler.dense.bias")), ModelConfig())


@pytest.mark.parametrize("lost", ["experts.1.w1", "experts.3.", "gate.weight"])
def test_mixture_when_part_of_an_expert_is_missing_then_it_is_refused_by_name(lost, tmp_path, changed):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads))
    lm.save_pretrained(tmp_path / "mixture")

    def change(weights):
        for name in [name for name in weights if lost in name]:
            del weights[name]

    says = "experts.1.w1|experts.(down|gate_up)_proj of shape 3 x|gate.weight"
    with pytest.raises(TrainError, match=says):
        models.load_model(changed(tmp_path / "mixture", change), ModelConfig())


# Files ----------------------------------------------------------------------------------------------------------------


def sharded(base, folder):
    """The weights in two files, with their index."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({n: w for n, w in weights.items() if where[n] == file}, folder / file, {"format": "pt"})
    return where


def as_index(where):
    return json.dumps({"metadata": {}, "weight_map": where})


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (as_index, None),
        (lambda where: as_index(where | {Q: "../elsewhere/model.safetensors"}), "file names in the model's folder"),
        (lambda where: as_index(where | {Q: "/etc/passwd"}), "file names in the model's folder"),
        (lambda where: as_index(where | {Q: "model-00003-of-00003.safetensors"}), "lacks model-00003-of-00003"),
        (lambda where: as_index(where | {"more": min(where.values())}), "names more in model-00001-of-00002"),
        (lambda where: as_index({}), "has no weight_map"),
        (lambda where: "[1]", "has no weight_map"),
        (lambda where: "{", "is not JSON"),
        (lambda where: "[" * 100_000, "is not JSON"),
        (lambda where: json.dumps({"weight_map": where}), "has no metadata"),
    ],
)
def test_find_when_an_index_names_what_is_not_there_then_one_line_before_anything_is_loaded(
    index, says, base, tmp_path
):
    where = sharded(base, tmp_path / "sharded")
    (tmp_path / "sharded/model.safetensors.index.json").write_text(index(where))
    if says is None:
        model_sources.find(str(tmp_path / "sharded"), ModelConfig())
        return
    with pytest.raises(TrainError, match=f"^model.path: .*{says}"):
        model_sources.find(str(tmp_path / "sharded"), ModelConfig())


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_find_when_a_file_is_cut_short_then_it_is_named(keep, base, tmp_path):
    file = shutil.copytree(base, tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(TrainError, match=r"^model.path: .*model.safetensors' is damaged or truncated"):
        model_sources.find(str(tmp_path / "cut"), ModelConfig())


def test_load_when_weights_are_whole_numbers_then_they_are_refused_by_name(base, changed):
    path = changed(base, lambda weights: weights.update({Q: (100 * weights[Q]).to(torch.int8)}))
    with pytest.raises(TrainError, match=rf"model.path: '.*' holds {Q} as integers \(I8\)"):
        models.load_model(path, ModelConfig())


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("model.safetensors", os.mkfifo, "is a named pipe, expected a regular file"),
        ("tokenizer.json", os.mkfifo, "is a named pipe, expected a regular file"),
        ("model.safetensors", lambda file: file.symlink_to("/nowhere/weights"), "No such file or directory"),
    ],
)
def test_find_when_a_file_is_a_pipe_or_a_link_to_nothing_then_it_is_named_and_not_waited_for(
    name, make, says, base, tmp_path
):
    folder = shutil.copytree(base, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(TrainError, match=f"^model.path: '.*{name}' cannot be read: {says}$"):
        model_sources.find(str(folder), ModelConfig())


def test_names_when_a_file_cannot_be_read_then_the_reason_is_the_systems(base, monkeypatch):
    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(TrainError, match="cannot be read: Input/output error"):
        weight_files.weight_names(base / "model.safetensors", "model.path")


def test_moving_reference_when_its_file_lacks_a_weight_then_it_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "moving.safetensors")
    weights = {name: torch.nn.Parameter(torch.ones(1)) for name in "ab"}
    with pytest.raises(TrainError, match="moving lacks b"):
        sharded_io.load_frozen(None, tmp_path, "moving", weights)


# An adapter, and backends that shard


def test_adapter_when_its_names_have_a_wrapper_then_it_is_named(base, tmp_path):
    config = parse(["--method", "sft", "--model.path", str(base), "--data.train", "x", "--lora.r", "2"])
    start = model_sources.find(str(base), config.model)
    adapter_saving.save(adapter_loading.load_policy(config, start, None), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    inside = "base_model.model."
    save_file(
        {f"{inside}_orig_mod.{name.removeprefix(inside)}": weight for name, weight in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(TrainError, match=r"'_orig_mod.' is a prefix that torch.compile"):
        model_sources.find(str(tmp_path), config.model)


def _load_sharded(runtime, paths):
    said = []
    for path in paths:
        with runtime.sharded_loading():
            try:
                models.load_model(path, ModelConfig())
                said.append("")
            except TrainError as error:
                said.append(str(error))
    return said


@pytest.mark.slow
def test_load_when_zero3_shards_then_every_rank_refuses_the_same(base, changed):
    paths = [
        str(base),
        changed(base, lambda w: w.pop(Q), "missing"),
        changed(base, lambda w: w.update({"model.layers.9.x": torch.ones(2)}), "unknown"),
        changed(base, lambda w: w.update({Q: torch.ones(17, 16)}), "shape"),
    ]
    first, second = run_ranks(_load_sharded, paths, backend="zero3")
    assert first == second
    assert first[0] == ""
    assert [Q in first[1], "model.layers.9.x" in first[2], "17 x 16" in first[3]] == [True] * 3


def test_path_when_it_can_be_a_hub_id_or_is_a_folder_then_passes(tmp_path):
    weight_files.check_path("model.path", "owner/name")
    weight_files.check_path("model.path", str(tmp_path))
    with pytest.raises(TrainError) as caught:
        weight_files.check_path("model.path", "./nothing")
    assert str(caught.value) == "model.path: './nothing' does not exist, expected the folder of a model or a hub id"
