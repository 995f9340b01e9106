"""Runs the decode benchmark: one step of the native engine in several configurations, which take turns in one process.

Their models share the base's weights. A step is `RolloutEngine.step` with all rows busy, from the tokens just sampled
to the next: host work, model and sampling. It ends with the tokens on the host, so a wall clock sees all of it on a
GPU too. They take turns step by step, so what disturbs the machine for a while falls on all alike, and in an order
drawn anew each time: a step is slower after one that left nothing of it in the processor's caches. Ratios and
differences are taken within one eviction cycle.
"""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from verl_pte.bench.decode_settings import ARMS, Arm, DecodeSettings
from verl_pte.bench.engines import check_attention, device_name, native_device
from verl_pte.bench.models import attach_random, base_config
from verl_pte.engine import RolloutEngine, SamplingParams


def total_work(settings: DecodeSettings) -> int:
    """What `measure` reports as done when it ends: steps."""
    return len(ARMS) * (settings.warm_up + settings.cycles * settings.cycle_length)


def measure(settings: DecodeSettings, progress: Callable[[str, int], None]) -> list[dict[str, Any]]:
    """Times of every step, one record for each cycle and configuration.

    `progress` is told what begins, and how much was done since it was told last.
    """
    check_attention(settings.sizes, gradients=False)
    progress("making models", 0)
    base = _base(settings)
    engines = {name: _engine(settings, arm, base) for name, arm in ARMS.items()}
    for name, engine in engines.items():
        progress(f"filling windows, {ARMS[name].title}", 0)
        for _ in range(settings.warm_up):
            engine.step()
        progress(f"filled windows, {ARMS[name].title}", settings.warm_up)
    records: list[dict[str, Any]] = []
    order = random.Random(settings.sizes.seed)
    for cycle in range(settings.cycles):
        progress(f"cycle {cycle + 1}/{settings.cycles}", 0)
        own: dict[str, dict[str, Any]] = {name: {"cycle": cycle, "arm": name} for name in ARMS}
        for _ in range(settings.cycle_length):
            for name in order.sample(list(ARMS), len(ARMS)):
                for key, value in _timed_step(engines[name]).items():
                    own[name].setdefault(key, []).append(value)
        records += own.values()
        progress(f"cycle {cycle + 1}/{settings.cycles}", len(ARMS) * settings.cycle_length)
    return records


def device(settings: DecodeSettings) -> str:
    """What `measure` runs on, for reports."""
    return device_name(native_device(settings.sizes))


def _base(settings: DecodeSettings) -> nn.Module:
    sizes = settings.sizes
    torch.set_num_threads(sizes.threads)
    torch.manual_seed(sizes.seed)
    with torch.device(native_device(sizes)):
        dtype = getattr(torch, sizes.dtype)
        return AutoModelForCausalLM.from_config(base_config(sizes), dtype=dtype, attn_implementation=sizes.attention)


def _engine(settings: DecodeSettings, arm: Arm, base: nn.Module) -> RolloutEngine:
    """An engine with all its rows about to decode, on a model that shares the base's parameters."""
    sizes = settings.sizes
    own = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = attach_random(own, sizes.method(arm.method), sizes.seed)
    if not arm.adapter:
        model.base_model.disable_adapter_layers()
    engine = RolloutEngine(
        model,
        max_num_seqs=sizes.num_seqs,
        max_prompt_length=sizes.prompt_length,
        max_response_length=settings.num_tokens,
        dtype=getattr(torch, sizes.dtype),
    )
    generator = torch.Generator().manual_seed(sizes.seed)
    sampling = SamplingParams(temperature=0, max_tokens=settings.num_tokens, ignore_eos=True)
    for index, length in enumerate(settings.prompt_lengths):
        prompt = torch.randint(0, engine.vocab_size, (length,), generator=generator).tolist()
        engine.add_request(index, prompt, sampling)
    return engine


def _timed_step(engine: RolloutEngine) -> dict[str, Any]:
    """Seconds it took, of processor time too, and whether some row evicted in it."""
    before = _evictions(engine)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cpu, start = time.process_time(), time.perf_counter()
    engine.step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "evicting": _evictions(engine) > before}


def _evictions(engine: RolloutEngine) -> int:
    return sum(sequence.num_evictions for sequence in engine.running)
