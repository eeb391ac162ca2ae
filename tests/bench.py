"""Speed as ratios, each taken in one interleaved run: `python tests/bench.py [row ...]`.

The row `gpu` is bench_gpu.py, on a CUDA device, `soak` takes half an hour; without a name all
others run. A row is a function of `ROWS` that yields `Row`s. To add one, write the function and
list it. One thread and its CPU time (rows of several processes: wall time), medians of interleaved
turns; a ratio above 1 means that ours is better, unless the row says otherwise.
"""

import ctypes
import hashlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_train import soak, train_for

from model import MODELS, Layout, ModelConfig, MoE, Student, attention
from packing import (
    PackedBatch,
    StepData,
    Stream,
    make_loader,
    open_source,
    pack,
    patchify,
)
from sampling import SOLO, Rows, kmeans, step
from teachers import (
    CachedTeacher,
    SizeRule,
    Teacher,
    fill_caches,
    load_backbone,
    parse_teacher,
)
from train import PRESETS, StepReport, fill, load_teachers, open_sources

ROOT = Path(__file__).parents[1]
MIXED = [(8, 8), (24, 24), (12, 16), (16, 10), (20, 24), (9, 14), (24, 12), (10, 10)]  # 128..384 px
TOKENS_4096 = [(8, 8), (32, 32), (28, 31), (24, 24), (20, 20), (16, 20), (16, 16), (12, 16),
               (12, 12), (10, 10), (8, 8), (8, 8)]  # fmt: skip


@dataclass
class Row:
    """One line of the table."""

    number: str
    what: str
    ours: float
    other: float
    unit: str
    ratio: float
    floor: str
    aim: str


def interleaved(
    *ways: Callable[[], object], repeats: int = 7, clock: Callable[[], float] = time.process_time
) -> list[float]:
    """Median seconds of each way, run in turns so that the machine's mood hits all alike."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, record in zip(ways, times, strict=True):
            start = clock()
            own = way()  # seconds, where a way measures a part of itself
            if turn:  # the first turn warms up
                record.append(own if isinstance(own, float) else clock() - start)
    return [statistics.median(record) for record in times]


def peak_extra_memory(way: Callable[[], object]) -> float:
    """Largest resident memory above the start while `way` runs, in MiB."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or it would be used unseen
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    way()
    done.set()
    watcher.join()
    return peak[0] - before


def lively(student: Student) -> Student:
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return student


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask.expand(-1, -1, q.shape[2], -1))


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5 + mask).softmax(-1) @ v


def padded_forward(
    student: Student, images: list[torch.Tensor], attend: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """The same weights on a batch padded to the longest image, padding masked: trunk patches."""
    config, count, device = student.config, len(images), student.prefix_RD.device
    grids = [(x.shape[1] // config.patch, x.shape[2] // config.patch) for x in images]
    layouts = [Layout.of([grid], config.prefix, device) for grid in grids]
    longest = max(h * w for h, w in grids) + config.prefix
    x_BND = torch.zeros(count, longest, config.dim, device=device)
    is_real_BN = torch.zeros(count, longest, dtype=torch.bool, device=device)
    cos = torch.ones(count, longest, config.n_heads, config.head_dim // 4, device=device)
    sin = torch.zeros_like(cos)
    for i, (image, layout) in enumerate(zip(images, layouts, strict=True)):
        patches = patchify(image, config.patch)
        length = len(patches) + config.prefix
        x_BND[i, : config.prefix] = student.prefix_RD
        x_BND[i, config.prefix : length] = student.embed((patches - 0.5) / 0.5)
        cos[i, :length], sin[i, :length] = student.positions(x_BND, layout, None)[1]
        is_real_BN[i, :length] = True
    hidden = torch.zeros_like(is_real_BN, dtype=torch.float32).masked_fill(~is_real_BN, -torch.inf)
    hidden = hidden[:, None, None]
    for block in student.blocks:
        attn = block.attn
        qkv = attn.qkv(block.norm1(x_BND)).unflatten(-1, (3, config.n_heads, config.head_dim))
        qk = F.rms_norm(qkv[:, :, :2], (config.head_dim,))
        quarter = config.head_dim // 4
        still, a, b = qk.split([2 * quarter, quarter, quarter], dim=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        qk = torch.cat([still, a * c - b * s, a * s + b * c], dim=-1).to(qkv.dtype)
        q, k = qk.transpose(1, 3).unbind(2)
        # the sink as one more key: logit s by the mask, value zero
        sinks = attn.sinks[:, None, None].expand(count, -1, 1, 1)
        mask = torch.cat([hidden.expand(-1, config.n_heads, -1, -1), sinks], -1)
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, qkv[:, :, 2].transpose(1, 2)))
        y = attend(q, k, v, mask.to(q.dtype))
        y = y.transpose(1, 2).flatten(2)
        x_BND = x_BND + attn.proj(y)
        y = block.ffn(block.norm2(x_BND).flatten(0, 1))[0]
        x_BND = x_BND + y.view_as(x_BND)
    x_BND = student.norm(x_BND)
    return [
        x[config.prefix : config.prefix + h * w] for x, (h, w) in zip(x_BND, grids, strict=True)
    ]


def packed_forward(name: str, config: ModelConfig) -> Iterator[Row]:
    """Rows 1 and 2: 8 mixed images, packed against padded to the longest, and one at a time.

    Explicit softmax is the release's way on a CPU; beside it stands the best attention that there
    is: SDPA with a mask for padding, and our own forward, which then packs a single image.
    """
    torch.manual_seed(0)
    student = lively(Student(config)).eval()
    images = [torch.rand(3, 16 * h, 16 * w) for h, w in MIXED]
    batch, *alone = (PackedBatch.from_images(x, 16) for x in (images, *([x] for x in images)))
    rivals: dict[str, tuple[Callable[[], list[torch.Tensor]], str, str]] = {
        "padded, masked SDPA": (lambda: padded_forward(student, images, fused), "2.5", "4"),
        "padded, explicit softmax": (lambda: padded_forward(student, images, explicit), "2.5", "4"),
        "one at a time, explicit softmax": (
            lambda: [padded_forward(student, [x], explicit)[0] for x in images],
            "1.4",
            "2",
        ),
        "one at a time, ours": (lambda: [student(x).trunk_MD for x in alone], "", ""),
    }
    ways = [lambda: student(batch).trunk_MD]
    ways += [lambda way=way: torch.cat(way()) for way, _, _ in rivals.values()]
    with torch.no_grad():
        packed, *others = (way() for way in ways)
        error = max(((packed - x).abs().max() / x.abs().max()).item() for x in others)
        assert error < 1e-5, error
        times = interleaved(*ways, repeats=5)
        memory = [peak_extra_memory(way) for way in ways]
    for i, (rival, (_, floor, aim)) in enumerate(rivals.items(), start=1):
        title = f"packed forward, {name} / {rival} (error {error:.0e})"
        ours, other = 1e3 * times[0], 1e3 * times[i]
        yield Row("1", title, ours, other, "ms", other / ours, floor, aim)
        title, more = f"peak extra memory, {name}, {rival}", memory[i] / max(memory[0], 1e-9)
        if rival.startswith("padded"):
            yield Row("2", title, memory[0], memory[i], "MiB", more, "1.5", "3")


def radio_forward() -> Iterator[Row]:
    """Row 1b: the RADIO form against transformers' own, which packs too; same weights."""
    from transformers import RadioConfig, RadioModel

    from model import save_transformers

    torch.manual_seed(0)
    student = lively(Student(replace(MODELS["radio-b"], n_layers=4, heads=()))).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_transformers(student, folder)
        config = RadioConfig.from_pretrained(folder)
        peer = RadioModel.from_pretrained(folder, config=config).eval()
    images = [torch.rand(3, 16 * h, 16 * w) for h, w in MIXED]
    batch, grids = PackedBatch.from_images(images, 16), torch.tensor(MIXED)
    patches = torch.cat(
        [rearrange(x, "c (h p) (w q) -> (h w) (c p q)", p=16, q=16) for x in images]
    )
    ways = [
        lambda: student(batch).trunk_MD,
        lambda: peer(patches, image_grid_hw=grids).features.flatten(0, -2),
        lambda: torch.cat([peer(x[None]).features[0] for x in images]),
    ]
    with torch.no_grad():
        ours, *others = (way() for way in ways)
        error = max(((ours - x).abs().max() / x.abs().max()).item() for x in others)
        assert error < 1e-4, error
        times = [1e3 * seconds for seconds in interleaved(*ways, repeats=5)]
    for rival, other in zip(("packed", "one at a time"), times[1:], strict=True):
        what = f"RADIO form / transformers' RadioModel, {rival} (error {error:.0e})"
        yield Row("1b", what, times[0], other, "ms", other / times[0], "1.0", "1.3")


def encoding() -> Iterator[Row]:
    """Row 1c: `encode` of 12 mixed pictures of 64 to 1024 px against one at a time."""
    torch.manual_seed(0)
    student = lively(Student(replace(MODELS["dense-30m"], heads=()))).eval()
    sides = torch.logspace(6, 10, 12, base=2).tolist()
    images = [torch.rand(3, int(s), int(s * 3 / 4)) for s in sides]
    ways = lambda: student.encode(images), lambda: [student.encode([x])[0] for x in images]
    for ours, other in zip(*(way() for way in ways), strict=True):
        assert torch.allclose(ours.patches["trunk"], other.patches["trunk"], atol=1e-4, rtol=1e-3)
    ours, other = (1e3 * seconds for seconds in interleaved(*ways, repeats=5))
    what = "encode of 12 mixed pictures / one at a time"
    yield Row("1c", what, ours, other, "ms", other / ours, "1.0", "1.2")


def packed_attention() -> Iterator[Row]:
    """Row 3: attention of 4096 tokens in 12 images against a dense block mask."""
    layout = Layout.of(TOKENS_4096, 5, torch.device("cpu"))
    image_N = torch.arange(12).repeat_interleave(torch.tensor(layout.lengths))
    mask_NN = image_N[:, None] == image_N
    q, k, v = torch.randn(3, len(image_N), 6, 64).unbind(0)

    def dense() -> torch.Tensor:
        parts = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*parts, attn_mask=mask_NN)[0].transpose(0, 1)

    with torch.no_grad():
        assert torch.allclose(attention(q, k, v, layout), dense(), atol=1e-5)
        times = interleaved(lambda: attention(q, k, v, layout), dense, repeats=5)
    what = f"packed attention / block mask, {len(image_N)} tokens"
    yield Row("3", what, *[1e3 * t for t in times], "ms", times[1] / times[0], "6", "8")


def sink_attention() -> Iterator[Row]:
    """Row 4: exact sinks against plain SDPA for each image."""
    layout = Layout.of(TOKENS_4096, 5, torch.device("cpu"))
    count, sinks = sum(layout.lengths), torch.full((6,), 3.0, requires_grad=True)
    q, k, v = torch.randn(3, count, 6, 64, requires_grad=True).unbind(0)

    def plain() -> torch.Tensor:
        parts = [x.split(layout.lengths) for x in (q, k, v)]
        outs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in image))
            for image in zip(*parts, strict=True)
        ]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    def ours() -> torch.Tensor:
        return attention(q, k, v, layout, sinks)

    grad = torch.randn(count, 6, 64)
    with torch.no_grad():
        forward = interleaved(ours, plain)
    both = interleaved(
        lambda: torch.autograd.grad(ours(), (q, k, v, sinks), grad),
        lambda: torch.autograd.grad(plain(), (q, k, v), grad),
    )
    for part, times in (("forward", forward), ("forward + backward", both)):
        what = f"sinks / SDPA per image, {part} (smaller is better)"
        yield Row("4", what, *[1e3 * t for t in times], "ms", times[0] / times[1], "1.15", "1.03")


def experts() -> Iterator[Row]:
    """Row 5: MoE forward and backward against a dense layer of the same active parameters."""
    for dim, floor, aim in ((768, "1.4", "1.15"), (384, "1.7", "1.3")):
        config = replace(MODELS["amoe-0.3b"], dim=dim, ffn_dim=dim // 2, heads=(), n_layers=1)
        moe = MoE(config)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        hidden = config.top_k * config.ffn_dim
        w1, w2 = (
            torch.randn(2 * hidden, dim, requires_grad=True),
            torch.randn(dim, hidden, requires_grad=True),
        )
        x, grad = torch.randn(1024, dim, requires_grad=True), torch.randn(1024, dim)

        def dense() -> torch.Tensor:
            gate, value = F.linear(x, w1).chunk(2, -1)  # noqa: B023
            return F.linear(F.silu(gate) * value, w2)  # noqa: B023

        times = interleaved(
            lambda: torch.autograd.grad(moe(x)[0], (x, *moe.parameters()), grad),  # noqa: B023
            lambda: torch.autograd.grad(dense(), (x, w1, w2), grad),  # noqa: B023
            repeats=15,
        )
        what = f"28 experts top-6 / dense, dim {dim} (smaller is better)"
        yield Row("5", what, *[1e3 * t for t in times], "ms", times[0] / times[1], floor, aim)


def packer() -> Iterator[Row]:
    """Row 6: how full the packs are, against closing a pack as soon as a picture does not fit.

    20,000 pictures of exp(N(6.8, 0.95)) patches within 64 to 4096, and 5 prefix tokens. The floor
    and the aim are of our fill, at 5 ms per 1,000 pictures; 64 is the look-ahead of the training.
    """
    patches = np.random.default_rng(0).lognormal(6.8, 0.95, 20_000).clip(64, 4096)
    lengths = (patches.astype(int) + 5).tolist()
    bounds = {4128: ("99", "99.7"), 8192: ("99.5", "99.85"), 16384: ("99.8", "99.9")}
    for lookahead in (64, 1024):
        for budget, (floor, aim) in bounds.items():
            in_order, room = 0, 0
            for length in lengths:
                is_new = length > room
                in_order, room = in_order + is_new, (budget if is_new else room) - length
            start = time.perf_counter()
            packs = pack(lengths, budget, lookahead)
            milliseconds = (time.perf_counter() - start) * 1e3 / 20  # per 1,000 pictures
            ours, other = (100 * sum(lengths) / (n * budget) for n in (len(packs), in_order))
            what = f"fill of {budget}, look-ahead {lookahead}, {milliseconds:.1f} ms per 1000"
            yield Row("6", what, ours, other, "%", ours / other, floor, aim)


def photos(folder: Path, count: int = 48, size: tuple[int, int] | None = None) -> str:
    """Write JPEGs as large as a web crawl's: soft shapes and some grain -> the folder's SOURCE."""
    for i in range(count):
        rng = np.random.default_rng(i)
        height, width = size or rng.integers(320, 640, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        pixels = (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return str(folder)


def large_teachers(cache: str, sources: list) -> list[Teacher]:
    """Two ViT-S/14 that see pictures of 224^2 px, where the demo's teachers see 112^2 and 192^2."""
    teachers = []
    for name in ("one", "other"):
        backbone = load_backbone(parse_teacher(f"{name}=builtin:vit-s"))
        teachers.append(Teacher(name, replace(backbone, sizes=SizeRule("area", 14, 224))))
    if cache == "none":
        return teachers
    cached = [CachedTeacher(teacher, cache) for teacher in teachers]
    for source in sources:
        fill_caches(cached, source)
    return list(cached)


def training_on(
    source: str, cache: str, stage: int = -1, large: bool = False, **changes: Any
) -> Callable:
    """`train_for` on these pictures with the demo preset, at one of its stages; -1 is the last, of
    224 px. In float32 unless `changes` say otherwise."""
    stages = (replace(PRESETS["demo"].stages[stage], until=1.0),)
    config = replace(PRESETS["demo"], data=(source,), cache=cache, stages=stages, stats_steps=1)
    config = replace(config, **{"precision": "fp32"} | changes)
    sources, held_out = open_sources(config)
    every = [*sources, held_out]
    teachers = large_teachers(cache, every) if large else load_teachers(config, SOLO)
    fill(config, teachers, every)
    return partial(train_for, config, teachers=teachers, sources=sources, keeps=False)


def seconds_to_train(training: Callable, steps: int, **more: Any) -> float:
    """CPU seconds of the steps of `train.train`, from the first one's loading on."""
    began = []
    training(steps, lambda _: began.append(time.process_time()), **more)
    return time.process_time() - began[0]


def seconds_to_load(data: StepData, steps: int, workers: int) -> float:
    """Seconds for `steps` steps after the first, with which the workers are there."""
    loader = make_loader(data, 0, 1 + steps, workers)
    next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def loader(steps: int = 6) -> Iterator[Row]:
    """Pictures a second out of JPEGs, and what part of a training step their loading takes.

    The other is Pillow, one picture after the other: open, decode, bicubic to the same size. Ours
    also draws the order, packs and cuts patches. The part is loading / (loading + a step of the
    demo preset on the same packs from cached features), both in the main process.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        training = training_on(photos(Path(folder)), cache)
        (data,) = training().stages
        batches = [data[i] for i in range(1 + steps)]
        images = [
            (Path(folder, sample.key), (data.patch * w, data.patch * h))
            for packs in batches[1:]
            for batch in packs
            for sample, (h, w) in zip(batch.samples, batch.grids, strict=True)
        ]

        def plain() -> None:
            for path, size in images:
                picture = Image.open(path).convert("RGB")
                np.asarray(picture.resize(size, Image.Resampling.BICUBIC))

        def train() -> float:
            return seconds_to_train(training, steps, packs=batches[1:])

        times: list[tuple[float, ...]] = []
        for _ in range(3):
            loading = [seconds_to_load(data, steps, workers) for workers in (0, 1)]
            others = interleaved(plain, train, repeats=1, clock=time.perf_counter)
            times.append((*loading, *others))
        *ours, other, step = (statistics.median(record) for record in zip(*times, strict=True))
    for workers, seconds in enumerate(ours):
        what = f"loader / plain Pillow, workers={workers}"
        rates = len(images) / seconds, len(images) / other
        yield Row("9", what, *rates, "img/s", other / seconds, "", "")
    whole = ours[0] + step
    what = "loading / a training step with it, workers=0 (smaller is better)"
    yield Row("9", what, 1e3 * ours[0] / steps, 1e3 * whole / steps, "ms", ours[0] / whole, "", "")


def pixels_of(sample: dict) -> np.ndarray:
    """What users of webdataset write: Pillow, RGB, bicubic to the size of row 15."""
    picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    return np.asarray(picture.resize((256, 192), Image.Resampling.BICUBIC))


def megapixels(count: int = 96, repeats: int = 5) -> Iterator[Row]:
    """Row 15: pictures a second of 1152 x 864 px to 256 x 192, two loader processes on each side.

    Ours with cached features (no picture leaves the worker) and for a live teacher of that size.
    """
    import webdataset  # bench only

    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder), count, (864, 1152))
        for n in range(2):
            with tarfile.open(Path(folder, f"{n}.tar"), "w") as tar:
                for i in range(n, count, 2):
                    tar.add(Path(folder, f"{i}.jpg"), f"{i}.jpg")
        source = open_source(str(Path(folder, "*.tar")))
        order = [Stream("p", 224, budget=16 * 197, packs=1)], [(source, 1.0)], 16, 5

        def ours(rules: list[SizeRule]) -> None:
            data = StepData(*order, teachers={f"t{i}": r for i, r in enumerate(rules)})
            for _ in make_loader(data, 0, data.steps_in(0), workers=2):
                pass

        def theirs() -> None:
            paths = sorted(map(str, Path(folder).glob("*.tar")))
            data = webdataset.WebDataset(paths, shardshuffle=False).map(pixels_of).batched(16)
            for _ in webdataset.WebLoader(data, batch_size=None, num_workers=2):
                pass

        ways = (lambda: ours([]), lambda: ours([SizeRule("native", 16, 1024)]), theirs)
        cached, live, other = (
            count / s for s in interleaved(*ways, repeats=repeats, clock=time.perf_counter)
        )
    for what, rate in (("cached features", cached), ("a live teacher", live)):
        yield Row("15", f"loader of 1-megapixel JPEGs, 2 workers / webdataset, {what}", rate, other,
                  "img/s", rate / other, "1.5", "2.5")  # fmt: skip


def photographs(count: int = 20) -> Iterator[Row]:
    """Row 16: 12-megapixel JPEGs to 288 x 224 (CPU time), and what a step of them holds.

    The other decodes whole pictures and keeps them beside the patches.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos(Path(folder), 1, (3024, 4032))
        data = Path(folder, "0.jpg").read_bytes()
        for i in range(count):  # with a comment each, so that no two are the same
            Path(folder, f"{i}.jpg").write_bytes(data[:2] + b"\xff\xfe\0\x08%06d" % i + data[2:])
        source = open_source(folder)
        order = [Stream("p", 256, budget=24 * 300, packs=1)], [(source, 1.0)], 16, 5

        def step_of(rules: list[SizeRule] | None) -> list[PackedBatch]:
            return StepData(*order, max_images=32, teachers=rules and {"t": rules[0]})[0]

        rules = [SizeRule("native", 16, 1024)]
        times: dict[bool, list[float]] = {True: [], False: []}
        for is_ours in [True, False] * 3:
            start = time.process_time()
            step_of(rules if is_ours else None)
            times[is_ours].append(1e3 * (time.process_time() - start) / count)
        ours, other = (statistics.median(record) for record in times.values())
        held = []
        for batches in (step_of(rules), step_of(None)):
            samples = sum(s.image.nbytes for batch in batches for s in batch.samples)
            held.append(
                (samples + sum(batch.patches_MX.untyped_storage().nbytes() for batch in batches))
                / 1e6
            )
    what = "12-megapixel JPEG to its patches / decoded whole (smaller is better)"
    yield Row("16", what, ours, other, "ms", ours / other, "40 ms", "23 ms")
    what = f"a step of {count}, a live teacher / whole pictures (smaller is better)"
    yield Row("16", what, *held, "MB", held[0] / held[1], "200", "50")


def cached_features(steps: int = 2) -> Iterator[Row]:
    """Row 8: the same steps from cached features and with live float32 teachers.

    First the demo preset, each of its stages by its share of the steps; then two ViT-S/14 at 224 px
    and the demo's last stage. Loading counts on both sides, filling the cache on neither.
    """

    def times(stage: int, large: bool) -> list[float]:
        with tempfile.TemporaryDirectory() as cache:
            runs = [training_on("openmoji:train:96", at, stage, large) for at in (cache, "none")]
            return interleaved(*(partial(seconds_to_train, run, steps) for run in runs), repeats=3)

    demo = PRESETS["demo"]
    shares = [(last - first) / demo.steps for first, last in demo.stage_bounds()]
    stages = [times(stage, large=False) for stage in range(len(shares))]
    mixed = [
        sum(s * t for s, t in zip(shares, way, strict=True)) for way in zip(*stages, strict=True)
    ]
    for what, (ours, other) in (
        ("the demo's stages", mixed),
        ("two ViT-S, 224 px", times(-1, True)),
    ):
        milliseconds = [1e3 * seconds / steps for seconds in (ours, other)]
        yield Row(
            "8", f"cached / live teachers, {what}", *milliseconds, "ms", other / ours, "3", "4"
        )


def overhead(steps: int = 3) -> Iterator[Row]:
    """Row 9: the share of a step that is not the student's arithmetic (smaller is better).

    The whole: what the loop of train.py does at each stage of the demo preset, from cached
    features: loading, packing, looking the features up, forward, losses, backward, clipping, the
    optimizer, router biases, and a line of the log. The student alone: its forward to all outputs
    and its backward from gradients of ones, on the same packs, heads and adapters included. The
    drawings are in memory after the first turn, as they are in a run after its first epoch.
    """
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w") as log:
        for way, (stage, side) in product(("adamw", "muon"), enumerate((64, 96, 224))):
            training = training_on("openmoji:train:96", cache, stage, optimizer=way)
            run = training()
            (data,), student = run.stages, run.state.student
            batches = [PackedBatch.cat(data[i]) for i in range(steps)]

            def written(report: StepReport) -> None:
                row = {name: x for name, x in vars(report).items() if name != "loads_LE"}
                log.write(json.dumps(row) + "\n")

            def alone(batches: list = batches, student: Student = student) -> None:
                for batch in batches:
                    student.zero_grad()
                    out = student(batch)
                    outputs = [*out.summary.values(), *out.patches.values()]
                    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

            whole = partial(seconds_to_train, training, steps, after=written)
            times = [1e3 * seconds / steps for seconds in interleaved(whole, alone, repeats=3)]
            share = 1 - times[1] / times[0]
            what = f"share of a step outside the student, {way}, {side} px (smaller is better)"
            yield Row("9", what, *times, "ms", share, "0.15", "0.08")


def half_precision(steps: int = 16) -> Iterator[Row]:
    """Row 11: steps of the demo in bfloat16 against float32, CPU time, cached features."""
    with tempfile.TemporaryDirectory() as cache:
        for stage, side in enumerate((64, 96, 224)):
            drawings, both = "openmoji:train:96", ("bf16", "fp32")
            ways = (training_on(drawings, cache, stage, precision=one) for one in both)
            runs = (partial(seconds_to_train, way, steps) for way in ways)
            ours, other = (1e3 * seconds / steps for seconds in interleaved(*runs, repeats=5))
            what = f"--precision bf16 / fp32, a step at {side} px"
            yield Row("11", what, ours, other, "ms", other / ours, "1.25", "1.5")


def two_threads(steps: int = 16) -> Iterator[Row]:
    """Row 18: steps of the demo in bf16 by two threads and by one, on the clock of the wall."""
    with tempfile.TemporaryDirectory() as cache:
        for stage, side in enumerate((64, 96, 224)):
            training = training_on("openmoji:train:96", cache, stage, precision="bf16")

            def with_threads(count: int, training: Callable = training) -> float:
                torch.set_num_threads(count)
                began: list[float] = []
                training(steps, lambda _: began.append(time.perf_counter()))
                return time.perf_counter() - began[0]

            runs = (partial(with_threads, count) for count in (2, 1))
            ours, other = (1e3 * seconds / steps for seconds in interleaved(*runs, repeats=3))
            what = f"two threads / one, a step at {side} px"
            yield Row("18", what, ours, other, "ms", other / ours, "", "")
    torch.set_num_threads(1)


def two_processes(steps: int = 40, repeats: int = 3) -> Iterator[Row]:
    """Row 10: two gloo processes of one thread against one process of two, same global batches.

    The real command, the demo preset's stages and student; toy teachers, so that the student's
    part counts. The speed is the median of the lines of metrics.jsonl after the first.
    """
    flags = ["--data", "openmoji:train:48", "--cache", "none", "--stats-steps", "1"]
    flags += ["--teachers", "dense=builtin:tiny-dense", "semantic=builtin:tiny-semantic"]
    flags += ["--steps", str(steps), "--log-every", "5", "--save-every", str(steps)]
    speeds: dict[int, list[float]] = {2: [], 1: []}
    for _ in range(repeats):
        for processes, record in speeds.items():
            with tempfile.TemporaryDirectory() as out:
                launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                launch += ["--nproc-per-node", str(processes), "train.py", *flags, "--out", out]
                launch += ["--threads", str(2 // processes)]
                subprocess.run(launch, cwd=ROOT, check=True, capture_output=True)
                lines = Path(out, "metrics.jsonl").read_text().splitlines()[1:]
            record.append(statistics.median(json.loads(line)["tokens_per_s"] for line in lines))
    ours, other = (statistics.median(record) for record in speeds.values())
    yield Row("10", "two gloo processes / two threads", ours, other, "tok/s", ours / other, "0.85",
              "1.1")  # fmt: skip


def long_tailed_embeddings(rows: int, dim: int, blobs: int = 1000, seed: int = 0) -> torch.Tensor:
    """Rows like embeddings: a Zipf mixture of blobs of unlike widths with a falling spectrum."""
    generator = torch.Generator().manual_seed(seed)
    spectrum_D = torch.arange(1, dim + 1) ** -0.5
    share = 1 / torch.arange(1, blobs + 1, dtype=torch.float64)
    blob_N = torch.multinomial(share, rows, replacement=True, generator=generator)
    centre_CD = torch.randn(blobs, dim, generator=generator) * spectrum_D
    width_C1 = 0.35 + 0.7 * torch.rand(blobs, 1, generator=generator)
    noise_ND = torch.randn(rows, dim, generator=generator) * spectrum_D
    return centre_CD[blob_N] + width_C1[blob_N] * noise_ND


def greedy_seeds(x_ND: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++: of 2 + ln k rows drawn by D^2, the one that lowers the inertia most."""
    norm_N = x_ND.square().sum(1)
    first = int(torch.randint(len(x_ND), (), generator=generator))
    chosen, nearest_N = [first], (x_ND - x_ND[first]).square().sum(1)
    for _ in range(k - 1):
        mass_N = nearest_N.double().cumsum(0)
        spots = torch.rand(2 + int(math.log(k)), generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(mass_N, spots * mass_N[-1]).clamp(max=len(x_ND) - 1)
        squares = norm_N[drawn, None] + norm_N - 2 * x_ND[drawn] @ x_ND.T
        left = torch.minimum(nearest_N, squares.clamp(min=0))
        best = int(left.sum(1).argmin())
        chosen.append(int(drawn[best]))
        nearest_N = left[best]
    return x_ND[chosen]


def plain_kmeans(x_ND: torch.Tensor, k: int, seed: int) -> float:
    """The published recipe: greedy k-means++, 50 Lloyd steps, float64 means -> inertia."""
    c_KD = greedy_seeds(x_ND, k, torch.Generator().manual_seed(seed))
    for _ in range(51):  # the last pass only scores
        sums_KD, count_K, inertia = torch.zeros(k, x_ND.shape[1]).double(), torch.zeros(k), 0.0
        norm_K = c_KD.square().sum(1)
        for x_BD in x_ND.split(1024):
            squares_BK = torch.addmm(norm_K, x_BD, c_KD.T, alpha=-2) + x_BD.square().sum(1)[:, None]
            least_B, cluster_B = squares_BK.min(1)
            inertia += float(least_B.sum())
            sums_KD.index_add_(0, cluster_B, x_BD.double())
            count_K += cluster_B.bincount(minlength=k)
        means_KD = (sums_KD / count_K.clamp(min=1)[:, None]).float()
        c_KD = torch.where(count_K[:, None] > 0, means_KD, c_KD)
    return inertia


def kmeans_at_equal_inertia() -> Iterator[Row]:
    """Row 7: CPU seconds of ours over those of the recipe, where ours is no worse than 0.2 %."""
    for rows, dim, k in ((20_000, 384, 500), (20_000, 32, 500), (60_000, 384, 300)):
        x_ND = long_tailed_embeddings(rows, dim)
        seconds: dict[str, list[float]] = {"ours": [], "other": []}
        inertia: dict[str, list[float]] = {"ours": [], "other": []}
        for seed in range(2):
            for who in ("ours", "other"):
                start = time.process_time()
                if who == "ours":
                    generator = torch.Generator().manual_seed(seed)
                    found = kmeans(Rows.share(x_ND, SOLO), k, generator)[1].inertia
                else:
                    found = plain_kmeans(x_ND, k, seed)
                seconds[who].append(time.process_time() - start)
                inertia[who].append(found)
        ours, other = (statistics.mean(seconds[who]) for who in ("ours", "other"))
        gap = statistics.mean(inertia["ours"]) / statistics.mean(inertia["other"]) - 1
        what = f"k-means {rows} x {dim}, k={k}, inertia {100 * gap:+.2f} %"
        # an inertia that is not reached is no speed-up
        yield Row("7", what, ours, other, "s", other / ours if gap < 0.002 else math.nan, "3", "10")


def kmeans_step() -> Iterator[Row]:
    """One Lloyd step against one of faiss (smaller is better)."""
    import faiss  # bench only

    faiss.omp_set_num_threads(1)
    for rows, dim, k in ((20_000, 384, 500), (20_000, 768, 1000), (20_000, 32, 500)):
        x_ND = long_tailed_embeddings(rows, dim)
        share, c_KD = Rows.share(x_ND, SOLO), x_ND[:k].clone()

        def steps(count: int, dim: int = dim, k: int = k, x_ND: torch.Tensor = x_ND) -> None:
            options = {"max_points_per_centroid": 10**9, "min_points_per_centroid": 1}
            faiss.Kmeans(dim, k, niter=count, seed=0, **options).train(x_ND.numpy())

        ways = (lambda: step(share, c_KD), lambda: steps(2), lambda: steps(5))  # noqa: B023
        one, two, five = interleaved(*ways, repeats=5)
        ours, other = 1e3 * one, 1e3 * (five - two) / 3
        what = f"Lloyd step / faiss, {rows} x {dim}, k={k} (smaller is better)"
        yield Row("7", what, ours, other, "ms", ours / other, "2" if dim == 32 else "1.2", "1")


def hits() -> Iterator[Row]:
    """Row `soak`, some half an hour: a run that is hit twenty times ends as if nothing had been."""
    with tempfile.TemporaryDirectory() as out:
        met = soak(Path(out), steps=6000, hits=20, latest=40)
        yield Row(
            "0", "hits by SIGTERM, SIGINT and kill -9 survived", met, 20, "", met / 20, "1", "1"
        )


PLANNING = """
import sys, time
import numpy as np
import torch
sys.path.insert(0, sys.argv[1])
import packing

def kilobytes(what):
    return int(open("/proc/self/status").read().split(what)[1].split()[1])

class Sizes(packing.Source):
    name, skipped = "sizes", {}
    def __init__(self):
        self.table = np.load(sys.argv[2], mmap_mode="r")
    def __len__(self):
        return len(self.table)
    def sizes(self, indices):
        order = np.argsort(indices)
        found = np.empty((len(indices), 2), np.int64)
        found[order] = self.table[indices[order]]
        return found

def timed(place=None):
    stream = packing.Stream("p", 256, budget=2309, packs=8)
    data = packing.StepData([stream], [(source, 1.0)], 16, 5)
    start = time.process_time()
    if place:
        packing.start_at(data, [place])
    data.packs_at(place[0] if place else 0)
    return time.process_time() - start, data.packs[0]

torch.set_num_threads(1)
before, source = kilobytes("RssAnon"), Sizes()
first, row = timed()
windows = row.calendar.windows_in(3)
resume, _ = timed((10**6, 3, windows // 2))
seconds = []
for window in range(1, 4):
    start = time.process_time()
    plan = row.window(0, window % windows)
    seconds.append((time.process_time() - start) / sum(map(len, plan)))
print(first, resume, 1e6 * min(seconds), (kilobytes("RssAnon") - before) / 1024)
"""


def planning(count: int = 10**8) -> Iterator[Row]:
    """Rows 12 and 13: the order of very many pictures, whose sizes lie in a file, against that of
    a hundredth of them; CPU time. The memory is that beside the mapped file."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (count, count // 100):
            path, rng = Path(folder, f"{n}.npy"), np.random.default_rng(0)
            sizes = np.lib.format.open_memmap(path, "w+", np.int32, (n, 2))
            for start in range(0, n, 10**7):
                part = sizes[start : start + 10**7]
                part[:] = rng.integers(128, 1024, part.shape, dtype=np.int32)
            sizes.flush()
            del sizes
            run = [sys.executable, "-c", PLANNING, str(ROOT), str(path)]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            found.append(list(map(float, done.stdout.split())))
            path.unlink()
    rows = [
        (12, "first step", "s", "2", ".3"),
        (12, "resume in epoch 3", "s", "2", ".3"),
        (13, "planning, a picture", "us", "1.5", ".5"),
        (12, "memory", "MiB", "500", "200"),
    ]
    for (number, what, unit, floor, aim), ours, other in zip(rows, *found, strict=True):
        what = f"{what}, {count:.0e} pictures / {count // 100:.0e} (smaller is better)"
        yield Row(number, what, ours, other, unit, ours / other, floor, aim)


OPENING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import packing

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before, start = peak(), time.perf_counter()
source = packing.open_source(sys.argv[2])
opened = time.perf_counter() - start
print(opened, (peak() - before) / 1024)
start = time.perf_counter()
packing.hold_out(source, 1e-4)
print(time.perf_counter() - start, (peak() - before) / 1024)
"""


def index_lines(count: int) -> Iterator[bytes]:
    line = '{"source": "s", "key": "%09d", "path": "s/%05d.tar", "offset": %d, "size": 50000, '
    line += '"digest": "%s", "height": %d, "width": 640, "label": "c%d"}\n'
    for i in range(count):
        digest = hashlib.sha256(b"%d" % i).hexdigest()
        values = i, i // 10**4, i % 10**4 * 65536, digest, 200 + i % 700, i % 1000
        yield (line % values).encode()


def index(count: int = 10**7) -> Iterator[Row]:
    """Row 14: an index file of many lines, opened for the first time (its table is made and kept),
    and again."""
    with tempfile.TemporaryDirectory() as folder:
        path, hashed = Path(folder, "index.jsonl"), hashlib.sha256()
        for line in index_lines(count):
            hashed.update(line)
        header = {"format": "amoe-index", "version": 1, "count": count}
        with path.open("wb") as file:
            file.write(json.dumps(header | {"sha256": hashed.hexdigest()}).encode() + b"\n")
            file.writelines(index_lines(count))
        run = [sys.executable, "-c", OPENING, str(ROOT), str(path)]
        env = os.environ | {"XDG_CACHE_HOME": folder}
        texts = [subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
                 for _ in range(2)]  # fmt: skip
    (first, much, *_), (again, little, split, more) = (map(float, text.split()) for text in texts)
    what = f"opening an index of {count:.0e} lines, again / for the first time"
    yield Row("14", what, again, first, "s", first / max(again, 1e-3), "3 s", ".5 s")
    yield Row("14", f"{what}, peak", little, much, "MiB", much / max(little, 1), "400", "100")
    yield Row("14", "hold_out of it, peak / seconds", more, split, "MiB", more, "", "")


def on_gpu() -> Iterator[Row]:
    """What needs a CUDA device; its rows have no number, floor or aim yet."""
    sys.modules["bench"] = sys.modules[__name__]  # bench_gpu takes from this very module
    from bench_gpu import rows

    return rows()


ROWS: dict[str, Callable[[], Iterator[Row]]] = {
    "packed": lambda: packed_forward("dense", replace(MODELS["dense-30m"], n_layers=4, heads=())),
    "packed-moe": lambda: packed_forward("MoE", replace(MODELS["amoe-0.3b"], n_layers=2, heads=())),
    "packed-radio": radio_forward,
    "encode": encoding,
    "attention": packed_attention,
    "sinks": sink_attention,
    "experts": experts,
    "packer": packer,
    "kmeans": kmeans_at_equal_inertia,
    "kmeans-step": kmeans_step,
    "cache": cached_features,
    "loader": loader,
    "megapixels": megapixels,
    "photographs": photographs,
    "planning": planning,
    "index": index,
    "overhead": overhead,
    "half": half_precision,
    "threads": two_threads,
    "processes": two_processes,
    "soak": hits,
    "gpu": on_gpu,
}


def machine() -> str:
    """The processor's name, what torch makes of it, and the half precision that it knows."""
    cpu = Path("/proc/cpuinfo")  # Linux alone
    text = cpu.read_text() if cpu.exists() else ""
    name = next((x.split(":")[1].strip() for x in text.splitlines() if "model name" in x), "?")
    known = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    isa = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {isa}, {' '.join(known) or 'no bfloat16'}; torch {torch.__version__}"


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    print(f"{'#':>2} {'what':<66}{'ours':>10}{'other':>10}{'unit':>6}{'ratio':>8}  floor   aim")
    for name in sys.argv[1:] or (name for name in ROWS if name not in ("gpu", "soak")):
        for row in ROWS[name]():
            print(
                f"{row.number:>2} {row.what:<66}{row.ours:10.2f}{row.other:10.2f}{row.unit:>6}"
                f"{row.ratio:8.2f}  {row.floor:>5}{row.aim:>6}", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
