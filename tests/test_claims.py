"""The experiments of `claims.py` in their quick form: two steps, two seeds, random teachers."""

import json
from functools import partial

import claims
import numpy as np
import pytest
import torch
from claims import CLAIMS, Claim, Effect

import train
from eval import FeatureSet
from packing import Group, PackedBatch, Sample
from teachers import CachedTeacher, fill_caches, load_teacher, parse_teacher


def test_an_effect_is_paired_by_seed_and_says_what_it_could_have_seen():
    effect = Effect("score", ("a", "b"), "new", "old", "up")
    rows = []
    for seed in range(6):
        level = 10.0 * seed  # the seed's own luck, the same in both arms, must cancel
        rows.append({"arm": "old", "seed": seed, "figures": {"a": level, "b": level}})
        rows.append({"arm": "new", "seed": seed, "figures": {"a": level + 1, "b": level + 2}})
    found = claims.measure(effect, [*rows, {"arm": "new", "seed": 9, "figures": {"a": 0, "b": 0}}])
    assert (found["n"], found["value"], found["low"], found["high"]) == (6, 1.5, 1.5, 1.5)
    assert claims.verdict(found) == "shown"
    assert claims.verdict({"low": -3.0, "high": -1.0}) == "the opposite"
    assert claims.verdict({"low": -0.1, "high": 0.3}) == "not shown; could see 0.200"
    assert claims.measure(effect, rows[:2]) == {"n": 1}


def test_relation_is_a_rank_correlation():
    x_NC = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert claims.relation(x_NC, 3 * x_NC) == pytest.approx(1)
    other_NC = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    assert abs(claims.relation(x_NC, other_NC)) < 0.5


def test_arms_name_what_there_is_and_the_seed_and_arm_mark_a_run():
    marks = set()
    for name, claim in CLAIMS.items():
        for effect in claim.effects:
            assert {effect.arm, effect.other} <= claim.arms.keys()
        marks |= {claims.mark(name, arm, seed, False) for arm in claim.arms for seed in (0, 1)}
    assert len(marks) == 2 * sum(len(claim.arms) for claim in CLAIMS.values())


def test_a_changed_claim_does_not_use_old_runs(tmp_path, monkeypatch):
    row = {"arm": "x", "seed": 0}
    monkeypatch.setitem(CLAIMS, "toy", Claim("?", "", {"x": {}}, ()))
    row["mark"] = claims.mark("toy", "x", 0, False)
    (tmp_path / "toy.jsonl").write_text(json.dumps(row) + "\n")
    assert claims.rows_of("toy", tmp_path) == [row]
    monkeypatch.setitem(CLAIMS, "toy", Claim("?", "", {"x": {"lr": 1e-4}}, ()))
    assert claims.rows_of("toy", tmp_path) == []


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_changed_teacher_is_what_training_hears(is_cached, tmp_path):
    cfg = train.PRESETS["debug"]
    (source,), _ = train.open_sources(cfg)
    teacher = load_teacher(parse_teacher(cfg.teachers[0]))
    if is_cached:
        teacher = CachedTeacher(teacher, tmp_path)
        fill_caches([teacher], source)
    group, heard = Group(0, 1, torch.device("cpu")), []
    for one in (teacher, claims.changed(teacher, partial(claims.loud, factor=100.0))):
        (data,) = train.make_stages(cfg, [source], claims.MODELS["test"], group, [one])
        batch = PackedBatch.cat(data[0])
        assert bool(batch.pixels) != is_cached
        heard.append(train.ask(one, batch, range(len(batch))))
    torch.testing.assert_close(heard[1].summary_BC, 100 * heard[0].summary_BC)
    torch.testing.assert_close(heard[1].patches[3], 100 * heard[0].patches[3])


def drawn(label, caption, rows=(0, 0), columns=(0, 0)):
    """A sample without pixels, whose mask is a rectangle in 30 x 30."""
    mask = np.zeros((30, 30), np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return Sample(f"{label}{caption}", "", np.zeros((0, 0, 3), np.uint8), label, caption, mask)


def test_questions():
    """Label, the caption's last word (five pictures have it), place of 3 x 3, size of 4."""
    names = (("cat", "red cat, tree"), ("dog", "blue dog"), ("owl", "green owl"))
    train = FeatureSet([drawn(*name, (0, 15), (0, 15)) for name in names * 5])
    test = FeatureSet([
        drawn("dog", "a dog", (0, 9), (21, 30)),
        drawn("emu", "an emu", (22, 28), (1, 5)),
        drawn("owl", "owl", (0, 30), (0, 30)),
        drawn("cat", None),
    ])  # fmt: skip
    known, asked = claims.questions(train, test)
    assert known.tolist() == [[i % 3, i % 3, 0, 2] for i in range(15)]
    assert asked.tolist() == [[1, 1, 2, 0], [-1, -1, 6, 0], [2, 2, 4, 3], [0, -1, -1, -1]]


@pytest.mark.slow
def test_reading_finds_what_tokens_say_and_where():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(90, 16, 4, generator=generator)
    places = torch.randint(16, (90,), generator=generator)
    tokens[torch.arange(90), places] = torch.eye(4)[torch.arange(90) % 4] * 8
    answers = torch.stack([torch.arange(90) % 4, places // 8, torch.full((90,), -1)], 1)
    read = [(x, torch.arange(16)) for x in tokens]
    row = claims.reading(read[:60], read[60:], (4, 4), answers[:60], answers[60:])
    assert row["value"] > 0.65 and row["n"] == 30  # guessing: 0.37


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """The folder with two seeds of every arm of every claim."""
    folder, threads = tmp_path_factory.mktemp("claims"), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(claims, "train_reader", partial(claims.train_reader, steps=2))
        for name in CLAIMS:
            claims.run_claim(name, 2, folder, quick=True)
    torch.set_num_threads(threads)
    return folder


@pytest.mark.slow
def test_every_claim_runs_resumes_and_has_its_figures(quick_runs):
    for name, claim in CLAIMS.items():
        lines = (quick_runs / f"{name}.jsonl").read_text()
        rows = claims.rows_of(name, quick_runs, quick=True)
        assert sorted((row["arm"], row["seed"]) for row in rows) == sorted(
            (arm, seed) for arm in claim.arms for seed in (0, 1)
        )
        for effect in claim.effects:
            assert claims.measure(effect, rows)["n"] == 2
        claims.run_claim(name, 2, quick_runs, quick=True)  # nothing is missing
        assert (quick_runs / f"{name}.jsonl").read_text() == lines


@pytest.mark.slow
def test_the_table_and_the_figures_are_of_the_runs(quick_runs, monkeypatch):
    marked = claims.mark
    monkeypatch.setattr(claims, "mark", lambda *run: marked(*run[:3], True))
    text = claims.table(quick_runs)
    assert text.count("not run yet") == len(claims.NOT_RUN)
    for claim in CLAIMS.values():
        assert text.count(f"| {claim.question} |") == 1
    assert claims.draw(quick_runs).stat().st_size > 10_000
    assert claims.table(quick_runs / "nothing").count("not run yet") == len(
        [*CLAIMS, *claims.NOT_RUN]
    )
