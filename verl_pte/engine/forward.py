"""One call of the model against the bounded cache: prefill chunks eagerly, decode steps through CUDA graphs where
there is a GPU.

A decode step always runs all rows, busy or idle, so its shapes never change. Two graphs are enough, one for steps on
which some row evicts and one for the others; both are captured before the first request, on idle rows, which leaves
the cache as it was.

Left out: which tokens to run (engine.py) and what to do with the logits (sampling.py).

Shape suffixes: B rows, N tokens of a call, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from verl_pte.core.cache import BoundedCache, Step, attention_mask


class Forward:
    """Runs steps of `model` (an attached PeftModel) on `cache`.

    Args:
        cuda_graph: capture decode steps; only on a CUDA device.
        compile: run decode through torch.compile.
    """

    def __init__(self, model: nn.Module, cache: BoundedCache, *, cuda_graph: bool, compile: bool) -> None:
        causal_lm = model.get_base_model()
        self.decoder, self.lm_head = causal_lm.model, causal_lm.lm_head
        self.cache = cache
        self._compiled = torch.compile(self._decode_eagerly, dynamic=False) if compile else None
        self.graphs: dict[bool, _DecodeGraph] = {}
        if cuda_graph:
            with torch.cuda.device(cache.device):
                for evicts in (False, True):
                    if not evicts or cache.schedule.window is not None:
                        self.graphs[evicts] = _DecodeGraph(self._run, self._idle_step(evicts))

    @torch.no_grad()
    def prefill(self, tokens_BN: Tensor, step: Step) -> Tensor:
        """Run a chunk of prompts; returns the logits after each row's last token [B, V]."""
        last_B = step.valid.sum(1).clamp_min(1) - 1
        return self.lm_head(self._hidden(tokens_BN, step)[torch.arange(len(last_B), device=last_B.device), last_B])

    @torch.no_grad()
    def decode(self, tokens_B1: Tensor, step: Step) -> Tensor:
        """Run one token of every row; returns logits [B, V], under CUDA graphs a buffer the next call overwrites."""
        graph = self.graphs.get(step.evict_slots is not None)
        return self._run(tokens_B1, step) if graph is None else graph(tokens_B1, step)

    def _run(self, tokens_B1: Tensor, step: Step) -> Tensor:
        return (self._compiled or self._decode_eagerly)(tokens_B1, step)

    def _decode_eagerly(self, tokens_B1: Tensor, step: Step) -> Tensor:
        return self.lm_head(self._hidden(tokens_B1, step)[:, 0])

    def _hidden(self, tokens_BN: Tensor, step: Step) -> Tensor:
        decoder = self.decoder
        mask = attention_mask(self.cache.begin(step), decoder.config._attn_implementation, decoder.dtype)
        return decoder(
            input_ids=tokens_BN,
            attention_mask=mask,
            position_ids=step.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state

    def _idle_step(self, evicts: bool) -> Step:
        rows, chunk, device = self.cache.num_rows, self.cache.schedule.chunk, self.cache.device
        return Step(
            rows=None,
            positions=torch.zeros(rows, 1, dtype=torch.long, device=device),
            slots=torch.full((rows, 1), self.cache.padding_slot, device=device),
            valid=torch.zeros(rows, 1, dtype=torch.bool, device=device),
            fresh=None,
            evict_slots=torch.full((rows, chunk), self.cache.padding_slot, device=device) if evicts else None,
            evicting=torch.zeros(rows, dtype=torch.bool, device=device) if evicts else None,
        )


class _DecodeGraph:
    """One captured decode step with its input buffers."""

    def __init__(self, decode: Callable[[Tensor, Step], Tensor], step: Step) -> None:
        self.step = step
        self.tokens_B1 = torch.zeros_like(step.positions)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # kernels must be loaded and chosen before capture
                decode(self.tokens_B1, step)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits_BV = decode(self.tokens_B1, step)

    def __call__(self, tokens_B1: Tensor, step: Step) -> Tensor:
        self.tokens_B1.copy_(tokens_B1)
        for name in ("positions", "slots", "valid", "evict_slots", "evicting"):
            buffer = getattr(self.step, name)
            if buffer is not None:
                buffer.copy_(getattr(step, name))
        with torch.cuda.device(self.tokens_B1.device):
            self.graph.replay()
        return self.logits_BV
