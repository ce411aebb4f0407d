"""The card of an exported model: the hub can read it, its code runs, and what it says is so."""

import dataclasses
import re
import typing
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from prefopt import registry
from prefopt.settings import parse
from prefopt.training import model_card
from prefopt.training.metrics import read_lines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*torch_dtype.*")
LINES = [
    {"step": 0, "split": "eval", "pairs": 7, "loss": 0.6931, "seconds": 1.0},
    {"step": 1, "split": "train", "loss": 0.7, "pairs": 5, "epoch": 0.5},
    {"step": 2, "split": "train", "loss": 0.6, "pairs": 4, "epoch": 1.0},
    {"step": 2, "split": "eval", "pairs": 7, "loss": 0.512345, "kl/chosen": 1.25, "seconds": 1.0},
]


def page_of(method="dpo", adapter=False, chat=None, model="some/model", data="some/pairs", more=(), **known):
    config = parse(["--method", method, "--model.path", model, "--data.train", data, *more])
    tokenizer = SimpleNamespace(chat_template=chat)
    return model_card.page(model_card.contents(config, tokenizer, LINES, "f1n9e2", adapter=adapter, **known))


def codes(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


@pytest.mark.parametrize("name", registry.names())
def test_card_of_each_method_is_one_that_the_hub_reads(name):
    found = ModelCard(page_of(name))
    data = found.data.to_dict()
    judge = registry.get(name)().needs.output == "scores"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == ("text-classification" if judge else "text-generation")
    assert data["base_model"] == "some/model"
    assert data["datasets"] == ["some/pairs"]
    assert {"prefopt", name.replace("_", "-")} <= set(data["tags"])
    for heading in ("# ", "## Objective", "## Data", "## Results", "## How to load it", "## Versions"):
        assert re.search(rf"^{heading}", found.text, re.MULTILINE), heading
    for code in codes(found.content):
        compile(code, "card", "exec")


@pytest.mark.parametrize("name", registry.names())
def test_each_method_states_its_loss(name):
    method = registry.get(name)()
    assert re.search(r"[-=^]", method.equation()), f"{name}: no equation in the docstring of its function"
    assert "Args" not in method.equation()
    assert f"```\n{method.equation()}\n```" in page_of(name)
    hyper = [f for f in dataclasses.fields(method) if f.init]
    for one in hyper:
        assert f"- `{one.name}`: " in page_of(name)


def test_objective_names_the_paper_and_what_is_in_force():
    page = page_of("tdpo")
    assert "-log s(beta [(chosen_logratios - rejected_logratios) - alpha (rejected_kl - sg(chosen_kl))])" in page
    assert "arXiv 2404.11999" in page
    assert "Here: tdpo2, alpha 0.5, beta 0.1." in page


def test_results_are_those_of_the_held_out_pairs_at_the_start_and_the_end():
    page = page_of()
    assert "| Held-out metric | Start | This model (step 2) |" in page
    assert "| `loss` | 0.6931 | 0.5123 |" in page
    assert "| `kl/chosen` | - | 1.25 |" in page
    assert "seconds" not in page
    assert "fingerprint `f1n9e2`" in page
    assert "- 2 steps, 9 pairs in them (1 epochs)." in page
    assert "- Held-out pairs: 7." in page


@pytest.mark.parametrize(
    ("method", "more", "start"),
    [("dpo", [], "-"), ("dpo", ["--reference.path", "other"], "0.5"), ("reward_model", [], "0.5")],
)
def test_accuracy_before_training_is_a_figure_only_where_there_is_one(method, more, start, monkeypatch):
    figures = {"rewards/accuracies": 0.5, "logps/chosen": -12345.6}
    monkeypatch.setattr("tests.training.test_model_card.LINES", [line | figures for line in LINES])
    page = page_of(method, more=more)
    assert f"| `rewards/accuracies` | {start} | 0.5 |" in page
    assert "| `logps/chosen` | -12,346 | -12,346 |" in page


def test_paths_of_this_machine_are_not_on_the_card(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "pairs.jsonl").write_text("")
    page = page_of(model=str(tmp_path / "mine"), data=str(tmp_path / "pairs.jsonl"))
    assert str(tmp_path) not in page
    assert "Trained from `mine` on preferences" in page
    assert "Training pairs: `pairs.jsonl`" in page
    assert {"base_model", "datasets"}.isdisjoint(ModelCard(page).data.to_dict())


def test_adapter_says_that_it_is_one():
    page = page_of(adapter=True)
    assert ModelCard(page).data.to_dict()["library_name"] == "peft"
    assert "lora" in ModelCard(page).data.to_dict()["tags"]
    assert "An adapter (LoRA) of [some/model]" in page
    assert "AutoPeftModelForCausalLM" in page
    assert "An adapter was trained and merged into the weights." in page_of(merged=True)


def test_function_without_a_docstring_gives_no_equation(tmp_path, monkeypatch):
    (tmp_path / "bare_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from prefopt.method import Method\n"
        "def bare_method(x):\n    return x\n"
        "@dataclass(frozen=True)\nclass Bare(Method):\n    '''Nothing.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    method = registry.get("bare_method.Bare")()
    assert (method.equation(), method.paper()) == ("", "")


# The cards of real runs -----------------------------------------------------------------------------------------------

CHOICES = {name: registry.get(name)().needs for name in registry.names()}
CASES = {
    "model": ("dpo", {}),
    "adapter": ("dpo", {"lora__r": 2}),
    "merged": ("dpo", {"lora__r": 2, "lora__merge": "true"}),
    **{name: (name, {}) for name, needs in CHOICES.items() if needs.output == "scores"},
    "adapter of a judge": (next(n for n in CHOICES if CHOICES[n].output == "scores"), {"lora__r": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_code_on_the_card_opens_the_model(case, server, command, tmp_path, monkeypatch, capsys):
    method, settings = CASES[case]
    ended = server.train(command(method, tmp_path / "run", train__max_steps=2, eval__every=2, **settings))
    assert ended.status == 0, ended.err
    for part in ("model", "adapter"):
        folder = tmp_path / "run" / part
        if not folder.exists():
            assert part == "adapter"
            assert "lora__merge" not in settings
            continue
        found = ModelCard.load(folder / "README.md")
        last = read_lines(tmp_path / "run/metrics.jsonl")[-1]
        assert f"| {last['loss']:.4g} |" in found.text
        monkeypatch.chdir(folder)
        (code,) = codes(found.content)
        exec(code, {})
        assert capsys.readouterr().out.strip() or "CausalLM" in code  # an answer may be empty, a score is a number


def test_code_on_the_card_goes_through_the_chat_template(tmp_path, monkeypatch, capsys):
    from tests.helpers import CHATML, byte_bpe_tokenizer, tiny_llama

    tokenizer = byte_bpe_tokenizer(["How are you?"], chat_template=CHATML)
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    (code,) = codes(page_of(chat=CHATML))
    scope: dict[str, typing.Any] = {}
    exec(code, scope)
    read = tokenizer.decode(scope["inputs"]["input_ids"][0])
    assert read == "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
