"""Evaluation by the papers' protocols: one function per task, any data set, any encoder.

    python eval.py knn --student runs/demo/model.pt --teacher builtin:vit-s \
        --train openmoji:train:1000 --test openmoji:test:600

Read: `extract` runs all models over a source once: a `FeatureSet` with a column per head, as
"teacher/vit-s", "student/trunk", and of the controls "random/..." and "pixels". A protocol scores
every column alike: `knn`, `add_ensembles`, `Fidelity`; in Part II `zero_shot`, `retrieval`,
`linear`, `segmentation`, `resolution`, `merging`. AMoE, 2512.20157; RADIOv2.5, 2412.07679 (arXiv).

Legend: N images, B a block of them, M tokens, (h, w) a grid of tokens, (H, W) pixels, X values of a
patch, C feature width, D width of a text, K classes, neighbours, texts or kept tokens, G settings
of a probe, P figures of one image, R bootstrap draws.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

import packing
from losses import resize_map
from model import Features, Student, hash_weights, is_student, load_student, merge_tokens
from packing import Number, Sample, Subset, rank_and_world, resize
from teachers import TINY, WHEELS, TeacherSpec, load_teacher, load_text, parse_teacher

Rows = dict[str, dict[str, Any]]  # name -> {"value", "low", "high", "n", ...}
LARGEST = 1024  # px: a JPEG is not decoded much larger


# ---- Part I, the papers: features of every column, once


@dataclass
class FeatureSet:
    """Features of N pictures and what is known of them."""

    samples: list[Sample] = field(default_factory=list)  # without their pixels
    summary: dict[str, Tensor] = field(default_factory=dict)  # column -> (N, C) float32
    patches: dict[str, list[Tensor]] = field(default_factory=dict)  # column -> (h, w, C) float16
    dense: list[int] = field(default_factory=list)  # the pictures whose maps `patches` holds
    skipped: dict[str, str] = field(default_factory=dict)  # key -> why it was left out


def extract(
    encoder: Any, source: Any, dense: int | None = None, size: Any = None, chunk: int = 32
) -> FeatureSet:
    """Run an encoder, in any form that `encode` takes, once over a source; ranks share the work.

    Args:
        dense: keep patch maps of only so many pictures, evenly spread (None: all, 0: none).
        size: see `at_size`.
        chunk: pictures encoded together; changes speed, not figures.
    """
    n, (rank, world) = len(source), rank_and_world()
    # By place in the source, not by rank or chunk: no figure depends on the number of processes.
    has_map = set(packing.evenly(n, n if dense is None else dense))
    at_least = size if isinstance(size, tuple) else (size or LARGEST,) * 2
    mine, records, skipped = range(rank, n, world), {}, dict[str, str]()
    for start in packing.progress(range(0, len(mine), chunk), source.name, unit="chunk"):
        pictures = packing.readable(source, mine[start : start + chunk], skipped, at_least)
        found = {i: at_size(sample, size) for i, sample in pictures}
        outputs = encode(encoder, list(found.values())) if found else []
        for (i, sample), out in zip(found.items(), outputs, strict=True):
            summary = {name: x.float().cpu() for name, x in out.summary.items()}
            # Half precision: the maps of a thousand pictures are gigabytes.
            maps = {name: x.half().cpu() for name, x in out.patches.items() if i in has_map}
            records[i] = replace(sample, image=sample.image[:0]), summary, maps  # pixels go
    return _gather(records, skipped, source.skipped)


@torch.no_grad()
def encode(model: Any, samples: list[Sample]) -> list[Features]:
    """Features of pictures by any encoder: a teacher (has `targets`; live or looked up in a cache),
    or what has `encode(images)` (a student, `RawPixels`), or a mapping of names to models, which
    nests: {"teacher": {"vit": ...}, "student": ...} gives "teacher/vit", "student/trunk".
    """
    if isinstance(model, Mapping):
        found = [Features({}, {}) for _ in samples]
        for name, part in model.items():
            for joined, one in zip(found, encode(part, samples), strict=True):
                joined.summary |= {f"{name}/{x}".rstrip("/"): y for x, y in one.summary.items()}
                joined.patches |= {f"{name}/{x}".rstrip("/"): y for x, y in one.patches.items()}
        return found
    if not hasattr(model, "targets"):
        return model.encode([packing.to_float(sample.image) for sample in samples])
    out = model.targets(samples)
    none: list[dict] = [{}] * len(samples)  # SAM, for one, has no summary
    summaries = none if out.summary_BC is None else [{"": x_C} for x_C in out.summary_BC]
    return [Features(x, {"": y}) for x, y in zip(summaries, out.patches, strict=True)]


# ---- kNN; heads are mixed by their entropy


def knn(train: FeatureSet, test: FeatureSet, k: int = 20) -> Rows:
    """kNN accuracy of every column, of each model's heads together, and of the largest class.

    "concat" joins the heads at unit length; "ensemble" mixes their votes. AMoE: kNN
    """
    train, test = comparable(train, test, "label")
    names, train_N, test_N = class_ids(train, test)

    def votes(*columns: str) -> Tensor:
        bank_NC, test_NC = (
            torch.cat([F.normalize(side.summary[column]) for column in columns], dim=1)
            for side in (train, test)
        )
        # Each head's votes sum to one: raw ones would let the head with larger cosines decide, and
        # the entropy that weighs the heads is one of chances.
        return F.normalize(knn_votes(bank_NC, train_N, test_NC, len(names), k), p=1)

    chances = add_ensembles({column: votes(column) for column in test.summary})
    chances |= {f"{m}/concat": votes(*heads) for m, heads in head_groups(test.summary).items()}
    return classified(chances, train_N, test_N)


def knn_votes(
    train_NC: Tensor, ids_N: Tensor, test_MC: Tensor, classes: int, k: int = 20, temperature=0.07
) -> Tensor:
    """Votes (M, classes): each of the k nearest adds exp(cosine / temperature). AMoE: kNN"""
    train_NC, votes = F.normalize(train_NC.float(), dim=1), []
    # In blocks, so that no table of cosines has more than some 64 million entries.
    for test_BC in F.normalize(test_MC.float(), dim=1).split(2**26 // len(train_NC) + 1):
        cosine_BK, nearest_BK = (test_BC @ train_NC.T).topk(min(k, len(train_NC)), dim=1)
        empty = torch.zeros(len(test_BC), classes)
        votes.append(empty.scatter_add_(1, ids_N[nearest_BK], (cosine_BK / temperature).exp()))
    return torch.cat(votes)


def add_ensembles(chances: dict[str, Tensor], sharpness: float = 5.0) -> dict[str, Tensor]:
    """Heads (N, K) mixed per image by w = softmax(-5 entropy). AMoE: entropy-weighted ensemble"""
    mixed = {}
    for model, heads in head_groups(chances).items():
        # They must be calibrated: softmax of bare cosines has entropy log K whatever they say,
        # and the mixture is then a plain mean.
        stacked = torch.stack([chances[head] for head in heads])
        weights = (-sharpness * torch.special.entr(stacked).sum(-1, keepdim=True)).softmax(0)
        mixed[f"{model}/ensemble"] = (weights * stacked).sum(0)
    return chances | mixed


# ---- Fidelity to the teachers


class Fidelity:
    """How near features are to a teacher's; `fidelity` measures all heads by it.

    value     1 - MSE / variance of the teacher's held-out features, every channel scaled by its
              own deviation in training: the variance explained, each channel counting the same
    fidelity  Var(teacher) / MSE as they are, over all elements (RADIO release, mode_switching.py)
    cosine    as it is: mostly that of the features' mean, which a constant has as well

    `mean_C`, of the teacher's training pictures (M, C), is the best constant to say of all alike.
    """

    def __init__(self, teacher_train: Sequence[Tensor]):
        count = sum(len(x_MC) for x_MC in teacher_train)
        self.mean_C = torch.stack([x.double().sum(0) for x in teacher_train]).sum(0) / count
        squares = [(x.double() - self.mean_C).square().sum(0) for x in teacher_train]
        variance_C = torch.stack(squares).sum(0) / count
        # A channel that never moved in training has no scale to be measured on.
        is_alive_C = variance_C > 1e-8 * variance_C.mean()
        self.scale_C = variance_C.reciprocal().where(is_alive_C, 0.0)

    def report(self, pairs: Iterable[Sequence[Tensor]]) -> dict[str, Any]:
        """Figures over held-out images, each (student (M, C), teacher (M, C))."""
        images = []
        # float64: the spread below is a small difference where a channel's mean is large.
        for s_MC, t_MC in ((s.double(), t.double()) for s, t in pairs):
            # One image's means over its tokens, so that images weigh the same.
            cosine = F.cosine_similarity(s_MC, t_MC).mean()
            squares = (s_MC - t_MC).square().mean(0), t_MC.square().mean(0)
            images.append((*squares, t_MC.mean(0), cosine))
        error_NC, square_NC, mean_NC, cosine_N = map(torch.stack, zip(*images, strict=True))
        # The variance is around the held-out pictures' own mean, also in the interval's draws:
        # around their own means they would vary less, and the interval would lie too low.
        centre_C = mean_NC.mean(0)
        spread_NC = square_NC - 2 * centre_C * mean_NC + centre_C.square()
        # Sums of both, and one quotient at the end: a mean of quotients would let pictures of one
        # colour, whose features hardly vary, decide.
        parts_N2 = torch.stack([(x * self.scale_C).mean(1) for x in (error_NC, spread_NC)], 1)
        if parts_N2[:, 1].mean() <= 1e-12 * (square_NC * self.scale_C).mean():
            parts_N2[:, 1] = 0  # what is left of equal numbers
        variance, mse = float(square_NC.mean() - mean_NC.mean() ** 2), float(error_NC.mean())
        row = {"fidelity": variance / mse if mse else math.inf, "cosine": float(cosine_N.mean())}
        why = "the teacher says the same of all held-out pictures"
        explained = bootstrap(parts_N2, lambda means: 1 - means[..., 0] / means[..., 1], why=why)
        return finite(row, fidelity="there is no error to divide by") | explained


# ---- Part II: the plumbing

# ---- Pictures, classes and heads that are compared


def take(found: FeatureSet, places: list[int]) -> FeatureSet:
    """Some of the pictures."""
    map_of = {place: n for n, place in enumerate(found.dense)}
    dense = [n for n, place in enumerate(places) if place in map_of]
    kept = [map_of[places[n]] for n in dense]
    summary = {column: x_NC[places] for column, x_NC in found.summary.items()}
    patches = {column: [maps[n] for n in kept] for column, maps in found.patches.items()}
    samples = [found.samples[place] for place in places]
    return replace(found, samples=samples, summary=summary, patches=patches, dense=dense)


TRAINING, HELD_OUT = "training pictures", "held-out pictures"
LEAST = {TRAINING: 2, HELD_OUT: 1}  # a setting is chosen on some of the training pictures
WHERE = {"label": "its first folder's name, or a .cls", "caption": "a .txt", "mask": "a .mask.png"}


def comparable(
    train: FeatureSet, test: FeatureSet, what: str = ""
) -> tuple[FeatureSet, FeatureSet]:
    """The pictures that have `what` a figure is made of ("label", "caption" or "mask"); of the test
    those alone that are not in training, by content, and of classes that it has.

    The others go into `skipped`. Raises: ValueError if too few are left.
    """
    # Those without `what` count here: a student was trained on them as well.
    seen = {sample.digest: sample.key for sample in train.samples}
    twins = {i: seen[x.digest] for i, x in enumerate(test.samples) if x.digest in seen}
    names = [f"{test.samples[i].key} (= {twin})" for i, twin in twins.items()]
    test = leave_out(test, HELD_OUT, dict.fromkeys(twins, "in both train and test"), names)
    if what:
        train, test = having(train, what, TRAINING), having(test, what, HELD_OUT)
    if what == "label":
        classes = {sample.label for sample in train.samples}
        labels = {i: x.label for i, x in enumerate(test.samples) if x.label not in classes}
        why = {i: f"of class {x!r}, which no training picture has" for i, x in labels.items()}
        test = leave_out(test, HELD_OUT, why)
    return train, test


def having(found: FeatureSet, what: str, side: str) -> FeatureSet:
    """The pictures with a label, caption or mask."""
    bare = [i for i, sample in enumerate(found.samples) if getattr(sample, what) is None]
    return leave_out(found, side, dict.fromkeys(bare, without(what)), least=LEAST[side])


def without(what: str) -> str:
    return f"without a {what} ({WHERE[what]} beside the picture)"


def leave_out(
    found: FeatureSet, side: str, why: Mapping[int, str], names: Sequence[str] = (), least: int = 1
) -> FeatureSet:
    """The pictures whose places are not in `why`; the others go into `skipped`."""
    keys = [sample.key for sample in found.samples]
    refuse_few(side, len(keys), names or [keys[i] for i in why], why.values(), least)
    add_reasons(found.skipped, {keys[i]: f"{side} {reason}" for i, reason in why.items()})
    return take(found, [i for i in range(len(keys)) if i not in why]) if why else found


def refuse_few(
    side: str, count: int, names: Sequence[str], why: Iterable[str], least: int = 1
) -> None:
    """ValueError where too few of `count` pictures are left without `names`."""
    if not count:
        raise ValueError(f"none of the {side} could be read")
    if names and count - len(names) < least:
        reasons = "; ".join(sorted(set(why)))
        raise ValueError(
            f"too few {side}: {len(names)} of {count} are {reasons}: {list(names[:5])}; "
            f"{least} must be left at least"
        )


def add_reasons(skipped: dict[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Note why pictures are left out, beside other reasons: one may lack a label and a mask."""
    for key, reason in more.items():
        before = skipped.get(key, reason)
        skipped[key] = before if reason in before else f"{before}; {reason}"
    return skipped


def class_ids(train: FeatureSet, test: FeatureSet) -> tuple[list[str], Tensor, Tensor]:
    """The class names of the training set, and both sets' labels as indices into them."""
    labels = [[str(sample.label) for sample in side.samples] for side in (train, test)]
    index = {name: i for i, name in enumerate(sorted(set(labels[0])))}
    train_N, test_N = (torch.tensor([index[label] for label in side]) for side in labels)
    return list(index), train_N, test_N


def head_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Models with several heads -> their columns; the trunk is no head."""
    groups: dict[str, list[str]] = {}
    for name in names:
        model, _, head = name.partition("/")
        if head not in ("", "trunk"):
            groups.setdefault(model, []).append(name)
    return {model: heads for model, heads in groups.items() if len(heads) > 1}


def split(n: int) -> tuple[list[int], list[int]]:
    """(fit, held), four fifths and one: settings are chosen in training, never on the test."""
    if n < 2:
        raise ValueError(f"{n} training pictures can't be split to choose a setting; 2 at least")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(n * 0.2))
    return order[held:], order[:held]


# ---- Figures with their intervals


def finite(row: dict[Any, Any], **why: str) -> dict[Any, Any]:
    """The row with None for figures without a denominator (JSON has no nan), and why, if known."""
    lost = [k for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)]
    reasons = [f"{k}: {why[k]}" for k in lost if k in why]
    return row | dict.fromkeys(lost) | ({"reason": "; ".join(reasons)} if reasons else {})


def bootstrap(
    parts_NP: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0, why: str = ""
) -> dict[str, Any]:
    """A figure with its 95 % percentile interval over images, of 1,000 draws.

    It is `statistic`: mean parts (..., P) -> (...,), of what each image adds (hits, errors, ...);
    None, for the reason `why`, where that is not finite.
    """
    parts_NP, n = parts_NP.double(), len(parts_NP)
    generator, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(10):  # in blocks of 100, so that 50,000 images fit in memory
        picks_RN = torch.randint(n, (100, n), generator=generator)
        times_RN = torch.stack([picks_N.bincount(minlength=n) for picks_N in picks_RN]).double()
        drawn.append(statistic(times_RN @ parts_NP / n))
    drawn_R = torch.cat(drawn)
    drawn_R[~drawn_R.isfinite()] = torch.nan
    low, high = drawn_R.nanquantile(torch.tensor([0.025, 0.975]).double()).tolist()
    value = float(statistic(parts_NP.mean(0)))
    return finite({"value": value, "low": low, "high": high, "n": n}, value=why)


def accuracy(hits_N: Tensor) -> dict[str, Any]:
    """Share of hits with its interval."""
    return bootstrap(hits_N.double()[:, None], lambda means: means[..., 0])


def classified(chances: dict[str, Tensor], train_N: Tensor, test_N: Tensor) -> Rows:
    """Accuracy of chances (N, K), and of always saying the largest class of training."""
    chances = chances | {"majority class": train_N.bincount().expand(len(test_N), -1)}
    return {column: accuracy(x_NK.argmax(1) == test_N) for column, x_NK in chances.items()}


# ---- Zero-shot, texts, and retrieval


class Words(NamedTuple):
    """A text tower."""

    embed: Callable[[list[str]], Tensor]  # n strings -> (n, D)
    head: str | None = None  # whose summaries lie in the texts' space, if those of any head do


def zero_shot(train: FeatureSet, test: FeatureSet, words: Words, prompts: str = "") -> Rows:
    """Accuracy of the nearest of `class_texts`, averaged at unit length. AMoE: zero-shot"""
    train, test = comparable(train, test, "label")
    if prompts == "captions":  # of the classes that have one
        train, test = comparable(having(train, "caption", TRAINING), test, "label")
    names, train_N, test_N = class_ids(train, test)
    texts = class_texts(prompts, names, train)
    class_KD = torch.stack([F.normalize(words.embed(of_class)).mean(0) for of_class in texts])
    scores = similarities(train, test, words, [class_KD, class_KD])
    return classified(calibrated(scores, train_N), train_N, test_N)


def retrieval(train: FeatureSet, test: FeatureSet, words: Words) -> Rows:
    """R@1, 5, 10 of captions by images and of images by captions. AMoE: image-text retrieval

    An ensemble weighs its heads by their entropy over what is searched, in either direction. The
    "floor" is what a random order finds.
    """
    (train, test), rows = comparable(train, test, "caption"), Rows()
    pairs = [caption_pairs(side) for side in (train, test)]
    scores = similarities(train, test, words, [words.embed(texts) for texts, _ in pairs])
    is_train, is_pair = (is_pair_NK for _, is_pair_NK in pairs)
    for way in ("texts by images", "images by texts"):
        chances = calibrated(scores, is_train.int().argmax(1))
        for k in (1, 5, 10):
            hits = {column: recall_hits(x_NK, is_pair, k) for column, x_NK in chances.items()}
            hits["floor"] = recall_floor(is_pair, k)
            rows |= {f"{column} {way} R@{k}": accuracy(x_N) for column, x_N in hits.items()}
        scores = {column: [x_NK.T for x_NK in sides] for column, sides in scores.items()}
        is_train, is_pair = is_train.T, is_pair.T
    return rows


def caption_pairs(found: FeatureSet) -> tuple[list[str], Tensor]:
    """Distinct captions (a line each) and which image has which, (N, K) bool."""
    owned = [str(sample.caption).splitlines() for sample in found.samples]
    place = {text: k for k, text in enumerate(sorted({line for lines in owned for line in lines}))}
    is_pair_NK = torch.zeros(len(owned), len(place), dtype=torch.bool)
    for row, lines in zip(is_pair_NK, owned, strict=True):
        row[[place[line] for line in lines]] = True
    return list(place), is_pair_NK


def recall_hits(scores_NK: Tensor, is_pair_NK: Tensor, k: int) -> Tensor:
    """(N,) a pair is among the first k of its row; a tie counts against it."""
    best_N1 = scores_NK.masked_fill(~is_pair_NK, -torch.inf).amax(1, keepdim=True)
    return ((scores_NK >= best_N1) & ~is_pair_NK).sum(1) < k


def recall_floor(is_pair_NK: Tensor, k: int) -> Tensor:
    """(N,) how probably a pair is among the first k of a random order."""
    count, wrong_N1 = is_pair_NK.shape[1], (~is_pair_NK).sum(1, keepdim=True)
    drawn_k = torch.arange(min(k, count))
    return 1 - ((wrong_N1 - drawn_k).clamp_min(0) / (count - drawn_k)).prod(1)


def similarities(
    train: FeatureSet, test: FeatureSet, words: Words, texts: Sequence[Tensor]
) -> dict[str, list[Tensor]]:
    """Per column, the cosines (N, K) of both sides' summaries with their texts (K, D).

    The head `words.head` lives in the texts' space. Any other takes the map of the teacher of its
    name, fitted on that teacher's features alone: "student/vit-s" is read as "teacher/vit-s" is. A
    column without a teacher in the run takes a map of its own, which is a probe and is called so:
    "probe pixels". Maps are of the pictures with captions; without, `words.head` alone is scored.
    """
    heads = {column: column.partition("/")[2] for column in train.summary}
    has_captions = sum(x.caption is not None for x in train.samples) > 1
    if words.head in heads.values() and not has_captions:
        heads = {column: head for column, head in heads.items() if head == words.head}
    if any(head != words.head for head in heads.values()):
        told = having(train, "caption", TRAINING)
        captions = [str(sample.caption).partition("\n")[0] for sample in told.samples]
        text_ND = F.normalize(words.embed(captions))
    maps, found = dict[str, Callable[[Tensor], Tensor]](), {}
    for column, head in heads.items():
        sides, name = [train.summary[column], test.summary[column]], column
        if head != words.head:
            source = f"teacher/{head}" if f"teacher/{head}" in heads else column
            if source not in maps:
                maps[source] = fit_text_map(told.summary[source], text_ND)
            sides = [maps[source](x_NC) for x_NC in sides]
            name = column if source.startswith("teacher/") else f"probe {column}"
        both = zip(sides, texts, strict=True)
        found[name] = [F.normalize(x_ND) @ F.normalize(text_KD).T for x_ND, text_KD in both]
    return found


def fit_text_map(image_NC: Tensor, text_ND: Tensor) -> Callable[[Tensor], Tensor]:
    """A map (M, C) -> (M, D) from image features to embeddings of their captions: ridge regression.

    The penalty is the best of five on a fifth of the pairs; the map is then of all (we chose).
    """
    mean_C, mean_D = image_NC.double().mean(0), text_ND.double().mean(0)
    x_NC, y_ND = image_NC.double() - mean_C, text_ND.double() - mean_D

    def solve(rows: Any, penalty: float) -> Tensor:
        gram = x_NC[rows].T @ x_NC[rows]
        gram.diagonal().add_(penalty * gram.diagonal().mean() + 1e-12)
        return torch.linalg.solve(gram, x_NC[rows].T @ y_ND[rows])

    fit, held = split(len(x_NC))
    penalties = (1e-2, 1e-1, 1.0, 1e1, 1e2)
    error = [(x_NC[held] @ solve(fit, p) - y_ND[held]).square().sum() for p in penalties]
    map_CD = solve(slice(None), penalties[int(torch.stack(error).argmin())])
    return lambda x_MC: ((x_MC.double() - mean_C) @ map_CD + mean_D).float()


def calibrated(scores: dict[str, list[Tensor]], targets_N: Tensor) -> dict[str, Tensor]:
    """Scores (of training, of the test) -> the test's chances (N, K), of ensembles as well.

    Ensembles compare heads by their entropy, so each head needs its own temperature: that of least
    cross-entropy in training.
    """
    chances, grid = {}, torch.logspace(-3, 1, 81).tolist()
    for column, (train_NK, test_NK) in scores.items():
        losses = [float(F.cross_entropy(train_NK / t, targets_N)) for t in grid]
        chances[column] = (test_NK / grid[losses.index(min(losses))]).softmax(1)
    return add_ensembles(chances)


def class_texts(prompts: str, names: Sequence[str], train: FeatureSet) -> list[list[str]]:
    """What stands for each class: a file's templates, a line each with {} where the name goes, or
    "captions", those of its pictures. A folder called `red_fox` is a red fox.
    """
    if prompts == "captions":
        return [[str(x.caption) for x in train.samples if x.label == name] for name in names]
    lines = Path(prompts).read_text().splitlines() if prompts else ["a photo of a {}."]
    templates = [line.strip() for line in lines if "{}" in line]
    if not templates:
        raise ValueError(f"{prompts}: no line has {{}} for the class name")
    return [[t.replace("{}", name.replace("_", " ")) for t in templates] for name in names]


# ---- Linear probes, and segmentation

VOID = 255  # mask value of a pixel without a label, the field's convention


class Probe(NamedTuple):
    """BatchNorm and a linear layer (on maps: a 1x1 convolution), folded, for G settings at once."""

    weight_GCK: Tensor
    bias_GK: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(M, C) -> (G, M, K) logits."""
        return torch.einsum("mc,gck->gmk", x.float(), self.weight_GCK) + self.bias_GK[:, None]


def linear(train: FeatureSet, test: FeatureSet) -> Rows:
    """Accuracy of a logistic probe on summaries, its L2 chosen on a split of the training set."""
    train, test = comparable(train, test, "label")
    names, train_N, test_N = class_ids(train, test)
    fit, held = split(len(train_N))
    penalties, rates, chances, chosen = (0.0, 1e-4, 1e-3, 1e-2), (5e-2,) * 4, {}, {}
    for column, x_NC in train.summary.items():
        probe = fit_probe(x_NC[fit], train_N[fit], len(names), rates, penalties)
        hits_G = (probe(x_NC[held]).argmax(-1) == train_N[held]).double().mean(1)
        chosen[column] = {"l2": penalties[int(hits_G.argmax())]}
        final = fit_probe(x_NC, train_N, len(names), rates[:1], [*chosen[column].values()])
        chances[column] = final(test.summary[column])[0]
    rows = classified(chances, train_N, test_N)
    return {column: row | chosen.get(column, {}) for column, row in rows.items()}


def fit_probe(
    x_MC: Tensor, y_M: Tensor, classes: int, rates: Sequence[float], l2: Sequence[float]
) -> Probe:
    """Logistic regression by Adam, ten epochs, all settings (rate, l2) in the same pass.

    BatchNorm's statistics are those of the whole set, so batches change nothing in it.
    """
    mean_C, scale_C = x_MC.mean(0), x_MC.std(0).clamp_min(1e-6).reciprocal()
    z_MC, generator = (x_MC - mean_C) * scale_C, torch.Generator().manual_seed(0)
    n, width = x_MC.shape
    weight_CGK = torch.zeros(width, len(rates), classes, requires_grad=True)
    bias_GK = torch.zeros(len(rates), classes, requires_grad=True)
    adam = torch.optim.Adam([weight_CGK, bias_GK], lr=1.0)
    # Adam's steps do not depend on the gradient's scale: a factor on a weight is its own rate.
    rate_G1, l2_G1 = torch.tensor(rates)[:, None], torch.tensor(l2)[:, None]
    steps = max(200, 10 * n // 1024)
    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        # Batches of a large set, all of a small one.
        rows = torch.randint(n, (1024,), generator=generator) if n > 1024 else slice(None)
        scaled_CGK = weight_CGK * rate_G1
        logits = rearrange(z_MC[rows] @ scaled_CGK.flatten(1), "m (g k) -> m k g", k=classes)
        logits = logits + (bias_GK * rate_G1).T
        targets = repeat(y_M[rows], "m -> m g", g=len(rates))
        loss = F.cross_entropy(logits, targets, ignore_index=VOID) * len(rates)
        loss = loss + (l2_G1 / 2 * scaled_CGK.square()).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    weight_GCK = rearrange((weight_CGK * rate_G1).detach(), "c g k -> g c k") * scale_C[:, None]
    bias_GK = (bias_GK * rate_G1).detach() - torch.einsum("c,gck->gk", mean_C, weight_GCK)
    return Probe(weight_GCK, bias_GK)


def segmentation(train: FeatureSet, test: FeatureSet, foreground: bool = False) -> Rows:
    """mIoU of a linear probe on frozen patches, over the classes present, at the masks' own size.

    foreground: every class but 0 is one, and the figure is its IoU. AMoE: segmentation, but
    settings are chosen on the training pictures and all pixels count.
    """
    train, test = comparable(train, test, "mask")
    masks, test_masks = _masks(train, foreground), _masks(test, foreground)
    classes = 1 + max(int(m[m != VOID].max()) for m in masks + test_masks if (m != VOID).any())

    def score(sums: Tensor) -> Tensor:
        return iou(sums, classes)[..., 1] if foreground else iou(sums, classes).nanmean(-1)

    rows: Rows = {}
    for column, maps in train.patches.items():
        probe = choose_probe(maps, masks, classes, score)
        sums_NP = overlaps(probe, test.patches[column], test_masks, classes)[:, 0]
        rows[column] = bootstrap(sums_NP, score, why="no mask has this class")
    pixels = torch.cat([mask[mask != VOID] for mask in masks])
    commonest = 1 if foreground else int(pixels.bincount().argmax())
    said = [overlap(torch.full_like(m, commonest)[None], m, classes)[0] for m in test_masks]
    rows["one class everywhere"] = bootstrap(torch.stack(said), score, why="no mask has it")
    return rows


def choose_probe(
    maps: Sequence[Tensor], masks: Sequence[Tensor], classes: int, score: Callable
) -> Probe:
    """A probe of four fifths of the pictures; the fifth chooses its rate, and with two classes
    its threshold (tokens are labelled at their centres, but pixels are scored)."""
    rates = (4e-4, 1e-3, 4e-3, 2e-2)
    fit, held = split(len(maps))
    tokens_MC, labels_M = token_labels([maps[i] for i in fit], [masks[i] for i in fit])
    probe = fit_probe(tokens_MC, labels_M, classes, rates, (0.0,) * len(rates))
    held_maps, held_masks = [maps[i] for i in held], [masks[i] for i in held]

    def best(probe: Probe) -> int:
        return int(score(overlaps(probe, held_maps, held_masks, classes).sum(0)).argmax())

    g = best(probe)
    weight_CK, bias_GK = probe.weight_GCK[g], probe.bias_GK[g : g + 1]
    if classes == 2:
        odds_M = -probe(tokens_MC[:: len(tokens_MC) // 10_000 + 1])[g].diff(dim=-1)[:, 0]
        shifts = odds_M.quantile(torch.linspace(0.02, 0.98, 25))
        bias_GK = bias_GK + torch.stack([0 * shifts, shifts], dim=1)
        shift = best(Probe(weight_CK.expand(25, -1, -1), bias_GK))
        bias_GK = bias_GK[shift : shift + 1]
    return Probe(weight_CK[None], bias_GK)


def _masks(found: FeatureSet, foreground: bool) -> list[Tensor]:
    """The masks of the pictures whose patches are kept."""
    masks = [torch.from_numpy(np.array(found.samples[i].mask)) for i in found.dense]
    return [torch.where(m == VOID, VOID, (m > 0).byte()) if foreground else m for m in masks]


def token_labels(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All tokens (M, C) with the label of the pixel at each one's centre (nearest downsampling)."""
    labels = [
        F.interpolate(mask[None, None].float(), map_hwC.shape[:2], mode="nearest-exact").flatten()
        for map_hwC, mask in zip(maps, masks, strict=True)
    ]
    return torch.cat([x.flatten(0, 1) for x in maps]).float(), torch.cat(labels).long()


def overlaps(probe: Probe, maps: Sequence[Tensor], masks: Sequence[Tensor], classes: int) -> Tensor:
    """(N, G, 3 * classes): every setting's prediction, at the resolution of each mask."""
    found = []
    for map_hwC, mask in zip(maps, masks, strict=True):
        logits = rearrange(probe(map_hwC.flatten(0, 1)), "g (h w) k -> g k h w", w=map_hwC.shape[1])
        logits = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False)
        logits = rearrange(logits, "g k h w -> g h w k").contiguous()  # argmax is 10x faster so
        found.append(overlap(logits.argmax(-1), mask, classes))
    return torch.stack(found)


def overlap(prediction_GHW: Tensor, mask_HW: Tensor, classes: int) -> Tensor:
    """(G, 3 * classes) pixels of an image: hit, labelled, predicted; only void ones left out."""
    settings, is_known = len(prediction_GHW), mask_HW != VOID
    cell = torch.arange(settings)[:, None] * classes + mask_HW[is_known].long()
    cell = cell * classes + prediction_GHW[:, is_known]
    counts = cell.flatten().bincount(minlength=settings * classes**2)
    counts = rearrange(counts, "(g true said) -> g true said", g=settings, true=classes)
    return torch.cat([counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)], dim=1)


def iou(sums: Tensor, classes: int) -> Tensor:
    """(..., 3 * classes) -> (..., classes); nan for a class that no mask has."""
    hit, true, said = rearrange(sums.double(), "... (p k) -> p ... k", p=3, k=classes)
    return torch.where(true > 0, hit / (true + said - hit), torch.nan)


# ---- Fidelity of all heads, mode switches, and scale equivariance


def fidelity(train: FeatureSet, test: FeatureSet) -> Rows:
    """Every head against the teacher of its name ("student/vit-s" against "teacher/vit-s").

    Rows of each head and part ("student/vit-s summary", "student/vit-s patches"), of the teacher's
    mean in training ("constant/vit-s summary", ...), and of the mean over a model's parts ("student
    mean"). The random control has none: its heads do not answer in a teacher's space.
    """
    rows: Rows = {}
    sides = []
    for found in (train, test):  # a summary is a map of one token
        summaries = {name: list(x_NC[:, None, None]) for name, x_NC in found.summary.items()}
        sides.append({"summary": summaries, "patches": found.patches})
    for teacher, part in product(test.patches, sides[0]):
        (bank, seen), head = (side[part] for side in sides), teacher.removeprefix("teacher/")
        of_head = [name for name in seen if name.partition("/")[2] == head]
        said = {x: seen[x] for x in of_head if x not in (teacher, f"random/{head}")}
        if teacher not in of_head or not said:
            continue
        measure = Fidelity([x.flatten(0, 1) for x in bank[teacher]])
        said[f"constant/{head}"] = [measure.mean_C.expand(x.shape) for x in seen[teacher]]
        for name, maps in said.items():
            pairs = (same_grid(*pair) for pair in zip(maps, seen[teacher], strict=True))
            rows[f"{name} {part}"] = measure.report([x.flatten(0, 1) for x in p] for p in pairs)
    if not rows:
        raise ValueError(f"no head is named after a teacher among {sorted(test.patches)}")
    for model in sorted({name.partition("/")[0] for name in rows}):
        values = [row["value"] for name, row in rows.items() if name.startswith(f"{model}/")]
        values = [value for value in values if value is not None] or [math.nan]
        mean = {"value": sum(values) / len(values), "parts": len(values)}
        rows[f"{model} mean"] = finite(mean, value="no part has one")
    return rows


def same_grid(*maps: Tensor) -> list[Tensor]:
    """Maps on the grid (min h, min w), as the losses compare them."""
    h, w = (min(x.shape[axis] for x in maps) for axis in (0, 1))
    return [resize_map(x.to(torch.promote_types(x.dtype, torch.float)), (h, w)) for x in maps]


def resolution(sets: Mapping[int, FeatureSet]) -> Rows:
    """Mode-switch curve and scale equivariance of the patches. RADIOv2.5: mode switching

    `sets` are features of the same pictures by their size in px. A jump of a head's cosine error or
    fidelity from one size to the next is a mode switch.
    """
    rows: Rows = {}
    for column in next(iter(sets.values())).patches:
        maps = [found.patches[column] for found in sets.values()]
        rows[f"{column} scale variance"] = scale_variance(maps)
    for size, found in sets.items():
        for name, row in fidelity(found, found).items():
            head, _, part = name.rpartition(" ")
            if part == "patches":
                more = {key: row[key] for key in ("fidelity", "reason") if key in row}
                rows[f"{head} cosine error {size} px"] = {"value": 1 - row["cosine"]} | more
    return rows


def scale_variance(maps_by_size: Sequence[Sequence[Tensor]]) -> dict:
    """The share of the features' variance that comes from the input's size alone (0: equivariant).

    An image's maps go to their smallest grid; the variance over sizes, mean over all else, is
    divided by that of all. RADIOv2.5: scale equivariance (our reading: no formula is public)
    """
    parts = []
    for maps in zip(*maps_by_size, strict=True):
        stacked = torch.stack(same_grid(*maps)).double()
        within, square = stacked.var(0, correction=0).mean(), stacked.square().mean()
        parts.append(torch.cat([torch.stack([within, square]), stacked.mean((0, 1, 2))]))

    def share(means: Tensor) -> Tensor:
        return means[..., 0] / (means[..., 1] - means[..., 2:].square().mean(-1))

    return bootstrap(torch.stack(parts), share, why="the features are the same everywhere")


# ---- Token merging


def merging(train: FeatureSet, test: FeatureSet) -> Rows:
    """Foreground IoU where few tokens stand for a map. RADIOv2.5: token merging

    Ways: "all" tokens, "merge" (ToMe), pixel "unshuffle" and "average", at 1/4 and 1/16 of them,
    each copied back to its places. All grids of a column are the same, of multiples of 4.
    """
    (train, test), rows = comparable(train, test, "mask"), Rows()
    for column in [c for c in train.patches if c.startswith("teacher/") or c.endswith("/trunk")]:
        h, w = train.patches[column][0].shape[:2]
        if h % 4 or w % 4:
            raise ValueError(f"{column} has a grid of {h}x{w}, no multiple of 4; change --size")
        for way, side in [("all", 1), *product(("merge", "unshuffle", "average"), (2, 4))]:
            few, few_test = (with_few_tokens(x, column, way, side) for x in (train, test))
            scores = segmentation(few, few_test, foreground=True)
            rows[f"{column} {h * w // side**2} tokens, {way}"] = scores[column]
            rows["one class everywhere"] = scores["one class everywhere"]
    return rows


def with_few_tokens(found: FeatureSet, column: str, way: str, side: int) -> FeatureSet:
    """The column alone, each place holding the token that stands for it, see `reduce_map`."""
    maps = found.patches[column]
    pairs = zip(maps, (reduce_map(x, way, side) for x in maps), strict=True)
    back = [tokens_KC[index_M].unflatten(0, x.shape[:2]) for x, (tokens_KC, index_M) in pairs]
    return replace(found, patches={column: back})


def reduce_map(map_hwC: Tensor, way: str, side: int) -> tuple[Tensor, Tensor]:
    """(K, C') tokens that stand for a map, K = h w / side^2, and (h w,) which stands for each."""
    h, w, _ = map_hwC.shape
    if way == "merge":
        return merge_tokens(map_hwC.flatten(0, 1).float(), (h, w), h * w // side**2)
    index_hw = torch.arange(h)[:, None] // side * (w // side) + torch.arange(w) // side
    if way == "unshuffle":
        cells = rearrange(map_hwC, "(h a) (w b) c -> (h w) (a b c)", a=side, b=side)
    else:
        cells = reduce(map_hwC.float(), "(h a) (w b) c -> (h w) c", "mean", a=side, b=side)
    return cells.float(), index_hw.flatten()


# ---- Controls, and features of all ranks


class RawPixels:
    """Control without weights: the picture at 16x16 as summary, its 8x8 patches as tokens."""

    def encode(self, images: Sequence[Tensor]) -> list[Features]:
        found = []
        for image in images:
            h, w = packing.fit_size(image.shape[1], image.shape[2], patch=8)
            patches_MX = packing.patchify(resize(image, (h, w)), 8) - 0.5
            map_hwX = rearrange(patches_MX, "(h w) x -> h w x", h=h // 8)
            found.append(Features({"": resize(image, (16, 16)).flatten() - 0.5}, {"": map_hwX}))
        return found


@torch.no_grad()
def random_control(student: Student, seed: int = 0) -> Student:
    """Control without training: the student's network with random weights, none of them zero.

    As training starts its blocks are the identity, so that it says the same of every picture.
    Matrices of zeros are drawn with deviation 1 / sqrt(inputs).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = Student(student.config)
        for weight in control.parameters():
            if weight.ndim > 1 and not weight.any():
                nn.init.trunc_normal_(weight, std=weight.shape[-1] ** -0.5)
    return control.eval().to(next(student.parameters()).device)


def _gather(records: dict[int, tuple], skipped: dict, at_scan: dict) -> FeatureSet:
    """All ranks' pictures in the source's order: each is there once, whatever the world."""
    parts: list[Any] = [(records, skipped)]
    if (world := rank_and_world()[1]) > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (records, skipped))
    records = {i: record for part, _ in parts for i, record in part.items()}
    skipped = {key: why for _, part in parts for key, why in part.items()}
    rows = [records[i] for i in sorted(records)]
    dense = [n for n, (_, _, maps) in enumerate(rows) if maps]
    samples = [sample for sample, _, _ in rows]
    summary = {c: torch.stack([x[c] for _, x, _ in rows]) for c in (rows[0][1] if rows else ())}
    patches = {c: [rows[n][2][c] for n in dense] for c in (rows[dense[0]][2] if dense else ())}
    return FeatureSet(samples, summary, patches, dense, at_scan | skipped)


def at_size(sample: Sample, size: Any) -> Sample:
    """A sample whose picture has about size^2 pixels and its aspect, or is (height, width)."""
    if size is None:
        return sample
    if isinstance(size, int):
        sides = sample.image.shape[:2]
        size = [max(1, round(side * size / math.sqrt(math.prod(sides)))) for side in sides]
    pixels = Image.fromarray(sample.image).resize(size[::-1], Image.Resampling.BICUBIC)
    return replace(sample, image=np.array(pixels))


# ---- PCA pictures


def first_pictures(source: Any, count: int) -> tuple[list[Sample], dict[str, str]]:
    """The first `count` pictures that decode; and those before them that do not, key -> reason."""
    skipped: dict[str, str] = {}
    found = packing.readable(source, range(len(source)), skipped, (LARGEST, LARGEST))
    return [sample for _, sample in islice(found, count)], skipped


def pca_sheet(
    path: Any, pictures: Sequence[Sample], encoders: Any, sizes: Any = (None,), cell: int = 160
) -> None:
    """Write a sheet: a row per picture, a column per map of `encoders` and input size (`at_size`).

    Colours are the maps' three main axes. They mean the same in a whole column, and in a student's
    head the same as in the teacher of its name: its maps are drawn in the teacher's axes, only
    scaled by themselves. A picture is `cell` px wide.
    """
    columns = {"picture": [Image.fromarray(sample.image) for sample in pictures]}
    axes: dict[str, Tensor] = {}
    for size in sizes:
        features = encode(encoders, [at_size(sample, size) for sample in pictures])
        for name in sorted(features[0].patches, key=lambda name: name.endswith("trunk")):
            maps = [f.patches[name].float().cpu() for f in features]
            head = name if name.endswith("trunk") else name.rpartition("/")[2]
            if head not in axes:
                axes[head] = main_axes(maps)
            columns[f"{name} {size or ''}"] = pca_pictures(maps, axes[head])
    gap, font = 8, ImageFont.load_default(size=15)
    shapes = [ImageOps.contain(x, (cell, cell * 5 // 4)).size for x in columns["picture"]]
    tops = list(accumulate((height + gap for _, height in shapes), initial=34))
    sheet = Image.new("RGB", (gap + len(columns) * (cell + gap), tops[-1]), "white")
    for column, (title, images) in enumerate(columns.items()):
        x = gap + column * (cell + gap)
        ImageDraw.Draw(sheet).text((x + cell // 2, 17), title.strip(), "black", font, anchor="mm")
        for (width, height), y, image in zip(shapes, tops[:-1], images, strict=True):
            sheet.paste(image.resize((width, height)), (x + (cell - width) // 2, y))
    kind = Image.registered_extensions().get(Path(path).suffix.lower())  # a draft ends otherwise
    if kind is None:
        raise ValueError(f"{path} is no picture's name: pass one that ends in .png or .jpg")
    packing.write_whole(path, partial(sheet.save, format=kind))


def main_axes(maps: Sequence[Tensor]) -> Tensor:
    """(C, 3): the three axes along which the tokens of all maps vary most."""
    covariance_CC = torch.cat([x.flatten(0, 1) for x in maps]).T.cov(correction=0)
    return torch.linalg.eigh(covariance_CC).eigenvectors[:, -3:].flip(1)


def pca_pictures(maps: Sequence[Tensor], axes_C3: Tensor) -> list[Image.Image]:
    """Maps in colour, a pixel a token, robustly scaled over the set."""
    scores_M3 = torch.cat([x.flatten(0, 1) for x in maps]) @ axes_C3
    low_3, high_3 = scores_M3.quantile(torch.tensor([0.02, 0.98]), dim=0)
    scale_3 = 255 / (high_3 - low_3).clamp_min(1e-6)  # a collapsed student has no range
    colours = [((x @ axes_C3 - low_3) * scale_3).clamp(0, 255) for x in maps]
    return [Image.fromarray(x_hw3.byte().numpy()) for x_hw3 in colours]


# ---- Features on disk


def write_features(
    models: Mapping[str, Any], source: Any, out: str, maps: bool, size: Any, shard: int = 1024
) -> tuple[Rows, dict[str, str]]:
    """Write features of a source as .npy shards; run again, it goes on where it stopped.

    COLUMN-00000.summary.npy is (n, C) float32; with maps, COLUMN-00000.patches.npy is (tokens, C)
    float16, images end to end. 00000.json, written last, names the pictures and their grids.
    Returns a row per shard, and the pictures left out, key -> reason.
    """
    rows, skipped = {}, dict[str, str]()
    hashes = [getattr(x, "fingerprint", None) or hash_weights(x) for x in models.values()]
    state = [source.fingerprint(), *models, *hashes, maps, size, shard]
    made_from = hashlib.sha256(repr(state).encode()).hexdigest()
    for start in range(0, len(source), shard):
        index = Path(out, f"{start // shard:05d}.json")
        if index.exists():
            if json.loads(index.read_text())["made_from"] != made_from:
                raise ValueError(f"{index} is of another source, model or size; change --out")
            continue
        part = Subset(source, range(start, min(start + shard, len(source))))
        found = extract(models, part, None if maps else 0, size)
        if rank_and_world()[0] == 0:
            _write_shard(found, index, made_from)
        rows[index.name] = {"value": len(found.samples), "skipped": len(found.skipped)}
        skipped |= found.skipped
    return rows, skipped


def _write_shard(found: FeatureSet, index: Path, made_from: str) -> None:
    """One shard's arrays, then its index; each file whole or not at all."""
    index.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{column}-{index.stem}.summary": x_NC for column, x_NC in found.summary.items()}
    for column, maps in found.patches.items():
        arrays[f"{column}-{index.stem}.patches"] = torch.cat([x.flatten(0, 1) for x in maps])
    for name, array in arrays.items():
        path = index.with_name(f"{name.replace('/', '.')}.npy")
        packing.write_whole(path, partial(np.save, arr=array.numpy()))
    grids = {column: [list(x.shape[:2]) for x in maps] for column, maps in found.patches.items()}
    about = ("key", "digest", "label", "caption")
    record: dict = {"made_from": made_from, "grids": grids, "skipped": found.skipped}
    record["pictures"] = [{name: getattr(x, name) for name in about} for x in found.samples]
    packing.write_whole(index, json.dumps(record, allow_nan=False).encode())


# ---- Reports


FEW = 50  # an interval of so many hits is nearly 0.3 wide (we chose)


def final_report(
    student: Any, control: Any, teachers: Any, train_source: Any, test_source: Any
) -> dict[str, Any]:
    """What a training run shows: kNN, fidelity and foreground IoU on held-out pictures.

    `control` is a `random_control` of the student. Teachers go by the names of its heads; cached
    ones must hold both sources.
    """
    if not len(test_source):
        return {"left out": {"the report": "no picture is held out"}, "skipped": {}}
    models = {"teacher": teachers, "student": student, "random": control, "pixels": RawPixels()}
    # Maps of 200 training pictures are plenty for the foreground probe and patch statistics.
    train, test = extract(models, train_source, 200), extract(models, test_source)
    foreground = partial(segmentation, foreground=True)
    report: dict[str, Any] = {"left out": {}}
    for name, protocol in (("knn", knn), ("foreground", foreground), ("fidelity", fidelity)):
        try:
            sides = comparable(train, test)
            train_size, held_out = (len(side.samples) for side in sides)
            report["pictures"] = {"training": train_size, "held out": held_out}
            report[name] = protocol(*sides)
        except ValueError as error:  # a user's pictures may have no labels or no masks
            report["left out"][name] = str(error)
    report["skipped"] = add_reasons(train.skipped, test.skipped)
    return report


def format_table(report: Mapping[str, Any]) -> str:
    """The report of `final_report` as text for a terminal or a README."""
    titles = {"knn": "20-NN accuracy", "foreground": "foreground IoU, linear probe"}
    titles["fidelity"] = "variance of the teacher explained"
    tables = [format_rows(title, report[x]) + "\n" for x, title in titles.items() if x in report]
    missing = [f"{name}: {why}" for name, why in report["left out"].items()]
    missing += packing.left_out(report.get("skipped", {}), 5)
    lines = [f"left out: {line}" for line in missing]
    if count := report.get("pictures"):
        few = "" if count["held out"] >= FEW else f": fewer than {FEW} are too few to judge by"
        lines.append(f"scored: {count['training']} {TRAINING}, {count['held out']} {HELD_OUT}{few}")
    return "\n".join([*tables, *lines])


def format_rows(title: str, rows: Rows) -> str:
    """Rows as a table: name, value, interval, and why one is missing."""
    width = max(map(len, [title, *rows])) + 2
    lines = [f"{title:<{width}}   value   95 % interval"]
    for name, row in rows.items():
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        span = f"{row['low']:.3f} to {row['high']:.3f}" if row.get("low") is not None else ""
        lines.append(f"{name:<{width}}{value:>8}   {span:<15}   {row.get('reason', '')}".rstrip())
    return "\n".join(lines)


# ---- Command line


# task -> the options that it cannot do without, and what every picture must have
NEEDS = {
    "knn": ("train test", "label"), "linear": ("train test", "label"),
    "zero-shot": ("train test text", "label"), "retrieval": ("train test text", "caption"),
    "segmentation": ("train test", "mask"), "merging": ("train test size", "mask"),
    "resolution": ("test sizes", ""), "pca": ("test", ""), "features": ("test out", ""),
}  # fmt: skip
PROTOCOLS: dict[str, Callable[..., Rows]] = {
    "knn": lambda args, train, test: knn(train, test, args.k),
    "linear": lambda _, train, test: linear(train, test),
    "zero-shot": lambda args, train, test: zero_shot(train, test, args.words, args.prompts),
    "retrieval": lambda args, train, test: retrieval(train, test, args.words),
    "segmentation": lambda args, train, test: segmentation(train, test, args.foreground),
    "merging": lambda _, train, test: merging(train, test),
    "resolution": lambda args, *sets: resolution(dict(zip(args.sizes, sets, strict=True))),
}


def run_task(args: argparse.Namespace, models: Any, train: Any, test: Any) -> tuple[Rows, dict]:
    """Figures, and what was left out, key -> reason."""
    if args.task == "features":
        return write_features(models, test, args.out, args.maps, args.size)
    if args.task == "pca":
        (pictures, skipped), out = first_pictures(test, 8), args.out or "pca.png"
        if not pictures:
            raise ValueError(f"--test {args.test}: none of {len(skipped)} pictures could be read")
        if rank_and_world()[0] == 0:
            pca_sheet(out, pictures, models, args.sizes or [args.size])
        return {out: {"value": len(pictures)}}, add_reasons({**test.skipped}, skipped)
    has_maps = args.task in ("segmentation", "merging", "resolution")
    is_curve = args.task == "resolution"
    asked = product([test], args.sizes) if is_curve else product([train, test], [args.size])
    sets = [extract(models, x, None if has_maps else 0, size) for x, size in asked]
    rows = PROTOCOLS[args.task](args, *sets)
    skipped = dict[str, str]()
    for found in sets:
        add_reasons(skipped, found.skipped)
    return rows, skipped


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = packing.Parser(description="Score encoders; the last line is JSON.")
    add, pixels = parser.add_argument, Number(low=1, high=2**14)
    add("task", choices=NEEDS)
    add("--student", help="[NAME=]PATH of a file or folder; what is no student is as --teacher")
    add("--teacher", action="append", default=[], help="[NAME=]PATH[@layer], e.g. builtin:vit-s")
    add("--train", help="SOURCE of the training pictures")
    add("--test", help="SOURCE of the pictures to score, draw or encode")
    add("--no-controls", action="store_true", help="leave out the random student and raw pixels")
    size = "give pictures the area of a square of this side, px: 224 makes photographs fast"
    add("--size", type=pixels, help=f"{size} (default: their own size)")
    add("--sizes", type=pixels, nargs="+", default=[], help="several --size (pca, resolution)")
    add("--k", type=Number(low=1), default=20, help="neighbours (default: %(default)s)")
    add("--text", default="", help="builtin:minilm, or [NAME=]PATH of a teacher with a text tower")
    lines = "file of templates, or 'captions' of the training pictures (default: a photo of a {}.)"
    add("--prompts", default="", help=lines)
    add("--foreground", action="store_true", help="segmentation: every class but 0 is one")
    add("--maps", action="store_true", help="features: write the patch maps too")
    add("--out", default="", help="folder of features, or picture (default: pca.png)")
    add("--seed", type=Number(low=0, high=2**63 - 1), default=0, help="default: 0; of all draws")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU, if any")
    args = parser.parse_args(argv)
    if missing := [name for name in NEEDS[args.task][0].split() if not getattr(args, name)]:
        parser.error(f"{args.task} needs {' and '.join(f'--{name}' for name in missing)}")
    if not args.student and not args.teacher:
        parser.error("nothing to score: pass --student PATH, --teacher PATH or both")
    if args.task == "merging":  # squares, so that all grids are equal
        args.size = (args.size, args.size)
    return args


def load_named(flag: str, text: str, load: Callable) -> Any:
    """What a flag names; errors say that flag, as a student may be read as a teacher is."""
    try:
        return load(parse_teacher(text))
    except (ValueError, OSError, ImportError) as error:
        said = str(error)
        if said.startswith("teacher "):
            said = said.partition(": ")[2] or said
        raise ValueError(f"{flag} {text}: {said}") from error


def load_either(spec: TeacherSpec, device: torch.device) -> Any:
    """A student, or what is none and is read as a teacher."""
    if is_student(Path(spec.path)):
        return load_student(spec.path, device=str(device))
    return load_teacher(spec, device)


def load_models(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The first part of columns' names -> encoder: teachers, a student, its controls."""
    models: dict[str, Any] = {}
    for text in args.teacher:
        path = f"builtin:{text}" if text in {*WHEELS, *TINY} else text
        teacher = load_named("--teacher", path, partial(load_teacher, device=device))
        if f"teacher/{teacher.name}" in models:
            other = f"OTHER={parse_teacher(path).path}"
            raise ValueError(f"--teacher {text}: two are called {teacher.name}: pass {other}")
        models[f"teacher/{teacher.name}"] = teacher
    controls = not args.no_controls and args.task not in ("pca", "features")
    if args.student:
        load = partial(load_either, device=device)
        models["student"] = load_named("--student", args.student, load)
        if controls and isinstance(models["student"], Student):
            models["random"] = random_control(models["student"], args.seed)
    for model in models.values():
        model.precision = "auto"  # bf16 on CUDA
    return models | ({"pixels": RawPixels()} if controls else {})


def load_words(text: str) -> Words:
    """The text tower that --text names."""
    tower = load_named("--text", text, load_text)

    def embed(texts: list[str]) -> Tensor:
        return torch.cat([tower(texts[i : i + 256]) for i in range(0, len(texts), 256)])

    return Words(embed, parse_teacher(text).name)


def check_fields(args: argparse.Namespace, models: Any, train: Any, test: Any) -> None:
    """What a task cannot do without is missed before anything is decoded or encoded."""
    field, heads = NEEDS[args.task][1], {name.removeprefix("teacher/") for name in models}
    needs = [("--train", train, field), ("--test", test, field)] if field else []
    if isinstance(student := models.get("student"), Student):
        heads |= {head.name for head in student.config.heads}
    if args.task == "zero-shot" and (args.prompts == "captions" or args.words.head not in heads):
        needs.append(("--train", train, "caption"))
    for flag, source, what in needs:
        records = (source.record(i) for i in range(len(source)))
        # A drawing's record says how it is drawn; its mask comes of that.
        bare = [record["key"] for record in records if what not in record and "spec" not in record]
        least = LEAST[TRAINING if flag == "--train" else HELD_OUT]
        refuse_few(f"pictures in {flag}", len(source), bare, [without(what)], least)


def main(argv: Sequence[str] | None = None) -> None:
    args, start = parse_args(argv), time.time()
    try:
        group = packing.setup_distributed(device=args.device)
        sources = [x and packing.open_source(x, args.seed) for x in (args.train, args.test)]
        models = load_models(args, group.device)
        args.words = load_words(args.text) if args.text else None
        check_fields(args, models, *sources)
        rows, skipped = run_task(args, models, *sources)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"eval.py {args.task}: {error}")
    if group.rank == 0:
        if args.task in ("pca", "features"):
            print(*(f"{name}: {row['value']} pictures" for name, row in rows.items()), sep="\n")
        else:
            print(format_rows(args.task, rows))
        print(*(f"left out: {line}\n" for line in packing.left_out(skipped, 5)), sep="", end="")
        n_train, n_test = (source and len(source) for source in sources)
        result = {"task": args.task, "n_train": n_train, "n_test": n_test, "rows": rows}
        result |= {"skipped": skipped, "seconds": round(time.time() - start, 1)}
        print(json.dumps(result, allow_nan=False))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
