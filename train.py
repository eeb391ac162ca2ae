"""Agglomerative distillation: one packed student learns from several frozen teachers at once.

    torchrun train.py                                  # the demo: two real teachers, minutes
    torchrun --nproc-per-node 2 train.py --preset debug

Read it from the bottom: `main` is the whole run, straight down. A step (`Trainer.step`) is AMoE
Sec. 2: per-image feature losses in PHI-S space, averaged over the images of the *global* batch,
plus ARKD between the summaries of all images on all ranks.

Legend: B images, N packed tokens, M packed patches, C teacher width, L layers, E experts.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import losses
from eval import final_report, format_table, pca_sheet
from model import MODELS, HeadSpec, Student, load_student, save_student
from packing import (
    SUFFIXES,
    Component,
    Group,
    PackedBatch,
    Partition,
    Sizes,
    Source,
    StepData,
    hold_out,
    make_loader,
    open_source,
    setup_distributed,
)
from teachers import (
    CachedTeacher,
    Teacher,
    TeacherOutput,
    cache_home,
    fill_caches,
    load_teacher,
    parse_teacher,
)

VERSION = 1
EXIT_SIGNALLED = 128  # a run that was told to stop saves and exits with 128 + the signal's number

# ------------------------------------------------------------------------------ configuration


def option(default, help: str, **metadata):
    """A config field: its help carries the unit and the source, and becomes the flag's help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Stream:
    """One stream of pictures inside a stage: a size rule and its share of the step.

    With `choices`, every picture becomes a square of a side drawn from them (RADIO's stochastic
    resolutions); without, it keeps its aspect with an area between min_side^2 and max_side^2.
    """

    name: str
    max_side: int = 224
    min_side: int = 0
    choices: tuple[int, ...] = ()
    budget: int = 1024
    packs: int = 2


@dataclass(frozen=True)
class Stage:
    """A part of the run, up to the fraction `until` of its steps (RADIO Sec. 4; AMoE Sec. 5)."""

    until: float
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; each field is a flag of the command line."""

    preset: str = option("demo", "name of the preset that the other flags change")
    data: tuple[str, ...] = option(("openmoji",), "SOURCEs: openmoji, a folder, tars, an index")
    data_weights: tuple[float, ...] = option((), "share of each SOURCE (default: by its size)")
    teachers: tuple[str, ...] = option(
        ("vit-s=builtin:vit-s", "mobilenet=builtin:mobilenet"), "NAME=PATH[@layer] of each teacher"
    )
    model: str = option("nano", "student, a key of model.MODELS")
    out: str = option("", "run folder (default runs/<preset>)", control=True)
    head_hidden: int = option(0, "hidden width of the adapters; 0: the teacher's (AMoE Sec. 1.6)")
    steps: int = option(1000, "optimizer steps")
    seed: int = option(0, "seed of weights, order and augmentation")
    resume: str = option("auto", "auto, none, or a checkpoint folder", control=True)
    save_every: int = option(150, "steps between checkpoints", control=True)
    keep: int = option(3, "newest checkpoints that are kept", control=True)
    log_every: int = option(10, "steps between lines of metrics.jsonl", control=True)
    workers: int = option(0, "loader processes per rank; 0 loads in the main one", control=True)
    threads: int = option(0, "torch threads per rank; 0 shares the cores evenly", control=True)
    pg_timeout: float = option(600.0, "seconds that a rank waits for the others", control=True)
    max_bad_frac: float = option(0.1, "share of pictures that may fail to decode")
    cache: str = option("auto", "folder of teacher features; auto: user cache; none: live teachers")
    held_out: float = option(0.15, "pictures held out for the report, a share of the first SOURCE")
    stages: tuple[Stage, ...] = option(
        (Stage(1.0, (Stream("native"),)),), "resolution stages, set by presets", flag=False
    )
    max_images: int = option(16, "images in a pack at the most (AMoE Sec. 3)")
    micro_packs: int = option(0, "packs of one forward on a rank; 0: all of the step's")
    relation: str = option("arkd", "relational loss of summaries", choices=("arkd", "rkd", "none"))
    relation_weight: float = option(1.0, "weight of the relational loss (AMoE Sec. 2.1: 1)")
    average: str = option(
        "image", "each image weighs the same, or each token", choices=("image", "token")
    )
    normalizer: str = option(
        "phis", "space of the targets", choices=("phis", "global", "channel", "none")
    )
    stats_steps: int = option(30, "steps whose teacher features fix the normalizers, before step 1")
    lr: float = option(1.5e-3, "peak learning rate of AdamW")
    min_lr: float = option(0.02, "last learning rate as a share of the peak")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.05, "AdamW decay of matrices; vectors and scalars have none")
    beta2: float = option(0.95, "AdamW second-moment decay")
    clip: float = option(1.0, "gradient norm limit")
    router_rate: float = option(1e-3, "expert-bias step of load balancing (AMoE Sec. 1.4)")

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.preset}")
        if self.model not in MODELS:
            raise ValueError(f"model={self.model!r} is unknown; choose from {', '.join(MODELS)}")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"data_weights has {len(self.data_weights)} numbers for {len(self.data)} sources; "
                "pass one per --data SOURCE"
            )
        for name in ("steps", "save_every", "keep", "log_every", "stats_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        untils = [stage.until for stage in self.stages]
        if untils != sorted(untils) or untils[-1] != 1.0:
            raise ValueError(f"stages end at {untils}; they must rise to 1.0")
        parsed = [parse_teacher(text).name for text in self.teachers]
        if len(set(parsed)) != len(parsed) or not parsed:
            raise ValueError(f"teachers={parsed} must be one or more different names")

    def stage_bounds(self) -> list[tuple[int, int]]:
        """Steps [start, stop) of each stage."""
        stops = [round(stage.until * self.steps) for stage in self.stages]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def identity(self) -> dict:
        """The fields that decide the run's numbers, as JSON: what a resumed run must share."""
        kept = [f.name for f in dataclasses.fields(self) if not f.metadata.get("control")]
        return {name: json.loads(json.dumps(_plain(getattr(self, name)))) for name in kept}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _native(until: float, max_side: int, budget: int) -> Stage:
    return Stage(until, (Stream("native", max_side=max_side, budget=budget),))


PRESETS: dict[str, TrainConfig] = {
    # Low resolution first, as both papers: a picture of 64^2 px costs a fifth of one of 224^2.
    # The budgets are those of the 16 pictures that a pack may hold.
    "demo": TrainConfig(
        steps=1000,
        stages=(_native(0.5, 64, 336), _native(0.85, 96, 656), _native(1.0, 224, 1200)),
        head_hidden=384,
        lr=2e-3,
    ),
    "debug": TrainConfig(
        preset="debug",
        model="test",
        data=("openmoji:train:96",),
        teachers=("dense=builtin:tiny-dense", "semantic=builtin:tiny-semantic"),
        stages=(_native(1.0, 96, 256),),
        steps=40,
        warmup=5,
        stats_steps=4,
        save_every=20,
        log_every=5,
        cache="none",
    ),
}


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Build the command line from `TrainConfig`, the preset's values being the defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="demo", choices=PRESETS, help="named configuration")
    preset = PRESETS[first.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], parents=[first])
    for item in dataclasses.fields(TrainConfig):
        if item.name == "preset" or not item.metadata.get("flag", True):
            continue
        value = getattr(preset, item.name)
        many = isinstance(value, tuple)
        kind = float if item.name == "data_weights" else str if many else type(value)
        parser.add_argument(
            "--" + item.name.replace("_", "-"), type=kind, default=value,
            nargs="+" if many else None, choices=item.metadata.get("choices"),
            help=f"{item.metadata['help']} [{value}]",
        )  # fmt: skip
    given = vars(parser.parse_args(argv)).items()
    flags: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    return dataclasses.replace(preset, **flags)


# -------------------------------------------------------------------------------- the step


class Standstill(RuntimeError):
    """Training must not go on: a number is not finite, or too many pictures are broken."""


NORMALIZERS = {
    "phis": losses.PhiS,
    "global": losses.GlobalStandardize,
    "channel": losses.ChannelStandardize,
    "none": losses.Plain,
}


class Normalizers:
    """Each teacher's summary and patch features moved to PHI-S space (PHI-S Sec. 3) or a rival's.

    Registers stay raw: one of DINOv3's has several modes, and a covariance does not describe it
    (AMoE Sec. 2.2).
    """

    def __init__(self, kind: str, teachers: list[Teacher], device: torch.device):
        make = NORMALIZERS[kind]
        self.parts = {
            (t.name, part): make(channels).to(device)
            for t in teachers
            for part, channels in (("summary", t.summary_dim), ("patches", t.dim))
            if channels is not None
        }

    def update(self, name: str, target: TeacherOutput) -> None:
        """Add one micro-batch of a teacher's raw features to the statistics."""
        if target.summary_BC is not None:
            self.parts[name, "summary"].update(target.summary_BC)
        if target.patches:
            self.parts[name, "patches"].update(torch.cat([p.flatten(0, 1) for p in target.patches]))

    def synchronize(self) -> None:
        for norm in self.parts.values():
            norm.synchronize()

    def __call__(self, name: str, target: TeacherOutput, grids: list) -> TeacherOutput:
        """Raw teacher features -> the space of the loss.

        A map that is larger than the student's grid is resized first, as the loss would do after:
        both are linear, and this way there are fewer tokens to rotate.
        """
        summary = target.summary_BC
        if summary is not None:
            summary = self.parts[name, "summary"].normalize(summary)
        maps = zip(target.patches, grids, strict=True)
        shapes = [(min(p.shape[0], h), min(p.shape[1], w)) for p, (h, w) in maps]
        patches = [losses.shrink(p, s) for p, s in zip(target.patches, shapes, strict=True)]
        if patches:
            rows_MC = torch.cat([p.flatten(0, 1) for p in patches])
            rows = self.parts[name, "patches"].normalize(rows_MC).split([h * w for h, w in shapes])
            patches = [r.unflatten(0, shape) for r, shape in zip(rows, shapes, strict=True)]
        return TeacherOutput(summary, patches, target.registers_BRC)

    def state_dict(self) -> dict:
        return {f"{name}/{part}": n.state_dict() for (name, part), n in self.parts.items()}

    def load_state_dict(self, state: dict) -> None:
        for (name, part), norm in self.parts.items():
            norm.load_state_dict(state[f"{name}/{part}"])

    def fold_into(self, student: Student) -> None:
        """Make the heads' last layers output raw teacher features (PHI-S Sec. 3, folding)."""
        for (name, part), norm in self.parts.items():
            norm.fold_into(student.output_layers(name)[part])


def sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(rows_BC: Tensor, group: Group) -> tuple[Tensor, slice]:
    """All ranks' rows in rank order, without gradient, and where this rank's own lie."""
    if group.world == 1:
        return rows_BC, slice(0, len(rows_BC))
    sizes = torch.zeros(group.world, dtype=torch.int64, device=rows_BC.device)
    sizes[group.rank] = len(rows_BC)
    counts = sum_over_ranks(sizes).tolist()
    padded = rows_BC.new_zeros(max(counts), rows_BC.shape[1])
    padded[: len(rows_BC)] = rows_BC
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    start = sum(counts[: group.rank])
    everyone = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return everyone, slice(start, start + len(rows_BC))


def merge_skipped(parts: list[dict[str, str]], any_rank: bool, group: Group) -> dict[str, str]:
    """The pictures that did not decode on any rank, key -> reason; rarely costs a collective."""
    if any_rank and group.world > 1:
        everyone: list = [None] * group.world
        dist.all_gather_object(everyone, parts)
        parts = [part for rank in everyone for part in rank]
    return {key: reason for part in parts for key, reason in part.items()}


@dataclass
class StepResult:
    """What one optimizer step reports; every number is global and on the host."""

    losses: dict[str, float]
    grad_norm: float
    lr: float
    images: int
    tokens: int
    max_load: float
    skipped: dict[str, str]
    stop: int


class Trainer:
    """The student, its teachers and the optimizer: one `step` at a time."""

    def __init__(self, cfg: TrainConfig, group: Group, teachers: list[Teacher]):
        self.cfg, self.group, self.teachers = cfg, group, teachers
        torch.manual_seed(cfg.seed)
        self.student = Student(student_config(cfg, teachers)).to(group.device)
        self.normalizers = Normalizers(cfg.normalizer, teachers, group.device)
        self.optimizer = make_optimizer(cfg, self.student)
        self.model: Any = self.student
        if group.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.student)

    def fit_normalizers(self, data: StepData) -> None:
        """Estimate the targets' statistics over the first steps' pictures, before step 1.

        PHI-S Table 10 spends the first 3,000 steps of a stage on it while the heads chase a moving
        rotation; estimating first costs only the teachers and keeps the targets still (we chose).
        """
        steps = range(min(self.cfg.stats_steps, data.steps_in(0)))
        for step in progress(steps, "teacher statistics", self.group):
            batch = PackedBatch.cat(data[step])
            for teacher in self.teachers:
                self.normalizers.update(teacher.name, teacher.targets(batch.samples))
        self.normalizers.synchronize()

    def step(self, step: int, packs: list[PackedBatch], stop: int = 0) -> StepResult:
        """One optimizer step on this rank's packs of the global batch.

        Args:
            step: number of the step, from 1.
            packs: this rank's share of the step's packs.
            stop: the signal that asked this rank to stop, or 0; the result has all ranks'.
        Raises:
            Standstill: a loss or a gradient on any rank is not finite; nothing was stepped.
        """
        size = self.cfg.micro_packs or len(packs)
        micros = [
            PackedBatch.cat(packs[i : i + size]).to(self.group.device)
            for i in range(0, len(packs), size)
        ]
        targets = [self.targets(m) for m in micros]
        weights = self.image_weights(micros)
        shares, counts_LE = self.backward(micros, targets, weights)
        grad_norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.cfg.clip)
        images, tokens = sum(map(len, micros)), sum(self.token_count(m) for m in micros)
        bad = sum(len(m.skipped) for m in micros)
        counts = torch.tensor([images, tokens, bad, stop], device=grad_norm.device)
        floats = torch.stack([*shares.values(), grad_norm / self.group.world])
        report = torch.cat([floats.double(), counts.double()])
        # the one moment of a step at which the host waits for the device
        *values, grad_norm, images, tokens, bad, stop = sum_over_ranks(report).tolist()
        parts = dict(zip(shares, values, strict=True))
        if not math.isfinite(sum(values)) or not math.isfinite(grad_norm):
            raise Standstill(self.blame(step, parts, grad_norm, micros, targets))
        lr = self.set_lr(step)
        self.optimizer.step()
        max_load = self.balance(counts_LE)
        skipped = merge_skipped([m.skipped for m in micros], bad > 0, self.group)
        return StepResult(
            {"total": sum(values), **parts}, grad_norm, lr, round(images), round(tokens),
            max_load, skipped, round(stop),
        )  # fmt: skip

    def targets(self, batch: PackedBatch) -> dict[str, TeacherOutput]:
        """What the teachers say of a batch's pictures, in the space of the loss."""
        raw = {t.name: t.targets(batch.samples).to(self.group.device) for t in self.teachers}
        return {name: self.normalizers(name, target, batch.grids) for name, target in raw.items()}

    def token_count(self, batch: PackedBatch) -> int:
        return sum(batch.lengths) + self.student.config.prefix * len(batch)

    def image_weights(self, micros: list[PackedBatch]) -> list[dict[str, Tensor]]:
        """Weight of each image in the global mean: 1 / (images of its partition on all ranks).

        AMoE Sec. 2.1: an image counts the same whatever its size and wherever it landed. With
        average="token" its patches count by their number (the ablation).
        """
        device = self.group.device
        partitions = [torch.tensor(m.partition_B, dtype=torch.int64, device=device) for m in micros]
        sizes = [torch.tensor(m.lengths, dtype=torch.float64, device=device) for m in micros]
        streams = max(len(stage.streams) for stage in self.cfg.stages)
        totals = torch.zeros(2, streams, dtype=torch.float64, device=device)
        for partition_B, size_B in zip(partitions, sizes, strict=True):
            totals[0].index_add_(0, partition_B, torch.ones_like(size_B))
            totals[1].index_add_(0, partition_B, size_B)
        images_S, tokens_S = sum_over_ranks(totals)
        result = []
        for partition_B, size_B in zip(partitions, sizes, strict=True):
            image_B = 1 / images_S[partition_B]
            token_B = size_B / tokens_S[partition_B]
            patch_B = image_B if self.cfg.average == "image" else token_B
            result.append({"summary": image_B.float(), "patches": patch_B.float()})
        return result

    def backward(self, micros, targets, weights) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gradients of the step's loss; returns this rank's shares of its parts and expert counts.

        The relational loss needs the summaries of all micro-batches on all ranks at once, so its
        gradient is taken first, on detached summaries, and then enters each micro-batch's backward
        as <summary, gradient>. With several micro-batches that takes a forward without graph.
        """
        self.optimizer.zero_grad(set_to_none=True)
        first, counts = None, []
        if len(micros) == 1:
            first = self.model(micros[0])
            summaries = [{k: v.detach() for k, v in first.summary.items()}]
        elif self.cfg.relation != "none":
            with torch.no_grad():
                summaries = [self.student(m).summary for m in micros]
        relation = {}
        if self.cfg.relation != "none":
            relation = self.relation_gradients(summaries, targets)
        shares: dict[str, Tensor] = {f"{t}/relation": v for t, (v, _) in relation.items()}
        for i, batch in enumerate(micros):
            out = first or self.model(batch)
            parts = self.feature_losses(out, batch, targets[i], weights[i])
            loss = torch.stack(list(parts.values())).sum()
            for name, (_, grads) in relation.items():
                loss = loss + (out.summary[name] * grads[i]).sum()
            last = i == len(micros) - 1
            with self.model.no_sync() if self.group.world > 1 and not last else nullcontext():
                # DDP averages gradients over the ranks; the shares are to be summed.
                (loss * self.group.world).backward()
            for name, value in parts.items():
                shares[name] = shares.get(name, 0) + value.detach()
            if out.counts_LE is not None:
                counts.append(out.counts_LE)
        return shares, torch.stack(counts).sum(0) if counts else None

    def feature_losses(self, out, batch, targets, weights) -> dict[str, Tensor]:
        """This rank's share of each teacher's patch, summary and register loss (AMoE Sec. 2.1)."""
        parts = {}
        for name, target in targets.items():
            loss_B = losses.patch_loss(out.patches[name], batch.grids, target.patches)
            parts[f"{name}/patches"] = (loss_B * weights["patches"]).sum()
            if target.summary_BC is not None:
                loss_B = losses.vector_loss(out.summary[name], target.summary_BC)
                parts[f"{name}/summary"] = (loss_B * weights["summary"]).sum()
            if target.registers_BRC is not None and name in out.registers:
                loss_B = losses.vector_loss(out.registers[name], target.registers_BRC)
                parts[f"{name}/registers"] = (loss_B * weights["summary"]).sum()
        return parts

    def relation_gradients(self, summaries, targets) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """Per teacher: this rank's share of the loss's value and d loss / d its own summaries."""
        compare = {"arkd": losses.arkd, "rkd": losses.rkd}[self.cfg.relation]
        result = {}
        for teacher in self.teachers:
            if teacher.summary_dim is None:
                continue
            own = torch.cat([s[teacher.name] for s in summaries])
            student_BC, mine = gather_rows(own.float(), self.group)
            teacher_BC, _ = gather_rows(
                torch.cat([t[teacher.name].summary_BC for t in targets]), self.group
            )
            student_BC = student_BC.detach().requires_grad_()
            loss = self.cfg.relation_weight * compare(student_BC, teacher_BC)
            (grad_BC,) = torch.autograd.grad(loss, student_BC)
            sizes = [len(s[teacher.name]) for s in summaries]
            result[teacher.name] = (loss.detach() / self.group.world, grad_BC[mine].split(sizes))
        return result

    def balance(self, counts_LE: Tensor | None) -> float:
        """Update the routers' biases from global counts; returns the worst max / mean load."""
        if counts_LE is None:
            return 1.0
        counts_LE = sum_over_ranks(counts_LE)
        self.student.update_router(counts_LE, self.cfg.router_rate)
        return float((counts_LE.max(1).values / counts_LE.float().mean(1)).max())

    def set_lr(self, step: int) -> float:
        """Linear warm-up, then cosine down to min_lr (RADIO Sec. 4; AMoE does not say)."""
        cfg = self.cfg
        part = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))
        cosine = cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * part))
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup)) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def blame(self, step, parts, grad_norm, micros, targets) -> str:
        """The message of a step with a number that is not finite: what, where, which pictures."""
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        keys = []
        for batch, target in zip(micros, targets, strict=True):
            for i, sample in enumerate(batch.samples):
                maps = [t.patches[i] for t in target.values()]
                maps += [t.summary_BC[i] for t in target.values() if t.summary_BC is not None]
                if not all(bool(m.isfinite().all()) for m in maps):
                    keys.append(sample.key)
        keys = keys or [sample.key for batch in micros for sample in batch.samples]
        return (
            f"step {step}: not finite: {', '.join(bad) or f'gradient norm {grad_norm}'}; pictures "
            f"on rank {self.group.rank}: {', '.join(keys)}. Nothing was stepped; the newest "
            "checkpoint is good. Lower --lr, or look at these pictures' teacher features"
        )

    def state_dict(self) -> dict:
        """Everything that the next step depends on, but the data, which is a function of `step`."""
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "normalizers": self.normalizers.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.normalizers.load_state_dict(state["normalizers"])

    def save_folded(self, path: Path) -> None:
        """Write the student that `load_student` reads: PHI-S folded into its heads."""
        folded = Student(self.student.config)
        folded.load_state_dict(self.student.state_dict())
        self.normalizers.fold_into(folded)
        save_student(folded, path)


def student_config(cfg: TrainConfig, teachers: list[Teacher]):
    """The model's sizes with one head per teacher, each token type with its own foldable output."""
    heads = tuple(
        HeadSpec(
            t.name,
            t.dim,
            t.summary_dim,
            registers=t.registers > 0,
            split=True,
            bias=True,
            hidden=cfg.head_hidden,
        )
        for t in teachers
    )
    return dataclasses.replace(MODELS[cfg.model], heads=heads)


def make_optimizer(cfg: TrainConfig, student: Student):
    """AdamW; matrices decay, vectors, scalars and learned tokens do not."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    decay = [p for p in trained.values() if p.ndim >= 2 and p.shape[0] > 1]
    rest = [p for p in trained.values() if not (p.ndim >= 2 and p.shape[0] > 1)]
    return torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": cfg.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=cfg.lr,
        betas=(0.9, cfg.beta2),
        fused=True,
    )


# ------------------------------------------------------------------------------ checkpoints


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole: a reader sees the old one or the new one."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def write_checkpoint(folder: Path, trainer: Trainer, state: dict) -> None:
    """Write `folder` so that it is whole or absent, whatever happens meanwhile.

    All files go to a temporary folder and are flushed to the disk; the manifest with their SHA-256
    comes last; a rename makes the folder appear. A full disk leaves the older checkpoints alone.
    """
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        trainer.save_folded(draft / "model.pt")
        torch.save(state, draft / "state.pt")
        manifest = {name: sha256_of(draft / name) for name in ("model.pt", "state.pt")}
        for name in manifest:
            fsync(draft / name)
        (draft / "manifest.json").write_text(json.dumps({"version": VERSION, "sha256": manifest}))
        fsync(draft / "manifest.json")
        fsync(draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
        fsync(folder.parent)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise Standstill(
            f"{folder}: the checkpoint could not be written ({error}); free some space or pass "
            "another --out; older checkpoints are whole"
        ) from error


def broken(folder: Path) -> str | None:
    """Why a checkpoint can't be trusted, or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in ("model.pt", "state.pt"):
            if sha256_of(folder / name) != manifest["sha256"][name]:
                return f"{folder / name} does not have the SHA-256 of its manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder}: {error}"
    return None


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    return sorted(p for p in out.glob("step_*") if p.name[5:].isdigit())


def newest_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint to go on from: the newest whole one, or the one that --resume names."""
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        if reason := broken(Path(cfg.resume)):
            raise ValueError(f"--resume {cfg.resume}: {reason}")
        return Path(cfg.resume)
    for folder in reversed(checkpoints(Path(cfg.out))):
        if reason := broken(folder):
            print(f"skipping a broken checkpoint: {reason}", file=sys.stderr)
        else:
            return folder
    return None


def read_state(folder: Path) -> dict:
    try:
        return torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{folder / 'state.pt'} can't be read safely: {error}") from error


def refuse_changes(folder: Path, saved: dict, current: dict) -> None:
    """A run goes on only with the configuration, data and teachers that it began with."""
    changed = [
        f"{key}: {saved.get(key)!r} in the checkpoint, {current.get(key)!r} now"
        for key in sorted({*saved, *current})
        if saved.get(key) != current.get(key)
    ]
    if changed:
        raise ValueError(f"{folder} belongs to another run. " + "; ".join(changed) + ". Pass the "
                         "old values, another --out, or --resume none")  # fmt: skip


# -------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """A prepared run. The record is what a checkpoint holds besides the trainer."""

    cfg: TrainConfig
    trainer: Trainer
    stages: list[StepData]
    train_sources: list[Source]
    held_out: Source
    identity: dict
    record: dict
    log: "Log"


class Log:
    """metrics.jsonl: a header line, then one object per logged step."""

    def __init__(self, cfg: TrainConfig, group: Group, last_step: int):
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.main = group.rank == 0
        if not self.main:
            return
        header = {"config": cfg.identity(), "version": VERSION, "torch": torch.__version__,
                  "device": str(group.device), "world": group.world}  # fmt: skip
        old = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        whole = [line for line in old if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= last_step]
        write_text(self.path, "\n".join([json.dumps(header), *kept]) + "\n")

    def write(self, row: dict) -> None:
        if self.main:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()[1:]]


def draw_curves(rows: list[dict], path: Path) -> None:
    """Losses per teacher and part, expert load and learning rate over the steps, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps = [row["step"] for row in rows]
    for name in [key for key in rows[-1] if key.startswith("loss/") and "relation" not in key]:
        if name != "loss/total":
            left.plot(steps, [row[name] for row in rows], label=name[5:])
    left.set(title="error in PHI-S space (1 = the mean)", xlabel="step", ylim=(0, 1.2))
    left.legend(fontsize=8)
    for name in [key for key in rows[-1] if key.endswith("/relation")]:
        middle.plot(steps, [row[name] for row in rows], label=name[5:])
    middle.set(title="relational loss", xlabel="step")
    if middle.get_legend_handles_labels()[0]:
        middle.legend(fontsize=8)
    right.plot(steps, [row["moe/max_load"] for row in rows], label="busiest expert / mean")
    right.plot(steps, [row["grad_norm"] for row in rows], label="gradient norm", alpha=0.5)
    right.set(title="experts and gradients", xlabel="step", yscale="log")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def progress(items, name: str, group: Group, **kwargs):
    """A tqdm bar on rank 0 and a terminal only."""
    hidden = group.rank != 0 or not sys.stderr.isatty()
    return tqdm(items, desc=name, disable=hidden, dynamic_ncols=True, **kwargs)


def open_sources(cfg: TrainConfig) -> tuple[list[Source], Source]:
    """The training sources, and pictures held out of the first one for the report.

    Drawings are held out by character, a user's pictures by the hash of their key.
    """
    train, held_out = [], []
    for spec in cfg.data:
        source = open_source(spec)
        if spec.split(":")[0] == "openmoji":
            rest = open_source(f"openmoji:test:{max(16, round(cfg.held_out * len(source)))}")
        else:
            source, rest = hold_out(source, cfg.held_out)
        if not len(source) or not len(rest):
            raise ValueError(
                f"held_out={cfg.held_out} leaves {len(source)} pictures of {spec} to train on and "
                f"{len(rest)} for the report; change --held-out or give more pictures"
            )
        train.append(source)
        held_out.append(rest)
    return train, held_out[0]


def make_stages(cfg: TrainConfig, sources: list[Source], student: Student, group: Group):
    """One `StepData` per stage; each stage starts its own epoch 0."""
    shares = cfg.data_weights or tuple(float(len(s)) for s in sources)
    stages = []
    for number, stage in enumerate(cfg.stages):
        partitions = []
        for stream in stage.streams:
            sizes = Sizes(stream.min_side**2, stream.max_side**2, stream.choices)
            parts = tuple(Component(s, sizes, w) for s, w in zip(sources, shares, strict=True))
            partitions.append(
                Partition(stream.name, parts, stream.budget, stream.packs, cfg.max_images)
            )
        stages.append(
            StepData(
                partitions, student.config.patch, student.config.prefix, cfg.seed + number,
                group.rank, group.world,
            )
        )  # fmt: skip
    return stages


def steps_from(run: Run, start: int) -> Iterator[tuple[int, list[PackedBatch]]]:
    """(step, this rank's packs) for the steps after `start`, through the stages."""
    pin = run.trainer.group.device.type == "cuda"
    for (first, last), data in zip(run.cfg.stage_bounds(), run.stages, strict=True):
        if start < last:
            begin = max(start, first)
            loader = make_loader(data, begin - first, last - first, run.cfg.workers, pin)
            yield from enumerate(loader, begin + 1)


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save once and leave between two steps."""

    def __init__(self) -> None:
        self.number = 0
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number, _frame) -> None:
        self.number = number

    def poll(self) -> int:
        """The signal's number, or 0. A launcher that is gone counts as SIGTERM: no orphans."""
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self.parent
        return int(signal.SIGTERM) if orphaned else self.number


def train_loop(run: Run, stop: StopSignal) -> None:
    """Train from the record's step to the last one: log, save, and leave when told to."""
    cfg, trainer, record, group = run.cfg, run.trainer, run.record, run.trainer.group
    bar = progress(None, cfg.preset, group, total=cfg.steps, initial=record["step"])
    began, marked, tokens = time.monotonic() - record["seconds"], time.monotonic(), 0
    for step, packs in steps_from(run, record["step"]):
        result = trainer.step(step, packs, stop.poll())
        tokens += result.tokens
        record["step"], record["seconds"] = step, time.monotonic() - began
        record["images"] += result.images
        record["tokens"] += result.tokens
        note_skipped(cfg, record, result.skipped)
        if step % cfg.log_every == 0 or step == cfg.steps:
            speed, marked, tokens = tokens / (time.monotonic() - marked), time.monotonic(), 0
            run.log.write(metrics_row(step, result, record, speed))
            bar.set_postfix(loss=f"{result.losses['total']:.3f}", tok_s=f"{speed:.0f}")
        bar.update()
        if step % cfg.save_every == 0 or step == cfg.steps or result.stop:
            save(run)
        if result.stop and step < cfg.steps:
            print(f"told to stop: step {step} is saved in {cfg.out}; the same command goes on")
            raise SystemExit(EXIT_SIGNALLED + result.stop)
    bar.close()


def note_skipped(cfg: TrainConfig, record: dict, skipped: dict[str, str]) -> None:
    """Name each picture that does not decode once, and stop where they are too many."""
    new = {key: reason for key, reason in skipped.items() if key not in record["skipped"]}
    for key, reason in new.items() if is_main() else ():
        tqdm.write(f"skipped {key}: {reason}", file=sys.stderr)
    record["skipped"] |= new
    record["bad"] += len(skipped)
    refuse_bad_fraction(cfg, record["bad"], record["images"])


def refuse_bad_fraction(cfg: TrainConfig, bad: int, good: int) -> None:
    if bad > cfg.max_bad_frac * (bad + good):
        raise Standstill(
            f"{bad} of {bad + good} pictures could not be read, more than max_bad_frac="
            f"{cfg.max_bad_frac}; look at their names, or raise --max-bad-frac"
        )


def note_scan(cfg: TrainConfig, sources: list[Source]) -> dict[str, str]:
    """Name what the sources skipped when they were scanned; refuse those with too many broken."""
    skipped = {key: reason for source in sources for key, reason in source.skipped.items()}
    for key, reason in skipped.items() if is_main() else ():
        print(f"skipped {key}: {reason}", file=sys.stderr)
    for source in sources:
        pictures = [key for key in source.skipped if key.rsplit(".", 1)[-1].lower() in SUFFIXES]
        refuse_bad_fraction(cfg, len(pictures), len(source))
    return skipped


def metrics_row(step: int, result: StepResult, record: dict, tokens_per_s: float) -> dict:
    parts = {f"loss/{name}": value for name, value in result.losses.items()}
    return {
        "step": step, **parts, "lr": result.lr, "grad_norm": result.grad_norm,
        "tokens_per_s": round(tokens_per_s, 1), "moe/max_load": result.max_load,
        "images": record["images"], "tokens": record["tokens"],
    }  # fmt: skip


def save(run: Run) -> None:
    """Write step_NNNNNN on rank 0, redraw the curves, drop checkpoints beyond --keep."""
    if run.trainer.group.rank == 0:
        out, step = Path(run.cfg.out), run.record["step"]
        state = {**run.record, "identity": run.identity, **run.trainer.state_dict()}
        write_checkpoint(out / f"step_{step:06d}", run.trainer, state)
        for old in checkpoints(out)[: -run.cfg.keep]:
            shutil.rmtree(old)
        if rows := run.log.rows():
            draw_curves(rows, out / "curves.png")
    if dist.is_initialized():
        dist.barrier()


def finish(run: Run) -> None:
    """Score the student on held-out pictures; write summary.json and pca.png; print the table."""
    out, cfg = Path(run.cfg.out), run.cfg
    student = load_student(checkpoints(out)[-1] / "model.pt")
    torch.manual_seed(cfg.seed)
    untrained = Student(student.config)
    run.trainer.normalizers.fold_into(untrained)  # so that it starts at each teacher's mean
    teachers = {t.name: t for t in run.trainer.teachers}
    report = final_report(
        student, untrained, teachers, run.train_sources[0], run.held_out, limit=1000
    )
    pictures = [run.held_out.load(i) for i in range(min(8, len(run.held_out)))]
    pca_sheet(out / "pca.png", pictures, {"teacher": teachers, "student": student})
    summary = {"steps": cfg.steps, "minutes": run.record["seconds"] / 60, "report": report,
               "skipped": run.record["skipped"], "config": cfg.identity()}  # fmt: skip
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    print(format_table(report))
    print(f"{out / 'pca.png'}  {out / 'curves.png'}  {out / 'summary.json'}")


def is_main() -> bool:
    """True in the one process that prints; holds before the process group is there, too."""
    return os.environ.get("RANK", "0") == "0"


def is_finished(cfg: TrainConfig) -> bool:
    """True if the run folder holds the report of this very run; says so."""
    path = Path(cfg.out) / "summary.json"
    if cfg.resume != "auto" or not path.exists():
        return False
    summary = json.loads(path.read_text())
    refuse_changes(path.parent, summary["config"], cfg.identity())
    if is_main():
        print(f"{cfg.out} is finished ({summary['steps']} steps); another --out starts a new run")
        print(format_table(summary["report"]))
    return True


def load_teachers(cfg: TrainConfig, sources: list[Source], group: Group) -> list:
    """The frozen teachers; with a cache, after their features of all pictures are on the disk."""
    teachers = [load_teacher(parse_teacher(text), group.device) for text in cfg.teachers]
    if cfg.cache == "none":
        return teachers
    folder = cache_home() / "features" if cfg.cache == "auto" else Path(cfg.cache)
    cached = [CachedTeacher(teacher, folder) for teacher in teachers]
    for source in sources:
        fill_caches(cached, source)
    return cached


def prepare(cfg: TrainConfig) -> Run:
    """Everything up to the first step: process group, data, teachers, student, resume."""
    group = setup_distributed(cfg.pg_timeout)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // local_world))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    train_sources, held_out = open_sources(cfg)
    teachers = load_teachers(cfg, [*train_sources, held_out], group)
    trainer = Trainer(cfg, group, teachers)
    stages = make_stages(cfg, train_sources, trainer.student, group)
    identity = {**cfg.identity(), "sources": [s.fingerprint() for s in train_sources],
                "fingerprints": {t.name: t.fingerprint for t in teachers}}  # fmt: skip
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "images": 0, "tokens": 0, "bad": 0,
              "skipped": note_scan(cfg, train_sources)}  # fmt: skip
    if folder := newest_checkpoint(cfg):
        state = read_state(folder)
        refuse_changes(folder, state["identity"], identity)
        trainer.load_state_dict(state)
        record = {name: state[name] for name in record}
    else:
        trainer.fit_normalizers(stages[0])
    log = Log(cfg, group, record["step"])
    return Run(cfg, trainer, stages, train_sources, held_out, identity, record, log)


def main(argv: list[str] | None = None) -> None:
    try:
        cfg = parse_args(argv)
        if is_finished(cfg):
            return
        run = prepare(cfg)
    except (ValueError, OSError, ImportError, Standstill) as error:  # what the user gave
        raise SystemExit(f"train.py: {error}") from error
    try:
        train_loop(run, StopSignal())
    except Standstill as error:
        raise SystemExit(f"train.py: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.trainer.group.rank == 0:
        finish(run)


if __name__ == "__main__":
    main()
