"""What each call of a replay runs: the chunks of all sequences, in step and padded, as tensors.

Sequence b's j-th chunk is run by call j, beside the j-th chunks of the others; where a sequence has fewer, its row
idles. A chunk never crosses an eviction boundary (core/schedule.py), so every past token of a call is visible to all
its queries or to none.

Left out: keys and values (store.py) and the model (replay.py).

All of it is integers worked out on the host: nothing is read back from the device.

Shape suffixes: B sequences, L their longest, N tokens of a call, M of them not padding, P visible past tokens, C
evicted tokens, T response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from verl_pte.core.schedule import Chunk, Schedule
from verl_pte.core.transfer import upload_together


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
    columns: Tensor | None  # columns of N in which some row predicts a response token; None = none does
    kept_3M: Tensor  # (row, column of N, position) of every token the call runs
    ring_slots: dict[str, Tensor] = field(default_factory=dict)  # of positions above, by their names (ledger.py)

    def slots(self) -> Tensor:
        """Indices in the response [B, columns] of what the columns that predict something predict."""
        return self.response_BN[:, :0] if self.columns is None else self.response_BN[:, self.columns]

    def mask(self) -> Tensor:
        """bool [B, 1, N, P + N]: the past, then the call itself causally; padding sees only itself."""
        causal_NN = torch.ones(2 * (self.tokens_BN.shape[1],), dtype=torch.bool, device=self.tokens_BN.device).tril()
        past_BNP = self.past_valid_BP[:, None] & self.valid_BN[:, :, None]
        own_BNN = (causal_NN & self.valid_BN[:, None] & self.valid_BN[:, :, None]) | torch.diag_embed(~self.valid_BN)
        return torch.cat([past_BNP, own_BNN], dim=-1)[:, None]


class ReplayPlan:
    """Calls for a batch of (prompt, response) pairs under a schedule.

    The last response token is predicted but never run, as in the rollout. Calls are padded to a `multiple` of tokens.
    """

    def __init__(
        self,
        schedule: Schedule,
        prompts: Sequence[Tensor],
        responses: Sequence[Tensor],
        chunk_tokens: int,
        device: torch.device,
        multiple: int = 1,
    ) -> None:
        self.schedule, self.device, self.multiple = schedule, device, multiple
        self.prompt_lens = [len(p) for p in prompts]
        self.response_lens = [len(r) for r in responses]
        sequences = [torch.cat([p, r]).cpu().long() for p, r in zip(prompts, responses, strict=True)]
        self.sequences_BL = pad_sequence(sequences, batch_first=True)
        self.prompt_lens_B1 = torch.tensor(self.prompt_lens)[:, None]
        self.run_lens = [len(s) - 1 for s in sequences]
        self.chunks: list[list[Chunk]] = [
            schedule.chunks(p, n, chunk_tokens) for p, n in zip(self.prompt_lens, self.run_lens, strict=True)
        ]
        self.num_calls = max(map(len, self.chunks))

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self.prompt_lens)

    def num_evictions(self) -> list[int]:
        """Evictions of each sequence."""
        return [self.schedule.num_evictions(p, n) for p, n in zip(self.prompt_lens, self.run_lens, strict=True)]

    def call(self, index: int) -> Call:
        """Tensors of call `index`; past the last chunk of every sequence all rows idle (other ranks may still have
        some).
        """
        spans_B: list[_Span] = [
            self._span(b, chunks[index] if index < len(chunks) else None) for b, chunks in enumerate(self.chunks)
        ]
        start_B1, end_B1, pinned_B1, oldest_B1, segment_start_B1, evicted_from_B1 = torch.tensor(spans_B).T[:, :, None]

        width = max(1, int((end_B1 - start_B1).max()))
        positions_BN = start_B1 + torch.arange(-(-width // self.multiple) * self.multiple)
        valid_BN = positions_BN < end_B1
        positions_BN = positions_BN.where(valid_BN, 0)
        thought_BN = positions_BN + 1 - self.prompt_lens_B1  # of the token each predicts
        is_target_BN = valid_BN & (thought_BN >= 0)
        response_BN = thought_BN.where(is_target_BN, max(self.response_lens))

        past_len_B1 = pinned_B1 + start_B1 - oldest_B1
        place_BP = torch.arange(int(past_len_B1.max())).expand(self.batch_size, -1)
        past_valid_BP = place_BP < past_len_B1
        past_BP = place_BP + (oldest_B1 - pinned_B1).where(place_BP >= pinned_B1, 0)
        past_BP = past_BP.where(past_valid_BP, 0)

        evicting_B1 = evicted_from_B1 >= 0
        evicted_BC = (evicted_from_B1 + torch.arange(self.schedule.chunk)).where(evicting_B1, 0)
        any_evicting = bool(evicting_B1.any())
        fresh_B = (start_B1 == 0)[:, 0] & valid_BN[:, 0]
        row_M, column_M = valid_BN.nonzero().T
        columns = is_target_BN.any(0).nonzero()[:, 0]
        call = Call(
            tokens_BN=self.sequences_BL.gather(1, positions_BN).where(valid_BN, 0),
            positions_BN=positions_BN,
            valid_BN=valid_BN,
            past_BP=past_BP,
            past_valid_BP=past_valid_BP,
            same_segment_BP=past_valid_BP & (past_BP >= segment_start_B1),
            evicted_BC=evicted_BC if any_evicting else None,
            evicting_B=evicting_B1[:, 0] if any_evicting else None,
            num_evicting=int(evicting_B1.sum()),
            fresh_B=fresh_B if fresh_B.any() else None,
            targets_BN=self.sequences_BL.gather(1, positions_BN + 1).where(is_target_BN, 0),
            response_BN=response_BN,
            columns=columns if len(columns) else None,
            kept_3M=torch.stack([row_M, column_M, positions_BN[row_M, column_M]]),
        )
        names = [name for name, value in vars(call).items() if isinstance(value, Tensor)]
        moved = upload_together([getattr(call, name) for name in names], self.device)
        for name, tensor in zip(names, moved, strict=True):
            setattr(call, name, tensor)
        return call

    def _span(self, b: int, chunk: Chunk | None) -> "_Span":
        if chunk is None:
            return _Span(0, 0, 0, 0, 0, -1)
        prompt_len = self.prompt_lens[b]
        pinned, oldest = self.schedule.visible_spans(prompt_len, chunk.start)
        return _Span(
            start=chunk.start,
            end=chunk.end,
            pinned=pinned,
            oldest=oldest,
            segment_start=self.schedule.segment_start(prompt_len, chunk.segment),
            evicted_from=-1 if chunk.evicted is None else chunk.evicted[0],
        )


class _Span(NamedTuple):
    """Of a chunk: its positions, what it sees of the past, and what leaves before it."""

    start: int
    end: int
    pinned: int  # pinned tokens before `start`
    oldest: int  # seen beyond the pinned ones, `start` if none is
    segment_start: int
    evicted_from: int  # -1 if nothing is evicted
