"""Offloads activations that are saved for the backward pass to the host's memory."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

SMALL = 4096  # bytes; copying a smaller tensor costs more than the memory that it frees


@dataclass(frozen=True, eq=False)
class _Copy:
    """What autograd holds in place of a saved tensor; it is freed with the last operation that refers to it."""

    storage: StorageWeakRef  # of the saved tensor
    packed: Any  # the result of `save_on_cpu`


class Offloading(saved_tensors_hooks):
    """Context manager in which tensors that autograd saves are copied to the host, and back in the backward pass.

    Weights, buffers, autocast copies of weights and small tensors stay on the device. A tensor that several operations
    save is copied once. The cost is the transfer of each tensor in both directions.

    Args:
        model: its weights and buffers stay on the device.
        pin_memory: whether copies are in pinned memory, which a GPU reads directly.
    """

    def __init__(self, model: nn.Module, pin_memory: bool) -> None:
        self.copied = 0  # bytes copied so far
        self.copies: weakref.WeakValueDictionary[Any, _Copy] = weakref.WeakValueDictionary()
        copies = self.copies
        hooks = save_on_cpu(pin_memory)
        here = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        shapes = {tuple(weight.shape) for weight in model.parameters() if weight.ndim == 2}

        def stays(tensor: torch.Tensor) -> bool:
            if tensor.numel() * tensor.element_size() < SMALL or tensor.untyped_storage()._cdata in here:
                return True
            # an autocast copy of a weight has its own storage, and a linear layer saves it transposed
            transposed = tensor.ndim == 2 and tensor.stride(0) == 1 and not tensor.is_contiguous()
            return transposed and (tensor.shape[1], tensor.shape[0]) in shapes

        def pack(tensor: torch.Tensor) -> Any:
            if stays(tensor):
                return tensor
            flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor  # views of one tensor share a copy
            storage = tensor.untyped_storage()
            key = (storage._cdata, flat.dtype, flat.shape, flat.stride(), flat.storage_offset(), tensor._version)
            copy = copies.get(key)
            if copy is None or copy.storage.expired():  # then another tensor may have got the same address
                self.copied += tensor.numel() * tensor.element_size()
                copy = copies[key] = _Copy(StorageWeakRef(storage), hooks.pack_hook(flat))
            return copy, tensor.shape

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            copy, shape = packed
            return hooks.unpack_hook(copy.packed).view(shape)

        super().__init__(pack, unpack)
