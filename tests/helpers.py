"""Small tokenizers and models, made in memory: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 400,
    bos: bool = True,
    pad: bool = True,
    chat_template: str | None = None,
    special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>"),
) -> Any:
    """A byte-level BPE tokenizer trained on `texts`; with `bos` it puts `<s>` before every text by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", *(["<pad>"] if pad else []), *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        **({"pad_token": "<pad>"} if pad else {}),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    return wrapped


_TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_OPENED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_THOUGHTLESS = (
    "{%- for m in messages %}{%- set content = m.content %}\n{%- if '</think>' in content %}\n"
    "{%- set content = content.split('</think>')[-1].lstrip() %}{%- endif %}\n"
    "{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
)
# Of each family: its special tokens, BOS, EOS and the pad token, whether its post-processor writes BOS, the template.
FAMILIES: dict[str, tuple[tuple[str, ...], str | None, str, str | None, bool, str]] = {
    "llama3": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|begin_of_text|>", "<|eot_id|>", None, True),
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
        "m.content | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    ),
    "gemma": (
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        *("<bos>", "<eos>", "<pad>", True),
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + "
        "'\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "qwen": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(None, "<|im_end|>", "<|endoftext|>", False),
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + _TURNS + _OPENED,
    ),
    "smollm2": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|im_start|>", "<|im_end|>", "<|im_end|>", False),
        _TURNS + _OPENED,
    ),
    "phi3": (
        ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        *("<s>", "<|endoftext|>", "<|endoftext|>", False),
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "phi4": (
        ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        *("<s>", "<|endoftext|>", "<|endoftext|>", False),
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "mistral": (
        ("<s>", "</s>", "[INST]", "[/INST]"),
        *("<s>", "</s>", None, True),
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}",
    ),
    "llama2": (  # BOS before each exchange
        ("<s>", "</s>"),
        *("<s>", "</s>", None, True),
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    ),
    "harmony": (  # the last turn ends otherwise than those before it
        ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"),
        *("<|startoftext|>", "<|return|>", "<|endoftext|>", False),
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ),
    "cohere": (  # two tokens end a turn, and the second one ends generation
        ("<pad>", "<bos>", "<|end_turn|>", "<|turn|>", "<|begin_answer|>", "<|end_answer|>"),
        *("<bos>", "<|end_turn|>", "<pad>", True),
        "{{ bos_token }}{% for m in messages %}{{ '<|turn|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{{ '<|begin_answer|>' + m.content + '<|end_answer|>' }}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|end_turn|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}",
    ),
    "thinking": (  # a template that leaves thoughts out
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(None, "<|im_end|>", "<|endoftext|>", False),
        _THOUGHTLESS + _OPENED,
    ),
}


def family_tokenizer(name: str) -> Any:
    """A byte-level BPE tokenizer whose special tokens and chat template are in the style of a known family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, bos, eos, pad, adds_bos, template = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system\n\nhello", "Name a fruit\n\n"] * 3, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in special if token not in (bos, eos, pad)],
    )
    made.chat_template = template
    return made


def tiny_llama(vocab_size: int, hidden: int = 32, layers: int = 2, seed: int = 0, **kw: Any) -> Any:
    """A Llama with random weights that depend on `seed` alone; torch's own random state is left as it was."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **kw})).eval()
