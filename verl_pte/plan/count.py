"""The project's own replay and engine, run on the meta device, and the bytes they held.

Decoder layers are alike, so models of one and of two layers are run, and the rest of a model's layers are as many
increments more. Under a window the calls of a replay are alike once the first windowful has left; what grows after
that, the K/V store and the states between calls, is added by its size.

Shape suffixes as in engine/forward.py.
"""

import copy
import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from verl_pte.config import PTEConfig
from verl_pte.core.cache import BoundedCache
from verl_pte.core.schedule import Schedule
from verl_pte.engine.forward import Forward
from verl_pte.learner import Replay
from verl_pte.peft import attach, head_dim
from verl_pte.plan.configs import meta_model
from verl_pte.plan.live import LiveMemory, fused_attention

META = torch.device("meta")


class Parameters(NamedTuple):
    """Numbers, not bytes."""

    base: int
    adapter: int
    layer: int  # of one decoder layer's base
    root: int  # of the base outside its decoder layers: embedding, final norm, output layer


def parameters(config: Any, pte: PTEConfig) -> Parameters:
    """Of a model of this transformers config with this adapter."""
    model = _attached(config, pte, config.num_hidden_layers, torch.bfloat16)
    base = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.get_base_model().model.layers
    in_layers = sum(p.numel() for p in layers.parameters() if not p.requires_grad)
    return Parameters(base, adapter, in_layers // len(layers), base - in_layers)


def replay_bytes(
    config: Any, pte: PTEConfig, batch: int, prompt_length: int, response_length: int, dtype: torch.dtype
) -> tuple[int, int]:
    """(peak of both passes, of it the K/V store); parameters not included. `dtype` is that of the computation."""
    schedule = pte.schedule()
    counted = min(response_length, _until_alike(schedule, prompt_length) or response_length)

    def run(model: nn.Module) -> int:
        sequences = [[torch.zeros(n, dtype=torch.long)] * batch for n in (prompt_length, counted)]
        with LiveMemory() as live, fused_attention():
            replay = Replay(model, *sequences, kv_store="device")
            log_probs = replay.forward().log_probs.requires_grad_()
            log_probs.sum().backward()
            replay.backward(log_probs.grad)
        return live.peak

    token = token_bytes(config, dtype)
    rest = response_length - counted
    last, seen = (schedule.num_evictions(prompt_length, prompt_length + n) for n in (response_length, counted))
    states = (last - seen) * config.num_hidden_layers * 4 * pte.rank**2
    peak = _all_layers(config, [run(_attached(config, pte, n, dtype).train()) for n in (1, 2)])
    return peak + batch * (rest * token + states), batch * (prompt_length + response_length - 1) * token


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of a token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * dtype.itemsize


def cache_bytes(
    config: Any, pte: PTEConfig, num_rows: int, prompt_length: int, response_length: int, dtype: torch.dtype
) -> int:
    """Of the native engine's cache and states."""
    return _cache(config, pte, num_rows, prompt_length, response_length, dtype).num_bytes


def rollout_bytes(
    config: Any, pte: PTEConfig, num_rows: int, prompt_length: int, response_length: int, dtype: torch.dtype
) -> int:
    """Peak of a prefill of all rows, or of a decode step, beside the cache; sampling not included."""

    def run(model: Any) -> int:
        cache = _cache(model.config, pte, num_rows, prompt_length, response_length, dtype)
        forward = Forward(model, cache, cuda_graph=False, compile=False)
        chunk = cache.schedule.chunks(prompt_length, prompt_length, pte.chunk_tokens)[0]
        tokens = torch.zeros(num_rows, chunk.end - chunk.start, dtype=torch.long, device=META)
        # No way to choose rows on the meta device; the engine copies an initial state there, which it holds already.
        step = dataclasses.replace(cache.plan(None, [chunk] * num_rows, [prompt_length] * num_rows), fresh=None)
        position = torch.zeros(2, num_rows, dtype=torch.long, device=META)
        with LiveMemory() as live, fused_attention():
            forward.prefill(tokens, step)
            forward.decode(position)
        return live.peak

    return _all_layers(config, [run(_attached(config, pte, n, dtype).eval()) for n in (1, 2)])


def _until_alike(schedule: Schedule, prompt_length: int) -> int | None:
    """Thought tokens after which every segment sees what the one before saw, moved on; None without a window."""
    limit = schedule.cache_limit(prompt_length)
    if limit is None:
        return None
    windowful, position = limit - schedule.pinned(prompt_length), prompt_length
    while schedule.evicted_before(prompt_length, position) < windowful:
        boundary = schedule.next_boundary(prompt_length, position)
        assert boundary is not None, "there is a window"
        position = boundary
    return position + 1 - prompt_length


def _all_layers(config: Any, by_layers: list[int]) -> int:
    one, two = by_layers
    return one + (config.num_hidden_layers - 1) * (two - one)


def _attached(config: Any, pte: PTEConfig, layers: int, dtype: torch.dtype) -> Any:
    base = meta_model(config, layers, dtype)
    # A copy: PEFT writes the names of the linears it found into its config, here those of another number of layers.
    return attach(base, copy.deepcopy(pte)).to(dtype)  # the adapter as well, which FSDP casts for its layer's forward


def _cache(
    config: Any, pte: PTEConfig, num_rows: int, prompt_length: int, response_length: int, dtype: torch.dtype
) -> BoundedCache:
    return BoundedCache(
        pte.schedule(),
        num_rows=num_rows,
        max_prompt_length=prompt_length,
        max_thoughts=response_length,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        rank=pte.rank,
        dtype=dtype,
        device=META,
    )
