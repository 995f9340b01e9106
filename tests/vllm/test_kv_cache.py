"""Blocks a request holds in vLLM, against the schedule's own definition of what is visible."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from verl_pte.core.schedule import Schedule
from verl_pte.vllm.kv_cache import ThoughtCacheManager, ThoughtSpec


def spec(schedule: Schedule, max_prompt_length: int | None = None) -> ThoughtSpec:
    return ThoughtSpec(
        block_size=schedule.block_size,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        schedule=schedule,
        max_prompt_length=max_prompt_length,
    )


def manager(schedule: Schedule, num_blocks: int) -> ThoughtCacheManager:
    pool = BlockPool(num_blocks, enable_caching=False, hash_block_size=schedule.block_size)
    return ThoughtCacheManager(
        spec(schedule),
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=schedule.block_size,
    )


def test_vllm_finds_the_manager():
    assert KVCacheSpecRegistry.get_manager_class(spec(Schedule(32))) is ThoughtCacheManager


@given(
    window=st.integers(1, 6),
    fraction=st.floats(0.05, 0.95),
    prompt_len=st.integers(1, 70),
    num_tokens=st.integers(1, 250),
    step=st.integers(1, 40),
)
def test_held_blocks_are_the_visible_ones(window, fraction, prompt_len, num_tokens, step):
    """Steps of any length that end at boundaries, as the scheduler makes them; then everything is given back."""
    schedule = Schedule(16 * window, fraction, 16)
    blocks = manager(schedule, 60)
    free = blocks.block_pool.get_num_free_blocks()
    start, total = 0, prompt_len + num_tokens
    limit = schedule.blocks(schedule.cache_limit(prompt_len))
    while start < total:
        boundary = schedule.next_boundary(prompt_len, start)
        end = min(start + step, boundary, total)
        blocks.remove_skipped_blocks("r", start, prompt_len)
        blocks.allocate_new_blocks("r", end, end)
        held = {i for i, block in enumerate(blocks.req_to_blocks["r"]) if not block.is_null}
        seen = {k // 16 for k in range(end) if schedule.is_visible(prompt_len, end - 1, k)}
        assert held == seen and len(held) <= limit
        assert blocks.block_pool.get_num_free_blocks() == free - len(held)
        start = end
    holding = blocks.holdings["r"]
    assert holding.peak_blocks <= limit and holding.peak_tokens <= schedule.cache_limit(prompt_len)
    blocks.free("r")
    assert blocks.block_pool.get_num_free_blocks() == free and holding.evicted == 0


@pytest.mark.parametrize(
    ("window", "max_prompt_length", "max_model_len", "blocks"),
    [
        (64, 40, 8192, 3 + 4),  # the prompt's 3 blocks and the window's
        (64, None, 8192, 512),  # a prompt may be as long as the model allows
        (None, 40, 8192, 512),  # full cache
        (4096, 40, 256, 16),  # a window no sequence fills
    ],
)
def test_memory_vllm_asks_for_at_start_up(window, max_prompt_length, max_model_len, blocks):
    asked = spec(Schedule(window), max_prompt_length)
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    assert asked.max_blocks(max_model_len) == blocks
    assert asked.max_memory_usage_bytes(config) == (blocks + 1) * 2 * 16 * 2 * 32 * 4  # vLLM's null block is one more
    assert asked.merge([asked, asked]) == asked
