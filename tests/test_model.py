"""model.py: both released forms agree with their releases' numbers, and packing changes nothing."""

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NoWaiting
from einops import rearrange
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import model
from model import (
    MODELS,
    AdapterSpec,
    FixedGrid,
    Layout,
    ModelConfig,
    RadioSpec,
    Student,
    attention,
    count_parameters,
    load_student,
    merge_tokens,
    save_student,
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
        RadioSpec("clip", 12, 20, kind="v2", hidden=16, inner=1, summary_hidden=24, upsample=2),
        RadioSpec("sam", 8, None, hidden=16, inner=1, token=1, in_trunk_summary=False),
        RadioSpec("dino", 8, 8, hidden=16, summary_inner=1, token=2),
    )
    config = ModelConfig("radio", 32, 2, 2, 16, 64, heads, cls_tokens=3, registers=2,
                         gated_ffn=False, final_norm=False, position_grid=8)  # fmt: skip
    return dataclasses.replace(config, **changes)


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
        (lambda s: s.pop("layers.1.attention.wq.weight"), r"missing key blocks\.1\.attention\.wq"),
        (lambda s: s.pop("norm.weight"), r'Missing key.*"norm\.weight"'),
        (lambda s: s.update(extra=torch.ones(1)), 'Unexpected key.*"extra"'),
        (lambda s: s.update({"norm.weight": torch.ones(47)}), r"for norm\.weight:.*\[47\]"),
        (
            lambda s: s.update({"layers.1.moe.experts.w1": torch.ones(6, 31, 48)}),
            r"for blocks\.1\.ffn\.w1_EGD:.*\[6, 63, 48\]",
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
    """Keys by index, EMA, spectral weights, LayerScale: the same network."""
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
    torch.save({**content, "state_dict": {}, "state_dict_ema": renamed}, tmp_path / "r.pth.tar")
    found = load_student(tmp_path / "r.pth.tar").encode(image)[0]
    close(found.summary["trunk"], plain.summary["trunk"])
    close(found.summary["sam"], plain.summary["sam"])
    close(found.patches["trunk"], plain.patches["trunk"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("base_model.blocks", "base_model.inner.blocks", r"no timm ViT.*base_model\.inner\.blocks"),
        ("mlp.fc1", "mlp.w12", r"missing key blocks\.0\.ffn\.w1"),
        ("_heads.sam.fc1", "_heads.sam.fc9", r"Missing key.*heads\.sam\.summary\.fc1"),
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


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("_feature_projections.sam.blocks.0.attn.qkv.weight", "attention in a head.*C-RADIOv4"),
        ("_feature_normalizer.mean", "Unexpected key.*_feature_normalizer"),
    ],
)
def test_radio_files_that_are_not_read_are_named(tmp_path, key, message):
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(RADIO, weights_only=True)
    state = content["state_dict"] | {key: torch.ones(3)}
    torch.save({**content, "state_dict": state}, tmp_path / "r.pth.tar")
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path / "r.pth.tar")


# ---------------------------------------------------------------- transformers' own RadioModel


def mixed_features(network, pictures):
    """What its own packed forward says: per picture, summary and patches."""
    grids = torch.tensor([[x.shape[1] // 16, x.shape[2] // 16] for x in pictures])
    rows = [rearrange(x, "c (h y) (w x) -> (h w) (c y x)", y=16, x=16) for x in pictures]
    with torch.no_grad():
        out = network(torch.cat(rows), image_grid_hw=grids)
    return list(zip(out.summary, out.features.split(grids.prod(1).tolist()), strict=True))


def test_transformers_radio_model_is_our_radio_form(tmp_path):
    """A third golden test: its own code on packed mixed sizes, random weights, from its folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    tokens = {"num_cls_tokens": 3, "num_registers": 5, "summary_idxs": [0, 2]}
    config = transformers.RadioConfig(**sizes, **tokens, patch_size=16, max_img_size=16 * 12)
    network = transformers.RadioModel(config).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(tmp_path)
    student, pictures = load_student(tmp_path), images([*GRIDS, (20, 17)])
    assert student.config.summary_tokens == (0, 2) and student.config.registers == 5
    for found, (summary, patches) in zip(
        student.encode(pictures), mixed_features(network, pictures), strict=True
    ):
        close(found.summary["trunk"], summary)
        close(found.patches["trunk"].flatten(0, 1), patches)


@pytest.mark.parametrize("like", ["RADIO", "DINOv2", "odd MLP"])
def test_a_student_as_a_folder_of_transformers(tmp_path, like):
    """DINOv2's final norm and biased patches, which RadioModel has not, go and come back."""
    transformers = pytest.importorskip("transformers")
    changes = {
        "DINOv2": {"final_norm": True, "layer_scale": True, "patch_bias": True},
        "odd MLP": {"dim": 112, "n_heads": 7, "ffn_dim": 237},  # 112 * (237 / 112) < 237
    }
    student = lively(radio_config(**changes.get(like, {})))
    model.save_transformers(student, tmp_path)
    network, pictures = transformers.AutoModel.from_pretrained(tmp_path).eval(), images(GRIDS)
    assert type(network).__name__ == "RadioModel"
    again = load_student(tmp_path)
    heads = {k: x for k, x in student.state_dict().items() if k.startswith(("heads", "prefix"))}
    assert all(torch.equal(again.state_dict()[k], x) for k, x in heads.items())
    assert again.config.heads == student.config.heads
    for ours, back, (summary, patches) in zip(
        student.encode(pictures), again.encode(pictures),
        mixed_features(network, pictures), strict=True,
    ):  # fmt: skip
        close(ours.summary["trunk"], summary)
        close(ours.patches["trunk"].flatten(0, 1), patches)
        for name in ours.patches:
            close(back.patches[name], ours.patches[name])
    if like == "RADIO":
        (tmp_path / "heads.safetensors").unlink()
        assert list(load_student(tmp_path).encode(pictures)[0].patches) == ["trunk"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "model.safetensors is cut or damaged"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        (lambda data: b"\xff" * 7 + b"\x7f" + data[8:], "cut or damaged"),  # a header of exabytes
        (lambda data: b"\x80\x04" + data, "cut or damaged"),  # a pickle's first bytes
    ],
)
def test_a_folder_with_a_broken_file_is_refused(tmp_path, damage, message):
    pytest.importorskip("safetensors")
    model.save_transformers(lively(radio_config()), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load_student(tmp_path)


@pytest.mark.parametrize("count", [0, 6, 10**5, "3", 2.5])
def test_a_folder_with_other_cls_tokens_than_its_prefix_is_refused(tmp_path, count):
    pytest.importorskip("safetensors")
    model.save_transformers(lively(radio_config()), tmp_path)  # a prefix of 3 and 2
    told = json.loads((tmp_path / "config.json").read_text()) | {"num_cls_tokens": count}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=rf"{tmp_path}: num_cls_tokens={count!r}, .* prefix has 5"):
        load_student(tmp_path)


def test_what_is_no_radio_model_is_not_saved_as_one(tmp_path):
    with pytest.raises(ValueError, match="amoe form"):
        model.save_transformers(Student(MODELS["test"]), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert', not radio"):
        load_student(tmp_path)


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
    with pytest.raises(ValueError, match=r'Missing key.*"embed\.weight"'):
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


def test_a_student_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    student, path = Student(MODELS["test"]), tmp_path / "s.pt"
    save_student(student, path)
    before = path.read_bytes()

    def dies(_, target):
        target.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(model.torch, "save", dies)
    with pytest.raises(OSError, match="No space"):
        save_student(student, path)
    assert path.read_bytes() == before


def test_where_there_is_no_student_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()  # a run that has saved nothing yet
    (tmp_path / "begun" / "config.json").write_text('{"config": {}, "version": 2}')
    for name, said in (
        ("nope.pt", "nope.pt: no such file or folder, seen from /"),
        ("empty", "empty holds no student: a run's folder has a model.pt"),
        ("begun", "begun: no model.pt"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            load_student(tmp_path / name)
    student = Student(MODELS["test"])
    with pytest.raises(FileNotFoundError, match=r"x\.onnx: there is no folder .*nowhere"):
        model.save_onnx(student, tmp_path / "nowhere" / "x.onnx", 32, 32)


def test_top_k_of_our_own_files_can_be_chosen_and_other_versions_are_refused(tmp_path):
    save_student(Student(MODELS["test"]), tmp_path / "s.pt")
    assert load_student(tmp_path / "s.pt").config == MODELS["test"]
    one = load_student(tmp_path / "s.pt", top_k=1)
    assert one.config.top_k == one.blocks[0].ffn.top_k == 1
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    torch.save(content | {"version": 2}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt.*version 2"):
        load_student(tmp_path / "s.pt")


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_files_of_the_time_of_one_spec_for_all_heads_load(config, tmp_path):
    """Each head named the fields of both kinds and pre_norm, and the table had another name."""
    student = lively(config)
    save_student(student, tmp_path / "s.pt")
    content = torch.load(tmp_path / "s.pt", weights_only=True)
    both = dict.fromkeys(("registers", "pool", "split", "bias", "pre_norm"), False)
    both |= dict.fromkeys(("inner", "summary_inner", "token"), 0)
    both |= {"kind": "adapter", "summary_hidden": 1024, "upsample": 1, "in_trunk_summary": True}
    heads = [both | head for head in content["config"]["heads"]]
    content["config"]["heads"] = [{k: v for k, v in h.items() if k != "pool_eps"} for h in heads]
    state = content["state_dict"]
    if "positions.pos_embed" in state:
        state["positions.table_GGD"] = state.pop("positions.pos_embed")
    torch.save(content, tmp_path / "s.pt")
    again = load_student(tmp_path / "s.pt")
    assert again.config == config
    for name, x in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    heads[0]["no_such_field"] = 1
    torch.save(content | {"config": content["config"] | {"heads": heads}}, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=r"s\.pt.*no_such_field"):
        load_student(tmp_path / "s.pt")


def test_a_device_that_is_none_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(RuntimeError, match=r"cpu, cuda.* device string: gpu"):
        load_student(tmp_path / "not read.pt", device="gpu")


def test_torch_hub_opens_the_door():
    folder, path = Path(__file__).parent.parent, str(SIGLINO)
    student = torch.hub.load(str(folder), "student", source="local", path=path, top_k=3)
    assert student.config.top_k == 3 and len(student.encode([torch.rand(3, 32, 48)])) == 1


def test_the_hash_of_weights_by_hand():
    """Names, shapes and bytes in the order of the names, after what was hashed before."""
    module = torch.nn.Linear(2, 1)
    module.weight.data = torch.tensor([[1.0, -2.0]])
    module.bias.data = torch.tensor([0.5], dtype=torch.float16)
    content = b"bias (1,)" + struct.pack("<e", 0.5) + b"weight (1, 2)" + struct.pack("<2f", 1, -2)
    assert model.hash_weights(module) == hashlib.sha256(content).hexdigest()
    found = model.hash_weights(module, hashlib.sha256(b"facts"))
    assert found == hashlib.sha256(b"facts" + content).hexdigest()


# ------------------------------------------------------------------------ pretrained trunks


def test_a_table_of_another_size_keeps_its_corners_and_its_slope():
    """A plane stays a plane with the corners in the corners, as bicubic with aligned ones gives."""
    given, student = lively(radio_config()), lively(radio_config(position_grid=15), seed=1)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    given.positions.pos_embed.data = (10 * y + x)[..., None].expand(8, 8, 32).clone()
    model.load_pretrained(student, given)
    table = student.positions.pos_embed.detach()
    assert table.shape == (15, 15, 32)
    for (i, j), value in {(0, 0): 0, (0, 14): 7, (14, 0): 70, (14, 14): 77, (7, 7): 38.5}.items():
        torch.testing.assert_close(table[i, j], torch.full((32,), float(value)))


def test_a_pretrained_trunk_brings_its_heads_and_each_its_own_cls_token():
    given = lively(radio_config())
    clip, sam, dino = given.config.heads
    narrow = dataclasses.replace(sam, dim=6)  # of another width: it stays as it was
    student = lively(with_heads(given.config, (dino, clip, narrow)), seed=1)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    assert model.load_pretrained(student, given) == {"dino", "clip"}
    assert [head.token for head in student.config.heads] == [0, 1, 2]
    ours, theirs = student.prefix_RD, given.prefix_RD
    assert torch.equal(ours[0], theirs[2]) and torch.equal(ours[1], theirs[0])
    assert torch.equal(ours[3:], theirs[3:])  # the registers
    batch = pack(GRIDS)
    assert torch.equal(
        student.heads["dino"].patches.last.weight, given.heads["dino"].patches.last.weight
    )
    for name, x in student.state_dict().items():
        assert not name.startswith("heads.sam") or torch.equal(x, before[name])
    assert student(batch).patches["sam"].shape[1] == 6


def test_one_cls_token_starts_them_all_and_what_does_not_fit_is_named():
    given = lively(radio_config(cls_tokens=1, heads=()))
    student = lively(radio_config(registers=1), seed=1)
    last = student.prefix_RD[3].clone()
    assert model.load_pretrained(student, given) == set()
    expected = torch.cat([given.prefix_RD[:1].expand(3, -1), given.prefix_RD[1:2]])
    assert torch.equal(student.prefix_RD, expected) and not torch.equal(student.prefix_RD[3], last)
    with pytest.raises(ValueError, match=r"--init: .*embed\.weight: .*\[32, 768\].*\[32, 192\]"):
        model.load_pretrained(lively(radio_config(patch=8)), given)
    with pytest.raises(ValueError, match=r"--init: .*Missing key.*blocks\.2\.norm1"):
        model.load_pretrained(lively(radio_config(n_layers=3, cls_tokens=1, heads=())), given)


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


def test_parameters_of_the_test_student_by_hand():
    expert, head = 2 * 32 * 48 + 48 * 32, lambda c: 48 * c + c + 2 * c + 2 * (c * c + c)
    block = 2 * 48 + 48 * 3 * 32 + 32 * 48 + 2 + 48 * 4 + 4 * expert  # norms, qkv, proj, sinks, ..
    trunk = 768 * 48 + 5 * 48 + 2 * block + 48
    counts = count_parameters(MODELS["test"])
    assert (counts["block"], counts["trunk"]) == (block, trunk)
    assert counts["total"] == trunk + head(24) + head(32)
    idle = 2 * 2 * expert  # two of the four experts in each of two layers
    assert counts["total"] - counts["active"] == counts["trunk"] - counts["active_trunk"] == idle
    assert counts["frozen"] == 0 and count_parameters(MODELS["dense-30m"])["frozen"] > 10**7
    assert counts["total"] == sum(p.numel() for p in Student(MODELS["test"]).parameters())


def test_training_bytes_by_hand():
    """Float32 weights, gradients and two moments: 16 bytes each, and 4 for what is frozen."""
    config = with_heads(MODELS["test"], (AdapterSpec("s", 32, 32, pool=True, pool_hidden=8),))
    counts = count_parameters(config)
    state = 16 * (counts["total"] - counts["frozen"]) + 4 * counts["frozen"]
    pool = 32 + 96 * 32 + 96 + 32 * 32 + 32 + 2 * 32 + 32 * 8 + 8 + 8 * 32 + 32
    assert counts["frozen"] == pool
    for devices in (1, 8):
        assert model.training_bytes(config, devices, sharded=False) == state
    assert model.training_bytes(config, 1, sharded=True) == state
    gathered = state / 8 + 8 * counts["block"]
    assert model.training_bytes(config, 8, sharded=True) == pytest.approx(gathered)


def test_flops_by_hand_where_attention_is_half_of_them():
    """256 patches and 5 prefix tokens, 40 wide: two per weight and token, 4 N^2 D for attention."""
    config = ModelConfig("amoe", 40, 3, 5, 8, 8, (AdapterSpec("a", 6, 6),))
    weights = 3 * (3 * 40 * 40 + 40 * 40 + 3 * 8 * 40)
    expected = 2 * 261 * weights + 3 * 4 * 261**2 * 40
    expected += 2 * 256 * (768 * 40 + 40 * 6 + 6 * 6)  # the embedding, and the head
    assert model.count_flops(config, 256) == pytest.approx(expected, rel=0.02)
    assert 3 * 4 * 261**2 * 40 / expected > 0.4


def test_size_table_prints_every_model(capsys):
    model.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in MODELS)


def test_config_contradictions_name_both_values():
    with pytest.raises(ValueError, match=r"top_k=5.*experts=4"):
        dataclasses.replace(MODELS["test"], top_k=5)
    with pytest.raises(ValueError, match=r"head_dim=18.*multiple of 8"):
        dataclasses.replace(MODELS["test"], head_dim=18)
    with pytest.raises(ValueError, match="beyond cls_tokens=2"):
        radio_config(cls_tokens=2)
    with pytest.raises(ValueError, match=r"got 'amoe', cls_tokens=2"):
        dataclasses.replace(MODELS["test"], cls_tokens=2)
    with pytest.raises(ValueError, match=r"got 'radio', cls_tokens=3, position_grid=0"):
        radio_config(position_grid=0)
    with pytest.raises(ValueError, match="got 'vit'"):
        dataclasses.replace(MODELS["test"], form="vit")
    with pytest.raises(ValueError, match="head x: kind 'v1' is not v2"):
        RadioSpec("x", 4, 5, kind="v1")
    with pytest.raises(ValueError, match="head names repeat"):
        radio_config(heads=radio_config().heads[:1] * 2)
    with pytest.raises(ValueError, match="patch is 8 px, ours 16"):
        Student(MODELS["test"])(pack([(2, 2)], patch=8))
    with pytest.raises(ValueError, match=r"summary_dim=5.*dim=4"):
        AdapterSpec("x", 4, 5)


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


def test_windows_of_the_table_by_hand():
    """Corners of the window lie on the corner patches; without positions the patches are alone."""
    positions = lively(radio_config()).positions
    table, layout = positions.pos_embed.detach(), Layout.of([(3, 4)], 5, torch.device("cpu"))

    def at(*window):
        with torch.no_grad():
            return positions(torch.zeros(12, 32), layout, torch.tensor([window]))[0].view(3, 4, 32)

    assert (at(1.0, 1.0, 0.0, 0.0, 0.0) == 0).all()
    whole, part = at(1.0, 1.0, 0.0, 0.0, 1.0), at(4 / 7, 3 / 7, 2 / 7, 1 / 7, 1.0)
    for (y, x), (top, left) in {
        (0, 0): (0, 0),
        (0, 3): (0, 7),
        (2, 0): (7, 0),
        (2, 3): (7, 7),
    }.items():
        torch.testing.assert_close(whole[y, x], table[top, left])
    torch.testing.assert_close(whole[1, 0], (table[3, 0] + table[4, 0]) / 2)  # half way down, 3.5
    torch.testing.assert_close(part[0], table[2, 1:5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part[1:, 3], table[[4, 6], 4], atol=1e-5, rtol=1e-5)


def test_windows_are_drawn_as_stated():
    """A tenth of the area to all of it, aspects 3:4 to 4:3 where it fits, 10 % without any."""
    windows = model.position_windows(20_000, torch.Generator().manual_seed(0))
    (height, width, top, left, kept) = windows.T
    assert sorted(set(kept.tolist())) == [0, 1] and abs(kept.mean() - 0.9) < 0.01
    inside = (height < 1) & (width < 1)
    scale, aspect = (height * width).sqrt()[inside], (width / height)[inside]
    assert abs(scale.min() - math.sqrt(0.1)) < 0.01 and scale.max() > 0.95
    assert abs(aspect.log().abs().max() - 2 * math.log(4 / 3)) < 0.01
    assert abs(aspect.log().mean()) < 0.02
    small = scale < 0.5
    assert (top + height).max() <= 1 + 1e-6 and (left + width).max() <= 1 + 1e-6
    free = (top / (1 - height))[inside][small]
    assert abs(free.mean() - 0.5) < 0.02 and free.min() < 0.01 and free.max() > 0.99
    beside = (left / (1 - width))[inside][small]  # as free, and by a number of its own
    assert abs(torch.corrcoef(torch.stack([free, beside]))[0, 1]) < 0.05


def test_upsampled_patches_lie_row_by_row():
    """A head that says which of its 2 x 2 groups a channel is of."""
    student = lively(radio_config())
    last = student.heads["clip"].patches.last
    last.weight.data.zero_()
    last.bias.data = torch.arange(4.0).repeat_interleave(12)
    (found,) = student.encode(images([(2, 3)]))
    fine = found.patches["clip"]
    assert fine.shape == (4, 6, 12)
    assert fine[..., 0].tolist() == [[0, 1] * 3, [2, 3] * 3] * 2


def test_position_table_is_the_resized_square_cropped():
    """RADIO release: the inference rule, against F.interpolate."""
    student = lively(radio_config())
    table = student.positions.pos_embed.detach()
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


def test_explicit_attention_weighs_half_precision_in_float32():
    """Logits 96 to 100 over sqrt(8) are exact in float32; bfloat16's own would be off by 12 %."""
    layout = Layout.of([(1, 5)], 0, torch.device("cpu"))
    q, k, v = (torch.zeros(5, 1, 8, dtype=torch.bfloat16) for _ in range(3))
    q[:, 0, 0], k[:, 0, 0] = 1, torch.arange(96, 101)
    v[torch.arange(5), 0, torch.arange(5)] = 1
    logits = torch.tensor([*range(96, 101), 98], dtype=torch.float64) / math.sqrt(8)
    for sinks, expected in ((None, logits[:5].softmax(0)), (logits[5:].bfloat16(), None)):
        if expected is None:
            expected = torch.cat([logits[:5], sinks.double()]).softmax(0)[:5]
        out = attention(q, k, v, layout, sinks, "explicit")
        assert out.dtype == torch.bfloat16
        found = out[:, 0, :5].double()
        torch.testing.assert_close(found, expected.expand(5, 5), rtol=0.006, atol=0)


def test_attention_choice():
    q = torch.zeros(4, 2, 16)
    assert model.choose_attention(q) == "flash"
    assert model.choose_attention(q.bfloat16().requires_grad_()) == "flash"  # in float32
    with pytest.raises(ValueError, match="backend 'x'"):
        Student(MODELS["test"]).use(attention="x")


def test_attention_refuses_two_dtypes():
    layout, (q, k, v, sinks) = attention_inputs()
    with pytest.raises(ValueError, match=r"q torch.float32, k torch.float32, v torch.bfloat16"):
        attention(q, k, v.bfloat16(), layout, sinks)


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
    for dtype, backend in ((torch.bfloat16, "varlen"), (torch.float32, "explicit")):
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
    ("backend", "dtype"), [("varlen", torch.bfloat16), ("explicit", torch.float32)]
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


def test_routing_is_float32_under_autocast():
    moe, x_ND = lively(MODELS["test"]).blocks[0].ffn, torch.randn(64, 48)
    with torch.autocast("cpu", torch.bfloat16):
        gates_NK, chosen_NK, _ = moe.route(x_ND)
    expected = moe.route(x_ND)
    assert torch.equal(gates_NK, expected[0]) and torch.equal(chosen_NK, expected[1])


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_tokens_stay_float32_under_autocast(config):
    """Only the matmuls are rounded: what the blocks add up, and what heads say, is not."""
    student, batch = lively(config), pack(GRIDS)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = student(batch)
    assert {x.dtype for x in all_outputs(out)} == {torch.float32}
    with torch.no_grad():
        errors = (out.trunk_MD - student(batch).trunk_MD).abs()
    assert 0 < errors.median() < 0.05  # of numbers near 1; a few tokens go to other experts


def test_a_router_step_by_hand():
    """Up where an expert has less than the mean, down where more; the bias keeps its own mean."""
    student = Student(MODELS["test"])
    student.update_router(torch.tensor([[9, 0, 0, 0], [1, 2, 3, 2]]), 0.1)
    biases = [block.ffn.expert_bias for block in student.blocks]
    torch.testing.assert_close(biases[0], torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    torch.testing.assert_close(biases[1], torch.tensor([0.1, 0, -0.1, 0]))
    student.update_router(torch.tensor([[5, 5, 5, 5], [0, 0, 4, 4]]), 0.2)
    torch.testing.assert_close(biases[0], torch.tensor([-0.15, 0.05, 0.05, 0.05]))
    torch.testing.assert_close(biases[1], torch.tensor([0.3, 0.2, -0.3, -0.2]))


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
    heads = (
        AdapterSpec("s", 32, 32, pool=True, pool_hidden=8),
        AdapterSpec("d", 16, 16, registers=True),
    )
    student = lively(with_heads(MODELS["test"], heads))
    out = student(pack(GRIDS))
    assert out.registers["d"].shape == (6, 4, 16)
    loss_of(out).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == ("pool" in name), name


def test_output_layers_are_the_last_linear():
    student = lively(MODELS["test"])
    layers, before = student.heads["a"].output_layers(), student(pack(GRIDS))
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


STD = {  # of a truncated normal: the cut at +-2 lies far outside
    "amoe": {"prefix_RD": 0.02, "embed.weight": 0.02, "heads.a.fc1.weight": 0.01},
    "radio": {"prefix_RD": 0.02, "embed.weight": 0.02, "heads.clip.summary.fc1.weight": 0.02},
}


@pytest.mark.parametrize("experts", [0, 4])
def test_initial_weights_shrink_with_depth(experts):
    config = dataclasses.replace(
        MODELS["test"], dim=192, n_layers=6, ffn_dim=256, experts=experts, top_k=min(2, experts)
    )
    torch.manual_seed(0)
    student = Student(config)
    for depth, block in enumerate(student.blocks):
        ffn, small = block.ffn, 0.02 / math.sqrt(2 * (depth + 1))
        w1 = ffn.w1_EGD if experts else ffn.w1.weight
        gate, value = w1.chunk(2, dim=-2)
        wanted = [(block.attn.qkv.weight, small), (value, small), (gate, 0.02)]
        wanted += [(ffn.router.weight, small)] if experts else []
        for weight, std in wanted:
            assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert 0 < block.attn.sinks.abs().max() < 5 * small
    for name, std in STD["amoe"].items():
        assert student.get_parameter(name).std().item() == pytest.approx(std, rel=0.1)


def test_initial_weights_of_the_radio_form():
    torch.manual_seed(0)
    student = Student(radio_config(dim=192, ffn_dim=384, layer_scale=True))
    for name, std in STD["radio"].items():
        assert student.get_parameter(name).std().item() == pytest.approx(std, rel=0.1)
    for block in student.blocks:
        for linear in (block.attn.qkv, block.attn.proj, block.ffn.w1, block.ffn.w2):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert (linear.bias == 0).all()
        assert (block.scale1 == 1e-5).all() and (block.scale2 == 1e-5).all()
    assert student.positions.pos_embed.std().item() == pytest.approx(192**-0.5, rel=0.1)


@pytest.mark.parametrize(
    ("config", "eps"),
    [
        (MODELS["test"], 1e-5),
        (dataclasses.replace(MODELS["test"], norm_weight=False), 2.0**-23),
        (radio_config(final_norm=True), 1e-6),
    ],
    ids=["amoe", "amoe without weights", "radio"],
)
def test_norms_of_tokens_as_small_as_their_epsilon(config, eps):
    """+-sqrt(eps) has the variance eps, so a norm gives 1 / sqrt(2); elsewhere no test sees eps."""
    student = Student(config)
    signs = torch.tensor([1.0, -1.0]).repeat(config.dim // 2)[None]
    for norm in (student.blocks[0].norm1, student.blocks[0].norm2):
        close(norm(signs * math.sqrt(eps)), signs / math.sqrt(2), 1e-4)
    eps = eps if config.form == "radio" else 1e-5
    close(student.norm(signs * math.sqrt(eps)), signs / math.sqrt(2), 1e-4)


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_recomputed_blocks_run_again_in_backward_and_give_the_same_gradients(config):
    student, batch, runs = lively(config), pack(GRIDS), []
    for block in student.blocks:
        block.attn.register_forward_hook(lambda *_: runs.append(1))
    grads = []
    for student.recompute in (False, True):
        runs.clear()
        out = student(batch)
        assert len(runs) == 2  # two blocks
        grads.append(torch.autograd.grad(loss_of(out), list(student.parameters())))
        assert len(runs) == (4 if student.recompute else 2)
    for a, b in zip(*grads, strict=True):
        close(a, b)
    runs.clear()
    with torch.no_grad():
        student(batch)
    assert len(runs) == 2


def test_a_frozen_trunk_gets_no_gradient_and_its_heads_do():
    student = lively(MODELS["test"])
    student.frozen_trunk = True
    out = student(pack(GRIDS))
    sum(x.square().sum() for x in (*out.summary.values(), *out.patches.values())).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) != name.startswith("heads."), name
    assert not out.trunk_MD.requires_grad
    student.frozen_trunk = False
    assert student(pack(GRIDS)).trunk_MD.requires_grad


@pytest.mark.parametrize("form", ["amoe", "radio"])
@pytest.mark.parametrize("recompute", [False, True])
def test_activation_bytes_are_those_that_autograd_keeps(form, recompute, monkeypatch):
    """Counted on the CPU, whose autocast is told to norm in float32 as CUDA's does."""
    norm, layer_norm = F.rms_norm, F.layer_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *rest: norm(x.float(), *rest))
    monkeypatch.setattr(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest))
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
    wrong = struct.pack("<HHI4s", 305, 5, 1, bytes(4))  # Software as a rational, nowhere
    exif = b"II*\0\x08\0\0\0\2\0" + struct.pack("<HHII", 274, 3, 1, 6) + wrong + bytes(4)
    turned.save(file := io.BytesIO(), "PNG", exif=exif)
    as_float = torch.tensor(array).permute(2, 0, 1).float() / 255
    kinds = [Image.fromarray(array), as_float, as_float.double(), turned, Image.open(file)]
    found = student.encode([array, *kinds])
    assert found[0].patches["trunk"].shape == (4, 2, 48)
    for other in found[1:]:
        close(other.patches["a"], found[0].patches["a"])
        close(other.summary["trunk"], found[0].summary["trunk"])


def test_encode_sizes_and_budget():
    student = lively(MODELS["test"])
    many = [torch.rand(3, h, w) for h, w in [(1, 1), (1, 5000), (24, 40), (64, 64), (100, 30)]]
    grids = [tuple(f.patches["trunk"].shape[:2]) for f in student.encode(many)]
    assert grids == [(1, 1), (1, 313), (2, 3), (4, 4), (6, 2)]
    whole, packs = student.encode(many), []
    student.encode_budget = 45  # tokens: 1+5, 313+5, 6+5, 16+5 and 12+5 of them
    student.register_forward_pre_hook(lambda _, given: packs.append(given[0].lengths))
    for a, b in zip(student.encode(many), whole, strict=True):
        close(a.patches["trunk"], b.patches["trunk"])
    assert packs == [[1], [313], [6, 16], [12]]
    assert student.encode([]) == []
    small = student.encode([torch.rand(3, 160, 320)], max_tokens=50)[0].patches["trunk"]
    assert small.shape[:2] == (5, 10)
    assert student.encode([torch.rand(3, 64, 64)], keep=3)[0].tokens.shape == (3, 48)


def test_a_pass_on_a_cpu_holds_about_2048_tokens():
    student, packs = lively(MODELS["test"]), []
    student.register_forward_pre_hook(lambda _, given: packs.append(sum(given[0].lengths)))
    student.encode(images([(32, 32), (30, 32), (5, 5), (5, 5)]))  # 1024 + 960 patches and 2 x 5
    assert packs == [1984 + 25, 25]


def test_encode_resizes_antialiased_and_answers_in_float32():
    student = lively(MODELS["test"])
    stripes = (torch.arange(100) % 2).float().expand(3, 100, 100).contiguous()
    (found,) = student.encode([stripes], max_tokens=4)
    (grey,) = student.encode([F.interpolate(stripes[None], (32, 32), mode="bicubic", antialias=True)
                              [0].clamp(0, 1)])  # fmt: skip
    close(found.patches["trunk"], grey.patches["trunk"])
    half = student.to(torch.bfloat16).encode([stripes])[0]
    assert {x.dtype for x in (*half.summary.values(), *half.patches.values())} == {torch.float32}
    for name, value in (("max_tokens", 0), ("max_tokens", "9"), ("keep", "4"), ("keep", 0)):
        with pytest.raises(ValueError, match=f"{name}={value!r} is no number of tokens"):
            student.encode([stripes], **{name: value})
    with pytest.raises(ValueError, match="not a list of images, but one Tensor"):
        student.encode(stripes)


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
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "does not decode.*not finite"),
    ],
)
def test_encode_refuses(bad, message):
    with pytest.raises(ValueError, match=f"image 1.*{message}"):
        Student(MODELS["test"]).encode([torch.rand(3, 16, 16), bad])


def test_layers_are_what_leaves_those_blocks():
    student, pictures = lively(MODELS["test"]), images(GRIDS)
    seen = []
    student.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out[0]))
    alone = [student.encode([x], layers=(1, 2))[0] for x in pictures]
    for packed, one, x_ND in zip(
        student.encode(pictures, layers=(1, 2)), alone, seen, strict=False
    ):
        close(one.layers[1].flatten(0, 1), x_ND[5:])  # one CLS, four registers
        close(packed.layers[1], one.layers[1])
        normed = student.norm(packed.layers[2])  # the last block's, before the norm
        close(normed, packed.patches["trunk"])
    with pytest.raises(ValueError, match=r"layers=\[3, 0\]: there are blocks 1 to 2"):
        student.encode(pictures, layers=(3, 1, 0))
    with pytest.raises(ValueError, match="layers=4 is no list of blocks"):
        student.encode(pictures, layers=4)


def test_documented_limits_of_encode():
    student = lively(MODELS["test"])
    (large,) = student.encode([torch.rand(3, 1600, 1600)])  # 10,000 patches
    assert large.patches["trunk"].shape[:2] == (64, 64)
    (small,) = student.encode([torch.rand(3, 32, 48)], keep=100)  # all of its six
    assert torch.equal(small.tokens, small.patches["trunk"].flatten(0, 1))
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    bgr, rgb = student.encode([array[..., ::-1], array[..., ::-1].copy()])
    assert torch.equal(bgr.summary["a"], rgb.summary["a"])
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG")
    cut = Image.open(io.BytesIO(data.getvalue()[:-300]))
    with pytest.raises(ValueError, match="image 1: does not decode"):
        student.encode([array, cut])


def test_results_own_their_memory():
    def stored(x):
        file = io.BytesIO()
        torch.save(x, file)
        return file.tell()

    found = lively(MODELS["test"]).encode(images([(2, 3)] * 50), layers=(1,), keep=2)[3]
    for x in (*found.summary.values(), *found.patches.values(), found.tokens, found.layers[1]):
        assert x.untyped_storage().nbytes() == x.nbytes and stored(x) < x.nbytes + 2000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_a_copied_student_answers_the_same(config, copied):
    student, picture = lively(config), images([(3, 4)])
    (found,), (expected,) = copied(student).encode(picture), student.encode(picture)
    assert all(torch.equal(found.patches[name], x) for name, x in expected.patches.items())


def print_parameters(rank, student):
    assert rank == 0 and len(student.encode([torch.rand(3, 32, 32)])) == 1


@pytest.mark.slow  # a process
def test_a_student_goes_to_a_spawned_process():
    torch.multiprocessing.spawn(print_parameters, (Student(MODELS["test"]),), nprocs=1)


def test_a_compiled_student_is_saved_as_itself(tmp_path):
    student = lively(MODELS["test"])
    save_student(torch.compile(student), tmp_path / "s.pt")
    found = load_student(tmp_path / "s.pt").state_dict()
    assert all(torch.equal(found[name], x) for name, x in student.state_dict().items())


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


def test_merging_by_hand():
    """2 x 2 tokens: the destination is the last; of the others the one of the nearest direction
    goes first, however long the others are."""
    angles = torch.tensor([60.0, 20.0, 110.0, 0.0]).deg2rad()
    tokens = torch.tensor([9.0, 1.0, 2.0, 3.0])[:, None] * torch.stack(
        [angles.cos(), angles.sin()], 1
    )
    merged, index = merge_tokens(tokens, (2, 2), 3)
    assert index.tolist() == [0, 2, 1, 2]
    close(merged, torch.stack([tokens[0], tokens[2], (tokens[1] + tokens[3]) / 2]))
    merged, index = merge_tokens(tokens, (2, 2), 2)
    assert index.tolist() == [1, 1, 0, 1]
    close(merged, torch.stack([tokens[2], (tokens[0] + tokens[1] + tokens[3]) / 3]))


def test_destinations_are_the_middles_of_the_largest_number_of_cells():
    """Four tokens of 4 x 4 stay by themselves: each group is the twins of one middle."""
    middles = {(1, 1): 0, (1, 3): 1, (3, 1): 2, (3, 3): 3}
    tokens = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    apart = torch.eye(8)[[0, 1, 2, 3]] * 9
    for (y, x), n in middles.items():
        tokens[4 * y + x] = apart[n]
    _, index = merge_tokens(tokens, (4, 4), 4)
    assert [int(index[4 * y + x]) for y, x in middles] == [0, 1, 2, 3]
    nearest = F.normalize(tokens, dim=1) @ F.normalize(apart, dim=1).T
    assert index.tolist() == nearest.argmax(1).tolist()


@pytest.mark.parametrize(
    ("grid", "keep", "middles"),
    [
        ((4, 4), 4, [5, 7, 13, 15]),
        ((4, 4), 15, [5, 7, 13, 15]),
        ((3, 5), 4, [6, 9]),  # cells of 3 x 3 and 3 x 2; of 2 x 2 there would be six
        ((1, 7), 3, [1, 4, 6]),
        ((2, 2), 4, [0, 1, 2, 3]),
    ],
)
def test_cell_middles_by_hand(grid, keep, middles):
    assert model.cell_middles(*grid, keep).tolist() == middles


# ------------------------------------------------------------------------------ export


@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_export(config):
    """Any number of images of one grid; the same as `encode` says of each."""
    student, pictures = lively(config), torch.stack(images([(3, 4)] * 5))
    grid, batch = FixedGrid(student, 48, 64), torch.export.Dim("batch")
    shapes = {"images_B3HW": {0: batch}}
    program = torch.export.export(grid, (pictures[:2],), dynamic_shapes=shapes)
    assert not grid(pictures)["summary.trunk"].requires_grad
    for out in (grid(pictures), program.module()(pictures)):
        for i, expected in enumerate(student.encode(list(pictures))):
            for part, values in (("summary", expected.summary), ("patches", expected.patches)):
                for name, value in values.items():
                    close(out[f"{part}.{name}"][i], value)


def test_a_fixed_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="48x60 is not a multiple of the patch, 16"):
        FixedGrid(Student(MODELS["test"]), 48, 60)
    grid = FixedGrid(Student(MODELS["test"]), 64, 96)
    for shape in ((1, 3, 96, 64), (1, 3, 192, 192), (3, 64, 96)):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 64, 96\)"):
            grid(torch.rand(shape))
    bad = torch.rand(2, 3, 64, 96)
    bad[1, 0, 0, 0] = 255.0
    with pytest.raises(ValueError, match=r"image 1: values from .*255"):
        grid(bad)


@pytest.mark.slow
@pytest.mark.parametrize("config", [MODELS["test"], radio_config()], ids=["amoe", "radio"])
def test_onnx(tmp_path, config):
    """Named outputs and any batch, in onnxruntime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    student, pictures = lively(config), torch.stack(images([(2, 3)] * 5))
    model.save_onnx(student, tmp_path / "s.onnx", 32, 48)
    session = runtime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for batch in (pictures, pictures[:1]):
        expected = FixedGrid(student, 32, 48)(batch)
        assert names == list(expected)
        for name, value in zip(names, session.run(names, {"images": batch.numpy()}), strict=True):
            close(torch.tensor(value), expected[name], 1e-4)


def test_onnx_names_the_package_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        model.save_onnx(Student(MODELS["test"]), tmp_path / "s.onnx", 32, 48)


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
