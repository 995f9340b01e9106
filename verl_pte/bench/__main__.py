"""The command line: ``python -m verl_pte.bench rollout``.

Prints a table, and writes ``rollout_<engine>.json`` (settings, machine, versions, every sample) and
``rollout_<engine>.png``; with another attention than sdpa its name follows the engine's. Other commands have modules
of their own, and a line each at the end of this one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from verl_pte.bench import equal_memory, flops_command, learner_command, machine, report, rollout
from verl_pte.bench.command import (
    draw_if_possible,
    option,
    parse_lengths,
    print_json,
    progress_bar,
    reported_errors,
)
from verl_pte.bench.decode_command import decode_command
from verl_pte.bench.learning.command import learning_command
from verl_pte.bench.settings import DEVICES, DTYPES, ENGINES, QUICK, Settings, default_engine
from verl_pte.core.attention import BACKENDS
from verl_pte.plan.configs import NAMED
from verl_pte.vllm.version import require_version

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def benchmarks() -> None:
    """What PTE costs and saves beside its baselines."""


_DEFAULT = Settings()
_LENGTHS = ",".join(map(str, _DEFAULT.lengths))


@app.command("rollout")
def rollout_command(
    engine: Annotated[
        str | None,
        option(f"{' or '.join(ENGINES)}.", "vllm if installed, native with a --device or --attention of its own"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny run, to see that all works.")] = False,
    lengths: Annotated[str | None, option("Tokens generated, rising.", _LENGTHS)] = None,
    window: Annotated[int | None, option("W of LoRA_c and PTE.", _DEFAULT.window)] = None,
    num_seqs: Annotated[int | None, option("Sequences decoded at once.", _DEFAULT.num_seqs)] = None,
    prompt_length: Annotated[int | None, option("Tokens of a prompt.", _DEFAULT.prompt_length)] = None,
    rank: Annotated[int | None, option("Of the adapter.", _DEFAULT.rank)] = None,
    hidden_size: Annotated[int | None, option("Of the random Qwen2.", _DEFAULT.hidden_size)] = None,
    layers: Annotated[int | None, option("Of the random Qwen2.", _DEFAULT.layers)] = None,
    model: Annotated[str | None, option(f"{', '.join(NAMED)}, or a config.json.", "the random Qwen2")] = None,
    dtype: Annotated[str | None, option(f"{', '.join(DTYPES)}.", _DEFAULT.dtype)] = None,
    device: Annotated[str | None, option(f"Of the native engine: {', '.join(DEVICES)}.", _DEFAULT.device)] = None,
    attention: Annotated[str | None, option(f"{', '.join(BACKENDS)}.", _DEFAULT.attention)] = None,
    threads: Annotated[int | None, option("Of each method's process, on CPUs.", _DEFAULT.threads)] = None,
    eager: Annotated[bool | None, option("vLLM without or with compilation.", "--compile", "--eager/--compile")] = None,
    repeats: Annotated[int | None, option("Of each measurement.", _DEFAULT.repeats)] = None,
    seed: Annotated[int | None, option("Of weights and prompts.", _DEFAULT.seed)] = None,
    equal_memory: Annotated[
        bool,
        typer.Option("--equal-memory", help="Also as many sequences of each method as fit into one cache budget."),
    ] = False,
    budget_mib: Annotated[
        float | None, option("That budget.", "the full cache's for all sequences at the longest length")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON line, last.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """Time and cache of LoRA with the full cache, LoRA_c and PTE, side by side, at several lengths.

    Options given beside --quick replace its own.
    """
    given: dict[str, Any] = dict(
        engine=engine, window=window, num_seqs=num_seqs, prompt_length=prompt_length, rank=rank
    )
    given |= dict(hidden_size=hidden_size, layers=layers, model=model, dtype=dtype, device=device, attention=attention)
    given |= dict(threads=threads, eager=eager, repeats=repeats, seed=seed, budget_mib=budget_mib)
    with reported_errors():
        if lengths is not None:
            given["lengths"] = parse_lengths(lengths, _LENGTHS)
        chosen = {name: value for name, value in given.items() if value is not None}
        where = {name: chosen.get(name, getattr(_DEFAULT, name)) for name in ("device", "attention")}
        chosen.setdefault("engine", default_engine(**where))
        # Part of a quick run on the native engine; vLLM would be started once for each length and method.
        chosen["equal_memory"] = equal_memory or budget_mib is not None or (quick and chosen["engine"] == "native")
        _run(Settings(**(QUICK if quick else {}) | chosen), output, as_json)


def _run(settings: Settings, output: Path, as_json: bool) -> None:
    if settings.engine == "vllm":
        require_version()
    output.mkdir(parents=True, exist_ok=True)
    # Before the run: its own load would be counted, and a checkout may move on.
    hardware, commit = machine.hardware(), machine.commit()
    console = Console()
    with progress_bar(console, rollout.total_work(settings)) as progress:
        measured = rollout.measure(settings, output, progress)
    rows, memory = report.summarize(settings, measured.samples), report.memory(measured.samples)
    facts = {
        "settings": dataclasses.asdict(settings),
        "machine": hardware,
        "versions": machine.versions(),
        "commit": commit,
        "workers": measured.workers,
        "summary": rows,
        "time_ratios": report.time_ratios(rows),
        "memory": memory,
        "equal_memory": measured.equal_memory,
    }
    json_file, plot = report.result_files(output, f"rollout_{settings.engine}", settings.attention)
    json_file.write_text(json.dumps(facts | {"samples": measured.samples}, indent=2) + "\n")
    drawn = draw_if_possible(plot, lambda path: report.draw(settings, rows, measured.equal_memory, path))
    console.print(report.tables(settings, rows, memory))
    if measured.equal_memory is not None:
        console.print(equal_memory.table(settings, measured.equal_memory))
    console.print(f"engine: {settings.engine}   numbers: {json_file}   {drawn}", soft_wrap=True, markup=False)
    if as_json:
        print_json(facts)


app.command("learning")(learning_command)
app.command("decode")(decode_command)
app.command("flops")(flops_command.command)
app.command("learner")(learner_command.command)

if __name__ == "__main__":
    app()
