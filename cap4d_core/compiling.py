"""Whether torch can compile here, and where it keeps compiled kernels."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch

from cap4d_core.batch.asset_cache import compiled_folder

logger = logging.getLogger(__name__)

# Compute capability of CUDA devices for which Triton generates code.
_LEAST_CAPABILITY = (7, 0)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile, and Triton on CUDA, have what they need for a device."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None or device.type != "cuda":
        return compiler is not None
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def use_compile_cache(folder: Path) -> Path | None:
    """Keeps compiled kernels in a subfolder for this GPU and torch.

    Args:
        folder: where, unless the user set TORCHINDUCTOR_CACHE_DIR or has a cache between workflows.

    Returns:
        The subfolder, None if it cannot be written.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    kind = "cpu"
    if torch.cuda.is_available():
        kind = "sm" + "".join(map(str, torch.cuda.get_device_capability()))
    target = (compiled_folder() or folder) / f"{kind}-torch{torch.__version__}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        writable = os.access(target, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        logger.info("Compiled kernels are not kept: %s cannot be written.", target)
        return None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(target.resolve())
    # Of kernels that are not made by torch's compiler; by default in the home folder.
    os.environ.setdefault("TRITON_CACHE_DIR", str(target.resolve() / "triton"))
    return target
