"""``verl-pte doctor``: the report and the exit status; what is looked at is verl_pte/doctor's."""

import json
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from verl_pte.doctor.check import Check

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


class Goal(StrEnum):
    """What has to work here."""

    core = "core"
    verl = "verl"
    vllm = "vllm"


def doctor(
    goals: Annotated[
        list[Goal] | None,
        typer.Option(
            "--for",
            help="What has to work here: verl is training with verl on the native engine, vllm rollouts and serving on "
            "vLLM, core use without either. Repeat it for several. What is not named can only be a warning.",
            show_default="verl",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what works here: versions, plugins, devices, attention backends, and a short self test.

    Exit status 0 if what has to work does, warnings or not, else 1.
    """
    from verl_pte.doctor.check import Part, State
    from verl_pte.doctor.examine import examine

    needed = [Part(goal.value) for goal in goals or [Goal.verl]]
    with Console(stderr=True).status("importing verl and vLLM, running a tiny model: half a minute"):
        checks = [check.judged(needed) for check in examine()]
    fine = not any(check.state is State.problem for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": fine, "for": needed, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _show(checks, fine, needed)
    if not fine:
        raise typer.Exit(1)


def _show(checks: "list[Check]", fine: bool, needed: list) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        state = Text(check.state, style=_STYLES[check.state])
        table.add_row(state, check.name, Text(check.found), Text(check.advice))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{', '.join(needed)}: {'works here' if fine else 'does not work here'}", soft_wrap=True)
