"""Counts the bytes of the tensors that are alive, and the most there were.

Works on the meta device, where tensors have sizes and take no memory. There torch would run attention as plain matrix
products and keep a matrix of every query with every key; `fused_attention` stands in for the kernels that do not.

Left out: what kernels take for themselves, and what an allocator loses between blocks.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered: bytes of the storages that operations made and that are still alive.

    Attributes:
        now, peak: bytes. What was alive before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), before)
        return out

    def _add(self, storage: Any, before: list[Any]) -> None:
        key = id(storage)
        if key in self._known or any(storage is other for other in before):  # a view, or written in place
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Fused(torch.autograd.Function):
    """Keeps for the backward pass what fused kernels keep: inputs, output and a row's log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q_BHND: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
        out_BHND = torch.empty_like(q_BHND)
        ctx.save_for_backward(q_BHND, k_BHSD, v_BHSD, out_BHND, q_BHND.new_empty(q_BHND.shape[:3], dtype=torch.float32))
        return out_BHND

    @staticmethod
    def backward(ctx: Any, *d_out: Any) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Within: torch's attention has the memory of a fused kernel, and no values. For the meta device."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Fused.apply(query, key, value)

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
