"""Choose the data: embed a pool, cluster it in levels, draw a balanced sample of it.

Vo et al. (arXiv 2405.15613), the method behind AMoE's OpenLVD200M: k-means on the pictures'
embeddings, then on its centroids, and so on; every pass forgets how many pictures a centroid stood
for, so the last level's clusters spread over what the pool shows and not over what it shows often.
The target is then shared out from the top, the same quota for every cluster that can fill it.
Read: `hierarchical_kmeans`, `cluster_level`; `balanced_sample`, `water_fill`; `kmeans`, `step`.

Legend: N rows (pictures), D width of an embedding, K clusters of a level, J clusters of all parents
together, P parents, B rows of a chunk; C candidates for a centroid, S swaps. Levels count from the
finest. Under torchrun every process has all centroids and works on its share of the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor
from tqdm import tqdm

import packing
from packing import Group, Number, open_source, progress, read_header, with_paths, write_whole
from teachers import load_teacher, parse_teacher, sha256_of

COUNT = Number(int, 1)
SOLO, SILENT = Group(0, 1, torch.device("cpu")), tqdm(disable=True)


# ---- Part I, the paper: the hierarchy


@dataclass(frozen=True)
class Level:
    """One level's clusters of n inputs: the pool's rows, or the centroids of the level below."""

    centroids: np.ndarray  # (K, D) float32
    assignment: np.ndarray  # (n,) int32: the cluster of each input
    distance: np.ndarray  # (n,) float32, squared, to the centroid

    @property
    def inertia(self) -> float:
        return float(self.distance.sum(dtype=np.float64))  # of millions, which float32 can't add


Tree = tuple[Level, ...]  # finest first


def hierarchical_kmeans(
    embeddings: Any,
    clusters: Sequence[int],
    seed: int = 0,
    keep: Sequence[Sequence[int] | None] | None = None,
    group: Group = SOLO,
    done: Tree = (),
    on_level: Callable[[Tree], None] = lambda _: None,
    fit_rows: int | None = None,
    splits: int = 1,
    **limits: Any,
) -> Tree:
    """Cluster rows, then the centroids, and so on -> one `Level` per entry of `clusters`.

    Args:
        embeddings: (N, D), a tensor, an array or a `Pool`; used as they are (L2, no PCA).
        clusters: per level, finest to coarsest. seed: decides everything.
        keep: per level, how many inputs per cluster each round of re-fitting keeps; None for
            `default_keep`, [] for plain k-means, [3] * 10 for a published setting.
        group: the processes that share the work. done: levels from an earlier run.
        on_level: called with the tree after each level.
        fit_rows: rows that the finest level is fitted on. splits: see `split_clusters`.
        limits: `iterations`, `tolerance`, `dtype` (of the scores) and `bar` of `kmeans`.
    Raises: ValueError for a row that is not finite, and for more clusters than inputs.
    Vo et al. Sec. 3; AMoE: OpenLVD200M (20 M / 500 k / 50 k / 20 k)
    """
    (table, rounds), tree = checked(embeddings, clusters, keep, group), done
    first: Any = {"fit_rows": fit_rows, "splits": splits}
    for t, k in enumerate(clusters):
        if t >= len(done):
            generator = Generator().manual_seed(seed + t)  # a level resumes as it would have been
            rows = Rows.share(table, group)
            tree = (*tree, cluster_level(rows, k, generator, rounds[t], **first, **limits))
            on_level(tree)
        table = torch.from_numpy(np.array(tree[t].centroids))  # without their clusters' sizes
        first = {}  # only the pictures are many: the levels above cluster all of theirs at once
    return tree


def cluster_level(
    rows: Rows, k: int, generator: Generator, keep: Sequence[int], fit_rows=None, splits=1, **limits
) -> Level:
    """One level: k-means, then k-means on `keep[0]` inputs a cluster, ... Vo et al. Sec. 3"""
    some = rows.thin(fit_rows or rows.total, generator)
    c_KD, found = kmeans(some, max(1, k // splits), generator, **limits)
    if splits > 1:
        c_KD = split_clusters(some, found, k, generator, **limits)
    for most in (*keep, None):
        found = step(rows, c_KD)  # all inputs, between the rounds and at the end
        cluster_N = gather(found.cluster_N, rows.group).numpy()
        distance_N = gather(found.distance_N, rows.group).numpy()
        if most is None:
            break
        # The closest to each centroid are kept: with its mass capped, a dense region gets fewer of
        # the next centroids.
        ids_N = torch.from_numpy(np.flatnonzero(rank_in_cluster(cluster_N, distance_N) < most))
        if len(ids_N) >= k:  # else rows are so alike that clusters are empty: nothing to cap
            kept = Rows.share(rows.table, rows.group, ids_N)
            c_KD = rows.fetch(ids_N) if len(ids_N) == k else kmeans(kept, k, generator, **limits)[0]
    return Level(c_KD.cpu().numpy(), cluster_N, distance_N)


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
    Vo et al. Sec. 3
    """
    if target < 0 or multiplier < 1 or strategy not in ("random", "closest"):
        raise ValueError(f"{target=} >= 0, {multiplier=} >= 1, {strategy=} random or closest")
    generator, leaf_N = Generator().manual_seed(seed), tree[0].assignment
    eligible_N = np.ones(len(leaf_N), bool) if eligible_N is None else eligible_N
    # Upwards: how many rows may be drawn below each cluster, a count of rows and not of clusters.
    sizes = [np.bincount(leaf_N[eligible_N], minlength=len(tree[0].centroids)) * multiplier]
    for level in tree[1:]:
        size_K = np.bincount(level.assignment, sizes[-1], len(level.centroids))
        sizes.append(size_K.astype(np.int64))
    parents = [*(level.assignment for level in tree[1:]), np.zeros(len(sizes[-1]), np.int64)]
    # Downwards: each cluster's quota is the target that its children share, and no more than they
    # hold; what one of them can't use goes to its sisters, not to cousins.
    quotas, weights = np.array([target]), cluster_weights(tree, weighting)
    for size_J, parent_J, weight_J in zip(sizes[::-1], parents[::-1], weights[::-1], strict=True):
        most_P = np.bincount(parent_J, size_J, len(quotas)).astype(np.int64)
        quotas = water_fill(size_J, parent_J, np.minimum(quotas, most_P), generator, weight_J)
    # Within a cluster: whole copies of every row, then the first rows by the strategy's key.
    key_N = torch.rand(len(leaf_N), generator=generator).numpy()
    key_N = np.where(eligible_N, key_N if strategy == "random" else tree[0].distance, np.inf)
    whole_K, rest_K = np.divmod(quotas, np.maximum(sizes[0] // multiplier, 1))
    copies_N = whole_K[leaf_N] + (rank_in_cluster(leaf_N, key_N) < rest_K[leaf_N])
    return np.repeat(np.arange(len(leaf_N)), np.where(eligible_N, copies_N, 0))


def water_fill(
    capacity_J: np.ndarray,
    parent_J: np.ndarray,
    target_P: np.ndarray,
    generator: Generator,
    weight_J: np.ndarray | float = 1.0,
) -> np.ndarray:
    """Share each parent's target among its children, max-min fair -> the children's quotas.

    A child gets min(capacity, x): x is the highest level for which the sum stays within the target,
    and the rest goes +1 each to unfilled children drawn at random. With weights, x * weight.
    """
    low_P = np.zeros(len(target_P))
    high_P = np.full(len(target_P), (capacity_J / weight_J).max(initial=0) + 1)  # too much for all

    def filled(x_P: np.ndarray) -> np.ndarray:
        return np.minimum(capacity_J, np.floor(x_P[parent_J] * weight_J)).astype(np.int64)

    for _ in range(100):  # bisection down to neighbouring floats, for all parents at once
        middle_P = (low_P + high_P) / 2
        is_within_P = np.bincount(parent_J, filled(middle_P), len(target_P)) <= target_P
        low_P = np.where(is_within_P, middle_P, low_P)
        high_P = np.where(is_within_P, high_P, middle_P)
    quota_J = filled(low_P)
    rest_P = target_P - np.bincount(parent_J, quota_J, len(target_P)).astype(np.int64)
    chance_J = torch.rand(len(quota_J), generator=generator, dtype=torch.float64).numpy()
    key_J = -np.log1p(-chance_J) / weight_J  # a race that the heavier win more often
    key_J[quota_J >= capacity_J] = np.inf  # the full ones come last, and get nothing
    is_next_J = rank_in_cluster(parent_J, key_J) < rest_P[parent_J]
    return quota_J + (is_next_J & (quota_J < capacity_J))


def kmeans(
    rows: Rows,
    k: int,
    generator: Generator,
    iterations: int = 50,
    tolerance: float = 5e-4,
    dtype: torch.dtype = torch.float32,
    bar: Any = SILENT,
) -> tuple[Tensor, Step]:
    """k centroids (k, D) and the rows' clusters: Lloyd's steps, with swaps between the first.
    Stops after `iterations`, or when one lowers the inertia by less than the share `tolerance`."""
    if k > rows.total:
        raise ValueError(f"{k} clusters of {rows.total} rows; ask for at most {rows.total}")
    if rows.total <= 8 * SEED_ROWS * k:
        c_KD = seed_centroids(rows, k, generator)
    else:  # where rows abound, most of the way can be made on a quarter of them
        few = rows.thin(rows.total // 4, generator)
        c_KD = kmeans(few, k, generator, iterations, tolerance, dtype, bar)[0]
    # Lloyd's steps can't carry a centroid across the data; so swaps come between them (we chose).
    swaps, last, i = Swaps(rows, k, generator), math.inf, 0
    while True:
        found = step(rows, c_KD, dtype, second=swaps.is_due(i))
        bar.set_postfix_str(f"{k} clusters, inertia {found.inertia:.6g}", refresh=False)
        bar.update()
        # What Lloyd's step gains after a swap is no swap's gain: no verdict among the first.
        if i == iterations or (i > SWAPS + 1 and last - found.inertia <= tolerance * last):
            return c_KD, found
        c_KD, last, i = swaps.next_centroids(found, i), found.inertia, i + 1


def step(
    rows: Rows, c_KD: Tensor, dtype: torch.dtype = torch.float32, second: bool = False
) -> Step:
    """Assign the rows to the centroids and average them per cluster, in float64."""
    cluster_N = torch.empty(len(rows.ids_N), dtype=torch.int32)
    distance_N = torch.empty(len(rows.ids_N))
    sums_KD = torch.zeros_like(c_KD, dtype=torch.float64)  # of millions of rows
    stats_3K = torch.zeros(3, len(c_KD), dtype=torch.float64, device=c_KD.device)
    middle_D = c_KD.mean(0)  # what all rows have in common would cost the scores their digits
    for part, x_BD in rows.chunks():
        x_BD = x_BD - middle_D
        cluster_B, best_B, second_B = nearest(x_BD, c_KD - middle_D, dtype, second)
        squared_B = (x_BD.square().sum(1) - 2 * best_B).clamp(min=0)  # 0: rounding
        values_3B = torch.stack([torch.ones_like(best_B), squared_B, 2 * (best_B - second_B)])
        stats_3K.index_add_(1, cluster_B, values_3B.double())
        sums_KD.index_add_(0, cluster_B, x_BD.double())
        cluster_N[part], distance_N[part] = cluster_B.int(), squared_B
    # Sums over all processes, so that each of them goes on with the same centroids.
    sums_KD, stats_3K = all_sum(sums_KD, rows.group), all_sum(stats_3K, rows.group)
    count_K, inertia_K, loss_K = stats_3K
    means_KD = (sums_KD / count_K.clamp(min=1)[:, None] + middle_D).to(c_KD.dtype)
    means_KD = torch.where(count_K[:, None] > 0, means_KD, c_KD)  # empty: where it was
    return Step(cluster_N, distance_N, means_KD, count_K, loss_K, float(inertia_K.sum()))


# ---- Part II: the plumbing
# ---- k-means: seeds, swaps, splitting

BLOCK = {"cpu": (1024, 8192), "cuda": (16384, 16384)}  # rows x centroids of one block of scores
SEED_ROWS = 10  # rows per cluster that seeding looks at; the swaps make up for what it misses
EXACT = 16  # so many seeds come one at a time (greedy k-means++), the others in rounds
SWAPS = 6  # first iterations that may move centroids across the data
CANDIDATES = 4  # drawn for every seed or swap that is made


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
        more = -len(c) % 32  # centroids at infinity: never the nearest
        c, half = F.pad(c, (0, 0, 0, more)), F.pad(half, (0, more), value=math.inf)
        is_float32 = dtype == torch.float32  # then the subtraction is part of the matmul
        scores = torch.addmm(-half, x_BD, c.T) if is_float32 else (x_BD @ c.T).float() - half
        top_B, where_B = first_maximum(scores)
        if second:
            runner_B = scores.scatter_(1, where_B[:, None], -math.inf).amax(1)
            second_B = second_B.maximum(runner_B).maximum(top_B.minimum(best_B))
        cluster_B = torch.where(top_B > best_B, where_B + k, cluster_B)
        best_B = best_B.maximum(top_B)
    return cluster_B, best_B, second_B


def first_maximum(scores_BK: Tensor) -> tuple[Tensor, Tensor]:
    """`scores_BK.max(1)` for a multiple of 32 columns, several times as fast on CPU."""
    # Torch finds a maximum by vector instructions, but not where it is: look at groups, then one.
    groups_BG32 = scores_BK.unflatten(1, (-1, 32))
    top_B, group_B = groups_BG32.amax(2).max(1)
    inside_B32 = groups_BG32[torch.arange(len(group_B), device=group_B.device), group_B]
    return top_B, 32 * group_B + inside_B32.argmax(1)


def seed_centroids(rows: Rows, k: int, generator: Generator) -> Tensor:
    """Start of k-means: D^2 sampling in growing rounds, the best of several candidates each."""
    # The first come one by one, which is greedy k-means++; a later round adds a fifth of what is
    # there, so that the seeds of one round seldom see the same gap.
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
        size = 1 if len(c_KD) < EXACT else min(room, max(1, len(c_KD) // 5))
        tries = min(CANDIDATES, rows.total // size)
        drawn_CD = rows.fetch(draw(rows, distance_N, size * tries, generator))
        gain_TC = rearrange(gains(rows, distance_N, drawn_CD), "(t c) -> t c", t=tries)
        new_CD = drawn_CD[gain_TC.argmax(0) * size + torch.arange(size, device=gain_TC.device)]
        c_KD = torch.cat([c_KD, new_CD])


class Swaps:
    """Between Lloyd's steps: moves centroids across the data, and refills empty clusters."""

    def __init__(self, rows: Rows, k: int, generator: Generator):
        self.rows, self.generator = rows, generator
        self.most = max(1, k // 10)
        self.best: Step | None = None

    def is_due(self, i: int) -> bool:
        return i < SWAPS and i % 2 == 1

    def next_centroids(self, found: Step, i: int) -> Tensor:
        if self.is_due(i) or i == SWAPS + 1:  # several at once may not add up: back to the best
            if self.best is None or found.inertia < self.best.inertia:
                self.best = found
            else:
                self.most = max(1, self.most // 2)
            found = self.best
        is_empty_K = found.count_K == 0
        if not self.is_due(i):
            if not is_empty_K.any():
                return found.mean_KD
            found.loss_K = torch.where(is_empty_K, 0.0, math.inf)
        return swap_centroids(self.rows, found, self.most, self.generator)


def swap_centroids(rows: Rows, found: Step, most: int, generator: Generator) -> Tensor:
    """Move up to `most` centroids that are missed least to where new ones gain more than that.

    So a region seeded twice does not stay split, nor two regions seeded once merged; an empty
    cluster is the plainest case.
    """
    c_KD, loss_K = found.mean_KD.clone(), found.loss_K.clone()
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
    far = ((w, torch.cdist(c_KD[w], c_KD)) for w in weak_S.split(256))
    stand_in_S = torch.cat([d.scatter_(1, w[:, None], math.inf).argmin(1) for w, d in far])
    place_K = torch.full_like(loss_K, math.inf)
    place_K[weak_S] = torch.arange(len(weak_S), dtype=loss_K.dtype, device=loss_K.device)
    weak_S = weak_S[place_K[stand_in_S] > place_K[weak_S]]
    first_S = first_S[: len(weak_S)]
    # Half, as the stand-in moves half the way towards what it takes over (clusters of one size).
    is_better_S = gain_C[first_S] > loss_K[weak_S] / 2
    c_KD[weak_S[is_better_S]] = drawn_CD[first_S[is_better_S]]
    return c_KD


def gains(rows: Rows, distance_N: Tensor, new_CD: Tensor) -> Tensor:
    """By how much each of C new centroids alone would lower the inertia."""
    gain_C = torch.zeros(len(new_CD), dtype=torch.float64, device=new_CD.device)
    minus_norm_C = -new_CD.square().sum(1)
    for part, x_BD in rows.chunks():
        slack_B = distance_N[part].to(x_BD.device) - x_BD.square().sum(1)
        fall_BC = torch.addmm(minus_norm_C, x_BD, new_CD.T, alpha=2).add_(slack_B[:, None])
        gain_C += fall_BC.relu_().sum(0)
    return all_sum(gain_C, rows.group)


def split_clusters(rows: Rows, found: Step, k: int, generator: Generator, **limits: Any) -> Tensor:
    """k centroids by clustering every cluster on its own, the same number for each that has it.

    Vo et al. make 10 M clusters as 100 k of 100 parts: a row then meets k / parts + parts
    centroids, not k. The clusters are dealt out to the processes.
    """
    cluster_N, ids_N = gather(found.cluster_N, rows.group), gather(rows.ids_N, rows.group)
    sizes = cluster_N.bincount(minlength=len(found.count_K))
    parts = quota(sizes.tolist(), k, generator)
    starts = np.cumsum([0, *parts]).tolist()
    members = ids_N[cluster_N.argsort(stable=True)].split(sizes.tolist())
    seed = int(torch.randint(2**31, (), generator=generator))
    c_KD = torch.zeros(k, found.mean_KD.shape[1], device=rows.group.device)
    alone = replace(rows.group, rank=0, world=1)
    for j in range(rows.group.rank, len(parts), rows.group.world):
        if parts[j]:
            mine = Rows.share(rows.table, alone, members[j])
            own = Generator().manual_seed(seed + j)
            c_KD[starts[j] : starts[j + 1]] = kmeans(mine, parts[j], own, **limits)[0]
    return all_sum(c_KD, rows.group)


# ---- Rows, shared among processes


@dataclass(frozen=True)
class Rows:
    """The rows of a table (N, D), a tensor or a `Pool`, that this process works on."""

    table: Any
    ids_N: Tensor  # int64, ascending: which rows of the table
    total: int  # rows of all processes
    group: Group

    @classmethod
    def share(cls, table: Any, group: Group, ids_N: Tensor | None = None) -> Rows:
        """This process's contiguous share of all rows, or of the rows `ids_N`."""
        total = len(table) if ids_N is None else len(ids_N)
        start, stop = (total * (group.rank + i) // group.world for i in (0, 1))
        ids_N = torch.arange(start, stop) if ids_N is None else ids_N[start:stop]
        return cls(table, ids_N, total, group)

    def fetch(self, ids_B: Tensor) -> Tensor:
        """Rows of the table as float32 (B, D) on this process's device."""
        is_run = len(ids_B) and (ids_B.diff() == 1).all()  # then a view, or one read of a file
        where = slice(int(ids_B[0]), int(ids_B[-1]) + 1) if is_run else ids_B
        return self.table[where].to(self.group.device, torch.float32)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """(where in this share, its rows x_BD) for one chunk after the other."""
        size = BLOCK[self.group.device.type][0]
        for start in range(0, len(self.ids_N), size):
            part = slice(start, start + size)
            yield part, self.fetch(self.ids_N[part])

    def thin(self, count: int, generator: Generator) -> Rows:
        """About `count` rows of all processes, the same rows for any number of processes."""
        if count >= self.total:
            return self
        ids_N = self.ids_N[uniform(self.ids_N, generator) < count / self.total]
        total = int(all_sum(torch.tensor(len(ids_N)), self.group))
        return replace(self, ids_N=ids_N, total=total)


def uniform(ids_N: Tensor, generator: Generator) -> Tensor:
    """One float64 in (0, 1) per row number: a hash, so that it is the same on any process."""
    key = int(torch.randint(2**62, (), generator=generator))
    return torch.from_numpy(packing.uniform(ids_N.numpy(), key))


def draw(rows: Rows, weight_N: Tensor, count: int, generator: Generator) -> Tensor:
    """`count` different rows of the table, drawn by weight: the first to arrive in a race."""
    time_N = -uniform(rows.ids_N, generator).log() / weight_N.double()
    time_C, where_C = time_N.topk(min(count, len(time_N)), largest=False)
    time_C, ids_C = gather(time_C, rows.group), gather(rows.ids_N[where_C], rows.group)
    return ids_C[time_C.argsort()[:count]]


def all_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the processes."""
    if group.world > 1:
        x = x.to(group.device)
        dist.all_reduce(x)
    return x


def gather(x_N: Tensor, group: Group) -> Tensor:
    """The shares of all processes, end to end, on the CPU."""
    parts = [x_N.cpu()] * group.world
    if group.world > 1:
        dist.all_gather_object(parts, x_N.cpu())
    return torch.cat(parts)


def rank_in_cluster(cluster_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
    """Place (0, 1, ..) of each row among the rows of its cluster, smallest key first."""
    order_N = np.lexsort((key_N, cluster_N))
    sizes = np.bincount(cluster_N)
    rank_N = np.empty(len(cluster_N), np.int64)
    rank_N[order_N] = np.arange(len(cluster_N)) - np.repeat(sizes.cumsum() - sizes, sizes)
    return rank_N


def checked(x: Any, clusters: Sequence[int], keep: Any, group: Group) -> tuple[Any, list[Any]]:
    """Table and rounds of each level; refuses what can't be clustered, before any work."""
    table = x if isinstance(x, Pool | Tensor) else torch.tensor(np.asarray(x, np.float32))
    keep = [None] * len(clusters) if keep is None else keep
    if not clusters or min(clusters) < 1 or len(keep) != len(clusters):
        raise ValueError(f"{clusters=} must be >= 1, with one entry of {keep=} for each")
    rounds: list[Any] = []
    for n, k, own in zip([len(table), *clusters], clusters, keep, strict=False):
        if k > n:
            fewer = f"say {max(1, n // 10)} {max(1, n // 100)}"
            raise ValueError(f"{k} clusters of {n} inputs; levels go from fine to coarse, {fewer}")
        rounds.append(default_keep(n, k, not rounds) if own is None else own)
    check_finite(Rows.share(table, group))
    return table, rounds


def check_finite(rows: Rows) -> None:
    """Name the first row with a NaN or an infinity."""
    for part, x_BD in rows.chunks():
        is_bad_B = ~x_BD.isfinite().all(1)
        if is_bad_B.any():
            row = int(rows.ids_N[part][is_bad_B.cpu()][0])
            is_pool = isinstance(rows.table, Pool)
            name = rows.table.record(row)["key"] if is_pool else f"row {row}"
            raise ValueError(f"the embedding of {name} is not finite; drop it or embed it anew")


# ---- Options of ours


def default_keep(n: int, k: int, is_finest: bool) -> list[int]:
    """Rounds of re-fitting when none are given (ours; the published ones are an option).

    The finest level keeps half the mean cluster size, then half of that, .. down to 4. The others
    keep the one closest input, so that their centroids are inputs: a mean of many unlike inputs is
    nearer to everything than any of them, and would swallow most of the level in one cluster.
    """
    return [n // k >> i for i in range(1, 64) if n // k >> i > 3] if is_finest else [1]


def quota(sizes: Sequence[int], target: int, generator: Generator) -> list[int]:
    """Shares of the target, as equal as the sizes allow; they sum to min(target, sum(sizes)).

    One parent's `water_fill`. Vo et al. Sec. 3
    """
    if target < 0 or min(sizes, default=0) < 0:
        raise ValueError(f"{target=} and the sizes (smallest {min(sizes)}) must not be negative")
    capacity_J = np.asarray(sizes, np.int64)
    return water_fill(capacity_J, np.zeros_like(capacity_J), np.array([target]), generator).tolist()


def cluster_weights(tree: Tree, weighting: str) -> list[Any]:
    """Per level, what `water_fill` multiplies each cluster's share by: 1, or its volume."""
    if weighting != "volume":
        return [1.0] * len(tree)
    weights = [leaf_volumes(tree)]
    for level in tree[1:]:
        volume_K = np.bincount(level.assignment, weights[-1], len(level.centroids))
        weights.append(volume_K.clip(1e-9))
    return weights


def leaf_volumes(tree: Tree) -> np.ndarray:
    """Room of each finest cluster: one over how many finest centroids share its place.

    A top cluster with ten concepts should get ten times the quota of one with a single concept
    split ten ways. Neighbours are counted by a Gaussian as wide as the mean cluster, among the
    leaves of the same parent.
    """
    width = tree[0].inertia / len(tree[0].distance)
    parent_K = tree[1].assignment if len(tree) > 1 else np.zeros(len(tree[0].centroids), np.int64)
    volume_K = np.ones(len(parent_K))
    order_K, ends = np.argsort(parent_K, kind="stable"), np.bincount(parent_K).cumsum()
    for members in np.split(order_K, ends[:-1]):
        c_KD = torch.from_numpy(tree[0].centroids[members])
        near_KK = (torch.cdist(c_KD, c_KD).square() / -max(width, 1e-12)).exp()
        volume_K[members] = 1 / near_KK.sum(1)
    return volume_K


def near_duplicates(
    table: Any, leaf_N: np.ndarray, threshold: float, is_first_N: np.ndarray | None = None
) -> np.ndarray:
    """True for each row whose cosine to an earlier row of its finest cluster exceeds the threshold.

    Rows of `is_first_N` count as earlier than all others: what is near them goes. SemDeDup, arXiv
    2303.09540; only rows of one cluster are compared, in blocks.
    """
    is_duplicate_N = np.zeros(len(leaf_N), bool)
    is_first_N = np.zeros(len(leaf_N), bool) if is_first_N is None else is_first_N
    order_N, sizes = np.lexsort((~is_first_N, leaf_N)), np.bincount(leaf_N)
    for members in np.split(order_N, sizes.cumsum()[:-1]):
        if len(members) < 2:
            continue
        x_BD = F.normalize(table[torch.from_numpy(members)].float(), dim=1)
        for a in range(0, len(members), 1024):
            cosine = x_BD[a : a + 1024] @ x_BD[: a + 1024].T
            is_near = (cosine > threshold).tril(a - 1)  # a row meets the earlier ones only
            is_duplicate_N[members[a : a + 1024]] = is_near.any(1).numpy()
    return is_duplicate_N


def capped_sample(
    tree: Tree,
    target: int,
    source_N: np.ndarray,
    caps: dict[Any, int],
    eligible_N: np.ndarray,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """A balanced sample with at most `caps[source]` rows of a source.

    A source over its cap keeps a random part of what it got; the rest is shared out anew.
    """
    generator = Generator().manual_seed(seed)
    eligible_N, open_caps = eligible_N.copy(), dict(caps)
    while True:
        ids = balanced_sample(tree, target, seed, eligible_N=eligible_N, **options)
        over = [name for name, cap in open_caps.items() if (source_N[ids] == name).sum() > cap]
        if not over:
            return ids
        for name in over:
            own = np.unique(ids[source_N[ids] == name])
            kept = own[torch.randperm(len(own), generator=generator).numpy()[: open_caps.pop(name)]]
            eligible_N[(source_N == name) & ~np.isin(np.arange(len(source_N)), kept)] = False


def excluded(path: Path, pool: Pool) -> np.ndarray:
    """True for each row that has the content of one that a file names: keys, digests, an index.

    A key may have its source in front and a copy's #2 behind, as in the index of a sample.
    """
    lines = [x for x in map(str.strip, path.read_text("utf-8-sig").splitlines()) if x]
    if lines and lines[0].startswith("{"):
        read_header(path)  # refuses one that is cut
        lines = [r.get("digest", r["key"]) for r in map(json.loads, lines[1:])]
    wanted = [{x, re.sub(r"#\d+$", "", x), x.lower().removeprefix("sha256:")} for x in lines]
    forms = set[str]().union(*wanted)
    starts = ["", *(f"{name}/" for name in pool.sources()[0])]
    keys = [packing.hash64(x.removeprefix(start)) for x in forms for start in starts]
    digests = [int(x[:16], 16) for x in forms if re.fullmatch(r"[0-9a-f]{64}", x)]
    # the rows that may be meant are few, and only they are read
    is_near_N = np.isin(pool.table["key"], np.array(keys, np.uint64))
    is_near_N |= np.isin(pool.table["content"], np.array(digests, np.uint64))
    found: dict[str, set[str]] = {}
    for r in map(pool.record, np.flatnonzero(is_near_N).tolist()):
        for form in (r["key"], f"{r['source']}/{r['key']}", r["digest"]):
            found.setdefault(form, set()).add(r["digest"])
    if missed := [x for x, own in zip(lines, wanted, strict=True) if own.isdisjoint(found)]:
        print(f"--exclude {path}: {len(missed)} of {len(lines)} match nothing: {missed[:10]}")
    banned = {int(digest[:16], 16) for form in forms & found.keys() for digest in found[form]}
    return np.isin(pool.table["content"], np.array(list(banned), np.uint64))


# ---- Files
#
# A pool is a folder of `part-00000.npy` (fp16, rows x D) each with `part-00000.jsonl` (an index
# file, one line per row, its paths relative to the part's root in `pool.json`, so that pictures may
# move: then `embed` again) and `pool.json`; a tree is a folder of plain .npy arrays and `tree.json`
# with the sha256 of each. Nothing is pickled.


def write_array(path: Path, array: np.ndarray) -> str:
    """Write a .npy file; returns its sha256."""
    write_whole(path, lambda file: np.save(file, array, allow_pickle=False))
    return sha256_of(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1, allow_nan=False).encode())


def read_arrays(files: Sequence[tuple[Path, str]], group: Group = SOLO) -> list[np.ndarray]:
    """Memory-map arrays, if they are what the manifest says; each process hashes its share."""
    wrong: list[Any] = [None] * group.world
    for path, sha256 in files[group.rank :: group.world]:
        if not path.is_file() or sha256_of(path) != sha256:
            wrong[group.rank] = path
    if group.world > 1:
        dist.all_gather_object(wrong, wrong[group.rank])
    if bad := next(filter(None, wrong), None):
        raise ValueError(f"{bad}: missing, cut or changed since it was written; make it anew")
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path, _ in files]


class Pool:
    """The embeddings that `embed` wrote, as one table whose rows stay on disk until asked for."""

    def __init__(self, folder: str | Path, group: Group = SOLO):
        self.folder = Path(folder)
        if not (self.folder / "pool.json").is_file():
            raise ValueError(f"{folder}: no pool.json; run (or finish) `sampling.py embed` first")
        self.manifest = json.loads((self.folder / "pool.json").read_text())
        content = [self.manifest[name] for name in ("dim", "parts", "teacher")]  # not the places
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        parts = [(self.folder / f"{p['name']}.npy", p["sha256"]) for p in self.manifest["parts"]]
        self.arrays = read_arrays(parts, group)
        self.starts = np.cumsum([0, *map(len, self.arrays)])
        # of each part: its source's name, and where the paths in it begin
        self.places = self.manifest.get("places") or [("", "")] * len(self.arrays)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, where: slice | Tensor) -> Tensor:
        """Rows as float16 (B, D), for a slice or for row numbers in any order."""
        ids = np.arange(*where.indices(len(self))) if isinstance(where, slice) else where.numpy()
        part_B = np.searchsorted(self.starts, ids, "right") - 1
        rows = np.empty((len(ids), self.manifest["dim"]), np.float16)
        for p in np.unique(part_B):
            rows[part_B == p] = self.arrays[p][ids[part_B == p] - self.starts[p]]
        return torch.from_numpy(rows)

    @cached_property
    def table(self) -> packing.Table:
        """What the index files of the parts say, a row for each embedding."""
        paths = [self.folder / f"{part['name']}.jsonl" for part in self.manifest["parts"]]
        table = packing.kept_table(paths, are_distinct=False)
        if len(table) != len(self):
            raise ValueError(f"{self.folder}: {len(self)} rows, {len(table)} lines; embed it anew")
        return table

    def record(self, i: int) -> dict[str, Any]:
        """The index record (see packing.py) of a row."""
        source, root = self.places[self.table.part_of(i)]
        return with_paths({"source": source} | self.table.record(i), partial(os.path.join, root))

    def sources(self) -> tuple[list[str], np.ndarray]:
        """The names of the sources, and the number of each row's one."""
        origins = self.table.header["origins"]
        names = list(dict.fromkeys([*origins, *(source for source, _ in self.places)]))
        of_part = [names.index(source) for source, _ in self.places]
        of_part_N = np.repeat(of_part, np.diff([*self.table.header["firsts"], len(self)]))
        return names, np.where(self.table["origin"] < 0, of_part_N, self.table["origin"])


def save_tree(folder: Path, tree: Tree, settings: dict[str, Any]) -> None:
    """Write the levels that are not there yet, then the manifest that makes them count."""
    folder.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if (path := folder / "tree.json").exists() else {}
    levels = old["levels"] if old.get("settings") == settings else []
    for t, level in list(enumerate(tree))[len(levels) :]:
        files = {k: f"level{t + 1}_{k}.npy" for k in ("centroids", "assignment", "distance")}
        levels.append({f: write_array(folder / f, getattr(level, k)) for k, f in files.items()})
    write_json(path, {"format": "amoe-tree", "version": 1, "settings": settings, "levels": levels})


def load_tree(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """The levels, memory-mapped and checked by hash, and the settings that they came from."""
    if not (folder / "tree.json").is_file():
        raise ValueError(f"{folder}: no tree.json; run `sampling.py cluster` first")
    manifest = json.loads((folder / "tree.json").read_text())
    levels = [read_arrays([(folder / f, s) for f, s in x.items()]) for x in manifest["levels"]]
    return tuple(Level(*arrays) for arrays in levels), manifest["settings"]


# ---- Commands


def embed(args: argparse.Namespace, group: Group) -> None:
    """SOURCE... -> a pool: one part per `--part-rows` pictures, dealt out to the processes."""
    teacher = load_teacher(parse_teacher(args.teacher), group.device)
    if not teacher.summary_dim:
        raise ValueError(f"teacher {teacher.name} has no summary to embed with; take another")
    sources = named_apart(args.source)
    args.out.mkdir(parents=True, exist_ok=True)
    plan = [(s, a) for s in sources for a in range(0, len(s), args.part_rows)]
    paths = [args.out / f"part-{n:05d}" for n in range(len(plan))]
    mine = range(group.rank, len(plan), group.world)
    for n in progress(mine, "embed", unit="part"):
        source, start = plan[n]
        rows = range(start, min(start + args.part_rows, len(source)))
        made_of = f"2 {teacher.fingerprint} {source.fingerprint()} {rows}"  # 2: the version
        if not is_embedded(paths[n], made_of):
            embed_part(paths[n], source, rows, teacher, args.batch, made_of)
    packing.wait_for_all()
    if group.rank == 0:
        heads = [read_header(path.with_suffix(".jsonl")) for path in paths]
        skipped = packing.skipped_by(sources)
        for head in heads:
            skipped |= head["skipped"]
        parts = zip(paths, heads, strict=True)
        content = {
            "dim": teacher.summary_dim,
            "parts": [{"name": p.name, "sha256": h["embeddings"]} for p, h in parts],
            "teacher": teacher.fingerprint,
            "places": [(source.name, str(source.root)) for source, _ in plan],
            "fingerprints": {source.name: source.fingerprint() for source in sources},
            "skipped": skipped,
        }
        write_json(args.out / "pool.json", content)
        for line in packing.left_out(skipped):
            print(f"skipped {line}")
        count = sum(head["count"] for head in heads)
        print(f"{count} pictures, {teacher.summary_dim} numbers each, are in {args.out}")


def named_apart(specs: Sequence[str]) -> list[Any]:
    """The sources, each under a name of its own: two downloads of 00000.tar get their folders'."""
    sources: list[Any] = [open_source(spec) for spec in specs]
    names = [source.name for source in sources]
    for spec, source in zip(specs, sources, strict=True):
        if names.count(source.name) > 1:
            source.name = f"{Path(spec).resolve().parent.name}/{source.name}"
    if len({source.name for source in sources}) < len(sources):
        raise ValueError(f"sources of one name: {names}; the index would mix them up, rename one")
    return sources


def is_embedded(path: Path, made_of: str) -> bool:
    """True if an earlier run wrote this very part, whole."""
    try:
        head, rows = read_header(path.with_suffix(".jsonl")), path.with_suffix(".npy")
        return head["made_of"] == made_of and sha256_of(rows) == head["embeddings"]
    except (OSError, ValueError, KeyError):
        return False


def embed_part(
    path: Path, source: Any, rows: range, teacher: Any, batch: int, made_of: str
) -> None:
    """Write `path`.npy (fp16) and, last, `path`.jsonl with the records of what decodes."""
    records, vectors, skipped = [], [], dict[str, str]()

    def load(i: int) -> list[tuple[int, Any]]:
        return list(packing.readable(source, [i], skipped, teacher.size_for(*source.size(i))))

    with ThreadPoolExecutor(4) as threads:
        for start in range(rows.start, rows.stop, batch):
            loaded = threads.map(load, range(start, min(start + batch, rows.stop)))
            good = list(itertools.chain(*loaded))
            x_BD = teacher.targets([s for _, s in good]).summary_BC.half().cpu() if good else ()
            for (i, s), x_D in zip(good, x_BD, strict=True):
                if not x_D.isfinite().all():
                    skipped[s.key] = "its embedding is not finite"
                    continue
                record = with_paths(source.record(i), partial(os.path.relpath, start=source.root))
                if record["source"] == source.name:
                    del record["source"]  # pool.json has it
                records.append(record | {"digest": s.digest})
                vectors.append(x_D)
    table = torch.stack(vectors) if vectors else torch.empty(0, teacher.summary_dim).half()
    sha256 = write_array(path.with_suffix(".npy"), table.numpy())
    ordered = dict(sorted(skipped.items()))  # whichever thread was first
    head = {"made_of": made_of, "embeddings": sha256, "skipped": ordered}
    packing.write_index(path.with_suffix(".jsonl"), records, **head)


def cluster(args: argparse.Namespace, group: Group) -> None:
    """Pool -> tree, level by level; a rerun continues after the last finished level."""
    pool = Pool(args.pool, group)
    keep = args.keep or [None] * len(args.clusters)
    names = ("clusters", "seed", "fit_rows", "splits", "iterations", "tolerance", "scores")
    settings = {"pool": pool.fingerprint, "teacher": pool.manifest["teacher"], "keep": keep}
    settings |= {name: getattr(args, name) for name in names}
    done: Tree = ()
    if (args.out / "tree.json").exists():
        done, old = load_tree(args.out)
        if old != settings:
            raise ValueError(f"{args.out} holds a tree of other settings {old}; pass another --out")

    def on_level(tree: Tree) -> None:
        if group.rank == 0:
            save_tree(args.out, tree, settings)
            k, inertia = len(tree[-1].centroids), tree[-1].inertia
            print(f"level {len(tree)}: {k} clusters, inertia {inertia:.6g}")

    bar = progress(title="cluster", unit="pass")
    limits = {name: settings[name] for name in ("fit_rows", "splits", "iterations", "tolerance")}
    limits |= {"dtype": getattr(torch, args.scores), "bar": bar}
    hierarchical_kmeans(pool, args.clusters, args.seed, keep, group, done, on_level, **limits)


def assign(args: argparse.Namespace, group: Group) -> None:
    """New pool + tree -> the same tree over the new pool's rows, one file per part, resumable."""
    pool, (tree, settings) = Pool(args.pool, group), load_tree(args.tree)
    if settings["teacher"] != pool.manifest["teacher"]:
        raise ValueError(
            f"{args.pool} was embedded by another teacher than the pool of {args.tree}; embed it "
            "by that one"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    made_by = sha256_of(args.tree / "tree.json")  # with a part's hash: a rerun on others is anew
    keys = [f"{made_by} {part['sha256']}" for part in pool.manifest["parts"]]
    paths = [args.out / f"{hashlib.sha256(x.encode()).hexdigest()[:32]}.npy" for x in keys]
    c_KD = torch.from_numpy(np.array(tree[0].centroids)).to(group.device)
    alone = replace(group, rank=0, world=1)
    for p in range(group.rank, len(paths), group.world):
        if not paths[p].exists():
            rows = Rows.share(torch.from_numpy(np.array(pool.arrays[p])), alone)
            check_finite(rows)
            found = step(rows, c_KD)
            write_array(paths[p], np.stack([found.cluster_N.double(), found.distance_N.double()]))
    packing.wait_for_all()
    if group.rank == 0:
        cluster_N, distance_N = np.concatenate([np.load(path) for path in paths], axis=1)
        first = Level(tree[0].centroids, cluster_N.astype(np.int32), distance_N.astype(np.float32))
        made_of = {"pool": pool.fingerprint, "tree": made_by}
        save_tree(args.out, (first, *tree[1:]), settings | made_of)
        print(f"{len(pool)} rows assigned to {len(c_KD)} clusters in {args.out}")


def sample(args: argparse.Namespace, group: Group) -> None:
    """Pool + tree -> an index file for `train.py --data`, and a report."""
    pool, (tree, settings) = Pool(args.pool, group), load_tree(args.tree)
    if settings["pool"] != pool.fingerprint:
        raise ValueError(f"{args.tree} is a tree of another pool than {args.pool}; assign it first")
    is_excluded_N, is_duplicate_N = set_aside(args, pool, tree)
    names, source_N = pool.sources() if args.cap else ([], np.zeros(len(pool), int))
    if unknown := dict(args.cap).keys() - set(names):
        raise ValueError(f"--cap {sorted(unknown)}: the pool has {sorted(names)}")
    caps = {names.index(name): count for name, count in args.cap}
    options = {name: getattr(args, name) for name in ("seed", "strategy", "multiplier")}
    options["weighting"] = args.weights
    eligible_N = ~is_duplicate_N & ~is_excluded_N
    ids = capped_sample(tree, args.target, source_N, caps, eligible_N, **options)
    if len(ids) < args.target:
        print(f"warning: --target {args.target}, but only {len(ids)} rows may be drawn; took all")
    several = len(pool.manifest["fingerprints"]) > 1  # two sources may use the same keys

    def chosen() -> Iterator[dict[str, Any]]:
        for i, copy in zip(ids.tolist(), rank_in_cluster(ids, ids).tolist(), strict=True):
            record = pool.record(i)
            name = f"{record['source']}/{record['key']}" if several else record["key"]
            yield record | {"key": f"{name}#{copy + 1}" if copy else name}

    header = {"fingerprints": pool.manifest["fingerprints"], "seed": args.seed}
    packing.write_index(args.out, chosen(), **header)
    print(f"{len(ids)} of {len(pool)} pictures are in {args.out}; what it is made of:")
    counts = {"pool": len(pool), "target": args.target, "drawn": len(ids)}
    left = {"duplicates": int(is_duplicate_N.sum()), "excluded": int(is_excluded_N.sum())}
    report(args.out, tree, ids, counts | left)


def set_aside(args: argparse.Namespace, pool: Pool, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    """Per row: whether `--exclude` and whether `--dedup` rule it out."""
    is_excluded_N, is_duplicate_N = np.zeros(len(pool), bool), np.zeros(len(pool), bool)
    if args.exclude:
        is_excluded_N = excluded(args.exclude, pool)
    if args.dedup:
        is_duplicate_N[:] = True
        is_duplicate_N[np.unique(pool.table["content"], return_index=True)[1]] = False
    if args.dedup and args.dedup < 1:
        leaf_N = tree[0].assignment
        is_duplicate_N |= near_duplicates(pool, leaf_N, args.dedup, is_excluded_N)
    return is_excluded_N, is_duplicate_N


def report(out: Path, tree: Tree, ids: np.ndarray, counts: dict[str, Any]) -> None:
    """OUT.report.json (sizes per level, ten largest clusters), printed too."""
    levels, path_N = [], tree[0].assignment
    for t, level in enumerate(tree):
        path_N = path_N if t == 0 else level.assignment[path_N]
        k = len(level.centroids)
        before, after = (np.bincount(p, minlength=k) for p in (path_N, path_N[ids]))
        empty = int((before == 0).sum())
        levels.append({"clusters": k, "empty": empty, "largest": int(before.max())})
    largest = np.argsort(-before, kind="stable")[:10]
    rows = [{"cluster": int(c), "pool": int(before[c]), "sample": int(after[c])} for c in largest]
    content = counts | {"levels": levels, "largest": rows}
    write_json(out.with_suffix(".report.json"), content)
    print(json.dumps(content, allow_nan=False))


def parse_keep(text: str) -> list[int] | None:
    """'default', 'none', '20,10,5' or '3x10' (ten rounds of 3)."""
    if text in ("default", "none"):
        return None if text == "default" else []
    most, times = text.split("x") if "x" in text else (text, "1")
    return [COUNT(m) for m in most.split(",")] * COUNT(times)


def parse_cap(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    return name, Number(int, 0)(count)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing.Parser(description="Choose the data; see the README.")
    commands = parser.add_subparsers(dest="command", required=True)
    parts = [commands.add_parser(f.__name__, help=f.__doc__) for f in COMMANDS]
    to_embed, to_cluster, to_sample, to_assign = (part.add_argument for part in parts)
    to_embed("source", nargs="+", help="SOURCEs: openmoji, a folder, tars, an index")
    to_embed("--teacher", default="vit=builtin:vit-s", help="NAME=PATH[@layer] or PATH")
    to_embed("--part-rows", type=COUNT, default=10_000, help="pictures per file")
    to_embed("--batch", type=COUNT, default=64, help="pictures decoded together")
    for add in (to_cluster, to_assign, to_sample):
        add("pool", type=Path, help="folder that embed wrote")
    for add in (to_assign, to_sample):
        add("tree", type=Path, help="folder that cluster or assign wrote")
    for add in (to_embed, to_cluster, to_assign, to_sample):
        add("--out", type=Path, required=True, help="folder (sample: index file) to write")
    for add in (to_embed, to_cluster, to_assign):
        add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="to compute on")
    words = "per level, inputs per cluster in each round: default, none, 20,10,5 or 3x10"
    to_cluster("--clusters", type=COUNT, nargs="+", required=True, help="per level, finest first")
    to_cluster("--keep", type=parse_keep, nargs="+", help=words)
    to_cluster("--fit-rows", type=COUNT, help="fit the finest level on so many rows")
    to_cluster("--splits", type=COUNT, default=1, help="parts per cluster of a first pass")
    to_cluster("--iterations", type=COUNT, default=50, help="Lloyd steps at most")
    to_cluster("--tolerance", type=Number(float, 0, 1), default=5e-4, help="least gain of a step")
    to_cluster("--scores", choices=("float32", "bfloat16"), default="float32", help="of the fits")
    to_sample("--target", type=COUNT, required=True, help="pictures to draw")
    to_sample("--strategy", choices=("random", "closest"), default="random", help="in a cluster")
    to_sample("--weights", choices=("equal", "volume"), default="equal", help="of the quotas")
    to_sample("--multiplier", type=COUNT, default=1, help="copies of a picture at most")
    words = "drop near-duplicates above this cosine, in (0, 1], e.g. 0.95; 1: exact copies alone"
    to_sample("--dedup", type=Number(float, 0, 1, above=True), help=words)
    words = "file of keys or digests, or an index: content never to draw; with --dedup, nor what "
    to_sample("--exclude", type=Path, help=words + "is near it")
    to_sample("--cap", type=parse_cap, nargs="+", default=[], help="SOURCE=COUNT")
    for add in (to_cluster, to_sample):
        add("--seed", type=Number(int, 0, 2**32), default=0, help="decides every random choice")
    return parser.parse_args(argv)


COMMANDS = (embed, cluster, sample, assign)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        group = packing.setup_distributed(device=getattr(args, "device", "cpu"))
        {f.__name__: f for f in COMMANDS}[args.command](args, group)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"sampling.py {args.command}: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
