"""Activations that wait for the backward pass in the host's memory instead of the device's."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALL = 4096  # bytes; a copy of less costs more than it frees


@dataclass(frozen=True, eq=False)
class _Copy:
    """What autograd holds in place of a tensor; it lives as long as an operation waits for it."""

    storage: StorageWeakRef  # of the tensor
    packed: Any


class Offloading(saved_tensors_hooks):
    """While it lasts, what autograd saves is copied to the host, once, and brought back when it is needed.

    Left where they are: weights and buffers, what autocast made of weights, and what is small. A tensor that several
    operations save is one copy for as long as one of them waits for it.

    Args:
        model: whose weights are left alone.
        pin_memory: whether copies are in memory that a GPU reads directly.
    """

    def __init__(self, model: nn.Module, pin_memory: bool) -> None:
        self.copied = 0  # bytes that were copied so far
        self.copies: weakref.WeakValueDictionary[Any, _Copy] = weakref.WeakValueDictionary()
        copies = self.copies
        hooks = save_on_cpu(pin_memory)
        here = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}

        def stays(tensor: torch.Tensor) -> bool:
            if tensor.numel() * tensor.element_size() < SMALL or tensor.untyped_storage()._cdata in here:
                return True
            # a product saves its weight turned round; what autocast made of a weight has a place of its own
            turned = tensor.ndim == 2 and tensor.stride(0) == 1 and not tensor.is_contiguous()
            return turned and (tensor.shape[1], tensor.shape[0]) in shapes

        def pack(tensor: torch.Tensor) -> Any:
            if stays(tensor):
                return tensor
            flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor  # views of one outcome are one copy
            storage = tensor.untyped_storage()
            key = (storage._cdata, flat.dtype, flat.shape, flat.stride(), flat.storage_offset(), tensor._version)
            copy = copies.get(key)
            if copy is None or copy.storage.expired():  # whose place in memory may belong to another tensor by now
                self.copied += tensor.numel() * tensor.element_size()
                copy = copies[key] = _Copy(StorageWeakRef(storage), hooks.pack_hook(flat))
            return copy, tensor.shape

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            copy, shape = packed
            return hooks.unpack_hook(copy.packed).view(shape)

        super().__init__(pack, unpack)
