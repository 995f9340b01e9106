"""Random small models and sequences the tests share."""

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from verl_pte import PTEConfig, attach

ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")
VOCAB = 61


def tiny_model(arch: str = "qwen2", seed: int = 0, layers: int = 2, attn: str = "sdpa", **overrides) -> PreTrainedModel:
    """A random decoder with grouped KV heads; weights large enough that positions and history matter."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=arch in ("qwen2", "qwen3"),
        attn_implementation=attn,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if arch == "mistral":
        settings["sliding_window"] = None
    config = CONFIG_MAPPING[arch](**(settings | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).float().eval()
    for name, parameter in model.named_parameters():  # HF starts biases at zero and norms at one
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def tiny_pte(
    arch: str = "qwen2", window: int | None = 8, seed: int = 0, model: PreTrainedModel | None = None, **knobs
) -> PeftModel:
    """A random model with a random, non-zero adapter."""
    settings = dict(rank=6, alpha=12.0, window=window, block_size=4, num_global_tokens=5)
    attached = attach(model or tiny_model(arch, seed), PTEConfig(**(settings | knobs)))
    randomize_adapter(attached, seed)
    return attached


def randomize_adapter(model: PeftModel, seed: int = 0, std: float = 0.08) -> None:
    """Non-zero lora_B, so that the state matters."""
    torch.manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)


def random_tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    """One random sequence of each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
