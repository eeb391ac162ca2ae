"""A CUDA device made of CPU tensors: `python tests/emulated_cuda.py [pytest's arguments ...]`.

The tests of a machine with a GPU (tests/test_gpu.py), on one without. Tensors claim `cuda:0`, so
that the project and torch take the way that they take there: CUDA's autocast table, its backends,
pinned batches, bf16. The arithmetic is the CPU's; CUDA's attention kernels are written out below by
their definition, with the real ones' demands on dtypes, widths and layouts. Operands on two devices
are refused, and whatever would make the host wait for the device is counted (`watch`).

It can't show speed, memory, Triton, NCCL, streams that race, or faults of CUDA's own kernels.
It needs a compiler for its guard (emulated_cuda.cpp), built once into the user's cache, and a CPU
build of torch, of which a few functions are replaced: hence only ever in a process of its own.
Without arguments it builds the guard, or says in one line why it can't.
"""

import collections
import contextlib
import ctypes
import hashlib
import itertools
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).with_suffix(".cpp")
IS_ON = __name__ == "__main__" and len(sys.argv) > 1

# ---- The guard: built by torch's own tool for extensions, loaded before torch


def guard_path() -> Path:
    """Where the built guard lies: a folder for each source and version of torch."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:12]
    return home / "amoe-from-scratch" / "emulated_cuda" / key / "emulated_cuda.so"


def build_guard() -> None:
    """Compile it. Raises: SystemExit, in one line, without a compiler or with a CUDA build."""
    from torch.utils.cpp_extension import load

    if torch.version.cuda:
        raise SystemExit(f"torch {torch.__version__} has CUDA: a device is emulated on CPU builds")
    folder = guard_path().parent
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-Wl,--as-needed", f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"]
    try:
        load("emulated_cuda", [str(SOURCE)], extra_ldflags=flags, build_directory=str(folder),
             is_python_module=False)  # fmt: skip
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise SystemExit(f"no emulated CUDA device: {str(error).splitlines()[0]}") from error
    print(guard_path())


def load_guard() -> None:
    """Load it before torch, whose libraries it brings along and then stands in front of."""
    if not guard_path().exists():
        subprocess.run([sys.executable, __file__], check=True)
    ctypes.CDLL(str(guard_path()), ctypes.RTLD_GLOBAL)


if IS_ON:
    sys.modules["emulated_cuda"] = sys.modules["__main__"]  # the tests import this very module
    load_guard()

import torch  # noqa: E402 - after the guard
import torch.nn.attention.varlen  # noqa: E402 - registers its kernels
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

CUDA = torch.device("cuda", 0)

# ---- What makes the host wait

SYNCS = collections.Counter()  # (what, where) -> times, while `watch` is on
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
    "equal", "linalg_eigh", "_linalg_eigh", "is_nonzero", "repeat_interleave",
}  # fmt: skip
STAGED = 65536  # bytes; a larger copy from memory that is not pinned waits for the stream
is_watching = False


@contextlib.contextmanager
def watch() -> Iterator[collections.Counter]:
    """Count what would make the host wait for the device inside the block, by kind and place."""
    global is_watching
    SYNCS.clear()
    is_watching = True
    try:
        yield SYNCS
    finally:
        is_watching = False


def note(what: str) -> None:
    """Count one wait, at the innermost lines of the project that lead to it."""
    if is_watching:
        frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
        places = [f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-2:])]
        SYNCS[what, " < ".join(places) or "backward"] += 1


def note_waits(name: str, args: tuple, kwargs: dict) -> None:
    """Count what an operator makes the host wait for."""
    if name in ("_to_copy", "copy_"):
        target, source = (args[0], args[1]) if name == "copy_" else (kwargs.get("device"), args[0])
        to_cuda = is_cuda(target)
        is_async = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if to_cuda != isinstance(source, Emulated) and target is not None:
            is_staged = to_cuda and source.numel() * source.element_size() <= STAGED
            if not is_async or not (is_staged or is_pinned(source) or not to_cuda):
                note("copy to the device" if to_cuda else "copy to the host")
    elif name == "repeat_interleave" and kwargs.get("output_size") is not None:
        return  # its length is known
    elif name == "_grouped_mm" and args[0].dtype != torch.bfloat16:
        note(name)  # only bf16 has a kernel: the others fetch the offsets
    elif name in WAITING:
        note(name)
    elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        for index in (i for i in args[1] if i is not None):
            if index.dtype in (torch.bool, torch.uint8):
                note("index by a mask")
            elif not isinstance(index, Emulated) and index.ndim:
                note("index from the host")


def is_cuda(x: Any) -> bool:
    return isinstance(x, Emulated) or (x is not None and torch.device(x).type == "cuda"
                                       if not isinstance(x, torch.Tensor) else False)  # fmt: skip


# ---- The device: every operator runs on the CPU tensors inside


class Emulated(torch.Tensor):
    """A tensor that claims cuda:0 and holds a CPU tensor."""

    __slots__ = ["real"]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real):
        self = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, layout=real.layout, device=CUDA, requires_grad=False,
        )  # fmt: skip
        self.real = real
        return self

    def __repr__(self):
        return f"Emulated({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        note("tolist")
        return self.real.tolist()

    def __reduce_ex__(self, protocol):
        return self.real.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is on, device="cuda" makes emulated tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


# operators that may take a tensor of the host beside one of the device
MIXED = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "lift_fresh",
         "detach", "set_", "_fused_adamw_", "_fused_adam_"}  # fmt: skip


def unwrap(tree: Any) -> Any:
    return tree_map(lambda x: x.real if isinstance(x, Emulated) else x, tree)


def run(func, args: tuple, kwargs: dict) -> Any:
    """An operator on the CPU; its results are where CUDA would have them."""
    name = func._schema.name.split("::")[-1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    emulated = [x for x in tensors if isinstance(x, Emulated)]
    device = kwargs.get("device")
    if not emulated and not is_cuda(device):
        return func(*args, **kwargs)
    strangers = [x for x in tensors if x.ndim and x.device.type == "cpu"]
    if emulated and strangers and name not in MIXED:
        shapes = ", ".join(f"{x.device}{tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
    note_waits(name, args, kwargs)
    real_kwargs = unwrap(kwargs)
    if device is not None:
        real_kwargs |= {"device": torch.device("cpu")}
    out = KERNELS.get(func._schema.name, func)(*unwrap(args), **real_kwargs)
    if name == "copy_" and not isinstance(args[0], Emulated):
        return args[0]
    if device is not None and not is_cuda(device):
        return out
    known = {id(x.real): x for x in emulated}  # an operator in place returns its argument

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Emulated(x)

    return tree_map(wrap, out)


# ---- CUDA's attention kernels by their definition, on CPU tensors


def attend(q_NHA, k_NHA, v_NHA):
    """Output and log-sum-exp (H, N) of one image, in float32."""
    logits_HNN = torch.einsum("nha,mha->hnm", q_NHA.float(), k_NHA.float())
    logits_HNN *= q_NHA.shape[-1] ** -0.5
    out_NHA = torch.einsum("hnm,mha->nha", logits_HNN.softmax(-1), v_NHA.float())
    return out_NHA, logits_HNN.logsumexp(-1)


def attend_backward(grad_NHA, q_NHA, k_NHA, v_NHA, out_NHA, lse_HN):
    """Gradients as flash kernels take them: from the output and the log-sum-exp given."""
    g, q, k, v, out = (x.float() for x in (grad_NHA, q_NHA, k_NHA, v_NHA, out_NHA))
    scale = q.shape[-1] ** -0.5
    p_HNM = (torch.einsum("nha,mha->hnm", q, k) * scale - lse_HN[..., None]).exp()
    rows_HN1 = (g * out).sum(-1).T[..., None]
    ds_HNM = p_HNM * (torch.einsum("nha,mha->hnm", g, v) - rows_HN1) * scale
    return (torch.einsum("hnm,mha->nha", ds_HNM, k), torch.einsum("hnm,nha->mha", ds_HNM, q),
            torch.einsum("hnm,nha->mha", p_HNM, g))  # fmt: skip


def demand(is_met: bool, kernel: str, what: str, *tensors: torch.Tensor) -> None:
    if not is_met:
        seen = ", ".join(f"{x.dtype}{tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"{kernel}: {what}: {seen}")


def demand_alike(kernel: str, multiple: int, *tensors: torch.Tensor) -> None:
    """One dtype, a last axis without gaps, a head width that is a multiple."""
    demand(len({x.dtype for x in tensors}) == 1, kernel, "dtypes differ", *tensors)
    demand(all(x.stride(-1) == 1 for x in tensors), kernel, "gaps in the last axis", *tensors)
    demand(tensors[0].shape[-1] % multiple == 0, kernel, "head width", *tensors)


def images(cu_seqlens: torch.Tensor) -> Iterator[slice]:
    return (slice(start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist()))


def varlen(q, k, v, cu_seqlens, _ends, _longest, _longest_k, *_):
    """torch_attn::_varlen_attn: half precision only."""
    demand_alike("varlen", 8, q, k, v)
    demand(q.dtype in (torch.bfloat16, torch.float16), "varlen", "half precision only", q)
    demand(cu_seqlens.dtype == torch.int32, "varlen", "offsets are int32", cu_seqlens)
    out, lse_HN = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[1], len(q))
    for part in images(cu_seqlens):
        out[part], lse_HN[:, part] = attend(q[part], k[part], v[part])
    return out, lse_HN, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(grad, q, k, v, out, lse_HN, cu_seqlens, *_, **__):
    demand_alike("varlen backward", 8, grad, q, k, v, out)
    demand(lse_HN.dtype == torch.float32, "varlen backward", "log-sum-exp", lse_HN)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for part in images(cu_seqlens):
        of_image = attend_backward(*(x[part] for x in (grad, q, k, v, out)), lse_HN[:, part])
        for whole, mine in zip(grads, of_image, strict=True):
            whole[part] = mine
    return tuple(grads)


def padded(length: int) -> int:
    return -(-length // 32) * 32  # the memory-efficient kernel's rows of log-sum-exp


def efficient(q, k, v, bias, wants_lse, *_, scale=None):
    """aten::_scaled_dot_product_efficient_attention on (B, H, N, A)."""
    demand_alike("efficient", 16 // q.element_size(), q, k, v)
    demand(bias is None and scale is None, "efficient", "bias and scale are not emulated", q)
    lse_BHN = torch.full((*q.shape[:2], padded(q.shape[2]) if wants_lse else 0), math.inf)
    out = torch.empty(q.transpose(1, 2).shape, dtype=q.dtype).transpose(1, 2)
    for i, qkv in enumerate(zip(q, k, v, strict=True)):
        out_NHA, lse_HN = attend(*(x.transpose(0, 1) for x in qkv))
        out[i] = out_NHA.transpose(0, 1)
        if wants_lse:
            lse_BHN[i, :, : q.shape[2]] = lse_HN
    return out, lse_BHN, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def efficient_backward(grad, q, k, v, _bias, out, lse_BHN, *_, **__):
    grad = grad.contiguous()  # as the kernel's own caller does
    demand_alike("efficient backward", 16 // q.element_size(), grad, q, k, v, out)
    is_whole = lse_BHN.dtype == torch.float32 and lse_BHN.shape[2] == padded(q.shape[2])
    demand(is_whole, "efficient backward", "log-sum-exp in rows of 32", lse_BHN)
    grads = [torch.empty(x.transpose(1, 2).shape, dtype=x.dtype).transpose(1, 2) for x in (q, k, v)]
    for i in range(len(q)):
        mine = (x[i].transpose(0, 1) for x in (grad, q, k, v, out))
        for whole, x_NHA in zip(
            grads, attend_backward(*mine, lse_BHN[i, :, : q.shape[2]]), strict=True
        ):
            whole[i] = x_NHA.transpose(0, 1)
    return *grads, None


KERNELS: dict[str, Callable] = {
    "torch_attn::_varlen_attn": varlen,
    "torch_attn::_varlen_attn_backward": varlen_backward,
    "aten::_scaled_dot_product_efficient_attention": efficient,
    "aten::_scaled_dot_product_efficient_attention_backward": efficient_backward,
}

# ---- torch.cuda as the project and torch's own code ask it


def pin_memory(x: torch.Tensor, *_: Any) -> torch.Tensor:
    copy = x.clone()
    copy.was_pinned = True
    return copy


def is_pinned(x: torch.Tensor, *_: Any) -> bool:
    return getattr(x, "was_pinned", False) or getattr(x._base, "was_pinned", False)


def install() -> None:
    """Make torch believe that one CUDA device is there."""
    stubs: dict[str, Callable] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "_lazy_init": lambda: None,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda _: None,
        "get_device_name": lambda *_: "emulated", "get_device_capability": lambda *_: (9, 0),
        "is_bf16_supported": lambda *_, **__: True, "mem_get_info": lambda *_: (2**36, 2**36),
        "synchronize": lambda *_: note("synchronize"), "manual_seed_all": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0,
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
    }  # fmt: skip
    for name, stub in stubs.items():
        setattr(torch.cuda, name, stub)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def main() -> None:
    if not IS_ON:
        return build_guard()
    import pytest

    install()
    with Device():
        raise SystemExit(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
