"""Which machine this is, as far as the time of a layer depends on it."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def this_machine(gpu: bool = False) -> dict[str, Any]:
    """Name of the CPU, cores that this process may use, system; the GPU's name if asked for.

    >>> sorted(this_machine())
    ['cores', 'cpu', 'gpu', 'system']
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": _cpu(), "cores": cores, "system": system, "gpu": _gpu() if gpu else None}


def _cpu() -> str:
    for path, starts in (("/proc/cpuinfo", ("model name", "Model")), ("/proc/device-tree/model", ("",))):
        try:
            lines = Path(path).read_text(errors="replace").splitlines()
        except OSError:
            continue
        for start in starts:
            for line in lines:
                if line.startswith(start):
                    return line.partition(":")[2].strip() or line.strip("\0 ")
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
