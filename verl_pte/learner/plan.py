"""What each call of a replay runs: the chunks of all sequences, in step and padded, as tensors.

Sequence b's j-th chunk is run by call j, beside the j-th chunks of the others; where a sequence has fewer, its row
idles. A chunk never crosses an eviction boundary (core/schedule.py), so every past token of a call is visible to all
its queries or to none.

Left out: keys and values (store.py) and the model (replay.py).

All of it is integers worked out on the host: nothing is read back from the device.

Shape suffixes: B sequences, N tokens of a call, M of them not padding, P visible past tokens, C evicted tokens, T
response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_pte.core.schedule import Chunk, Schedule


@dataclass
class Call:
    """One call. All index tensors are long, all masks bool."""

    tokens_BN: Tensor
    positions_BN: Tensor
    valid_BN: Tensor
    past_BP: Tensor  # positions of the visible past, 0 where padded
    past_valid_BP: Tensor
    same_segment_BP: Tensor  # past tokens of the call's own segment
    evicted_BC: Tensor | None  # positions leaving before this call
    evicting_B: Tensor | None
    num_evicting: int
    fresh_B: Tensor | None  # sequences that start here; None = none does
    targets_BN: Tensor  # token each position predicts, 0 where none
    response_BN: Tensor  # index of that token in the response; T where none
    columns: list[int]  # columns of N in which some row predicts a response token
    kept_3M: Tensor  # (row, column of N, position) of every token the call runs

    def mask(self) -> Tensor:
        """bool [B, 1, N, P + N]: the past, then the call itself causally; padding sees only itself."""
        causal_NN = torch.ones(2 * (self.tokens_BN.shape[1],), dtype=torch.bool, device=self.tokens_BN.device).tril()
        past_BNP = self.past_valid_BP[:, None] & self.valid_BN[:, :, None]
        own_BNN = (causal_NN & self.valid_BN[:, None] & self.valid_BN[:, :, None]) | torch.diag_embed(~self.valid_BN)
        return torch.cat([past_BNP, own_BNN], dim=-1)[:, None]


class ReplayPlan:
    """Calls for a batch of (prompt, response) pairs under a schedule.

    The last response token is predicted but never run, as in the rollout.
    """

    def __init__(
        self,
        schedule: Schedule,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.schedule, self.device = schedule, device
        self.prompt_lens = [len(p) for p in prompts]
        self.response_lens = [len(r) for r in responses]
        self.sequences = [torch.cat([p, r]).cpu().long() for p, r in zip(prompts, responses, strict=True)]
        self.run_lens = [len(s) - 1 for s in self.sequences]
        self.chunks: list[list[Chunk]] = [
            schedule.chunks(p, n, chunk_tokens) for p, n in zip(self.prompt_lens, self.run_lens, strict=True)
        ]
        self.num_calls = max(map(len, self.chunks))

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.sequences)

    def num_evictions(self) -> list[int]:
        """Evictions of each sequence."""
        return [self.schedule.num_evictions(p, n) for p, n in zip(self.prompt_lens, self.run_lens, strict=True)]

    def call(self, index: int) -> Call:
        """Tensors of call `index`; past the last chunk of every sequence all rows idle (other ranks may still have
        some).
        """
        chunks = [c[index] if index < len(c) else None for c in self.chunks]
        no_target = max(self.response_lens)
        rows: dict[str, list[Tensor]] = {
            name: [] for name in ("tokens", "positions", "targets", "response", "past", "same", "evicted", "kept")
        }
        for b, chunk in enumerate(chunks):
            prompt_len, sequence = self.prompt_lens[b], self.sequences[b]
            start, end = (0, 0) if chunk is None else (chunk.start, chunk.end)
            positions, past = torch.arange(start, end), torch.arange(0)
            segment_start = 0
            if chunk is not None:
                past = torch.tensor(self.schedule.visible_before(prompt_len, start), dtype=torch.long)
                segment_start = self.schedule.segment_start(prompt_len, chunk.segment)
            is_target = positions + 1 >= prompt_len
            rows["positions"].append(positions)
            rows["tokens"].append(sequence[start:end])
            rows["targets"].append(sequence[start + 1 : end + 1].where(is_target, 0))
            rows["response"].append((positions + 1 - prompt_len).where(is_target, no_target))
            rows["past"].append(past)
            rows["same"].append(past >= segment_start)
            evicted = None if chunk is None else chunk.evicted
            rows["evicted"].append(torch.arange(*evicted) if evicted is not None else torch.arange(0))
            rows["kept"].append(torch.stack([torch.full_like(positions, b), torch.arange(end - start), positions]))
        evicting = torch.tensor([len(row) > 0 for row in rows["evicted"]])
        fresh = torch.tensor([c is not None and c.start == 0 for c in chunks])
        response_BN = _pad(rows["response"], no_target)
        evicted_BC, evicting_B = (
            t.to(self.device) if evicting.any() else None for t in (_pad(rows["evicted"]), evicting)
        )
        return Call(
            tokens_BN=_pad(rows["tokens"]).to(self.device),
            positions_BN=_pad(rows["positions"]).to(self.device),
            valid_BN=_lengths_mask(rows["positions"]).to(self.device),
            past_BP=_pad(rows["past"], width=0).to(self.device),
            past_valid_BP=_lengths_mask(rows["past"], width=0).to(self.device),
            same_segment_BP=_pad(rows["same"], False, width=0).to(self.device),
            evicted_BC=evicted_BC,
            evicting_B=evicting_B,
            num_evicting=int(evicting.sum()),
            fresh_B=fresh.to(self.device) if fresh.any() else None,
            targets_BN=_pad(rows["targets"]).to(self.device),
            response_BN=response_BN.to(self.device),
            columns=(response_BN < no_target).any(0).nonzero()[:, 0].tolist(),
            kept_3M=torch.cat(rows["kept"], dim=1).to(self.device),
        )


def _pad(rows: list[Tensor], fill: int | bool = 0, width: int = 1) -> Tensor:
    """Rows of different lengths side by side, at least `width` wide."""
    width = max(width, *map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=fill) for row in rows])


def _lengths_mask(rows: list[Tensor], width: int = 1) -> Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(max(width, *map(len, rows))) < lengths[:, None]
