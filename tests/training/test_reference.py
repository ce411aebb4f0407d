"""A reference that is computed once: equal to a live one, shared by a sweep, refused when it is not what it says."""

import copy
import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from prefopt import storage
from prefopt.data.collate import collate
from prefopt.errors import TrainError
from prefopt.settings import EvalConfig, ModelConfig, ReferenceConfig, RunConfig, TrainConfig
from prefopt.storage import Unreadable
from prefopt.training import adapter_loading, adapters, model_sources, reference, reference_cache
from prefopt.training.forward import ReferenceHead
from prefopt.training.metrics import read_lines
from prefopt.training.reference import ReferenceModel, Source, obtain
from tests.dist.ranks import run_ranks
from tests.fork_server import ROOT
from tests.invariant.methods import by_kind, methods
from tests.invariant.oracle import oracle_step
from tests.invariant.steps import BOUNDS, Bench, difference, random_pairs, two_models
from tests.training.test_lora import both, config

METHODS = {name: method for name, method in methods().items() if method.needs.reference != "none"}
SEQUENCE = next(name for name, method in METHODS.items() if method.needs.reference == "sequence")
TOKEN = next(name for name, method in METHODS.items() if method.needs.reference == "token")
EVERY = [
    way
    for way in by_kind(METHODS, ["logps", "hidden"])
    if way.values[1] == "hidden" or METHODS[way.values[0]].needs.reference == "sequence"
]
WAYS = [way.values for way in EVERY if not way.marks]


def settings(method, kind="logps", dtype="float32", **more):
    return RunConfig(
        method=method,
        method_name="under_test",
        model=ModelConfig(dtype=dtype),
        reference=ReferenceConfig(cache=kind, cache_dtype="float32", **more),
        eval=EvalConfig(batch=3),
        train=TrainConfig(max_steps=1),
    )


def keep(runtime, method, lm, rows, folder, kind="logps", dtype="float32", frozen=None, **more):
    """(what is kept of a reference for these rows, its head where that is needed)."""
    oracle = ReferenceModel(lm, frozen, {"sha256": "of the weights"})
    values = obtain(settings(method, kind, dtype, **more), runtime, oracle, [source(rows)], folder, 2)
    return values, ReferenceHead(lm) if kind == "hidden" and frozen is None else None


def source(rows):
    return Source(rows, hashlib.sha256(repr(rows).encode()).hexdigest())


def rows_for(method, pairs=8):
    return random_pairs(method.needs.columns, pairs)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("base")
    two_models(torch.float64)[1].save_pretrained(folder)
    return folder


@pytest.fixture
def kept(runtime, tmp_path):
    """A cache folder of eight pairs, complete, and who asks for it again."""
    method, (_, lm) = METHODS[SEQUENCE], two_models(torch.float32)
    rows = rows_for(method)

    def again():
        return keep(runtime, method, lm, rows, tmp_path)[0]

    again()
    (folder,) = (path.parent for path in tmp_path.glob("*/cache.json"))
    return SimpleNamespace(folder=folder, again=again, rows=rows, method=method)


# Equal to a live one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_step_when_the_reference_is_kept_then_loss_and_gradients_are_the_oracles(name, kind, runtime, tmp_path):
    method, (policy, lm) = METHODS[name], two_models(torch.float32)
    rows = rows_for(method)
    expected = oracle_step(policy, lm, method, rows)
    values, head = keep(runtime, method, lm, rows, tmp_path, kind)
    for layout in ("padded", "packed_prefix_shared" if method.needs.rows == "pairs" else "packed"):
        bench = Bench(runtime, method, (policy, None), layout=layout, values=values, reference_head=head)
        for micro in (8, 3, 1):
            gap, where = difference(expected, bench.step(rows, micro))
            assert gap <= BOUNDS[torch.float32], (layout, micro, where)


def test_step_when_a_run_in_float64_keeps_log_probabilities_then_they_are_float64_too(runtime, tmp_path):
    method, (policy, lm) = METHODS[SEQUENCE], two_models(torch.float64)
    rows = rows_for(method)
    values, _ = keep(runtime, method, lm, rows, tmp_path, dtype="float64")
    found = Bench(runtime, method, (policy, None), values=values).step(rows, 3)
    assert difference(oracle_step(policy, lm, method, rows), found)[0] <= BOUNDS[torch.float64]


@pytest.mark.parametrize("headed", [False, True])
@pytest.mark.parametrize("name", [SEQUENCE, TOKEN])
def test_step_when_the_reference_of_an_adapter_is_kept_then_it_is_that_of_the_live_one(
    name, headed, runtime, base, tmp_path
):
    method, kind = METHODS[name], {"sequence": "logps", "token": "hidden"}[METHODS[name].needs.reference]
    more = {"modules_to_save": ("lm_head",)} if headed else {}
    policy, frozen = both(config(method, base, dtype="float32", r=4, **more))
    rows = rows_for(method)
    expected = Bench(runtime, method, (policy, frozen)).step(rows, 8)
    values, head = keep(runtime, method, policy, rows, tmp_path, kind, frozen=frozen)
    assert head is None
    bench = Bench(runtime, method, (policy, frozen if kind == "hidden" else None), values=values)
    assert difference(expected, bench.step(rows, 3))[0] <= BOUNDS[torch.float32]


def _two_processes(runtime, folder):
    answers = {}
    for name, kind in WAYS:
        method, (policy, lm) = METHODS[name], two_models(torch.float32)
        rows = rows_for(method)
        values, head = keep(runtime, method, lm, rows, folder, kind)
        answers[name, kind] = Bench(runtime, method, (policy, None), values=values, reference_head=head).step(rows, 2)
    return answers


def test_two_processes_share_one_pass_and_step_as_the_oracle(tmp_path, monkeypatch):
    ranks = run_ranks(_two_processes, tmp_path)
    for name, kind in WAYS:
        method, (policy, lm) = METHODS[name], two_models(torch.float32)
        expected = oracle_step(policy, lm, method, rows_for(method))
        for answers in ranks:
            assert difference(expected, answers[name, kind])[0] <= BOUNDS[torch.float32], (name, kind)
    for passes in tmp_path.glob("*/passes.jsonl"):
        assert len(passes.read_text().splitlines()) == 1


# One pass ---------------------------------------------------------------------------------------------------------


def passes(folder):
    return [json.loads(line) for line in (folder / "passes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_sweep_makes_one_pass_and_each_loss_is_that_with_a_live_reference(count, server, command, tmp_path):
    losses = (("dpo", {}), ("dpo", {"method__variant": "ipo_mean"}), ("sppo", {}))
    # SGD: AdamW's first steps make as much of a gradient of 1e-8, which is rounding, as of one of 1
    rates, betas = (1e-1, 1e-2, 3e-2, 2e-1), (0.1, 0.5, 1.0, 2.0, 0.3)
    sweep = [
        (*losses[i % 3], {"optim__lr": rates[i % 4], "method__beta": betas[i % 5], "seed": i % 7}) for i in range(count)
    ]
    cache = tmp_path / "cache"
    for number, (method, variant, changes) in enumerate(sweep):
        lines = {}
        for way in ("kept", "live"):
            more = {"reference__cache": "logps", "reference__cache_dir": cache} if way == "kept" else {}
            short = {"train__max_steps": 3, "eval__every": 3, "data__eval_fraction": 0.2, "optim__name": "sgd"}
            output = tmp_path / f"{number}-{way}"
            ended = server.train(command(method, output, **short, **variant, **changes, **more))
            assert ended.status == 0, ended.err
            lines[way] = read_lines(output / "metrics.jsonl")
            shutil.rmtree(output)
        for mine, other in zip(*lines.values(), strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5, abs=1e-5), (number, mine["step"])
        assert abs(lines["kept"][-1]["loss"] - lines["kept"][0]["loss"]) > 1e-4, "it has trained"
    (folder,) = (path.parent for path in cache.glob("*/cache.json"))
    assert len(passes(folder)) == 1


@pytest.mark.slow
def test_two_runs_that_need_the_same_cache_at_once_compute_it_once(command, task, tmp_path):
    """One of them finds the lock taken by this test, as by a run that is computing, and waits for what comes of it."""
    cache = tmp_path / "cache"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PREFOPT_CACHE": str(tmp_path / "own"), "HF_HUB_OFFLINE": "1"}
    more = {"reference__cache": "logps", "reference__cache_dir": cache, "train__max_steps": 2, "eval__every": 2}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "prefopt", "train", *command("dpo", tmp_path / name, **more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
        )
        for name in ("one", "other")
    ]
    outs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outs
    (folder,) = (path.parent for path in cache.glob("*/cache.json"))
    assert len(passes(folder)) == 1


def test_run_that_finds_another_one_computing_waits_and_says_so(kept, runtime, capsys, monkeypatch):
    aside = kept.folder.with_name("aside")
    kept.folder.rename(aside)
    held = storage.Lock(kept.folder.with_suffix(".lock"))
    assert held.take()
    computed = threading.Timer(1.5, lambda: (aside.rename(kept.folder), held.release()))
    computed.start()
    monkeypatch.setattr(reference._Pass, "_compute", None)  # it must not be needed
    kept.again()
    assert f"reference: waiting for the pass of process {os.getpid()} on" in capsys.readouterr().out


def test_pass_when_killed_and_started_again_does_the_rest(runtime, tmp_path, monkeypatch):
    method, (_, lm) = METHODS[SEQUENCE], two_models(torch.float32)
    rows = rows_for(method)
    monkeypatch.setattr(reference, "_SHARD_PAIRS", 2)
    shard, calls = reference._Pass._shard, []

    def third_fails(self, path, *args):
        calls.append(path)
        if len(calls) == 3:
            path.with_name(f".{path.name}.12.34.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        shard(self, path, *args)

    monkeypatch.setattr(reference._Pass, "_shard", third_fails)
    with pytest.raises(KeyboardInterrupt):
        keep(runtime, method, lm, rows, tmp_path)
    values, _ = keep(runtime, method, lm, rows, tmp_path)
    (folder,) = (path.parent for path in tmp_path.glob("*/cache.json"))
    assert [one["shards"] for one in passes(folder)] == [4, 2]
    assert not list(folder.glob(".*"))
    plain, _ = keep(runtime, method, lm, rows, tmp_path / "plain")
    for pair in rows:
        (key, _), *_ = reference_cache.sequences_of(pair, True)
        assert torch.equal(values._of(key, pair), plain._of(key, pair))


def test_run_when_killed_in_its_pass_and_started_again_ends_as_one_that_was_not(server, command, tmp_path):
    more = {"reference__cache": "logps", "train__max_steps": 4}
    ends = {}
    for name in ("straight", "killed"):
        argv = command("dpo", tmp_path / name, **more, reference__cache_dir=tmp_path / f"cache-{name}")
        if name == "killed":
            for place in ("_Pass._shard", "complete"):
                at = {"at": f"prefopt.training.reference:{place}", "count": 1, "do": "SIGKILL"}
                assert server.train(argv, at).status == -9
        ended = server.train(argv)
        assert ended.status == 0, ended.err
        ends[name] = (tmp_path / name / "model/model.safetensors").read_bytes()
    assert ends["straight"] == ends["killed"]


def test_run_when_resumed_asks_the_reference_and_not_the_policy_that_has_moved(server, command, tmp_path):
    argv = command("dpo", tmp_path / "run", reference__cache="logps", reference__cache_dir=tmp_path / "cache")
    stop = {"at": "prefopt.training.trainer:Trainer._step", "count": 15, "do": "SIGKILL"}
    assert server.train(argv, stop).status == -9
    ended = server.train(argv)
    assert ended.status == 0, ended.err
    assert "log-probabilities of 50 pairs found" in ended.out


# What is refused --------------------------------------------------------------------------------------------------


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    content.pop("sha256")
    storage.write_sealed(path, content)


PARTS = [
    *("format", "kind", "weights.sha256", "dtype", "mixed_precision", "attention"),
    *("head.scale", "head.softcap", "stored", "tokens", "quantize", "compute_dtype"),
]


def test_the_key_has_these_parts_and_no_other(kept):
    assert sorted(json.loads((kept.folder / "cache.json").read_text())["identity"]) == sorted(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_cache_when_a_part_of_its_key_is_another_then_it_is_refused_by_name(part, kept):
    edit(kept.folder / "cache.json", lambda manifest: manifest["identity"].update({part: "tampered"}))
    with pytest.raises(TrainError) as error:
        kept.again()
    assert f"{kept.folder} was computed with another {part}: tampered, expected" in str(error.value)
    assert "delete the folder, and it is recomputed" in str(error.value)


class Capped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output, cap = super().forward(*args, **kwargs), self.config.final_logit_softcapping
        output.logits = cap * torch.tanh(output.logits / cap)
        return output


@pytest.mark.parametrize(
    "change",
    [
        {"model": ModelConfig(dtype="bfloat16")},
        {"model": ModelConfig(attention="eager")},
        {"train": TrainConfig(mixed_precision="bf16")},
        {"weights": {"sha256": "other"}},
        {"rows": 7},
        {"softcap": 30.0},
    ],
    ids=str,
)
def test_cache_when_a_part_of_the_key_changes_then_another_one_is_made(change, runtime, kept):
    import dataclasses

    lm = two_models(torch.float32)[1]
    lm.config.final_logit_softcapping = change.get("softcap")
    if "softcap" in change:
        lm.__class__ = Capped
    config = dataclasses.replace(
        settings(kept.method), **{key: change[key] for key in ("model", "train") if key in change}
    )
    lm = lm.to(getattr(torch, config.model.dtype))
    oracle = ReferenceModel(lm, None, change.get("weights", {"sha256": "of the weights"}))
    rows = kept.rows[: change.get("rows", 8)]
    obtain(config, runtime, oracle, [source(rows)], kept.folder.parent, 2)
    assert len(list(kept.folder.parent.glob("*/cache.json"))) == 2


def shard_of(folder):
    return next(folder.glob("pairs_*.safetensors"))


def test_cache_when_truncated_then_it_is_refused(kept):
    shard = shard_of(kept.folder)
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(TrainError, match=r"holds \d+ bytes of pairs_000000000.safetensors, expected \d+; delete"):
        kept.again()


def test_cache_when_a_file_is_missing_then_it_is_refused(kept):
    shard_of(kept.folder).unlink()
    with pytest.raises(TrainError, match=r"lacks pairs_000000000\.safetensors; delete"):
        kept.again()


@pytest.mark.parametrize("file", ["shard", "index.safetensors"])
def test_cache_when_a_file_is_overwritten_with_noise_then_it_is_refused(file, kept):
    path = shard_of(kept.folder) if file == "shard" else kept.folder / file
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(TrainError, match=r"(cannot be read: .*|does not match its hash); delete the folder"):
        kept.again()


def test_cache_when_the_manifest_is_not_readable_then_it_is_refused(kept):
    for damaged in ("{", (kept.folder / "cache.json").read_text().replace('"pairs": 8', '"pairs": 9')):
        (kept.folder / "cache.json").write_text(damaged)
        with pytest.raises(TrainError, match=r"has a cache\.json that was edited or damaged; delete the folder"):
            kept.again()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["cache.json", "index.safetensors", "pairs_000000000.safetensors"])
def test_cache_when_it_cannot_be_read_just_now_then_stops_and_does_not_say_to_delete_it(name, number, kept, unreadable):
    unreadable(name, number)
    with pytest.raises(Unreadable, match=f"{name}: cannot be read just now"):
        kept.again()


def test_shard_of_an_unfinished_pass_when_a_bit_is_flipped_then_it_is_computed_again(kept, capsys):
    (kept.folder / "cache.json").unlink()
    shard = shard_of(kept.folder)
    whole = shard.read_bytes()
    for place in (3, len(whole) // 2, len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 16
        shard.write_bytes(data)
        kept.again()
        assert f"{shard}: damaged, it is recomputed: " in capsys.readouterr().out
        assert shard.read_bytes() == whole
        (kept.folder / "cache.json").unlink()


def test_cache_when_one_value_is_changed_then_it_is_refused_where_it_is_read(kept):
    shard = shard_of(kept.folder)
    tensors = load_file(shard)
    tensors["values"][3] += 1e-3
    save_file(tensors, shard)
    with pytest.raises(TrainError, match="holds values that do not match their checksum"):
        kept.again().fill(collate(kept.rows, pad_id=2), kept.rows)


def test_cache_when_its_values_are_those_of_another_model_then_the_sample_finds_it(kept):
    shard = shard_of(kept.folder)
    tensors = load_file(shard)
    tensors["values"] += 0.01
    begins = [0, *tensors["end"].tolist()]
    for row, (begin, end) in enumerate(itertools.pairwise(begins)):
        key = tensors["key"][row].numpy().tobytes()
        tensors["check"][row] = zlib.crc32(tensors["values"][begin:end].numpy().tobytes(), zlib.crc32(key))
    save_file(tensors, shard)
    with pytest.raises(TrainError, match=r"differs from the reference in the values of rows:\d \(by 0\.0"):
        kept.again()


def test_pair_when_no_cache_has_it_then_it_is_named(kept, runtime):
    values = kept.again()
    foreign = random_pairs(pairs=1, seed=9)
    bench = Bench(runtime, kept.method, (two_models(torch.float32)[0], None), values=values)
    with pytest.raises(TrainError, match=r"^rows:1: the reference's values are in none of its caches"):
        bench.step(foreign, 1)


def test_pass_when_the_disk_has_no_room_then_it_says_how_much_it_takes(runtime, tmp_path, monkeypatch):
    method, (_, lm) = METHODS[SEQUENCE], two_models(torch.float32)
    monkeypatch.setattr(reference.shutil, "disk_usage", lambda folder: SimpleNamespace(free=12))
    with pytest.raises(TrainError, match=r"^reference\.cache: [\d.]+ k?B are needed in .*, found 12 B free"):
        keep(runtime, method, lm, rows_for(method), tmp_path)


# How far rounded hidden states are off ----------------------------------------------------------------------------


def test_hidden_states_in_bfloat16_move_the_loss_by_less_than_bfloat16_does(runtime, tmp_path):
    method, (policy, lm) = METHODS[TOKEN], two_models(torch.float32)
    rows = rows_for(method)
    live = Bench(runtime, method, (policy, lm)).step(rows, 8)
    gaps = {}
    for dtype in ("float32", "bfloat16"):
        oracle = ReferenceModel(lm, None, {})
        config = settings(method, "hidden")
        config = RunConfig(
            method=method,
            method_name="under_test",
            reference=ReferenceConfig(cache="hidden", cache_dtype=dtype),
            eval=config.eval,
            train=config.train,
        )
        values = obtain(config, runtime, oracle, [source(rows)], tmp_path, 2)
        bench = Bench(runtime, method, (policy, None), values=values, reference_head=ReferenceHead(lm))
        gaps[dtype] = abs(bench.step(rows, 8)[0] - live[0]) / abs(live[0])
    assert gaps["float32"] <= 1e-5
    assert gaps["float32"] < gaps["bfloat16"] <= 2**-8


# A reference that moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_kind(METHODS))
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_reference_when_it_moves_then_it_is_the_mixture_after_each_n_steps(weight, name, runtime):
    method, models = METHODS[name], two_models(torch.float64)
    moves = ReferenceConfig(sync_every=2, sync_weight=weight)
    bench = Bench(runtime, method, models, lr=1e-5, reference=moves)
    policy, other = bench.run.policy.lm, bench.run.policy.reference
    expected = {name: p.detach().clone() for name, p in other.named_parameters()}
    lm = copy.deepcopy(other)
    for step in range(5):
        with torch.no_grad():  # the reference as it must be now
            for key, p in lm.named_parameters():
                p.copy_(expected[key])
        loss, gradients = oracle_step(copy.deepcopy(policy), lm, method, rows_for(method))[:2]
        found = bench.step(rows_for(method), 3, number=step)
        assert difference((loss, gradients), found)[0] <= BOUNDS[torch.float64], step
        if step in (1, 3):
            mine = dict(policy.named_parameters())
            expected = {name: weight * mine[name].detach() + (1 - weight) * p for name, p in expected.items()}
        for name, p in other.named_parameters():
            assert (p - expected[name]).norm() <= 1e-12 * p.norm(), (step, name)
    assert any(not torch.equal(p, q) for p, q in zip(policy.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("headed", [False, True])
def test_reference_when_it_moves_with_an_adapter_then_the_snapshot_does(headed, runtime, base):
    method, more = METHODS[TOKEN], {"modules_to_save": ("lm_head",)} if headed else {}
    plain = config(method, base, r=4, **more)
    moving = RunConfig(
        **{
            **{name: getattr(plain, name) for name in ("method", "method_name", "model", "lora", "seed")},
            "reference": ReferenceConfig(sync_every=1, sync_weight=0.5),
        }
    )
    start = model_sources.find(str(base), moving.model)
    frozen = model_sources.choose_reference(moving, start)
    assert frozen is adapters.Frozen.SNAPSHOT
    policy = adapter_loading.load_policy(moving, start, frozen)
    pairs = adapters.snapshot_pairs(policy)
    assert len(pairs) == 2 * 2 * 7 + headed
    for mine, snapshot in pairs.values():
        assert torch.equal(mine, snapshot)
    bench = Bench(runtime, method, (policy, frozen), lr=0.1, reference=moving.reference)
    pairs = adapters.snapshot_pairs(bench.run.policy.lm)
    before = {name: snapshot.detach().clone() for name, (_, snapshot) in pairs.items()}
    assert bench.step(rows_for(method), 8)[0] > 0
    moved = 0
    for name, (mine, snapshot) in pairs.items():
        assert torch.allclose(snapshot, 0.5 * (mine + before[name]), rtol=0, atol=1e-14)
        moved += not torch.equal(snapshot, before[name])
    assert moved >= len(pairs) // 2


def test_reference_when_it_moves_and_is_another_architecture_then_one_line(server, command, task, tmp_path):
    from tests.helpers import tiny_llama

    tiny_llama(len(task.tokenizer), hidden=32, layers=1).save_pretrained(tmp_path / "wide")
    argv = command("dpo", tmp_path / "run", reference__path=tmp_path / "wide", reference__sync_every=2)
    ended = server.train(argv)
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("error: reference.sync_every: the reference is another architecture")
