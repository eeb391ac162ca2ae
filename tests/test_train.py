"""The real command, with few steps: what a run leaves behind, how it resumes, what it refuses."""

import copy
import dataclasses
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from PIL import Image

import losses
import packing
import train
from model import MODELS, Layout, ModelConfig, RadioSpec, Student, load_student, save_student
from packing import PackedBatch, Sample, Source, large_enough, to_float
from teachers import Backbone, SizeRule, Teacher

ROOT = Path(__file__).parent.parent
draw_curves = train.draw_curves  # the fixture below takes it away
QUICK = ["--preset", "debug", "--steps", "6", "--save-every", "2", "--log-every", "1",
         "--data", "openmoji:train:24", "--stats-steps", "1", "--threads", "1",
         "--precision", "fp32"]  # fmt: skip
DEBUG = dataclasses.replace(train.PRESETS["debug"], precision="fp32")  # on any CPU


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
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, two) -> None:
    """Nested states are equal, tensors bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for x, y in zip(one, two, strict=True):
            assert_same(x, y)
    else:
        assert one == two


def assert_same_end(one: Path, two: Path) -> None:
    """Two runs' last checkpoints hold the same, but for the time that they took."""
    states = [train.read_state(train.checkpoints(out)[-1]) for out in (one, two)]
    assert_same(*({k: v for k, v in state.items() if k != "seconds"} for state in states))


def totals(rows: list[dict]) -> list[str]:
    return [row["loss/total"].hex() for row in rows]


def command(
    out: Path, *flags: str, processes: int = 1, torchrun: tuple = (), **how: Any
) -> subprocess.Popen:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
              "--nproc-per-node", str(processes), *torchrun]  # fmt: skip
    line = [*launch, "train.py", *QUICK, "--out", str(out), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how
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
        (["--shift", "0.5", "--cache", "auto"], "pass --cache none"),
        (["--shift", "6", "--cache", "none"], "--shift 6.0 is beyond the 6 patches"),
        (["--frozen-steps", "7"], "--frozen-steps 7 is beyond --steps 6"),
        (["--stepz", "7"], "did you mean --steps?"),
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


RANGES = {  # outside of them: one clear line that names the flag
    "steps": (0, -1, 1.5), "seed": (-1,), "save_every": (0,), "keep": (0,), "keep_every": (-1,),
    "log_every": (0,), "evaluate_every": (-1,), "workers": (-1,), "threads": (-1,),
    "pg_timeout": (0, -1, "nan"), "max_bad_frac": (-0.1, 2), "held_out": (-0.1, 1),
    "max_images": (0,), "global_tokens": (-512,), "micro_packs": (-1,), "shift": (-1, "inf"),
    "relation_weight": (-1, "nan"), "stats_steps": (0,), "frozen_steps": (-1,),
    "lr": (0, -1, "nan"), "trunk_lr": (-1, "nan"), "min_lr": (-1, 5), "warmup": (-5,),
    "weight_decay": (-1,), "beta2": (-0.1, 1.0), "clip": (-1, "nan", "inf"), "ema": (-0.1, 1),
    "router_rate": (-1, "nan"), "head_hidden": (-3,), "data_weights": (0, -1, "nan", "inf"),
}  # fmt: skip


def test_every_number_has_a_range_for_flags_and_for_python(capsys):
    numbers = {f.name for f in dataclasses.fields(DEBUG)
               if type(getattr(DEBUG, f.name)) in (int, float)} | {"data_weights"}  # fmt: skip
    assert numbers == RANGES.keys()
    for name, values in RANGES.items():
        for value in values:
            given = (float(value),) if name == "data_weights" else float(value)
            given = value if isinstance(value, int) and name != "data_weights" else given
            with pytest.raises(ValueError, match=f"^{train.flag(name)} .*must be"):
                dataclasses.replace(DEBUG, **{name: given})
            with pytest.raises(SystemExit):
                train.parse_args([*QUICK, f"{train.flag(name)}={value}"])
            line = capsys.readouterr().err
            assert train.flag(name) in line and str(value) in line and line.count("\n") == 1
    with pytest.raises(ValueError, match="--average"):
        dataclasses.replace(DEBUG, average="images")


def test_clip_0_is_off():
    gradients = [gradients_of(train_for(dataclasses.replace(DEBUG, clip=clip, stats_steps=1), 1))
                 for clip in (0.0, 1e9)]  # fmt: skip
    assert_same(*gradients)


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
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["config"]["preset"] == "debug" and about["version"] and about["left over"]
    row = rows_of(tmp_path)[-1]
    names = {"step", "loss/total", "loss/dense/patches", "loss/semantic/summary", "lr", "grad_norm"}
    assert names | {"loss/dense/relation", "tokens_per_s", "moe/max_load"} <= set(row)
    for name in ("curves.png", "pca.png"):
        assert Image.open(tmp_path / name).size[0] > 100
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [f"step_{n:06d}" for n in (2, 4, 6)]
    newest = tmp_path / "step_000006" / "model.pt"
    assert (tmp_path / "model.pt").read_bytes() == newest.read_bytes()
    printed = capsys.readouterr()
    assert (
        str(tmp_path / "model.pt") in printed.out
        and " held-out pictures, shrunk to " in printed.err
    )
    train.main([*QUICK, "--out", str(tmp_path)])
    assert "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="steps"):
        train.main([*QUICK, "--out", str(tmp_path), "--steps", "8"])


def test_the_log_and_the_checkpoints_have_the_last_step(tmp_path):
    """Steps 1 to 5 by hand: what is logged, saved and counted."""
    rows = run(tmp_path, "--steps", "5", "--log-every", "4", "--warmup", "4", "--lr", "2e-3")
    assert [row["step"] for row in rows] == [4, 5]
    assert [int(path.name[5:]) for path in train.checkpoints(tmp_path)] == [2, 4, 5]
    assert [row["lr"] for row in rows] == pytest.approx([2e-3, 2e-3 * DEBUG.min_lr])
    (data,) = train_for(train.parse_args(QUICK)).stages
    for steps, row in zip((4, 5), rows, strict=True):
        batches = [batch for step in range(steps) for batch in data[step]]
        images, patches = sum(map(len, batches)), sum(sum(batch.lengths) for batch in batches)
        # the small AMoE form has a CLS token and four registers
        assert (row["images"], row["tokens"]) == (images, patches + 5 * images)
        parts = [value for name, value in row.items() if name.startswith("loss/")]
        assert row["loss/total"] == pytest.approx(sum(parts) - row["loss/total"])
        assert row["tokens_per_s_device"] == row["tokens_per_s"] > 0


def test_teachers_from_the_cache_teach_the_same(tmp_path):
    make_pictures(tmp_path / "pictures", good=24, bad=0)
    flags = ("--data", str(tmp_path / "pictures"), "--steps", "2", "--held-out", "0")
    live, cached = (run(tmp_path / name, *flags, "--cache", str(cache))
                    for name, cache in (("a", "none"), ("b", tmp_path / "cache")))  # fmt: skip
    assert list((tmp_path / "cache").rglob("*.features"))
    for one, two in zip(live, cached, strict=True):  # kept as float16
        assert one["loss/total"] == pytest.approx(two["loss/total"], rel=1e-2)


def test_losses_fall(tmp_path):
    rows = run(tmp_path, "--steps", "30", "--save-every", "30", "--lr", "3e-3")
    assert sum(r["loss/total"] for r in rows[-5:]) < 0.95 * sum(r["loss/total"] for r in rows[:5])


def test_the_saved_student_outputs_raw_teacher_features(reference):
    """PHI-S is folded: the saved heads equal the denormalised outputs of the trained ones."""
    folder = reference / "step_000006"
    student = load_student(folder / "model.pt")
    state = train_for(train.parse_args(QUICK)).state
    train.load_state(state, train.read_state(folder))
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    with torch.no_grad():
        raw, normal = student(batch), state.student(batch)
    for name, space in state.spaces.items():
        for part, norm in space.parts.items():
            expected = norm.denormalize(getattr(normal, part)[name])
            torch.testing.assert_close(getattr(raw, part)[name], expected, rtol=1e-4, atol=1e-4)


def test_the_loader_makes_what_live_teachers_see():
    ready = train_for(DEBUG)
    (data,), packs = ready.stages, ready.stages[0][0]
    assert all(
        row.untyped_storage()._cdata == pack.patches_MX.untyped_storage()._cdata
        for pack in packs
        for row, _ in pack.pixels.values()
    ), "a worker hands over each storage as an open file"
    batch = PackedBatch.cat([pack.to("cpu") for pack in [*packs, data[1][0]]])
    (plain,) = whole_pictures(ready)
    whole = PackedBatch.cat([*plain[0], plain[1][0]])
    assert [s.key for s in whole.samples] == [s.key for s in batch.samples]
    for teacher in ready.teachers:
        found = train.ask(teacher, batch, range(len(batch)))
        expected = teacher.targets(whole.samples, whole.sizes)
        assert torch.equal(found.summary_BC, expected.summary_BC)
        assert all(map(torch.equal, found.patches, expected.patches))
    cached = object.__new__(train.CachedTeacher)
    cached.name = "cached"
    sources, config = train.open_sources(DEBUG)[0], ready.state.student.config
    (data,) = train.make_stages(DEBUG, sources, config, CPU, [cached])
    assert not data[0][0].pixels, "it knows the pictures by their digests"


@pytest.mark.parametrize(
    ("expression", "is_hidden"), [("not slow", True), ("not gpu", True), ("gpu", False)]
)
def test_tests_see_a_gpu_only_where_they_ask_for_it(expression, is_hidden, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    option = type("Option", (), {"markexpr": expression})
    conftest.pytest_configure(type("Config", (), {"option": option}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if is_hidden else "0")


def test_packs_of_a_forward_fit_into_the_free_memory(monkeypatch):
    """In units of a pack, beside what gradients and two moments will take; 15 % stay free."""
    state = train_for(dataclasses.replace(DEBUG, precision="auto")).state
    given = state, DEBUG.stages[0].streams, 22, torch.device("cuda", 0)
    pack = 256 * train.model.activation_bytes(state.student.config, False)
    held = 12 * sum(p.numel() for _, p in train.trained(state.student))

    def forward_with(packs: float) -> int:
        free = packs * pack + held
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 8e10))
        return train.packs_of_a_forward(*given)

    assert forward_with(23.4) == 11  # 19 fit: two forwards, equally long
    assert forward_with(28) == 22
    assert forward_with(1.25) == 1
    for packs in (0.9, -1):
        with pytest.raises(train.Standstill, match=r"256 tokens takes some 0.0 GB.*--recompute"):
            forward_with(packs)


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
        "stages": tuple(stages), "teachers": DEBUG.teachers, "head_hidden": 16,
        "data": ("openmoji:train:40",) * len(cfg.data), "model": "tiny", "steps": 3, "workers": 0,
        "stats_steps": 2, "frozen_steps": min(1, cfg.frozen_steps), "warmup": 1, "threads": 1,
    }  # fmt: skip
    return dataclasses.replace(cfg, **small | changes)


def load_teachers(cfg: train.TrainConfig) -> list[Teacher]:
    return [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]


HERE = threading.local()  # the `Run` of each thread


class Left(Exception):
    """The test has seen enough of a run."""


@dataclass
class Run:
    """`train.train` without files and signals, left after some steps; what it has for a `Job`."""

    cfg: train.TrainConfig
    teachers: list[Teacher]
    steps: int  # 0: left when all is ready for the first
    ready: Callable[[train.State], Any]  # called then
    packs: list[list[PackedBatch]] | None = None  # of each step; None: as the configuration has it
    after: Callable[[train.StepReport], Any] = lambda _: None  # called after each step
    sources: list | None = None
    group: train.Group = CPU
    keeps: bool = True  # the weights of each step
    state: Any = None
    stages: list = field(default_factory=list)
    weights: list[dict] = field(default_factory=list)  # of the student, before and after each step
    reports: list[train.StepReport] = field(default_factory=list)

    out = Path("no such folder")

    @property
    def origin(self) -> train.TrainConfig:
        return self.cfg

    def go(self) -> "Run":
        HERE.run = self
        with suppress(Left):
            sources = self.sources or train.open_sources(self.cfg)[0]
            train.train(self.cfg, self.teachers, sources)
        return self

    def keep(self) -> None:
        weights = self.state.student.state_dict() if self.keeps else {}
        self.weights.append({name: x.clone() for name, x in weights.items()})
        if len(self.reports) == self.steps:
            raise Left

    def resume(self, state: train.State, stages: list) -> int:
        self.state, self.stages = state, stages
        return 0

    def log(self, report: train.StepReport) -> None:
        self.reports.append(report)
        self.after(report)
        self.keep()


def quietly(patch: pytest.MonkeyPatch) -> None:
    """Make `train.train` that of a `Run`."""
    carry_heads, make_loader = train.carry_heads, packing.make_loader

    def carried(*given):
        carry_heads(*given)
        if not HERE.run.reports:
            HERE.run.ready(HERE.run.state)
            HERE.run.keep()

    def loader(*given):
        is_step = HERE.run.packs and HERE.run.weights  # else the spaces are being fitted
        return iter(HERE.run.packs) if is_step else make_loader(*given)

    patch.setattr(train, "carry_heads", carried)
    patch.setattr(packing, "make_loader", loader)
    patch.setattr(train, "open_run", lambda *_: HERE.run)
    patch.setattr(train, "resume", Run.resume)
    patch.setattr(train, "log", Run.log)
    patch.setattr(train, "save", lambda *_: None)


def train_for(cfg: train.TrainConfig, steps=0, ready=lambda _: None, teachers=None, **more) -> Run:
    """A `Run` that was left after so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        quietly(patch)
        return Run(cfg, teachers or load_teachers(cfg), steps, ready, **more).go()


def whole_pictures(run: Run) -> list:
    """A run's data, but with the pictures as they are in its samples."""
    sources, _ = train.open_sources(run.cfg)
    stages = train.make_stages(run.cfg, sources, run.state.student.config, CPU, run.teachers)
    return [dataclasses.replace(data, teachers=None) for data in stages]


def raw(teacher: Teacher, batch: PackedBatch):
    """What a teacher says of the pictures that the loader made for it."""
    return teacher.features(batch.pixels[teacher.name].split())


def targets_of(run: Run, batch: PackedBatch) -> dict:
    return train.targets_of(run.teachers, run.state.spaces, batch)


def forward(run: Run, step: int, batch: PackedBatch):
    return train.forward(run.state, step, batch)


@pytest.mark.parametrize("preset", ["amoe-stage1", "amoe-stage2", "radio-stage1", "radio-stage2",
                                    "radio-stage3"])  # fmt: skip
def test_two_steps_of_a_shrunken_copy_of_each_preset(preset, monkeypatch):
    form = MODELS["test"] if preset.startswith("amoe") else TINY_RADIO
    monkeypatch.setitem(train.MODELS, "tiny", form)
    run = train_for(tiny(preset), 2)
    before, first, second = run.weights
    trunk = [n for n in before if not n.startswith("heads.") and n.endswith("weight")]
    if run.cfg.frozen_steps:  # the first steps train the heads alone
        assert all(torch.equal(first[n], before[n]) for n in before if not n.startswith("heads."))
        assert not torch.equal(first["heads.dense.patches.last.weight"],
                               before["heads.dense.patches.last.weight"])  # fmt: skip
    assert any(not torch.equal(second[n], before[n]) for n in trunk)
    for report in run.reports:
        assert all(value == value for value in report.losses.values())
    partitions = {p for batch in run.stages[0][0] for p in batch.stream_B}
    assert partitions == set(range(len(run.cfg.stages[0].streams)))


def test_the_papers_presets_say_what_the_papers_do():
    stage3 = train.PRESETS["radio-stage3"]
    pictures = [stream.packs * (stream.budget // ((stream.choices[0] // 16) ** 2 + 8))
                for stream in stage3.stages[0].streams]  # fmt: skip
    assert pictures == [1024, 128]  # RADIOv2.5: multi-resolution training
    assert (stage3.optimizer, stage3.lr, stage3.weight_decay) == ("lamb", 1e-3, 0.02)
    assert (stage3.stats_steps, stage3.frozen_steps, stage3.steps) == (3000, 5000, 300_000)
    assert (stage3.summary_loss, stage3.relation, stage3.average) == ("cosine", "none", "partition")
    assert (stage3.beta2, train.TrainConfig().beta2) == (0.999, 0.95)
    amoe = train.PRESETS["amoe-stage1"]
    assert (amoe.summary_loss, amoe.relation, amoe.average) == ("mse", "arkd", "image")
    assert (amoe.relation_weight, amoe.normalizer, amoe.beta2) == (1.0, "phis", 0.95)
    steps = [train.PRESETS[f"amoe-stage{i}"].steps for i in (1, 2)]
    assert steps == [50_000, 90_000]
    for name, cfg in train.PRESETS.items():
        assert (cfg.preset, cfg.out) == (name, f"runs/{name}")


def test_wrong_batches_are_refused_with_both_numbers():
    cfg = train.PRESETS["amoe-stage1"]
    with pytest.raises(ValueError, match="1000000 is not a multiple of the 1625536"):
        dataclasses.replace(cfg, global_tokens=1_000_000)
    twice = dataclasses.replace(cfg, global_tokens=2 * 1_625_536)
    assert train.times(twice, twice.stages[0]) == 2
    with pytest.raises(ValueError, match="report is scored on openmoji:test"):
        train.open_sources(dataclasses.replace(cfg, data=("openmoji:all",)))
    with pytest.raises(ValueError, match="SOURCE number 1, but --data has 1"):
        dataclasses.replace(train.PRESETS["amoe-stage2"], data=("photos",))
    with pytest.raises(ValueError, match=r"--micro-packs 3 [*] 1 processes"):
        train_for(dataclasses.replace(DEBUG, micro_packs=3))


def batch_of(sides: list[int], partitions: list[int]) -> PackedBatch:
    images = [torch.rand(3, side, side) for side in sides]
    batch = PackedBatch.from_images(images, 16, [sample_of(x, i) for i, x in enumerate(images)])
    return dataclasses.replace(batch, stream_B=partitions)


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
    cfg = dataclasses.replace(DEBUG, average=average, stages=(train.Stage(1.0, streams),))
    micros = [batch_of([16, 32], [0, 0]), batch_of([48], [1])]
    weights = train.image_weights(cfg, load_teachers(cfg), streams, micros)
    for name, expected in (("dense", dense), ("semantic", semantic)):
        found = torch.cat([micro[name][1] for micro in weights])
        torch.testing.assert_close(found, torch.tensor(expected))


def test_a_teacher_leaves_streams_that_it_does_not_supervise_alone():
    """Neither its feature losses nor its relations see their pictures."""
    streams = (train.Stream("low", 48, budget=96), train.Stream("high", 96, budget=96,
                                                                teachers=("dense",)))  # fmt: skip
    stages = (train.Stage(1.0, streams),)
    run = train_for(dataclasses.replace(DEBUG, stages=stages), 1)
    (whole,) = run.reports
    (low,) = train_for(run.cfg, 1, packs=[run.stages[0][0][:2]]).reports
    for part in ("semantic/patches", "semantic/summary", "semantic/relation"):
        assert whole.losses[part] == pytest.approx(low.losses[part], rel=1e-5)
    assert whole.losses["dense/patches"] != pytest.approx(low.losses["dense/patches"], rel=1e-3)


def test_a_step_without_pictures_is_a_line_of_json():
    (report,) = train_for(DEBUG, 1, packs=[[PackedBatch.from_images([], 16)]]).reports
    record = {"step": 1, "images": 0, "tokens": 0}
    row = train.metrics_row(SimpleNamespace(record=record, group=CPU), report, 0.0)
    text = json.dumps(row, allow_nan=False)
    assert '"moe/max_load": null' in text and "no token" in row["reason"]


def test_a_shifted_student_learns_what_the_teacher_said_of_the_same_place():
    cfg = dataclasses.replace(DEBUG, shift=0.5, stats_steps=1)
    ready = train_for(cfg)
    batch = PackedBatch.cat(ready.stages[0][0])
    (weights,) = train.image_weights(cfg, ready.teachers, cfg.stages[0].streams, [batch])
    targets, out = targets_of(ready, batch), forward(ready, 1, batch)
    far = 1e3  # what it says where the teacher did not look does not count
    for name, target in targets.items():
        rows, moved = [], 0
        for i, (h, w) in enumerate(batch.grids):
            map_hwC = losses.resize_map(target.patches[i], (h, w))
            (y, x), (ty, tx) = (batch.views[viewer][i].origin for viewer in ("", name))
            around = torch.full((h + 10, w + 10, map_hwC.shape[2]), far)
            around[5 : 5 + h, 5 : 5 + w] = map_hwC
            rows.append(around[5 + y - ty :][:h, 5 + x - tx :][:, :w].flatten(0, 1))
            moved += (y, x) != (ty, tx)
        assert moved
        out.patches[name] = torch.cat(rows)
    parts = train.feature_losses(ready.state, out, batch, targets, weights)
    assert all(abs(parts[f"{name}/patches"]) < 1e-9 for name in targets)
    batch.views = {}
    parts = train.feature_losses(ready.state, out, batch, targets, weights)
    assert all(parts[f"{name}/patches"] > 1 for name in targets)


@pytest.mark.parametrize("registers", [3, 4])  # the student has 4
def test_registers_without_a_match_are_said_once(registers, tmp_path, capsys):
    def read(_, pixels_BCHW):
        map_BhwC = pixels_BCHW[:, [0, 1, 2, 0], ::8, ::8].movedim(1, -1)
        summary_BC = map_BhwC.mean((1, 2))
        return summary_BC, map_BhwC, summary_BC[:, None].expand(-1, registers, -1)

    teacher = Teacher("dense", Backbone(torch.nn.Identity(), read, SizeRule("native", 8, 96)))
    flags = ["--out", str(tmp_path), "--teachers", "dense=builtin:tiny-dense", "--steps", "1"]
    cfg = train.parse_args([*QUICK, *flags])
    train.run(cfg, [teacher])
    text = "teacher dense has 3 registers, the student 4: they are matched one to one"
    assert capsys.readouterr().err.count(text) == (registers == 3)
    head = load_student(tmp_path / "step_000001" / "model.pt").config.heads[0]
    assert head.registers == (registers == 4)


def test_each_live_teacher_sees_its_own_view():
    cfg = dataclasses.replace(DEBUG, shift=0.5, stats_steps=1)
    ready = train_for(cfg)
    batch = PackedBatch.cat(ready.stages[0][0][:2])
    (whole,) = whole_pictures(ready)
    samples = [sample for pack in whole[0][:2] for sample in pack.samples]
    assert [s.key for s in samples] == [s.key for s in batch.samples]
    assert batch.boxes("dense") != batch.boxes("semantic")
    for teacher in ready.teachers:
        boxes, out = batch.boxes(teacher.name)[:4], train.ask(teacher, batch, range(4))
        for sample, box, found in zip(samples, boxes, out.patches, strict=False):
            image = Image.fromarray(sample.image)
            if box is not None:  # cut by hand, at four times the size
                large = image.resize([4 * side for side in image.size], Image.Resampling.BICUBIC)
                top, left, bottom, right = np.array(box) * (sample.image.shape[:2] * 2) * 4
                large = large.crop([round(x) for x in (left, top, right, bottom)])
                shape = [round(side / 4) for side in large.size]
                image = large.resize(shape, Image.Resampling.BICUBIC)
            (by_hand,) = teacher([to_float(np.array(image))]).patches
            close = torch.nn.functional.cosine_similarity(by_hand, found, dim=-1).mean()
            assert by_hand.shape == found.shape and close > 0.98


# --------------------------------------------------------------- the space of the targets

# The dense teacher's grid is twice as fine as the student's, so its maps are averaged down.
TWO_STAGES = dataclasses.replace(
    DEBUG, steps=6, stats_steps=2,
    stages=(train.Stage(0.5, (train.Stream("low", 48, budget=160),)),
            train.Stage(1.0, (train.Stream("high", 96, budget=640),))),
)  # fmt: skip


def seen_maps(teachers: list[Teacher], packs: list[PackedBatch]) -> dict[str, torch.Tensor]:
    """All tokens of the maps that a step's loss compares, before normalisation, by interpolate."""
    from test_losses import interpolate

    rows: dict[str, list] = {t.name: [] for t in teachers}
    for batch in packs:
        for teacher in teachers:
            maps = raw(teacher, batch).patches
            for y, grid in zip(maps, batch.grids, strict=True):
                small = min(y.shape[0], grid[0]), min(y.shape[1], grid[1])
                rows[teacher.name] += interpolate(y.double(), small).flatten(0, 1)
    return {name: torch.stack(tokens) for name, tokens in rows.items()}


def test_the_statistics_are_of_the_maps_that_the_loss_sees_at_each_stage():
    ready = train_for(TWO_STAGES)
    scales, spaces = [], ready.state.spaces
    for k, data in enumerate(ready.stages):
        if k:
            spaces = train.fit_spaces(TWO_STAGES, ready.teachers, data, CPU.device)
        seen = seen_maps(ready.teachers, [pack for step in range(2) for pack in data[step]])
        for name, rows_NC in seen.items():
            fitted = spaces[name].parts["patches"].current()
            phi = rows_NC.var(0, correction=0).mean().sqrt()
            torch.testing.assert_close(fitted.scale, phi, rtol=1e-4, atol=0)
            torch.testing.assert_close(fitted.shift, rows_NC.mean(0), rtol=1e-3, atol=1e-4)
            scales.append(float(phi))
        if k == 0:  # all of these pictures at once, and a student that answers the mean
            values = train_for(TWO_STAGES, 1, packs=[[*data[0], *data[1]]]).reports[0].losses
            for part in ("dense/patches", "dense/summary", "semantic/patches", "semantic/summary"):
                assert values[part] == pytest.approx(1, abs=0.05), part
        packs = [pack for step in range(data.steps_in(0)) for pack in data[step]]
        new = train.targets_of(ready.teachers, spaces, PackedBatch.cat(packs))
        for name, target in new.items():
            rows_NC = torch.cat([y.flatten(0, 1) for y in target.patches])
            assert rows_NC.var(0).mean() == pytest.approx(1, abs=0.15), name
            assert target.summary_BC.var(0).mean() == pytest.approx(1, abs=0.15), name
    assert abs(scales[0] / scales[2] - 1) > 0.02  # or this test would not see a refit


def test_heads_and_their_running_means_answer_alike_across_a_refit():
    cfg = dataclasses.replace(TWO_STAGES, ema=0.9, lr=0.01, warmup=0)
    run = train_for(cfg, 3)
    state, batch = run.state, PackedBatch.cat(run.stages[1][0])

    def answers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        mean = train.Student(state.student.config)
        mean.load_state_dict(state.student.state_dict() | state.average)
        found, scales = [], []
        for student in (state.student, mean):
            with torch.no_grad():
                out = student(batch)
            for name, space in state.spaces.items():
                for part, norm in space.parts.items():
                    y, (shift_C, scale, turn_CC) = getattr(out, part)[name], norm.current()
                    found.append(y.double() @ turn_CC * scale + shift_C)
                    scales.append(scale)
        return found, scales

    moments = [x.clone() for s in state.optimizer.state.values() for x in s.values()]
    before, old = answers()
    fitted = train.fit_spaces(cfg, run.teachers, run.stages[1], CPU.device)
    train.carry_heads(state, fitted, None)
    after, new = answers()
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        assert x.std(0).mean() > 1e-3 * old[i]  # no longer a constant
        assert (x - y).abs().max() < 1e-5 * old[i]
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(old, new, strict=True))
    assert not torch.allclose(before[0], before[4])  # the running mean is another student
    kept = [x for s in state.optimizer.state.values() for x in s.values()]
    assert all(torch.equal(x, y) for x, y in zip(moments, kept, strict=True))


def test_statistics_are_of_the_streams_that_a_teacher_supervises():
    streams = (train.Stream("low", 48, budget=96), train.Stream("high", 96, budget=96,
                                                                teachers=("dense",)))  # fmt: skip
    cfg = dataclasses.replace(DEBUG, stages=(train.Stage(1.0, streams),))
    ready = train_for(cfg)
    (data,) = ready.stages
    batch = PackedBatch.cat([pack for step in range(cfg.stats_steps) for pack in data[step]])
    seen = {name: int(space.parts["summary"].statistics.total)
            for name, space in ready.state.spaces.items()}  # fmt: skip
    assert seen == {"dense": len(batch), "semantic": batch.stream_B.count(0)}
    # one that supervises none of a stage has a space all the same: its pictures' weights are 0
    other = (dataclasses.replace(streams[1], teachers=("dense",)),)
    run = train_for(dataclasses.replace(cfg, stages=(train.Stage(1.0, other),)), 1)
    assert run.reports[0].losses["semantic/patches"] == 0


def test_features_that_are_not_finite_stop_before_the_statistics(tmp_path, monkeypatch):
    whole = train.Teacher.features

    def poisoned(self, prepared, share_canvas=True):
        out = whole(self, prepared, share_canvas)
        out.patches[0][0, 0, 0] = float("inf")
        return out

    monkeypatch.setattr(train.Teacher, "features", poisoned)
    with pytest.raises(SystemExit, match="statistics of teacher dense: a feature is not finite"):
        run(tmp_path)


def test_a_student_in_training_can_be_pickled():
    run = train_for(dataclasses.replace(DEBUG, stats_steps=1), 1)
    student, batch = run.state.student, PackedBatch.cat(run.stages[0][0])
    with torch.no_grad():
        a, b = student(batch), pickle.loads(pickle.dumps(student))(batch)
    assert all(torch.equal(a.patches[name], b.patches[name]) for name in a.patches)


def test_registers_are_compared_raw_by_the_patches_loss():
    def read(network, pixels_BCHW):
        map_BhwC = network(pixels_BCHW).movedim(1, -1)
        pooled = map_BhwC.mean((1, 2))
        return pooled, map_BhwC, torch.stack([r * pooled + 3 for r in range(1, 5)], 1)

    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 8, kernel_size=16, stride=16)
    teacher = Teacher("t", Backbone(network, read, SizeRule("native", 16, 512)))
    cfg = dataclasses.replace(DEBUG, teachers=("t=x",), patch_loss="cosine")
    ready = train_for(cfg, teachers=[teacher])
    batch = PackedBatch.cat(ready.stages[0][0])
    shift_C, scale, turn_CC = ready.state.spaces["t"].parts["patches"].current()
    with torch.no_grad():
        ours_BRC = ready.state.student(batch).registers["t"].double() @ turn_CC * scale + shift_C
    theirs_BRC = raw(teacher, batch).registers_BRC.double()
    dots = [[float(x @ y / (x.norm() * y.norm())) for x, y in zip(xs, ys, strict=True)]
            for xs, ys in zip(ours_BRC, theirs_BRC, strict=True)]  # fmt: skip
    expected = sum(1 - dot for row in dots for dot in row) / (4 * len(batch))
    (report,) = train_for(cfg, 1, teachers=[teacher]).reports
    assert report.losses["t/registers"] == pytest.approx(expected, rel=1e-4)


def test_the_position_table_is_not_decayed(monkeypatch):
    monkeypatch.setitem(train.MODELS, "tiny", TINY_RADIO)
    cfg = dataclasses.replace(DEBUG, model="tiny")
    student, _ = train.build_student(cfg, load_teachers(cfg))
    decayed = {id(p) for group in train.make_optimizer(cfg, student).param_groups
               for p in group["params"] if group["weight_decay"]}  # fmt: skip
    names = {name for name, p in student.named_parameters() if id(p) in decayed}
    assert "positions.pos_embed" not in names
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
    cfg = dataclasses.replace(DEBUG, balance="adaloss")
    run = train_for(cfg, 1)
    (report,) = run.reports
    parts = report.losses
    assert report.total == pytest.approx(sum(parts.values()))  # the step's own weights, still 1
    for name, value in parts.items():
        assert train.part_weight(run.state, name) * value == pytest.approx(1, rel=1e-6)
    first, second = train_for(cfg, 2).reports
    ratios = [second.losses[name] / value for name, value in first.losses.items()]
    assert second.total == pytest.approx(sum(ratios))  # each is weighed by what it was


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"summary_loss": "angle"}, {"summary_loss": "cosine"},
                                     {"patch_loss": "am-radio", "normalizer": "none"},
                                     {"precision": "bf16"}, {"recompute": True},
                                     {"optimizer": "lamb", "ema": 0.9}, {"optimizer": "muon"},
                                     {"shift": 0.5}])  # fmt: skip
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
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same_and_compile_once():
    """Pictures of other sizes in every step must not compile anew: a layout is no constant."""
    results = []
    for is_compiled in (False, True):
        cfg = dataclasses.replace(DEBUG, compile=is_compiled, stats_steps=1)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        graphs: list[int] = []
        counted = torch._dynamo.utils.counters["stats"]
        run = train_for(cfg, 4, after=lambda _, g=graphs, c=counted: g.append(c["unique_graphs"]))
        results.append([report.total for report in run.reports])
        assert graphs[3] == graphs[2] and bool(graphs[2]) == is_compiled
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


def test_muon_is_its_algorithm():
    """Against an SVD: each singular value goes through the polynomials, its vectors stay."""
    torch.manual_seed(0)
    shapes = ((3, 8, 6), 2), ((7, 5), 1), ((4, 4), 0)  # experts' gates and values, AdamW's
    ours, plain = ([torch.ones(shape).requires_grad_() for shape, _ in shapes] for _ in range(2))
    groups = [{"params": [p], "weight_decay": 0.1, "parts": parts}
              for p, (_, parts) in zip(ours, shapes, strict=True)]  # fmt: skip
    optimizer = train.Muon(groups, lr=0.01, betas=(0.9, 0.95))
    adamw = torch.optim.AdamW(plain[2:], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    momenta, expected = [0.0, 0.0], [p.detach().double().clone() for p in ours]
    for _ in range(3):
        for p, other in zip(ours, plain, strict=True):
            p.grad = torch.randn(p.shape)
            other.grad = p.grad.clone()
        for i, (shape, parts) in enumerate(shapes[:2]):
            g = ours[i].grad.double()
            momenta[i] = 0.95 * momenta[i] + g
            stack = torch.stack((g + 0.95 * momenta[i]).chunk(parts, dim=-2))
            u, s, vh = torch.linalg.svd(stack, full_matrices=False)
            s = s / (1.01 * s.norm(dim=-1, keepdim=True))
            for a, b, c in train.POLAR:
                s = a * s + b * s**3 + c * s**5
            length = 0.2 * max(shape[-2] / parts, shape[-1]) ** 0.5
            move = torch.cat(tuple((u * s.unsqueeze(-2)) @ vh), dim=-2)
            expected[i] = (1 - 0.001) * expected[i] - 0.01 * length * move
        optimizer.step()
        adamw.step()
    for p, target in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(p.detach().double(), target, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[2], plain[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_made_orthogonal(dtype):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(2, 40, 40))[0] for _ in range(2))
    s = torch.logspace(-2.5, 0, 40)  # of a norm of 2.6: down to .0012 of it
    square = (u * s) @ v
    for x in (square, square[:, :, :30], square[:, :30], square[:, None]):
        found = torch.linalg.svdvals(train.orthogonal(x, dtype))
        assert found.min() > 0.8 and found.max() < 1.2
    assert not train.orthogonal(torch.zeros(2, 3, 4), dtype).any()  # an expert without tokens


def test_a_checkpoint_says_in_which_window_its_data_are(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 25)
    monkeypatch.setattr(packing, "STEPS", 1)
    run(tmp_path, "--steps", "6", "--save-every", "4", "--data", "openmoji:train:60")
    places = [train.read_state(folder)["place"] for folder in train.checkpoints(tmp_path)]
    assert len(places) == 2 and not places[1]  # the stage has ended
    ((first, epoch, window),) = places[0]
    assert 0 < first <= 4 and (epoch, window) != (0, 0)
    shutil.rmtree(train.checkpoints(tmp_path)[-1])
    started, real = [], packing.start_at
    monkeypatch.setattr(packing, "start_at", lambda *a: started.append(a[1]) or real(*a))
    run(tmp_path, "--steps", "6", "--save-every", "4", "--data", "openmoji:train:60")
    assert started == [places[0]]


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
    expected: dict[str, torch.Tensor] = {}

    def ready(state: train.State) -> None:
        expected.update({name: mean.double() for name, mean in state.average.items()})

    run = train_for(dataclasses.replace(DEBUG, ema=0.999, stats_steps=1), 5, ready)
    assert expected.keys() == {name for name, _ in train.trained(run.state.student)}
    for step, weights in enumerate(run.weights[1:], 1):
        for name in expected:
            rate = 9 / (10 + step)
            expected[name] = (1 - rate) * expected[name] + rate * weights[name].double()
    for name, mean in run.state.average.items():
        torch.testing.assert_close(mean.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_a_report_looks_no_closer_than_the_run(tmp_path):
    """Pictures of a megapixel: at most 96^2 px for the student, none enlarged, and so few."""
    Image.new("RGB", (1200, 900)).save(tmp_path / "large.jpg")
    Image.new("RGB", (40, 30)).save(tmp_path / "small.jpg")
    source = packing.open_source(str(tmp_path))
    for side, teachers in ((96, load_teachers(DEBUG)), (224, [SimpleNamespace(
            size_for=SizeRule("fixed", 16, 224))])):  # fmt: skip
        job = SimpleNamespace(cfg=DEBUG, sources=[source], held_out=None, teachers=teachers)
        large, small = (train.views(job, 9)[1].load(i).image.shape[:2] for i in (0, 1))
        assert large == pytest.approx((side * 0.75**0.5, side / 0.75**0.5), abs=0.5)
        assert small == (30, 40)
    (features,) = train.capped(DEBUG, train.Student(MODELS["test"])).encode(
        [torch.rand(3, 300, 400)]
    )
    assert features.patches["trunk"].shape[:2] == (5, 6)  # 36 at most, as of 96^2 px


@pytest.mark.full_report
def test_a_report_says_how_many_pictures_were_scored(tmp_path, monkeypatch, capsys):
    """Of four held-out pictures one is broken and one has no label: three and two are scored."""
    for i in range(12):
        for side in ("train", "test")[: 1 + (i < 4)]:
            folder = tmp_path / side / "ab"[i % 2] if i < 11 else tmp_path / side
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([i, side == "test"]).integers(0, 255, (32, 32, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{side}{i}.png")
    (tmp_path / "test" / "a" / "test0.png").rename(tmp_path / "test" / "bare.png")
    broken = tmp_path / "test" / "b" / "test1.png"
    broken.write_bytes(broken.read_bytes()[:-40])
    source, held_out = (packing.open_source(str(tmp_path / side)) for side in ("train", "test"))
    monkeypatch.setattr(train, "saved_student", lambda _: train.Student(MODELS["test"]))
    monkeypatch.setattr(train, "draw_pca", lambda *_: None)
    record = {"tokens": 0, "seconds": 60, "skipped": {}}
    job = SimpleNamespace(cfg=DEBUG, sources=[source], held_out=held_out, teachers=[], out=tmp_path,
                          record=record, identity={})  # fmt: skip
    summary = train.finish(job)
    printed, written = capsys.readouterr(), json.loads((tmp_path / "summary.json").read_text())
    assert written["pictures"] == 3 and summary["report"]["knn"]["student/trunk"]["n"] == 2
    assert summary["report"]["pictures"] == {"training": 12, "held out": 3}
    assert "the report: 12 training and 4 held-out pictures" in printed.err
    assert "scored: 12 training pictures, 3 held-out pictures: fewer than 50" in printed.out
    assert "left out: bare.png: held-out pictures without a label (" in printed.out
    assert "left out: train11.png: training pictures without a label (" in printed.out
    assert set(summary["skipped"]) == {"bare.png", "train11.png", "b/test1.png"}
    (few,) = [x for x in printed.out.splitlines() if "left out: foreground" in x]
    assert "too few training pictures: 12 of 12 are without a mask (" in few and "--" not in few


def test_the_picture_of_a_large_source_looks_at_a_few(monkeypatch):
    source = packing.Subset(packing.open_source("openmoji:train:24"), np.zeros(10**6, int))
    job = SimpleNamespace(cfg=DEBUG, sources=[source], held_out=None, teachers=[], out=Path("x"))
    monkeypatch.setattr(train, "pca_sheet", lambda *_: None)
    monkeypatch.setattr(train, "first_pictures", lambda given, _: (seen.append(len(given)), {}))
    seen: list[int] = []
    train.draw_pca(job, None)
    assert 8 < seen[0] <= 100


def test_kept_checkpoints(tmp_path):
    run(tmp_path, "--save-every", "1", "--keep", "2", "--keep-every", "3")
    assert [int(path.name[5:]) for path in train.checkpoints(tmp_path)] == [3, 5, 6]


def test_an_evaluation_during_the_run(tmp_path):
    rows = run(tmp_path, "--evaluate-every", "4", "--data", "openmoji:train:96")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6]
    assert 0 <= rows[4]["knn/student/trunk"] <= 1
    assert Image.open(tmp_path / "pca.png").size[0] > 100


# ------------------------------------------------------------------- a step, worked out by hand


def awake(state: train.State) -> None:
    """Blocks add nothing at first, so that most gradients of step 1 are 0: start from elsewhere."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in train.trained(state.student):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def gradients_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in train.trained(run.state.student)}


@pytest.mark.parametrize("changes", [{}, {"micro_packs": 1}, {"average": "token"},
                                     {"summary_loss": "cosine"}, {"summary_loss": "angle"},
                                     {"patch_loss": "sum", "relation": "rkd"},
                                     {"relation": "none"}])  # fmt: skip
def test_a_step_takes_the_gradient_of_the_loss_as_written(changes):
    """A loop over pictures and teachers, and one backward, against `train` with its passes."""
    cfg = dataclasses.replace(DEBUG, relation_weight=0.5, clip=1e9, **changes)
    ready = train_for(cfg, ready=awake)
    batch = PackedBatch.cat(ready.stages[0][0])
    targets, out = targets_of(ready, batch), forward(ready, 1, batch)
    total, tokens = torch.zeros(()), sum(batch.lengths)
    for name, target in targets.items():
        rows, students = out.patches[name].split(batch.lengths), []
        for i, (row, grid) in enumerate(zip(rows, batch.grids, strict=True)):
            student, teacher = losses.align(row.unflatten(0, grid), target.patches[i])
            error = (student - teacher) ** 2 * (len(row[0]) if cfg.patch_loss == "sum" else 1)
            share = batch.lengths[i] / tokens if cfg.average == "token" else 1 / len(batch)
            total = total + error.mean() * share
            ours, theirs = out.summary[name][i], target.summary_BC[i]
            students.append(ours)
            cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
            spread = 1.0
            if cfg.summary_loss == "angle":
                spread = ready.state.spaces[name].dispersion.value.float()
            error = {"mse": ((ours - theirs) ** 2).mean(), "cosine": 1 - cosine,
                     "angle": cosine.arccos() ** 2 / spread}[cfg.summary_loss]  # fmt: skip
            total = total + error / len(batch)
        if cfg.relation != "none":
            compare = {"arkd": losses.arkd, "rkd": losses.rkd}[cfg.relation]
            total = total + 0.5 * compare(torch.stack(students), target.summary_BC)
    total.backward()
    expected, run = gradients_of(ready), train_for(cfg, 1, awake)
    assert run.reports[0].total == pytest.approx(total.item(), rel=1e-5)
    for name, found in gradients_of(run).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-6)
    norm = sum(float(x.square().sum()) for x in expected.values()) ** 0.5
    assert run.reports[0].grad_norm == pytest.approx(norm, rel=1e-4)


def test_gradients_are_clipped_and_their_norm_before_it_is_reported():
    run = train_for(dataclasses.replace(DEBUG, clip=0.01), 1)
    assert run.reports[0].grad_norm > 0.1
    norm = sum(float(x.square().sum()) for x in gradients_of(run).values()) ** 0.5
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_the_learning_rate_by_hand():
    cfg = dataclasses.replace(DEBUG, steps=10, warmup=4, lr=2.0, min_lr=0.1, trunk_lr=0.5)
    optimizer = train_for(cfg).state.optimizer
    # a linear start over 4 steps, then 0.1 + 0.9 (1 + cos x) / 2 at x = 30, 60, 90 ... degrees
    shares = [0.25, 0.5, 0.75, 1.0, 0.939711, 0.775, 0.55, 0.325, 0.160289, 0.1]
    for step, share in enumerate(shares, 1):
        assert train.set_lr(cfg, optimizer, step) == pytest.approx(2 * share, rel=1e-5)
        rates = {group["share"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({0.5: share, 1.0: 2 * share}, rel=1e-5)


def test_a_warm_up_longer_than_the_run_ends_with_it():
    cfg = dataclasses.replace(DEBUG, steps=10, warmup=10**6, lr=2.0)
    optimizer = SimpleNamespace(param_groups=[])
    assert [train.set_lr(cfg, optimizer, step) for step in (5, 10)] == [1.0, 2.0]


def test_the_first_step_is_as_long_as_the_learning_rate_of_step_1():
    """Adam's first step is lr * sign(gradient), whatever the gradient's size and its clipping."""
    cfg = dataclasses.replace(DEBUG, warmup=4, lr=4e-3, trunk_lr=0.25, weight_decay=0.5)
    run = train_for(cfg, 1, awake)
    before, _ = run.weights
    assert run.reports[0].lr == pytest.approx(1e-3)
    for name, p in train.trained(run.state.student):
        rate = 1e-3 if name.startswith("heads.") else 2.5e-4
        decay = 0.5 if train.is_decayed(name, p) else 0.0
        moved, clear = p.detach() - before[name] * (1 - rate * decay), p.grad.abs() > 1e-5
        assert clear.any() or name.startswith("heads.")
        torch.testing.assert_close(
            moved[clear], -rate * p.grad.sign()[clear], rtol=2e-3, atol=1e-7
        )  # fmt: skip


def test_the_optimizers_groups():
    cfg = dataclasses.replace(DEBUG, weight_decay=0.3, beta2=0.9, trunk_lr=0.5)
    state = train_for(cfg).state
    assert type(state.optimizer) is torch.optim.AdamW
    name_of = {p: name for name, p in state.student.named_parameters()}
    found = {}
    for group in state.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.9)
        for p in group["params"]:
            assert name_of[p] not in found
            found[name_of[p]] = group["share"], group["weight_decay"]
    assert found.keys() == {name for name, _ in train.trained(state.student)}
    assert found["blocks.0.attn.qkv.weight"] == found["prefix_RD"] == (0.5, 0.3)
    assert found["heads.dense.last.weight"] == (1.0, 0.3)
    assert found["heads.dense.last.bias"] == (1.0, 0.0)
    for name, (share, decay) in found.items():
        assert share == (1.0 if name.startswith("heads.") else 0.5)
        if name.endswith(("bias", "sinks")) or "norm" in name:
            assert decay == 0, name
    assert not train.is_decayed("x", torch.zeros(1, 8)) and train.is_decayed("x", torch.zeros(2, 8))
    muon = train.make_optimizer(dataclasses.replace(cfg, optimizer="muon"), state.student)
    parts = {name_of[p]: g["parts"] for g in muon.param_groups for p in g["params"] if g["parts"]}
    each = {"attn.qkv.weight": 3, "attn.proj.weight": 1, "ffn.w1_EGD": 2, "ffn.w2_EDF": 1}
    assert parts == {f"blocks.{i}.{name}": n for i in (0, 1) for name, n in each.items()}
    plain = Student(dataclasses.replace(train.MODELS["radio-b"], n_layers=1, heads=()))
    matrix = torch.zeros(2, 2)
    assert train.hidden_parts(plain, "blocks.0.ffn.w1.weight", matrix) == 1
    assert train.hidden_parts(plain, "embed.weight", matrix) == 0
    assert type(muon) is train.Muon and muon.dtype is torch.float32
    half = dataclasses.replace(cfg, optimizer="muon", precision="bf16")
    assert train.make_optimizer(half, state.student).dtype is torch.bfloat16
    lamb = train.make_optimizer(dataclasses.replace(cfg, optimizer="lamb"), state.student)
    assert type(lamb) is train.Lamb and lamb.param_groups[0]["betas"] == (0.9, 0.9)


def test_the_relational_loss_has_its_weight():
    totals_of, gradients = [], []
    for weight in (0.0, 1.0, 3.0):
        cfg = dataclasses.replace(DEBUG, relation_weight=weight, clip=1e9)
        run = train_for(cfg, 1, awake)
        (report,) = run.reports
        totals_of.append(report.total)
        gradients.append(gradients_of(run)["blocks.0.attn.qkv.weight"])
    parts = report.losses.items()
    relations = sum(value for name, value in parts if name.endswith("/relation"))
    assert totals_of[1] - totals_of[0] == pytest.approx(relations, rel=1e-4)
    assert totals_of[2] - totals_of[0] == pytest.approx(3 * relations, rel=1e-4)
    pull = gradients[1] - gradients[0]
    assert pull.norm() > 1e-3 * gradients[0].norm()
    torch.testing.assert_close(gradients[2] - gradients[0], 3 * pull, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_the_precision_is_used(monkeypatch, flag):
    maps = {}
    for case, precision in ("fp32", "fp32"), ("bf16", "bf16"), ("without", "auto"), ("has", "auto"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda case=case: {flag: case == "has"})
        ready = train_for(dataclasses.replace(DEBUG, precision=precision))
        with torch.no_grad():
            maps[case] = forward(ready, 1, ready.stages[0][0][0]).patches["dense"].float()
    assert 0 < (maps["fp32"] - maps["bf16"]).abs().max() < 0.1
    assert torch.equal(maps["without"], maps["fp32"]) and torch.equal(maps["has"], maps["bf16"])


def test_recomputed_blocks_run_twice_and_give_the_same_gradients():
    calls, gradients = [], []
    for recompute in (False, True):
        seen: list[int] = []

        def ready(state: train.State, seen=seen) -> None:
            awake(state)
            for i, block in enumerate(state.student.blocks):
                block.ffn.register_forward_pre_hook(lambda *_, i=i, seen=seen: seen.append(i))

        run = train_for(dataclasses.replace(DEBUG, recompute=recompute), 1, ready)
        calls.append(sorted(seen))
        gradients.append(gradients_of(run))
    assert calls == [[0, 1], [0, 0, 1, 1]]
    for name, expected in gradients[0].items():
        assert expected.any(), name
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("micro_packs", [0, 1])
def test_the_routers_bias_moves_against_the_whole_steps_load(micro_packs):
    cfg = dataclasses.replace(DEBUG, router_rate=0.1, micro_packs=micro_packs)
    ready, run = train_for(cfg), train_for(cfg, 1)
    with torch.no_grad():
        loads = forward(ready, 1, PackedBatch.cat(ready.stages[0][0])).counts_LE.tolist()
    (report,) = run.reports
    assert report.max_load == pytest.approx(max(max(x) * len(x) / sum(x) for x in loads))
    for block, counts in zip(run.state.student.blocks, loads, strict=True):
        mean = sum(counts) / len(counts)
        steps = [0.1 * ((n < mean) - (n > mean)) for n in counts]
        expected = torch.tensor([step - sum(steps) / len(steps) for step in steps])
        torch.testing.assert_close(block.ffn.expert_bias, expected)


def test_frozen_steps_train_the_heads_alone_and_end_in_time():
    run = train_for(dataclasses.replace(DEBUG, frozen_steps=2), 3)
    before, *frozen, after = run.weights
    for weights in frozen:
        for name, x in weights.items():
            if name.startswith("heads.") and name.endswith("last.weight"):
                assert not torch.equal(x, before[name])
            assert name.startswith("heads.") or torch.equal(x, before[name])
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.ffn.expert_bias"):
        assert not torch.equal(after[name], before[name])


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    before: list = []

    def ready(state: train.State) -> None:
        weight = state.student.blocks[0].attn.qkv.weight
        weight.register_hook(lambda gradient: gradient * float("nan"))
        before[:] = state, copy.deepcopy(train.state_dict(state))

    with pytest.raises(train.Standstill, match="step 1: not finite: gradient norm"):
        train_for(dataclasses.replace(DEBUG, ema=0.5, balance="adaloss"), 1, ready)
    names = ("student", "optimizer", "average", "adaloss")
    one, two = (train.state_dict(before[0]), before[1])
    assert_same({name: one[name] for name in names}, {name: two[name] for name in names})


def test_windows_depend_on_the_step_and_the_picture_alone(monkeypatch):
    monkeypatch.setitem(train.MODELS, "tiny", TINY_RADIO)
    ready = train_for(dataclasses.replace(DEBUG, model="tiny"))
    packs = ready.stages[0][0]
    first, both = packs[0], PackedBatch.cat(packs)
    with torch.no_grad():
        here, again, later = (forward(ready, step, first).trunk_MD for step in (1, 1, 2))
        among_others = forward(ready, 1, both).trunk_MD[: len(here)]
    assert torch.equal(here, again) and not torch.allclose(here, later, atol=1e-3)
    torch.testing.assert_close(here, among_others, rtol=1e-4, atol=1e-5)
    plain = train_for(dataclasses.replace(DEBUG, model="tiny", windows=False))
    with torch.no_grad():
        one, two = (forward(plain, step, first).trunk_MD for step in (1, 2))
    assert torch.equal(one, two)


def test_the_normalizers_see_every_picture_of_the_first_steps_and_no_other():
    ready = train_for(dataclasses.replace(DEBUG, normalizer="channel", stats_steps=2))
    batches = [PackedBatch.cat(ready.stages[0][step]) for step in (0, 1)]
    maps = seen_maps(ready.teachers, batches)
    for teacher in ready.teachers:
        summaries = [raw(teacher, batch).summary_BC for batch in batches]
        rows = {"summary": torch.cat(summaries), "patches": maps[teacher.name].float()}
        for part, rows_NC in rows.items():
            expected = (rows_NC - rows_NC.mean(0)) / rows_NC.std(0, correction=0)
            found = ready.state.spaces[teacher.name].parts[part].normalize(rows_NC)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            if part == "summary":
                target_BC = targets_of(ready, batches[0])[teacher.name].summary_BC
                torch.testing.assert_close(target_BC, found[: len(target_BC)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("summary_loss", ["cosine", "angle"])
def test_summaries_that_are_compared_by_direction_stay_raw(summary_loss):
    ready = train_for(dataclasses.replace(DEBUG, summary_loss=summary_loss))
    batch = ready.stages[0][0][0]
    found, own = targets_of(ready, batch)["dense"], raw(ready.teachers[0], batch)
    torch.testing.assert_close(found.summary_BC, own.summary_BC)
    plain = targets_of(train_for(dataclasses.replace(DEBUG, normalizer="none")), batch)["dense"]
    assert not torch.allclose(found.patches[0], plain.patches[0], atol=0.1)


def test_the_seed_decides_the_weights_and_the_order():
    found = []
    for seed in (0, 0, 1):
        ready = train_for(dataclasses.replace(DEBUG, seed=seed))
        keys = [sample.key for batch in ready.stages[0][0] for sample in batch.samples]
        found.append((float(ready.weights[0]["blocks.0.attn.qkv.weight"].sum()), keys))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0] and found[0][1] != found[2][1]


def test_the_weights_of_sources_decide_how_often_they_are_seen(tmp_path):
    """One source's ten pictures and another's twenty, as they come and at three to one."""
    for name, count in (("a", 10), ("b", 20)):
        make_pictures(tmp_path / name / name, good=count, bad=0)
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    for weights, share in (((), 1 / 3), ((3.0, 1.0), 3 / 4)):
        cfg = dataclasses.replace(DEBUG, data=folders, data_weights=weights)
        sources = [packing.open_source(folder) for folder in folders]
        (data,) = train.make_stages(cfg, sources, MODELS["test"], CPU, [])
        keys = [s.key for step in range(8) for batch in data[step] for s in batch.samples]
        found = sum(key.startswith("a/") for key in keys) / len(keys)
        assert len(keys) > 100 and found == pytest.approx(share, abs=0.06)


def test_a_stream_draws_from_its_sources_in_packs_of_so_many_pictures(tmp_path):
    for name in "ab":
        make_pictures(tmp_path / name / name, good=10, bad=0)
    folders = (str(tmp_path / "a"), str(tmp_path / "b"))
    streams = (train.Stream("one", 48, data=(1,)), train.Stream("two", 48, data=(0,), packs=1))
    cfg = dataclasses.replace(
        DEBUG, data=folders, stages=(train.Stage(1.0, streams),), max_images=3
    )
    sources = [packing.open_source(folder) for folder in folders]
    (data,) = train.make_stages(cfg, sources, MODELS["test"], CPU, [])
    packs = [[sample.key[0] for sample in batch.samples] for batch in data[0]]
    assert packs == [["b"] * 3, ["b"] * 3, ["a"] * 3]


def test_pictures_of_the_side_itself_are_large_enough():
    class Listed(Source):
        name, skipped = "listed", {}

        def __len__(self):
            return 3

        def size(self, i):
            return [(48, 48), (47, 48), (96, 24)][i]

    assert large_enough(Listed(), 48).indices.tolist() == [0, 2]


def test_how_many_pictures_are_held_out(tmp_path):
    for count, expected in ((40, 16), (200, 30)):  # 15 %, and 16 at the least
        cfg = dataclasses.replace(DEBUG, data=(f"openmoji:train:{count}",))
        (source,), rest = train.open_sources(cfg)
        assert (len(source), len(rest)) == (count, expected)
    make_pictures(tmp_path / "pictures", good=60, bad=0)
    (source,), rest = train.open_sources(dataclasses.replace(cfg, data=(str(tmp_path),)))
    kept, held = ({x.key(i) for i in range(len(x))} for x in (source, rest))
    assert len(kept) + len(held) == 60 and not kept & held and 3 <= len(held) <= 16


# ----------------------------------------------------------------------- two ranks in one process


class TwoRanks:
    """torch.distributed for two threads: the collectives that a step uses, by hand."""

    def __init__(self):
        self.slots, self.local = [None, None], threading.local()
        self.barrier_of = threading.Barrier(2, timeout=60)

    def exchange(self, value) -> list:
        self.slots[self.local.rank] = value
        self.barrier_of.wait()
        everyone = list(self.slots)
        self.barrier_of.wait()
        return everyone

    def __getattr__(self, name):
        return getattr(torch.distributed, name)  # constants

    def is_initialized(self) -> bool:
        return True

    def get_rank(self, _=None) -> int:
        return self.local.rank

    def get_world_size(self, _=None) -> int:
        return 2

    def barrier(self) -> None:
        self.exchange(None)

    def all_reduce(self, x) -> None:
        x.copy_(sum(self.exchange(x.clone())))

    def broadcast(self, x, src=0) -> None:
        x.copy_(self.exchange(x.clone())[src])

    def all_gather(self, parts, x) -> None:
        for part, other in zip(parts, self.exchange(x.clone()), strict=True):
            part.copy_(other)

    def all_gather_object(self, parts, x) -> None:
        parts[:] = self.exchange(x)

    def run(self, task) -> list:
        """What task(rank) gives on both ranks."""

        def ranked(rank):
            self.local.rank = rank
            try:
                return task(rank)
            except BaseException:
                self.barrier_of.abort()
                raise

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(ranked, (0, 1)))


@pytest.mark.parametrize("changes", [{}, {"average": "partition"}, {"balance": "adaloss"}])
def test_two_ranks_of_unequal_pictures_take_one_process_steps(changes, monkeypatch):
    """Threads with collectives written by hand; what DDP does to gradients is their mean."""
    low = train.Stream("low", 48, budget=96, packs=3)
    streams = (low, train.Stream("high", 96, budget=200, packs=1, teachers=("dense",)))
    cfg = dataclasses.replace(DEBUG, stages=(train.Stage(1.0, streams),), stats_steps=2, **changes)
    expected = train_for(cfg, 2, awake)
    packs = expected.stages[0][0]
    first, second = (sum(len(batch) for batch in half) for half in (packs[:2], packs[2:]))
    assert first != second
    ranks, clip = TwoRanks(), torch.nn.utils.clip_grad_norm_

    def mean_and_clip(parameters, limit):
        parameters = list(parameters)
        for p in parameters:
            mean = sum(ranks.exchange(torch.zeros_like(p) if p.grad is None else p.grad)) / 2
            p.grad = mean.clone()
        return clip(parameters, limit)

    monkeypatch.setattr(train, "dist", ranks)
    monkeypatch.setattr(losses, "dist", ranks)
    monkeypatch.setattr(packing, "dist", ranks)
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", mean_and_clip)
    monkeypatch.setattr(train, "distribute", lambda cfg, student, group: student)  # noqa: ARG005
    students = [train.build_student(cfg, expected.teachers) for _ in range(2)]  # one seed for both
    monkeypatch.setattr(train, "build_student", lambda *_: students[HERE.run.group.rank])
    quietly(monkeypatch)

    def steps_of(rank):
        torch.set_num_threads(1)
        group = train.Group(rank, 2, CPU.device)
        return Run(cfg, expected.teachers, 2, awake, group=group).go()

    runs = ranks.run(steps_of)
    for run in runs:
        for one, two in zip(expected.reports, run.reports, strict=True):
            assert two.losses == pytest.approx(one.losses, rel=1e-4)
            assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
            assert two.max_load == pytest.approx(one.max_load)
            assert (two.images, two.tokens, two.lr) == (one.images, one.tokens, one.lr)
    for name, p in train.trained(expected.state.student):
        copies = [run.weights[2][name] for run in runs]
        assert torch.equal(*copies)
        torch.testing.assert_close(copies[0], p.detach(), rtol=1e-3, atol=2e-5)


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
                              teachers=DEBUG.teachers)  # fmt: skip
    teachers = load_teachers(cfg)
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
    cfg = dataclasses.replace(DEBUG, model="tiny")
    teachers = load_teachers(cfg)
    given, _ = train.build_student(cfg, teachers)
    save_student(given, tmp_path / "s.pt")
    changed = dataclasses.replace(cfg, init=f"x={tmp_path / 's.pt'}", teachers=cfg.teachers[::-1])
    student, folded = train.build_student(changed, teachers[::-1])
    assert folded == {"dense", "semantic"}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    for name, summary in given(batch).summary.items():
        torch.testing.assert_close(student(batch).summary[name], summary)


OTHERS = {
    "2 -> 3": (
        "semantic=builtin:tiny-semantic",
        "dense=builtin:tiny-dense",
        "new=builtin:tiny-dense",
    ),
    "2 -> 1": ("semantic=builtin:tiny-semantic",),
    "1 of 2 new": ("new=builtin:tiny-dense", "semantic=builtin:tiny-semantic"),
}


@pytest.mark.parametrize("form", ["radio", "radio without registers", "amoe"])
@pytest.mark.parametrize("others", OTHERS)
def test_other_teachers_go_on_from_the_same_network(others, form, tmp_path, monkeypatch):
    """Who stays, by name, answers bit for bit as before, wherever it stands now."""
    config = train.MODELS["test"] if form == "amoe" else TINY_RADIO
    config = dataclasses.replace(config, registers=0) if "without" in form else config
    monkeypatch.setitem(train.MODELS, "tiny", config)
    cfg = dataclasses.replace(DEBUG, model="tiny", head_hidden=24)
    given, _ = train.build_student(cfg, load_teachers(cfg))
    for parameter in given.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_student(given, tmp_path / "s.pt")
    cfg = dataclasses.replace(cfg, model="init", init=f"x={tmp_path / 's.pt'}", seed=5,
                              head_hidden=32, teachers=OTHERS[others])  # fmt: skip
    student, kept = train.build_student(cfg, load_teachers(cfg))
    assert kept == {"dense", "semantic"} & {head.name for head in student.config.heads}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64), torch.rand(3, 16, 96)], patch=16)
    with torch.no_grad():
        before, after = given(batch), student(batch)
    assert torch.equal(before.trunk_MD, after.trunk_MD)
    for name in kept:
        assert torch.equal(before.summary[name], after.summary[name])
        assert torch.equal(before.patches[name], after.patches[name])
    tokens = {head.name: head.token for head in student.config.heads}
    if form == "radio":  # nobody shares: a free CLS token or a register for the new one
        assert len(set(tokens.values())) == len(tokens)


@pytest.mark.parametrize("name", ["radio_b.pth.tar", "siglino_moe.pt"])
def test_a_release_goes_on_with_another_teacher(name):
    """Its head, split and biased so that PHI-S folds into it, answers the same."""
    path = Path(__file__).parent / "golden" / name
    given = load_student(path)
    stays = next(head for head in given.config.heads if head.summary_dim and not head.pool)
    rule = SizeRule("area", 16, 64)

    def read(_, pixels):
        zeros = torch.zeros(len(pixels), 4, 4, stays.dim)
        return zeros[:, 0, 0, :1].expand(-1, stays.summary_dim), zeros, None

    backbone = Backbone(torch.nn.Identity(), read, rule)
    others = [Teacher(stays.name, backbone), *load_teachers(DEBUG)]
    cfg = dataclasses.replace(DEBUG, model="init", init=f"x={path}")
    student, kept = train.build_student(cfg, others)
    assert kept == {stays.name}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    with torch.no_grad():
        before, after = given(batch), student(batch)
    assert torch.equal(before.patches[stays.name], after.patches[stays.name])
    assert torch.equal(before.summary[stays.name], after.summary[stays.name])
    assert set(after.summary) == {stays.name, "dense", "semantic"}


@pytest.mark.slow
def test_a_student_goes_through_transformers_and_on_with_one_teacher_more(tmp_path):
    """The demo student in RADIO form: a folder, AutoModel, back, and trained further."""
    transformers = pytest.importorskip("transformers")
    flags = ["--preset", "warm", "--teachers", *DEBUG.teachers, "--cache", "none"]
    flags += ["--steps", "2", "--frozen-steps", "1"]
    run(tmp_path / "warm", *flags)
    student = load_student(tmp_path / "warm")  # the folder of a run
    assert student.config.final_norm and student.config.cls_tokens == 2
    train.model.save_transformers(student, tmp_path / "hf")
    network = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    picture, patch = torch.rand(3, 70, 98), student.config.patch
    again, (features,) = load_student(tmp_path / "hf"), student.encode([picture])
    with torch.no_grad():
        out = network(picture[None])
    scale = out.features.abs().max()
    error = (features.patches["trunk"].flatten(0, 1) - out.features[0]).abs().max()
    assert (
        features.patches["trunk"].shape[:2] == (70 // patch, 98 // patch) and error < 1e-5 * scale
    )
    assert again.config.heads == student.config.heads
    for name, x in student.state_dict().items():
        if name.startswith(("heads", "prefix")):
            assert torch.equal(again.state_dict()[name], x)
    flags += ["--init", f"x={tmp_path / 'hf'}"]
    cfg = train.parse_args([*QUICK, *flags, "--out", str(tmp_path / "more")])
    cfg = dataclasses.replace(cfg, teachers=(*cfg.teachers, "new=builtin:tiny-dense"))
    more, kept = train.build_student(cfg, load_teachers(cfg))
    assert kept == {head.name for head in student.config.heads}
    for name in kept:
        for part in ("summary", "patches"):
            one, two = (getattr(x.encode([picture])[0], part)[name] for x in (again, more))
            assert torch.equal(one, two)
    assert train_for(cfg, 2).reports[-1].losses["new/patches"] > 0


def test_our_checkpoint_goes_on_in_another_run(reference):
    """Its folded heads are unfolded into the new statistics, so step 0 answers as before."""
    init = f"x={reference / 'step_000006' / 'model.pt'}"
    cfg = dataclasses.replace(train.parse_args(QUICK), init=init, stats_steps=2)
    ready = train_for(cfg)
    assert train.build_student(cfg, ready.teachers)[1] == {"dense", "semantic"}
    batch = PackedBatch.from_images([torch.rand(3, 48, 64)], patch=16)
    with torch.no_grad():
        given = load_student(reference / "step_000006" / "model.pt")(batch)
        now = ready.state.student(batch)
    for name, space in ready.state.spaces.items():
        for part, norm in space.parts.items():
            raw = norm.denormalize(getattr(now, part)[name])
            torch.testing.assert_close(raw, getattr(given, part)[name], rtol=1e-4, atol=1e-4)


def test_a_start_reads_its_init_once_and_says_which_heads_it_gave(
    tmp_path, reference, monkeypatch, capsys
):
    init, read, whole = str(reference / "step_000006" / "model.pt"), [], train.sha256_of
    monkeypatch.setattr(train, "sha256_of", lambda path: read.append(str(path)) or whole(path))
    teachers = "dense=builtin:tiny-dense", "new=builtin:tiny-semantic"
    run(tmp_path, "--steps", "1", "--init", f"x={init}", "--teachers", *teachers)
    assert read.count(init) == 1
    line = f"--init x={init}: heads kept: dense; new: new; dropped: semantic"
    assert capsys.readouterr().err.count(line) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--init", "foo"), r"--init foo: no such file or folder; pass a student"),
        (("--init", "x=builtin:mobilenets"), r"--init x=builtin:mobilenets is no student of ours"),
        (("--model", "init"), r"--model init is that of --init: pass --init PATH"),
        (("--model", "init", "--init", "foo"), r"--init foo: no such file or folder"),
        (("--resume", "nope"), r"--resume nope: nope/manifest\.json is not there"),
        (("--data", "{here}/photos"), r"--out .*photos/run lies in --data .*photos; pass another"),
    ],
)
def test_a_path_that_is_wrong_is_named_by_its_flag(flags, said, tmp_path):
    make_pictures(tmp_path / "photos", good=8, bad=0)
    with pytest.raises(SystemExit, match=said):
        run(tmp_path / "photos" / "run", *(flag.format(here=tmp_path) for flag in flags))
    assert not (tmp_path / "photos" / "run").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit, match=r"--out .*out: File exists; pass a folder"):
        run(tmp_path / "out")


def test_a_head_that_upsamples_starts_anew(tmp_path, capsys):
    """The losses compare a patch with a patch, and its patches are u * u parts of one."""
    sizes = dict(hidden=8, summary_hidden=8)
    heads = (
        RadioSpec("dense", 24, 24, upsample=2, **sizes),
        RadioSpec("semantic", 32, 32, token=1, **sizes),
    )
    config = ModelConfig(
        "radio", 32, 1, 2, 16, 64, heads, cls_tokens=2, registers=2, position_grid=8,
        gated_ffn=False, final_norm=False,
    )  # fmt: skip
    save_student(Student(config), tmp_path / "finer.pt")
    init = f"r={tmp_path / 'finer.pt'}"
    run(tmp_path / "out", "--steps", "1", "--model", "init", "--init", init)
    kept = "heads kept: semantic; new: dense; dropped: dense"
    assert kept in capsys.readouterr().err
    assert load_student(tmp_path / "out").config.heads[0].upsample == 1


def test_an_init_that_does_not_fit_is_refused(tmp_path, reference):
    init = f"x={reference / 'step_000006' / 'model.pt'}"
    with pytest.raises(SystemExit, match=r"--init: .*choose the --model"):
        run(tmp_path, "--init", init, "--model", "nano")
    with pytest.raises(SystemExit, match="no/such"):
        run(tmp_path, "--init", "x=/no/such/file")
    with pytest.raises(SystemExit, match="--init"):
        run(tmp_path, "--model", "init")


def test_siglips_pooling_head_makes_the_summary(tmp_path):
    """The frozen head reads patches in the teacher's space, not in PHI-S'."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 16}
    model = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**sizes, intermediate_size=48, num_patches=16)
    )
    model.save_pretrained(tmp_path)
    cfg = dataclasses.replace(DEBUG, teachers=(f"siglip2={tmp_path}",))
    run = train_for(cfg, 1)
    before, after = run.weights
    assert set(run.reports[0].losses) == {
        f"siglip2/{x}" for x in ("patches", "summary", "relation")
    }
    pool = [name for name in before if name.startswith("heads.siglip2.pool.")]
    assert len(pool) > 5 and all(torch.equal(before[name], after[name]) for name in pool)
    # what is saved answers as what is trained, in the teacher's space
    weights = train.state_dict(run.state)["student"]
    train.save_folded(run.state, weights, tmp_path / "model.pt")
    batch = run.stages[0][0][0]
    with torch.no_grad():
        saved = load_student(tmp_path / "model.pt")
        raw, normal = saved(batch), run.state.student(batch)
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
    pooled = run.state.spaces["siglip2"].parts["summary"].normalize(raw.summary["siglip2"])
    with torch.no_grad():
        ours = forward(run, 1, batch).summary["siglip2"]
    torch.testing.assert_close(ours, pooled, rtol=1e-2, atol=1e-2)


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
    """Make training die before the optimizer takes this step, as a kill would."""
    whole = train.settle

    def dies(job, state, number, *args):
        if number == step:
            raise Interrupted
        return whole(job, state, number, *args)

    monkeypatch.setattr(train, "settle", dies)


def test_two_interruptions_change_no_bit(tmp_path, reference, monkeypatch):
    for step in (4, 6):
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path, "--workers", str(step % 4 // 2))
    assert totals(run(tmp_path)) == totals(rows_of(reference))
    assert_same_end(tmp_path, reference)
    assert not list(tmp_path.glob("old_*"))


def two_stages(monkeypatch) -> None:
    """Small pictures in steps 1 to 3, large ones in 4 to 6."""
    low, high = train.Stream("low", 48, budget=64), train.Stream("high", 96, budget=160)
    stages = (train.Stage(0.5, (low,)), train.Stage(1.0, (high,)))
    monkeypatch.setitem(train.PRESETS, "debug", dataclasses.replace(DEBUG, stages=stages))


def watch_steps(monkeypatch) -> list[tuple[int, list[str], int]]:
    """Gets (step, its pictures, the tokens of the largest) as they are trained on."""
    seen, whole = [], train.settle

    def watched(job, state, number, *args):
        keys = [sample.key for batch in args[3] for sample in batch.samples]
        seen.append((number, keys, max(n for batch in args[3] for n in batch.lengths)))
        return whole(job, state, number, *args)

    monkeypatch.setattr(train, "settle", watched)
    return seen


def test_stages_follow_each_other_also_through_interruptions(tmp_path, monkeypatch):
    two_stages(monkeypatch)
    cfg = train.parse_args(QUICK)
    assert cfg.stage_bounds() == [(0, 3), (3, 6)]
    flags = ("--save-every", "1", "--ema", "0.9", "--balance", "adaloss", "--keep", "9")
    with monkeypatch.context() as patch:
        whole = watch_steps(patch)
        rows = run(tmp_path / "whole", *flags)
    assert [step for step, _, _ in whole] == [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [tokens <= 9 for _, _, tokens in whole] == [True] * 3 + [False] * 3
    rows_of_stages = [data[step] for data in train_for(cfg).stages for step in range(3)]
    assert [keys for _, keys, _ in whole] == [
        [sample.key for batch in packs for sample in batch.samples] for packs in rows_of_stages
    ]
    seen = []
    for stop in (3, 4, 5, 7):  # inside each stage, and between the two
        with monkeypatch.context() as patch:
            interrupt_before(stop, patch)
            given = watch_steps(patch)
            with pytest.raises(Interrupted) if stop < 7 else nullcontext():
                run(tmp_path / "cut", *flags)
        seen += [row for row in given if row[0] < stop]
    assert seen == whole
    assert totals(rows_of(tmp_path / "cut")) == totals(rows)
    assert_same_end(tmp_path / "cut", tmp_path / "whole")


def test_a_stage_of_no_steps_is_left_out():
    stages = (train.Stage(0.4, DEBUG.stages[0].streams), DEBUG.stages[0])
    cfg = dataclasses.replace(DEBUG, steps=1, stages=stages)
    assert cfg.stage_bounds() == [(0, 0), (0, 1)]
    assert len(train_for(cfg, steps=1).reports) == 1


def test_each_stage_has_an_order_of_its_own():
    stages = (train.Stage(0.5, DEBUG.stages[0].streams), train.Stage(1.0, DEBUG.stages[0].streams))
    both = train_for(dataclasses.replace(DEBUG, stages=stages)).stages
    first, second = ([s.key for batch in data[0] for s in batch.samples] for data in both)
    assert first != second


def test_a_stop_at_the_end_of_an_epoch_changes_no_bit(tmp_path, monkeypatch):
    epoch = train_for(train.parse_args(QUICK)).stages[0].steps_in(0)
    flags = ("--steps", str(epoch + 3), "--save-every", "1")
    expected = totals(run(tmp_path / "whole", *flags))
    for step in (epoch, epoch + 1):
        with monkeypatch.context() as patch:
            interrupt_before(step, patch)
            with pytest.raises(Interrupted):
                run(tmp_path / "cut", *flags)
    assert totals(run(tmp_path / "cut", *flags)) == expected


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_new_run_in_a_used_folder_moves_the_old_one_aside(tmp_path, reference, capsys):
    out = tmp_path / "out"
    olds = []
    for seed in ("1", "2"):
        run(out, "--resume", "none", "--steps", "2", "--seed", seed)
        (out / "summary.json").write_text("{}")
        olds.append(tree(out))
    assert totals(run(out, "--resume", "none")) == totals(rows_of(reference))
    assert [path.name for path in train.checkpoints(out)] == [
        "step_000002", "step_000004", "step_000006"]  # fmt: skip
    assert [tree(tmp_path / "out.1"), tree(tmp_path / "out.2")] == olds
    assert f"{out} is now in {tmp_path / 'out.2'}" in capsys.readouterr().err
    assert not (out / "summary.json").exists() and not (out / "lock").exists()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("step_1000000", "step_999000"):
        (tmp_path / name).mkdir()
    assert [p.name for p in train.checkpoints(tmp_path)] == ["step_999000", "step_1000000"]


@pytest.mark.parametrize(("restarts", "steps"), [("0", [1, 2, 3, 4, 5, 6]), ("1", [3, 4, 5, 6])])
def test_a_restart_by_the_launcher_goes_on_whatever_resume_says(
    restarts, steps, tmp_path, stopped, monkeypatch
):
    out = shutil.copytree(stopped, tmp_path / "out")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    seen = watch_steps(monkeypatch)
    run(out, "--resume", "none")
    assert [step for step, _, _ in seen] == steps
    assert (tmp_path / "out.1").exists() == (restarts == "0")


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "other student"])
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
    elif damage == "other student":
        shutil.copy(tmp_path / "step_000002" / "model.pt", newest / "model.pt")
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
    cfg = train.parse_args(QUICK)
    identity = train.identity_of(cfg, train.open_sources(cfg)[0], load_teachers(cfg))
    manifest = {"version": 2, "sha256": manifest, "identity": identity}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=re.escape("state.pt")):
        run(tmp_path / "out", "--resume", str(folder))
    assert not (tmp_path / "PWNED").exists()
    del reference


def test_another_run_is_refused_with_the_difference(tmp_path, reference, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_before(4, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    with pytest.raises(SystemExit, match="lr"):
        run(tmp_path, "--lr", "1e-4")
    with pytest.raises(SystemExit, match=r"sources: .'24 pictures.*'25 pictures"):
        run(tmp_path, "--data", "openmoji:train:25")
    assert totals(run(tmp_path)) == totals(rows_of(reference))
    assert_same_end(tmp_path, reference)


# Fields that decide how a run goes, not what it computes (but for rounding).
CONTROLS = {"preset", "data", "teachers", "init", "cache",  # by their content, see below
            "out", "resume", "save_every", "keep", "keep_every", "log_every", "evaluate_every",
            "workers", "threads", "pg_timeout", "max_bad_frac", "micro_packs", "parallel",
            "device", "deterministic", "recompute", "compile"}  # fmt: skip


def test_every_field_but_the_controls_is_in_a_runs_identity():
    cfg = dataclasses.replace(DEBUG, data_weights=(2.0,), model="test")
    identity = cfg.identity()
    assert identity.keys() == {item.name for item in dataclasses.fields(cfg)} - CONTROLS
    assert json.loads(json.dumps(identity)) == identity
    assert identity["stages"][0]["streams"][0]["max_side"] == 96
    for name, value in identity.items():
        if name not in ("stages", "data_weights"):
            assert value == getattr(cfg, name)
    assert identity["data_weights"] == [2.0]


def stopped_run(out: Path, monkeypatch, *flags: str) -> None:
    """A run with a checkpoint of step 2."""
    with monkeypatch.context() as patch:
        interrupt_before(3, patch)
        with pytest.raises(Interrupted):
            run(out, *flags)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """The folder of such a run, to copy."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(out, patch)
    return out


@pytest.mark.parametrize(
    "flags", ["--seed 1", "--beta2 0.9", "--trunk-lr 0.5", "--no-windows", "--average token"]
)
def test_a_changed_field_is_refused_on_resume(flags, tmp_path, stopped):
    out = shutil.copytree(stopped, tmp_path / "out")
    name = flags.split()[0].replace("--no-", "--").strip("-").replace("-", "_")
    with pytest.raises(SystemExit, match=rf"belongs to another run\. {name}: "):
        run(out, *flags.split())


def test_controls_may_change_on_resume(tmp_path, stopped, reference):
    out = shutil.copytree(stopped, tmp_path / "out")
    flags = ("--save-every", "3", "--keep", "1", "--max-bad-frac", "0.5", "--pg-timeout", "60")
    assert totals(run(out, *flags)) == totals(rows_of(reference))
    assert [path.name for path in train.checkpoints(out)] == ["step_000006"]


def test_changed_pictures_or_teachers_are_refused_on_resume(tmp_path, reference, monkeypatch):
    pictures, teacher = tmp_path / "pictures", tmp_path / "teacher.pt"
    make_pictures(pictures, good=24, bad=0)
    shutil.copy(reference / "step_000002" / "model.pt", teacher)
    flags = ("--data", str(pictures), "--teachers", f"a={teacher}", "--held-out", "0")
    stopped_run(tmp_path / "out", monkeypatch, *flags)
    shutil.copy(reference / "step_000006" / "model.pt", teacher)
    with pytest.raises(SystemExit, match=r"another run\. teachers: "):
        run(tmp_path / "out", *flags)
    shutil.copy(reference / "step_000002" / "model.pt", teacher)
    Image.new("RGB", (64, 48)).save(pictures / "023.jpg")
    with pytest.raises(SystemExit, match=r"another run\. sources: "):
        run(tmp_path / "out", *flags)


def test_a_finished_run_says_so_and_another_is_refused(tmp_path, monkeypatch, capsys):
    """Also where the pictures have changed since, or more steps are asked for."""
    out, pictures = tmp_path / "out", tmp_path / "pictures"
    make_pictures(pictures, good=24, bad=0)
    flags = ("--data", str(pictures), "--held-out", "0")
    run(out, *flags)
    identity = json.loads((out / "config.json").read_text())["identity"]
    report = {"left out": {"knn": "no labels"}}
    (out / "summary.json").write_text(
        json.dumps({"steps": 6, "identity": identity, "report": report})
    )
    kept = tree(out)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", lambda *_: pytest.fail("a finished run was opened"))
        run(out, *flags)
        text = capsys.readouterr().out
        assert "is finished (6 steps)" in text and "no labels" in text
        with pytest.raises(SystemExit, match="seed: 0 in the checkpoint, 1 now"):
            run(out, *flags, "--seed", "1")
        with pytest.raises(SystemExit, match=r"steps: 6 .*, 8 now.*--init .*model\.pt"):
            run(out, *flags, "--steps", "8")
        Image.new("RGB", (64, 48)).save(pictures / "023.jpg")
        with pytest.raises(SystemExit, match=r"another run\. sources: "):
            run(out, *flags)
    assert tree(out) == kept


@pytest.mark.parametrize(
    "flags",
    ["--teachers a=/no/such.pt", "--lr 1", "--data /no/such", "--init x=/no/such.pt",
     "--resume none --init x=/no/such.pt"],
)  # fmt: skip
def test_a_refused_command_writes_nothing(flags, tmp_path, stopped):
    out = shutil.copytree(stopped, tmp_path / "a" / "out")
    kept = tree(out)
    for folder in (out, tmp_path / "b" / "new"):
        if folder == out or flags != "--lr 1":
            with pytest.raises(SystemExit) as stop:
                run(folder, *flags.split())
            assert "train.py: " in str(stop.value.code)
    assert tree(out) == kept and [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert not (tmp_path / "b" / "new").exists()


@pytest.mark.slow
def test_one_run_at_a_time_in_a_folder(tmp_path, monkeypatch):
    """The lock dies with its process, and says whose it is."""
    out = tmp_path / "out"
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import train; from pathlib import"
    code += f" Path; train.own(Path({str(out)!r})); print('owned', flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    before = tree(out)
    monkeypatch.setattr(train.time, "sleep", lambda _: None)
    with pytest.raises(SystemExit) as stop:
        run(out)
    found = re.search(r"in use by process (\d+) on (\S+) since (\d{4}-\S+ \S+); ", stop.value.code)
    assert int(found[1]) == other.pid and found[2] == train.platform.node()
    assert abs(time.mktime(time.strptime(found[3], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    assert tree(out) == before
    other.kill()
    other.wait()
    monkeypatch.undo()
    for folder, was_there in ((out, True), (tmp_path / "new", False)):
        train.own(folder)
        train.disown(folder)
        assert folder.exists() == was_there and not (folder / "lock").exists()


def test_another_runs_folder_is_refused_before_a_cache_is_filled(tmp_path, stopped, monkeypatch):
    out = shutil.copytree(stopped, tmp_path / "out")
    monkeypatch.setattr(train, "fill_caches", lambda *_: pytest.fail("the cache was filled"))
    with pytest.raises(SystemExit, match=r"another run\. teachers: .* cached"):
        run(out, "--cache", str(tmp_path / "cache"))


def test_an_init_is_known_by_its_content_or_its_name_on_the_hub(tmp_path):
    for text in ("facebook/dinov2-base@8", "facebook/dinov2-large@3", "builtin:vit-s@8"):
        assert train.content_of(f"v={text}") == text
    for gone in (tmp_path / "gone", tmp_path / "no" / "such.pt"):
        assert train.content_of(f"v={gone}") is None


def test_damaged_checkpoints_only_stop_the_run_with_the_way_out(tmp_path, stopped):
    out = shutil.copytree(stopped, tmp_path / "out")
    (out / "step_000002" / "state.pt").write_bytes(b"x")
    kept = tree(out)
    with pytest.raises(SystemExit, match=r"no checkpoint in .* is whole: .*SHA-256.*--resume none"):
        run(out)
    assert tree(out) == kept


def test_another_spelling_and_another_place_are_the_same_run(tmp_path, reference, monkeypatch):
    """Pictures, the weights it started from, and a teacher are known by their content."""
    place = tmp_path / "here"
    make_pictures(place / "pics", good=24, bad=0)
    for name, step in (("init.pt", 2), ("teacher.pt", 4)):
        shutil.copy(reference / f"step_00000{step}" / "model.pt", place / name)

    def flags(root: str, cache: str) -> list[str]:
        return ["--data", f"{root}/pics", "--init", f"x={root}/init.pt", "--held-out", "0",
                "--teachers", f"a={root}/teacher.pt", "--cache", str(tmp_path / cache)]  # fmt: skip

    expected = totals(run(tmp_path / "whole", *flags(str(place), "cache")))
    monkeypatch.chdir(tmp_path)
    stopped_run(tmp_path / "out", monkeypatch, *flags("here", "cache"))
    with monkeypatch.context() as patch:
        interrupt_before(5, patch)
        with pytest.raises(Interrupted):
            run(tmp_path / "out", *flags("./here/", "cache"))
    shutil.copy(reference / "step_000006" / "model.pt", place / "init.pt")
    with pytest.raises(SystemExit, match=r"another run\. init: "):
        run(tmp_path / "out", *flags("here", "cache"))
    (place / "init.pt").unlink()  # the checkpoint has all weights
    shutil.move("here", "there")
    shutil.move("cache", "moved")
    assert totals(run(tmp_path / "out", *flags("there", "moved"))) == expected


def test_resume_from_a_folder_goes_on_in_its_own(tmp_path, stopped, reference, monkeypatch):
    flags, out = ("--resume", str(stopped / "step_000002")), tmp_path / "out"
    before = tree(stopped)
    with monkeypatch.context() as patch:
        interrupt_before(6, patch)
        with pytest.raises(Interrupted):
            run(out, *flags)
    with monkeypatch.context() as patch:
        seen = watch_steps(patch)
        assert totals(run(out, *flags)) == totals(rows_of(reference))
    assert [step for step, _, _ in seen] == [5, 6] and tree(stopped) == before
    kept = tree(out)
    with pytest.raises(SystemExit, match=r"step_000004 is of --out .* pass another --out"):
        run(out, "--resume", str(out / "step_000004"))
    assert tree(out) == kept


def test_resume_from_a_whole_run_has_its_student_in_the_new_folder(
    tmp_path, reference, monkeypatch
):
    monkeypatch.setattr(train, "finish", train.saved_student)
    (tmp_path / "step_000006.tmp").mkdir()  # of a run that was killed here
    run(tmp_path, "--resume", str(reference / "step_000006"))
    for path in (tmp_path, tmp_path / "step_000006"):
        assert (path / "model.pt").read_bytes() == (reference / "model.pt").read_bytes()


def test_a_run_may_write_to_the_folder_it_is_called_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for resume in ("auto", "none", "elsewhere/step_000002"):
        dataclasses.replace(DEBUG, out=".", resume=resume)
    with pytest.raises(ValueError, match="--resume step_000002 is of --out "):
        dataclasses.replace(DEBUG, out=".", resume="step_000002")


@pytest.mark.parametrize("damage", ["torn", "nul", "bad line", "utf8", "empty", "gone"])
def test_a_damaged_log_loses_the_damaged_lines_alone(damage, tmp_path, stopped):
    out = shutil.copytree(stopped, tmp_path / "out")
    path = out / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    text = {"torn": first + second[:-40], "nul": first + b"\0" * 300, "empty": b"",
            "bad line": first + b"{'a\n", "utf8": first + second.replace(b"lr", b"\xff\xfe"),
            }.get(damage)  # fmt: skip
    path.unlink() if text is None else path.write_bytes(text)
    kept = {"empty": [], "gone": []}.get(damage, [1])
    assert [row["step"] for row in run(out)] == [*kept, 3, 4, 5, 6]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    whole = train.update_average

    def broken(state: train.State, step: int) -> None:
        whole(state, step)
        if step == 4:
            next(iter(state.student.parameters())).data[0] = float("nan")

    monkeypatch.setattr(train, "update_average", broken)
    with pytest.raises(SystemExit, match=r"step 4: not finite: prefix_RD.*step_000002/model\.pt"):
        run(tmp_path)
    assert [path.name for path in train.checkpoints(tmp_path)] == ["step_000002"]


def test_small_troubles_do_not_end_a_run(tmp_path, reference, monkeypatch, capsys):
    """An old checkpoint that stays, a disk without room for a line of the log, no hard links."""

    def refuse(*_: Any, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("no")

    real = Path.open
    monkeypatch.setattr(shutil, "rmtree", refuse)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **how: (
        refuse() if mode == "ab" else real(self, mode, **how)))  # fmt: skip
    train.main([*QUICK, "--out", str(tmp_path), "--keep", "1"])
    monkeypatch.undo()
    text = capsys.readouterr().err
    assert "an old checkpoint: no; the run goes on" in text
    assert "metrics.jsonl: no; the run goes on" in text
    assert_same_end(tmp_path, reference)
    newest = train.checkpoints(tmp_path)[-1] / "model.pt"
    assert (tmp_path / "model.pt").read_bytes() == newest.read_bytes()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch, capsys):
    class Small(io.FileIO):
        def write(self, data: bytes) -> int:
            return super().write(data[: min(len(data), 30)])

    job = SimpleNamespace(group=CPU, out=tmp_path)
    train.write_metrics(job, {"step": 1})
    monkeypatch.setattr(Path, "open", lambda self, *_, **__: Small(self, "a"))
    train.write_metrics(job, {"step": 2, "loss/total": 1.0, "lr": 0.1})
    monkeypatch.undo()
    assert rows_of(tmp_path) == [{"step": 1}]
    assert "no room for a line at step 2" in capsys.readouterr().err


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_before(6, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in run(tmp_path)] == [1, 2, 3, 4, 5, 6]


# -------------------------------------------------------------------------------- guards


def test_a_nan_stops_before_the_step_and_names_the_picture(tmp_path, monkeypatch):
    whole = train.ask
    calls = []

    def poisoned(teacher, batch, chosen):
        out = whole(teacher, batch, chosen)
        calls.append(batch.samples[chosen[0]].key)
        if len(calls) == 9:
            out.patches[0][0, 0, 0] = float("nan")
        return out

    monkeypatch.setattr(train, "ask", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert "not finite: " in str(stop.value.code)
    assert f"; bad teacher features on rank 0: {calls[8]}. " in str(stop.value.code)
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


def test_bad_pictures_are_named_once_and_counted_each_time(tmp_path, capsys):
    make_pictures(tmp_path / "pictures", good=20, bad=4)
    flags = ("--data", str(tmp_path / "pictures"), "--max-bad-frac", "0.4", "--steps", "8",
             "--held-out", "0")  # fmt: skip
    run(tmp_path / "out", *flags)
    text = capsys.readouterr().err
    cfg = train.parse_args([*QUICK, *flags])
    (source,), _ = train.open_sources(cfg)
    bad = {f"00{i}.jpg" for i in range(4)} & {source.key(i) for i in range(len(source))}
    (data,) = train_for(cfg).stages
    met = [batch for step in range(8) for batch in data[step]]
    times = sum(len(batch.skipped) for batch in met)
    assert bad and times > len(bad)  # each is met in several epochs
    state = train.read_state(train.checkpoints(tmp_path / "out")[-1])
    assert state["skipped"].keys() == bad
    assert (state["bad"], state["images"]) == (times, sum(map(len, met)))
    for key in bad:
        assert text.count(f"skipped {key}: ") == 1


def test_the_share_of_bad_pictures_by_hand():
    cfg = dataclasses.replace(DEBUG, max_bad_frac=0.1)
    train.refuse_bad_fraction(cfg, 10, 90)
    with pytest.raises(train.Standstill, match="11 of 101 pictures"):
        train.refuse_bad_fraction(cfg, 11, 90)
    record = {"skipped": {}, "bad": 0, "images": 60, "step": 1}
    for _ in range(39):  # a bad start is no verdict
        train.note_skipped(cfg, record, {"x": "cut"})
    with pytest.raises(train.Standstill, match="40 of 100"):
        train.note_skipped(cfg, record, {"x": "cut"})
    record = {"skipped": {}, "bad": 1, "images": 2, "step": cfg.steps}
    with pytest.raises(train.Standstill, match="1 of 3"):
        train.note_skipped(cfg, record, {})


def test_a_checkpoint_is_flushed_before_it_appears(tmp_path, monkeypatch):
    out, flushed, whole = tmp_path / "step_000001", set(), os.fsync

    def watched(handle):
        flushed.add((os.fstat(handle).st_ino, out.exists()))
        whole(handle)

    state = train_for(DEBUG).state
    monkeypatch.setattr(os, "fsync", watched)
    train.write_checkpoint(out, state, {"step": 1, **train.state_dict(state)})
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "model.pt", "state.pt"]
    for path in (*out.iterdir(), out):
        assert (path.stat().st_ino, False) in flushed, path
    assert (tmp_path.stat().st_ino, True) in flushed


def test_a_run_whose_launcher_is_gone_stops(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(train, "LAUNCHER", -1)  # no parent of ours
    stop = train.StopSignal()
    stop.is_awaited = True
    monkeypatch.setattr(stop, "take", lambda number, _: setattr(stop, "number", number))
    with stop:
        end = time.monotonic() + 5
        while not stop.number and time.monotonic() < end:
            time.sleep(0.01)
    assert stop.number == signal.SIGTERM


@pytest.mark.parametrize("number", packing.STOPPING)
def test_a_signal_ends_a_run_that_has_nothing_to_save_and_waits_for_a_step(number, capsys):
    stop, before = train.StopSignal(), signal.getsignal(number)
    with pytest.raises(SystemExit) as left, stop:
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert left.value.code == 128 + number
    assert capsys.readouterr().err.count("told to stop") == 1
    with stop:
        stop.is_awaited = True
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # torchrun hands it on
        assert stop.number == number
        stop.since -= 9
        with pytest.raises(SystemExit) if number == signal.SIGINT else nullcontext():
            os.kill(os.getpid(), number)  # Ctrl-C again: the step may be stuck
            time.sleep(0.1)
        stop.is_awaited = False  # the report, which nothing waits for
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(number) == before


def test_a_signal_during_the_last_save_ends_before_the_report(tmp_path, monkeypatch):
    whole = train.write_checkpoint

    def hit(folder: Path, *given: Any) -> None:
        whole(folder, *given)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "write_checkpoint", hit)
    monkeypatch.setattr(train, "finish", lambda *_: pytest.fail("the report was begun"))
    with pytest.raises(SystemExit) as left:
        run(tmp_path, "--steps", "1")
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in train.checkpoints(tmp_path)] == ["step_000001"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (train.Standstill("step 4: not finite"), "train.py: step 4: not finite"),
        (OSError("no space"), "train.py: no space"),
        (RuntimeError("gloo: connection closed"), 143),
        (RuntimeError("DataLoader worker (pid 1) is killed"), 143),
    ],
)
def test_after_a_signal_only_the_leaving_of_others_is_silent(error, words, monkeypatch):
    monkeypatch.setattr(train.STOP, "number", signal.SIGTERM)
    assert train.last_words(error) == words


def test_an_error_without_words_is_an_error():
    with pytest.raises(train.Standstill, match="OSError"):
        train.on_main(lambda: (_ for _ in ()).throw(OSError()))


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
@pytest.mark.parametrize("number", packing.STOPPING)
@pytest.mark.parametrize("launch", ["python", "torchrun"])
def test_a_signal_saves_once_and_the_run_goes_on(launch, number, tmp_path):
    """Sent to the whole group, with workers: they must not die before the step is saved."""
    flags = ("--steps", "4000", "--save-every", "4000", "--workers", "2")
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path), *flags]
    if launch == "torchrun":
        line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)  # fmt: skip
    wait_for_step(tmp_path, 5)
    began = time.monotonic()
    os.killpg(process.pid, number)
    code, text = finished(process)
    assert time.monotonic() - began < 20, "torchrun kills what does not leave"
    assert code == (1 if launch == "torchrun" else train.EXIT_SIGNALLED + number), text
    assert text.count("told to stop") == 1
    assert launch == "torchrun" or "Traceback" not in text
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no worker is left
    assert len(train.checkpoints(tmp_path)) == 1
    step = train.read_state(train.checkpoints(tmp_path)[0])["step"]
    assert rows_of(tmp_path)[-1]["step"] == step


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_one_line(tmp_path):
    make_pictures(tmp_path / "pictures", good=24, bad=0)
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path / "out"), "--stats-steps",
            "99999", "--data", "openmoji:train:2000"]  # fmt: skip
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "out" / "lock").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, text = finished(process)
    lines = [x for x in text.splitlines() if "step," not in x]  # no lines of the bar
    assert code == 128 + signal.SIGTERM and len(lines) == 1 and "told to stop" in lines[0], text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    line = [sys.executable, "train.py", *QUICK, "--out", str(tmp_path), "--steps", "4000",
            "--save-every", "4000", "--workers", "3"]  # fmt: skip
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wait_for_step(tmp_path, 2)
    workers = children_of(process.pid)
    assert len(workers) == 3
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(map(is_alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))


@pytest.mark.slow
def test_spawned_workers_load_what_the_run_itself_does(tmp_path, reference):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport multiprocessing, train\n"
    code += "train.finish = lambda *_: None\n"
    code += "if __name__ == '__main__':\n    multiprocessing.set_start_method('spawn')\n"
    code += f"    train.main({[*QUICK, '--out', str(tmp_path / 'out'), '--workers', '2']!r})\n"
    (tmp_path / "spawned.py").write_text(code)
    done = subprocess.run([sys.executable, str(tmp_path / "spawned.py")], capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert totals(rows_of(tmp_path / "out")) == totals(rows_of(reference))


@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(tmp_path):
    code, text = finished(command(tmp_path / "out", "--teachers", "a=/no/such.pt", processes=2))
    assert code != 0
    assert text.count("train.py: ") == 1, text


def soak(out: Path, steps: int, hits: int, latest: float, seed: int = 0) -> int:
    """A run of two processes with two workers each, hit again and again and started again.

    Each hit comes at a random moment up to `latest` seconds after the start, also before step 1.
    Returns: how many hits met the run before its end.
    """
    flags = ("--steps", str(steps), "--save-every", "20", "--workers", "2")
    code, text = finished(command(out / "whole", *flags, processes=2), 1200)
    assert code == 0, text
    rng, met = random.Random(seed), 0
    for hit in range(hits + 1):
        process = command(out / "hit", *flags, processes=2, start_new_session=True)
        if hit < hits:
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(2, latest))
            number = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL][hit % 3]
            met += process.poll() is None
            with suppress(ProcessLookupError):  # kill -9 of the launcher alone, or of its group
                (os.kill if hit % 2 else os.killpg)(process.pid, number)
        code, text = finished(process, 1200)
        assert "Traceback" not in text.split("torch/distributed/elastic")[0], text
    assert code == 0, text
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert totals(rows_of(out / "hit")) == totals(rows_of(out / "whole"))
    assert_same_end(out / "hit", out / "whole")
    names = [sorted(tree(out / name)) for name in ("hit", "whole")]
    assert names[0] == names[1]
    assert [path.name for path in sorted(out.iterdir())] == ["hit", "whole"]
    return met


@pytest.mark.slow
def test_a_run_that_is_hit_again_and_again_ends_as_if_nothing_had_been(tmp_path):
    """The short form of `tests/bench.py soak`."""
    # the last checkpoints, which are compared by name, must come after the last hit
    assert soak(tmp_path, steps=300, hits=2, latest=9) == 2


@pytest.mark.slow
def test_kill_9_and_rerun_equal_an_uninterrupted_run(tmp_path):
    flags = ("--steps", "60", "--save-every", "5")
    code, text = finished(command(tmp_path / "whole", *flags, processes=2))
    assert code == 0, text
    process = command(tmp_path / "cut", *flags, processes=2)
    wait_for_step(tmp_path / "cut", 12)
    process.kill()
    process.communicate()
    time.sleep(3)  # the ranks see that their launcher is gone and leave
    assert len(rows_of(tmp_path / "cut")) < 60, "the kill came after the end"
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
import packing
import train
def stage(until, low):
    high = train.Stream("high", 96, budget=96, packs=4, teachers=("dense",))
    return train.Stage(until, (train.Stream("low", low, budget=96), high))
cfg = dataclasses.replace(
    train.PRESETS["debug"], stages=(stage(0.5, 48), stage(1.0, 64)), average="partition", steps=20,
    precision="fp32",
    data=("openmoji:train:2000",), stats_steps=2, log_every=1, threads=1, out=sys.argv[1], ema=0.9,
    parallel=sys.argv[2], relation_mean="teacher",  # over its own, near 0 at first, rounding grows
)
train.finish = lambda *_: None
train.run(cfg)
"""


@pytest.mark.slow
def test_partitions_of_two_processes_equal_one(tmp_path):
    """MoE, ARKD, PHI-S and two streams: rank 0 has the low one and a part of the high one.

    In the middle a second stage begins, at which copied and sharded heads are carried over. Among
    few pictures one is in both streams of a step: its pairs lie at equal distances, and where that
    is ARKD's median, rounding decides which of them is near.
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
                                  ("--optimizer", "muon"), ("--precision", "bf16")])  # fmt: skip
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
trained = test_train.train_for(test_train.DEBUG, 1).state
out, rng, first = Path(sys.argv[1]), random.Random(0), 1
cfg = train.parse_args(["--preset", "debug", "--out", str(out)])
unfinished = 0
for attempt in range(20):
    child = os.fork()
    if child == 0:
        for step in itertools.count(first):
            saved = {{"step": step, **train.state_dict(trained)}}
            train.write_checkpoint(out / f"step_{{step:06d}}", trained, saved)
    time.sleep(rng.uniform(0.1, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    unfinished += any(out.glob("*.tmp"))
    newest = train.find_start(cfg, {{}})
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
    assert train.broken(train.checkpoints(tmp_path)[-1]) is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux' /proc")
def test_a_restart_by_torchrun_goes_on_where_the_killed_run_was(tmp_path):
    flags = ("--steps", "60", "--save-every", "5")
    code, text = finished(command(tmp_path / "whole", *flags, processes=2))
    assert code == 0, text
    process = command(tmp_path / "cut", *flags, processes=2, torchrun=("--max-restarts=1",))
    wait_for_step(tmp_path / "cut", 12)
    os.kill(children_of(process.pid)[1], signal.SIGKILL)
    assert len(rows_of(tmp_path / "cut")) < 60, "the kill came after the end"
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
    monkeypatch.setattr(train, "open_sources", lambda *_: pytest.fail("work before the check"))
    with pytest.raises(SystemExit, match="file"):
        run(tmp_path / "file" / "out")


# ------------------------------------------------------------- pictures as people have them


def test_lost_shards_and_pictures_count_and_harmless_files_do_not(tmp_path, capsys):
    make_pictures(tmp_path / "pictures", good=40, bad=0)
    for i in range(10):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            for k in range(4):
                tar.add(tmp_path / "pictures" / f"{4 * i + k:03d}.jpg", f"{k}.jpg")
    for i in range(2):
        (tmp_path / f"{i}.tar").write_text("<html>")
    config = dataclasses.replace(DEBUG, data=(str(tmp_path / "*.tar"),))
    sources, _ = train.open_sources(config)
    with pytest.raises(train.Standstill, match="8 of 40 pictures could not be read"):
        train.note_scan(config, sources)
    train.note_scan(dataclasses.replace(config, max_bad_frac=0.2), sources)
    for i in range(30):
        (tmp_path / "pictures" / f"._{i:03d}.jpg").write_bytes(b"\0\5\x16\7")
    folder = dataclasses.replace(config, data=(str(tmp_path / "pictures"),) * 2)
    sources, held_out = train.open_sources(folder)
    capsys.readouterr()
    train.note_scan(folder, sources)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("skipped 30 files: ._000.jpg, ")
    assert f"scores pictures of {folder.data[0]}, the first" in lines[1]
    assert held_out.source is sources[0].source


def test_held_out_0_trains_on_all(tmp_path):
    make_pictures(tmp_path / "pictures", good=12, bad=0)
    data = (str(tmp_path / "pictures"),)
    config = dataclasses.replace(DEBUG, data=data, held_out=0.0)
    (source,), held_out = train.open_sources(config)
    assert len(source) == 12 and len(held_out) == 0


def test_with_cached_features_no_picture_leaves_the_loader(tmp_path):
    cfg = dataclasses.replace(DEBUG, data=("openmoji:train:24",))
    live = [train.load_teacher(train.parse_teacher(text)) for text in cfg.teachers]
    cached = [train.CachedTeacher(teacher, tmp_path) for teacher in live]
    sources, _ = train.open_sources(cfg)
    for teachers, seen in ((cached, 0), (live, 2)):
        (data,) = train.make_stages(cfg, sources, MODELS["test"], CPU, teachers)
        pixels = [s.image.size for batch in data[0] for s in batch.samples]
        assert max(pixels) == 0
        assert {len(batch.pixels) for batch in data[0]} == {seen}


@pytest.mark.slow
@pytest.mark.full_report
def test_a_phones_folder_trains_and_says_what_it_left_out(tmp_path, capsys):
    root = tmp_path / "DCIM"
    make_pictures(root, good=48, bad=0)
    for i, path in enumerate(sorted(root.glob("*.jpg"))):
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        Image.open(path).save(root / f"IMG_{i:04d}.JPG", quality=90, exif=exif)
        path.unlink()
        (root / f"._IMG_{i:04d}.JPG").write_bytes(b"\0\5\x16\7" + bytes(90))
        if i % 4 == 0:
            (root / f"IMG_{i:04d}.MOV").write_bytes(b"\0\0\0\x14ftypqt  ")
            (root / f"IMG_{i:04d} copy.JPG").write_bytes((root / f"IMG_{i:04d}.JPG").read_bytes())
    for i in range(20):
        (root / f"IMG_9{i:03d}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    run(tmp_path / "out", "--data", str(root), "--cache", str(tmp_path / "features"))
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped")]
    formats = "a format that we don't read: convert it to JPEG"  # HEIC and films
    reasons = ("left by a computer or a tool, no picture", formats)
    for count, why in zip((48, 32), reasons, strict=True):
        assert [x for x in lines if x.startswith(f"skipped {count} files: ") and x.endswith(why)]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["skipped"]) == 80 and summary["scored"] == str(root)
    assert summary["report"]["fidelity"]
    sides = [{side.load(i).digest for i in range(len(side))} for side in packing.hold_out(
        packing.open_source(str(root)), 0.15)]  # fmt: skip
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 48


@pytest.mark.slow
def test_ranks_scan_their_part_of_the_shards(tmp_path):
    make_pictures(tmp_path / "pictures", good=12, bad=0)
    for i in range(4):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as tar:
            for k in range(3):
                tar.add(tmp_path / "pictures" / f"{3 * i + k:03d}.jpg", f"{3 * i + k}.jpg")
    script = tmp_path / "scan.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import packing\n"
        "group, real = packing.setup_distributed(60), packing._tar_members\n"
        "def members(path, root):\n"
        "    print(f'rank {group.rank} reads {path.name};', flush=True)\n"
        "    return real(path, root)\n"
        "packing._tar_members = members\n"
        f"source = packing.open_source({str(tmp_path / '*.tar')!r})\n"
        "print(f'rank {group.rank} has {len(source)} {source.fingerprint()};', flush=True)\n"
        "packing.dist.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, env=env,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = sorted(x.strip() for x in done.stdout.replace("\n", "").split(";") if x.strip())
    assert [x for x in said if "reads" in x] == [
        f"rank {i % 2} reads {i}.tar" for i in (0, 2, 1, 3)
    ]
    assert len({x.split(" has ")[1] for x in said if " has 12 " in x}) == 1
