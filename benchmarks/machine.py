"""What every result file says about where it comes from."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch


def machine(*packages: str) -> dict[str, Any]:
    """Return date, processor, thread count and versions."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", *packages)},
    }
