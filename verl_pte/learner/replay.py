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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from verl_pte.core.schedule import Schedule
from verl_pte.learner.cache import CallCache
from verl_pte.learner.ledger import Ledger
from verl_pte.learner.plan import Call, ReplayPlan
from verl_pte.learner.scores import Scorer
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
        check_sequences(prompts, responses, model.config.max_position_embeddings)
        config = pte_config(model)
        self.model, self.config, self.progress = model, config, progress
        self.device = next(model.parameters()).device
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
        on_host = (kv_store or config.kv_store) == "host"
        self.ledger = Ledger(self.plan, model.config.num_hidden_layers, gradient or config.gradient, on_host)

    @property
    def store_bytes(self) -> int:
        """Bytes of the K/V store."""
        return self.ledger.num_bytes

    @torch.no_grad()
    def forward(self) -> ReplayOutput:
        """Log-probs and what else was asked for; keeps what `backward` needs."""
        longest = max(self.plan.response_lens)
        gathered: list[Tensor | None] = [None] * 4
        self.ledger.open()
        norms = ratios = torch.zeros((), device=self.device)
        updates = 0
        for index in tqdm(range(self.num_calls), desc="replay", unit="call", disable=not self.progress):
            call = self.plan.call(index)
            cache = self._forward_call(call, index, gathered)
            self.ledger.hand_on(cache.states_out)
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
        if not any(p.requires_grad for p in self.model.parameters()):
            raise RuntimeError(
                "no parameter of the model is trainable: load the adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True), and do not call backward under disable_adapter()"
            )
        d_scores = [None if d is None else nn.functional.pad(d, (0, 1)) for d in (d_log_probs, d_entropy, d_divergence)]
        self.ledger.turn(self.num_calls)
        for index in tqdm(reversed(range(self.num_calls)), desc="gradients", unit="call", disable=not self.progress):
            # FSDP2: reduce once, with everything accumulated. FSDP1 reduces after each call: its no_sync would add up
            # the calls' gradients in the precision of computation.
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(last and index == 0)
            call = self.plan.call(index)
            self._backward_call(call, index, d_scores)

    # -- one call
    # ---------------------------------------------------------------------------------------------------------

    def _forward_call(self, call: Call, index: int, gathered: list[Tensor | None]) -> CallCache:
        """Run a call without gradients; keep what it leaves, write its scores to their places in `gathered`."""
        cache = self.ledger.cache(index, call)
        scores = self.scorer(call, cache)
        slots_BN = call.slots()
        for i, found in enumerate(scores[:4]):
            if found is None:
                continue
            into = gathered[i]
            if into is None:  # the last column takes what predicts nothing
                length = max(self.plan.response_lens) + 1
                into = gathered[i] = found.new_zeros(self.plan.batch_size, length, *found.shape[2:])
            into.scatter_(1, slots_BN if found.ndim == 2 else slots_BN[..., None].expand_as(found), found)
        self.ledger.keep(call, cache)
        return cache

    def _backward_call(self, call: Call, index: int, d_scores: list[Tensor | None]) -> None:
        """Run a call with gradients and backpropagate through it."""
        cache = self.ledger.leaves(index, call)
        with torch.enable_grad():
            scores = self.scorer(call, cache)
            slots_BN = call.slots()
            loss = scores.anchor
            for found_BN, d_found in zip(scores[:3], d_scores, strict=True):
                if d_found is not None:
                    assert found_BN is not None, "a gradient of what this replay was not asked for"
                    loss = loss + (found_BN * d_found.gather(1, slots_BN)).sum()
        roots: list[Tensor] = [loss]
        gradients: list[Tensor | None] = [None]
        for place, (layer, state) in enumerate(zip(cache.layers, cache.states_out, strict=True)):
            for own, gradient in zip(layer.own, self.ledger.owed(call, place), strict=True):
                if own.requires_grad:
                    roots.append(own)
                    gradients.append(gradient.to(own.dtype))
            d_state = self.ledger.owed_state(place)
            if state is not None and d_state is not None and state.requires_grad:
                roots.append(state)
                gradients.append(d_state)
        torch.autograd.backward(roots, gradients)
        for place, (layer, state_in) in enumerate(zip(cache.layers, cache.states_in, strict=True)):
            for credit, pair in ((self.ledger.credit_past, layer.past), (self.ledger.credit_evicted, layer.evicted)):
                if pair is not None and pair[0].requires_grad:
                    credit(call, place, *(t.grad for t in pair))
            self.ledger.credit_state(call, place, None if state_in is None else state_in.grad)


def check_sequences(prompts: Sequence[Tensor], responses: Sequence[Tensor], longest: int) -> None:
    """Raise ValueError unless these are pairs to replay, of at most `longest` tokens each."""
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} responses: need one response each, at least one pair"
        )
    for kind, sequences in (("prompt", prompts), ("response", responses)):
        for b, sequence in enumerate(sequences):
            if len(sequence) == 0:
                raise ValueError(f"{kind} {b} is empty: a replay needs at least one prompt and one response token")
    found = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    if found > longest:
        raise ValueError(f"prompt and response of {found} tokens exceed the model's max_position_embeddings={longest}")


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
