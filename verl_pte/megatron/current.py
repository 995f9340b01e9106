"""The call under way: what a model's layers read while megatron-core runs them, and its rotary angles.

megatron-core hands its layers one attention mask and one row of positions for all sequences; a replay has a mask, a
cache and positions of its own for every sequence. They are put here before a call's forward and read by the layers.

Shape suffixes: B sequences, N tokens of the call, S = visible past + N, R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from verl_pte.learner.cache import CallCache


@dataclass
class Run:
    """A call that is run on this rank's layers."""

    cache: CallCache
    mask_B1NS: Tensor
    positions_BN: Tensor
    adapter: bool  # False: the untouched base
    # In a run with gradients: what later calls owe a layer's keys and values, and its state.
    collect: Callable[[int], list[Tensor]] | None = None
    collect_state: Callable[[int], Tensor | None] | None = None


class Current:
    """Shared by the layers of a model.

    Args:
        first_layer: of this pipeline stage, counted from 0 over the whole model.
    """

    def __init__(self, first_layer: int) -> None:
        self.first_layer = first_layer
        self._run: Run | None = None

    def place(self, layer_number: int) -> int:
        """Index among this stage's layers of the one megatron-core numbers so (from 1)."""
        return layer_number - 1 - self.first_layer

    @property
    def run(self) -> Run:
        """The call under way."""
        if self._run is None:
            raise RuntimeError("a PTE model on Megatron is run by verl_pte.megatron.replay.MegatronReplay")
        return self._run

    def set(self, run: Run | None) -> None:
        """Make `run` the call under way."""
        self._run = run


class CallRotary(nn.Module):
    """In place of megatron-core's RotaryEmbedding: angles at the positions of every sequence of the call.

    Frequencies are those of the Hugging Face model, RoPE scaling included.
    """

    def __init__(self, hf: Any, current: Current) -> None:
        super().__init__()
        rotary = LlamaRotaryEmbedding(config=hf)
        assert rotary.attention_scaling == 1.0, "refused in config.py"
        self.inv_freq = rotary.inv_freq.float()  # no buffer: it stays float32 when the model is cast
        self.current = current

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """What megatron-core asks for first; positions come with the call."""
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """float32 [N, B, 1, head_dim]."""
        positions_NB = self.current.run.positions_BN.T
        self.inv_freq = self.inv_freq.to(positions_NB.device)
        angles = positions_NB[..., None, None].float() * self.inv_freq
        return torch.cat([angles, angles], dim=-1)
