"""``verl-pte prepare-data``: its options, a progress bar, and the counts at the end (verl_pte/data does the work)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from verl_pte.cli.errors import INTERRUPTED, fail, user_errors
from verl_pte.data import FAMILIES, SETS
from verl_pte.data.prompt import DEFAULT_FAMILY

if TYPE_CHECKING:
    from verl_pte.data import Prepared, PromptFormat


def prepare_data(
    sets: Annotated[list[str], typer.Argument(metavar="SET...", help=f"Any of {', '.join(SETS)}.")],
    output: Annotated[Path, typer.Option(help="Folder; each set becomes SET.parquet in it.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="Of one SET: a .parquet, .jsonl or .json file, a folder of such files, or a hub id.",
            show_default="the set's hub id",
        ),
    ] = None,
    family: Annotated[str, typer.Option(help=f"How the model is asked: {', '.join(FAMILIES)}.")] = DEFAULT_FAMILY,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|FILE",
            help="The user's turn, with {problem} where the problem goes.",
            show_default="the family's",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(help='System message; "" for none.', show_default="the family's"),
    ] = None,
    allow_any_count: Annotated[
        bool, typer.Option("--allow-any-count", help="Write also if a set has not the number of problems it should.")
    ] = False,
) -> None:
    """Turn math data sets into parquet files that verl reads.

    Copies are left out, answers brought into the form the reward reads, problems counted. A set that has not as many
    problems as it should is not written. Running it again replaces the files.
    """
    with user_errors():
        from verl_pte.data import prompt_format
        from verl_pte.data.sets import math_set

        for name in sets:
            math_set(name)
        if len(sets) > 1 and (source is not None or output.suffix == ".parquet"):
            named = f"--source {source}" if source is not None else f"--output {output}"
            raise ValueError(f"{named}: is one set's; prepare {' and '.join(sets)} one by one")
        _run(list(dict.fromkeys(sets)), output, source, prompt_format(family, template, system), allow_any_count)


def _run(sets: list[str], output: Path, source: str | None, prompt: "PromptFormat", allow_any_count: bool) -> None:
    done: list[Prepared] = []
    name = ""
    try:
        for name in sets:
            done.append(_one(name, output, source, prompt, allow_any_count))
    except RuntimeError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        Console(stderr=True, highlight=False).print(f"stopped; nothing of {name} was written")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if done:
            _show(done)


def _one(name: str, output: Path, source: str | None, prompt: "PromptFormat", allow_any_count: bool) -> "Prepared":
    from verl_pte.data import prepare

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=None)
        return prepare(
            name,
            output,
            source=source,
            prompt=prompt,
            allow_any_count=allow_any_count,
            progress=lambda rows, total: bar.update(task, completed=rows, total=total),
        )


def _show(done: "list[Prepared]") -> None:
    console = Console(highlight=False)
    table = Table("set")
    for heading in ("read", "duplicates", "dropped", "written", "expected"):
        table.add_column(heading, justify="right")
    for prepared in done:
        counts = (prepared.read, prepared.duplicates, sum(prepared.dropped.values()), prepared.written)
        table.add_row(prepared.name, *(f"{count:,}" for count in counts), prepared.expected)
    console.print(table)
    for prepared in done:
        for reason, count in prepared.dropped.items():
            console.print(f"{prepared.name}: {count} dropped: {reason}", soft_wrap=True)
        console.print(f"{prepared.name}: {prepared.path}", soft_wrap=True)
