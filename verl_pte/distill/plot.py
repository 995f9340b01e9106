"""The curve of a warm start's log, if matplotlib is installed."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def plot_kl(records: Iterable[dict[str, Any]], target: Path) -> bool:
    """Draw the KL over the steps into `target`; False, and nothing, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    logged = list(records)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([record["step"] for record in logged], [record["kl"] for record in logged])
    axes.set(xlabel="step", ylabel="KL(teacher || student), nats a token", yscale="log")
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=150)
    return True
