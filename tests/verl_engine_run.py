"""One rank's run of the PTE training engine; importable, so that processes can be spawned with it."""

import functools
import os
from pathlib import Path

import torch
from tensordict import TensorDict
from verl_run import PTE

PROMPT_LENS = (5, 11, 8, 3, 9, 4, 14, 7)
RESPONSE_LENS = (40, 3, 25, 33, 2, 18, 61, 9)  # the ranks' halves differ in segments: the longest is in the second

TEMPERATURE = 0.8


def make_batch(rows: slice) -> TensorDict:
    """Part of a batch as verl's trainer sends it to `update_actor`, made the same in every process."""
    from verl.utils import tensordict_utils as tu

    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 250, (n,), generator=random) for n in PROMPT_LENS][rows]
    responses = [torch.randint(0, 250, (n,), generator=random) for n in RESPONSE_LENS][rows]
    per_token = {
        key: [torch.randn(n, generator=random) * scale + shift for n in RESPONSE_LENS][rows]
        for key, scale, shift in (
            ("old_log_probs", 0.2, -5.8),
            ("ref_log_prob", 0.2, -5.8),
            ("rollout_log_probs", 0.2, -5.8),
            ("advantages", 1.0, 0.0),
        )
    }
    ones = [torch.ones(len(r), dtype=torch.long) for r in responses]
    fields = {
        "prompts": prompts,
        "responses": responses,
        "input_ids": [torch.cat(pair) for pair in zip(prompts, responses, strict=True)],
        "position_ids": [torch.arange(len(p) + len(r)) for p, r in zip(prompts, responses, strict=True)],
        "response_mask": ones,
        "loss_mask": ones,
        **per_token,
    }
    nested = {key: torch.nested.as_nested_tensor(rows_, layout=torch.jagged) for key, rows_ in fields.items()}
    data = TensorDict(nested, batch_size=len(prompts))
    data = tu.get_tensordict(dict(data.items()), non_tensor_dict={})
    tu.assign_non_tensor(
        data,
        use_remove_padding=False,
        use_fused_kernels=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=2,
        temperature=TEMPERATURE,
        calculate_entropy=True,
        global_batch_size=len(PROMPT_LENS),
    )
    return data


def make_engine(path: Path, model: dict | None = None, **pte):
    """A PTEEngine as verl's TrainingWorker makes it; `model` are further settings of its model block."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
    from verl.workers.engine import EngineRegistry

    from verl_pte.verl.config import PTEModelConfig

    block = PTE | pte
    model_config = PTEModelConfig(path=str(path / "model"), pte=block, lora={"rank": block["rank"]}, **(model or {}))
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine_config = FSDPEngineConfig(strategy="fsdp2", mixed_precision=precision, use_torch_compile=False)
    # SGD, because Adam's first step hides a gradient that is off by a factor.
    optimizer_config = FSDPOptimizerConfig(
        optimizer="SGD",
        lr=0.1,
        weight_decay=0.0,
        betas=None,
        clip_grad=0.5,
        total_training_steps=4,
        lr_scheduler_type="cosine",
        override_optimizer_config=None,
    )
    engine = EngineRegistry.new(
        model_type="pte_language_model",
        backend="fsdp2",
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_loss():
    """verl's PPO loss with a KL and an entropy term."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(
        strategy="fsdp2",
        ppo_mini_batch_size=8,
        ppo_micro_batch_size_per_gpu=2,
        rollout_n=1,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        entropy_coeff=0.2,
    )
    return functools.partial(ppo_loss, config=config)


def exercise(rank: int, world: int, folder: Path) -> None:
    """Everything verl asks of the engine, once; what came out goes to a file of this rank."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    import verl  # noqa: F401  loads the plugin
    from verl.utils import tensordict_utils as tu

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/pg{world}", rank=rank, world_size=world)
    share = len(PROMPT_LENS) // world
    rows = slice(rank * share, (rank + 1) * share)
    engine = make_engine(folder)
    result: dict = {"start": {name: t.clone() for name, t in engine.get_per_tensor_param(base_sync_done=True)[0]}}
    result["base"] = {name: t.clone() for name, t in engine.get_per_tensor_param(base_sync_done=False)[0]}

    def log_probs(**settings):
        data = make_batch(rows)
        tu.assign_non_tensor(data, **settings)
        with engine.eval_mode():
            return [row.clone() for row in engine.infer_batch(data)["model_output"]["log_probs"].unbind()]

    for step in range(2):
        with engine.train_mode():
            output = engine.train_batch(make_batch(rows), loss_function=make_loss())
        result[f"metrics {step}"] = output["metrics"]
        result[f"lr {step}"] = engine.lr_scheduler_step()
    result["end"] = {name: t.clone() for name, t in engine.get_per_tensor_param(base_sync_done=True)[0]}
    result["log_probs"] = log_probs()
    result["dynamic"] = log_probs(use_dynamic_bsz=True, max_token_len_per_gpu=90)
    with engine.disable_adapter():
        result["reference"] = log_probs()
        engine.pte.reference_cache = "full"
        result["full reference"] = log_probs(temperature=1.0)
    engine.save_checkpoint(str(folder / f"checkpoint{world}"))
    torch.save(result, folder / f"result{world}_{rank}.pt")
    torch.distributed.destroy_process_group()
