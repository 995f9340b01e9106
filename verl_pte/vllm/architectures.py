"""Names of the PTE models in vLLM's registry, by model type. Here alone, because the plugin imports nothing heavy."""

ARCHITECTURES = {
    "qwen2": "PTEQwen2ForCausalLM",
    "qwen3": "PTEQwen3ForCausalLM",
    "llama": "PTELlamaForCausalLM",
    "mistral": "PTEMistralForCausalLM",
}
