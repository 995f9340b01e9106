"""The learner's baseline: verl's own FSDP engine with LoRA and the full cache. The only module here that imports verl.

One rank, its model on the device at hand, verl's defaults but for what is said in `runs`. On CPUs that is FSDP2 over
gloo, with the platform this package registers with verl. verl computes the logits of all positions, prompt included,
and without flash-attn its float32 log-probs token by token, in Python.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from verl_pte.bench.engines import native_device
from verl_pte.bench.learner_settings import LearnerSettings
from verl_pte.bench.learner_steps import Batch

_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


class VerlStep:
    """``FSDPEngineWithLMHead.forward_backward_batch`` on one micro-batch."""

    def __init__(self, settings: LearnerSettings, models: Path) -> None:
        self.device = torch.device(native_device(settings))
        on_gpu = self.device.type == "cuda"
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        if not on_gpu:
            os.environ["VERL_PLATFORM"] = "cpu"
        import verl  # noqa: F401  loads the plugin, and with it the CPU platform
        from verl.trainer.config import CheckpointConfig
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
        from verl.workers.engine import FSDPEngineWithLMHead

        file = Path(tempfile.mkdtemp(dir=models)) / "group"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
        self.num_seqs, precision = settings.num_seqs, _PRECISIONS[settings.dtype]
        # With another attention packed rows would need a mask of every pair of their tokens.
        self.packs = on_gpu and settings.attention == "flash_attention_2"
        self.engine = FSDPEngineWithLMHead(
            model_config=HFModelConfig(
                path=str(models / "base"),
                load_tokenizer=False,
                override_config={"attn_implementation": settings.attention},
                use_remove_padding=self.packs,
                enable_gradient_checkpointing=settings.checkpointing,
                lora_rank=settings.rank,
                lora_alpha=settings.rank,
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                model_dtype=precision,
                mixed_precision={"param_dtype": precision, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-5, total_training_steps=1),
            checkpoint_config=CheckpointConfig(),
        )
        self.engine.initialize()
        checkpointing = "with" if settings.checkpointing else "without"
        packing = "with" if self.packs else "without"
        self.runs = (
            f"verl's FSDPEngineWithLMHead, FSDP2, one rank, LoRA, {settings.attention}, "
            f"{checkpointing} gradient checkpointing, {packing} remove-padding, entropy not computed"
        )

    def prepare(self, batch: Batch) -> None:
        """Gradients go; the batch as verl's trainer sends it."""
        from tensordict import TensorDict
        from verl.utils import tensordict_utils as tu

        self.engine.optimizer_zero_grad()
        prompts, responses, weights_BT = batch
        rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        ones = [torch.ones_like(response) for response in responses]
        fields = {
            "prompts": prompts,
            "responses": responses,
            "input_ids": rows,
            "position_ids": [torch.arange(len(row)) for row in rows],
            "response_mask": ones,
            "loss_mask": ones,
        }
        nested = {key: torch.nested.as_nested_tensor(values, layout=torch.jagged) for key, values in fields.items()}
        self.data = tu.get_tensordict(dict(TensorDict(nested, batch_size=len(rows)).items()), non_tensor_dict={})
        tu.assign_non_tensor(
            self.data,
            use_remove_padding=self.packs,
            use_fused_kernels=False,
            use_dynamic_bsz=False,
            micro_batch_size_per_gpu=self.num_seqs,
            temperature=1.0,
            calculate_entropy=False,
            global_batch_size=self.num_seqs,
        )
        # verl has a token's log-prob at the position before it.
        weights = [
            torch.cat([torch.zeros(len(p) - 1), w, torch.zeros(1)]) for p, w in zip(prompts, weights_BT, strict=True)
        ]
        self.weights = torch.cat(weights).to(self.device)

    def run(self) -> dict[str, Any]:
        """Forward and backward."""
        with self.engine.train_mode():
            output = self.engine.forward_backward_batch(self.data, self._loss)
        return {"loss": output["loss"][0]}

    def _loss(self, model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        return (model_output["log_probs"].values() * self.weights).sum(), {}
