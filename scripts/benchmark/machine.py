"""What the numbers of a benchmark were measured on, and with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from torch_softmax import __version__

from .measure import Place

RIVALS = ("cut-cross-entropy", "liger-kernel", "torchtune")


def machine(place: Place) -> dict[str, object]:
    """What the numbers were measured on, and with."""
    return {
        "device": processor() if place.device == "cpu" else accelerator(place),
        "cores": os.cpu_count(),
        "threads": place.threads,
        "dtype": str(place.dtype).removeprefix("torch."),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_softmax": __version__,
        "rivals": " ".join(f"{name}=={found}" for name in RIVALS if (found := installed(name))),
    }


def processor() -> str:
    """The model of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def accelerator(place: Place) -> str:
    """The model of the GPU."""
    return torch.cuda.get_device_name() if place.device == "cuda" else place.device


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
