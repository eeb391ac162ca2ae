"""Choose the data: embed a pool, cluster it in levels, draw a balanced sample of it.

Hierarchical k-means (Vo et al., arXiv 2405.15613, the method behind AMoE's OpenLVD200M): k-means on
the pictures' embeddings, then k-means on its centroids, and so on; every pass forgets how many
pictures a centroid stood for, so the clusters of the last level spread over what the pool shows
and not over what it shows often. The target is then shared out from the top, the same quota for
every cluster that can fill it. `python sampling.py embed | cluster | sample | assign | plan`.

Legend: N rows (pictures), D width of an embedding, K clusters of a level, J clusters of all parents
together, B rows of a chunk. Levels count from the finest. Under torchrun every process opens the
whole pool and works on its share of the rows; centroids are on all of them.

Files: a pool is a folder of `part-00000.npy` (fp16, rows x D) each with `part-00000.jsonl` (an
index file of packing.py, one line per row) and `pool.json`; a tree is a folder of plain .npy arrays
and `tree.json` with the sha256 of each. Nothing is pickled.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from packing import Group, open_source, read_index, setup_distributed, write_index
from teachers import load_teacher, parse_teacher

SOLO = Group(0, 1, torch.device("cpu"))
BLOCK = {"cpu": (1024, 8192), "cuda": (16384, 16384)}  # rows x centroids of one block of scores
SEED_ROWS = 20  # rows per cluster that seeding looks at; more lowers the inertia by < 0.1 %
EXACT = 16  # so many seeds come one at a time (greedy k-means++), the others in rounds of 10 %
SWAPS = 6  # first iterations that may move centroids across the data
CANDIDATES = 4  # drawn for every seed or swap that is made


# ---------------------------------------------------------------- rows, shared among processes


@dataclass(frozen=True)
class Rows:
    """The rows of a table (N, D), a tensor or a `Pool`, that this process works on."""

    table: Any
    ids_N: Tensor  # int64, ascending: which rows of the table
    total: int  # rows of all processes
    group: Group

    @classmethod
    def share(cls, table: Any, group: Group, ids_N: Tensor | None = None) -> "Rows":
        """This process's contiguous share of all rows, or of the rows `ids_N`."""
        total = len(table) if ids_N is None else len(ids_N)
        start, stop = (total * (group.rank + i) // group.world for i in (0, 1))
        ids_N = torch.arange(start, stop) if ids_N is None else ids_N[start:stop]
        return cls(table, ids_N, total, group)

    def fetch(self, ids_B: Tensor) -> Tensor:
        """Rows of the table as float32 (B, D) on this process's device."""
        where: Any = ids_B
        if len(ids_B) and int(ids_B[-1] - ids_B[0]) == len(ids_B) - 1:
            where = slice(int(ids_B[0]), int(ids_B[-1]) + 1)  # a view, or one read of a file
        return self.table[where].to(self.group.device, torch.float32)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(where in this share, its rows x_BD) for one chunk after the other."""
        size = BLOCK[self.group.device.type][0]
        for start in range(0, len(self.ids_N), size):
            part = slice(start, start + size)
            yield part, self.fetch(self.ids_N[part])

    def thin(self, count: int, generator: torch.Generator) -> "Rows":
        """About `count` rows of all processes, the same rows for any number of processes."""
        if count >= self.total:
            return self
        ids_N = self.ids_N[uniform(self.ids_N, generator) < count / self.total]
        total = int(all_sum(torch.tensor(len(ids_N)), self.group))
        return replace(self, ids_N=ids_N, total=total)


def uniform(ids_N: Tensor, generator: torch.Generator) -> Tensor:
    """One float64 in (0, 1) per row number; a hash, so that it does not matter who holds the row."""
    z = (ids_N + torch.randint(2**62, (), generator=generator)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor  # splitmix64, wraps as it must
    return (((z >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


def all_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the processes."""
    if group.world > 1:
        x = x.to(group.device)
        dist.all_reduce(x)
    return x


def gather(x_N: Tensor, group: Group) -> Tensor:
    """The shares of all processes, end to end, on the CPU."""
    parts: list[Any] = [x_N.cpu()]
    if group.world > 1:
        parts = [None] * group.world
        dist.all_gather_object(parts, x_N.cpu())
    return torch.cat(parts)


# ---------------------------------------------------------------- k-means


@dataclass
class Step:
    """What one pass over the rows finds for given centroids; the sums are over all processes."""

    cluster_N: Tensor  # int32, of this process's rows
    distance_N: Tensor  # squared, to that centroid
    mean_KD: Tensor  # of each cluster's rows; an empty one keeps its centroid
    count_K: Tensor
    loss_K: Tensor  # by how much the inertia would rise without this centroid
    inertia: float  # sum of the squared distances


def nearest(x_BD: Tensor, c_KD: Tensor, dtype: torch.dtype = torch.float32, second: bool = False):
    """Nearest centroid of each row, its score and, if asked, the runner-up's score.

    With score = x.c - |c|^2 / 2 the squared distance is |x|^2 - 2 score: one matmul, of which only
    a block of rows x centroids ever exists.
    """
    half_K, x_BD = c_KD.square().sum(1) / 2, x_BD.to(dtype)
    best_B = torch.full((len(x_BD),), -math.inf, device=x_BD.device)
    second_B, cluster_B = best_B, torch.zeros_like(best_B, dtype=torch.int64)
    width = BLOCK[x_BD.device.type][1]
    for k in range(0, len(c_KD), width):
        c, half = c_KD[k : k + width].to(dtype), half_K[k : k + width]
        is_float32 = dtype == torch.float32  # then the subtraction is part of the matmul
        scores = torch.addmm(-half, x_BD, c.T) if is_float32 else (x_BD @ c.T).float() - half
        top_B, where_B = scores.max(1)
        if second:
            runner_B = scores.scatter_(1, where_B[:, None], -math.inf).amax(1)
            second_B = second_B.maximum(runner_B).maximum(top_B.minimum(best_B))
        cluster_B = torch.where(top_B > best_B, where_B + k, cluster_B)
        best_B = best_B.maximum(top_B)
    return cluster_B, best_B, second_B


def step(rows: Rows, c_KD: Tensor, dtype: torch.dtype = torch.float32, second: bool = False) -> Step:
    """Assign the rows to the centroids and average them per cluster, in float64."""
    cluster_N = torch.empty(len(rows.ids_N), dtype=torch.int32)
    distance_N = torch.empty(len(rows.ids_N))
    sums_KD = torch.zeros_like(c_KD, dtype=torch.float64)
    stats_3K = torch.zeros(3, len(c_KD), dtype=torch.float64, device=c_KD.device)
    for part, x_BD in rows.chunks():
        cluster_B, best_B, second_B = nearest(x_BD, c_KD, dtype, second)
        squared_B = (x_BD.square().sum(1) - 2 * best_B).clamp(min=0)
        values_3B = torch.stack([torch.ones_like(best_B), squared_B, 2 * (best_B - second_B)])
        stats_3K.index_add_(1, cluster_B, values_3B.double())
        sums_KD.index_add_(0, cluster_B, x_BD.double())
        cluster_N[part], distance_N[part] = cluster_B.int(), squared_B
    sums_KD, stats_3K = all_sum(sums_KD, rows.group), all_sum(stats_3K, rows.group)
    count_K, inertia_K, loss_K = stats_3K
    means_KD = (sums_KD / count_K.clamp(min=1)[:, None]).to(c_KD.dtype)
    means_KD = torch.where(count_K[:, None] > 0, means_KD, c_KD)
    return Step(cluster_N, distance_N, means_KD, count_K, loss_K, float(inertia_K.sum()))


def draw(rows: Rows, weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different rows (numbers in the table) with probability by weight; one race for all."""
    time_N = -uniform(rows.ids_N, generator).log() / weight_N.double()
    time_C, where_C = time_N.topk(min(count, len(time_N)), largest=False)
    time_C, ids_C = gather(time_C, rows.group), gather(rows.ids_N[where_C], rows.group)
    return ids_C[time_C.argsort()[:count]]


def gains(rows: Rows, distance_N: Tensor, new_CD: Tensor) -> Tensor:
    """By how much each of C new centroids alone would lower the inertia."""
    gain_C = torch.zeros(len(new_CD), dtype=torch.float64, device=new_CD.device)
    minus_norm_C = -new_CD.square().sum(1)
    for part, x_BD in rows.chunks():
        slack_B = distance_N[part].to(x_BD.device) - x_BD.square().sum(1)
        fall_BC = torch.addmm(minus_norm_C, x_BD, new_CD.T, alpha=2).add_(slack_B[:, None])
        gain_C += fall_BC.relu_().sum(0)
    return all_sum(gain_C, rows.group)


def seed_centroids(rows: Rows, k: int, generator: torch.Generator) -> Tensor:
    """Start of k-means: D^2 sampling in growing rounds, the best of several candidates each time.

    The first `EXACT` come one by one, which is greedy k-means++; a later round adds a tenth of what
    is there, so that the seeds of one round seldom see the same gap.
    """
    rows = rows.thin(SEED_ROWS * k, generator)
    distance_N = torch.ones(len(rows.ids_N))
    c_KD = rows.fetch(draw(rows, distance_N, 1, generator))
    distance_N.fill_(math.inf)
    new_CD = c_KD
    while True:
        distance_N = distance_N.minimum(step(rows, new_CD).distance_N)
        room = k - len(c_KD)
        if not room:
            return c_KD
        size = 1 if len(c_KD) < EXACT else min(room, max(1, len(c_KD) // 10))
        tries = min(CANDIDATES, rows.total // size)
        drawn_CD = rows.fetch(draw(rows, distance_N, size * tries, generator))
        gain_TC = rearrange(gains(rows, distance_N, drawn_CD), "(t c) -> t c", t=tries)
        new_CD = drawn_CD[gain_TC.argmax(0) * size + torch.arange(size, device=gain_TC.device)]
        c_KD = torch.cat([c_KD, new_CD])


def swap_centroids(rows: Rows, found: Step, generator: torch.Generator) -> Tensor:
    """Move the centroids that are missed least to where new ones gain more than that.

    Lloyd's steps cannot carry a centroid across the data, so a dense region seeded twice stays split
    and its neighbour stays merged; an empty cluster is the plainest case.
    """
    c_KD, loss_K = found.mean_KD.clone(), found.loss_K.clone()
    most = max(1, len(c_KD) // 10)
    drawn_CD = rows.fetch(draw(rows, found.distance_N, most * CANDIDATES, generator))
    gain_C, order_C = gains(rows, found.distance_N, drawn_CD).sort(descending=True)
    drawn_CD = drawn_CD[order_C]
    home_C = nearest(drawn_CD, c_KD)[0]
    # One newcomer a cluster, as two of them would share one gain; the best, hence the first.
    first_S = torch.from_numpy(np.sort(np.unique(home_C.cpu(), return_index=True)[1])[:most])
    first_S = first_S.to(home_C.device)
    loss_K[home_C[first_S]] = math.inf  # do not remove what is about to be split
    weak_S = loss_K.argsort(stable=True)[: len(first_S)]
    # Of two neighbours that could each stand in for the other, only the weaker may go.
    chunks = [torch.cdist(c_KD[w], c_KD).scatter_(1, w[:, None], math.inf) for w in weak_S.split(256)]
    place_K = torch.full_like(loss_K, math.inf)
    place_K[weak_S] = torch.arange(len(weak_S), dtype=loss_K.dtype, device=loss_K.device)
    stand_in_S = torch.cat([chunk.argmin(1) for chunk in chunks])
    weak_S = weak_S[place_K[stand_in_S] > place_K[weak_S]]
    first_S = first_S[: len(weak_S)]
    is_better_S = gain_C[first_S] > loss_K[weak_S]
    c_KD[weak_S[is_better_S]] = drawn_CD[first_S[is_better_S]]
    return c_KD


def kmeans(
    rows: Rows,
    k: int,
    generator: torch.Generator,
    iterations: int = 50,
    tolerance: float = 5e-4,
    dtype: torch.dtype = torch.float32,
    bar: Any = None,
) -> tuple[Tensor, Step]:
    """k centroids (k, D) and the rows' clusters: Lloyd's iterations with swaps among the first ones.

    Stops after `iterations`, or when one lowers the inertia by less than the share `tolerance`.
    Where rows abound, a quarter of them is clustered first and the rest only refines.
    """
    if k > rows.total:
        raise ValueError(f"{k} clusters of {rows.total} rows; ask for at most {rows.total}")
    is_large = rows.total > 8 * SEED_ROWS * k
    if is_large:
        part = rows.thin(rows.total // 4, generator)
        c_KD, _ = kmeans(part, k, generator, iterations, tolerance, dtype, bar)
    else:
        c_KD = seed_centroids(rows, k, generator)
    swaps, last, i = (0 if is_large else SWAPS), math.inf, 0
    while True:
        is_swap = i < swaps and i % 2 == 1  # a Lloyd step between, or its gain would count as theirs
        found = step(rows, c_KD, dtype, second=is_swap)
        if bar is not None:
            bar.set_postfix_str(f"{k} clusters, inertia {found.inertia:.6g}")
            bar.update()
        if i == iterations or (i > swaps and last - found.inertia <= tolerance * last):
            return c_KD, found
        is_empty_K = found.count_K == 0
        c_KD, last = found.mean_KD, found.inertia
        if is_swap or is_empty_K.any():
            found.loss_K = found.loss_K if is_swap else torch.where(is_empty_K, 0.0, math.inf)
            c_KD = swap_centroids(rows, found, generator)
        i += 1


# ---------------------------------------------------------------- the hierarchy


@dataclass(frozen=True)
class Level:
    """One level's clusters of n inputs: the pool's rows, or the centroids of the level below."""

    centroids: np.ndarray  # (K, D) float32
    assignment: np.ndarray  # (n,) int32: the cluster of each input
    distance: np.ndarray  # (n,) float32, squared, to the centroid

    @property
    def inertia(self) -> float:
        return float(self.distance.sum(dtype=np.float64))


Tree = tuple[Level, ...]  # finest first


def rank_in_cluster(cluster_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Place (0, 1, ..) of each row among the rows of its cluster, smallest key first."""
    order_N = np.lexsort((key_N, cluster_N))
    sizes = np.bincount(cluster_N)
    rank_N = np.empty(len(cluster_N), np.int64)
    rank_N[order_N] = np.arange(len(cluster_N)) - np.repeat(sizes.cumsum() - sizes, sizes)
    return rank_N


def split_clusters(
    rows: Rows, found: Step, k: int, generator: torch.Generator, **limits: Any
) -> Tensor:
    """k centroids by clustering every cluster on its own, the same number for each that has it.

    Vo et al. make 10 M clusters as 100 k of 100 parts: k/parts + parts distances a row, not k.
    """
    cluster_N, ids_N = gather(found.cluster_N, rows.group), gather(rows.ids_N, rows.group)
    sizes = cluster_N.bincount(minlength=len(found.count_K))
    parts = quota(sizes.tolist(), k, generator)
    members, seed = ids_N[cluster_N.argsort(stable=True)].split(sizes.tolist()), generator.seed
    seed = int(torch.randint(2**31, (), generator=generator))
    c_KD = torch.zeros(k, found.mean_KD.shape[1], device=rows.group.device)
    alone = replace(rows.group, rank=0, world=1)
    for j in range(rows.group.rank, len(parts), rows.group.world):
        if parts[j]:
            mine = Rows.share(rows.table, alone, members[j])
            own = torch.Generator().manual_seed(seed + j)
            start = sum(parts[:j])
            c_KD[start : start + parts[j]] = kmeans(mine, parts[j], own, **limits)[0]
    return all_sum(c_KD, rows.group)


def cluster_level(
    rows: Rows,
    k: int,
    generator: torch.Generator,
    rounds: int,
    keep: int | None,
    fit_rows: int | None,
    splits: int,
    **limits: Any,
) -> Level:
    """One level: k-means, then `rounds` of re-fitting it to the `keep` inputs closest per cluster.

    Capping a cluster's mass moves centroids out of the dense regions (Vo et al. Sec. 3.3). Without
    `keep` it is half the mean cluster size; below 2 there is nothing to cap.
    """
    fitted = rows if fit_rows is None else rows.thin(fit_rows, generator)
    c_KD, found = kmeans(fitted, max(1, k // splits), generator, **limits)
    if splits > 1:
        c_KD = split_clusters(fitted, found, k, generator, **limits)
    keep = rows.total // k // 2 if keep is None else keep
    for _ in range(rounds if keep > 1 else 0):
        found = step(rows, c_KD)
        cluster_N, distance_N = gather(found.cluster_N, rows.group), gather(found.distance_N, rows.group)
        ids_N = torch.from_numpy(rank_in_cluster(cluster_N.numpy(), distance_N.numpy()) < keep)
        ids_N = ids_N.nonzero()[:, 0]
        if len(ids_N) < k:  # duplicates: too few distinct rows for k clusters
            break
        c_KD, _ = kmeans(Rows.share(rows.table, rows.group, ids_N), k, generator, **limits)
    found = step(rows, c_KD)
    arrays = (c_KD, gather(found.cluster_N, rows.group), gather(found.distance_N, rows.group))
    return Level(*(x.cpu().numpy() for x in arrays))


def hierarchical_kmeans(
    embeddings: Any,
    clusters: Sequence[int],
    seed: int = 0,
    resample: int | Sequence[int] | None = None,
    keep: Sequence[int | None] | None = None,
    fit_rows: int | None = None,
    splits: int = 1,
    group: Group = SOLO,
    done: Tree = (),
    on_level: Any = None,
    **limits: Any,
) -> Tree:
    """Cluster rows, then the centroids, and so on.

    Args:
        embeddings: (N, D), a tensor, an array or a `Pool`; used as they are (L2, no PCA).
        clusters: per level, finest to coarsest. seed: decides everything.
        resample: rounds per level; default none for the finest level and 10 for the others.
        keep: closest inputs per cluster that a round keeps; default half the mean size.
        fit_rows: fit the finest level on so many rows drawn uniformly, then assign all.
        splits: make the finest level by splitting k/splits clusters in `splits` each.
        group: the processes that share the work. done: levels that exist, from an earlier run.
        on_level: called with the tree after each level.
        limits: `iterations`, `tolerance`, `dtype` (of the scores) and `bar` of `kmeans`.

    Returns: one `Level` per entry of `clusters`, plain arrays.
    Raises: ValueError for a row that is not finite, and for more clusters than inputs.
    Source: Vo et al. Sec. 3; AMoE Sec. 4 (20 M / 500 k / 50 k / 20 k).
    """
    table = embeddings if isinstance(embeddings, Pool | Tensor) else torch.tensor(np.asarray(embeddings))
    if not clusters or any(a < b for a, b in zip([len(table), *clusters], clusters)) or min(clusters) < 1:
        raise ValueError(f"clusters={list(clusters)} of {len(table)} rows: must fall from level to level")
    rounds = [0] + [10] * (len(clusters) - 1) if resample is None else resample
    rounds = [rounds] * len(clusters) if isinstance(rounds, int) else rounds
    keep = [None] * len(clusters) if keep is None else keep
    check_finite(Rows.share(table, group))
    tree = done
    for t, k in enumerate(clusters):
        if t >= len(done):
            rows = Rows.share(table, group)
            generator = torch.Generator().manual_seed(seed + t)
            first = {"fit_rows": fit_rows, "splits": splits} if t == 0 else {"fit_rows": None, "splits": 1}
            level = cluster_level(rows, k, generator, rounds[t], keep[t], **first, **limits)
            tree = (*tree, level)
            if on_level:
                on_level(tree)
        table = torch.from_numpy(tree[t].centroids)
    return tree


def check_finite(rows: Rows) -> None:
    """Name the first row with a NaN or an infinity."""
    for part, x_BD in rows.chunks():
        is_bad_B = ~x_BD.isfinite().all(1)
        if is_bad_B.any():
            row = int(rows.ids_N[part][is_bad_B.cpu()][0])
            name = rows.table.name(row) if isinstance(rows.table, Pool) else f"row {row}"
            raise ValueError(f"the embedding of {name} is not finite; drop it or embed it anew")


# ---------------------------------------------------------------- balanced sampling


def fill(
    capacity_J: np.ndarray,
    parent_J: np.ndarray,
    target_P: np.ndarray,
    generator: torch.Generator,
    weight_J: np.ndarray | None = None,
) -> np.ndarray:
    """Share each parent's target among its children, max-min fair ("water filling").

    A child gets min(capacity, x): x is the highest level for which the sum stays within the target,
    and the rest goes +1 each to unfilled children drawn at random. With weights, x * weight.
    """
    weight_J = np.ones(len(capacity_J)) if weight_J is None else weight_J
    low_P = np.zeros(len(target_P))
    high_P = np.full(len(target_P), (capacity_J / weight_J).max(initial=0) + 1)

    def filled(x_P: np.ndarray) -> np.ndarray:
        return np.minimum(capacity_J, np.floor(x_P[parent_J] * weight_J)).astype(np.int64)

    for _ in range(100):  # bisection down to neighbouring floats
        middle_P = (low_P + high_P) / 2
        is_within_P = np.bincount(parent_J, filled(middle_P), len(target_P)) <= target_P
        low_P, high_P = np.where(is_within_P, middle_P, low_P), np.where(is_within_P, high_P, middle_P)
    quota_J = filled(low_P)
    rest_P = target_P - np.bincount(parent_J, quota_J, len(target_P)).astype(np.int64)
    key_J = -torch.rand(len(quota_J), generator=generator, dtype=torch.float64).log().numpy() / weight_J
    key_J[quota_J >= capacity_J] = np.inf  # the full ones come last, and get nothing
    is_next_J = rank_in_cluster(parent_J, key_J) < rest_P[parent_J]
    return quota_J + (is_next_J & (quota_J < capacity_J))


def quota(sizes: Sequence[int], target: int, generator: torch.Generator) -> list[int]:
    """Shares of the target, as equal as the sizes allow; they sum to min(target, sum(sizes)).

    Args: sizes: capacity of each cluster. target: how many in all, >= 0. generator: for the rest.
    Source: Vo et al. Sec. 3.4.
    """
    if target < 0 or min(sizes, default=0) < 0:
        raise ValueError(f"target={target} and sizes must not be negative (smallest {min(sizes, default=0)})")
    capacity_J = np.asarray(sizes, np.int64)
    return fill(capacity_J, np.zeros(len(capacity_J), np.int64), np.array([target]), generator).tolist()


def balanced_sample(
    tree: Tree,
    target: int,
    seed: int = 0,
    strategy: str = "random",
    multiplier: int = 1,
    eligible_N: np.ndarray | None = None,
    weighting: str = "equal",
) -> np.ndarray:
    """Draw `target` rows so that the clusters of every level, coarsest first, count alike.

    Args:
        tree: from `hierarchical_kmeans`. target: rows to draw. seed: of every random choice.
        strategy: within a finest cluster, "random" rows or those "closest" to its centroid.
        multiplier: how often a row may be drawn at most (copies before other rows run out: none).
        eligible_N: bool per row; False rows are never drawn.
        weighting: "equal" quotas (published), or "volume" (ours, see `leaf_volumes`).

    Returns: row numbers, ascending; all eligible ones (times the multiplier) if the target is more.
    Source: Vo et al. Sec. 3.4.
    """
    if target < 0 or multiplier < 1 or strategy not in ("random", "closest"):
        raise ValueError(f"{target=} >= 0, {multiplier=} >= 1, {strategy=} random or closest")
    generator = torch.Generator().manual_seed(seed)
    leaf_N = tree[0].assignment
    eligible_N = np.ones(len(leaf_N), bool) if eligible_N is None else eligible_N
    sizes = [np.bincount(leaf_N[eligible_N], minlength=len(tree[0].centroids)) * multiplier]
    weights = [leaf_volumes(tree) if weighting == "volume" else np.ones(len(sizes[0]))]
    for level in tree[1:]:
        n = len(level.centroids)
        sizes.append(np.bincount(level.assignment, sizes[-1], n).astype(np.int64))
        is_equal = weighting == "equal"
        weights.append(np.ones(n) if is_equal else np.bincount(level.assignment, weights[-1], n) + 1e-9)
    parents = [*(level.assignment for level in tree[1:]), np.zeros(len(sizes[-1]), np.int64)]
    quotas = np.array([target])
    for size_J, parent_J, weight_J in zip(sizes[::-1], parents[::-1], weights[::-1], strict=True):
        quotas = fill(size_J, parent_J, np.minimum(quotas, np.bincount(parent_J, size_J, len(quotas))),
                      generator, weight_J)
    # Within a cluster: whole copies of every row, then the first rows by the strategy's key.
    key_N = torch.rand(len(leaf_N), generator=generator).numpy()
    key_N = np.where(eligible_N, key_N if strategy == "random" else tree[0].distance, np.inf)
    whole_K, rest_K = np.divmod(quotas, np.maximum(sizes[0] // multiplier, 1))
    copies_N = whole_K[leaf_N] + (rank_in_cluster(leaf_N, key_N) < rest_K[leaf_N])
    return np.repeat(np.arange(len(leaf_N)), np.where(eligible_N, copies_N, 0))


def leaf_volumes(tree: Tree) -> np.ndarray:
    """Room of each finest cluster: one over how many finest centroids share its place.

    Clusters of one level differ in how many distinct things they hold; a top cluster with ten
    concepts should get ten times the quota of one with a single concept split ten ways. Neighbours
    are counted by a Gaussian as wide as the mean cluster, among the leaves of the same parent.
    """
    width = tree[0].inertia / len(tree[0].distance)
    parent_K = tree[1].assignment if len(tree) > 1 else np.zeros(len(tree[0].centroids), np.int64)
    volume_K = np.ones(len(parent_K))
    for members in np.split(np.argsort(parent_K, kind="stable"), np.bincount(parent_K).cumsum()[:-1]):
        c_KD = torch.from_numpy(tree[0].centroids[members])
        volume_K[members] = 1 / (-torch.cdist(c_KD, c_KD).square() / width).exp().sum(1).clamp(min=1e-9)
    return volume_K


class Pool:
    pass
