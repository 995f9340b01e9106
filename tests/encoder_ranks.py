"""One rank of a thought encoder whose kv heads are spread over ranks; importable by the processes a test spawns."""

import torch
import torch.distributed as dist

from verl_pte.core.encoder import ThoughtEncoder
from verl_pte.core.encoder_stack import EncoderStack, HeadShare

HEADS, HEAD_DIM = 2, 8


def encoders() -> list[ThoughtEncoder]:
    """Of two layers, with the literal update: a rescaled one would hide a head that is added twice."""
    torch.manual_seed(0)
    options = dict(num_global_tokens=3, update_strength=None, update_state=True, normalize="row", attention="linear")
    return [ThoughtEncoder(HEADS * HEAD_DIM, 6, **options).requires_grad_(False) for _ in range(2)]


def evicted() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of two layers, three sequences and five tokens."""
    torch.manual_seed(1)
    return tuple(torch.randn(2, 2, 3, 5, HEADS * HEAD_DIM))


def moved(stack: EncoderStack, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The initial states after these have left, as the vLLM engine asks for them."""
    initial = stack.initial_LRR[:, None].expand(-1, k.shape[1], -1, -1)
    return stack.after_eviction_by_layer(initial, zip(k, v, strict=True))


def encode_on_rank(rank: int, world: int, port: int, results) -> None:
    """Ranks share the heads; where there are more ranks than heads, several hold the same one."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    replicas, width = max(1, world // HEADS), HEADS * HEAD_DIM // min(world, HEADS)
    columns = slice(rank // replicas * width, (rank // replicas + 1) * width)

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    k, v = (t[..., columns] for t in evicted())
    stack = EncoderStack(encoders(), HeadShare(columns, rank % replicas == 0, all_reduce))
    results.put((rank, moved(stack, k, v).tolist()))
    dist.destroy_process_group()
