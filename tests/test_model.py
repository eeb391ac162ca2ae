"""model.py: both released forms agree with their releases' numbers, and packing changes nothing."""

import argparse
import dataclasses
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NoWaiting
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import (
    MODELS,
    FixedGrid,
    HeadSpec,
    Layout,
    ModelConfig,
    Student,
    attention,
    count_parameters,
    load_student,
    merge_tokens,
    save_student,
    siglino_size,
    unmerge_tokens,
    with_heads,
)
from packing import PackedBatch

GOLDEN = Path(__file__).parent / "golden"
SIGLINO, RADIO = GOLDEN / "siglino_moe.pt", GOLDEN / "radio_b.pth.tar"
GRIDS = [(3, 5), (1, 1), (4, 4), (1, 7), (5, 3), (2, 2)]


def lively(config: ModelConfig, seed: int = 0) -> Student:
    """A student whose blocks are not the identity that they are at initialisation."""
    torch.manual_seed(seed)
    student = Student(config)
    for name, parameter in student.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return student


def radio_config(**changes) -> ModelConfig:
    heads = (
        HeadSpec("clip", 12, 20, kind="v2", hidden=16, inner=1, summary_hidden=24, upsample=2),
        HeadSpec("sam", 8, None, kind="v1", hidden=16, inner=1, token=1, in_trunk_summary=False),
        HeadSpec("dino", 8, 8, kind="v1", hidden=16, summary_inner=1, token=2),
    )
    fields = {
        "heads": heads,
        "cls_tokens": 3,
        "registers": 2,
        "gated_ffn": False,
        "final_norm": False,
    }
    return ModelConfig("radio", 32, 2, 2, 16, 64, position_grid=8, **fields | changes)


def images(grids, patch=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, h * patch, w * patch, generator=generator) for h, w in grids]


def pack(grids, patch=16) -> PackedBatch:
    return PackedBatch.from_images(images(grids, patch), patch)


def all_outputs(out) -> list[torch.Tensor]:
    parts = [out.trunk_summary_BD, out.trunk_MD]
    return parts + [x for part in (out.summary, out.patches, out.registers) for x in part.values()]


def loss_of(out) -> torch.Tensor:
    return sum(x.square().sum() for x in all_outputs(out))


def close(a, b, tolerance=1e-5):
    scale = b.abs().max().clamp(min=1e-9)
    assert (a - b).abs().max() <= tolerance * scale, (a - b).abs().max() / scale


# ------------------------------------------------------------------------------ released weights


def golden_cases(name):
    """Per image: the image, and name -> (summary, patches) as the release gave them."""
    if name == "siglino":
        for case in torch.load(SIGLINO, weights_only=True)["images"]:
            ours = {k.replace("siglino", "trunk"): v for k, v in case["patch_features"].items()}
            summary = {
                k.replace("siglino", "trunk"): v for k, v in case["summary_features"].items()
            }
            yield case["image"], {k: (summary[k], v) for k, v in ours.items()}
    else:
        for case in torch.load(GOLDEN / "radio_b_expected.pt", weights_only=True)["cases"]:
            yield (
                case["image"][0],
                {
                    k.replace("backbone", "trunk"): (case["summary"][k][0], v[0])
                    for k, v in case["features"].items()
                },
            )


@pytest.mark.parametrize(("name", "path"), [("siglino", SIGLINO), ("radio", RADIO)])
def test_golden(name, path):
    student, cases = load_student(path), list(golden_cases(name))
    alone = [student.encode([image])[0] for image, _ in cases]
    packed = student.encode([image for image, _ in reversed(cases)])[::-1]
    for features in (alone, packed):
        for found, (_, expected) in zip(features, cases, strict=True):
            for head, (summary, patches) in expected.items():
                close(found.summary[head], summary, 1e-5)
                close(found.patches[head].flatten(0, 1), patches, 1e-5)


def test_golden_frequencies_from_formula():
    stored = torch.load(SIGLINO, weights_only=True)["state_dict"]["freqs_cis_golden"]
    close(model.golden_frequencies(2, 8, 1.0, 20.0), stored, 1e-5)


def siglino_file(tmp_path, change=dict, **content):
    state = dict(torch.load(SIGLINO, weights_only=True)["state_dict"])
    change(state)
    torch.save({"state_dict": state, **content}, tmp_path / "file.pt")
    return tmp_path / "file.pt"


def test_siglino_top_k(tmp_path):
    assert load_student(SIGLINO).config.top_k == 2  # stated by the file's config
    assert load_student(siglino_file(tmp_path)).config.top_k == 6
    assert load_student(SIGLINO, top_k=3).config.top_k == 3
    with pytest.raises(ValueError, match="top_k=7"):
        load_student(SIGLINO, top_k=7)


def test_siglino_dense_weightless(tmp_path):
    def make_dense(state):
        for key in [k for k in state if "moe" in k or "attention_norm" in k or "ffn_norm" in k]:
            del state[key]
        for i in range(3):
            for w, shape in (("w1", (80, 48)), ("w2", (48, 80)), ("w3", (80, 48))):
                state[f"layers.{i}.feed_forward.{w}.weight"] = torch.randn(shape)

    student = load_student(siglino_file(tmp_path, make_dense))
    assert (student.config.experts, student.config.ffn_dim) == (0, 80)
    assert not student.config.norm_weight
    assert student(pack(GRIDS)).counts_LE is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.attention.wq.weight"), r"missing key layers\.1\.attention\.wq"),
        (lambda s: s.pop("norm.weight"), r"missing key norm\.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "unexpected key extra"),
        (lambda s: s.update({"norm.weight": torch.ones(47)}), r"norm\.weight \(47,\)"),
        (
            lambda s: s.update({"layers.1.moe.experts.w1": torch.ones(6, 31, 48)}),
            r"layers\.1\.moe\.experts\.w1 \(6, 31, 48\)",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_student(siglino_file(tmp_path, change))


def test_hostile_and_broken_files(tmp_path):
    path = tmp_path / "file.pt"
    path.write_bytes(SIGLINO.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="truncated"):
        load_student(path)
    path.write_bytes(pickle.dumps({"state_dict": Path("x")}))
    with pytest.raises(ValueError, match="refused"):
        load_student(path)
    torch.save({"args": argparse.Namespace(a=Path), "state_dict": {}}, path)
    with pytest.raises(ValueError, match="Path"):
        load_student(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="list"):
        load_student(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="neither"):
        load_student(path)


def test_radio_variants(tmp_path):
    """Keys by index, v1 MLPs, EMA, spectral weights, normaliser, LayerScale: the same network."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(RADIO, weights_only=True)
    state, image = content["state_dict"], images([(4, 6)])
    plain = load_student(RADIO).encode(image)[0]
    names = ["clip", "dino_v2", "sam"]
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] in ("_heads", "_feature_projections"):
            parts[1] = str(names.index(parts[1]))
        renamed[".".join(parts)] = value
    for i in range(2):
        for n in "12":
            renamed[f"base_model.blocks.{i}.ls{n}.grandma"] = torch.ones(64)
        for module, chunks in (("attn.qkv", 3), ("mlp.fc1", 1)):
            base = f"base_model.blocks.{i}.{module}.parametrizations.weight."
            weight = renamed.pop(f"base_model.blocks.{i}.{module}.weight")
            renamed[base + "original"] = 3 * weight
            for part, chunk in enumerate((3 * weight).chunk(chunks)):
                u, s, v = torch.linalg.svd(chunk, full_matrices=False)
                name = base + ("0." if chunks == 1 else f"0.{part}.")
                renamed[name + "scale"] = torch.log(torch.expm1(s[:1] / 3 - 0.05))[None]
                renamed[name + "_u"], renamed[name + "_v"] = u[:, 0], v[0]
                renamed[name + "_sn_version"] = torch.tensor(2)
    mean, tx = torch.randn(64), torch.randn(64, 64)
    renamed |= {"_feature_normalizer.mean": mean, "_feature_normalizer.tx": tx}
    torch.save({**content, "state_dict": {}, "state_dict_ema": renamed}, tmp_path / "r.pth.tar")
    found = load_student(tmp_path / "r.pth.tar").encode(image)[0]
    close(found.summary["trunk"], plain.summary["trunk"])
    close(found.summary["sam"], plain.summary["sam"])
    close(found.patches["trunk"], (plain.patches["trunk"] - mean) @ tx.T)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base_model.blocks", "base_model.inner.blocks", r"no timm ViT.*base_model\.inner\.blocks"),
        ("mlp.fc1", "mlp.w12", r"missing key base_model\.blocks\.0\.mlp\.fc1.*mlp\.w12"),
        ("_heads.sam.fc1", "_heads.sam.fc9", r"missing key _heads\.sam\.fc1"),
    ],
)
def test_unknown_radio_keys_are_named(tmp_path, old, new, message):
    """ViT-g's key names are not in the papers: refused, not guessed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(RADIO, weights_only=True)
    state = {key.replace(old, new): value for key, value in content["state_dict"].items()}
    torch.save({**content, "state_dict": dict(sorted(state.items()))}, tmp_path / "r.pth.tar")
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path / "r.pth.tar")


def test_radio_teacher_entries(tmp_path):
    """A teacher's second entry is passed over; a stated slot says which CLS token is read."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(RADIO, weights_only=True)
    plain = load_student(RADIO).encode(images([(2, 3)]))[0]
    clip, dino, sam = content["args"].teachers
    content["args"].teachers = [
        clip,
        dict(clip),
        {**dino, "token_slot": 1},
        {**sam, "token_slot": None},
    ]
    order, state = ("clip", "again", "dino_v2", "sam"), {}
    for key, value in content["state_dict"].items():
        part, name, *rest = key.split(".")
        by_index = part in ("_heads", "_feature_projections")
        state[".".join([part, str(order.index(name)) if by_index else name, *rest])] = value
    again = {
        key.replace(".0.", ".1.", 1): x for key, x in state.items() if key.startswith("_heads.0.")
    }
    torch.save({**content, "state_dict": state | again}, tmp_path / "r.pth.tar")
    found = load_student(tmp_path / "r.pth.tar").encode(images([(2, 3)]))[0]
    for name in plain.summary:
        close(found.summary[name], plain.summary[name])


def test_radio_v1_head(tmp_path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(RADIO, weights_only=True)
    state = {k: v for k, v in content["state_dict"].items() if not k.startswith("_heads.clip.")}
    layers = {
        "fc1": torch.nn.Linear(64, 40),
        "norm": torch.nn.LayerNorm(40),
        "inner": torch.nn.Sequential(
            torch.nn.Linear(40, 40), torch.nn.LayerNorm(40), torch.nn.ReLU()
        ),
        "fc2": torch.nn.Linear(40, 16),
    }
    reference = torch.nn.ModuleDict(layers)
    state |= {f"_heads.clip.{k}": v for k, v in reference.state_dict().items()}
    torch.save({**content, "state_dict": state}, tmp_path / "r.pth.tar")
    with pytest.raises(ValueError, match=r"_feature_projections\.clip"):  # one v1, one v2: refused
        load_student(tmp_path / "r.pth.tar")
    for key in [k for k in state if k.startswith("_feature_projections.clip.")]:
        del state[key]
    torch.save({**content, "state_dict": state}, tmp_path / "r.pth.tar")
    out = load_student(tmp_path / "r.pth.tar")(pack([(2, 3)]))
    x = F.relu(reference["norm"](reference["fc1"](out.trunk_summary_BD[:, :64])))
    close(out.summary["clip"], reference["fc2"](reference["inner"](x)))
    assert "clip" not in out.patches


def test_own_checkpoint_round_trip(tmp_path):
    for config in (MODELS["test"], radio_config()):
        student = lively(config)
        save_student(student, tmp_path / "s.pt")
        again = load_student(tmp_path / "s.pt")
        assert again.config == config
        for a, b in zip(
            all_outputs(student(pack(GRIDS))), all_outputs(again(pack(GRIDS))), strict=True
        ):
            assert torch.equal(a, b)
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    del content["state_dict"]["embed.weight"]
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"missing key embed\.weight"):
        load_student(tmp_path / "s.pt")


def test_a_file_of_half_the_size_answers_nearly_the_same(tmp_path):
    student = lively(MODELS["test"])
    for name in ("whole", "half"):
        save_student(student, tmp_path / name, half=name == "half")
    assert (tmp_path / "half").stat().st_size < 0.7 * (tmp_path / "whole").stat().st_size
    again = load_student(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert torch.equal(again.positions.freqs_HJ2, student.positions.freqs_HJ2)  # a buffer
    for name, p in student.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), p, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        student.embed.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"embed\.weight does not fit in float16"):
        save_student(student, tmp_path / "half", half=True)


# ------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "total", "trunk", "active"),
    [
        ("amoe-0.3b", 522.83, 503.54, 153.18),
        ("amoe-0.15b", 522.83, 503.54, 89.48),
        ("dense-0.6b", 493.30, 472.90, 472.90),
        ("dense-70m", 69.46, 50.73, 50.73),
        ("dense-30m", 47.07, 28.61, 28.61),
        ("radio-b", None, 98, 98),
        ("radio-l", None, 320, 320),
        ("radio-h", None, 652, 652),
        ("radio-g", None, 1160, 1160),
    ],
)
def test_parameter_counts(name, total, trunk, active):
    counts = {key: value / 1e6 for key, value in count_parameters(MODELS[name]).items()}
    tolerance = 0.011 if name[:5] != "radio" else 0.5
    assert total is None or abs(counts["total"] - total) < tolerance
    assert abs(counts["trunk"] - trunk) < tolerance
    assert abs(counts["active_trunk"] - active) < tolerance


def test_size_table_prints_every_model(capsys):
    model.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in MODELS)


def test_config_contradictions_name_both_values():
    with pytest.raises(ValueError, match=r"top_k=5.*experts=4"):
        dataclasses.replace(MODELS["test"], top_k=5)
    with pytest.raises(ValueError, match=r"summary_dim=5.*dim=4"):
        HeadSpec("x", 4, 5)


# ------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_packed_equals_alone(config):
    student = lively(config)
    out = student(pack(GRIDS))
    loss_of(out).backward()
    together = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    singles = [student(PackedBatch.from_images([image], 16)) for image in images(GRIDS)]
    torch.stack([loss_of(single) for single in singles]).sum().backward()
    for packed, *alone in zip(all_outputs(out), *map(all_outputs, singles), strict=True):
        close(packed, torch.cat(alone))
    for name, parameter in student.named_parameters():
        close(together[name], parameter.grad, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_packed_equals_alone_many_sizes(config):
    student = lively(config)
    grids = [(1, 1), (64, 64), (1, 64), (37, 11), (23, 50), (5, 2)]
    packed = student.encode(images(grids))
    for image, together in zip(images(grids), packed, strict=True):
        alone = student.encode([image])[0]
        for name in alone.patches:
            close(together.patches[name], alone.patches[name])


def test_empty_pack_trains():
    student = lively(MODELS["test"])
    out = student(PackedBatch.from_images([], 16))
    loss_of(out).backward()
    assert loss_of(out) == 0 and out.counts_LE.sum() == 0
    assert all(p.grad is not None for p in student.parameters()), "DDP would wait for it"


def test_radio_training_windows_are_random_and_reproducible():
    student, batch = lively(radio_config()), pack(GRIDS)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    outs = [student(batch, model.position_windows(len(batch), g)).trunk_MD for g in seeds]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    windows = model.position_windows(4000, torch.Generator().manual_seed(0))
    size, origin, kept = windows.split([2, 2, 1], dim=1)
    assert size.max() <= 1 and size.prod(1).min() >= 0.09 and (size + origin).max() <= 1 + 1e-6
    assert abs(kept.mean() - 0.9) < 0.02


def test_position_table_is_the_resized_square_cropped():
    """RADIO 1.2 against F.interpolate."""
    student = lively(radio_config())
    table = student.positions.table_GGD.detach()
    for h, w in [(3, 5), (8, 2), (11, 4), (1, 1)]:
        m = max(h, w)
        square = F.interpolate(table.permute(2, 0, 1)[None], (m, m), mode="bilinear")[0]
        expected = square[:, :h, :w].flatten(1).T
        layout = Layout.of([(h, w)], 5, torch.device("cpu"))
        close(student.positions(torch.zeros(h * w, 32), layout, None)[0], expected)


# ------------------------------------------------------------------------------ attention


def attention_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    layout = Layout.of(GRIDS, 5, torch.device("cpu"))
    qkv = [torch.randn(len(layout.gather_N), 2, 16, generator=generator) for _ in range(3)]
    tensors = [*qkv, torch.tensor([3.0, 2.5])]  # sinks of +3: smaller ones would hide an error
    return layout, [x.to(dtype).requires_grad_() for x in tensors]


def reference_attention(layout, q, k, v, sinks):
    """One image and head at a time, with an explicit extra key of logit s and zero value."""
    outs, start = [], 0
    for length in layout.lengths:
        rows = slice(start, start := start + length)
        heads = []
        for h in range(q.shape[1]):
            logits = q[rows, h] @ k[rows, h].T / q.shape[-1] ** 0.5
            logits = torch.cat([logits, sinks[h].expand(length, 1)], dim=1)
            values = torch.cat([v[rows, h], v.new_zeros(1, v.shape[-1])])
            heads.append(logits.softmax(-1) @ values)
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("backend", ["auto", "flash", "explicit"])
def test_sink_attention_gradients(backend):
    layout, inputs = attention_inputs()
    expected = reference_attention(layout, *inputs)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    out = attention(*inputs[:3], layout, inputs[3], backend)
    close(out, expected, 2e-6)
    for a, b in zip(torch.autograd.grad((out * weight).sum(), inputs), wanted, strict=True):
        close(a, b, 2e-6)


def test_attention_choice():
    q = torch.zeros(4, 2, 16)
    assert model.choose_attention(q) == "flash"
    assert model.choose_attention(q.bfloat16().requires_grad_()) == "explicit"
    with pytest.raises(ValueError, match="backend 'x'"):
        Student(MODELS["test"]).use(attention="x")


def test_attention_refuses_two_dtypes():
    layout, (q, k, v, sinks) = attention_inputs()
    with pytest.raises(ValueError, match=r"q torch.float32, k torch.float32, v torch.bfloat16"):
        attention(q, k, v.bfloat16(), layout, sinks)


def efficient_forward(q, k, v, bias, compute_log_sumexp):
    """CUDA's memory-efficient kernel by its definition: its log-sum-exp is padded to whole 32."""
    assert bias is None and compute_log_sumexp and all(x.stride(-1) == 1 for x in (q, k, v))
    logits = q @ k.mT / q.shape[-1] ** 0.5
    lse = F.pad(logits.logsumexp(-1), (0, -q.shape[2] % 32), value=math.inf)
    return logits.softmax(-1) @ v, lse, torch.zeros(()), torch.zeros(())


def efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, needed):
    assert bias is None and seed.ndim == offset.ndim == dropout == 0 and not needed[3]
    assert lse.shape[2] % 32 == 0 and lse.is_contiguous()
    assert (lse[..., q.shape[2] :] == math.inf).all(), "rows of padding would enter"
    weight = (q @ k.mT / q.shape[-1] ** 0.5 - lse[..., : q.shape[2], None]).exp()
    slope = weight * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return slope @ k, slope.mT @ q, weight.mT @ grad, torch.zeros(0)


@pytest.mark.parametrize("has_sinks", [True, False])
def test_the_memory_efficient_kernel_has_the_sinks_gradient(has_sinks, monkeypatch):
    """What float32 takes on CUDA, with torch's kernel written out as its callers must use it."""
    for name, kernel in (("", efficient_forward), ("_backward", efficient_backward)):
        name = f"_scaled_dot_product_efficient_attention{name}"
        monkeypatch.setattr(torch.ops.aten, name, kernel, raising=False)
    layout, inputs = attention_inputs()
    if not has_sinks:
        inputs[3] = torch.tensor([-math.inf, -math.inf])
    used = inputs[: 3 + has_sinks]
    expected = reference_attention(layout, *inputs)
    wanted = torch.autograd.grad(expected.square().sum(), used)
    out = attention(*inputs[:3], layout, inputs[3] if has_sinks else None, "efficient")
    close(out, expected, 2e-6)
    for a, b in zip(torch.autograd.grad(out.square().sum(), used), wanted, strict=True):
        close(a, b, 3e-6)


def test_attention_gets_one_dtype_where_autocast_norms_in_float32(monkeypatch):
    """CUDA's autocast computes rms_norm in float32, the CPU's does not; kernels take one dtype."""
    norm, seen = F.rms_norm, []
    monkeypatch.setattr(F, "rms_norm", lambda x, *rest: norm(x.float(), *rest))
    spy = lambda q, k, v, *_: seen.append({x.dtype for x in (q, k, v)}) or v  # noqa: E731
    monkeypatch.setattr(model, "attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        Student(MODELS["test"])(pack(GRIDS))
    assert seen == [{torch.bfloat16}] * 2


def test_cuda_takes_no_flex():
    q = dataclasses.make_dataclass("Q", ["dtype", "device", "requires_grad"])
    for dtype, backend in ((torch.bfloat16, "varlen"), (torch.float32, "efficient")):
        assert model.choose_attention(q(dtype, torch.device("cuda"), True)) == backend


@pytest.mark.parametrize("form", ["amoe", "radio"])
def test_a_forward_and_backward_never_make_the_host_wait(form):
    config = MODELS["test"] if form == "amoe" else radio_config()
    student, batch = lively(config), pack(GRIDS)
    layout = Layout.of(GRIDS, config.prefix, torch.device("cpu"))
    windows_B5 = model.position_windows(len(GRIDS), torch.Generator().manual_seed(0))
    with NoWaiting():
        out = student.run(batch.patches_MX, layout, windows_B5)
        sum(x.sum() for x in out.patches.values()).backward()


def saved_bytes(run) -> int:
    """Bytes of all storages that autograd keeps of a call, parameters apart."""
    kept = {}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage()._cdata] = (x.untyped_storage().nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = run()
    del result
    return sum(size for size, _ in kept.values())


def test_experts_keep_half_precision_rows_and_sum_in_a_fixed_order():
    """Rows are cast before K of each are gathered, and no float is added by an atomic."""
    moe = lively(MODELS["test"]).blocks[0].ffn
    x_ND = torch.randn(500, 48, requires_grad=True)

    class OncePerPlace(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name.startswith("aten::index_add") and args[0].is_floating_point():
                assert len(args[2].unique()) == len(args[2]), "sums of floats in any order"
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        size = saved_bytes(lambda: moe(x_ND)[0])
        with OncePerPlace():
            moe(x_ND)[0].float().square().sum().backward()
    weights = 2 * (moe.w1_EGD.numel() + moe.w2_EDF.numel())
    pair = 2 * (48 + 5 * 32) + 2 + 8  # rows and hidden layers in bfloat16, gate, order
    assert size < weights + 500 * (2 * pair + 4 * 48 + 64)


@pytest.mark.parametrize("head_dim", [20, 264, 0])
def test_head_widths_that_no_kernel_takes_are_refused(head_dim):
    for config in (MODELS["test"], MODELS["radio-b"]):
        with pytest.raises(ValueError, match=f"head_dim={head_dim} is not a multiple of 8"):
            dataclasses.replace(config, head_dim=head_dim)


def test_autocast_keeps_the_angles():
    """Up to 50 rad: bfloat16 would round them by as much as 0.2."""
    layout, positions = Layout.of([(48, 48)], 5, torch.device("cpu")), Student(MODELS["test"])
    positions = positions.positions
    with torch.autocast("cpu", torch.bfloat16):
        _, (cos_NHJ, sin_NHJ) = positions(None, layout, None)
    grid = torch.linspace(-1, 1, 48, dtype=torch.float64)
    yx_M2 = torch.cartesian_prod(grid, grid)
    angles = torch.einsum("mc,hjc->mhj", yx_M2, positions.freqs_HJ2.double())
    close(cos_NHJ[5:], angles.cos().float(), 1e-5)
    close(sin_NHJ[5:], angles.sin().float(), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("varlen", torch.bfloat16), ("efficient", torch.float32)]
)
def test_cuda_attention_gradients(backend, dtype):
    _, inputs = attention_inputs()
    layout = Layout.of(GRIDS, 5, torch.device("cuda"))
    wanted = torch.autograd.grad(reference_attention(layout, *inputs).square().sum(), inputs)
    moved = [x.detach().cuda().to(dtype).requires_grad_() for x in inputs]
    out = attention(*moved[:3], layout, moved[3], backend)
    for a, b in zip(torch.autograd.grad(out.float().square().sum(), moved), wanted, strict=True):
        close(a.float().cpu(), b, 3e-2 if dtype == torch.bfloat16 else 1e-4)


# ------------------------------------------------------------------------------ experts


def test_moe_equals_dense_loop():
    student = lively(MODELS["test"])
    student.blocks[0].ffn.expert_bias += torch.tensor([9.0, 0, 0, -9])  # one expert gets nothing
    results = []
    for backend in ("dense", "grouped", "sorted"):
        out = student.use(experts=backend)(pack(GRIDS))
        grads = torch.autograd.grad(loss_of(out), list(student.parameters()))
        results.append([*all_outputs(out), *grads])
        assert out.counts_LE.sum(1).tolist() == [2 * (sum(h * w for h, w in GRIDS) + 5 * 6)] * 2
        assert out.counts_LE[0, 3] == 0
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close(a, b, 2e-5)


def test_selection_uses_the_bias_and_the_gate_does_not():
    moe = lively(MODELS["test"]).blocks[0].ffn
    moe.expert_bias += torch.tensor([9.0, 8, 0, 0])
    x = torch.randn(7, 48)
    gates, chosen, counts = moe.route(x)
    assert set(chosen.flatten().tolist()) == {0, 1} and counts.tolist() == [7, 7, 0, 0]
    close(gates, torch.sigmoid(x @ moe.router.weight.T).gather(1, chosen))


def test_gradient_survives_an_expanded_one():
    moe = lively(MODELS["test"]).blocks[0].ffn
    moe(torch.randn(9, 48, requires_grad=True))[0].sum().backward()


def test_load_balancing():
    student = lively(MODELS["test"])
    for block in student.blocks:  # badly skewed: everything to the first experts
        block.ffn.expert_bias += torch.tensor([0.6, 0.4, 0, -0.6])
    batch = pack([(8, 8)] * 4)
    with torch.no_grad():
        for _ in range(200):
            student.update_router(student(batch).counts_LE, 1e-2)
        counts = student(batch).counts_LE.float()
    assert (counts.amax(1) / counts.mean(1)).max() < 1.3


def test_bfloat16_keeps_angles_and_scores():
    student = lively(MODELS["test"])
    student.blocks[0].ffn.expert_bias += 0.123456
    half = load_like(student).to(torch.bfloat16)
    layout = Layout.of([(7, 9)], 5, torch.device("cpu"))
    angles = [torch.atan2(*s.positions(None, layout, None)[1][::-1]) for s in (student, half)]
    assert (angles[0] - angles[1]).abs().max() < 1e-6
    assert torch.equal(half.blocks[0].ffn.expert_bias, student.blocks[0].ffn.expert_bias)
    assert half.blocks[0].ffn.route(torch.randn(3, 48).bfloat16())[0].dtype == torch.float32
    assert half(pack(GRIDS)).trunk_MD.isfinite().all()


def load_like(student: Student) -> Student:
    again = Student(student.config)
    again.load_state_dict(student.state_dict())
    return again


# ------------------------------------------------------------------------------ heads, training


def test_gradients_reach_all_but_the_frozen_pool():
    heads = (HeadSpec("s", 32, 32, pool=True, pool_hidden=8), HeadSpec("d", 16, 16, registers=True))
    student = lively(with_heads(MODELS["test"], heads))
    out = student(pack(GRIDS))
    assert out.registers["d"].shape == (6, 4, 16)
    loss_of(out).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == ("pool" in name), name


def test_output_layers_are_the_last_linear():
    student = lively(MODELS["test"])
    layers, before = student.output_layers("a"), student(pack(GRIDS))
    layers["summary"].bias.data += 1
    layers["patches"].bias.data += 2
    after = student(pack(GRIDS))
    close(after.summary["a"], before.summary["a"] + 1)
    close(after.patches["a"], before.patches["a"] + 2)


def test_blocks_start_as_identity():
    student = Student(MODELS["test"])
    x = torch.randn(21, 48)
    layout = Layout.of([(4, 4)], 5, torch.device("cpu"))
    y, _ = student.blocks[0](x, layout, student.positions(x, layout, None)[1])
    assert torch.equal(x, y)


@pytest.mark.parametrize("form", ["amoe", "radio"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_bytes_are_those_that_autograd_keeps(form, recompute, monkeypatch):
    """Counted on the CPU, whose autocast is told to norm in float32 as CUDA's does."""
    norm, layer_norm = F.rms_norm, F.layer_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *rest: norm(x.float(), *rest))
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))
    monkeypatch.setattr(model, "choose_attention", lambda _: "efficient")
    for name, kernel in (("", efficient_forward), ("_backward", efficient_backward)):
        name = f"_scaled_dot_product_efficient_attention{name}"
        monkeypatch.setattr(torch.ops.aten, name, kernel, raising=False)
    sizes = {"dim": 64, "n_heads": 4, "head_dim": 16, "ffn_dim": 48, "heads": ()}
    config = dataclasses.replace(MODELS["test" if form == "amoe" else "radio-b"], **sizes)
    batch, kept, estimates = pack([(16, 16)] * 8), [], []
    for n_layers in (2, 6):
        student = Student(dataclasses.replace(config, n_layers=n_layers))
        student.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            size = saved_bytes(lambda student=student: student(batch).trunk_MD)
        copies = 0 if recompute else 2 * sum(p.numel() for p in student.parameters() if p.ndim > 1)
        kept.append(size - copies)  # autocast's copies of the weights do not count
        estimates.append(model.activation_bytes(student.config, recompute))
    tokens = 8 * (256 + config.prefix)
    assert kept[1] - kept[0] == pytest.approx(tokens * (estimates[1] - estimates[0]), rel=0.2)


def test_nano_trains():
    torch.manual_seed(0)
    student, batch = Student(MODELS["nano"]), pack([(4, 5), (3, 3)])
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=1e-3), []
    for _ in range(4):
        out = student(batch)
        loss = sum((x - 1).square().mean() for x in [*out.summary.values(), *out.patches.values()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------ encode


def test_encode_inputs_agree():
    student = lively(MODELS["test"])
    array = np.random.default_rng(0).integers(0, 256, (70, 37, 3), dtype=np.uint8)
    turned = Image.fromarray(np.rot90(array).copy())
    turned.getexif()[0x0112] = 6  # shown after a quarter turn clockwise
    as_float = torch.tensor(array).permute(2, 0, 1).float() / 255
    found = student.encode([array, Image.fromarray(array), as_float, as_float.double(), turned])
    assert found[0].patches["trunk"].shape == (4, 2, 48)
    for other in found[1:]:
        close(other.patches["a"], found[0].patches["a"])
        close(other.summary["trunk"], found[0].summary["trunk"])


def test_encode_sizes_and_budget():
    student = lively(MODELS["test"])
    many = [torch.rand(3, h, w) for h, w in [(1, 1), (1, 5000), (24, 40), (64, 64), (100, 30)]]
    grids = [tuple(f.patches["trunk"].shape[:2]) for f in student.encode(many)]
    assert grids == [(1, 1), (1, 313), (2, 3), (4, 4), (6, 2)]
    whole = student.encode(many)
    student.encode_budget = 20
    for a, b in zip(student.encode(many), whole, strict=True):
        close(a.patches["trunk"], b.patches["trunk"])
    assert student.encode([]) == []
    small = student.encode([torch.rand(3, 160, 320)], max_tokens=50)[0].patches["trunk"]
    assert small.shape[:2] == (5, 10)
    assert student.encode([torch.rand(3, 64, 64)], keep=3)[0].tokens.shape == (3, 48)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((3, 4, 4), torch.nan), "nan"),
        (torch.rand(3, 4, 4) + 1, "expected finite numbers in"),
        (torch.rand(4, 8, 8), r"\(4, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 0, 8), r"\(3, 0, 8\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        ("cat.png", "str"),
    ],
)
def test_encode_refuses(bad, message):
    with pytest.raises(ValueError, match=f"image 1.*{message}"):
        Student(MODELS["test"]).encode([torch.rand(3, 16, 16), bad])


def test_siglino_size():
    assert siglino_size(200, 400) == (176, 352)
    assert siglino_size(64, 64) == (128, 128)
    with pytest.raises(ValueError, match="aspect"):
        siglino_size(16, 5000)


# ------------------------------------------------------------------------------ token merging


@pytest.mark.parametrize(
    ("grid", "keep"), [((48, 48), 256), ((48, 48), 196), ((1, 64), 5), ((3, 5), 15), ((3, 5), 1)]
)
def test_merge_tokens(grid, keep):
    tokens = torch.randn(grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(0))
    merged, index = merge_tokens(tokens, grid, keep)
    assert merged.shape == (keep, 8)
    assert sorted(set(index.tolist())) == list(range(keep))
    for row in range(keep):
        close(merged[row], tokens[index == row].mean(0), 1e-5)
    assert torch.equal(unmerge_tokens(merged, index), merged[index])
    if keep == len(tokens):
        assert torch.equal(merged, tokens)


def test_merge_tokens_joins_the_alike_and_keeps_every_region():
    tokens = F.one_hot(torch.arange(64) // 32 * 2 + torch.arange(64) % 8 // 4, 4).float()
    merged, index = merge_tokens(tokens, (8, 8), 16)
    assert (merged.amax(1) > 1 - 1e-6).all()  # only equal tokens were joined
    close(unmerge_tokens(merged, index), tokens)
    with pytest.raises(ValueError, match="keep=65"):
        merge_tokens(tokens, (8, 8), 65)


# ------------------------------------------------------------------------------ export


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_export(config):
    student, image = lively(config), images([(3, 4)])[0]
    program = torch.export.export(FixedGrid(student, 48, 64), (image[None],))
    found, expected = program.module()(image[None]), student.encode([image])[0]
    for name in expected.patches:
        close(found[f"patches.{name}"][0], expected.patches[name])
    for name in expected.summary:
        close(found[f"summary.{name}"][0], expected.summary[name])


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference")
    student, image = lively(MODELS["test"]), images([(2, 3)])[0]
    module = FixedGrid(student, 32, 48).eval()
    torch.onnx.export(module, (image[None],), tmp_path / "s.onnx", dynamo=True, external_data=False)
    import onnx

    session = evaluator.ReferenceEvaluator(onnx.load(tmp_path / "s.onnx"))
    names = session.output_names
    values = session.run(None, {session.input_names[0]: image[None].numpy()})
    expected = list(module(image[None]).values())
    assert len(names) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        close(torch.tensor(value), wanted.detach(), 1e-4)


# ------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("name", ["test", "dense-30m", "radio-b"])
def test_flops_are_those_that_torch_counts(name):
    """On the explicit forms: its counter sees no SDPA and no grouped_mm on CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    config = dataclasses.replace(MODELS[name], n_layers=2)
    student = Student(config).use(attention="explicit", experts="sorted")
    batch = PackedBatch.from_images([torch.rand(3, 224, 224)], 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        student(batch)
    assert model.count_flops(config, 224) == pytest.approx(counter.get_total_flops(), rel=0.03)


SHARDED = """
import sys, dataclasses
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from model import MODELS, Student, training_bytes
from packing import PackedBatch, setup_distributed
group = setup_distributed(60)
config = dataclasses.replace(MODELS["dense-30m"], n_layers=2)
student = Student(config)
for block in student.blocks:
    fully_shard(block)
fully_shard(student)
trained = [p for p in student.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained)
out = student(PackedBatch.from_images([torch.rand(3, 32, 32)], 16))
sum(x.square().mean() for x in (*out.patches.values(), *out.summary.values())).backward()
optimizer.step()
parts = [*student.parameters(), *(p.grad for p in trained)]
parts += [x for state in optimizer.state.values() for x in state.values() if x.ndim]
own = sum(x.to_local().numel() * 4 for x in parts)
gathered = 8 * sum(p.numel() for p in student.blocks[0].parameters())
print("ratio", (own + gathered) / training_bytes(config, 2, sharded=True))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_training_bytes_are_those_of_a_real_sharded_step(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED.format(root=str(Path(model.__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ratios = [float(text) for text in re.findall(r"ratio (\d\.\d+)", done.stdout)]
    assert ratios == pytest.approx([1, 1], rel=0.02)
