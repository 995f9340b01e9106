"""Math data sets as verl reads them: from a hub id, a folder or a file to one parquet file a set.

    from verl_pte.data import prepare, read_rows
    prepared = prepare("math-500", Path("data"))  # writes data/math-500.parquet
    rows = read_rows(prepared.path)

`SETS` says which sets are known (sets.py), source.py where their rows come from, problem.py what a row is asked and
answered, prompt.py how a model is asked. Importing it loads nothing heavy. Left out: other data sets, splits into
training and validation, and lengths in tokens, which verl checks against a model's tokenizer.
"""

from verl_pte.data.preparation import Prepared, prepare
from verl_pte.data.prompt import FAMILIES, PromptFormat, prompt_format
from verl_pte.data.rows import read_rows
from verl_pte.data.sets import SETS, MathSet

__all__ = ["FAMILIES", "SETS", "MathSet", "Prepared", "PromptFormat", "prepare", "prompt_format", "read_rows"]
