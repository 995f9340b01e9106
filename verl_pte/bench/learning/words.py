"""The tasks as text: a tokenizer of one word a token, and parquet files as verl reads them.

Only runs of ``main_ppo`` need it (main_ppo.py); everything else of this benchmark works on token ids.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from verl_pte.bench.learning.tasks import EOS, SEP, Example, Task

DATA_SOURCE = "verl_pte/learning"


def word(token: int) -> str:
    """A token's word. verl wants the one that ends a turn to have its usual name."""
    return "<|im_end|>" if token == EOS else f"t{token}"


def text(tokens: Sequence[int]) -> str:
    """Tokens as words."""
    return " ".join(map(word, tokens))


def tokens(words: str) -> list[int]:
    """Words as tokens. Raises ValueError for anything else."""
    return [int(w.removeprefix("t")) for w in words.split()]


def tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """One word a token; the chat template is the prompt itself."""
    model = models.WordLevel({word(t): t for t in range(task.vocab_size)}, unk_token=word(SEP))
    plain = Tokenizer(model)
    # Blanks alone separate words: verl wants a newline to be one token (here the unknown one) of any Qwen model.
    plain.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token=word(EOS),
        pad_token=word(EOS),
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def write_prompts(examples: Sequence[Example], kind: str, path: Path) -> None:
    """A parquet file of examples in verl's columns."""
    import pyarrow as pa  # here: the other benchmarks run where there is none
    import pyarrow.parquet as pq

    rows = [
        {
            "data_source": DATA_SOURCE,
            "prompt": [{"role": "user", "content": text(example.prompt)}],
            "ability": "reasoning",
            "reward_model": {"style": "rule", "ground_truth": json.dumps([kind, *example])},
            "extra_info": {"index": index},
        }
        for index, example in enumerate(examples)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
