"""Replay: teacher-forced log-probabilities of rollouts under their own eviction schedule, and exact gradients for any
loss on them.

Two passes. `forward` (no grad) streams the calls of the plan, keeps every token's K and V once and returns log-probs
and entropy. The caller computes any loss on those as leaves. `backward` takes the leaves' gradients and walks the
calls backwards, each with grad and with three injected gradients: of its tokens' log-probs, of its own keys and
values (owed by the later calls that attended to or encoded them) and of its states (handed down by the next call).
What arrives at the visible past and at the previous state is passed on. The sum is backpropagation through one graph,
with the activations and logits of one call.

With a `teacher` (the hidden states another policy, of the same output layer, had at the same tokens) it also returns
KL(teacher || model) over the whole vocabulary at every response token, and takes its gradient. Hidden states stand for
logits because they are a vocabulary's share of the size; they come from a replay with ``keep_hidden``.

``gradient: state`` treats keys and values of earlier segments as constants, ``truncated`` the earlier state as well.
Memory is one call's activations, the K/V store (store.py) and 4 * rank^2 bytes per layer, sequence and call for the
states.

Left out: what a call's logits are turned into (scores.py), and which tokens it runs (plan.py).

Under FSDP2 every rank must make the same calls: pass `group`, and ranks that have fewer run idle ones.

Shape suffixes: B sequences, N tokens of a call, T longest response, M hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from verl_pte.core.schedule import Schedule
from verl_pte.learner.cache import CallCache
from verl_pte.learner.plan import Call, ReplayPlan
from verl_pte.learner.scores import Scorer
from verl_pte.learner.store import GradientRing, KVStore
from verl_pte.peft import pte_config


@dataclass
class ReplayOutput:
    """What `Replay.forward` found."""

    log_probs: Tensor  # [B, T] float32, after temperature, 0 beyond a response's end
    entropy: Tensor | None  # [B, T] float32 of the distribution after temperature
    divergence: Tensor | None  # [B, T] float32 KL(teacher || model), after temperature
    hidden: Tensor | None  # [B, T, M] the output layer's inputs, in the model's dtype
    mask: Tensor  # [B, T] bool, True on response tokens
    num_evictions: list[int]  # per sequence
    state_norm: float  # mean ||S|| before an update, over layers and evictions; nan if nothing was evicted
    update_ratio: float  # mean ||S'|| / ||S||, S' before rescaling


class Replay:
    """Replays a batch of (prompt, response) pairs.

    Args:
        model: attached model, plain or FSDP-wrapped; under ``disable_adapter()`` the untouched base is replayed.
        prompts, responses: 1-D long tensors, none empty.
        temperature: of the distribution whose log-probs are asked for; one number or [B].
        schedule, gradient, kv_store, chunk_tokens: override the model's PTEConfig.
        entropy: compute the entropy too.
        teacher: [B, T, M] hidden states of the teacher at the response tokens: compute the divergence from it too.
        keep_hidden: return the hidden states, for another replay's `teacher`.
        group: process group whose ranks replay in step.
        progress: show a bar over the calls.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        *,
        temperature: float | Tensor = 1.0,
        schedule: Schedule | None = None,
        gradient: str | None = None,
        kv_store: str | None = None,
        chunk_tokens: int | None = None,
        entropy: bool = False,
        teacher: Tensor | None = None,
        keep_hidden: bool = False,
        group: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> None:
        if len(prompts) != len(responses) or not prompts:
            raise ValueError(
                f"{len(prompts)} prompts and {len(responses)} responses: need one response each, at least one pair"
            )
        for kind, sequences in (("prompt", prompts), ("response", responses)):
            for b, sequence in enumerate(sequences):
                if len(sequence) == 0:
                    raise ValueError(f"{kind} {b} is empty: a replay needs at least one prompt and one response token")
        config = pte_config(model)
        self.model, self.config, self.progress = model, config, progress
        self.gradient = gradient or config.gradient
        self.on_host = (kv_store or config.kv_store) == "host"
        self.device = next(model.parameters()).device
        self.num_layers = model.config.num_hidden_layers
        longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        if longest > model.config.max_position_embeddings:
            raise ValueError(
                f"prompt and response of {longest} tokens exceed the model's "
                f"max_position_embeddings={model.config.max_position_embeddings}"
            )
        self.schedule = schedule or config.schedule()
        chunk_tokens = chunk_tokens or config.chunk_tokens
        self.plan = ReplayPlan(self.schedule, prompts, responses, chunk_tokens, self.device)
        if teacher is not None and teacher.shape[:2] != (len(prompts), max(self.plan.response_lens)):
            raise ValueError(
                f"teacher of shape {tuple(teacher.shape)}: must be [{len(prompts)}, {max(self.plan.response_lens)}, "
                "hidden size], the hidden states at the response tokens of these sequences"
            )
        self.num_calls = _agree(self.plan.num_calls, group, self.device)
        temperature_B = torch.as_tensor(temperature, dtype=torch.float32, device=self.device).expand(len(prompts))
        self.scorer = Scorer(model, temperature_B, entropy=entropy, teacher=teacher, keep_hidden=keep_hidden)
        self.stores: list[KVStore] = []
        self._states: list[list[Tensor | None]] = []  # incoming, per call and layer

    @property
    def store_bytes(self) -> int:
        """Bytes of the K/V store."""
        return sum(store.num_bytes for store in self.stores)

    @torch.no_grad()
    def forward(self) -> ReplayOutput:
        """Log-probs and what else was asked for; keeps what `backward` needs."""
        longest = max(self.plan.response_lens)
        gathered: list[Tensor | None] = [None] * 4
        self._states = [[None] * self.num_layers]
        norms = ratios = torch.zeros((), device=self.device)
        updates = 0
        for index in tqdm(range(self.num_calls), desc="replay", unit="call", disable=not self.progress):
            call = self.plan.call(index)
            cache = self._forward_call(call, self._states[index], gathered)
            self._states.append(cache.states_out)
            if cache.state_norms:
                norms = norms + torch.stack(cache.state_norms).sum()
                ratios = ratios + torch.stack(cache.update_ratios).sum()
                updates += len(cache.state_norms) * call.num_evicting
        lengths_B = torch.tensor(self.plan.response_lens, device=self.device)
        log_probs, entropy, divergence, hidden = (None if t is None else t[:, :longest].clone() for t in gathered)
        assert log_probs is not None
        return ReplayOutput(
            log_probs=log_probs,
            entropy=entropy,
            divergence=divergence,
            hidden=hidden,
            mask=torch.arange(longest, device=self.device) < lengths_B[:, None],
            num_evictions=self.plan.num_evictions(),
            state_norm=_mean(norms, updates),
            update_ratio=_mean(ratios, updates),
        )

    def backward(
        self,
        d_log_probs: Tensor | None,
        d_entropy: Tensor | None = None,
        d_divergence: Tensor | None = None,
        *,
        last: bool = True,
    ) -> None:
        """Add the loss's gradients to the parameters', given its gradients [B, T] with respect to log-probs, entropy
        and divergence; None where the loss does not depend on them.

        `last` False leaves FSDP2's gradient reduction to a later replay of the same optimizer step. Can be called once.
        """
        if len(self._states) != self.num_calls + 1:
            raise RuntimeError("Replay.backward needs one Replay.forward before it, and can be called once")
        if not any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError(
                "no parameter of the model is trainable: load the adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), and do not call backward under disable_adapter()"
            )
        d_scores = [None if d is None else nn.functional.pad(d, (0, 1)) for d in (d_log_probs, d_entropy, d_divergence)]
        pinned_max = max(self.schedule.pinned(p) for p in self.plan.prompt_lens)
        reach = max(self.plan.run_lens) if self.schedule.window is None else self.schedule.window + self.schedule.chunk
        rings = [GradientRing(pinned_max + reach + 1, store) for store in self.stores]  # one slot more for padding

        pinned_B1 = torch.tensor([[self.schedule.pinned(p)] for p in self.plan.prompt_lens], device=self.device)

        def slots(positions: Tensor) -> Tensor:
            return torch.where(positions < pinned_B1, positions, pinned_max + (positions - pinned_B1) % reach)

        d_states: list[Tensor | None] = [None] * self.num_layers
        self._states.pop()
        for index in tqdm(reversed(range(self.num_calls)), desc="gradients", unit="call", disable=not self.progress):
            if hasattr(self.model, "set_requires_gradient_sync"):  # FSDP2: reduce once, with everything accumulated
                self.model.set_requires_gradient_sync(last and index == 0)
            call = self.plan.call(index)
            states_in = [None if s is None else s.detach().requires_grad_() for s in self._states.pop()]
            d_states = self._backward_call(call, states_in, d_scores, rings, slots, d_states)

    # -- one call
    # ---------------------------------------------------------------------------------------------------------

    def _forward_call(self, call: Call, states_in: list[Tensor | None], gathered: list[Tensor | None]) -> CallCache:
        """Run a call without gradients; keep its keys and values, write its scores to their places in `gathered`."""
        cache = self._cache(call, states_in)
        scores = self.scorer(call, cache)
        slots_BN = call.response_BN[:, call.columns]
        for i, found in enumerate(scores[:4]):
            if found is None:
                continue
            into = gathered[i]
            if into is None:  # the last column takes what predicts nothing
                length = max(self.plan.response_lens) + 1
                into = gathered[i] = found.new_zeros(self.plan.batch_size, length, *found.shape[2:])
            into.scatter_(1, slots_BN if found.ndim == 2 else slots_BN[..., None].expand_as(found), found)
        self._keep(call, cache)
        return cache

    def _backward_call(
        self,
        call: Call,
        states_in: list[Tensor | None],
        d_scores: list[Tensor | None],
        rings: list[GradientRing],
        slots: Callable[[Tensor], Tensor],
        d_states: list[Tensor | None],
    ) -> list[Tensor | None]:
        """Run a call with gradients and backpropagate through it; returns the gradients of `states_in`.

        `d_states` are those of the states it hands on; `rings` hold those of keys and values, at `slots` of positions.
        """
        cache = self._cache(call, states_in, grad=True)
        with torch.enable_grad():
            scores = self.scorer(call, cache)
            slots_BN = call.response_BN[:, call.columns]
            loss = scores.anchor
            for found_BN, d_found in zip(scores[:3], d_scores, strict=True):
                if d_found is not None:
                    assert found_BN is not None, "a gradient of what this replay was not asked for"
                    loss = loss + (found_BN * d_found.gather(1, slots_BN)).sum()
        roots: list[Tensor] = [loss]
        gradients: list[Tensor | None] = [None]
        for layer, ring in zip(cache.layers, rings, strict=True):
            for own, gradient in zip(layer.own, ring.collect(slots(call.positions_BN), call.valid_BN), strict=True):
                if own.requires_grad:
                    roots.append(own)
                    gradients.append(gradient.to(own.dtype))
        for state, d_state in zip(cache.states_out, d_states, strict=True):
            if state is not None and d_state is not None and state.requires_grad:
                roots.append(state)
                gradients.append(d_state)
        torch.autograd.backward(roots, gradients)
        for layer, ring in zip(cache.layers, rings, strict=True):
            self._pass_on(call, layer, ring, slots)
        return [self._state_gradient(call, s) for s in states_in]

    def _cache(self, call: Call, states_in: list[Tensor | None], grad: bool = False) -> CallCache:
        cache = CallCache(call, self.num_layers, states_in)
        for layer, store in zip(cache.layers, self.stores, strict=False):  # no store yet on the first call
            if call.past_BP.shape[1]:
                layer.past = store.get(call.past_BP)
            if call.evicted_BC is not None:
                layer.evicted = store.get(call.evicted_BC)
            if grad:
                # In `state` and `truncated` mode only the call's own segment is more than a constant.
                constant = self.gradient != "full"
                if layer.past is not None and not (constant and not call.same_segment_BP.any()):
                    layer.past = tuple(t.requires_grad_() for t in layer.past)
                if layer.evicted is not None and not constant:
                    layer.evicted = tuple(t.requires_grad_() for t in layer.evicted)
        return cache

    def _keep(self, call: Call, cache: CallCache) -> None:
        if not self.stores:
            length = max(self.plan.run_lens)
            self.stores = [KVStore(self.plan.batch_size, length, layer.own[0], self.on_host) for layer in cache.layers]
        rows, columns, positions = call.kept_3M
        for layer, store in zip(cache.layers, self.stores, strict=True):
            store.put(rows, columns, positions, *layer.own)

    def _pass_on(self, call: Call, layer: Any, ring: GradientRing, slots: Any) -> None:
        """Hand the gradients that reached the visible past and the evicted tokens to whoever made them."""
        if layer.past is not None:
            keep_BP = call.past_valid_BP if self.gradient == "full" else call.past_valid_BP & call.same_segment_BP
            ring.add(slots(call.past_BP), keep_BP, (layer.past[0].grad, layer.past[1].grad))
        if layer.evicted is not None and self.gradient == "full":
            assert call.evicting_B is not None and call.evicted_BC is not None
            keep_BC = call.evicting_B[:, None].expand_as(call.evicted_BC)
            ring.add(slots(call.evicted_BC), keep_BC, (layer.evicted[0].grad, layer.evicted[1].grad))

    def _state_gradient(self, call: Call, state: Tensor | None) -> Tensor | None:
        if state is None or state.grad is None:
            return None
        if self.gradient == "truncated" and call.evicting_B is not None:
            return torch.where(call.evicting_B[:, None, None], 0.0, state.grad)
        return state.grad


def _mean(total: Tensor, count: int) -> float:
    """nan without any, and on the meta device, which has no numbers."""
    return float(total) / count if count and not total.is_meta else float("nan")


def _agree(num_calls: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The largest number of calls of any rank."""
    if group is None:
        return num_calls
    most = torch.tensor(num_calls, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)


def replay_log_probs(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor],
    responses: Sequence[Sequence[int] | Tensor],
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probs of each response under the model's window: float32 [len(response)] each."""
    as_tensors = [[torch.as_tensor(s, dtype=torch.long) for s in sequences] for sequences in (prompts, responses)]
    output = Replay(model, as_tensors[0], as_tensors[1], temperature=temperature).forward()
    return [row[: len(r)] for row, r in zip(output.log_probs, responses, strict=True)]
