"""The rollout engines behind one face: prepare for a length, generate, say what each sequence held.

Both generate greedily and past end-of-sequence tokens, exactly as many tokens as asked. Left out: timing (worker.py).
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from verl_pte.bench.models import random_prompts
from verl_pte.bench.settings import Settings
from verl_pte.core.attention import NEEDS_GPU


class Held(NamedTuple):
    """What one sequence generated, and the most its cache held."""

    tokens: int
    evictions: int
    peak_tokens: int
    peak_blocks: int | None  # None: the engine has no blocks
    bytes: float  # keys, values and thought state
    preemptions: int


class Engine(Protocol):
    """One method, ready to generate.

    Attributes:
        device: where it runs.
        allocated: bytes of the caches and states of all sequences together, allocated whether used or not.
    """

    device: str
    allocated: int

    def prepare(self, length: int) -> None:
        """What a length needs and is no part of generating."""

    def generate(self, length: int) -> list[Held]:
        """Run all sequences at once."""


def make_engine(settings: Settings, method: str, models: Path) -> Engine:
    """The engine of a method, with weights from `models.make_models`."""
    return (VllmEngine if settings.engine == "vllm" else NativeEngine)(settings, method, models)


def native_device(settings: Settings) -> str:
    """Where the native engine runs. Raises ValueError if that is a GPU and there is none."""
    place = settings.device
    if place == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return place


def check_attention(settings: Settings, gradients: bool) -> None:
    """Raises ValueError if the attention asked for does not run on the device, or has no gradients there."""
    name = settings.attention
    if native_device(settings) == "cpu" and name in NEEDS_GPU and (gradients or name != "flex_attention"):
        raise ValueError(f"--attention {name}: needs a GPU{' for gradients' if name == 'flex_attention' else ''}")


def device_name(place: str) -> str:
    """For reports."""
    return torch.cuda.get_device_name() if place == "cuda" else place


class VllmEngine:
    """vLLM in this process. Its block pool holds all sequences at their bound and no more: none is preempted."""

    def __init__(self, settings: Settings, method: str, models: Path) -> None:
        from vllm import LLM
        from vllm.platforms import current_platform

        from verl_pte.vllm import engine_args

        config, longest = settings.method(method), max(settings.lengths)
        blocks = config.schedule().blocks(settings.most_tokens(method, longest))
        base, adapter = str(models / "base"), str(models / method)
        self.llm = LLM(
            **engine_args(base, adapter=adapter, max_prompt_length=settings.prompt_length),
            dtype=settings.dtype,
            max_model_len=settings.prompt_length + longest,
            max_num_seqs=settings.num_seqs,
            num_gpu_blocks_override=settings.num_seqs * blocks + 1,  # one is vLLM's null block
            gpu_memory_utilization=0.3,  # three engines share a GPU; vLLM asks whether this much is free
            enable_prefix_caching=False,  # or repeats would find their prompts computed
            enforce_eager=settings.eager,
            skip_tokenizer_init=True,
            seed=settings.seed,
        )
        cache = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        (group,) = cache.kv_cache_groups
        self.block_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        state_layers = 0 if config.freeze_state else len(group.layer_names)
        self.state_bytes = state_layers * config.rank**2 * torch.float32.itemsize
        self.allocated = cache.num_blocks * self.block_bytes + (settings.num_seqs + 1) * self.state_bytes
        vocab_size = self.llm.model_config.hf_config.vocab_size
        self.prompts: Any = [{"prompt_token_ids": prompt} for prompt in random_prompts(settings, vocab_size)]
        self.device = current_platform.get_device_name() if current_platform.is_cuda() else current_platform.device_type

    def prepare(self, length: int) -> None:
        """Nothing: one engine serves all lengths."""

    def generate(self, length: int) -> list[Held]:
        """Run all sequences at once."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        return [self._held(output) for output in self.llm.generate(self.prompts, sampling, use_tqdm=False)]

    def _held(self, output: Any) -> Held:
        facts = output.kv_transfer_params["pte"]
        return Held(
            tokens=len(output.outputs[0].token_ids),
            evictions=facts["num_evictions"],
            peak_tokens=facts["peak_cache_tokens"],
            peak_blocks=facts["peak_cache_blocks"],
            bytes=facts["peak_cache_blocks"] * self.block_bytes + self.state_bytes,
            preemptions=facts["num_preemptions"],
        )


class NativeEngine:
    """The native engine, made anew for each length: it allocates its cache once, for the longest response."""

    def __init__(self, settings: Settings, method: str, models: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        import verl_pte.peft  # noqa: F401  registers the method with PEFT

        place = native_device(settings)
        self.settings, self.dtype = settings, getattr(torch, settings.dtype)
        base = AutoModelForCausalLM.from_pretrained(
            models / "base", dtype=self.dtype, attn_implementation=settings.attention
        )
        self.model = PeftModel.from_pretrained(base, models / method).to(place)
        self.prompts = random_prompts(settings, base.config.vocab_size)
        self.engine: Any = None
        self.allocated = 0
        self.device = device_name(place)

    def prepare(self, length: int) -> None:
        """Allocate the cache."""
        from verl_pte.engine import RolloutEngine

        self.engine = None  # the last one goes first
        self.engine = RolloutEngine(
            self.model,
            max_num_seqs=self.settings.num_seqs,
            max_prompt_length=self.settings.prompt_length,
            max_response_length=length,
            dtype=self.dtype,
        )
        self.allocated = self.engine.cache_bytes

    def generate(self, length: int) -> list[Held]:
        """Run all sequences at once."""
        from verl_pte.engine import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        row = self.allocated / self.settings.num_seqs
        return [
            Held(len(output.token_ids), output.num_evictions, output.peak_cache_tokens, None, row, 0)
            for output in self.engine.generate(self.prompts, sampling)
        ]
