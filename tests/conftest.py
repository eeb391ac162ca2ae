"""The GPU is hidden from all tests but those of `pytest -m gpu`, from their processes, too."""

import os
import re


def pytest_configure(config):
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
