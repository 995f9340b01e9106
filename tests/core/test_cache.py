"""The bounded cache on its own: masks, slots and rows, checked against the schedule."""

import pytest
import torch
from tiny import random_tokens, tiny_pte

from verl_pte.core.cache import BoundedCache
from verl_pte.core.schedule import Schedule
from verl_pte.peft.layer import PTELinear


def make_cache(schedule, rows=2, prompt=11):
    return BoundedCache(
        schedule,
        num_rows=rows,
        max_prompt_length=prompt,
        max_thoughts=64,
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        rank=3,
        dtype=torch.float32,
        device="cpu",
    )


def visible_positions(cache, row, mask_BNS, query):
    """Positions a query sees, read off the slots the mask opens."""
    return {int(cache.held_BS[row, s]) for s in mask_BNS[row, 0, query].nonzero()[:, 0]}


@pytest.mark.parametrize("schedule", [Schedule(8, 0.25, 4), Schedule(20, 0.33, 4), Schedule(None, 0.25, 4)], ids=str)
@torch.no_grad()
def test_every_query_sees_what_the_schedule_says(schedule):
    cache = make_cache(schedule)
    prompt_lens = [3, 11]
    plans = [schedule.chunks(p, p + 40, 5) for p in prompt_lens]
    for index in range(max(map(len, plans))):
        chunks = [plan[index] if index < len(plan) else None for plan in plans]
        evicting = [row for row, chunk in enumerate(chunks) if chunk is not None and chunk.evicted is not None]
        cache.evict(evicting, [chunks[row].evicted for row in evicting])
        mask = cache.begin(cache.plan(None, chunks, prompt_lens))
        assert mask.any(-1).all(), "a row of the softmax is empty"
        for row, (chunk, prompt_len) in enumerate(zip(chunks, prompt_lens, strict=True)):
            for i in range(mask.shape[2]):
                if chunk is None or i >= chunk.end - chunk.start:
                    assert mask[row, 0, i].nonzero().tolist() == [[cache.padding_slot]]
                    continue
                query = chunk.start + i
                expected = {k for k in range(query + 1) if schedule.is_visible(prompt_len, query, k)}
                assert visible_positions(cache, row, mask, i) == expected
        limits = [schedule.cache_limit(p) or 10**9 for p in prompt_lens]
        assert all(held <= limit for held, limit in zip(cache.occupancy().tolist(), limits, strict=True))


@pytest.mark.parametrize("schedule", [Schedule(8, 0.25, 4), Schedule(20, 0.33, 4), Schedule(None, 0.25, 4)], ids=str)
@torch.no_grad()
def test_every_decoded_token_sees_what_the_schedule_says(schedule):
    """Rows evict at different steps; row 1 idles, first empty and then with what a finished sequence left."""
    cache = make_cache(schedule, rows=3)
    prompt_lens = {0: 3, 2: 11}
    for row, prompt_len in prompt_lens.items():
        for chunk in schedule.chunks(prompt_len, prompt_len):
            cache.begin(cache.plan([row], [chunk], [prompt_len]))
    for step in range(45):
        if step == 20:
            cache.begin(cache.plan([1], schedule.chunks(7, 7), [7]))
        queries = {row: prompt_len + step for row, prompt_len in prompt_lens.items()}
        spans = {row: schedule.evicted_at(prompt_lens[row], query) for row, query in queries.items()}
        evicting = [row for row, span in spans.items() if span is not None]
        cache.evict(evicting, [spans[row] for row in evicting])
        mask = cache.begin_decode(torch.tensor([queries.get(row, -1) for row in range(3)]))
        assert cache.step.positions.tolist() == [[queries[0]], [0], [queries[2]]]
        assert mask[1, 0, 0, cache.padding_slot] and cache.step.slots[1] == cache.padding_slot
        for row, query in queries.items():
            expected = {k for k in range(query + 1) if schedule.is_visible(prompt_lens[row], query, k)}
            assert visible_positions(cache, row, mask, 0) == expected
            assert cache.held_BS[row, cache.step.slots[row]] == query
    assert cache.occupancy(torch.tensor([1])).tolist() == [7]


@torch.no_grad()
def test_rows_of_a_call_leave_the_others_alone():
    schedule = Schedule(8, 0.25, 4)
    cache = make_cache(schedule, rows=3)
    (chunk,) = schedule.chunks(5, 5)
    cache.begin(cache.plan([1], [chunk], [5]))
    assert cache.occupancy().tolist() == [0, 5, 0]
    cache.layers[0].update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    assert cache.layers[0].keys.sum((1, 2, 3)).tolist() == [0, 10, 0]
    cache.begin(cache.plan([1], schedule.chunks(3, 3), [3]))  # a new sequence takes the row
    assert cache.occupancy().tolist() == [0, 3, 0]


def test_states_are_lent_for_the_time_of_the_forward_only():
    model = tiny_pte("qwen2", 8)
    linears = [m for m in model.modules() if isinstance(m, PTELinear)]
    model(torch.tensor(random_tokens(5)))
    assert all(m.lent.state_BRR is None for m in linears), "a kept state keeps its graph alive"
    with pytest.raises(RuntimeError):
        model(torch.tensor(random_tokens(5)), attention_mask=torch.ones(1, 1, 7, 9, dtype=torch.bool))
    assert all(m.lent.state_BRR is None for m in linears), "also after a forward that failed"


def test_plain_forward_lends_the_initial_state():
    model = tiny_pte("qwen2", 8)
    seen = []
    linear = next(m for m in model.modules() if isinstance(m, PTELinear))
    linear.register_forward_pre_hook(lambda module, args: seen.append(module.lent.state_BRR))
    model(torch.tensor(random_tokens(5, 5)))
    encoder = model.get_base_model().model.layers[0].thought_encoder.encoder
    assert torch.equal(seen[0], encoder.initial_state(2))
