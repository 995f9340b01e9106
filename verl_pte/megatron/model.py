"""A megatron-core GPTModel for PTE: its layers, norms and attention come in through the layer spec.

The base is frozen, so its embedding and output weights need no tie across pipeline stages: where the model ties them
and has one stage they are one tensor, else each end has its own.

Left out: weights of the base (base.py), and running it (replay.py).
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from verl_pte.config import PTEConfig
from verl_pte.megatron.attention import CallAttention
from verl_pte.megatron.current import CallRotary, Current
from verl_pte.megatron.layer import PTELayer
from verl_pte.megatron.norm import RMSNorm


class PTEGPTModel(GPTModel):
    """This rank's part of a base model with a trainable PTE adapter.

    Attributes:
        hf: the base's transformers config.
        pte: settings of the adapter.
        current: the call under way.
    """

    def __init__(
        self,
        hf: Any,
        pte: PTEConfig,
        config: TransformerConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        seed: int = 0,
    ) -> None:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        stage = parallel_state.get_pipeline_model_parallel_rank()
        num_layers = hf.num_hidden_layers // stages
        current = Current(stage * num_layers)
        layer = _layer_spec(config, pte, seed, current)
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
            vocab_size=padded_vocab(hf.vocab_size),
            max_sequence_length=hf.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=hf.tie_word_embeddings and stages == 1,
            position_embedding_type="rope",
        )
        self.hf, self.pte, self.current = hf, pte, current
        self.rotary_pos_emb = CallRotary(hf, current)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        for name, parameter in self.named_parameters():
            trainable = ".lora_" in name or ".thought_encoder." in name
            parameter.requires_grad_(trainable)
            if trainable:
                parameter.data = parameter.data.to(device, config.params_dtype)

    @property
    def num_layers(self) -> int:
        """Of this stage."""
        return len(self.decoder.layers)


def padded_vocab(vocab_size: int) -> int:
    """Rows of the embedding: the tensor-parallel ranks hold equal shares."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return -(-vocab_size // ranks) * ranks


def _layer_spec(config: TransformerConfig, pte: PTEConfig, seed: int, current: Current) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    for name in ("q_layernorm", "k_layernorm"):
        if getattr(attention, name) is not IdentityOp:
            setattr(attention, name, RMSNorm)
    attention.core_attention = ModuleSpec(module=CallAttention, params={"current": current})
    return ModuleSpec(module=PTELayer, params={"pte": pte, "seed": seed, "current": current}, submodules=layer)
