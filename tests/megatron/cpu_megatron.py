"""megatron-core 0.16.1 on a CPU: the places where it takes for granted that there is a GPU.

For tests alone. Everything else is megatron-core as installed: its groups, mappings, schedules, DDP, optimizers and
checkpoints, over gloo.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_modes = []


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def install() -> None:
    """Once a process, before megatron-core makes anything."""
    if _modes:
        return
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    name_of = torch.Tensor.type

    def type_(self, dtype=None, **kwargs):  # optimizers look for "torch.cuda.FloatTensor"
        if dtype is not None:
            return name_of(self, dtype, **kwargs)
        return "torch.cuda." + name_of(self).rpartition(".")[2]

    torch.Tensor.type = type_
    _modes.append(_CudaMeansCpu())
    _modes[0].__enter__()
    from megatron.core.tensor_parallel import random

    class NoTracker(random.CudaRNGStatesTracker):
        def fork(self, name: str = "model-parallel-rng"):
            return contextlib.nullcontext()

        def add(self, name: str, seed: int) -> None:
            pass

    random._CUDA_RNG_STATE_TRACKER = NoTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def join(rank: int, world: int, port: int, tensor: int, pipeline: int) -> None:
    """Become one of `world` gloo ranks, with megatron-core's groups."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    install()
    dist.init_process_group("gloo", rank=rank, world_size=world)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
