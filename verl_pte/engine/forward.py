"""One call of the model against the bounded cache: prefill chunks eagerly, decode steps through CUDA graphs where
there is a GPU.

A decode step always runs all rows, busy or idle, so its shapes never change, and what rows evict is done before it. So
one graph is enough; it is captured before the first request, on idle rows, which leaves the cache as it was.

Left out: which tokens to run (engine.py) and what to do with the logits (sampling.py).

Shape suffixes: B rows, N tokens of a call, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from verl_pte.core import flash
from verl_pte.core.attention import attention_inputs, selected
from verl_pte.core.cache import BoundedCache, Step
from verl_pte.core.encoder_stack import EncoderStack
from verl_pte.engine import attention, flash_decode
from verl_pte.peft import refresh_shared_inputs, thought_encoders


class Forward:
    """Runs steps of `model` (an attached PeftModel) on `cache`.

    Args:
        cuda_graph: capture decode steps; only on a CUDA device.
        compile: run decode through torch.compile.
    """

    def __init__(self, model: nn.Module, cache: BoundedCache, *, cuda_graph: bool, compile: bool) -> None:
        self.causal_lm = model.get_base_model()
        self.decoder, self.lm_head = self.causal_lm.model, self.causal_lm.lm_head
        self.cache = cache
        self.refresh()
        self._compiled = torch.compile(self._decode_eagerly, dynamic=False) if compile else None
        self.graph: _DecodeGraph | None = None
        if cuda_graph:
            with torch.cuda.device(cache.device):
                self.graph = _DecodeGraph(self._run, cache.num_rows, cache.device)

    def refresh(self) -> None:
        """Renew what is derived from the adapter's weights; due before the first call after they have changed."""
        refresh_shared_inputs(self.causal_lm)
        encoders = thought_encoders(self.causal_lm)
        self.cache.encoders = None if encoders is None else EncoderStack(encoders)

    @torch.no_grad()
    def prefill(self, tokens_BN: Tensor, step: Step) -> Tensor:
        """Run a chunk of prompts; returns the logits after each row's last token [B, V]."""
        last_B = step.valid.sum(1).clamp_min(1) - 1
        decoder = self.decoder
        with selected(decoder.config, flash.REPLACES):
            visible = self.cache.begin(step)
            inputs = attention_inputs(visible, step.valid, decoder.config, decoder.dtype)
            hidden = self._hidden(tokens_BN, inputs)
        return self.lm_head(hidden[torch.arange(len(last_B), device=last_B.device), last_B])

    @torch.no_grad()
    def decode(self, tokens_and_positions_2B: Tensor) -> Tensor:
        """Run one token of every row, at position -1 where it idles; returns logits [B, V].

        Under a CUDA graph they lie in a buffer the next call overwrites.
        """
        return (self.graph or self._run)(tokens_and_positions_2B)

    def _run(self, tokens_and_positions_2B: Tensor) -> Tensor:
        with selected(self.decoder.config, attention.REPLACES):
            return (self._compiled or self._decode_eagerly)(tokens_and_positions_2B)

    def _decode_eagerly(self, tokens_and_positions_2B: Tensor) -> Tensor:
        token_B, position_B = tokens_and_positions_2B
        visible, decoder = self.cache.begin_decode(position_B), self.decoder
        if decoder.config._attn_implementation == flash_decode.NAME:
            inputs = {"attention_mask": None, "runs": flash_decode.Runs.of(visible, self.cache.schedule.window)}
        else:
            inputs = attention_inputs(visible, self.cache.step.valid, decoder.config, decoder.dtype)
        return self.lm_head(self._hidden(token_B[:, None], inputs)[:, 0])

    def _hidden(self, tokens_BN: Tensor, inputs: dict[str, Any]) -> Tensor:
        """`inputs`: what makes the call's queries see what they should."""
        return self.decoder(
            input_ids=tokens_BN,
            position_ids=self.cache.step.positions,
            past_key_values=self.cache,
            use_cache=True,
            **inputs,
        ).last_hidden_state


class _DecodeGraph:
    """One captured decode step with its input buffer."""

    def __init__(self, decode: Callable[[Tensor], Tensor], num_rows: int, device: torch.device) -> None:
        self.input_2B = torch.zeros(2, num_rows, dtype=torch.long, device=device)
        self.input_2B[1] = -1
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # kernels must be loaded and chosen before capture
                decode(self.input_2B)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits_BV = decode(self.input_2B)

    def __call__(self, tokens_and_positions_2B: Tensor) -> Tensor:
        self.input_2B.copy_(tokens_and_positions_2B)
        with torch.cuda.device(self.input_2B.device):
            self.graph.replay()
        return self.logits_BV
