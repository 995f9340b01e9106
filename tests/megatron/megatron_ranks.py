"""One rank of a PTE model on megatron-core, and the processes of all; importable by those a test spawns.

A test gives a layout and what to compute; every rank builds the same small Hugging Face model with the same adapter,
takes its parts of both, and hands back what it found.
"""

import dataclasses
import io
import queue
import socket
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import random_tokens, tiny_model, tiny_pte

PRELOAD = ["peft", "transformers.models.qwen2.modeling_qwen2", "verl_pte.megatron.replay", "verl_pte.megatron.model"]
LAYERS, HEADS, KV_HEADS, VOCAB = 4, 8, 4, 62


@dataclass
class Layout:
    """Of ranks, and of the model that is spread over them."""

    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    arch: str = "qwen2"
    pte: dict[str, Any] = field(default_factory=dict)  # knobs
    prompts: tuple[int, ...] = (5, 17, 2)
    responses: tuple[int, ...] = (31, 45, 27)
    chunk_tokens: int = 512
    data: int = 1
    entropy: bool = True

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        return f"tp{self.tensor}-pp{self.pipeline}" + ("-sp" if self.sequence_parallel else "")


def hf_model(layout: Layout):
    """The base with a random adapter, as the Hugging Face learner has it."""
    base = tiny_model(
        layout.arch, layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCAB
    )
    return tiny_pte(model=base, **layout.pte)


def batch(layout: Layout) -> tuple[list, list]:
    prompts, responses = (
        random_tokens(*lengths, seed=s) for s, lengths in enumerate((layout.prompts, layout.responses))
    )
    return [torch.tensor(p) for p in prompts], [torch.tensor(r) for r in responses]


def score_gradients(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradients of a loss with respect to log-probs and entropy, [B, T] each."""
    torch.manual_seed(5)
    shape = (len(layout.responses), max(layout.responses))
    return torch.randn(shape), torch.randn(shape)


def build(layout: Layout, hf=None):
    """This rank's model, with the weights of `hf` unless there is none."""
    from megatron.core import parallel_state

    from verl_pte.megatron import base, placement

    hf = hf or hf_model(layout)
    model = new_model(layout, hf)
    group = parallel_state.get_tensor_model_parallel_group()
    named = dict(hf.named_parameters())
    plain = {n.removeprefix(placement.PREFIX).replace(".base_layer", ""): p for n, p in named.items()}
    base.load(model, plain, group)
    placement.load(model, named, group)
    return model


def new_model(layout: Layout, hf=None):
    """This rank's model with an adapter's first weights, its base not loaded."""
    from megatron.core import parallel_state

    from verl_pte.megatron.config import transformer_config
    from verl_pte.megatron.model import PTEGPTModel

    hf = hf or hf_model(layout)
    config = transformer_config(
        hf.config,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        on_cpu=True,
    )
    return PTEGPTModel(
        hf.config,
        hf.peft_config["default"],
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        seed=3,
    )


def wrapped(model):
    """In megatron-core's DDP, as a training engine has it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False), model
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp.zero_grad_buffer()
    return ddp


def gradients(model) -> dict[str, torch.Tensor]:
    """The adapter's gradients, full, by their names in the attached model. A collective."""
    from megatron.core import parallel_state

    from verl_pte.megatron import placement

    tensor = parallel_state.get_tensor_model_parallel_group()
    pipeline = parallel_state.get_pipeline_model_parallel_group()

    def own():
        for name, parameter in placement.placed(model):
            gradient = torch.nn.Parameter(parameter.main_grad.clone())
            for key in ("tensor_model_parallel", "partition_dim"):
                if hasattr(parameter, key):
                    setattr(gradient, key, getattr(parameter, key))
            yield name, placement.gather(gradient, tensor).clone()

    return dict(placement.from_all_stages(own(), pipeline, torch.device("cpu")))


def from_last_stage(tensor: torch.Tensor | None) -> torch.Tensor:
    """What the last pipeline stage has, on every rank."""
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    held = [tensor]
    dist.broadcast_object_list(held, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return held[0]


def replays(layout: Layout, variants: list[dict]) -> list[dict[str, Any]]:
    """`replay` of several models and settings on the same ranks."""
    return [replay(dataclasses.replace(layout, **variant)) for variant in variants]


def replay(layout: Layout) -> dict[str, Any]:
    """Log-probs, entropy, state facts and gradients of the batch."""
    from verl_pte.megatron.replay import MegatronReplay

    model = build(layout)
    ddp = wrapped(model)
    run = MegatronReplay(ddp, *batch(layout), temperature=0.7, entropy=layout.entropy, chunk_tokens=layout.chunk_tokens)
    found = run.forward()
    run.backward(*(score_gradients(layout) if found is not None else (None, None)))
    names = ("log_probs", "entropy", "state_norm", "update_ratio")
    out = {name: from_last_stage(None if found is None else getattr(found, name)) for name in names}
    return out | {"gradients": gradients(model), "grad_norm": _norm(model)}


def _norm(model) -> float:
    """As megatron-core clips by: over all ranks, what every rank holds counted once."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
    from megatron.core.transformer.module import param_is_not_shared

    mine = [p for p in model.parameters() if p.requires_grad and param_is_not_shared(p)]
    mine = [p.main_grad for p in mine if param_is_not_tensor_parallel_duplicate(p)]
    return get_grad_norm_fp32(mine, grad_stats_parallel_group=parallel_state.get_model_parallel_group())


def run_on_ranks(work, layout: Layout, *args) -> list[Any]:
    """What `work(layout, *args)`, a function of an importable module, returns on every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")  # ranks are forked from a process that has imported what takes long
    context.set_forkserver_preload(PRELOAD)
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, port, work, layout, args, results)) for r in range(layout.world)]
    for process in ranks:
        process.start()
    packed: dict[int, bytes] = {}
    while len(packed) < layout.world:
        try:
            packed.update([results.get(timeout=5)])
        except queue.Empty:
            dead = [r for r, process in enumerate(ranks) if process.exitcode and r not in packed]
            if dead:  # before it could say why, e.g. where it cannot import `work`
                raise AssertionError(f"rank {dead[0]} died; see its output") from None
    for process in ranks:
        process.join()
    found = {rank: torch.load(io.BytesIO(data), weights_only=False) for rank, data in packed.items()}
    for rank in range(layout.world):
        if isinstance(found[rank], str):
            raise AssertionError(f"rank {rank}:\n{found[rank]}")
    return [found[rank] for rank in range(layout.world)]


def _rank(rank: int, port: int, work, layout: Layout, args, results) -> None:
    import traceback

    import cpu_megatron

    try:
        cpu_megatron.join(rank, layout.world, port, layout.tensor, layout.pipeline)
        result = work(layout, *args)
    except Exception:
        result = traceback.format_exc()
    packed = io.BytesIO()
    torch.save(result, packed)  # bytes outlive this process, shared tensors do not
    results.put((rank, packed.getvalue()))
    if dist.is_initialized():
        dist.destroy_process_group()
