"""A base model's Hugging Face config as megatron-core's TransformerConfig, for the architectures PTE supports.

What cannot be spread as asked, or is not in megatron-core's dense decoder, ends here with the reason. Left out:
weights (base.py) and layers (model.py).
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from verl_pte.config import PTEConfig
from verl_pte.peft.model import check_architecture, head_dim


def check_model(hf: Any, *, tensor: int, pipeline: int) -> None:
    """Raise ValueError unless this base model can be spread over `tensor` x `pipeline` ranks."""
    check_architecture(hf)
    for key in ("mlp_bias", *(("attention_bias",) if hf.model_type != "qwen2" else ())):
        if getattr(hf, key, False):
            raise ValueError(f"{key}=True: not supported with Megatron; train this model with FSDP")
    scaling = (getattr(hf, "rope_parameters", None) or {}).get("rope_type", "default")
    if scaling == "yarn":
        raise ValueError("rope_type='yarn': not supported with Megatron; train this model with FSDP")
    if hf.num_key_value_heads % tensor:
        raise ValueError(
            f"tensor_model_parallel_size={tensor}: must divide the model's num_key_value_heads="
            f"{hf.num_key_value_heads}: a rank encodes the keys and values of whole heads"
        )
    for key in ("num_attention_heads", "intermediate_size"):
        if getattr(hf, key) % tensor:
            raise ValueError(f"tensor_model_parallel_size={tensor}: must divide the model's {key}={getattr(hf, key)}")
    if hf.num_hidden_layers % pipeline:
        raise ValueError(
            f"pipeline_model_parallel_size={pipeline}: must divide the model's num_hidden_layers={hf.num_hidden_layers}"
        )


def transformer_config(
    hf: Any,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    on_cpu: bool = False,
) -> TransformerConfig:
    """The config of a dense decoder like `hf`. Raises ValueError for what is not supported.

    Args:
        hf: transformers config.
        tensor, pipeline: ranks that share a layer, and that share the layers.
        sequence_parallel: spread activations between the linears over the tensor-parallel ranks.
        dtype: of the parameters.
        on_cpu: make the parameters in host memory.
    """
    check_model(hf, tensor=tensor, pipeline=pipeline)
    settings: dict[str, Any] = dict(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=hf.model_type == "qwen3",
        add_qkv_bias=hf.model_type == "qwen2",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=on_cpu,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=sequence_parallel and tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=True,  # calls differ in length
        moe_token_dispatcher_type="alltoall",  # the only one megatron-core allows with that, with or without experts
        batch_p2p_comm=False,
    )
    return TransformerConfig(**settings)


def check_targets(pte: PTEConfig) -> frozenset[str]:
    """Names of the linears to adapt. Raises ValueError for names no decoder layer has."""
    known = frozenset(name for names in MERGED.values() for name in names)
    if pte.target_modules == "all-linear":
        return known
    named = frozenset(name.rpartition(".")[2] for name in pte.target_modules)
    unknown = sorted(named - known)
    if unknown:
        raise ValueError(f"target_modules={unknown}: no such linear in a decoder layer, which has {sorted(known)}")
    return named


# megatron-core's linears, and those of the Hugging Face model that each is made of.
MERGED = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
