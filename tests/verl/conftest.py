"""What the tests of the verl integration share: one tiny model and data set, and the paper's models without weights."""

import json
import shutil
from pathlib import Path

import pytest
from verl_run import PAPER_MODELS, make_data, make_model

from verl_pte.plan.configs import NAMED


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A folder with model/, train.parquet, val.parquet and reward.py."""
    path = tmp_path_factory.mktemp("tiny")
    make_model(path / "model")
    make_data(path)
    return path


@pytest.fixture(scope="session")
def configs(folder, tmp_path_factory) -> dict[str, Path]:
    """Folders with the real config.json of the paper's models, a tokenizer and an index that lists no weights."""
    out = {}
    for recipe, name in PAPER_MODELS.items():
        out[recipe] = tmp_path_factory.mktemp(recipe)
        architecture = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[NAMED[name]["model_type"]]
        (out[recipe] / "config.json").write_text(json.dumps(NAMED[name] | {"architectures": [architecture]}))
        (out[recipe] / "model.safetensors.index.json").write_text('{"weight_map": {}}')
        for file in (folder / "model").glob("*token*"):
            shutil.copy(file, out[recipe])
    return out
