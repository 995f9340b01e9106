"""Weights from a training worker to a rollout server: buckets of bytes through Ray's object store.

A bucket is one flat array, which Ray shares without copying, and the names, shapes and dtypes of the tensors in it.
Left out: device-to-device transfer. After the first hand-over only the adapter travels, about 1 % of the model.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Tensors laid end to end."""

    layout: list[tuple[str, tuple[int, ...], torch.dtype]]
    data: np.ndarray  # uint8


def buckets(
    weights: Iterable[tuple[str, Tensor]], max_bytes: int, dtype: torch.dtype | None = None
) -> Iterator[Bucket]:
    """Pack named tensors, cast to `dtype`, into buckets of about `max_bytes`; a larger tensor gets one of its own."""
    layout: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    parts: list[np.ndarray] = []
    size = 0
    for name, tensor in weights:
        tensor = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        part = tensor.reshape(-1).view(torch.uint8).numpy()
        if parts and size + part.nbytes > max_bytes:
            yield Bucket(layout, np.concatenate(parts))
            layout, parts, size = [], [], 0
        layout.append((name, tuple(tensor.shape), tensor.dtype))
        parts.append(part)
        size += part.nbytes
    if parts:
        yield Bucket(layout, np.concatenate(parts))


def unpack(bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a bucket."""
    offset = 0
    for name, shape, dtype in bucket.layout:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # Copied: what Ray hands out is read-only, and torch tensors have no such notion.
        yield name, torch.from_numpy(bucket.data[offset : offset + size].copy()).view(dtype).reshape(shape)
        offset += size
