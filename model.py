"""The student network in its two published forms, and the released weights of both.

AMoE (arXiv 2512.20157): RMS norms, golden 2-D RoPE, attention sinks, a mixture of experts in every
block. RADIOv2.5 (arXiv 2412.07679): a plain LayerNorm ViT with a cropped table of positions and one
CLS token per teacher. `Student` runs either one on a packed batch: the tokens of all images in one
row, each image attending only to itself.

Reading path: `ModelConfig`, `MODELS`; `FlashSinkAttention`; `GoldenPositions` (AMoE),
`TablePositions` (RADIO); `PlainAttention` (RADIO), `SinkAttention` (AMoE); `MoE`; `FORMS`, where
the two part; `Block`; `AdapterHead` (AMoE), `RadioHead`; `Student`; `merge_tokens`. Part II has
`Layout` (which token lies where), kernels, our files, foreign weights, export and sizes.

Legend (a suffix on a name gives its layout):
    B images, N packed tokens (prefix and patches), M patches of the pack, P patches of an image,
    X = 3*p*p numbers of a patch in (row, col, channel) order, D width, H heads, A width of a head,
    J rotation frequencies of a head, L layers, R prefix of an image (CLS and registers), C teacher
    width, E experts, K top-k (or tokens that merging keeps), S = N*K token-expert pairs, F hidden
    width of an expert, G = 2F.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import importlib
import json
import logging
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from packing import PackedBatch, fit_size, resize, to_device, to_float, to_rgb, write_whole

HALF_RGB = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean, std
CLIP_RGB = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# ---- Part I, the papers: sizes


@dataclass(frozen=True)
class HeadSpec:
    """What the student predicts for one teacher; `AdapterSpec` or `RadioSpec` says with what."""

    name: str
    dim: int | None  # width of the teacher's patch features; None (RADIO): it has none
    summary_dim: int | None  # width of the teacher's summary; None: it has none (SAM)
    hidden: int = 0  # hidden width, RADIO: of the patch MLP; 0 (AMoE): dim
    registers = pool = False  # fields of the kind that has the choice
    token, upsample = 0, 1

    def __post_init__(self):
        if not self.name or "." in self.name or self.name == "trunk":
            raise ValueError(f"head name {self.name!r} is empty, has a dot or is 'trunk'")


@dataclass(frozen=True)
class AdapterSpec(HeadSpec):
    """AMoE: one MLP for all token types."""

    registers: bool = False  # also predict the teacher's registers (DINOv3)
    pool: bool = False  # the summary is SigLIP2's frozen attention pooling of all tokens
    split: bool = False  # an own last Linear for the summary, so PHI-S folds into each
    bias: bool = False  # of the last Linear (a folded PHI-S needs it for the mean)
    pool_hidden: int = 4304  # width of the MLP in the pooling head
    pool_heads: int = 16  # attention heads of the pooling head
    pool_eps: float = 1e-6  # of its norm: SigLIP2's own; the AMoE release has 1e-5

    def __post_init__(self):
        super().__post_init__()
        one_width = self.split or self.summary_dim in (self.dim, None)
        pool_fits = not self.pool or (self.summary_dim == self.dim and not self.split)
        if not (self.dim and one_width and pool_fits):
            raise ValueError(
                f"head {self.name}: summary_dim={self.summary_dim}, dim={self.dim}, "
                f"split={self.split}, pool={self.pool}: an adapter needs dim, split=True for "
                "another summary_dim, and the same dim without split for pool"
            )


@dataclass(frozen=True)
class RadioSpec(HeadSpec):
    """RADIO: one MLP for the summary and another for the patches."""

    hidden: int = 1024  # no paper states it, we chose
    kind: str = "v2"  # residual MLPs; the plain ones of RADIO's first releases are not read
    summary_hidden: int = 1024
    inner: int = 0  # residual blocks of the patch MLP
    summary_inner: int = 0  # the same of the summary MLP
    upsample: int = 1  # patch features on a grid finer by this factor
    token: int = 0  # index of the CLS token that the summary is read from
    in_trunk_summary: bool = True  # that CLS token is part of the trunk's summary

    def __post_init__(self):
        super().__post_init__()
        if self.kind != "v2":
            raise ValueError(f"head {self.name}: kind {self.kind!r} is not v2")


@dataclass(frozen=True)
class ModelConfig:
    """One row of the table of sizes, and the choices that make a form."""

    form: str  # 'amoe' or 'radio', a key of FORMS
    dim: int
    n_layers: int
    n_heads: int
    head_dim: int
    ffn_dim: int  # hidden width of the MLP, or of one expert
    heads: tuple[HeadSpec, ...] = ()
    patch: int = 16  # side in pixels
    cls_tokens: int = 1  # RADIO: one per teacher, so that summaries do not compete for one token
    registers: int = 4  # tokens of no meaning of their own, where attention may keep what is global
    experts: int = 0  # 0: a dense MLP
    top_k: int = 0  # experts per token
    norm_weight: bool = True  # AMoE: False in the 30M and 70M sizes
    gated_ffn: bool = True  # SiLU-gated; False: GELU MLP
    final_norm: bool = True  # RADIO's releases have none
    layer_scale: bool = False  # RADIO: initialised to 1e-5 where present
    patch_bias: bool = False  # RADIO: ViT-g only
    position_grid: int = 0  # RADIO: side of the table of positions, in patches
    rope_min: float = 1.0  # AMoE: smallest and largest angular frequency
    rope_max: float = 20.0
    pixel_mean: tuple[float, ...] = HALF_RGB[0]
    pixel_std: tuple[float, ...] = HALF_RGB[1]

    def __post_init__(self):
        has_table = self.position_grid > 0
        fits = {"amoe": self.cls_tokens == 1, "radio": has_table and not self.experts}
        if not fits.get(self.form):
            raise ValueError(
                "a form is 'amoe', with one CLS token, or 'radio', with a position table and no "
                f"experts; got {self.form!r}, cls_tokens={self.cls_tokens}, "
                f"position_grid={self.position_grid}, experts={self.experts}"
            )
        if self.head_dim % 8 or not 0 < self.head_dim <= 256:  # the rotation wants multiples of 4
            text = "is not a multiple of 8 up to 256: no CUDA attention kernel takes it"
            raise ValueError(f"head_dim={self.head_dim} {text}")
        if bool(self.experts) != bool(self.top_k) or not 0 <= self.top_k <= self.experts:
            raise ValueError(f"top_k={self.top_k} does not fit experts={self.experts}")
        names = [head.name for head in self.heads]
        if len(set(names)) < len(names):
            raise ValueError(f"head names repeat: {names}")
        if any(head.token >= self.cls_tokens for head in self.heads):
            raise ValueError(f"a head reads a CLS token beyond cls_tokens={self.cls_tokens}")

    @property
    def prefix(self) -> int:
        """Tokens before the patches of each image: CLS and registers."""
        return self.cls_tokens + self.registers

    @property
    def summary_tokens(self) -> tuple[int, ...]:
        """Indices of the CLS tokens that make the trunk's summary. RADIO release."""
        if self.cls_tokens == 1:
            return (0,)
        read = [head for head in self.heads if isinstance(head, RadioSpec)]
        return tuple(dict.fromkeys(head.token for head in read if head.in_trunk_summary))


AMOE_HEADS = (
    AdapterSpec("siglip2", 1152, 1152, pool=True),
    AdapterSpec("dinov3", 1024, 1024, registers=True),
)
RADIO_HEADS = (
    RadioSpec("clip", 1280, 1024, token=0),
    RadioSpec("siglip", 1152, 1152, token=1),
    RadioSpec("dino_v2", 1536, 1536, token=2),
    RadioSpec("sam", 1280, None, token=3, in_trunk_summary=False),
)
_demo = partial(AdapterSpec, split=True, bias=True)
_amoe = partial(ModelConfig, "amoe", heads=AMOE_HEADS)
_vit: dict[str, Any] = {"gated_ffn": False, "final_norm": False, "position_grid": 128}
_vit |= {"cls_tokens": 4, "pixel_mean": CLIP_RGB[0], "pixel_std": CLIP_RGB[1]}
_radio: Callable[..., ModelConfig] = partial(ModelConfig, "radio", heads=RADIO_HEADS, **_vit)
MODELS: dict[str, ModelConfig] = {
    # form(dim, layers, heads, head width, MLP or expert width). AMoE release, configs.py
    "amoe-0.3b": _amoe(768, 18, 8, 128, 384, experts=28, top_k=6),
    "amoe-0.15b": _amoe(768, 18, 8, 128, 384, experts=28, top_k=2),
    "dense-0.6b": _amoe(1280, 18, 16, 80, 5120),
    "dense-70m": _amoe(512, 12, 8, 64, 2048, norm_weight=False),
    "dense-30m": _amoe(384, 12, 6, 64, 1536, norm_weight=False),
    # RADIO release, its README; g is DINOv2's ViT-g: SwiGLU, LayerScale, patch 14, one CLS for all
    "radio-b": _radio(768, 12, 12, 64, 3072),
    "radio-l": _radio(1024, 24, 16, 64, 4096),
    "radio-h": _radio(1280, 32, 16, 80, 5120),
    "radio-g": _radio(1536, 40, 24, 64, 4096, patch=14, gated_ffn=True, layer_scale=True,
                      patch_bias=True, cls_tokens=1,
                      heads=tuple(replace(head, token=0) for head in RADIO_HEADS)),
    # the demo student and the one of the unit tests; train.py sets their heads by the teachers
    "nano": _amoe(192, 6, 3, 64, 256, experts=8, top_k=2,
                  heads=(_demo("vit-s", 384, 384), _demo("mobilenet", 1280, 1280))),
    "test": _amoe(48, 2, 2, 16, 32, experts=4, top_k=2,
                  heads=(_demo("a", 24, 24), _demo("b", 32, 32))),
}  # fmt: skip


# ---- Softmax attention with a sink


def explicit_attention(q_BHNA, k_BHNA, v_BHNA, sinks_H: Tensor | None) -> Tensor:
    """The definition: softmax in float32 over the logits and the sink, one more with value 0."""
    logits_BHNN = (q_BHNA @ k_BHNA.mT).float() / math.sqrt(q_BHNA.shape[-1])
    if sinks_H is not None:  # a head that finds nothing in an image need not say anything of it
        sinks_BHN1 = sinks_H.float()[:, None, None].expand(*logits_BHNN.shape[:3], 1)
        logits_BHNN = torch.cat([logits_BHNN, sinks_BHN1], dim=-1)
    # The sink's weight is dropped after the softmax: what is left sums to less than one.
    return logits_BHNN.softmax(-1)[..., : k_BHNA.shape[2]].to(v_BHNA.dtype) @ v_BHNA


class FlashSinkAttention(torch.autograd.Function):
    """The same by a flash kernel, which knows no sinks but returns each row's log-sum-exp.

    out' = out * sigmoid(lse - s) is that softmax, but autograd has no gradient through lse. The
    kernel's backward, given out' and lse' = logaddexp(lse, s), yields the exact one, and
    ds = -sum(exp(s - lse') * rowsum(grad * out')). AMoE release, attention.py
    """

    @staticmethod
    def forward(ctx, q_BHNA, k_BHNA, v_BHNA, sinks_H, kernel):
        out_BHNA, lse_BHN, ctx.kernel_backward = kernel(q_BHNA, k_BHNA, v_BHNA)
        if sinks_H is not None:
            sinks_H1 = sinks_H.to(lse_BHN.dtype)[:, None]
            # What the sink leaves to the keys, e^lse / (e^lse + e^s), without overflow.
            out_BHNA = out_BHNA.mul_(torch.sigmoid(lse_BHN - sinks_H1)[..., None])
            lse_BHN = torch.logaddexp(lse_BHN, sinks_H1)
        ctx.save_for_backward(q_BHNA, k_BHNA, v_BHNA, out_BHNA, lse_BHN, sinks_H)
        return out_BHNA

    @staticmethod
    def backward(ctx, grad_BHNA):
        *saved, out_BHNA, lse_BHN, sinks_H = ctx.saved_tensors
        grads = ctx.kernel_backward(grad_BHNA, *saved, out_BHNA, lse_BHN)
        if sinks_H is None:
            return *grads, None, None
        # A softmax's gradient is p * (g - sum p g); the sink's value is 0, and so is its own g.
        weight_BHN = torch.exp(sinks_H.to(lse_BHN.dtype)[:, None] - lse_BHN)
        rows_BHN = (grad_BHNA * out_BHNA).sum(-1, dtype=lse_BHN.dtype)
        return *grads, -(weight_BHN * rows_BHN).sum((0, 2)).to(sinks_H.dtype), None


# ---- Positions: AMoE turns queries and keys, RADIO adds the entries of a table to the patches


def golden_frequencies(n_heads: int, n_freqs: int, low: float, high: float) -> Tensor:
    """Frequency vectors of golden-gate 2-D RoPE, `freqs_HJ2`: magnitude times (y, x) direction.

    Directions fill the circle evenly over all heads: the plastic number g (g^3 = g + 1) gives a
    low-discrepancy sequence. AMoE: golden RoPE
    """
    g = 1.324717957244746
    # Geometric, so that each doubling has as many: over a picture, whose sides span about 2, from a
    # third of a turn, which tells halves apart, to six, which tell neighbours apart.
    magnitude_J = low * (high / low) ** torch.linspace(0, 1, n_freqs, dtype=torch.float64)
    i = torch.arange(1, n_heads * n_freqs + 1, dtype=torch.float64)[:, None]
    z = (i * torch.tensor([1 / g, 1 / g**2], dtype=torch.float64)).frac()
    # erfinv makes normal numbers of uniform ones, and a pair of these has no preferred direction
    direction = F.normalize(torch.erfinv(2 * z - 1), dim=-1)
    return (rearrange(direction, "(h j) c -> h j c", h=n_heads) * magnitude_J[:, None]).float()


def rotate(x_N2HA: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the second half of each head's channels; the first half is for time, 0 in a still.

    Channel pairs are (j, J+j), not the release's (2j, 2j+1): whole slices move, not every second
    number. Queries and keys are permuted alike at loading, so their products are the same.
    """
    cos_N1HJ, sin_N1HJ = (part[:, None] for part in rotation)
    n_freqs = cos_N1HJ.shape[-1]
    still, a, b = x_N2HA.split([2 * n_freqs, n_freqs, n_freqs], dim=-1)
    turned = [a * cos_N1HJ - b * sin_N1HJ, a * sin_N1HJ + b * cos_N1HJ]
    return torch.cat([still, *(part.to(x_N2HA.dtype) for part in turned)], dim=-1)


class GoldenPositions(nn.Module):
    """Nothing is added to the tokens: queries and keys are rotated. AMoE: golden RoPE"""

    freqs_HJ2: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        n_freqs, low, high = config.head_dim // 4, config.rope_min, config.rope_max
        freqs_HJ2 = golden_frequencies(config.n_heads, n_freqs, low, high)
        self.register_buffer("freqs_HJ2", freqs_HJ2)

    def forward(self, patches_MD: Tensor, layout: Layout, _: Tensor | None):
        """The patches as they are; cos_NHJ and sin_NHJ of all tokens, of 0 rad for the prefix."""
        # By single products: autocast would round those of an einsum to bfloat16.
        y_M11, x_M11 = self.coordinates(layout).T[..., None, None]
        angles_MHJ = y_M11 * self.freqs_HJ2[..., 0] + x_M11 * self.freqs_HJ2[..., 1]
        angles_NHJ = angles_MHJ.new_zeros(layout.gather_N.shape[0], *angles_MHJ.shape[1:])
        angles_NHJ = angles_NHJ.index_copy(0, layout.patches_M, angles_MHJ)
        return patches_MD, (angles_NHJ.cos(), angles_NHJ.sin())

    def coordinates(self, layout: Layout) -> Tensor:
        """yx_M2 of every patch whatever the resolution: y spans [-sqrt(h/w), +sqrt(h/w)], x the
        inverse, ends included."""
        grid_M2 = layout.grid_M2.float()
        # The area is 4 whatever the aspect: patches of two sizes of a picture lie at equal places.
        half_M2 = torch.sqrt(grid_M2 / grid_M2.flip(1))
        return half_M2 * (2 * layout.row_column_M2 / (grid_M2 - 1).clamp(min=1) - 1)


class TablePositions(nn.Module):
    """One learned square table for every resolution. RADIOv2.5: cropped position embedding"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        side = config.position_grid
        self.pos_embed = nn.Parameter(torch.randn(side, side, config.dim) / math.sqrt(config.dim))

    def forward(self, patches_MD: Tensor, layout: Layout, windows_B5: Tensor | None):
        """With `position_windows`, one per image: training. Without: the inference rule."""
        side, grid_M2 = len(self.pos_embed), layout.grid_M2.float()
        if windows_B5 is None:
            # The table resized to the square of the longer side (pixel centres), top-left part.
            yx_M2 = (layout.row_column_M2 + 0.5) * (side / grid_M2.amax(1, keepdim=True)) - 0.5
            return patches_MD + self.sample(yx_M2.clamp(0, side - 1)).to(patches_MD.dtype), None
        windows_M5 = to_device(windows_B5, patches_MD.device).index_select(0, layout.image_M)
        size_M2, origin_M2, kept_M1 = windows_M5.split([2, 2, 1], dim=1)
        # A crop of the table at any scale: no entry may come to mean one resolution.
        unit_M2 = layout.row_column_M2 / (grid_M2 - 1).clamp(min=1)
        positions_MD = self.sample((origin_M2 + unit_M2 * size_M2) * (side - 1)) * kept_M1
        return patches_MD + positions_MD.to(patches_MD.dtype), None

    def sample(self, yx_M2: Tensor) -> Tensor:
        """Bilinear look-up of the table at fractional places, in float32."""
        low_M2, table = yx_M2.long(), self.pos_embed
        (y0, x0), (y1, x1) = low_M2.T, (low_M2 + 1).clamp(max=len(table) - 1).T
        down_M1, right_M1 = (yx_M2 - low_M2).split(1, dim=1)
        top_MD = torch.lerp(table[y0, x0].float(), table[y0, x1].float(), right_M1)
        bottom_MD = torch.lerp(table[y1, x0].float(), table[y1, x1].float(), right_M1)
        return torch.lerp(top_MD, bottom_MD, down_M1)


def position_windows(count: int, generator: torch.Generator) -> Tensor:
    """Random windows of the table and position dropout, for training. RADIO release

    Returns: (count, 5): height, width, top, left in [0, 1], and 0 where all positions are dropped.
    """
    u_B6 = torch.rand(count, 6, generator=generator)
    scale_B = math.sqrt(0.1) + (1 - math.sqrt(0.1)) * u_B6[:, 0]  # a tenth of the area to all of it
    aspect_B = torch.exp((2 * u_B6[:, 1] - 1) * math.log(4 / 3))  # in log: tall as often as wide
    size_B2 = torch.stack([scale_B / aspect_B, scale_B * aspect_B], dim=1).clamp(max=1)
    kept_B1 = (u_B6[:, 4:5] >= 0.1).float()  # position dropout: 10 % of the images get none
    return torch.cat([size_B2, u_B6[:, 2:4] * (1 - size_B2), kept_B1], dim=1)


# ---- Layers


class PlainAttention(nn.Module):
    """Multi-head self-attention of each image's tokens, a ViT's. RADIO release"""

    def __init__(self, config: ModelConfig, bias: bool = True):
        super().__init__()
        inner = config.n_heads * config.head_dim  # may differ from dim: 1024 against 768 in AMoE
        self.n_heads, self.head_dim, self.backend = config.n_heads, config.head_dim, "auto"
        self.qkv = nn.Linear(config.dim, 3 * inner, bias=bias)
        self.proj = nn.Linear(inner, config.dim, bias=bias)

    def forward(self, x_ND: Tensor, layout: Layout, rotation: Any) -> Tensor:
        qkv_N3HA = rearrange(self.qkv(x_ND), "n (s h a) -> n s h a", s=3, h=self.n_heads)
        out_NHA = self.attend(qkv_N3HA, layout, rotation)
        return self.proj(rearrange(out_NHA, "n h a -> n (h a)"))

    def attend(self, qkv_N3HA: Tensor, layout: Layout, _: None) -> Tensor:
        return attention(*qkv_N3HA.unbind(1), layout, None, self.backend)


class SinkAttention(PlainAttention):
    """AMoE's: no biases, QK-norm, rotation, a learned sink per head. AMoE release, attention.py"""

    def __init__(self, config: ModelConfig):
        super().__init__(config, bias=False)
        self.sinks = nn.Parameter(torch.zeros(config.n_heads))  # lets a head attend to nothing

    def attend(self, qkv_N3HA: Tensor, layout: Layout, rotation: Any) -> Tensor:
        # QK-norm: the logits stay below sqrt(A), however large the weights become.
        qk_N2HA, v_NHA = F.rms_norm(qkv_N3HA[:, :2], (self.head_dim,)), qkv_N3HA[:, 2]
        # CUDA's autocast computes the norm in float32, and no kernel takes two dtypes.
        q_NHA, k_NHA = rotate(qk_N2HA, rotation).to(v_NHA.dtype).unbind(1)
        return attention(q_NHA, k_NHA, v_NHA, layout, self.sinks, self.backend)


def gated(hidden: Tensor) -> Tensor:
    """SiLU of the first half of the channels times the second half."""
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


class Mlp(nn.Module):
    """Dense MLP: SiLU-gated (AMoE's dense sizes, and ViT-g) or GELU (RADIO)."""

    def __init__(self, config: ModelConfig, bias: bool):
        super().__init__()
        self.gated = config.gated_ffn
        self.w1 = nn.Linear(config.dim, config.ffn_dim * (2 if self.gated else 1), bias=bias)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=bias)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, None]:
        activation = gated if self.gated else F.gelu
        return self.w2(activation(self.w1(x_ND))), None


class MoE(nn.Module):
    """Mixture of gated SiLU experts: none is shared, no token dropped. AMoE release, moe.py"""

    expert_bias: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, hidden = config.experts, config.dim, config.ffn_dim
        self.top_k, self.backend = config.top_k, "auto"
        self.router = nn.Linear(D, E, bias=False)
        self.register_buffer("expert_bias", torch.zeros(E))  # no gradient: see `update_router`
        # All experts in one tensor: a grouped product takes them in one call.
        self.w1_EGD = nn.Parameter(torch.empty(E, 2 * hidden, D))  # G = 2F: gate, then value
        self.w2_EDF = nn.Parameter(torch.empty(E, D, hidden))

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates and chosen experts of each token, and tokens per expert, in float32.

        bfloat16 has 3 digits: near ties it would select other experts than the training did.
        """
        # A sigmoid each, no softmax: an expert's gate does not hang on the scores of the others,
        # and the K gates need not sum to one.
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = torch.sigmoid(F.linear(x_ND.float(), self.router.weight.float()))
        # The bias balances the load: it selects, but the gate is the score alone.
        chosen_NK = (scores_NE.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
        chosen_S, counts_E = chosen_NK.flatten(), chosen_NK.new_zeros(len(self.expert_bias))
        counts_E = counts_E.scatter_add(0, chosen_S, torch.ones_like(chosen_S))
        return scores_NE.gather(1, chosen_NK), chosen_NK, counts_E

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tokens' outputs and counts_E, the tokens that each expert got (int64)."""
        gates_NK, chosen_NK, counts_E = self.route(x_ND)
        if self.backend == "dense":
            return self.run_dense(x_ND, gates_NK, chosen_NK), counts_E
        # The same, each expert on its own tokens alone.
        return run_sorted(self, x_ND, gates_NK, chosen_NK, counts_E), counts_E

    def run_dense(self, x_ND: Tensor, gates_NK: Tensor, chosen_NK: Tensor) -> Tensor:
        """All experts on all tokens: the definition, and what exports."""
        gates_NE = gates_NK.new_zeros(x_ND.shape[0], len(self.expert_bias))
        gates_NE = gates_NE.scatter(1, chosen_NK, gates_NK).to(x_ND.dtype)
        experts = zip(self.w1_EGD.unbind(0), self.w2_EDF.unbind(0), strict=True)
        y_END = torch.stack([F.linear(gated(F.linear(x_ND, w1)), w2) for w1, w2 in experts])
        return (gates_NE.T[..., None] * y_END).sum(0)


# ---- The two forms


class Form(NamedTuple):
    """The parts in which the two papers' students differ; `Block` and `Student` choose by it."""

    positions: Callable[[ModelConfig], nn.Module]
    attention: Callable[[ModelConfig], nn.Module]
    norm: Callable[[int], nn.Module]
    mlp_bias: bool


FORMS = {
    "amoe": Form(GoldenPositions, SinkAttention, partial(nn.RMSNorm, eps=1e-5), mlp_bias=False),
    "radio": Form(TablePositions, PlainAttention, partial(nn.LayerNorm, eps=1e-6), mlp_bias=True),
}


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        form, weightless = FORMS[config.form], partial(nn.RMSNorm, elementwise_affine=False)
        norm = form.norm if config.norm_weight else weightless
        self.norm1, self.attn = norm(config.dim), form.attention(config)
        self.norm2 = norm(config.dim)
        self.ffn = MoE(config) if config.experts else Mlp(config, form.mlp_bias)
        self.scale1 = self.scale2 = None
        if config.layer_scale:  # small: a deep ViT starts near the identity
            self.scale1 = nn.Parameter(torch.full((config.dim,), 1e-5))
            self.scale2 = nn.Parameter(torch.full((config.dim,), 1e-5))

    def forward(self, x_ND: Tensor, layout: Layout, rotation) -> tuple[Tensor, Tensor | None]:
        """Returns the tokens and, for a MoE, the tokens that each expert got."""
        y_ND = self.attn(self.norm1(x_ND), layout, rotation)  # the norm is off the residual stream
        x_ND = x_ND + (y_ND if self.scale1 is None else y_ND * self.scale1)
        y_ND, counts_E = self.ffn(self.norm2(x_ND))
        return x_ND + (y_ND if self.scale2 is None else y_ND * self.scale2), counts_E


# ---- Teacher heads: each returns (summary_BC, patches_MC, registers_BRC), None where it has none


class AdapterHead(nn.Module):
    """AMoE's adapter: the same weights for CLS, registers and patches, but for a last layer of the
    summary's own where `spec.split`. AMoE release, model.py"""

    def __init__(self, spec: Any, width: int):
        super().__init__()
        self.spec, hidden = spec, spec.hidden or spec.dim
        self.fc1, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
        # A Linear at the end: each checkpoint's model.pt has the inverse of PHI-S folded into it.
        self.last = nn.Linear(hidden, spec.dim, bias=spec.bias)
        if spec.split and spec.summary_dim is not None:
            self.last_summary = nn.Linear(hidden, spec.summary_dim, bias=spec.bias)
        if spec.pool:  # the teacher's own weights: never trained
            self.pool = AttentionPool(spec).requires_grad_(False)

    def output_layers(self) -> dict[str, Any]:
        layers = {"patches": self.last}
        if self.spec.summary_dim is not None and not self.spec.pool:
            layers["summary"] = self.last_summary if self.spec.split else self.last
        return layers

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.fc1(x)))

    def forward(self, prefix_BRD: Tensor, patches_MD: Tensor, layout: Layout):
        patches_MC = self.last(self.hidden(patches_MD))
        if not (self.spec.registers or self.spec.pool):
            prefix_BRD = prefix_BRD[:, :1]  # nothing else reads the registers
        hidden_BRC = self.hidden(prefix_BRD)
        registers_BRC = self.last(hidden_BRC[:, 1:]) if self.spec.registers else None
        summary_BC = None
        if self.spec.pool:  # of all tokens, unlike the teacher, which pools its patches alone
            rows_NC = torch.cat([self.last(hidden_BRC).flatten(0, 1), patches_MC])
            summary_BC = self.pool(rows_NC[layout.gather_N], layout)
        elif self.spec.summary_dim is not None:
            summary_BC = self.output_layers()["summary"](hidden_BRC[:, 0])
        return summary_BC, patches_MC, registers_BRC


class RadioHead(nn.Module):
    """One MLP on the teacher's own CLS token, another on the patches. RADIO release"""

    def __init__(self, spec: Any, width: int):
        super().__init__()
        self.spec, channels = spec, (spec.dim or 0) * spec.upsample**2
        summary = spec.summary_hidden, spec.summary_inner, spec.summary_dim
        self.summary: Any = RadioMlp(width, *summary) if spec.summary_dim else None  # SAM has none
        self.patches: Any = RadioMlp(width, spec.hidden, spec.inner, channels) if spec.dim else None

    def output_layers(self) -> dict[str, Any]:
        return {name: mlp.get_submodule("last") for name, mlp in self.named_children()}

    def forward(self, prefix_BRD: Tensor, patches_MD: Tensor, _: Layout):
        summary_BC = self.summary and self.summary(prefix_BRD[:, self.spec.token])
        patches_MC, u = self.patches and self.patches(patches_MD), self.spec.upsample
        if self.patches and u > 1:  # u * u groups of channels become as many finer patches
            patches_MC = rearrange(patches_MC, "m (u1 u2 c) -> (m u1 u2) c", u1=u, u2=u)
        return summary_BC, patches_MC, None


class RadioMlp(nn.Module):
    """Residual blocks x + Linear(GELU(LayerNorm(x))) between two Linears. RADIO release"""

    def __init__(self, width: int, hidden: int, inner: int, out: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.inner: Any = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(hidden), nn.Linear(hidden, hidden)]) for _ in range(inner)
        )
        self.norm, self.last = nn.LayerNorm(hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for norm, linear in self.inner:
            x = x + linear(F.gelu(norm(x)))
        return self.last(F.gelu(self.norm(x)))


# ---- The student


@dataclass
class StudentOutput:
    """What the student says of a pack; images and patches in the order of the pack."""

    trunk_summary_BD: Tensor  # CLS; RADIO: the CLS tokens of the teachers with a summary, joined
    trunk_MD: Tensor
    summary: dict[str, Tensor]  # name -> (B, C), heads with a summary
    patches: dict[str, Tensor]  # name -> (M, C); upsampled by u: u * u rows of each, (row, column)
    registers: dict[str, Tensor]  # name -> (B, R, C), heads with registers
    counts_LE: Tensor | None  # int64, tokens routed to each expert of each layer; None: no experts


@dataclass
class Features:
    """One image's features: `summary[name]` (C,), `patches[name]` (h, w, C), `tokens` (K, D), and
    `layers[i]` (h, w, D): the patches after block i, not normed. Each has its own memory."""

    summary: dict[str, Tensor]
    patches: dict[str, Tensor]
    tokens: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)


class Student(nn.Module):
    """The student of `config`; see `ModelConfig` for the choices and `MODELS` for the sizes."""

    pixel_stats_2X: Tensor
    encode_budget = 0  # tokens of a pass of `encode`; 0: 16384 on a GPU, 2048 on a CPU (its cache)
    precision = "auto"  # of `encode`, see `autocast`
    frozen_trunk = False  # True: only the heads get gradients (RADIOv2.5: the first steps)
    recompute = False  # True: blocks keep no activations and run again in backward

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, form = config, FORMS[config.form]
        rgb = torch.tensor([config.pixel_mean, config.pixel_std], device="cpu")  # never meta
        self.register_buffer("pixel_stats_2X", rgb.repeat(1, config.patch**2), persistent=False)
        # A ViT's strided convolution, on patches that are cut already: a pack has no height, width.
        self.embed = nn.Linear(3 * config.patch**2, config.dim, bias=config.patch_bias)
        self.prefix_RD = nn.Parameter(torch.empty(config.prefix, config.dim))
        self.positions = form.positions(config)
        self.blocks: Any = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm: Any = form.norm(config.dim) if config.final_norm else nn.Identity()
        self.heads: Any = nn.ModuleDict()
        for spec in config.heads:
            make = AdapterHead if isinstance(spec, AdapterSpec) else RadioHead
            self.heads[spec.name] = make(spec, config.dim)
        initialise(self)

    def forward(self, batch: PackedBatch, windows_B5: Tensor | None = None) -> StudentOutput:
        """Run a pack of images cut in patches, values in [0, 1].

        Args: windows_B5: each image's `position_windows`, to train the RADIO form.
        """
        if batch.patch != self.config.patch:
            raise ValueError(f"the pack's patch is {batch.patch} px, ours {self.config.patch}")
        layout = Layout.of(list(batch.grids), self.config.prefix, batch.patches_MX.device)
        return self.run(batch.patches_MX, layout, windows_B5)

    def run(self, patches_MX: Tensor, layout: Layout, windows_B5=None) -> StudentOutput:
        """`forward` for a layout that is already there (an exported program has a fixed one)."""
        # Frozen, the trunk keeps nothing for a backward: new heads, which are far off, train first.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_trunk):
            x_ND, counts_LE = self.trunk(patches_MX, layout, windows_B5)
        return self.read_out(x_ND, layout, counts_LE)

    def trunk(self, patches_MX: Tensor, layout: Layout, windows_B5: Tensor | None):
        """Sorted tokens x_ND after the last block and norm, and counts_LE of the experts."""
        # Here, and not in the data: teachers and students share pixels in [0, 1].
        mean_X, std_X = self.pixel_stats_2X.to(patches_MX.dtype)
        embedded_MD = self.embed(((patches_MX - mean_X) / std_X).to(self.embed.weight.dtype))
        patches_MD, rotation = self.positions(embedded_MD, layout, windows_B5)
        prefix_ND = self.prefix_RD.expand(layout.prefix_BR.shape[0], -1, -1).flatten(0, 1)
        # Under autocast too, the residual stream keeps the precision of the weights.
        x_ND = torch.cat([prefix_ND, patches_MD.to(prefix_ND.dtype)])
        x_ND = x_ND.index_select(0, layout.gather_N)
        counts = []
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_ND, counts_E = checkpoint(block, x_ND, layout, rotation, use_reentrant=False)
            else:
                x_ND, counts_E = block(x_ND, layout, rotation)
            counts.append(counts_E)
        return self.norm(x_ND), torch.stack(counts) if self.config.experts else None

    def read_out(self, x_ND: Tensor, layout: Layout, counts_LE: Tensor | None) -> StudentOutput:
        """Split the tokens and apply every teacher head."""
        prefix_BRD = x_ND.index_select(0, layout.prefix_BR.flatten())
        prefix_BRD = rearrange(prefix_BRD, "(b r) d -> b r d", r=self.config.prefix)
        patches_MD = x_ND.index_select(0, layout.patches_M)
        tokens = [prefix_BRD[:, i] for i in self.config.summary_tokens]
        summary_BD = torch.cat([prefix_BRD[:, 0, :0], *tokens], dim=1)  # there may be none
        out = StudentOutput(summary_BD, patches_MD, {}, {}, {}, counts_LE)
        for name, head in self.heads.items():
            values = head(prefix_BRD, patches_MD, layout)
            for part, value in zip((out.summary, out.patches, out.registers), values, strict=True):
                if value is not None:
                    part[name] = value.float()  # losses are computed in float32
        return out

    @torch.no_grad()
    def update_router(self, counts_LE: Tensor, rate: float) -> None:
        """Shift each expert's selection bias against its load, after a step that trains the trunk.

        Args: counts_LE: tokens per layer and expert, summed over micro-batches and ranks.
        Source: the bias is the release's; the rule is torchtitan's (rate 1e-3), we chose.
        """
        for block, counts_E in zip(self.blocks, counts_LE.float(), strict=True):
            # The sign alone: a step has one size, whatever the number of tokens. Its mean goes, as
            # a shift of all biases selects nothing else, and they would wander off.
            step_E = rate * torch.sign(counts_E.mean() - counts_E)
            block.ffn.expert_bias += (step_E - step_E.mean()).to(block.ffn.expert_bias.device)

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[Any],
        max_tokens: int | None = 4096,
        keep: int | None = None,
        layers: Sequence[int] | None = None,
    ) -> list[Features]:
        """Features of images of any mix of sizes, in float32 (computed in bf16 on CUDA).

        Args:
            images: PIL images, uint8 arrays (H, W, 3), float tensors (3, H, W) in [0, 1]. Each side
                goes to the nearest multiple of the patch, at least one patch, by bicubic resize.
            max_tokens: shrink larger images, keeping the aspect, to so many patches; None: never.
            keep: also merge the patches to so many tokens at most (`Features.tokens`).
            layers: also give the patches after these blocks, counted from 1 (`Features.layers`).

        Raises: ValueError: an image that is none of these, naming its index and what is wrong.
        """
        check_options(self, max_tokens, keep, layers)
        budget = self.encode_budget or (2048 if self.prefix_RD.device.type == "cpu" else 16384)
        packs = packs_of(images, self.config, max_tokens, budget)
        return [found for pack in packs for found in encode_pack(self, pack, keep, layers or ())]

    def _apply(self, fn, recurse=True):
        """`.to(bfloat16)` rounds no buffer: it would move angles by up to 0.08 rad, and a token
        would go to other experts."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype != torch.float32:
                buffer.data = before[name].to(buffer.device)
        return self

    def use(self, attention: str = "auto", experts: str = "auto") -> Student:
        """Choose backends by name (`ATTENTION`, `EXPERTS`); 'auto' goes by device, dtype, size."""
        for name, known in ((attention, ATTENTION), (experts, EXPERTS)):
            if name not in known:
                raise ValueError(f"backend {name!r} is not one of {', '.join(known)}")
        for block in self.blocks:
            block.attn.backend = attention
            if isinstance(block.ffn, MoE):
                block.ffn.backend = experts
        return self


# ---- Token merging, for a language model that reads few tokens of an image


def merge_tokens(tokens_ND: Tensor, grid: tuple[int, int], keep: int) -> tuple[Tensor, Tensor]:
    """Merge an image's tokens to exactly `keep`, the most alike first.

    Each s x s cell of the grid keeps its middle token as a destination (the smallest s that leaves
    at most `keep` of them), so every region stays represented. The other tokens join the most
    similar destination by cosine, best matches first, until `keep` tokens are left.

    Returns: merged_KD, means of their members, in raster order like tokens_ND; index_N, the row of
        merged_KD that holds each token.
    Source: RADIOv2.5: token merging (ToMe once, after the encoder).
    """
    (rows, columns), count = grid, len(tokens_ND)
    if count != rows * columns or not 1 <= keep <= count:
        raise ValueError(f"keep={keep} of {count} tokens on a {rows}x{columns} grid is impossible")
    device = tokens_ND.device
    is_kept_N = torch.zeros(count, dtype=torch.bool, device=device)
    is_kept_N[cell_middles(rows, columns, keep).to(device)] = True
    destinations, sources = is_kept_N.nonzero()[:, 0], (~is_kept_N).nonzero()[:, 0]
    unit_ND = F.normalize(tokens_ND.float(), dim=-1)  # alike: of one direction, as in ToMe
    score, best = (unit_ND[sources] @ unit_ND[destinations].T).max(dim=1)
    merged = score.argsort(descending=True, stable=True)[: count - keep]  # stable: ties by place
    is_kept_N[sources] = True
    is_kept_N[sources[merged]] = False
    index_N = is_kept_N.cumsum(0) - 1
    index_N[sources[merged]] = index_N[destinations[best[merged]]]
    sums_KD = tokens_ND.new_zeros(keep, tokens_ND.shape[1], dtype=torch.float32)
    sums_KD = sums_KD.index_add(0, index_N, tokens_ND.float())
    members_K = torch.bincount(index_N, minlength=keep)
    return (sums_KD / members_K[:, None]).to(tokens_ND.dtype), index_N


def unmerge_tokens(merged_KD: Tensor, index_N: Tensor) -> Tensor:
    """Give every token the value of the merged token it went into."""
    return merged_KD[index_N]


# ---- Part II: the plumbing
# ---- Where the tokens of a pack are


@dataclass(frozen=True)
class Layout:
    """Token positions of one pack.

    Inside the network the images are sorted by size, so that images of equal length lie side by
    side and share one batched attention call. Outputs come back in the caller's order.
    """

    lengths: list[int]  # tokens of each image with its prefix, sorted
    gather_N: Tensor  # sorted token -> row of cat([prefix of image 0, 1, ..; patches])
    prefix_BR: Tensor  # rows of each image's prefix among the sorted tokens, caller's order
    rank_B: Tensor  # place of each image of the caller's order among the sorted ones
    patches_M: Tensor  # rows of the patches among the sorted tokens, caller's order
    row_column_M2: Tensor  # each patch's integer place in its image, caller's order
    image_M: Tensor  # the image that the patch belongs to, caller's order
    grid_M2: Tensor  # (rows, columns) of that image
    cu_seqlens: Tensor  # B + 1 int32: start of the first sorted image, end of each

    @classmethod
    def of(
        cls, grids: list[tuple[int, int]], prefix: int, device: torch.device, count: int = 1
    ) -> Layout:
        """Images of these grids, or `count` of one; that may be a symbol of torch.export."""
        grid_B2 = torch.tensor(grids, dtype=torch.int64).reshape(-1, 2).repeat(count, 1)
        patches_B, image_B = grid_B2.prod(1), torch.arange(len(grids) * count)
        row_M = torch.arange(count * sum(h * w for h, w in grids))
        if len(grids) == 1:  # nothing to sort, and ONNX has no stable sort
            order_B, image_M = image_B, row_M // (grids[0][0] * grids[0][1])
        else:
            order_B = torch.argsort(patches_B, stable=True)
            image_M = torch.repeat_interleave(image_B, patches_B)
        rank_B = torch.empty_like(order_B).scatter_(0, order_B, image_B)
        cu_seqlens = F.pad((patches_B[order_B] + prefix).cumsum(0), (1, 0))
        start_B = cu_seqlens[rank_B]  # first sorted row of each image
        nth_M = row_M - (patches_B.cumsum(0) - patches_B)[image_M]
        columns_M = grid_B2[image_M, 1]
        prefix_BR = start_B[:, None] + torch.arange(prefix)
        patches_M = start_B[image_M] + prefix + nth_M
        rows_N = torch.cat([prefix_BR.flatten(), patches_M])
        gather_N = torch.empty_like(rows_N).scatter_(0, rows_N, torch.arange(rows_N.shape[0]))
        row_column_M2 = torch.stack([nth_M // columns_M, nth_M % columns_M], dim=1)
        places = (gather_N, prefix_BR, rank_B, patches_M, row_column_M2, image_M, grid_B2[image_M])
        tensors = [to_device(tensor, device) for tensor in (*places, cu_seqlens.int())]
        return cls(sorted(h * w + prefix for h, w in grids), *tensors)

    def by_length(self, x: Tensor) -> list[Tensor]:
        """Sorted tokens (N, ...) as one batch (b, n, ...) for each length that occurs."""
        if len(self.lengths) == 1:  # of one image, or of `count` alike
            return [x.unflatten(0, (-1, self.lengths[0]))]
        counts = Counter(self.lengths)  # in sorted order
        # One split: a slice for each would give its gradient as a full-size tensor of zeros.
        runs = x.split([length * count for length, count in counts.items()])
        pairs = zip(runs, counts.values(), strict=True)
        return [run.unflatten(0, (count, -1)) for run, count in pairs]


# ---- Initial weights


@torch.no_grad()
def initialise(student: Student) -> None:
    """AMoE release, model.py: every block starts as the identity. RADIO: we chose a ViT's 0.02."""
    is_amoe = student.config.form == "amoe"
    nn.init.normal_(student.prefix_RD, std=0.02)
    for module in student.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01 if is_amoe else 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if not is_amoe:
        return
    nn.init.trunc_normal_(student.embed.weight, std=0.02)
    for depth, block in enumerate(student.blocks):
        std, ffn = 0.02 / math.sqrt(2 * (depth + 1)), block.ffn
        is_moe = isinstance(ffn, MoE)
        w1, w2 = (ffn.w1_EGD, ffn.w2_EDF) if is_moe else (ffn.w1.weight, ffn.w2.weight)
        gate, value = w1.chunk(2, dim=-2)
        nn.init.trunc_normal_(gate, std=0.02)
        router = [ffn.router.weight] if is_moe else []
        for weight in (block.attn.qkv.weight, block.attn.sinks, value, *router):
            nn.init.trunc_normal_(weight, std=std)
        nn.init.zeros_(w2)  # what ends a branch is zero
        nn.init.zeros_(block.attn.proj.weight)


# ---- SigLIP2's pooling head


class AttentionPool(nn.Module):
    """A learned probe attends to all tokens, then an MLP. AMoE release, model.py"""

    def __init__(self, spec: Any):
        super().__init__()
        dim, self.n_heads = spec.dim, spec.pool_heads
        if dim % self.n_heads:
            raise ValueError(f"pooling head: dim={dim} is not a multiple of {self.n_heads} heads")
        self.probe_1C = nn.Parameter(torch.randn(1, dim) / math.sqrt(dim))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=spec.pool_eps)
        self.fc1, self.fc2 = nn.Linear(dim, spec.pool_hidden), nn.Linear(spec.pool_hidden, dim)

    def forward(self, x_NC: Tensor, layout: Layout) -> Tensor:
        """Pool the sorted tokens of each image; `pooled_BC` in the caller's order."""
        dim, weight, bias = x_NC.shape[-1], self.qkv.weight, self.qkv.bias
        q_1C = F.linear(self.probe_1C, weight[:dim], bias[:dim])
        q_1H1A = rearrange(q_1C, "1 (h a) -> 1 h 1 a", h=self.n_heads)
        pooled = [x_NC.new_zeros(0, dim)]
        for x_BNC in layout.by_length(x_NC):
            kv = F.linear(x_BNC, weight[dim:], bias[dim:])
            k_BHNA, v_BHNA = rearrange(kv, "b n (s h a) -> s b h n a", s=2, h=self.n_heads)
            q_BH1A = q_1H1A.expand(x_BNC.shape[0], -1, -1, -1)
            y_BH1A = F.scaled_dot_product_attention(q_BH1A, k_BHNA, v_BHNA)
            pooled.append(rearrange(y_BH1A, "b h 1 a -> b (h a)"))
        x_BC = self.proj(torch.cat(pooled)[layout.rank_B])
        return x_BC + self.fc2(F.gelu(self.fc1(self.norm(x_BC)), approximate="tanh"))


# ---- Token merging: the destinations


def cell_middles(rows: int, columns: int, keep: int) -> Tensor:
    """Raster indices of the middles of the smallest square cells that number at most `keep`."""
    sides = range(1, max(rows, columns) + 1)
    side = next(s for s in sides if math.ceil(rows / s) * math.ceil(columns / s) <= keep)
    y, x = (
        torch.tensor([low + min(side, length - low) // 2 for low in range(0, length, side)])
        for length in (rows, columns)
    )
    return (y[:, None] * columns + x).flatten()


# ---- Kernels of attention and experts

# Float32 on CUDA goes by the definition, as no varlen kernel takes it.
ATTENTION = ("auto", "flash", "explicit", "varlen")
EXPERTS = ("auto", "grouped", "sorted", "dense")


def uncompiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.compiler.disable`, but its import, of a second, waits until something compiles."""
    known = [function]

    @wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        if len(known) == 1 and "torch._dynamo" in sys.modules:
            known.append(torch.compiler.disable(function))
        return known[-1](*args, **options)

    return call


@uncompiled  # its kernels are compiled already, and a layout differs every step
def attention(
    q_NHA, k_NHA, v_NHA, layout: Layout, sinks_H: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Attention of every token to the tokens of its own image; the same by every backend."""
    if not q_NHA.dtype == k_NHA.dtype == v_NHA.dtype:
        dtypes = f"q {q_NHA.dtype}, k {k_NHA.dtype}, v {v_NHA.dtype}"
        raise ValueError(f"attention takes one dtype, got {dtypes}; cast all to that of v")
    if not layout.lengths:  # the sinks keep their place in the graph: DDP waits for every gradient
        return v_NHA if sinks_H is None else v_NHA + 0 * sinks_H.sum()
    backend = choose_attention(q_NHA) if backend == "auto" else backend
    is_whole, outputs = backend == "varlen", []  # it knows where images end, and takes the pack
    qkv = [[x[None]] if is_whole else layout.by_length(x) for x in (q_NHA, k_NHA, v_NHA)]
    for run in zip(*qkv, strict=True):
        q, k, v = (rearrange(x_BNHA, "b n h a -> b h n a") for x_BNHA in run)
        if backend == "explicit":
            out_BHNA = explicit_attention(q, k, v, sinks_H)
        else:
            kernel = cpu_flash if backend == "flash" else partial(cuda_varlen, layout)
            out_BHNA = FlashSinkAttention.apply(q, k, v, sinks_H, kernel)
        outputs.append(rearrange(out_BHNA, "b h n a -> (b n) h a"))
    return torch.cat(outputs)


def choose_attention(q_NHA: Tensor) -> str:
    """The fastest backend that is exact for this device and dtype."""
    is_half = q_NHA.dtype in (torch.bfloat16, torch.float16)
    if q_NHA.device.type == "cuda" and is_half:
        return "varlen"
    return "flash" if q_NHA.device.type == "cpu" else "explicit"


def cpu_flash(*qkv_BHNA: Tensor):
    """torch's CPU flash kernel on images of equal length: output, log-sum-exp, its backward."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # In float32 always: in bfloat16 its backward takes longer.
    out_BHNA, lse_BHN = forward(*(x.float() if x.dtype.itemsize == 2 else x for x in qkv_BHNA))

    def backward(*saved: Tensor) -> list[Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = run(*(x.float() if x.dtype.itemsize == 2 else x for x in saved), 0.0, False)
        return [grad.to(saved[0].dtype) for grad in grads]

    return out_BHNA.to(qkv_BHNA[0].dtype), lse_BHN, backward


def cuda_varlen(layout: Layout, *qkv_1HNA: Tensor):
    """torch's varlen kernel on the whole pack: the same three."""
    import torch.nn.attention.varlen  # registers the kernels

    ops, longest = torch.ops.torch_attn, max(layout.lengths)
    lengths = (layout.cu_seqlens, layout.cu_seqlens, longest, longest)
    qkv_NHA = [rearrange(x, "1 h n a -> n h a") for x in qkv_1HNA]
    out_NHA, lse_HN, rng = ops._varlen_attn(*qkv_NHA, *lengths)

    def backward(*saved_1HNA: Tensor) -> list[Tensor]:
        *tensors, lse_1HN = saved_1HNA
        tensors = [rearrange(x, "1 h n a -> n h a").contiguous() for x in tensors]
        grads = ops._varlen_attn_backward(*tensors, lse_1HN[0].contiguous(), *lengths, False, rng)
        return [rearrange(x, "n h a -> 1 h n a") for x in grads]

    return rearrange(out_NHA, "n h a -> 1 h n a"), lse_HN[None], backward


def run_sorted(moe: MoE, x_ND: Tensor, gates_NK, chosen_NK, counts_E: Tensor) -> Tensor:
    """`MoE.run_dense`, each expert on the tokens that chose it alone."""
    dtype, device = x_ND.dtype, x_ND.device.type
    if torch.is_autocast_enabled(device):  # it does not know grouped_mm
        dtype = torch.get_autocast_dtype(device)  # before the gather: K rows of each are kept
    chosen_S, rows_E = chosen_NK.flatten(), counts_E
    pair_R = chosen_S.argsort(stable=True)  # which (token, choice) each row is of, by expert
    number_S = torch.arange(len(pair_R), device=pair_R.device)
    place_S = torch.empty_like(pair_R).scatter_(0, pair_R, number_S)  # and the row of each
    if device == "cpu" and dtype.itemsize == 2:
        # oneDNN builds a kernel for each number of rows that it has not met yet: let it meet few.
        # The rows between two experts' runs are copies that nobody collects.
        rows_E = (counts_E + 15) // 16 * 16
        added_E = rows_E - counts_E
        place_S += (added_E.cumsum(0) - added_E)[chosen_S]
        pair_R = pair_R.new_zeros(int(rows_E.sum())).scatter_(0, place_S, number_S)
    x_RD = Dispatch.apply(x_ND.to(dtype), pair_R, place_S, moe.top_k)
    gates_R = gates_NK.new_zeros(len(pair_R)).scatter(0, place_S, gates_NK.flatten())
    y_RD = run_experts(moe, x_RD, gates_R[:, None].to(dtype), rows_E)
    return collect(y_RD, place_S, moe.top_k).to(x_ND.dtype)


@uncompiled  # torch 2.13 traces grouped_mm in bfloat16 only
def run_experts(moe: MoE, x_RD: Tensor, gates_R1: Tensor, rows_E: Tensor) -> Tensor:
    """Every expert on its own run of rows, weighed by the gates."""
    width = 16 // x_RD.element_size()  # grouped_mm wants rows of whole 16 bytes
    aligned = not (moe.w1_EGD.shape[2] % width or moe.w2_EDF.shape[2] % width)
    if moe.backend == "grouped" or (moe.backend == "auto" and aligned):
        ends_E = rows_E.cumsum(0).to(torch.int32)
        w1_EDG, w2_EFD = moe.w1_EGD.to(x_RD.dtype).mT, moe.w2_EDF.to(x_RD.dtype).mT
        hidden_RF = gated(F.grouped_mm(x_RD, w1_EDG, offs=ends_E))
        # A gate belongs after its expert; w2 is linear, so before w2 is the same and narrower.
        return F.grouped_mm(hidden_RF * gates_R1, w2_EFD, offs=ends_E)
    # unbind once: w[e] in a loop would allocate a full-size gradient for every expert
    w1s, w2s, counts = moe.w1_EGD.unbind(0), moe.w2_EDF.unbind(0), rows_E.tolist()
    runs = zip(x_RD.split(counts), gates_R1.split(counts), w1s, w2s, strict=True)
    return torch.cat([F.linear(gated(F.linear(x, w1)) * gate, w2) for x, gate, w1, w2 in runs])


def collect(y_RD: Tensor, place_S: Tensor, top_k: int) -> Tensor:
    """Sum each token's K rows, which lie at `place_S`, without atomics, in a fixed order."""
    return y_RD.index_select(0, place_S).unflatten(0, (-1, top_k)).sum(1)


class Dispatch(torch.autograd.Function):
    """Copy each token's row to its K experts; the gradient of that is `collect`."""

    @staticmethod
    def forward(ctx, x_ND, pair_R, place_S, top_k):
        ctx.save_for_backward(place_S)
        ctx.top_k = top_k
        return x_ND.index_select(0, pair_R // top_k)

    @staticmethod
    def backward(ctx, grad_RD):
        return collect(grad_RD, *ctx.saved_tensors, ctx.top_k), None, None, None


def autocast(device: torch.device, precision: str = "auto") -> Any:
    """Arithmetic in 'bf16' or 'fp32'; 'auto': bf16 on CUDA, elsewhere as the caller has it."""
    if precision == "auto" and device.type != "cuda":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


# ---- What `encode` takes and gives


def check_options(student: Student, max_tokens: Any, keep: Any, layers: Any) -> None:
    """The numbers that `encode` takes, before any image is read."""
    for name, count in (("max_tokens", max_tokens), ("keep", keep)):
        if count is not None and not (isinstance(count, Integral) and int(count) > 0):
            raise ValueError(f"{name}={count!r} is no number of tokens: pass 1 or more, or None")
    if not isinstance(layers, Sequence | None):
        raise ValueError(f"layers={layers!r} is no list of blocks: pass (4, 6), say")
    if wrong := [i for i in layers or () if i not in range(1, len(student.blocks) + 1)]:
        raise ValueError(f"layers={wrong}: there are blocks 1 to {len(student.blocks)}")


def read_image(image: Any, name: str) -> Tensor:
    """An image of any kind that `encode` takes, as float32 (3, H, W) in [0, 1]."""
    try:
        image = to_rgb(image) if isinstance(image, Image.Image) else image
    except Exception as error:  # a decoder of hostile bytes may raise anything
        raise ValueError(f"{name}: does not decode ({error}); leave it out") from error
    is_bytes = isinstance(image, np.ndarray) and image.dtype == np.uint8
    is_float = isinstance(image, Tensor) and image.is_floating_point()
    shape = tuple(getattr(image, "shape", ()))
    channels = shape[2 if is_bytes else 0] if len(shape) == 3 else None
    if not (is_bytes or is_float) or channels != 3 or 0 in shape:
        raise ValueError(
            f"{name}: {type(image).__name__} {getattr(image, 'dtype', '')} {shape} is no PIL "
            "image, uint8 array (H, W, 3) or float tensor (3, H, W) in [0, 1], or is empty"
        )
    if is_bytes:
        return to_float(np.ascontiguousarray(image))  # img[..., ::-1] is a view, going backwards
    image = image.float()
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):  # also false for NaN
        raise ValueError(
            f"{name}: values from {low} to {high}, expected finite numbers in [0, 1]: "
            "not normalised, and 0..255 as uint8 or divided by 255"
        )
    return image


def read_images(images: Sequence[Any], name: str = "image") -> Iterator[Tensor]:
    """The one check behind `encode`, `Teacher` and `FixedGrid`: kind, shape, range, finite."""
    if isinstance(images, Image.Image | np.ndarray | Tensor):
        raise ValueError(f"{name}s: not a list of images, but one {type(images).__name__}")
    return (read_image(image, f"{name} {index}") for index, image in enumerate(images))


def packs_of(
    images: Sequence[Any], config: ModelConfig, max_tokens: int | None, budget: int
) -> Iterator[list[Tensor]]:
    """Images resized to whole patches, together as many as the budget of tokens allows."""
    max_area, pack, room = max_tokens and max_tokens * config.patch**2, list[Tensor](), budget
    for pixels in read_images(images):
        height, width = fit_size(pixels.shape[1], pixels.shape[2], config.patch, max_area=max_area)
        length = height * width // config.patch**2 + config.prefix
        if pack and length > room:
            yield pack
            pack, room = [], budget
        pack.append(resize(pixels, (height, width)))
        room -= length
    yield pack


def encode_pack(
    student: Student, pack: list[Tensor], keep: int | None, layers: Sequence[int]
) -> list[Features]:
    """Features of one pack of images whose sides are multiples of the patch."""
    batch, device = PackedBatch.from_images(pack, student.config.patch), student.prefix_RD.device
    seen: dict[int, Tensor] = {}

    def look(i: int, _: Any, given: Any, out: Any) -> None:  # given: tokens, layout, rotation
        seen[i] = out[0].index_select(0, given[1].patches_M)

    with autocast(device, student.precision), ExitStack() as hooks:
        for i in layers:
            hooks.enter_context(student.blocks[i - 1].register_forward_hook(partial(look, i)))
        out = student(batch.to(device))
    summary, factors = {"trunk": out.trunk_summary_BD, **out.summary}, {"trunk": 1}
    factors |= {head.name: head.upsample for head in student.config.heads}
    flat = {"trunk": out.trunk_MD, **out.patches}
    patches = {name: as_maps(x_MC, batch.grids, factors[name]) for name, x_MC in flat.items()}
    inner, results = {i: as_maps(x_MD, batch.grids) for i, x_MD in seen.items()}, []
    for b, (h, w) in enumerate(batch.grids):
        found = Features({name: x_BC[b].float().clone() for name, x_BC in summary.items()}, {})
        found.patches |= {name: maps[b] for name, maps in patches.items()}
        found.layers |= {i: maps[b] for i, maps in inner.items()}
        if keep is not None:
            trunk_ND = found.patches["trunk"].flatten(0, 1)
            found.tokens, _ = merge_tokens(trunk_ND, (h, w), min(keep, h * w))
        results.append(found)
    return results


def as_maps(x_MC: Tensor, grids: Sequence[Any], u: int = 1) -> list[Tensor]:
    """Patches of a pack, or u * u of each, as a map an image; copies, as a view keeps its pack."""
    pieces = zip(x_MC.float().split([h * w * u * u for h, w in grids]), grids, strict=True)
    pattern = "(h w u1 u2) c -> (h u1) (w u2) c"
    return [rearrange(x, pattern, h=h, u1=u, u2=u).clone() for x, (h, _) in pieces]


# ---- Our checkpoints

FORMAT = "amoe-from-scratch student"


def need(package: str, what: str = "this") -> Any:
    """Import what only some files or pictures need, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ImportError(f"{what} needs {name}: pip install {name}") from error


def hash_weights(module: nn.Module, total: Any = None) -> str:
    """sha256 of the names, shapes and bytes of all tensors; `total`: a hash to go on from."""
    total = hashlib.sha256() if total is None else total
    for key, tensor in sorted(module.state_dict().items()):
        total.update(f"{key} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def save_student(student: Student, path: str | Path, half: bool = False) -> None:
    """Write weights and config as plain data, whole or not at all; half: parameters in float16."""
    student = getattr(student, "_orig_mod", student)  # of torch.compile
    state = {name: x.cpu() for name, x in student.state_dict().items()}
    for name, _ in student.named_parameters() if half else ():
        state[name] = state[name].half()
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} does not fit in float16; save it in float32")
    config = dataclasses.asdict(student.config)
    content = {"format": FORMAT, "version": 1, "config": config, "state_dict": state}
    write_whole(path, lambda file: torch.save(content, file))


def in_run(path: str | Path) -> str | Path:
    """The model.pt of a run's folder, or of one of its checkpoints; any other path as it is."""
    file = Path(path) / "model.pt"
    return file if file.is_file() else path


def is_student(path: Path) -> bool:
    """Is this a file that `load_student` may read, or a folder of RADIO's?"""
    if path.is_file():
        return path.suffix != ".onnx"
    told = path / "config.json"
    return told.is_file() and json.loads(told.read_text()).get("model_type") == "radio"


def load_student(path: str | Path, top_k: int | None = None, device: str = "cpu") -> Student:
    """A student in float32: ours, a released SigLino `.pt` or RADIO `.pth.tar`, or a folder.

    Args:
        path: told apart by content; no code of the file is ever run. A folder is that of a run
            (its model.pt), or of `transformers.RadioModel`, with our heads where it has them.
        top_k: experts per token instead of the config's; a SigLino file without one has 6.
    Raises: FileNotFoundError; ValueError: unreadable file, other content, missing or unexpected
        keys, wrong shapes.
    """
    path = Path(in_run(path))
    place = torch.device(device)  # its own error, before the file is read
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder, seen from {Path.cwd()}")
    if path.is_dir() and not (path / "config.json").is_file():
        what = "a run's folder has a model.pt, one of transformers a config.json"
        raise FileNotFoundError(f"{path} holds no student: {what}")
    content = None if path.is_dir() else read_checkpoint(path)
    try:
        if content is None:
            config, state = read_folder(path)
        elif content.get("format") == FORMAT:
            config, state = read_ours(content)
        elif isinstance(content.get("args"), argparse.Namespace):
            config, state = read_radio(content)
        else:
            config, state = read_siglino(content)
        if top_k is not None and config.experts:
            config = replace(config, top_k=top_k)
        student = assemble(config, state)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return student.to(place)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read tensors and plain data only; RADIO's argparse.Namespace is the one class allowed."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds {code[1]}, which may run code" if code else "truncated or no checkpoint"
        raise ValueError(f"{path}: refused, {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def read_ours(content: dict[str, Any]) -> tuple[ModelConfig, Weights]:
    """A file of `save_student`, of today or of the time of one spec for both kinds of head."""
    if content.get("version") != 1:
        raise ValueError(f"format version {content.get('version')!r}, this code reads 1")
    state = Weights(content["state_dict"]).renamed([(r"table_GGD$", "pos_embed")])
    return read_config(content["config"]), state


def read_config(saved: dict[str, Any]) -> ModelConfig:
    lists = {name: tuple(x) for name, x in saved.items() if name.startswith("pixel_")}
    heads = tuple(read_spec(head) for head in saved["heads"])
    known = {name: x for name, x in saved.items() if x or name != "feature_normalizer"}
    return ModelConfig(**known | lists | {"heads": heads})


def read_spec(saved: dict[str, Any]) -> HeadSpec:
    """A saved head; there was one spec for both kinds once, of whose fields each read its own."""
    kinds = AdapterSpec, RadioSpec
    ours, other = kinds if saved.get("kind", "adapter") == "adapter" else kinds[::-1]
    unread = {*other.__match_args__, "kind", "pre_norm"} - {*ours.__match_args__}
    return ours(**{name: value for name, value in saved.items() if name not in unread})


# ---- Foreign weights: renames, what is to be cut or joined, then torch's own strict load


class Weights(dict[str, Tensor]):
    """A file's tensors by name; a name that is not there is an error of its own."""

    def __missing__(self, key: str) -> Tensor:
        raise ValueError(f"missing key {key}")

    def take(self, key: str) -> Tensor:
        """The tensor of that name, which is then gone."""
        tensor = self[key]
        del self[key]
        return tensor

    def join(self, ours: str, parts: Sequence[str], dim: int = 0) -> None:
        """The parts as one tensor of our name, where the file has the first of them."""
        if parts[0] in self:
            self[ours] = torch.cat([self.take(part) for part in parts], dim)

    def without(self, prefix: str) -> Weights:
        return Weights((key, x) for key, x in self.items() if not key.startswith(prefix))

    def renamed(self, rules: Sequence[tuple[str, Any]]) -> Weights:
        """Names after all (pattern, replacement) in this order."""
        names = {key: key for key in self}
        for pattern, ours in rules:
            names = {key: re.sub(pattern, ours, name) for key, name in names.items()}
        if double := [name for name, n in Counter(names.values()).items() if n > 1]:
            raise ValueError(f"two tensors for {double[0]}")
        return Weights({names[key]: x for key, x in self.items()})

    def count(self, prefix: str) -> int:
        """One more than the largest number that follows a prefix."""
        numbers = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in self)
        return 1 + max((int(found[1]) for found in numbers if found), default=-1)

    def sizes(self, n_heads: int, cls_tokens: int = 1) -> dict[str, Any]:
        """What the tensors, under our names, show of a `ModelConfig`; they do not show n_heads."""
        dim, inner = self["blocks.0.attn.proj.weight"].shape
        experts = len(self.get("blocks.0.ffn.expert_bias", ()))
        w2 = self["blocks.0.ffn.w2_EDF" if experts else "blocks.0.ffn.w2.weight"]
        return {
            "dim": dim,
            "n_layers": self.count("blocks."),
            "n_heads": n_heads,
            "head_dim": inner // n_heads,
            "ffn_dim": w2.shape[-1],
            "patch": math.isqrt(self["embed.weight"].shape[1] // 3),
            "cls_tokens": cls_tokens,
            "registers": len(self["prefix_RD"]) - cls_tokens,
            "experts": experts,
            "norm_weight": "blocks.0.norm1.weight" in self,
            "layer_scale": "blocks.0.scale1" in self,
            "position_grid": len(self.get("positions.pos_embed", ())),
        }


def assemble(config: ModelConfig, state: Weights) -> Student:
    """A student with exactly these tensors, in float32; torch names all that does not fit."""
    with torch.device("meta"):
        student = Student(config)
    student.load_state_dict({key: x.float() for key, x in state.items()}, assign=True)
    return student


POOL = [  # SigLIP's pooling head, in the release as in transformers
    (r"\battention\.in_proj_", "qkv."),
    (r"\battention\.out_proj\.", "proj."),
    (r"\blayernorm\.", "norm."),
    (r"\bmlp\.fc", "fc"),
    (r"\bprobe$", "probe_1C"),
]
SIGLINO = [
    (r"^img_projector\.", "embed."),
    (r"^freqs_cis_golden$", "positions.freqs_HJ2"),
    (r"^layers\.", "blocks."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"^(blocks\.\d+)\.attention\.wo\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.sinks$", r"\1.attn.sinks"),
    (r"\.moe\.router\.gate\.", ".ffn.router."),
    (r"\.moe\.experts\.w([13])$", r".ffn.w\1_EGD"),
    (r"\.moe\.experts\.w2$", ".ffn.w2_EDF"),
    (r"\.moe\.", ".ffn."),
    # The dense sizes' name for their MLP is not in the papers: any one with w1 to w3 will do.
    (r"^(blocks\.\d+)\.(?!attention\.|ffn\.)\w+\.w([123])\.", r"\1.ffn.w\2."),
    (r"^(\w+)_adapter\.fc2\.", r"heads.\1.last."),
    (r"^(\w+)_adapter\.", r"heads.\1."),
    (r"^(\w+)_multihead_attention_pooling_head\.", r"heads.\1.pool."),
    *POOL,
]


def read_siglino(content: dict[str, Any]) -> tuple[ModelConfig, Weights]:
    """A released AMoE / SigLino file. AMoE release, configs.py and model.py"""
    tensors = content.get("state_dict", content).items()
    file = Weights((key, x) for key, x in tensors if isinstance(x, Tensor))
    file = file.without("layer_norm_dinov3.")  # in every file, never called
    if not any(key.startswith(("img_projector.", "layers.", "cls_token")) for key in file):
        raise ValueError("neither our checkpoint nor a SigLino or RADIO release")
    x = file.renamed(SIGLINO)
    registers = [x.take("storage_tokens")[0]] if "storage_tokens" in x else []
    x["prefix_RD"] = torch.cat([x.take("cls_token")[0], *registers])
    n_heads = len(x["blocks.0.attn.sinks"])
    for i in range(x.count("blocks.")):
        qkv = [x.take(f"blocks.{i}.attention.w{part}.weight") for part in "qkv"]
        x[f"blocks.{i}.attn.qkv.weight"] = join_qkv(qkv, n_heads)
        for w1, w3 in (("w1_EGD", "w3_EGD"), ("w1.weight", "w3.weight")):  # gate, then value
            x.join(f"blocks.{i}.ffn.{w1}", [f"blocks.{i}.ffn.{w}" for w in (w1, w3)], dim=-2)
    heads = []
    for name in dict.fromkeys(key.split(".")[1] for key in x if key.startswith("heads.")):
        pool: dict[str, Any] = {}
        width = len(x[f"heads.{name}.norm.weight"])
        if (probe := f"heads.{name}.pool.probe_1C") in x:
            x[probe], hidden = x[probe][0], len(x[f"heads.{name}.pool.fc1.bias"])
            pool = {"pool": True, "pool_hidden": hidden, "pool_eps": 1e-5}
        heads.append(AdapterSpec(name, width, width, registers=not pool, **pool))
    top_k = content.get("config", {}).get("moe_args", {}).get("top_k", 6)
    sizes = x.sizes(n_heads)
    return ModelConfig("amoe", heads=tuple(heads), top_k=sizes["experts"] and top_k, **sizes), x


def join_qkv(qkv: Sequence[Tensor], n_heads: int) -> Tensor:
    """One matrix, the rotated half of q and k from pairs (2j, 2j+1) to (j, J+j); see `rotate`."""
    q_k_v = torch.stack([rearrange(part, "(h a) d -> h a d", h=n_heads) for part in qkv])
    still, turned = q_k_v[:2].chunk(2, dim=2)
    turned = rearrange(turned, "s h (j two) d -> s h (two j) d", two=2)
    joined = torch.cat([torch.cat([still, turned], dim=2), q_k_v[2:]])
    return rearrange(joined, "s h a d -> (s h a) d")


RADIO = [
    (r"^(base_model|model)\.", ""),
    (r"^patch_generator\.embedder\.", "embed."),
    (r"^patch_generator\.cls_token\.token$", "prefix_RD"),
    (r"^patch_generator\.pos_embed$", "positions.pos_embed"),
    (r"^(blocks\.\d+)\.mlp\.fc([12])\.", r"\1.ffn.w\2."),
    (r"^(blocks\.\d+)\.ls([12])\.(gamma|grandma)$", r"\1.scale\2"),  # the release renamed it
    (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.scale\2"),  # transformers
    (r"^_heads\.([^.]+)\.", r"heads.\1.summary."),
    (r"^_feature_projections\.([^.]+)\.", r"heads.\1.patches."),
    (r"^(heads\..+)\.final\.0\.", r"\1.norm."),
    (r"^(heads\..+)\.final\.2\.", r"\1.last."),
    (r"^(heads\..+)\.blocks\.(\d+)\.0\.", r"\1.inner.\2.0."),
    (r"^(heads\..+)\.blocks\.(\d+)\.2\.", r"\1.inner.\2.1."),
]
RADIO_N_HEADS = dict(tiny=3, small=6, base=12, large=16, huge=16, giant=24, so400m=16, bigg=16)


def read_radio(content: dict[str, Any]) -> tuple[ModelConfig, Weights]:
    """A released RADIO file of a timm ViT. RADIO release, the layout of its checkpoints"""
    args = vars(content["args"])
    model, stated = str(args.get("model")), (args.get("model_kwargs") or {}).get("num_heads")
    file = Weights(fold_spectral(content.get("state_dict_ema") or content["state_dict"]))
    file = file.without("_intermediate_feature_normalizer.")  # of outputs that we do not offer
    if not any(key.startswith("base_model.blocks.") for key in file):
        trunk = [key for key in file if key.startswith("base_model.")][:9]
        raise ValueError(f"the backbone {model} is no timm ViT, its keys are {trunk}")
    if attention := [key for key in file if re.match(r"_(heads|feature_proj\w+)\..*\.attn\.", key)]:
        what = "attention in a head (C-RADIOv4) is not read; transformers' folder has the trunk"
        raise ValueError(f"{attention[0]}: {what}")
    x, per_teacher = file.renamed(RADIO), args.get("cls_token_per_teacher", True)
    heads: dict[str, RadioSpec] = {}
    for i, entry in enumerate(args.get("teachers") or []):
        name, by_number = entry["name"], f"heads.{i}."
        if name in heads:  # once more, at another size: the first counts
            x = x.without(by_number)
            continue
        slot = str(i) if any(key.startswith(by_number) for key in x) else name
        x = x.renamed([(rf"^heads\.{re.escape(slot)}\.", f"heads.{name}.")])
        token = entry.get("token_slot")
        token = (len(heads) if per_teacher else 0) if token is None else int(token)
        heads[name] = radio_head(x, entry, token)
    known = next((n for arch, n in RADIO_N_HEADS.items() if arch in model.lower()), None)
    cls_tokens = max(1, len(heads)) if per_teacher else 1
    return radio_config(x, stated or known, cls_tokens, tuple(heads.values()))


def radio_config(
    x: Weights, n_heads: int | None, cls_tokens: int, heads: tuple[HeadSpec, ...]
) -> tuple[ModelConfig, Weights]:
    """The trunk of a release: its patches are (channel, row, column), its table is flat."""
    dim = len(x["blocks.0.norm1.weight"])
    if not n_heads or dim % n_heads:
        raise ValueError(f"a width of {dim} and num_heads={n_heads}: the file does not say enough")
    mean, std = (
        tuple(x.pop(f"input_conditioner.norm_{part}", torch.tensor(known)).flatten().tolist())
        for part, known in zip(("mean", "std"), CLIP_RGB, strict=True)
    )
    patch, table = math.isqrt(x["embed.weight"].shape[1] // 3), x["positions.pos_embed"]
    pattern, side = "d (c y x) -> d (y x c)", math.isqrt(table.shape[1])
    x["embed.weight"] = rearrange(x["embed.weight"], pattern, y=patch, x=patch)
    x["positions.pos_embed"] = rearrange(table, "1 (y x) d -> y x d", y=side)
    has = {"final_norm": "norm.weight" in x, "patch_bias": "embed.bias" in x}
    has |= {"gated_ffn": len(x["blocks.0.ffn.w1.weight"]) > x["blocks.0.ffn.w2.weight"].shape[1]}
    sizes = x.sizes(n_heads, cls_tokens) | has | {"pixel_mean": mean, "pixel_std": std}
    return ModelConfig("radio", heads=heads, **sizes), x


def radio_head(x: Weights, entry: dict[str, Any], token: int) -> RadioSpec:
    """One teacher's head, with the sizes of its two MLPs; None, 0, 0 where it has none."""
    sizes: dict[str, Any] = {"token": token}
    for part, ours in (("summary", "summary_"), ("patches", "")):
        mlp = f"heads.{entry['name']}.{part}."
        has = any(key.startswith(mlp) for key in x)
        out, hidden = x[mlp + "last.weight"].shape if has else (None, 0)
        inner = x.count(mlp + "inner.")
        sizes |= {ours + "dim": out, ours + "hidden": hidden, ours + "inner": inner}
    upsample = next((int(v) for k, v in entry.items() if "upsample" in k and v), 1)
    sizes["dim"] = sizes["dim"] and sizes["dim"] // upsample**2
    in_summary = bool(entry.get("use_summary", True))
    return RadioSpec(entry["name"], upsample=upsample, in_trunk_summary=in_summary, **sizes)


def fold_spectral(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights by key, the spectrally reparametrised as plain W * s / sigma(W). RADIO release"""
    for key, weight in tensors.items():
        base, parametrised, rest = key.partition(".parametrizations.weight.")
        if not parametrised:
            yield key, weight
        if rest != "original":
            continue
        scales = sorted(k for k in tensors if k.startswith(base + ".para") and k.endswith("scale"))
        chunks = []  # qkv: three matrices, each with its own norm
        for scale_key, w in zip(scales, weight.float().chunk(len(scales)), strict=True):
            part = scale_key.removesuffix("scale")
            scale, u, v = (tensors[part + x].float().flatten() for x in ("scale", "_u", "_v"))
            if tensors.get(part + "_sn_version", torch.tensor(1)) > 1:
                scale = F.softplus(scale) + 0.05
            chunks.append(w * scale / (u @ w @ v))
        yield base + ".weight", torch.cat(chunks)


# ---- Folders of transformers' RadioModel

SMALLER = 2.0**-30  # exact in float32; not for float16
RADIO_FOLDER = [
    (r"^embed\.", "patch_generator.embedder."),
    (r"^prefix_RD$", "patch_generator.cls_token.token"),
    (r"^positions\.", "patch_generator."),
    (r"\.ffn\.w", ".mlp.fc"),
    (r"\.scale([12])$", r".layer_scale\1.lambda1"),
    (r"^", "radio_model.model."),
]


def save_transformers(student: Student, folder: str | Path) -> None:
    """A RADIO-form student as a folder that `transformers.RadioModel` reads (AutoModel too).

    config.json; model.safetensors, the trunk under the RADIO release's names; heads.safetensors,
    which is ours. Raises: ValueError for the AMoE form and a gated MLP.
    """
    config, state = student.config, Weights(student.state_dict())
    if config.form != "radio" or config.gated_ffn:
        raise ValueError(
            f"RadioModel is not of {config.form} form with gated_ffn={config.gated_ffn}: take "
            "torch.hub or save_onnx, or a student that --preset warm trained"
        )
    x, heads = state.without("heads."), {k: w for k, w in state.items() if k.startswith("heads.")}
    if config.patch_bias:  # each patch gets one entry of the table, or a mean of four
        x["positions.pos_embed"] = x["positions.pos_embed"] + x.take("embed.bias")
    if config.final_norm:
        norm_as_block(x, config)
    x["embed.weight"] = rearrange(x["embed.weight"], "d (y x c) -> d (c y x)", y=config.patch, c=3)
    x["positions.pos_embed"] = x["positions.pos_embed"].flatten(0, 1)[None]
    file, summary = x.renamed(RADIO_FOLDER), list(config.summary_tokens)
    for part, values in (("mean", config.pixel_mean), ("std", config.pixel_std)):
        file[f"radio_model.input_conditioner.norm_{part}"] = torch.tensor(values)[:, None, None]
    file["radio_model.summary_idxs"] = torch.tensor(summary)
    told = dict(model_type="radio", hidden_size=config.dim, num_attention_heads=config.n_heads)
    told |= dict(num_hidden_layers=config.n_layers + config.final_norm, head_dim=config.head_dim)
    ratio = (config.ffn_dim + 0.5) / config.dim  # RadioModel cuts off the half, not a whole one
    told |= dict(mlp_ratio=ratio, patch_size=config.patch)
    told |= dict(max_img_size=config.position_grid * config.patch, num_registers=config.registers)
    told |= dict(num_cls_tokens=config.cls_tokens, summary_idxs=summary)
    told |= dict(layer_norm_eps=1e-6 * (SMALLER**2 if config.final_norm else 1))
    told |= dict(norm_mean=config.pixel_mean, norm_std=config.pixel_std)
    ours = json.dumps(dataclasses.asdict(replace(config, patch_bias=False)))
    save = need("safetensors.torch", "save_transformers").save
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, tensors in (("model", file), ("heads", heads)):
        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        content = save(whole, {"format": "pt", "config": ours})
        write_whole(Path(folder) / f"{name}.safetensors", content)
    write_whole(Path(folder) / "config.json", json.dumps(told, indent=2).encode())


def norm_as_block(x: Weights, config: ModelConfig) -> None:
    """The final norm, which RadioModel has not, as one more block, in place.

    Its MLP is the identity of its norm, as GELU(x) - GELU(-x) = x, and the residual stream is made
    SMALLER, which norms don't see, so that it adds nothing to it.
    """
    D, last, one = config.dim, f"blocks.{config.n_layers}.", torch.ones(config.dim)
    if config.ffn_dim < 2 * D:
        raise ValueError(f"the final norm needs an MLP of 2 * {D}, this has {config.ffn_dim}")
    for key in [key for key in x if key.startswith("blocks.0.")]:
        x[last + key.removeprefix("blocks.0.")] = torch.zeros_like(x[key])
    for i, name in product(range(config.n_layers), ("scale1", "scale2")):
        x[f"blocks.{i}.{name}"] = x.get(f"blocks.{i}.{name}", one) * SMALLER
    for name in ("embed.weight", "prefix_RD", "positions.pos_embed"):
        x[name] = x[name] * SMALLER
    x |= {last + "scale1": one, last + "scale2": one.clone()}
    x |= {last + f"norm2.{part}": x.take(f"norm.{part}") for part in ("weight", "bias")}
    for w in (x[last + "ffn.w1.weight"], x[last + "ffn.w2.weight"].T):
        w[:D], w[D : 2 * D] = torch.eye(D), -torch.eye(D)


def block_as_norm(x: Weights, config: ModelConfig) -> Weights:
    """The inverse of `norm_as_block`."""
    last = f"blocks.{config.n_layers}."
    norm = {f"norm.{part}": x[f"{last}norm2.{part}"] for part in ("weight", "bias")}
    scaled = re.compile(r"(embed\.weight|prefix_RD|.*pos_embed|.*\.scale[12])$")
    x = Weights((k, w / SMALLER if scaled.match(k) else w) for k, w in x.without(last).items())
    if not config.layer_scale:
        x = Weights((k, w) for k, w in x.items() if ".scale" not in k)
    return Weights(x | norm)


def read_folder(folder: Path) -> tuple[ModelConfig, Weights]:
    """A folder of transformers' RadioModel, by us, with its heads, or by others, without."""
    told = json.loads((folder / "config.json").read_text())
    if told.get("model_type") != "radio":
        raise ValueError(f"no model.pt, and config.json says {told.get('model_type')!r}, not radio")
    file = Weights()
    for path in sorted(folder.glob("model*.safetensors")):
        file |= read_safetensors(path)[0]
    file = file.renamed([(r"^radio_model\.", "")]).without("adaptors.")
    summary = file.pop("summary_idxs", torch.tensor([0])).tolist()
    count, n_heads = told.get("num_cls_tokens", 3), told.get("num_attention_heads", 16)
    x = file.renamed(RADIO)
    if count not in range(1, len(x["prefix_RD"]) + 1):
        raise ValueError(f"num_cls_tokens={count!r}, but its prefix has {len(x['prefix_RD'])}")
    make = partial(RadioSpec, dim=None, summary_dim=None)  # which CLS tokens make the summary
    specs = tuple(make(f"cls{i}", token=i, in_trunk_summary=i in summary) for i in range(count))
    config, x = radio_config(x, n_heads, count, specs if count > 1 else ())
    if (folder / "heads.safetensors").is_file():
        heads, ours = read_safetensors(folder / "heads.safetensors")
        config = read_config(json.loads(ours["config"]))
        return config, Weights((block_as_norm(x, config) if config.final_norm else x) | heads)
    if (eps := told.get("layer_norm_eps", 1e-6)) != 1e-6:
        raise ValueError(f"layer_norm_eps={eps}, ours is 1e-6")
    return config, x


def read_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """Tensors and metadata of a file; its lengths are checked before anything is mapped."""
    safetensors = need("safetensors", f"{path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            # copies lie aligned in memory: GEMMs of one model then round alike, however it came
            tensors = Weights((k, file.get_tensor(k).clone()) for k in file.keys())  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        what = "is cut or damaged, or a pointer of Git LFS; fetch it again"
        raise ValueError(f"{path.name} {what} ({error})") from error


# ---- Other heads on the same trunk


def with_heads(config: ModelConfig, heads: Sequence[Any]) -> ModelConfig:
    """The same trunk with other teacher heads; RADIO with a CLS per teacher gets one for each."""
    if config.cls_tokens > 1:
        heads = [replace(head, token=i) for i, head in enumerate(heads)]
        return replace(config, heads=tuple(heads), cls_tokens=max(1, len(heads)))
    return replace(config, heads=tuple(heads))


def with_other_heads(given: ModelConfig, heads: Sequence[Any]) -> ModelConfig:
    """The same trunk and prefix for other teachers, so that heads that stay answer as before.

    RADIO: teachers that stay keep their CLS token, by name. A new one reads a token that nobody
    reads any more, else a register, else the first. We chose
    """
    tokens = {head.name: head.token for head in given.heads}
    if given.cls_tokens > 1:
        kept = {tokens[head.name] for head in heads if head.name in tokens}
        free = iter([i for i in range(given.prefix) if i not in kept])
        new = {head.name: next(free, 0) for head in heads if head.name not in tokens}
        heads = [replace(head, token=(tokens | new)[head.name]) for head in heads]
    cls_tokens = max([given.cls_tokens, *(head.token + 1 for head in heads)])
    registers = given.prefix - cls_tokens
    return replace(given, heads=tuple(heads), cls_tokens=cls_tokens, registers=registers)


def foldable(spec: Any) -> Any:
    """What two heads that answer the same have in common: one that PHI-S can be folded into."""
    if isinstance(spec, AdapterSpec):
        return replace(spec, bias=True, split=not spec.pool)
    return replace(spec, token=0)


# ---- Starting from pretrained weights


@torch.no_grad()
def copy_pool(ours: AttentionPool, theirs: Any) -> None:
    """SigLIP's pooling head of transformers -> ours."""
    x = Weights(theirs.state_dict()).renamed(POOL)
    x["probe_1C"] = x["probe_1C"][0]
    ours.load_state_dict(x)


VIT = [  # transformers' DINOv2 and ViT
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.fc([12])\.", r".ffn.w\1."),
    (r"\.mlp\.down_proj\.", ".ffn.w2."),
    (r"\.layer_scale([12])\.lambda1$", r".scale\1"),
]
VIT_JOINED = {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "ffn.w1": ("mlp.gate_proj", "mlp.up_proj"),
}


def read_vit(network: Any, layers: int | None, stats: tuple) -> Student:
    """A `Dinov2Model`, `Dinov2WithRegistersModel` or `ViTModel` as a trunk of the RADIO form.

    Equal to it at its own resolution. The class token's position is added to the token; the final
    norm stays, unlike in RADIO's own releases.
    """
    x = Weights(network.state_dict()).renamed(VIT).without("pooler.")
    for i in range(network.config.num_hidden_layers):
        for (ours, parts), kind in product(VIT_JOINED.items(), ("weight", "bias")):
            x.join(f"blocks.{i}.{ours}.{kind}", [f"blocks.{i}.{part}.{kind}" for part in parts])
        if i >= (layers or i + 1):
            x = x.without(f"blocks.{i}.")
    positions = x["embeddings.position_embeddings"]
    prefix = [x["embeddings.cls_token"][0] + positions[0, :1]]
    prefix += [x["embeddings.register_tokens"][0]] if "embeddings.register_tokens" in x else []
    x = x.without("embeddings.")
    x |= {"prefix_RD": torch.cat(prefix), "positions.pos_embed": positions[:, 1:]}
    x |= {"embed.weight": x["embed.weight"].flatten(1)}
    config, x = radio_config(x, network.config.num_attention_heads, 1, ())
    return assemble(replace(config, pixel_mean=stats[0], pixel_std=stats[1]), x)


def load_pretrained(student: Student, given: Student) -> set[str]:
    """Copy a pretrained trunk, and heads of equal name and shape; returns the names of these.

    A table of positions of another size is resized (RADIO release: bicubic). Where the student has
    a CLS token per teacher, each starts from the given one.
    """
    ours, theirs = student.state_dict(), given.state_dict()
    specs = [{n: foldable(head.spec) for n, head in x.heads.items()} for x in (student, given)]
    heads = {name for name in specs[0] if specs[0][name] == specs[1].get(name)}
    for name in heads:  # a head of a release may have one last layer for all, without a bias
        last = f"heads.{name}.last"
        if f"{last}.bias" in ours:
            theirs.setdefault(f"{last}.bias", torch.zeros_like(ours[f"{last}.bias"]))
        for kind in ("weight", "bias") if f"{last}_summary.bias" in ours else ():
            theirs.setdefault(f"{last}_summary.{kind}", theirs[f"{last}.{kind}"])
    theirs["prefix_RD"] = carry_prefix(student, given, heads)
    side = student.config.position_grid
    if "positions.pos_embed" in theirs and side not in (0, given.config.position_grid):
        maps = rearrange(theirs["positions.pos_embed"], "h w d -> 1 d h w")
        maps = F.interpolate(maps, side, mode="bicubic", align_corners=True)
        theirs["positions.pos_embed"] = rearrange(maps, "1 d h w -> h w d")
    new = tuple(f"heads.{name}." for name in student.heads if name not in heads)
    old = tuple(f"heads.{name}." for name in given.heads if name not in heads)
    state = {name: x for name, x in theirs.items() if not name.startswith(old)}
    try:
        student.load_state_dict(state | {n: x for n, x in ours.items() if n.startswith(new)})
    except RuntimeError as error:
        remedy = "choose the --model that it was, or --model init"
        raise ValueError(f"--init: {' '.join(str(error).split())[:300]}; {remedy}") from error
    return heads


def carry_prefix(student: Student, given: Student, heads: set[str]) -> Tensor:
    """The given CLS tokens and registers as the student has places for them."""
    ours, theirs = student.prefix_RD.detach(), given.prefix_RD.detach()
    cls_tokens = student.config.cls_tokens
    if cls_tokens > given.config.cls_tokens == 1:  # one starts them all
        all_RD = torch.cat([theirs[:1].expand(cls_tokens, -1), theirs[1:]])
        return torch.cat([all_RD, ours[len(all_RD) :]])[: len(ours)]
    moved = theirs.clone()
    for name in heads if moved.shape == ours.shape else ():  # teachers may change places
        moved[student.heads[name].spec.token] = theirs[given.heads[name].spec.token]
    return moved


# ---- Export, and the table of sizes


class FixedGrid(nn.Module):
    """A student for one image size, tensors in and out: what torch.export and ONNX can take.

    Input: images_B3HW in [0, 1], any B. Output: a dict of `summary.<name>` (B, C) and
    `patches.<name>` (B, h, w, C) with each head's name and `trunk`.
    """

    def __init__(self, student: Student, height: int, width: int):
        super().__init__()
        patch = student.config.patch
        if height % patch or width % patch:
            raise ValueError(f"{height}x{width} is not a multiple of the patch, {patch}")
        # Explicit attention and the dense loop over experts: grouped_mm does not export on CPU.
        self.student = copy.deepcopy(student).use(attention="explicit", experts="dense").eval()
        self.student.requires_grad_(False)
        self.size = height, width

    def forward(self, images_B3HW: Tensor) -> dict[str, Tensor]:
        config, (height, width) = self.student.config, self.size
        if images_B3HW.ndim != 4 or images_B3HW.shape[1:] != (3, height, width):
            shape = tuple(images_B3HW.shape)
            raise ValueError(f"images of shape {shape}, this grid takes (B, 3, {height}, {width})")
        if not torch.compiler.is_compiling():  # an exported program can't look at values
            images_B3HW = torch.stack(list(read_images(list(images_B3HW))))
        h, w, p = height // config.patch, width // config.patch, config.patch
        layout = Layout.of([(h, w)], config.prefix, images_B3HW.device, images_B3HW.shape[0])
        pattern = "b c (h y) (w x) -> (b h w) (y x c)"
        out = self.student.run(rearrange(images_B3HW, pattern, y=p, x=p), layout)
        summary = {"trunk": out.trunk_summary_BD, **out.summary}
        results = {f"summary.{name}": x_BC.float() for name, x_BC in summary.items()}
        for name, x_MC in {"trunk": out.trunk_MD, **out.patches}.items():
            u = 1 if name == "trunk" else self.student.heads[name].spec.upsample
            pattern = "(b h w u1 u2) c -> b (h u1) (w u2) c"
            results[f"patches.{name}"] = rearrange(x_MC.float(), pattern, h=h, w=w, u1=u, u2=u)
        return results


def save_onnx(student: Student, path: str | Path, height: int, width: int) -> None:
    """`FixedGrid` as an ONNX file: `images` in, any number of them, outputs by its names."""
    need("onnxscript", "ONNX")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {Path(path).parent}")
    grid = FixedGrid(student, height, width).eval()
    images_B3HW = torch.rand(2, 3, height, width)
    large = sum(p.nbytes for p in grid.parameters()) > 1.9e9  # more than one file can hold
    names = {"input_names": ["images"], "output_names": list(grid(images_B3HW))}
    shapes = {"images_B3HW": {0: torch.export.Dim("batch")}}
    options = {"dynamo": True, "verbose": False, "external_data": large, "dynamic_shapes": shapes}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision; we do not
    with warnings.catch_warnings(action="ignore"):  # of torch, about its own code
        torch.onnx.export(grid, (images_B3HW,), path, **names, **options)  # type: ignore[arg-type]


@cache
def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters: total, trunk (without teacher heads), and both as active for one token."""
    with torch.device("meta"):
        named = dict(Student(config).named_parameters())

    def count(is_in: Callable[[str], bool]) -> int:
        return sum(p.numel() for name, p in named.items() if is_in(name))

    total, trunk = count(lambda _: True), count(lambda name: not name.startswith("heads."))
    experts = count(lambda name: name.endswith(("_EGD", "_EDF")))
    idle = experts * (config.experts - config.top_k) // max(config.experts, 1)
    counts = {"total": total, "active": total - idle, "trunk": trunk, "active_trunk": trunk - idle}
    counts["frozen"] = count(lambda name: not named[name].requires_grad)
    return counts | {"block": count(lambda name: name.startswith("blocks.0."))}


def count_flops(config: ModelConfig, pixels: int) -> float:
    """FLOPs of one square image's forward, as torch counts the products of matrices in it."""
    # K experts of F cost what one MLP of K * F does, which the counter knows.
    hidden, side = config.ffn_dim * max(config.top_k, 1), pixels // config.patch
    dense = replace(config, n_layers=1, experts=0, top_k=0, ffn_dim=hidden)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        student = Student(dense).to("meta").use(attention="explicit")
        layout = Layout.of([(side, side)], config.prefix, torch.device("meta"))
        student.run(torch.empty(side**2, 3 * config.patch**2), layout)
    block = sum(counter.get_flop_counts()["Block"].values())
    return counter.get_total_flops() + (config.n_layers - 1) * block


def activation_bytes(config: ModelConfig, recompute: bool) -> float:
    """What a token of a training step keeps until its backward, in bytes; computed in bf16.

    By the tensors that autograd saves, up to a quarter more than they are: float32 around the
    norms and along the residual stream, bf16 in the rest, float32 predictions and differences.
    """
    dim, inner, hidden = config.dim, config.n_heads * config.head_dim, config.ffn_dim
    of_dim, of_inner = {"amoe": (22, 22), "radio": (14, 8)}[config.form]  # norms and attention
    mlp = hidden * (8 if config.gated_ffn else 4)
    if config.experts:
        mlp = config.top_k * (2 * dim + 10 * hidden)
    block = of_dim * dim + of_inner * inner + mlp + 4 * dim * config.layer_scale
    kept = config.n_layers * 4 * dim + block if recompute else config.n_layers * block
    return kept + sum(24 * (head.hidden or head.dim or 0) for head in config.heads)


def training_bytes(config: ModelConfig, devices: int, sharded: bool) -> float:
    """Weights, gradients and AdamW's two moments in float32 on each device, activations apart.

    DDP holds all of it everywhere. FSDP2 holds a share, and one gathered block with its gradient.
    """
    counts = count_parameters(config)
    state = 16 * (counts["total"] - counts["frozen"]) + 4 * counts["frozen"]
    return state / devices + 8 * counts["block"] * (devices > 1) if sharded else state


def main() -> None:
    """Print the table of sizes."""
    print("parameters in millions, 'a': active for one token; GFLOPs of one image's forward")
    print("GB per device of weights, gradients and AdamW: DDP, and FSDP2 on 1, 8 and 64 devices")
    names = "total", "total a", "trunk", "trunk a", "256 px", "512 px", "DDP"
    heads = [*names, "FSDP2 1", "FSDP2 8", "FSDP2 64"]
    print(" " * 11 + "".join(f"{name:>9}" for name in heads))
    for name, config in MODELS.items():
        counts = count_parameters(config)
        row = [counts[key] / 1e6 for key in ("total", "active", "trunk", "active_trunk")]
        row += [count_flops(config, pixels) / 1e9 for pixels in (256, 512)]
        devices = (1, False), (1, True), (8, True), (64, True)  # DDP holds the same on any number
        row += [training_bytes(config, *each) / 1e9 for each in devices]
        print(f"{name:<11}" + "".join(f"{x:9.2f}" for x in row))


if __name__ == "__main__":
    main()
