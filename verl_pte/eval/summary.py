"""The numbers of an evaluation, from its items: one cell for each data set, window and budget.

    {"n": samples a row, "rows": {data: rows},
     "cells": [{"data", "window", "max_tokens", "pass": {"1": {"mean", "low", "high"}, ...}, "tokens": {...}, ...}],
     "mean_of_sets": [{"window", "max_tokens", "pass"}]}   with several data sets, each counting the same

`pass` of k is the mean over rows of the unbiased pass@k (with other scores than 0 and 1: of the expected best of k),
with a 95 % bootstrap interval over rows. pass@1 is the mean score.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from verl_pte.eval.intervals import bootstrap_means, interval
from verl_pte.eval.items import Record
from verl_pte.eval.pass_at_k import best_of_k

Setting = tuple[int | None, int]  # window, max_tokens


def summarize(records: Iterable[Record], ks: Sequence[int]) -> dict[str, Any]:
    """Numbers of a complete evaluation; they do not depend on the order of the records."""
    by_data: dict[str, dict[Setting, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_data[record.data][record.window, record.max_tokens].append(record)
    cells, resampled, rows, n = [], {}, {}, 0
    for data in sorted(by_data):
        settings = sorted(by_data[data], key=_order)
        values_RSK = np.stack([_values(by_data[data][setting], ks) for setting in settings], axis=1)
        rows[data] = len(values_RSK)
        means_BM = bootstrap_means(values_RSK.reshape(len(values_RSK), -1), data)
        means_BSK = means_BM.reshape(-1, *values_RSK.shape[1:])
        for s, setting in enumerate(settings):
            found = by_data[data][setting]
            n = len(found) // rows[data]
            resampled[data, setting] = values_RSK[:, s], means_BSK[:, s]
            cells.append({"data": data} | _named(setting) | _passes(ks, *resampled[data, setting]) | _lengths(found))
    summary = {"n": n, "rows": rows, "cells": cells}
    if len(by_data) > 1:
        summary["mean_of_sets"] = [
            _named(setting) | _mean_of_sets([resampled[data, setting] for data in sorted(by_data)], ks)
            for setting in settings
        ]
    return summary


def _order(setting: Setting) -> tuple[float, int]:
    """Windows ascending, the full cache last."""
    window, max_tokens = setting
    return float("inf") if window is None else window, max_tokens


def _named(setting: Setting) -> dict[str, Any]:
    return dict(zip(("window", "max_tokens"), setting, strict=True))


def _values(records: Iterable[Record], ks: Sequence[int]) -> np.ndarray:
    """Of each row, in order, its pass@k: [R, K]."""
    scores: dict[int, dict[int, float]] = defaultdict(dict)
    for record in records:
        scores[record.row][record.sample] = record.score
    by_row = [[scores[row][sample] for sample in sorted(scores[row])] for row in sorted(scores)]
    return np.array([[best_of_k(row, k) if k > 1 else np.mean(row) for k in ks] for row in by_row])


def _passes(ks: Sequence[int], values_RK: np.ndarray, means_BK: np.ndarray) -> dict[str, Any]:
    return _with_intervals(ks, values_RK.mean(0), means_BK)


def _mean_of_sets(sets: Sequence[tuple[np.ndarray, np.ndarray]], ks: Sequence[int]) -> dict[str, Any]:
    mean_K = np.mean([values_RK.mean(0) for values_RK, _ in sets], axis=0)
    return _with_intervals(ks, mean_K, np.mean([means_BK for _, means_BK in sets], axis=0))


def _with_intervals(ks: Sequence[int], mean_K: np.ndarray, means_BK: np.ndarray) -> dict[str, Any]:
    numbers = zip(ks, mean_K, *interval(means_BK), strict=True)
    return {"pass": {str(k): {"mean": float(m), "low": float(low), "high": float(high)} for k, m, low, high in numbers}}


def _lengths(records: Sequence[Record]) -> dict[str, Any]:
    """Of all responses: lengths and cache in tokens, and shares."""
    tokens = np.array([record.tokens for record in records])
    evictions = np.array([record.num_evictions for record in records])
    peaks = np.array([record.peak_cache_tokens for record in records])
    return {
        "tokens": {"mean": float(tokens.mean()), "median": float(np.median(tokens)), "max": int(tokens.max())},
        "truncated": float(np.mean([record.finish_reason == "length" for record in records])),
        "unparsed": float(np.mean([record.unparsed for record in records])),
        "evictions": {"mean": float(evictions.mean()), "max": int(evictions.max())},
        "peak_cache_tokens": {"mean": float(peaks.mean()), "max": int(peaks.max())},
    }
