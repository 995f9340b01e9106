"""Where a replay keeps every token's keys and values, and the gradients still owed to them.

The store holds each token's K and V once, in the model's dtype, on the device or in host memory: ``2 * layers * B *
longest sequence * kv heads * head_dim`` elements. Gradients are only ever owed to tokens that a call can still see or
encode: the pinned ones, the window and one evicted chunk. They live in a ring of that size, in float32.

Shape suffixes: B sequences, H kv heads, L longest sequence, D head_dim, M tokens gathered, R pinned_max + ring.
"""

import torch
from torch import Tensor

from verl_pte.core.transfer import upload


class KVStore:
    """Keys and values of all tokens of one layer."""

    def __init__(self, batch_size: int, length: int, like_BHND: Tensor, on_host: bool) -> None:
        shape = (batch_size, like_BHND.shape[1], length, like_BHND.shape[3])
        self.on_host = on_host and like_BHND.device.type != "cpu"
        device = torch.device("cpu") if self.on_host else like_BHND.device
        self.device = like_BHND.device
        self.keys, self.values = (
            torch.zeros(shape, dtype=like_BHND.dtype, device=device, pin_memory=self.on_host) for _ in range(2)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def put(self, rows: Tensor, columns: Tensor, positions: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> None:
        """Keep the tokens at ``[rows[i], :, columns[i]]`` of a call as those at `positions[i]` of the sequences."""
        picked = [new.detach()[rows, :, columns] for new in (k_BHND, v_BHND)]
        rows, positions = rows.to(self.keys.device), positions.to(self.keys.device)
        for buffer, picked_MHD in zip((self.keys, self.values), picked, strict=True):
            buffer[rows, :, positions] = picked_MHD.to(buffer.device)

    def get(self, positions_BM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at these positions: [B, H, M, D] each, on the model's device."""
        index_BHMD = positions_BM.to(self.keys.device)[:, None, :, None].expand(
            -1, self.keys.shape[1], -1, self.keys.shape[3]
        )
        keys, values = self.keys.gather(2, index_BHMD), self.values.gather(2, index_BHMD)
        return (upload(keys, self.device), upload(values, self.device)) if self.on_host else (keys, values)


class GradientRing:
    """Gradients owed to the keys and values of one layer: added to by later calls, collected by the call that made
    them.
    """

    def __init__(self, length: int, store: KVStore) -> None:
        batch_size, heads, _, head_dim = store.keys.shape
        self.buffers = [torch.zeros(batch_size, heads, length, head_dim, device=store.device) for _ in range(2)]
        self._zero = torch.zeros((), device=store.device)  # a number in its place would be made there each time

    def add(self, slots_BM: Tensor, keep_BM: Tensor, gradients: tuple[Tensor | None, Tensor | None]) -> None:
        """Add gradients [B, H, M, D] where `keep_BM`."""
        for buffer, gradient in zip(self.buffers, gradients, strict=True):
            if gradient is not None:
                kept_BHMD = torch.where(keep_BM[:, None, :, None], gradient.float(), self._zero)
                buffer.scatter_add_(2, _expand(slots_BM, buffer), kept_BHMD)

    def collect(self, slots_BM: Tensor, valid_BM: Tensor) -> list[Tensor]:
        """Take the gradients at these slots out of the ring: two float32 [B, H, M, D], zero where not valid."""
        out = []
        for buffer in self.buffers:
            index_BHMD = _expand(slots_BM, buffer)
            taken_BHMD = buffer.gather(2, index_BHMD)
            out.append(torch.where(valid_BM[:, None, :, None], taken_BHMD, self._zero))
            # Padding points at slot 0, which belongs to a real token: clear the ring's spare last slot instead.
            cleared_BM = torch.where(valid_BM, slots_BM, buffer.shape[2] - 1)
            buffer.scatter_(2, _expand(cleared_BM, buffer), 0.0)
        return out


def _expand(slots_BM: Tensor, buffer: Tensor) -> Tensor:
    return slots_BM[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
