"""The real command, with few steps: what a run leaves behind, how it resumes, what it refuses."""

import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import losses
import train
from model import MODELS, Layout, load_student, save_student
from packing import PackedBatch, Sample

ROOT = Path(__file__).parent.parent
draw_curves = train.draw_curves  # the fixture below takes it away
QUICK = ["--preset", "debug", "--steps", "6", "--save-every", "2", "--log-every", "1",
         "--data", "openmoji:train:24", "--stats-steps", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_report(monkeypatch, request):
    """Most tests are about the loop: the report at the end is drawn in one of them."""
    if "full_report" not in request.keywords:
        monkeypatch.setattr(train, "finish", lambda *_: None)
        monkeypatch.setattr(train, "draw_curves", lambda *_: None)


def run(out: Path, *flags: str) -> list[dict]:
    """Train in this process; the rows of metrics.jsonl."""
    train.main([*QUICK, "--out", str(out), *flags])
    return rows_of(out)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]


def totals(rows: list[dict]) -> list[str]:
    return [row["loss/total"].hex() for row in rows]


def command(out: Path, *flags: str, processes: int = 1, torchrun: tuple = ()) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc-per-node", str(processes), *torchrun]  # fmt: skip
    line = [*launch, "train.py", *QUICK, "--threads", "1", "--out", str(out), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen, timeout: float = 120) -> tuple[int, str]:
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """One uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: None)
        run(out)
    return out


# -------------------------------------------------------------------------- configuration


def test_every_field_is_a_flag_with_help_and_is_read():
    source = (ROOT / "train.py").read_text()
    for item in dataclasses.fields(train.TrainConfig):
        assert item.metadata["help"]
        uses = re.findall(rf"(?:cfg|self)\.{item.name}\b|\"{item.name}\"", source)
        assert uses, f"nothing reads {item.name}"


def test_flags_change_the_preset():
    flags = ["--preset", "debug", "--steps", "7", "--teachers", "a=builtin:tiny-dense"]
    cfg = train.parse_args(flags)
    assert (cfg.steps, cfg.teachers, cfg.model) == (7, ("a=builtin:tiny-dense",), "test")
    assert cfg.out == "runs/debug"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--preset", "nonsense"], "nonsense"),
        (["--model", "nonsense"], "nonsense"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--teachers", "a=builtin:nonsense"], "builtin:nonsense"),
        (["--teachers", "a=builtin:tiny-dense", "a=builtin:tiny-semantic"], "a"),
        (["--data-weights", "1", "2"], "2"),
        (["--steps", "0"], "steps"),
        (["--relation", "nonsense"], "nonsense"),
        (["--resume", "/no/such/checkpoint"], "/no/such/checkpoint"),
    ],
)
def test_wrong_flags_are_one_clear_line(flags, names, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*QUICK, "--out", str(tmp_path), *flags])
    text = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code != 0
    assert names in text


@pytest.mark.parametrize("content", [None, "notes.txt"])
def test_a_folder_without_pictures_is_refused(content, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    if content:
        (folder / content).write_text("no picture")
    with pytest.raises(SystemExit, match="pictures"):
        train.main([*QUICK, "--out", str(tmp_path / "out"), "--data", str(folder)])


def test_a_report_without_pictures_is_refused(tmp_path):
    make_pictures(tmp_path / "pictures", good=4, bad=0)
    with pytest.raises(SystemExit, match="held_out"):
        run(tmp_path / "out", "--data", str(tmp_path / "pictures"), "--held-out", "0.0001")


# ------------------------------------------------------------------------------ a run


@pytest.mark.slow
@pytest.mark.full_report
def test_a_run_leaves_what_the_readme_says(tmp_path, capsys):
    run(tmp_path)
    header = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert header["config"]["preset"] == "debug"
    row = rows_of(tmp_path)[-1]
    names = {"step", "loss/total", "loss/dense/patches", "loss/semantic/summary", "lr", "grad_norm"}
    assert names | {"loss/dense/relation", "tokens_per_s", "moe/max_load"} <= set(row)
    for name in ("curves.png", "pca.png"):
        assert Image.open(tmp_path / name).size[0] > 100
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{n:06d}" for n in (2, 4, 6)]
    train.main([*QUICK, "--out", str(tmp_path)])
    assert "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="steps"):
        train.main([*QUICK, "--out", str(tmp_path), "--steps", "8"])


def test_losses_fall(tmp_path):
    rows = run(tmp_path, "--steps", "30", "--save-every", "30", "--lr", "3e-3")
    assert sum(r["loss/total"] for r in rows[-5:]) < 0.95 * sum(r["loss/total"] for r in rows[:5])


def test_the_saved_student_outputs_raw_teacher_features(reference):
    """PHI-S is folded: the saved heads equal the denormalised outputs of the trained ones."""
    folder = reference / "step_000006"
    student = load_student(folder / "model.pt")
    cfg = train.parse_args(QUICK)
    teachers = [train.load_teacher(train.parse_teacher(t)) for t in cfg.teachers]
    trainer = train.Trainer(cfg, train.Group(0, 1, torch.device("cpu")), teachers)
    trainer.load_state_dict(train.read_state(folder))
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    with torch.no_grad():
        raw, normal = student(batch), trainer.student(batch)
    for name, space in trainer.spaces.items():
        for part, norm in space.parts.items():
            expected = norm.denormalize(getattr(normal, part)[name])
            torch.testing.assert_close(getattr(raw, part)[name], expected, rtol=1e-4, atol=1e-4)


def test_micro_batches_do_not_change_the_step(tmp_path, reference):
    rows = run(tmp_path, "--micro-packs", "1")
    for ours, theirs in zip(rows, rows_of(reference), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)


# ------------------------------------------------------------------- presets and what they use

CPU = train.Group(0, 1, torch.device("cpu"))
TINY_RADIO = dataclasses.replace(
    MODELS["radio-b"], dim=32, n_layers=2, n_heads=2, head_dim=16, ffn_dim=48, position_grid=8
)


def tiny(preset: str, **changes) -> train.TrainConfig:
    """A shrunken copy of a preset: sides and packs of an eighth, toy teachers, a toy student."""
    cfg = train.PRESETS[preset]
    stages = []
    for stage in cfg.stages:
        streams = []
        for stream in stage.streams:
            sides = {
                "max_side": max(48, stream.max_side // 8),
                "min_side": stream.min_side // 8,
                "choices": tuple(max(32, side // 8 // 16 * 16) for side in stream.choices),
            }
            streams.append(dataclasses.replace(stream, **sides, budget=96, packs=2))
        stages.append(dataclasses.replace(stage, streams=tuple(streams)))
    small = {
        "stages": tuple(stages), "teachers": train.PRESETS["debug"].teachers, "head_hidden": 16,
        "data": ("openmoji:train:40",) * len(cfg.data), "model": "tiny", "steps": 3, "workers": 0,
        "stats_steps": 2, "frozen_steps": min(1, cfg.frozen_steps), "warmup": 1, "threads": 1,
    }  # fmt: skip
    return dataclasses.replace(cfg, **small | changes)


def trainer_of(cfg: train.TrainConfig) -> tuple[train.Trainer, list]:
    """A trainer that is ready to step, and its stages' data."""
    sources, _ = train.open_sources(cfg)
    teachers = [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]
    trainer = train.Trainer(cfg, CPU, teachers)
    stages = train.make_stages(cfg, sources, trainer.student, CPU)
    trainer.fit_normalizers(stages[0])
    return trainer, stages


@pytest.mark.parametrize("preset", ["amoe-stage1", "amoe-stage2", "radio-stage1", "radio-stage2",
                                    "radio-stage3"])  # fmt: skip
def test_two_steps_of_a_shrunken_copy_of_each_preset(preset, monkeypatch):
    form = MODELS["test"] if preset.startswith("amoe") else TINY_RADIO
    monkeypatch.setitem(train.MODELS, "tiny", form)
    trainer, stages = trainer_of(tiny(preset))
    before = {name: x.clone() for name, x in trainer.student.state_dict().items()}
    first = trainer.step(1, stages[0][0])
    trunk = [n for n in before if not n.startswith("heads.") and n.endswith("weight")]
    if trainer.cfg.frozen_steps:  # the first steps train the heads alone
        state = trainer.student.state_dict()
        assert all(torch.equal(state[n], before[n]) for n in before if not n.startswith("heads."))
        assert not torch.equal(state["heads.dense.patches.last.weight"],
                               before["heads.dense.patches.last.weight"])  # fmt: skip
    second = trainer.step(2, stages[0][1])
    assert any(not torch.equal(trainer.student.state_dict()[n], before[n]) for n in trunk)
    for result in (first, second):
        assert all(value == value for value in result.losses.values())
        partitions = {p for batch in stages[0][0] for p in batch.partition_B}
        assert partitions == set(range(len(trainer.cfg.stages[0].streams)))


def test_the_papers_presets_say_what_the_papers_do():
    stage3 = train.PRESETS["radio-stage3"]
    pictures = [stream.packs * (stream.budget // ((stream.choices[0] // 16) ** 2 + 8))
                for stream in stage3.stages[0].streams]  # fmt: skip
    assert pictures == [1024, 128]  # RADIO Sec. 2.1
    assert (stage3.optimizer, stage3.lr, stage3.weight_decay) == ("lamb", 1e-3, 0.02)
    assert (stage3.stats_steps, stage3.frozen_steps, stage3.steps) == (3000, 5000, 300_000)
    steps = [train.PRESETS[f"amoe-stage{i}"].steps for i in (1, 2)]
    assert steps == [50_000, 90_000]
    for name, cfg in train.PRESETS.items():
        assert (cfg.preset, cfg.out) == (name, f"runs/{name}")


def test_wrong_batches_are_refused_with_both_numbers():
    cfg = train.PRESETS["amoe-stage1"]
    with pytest.raises(ValueError, match="1000000 is not a multiple of the 1625536"):
        dataclasses.replace(cfg, global_tokens=1_000_000)
    twice = dataclasses.replace(cfg, global_tokens=2 * 1_625_536)
    assert twice.times(twice.stages[0]) == 2
    radio = train.PRESETS["radio-stage3"].stages[0]
    for images, times in ((16 * 64 + 2 * 64, 1), (3 * (16 * 64 + 2 * 64), 3)):
        by_images = dataclasses.replace(train.PRESETS["radio-stage3"], global_images=images)
        assert by_images.times(radio, 16, 8) == times
    with pytest.raises(ValueError, match="global_images=1000 is not a multiple of the 1152 images"):
        dataclasses.replace(by_images, global_images=1000).times(radio, 16, 8)
    with pytest.raises(ValueError, match="stream low hold pictures of many sizes"):
        dataclasses.replace(cfg, global_images=1024).times(cfg.stages[0])
    with pytest.raises(ValueError, match="pass one of them"):
        dataclasses.replace(twice, global_images=1024)
    with pytest.raises(ValueError, match="report is scored on openmoji:test"):
        train.open_sources(dataclasses.replace(cfg, data=("openmoji:all",)))
    with pytest.raises(ValueError, match="SOURCE number 1, but --data has 1"):
        dataclasses.replace(train.PRESETS["amoe-stage2"], data=("photos",))
    with pytest.raises(ValueError, match="micro_packs=3"):
        trainer_of(dataclasses.replace(train.PRESETS["debug"], micro_packs=3))


def batch_of(sides: list[int], partitions: list[int]) -> PackedBatch:
    images = [torch.rand(3, side, side) for side in sides]
    batch = PackedBatch.from_images(images, 16, [sample_of(x, i) for i, x in enumerate(images)])
    return dataclasses.replace(batch, partition_B=partitions)


def sample_of(image: torch.Tensor, i: int) -> Sample:
    pixels = (255 * image).byte().permute(1, 2, 0).numpy()
    return Sample(str(i), str(i), pixels)


@pytest.mark.parametrize(
    ("average", "dense", "semantic"),
    [
        # three pictures of 1, 4 and 9 patches; the last one alone in the second stream, which the
        # semantic teacher does not see
        ("image", [1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]),
        ("partition", [1 / 4, 1 / 4, 1 / 2], [1 / 4, 1 / 4, 0]),
        ("token", [1 / 14, 4 / 14, 9 / 14], [1 / 5, 4 / 5, 0]),
    ],
)
def test_image_weights_by_hand(average, dense, semantic):
    streams = (train.Stream("low"), train.Stream("high", teachers=("dense",)))
    cfg = dataclasses.replace(
        train.PRESETS["debug"], average=average, stages=(train.Stage(1.0, streams),)
    )
    trainer = train.Trainer(cfg, CPU, [train.load_teacher(train.parse_teacher(t))
                                       for t in cfg.teachers])  # fmt: skip
    micros = [batch_of([16, 32], [0, 0]), batch_of([48], [1])]
    weights = trainer.image_weights(streams, micros)
    for name, expected in (("dense", dense), ("semantic", semantic)):
        found = torch.cat([micro[name][1] for micro in weights])
        torch.testing.assert_close(found, torch.tensor(expected))


def test_a_teacher_leaves_streams_that_it_does_not_supervise_alone():
    """Neither its feature losses nor its relations see their pictures."""
    streams = (train.Stream("low", 48, budget=96), train.Stream("high", 96, budget=96,
                                                                teachers=("dense",)))  # fmt: skip
    stages = (train.Stage(1.0, streams),)
    trainer, (data,) = trainer_of(dataclasses.replace(train.PRESETS["debug"], stages=stages))
    whole, low = trainer.step(1, data[0]), trainer_of(trainer.cfg)[0].step(1, data[0][:2])
    for part in ("semantic/patches", "semantic/summary", "semantic/relation"):
        assert whole.losses[part] == pytest.approx(low.losses[part], rel=1e-5)
    assert whole.losses["dense/patches"] != pytest.approx(low.losses["dense/patches"], rel=1e-3)


def test_a_shifted_student_learns_what_the_teacher_said_of_the_same_place():
    cfg = dataclasses.replace(train.PRESETS["debug"], shift=2, stats_steps=1)
    trainer, stages = trainer_of(cfg)
    batch = PackedBatch.cat(stages[0][0])
    assert any(origin != (0, 0) for origin in batch.origins)
    (weights,) = trainer.image_weights(cfg.stages[0].streams, [batch])
    targets, out = trainer.targets(batch), trainer.forward(1, batch)
    for name, target in targets.items():  # a student that says just this
        wholes = zip(target.patches, batch.wholes, strict=True)
        views = zip(wholes, batch.origins, batch.grids, strict=True)
        rows = [losses.resize_map(*whole)[y : y + h, x : x + w].flatten(0, 1)
                for whole, (y, x), (h, w) in views]  # fmt: skip
        out.patches[name] = torch.cat(rows)
    parts = trainer.feature_losses(out, out.summary, batch, targets, weights)
    assert all(abs(parts[f"{name}/patches"]) < 1e-9 for name in targets)
    batch.origins[:] = [(0, 0)] * len(batch)
    parts = trainer.feature_losses(out, out.summary, batch, targets, weights)
    assert all(parts[f"{name}/patches"] > 0.01 for name in targets)


# --------------------------------------------------------------- the space of the targets

# The dense teacher's grid is twice as fine as the student's, so its maps are averaged down.
TWO_STAGES = dataclasses.replace(
    train.PRESETS["debug"], stages=(train._native(0.5, 48, 160), train._native(1.0, 96, 640)),
    steps=6, stats_steps=2,
)  # fmt: skip


def seen_maps(trainer: train.Trainer, packs: list[PackedBatch]) -> dict[str, torch.Tensor]:
    """All tokens of the maps that a step's loss compares, before normalisation, by interpolate."""
    from test_losses import interpolate

    rows: dict[str, list] = {t.name: [] for t in trainer.teachers}
    for batch in packs:
        for teacher in trainer.teachers:
            maps = teacher.targets(batch.samples, batch.sizes).patches
            for y, grid in zip(maps, batch.grids, strict=True):
                small = min(y.shape[0], grid[0]), min(y.shape[1], grid[1])
                rows[teacher.name] += interpolate(y.double(), small).flatten(0, 1)
    return {name: torch.stack(tokens) for name, tokens in rows.items()}


def test_the_statistics_are_of_the_maps_that_the_loss_sees_at_each_stage():
    trainer, stages = trainer_of(TWO_STAGES)
    scales = []
    for k, data in enumerate(stages):
        if k:
            trainer.fit_normalizers(data, k)
        seen = seen_maps(trainer, [pack for step in range(2) for pack in data[step]])
        for name, rows_NC in seen.items():
            fitted = trainer.spaces[name].parts["patches"].current()
            phi = rows_NC.var(0, correction=0).mean().sqrt()
            torch.testing.assert_close(fitted.scale, phi, rtol=1e-4, atol=0)
            torch.testing.assert_close(fitted.shift, rows_NC.mean(0), rtol=1e-3, atol=1e-4)
            scales.append(float(phi))
        if k == 0:  # all of these pictures at once, and a student that answers the mean
            values = trainer.step(1, [*data[0], *data[1]]).losses
            for part in ("dense/patches", "dense/summary", "semantic/patches", "semantic/summary"):
                assert values[part] == pytest.approx(1, abs=0.05), part
        packs = [pack for step in range(data.steps_in(0)) for pack in data[step]]
        new = trainer.targets(PackedBatch.cat(packs))
        for name, target in new.items():
            rows_NC = torch.cat([y.flatten(0, 1) for y in target.patches])
            assert rows_NC.var(0).mean() == pytest.approx(1, abs=0.15), name
            assert target.summary_BC.var(0).mean() == pytest.approx(1, abs=0.15), name
    assert abs(scales[0] / scales[2] - 1) > 0.02  # or this test would not see a refit


def test_heads_and_their_running_means_answer_alike_across_a_refit():
    trainer, stages = trainer_of(dataclasses.replace(TWO_STAGES, ema=0.9, lr=0.01, warmup=0))
    for step in (1, 2, 3):
        trainer.step(step, stages[0][step])
    batch = PackedBatch.cat(stages[1][0])

    def answers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        mean = train.Student(trainer.student.config)
        mean.load_state_dict(trainer.student.state_dict() | trainer.average)
        found, scales = [], []
        for student in (trainer.student, mean):
            with torch.no_grad():
                out = student(batch)
            for name, space in trainer.spaces.items():
                for part, norm in space.parts.items():
                    y, (shift_C, scale, turn_CC) = getattr(out, part)[name], norm.current()
                    found.append(y.double() @ turn_CC * scale + shift_C)
                    scales.append(scale)
        return found, scales

    moments = [x.clone() for s in trainer.optimizer.state.values() for x in s.values()]
    (before, old), _ = answers(), trainer.fit_normalizers(stages[1], 1)
    after, new = answers()
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        assert x.std(0).mean() > 1e-3 * old[i]  # no longer a constant
        assert (x - y).abs().max() < 1e-5 * old[i]
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(old, new, strict=True))
    assert not torch.allclose(before[0], before[4])  # the running mean is another student
    kept = [x for s in trainer.optimizer.state.values() for x in s.values()]
    assert all(torch.equal(x, y) for x, y in zip(moments, kept, strict=True))


def test_statistics_are_of_the_streams_that_a_teacher_supervises():
    streams = (train.Stream("low", 48, budget=96), train.Stream("high", 96, budget=96,
                                                                teachers=("dense",)))  # fmt: skip
    cfg = dataclasses.replace(train.PRESETS["debug"], stages=(train.Stage(1.0, streams),))
    trainer, (data,) = trainer_of(cfg)
    batch = PackedBatch.cat([pack for step in range(cfg.stats_steps) for pack in data[step]])
    seen = {name: int(space.parts["summary"].statistics.total)
            for name, space in trainer.spaces.items()}  # fmt: skip
    assert seen == {"dense": len(batch), "semantic": batch.partition_B.count(0)}
    # one that supervises none of a stage has a space all the same: its pictures' weights are 0
    other = (dataclasses.replace(streams[1], teachers=("dense",)),)
    trainer, (data,) = trainer_of(dataclasses.replace(cfg, stages=(train.Stage(1.0, other),)))
    assert trainer.step(1, data[0]).losses["semantic/patches"] == 0


def test_features_that_are_not_finite_stop_before_the_statistics(tmp_path, monkeypatch):
    whole = train.Teacher.targets

    def poisoned(self, samples, sizes=None):
        out = whole(self, samples, sizes)
        out.patches[0][0, 0, 0] = float("inf")
        return out

    monkeypatch.setattr(train.Teacher, "targets", poisoned)
    with pytest.raises(SystemExit, match="statistics of teacher dense: a feature is not finite"):
        run(tmp_path)


def test_a_student_in_training_can_be_pickled():
    trainer, (data,) = trainer_of(dataclasses.replace(train.PRESETS["debug"], stats_steps=1))
    batch, copy = PackedBatch.cat(data[0]), pickle.loads(pickle.dumps(trainer.student))
    with torch.no_grad():
        a, b = trainer.student(batch), copy(batch)
    assert all(torch.equal(a.patches[name], b.patches[name]) for name in a.patches)


def test_registers_are_compared_raw_by_the_patches_loss():
    from teachers import Backbone, SizeRule, Teacher

    def read(network, pixels_BCHW):
        map_BhwC = network(pixels_BCHW).movedim(1, -1)
        pooled = map_BhwC.mean((1, 2))
        return pooled, map_BhwC, torch.stack([r * pooled + 3 for r in range(1, 5)], 1)

    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 8, kernel_size=16, stride=16)
    teacher = Teacher("t", Backbone(network, read, SizeRule("native", 16, 512)))
    cfg = dataclasses.replace(train.PRESETS["debug"], teachers=("t=x",), patch_loss="cosine")
    trainer = train.Trainer(cfg, CPU, [teacher])
    [data] = train.make_stages(cfg, train.open_sources(cfg)[0], trainer.student, CPU)
    trainer.fit_normalizers(data)
    batch = PackedBatch.cat(data[0])
    shift_C, scale, turn_CC = trainer.spaces["t"].parts["patches"].current()
    with torch.no_grad():
        ours_BRC = trainer.student(batch).registers["t"].double() @ turn_CC * scale + shift_C
    theirs_BRC = teacher.targets(batch.samples, batch.sizes).registers_BRC.double()
    dots = [[float(x @ y / (x.norm() * y.norm())) for x, y in zip(xs, ys, strict=True)]
            for xs, ys in zip(ours_BRC, theirs_BRC, strict=True)]  # fmt: skip
    expected = sum(1 - dot for row in dots for dot in row) / (4 * len(batch))
    assert trainer.step(1, data[0]).losses["t/registers"] == pytest.approx(expected, rel=1e-4)


def test_the_position_table_is_not_decayed(monkeypatch):
    monkeypatch.setitem(train.MODELS, "tiny", TINY_RADIO)
    cfg = dataclasses.replace(train.PRESETS["debug"], model="tiny")
    teachers = [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]
    student, _ = train.build_student(cfg, teachers)
    decayed = {id(p) for group in train.make_optimizer(cfg, student).param_groups
               for p in group["params"] if group["weight_decay"]}  # fmt: skip
    names = {name for name, p in student.named_parameters() if id(p) in decayed}
    assert "positions.table_GGD" not in names
    assert {"embed.weight", "prefix_RD", "heads.dense.patches.last.weight"} <= names


@pytest.mark.parametrize(
    ("changes", "title"),
    [({}, "feature loss (1: whoever answers the stage's mean)"),
     ({"summary_loss": "cosine"}, "feature loss (mse, cosine of phis)"),
     ({"normalizer": "global"}, "feature loss (mse, mse of global)")],
)  # fmt: skip
def test_curves_say_what_they_show_and_where_stages_end(changes, title, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    row = {"loss/total": 2.0, "loss/a/patches": 1.0, "loss/a/relation": 0.1, "moe/max_load": 1.5,
           "grad_norm": 1.0, "lr": 1e-3}  # fmt: skip
    rows = [{"step": step} | row for step in (1, 6)]
    draw_curves(rows, tmp_path / "curves.png", dataclasses.replace(TWO_STAGES, **changes))
    assert drawn[0].axes[0].get_title() == title
    for axis in drawn[0].axes:
        assert [list(line.get_xdata()) for line in axis.lines].count([3.5, 3.5]) == 1


def test_adaloss_brings_all_parts_near_one():
    trainer, (data,) = trainer_of(dataclasses.replace(train.PRESETS["debug"], balance="adaloss"))
    parts = trainer.step(1, data[0]).losses
    for name, value in parts.items():
        if name != "total":
            assert trainer.weight(name) * value == pytest.approx(1, rel=1e-6)
    assert trainer.step(2, data[1]).losses["total"] == pytest.approx(len(parts) - 1, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"summary_loss": "angle"}, {"summary_loss": "cosine"},
                                     {"patch_loss": "am-radio", "normalizer": "none"},
                                     {"precision": "bf16"}, {"recompute": True},
                                     {"optimizer": "lamb", "ema": 0.5}, {"shift": 1}])  # fmt: skip
def test_two_interruptions_change_no_bit_whatever_the_recipe(changes, tmp_path, monkeypatch):
    flags = [text for k, v in changes.items()
             for text in ([f"--{k.replace('_', '-')}"] if v is True else
                          [f"--{k.replace('_', '-')}", str(v)])]  # fmt: skip
    flags += ["--frozen-steps", "3"]
    expected = totals(run(tmp_path / "whole", *flags))
    for step in (4, 6):  # the first one falls where the trunk is still frozen in the checkpoint
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path / "cut", *flags)
    assert totals(run(tmp_path / "cut", *flags)) == expected


def test_recomputed_blocks_give_the_same_gradients():
    debug = train.PRESETS["debug"]
    norms = []
    for recompute in (False, True):
        trainer, (data,) = trainer_of(dataclasses.replace(debug, recompute=recompute))
        norms.append(trainer.step(1, data[0]).grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same_and_compile_once():
    """Pictures of other sizes in every step must not compile anew: a layout is no constant."""
    results = []
    for is_compiled in (False, True):
        cfg = dataclasses.replace(train.PRESETS["debug"], compile=is_compiled, stats_steps=1)
        trainer, stages = trainer_of(cfg)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        losses_of = [trainer.step(step, stages[0][step]).losses["total"] for step in (1, 2, 3)]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        more = trainer.step(4, stages[0][4]).losses["total"]
        results.append([*losses_of, more])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert bool(graphs) == is_compiled
    assert results[1] == pytest.approx(results[0], rel=1e-5)


def test_lamb_is_its_algorithm():
    torch.manual_seed(0)
    matrix, vector = torch.randn(4, 3).requires_grad_(), torch.randn(3).requires_grad_()
    groups = [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}]
    optimizer = train.Lamb(groups, lr=0.01, betas=(0.9, 0.99))
    expected = [x.detach().double().clone() for x in (matrix, vector)]
    means, squares = [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 4):
        for i, (x, decay) in enumerate(((matrix, 0.1), (vector, 0.0))):
            x.grad = torch.randn(x.shape)
            g, w = x.grad.double(), expected[i]
            means[i] = 0.9 * means[i] + 0.1 * g
            squares[i] = 0.99 * squares[i] + 0.01 * g**2
            scale = (squares[i] / (1 - 0.99**t)) ** 0.5 + 1e-6
            u = means[i] / (1 - 0.9**t) / scale + decay * w
            ratio = w.norm() / u.norm() if decay else 1.0  # phi is the identity
            expected[i] = w - 0.01 * ratio * u
        optimizer.step()
    for x, y in zip((matrix, vector), expected, strict=True):
        torch.testing.assert_close(x.detach().double(), y, rtol=1e-5, atol=1e-6)


def test_the_running_mean_is_what_is_saved(tmp_path):
    """A mean that starts at the untrained weights must soon forget them, or it is what is saved."""
    flags = ("--steps", "3", "--save-every", "1", "--lr", "0.1", "--warmup", "1")
    run(tmp_path, "--ema", "0.26", *flags)
    states = [train.read_state(tmp_path / f"step_00000{i}") for i in (1, 2, 3)]
    name = "blocks.0.attn.qkv.weight"
    mean = states[0]["average"][name]
    for state, decay in zip(states[1:], (3 / 12, 0.26), strict=True):  # 4 / 13 is more than 0.26
        mean = decay * mean + (1 - decay) * state["student"][name]
        torch.testing.assert_close(state["average"][name], mean)
    saved = load_student(tmp_path / "step_000003" / "model.pt").state_dict()[name]
    torch.testing.assert_close(saved, mean)
    assert not torch.equal(saved, states[2]["student"][name])


def test_a_slow_running_mean_forgets_the_untrained_weights():
    """After n steps (n + 1)! 10! / (n + 10)! of them are left: 4e-9 by step 40."""
    cfg = dataclasses.replace(train.PRESETS["debug"], ema=0.999, stats_steps=1)
    trainer, (data,) = trainer_of(cfg)
    first = {name: mean.clone() for name, mean in trainer.average.items()}
    expected = {name: mean.double() for name, mean in first.items()}
    for step in range(1, 6):
        trainer.step(step, data[step])
        for name, p in train.trained(trainer.student):
            rate = 9 / (10 + step)
            expected[name] = (1 - rate) * expected[name] + rate * p.detach().double()
    for name, mean in trainer.average.items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_kept_checkpoints(tmp_path):
    run(tmp_path, "--save-every", "1", "--keep", "2", "--keep-every", "3")
    assert [int(path.name[5:]) for path in train.checkpoints(tmp_path)] == [3, 5, 6]


@pytest.mark.slow
def test_a_look_during_the_run(tmp_path):
    rows = run(tmp_path, "--look-every", "4", "--data", "openmoji:train:96")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6]
    assert 0 <= rows[4]["knn/student/trunk"] <= 1
    assert Image.open(tmp_path / "pca.png").size[0] > 100


# ---------------------------------------------------------- starting from something pretrained


def save_vit(name: str, folder: Path):
    """A tiny random ViT of transformers in a folder, and the model."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64,
             "patch_size": 16}  # fmt: skip
    more = {"ViT": {"intermediate_size": 48}, "Dinov2": {}, "Dinov2WithRegisters": {
        "use_swiglu_ffn": True}}[name]  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**sizes, **more)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "Dinov2WithRegisters"])
def test_a_pretrained_vit_becomes_a_student(name, tmp_path):
    model = save_vit(name, tmp_path)
    cfg = dataclasses.replace(train.PRESETS["warm"], init=f"x={tmp_path}", data=("openmoji",),
                              teachers=train.PRESETS["debug"].teachers)  # fmt: skip
    teachers = [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]
    student, folded = train.build_student(cfg, teachers)
    assert not folded and student.config.cls_tokens == 2
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (student.config.pixel_mean,
                                                        student.config.pixel_std))  # fmt: skip
    with torch.no_grad():
        # the second teacher's CLS token is new to the network: only one CLS token compares
        alone, _ = train.build_student(dataclasses.replace(cfg, teachers=cfg.teachers[:1]),
                                       teachers[:1])  # fmt: skip
        tokens = model(pixel_values=(images - mean) / std).last_hidden_state
        out = alone(PackedBatch.from_images(list(images), 16))
    torch.testing.assert_close(out.trunk_summary_BD, tokens[:, 0], rtol=1e-4, atol=1e-4)
    skip = tokens.shape[1] - 16
    torch.testing.assert_close(out.trunk_MD, tokens[:, skip:].flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_cls_token_follows_its_teacher(tmp_path, monkeypatch):
    monkeypatch.setitem(train.MODELS, "tiny", TINY_RADIO)
    cfg = dataclasses.replace(train.PRESETS["debug"], model="tiny")
    teachers = [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]
    given, _ = train.build_student(cfg, teachers)
    save_student(given, tmp_path / "s.pt")
    changed = dataclasses.replace(cfg, init=f"x={tmp_path / 's.pt'}", teachers=cfg.teachers[::-1])
    student, folded = train.build_student(changed, teachers[::-1])
    assert folded == {"dense", "semantic"}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    for name, summary in given(batch).summary.items():
        torch.testing.assert_close(student(batch).summary[name], summary)


def test_our_checkpoint_goes_on_in_another_run(reference):
    """Its folded heads are unfolded into the new statistics, so step 0 answers as before."""
    init = f"x={reference / 'step_000006' / 'model.pt'}"
    cfg = dataclasses.replace(train.parse_args(QUICK), init=init, stats_steps=2)
    trainer, _ = trainer_of(cfg)
    assert trainer.folded_heads == {"dense", "semantic"}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    with torch.no_grad():
        given = load_student(reference / "step_000006" / "model.pt")(batch)
        now = trainer.student(batch)
    for name, space in trainer.spaces.items():
        for part, norm in space.parts.items():
            raw = norm.denormalize(getattr(now, part)[name])
            torch.testing.assert_close(raw, getattr(given, part)[name], rtol=1e-4, atol=1e-4)


def test_an_init_that_does_not_fit_is_refused(tmp_path, reference):
    init = f"x={reference / 'step_000006' / 'model.pt'}"
    with pytest.raises(SystemExit, match="prefix_RD"):
        run(tmp_path, "--init", init, "--model", "nano")
    with pytest.raises(SystemExit, match="no/such"):
        run(tmp_path, "--init", "x=/no/such/file")
    with pytest.raises(SystemExit, match="--init"):
        run(tmp_path, "--model", "init")


def test_siglips_pooling_head_makes_the_summary(tmp_path):
    """AMoE 1.6 and 2.2: the frozen head reads patches in the teacher's space, not in PHI-S'."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 16}
    model = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**sizes, intermediate_size=48, num_patches=16)
    )
    model.save_pretrained(tmp_path)
    cfg = dataclasses.replace(train.PRESETS["debug"], teachers=(f"siglip2={tmp_path}",))
    trainer, (data,) = trainer_of(cfg)
    head = trainer.student.heads["siglip2"]
    frozen = {name: p.clone() for name, p in head.pool.named_parameters()}
    first = trainer.step(1, data[0])
    assert {"siglip2/patches", "siglip2/summary", "siglip2/relation"} < set(first.losses)
    for name, p in head.pool.named_parameters():
        assert torch.equal(p, frozen[name])
    # what is saved answers as what is trained, in the teacher's space
    trainer.save_folded(tmp_path / "model.pt", trainer.state_dict())
    batch = data[0][0]
    with torch.no_grad():
        saved = load_student(tmp_path / "model.pt")
        raw, normal = saved(batch), trainer.student(batch)
    kept = saved.heads["siglip2"].pool.qkv  # the teacher's own again
    torch.testing.assert_close(kept.weight, model.head.attention.in_proj_weight)
    torch.testing.assert_close(kept.bias, model.head.attention.in_proj_bias)
    faint = 1e-4 * torch.randn(1, 9, 32)  # so faint that the norm's epsilon counts
    for p in (saved.heads["siglip2"].pool, model.head):
        torch.nn.init.zeros_((p.proj if hasattr(p, "proj") else p.attention.out_proj).bias)
    with torch.no_grad():
        ours = saved.heads["siglip2"].pool(faint[0], Layout.of([(3, 3)], 0, faint.device))
        torch.testing.assert_close(ours, model.head(faint), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(raw.summary["siglip2"], normal.summary["siglip2"], rtol=1e-3,
                               atol=1e-4)  # fmt: skip
    # a student whose patches are right has a summary near the teacher's: it reads the same space
    pooled = trainer.spaces["siglip2"].parts["summary"].normalize(raw.summary["siglip2"])
    torch.testing.assert_close(trainer.summaries(normal)["siglip2"], pooled, rtol=1e-2, atol=1e-2)


PAIRS = [("naflex", "dinov3"), ("clip", "dinov2"), ("siglip", "sam"),
         ("dinov2-registers", "sam2"), ("dinov3", "ours")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["test", "radio"])
@pytest.mark.parametrize("pair", PAIRS)
def test_any_two_teachers_train_either_form(pair, form, tmp_path, reference, monkeypatch):
    pytest.importorskip("transformers")
    from test_teachers import make

    monkeypatch.setitem(train.MODELS, "radio", TINY_RADIO)
    flags = ["--teachers"]
    for name in pair:
        if name == "ours":
            flags.append(f"ours={reference / 'step_000006' / 'model.pt'}")
        else:
            make(tmp_path / name, name)
            flags.append(f"{name}={tmp_path / name}")
    rows = run(tmp_path / "out", *flags, "--model", form, "--steps", "2", "--head-hidden", "16")
    for name in pair:
        assert rows[-1][f"loss/{name}/patches"] > 0
    student = load_student(tmp_path / "out" / "step_000002" / "model.pt")
    found = student.encode([torch.rand(3, 40, 60)])[0]
    assert set(found.patches) == {"trunk", *pair}


# ------------------------------------------------------------------------------ resuming


class Interrupted(Exception):
    pass


def interrupt_before(step: int, monkeypatch) -> None:
    """Make the trainer die when it is given this step, as a kill would."""
    whole = train.Trainer.step

    def dies(self, number, *args):
        if number == step:
            raise Interrupted
        return whole(self, number, *args)

    monkeypatch.setattr(train.Trainer, "step", dies)


def test_two_interruptions_change_no_bit(tmp_path, reference, monkeypatch):
    for step in (4, 6):
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path, "--workers", str(step % 4 // 2))
    assert totals(run(tmp_path)) == totals(rows_of(reference))


@pytest.mark.slow
def test_stops_at_a_stage_border_and_behind_it_change_no_bit(tmp_path, monkeypatch):
    """Steps 1 to 3 and 4 to 6: the first stop leaves a checkpoint of step 3, the second of 5."""
    monkeypatch.setitem(train.PRESETS, "debug", TWO_STAGES)
    flags = ("--save-every", "1", "--ema", "0.5", "--stats-steps", "2")
    expected = run(tmp_path / "whole", *flags)
    for step in (4, 6):
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path / "cut", *flags)
        assert train.checkpoints(tmp_path / "cut")[-1].name == f"step_00000{step - 1}"
    assert totals(run(tmp_path / "cut", *flags)) == totals(expected)
    one, two = (train.read_state(tmp_path / name / "step_000006") for name in ("whole", "cut"))
    assert all(torch.equal(two["average"][name], mean) for name, mean in one["average"].items())


@pytest.mark.slow
def test_a_stop_at_the_end_of_an_epoch_changes_no_bit(tmp_path, monkeypatch):
    trainer, (data,) = trainer_of(train.parse_args(QUICK))
    del trainer
    epoch = data.steps_in(0)
    flags = ("--steps", str(epoch + 3), "--save-every", "1")
    expected = totals(run(tmp_path / "whole", *flags))
    for step in (epoch, epoch + 1):
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path / "cut", *flags)
    assert totals(run(tmp_path / "cut", *flags)) == expected


@pytest.mark.slow
def test_a_new_run_in_a_used_folder_sets_the_old_checkpoints_aside(tmp_path, reference):
    run(tmp_path, "--steps", "8", "--seed", "1")
    assert totals(run(tmp_path, "--resume", "none")) == totals(rows_of(reference))
    assert [path.name for path in train.checkpoints(tmp_path)] == [
        "step_000002", "step_000004", "step_000006"]  # fmt: skip
    assert (tmp_path / "old_step_000008").is_dir()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step_1000000", "step_999000"):
        (tmp_path / name).mkdir()
    assert [p.name for p in train.checkpoints(tmp_path)] == ["step_999000", "step_1000000"]


def test_a_restart_by_the_launcher_goes_on_whatever_resume_says(tmp_path, monkeypatch):
    run(tmp_path, "--steps", "2")
    cfg = train.parse_args([*QUICK, "--out", str(tmp_path), "--resume", "none"])
    assert train.newest_checkpoint(cfg) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.newest_checkpoint(cfg) == tmp_path / "step_000002"


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest"])
def test_a_broken_checkpoint_is_named_and_skipped(damage, tmp_path, reference, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(5, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    newest = tmp_path / "step_000004"
    state = newest / "state.pt"
    content = bytearray(state.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "truncate":
        state.write_bytes(content[: len(content) // 2])
    else:
        (newest / "manifest.json").unlink()
    assert totals(run(tmp_path)) == totals(rows_of(reference))
    assert "step_000004" in capsys.readouterr().err


def test_a_pickle_payload_is_refused(tmp_path, reference):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'PWNED'}",))

    folder = tmp_path / "step_000002"
    folder.mkdir()
    for name in ("model.pt", "state.pt"):
        torch.save(Evil(), folder / name, pickle_module=pickle)
    manifest = {n: train.sha256_of(folder / n) for n in ("model.pt", "state.pt")}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "sha256": manifest}))
    with pytest.raises(SystemExit, match=re.escape("state.pt")):
        run(tmp_path, "--resume", str(folder))
    assert not (tmp_path / "PWNED").exists()
    del reference


def test_another_run_is_refused_with_the_difference(tmp_path, reference, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_before(4, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    with pytest.raises(SystemExit, match="lr"):
        run(tmp_path, "--lr", "1e-4")
    with pytest.raises(SystemExit, match="data"):
        run(tmp_path, "--data", "openmoji:train:25")
    assert totals(run(tmp_path)) == totals(rows_of(reference))


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_before(6, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in run(tmp_path)] == [1, 2, 3, 4, 5, 6]


# -------------------------------------------------------------------------------- guards


def test_a_nan_stops_before_the_step_and_names_the_picture(tmp_path, monkeypatch):
    whole = train.Teacher.targets
    calls = []

    def poisoned(self, samples, sizes=None):
        out = whole(self, samples, sizes)
        calls.append(samples[0].key)
        if len(calls) == 9:
            out.patches[0][0, 0, 0] = float("nan")
        return out

    monkeypatch.setattr(train.Teacher, "targets", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert calls[8] in str(stop.value.code)
    assert "step 4" in str(stop.value.code)
    newest = train.checkpoints(tmp_path)[-1]
    assert train.broken(newest) is None
    weights = train.read_state(newest)["student"].values()
    assert all(w.isfinite().all() for w in weights if w.is_floating_point())


def make_pictures(folder: Path, good: int, bad: int) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(good + bad):
        pixels = torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8, generator=generator)
        path = folder / f"{i:03d}.jpg"
        Image.fromarray(pixels.numpy()).save(path, quality=90)
        if i % (good + bad) < bad:
            path.write_bytes(path.read_bytes()[:900])  # a header, but not all of the picture


def test_bad_pictures_are_named_once_and_counted(tmp_path, capsys):
    make_pictures(tmp_path / "pictures", good=60, bad=2)
    run(tmp_path / "out", "--data", str(tmp_path / "pictures"))
    text = capsys.readouterr().err
    state = train.read_state(train.checkpoints(tmp_path / "out")[-1])
    assert set(state["skipped"]) <= {"000.jpg", "001.jpg"}
    for key in state["skipped"]:
        assert text.count(f"skipped {key}") == 1


def test_too_many_bad_pictures_stop_the_run(tmp_path):
    make_pictures(tmp_path / "pictures", good=30, bad=30)
    with pytest.raises(SystemExit, match="max_bad_frac"):
        run(tmp_path / "out", "--data", str(tmp_path / "pictures"))


@pytest.mark.slow
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    run(tmp_path, "--steps", "2")
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path / "small")]
    done = subprocess.run(
        line, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "could not be written" in done.stderr
    assert not list((tmp_path / "small").glob("step_*"))


# ------------------------------------------------------------------------------ processes


@pytest.mark.slow
@pytest.mark.parametrize("relation", ["arkd", "none"])
def test_two_processes_equal_one(relation, tmp_path):
    one = run(tmp_path / "one", "--relation", relation, "--steps", "10", "--save-every", "10")
    code, text = finished(
        command(tmp_path / "two", "--relation", relation, "--steps", "10", processes=2)
    )
    assert code == 0, text
    for a, b in zip(one, rows_of(tmp_path / "two"), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
        assert (a["images"], a["tokens"]) == (b["images"], b["tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_the_run_goes_on(number, tmp_path):
    flags = ("--steps", "4000", "--save-every", "4000")
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path), *flags]
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(tmp_path, 5)
    process.send_signal(number)
    code, text = finished(process)
    assert code == train.EXIT_SIGNALLED + number, text
    assert len(train.checkpoints(tmp_path)) == 1
    step = train.read_state(train.checkpoints(tmp_path)[0])["step"]
    assert rows_of(tmp_path)[-1]["step"] == step


@pytest.mark.slow
def test_kill_9_and_rerun_equal_an_uninterrupted_run(tmp_path):
    flags = ("--steps", "24", "--save-every", "5")
    code, text = finished(command(tmp_path / "whole", *flags, processes=2))
    assert code == 0, text
    process = command(tmp_path / "cut", *flags, processes=2)
    wait_for_step(tmp_path / "cut", 12)
    process.kill()
    process.communicate()
    time.sleep(3)  # the ranks see that their launcher is gone and leave
    code, text = finished(command(tmp_path / "cut", *flags, processes=2))
    assert code == 0, text
    assert totals(rows_of(tmp_path / "cut")) == totals(rows_of(tmp_path / "whole"))


def wait_for_step(out: Path, step: int, timeout: float = 180) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and len(rows_of(out)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{out} did not reach step {step}")


# ----------------------------------------------------------- many processes, and a bad day

PARTITIONED = """
import dataclasses, sys
sys.path.insert(0, {root!r})
import losses
import train
def stage(until, low):
    high = train.Stream("high", 96, budget=96, packs=4, teachers=("dense",))
    return train.Stage(until, (train.Stream("low", low, budget=96), high))
cfg = dataclasses.replace(
    train.PRESETS["debug"], stages=(stage(0.5, 48), stage(1.0, 64)), average="partition", steps=20,
    data=("openmoji:train:60",), stats_steps=2, log_every=1, threads=1, out=sys.argv[1], ema=0.9,
    parallel=sys.argv[2], relation_mean="teacher",  # over its own, near 0 at first, rounding grows
)
train.train_loop(train.prepare(cfg), train.StopSignal())
if train.dist.is_initialized():
    train.dist.destroy_process_group()
"""


@pytest.mark.slow
def test_partitions_of_two_processes_equal_one(tmp_path):
    """MoE, ARKD, PHI-S and two streams: rank 0 has the low one and a part of the high one.

    In the middle a second stage begins, at which copied and sharded heads are carried over.
    """
    script = tmp_path / "partitioned.py"
    script.write_text(PARTITIONED.format(root=str(ROOT)))
    for processes, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        out = tmp_path / f"{processes} {parallel}"
        launch += [str(processes), str(script), str(out), parallel]
        done = subprocess.run(launch, capture_output=True, text=True, timeout=200,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr
    for other in ("2 ddp", "2 fsdp"):
        for one, two in zip(rows_of(tmp_path / "1 ddp"), rows_of(tmp_path / other), strict=True):
            for part in [name for name in one if name.startswith("loss/")]:
                assert one[part] == pytest.approx(two[part], rel=1e-5)
            assert (one["images"], one["tokens"]) == (two["images"], two["tokens"])
        one, two = (train.read_state(train.checkpoints(tmp_path / name)[-1])["average"]
                    for name in ("1 ddp", other))  # fmt: skip
        for name, mean in one.items():
            torch.testing.assert_close(two[name], mean, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_fsdp_equals_ddp_and_its_checkpoint_goes_on_in_one_process(tmp_path):
    flags = ("--steps", "12", "--save-every", "6")
    for name, more in (("ddp", ()), ("fsdp", ("--parallel", "fsdp", "--recompute"))):
        code, text = finished(command(tmp_path / name, *flags, *more, processes=2))
        assert code == 0, text
    expected = rows_of(tmp_path / "ddp")
    for a, b in zip(expected, rows_of(tmp_path / "fsdp"), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    (tmp_path / "fsdp" / "summary.json").unlink()
    (tmp_path / "fsdp" / "step_000012" / "manifest.json").unlink()
    for a, b in zip(expected, run(tmp_path / "fsdp", *flags), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [("--optimizer", "lamb", "--ema", "0.9"), ("--frozen-steps", "3"),
                                  ("--precision", "bf16")])  # fmt: skip
def test_fsdp_with_every_recipe(more, tmp_path):
    for name, parallel in (("ddp", "ddp"), ("fsdp", "fsdp")):
        code, text = finished(command(tmp_path / name, "--parallel", parallel, *more, processes=2))
        assert code == 0, text
    rel = 5e-3 if "bf16" in more else 1e-4  # bf16 has three digits
    for a, b in zip(rows_of(tmp_path / "ddp"), rows_of(tmp_path / "fsdp"), strict=True):
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=rel)


KILLED = """
import itertools, json, os, random, shutil, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_train, train
trainer, (data,) = test_train.trainer_of(train.PRESETS["debug"])
trainer.step(1, data[0])
out, rng, first = Path(sys.argv[1]), random.Random(0), 1
cfg = train.parse_args(["--preset", "debug", "--out", str(out)])
unfinished = 0
for attempt in range(20):
    child = os.fork()
    if child == 0:
        for step in itertools.count(first):
            state = {{"step": step, **trainer.state_dict()}}
            train.write_checkpoint(out / f"step_{{step:06d}}", trainer, state)
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    unfinished += any(out.glob("*.tmp"))
    newest = train.newest_checkpoint(cfg)
    assert newest is not None and newest == train.checkpoints(out)[-1], newest
    assert train.read_state(newest)["step"] == int(newest.name[5:])
    first = int(newest.name[5:]) + 1
    for old in train.checkpoints(out)[:-1]:
        shutil.rmtree(old)
print("unfinished", unfinished)
"""


@pytest.mark.slow
def test_twenty_kills_during_saves_leave_the_newest_checkpoint_whole(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests")))
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")], capture_output=True, text=True,
        timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 5, "the kills missed the saves"


def children_of(pid: int) -> list[int]:
    """Process ids of the children, oldest first (Linux)."""
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_frozen_or_dead_rank_ends_the_run_without_orphans(number, tmp_path):
    flags = ("--steps", "4000", "--save-every", "3", "--pg-timeout", "8")
    process = command(tmp_path, *flags, processes=2)
    wait_for_step(tmp_path, 4)
    ranks = children_of(process.pid)
    os.kill(ranks[1], number)
    code, text = finished(process, 120)
    assert code != 0, text
    end = time.monotonic() + 20
    while any(map(is_alive, ranks)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(is_alive, ranks))
    assert train.broken(train.newest_checkpoint(train.parse_args(["--out", str(tmp_path)]))) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_restart_by_torchrun_goes_on_where_the_killed_run_was(tmp_path):
    flags = ("--steps", "60", "--save-every", "5")
    code, text = finished(command(tmp_path / "whole", *flags, processes=2))
    assert code == 0, text
    process = command(tmp_path / "cut", *flags, processes=2, torchrun=("--max-restarts=1",))
    wait_for_step(tmp_path / "cut", 12)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    code, text = finished(process)
    assert code == 0, text
    assert totals(rows_of(tmp_path / "cut")) == totals(rows_of(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_dead_loader_worker_ends_the_run_with_its_name(tmp_path):
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path), "--steps", "4000",
            "--save-every", "4000", "--workers", "1"]  # fmt: skip
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(tmp_path, 3)
    (worker,) = [pid for pid in children_of(process.pid) if is_alive(pid)]
    os.kill(worker, signal.SIGKILL)
    code, text = finished(process)
    assert code != 0 and str(worker) in text.replace("(", " ").replace(")", " ")


@pytest.mark.slow
def test_bad_pictures_of_one_rank_stop_nobody(tmp_path):
    make_pictures(tmp_path / "pictures", good=60, bad=3)
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ("--data", str(tmp_path / "pictures"), "--steps", "8")
        code, text = finished(command(out, *flags, processes=processes))
        assert code == 0, text
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in "12")
    assert one["skipped"] == two["skipped"] and one["skipped"]
    for a, b in zip(rows_of(tmp_path / "1"), rows_of(tmp_path / "2"), strict=True):
        assert (a["images"], a["tokens"]) == (b["images"], b["tokens"])


def test_a_folder_that_cannot_be_written_is_found_out_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(train, "open_sources", lambda _: pytest.fail("work before the check"))
    with pytest.raises(SystemExit, match="file"):
        run(tmp_path / "file" / "out")
