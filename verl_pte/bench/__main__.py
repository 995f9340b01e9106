"""The command line: ``python -m verl_pte.bench rollout``.

Prints a table, and writes ``rollout_<engine>.json`` (settings, machine, versions, every sample) and
``rollout_<engine>.png``.
"""

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_pte.bench import machine, report, rollout
from verl_pte.bench.learning.command import learning_command
from verl_pte.bench.decode_command import decode_command
from verl_pte.bench.settings import DEVICES, DTYPES, ENGINES, QUICK, Settings
from verl_pte.vllm.version import require_version

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def benchmarks() -> None:
    """What PTE costs and saves beside its baselines."""


def _option(help: str, default: Any, *flags: str) -> Any:
    return typer.Option(*flags, help=f"{help} Default: {default}.", show_default=False)


_DEFAULT = Settings()
_LENGTHS = ",".join(map(str, _DEFAULT.lengths))


@app.command("rollout")
def rollout_command(
    engine: Annotated[str, typer.Option(help=f"{' or '.join(ENGINES)}.")] = _DEFAULT.engine,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny run, to see that all works.")] = False,
    lengths: Annotated[str | None, _option("Tokens generated, rising.", _LENGTHS)] = None,
    window: Annotated[int | None, _option("W of LoRA_c and PTE.", _DEFAULT.window)] = None,
    num_seqs: Annotated[int | None, _option("Sequences decoded at once.", _DEFAULT.num_seqs)] = None,
    prompt_length: Annotated[int | None, _option("Tokens of a prompt.", _DEFAULT.prompt_length)] = None,
    rank: Annotated[int | None, _option("Of the adapter.", _DEFAULT.rank)] = None,
    hidden_size: Annotated[int | None, _option("Of the random Qwen2.", _DEFAULT.hidden_size)] = None,
    layers: Annotated[int | None, _option("Of the random Qwen2.", _DEFAULT.layers)] = None,
    model: Annotated[str | None, _option("A config.json to take the model's sizes from.", "the random Qwen2")] = None,
    dtype: Annotated[str | None, _option(f"{', '.join(DTYPES)}.", _DEFAULT.dtype)] = None,
    device: Annotated[str | None, _option(f"Of the native engine: {', '.join(DEVICES)}.", _DEFAULT.device)] = None,
    threads: Annotated[int | None, _option("Of each method's process, on CPUs.", _DEFAULT.threads)] = None,
    eager: Annotated[
        bool | None, _option("vLLM without or with compilation.", "--compile", "--eager/--compile")
    ] = None,
    repeats: Annotated[int | None, _option("Of each measurement.", _DEFAULT.repeats)] = None,
    seed: Annotated[int | None, _option("Of weights and prompts.", _DEFAULT.seed)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """Time and cache of LoRA with the full cache, LoRA_c and PTE, side by side, at several lengths.

    Options given beside --quick replace its own.
    """
    given: dict[str, Any] = dict(
        engine=engine, window=window, num_seqs=num_seqs, prompt_length=prompt_length, rank=rank
    )
    given |= dict(hidden_size=hidden_size, layers=layers, model=model, dtype=dtype, device=device)
    given |= dict(threads=threads, eager=eager, repeats=repeats, seed=seed)
    try:
        if lengths is not None:
            given["lengths"] = _parse(lengths)
        chosen = {name: value for name, value in given.items() if value is not None}
        _run(Settings(**(QUICK if quick else {}) | chosen), output)
    except (ValueError, RuntimeError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def _parse(lengths: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in lengths.split(","))
    except ValueError:
        raise ValueError(f"--lengths {lengths}: must be numbers with commas between, e.g. {_LENGTHS}") from None


def _run(settings: Settings, output: Path) -> None:
    if settings.engine == "vllm":
        require_version()
    if find_spec("matplotlib") is None:
        raise RuntimeError("the plot needs matplotlib: pip install 'verl-pte[docs]'")
    output.mkdir(parents=True, exist_ok=True)
    # Before the run: its own load would be counted, and a checkout may move on.
    hardware, commit = machine.hardware(), machine.commit()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=rollout.total_work(settings))
        measured = rollout.measure(
            settings, output, lambda text, done: bar.update(task, description=text, advance=done)
        )
    rows, memory = report.summarize(settings, measured.samples), report.memory(measured.samples)
    json_file, plot = (output / f"rollout_{settings.engine}{suffix}" for suffix in (".json", ".png"))
    content = {
        "settings": dataclasses.asdict(settings),
        "machine": hardware,
        "versions": machine.versions(),
        "commit": commit,
        "workers": measured.workers,
        "summary": rows,
        "memory": memory,
        "samples": measured.samples,
    }
    json_file.write_text(json.dumps(content, indent=2) + "\n")
    report.draw(settings, rows, plot)
    console.print(report.tables(settings, rows, memory))
    console.print(f"numbers: {json_file}   plot: {plot}", soft_wrap=True)


app.command("learning")(learning_command)
app.command("decode")(decode_command)

if __name__ == "__main__":
    app()
