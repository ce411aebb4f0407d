"""The losses, and what a configuration error or --help touches, need little: torch alone, or not even torch."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""
EVERYTHING = {
    *("transformers", "accelerate", "datasets", "peft", "safetensors", "tyro", "yaml", "numpy", "matplotlib", "tqdm"),
    *("deepspeed", "wandb", "trl", "scipy", "pandas", "pyarrow", "huggingface_hub", "tokenizers"),
}


def run(code, blocked):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCK.format(blocked=blocked) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_losses_need_torch_alone():
    code = """
import torch
from prefopt.losses import dpo, sft, sppo, tdpo
a, b = torch.tensor([1.0]), torch.tensor([0.5])
print(dpo(a, b, beta=0.1, variant="hinge").item())
print(tdpo(a, a, b, b, beta=0.1, alpha=0.5, detach_chosen_kl=True).item())
print(sppo(a, b, b, b, beta=0.1).item(), sft(a).item())
"""
    done = run(code, EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2:] == ["0.625", "-1.0"]


def test_methods_are_listed_checked_and_described_without_torch():
    code = """
from prefopt import registry
for name in registry.names():
    method = registry.get(name)()
    print(name, method.describe(), method.needs, method.loss_at_reference())
"""
    done = run(code, EVERYTHING | {"torch"})
    assert done.returncode == 0, done.stderr


def test_the_block_blocks():
    done = run("import transformers", EVERYTHING)
    assert "blocked: transformers" in done.stderr
