"""Draws docs/images/overview.svg, the picture in the README.

python docs/draw_images.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

IMAGES = Path(__file__).with_name("images")

INK, MUTED = "#24292f", "#57606a"
PINNED, PINNED_THOUGHT, WINDOW, EVICTED, STATE = "#8fb8de", "#c9def2", "#a8d5ae", "#f2b880", "#d4b5e8"
CELL = 0.5


def overview() -> Figure:
    """Cache of one layer, and the way of evicted tokens into the weights."""
    figure = Figure(figsize=(9.6, 4.8))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, 18.4)
    ax.set_ylim(0, 9.2)
    ax.axis("off")

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


def _arrow() -> dict:
    return {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}


def main() -> None:
    """Write the images; the same bytes every time."""
    matplotlib.rcParams["svg.hashsalt"] = "verl_pte"
    IMAGES.mkdir(exist_ok=True)
    overview().savefig(IMAGES / "overview.svg", metadata={"Date": None, "Creator": None}, facecolor="white")


if __name__ == "__main__":
    main()
