"""Every loss against a slow loop over its equation, and the properties that the papers rely on."""

import itertools
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import NoWaiting
from torch import nn

import losses

WIDTH = 8
PAPER_SIZES = (384, 768, 1024, 1152, 1280, 1536)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_pack(seed, images, low=1, high=7):
    """Student tokens and grids of a pack, and teacher maps on unrelated grids."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(low, high, (images, 4), generator=generator).tolist()
    grids = [(h, w) for h, w, _, _ in sides]
    student_MC = randn(sum(h * w for h, w in grids), WIDTH, seed=seed).requires_grad_()
    return student_MC, grids, [randn(h, w, WIDTH, seed=seed + i) for i, (_, _, h, w) in
                               enumerate(sides)]  # fmt: skip


def interpolate(map_hwC, grid):
    """One axis after the other, on two copies of the map side by side.

    torch 2.13 on CPU gets maps that are one column wide wrong: 0, 1, 2, 3 becomes .3, .3, .3.
    """
    x = torch.cat([map_hwC] * 2, 1).permute(2, 0, 1)[None]
    x = F.interpolate(x, (grid[0], x.shape[3]), mode="bilinear", antialias=True)
    x = x[..., : x.shape[3] // 2]
    x = torch.cat([x] * 2, 2)
    x = F.interpolate(x, (x.shape[2], grid[1]), mode="bilinear", antialias=True)
    return x[0, :, : grid[0]].permute(1, 2, 0)


def slow_difference(x, y, kind):
    """One pair of vectors, channel by channel."""
    x, y = x.tolist(), y.tolist()
    squares = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    cosine = 1 - dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    gaps = [abs(a - b) for a, b in zip(x, y, strict=True)]
    smooth = sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(x)
    return {"mse": squares / len(x), "sum": squares, "cosine": cosine,
            "am-radio": 0.9 * cosine + 0.1 * smooth}[kind]  # fmt: skip


# ------------------------------------------------------------------------------- feature losses


@pytest.mark.parametrize("kind", losses.KINDS)
def test_vector_loss_is_the_slow_loop(kind):
    x_BC, y_BC = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    expected = [slow_difference(x, y, kind) for x, y in zip(x_BC, y_BC, strict=True)]
    torch.testing.assert_close(losses.vector_loss(x_BC, y_BC, kind), x_BC.new_tensor(expected))


def test_registers_are_averaged_per_image():
    x_BRC, y_BRC = randn(3, 4, WIDTH), randn(3, 4, WIDTH, seed=1)
    expected = torch.stack([losses.vector_loss(x, y).mean() for x, y in zip(x_BRC, y_BRC)])  # noqa: B905
    torch.testing.assert_close(losses.vector_loss(x_BRC, y_BRC), expected)


@pytest.mark.parametrize("kind", losses.KINDS)
def test_feature_losses_are_zero_at_a_match_and_for_no_images(kind):
    x_BC = randn(5, WIDTH).requires_grad_()
    assert losses.vector_loss(x_BC, x_BC, kind).abs().max() < 1e-12
    empty = losses.patch_loss(x_BC[:0], [], [], kind)
    assert empty.shape == (0,)
    empty.sum().backward()  # connected, though nothing flows
    assert torch.equal(x_BC.grad, torch.zeros_like(x_BC))


def test_cosine_is_finite_for_a_zero_student():
    x_BC = torch.zeros(2, WIDTH, requires_grad=True)
    losses.vector_loss(x_BC, torch.ones(2, WIDTH), "am-radio").sum().backward()
    assert x_BC.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((7, 9), (4, 12)), ((4, 4), (9, 9)), ((9, 9), (4, 4)), ((1, 6), (5, 1)), ((3, 5), (3, 4))],
)
def test_align_shrinks_the_larger_as_interpolate_does(student, teacher):
    x, y = randn(*student, WIDTH), randn(*teacher, WIDTH + 1, seed=1)
    grid = (min(student[0], teacher[0]), min(student[1], teacher[1]))
    for ours, given in zip(losses.align(x, y), (x, y), strict=True):
        torch.testing.assert_close(ours, interpolate(given, grid))


def test_align_leaves_equal_grids_alone():
    x, y = randn(3, 4, WIDTH), randn(3, 4, WIDTH, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(losses.align(x, y), (x, y), strict=True))


@pytest.mark.parametrize("kind", losses.KINDS)
def test_patch_loss_is_the_slow_loop(kind):
    student_MC, grids, teacher = random_pack(seed=3, images=5)
    loss_B = losses.patch_loss(student_MC, grids, teacher, kind)
    pieces = student_MC.detach().split([h * w for h, w in grids])
    for loss, tokens, grid, target in zip(loss_B, pieces, grids, teacher, strict=True):
        common = (min(grid[0], target.shape[0]), min(grid[1], target.shape[1]))
        x = interpolate(tokens.view(*grid, WIDTH), common).flatten(0, 1)
        y = interpolate(target, common).flatten(0, 1)
        slow = [slow_difference(a, b, kind) for a, b in zip(x, y, strict=True)]
        assert math.isclose(loss.item(), sum(slow) / len(slow), rel_tol=1e-9, abs_tol=1e-12)


def test_patch_loss_gradient_reaches_the_student_only():
    student_MC, grids, teacher = random_pack(seed=4, images=3)
    teacher = [t.requires_grad_() for t in teacher]
    assert torch.autograd.gradcheck(lambda x: losses.patch_loss(x, grids, teacher), student_MC)
    losses.patch_loss(student_MC, grids, teacher)[1].backward()
    assert all(t.grad is None for t in teacher)
    touched = [g.abs().sum() > 0 for g in student_MC.grad.split([h * w for h, w in grids])]
    assert touched == [False, True, False]


TO_TEACHER = {  # losses of (student_BC, teacher_BC), each of which the teacher enters as a constant
    **{kind: lambda x, y, k=kind: losses.vector_loss(x, y, k) for kind in losses.KINDS},
    "patches": lambda x, y: losses.patch_loss(x, [(2, 3)], [y.view(2, 3, WIDTH)]),
    "shift": lambda x, y: losses.shift_loss(x, [(2, 3)], [(0, 0)], [y.view(2, 3, WIDTH)], [(1, 0)]),
    "angle": lambda x, y: losses.angle_loss(x, y, 0.5),
    "arkd": losses.arkd,
    "rkd": losses.rkd,
}


@pytest.mark.parametrize("loss", TO_TEACHER.values(), ids=TO_TEACHER)
def test_no_gradient_reaches_a_teacher(loss):
    student_BC, teacher_BC = randn(6, WIDTH).requires_grad_(), randn(6, WIDTH, seed=1)
    teacher_BC.requires_grad_()
    loss(student_BC, teacher_BC).sum().backward()
    assert teacher_BC.grad is None and student_BC.grad.abs().sum() > 0


def test_cosine_alone_and_with_a_tenth_of_smooth_l1_by_hand():
    """Right angles and errors of 3 and 4: both in smooth-L1's linear part, 2.5 and 3.5."""
    x_BC, y_BC = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert losses.vector_loss(x_BC, y_BC, "cosine").item() == pytest.approx(1)
    assert losses.vector_loss(x_BC, y_BC, "am-radio").item() == pytest.approx(0.9 + 0.1 * 3)


def test_printed_sum_is_the_mean_times_the_width():
    pack = random_pack(seed=5, images=3)
    torch.testing.assert_close(losses.patch_loss(*pack, "sum"), WIDTH * losses.patch_loss(*pack))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_for_half_inputs(dtype):
    x_BC = randn(4, WIDTH).to(dtype)
    teacher = [torch.zeros(1, 4, WIDTH, dtype=dtype)]
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.patch_loss(x_BC, [(1, 4)], teacher).dtype == torch.float32
        resized, _ = losses.align(x_BC.view(1, 4, WIDTH), teacher[0][:, :2])
        torch.testing.assert_close(resized, interpolate(x_BC.float().view(1, 4, WIDTH), (1, 2)))
        assert losses.vector_loss(x_BC, x_BC).dtype == torch.float32
        assert losses.arkd(x_BC, x_BC).dtype == torch.float32


def test_misfits_are_named():
    x_MC, teacher = randn(6, WIDTH), [randn(2, 3, WIDTH)]
    with pytest.raises(ValueError, match="kind='l3' is not one of mse, sum"):
        losses.patch_loss(x_MC, [(2, 3)], teacher, "l3")
    with pytest.raises(ValueError, match="2 student grids, but 1 teacher"):
        losses.patch_loss(x_MC, [(1, 3), (1, 3)], teacher)
    with pytest.raises(ValueError, match="do not add up to 6 tokens"):
        losses.patch_loss(x_MC, [(2, 2)], teacher)
    with pytest.raises(ValueError, match=r"student \[6, 8\] and teacher \[6, 7\]"):
        losses.patch_loss(x_MC, [(2, 3)], [randn(2, 3, WIDTH - 1)])
    with pytest.raises(ValueError, match="neither 'teacher' nor 'own'"):
        losses.arkd(x_MC, x_MC, normalizer="batch")
    with pytest.raises(ValueError, match="6 student summaries, but 5"):
        losses.rkd(x_MC, x_MC[:5])


# ---------------------------------------------------------------------------- means over images


def split_pack(student_MC, grids, teacher, sizes):
    tokens = student_MC.split([h * w for h, w in grids])
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        part = slice(start, start + size)
        yield torch.cat([tokens[0][:0], *tokens[part]]), grids[part], teacher[part]


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [3, 0, 7, 2], [6, 6], [11, 1]])
def test_loss_does_not_depend_on_packs_micro_batches_or_ranks(sizes):
    student_MC, grids, teacher = random_pack(seed=6, images=12)
    whole = losses.patch_loss(student_MC, grids, teacher)
    parts = [losses.patch_loss(*p) for p in split_pack(student_MC, grids, teacher, sizes)]
    by_image = sum(p.sum() / 12 for p in parts)
    torch.testing.assert_close(by_image, whole.mean(), rtol=1e-10, atol=0)
    grads = [torch.autograd.grad(v, student_MC)[0] for v in (by_image, whole.mean())]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_an_image_weighs_the_same_whatever_its_size():
    """A 1-token and a 100-token image with unit error have the same loss."""
    loss_B = losses.patch_loss(
        torch.ones(101, WIDTH), [(1, 1), (10, 10)], [torch.zeros(*g, WIDTH) for g in
                                                     ((1, 1), (10, 10))]
    )  # fmt: skip
    torch.testing.assert_close(loss_B, torch.ones(2))


# ------------------------------------------------------------------------- shift-equivariant loss


def test_shift_loss_without_shift_is_the_patch_loss():
    student_MC, grids, _ = random_pack(seed=7, images=4)
    teacher = [randn(*g, WIDTH, seed=i) for i, g in enumerate(grids)]
    origins = [(2, 1)] * 4
    shifted = losses.shift_loss(student_MC, grids, origins, teacher, origins)
    torch.testing.assert_close(shifted, losses.patch_loss(student_MC, grids, teacher))


def test_shift_loss_of_any_kind_is_that_of_the_overlap_by_hand():
    """Crops of 2 x 3 at (0, 0) and of 2 x 2 at (1, 1) share the row (1, 1), (1, 2)."""
    student_MC, map_hwC = randn(6, WIDTH), randn(2, 2, WIDTH, seed=1)
    pairs = [(student_MC[4], map_hwC[0, 0]), (student_MC[5], map_hwC[0, 1])]
    for kind in losses.KINDS:
        loss = losses.shift_loss(student_MC, [(2, 3)], [(0, 0)], [map_hwC], [(1, 1)], kind)
        slow = sum(slow_difference(x, y, kind) for x, y in pairs) / 2
        assert loss.tolist() == pytest.approx([slow])


@pytest.mark.parametrize("origin", [(0, 0), (3, 1), (-2, 2)])
def test_shift_loss_is_zero_for_features_that_move_with_the_image(origin):
    world = randn(12, 12, WIDTH)
    crop = lambda y, x, h, w: world[y + 2 : y + 2 + h, x : x + w]  # noqa: E731
    student = crop(1, 2, 4, 5)
    loss = losses.shift_loss(
        student.flatten(0, 1), [(4, 5)], [(1, 2)], [crop(*origin, 6, 4)], [origin]
    )
    assert loss == 0
    with pytest.raises(ValueError, match=r"image 0: crops at .* do not overlap"):
        losses.shift_loss(student.flatten(0, 1), [(4, 5)], [(9, 9)], [crop(0, 0, 3, 3)], [(0, 0)])


def test_a_teachers_fixed_pattern_cannot_be_learnt_when_crops_shift():
    """The best student for teacher = content + pattern: both if aligned, content alone if not."""
    side, shifts = 4, list(itertools.product(range(-3, 4), repeat=2))
    world, pattern = randn(10, 10, 1), randn(side, side, 1, seed=1)
    pattern -= pattern.mean()
    content = world[3:7, 3:7]

    def best_student(origins):
        student = torch.zeros(side * side, 1, dtype=torch.float64, requires_grad=True)
        total = 0.0  # weighted by its size, so that each position of an overlap counts the same
        for y, x in origins:
            target = world[3 + y : 7 + y, 3 + x : 7 + x] + pattern
            loss = losses.shift_loss(student, [(side, side)], [(3, 3)], [target], [(3 + y, 3 + x)])
            total = total + loss.sum() * (side - abs(y)) * (side - abs(x))
        # The sum of squares is quadratic and diagonal: one Newton step is the optimum.
        (grad,) = torch.autograd.grad(total, student, create_graph=True)
        (curvature,) = torch.autograd.grad(grad.sum(), student)
        best = (student - grad / curvature).detach().view(side, side, 1)
        return best

    torch.testing.assert_close(best_student([(0, 0)]), content + pattern)
    torch.testing.assert_close(best_student(shifts), content)


# ----------------------------------------------------------------------------------- angle loss


def slow_angle(x, y):
    cosine = float(x @ y / (x.norm() * y.norm()))
    return math.acos(min(max(cosine, -1 + 1e-6), 1 - 1e-6))


def test_angle_loss_is_the_slow_loop():
    x_BC, y_BC = randn(5, WIDTH), randn(5, WIDTH, seed=1)
    expected = [slow_angle(x, y) ** 2 / 0.694 for x, y in zip(x_BC, y_BC, strict=True)]
    torch.testing.assert_close(losses.angle_loss(x_BC, y_BC, 0.694), x_BC.new_tensor(expected))


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
def test_angle_loss_gradient_is_finite_at_and_opposite_to_the_target(factor):
    y_BC = randn(3, WIDTH, dtype=torch.float32)
    x_BC = (factor * y_BC).requires_grad_()
    losses.angle_loss(x_BC, y_BC, 1.0).sum().backward()
    assert x_BC.grad.isfinite().all()


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_dispersion_streams_and_balances_cones_of_any_width(spread):
    y_BC = spread * randn(4000, WIDTH) + torch.eye(WIDTH, dtype=torch.float64)[0]
    mean_C = y_BC.mean(0)
    exact = sum(slow_angle(y, mean_C) ** 2 for y in y_BC[:1000]) / 1000
    dispersion = losses.Dispersion(WIDTH)
    with pytest.raises(ValueError, match="no summaries yet"):
        _ = dispersion.value
    for batch in y_BC.split(100):
        dispersion.update(batch)
    assert math.isclose(dispersion.value, exact, rel_tol=0.1)
    before = dispersion.value
    dispersion.synchronize()
    dispersion.synchronize()
    torch.testing.assert_close(dispersion.value, before)
    other = losses.Dispersion(WIDTH)
    other.load_state_dict(dispersion.state_dict())
    assert other.value == dispersion.value
    constant = losses.angle_loss(mean_C.expand_as(y_BC), y_BC, dispersion.value)
    assert 0.9 < constant.mean() < 1.1


def test_dispersion_of_one_batch_is_exact():
    y_BC = randn(50, WIDTH) + 1
    dispersion = losses.Dispersion(WIDTH)
    dispersion.update(y_BC)
    exact = sum(slow_angle(y, y_BC.mean(0)) ** 2 for y in y_BC) / 50
    assert math.isclose(dispersion.value, exact, rel_tol=1e-9)


def test_dispersion_measures_each_batch_against_the_mean_of_all_so_far():
    y_BC, dispersion = randn(6, WIDTH) + 1, losses.Dispersion(WIDTH)
    squares = [slow_angle(y, y_BC[:2].mean(0)) ** 2 for y in y_BC[:2]]
    squares += [slow_angle(y, y_BC.mean(0)) ** 2 for y in y_BC[2:]]
    for rows_BC in (y_BC[:2], y_BC[2:]):
        dispersion.update(rows_BC)
    assert math.isclose(dispersion.value, sum(squares) / 6, rel_tol=1e-9)


def test_dispersion_counts_each_summary_once_and_forgets_at_a_restore():
    one, two = losses.Dispersion(WIDTH), losses.Dispersion(WIDTH)
    one.update(randn(5, WIDTH))
    before = {name: x.clone() for name, x in one.state_dict().items()}
    one.synchronize()  # what is known to all ranks by now is not new any more
    one.synchronize()
    two.update(randn(9, WIDTH, seed=1))
    two.load_state_dict(one.state_dict())
    for name, x in before.items():
        torch.testing.assert_close(one.state_dict()[name], x)
        torch.testing.assert_close(two.state_dict()[name], x)


# --------------------------------------------------------------------------------------- ARKD, RKD


def slow_relation(student_BC, teacher_BC, normalizer, asymmetric):
    """The printed double sum over ordered pairs, with autograd through the student and its mean."""
    images = range(len(student_BC))
    pairs = [(i, j) for i in images for j in images if i != j]
    far_s = {(i, j): (student_BC[i] - student_BC[j]).norm() for i, j in pairs}
    far_t = {(i, j): (teacher_BC[i] - teacher_BC[j]).norm().item() for i, j in pairs}
    mu = sum(far_t.values()) / len(pairs)
    mu_s = mu if normalizer == "teacher" else sum(far_s.values()) / len(pairs)
    ranked = sorted(far_t[p] / mu for p in pairs)
    median = ranked[(len(ranked) - 1) // 2]
    total = 0.0
    for p in pairs:
        s, t = far_s[p] / mu_s, far_t[p] / mu
        error = (s - t).abs()
        if asymmetric:
            error = (s - t).clamp(min=0) if t < median else (t - s).clamp(min=0)
        total = total + torch.where(error < 1, 0.5 * error**2, error - 0.5)
    return total / len(pairs)


@pytest.mark.parametrize("normalizer", ["teacher", "own"])
@pytest.mark.parametrize("name", ["arkd", "rkd"])
def test_relations_and_their_gradients_are_the_slow_loop(name, normalizer):
    student_BC, teacher_BC = randn(7, 5), 3 * randn(7, 4, seed=1)
    student_BC[0] *= 9  # some errors are above 1, in smooth-L1's linear part
    student_BC.requires_grad_()
    fast = getattr(losses, name)(student_BC, teacher_BC, normalizer)
    slow = slow_relation(student_BC, teacher_BC, normalizer, name == "arkd")
    torch.testing.assert_close(fast, slow)
    grads = [torch.autograd.grad(v, student_BC)[0] for v in (fast, slow)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["arkd", "rkd"])
def test_relations_are_zero_at_a_match_in_any_order(name):
    loss = getattr(losses, name)
    x_BC, y_BC = randn(9, WIDTH), randn(9, WIDTH, seed=1)
    turn_CC = torch.linalg.qr(randn(WIDTH, WIDTH, seed=2)).Q
    assert loss(y_BC @ turn_CC + 5, y_BC) < 1e-20  # distances alone count
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(x_BC[order], y_BC[order]), loss(x_BC, y_BC))
    torch.testing.assert_close(loss(7 * x_BC, y_BC, "own"), loss(x_BC, y_BC, "own"))
    torch.testing.assert_close(loss(x_BC, 7 * y_BC, "own"), loss(x_BC, y_BC, "own"))
    assert loss(2 * y_BC, y_BC, "teacher") > 0.01  # fixes the student's scale


def line(*positions):
    return torch.tensor(positions, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("student", "is_charged"),
    [
        ((0, 0.5, 13.5), False),  # near pair closer, far pairs farther
        ((0, 1.5, 13.0), True),  # near pair farther
        ((0, 0.5, 9.0), True),  # far pairs closer
    ],
)
def test_arkd_is_asymmetric_by_hand(student, is_charged):
    """Three points: distances 1, 11, 12, median 11, so only the first pair is near."""
    teacher_BC, student_BC = line(0, 1, 12), line(*student).requires_grad_()
    loss = losses.arkd(student_BC, teacher_BC, "teacher")
    (grad,) = torch.autograd.grad(loss, student_BC)
    assert (loss > 0) == is_charged
    assert bool((grad != 0).any()) == is_charged
    assert losses.rkd(student_BC, teacher_BC, "teacher") > 0


@pytest.mark.parametrize("normalizer", ["teacher", "own"])
@pytest.mark.parametrize("name", ["arkd", "rkd"])
@pytest.mark.parametrize("case", ["none", "one", "equal", "equal teacher", "equal student"])
def test_degenerate_batches_give_zeros_not_nan(name, normalizer, case):
    base_BC = randn(6, WIDTH, dtype=torch.float32) * 50
    same_BC = base_BC[:1].expand(6, -1)
    student_BC, teacher_BC = {
        "none": (base_BC[:0], base_BC[:0]),
        "one": (base_BC[:1], 2 * base_BC[:1]),
        "equal": (same_BC, same_BC + 1),
        "equal teacher": (base_BC, same_BC),
        "equal student": (same_BC, base_BC),
    }[case]
    student_BC = student_BC.clone().requires_grad_()
    loss = getattr(losses, name)(student_BC, teacher_BC, normalizer)
    loss.backward()
    assert loss.isfinite()
    assert torch.equal(student_BC.grad, torch.zeros_like(student_BC))
    if case != "equal student":
        assert loss == 0


def test_duplicates_among_others_keep_exact_gradients():
    teacher_BC = randn(6, WIDTH, dtype=torch.float32)
    teacher_BC[3] = teacher_BC[1]
    student_BC = (teacher_BC + 100).requires_grad_()  # the offset costs float32 its digits
    losses.arkd(student_BC, teacher_BC).backward()
    assert student_BC.grad.abs().max() < 1e-4
    student_BC = randn(6, WIDTH, seed=1)
    student_BC[5] = student_BC[0]
    student_BC.requires_grad_()
    fast = torch.autograd.grad(losses.arkd(student_BC, teacher_BC.double()), student_BC)[0]
    slow = torch.autograd.grad(
        slow_relation(student_BC, teacher_BC.double(), "own", True), student_BC
    )[0]
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("name", ["arkd", "rkd"])
def test_a_students_scale_is_free_over_its_own_mean(name, size):
    """RKD: scaling the student leaves the loss, so the gradient has no radial part; and by finite
    differences, with which no graph could be cut."""
    x_BC, teacher_BC = size * randn(6, WIDTH), randn(6, WIDTH, seed=1)
    loss = getattr(losses, name)
    student_BC = x_BC.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(student_BC, teacher_BC), student_BC)
    assert (grad * x_BC).sum().abs() < 1e-10
    step = 1e-5 * size
    for i, c in ((0, 0), (3, 5), (5, 7)):
        moved = x_BC.new_zeros(x_BC.shape)
        moved[i, c] = step
        rise = loss(x_BC + moved, teacher_BC) - loss(x_BC - moved, teacher_BC)
        assert math.isclose(rise / (2 * step), grad[i, c], rel_tol=1e-5)
    (grad,) = torch.autograd.grad(loss(student_BC, teacher_BC, "teacher"), student_BC)
    assert (grad * x_BC).sum().abs() > 1e-4 * size
    teacher_BC.requires_grad_()
    loss(student_BC, teacher_BC).backward()
    assert teacher_BC.grad is None


@pytest.mark.parametrize("name", ["arkd", "rkd"])
def test_summaries_equal_to_rounding_are_duplicates_and_others_are_not(name):
    """A student whose blocks start as the identity gives all images one summary, to rounding."""
    base_BC = torch.full((6, WIDTH), 100.0)
    noise_BC, teacher_BC = randn(6, WIDTH, dtype=torch.float32), randn(6, WIDTH, seed=1)
    for size, is_apart in ((1e-5, False), (0.05, True)):
        student_BC = (base_BC + size * noise_BC).requires_grad_()
        getattr(losses, name)(student_BC, teacher_BC, "teacher").backward()
        assert bool((student_BC.grad != 0).any()) == is_apart


@pytest.mark.parametrize(
    ("positions", "charged"),
    [((0, 4, 7, 9), {(0, 1)}), ((0, 2, 7, 13), {(1, 2)}), ((0, 2, 5, 11), set())],
)
def test_arkd_medians_by_hand(positions, charged):
    """Distances 2, 3, 4, 5, 7, 9; the lower middle, 4, is the median and no near pair itself.

    So the pairs 0-1 and 1-2 are near and only pulled, all others, 2-3 among them, only pushed.
    """
    teacher_BC, student_BC = line(0, 2, 5, 9), line(*positions).requires_grad_()
    far_t, far_s = (torch.cdist(x, x).detach() for x in (teacher_BC, student_BC))
    pairs = list(itertools.combinations(range(4), 2))
    near = {pair for pair in pairs if far_t[pair] < 4}
    assert near == {(0, 1), (1, 2)}
    over = {p: float(far_s[p] - far_t[p]) * (1 if p in near else -1) / 5 for p in pairs}
    assert {p for p in near if over[p] > 0} == charged
    expected = sum(0.5 * max(x, 0) ** 2 for x in over.values()) / 6  # the mean distance is 5
    assert losses.arkd(student_BC, teacher_BC, "teacher").item() == pytest.approx(expected)


def test_each_ranks_slice_of_the_gathered_gradient_is_the_whole_gradients():
    student_BC, teacher_BC = randn(8, WIDTH).requires_grad_(), randn(8, WIDTH, seed=1)
    (whole,) = torch.autograd.grad(losses.arkd(student_BC, teacher_BC), student_BC)
    for own in (slice(0, 3), slice(3, 8)):
        leaf = student_BC.detach()[own].requires_grad_()
        rows = [student_BC.detach()[: own.start], leaf, student_BC.detach()[own.stop :]]
        (mine,) = torch.autograd.grad(losses.arkd(torch.cat(rows), teacher_BC), leaf)
        torch.testing.assert_close(mine, whole[own], rtol=1e-10, atol=1e-14)


# -------------------------------------------------------------------------------------- Hadamard


SMALL_SIZES = (1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 76, 104, 144, 148)


@pytest.mark.parametrize("n", [*SMALL_SIZES, *PAPER_SIZES])
def test_hadamard_is_flat_and_orthogonal(n):
    """12, 20, 44 and 104 are Paley I; 28, 36, 76 and 148 Paley II with 13, 17, 37 and 73."""
    H = losses.hadamard(n)
    assert torch.equal(H.abs(), torch.full_like(H, 1 / math.sqrt(n)))
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=H.dtype), rtol=0, atol=1e-13)


@pytest.mark.parametrize("p", [3, 7, 13, 31])
def test_jacobsthal_matrix_of_a_field(p):
    Q = losses.jacobsthal(p)
    eye, ones = torch.eye(p).double(), torch.ones(p, p).double()
    assert torch.equal(Q @ Q.T, p * eye - ones)
    assert torch.equal(Q.T, Q if p % 4 == 1 else -Q)
    squares = {i * i % p for i in range(1, p)}
    expected = [0] + [1 if a in squares else -1 for a in range(1, p)]
    assert Q[:, 0].tolist() == expected


@pytest.mark.parametrize("n", [3, 6, 10, 52, 92])
def test_sizes_without_a_hadamard_matrix_fall_back_with_a_warning(n):
    with pytest.warns(UserWarning, match=f"no Hadamard matrix of size {n}"):
        H = losses.hadamard(n)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=H.dtype))
    with pytest.warns(UserWarning):
        assert torch.equal(losses.hadamard(n), H)


# ------------------------------------------------------------------------------------- normalizers


def anisotropic(rows, channels, seed=0, offset=3.0):
    """Features whose channels are mixed, of very different variance and far from zero."""
    scale_C = torch.logspace(-2, 2, channels, dtype=torch.float64)
    mix_CC = torch.linalg.qr(randn(channels, channels, seed=100)).Q
    return randn(rows, channels, seed=seed) * scale_C @ mix_CC + offset


def fitted(kind, rows_NC):
    norm = kind(rows_NC.shape[1])
    norm.update(rows_NC)
    return norm


NORMALIZERS = (
    losses.PhiS, losses.GlobalStandardize, losses.ChannelStandardize, losses.Plain
)  # fmt: skip


def assert_phi_s(rows_NC, expect_flat=True):
    norm = fitted(losses.PhiS, rows_NC)
    targets_NC = norm.normalize(rows_NC)
    variance_C = targets_NC.var(0, correction=0)
    flat_C = torch.ones_like(variance_C)
    if expect_flat:
        torch.testing.assert_close(variance_C, flat_C, rtol=0, atol=1e-6)
    assert math.isclose(variance_C.mean(), 1, rel_tol=1e-9)
    round_trip = norm.denormalize(targets_NC)
    assert (round_trip - rows_NC).abs().max() < 1e-10 * rows_NC.abs().max()
    error_NC = randn(5, rows_NC.shape[1], seed=9)
    moved = norm.denormalize(targets_NC[:5] + error_NC) - norm.denormalize(targets_NC[:5])
    phi = rows_NC.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(moved.norm(dim=1), phi * error_NC.norm(dim=1))


@pytest.mark.parametrize("channels", [4, 12, 36, 64, 384])
def test_phi_s_equalises_variances_inverts_and_is_isotropic(channels):
    assert_phi_s(anisotropic(3 * channels, channels))


@pytest.mark.filterwarnings("ignore:no Hadamard matrix")
@pytest.mark.parametrize("channels", [1, 2, 6, 92])
def test_phi_s_without_a_hadamard_matrix_is_flat_on_average(channels):
    assert_phi_s(anisotropic(400, channels), expect_flat=channels < 3)


WIDE = [pytest.param(n, marks=pytest.mark.slow) for n in PAPER_SIZES if n > 1024]


@pytest.mark.parametrize("channels", [768, 1024, *WIDE])
def test_phi_s_at_the_teachers_widths(channels):
    generator = torch.Generator().manual_seed(0)
    rows_NC = torch.randn(channels + 50, channels, generator=generator, dtype=torch.float64)
    assert_phi_s(rows_NC * torch.logspace(-2, 2, channels, dtype=torch.float64) + 3)


def test_phi_s_is_its_equation():
    rows_NC = anisotropic(200, WIDTH)
    norm = fitted(losses.PhiS, rows_NC)
    centred = rows_NC - rows_NC.mean(0)
    eigenvalues, U = torch.linalg.eigh(centred.T @ centred / len(rows_NC))
    U = U * torch.where(U.diagonal() < 0, -1.0, 1.0)
    H = losses.hadamard(WIDTH)
    H = torch.where(H.diagonal() < 0, -1.0, 1.0)[:, None] * H
    assert (U.diagonal() >= 0).all() and (H.diagonal() > 0).all()
    expected = centred @ (H @ U.T).T / eigenvalues.mean().sqrt()
    torch.testing.assert_close(norm.normalize(rows_NC), expected)


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_streaming_in_any_order_gives_the_batch_statistics(kind):
    rows_NC = anisotropic(500, 12, offset=1e4)  # a one-pass sum of squares would lose 8 digits
    whole = fitted(kind, rows_NC)
    streamed, reversed_ = kind(12), kind(12)
    for part in rows_NC.split([1, 99, 0, 400]):
        streamed.update(part)
    for part in (rows_NC[123:], rows_NC[:123]):
        reversed_.update(part)
    for norm in (streamed, reversed_):
        if kind is not losses.Plain:
            seen = norm.statistics
            centred = rows_NC - rows_NC.mean(0)
            torch.testing.assert_close(seen.scatter_CC, centred.T @ centred, rtol=1e-9, atol=1e-6)
            assert seen.total == 500
        expected, got = whole.normalize(rows_NC), norm.normalize(rows_NC)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_round_trip_and_folding(kind):
    rows_NC = anisotropic(200, 12)
    norm = fitted(kind, rows_NC)
    torch.testing.assert_close(norm.denormalize(norm.normalize(rows_NC)), rows_NC)
    for groups in (1, 4):
        linear = nn.Linear(5, groups * 12, dtype=torch.float64)
        x_ND = randn(7, 5)
        expected = norm.denormalize(linear(x_ND).view(7, groups, 12)).flatten(1).detach()
        weight = linear.weight
        norm.fold_into(linear)
        assert linear.weight is weight and weight.requires_grad
        torch.testing.assert_close(linear(x_ND), expected)
    with pytest.raises(ValueError, match="without bias cannot hold the mean"):
        norm.fold_into(nn.Linear(5, 12, bias=False))
    with pytest.raises(ValueError, match="30 rows are no multiple of C=12"):
        norm.fold_into(nn.Linear(5, 30))


@pytest.mark.parametrize("kind", losses.NORMALIZERS)
def test_a_target_space_folds_a_head_and_its_reader(kind):
    """Keys and values of what the head says are the same in training, saved, and in training."""
    maps = [anisotropic(35, 12, seed=i).view(5, 7, 12) for i in range(20)]
    target = Output(anisotropic(20, 12, seed=9), maps)
    space = losses.TargetSpace(kind, 12, 12)
    grids = [(3, 9), (5, 7)] * 10
    space.update(target, grids)
    small = [y if grid == (5, 7) else interpolate(y, (3, 7)) for y, grid in zip(maps, grids)]  # noqa: B905
    rows_NC = torch.cat([y.flatten(0, 1) for y in small])
    expected = fitted(losses.NORMALIZERS[kind], rows_NC)
    for y, ours in zip(small, space(target, grids).patches, strict=True):
        torch.testing.assert_close(ours, expected.normalize(y), rtol=1e-6, atol=1e-6)

    last, reader = nn.Linear(5, 12).double(), nn.Linear(12, 36).double()
    head = Head(last, reader)
    hidden_ND, given = randn(7, 5), [x.clone() for x in reader.parameters()]
    wanted = F.linear(expected.denormalize(last(hidden_ND)), *given).detach()[:, 12:]
    space.fold_into(head, is_new=True)
    torch.testing.assert_close(reader(last(hidden_ND))[:, 12:], wanted)
    space.unfold_from(head)
    torch.testing.assert_close(reader(last(hidden_ND))[:, 12:], wanted)
    assert all(torch.equal(x[:12], y[:12]) for x, y in zip(reader.parameters(), given, strict=True))
    space.fold_into(head)
    for x, y in zip(reader.parameters(), given, strict=True):
        torch.testing.assert_close(x, y)


@dataclass
class Output:
    summary_BC: torch.Tensor
    patches: list
    registers_BRC: None = None


class Head:
    """A head with a pool, as much of it as folding needs."""

    def __init__(self, last: nn.Linear, reader: nn.Linear):
        self.last, self.spec = last, SimpleNamespace(pool=True)
        self.pool = SimpleNamespace(qkv=reader)

    def output_layers(self):
        return {"patches": self.last}


def test_the_rivals_are_their_equations():
    rows_NC = anisotropic(300, WIDTH)
    scalar = (rows_NC - rows_NC.mean()) / rows_NC.std(correction=0)
    torch.testing.assert_close(fitted(losses.GlobalStandardize, rows_NC).normalize(rows_NC), scalar)
    channel = (rows_NC - rows_NC.mean(0)) / rows_NC.std(0, correction=0)
    torch.testing.assert_close(
        fitted(losses.ChannelStandardize, rows_NC).normalize(rows_NC), channel
    )
    assert torch.equal(losses.Plain(WIDTH).normalize(rows_NC), rows_NC)


def test_a_global_deviation_includes_how_the_channels_means_differ():
    """Channels 0, 2 and 10, 12: mean 6 and deviation sqrt(26); PHI-S sees the spread of 1 alone."""
    rows_NC = torch.tensor([[0.0, 10.0], [2.0, 12.0]], dtype=torch.float64)
    found = fitted(losses.GlobalStandardize, rows_NC).normalize(rows_NC)
    torch.testing.assert_close(found, (rows_NC - 6) / math.sqrt(26))
    variance_C = fitted(losses.PhiS, rows_NC).normalize(rows_NC).var(0, correction=0)
    assert float(variance_C.mean()) == pytest.approx(1)


def test_phi_is_the_root_of_the_mean_variance_by_hand():
    """Variances 1 and 49 along the axes: phi = sqrt(25) = 5, and not the mean deviation, 4."""
    rows_NC = torch.tensor([[1.0, 7], [1, -7], [-1, 7], [-1, -7]], dtype=torch.float64)
    norm = fitted(losses.PhiS, rows_NC)
    torch.testing.assert_close(
        norm.normalize(rows_NC).square().sum(1), torch.full((4,), 2.0).double()
    )
    error_NC = norm.denormalize(torch.eye(2).double()) - norm.denormalize(
        torch.zeros(2, 2).double()
    )
    torch.testing.assert_close(error_NC.norm(dim=1), torch.full((2,), 5.0).double())


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_unfolding_undoes_folding(kind):
    norm, linear = fitted(kind, anisotropic(200, 12)), nn.Linear(5, 24, dtype=torch.float64)
    before = [p.detach().clone() for p in linear.parameters()]
    norm.fold_into(linear)
    assert (kind is losses.Plain) == torch.equal(linear.weight, before[0])
    norm.unfold_from(linear)
    for parameter, value in zip(linear.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_large_batch_counts_to_its_last_row():
    """More rows than are taken in at a time; the last ones differ from all others."""
    rows_NC = torch.zeros(20_000, 2, dtype=torch.float64)
    rows_NC[-5000:] = torch.tensor([4.0, 8.0])
    norm = fitted(
        losses.ChannelStandardize, rows_NC
    )  # a quarter: mean x / 4, deviation x sqrt(3) / 4
    torch.testing.assert_close(norm.denormalize(torch.zeros(2).double()), rows_NC[-1] / 4)
    expected = torch.full((2,), math.sqrt(3), dtype=torch.float64)
    torch.testing.assert_close(norm.normalize(rows_NC[-1]), expected)


@pytest.mark.parametrize("kind", [losses.PhiS, losses.ChannelStandardize])
def test_what_never_varied_gives_no_large_targets_when_it_does(kind):
    """A channel that was constant so far, and then is not quite, must not drown the others."""
    rows_NC = randn(50, 4)
    rows_NC[:, 1] = 2
    norm = fitted(kind, rows_NC)
    assert norm.normalize(rows_NC + 0.1).abs().max() < 10
    alone = fitted(kind, rows_NC[:1])  # nothing has varied at all: centred, and no more
    assert float(alone.normalize(rows_NC[:1] + 0.1).norm()) == pytest.approx(0.2)


def test_phi_s_gives_teachers_of_any_scale_the_same_weight():
    rows_NC = anisotropic(300, WIDTH)
    answers = {}
    for kind in (losses.PhiS, losses.Plain):
        targets = [fitted(kind, s * rows_NC).normalize(s * rows_NC) for s in (0.0286, 5.4688)]
        small, large = (losses.vector_loss(t * 0, t - t.mean(0)).mean().item() for t in targets)
        answers[kind] = large / small
    assert math.isclose(answers[losses.PhiS], 1, rel_tol=1e-9)
    assert math.isclose(answers[losses.Plain], (5.4688 / 0.0286) ** 2, rel_tol=1e-9)


@pytest.mark.parametrize("kind", NORMALIZERS)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_rank_deficient_and_constant_features_stay_finite(kind, rows):
    rows_NC = anisotropic(rows, 12)
    rows_NC[:, 3] = 2.0
    norm = fitted(kind, rows_NC)
    torch.testing.assert_close(norm.denormalize(norm.normalize(rows_NC)), rows_NC)
    assert norm.normalize(rows_NC.float()).isfinite().all()
    if kind is losses.PhiS and rows > 1:
        variance_C = norm.normalize(rows_NC).var(0, correction=0)
        torch.testing.assert_close(variance_C, torch.ones_like(variance_C), rtol=0, atol=1e-6)


def test_normalize_keeps_float32_even_under_autocast_and_for_half_inputs():
    rows_NC = anisotropic(100, WIDTH)
    norm = fitted(losses.PhiS, rows_NC)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float16):
            x = rows_NC.to(dtype)
            assert norm.normalize(x).dtype == torch.float32
            error = norm.normalize(x).double() - norm.normalize(x.double())
            assert error.abs().max() < 1e-5
            error = norm.denormalize(norm.normalize(x)) - x
            assert error.abs().max() < 1e-3
    maps = rows_NC[:60].view(3, 4, 5, WIDTH)
    torch.testing.assert_close(norm.normalize(maps).view(60, WIDTH), norm.normalize(rows_NC[:60]))


def test_directions_without_data_do_not_turn_with_rounding():
    x_NC = torch.randn(20, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, halves = losses.PhiS(48), losses.PhiS(48)
    whole.update(x_NC)
    for part in x_NC.flip(0).split(7):
        halves.update(part)
    new_NC = torch.randn(5, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(whole.normalize(new_NC), halves.normalize(new_NC), rtol=0, atol=1e-6)


def test_usable_after_any_update_and_fitted_to_all_seen():
    a_NC, b_NC = anisotropic(50, WIDTH), anisotropic(50, WIDTH, seed=1, offset=-9)
    norm = fitted(losses.PhiS, a_NC)
    first = norm.normalize(a_NC)
    assert torch.equal(norm.normalize(a_NC), first)
    norm.update(a_NC[:0])  # no rows, no change
    assert torch.equal(norm.normalize(a_NC), first)
    norm.update(b_NC)
    both = norm.normalize(a_NC)
    assert not torch.equal(both, first)
    norm.synchronize()  # one process: only agrees with itself
    assert torch.equal(norm.normalize(a_NC), both)


def test_wrong_features_are_refused():
    norm = losses.PhiS(WIDTH)
    with pytest.raises(ValueError, match="no features seen yet"):
        norm.normalize(randn(2, WIDTH))
    with pytest.raises(ValueError, match=r"features \[2, 7\] are not \(N, 8\)"):
        norm.update(randn(2, 7))
    rows_NC = randn(2, WIDTH)
    rows_NC[1, 3] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        norm.update(rows_NC)
    assert norm.statistics.total == 0


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_state_is_plain_tensors_and_restores_the_very_map(kind, tmp_path):
    rows_NC = anisotropic(5, WIDTH)  # rank-deficient: a refit might find other eigenvectors
    norm = fitted(kind, rows_NC)
    norm.update(rows_NC + 1)
    before = norm.normalize(rows_NC)
    torch.save(norm.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if kind is not losses.Plain:
        other = kind(WIDTH)
        other.load_state_dict(state | {"rotation_CC": -state["rotation_CC"]})
        assert torch.equal(other.normalize(rows_NC), -before)  # the saved map, and no refit
    other = kind(WIDTH)
    other.load_state_dict(state)
    assert torch.equal(other.normalize(rows_NC), before)
    for n in (norm, other):
        n.update(rows_NC - 2)
        n.synchronize()
    assert torch.equal(other.normalize(rows_NC), norm.normalize(rows_NC))
    assert (kind is losses.Plain) == torch.equal(norm.normalize(rows_NC), before)
    with pytest.raises(ValueError, match="state of 8 channels, not 12"):
        kind(12).load_state_dict(state)
    fresh = kind(WIDTH)
    fresh.load_state_dict(kind(WIDTH).state_dict())
    fresh.update(rows_NC)
    torch.testing.assert_close(fresh.denormalize(fresh.normalize(rows_NC)), rows_NC)


def test_adaloss_divides_by_the_running_mean():
    ada = losses.AdaLoss(decay=0.9)
    assert ada.weight("sam") == 1
    values = [4.0, 2.0, 1.0]
    for v in values:
        ada.update({"sam": v, "clip": 100.0, "off": 0.0})
    weights = [0.9**k for k in (2, 1, 0)]
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert math.isclose(ada.weight("sam"), 1 / mean)
    assert math.isclose(ada.weight("clip"), 0.01)
    assert ada.weight("off") == 1
    other = losses.AdaLoss(decay=0.9)
    other.load_state_dict(ada.state_dict())
    assert other.weight("sam") == ada.weight("sam")


def test_adaloss_remembers_about_a_hundred_steps():
    ada = losses.AdaLoss()
    for value in (1.0, *[0.0] * 99):
        ada.update({"x": value})
    assert 1 / ada.weight("x") == pytest.approx(0.01 * 0.99**99 / (1 - 0.99**100))


# -------------------------------------------------------------------------------- two processes


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    norm, dispersion = losses.PhiS(12), losses.Dispersion(12)
    for chunk in range(2):  # twice: what is already shared must not be counted again
        rows_NC = anisotropic(90 + 60 * chunk, 12, seed=chunk)
        own = slice(0, 40) if rank == 0 else slice(40, None)
        norm.update(rows_NC[own])
        dispersion.update(rows_NC[own])
        if rank == 1:
            norm.update(rows_NC[:0])
        norm.normalize(rows_NC)  # local until shared
        norm.synchronize()
        dispersion.synchronize()
        norm.synchronize()
    idle = losses.PhiS(12)
    idle.synchronize()  # nothing seen anywhere is no error
    if rank == 0:
        idle.update(rows_NC)
    idle.synchronize()  # nor is a rank without pictures
    student_BC, teacher_BC = randn(9, WIDTH), randn(9, WIDTH, seed=1)
    own = slice(0, 4) if rank == 0 else slice(4, 9)
    padded = torch.zeros(5, WIDTH, dtype=torch.float64)
    padded[: own.stop - own.start] = student_BC[own]
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    leaf = torch.cat([parts[0][:4], parts[1]]).requires_grad_()
    (grad,) = torch.autograd.grad(losses.arkd(leaf, teacher_BC), leaf)
    share = losses.vector_loss(student_BC[own], teacher_BC[own]).sum() / 9
    dist.all_reduce(share)
    result = {"state": norm.state_dict(), "sums": dispersion.state_dict()["sums"],
              "idle": idle.normalize(rows_NC), "grad": grad[own], "mean": share}  # fmt: skip
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    mp.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
    for name in ranks[0]["state"]:
        assert torch.equal(ranks[0]["state"][name], ranks[1]["state"][name]), name
    assert torch.equal(ranks[0]["sums"], ranks[1]["sums"])
    assert torch.equal(ranks[0]["idle"], ranks[1]["idle"])

    rows_NC = torch.cat([anisotropic(90, 12), anisotropic(150, 12, seed=1)])
    alone, shared = fitted(losses.PhiS, rows_NC), losses.PhiS(12)
    shared.load_state_dict(ranks[0]["state"])
    assert shared.statistics.total == 240
    torch.testing.assert_close(shared.normalize(rows_NC), alone.normalize(rows_NC))
    idle = fitted(losses.PhiS, rows_NC[90:]).normalize(rows_NC[90:])
    torch.testing.assert_close(ranks[0]["idle"], idle)

    sums = ranks[0]["sums"]
    assert sums[0] == 240
    torch.testing.assert_close(sums[2:], rows_NC.sum(0))

    student_BC, teacher_BC = randn(9, WIDTH).requires_grad_(), randn(9, WIDTH, seed=1)
    (grad,) = torch.autograd.grad(losses.arkd(student_BC, teacher_BC), student_BC)
    torch.testing.assert_close(torch.cat([r["grad"] for r in ranks]), grad)
    mean = losses.vector_loss(student_BC, teacher_BC).mean().detach()
    torch.testing.assert_close(ranks[1]["mean"], mean)


@pytest.mark.parametrize("seed", range(30))
def test_random_grids_agree_with_interpolate_and_with_any_split(seed):
    student_MC, grids, teacher = random_pack(seed, images=8, low=1, high=20)
    loss_B = losses.patch_loss(student_MC, grids, teacher)
    alone = [losses.patch_loss(*p) for p in split_pack(student_MC, grids, teacher, [1] * 8)]
    torch.testing.assert_close(loss_B, torch.cat(alone), rtol=1e-10, atol=0)
    pieces = student_MC.split([h * w for h, w in grids])
    for loss, tokens, grid, target in zip(loss_B, pieces, grids, teacher, strict=True):
        common = (min(grid[0], target.shape[0]), min(grid[1], target.shape[1]))
        error = interpolate(tokens.view(*grid, WIDTH), common) - interpolate(target, common)
        torch.testing.assert_close(loss, error.square().mean())


def test_no_loss_makes_the_host_wait():
    """Not for a shape that values decide, nor for one: a step on a GPU would stand still."""
    student_MC, grids, teacher = random_pack(seed=8, images=6)
    student_BC, teacher_BC = randn(7, 12).requires_grad_(), randn(7, 12, seed=1)
    dispersion = losses.Dispersion(12)
    dispersion.update(teacher_BC)
    losses.patch_loss(student_MC, grids, teacher)  # makes the resize matrices
    with NoWaiting():
        total = losses.patch_loss(student_MC, grids, teacher).sum()
        total = total + losses.arkd(student_BC, teacher_BC) + losses.rkd(student_BC, teacher_BC)
        total = total + losses.vector_loss(student_BC, teacher_BC, "am-radio").sum()
        total = total + losses.angle_loss(student_BC, teacher_BC, dispersion.value).sum()
        grads = torch.autograd.grad(total, [student_MC, student_BC])
    assert all(grad.isfinite().all() for grad in grads)


def test_pairs_of_many_images_come_in_blocks():
    x_BC = randn(1500, 3, dtype=torch.float64)
    torch.testing.assert_close(losses.pair_distances(x_BC), torch.pdist(x_BC))
    for few in (0, 1):
        assert losses.pair_distances(x_BC[:few]).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives():
    student_MC, grids, teacher = random_pack(seed=8, images=6)
    on_gpu = losses.patch_loss(student_MC.cuda(), grids, [t.cuda() for t in teacher])
    torch.testing.assert_close(on_gpu.cpu(), losses.patch_loss(student_MC, grids, teacher))
    (grad,) = torch.autograd.grad(on_gpu.sum(), student_MC)
    assert grad.abs().sum() > 0
    rows_NC = anisotropic(100, 12)
    cpu, gpu = fitted(losses.PhiS, rows_NC), losses.PhiS(12).to("cuda")
    gpu.update(rows_NC.cuda())
    x, y = cpu.normalize(rows_NC), gpu.normalize(rows_NC.cuda()).cpu()
    torch.testing.assert_close(x, y)
    back = losses.PhiS(12)
    back.load_state_dict(gpu.to("cpu").state_dict())
    torch.testing.assert_close(back.normalize(rows_NC), x)
    student_BC, teacher_BC = randn(7, 12), randn(7, 12, seed=1)
    torch.testing.assert_close(
        losses.arkd(student_BC.cuda(), teacher_BC.cuda()).cpu(), losses.arkd(student_BC, teacher_BC)
    )
