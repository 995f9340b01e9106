"""One tiny model and data set for all tests of the verl integration."""

from pathlib import Path

import pytest
from verl_run import make_data, make_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with model/, train.parquet, val.parquet and reward.py."""
    path = tmp_path_factory.mktemp("tiny")
    make_model(path / "model")
    make_data(path)
    return path
