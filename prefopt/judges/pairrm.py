"""PairRM: a DeBERTa encoder that compares two candidates; its checkpoint `llm-blender/PairRM-hf` and relatives of it.

Jiang et al., LLM-Blender, arXiv 2306.02561. The input is `<|source|>` prompt, `<|candidate1|>` response and
`<|candidate2|>` response, each between CLS and SEP. A two-layer head reads the states of source and candidate at their
marks and scores either candidate; the logit is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, DebertaV2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from prefopt.data.comparison import plain_text
from prefopt.errors import DataError
from prefopt.judges.classifier import Comparison

MARKS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
MOST, MOST_SOURCE = 2048, 1224  # tokens; the candidates have 412 each, and what the source leaves
LEAST = 20  # by which each of the three has room for CLS, its mark, a token and SEP
_IDS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")


def is_pairrm(config: Any) -> bool:
    """Whether a model's config is that of PairRM."""
    return config.model_type == "deberta-v2" and all(hasattr(config, name) for name in _IDS)


class PairRM(DebertaV2PreTrainedModel):
    """The model, with the names that its weights have in the published checkpoint."""

    config_class = DebertaV2Config
    base_model_prefix = "pretrained_model"
    most_tokens = MOST  # although config and tokenizer name DeBERTa's 512, and its positions are relative

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        rate, size = float(getattr(config, "drop_out", 0.0)), config.hidden_size
        self.head_layer = nn.Sequential(
            nn.Dropout(rate),
            nn.Linear(2 * size, size),
            nn.Tanh(),
            nn.Dropout(rate),
            nn.Linear(size, int(getattr(config, "n_tasks", 1))),
        )
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Logits that the first candidate is better, `(rows, 1)`, from ids `(rows, T)` with each mark once in a row."""
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        source, first, second = (states[input_ids == getattr(self.config, name)] for name in _IDS)  # (rows, H) each
        scores = [self.head_layer(torch.cat((source, candidate), -1)) for candidate in (first, second)]  # (rows, tasks)
        return SequenceClassifierOutput(logits=(scores[0] - scores[1]).mean(-1, keepdim=True))


def encode(tokenizer: Any, config: Any, max_length: int) -> Any:
    """How PairRM reads comparisons, see `pairwise.Encode`. The prompt and the candidates lose their tails.

    Raises: DataError when the tokenizer does not know the marks, or `max_length` leaves no room for three texts.
    """
    known = tokenizer.convert_tokens_to_ids(list(MARKS))
    wanted = [getattr(config, name) for name in _IDS]
    if known != wanted:
        raise DataError(f"judge.path: the tokenizer gives {', '.join(MARKS)} the ids {known}, the model wants {wanted}")
    if max_length < LEAST:
        raise DataError(f"judge.max_length: found {max_length}, expected at least {LEAST}: prompt and both responses")
    most_source = MOST_SOURCE * max_length // MOST

    def part(mark: str, text: str, limit: int) -> tuple[list[int], bool]:
        for other in MARKS:  # each stands once in a row
            text = text.replace(other, other[:1] + " " + other[1:])
        ids = tokenizer(mark + text, verbose=False)["input_ids"]
        return (ids, False) if len(ids) <= limit else ([*ids[: limit - 1], ids[-1]], True)

    def read(asked: Sequence[Comparison]) -> list[tuple[tuple[list[int], list[int]] | None, bool]]:
        out: list[tuple[tuple[list[int], list[int]] | None, bool]] = []
        for prompt, one, other in asked:
            if not (one.strip() and other.strip()):
                out.append((None, False))
                continue
            source, cut = part(MARKS[0], plain_text(prompt), most_source)
            limit = (max_length - len(source)) // 2
            sides = [[part(mark, text, limit) for mark in MARKS[1:]] for text in (one, other)]
            (first, cut_one), (second, cut_other) = sides[0][0], sides[1][1]
            swapped = [*sides[1][0][0], *sides[0][1][0]]
            out.append((([*source, *first, *second], [*source, *swapped]), cut or cut_one or cut_other))
        return out

    return read
