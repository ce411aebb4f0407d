"""The pass that keeps a reference's values, under ZeRO-3: no process ever holds the reference whole."""

import pytest
import torch

from prefopt.settings import parse
from prefopt.training import adapters, models
from prefopt.training import adapter_loading
from prefopt.training import model_sources
from prefopt.training import sharding
from prefopt.training.reference import ReferenceModel, Source, obtain
from prefopt.types import EncodedPair
from tests.dist.ranks import run_ranks
from tests.helpers import tiny_llama


def pairs():
    """Five shards of four, so that in the last turn one process has none; lengths differ."""
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        count = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 300, (count,), generator=generator).tolist()

    found = []
    for _ in range(18):
        prompt, chosen, rejected = ids(1, 9), ids(1, 12), ids(1, 5)
        found.append(EncodedPair(prompt, chosen, rejected, [True] * len(chosen), [True] * len(rejected)))
    return found


def most_at_once(runtime, path, cache, kind, shard):
    """(the cached values, the most entries gathered at once, of how many)."""
    from prefopt.training import reference, reference_cache

    reference._SHARD_PAIRS = shard
    settings = ["--model.path", str(path), "--data.train", "x", "--eval.batch", "2", "--reference.cache", kind]
    more = ["--reference.cache_dtype", "float32"] if kind == "hidden" else []
    config = parse(["--method", "tdpo" if kind == "hidden" else "dpo", *settings, *more])
    with runtime.sharded_loading():
        lm = adapter_loading.load_frozen(model_sources.ModelSource(str(path), str(path)), config.model, "model.path")
    most = 0

    def count(*_):
        nonlocal most
        whole = (p for p in lm.parameters() if not hasattr(p, "ds_id") or p.ds_status.name == "AVAILABLE")
        most = max(most, sum(sharding.numel(p) for p in whole))

    with sharding.gathered_by_layer(lm):
        for module in lm.modules():
            module.register_forward_pre_hook(count)  # after those that gather
        for _ in range(2):  # computed, then found and compared with a recomputed sample
            model = ReferenceModel(lm, None, {"sha256": "x"})
            values = obtain(config, runtime, model, [Source(pairs(), "of-a-test")], cache, 0)
    found = [values._of(key, pair).clone() for pair in pairs() for key, _ in reference_cache.sequences_of(pair, True)]
    return found, most, sum(sharding.numel(p) for p in lm.parameters())


@pytest.mark.parametrize("kind", ["logps", "hidden"])
def test_pass_under_zero3_gives_the_same_values_and_holds_one_layer_at_a_time(kind, tmp_path):
    torch.manual_seed(0)
    tiny_llama(300, hidden=32, layers=6).save_pretrained(tmp_path / "model")
    results = {
        backend: run_ranks(most_at_once, tmp_path / "model", tmp_path / backend, kind, 4, backend=backend)
        for backend in ("ddp", "zero3")
    }
    for rank in range(2):
        plain, whole, entries = results["ddp"][rank]
        assert whole == entries
        found, most, _ = results["zero3"][rank]
        assert most < entries / 2
        for mine, other in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
