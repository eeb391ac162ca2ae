"""What the tests could not compare is said at the end; the GPU is hidden without `-m gpu`."""

import os
import re
from collections import Counter
from collections.abc import Iterable

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


def missing_line(reasons: Iterable[str]) -> str:
    """Why tests were skipped -> the packages that were missing, each with its number of tests."""
    found = (re.search(r"could not import '(\w+)", reason) for reason in reasons)
    counts = Counter(match[1] for match in found if match)
    names = ", ".join(f"{name} ({n} test{'s' * (n > 1)})" for name, n in sorted(counts.items()))
    return f"not compared, for want of {names}: pip install -r requirements-dev.txt" * bool(counts)


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = [str(r.longrepr[2] if isinstance(r.longrepr, tuple) else r.longrepr) for r in skipped]
    if line := missing_line(reasons):
        terminalreporter.write_line(line, yellow=True)


def pytest_configure(config) -> None:
    """The GPU is hidden from all tests but those of `pytest -m gpu`, from their processes, too."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
