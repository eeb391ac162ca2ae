"""Do the papers' claims hold? Small experiments over seeds, run by hand.

    python tests/claims.py arkd                 # one claim, or all; what ran already is not rerun
    python tests/claims.py table                # docs/claims.md, and the README's table of it
    python tests/claims.py figures              # docs/claims.png, from the same lines

A claim has arms that share everything but what is named, and effects: the difference of a figure
between two arms with the same seed, counted such that it is positive if the claim holds. The first
effect is the primary one; all are named here, before any run, and all that ran are shown. A line of
docs/claims/NAME.jsonl is one run: its arm, seed and figures. A run takes a minute on a quiet core.

Figures: "64/vit-s/patches" is the variance explained (eval.Fidelity) of that head and part on
held-out drawings of 64 x 64 px; the other names are given where they are computed.
"""

import argparse
import copy
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import losses
import train
from eval import (
    FeatureSet,
    bootstrap,
    class_ids,
    extract,
    fidelity,
    knn,
    knn_votes,
    reduce_map,
    token_labels,
)
from model import (
    MODELS,
    GoldenPositions,
    Layout,
    ModelConfig,
    Student,
    count_flops,
    load_student,
    save_student,
)
from packing import Group, Sample, Source, Subset, cache_home, evenly, large_enough
from sampling import balanced_sample, hierarchical_kmeans
from teachers import CachedTeacher, Teacher, TeacherOutput
from train import (
    Stage,
    State,
    Stream,
    TrainConfig,
    load_teachers,
    open_sources,
    part_weight,
)

FOLDER = Path(__file__).parents[1] / "docs" / "claims"
GROUP = Group(0, 1, torch.device("cpu"))
LOW, HIGH = 48, 128  # px, where a claim has two resolutions
CURVE = (LOW, HIGH, 32, 64, 96, 160, 192)  # px, of the mode-switch curve
PARTS = ("summary", "patches")
ARM_OF_MERGING = ("modes", "all")  # the students whose tokens are merged: they know 128 px


# ------------------------------------------------------------------------------ the claims


@dataclass(frozen=True)
class Effect:
    """The mean of some figures in one arm minus that in another; positive if the claim holds."""

    what: str
    figures: tuple[str, ...]
    arm: str
    other: str
    paper: str  # what the paper found, and where


@dataclass(frozen=True)
class Claim:
    """A question, the arms that answer it, and the effects; the first is the primary one."""

    question: str
    scale: str
    arms: dict[str, dict[str, Any]]  # name -> its changes of the configuration
    effects: tuple[Effect, ...]
    base: dict[str, Any] = field(default_factory=dict)  # changes for all arms
    sizes: tuple[int, ...] = (64,)  # px of the held-out drawings; the first one serves kNN, too
    loud: dict[str, float] = field(default_factory=dict)  # teacher -> factor on its features
    patterned: tuple[str, ...] = ()  # arms in which the teachers' maps have a fixed pattern
    unenlarged: bool = True  # only drawings at least as large as the largest square
    positions: dict[str, Any] = field(default_factory=dict)  # arm -> instead of GoldenPositions
    run: Callable[..., dict] | None = None  # (name, arm, seed, quick) -> figures; None: `distil`


def squares(side: int, images: int, prefix: int = 5, **more: Any) -> Stream:
    """One pack of `images` drawings as squares in each step; nano has 5 tokens beside patches."""
    tokens = (side // 16) ** 2 + prefix
    return Stream(f"{side} px", choices=(side,), budget=images * tokens, packs=1, **more)


def explained(side: int, *teachers: str) -> tuple[str, ...]:
    """Names of the variances explained on drawings of one size."""
    return tuple(f"{side}/{t}/{part}" for t in teachers or ("vit-s", "mobilenet") for part in PARTS)


def dense(*sides: int) -> tuple[str, ...]:
    return tuple(f"{side}/{t}/patches" for side in sides for t in ("vit-s", "mobilenet"))


MIXED = Stream("mixed", choices=(LOW, HIGH), budget=512, packs=2)
BASE = TrainConfig(
    preset="claims",
    data=("openmoji:train",),
    head_hidden=384,
    steps=120,
    stages=(Stage(1.0, (replace(squares(64, 16), packs=2),)),),
    stats_steps=10,
    warmup=10,
    lr=2e-3,
)
TINY = {"builtin:vit-s": "builtin:tiny-dense", "builtin:mobilenet": "builtin:tiny-semantic",
        "nano": "test", "nano-dense": "test"}  # fmt: skip
QUICK: dict[str, Any] = {"steps": 2, "stats_steps": 1, "data": ("openmoji:train:240",)}

# The same active parameters as nano: 2 of 8 experts of width 256.
MODELS["nano-dense"] = replace(MODELS["nano"], experts=0, top_k=0, ffn_dim=512)
# RADIO's form at the same active parameters: GELU MLPs, a position table, a CLS per teacher.
MODELS["nano-radio"] = ModelConfig(
    "radio", 192, 6, 3, 64, 768, cls_tokens=2, gated_ffn=False, final_norm=False, position_grid=32
)

# Claims of the papers that have no arms yet; the table names them.
NOT_RUN = ("PHI-S on a bimodal register", "mosaic against resizing")


# ------------------------------------------------------------------------------ training


def changed(teacher: Teacher, change: Callable[[TeacherOutput], TeacherOutput]) -> Teacher:
    """A copy of a teacher, live or cached as it is, with a change to all that it says."""
    other, name = copy.copy(teacher), "features"
    if isinstance(teacher, CachedTeacher):
        name = "targets"
    says = getattr(teacher, name)
    setattr(other, name, lambda *given, **more: change(says(*given, **more)))
    return other


def loud(out: TeacherOutput, factor: float) -> TeacherOutput:
    """Features multiplied: RADIO's teachers differ 191-fold (PHI-S)."""
    assert out.summary_BC is not None
    return TeacherOutput(out.summary_BC * factor, [x * factor for x in out.patches])


def patterned(out: TeacherOutput, strength_C: Tensor) -> TeacherOutput:
    """Maps with the same pattern at the same place whatever the picture, as strong as the features
    vary: the artefacts of position embeddings and windows that C-RADIOv4 names."""
    noise = torch.randn(64, 64, len(strength_C), generator=torch.Generator().manual_seed(0))
    maps = [x + (noise * strength_C)[: x.shape[0], : x.shape[1]] for x in out.patches]
    return TeacherOutput(out.summary_BC, maps)


class Axial(GoldenPositions):
    """RoPE whose frequencies turn with the row or with the column, one half each.

    Per patch is the usual form: a patch is one unit, and frequencies fall from 1 by a base of 100
    (we chose; rope_max is not used). Else magnitudes and coordinates are the golden ones.
    """

    def __init__(self, config: ModelConfig, per_patch: bool):
        super().__init__(config)
        self.per_patch = per_patch
        half = torch.linspace(0, 1, self.freqs_HJ2.shape[1] // 2)
        size_J = 100**-half if per_patch else config.rope_min * (
            config.rope_max / config.rope_min) ** half  # fmt: skip
        zero_J = torch.zeros_like(size_J)
        rows_J2, columns_J2 = (torch.stack(x, 1) for x in ((size_J, zero_J), (zero_J, size_J)))
        self.freqs_HJ2.copy_(torch.cat([rows_J2, columns_J2]))

    def coordinates(self, layout: Layout) -> Tensor:
        return layout.row_column_M2.float() if self.per_patch else super().coordinates(layout)


@cache
def opened(
    teachers: tuple, quick: bool, cache: str = "auto"
) -> tuple[Source, Source, list[Teacher]]:
    """(training drawings, held-out drawings, teachers), once for all runs of this process."""
    cfg = replace(BASE, teachers=teachers, cache=cache, **QUICK if quick else {})
    (source,), held_out = open_sources(cfg)
    return source, held_out, load_teachers(cfg, [source, held_out], GROUP)


def config(name: str, arm: str, seed: int, quick: bool) -> TrainConfig:
    """The configuration of one run; quick: two steps on random teachers, for tests."""
    claim = CLAIMS[name]
    cfg = replace(BASE, **claim.base | claim.arms[arm], seed=seed)
    if not quick:
        return cfg
    tiny = [text.split("=") for text in cfg.teachers]
    teachers = tuple(f"{name}={TINY[path]}" for name, path in tiny)
    return replace(cfg, **QUICK, teachers=teachers, model=TINY.get(cfg.model, cfg.model))


def mark(name: str, arm: str, seed: int, quick: bool) -> str:
    """Hash of what makes a run: the fields unlike the default's, so that new fields may come."""
    default = TrainConfig().identity()
    cfg = config(name, arm, seed, quick).identity()
    changed = {key: value for key, value in cfg.items() if value != default[key]}
    facts = [name, arm, seed, changed, CLAIMS[name].sizes, CLAIMS[name].loud]
    facts += [part for part in (CLAIMS[name].patterned, sorted(CLAIMS[name].positions)) if part]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def student_path(name: str, arm: str, seed: int, quick: bool) -> Path:
    return cache_home() / "claims" / f"{mark(name, arm, seed, quick)}.pt"


def spread(source: Source, limit: int) -> Subset:
    """At most `limit` pictures, evenly spread."""
    return Subset(source, evenly(len(source), limit))


def folded(state: State) -> Student:
    """The student as `load_student` would read it: its heads answer in the teachers' own spaces."""
    student = Student(state.student.config)
    student.positions = copy.deepcopy(state.student.positions)
    student.load_state_dict(state.student.state_dict())
    for name, head in student.heads.items():
        state.spaces[name].fold_into(head)
    return student


def distil(name: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """Train a student and measure it on held-out drawings: the figures, and how it got there."""
    claim, cfg = CLAIMS[name], config(name, arm, seed, quick)
    source, held_out, teachers = opened(cfg.teachers, quick, cfg.cache)
    factors = [claim.loud.get(t.name, 1.0) for t in teachers]
    teachers = [changed(t, partial(loud, factor=x)) for t, x in zip(teachers, factors, strict=True)]
    if claim.unenlarged:
        streams = [stream for stage in cfg.stages for stream in stage.streams]
        side = max(side for stream in streams for side in stream.choices)
        source, held_out = large_enough(source, side), large_enough(held_out, side)
    named = {t.name: t for t in teachers}
    reference = extract({"teacher": named}, spread(source, 200))
    if arm in claim.patterned:  # in training alone
        maps = [reference.patches[f"teacher/{t.name}"] for t in teachers]
        stds = [torch.cat([x.flatten(0, 1) for x in its]).std(0) for its in maps]
        pairs = zip(teachers, stds, strict=True)
        teachers = [changed(t, partial(patterned, strength_C=std_C)) for t, std_C in pairs]

    history: list[train.StepReport] = []
    dynamics: list[dict] = []
    lengths: list[int] = []  # patches of all pictures so far
    at = {round(cfg.steps * part) for part in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)}
    states: list[State] = []

    def look(state: State, report: train.StepReport) -> None:
        states[:] = [state]
        history.append(report)
        if report.step not in at:
            return
        models, cost = {"teacher": named, "student": folded(state)}, gflop_of(state.student.config)
        few = extract(models, spread(held_out, 64), size=(claim.sizes[0],) * 2)
        seen = {k: sum(getattr(r, k) for r in history) for k in ("images", "tokens")}
        seen["gflop"] = round(sum(float(cost(n)) for n in lengths))
        dynamics.append({"step": report.step} | seen | variances(reference, few))

    train_and_look(cfg, teachers, source, claim.positions.get(arm), lengths, look)
    student = folded(states[0])
    if (name, arm) == ARM_OF_MERGING:
        path = student_path(name, arm, seed, quick)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_student(student, path)
    figures = final(student, named, source, held_out, reference, claim.sizes)
    return {"figures": course(history, states[0]) | figures, "dynamics": dynamics}


def train_and_look(
    cfg: TrainConfig, teachers: list[Teacher], source: Source, positions: Any, lengths: list[int],
    look: Callable[[State, train.StepReport], None],
) -> None:  # fmt: skip
    """`train.train` in a folder that is thrown away; `look` is called after each step.

    Args: positions: makes the student's of its configuration, or None; lengths: gets the patches of
        all pictures.
    """
    build, settle, save = train.build_student, train.settle, train.save

    def built(*given: Any) -> tuple[Student, set[str]]:
        student, trained_heads = build(*given)
        if positions:
            student.positions = positions(student.config)
        return student, trained_heads

    def settled(job, state, step, parts, norm, counts, micros, targets) -> train.StepReport:
        lengths.extend(n for batch in micros for n in batch.lengths)
        return settle(job, state, step, parts, norm, counts, micros, targets)

    def looked(job, state, report) -> None:
        look(state, report)
        save(job, state, report)

    verbs = mock.patch.multiple(train, build_student=built, settle=settled, save=looked)
    with TemporaryDirectory() as out, verbs:
        cfg = replace(cfg, out=out, save_every=cfg.steps, log_every=cfg.steps, threads=1)
        train.train(cfg, teachers, [source])


@cache
def gflop_of(config: ModelConfig) -> np.poly1d:
    """Of a picture of so many patches, whatever its aspect; `count_flops` is quadratic in them."""
    known = [(n * n, count_flops(config, config.patch * n) / 1e9) for n in (2, 6, 12)]
    return np.poly1d(np.polyfit(*zip(*known, strict=True), 2))


def variances(reference: FeatureSet, test: FeatureSet) -> dict[str, float]:
    """Variance explained of each head and part, "vit-s/patches"; a constant has 0, all is 1."""
    rows = fidelity(reference, test).items()
    parts = {name: row["value"] for name, row in rows if name.startswith("student/")}
    return {k.removeprefix("student/").replace(" ", "/"): v for k, v in parts.items()}


def course(history: list, state: State) -> dict[str, float]:
    """Figures of the second half of the training: what the steps' numbers vary by, and shares.

    "... spread" is the deviation over the mean; "share/TEACHER" is its part of the weighted loss.
    """
    late = history[len(history) // 2 :]
    sums = {name: part_weight(state, name) * sum(report.losses[name] for report in late)
            for name in late[0].losses}  # fmt: skip
    found: dict[str, float] = {}
    for key, what in (("gradient spread", "grad_norm"), ("token spread", "tokens")):
        values = [getattr(report, what) for report in late]
        found[key] = float(np.std(values) / np.mean(values))
    for teacher in state.spaces:
        parts = [value for name, value in sums.items() if name.startswith(f"{teacher}/")]
        found[f"share/{teacher}"] = sum(parts) / sum(sums.values())
    return found


# ------------------------------------------------------------------------------ measuring


def final(student: Student, teachers: dict, train: Source, test: Source, reference: FeatureSet,
          sizes: tuple[int, ...]) -> dict[str, float]:  # fmt: skip
    """The figures of a trained student.

    "SIZE/HEAD/PART"  variance explained
    "worst"           that of the teacher who has least, mean of its parts, at the first size
    "jump"            largest change of a head's patches from a size to the next, mean over heads
    "kNN", "trunk kNN"  20-NN accuracy of the heads' ensemble and of the trunk, 12 labels
    "zero-shot"       nearest class mean of the teacher, mean over heads
    "relation"        rank correlation of the pictures' distances, head and teacher, mean over heads
    """
    models, first = {"teacher": teachers, "student": student}, sizes[0]
    found: dict[str, float] = {}
    for side in sizes:
        few = extract(models, spread(test, 100), size=(side, side))
        found |= {f"{side}/{key}": value for key, value in variances(reference, few).items()}
    found["worst"] = min(mean_of(found, explained(first, name)) for name in teachers)
    curves = [[found[f"{side}/{name}/patches"] for side in sorted(sizes)] for name in teachers]
    jumps = [max((abs(b - a) for a, b in pairwise(curve)), default=0.0) for curve in curves]
    found["jump"] = float(np.mean(jumps))
    train_set, test_set = (extract(models, spread(source, limit), dense=0, size=(first, first))
                           for source, limit in ((train, 1000), (test, 300)))  # fmt: skip
    rows = knn(train_set, test_set)
    one_head = f"student/{next(iter(teachers))}"
    found["kNN"] = rows.get("student/ensemble", rows[one_head])["value"]
    found["trunk kNN"] = rows["student/trunk"]["value"]
    found["zero-shot"] = float(np.mean([zero_shot(train_set, test_set, t) for t in teachers]))
    pairs = [[test_set.summary[f"{model}/{t}"] for model in models] for t in teachers]
    found["relation"] = float(np.mean([relation(*pair) for pair in pairs]))
    return found


def mean_of(figures: dict[str, float], names: tuple[str, ...]) -> float:
    return float(np.mean([figures[name] for name in names]))


def zero_shot(train: FeatureSet, test: FeatureSet, head: str) -> float:
    """Accuracy of the nearest class by cosine; the teacher's class means stand in for texts."""
    names, train_N, test_N = class_ids(train, test)
    teacher_NC = train.summary[f"teacher/{head}"]
    means_KC = torch.stack([teacher_NC[train_N == k].mean(0) for k in range(len(names))])
    scores_NK = test.summary[f"student/{head}"] @ F.normalize(means_KC, dim=1).T
    return float((scores_NK.argmax(1) == test_N).double().mean())


def relation(teacher_NC: Tensor, student_NC: Tensor) -> float:
    """Spearman's rank correlation of the distances of all pairs of pictures."""
    distances = [torch.pdist(x_NC.double()) for x_NC in (teacher_NC, student_NC)]
    ranks = torch.stack([d.argsort().argsort().double() for d in distances])
    return float(torch.corrcoef(ranks)[0, 1])


# ------------------------------------------------------------------------------ merging tokens


def merge(name: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """How much is left of a trained student's map when few tokens stand for it (RADIOv2.5)."""
    path = student_path(*ARM_OF_MERGING, seed, quick)
    if not path.exists():
        raise SystemExit(f"no student of seed {seed}; run: python tests/claims.py modes")
    models = {"student": load_student(path)}
    cfg = config(name, arm, seed, quick)
    train, held_out, _ = opened(cfg.teachers, quick)
    some = [
        spread(large_enough(source, HIGH), limit)
        for source, limit in ((train, 600), (held_out, 300))
    ]
    sets = [extract(models, source, size=(HIGH, HIGH)) for source in some]
    asked, figures, column = questions(*sets), {}, "student/trunk"
    grid = sets[0].patches[column][0].shape[:2]
    for side in (2, 4):
        few = [[reduce_map(x, arm, side) for x in found.patches[column]] for found in sets]
        figures[f"reading 1/{side**2}"] = reading(*few, grid, *asked)["value"]
        back = [replace(found, patches={column: [x[i].unflatten(0, grid) for x, i in part]})
                for found, part in zip(sets, few, strict=True)]  # fmt: skip
        figures[f"patch kNN 1/{side**2}"] = patch_knn(*back, column)
    return {"figures": figures}


def patch_knn(train: FeatureSet, test: FeatureSet, column: str) -> float:
    """Accuracy of single tokens in telling the mask's classes, against 10,000 training tokens."""
    sides = []
    for found in (train, test):
        masks = [torch.from_numpy(np.array(found.samples[i].mask)) for i in found.dense]
        sides.append(token_labels(found.patches[column], masks))
    (bank_MC, bank_M), (test_MC, test_M) = sides
    picks = torch.randperm(len(bank_M), generator=torch.Generator().manual_seed(0))[:10_000]
    votes = knn_votes(bank_MC[picks], bank_M[picks], test_MC, 256)
    return float((votes.argmax(1) == test_M).double().mean())


# ------------------------------------------------------------------------------ sampling


@cache
def summaries(teachers: tuple, quick: bool) -> tuple:
    """Summaries (n, C) by the first teacher and labels as numbers, in training and held out."""
    train, held_out, (teacher, *_) = opened(teachers, quick)
    sets = [extract({"teacher": teacher}, source, dense=0) for source in (train, held_out)]
    _, train_N, test_N = class_ids(*sets)
    (train_NC, test_NC) = (found.summary["teacher"] for found in sets)
    return train_NC, train_N.numpy(), test_NC, test_N


def long_tailed(labels: np.ndarray, rng: np.random.Generator, exponent: float = 1.25) -> tuple:
    """A pool whose label of rank r has about largest / r^exponent pictures; `rng` draws the ranks.

    Returns: pool (rows), and the labels from the most to the least frequent.
    """
    order = rng.permutation(labels.max() + 1)
    largest = float(np.median(np.bincount(labels)))  # a label with fewer gives all that it has
    counts = [max(8, int(largest / rank**exponent)) for rank in range(1, len(order) + 1)]
    pairs = zip(order, counts, strict=True)
    rows = [rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in pairs]
    return np.concatenate(rows), order


def sample(name: str, arm: str, seed: int, quick: bool) -> dict[str, Any]:
    """A sample of a fifth of a long-tailed pool, scored by kNN on the rarer half of the labels."""
    cfg = config(name, arm, seed, quick)
    train_NC, train_N, test_NC, test_N = summaries(cfg.teachers, quick)
    pool, order = long_tailed(train_N, np.random.default_rng(seed))
    x_NC, y_N, target = train_NC[pool], train_N[pool], len(pool) // 5
    levels = [len(pool) // 8, len(pool) // 20, min(16, len(pool) // 40)]
    if arm == "random":
        picks = np.random.default_rng(seed).permutation(len(pool))[:target]
    else:
        tree = hierarchical_kmeans(x_NC, levels, seed)
        tree, weighting = (tree[:1], "equal") if arm == "flat" else (tree, arm)
        picks = balanced_sample(tree, target, seed, weighting=weighting)
    is_rare_N = np.isin(test_N, order[len(order) // 2 :])
    share = np.isin(y_N[picks], order[len(order) // 2 :]).mean()
    figures = {"rare share": float(share), "pool": float(len(pool))}
    for k in (5, 20):
        bank_NC, bank_N = x_NC[picks], torch.from_numpy(y_N[picks])
        votes = knn_votes(bank_NC, bank_N, test_NC, len(order), k)
        hits_N = (votes.argmax(1) == test_N).numpy()
        figures[f"rare {k}-NN"] = float(hits_N[is_rare_N].mean())
        figures[f"all {k}-NN"] = float(hits_N.mean())
    return {"figures": figures}


# ------------------------------------------------------------------------------ the table of claims

CLAIMS: dict[str, Claim] = {
    "arkd": Claim(
        "ARKD against symmetric RKD against none",
        "nano, 300 steps x 32 drawings, 64 px",
        {loss: {"relation": loss} for loss in ("none", "rkd", "arkd")}
        | {"arkd, teacher's mean": {"relation": "arkd", "relation_mean": "teacher"}},
        (
            Effect("zero-shot", ("zero-shot",), "arkd", "none", "+.026 (AMoE Table 4)"),
            Effect("zero-shot", ("zero-shot",), "arkd", "rkd", "+.007 (AMoE Table 4)"),
            Effect("20-NN", ("kNN",), "arkd", "rkd", "+.010 (AMoE Table 4)"),
            Effect("20-NN", ("kNN",), "arkd", "none", "+.001 (AMoE Table 4)"),
            Effect("relation fidelity", ("relation",), "arkd", "none", "no figure"),
            Effect("relation fidelity", ("relation",), "arkd", "rkd", "no figure"),
            # What ARKD divides by is not known to us; the teacher's mean fixes the student's scale.
            *(Effect(what, (key,), "arkd", "arkd, teacher's mean", "no figure") for what, key in
              (("zero-shot", "zero-shot"), ("20-NN", "kNN"), ("relation fidelity", "relation"))),
        ),
        {"steps": 300},
    ),
    "balance": Claim(
        "full packs with per-image means against per-token means and fixed-count batches",
        f"nano, 80 steps x 1,024 tokens, {LOW} and {HIGH} px",
        {
            "image": {"stages": (Stage(1.0, (MIXED,)),)},
            "token": {"stages": (Stage(1.0, (MIXED,)),), "average": "token"},
            "fixed": {"stages": (Stage(1.0, (replace(MIXED, budget=9999),)),), "max_images": 12},
        },
        (
            Effect("EV at low resolution", explained(LOW), "image", "token", "up (AMoE: batching)"),
            Effect("EV at high resolution", explained(HIGH), "image", "token", "no figure"),
            Effect("EV at low resolution", explained(LOW), "image", "fixed", "up (AMoE: batching)"),
            Effect("gradient-norm spread", ("gradient spread",), "token", "image", "no figure"),
            Effect("gradient-norm spread", ("gradient spread",), "fixed", "image", "no figure"),
            Effect("tokens-per-step spread", ("token spread",), "fixed", "image", "no figure"),
        ),
        {"steps": 80, "max_images": 64},
        (LOW, HIGH),
    ),
    "modes": Claim(
        "all teachers at all resolutions against one resolution per teacher",
        f"nano, 80 steps x 28 drawings, {LOW} and {HIGH} px",
        {
            "all": {"stages": (Stage(1.0, (squares(LOW, 16), squares(HIGH, 12))),)},
            "split": {"stages": (Stage(1.0, (squares(LOW, 16, teachers=("vit-s",)),
                                             squares(HIGH, 12, teachers=("mobilenet",)))),)},
        },
        (
            Effect("EV of a head at the size where one arm was not taught",
                   explained(HIGH, "vit-s") + explained(LOW, "mobilenet"), "all", "split",
                   "zero-shot .829 at 512 px, .013 at 768 px without (RADIOv2.1)"),
            Effect("jump of the mode-switch curve", ("jump",), "split", "all", "cured (RADIOv2.5)"),
            Effect("EV of a head at its own size", explained(LOW, "vit-s")
                   + explained(HIGH, "mobilenet"), "all", "split", "no figure"),
        ),
        {"steps": 80},
        CURVE,
    ),
    "phis": Claim(
        "PHI-S against other balancing, one teacher's features 100 times as large",
        "nano, 120 steps x 32 drawings, 64 px, no relational loss",
        {
            "phis": {},
            "none": {"normalizer": "none"},
            "global": {"normalizer": "global"},
            "channel": {"normalizer": "channel"},
            "adaloss": {"normalizer": "none", "balance": "adaloss"},
        },
        (
            Effect("worst teacher's EV", ("worst",), "phis", "none",
                   "rank 2.92, 7.83 (PHI-S)"),
            Effect("worst teacher's EV", ("worst",), "phis", "global", "rank 2.92, 3.81 (PHI-S)"),
            Effect("worst teacher's EV", ("worst",), "phis", "channel", "rank 2.92, 4.21 (PHI-S)"),
            Effect("worst teacher's EV", ("worst",), "phis", "adaloss", "no figure"),
            Effect("the loud teacher's share of the loss", ("share/vit-s",), "none", "phis",
                   "no figure"),
        ),
        {"relation": "none"},
        loud={"vit-s": 100.0},
    ),
    "sampling": Claim(
        "hierarchical against random sampling of a long-tailed pool",
        "a fifth of a Zipf pool of 12 labels of drawings, ViT-S summaries",
        {"random": {}, "flat": {}, "equal": {}, "volume": {}},
        (
            Effect("rare labels, 5-NN", ("rare 5-NN",), "equal", "random", "kNN +.024 (AMoE)"),
            Effect("rare labels, 20-NN", ("rare 20-NN",), "equal", "random", "kNN +.024 (AMoE)"),
            Effect("all labels, 5-NN", ("all 5-NN",), "equal", "random", "kNN +.024 (AMoE)"),
            Effect("rare labels, 5-NN", ("rare 5-NN",), "equal", "flat", "no figure"),
            Effect("rare labels, 5-NN", ("rare 5-NN",), "volume", "random", "ours"),
            Effect("rare labels' share", ("rare share",), "equal", "random", "no figure"),
        ),
        run=sample,
    ),
    "merging": Claim(
        "token merging against pixel unshuffle at equal counts",
        f"600 + 250 drawings of {HIGH} px, 64 tokens, students of `modes`",
        {"merge": {}, "unshuffle": {}, "average": {}},
        (
            Effect("reading, 16 tokens", ("reading 1/4",), "merge", "unshuffle",
                   "+5.9 points, VLM average (RADIOv2.5 Table 1)"),
            Effect("reading, 4 tokens", ("reading 1/16",), "merge", "unshuffle", "no figure"),
            Effect("patch kNN, 16 tokens", ("patch kNN 1/4",), "merge", "unshuffle", "no figure"),
            Effect("reading, 16 tokens", ("reading 1/4",), "merge", "average", "no figure"),
        ),
        run=merge,
    ),
    "replay": Claim(
        "a high-resolution stage with and without low-resolution replay",
        f"nano, 80 steps x 830 tokens at most, first {LOW}, then {HIGH} px",
        {
            "replay": {"stages": (Stage(0.5, (squares(LOW, 16),)),
                                  Stage(1.0, (squares(HIGH, 9), squares(LOW, 14))))},
            "none": {"stages": (Stage(0.5, (squares(LOW, 16),)), Stage(1.0, (squares(HIGH, 12),)))},
        },
        (
            Effect("EV at low resolution", explained(LOW), "replay", "none", "up (AMoE: recipe)"),
            Effect("EV at high resolution", explained(HIGH), "none", "replay", "no figure"),
        ),
        {"steps": 80},
        (LOW, HIGH),
    ),
    "both": Claim(
        "both teachers against each one alone",
        "nano, 120 steps x 32 drawings, 64 px",
        {
            "both": {},
            "vit-s": {"teachers": ("vit-s=builtin:vit-s",)},
            "mobilenet": {"teachers": ("mobilenet=builtin:mobilenet",)},
        },
        (
            Effect("20-NN of the trunk", ("trunk kNN",), "both", "vit-s",
                   "grounding 54.7 against 45.1 (AMoE: grounding)"),
            Effect("20-NN of the trunk", ("trunk kNN",), "both", "mobilenet",
                   "grounding 54.7 against 40.7 (AMoE: grounding)"),
            Effect("EV of ViT-S", explained(64, "vit-s"), "both", "vit-s", "no figure"),
            Effect("EV of MobileNetV2", explained(64, "mobilenet"), "both", "mobilenet",
                   "no figure"),
        ),
    ),
    "experts": Claim(
        "mixture of experts against a dense student with the same active parameters",
        "nano, 120 steps x 32 drawings, 64 px",
        {"moe": {}, "dense": {"model": "nano-dense"}},
        (
            Effect("mean EV", explained(64), "moe", "dense", "no figure at equal active size"),
            Effect("20-NN", ("kNN",), "moe", "dense", "no figure at equal active size"),
        ),
    ),
    "recipe": Claim(
        "the AMoE recipe against the RADIO recipe at equal FLOPs",
        "about 2.8 M active parameters, AdamW for both; AMoE: 210 steps x 16 drawings of their own "
        "shape up to 128 px; RADIO: 200 steps x 16 of 64 px + 8 of 128 px",
        {
            "amoe": {"stages": (Stage(1.0, (Stream("native", 128, budget=1024, packs=1),)),),
                     "steps": 210},
            "radio": {"model": "nano-radio", "relation": "none", "summary_loss": "cosine",
                      "average": "partition",
                      "stages": (Stage(1.0, (squares(64, 16, prefix=6),
                                             squares(128, 8, prefix=6))),)},
        },
        (
            Effect("EV of patches", dense(64, 128), "amoe", "radio", "no figure"),
            Effect("20-NN", ("kNN",), "amoe", "radio", "no figure"),
            Effect("20-NN of the trunk", ("trunk kNN",), "amoe", "radio", "no figure"),
            Effect("zero-shot", ("zero-shot",), "amoe", "radio", "no figure"),
        ),
        {"steps": 200},
        (64, 128),
        unenlarged=False,
    ),
    "rope": Claim(
        "golden RoPE against axial RoPE, on larger pictures than trained on",
        "nano, 120 steps x 32 drawings, 64 px; scored at 128 and 192 px",
        {"golden": {}, "axial per patch": {}, "axial": {}},
        (
            Effect("EV of patches at 2x and 3x", dense(128, 192), "golden", "axial per patch",
                   "coherent at 2048 px (AMoE Fig. 3)"),
            Effect("EV of patches at 2x and 3x", dense(128, 192), "golden", "axial", "no figure"),
            Effect("EV of patches at the trained size", dense(64), "golden", "axial per patch",
                   "no figure"),
            Effect("EV of patches at the trained size", dense(64), "golden", "axial", "no figure"),
        ),
        sizes=(64, 128, 192),
        positions={"axial per patch": partial(Axial, per_patch=True),
                   "axial": partial(Axial, per_patch=False)},
    ),
    "shift": Claim(
        "shift-equivariant loss against plain MSE, teachers with a fixed pattern",
        "nano, 120 steps x 20 drawings, 96 px of 6 x 6 patches, live teachers, moves of N(0, .5)",
        {"shift": {"shift": 0.5}, "plain": {}},
        (
            Effect("EV of the clean patches", dense(96), "shift", "plain",
                   "pattern not learnt (C-RADIOv4 Eq. 1)"),
            Effect("20-NN of the trunk", ("trunk kNN",), "shift", "plain", "no figure"),
        ),
        {"stages": (Stage(1.0, (squares(96, 20),)),), "max_images": 32, "cache": "none"},
        (96,),
        patterned=("shift", "plain"),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------ running


def rows_of(name: str, folder: Path, quick: bool = False) -> list[dict]:
    """The runs of a claim as it is defined now; lines of another configuration do not count."""
    path, arms = folder / f"{name}.jsonl", CLAIMS[name].arms
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = [row for row in rows if row["arm"] in arms]
    return [row for row in known if row["mark"] == mark(name, row["arm"], row["seed"], quick)]


def run_claim(name: str, seeds: int, folder: Path = FOLDER, quick: bool = False) -> None:
    """Run what is missing of a claim, seed by seed, and append a line for each run."""
    run = CLAIMS[name].run or distil
    done = {(row["arm"], row["seed"]) for row in rows_of(name, folder, quick)}
    todo = [(arm, seed) for seed in range(seeds) for arm in CLAIMS[name].arms]
    folder.mkdir(parents=True, exist_ok=True)
    for arm, seed in tqdm([one for one in todo if one not in done], name, unit="run"):
        began = time.monotonic()
        row = {"claim": name, "arm": arm, "seed": seed, "mark": mark(name, arm, seed, quick)}
        row |= run(name, arm, seed, quick)
        row["seconds"] = time.monotonic() - began
        with (folder / f"{name}.jsonl").open("a") as file:
            short = json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 5))
            file.write(json.dumps(short, allow_nan=False) + "\n")


def measure(effect: Effect, rows: list[dict]) -> dict[str, float]:
    """An effect, paired by seed: its mean and 95 % interval by bootstrap over the seeds."""
    by_arm: dict[str, dict[int, float]] = {effect.arm: {}, effect.other: {}}
    for row in rows:
        if row["arm"] in by_arm:
            by_arm[row["arm"]][row["seed"]] = mean_of(row["figures"], effect.figures)
    seeds = sorted(by_arm[effect.arm].keys() & by_arm[effect.other].keys())
    differences = [by_arm[effect.arm][seed] - by_arm[effect.other][seed] for seed in seeds]
    if len(seeds) < 2:
        return {"n": len(seeds)}
    return bootstrap(torch.tensor(differences)[:, None], lambda means_1: means_1[..., 0])


def verdict(found: dict[str, float]) -> str:
    """What an effect says of the claim; else the smallest effect that could have been seen."""
    if found["low"] > 0:
        return "shown"
    if found["high"] < 0:
        return "the opposite"
    return f"not shown; could see {(found['high'] - found['low']) / 2:.3f}"


# Their arms ran with a relational loss without its own mean's gradient, PHI-S fitted to other maps
# than the losses see, other shifts, or designs that could not answer: no figure of theirs counts.
BEING_REDONE = ("arkd", "both", "sampling", "phis", "shift", "experts")


def table(folder: Path = FOLDER, primary: bool = False) -> str:
    """The claims' effects as markdown, or each one's first; one without runs is named as such."""
    lines = ["| claim | effect | paper | ours, 95 % interval | verdict | seeds | minutes |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    notes = []
    for name, claim in CLAIMS.items():
        rows = rows_of(name, folder)
        if name in BEING_REDONE and folder == FOLDER:
            lines.append(f"| {claim.question} | | | | being redone | | |")
            continue
        if not rows:
            lines.append(f"| {claim.question} | | | not run yet | | | |")
            continue
        notes.append(f"`python tests/claims.py {name}`: {claim.scale}.")
        minutes = f"{sum(row['seconds'] for row in rows) / 60:.0f}"
        for number, effect in enumerate(claim.effects[:1] if primary else claim.effects):
            found = measure(effect, rows)
            shown = (
                "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found) if "low" in found else ""
            )
            lines.append(
                f"| {claim.question if number == 0 else ''} | {effect.what}: {effect.arm} - "
                f"{effect.other} | {effect.paper} | {shown} | {verdict(found) if shown else ''} "
                f"| {found['n']} | {minutes if number == 0 else ''} |"
            )
    lines += [f"| {question} | | | not run yet | | | |" for question in NOT_RUN]
    return "\n".join(lines if primary else [*lines, "", *notes])


# ------------------------------------------------------------------------------ figures


def draw(folder: Path = FOLDER) -> Path:
    """Which teacher is learnt when, the mode-switch curve, and ARKD's asymmetry, as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    runs = [row["dynamics"] for row in rows_of("arkd", folder) if row["arm"] == "arkd"]
    for name in [key.partition("/")[2] for key in explained(64)] if runs else []:
        values = np.mean([[look[name] for look in run] for run in runs], 0)
        left.plot([look["images"] for look in runs[0]], values, marker=".", label=name)
    left.set(xscale="log", xlabel="images seen", title="variance explained: who is learnt when")
    for arm, style in {"split": "--", "all": "-"}.items():
        figures = [row["figures"] for row in rows_of("modes", folder) if row["arm"] == arm]
        for colour, head in enumerate(("vit-s", "mobilenet")):
            curve = [[f[f"{side}/{head}/patches"] for side in sorted(CURVE)] for f in figures]
            label = f"{head}, {'one size' if arm == 'split' else 'all sizes'}"
            if curve:
                middle.plot(
                    sorted(CURVE), np.mean(curve, 0), style, color=f"C{colour}", label=label
                )
    middle.set(xlabel="input size, px", title=f"patches; taught at {LOW} and {HIGH} px")
    for kind, (near, far) in {"near": (1.0, 1.5), "far": (1.5, 1.0)}.items():
        sides = np.linspace(0.05, 1.95, 96)
        pairs = [(triangle(side, far), triangle(near, far)) for side in sides]
        values = [losses.arkd(*pair, "teacher").item() for pair in pairs]  # the scale stays
        right.plot(sides, values, label=f"{kind} pair, teacher's distance {near}")
    right.set(xlabel="student's distance of the pair", title="ARKD of one pair, all else equal")
    for axis in (left, middle, right):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path = folder.parent / "claims.png"
    figure.savefig(path, dpi=110)
    return path


def triangle(base: float, leg: float) -> Tensor:
    """Three points (3, 2): two at a distance of `base`, and both at `leg` from the third."""
    height = (leg**2 - base**2 / 4) ** 0.5
    return torch.tensor([[-base / 2, 0], [base / 2, 0], [0, height]])


# ------------------------------------------------------------------------------ a small reader


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


def reading(train: Sequence, test: Sequence, grid: Any, train_NQ: Tensor, test_NQ: Tensor) -> dict:
    """Share of questions that a trained `Reader` answers right on held-out pictures.

    Args:
        train, test: (tokens (K, C), index (h w,)) of each picture, see `reduce_map`. A token also
            carries the mean row and column of its members, as a prompt's order would tell.
    """
    place_P2 = torch.cartesian_prod(*(torch.linspace(-1, 1, n) for n in grid))

    def placed(tokens_KC: Tensor, index_P: Tensor) -> Tensor:
        sums_K2 = torch.zeros(len(tokens_KC), 2).index_add_(0, index_P, place_P2)
        return torch.cat([tokens_KC, sums_K2 / index_P.bincount()[:, None]], 1)

    train_NKC, test_NKC = (torch.stack([placed(*one) for one in side]) for side in (train, test))
    mean_C, scale_C = train_NKC.mean((0, 1)), train_NKC.std((0, 1)).clamp_min(1e-6)
    reader = train_reader((train_NKC - mean_C) / scale_C, train_NQ)
    with torch.no_grad():
        logits = reader((test_NKC - mean_C) / scale_C)
    is_asked_NQ = test_NQ >= 0
    is_right_NQ = torch.stack([x.argmax(1) for x in logits], 1).eq(test_NQ) & is_asked_NQ
    parts_NP = torch.stack([is_right_NQ.sum(1), is_asked_NQ.sum(1)], 1)
    return bootstrap(
        parts_NP, lambda means: means[..., 0] / means[..., 1], why="no question has an answer"
    )


def train_reader(tokens_NKC: Tensor, answers_NQ: Tensor, steps: int = 300) -> Reader:
    """Fit a `Reader` by AdamW; unanswered questions (-1) teach nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = Reader(tokens_NKC.shape[-1], (answers_NQ.amax(0) + 1).clamp_min(1).tolist())
    adam, generator = torch.optim.AdamW(reader.parameters(), 1e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(answers_NQ), (64,), generator=generator)
        pairs = zip(reader(tokens_NKC[rows]), answers_NQ[rows].T, strict=True)
        losses = [F.cross_entropy(x, y, ignore_index=-1, reduction="sum") for x, y in pairs]
        adam.zero_grad()
        (torch.stack(losses).sum() / len(rows)).backward()
        adam.step()
    return reader


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=[*CLAIMS, "all", "table", "figures"])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm [5]")
    parser.add_argument("--quick", action="store_true", help="two steps, tiny teachers, not kept")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that two claims can run side by side on two cores
    if args.what == "table":
        page = FOLDER.parent / "claims.md"
        _, heading, remarks = page.read_text().partition("## Remarks")  # written by hand
        page.write_text(f"# Do the claims hold?\n\n{table()}\n\n{heading}{remarks}")
        print(table(primary=True))
    elif args.what == "figures":
        print(draw())
    names = list(CLAIMS) if args.what == "all" else [args.what] if args.what in CLAIMS else []
    with TemporaryDirectory() as scratch:
        for name in names:
            run_claim(name, args.seeds, Path(scratch) if args.quick else FOLDER, args.quick)


if __name__ == "__main__":
    main()
