"""Files that several processes write side by side: who holds and writes what, and that a failure of one is of all."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from prefopt.settings import parse
from prefopt.training import checkpoint, models, sharded_io
from prefopt.training.backends import Backend
from prefopt.training.forward import PolicyWithReference

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"num_hidden_layers": 2, "vocab_size": 64}


def test_cut_keeps_the_order_and_the_limit():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 5, "f": 1}
    assert sharded_io.cut(sizes, 6) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert sharded_io.cut(sizes, 100) == [[*sizes]]
    assert sharded_io.cut({}, 5) == []


class Several:
    """Processes that are threads of this one, and meet where processes would."""

    def __init__(self, rank, world, shared):
        self.rank, self.world, self._shared = rank, world, shared

    def gather_objects(self, mine):
        barrier, box = self._shared
        box[self.rank] = mine
        barrier.wait(30)
        found = [item for rank in range(self.world) for item in box[rank]]
        barrier.wait(30)
        return found


def on_each(world, work):
    """What `work(processes)` returned or raised, by rank."""
    shared, found = (threading.Barrier(world), {}), {}

    def one(rank):
        try:
            found[rank] = work(Several(rank, world, shared))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(world)]


def test_write_when_there_are_several_processes_then_each_writes_its_own_and_all_gather_all(tmp_path):
    runs = [["a", "b"], ["c"], ["d"], ["e"], ["f", "g"]]
    asked = {rank: [] for rank in range(3)}

    def work(processes):
        def gather(name):
            asked[processes.rank].append(name)
            return {"state": torch.full((2,), float(ord(name))), "step": 3}

        def save(number, kept):
            path = tmp_path / f"{number}"
            path.write_text(json.dumps({name: value["state"].tolist() for name, value in kept.items()}))
            return path

        return [path.name for path in sharded_io.write(processes, runs, gather, save)]

    assert on_each(3, work) == [["0", "3"], ["1", "4"], ["2"]]
    assert [*asked.values()] == [[*"abcdefg"]] * 3  # each takes part in all that is gathered
    for number, names in enumerate(runs):
        assert json.loads((tmp_path / f"{number}").read_text()) == {name: [ord(name)] * 2 for name in names}


def test_save_when_one_process_cannot_write_then_all_say_so_and_the_checkpoint_before_stays(tmp_path):
    root = tmp_path / "checkpoints"

    def at(step, broken):
        def work(processes):
            def save(number, kept):
                if broken and processes.rank == 1:
                    raise OSError(28, "No space left on device")
                path = tmp_path / root / f".writing-step_{step:08d}" / f"part-{number}"
                path.write_text(str(kept))
                return path

            def write(folder):
                return sharded_io.write(processes, [["a"], ["b"], ["c"]], str.upper, save)

            return checkpoint.save(root, step, write, {"step": step}, 2, processes)

        return on_each(2, work)

    first = root / "step_00000001"
    assert at(1, broken=False) == [first, first]
    assert json.loads((first / "manifest.json").read_text()).keys() == {"part-0", "part-1", "part-2", "state.json"}
    said = [str(error) for error in at(2, broken=True)]
    assert said[0] == (
        f"{root}/step_00000002: not written: rank 1: [Errno 28] No space left on device; "
        f"the last good checkpoint is {first} (free space and run again)"
    )
    assert "No space left on device" in said[1]
    assert [path.name for path in root.iterdir()] == ["step_00000001"]
    assert on_each(2, lambda ranks: checkpoint.latest(root, ranks=ranks)) == [first, first]
    (first / "part-1").write_text("?")
    assert on_each(2, lambda ranks: checkpoint.latest(root, ranks=ranks)) == [None, None]


def backend_of(lm, runtime, tmp_path, *flags):
    argv = ["--method", "sft", "--model.path", str(tmp_path), "--data.train", "pairs", *flags]
    backend = Backend(runtime, parse(argv))
    backend.policy = PolicyWithReference(lm, None, backend.config.kernel)
    return backend


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_model_in_several_files_is_what_transformers_would_have_saved(kind, tied, runtime, tmp_path):
    if kind == "llama":
        lm = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied))
    else:  # its experts are one tensor here, and several in the files that are published
        lm = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, tie_word_embeddings=tied))
    lm.save_pretrained(tmp_path / "expected")
    backend = backend_of(lm, runtime, tmp_path)
    found = {"original": {"original": True}, "native": {}, "one": {"original": True}}
    for name, how in found.items():
        (tmp_path / name).mkdir()
        sharded_io.save_model(backend, tmp_path / name, 100 if name == "one" else 0.01, **how)
    assert (tmp_path / "one/model.safetensors").is_file()
    files = [set(load_file(file)) for file in (tmp_path / "original").glob("model-0*.safetensors")]
    assert len(files) > 3
    for layer in ("model.layers.0.", "model.layers.1."):  # what may be one weight in published files is in one file
        assert sum(any(name.startswith(layer) for name in names) for names in files) == 1
    assert len(list((tmp_path / "native").glob("model-0*.safetensors"))) > len(files)
    expected = load_file(tmp_path / "expected/model.safetensors")
    for name in ("original", "one"):
        files = list((tmp_path / name).glob("*.safetensors"))
        written = {weight: value for file in files for weight, value in load_file(file).items()}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[weight], expected[weight]) for weight in expected)
    for name in found:
        again, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        weights = dict(lm.named_parameters())
        assert dict(again.named_parameters()).keys() == weights.keys()
        assert all(torch.equal(value, weights[weight]) for weight, value in again.named_parameters())


def test_export_in_16_bits_is_the_rounded_model_and_its_config_says_so(runtime, tmp_path):
    lm = LlamaForCausalLM(LlamaConfig(**SMALL))
    sharded_io.save_model(backend_of(lm, runtime, tmp_path), tmp_path, 0.01, "bfloat16", original=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, value in again.named_parameters():
        assert torch.equal(value, lm.get_parameter(name).bfloat16())
    assert models.load_config(str(tmp_path), parse(["--method", "sft"]).model).dtype == torch.bfloat16


def test_export_dtype_with_rounds_is_refused():
    with pytest.raises(Exception, match=r"^model.export_dtype: found 'bfloat16' with rounds, each of which starts"):
        parse(["--method", "dpo", "--rounds.count", "2", "--model.export_dtype", "bfloat16"])
