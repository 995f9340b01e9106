"""The KV cache of a PTE model in vLLM: which blocks a request may hold, and for how long.

`ThoughtSpec` is what the attention layers report: it sizes a request at its bound, pinned + window, so vLLM admits a
block pool smaller than ``max_model_len``. `ThoughtCacheManager` gives blocks back when the schedule evicts them. vLLM
leaves a null block in their place, so a block's index in the table stays its position, and slot mappings need no
change. Only prompt blocks enter the prefix cache: thought tokens' keys depend on a state that is not part of any hash.

Left out: when the manager is asked (scheduler.py), and reading evicted keys before they are overwritten (states.py).
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from verl_pte.core.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class ThoughtSpec(FullAttentionSpec):
    """Full attention over a bounded set of blocks.

    Attributes:
        schedule: when what is evicted.
        max_prompt_length: longest prompt, in tokens; None: max_model_len.
    """

    schedule: Schedule
    max_prompt_length: int | None = None

    def max_blocks(self, max_model_len: int) -> int:
        """Most blocks one request ever holds."""
        limit = self.schedule.cache_limit(self.max_prompt_length or max_model_len)
        return self.schedule.blocks(max_model_len if limit is None else min(max_model_len, limit))

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes one request may need, and the pool's null block, which no request can have."""
        return (self.max_blocks(vllm_config.model_config.max_model_len) + 1) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> "ThoughtSpec":
        """All layers of a model share one spec."""
        assert all(spec == specs[0] for spec in specs), "the layers of a PTE model have one KV cache spec"
        return specs[0]


@dataclass
class Holding:
    """What one request holds and held."""

    evicted: int = 0  # tokens whose blocks were given back
    peak_tokens: int = 0
    peak_blocks: int = 0


class ThoughtCacheManager(FullAttentionManager):
    """Frees evicted blocks; remembers the most a request held."""

    kv_cache_spec: ThoughtSpec

    def __init__(self, kv_cache_spec: ThoughtSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.schedule = kv_cache_spec.schedule
        self.holdings: defaultdict[str, Holding] = defaultdict(Holding)

    def limit_admission(self, max_model_len: int) -> None:
        """A resumed request asks for its bound at most, not for blocks of all the tokens it has had."""
        self._max_admission_blocks_per_request = self.kv_cache_spec.max_blocks(max_model_len)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks of what has left once the token at `processed_computed_tokens` runs."""
        assert num_prompt_tokens is not None, "vLLM's scheduler passes the prompt's length"
        evicted = self.schedule.evicted_before(num_prompt_tokens, processed_computed_tokens)
        holding = self.holdings[request_id]
        if evicted > holding.evicted and request_id in self.req_to_blocks:
            pinned = self.schedule.pinned(num_prompt_tokens)
            self._remove_blocks_in_range(
                request_id, self.schedule.blocks(pinned), self.schedule.blocks(pinned + evicted)
            )
            holding.evicted = evicted

    def cache_blocks(self, request: Any, num_tokens: int, retention_interval: int | None = None) -> None:
        """Put full prompt blocks into the prefix cache, and no others."""
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), retention_interval)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """vLLM's allocation, and a look at what the request holds after it."""
        new = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        holding = self.holdings[request_id]
        held = len(self.req_to_blocks[request_id]) - self.schedule.blocks(holding.evicted)  # the others are null
        holding.peak_blocks = max(holding.peak_blocks, held)
        holding.peak_tokens = max(holding.peak_tokens, num_tokens - holding.evicted)
        return new

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """All blocks of a finished or preempted request; a preempted one starts again from nothing."""
        if request_id in self.holdings:
            self.holdings[request_id].evicted = 0
        return super().pop_blocks_for_free(request_id)


KVCacheSpecRegistry._ensure_registered()  # ours alone in the registry would keep vLLM from adding its own
KVCacheSpecRegistry.register(ThoughtSpec, ThoughtCacheManager, uniform_type_base_spec=FullAttentionSpec)
