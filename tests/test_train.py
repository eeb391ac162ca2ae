"""The real command, with few steps: what a run leaves behind, how it resumes, what it refuses."""

import dataclasses
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from model import load_student
from packing import PackedBatch

ROOT = Path(__file__).parent.parent
QUICK = ["--preset", "debug", "--steps", "6", "--save-every", "2", "--log-every", "1",
         "--data", "openmoji:train:24", "--stats-steps", "1"]  # fmt: skip


@pytest.fixture(autouse=True)
def quick_report(monkeypatch, request):
    """Most tests are about the loop: the report at the end is drawn in one of them."""
    if "full_report" not in request.keywords:
        monkeypatch.setattr(train, "finish", lambda *_: None)


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
    for (name, part), norm in trainer.normalizers.parts.items():
        expected = norm.denormalize(getattr(normal, part)[name])
        torch.testing.assert_close(getattr(raw, part)[name], expected, rtol=1e-4, atol=1e-4)


def test_micro_batches_do_not_change_the_step(tmp_path, reference):
    rows = run(tmp_path, "--micro-packs", "1")
    for ours, theirs in zip(rows, rows_of(reference), strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)


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
                run(tmp_path)
    assert totals(run(tmp_path)) == totals(rows_of(reference))


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

    def poisoned(self, samples):
        out = whole(self, samples)
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


def wait_for_step(out: Path, step: int, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and len(rows_of(out)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{out} did not reach step {step}")
