"""Memory of one device in each phase of a training step: rollout, and the learner's update.

What is added up: weights, adapter, optimizer and gathered layers by their numbers (FSDP2 as verl sets it up: float32
shards, computation in 16 bits); cache, activations and logits as counted on the meta device (count.py). vLLM takes the
share it is given. Left out: a critic (PPO). `RESERVE` stands for kernels' workspaces, CUDA's own memory and
fragmentation.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from verl_pte.config import PTEConfig
from verl_pte.plan import count

GIB = 2**30
RESERVE = 3 * GIB  # CUDA context, NCCL, workspaces, and what the allocator cannot hand out
_ADAM = 16  # bytes of a trained number: itself, its gradient and Adam's two, in float32
_SAMPLING = 3 * 4  # bytes of a logit while it is sampled from: float32 logits, their log-softmax, noise
ENGINES = ("native", "vllm")


@dataclass(frozen=True)
class PlanSettings:
    """One run, as far as memory is concerned. Raises ValueError naming the option.

    Attributes:
        config: the base's transformers config.
        pte: the method's settings.
        num_gpus: devices, all of one FSDP2 mesh.
        gpu_memory: of one, in GiB.
        prompt_length, response_length: the longest, in tokens.
        micro_batch: sequences replayed side by side.
        max_num_seqs: sequences decoded at once on a device.
        engine: of the rollouts, native or vllm.
        tensor_parallel: of vLLM.
        gpu_memory_utilization: vLLM's share of a device.
        param_offload: weights and optimizer are on the host while rollouts run.
    """

    config: Any
    pte: PTEConfig
    num_gpus: int = 8
    gpu_memory: float = 80.0
    prompt_length: int = 1024
    response_length: int = 3072
    micro_batch: int = 4
    max_num_seqs: int = 64
    engine: str = "native"
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.5
    param_offload: bool = False

    def __post_init__(self) -> None:
        names = ("num_gpus", "prompt_length", "response_length", "micro_batch", "max_num_seqs", "tensor_parallel")
        for name in names:
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require("gpu_memory", self.gpu_memory > 0, "must be a positive number of GiB")
        self._require("engine", self.engine in ENGINES, f"must be one of {', '.join(ENGINES)}")
        self._require("gpu_memory_utilization", 0 < self.gpu_memory_utilization < 1, "must be between 0 and 1")
        if self.engine == "native":
            self._require("tensor_parallel", self.tensor_parallel == 1, "must be 1, the native engine is data parallel")
        self._require(
            "tensor_parallel", self.num_gpus % self.tensor_parallel == 0, f"must divide --gpus {self.num_gpus}"
        )
        limit, length = self.config.max_position_embeddings, self.prompt_length + self.response_length
        if length > limit:
            raise ValueError(
                f"--prompt-length {self.prompt_length} + --response-length {self.response_length} = {length}: exceeds "
                f"the model's max_position_embeddings={limit}"
            )

    def _require(self, name: str, right: bool, what: str) -> None:
        if not right:
            option = "gpus" if name == "num_gpus" else name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(self, name)}: {what}")


@dataclass(frozen=True)
class Part:
    """Bytes of one device, and what they are."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Phase:
    """What is on a device at the same time."""

    name: str
    parts: list[Part]

    @property
    def bytes(self) -> int:
        """Sum of the parts."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Phases of a step, and numbers worth knowing beside them."""

    settings: PlanSettings
    parameters: count.Parameters
    phases: list[Phase]
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether every phase fits the device, and vLLM's share a sequence."""
        return self.facts.get("sequences_that_fit_vllm", 1) >= 1 and all(
            phase.bytes <= self.settings.gpu_memory * GIB for phase in self.phases
        )


def estimate(settings: PlanSettings, progress: Callable[[str], None] = lambda what: None) -> Plan:
    """Count and add up. Takes seconds to a minute; `progress` is told what is counted."""
    s, dtype = settings, torch.bfloat16
    lengths = (s.prompt_length, s.response_length)
    progress("parameters")
    numbers = count.parameters(s.config, s.pte)
    progress("rollout")
    row_bytes = count.cache_bytes(s.config, s.pte, 1, *lengths, dtype)
    held, token = s.pte.schedule().cache_limit(s.prompt_length) or sum(lengths), count.token_bytes(s.config, dtype)
    shards = Part("learner's shards", (4 * numbers.base + _ADAM * numbers.adapter) // s.num_gpus, "float32, with Adam")
    reserve = Part("reserve", RESERVE, "CUDA, NCCL, workspaces, fragmentation")
    weights = Part("rollout's weights", 2 * (numbers.base + numbers.adapter) // s.tensor_parallel, "bfloat16")
    waiting = [] if s.param_offload else [shards]
    facts: dict[str, float] = {
        "cache_bytes_per_sequence": row_bytes,
        "full_cache_bytes_per_sequence": sum(lengths) * token,
    }
    if s.engine == "native":
        cache = count.cache_bytes(s.config, s.pte, s.max_num_seqs, *lengths, dtype)
        moving = count.rollout_bytes(s.config, s.pte, s.max_num_seqs, *lengths, dtype)
        sampling = _SAMPLING * s.max_num_seqs * s.config.vocab_size
        rollout = [
            weights,
            Part("cache and states", cache, f"{s.max_num_seqs} sequences of {held} tokens at most"),
            Part("activations", moving + sampling, "prefill of all rows, or a decode step; sampling"),
        ]
    else:
        share = int(s.gpu_memory_utilization * s.gpu_memory * GIB)
        fitting = max(0, share - weights.bytes - RESERVE) // (held * token // s.tensor_parallel)
        facts["sequences_that_fit_vllm"] = fitting
        rollout = [Part("vLLM", share, f"its share; room for about {fitting} sequences of {held} tokens")]
    progress("learner")
    peak, store = count.replay_bytes(s.config, s.pte, s.micro_batch, *lengths, dtype)
    on_host = s.pte.kv_store == "host"
    asleep = [weights] if s.engine == "native" else []  # vLLM sleeps, its weights on the host
    learner = [
        *asleep,
        shards,
        Part("gathered layers", 2 * (numbers.root + 2 * numbers.layer), "what FSDP2 holds whole, bfloat16"),
        Part("K/V store", 0 if on_host else store, "on the host" if on_host else f"{s.micro_batch} whole sequences"),
        Part("activations and logits", peak - store, f"one chunk of {s.micro_batch} sequences, gradients of its past"),
    ]
    phases = [Phase("rollout", [*rollout, *waiting, reserve]), Phase("learner", [*learner, reserve])]
    return Plan(settings, numbers, phases, facts)
