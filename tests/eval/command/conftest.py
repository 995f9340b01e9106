"""A model, an adapter and questions to evaluate, and one evaluation of them that nothing stopped."""

import re
from pathlib import Path

import pytest
from evaluate_run import MAX_TOKENS, REWARD, ROWS, N, run, with_adapter, write_data
from verl_run import PTE, make_adapter, make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with model/, adapter/, questions.parquet and reward.py; sampled responses end early now and then."""
    path = tmp_path_factory.mktemp("evaluate")
    make_model(path / "model", initializer_range=0.3)
    make_adapter(path, path / "adapter", evict_fraction=0.5, block_size=4)
    write_data(path / "questions.parquet")
    (path / "reward.py").write_text(REWARD)
    return path


@pytest.fixture(autouse=True)
def graded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every call of the reward function is a line here."""
    path = folder / "graded"
    path.write_text("")
    monkeypatch.setenv("GRADED", str(path))
    monkeypatch.setenv("COLUMNS", "200")
    return path


@pytest.fixture(scope="session")
def whole(folder: Path) -> Path:
    """The folder of an evaluation of the adapter that nothing stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADED", str(folder / "graded"))
        patch.setenv("COLUMNS", "200")
        result = run(folder, folder / "whole", with_adapter(folder))
    assert result.exit_code == 0, result.output
    assert f"numbers: {folder / 'whole' / 'summary.json'}" in result.stdout
    assert re.search(rf"questions +{PTE['window']} +{MAX_TOKENS} +[\d.]+ \[[\d.]+, [\d.]+\] ", result.stdout)
    assert f"responses {ROWS * N}/{ROWS * N}" in result.stderr
    return folder / "whole"
