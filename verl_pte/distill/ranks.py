"""Ranks: the processes of a data parallel warm start, as torchrun starts them, or one.

Each holds the whole model and answers its share of a step's prompts. Gradients are averaged over the tokens of all, so
a run is the same, to rounding, on any number of ranks.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

# A rank may wait for another's longest answer.
_PATIENCE = timedelta(hours=2)


class Ranks:
    """This process's place among all. Raises ValueError for a device that is not there."""

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"--device {device}: must be auto, cpu, cuda or e.g. cuda:1") from None
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(f"--device {device}: this PyTorch sees no CUDA device; use cpu")
            if self.size > 1:
                if "LOCAL_RANK" not in os.environ:
                    raise ValueError(f"WORLD_SIZE={self.size} without LOCAL_RANK: start all ranks with torchrun")
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if self.device.index is not None:
                torch.cuda.set_device(self.device)

    def __enter__(self) -> "Ranks":
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *exc: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same."""
        total, squares = self.sum(value, value**2)
        return total**2 == squares * self.size  # equality of Cauchy-Schwarz

    def sum_gradients(self, parameters: Iterable[nn.Parameter], weight: float) -> None:
        """Replace each gradient by the sum over ranks of `weight` times theirs."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(weight)
            dist.all_reduce(parameter.grad)
