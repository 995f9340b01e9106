"""A megatron-core decoder layer with PTE: it moves the thought state and lends it to its adapted linears.

Its forward asks the call's cache for the layer's state (which applies a pending eviction) before anything else runs,
as the hook on Hugging Face layers does (peft/model.py). Under sequence parallelism the linears use the state for the
tokens of their rank alone, so the gradients that reach it are parts of a sum over ranks.

Left out: where the base's weights come from (base.py).
"""

import hashlib
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from verl_pte.config import PTEConfig
from verl_pte.core.adapter import StateLoRA
from verl_pte.megatron.adapter import AdaptedLinear, ColumnLoRA, Lent, RowLoRA
from verl_pte.megatron.attention import collecting
from verl_pte.megatron.collectives import expand
from verl_pte.megatron.config import MERGED, check_targets
from verl_pte.megatron.current import Current
from verl_pte.megatron.encoder import ShardedThoughtEncoder
from verl_pte.peft.layer import thought_encoder


class PTELayer(TransformerLayer):
    """TransformerLayer whose linears are adapted, with a thought encoder.

    Args:
        pte: settings of the adapter.
        seed: of its first weights.
        current: the call under way.
    """

    def __init__(self, *args: Any, pte: PTEConfig, seed: int, current: Current, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.current, self.index = current, current.place(self.layer_number)
        self.lent = Lent()
        self.group = self.pg_collection.tp
        config = self.config
        self.thought_encoder: ShardedThoughtEncoder | None = None
        with torch.random.fork_rng(devices=[]):
            # Of the layer alone, not of where it lies: every sharding starts with the same adapter.
            digest = hashlib.sha256(f"{seed} {self.layer_number}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            self._adapt(self.self_attention, "linear_qkv", pte, config.num_query_groups // self.group.size())
            self._adapt(self.self_attention, "linear_proj", pte)
            self._adapt(self.mlp, "linear_fc1", pte)
            self._adapt(self.mlp, "linear_fc2", pte)
            if not pte.freeze_state:
                kind = partial(ShardedThoughtEncoder, group=self.group)
                self.thought_encoder = thought_encoder(config.num_query_groups * config.kv_channels, pte, kind)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class's."""
        run = self.current.run
        self.lent.enabled = run.adapter
        self.lent.state_BRR = self._state() if run.adapter else None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.lent.state_BRR = None  # a state kept here would keep its whole graph alive

    def attention_adapters(self) -> list[tuple[str, nn.Module]]:
        """(name in the Hugging Face model, update) of the attention's adapted linears."""
        return [*_adapters(self.self_attention.linear_qkv), *_adapters(self.self_attention.linear_proj)]

    def mlp_adapters(self) -> list[tuple[str, nn.Module]]:
        """(name in the Hugging Face model, update) of the MLP's adapted linears."""
        return [*_adapters(self.mlp.linear_fc1), *_adapters(self.mlp.linear_fc2)]

    def _state(self) -> Tensor | None:
        run, encoder = self.current.run, self.thought_encoder
        if encoder is None:
            return None
        state_BRR = run.cache.thought_state(self.index, encoder)
        if torch.is_grad_enabled():
            if run.collect_state is not None:
                owed, index = run.collect_state, self.index
                (state_BRR,) = collecting((state_BRR,), lambda: [owed(index)])
            # DDP reduces a bucket when all its parameters have gradients, also where nothing was evicted.
            state_BRR = state_BRR + encoder.touch()
        if self.config.sequence_parallel:
            state_BRR = expand(state_BRR, self.group)
        return state_BRR

    def _adapt(self, parent: nn.Module, name: str, pte: PTEConfig, kv_heads: int | None = None) -> None:
        base, targets = getattr(parent, name), check_targets(pte)
        if not targets & set(MERGED[name]):
            return
        shared, config = (self.group, self.config.sequence_parallel), self.config
        kv_dim = config.num_query_groups * config.kv_channels
        widths = {"q_proj": config.num_attention_heads * config.kv_channels, "k_proj": kv_dim, "v_proj": kv_dim}
        parts = []
        for part in MERGED[name]:
            row = name in ("linear_proj", "linear_fc2")
            out = config.hidden_size if row else widths.get(part, config.ffn_hidden_size)
            update: nn.Module | None = None
            if part in targets:
                whole = StateLoRA(base.input_size, out, pte.rank, pte.alpha)
                update = RowLoRA(whole, *shared) if row else ColumnLoRA(whole, *shared)
            parts.append((part, out if row else out // self.group.size(), update))
        setattr(parent, name, AdaptedLinear(base, parts, kv_heads, self.lent))


def _adapters(linear: nn.Module) -> list[tuple[str, nn.Module]]:
    return linear.adapters() if isinstance(linear, AdaptedLinear) else []
