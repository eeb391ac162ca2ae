"""Draw the figures of docs/ by the code itself: `python tests/figures.py [name ..]`, a minute.

`experts` reads docs/student.pt and fetches its teachers; the others draw what functions say.
"""

import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval import extract, fidelity, token_labels
from losses import PhiS, arkd
from model import Student, golden_frequencies, load_student
from packing import Sample, Source, fit_size, open_source, pack
from teachers import load_teacher, parse_teacher

plt.switch_backend("Agg")  # no window
DOCS = Path(__file__).parents[1] / "docs"
PATCH, PREFIX, BUDGET = 16, 5, 1200


def save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(DOCS / f"{name}.png", dpi=110)
    plt.close(figure)


def packing() -> None:
    """The packs of a step: a bar each, a block per picture; what is white is left free."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.normal(5.0, 0.5, (200, 2))).clip(32, 400)
    sizes = [fit_size(height, width, PATCH, 256**2) for height, width in sides]
    lengths = [h * w // PATCH**2 + PREFIX for h, w in sizes]
    looks = {"in order": 1, "look-ahead of 64": 64}
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharex=True)
    for axis, (name, lookahead) in zip(axes, looks.items(), strict=True):
        packs = pack(lengths, BUDGET, lookahead)[:8]
        for row, members in enumerate(packs):
            left = 0
            for i in members:
                colour = plt.cm.viridis(lengths[i] / max(lengths))
                axis.barh(row, lengths[i], left=left, color=colour, edgecolor="white")
                left += lengths[i]
        fill = np.mean([sum(lengths[i] for i in members) for members in packs[:-1]]) / BUDGET
        axis.set(title=f"{name}: {fill:.0%} full", xlabel="tokens", xlim=(0, BUDGET), ylabel="pack")
        axis.invert_yaxis()
    save(figure, "packing")


def golden() -> None:
    """Where golden RoPE's frequencies point, against the two axes of axial RoPE."""
    freqs_HJ2 = golden_frequencies(n_heads=6, n_freqs=16, low=1.0, high=50.0)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharex=True, sharey=True)
    for head, freqs_J2 in enumerate(freqs_HJ2):
        y, x = (
            freqs_J2 / freqs_J2.norm(dim=1, keepdim=True) * freqs_J2.norm(dim=1)[:, None].log()
        ).T
        axes[0].scatter(x, y, s=12, color=plt.cm.tab10(head))
    radius = torch.linspace(0, np.log(50), 16)
    axes[1].scatter(radius, 0 * radius, s=12, color="grey")
    axes[1].scatter(0 * radius, radius, s=12, color="grey")
    for axis, name in zip(axes, ("golden: a colour a head", "axial"), strict=True):
        axis.set(title=name, xlabel="log frequency, x", ylabel="log frequency, y", aspect="equal")
    save(figure, "golden")


def pair(distance: Tensor) -> Tensor:
    """Three summaries: two at a distance, and a far one that fixes the mean."""
    return torch.stack(
        [torch.stack([distance, 0 * distance]), torch.zeros(2), torch.tensor([0.0, 2.0])]
    )


def asymmetry() -> None:
    """ARKD of a pair that the teacher has near, and of one that it has far, over the student's."""
    at = torch.linspace(0.05, 3, 120)
    figure, axis = plt.subplots(figsize=(4.6, 3))
    for name, theirs in (("near in the teacher", 0.6), ("far in the teacher", 2.6)):
        teacher = pair(torch.tensor(theirs))
        curve = [float(arkd(pair(d), teacher, "teacher")) for d in at]
        axis.plot(at, curve, label=name)
        axis.axvline(theirs, color=axis.lines[-1].get_color(), linestyle=":")
    axis.set(xlabel="the student's distance (dotted: the teacher's)", ylabel="ARKD")
    axis.legend()
    save(figure, "arkd")


def phi_s() -> None:
    """Two channels before and after PHI-S: equal variances, one scale for all directions."""
    torch.manual_seed(0)
    rows_NC = torch.randn(600, 2) @ torch.tensor([[3.0, 1.2], [0.0, 0.5]]) + torch.tensor(
        [2.0, 1.0]
    )
    space = PhiS(2)
    space.update(rows_NC)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.4), sharex=True, sharey=True)
    for axis, rows, name in zip(
        axes, (rows_NC, space.normalize(rows_NC)), ("before", "after"), strict=True
    ):
        axis.scatter(*rows.T, s=4, alpha=0.5)
        first, second = rows.var(0, correction=0).tolist()
        axis.set(title=f"{name}: variances {first:.2f}, {second:.2f}", aspect="equal")
    save(figure, "phis")


KINDS = ("CLS", "registers", "ground", "drawing")
TEACHERS = {"vit-s": "builtin:vit-s", "mobilenet": "builtin:mobilenet"}


def kinds_of(sample: Sample, grid: tuple[int, int], registers: int) -> Tensor:
    """The kind of each token of a drawing, an index of KINDS: CLS, registers, patches by mask."""
    mask_HW = torch.from_numpy(np.array(sample.mask) > 0)
    _, is_drawing_P = token_labels([torch.empty(*grid, 0)], [mask_HW])
    return torch.cat([torch.tensor([0] + [1] * registers), 2 + is_drawing_P])


def served(student: Student, source: Source) -> Tensor:
    """The share of each kind of token that each expert is given: (kinds, layers, experts)."""
    config, seen = student.config, {}
    counts = torch.zeros(len(KINDS), config.n_layers, config.experts)
    with ExitStack() as hooks:
        for i, block in enumerate(student.blocks):
            look = partial(lambda i, moe, given: seen.update({i: moe.route(given[0])[1]}), i)
            hooks.enter_context(block.ffn.register_forward_pre_hook(look))
        for sample in (source.load(i) for i in range(len(source))):
            [features] = student.encode([sample.image])  # alone in its pack: prefix, then patches
            grid = tuple(features.patches["trunk"].shape[:2])
            kind_N = kinds_of(sample, grid, config.prefix - 1)
            for i, chosen_NK in seen.items():
                one_hot_NE = torch.nn.functional.one_hot(chosen_NK, config.experts).sum(1).float()
                counts[:, i].index_add_(0, kind_N, one_hot_NE)
    return counts / counts.sum(-1, keepdim=True)


def needed(student: Student, known: Any, test: Source) -> tuple[list[str], Tensor]:
    """The variance explained that each head loses without each expert: (heads, layers, experts)."""
    teachers = {name: load_teacher(parse_teacher(text)) for name, text in TEACHERS.items()}
    bank, found = (extract({"teacher": teachers}, x) for x in (known, test))

    def explained() -> dict[str, float]:
        said = extract({"student": student}, test)
        found.summary.update(said.summary)
        found.patches.update(said.patches)
        rows = fidelity(bank, found)
        return {x: row["value"] for x, row in rows.items() if x.startswith("student/")}

    whole, lost = explained(), []
    for block in student.blocks:
        for w2_DF in block.ffn.w2_EDF.data:
            kept = w2_DF.clone()
            w2_DF.zero_()
            lost.append([whole[name] - value for name, value in explained().items()])
            w2_DF.copy_(kept)
    names = [name.removeprefix("student/") for name in whole]
    return names, torch.tensor(lost).T.unflatten(1, (len(student.blocks), -1))


def experts() -> None:
    """Whom the experts of docs/student.pt serve: kinds of tokens, and teachers' heads."""
    student, test = load_student(DOCS / "student.pt"), open_source("openmoji:test:64")
    names, lost = needed(student, open_source("openmoji:train:64"), test)
    rows = [
        (*pair, "share of its tokens") for pair in zip(KINDS, served(student, test), strict=True)
    ]
    rows += [(*pair, "variance explained lost") for pair in zip(names, lost, strict=True)]
    layers, count = student.config.n_layers, student.config.experts
    edges = (0.5, count + 0.5, 0.5, layers + 0.5)  # both are counted from 1
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4))
    for axis, (name, values_LE, what) in zip(axes.flat, rows, strict=True):
        image = axis.imshow(values_LE, vmin=0, cmap="viridis", extent=edges, origin="lower")
        axis.set(title=f"{name}:\n{what}", xlabel="expert", ylabel="block")
        figure.colorbar(image, ax=axis, shrink=0.7)
    save(figure, "experts")


FIGURES = {
    **{"packing": packing, "golden": golden, "arkd": asymmetry, "phis": phi_s},
    "experts": experts,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        FIGURES[name]()
