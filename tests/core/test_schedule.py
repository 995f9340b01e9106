"""The schedule against a simulated cache, and its properties over random settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_pte.core.schedule import Schedule

blocks = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def schedules(draw):
    block = draw(blocks)
    return Schedule(block * draw(st.integers(1, 12)), draw(st.floats(0.01, 0.99)), block)


def simulate(schedule: Schedule, prompt_len: int, total: int) -> list[set[int]]:
    """What each token sees, from the words of the definition: the oldest C unpinned leave when number W, W+C, ...
    arrives.
    """
    pinned = -(-prompt_len // schedule.block_size) * schedule.block_size
    held: set[int] = set()
    seen = []
    for position in range(total):
        evictable = sorted(p for p in held if p >= pinned)
        arrived = position - pinned  # unpinned tokens that came before
        if arrived >= schedule.window and (arrived - schedule.window) % schedule.chunk == 0:
            held -= set(evictable[: schedule.chunk])
        held.add(position)
        seen.append(set(held))
    return seen


@given(schedules(), st.integers(1, 70), st.integers(0, 300))
def test_visible_tokens_are_those_of_a_simulated_cache(schedule, prompt_len, response_len):
    seen = simulate(schedule, prompt_len, prompt_len + response_len)
    for query, held in enumerate(seen):
        assert {k for k in range(query + 1) if schedule.is_visible(prompt_len, query, k)} == held
        assert schedule.visible_before(prompt_len, query) == sorted(held - {query})


@given(schedules(), st.integers(1, 70), st.integers(0, 300))
def test_never_more_than_pinned_plus_window(schedule, prompt_len, response_len):
    limit = schedule.pinned(prompt_len) + schedule.window
    assert schedule.cache_limit(prompt_len) == limit
    for query in range(prompt_len + response_len):
        assert sum(schedule.is_visible(prompt_len, query, k) for k in range(query + 1)) <= limit


@given(schedules(), st.integers(1, 70), st.integers(1, 300))
def test_a_token_is_visible_from_arrival_until_its_eviction_and_never_again(schedule, prompt_len, response_len):
    total = prompt_len + response_len
    evicted = {}
    for position in range(total):
        for gone in range(*(schedule.evicted_at(prompt_len, position) or (0, 0))):
            assert gone not in evicted, "evicted twice"
            evicted[gone] = position
    for key in range(total):
        for query in range(key, total):
            assert schedule.is_visible(prompt_len, query, key) == (query < evicted.get(key, total))
    assert all(key >= schedule.pinned(prompt_len) >= prompt_len for key in evicted)


@given(schedules(), st.integers(1, 70), st.integers(0, 300), st.none() | st.integers(1, 50))
def test_chunks_tile_the_sequence_and_stop_at_boundaries(schedule, prompt_len, response_len, max_tokens):
    total = prompt_len + response_len
    chunks = schedule.chunks(prompt_len, total, max_tokens)
    assert [c.start for c in chunks] == [0, *(c.end for c in chunks[:-1])] and chunks[-1].end == total
    for chunk in chunks:
        assert 0 < chunk.end - chunk.start <= (max_tokens or total)
        assert {schedule.segment(prompt_len, p) for p in range(chunk.start, chunk.end)} == {chunk.segment}
        assert chunk.evicted == schedule.evicted_at(prompt_len, chunk.start)
        assert all(schedule.evicted_at(prompt_len, p) is None for p in range(chunk.start + 1, chunk.end))
    assert sum(c.evicted is not None for c in chunks) == schedule.num_evictions(prompt_len, total)
    assert max_tokens is not None or [c.segment for c in chunks] == list(range(len(chunks)))


@given(schedules(), st.integers(1, 70), st.integers(0, 300))
def test_evictions_are_whole_aligned_blocks_at_the_announced_boundary(schedule, prompt_len, position):
    assert schedule.chunk % schedule.block_size == 0 and 0 < schedule.chunk <= schedule.window
    assert schedule.chunk - schedule.block_size < schedule.evict_fraction * schedule.window <= schedule.chunk
    boundary = schedule.next_boundary(prompt_len, position)
    assert boundary > position and boundary == next(
        p for p in range(position + 1, boundary + 1) if schedule.evicted_at(prompt_len, p) is not None
    )
    lo, hi = schedule.evicted_at(prompt_len, boundary)
    assert hi - lo == schedule.chunk and lo % schedule.block_size == 0


@given(blocks, st.integers(1, 70), st.integers(1, 500))
def test_no_window_never_evicts(block, prompt_len, total):
    schedule = Schedule(None, 0.25, block)
    assert schedule.num_evictions(prompt_len, total) == 0
    assert schedule.next_boundary(prompt_len, total) is None and schedule.evicted_at(prompt_len, total) is None
    assert schedule.is_visible(prompt_len, total, 0) and not schedule.is_visible(prompt_len, 0, 1)
    assert schedule.cache_limit(prompt_len) is None
    assert schedule.visible_before(prompt_len, total) == list(range(total))
    assert Schedule(block * 2, 0.25, block).full() == schedule
    assert [(c.start, c.end) for c in schedule.chunks(prompt_len, total)] == [(0, total)]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        (dict(window=24, block_size=16), "window=24: must be a multiple of block_size=16, e.g. 16 or 32"),
        (dict(window=0), "window=0"),
        (dict(window=True), "window=True"),
        (dict(window=16, evict_fraction=0.0), "evict_fraction=0.0"),
        (dict(window=16, evict_fraction=1.0), "evict_fraction=1.0"),
        (dict(window=16, block_size=0), "block_size=0"),
    ],
)
def test_bad_settings_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        Schedule(**kwargs)


def test_bad_chunk_cap_is_refused():
    with pytest.raises(ValueError, match="max_tokens=0"):
        Schedule(16).chunks(4, 8, 0)
