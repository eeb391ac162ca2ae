"""What all tests share."""

import os
import re


def pytest_configure(config) -> None:
    hide_gpu(config)


def hide_gpu(config) -> None:
    """From all tests but those of `pytest -m gpu`, and from the processes that they start."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
