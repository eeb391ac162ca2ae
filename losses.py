"""What the student is asked to match: losses on tensors, and the space of a teacher's targets.

Papers: AMoE (per-image means, ARKD), PHI-S, AM-RADIO and RADIOv2.5 (cosine), C-RADIOv4 (angle and
shift-equivariant losses, in the second part). Read: `vector_loss`, `patch_loss`; `arkd`, `rkd`;
`Normalizer`, `PhiS`; `TargetSpace` with its table. The mean over the global batch's images, and the
relations of a batch that comes in parts, are train.py's.

Legend: B images, M patches of a pack, P patches of an image, N rows of features (tokens or images),
R registers, C teacher width, D width of a head's hidden layer, Q pairs i < j of images,
(h, w) the grid of one image in patches. No gradient ever reaches a teacher's features.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]


# ---- Part I, the papers: feature losses, one value per image


Kind = Callable[[Tensor, Tensor], Tensor]
KINDS: dict[str, Kind] = {  # how far apart two vectors are: (..., C), (..., C) -> (...)
    "mse": lambda x, y: (x - y).square().mean(-1),  # PHI-S
    "sum": lambda x, y: (x - y).square().sum(-1),  # AMoE as printed: C times it
    "cosine": lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1),
    "am-radio": lambda x, y: (  # its smooth-L1 beta is not printed; 1 as usual
        0.9 * KINDS["cosine"](x, y) + 0.1 * F.smooth_l1_loss(x, y, reduction="none").mean(-1)
    ),
}


def vector_loss(student_BC: Tensor, teacher_BC: Tensor, kind: str = "mse") -> Tensor:
    """Loss of each image's summary or registers -> (B,).

    Args:
        student_BC, teacher_BC: (B, C), or (B, R, C) for registers, matched one to one and averaged.
        kind: a key of `KINDS`; "cosine" is the summary loss of AM-RADIO and RADIOv2.5.
    Raises: ValueError for an unknown kind, or shapes that differ.
    AMoE: L_CLS, L_reg (their form is not known to us: that of L_patch); AM-RADIO: L_summary
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if student_BC.shape != teacher_BC.shape:
        shapes = list(student_BC.shape), list(teacher_BC.shape)
        raise ValueError(f"student {shapes[0]} and teacher {shapes[1]} differ")
    # In bfloat16 a small error between two large numbers would be lost.
    with torch.autocast(student_BC.device.type, enabled=False):
        loss = KINDS[kind](precise(student_BC), precise(teacher_BC.detach()))
    return loss if loss.dim() == 1 else loss.mean(1)


def patch_loss(
    student_MC: Tensor, student_grids: list[Grid], teacher: list[Tensor], kind: str = "mse"
) -> Tensor:
    """Loss of each image's patches, the mean over its own tokens however many -> (B,).

    Args:
        student_MC, student_grids: the patches of B images, each row by row, and their (h, w).
        teacher: B maps (h', w', C) on the teacher's own grids, aligned as by `align`.
        kind: a key of `KINDS`; "mse" is also a mean over channels, "sum" AMoE's printed form.
    Raises: ValueError where numbers of images, tokens or channels do not fit.
    AMoE: L_patch; PHI-S Sec. 3 (MSE); AM-RADIO: L_feat (kind="am-radio")
    """
    student_MC, sizes = precise(student_MC), [h * w for h, w in student_grids]
    if len(teacher) != len(student_grids):
        raise ValueError(f"{len(student_grids)} student grids, but {len(teacher)} teacher maps")
    if sum(sizes) != len(student_MC):
        raise ValueError(f"grids {student_grids} do not add up to {len(student_MC)} tokens")
    if not teacher:
        return student_MC.sum(1)  # (0,), with a graph as any other batch
    # The grids of student and teacher differ, and so do those of the images: one by one.
    images = zip(student_MC.split(sizes), student_grids, teacher, strict=True)
    pairs = [align(x.unflatten(0, grid), y.detach().to(x)) for x, grid, y in images]
    student_MC = torch.cat([x.flatten(0, 1) for x, _ in pairs])
    token_M = vector_loss(student_MC, torch.cat([y.flatten(0, 1) for _, y in pairs]), kind)
    # The mean of each image's own tokens, so that a large image weighs no more than a small one.
    # By pieces: an index of images would have to be sent to the device first.
    pieces = token_M.split([x.shape[:2].numel() for x, _ in pairs])
    return torch.stack([token_P.mean() for token_P in pieces])


def align(student_hwC: Tensor, teacher_hwC: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps (h, w, C) of the same view to the grid (min h, min w).

    AM-RADIO: bilinear where grids differ; RADIOv2.5: the student down to the teacher
    """
    grids = student_hwC.shape[:2], teacher_hwC.shape[:2]
    # Down only: what one side does not resolve, no loss can compare.
    return shrink(student_hwC, grids[1]), shrink(teacher_hwC, grids[0])


def shrink(x_hwC: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Resize a map along each axis on which it is larger than the grid."""
    return resize_map(precise(x_hwC), (min(len(x_hwC), grid[0]), min(x_hwC.shape[1], grid[1])))


# ---- Relations in the batch


def arkd(student_BC: Tensor, teacher_BC: Tensor, normalizer: str = "own") -> Tensor:
    """Asymmetric relational distillation: pairs nearer than the teacher's median are only pulled
    together, all others only pushed apart; both may overshoot for free.

    Args:
        student_BC, teacher_BC: summaries of the global batch, that is of all micro-batches and
            ranks, in the same order; widths may differ. Fewer than two images have loss 0.
        normalizer: "own" divides each side by its own mean distance, with gradient, so that the
            student's scale is free; "teacher" both sides by the teacher's, which fixes it.
    Raises: ValueError for an unknown normalizer, or numbers of images that differ.
    AMoE: ARKD
    """
    student_Q, teacher_Q = relations(student_BC, teacher_BC, normalizer)
    # For the median we chose the lower of two middle values: torch's.
    is_near_Q = teacher_Q < teacher_Q.median()
    # What is left of a near pair's error is how much too far it is, of another's how much too near.
    error_Q = torch.where(is_near_Q, student_Q - teacher_Q, teacher_Q - student_Q).relu()
    return pair_mean(error_Q).to(precise(student_BC).dtype)


def rkd(student_BC: Tensor, teacher_BC: Tensor, normalizer: str = "own") -> Tensor:
    """Symmetric relational distillation, the baseline of `arkd`: every difference counts.

    Args, Raises: as `arkd`; dividing each side by its own mean is the original's way.
    RKD (Park et al. 2019); AMoE: the baseline of ARKD
    """
    student_Q, teacher_Q = relations(student_BC, teacher_BC, normalizer)
    return pair_mean(student_Q - teacher_Q).to(precise(student_BC).dtype)


def relations(student_BC: Tensor, teacher_BC: Tensor, normalizer: str) -> tuple[Tensor, Tensor]:
    """Distances over each side's own mean, through which the gradient flows, or the teacher's."""
    if normalizer not in ("teacher", "own"):
        raise ValueError(f"normalizer={normalizer!r} is neither 'teacher' nor 'own'")
    if len(student_BC) != len(teacher_BC):
        raise ValueError(f"{len(student_BC)} student summaries, but {len(teacher_BC)} of a teacher")
    with torch.autocast(student_BC.device.type, enabled=False):
        student_Q = pair_distances(student_BC)
        teacher_Q = pair_distances(teacher_BC.detach())
    # What AMoE divides by is not known to us: we chose each side's own mean, as in RKD.
    scale = teacher_Q.mean()
    own = student_Q.mean() if normalizer == "own" else scale  # not detached: RKD would explode
    # Where all rows of the teacher are equal there is no relation to teach: all becomes 0.
    own = torch.where((scale > 0) & (own > 0), own, math.inf)
    return student_Q / own, teacher_Q / torch.where(scale > 0, scale, math.inf)


def pair_mean(error_Q: Tensor) -> Tensor:
    # Beta, where smooth-L1 turns linear, is 1 (we chose), that is one mean distance. The mean over
    # pairs i < j is the printed one over ordered pairs: both orders are equal.
    loss = F.smooth_l1_loss(error_Q, torch.zeros_like(error_Q), reduction="sum")
    return loss / max(len(error_Q), 1)


# ---- PHI-S: the space of a teacher's targets


class Affine(NamedTuple):
    """y = R (x - mu) / s, with R orthogonal; mu and s are () or (C,); float64."""

    shift: Tensor
    scale: Tensor
    rotation_CC: Tensor


class Normalizer:
    """An affine map of a teacher's features, fitted to all seen; a subclass is one `fit`."""

    def __init__(self, channels: int):
        self.channels = channels
        # What all ranks know of, and what this one saw since; nothing so far.
        self.agreed = self.pending = Moments.of(torch.zeros(0, channels, dtype=torch.float64))
        self.map: Affine | None = None  # None until fitted to what is new

    def fit(self, seen: Moments) -> Affine:
        raise NotImplementedError

    def update(self, features_NC: Tensor) -> None:
        """Add features, without those of invalid positions; they count at once on this rank."""
        if features_NC.dim() != 2 or features_NC.shape[1] != self.channels:
            raise ValueError(f"features {list(features_NC.shape)} are not (N, {self.channels})")
        if not features_NC.isfinite().all():
            raise ValueError("a feature is not finite and would spoil the statistics for good")
        for rows_NC in features_NC.detach().split(8192):  # bounds the float64 copy
            self.pending = self.pending.merged(Moments.of(rows_NC.to(self.agreed.mean_C)))
        self.map = None

    def synchronize(self) -> None:
        """Give all ranks what each saw since the last call, and one map (a collective call)."""
        if dist.is_initialized():
            self.pending = self.pending.all_reduced()
        if self.pending.total > 0:  # the same on all ranks by now, so all broadcast or none
            self.agreed, self.map = self.statistics, None
            self.pending = Moments.of(self.agreed.scatter_CC[:0])  # of no rows
            # Rank 0's map: equal statistics need not give equal eigenvectors on unequal machines.
            for part in self.current() if dist.is_initialized() else ():
                dist.broadcast(part, 0)

    @property
    def statistics(self) -> Moments:
        return self.agreed.merged(self.pending)

    def current(self) -> Affine:
        """The map, fitted anew if need be; ValueError if nothing was seen."""
        if self.map is None:
            if self.statistics.total == 0:
                raise ValueError("no features seen yet; call update(features_NC) first")
            shift, scale, rotation_CC = self.fit(self.statistics)
            scale = torch.where(scale > 0, scale, 1.0)  # what never varies is only centred
            self.map = Affine(shift, scale, rotation_CC)
        return self.map  # kept: eigh is slow, and a refit may flip signs

    def normalize(self, x: Tensor) -> Tensor:
        """Teacher features (..., C) -> targets; float64 stays, all else becomes float32."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would blur the rotation
            x = precise(x)
            shift, scale, rotation_CC = moved(self.current(), x)
            return (x - shift) @ rotation_CC.T / scale

    def denormalize(self, y: Tensor) -> Tensor:
        """Inverse of `normalize`, for targets or predictions of them."""
        with torch.autocast(y.device.type, enabled=False):
            y = precise(y)
            shift, scale, rotation_CC = moved(self.current(), y)
            return (scale * y) @ rotation_CC + shift  # R is orthogonal: its transpose undoes it

    def fold_into(self, linear: nn.Linear) -> None:
        """Change a head's last layer in place so that its output is denormalised.

        Args:
            linear: D -> g * C: g groups of C rows, as in a head that upsamples by g = u^2.
        Raises: ValueError where there is no bias to hold the mean, or no multiple of C rows.
        PHI-S Sec. 3 (W = Theta W', b = Theta b' + mu)
        """
        if linear.bias is None:
            raise ValueError("a Linear without bias cannot hold the mean; build the head with one")
        if linear.out_features % self.channels:
            raise ValueError(f"{linear.out_features} rows are no multiple of C={self.channels}")
        map_outputs(linear, self.channels, self.denormalize)  # each of the g groups alike

    def unfold_from(self, linear: nn.Linear) -> None:
        """Inverse of `fold_into`: a layer that answers in teacher space becomes one to train."""
        map_outputs(linear, self.channels, self.normalize)

    def to(self, device: torch.device | str) -> Normalizer:
        """Move to where the features are (for NCCL: to this rank's GPU)."""
        self.agreed, self.pending = moved(self.agreed, device), moved(self.pending, device)
        self.map = self.map and moved(self.map, device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """All that this rank knows of, and the map, which need not refit alike elsewhere."""
        return self.statistics._asdict() | (self.map._asdict() if self.map else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; ValueError if it is of another number of channels."""
        if len(state["mean_C"]) != self.channels:
            raise ValueError(f"state of {len(state['mean_C'])} channels, not {self.channels}")
        device = self.agreed.mean_C.device
        self.agreed = Moments(*(state[key] for key in Moments._fields))
        self.pending = Moments.of(self.agreed.scatter_CC[:0])
        self.map = Affine(*(state[key] for key in Affine._fields)) if "scale" in state else None
        self.to(device)


def hadamard(n: int) -> Tensor:
    """Orthogonal (n, n) float64 matrix with all entries +-1/sqrt(n).

    Where there is none (n no multiple of 4) or none is found here (52, 92, ...), it warns and
    returns the orthogonal factor of a +-1 matrix drawn by the seed n, flat only roughly.
    PHI-S Sec. 3 (Hadamard matrices)
    """
    # The paper's are equal but for 1152, S(32) x P2(36) and here P1(1152); any does.
    signs = hadamard_signs(n)
    if signs is not None:
        return signs / math.sqrt(n)
    warnings.warn(f"no Hadamard matrix of size {n}: channels differ in variance", stacklevel=2)
    random = torch.randint(0, 2, (n, n), generator=torch.Generator().manual_seed(n)) * 2.0 - 1
    return torch.linalg.qr(random.double()).Q


class PhiS(Normalizer):
    """y = H U^T (x - mu) / phi: unit variance in every channel, one scale for all directions.

    U holds the covariance's eigenvectors, phi^2 is its mean eigenvalue, H a Hadamard matrix. An
    error in y is phi times as large in x whatever its direction.
    PHI-S Sec. 3
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.hadamard_CC = positive_diagonal(hadamard(channels))

    def fit(self, seen: Moments) -> Affine:
        covariance_CC = seen.scatter_CC / seen.total  # of the data seen: no n - 1
        eigenvalues_C, eigenvectors_CC = torch.linalg.eigh(covariance_CC)
        is_null_C = eigenvalues_C < 1e-10 * eigenvalues_C[-1]
        settle_null_space(eigenvectors_CC, is_null_C)
        # Only the mean eigenvalue enters: a covariance without full rank does no harm.
        phi = eigenvalues_C.clamp(min=0).mean().sqrt()
        # Signs are free: each eigenvector, a row of U^T in ascending order, and each row of H gets
        # a positive diagonal entry, so that a refit rarely flips one.
        basis_CC = positive_diagonal(eigenvectors_CC.T)
        # U^T alone would leave each channel an eigenvalue as variance; all of H's entries are
        # equally large, so that each row of H U^T mixes them to their mean.
        return Affine(seen.mean_C, phi, self.hadamard_CC.to(basis_CC) @ basis_CC)


class TargetSpace:
    """One teacher's features as the losses see them: shrunk to the student's grid, normalised.

    | part           | space of the loss        | where it gets there; what is folded, unfolded   |
    |----------------|--------------------------|-------------------------------------------------|
    | patches        | PHI-S                    | `__call__`, after `shrink`; head's last layer   |
    | summary        | PHI-S; the teacher's for | `__call__`; head's last layer                   |
    |                | cosine and angle losses  |                                                 |
    | pooled summary | PHI-S; the frozen pool   | train.py normalises the student's; the pool's   |
    |                | works in the teacher's   | keys and values hold the patches' inverse map   |
    | registers      | the teacher's            | train.py denormalises the student's: the head's |
    |                |                          | last layer makes them as it makes patches       |
    | ARKD distances | PHI-S                    | of the summaries above: one rotation and scale  |
    |                |                          | change no ratio of distances                    |
    | saved heads    | the teacher's            | `fold_into` a copy; `unfold_from` to train on   |

    Registers stay raw: one of DINOv3's has several modes, which no covariance describes (AMoE: the
    second; that all do is our choice: by R numbers per picture little can be estimated).
    PHI-S Sec. 3; AMoE: PHI-S for patches and summaries
    """

    def __init__(self, kind: str, dim: int, summary_dim: int | None, summary_loss: str = "mse"):
        self.parts: dict[str, Normalizer] = {"patches": NORMALIZERS[kind](dim)}
        self.dispersion: Dispersion | None = None
        if summary_dim is not None:
            # A direction has no place for a mean: RADIO compares summaries as they are.
            is_angle = summary_loss in ("cosine", "angle")
            self.parts["summary"] = (Plain if is_angle else NORMALIZERS[kind])(summary_dim)
            self.dispersion = Dispersion(summary_dim) if summary_loss == "angle" else None
        self.fitted: dict[str, Any] = dict(self.parts)  # all that has statistics, as it is saved
        if self.dispersion:
            self.fitted["angle"] = self.dispersion

    def update(self, target: Any, grids: list[Grid]) -> None:
        """Add a teacher's raw output for B pictures, whose grids in the student are given.

        Each token counts the same. Raises: ValueError if a feature is not finite.
        """
        if target.summary_BC is not None:
            self.parts["summary"].update(target.summary_BC)
            if self.dispersion:
                self.dispersion.update(target.summary_BC)
        if target.patches:
            # Of just what the loss sees: a map that is averaged down varies less, and a space that
            # was fitted to the whole map would give its teacher less than its share.
            maps = [shrink(y, grid) for y, grid in zip(target.patches, grids, strict=True)]
            self.parts["patches"].update(torch.cat([y.flatten(0, 1) for y in maps]))

    def __call__(self, target: Any, grids: list[Grid]) -> Any:
        """A teacher's raw output for B pictures -> the same in the space of the losses."""
        summary_BC, patches = target.summary_BC, []
        if summary_BC is not None:
            summary_BC = self.parts["summary"].normalize(summary_BC)
        if target.patches:  # shrunk first: both are linear, and fewer tokens are to be rotated
            maps = [shrink(y, grid) for y, grid in zip(target.patches, grids, strict=True)]
            rows_MC = self.parts["patches"].normalize(torch.cat([y.flatten(0, 1) for y in maps]))
            pieces = rows_MC.split([y.shape[0] * y.shape[1] for y in maps])
            patches = [x.view_as(y) for x, y in zip(pieces, maps, strict=True)]
        return replace(target, summary_BC=summary_BC, patches=patches)

    def fold_into(self, head: Any, is_new: bool = False) -> None:
        """Make a head of model.py answer in the teacher's space, in place.

        is_new: True for a head that was just made, whose pool is as the teacher has it; in training
            its keys and values hold the normalisation's inverse.
        """
        for part, layer in head.output_layers().items():
            self.parts[part].fold_into(layer)
        if head.spec.pool and not is_new:
            map_read(head.pool.qkv, self.parts["patches"].normalize)

    def unfold_from(self, head: Any) -> None:
        """The inverse: a head that answers in the teacher's space becomes one to train in this."""
        for part, layer in head.output_layers().items():
            self.parts[part].unfold_from(layer)
        if head.spec.pool:
            map_read(head.pool.qkv, self.parts["patches"].denormalize)

    def to(self, device: torch.device | str) -> TargetSpace:
        for part in self.fitted.values():
            part.to(device)
        return self

    def synchronize(self) -> None:
        """Sum the statistics over the ranks (a collective call)."""
        for part in self.fitted.values():
            part.synchronize()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        return {name: part.state_dict() for name, part in self.fitted.items()}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, part in self.fitted.items():
            part.load_state_dict(state[name])


# ---- Part II: the plumbing


def precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def resize_map(x_hwC: Tensor, grid: Grid) -> Tensor:
    """Resize a map to grid (h', w'): `F.interpolate(mode="bilinear", antialias=True)` by axes."""
    # Not by F.interpolate itself: torch 2.13 on CPU gets maps that are one column wide wrong.
    h, w, _ = x_hwC.shape
    if (h, w) == grid:
        return x_hwC
    rows = axis_weights(h, grid[0], x_hwC.dtype, x_hwC.device)
    columns = axis_weights(w, grid[1], x_hwC.dtype, x_hwC.device)
    with torch.autocast(x_hwC.device.type, enabled=False):
        return columns @ (rows @ x_hwC.flatten(1)).unflatten(1, (w, -1))


@functools.cache
def axis_weights(size: int, target: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(target, size): how an axis is resized, read off its unit vectors."""
    eye = torch.eye(size, dtype=torch.float64, device=device)[None, None]
    return F.interpolate(eye, (target, size), mode="bilinear", antialias=True)[0, 0].to(dtype)


def pair_distances(x_BC: Tensor) -> Tensor:
    """Euclidean distance of each pair i < j, float64, with gradient 0 where it is 0."""
    # By the Gram matrix, as B * B * C differences do not fit for batches of thousands; in float64,
    # as it subtracts nearly equal numbers. Centring changes no distance and saves digits.
    norm_B = x_BC.detach().double().square().sum(1)
    x_BC = x_BC.double() - x_BC.detach().double().mean(0)
    square_B, distances = x_BC.square().sum(1), []
    for start in range(0, max(len(x_BC), 1), 1024):  # a block of rows at a time: less memory
        rows, rest = slice(start, start + 1024), slice(start, None)
        # By indices: a mask of the triangle makes the host wait to learn how many pairs it holds.
        i_Q, j_Q = torch.triu_indices(len(x_BC[rows]), len(x_BC[rest]), 1, device=x_BC.device)
        square_BB = square_B[rows, None] + square_B[rest] - 2 * (x_BC[rows] @ x_BC[rest].T)
        square_Q = square_BB.flatten().index_select(0, i_Q * square_BB.shape[1] + j_Q)
        # Nearer than a network's float32 rounding, two are duplicates, and their direction is
        # noise: so are all summaries of a student whose blocks start as the identity.
        is_same_Q = square_Q <= 1e-10 * (norm_B[rows][i_Q] + norm_B[rest][j_Q])
        # The first fill keeps sqrt's infinite slope at 0 out of the graph.
        root_Q = square_Q.masked_fill_(is_same_Q, 1.0).sqrt_()
        distances.append(root_Q.masked_fill(is_same_Q, 0.0))
    return torch.cat(distances)


# ---- Statistics and linear maps


class Moments(NamedTuple):
    """Number, mean and scatter (centred sum of outer products) of features, float64."""

    total: Tensor
    mean_C: Tensor
    scatter_CC: Tensor

    @staticmethod
    def of(rows_NC: Tensor) -> Moments:
        mean_C = rows_NC.sum(0) / max(len(rows_NC), 1)
        centred_NC = rows_NC - mean_C
        return Moments(mean_C.new_tensor(len(rows_NC)), mean_C, centred_NC.T @ centred_NC)

    def merged(self, other: Moments) -> Moments:
        """Chan et al. 1983: M = Ma + Mb + d d^T na nb / n, with d the difference of the means."""
        total, delta_C = self.total + other.total, other.mean_C - self.mean_C
        between = self.total * other.total / total.clamp(min=1)
        mean_C = self.mean_C + delta_C * (other.total / total.clamp(min=1))
        scatter_CC = self.scatter_CC + other.scatter_CC + torch.outer(delta_C, delta_C) * between
        return Moments(total, mean_C, scatter_CC)

    def all_reduced(self) -> Moments:
        """Merged over ranks, with the same bits on all of them."""
        sums = torch.cat([self.total[None], self.mean_C * self.total])
        dist.all_reduce(sums)
        mean_C = sums[1:] / sums[0].clamp(min=1)
        delta_C = self.mean_C - mean_C
        scatter_CC = self.scatter_CC + self.total * torch.outer(delta_C, delta_C)
        dist.all_reduce(scatter_CC)
        return Moments(sums[0], mean_C, scatter_CC)


def moved(parts, where):
    """Moments or Affine on a device, or with the device and dtype of a tensor."""
    return type(parts)(*(part.to(where) for part in parts))


def positive_diagonal(rows_CC: Tensor) -> Tensor:
    return torch.where(rows_CC.diagonal() < 0, -1.0, 1.0)[:, None] * rows_CC


def settle_null_space(eigenvectors_CC: Tensor, is_null_C: Tensor) -> None:
    """Choose, in place, the basis of the directions without data."""
    # There eigh chooses by rounding, which differs from one process to two. Their span is well
    # defined: its basis is that of fixed vectors laid into it.
    if is_null_C.any():
        null_CN = eigenvectors_CC[:, is_null_C]
        fixed_CN = torch.randn(null_CN.shape, generator=torch.Generator().manual_seed(0))
        laid_CN = null_CN @ (null_CN.T @ fixed_CN.to(null_CN))
        eigenvectors_CC[:, is_null_C] = torch.linalg.qr(laid_CN).Q


@torch.no_grad()
def map_outputs(linear: nn.Linear, channels: int, affine: Callable[[Tensor], Tensor]) -> None:
    """Follow a Linear of g * C rows by an affine map of C channels, in place and in float64."""
    rows = rearrange(linear.weight.double(), "(g c) d -> (g d) c", c=channels)  # for one product
    bias = rearrange(linear.bias.double(), "(g c) -> g c", c=channels)
    rows = affine(rows) - affine(torch.zeros_like(rows[:1]))
    linear.weight.copy_(rearrange(rows, "(g d) c -> (g c) d", g=len(bias)))
    linear.bias.copy_(affine(bias).flatten())


@torch.no_grad()
def map_read(reader: nn.Linear, affine: Callable[[Tensor], Tensor]) -> None:
    """Put an affine map before the keys and values (the last rows) of a Linear C -> 3 C."""
    channels = reader.in_features
    weight, bias = reader.weight[channels:], reader.bias[channels:]
    eye_CC = torch.eye(channels).to(weight.device, torch.float64)
    shift_C = affine(torch.zeros_like(eye_CC[0]))
    bias.copy_(bias.double() + weight.double() @ shift_C)
    weight.copy_(weight.double() @ (affine(eye_CC) - shift_C).T)


# ---- Hadamard matrices


def hadamard_signs(n: int) -> Tensor | None:
    """+-1 with orthogonal rows: Sylvester, Paley, or a Kronecker product; None if none is found."""
    if n <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:n, :n]
    matrix = None if n & (n - 1) == 0 else paley(n)  # Sylvester's for powers of two
    for d in range(2, math.isqrt(n) + 1):
        if matrix is None and n % d == 0:
            left, right = hadamard_signs(d), hadamard_signs(n // d)
            matrix = None if left is None or right is None else torch.kron(left, right)
    return matrix


def paley(n: int) -> Tensor | None:
    """Paley I if n - 1 is a prime, II if n / 2 - 1 is one of the form 4 m + 1, else None."""
    is_first = n % 4 == 0 and is_prime(n - 1)
    if not is_first and not (n % 8 == 4 and is_prime(n // 2 - 1)):
        return None
    core = F.pad(jacobsthal(n - 1 if is_first else n // 2 - 1), (1, 0, 1, 0), value=1.0)
    core[0, 0] = 0
    eye = torch.eye(len(core), dtype=torch.float64)
    if is_first:
        core[1:, 0] = -1
        return core + eye
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


def jacobsthal(p: int) -> Tensor:
    """1 where a - b is a square modulo the odd prime p, -1 where not, 0 on the diagonal."""
    numbers = torch.arange(p)
    chi = -torch.ones(p, dtype=torch.float64)
    chi[numbers.square() % p] = 1.0
    chi[0] = 0.0
    return chi[(numbers[:, None] - numbers) % p]


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


# ---- What the papers compare with, or add


class GlobalStandardize(Normalizer):
    """One scalar mean and deviation for all channels. PHI-S: Global Standardization"""

    def fit(self, seen: Moments) -> Affine:
        within = seen.scatter_CC.diagonal().mean() / seen.total
        deviation = (within + seen.mean_C.var(correction=0)).sqrt()
        return Affine(seen.mean_C.mean(), deviation, torch.eye(self.channels).to(deviation))


class ChannelStandardize(Normalizer):
    """Each channel's own mean and deviation. PHI-S: Standardization"""

    def fit(self, seen: Moments) -> Affine:
        deviation_C = (seen.scatter_CC.diagonal() / seen.total).sqrt()
        return Affine(seen.mean_C, deviation_C, torch.eye(self.channels).to(deviation_C))


class Plain(Normalizer):
    """No normalisation: a teacher weighs as much as its features vary. PHI-S: MSE baseline"""

    def update(self, features_NC: Tensor) -> None:
        """There is nothing to learn."""

    def normalize(self, x: Tensor) -> Tensor:
        return precise(x)

    def denormalize(self, y: Tensor) -> Tensor:
        return precise(y)


NORMALIZERS: dict[str, type[Normalizer]] = {
    "phis": PhiS,
    "global": GlobalStandardize,
    "channel": ChannelStandardize,
    "none": Plain,
}


class AdaLoss:
    """Weight of each loss: 1 over the running mean of its value, so that all come out near 1.

    AM-RADIO: AdaLoss; PHI-S: AdaLoss baseline
    """

    def __init__(self, decay: float = 0.99):  # not printed; about the last hundred steps
        self.decay = decay
        self.running: dict[str, tuple[float, int]] = {}  # mean from 0 on, and steps

    def update(self, values: dict[str, float]) -> None:
        """Add a step's global values on the host, the same on all ranks."""
        for name, value in values.items():
            mean, steps = self.running.get(name, (0.0, 0))
            self.running[name] = self.decay * mean + (1 - self.decay) * float(value), steps + 1

    def weight(self, name: str) -> float:
        """1 before the first update, and for a loss that was always 0."""
        mean, steps = self.running.get(name, (0.0, 0))
        return (1 - self.decay**steps) / mean if mean else 1.0  # unbiased from the first step on

    def state_dict(self) -> dict:
        return {"running": dict(self.running)}

    def load_state_dict(self, state: dict) -> None:
        self.running = dict(state["running"])


def angle_loss(student_BC: Tensor, teacher_BC: Tensor, dispersion: float | Tensor) -> Tensor:
    """Squared angle between summaries of any length, over the teacher's own spread -> (B,).

    dispersion: `Dispersion.value` of the teacher, > 0, in square radians. A student that always
        answers the mean direction has loss 1 on average.
    C-RADIOv4 Eq. 3-7
    """
    return angle_between(precise(student_BC), teacher_BC.detach()).square() / dispersion


class Dispersion:
    """Mean squared angle of a teacher's summaries to their mean direction. C-RADIOv4 Eq. 3-7

    Each batch is measured against the mean of all so far, itself included (we chose: one pass).
    """

    def __init__(self, channels: int):
        # Count, sum of squared angles, sum of summaries: known to all ranks, and seen here since.
        self.sums = torch.zeros(2, 2 + channels, dtype=torch.float64)
        self.is_empty = True  # known without waiting for the device

    def to(self, device: torch.device | str) -> Dispersion:
        self.sums = self.sums.to(device)
        return self

    def update(self, teacher_BC: Tensor) -> None:
        y_BC = teacher_BC.detach().to(self.sums)
        self.is_empty = self.is_empty and not len(y_BC)
        self.sums[1, 0] += len(y_BC)
        self.sums[1, 2:] += y_BC.sum(0)
        self.sums[1, 1] += angle_between(y_BC, self.sums.sum(0)[None, 2:]).square().sum()

    def synchronize(self) -> None:  # a collective call
        if dist.is_initialized():
            dist.all_reduce(self.sums[1])
        self.load_state_dict(self.state_dict())

    @property
    def value(self) -> Tensor:
        count, squares = self.sums.sum(0)[:2]
        if self.is_empty:
            raise ValueError("no summaries yet; call update(teacher_BC) first")
        return squares / count

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.sums.sum(0)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums[0], self.sums[1] = state["sums"], 0.0
        self.is_empty = not state["sums"][0]


def angle_between(x: Tensor, y: Tensor) -> Tensor:
    # The clamp keeps arccos' slope finite at x = y, where the angle is then 0.0014 and not 0.
    return F.cosine_similarity(x, y.to(x), dim=-1).clamp(-1 + 1e-6, 1 - 1e-6).arccos()


def shift_loss(
    student_MC: Tensor,
    student_grids: list[Grid],
    student_origins: list[Grid],
    teacher: list[Tensor],
    teacher_origins: list[Grid],
    kind: str = "mse",
) -> Tensor:
    """`patch_loss` over the overlap of crops that were shifted independently -> (B,).

    A pattern fixed to the teacher's own positions moves over the image, so it can't be learnt.
    Origins are the (row, column) of each crop's first patch in the image. Shifts are whole patches
    of equal extent on both sides: nothing is interpolated.
    Raises: ValueError where the crops of an image do not overlap.
    C-RADIOv4 Eq. 1
    """
    kept, grids, maps, start = [student_MC[:0]], [], [], 0
    crops = zip(student_grids, student_origins, teacher, teacher_origins, strict=True)
    for image, ((h, w), (y, x), map_hwC, (ty, tx)) in enumerate(crops):
        top, left = max(y, ty), max(x, tx)
        bottom, right = min(y + h, ty + map_hwC.shape[0]), min(x + w, tx + map_hwC.shape[1])
        if bottom <= top or right <= left:
            raise ValueError(f"image {image}: crops at {(y, x)} and {(ty, tx)} do not overlap")
        student_hwC = student_MC[start : start + h * w].unflatten(0, (h, w))
        kept.append(student_hwC[top - y : bottom - y, left - x : right - x].flatten(0, 1))
        maps.append(map_hwC[top - ty : bottom - ty, left - tx : right - tx])
        grids.append((bottom - top, right - left))
        start += h * w
    return patch_loss(torch.cat(kept), grids, maps, kind)
