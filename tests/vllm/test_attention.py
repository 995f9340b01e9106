"""What attention backends are told about a cache with gaps, and what is read back from it.

The metadata builders of FlashAttention and Triton are vLLM's real ones, built on a CPU; their kernels need a GPU.
FlashInfer cannot be imported here: of it, the fields its builder reads are checked.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

from verl_pte.core.schedule import Schedule
from verl_pte.vllm.attention import Gaps, bounded_backend, read_cpu_blocks, read_packed_blocks, without_gaps
from verl_pte.vllm.kv_cache import ThoughtSpec

SCHEDULE = Schedule(window=64, evict_fraction=0.25, block_size=16)
PROMPTS, POSITIONS = (20, 5, 33), (140, 30, 112)  # two of them behind evictions; the last on a boundary
BLOCKS = 16  # columns of the block table


def metadata() -> CommonAttentionMetadata:
    """One token of each of three sequences; block table entries say whose they are and which: 100 r + index."""
    seq_lens = torch.tensor([p + 1 for p in POSITIONS], dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=torch.arange(4, dtype=torch.int32),
        query_start_loc_cpu=torch.arange(4, dtype=torch.int32),
        seq_lens=seq_lens,
        _seq_lens_cpu=seq_lens.clone(),
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=3,
        num_actual_tokens=3,
        max_query_len=1,
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=(100 * torch.arange(3)[:, None] + torch.arange(BLOCKS)).int(),
        slot_mapping=torch.tensor(POSITIONS),
    )


def gaps() -> Gaps:
    """The schedule's, for these sequences."""
    out, rows = Gaps(4, torch.device("cpu")), []
    for prompt_len, position in zip(PROMPTS, POSITIONS, strict=True):
        gone = SCHEDULE.evicted_before(prompt_len, position)
        rows.append((SCHEDULE.blocks(SCHEDULE.pinned(prompt_len)), SCHEDULE.blocks(gone), gone))
    out.set(rows)
    return out


def visible_blocks() -> list[list[int]]:
    """Table entries of the blocks each sequence sees, from the schedule's definition of visibility."""
    out = []
    for r, (prompt_len, position) in enumerate(zip(PROMPTS, POSITIONS, strict=True)):
        seen = [k for k in range(position + 1) if SCHEDULE.is_visible(prompt_len, position, k)]
        out.append(sorted({100 * r + k // 16 for k in seen}))
    return out


def check(found) -> None:
    """Block tables and lengths hold what is visible, and nothing else."""
    for r, blocks in enumerate(visible_blocks()):
        tokens = sum(SCHEDULE.is_visible(PROMPTS[r], POSITIONS[r], k) for k in range(POSITIONS[r] + 1))
        table = found.block_table if hasattr(found, "block_table") else found.block_table_tensor
        assert table[r, : len(blocks)].tolist() == blocks
        assert int(found.seq_lens[r]) == tokens
    assert found.max_seq_len == int(found.seq_lens.max())


def test_compacted_metadata():
    found = without_gaps(metadata(), gaps(), 16)
    check(found)
    assert SCHEDULE.num_evictions(20, 141) and not SCHEDULE.num_evictions(5, 31), "some sequences have gaps, not all"
    # FlashInfer plans on the host.
    assert found.seq_lens_cpu.tolist() == found.seq_lens_cpu_upper_bound.tolist() == found.seq_lens.tolist()
    assert found.num_computed_tokens_cpu.tolist() == (found.seq_lens - 1).tolist()
    # Where tokens are written does not change.
    assert found.slot_mapping.tolist() == list(POSITIONS)


def test_metadata_without_evictions_is_passed_on():
    whole = metadata()
    assert without_gaps(whole, Gaps(4, torch.device("cpu")), 16) is whole


def build(backend, num_heads=4):
    """The metadata a bounded backend's real builder makes."""
    spec = ThoughtSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float16, schedule=SCHEDULE)
    bounded = bounded_backend(backend)
    model_config = SimpleNamespace(
        get_num_attention_heads=lambda _: num_heads,
        get_num_kv_heads=lambda _: 2,
        get_head_size=lambda: 64,
        rswa_window=None,
        dtype=torch.float32,
    )
    from vllm.config import CUDAGraphMode

    layer = SimpleNamespace(gaps=gaps(), num_heads=num_heads)
    config = SimpleNamespace(
        model_config=model_config,
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=16),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=32),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.PIECEWISE,
            max_cudagraph_capture_size=None,
            static_forward_context={"layer": layer},
        ),
    )
    builder = bounded.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
    assert builder.get_cudagraph_support(config, spec) is AttentionCGSupport.NEVER
    assert bounded.get_name() == backend.get_name() and issubclass(bounded, backend)
    return builder.build(common_prefix_len=16, common_attn_metadata=metadata())


@pytest.mark.parametrize("backend", [FlashAttentionBackend, TritonAttentionBackend, CPUAttentionBackend])
def test_builders_of_real_backends(backend, monkeypatch):
    if backend is TritonAttentionBackend:  # counts heads over the registered layers, ours is a stand-in
        monkeypatch.setattr(
            "vllm.v1.attention.backends.triton_attn.get_num_attention_heads_from_layers", lambda *_: None
        )
    found = build(backend)
    check(found)
    assert not getattr(found, "use_cascade", False), "a common prefix is measured in positions"


@pytest.mark.parametrize("block_size, isa", [(16, "vec16"), (32, "vec"), (64, "vec")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_what_the_cpu_kernel_wrote(block_size, isa, dtype):
    heads, head_dim, num_blocks = 2, 64, 6
    torch.manual_seed(0)
    cache = torch.zeros(num_blocks, heads, block_size, 2 * head_dim, dtype=dtype)
    blocks = [4, 1, 5]
    n = len(blocks) * block_size
    key, value = (torch.randn(n, heads, head_dim).to(dtype) for _ in range(2))
    slots = torch.cat([torch.arange(b * block_size, (b + 1) * block_size) for b in blocks])
    halves = cache.view(num_blocks, heads, 2 * block_size, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto")
    k, v = read_cpu_blocks(cache, torch.tensor([blocks, blocks[::-1]]))
    assert torch.equal(k[0], key.flatten(1)) and torch.equal(v[0], value.flatten(1))
    assert torch.equal(k[1, :block_size], key[-block_size:].flatten(1))


def test_reading_the_packed_layout_of_gpu_backends():
    """Written as FlashAttention's forward splits it: ``kv_cache.transpose(1, 2).split(head_size, -1)``."""
    heads, head_dim, size = 2, 8, 16
    cache = torch.zeros(6, heads, size, 2 * head_dim)
    key_cache, value_cache = cache.transpose(1, 2).split(head_dim, dim=-1)  # [blocks, tokens, heads, head_dim]
    key_cache.copy_(torch.randn_like(key_cache))
    value_cache.copy_(torch.randn_like(value_cache))
    k, v = read_packed_blocks(cache, torch.tensor([[3, 1]]))
    assert torch.equal(k[0], key_cache[[3, 1]].reshape(2 * size, heads * head_dim))
    assert torch.equal(v[0], value_cache[[3, 1]].reshape(2 * size, heads * head_dim))
