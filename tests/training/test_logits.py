"""What happens to logits behind the head: the table against the code of every causal model of transformers."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prefopt.errors import TrainError
from prefopt.training.logits import FAMILY_EXCEPTIONS, LOGIT_SETTINGS, effect, head_scaling

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
# Classes whose logits do not come from one linear head over the backbone's states; others than these are not to be had.
OTHER_HEADS = {
    "ModernBertDecoderForCausalLM": "a layer between backbone and head",
    "ElectraForCausalLM": "a layer between backbone and head",
    "Gemma4AssistantForCausalLM": "a head over clusters of tokens",
    "Gemma4UnifiedAssistantForCausalLM": "a head over clusters of tokens",
    "MusicgenForCausalLM": "several heads",
    "MusicgenMelodyForCausalLM": "several heads",
    "ProphetNetForCausalLM": "several streams",
}
STATES = ("logits", "lm_logits", "prediction_scores", "hidden_states")
OPERATORS = {ast.Mult: "multiply", ast.Div: "divide"}


def classes():
    """(class, its model type, its code) of every causal model, without importing any."""
    root = Path(transformers.__file__).parent / "models"
    code = {}
    for file in root.glob("*/modeling_*.py"):
        for text in re.split(r"(?m)^(?=class |@)", file.read_text(encoding="utf-8")):
            if found := re.match(r"class (\w+)", text):
                code[found[1]] = text
    for kind, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            yield name, kind, code[name]


def means(tree):
    """What a name in a class stands for: the names in what is assigned to it."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            name = getattr(target, "id", getattr(target, "attr", None))
            if name not in STATES:
                found.setdefault(name, set()).update(names_of(node.value))
    return found


def names_of(node):
    return {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node)} - {None}


def operations(tree):
    """(what a setting does to logits or to the states before the head, the settings that it may be) of a class."""
    known = means(tree)
    forward = next((node for node in tree.body if getattr(node, "name", "") == "forward"), None)
    for node in ast.walk(forward) if forward is not None else ():
        if not isinstance(node, (ast.Assign, ast.AugAssign)):
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        name = names_of(target) if isinstance(target, ast.Subscript) else {getattr(target, "id", None)}
        if not name & {*STATES}:
            continue
        capped = [
            part for part in ast.walk(node.value) if isinstance(part, ast.Call) and "soft_cap" in names_of(part.func)
        ]
        if capped:
            yield from (("softcap", settings(part, known)) for part in capped)
            continue
        parts = [node, *ast.walk(node.value)] if isinstance(node, ast.AugAssign) else [*ast.walk(node.value)]
        for part in parts:
            if isinstance(part, ast.BinOp):
                yield OPERATORS.get(type(part.op), "other"), settings(part.right, known)
            elif isinstance(part, ast.AugAssign):
                yield OPERATORS.get(type(part.op), "other"), settings(part.value, known)
            elif isinstance(part, ast.Call) and names_of(part.func) & {"tanh", "clamp", "where"}:
                yield "softcap", None
            elif isinstance(part, ast.Call) and any(getattr(a, "id", "") in STATES[:3] for a in part.args):
                yield "softcap", settings(part.func, known)  # a module of its own
            elif isinstance(part, ast.Subscript) and getattr(part.value, "id", "") in STATES[:3]:
                yield "truncate", settings(part.slice, known)


def settings(node, known):
    names = names_of(node)
    return names.union(*(known.get(name, ()) for name in names)) & {*LOGIT_SETTINGS}


def test_table_when_transformers_has_a_causal_model_then_it_knows_all_that_happens_to_its_logits():
    unknown, walked = [], set()
    for name, kind, code in classes():
        if name in OTHER_HEADS:
            continue
        found = [*operations(ast.parse(code).body[0])]
        of_caps = {s for what, some in found for s in some or () if effect(kind, s) == "softcap"}
        for what, some in found:
            if some is None:  # the curve of a cap, whose setting stands beside it
                some = of_caps
            known = {s for s in some if effect(kind, s) == what or effect(kind, s) == "softcap"}
            walked |= known
            if not known:
                unknown.append(f"{name}: {what} {sorted(some)}")
    assert not unknown, "what a model does to its logits is not in prefopt.training.logits"
    assert walked == {*LOGIT_SETTINGS}, "a setting in the table that no model reads"


def test_scan_when_a_model_has_a_setting_that_is_not_in_the_table_then_it_is_found():
    for line in ("logits = logits * self.config.new_scale", "logits /= self.new", "logits = torch.tanh(logits / 3)"):
        tree = ast.parse(f"class A:\n def forward(self, hidden_states):\n  {line}\n").body[0]
        assert any(not some for _, some in operations(tree)), line


SCALED = {
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "cohere": {"logit_scale": 0.25},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "minicpm3": {"dim_model_base": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 8}
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "num_key_value_heads": 4},
    "recurrent_gemma": {"logits_soft_cap": 2.0, "lru_width": 32, "head_dim": 8, "num_hidden_layers": 3},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
    "llama": {"logit_scale": 3.0, "final_logit_softcapping": 2.0},  # which its code does not read
}


@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_scaling_when_a_family_scales_or_caps_its_logits_then_head_and_scaling_give_the_models_own(kind):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | SCALED[kind]))).eval()
    head = lm.get_output_embeddings()
    head.weight *= 40
    ids = torch.arange(1, 9)[None]
    own = lm(ids, use_cache=False).logits
    scale, softcap = head_scaling(lm)
    z = scale * head(lm.base_model(ids, use_cache=False).last_hidden_state)
    mine = z if softcap is None else softcap * (z / softcap).tanh()
    assert (own - mine).abs().max() < 1e-4
    assert ((scale, softcap) == (1.0, None)) == (kind == "llama")


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("gemma2", "final_logit_softcapping", 0.0),
        ("gemma2", "final_logit_softcapping", -1.0),
        ("cohere", "logit_scale", float("nan")),
        ("granite", "logits_scaling", 0.0),
    ],
)
def test_scaling_when_a_value_is_no_scale_then_it_is_refused_by_name(kind, field, value):
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    setattr(lm.config, field, value)
    with pytest.raises(TrainError, match=f"{field} .* in its config, expected a number"):
        head_scaling(lm)


def test_scaling_when_logits_are_cut_then_it_is_refused_by_name():
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("inkling_text", **SIZES, unpadded_vocab_size=30))
    with pytest.raises(TrainError, match=r"truncates its logits to unpadded_vocab_size \(30\) of 40 entries"):
        head_scaling(lm)


def test_exceptions_when_a_family_is_named_then_it_exists():
    assert {kind for kind, _ in FAMILY_EXCEPTIONS} <= {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
