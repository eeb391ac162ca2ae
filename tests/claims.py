"""Do the claims hold? Experiments run by hand, each over seeds, with intervals.

    python tests/claims.py [seeds]      # random against hierarchical sampling of a long-tailed pool

The last line is JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from packing import open_source
from sampling import balanced_sample, hierarchical_kmeans
from teachers import CachedTeacher, cache_home, load_teacher, parse_teacher


def summaries(spec: str, teacher: Any) -> tuple[Tensor, np.ndarray]:
    """Summaries (n, C) of a source's pictures and their labels as numbers."""
    source = open_source(spec)
    teacher.fill(source)
    rows = [teacher.targets([source.load(i)]).summary_BC for i in range(len(source))]
    names = [str(source.label(i)) for i in range(len(source))]
    return torch.cat(rows), np.unique(names, return_inverse=True)[1]


def long_tailed(labels: np.ndarray, exponent: float, rng: np.random.Generator) -> tuple:
    """A pool whose label of rank r has largest / r^exponent pictures; ranks are drawn by `rng`.

    Returns: pool (rows), and the labels from the most to the least frequent.
    """
    order = rng.permutation(labels.max() + 1)
    largest = min(np.bincount(labels))
    counts = [max(8, int(largest / rank**exponent)) for rank in range(1, len(order) + 1)]
    pairs = zip(order, counts, strict=True)
    rows = [rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in pairs]
    return np.concatenate(rows), order


def knn_hits(train_NC: Tensor, train_N: np.ndarray, test_NC: Tensor, test_N: np.ndarray, k: int):
    """Which test pictures the k nearest vote right, weight exp(cos / 0.07), AMoE 6.1."""
    cosine = F.normalize(test_NC, dim=1) @ F.normalize(train_NC, dim=1).T
    near, where = cosine.topk(min(k, len(train_N)), dim=1)
    votes = torch.zeros(len(test_N), int(max(train_N.max(), test_N.max())) + 1)
    votes.scatter_add_(1, torch.from_numpy(train_N)[where], (near / 0.07).exp())
    return votes.argmax(1).numpy() == test_N


def interval(values: list[float]) -> list[float]:
    """Mean and the half width of its 95 % interval (Student's t) over the seeds."""
    t = {4: 2.776, 5: 2.571, 7: 2.365, 9: 2.262, 14: 2.145, 19: 2.093}.get(len(values) - 1, 2.0)
    return [float(np.mean(values)), float(t * np.std(values, ddof=1) / len(values) ** 0.5)]


def long_tail(seeds: int = 10, exponent: float = 1.25, share: float = 0.2) -> dict[str, Any]:
    """Random against hierarchical samples of the same size of a Zipf pool, by kNN on rare labels.

    The pool: training drawings, their 12 labels cut to Zipf sizes. Rare labels: the less frequent
    half of them. Test: all test drawings of such a label. Both samples see the same pool and count.
    """
    live = load_teacher(parse_teacher("vit-s=builtin:vit-s"))
    teacher = CachedTeacher(live, cache_home() / "features")
    train_NC, train_N = summaries("openmoji:train", teacher)
    test_NC, test_N = summaries("openmoji:test", teacher)
    ways = ("random", "flat", "equal", "volume")
    rows: dict[str, list[float]] = {}
    for seed in range(seeds):
        pool, order = long_tailed(train_N, exponent, np.random.default_rng(seed))
        x_NC, y_N, target = train_NC[pool], train_N[pool], int(share * len(pool))
        tree = hierarchical_kmeans(x_NC, [len(pool) // 8, len(pool) // 20, 16], seed)
        picks = {
            "random": np.random.default_rng(seed).permutation(len(pool))[:target],
            "flat": balanced_sample(tree[:1], target, seed),
            "equal": balanced_sample(tree, target, seed),
            "volume": balanced_sample(tree, target, seed, weighting="volume"),
        }
        is_rare = np.isin(test_N, order[len(order) // 2 :])
        for way in ways:
            rows.setdefault(f"{way}/rare share of the sample", []).append(
                float(np.isin(y_N[picks[way]], order[len(order) // 2 :]).mean()))  # fmt: skip
            for k in (5, 20):
                hits = knn_hits(x_NC[picks[way]], y_N[picks[way]], test_NC, test_N, k)
                rows.setdefault(f"{way}/rare {k}-NN", []).append(float(hits[is_rare].mean()))
                rows.setdefault(f"{way}/all {k}-NN", []).append(float(hits.mean()))
    gains = {}
    for name, values in rows.items():
        way, figure = name.split("/", 1)
        if way != "random":
            pairs = zip(values, rows[f"random/{figure}"], strict=True)
            gains[f"{name} - random"] = interval([a - b for a, b in pairs])
    return {"pool": len(pool), "sample": target, "seeds": seeds,
            "rows": {name: interval(v) for name, v in rows.items()}, "paired": gains}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = long_tail(int(sys.argv[1]) if sys.argv[1:] else 10)
    for part in ("rows", "paired"):
        for name, (mean, half) in result[part].items():
            print(f"{name:<45}{mean:8.4f} +- {half:.4f}")
    print(json.dumps(result))
