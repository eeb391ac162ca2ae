"""The rows of `python tests/bench.py gpu`, within eight minutes on one GPU: ratios, device named.

Ours is on the left, what it replaces on the right, in turns; whatever is timed is waited for. MFU
is the model's arithmetic over what this device reaches in one large bf16 matrix product.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from bench import MIXED, TOKENS_4096, Row, fused, interleaved, lively, padded_forward
from torch import Tensor

from model import MODELS, Layout, ModelConfig, MoE, Student, attention, count_parameters
from packing import Group, PackedBatch
from sampling import Rows, step

CUDA = torch.device("cuda", 0)
TRUNK = replace(MODELS["amoe-0.3b"], heads=())


@dataclass(frozen=True)
class Scale:
    """How large the rows are; tests run small ones."""

    model: ModelConfig = TRUNK
    copies: int = 4  # of the mixed pictures and of 4096 tokens
    rows: int = 2**18
    clusters: int = 2**14
    matmul: int = 8192
    repeats: int = 5


def timed(*ways: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each way, the device's work included."""

    def waited(way: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            way()
            torch.cuda.synchronize()

        return run

    return [
        1e3 * seconds
        for seconds in interleaved(*map(waited, ways), repeats=repeats, clock=time.perf_counter)
    ]


def peak_memory(way: Callable[[], object]) -> float:
    """Largest memory of the device above the start while `way` runs, in MiB."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ratio(what: str, ours: float, other: float, unit: str = "ms", more: str = "") -> Row:
    """A row in which less is better: how many times the other is ours."""
    return Row("", what + more, ours, other, unit, other / max(ours, 1e-9), "", "")


def half() -> torch.autocast:
    return torch.autocast("cuda", torch.bfloat16)


def training_flops(config: ModelConfig, lengths: list[int]) -> float:
    """Of a forward and a backward: three times the forward's."""
    weights = 2 * sum(lengths) * count_parameters(config)["active_trunk"]
    products = 4 * sum(n * n for n in lengths) * config.n_heads * config.head_dim * config.n_layers
    return 3.0 * (weights + products)


def pictures(scale: Scale) -> list[Tensor]:
    return [torch.rand(3, 16 * h, 16 * w) for h, w in MIXED * scale.copies]


def packed_step(scale: Scale) -> Iterator[Row]:
    """A whole step of the trunk, forward, backward and AdamW: packed, and padded to the longest."""
    student = lively(Student(scale.model)).to(CUDA)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    images = [image.to(CUDA) for image in pictures(scale)]
    batch = PackedBatch.from_images([image.cpu() for image in images], 16).to(CUDA)

    def training(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with half():
                loss = forward().float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def recomputed() -> Tensor:
        student.recompute = True
        out = student(batch).trunk_MD
        student.recompute = False
        return out

    with torch.no_grad(), half():
        right, same = student(batch).trunk_MD, torch.cat(padded_forward(student, images, fused))
    error = ((same - right).norm() / right.norm()).item()
    assert error < 0.1, error  # bf16, and near ties go to other experts
    packed = training(lambda: student(batch).trunk_MD)
    padded = training(lambda: torch.cat(padded_forward(student, images, fused)))
    again = training(recomputed)
    ours, other, slow = timed(packed, padded, again, repeats=scale.repeats)
    memory = [peak_memory(way) for way in (packed, padded, again)]
    lengths = [n + scale.model.prefix for n in batch.lengths]
    a = torch.randn(scale.matmul, scale.matmul, device=CUDA, dtype=torch.bfloat16)
    (product,) = timed(lambda: a @ a, repeats=scale.repeats)
    reached = training_flops(scale.model, lengths) / ours / (2 * scale.matmul**3 / product)
    what = f"step of {sum(lengths)} tokens, packed / padded with masked SDPA"
    yield ratio(what, ours, other, more=f" (MFU {100 * reached:.0f} %)")
    rates = [sum(lengths) / milliseconds for milliseconds in (ours, other)]
    yield Row("", "the same, thousand tokens a second", *rates, "k/s", rates[0] / rates[1], "", "")
    yield ratio("peak memory of it", memory[0], memory[1], "MiB")
    yield ratio("step without / with recompute", ours, slow)
    yield ratio("peak memory with / without recompute", memory[2], memory[0], "MiB")


def attention_backends(scale: Scale) -> Iterator[Row]:
    """Forward and backward, with sinks, against SDPA with a dense mask of the pack."""
    layout = Layout.of(TOKENS_4096 * scale.copies, 5, CUDA)
    lengths, heads, width = layout.lengths, scale.model.n_heads, scale.model.head_dim
    image_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(CUDA)
    mask_NN = image_N[:, None] == image_N
    sinks_H = torch.full((heads,), 3.0, device=CUDA, requires_grad=True)

    def ours(qkv: Tensor, backend: str, sinks_H: Tensor | None) -> None:
        attention(*qkv.unbind(0), layout, sinks_H, backend).sum().backward()

    def dense(qkv: Tensor) -> None:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(0))
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NN).sum().backward()

    for dtype in (torch.bfloat16, torch.float32):
        qkv = torch.randn(3, len(image_N), heads, width, device=CUDA).to(dtype).requires_grad_()
        auto, masked, by_hand, plain = timed(
            partial(ours, qkv, "auto", sinks_H), partial(dense, qkv),
            partial(ours, qkv, "explicit", sinks_H), partial(ours, qkv, "auto", None),
            repeats=scale.repeats,
        )  # fmt: skip
        name = f"attention of {len(image_N)} tokens, {str(dtype)[6:]}"
        yield ratio(f"{name}, ours / dense mask", auto, masked)
        yield ratio(f"{name}, ours / explicit softmax", auto, by_hand)
        yield ratio(f"{name}, with / without sinks", auto, plain)


def experts(scale: Scale) -> Iterator[Row]:
    """A MoE layer against a dense one of the same active arithmetic, forward and backward."""
    config = replace(scale.model, n_layers=1)
    moe, hidden = MoE(config), config.top_k * config.ffn_dim
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    moe = moe.to(CUDA)
    w1, w2 = (torch.randn(shape, device=CUDA, requires_grad=True)
              for shape in ((2 * hidden, config.dim), (config.dim, hidden)))  # fmt: skip
    tokens = 4096 * scale.copies
    x, grad = torch.randn(2, tokens, config.dim, device=CUDA).unbind(0)
    x = x.clone().requires_grad_()

    def routed() -> object:
        with half():
            out = moe(x)[0]
        return torch.autograd.grad(out, (x, *moe.parameters()), grad.to(out.dtype))

    def dense() -> object:
        with half():
            gate, value = F.linear(x, w1).chunk(2, -1)
            out = F.linear(F.silu(gate) * value, w2)
        return torch.autograd.grad(out, (x, w1, w2), grad.to(out.dtype))

    times = timed(routed, dense, repeats=scale.repeats)
    what = f"{config.experts} experts top-{config.top_k} / dense, {tokens} tokens"
    yield ratio(what, *times)


def lloyd_steps(scale: Scale) -> Iterator[Row]:
    """One pass of k-means over the rows, by bf16 scores and by float32 ones."""
    x_ND = torch.randn(scale.rows, 768, device=CUDA)
    share = Rows(x_ND, torch.arange(scale.rows), scale.rows, Group(0, 1, CUDA))
    c_KD = x_ND[: scale.clusters].clone()
    found = {}

    def lloyd(dtype: torch.dtype) -> Callable[[], None]:
        return lambda: found.update({dtype: step(share, c_KD, dtype)})

    dtypes = (torch.bfloat16, torch.float32)
    times = timed(*map(lloyd, dtypes), repeats=scale.repeats)
    alike = (found[dtypes[0]].cluster_N == found[dtypes[1]].cluster_N).float().mean().item()
    what = f"k-means step, {scale.rows} x 768, k={scale.clusters}, bf16 / float32"
    yield ratio(what, *times, more=f" ({100 * alike:.1f} % alike)")


def encoding(scale: Scale) -> Iterator[Row]:
    """`encode` of pictures at their native sizes against batches padded to the longest."""
    student = lively(Student(scale.model)).to(CUDA).eval()
    images = pictures(scale)

    def padded() -> None:
        with torch.no_grad(), half():
            for start in range(0, len(images), 16):
                batch = [image.to(CUDA) for image in images[start : start + 16]]
                padded_forward(student, batch, fused)

    times = timed(lambda: student.encode(images), padded, repeats=scale.repeats)
    yield ratio(f"encode {len(images)} pictures, native / padded batches of 16", *times)


def rows(scale: Scale = Scale()) -> Iterator[Row]:
    """All of them, one after the other."""
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    torch.manual_seed(0)
    for part in (packed_step, attention_backends, experts, lloyd_steps, encoding):
        yield from part(scale)
