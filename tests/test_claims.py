"""The statistics of `claims.py` against scipy, its experiments in their quick form."""

import json

import claims
import numpy as np
import pytest
import torch
from claims import CLAIMS, TUNING, Claim, Effect, Premise

import train
from eval import FeatureSet, Fidelity
from model import MODELS
from packing import Group, PackedBatch, Sample
from teachers import CachedTeacher, TeacherOutput, fill_caches, load_teacher, parse_teacher


def row(arm, seed, rate=0.0, **figures):
    return {"arm": arm, "seed": seed, "rate": rate, "figures": figures}


@pytest.mark.parametrize("n", [2, 3, 10, 20])
def test_the_interval_and_p_are_scipys(n):
    stats = pytest.importorskip("scipy.stats")
    x = np.random.default_rng(n).normal(0.3, 1.0, n)
    found, wanted = claims.student_t(x), stats.ttest_1samp(x, 0)
    low, high = wanted.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((low, high), rel=1e-6)
    assert found["p"] == pytest.approx(wanted.pvalue, rel=1e-6)
    assert claims.t_quantile(n) == pytest.approx(stats.t.ppf(0.975, n), rel=1e-6)
    assert claims.t_tail(8.0, n) == pytest.approx(2 * stats.t.sf(8.0, n), rel=1e-4)


def test_holm_by_hand_and_by_its_steps():
    assert claims.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = np.random.default_rng(0).uniform(0, 0.1, 9)
    adjusted = claims.holm(p.tolist())
    for level in (0.01, 0.05, 0.2):  # step down: reject the smallest while p <= level / (left)
        rejected = set()
        for left, i in zip(range(9, 0, -1), np.argsort(p), strict=True):
            if p[i] > level / left:
                break
            rejected.add(i)
        assert {i for i, a in enumerate(adjusted) if a <= level} == rejected


def test_an_effect_is_paired_by_seed_without_the_tuning_and_knows_bases_and_blocks():
    rows = [row("new", TUNING, s=[9.0, 9.0]), row("old", TUNING, s=[0.0, 0.0])]
    rows += [row("new", 3, s=[1.0, 1.0])]  # has no partner
    for seed, gain in {0: 1.0, 1: 2.0, 5: 6.0}.items():
        level = 10.0 * seed  # the seed's own luck, the same in both arms, must cancel
        rows += [row("old", seed, s=[level, level])]
        rows += [row("new", seed, s=[level + gain - 1, level + gain + 1])]
    found = claims.measure(Effect("s", "new", "old", 0.1), rows)
    assert (found["n"], found["value"], found["base 0"], found["base 1"]) == (3, 3.0, 1.5, 6.0)
    assert found["pictures"] == pytest.approx(1.0)  # blocks of 2 and 4: deviation 2^.5, of two
    assert claims.measure(Effect("s", "new", "none", 0.1), rows) == {"n": 0}


@pytest.mark.parametrize(
    "arms, floor, least, adjusted, said",
    [
        ({"old": 1.0, "new": 2.0}, 0.0, 0.0, 0.01, "shown"),
        ({"old": 2.0, "new": 1.0}, 0.0, 0.0, 0.01, "the opposite"),
        ({"old": 1.0, "new": 1.2}, 0.0, 0.0, 0.01, "shown, less than matters"),
        ({"old": 1.0, "new": 1.01}, 0.0, 0.0, 0.01, "no difference that matters (within 0.5)"),
        ({"old": 1.0, "new": 1.3}, 0.0, 0.0, 0.20, "not shown; could see 0.551"),
        ({"old": 1.0, "new": 2.0}, 9.0, 0.0, 0.01, "can't be tested at this scale"),
        ({"old": 1.0, "new": 2.0}, 0.0, 3.0, 0.01, "no test: its premise failed"),
    ],
)
def test_verdicts(arms, floor, least, adjusted, said):
    effect = Effect("s", "new", "old", 0.5)
    wobble = 0.3 if 0.05 < arms["new"] - arms["old"] < 0.5 else 0.01
    claim = Claim("?", {}, (effect,), lambda _: {}, "floor", Premise("s", "new", "", least))
    rows = [row("floor", s, s=floor) for s in range(4)]
    for seed in range(4):
        rows += [row("old", seed, s=arms["old"])]
        rows += [row("new", seed, s=arms["new"] + wobble * (-1) ** seed)]
    assert claims.verdict(claim, effect, rows, adjusted).startswith(said)


def test_rates_are_tuned_first_and_each_arm_has_its_own_best():
    claim = Claim(
        "?", {"a": {}, "b": {}, "base": claims.BASE}, (), lambda _: {}, rates=(1.0, 2.0), judged="s"
    )
    tuning = claims.missing(claim, [], [0])
    assert tuning == [
        ("a", TUNING, 1.0),
        ("a", TUNING, 2.0),
        ("b", TUNING, 1.0),
        ("b", TUNING, 2.0),
    ]
    rows = [row(arm, seed, rate, s=rate if arm == "a" else -rate) for arm, seed, rate in tuning]
    wanted = [("a", 0, 2.0), ("b", 0, 1.0), ("base", 0, 0.0), ("a", 1, 2.0), ("b", 1, 1.0)]
    assert claims.missing(claim, rows, [0, 1]) == wanted
    rows += [row("a", 0, 2.0, s=0.0)]
    assert claims.missing(claim, rows, [0, 1]) == wanted[1:]


def test_every_claim_names_one_primary_effect_first_and_its_arms_make_other_runs():
    marks, runs = set(), 0
    for name, claim in CLAIMS.items():
        assert claim.effects[0].is_primary
        assert all({e.arm, e.other} <= claim.arms.keys() and e.matters > 0 for e in claim.effects)
        for arm in claim.arms:
            change = claims.configuration(claim, arm)
            for seed in (0, 1):
                marks.add(claims.mark(name, claims.Run(arm, change, seed, 1e-3, claims.FULL)))
                runs += 1
    assert len(marks) == runs


def test_a_changed_claim_does_not_use_old_runs(tmp_path, monkeypatch):
    toy = Claim("?", {"x": {"stages": claims.TRAINING.stages}}, (), lambda _: {})
    monkeypatch.setitem(CLAIMS, "toy", toy)
    claims.run_claim("toy", [0], tmp_path)
    assert len(claims.rows_of("toy", tmp_path)) == 1
    monkeypatch.setitem(CLAIMS, "toy", Claim("?", {"x": {"steps": 7}}, (), lambda _: {}))
    assert claims.rows_of("toy", tmp_path) == []


def test_a_pictures_part_in_the_variance_explained_adds_up_to_evals():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 3, 2, 5, generator=generator) for _ in range(2))
    measure = Fidelity([torch.randn(50, 5, generator=generator)])
    wanted = measure.report(
        (a.flatten(0, 1), b.flatten(0, 1)) for a, b in zip(student, teacher, strict=True)
    )
    found = claims.ev(measure, list(zip(student, teacher, strict=True)))
    assert float(found.mean()) == pytest.approx(wanted["value"], rel=1e-6)
    assert np.mean(claims.blocks(torch.arange(20.0), torch.arange(10.0))) == pytest.approx(7.0)


def test_relation_is_a_rank_correlation():
    x_NC = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert claims.relation(x_NC, 3 * x_NC) == pytest.approx(1)
    other_NC = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    assert abs(claims.relation(x_NC, other_NC)) < 0.5


def test_the_oracle_takes_every_character_before_a_second_of_any():
    label_N = np.repeat(np.arange(6), [20, 9, 3, 2, 1, 1])
    assert sorted(label_N[claims.picked("oracle", [], label_N, 6, 0)]) == list(range(6))
    counts = np.bincount(label_N[claims.picked("oracle", [], label_N, 14, 0)])
    assert counts.tolist() == [4, 3, 3, 2, 1, 1] or counts.tolist() == [3, 4, 3, 2, 1, 1]


def test_the_ridge_is_sklearns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y, test = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 4)), rng.normal(size=(2, 4, 3))
    flat = x.reshape(-1, 3)
    mean, std = flat.mean(0), flat.std(0, ddof=1)
    ones = np.ones((20, 1))
    model = linear_model.Ridge(alpha=30.0, fit_intercept=False)
    model.fit(np.hstack([(flat - mean) / std, ones]), y.ravel())
    wanted = model.predict(np.hstack([(test.reshape(-1, 3) - mean) / std, ones[:8]]))
    found = claims.ridge(*map(torch.from_numpy, (x, y, test)))
    assert found.flatten().numpy() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_changed_teacher_is_what_training_hears(is_cached, tmp_path):
    cfg = train.PRESETS["debug"]
    (source,), _ = train.open_sources(cfg)
    teacher = load_teacher(parse_teacher(cfg.teachers[0]))
    if is_cached:
        teacher = CachedTeacher(teacher, tmp_path)
        fill_caches([teacher], source)
    group, heard = Group(0, 1, torch.device("cpu")), []

    def loud(out):
        return TeacherOutput(out.summary_BC * 100, [x * 100 for x in out.patches])

    for one in (teacher, claims.changed(teacher, loud)):
        (data,) = train.make_stages(cfg, [source], MODELS["test"], group, [one])
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
    known = [drawn(*name, (0, 15), (0, 15)) for name in names * 5]
    asked = [drawn("dog", "a dog", (0, 9), (21, 30)), drawn("emu", "an emu", (22, 28), (1, 5))]
    asked += [drawn("owl", "owl", (0, 30), (0, 30)), drawn("cat", None)]
    known_NQ, asked_NQ = claims.questions(FeatureSet(known), FeatureSet(asked))
    assert known_NQ.tolist() == [[i % 3, i % 3, 0, 2] for i in range(15)]
    assert asked_NQ.tolist() == [[1, 1, 2, 0], [-1, -1, 6, 0], [2, 2, 4, 3], [0, -1, -1, -1]]
    right_NQ = torch.tensor([[True, True, False, True], [True] * 4, [False] * 4, [True] * 4])
    parts = claims.answered(right_NQ.repeat(10, 1), asked_NQ.repeat(10, 1))  # 3 + 2 + 0 + 1 of 11
    assert np.mean(parts) == pytest.approx(6 / 11)


@pytest.mark.slow
def test_reading_finds_what_tokens_say_and_where():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(90, 16, 4, generator=generator)
    places = torch.randint(16, (90,), generator=generator)
    tokens[torch.arange(90), places] = torch.eye(4)[torch.arange(90) % 4] * 8
    answers = torch.stack([torch.arange(90) % 4, places // 8, torch.full((90,), -1)], 1)
    pairs, run = (
        [(x, torch.arange(16)) for x in tokens],
        claims.Run("all", {}, 0, 1e-3, claims.FULL),
    )
    hits_NQ = claims.read(pairs[:60], pairs[60:], (4, 4), answers[:60], answers[60:], run)
    assert hits_NQ[:, :2].double().mean() > 0.65  # guessing: 0.37


@pytest.mark.slow
def test_every_claim_runs_resumes_and_fills_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, claim in CLAIMS.items():
        seeds = (0, 5) if name in ("merging", "mosaic", "arkd", "sampling") else (5,)
        monkeypatch.setitem(CLAIMS, name, claims.replace(claim, rates=claim.rates[:1]))
        claims.run_claim(name, seeds, tmp_path, claims.QUICK)
        lines = (tmp_path / f"{name}.jsonl").read_text()
        rows = claims.rows_of(name, tmp_path, claims.QUICK)
        assert len(rows) == len(lines.splitlines())
        assert {r["arm"] for r in rows if r["seed"] == 5} == claim.arms.keys()
        assert all(claims.measure(effect, rows)["n"] == len(seeds) for effect in claim.effects)
        claims.run_claim(name, seeds, tmp_path, claims.QUICK)  # nothing is missing
        assert (tmp_path / f"{name}.jsonl").read_text() == lines
    torch.set_num_threads(threads)
    page = tmp_path / "claims.md"
    page.write_text(
        "".join(f"<!-- {name} -->\n\nProse of {name}.\n" for name in ["summary", *CLAIMS])
    )
    claims.write_tables(page, tmp_path, claims.QUICK)
    text = page.read_text()
    assert text.count("Prose of") == 1 + len(CLAIMS)
    said = [line for line in text.splitlines() if "so far, by 2 of" in line]
    assert {line.split("`")[1] for line in said} == {"merging", "mosaic", "arkd", "sampling"}
    assert text.count("| `balance` EV 48: image - token |") == 2  # its own and the summary
    claims.write_tables(page, tmp_path, claims.QUICK)  # the same again
    assert page.read_text() == text
    assert json.loads(lines.splitlines()[0])["claim"] == name


def test_a_table_of_other_rows_leaves_the_page_alone(capsys):
    page = claims.FOLDER.parent / "claims.md"
    before, again = page.read_bytes(), claims.FOLDER / "again"
    claims.main(["table", "sampling", "--rows", str(again)])
    line = next(x for x in capsys.readouterr().out.splitlines() if "equal - random" in x)
    assert line.startswith("| `sampling` tail 1-NN") and "| 2 |" in line
    assert page.read_bytes() == before
