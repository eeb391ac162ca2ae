"""What all tests share."""

import os
import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "repeat_interleave", "bincount")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a CUDA device: it asks for values, shapes or copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        is_mask = any(x.dtype == torch.bool for x in tree_leaves(args[1:2]) if hasattr(x, "dtype"))
        waits = name in WAITING or (name.startswith("index") and is_mask)
        assert (not waits and (kwargs or {}).get("device") is None) or name in MADE_THERE, func
        return func(*args, **(kwargs or {}))


# constructors take a device, too
MADE_THERE = ("arange", "empty", "zeros", "ones", "full", "eye", "triu_indices", "scalar_tensor",
              "empty_like", "zeros_like", "ones_like", "new_zeros", "new_empty", "new_ones",
              "empty_strided", "new_empty_strided", "new_full", "full_like")  # fmt: skip


def pytest_configure(config) -> None:
    hide_gpu(config)


def hide_gpu(config) -> None:
    """From all tests but those of `pytest -m gpu`, and from the processes that they start."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
