"""``python -m verl_pte.bench learner``: peak memory and time of the learner's step, by method and response length.

Prints tables or, with ``--json``, one JSON object last, and writes ``learner.json`` (settings, machine, versions,
commit, every sample) and ``learner.png``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verl_pte.bench import learner, learner_report, machine
from verl_pte.bench.command import draw_if_possible, option, parse_lengths, print_json, progress_bar, reported_errors
from verl_pte.bench.learner_settings import BASELINES, QUICK, LearnerSettings
from verl_pte.bench.report import result_files
from verl_pte.bench.settings import DEVICES, DTYPES
from verl_pte.core.attention import BACKENDS
from verl_pte.plan.configs import NAMED

_DEFAULT = LearnerSettings()
_LENGTHS = ",".join(map(str, _DEFAULT.lengths))


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Two lengths of a small model, in a few minutes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object last, instead of tables.")] = False,
    lengths: Annotated[str | None, option("Response tokens, rising.", _LENGTHS)] = None,
    window: Annotated[int | None, option("W of LoRA_c and PTE.", _DEFAULT.window)] = None,
    num_seqs: Annotated[int | None, option("Sequences of the micro-batch.", _DEFAULT.num_seqs)] = None,
    prompt_length: Annotated[int | None, option("Tokens of a prompt.", _DEFAULT.prompt_length)] = None,
    rank: Annotated[int | None, option("Of the adapter.", _DEFAULT.rank)] = None,
    hidden_size: Annotated[int | None, option("Of the random Qwen2.", _DEFAULT.hidden_size)] = None,
    layers: Annotated[int | None, option("Of the random Qwen2.", _DEFAULT.layers)] = None,
    model: Annotated[str | None, option(f"{', '.join(NAMED)}, or a config.json.", "the random Qwen2")] = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.", _DEFAULT.dtype)] = None,
    device: Annotated[str | None, option(f"{', '.join(DEVICES)}.", _DEFAULT.device)] = None,
    attention: Annotated[str | None, option(f"{', '.join(BACKENDS)}.", _DEFAULT.attention)] = None,
    threads: Annotated[int | None, option("Of each method's process, on CPUs.", _DEFAULT.threads)] = None,
    chunk_tokens: Annotated[int | None, option("Most tokens of a replay's call.", _DEFAULT.chunk_tokens)] = None,
    baseline: Annotated[str | None, option(f"Full cache by: {', '.join(BASELINES)}.", _DEFAULT.baseline)] = None,
    checkpointing: Annotated[
        bool | None, option("Of the baseline.", "--checkpointing", "--checkpointing/--no-checkpointing")
    ] = None,
    repeats: Annotated[int | None, option("Of each measurement.", _DEFAULT.repeats)] = None,
    seed: Annotated[int | None, option("Of weights and tokens.", _DEFAULT.seed)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """Memory and time of one forward and backward: LoRA with the full cache beside LoRA_c and PTE in the replay.

    Options given beside --quick replace its own.
    """
    given: dict[str, Any] = dict(window=window, num_seqs=num_seqs, prompt_length=prompt_length, rank=rank)
    given |= dict(hidden_size=hidden_size, layers=layers, model=model, dtype=dtype, device=device, attention=attention)
    given |= dict(threads=threads, chunk_tokens=chunk_tokens, baseline=baseline, checkpointing=checkpointing)
    given |= dict(repeats=repeats, seed=seed)
    with reported_errors():
        if lengths is not None:
            given["lengths"] = parse_lengths(lengths, _LENGTHS)
        chosen = {name: value for name, value in given.items() if value is not None}
        _run(LearnerSettings(**(QUICK if quick else {}) | chosen), output, as_json)


def _run(settings: LearnerSettings, output: Path, as_json: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    # Before the run: its own load would be counted, and a checkout may move on.
    hardware, commit = machine.hardware(), machine.commit()
    console = Console(stderr=as_json)
    with progress_bar(console, learner.total_work(settings)) as progress:
        measured = learner.measure(settings, output, progress)
    rows = learner_report.summarize(settings, measured.samples)
    ratios = learner_report.ratios(settings, measured.samples)
    content = {
        "settings": dataclasses.asdict(settings),
        "machine": hardware,
        "versions": machine.versions(),
        "commit": commit,
        "workers": measured.workers,
        "baseline": measured.workers["full"]["runs"],
        "ratios": ratios,
        "summary": rows,
        "samples": measured.samples,
    }
    json_file, plot_file = result_files(output, "learner", settings.attention)
    json_file.write_text(json.dumps(content, indent=2) + "\n")
    plot = draw_if_possible(plot_file, lambda path: learner_report.draw(settings, rows, path))
    if as_json:
        shown = ("settings", "machine", "versions", "commit", "baseline", "ratios", "summary")
        print_json({key: content[key] for key in shown})
        return
    console.print(learner_report.tables(settings, rows, ratios, measured.workers))
    console.print(f"numbers: {json_file}   {plot}", soft_wrap=True, markup=False)
