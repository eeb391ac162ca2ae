"""Agglomerative distillation: one packed student learns from several frozen teachers at once.

    torchrun train.py                                  # the demo: two real teachers, minutes
    torchrun --nproc-per-node 2 train.py --preset debug

Read it from the bottom: `main` is the whole run, straight down. A step (`Trainer.step`) is AMoE
Sec. 2: per-image feature losses in PHI-S space, averaged over the images of the *global* batch,
plus ARKD between the summaries of all images on all ranks.

Legend: B images, N packed tokens, M packed patches, C teacher width, L layers, E experts.
"""

import argparse
import bisect
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import losses
from eval import (
    extract,
    final_report,
    finite,
    first_pictures,
    format_table,
    knn,
    pca_sheet,
    random_control,
)
from model import (
    HALF_RGB,
    MODELS,
    AdapterSpec,
    HeadSpec,
    ModelConfig,
    RadioSpec,
    Student,
    StudentOutput,
    TablePositions,
    activation_bytes,
    autocast,
    copy_pool,
    load_pretrained,
    load_student,
    position_windows,
    read_vit,
    save_student,
    with_heads,
)
from packing import (
    Group,
    PackedBatch,
    Source,
    Stage,
    StepData,
    Stream,
    Subset,
    cache_home,
    hold_out,
    keyed_generator,
    left_out,
    make_loader,
    open_source,
    setup_distributed,
    to_device,
)
from teachers import (
    CachedTeacher,
    Teacher,
    TeacherOutput,
    fill_caches,
    load_backbone,
    load_network,
    load_teacher,
    need,
    parse_teacher,
    pretrained,
    sha256_of,
)

VERSION = 1
EXIT_SIGNALLED = 128  # a run that was told to stop saves and exits with 128 + the signal's number

# ------------------------------------------------------------------------------ configuration


def option(default, help: str, **metadata):
    """A config field: its help carries the unit and the source, and becomes the flag's help."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; each field is a flag of the command line."""

    preset: str = option("demo", "name of the preset that the other flags change")
    data: tuple[str, ...] = option(("openmoji",), "SOURCEs: openmoji, a folder, tars, an index")
    data_weights: tuple[float, ...] = option((), "share of each SOURCE (default: by its size)")
    teachers: tuple[str, ...] = option(
        ("vit-s=builtin:vit-s", "mobilenet=builtin:mobilenet"), "NAME=PATH[@layer] of each teacher"
    )
    model: str = option("nano", "student, a key of model.MODELS; init: the sizes of --init")
    init: str = option("", "NAME=PATH[@layers] to start from: a ViT or DINOv2, or our checkpoint")
    head_hidden: int = option(0, "hidden width of the heads; 0: the teacher's (AMoE), 1024 (RADIO)")
    windows: bool = option(True, "RADIO form: random windows of the position table (Sec. 1.2)")
    pool: bool = option(True, "SigLIP: its frozen pooling head makes the summary (AMoE Sec. 1.6)")
    out: str = option("", "run folder (default runs/<preset>)", control=True)
    steps: int = option(1000, "optimizer steps")
    seed: int = option(0, "seed of weights, order and augmentation")
    resume: str = option("auto", "auto, none, or a checkpoint folder", control=True)
    save_every: int = option(150, "steps between checkpoints", control=True)
    keep: int = option(3, "newest checkpoints that are kept", control=True)
    keep_every: int = option(0, "also keep each that is a multiple of so many steps", control=True)
    log_every: int = option(10, "steps between lines of metrics.jsonl", control=True)
    look_every: int = option(0, "steps between looks: kNN, pca.png; 0: at the end", control=True)
    workers: int = option(0, "loader processes per rank; 0 loads in the main one", control=True)
    threads: int = option(0, "torch threads per rank; 0 shares the cores evenly", control=True)
    pg_timeout: float = option(600.0, "seconds that a rank waits for the others", control=True)
    max_bad_frac: float = option(0.1, "share of pictures that may fail to decode", control=True)
    cache: str = option("auto", "folder of teacher features; auto: user cache; none: live teachers")
    held_out: float = option(0.15, "share of each SOURCE's pictures held out of training")
    stages: tuple[Stage, ...] = option(
        (Stage(1.0, (Stream("native"),)),), "resolution stages, set by presets", flag=False
    )
    max_images: int = option(16, "images in a pack at the most (AMoE Sec. 3)")
    global_tokens: int = option(0, "tokens of a step over all ranks; 0: the packs of the preset")
    global_images: int = option(0, "instead: images of a step, if packs hold squares of one size")
    micro_packs: int = option(
        0,
        "packs of one forward on a rank; 0: all of the step's, on CUDA as many as fit",
        control=True,
    )
    patch_loss: str = option(
        "mse", "feature loss of patches and registers", choices=tuple(losses.KINDS)
    )
    summary_loss: str = option("mse", "feature loss of summaries", choices=(*losses.KINDS, "angle"))
    shift: float = option(
        0.0, "deviation, in patches, of the whole-patch moves of the student's view and each "
        "teacher's own, so that no fixed pattern of a teacher is learnt (C-RADIOv4 Eq. 1: 0.5); "
        "0: all see the same. Needs live teachers, --cache none"
    )  # fmt: skip
    relation: str = option("arkd", "relational loss of summaries", choices=("arkd", "rkd", "none"))
    relation_mean: str = option(
        "own", "whose mean distance divides the student's distances", choices=("own", "teacher")
    )  # fmt: skip
    relation_weight: float = option(1.0, "weight of the relational loss (AMoE Sec. 2.1: 1)")
    average: str = option(
        "image", "weigh each image the same (AMoE), within each stream (RADIO), or each token",
        choices=("image", "partition", "token"),
    )  # fmt: skip
    balance: str = option(
        "none", "weights of the losses: 1, or AdaLoss'", choices=("none", "adaloss")
    )
    normalizer: str = option("phis", "space of the targets", choices=tuple(losses.NORMALIZERS))
    stats_steps: int = option(
        30, "steps of each stage whose teacher features fit the targets' space before its first "
        "step; they cost the teachers' forward, or reading the cache, and no student"
    )  # fmt: skip
    frozen_steps: int = option(0, "first steps that train the heads alone (RADIO Sec. 4: 5000)")
    optimizer: str = option("adamw", "optimizer (RADIO Sec. 4: lamb)", choices=("adamw", "lamb"))
    lr: float = option(1.5e-3, "peak learning rate")
    trunk_lr: float = option(1.0, "the trunk's learning rate as a share of the heads'")
    min_lr: float = option(0.02, "last learning rate as a share of the peak")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(0.05, "decay of matrices; vectors and scalars have none")
    beta2: float = option(0.95, "second-moment decay of the optimizer")
    clip: float = option(1.0, "gradient norm limit")
    ema: float = option(
        0.0, "decay of the weights' running mean, at most (1 + step) / (10 + step) so that the "
        "first weights are soon forgotten; the mean is then what is saved (0: none)"
    )  # fmt: skip
    router_rate: float = option(1e-3, "expert-bias step of load balancing (AMoE Sec. 1.4)")
    parallel: str = option(
        "ddp", "copies of the weights, or shards of them (FSDP2)", choices=("ddp", "fsdp"),
        control=True,
    )  # fmt: skip
    device: str = option(
        "auto", "where to compute; auto: cuda if there is one", choices=("auto", "cpu", "cuda"),
        control=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "ask torch for the same bits in every run on CUDA, where it has them", control=True
    )
    precision: str = option(
        "auto", "arithmetic; auto: bf16 on CUDA, else fp32", choices=("auto", "fp32", "bf16")
    )
    recompute: bool = option(
        False, "activation checkpointing: less memory, a third more time", control=True
    )
    compile: bool = option(False, "torch.compile each block", control=True)

    def __post_init__(self) -> None:
        if not self.out:
            object.__setattr__(self, "out", f"runs/{self.preset}")
        if self.model not in MODELS and not (self.model == "init" and self.init):
            known = ", ".join(MODELS)
            raise ValueError(f"model={self.model!r} is unknown; choose from {known}, or init with "
                             "--init NAME=PATH")  # fmt: skip
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"data_weights has {len(self.data_weights)} numbers for {len(self.data)} sources; "
                "pass one per --data SOURCE"
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number")
        for name in ("steps", "save_every", "keep", "log_every", "stats_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shift < 0 or (self.shift and self.cache != "none"):
            raise ValueError(
                f"shift={self.shift} with cache={self.cache}: it must be 0 or more, and above 0 "
                "each teacher sees views that no cache holds; pass --cache none"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be at least 0 and below 1")
        untils = [stage.until for stage in self.stages]
        if untils != sorted(untils) or untils[-1] != 1.0:
            raise ValueError(f"stages end at {untils}; they must rise to 1.0")
        parsed = [parse_teacher(text).name for text in self.teachers]
        if len(set(parsed)) != len(parsed) or not parsed:
            raise ValueError(f"teachers={parsed} must be one or more different names")
        for stream in (stream for stage in self.stages for stream in stage.streams):
            if unknown := set(stream.teachers) - set(parsed):
                raise ValueError(f"stream {stream.name}: teachers {unknown} are not in {parsed}")
            if max(stream.data, default=0) >= len(self.data):
                raise ValueError(
                    f"stream {stream.name} of preset {self.preset} draws from SOURCE number "
                    f"{max(stream.data)}, but --data has {len(self.data)}, counted from 0; give "
                    "one --data SOURCE for each (the same one twice will do)"
                )
        if self.global_images and self.global_tokens:
            raise ValueError(f"{self.global_images=} and {self.global_tokens=}: pass one of them")
        for stage in self.stages if self.global_tokens else ():
            self.times(stage)

    def times(self, stage: Stage, patch: int = 16, prefix: int = 0) -> int:
        """How often the packs of the preset go into a step of the global batch.

        Args: patch, prefix: the student's pixels and tokens, where the batch is given in images.
        """
        wanted, what = self.global_tokens, "tokens"
        smallest = sum(stream.budget * stream.packs for stream in stage.streams)
        if self.global_images:
            wanted, what, smallest = self.global_images, "images", 0
            for stream in stage.streams:
                if len(stream.choices) != 1:
                    raise ValueError(f"global_images={wanted}: packs of stream {stream.name} hold "
                                     "pictures of many sizes; pass --global-tokens")  # fmt: skip
                room = stream.budget // ((stream.choices[0] // patch) ** 2 + prefix)
                smallest += stream.packs * min(self.max_images, room)
        if wanted % smallest:
            raise ValueError(
                f"global_{what}={wanted} is not a multiple of the {smallest} {what} in the "
                f"smallest step of preset {self.preset}"
            )
        return wanted // smallest or 1

    def stage_bounds(self) -> list[tuple[int, int]]:
        """Steps [start, stop) of each stage."""
        stops = [round(stage.until * self.steps) for stage in self.stages]
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def stage_at(self, step: int) -> Stage:
        """The stage that a step, counted from 1, belongs to."""
        stops = [stop for _, stop in self.stage_bounds()]
        return self.stages[bisect.bisect_left(stops, step)]

    def identity(self) -> dict:
        """The fields that decide the run's numbers, as JSON: what a resumed run must share."""
        kept = [f.name for f in dataclasses.fields(self) if not f.metadata.get("control")]
        return {name: json.loads(json.dumps(_plain(getattr(self, name)))) for name in kept}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _preset(base: TrainConfig, name: str, **changes) -> TrainConfig:
    return dataclasses.replace(base, preset=name, out=f"runs/{name}", **changes)


def _native(until: float, max_side: int, budget: int) -> Stage:
    return Stage(until, (Stream("native", max_side=max_side, budget=budget),))


# RADIO Sec. 4. Teachers, sizes, batch, steps, LAMB, learning rate, decay, statistics and frozen
# steps are the papers'; warm-up, clipping and the second beta are ours. Pictures are squares of the
# stage's side, 16 or 2 to a pack (16 * (16 * 16 + 8) = 4224 tokens, and so on).
_RADIO = TrainConfig(
    teachers=("clip=apple/DFN5B-CLIP-ViT-H-14-378", "siglip=google/siglip-so400m-patch14-384",
              "dino_v2=facebook/dinov2-with-registers-giant", "sam=facebook/sam-vit-huge"),
    model="radio-h", steps=300_000, summary_loss="cosine", relation="none", average="partition",
    stats_steps=3000, frozen_steps=5000, optimizer="lamb", lr=1e-3, min_lr=0.0, weight_decay=0.02,
    beta2=0.999, warmup=1000, cache="none", workers=8, parallel="fsdp", recompute=True,
    save_every=1000, look_every=10_000, held_out=1e-4,
)  # fmt: skip
_RADIO_LOW = Stream("low", choices=(432,), budget=16 * 737, packs=64)

# AMoE Sec. 5. Teachers, sizes, steps, kinds of streams and the pack of 2304 + 5 tokens are the
# paper's; 1.6 M tokens a step follow from its totals. The rest is ours, and so is each stream's
# share. Stage 2 takes --data LOW HIGH: the replay from LOW, large pictures from HIGH.
_AMOE = TrainConfig(
    teachers=("siglip2=google/siglip2-so400m-patch16-naflex",
              "dinov3=facebook/dinov3-vitl16-pretrain-lvd1689m"),
    model="amoe-0.3b", stats_steps=300, lr=1e-3, warmup=1000, cache="none", workers=8,
    recompute=True, save_every=1000, look_every=10_000, held_out=1e-4,
)  # fmt: skip

PRESETS: dict[str, TrainConfig] = {
    # Low resolution first, as both papers: a picture of 64^2 px costs a fifth of one of 224^2.
    # The budgets are those of the 16 pictures that a pack may hold.
    "demo": TrainConfig(
        steps=1000,
        stages=(_native(0.5, 64, 336), _native(0.85, 96, 656), _native(1.0, 224, 1200)),
        head_hidden=384,
        lr=2e-3,
    ),
    # RADIO's way: from a pretrained network on, the trunk at 3e-5 at most (2e-4 makes it forget).
    "warm": TrainConfig(
        preset="warm", model="init", init="vit-s=builtin:vit-s@8", relation="none", steps=400,
        stages=(_native(1.0, 112, 16 * 66),), head_hidden=384, frozen_steps=200, lr=1e-3,
        trunk_lr=0.03, warmup=20, windows=False,
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
    "amoe-stage1": _preset(
        _AMOE, "amoe-stage1", steps=50_000,
        stages=(Stage(1.0, (Stream("low", max_side=256, budget=2309, packs=704),)),),
    ),
    "amoe-stage2": _preset(
        _AMOE, "amoe-stage2", steps=90_000, data=("openmoji", "openmoji"),
        stages=(Stage(1.0, (
            Stream("replay", max_side=256, budget=2309, packs=128, data=(0,)),
            Stream("middle", min_side=256, max_side=384, budget=2309, packs=128, data=(0,)),
            Stream("high-256", max_side=256, budget=2309, packs=64, data=(1,)),
            Stream("high-512", max_side=512, budget=2309, packs=128, data=(1,)),
            Stream("high", max_side=768, budget=2309, packs=256, data=(1,)),
        )),),
    ),
    "radio-stage1": _preset(
        _RADIO, "radio-stage1",
        stages=(Stage(1.0, (Stream("low", choices=(256,), budget=16 * 264, packs=64),)),),
    ),
    "radio-stage2": _preset(
        _RADIO, "radio-stage2", stages=(Stage(1.0, (_RADIO_LOW,)),)
    ),
    "radio-stage3": _preset(
        _RADIO, "radio-stage3",
        stages=(Stage(1.0, (
            _RADIO_LOW,
            Stream("high", choices=(1024,), budget=2 * 4104, packs=64),
        )),),
    ),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> TrainConfig:
    """Build the command line from `TrainConfig`, the preset's values being the defaults."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", default="demo", choices=PRESETS, help="named configuration")
    preset = PRESETS[first.parse_known_args(argv)[0].preset]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], parents=[first])
    for item in dataclasses.fields(TrainConfig):
        if item.name == "preset" or not item.metadata.get("flag", True):
            continue
        value, flag = getattr(preset, item.name), "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            yes_no = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=yes_no, default=value, help=item.metadata["help"])
            continue
        many = isinstance(value, tuple)
        kind = float if item.name == "data_weights" else str if many else type(value)
        parser.add_argument(
            flag, type=kind, default=value,
            nargs="+" if many else None, choices=item.metadata.get("choices"),
            help=f"{item.metadata['help']} [{value}]",
        )  # fmt: skip
    given = vars(parser.parse_args(argv)).items()
    flags: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given}
    return dataclasses.replace(preset, **flags)


# -------------------------------------------------------------------------------- the step


class Standstill(RuntimeError):
    """Training must not go on: a number is not finite, or too many pictures are broken."""


def sum_over_ranks(values: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(rows_BC: Tensor, group: Group) -> tuple[Tensor, slice]:
    """All ranks' rows in rank order, without gradient, and where this rank's own lie."""
    if group.world == 1:
        return rows_BC, slice(0, len(rows_BC))
    sizes = torch.zeros(group.world, dtype=torch.int64)  # on the host, see `setup_distributed`
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


class Weights(NamedTuple):
    """What each image of a micro-batch counts in a teacher's losses."""

    summary_B: Tensor
    patch_B: Tensor
    is_taught: list[float]  # 0 where the teacher does not supervise the image's stream


def packs_that_fit(count: int, needed: float, free: float) -> int:
    """Of `count` packs of so many bytes those of one forward, in forwards as equal as can be."""
    most = int(0.85 * free / needed)  # the rest is for backward's own tensors and fragments
    return -(-count // -(-count // most)) if most > 0 else 0


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
    """The student, its teachers and the optimizer: one `step` at a time.

    After construction either `fit_normalizers` or `load_state_dict` must come before a step, and
    `fit_normalizers` before the first step of each further stage.
    """

    model: Any = None  # the student as it is distributed
    optimizer: torch.optim.Optimizer

    def __init__(self, cfg: TrainConfig, group: Group, teachers: list[Teacher]):
        self.cfg, self.group, self.teachers = cfg, group, teachers
        student, self.folded_heads = build_student(cfg, teachers)
        self.student = student.to(group.device)
        self.spaces = self.new_spaces()
        self.ada = losses.AdaLoss()
        self.fitting: dict[tuple[Stream, ...], int] = {}  # packs of a forward, by stage
        self.autocast = autocast(group.device, cfg.precision)

    def new_spaces(self) -> dict[str, losses.TargetSpace]:
        """A space for each teacher's targets, fitted to nothing yet."""
        kinds = self.cfg.normalizer, self.cfg.summary_loss
        spaces = {
            t.name: losses.TargetSpace(kinds[0], t.dim, t.summary_dim, kinds[1])
            for t in self.teachers
        }
        return {name: space.to(self.group.device) for name, space in spaces.items()}

    def fit_normalizers(self, data: StepData, stage: int = 0) -> None:
        """Fit the targets' spaces to the pictures of a stage's first steps, before the first.

        PHI-S Table 10 spends the first 3,000 steps of a stage on it while the heads chase a moving
        rotation; estimating first costs only the teachers and keeps the targets still (we chose).
        Heads that are trained already then answer in the new spaces what they did in the old ones.
        The optimizer's moments and AdaLoss' means stay: both forget the old space soon enough.

        Args: data, stage: the data of the stage, and its number from 0.
        Raises: Standstill where nothing can be read, or features are not finite.
        """
        spaces, steps = self.new_spaces(), min(self.cfg.stats_steps, data.steps_in(0))
        pin = self.group.device.type == "cuda"
        loader = make_loader(data, 0, steps, self.cfg.workers, pin)
        counts = torch.zeros(1 + len(self.teachers), dtype=torch.int64)  # broken; seen by each
        for packs in progress(loader, "teacher statistics", self.group, total=steps):
            batch = PackedBatch.cat([pack.to(self.group.device) for pack in packs])
            seen = [self.supervised(t.name, stage, batch) for t in self.teachers]
            counts += torch.tensor([len(batch.skipped), *map(len, seen)])
            for teacher, own in zip(self.teachers, seen, strict=True):
                target = self.ask(teacher, batch, own)
                try:
                    spaces[teacher.name].update(target, [batch.grids[i] for i in own])
                except ValueError as error:
                    raise Standstill(f"statistics of teacher {teacher.name}: {error}") from error
        bad, *good = sum_over_ranks(counts.to(self.group.device)).tolist()
        if not all(good):
            raise Standstill(f"none of the {bad} pictures of the first steps could be read")
        for space in spaces.values():
            space.synchronize()
        old, self.spaces = self.spaces, spaces
        if self.model is None:
            for name, head in self.student.heads.items():
                if name not in self.folded_heads:
                    spaces[name].fold_into(head, is_new=True)
                spaces[name].unfold_from(head)
            self.distribute()
        else:
            self.carry_heads(old)

    def supervised(self, name: str, stage: int, batch: PackedBatch) -> list[int]:
        """The pictures whose stream a teacher supervises; all where it supervises none."""
        streams = self.cfg.stages[stage].streams
        taught = [not stream.teachers or name in stream.teachers for stream in streams]
        return [i for i, p in enumerate(batch.stream_B) if taught[p] or not any(taught)]

    @torch.no_grad()
    def carry_heads(self, old: dict[str, losses.TargetSpace]) -> None:
        """Move the heads, and their running means, from the old spaces to the new (collective)."""
        for name, head in self.student.heads.items():
            params = dict(head.named_parameters())
            # a frozen pool has no running mean
            means = {n: self.average.get(f"heads.{name}.{n}", p) for n, p in params.items()}
            copies = [params, means] if self.average else [params]
            for tensors, moved in [(x, self.carried(name, x, old[name])) for x in copies]:
                for n, x in tensors.items():
                    new = moved.get_parameter(n).detach().to(x.device, x.dtype)
                    if dist.is_initialized():  # unequal machines round differently
                        dist.broadcast(new, 0)
                    x.copy_(spread(new, x))

    def carried(self, name: str, tensors: dict[str, Tensor], old: losses.TargetSpace) -> nn.Module:
        """A whole copy of a head with these weights, moved from its old space to the new one."""
        head = self.student.heads[name]
        with torch.device("meta"):
            moved = type(head)(head.spec, self.student.config.dim)
        copy = {n: whole(x.detach()).double() for n, x in tensors.items()}  # to be rounded once
        moved.load_state_dict(copy, assign=True)
        old.fold_into(moved)
        self.spaces[name].unfold_from(moved)
        return moved

    def distribute(self) -> None:
        """Spread the student over the ranks; make the optimizer of what each of them holds."""
        self.model = distribute(self.cfg, self.student, self.group)
        self.optimizer = make_optimizer(self.cfg, self.student)
        self.average = {
            name: p.detach().clone() for name, p in trained(self.student) if self.cfg.ema
        }

    def step(self, step: int, packs: list[PackedBatch], stop: int = 0) -> StepResult:
        """One optimizer step on this rank's packs of the global batch.

        Args:
            step: number of the step, from 1.
            packs: this rank's share of the step's packs.
            stop: the signal that asked this rank to stop, or 0; the result has all ranks'.
        Raises:
            Standstill: a loss or a gradient on any rank is not finite; nothing was stepped.
        """
        self.student.frozen_trunk = step <= self.cfg.frozen_steps
        size = self.packs_of_a_forward(step, len(packs))
        packs = [pack.to(self.group.device) for pack in packs]  # one by one, as they are pinned
        micros = [PackedBatch.cat(packs[i : i + size]) for i in range(0, len(packs), size)]
        targets = [self.targets(m) for m in micros]
        weights = self.image_weights(self.cfg.stage_at(step).streams, micros)
        shares, counts_LE = self.backward(step, micros, targets, weights)
        grad_norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.cfg.clip)
        grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        images, tokens = sum(map(len, micros)), sum(self.token_count(m) for m in micros)
        bad = sum(len(m.skipped) for m in micros)
        counts = sum_over_ranks(torch.tensor([images, tokens, bad, stop]))  # known to the host
        images, tokens, bad, stop = counts.tolist()
        loads_LE = grad_norm.new_ones(1, 1) if counts_LE is None else sum_over_ranks(counts_LE)
        max_load = (loads_LE.max(1).values / loads_LE.float().mean(1)).max()
        alike = torch.stack([grad_norm, max_load]) / self.group.world  # on all ranks
        report = sum_over_ranks(torch.stack([*shares.values(), *alike]).double())
        # the one moment of a step at which the host waits for the device
        *values, grad_norm, max_load = report.tolist()
        parts = dict(zip(shares, values, strict=True))
        if not math.isfinite(sum(values)) or not math.isfinite(grad_norm):
            raise Standstill(self.blame(step, parts, grad_norm, micros, targets))
        lr = self.set_lr(step)
        self.optimizer.step()
        decay = min(self.cfg.ema, (1 + step) / (10 + step))
        for name, p in trained(self.student):
            if name in self.average:
                self.average[name].lerp_(p.detach(), 1 - decay)
        if counts_LE is not None and not self.student.frozen_trunk:
            self.student.update_router(loads_LE, self.cfg.router_rate)
        total = sum(self.weight(name) * value for name, value in parts.items())
        self.ada.update(parts)
        skipped = merge_skipped([m.skipped for m in micros], bad > 0, self.group)
        return StepResult(
            {"total": total, **parts}, grad_norm, lr, images, tokens, max_load, skipped, stop
        )

    def packs_of_a_forward(self, step: int, count: int) -> int:
        """--micro-packs; 0: all, on CUDA as many as fit at the stage's start, alike on all ranks.

        Raises: Standstill where not even one pack fits.
        """
        streams = self.cfg.stage_at(step).streams
        if self.cfg.micro_packs or self.group.device.type != "cuda":
            return self.cfg.micro_packs or count
        if streams not in self.fitting:
            tokens, student = max(stream.budget for stream in streams), self.student
            needed = tokens * activation_bytes(student.config, self.cfg.recompute)
            needed *= 2 if self.cfg.precision == "fp32" else 1
            free = torch.cuda.mem_get_info(self.group.device)[0]
            if not self.optimizer.state:  # gradients and two moments are still to come
                free -= 12 * sum(held(p).numel() for _, p in trained(student))
            fits = torch.tensor(packs_that_fit(count, needed, free))
            if dist.is_initialized():
                dist.all_reduce(fits, dist.ReduceOp.MIN)
            if not fits:
                raise Standstill(f"a pack of {tokens} tokens takes some {needed / 1e9:.1f} GB, and "
                                 f"{free / 1e9:.1f} GB of {self.group.device} are free: pass "
                                 "--recompute, or --parallel fsdp on more GPUs")  # fmt: skip
            self.fitting[streams] = int(fits)
            if self.group.rank == 0:
                print(f"{int(fits)} of {count} packs in one forward", file=sys.stderr)
        return self.fitting[streams]

    def weight(self, loss: str) -> float:
        """Weight of a part of the loss; the paper's are all 1 (AMoE Sec. 2.1, PHI-S Sec. 3)."""
        own = self.cfg.relation_weight if loss.endswith("/relation") else 1.0
        return own * (self.ada.weight(loss) if self.cfg.balance == "adaloss" else 1.0)

    def targets(self, batch: PackedBatch) -> dict[str, TeacherOutput]:
        """What the teachers say of a batch's pictures, in the space of the loss."""
        raw = {t.name: self.ask(t, batch, range(len(batch))) for t in self.teachers}
        return {name: self.spaces[name](target, batch.grids) for name, target in raw.items()}

    def ask(self, teacher: Teacher, batch: PackedBatch, chosen: Sequence[int]) -> TeacherOutput:
        """A teacher's own features of some of a batch's pictures, from what the loader made."""
        if teacher.name in batch.pixels:
            pictures = batch.seen(teacher.name)
            return teacher.features([pictures[i] for i in chosen]).to(self.group.device)
        boxes = batch.boxes(teacher.name)
        return teacher.targets(
            [batch.samples[i] for i in chosen],
            [batch.sizes[i] for i in chosen],
            boxes and [boxes[i] for i in chosen],
        ).to(self.group.device)

    def token_count(self, batch: PackedBatch) -> int:
        return sum(batch.lengths) + self.student.config.prefix * len(batch)

    def image_weights(self, streams: tuple[Stream, ...], micros: list[PackedBatch]) -> list[dict]:
        """Per micro-batch and teacher: the `Weights` of its images, made on the host.

        AMoE Sec. 2.1: 1 / (images on all ranks), whatever an image's size and wherever it landed.
        average="partition" (RADIO Sec. 2.1) does so within each stream and then over the streams;
        with "token" patches count by their number (the ablation). A teacher that does not supervise
        an image's stream gives it 0.
        """
        partitions = [torch.tensor(m.stream_B, dtype=torch.int64) for m in micros]
        sizes = [torch.tensor(m.lengths, dtype=torch.float64) for m in micros]
        totals = torch.zeros(2, len(streams), dtype=torch.float64)
        for stream_B, size_B in zip(partitions, sizes, strict=True):
            totals[0].index_add_(0, stream_B, torch.ones_like(size_B))
            totals[1].index_add_(0, stream_B, size_B)
        images_S, tokens_S = sum_over_ranks(totals)
        result: list[dict] = [{} for _ in micros]
        for name in (teacher.name for teacher in self.teachers):
            taught = [not stream.teachers or name in stream.teachers for stream in streams]
            taught_S = totals.new_tensor(taught)
            image_S = taught_S / (taught_S * images_S).sum().clamp(min=1)
            if self.cfg.average == "partition":
                image_S = taught_S / images_S.clamp(min=1) / len(streams)
            token_S = taught_S / (taught_S * tokens_S).sum().clamp(min=1)
            for micro, stream_B, size_B in zip(result, partitions, sizes, strict=True):
                summary_B = patch_B = image_S[stream_B].float()
                if self.cfg.average == "token":
                    patch_B = (token_S[stream_B] * size_B).float()
                both_2B = to_device(torch.stack([summary_B, patch_B]), self.group.device)
                micro[name] = Weights(both_2B[0], both_2B[1], taught_S[stream_B].tolist())
        return result

    def forward(self, step: int, batch: PackedBatch) -> StudentOutput:
        """The student on one micro-batch; its randomness depends on step and picture alone."""
        windows_B5 = None
        if isinstance(self.student.positions, TablePositions) and self.cfg.windows:
            keys = [(self.cfg.seed, step, sample.key, "window") for sample in batch.samples]
            rows = [position_windows(1, keyed_generator(*key)) for key in keys]
            windows_B5 = torch.cat([torch.zeros(0, 5), *rows])
        with self.autocast:
            return self.model(batch, windows_B5)

    def summaries(self, out: StudentOutput) -> dict[str, Tensor]:
        """Predicted summaries in the space of the loss; a pooling head answers in the teacher's."""
        pooled = {head.name for head in self.student.config.heads if head.pool}
        norms = {name: self.spaces[name].parts["summary"] for name in pooled}
        return {k: norms[k].normalize(v) if k in pooled else v for k, v in out.summary.items()}

    def backward(self, step, micros, targets, weights) -> tuple[dict[str, Tensor], Tensor | None]:
        """Gradients of the step's loss; returns this rank's shares of its parts and expert counts.

        The relational loss needs the summaries of all micro-batches on all ranks at once, so its
        gradient is taken first, on detached summaries, and then enters each micro-batch's backward
        as <summary, gradient>. With several micro-batches that takes a forward without graph.
        """
        self.optimizer.zero_grad(set_to_none=True)
        first, counts = None, []
        relation: dict[str, tuple[Tensor, list[Tensor]]] = {}
        if len(micros) == 1:
            first = self.forward(step, micros[0])
        if self.cfg.relation != "none":
            with torch.no_grad():
                own = [self.summaries(first or self.forward(step, m)) for m in micros]
            relation = self.relation_gradients(own, targets, weights)
        shares: dict[str, Tensor] = {f"{t}/relation": v for t, (v, _) in relation.items()}
        for i, batch in enumerate(micros):
            with gradient_sync(self.model, i == len(micros) - 1):
                out = first or self.forward(step, batch)
                summaries = self.summaries(out)
                parts = self.feature_losses(out, summaries, batch, targets[i], weights[i])
                loss = torch.stack([self.weight(name) * v for name, v in parts.items()]).sum()
                for name, (_, grads) in relation.items():
                    pull = (summaries[name] * grads[i]).sum()
                    loss = loss + self.weight(f"{name}/relation") * pull
                # DDP and FSDP2 average gradients over the ranks; the shares are to be summed.
                (loss * self.group.world).backward()
            for name, value in parts.items():
                shares[name] = shares.get(name, 0) + value.detach()
            if out.counts_LE is not None:
                counts.append(out.counts_LE)
        return shares, torch.stack(counts).sum(0) if counts else None

    def feature_losses(self, out, summaries, batch, targets, weights) -> dict[str, Tensor]:
        """This rank's share of each teacher's patch, summary and register loss (AMoE Sec. 2.1)."""
        parts, kind = {}, self.cfg.summary_loss
        for name, target in targets.items():
            summary_B, patch_B, _ = weights[name]
            patches_MC, maps, how = out.patches[name], target.patches, self.cfg.patch_loss
            if batch.views:  # each saw its own part of the picture, all of as many patches
                maps = [losses.resize_map(*x) for x in zip(maps, batch.grids, strict=True)]
                ours, theirs = ([v.origin for v in batch.views[key]] for key in ("", name))
                loss_B = losses.shift_loss(patches_MC, batch.grids, ours, maps, theirs, how)
            else:
                loss_B = losses.patch_loss(patches_MC, batch.grids, maps, how)
            parts[f"{name}/patches"] = (loss_B * patch_B).sum()
            if target.summary_BC is not None:
                pair = summaries[name], target.summary_BC
                if dispersion := self.spaces[name].dispersion:
                    loss_B = losses.angle_loss(*pair, dispersion.value)
                else:
                    loss_B = losses.vector_loss(*pair, kind)
                parts[f"{name}/summary"] = (loss_B * summary_B).sum()
            if target.registers_BRC is not None and name in out.registers:
                raw_BRC = self.spaces[name].parts["patches"].denormalize(out.registers[name])
                loss_B = losses.vector_loss(raw_BRC, target.registers_BRC, how)
                parts[f"{name}/registers"] = (loss_B * summary_B).sum()
        return parts

    def relation_gradients(self, own, targets, weights) -> dict[str, tuple[Tensor, list[Tensor]]]:
        """Per teacher: this rank's share of the loss's value and d loss / d its own summaries.

        Only the images that the teacher supervises are related to each other.
        """
        compare = {"arkd": losses.arkd, "rkd": losses.rkd}[self.cfg.relation]
        result = {}
        for name in (teacher.name for teacher in self.teachers if teacher.summary_dim is not None):
            is_taught_B = torch.tensor([x for micro in weights for x in micro[name].is_taught])
            taught_K = to_device(is_taught_B.nonzero()[:, 0], self.group.device)
            own_BC = torch.cat([summaries[name] for summaries in own]).float()
            target_BC = torch.cat([target[name].summary_BC for target in targets])
            pairs_KC = torch.cat([own_BC, target_BC], dim=1).index_select(0, taught_K)
            pairs_KC, mine = gather_rows(pairs_KC, self.group)
            student_BC, teacher_BC = pairs_KC.split([own_BC.shape[1], target_BC.shape[1]], dim=1)
            student_BC = student_BC.detach().requires_grad_()
            loss = compare(student_BC, teacher_BC, self.cfg.relation_mean)
            (grad_BC,) = torch.autograd.grad(loss, student_BC)
            whole_BC = torch.zeros_like(own_BC).index_copy(0, taught_K, grad_BC[mine])
            sizes = [len(summaries[name]) for summaries in own]
            result[name] = (loss.detach() / self.group.world, whole_BC.split(sizes))
        return result

    def set_lr(self, step: int) -> float:
        """Linear warm-up, then cosine down to min_lr (RADIO Sec. 4; AMoE does not say)."""
        cfg = self.cfg
        part = min(1.0, max(0.0, (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)))
        cosine = cfg.min_lr + (1 - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * part))
        lr = cfg.lr * min(1.0, step / max(1, cfg.warmup)) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
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
        seen = [sample.key for batch in micros for sample in batch.samples]
        fault = f"bad teacher features on rank {self.group.rank}: {', '.join(keys)}"
        if not keys:
            fault = f"good teacher features on rank {self.group.rank}, of {', '.join(seen)}"
        return (
            f"step {step}: not finite: {', '.join(bad) or f'gradient norm {grad_norm}'}; {fault}. "
            "Nothing was stepped and the newest checkpoint is good: start from its model.pt by "
            "--init NAME=PATH with a lower --lr and another --out, or leave such pictures out"
        )

    def state_dict(self) -> dict:
        """Everything that the next step depends on, but the data, which is a function of `step`.

        A collective call under FSDP2: rank 0 gets whole tensors.
        """
        return {
            "student": get_model_state_dict(self.student, options=WHOLE),
            "optimizer": get_optimizer_state_dict(self.student, self.optimizer, options=WHOLE),
            "average": {name: whole(mean) for name, mean in self.average.items()},
            "normalizers": {name: space.state_dict() for name, space in self.spaces.items()},
            "adaloss": self.ada.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`, on any number of ranks."""
        self.distribute()
        set_model_state_dict(self.student, state["student"], options=WHOLE)
        moments = dataclasses.replace(WHOLE, strict=False)  # a frozen trunk has none yet
        set_optimizer_state_dict(self.student, self.optimizer, state["optimizer"], options=moments)
        for name, p in trained(self.student):
            if name not in state["optimizer"]["state"]:
                self.optimizer.state.pop(p, None)
        for name, mean in self.average.items():
            mean.copy_(spread(state["average"][name], mean))
        for name, space in self.spaces.items():
            space.load_state_dict(state["normalizers"][name])
        self.ada.load_state_dict(state["adaloss"])

    def save_folded(self, path: Path, state: dict) -> None:
        """Write the student that `load_student` reads: the running mean if there is one, PHI-S
        folded into its heads."""
        folded = Student(self.student.config)
        folded.load_state_dict(state["student"] | state["average"])
        for name, head in folded.heads.items():
            self.spaces[name].fold_into(head)
        save_student(folded, path)


# ---------------------------------------------------------------- where the student comes from


def build_student(cfg: TrainConfig, teachers: list[Teacher]) -> tuple[Student, set[str]]:
    """The student before step 1, and the names of the heads that already answer in teacher space.

    It depends on the configuration and the files alone. Raises: ValueError if --init does not fit.
    """
    given = read_init(cfg) if cfg.init else None
    base = given.config if given and cfg.model == "init" else MODELS[cfg.model]
    if given and cfg.model == "init" and not given.heads:
        base = dataclasses.replace(base, cls_tokens=2)  # with_heads: one for each (RADIO Sec. 1.3)
    torch.manual_seed(cfg.seed)
    student = Student(with_heads(base, [head_spec(cfg, base, t) for t in teachers]))
    for teacher in teachers:
        if student.heads[teacher.name].spec.pool:
            copy_pool(student.heads[teacher.name].pool, teacher.backbone.network.head)
    return student, load_pretrained(student, given) if given else set()


def head_spec(cfg: TrainConfig, base: ModelConfig, teacher: Teacher) -> HeadSpec:
    """The head for a teacher: AMoE's adapter with foldable outputs, or RADIO's two MLPs."""
    name, dim, summary_dim = teacher.name, teacher.dim, teacher.summary_dim
    if base.form == "radio":
        hidden = cfg.head_hidden or 1024
        return RadioSpec(name, dim, summary_dim, hidden=hidden, summary_hidden=hidden,
                         in_trunk_summary=summary_dim is not None)  # fmt: skip
    pool: Any = getattr(teacher.backbone.network, "head", None) if cfg.pool else None
    if hasattr(pool, "probe"):
        return AdapterSpec(name, dim, dim, pool=True, bias=True, hidden=cfg.head_hidden,
                        pool_hidden=pool.mlp.fc1.out_features,
                        pool_heads=pool.attention.num_heads,
                        pool_eps=pool.layernorm.eps)  # fmt: skip
    # registers are matched one to one, so there must be as many (AMoE: DINOv3's 4)
    return AdapterSpec(name, dim, summary_dim, registers=teacher.registers == base.registers > 0,
                    split=True, bias=True, hidden=cfg.head_hidden)  # fmt: skip


def read_init(cfg: TrainConfig) -> Student:
    """What --init names, as a student: one of our checkpoints, or a ViT of transformers."""
    spec = parse_teacher(cfg.init)
    path = Path(spec.path)
    if path.is_file() and path.suffix != ".onnx":
        return load_student(path)
    is_folder = path.is_dir() or not (path.is_file() or spec.path.startswith("builtin:"))
    if is_folder and pretrained(spec, "AutoConfig").model_type == "vit":  # no teacher: a classifier
        vit = load_network(spec, "ViTModel", add_pooling_layer=False)
        return read_vit(vit, spec.layer, HALF_RGB)
    backbone = load_backbone(spec)
    try:
        return read_vit(backbone.network, spec.layer or backbone.layer, backbone.stats)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--init {cfg.init} is no ViT or DINOv2 that we can read: {error}"
        ) from error


# ------------------------------------------------------------- distribution and the optimizer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def held(x: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """A tensor of which this rank may hold a shard, as a whole on the host (a collective call)."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).cpu()


def spread(x: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, if `like` is one."""
    if isinstance(like, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def distribute(cfg: TrainConfig, student: Student, group: Group) -> Any:
    """The student as the ranks share it: as it is (one process), copies (DDP), shards (FSDP2)."""
    student.recompute = cfg.recompute
    for block in student.blocks if cfg.compile else ():
        block.compile(dynamic=True)
    if group.world == 1:
        return student
    if cfg.parallel == "ddp":
        # buffers change alike on all ranks; a frozen trunk's parameters get no gradient
        return nn.parallel.DistributedDataParallel(
            student,
            broadcast_buffers=False,
            find_unused_parameters=cfg.frozen_steps > 0,
            gradient_as_bucket_view=True,
        )
    # Weights are gathered in float32 and autocast rounds them where it is safe: gathering bf16
    # would halve the traffic, but round the routers and the residual stream, too.
    for block in student.blocks:
        fully_shard(block)
    return fully_shard(student)


def gradient_sync(model: Any, last: bool) -> Any:
    """Ranks add up their gradients in the backward of a step's last micro-batch only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def trained(student: Student) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in student.named_parameters() if p.requires_grad)


def is_decayed(name: str, p: Tensor) -> bool:
    """Matrices decay, several learned tokens among them; vectors, scalars, one token and the
    position table (RADIO release) do not."""
    return p.ndim >= 2 and p.shape[0] > 1 and not name.startswith("positions.")


def describe(optimizer: torch.optim.Optimizer) -> str:
    """A table of the optimizer's groups."""
    rows = [
        f"{type(optimizer).__name__:<8}{'tensors':>9}{'M numbers':>11}{'decay':>8}{'lr share':>10}"
    ]
    names = ("trunk", "", "heads", "")
    for name, group in zip(names, optimizer.param_groups, strict=True):
        numbers = sum(p.numel() for p in group["params"]) / 1e6
        rows.append(f"{name:<8}{len(group['params']):>9}{numbers:>11.3f}"
                    f"{group['weight_decay']:>8.3g}{group['share']:>10.3g}")  # fmt: skip
    return "\n".join(rows)


def make_optimizer(cfg: TrainConfig, student: Student) -> torch.optim.Optimizer:
    """AdamW or LAMB over four groups: trunk and heads, what decays and what does not."""
    groups = []
    for is_head, share in ((False, cfg.trunk_lr), (True, 1.0)):
        for decays in (True, False):
            params = [
                p
                for name, p in trained(student)
                if (name.startswith("heads."), is_decayed(name, p)) == (is_head, decays)
            ]
            decay = cfg.weight_decay if decays else 0.0
            groups.append({"params": params, "weight_decay": decay, "share": share})
    if cfg.optimizer == "lamb":
        return Lamb(groups, lr=cfg.lr, betas=(0.9, cfg.beta2))
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, cfg.beta2), fused=True)


class Lamb(torch.optim.Optimizer):
    """Adam whose step in each decayed tensor is as long as lr times the tensor itself.

    You et al. 2020, arXiv 1904.00962, Algorithm 2; RADIO Sec. 4. As usual, what does not decay
    takes Adam's plain step.
    """

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float = 1e-6):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
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


# ------------------------------------------------------------------------------ checkpoints


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
        trainer.save_folded(draft / "model.pt", state)
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
    found = (p for p in out.glob("step_*") if p.name[5:].isdigit())
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(cfg: TrainConfig) -> Path | None:
    """The checkpoint to go on from: the newest whole one, or the one that --resume names.

    A run that torchrun restarted goes on from its own newest one, whatever --resume said.
    """
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if cfg.resume == "none" and not is_restart:
        return None
    if cfg.resume not in ("auto", "none") and not is_restart:
        if reason := broken(Path(cfg.resume)):
            raise ValueError(f"--resume {cfg.resume}: {reason}")
        return Path(cfg.resume)
    for folder in reversed(checkpoints(Path(cfg.out))):
        if reason := broken(folder):
            print(f"skipping a broken checkpoint: {reason}", file=sys.stderr)
        else:
            return folder
    return None


def agree_on_checkpoint(cfg: TrainConfig, group: Group) -> Path | None:
    """`newest_checkpoint` as rank 0 sees it, on all ranks; or its ValueError on all of them."""
    if group.world == 1:
        return newest_checkpoint(cfg)
    box: list = [None, None]
    if group.rank == 0:
        try:
            box[0] = newest_checkpoint(cfg)
        except ValueError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box)
    if box[1]:
        raise ValueError(box[1])
    return box[0]


def set_aside(cfg: TrainConfig, step: int) -> None:
    """Rename the checkpoints of an older run in this folder that are beyond the first step."""
    for folder in checkpoints(Path(cfg.out)):
        if int(folder.name[5:]) > step:
            aside = folder.with_name(f"old_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            print(f"{folder} is beyond step {step} and is now {aside.name}", file=sys.stderr)
    (Path(cfg.out) / "summary.json").unlink(missing_ok=True)


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
    """metrics.jsonl: a header line, then one object per logged step.

    "left over" are, by stage, the pictures of the first epoch in packs that do not fill a step.
    """

    def __init__(self, cfg: TrainConfig, group: Group, last_step: int, stages: list[StepData]):
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.main = group.rank == 0
        if not self.main:
            return
        header = {"config": cfg.identity(), "version": VERSION, "torch": torch.__version__,
                  "device": str(group.device), "world": group.world,
                  "left over": [data.dropped(0) for data in stages]}  # fmt: skip
        old = self.path.read_text().splitlines()[1:] if self.path.exists() else []
        whole = [line for line in old if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= last_step]
        first = json.dumps(header, allow_nan=False)
        write_text(self.path, "\n".join([first, *kept]) + "\n")

    def write(self, row: dict) -> None:
        if self.main:
            with self.path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()[1:]]


def draw_curves(rows: list[dict], path: Path, cfg: TrainConfig) -> None:
    """Losses per teacher and part, expert load and learning rate over the steps, as one picture.

    Vertical lines are where a stage ends.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    steps = [row["step"] for row in rows]
    for name in [key for key in rows[-1] if key.startswith("loss/") and "relation" not in key]:
        if name != "loss/total":
            label = name[5:] + (" (raw)" if name.endswith("/registers") else "")
            left.plot(steps, [row[name] for row in rows], label=label)
    kinds = cfg.patch_loss, cfg.summary_loss
    if cfg.normalizer in ("phis", "channel") and kinds in (("mse", "mse"), ("mse", "angle")):
        left.set(title="feature loss (1: whoever answers the stage's mean)", ylim=(0, 1.2))
    else:
        left.set(title=f"feature loss ({', '.join(kinds)} of {cfg.normalizer})", yscale="log")
    left.set(xlabel="step")
    left.legend(fontsize=8)
    for name in [key for key in rows[-1] if key.endswith("/relation")]:
        middle.plot(steps, [row[name] for row in rows], label=name[5:])
    middle.set(title="relational loss", xlabel="step")
    if middle.get_legend_handles_labels()[0]:
        middle.legend(fontsize=8)
    right.plot(steps, [row["moe/max_load"] for row in rows], label="busiest expert / mean")
    right.plot(steps, [row["grad_norm"] for row in rows], label="gradient norm", alpha=0.5)
    peak = max(row["lr"] for row in rows)
    right.plot(steps, [row["lr"] / peak for row in rows], label="learning rate / its peak")
    right.set(title="experts, gradients, learning rate", xlabel="step", yscale="log")
    right.legend(fontsize=8)
    for _, last in cfg.stage_bounds()[:-1]:
        for axis in (left, middle, right):
            axis.axvline(last + 0.5, color="0.8", linewidth=1, zorder=0)
    figure.savefig(path, dpi=110)


def progress(items, name: str, group: Group, **kwargs):
    """A tqdm bar on rank 0 and a terminal only."""
    hidden = group.rank != 0 or not sys.stderr.isatty()
    return tqdm(items, desc=name, disable=hidden, dynamic_ncols=True, **kwargs)


def open_sources(cfg: TrainConfig) -> tuple[list[Source], Source]:
    """The training sources, and pictures held out of the first one for the report.

    Drawings are held out by character, a user's pictures by content (`packing.hold_out`); with
    --held-out 0 all are trained on, and the report has nothing to score.
    """
    train, held_out = [], []
    for spec in cfg.data:
        source = open_source(spec)
        if spec.split(":")[0] == "openmoji":
            if spec.split(":")[1:2] not in ([], [""], ["train"]):
                raise ValueError(f"--data {spec}: the report is scored on openmoji:test; train on "
                                 "openmoji or openmoji:train:COUNT")  # fmt: skip
            rest = open_source(f"openmoji:test:{max(16, round(cfg.held_out * len(source)))}")
        else:
            source, rest = hold_out(source, cfg.held_out)
        if cfg.held_out and not (len(source) and len(rest)):
            raise ValueError(
                f"held_out={cfg.held_out} leaves {len(source)} pictures of {spec} to train on and "
                f"{len(rest)} for the report; give some {math.ceil(3 / cfg.held_out)} different "
                "pictures or change --held-out; 0 trains on all, without a report"
            )
        train.append(source)
        held_out.append(rest)
    return train, held_out[0]


def make_stages(cfg: TrainConfig, sources: list[Source], student: Student, group: Group,
                teachers: Collection[Teacher] | None = None) -> list[StepData]:  # fmt: skip
    """One `StepData` per stage; each stage starts its own epoch 0.

    With `teachers`, what the live ones see of a picture is made in the loader's workers, which
    then keep the picture itself.
    """
    live = None
    if teachers is not None:
        live = {t.name: t.size_for for t in teachers if not isinstance(t, CachedTeacher)}
    patch, prefix = student.config.patch, student.config.prefix
    shares = cfg.data_weights or tuple(float(len(s)) for s in sources)
    mix = list(zip(sources, shares, strict=True))
    stages = []
    for number, stage in enumerate(cfg.stages):
        times = cfg.times(stage, patch, prefix)
        streams = [dataclasses.replace(s, packs=s.packs * times) for s in stage.streams]
        total = sum(stream.packs for stream in streams)
        if cfg.micro_packs and total % (cfg.micro_packs * group.world):
            raise ValueError(
                f"micro_packs={cfg.micro_packs} * {group.world} processes does not divide the "
                f"{total} packs of a step; change --micro-packs or --global-tokens"
            )
        stages.append(
            StepData(
                streams, mix, patch, prefix, cfg.seed + number, group.rank, group.world,
                cfg.max_images, cfg.shift, live,
            )
        )  # fmt: skip
    return stages


def steps_from(run: Run, start: int) -> Iterator[tuple[int, list[PackedBatch]]]:
    """(step, this rank's packs) for the steps after `start`, through the stages."""
    pin = run.trainer.group.device.type == "cuda"
    bounds = zip(run.cfg.stage_bounds(), run.stages, strict=True)
    for stage, ((first, last), data) in enumerate(bounds):
        if start < last:
            begin = max(start, first)
            if stage and begin == first:  # a run that resumes inside a stage has its spaces
                run.trainer.fit_normalizers(data, stage)
            loader = make_loader(data, begin - first, last - first, run.cfg.workers, pin)
            yield from enumerate(loader, begin + 1)


LAUNCHER = os.getppid()


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save once and leave between two steps."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def release(self) -> None:
        """Signals end the process again."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _remember(self, number, _frame) -> None:
        self.number = number

    def poll(self) -> int:
        """The signal's number, or 0. A launcher that is gone counts as SIGTERM: no orphans."""
        orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != LAUNCHER
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
            run.log.write(metrics_row(run, result, speed))
            bar.set_postfix(loss=f"{result.losses['total']:.3f}", tok_s=f"{speed:.0f}")
        bar.update()
        is_look = cfg.look_every and step % cfg.look_every == 0 and step < cfg.steps
        if step % cfg.save_every == 0 or step == cfg.steps or is_look or result.stop:
            save(run)
        if is_look:
            run.log.write({"step": step, **look(run)})
        if result.stop and step < cfg.steps:
            if group.rank == 0:
                print(f"told to stop: step {step} is saved in {cfg.out}; the same command goes on")
            raise SystemExit(EXIT_SIGNALLED + (stop.number or signal.SIGTERM))
    bar.close()
    stop.release()


def note_skipped(cfg: TrainConfig, record: dict, skipped: dict[str, str]) -> None:
    """Name each picture that does not decode once, and stop where they are too many."""
    new = {key: reason for key, reason in skipped.items() if key not in record["skipped"]}
    for key, reason in new.items() if is_main() else ():
        tqdm.write(f"skipped {key}: {reason}", file=sys.stderr)
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


def note_scan(cfg: TrainConfig, sources: list[Source]) -> dict[str, str]:
    """Name what the sources skipped when they were scanned; refuse those with too many broken."""
    skipped = {key: reason for source in sources for key, reason in source.skipped.items()}
    for line in left_out(skipped) if is_main() else ():
        print(f"skipped {line}", file=sys.stderr)
    for source in sources:
        whole = source.source if isinstance(source, Subset) else source
        refuse_bad_fraction(cfg, getattr(whole, "lost", 0), len(whole))
    if len(sources) > 1 and is_main():
        print(f"the report scores pictures of {cfg.data[0]}, the first SOURCE", file=sys.stderr)
    return skipped


def note_registers(config: ModelConfig, teachers: list[Teacher]) -> None:
    """Name the teachers whose registers no head is asked for; RADIO's form matches none."""
    unused = {head.name for head in config.heads if not head.registers and config.form == "amoe"}
    for teacher in teachers if is_main() else ():
        if teacher.name in unused and teacher.registers:
            print(f"teacher {teacher.name} has {teacher.registers} registers, the student "
                  f"{config.registers}: they are matched one to one, so these have no loss; it "
                  "takes a --model with as many", file=sys.stderr)  # fmt: skip


def metrics_row(run: Run, result: StepResult, tokens_per_s: float) -> dict:
    parts = {f"loss/{name}": value for name, value in result.losses.items()}
    record, devices = run.record, run.trainer.group.world
    return finite({
        "step": record["step"], **parts, "lr": result.lr, "grad_norm": result.grad_norm,
        "tokens_per_s": round(tokens_per_s, 1),
        "tokens_per_s_device": round(tokens_per_s / devices, 1),
        "moe/max_load": result.max_load,
        "images": record["images"], "tokens": record["tokens"],
    }, **{"moe/max_load": "the step has no token"})  # fmt: skip


def save(run: Run) -> None:
    """Write step_NNNNNN on rank 0, redraw the curves, drop the checkpoints that are not kept."""
    state = {**run.record, "identity": run.identity, **run.trainer.state_dict()}
    if run.trainer.group.rank == 0:
        out, cfg = Path(run.cfg.out), run.cfg
        write_checkpoint(out / f"step_{run.record['step']:06d}", run.trainer, state)
        for old in checkpoints(out)[: -cfg.keep]:
            if not cfg.keep_every or int(old.name[5:]) % cfg.keep_every:
                shutil.rmtree(old)
        if rows := [row for row in run.log.rows() if "loss/total" in row]:
            draw_curves(rows, out / "curves.png", cfg)
    if dist.is_initialized():
        dist.barrier()


def look(run: Run, pictures: int = 500) -> dict[str, float]:
    """kNN accuracy of the checkpoint just saved, all ranks sharing the work, and pca.png."""
    out, group = Path(run.cfg.out), run.trainer.group
    newest = out / f"step_{run.record['step']:06d}" / "model.pt"
    student = load_student(newest, device=str(group.device))
    student.precision = run.cfg.precision
    sources = (run.train_sources[0], run.held_out)
    some = [Subset(s, range(0, len(s), max(1, len(s) // pictures))) for s in sources]
    train, test = (extract({"student": student}, source, 0) for source in some)
    if group.rank == 0:
        draw_pca(run, student)
    try:
        return {f"knn/{name}": row["value"] for name, row in knn(train, test).items()}
    except ValueError as error:  # no labels, or a class that only one of the two has
        if group.rank == 0:
            print(f"step {run.record['step']}: no kNN: {error}", file=sys.stderr)
        return {}


def draw_pca(run: Run, student: Student) -> None:
    """pca.png: held-out pictures, each teacher's maps, the student's."""
    shown = run.held_out if len(run.held_out) else run.train_sources[0]
    pictures, _ = first_pictures(shown, 8)  # the report names those that do not decode
    teachers = {teacher.name: teacher for teacher in run.trainer.teachers}
    pca_sheet(Path(run.cfg.out) / "pca.png", pictures, {"teacher": teachers, "student": student})


def finish(run: Run) -> None:
    """Score the student on held-out pictures; write summary.json and pca.png; print the table."""
    out, cfg = Path(run.cfg.out), run.cfg
    device = str(run.trainer.group.device)
    student = load_student(out / f"step_{cfg.steps:06d}" / "model.pt", device=device)
    control = random_control(student, cfg.seed)
    student.precision = control.precision = cfg.precision
    teachers = {t.name: t for t in run.trainer.teachers}
    report = final_report(
        student, control, teachers, run.train_sources[0], run.held_out, limit=1000
    )
    draw_pca(run, student)
    skipped = run.record["skipped"] | report["skipped"]
    summary = {"steps": cfg.steps, "minutes": run.record["seconds"] / 60, "report": report,
               "scored": cfg.data[0], "skipped": skipped, "config": cfg.identity()}  # fmt: skip
    write_text(out / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
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
    """The frozen teachers; with a cache, after their features of all pictures are on the disk.

    Raises: Standstill if too many pictures do not decode. Those met in training are named there.
    """
    is_half = group.device.type == "cuda" and cfg.precision != "fp32"
    dtype = torch.bfloat16 if is_half else None
    teachers = [load_teacher(parse_teacher(text), group.device, dtype) for text in cfg.teachers]
    if cfg.cache == "none":
        return teachers
    folder = cache_home() / "features" if cfg.cache == "auto" else Path(cfg.cache)
    cached = [CachedTeacher(teacher, folder) for teacher in teachers]
    for source in sources:
        bad = merge_skipped([fill_caches(cached, source)], True, group)
        refuse_bad_fraction(cfg, len(bad), len(source) - len(bad))
    return cached


def prepare(cfg: TrainConfig) -> Run:
    """Everything up to the first step: process group, data, teachers, student, resume."""
    need("matplotlib", "curves.png")
    group = setup_distributed(cfg.pg_timeout, cfg.device)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // local_world))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    if group.rank == 0:  # a folder that can't be written to is found out before any work
        fields = {f.name: _plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}
        write_text(Path(cfg.out) / "config.json", json.dumps(fields, indent=1, allow_nan=False))
    train_sources, held_out = open_sources(cfg)
    scanned, folder = note_scan(cfg, train_sources), agree_on_checkpoint(cfg, group)
    if not folder and group.rank == 0:  # before a restart could take them for this run's
        set_aside(cfg, 0)
    teachers = load_teachers(cfg, [*train_sources, held_out], group)
    trainer = Trainer(cfg, group, teachers)
    note_registers(trainer.student.config, teachers)
    stages = make_stages(cfg, train_sources, trainer.student, group, teachers)
    identity = {**cfg.identity(), "sources": [s.fingerprint() for s in train_sources],
                "fingerprints": {t.name: t.fingerprint for t in teachers}}  # fmt: skip
    record: dict[str, Any] = {"step": 0, "seconds": 0.0, "images": 0, "tokens": 0, "bad": 0,
              "skipped": scanned}  # fmt: skip
    if folder:
        state = read_state(folder)
        refuse_changes(folder, state["identity"], identity)
        trainer.load_state_dict(state)
        record = {name: state[name] for name in record}
        if group.rank == 0:
            set_aside(cfg, record["step"])
    else:
        trainer.fit_normalizers(stages[0])
    if group.rank == 0:
        print(describe(trainer.optimizer), file=sys.stderr)
    log = Log(cfg, group, record["step"], stages)
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
    if dist.is_initialized():
        dist.destroy_process_group()
    if run.trainer.group.rank == 0:
        finish(run)


if __name__ == "__main__":
    main()
