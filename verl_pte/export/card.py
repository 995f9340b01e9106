"""The model card, README.md of an exported adapter: what it is, what it was trained under, how to load it.

Says nothing that the checkpoint does not: what is not recorded there is "unknown".
"""

import json
from collections.abc import Mapping

import yaml

from verl_pte.config import PTEConfig
from verl_pte.versions import installed

_PACKAGES = ("verl_pte", "verl", "transformers", "peft", "torch")


def card(base: str, pte: PTEConfig, *, modules: list[str], training: str | None, dtype: str) -> str:
    """README.md of an adapter of base model `base` with settings `pte`.

    Args:
        modules: kinds of the adapted linears.
        training: what trained it, in words.
        dtype: of the tensors.
    """
    head = yaml.safe_dump(
        {"base_model": base, "library_name": "peft", "tags": ["verl_pte", "progressive-thought-encoding"]},
        sort_keys=False,
    )
    return _CARD.format(
        head=head,
        base=base,
        intro=_FULL_CACHE if pte.window is None else _WINDOW,
        quoted_base=json.dumps(base),
        settings=_settings(base, pte, modules, training, dtype),
        versions=_versions(pte.versions or {}),
        exactness=_EXACTNESS[dtype],
    )


def _settings(base: str, pte: PTEConfig, modules: list[str], training: str | None, dtype: str) -> str:
    schedule = pte.schedule()
    state = (
        "frozen: plain LoRA"
        if pte.freeze_state
        else f"{pte.num_global_tokens} global tokens, " + ("updated at every eviction" if pte.update_state else "fixed")
    )
    window = "none: full cache" if pte.window is None else f"{pte.window} thought tokens"
    evicts = "nothing" if pte.window is None else f"{pte.evict_fraction}: {schedule.chunk} tokens at once"
    return _table(
        ("base model", f"`{base}`"),
        ("window", window),
        ("evict fraction", evicts),
        ("block size", f"{pte.block_size} tokens"),
        ("rank, alpha", f"{pte.rank}, {pte.alpha:g}"),
        ("adapted modules", ", ".join(modules)),
        ("thought state", state),
        ("trained by", training or "unknown"),
        ("tensors", dtype),
    )


def _versions(saved: Mapping[str, str]) -> str:
    here = installed()
    return _table(*((name, saved.get(name, "unknown"), here.get(name, "not installed")) for name in _PACKAGES))


def _table(*rows: tuple[str, ...]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


_WINDOW = """\
An adapter trained with Progressive Thought Encoding ([arXiv 2602.16839](https://arxiv.org/abs/2602.16839)), for a
bounded KV cache: it holds the prompt and the last thought tokens, in number the window below. Unless the thought state
is frozen, what has left the cache lives on in that state."""
_FULL_CACHE = """\
An adapter trained with `verl_pte` and a full KV cache, the baseline of Progressive Thought Encoding
([arXiv 2602.16839](https://arxiv.org/abs/2602.16839))."""

_EXACTNESS = {
    "float32": "The tensors are the training engine's, unrounded. An engine that computed in float32 gave the "
    "log-probabilities that this adapter gives on a float32 base, to 1e-5; bfloat16 on either side adds its rounding.",
    "bfloat16": "The tensors were rounded from float32 to bfloat16, to within 0.4 % each. Log-probabilities are close "
    "to the training engine's, not equal.",
}

_CARD = """\
---
{head}---

# PTE adapter for {base}

{intro}

| | |
|---|---|
{settings}

What it was trained on, and how well it does, the checkpoint does not say.

## Load

Needs `verl_pte`, which makes the method known to PEFT.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import verl_pte.peft

base = AutoModelForCausalLM.from_pretrained({quoted_base}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

`verl_pte.RolloutEngine(model, ...)` and `verl_pte.replay_log_probs(model, prompts, responses)` run it under its window.
`model.generate` and a plain `model(input_ids)` evict nothing. On the command line:

    verl-pte generate --model {base} --adapter path/to/this/folder

## Limits

- {exactness}
- It cannot be merged into the base: its effect depends on the sequence.
- Base weights and tokenizer are not here. Another base, or one quantised, gives other results.
- Another window than the one above works, and is not what it was trained under.

## Versions

| | that saved the checkpoint | that exported it |
|---|---|---|
{versions}
"""
