"""eval.py against slow loops, scikit-learn and cases whose answer is known."""

import itertools
import json
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval as ev
import packing
from losses import align
from model import MODELS, AdapterSpec, Features, Student, save_student, with_heads
from packing import BadImage, Sample, open_source, to_float
from teachers import TeacherOutput

LABELS = ["cat", "dog", "owl"]
NAMES = ["red cat", "blue dog", "green owl"]


class Pictures:
    """A source of small made-up pictures: a bright square, whose colour is its class, on noise."""

    name, skipped = "pictures", {}

    def __init__(self, count=24, seed=0, side=(48, 64), bad=(), **without):
        self.count, self.seed, self.side, self.bad, self.without = count, seed, side, bad, without

    def __len__(self):
        return self.count

    def key(self, i):
        return f"{self.seed}-{i}"

    def record(self, i):
        return {"key": self.key(i)}

    def fingerprint(self):
        return f"{self.count} {self.seed}"

    def load(self, i, _=None):
        if i in self.bad:
            raise BadImage(f"{self.key(i)}: cut")
        rng = np.random.default_rng([self.seed, i])
        h, w = rng.integers(self.side[0], self.side[1] + 1, 2)
        image, mask = rng.integers(0, 90, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8)
        y, x, k = rng.integers(0, h // 2), rng.integers(0, w // 2), i % 3
        mask[y : y + h // 2, x : x + w // 2] = 1 + k
        image[mask > 0, k] += 150
        sample = Sample(self.key(i), f"d{self.seed}-{i}", image, LABELS[k], NAMES[k], mask)
        return replace(sample, **self.without)


class Network:
    """A frozen random network on patches of 8 px: an encoder, and (`Teacher`) a teacher."""

    def __init__(self, seed=0, dim=12):
        self.weight = torch.randn(192, dim, generator=torch.Generator().manual_seed(seed)) / 8

    def map(self, image):
        h, w = (max(1, round(side / 8)) for side in image.shape[1:])
        patches = packing.patchify(packing.resize(image, (8 * h, 8 * w)), 8)
        return torch.tanh(patches @ self.weight).unflatten(0, (h, w))


class Teacher(Network):
    def targets(self, samples):
        maps = [self.map(to_float(sample.image)) for sample in samples]
        return TeacherOutput(torch.stack([x.mean((0, 1)) for x in maps]), maps)


class Heads:
    """A student by hand: name -> the network that the head is."""

    def __init__(self, **networks):
        self.networks = networks

    def encode(self, images):
        found = []
        for image in images:
            maps = {name: network.map(image) for name, network in self.networks.items()}
            found.append(Features({name: x.mean((0, 1)) for name, x in maps.items()}, maps))
        return found


def models(size=12):
    """Two teachers; a student whose head "a" is teacher a, whose head "b" is something else."""
    teachers = {"a": Teacher(0, size), "b": Teacher(1, size)}
    student = Heads(a=Network(0, size), b=Network(7, size), trunk=Network(0, size))
    return {"teacher": teachers, "student": student, "pixels": ev.RawPixels()}


@pytest.fixture(scope="module")
def sets():
    return ev.extract(models(), Pictures(60)), ev.extract(models(), Pictures(30, seed=1))


def words_of(texts):
    """A text tower by hand: the mean of a random vector for each word, a dot apart."""
    rows = []
    for text in texts:
        seeds = [sum(map(ord, word)) for word in text.lower().replace(".", "").split()]
        each = [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        rows.append(torch.stack(each).mean(0))
    return torch.stack(rows)


WORDS = ev.Words(words_of)


def only(sets, *names):
    """The same pictures with these columns alone."""
    pick = [[{n: x[n] for n in names} for x in (s.summary, s.patches)] for s in sets]
    return [replace(s, summary=x, patches=y) for s, (x, y) in zip(sets, pick, strict=True)]


def labelled(labels, digests=None, **summary):
    """A feature set of these labels and summaries, without pictures."""
    empty = np.zeros((0, 0, 3), np.uint8)
    digests = digests or [f"{labels}{i}" for i in range(len(labels))]
    pairs = enumerate(zip(labels, digests, strict=True))
    samples = [Sample(f"p{i}", digest, empty, label) for i, (label, digest) in pairs]
    return ev.FeatureSet(samples, {name: torch.as_tensor(x) for name, x in summary.items()})


# ------------------------------------------------------------------- features


def test_chunks_change_nothing():
    whole = ev.extract(models(), Pictures(9))
    parts = ev.extract(models(), Pictures(9), chunk=2)
    assert [s.key for s in whole.samples] == [s.key for s in parts.samples]
    for name in ("teacher/a", "student/b", "pixels"):
        assert torch.equal(whole.summary[name], parts.summary[name])
        both = zip(whole.patches[name], parts.patches[name], strict=True)
        assert all(torch.equal(x, y) for x, y in both)


def test_packing_changes_nothing():
    student = Student(MODELS["test"])
    one, many = (ev.extract(student, Pictures(6), chunk=chunk) for chunk in (1, 6))
    for name, x in one.summary.items():
        torch.testing.assert_close(x, many.summary[name], atol=1e-5, rtol=1e-4)


def test_bad_pictures_are_named_and_dense_is_spread():
    found = ev.extract(models(), Pictures(10, bad=(3,)), dense=5)
    assert found.skipped == {"0-3": "0-3: cut"} and len(found.samples) == 9
    assert [found.samples[i].key for i in found.dense] == ["0-0", "0-2", "0-4", "0-6", "0-8"]
    assert len(found.patches["pixels"]) == 5 and found.summary["pixels"].shape == (9, 768)
    assert ev.extract(models(), Pictures(3), dense=0).patches == {}
    assert ev.extract(models(), Pictures(2, bad=(0, 1))).samples == []


def test_ranks_share_a_source_and_gather_it_in_its_order(monkeypatch):
    source, parts = Pictures(9, bad=(3,)), [None, None]
    whole = ev.extract(models(), source, dense=5)

    def gather(everyone, mine):
        parts[ev.rank_and_world()[0]] = mine
        everyone[:] = [part or ({}, {}) for part in parts]

    monkeypatch.setattr(ev.dist, "all_gather_object", gather)
    for rank in (1, 0):  # the second has what the first one sent
        monkeypatch.setattr(ev, "rank_and_world", lambda rank=rank: (rank, 2))
        found = ev.extract(models(), source, dense=5)
    assert [sorted(part[0]) for part in parts] == [[0, 2, 4, 6, 8], [1, 5, 7]]
    assert [s.key for s in found.samples] == [s.key for s in whole.samples]
    assert (found.skipped, found.dense) == (whole.skipped, whole.dense)
    for name, x in whole.summary.items():
        assert torch.equal(x, found.summary[name])
        both = zip(whole.patches[name], found.patches[name], strict=True)
        assert all(torch.equal(x, y) for x, y in both)


def test_at_size():
    sample = Pictures(1, side=(40, 80)).load(0)
    h, w = sample.image.shape[:2]
    height, width = ev.at_size(sample, 100).image.shape[:2]
    assert abs(height * width - 1e4) < 150 and abs(height / width - h / w) < 0.03
    assert ev.at_size(sample, (32, 48)).image.shape == (32, 48, 3)
    assert ev.at_size(sample, None) is sample


def test_a_picture_in_both_sets_is_refused(sets):
    for protocol in (ev.knn, ev.linear, ev.segmentation):
        with pytest.raises(ValueError, match=r"0-0 \(= 0-0\)"):
            protocol(sets[0], sets[0])
    with pytest.raises(ValueError, match="both train and test"):
        ev.retrieval(sets[0], sets[0], WORDS)


def test_a_picture_is_known_by_its_content_not_by_its_name():
    """Keys are p0, p1, ... on both sides; only the test's p2 has the content of one in training."""
    train = labelled("aabb", ["sky", "air", "sea", "bay"], m=torch.eye(2).repeat_interleave(2, 0))
    others = labelled("aab", ["dew", "fog", "ice"], m=torch.eye(3, 2))
    for protocol in (ev.knn, ev.linear):
        test = labelled("aab", ["dew", "fog", "sea"], m=torch.eye(3, 2))
        rest = labelled("aa", ["dew", "fog"], m=torch.eye(2))
        assert protocol(train, test) == protocol(train, rest)
        assert (
            test.skipped == {"p2": "held-out pictures in both train and test"}
            and rest.skipped == {}
        )
        assert protocol(train, others)["m"]["n"] == 3 and others.skipped == {}


# ------------------------------------------------------------------- figures


def test_bootstrap_covers():
    generator, covered = torch.Generator().manual_seed(0), 0
    for seed in range(200):
        hits = torch.rand(80, generator=generator) < 0.7
        row = ev.bootstrap(hits.double()[:, None], lambda means: means[..., 0], seed)
        covered += row["low"] <= 0.7 <= row["high"]
    assert 180 <= covered <= 199
    assert row["value"] == pytest.approx(float(hits.double().mean())) and row["n"] == 80


def test_the_interval_is_of_95_percent():
    """Of the mean of 1,000 uniform figures: 2 * 1.96 * sqrt(1 / 12 / 1000) = 0.0358 wide."""
    draws = []
    row = ev.bootstrap(
        torch.arange(1000.0)[:, None] / 1000, lambda means: (draws.append(means), means[..., 0])[1]
    )
    assert sum(len(means) for means in draws if means.dim() == 2) == 1000
    assert row["high"] - row["low"] == pytest.approx(0.0358, rel=0.06)
    assert (row["high"] + row["low"]) / 2 == pytest.approx(row["value"], abs=0.002)


def test_knn_votes_equal_a_loop_and_sklearn():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 8, generator=generator) for n in (50, 20))
    ids = torch.randint(4, (50,), generator=generator)
    votes = ev.knn_votes(train, ids, test, 4, k=7)
    for row, x in zip(votes, test, strict=True):
        cosines = [float(F.cosine_similarity(x, y, dim=0)) for y in train]
        want = [0.0] * 4
        for i in sorted(range(50), key=lambda i: -cosines[i])[:7]:
            want[int(ids[i])] += np.exp(cosines[i] / 0.07)
        np.testing.assert_allclose(row, want, rtol=1e-4)
    neighbors = pytest.importorskip("sklearn.neighbors")
    reference = neighbors.KNeighborsClassifier(
        7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train.numpy(), ids.numpy())
    assert (reference.predict(test.numpy()) == votes.argmax(1).numpy()).all()


def test_majority_class():
    train, test = labelled("aab", m=torch.eye(3, 4)), labelled("abbb", m=torch.eye(4, 4))
    assert ev.knn(train, test)["majority class"]["value"] == 0.25


@pytest.mark.parametrize(("other", "k", "value"), [(0.945, 1, 0), (0.945, 3, 1), (0.945, 20, 1),
                                                   (0.938, 3, 0)])  # fmt: skip
def test_the_nearest_vote_by_hand(other, k, value):
    """One at cosine 0.99 is outvoted by two that are nearer to it than 0.07 log 2 = 0.0485."""
    rows = [[x, (1 - x**2) ** 0.5] for x in (0.99, other, other)]
    train, test = labelled("baa", m=rows), labelled("aaaa", m=[[1.0, 0.0]] * 4)
    assert ev.knn(train, test, k)["m"]["value"] == value


def test_heads_are_joined_at_unit_length():
    """Cosines with x and y: 1 and 0 in one head, 0.5 and 1 in the other, which is longer."""
    train = {"s/a": [[1.0, 0], [0, 1]], "s/b": [[50, 50 * 3**0.5], [100, 0]]}
    test = {"s/a": [[1.0, 0]], "s/b": [[100.0, 0]]}
    rows = ev.knn(labelled("xy", **train), labelled(["x"], **test), k=1)
    assert [rows[name]["value"] for name in ("s/a", "s/b", "s/concat")] == [1, 0, 1]


def test_an_ensemble_by_hand():
    """Entropies 0.3251 and 0.6931, so the weights are softmax(-1.6254, -3.4657) = .8630, .1370."""
    heads = {"s/a": torch.tensor([[0.9, 0.1]]), "s/b": torch.tensor([[0.5, 0.5]])}
    mixed = ev.add_ensembles(heads)["s/ensemble"]
    torch.testing.assert_close(mixed, torch.tensor([[0.8452, 0.1548]]), atol=1e-4, rtol=0)


def test_ensemble_weighs_the_sure_head_only_when_calibrated():
    sure, unsure = torch.tensor([[0.9, 0.0, 0.1]]), torch.tensor([[0.1, 0.2, 0.15]])
    raw = ev.add_ensembles({"s/a": sure.softmax(1), "s/b": unsure.softmax(1)})["s/ensemble"]
    torch.testing.assert_close(raw, (sure.softmax(1) + unsure.softmax(1)) / 2, atol=0.05, rtol=0)
    hot = {"s/a": (sure / 0.05).softmax(1), "s/b": unsure.softmax(1)}
    torch.testing.assert_close(ev.add_ensembles(hot)["s/ensemble"], hot["s/a"], atol=0.02, rtol=0)
    assert "s/ensemble" not in ev.add_ensembles({"s/a": sure, "s/trunk": sure, "t": sure})


def test_calibration_finds_the_temperature_in_training():
    """Of the drawn targets' own temperature the chances are those that they were drawn by."""
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(4000, 5, generator=generator), torch.randn(8, 5, generator=generator)
    targets = (train / 0.3).softmax(1).multinomial(1, generator=generator)[:, 0]
    found = ev.calibrated({"x": [train, test]}, targets)
    torch.testing.assert_close(found["x"], (test / 0.3).softmax(1), atol=0.05, rtol=0)


def test_linear_probe_is_near_sklearn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator)
    noise = torch.randn(400, 3, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator) + noise).argmax(1)
    scaled = (x - x.mean(0)) / x.std(0)
    ours = ev.fit_probe(x, y, 3, [5e-2], [1e-2])(x)[0].softmax(1)
    reference = linear_model.LogisticRegression(C=1 / (400 * 1e-2)).fit(scaled.numpy(), y.numpy())
    np.testing.assert_allclose(ours, reference.predict_proba(scaled.numpy()), atol=0.02)


def test_a_probe_is_at_the_minimum_of_its_loss():
    generator = torch.Generator().manual_seed(0)
    x, l2 = 3 * torch.randn(300, 5, generator=generator) + 2, 0.05
    y = (x[:, :3] + 3 * torch.randn(300, 3, generator=generator)).argmax(1)
    y[::5] = ev.VOID  # teaches nothing
    probe = ev.fit_probe(x, y, 3, [5e-2], [l2])
    z = (x - x.mean(0)) / x.std(0)
    weight = (probe.weight_GCK[0] * x.std(0)[:, None]).requires_grad_()
    bias = (probe.bias_GK[0] + x.mean(0) @ probe.weight_GCK[0]).requires_grad_()
    known = y != ev.VOID
    loss = F.cross_entropy((z @ weight + bias)[known], y[known]) + l2 / 2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 2e-3
    assert weight.abs().max() > 0.2


def test_a_penalty_is_chosen_on_pictures_held_out_and_all_are_fitted_then(monkeypatch):
    """Fifty channels of noise and one that tells: what was fitted is right with any penalty."""
    fitted, whole = [], ev.fit_probe
    monkeypatch.setattr(
        ev, "fit_probe", lambda x, *more: (fitted.append(len(x)), whole(x, *more))[1]
    )
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 50, generator=generator), torch.arange(60) % 2
    x[:, 0] += 2 * y
    train, test = labelled([str(int(k)) for k in y], m=x), labelled(["0", "1"], m=x[:2])
    fit, held = ev.split(60)
    assert (len(fit), len(held)) == (48, 12) and sorted([*fit, *held]) == list(range(60))
    assert ev.linear(train, test)["m"]["l2"] > 0
    assert fitted == [48, 60]


def test_no_setting_depends_on_what_is_tested(sets, monkeypatch):
    """Probes of the same training and other test pictures are the same; so are temperatures."""
    train, test = only(sets, "student/b")
    changed = [
        replace(s, label=LABELS[i // 7 % 3], mask=(s.mask + 1) % 4, caption=NAMES[i // 7 % 3])
        for i, s in enumerate(test.samples)
    ]
    seen = []
    for name in ("calibrated", "choose_probe"):
        whole = getattr(ev, name)

        def watch(*args, whole=whole):
            seen.append(whole(*args))
            return seen[-1]

        monkeypatch.setattr(ev, name, watch)
    protocols = (ev.linear, lambda *x: ev.zero_shot(*x, WORDS), ev.segmentation)
    one, two = (
        [protocol(train, x) for protocol in protocols]
        for x in (test, replace(test, samples=changed))
    )
    assert all(x != y for x, y in zip(one, two, strict=True))
    assert one[0]["student/b"]["l2"] == two[0]["student/b"]["l2"]
    (chances, probe), (others, other) = seen[:2], seen[2:]
    torch.testing.assert_close(chances, others, atol=0, rtol=0)
    assert all(torch.equal(x, y) for x, y in zip(probe, other, strict=True))


# ------------------------------------------------------------------- text


def test_recall_equals_a_loop_and_a_tie_does_not_help():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 9, generator=generator)
    is_pair = torch.rand(12, 9, generator=generator) < 0.2
    is_pair[:, 0] |= ~is_pair.any(1)
    for k in (1, 5):
        hits = ev.recall_hits(scores, is_pair, k)
        for row, pairs, hit in zip(scores, is_pair, hits, strict=True):
            first = sorted(range(9), key=lambda i: -float(row[i]))[:k]
            assert bool(hit) == any(bool(pairs[i]) for i in first)
    collapsed = ev.recall_hits(torch.zeros(4, 4), torch.eye(4).bool(), 1)
    assert not collapsed.any()


def test_ridge_map_recovers_a_linear_one():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 10, generator=generator), torch.randn(10, 4, generator=generator)
    found = ev.fit_text_map(x, x @ y + 1)(x)
    assert F.cosine_similarity(found - 1, x @ y).min() > 0.99


def test_a_ridge_penalty_is_chosen_on_pairs_held_out():
    """Texts that have nothing to do with the pictures: the largest penalty says their mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 30, generator=generator), torch.randn(40, 3, generator=generator)
    assert (ev.fit_text_map(x, y)(x) - y.mean(0)).square().mean() < 0.2 * y.var()


def test_a_ridge_map_is_fitted_to_all_pairs_in_the_end():
    """Each picture has a channel of its own, so that only its own pair can teach its text."""
    y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    found = ev.fit_text_map(torch.eye(10), y)(torch.eye(10))
    assert F.cosine_similarity(found - y.mean(0), y - y.mean(0)).min() > 0.99


def test_templates_are_averaged_at_unit_length(tmp_path):
    """Class a: texts at 0 and 90 degrees, one ten times as long; b: at -20. The picture: at 10."""

    def at(degrees, length=1.0):
        angle = np.radians(degrees)
        return [float(length * np.cos(angle)), float(length * np.sin(angle))]

    (tmp_path / "prompts.txt").write_text("one {}\ntwo {}\n")
    rows = {"one a": at(0, 10), "two a": at(90), "one b": at(-20), "two b": at(-20)}
    words = ev.Words(lambda texts: torch.tensor([rows[text] for text in texts]), "x")
    train = labelled("aabb", **{"student/x": torch.tensor([at(45), at(46), at(-20), at(-21)])})
    test = labelled("bb", **{"student/x": torch.tensor([at(10), at(10)])})
    found = ev.zero_shot(train, test, words, str(tmp_path / "prompts.txt"))
    assert found["student/x"]["value"] == 1  # 30 degrees to b, 35 to a
    assert found["majority class"]["value"] == 0  # b is no more frequent than a, which comes first


def test_prompt_files_and_class_names(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("the {}\n\n  a {} in a cage, {braces}\n")
    found = ev.class_texts(str(path), ["red_fox", "owl"], None)
    assert found == [[f"the {x}", f"a {x} in a cage, {{braces}}"] for x in ("red fox", "owl")]
    assert ev.class_texts("", ["red_fox"], None) == [["a photo of a red fox."]]
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="for the class name"):
        ev.class_texts(str(path), ["owl"], None)


def test_a_student_is_read_by_the_map_of_its_teacher_and_others_by_a_probe():
    """The student says what its teacher says, but of other pictures in training: a map of its own
    would be another. The trunk and a head without a teacher have maps of their own."""
    generator = torch.Generator().manual_seed(0)
    teacher, tested = (torch.randn(n, 6, generator=generator) for n in (60, 8))
    texts, asked = (torch.randn(n, 4, generator=generator) for n in (60, 5))
    columns = ("teacher/a", "student/a", "student/b", "student/trunk", "pixels")
    train = labelled(["x"] * 60, **dict.fromkeys(columns, teacher.flip(0)))
    train.summary["teacher/a"] = teacher
    train.samples = [replace(s, caption=f"{i}\nmore") for i, s in enumerate(train.samples)]
    test = labelled(["x"] * 8, **dict.fromkeys(columns, tested))
    words = ev.Words(lambda lines: texts[[int(line) for line in lines]])
    found = ev.similarities(train, test, words, [asked, 3 * asked])
    assert list(found) == ["teacher/a", "student/a", *(f"probe {name}" for name in columns[2:])]
    for name, (_, said) in found.items():
        fitted = teacher.flip(0) if name.startswith("probe") else teacher
        want = ev.fit_text_map(fitted, F.normalize(texts))(tested)
        cosines = F.cosine_similarity(want[:, None], asked[None], dim=2)
        torch.testing.assert_close(said, cosines, atol=1e-5, rtol=1e-4)
    assert list(ev.head_groups(["probe s/a", "probe s/b", "probe s/trunk"])) == ["probe s"]


def test_zero_shot_and_retrieval_find_what_is_there(sets):
    zero = ev.zero_shot(*sets, WORDS, prompts="captions")
    assert zero["teacher/a"]["value"] > 0.9 and "student/ensemble" in zero
    found = ev.retrieval(*sets, WORDS)
    assert found["teacher/a texts by images R@1"]["value"] > 0.9
    assert found["teacher/a images by texts R@1"]["n"] == 3  # three captions
    assert found["student/ensemble images by texts R@10"]["value"] == 1
    assert found["floor texts by images R@1"]["value"] == pytest.approx(1 / 3)


def test_the_floor_of_recall_is_that_of_all_orders():
    is_pair = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    for k in (1, 2, 4, 7):
        orders = [order[:k] for order in itertools.permutations(range(5))]
        want = [np.mean([any(row[i] for i in order) for order in orders]) for row in is_pair]
        np.testing.assert_allclose(ev.recall_floor(is_pair, k), want, rtol=1e-5)


def test_a_tower_meets_its_own_head_without_a_map(sets):
    """Without captions nothing can be mapped: its head alone is scored."""
    train, test = sets
    means = torch.stack([train.summary["teacher/a"][i::3].mean(0) for i in range(3)])
    of = {f"a photo of a {name}.": row for name, row in zip(LABELS, means, strict=True)}
    words = ev.Words(lambda texts: torch.stack([of[text] for text in texts]), "a")
    bare = replace(train, samples=[replace(s, caption=None) for s in train.samples])
    said = (F.normalize(test.summary["teacher/a"]) @ F.normalize(means).T).argmax(1)
    want = float((said == torch.arange(30) % 3).double().mean())
    rows = ev.zero_shot(bare, test, words)
    assert list(rows) == ["teacher/a", "student/a", "majority class"]
    assert rows["student/a"]["value"] == pytest.approx(want)
    with pytest.raises(ValueError, match="few training pictures: 60 of 60 are without a caption"):
        ev.zero_shot(bare, test, words._replace(head="other"))


# ------------------------------------------------------------------- fidelity


def test_fidelity_equals_loops():
    generator = torch.Generator().manual_seed(0)
    train, teacher = (3 * torch.randn(n, 5, generator=generator) + 2 for n in (40, 12))
    student = teacher + torch.randn(12, 5, generator=generator)
    row = ev.Fidelity([train]).report(zip(student.split(1), teacher.split(1), strict=True))
    mean, deviation = train.mean(0), train.std(0, correction=0)
    z, s = (teacher - mean) / deviation, (student - mean) / deviation
    explained = 1 - (z - s).square().mean() / z.var(0, correction=0).mean()
    assert row["value"] == pytest.approx(float(explained), rel=1e-5)
    constant = ev.Fidelity([train]).report((train.mean(0)[None], x) for x in teacher.split(1))
    wanted = 1 - z.square().mean() / z.var(0, correction=0).mean()
    assert constant["value"] == pytest.approx(float(wanted), rel=1e-4)
    fidelity = teacher.var(correction=0) / (teacher - student).square().mean()
    assert row["fidelity"] == pytest.approx(float(fidelity), rel=1e-5)
    assert row["cosine"] == pytest.approx(float(F.cosine_similarity(student, teacher).mean()))
    assert row["low"] < row["value"] < row["high"]


def test_the_training_mean_scores_as_the_constant():
    generator = torch.Generator().manual_seed(0)
    train, teacher = (torch.randn(n, 5, generator=generator) + 9 for n in (40, 12))
    pairs = [(train.mean(0, keepdim=True), x) for x in teacher.split(1)]
    row = ev.Fidelity([train]).report(pairs)
    found = [ev.FeatureSet(summary={"teacher/a": x}, patches={"teacher/a": []})
             for x in (train, teacher)]  # fmt: skip
    found[1].summary["student/a"] = torch.zeros_like(teacher)
    same = ev.fidelity(*found)["constant/a summary"]
    assert row["value"] == pytest.approx(same["value"], abs=1e-5) and row["value"] < 0
    assert row["fidelity"] == pytest.approx(same["fidelity"], rel=1e-4)
    assert row["cosine"] > 0.9  # the trap


@pytest.mark.parametrize("n", [16, 81])
def test_an_interval_of_the_variance_explained_holds_its_value(n):
    sides = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        train, teacher, noise = (torch.randn(m, 24, generator=generator) for m in (500, n, n))
        student, measure = 0.6 * teacher + 0.1 * noise, ev.Fidelity([train])
        row = measure.report(zip(student.split(1), teacher.split(1), strict=True))
        assert row["low"] < row["value"] < row["high"]
        sides.append((row["value"] - row["low"]) / (row["high"] - row["value"]))
        constant = measure.report((measure.mean_C[None], x) for x in teacher.split(1))
        assert constant["low"] < constant["value"] < constant["high"]
    assert 0.5 < np.mean(sides) < 2  # in the middle of it


def test_the_interval_is_a_bootstrap_about_the_held_out_mean():
    generator = torch.Generator().manual_seed(0)
    train, teacher, student = (torch.randn(n, 3, generator=generator) for n in (50, 20, 20))
    row = ev.Fidelity([train]).report(zip(student.split(1), teacher.split(1), strict=True))
    scale, rng = train.std(0, correction=0).numpy(), np.random.default_rng(0)
    error = (((student - teacher).numpy() / scale) ** 2).mean(1)
    spread = (((teacher - teacher.mean(0)).numpy() / scale) ** 2).mean(1)
    picks = rng.integers(20, size=(4000, 20))
    low, high = np.quantile(1 - error[picks].sum(1) / spread[picks].sum(1), [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.06)


def test_fidelity_is_scaled_by_the_training_pictures(sets):
    train, test = only(sets, "teacher/b", "student/b")
    scale = torch.linspace(0.5, 3, 12)  # training features of other scales than those tested
    train.summary["teacher/b"] = train.summary["teacher/b"] * scale + 1
    train.patches["teacher/b"] = [x * scale + 1 for x in train.patches["teacher/b"]]
    rows, sides = ev.fidelity(train, test), ("student/b", "teacher/b")
    known = {"summary": train.summary["teacher/b"].split(1), "patches": train.patches["teacher/b"]}
    shown = {"summary": [test.summary[x].split(1) for x in sides],
             "patches": [test.patches[x] for x in sides]}  # fmt: skip
    for part, maps in known.items():
        rows_MC = torch.cat([x.reshape(-1, 12) for x in maps]).double()
        variance, images = rows_MC.var(0, correction=0), zip(*shown[part], strict=True)
        error, off = [], []
        for ours, theirs in images:
            ours, theirs = (x.reshape(-1, 12).double() for x in (ours, theirs))
            error.append(((ours - theirs).square() / variance).mean(0))
            off.append(
                torch.stack(
                    [
                        ((theirs - rows_MC.mean(0)) / variance.sqrt()).square().mean(0),
                        ((theirs - rows_MC.mean(0)) / variance.sqrt()).mean(0),
                    ]
                )
            )
        square, mean = torch.stack(off).mean(0)
        expected = 1 - torch.stack(error).mean(0).mean() / (square - mean.square()).mean()
        assert rows[f"student/b {part}"]["value"] == pytest.approx(float(expected), rel=1e-4)


def test_a_dead_channel_is_left_out():
    train = torch.cat([torch.randn(20, 3), torch.zeros(20, 1)], 1)
    teacher = torch.cat([torch.randn(6, 3), torch.ones(6, 1)], 1)
    row = ev.Fidelity([train]).report([(x, x) for x in teacher.split(1)])
    assert row["value"] == 1 and row["fidelity"] is None and "no error" in row["reason"]


def test_a_figure_without_denominator_is_none_with_its_reason_and_no_part_of_a_mean(sets):
    train, test = only(sets, "teacher/a", "student/a", "teacher/b", "student/b")
    for found in (train, test):
        first_C = found.summary["teacher/a"][0]
        found.summary["teacher/a"] = first_C.expand(len(found.samples), -1)
    rows = ev.fidelity(train, test)
    row = rows["student/a summary"]
    assert row["value"] is row["low"] is row["high"] is None
    assert row["reason"] == "value: the teacher says the same of all held-out pictures"
    left = [rows[f"student/{part}"]["value"] for part in ("a patches", "b summary", "b patches")]
    assert rows["student mean"] == {"value": pytest.approx(np.mean(left)), "parts": 3}
    assert ev.finite({"value": float("inf"), "n": 2}, value="x") == {
        "value": None, "n": 2, "reason": "value: x"}  # fmt: skip
    assert ev.scale_variance([[torch.ones(2, 2, 3)]] * 2)["value"] is None
    table = ev.format_rows("t", rows | {"none": row})
    assert "       -   " in table and "says the same of all" in table
    json.dumps(rows, allow_nan=False)


def test_grids_are_compared_as_the_losses_do():
    student, teacher = torch.randn(7, 4, 3), torch.randn(5, 6, 3)
    for ours, theirs in zip(ev.same_grid(student, teacher), align(student, teacher), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("before", "after"), [((6, 1), (4, 1)), ((7, 4), (3, 1))])
def test_a_map_that_becomes_one_column_is_resized_as_its_transpose(before, after):
    map_hwC = torch.arange(before[0] * before[1] * 8.0).view(*before, 8)  # a ramp stays in order
    tall = ev.resize_map(map_hwC, after)
    wide = ev.resize_map(map_hwC.transpose(0, 1), after[::-1]).transpose(0, 1)
    torch.testing.assert_close(tall, wide)
    assert (tall.diff(dim=0) > 0).all() and (tall.diff(dim=2) > 0).all()


# ------------------------------------------------------------------- segmentation


def test_miou_equals_sklearn_and_void_is_left_out():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 4, (9, 7)).astype(np.uint8) for _ in range(5)]
    said = [rng.integers(0, 6, (9, 7)) for _ in range(5)]  # class 4 and 5 are in no mask
    masks[0][0] = ev.VOID
    counts = [
        ev.overlap(torch.from_numpy(s)[None], torch.from_numpy(m), 6)[0]
        for s, m in zip(said, masks, strict=True)
    ]
    ours = ev.iou(torch.stack(counts).sum(0), 6)
    true, guess = (np.concatenate([x.ravel() for x in y]) for y in (masks, said))
    known = true != ev.VOID
    want = metrics.jaccard_score(true[known], guess[known], labels=[0, 1, 2, 3], average=None)
    np.testing.assert_allclose(ours[:4], want)
    assert ours[4:].isnan().all()


def test_iou_by_hand():
    """Of three classes: hit, labelled, predicted. One that no mask has is no class of the mean."""
    found = ev.iou(torch.tensor([2, 0, 0, 3, 1, 0, 2, 1, 1]), 3)
    assert found[:2].tolist() == [2 / 3, 0.0] and found[2].isnan()
    assert ev.iou(torch.tensor([[4, 1], [2, 2]]).repeat(1, 3), 2).tolist() == [[1, 1], [1, 1]]


def test_tokens_are_labelled_by_the_pixel_at_their_centre():
    mask = torch.arange(16, dtype=torch.uint8).view(4, 4)
    tokens, labels = ev.token_labels([torch.zeros(2, 2, 3), torch.zeros(4, 4, 3)], [mask, mask])
    assert labels.tolist() == [5, 7, 13, 15, *range(16)] and tokens.shape == (20, 3)


def test_logits_are_resized_between_pixel_centres():
    """Two tokens over eight pixels, 4 apart: from -3 to 1 the line crosses 0 at pixel 4.5."""
    probe = ev.Probe(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 2))
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.uint8)
    sums = ev.overlaps(probe, [torch.tensor([[[-3.0], [1.0]]])], [mask], 2)
    assert sums.tolist() == [[[4, 3, 4, 4, 5, 3]]]  # hit, labelled, predicted


def test_a_probes_rate_and_threshold_are_chosen_on_pictures_held_out(monkeypatch):
    """The pictures have sizes of their own, so that the counts tell which ones were used."""
    generator, fitted, scored = torch.Generator().manual_seed(0), [], []
    maps = [torch.randn(2, 2 + i, 3, generator=generator) for i in range(10)]
    masks = [torch.randint(2, (4, 7 + 3**i), generator=generator).byte() for i in range(10)]
    whole = ev.fit_probe

    def fit_probe(x_MC, *args):
        fitted.append(len(x_MC))
        return whole(x_MC, *args)

    def score(sums):
        scored.extend(sums[:, 2:4].sum(1).tolist())
        return ev.iou(sums, 2)[..., 1]

    monkeypatch.setattr(ev, "fit_probe", fit_probe)
    ev.choose_probe(maps, masks, 2, score)
    fit, held = ev.split(10)
    assert fitted == [sum(2 * (2 + i) for i in fit)]
    assert set(scored) == {sum(masks[i].numel() for i in held)}


def test_overlap_keeps_settings_apart():
    mask, said = torch.tensor([[0, 1], [1, 1]]), torch.tensor([[[0, 1], [1, 0]], [[1, 1], [1, 1]]])
    want = [[1, 2, 1, 3, 2, 2], [0, 3, 1, 3, 0, 4]]  # hit, labelled, predicted, each of two classes
    assert ev.overlap(said, mask, 2).tolist() == want


def test_what_one_class_everywhere_scores():
    """All foreground: its share of the pixels. All of the commonest class: a quarter of its IoU."""
    sources, square = (Pictures(12), Pictures(9, seed=1)), {"size": (32, 32)}
    train, test = (ev.extract({"teacher": {"a": Teacher()}}, x, **square) for x in sources)
    masks = np.concatenate([s.mask.ravel() for s in test.samples])
    rows = [ev.segmentation(train, test, foreground)["one class everywhere"]["value"]
            for foreground in (True, False)]  # fmt: skip
    assert rows == pytest.approx([(masks > 0).mean(), (masks == 0).mean() / 4])


def test_segmentation_finds_the_squares(sets):
    gap = only(sets, "teacher/a")  # class 4 instead of 1: no picture has that one
    for side in gap:
        masks = [np.where(s.mask == 1, 4, s.mask).astype(np.uint8) for s in side.samples]
        side.samples = [replace(s, mask=m) for s, m in zip(side.samples, masks, strict=True)]
    assert ev.segmentation(*gap)["teacher/a"]["value"] > 0.6
    assert ev.segmentation(*only(sets, "teacher/a"), foreground=True)["teacher/a"]["value"] > 0.7


# ------------------------------------------------------------------- a head that is the teacher


def test_a_head_that_is_the_teacher_scores_as_the_teacher(sets):
    both = only(sets, "teacher/a", "student/a")
    protocols = [ev.knn, ev.linear, ev.segmentation]
    protocols += [lambda *x: ev.zero_shot(*x, WORDS, "captions")]
    protocols += [lambda *x: ev.retrieval(*x, WORDS)]
    for protocol in protocols:
        rows = protocol(*both)
        mine = {name: row for name, row in rows.items() if name.startswith("student/a")}
        theirs = [rows[name.replace("student", "teacher")] for name in mine]
        assert mine and list(mine.values()) == theirs
    rows = ev.fidelity(*sets)
    assert rows["student/a patches"]["value"] == rows["student/a summary"]["value"] == 1
    assert rows["student/b patches"]["value"] < 0.9
    assert rows["student mean"]["parts"] == 4


def test_resolution_curve_of_a_head_that_is_the_teacher():
    sets = {size: ev.extract(models(), Pictures(6), size=size) for size in (48, 64)}
    rows = ev.resolution(sets)
    for size in (48, 64):
        assert rows[f"student/a cosine error {size} px"]["value"] == pytest.approx(0, abs=1e-6)
        assert rows[f"student/b cosine error {size} px"]["value"] > 0.1
    assert rows["student/a scale variance"] == rows["teacher/a scale variance"]


def test_scale_variance_knows_its_ends():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(4, 4, 6, generator=generator) for _ in range(30)]
    assert ev.scale_variance([maps, maps])["value"] == 0
    others = [torch.randn(4, 4, 6, generator=generator) for _ in range(30)]
    assert ev.scale_variance([maps, others])["value"] == pytest.approx(0.5, abs=0.05)  # of 2 sizes


# ------------------------------------------------------------------- merging


@pytest.mark.parametrize("way", ["merge", "unshuffle", "average"])
def test_ways_keep_equal_counts(way):
    map_hwC = torch.randn(8, 4, 3)
    for side in (2, 4):
        tokens, index = ev.reduce_map(map_hwC, way, side)
        assert len(tokens) == 32 // side**2 and index.shape == (32,)
        assert set(index.tolist()) == set(range(len(tokens)))


def test_unshuffle_loses_nothing_and_average_is_the_mean():
    map_hwC = torch.randn(4, 4, 3)
    tokens, index = ev.reduce_map(map_hwC, "unshuffle", 2)
    assert sorted(tokens.flatten().tolist()) == sorted(map_hwC.flatten().tolist())
    average, same_index = ev.reduce_map(map_hwC, "average", 2)
    assert torch.equal(index, same_index) and index.view(4, 4)[0].tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(average[1], map_hwC[:2, 2:].mean((0, 1)))
    assert torch.equal(ev.reduce_map(map_hwC, "all", 1)[0], map_hwC.flatten(0, 1))


@pytest.mark.slow
def test_merging_fills_its_table():
    parts = {"student": Heads(trunk=Network(0)), "pixels": ev.RawPixels()}

    def square(side, count, seed):
        return ev.extract(parts, Pictures(count, seed=seed), size=(side, side))

    rows = ev.merging(square(32, 36, 0), square(32, 18, 1))
    assert len(rows) == 7 + 1  # pixels have no rows
    floor = rows["one class everywhere"]["value"]
    assert rows["student/trunk 4 tokens, merge"]["value"] > floor + 0.1
    with pytest.raises(ValueError, match="5x5, no multiple of 4"):
        ev.merging(square(40, 4, 0), square(40, 4, 1))


# ------------------------------------------------------------------- features on disk


def test_features_resume_and_refuse_another_source(tmp_path):
    parts = {"teacher/a": Teacher(0), "pixels": ev.RawPixels()}
    for part in parts.values():
        part.fingerprint = "fixed"
    source, out = Pictures(7, bad=(2,)), str(tmp_path)
    rows, skipped = ev.write_features(parts, source, out, True, None, shard=3)
    assert skipped == {"0-2": "0-2: cut"}
    assert [row["value"] for row in rows.values()] == [2, 3, 1]
    (tmp_path / "00001.json").unlink()
    assert list(ev.write_features(parts, source, out, True, None, shard=3)[0]) == ["00001.json"]
    whole = ev.extract(parts, source)
    read = [np.load(tmp_path / f"teacher.a-0000{i}.summary.npy") for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(read), whole.summary["teacher/a"])
    index = json.loads((tmp_path / "00001.json").read_text())
    tokens = np.load(tmp_path / "teacher.a-00001.patches.npy")
    assert len(tokens) == sum(h * w for h, w in index["grids"]["teacher/a"])
    assert [p["key"] for p in index["pictures"]] == ["0-3", "0-4", "0-5"]
    with pytest.raises(ValueError, match="change --out"):
        ev.write_features(parts, Pictures(7, seed=3), out, True, None, shard=3)


def test_features_know_all_that_they_were_made_of(tmp_path):
    def write(weights="w", seed=0, maps=True, size=None, shard=8):
        pixels = ev.RawPixels()
        pixels.fingerprint = weights
        return ev.write_features(
            {"pixels": pixels}, Pictures(3, seed=seed), str(tmp_path), maps, size, shard
        )[0]

    assert write() and not write()  # nothing is left to do
    for change in ({"weights": "v"}, {"seed": 1}, {"maps": False},
                   {"size": 32}, {"shard": 9}):  # fmt: skip
        with pytest.raises(ValueError, match="change --out"):
            write(**change)


@pytest.mark.parametrize("broken", ["arrays", "index"])
def test_features_are_written_whole_or_not_at_all(broken, tmp_path, monkeypatch):
    pixels = ev.RawPixels()
    pixels.fingerprint = "fixed"

    def dies(target, **_):
        target.write(b"half")
        raise OSError("full")

    def not_the_index(part, path, replace=packing.os.replace):
        if str(path).endswith(".json"):
            raise OSError("full")
        replace(part, path)

    owner, name, fails = (np, "save", dies) if broken == "arrays" else (
        packing.os, "replace", not_the_index)  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(OSError, match="full"):
            ev.write_features({"pixels": pixels}, Pictures(3), str(tmp_path), True, None)
    assert not (tmp_path / "00000.json").exists()
    assert bool(list(tmp_path.glob("*.npy"))) == (broken == "index")
    assert not list(tmp_path.glob("*.part"))
    assert ev.write_features({"pixels": pixels}, Pictures(3), str(tmp_path), True, None)[0]


def test_features_are_of_every_weight(tmp_path):
    student = Student(MODELS["test"])
    given = {"student": student}, Pictures(2), str(tmp_path), False, None
    assert ev.write_features(*given)[0] and not ev.write_features(*given)[0]
    with torch.no_grad():
        next(student.heads.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="change --out"):
        ev.write_features(*given)


# ------------------------------------------------------------------- pictures and report


def test_pca_sheet_has_a_column_for_each_map(tmp_path):
    pictures = [Pictures(4, side=(64, 96)).load(i) for i in range(4)]
    ev.pca_sheet(tmp_path / "pca.png", pictures, models(), cell=80)
    sheet = Image.open(tmp_path / "pca.png")
    sides = [np.array(x.image.shape[:2]) for x in pictures]
    boxes = [(s * min(80 / s[1], 100 / s[0])).round().astype(int) for s in sides]
    # picture, two teachers, two heads, pixels, trunk
    assert sheet.size == (8 + 7 * 88, 34 + sum(high + 8 for high, _ in boxes))
    (high, wide), x = boxes[0], 8 + (80 - boxes[0][1]) // 2
    shown = np.asarray(sheet)[34 : 34 + high, x : x + wide].mean((0, 1))
    np.testing.assert_allclose(shown, pictures[0].image.mean((0, 1)), atol=2)


def test_a_pca_sheet_is_whole_or_not_there_and_of_one_rank(tmp_path, monkeypatch):
    path, pictures = tmp_path / "pca.png", [Pictures(4, side=(64, 96)).load(0)]
    ev.pca_sheet(path, pictures, {})
    old = path.read_bytes()

    def full(_: Image.Image, file: Any, **__: Any) -> None:
        with nullcontext(file) if hasattr(file, "write") else open(file, "wb") as opened:
            opened.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        ev.pca_sheet(path, pictures, {})
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(ev, "rank_and_world", lambda: (1, 2))
    args = SimpleNamespace(task="pca", out=str(path), sizes=[], size=None)
    ev.run_task(args, {}, None, Pictures(4, side=(64, 96)))
    assert path.read_bytes() == old


def test_pca_draws_every_token_by_the_three_main_axes():
    """A gradient from left to right, one from top to bottom and one of both: each is a colour's."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 8), indexing="ij")
    basis = torch.linalg.qr(torch.randn(9, 3, generator=torch.Generator().manual_seed(0))).Q
    map_hwC = torch.stack([9 * x, 4 * y, x * y], dim=2) @ basis.T + 5
    axes = ev.main_axes([map_hwC])
    torch.testing.assert_close((axes.T @ basis).abs(), torch.eye(3), atol=1e-4, rtol=0)
    (image,) = ev.pca_pictures([map_hwC], axes)
    drawn = np.asarray(image).astype(float)
    for channel, want in enumerate((x, y, x * y)):
        assert abs(np.corrcoef(drawn[..., channel].ravel(), want.numpy().ravel())[0, 1]) > 0.98
        assert drawn[..., channel].min() < 20 and drawn[..., channel].max() > 235


def test_pca_of_a_collapsed_student_is_drawn():
    maps = [torch.full((3, 2, 6), 0.7), torch.full((1, 1, 6), 0.7)]
    drawn = ev.pca_pictures(maps, ev.main_axes(maps))
    assert [image.size for image in drawn] == [(2, 3), (1, 1)]


def test_pca_draws_a_student_in_its_teachers_axes():
    pictures = [Pictures(4).load(i) for i in range(4)]
    found = ev.encode({"teacher": {"a": Teacher(0)}}, pictures)
    maps = [features.patches["teacher/a"] for features in found]
    axes = ev.main_axes(maps)
    once = ev.pca_pictures(maps, axes)
    twice = ev.pca_pictures([2 * x + 1 for x in maps], axes)
    for one, two in zip(once, twice, strict=True):  # scaled by itself: a shrunken student shows
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_pictures_for_a_sheet_are_those_that_decode(tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
    path = tmp_path / "0.png"
    path.write_bytes(path.read_bytes()[:-20])
    source = open_source(str(tmp_path))
    found, skipped = ev.first_pictures(source, 2)
    assert [sample.key for sample in found] == ["1.png", "2.png"] and list(skipped) == ["0.png"]


def test_final_report_has_every_row():
    teachers, student = models()["teacher"], models()["student"]
    control, sources = Heads(a=Network(3), b=Network(4)), (Pictures(42), Pictures(18, seed=1))
    report = ev.final_report(student, control, teachers, *sources)
    assert report["knn"]["pixels"]["n"] == 18
    rows = {"teacher/a", "student/a", "student/concat", "random/b", "pixels", "majority class"}
    assert rows <= report["knn"].keys() and report["left out"] == {}
    assert report["fidelity"]["student/a patches"]["value"] == 1
    assert abs(report["fidelity"]["constant/a patches"]["value"]) < 0.1
    assert "constant mean" in report["fidelity"] and "random mean" not in report["fidelity"]
    assert report["foreground"]["student/a"] == report["foreground"]["teacher/a"]
    table = ev.format_table(report)
    assert "majority class" in table and "student mean" in table
    assert "scored: 42 training pictures, 18 held-out pictures: fewer than 50 are too few" in table
    report["pictures"]["held out"] = 50
    assert "50 held-out pictures" in ev.format_table(report)
    assert "few" not in ev.format_table(report)
    json.dumps(report, allow_nan=False)


def test_the_random_control_tells_pictures_apart():
    """A student as training starts from it does not: its blocks are the identity."""
    fresh = Student(MODELS["test"])
    control = ev.random_control(fresh, seed=3)
    found = ev.extract({"fresh": fresh, "random": control}, Pictures(6), dense=0)
    spread = {name: float(x.std(0).mean() / x.std()) for name, x in found.summary.items()}
    assert spread["fresh/trunk"] < 1e-5 and spread["random/trunk"] > 0.05
    again = ev.random_control(fresh, seed=3).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in control.state_dict().items())
    weight = control.state_dict()["blocks.0.attn.proj.weight"]
    assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.2)


def test_final_report_of_pictures_without_labels_or_masks():
    teachers, student = models()["teacher"], models()["student"]
    bare = {"label": None, "mask": None}
    sources = Pictures(12, **bare), Pictures(8, seed=1, **bare)
    report = ev.final_report(student, student, teachers, *sources)
    assert set(report["left out"]) == {"knn", "foreground"} and "fidelity" in report
    table = ev.format_table(report)
    assert "left out: knn: too few training pictures: 12 of 12 are without a label (" in table
    assert report["skipped"] == {} and "--" not in table


# ------------------------------------------------------------------- errors


def test_what_is_missing_is_named(sets):
    def found(count=6, **changes):
        return ev.extract(models(), Pictures(count, seed=5, **changes))

    for protocol, changes, match in (
        (ev.knn, {"label": None}, "few held-out pictures: 6 of 6 are without a label"),
        (ev.knn, {"label": "emu"}, "6 of 6 are of class 'emu', which no training"),
        (ev.segmentation, {"mask": None}, r"without a mask \(a .mask.png"),
        (lambda x, y: ev.retrieval(x, y, WORDS), {"caption": None}, r"caption \(a .txt beside"),
    ):
        with pytest.raises(ValueError, match=match):
            protocol(sets[0], found(**changes))
    with pytest.raises(ValueError, match="no head is named after a teacher"):
        ev.fidelity(*[ev.extract({"pixels": ev.RawPixels()}, Pictures(3, seed=s)) for s in (0, 1)])


# ------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two folders of classes and a student checkpoint."""
    root = tmp_path_factory.mktemp("eval")
    for side, count, seed in (("train", 12, 0), ("test", 6, 1)):
        for i in range(count):
            sample = Pictures(count, seed=seed).load(i)
            (root / side / sample.label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(sample.image).save(root / side / sample.label / f"{side}{i}.png")
    (root / "bare").mkdir()
    Image.fromarray(Pictures(1).load(0).image).save(root / "bare" / "x.png")
    heads = [AdapterSpec("tiny-dense", 24, 24, split=True, bias=True)]
    (root / "run").mkdir()
    for name in ("student.pt", "run/model.pt"):
        save_student(Student(with_heads(MODELS["test"], heads)), root / name)
    return root


def command(root, task, *more):
    flags = ["--student", str(root / "student.pt"), *more]
    if "--teacher" not in more:
        flags += ["--teacher", "tiny-dense"]
    return [task, "--train", str(root / "train"), "--test", str(root / "test"), *flags]


def test_command_prints_json_last(workplace, capsys, monkeypatch):
    ev.main(command(workplace, "knn", "--k", "3"))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["task"] == "knn" and (result["n_train"], result["n_test"]) == (12, 6)
    columns = {"teacher/tiny-dense", "student/tiny-dense", "random/trunk", "pixels"}
    assert columns <= result["rows"].keys() and result["rows"]["pixels"]["n"] == 6
    monkeypatch.setattr(ev, "load_text", lambda _: lambda texts: torch.eye(24)[: len(texts)])
    ev.main(command(workplace, "zero-shot", "--text", "tiny-dense=words"))  # no caption is needed
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {"teacher/tiny-dense", "student/tiny-dense", "majority class"} <= rows.keys()
    ev.main(command(workplace, "pca", "--out", str(workplace / "x.png"), "--sizes", "32", "48"))
    assert (workplace / "x.png").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{workplace / 'x.png'}: 6 pictures" and len(lines) == 2
    assert json.loads(lines[1])["rows"][str(workplace / "x.png")] == {"value": 6}


def test_pca_says_what_it_could_not_read(workplace, tmp_path, capsys):
    picture = next((workplace / "test").rglob("*.png")).read_bytes()
    (tmp_path / "a.png").write_bytes(picture[:-40])
    flags = command(workplace, "pca", "--test", str(tmp_path), "--out", str(tmp_path / "x.jpg"))
    with pytest.raises(SystemExit, match=r"--test .*: none of 1 pictures could be read"):
        ev.main(flags)
    (tmp_path / "b.png").write_bytes(picture)
    (tmp_path / "c.png").write_bytes(b"no picture")  # known when the folder is scanned
    ev.main(flags)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'x.jpg'}: 1 pictures"
    assert len(lines) == 3 and all(line.startswith("left out: ") for line in lines[1:])
    assert json.loads(last)["skipped"].keys() == {"a.png", "c.png"}


@pytest.mark.parametrize(
    ("flag", "value", "what"),
    [
        ("--student", "mine={root}/nope", "{root}/nope is no file nor a folder"),
        ("--teacher", "{root}/nope", "{root}/nope is no file nor a folder"),
        ("--teacher", "x=builtin:none", "builtin:none is not one of"),
        ("--text", "builtin:none", "builtin:none has no text tower"),
    ],
)
def test_an_error_names_the_flag_that_was_given(workplace, flag, value, what):
    value, what = (text.format(root=workplace) for text in (value, what))
    with pytest.raises(SystemExit, match=f"^eval.py knn: {flag} {value}: {what}"):
        ev.main(command(workplace, "knn", flag, value))


@pytest.mark.parametrize(
    ("student", "teacher", "columns"),
    [
        ("{root}/student.pt", "{root}/student.pt", ("student/trunk", "teacher/student")),
        ("mine={root}/run", "t={root}/run", ("student/trunk", "teacher/t")),
        ("builtin:tiny-dense", "builtin:tiny-dense", ("student", "teacher/tiny-dense")),
        pytest.param(
            "{root}/vit", "{root}/vit", ("student", "teacher/vit"), marks=pytest.mark.slow
        ),
    ],
)
def test_students_and_teachers_are_named_alike(workplace, student, teacher, columns, capsys):
    """A file, a run's folder, a built-in, a folder of transformers; students teach by the trunk."""
    if student.endswith("/vit"):
        transformers = pytest.importorskip("transformers")
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.Dinov2Config(**shape, image_size=28)
        transformers.Dinov2Model(config).save_pretrained(workplace / "vit")
    ev.main(command(workplace, "knn", "--no-controls", "--student", student.format(root=workplace),
                    "--teacher", teacher.format(root=workplace)))  # fmt: skip
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows[columns[0]] == rows[columns[1]]


def test_the_last_line_is_json_also_where_a_figure_is_missing(workplace, capsys, monkeypatch):
    rows = {"nan of x": {"value": None, "n": 2, "why": "nothing to divide by"}}
    monkeypatch.setitem(ev.PROTOCOLS, "knn", lambda *_: rows)
    ev.main(command(workplace, "knn", "--no-controls"))
    line = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [row["value"] for row in found["rows"].values()] == [None]


def test_the_features_command_writes_maps_of_the_size(workplace, tmp_path, capsys):
    ev.main(command(workplace, "features", "--out", str(tmp_path), "--maps", "--size", "32"))
    index = json.loads((tmp_path / "00000.json").read_text())
    assert len(index["pictures"]) == 6
    assert {h * w for h, w in index["grids"]["student/trunk"]} <= {4, 6}  # of patches of 16 px
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]["00000.json"]["value"] == 6


def test_what_was_not_compared_is_said():
    from conftest import missing_line

    reasons = ["Skipped: could not import 'sklearn.metrics': No module named 'sklearn'"] * 2
    reasons += ["Skipped: could not import 'webdataset': No module named 'webdataset'", "no CUDA"]
    line = missing_line(reasons)
    assert "sklearn (2 tests), webdataset (1 test): pip install -r requirements-dev" in line
    assert missing_line(["no CUDA"]) == ""


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("segmentation", (), "few pictures in --train: 12 of 12 are without a mask"),
        ("merging", ("--size", "64"), "few pictures in --train: 12 of 12 are without a mask"),
        ("knn", ("--test", "{root}/bare"), "few pictures in --test: 1 of 1 are without a label"),
        (
            "retrieval",
            ("--text", "t=words"),
            "few pictures in --train: 12 of 12 are without a caption",
        ),
        (
            "zero-shot",
            ("--text", "t=words"),
            "few pictures in --train: 12 of 12 are without a caption",
        ),
        ("zero-shot", ("--text", "tiny-dense=words", "--prompts", "captions"), "without a caption"),
        ("knn", ("--test", "nowhere"), "nowhere"),
        ("knn", ("--teacher", "x=builtin:none"), "builtin:none"),
    ],
)
def test_command_fails_in_one_line_before_it_encodes(workplace, task, more, message, monkeypatch):
    monkeypatch.setattr(ev, "load_text", lambda _: words_of)
    monkeypatch.setattr(ev, "encode", lambda *_: pytest.fail("encoded"))
    with pytest.raises(SystemExit, match=message) as exit_:
        ev.main(command(workplace, task, *(flag.format(root=workplace) for flag in more)))
    assert "\n" not in str(exit_.value) and str(exit_.value).startswith(f"eval.py {task}: ")


def test_command_names_what_it_needs(capsys):
    for flags, message in (
        (["knn", "--student", "x", "--train", "y"], "knn needs --test"),
        (["zero-shot", "--student", "x", "--train", "y", "--test", "z"], "zero-shot needs --text"),
        (["knn", "--train", "y", "--test", "z"], "nothing to score"),
        (["sing"], "invalid choice"),
        (["knn", "--k", "0"], "--k: 0 must be a whole number at least 1"),
        (["knn", "--k", "2.5"], "--k: 2.5 must be"),
        (["knn", "--size", "-7"], "--size: -7 must be a whole number at least 1 and at most 16384"),
        (["resolution", "--sizes", "64", "0"], "--sizes: 0 must be"),
        (["knn", "--seed", "nan"], "--seed: nan must be"),
        (["knn", "--sedd", "1"], "did you mean --seed?"),
    ):
        with pytest.raises(SystemExit):
            ev.main(flags)
        assert message in capsys.readouterr().err


MODULES = "losses, model, packing, teachers, sampling, eval, train"


@pytest.mark.slow
def test_the_modules_import_the_core_packages_alone():
    """What more some task needs (transformers, matplotlib, onnx, ...) waits until it is needed."""
    listed = f"import sys, {MODULES}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", listed],
        capture_output=True, text=True, check=True, timeout=100, cwd=Path(ev.__file__).parent,
    )  # fmt: skip
    core, needed = {"torch", "numpy", "PIL", "einops", "tqdm"}, metadata.requires("torch") or []
    names = {
        re.match(r"[\w-]+", line)[0].replace("-", "_") for line in needed if "extra" not in line
    }
    of_torch = names | {"torchgen", "functorch", "mpmath", "cython_runtime"}  # mpmath is of sympy
    assert "torch._dynamo" not in run.stdout.split()  # a second, where nothing is compiled
    packages = {name.partition(".")[0] for name in run.stdout.split()}
    found = {name for name in packages if not name.startswith(("_", "nvidia"))}
    assert found - core - of_torch - set(MODULES.split(", ")) <= set(sys.stdlib_module_names)


@pytest.mark.slow
def test_two_ranks_count_every_picture_once(workplace):
    script = str(Path(ev.__file__).resolve())
    lines = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        run = subprocess.run(
            [sys.executable, *launcher, script, *command(workplace, "knn", "--no-controls")],
            capture_output=True, text=True, check=True, timeout=300,
        )  # fmt: skip
        lines.append(json.loads(run.stdout.splitlines()[-1]))
    assert lines[0]["rows"] == lines[1]["rows"] and lines[1]["rows"]["student/trunk"]["n"] == 6


# ------------------------------------------------------------------- pictures on both sides


def test_pictures_on_both_sides_and_classes_of_one_are_left_out_and_counted(sets):
    train, test = only(sets, "student/a")
    twins = [replace(s, digest=train.samples[5].digest) if i == 4 else s
             for i, s in enumerate(test.samples)]  # fmt: skip
    twins[7] = replace(twins[7], label="emu")
    mixed = replace(test, samples=twins, skipped={"gone": "cut"}, dense=test.dense)
    kept = [i for i in range(30) if i not in (4, 7)]
    for protocol, places in ((ev.knn, kept), (ev.segmentation, [i for i in range(30) if i != 4])):
        by_hand = replace(
            test,
            samples=[test.samples[i] for i in places],
            summary={c: x[places] for c, x in test.summary.items()},
            patches={c: [x[i] for i in places] for c, x in test.patches.items()},
            dense=list(range(len(places))),
        )
        assert protocol(train, mixed) == protocol(train, by_hand)
    emu = "held-out pictures of class 'emu', which no training picture has"
    copy = "held-out pictures in both train and test"
    assert mixed.skipped == {"gone": "cut", "1-4": copy, "1-7": emu}
    some = ev.take(mixed, [29, 4, 7])
    assert [s.key for s in some.samples] == ["1-29", "1-4", "1-7"] and some.dense == [0, 1, 2]
    assert torch.equal(some.patches["student/a"][1], test.patches["student/a"][4])
    few = replace(test, patches={c: x[:2] for c, x in test.patches.items()}, dense=[3, 9])
    assert ev.take(few, [9, 2, 3]).dense == [0, 2]


def stripped(found, what, places):
    """The pictures, of which these lack a label, caption or mask."""
    samples = [replace(x, **({what: None} if i in places else {}))
               for i, x in enumerate(found.samples)]  # fmt: skip
    return replace(found, samples=samples, skipped={})


@pytest.mark.parametrize(
    ("what", "protocol"),
    [
        ("label", ev.knn),
        ("label", ev.linear),
        ("label", lambda *sets: ev.zero_shot(*sets, WORDS)),
        ("mask", ev.segmentation),
        ("caption", lambda *sets: ev.retrieval(*sets, WORDS)),
    ],
)
def test_pictures_without_a_label_mask_or_caption_are_left_out_and_the_rest_is_scored(
    what, protocol, sets
):
    places, whole = {2, 7, 8}, [ev.take(x, list(range(18))) for x in only(sets, "student/b")]
    some = [stripped(side, what, places) for side in whole]
    rest = [ev.take(x, [i for i in range(18) if i not in places]) for x in whole]
    assert protocol(*some) == protocol(*rest)
    for side, name in zip(some, ("training", "held-out"), strict=True):
        keys = {side.samples[i].key for i in places}
        assert side.skipped.keys() == keys
        for why in side.skipped.values():
            assert why.startswith(f"{name} pictures without a {what} (") and ev.WHERE[what] in why


@pytest.mark.parametrize("what", ["label", "mask", "caption"])
def test_one_picture_with_a_label_mask_or_caption_is_too_few_to_train_on(what, sets):
    protocols = {"label": ev.knn, "mask": ev.segmentation}
    protocol = protocols.get(what, lambda *sides: ev.retrieval(*sides, WORDS))
    train = stripped(sets[0], what, range(1, 60))
    with pytest.raises(ValueError, match=f"training pictures: 59 of 60 are without a {what}"):
        protocol(train, sets[1])


def test_templates_of_captions_need_a_caption_for_each_class_that_is_scored(sets):
    """The only captions of owls are gone: owls of the test go as well."""
    train, test = only(sets, "teacher/a")
    owls = {i for i, sample in enumerate(train.samples) if sample.label == "owl"}
    some, others = stripped(train, "caption", owls), stripped(test, "label", ())
    assert ev.zero_shot(some, others, WORDS, "captions")["teacher/a"]["n"] == 20
    (why,) = {why for key, why in others.skipped.items()}
    assert why == "held-out pictures of class 'owl', which no training picture has"


def test_maps_to_texts_are_fitted_on_the_pictures_that_have_captions(sets):
    train, test = only(sets, "student/a")
    some = stripped(train, "caption", {0, 4})
    rest = ev.take(train, [i for i in range(60) if i not in (0, 4)])
    texts = [torch.eye(3, 16)] * 2
    found, want = (ev.similarities(x, test, WORDS, texts) for x in (some, rest))
    assert torch.equal(found["probe student/a"][1], want["probe student/a"][1])
    assert len(found["probe student/a"][0]) == 60 and some.skipped.keys() == {"0-0", "0-4"}


def test_a_copy_of_an_unlabelled_training_picture_is_no_test_picture(sets):
    """A student was trained on it, label or not."""
    train, test = only(sets, "student/a")
    twin = [replace(x, digest=train.samples[5].digest if i == 4 else x.digest)
            for i, x in enumerate(test.samples)]  # fmt: skip
    mixed = replace(test, samples=twin, skipped={})
    assert ev.knn(stripped(train, "label", {5}), mixed)["student/a"]["n"] == 29
    assert list(mixed.skipped) == ["1-4"]


def test_a_picture_that_lacks_two_things_has_both_reasons():
    class Bare(Pictures):
        def load(self, i, _=None):
            lack = {"label": None} if i < 7 else {}
            lack |= {"mask": None} if i == 0 else {}
            return replace(super().load(i), **lack)

    teachers, student = {"a": Teacher()}, Heads(a=Network(3))
    report = ev.final_report(student, student, teachers, Bare(12), Pictures(3, seed=1))
    assert report["left out"] == {} and report["pictures"] == {"training": 12, "held out": 3}
    lacks = [f"training pictures without a {what}" for what in ("label", "mask")]
    assert all(lack in report["skipped"]["0-0"] for lack in lacks)
    assert "mask" not in report["skipped"]["0-1"] and len(report["skipped"]) == 7
    table = ev.format_table(report)
    assert "left out: 6 files: 0-1, 0-2, 0-3, 0-4, 0-5 and 1 more: training pictures with" in table


def test_a_report_scores_the_rest_and_nothing_without_held_out_pictures():
    class Both(Pictures):
        def load(self, i, _=None):
            return replace(super().load(i), digest=f"d0-{i}") if i < 3 else super().load(i)

    teachers, student = {"a": Teacher()}, Heads(a=Network(3))
    report = ev.final_report(student, student, teachers, Pictures(12), Both(8, seed=1))
    assert report["knn"]["student/a"]["n"] == 5 == report["fidelity"]["student/a summary"]["n"]
    copy = "held-out pictures in both train and test"
    assert report["skipped"] == {f"1-{i}": copy for i in range(3)}
    assert f"left out: 3 files: 1-0, 1-1, 1-2: {copy}" in ev.format_table(report)
    assert report["pictures"] == {"training": 12, "held out": 5}
    nothing = ev.final_report(student, student, teachers, Pictures(4), Pictures(0))
    assert "no picture is held out" in ev.format_table(nothing)
