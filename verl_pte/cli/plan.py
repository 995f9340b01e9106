"""``verl-pte plan``: whether a run fits its devices. What is counted, and how: verl_pte/plan."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from verl_pte.cli.errors import user_errors

if TYPE_CHECKING:
    from verl_pte.plan import Plan

_GIB = 2**30


def plan(
    model: Annotated[
        str,
        typer.Option(help="qwen2.5-3b, qwen2.5-7b, r1-distill-llama-8b, a config.json or its folder, or a hub id."),
    ],
    gpus: Annotated[int, typer.Option(help="Devices of the run.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Of one device, in GiB.")] = 80.0,
    prompt_length: Annotated[int, typer.Option(help="data.max_prompt_length")] = 1024,
    response_length: Annotated[int, typer.Option(help="data.max_response_length")] = 3072,
    micro_batch: Annotated[int, typer.Option(help="actor.ppo_micro_batch_size_per_gpu")] = 4,
    max_num_seqs: Annotated[int, typer.Option(help="rollout.max_num_seqs; of the native engine")] = 64,
    engine: Annotated[str, typer.Option(help="Of the rollouts: native or vllm.")] = "native",
    tensor_parallel: Annotated[int, typer.Option(help="rollout.tensor_model_parallel_size, of vLLM")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="rollout.gpu_memory_utilization, of vLLM")] = 0.5,
    param_offload: Annotated[
        bool, typer.Option("--param-offload", help="actor.fsdp_config.param_offload and optimizer_offload are true.")
    ] = False,
    pte: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of docs/configuration.md, e.g. window=2048; repeat it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Count what a run takes of a device's memory, by phase, and say whether it fits.

    Nothing is loaded and no GPU is needed: the replay and the engine run with shapes alone. A critic (PPO) is not
    counted. Ends with status 1 if a phase does not fit. On an H200 a replay took up to 2 % more than counted, without
    FSDP; on a CPU replay and prefill are within a third of what was measured.
    """
    with user_errors():
        from verl_pte.distill.settings import parse_knobs
        from verl_pte.plan import PlanSettings, estimate

        settings = PlanSettings(
            config=_config(model),
            pte=parse_knobs(pte or ()),
            num_gpus=gpus,
            gpu_memory=gpu_memory,
            prompt_length=prompt_length,
            response_length=response_length,
            micro_batch=micro_batch,
            max_num_seqs=max_num_seqs,
            engine=engine,
            tensor_parallel=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            param_offload=param_offload,
        )
        console = Console(stderr=True)
        with console.status("counting") as status:
            found = estimate(settings, lambda what: status.update(f"counting: {what}"))
    if as_json:
        typer.echo(json.dumps(_plain(found)))
    else:
        _show(found, model)
    if not found.fits:
        raise typer.Exit(1)


def _config(model: str) -> Any:
    from pathlib import Path

    from transformers import AutoConfig

    from verl_pte.plan.configs import NAMED, load_config

    if model in NAMED or Path(model).exists():
        return load_config(model)
    try:
        return AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(
            f"--model {model}: neither {', '.join(NAMED)}, nor a config.json or its folder, nor to be had from the hub "
            f"({str(error).splitlines()[0]})"
        ) from None


def _show(found: "Plan", model: str) -> None:
    console, settings = Console(), found.settings
    for phase in found.phases:
        table = Table("part", "GiB", "", title=phase.name, title_justify="left", show_footer=True)
        table.columns[1].justify = "right"
        for part in phase.parts:
            table.add_row(part.name, f"{part.bytes / _GIB:.1f}", part.note)
        total = phase.bytes / _GIB
        table.columns[0].footer, table.columns[1].footer = "together", f"{total:.1f}"
        fits = total <= settings.gpu_memory
        table.columns[2].footer = f"{'fits' if fits else 'DOES NOT FIT'} {settings.gpu_memory:g} GiB"
        console.print(table)
    bounded, full = (found.facts[f"{k}cache_bytes_per_sequence"] / 2**20 for k in ("", "full_"))
    console.print(
        f"{model}: {found.parameters.base / 1e9:.2f} B parameters, adapter {found.parameters.adapter / 1e6:.1f} M. "
        f"Cache of a sequence: {bounded:.0f} MiB; a full cache at this length: {full:.0f} MiB.",
        soft_wrap=True,
        highlight=False,
    )


def _plain(found: "Plan") -> dict[str, Any]:
    return {
        "fits": found.fits,
        "parameters": found.parameters._asdict(),
        "phases": {
            phase.name: {"bytes": phase.bytes, "parts": {part.name: part.bytes for part in phase.parts}}
            for phase in found.phases
        },
        **found.facts,
    }
