"""The PTE adapter of one decoder layer inside a vLLM model, sharded as vLLM shards the layer.

vLLM merges a layer's linears (q, k, v into one; gate and up into one). Their adapters are merged too: one product with
all `lora_A`s, the state of each token's request, then each part's `lora_B`. Column-parallel linears hold `lora_B`'s
rows of their own outputs; row-parallel ones hold `lora_A`'s columns of their own inputs, and sum the r numbers of a
token over ranks. The thought encoder is small and whole on every rank; keys and values are projected by the heads a
rank has and summed over ranks before they are multiplied (their product is not a sum over heads).

Left out: which tokens belong to which state (states.py), names in checkpoints (weights.py).

Shape suffixes: T tokens of a step, I in_features, O out_features, N parts, R rank, B requests, E evicted tokens,
K kv heads x head_dim on this rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.utils.platform_utils import is_pin_memory_available

from verl_pte.config import PTEConfig
from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.core.encoder_stack import HeadShare
from verl_pte.peft.layer import thought_encoder

# vLLM's linears of a decoder layer, and the linears of the checkpoint they are merged from.
LINEARS = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


class TokenStates(nn.Module):
    """The states of all requests, per layer, and the slot of each token of the step under way.

    Buffers with fixed addresses, so that CUDA graphs and compiled code can hold them. Slot 0 belongs to nobody: it is
    zero, and so is the update of padding.
    """

    def __init__(self, num_layers: int, num_slots: int, max_tokens: int, rank: int) -> None:
        super().__init__()
        states = torch.zeros(num_layers, num_slots, rank, rank, dtype=torch.float32)  # on vLLM's default device
        self.register_buffer("by_layer_LSRR", states, persistent=False)
        self.register_buffer("slots_T", torch.zeros(max_tokens, dtype=torch.long), persistent=False)
        # Where slots are written first; on GPUs pinned, so that the copy does not wait for the step before.
        pin = is_pin_memory_available()
        self.host_slots_T = torch.zeros(max_tokens, dtype=torch.long, device="cpu", pin_memory=pin)

    def of_tokens(self, layer: int, num_tokens: int) -> Tensor:
        """[T, R, R] of the first tokens of the step."""
        return self.by_layer_LSRR[layer].index_select(0, self.slots_T[:num_tokens])


class MergedStateLoRA(nn.Module):
    """State-modulated LoRA of one of vLLM's linears; zero at the start.

    Args:
        linear: what it is added to.
        parts: the linears of the checkpoint merged in it.
        adapted: those among them that have an adapter.
    """

    def __init__(self, linear: LinearBase, parts: tuple[str, ...], adapted: set[str], config: PTEConfig) -> None:
        super().__init__()
        rank, dtype = config.rank, torch.get_default_dtype()
        self.rank, self.scaling = rank, config.alpha / config.rank
        self.row_parallel = isinstance(linear, RowParallelLinear)
        self.tp_size, self.tp_rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if isinstance(linear, ColumnParallelLinear):
            sizes, in_features = list(linear.output_partition_sizes), linear.input_size
        else:
            assert isinstance(linear, RowParallelLinear)
            sizes, in_features = [linear.output_size], linear.input_size_per_partition
        names = [name for name in parts if name in adapted]
        self.index = {name: i for i, name in enumerate(names)}
        # Key and value heads are replicated where there are fewer than ranks.
        self.kv_replicas = linear.num_kv_head_replicas if isinstance(linear, QKVParallelLinear) else 1
        self.sizes = dict(zip(parts, sizes, strict=True))
        self.lora_A = nn.Parameter(torch.zeros(len(names) * rank, in_features, dtype=dtype), requires_grad=False)
        self.lora_B = nn.ParameterList(
            nn.Parameter(torch.zeros(self.sizes[name], rank, dtype=dtype), requires_grad=False) for name in names
        )

    def forward(self, x_TI: Tensor, state_TRR: Tensor | None) -> Tensor:
        """The update [T, O on this rank]; `state_TRR` None stands for the identity."""
        h_TNR = nn.functional.linear(x_TI, self.lora_A).unflatten(-1, (-1, self.rank))
        if self.row_parallel and self.tp_size > 1:
            h_TNR = tensor_model_parallel_all_reduce(h_TNR)
        if state_TRR is not None:
            h_TNR = torch.bmm(h_TNR, state_TRR.to(h_TNR.dtype).transpose(1, 2))
        out = []
        for name, size in self.sizes.items():
            if name in self.index:
                i = self.index[name]
                out.append(nn.functional.linear(h_TNR[:, i], self.lora_B[i]))
            else:
                out.append(h_TNR.new_zeros(len(h_TNR), size))
        update_TO = out[0] if len(out) == 1 else torch.cat(out, dim=-1)
        return update_TO * self.scaling

    def load(self, part: str, which: str, full: Tensor) -> None:
        """Copy this rank's share of a part's whole `lora_A` [R, in] or `lora_B` [out, R].

        Raises ValueError if the shape does not fit.
        """
        i = self.index[part]
        if which == "lora_A":
            mine, dim, sharded = self.lora_A[i * self.rank : (i + 1) * self.rank], 1, self.row_parallel
        else:
            mine, dim, sharded = self.lora_B[i], 0, not self.row_parallel
        replicas = self.kv_replicas if part in ("k_proj", "v_proj") else 1
        shards, position = (self.tp_size // replicas, self.tp_rank // replicas) if sharded else (1, 0)
        whole, width = list(mine.shape), mine.shape[dim]
        whole[dim] *= shards
        if list(full.shape) != whole:
            raise ValueError(
                f"load_weights: {part}.{which} has shape {tuple(full.shape)}, the rollout model's {tuple(whole)}; "
                "was the adapter made with other settings?"
            )
        mine.copy_(full.narrow(dim, position * width, width))


class LayerAdapter(nn.Module):
    """All that PTE adds to one decoder layer: adapters of its linears, and its thought encoder.

    Attributes:
        share: which kv heads are this rank's; None where it has all of them.
    """

    share: HeadShare | None = None

    def __init__(self, layer: nn.Module, index: int, config: PTEConfig, states: TokenStates | None) -> None:
        super().__init__()
        self.index = index
        self.states = (states,)  # in a tuple: registered once, by the model
        self.linears = nn.ModuleDict()
        for path, parts in LINEARS.items():
            block, _, name = path.rpartition(".")
            adapted = {part for part in parts if _is_target(f"model.layers.{index}.{block}.{part}", config)}
            if adapted:
                linear: Any = layer.get_submodule(path)
                self.linears[name] = MergedStateLoRA(linear, parts, adapted, config)
                linear.register_forward_hook(_adding(self, name))
        self.encoder: ThoughtEncoder | None = None
        if states is not None:
            attn: Any = layer.get_submodule("self_attn")
            self.share = _share(attn)
            self.encoder = thought_encoder(attn.total_num_kv_heads * attn.head_dim, config).requires_grad_(False)

    @property
    def num_tensors(self) -> int:
        """Tensors a saved adapter has for this layer."""
        lora: Any = self.linears.values()
        encoder = 0 if self.encoder is None else len(list(self.encoder.children()))
        return encoder + sum(2 * len(linear.index) for linear in lora)

    def update(self, name: str, x_TI: Tensor) -> Tensor:
        """The update of a linear for the tokens of the step under way."""
        (states,) = self.states
        return self.linears[name](x_TI, None if states is None else states.of_tokens(self.index, len(x_TI)))


def _is_target(module: str, config: PTEConfig) -> bool:
    """PEFT's rule: a target is a module's whole name or the end of it."""
    if config.target_modules == "all-linear":
        return True
    return any(module == target or module.endswith(f".{target}") for target in config.target_modules)


def _share(attn: Any) -> HeadShare | None:
    tp_size, tp_rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    if tp_size == 1:
        return None
    replicas = max(1, tp_size // attn.total_num_kv_heads)
    start = tp_rank // replicas * attn.kv_size
    # A replicated head is summed once.
    return HeadShare(slice(start, start + attn.kv_size), tp_rank % replicas == 0, tensor_model_parallel_all_reduce)


def _adding(adapter: LayerAdapter, name: str) -> Callable:
    def add(linear: nn.Module, args: tuple, output: Any) -> Any:
        y, bias = output  # vLLM's linears return their bias where it is to be added elsewhere
        return y + adapter.update(name, args[0]).to(y.dtype), bias

    return add
