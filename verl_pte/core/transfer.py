"""Numbers from the host to a device, without waiting for what the device is doing.

A copy from ordinary memory first waits for everything the device was told before; one from pinned memory takes its turn
there, and the host goes on to launch what comes next.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def upload(
    values: Tensor | np.ndarray | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers, an array or a tensor on the host, as a tensor on `device`."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type not in ("cpu", "meta"):  # the allocator keeps pinned memory for reuse until the copy is done
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def upload_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Integer and bool tensors on the host, as tensors on `device`: one copy for all."""
    if device.type == "cpu":
        return list(tensors)
    flat = upload(torch.cat([tensor.reshape(-1).long() for tensor in tensors]), device)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]
