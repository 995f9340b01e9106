"""The models a benchmark runs: a base with random weights, and an adapter for each method.

All methods share the base, and the same random `lora_A` and `lora_B`; `lora_B` is not zero, so no product is one of
zeros. PTE has its encoders besides.
"""

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging

from verl_pte.bench.settings import HEAD_DIM, METHODS, Settings
from verl_pte.config import PTEConfig
from verl_pte.peft import attach
from verl_pte.plan.configs import load_config

VOCAB = 8192


def base_config(settings: Settings) -> Any:
    """The base's transformers config, with positions for the longest sequence: cost does not depend on their number."""
    positions = settings.prompt_length + max(settings.lengths)
    if settings.model is None:
        heads = settings.hidden_size // HEAD_DIM
        return Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4 if heads % 4 == 0 else heads,
            max_position_embeddings=positions,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    config = load_config(settings.model)
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    return config


def make_models(settings: Settings, folder: Path, device: str = "cpu") -> None:
    """Write the base to ``folder/base`` and each method's adapter to ``folder/<method>``; `device` draws weights."""
    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(base_config(settings), dtype=getattr(torch, settings.dtype))
    model.save_pretrained(folder / "base")
    for method in METHODS:
        attached = attach_random(model, settings.method(method), settings.seed)
        attached.save_pretrained(folder / method)
        model = attached.unload()
    del model, attached
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the methods' processes share the GPU with this one


def attach_random(model: Any, config: PTEConfig, seed: int) -> Any:
    """Put an adapter with random weights on `model`; the same `lora_A` and `lora_B` for every method."""
    torch.manual_seed(seed)
    attached = attach(model, config)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if "lora_" in name:
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return attached


def random_prompts(settings: Settings, vocab_size: int) -> list[list[int]]:
    """One prompt for each sequence."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.num_seqs, settings.prompt_length)
    return torch.randint(0, vocab_size, shape, generator=generator).tolist()
