"""The decode benchmark: its command runs and says what it measured; parts and ratios are what the records say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from verl_pte.bench import __main__ as command_line
from verl_pte.bench import decode, decode_report
from verl_pte.bench.decode_settings import ARMS, DecodeSettings
from verl_pte.bench.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--window", "32", "--num-seqs", "2", "--prompt-length", "20", "--rank", "4", "--hidden-size", "64"]
SMALL += ["--layers", "1", "--cycles", "2"]


def small(**sizes) -> DecodeSettings:
    chosen = dict(window=32, num_seqs=3, prompt_length=20, rank=4, hidden_size=64, layers=2) | sizes
    return DecodeSettings(Settings(engine="native", **chosen), cycles=2)


def test_command(tmp_path: Path) -> None:
    """In a process of its own, which must not load vLLM: it runs where there is none."""
    code = (
        "import sys\nfrom verl_pte.bench.__main__ import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'vllm' not in sys.modules, 'loads vLLM'"
    )
    arguments = ["decode", "--quick", "--json", "--device", "cpu", "--output", str(tmp_path), *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    written = json.loads((tmp_path / "decode.json").read_text())
    assert written.pop("records") and written == printed
    assert printed["settings"]["sizes"]["num_seqs"] == 2 and printed["device"] == "cpu"
    assert printed["summary"]["ratios"]["PTE / LoRA_c"]["median"] > 0
    assert printed["versions"]["torch"] and printed["machine"]["cores"] > 0
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "state update" in done.stdout and "LoRA_c / base" in done.stdout


def test_another_attention_has_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "measure", lambda settings, progress: made_up(small()))
    for attention in ("sdpa", "eager"):
        arguments = ["decode", "--attention", attention, "--device", "cpu", "--output", str(tmp_path), *SMALL]
        result = CliRunner().invoke(command_line.app, arguments, catch_exceptions=False)
        assert f"float32, {attention};" in " ".join(result.stdout.split())
    content = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("decode", "decode_eager")}
    assert [c["settings"]["sizes"]["attention"] for c in content.values()] == ["sdpa", "eager"]
    assert (tmp_path / "decode_eager.png").exists()


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations take turns step by step, differ in what they say, and evict as the schedule has it."""
    settings, engines, order = small(), {}, []
    make, timed = decode._engine, decode._timed_step
    monkeypatch.setattr(decode, "_engine", lambda s, arm, base: engines.setdefault(arm, make(s, arm, base)))
    monkeypatch.setattr(decode, "_timed_step", lambda engine: order.append(engine) or timed(engine))
    records = decode.measure(settings, lambda text, done: None)
    assert [(r["cycle"], r["arm"]) for r in records] == [(i, name) for i in range(2) for name in ARMS]
    turns = [order[i : i + len(ARMS)] for i in range(0, len(order), len(ARMS))]
    assert len(turns) == 2 * settings.cycle_length and len({tuple(map(id, turn)) for turn in turns}) > 1
    assert all(set(turn) == set(engines.values()) for turn in turns)
    full, base, lora_c, pte = engines.values()
    assert full.schedule.window is None and pte.schedule.window == base.schedule.window == 32
    assert [e.config.freeze_state for e in engines.values()] == [True, True, True, False]
    tokens = [[s.token_ids for s in e.running] for e in engines.values()]
    assert all(len(row) == settings.num_tokens - 1 for rows in tokens for row in rows), "no sequence ends on the way"
    assert base.running[0].token_ids != lora_c.running[0].token_ids != pte.running[0].token_ids
    shared = {p.data_ptr() for n, p in full.model.named_parameters() if "pte_" not in n}
    assert shared == {p.data_ptr() for n, p in pte.model.named_parameters() if "pte_" not in n}
    # Prompts of 20, 19 and 18 tokens pin 32: in each cycle of 16 steps the rows evict one after another.
    for record in records:
        assert len(record["seconds"]) == len(record["cpu_seconds"]) == settings.cycle_length == 16
        assert sum(record["evicting"]) == (0 if record["arm"] == "full" else 3)


def test_some_steps_are_without_evictions() -> None:
    settings = small(num_seqs=100)
    assert len(set(settings.prompt_lengths)) <= settings.cycle_length // 2


def made_up(settings: DecodeSettings) -> list[dict]:
    """Cycle 0: base 1 ms, LoRA_c 2, PTE 3, full 8; evicting adds 4 to base and LoRA_c, 12 to PTE. Cycle 1: double."""
    records = []
    for cycle in range(2):
        for arm, quiet, evicting in (("full", 8, 8), ("base", 1, 5), ("lora_c", 2, 6), ("pte", 3, 15)):
            seconds = [(1 + cycle) * 1e-3 * ms for ms in (quiet, quiet, evicting, quiet)]
            flags = [False, False, arm != "full", False]
            records.append(
                {"cycle": cycle, "arm": arm, "seconds": seconds, "cpu_seconds": [0.1] * 4, "evicting": flags}
            )
    return records


def test_parts_add_up() -> None:
    summary = decode_report.summarize(small(), made_up(small()))
    parts = {name: spread["median"] for name, spread in summary["parts_ms"].items()}
    # Means over the cycles' medians (1.5 times the first); a quarter of the steps evict.
    expected = {"base": 1, "adapter": 1, "state product": 1, "state update": 2, "eviction": 1}
    assert parts == pytest.approx({name: 1.5 * ms for name, ms in expected.items()})
    assert sum(parts.values()) == pytest.approx(summary["step_ms"]["pte"]["mean"]["median"])
    assert summary["steps_with_evictions"] == 0.25
    assert summary["ratios"]["PTE / LoRA_c"]["median"] == pytest.approx(2.0)
    assert summary["ratios"]["LoRA_c / base"]["range"] == pytest.approx([1.5, 1.5])
    assert summary["ratios"]["PTE / full cache"]["median"] == pytest.approx(6 / 8)
    assert summary["cpu_ratios"]["PTE / LoRA_c"]["median"] == pytest.approx(1.0)
    assert summary["tokens_per_second"]["pte"] == pytest.approx(3 / 9e-3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cycles", "0"], "--cycles 0: must be at least 1"),
        (["--window", "250"], "window=250: must be a multiple of block_size=16"),
        (["--device", "tpu"], "--device tpu: must be one of auto, cpu, cuda"),
        (["--attention", "flex_attention"], "--attention flex_attention: decode steps do not run it"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(command_line.app, ["decode", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr
