"""Replay on megatron-core: the same calls as learner/replay.py, run by megatron-core's own schedules.

A replay's calls are the pipeline's micro-batches. That fits because a stage keeps the keys, values and states of its
own layers: going forwards a call needs only what the call before it left *on the same stage*, and going backwards only
what the call after it owes there, so calls follow one another through the stages without waiting for the last one.
Splitting sequences into micro-batches instead would leave the calls of one sequence strictly one after the other, a
bubble each.

The first pass is a forward-only schedule over the calls in order, the second 1F1B over the calls in reverse, in which
forwards read what the first pass stored and only backwards depend on each other. What a call's keys, values and states
are owed is added inside backward (attention.py, layer.py), and what reaches its past is credited by hooks on it, so
the schedule is used as it is. Stages hold the activations of at most as many calls as there are stages.

Left out: interleaved (virtual) stages, context parallelism, a teacher's divergence.

Shape suffixes: B sequences, N tokens of a call, T longest response.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn

from verl_pte.core.schedule import Schedule
from verl_pte.learner.cache import CallCache
from verl_pte.learner.ledger import Ledger
from verl_pte.learner.plan import Call, ReplayPlan
from verl_pte.learner.replay import ReplayOutput, check_sequences
from verl_pte.megatron.current import Run
from verl_pte.megatron.scores import scores


class MegatronReplay:
    """Replays a batch of (prompt, response) pairs; all tensor- and pipeline-parallel ranks are given the same.

    Args:
        model: this rank's PTEGPTModel, bare or wrapped (Float16Module, DistributedDataParallel).
        prompts, responses, temperature, schedule, gradient, kv_store, chunk_tokens, entropy: as of `learner.Replay`.
        adapter: False replays the untouched base.
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
        adapter: bool = True,
    ) -> None:
        self.model, self.entropy, self.adapter = model, entropy, adapter
        self.gpt = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
        pte = self.gpt.pte
        check_sequences(prompts, responses, self.gpt.hf.max_position_embeddings)
        self.device = next(self.gpt.parameters()).device
        # Under sequence parallelism ranks share a call's tokens equally.
        self.plan = ReplayPlan(
            schedule or pte.schedule(),
            prompts,
            responses,
            chunk_tokens or pte.chunk_tokens,
            self.device,
            multiple=self.gpt.config.tensor_model_parallel_size if self.gpt.config.sequence_parallel else 1,
        )
        self.temperature_B = torch.as_tensor(temperature, dtype=torch.float32, device=self.device).expand(len(prompts))
        on_host = (kv_store or pte.kv_store) == "host"
        self.ledger = Ledger(self.plan, self.gpt.num_layers, gradient or pte.gradient, on_host)

    @torch.no_grad()
    def forward(self) -> ReplayOutput | None:
        """Log-probs and, if asked for, entropy on the last pipeline stage, None on the others."""
        self.ledger.open()
        longest = max(self.plan.response_lens)
        found_2BT = torch.zeros(2, self.plan.batch_size, longest + 1, device=self.device)  # one column for no target
        sums_2 = torch.zeros(2, device=self.device)  # of ||S|| and ||S'|| / ||S||, over layers and updates
        updates = 0

        def step(calls: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
            nonlocal updates
            index = next(calls)
            call = self.plan.call(index)
            cache = self.ledger.cache(index, call)
            output = self._run(model, call, Run(cache, call.mask(), call.positions_BN, self.adapter))
            self.ledger.keep(call, cache)
            self.ledger.hand_on(cache.states_out)
            if cache.state_norms:
                sums_2.add_(torch.stack([torch.stack(cache.state_norms).sum(), torch.stack(cache.update_ratios).sum()]))
                updates += len(cache.state_norms) * call.num_evicting

            def collect(logits_BNV: Tensor, non_loss_data: bool) -> None:
                for into_BT, values_BN in zip(found_2BT, self._scores(call, logits_BNV), strict=True):
                    if values_BN is not None and call.columns is not None:
                        into_BT.scatter_(1, call.slots(), values_BN)

            return output, collect

        self._schedule(step, range(self.plan.num_calls), forward_only=True)
        state_norm, update_ratio = self._means(sums_2, updates)
        if not parallel_state.is_pipeline_last_stage():
            return None
        lengths_B = torch.tensor(self.plan.response_lens, device=self.device)
        return ReplayOutput(
            log_probs=found_2BT[0, :, :longest].clone(),
            entropy=found_2BT[1, :, :longest].clone() if self.entropy else None,
            divergence=None,
            hidden=None,
            mask=torch.arange(longest, device=self.device) < lengths_B[:, None],
            num_evictions=self.plan.num_evictions(),
            state_norm=state_norm,
            update_ratio=update_ratio,
        )

    def backward(self, d_log_probs: Tensor | None, d_entropy: Tensor | None = None, *, last: bool = True) -> None:
        """Add the loss's gradients to the parameters', given its gradients [B, T] with respect to log-probs and
        entropy. Stages before the last pass None.

        `last` False leaves what megatron-core does when gradients are complete (reductions over data-parallel and
        sequence-parallel ranks) to a later replay of the same optimizer step. Can be called once.
        """
        self.ledger.turn(self.plan.num_calls)
        d_scores = [None if d is None else nn.functional.pad(d, (0, 1)) for d in (d_log_probs, d_entropy)]

        def step(calls: Iterator[int], model: nn.Module) -> tuple[Tensor, Any]:
            index = next(calls)
            call = self.plan.call(index)
            cache = self.ledger.leaves(index, call)
            self._credit_on_arrival(call, cache)
            run = Run(
                cache,
                call.mask(),
                call.positions_BN,
                self.adapter,
                collect=lambda layer: self.ledger.owed(call, layer),
                collect_state=self.ledger.owed_state,
            )
            output = self._run(model, call, run)

            def loss(logits_BNV: Tensor) -> tuple[Tensor, dict]:
                # Calls that predict nothing keep their graph: gradients pass through them to other calls.
                total = logits_BNV.new_zeros(()) if call.columns is not None else 0.0 * logits_BNV.sum()
                for values_BN, d_values in zip(self._scores(call, logits_BNV), d_scores, strict=True):
                    if d_values is not None and call.columns is not None:
                        assert values_BN is not None, "a gradient of what this replay was not asked for"
                        total = total + (values_BN * d_values.gather(1, call.slots())).sum()
                return total * self.plan.num_calls, {}  # the schedule takes a mean over micro-batches

            return output, loss

        config = get_model_config(self.model)
        finalize = config.finalize_model_grads_func
        config.finalize_model_grads_func = finalize if last else None
        try:
            self._schedule(step, reversed(range(self.plan.num_calls)), forward_only=False)
        finally:
            config.finalize_model_grads_func = finalize

    def _schedule(self, step: Any, calls: Any, *, forward_only: bool) -> None:
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(calls),
            model=[self.model],
            num_microbatches=self.plan.num_calls,
            seq_length=1,  # unused: stages tell each other the shapes of what they send
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _run(self, model: nn.Module, call: Call, run: Run) -> Tensor:
        """Logits [B, N, share of the vocabulary] on the last stage, activations on the others."""
        self.gpt.current.set(run)
        try:
            return model(input_ids=call.tokens_BN, position_ids=call.positions_BN, attention_mask=None)
        finally:
            self.gpt.current.set(None)

    def _scores(self, call: Call, logits_BNV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if call.columns is None:
            return None, None
        return scores(
            logits_BNV[:, call.columns],
            call.targets_BN[:, call.columns],
            self.temperature_B,
            vocab_size=self.gpt.hf.vocab_size,
            entropy=self.entropy,
            group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _credit_on_arrival(self, call: Call, cache: CallCache) -> None:
        """Hooks on what the call sees: the gradient that reaches it goes to whoever made it."""

        def on(leaf: Tensor | None, credit: Any) -> None:
            if leaf is not None and leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(lambda t: credit(t.grad))

        for index, (layer, state) in enumerate(zip(cache.layers, cache.states_in, strict=True)):
            for credit, pair in ((self.ledger.credit_past, layer.past), (self.ledger.credit_evicted, layer.evicted)):
                key, value = pair or (None, None)
                on(key, lambda gradient, credit=credit, index=index: credit(call, index, gradient, None))
                on(value, lambda gradient, credit=credit, index=index: credit(call, index, None, gradient))
            on(state, lambda gradient, index=index: self.ledger.credit_state(call, index, gradient))

    def _means(self, sums_2: Tensor, updates: int) -> tuple[float, float]:
        """Over the layers of all stages."""
        totals_3 = torch.cat([sums_2, sums_2.new_tensor([updates])])
        dist.all_reduce(totals_3, group=parallel_state.get_pipeline_model_parallel_group())
        norms, ratios, count = totals_3.tolist()
        return (norms / count, ratios / count) if count else (float("nan"), float("nan"))
