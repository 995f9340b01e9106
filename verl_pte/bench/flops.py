"""Floating-point operations of a rollout and of a learner step, counted by torch on the meta device.

What is counted is the project's own code with models that have shapes and no numbers: `BoundedCache` and the engine's
`Forward` for the rollout, `Replay` for the learner. For the learner of the full cache it is PEFT's LoRA on the plain
transformers model. One sequence each; torch's FlopCounterMode counts matrix products and attention, nothing else.

Three things keep thousands of steps and dozens of layers to seconds, none of them a formula of our own:

- Decoder layers are alike: models of 1, 2 and 3 layers are counted, the increments must be equal, and the rest of the
  model's layers are as many increments more.
- A decode step's count is affine in the keys it attends to: counted at three lengths, which must lie on a line.
- Calls of a replay with equal shapes are counted once.

Masked attention: FlopCounterMode counts every (query, key) pair of a product, seen or not. What one pair costs is found
by counting the same call with more keys, and `visible` leaves the unseen pairs out, as kernels do that skip them.

Left out: which methods and lengths, and how it is shown (flops_command.py).
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from verl_pte.config import PTEConfig
from verl_pte.core.cache import BoundedCache
from verl_pte.core.schedule import Schedule
from verl_pte.engine.forward import Forward
from verl_pte.learner import Replay
from verl_pte.learner.plan import Call, ReplayPlan
from verl_pte.peft import attach, head_dim
from verl_pte.plan.configs import meta_model

META = torch.device("meta")
_LAYERS = (1, 2, 3)
_THOUGHTS = (16, 32, 48)  # room in the caches with which decode steps are counted
_SIDE = 16  # tokens of the calls that show what a pair costs


@dataclass(frozen=True)
class Flops:
    """A count with every (query, key) pair of attention, and with those a query may see only."""

    counted: int
    visible: int

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.counted + other.counted, self.visible + other.visible)


def parameter_count(config: Any) -> int:
    """Parameters of a model of this transformers config."""
    return sum(p.numel() for p in _base(config, config.num_hidden_layers).parameters())


def rollout(config: Any, method: PTEConfig, prompt_length: int, response_length: int) -> Flops:
    """Prefill, and a decode step for every response token but the last, which is sampled and not run."""
    schedule, chunk_tokens = method.schedule(), method.chunk_tokens
    models = [_attached(config, n, method).eval() for n in _LAYERS]

    def decode(thoughts: int) -> int:
        return _all_layers(config, models, lambda model: _decode(model, _cache(model, method, 1, thoughts)))

    keys, at = [_cache(models[0], method, 1, n).num_slots for n in _THOUGHTS], [decode(n) for n in _THOUGHTS]
    per_key, rest = divmod(at[1] - at[0], keys[1] - keys[0])
    assert rest == 0 and at[2] - at[1] == per_key * (keys[2] - keys[1]), f"not affine in the keys: {at}"
    fixed, update = at[0] - per_key * keys[0], 0
    if schedule.window is not None:
        update = _all_layers(config, models, lambda model: _eviction(model, _cache(model, method, 1, 1, schedule)))

    steps, seen, evictions = 0, 0, 0
    for position in range(prompt_length, prompt_length + response_length - 1):
        steps += 1
        seen += position + 1 - schedule.evicted_before(prompt_length, position)
        evictions += schedule.evicted_at(prompt_length, position) is not None
    decoding = steps * fixed + seen * per_key + evictions * update

    prefill = _all_layers(config, models, lambda model: _prefill(model, method, prompt_length, chunk_tokens))
    slots = _cache(models[0], method, prompt_length, 1).num_slots
    pairs = sum(len(schedule.visible_before(prompt_length, q)) + 1 for q in range(prompt_length))
    unseen = prompt_length * slots - pairs
    return Flops(prefill, prefill - unseen * per_key) + Flops(decoding, decoding)


def replay(config: Any, method: PTEConfig, prompt_length: int, response_length: int) -> tuple[Flops, Flops]:
    """The learner's two passes: without gradients, and with (recomputation and backward)."""
    models = [_attached(config, n, method).train() for n in _LAYERS]
    schedule, chunk_tokens = method.schedule(), method.chunk_tokens
    prompts, responses = [torch.zeros(prompt_length, dtype=torch.long)], [torch.zeros(response_length).long()]
    by_layers = [_CountedReplay.run(model, prompts, responses, schedule, chunk_tokens) for model in models]

    # What a pair costs: two calls that differ in their past alone.
    short = [torch.zeros(_SIDE, dtype=torch.long)], [torch.zeros(2 * _SIDE + 1).long()]
    probes = [_CountedReplay.run(model, *short, Schedule(None), _SIDE) for model in models]

    plan = ReplayPlan(schedule, prompts, responses, chunk_tokens, torch.device("cpu"))
    unseen = sum(mask.numel() - int(mask.sum()) for mask in (plan.call(i).mask() for i in range(plan.num_calls)))
    out = []
    for which in ("forward_flops", "backward_flops"):
        total = _extended(config, [sum(getattr(count, which)) for count in by_layers])
        at = [_extended(config, [getattr(count, which)[i] for count in probes]) for i in (1, 2)]
        per_pair, rest = divmod(at[1] - at[0], _SIDE * _SIDE)
        assert rest == 0, f"not affine in the keys: {at}"
        out.append(Flops(total, total - unseen * per_pair))
    return out[0], out[1]


def full_cache_step(config: Any, rank: int, length: int, *, checkpointing: bool) -> Flops:
    """A forward and backward of plain LoRA over all tokens at once; with `checkpointing` layers run forward twice."""
    models = [_lora(config, n, rank, checkpointing) for n in _LAYERS]

    def step(length: int) -> int:
        return _all_layers(config, models, lambda model: lambda: _forward_backward(model, length))

    # A quadratic through zero, whose square term is attention's pairs.
    first, second, third = (step(n * _SIDE) for n in (1, 2, 3))
    per_pair, rest = divmod(second - 2 * first, 2 * _SIDE * _SIDE)
    assert rest == 0 and third == 3 * first + 6 * _SIDE * _SIDE * per_pair, f"not quadratic: {first}, {second}, {third}"
    total = step(length)
    unseen = length * length - length * (length + 1) // 2
    return Flops(total, total - unseen * per_pair)


# -- counting --------------------------------------------------------------------------------------------------


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _all_layers(config: Any, models: list[nn.Module], prepare: Callable[[nn.Module], Callable[[], Any]]) -> int:
    """Of what `prepare` returns, made for each model; preparing is not counted."""
    return _extended(config, [_flops(prepare(model)) for model in models])


def _extended(config: Any, by_layers: list[int]) -> int:
    """From the counts of 1, 2 and 3 layers to that of all."""
    one, two, three = by_layers
    assert three - two == two - one, f"layers differ: {by_layers}"
    return one + (config.num_hidden_layers - 1) * (two - one)


# -- what is run -----------------------------------------------------------------------------------------------


def _base(config: Any, layers: int) -> Any:
    # Lengths beyond the model's positions cost the same.
    return meta_model(config, layers, torch.bfloat16, max_position_embeddings=2**30)


def _attached(config: Any, layers: int, method: PTEConfig) -> Any:
    # A copy: PEFT writes the names of the linears it found into its config, here those of another number of layers.
    return attach(_base(config, layers), copy.deepcopy(method))


def _lora(config: Any, layers: int, rank: int, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    base = _base(config, layers)
    base.enable_input_require_grads()  # as verl does
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    if checkpointing:
        # Nothing random runs, and the meta device has no random state to preserve.
        keywords = {"use_reentrant": False, "preserve_rng_state": False}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)
    return model.train()


def _forward_backward(model: nn.Module, length: int) -> None:
    tokens = torch.zeros(1, length, dtype=torch.long, device=META)
    # A mask of its own spares transformers a look at its values. Its shape is what counts.
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=META)
    model(input_ids=tokens, attention_mask=mask, use_cache=False).logits.sum().backward()


def _cache(
    model: Any, method: PTEConfig, prompt_length: int, thoughts: int, schedule: Schedule | None = None
) -> BoundedCache:
    """Room for one sequence of `thoughts` tokens beyond its pinned ones, or of the window of a `schedule`."""
    config = model.config
    return BoundedCache(
        schedule or method.schedule().full(),
        num_rows=1,
        max_prompt_length=prompt_length,
        max_thoughts=thoughts,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        rank=method.rank,
        dtype=torch.bfloat16,
        adapter_dtype=torch.float32,  # what PEFT gives it
        device=META,
    )


def _prefill(model: Any, method: PTEConfig, prompt_length: int, chunk_tokens: int) -> Callable[[], None]:
    cache = _cache(model, method, prompt_length, 1)
    forward = Forward(model, cache, cuda_graph=False, compile=False)

    def run() -> None:
        for chunk in cache.schedule.chunks(prompt_length, prompt_length, chunk_tokens):
            tokens = torch.zeros(1, chunk.end - chunk.start, dtype=torch.long, device=META)
            step = cache.plan([0], [chunk], [prompt_length])
            # The engine copies an initial state that it made when it got its weights: nothing to count, and no way to
            # choose rows on the meta device.
            forward.prefill(tokens, dataclasses.replace(step, fresh=None))

    return run


def _decode(model: Any, cache: BoundedCache) -> Callable[[], Any]:
    """A step over all slots of a cache."""
    forward = Forward(model, cache, cuda_graph=False, compile=False)
    return lambda: forward.decode(torch.zeros(2, 1, dtype=torch.long, device=META))


def _eviction(model: Any, cache: BoundedCache) -> Callable[[], None]:
    """The oldest chunk leaves, and the states take it in."""
    Forward(model, cache, cuda_graph=False, compile=False)  # gives the cache its encoders
    first = cache.schedule.pinned(1)

    def run() -> None:
        with torch.no_grad():
            cache.evict([0], [(first, first + cache.schedule.chunk)])

    return run


class _CountedReplay(Replay):
    """A replay that runs calls of equal shapes once, and says what each of its calls costs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward_flops: list[int] = []
        self.backward_flops: list[int] = []  # by call, as the others
        self._ran: dict[Any, tuple[int, Any]] = {}

    @classmethod
    def run(
        cls, model: nn.Module, prompts: list[Tensor], responses: list[Tensor], schedule: Schedule, chunk_tokens: int
    ) -> "_CountedReplay":
        """Both passes."""
        replay = cls(model, prompts, responses, schedule=schedule, chunk_tokens=chunk_tokens)
        replay.backward(torch.zeros_like(replay.forward().log_probs))
        return replay

    def _forward_call(self, call: Call, *args: Any) -> Any:
        run = super()._forward_call
        flops, cache = self._once(("forward", _shapes(call)), lambda: run(call, *args))
        self.forward_flops.append(flops)
        return cache

    def _backward_call(self, call: Call, *args: Any) -> Any:
        run, is_last = super()._backward_call, not self.backward_flops
        flops, d_states = self._once(("backward", is_last, _shapes(call)), lambda: run(call, *args))
        self.backward_flops.insert(0, flops)
        return d_states

    def _once(self, key: Any, run: Callable[[], Any]) -> tuple[int, Any]:
        if key not in self._ran:
            result: list[Any] = []
            flops = _flops(lambda: result.append(run()))
            self._ran[key] = flops, result[0]
        return self._ran[key]


def _shapes(call: Call) -> tuple[Any, ...]:
    values = [getattr(call, f.name) for f in dataclasses.fields(call)]
    return tuple(tuple(v.shape) if isinstance(v, Tensor) else v if isinstance(v, int) else len(v or ()) for v in values)
