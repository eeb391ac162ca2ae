"""Do the papers' claims hold? Paired experiments over seeds, each with its design on one page.

    python tests/claims.py run              # all that is missing, a line of docs/claims each
    python tests/claims.py run arkd --seeds 100 101    # one claim, on seeds of your own
    python tests/claims.py table            # docs/claims.md, and the README's rows; recomputes all

A claim has arms that share everything but what is named, and effects: the difference of a figure
between two arms of the same seed. All was named in git before any run: arms, the primary effect,
seeds, the smallest effect that matters. An arm's learning rate is its own best of three, by the
figure `judged`, on seed 99, which is in no effect. Intervals are Student's t over the paired
differences; primary effects are corrected by Holm. Where a premise fails, there was no test.

EV is the variance explained of a teacher's features (eval.Fidelity) on held-out drawings: the
training mean has 0, the teacher 1. "EV 64 vit-s patches": at 64 px, of that head and part. A figure
is the mean over ten blocks of the test pictures, which tell its sampling error; numbers of one
entry have no blocks. Reference arms (base, random, constant, teacher, ..) are floors, ceilings.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from eval import (
    VOID,
    FeatureSet,
    Fidelity,
    caption_pairs,
    class_ids,
    fit_text_map,
    knn_votes,
    random_control,
    recall_hits,
    reduce_map,
    same_grid,
    token_labels,
)
from losses import resize_map
from model import Student, load_student, save_student
from packing import Sample, Source, Subset, cache_home, evenly, large_enough, open_source, to_float
from sampling import balanced_sample, hierarchical_kmeans
from teachers import (
    CachedTeacher,
    SizeRule,
    Teacher,
    TeacherOutput,
    fill_caches,
    load_teacher,
    load_text,
    parse_teacher,
)
from train import Stage, Stream, TrainConfig

FOLDER = Path(__file__).parents[1] / "docs" / "claims"
TUNING = 99  # the seed on which learning rates are chosen
Figures = dict[str, Any]  # name -> ten numbers, of blocks of the test pictures, or one


# ---- Part I, the papers: what a claim is


@dataclass(frozen=True)
class Effect:
    """A figure in one arm minus the same in another."""

    figure: str
    arm: str
    other: str
    matters: float  # the smallest difference that would matter, in either direction
    paper: str = "no figure"
    is_primary: bool = False


@dataclass(frozen=True)
class Premise:
    """What must hold for the effects to be a test: a figure's mean is above `least`."""

    figure: str
    arm: str
    other: str  # subtracted; "" nothing
    least: float


@dataclass(frozen=True)
class Scale:
    """How much of everything; `QUICK` is the same code on next to nothing, for tests."""

    train: int = 4000  # drawings that are trained on
    test: int = 1200  # of characters that are never trained on
    seen: int = 400  # of these, for EV
    base_steps: int = 1200
    most_steps: int = 10_000
    reader_steps: int = 300
    merging: tuple[int, int] = (600, 300)  # drawings that a reader learns from, and is tested on
    mosaic: tuple[int, int] = (72, 54)
    largest: int = 160  # drawings of the most frequent of `concepts`
    concepts: int = 300
    teachers: tuple[str, ...] = ("vit-s=builtin:vit-s", "mobilenet=builtin:mobilenet")
    text: str = "builtin:minilm"  # "": letters are counted


FULL = Scale()
QUICK = Scale(
    240, 40, 12, 2, 2, 2, (120, 30), (6, 4), 30, 24,
    ("vit-s=builtin:tiny-dense", "mobilenet=builtin:tiny-semantic"), "",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of one arm."""

    arm: str
    change: dict[str, Any]  # of `TRAINING`, by the claim and by the arm
    seed: int
    rate: float
    scale: Scale


@dataclass(frozen=True)
class Claim:
    """A question, and what answers it."""

    question: str
    arms: dict[str, dict[str, Any]]
    effects: tuple[Effect, ...]
    run: Callable[[Run], Figures]
    floor: str = ""  # the arm whose figure says nothing; "" where 0 says nothing
    premise: Premise | None = None
    rates: tuple[float, ...] = ()  # from which each arm has its own; () there is none to choose
    judged: str = "EV"
    seeds: int = 10
    common: dict[str, Any] = field(default_factory=dict)  # what the claim changes for all arms


BASE: dict[str, Any] = {"steps": 0}  # reference arms: the common base, not trained on
RANDOM: dict[str, Any] = {"steps": -1}  # random weights, see eval.random_control
NEAR = (3.5e-4, 7e-4, 1.4e-3)  # learning rates, from the base on
TEACHERS = ("vit-s", "mobilenet")


def squares(side: int, images: int, **more: Any) -> Stream:
    """A pack of so many square drawings; nano has 5 tokens beside the patches."""
    tokens = images * ((side // 16) ** 2 + 5)
    return Stream(f"{side} px", choices=(side,), budget=tokens, packs=1, **more)


# ---- AMoE: ARKD


def run_arkd(run: Run) -> Figures:
    """Does ARKD keep the relations that a text tower reads?

    nano from the common base, 150 steps of 32 drawings at 64 px, with each relational loss. A ridge
    from the ViT's summaries to MiniLM's captions is fitted on the *teacher's* training summaries,
    so that a head serves it only as far as it lies where the teacher's would (AMoE reads its DINOv3
    head with a text tower that was aligned to DINOv3). R@10 among 1,200 drawings, both ways.
    """
    if run.arm == "teacher":
        return read_by_text(teacher_summaries(run.scale)[1], run.scale)
    student = student_of(run)
    said = student_maps(student, data(run.scale)[1].samples, 64)
    head_NC = torch.stack([x["vit-s summary"].flatten() for x in said])
    return explained(student, (64,), run.scale) | read_by_text(head_NC, run.scale)


ARKD = Claim(
    "ARKD against no relational loss and against RKD",
    {
        "none": {},
        "rkd": {"relation": "rkd"},
        "arkd": {"relation": "arkd"},
        "arkd teacher's mean": {"relation": "arkd", "relation_mean": "teacher"},
        "base": BASE,
        "random": RANDOM,
        "teacher": BASE,
    },
    (
        Effect("text R@10", "arkd", "none", 0.01, "image-text +2.6 points (AMoE Table 4)", True),
        Effect("EV", "arkd", "none", 0.003, "no figure", True),
        Effect("text R@10", "arkd", "rkd", 0.01, "image-text +0.7 points (AMoE Table 4)"),
        Effect("relation", "arkd", "none", 0.01),
        Effect("relation", "arkd", "rkd", 0.01),
        Effect("zero-shot", "arkd", "none", 0.01, "image-text +2.6 points (AMoE Table 4)"),
        Effect("EV", "arkd teacher's mean", "none", 0.003),
        Effect("text R@10", "arkd teacher's mean", "none", 0.01),
    ),
    run_arkd,
    floor="random",
    rates=NEAR,
    common={"steps": 150, "stages": (Stage(1.0, (squares(64, 32),)),)},
)


# ---- AMoE: token-balanced batching


def run_balance(run: Run) -> Figures:
    """Do per-image means in full packs keep low resolution alive?

    Every drawing is a square of 48 or 128 px by lot. image: packs of 512 tokens, two a step, an
    image counts the same whatever its size. token: the same packs, a patch counts the same (what
    a mean over a batch's tokens does). fixed: 24 drawings a step, 996 tokens on average, per-image
    means. Drawings of at least 128 px only; nano from the common base, 80 steps.
    """
    return explained(student_of(run, 128), (48, 128), run.scale)


_MIXED = Stream("mixed", choices=(48, 128), budget=512, packs=2)
BALANCE = Claim(
    "full packs with per-image means against per-token means and against fixed counts",
    {
        "image": {},
        "token": {"average": "token"},
        "fixed": {"stages": (Stage(1.0, (replace(_MIXED, budget=9999),)),), "max_images": 12},
        "base": BASE,
    },
    (
        Effect("EV 48", "image", "token", 0.005, "low resolution kept (AMoE: batching)", True),
        Effect("EV 128", "image", "token", 0.005, "no figure"),
        Effect("EV 48", "image", "fixed", 0.005, "low resolution kept (AMoE: batching)"),
        Effect("EV 128", "image", "fixed", 0.005, "no figure"),
        Effect("gradient spread", "fixed", "image", 0.05, "high-norm gradients (AMoE: batching)"),
    ),
    run_balance,
    rates=NEAR,
    common={"steps": 80, "stages": (Stage(1.0, (_MIXED,)),)},
)


# ---- AMoE: clustering and balanced sampling


def run_sampling(run: Run) -> Figures:
    """Does hierarchical sampling serve the tail?

    A pool of 300 characters whose number of drawings falls as 1 / rank, from 160 to 1, each drawing
    another view of it (size, angle, ground); ViT-S summaries; trees of n/6, n/20 and 16 clusters; a
    fifth is sampled, three times a pool. Test: other views of the same characters, 1-NN among the
    300; tail: the ranks from 31 on. The oracle, which knows the characters, takes them evenly; the
    pool is all of it.
    """
    x_NC, label_N, test_MC, test_M, tree = pool_of(run.seed, run.scale)
    n, tail, rows = len(label_N), run.scale.concepts // 10, []
    for draw in range(1 if run.arm == "pool" else 3):
        picks = picked(run.arm, tree, label_N, n // 5, 1000 * run.seed + draw)
        cosine_MK = F.normalize(test_MC) @ F.normalize(x_NC[picks]).T
        is_hit_M = torch.from_numpy(label_N[picks])[cosine_MK.argmax(1)] == test_M
        hits = {"tail 1-NN": blocks(is_hit_M[test_M >= tail]), "1-NN": blocks(is_hit_M)}
        share, characters = (label_N[picks] >= tail).mean(), len(set(label_N[picks].tolist()))
        rows.append(hits | {"tail share": float(share), "characters": characters})
    return {name: np.mean([row[name] for row in rows], 0).tolist() for name in rows[0]}


def picked(arm: str, tree: Any, label_N: np.ndarray, target: int, seed: int) -> np.ndarray:
    """The rows of a pool that an arm samples."""
    order = np.random.default_rng(seed).permutation(len(label_N))
    if arm == "pool":
        return order
    if arm == "random":
        return order[:target]
    if arm == "oracle":  # the first drawing of every character, then every second one, ...
        seen: Counter = Counter()
        turn = [(seen.update([k]), seen[k])[1] for k in label_N[order].tolist()]
        return order[np.argsort(turn, kind="stable")[:target]]
    levels, how = (tree[:1], "equal") if arm == "flat" else (tree, arm)
    return balanced_sample(levels, target, seed, weighting=how)


SAMPLING = Claim(
    "hierarchical against random sampling of a long-tailed pool",
    {arm: {} for arm in ("random", "flat", "equal", "volume", "oracle", "pool")},
    (
        Effect("tail 1-NN", "equal", "random", 0.02, "kNN +2.4 points (AMoE: data)", True),
        Effect("tail 1-NN", "oracle", "random", 0.02),
        Effect("1-NN", "equal", "random", 0.02, "kNN +2.4 points (AMoE: data)"),
        Effect("tail 1-NN", "flat", "random", 0.02),
        Effect("tail 1-NN", "volume", "random", 0.02, "ours"),
        Effect("tail share", "equal", "random", 0.02),
    ),
    run_sampling,
    premise=Premise("tail share", "equal", "random", 0.02),
)


# ---- RADIOv2.5: multi-resolution training


def run_modes(run: Run) -> Figures:
    """Does a head know a size at which its teacher was never shown?

    all: 16 drawings at 48 px and 10 at 128 px, both teachers on all, as RADIOv2.5. split: the ViT
    on 32 drawings at 48 px, the CNN on 20 at 128 px, as AM-RADIO had its teachers: as many pairs of
    a teacher and a picture (52), and twice the student's passes. Drawings of at least 128 px; nano
    from the common base, which knows 64 px, 80 steps. "EV lacked": the ViT's head at 128 px and the
    CNN's at 48. "jump": the largest step of a head's EV between neighbours of 48, 64, 96, 128 px.
    """
    student = student_of(run, 128)
    found = explained(student, (48, 128), run.scale)
    found["EV lacked"] = joined(found, "EV 128 vit-s", "EV 48 mobilenet")
    found["EV own"] = joined(found, "EV 48 vit-s", "EV 128 mobilenet")
    curve = found | explained(student, (64, 96), run.scale)
    keys = [f"EV {side} {name} patches" for name in TEACHERS for side in (48, 64, 96, 128)]
    steps_TS = np.diff(np.reshape([np.mean(curve[key]) for key in keys], (2, 4)))
    return found | {"jump": float(np.abs(steps_TS).max(1).mean())}


_SPLIT = squares(48, 32, teachers=("vit-s",)), squares(128, 20, teachers=("mobilenet",))
MODES = Claim(
    "all teachers at all resolutions against one resolution a teacher",
    {"all": {}, "split": {"stages": (Stage(1.0, _SPLIT),)}, "base": BASE},
    (
        Effect("EV lacked", "all", "split", 0.01, ".829, else .013 zero-shot (RADIOv2.1)", True),
        Effect("EV own", "all", "split", 0.005),
        Effect("jump", "split", "all", 0.01, "no mode switch (RADIOv2.5)"),
    ),
    run_modes,
    premise=Premise("EV own", "split", "base", 0.0),
    rates=NEAR,
    common={"steps": 80, "stages": (Stage(1.0, (squares(48, 16), squares(128, 10))),)},
)


# ---- RADIOv2.5: mosaic augmentation


def run_mosaic(run: Run) -> Figures:
    """What does a mosaic cost, and what are its targets worth?

    No training: drawings of 64 px through ViT-S on canvases of 224 px. mosaic: nine to a canvas.
    alone: one to a canvas, the rest blank. enlarged: each to 224 px. own: the original's pixels to
    224 px, a ceiling. Cost: CPU time a picture, as its logarithm. Worth: IoU of a ridge from tokens
    to "at least half foreground" on 4 x 4 cells, fitted to 72 drawings, on 54 others of characters
    that it never saw. Each seed has its own drawings. constant: says foreground everywhere.
    """
    sides = drawings(run.seed, run.scale.mosaic)
    share_NQ, test_NQ = (torch.stack([foreground(s) for s in samples]) for samples in sides)
    said_NQ, found = torch.ones_like(test_NQ), {}
    if run.arm != "constant":
        kind = {"enlarged": "fixed", "own": "fixed"}.get(run.arm, "canvas")
        teacher, began = canvas_teacher(kind, run.scale), time.process_time()
        maps = [mosaic_maps(teacher, run.arm, samples) for samples in sides]
        cost = (time.process_time() - began) / sum(map(len, sides))
        found, said_NQ = {"log cost": float(np.log(cost))}, ridge(maps[0], share_NQ, maps[1])
    both, either = (f(said_NQ > 0.5, test_NQ > 0.5) for f in (torch.logical_and, torch.logical_or))
    return found | {"IoU": float(both.sum() / either.sum().clamp_min(1))}


MOSAIC = Claim(
    "a mosaic against one canvas a picture",
    {arm: {} for arm in ("mosaic", "alone", "enlarged", "own", "constant")},
    (
        Effect("log cost", "alone", "mosaic", 0.69, "k^2 (RADIOv2.5: mosaic)", True),
        Effect("IoU", "mosaic", "alone", 0.02, "quality no worse (RADIOv2.5: mosaic)"),
        Effect("IoU", "mosaic", "enlarged", 0.02),
    ),
    run_mosaic,
)


# ---- PHI-S: balance


def run_phis(run: Run) -> Figures:
    """Does PHI-S let a quiet teacher be heard?

    The ViT's features are multiplied by 100 (RADIO's teachers differ 191-fold). From scratch, as
    the balance of the losses shapes the start; 120 steps of 32 drawings at 64 px. phis, global and
    channel: the targets' space. mse: the mean squared error of the raw features, by heads that
    start at the teachers' scale (their losses in PHI-S space, weighed by its scale squared, which
    is the same number), so that it is not lost by heads that can't reach 100.
    """

    def loud(name: str, out: TeacherOutput) -> TeacherOutput:
        factor = LOUD.get(name, 1.0)
        return TeacherOutput(out.summary_BC * factor, [x * factor for x in out.patches])

    def weigh(state: train.State, name: str) -> float:
        teacher, part = name.split("/")
        return float(state.spaces[teacher].parts[part].current().scale.mean() ** 2)

    raw = mock.patch.object(train, "part_weight", weigh)
    with raw if run.arm == "mse" else nullcontext():
        return explained(student_of(run, hear=loud), (64,), run.scale, LOUD)


LOUD = {"vit-s": 100.0}
PHIS = Claim(
    "PHI-S against other spaces, one teacher's features 100 times as large",
    {
        "phis": {},
        "global": {"normalizer": "global"},
        "channel": {"normalizer": "channel"},
        "mse": {},
    },
    (
        Effect("EV 64 mobilenet", "phis", "mse", 0.01, "rank 2.92 and 7.83 (PHI-S Sec. 4)", True),
        Effect("EV 64 mobilenet", "phis", "global", 0.005, "rank 2.92 and 3.81 (PHI-S Sec. 4)"),
        Effect("EV 64 mobilenet", "phis", "channel", 0.005, "rank 2.92 and 4.21 (PHI-S Sec. 4)"),
        Effect("EV", "phis", "mse", 0.01),
        Effect("EV", "phis", "global", 0.005),
        Effect("EV", "phis", "channel", 0.005),
    ),
    run_phis,
    premise=Premise("EV 64 vit-s", "mse", "", 0.02),
    rates=(1e-3, 2e-3, 4e-3),
    common={"steps": 120, "init": "", "stages": (Stage(1.0, (squares(64, 32),)),)},
)


# ---- C-RADIOv4: shift-equivariant loss


def run_shift(run: Run) -> Figures:
    """Does shifting the views keep a teacher's fixed pattern out of the student?

    The ViT's maps get the same noise at the same place of the student's 4 x 4 patches, whatever the
    picture, as strong as its features vary: an artefact of positions. plain: as ever. shift: the
    student and the live teacher look at crops of an enlarged picture, moved apart by whole patches,
    N(0, .5) (the makers'), nothing is cut off a crop; the loss is of the overlap. ViT-S alone, nano
    from the common base, 150 steps of 32 drawings at 64 px. EV is of clean maps. "pattern": how
    much of it the student says, by regression of its mean map. "EV seen" is of the maps with the
    pattern, which is all that one who tunes a training sees.
    """
    pattern, grid = pattern_of(run.scale), (4, 4)

    def patterned(_: str, out: TeacherOutput) -> TeacherOutput:
        return TeacherOutput(out.summary_BC, [resize_map(x, grid) + pattern for x in out.patches])

    student = student_of(run, 64, patterned)
    samples, known = held_out(run.scale, 64), reference(run.scale, 64, "vit-s")
    said = torch.stack([x["vit-s"] for x in student_maps(student, samples, 64)])
    clean = torch.stack([resize_map(y, grid) for y in known.maps])
    strange, seen = pattern / known.std_C, clean + pattern
    more = (said.mean(0) - clean.mean(0)) / known.std_C
    found = explained(student, (64,), run.scale)
    found["EV"] = found["EV 64 vit-s patches"]
    rest, all_of_it = (x.square().sum() for x in (said - seen, seen - seen.mean((0, 1, 2))))
    found["EV seen"] = 1 - float(rest / all_of_it)
    return found | {"pattern": float((more * strange).sum() / strange.square().sum())}


SHIFT = Claim(
    "the shift-equivariant loss against plain MSE, a teacher with a fixed pattern",
    {"plain": {}, "shift": {"shift": 0.5, "cache": "none"}, "base": BASE},
    (
        Effect("EV", "shift", "plain", 0.01, "pattern not learnt (C-RADIOv4 Eq. 1)", True),
        Effect("pattern", "plain", "shift", 0.1, "pattern not learnt (C-RADIOv4 Eq. 1)"),
        Effect("EV 64 vit-s summary", "shift", "plain", 0.01),
    ),
    run_shift,
    premise=Premise("pattern", "plain", "base", 0.5),
    rates=NEAR,
    judged="EV seen",
    common={"steps": 150, "stages": (Stage(1.0, (squares(64, 32),)),), "teachers": ("vit-s",)},
)


# ---- RADIOv2.5: token merging


def run_merging(run: Run) -> Figures:
    """What is left of a map when a quarter of the tokens stands for it?

    docs/student.pt at 128 px: 64 tokens, of which 16 are left. Reading: a small attention reader is
    trained on 600 drawings to answer four questions of each, and asked on 300 of characters that
    the student never saw. patch kNN: the mask's class at each place by the token that stands for
    it. Each seed has its own drawings. all: every token. constant: the commonest answers.
    """
    sides, asked = merging_sets(run.seed, run.scale)
    if run.arm == "constant":
        common = [x_Q[x_Q >= 0].mode().values for x_Q in asked[0].T]
        hits_NQ = asked[1] == torch.stack(common)
        return {"reading": answered(hits_NQ, asked[1]), "patch kNN": patch_hits(sides, None)}
    maps = [found.patches["student/trunk"] for found in sides]
    grid = maps[0][0].shape[:2]
    ways = [[reduced(x, run.arm) for x in side] for side in maps]
    hits_NQ = read(*ways, grid, *asked, run)
    back = [[tokens_KC[index_P].unflatten(0, grid) for tokens_KC, index_P in side] for side in ways]
    return {"reading": answered(hits_NQ, asked[1]), "patch kNN": patch_hits(sides, back)}


def reduced(map_hwC: Tensor, way: str) -> tuple[Tensor, Tensor]:
    """The tokens (K, C) that stand for a map, and which of them stands for each place."""
    if way != "all":
        return reduce_map(map_hwC, way, 2)
    return map_hwC.flatten(0, 1).float(), torch.arange(map_hwC[..., 0].numel())


MERGING = Claim(
    "token merging against pixel unshuffle at equal counts",
    {arm: {} for arm in ("all", "merge", "unshuffle", "average", "constant")},
    (
        Effect("reading", "merge", "unshuffle", 0.01, "+5.9 points, VLM average (RADIOv2.5)", True),
        Effect("reading", "merge", "average", 0.01),
        Effect("patch kNN", "merge", "unshuffle", 0.01),
        Effect("patch kNN", "merge", "average", 0.01),
    ),
    run_merging,
    floor="constant",
    premise=Premise("reading", "all", "average", 0.0),  # or few tokens lose nothing
    rates=(5e-4, 1e-3, 2e-3),
    judged="reading",
    seeds=20,
)

CLAIMS = {
    **{"merging": MERGING, "mosaic": MOSAIC, "arkd": ARKD, "balance": BALANCE},
    **{"modes": MODES, "sampling": SAMPLING, "shift": SHIFT, "phis": PHIS},
}


# ---- The verdict


def by_seed(rows: Sequence[dict], arm: str, figure: str) -> dict[int, np.ndarray]:
    """A figure of an arm, the runs of the tuning left out: seed -> its blocks."""
    of_arm = [row for row in rows if row["arm"] == arm and row["seed"] != TUNING]
    figures = {row["seed"]: row["figures"] for row in of_arm}
    return {seed: np.atleast_1d(x[figure]) for seed, x in figures.items() if figure in x}


def measure(effect: Effect, rows: Sequence[dict]) -> dict[str, Any]:
    """An effect, paired by seed: mean, 95 % interval by Student's t, p, each base's mean, and the
    deviation that other test pictures would bring (from ten blocks of them)."""
    new, old = (by_seed(rows, arm, effect.figure) for arm in (effect.arm, effect.other))
    differences = {seed: new[seed] - old[seed] for seed in sorted(new.keys() & old.keys())}
    if len(differences) < 2:
        return {"n": len(differences)}
    found = student_t([x.mean() for x in differences.values()])
    for base in (0, 1):
        of_base = [x.mean() for seed, x in differences.items() if base_of(seed) == base]
        found[f"base {base}"] = float(np.mean(of_base)) if of_base else None
    blocks = np.mean(list(differences.values()), 0)
    error = blocks.std(ddof=1) / len(blocks) ** 0.5 if len(blocks) > 1 else None
    return found | {"pictures": error}


def student_t(values: Any) -> dict[str, Any]:
    """Mean, 95 % interval and two-sided p of a sample of a mean of 0."""
    x = np.asarray(values, float)
    error, df = x.std(ddof=1) / len(x) ** 0.5, len(x) - 1
    mean, width = float(x.mean()), t_quantile(df) * error
    p = t_tail(abs(mean) / error, df) if error else float(mean == 0)
    return {"n": len(x), "value": mean, "low": mean - width, "high": mean + width, "p": p}


def t_tail(t: float, df: int) -> float:
    """P(|T| > t): with T = sqrt(df) tan(angle), the angle's density goes as cos^(df - 1)."""
    angles = [np.linspace(low, np.pi / 2, 20_001) for low in (np.arctan(t / df**0.5), 0.0)]
    tail, whole = (np.trapezoid(np.cos(x) ** (df - 1), x) for x in angles)
    return float(tail / whole)


def t_quantile(df: int, p: float = 0.05) -> float:
    """The t beyond which the two-sided p is less, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > p else (low, middle)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: the smallest times n, the next times n - 1, .., never falling."""
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        most = max(most, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = most
    return adjusted


def verdict(claim: Claim, effect: Effect, rows: Sequence[dict], adjusted: float) -> str:
    """What a primary effect says of the claim, by its p after Holm's correction."""
    found = measure(effect, rows)
    if (premise := claim.premise) and not premise_value(premise, rows) > premise.least:
        return "no test: its premise failed"
    if not any(above_floor(claim, effect, arm, rows) for arm in (effect.arm, effect.other)):
        return "can't be tested at this scale: no arm leaves its floor"
    inside = max(abs(found["low"]), abs(found["high"])) < effect.matters
    if adjusted < 0.05 and not inside:
        size = "" if abs(found["value"]) >= effect.matters else ", less than matters"
        return ("shown" if found["value"] > 0 else "the opposite") + size
    if inside:
        return f"no difference that matters (within {effect.matters:g})"
    return f"not shown; could see {(found['high'] - found['low']) / 2:.3f}"


def premise_value(premise: Premise, rows: Sequence[dict]) -> float:
    """Its figure's mean, less that of `other`; nan without runs."""
    arms = (premise.arm, premise.other) if premise.other else (premise.arm,)
    first, *rest = (list(by_seed(rows, arm, premise.figure).values()) or [np.nan] for arm in arms)
    return float(np.mean(first) - sum(map(np.mean, rest)))


def above_floor(claim: Claim, effect: Effect, arm: str, rows: Sequence[dict]) -> bool:
    """Is an arm's figure above the floor's by more than its own 95 % interval?"""
    if claim.floor:
        return measure(replace(effect, arm=arm, other=claim.floor), rows).get("low", -1.0) > 0
    values = [x.mean() for x in by_seed(rows, arm, effect.figure).values()]
    return effect.figure.startswith("log") or student_t(values)["low"] > 0


# ---- Part II: the plumbing
# ---- Data and teachers


class Memory(Subset):
    """A source whose pictures stay in memory."""

    def __init__(self, source: Any):
        super().__init__(source, range(len(source)))
        self.samples: list[Sample] = [source.load(i) for i in range(len(source))]

    def load(self, i: int, at_least: Any = None) -> Sample:
        del at_least
        return self.samples[i]


@cache
def data(scale: Scale) -> tuple[Memory, Memory]:
    """Drawings to train on, and of other characters to test on."""
    sides = {"train": scale.train, "test": scale.test}
    train_set, test_set = (Memory(open_source(f"openmoji:{k}:{n}")) for k, n in sides.items())
    return train_set, test_set


@cache
def held_out(scale: Scale, side: int) -> list[Sample]:
    """Held-out drawings of at least side x side, evenly spread."""
    source = large_enough(data(scale)[1], side)
    return [source.load(i) for i in evenly(len(source), scale.seen)]


def drawings(seed: int, counts: tuple[int, int], side: int = 0) -> list[list[Sample]]:
    """Fresh drawings of that seed: of training characters, and of held-out ones."""
    found = []
    for split, count in zip(("train", "test"), counts, strict=True):
        source = open_source(f"openmoji:{split}:{4 * count}", 1000 + seed)
        enough = large_enough(source, side) if side else source
        found.append([enough.load(i) for i in range(min(count, len(enough)))])
    return found


@cache
def teachers(scale: Scale) -> dict[str, CachedTeacher]:
    """The two teachers, with all features of `data` in their caches."""
    live = [load_teacher(parse_teacher(text)) for text in scale.teachers]
    caches = [CachedTeacher(t, cache_home() / "features") for t in live]
    for source in data(scale):
        fill_caches(caches, source)
    return {t.name: t for t in caches}


@dataclass(frozen=True)
class Reference:
    """What a teacher says of the held-out drawings, and the measures by its training features."""

    measures: dict[str, Fidelity]  # of "summary" and "patches"
    summary_NC: Tensor
    maps: list[Tensor]
    std_C: Tensor  # of its patches in training


@cache
def reference(scale: Scale, side: int, name: str) -> Reference:
    source, teacher = data(scale)[0], teachers(scale)[name]
    known = teacher.targets([source.load(i) for i in evenly(len(source), 400)])
    said = teacher.targets(held_out(scale, side))
    rows = {"summary": [known.summary_BC], "patches": [x.flatten(0, 1) for x in known.patches]}
    std_C = torch.cat(rows["patches"]).std(0)
    measures = {part: Fidelity(x) for part, x in rows.items()}
    return Reference(measures, said.summary_BC, said.patches, std_C)  # type: ignore[arg-type]


@cache
def teacher_summaries(scale: Scale) -> tuple[Tensor, Tensor]:
    """The ViT's summaries of all drawings, in training and held out."""
    vit = teachers(scale)["vit-s"]
    train_NC, test_NC = (vit.targets(source.samples).summary_BC for source in data(scale))
    return train_NC, test_NC  # type: ignore[return-value]


def changed(teacher: Teacher, change: Callable[[TeacherOutput], TeacherOutput]) -> Teacher:
    """A copy of a teacher, live or cached, with a change to all that it says."""
    other, name = copy.copy(teacher), "features"
    if isinstance(teacher, CachedTeacher):
        name = "targets"
    says = getattr(teacher, name)
    setattr(other, name, lambda *given, **more: change(says(*given, **more)))
    return other


def pattern_of(scale: Scale) -> Tensor:
    """The artefact: the same numbers at each of 4 x 4 places, as strong as the features vary."""
    std_C = reference(scale, 64, "vit-s").std_C
    return torch.randn(4, 4, len(std_C), generator=torch.Generator().manual_seed(0)) * std_C


# ---- Training


TRAINING = TrainConfig(
    preset="claims", data=("openmoji:train:4000",), head_hidden=384, relation="none",
    stats_steps=10, warmup=10, lr=2e-3, steps=1200, max_images=64, precision="fp32",
    stages=(Stage(1.0, (squares(64, 32),)),),
)  # fmt: skip


def base_of(seed: int) -> int:
    """Which of the two bases a seed's runs start from: 0 for seeds 0 to 4, 1 for 5 to 9, .."""
    return seed % 10 // 5


@cache
def base_path(which: int, scale: Scale) -> Path:
    """The common base, trained once: no relational loss, 32 drawings of 64 px a step."""
    cfg = replace(TRAINING, seed=1000 + which, steps=scale.base_steps)
    facts = json.dumps([cfg.identity(), dataclasses.asdict(scale)], sort_keys=True)
    name = hashlib.sha256(facts.encode()).hexdigest()[:12]
    path = cache_home() / "claims" / f"base-{which}-{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_student(distil(cfg, list(teachers(scale).values()), data(scale)[0])[0], path)
    return path


def student_of(
    run: Run, side: int = 0, hear: Callable[[str, TeacherOutput], TeacherOutput] | None = None
) -> Student:
    """Train an arm's student; one that is not trained on is the base or the random control.

    Args:
        side: drawings smaller than side x side are left out.
        hear: (teacher's name, what it says) -> what it says in training.
    """
    change, steps = dict(run.change), min(run.change["steps"], run.scale.most_steps)
    base = base_path(base_of(run.seed), run.scale)
    if steps <= 0:
        return random_control(load_student(base), run.seed) if steps else load_student(base)
    names = change.pop("teachers", TEACHERS)
    given: list[Teacher] = [teachers(run.scale)[name] for name in names]
    if change.get("cache") == "none":  # live: they look at crops
        specs = [parse_teacher(text) for text in run.scale.teachers]
        given = [load_teacher(spec) for spec in specs if spec.name in names]
    if hear:
        given = [changed(t, partial(hear, t.name)) for t in given]
    change = {"init": f"base={base}"} | change | {"steps": steps}
    source = large_enough(data(run.scale)[0], side) if side else data(run.scale)[0]
    student, course = distil(replace(TRAINING, seed=run.seed, lr=run.rate, **change), given, source)
    student.course = course  # type: ignore[assignment]
    return student


def distil(cfg: TrainConfig, given: list, source: Source) -> tuple[Student, Figures]:
    """`train.train` in a folder that is thrown away -> the student, and how it went."""
    with TemporaryDirectory() as out:
        cfg = replace(cfg, out=out, save_every=cfg.steps, log_every=1, threads=1)
        job = train.train(cfg, given, [source])
        student = load_student(job.newest / "model.pt")
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    norms = [row["grad_norm"] for row in map(json.loads, lines) if "grad_norm" in row]
    late = norms[len(norms) // 2 :]
    course = {key: job.record[key] / cfg.steps for key in ("images", "tokens")}
    return student, course | {"gradient spread": float(np.std(late) / np.mean(late))}


# ---- Measuring


def blocks(*values: Tensor) -> list[float]:
    """Means of ten blocks of the test pictures, each the mean over all rows of values (N,)."""
    parts = [[float(x.double().mean()) for x in v.tensor_split(10)] for v in values]
    return np.mean(parts, 0).tolist()


def joined(found: Figures, *names: str) -> list[float]:
    """The mean of some figures, block by block."""
    return np.mean([found[name] for name in names], 0).tolist()


def batches(samples: list, size: int = 32) -> list[list]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


@torch.no_grad()
def student_maps(student: Student, samples: list[Sample], side: int) -> list[dict[str, Tensor]]:
    """Of each drawing the heads' maps (h, w, C), and their summaries as maps of one token."""
    found = []
    for some in batches(samples):
        for out in student.encode([to_float(s.image, (side, side)) for s in some]):
            tokens = {f"{name} summary": x_C[None, None] for name, x_C in out.summary.items()}
            found.append(out.patches | tokens)
    return found


def explained(
    student: Student, sides: Sequence[int], scale: Scale, factors: dict[str, float] | None = None
) -> Figures:
    """The variance explained at each size, of each head and part, and means over them.

    Args: factors: of the teachers' features in training, which the heads answer with.
    """
    found: Figures = dict(getattr(student, "course", {}))
    names = [name for name in TEACHERS if name in student.heads]
    for side in sides:
        said = student_maps(student.eval(), held_out(scale, side), side)
        for name in names:
            known, factor = reference(scale, side, name), (factors or {}).get(name, 1.0)
            summaries = [x_C[None, None] for x_C in known.summary_NC]
            for part, theirs in (("summary", summaries), ("patches", known.maps)):
                key = name if part == "patches" else f"{name} summary"
                pairs = [same_grid(x[key] / factor, y) for x, y in zip(said, theirs, strict=True)]
                found[f"EV {side} {name} {part}"] = blocks(ev(known.measures[part], pairs))
            both = (f"EV {side} {name} {part}" for part in ("summary", "patches"))
            found[f"EV {side} {name}"] = joined(found, *both)
        found[f"EV {side}"] = joined(found, *(f"EV {side} {name}" for name in names))
    return found | {"EV": joined(found, *(f"EV {side}" for side in sides))}


def ev(measure: Fidelity, pairs: Sequence[Sequence[Tensor]]) -> Tensor:
    """Each picture's part in the variance explained, whose mean it is (eval.Fidelity.report)."""
    rows = [[x.flatten(0, 1).double() for x in pair] for pair in pairs]
    error_NC = torch.stack([(s_MC - t_MC).square().mean(0) for s_MC, t_MC in rows])
    mean_C = torch.stack([t_MC.mean(0) for _, t_MC in rows]).mean(0)
    spread_C = torch.stack([(t_MC - mean_C).square().mean(0) for _, t_MC in rows]).mean(0)
    return 1 - (error_NC * measure.scale_C).mean(1) / (spread_C * measure.scale_C).mean()


@cache
def text_side(scale: Scale) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The ridge from the teacher's summaries to texts; held-out captions (K, D); who has which."""
    train_set, test_set = data(scale)
    captions = [str(sample.caption).splitlines()[0] for sample in train_set.samples]
    texts, is_pair_NK = caption_pairs(FeatureSet(test_set.samples))
    embed = load_text(parse_teacher(scale.text)) if scale.text else letters
    known_ND, text_KD = (torch.cat([embed(x) for x in batches(y, 256)]) for y in (captions, texts))
    return fit_text_map(teacher_summaries(scale)[0], known_ND), text_KD, is_pair_NK


def letters(texts: list[str]) -> Tensor:
    """Instead of a text tower, for tests."""
    return torch.tensor([[len(text), text.count("e")] for text in texts]).float()


def read_by_text(head_NC: Tensor, scale: Scale) -> Figures:
    """What the ViT's head is worth to the teacher's own text map, and to its class means."""
    ridge_map, text_KD, is_pair_NK = text_side(scale)
    scores_NK = F.normalize(ridge_map(head_NC)) @ F.normalize(text_KD).T
    hits = recall_hits(scores_NK, is_pair_NK, 10), recall_hits(scores_NK.T, is_pair_NK.T, 10)
    train_set, test_set = data(scale)
    teacher_NC, teacher_test_NC = teacher_summaries(scale)
    names, train_N, test_N = class_ids(*(FeatureSet(x.samples) for x in (train_set, test_set)))
    means_KC = torch.stack([teacher_NC[train_N == k].mean(0) for k in range(len(names))])
    said_N = (head_NC @ F.normalize(means_KC).T).argmax(1)
    some = evenly(len(test_N), 500)
    majority = train_N.bincount().argmax()
    found = {"text R@10": blocks(*hits), "zero-shot": blocks(said_N == test_N)}
    found["relation"] = relation(teacher_test_NC[some], head_NC[some])
    return found | {"majority class": float((test_N == majority).double().mean())}


def relation(teacher_NC: Tensor, student_NC: Tensor) -> float:
    """Spearman's rank correlation of the distances of all pairs of pictures."""
    distances = [torch.pdist(x_NC.double()) for x_NC in (teacher_NC, student_NC)]
    ranks = torch.stack([d.argsort().argsort().double() for d in distances])
    return float(torch.corrcoef(ranks)[0, 1])


# ---- Pools to sample from


@lru_cache(1)
def pool_of(seed: int, scale: Scale) -> tuple:
    """A long-tailed pool: features, labels by rank, those of the test, and its tree."""
    source = data(scale)[0]
    character_N = np.array([s.key.split("-")[-1] for s in source.samples])
    names = sorted(set(character_N))
    chosen = np.random.default_rng(seed).permutation(names)[: scale.concepts].tolist()
    counts = [max(1, scale.largest // (rank + 1)) for rank in range(len(chosen))]
    label_N = np.repeat(range(len(chosen)), counts)
    pairs = zip(chosen, counts, strict=True)
    views = [view_of(view, name, scale) for name, n in pairs for view in range(1, 1 + n)]
    x_NC = torch.stack(views)
    rank_of = {name: rank for rank, name in enumerate(chosen)}
    test = [i for i, name in enumerate(character_N) if name in rank_of]
    test_M = torch.tensor([rank_of[character_N[i]] for i in test])
    n = len(label_N)
    tree = hierarchical_kmeans(x_NC.numpy(), [n // 6, n // 20, min(16, n // 40)], seed)
    return x_NC, label_N, teacher_summaries(scale)[0][test], test_M, tree


@cache
def view_of(view: int, character: str, scale: Scale) -> Tensor:
    """The ViT's summary of another drawing of a character than those of `data`."""
    source = open_source("openmoji:train:1054", view)  # each character once
    if view not in PLACES:
        keys = [source.key(i).split("-")[-1] for i in range(len(source))]
        PLACES[view] = {key: i for i, key in enumerate(keys)}
    image = to_float(source.load(PLACES[view][character]).image)
    return teachers(scale)["vit-s"]([image]).summary_BC[0]  # type: ignore[index]


PLACES: dict[int, dict[str, int]] = {}  # view -> character -> its place


# ---- A teacher with a canvas


@cache
def canvas_teacher(kind: str, scale: Scale) -> Teacher:
    """The ViT, fed as SAM is: 224 px whatever comes, or parts of a canvas of 224 px."""
    vit = load_teacher(parse_teacher(scale.teachers[0])).backbone
    sizes = SizeRule(kind, vit.sizes.patch, 224)
    read = partial(maps_alone, vit.read)
    return Teacher("canvas", replace(vit, read=read, sizes=sizes))


def maps_alone(read: Callable, network: nn.Module, pixels_BCHW: Tensor) -> tuple:
    return None, read(network, pixels_BCHW)[1], None


def mosaic_maps(teacher: Teacher, arm: str, samples: list[Sample]) -> Tensor:
    """(N, 16, C): the maps of drawings, on 4 x 4 cells."""
    size = None if arm == "own" else (64, 64)
    images = [teacher.prepare(to_float(sample.image, size)) for sample in samples]
    out = [teacher.features(x, share_canvas=arm != "alone") for x in batches(images, 36)]
    maps = [x for part in out for x in part.patches]
    return torch.stack([resize_map(x, (4, 4)).flatten(0, 1) for x in maps])


def foreground(sample: Sample) -> Tensor:
    """(16,) the share of each of 4 x 4 cells that is not background."""
    mask = torch.from_numpy((np.asarray(sample.mask) > 0).astype(np.float32))
    return F.interpolate(mask[None, None], (4, 4), mode="area").flatten()


def ridge(x_NQC: Tensor, y_NQ: Tensor, test_NQC: Tensor, penalty: float = 30.0) -> Tensor:
    """Tokens -> (N, Q) by ridge regression on standardised channels."""
    rows = [x.flatten(0, 1).double() for x in (x_NQC, test_NQC)]
    mean_C, std_C = rows[0].mean(0), rows[0].std(0) + 1e-6
    x, test = (torch.cat([(r - mean_C) / std_C, torch.ones(len(r), 1)], 1) for r in rows)
    gram = x.T @ x + penalty * torch.eye(x.shape[1])
    return (test @ torch.linalg.solve(gram, x.T @ y_NQ.flatten().double())).view(test_NQC.shape[:2])


# ---- A small reader of tokens


@lru_cache(1)
def merging_sets(seed: int, scale: Scale) -> tuple[list[FeatureSet], tuple[Tensor, Tensor]]:
    """The shipped student's maps of fresh drawings, and the answers to what is asked of them."""
    student = load_student(Path(__file__).parents[1] / "docs" / "student.pt")
    sides = []
    for samples in drawings(seed, scale.merging, 128):
        maps = [x["trunk"] for x in student_maps(student, samples, 128)]
        sides.append(
            FeatureSet(samples, patches={"student/trunk": maps}, dense=list(range(len(maps))))
        )
    return sides, questions(*sides)


def questions(train: FeatureSet, test: FeatureSet) -> tuple[Tensor, Tensor]:
    """(N, 4) answers to: what is it, its caption's last word, where (of 3x3), how large (of 4).

    -1 where a picture has no such answer: a label or word that training lacks, an empty mask.
    """
    counts = Counter(map(_last_word, train.samples))
    words = sorted(word for word, count in counts.items() if word and count >= 5)
    labels = sorted({str(sample.label) for sample in train.samples})

    def answers(sample: Sample) -> list[int]:
        names = (str(sample.label), labels), (_last_word(sample), words)
        known = [among.index(name) if name in among else -1 for name, among in names]
        rows, columns = np.nonzero(np.asarray(sample.mask))
        if not len(rows):
            return [*known, -1, -1]
        height, width = np.asarray(sample.mask).shape
        place = 3 * (3 * rows.mean() // height) + 3 * columns.mean() // width
        share = len(rows) / (height * width)
        return [*known, int(place), sum(share > limit for limit in (0.1, 0.2, 0.4))]

    sides = ([answers(sample) for sample in found.samples] for found in (train, test))
    train_NQ, test_NQ = map(torch.tensor, sides)
    return train_NQ, test_NQ


def _last_word(sample: Sample) -> str:
    """Of the first name in the caption: "grinning face, tractor" gives "face"."""
    return (sample.caption or "").partition(",")[0].rpartition(" ")[2]


class Reader(nn.Module):
    """A language model's way to read tokens, at its smallest: every question attends once."""

    def __init__(self, width: int, answers: Sequence[int], dim: int = 128):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.question_QD = nn.Parameter(torch.randn(len(answers), dim))
        self.attention = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.answer = nn.ModuleList(nn.Linear(dim, count) for count in answers)

    def forward(self, tokens_NKC: Tensor) -> list[Tensor]:
        """Logits (N, answers) of each question."""
        x_NKD = self.project(tokens_NKC)
        question = repeat(self.question_QD, "q d -> n q d", n=len(x_NKD))
        read = question + self.attention(question, x_NKD, x_NKD)[0]
        return [layer(read[:, q]) for q, layer in enumerate(self.answer)]


def read(
    train: Sequence, test: Sequence, grid: Any, train_NQ: Tensor, test_NQ: Tensor, run: Run
) -> Tensor:
    """(N, Q) is the trained reader's answer right, on held-out pictures?

    Args:
        train, test: (tokens (K, C), index (h w,)) of each picture, see `reduce_map`. A token also
            carries the mean row and column of its members, as a prompt's order would tell.
        train_NQ: unanswered questions (-1) teach nothing.
    """
    place_P2 = torch.cartesian_prod(*(torch.linspace(-1, 1, n) for n in grid))

    def placed(tokens_KC: Tensor, index_P: Tensor) -> Tensor:
        sums_K2 = torch.zeros(len(tokens_KC), 2).index_add_(0, index_P, place_P2)
        return torch.cat([tokens_KC, sums_K2 / index_P.bincount()[:, None]], 1)

    train_NKC, test_NKC = (torch.stack([placed(*one) for one in side]) for side in (train, test))
    mean_C, scale_C = train_NKC.mean((0, 1)), train_NKC.std((0, 1)).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        reader = Reader(train_NKC.shape[-1], (train_NQ.amax(0) + 1).clamp_min(1).tolist())
    adam = torch.optim.AdamW(reader.parameters(), run.rate)
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(run.scale.reader_steps):
        rows = torch.randint(len(train_NQ), (64,), generator=generator)
        pairs = zip(reader((train_NKC[rows] - mean_C) / scale_C), train_NQ[rows].T, strict=True)
        losses = [F.cross_entropy(x, y, ignore_index=-1, reduction="sum") for x, y in pairs]
        adam.zero_grad()
        (torch.stack(losses).sum() / len(rows)).backward()
        adam.step()
    with torch.no_grad():
        logits = reader((test_NKC - mean_C) / scale_C)
    return torch.stack([x.argmax(1) for x in logits], 1) == test_NQ


def answered(hits_NQ: Tensor, test_NQ: Tensor) -> list[float]:
    """The share of the questions with an answer that are answered right, in ten blocks."""
    asked_NQ = test_NQ >= 0
    pairs = zip((hits_NQ & asked_NQ).tensor_split(10), asked_NQ.tensor_split(10), strict=True)
    return [float(right.sum() / asked.sum().clamp_min(1)) for right, asked in pairs]


def patch_hits(sides: list[FeatureSet], maps: list[list[Tensor]] | None) -> list[float]:
    """Single tokens tell the mask's class of their place by 20-NN, among 5,000 of training; every
    fifth of a test picture is asked. Without maps: the commonest class is said everywhere."""
    masks = [[torch.from_numpy(np.array(x.mask)) for x in found.samples] for found in sides]
    given = maps or [found.patches["student/trunk"] for found in sides]
    pairs = [token_labels(*pair) for pair in zip(given, masks, strict=True)]
    (bank_MC, bank_M), (test_MC, test_M) = pairs
    if maps is None:
        return blocks((test_M == bank_M.mode().values).double().view(len(masks[1]), -1).mean(1))
    bank = torch.randperm(len(bank_M), generator=torch.Generator().manual_seed(0))[:5_000]
    asked = torch.arange(len(test_M)).view(len(masks[1]), -1)[:, ::5].flatten()
    votes_MK = knn_votes(bank_MC[bank], bank_M[bank], test_MC[asked], VOID + 1)
    return blocks((votes_MK.argmax(1) == test_M[asked]).double().view(len(masks[1]), -1).mean(1))


# ---- Running


def configuration(claim: Claim, arm: str) -> dict[str, Any]:
    return claim.common | claim.arms[arm]


def mark(name: str, run: Run) -> str:
    """Hash of what makes a run; of streams only what is unlike the default, so that new fields may
    come."""

    def shown(x: Any) -> Any:
        pairs = [(f.name, getattr(x, f.name), f.default) for f in dataclasses.fields(x)]
        return {key: value for key, value, default in pairs if value != default}

    facts = [name, run.arm, run.change, run.seed, run.rate, run.scale]
    text = json.dumps(facts, sort_keys=True, default=shown)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rows_of(name: str, folder: Path, scale: Scale = FULL) -> list[dict]:
    """The runs of a claim as it is defined now; lines of another configuration do not count."""
    path, claim = folder / f"{name}.jsonl", CLAIMS[name]
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def is_of(row: dict) -> bool:
        change = configuration(claim, row["arm"])
        return row["mark"] == mark(name, Run(row["arm"], change, row["seed"], row["rate"], scale))

    return [row for row in rows if row["arm"] in claim.arms and is_of(row)]


def chosen_rate(claim: Claim, arm: str, rows: Sequence[dict]) -> float:
    """The learning rate of an arm that did best on the seed of tuning."""
    tuned = [row for row in rows if row["arm"] == arm and row["seed"] == TUNING]
    best = max(tuned, key=lambda row: np.mean(row["figures"][claim.judged]), default={"rate": 0.0})
    return best["rate"]


def missing(claim: Claim, rows: Sequence[dict], seeds: Sequence[int]) -> list[tuple]:
    """(arm, seed, rate) of the next runs: the tuning, then seed by seed. Arms that are not trained
    have no rate to choose; where they are no floor, a run for each base will do."""
    given = [arm for arm in claim.arms if configuration(claim, arm).get("steps", 1) <= 0]
    tuned = [arm for arm in claim.arms if arm not in (*given, "constant") and claim.rates]
    tuning = [(arm, TUNING, rate) for arm in tuned for rate in claim.rates]
    done = {(row["arm"], row["seed"], row["rate"]) for row in rows}
    if todo := [one for one in tuning if one not in done]:
        return todo
    runs = []
    for seed in seeds:
        for arm in claim.arms:
            if arm not in given or arm == claim.floor or seed % 5 == 0:
                runs.append((arm, seed, chosen_rate(claim, arm, rows) if arm in tuned else 0.0))
    return [one for one in runs if one not in done]


def run_claim(name: str, seeds: Sequence[int], folder: Path = FOLDER, scale: Scale = FULL) -> None:
    """Run what is missing of a claim and append a line for each run."""
    claim = CLAIMS[name]
    folder.mkdir(parents=True, exist_ok=True)
    while todo := missing(claim, rows_of(name, folder, scale), seeds):
        for arm, seed, rate in todo:
            began, run = time.monotonic(), Run(arm, configuration(claim, arm), seed, rate, scale)
            row = {"claim": name, "arm": arm, "seed": seed, "rate": rate, "mark": mark(name, run)}
            row["figures"] = claim.run(run)
            row["seconds"] = time.monotonic() - began
            print(f"{name}: {arm}, seed {seed}, rate {rate:g}: {row['seconds']:.0f} s", flush=True)
            with (folder / f"{name}.jsonl").open("a") as file:
                short = json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 5))
                file.write(json.dumps(short, allow_nan=False) + "\n")


# ---- The tables


def verdicts(folder: Path = FOLDER, scale: Scale = FULL) -> dict[tuple[str, Effect], str]:
    """What each primary effect says, all of them corrected together."""
    rows = {name: rows_of(name, folder, scale) for name in CLAIMS}
    keys = [(name, e) for name, claim in CLAIMS.items() for e in claim.effects if e.is_primary]
    found = {(name, effect): measure(effect, rows[name]) for name, effect in keys}
    ready = [key for key, one in found.items() if "p" in one]
    adjusted = holm([found[key]["p"] for key in ready])
    said = dict.fromkeys(found, "not run yet")
    for (name, effect), p in zip(ready, adjusted, strict=True):
        what, count = verdict(CLAIMS[name], effect, rows[name], p), found[name, effect]["n"]
        if count < CLAIMS[name].seeds:  # no verdict before the seeds that were named are all in
            what = f"so far, by {count} of {CLAIMS[name].seeds} seeds: {what}"
        said[name, effect] = f"{what} (Holm p {p:.2g})"
    return said


def table(name: str, said: dict, folder: Path = FOLDER, scale: Scale = FULL) -> str:
    """A claim's arms in absolute figures, then its effects."""
    claim, rows = CLAIMS[name], rows_of(name, folder, scale)
    figures = list(dict.fromkeys(effect.figure for effect in claim.effects))
    lines = [f"| arm | rate | {' | '.join(figures)} | runs |", "|---" * (len(figures) + 3) + "|"]
    for arm in claim.arms:
        values = [list(by_seed(rows, arm, figure).values()) for figure in figures]
        shown = [f"{np.mean(x):.3f}" if x else "" for x in values]
        runs = max(map(len, values))
        best = chosen_rate(claim, arm, rows)
        rate = f"{best:.1e}" if best else ""
        lines.append(f"| {arm} | {rate} | {' | '.join(shown)} | {runs} |")
    own = [effect_line(name, effect, measure(effect, rows), said) for effect in claim.effects]
    return "\n".join([*lines, "", EFFECTS, "|---" * 8 + "|", *own])


EFFECTS = "| effect | paper | difference, 95 % interval | p | base 0, 1 | pictures | n | verdict |"


def effect_line(name: str, effect: Effect, found: dict[str, Any], said: dict) -> str:
    """A row of the table: "pictures" is the deviation of the mean over other test pictures."""
    cells = [f"`{name}` {effect.figure}: {effect.arm} - {effect.other}", effect.paper]
    if "p" in found:
        cells += ["{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**found), f"{found['p']:.1g}"]
        bases = [found[base] for base in ("base 0", "base 1") if BASE in CLAIMS[name].arms.values()]
        cells += [", ".join(f"{x:+.3f}" for x in bases if x is not None)]
        cells += ["" if found["pictures"] is None else f"± {found['pictures']:.3f}"]
    else:
        cells += ["", "", "", ""]
    return f"| {' | '.join(cells)} | {found['n']} | {said.get((name, effect), '')} |"


def write_tables(page: Path, folder: Path = FOLDER, scale: Scale = FULL) -> str:
    """Put the tables into a page, each behind the line <!-- NAME -->; returns the summary."""
    said, text = verdicts(folder, scale), page.read_text()
    tables = {name: table(name, said, folder, scale) for name in CLAIMS}
    primary = [
        effect_line(*key, measure(key[1], rows_of(key[0], folder, scale)), said) for key in said
    ]
    tables["summary"] = "\n".join([EFFECTS, "|---" * 8 + "|", *primary])
    for name, rows in tables.items():
        text = re.sub(rf"<!-- {name} -->\n(\|.*\n|\n(?=\|))*", f"<!-- {name} -->\n{rows}\n", text)
    page.write_text(text)
    return tables["summary"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"{', '.join(CLAIMS)} [all]")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the claim's own")
    parser.add_argument("--rows", type=Path, default=FOLDER, help="their folder [docs/claims]")
    parser.add_argument("--quick", action="store_true", help="a few steps, tiny teachers, not kept")
    args = parser.parse_args(argv)
    if unknown := set(args.claims) - CLAIMS.keys():
        parser.error(f"no claim {sorted(unknown)}; there are {', '.join(CLAIMS)}")
    torch.set_num_threads(1)  # so that two can run side by side on two cores
    if args.what == "table":
        if args.rows == FOLDER:
            print(write_tables(FOLDER.parent / "claims.md"))
        else:  # somebody's own runs, beside the page
            print(*(table(name, {}, args.rows) for name in args.claims or CLAIMS), sep="\n\n")
        return
    with TemporaryDirectory() as scratch:
        where = (Path(scratch), QUICK) if args.quick else (args.rows, FULL)
        for name in args.claims or CLAIMS:
            run_claim(name, args.seeds or range(CLAIMS[name].seeds), *where)


if __name__ == "__main__":
    main()
