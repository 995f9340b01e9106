"""One rank of a thought encoder whose kv heads are spread over ranks; importable by the processes a test spawns."""

import torch
import torch.distributed as dist

from verl_pte.core.encoder import ThoughtEncoder

HEADS, HEAD_DIM = 2, 8


def encoder() -> ThoughtEncoder:
    torch.manual_seed(0)
    options = dict(num_global_tokens=3, update_strength=0.3, update_state=True, normalize="row", attention="linear")
    return ThoughtEncoder(HEADS * HEAD_DIM, 6, **options).double().requires_grad_(False)


def evicted() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, HEADS * HEAD_DIM).double(), torch.randn(2, 5, HEADS * HEAD_DIM).double()


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
    results.put((rank, encoder().encode_shard(k, v, columns, rank % replicas == 0, all_reduce).tolist()))
    dist.destroy_process_group()
