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
        self.sequences = [torch.cat([p, r]).tolist() for p, r in zip(prompts, responses, strict=True)]
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
        width = max([c.end - c.start for c in chunks if c is not None], default=1)
        no_target = max(self.response_lens)
        rows: dict[str, list] = {
            name: [] for name in ("tokens", "positions", "targets", "response", "past", "same", "evicted")
        }
        for b, chunk in enumerate(chunks):
            run = range(0) if chunk is None else range(chunk.start, chunk.end)
            past = [] if chunk is None else self.schedule.visible_before(self.prompt_lens[b], chunk.start)
            segment_start = 0 if chunk is None else self.schedule.segment_start(self.prompt_lens[b], chunk.segment)
            rows["positions"].append(list(run))
            rows["tokens"].append([self.sequences[b][q] for q in run])
            rows["targets"].append([self.sequences[b][q + 1] if q + 1 >= self.prompt_lens[b] else 0 for q in run])
            rows["response"].append(
                [q + 1 - self.prompt_lens[b] if q + 1 >= self.prompt_lens[b] else no_target for q in run]
            )
            rows["past"].append(past)
            rows["same"].append([q >= segment_start for q in past])
            rows["evicted"].append([] if chunk is None or chunk.evicted is None else list(range(*chunk.evicted)))
        evicting = [bool(e) for e in rows["evicted"]]
        fresh = [c is not None and c.start == 0 for c in chunks]
        kept = [(b, i, q) for b, row in enumerate(rows["positions"]) for i, q in enumerate(row)]
        past_width = max(map(len, rows["past"]))
        return Call(
            tokens_BN=self._pad(rows["tokens"], width),
            positions_BN=self._pad(rows["positions"], width),
            valid_BN=self._lengths_mask(rows["positions"], width),
            past_BP=self._pad(rows["past"], past_width),
            past_valid_BP=self._lengths_mask(rows["past"], past_width),
            same_segment_BP=self._pad(rows["same"], past_width, False),
            evicted_BC=self._pad(rows["evicted"], self.schedule.chunk) if any(evicting) else None,
            evicting_B=self._tensor(evicting) if any(evicting) else None,
            num_evicting=sum(evicting),
            fresh_B=self._tensor(fresh) if any(fresh) else None,
            targets_BN=self._pad(rows["targets"], width),
            response_BN=self._pad(rows["response"], width, no_target),
            columns=sorted({i for row in rows["response"] for i, token in enumerate(row) if token < no_target}),
            kept_3M=self._tensor([list(column) for column in zip(*kept, strict=True)] or [[], [], []]),
        )

    def _pad(self, rows: list[list], width: int, fill: int | bool = 0) -> Tensor:
        return self._tensor([row + [fill] * (width - len(row)) for row in rows])

    def _lengths_mask(self, rows: list[list], width: int) -> Tensor:
        return self._tensor([[i < len(row) for i in range(width)] for row in rows]).bool()

    def _tensor(self, values: list) -> Tensor:
        tensor = torch.tensor(values, device=self.device)
        return tensor if tensor.numel() else tensor.long()
