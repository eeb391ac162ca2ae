"""What only a CUDA device can show, in one go: `pytest -m gpu`, some minutes on one GPU.

Most of it also runs, in a process for each test, on the emulated device (tests/emulated_cuda.py):
that knows whether a test is written right, and what holds of devices, dtypes and waits. A torch
without an API that the project uses skips what needs it, by name.
"""

import copy
import dataclasses
import importlib
import json
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import emulated_cuda
import pytest
import torch
from test_train import Run, train_for
from torch import Tensor

import eval as evaluation
import losses
import model
import train
from model import (
    MODELS,
    Layout,
    ModelConfig,
    MoE,
    RadioSpec,
    Student,
    attention,
    load_student,
    merge_tokens,
    save_student,
)
from packing import Group, PackedBatch, setup_distributed
from sampling import Rows, kmeans
from train import PRESETS, TrainConfig

ROOT = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
IS_EMULATED = emulated_cuda.IS_ON
QUICK = ["--preset", "debug", "--steps", "6", "--save-every", "2", "--log-every", "1",
         "--data", "openmoji:train:24", "--stats-steps", "1", "--threads", "1"]  # fmt: skip
RADIO = ModelConfig(  # the demo's size
    "radio", 192, 6, 3, 64, 768, position_grid=16, cls_tokens=2, gated_ffn=False, final_norm=False
)
TINY = {
    "amoe": MODELS["test"],
    "radio": dataclasses.replace(
        RADIO, dim=48, n_layers=2, n_heads=2, head_dim=16, ffn_dim=64,
        heads=(RadioSpec("a", 24, 24, hidden=32), RadioSpec("b", 32, 32, token=1)),
    ),
}  # fmt: skip
both_forms = pytest.mark.parametrize("form", ["amoe", "radio"])

# ---- The device, and what this torch has

APIS = ("torch.nn.attention.varlen.varlen_attn", "torch.nn.functional.grouped_mm",
        "torch.distributed.fsdp.fully_shard")  # fmt: skip


def is_missing(api: str) -> bool:
    module, _, name = api.rpartition(".")
    try:
        return not hasattr(importlib.import_module(module), name)
    except ImportError:
        return True


MISSING = [api for api in APIS if is_missing(api)]
AGNOSTIC: list[str] = []  # tests that the emulated device runs, too


def on_gpu(*apis: str, really: bool = False) -> Callable:
    """Mark a test as the device's: one that needs these `APIS`, and perhaps a real GPU."""
    lacking = [api for api in MISSING if api.rpartition(".")[2] in apis]
    reason = f"torch {torch.__version__} lacks {', '.join(lacking)}" if lacking else ""
    if not torch.cuda.is_available():
        reason = "no CUDA device"
    elif really and IS_EMULATED:
        reason = "needs a real GPU"

    def mark(test: Callable) -> Callable:
        if not really:
            AGNOSTIC.append(test.__name__)
        return pytest.mark.gpu(pytest.mark.skipif(bool(reason), reason=reason)(test))

    return mark


ATTEND, STUDENT = "varlen_attn", ("varlen_attn", "grouped_mm")


@pytest.fixture(autouse=True)
def fresh_start():
    """A seed, and nothing left of a run with --deterministic."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def apart(ours: Tensor, right: Tensor) -> float:
    """Largest difference as a share of the largest right value."""
    ours, right = ours.detach().cpu().double(), right.detach().cpu().double()
    return float((ours - right).abs().max() / right.abs().max().clamp(min=1e-30))


def far(ours: Tensor, right: Tensor) -> float:
    """Length of the difference over that of the right: a few tokens may choose other experts."""
    ours, right = ours.detach().cpu().double(), right.detach().cpu().double()
    return float((ours - right).norm() / right.norm().clamp(min=1e-30))


@on_gpu()
def test_the_device_is_named(capsys):
    """And the versions, as every number of such a run belongs to them."""
    name, major = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    lacks = f", which lacks {', '.join(MISSING)}" if MISSING else ""
    with capsys.disabled():
        print(f"\n{name}, compute {major}, torch {torch.__version__}{lacks}")
    assert torch.ones(3, device="cuda").sum().item() == 3


# ---- Attention


LENGTHS = [1, 5, 261, 2309]


@cache
def right_attention(width: int, has_sinks: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs q, k, v (and sinks) and an output's gradient, which bfloat16 and float16 hold both,
    with the softmax's output and gradients in float64, one image after the other."""
    half = torch.randn(4, sum(LENGTHS), 2, width).to(torch.bfloat16).to(torch.float16).to(CUDA)
    sinks = [torch.tensor([3.0, -1.0], device=CUDA)] if has_sinks else []
    inputs = [x.double().requires_grad_() for x in (*half[:3], *sinks)]
    outs = []
    for q, k, v in zip(*(x.split(LENGTHS) for x in inputs[:3]), strict=True):
        logits_HNN = torch.einsum("nha,mha->hnm", q, k) / width**0.5
        for sinks_H in inputs[3:]:
            sinks_HN1 = sinks_H[:, None, None].expand(-1, len(q), 1)
            logits_HNN = torch.cat([logits_HNN, sinks_HN1], dim=-1)
        weights_HNN = logits_HNN.softmax(-1)[..., : len(q)]
        outs.append(torch.einsum("hnm,mha->nha", weights_HNN, v))
    out, grad = torch.cat(outs), half[3].double()
    return [*inputs, grad], out.detach(), list(torch.autograd.grad(out, inputs, grad))


@on_gpu(ATTEND)
@pytest.mark.parametrize("has_sinks", [True, False], ids=["sinks", "plain"])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("auto", torch.float32, 5e-5), ("auto", torch.bfloat16, 2e-2), ("auto", torch.float16, 3e-3),
     ("explicit", torch.float32, 5e-5)],
)  # fmt: skip
def test_attention_against_float64(backend, dtype, tolerance, width, has_sinks):
    """Outputs and all gradients, images of 1, 5, 261 and 2309 tokens in one pack."""
    layout = Layout.of([(1, 1), (1, 5), (9, 29), (1, 2309)], 0, CUDA)
    assert layout.lengths == LENGTHS
    (*inputs, grad), expected, right_grads = right_attention(width, has_sinks)
    ours = [x.detach().to(dtype).requires_grad_() for x in inputs]
    sinks = ours[3].detach().float().requires_grad_() if has_sinks else None
    got = attention(*ours[:3], layout, sinks, backend)
    assert got.dtype == dtype
    assert apart(got, expected) < tolerance
    wanted = [*ours[:3], *([sinks] if has_sinks else [])]
    grads = torch.autograd.grad(got, wanted, grad.to(dtype))
    for name, x, y in zip("qkvs", grads, right_grads, strict=False):
        assert apart(x, y) < tolerance, name


@on_gpu(*STUDENT)
@both_forms
def test_one_dtype_reaches_attention_under_autocast(form, monkeypatch):
    """CUDA's autocast has another table than the CPU's: it computes norms in float32."""
    seen, real = [], model.attention

    def spy(q, k, v, *rest):
        seen.append({q.dtype, k.dtype, v.dtype})
        return real(q, k, v, *rest)

    monkeypatch.setattr(model, "attention", spy)
    student, batch = lively(TINY[form]).to(CUDA), some_pack().to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        out = student(batch)
    total(out).backward()
    assert seen == [{torch.bfloat16}] * len(student.blocks)
    assert all(p.grad is not None for p in student.parameters())


@on_gpu()
def test_angles_are_float32_under_autocast():
    positions, grids = Student(MODELS["test"]).positions, [(48, 48)]
    right = positions(torch.zeros(2304, 48), Layout.of(grids, 5, CPU), None)[1]
    layout, patches = Layout.of(grids, 5, CUDA), torch.zeros(2304, 48, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        ours = positions.to(CUDA)(patches, layout, None)[1]
    for x, y in zip(ours, right, strict=True):
        assert x.dtype == torch.float32
        assert float((x.cpu() - y).abs().max()) < 1e-5


# ---- The student


def lively(config: ModelConfig) -> Student:
    """Weights that leave no part without effect (a fresh student's blocks do nothing)."""
    student = Student(config)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return student


def some_pack() -> PackedBatch:
    return PackedBatch.from_images([torch.rand(3, 16 * h, 16 * w) for h, w in
                                    [(4, 5), (1, 1), (3, 7), (6, 6), (2, 2)]], 16)  # fmt: skip


def outputs(out: model.StudentOutput) -> dict[str, Tensor]:
    """Everything that a student says, by name."""
    parts = {"trunk": out.trunk_MD, "trunk summary": out.trunk_summary_BD}
    for part in ("summary", "patches", "registers"):
        parts |= {f"{part} {name}": x for name, x in getattr(out, part).items()}
    return parts


def total(out: model.StudentOutput) -> Tensor:
    return torch.stack([x.float().square().mean() for x in outputs(out).values()]).sum()


@on_gpu(*STUDENT)
@both_forms
@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["32", "16"]
)
def test_forward_and_backward_against_cpu(form, precision, tolerance):
    """All outputs and all gradients."""
    right, batch = lively(TINY[form]), some_pack()
    ours = Student(TINY[form])
    ours.load_state_dict(right.state_dict())
    ours = ours.to(CUDA)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == torch.bfloat16):
        got = ours(batch.to(CUDA))
    expected = right(batch)
    total(got).backward()
    total(expected).backward()
    for name, x in outputs(expected).items():
        assert far(outputs(got)[name], x) < tolerance, name
    theirs = dict(right.named_parameters())
    for name, parameter in ours.named_parameters():
        assert far(parameter.grad, theirs[name].grad) < tolerance, name


@on_gpu("grouped_mm")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["32", "16"]
)
def test_grouped_experts_against_the_definition(dtype, tolerance):
    """28 experts, top 6, one of them without a token; float64 on all experts is right."""
    config = dataclasses.replace(MODELS["amoe-0.3b"], dim=64, ffn_dim=32, heads=(), n_layers=1)
    right = MoE(config)
    for parameter in right.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    right.expert_bias[3] = -9.0
    ours = MoE(config)
    ours.load_state_dict(right.state_dict())
    ours, right = ours.to(CUDA), right.double()
    ours.backend, right.backend = "grouped", "dense"
    x, grad = torch.randn(2, 300, 64).to(dtype).float()
    inputs = x.to(CUDA).requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got, counts_E = ours(inputs[0])
    expected, right_counts_E = right(inputs[1])
    assert counts_E.tolist() == right_counts_E.tolist() and counts_E[3].item() == 0
    assert far(got, expected) < tolerance
    got.backward(grad.to(CUDA, got.dtype))
    expected.backward(grad.double())
    assert far(inputs[0].grad, inputs[1].grad) < tolerance
    for (name, p), q in zip(ours.named_parameters(), right.parameters(), strict=True):
        assert far(p.grad, q.grad) < tolerance, name
    assert not ours.w1_EGD.grad[3].any().item()


@on_gpu(*STUDENT)
@both_forms
def test_recompute_changes_no_gradient(form):
    student, batch, grads = lively(TINY[form]).to(CUDA), some_pack().to(CUDA), []
    for student.recompute in (False, True):
        student.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            out = student(batch)
        total(out).backward()
        grads.append([p.grad.clone() for p in student.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert far(again, plain) < 1e-2  # sums by atomic additions differ from run to run


@on_gpu(*STUDENT)
def test_encode_against_cpu():
    """The shipped student from its file, pictures of several sizes, merged tokens."""
    images = [torch.rand(3, h, w) for h, w in ((64, 48), (80, 80), (224, 160), (16, 16))]
    ours, right = (
        load_student(ROOT / "docs" / "student.pt", device=d).encode(images, keep=1)
        for d in ("cuda", "cpu")
    )
    for x, y in zip(ours, right, strict=True):
        assert x.patches.keys() == y.patches.keys() and x.summary.keys() == y.summary.keys()
        for part in ("patches", "summary"):
            for name, values in getattr(y, part).items():
                got = getattr(x, part)[name]
                assert got.dtype == torch.float32
                assert far(got, values) < 5e-2, name
        assert x.tokens.shape == y.tokens.shape


# ---- Training


def train_on(device: torch.device, cfg: TrainConfig, steps: int = 3, ready=None, **more) -> Run:
    """A run of so many steps of train.py.

    Its teachers are in float32 on any device: in bfloat16 their features differ by some percent.
    """
    group, (sources, held_out) = Group(0, 1, device), train.open_sources(cfg)
    exact = dataclasses.replace(cfg, precision="fp32")
    teachers = train.load_teachers(exact, group)
    train.fill(exact, teachers, [*sources, held_out])
    more |= {"sources": sources, "group": group, "keeps": False}
    return train_for(cfg, steps, ready or awake, teachers, **more)


def awake(state: train.State) -> None:
    """A fresh student's blocks are the identity: others."""
    for parameter in (p for p in state.student.blocks.parameters() if p.requires_grad):
        drawn = 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        parameter.data.copy_(train.spread(drawn, parameter.data))


def step_losses(cfg: TrainConfig, device: torch.device) -> list[dict]:
    return losses_of(train_on(device, cfg))


def losses_of(run: Run) -> list[dict]:
    return [{"total": report.total, **report.losses} for report in run.reports]


def the_form(form: str, monkeypatch) -> None:
    if form == "radio":
        monkeypatch.setitem(MODELS, "nano", RADIO)
        monkeypatch.setitem(MODELS, "test", TINY["radio"])


@on_gpu(*STUDENT)
@both_forms
def test_the_default_presets_steps_give_the_losses_of_cpu(form, monkeypatch, tmp_path):
    """Three steps of the demo in bf16 against float32 on CPU, from the same teachers' features."""
    the_form(form, monkeypatch)
    cfg = dataclasses.replace(
        PRESETS["demo"], data=("openmoji:train:64",), cache=str(tmp_path), stats_steps=1
    )
    right, ours = step_losses(cfg, CPU), step_losses(cfg, CUDA)
    for step, (x, y) in enumerate(zip(ours, right, strict=True), start=1):
        assert x.keys() == y.keys()
        for name in y:
            assert x[name] == pytest.approx(y[name], rel=1e-3, abs=1e-3), (step, name)


@on_gpu(*STUDENT)
@both_forms
def test_float32_steps_are_those_of_cpu(form, monkeypatch):
    the_form(form, monkeypatch)
    cfg = dataclasses.replace(PRESETS["debug"], precision="fp32")
    for x, y in zip(step_losses(cfg, CUDA), step_losses(cfg, CPU), strict=True):
        for name in y:
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-6), name


@contextmanager
def host_waits() -> Iterator[list[str]]:
    """What made the host wait for the device inside the block, one entry for each time."""
    waits: list[str] = []
    if IS_EMULATED:
        with emulated_cuda.watch() as counter:
            yield waits
        waits += [f"{what} at {place}" for (what, place), n in counter.items() for _ in range(n)]
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


@on_gpu(*STUDENT)
@both_forms
def test_a_step_waits_for_the_device_once(form, monkeypatch):
    """For its report. 1 is the ceiling of a step that is not logged, 2 of one that is."""
    the_form(form, monkeypatch)
    waits: list[list[str]] = []
    with ExitStack() as stack:

        def after(report: train.StepReport) -> None:
            if report.step == 2:  # what is made once is: the optimizer's state, constants
                waits.append(stack.enter_context(host_waits()))
            elif report.step == 3:
                stack.close()

        train_on(CUDA, PRESETS["debug"], after=after)
    assert len(waits[0]) <= 1, "\n".join(waits[0])


@on_gpu(*STUDENT)
def test_a_crashed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    for name in ("finish", "draw_curves"):
        monkeypatch.setattr(train, name, lambda *_: None)
    flags = [*QUICK, "--deterministic"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    settle = train.settle

    def crash(job, state, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        return settle(job, state, step, *rest)

    crashed = [*flags, "--out", str(tmp_path / "crashed")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "settle", crash)
        train.main(crashed)
    assert not (tmp_path / "crashed" / "step_000006").exists()
    train.main(crashed)
    assert rows(tmp_path / "crashed") == rows(tmp_path / "whole")


def rows(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without what time decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "tokens_per_s" not in k} for line in lines]


@on_gpu(*STUDENT)
def test_the_debug_preset_whole(tmp_path, capsys):
    """The real command up to its report: the losses fall, every file is there."""
    train.main(["--preset", "debug", "--out", str(tmp_path), "--threads", "1"])
    lines = rows(tmp_path)
    assert lines[-1]["step"] == 40 and lines[-1]["loss/total"] < lines[0]["loss/total"]
    for name in ("curves.png", "pca.png", "summary.json", "step_000040/model.pt"):
        assert (tmp_path / name).stat().st_size > 1000, name
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["device"].startswith("cuda")
    assert "summary.json" in capsys.readouterr().out


# ---- What goes with it


TASKS = {"knn": [], "linear": [], "zero-shot": ["--text", "builtin:minilm"],
         "retrieval": ["--text", "builtin:minilm"], "segmentation": ["--foreground"], "merging": [],
         "resolution": ["--sizes", "48", "64", "--teacher", "a=builtin:tiny-dense"],
         "pca": [], "features": []}  # fmt: skip


@on_gpu(*STUDENT)
@pytest.mark.parametrize("task", TASKS)
def test_evaluation_tasks_score_as_on_cpu(task, tmp_path, capsys):
    """The shipped student in bf16; one of 30 pictures may fall on the other side."""
    student = ROOT / "docs" / "student.pt"
    if task == "resolution":  # needs a head of a teacher that is here
        student = tmp_path / "tiny.pt"
        save_student(Student(MODELS["test"]), student)
    given = ["--student", str(student), "--no-controls", "--size", "64",
             "--train", "openmoji:train:150", "--test", "openmoji:test:30"]  # fmt: skip
    given += TASKS[task]
    scores = []
    for device in ("cuda", "cpu"):
        out = tmp_path / f"{device}.png" if task in ("pca", "resolution") else tmp_path / device
        evaluation.main([task, *given, "--device", device, "--out", str(out)])
        scores.append(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"])
        assert out.exists() == (task in ("pca", "features"))
    for name, row in scores[1].items():
        if task not in ("pca", "features"):
            assert scores[0][name]["value"] == pytest.approx(row["value"], abs=0.05, rel=0.05), name


@on_gpu()
def test_kmeans_finds_what_it_finds_on_cpu():
    """Every distance is that to the nearest of the centroids; the inertia is as low as CPU's."""
    x_ND = torch.randn(4000, 32) + 4 * torch.randn(40, 32).repeat(100, 1)
    results = []
    for device in (CUDA, CPU):
        share = Rows.share(x_ND, Group(0, 1, device))
        c_KD, found = kmeans(share, 40, torch.Generator().manual_seed(1))
        distance_NK = torch.cdist(x_ND.double(), c_KD.cpu().double()).square()
        assert apart(found.distance_N, distance_NK.amin(1)) < 1e-3
        results.append(found.inertia)
    assert results[0] == pytest.approx(results[1], rel=2e-2)


@on_gpu()
@pytest.mark.parametrize("keep", [1, 12, 100, 144])
def test_token_merging_is_that_of_cpu(keep):
    tokens_ND = torch.randn(144, 32)
    ours, index_N = merge_tokens(tokens_ND.to(CUDA), (12, 12), keep)
    right, right_index_N = merge_tokens(tokens_ND, (12, 12), keep)
    assert index_N.tolist() == right_index_N.tolist()
    assert apart(ours, right) < 1e-5


@on_gpu()
def test_phi_s_of_1152_channels():
    """Unit variance in every channel from a spectrum over four decades, and back again."""
    spectrum_C = torch.logspace(0, -4, 1152)
    basis_CC = torch.linalg.qr(torch.randn(1152, 1152)).Q
    x_NC = torch.randn(4608, 1152) * spectrum_C @ basis_CC + 3
    norm = losses.PhiS(1152).to(CUDA)
    norm.update(x_NC.to(CUDA))
    norm.synchronize()
    y_NC = norm.normalize(x_NC.to(CUDA))
    variance_C = y_NC.cpu().double().var(0, correction=0)
    assert float((variance_C - 1).abs().max()) < 1e-3
    assert float(y_NC.cpu().double().mean(0).abs().max()) < 1e-3
    assert apart(norm.denormalize(y_NC), x_NC) < 1e-5
    scale = norm.current().scale.item()
    assert scale**2 == pytest.approx(float(x_NC.double().var(0, correction=0).mean()), rel=1e-6)


@on_gpu(*STUDENT)
def test_every_row_of_the_bench_runs(capsys):
    """`python tests/bench.py gpu`, small: what is compared says the same."""
    import bench_gpu

    small = bench_gpu.Scale(
        dataclasses.replace(MODELS["amoe-0.3b"], dim=64, n_layers=1, n_heads=2, head_dim=16,
                            ffn_dim=32, heads=()),
        copies=1, rows=512, clusters=64, matmul=64, repeats=1,
    )  # fmt: skip
    rows = list(bench_gpu.rows(small))
    assert len(rows) == 14 and all(row.ours >= 0 for row in rows)
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


# ---- A real GPU only


@on_gpu(*STUDENT, really=True)
def test_compiled_blocks_train_alike():
    """Triton's kernels round elsewhere: 1e-2 in bf16."""
    plain = PRESETS["debug"]
    compiled = dataclasses.replace(plain, compile=True)
    for x, y in zip(step_losses(compiled, CUDA), step_losses(plain, CUDA), strict=True):
        assert x["total"] == pytest.approx(y["total"], rel=1e-2)


@on_gpu(*STUDENT, "fully_shard", really=True)
def test_one_process_of_nccl_trains_as_none(monkeypatch):
    check_sharded(CUDA, monkeypatch)


@pytest.mark.slow
def test_one_process_of_gloo_trains_as_none(monkeypatch):
    """The same check where there is no GPU."""
    check_sharded(CPU, monkeypatch)


def check_sharded(device: torch.device, monkeypatch) -> None:
    """FSDP2, LAMB, a running mean and clipping in a process group of one, saved and loaded."""
    cfg = dataclasses.replace(
        PRESETS["debug"], parallel="fsdp", optimizer="lamb", ema=0.9, clip=0.1
    )
    right = step_losses(cfg, device)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(train, "distribute", shard)
    setup_distributed(device=device.type)
    try:
        states, saved = [], []

        def ready(state: train.State) -> None:
            states.append(state)
            awake(state)

        def after(report: train.StepReport) -> None:
            if report.step == 3:
                saved.append(copy.deepcopy(train.state_dict(states[0])))

        def again(state: train.State) -> None:
            train.load_state(state, saved[0])
            for name, mean in state.average.items():
                assert torch.equal(train.whole(mean).cpu(), saved[0]["average"][name]), name

        run = train_on(device, cfg, 4, ready, after=after)
        *first, fourth = losses_of(run)
        for ours, losses_right in zip(first, right, strict=True):
            assert ours["total"] == pytest.approx(losses_right["total"], rel=1e-3)
        (other,) = losses_of(train_on(device, cfg, 1, again, packs=[run.stages[0][3]]))
        assert other["total"] == pytest.approx(fourth["total"], rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def shard(_cfg: TrainConfig, student: Student, _group: Group) -> Student:
    """`train.distribute` leaves a single process alone."""
    for block in student.blocks:
        train.fully_shard(block)
    return train.fully_shard(student)


@on_gpu(*STUDENT, really=True)
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_memory_of_the_large_student(recompute):
    """amoe-0.3b on four packs of AMoE: activations a token within what the docs' table says."""
    tokens, free = 4 * 2309, torch.cuda.mem_get_info()[0]
    if free < 30e9:
        pytest.skip(f"{free / 1e9:.0f} GB free, needs 30")
    student = Student(MODELS["amoe-0.3b"]).to(CUDA)
    student.recompute = recompute
    batch = PackedBatch.from_images([torch.rand(3, 256, 256)] * 36, 16).to(CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        out = student(batch)
    total(out).backward()
    gradients = sum(4 * p.numel() for p in student.parameters() if p.requires_grad)
    per_token = (torch.cuda.max_memory_allocated() - before - gradients) / tokens
    assert per_token < (0.5e6 if recompute else 1.7e6)


# ---- The same on the emulated device, where there is none


@pytest.fixture(scope="module")
def emulator() -> list[str]:
    """The command that runs tests on it; its guard is built once."""
    built = subprocess.run(
        [sys.executable, emulated_cuda.__file__], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(built.stderr.strip().splitlines()[-1])
    return [sys.executable, emulated_cuda.__file__, "-p", "no:cacheprovider", "-m", "gpu", "-rs"]


@pytest.mark.slow
@pytest.mark.parametrize("test", AGNOSTIC)
def test_on_the_emulated_device(test, emulator):
    command = [*emulator, f"{__file__}::{test}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-1000:]
