"""The fast denoiser under torch.compile, kept as a file so that the next job need not compile.

torch's own caches save code generation but not the tracing of the network, which takes seconds. The
file holds kernels and guards without weights. Like torch's caches it is unpickled, so its folder
must be as trusted as the code: it is written by the jobs themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from cap4d_core.diffusion import denoiser as denoiser_module
from cap4d_core.diffusion import denoiser_program, fast_denoiser
from cap4d_core.diffusion.fast_denoiser import FastDenoiser
from cap4d_core.files.basic import atomic_path

logger = logging.getLogger(__name__)

# Half-precision forms of one network differ by a few hundredths; wrong kernels by much more.
_PLAUSIBLE_DEVIATION = 0.1


class CompiledDenoiser:
    """Called like a FastDenoiser; compiled at the first call of each shape.

    Where compiling fails, or what it gives deviates from the network, the network itself runs.

    Args:
        denoiser: fast denoiser, on its device.
        folder: where compiled forms are kept; None = nowhere.
        options: for torch.compile.

    Attributes:
        is_compiled: False once compiling failed.
        was_loaded: whether the last form came from the folder.
    """

    def __init__(self, denoiser: FastDenoiser, folder: Path | None = None, **options: Any) -> None:
        self.denoiser = denoiser
        self.folder = folder
        self.options = {"dynamic": False, "fullgraph": True} | options
        self.is_compiled = True
        self.was_loaded = False
        self._calls: dict[str, Callable[..., Tensor]] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """As FastDenoiser."""
        signature = str(_describe(arguments))
        call = self._calls.get(signature)
        if call is None:
            call = self._calls[signature] = self._prepare(arguments, signature)
        return call(self.denoiser, *arguments)

    def _prepare(self, arguments: tuple[Any, ...], signature: str) -> Callable[..., Tensor]:
        expected = _run(self.denoiser, *arguments)
        file = self.folder / f"denoiser-{self._key(signature)}.bin" if self.folder else None
        if file is not None and file.exists():
            try:
                loaded = _load(file)
                _check(loaded(self.denoiser, *arguments), expected)
                self.was_loaded = True
                return loaded
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # made elsewhere, damaged
                logger.info("Compiling anew: %s cannot be used (%s).", file, _first_line(error))
        self.was_loaded = False
        for compile_ in (self._compile_to, self._compile):
            try:
                compiled = compile_(file, arguments)
                _check(compiled(self.denoiser, *arguments), expected)
                return compiled
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in many ways
                reason = _first_line(error)
                if compile_ == self._compile:
                    logger.warning("Sampling without compiled kernels: %s", reason)
                elif file is not None:
                    logger.info("Compiled kernels cannot be kept as a file: %s", reason)
        self.is_compiled = False
        return _run

    def _compile_to(self, file: Path | None, arguments: tuple[Any, ...]) -> Callable[..., Tensor]:
        if file is None:
            raise RuntimeError("no folder for it")
        with _ahead_of_time():
            function: Any = torch.compile(_run, **self.options)
            compiled = function.aot_compile(((self.denoiser, *arguments), {}))
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as temporary:
            compiled.save_compiled_function(str(temporary))
        return compiled

    def _compile(self, _: Path | None, __: tuple[Any, ...]) -> Callable[..., Tensor]:
        return torch.compile(_run, **self.options)

    def _key(self, signature: str) -> str:
        """Names everything that kernels depend on but the values of weights."""
        d = self.denoiser
        cuda = d.denoiser.device.type == "cuda"
        content = {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "tf32": torch.backends.cudnn.allow_tf32,
            "type": str(d.denoiser.dtype),
            "format": str(d.memory_format),
            "model": d.denoiser.config.to_dict(),
            "savings": str(d.savings),
            "merged": d.merge_upsampling,
            "arguments": signature,
            "options": str(self.options),
            "code": [
                hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
                for module in (denoiser_module, denoiser_program, fast_denoiser)
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _run(denoiser: FastDenoiser, *arguments: Any) -> Tensor:
    # The network is an argument, so that compiled code takes whichever weights it is given.
    return denoiser(*arguments)


def _load(file: Path) -> Callable[..., Tensor]:
    with file.open("rb") as stream:
        return torch.compiler.load_compiled_function(stream)  # type: ignore[attr-defined,no-any-return,unused-ignore]


def _ahead_of_time() -> AbstractContextManager[Any]:
    config: Any = torch._dynamo.config
    has_switch = hasattr(config, "enable_aot_compile")
    return config.patch(enable_aot_compile=True) if has_switch else nullcontext()


def _check(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError if the compiled network computes something else."""
    if not bool(torch.isfinite(expected).all()):
        return  # the sampler reports that
    deviation = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not deviation < _PLAUSIBLE_DEVIATION:
        raise RuntimeError(f"its result deviates from the network's by {deviation:.2g}")


def _describe(arguments: Any) -> Any:
    if isinstance(arguments, Tensor):
        return [list(arguments.shape), list(arguments.stride()), str(arguments.dtype)]
    if isinstance(arguments, tuple):
        return [_describe(part) for part in arguments]
    return arguments


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
