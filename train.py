"""Agglomerative distillation: one packed student learns from several frozen teachers at once.

    torchrun train.py                                  # the demo: two real teachers, minutes
    torchrun --nproc-per-node 2 train.py --preset debug
    python -c 'from train import PRESETS, run; run(PRESETS["debug"])'

Reading path: `TrainConfig` and `RECIPES` say what a run is. `train` is all of it on one page:
per-image feature losses in PHI-S space, averaged over the images of the *global* batch, plus ARKD
between the summaries of all images on all ranks. What it calls follows, from the data to the step.
AMoE, arXiv 2512.20157; RADIOv2.5, arXiv 2412.07679; PHI-S, arXiv 2410.01680.

Legend: B images, M packed patches, R registers, C teacher width, L layers, E experts, S streams of
a stage, K images that a teacher supervises.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import losses
import model
import packing
from eval import (
    at_size,
    extract,
    final_report,
    finite,
    first_pictures,
    format_table,
    knn,
    pca_sheet,
    random_control,
)
from model import MODELS, ModelConfig, Student, StudentOutput, load_student
from packing import Group, Number, PackedBatch, Source, Stage, StepData, Stream, rank_and_world
from teachers import (
    CachedTeacher,
    Teacher,
    TeacherOutput,
    fill_caches,
    load_backbone,
    load_teacher,
    need,
    parse_teacher,
    sha256_of,
)

AVERAGES = ("image", "partition", "token")  # AMoE's, RADIOv2.5's, and the ablation
SUMMARY_KINDS: Any = ChainMap(losses.KINDS, {"angle": losses.angle_loss})  # live: one may be added
POSITIVE, COUNT = Number(int, 1), Number(int, 0)
RATE, SOME = Number(float, 0), Number(float, 0, 1e9, above=True)
SHARE, PART = Number(float, 0, 1), Number(float, 0, 1, below=True)

# ---- Part I, the papers: the recipe


def option(default, help: str, takes: Collection[str] | Number | None = None, **metadata) -> Any:
    """A config field with its help and flag; `takes`: what each of its values may be."""
    return field(default=default, metadata={"help": help, "takes": takes, **metadata})


control = partial(option, control=True)  # may change on resume, or is compared by its content


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; each field is a flag of the command line."""

    preset: str = control("demo", "name of the preset that the other flags change")
    data: tuple[str, ...] = control(("openmoji",), "SOURCEs: openmoji, a folder, tars, an index")
    data_weights: tuple[float, ...] = option((), "share of each SOURCE (default: by size)", SOME)
    teachers: tuple[str, ...] = control(
        ("vit-s=builtin:vit-s", "mobilenet=builtin:mobilenet"), "NAME=PATH[@layer] or PATH of each"
    )
    model: str = option("nano", "student, a key of model.MODELS; init: the sizes of --init")
    init: str = control("", "[NAME=]PATH[@layers] to start from: a ViT, DINOv2 or our checkpoint")
    head_hidden: int = option(0, "hidden width of heads; 0: the teacher's, RADIO form 1024", COUNT)
    windows: bool = option(True, "RADIO form: random windows of the position table")
    pool: bool = option(True, "SigLIP: its frozen pooling head makes the summary (AMoE)")
    out: str = control("", "run folder (default runs/<preset>)")
    steps: int = option(1000, "optimizer steps", POSITIVE)
    seed: int = option(0, "seed of weights, order and augmentation", Number(int, 0, 2**63 - 1))
    resume: str = control("auto", "auto, none, or a checkpoint folder")
    save_every: int = control(150, "steps between checkpoints", POSITIVE)
    keep: int = control(3, "newest checkpoints that are kept", POSITIVE)
    keep_every: int = control(0, "also keep each that is a multiple of so many steps", COUNT)
    log_every: int = control(10, "steps between lines of metrics.jsonl", POSITIVE)
    evaluate_every: int = control(0, "steps between evaluations (kNN, pca.png); 0: none", COUNT)
    workers: int = control(0, "loader processes per rank; 0 loads in the main one", COUNT)
    threads: int = control(0, "torch threads per rank; 0 shares the cores evenly", COUNT)
    pg_timeout: float = control(600.0, "seconds that a rank waits for the others", SOME)
    max_bad_frac: float = control(0.1, "share of pictures that may fail to decode", SHARE)
    cache: str = control("auto", "folder of features; auto: user cache; none: live teachers")
    held_out: float = option(0.15, "share of each SOURCE's pictures held out of training", PART)
    stages: tuple[Stage, ...] = option((Stage(1.0, (Stream("native"),)),), "by preset", flag=False)
    max_images: int = option(16, "images in a pack at the most (AMoE: batching)", POSITIVE)
    global_tokens: int = option(0, "tokens of a step; 0: the packs of the preset", COUNT)
    micro_packs: int = control(0, "packs of a forward; 0: all, on CUDA all that fit", COUNT)
    patch_loss: str = option("mse", "feature loss of patches and registers", losses.KINDS)
    summary_loss: str = option("mse", "feature loss of summaries", SUMMARY_KINDS)
    # A fixed pattern of a teacher can't be learnt where each sees another view (C-RADIOv4 Eq. 1).
    shift: float = option(
        0.0, "deviation of the views' moves, in patches (C-RADIOv4: 0.5); needs --cache none", RATE
    )
    relation: str = option("arkd", "relational loss of summaries", ("arkd", "rkd", "none"))
    relation_mean: str = option("own", "whose mean divides the student's", ("own", "teacher"))
    relation_weight: float = option(1.0, "weight of the relational loss (AMoE: 1)", RATE)
    average: str = option("image", "weigh images alike, in each stream, or by tokens", AVERAGES)
    balance: str = option("none", "weights of the losses: 1, or AdaLoss'", ("none", "adaloss"))
    normalizer: str = option("phis", "space of the targets", losses.NORMALIZERS)
    stats_steps: int = option(30, "first steps of a stage that fit its targets' space", POSITIVE)
    frozen_steps: int = option(0, "first steps that train heads alone (RADIOv2.5: 5000)", COUNT)
    optimizer: str = option("adamw", "RADIOv2.5: lamb; or muon", ("adamw", "lamb", "muon"))
    lr: float = option(1.5e-3, "peak learning rate", SOME)
    trunk_lr: float = option(1.0, "the trunk's learning rate as a share of the heads'", RATE)
    min_lr: float = option(0.02, "last learning rate as a share of the peak", SHARE)
    warmup: int = option(50, "steps of linear warm-up, --steps at the most", COUNT)
    weight_decay: float = option(0.05, "decay of matrices; vectors and scalars have none", RATE)
    beta2: float = option(0.95, "second-moment decay of the optimizer", PART)
    clip: float = option(1.0, "gradient norm limit; 0: none", RATE)
    ema: float = option(0.0, "decay of the weights' running mean, then saved; 0: none", PART)
    router_rate: float = option(1e-3, "step of experts' bias (AMoE release: balancing)", RATE)
    parallel: str = control("ddp", "copies of the weights, or shards (FSDP2)", ("ddp", "fsdp"))
    device: str = control("auto", "auto: cuda if there is one", ("auto", "cpu", "cuda"))
    deterministic: bool = control(False, "ask torch for the same bits in every run on CUDA")
    precision: str = option("auto", "auto: bf16 where fast, else fp32", ("auto", "fp32", "bf16"))
    recompute: bool = control(False, "activation checkpointing: less memory, a third more time")
    compile: bool = control(False, "torch.compile each block")

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.preset}")
        check(self)

    def stage_bounds(self) -> list[tuple[int, int]]:
        """Steps [start, stop) of each stage."""
        stops = [round(stage.until * self.steps) for stage in self.stages]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def identity(self) -> dict:
        """The fields that decide the run's numbers, as JSON: what a resumed run must share."""
        controls = {f.name for f in dataclasses.fields(self) if f.metadata.get("control")}
        given = json.loads(json.dumps(dataclasses.asdict(self)))
        return {name: value for name, value in given.items() if name not in controls}


# RADIOv2.5: teachers, sizes, batch, steps, LAMB, learning rate, decay, statistics and frozen steps
# are the papers'; warm-up, clipping and the second beta are ours. Pictures are squares of the
# stage's side, 16 or 2 to a pack (16 * (16 * 16 + 8) = 4224 tokens, and so on).
_RADIO: dict[str, Any] = dict(
    teachers=("clip=apple/DFN5B-CLIP-ViT-H-14-378", "siglip=google/siglip-so400m-patch14-384",
              "dino_v2=facebook/dinov2-with-registers-giant", "sam=facebook/sam-vit-huge"),
    model="radio-h", steps=300_000, summary_loss="cosine", relation="none", average="partition",
    stats_steps=3000, frozen_steps=5000, optimizer="lamb", lr=1e-3, min_lr=0.0, weight_decay=0.02,
    beta2=0.999, warmup=1000, cache="none", workers=8, parallel="fsdp", recompute=True,
    save_every=1000, evaluate_every=10_000, held_out=1e-4,
)  # fmt: skip
_RADIO_LOW = Stream("low", choices=(432,), budget=16 * 737, packs=64)

# AMoE: teachers, sizes, steps, kinds of streams and the pack of 2304 + 5 tokens are the paper's;
# 1.6 M tokens a step follow from its totals. The rest is ours, and so is each stream's share.
# Stage 2 takes --data LOW HIGH: the replay from LOW, large pictures from HIGH.
_AMOE: dict[str, Any] = dict(
    teachers=("siglip2=google/siglip2-so400m-patch16-naflex",
              "dinov3=facebook/dinov3-vitl16-pretrain-lvd1689m"),
    model="amoe-0.3b", stats_steps=300, lr=1e-3, warmup=1000, cache="none", workers=8,
    recompute=True, save_every=1000, evaluate_every=10_000, held_out=1e-4,
)  # fmt: skip


RECIPES: dict[str, dict[str, Any]] = {  # what each preset changes of the defaults
    # Low resolution first, as both papers: a picture of 64^2 px has a tenth of the tokens of 224^2.
    # The budgets are those of the 16 pictures that a pack may hold.
    "demo": dict(steps=400, head_hidden=384, optimizer="muon", lr=5e-3, warmup=25, stats_steps=15,
                 stages=(
        Stage(0.5, (Stream("native", max_side=64, budget=336, packs=4),)),
        Stage(0.85, (Stream("native", max_side=96, budget=656, packs=4),)),
        Stage(1.0, (Stream("native", max_side=224, budget=1200, packs=4),)),
    )),
    # RADIO's way: from a pretrained network on, the trunk at 3e-5 at most (2e-4 makes it forget).
    "warm": dict(model="init", init="vit-s=builtin:vit-s@8", relation="none", steps=400, lr=1e-3,
                 frozen_steps=200, trunk_lr=0.03, warmup=20, windows=False, head_hidden=384,
                 stages=(Stage(1.0, (Stream("native", max_side=112, budget=16 * 66),)),)),
    "debug": dict(teachers=("dense=builtin:tiny-dense", "semantic=builtin:tiny-semantic"), steps=40,
                  model="test", data=("openmoji:train:96",), warmup=5, stats_steps=4, save_every=20,
                  log_every=5, cache="none",
                  stages=(Stage(1.0, (Stream("native", max_side=96, budget=256),)),)),
    "amoe-stage1": _AMOE | dict(steps=50_000, stages=(
        Stage(1.0, (Stream("low", max_side=256, budget=2309, packs=704),)),)),
    "amoe-stage2": _AMOE | dict(steps=90_000, data=("openmoji", "openmoji"), stages=(Stage(1.0, (
        Stream("replay", max_side=256, budget=2309, packs=128, data=(0,)),
        Stream("middle", min_side=256, max_side=384, budget=2309, packs=128, data=(0,)),
        Stream("high-256", max_side=256, budget=2309, packs=64, data=(1,)),
        Stream("high-512", max_side=512, budget=2309, packs=128, data=(1,)),
        Stream("high", max_side=768, budget=2309, packs=256, data=(1,)),
    )),)),
    "radio-stage1": _RADIO | dict(stages=(
        Stage(1.0, (Stream("low", choices=(256,), budget=16 * 264, packs=64),)),)),
    "radio-stage2": _RADIO | dict(stages=(Stage(1.0, (_RADIO_LOW,)),)),
    "radio-stage3": _RADIO | dict(stages=(
        Stage(1.0, (_RADIO_LOW, Stream("high", choices=(1024,), budget=2 * 4104, packs=64))),)),
}  # fmt: skip

# ---- The run on one page

Streams = Sequence[Stream]
Teachers = Sequence[Teacher]
Spaces = dict[str, losses.TargetSpace]  # of each teacher's targets
Parts = dict[str, Tensor]  # of the loss, "TEACHER/PART"
Targets = dict[str, TeacherOutput]  # of each teacher, for the pictures of a micro-batch
Weights = dict[str, "ImageWeights"]  # of each teacher, for the same


@dataclass
class State:
    """What a step changes, and the configuration by which it does."""

    cfg: TrainConfig
    student: Student
    replica: Any  # the student as the ranks share it
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor]  # the weights' running mean; empty without --ema
    spaces: Spaces
    ada: losses.AdaLoss


def train(
    cfg: TrainConfig, teachers: Teachers, sources: list[Source], held_out: Source | None = None
) -> Job:
    """Distil the teachers into a student, from its first step or its newest checkpoint to the last.

    Args:
        teachers: frozen; the student gets a head for each.
        sources: the pictures of each --data SOURCE that are trained on.
        held_out: pictures for --evaluate-every; None: there is no such evaluation.
    Returns: what the run leaves behind.
    Raises: Standstill where training must not go on; SystemExit when it was told to stop.
    """
    job = open_run(cfg, teachers, sources, held_out)
    group, device = job.group, job.group.device

    # The student: random by the seed, or from --init. Heads that come trained answer in their
    # teachers' own spaces.
    student, trained_heads = build_student(job.origin, teachers)
    student.to(device)
    # Data: which pictures a step sees is a function of the seed and the step's number alone.
    stages = make_stages(cfg, sources, student.config, group, teachers)
    # The optimizer holds what this rank holds: all of the student, or its shards.
    replica = distribute(cfg, student, group)
    optimizer = make_optimizer(cfg, student)
    average = {name: p.detach().clone() for name, p in trained(student) if cfg.ema}
    spaces = new_spaces(cfg, teachers, device)
    state = State(cfg, student, replica, optimizer, average, spaces, losses.AdaLoss())
    start = resume(job, state, stages)

    for (first, last), data in zip(cfg.stage_bounds(), stages, strict=True):
        if start >= last:
            continue
        begin = max(start, first)
        if begin == first:
            # Targets: how a teacher's features vary depends on the resolution, so each stage has
            # its own PHI-S, estimated before its first step; the heads move along.
            fitted = fit_spaces(cfg, teachers, data, device)
            carry_heads(state, fitted, None if first else trained_heads)
        size = 0  # packs of a forward, found at the stage's first step
        steps = begin - first, last - first
        loader = packing.make_loader(data, *steps, cfg.workers, device.type == "cuda")
        for step, packs in enumerate(loader, begin + 1):
            # RADIO trains new heads alone at first, lest they spoil a pretrained trunk.
            student.frozen_trunk = step <= cfg.frozen_steps
            # Gradient accumulation: one optimizer step of several forwards. Pack by pack to the
            # device, as they are pinned.
            packs = [pack.to(device) for pack in packs]
            size = size or packs_of_a_forward(state, data.streams, len(packs), device)
            micros = [PackedBatch.cat(packs[i : i + size]) for i in range(0, len(packs), size)]
            targets = [targets_of(teachers, spaces, batch) for batch in micros]
            weights = image_weights(cfg, teachers, data.streams, micros)
            optimizer.zero_grad(set_to_none=True)

            # ARKD compares every image with every other of the global batch, so its gradient is
            # taken first, on detached summaries of all micro-batches and ranks; it then enters
            # each backward as <summary, gradient>. Several micro-batches take a forward more.
            only = forward(state, step, micros[0]) if len(micros) == 1 else None
            parts: Parts = {}
            pulls: dict[str, list[Tensor]] = {}
            if cfg.relation != "none":
                with torch.no_grad():
                    said = [(only or forward(state, step, batch)).summary for batch in micros]
                parts, pulls = relation_gradients(cfg, said, targets, weights)

            # Forward and backward of each micro-batch, by the weights of the whole step.
            counts: list[Tensor] = []
            for i, batch in enumerate(micros):
                with gradient_sync(replica, is_last=i == len(micros) - 1):
                    out = only or forward(state, step, batch)
                    mine = feature_losses(state, out, batch, targets[i], weights[i])
                    loss = torch.stack([part_weight(state, n) * x for n, x in mine.items()]).sum()
                    for name, grads_BC in pulls.items():
                        pull = (out.summary[name] * grads_BC[i]).sum()
                        loss = loss + part_weight(state, f"{name}/relation") * pull
                    # DDP and FSDP2 average gradients over the ranks; the shares are to be summed.
                    (loss * group.world).backward()
                for name, value in mine.items():
                    parts[name] = parts.get(name, 0) + value.detach()
                if out.counts_LE is not None:
                    counts.append(out.counts_LE)

            # The norm is logged also where nothing is clipped: it tells of trouble before the loss.
            norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip or math.inf)
            # All ranks' numbers, in the step's one wait for the device; stops where one is not
            # finite, with nothing stepped.
            report = settle(job, state, step, parts, norm, counts, micros, targets)
            report.lr = set_lr(cfg, optimizer, step)
            optimizer.step()
            update_average(state, step)
            # Experts with more than their share get a lower bias (auxiliary-loss-free balancing).
            if counts and not student.frozen_trunk:
                student.update_router(report.loads_LE, cfg.router_rate)
            state.ada.update(report.losses)
            log(job, report)
            save(job, state, report)
    return job


# ---- Where the student comes from


def build_student(cfg: TrainConfig, teachers: Teachers) -> tuple[Student, set[str]]:
    """The student before step 1, and the names of the heads that already answer in teacher space.

    It depends on the configuration and the files alone. Raises: ValueError if --init does not fit.
    """
    given = read_init(cfg) if cfg.init else None
    base = given.config if given and cfg.model == "init" else MODELS[cfg.model]
    heads = [head_spec(cfg, base, teacher, given) for teacher in teachers]
    torch.manual_seed(cfg.seed)  # the same weights on every rank
    if given and cfg.model == "init" and given.heads:  # other teachers, the same network
        config = model.with_other_heads(base, heads)
    else:  # RADIOv2.5: a CLS token for each
        base = dataclasses.replace(base, cls_tokens=2) if given and cfg.model == "init" else base
        config = model.with_heads(base, heads)
    student = Student(config)
    for teacher in teachers:
        if student.heads[teacher.name].spec.pool:
            model.copy_pool(student.heads[teacher.name].pool, teacher.backbone.network.head)
    if not given:
        return student, set()
    kept = model.load_pretrained(student, given)
    note_heads(cfg.init, kept, {*student.heads}, {*given.heads})
    return student, kept


def head_spec(cfg: TrainConfig, base: ModelConfig, teacher: Teacher, given: Any) -> model.HeadSpec:
    """The head for a teacher: that of --init if it fits, else AMoE's adapter with foldable outputs,
    or RADIO's two MLPs."""
    name, dim, summary_dim = teacher.name, teacher.dim, teacher.summary_dim
    for spec in given.config.heads if given and given.config.form == base.form else ():
        # one that upsamples starts anew: losses compare a patch with a patch
        if (spec.name, spec.dim, spec.summary_dim, spec.upsample) == (name, dim, summary_dim, 1):
            return model.foldable(spec)
    kind: dict[str, Any] = {"hidden": cfg.head_hidden or 1024}
    if base.form == "radio":
        kind |= {"summary_hidden": kind["hidden"], "in_trunk_summary": summary_dim is not None}
        return model.RadioSpec(name, dim, summary_dim, **kind)
    kind = {"hidden": cfg.head_hidden, "bias": True}
    pool: Any = getattr(teacher.backbone.network, "head", None) if cfg.pool else None
    if hasattr(pool, "probe"):
        kind |= {"pool_hidden": pool.mlp.fc1.out_features, "pool_heads": pool.attention.num_heads}
        return model.AdapterSpec(name, dim, dim, pool=True, pool_eps=pool.layernorm.eps, **kind)
    # Registers are matched one to one, so there must be as many (AMoE: DINOv3's 4).
    has_registers = teacher.registers == base.registers > 0
    if teacher.registers and not has_registers:
        say(
            f"teacher {name} has {teacher.registers} registers, the student {base.registers}: they "
            "are matched one to one, so these have no loss; it takes a --model with as many"
        )
    return model.AdapterSpec(name, dim, summary_dim, registers=has_registers, split=True, **kind)


# ---- What a stage's steps see


def make_stages(
    cfg: TrainConfig, sources: list[Source], config: ModelConfig, group: Group, teachers: Teachers
) -> list[StepData]:
    """One `StepData` per stage, each with an epoch 0 of its own.

    What live teachers see of a picture is made in the loader's workers, which then keep it.
    """
    live = {t.name: t.size_for for t in teachers if not isinstance(t, CachedTeacher)}
    shares = cfg.data_weights or tuple(float(len(s)) for s in sources)
    mix = list(zip(sources, shares, strict=True))
    stages = []
    for number, stage in enumerate(cfg.stages):
        often = times(cfg, stage, group.world)
        streams = [dataclasses.replace(s, packs=s.packs * often) for s in stage.streams]
        # Another seed, or a stage would begin with the pictures of the one before.
        order = config.patch, config.prefix, cfg.seed + number, group.rank, group.world
        stages.append(StepData(streams, mix, *order, cfg.max_images, cfg.shift, live))
    return stages


# ---- The targets' spaces, and heads that move with them


def new_spaces(cfg: TrainConfig, teachers: Teachers, device: torch.device) -> Spaces:
    """A space for each teacher's targets, fitted to nothing yet."""
    spaces = {}
    for t in teachers:
        space = losses.TargetSpace(cfg.normalizer, t.dim, t.summary_dim, cfg.summary_loss)
        spaces[t.name] = space.to(device)
    return spaces


def fit_spaces(cfg: TrainConfig, teachers: Teachers, data: StepData, device: Any) -> Spaces:
    """Spaces fitted to the pictures of a stage's first steps, as its losses will see them.

    PHI-S estimates them over 3,000 steps, in which the heads chase a moving rotation (its Table
    10). We estimate before the first, which costs the teachers alone and keeps the targets still.
    Raises: Standstill where nothing can be read, or features are not finite.
    """
    spaces = new_spaces(cfg, teachers, device)
    steps = data.steps_in(0, cfg.stats_steps)
    loader = packing.make_loader(data, 0, steps, cfg.workers, device.type == "cuda")
    counts = torch.zeros(1 + len(teachers), dtype=torch.int64)  # broken; seen by each
    for packs in packing.progress(loader, "teacher statistics", total=steps):
        batch = PackedBatch.cat([pack.to(device) for pack in packs])
        seen = [supervised(t.name, data.streams, batch) for t in teachers]
        counts += torch.tensor([len(batch.skipped), *map(len, seen)])
        for teacher, own in zip(teachers, seen, strict=True):
            target = ask(teacher, batch, own)
            try:
                spaces[teacher.name].update(target, [batch.grids[i] for i in own])
            except ValueError as error:
                raise Standstill(f"statistics of teacher {teacher.name}: {error}") from error
    bad, *good = sum_over_ranks(counts.to(device)).tolist()
    if not all(good):
        raise Standstill(f"none of the {bad} pictures of the first steps could be read")
    for space in spaces.values():
        space.synchronize()
    return spaces


@torch.no_grad()
def carry_heads(state: State, fitted: Spaces, trained_heads: set[str] | None) -> None:
    """Move heads and their running means into new spaces: they answer as before (a collective).

    The optimizer's moments and AdaLoss' means stay: both forget the old space soon enough.

    Args: trained_heads: before step 1, the heads that answer in their teachers' own spaces; the
        others are new. None later: all answer in the spaces so far.
    """
    for name, head in state.student.heads.items():
        params = dict(head.named_parameters())
        # a frozen pool has no running mean
        means = {n: state.average.get(f"heads.{name}.{n}", p) for n, p in params.items()}
        for tensors in [params, means] if state.average else [params]:
            with torch.device("meta"):
                moved = type(head)(head.spec, state.student.config.dim)
            # whole, where ranks hold shards, and rounded once
            copy = {n: whole(x.detach()).cpu().double() for n, x in tensors.items()}
            moved.load_state_dict(copy, assign=True)
            if trained_heads is None:
                state.spaces[name].fold_into(moved)
            elif name not in trained_heads:
                fitted[name].fold_into(moved, is_new=True)
            fitted[name].unfold_from(moved)
            for n, x in tensors.items():
                new = moved.get_parameter(n).detach().to(x.device, x.dtype)
                if dist.is_initialized():  # unequal machines round differently
                    dist.broadcast(new, 0)
                x.copy_(spread(new, x))
    state.spaces.update(fitted)


def targets_of(teachers: Teachers, spaces: Spaces, batch: PackedBatch) -> Targets:
    """What the teachers say of a batch's pictures, in the spaces of the losses."""
    raw = {t.name: ask(t, batch, range(len(batch))) for t in teachers}
    return {name: spaces[name](target, batch.grids) for name, target in raw.items()}


# ---- A step's losses


class ImageWeights(NamedTuple):
    """What each image of a micro-batch counts in a teacher's losses."""

    summary_B: Tensor
    patch_B: Tensor
    is_taught: list[float]  # 0 where the teacher does not supervise the image's stream


def image_weights(
    cfg: TrainConfig, teachers: Teachers, streams: Streams, micros: list[PackedBatch]
) -> list[Weights]:
    """What each image of the micro-batches counts in each teacher's losses, made on the host.

    1 / (images on all ranks that the teacher supervises), whatever an image's size and wherever it
    landed (AMoE: per-image loss). average="partition" does so within each stream and then over all
    streams (RADIOv2.5: partitions); with "token" patches count by their number (the ablation). An
    image of a stream that the teacher does not supervise has 0.
    """
    stream_B = torch.tensor([s for micro in micros for s in micro.stream_B], dtype=torch.int64)
    size_B = torch.tensor([n for micro in micros for n in micro.lengths], dtype=torch.float64)
    totals = [stream_B.bincount(x, len(streams)) for x in (torch.ones_like(size_B), size_B)]
    images_S, tokens_S = sum_over_ranks(torch.stack(totals))
    result: list[Weights] = [{} for _ in micros]
    device, images = micros[0].patches_MX.device, [len(micro) for micro in micros]
    for name in (teacher.name for teacher in teachers):
        taught_S = images_S.new_tensor(is_taught(name, streams))
        image_S = taught_S / (taught_S * images_S).sum().clamp(min=1)
        if cfg.average == "partition":  # a stream weighs the same, whatever its number of images
            image_S = taught_S / images_S.clamp(min=1) / len(streams)
        token_S = taught_S / (taught_S * tokens_S).sum().clamp(min=1)
        summary_B = patch_B = image_S[stream_B].float()
        if cfg.average == "token":
            patch_B = (token_S[stream_B] * size_B).float()
        both_2B = packing.to_device(torch.stack([summary_B, patch_B]), device)
        pieces = zip(both_2B.split(images, 1), taught_S[stream_B].split(images), strict=True)
        for micro, ((summary_B, patch_B), taught_B) in zip(result, pieces, strict=True):
            micro[name] = ImageWeights(summary_B, patch_B, taught_B.tolist())
    return result


def forward(state: State, step: int, batch: PackedBatch) -> StudentOutput:
    """The student on one micro-batch, its summaries in the losses' spaces; what is random of it
    depends on step and picture alone."""
    cfg, windows_B5 = state.cfg, None
    if cfg.windows and isinstance(state.student.positions, model.TablePositions):
        keys = [(cfg.seed, step, sample.key, "window") for sample in batch.samples]
        rows = [model.position_windows(1, packing.keyed_generator(*key)) for key in keys]
        windows_B5 = torch.cat([torch.zeros(0, 5), *rows])
    with model.autocast(batch.patches_MX.device, precision_on(batch.patches_MX.device, cfg)):
        out = state.replica(batch, windows_B5)
    # A teacher's frozen pooling head answers as the teacher does.
    pooled = [head.name for head in state.student.config.heads if head.pool]
    spaces = {name: state.spaces[name].parts["summary"] for name in pooled}
    normal = {name: space.normalize(out.summary[name]) for name, space in spaces.items()}
    return dataclasses.replace(out, summary=out.summary | normal)


def feature_losses(
    state: State, out: StudentOutput, batch: PackedBatch, targets: Targets, weights: Weights
) -> Parts:
    """This rank's share of each teacher's losses (AMoE: L_patch, L_CLS, L_reg)."""
    parts, how = {}, state.cfg.patch_loss
    for name, target in targets.items():
        summary_B, patch_B, _ = weights[name]
        patches_MC, maps = out.patches[name], target.patches
        if batch.views:  # each saw its own part of the picture, all of as many patches
            maps = [losses.resize_map(*x) for x in zip(maps, batch.grids, strict=True)]
            ours, theirs = ([v.origin for v in batch.views[key]] for key in ("", name))
            loss_B = losses.shift_loss(patches_MC, batch.grids, ours, maps, theirs, how)
        else:
            loss_B = losses.patch_loss(patches_MC, batch.grids, maps, how)
        parts[f"{name}/patches"] = (loss_B * patch_B).sum()
        if target.summary_BC is not None:
            pair = out.summary[name], target.summary_BC
            if dispersion := state.spaces[name].dispersion:
                loss_B = losses.angle_loss(*pair, dispersion.value)
            else:
                loss_B = losses.vector_loss(*pair, state.cfg.summary_loss)
            parts[f"{name}/summary"] = (loss_B * summary_B).sum()
        if target.registers_BRC is not None and name in out.registers:
            # Registers lie apart from the patches whose space the head answers in: compared raw.
            raw_BRC = state.spaces[name].parts["patches"].denormalize(out.registers[name])
            loss_B = losses.vector_loss(raw_BRC, target.registers_BRC, how)
            parts[f"{name}/registers"] = (loss_B * summary_B).sum()
    return parts


def relation_gradients(
    cfg: TrainConfig, said: list[dict[str, Tensor]], targets: list[Targets], weights: list[Weights]
) -> tuple[Parts, dict[str, list[Tensor]]]:
    """Per teacher: this rank's share of the loss's value, and its gradient by the summaries of each
    micro-batch. Only the images that the teacher supervises are related to each other.
    """
    compare = {"arkd": losses.arkd, "rkd": losses.rkd}[cfg.relation]
    parts, pulls = {}, {}
    for name in said[0]:
        is_taught_B = torch.tensor([x for micro in weights for x in micro[name].is_taught])
        taught_K = packing.to_device(is_taught_B.nonzero()[:, 0], said[0][name].device)
        # bfloat16 has too few digits for differences of summaries
        own_BC = torch.cat([summary[name] for summary in said]).float()
        target_BC = torch.cat([target[name].summary_BC for target in targets])  # type: ignore[misc]
        pairs_KC = torch.cat([own_BC, target_BC], dim=1).index_select(0, taught_K)
        pairs_KC, mine = gather_rows(pairs_KC)
        student_BC, teacher_BC = pairs_KC.split([own_BC.shape[1], target_BC.shape[1]], dim=1)
        student_BC = student_BC.detach().requires_grad_()
        loss = compare(student_BC, teacher_BC, cfg.relation_mean)
        (grad_BC,) = torch.autograd.grad(loss, student_BC)
        whole_BC = torch.zeros_like(own_BC).index_copy(0, taught_K, grad_BC[mine])
        sizes = [len(summary[name]) for summary in said]
        parts[f"{name}/relation"] = loss.detach() / rank_and_world()[1]  # each rank has all of it
        pulls[name] = list(whole_BC.split(sizes))
    return parts, pulls


def packs_of_a_forward(state: State, streams: Streams, count: int, device: torch.device) -> int:
    """--micro-packs; 0: all, on CUDA as many as fit at the stage's start, alike on all ranks."""
    if state.cfg.micro_packs or device.type != "cuda":
        return state.cfg.micro_packs or count
    return packs_in_memory(state, max(stream.budget for stream in streams), count, device)


def part_weight(state: State, name: str) -> float:
    """Weight of a part of the loss; the papers' are all 1 (AMoE, PHI-S Sec. 3)."""
    own = state.cfg.relation_weight if name.endswith("/relation") else 1.0
    return own * (state.ada.weight(name) if state.cfg.balance == "adaloss" else 1.0)


def set_lr(cfg: TrainConfig, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Linear warm-up, then cosine down to min_lr (RADIOv2.5: cosine; AMoE does not say)."""
    warmup = min(cfg.warmup, cfg.steps)  # a short trial of a long recipe
    part = min(1.0, max(0.0, (step - warmup) / max(1, cfg.steps - warmup)))
    cosine = cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * part))
    lr = cfg.lr * min(1.0, step / max(1, warmup)) * cosine
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    return lr


def update_average(state: State, step: int) -> None:
    """The weights' running mean; a rising decay, so that it soon forgets the untrained ones."""
    decay = min(state.cfg.ema, (1 + step) / (10 + step))
    for name, p in trained(state.student):
        if name in state.average:
            state.average[name].lerp_(p.detach(), 1 - decay)


# ---- The optimizer, and how ranks share the student


def trained(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)


def make_optimizer(cfg: TrainConfig, student: Student) -> torch.optim.Optimizer:
    """AdamW, LAMB or Muon over groups: trunk and heads, what decays, what is made orthogonal."""
    kinds: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, p in trained(student):
        kind = name.startswith("heads."), is_decayed(name, p), hidden_parts(student, name, p)
        kinds.setdefault(kind, []).append(p)
    groups: list[dict[str, Any]] = []
    for (is_head, decays, parts), params in kinds.items():
        decay, share = cfg.weight_decay * decays, 1.0 if is_head else cfg.trunk_lr
        groups.append({"params": params, "weight_decay": decay, "share": share, "parts": parts})
    how: Any = {"lr": cfg.lr, "betas": (0.9, cfg.beta2)}
    if cfg.optimizer == "lamb":
        return Lamb(groups, **how)
    if cfg.optimizer == "muon":
        return Muon(groups, is_half=precision_on(p.device, cfg) == "bf16", **how)
    return torch.optim.AdamW(groups, fused=True, **how)


def distribute(cfg: TrainConfig, student: Student, group: Group) -> Any:
    """The student as the ranks share it: as it is (one process), copies (DDP), shards (FSDP2)."""
    student.recompute = cfg.recompute
    for block in student.blocks if cfg.compile else ():
        block.compile(dynamic=True)
    if group.world == 1:
        return student
    if cfg.parallel == "ddp":
        # buffers change alike on all ranks; a frozen trunk's parameters get no gradient
        how: Any = {"broadcast_buffers": False, "find_unused_parameters": cfg.frozen_steps > 0}
        return nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True, **how)
    # Weights are gathered in float32 and autocast rounds them where it is safe: gathering bf16
    # would halve the traffic, but round the routers and the residual stream, too.
    for block in student.blocks:
        fully_shard(block)
    return fully_shard(student)


def gradient_sync(replica: Any, is_last: bool) -> Any:
    """Ranks average their gradients in the backward of a step's last micro-batch only."""
    if isinstance(replica, FSDPModule):
        replica.set_requires_gradient_sync(is_last)
    elif isinstance(replica, nn.parallel.DistributedDataParallel) and not is_last:
        return replica.no_sync()
    return nullcontext()


# ---- Part II: the plumbing
# ---- The five verbs of `train`: open_run, resume, settle, log, save

VERSION = 2  # of a checkpoint
EXIT_SIGNALLED = 128  # a run that was told to stop exits with 128 + the signal's number


class Standstill(RuntimeError):
    """Training must not go on: a number is not finite, or too many pictures are broken."""


@dataclass
class Job:
    """A run's surroundings. The record is what a checkpoint holds besides the `State`."""

    cfg: TrainConfig
    group: Group
    teachers: Teachers
    sources: list[Source]
    held_out: Source | None
    out: Path
    folder: Path | None  # the checkpoint to go on from
    origin: TrainConfig  # how the student is built
    identity: dict[str, Any]
    record: dict[str, Any]
    bar: Any = None
    began: float = 0.0
    stages: Sequence[StepData] = ()
    marked: tuple[float, int] = (0.0, 0)  # time and tokens at the last line of metrics.jsonl

    @property
    def newest(self) -> Path:
        """The checkpoint of the record's step."""
        return self.out / f"step_{self.record['step']:06d}"


@dataclass
class StepReport:
    """What one optimizer step says, of all ranks; on the host, but for the loads."""

    step: int
    total: float
    losses: dict[str, float]  # by part
    grad_norm: float
    images: int
    tokens: int
    max_load: float
    loads_LE: Tensor
    skipped: dict[str, str]
    stop: int  # the signal that asked any rank to stop, or 0
    lr: float = 0.0


def open_run(
    cfg: TrainConfig, teachers: Teachers, sources: list[Source], held_out: Source | None
) -> Job:
    """Join the processes, choose the checkpoint to go on from, fill the caches of the teachers that
    have one; writes nothing to the run folder."""
    need("matplotlib", "curves.png")
    group, identity = start_process(cfg), identity_of(cfg, sources, teachers)
    folder = on_main(lambda: find_start(cfg, identity))
    kinds = "a student, a release, a folder of transformers, or builtin:vit-s"
    is_there = folder or not cfg.init or identity["init"]  # a checkpoint has what it gave
    require(is_there, f"--init {cfg.init}: no such file or folder; pass {kinds}")
    fill(cfg, teachers, [*sources, held_out] if held_out else sources)
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "images": 0, "tokens": 0, "bad": 0}
    record |= {"skipped": packing.skipped_by(sources), "place": []}  # of the data, in its stage
    origin = cfg
    if cfg.init and folder:  # a checkpoint has all that --init had, which may be gone
        origin = dataclasses.replace(cfg, init=f"checkpoint={folder / 'model.pt'}")
    out = Path(cfg.out)
    return Job(cfg, group, teachers, sources, held_out, out, folder, origin, identity, record)


def resume(job: Job, state: State, stages: list[StepData]) -> int:
    """Load the checkpoint to go on from, if there is one; returns its step.

    All that is given has been checked by now: here the run folder gets its first file but the lock.
    """
    if job.folder:
        saved = read_state(job.folder)
        load_state(state, saved)
        job.record = {name: saved[name] for name in job.record}
    job.stages = stages
    for data, _ in going_on(job):
        packing.start_at(data, job.record["place"])
    step = job.record["step"]
    on_main(lambda: begin_folder(job))
    if step:
        say(f"resumed at step {step}")
    job.bar = packing.progress(None, job.cfg.preset, job.cfg.steps, "step", initial=step)
    job.began = time.monotonic() - job.record["seconds"]
    job.marked = time.monotonic(), job.record["tokens"]
    return step


def going_on(job: Job) -> list[tuple[StepData, int]]:
    """The stage that the record's step is within, if it is, and the step's number in it."""
    step, bounds = job.record["step"], zip(job.stages, job.cfg.stage_bounds(), strict=True)
    return [(data, step - first) for data, (first, last) in bounds if first < step < last]


def settle(
    job: Job, state: State, step: int, parts: Parts, norm: Any, counts: list, micros: list, said
) -> StepReport:
    """The step's numbers over all ranks. Raises: Standstill if one of them is not finite."""
    STOP.is_awaited = True
    norm = whole(norm)
    images, bad = sum(map(len, micros)), sum(len(m.skipped) for m in micros)
    tokens = sum(sum(m.lengths) for m in micros) + state.student.config.prefix * images
    known = sum_over_ranks(torch.tensor([images, tokens, bad, STOP.number]))  # on the host
    images, tokens, bad, stop = known.tolist()
    loads_LE = sum_over_ranks(torch.stack(counts).sum(0)) if counts else norm.new_ones(1, 1)
    max_load = (loads_LE.max(1).values / loads_LE.float().mean(1)).max()
    alike = torch.stack([norm, max_load]) / job.group.world  # on all ranks
    numbers = sum_over_ranks(torch.stack([*parts.values(), *alike]).double())
    # the one moment of a step at which the host waits for the device
    *values, length, load = numbers.tolist()
    found = dict(zip(parts, values, strict=True))
    total = sum(part_weight(state, name) * value for name, value in found.items())
    if not math.isfinite(sum(values)) or not math.isfinite(length):
        raise Standstill(blame(job, step, found, length, micros, said))
    skipped = merge_skipped([m.skipped for m in micros], bad > 0)
    return StepReport(step, total, found, length, images, tokens, load, loads_LE, skipped, stop)


def blame(
    job: Job, step: int, parts: dict[str, float], norm: float, micros: list, said: list[Targets]
) -> str:
    """The message of a step with a number that is not finite: what, where, which pictures."""
    keys = []
    for batch, target in zip(micros, said, strict=True):
        features = [x for t in target.values() for x in (t.patches, t.summary_BC) if x is not None]
        for i, sample in enumerate(batch.samples):
            if not all(bool(x[i].isfinite().all()) for x in features):
                keys.append(sample.key)
    fault = f"bad teacher features on rank {job.group.rank}: {', '.join(keys)}"
    if not keys:
        seen = ", ".join(sample.key for batch in micros for sample in batch.samples)
        fault = f"good teacher features on rank {job.group.rank}, of {seen}"
    bad = [name for name, value in parts.items() if not math.isfinite(value)]
    return (
        f"step {step}: not finite: {', '.join(bad) or f'gradient norm {norm}'}; {fault}. Nothing "
        f"was stepped; {way_out(job.out)}, or leave such pictures out"
    )


def way_out(out: Path) -> str:
    """What to do where numbers are not finite; those of a checkpoint were when it was saved."""
    if not (found := checkpoints(out)):
        return "there is no checkpoint yet: pass a lower --lr"
    good = f"the newest checkpoint is good: start from --init {found[-1] / 'model.pt'}"
    return f"{good} with a lower --lr and another --out"


def log(job: Job, report: StepReport) -> None:
    """Count the step in the record; every --log-every steps a line of metrics.jsonl."""
    cfg, record = job.cfg, job.record
    record["step"], record["seconds"] = report.step, time.monotonic() - job.began
    record["images"] += report.images
    record["tokens"] += report.tokens
    note_skipped(cfg, record, report.skipped)
    if report.step % cfg.log_every == 0 or report.step == cfg.steps:
        (then, tokens), job.marked = job.marked, (time.monotonic(), record["tokens"])
        speed = (record["tokens"] - tokens) / (job.marked[0] - then)
        write_metrics(job, metrics_row(job, report, speed))
        job.bar.set_postfix(loss=f"{report.total:.3f}", tok_s=f"{speed:.0f}", refresh=False)
    job.bar.update()


def save(job: Job, state: State, report: StepReport) -> None:
    """Write a checkpoint where one is due, evaluate it, and leave where told to stop."""
    cfg, step, is_last = job.cfg, report.step, report.step == job.cfg.steps
    is_evaluation = not is_last and cfg.evaluate_every and step % cfg.evaluate_every == 0
    if step % cfg.save_every == 0 or is_last or is_evaluation or report.stop:
        write_step(job, state)
    if is_evaluation:
        write_metrics(job, {"step": step, **evaluate(job)})
    if is_last:
        job.bar.close()
        STOP.is_awaited = False  # from here on a signal ends the process at once
    if report.stop or (is_last and STOP.number):
        say(f"told to stop: step {step} is saved in {cfg.out}; the same command goes on")
        raise SystemExit(EXIT_SIGNALLED + (STOP.number or signal.SIGTERM))


# ---- What teachers are asked, and what for


def ask(teacher: Teacher, batch: PackedBatch, chosen: Sequence[int]) -> TeacherOutput:
    """A teacher's own features of some of a batch's pictures, from what the loader made."""
    if teacher.name in batch.pixels:
        pictures = batch.pixels[teacher.name].split()
        out = teacher.features([pictures[i] for i in chosen])
    else:
        given: Any = batch.samples, batch.sizes, batch.boxes(teacher.name)
        out = teacher.targets(*(x and [x[i] for i in chosen] for x in given))
    return out.to(batch.patches_MX.device)


def supervised(name: str, streams: Streams, batch: PackedBatch) -> list[int]:
    """The pictures whose stream a teacher supervises; all where it supervises none."""
    taught = is_taught(name, streams)
    return [i for i, s in enumerate(batch.stream_B) if taught[s] or not any(taught)]


def is_taught(name: str, streams: Streams) -> list[bool]:
    """Of each stream: does the teacher supervise it?"""
    return [not stream.teachers or name in stream.teachers for stream in streams]


def sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(rows_BC: Tensor) -> tuple[Tensor, slice]:
    """All ranks' rows in rank order, without gradient, and where this rank's own lie."""
    rank, world = rank_and_world()
    sizes = torch.zeros(world, dtype=torch.int64)  # on the host, see `setup_distributed`
    sizes[rank] = len(rows_BC)
    ends = sum_over_ranks(sizes).cumsum(0).tolist()
    own = slice(ends[rank] - len(rows_BC), ends[rank])
    everyone_BC = rows_BC.new_zeros(ends[-1], rows_BC.shape[1])
    everyone_BC[own] = rows_BC.detach()
    return sum_over_ranks(everyone_BC), own


def merge_skipped(parts: list[dict[str, str]], any_rank: bool) -> dict[str, str]:
    """The pictures that did not decode on any rank, key -> reason; rarely costs a collective."""
    if any_rank and (world := rank_and_world()[1]) > 1:
        everyone: list = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [part for rank in everyone for part in rank]
    return {key: reason for part in parts for key, reason in part.items()}


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a shard (a collective call)."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def precision_on(device: torch.device, cfg: TrainConfig) -> str:
    """'auto' is bf16 on CUDA and on CPUs that multiply in it: a step takes a fifth less there."""
    if cfg.precision != "auto" or device.type == "cuda":
        return "fp32" if cfg.precision == "fp32" else "bf16"
    known = torch.cpu.get_capabilities()
    return "bf16" if known.get("avx512_bf16") or known.get("amx_bf16") else "fp32"


def spread(x: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, if `like` is one."""
    if isinstance(like, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def packs_in_memory(state: State, tokens: int, count: int, device: torch.device) -> int:
    """Of `count` packs of so many tokens those of one forward, in forwards as equal as can be."""
    needed = tokens * model.activation_bytes(state.student.config, state.cfg.recompute)
    needed *= 2 if state.cfg.precision == "fp32" else 1
    free = torch.cuda.mem_get_info(device)[0]
    if not state.optimizer.state:  # gradients and two moments are still to come
        held = [p.to_local() if isinstance(p, DTensor) else p for _, p in trained(state.student)]
        free -= 12 * sum(p.numel() for p in held)
    most = int(0.85 * free / needed)  # the rest is for backward's own tensors and fragments
    fits = torch.tensor(-(-count // -(-count // most)) if most > 0 else 0)
    if dist.is_initialized():
        dist.all_reduce(fits, dist.ReduceOp.MIN)
    if not fits:
        raise Standstill(
            f"a pack of {tokens} tokens takes some {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            f"of {device} are free: pass --recompute, or --parallel fsdp on more GPUs"
        )
    say(f"{int(fits)} of {count} packs in one forward")
    return int(fits)


def is_decayed(name: str, p: Tensor) -> bool:
    """Matrices decay, several learned tokens among them; vectors, scalars, one token and the
    position table (RADIO release) do not."""
    return p.ndim >= 2 and p.shape[0] > 1 and not name.startswith("positions.")


class Lamb(torch.optim.Optimizer):
    """Adam whose step in each decayed tensor is as long as lr times the tensor itself.

    What does not decay takes Adam's plain step, as usual.
    You et al. 2020, arXiv 1904.00962, Algorithm 2; RADIOv2.5: LAMB
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float = 1e-6):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self._update(p, self.state[p], group)

    def _update(self, p: Tensor, state: dict, group: dict) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].lerp_(p.grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        steps = float(state["step"])
        scale = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
        change = mean / (1 - beta1**steps) / scale
        if group["weight_decay"]:
            change = change.add_(p, alpha=group["weight_decay"])
            length, moved = p.norm(), change.norm()
            change = change * torch.where((length > 0) & (moved > 0), length / moved, 1.0)
        p.add_(change, alpha=-group["lr"])


class Muon(torch.optim.AdamW):
    """AdamW, but matrices of the blocks move by their momentum made orthogonal, each expert's for
    itself: the strongest directions do not drown the rest. A move is as long as AdamW's.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; its length: Liu et al., arXiv 2502.16982
    """

    def __init__(self, params: Any, is_half: bool = False, **how: Any):
        super().__init__(params, **how, fused=True)
        self.dtype = torch.bfloat16 if is_half else torch.float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if group["parts"] and p.grad is not None):
                if not self.state[p]:  # AdamW's loading asks for a step
                    self.state[p] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
                momentum = self.state[p]["momentum"].mul_(0.95).add_(p.grad)
                ahead = p.grad.add(momentum, alpha=0.95)
                parts = orthogonal(whole(ahead).unflatten(-2, (group["parts"], -1)), self.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 * max(parts.shape[-2:]) ** 0.5
                p.add_(spread(parts.flatten(-3, -2), p), alpha=-length * group["lr"])
                p.grad = None  # AdamW has the rest
        super().step(closure)


def hidden_parts(student: Student, name: str, p: Tensor) -> int:
    """Matrices that a hidden layer's weight holds one above the other; 0: it is of none."""
    if not (name.startswith("blocks.") and is_decayed(name, p)) or ".router." in name:
        return 0
    return 3 if ".qkv." in name else 2 if ".w1" in name and student.config.gated_ffn else 1


POLAR = ((8.2872, -23.5959, 17.3004), (4.1071, -2.9478, 0.5448), (3.9487, -2.9089, 0.5518),
         (3.3184, -2.4885, 0.5100), (2.3007, -1.6689, 0.4188))  # fmt: skip


def orthogonal(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(.., M, N): U V^T of each matrix U S V^T, as near as singular values from .001 of its norm on
    come to 1 +- .13 by five odd polynomials (Amsel et al. 2025, arXiv 2505.16932)."""
    is_wide = x.shape[-2] < x.shape[-1]
    y = (x if is_wide else x.mT).flatten(0, -3)
    y = (y / (1.01 * y.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in POLAR:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.to(x.dtype).unflatten(0, x.shape[:-2])
    return y if is_wide else y.mT


# ---- Pretrained weights to start from


def read_init(cfg: TrainConfig) -> Student:
    """What --init names, as a student: one of our own, a release, or a ViT of transformers."""
    spec = parse_teacher(cfg.init)
    if model.is_student(Path(spec.path)):
        return load_student(spec.path)
    try:
        backbone = load_backbone(spec)
        return model.read_vit(backbone.network, spec.layer or backbone.layer, backbone.stats)
    except (ValueError, RuntimeError) as error:
        why = str(error).removeprefix(f"teacher {spec.name}: ")
        what = f"--init {cfg.init} is no student of ours, no release, no ViT or DINOv2 that we read"
        raise ValueError(f"{what}: {why}") from error


# ---- Checkpoints

WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_dict(state: State) -> dict[str, Any]:
    """All that the next step depends on but the data; a collective, rank 0 gets whole tensors."""
    return {
        "student": dcp.get_model_state_dict(state.student, options=WHOLE),
        "optimizer": dcp.get_optimizer_state_dict(state.student, state.optimizer, options=WHOLE),
        "average": {name: whole(mean).cpu() for name, mean in state.average.items()},
        "normalizers": {name: space.state_dict() for name, space in state.spaces.items()},
        "adaloss": state.ada.state_dict(),
    }


def load_state(state: State, saved: dict[str, Any]) -> None:
    """Go on from `state_dict`, on any number of ranks."""
    student, optimizer = state.student, state.optimizer
    dcp.set_model_state_dict(student, saved["student"], options=WHOLE)
    moments = dataclasses.replace(WHOLE, strict=False)  # a frozen trunk has none yet
    dcp.set_optimizer_state_dict(student, optimizer, saved["optimizer"], options=moments)
    for name, p in trained(student):
        if name not in saved["optimizer"]["state"]:
            optimizer.state.pop(p, None)
    for name, mean in state.average.items():
        mean.copy_(spread(saved["average"][name], mean))
    for name, space in state.spaces.items():
        space.load_state_dict(saved["normalizers"][name])
    state.ada.load_state_dict(saved["adaloss"])


def save_folded(state: State, weights: dict[str, Tensor], path: Path) -> None:
    """Write the student that `load_student` reads, with PHI-S folded into its heads."""
    folded = Student(state.student.config)
    folded.load_state_dict(weights)
    for name, head in folded.heads.items():
        state.spaces[name].fold_into(head)
    model.save_student(folded, path)


def write_step(job: Job, state: State) -> None:
    """Write step_NNNNNN on rank 0, redraw the curves, drop the checkpoints that are not kept."""
    job.record["place"] = [x for here in going_on(job) for x in packing.place_of(*here)]
    saved = {**job.record, "identity": job.identity, **state_dict(state)}
    on_main(lambda: write_checkpoint(job.newest, state, saved))
    on_main(lambda: tidy(job))


def link(path: Any, new: Any) -> None:
    """A second name for a file, or a copy on a file system without links."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)


def tidy(job: Job) -> None:
    """What stands beside a new checkpoint, and the old ones that are not kept."""
    with spared("the stable path to the newest student"):
        part = job.out / "model.pt.part"
        part.unlink(missing_ok=True)
        link(job.newest / "model.pt", part)
        part.replace(job.out / "model.pt")
    for old in checkpoints(job.out)[: -job.cfg.keep]:
        if not job.cfg.keep_every or int(old.name[5:]) % job.cfg.keep_every:
            with spared("an old checkpoint"):
                shutil.rmtree(old)
    if rows := [row for row in read_rows(job.out) if "loss/total" in row]:
        with spared("curves.png"):
            draw_curves(rows, job.out / "curves.png", job.cfg)


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Training goes on without this file: what went wrong with it is only said."""
    try:
        yield
    except OSError as error:
        say(f"{what}: {error}; the run goes on")


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_checkpoint(folder: Path, state: State, saved: dict[str, Any]) -> None:
    """Write `folder` so that it is whole or absent, whatever happens meanwhile: to a temporary one,
    flushed to the disk, with a manifest of SHA-256s last, and by a rename."""
    weights = saved["student"] | saved["average"]  # the running mean, if there is one
    if bad := [n for n, x in weights.items() if x.is_floating_point() and not x.isfinite().all()]:
        raise Standstill(
            f"step {saved['step']}: not finite: {', '.join(bad[:3])}, {len(bad)} of the weights; "
            f"they are not saved; {way_out(folder.parent)}"
        )
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_folded(state, weights, draft / "model.pt")
        packing.write_whole(draft / "state.pt", lambda file: torch.save(saved, file))
        manifest = {name: sha256_of(draft / name) for name in ("model.pt", "state.pt")}
        made = {"version": VERSION, "sha256": manifest, "identity": saved.get("identity")}
        write_json(draft / "manifest.json", made)
        fsync(draft)
        if folder.exists():  # a damaged one, or the same step
            shutil.rmtree(folder)
        draft.rename(folder)
        fsync(folder.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise Standstill(
            f"{folder}: the checkpoint could not be written ({error}); free some space or pass "
            "another --out; older checkpoints are whole"
        ) from error


def write_json(path: Path, what: dict[str, Any]) -> None:
    packing.write_whole(path, json.dumps(what, indent=1, allow_nan=False).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What a file of the run folder says; {} where there is none, or it can't be read."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        if path.exists():
            say(f"{path} can't be read: {error}")
        return {}


def broken(folder: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["version"] != VERSION:
            return f"{folder} is of version {manifest['version']}, not {VERSION}"
        for name in ("model.pt", "state.pt"):
            if sha256_of(folder / name) != manifest["sha256"][name]:
                return f"{folder / name} does not have the SHA-256 of its manifest"
    except FileNotFoundError as error:
        return f"{error.filename} is not there"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: {error!r}"
    return None


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    found = (p for p in out.glob("step_*") if p.name[5:].isdigit())
    return sorted(found, key=lambda p: int(p.name[5:]))


def find_start(cfg: TrainConfig, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from: the newest whole one of the run folder, or, where that has none
    yet, the one that --resume names. None for a new run.

    Raises: ValueError if it is of another run, or if all are damaged.
    """
    if cfg.resume == "none":
        return None
    own, reasons = checkpoints(Path(cfg.out)), []
    is_given = cfg.resume not in ("auto", "none") and not own
    for folder in [Path(cfg.resume)] if is_given else reversed(own):
        if not (reason := broken(folder)):
            saved = read_json(folder / "manifest.json").get("identity") or {}
            refuse_changes(folder, saved, identity)
            return folder
        require(not is_given, f"--resume {cfg.resume}: {reason}")
        say(f"skipping a broken checkpoint: {reason}")
        reasons.append(reason)
    require(
        not reasons,
        f"no checkpoint in {cfg.out} is whole: {'; '.join(reasons)}. --resume none starts anew and "
        "keeps this folder beside it; --init PATH goes on from a model.pt",
    )
    return None


def begin_folder(job: Job) -> None:
    """The first files of a run: an older run moves aside whole; then the checkpoint to go on from,
    config.json, and the lines of metrics.jsonl up to it."""
    start = job.folder
    is_new = not start or start.resolve().parent != job.out.resolve()
    if not start and job.cfg.resume != "none":  # was it ended before its first checkpoint?
        is_new = read_json(job.out / "config.json").get("identity") != job.identity
    # by stage and stream, the share of pictures in packs that do not fill a step
    left_over = [packing.left_over(data) for data in job.stages]
    rows = read_rows(start.parent if start else job.out)
    names = ("config.json", "metrics.jsonl", "summary.json")
    if is_new and (checkpoints(job.out) or any((job.out / name).exists() for name in names)):
        move_aside(job.out)
    job.out.mkdir(parents=True, exist_ok=True)
    if start and is_new:
        draft = job.newest.with_name(job.newest.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(start, draft, copy_function=link)
        draft.rename(job.newest)
    for folder in checkpoints(job.out):
        if int(folder.name[5:]) > job.record["step"]:  # damaged
            with spared("a damaged checkpoint"):
                folder.rename(folder.with_name(f"damaged_{folder.name}_{time.time():.0f}"))
    about = {"left over": left_over, "config": dataclasses.asdict(job.cfg), "version": VERSION}
    about |= {"identity": job.identity, "torch": torch.__version__, "world": job.group.world}
    device = f"{job.group.device}, {precision_on(job.group.device, job.cfg)}"
    write_json(job.out / "config.json", about | {"device": device})
    rows = [row for row in rows if row["step"] <= job.record["step"]]
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    packing.write_whole(job.out / "metrics.jsonl", lines.encode())
    if start and is_new:
        tidy(job)


def move_aside(out: Path) -> None:
    """Rename a run folder to the first free of OUT.1, OUT.2 ...; the new one is locked again."""
    out = out.resolve()
    names = (out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    out.rename(aside)
    if LOCKS.pop(out, None):
        own(out)
        (aside / "lock").unlink()
    say(f"the run that was in {out} is now in {aside}")


LOCKS: dict[Path, Any] = {}  # the run folders that this process owns


def own(out: Path) -> None:
    """Make a run folder this process's, until it ends. Raises: ValueError naming another owner."""
    out = out.resolve()
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}; pass a folder to write to") from error
    for _ in range(100):  # one that is just being killed gets 10 seconds
        file = (out / "lock").open("a+")
        with suppress(BlockingIOError, PermissionError, FileNotFoundError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # else its owner has just gone, and it with him
            if os.path.samestat(os.fstat(file.fileno()), (out / "lock").stat()):
                break
        file.seek(0)
        owner = file.read().strip()
        file.close()
        time.sleep(0.1)
    else:
        raise ValueError(f"{out} is in use by {owner}; stop it, or pass another --out")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}\n")
    file.flush()
    LOCKS[out] = file, is_new


def disown(out: Path) -> None:
    """Give a run folder back; one that nothing was written to is gone again."""
    file, is_new = LOCKS.pop(out.resolve(), (None, False))
    if file:
        (out / "lock").unlink(missing_ok=True)
        file.close()
    if is_new:
        with suppress(OSError):
            out.rmdir()


def read_state(folder: Path) -> dict:
    try:
        return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{folder / 'state.pt'} can't be read safely: {error}") from error


def identity_of(cfg: TrainConfig, sources: list[Source], teachers: Teachers) -> dict[str, Any]:
    """What a run reads, by its content: what a resumed run must share with its checkpoint."""
    found = cfg.identity() | {"order": packing.ORDER}
    found["sources"] = [f"{len(s)} pictures, {s.fingerprint()[:32]}" for s in sources]
    found["init"] = content_of(cfg.init) if cfg.init else ""
    how = ", cached in fp16"
    prints = {t.name: t.fingerprint[:32] + how * isinstance(t, CachedTeacher) for t in teachers}
    return found | {"teachers": prints}


def content_of(init: str) -> str | None:
    """A hash of the files that --init names, or its name on the hub; None where files are gone."""
    spec = parse_teacher(init)
    path, layer = Path(spec.path), f"@{spec.layer}" if spec.layer else ""
    is_of_hub = spec.path.count("/") == 1 and not path.exists() and not path.parent.exists()
    if spec.path.startswith("builtin:") or is_of_hub:
        return f"{spec.path}{layer}"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    hashes = [sha256_of(file) for file in files if file.exists()]
    return f"{hashlib.sha256(' '.join(hashes).encode()).hexdigest()}{layer}" if hashes else None


def refuse_changes(folder: Path, saved: dict, current: dict) -> None:
    """A run goes on only with the configuration, data and teachers that it began with."""
    changed = {key: value for key, value in current.items() if value != saved.get(key)}
    if changed.get("init", "") is None:  # its files are gone
        changed["init"] = "no such file"
        if saved.get("init"):  # the checkpoint has what they had
            del changed["init"]
    advice = "Pass the old values, another --out, or --resume none"
    if [*changed] == ["steps"]:
        advice = (
            "The learning rate falls over all of a run's steps, so that with others it is another "
            f"run: start one by --init {folder / 'model.pt'} and another --out"
        )
    parts = (f"{k}: {saved.get(k)!r} in the checkpoint, {v!r} now. " for k, v in changed.items())
    require(not changed, f"{folder} belongs to another run. {''.join(parts)}{advice}")


# ---- What a run writes beside its checkpoints


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; says how many can't be read, as after a power cut."""
    path, rows = out / "metrics.jsonl", []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            rows.append({"step": int(json.loads(line)["step"])} | json.loads(line))
    if len(rows) < len(lines):
        say(f"{path}: {len(lines) - len(rows)} lines can't be read and are left out")
    return rows


def write_metrics(job: Job, row: dict[str, Any]) -> None:
    if job.group.rank == 0:
        with spared("metrics.jsonl"), (job.out / "metrics.jsonl").open("ab", buffering=0) as file:
            size, line = file.tell(), json.dumps(row, allow_nan=False).encode() + b"\n"
            if file.write(line) < len(line):  # a full disk takes a part
                file.truncate(size)
                raise OSError(f"no room for a line at step {row['step']}")


def metrics_row(job: Job, report: StepReport, tokens_per_s: float) -> dict:
    record, row = job.record, {"step": report.step, "loss/total": report.total}
    row |= {f"loss/{name}": value for name, value in report.losses.items()}
    row |= {"lr": report.lr, "grad_norm": report.grad_norm, "moe/max_load": report.max_load}
    row |= {"tokens_per_s": round(tokens_per_s, 1), "images": record["images"]}
    row |= {"tokens_per_s_device": round(tokens_per_s / job.group.world, 1)}
    row["tokens"] = record["tokens"]
    return finite(row, **{"moe/max_load": "the step has no token"})


def draw_curves(rows: list[dict], path: Path, cfg: TrainConfig) -> None:
    """Losses per teacher and part, expert load and learning rate over the steps, as one picture.

    Thick lines are means over some thirtieth of the steps before, vertical ones the stages' ends.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = axes = figure.subplots(1, 3)
    steps, count = [row["step"] for row in rows], max(1, len(rows) // 30)

    def draw(axis: Any, label: str, key: str, unit: float = 1.0) -> None:
        values = [math.nan if row[key] is None else row[key] / unit for row in rows]
        parts = [values[max(0, i - count + 1) : i + 1] for i in range(len(values))]
        (line,) = axis.plot(steps, [sum(part) / len(part) for part in parts], label=label)
        axis.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=1)

    for key in [key for key in rows[-1] if key.startswith("loss/") and key != "loss/total"]:
        raw = " (raw)" if key.endswith("/registers") else ""
        draw(middle if key.endswith("/relation") else left, key[5:] + raw, key)
    kinds = cfg.patch_loss, cfg.summary_loss
    if cfg.normalizer in ("phis", "channel") and kinds in (("mse", "mse"), ("mse", "angle")):
        left.set(title="feature loss (1: whoever answers the stage's mean)", ylim=(0, 1.2))
    else:
        left.set(title=f"feature loss ({', '.join(kinds)} of {cfg.normalizer})", yscale="log")
    middle.set(title="relational loss")
    draw(right, "busiest expert / mean", "moe/max_load")
    draw(right, "gradient norm", "grad_norm")
    draw(right, "learning rate / its peak", "lr", max(row["lr"] for row in rows))
    right.set(title="experts, gradients, learning rate", yscale="log")
    for axis in axes:
        axis.set(xlabel="step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        for _, last in cfg.stage_bounds()[:-1]:
            axis.axvline(last + 0.5, color="0.8", linewidth=1, zorder=0)
    figure.savefig(path, dpi=110)


# ---- Evaluation


class Shrunk(packing.Subset):
    """Pictures of a source, shrunk to side^2 pixels at the most: no report looks closer than the
    run itself, and a photograph has a hundred times as many."""

    def __init__(self, source: Source, count: int, side: int):
        super().__init__(source, packing.evenly(len(source), count))
        self.side = side

    def load(self, i: int, at_least: Any = None) -> packing.Sample:  # noqa: ARG002
        sample = super().load(i, (self.side, self.side))
        is_large = math.prod(sample.image.shape[:2]) > self.side**2
        return at_size(sample, self.side) if is_large else sample


def largest_side(cfg: TrainConfig) -> int:
    streams = [stream for stage in cfg.stages for stream in stage.streams]
    return max(max(stream.choices, default=stream.max_side) for stream in streams)


def capped(cfg: TrainConfig, student: Student) -> Any:
    """A student that sees pictures at the largest size that the run's stages train at."""
    student.precision, most = cfg.precision, (largest_side(cfg) // student.config.patch) ** 2
    return SimpleNamespace(encode=partial(student.encode, max_tokens=most))


def views(job: Job, count: int) -> list[Shrunk]:
    """`count` pictures of the first source, and of those held out, as large as anything sees them:
    a teacher of one size for all may want more than the student."""
    own = [t.size_for.side for t in job.teachers if t.size_for.kind in ("area", "fixed")]
    side = max(largest_side(job.cfg), *own, 0)
    held_out = job.sources[0] if job.held_out is None else job.held_out
    return [Shrunk(source, count, side) for source in (job.sources[0], held_out)]


def saved_student(job: Job) -> Student:
    """That of the checkpoint just written."""
    return load_student(job.newest / "model.pt", device=str(job.group.device))


def evaluate(job: Job) -> dict[str, float]:
    """kNN accuracy of the checkpoint just saved, all ranks sharing the work, and pca.png."""
    if job.held_out is None:
        return {}
    student = capped(job.cfg, saved_student(job))
    train, test = (extract({"student": student}, source, 0) for source in views(job, 500))
    if job.group.rank == 0:
        draw_pca(job, student)
    try:
        return {f"knn/{name}": row["value"] for name, row in knn(train, test).items()}
    except ValueError as error:  # no labels, or a class that only one of the two has
        say(f"step {job.record['step']}: no kNN: {error}")
        return {}


def draw_pca(job: Job, student: Any) -> None:
    """pca.png: held-out pictures, each teacher's maps, the student's."""
    train, held_out = views(job, 64)  # some may be bad; the report names them
    pictures, _ = first_pictures(held_out if len(held_out) else train, 8)
    teachers = {teacher.name: teacher for teacher in job.teachers}
    pca_sheet(job.out / "pca.png", pictures, {"teacher": teachers, "student": student})


def finish(job: Job) -> dict[str, Any]:
    """Score the student on held-out pictures; write summary.json and pca.png; print the table.

    It takes about a tenth of the run's arithmetic: how many pictures is a function of the run and
    not of the machine, or no figure would come out again.
    """
    cfg, student, side = job.cfg, saved_student(job), largest_side(job.cfg)
    some = views(job, 100)[0]
    areas = [min(math.prod(some.size(i)), side**2) for i in range(len(some))]
    tokens = sum(areas) / student.config.patch**2 / len(areas)  # of a picture
    # A token of the report, in two students without a backward, costs what one of training does.
    count = max(32, min(1000, int(job.record["tokens"] / 20 / tokens)))
    train, test = views(job, count)
    say(
        f"the report: {len(train)} training and {len(test)} held-out pictures, shrunk to {side}^2 "
        "px for the student"
    )
    ours, control = (capped(cfg, x) for x in (student, random_control(student, cfg.seed)))
    report = final_report(ours, control, {t.name: t for t in job.teachers}, train, test)
    draw_pca(job, ours)
    summary = {"steps": cfg.steps, "minutes": job.record["seconds"] / 60, "report": report}
    summary |= {"scored": cfg.data[0], "skipped": job.record["skipped"] | report["skipped"]}
    summary |= {"pictures": report.get("pictures", {}).get("held out", 0), "side": side}
    summary |= {"identity": job.identity, "config": cfg.identity()}
    write_json(job.out / "summary.json", summary)
    print(format_table(report))
    names = ("model.pt", "pca.png", "curves.png", "summary.json")
    print(*(job.out / name for name in names), sep="  ")
    return summary


# ---- Signals, pictures that do not decode, and what is said about data and teachers

LAUNCHER = os.getppid()


class StopSignal:
    """Remembers what asked the run to stop, so that the loop can save once and leave between two
    steps. Where no step would be saved, or at a second Ctrl-C, it ends the process at once."""

    number = 0
    since = 0.0  # when the first came
    is_awaited = False  # steps are being taken

    def __enter__(self) -> None:
        self.number, self.is_awaited, self.before = 0, False, {}
        in_main = threading.current_thread() is threading.main_thread()
        for number in packing.STOPPING if in_main else ():  # others can't set handlers
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self.before[number] = signal.signal(number, self.take)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=self.watch_launcher, daemon=True).start()

    def __exit__(self, *_: Any) -> None:
        for number in [*self.before]:
            signal.signal(number, self.before.pop(number))

    def watch_launcher(self) -> None:
        """A launcher that was killed counts as SIGTERM: no orphans."""
        while os.getppid() == LAUNCHER:
            time.sleep(0.5)
        if self.before and not self.number:
            os.kill(os.getpid(), signal.SIGTERM)

    def take(self, number: int, _: Any) -> None:
        now, is_first = time.monotonic(), not self.number
        self.number, self.since = number, now if is_first else self.since
        # Torchrun hands the first Ctrl-C on, so that it comes twice; a later one means it.
        is_meant = number == signal.SIGINT and now > self.since + 3
        if self.is_awaited and not is_meant:
            return
        if is_first or is_meant:
            lost = "what came after the newest checkpoint is lost" if self.is_awaited else ""
            say(f"told to stop: {lost or 'nothing new to save'}; the same command goes on")
        raise SystemExit(EXIT_SIGNALLED + number)


STOP = StopSignal()  # one for the process, as its signals are


def on_main(task: Callable[[], Any]) -> Any:
    """What task() gives on rank 0, on all ranks, however long it takes; its error on all, too."""
    found: list = [None, ""]
    if rank_and_world()[0] == 0:
        try:
            found[0] = task()
        except (ValueError, OSError, Standstill) as error:
            found[1] = str(error) or repr(error)
    if dist.is_initialized():
        dist.broadcast_object_list(found, group=packing.PATIENT[0] if packing.PATIENT else None)
    if found[1]:
        raise Standstill(found[1])
    return found[0]


def note_skipped(cfg: TrainConfig, record: dict, skipped: dict[str, str]) -> None:
    """Name each picture that does not decode once, and stop where they are too many."""
    new = {key: reason for key, reason in skipped.items() if key not in record["skipped"]}
    for key, reason in new.items():
        say(f"skipped {key}: {reason}")
    record["skipped"] |= new
    record["bad"] += len(skipped)
    if record["bad"] + record["images"] >= 100 or record["step"] == cfg.steps:  # not by a bad start
        refuse_bad_fraction(cfg, record["bad"], record["images"])


def refuse_bad_fraction(cfg: TrainConfig, bad: int, good: int) -> None:
    if bad > cfg.max_bad_frac * (bad + good):
        raise Standstill(
            f"{bad} of {bad + good} pictures could not be read, more than max_bad_frac="
            f"{cfg.max_bad_frac}; look at their names, or raise --max-bad-frac"
        )


def note_scan(cfg: TrainConfig, sources: list[Source]) -> None:
    """Name what the sources skipped when they were scanned; refuse those with too many broken."""
    for line in packing.left_out(packing.skipped_by(sources)):
        say(f"skipped {line}")
    for source in sources:
        scanned = source.source if isinstance(source, packing.Subset) else source
        refuse_bad_fraction(cfg, getattr(scanned, "lost", 0), len(scanned))
    if len(sources) > 1:
        say(f"the report scores pictures of {cfg.data[0]}, the first SOURCE")


def note_heads(init: str, kept: set[str], ours: set[str], theirs: set[str]) -> None:
    """Say which heads are those of --init, which start anew, and which of its are left out."""
    parts = {"kept": kept, "new": ours - kept, "dropped": theirs - kept}
    named = [f"{part}: {', '.join(sorted(names))}" for part, names in parts.items() if names]
    say(f"--init {init}: heads {'; '.join(named)}")


def say(text: str) -> None:
    """A line of the one process that prints, above the bar if there is one."""
    if packing.is_main():
        tqdm.write(text, file=sys.stderr)


def require(is_right: Any, message: str) -> None:
    if not is_right:
        raise ValueError(message)


def check(cfg: TrainConfig) -> None:
    """Raises: ValueError for a value out of range or a contradiction, naming flags and values."""
    for item in dataclasses.fields(cfg):
        given, takes = getattr(cfg, item.name), item.metadata["takes"]
        for value in given if isinstance(given, tuple) else [given]:
            what = takes if isinstance(takes, Number) else f"one of {', '.join(takes or ())}"
            require(takes is None or value in takes, f"{flag(item.name)} {value} must be {what}")
    untils = [stage.until for stage in cfg.stages]
    names = [parse_teacher(text).name for text in cfg.teachers]
    streams = [stream for stage in cfg.stages for stream in stage.streams]
    side = min(min(stream.choices, default=stream.max_side) for stream in streams)
    rules: list[tuple[Any, str]] = [
        (cfg.model in MODELS or cfg.model == "init",
         f"--model {cfg.model} is unknown; choose from {', '.join(MODELS)}, or init with --init "
         "PATH"),
        (cfg.model != "init" or cfg.init, "--model init is that of --init: pass --init PATH, too"),
        (len(cfg.data_weights) in (0, len(cfg.data)),
         f"--data-weights has {len(cfg.data_weights)} numbers for {len(cfg.data)} sources; pass "
         "one per --data SOURCE"),
        (cfg.resume in ("auto", "none")
         or Path(cfg.resume).resolve().parent != Path(cfg.out).resolve(),
         f"--resume {cfg.resume} is of --out {cfg.out}, which goes on from its newest checkpoint; "
         "to go back, pass another --out"),
        (cfg.shift == 0 or cfg.cache == "none",
         f"--shift {cfg.shift} with --cache {cfg.cache}: each teacher sees views that no cache "
         "holds; pass --cache none"),
        (cfg.shift < side / 16,
         f"--shift {cfg.shift} is beyond the {side // 16} patches of the smallest pictures' side"),
        (cfg.frozen_steps <= cfg.steps,
         f"--frozen-steps {cfg.frozen_steps} is beyond --steps {cfg.steps}; pass fewer of them"),
        (untils == sorted(untils) and untils[-1] == 1.0,
         f"stages end at {untils}; they must rise to 1.0"),
        (names and len(set(names)) == len(names),
         f"--teachers {' '.join(cfg.teachers)}: one or more different names, not {names}"),
    ]  # fmt: skip
    for stream in streams:
        unknown, most = set(stream.teachers) - set(names), max(stream.data, default=0)
        rules += [
            (not unknown, f"stream {stream.name}: teachers {unknown} are not in {names}"),
            (most < len(cfg.data),
             f"stream {stream.name} of preset {cfg.preset} draws from SOURCE number {most}, but "
             f"--data has {len(cfg.data)}, counted from 0; give one --data SOURCE for each (the "
             "same one twice will do)"),
        ]  # fmt: skip
    for is_right, message in rules:
        require(is_right, message)
    for stage in cfg.stages:
        times(cfg, stage)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def times(cfg: TrainConfig, stage: Stage, world: int = 0) -> int:
    """How often the packs of the preset go into a step of --global-tokens.

    world: the processes, 0 if they are not known yet.
    """
    packs = sum(stream.packs for stream in stage.streams)
    smallest = sum(stream.budget * stream.packs for stream in stage.streams)
    require(
        cfg.global_tokens % smallest == 0,
        f"--global-tokens {cfg.global_tokens} is not a multiple of the {smallest} tokens in the "
        f"smallest step of preset {cfg.preset}",
    )
    often = cfg.global_tokens // smallest or 1
    require(
        not cfg.micro_packs or not world or packs * often % (cfg.micro_packs * world) == 0,
        f"--micro-packs {cfg.micro_packs} * {world} processes does not divide the {packs * often} "
        "packs of a step; change --micro-packs or --global-tokens",
    )
    return often


PRESETS = {name: TrainConfig(preset=name, **changes) for name, changes in RECIPES.items()}


# ---- The command


def open_sources(
    cfg: TrainConfig, given: list[Source] | None = None
) -> tuple[list[Source], Source]:
    """The training sources, and pictures held out of the first one for the report.

    Drawings are held out by character, a user's pictures by content (`packing.hold_out`); with
    --held-out 0 all are trained on, and the report has nothing to score.
    """
    train, held_out = [], []
    for number, spec in enumerate(cfg.data):
        source = given[number] if given else packing.open_source(spec)
        name, split, *_ = f"{spec}:".split(":")
        if name == "openmoji" and not given:
            what = "the report is scored on openmoji:test"
            remedy = "train on openmoji or openmoji:train:COUNT"
            require(split in ("", "train"), f"--data {spec}: {what}; {remedy}")
            count = max(16, round(cfg.held_out * len(source)))
            rest = packing.open_source(f"openmoji:test:{count}")
        else:
            source, rest = packing.hold_out(source, cfg.held_out)
        require(
            not cfg.held_out or (len(source) and len(rest)),
            f"held_out={cfg.held_out} leaves {len(source)} pictures of {spec} to train on and "
            f"{len(rest)} for the report; give some {math.ceil(3 / (cfg.held_out or 1))} different "
            "pictures or change --held-out; 0 trains on all, without a report",
        )
        train.append(source)
        held_out.append(rest)
    return train, held_out[0]


def load_teachers(cfg: TrainConfig, group: Group) -> list:
    """The frozen teachers, with a cache or live."""
    dtype = torch.bfloat16 if precision_on(group.device, cfg) != "fp32" else None
    teachers = [load_teacher(parse_teacher(text), group.device, dtype) for text in cfg.teachers]
    if cfg.cache == "none":
        return teachers
    folder = packing.cache_home() / "features" if cfg.cache == "auto" else Path(cfg.cache)
    return [CachedTeacher(teacher, folder) for teacher in teachers]


def fill(cfg: TrainConfig, teachers: Teachers, sources: list[Source]) -> None:
    """Put the features of all pictures on the disk, for those teachers that have a cache."""
    cached = [teacher for teacher in teachers if isinstance(teacher, CachedTeacher)]
    for source in sources if cached else ():
        bad = merge_skipped([fill_caches(cached, source)], True)  # training names them
        refuse_bad_fraction(cfg, len(bad), len(source) - len(bad))


def start_process(cfg: TrainConfig) -> Group:
    """Join the processes that torchrun started, once, and share the cores among them."""
    group = packing.setup_distributed(cfg.pg_timeout, cfg.device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // local_world))
    return group


def run(
    cfg: TrainConfig, teachers: Teachers | None = None, sources: list[Source] | None = None
) -> dict[str, Any] | None:
    """A whole run: checks, `train` with checkpoints and resume, and the report at its end.

    Args:
        teachers: your own, named as the heads shall be; None: those of cfg.teachers.
        sources: your own, of each of which a part is held out; None: those of cfg.data.
    Returns: what summary.json holds, on rank 0.
    Raises: ValueError, OSError or ImportError for what was given; Standstill; SystemExit on a
        signal.
    """
    if teachers:
        cfg = dataclasses.replace(cfg, teachers=tuple(f"{t.name}=given" for t in teachers))
    if sources:
        cfg = dataclasses.replace(cfg, data=tuple(source.name for source in sources))
    if cfg.resume == "none" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        cfg = dataclasses.replace(cfg, resume="auto")  # torchrun restarted it, to go on
    for spec in () if sources else cfg.data:  # or pca.png would be a picture to train on
        folder, out = Path(spec), Path(cfg.out).resolve()
        is_inside = folder.is_dir() and out.is_relative_to(folder.resolve())
        require(not is_inside, f"--out {cfg.out} lies in --data {spec}; pass another --out")
    with STOP, ExitStack() as at_end:
        group, out = start_process(cfg), Path(cfg.out)
        at_end.callback(disown, out)
        on_main(lambda: own(out))
        train_sources, held_out = open_sources(cfg, sources)
        note_scan(cfg, train_sources)
        teachers = teachers or load_teachers(cfg, group)
        summary = read_json(out / "summary.json")
        if summary.keys() >= {"identity", "steps", "report"} and cfg.resume != "none":
            identity = identity_of(cfg, train_sources, teachers)
            refuse_changes(out, summary["identity"], identity)
            if group.rank == 0:
                print(f"{out} is finished ({summary['steps']} steps); another --out starts anew")
                print(format_table(summary["report"]))
            return summary
        job = train(cfg, teachers, train_sources, held_out)
        if dist.is_initialized():
            dist.destroy_process_group()
        return finish(job) if group.rank == 0 else None


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Build the command line from `TrainConfig`, the preset's values being the defaults."""
    first = packing.Parser(add_help=False)
    first.add_argument("--preset", default="demo", choices=PRESETS, help="named configuration")
    preset = PRESETS[first.parse_known_args(argv)[0].preset]
    parser = packing.Parser(description=(__doc__ or "").split("\n")[0], parents=[first])
    for item in dataclasses.fields(TrainConfig):
        if item.name == "preset" or not item.metadata.get("flag", True):
            continue
        value, takes = getattr(preset, item.name), item.metadata["takes"]
        help = f"{item.metadata['help']} [{value}]".replace("%", "%%")
        how: dict[str, Any] = {"default": value, "help": help}
        if isinstance(value, bool):
            how["action"] = argparse.BooleanOptionalAction
        else:
            how |= {"nargs": "+"} if isinstance(value, tuple) else {}
            how |= {"type": takes} if isinstance(takes, Number) else {"choices": takes}
        parser.add_argument(flag(item.name), **how)
    given = vars(parser.parse_args(argv)).items()
    flags: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    return dataclasses.replace(preset, **flags)


def last_words(error: Exception) -> str | int:
    """What the process ends with: the error in a line, or its status where another rank said so."""
    text = str(error).strip()
    if "Original Traceback" in text:  # of a loader's process
        text = text.splitlines()[-1]
    is_lost = "gloo" in text or isinstance(error, dist.DistError)
    is_worker = isinstance(error, RuntimeError) and "DataLoader worker" in text
    if STOP.number and (is_lost or is_worker):  # because the others have left
        return EXIT_SIGNALLED + STOP.number
    if is_lost:
        text = "another process of this run has ended, or was silent for --pg-timeout seconds"
    elif is_worker:
        text = f"{text.splitlines()[0]} The same command goes on from the newest checkpoint"
    is_news = packing.is_main()
    if dist.is_initialized():
        with suppress(RuntimeError):  # the store has ended with its process
            store = dist.distributed_c10d._get_default_store()
            times_said, any_said = store.add(text, 1), store.add("an error", 1)
            is_news = (any_said if is_lost else times_said) == 1
    return f"train.py: {text}" if is_news else 1


def main(argv: list[str] | None = None) -> None:
    try:
        with nullcontext() if packing.is_main() else redirect_stderr(io.StringIO()):
            cfg = parse_args(argv)
        run(cfg)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        is_ours = not isinstance(error, RuntimeError) or isinstance(error, Standstill)
        is_known = isinstance(error, dist.DistError) or "DataLoader worker" in str(error)
        if not is_ours and not is_known and "gloo" not in str(error):
            raise
        raise SystemExit(last_words(error)) from error


if __name__ == "__main__":
    main()
