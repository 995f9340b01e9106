"""Make what the quickstart trains: a tiny byte-level Qwen2 that knows the task in part, and the parquet files.

    python examples/quickstart/make_model.py --out outputs/quickstart

The model (2 layers, 0.4M parameters) learns from worked solutions, three of four of which stop a few terms short, under
the same attention window as the run that follows. The lessons end early, as soon as it would write the whole reference
solution about one time in five (`--stop-at`): it starts with some reward and with room for more. That chance needs no
sampling: for a model that samples from its own probabilities it is exp(-sum of the solution's cross-entropies).

Left out: anything a real base model needs. For one, point `actor_rollout_ref.model.path` at it and skip it.
"""

import argparse
import json
import math
import random
from functools import cache
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from task import Problem, hasty_solution, make_problem, make_problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from verl_pte.core.schedule import Schedule

BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 16, 3e-3, 50
SCORE_DECAY = 3.0  # weight decay of the query and key projections
HASTY = 0.75  # share of the lessons that stop short
DATA_SOURCE = "verl_pte/running_sum"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A tiny Qwen2 with weights scaled for its width (transformers' default of 0.02 learns this slowly)."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0.0, 0.5)
            elif weight.dim() == 2:
                into_residual = "o_proj" in name or "down_proj" in name
                weight.normal_(0.0, (0.5 if into_residual else 1.0) / math.sqrt(weight.shape[1]))
    return model


def prompt_messages(problem: Problem) -> list[dict[str, str]]:
    """The prompt as verl's parquet files carry it."""
    return [{"role": "user", "content": problem.question}]


def encode(tokenizer: PreTrainedTokenizerFast, problem: Problem, solution: str) -> tuple[list[int], list[int]]:
    """(prompt tokens, solution tokens), the way verl tokenizes the one and the rollout writes the other."""
    text = tokenizer.apply_chat_template(prompt_messages(problem), add_generation_prompt=True, tokenize=False)
    return tokenizer(text)["input_ids"], tokenizer(solution)["input_ids"] + [tokenizer.eos_token_id]


@cache
def window_mask(schedule: Schedule, prompt_len: int, total: int) -> torch.Tensor:
    """Additive attention mask [total, total] of the eviction schedule."""
    visible = [[schedule.is_visible(prompt_len, query, key) for key in range(total)] for query in range(total)]
    return torch.where(torch.tensor(visible), 0.0, torch.finfo(torch.float32).min)


def make_batch(
    tokenizer: PreTrainedTokenizerFast, schedule: Schedule, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids [B, L], attention mask [B, 1, L, L], solution tokens [B, L], whether the solution is whole [B]."""
    problems = [make_problem(rng) for _ in range(BATCH_SIZE)]
    is_whole = [rng.random() >= HASTY for _ in problems]
    rows = [
        encode(tokenizer, problem, problem.solution if whole else hasty_solution(problem, rng))
        for problem, whole in zip(problems, is_whole, strict=True)
    ]
    total = max(len(prompt) + len(solution) for prompt, solution in rows)
    ids = torch.full((BATCH_SIZE, total), tokenizer.pad_token_id)
    is_target = torch.zeros(BATCH_SIZE, total, dtype=torch.bool)
    for row, (prompt, solution) in enumerate(rows):
        ids[row, : len(prompt) + len(solution)] = torch.tensor(prompt + solution)
        is_target[row, len(prompt) : len(prompt) + len(solution)] = True
    mask = torch.stack([window_mask(schedule, len(prompt), total) for prompt, _ in rows])[:, None]
    return ids, mask, is_target, torch.tensor(is_whole)


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    schedule: Schedule,
    *,
    max_steps: int,
    stop_at: float,
    seed: int,
) -> float:
    """Teach worked solutions until the chance of reproducing one reaches `stop_at`; returns the chance reached."""
    rng = random.Random(seed)
    # Decay keeps attention scores small: sharp ones magnify float32 rounding, and with it the mismatch.
    scores = [weight for name, weight in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    rest = [weight for name, weight in model.named_parameters() if "q_proj" not in name and "k_proj" not in name]
    groups = [{"params": scores, "weight_decay": SCORE_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    exact = 0.0  # moving average of the chance of an exact solution
    bar = trange(max_steps, desc="teaching the base", unit="step", mininterval=1.0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
        ids, mask, is_target, is_whole = make_batch(tokenizer, schedule, rng)
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        targets = is_target[:, 1:]
        loss_of = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * targets
        loss = loss_of.sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if is_whole.any():
            exact = 0.9 * exact + 0.1 * loss_of.detach().sum(1).neg().exp()[is_whole].mean().item()
        bar.set_postfix(loss=f"{loss.item():.3f}", exact=f"{exact:.2f}")
        if exact >= stop_at:
            break
    bar.close()
    return exact


def to_rows(problems: list[Problem], split: str) -> list[dict]:
    """Problems in verl's column format."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": prompt_messages(problem),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(problems)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="gets model/ and *.parquet")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--evict-fraction", type=float, default=0.25)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--stop-at", type=float, default=0.19, help="chance of an exact solution that ends the lessons")
    parser.add_argument("--max-steps", type=int, default=600)
    parser.add_argument("--train-rows", type=int, default=1024)
    parser.add_argument("--val-rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", args.train_rows, args.seed + 1), ("val", args.val_rows, args.seed + 2)):
        rows = to_rows(make_problems(count, seed), split)
        pd.DataFrame(rows).to_parquet(args.out / f"{split}.parquet")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args.seed)
    schedule = Schedule(args.window, args.evict_fraction, args.block_size)
    exact = pretrain(model, tokenizer, schedule, max_steps=args.max_steps, stop_at=args.stop_at, seed=args.seed + 3)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    parameters = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"model": str(args.out / "model"), "parameters": parameters, "exact": round(exact, 3)}))


if __name__ == "__main__":
    main()
