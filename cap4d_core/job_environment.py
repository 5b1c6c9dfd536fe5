"""What a job sets up before torch and numba are imported: thread counts, caches, versions.

Light: the standard library.
"""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

from cap4d_core import __version__

THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Versions of what decides the numbers; without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"cap4d_core": __version__, "Python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "diffusers", "gsplat"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def prepare_environment(threads: int) -> None:
    """Thread counts and caches of this process and its children."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    # Threads that wait sleep: spinning makes jobs many times slower where cores are shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("MPLBACKEND", "Agg")
    # Less fragmentation where one process holds network and images of changing size.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    set_numba_cache(os.environ)


def set_numba_cache(environment: Any, package: Path = Path(__file__).parent) -> None:
    """Sends numba's compiled loops to a folder of the user when the package may not be written."""
    if "NUMBA_CACHE_DIR" in environment or os.access(package, os.W_OK):
        return
    for root in (environment.get("XDG_CACHE_HOME"), "~/.cache", f"/tmp/cap4d-{os.getuid()}"):
        if not root:
            continue
        folder = Path(root).expanduser() / "cap4d" / "numba"
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                environment["NUMBA_CACHE_DIR"] = str(folder)
                return
