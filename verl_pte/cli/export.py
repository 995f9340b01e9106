"""``verl-pte export``: its options; the work is verl_pte/export's."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from verl_pte.cli.errors import user_errors


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoints of a verl run (trainer.default_local_dir), one of its global_step_N folders, the output "
            "of a warm start, or the folder of a saved adapter.",
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder to write, a new or an empty one.")],
    step: Annotated[
        int | None, typer.Option(help="Which checkpoint of a run.", show_default="the last complete one")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Name others load the base model by, e.g. its hub id; it goes into the config and the card.",
            show_default="the checkpoint's, unless that is a path",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model to check the tensors against, a directory or a hub id; only its config.json is read.",
            show_default="the checkpoint's",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32 keeps the tensors as they were trained; bfloat16 halves the file and rounds them, so that "
            "log-probabilities are close to the training engine's and no longer equal."
        ),
    ] = "float32",
) -> None:
    """Export an adapter from a checkpoint: a PEFT adapter folder with a model card, to load elsewhere.

    Every tensor is checked to be there, finite, and of the shape that settings and base model ask for. The folder
    appears when it is complete.
    """
    with user_errors():
        from verl_pte.export import Export, check, find

        source = find(checkpoint, step)
        plan = Export(source, Path(output), base, dtype)
        with Console(stderr=True).status(f"exporting {source.adapter}"):
            tensors = check(str(source.adapter), model or plan.model())
            plan.write(tensors)
        size = sum(file.stat().st_size for file in plan.output.iterdir())
        origin = source.training or "training unknown"
        typer.echo(f"{plan.output}: {len(tensors)} tensors, {size / 1e6:.1f} MB, {origin}, base {plan.base_name()}")
