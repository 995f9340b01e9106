"""One rank of tests/test_fsdp.py: replays its share of a batch under FSDP2 over gloo and writes the summed gradients.

Run as ``python fsdp_worker.py OUT CASE`` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

import sys

import torch
import torch.distributed as dist
from tiny import random_tokens, tiny_model, tiny_pte
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from verl_pte.learner import Replay

# (prompt, response) lengths of each rank. In `uneven` rank 1 has fewer calls, in `no_eviction` it never evicts.
CASES = {
    "uneven": [[(5, 40), (11, 13)], [(7, 20), (3, 2)]],
    "no_eviction": [[(5, 40)], [(3, 4)]],
    "two_replays": [[(5, 40), (9, 12)], [(7, 20), (3, 2)]],
}


def build(case: str):
    if case == "no_eviction":  # without global tokens only an eviction touches the encoder: rank 1 never does
        return tiny_pte(model=tiny_model("qwen2", tie_word_embeddings=True), window=8, num_global_tokens=0)
    return tiny_pte(model=tiny_model("qwen2", tie_word_embeddings=False), window=8)


def accumulate(model, lengths, seed, group=None, last=True):
    prompts = [torch.tensor(t) for t in random_tokens(*(p for p, _ in lengths), seed=seed)]
    responses = [torch.tensor(t) for t in random_tokens(*(r for _, r in lengths), seed=seed + 10)]
    replay = Replay(model, prompts, responses, entropy=True, group=group)
    out = replay.forward()
    weight = torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(seed))
    replay.backward(weight * out.mask, 0.2 * weight * out.mask, last=last)
    return out


def micro_batches(case, lengths):
    return [[pair] for pair in lengths] if case == "two_replays" else [lengths]


def main(path: str, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(case)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = micro_batches(case, CASES[case][rank])
    log_probs = []
    for i, lengths in enumerate(batches):
        out = accumulate(model, lengths, 100 * rank + i, dist.group.WORLD, last=i == len(batches) - 1)
        log_probs.append(out.log_probs)
    # FSDP2 averages over ranks.
    gradients = {n: p.grad.full_tensor() * world for n, p in model.named_parameters() if p.requires_grad}
    torch.save({"gradients": gradients, "log_probs": log_probs}, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
