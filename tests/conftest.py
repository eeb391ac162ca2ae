"""What the tests could not compare is said at the end; the GPU is hidden without `-m gpu`."""

import os
import re
from collections import Counter
from collections.abc import Iterable


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
