"""Prompts of a parquet file as token ids."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from verl_pte.distill.prompts import read_prompts


def test_conversations_and_strings(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    path = str(folder / "prompts.parquet")
    for column, text in (
        ("prompt", "<|im_start|>user\n3 + 1 = <|im_end|>\n<|im_start|>assistant\n"),
        ("text", "3 + 1 = "),
    ):
        found = read_prompts(path, column, tokenizer, 64)
        assert len(found.token_ids) == 5 and found.num_too_long == 1
        assert tokenizer.decode(found.token_ids[3]) == text
    assert read_prompts(path, "prompt", tokenizer, 1000).num_too_long == 0
    digests = {read_prompts(path, column, tokenizer, 64).digest() for column in ("prompt", "text")}
    assert len(digests) == 2


def test_rows_without_a_prompt(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for rows in (["a", None], ["a", ""]):
        pq.write_table(pa.table({"text": rows}), tmp_path / "p.parquet")
        with pytest.raises(ValueError, match=r"row 1 of column 'text' is empty"):
            read_prompts(str(tmp_path / "p.parquet"), "text", tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use an instruct model, or a column of plain strings"):
        read_prompts(str(folder / "prompts.parquet"), "prompt", tokenizer, 64)
