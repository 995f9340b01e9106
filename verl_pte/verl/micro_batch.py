"""Between verl's micro-batches and the replay: packed rows on one side, (prompt, response) pairs on the other.

verl hands over sequences packed into one jagged row each, prompt first, and expects log-probs and entropy in the same
layout, the value for a token at the position before it. The replay returns them right-padded, responses only.

Left out: images and other modalities.
"""

import torch
from tensordict import TensorDict
from torch import Tensor


class MicroBatch:
    """The prompts and responses of one verl micro-batch."""

    def __init__(self, data: TensorDict) -> None:
        self.data = data
        rows = data["input_ids"].unbind()
        responses = data["responses"]
        if responses.is_nested:
            self.response_lens = responses.offsets().diff().tolist()
        else:  # padded, as verl's older trainer sends them
            prompt_width = data["prompts"].shape[1]
            self.response_lens = data["attention_mask"][:, prompt_width:].sum(1).tolist()
        self.prompts = [row[: len(row) - n] for row, n in zip(rows, self.response_lens, strict=True)]
        self.responses = [row[len(row) - n :] for row, n in zip(rows, self.response_lens, strict=True)]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def temperature(self) -> float | Tensor:
        """One for all, or [B]."""
        return self.data["temperature"]

    def pack(self, padded_BT: Tensor) -> Tensor:
        """Response values [B, T] in verl's jagged layout; differentiable."""
        offsets = self.data["input_ids"].offsets()
        lens = torch.tensor(self.response_lens, device=padded_BT.device)
        columns = torch.arange(padded_BT.shape[1], device=padded_BT.device)
        mask_BT = columns < lens[:, None]
        first_B = offsets[1:] - lens - 1  # the position that predicts the first response token
        index = (first_B[:, None] + columns)[mask_BT]
        flat = padded_BT.new_zeros(self.data["input_ids"].values().shape[0]).index_put((index,), padded_BT[mask_BT])
        return torch.nested.nested_tensor_from_jagged(flat, offsets)

    def per_response(self, key: str) -> list[Tensor] | None:
        """A per-token field of the responses, cut to their lengths; None if the micro-batch has none."""
        if key not in self.data:
            return None
        return [row[:n] for row, n in zip(self.data[key].unbind(), self.response_lens, strict=True)]

    def rollout_facts(self) -> list[dict]:
        """What the rollout server reported with each response; empty dicts where it reported nothing."""
        facts = self.data.get("extra_fields", None)
        if facts is None:
            return [{}] * len(self)
        found = facts.tolist() if hasattr(facts, "tolist") else [getattr(fact, "data", fact) for fact in facts]
        return [fact if isinstance(fact, dict) else {} for fact in found]
