"""For the tests of the verl integration: a tiny Qwen2 with a byte-level tokenizer, a data set and a reward on disk,
and ways to run verl on them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from verl_pte.verl.cpu_platform import accelerator_present

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
# Of a recipe: the model it is for, as `verl-pte plan` calls it.
PAPER_MODELS = {
    "qwen2.5_3b": "qwen2.5-3b",
    "qwen2.5_7b": "qwen2.5-7b",
    "r1_distill_llama_8b": "r1-distill-llama-8b",
}
PTE = {
    "rank": 4,
    "alpha": 8.0,
    "num_global_tokens": 4,
    "window": 16,
    "evict_fraction": 0.25,
    "block_size": 8,
    "chunk_tokens": 16,
}
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(letter.isdigit() for letter in solution_str) / max(len(solution_str), 1)
"""


def make_model(path: Path, **config) -> Path:
    """Write an untied two-layer Qwen2 and its tokenizer to `path`."""
    import torch

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<pad>", "<|im_start|>", "<|im_end|>"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_TEMPLATE,
    )
    torch.manual_seed(0)
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": vocab["<|im_end|>"],
        "pad_token_id": vocab["<pad>"],
    }
    Qwen2ForCausalLM(Qwen2Config(**settings | config)).save_pretrained(path)
    fast.save_pretrained(path)
    return path


def make_adapter(folder: Path, path: Path, **pte) -> Path:
    """Save to `path` an adapter of the folder's model that does something, of settings PTE and `pte`."""
    from tiny import randomize_adapter
    from transformers import AutoModelForCausalLM

    from verl_pte import PTEConfig, attach

    model = attach(AutoModelForCausalLM.from_pretrained(folder / "model"), PTEConfig(**PTE | pte))
    randomize_adapter(model, std=0.2)
    model.save_pretrained(path)
    return path


def make_data(folder: Path) -> None:
    """Write train.parquet, val.parquet and reward.py."""
    rows = [
        {
            "data_source": "digits",
            "prompt": [{"role": "user", "content": f"{i} + {i * 7 % 10} = " + "?" * (i % 4)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(16)
    ]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows[:4]).to_parquet(folder / "val.parquet")
    (folder / "reward.py").write_text(_REWARD)


def overrides(folder: Path, recipe: str = "pte_tiny_cpu") -> list[str]:
    """What every run of a tiny recipe is given; with vLLM it keeps the recipe's window and blocks, which vLLM needs."""
    kept = ("window", "block_size") if recipe.endswith("_vllm") else ()
    settings = [f"actor_rollout_ref.model.pte.{key}={value}" for key, value in PTE.items() if key not in kept]
    return [
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/val.parquet",
        f"actor_rollout_ref.model.path={folder}/model",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=4",
        "actor_rollout_ref.rollout.max_num_seqs=6",
        "data.max_response_length=48",
        *settings,
    ]


def command(folder: Path, name: str, *more: str, recipe: str = "pte_tiny_cpu") -> tuple[list[str], dict[str, str]]:
    """``python -m verl.trainer.main_ppo`` on a recipe, and its environment."""
    log = folder / f"{name}.jsonl"
    # Only what any user's shell would have: the plugin must be found through its entry point.
    drop = ("VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS")
    env = {key: value for key, value in os.environ.items() if key not in drop} | {"VERL_FILE_LOGGER_PATH": str(log)}
    env["RAY_ADDRESS"] = "local"  # whatever else runs on this machine
    if accelerator_present():  # else the plugin sees to it
        env["VERL_PLATFORM"] = "cpu"
    arguments = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-dir", str(RECIPES), "--config-name", recipe]
    arguments += [
        *overrides(folder, recipe),
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder}/{name}",
        *more,
    ]
    return arguments, env


def train(folder: Path, name: str, *more: str, recipe: str = "pte_tiny_cpu") -> list[dict]:
    """Run ``python -m verl.trainer.main_ppo`` on a recipe; its metrics, one dict a step."""
    arguments, env = command(folder, name, *more, recipe=recipe)
    run = subprocess.run(arguments, cwd=folder, env=env, capture_output=True, text=True, timeout=420)
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return metrics(folder, name)


def metrics(folder: Path, name: str) -> list[dict]:
    """What a run has logged so far."""
    log = folder / f"{name}.jsonl"
    return [json.loads(line)["data"] for line in log.read_text().splitlines()] if log.exists() else []
