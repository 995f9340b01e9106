"""An accelerator that is not there: tensors that say they are on a device and keep their numbers on the CPU.

What a GPU would refuse, operations on tensors of both, raises here. What a GPU would make the host wait for, blocking
copies and reads of results, is counted by the place in the package that asked for it. Importing this changes torch for
the whole process, so tests do it in processes of their own (device_run.py).

Left out: streams, speed, kernels. It says that code is device-clean, not that it is right on a GPU.
"""

import traceback
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(f"{NAME}:0")
waits: Counter[str] = Counter()

_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}


class SimTensor(Tensor):
    """A tensor on DEVICE; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "SimTensor":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        new = Tensor._make_wrapper_subclass(cls, held.shape, device=DEVICE, **layout)
        new.held = held
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self) -> list:
        _waits_for("tolist")
        return self.held.tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_uploaded(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        if not isinstance(value, Tensor) and any(isinstance(part, Tensor) for part in parts):
            _waits_for("number")  # which torch copies from ordinary memory
        super().__setitem__(_uploaded(index), value)


class Accelerator(TorchDispatchMode):
    """While active, ``device="sim:0"`` makes tensors there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def placed(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on DEVICE; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(SimTensor(parameter.detach()), requires_grad=parameter.requires_grad)
                module._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = SimTensor(buffer)
    return model


def numbers(value: Any) -> Any:
    """What a tensor of DEVICE holds; anything else as it is."""
    return value.held if isinstance(value, SimTensor) else value


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, SimTensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, SimTensor) and leaf.dim() > 0]
    there = _is_ours(kwargs.get("device"))
    if func is _aten._to_copy.default:
        if kwargs.get("device") is not None:
            if there != bool(ours):
                _crosses(args[0], kwargs.get("non_blocking", False))
        else:
            there = bool(ours)
    elif func is _aten.copy_.default:
        if ours and others:
            _waits_for("copy")
        there = isinstance(args[0], SimTensor)
    else:
        if ours and others:
            # CUDA takes indices from the host, and copies them first.
            if not (func in _INDEXING and isinstance(args[0], SimTensor)):
                raise RuntimeError(f"{func} on tensors of two devices, at {_place()}")
            _waits_for("index")
        if func is _aten._local_scalar_dense.default and ours:
            _waits_for("item")
        masks = func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        if ours and (func is _aten.nonzero.default or masks):
            _waits_for("nonzero")  # whose size the host has to know
        there = there or bool(ours)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}  # there is no such allocator here
    plain = {
        key: torch.device("cpu") if key == "device" and value is not None else value for key, value in kwargs.items()
    }
    found = func(*pytree.tree_map(numbers, args), **pytree.tree_map(numbers, plain))
    if not there:
        return found
    known = {id(tensor.held): tensor for tensor in ours}  # operations in place return what they were given

    def wrapped(out: Any) -> Any:
        return known[id(out)] if id(out) in known else SimTensor(out) if isinstance(out, Tensor) else out

    return pytree.tree_map(wrapped, found)


def _crosses(tensor: Tensor, non_blocking: bool) -> None:
    """A copy between host and device; only one from pinned memory does not wait."""
    if non_blocking and isinstance(tensor, SimTensor):
        raise RuntimeError(f"numbers that are read before they have come, at {_place()}")
    if not (non_blocking and getattr(tensor, "pinned", False)):
        _waits_for("copy")


def _pinned(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.pinned = True
    return tensor


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _waits_for(what: str) -> None:
    waits[f"{what} at {_place()}"] += 1


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if "/verl_pte/" in frame.filename or "/transformers/models/" in frame.filename:
            return f"{frame.filename.rpartition('/verl_pte/')[2]}:{frame.lineno}"
    return "the test"


def _uploaded(index: Any) -> Any:
    """Lists among indices become tensors of the device, as CUDA makes them."""
    if isinstance(index, tuple):
        return tuple(_uploaded(i) for i in index)
    if isinstance(index, list):
        _waits_for("list as index")
        return SimTensor(torch.tensor(index))
    return index


def _constructor(original: Any) -> Any:
    """torch.tensor and torch.as_tensor read Python numbers below the dispatcher."""

    def construct(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if not _is_ours(device):
            return original(data, *args, device=device, **kwargs)
        if isinstance(data, SimTensor):
            return data if kwargs.get("dtype") is None else data.to(kwargs["dtype"])
        _waits_for("new tensor")
        return SimTensor(original(data, *args, **kwargs))

    return construct


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """sdpa has no kernel for the device."""
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masked else scores + attn_mask
    return scores.softmax(-1).to(query.dtype) @ value


torch.tensor, torch.as_tensor = _constructor(torch.tensor), _constructor(torch.as_tensor)  # type: ignore[assignment]
Tensor.pin_memory = _pinned  # type: ignore[method-assign]
F.scaled_dot_product_attention = _attention
torch.amp.is_autocast_available = lambda device: device != NAME
