"""What all tests share."""

import os


def pytest_configure(config) -> None:
    hide_gpu(config)


def hide_gpu(config) -> None:
    """Tests run on the CPU wherever they run, but for those that `-m gpu` asks for."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
