"""One rank's run of the PTE Megatron engine; importable, so that processes can be spawned with it."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from megatron_ranks import Layout
from verl_engine_run import PROMPT_LENS, make_batch
from verl_run import PTE


def make_engine(folder: Path, layout: Layout, *, dtype: str = "float32", **pte):
    """A PTEMegatronEngine as verl's TrainingWorker makes it; float32 is more than verl's own config allows."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import McoreEngineConfig, McoreOptimizerConfig

    from verl_pte.verl.config import PTEModelConfig
    from verl_pte.verl.megatron_engine import PTEMegatronEngine

    block = PTE | pte
    model_config = PTEModelConfig(path=str(folder / "model"), pte=block, lora={"rank": block["rank"]})
    engine_config = McoreEngineConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel,
        use_distributed_optimizer=False,
    )
    object.__setattr__(engine_config, "dtype", dtype)
    optimizer_config = McoreOptimizerConfig(
        optimizer="adam", lr=0.02, weight_decay=0.0, clip_grad=0.5, total_training_steps=4, lr_decay_style="cosine"
    )
    engine = PTEMegatronEngine(
        model_config=model_config,
        engine_config=engine_config,
        optimizer_config=optimizer_config,
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def make_loss():
    """verl's PPO loss with a KL and an entropy term."""
    from verl.workers.config import McoreActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = McoreActorConfig(
        strategy="megatron",
        ppo_mini_batch_size=8,
        ppo_micro_batch_size_per_gpu=2,
        rollout_n=1,
        use_kl_loss=True,
        kl_loss_coef=0.3,
        entropy_coeff=0.2,
    )
    return functools.partial(ppo_loss, config=config)


def adapter(engine) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in engine.get_per_tensor_param(base_sync_done=True)[0]}


def log_probs(engine, rows: slice) -> list | None:
    """Of the rank's part of the batch; None before the last stage."""
    with engine.eval_mode(), torch.no_grad():
        found = engine.infer_batch(make_batch(rows), loss_function=None)
    return [row.clone() for row in found["model_output"]["log_probs"].unbind()] if found else None


def rows_of(engine) -> slice:
    share = len(PROMPT_LENS) // engine.get_data_parallel_size()
    return slice(engine.get_data_parallel_rank() * share, (engine.get_data_parallel_rank() + 1) * share)


def exercise(layout: Layout, folder: Path, save: str | None, load: str | None, options: dict) -> dict[str, Any]:
    """Train two steps, or resume from `load` and train one; what there is before and after."""
    import verl  # noqa: F401  loads the plugin

    engine = make_engine(folder, layout, **options)
    rows, result = rows_of(engine), {}
    if load is not None:
        engine.load_checkpoint(str(folder / load))
    result["start"] = adapter(engine)
    result["base"] = {n: t.clone() for n, t in engine.get_per_tensor_param(base_sync_done=False)[0]}
    result["log_probs"] = log_probs(engine, rows)
    for step in range(2) if load is None else (1,):
        with engine.train_mode():
            outputs = engine.train_batch(make_batch(rows), loss_function=make_loss())
            result[f"lr {step}"] = engine.lr_scheduler_step()
        result[f"metrics {step}"] = copy.deepcopy(outputs.get("metrics"))
        if step == 0:
            if save is not None:
                engine.save_checkpoint(str(folder / save), global_step=1)
            result["saved"], result["saved log_probs"] = adapter(engine), log_probs(engine, rows)
    result["end"], result["trained"] = adapter(engine), log_probs(engine, rows)
    with engine.disable_adapter():
        result["reference"] = log_probs(engine, rows)
    return result


def fsdp_adapter(folder: Path, start: Path, save: Path) -> dict[str, torch.Tensor]:
    """What the FSDP engine hands to the rollout if it starts from the adapter `start`; it saves a checkpoint too."""
    import torch.multiprocessing as mp

    mp.spawn(_fsdp_rank, args=(folder, start, save), nprocs=1)
    return torch.load(save / "sent.pt")


def _fsdp_rank(rank: int, folder: Path, start: Path, save: Path) -> None:
    import os

    import verl  # noqa: F401  loads the plugin
    import verl_engine_run

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    save.mkdir()
    torch.distributed.init_process_group("gloo", init_method=f"file://{save}/group", rank=0, world_size=1)
    engine = verl_engine_run.make_engine(folder, model={"lora_adapter_path": str(start)})
    engine.save_checkpoint(str(save))
    torch.save(adapter(engine), save / "sent.pt")
    torch.distributed.destroy_process_group()
