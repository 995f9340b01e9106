"""For the tests of the command line: a random chat model with a random adapter on disk, whose text can be compared.

Greedy answers consist of printable ASCII letters, one a token, and never stop by themselves: all other tokens, the
end-of-sequence token too, have the logit 0. The shapes are ones vLLM's CPU attention has.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import randomize_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl_run import make_model

from verl_pte import PTEConfig, RolloutEngine, RolloutOutput, SamplingParams, attach

PTE = {"rank": 4, "alpha": 8.0, "num_global_tokens": 4, "window": 32, "block_size": 16, "chunk_tokens": 64}
# vLLM's runs on CPUs: threads are left where the system puts them, cache memory is not a share of the machine's.
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass
class ChatModel:
    """A model in memory and the folders it is saved in."""

    base: Path
    adapter: Path
    model: PeftModel
    tokenizer: Any

    def prompt(self, *texts: str) -> list[int]:
        """Token ids of a conversation in which user and model take turns."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def greedy(self, *texts: str, num_tokens: int) -> RolloutOutput:
        """The native engine's answer."""
        prompt = self.prompt(*texts)
        engine = RolloutEngine(
            self.model, max_num_seqs=1, max_prompt_length=len(prompt), max_response_length=num_tokens
        )
        return engine.generate([prompt], SamplingParams(temperature=0, max_tokens=num_tokens))[0]

    def text(self, output: RolloutOutput) -> str:
        """What the answer says."""
        return self.tokenizer.decode(output.token_ids)


def write_chat_model(folder: Path, max_positions: int = 1024) -> ChatModel:
    """Make one and save it under `folder`."""
    base = make_model(
        folder / "base",
        hidden_size=128,
        intermediate_size=192,
        max_position_embeddings=max_positions,
        initializer_range=0.15,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    printable = [i for i in range(256) if len(text := tokenizer.decode([i])) == 1 and "!" <= text <= "~"]
    assert len(printable) == 94
    silent = torch.ones(model.config.vocab_size, dtype=torch.bool)
    silent[printable] = False
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    model.save_pretrained(base)
    attached = attach(model, PTEConfig(**PTE))
    randomize_adapter(attached, std=0.1)
    attached.save_pretrained(folder / "adapter")
    return ChatModel(base, folder / "adapter", attached.eval(), tokenizer)
