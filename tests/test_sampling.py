"""k-means against a plain Lloyd, quotas against brute force, balance on blobs, and the commands."""

import json
import math
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sampling
from packing import BadImage, Group, open_source, write_index
from sampling import (
    Rows,
    balanced_sample,
    capped_sample,
    hierarchical_kmeans,
    kmeans,
    near_duplicates,
    quota,
    rank_in_cluster,
    step,
    water_fill,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf_blobs(rows, blobs, dim, exponent, seed, sigma=0.6):
    """Gaussian blobs with centres N(0, 1) whose sizes fall as rank^-exponent; rows and labels."""
    generator = seeded(seed)
    share = 1 / torch.arange(1, blobs + 1, dtype=torch.float64) ** exponent
    sizes = (share / share.sum() * rows).round().long().clamp(min=1)
    sizes[0] += rows - sizes.sum()
    labels = torch.arange(blobs).repeat_interleave(sizes)
    centres = torch.randn(blobs, dim, generator=generator)
    return centres[labels] + sigma * torch.randn(rows, dim, generator=generator), labels.numpy()


def entropy(labels, blobs):
    """Entropy of the labels over its largest value: 1 is perfectly balanced."""
    p = np.bincount(labels, minlength=blobs) / len(labels)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / math.log(blobs))


def share(x):
    return Rows.share(x, sampling.SOLO)


# ------------------------------------------------------------------------------- k-means


@pytest.mark.parametrize("block", [(1024, 8192), (7, 3)])
def test_step_is_a_slow_loop(monkeypatch, block):
    monkeypatch.setitem(sampling.BLOCK, "cpu", block)
    x_ND, c_KD = torch.randn(50, 5, generator=seeded()), torch.randn(10, 5, generator=seeded(1))
    found = step(share(x_ND), c_KD, second=True)
    squares = torch.cdist(x_ND.double(), c_KD.double()).square()
    nearest_N2, order_N2 = squares.topk(2, largest=False)
    assert found.cluster_N.tolist() == order_N2[:, 0].tolist()
    torch.testing.assert_close(found.distance_N.double(), nearest_N2[:, 0], atol=1e-5, rtol=1e-5)
    assert found.inertia == pytest.approx(float(nearest_N2[:, 0].sum()), rel=1e-6)
    for k in range(10):
        own = order_N2[:, 0] == k
        mean = x_ND[own].mean(0) if own.any() else c_KD[k]
        torch.testing.assert_close(found.mean_KD[k], mean, atol=1e-6, rtol=1e-6)
        without = torch.cat([squares[:, :k], squares[:, k + 1 :]], 1).min(1).values.sum()
        assert float(found.loss_K[k]) == pytest.approx(float(without) - found.inertia, abs=1e-4)


def test_gains_are_the_fall_of_the_inertia():
    x_ND, c_KD = torch.randn(60, 4, generator=seeded()), torch.randn(3, 4, generator=seeded(1))
    found, new_CD = step(share(x_ND), c_KD), torch.randn(5, 4, generator=seeded(2))
    gain_C = sampling.gains(share(x_ND), found.distance_N, new_CD)
    for gain, new in zip(gain_C, new_CD, strict=True):
        after = step(share(x_ND), torch.cat([c_KD, new[None]])).inertia
        assert float(gain) == pytest.approx(found.inertia - after, abs=1e-4)


def test_kmeans_finds_separate_blobs_and_has_no_empty_cluster():
    x_ND, labels = zipf_blobs(2000, 40, 16, 1.0, 0, sigma=0.1)
    c_KD, found = kmeans(share(x_ND), 40, seeded())
    pairs = set(zip(labels.tolist(), found.cluster_N.tolist(), strict=True))
    assert len(pairs) == 40  # one cluster a blob
    assert found.inertia < 1.001 * 2000 * 16 * 0.01
    assert (found.count_K > 0).all()
    assert (step(share(x_ND), c_KD).cluster_N == found.cluster_N).all()


@pytest.mark.slow
def test_kmeans_is_no_worse_than_sklearn():
    cluster = pytest.importorskip("sklearn.cluster")
    x_ND, _ = zipf_blobs(3000, 100, 16, 1.0, 0)
    other = cluster.KMeans(60, init="k-means++", n_init=1, max_iter=50, random_state=0).fit(x_ND)
    assert kmeans(share(x_ND), 60, seeded())[1].inertia < 1.01 * other.inertia_


def test_an_empty_cluster_is_refilled():
    x_ND = torch.cat([torch.zeros(50, 2), torch.full((50, 2), 9.0)])
    x_ND += torch.randn(100, 2, generator=seeded()) / 10
    found = step(share(x_ND), torch.tensor([[0.0, 0.0], [99.0, 99.0]]), second=True)
    c_KD = sampling.swap_centroids(share(x_ND), found, 1, seeded())
    assert step(share(x_ND), c_KD).count_K.tolist() in ([50, 50], [50.0, 50.0])


@pytest.mark.parametrize(("apart", "is_swap"), [(3.8, True), (4.4, True), (4.6, False)])
def test_a_swap_must_gain_more_than_half_of_what_the_stand_in_loses(apart, is_swap):
    """Ten rows at -1 and ten at 1 share a centroid: another one gains 10. Two single rows have a
    centroid each: without one its row costs apart^2, or half of that once the other moved."""
    x_N1 = torch.tensor([-1.0, 1.0] * 10 + [100.0, 100 + apart])[:, None]
    c_K1 = torch.tensor([0.0, 100.0, 100 + apart])[:, None]
    found = step(share(x_N1), c_K1, second=True)
    assert found.loss_K[1:].tolist() == pytest.approx([apart**2] * 2, rel=1e-3)
    moved = sampling.swap_centroids(share(x_N1), found, 1, seeded())
    assert is_swap == bool((moved[:, 0].abs() == 1).any())


def test_kmeans_makes_the_steps_it_is_allowed():
    class Bar:
        passes = 0

        def update(self):
            self.passes += 1

        def set_postfix_str(self, _, refresh):
            pass

    x_ND, _ = zipf_blobs(500, 20, 8, 1.0, 0)
    for iterations in (0, 3, sampling.SWAPS + 1):  # it may stop of itself only after these
        bar = Bar()
        c_KD, found = kmeans(share(x_ND), 10, seeded(), iterations, tolerance=0.0, bar=bar)
        assert bar.passes == iterations + 1  # the last one assigns
        assert found.inertia == pytest.approx(step(share(x_ND), c_KD).inertia)
    bar = Bar()
    kmeans(share(x_ND), 10, seeded(), 50, tolerance=1.0, bar=bar)  # whatever it gains is too little
    assert bar.passes == sampling.SWAPS + 3


def test_a_thinned_share_counts_the_rows_of_all_processes(monkeypatch):
    x_ND = torch.randn(1000, 3, generator=seeded())
    whole = share(x_ND).thin(300, seeded(5))
    assert 240 < whole.total == len(whole.ids_N) < 360
    ids, own = [], []
    for rank in (0, 1):
        monkeypatch.setattr(sampling.dist, "all_reduce", lambda x: own.append(int(x)))
        part = Rows.share(x_ND, Group(rank, 2, torch.device("cpu"))).thin(300, seeded(5))
        ids += part.ids_N.tolist()
    assert ids == whole.ids_N.tolist() and sum(own) == whole.total
    monkeypatch.setattr(sampling.dist, "all_reduce", lambda x: x.fill_(sum(own)))
    part = Rows.share(x_ND, Group(1, 2, torch.device("cpu"))).thin(300, seeded(5))
    assert part.total == whole.total and len(part.ids_N) == own[1]


def test_large_pools_start_from_a_part(monkeypatch):
    x_ND, _ = zipf_blobs(4000, 10, 8, 1.0, 0)
    whole = kmeans(share(x_ND), 10, seeded())[1].inertia
    monkeypatch.setattr(sampling, "SEED_ROWS", 5)
    assert kmeans(share(x_ND), 10, seeded())[1].inertia < 1.05 * whole


def test_bfloat16_scores_end_in_float32():
    x_ND, _ = zipf_blobs(1000, 20, 16, 0.5, 0)
    tree = hierarchical_kmeans(x_ND, [20], keep=[[]], dtype=torch.bfloat16)
    exact = hierarchical_kmeans(x_ND, [20], keep=[[]])
    assert tree[0].inertia < 1.05 * exact[0].inertia
    squares = torch.cdist(x_ND, torch.from_numpy(tree[0].centroids)).square()
    assert (squares.argmin(1).numpy() == tree[0].assignment).all()


def test_bfloat16_scores_bear_an_offset():
    """Far from 0, bfloat16 has no digits left for what tells rows apart: 3 times the inertia."""
    x_ND, _ = zipf_blobs(2000, 40, 16, 0.5, 0)
    plain, moved = (kmeans(share(x), 40, seeded(), dtype=torch.bfloat16) for x in (x_ND, x_ND + 30))
    assert moved[1].inertia == pytest.approx(plain[1].inertia, rel=0.1)
    np.testing.assert_allclose(moved[0].mean(0), plain[0].mean(0) + 30, atol=0.3)


def test_random_numbers_belong_to_the_row():
    ids = torch.arange(100_000)
    u = sampling.uniform(ids, seeded())
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert torch.equal(u[500:600], sampling.uniform(ids[500:600], seeded()))
    assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 0.02


def test_rows_come_in_the_order_that_is_asked_for():
    x_ND = torch.arange(20.0)[:, None]
    for ids in ([5, 9, 7], [3, 4, 5], [7, 6, 5], [2, 2, 4], [8], []):
        assert share(x_ND).fetch(torch.tensor(ids, dtype=torch.int64))[:, 0].tolist() == ids


def test_draw_follows_the_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 7.0])
    rows, generator = share(torch.zeros(4, 1)), seeded()
    drawn = [int(sampling.draw(rows, weights, 1, generator)[0]) for _ in range(3000)]
    shares = np.bincount(drawn, minlength=4) / 3000
    assert np.abs(shares - weights.numpy() / 10).max() < 0.03
    assert sorted(sampling.draw(rows, weights, 4, generator).tolist()) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------- the hierarchy


def test_levels_are_plain_arrays_of_the_asked_sizes():
    x_ND, _ = zipf_blobs(1000, 20, 8, 1.0, 0)
    tree = hierarchical_kmeans(x_ND.numpy(), clusters=[60, 20, 5], seed=3)
    inputs = [1000, 60, 20]
    for level, n, k in zip(tree, inputs, [60, 20, 5], strict=True):
        assert level.centroids.shape == (k, 8) and level.centroids.dtype == np.float32
        assert level.assignment.shape == level.distance.shape == (n,)
        assert level.assignment.min() >= 0 and level.assignment.max() < k
    again = hierarchical_kmeans(x_ND, clusters=[60, 20, 5], seed=3)
    other = hierarchical_kmeans(x_ND, clusters=[60, 20, 5], seed=4)
    assert all((a.centroids == b.centroids).all() for a, b in zip(tree, again, strict=True))
    assert (tree[0].centroids != other[0].centroids).any()
    upper = {tuple(row) for row in tree[1].centroids.tolist()}
    assert {tuple(row) for row in tree[2].centroids.tolist()} <= upper  # keep=1: inputs themselves


def test_resampling_spreads_the_clusters():
    x_ND, labels = zipf_blobs(4000, 50, 16, 1.5, 0)
    plain = hierarchical_kmeans(x_ND, [80], keep=[[]])[0]
    even = hierarchical_kmeans(x_ND, [80], keep=[[12, 6]])[0]

    def blobs_of_centroids(level):
        return labels[torch.cdist(torch.from_numpy(level.centroids), x_ND).argmin(1).numpy()]

    assert entropy(blobs_of_centroids(even), 50) > entropy(blobs_of_centroids(plain), 50)


def test_a_round_keeps_the_rows_closest_to_each_mean():
    """Means 2 and 102: rows 1 and 101 are closest; of two each, 0 and 1, 100 and 101 are left."""
    x_N1 = torch.tensor([0.0, 1, 5, 100, 101, 105])[:, None]
    for keep, centroids in (([], [2, 102]), ([1], [1, 101]), ([2], [0.5, 100.5])):
        (level,) = hierarchical_kmeans(x_N1, [2], keep=[keep])
        assert sorted(level.centroids[:, 0].tolist()) == pytest.approx(centroids)
        squares = (x_N1.numpy() - level.centroids[level.assignment]) ** 2  # of all rows, at the end
        assert level.distance.tolist() == pytest.approx(squares[:, 0].tolist(), abs=1e-3)
        assert level.inertia == pytest.approx(squares.sum(), abs=1e-2)


def test_rounds_when_none_are_given():
    """Half the mean cluster size, half of that, down to 4; above the finest the closest alone."""
    assert sampling.default_keep(100, 5, is_finest=True) == [10, 5]
    assert sampling.default_keep(1000, 31, is_finest=True) == [16, 8, 4]
    assert sampling.default_keep(35, 5, is_finest=True) == []
    assert sampling.default_keep(100, 5, is_finest=False) == [1]


def test_fit_on_a_sample_then_assign_all():
    x_ND, _ = zipf_blobs(4000, 20, 8, 0.5, 0)
    tree = hierarchical_kmeans(x_ND, [20], keep=[[]], fit_rows=1000)
    assert len(tree[0].assignment) == 4000
    assert tree[0].inertia < 1.15 * hierarchical_kmeans(x_ND, [20], keep=[[]])[0].inertia


def test_splitting_makes_all_clusters():
    x_ND, _ = zipf_blobs(3000, 60, 8, 1.0, 0)
    split = hierarchical_kmeans(x_ND, [100], keep=[[]], splits=10)[0]
    whole = hierarchical_kmeans(x_ND, [100], keep=[[]])[0]
    assert len(np.unique(split.centroids, axis=0)) == 100
    assert split.inertia < 1.5 * whole.inertia


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_named(bad):
    x_ND = torch.randn(3000, 4)
    x_ND[2345, 1] = bad
    with pytest.raises(ValueError, match="row 2345 is not finite"):
        hierarchical_kmeans(x_ND, [10])


def test_more_clusters_than_inputs_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="20 clusters of 10 inputs"):
        hierarchical_kmeans(torch.randn(10, 4), [20])
    with pytest.raises(ValueError, match="6 clusters of 5 inputs"):
        hierarchical_kmeans(torch.randn(10, 4), [5, 6])
    with pytest.raises(ValueError, match="must be >= 1"):
        hierarchical_kmeans(torch.randn(10, 4), [5, 0])


@pytest.mark.parametrize("rows", [torch.ones(60, 4), torch.eye(4).repeat(15, 1)])
def test_duplicates_give_a_valid_sample(rows):
    tree = hierarchical_kmeans(rows, [20, 8, 3])
    for strategy in ("random", "closest"):
        ids = balanced_sample(tree, 30, strategy=strategy)
        assert len(ids) == len(np.unique(ids)) == 30


def test_as_many_clusters_as_rows():
    x_ND = torch.randn(40, 4, generator=seeded())
    tree = hierarchical_kmeans(x_ND, [40, 40])
    assert tree[0].inertia < 1e-4 and len(np.unique(tree[0].assignment)) == 40
    assert sorted(balanced_sample(tree, 7)) == sorted(set(balanced_sample(tree, 7)))


# ------------------------------------------------------------------------------- quotas


def brute_force_quota(sizes, target):
    """One at a time to the clusters that have least and are not full; levels only."""
    given = [0] * len(sizes)
    while sum(given) < target:
        open_ = [i for i, size in enumerate(sizes) if given[i] < size]
        if not open_:
            break
        given[min(open_, key=lambda i: given[i])] += 1
    return sorted(given)


def check_quota(sizes, target, given):
    assert sum(given) == min(target, sum(sizes))
    assert all(0 <= g <= size for g, size in zip(given, sizes, strict=True))
    unfilled = [g for g, size in zip(given, sizes, strict=True) if g < size]
    if unfilled:
        assert max(unfilled) - min(unfilled) <= 1  # x or x + 1 ..
        assert max(given) <= max(unfilled) + (max(unfilled) == min(unfilled))


def test_quota_against_brute_force():
    rng = np.random.default_rng(0)
    for case in range(300):
        sizes = rng.integers(0, 12, rng.integers(1, 9)).tolist()
        target = int(rng.integers(0, sum(sizes) + 5))
        given = quota(sizes, target, seeded(case))
        check_quota(sizes, target, given)
        assert sorted(given) == brute_force_quota(sizes, target)


def test_ten_thousand_quotas_at_once():
    """`water_fill` serves all parents of a level in one call: here 10,000 random ones."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 8, 10_000)
    parent_J = rng.permutation(np.repeat(np.arange(10_000), counts))
    capacity_J = rng.integers(0, 15, len(parent_J)) ** rng.integers(1, 3, len(parent_J))
    totals = np.bincount(parent_J, capacity_J, 10_000).astype(np.int64)
    target_P = (rng.random(10_000) * (totals + 1)).astype(np.int64)
    given_J = water_fill(capacity_J, parent_J, target_P, seeded())
    level_P = np.zeros(10_000, np.int64)  # brute force: raise every parent's level while it fits
    for x in range(1, 15**2 + 1):
        fits_P = np.bincount(parent_J, np.minimum(capacity_J, x), 10_000) <= target_P
        level_P = np.where(fits_P, x, level_P)
    floor_J = np.minimum(capacity_J, level_P[parent_J])
    assert (np.bincount(parent_J, given_J, 10_000) == np.minimum(target_P, totals)).all()
    assert set((given_J - floor_J).tolist()) <= {0, 1}
    assert (given_J <= capacity_J).all() and (given_J >= 0).all()


def test_the_rest_of_a_quota_is_random_and_seeded():
    draws = [tuple(quota([5] * 10, 3, seeded(seed))) for seed in range(200)]
    assert quota([5] * 10, 3, seeded(7)) == list(draws[7])
    shares = np.sum(draws, 0) / 200
    assert len(set(draws)) > 50 and np.abs(shares - 0.3).max() < 0.15


def test_quota_edges():
    assert quota([], 5, seeded()) == []
    assert quota([0, 0], 5, seeded()) == [0, 0]
    assert quota([3, 4], 0, seeded()) == [0, 0]
    assert quota([3, 4], 100, seeded()) == [3, 4]
    assert quota([10**12, 10**12], 10**12 + 1, seeded())[0] in (5 * 10**11, 5 * 10**11 + 1)
    with pytest.raises(ValueError, match="target=-1"):
        quota([3], -1, seeded())


def test_weighted_shares_follow_the_weights():
    given = water_fill(np.array([1000, 1000, 5]), np.zeros(3, int), np.array([305]), seeded(),
                 np.array([1.0, 2.0, 9.0]))  # fmt: skip
    assert given.sum() == 305 and given[2] == 5
    assert abs(given[1] - 200) <= 1


# ------------------------------------------------------------------------------- the sample


@pytest.fixture(scope="module")
def tree():
    return hierarchical_kmeans(zipf_blobs(1500, 20, 8, 1.0, 0)[0], [60, 20, 5])


def test_sample_is_distinct_seeded_and_in_order(tree):
    ids = balanced_sample(tree, 200, seed=1)
    assert ids.dtype == np.int64 and len(ids) == 200 and (np.diff(ids) > 0).all()
    assert (ids == balanced_sample(tree, 200, seed=1)).all()
    assert (ids != balanced_sample(tree, 200, seed=2)).any()


def test_every_level_gets_its_quota(tree):
    path = tree[0].assignment
    ids = balanced_sample(tree, 200)
    for level in tree[1:]:
        path = level.assignment[path]
    sizes, drawn = np.bincount(path), np.bincount(path[ids], minlength=5)
    check_quota(sizes.tolist(), 200, drawn.tolist())


def test_closest_takes_the_rows_nearest_to_the_centroid(tree):
    is_drawn = np.zeros(1500, bool)
    is_drawn[balanced_sample(tree, 200, strategy="closest")] = True
    for k in range(60):
        own = tree[0].assignment == k
        if (own & is_drawn).any() and (own & ~is_drawn).any():
            assert tree[0].distance[own & is_drawn].max() <= tree[0].distance[own & ~is_drawn].min()


def test_target_above_the_pool_and_multiplier(tree):
    assert (balanced_sample(tree, 10**6) == np.arange(1500)).all()
    assert len(balanced_sample(tree, 0)) == 0
    copies = np.bincount(balanced_sample(tree, 2500, multiplier=3), minlength=1500)
    assert copies.sum() == 2500 and copies.max() <= 3
    assert (balanced_sample(tree, 10**6, multiplier=2) == np.repeat(np.arange(1500), 2)).all()
    with pytest.raises(ValueError, match="target=-1"):
        balanced_sample(tree, -1)


def test_ineligible_rows_are_never_drawn(tree):
    eligible = np.random.default_rng(0).random(1500) < 0.3
    assert eligible[balanced_sample(tree, 200, eligible_N=eligible)].all()
    assert (balanced_sample(tree, 1500, eligible_N=eligible) == np.flatnonzero(eligible)).all()


def test_caps_hold_and_the_target_is_still_met(tree):
    source = np.array(["big", "small"])[(np.arange(1500) % 3 == 0).astype(int)]
    ids = capped_sample(tree, 300, source, {"big": 40}, np.ones(1500, bool))
    assert len(ids) == 300 and (source[ids] == "big").sum() == 40


def test_rank_in_cluster():
    cluster, key = np.array([2, 0, 2, 2, 0]), np.array([0.5, 3.0, 0.1, 0.9, 1.0])
    assert rank_in_cluster(cluster, key).tolist() == [1, 1, 0, 2, 0]


def test_near_duplicates_keep_the_first_of_each_cluster():
    x_ND = torch.randn(3000, 8, generator=seeded())
    x_ND[100:200] = x_ND[:100] * 3 + 1e-3  # cosine ~ 1, another length
    leaf = np.arange(3000) % 2
    leaf[:200] = 1
    found = near_duplicates(x_ND, leaf, 0.999)
    assert found[100:200].all() and not found[:100].any() and found[200:].sum() == 0
    assert not near_duplicates(x_ND, np.arange(3000) % 1500, 0.999).any()  # never across clusters


def test_a_near_duplicate_is_nearer_than_the_threshold_by_hand():
    """Cosines to the first: 1, 0.8, 0.6; the third and the fourth have 0.96 with each other."""
    x_ND = torch.tensor([[1.0, 0], [2, 0], [0.8, 0.6], [0.6, 0.8]])
    leaf = np.zeros(4, np.int64)
    for threshold, found in ((0.99, [1]), (0.9, [1, 3]), (0.7, [1, 2, 3]), (1.01, [])):
        assert np.flatnonzero(near_duplicates(x_ND, leaf, threshold)).tolist() == found


def toy_tree():
    """Leaves at 0, 0 and 9 of one parent, and one at 0 of another; a row each at distance 1."""
    ones = np.ones(4, np.float32)
    places, own = np.array([[0.0], [0], [9], [0]], np.float32), np.arange(4, dtype=np.int32)
    above = sampling.Level(np.zeros((2, 1), np.float32), np.array([0, 0, 0, 1], np.int32), ones)
    return sampling.Level(places, own, ones), above


def test_a_volume_is_shared_by_leaves_of_one_place_and_parent():
    np.testing.assert_allclose(sampling.leaf_volumes(toy_tree()), [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(sampling.leaf_volumes(toy_tree()[:1]), [1 / 3, 1 / 3, 1, 1 / 3])


def test_balance_on_long_tailed_blobs():
    x_ND, labels = zipf_blobs(4000, 50, 32, 1.0, 0)
    tree = hierarchical_kmeans(x_ND, [150, 80, 50])
    ids = balanced_sample(tree, 400)
    flat = balanced_sample(tree[:1], 400)
    assert entropy(labels[ids], 50) > 0.97
    assert entropy(labels[ids], 50) > entropy(labels[flat], 50) > entropy(labels, 50)
    by_volume = balanced_sample(tree, 400, weighting="volume")
    assert entropy(labels[by_volume], 50) > entropy(labels[flat], 50)


@pytest.mark.slow
def test_acceptance_balance():
    """20,000 points of 200 blobs, 10 % sample; random reaches 0.776 and 0.495.

    The second figures depend on the seeds by some .03, so they are means over five of them.
    """
    found = []
    for seed in range(5):
        x_ND, labels = zipf_blobs(20_000, 200, 32, 1.0, seed)
        tree = hierarchical_kmeans(x_ND, [500, 300, 200], seed)
        assert entropy(labels[balanced_sample(tree, 2000, seed)], 200) >= 0.995
        x_ND, labels = zipf_blobs(20_000, 200, 32, 1.5, seed)
        tree = hierarchical_kmeans(x_ND, [500, 100, 20], seed)
        samples = (balanced_sample(tree, 2000, seed, weighting=w) for w in ("equal", "volume"))
        found.append([entropy(labels[sample], 200) for sample in samples])
    equal, volume = torch.tensor(found).mean(0).tolist()
    assert equal >= 0.855 and volume >= 0.94


# ------------------------------------------------------------------------------- processes


def two_processes(rank, port, x_ND, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    group = Group(rank, 2, torch.device("cpu"))
    tree = hierarchical_kmeans(x_ND, [60, 20], group=group, fit_rows=1500)
    split = hierarchical_kmeans(x_ND, [60], keep=[[]], splits=6, group=group)
    if rank == 0:
        queue.put([(level.centroids, level.assignment) for level in (*tree, *split)])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one():
    x_ND, _ = zipf_blobs(2001, 30, 8, 1.0, 0)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [context.Process(target=two_processes, args=(r, port, x_ND, queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    both = queue.get()
    for worker in workers:
        worker.join()
    one = hierarchical_kmeans(x_ND, [60, 20], fit_rows=1500)
    one += hierarchical_kmeans(x_ND, [60], keep=[[]], splits=6)
    for level, (centroids, assignment) in zip(one, both, strict=True):
        np.testing.assert_allclose(centroids, level.centroids, atol=1e-4)
        assert (assignment == level.assignment).mean() > 0.999


# ------------------------------------------------------------------------------- the commands


@pytest.fixture
def pictures(tmp_path):
    """30 small pictures in 3 folders, one of them not a picture."""
    rng = np.random.default_rng(0)
    for i in range(30):
        colour = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220)][i % 3])
        pixels = (colour + rng.integers(-25, 25, (48, 64, 3))).astype(np.uint8)
        path = tmp_path / "pictures" / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    data = (tmp_path / "pictures/class1/01.png").read_bytes()
    (tmp_path / "pictures/class1/01.png").write_bytes(data[: len(data) // 2])  # a good header
    return tmp_path / "pictures"


def embed(source, out):
    """The command line of a quick embedding in parts of 8."""
    return ("embed", source, "--teacher", "t=builtin:tiny-semantic", "--out", out, "--part-rows", 8)


@pytest.fixture
def pool(pictures, tmp_path, capsys):
    run(*embed(pictures, tmp_path / "pool"))
    assert "01.png" in capsys.readouterr().out  # skipped, and named
    return tmp_path / "pool"


def records(pool):
    return [pool.record(i) for i in range(len(pool))]


def run(*args):
    sampling.main([str(arg) for arg in args])


def test_from_a_folder_to_an_index(pool, pictures, tmp_path, capsys):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    out = tmp_path / "sample.jsonl"
    run("sample", pool, tmp_path / "tree", "--target", 12, "--out", out, "--dedup", 0.99999)
    said = capsys.readouterr()
    report = json.loads(said.out.splitlines()[-1])
    assert "pass" not in said.err  # without a terminal, not a line for each of them
    assert report["pool"] == 29 and report["drawn"] == 12
    assert [level["clusters"] for level in report["levels"]] == [9, 3]
    source = open_source(str(out))
    assert len(source) == 12 and not source.skipped
    originals = {s.digest for s in map(open_source(str(pictures)).load, [0, 5, 20])}
    assert source.load(0).image.shape == (48, 64, 3) and len(originals) == 3
    assert {source.label(i) for i in range(12)} == {"class0", "class1", "class2"}


def test_a_report_counts_clusters_by_hand(pool, tmp_path, capsys):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    out = tmp_path / "sample.jsonl"
    run("sample", pool, tmp_path / "tree", "--target", 5, "--out", out)  # of 9 clusters
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(out.with_suffix(".report.json").read_text())
    (fine, coarse), _ = sampling.load_tree(tmp_path / "tree")
    keys = [r["key"] for r in records(sampling.Pool(pool))]
    source = open_source(str(out))
    drawn = [keys.index(source.key(i)) for i in range(5)]
    for level, path in zip(report["levels"], (fine.assignment, coarse.assignment[fine.assignment]),
                           strict=True):  # fmt: skip
        before = np.bincount(path, minlength=level["clusters"])
        after = np.bincount(path[drawn], minlength=level["clusters"])
        assert level["empty"] == (before == 0).sum() and level["largest"] == before.max()
    rows = [(row["cluster"], row["pool"], row["sample"]) for row in report["largest"]]
    assert sorted(rows) == list(zip(range(3), before.tolist(), after.tolist(), strict=True))
    assert [row[1] for row in rows] == sorted(before.tolist(), reverse=True)


def test_a_pool_holds_what_the_teacher_says_row_by_row(pool, pictures):
    source, table = open_source(str(pictures)), sampling.Pool(pool)
    keys = [record["key"] for record in records(table)]
    teacher = sampling.load_teacher(sampling.parse_teacher("t=builtin:tiny-semantic"))
    samples = {s.key: s for i in range(30) if (s := loaded(source, i))}
    assert keys == list(samples)
    expected = teacher.targets(list(samples.values())).summary_BC.half()
    torch.testing.assert_close(table[:], expected, atol=2e-3, rtol=2e-3)
    ids = torch.tensor([20, 3, 7, 8, 28, 3])  # of several files, in any order
    assert torch.equal(table[ids], table[:][ids]) and torch.equal(table[5:20], table[:][5:20])
    digests = [table.record(i)["digest"] for i in (3, 20)]
    assert digests == [samples[keys[3]].digest, samples[keys[20]].digest]


def loaded(source, i):
    try:
        return source.load(i)
    except BadImage:
        return None


def recoloured(pictures):
    path = pictures / "class0" / "03.png"
    Image.new("RGB", Image.open(path).size, "yellow").save(path)


CHANGES = {  # what is done to the pictures, and the command's words that are exchanged
    "nothing": (lambda _: None, {}),
    "teacher": (lambda _: None, {"t=builtin:tiny-semantic": "t=builtin:tiny-dense"}),
    "part": (lambda _: None, {8: 11}),
    "picture": (recoloured, {}),
    "fewer": (lambda pictures: (pictures / "class0" / "03.png").unlink(), {}),
    "name": (lambda pictures: (pictures / "class0").rename(pictures / "class9"), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pool_embedded_anew_equals_a_fresh_one(pool, pictures, tmp_path, change):
    """Parts of the first run count only where teacher, pictures and rows are the same."""
    before = json.loads((pool / "pool.json").read_text())
    alter, words = CHANGES[change]
    alter(pictures)
    for out in (pool, tmp_path / "fresh"):
        run(*(words.get(word, word) for word in embed(pictures, out)))
    one, two = sampling.Pool(pool), sampling.Pool(tmp_path / "fresh")
    for manifest in (one.manifest, two.manifest, before):
        del manifest["skipped"]  # a source may say there that it shrank since its last scan
    assert one.manifest == two.manifest and (one.manifest != before) == (change != "nothing")
    assert torch.equal(one[:], two[:])
    assert records(one) == records(two)


SETTINGS = (  # a tree of --clusters 6 3 is not of any of these
    ("--clusters", 6, 2), ("--clusters", 6), ("--seed", 1), ("--fit-rows", 20), ("--splits", 2),
    ("--iterations", 3), ("--tolerance", 0.1), ("--scores", "bfloat16"),
    ("--keep", "none", "default"), ("--keep", "default", "2x3"),
)  # fmt: skip


def test_each_setting_and_pool_has_its_own_tree(pool, pictures, tmp_path):
    command = ("cluster", pool, "--out", tmp_path / "tree", "--clusters", 6, 3)
    run(*command)
    before = (tmp_path / "tree" / "tree.json").read_bytes()
    run(*command)  # the same again is no other
    for setting in SETTINGS:
        with pytest.raises(SystemExit, match="other settings"):
            run(*command, *setting)
    run(*(str(word).replace("semantic", "dense") for word in embed(pictures, pool)))
    with pytest.raises(SystemExit, match="other settings"):
        run(*command)
    with pytest.raises(SystemExit, match="a tree of another pool"):
        run("sample", pool, tmp_path / "tree", "--target", 4, "--out", tmp_path / "s.jsonl")
    assert (tmp_path / "tree" / "tree.json").read_bytes() == before


def test_a_picture_is_excluded_by_its_key_or_by_its_digest(pool, tmp_path):
    run("cluster", pool, "--clusters", 4, "--out", tmp_path / "tree")
    rows = records(sampling.Pool(pool))
    (tmp_path / "banned.txt").write_text(f"{rows[3]['digest']}\n{rows[5]['key']}\nnobody")
    out = tmp_path / "sample.jsonl"
    run("sample", pool, tmp_path / "tree", "--target", 99, "--out", out,
        "--exclude", tmp_path / "banned.txt")  # fmt: skip
    source = open_source(str(out))
    drawn = {source.key(i) for i in range(len(source))}
    assert {r["key"] for r in rows} - drawn == {rows[3]["key"], rows[5]["key"]}
    assert json.loads(out.with_suffix(".report.json").read_text())["excluded"] == 2


def test_near_duplicates_are_left_out_and_counted(pictures, tmp_path):
    for name in ("00", "09"):
        copy = pictures / "class2" / f"copy of {name}.png"
        copy.write_bytes((pictures / "class0" / f"{name}.png").read_bytes())
    run(*embed(pictures, tmp_path / "pool"))
    run("cluster", tmp_path / "pool", "--clusters", 1, "--out", tmp_path / "tree")
    out = tmp_path / "sample.jsonl"
    run("sample", tmp_path / "pool", tmp_path / "tree", "--target", 31, "--dedup", 0.999999,
        "--out", out)  # fmt: skip
    source = open_source(str(out))
    keys = {source.key(i) for i in range(len(source))}
    assert len(keys) == 29 and not any("copy" in key for key in keys)
    assert json.loads(out.with_suffix(".report.json").read_text())["duplicates"] == 2


def test_keys_of_several_sources_say_which(pictures, tmp_path):
    sources = [pictures / "class0", pictures / "class2"]
    run("embed", *sources, *embed("", tmp_path / "pool")[2:])
    run("cluster", tmp_path / "pool", "--clusters", 4, "--out", tmp_path / "tree")
    for seed in (0, 0, 1):
        run("sample", tmp_path / "pool", tmp_path / "tree", "--target", 10, "--seed", seed,
            "--cap", "class0=3", "--out", tmp_path / f"{seed}.jsonl")  # fmt: skip
    ours = open_source(str(tmp_path / "0.jsonl"))
    keys = [ours.key(i) for i in range(len(ours))]
    assert all(key.split("/")[0] == ours.record(i)["source"] for i, key in enumerate(keys))
    assert sum(key.startswith("class0/") for key in keys) == 3 and len(keys) == 10
    other = open_source(str(tmp_path / "1.jsonl"))
    assert {other.key(i) for i in range(10)} != set(keys)


def test_copies_exclusions_caps_and_a_large_target(pool, tmp_path, capsys):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    table = sampling.Pool(pool)
    banned = [table.record(i)["key"] for i in (0, 9, 28)]
    (tmp_path / "banned.txt").write_text("\n".join(banned))
    out = tmp_path / "sample.jsonl"
    run("sample", pool, tmp_path / "tree", "--target", 999, "--multiplier", 2, "--out", out,
        "--exclude", tmp_path / "banned.txt", "--cap", "pictures=20")  # fmt: skip
    assert "warning: --target 999" in capsys.readouterr().out
    source = open_source(str(out))
    keys = [source.key(i) for i in range(len(source))]
    assert len(keys) == len(set(keys)) and not set(keys) & set(banned)
    assert any(key.endswith("#2") for key in keys)


def test_embed_resumes_and_notices_damage(pool, pictures, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in pool.glob("part-*.npy")}
    part = pool / "part-00002.npy"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(SystemExit, match=r"part-00002\.npy: missing, cut or changed"):
        run("cluster", pool, "--clusters", 4, "--out", pool.parent / "tree")
    run(*embed(pictures, pool))
    after = {p.name: p.stat().st_mtime_ns for p in pool.glob("part-*.npy")}
    assert {name for name in before if before[name] != after[name]} == {"part-00002.npy"}
    monkeypatch.setattr(sampling, "embed_part", lambda *_: pytest.fail("nothing is left to do"))
    run(*embed(pictures, pool))


def test_embed_and_assign_wait_for_the_other_ranks_without_their_limit(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(
        sampling.packing, "setup_distributed", lambda **_: Group(0, 2, torch.device("cpu"))
    )
    monkeypatch.setattr(sampling.dist, "barrier", lambda: pytest.fail("within the limit"))
    monkeypatch.setattr(sampling.dist, "all_gather_object", lambda *_: None)
    monkeypatch.setattr(sampling.packing, "wait_for_all", lambda: waits.append(1))
    run(*embed("openmoji:test:4", tmp_path / "pool"))
    tree = hierarchical_kmeans(sampling.Pool(tmp_path / "pool")[:].float(), [2])
    teacher = sampling.Pool(tmp_path / "pool").manifest["teacher"]
    sampling.save_tree(tmp_path / "tree", tree, {"teacher": teacher})
    run("assign", tmp_path / "pool", tmp_path / "tree", "--out", tmp_path / "again")
    assert len(waits) == 2


def test_cluster_resumes_after_a_level_and_refuses_other_settings(pool, tmp_path, monkeypatch):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "whole")
    levels, real = [], sampling.cluster_level

    def interrupted(rows, k, *args, **kwargs):
        levels.append(k)
        if k == 3 and levels.count(3) == 1:
            raise OSError("interrupted")
        return real(rows, k, *args, **kwargs)

    monkeypatch.setattr(sampling, "cluster_level", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    assert levels == [9, 3, 3]
    for name in ("level1_centroids.npy", "level2_centroids.npy", "tree.json"):
        assert (tmp_path / "tree" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(SystemExit, match="other settings"):
        run("cluster", pool, "--clusters", 8, 3, "--out", tmp_path / "tree")


def test_a_changed_tree_is_refused(pool, tmp_path):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    path = tmp_path / "tree/level1_assignment.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit, match=r"level1_assignment\.npy: missing, cut or changed"):
        run("sample", pool, tmp_path / "tree", "--target", 5, "--out", tmp_path / "s.jsonl")


def test_assign_new_pictures_to_a_tree(pool, pictures, tmp_path):
    run("cluster", pool, "--clusters", 9, 3, "--out", tmp_path / "tree")
    with pytest.raises(SystemExit, match=r"no pool\.json"):
        run("assign", tmp_path, tmp_path / "tree", "--out", tmp_path / "no")
    new = tmp_path / "new"
    run(*embed(pictures / "class0", new))
    with pytest.raises(SystemExit, match="another pool"):
        run("sample", new, tmp_path / "tree", "--target", 4, "--out", tmp_path / "s.jsonl")
    run("assign", new, tmp_path / "tree", "--out", tmp_path / "tree2")
    run("sample", new, tmp_path / "tree2", "--target", 4, "--out", tmp_path / "s.jsonl")
    assert len(open_source(str(tmp_path / "s.jsonl"))) == 4
    old, _ = sampling.load_tree(tmp_path / "tree")
    again, _ = sampling.load_tree(tmp_path / "tree2")
    rows = sampling.Pool(pool)
    names = [r["key"].split("/")[-1] for r in records(rows)]
    news = [r["key"] for r in records(sampling.Pool(new))]
    for name, leaf in zip(news, again[0].assignment, strict=True):
        assert leaf == old[0].assignment[names.index(name)]


def test_assign_knows_the_tree_and_the_teacher(pool, pictures, tmp_path):
    trees = [tmp_path / name for name in ("one", "two")]
    for seed, tree in enumerate(trees):
        run("cluster", pool, "--clusters", 5, "--out", tree, "--seed", seed)
        run("assign", pool, tree, "--out", tmp_path / "assigned")  # one folder for both
    (found,), _ = sampling.load_tree(tmp_path / "assigned")
    (wanted,), _ = sampling.load_tree(trees[1])
    assert (found.assignment == wanted.assignment).all()
    other = [str(x).replace("tiny-semantic", "tiny-dense") for x in embed(pictures, tmp_path / "p")]
    run(*other)
    with pytest.raises(SystemExit, match="embedded by another teacher"):
        run("assign", tmp_path / "p", trees[0], "--out", tmp_path / "assigned")


@pytest.mark.usefixtures("pictures")
def test_an_index_elsewhere_finds_pictures_of_a_relative_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*embed("pictures", "pool"))
    run("cluster", "pool", "--clusters", 3, "--out", "tree")
    (tmp_path / "lists").mkdir()
    run("sample", "pool", "tree", "--target", 6, "--out", "lists/sample.jsonl")
    source = open_source("lists/sample.jsonl")
    assert len([source.load(i) for i in range(len(source))]) == 6
    with pytest.raises(SystemExit, match=r"--cap \['typo'\]: the pool has \['pictures'\]"):
        run("sample", "pool", "tree", "--target", 6, "--cap", "typo=1", "--out", "s.jsonl")
    with pytest.raises(SystemExit, match="sources of one name"):
        run("embed", "pictures", *embed("pictures", "both")[1:])


def test_nan_rows_of_a_pool_are_named(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    table = np.ones((4, 3), np.float16)
    table[2, 1] = np.nan
    sha256 = sampling.write_array(folder / "part-00000.npy", table)
    lines = [{"source": "s", "key": f"picture{i}", "height": 1, "width": 1} for i in range(4)]
    write_index(folder / "part-00000.jsonl", lines)
    part = {"name": "part-00000", "sha256": sha256}
    pool = {"dim": 3, "parts": [part], "fingerprints": {}, "teacher": "t"}
    sampling.write_json(folder / "pool.json", pool)
    with pytest.raises(SystemExit, match="picture2 is not finite"):
        run("cluster", folder, "--clusters", 2, "--out", tmp_path / "tree")


def test_nothing_is_pickled(pool, tmp_path):
    run("cluster", pool, "--clusters", 4, "--out", tmp_path / "tree")
    for path in [*pool.glob("*.npy"), *(tmp_path / "tree").glob("*.npy")]:
        np.load(path, allow_pickle=False)


@pytest.mark.parametrize(
    ("command", "flag", "wrong"),
    [
        ("sample", "--dedup", ["95", "0", "-1", "nan", "2"]),
        ("sample", "--target", ["0", "-7", "1.5"]),
        ("sample", "--multiplier", ["0"]),
        ("sample", "--cap", ["pool=-1", "pool=x"]),
        ("sample", "--seed", ["-1"]),
        ("cluster", "--clusters", ["0"]),
        ("cluster", "--keep", ["0", "3x0", "x"]),
        ("cluster", "--tolerance", ["-1", "nan", "2"]),
        ("cluster", "--iterations", ["0"]),
        ("embed", "--part-rows", ["0"]),
        ("embed", "--batch", ["-7"]),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_flag(command, flag, wrong, capsys):
    for text in wrong:
        with pytest.raises(SystemExit) as stopped:
            run(command, "somewhere", flag, text)
        assert stopped.value.code == 2
        assert flag in (line := capsys.readouterr().err) and line.count("\n") == 1


def test_keep_is_read():
    texts = ("default", "none", "20,10,5", "3x4", "7")
    assert [sampling.parse_keep(t) for t in texts] == [None, [], [20, 10, 5], [3, 3, 3, 3], [7]]


@pytest.mark.slow
def test_two_processes_embed_cluster_and_assign(pictures, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    commands = [
        embed(pictures, "pool"),
        ("cluster", "pool", "--clusters", 9, 3, "--out", "tree"),
        ("assign", "pool", "tree", "--out", "again"),
    ]
    for command in commands:
        line = [*launch, str(ROOT / "sampling.py"), *map(str, command)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(line, cwd=tmp_path, check=True, timeout=200, env=env)
    tree, again = (sampling.load_tree(tmp_path / name)[0] for name in ("tree", "again"))
    assert (tree[0].assignment == again[0].assignment).all()
    out = tmp_path / "s.jsonl"
    run("sample", tmp_path / "pool", tmp_path / "again", "--target", 9, "--out", out)
    assert len(open_source(str(out))) == 9


# ----------------------------------------------------- pools of pictures as people have them


def keys_in(index: Path) -> list[str]:
    source = open_source(str(index))
    return [source.key(i) for i in range(len(source))]


def test_pictures_may_move(pool, pictures, tmp_path, monkeypatch):
    run("cluster", pool, "--clusters", 6, 2, "--out", tmp_path / "tree")
    lines = [json.loads(x) for x in (pool / "part-00000.jsonl").read_text().splitlines()[1:]]
    assert all(not os.path.isabs(line["path"]) for line in lines)
    (tmp_path / "disk").mkdir()
    pictures.rename(tmp_path / "disk" / "photos")
    with monkeypatch.context() as patched:
        patched.setattr(sampling, "embed_part", lambda *_: pytest.fail("embedded again"))
        run(*embed(tmp_path / "disk" / "photos", pool))
    out = tmp_path / "sample.jsonl"
    run("sample", pool, tmp_path / "tree", "--target", 10, "--out", out, "--cap", "photos=10")
    source = open_source(str(out))
    assert {source.load(i).image.shape for i in range(10)} == {(48, 64, 3)}


def test_what_is_excluded_is_excluded_by_content(pool, tmp_path, capsys):
    run("cluster", pool, "--clusters", 3, "--out", tmp_path / "tree")
    rows = records(sampling.Pool(pool))
    keys, digests = [r["key"] for r in rows], [r["digest"] for r in rows]
    lines = ["\ufeff" + keys[0], keys[1] + " ", digests[2].upper(), "sha256:" + digests[3]]
    lines += ["pictures/" + keys[4], keys[5] + "#2", "", "nowhere.png"]
    (tmp_path / "lines.txt").write_text("\r\n".join(lines), encoding="utf-8")
    write_index(tmp_path / "index.jsonl", rows[:6])
    for name, missed in (("lines.txt", True), ("index.jsonl", False)):
        capsys.readouterr()
        out = tmp_path / f"{name}.out.jsonl"
        run("sample", pool, tmp_path / "tree", "--target", 99, "--out", out,
            "--exclude", tmp_path / name)  # fmt: skip
        assert keys_in(out) == keys[6:]
        text = capsys.readouterr().out
        assert ("1 of 7 match nothing: ['nowhere.png']" in text) == missed
        assert '"excluded": 6' in text
    (tmp_path / "cut.jsonl").write_bytes((tmp_path / "index.jsonl").read_bytes()[:-40])
    with pytest.raises(SystemExit, match=r"cut\.jsonl: cut or changed"):
        run("sample", pool, tmp_path / "tree", "--target", 9, "--out", out,
            "--exclude", tmp_path / "cut.jsonl")  # fmt: skip


def test_copies_and_what_is_near_the_excluded(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "data"
    root.mkdir()
    for name in ("b0", "b1", "b2"):
        pixels = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
        near = pixels.copy()
        near[0, 0] ^= 1
        Image.fromarray(near).save(root / f"{name}-near.png")
    (root / "a0.png").write_bytes((root / "b0.png").read_bytes())
    run(*embed(root, tmp_path / "pool"))
    run("cluster", tmp_path / "pool", "--clusters", 3, "--out", tmp_path / "tree")
    common = ("sample", tmp_path / "pool", tmp_path / "tree", "--target", 99, "--out")
    run(*common, tmp_path / "exact.jsonl", "--dedup", 1)
    exact = keys_in(tmp_path / "exact.jsonl")
    assert sorted(exact) == sorted({p.name for p in root.iterdir()} - {"b0.png"})
    (tmp_path / "banned.txt").write_text("b0.png\nb1.png\n")
    run(*common, tmp_path / "far.jsonl", "--dedup", 0.999, "--exclude", tmp_path / "banned.txt")
    assert keys_in(tmp_path / "far.jsonl") == ["b2-near.png"]  # one of two that are alike


def test_sources_of_one_name_and_a_missing_picture(pictures, tmp_path, capsys):
    for name in ("laion", "dfn"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "00000.tar", "w") as tar:
            for i in range(0, 9, 3):
                tar.add(pictures / "class0" / f"{i:02d}.png", f"{i:02d}.png")
    specs = [tmp_path / name / "*.tar" for name in ("laion", "dfn")]
    run("embed", *specs, *embed(pictures / "class2", tmp_path / "pool")[1:])
    run("cluster", tmp_path / "pool", "--clusters", 2, "--out", tmp_path / "tree")
    sources = {r["source"] for r in records(sampling.Pool(tmp_path / "pool"))}
    assert sources == {"laion/00000", "dfn/00000", "class2"}
    (pictures / "class2" / "02.png").unlink()
    capsys.readouterr()
    out = tmp_path / "s.jsonl"
    run("sample", tmp_path / "pool", tmp_path / "tree", "--target", 99, "--out", out)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["drawn"] == 16


def test_an_embedding_that_is_not_finite_is_skipped_by_name(
    pictures, tmp_path, capsys, monkeypatch
):
    real = sampling.load_teacher

    def poisoned(*args):
        teacher = real(*args)
        targets = teacher.targets

        def one_nan(samples):
            found = targets(samples)
            for row, sample in zip(found.summary_BC, samples, strict=True):
                row[0] = float("nan") if sample.key == "class2/05.png" else row[0]
            return found

        teacher.targets = one_nan
        return teacher

    monkeypatch.setattr(sampling, "load_teacher", poisoned)
    run(*embed(pictures, tmp_path / "pool"))
    assert "skipped class2/05.png: its embedding is not finite" in capsys.readouterr().out
    table = sampling.Pool(tmp_path / "pool")
    assert len(table) == 28 and table[:].isfinite().all()
    assert "class2/05.png" not in {r["key"] for r in records(table)}
