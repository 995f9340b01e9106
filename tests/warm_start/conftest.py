"""A model and prompts to start warm on, and two runs that nothing stopped."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from verl_run import make_model
from warm_start_run import SAMPLED, log, run


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with model/ and prompts.parquet, five short conversations and one that is long."""
    path = tmp_path_factory.mktemp("warm")
    make_model(path / "model", initializer_range=0.3)
    texts = [f"{i} + {i * 7 % 10} = " for i in range(5)] + ["long " * 40]
    rows = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"prompt": rows, "text": texts, "label": list(range(6))}), path / "prompts.parquet")
    return path


@pytest.fixture(scope="session")
def whole(folder) -> Path:
    """The folder of a run that nothing stopped."""
    result = run(folder, folder / "whole")
    assert result.exit_code == 0, result.output
    assert f"adapter: {folder / 'whole' / 'adapter'}" in result.output
    assert "5 prompts; 1 longer than 64 left out" in result.output
    cut = sum(record["cut"] for record in log(folder / "whole"))
    assert 0 < cut <= 40 and f"{cut} of 40 answers were cut off at --max-response-length 40" in result.output
    assert "outgrew" not in result.output
    return folder / "whole"


@pytest.fixture(scope="session")
def sampled(folder) -> Path:
    """As `whole`, with sampled answers, and prompts and answers that change from step to step."""
    assert run(folder, folder / "sampled", *SAMPLED).exit_code == 0
    return folder / "sampled"
