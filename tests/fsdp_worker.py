"""One rank of tests/test_fsdp.py: replays its share of a batch on a sharded model over gloo and writes the summed
gradients.

Run as ``python fsdp_worker.py OUT CASE SHARDING`` with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
"""

import functools
import os
import sys

import torch
import torch.distributed as dist
from tiny import random_tokens, tiny_model, tiny_pte
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from verl_pte.learner import Replay
from verl_pte.peft.model import decoder_layers

# (prompt, response) lengths of each rank. In `uneven` rank 1 has fewer calls; in `no_eviction` it never evicts.
CASES = {
    "uneven": [[(5, 40), (11, 13)], [(7, 20), (3, 2)]],
    "two_replays": [[(5, 40), (9, 12)], [(7, 20), (3, 2)]],
    "no_eviction": [[(5, 40)], [(3, 4)]],
}
# verl's default, with the cast that the engine adds.
BF16 = MixedPrecision(torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=torch.float32, cast_forward_inputs=True)
BF16_POLICY = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)


def build(case: str):
    if case == "no_eviction":  # without global tokens only an eviction touches the encoder: rank 1 never does
        return tiny_pte(model=tiny_model("qwen2", tie_word_embeddings=True), window=8, num_global_tokens=0)
    return tiny_pte(model=tiny_model("qwen2", tie_word_embeddings=False), window=8)


def shard(model, sharding: str):
    """Sharded as verl does it: decoder layers are units, under FSDP1 the adapter's leaves too."""
    layers = decoder_layers(model)
    if sharding.startswith("fsdp2"):
        policy = BF16_POLICY if sharding == "fsdp2-bf16" else MixedPrecisionPolicy()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        return model

    def is_unit(module):
        weight = getattr(module, "weight", None)
        leaf = weight is not None and weight.requires_grad and not list(module.children())
        return leaf or isinstance(module, type(layers[0]))

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=functools.partial(lambda_auto_wrap_policy, lambda_fn=is_unit),
        device_id=torch.device("cpu"),
        mixed_precision=BF16 if sharding == "fsdp1-bf16" else None,
    )


def full_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients summed over ranks, whole, by the names of the attached model."""
    world = dist.get_world_size()  # FSDP averages
    if not isinstance(model, FullyShardedDataParallel):
        return {n: p.grad.full_tensor() * world for n, p in model.named_parameters() if p.requires_grad}
    # FSDP1 puts only parameters together again, so each takes its gradient's place.
    with torch.no_grad():
        for flat in model.parameters():
            if flat.requires_grad:
                flat.copy_(flat.grad)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
        return {n: p.detach().clone() * world for n, p in named.items() if p.requires_grad}


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


def main(path: str, case: str, sharding: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = shard(build(case), sharding)
    batches = micro_batches(case, CASES[case][rank])
    log_probs = []
    for i, lengths in enumerate(batches):
        out = accumulate(model, lengths, 100 * rank + i, dist.group.WORLD, last=i == len(batches) - 1)
        log_probs.append(out.log_probs)
    torch.save({"gradients": full_gradients(model), "log_probs": log_probs}, f"{path}/rank{rank}.pt")
    dist.destroy_process_group()
    # Everything is written. An interpreter that ends while threads of torch.distributed still live aborts now and then
    # ("terminate called without an active exception"; seen once in CI), which says nothing about what is tested here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
