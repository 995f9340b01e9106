"""``python -m verl_pte.bench flops``: floating-point operations of the methods, and their ratios to the full cache.

Prints a table or, with ``--json``, one JSON object, and writes ``flops.json`` and ``flops.png``. How it is counted is
in flops.py.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from verl_pte.bench import machine
from verl_pte.bench.command import draw_if_possible, parse_lengths, print_json, reported_errors
from verl_pte.config import PTEConfig
from verl_pte.plan.configs import NAMED, check_model, load_config

# As the JSON names them, with their titles; the ratios are to the first.
METHODS = {"full": "full cache", "window": "LoRA_c", "pte": "PTE"}
PARTS = ("rollout", "learner", "total")
# PTE / LoRA as published: 2.7T / 4.2T (3B), 3.6T / 5.7T (7B), 4.6T / 7.4T (8B).
PAPER = {"qwen2.5-3b": 2.7 / 4.2, "qwen2.5-7b": 3.6 / 5.7, "r1-distill-llama-8b": 4.6 / 7.4}
PAPER_RANGE = (0.62, 0.64)

NOTES = (
    "One sequence. Rollout: prefill of the prompt and a decode step for every response token but the last.",
    "Learner: for the full cache one forward and backward of LoRA over all tokens at once; for the bounded methods "
    "both passes of the replay, the recomputation of the second included. `recomputed` is the full cache with "
    "gradient checkpointing, verl's default, whose recomputation is then counted too.",
    "FlopCounterMode counts matrix products and attention, two operations for each multiply and add. Not counted: "
    "embedding look-ups, norms, rotations, softmax, activations, log-probs, sampling, the optimizer, copies.",
    "Attention: `visible` leaves out (query, key) pairs behind the mask, as kernels do that skip them; `counted` is "
    "FlopCounterMode's own figure, which has every pair of each product. Decode steps attend to what is visible; the "
    "native engine computes over all slots of its fixed rows.",
    "The products of attention's backward are those of torch's math kernel: a flash kernel recomputes one more.",
    "The paper does not say what its figures count.",
)


@dataclass(frozen=True)
class FlopsSettings:
    """One run. Raises ValueError naming the option, its value and what would be right."""

    model: str = "qwen2.5-3b"
    response_lengths: tuple[int, ...] = (32768,)
    prompt_length: int = 512
    window: int = 1024
    rank: int = 32
    num_global_tokens: int = 32
    evict_fraction: float = 0.25
    chunk_tokens: int = 512

    def __post_init__(self) -> None:
        check_model(self.model)
        lengths = ",".join(map(str, self.response_lengths))
        if not self.response_lengths or any(length < 1 for length in self.response_lengths):
            raise ValueError(f"--response-length {lengths}: must be positive numbers of tokens")
        if sorted(set(self.response_lengths)) != list(self.response_lengths):
            raise ValueError(f"--response-length {lengths}: must rise, each length is counted once")
        if self.prompt_length < 1:
            raise ValueError(f"--prompt-length {self.prompt_length}: must be at least 1")
        self.method("pte")  # checks the others

    def method(self, name: str) -> PTEConfig:
        """The configuration of one of METHODS."""
        knobs: dict[str, Any] = dict(rank=self.rank, alpha=float(self.rank), chunk_tokens=self.chunk_tokens)
        if name == "full":
            return PTEConfig(**knobs, window=None, freeze_state=True)
        knobs |= dict(window=self.window, evict_fraction=self.evict_fraction)
        return PTEConfig(**knobs, num_global_tokens=self.num_global_tokens, freeze_state=name == "window")


def count(settings: FlopsSettings, response_length: int, progress: Callable[[str], Any] = str) -> dict[str, Any]:
    """One row: FLOPs of each method and part, `visible` and `counted`; the visible ones' ratios to the full cache."""
    from verl_pte.bench import flops

    config, prompt_length = load_config(settings.model), settings.prompt_length
    found: dict[str, dict[str, flops.Flops]] = {}
    for name, title in METHODS.items():
        progress(f"{response_length} tokens, {title}")
        method = settings.method(name)
        parts = {"rollout": flops.rollout(config, method, prompt_length, response_length)}
        if name == "full":
            run = prompt_length + response_length - 1  # the last token is predicted and not run
            parts["learner"] = flops.full_cache_step(config, settings.rank, run, checkpointing=False)
            parts["learner_recomputed"] = flops.full_cache_step(config, settings.rank, run, checkpointing=True)
            parts["total_recomputed"] = parts["rollout"] + parts["learner_recomputed"]
        else:
            first, second = flops.replay(config, method, prompt_length, response_length)
            parts |= {"learner_pass_1": first, "learner_pass_2": second, "learner": first + second}
        parts["total"] = parts["rollout"] + parts["learner"]
        found[name] = parts
    full = found["full"]
    ratios = {}
    for name in list(METHODS)[1:]:
        ratios[name] = {part: found[name][part].visible / full[part].visible for part in PARTS}
        for part in ("learner", "total"):
            ratios[name][f"{part}_recomputed"] = found[name][part].visible / full[f"{part}_recomputed"].visible
    shown = {name: {part: dataclasses.asdict(value) for part, value in parts.items()} for name, parts in found.items()}
    return {"response_length": response_length, "flops": shown, "ratios": ratios}


def command(
    model: Annotated[str, typer.Option(help=f"{', '.join(NAMED)}, or a config.json.")] = FlopsSettings.model,
    response_length: Annotated[str, typer.Option(help="Tokens; several with commas between, rising.")] = "32768",
    prompt_length: Annotated[int, typer.Option(help="Tokens.")] = FlopsSettings.prompt_length,
    window: Annotated[int, typer.Option(help="W of LoRA_c and PTE.")] = FlopsSettings.window,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = FlopsSettings.rank,
    num_global_tokens: Annotated[int, typer.Option(help="Of PTE.")] = FlopsSettings.num_global_tokens,
    evict_fraction: Annotated[float, typer.Option(help="Of the window.")] = FlopsSettings.evict_fraction,
    chunk_tokens: Annotated[int, typer.Option(help="Most tokens of a replay's call.")] = FlopsSettings.chunk_tokens,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/bench"),
) -> None:
    """FLOPs of rollout and learner for LoRA with the full cache, LoRA_c and PTE, counted on the meta device."""
    with reported_errors():
        settings = FlopsSettings(
            model=model,
            response_lengths=parse_lengths(response_length, "3072,32768", "--response-length"),
            prompt_length=prompt_length,
            window=window,
            rank=rank,
            num_global_tokens=num_global_tokens,
            evict_fraction=evict_fraction,
            chunk_tokens=chunk_tokens,
        )
        _run(settings, output, as_json)


def _run(settings: FlopsSettings, output: Path, as_json: bool) -> None:
    from verl_pte.bench.flops import parameter_count

    output.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("counting") as status:
        rows = [count(settings, length, status.update) for length in settings.response_lengths]
    longest = rows[-1]
    content = {
        "model": settings.model,
        "parameters": parameter_count(load_config(settings.model)),
        "response_length": longest["response_length"],
        **{name: longest["flops"][name]["total"]["visible"] for name in METHODS},
        "ratios": {f"{name}/full": ratios["total"] for name, ratios in longest["ratios"].items()},
        "paper": {"pte/full": PAPER.get(settings.model), "range": PAPER_RANGE},
        "settings": dataclasses.asdict(settings),
        "lengths": rows,
        "notes": NOTES,
        "versions": machine.versions(),
        "machine": machine.hardware(),
        "commit": machine.commit(),
    }
    (output / "flops.json").write_text(json.dumps(content, indent=2) + "\n")
    plot = draw_if_possible(output / "flops.png", lambda path: draw(settings, rows, path))
    if as_json:
        print_json(content)
        return
    console = Console()
    console.print(table(settings, content))
    console.print(f"numbers: {output / 'flops.json'}   {plot}", soft_wrap=True, markup=False)


def table(settings: FlopsSettings, content: dict[str, Any]) -> Group:
    """For the terminal."""
    lines = Table(
        title=f"{settings.model} ({content['parameters'] / 1e9:.2f}B): TFLOPs of one sequence, prompt "
        f"{settings.prompt_length}, W={settings.window}, rank {settings.rank}",
        caption="Ratios are of totals; `counted` is that of FlopCounterMode's own figures to the full cache's.",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in ("tokens", "method", *PARTS, "/ full", "/ recomputed", "counted"):
        lines.add_column(name, justify="left" if name == "method" else "right")
    for row in content["lengths"]:
        full = row["flops"]["full"]
        recomputed = {"rollout": full["rollout"]} | {part: full[f"{part}_recomputed"] for part in PARTS[1:]}
        shown = {title: row["flops"][name] for name, title in METHODS.items()} | {"recomputed": recomputed}
        for title, parts in shown.items():
            lines.add_row(
                str(row["response_length"]),
                title,
                *(f"{parts[part]['visible'] / 1e12:.1f}" for part in PARTS),
                *(f"{parts['total']['visible'] / other['total']['visible']:.3f}" for other in (full, recomputed)),
                f"{parts['total']['counted'] / full['total']['counted']:.3f}",
                end_section=parts is recomputed,
            )
    published = content["paper"]["pte/full"]
    paper = f"Paper, PTE / LoRA: {PAPER_RANGE[0]} to {PAPER_RANGE[1]}" + (
        "." if published is None else f"; for this model {published:.2f}."
    )
    return Group(lines, Text(paper), *(Text(f"- {note}") for note in NOTES))


def draw(settings: FlopsSettings, rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to the full cache over the response length, and the paper's range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    lengths = [row["response_length"] for row in rows]
    for name, color in (("window", "tab:blue"), ("pte", "tab:orange")):
        for part, style in (("rollout", ":"), ("learner", "--"), ("total", "-")):
            values = [row["ratios"][name][part] for row in rows]
            axes.plot(lengths, values, style, marker=".", color=color, label=f"{METHODS[name]}, {part}")
    axes.axhspan(*PAPER_RANGE, color="tab:green", alpha=0.2, label="paper, PTE")
    axes.axhline(1, color="tab:gray", linewidth=0.8)
    axes.set(title=f"{settings.model}: FLOPs / full cache LoRA", xlabel="response tokens", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
