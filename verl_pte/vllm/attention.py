"""Attention over the blocks a request still holds, on any of vLLM's attention backends.

vLLM's block tables are indexed by position, with null blocks where tokens were evicted. A backend's kernels would
attend to those. So each backend's metadata builder is subclassed, the way vLLM's own chunked attention does it: it gets
a block table without the gap, and lengths without the evicted tokens. Slot mappings and positions stay absolute: a
key carries its position since RoPE, and the order of keys is kept, so causal masks stay right too.

Run on the CPU backend. For FlashAttention, FlashInfer and Triton the same builder is used; it was written against
vLLM 0.27.1's source and its metadata is tested, but it has not run on a GPU. CUDA graphs are piecewise: attention
itself runs outside them, because the compacted tables are new tensors each step.

Shape suffixes: B requests, P blocks, E evicted tokens, K kv heads x head_dim, D head_dim, H kv heads, T tokens of a
block.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.utils.math_utils import cdiv
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    subclass_attention_backend,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, get_kv_quant_mode

from verl_pte.vllm.kv_cache import ThoughtSpec
from verl_pte.vllm.settings import Settings

# Backends whose layout `read_blocks` knows. On GPUs all three pack K and V side by side.
PACKED_LAYOUT = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


class Gaps:
    """Where the requests of the batch under way have a gap: on the host, and a copy on the device.

    Rows are those of vLLM's input batch; the columns of both tensors are the blocks before the gap, the blocks in it,
    and the tokens in it. One object is shared by all layers of a model.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        # On GPUs pinned, so that the copy does not wait for the step before; vLLM waits for copies before it prepares
        # another step.
        pin = is_pin_memory_available()
        self.host_B3 = torch.zeros(max_num_seqs, 3, dtype=torch.int32, device="cpu", pin_memory=pin)
        self.device_B3 = torch.zeros(max_num_seqs, 3, dtype=torch.int32, device=device)

    def set(self, rows: list[tuple[int, int, int]]) -> None:
        """Describe a batch; rows behind it have no gap."""
        self.host_B3.zero_()
        if rows:
            self.host_B3[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        self.device_B3.copy_(self.host_B3, non_blocking=True)


def without_gaps(metadata: CommonAttentionMetadata, gaps: Gaps, block_size: int) -> CommonAttentionMetadata:
    """`metadata` as a cache without evicted blocks would have it; the same object where nothing is evicted."""
    size = len(metadata.seq_lens)
    if not gaps.host_B3[:size, 2].any():
        return metadata
    first_B1, length_B1, evicted_B1 = gaps.device_B3[:size].split(1, dim=1)
    seq_lens_B = metadata.seq_lens - evicted_B1[:, 0]
    on_host_B = metadata.seq_lens_cpu_upper_bound
    assert on_host_B is not None, "vLLM's model runner gives the lengths on the host"
    on_host_B = on_host_B[:size] - gaps.host_B3[:size, 2]
    max_seq_len = int(on_host_B.max())
    table_BP = metadata.block_table_tensor
    columns = torch.arange(cdiv(max_seq_len, block_size), device=table_BP.device)[None]
    columns = torch.where(columns < first_B1, columns, columns + length_B1).clamp_(max=table_BP.shape[1] - 1)
    return metadata.replace(
        block_table_tensor=table_BP.gather(1, columns),
        seq_lens=seq_lens_B,
        seq_lens_cpu_upper_bound=on_host_B,
        max_seq_len=max_seq_len,
        _seq_lens_cpu=None if metadata._seq_lens_cpu is None else on_host_B,
        _num_computed_tokens_cpu=None,
        _num_computed_tokens_cache=None,
    )


@functools.lru_cache
def bounded_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """`base` with a metadata builder that leaves evicted blocks out."""
    base_builder: Any = base.get_builder_cls()

    class BoundedBuilder(base_builder):
        supports_update_block_table = False

        @classmethod
        def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
            return AttentionCGSupport.NEVER

        def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
            return False  # a common prefix is measured in positions

        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            layers = self.vllm_config.compilation_config.static_forward_context
            gaps = layers[self.layer_names[0]].gaps
            return super().build(0, without_gaps(common_attn_metadata, gaps, self.kv_cache_spec.block_size), fast_build)

    return subclass_attention_backend("Bounded", base, BoundedBuilder)


class BoundedAttention(Attention):
    """vLLM's attention layer with a bounded backend and a ThoughtSpec.

    Attributes:
        gaps: of the batch under way; set by the model that owns the layer.
    """

    gaps: Gaps

    @classmethod
    def in_place_of(
        cls, layer: Attention, vllm_config: VllmConfig, quant_config: QuantizationConfig | None
    ) -> "BoundedAttention":
        """A bounded layer under the name of one vLLM has built, which it takes out of vLLM's register."""
        assert layer.sliding_window is None, "check_architecture refuses models with a window of their own"
        del vllm_config.compilation_config.static_forward_context[layer.layer_name]
        cache_config: CacheConfig = vllm_config.cache_config
        return cls(
            layer.num_heads,
            layer.head_size,
            layer.impl.scale,
            num_kv_heads=layer.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=layer.layer_name,
            attn_backend=bounded_backend(layer.attn_backend),
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = self.attn_backend.get_name()
        if name not in (*PACKED_LAYOUT, "CPU_ATTN"):
            raise ValueError(
                f"attention backend {name}: PTE cannot read its cache; use one of {', '.join(PACKED_LAYOUT)} "
                "(attention_backend)"
            )
        if getattr(self.impl, "isa", None) == "amx":
            raise ValueError(
                "block_size: must be 16 in bfloat16 on a CPU with AMX, whose kernels order larger blocks otherwise"
            )

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """What the layer's cache needs."""
        settings = Settings.of(vllm_config)
        return ThoughtSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            schedule=settings.pte.schedule(),
            max_prompt_length=settings.max_prompt_length,
        )

    def read_blocks(self, blocks_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in these blocks, in order, heads side by side: [B, E, K] each."""
        read = read_cpu_blocks if self.attn_backend.get_name() == "CPU_ATTN" else read_packed_blocks
        return read(self.kv_cache, blocks_BP)


def read_packed_blocks(cache: Tensor, blocks_BP: Tensor) -> tuple[Tensor, Tensor]:
    """From the GPU backends' layout [blocks, H, T, 2 D]: each token's key, then its value."""
    kv_BPHTD = cache[blocks_BP]
    head_dim = cache.shape[-1] // 2
    out = [half.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2) for half in kv_BPHTD.split(head_dim, dim=-1)]
    return out[0], out[1]


def read_cpu_blocks(cache: Tensor, blocks_BP: Tensor) -> tuple[Tensor, Tensor]:
    """From the CPU backend's layout: [blocks, H, 2, T D], a head's keys transposed [D, T], then its values [T, D]."""
    num_heads, num_tokens, double_head_dim = cache.shape[1:]
    head_dim = double_head_dim // 2
    halves = cache[blocks_BP].reshape(*blocks_BP.shape, num_heads, 2, num_tokens * head_dim)
    k_BPHDT = halves[..., 0, :].unflatten(-1, (head_dim, num_tokens))
    v_BPHTD = halves[..., 1, :].unflatten(-1, (num_tokens, head_dim))
    k_BPTHD, v_BPTHD = k_BPHDT.permute(0, 1, 4, 2, 3), v_BPHTD.permute(0, 1, 3, 2, 4)
    return k_BPTHD.flatten(3).flatten(1, 2), v_BPTHD.flatten(3).flatten(1, 2)
