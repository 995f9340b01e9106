"""Settings of ``verl-pte warm-start``: their defaults, and which are refused."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from warm_start_run import run

from verl_pte.cli.warm_start import warm_start
from verl_pte.distill.settings import WarmStartSettings


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model=nowhere/at/all"], "model=nowhere/at/all: no such directory"),
        (["--prompts=nowhere.parquet"], "--prompts nowhere.parquet: no such file"),
        (["--prompts={folder}/model/config.json"], "not a parquet file"),
        (["--prompt-column=question"], "--prompt-column question: .* it has prompt (list<"),
        (["--prompt-column=label"], "must hold lists of {role, content} or strings; .*label (int64)"),
        (["--max-prompt-length=4"], "--max-prompt-length 4: no prompt fits, all 6"),
        (["--max-response-length=4000"], "exceeds the model's max_position_embeddings=256"),
        (["--pte=window=20"], "--pte window=20: must be a multiple of block_size=8"),
        (["--pte=windw=16"], "--pte windw=16: no such setting; known are rank"),
        (["--pte=window"], "--pte window: must be KEY=VALUE"),
        (["--pte=window=null"], "--pte window=null: must be a number of tokens"),
        (["--pte=target_modules=[q_proj,w_pack]"], "target_modules=['w_pack']: no such linear"),
        (["--steps=0"], "--steps 0: must be at least 1"),
        (["--warmup-steps=8"], "--warmup-steps 8: must be in [0, --steps 8)"),
        (["--lr=0"], "--lr 0.0: must be a positive number"),
        (["--temperature=-1"], "--temperature -1.0: must be >= 0"),
        (["--top-p=0"], "--top-p 0.0: must be in (0, 1]"),
        (["--dtype=int8"], "--dtype int8: must be one of auto"),
        (["--device=cuda"], "--device cuda: this PyTorch sees no CUDA device"),
        (["--device=cup"], "--device cup: must be auto, cpu, cuda"),
        (["--output={folder}/model"], "holds .* and no warm start"),
        (["--output={folder}/prompts.parquet"], "must be a folder, this is a file"),
    ],
    ids=lambda value: value[0].split("=")[0].strip("-") if isinstance(value, list) else "",
)
def test_refused(folder, tmp_path, more, message):
    if "device=cuda" in more[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run(folder, tmp_path / "out", *(argument.format(folder=folder) for argument in more))
    assert result.exit_code == 2, result.output
    *parts, last = message.split(" .*") if ".*" in message else [message]
    assert all(part.strip() in result.output.replace("\n", " ") for part in (*parts, last)), result.output
    assert not (tmp_path / "out" / "settings.json").exists(), "what failed at once claims no folder"


def test_defaults_are_said_once_and_documented() -> None:
    """On the command line, in the settings and in docs/warm_start.md."""
    options = {name: parameter.default for name, parameter in inspect.signature(warm_start).parameters.items()}
    settings = {
        f.name: f.default for f in dataclasses.fields(WarmStartSettings) if f.default is not dataclasses.MISSING
    }
    assert settings.items() <= options.items()
    text = (Path(__file__).parents[2] / "docs" / "warm_start.md").read_text()
    rows = re.findall(r"^\| (`--[^|]+) \| ([^|]+) \|", text, flags=re.M)
    documented = {}
    for names, values in rows:
        names = [name.strip("`").removeprefix("--").replace("-", "_") for name in names.split(", ")]
        documented |= dict(zip(names, values.split(", "), strict=True)) if "KEY=VALUE" not in names[0] else {}
    assert documented.keys() == settings.keys()
    for name, value in settings.items():
        expected = documented[name].strip()
        assert expected == "all of a step" if value is None else str(value) == str(type(value)(expected)), name
