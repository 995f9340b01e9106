"""``python -m verl_pte.bench decode``: what one decode step of the native engine is made of.

Prints tables, and writes ``decode.json`` (settings, machine, versions, every step's time) and ``decode.png``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verl_pte.bench import decode, decode_report, machine
from verl_pte.bench.command import draw_if_possible, option, print_json, progress_bar, reported_errors
from verl_pte.bench.decode_settings import QUICK, QUICK_CYCLES, DecodeSettings
from verl_pte.bench.report import result_files
from verl_pte.bench.settings import DEVICES, DTYPES, Settings
from verl_pte.core.attention import BACKENDS
from verl_pte.plan.configs import NAMED

_SIZES, _CYCLES = Settings(), DecodeSettings(Settings()).cycles


def decode_command(
    quick: Annotated[bool, typer.Option("--quick", help="A small run, below a minute on a CPU.")] = False,
    window: Annotated[int | None, option("W of the bounded configurations.", _SIZES.window)] = None,
    num_seqs: Annotated[int | None, option("Sequences decoded at once.", _SIZES.num_seqs)] = None,
    prompt_length: Annotated[int | None, option("Tokens of the longest prompt.", _SIZES.prompt_length)] = None,
    rank: Annotated[int | None, option("Of the adapter.", _SIZES.rank)] = None,
    hidden_size: Annotated[int | None, option("Of the random Qwen2.", _SIZES.hidden_size)] = None,
    layers: Annotated[int | None, option("Of the random Qwen2.", _SIZES.layers)] = None,
    model: Annotated[str | None, option(f"{', '.join(NAMED)}, or a config.json.", "the random Qwen2")] = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.", _SIZES.dtype)] = None,
    device: Annotated[str | None, option(f"{', '.join(DEVICES)}.", _SIZES.device)] = None,
    attention: Annotated[str | None, option(f"{', '.join(BACKENDS)}.", _SIZES.attention)] = None,
    threads: Annotated[int | None, option("On CPUs.", _SIZES.threads)] = None,
    cycles: Annotated[int | None, option("Eviction cycles measured.", _CYCLES)] = None,
    seed: Annotated[int | None, option("Of weights and prompts.", _SIZES.seed)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line, last.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """Time of one decode step of the native engine: base, adapter, state, eviction; PTE beside its baselines.

    Options given beside --quick replace its own.
    """
    given: dict[str, Any] = dict(window=window, num_seqs=num_seqs, prompt_length=prompt_length, rank=rank)
    given |= dict(hidden_size=hidden_size, layers=layers, model=model, dtype=dtype, device=device, attention=attention)
    given |= dict(threads=threads, seed=seed)
    chosen = {name: value for name, value in given.items() if value is not None}
    with reported_errors():
        sizes = Settings(**{"engine": "native"} | (QUICK if quick else {}) | chosen)
        default_cycles = QUICK_CYCLES if quick else _CYCLES
        _run(DecodeSettings(sizes, default_cycles if cycles is None else cycles), output, as_json)


def _run(settings: DecodeSettings, output: Path, as_json: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # Before the run: its own load would be counted, and a checkout may move on.
    hardware, commit = machine.hardware(), machine.commit()
    console = Console()
    with progress_bar(console, decode.total_work(settings)) as progress:
        records = decode.measure(settings, progress)
    summary = decode_report.summarize(settings, records)
    facts = {
        "settings": dataclasses.asdict(settings),
        "device": decode.device(settings),
        "machine": hardware,
        "versions": machine.versions(),
        "commit": commit,
        "summary": summary,
    }
    json_file, plot = result_files(output, "decode", settings.sizes.attention)
    json_file.write_text(json.dumps(facts | {"records": records}, indent=2) + "\n")
    drawn = draw_if_possible(plot, lambda path: decode_report.draw(settings, summary, path))
    console.print(decode_report.tables(settings, summary))
    console.print(f"numbers: {json_file}   {drawn}", soft_wrap=True, markup=False)
    if as_json:
        print_json(facts)
