"""The models of the paper as transformers configs, configs read from disk, and models of them without weights.

Nothing is downloaded: the sizes of the three are written down here, weights are always random. Left out: the
scaled-down Qwen2 (bench/models.py), which benchmarks run where no `--model` is given.
"""

import copy
import json
from pathlib import Path
from typing import Any

_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "rms_norm_eps": 1e-6,
    **_NO_TOKENS,
}

NAMED: dict[str, dict[str, Any]] = {
    "qwen2.5-3b": {
        **_QWEN2,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "r1-distill-llama-8b": {
        **_NO_TOKENS,
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
}


def check_model(model: str) -> None:
    """Raise ValueError unless `model` is one of NAMED, or a config.json or its folder."""
    if model not in NAMED and not Path(model).exists():
        raise ValueError(
            f"--model {model}: there is none; give a config.json, the folder it is in, or one of {', '.join(NAMED)}"
        )


def load_config(model: str) -> Any:
    """The transformers config `model` stands for."""
    from transformers import AutoConfig

    check_model(model)
    if model in NAMED:
        return AutoConfig.for_model(**NAMED[model])
    path = Path(model)
    return AutoConfig.for_model(**json.loads((path if path.is_file() else path / "config.json").read_text()))


def meta_model(config: Any, layers: int, dtype: Any, **changes: Any) -> Any:
    """A causal LM of this config on the meta device, with so many layers and other changes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:1] * layers
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
