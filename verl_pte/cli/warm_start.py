"""``verl-pte warm-start``: its options, and what is seen of a run while it goes (distill/run.py does it).

On a terminal a progress bar, otherwise a line a step, on standard error; what the user needs at the end on standard
output.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from verl_pte.cli.errors import INTERRUPTED, fail, user_errors
from verl_pte.cli.progress import RunDisplay

if TYPE_CHECKING:
    from verl_pte.distill.run import StepRecord


def warm_start(
    model: Annotated[str, typer.Option(help="Base model: a directory, or a hub id.")],
    prompts: Annotated[str, typer.Option(help="Parquet file of prompts; only the prompts are read.")],
    output: Annotated[str, typer.Option(help="Folder of the run; the result is its subfolder adapter.")],
    prompt_column: Annotated[
        str,
        typer.Option(
            help="Lists of {role, content}, which go through the chat template, or strings, taken as they are."
        ),
    ] = "prompt",
    pte: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of docs/configuration.md, e.g. window=2048; repeat it."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Prompts a step, of all processes together.")] = 32,
    micro_batch: Annotated[int, typer.Option(help="Answers replayed at once: memory.")] = 4,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Answers generated at once: memory.", show_default="all of a step")
    ] = None,
    lr: Annotated[float, typer.Option(help="AdamW's peak rate; no weight decay.")] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(help="Steps the rate rises; then a cosine to 10 % of the peak.")] = 10,
    grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    max_prompt_length: Annotated[int, typer.Option(help="In tokens; longer prompts are left out.")] = 1024,
    max_response_length: Annotated[int, typer.Option(help="In tokens; longer answers are cut off.")] = 3072,
    temperature: Annotated[float, typer.Option(help="Of the teacher's answers; 0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Of the teacher's answers.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the adapter, the order of prompts and the answers.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(help="Of the base: auto is the checkpoint's, if not float16. The adapter is float32."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
) -> None:
    """Distil the full-cache base into an adapter under a window, without labels: a start for reinforcement learning.

    The base model answers the prompts with its full cache. The adapter, under its window, is trained to give the same
    distribution at every token of the answers (KL).

    A run that was stopped goes on when it is started again with the same options. With torchrun it is data parallel:
    torchrun --nproc-per-node 8 --no-python verl-pte warm-start ...
    """
    with user_errors():
        from verl_pte.distill.settings import WarmStartSettings, parse_knobs

        settings = WarmStartSettings(
            model=model,
            pte=parse_knobs(pte or []),
            steps=steps,
            batch_size=batch_size,
            micro_batch=micro_batch,
            max_num_seqs=max_num_seqs,
            lr=lr,
            warmup_steps=warmup_steps,
            grad_norm=grad_norm,
            max_prompt_length=max_prompt_length,
            max_response_length=max_response_length,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            dtype=dtype,
            device=device,
            save_every=save_every,
        )
        _run(settings, prompts, prompt_column, output)


def _run(settings: Any, prompts: str, prompt_column: str, output: str) -> None:
    from verl_pte.distill.folder import RunFolder
    from verl_pte.distill.plot import plot_kl
    from verl_pte.distill.prompts import read_prompts
    from verl_pte.distill.ranks import Ranks
    from verl_pte.distill.run import WarmStart, load_student
    from verl_pte.peft.saved import base_config, load_tokenizer

    base_config(settings.model)
    ranks, folder = Ranks(settings.device), RunFolder(output)
    tokenizer = load_tokenizer(settings.model)
    errors = Console(stderr=True, highlight=False, quiet=not ranks.is_first)
    with errors.status(f"reading {prompts}"):
        found = read_prompts(prompts, prompt_column, tokenizer, settings.max_prompt_length)
    folder.check(settings.identity(found.digest()))
    if folder.finished:
        if ranks.is_first:
            typer.echo(f"nothing to do: this run has finished, its adapter is {folder.adapter}")
        return
    errors.print(
        f"{len(found.token_ids)} prompts; {found.num_too_long} longer than {settings.max_prompt_length} left out"
    )
    with ranks:
        with errors.status(f"loading {settings.model}"):
            student = load_student(settings, ranks.device)
        run = WarmStart(settings, found, student, tokenizer, folder, ranks)
        if run.steps_done:
            errors.print(f"going on after step {run.steps_done}")
        try:
            with _Display(errors, "step", settings.steps, run.steps_done) as display:
                run.run(display.show)
        except FloatingPointError as error:
            fail(error, 1)
        except KeyboardInterrupt:
            errors.print(f"stopped after step {run.steps_done}; the same command goes on from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from None
    if ranks.is_first:
        plot_kl(folder.records(), Path(output) / "kl.png")
        for remark in _remarks(settings, list(folder.records())):
            errors.print(remark)
        typer.echo(f"adapter: {folder.adapter}")


def _remarks(settings: Any, records: list[dict[str, Any]]) -> list[str]:
    """What a user should know of the run's answers."""
    counted = [record["cut"] for record in records if "cut" in record]  # a run begun by an older version has less
    remarks, cut, pte = [], sum(counted), settings.pte
    if cut:
        answers = settings.batch_size * len(counted)
        remarks.append(
            f"{cut} of {answers} answers were cut off at --max-response-length {settings.max_response_length}"
        )
    remembers = pte.window is not None and pte.update_state and not pte.freeze_state
    if remembers and all(record["update_ratio"] is None for record in records):
        remarks.append(
            f"no answer outgrew the window of {pte.window} tokens: the adapter has learned to remember nothing"
        )
    return remarks


class _Display(RunDisplay):
    """Of steps."""

    def show(self, record: "StepRecord") -> None:
        """Take a step in."""
        self.advance(f"KL {record.kl:.4f}  lr {record.lr:.1e}  {record.tokens / record.seconds:.0f} tokens/s")
