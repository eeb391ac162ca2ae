"""What the student is asked to match: pure functions on tensors, and the targets' normalisation.

Feature losses give one value per image, which `image_mean` averages over the global batch (AMoE
Sec. 2.1); `arkd` compares distances between images (AMoE Sec. 2.3); `PhiS` balances teachers of
different scale (PHI-S Sec. 3); the rest is what the papers compare these with.

Legend: B images, M patches of the whole pack, N features, R registers, Q pairs i < j of images,
C teacher width, (h, w) grid of one image in patches. No gradient ever reaches teacher features.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]

# ------------------------------------------------------------------- feature losses, per image


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(x, y, dim=-1)


def _am_radio(x: Tensor, y: Tensor) -> Tensor:
    smooth_l1 = F.smooth_l1_loss(x, y, reduction="none")  # its beta is not printed; 1 as usual
    return 0.9 * _cosine(x, y) + 0.1 * smooth_l1.mean(-1)


# How far apart two vectors are: (..., C), (..., C) -> (...).
KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda x, y: F.mse_loss(x, y, reduction="none").mean(-1),  # PHI-S
    "sum": lambda x, y: F.mse_loss(x, y, reduction="none").sum(-1),  # AMoE as printed: C times it
    "cosine": _cosine,
    "am-radio": _am_radio,
}


def _difference(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} differ")
    with torch.autocast(student.device.type, enabled=False):
        return KINDS[kind](_precise(student), _precise(teacher.detach()))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def vector_loss(student_BC: Tensor, teacher_BC: Tensor, kind: str = "mse") -> Tensor:
    """Loss of each image's summary or registers -> (B,).

    Args:
        student_BC: (B, C), or (B, R, C) for registers, matched one to one and averaged.
        teacher_BC: the same shape.
        kind: a key of `KINDS`; "cosine" is the summary loss of AM-RADIO and RADIOv2.5.
    Raises:
        ValueError: unknown kind, or shapes that differ.
    AMoE Sec. 2.1 (L_CLS, L_reg); AM-RADIO (L_summary)
    """
    # AMoE's form of these two is not known to us; we take that of the patches.
    loss = _difference(student_BC, teacher_BC, kind)
    return loss if loss.dim() == 1 else loss.mean(1)


@functools.cache
def _axis_taps(size: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the non-zeros of the matrix that resizes one axis."""
    eye = torch.eye(size, dtype=torch.float64)[None, None]
    matrix = F.interpolate(eye, (target, size), mode="bilinear", antialias=True)[0, 0]
    row, col = matrix.nonzero(as_tuple=True)
    return row, col, matrix[row, col]


def _resample(x_MC: Tensor, grids: list[Grid], targets: list[Grid]) -> Tensor:
    """Resize every image of a pack to its target grid, bilinear with antialiasing.

    Resizing is linear, so a pack takes one sparse product however many grids it mixes; an image's
    block of the matrix is the Kronecker product of its two axes.
    """
    if grids == targets:
        return x_MC
    blocks, row, col = [], 0, 0
    for (h, w), (new_h, new_w) in zip(grids, targets, strict=True):
        row_y, col_y, value_y = _axis_taps(h, new_h)
        row_x, col_x, value_x = _axis_taps(w, new_w)
        rows = row + row_y[:, None] * new_w + row_x
        cols = col + col_y[:, None] * w + col_x
        blocks.append(torch.stack([rows, cols, torch.outer(value_y, value_x)]).flatten(1))
        row, col = row + new_h * new_w, col + h * w
    rows, cols, values = torch.cat(blocks, 1).to(x_MC.device)  # float64 holds the indices exactly
    index = torch.stack([rows, cols]).long()
    matrix = torch.sparse_coo_tensor(index, values.to(x_MC), (row, col), check_invariants=False)
    return torch.sparse.mm(matrix, x_MC)


def _smaller(a: list[Grid], b: list[Grid]) -> list[Grid]:
    return [(min(h, i), min(w, j)) for (h, w), (i, j) in zip(a, b, strict=True)]


def align(student_hwC: Tensor, teacher_hwC: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps of the same view to the grid (min h, min w).

    Args:
        student_hwC, teacher_hwC: (h, w, C); grids and widths may differ. Along each axis only the
            larger map is resized, as by `F.interpolate(mode="bilinear", antialias=True)`.
    AM-RADIO (bilinear where grids differ); RADIOv2.5 (the student down to the teacher)
    """
    maps = [_precise(student_hwC), _precise(teacher_hwC)]
    grids: list[Grid] = [(x.shape[0], x.shape[1]) for x in maps]
    grid = _smaller(grids[:1], grids[1:])
    flat = [_resample(x.flatten(0, 1), [g], grid) for x, g in zip(maps, grids, strict=True)]
    return flat[0].unflatten(0, grid[0]), flat[1].unflatten(0, grid[0])


def patch_loss(
    student_MC: Tensor,
    student_grids: list[Grid],
    teacher: list[Tensor],
    kind: str = "mse",
    valid: list[Tensor] | None = None,
) -> Tensor:
    """Loss of each image's patches, the mean over its own tokens however many -> (B,).

    Args:
        student_MC: the images' patches one image after the other, each row by row.
        student_grids: (h, w) of each of the B images.
        teacher: B maps (h', w', C) on the teacher's own grids, aligned as by `align`.
        kind: a key of `KINDS`; "mse" is also a mean over channels, "sum" AMoE's printed form.
        valid: B boolean maps (h', w'), True where the teacher saw the image. A position counts if
            all it is resized from is valid; an image without any has loss 0.
    Raises:
        ValueError: numbers of images, tokens or channels that do not fit.
    AMoE Sec. 2.1 (L_patch); PHI-S Sec. 3 (MSE); AM-RADIO (L_feat) for kind="am-radio"
    """
    teacher_grids: list[Grid] = [(t.shape[0], t.shape[1]) for t in teacher]
    student_grids = [(h, w) for h, w in student_grids]
    if len(teacher) != len(student_grids):
        raise ValueError(f"{len(student_grids)} student grids, but {len(teacher)} teacher maps")
    if sum(h * w for h, w in student_grids) != len(student_MC):
        raise ValueError(f"grids {student_grids} do not add up to {len(student_MC)} tokens")
    student_MC = _precise(student_MC)
    grids = _smaller(student_grids, teacher_grids)
    with torch.no_grad():
        teacher_MC = _resample(_pack(teacher, student_MC), teacher_grids, grids)
    token_M = _difference(_resample(student_MC, student_grids, grids), teacher_MC, kind)
    lengths_B = torch.tensor([h * w for h, w in grids], dtype=torch.int64)
    image_M = torch.repeat_interleave(torch.arange(len(grids)), lengths_B).to(token_M.device)
    weight_M = torch.ones_like(token_M)
    if valid is not None:
        covered_M1 = _resample(_pack(valid, student_MC), teacher_grids, grids)
        weight_M = (covered_M1[:, 0] > 1 - 1e-4).to(token_M)
    zeros_B = token_M.new_zeros(len(grids))
    total_B = zeros_B.index_add(0, image_M, token_M * weight_M)
    return total_B / zeros_B.index_add(0, image_M, weight_M).clamp(min=1)


def _pack(maps: list[Tensor], like_MC: Tensor) -> Tensor:
    """Maps (h, w, C) or (h, w) -> (M, C) or (M, 1), with the device and dtype of `like_MC`."""
    if not maps:
        return like_MC.new_zeros(0, like_MC.shape[1])
    return torch.cat([m.to(like_MC).reshape(m.shape[0] * m.shape[1], -1) for m in maps])


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

    Args:
        student_MC, student_grids, teacher, kind: as in `patch_loss`.
        student_origins, teacher_origins: (row, column) of each crop's first patch in the image.
            Shifts are whole patches of equal extent on both sides: nothing is interpolated.
    Raises:
        ValueError: the crops of an image do not overlap.
    C-RADIOv4 Eq. 1
    """
    kept, grids, maps, start = [], [], [], 0
    crops = zip(student_grids, student_origins, teacher, teacher_origins, strict=True)
    for image, ((h, w), (y, x), map_hwC, (ty, tx)) in enumerate(crops):
        top, left = max(y, ty), max(x, tx)
        bottom, right = min(y + h, ty + map_hwC.shape[0]), min(x + w, tx + map_hwC.shape[1])
        if bottom <= top or right <= left:
            raise ValueError(f"image {image}: crops at {(y, x)} and {(ty, tx)} do not overlap")
        index_hw = start + torch.arange(h * w).view(h, w)
        kept.append(index_hw[top - y : bottom - y, left - x : right - x].flatten())
        maps.append(map_hwC[top - ty : bottom - ty, left - tx : right - tx])
        grids.append((bottom - top, right - left))
        start += h * w
    overlap_MC = student_MC[torch.cat(kept).to(student_MC.device)] if kept else student_MC
    return patch_loss(overlap_MC, grids, maps, kind)


def image_mean(losses_B: Tensor, count: int | Tensor) -> Tensor:
    """Share of the mean over images; the shares of all micro-batches and ranks add up to it.

    Args:
        losses_B: losses of the images at hand.
        count: images of the global batch (of their partition); 0 gives 0.
    AMoE Sec. 2.1 (L_global)
    """
    return losses_B.sum() / torch.as_tensor(count).clamp(min=1)


def token_mean(losses_B: Tensor, tokens_B: Tensor, count: int | Tensor) -> Tensor:
    """The ablation of `image_mean`: an image weighs as much as it has tokens.

    Args:
        losses_B: per-image means over `tokens_B` tokens.
        count: tokens of the global batch; 0 gives 0.
    AMoE Sec. 3 (what the per-image mean replaces)
    """
    return image_mean(losses_B * tokens_B, count)


# ------------------------------------------------------------------------ balanced angle loss


def angle_loss(student_BC: Tensor, teacher_BC: Tensor, dispersion: float | Tensor) -> Tensor:
    """Squared angle between summaries, over how widely the teacher's own spread -> (B,).

    Args:
        student_BC, teacher_BC: of any length; only directions count.
        dispersion: `Dispersion.value` of the teacher, > 0, in square radians. A student that
            always answers the mean direction has loss 1 on average.
    C-RADIOv4 Eq. 3-7 (L_angle)
    """
    return _angle(_precise(student_BC), teacher_BC.detach()).square() / dispersion


def _angle(x: Tensor, y: Tensor) -> Tensor:
    # The clamp keeps arccos' slope finite at x = y, where the angle is then 0.0014 and not 0.
    return F.cosine_similarity(x, y.to(x), dim=-1).clamp(-1 + 1e-6, 1 - 1e-6).arccos()


class Dispersion:
    """Mean squared angle of a teacher's summaries to their mean direction, streamed.

    Each batch is measured against the mean of all up to and including itself (we chose: one pass);
    the first, measured against a rough mean, weigh ever less.
    C-RADIOv4 Eq. 3-7 (Disp)
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        # count, sum of squared angles, sum of summaries: agreed by all ranks; here since then
        self.agreed = torch.zeros(2 + channels, dtype=torch.float64, device=device)
        self.pending = torch.zeros_like(self.agreed)

    def update(self, teacher_BC: Tensor) -> None:
        """Add a batch of summaries (B, C)."""
        y_BC = teacher_BC.detach().to(self.pending)
        self.pending[0] += len(y_BC)
        self.pending[2:] += y_BC.sum(0)
        mean_C = (self.agreed + self.pending)[2:]
        self.pending[1] += _angle(y_BC, mean_C[None]).square().sum()

    def synchronize(self) -> None:
        """Give all ranks what each saw since the last call (a collective call)."""
        if dist.is_initialized():
            dist.all_reduce(self.pending)
        self.agreed, self.pending = self.agreed + self.pending, torch.zeros_like(self.pending)

    @property
    def value(self) -> Tensor:
        """Square radians, a scalar; ValueError before any update."""
        count, squares = (self.agreed + self.pending)[:2]
        if count == 0:
            raise ValueError("no summaries yet; call update(teacher_BC) first")
        return squares / count

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self.agreed + self.pending}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.agreed, self.pending = state["sums"].to(self.agreed), torch.zeros_like(self.pending)


# ----------------------------------------------------------------------- relations in the batch


def _pair_distances(x_BC: Tensor) -> Tensor:
    """Euclidean distance of each pair i < j, float64, with gradient 0 where it is 0.

    By the Gram matrix, as B * B * C differences do not fit for batches of thousands; in float64,
    as it subtracts nearly equal numbers. Centring changes no distance and saves digits.
    """
    norm_B = x_BC.detach().double().square().sum(1)
    x_BC = x_BC.double() - x_BC.detach().double().mean(0)
    square_B = x_BC.square().sum(1)
    is_pair_BB = torch.ones(len(x_BC), len(x_BC), dtype=torch.bool, device=x_BC.device).triu(1)
    size_Q = (square_B[:, None] + square_B)[is_pair_BB]
    square_Q = size_Q - 2 * (x_BC @ x_BC.T)[is_pair_BB]
    # Nearer than a network's float32 rounding, the two are duplicates, and their direction is noise:
    # so are all summaries of a student whose blocks start as the identity.
    is_apart_Q = square_Q > 1e-10 * (norm_B[:, None] + norm_B)[is_pair_BB]
    # The inner `where` keeps sqrt's infinite slope at 0 out of the graph.
    return torch.where(is_apart_Q, torch.where(is_apart_Q, square_Q, 1.0).sqrt(), 0.0)


def _relations(student_BC: Tensor, teacher_BC: Tensor, normalizer: str) -> tuple[Tensor, Tensor]:
    """Both sides' distances over the teacher's mean, or each side's own; means are constants."""
    if normalizer not in ("teacher", "own"):
        raise ValueError(f"normalizer={normalizer!r} is neither 'teacher' nor 'own'")
    if len(student_BC) != len(teacher_BC):
        raise ValueError(f"{len(student_BC)} student summaries, but {len(teacher_BC)} of a teacher")
    with torch.autocast(student_BC.device.type, enabled=False):
        student_Q = _pair_distances(student_BC)
        teacher_Q = _pair_distances(teacher_BC.detach())
    if len(student_Q) == 0:
        return student_Q, teacher_Q
    scale = teacher_Q.mean()
    own = student_Q.detach().mean() if normalizer == "own" else scale
    # Where all rows of the teacher are equal there is no relation to teach: all becomes 0.
    own = torch.where((scale > 0) & (own > 0), own, math.inf)
    return student_Q / own, teacher_Q / torch.where(scale > 0, scale, math.inf)


def _pair_mean(error_Q: Tensor, beta: float, student_BC: Tensor) -> Tensor:
    # The mean over pairs i < j is the printed one over ordered pairs: both orders are equal.
    loss_Q = F.smooth_l1_loss(error_Q, torch.zeros_like(error_Q), beta=beta, reduction="none")
    loss = loss_Q.sum() / max(len(error_Q), 1)
    return loss.to(_precise(student_BC).dtype)


def arkd(
    student_BC: Tensor, teacher_BC: Tensor, normalizer: str = "teacher", beta: float = 1.0
) -> Tensor:
    """Asymmetric relational distillation: near pairs are only pulled, far pairs only pushed.

    A pair nearer than the teacher's median errs only if the student has it farther apart than the
    teacher; any other pair only if nearer. Both may overshoot for free.

    Args:
        student_BC: summaries of the global batch: of all micro-batches and ranks.
        teacher_BC: (B, C') in the same order; its scale matters only relative to the student's.
        normalizer: "teacher" divides both sides by the teacher's mean distance, so that the loss
            also fixes the student's scale; "own" each side by its own mean.
        beta: where smooth-L1 turns linear, in normalised distance, > 0.
    Returns:
        Scalar; 0 for fewer than two images.
    Raises:
        ValueError: unknown normalizer, or numbers of images that differ.
    AMoE Sec. 2.3 (ARKD)
    """
    # We chose: the teacher's mean on both sides, beta = 1, for m the lower of two middle values.
    student_Q, teacher_Q = _relations(student_BC, teacher_BC, normalizer)
    is_near_Q = teacher_Q < (teacher_Q.median() if len(teacher_Q) else 0)
    error_Q = torch.where(is_near_Q, student_Q - teacher_Q, teacher_Q - student_Q).relu()
    return _pair_mean(error_Q, beta, student_BC)


def rkd(
    student_BC: Tensor, teacher_BC: Tensor, normalizer: str = "own", beta: float = 1.0
) -> Tensor:
    """Symmetric relational distillation, the baseline of `arkd`: every difference counts.

    Args, Returns, Raises: as `arkd`; dividing each side by its own mean is the original's way.
    RKD (Park et al. 2019, distance-wise); AMoE Sec. 2.3 (baseline)
    """
    student_Q, teacher_Q = _relations(student_BC, teacher_BC, normalizer)
    return _pair_mean(student_Q - teacher_Q, beta, student_BC)


# ------------------------------------------------------------------------- Hadamard matrices


def _prime_power(n: int) -> tuple[int, int] | None:
    """(p, k) with p prime and p**k == n, or None."""
    if n < 2:
        return None
    p = next((d for d in range(2, math.isqrt(n) + 1) if n % d == 0), n)
    k = round(math.log(n, p))
    return (p, k) if p**k == n else None


def _jacobsthal(p: int, k: int) -> Tensor:
    """chi(a - b) over GF(p**k), p odd: 1 where a - b is a square, -1 where not, 0 on the diagonal.

    Elements are polynomials over Z_p, numbered by their coefficients as base-p digits. Modulo a
    primitive polynomial the powers of x are all elements but 0; the even powers are the squares.
    """
    one = (1, *[0] * (k - 1))
    for tail in itertools.product(range(1, p), *[range(p)] * (k - 1)):  # x**k == tail
        powers = [one]
        while len(powers) < p**k:
            *low, top = powers[-1]
            power = tuple((a + top * b) % p for a, b in zip((0, *low), tail, strict=True))
            if power == one:
                break
            powers.append(power)
        if len(powers) == p**k - 1:
            break
    place_k = p ** torch.arange(k)
    chi = torch.zeros(p**k, dtype=torch.float64)
    numbers = (torch.tensor(powers) * place_k).sum(1)
    chi[numbers[::2]], chi[numbers[1::2]] = 1.0, -1.0
    digits = torch.arange(p**k)[:, None] // place_k % p
    return chi[((digits[:, None] - digits) % p * place_k).sum(-1)]


def _paley(n: int) -> Tensor | None:
    """Paley I if n - 1 is a prime power, II if n / 2 - 1 is one of the form 4 m + 1, else None."""
    first, second = _prime_power(n - 1), _prime_power(n // 2 - 1)
    if n % 4 != 0 or not (first or (second and n // 2 % 4 == 2)):
        return None
    core = F.pad(_jacobsthal(*(first or second)), (1, 0, 1, 0), value=1.0)  # type: ignore[misc]
    core[0, 0] = 0
    eye = torch.eye(len(core), dtype=torch.float64)
    if first:
        core[1:, 0] = -1
        return core + eye
    plus, minus = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(eye, minus)


def _signs(n: int) -> Tensor | None:
    """+-1 with orthogonal rows: Sylvester, Paley, or a Kronecker product; None if none is known."""
    if n <= 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:n, :n]
    is_power_of_two = n & (n - 1) == 0
    matrix = None if is_power_of_two else _paley(n)
    for d in range(2, math.isqrt(n) + 1):
        if matrix is None and n % d == 0:
            left, right = _signs(d), _signs(n // d)
            matrix = None if left is None or right is None else torch.kron(left, right)
    return matrix


def hadamard(n: int) -> Tensor:
    """Orthogonal (n, n) float64 matrix with all entries +-1/sqrt(n).

    768 = S(2) x P1(384), 1280 = P1(1280) and 1408 = S(32) x P1(44) are the paper's; for 1152 it is
    P1(1152) and not S(32) x P2(36): any of them equalises the variances.

    Warns:
        UserWarning: there is none (n no multiple of 4) or none is known here (92, 116, ...). Then
            it is the orthogonal factor of a +-1 matrix drawn by the seed n, flat only roughly.
    PHI-S Sec. 3 (Hadamard matrices)
    """
    signs = _signs(n)
    if signs is not None:
        return signs / math.sqrt(n)
    warnings.warn(f"no Hadamard matrix of size {n}: channels differ in variance", stacklevel=2)
    random = torch.randint(0, 2, (n, n), generator=torch.Generator().manual_seed(n)) * 2.0 - 1
    return torch.linalg.qr(random.double()).Q


# ---------------------------------------------------------- normalisation of teachers' features


class Moments:
    """Count, mean and scatter (centred sum of outer products) of a stream of features, float64.

    Chan et al. 1983: M = Ma + Mb + d d^T na nb / n, with d the difference of the means
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean_C = torch.zeros(channels, dtype=torch.float64, device=device)
        self.scatter_CC = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, other: Moments) -> Moments:
        if other.count:
            total = self.count + other.count
            delta_C = other.mean_C - self.mean_C
            between_CC = torch.outer(delta_C, delta_C) * (self.count * other.count / total)
            self.scatter_CC = self.scatter_CC + other.scatter_CC + between_CC
            self.mean_C = self.mean_C + delta_C * (other.count / total)
            self.count = total
        return self

    @staticmethod
    def of(rows_NC: Tensor) -> Moments:
        part = Moments(0)
        part.count, part.mean_C = len(rows_NC), rows_NC.mean(0)
        centred_NC = rows_NC - part.mean_C
        part.scatter_CC = centred_NC.T @ centred_NC
        return part

    def all_reduce(self) -> None:
        """Merge over ranks, with the same bits on all of them."""
        sums = torch.cat([self.mean_C.new_tensor([self.count]), self.mean_C * self.count])
        dist.all_reduce(sums)
        mean_C = sums[1:] / sums[0].clamp(min=1)
        scatter_CC = self.scatter_CC + self.count * torch.outer(*[self.mean_C - mean_C] * 2)
        dist.all_reduce(scatter_CC)
        self.count, self.mean_C, self.scatter_CC = round(sums[0].item()), mean_C, scatter_CC


class Affine(NamedTuple):
    """y = R (x - mu) / s with R orthogonal, and back; mu and s are () or (C,)."""

    shift: Tensor
    scale: Tensor
    rotation_CC: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) @ self.rotation_CC.T / self.scale

    def turn_back(self, y: Tensor) -> Tensor:
        """The inverse but for the shift: R^T (s y)."""
        return (self.scale * y) @ self.rotation_CC

    def to(self, *args) -> Affine:
        return Affine(*(part.to(*args) for part in self))


class Normalizer:
    """An affine map of a teacher's features that is fitted to their statistics.

    `update` counts at once, on this rank; `synchronize` tells all ranks. A subclass is one `fit`.

    Args:
        channels: C.
        refresh_every: updates before the map is fitted anew when next asked for. PHI-S fits by an
            eigendecomposition, O(C^3): a second for 1280 channels.
    """

    def __init__(self, channels: int, refresh_every: int = 1):
        self.channels, self.refresh_every = channels, refresh_every
        self.agreed, self.pending = Moments(channels), Moments(channels)
        self.updates_since_fit = 0
        self.map: Affine | None = None  # float64

    def fit(self, statistics: Moments) -> Affine:
        raise NotImplementedError

    @property
    def statistics(self) -> Moments:
        """All that this rank knows of."""
        known = Moments(self.channels, self.agreed.mean_C.device)
        return known.add(self.agreed).add(self.pending)

    def update(self, features_NC: Tensor) -> None:
        """Add features of any dtype to the statistics; leave invalid positions out.

        Raises:
            ValueError: not (N, C), or a value that is not finite.
        """
        if features_NC.dim() != 2 or features_NC.shape[1] != self.channels:
            raise ValueError(f"features {list(features_NC.shape)} are not (N, {self.channels})")
        if not features_NC.isfinite().all():
            raise ValueError("a feature is not finite and would spoil the statistics for good")
        if len(features_NC):
            for rows in features_NC.detach().split(8192):  # bounds the float64 copy
                self.pending.add(Moments.of(rows.to(self.agreed.mean_C)))
            self.updates_since_fit += 1

    def merge(self, other: Normalizer) -> None:
        """Add all that another normalizer saw, as if it had been seen here."""
        self.pending.add(other.statistics)
        self.updates_since_fit = self.refresh_every

    def synchronize(self) -> None:
        """Give all ranks what each saw since the last call, and one map (a collective call).

        The map is rank 0's: equal statistics need not give equal eigenvectors on unequal machines.
        """
        if dist.is_initialized():
            self.pending.all_reduce()
        if self.pending.count:  # the same on all ranks by now, so all broadcast or none
            self.agreed.add(self.pending)
            self.pending = Moments(self.channels, self.agreed.mean_C.device)
            self.updates_since_fit = self.refresh_every
            if dist.is_initialized():
                for part in self.current():
                    dist.broadcast(part, 0)

    def current(self) -> Affine:
        """The float64 map, fitted anew if enough was seen; ValueError if nothing was."""
        if self.map is None or self.updates_since_fit >= self.refresh_every:
            statistics = self.statistics
            if statistics.count == 0:
                raise ValueError("no features seen yet; call update(features_NC) first")
            self.map, self.updates_since_fit = self.fit(statistics), 0
        return self.map

    def normalize(self, x: Tensor) -> Tensor:
        """Teacher features (..., C) -> targets; float64 stays, all else becomes float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = _precise(x)
            return self.current().to(x.dtype).forward(x)

    def denormalize(self, y: Tensor) -> Tensor:
        """Inverse of `normalize`, for targets or predictions of them."""
        with torch.autocast(y.device.type, enabled=False):
            y = _precise(y)
            affine = self.current().to(y.dtype)
            return affine.turn_back(y) + affine.shift

    def fold_into(self, linear: nn.Linear) -> None:
        """Change a head's last layer in place so that its output is denormalised.

        Args:
            linear: D -> g * C, where each of the g groups of C rows is one feature vector, as in a
                head that upsamples by g = u^2.
        Raises:
            ValueError: no bias to hold the mean, or a width that is no multiple of C.
        PHI-S Sec. 3 (W = Theta W', b = Theta b' + mu)
        """
        if linear.bias is None:
            raise ValueError("a Linear without bias cannot hold the mean; build the head with one")
        if linear.out_features % self.channels:
            raise ValueError(f"{linear.out_features} rows are no multiple of C={self.channels}")
        affine = self.current().to(linear.weight.device)
        with torch.no_grad():
            weight = rearrange(linear.weight.double(), "(g c) d -> d g c", c=self.channels)
            linear.weight.copy_(rearrange(affine.turn_back(weight), "d g c -> (g c) d"))
            bias = rearrange(linear.bias.double(), "(g c) -> g c", c=self.channels)
            linear.bias.copy_((affine.turn_back(bias) + affine.shift).flatten())

    def to(self, device: torch.device | str) -> Normalizer:
        """Move statistics and map to where the features are (for NCCL: to this rank's GPU)."""
        for moments in (self.agreed, self.pending):
            moments.mean_C = moments.mean_C.to(device)
            moments.scatter_CC = moments.scatter_CC.to(device)
        self.map = self.map and self.map.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors: all that this rank knows of, and the map, which need not refit alike."""
        seen = self.statistics
        counts = torch.tensor([seen.count, self.updates_since_fit])
        state = {"counts": counts, "mean": seen.mean_C, "scatter": seen.scatter_CC}
        return state | (self.map._asdict() if self.map else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; ValueError if it is of another number of channels."""
        if len(state["mean"]) != self.channels:
            raise ValueError(f"state of {len(state['mean'])} channels, not {self.channels}")
        device = self.agreed.mean_C.device
        self.agreed, self.pending = Moments(self.channels), Moments(self.channels)
        self.agreed.count, self.updates_since_fit = state["counts"].tolist()
        self.agreed.mean_C, self.agreed.scatter_CC = state["mean"], state["scatter"]
        self.map = Affine(*(state[k] for k in Affine._fields)) if "scale" in state else None
        self.to(device)


def _positive_diagonal(rows_CC: Tensor) -> Tensor:
    return torch.where(rows_CC.diagonal() < 0, -1.0, 1.0)[:, None] * rows_CC


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)  # what never varies is only centred


class PhiS(Normalizer):
    """y = H U^T (x - mu) / phi: unit variance in every channel, one scale for all directions.

    U holds the covariance's eigenvectors, phi^2 is its mean eigenvalue, H a Hadamard matrix. An
    error in y is phi times as large in x whatever its direction. As only the mean eigenvalue
    enters, a covariance without full rank does no harm.
    PHI-S Sec. 3
    """

    def __init__(self, channels: int, refresh_every: int = 1):
        super().__init__(channels, refresh_every)
        self.hadamard_CC = _positive_diagonal(hadamard(channels))

    def fit(self, statistics: Moments) -> Affine:
        covariance_CC = statistics.scatter_CC / statistics.count  # of the data seen: no n - 1
        eigenvalues_C, eigenvectors_CC = torch.linalg.eigh(covariance_CC)
        phi = _positive(eigenvalues_C.clamp(min=0).mean().sqrt())
        # Signs are free: each eigenvector, a row of U^T in ascending order, and each row of H gets
        # a positive diagonal entry, so that a refit rarely flips one.
        basis_CC = _positive_diagonal(eigenvectors_CC.T)
        return Affine(statistics.mean_C, phi, self.hadamard_CC.to(basis_CC) @ basis_CC)


class GlobalStandardize(Normalizer):
    """One scalar mean and one scalar deviation for all channels.

    PHI-S ablation (Global Std)
    """

    def fit(self, statistics: Moments) -> Affine:
        within = statistics.scatter_CC.diagonal().mean() / statistics.count
        deviation = (within + statistics.mean_C.var(correction=0)).sqrt()
        eye_CC = torch.eye(self.channels).to(deviation)
        return Affine(statistics.mean_C.mean(), _positive(deviation), eye_CC)


class ChannelStandardize(Normalizer):
    """Each channel's own mean and deviation, so that an error's weight depends on its direction.

    PHI-S ablation (Standardise)
    """

    def fit(self, statistics: Moments) -> Affine:
        variance_C = statistics.scatter_CC.diagonal() / statistics.count
        eye_CC = torch.eye(self.channels).to(variance_C)
        return Affine(statistics.mean_C, _positive(variance_C.sqrt()), eye_CC)


class Plain(Normalizer):
    """No normalisation: a teacher weighs as much as its features vary.

    PHI-S ablation (MSE)
    """

    def update(self, features_NC: Tensor) -> None:
        """There is nothing to learn."""

    def current(self) -> Affine:
        eye_CC = torch.eye(self.channels).to(self.agreed.mean_C)
        return Affine(eye_CC.new_zeros(()), eye_CC.new_ones(()), eye_CC)


class AdaLoss:
    """Weight of each loss: 1 over the running mean of its value, so that all come out near 1.

    The alternative to PHI-S that balances losses, not targets; it favours the summaries.
    AM-RADIO and PHI-S ablation (AdaLoss)
    """

    def __init__(self, decay: float = 0.99):  # not printed; about the last hundred steps
        self.decay = decay
        self.means: dict[str, float] = {}
        self.steps: dict[str, int] = {}

    def update(self, values: dict[str, float]) -> None:
        """Add a step's global values on the host, the same on all ranks."""
        for name, value in values.items():
            old = self.means.get(name, 0.0)
            self.means[name] = self.decay * old + (1 - self.decay) * float(value)
            self.steps[name] = self.steps.get(name, 0) + 1

    def weight(self, name: str) -> float:
        """1 before the first update, and for a loss that was always 0."""
        mean, steps = self.means.get(name, 0.0), self.steps.get(name, 0)
        return (1 - self.decay**steps) / mean if mean else 1.0  # unbiased from the first step on

    def state_dict(self) -> dict:
        return {"means": dict(self.means), "steps": dict(self.steps)}

    def load_state_dict(self, state: dict) -> None:
        self.means, self.steps = dict(state["means"]), dict(state["steps"])
