"""Draws the pictures of the README and the documentation: overview, window, state and parts, as SVG in docs/images.

python docs/draw_images.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from verl_pte.core.schedule import Schedule

IMAGES = Path(__file__).with_name("images")

INK, MUTED = "#24292f", "#57606a"
PINNED, PINNED_THOUGHT, WINDOW, EVICTED, STATE = "#8fb8de", "#c9def2", "#a8d5ae", "#f2b880", "#d4b5e8"
CELL = 0.5


def overview() -> Figure:
    """Cache of one layer, and the way of evicted tokens into the weights."""
    figure, ax = _canvas(9.6, 4.8)

    # The tokens of one sequence, oldest on the left.
    y = 7.0
    x = _cells(ax, 0.6, y, 6, PINNED)
    pinned_end = _cells(ax, x, y, 2, PINNED_THOUGHT)
    gone_end = _cells(ax, pinned_end + 0.3, y, 4, "#ffffff", dashed=True)
    evicted_end = _cells(ax, gone_end + 0.3, y, 4, EVICTED)
    window_end = _cells(ax, evicted_end, y, 12, WINDOW)
    ax.annotate("", (window_end + 0.1, y + CELL / 2), (window_end + 1.3, y + CELL / 2), arrowprops=_arrow())
    ax.text(window_end + 0.75, y + 0.45, "next token", ha="center", fontsize=9.5, color=INK)

    _brace(ax, 0.6, pinned_end, y + CELL + 0.15, "pinned: the prompt and the\nthoughts in its last block")
    _brace(ax, gone_end + 0.3, window_end, y + CELL + 0.15, "window: W thought tokens, a ring of slots")
    ax.text(
        (pinned_end + 0.3 + gone_end) / 2, y - 0.45, "evicted\nbefore", ha="center", va="top", fontsize=9.5, color=MUTED
    )
    middle = (gone_end + 0.3 + evicted_end) / 2
    ax.text(middle + 0.25, y - 0.42, "oldest C leave\nwhen the window is full", va="top", fontsize=9.5, color=INK)

    # Evicted keys and values -> encoder -> state -> adapter.
    ax.annotate("", (middle, 4.55), (middle, y - 0.08), arrowprops=_arrow())
    ax.text(middle - 0.2, 5.25, "their K, V", ha="right", fontsize=9.5, color=INK)
    _box(ax, middle - 2.5, 2.65, 5.0, 1.85, EVICTED, "thought encoder", "S' = (q W_Q)(K W_K)ᵀ(V W_V)\none a layer")
    left = middle + 2.5
    ax.annotate("", (left + 1.3, 3.575), (left + 0.05, 3.575), arrowprops=_arrow())
    _box(
        ax, left + 1.4, 2.65, 4.3, 1.85, STATE, "thought state S", "Normalize(S + S'), r x r\none a sequence and layer"
    )
    right = left + 5.7
    ax.annotate("", (right - 2.15, 2.0), (right - 2.15, 2.6), arrowprops=_arrow())
    _box(
        ax,
        right - 9.4,
        0.25,
        9.4,
        1.7,
        "#ffffff",
        "every adapted linear of the layer",
        "y = W x + (α / r) · lora_B ( S ( lora_A x ) )",
    )
    limit = "In the cache of a layer:\nat most pinned + W tokens\nand r x r numbers,\nhowever long the answer"
    ax.text(0.6, 3.3, limit, fontsize=10, color=MUTED, va="center", linespacing=1.35)
    return figure


def window() -> Figure:
    """The example of docs/concepts.md: who is in the cache as tokens arrive, and in which slot."""
    schedule, prompt_len = Schedule(window=8, evict_fraction=0.25, block_size=4), 6
    pinned, total = schedule.pinned(prompt_len), 21
    moments = [15, 16, 18, 19, 20]
    figure, ax = _canvas(9.6, 4.5)
    x, ring_x = 2.9, 14.2
    ax.text(x + total * CELL / 2, 8.1, "tokens by position", ha="center", fontsize=10.5, weight="bold", color=INK)
    ax.text(ring_x + 4 * CELL, 8.1, "the ring's W slots", ha="center", fontsize=10.5, weight="bold", color=INK)
    for row, token in enumerate(moments):
        y = 7.2 - row * 1.25
        ax.text(x - 0.25, y + CELL / 2, f"token {token} is run", ha="right", va="center", fontsize=10, color=INK)
        leaving = range(*(schedule.evicted_at(prompt_len, token) or (0, 0)))
        for position in range(total):
            visible = schedule.is_visible(prompt_len, token, position)
            color = PINNED if position < prompt_len else PINNED_THOUGHT if position < pinned else WINDOW
            _numbered(
                ax,
                x + position * CELL,
                y,
                position if position <= token else None,
                color if visible else EVICTED if position in leaving else "#ffffff",
                dashed=not visible and position not in leaving,
                bold=position == token,
            )
        for slot in range(schedule.window):
            inside = [p for p in range(pinned, token + 1) if (p - pinned) % schedule.window == slot]
            held = inside[-1] if inside and schedule.is_visible(prompt_len, token, inside[-1]) else None
            _numbered(ax, ring_x + slot * CELL, y, held, "#ffffff" if held is None else WINDOW, bold=held == token)
        if leaving:
            note = f"before it, {leaving[0]} to {leaving[-1]} leave"
            ax.text(x + leaving[0] * CELL, y - 0.12, note, va="top", fontsize=9, color=MUTED)
        elif token == moments[0]:
            ax.text(x + pinned * CELL, y - 0.12, "the window is full", va="top", fontsize=9, color=MUTED)
    legend = [
        (0.5, PINNED, "prompt: pinned"),
        (3.9, PINNED_THOUGHT, "thoughts in its last block: pinned"),
        (9.6, WINDOW, "window"),
        (12.1, EVICTED, "leave now, into the state"),
    ]
    for at, color, label in legend:
        _cells(ax, at, 0.6, 1, color)
        ax.text(at + 0.7, 0.6 + CELL / 2, label, va="center", fontsize=9.5, color=INK)
    return figure


def state() -> Figure:
    """The state path of one decoder layer."""
    figure, ax = _canvas(9.6, 5.0)
    _cells(ax, 0.5, 8.2, 4, EVICTED)
    ax.text(0.5 + 2 * CELL, 8.85, "C evicted tokens", ha="center", fontsize=9.5, color=INK)
    ax.annotate("", (1.5, 7.35), (1.5, 8.15), arrowprops=_arrow())
    ax.text(1.7, 7.75, "their keys K, values V", va="center", fontsize=9.5, color=INK)
    _box(ax, 0.5, 5.4, 5.6, 1.9, EVICTED, "thought encoder", "S' = (q W_Qᵀ) (K W_Kᵀ)ᵀ (V W_Vᵀ)\nr learned queries q")
    ax.annotate("", (7.4, 6.35), (6.15, 6.35), arrowprops=_arrow())
    ax.text(6.75, 6.55, "S'", ha="center", fontsize=10, color=INK)
    _box(ax, 7.5, 5.4, 4.6, 1.9, "#ffffff", "update", "S' to strength · √r, then\nS ← Normalize(S + S')")
    ax.annotate("", (13.4, 6.35), (12.15, 6.35), arrowprops=_arrow())
    _box(ax, 13.5, 5.4, 4.4, 1.9, STATE, "thought state S", "r x r, float32\none a sequence and layer")
    ax.annotate("", (15.7, 7.35), (15.7, 8.15), arrowprops=_arrow())
    ax.text(15.7, 8.3, "at the start: S' of the global tokens", ha="center", fontsize=9.5, color=INK)
    bend = _arrow() | {"connectionstyle": "arc3,rad=0.35"}
    ax.annotate("", (9.8, 7.35), (14.6, 7.35), arrowprops=bend)
    ax.text(12.2, 8.4, "S before", ha="center", fontsize=9.5, color=INK)

    # One adapted linear; the others of the layer take the same S.
    ax.plot([15.7, 15.7, 7.1], [5.35, 4.75, 4.75], color=INK, linewidth=1.2)
    ax.annotate("", (7.1, 3.75), (7.1, 4.77), arrowprops=_arrow())
    ax.text(
        7.4, 4.2, "every adapted linear of the layer, for every token until the next eviction", fontsize=9.5, color=INK
    )
    ax.text(0.75, 2.0, "x", ha="center", va="center", fontsize=12, color=INK)
    for left, label, color in ((2.6, "lora_A", "#ffffff"), (6.05, "S", STATE), (9.5, "lora_B · α/r", "#ffffff")):
        _label(ax, left, 2.75, 2.1, 0.95, color, label)
    _label(ax, 2.6, 0.5, 9.0, 0.95, "#ffffff", "W")
    for start in (4.75, 8.2):
        ax.annotate("", (start + 1.25, 3.22), (start, 3.22), arrowprops=_arrow())
        ax.text(start + 0.6, 3.4, "r numbers", ha="center", fontsize=8, color=MUTED)
    ax.annotate("", (2.55, 3.2), (0.95, 2.2), arrowprops=_arrow())
    ax.annotate("", (2.55, 1.0), (0.95, 1.85), arrowprops=_arrow())
    ax.annotate("", (13.35, 2.2), (11.65, 3.2), arrowprops=_arrow())
    ax.annotate("", (13.35, 1.9), (11.65, 1.0), arrowprops=_arrow())
    ax.text(13.65, 2.05, "+", ha="center", va="center", fontsize=15, color=INK)
    ax.annotate("", (15.2, 2.05), (13.95, 2.05), arrowprops=_arrow())
    ax.text(15.45, 2.05, "y", ha="center", va="center", fontsize=12, color=INK)
    return figure


def parts() -> Figure:
    """Processes of a training run, what passes between them, and the core both sides stand on."""
    figure, ax = _canvas(9.6, 4.6)
    _box(ax, 6.2, 6.9, 6.0, 1.5, "#ffffff", "verl's controller", "stock main_ppo: rewards, advantages")
    _box(ax, 0.5, 3.3, 6.4, 2.0, WINDOW, "rollout server (Ray actor)", "RolloutEngine or vLLM: sampling\nbounded cache")
    _box(
        ax,
        11.5,
        3.3,
        6.4,
        2.0,
        PINNED_THOUGHT,
        "training worker (FSDP)",
        "PTEEngine: verl's loss, optimizer\nReplay in two passes",
    )
    _box(ax, 4.2, 0.3, 10.0, 1.5, STATE, "verl_pte.core", "schedule, thought encoder, adapter, bounded cache")
    for start, end in (((6.6, 6.85), (3.2, 5.4)), ((13.0, 5.4), (11.6, 6.85))):
        ax.annotate("", end, start, arrowprops=_arrow())
    ax.annotate("", (7.6, 6.85), (4.6, 5.4), arrowprops=_arrow())
    ax.annotate("", (14.6, 5.4), (12.0, 6.85), arrowprops=_arrow())
    ax.annotate("", (6.95, 4.3), (11.45, 4.3), arrowprops=_arrow())
    ax.text(4.3, 6.3, "prompts", ha="right", fontsize=9.5, color=INK)
    ax.text(6.35, 5.85, "tokens, log-probs,\nevictions, peak", va="center", fontsize=9.5, color=INK)
    ax.text(13.7, 6.3, "tokens, advantages", fontsize=9.5, color=INK)
    ax.text(12.05, 6.0, "log-probs,\nmetrics", ha="right", va="center", fontsize=9.5, color=INK)
    ax.text(9.2, 4.45, "adapter tensors", ha="center", fontsize=9.5, color=INK)
    for x in (5.5, 12.9):
        ax.annotate("", (x, 1.85), (x, 3.25), arrowprops=_arrow() | {"linestyle": "dashed"})
    ax.text(9.2, 2.5, "imports", ha="center", fontsize=9.5, color=MUTED)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, 18.4)
    ax.set_ylim(0, 18.4 * height / width)
    ax.axis("off")
    return figure, ax


def _numbered(
    ax: Axes, x: float, y: float, number: int | None, color: str, dashed: bool = False, bold: bool = False
) -> None:
    _cells(ax, x, y, 1, color, dashed)
    if bold:
        ax.add_patch(Rectangle((x, y), CELL, CELL, fill=False, linewidth=2.0, edgecolor=INK, zorder=3))
    if number is not None:
        muted = MUTED if dashed else INK
        ax.text(x + CELL / 2, y + CELL / 2, str(number), ha="center", va="center", fontsize=7.5, color=muted)


def _cells(ax: Axes, x: float, y: float, count: int, color: str, dashed: bool = False) -> float:
    for i in range(count):
        style = {"linestyle": (0, (2, 2)), "edgecolor": MUTED} if dashed else {"edgecolor": INK}
        ax.add_patch(Rectangle((x + i * CELL, y), CELL, CELL, facecolor=color, linewidth=0.8, **style))
    return x + count * CELL


def _brace(ax: Axes, start: float, end: float, y: float, label: str) -> None:
    ax.plot([start, start, end, end], [y, y + 0.18, y + 0.18, y], color=MUTED, linewidth=1.0)
    ax.text((start + end) / 2, y + 0.32, label, ha="center", va="bottom", fontsize=9.5, color=INK)


def _box(ax: Axes, x: float, y: float, width: float, height: float, color: str, title: str, text: str) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=color, edgecolor=INK, linewidth=1.0
    )
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height - 0.4, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    ax.text(
        x + width / 2, y + (height - 0.6) / 2, text, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.4
    )


def _label(ax: Axes, x: float, y: float, width: float, height: float, color: str, text: str) -> None:
    style = {"boxstyle": "round,pad=0,rounding_size=0.15", "facecolor": color, "edgecolor": INK, "linewidth": 1.0}
    ax.add_patch(FancyBboxPatch((x, y), width, height, **style))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11, weight="bold", color=INK)


def _arrow() -> dict:
    return {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}


def main() -> None:
    """Write the images; the same bytes every time."""
    matplotlib.rcParams["svg.hashsalt"] = "verl_pte"
    IMAGES.mkdir(exist_ok=True)
    for draw in (overview, window, state, parts):
        path = IMAGES / f"{draw.__name__}.svg"
        draw().savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main()
