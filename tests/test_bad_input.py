"""What a user can get wrong, through the command line: one line that says where, what, what was expected, and how to
mend it; exit status 2; nothing lost. Bad rows are in tests/data."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers import byte_bpe_tokenizer, tiny_llama

TRAINER = "prefopt.training.trainer:Trainer."


@pytest.fixture
def error(server, command, tmp_path):
    """The one line that a command ends with, without its `error: `."""

    def error(*, fault=None, file_size_limit=None, method="dpo", **settings):
        settings.setdefault("output", tmp_path / "run")
        argv = command(method, **settings)
        ended = server.train(argv, fault, file_size_limit=file_size_limit, cwd=tmp_path)
        assert ended.status == 2, ended.out + ended.err
        assert "Traceback" not in ended.err
        *bar, last = ended.err.replace("\r", "\n").splitlines()
        assert all(not line or "step/s" in line or "s/step" in line for line in bar)
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return error


@pytest.fixture
def variant(task, tmp_path):
    """A copy of the tiny model, to be spoilt."""

    def variant(name, model=None, tokenizer=None):
        folder = tmp_path / name
        shutil.copytree(task.model, folder)
        if model is not None:
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return variant


# Files ----------------------------------------------------------------------------------------------------------------


def test_data_when_the_file_is_missing_then_the_nearest_name_is_offered(error, task):
    found = error(data__train=task.folder / "pair.jsonl")
    assert found == f"{task.folder}/pair.jsonl: no such file or folder; did you mean '{task.pairs}'?"


def test_data_when_the_eval_file_is_missing_then_it_is_named(error, task):
    assert error(data__eval="held_out.jsonl") == "held_out.jsonl: no such file or folder"


def test_data_when_the_file_is_empty_then_it_says_what_a_line_is(error, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert error(data__train="empty.jsonl") == "empty.jsonl: the file is empty, expected one JSON object per line"


def test_data_when_a_line_is_broken_json_then_the_line_is_named(error, task, tmp_path):
    (tmp_path / "broken.jsonl").write_text(task.pairs.read_text() + '{"prompt": \n')
    assert error(data__train="broken.jsonl") == (
        "broken.jsonl:51: broken JSON (Expecting value at column 12), expected one JSON object "
        "(drop the example, or --data.on_bad_row skip)"
    )


def test_data_when_messages_meet_a_tokenizer_without_chat_template_then_says_so(error, tmp_path):
    def turn(role, text):
        return [{"role": role, "content": text}]

    row = {"prompt": turn("user", "Hi"), "chosen": turn("assistant", "a"), "rejected": turn("assistant", "b")}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    assert error(data__train="chat.jsonl") == (
        "the data has chat messages and the tokenizer has no chat template, expected one (--data.chat_template FILE)"
    )


def test_data_when_the_chat_template_file_is_missing_then_it_is_named(error):
    assert error(data__chat_template="chat.jinja") == "data.chat_template: 'chat.jinja': No such file or directory"


# Several sources, steps of so many tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ("0,0", "data.weights: all are 0, expected at least one number > 0"),
        ("1,-2", "data.weights: found -2 for '{b}', expected a number >= 0"),
        ("nan,1", "data.weights: found nan for '{a}', expected a number >= 0"),
        ("1,inf", "data.weights: found inf for '{b}', expected a number >= 0"),
        ("1", "data.weights: found 1 numbers, expected one for each of the 2 sources of data.train ({a}, {b})"),
        ("1,2,3", "data.weights: found 3 numbers, expected one for each of the 2 sources of data.train ({a}, {b})"),
    ],
)
def test_weights_when_they_are_no_shares_then_says_which(error, task, tmp_path, weights, found):
    other = tmp_path / "other.jsonl"
    shutil.copy(task.pairs, other)
    said = error(data__train=f"{task.pairs},{other}", data__weights=weights)
    assert said == found.format(a=task.pairs, b=other)


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("{a},{a}", "data.train: '{a}' is named twice; use data.weights to sample it more often"),
        ("{a},", "data.train: found an empty name beside a comma, expected a source"),
        ("{a},gone.jsonl", "gone.jsonl: no such file or folder"),
    ],
)
def test_sources_when_one_is_wrong_then_it_is_named(error, task, named, found):
    assert error(data__train=named.format(a=task.pairs)) == found.format(a=task.pairs)


def test_weights_when_a_source_is_left_without_pairs_then_it_is_named(error, task, tmp_path):
    line = task.pairs.read_text().splitlines(keepends=True)[2]
    (tmp_path / "one.jsonl").write_text(line)  # its prompt is held out
    found = error(data__train=f"{task.pairs},one.jsonl", data__weights="1,1", data__eval_fraction=0.9)
    assert found.startswith("data.weights: all prompts of one.jsonl are held out, so it has no training pairs")


def test_tokens_when_the_budget_is_smaller_than_a_pair_then_row_and_length_are_named(error, task):
    found = error(train__tokens_per_batch=40, data__eval_fraction=0)
    place, _, rest = found.removeprefix("train.tokens_per_batch: found 40, but ").partition(" alone has ")
    assert place.startswith(f"{task.pairs}:")
    assert int(rest.split()[0]) > 40
    assert rest.endswith("tokens in its sequences, expected at least as many (raise it, or lower data.max_length)")


@pytest.mark.parametrize("value", ["0", "-5", "1.5"])
def test_tokens_when_they_are_no_number_of_tokens_then_says_so(error, value):
    assert error(train__tokens_per_batch=value).endswith(
        "expected a number > 0, or none" if value != "1.5" else "expected an integer or none"
    )


def test_tokens_when_the_testbed_streams_then_says_so(server, tmp_path):
    ended = server.train(["--method", "dpo", "--train.tokens_per_batch", "500", "--output", str(tmp_path / "run")])
    assert ended.status == 2
    assert ended.err == (
        "error: train.tokens_per_batch: the lengths of the testbed's stream of pairs are not known; set the size of a "
        "fixed training set (--testbed.pairs 40000), or leave it out\n"
    )


# Models ---------------------------------------------------------------------------------------------------------------


def test_model_when_a_token_has_no_row_then_the_token_and_its_pair_are_named(error, task, variant):
    vocab = len(task.tokenizer)
    path = variant("small", model=tiny_llama(vocab - 5, hidden=16, layers=1))
    found = error(model__path=path)
    assert found.startswith(f"{task.pairs}:")
    assert found.partition(": ")[2].startswith("token ")
    assert found.endswith(
        f" is outside the model's vocabulary: the tokenizer has {vocab} tokens, the model's embedding {vocab - 5} rows "
        "(use the model's own tokenizer)"
    )


def test_model_when_it_has_more_rows_than_tokens_and_no_pad_token_then_trains_and_says_once(
    server, command, task, variant, tmp_path
):
    texts = [json.loads(line)["prompt"] for line in task.pairs.read_text().splitlines()]
    tokenizer = byte_bpe_tokenizer(texts, vocab_size=300, pad=False)
    path = variant("padless", tiny_llama(len(tokenizer) + 20, hidden=16, layers=1), tokenizer)
    ended = server.train(command("dpo", tmp_path / "run", model__path=path, train__max_steps=1, data__eval=task.pairs))
    assert ended.status == 0, ended.err
    assert ended.out.count("the tokenizer has no pad token; EOS '</s>' is used for padding\n") == 1


def test_reference_when_its_vocabulary_is_another_then_both_sizes_are_named(error, task, variant):
    vocab = len(task.tokenizer)
    path = variant("other", model=tiny_llama(vocab + 7, hidden=16, layers=1))
    assert error(reference__path=path) == (
        f"reference.path: '{path}' has a vocabulary of {vocab + 7} tokens, the policy {vocab}; "
        "KL and log-ratios need the same vocabulary (use a reference of the policy's family)"
    )


def test_reference_when_its_tokenizer_has_other_ids_then_a_token_is_named(error, task, variant):
    path = variant("swapped", model=tiny_llama(len(task.tokenizer), hidden=16, layers=1))
    file = path / "tokenizer.json"
    text = json.loads(file.read_text())
    ids = text["model"]["vocab"]
    first, last = sorted(ids, key=ids.get)[-2:]
    ids[first], ids[last] = ids[last], ids[first]
    file.write_text(json.dumps(text))
    assert error(reference__path=path).startswith(f"reference.path: the tokenizer of '{path}' has ")


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_model_when_neither_a_folder_nor_reachable_then_says_both(error, key):
    found = error(**{key: "nobody/nothing"})
    assert found == (
        f"{key}: 'nobody/nothing' is neither a folder nor a model that the hub gave (check the spelling or the network)"
    )


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_model_when_the_folder_is_mistyped_then_the_nearest_one_is_offered(error, key, task):
    assert error(**{key: f"{task.folder}/modell"}) == (
        f"{key}: '{task.folder}/modell' does not exist, expected the folder of a model or a hub id; "
        "did you mean 'model'?"
    )


def test_model_when_it_is_a_file_then_says_so(error, task):
    found = error(model__path=task.pairs)
    assert found == f"model.path: '{task.pairs}' is a file, expected the folder of a model or a hub id"


def test_model_when_the_folder_holds_none_then_says_so(error, tmp_path):
    (tmp_path / "empty").mkdir()
    begins = f"model.path: '{tmp_path}/empty' is a folder without a model that can be loaded: "
    assert error(model__path=tmp_path / "empty").startswith(begins)


def test_model_when_its_weights_are_missing_then_says_so(error, variant):
    path = variant("hollow")
    (path / "model.safetensors").unlink()
    begins = f"model.path: '{path}' is a folder without a model that can be loaded: "
    assert error(model__path=path).startswith(begins)


def test_model_when_its_weights_are_cut_short_then_says_so(error, variant):
    path = variant("cut")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert error(model__path=path).startswith(f"model.path: '{weights}' is damaged or truncated (")


def test_reference_when_it_lacks_a_weight_then_is_refused_before_the_policy_is_loaded(error, variant):
    path, name = variant("lacks"), "model.layers.0.self_attn.q_proj.weight"
    weights = load_file(path / "model.safetensors")
    del weights[name]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    found = error(reference__path=path, fault={"at": "prefopt.training.adapter_loading:load_policy", "do": "SIGKILL"})
    assert found.startswith(f"reference.path: '{path}' has no weights for {name}")


def test_model_when_it_has_no_tokenizer_then_says_so(error, variant):
    path = variant("mute")
    for file in path.glob("tokenizer*"):
        file.unlink()
    begins = f"model.path: '{path}' is a folder without a tokenizer that can be loaded: "
    assert error(model__path=path).startswith(begins)


# Settings that only a run can check -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", ["0", "-0.1", "nan", "inf"])
def test_beta_when_not_positive_and_finite_then_refused(error, beta):
    assert error(method__beta=beta) == f"method.beta: found {float(beta)!r}, expected a finite number > 0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optim.name": "adamv"},
            "optim.name: found 'adamv', expected one of adamw, adamw_8bit, paged_adamw_8bit, adafactor, rmsprop, sgd "
            "or a dotted path; did you mean 'adamw'?",
        ),
        (
            {"optim.name": "torch.optim.Adamx"},
            "optim.name: 'torch.optim.Adamx' cannot be imported: module 'torch.optim' has no attribute 'Adamx'",
        ),
        (
            {"optim.name": "no_such.Thing"},
            "optim.name: 'no_such.Thing' cannot be imported: No module named 'no_such'",
        ),
        (
            {"optim.name": "torch.optim"},
            "optim.name: 'torch.optim' is not an optimizer, expected a subclass of torch.optim.Optimizer",
        ),
        (
            {"optim.args.epss": "1"},
            "optim.args: adamw cannot be created with {'epss': 1}: "
            "AdamW.__init__() got an unexpected keyword argument 'epss'",
        ),
    ],
)
def test_optimizer_when_it_does_not_exist_then_refused_and_mended_in_the_same_folder(
    error, settings, message, server, command, tmp_path
):
    assert error(**settings) == message
    assert server.train(command("dpo", tmp_path / "run", train__max_steps=1)).status == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch.optim.LBFGS", "optim.name: torch.optim.LBFGS cannot be created: "),
        ("torch.optim.SparseAdam", "optim.name: 'torch.optim.SparseAdam' fails in a step() without arguments: "),
    ],
)
def test_optimizer_when_it_cannot_serve_the_loop_then_refused_before_any_model_is_loaded(name, message, error):
    assert error(optim__name=name, model__path="no/such").startswith(message)  # the model is the next complaint


def test_model_when_rows_are_longer_than_its_positions_then_says_what_to_set(error, task, variant):
    short = tiny_llama(len(task.tokenizer), hidden=16, layers=1, max_position_embeddings=12)
    found = error(model__path=variant("short", model=short))
    assert found.startswith(f"data.max_length: found 1024, and {task.pairs} has sequences of up to ")
    assert found.endswith(" tokens, but the model has 12 positions; use --data.max_length 12")


def test_stream_when_max_steps_is_missing_then_says_what_to_name(error):
    found = error(without=("model.path", "data.train", "data.eval_fraction"), train__max_steps="none")
    assert found == (
        "train.max_steps: found none, expected a number of steps, because the testbed's stream of pairs is endless "
        "(or set the size of a fixed training set, --testbed.pairs 40000)"
    )


# Numbers that break ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_weights_when_not_finite_at_the_start_then_the_weight_is_named(error, key, task, variant):
    model = tiny_llama(len(task.tokenizer), hidden=16, layers=1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    path = variant("nan", model=model)
    assert error(**{key: path}) == (
        f"{key}: '{path}' holds weights that are not finite (model.layers.0.mlp.up_proj.weight); "
        "name a model whose weights are"
    )


def test_weights_when_nan_in_the_run_then_stops_names_step_and_rows_and_keeps_the_checkpoint(
    error, server, command, task, tmp_path
):
    found = error(fault={"at": TRAINER + "_step", "count": 6, "do": "NAN"})
    kept = tmp_path / "run" / "checkpoints" / "step_00000003"
    begins = "step 6: the loss or its gradient is not finite (first pairs with such a loss: "
    assert found.startswith(begins)
    rows, ends = found.removeprefix(begins).split(")")
    assert len(rows.split(", ")) == 3
    assert all(row.startswith(f"{task.pairs}:") for row in rows.split(", "))
    assert ends == f"; last good checkpoint: {kept}"
    ended = server.train(command("dpo", tmp_path / "run"))
    assert ended.status == 0
    assert f"resuming from {kept}\n" in ended.out


def test_weights_when_an_update_leaves_nan_then_they_are_never_saved(error, task, tmp_path):
    found = error(fault={"at": TRAINER + "_step", "count": 6, "when": "after", "do": "NAN"})
    kept = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert found.startswith("step 6: its update left weights that are not finite (model.embed_tokens.weight; batch of ")
    assert found.endswith(f" and 4 more); last good checkpoint: {kept}")
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_learning_rate_when_it_blows_the_weights_up_then_stops_at_the_next_step(error):
    found = error(optim__lr=1e38, optim__clip=0)
    assert found.startswith("step 2: the loss or its gradient is not finite (")
    assert found.endswith("); no checkpoint was written yet")


# The output folder ----------------------------------------------------------------------------------------------------


def test_output_when_its_parent_is_a_file_then_the_file_is_named(error, task):
    assert error(output=task.pairs / "run") == (
        f"--output {task.pairs}/run: '{task.pairs}' is a file; expected a folder that can be written"
    )


def test_output_when_it_holds_another_run_then_says_what_differs_and_loses_nothing(
    error, server, command, task, tmp_path
):
    output = tmp_path / "run"
    assert server.train(command("dpo", output, train__max_steps=3)).status == 0
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != ".lock"}
    choose = "choose another --output, or use the settings of that run to resume it"
    assert error(train__max_steps=3, method__beta=0.5) == (
        f"--output {output}: holds a run with other settings (method.beta: 0.1 -> 0.5); {choose}"
    )
    assert error(method="sft", train__max_steps=4, seed=1) == (
        f"--output {output}: holds a run with other settings (method.beta: 0.1 -> None; "
        f"method.label_smoothing: 0.0 -> None; method.name: 'dpo' -> 'sft' and 4 more); {choose}"
    )
    assert {p: p.read_bytes() for p in output.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_output_when_the_data_changed_since_then_refused(error, server, command, task, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    shutil.copy(task.pairs, pairs)
    assert server.train(command("dpo", tmp_path / "run", data__train=pairs, train__max_steps=1)).status == 0
    pairs.write_text("\n".join(pairs.read_text().splitlines()[:-1]))
    found = error(data__train=pairs, train__max_steps=1)
    assert found.startswith(f"--output {tmp_path}/run: the training data is not what this run began with (")
    assert found.endswith("); choose another --output")


@pytest.mark.parametrize("what", ["reference", "held-out data"])
def test_output_when_what_a_run_is_measured_against_changed_since_then_refused(
    what, error, server, command, task, variant, tmp_path
):
    reference, held_out = variant("reference"), tmp_path / "held_out.jsonl"
    lines = task.pairs.read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:10]))
    named = {"reference__path": reference, "data__eval": held_out}
    output = tmp_path / "run"
    assert server.train(command("dpo", output, train__max_steps=1, **named)).status == 0
    if what == "reference":
        tiny_llama(len(task.tokenizer), hidden=16, layers=1, seed=7).save_pretrained(reference)
    else:
        held_out.write_text("".join(lines[:6]))
    found = error(train__max_steps=1, **named)
    assert found.startswith(f"--output {output}: the {what} is not what this run began with (")


def test_output_when_the_order_of_the_pairs_changed_since_then_refused(error, server, command, tmp_path):
    output = tmp_path / "run"
    assert server.train(command("dpo", output, train__max_steps=1)).status == 0
    card = json.loads((output / "run_card.json").read_text())
    card["data"]["order"] = "as another version would have it"
    del card["sha256"]
    (output / "run_card.json").write_text(json.dumps(card))
    found = error(train__max_steps=1)
    assert found.startswith(f"--output {output}: the order of the training pairs is not what this run began with (")


def test_output_when_another_process_writes_there_then_its_owner_is_named(error, tmp_path):
    from prefopt.training.output_folder import OutputLock

    (tmp_path / "run").mkdir()
    lock = OutputLock(tmp_path / "run")
    lock.acquire()
    owner = (tmp_path / "run" / ".lock").read_text()
    try:
        assert error() == (
            f"{tmp_path}/run: another run is writing here ({owner}); wait for it, stop it, or choose another --output"
        )
    finally:
        lock.release()


# A full disk ----------------------------------------------------------------------------------------------------------


def test_disk_when_full_in_a_checkpoint_then_the_one_before_survives_and_a_rerun_ends(error, server, command, tmp_path):
    found = error(fault={"at": "prefopt.storage:seal", "count": 2, "do": "ENOSPC"})
    folder = tmp_path / "run" / "checkpoints"
    assert found == (
        f"{folder}/step_00000006: not written: [Errno 28] No space left on device; "
        f"the last good checkpoint is {folder}/step_00000003 (free space and run again)"
    )
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    ended = server.train(command("dpo", tmp_path / "run"))
    assert ended.status == 0
    assert f"resuming from {folder}/step_00000003\n" in ended.out


def test_disk_when_a_file_may_not_grow_then_the_checkpoint_before_survives_and_a_rerun_ends(
    error, server, command, tmp_path
):
    stopped = server.train(command("dpo", tmp_path / "run"), {"at": TRAINER + "_step", "count": 5, "do": "SIGTERM"})
    assert stopped.status == 75
    found = error(file_size_limit=40_000)
    folder = tmp_path / "run" / "checkpoints"
    begins = f"{folder}/step_00000006: not written: "
    assert found.startswith(begins)
    assert "File too large" in found
    assert found.endswith(f"; the last good checkpoint is {folder}/step_00000004 (free space and run again)")
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000003", "step_00000004"]
    assert server.train(command("dpo", tmp_path / "run")).status == 0


@pytest.mark.parametrize("place", ["prefopt.training.metrics:MetricsFile.write", "prefopt.run.card:write_sealed"])
def test_disk_when_full_outside_a_checkpoint_then_one_line_and_a_rerun_ends(error, place, server, command, tmp_path):
    found = error(fault={"at": place, "do": "ENOSPC"})
    cache = server.folder / "cache"
    assert found == (
        f"--output {tmp_path}/run (or the cache in {cache}): No space left on device; "
        "free space and run the same command again"
    )
    assert server.train(command("dpo", tmp_path / "run")).status == 0
