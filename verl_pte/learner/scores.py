"""What one call of a replay says: the model is run, and its logits become log-probs, entropy and divergence.

Left out: which tokens a call runs (plan.py), and where the scores go (replay.py).

Shape suffixes: B sequences, N predicting columns of a call, T longest response, V vocabulary, M hidden size.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from verl_pte.core import flash
from verl_pte.core.attention import attention_inputs, selected
from verl_pte.learner.cache import CallCache
from verl_pte.learner.plan import Call


class Scores(NamedTuple):
    """Of a call's predicting columns."""

    log_probs_BN: Tensor
    entropy_BN: Tensor | None
    divergence_BN: Tensor | None
    hidden_BNM: Tensor | None
    anchor: Tensor  # a zero that keeps the whole graph in backward


class Scorer:
    """Runs `model` on calls; arguments as of `Replay`."""

    def __init__(
        self, model: nn.Module, temperature_B: Tensor, *, entropy: bool, teacher: Tensor | None, keep_hidden: bool
    ) -> None:
        self.model, self.temperature_B = model, temperature_B
        self.entropy, self.teacher, self.keep_hidden = entropy, teacher, keep_hidden

    def __call__(self, call: Call, cache: CallCache) -> Scores:
        """Run the call's tokens against `cache`."""
        hidden: list[Tensor] = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        try:
            logits_BNV = self._logits(call, cache)
        finally:
            handle.remove()
        if call.columns is None:  # the output layer ran all the same: under FSDP2 ranks call alike
            empty_BN = logits_BNV.new_zeros(len(call.tokens_BN), 0, dtype=torch.float32)
            return Scores(
                empty_BN,
                empty_BN if self.entropy else None,
                empty_BN if self.teacher is not None else None,
                hidden[0][:, :0] if self.keep_hidden else None,
                0.0 * logits_BNV.sum(),
            )
        logits_BNV = logits_BNV.float() / self.temperature_B[:, None, None]
        logsumexp_BN = logits_BNV.logsumexp(-1)
        picked_BN = logits_BNV.gather(-1, call.targets_BN[:, call.columns, None])[..., 0]
        entropy_BN = divergence_BN = None
        if self.entropy:
            entropy_BN = logsumexp_BN - ((logits_BNV - logsumexp_BN[..., None]).exp() * logits_BNV).sum(-1)
        if self.teacher is not None:
            divergence_BN = self._divergence(self.teacher, call, head, logits_BNV - logsumexp_BN[..., None])
        anchor = logits_BNV.new_zeros(())
        return Scores(
            picked_BN - logsumexp_BN, entropy_BN, divergence_BN, hidden[0] if self.keep_hidden else None, anchor
        )

    def _logits(self, call: Call, cache: CallCache) -> Tensor:
        """Of the predicting columns, in the model's dtype; of the last column where none predicts."""
        config, dtype = self.model.config, next(self.model.parameters()).dtype
        with selected(config, flash.REPLACES):
            return self.model(
                input_ids=call.tokens_BN,
                position_ids=call.positions_BN,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if call.columns is None else call.columns,
                **attention_inputs(call.mask(), call.valid_BN, config, dtype),
            ).logits

    def _divergence(self, teacher_BTM: Tensor, call: Call, head: nn.Module, log_probs_BNV: Tensor) -> Tensor:
        """KL(teacher || model): [B, N]."""
        slots_BN = call.slots()
        with torch.no_grad():
            # Slots of what predicts nothing lie one past the end; their gradient is zero, any hidden state will do.
            last = teacher_BTM.shape[1] - 1
            index_BNM = slots_BN.clamp(max=last)[..., None].expand(-1, -1, teacher_BTM.shape[2])
            hidden_BNM = teacher_BTM.to(slots_BN.device).gather(1, index_BNM)
            teacher_BNV = (head(hidden_BNM).float() / self.temperature_B[:, None, None]).log_softmax(-1)
        return (teacher_BNV.exp() * (teacher_BNV - log_probs_BNV)).sum(-1)
