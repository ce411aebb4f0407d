"""Parameter counts and sizes of a model, from its config alone: memory and time are functions of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prefopt.planner import meta_model
from prefopt.planner.activations import MicroBatch, SavedActivations, count_saved
from prefopt.settings import RunConfig
from prefopt.training import adapter_checks, adapter_loading, layout_choice, model_sources, models


@dataclass(frozen=True)
class ModelCounts:
    """What memory and time depend on.

    Args:
        parameters: of the model without an adapter.
        trained: trained parameters, of the adapter or of the model.
        adapter: parameters that training adds: LoRA's, and copies of modules that are trained in full beside it.
        embedding, head: parameters of the two, which are one tensor where `tied`.
        largest_layer: parameters of the largest transformer layer.
        matrices: parameters of the backbone's matrices without the embedding: multiply-adds per token.
        hidden_size, layers, vocabulary: as in the model's config.
        attention_width: heads times head dimension.
        head_trained: whether the output head is trained.
        saved: activations where weights are held in `model.dtype`.
        saved_16_bit: activations where a backend holds 16-bit weights under mixed precision; else the same.
    """

    parameters: int
    trained: int
    adapter: int
    embedding: int
    head: int
    largest_layer: int
    matrices: int
    hidden_size: int
    layers: int
    attention_width: int
    vocabulary: int
    tied: bool
    head_trained: bool
    saved: SavedActivations
    saved_16_bit: SavedActivations

    @property
    def embedding_and_head(self) -> int:
        return self.head if self.tied else self.embedding + self.head


def read_model(config: RunConfig, batch: MicroBatch) -> ModelCounts:
    """The model that `config` trains, with the activations of this micro-batch.

    Raises: TrainError or ConfigError in one line for a model or an adapter that cannot be trained.
    """
    start = model_sources.find(str(config.model.path), config.model)
    architecture = models.load_config(start.base, start.base_settings(config.model))
    adapter_checks.check(config, start, architecture)
    text: Any = architecture.get_text_config()
    with torch.device("meta"):
        lm = meta_model.build(architecture, config, config.model.dtype)
    shape, layers = layout_choice.shape_of(lm), meta_model.layers_of(lm)
    embedding, head = lm.get_input_embeddings().weight, meta_model.output_head(lm).weight
    parameters, largest_layer = meta_model.numel(lm), max(map(meta_model.numel, layers))
    with torch.device("meta"):
        lm = adapter_loading.attach_like(lm, config, start)
    saved = count_saved(architecture, config, start, batch, len(layers), config.model.dtype)
    dtype_16_bit = {"bf16": "bfloat16", "fp16": "bfloat16"}.get(config.train.mixed_precision, config.model.dtype)
    saved_16_bit = saved
    if dtype_16_bit != config.model.dtype:
        saved_16_bit = count_saved(architecture, config, start, batch, len(layers), dtype_16_bit, autocast=False)
    return ModelCounts(
        parameters=parameters,
        trained=sum(p.numel() for p in lm.parameters() if p.requires_grad),
        adapter=sum(p.numel() for p in lm.parameters()) - parameters,
        embedding=embedding.numel(),
        head=head.numel(),
        largest_layer=largest_layer,
        matrices=shape.weights,
        hidden_size=int(text.hidden_size),
        layers=len(layers),
        attention_width=shape.width,
        vocabulary=int(text.vocab_size),
        tied=head is embedding,
        head_trained=any(p.requires_grad for p in meta_model.output_head(lm).parameters()),
        saved=saved,
        saved_16_bit=saved_16_bit,
    )
