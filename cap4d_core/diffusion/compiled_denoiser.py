"""The fast denoiser under torch.compile, kept as a file so that the next job need not compile.

torch's own caches save code generation but not the tracing of the network, which takes seconds. The
file holds kernels and guards without weights. Like torch's caches it is unpickled, so its folder
must be as trusted as the code: it is written by the jobs themselves. The other form, which loads
faster, is in `denoiser_library`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cap4d_core.diffusion import (
    compiled_form,
    denoiser_library,
    denoiser_program,
    fast_denoiser,
)
from cap4d_core.diffusion import denoiser as denoiser_module
from cap4d_core.diffusion.compiled_form import Call, check, describe
from cap4d_core.diffusion.fast_denoiser import FastDenoiser
from cap4d_core.files.basic import atomic_path
from cap4d_core.locks import wait_for_lock

logger = logging.getLogger(__name__)

_SUFFIX = ".bin"


class CompiledDenoiser:
    """Called like a FastDenoiser; compiled at the first call of each shape.

    Where compiling fails, or what it gives deviates from the network, the network itself runs.

    Args:
        denoiser: fast denoiser, on its device.
        folder: where compiled forms are kept; None = nowhere.
        library: compile to a library that loads at once, see `denoiser_library`.
        options: for torch's inductor, e.g. `coordinate_descent_tuning`.

    Attributes:
        is_compiled: False once compiling failed.
        was_loaded: whether the last form came from the folder.
    """

    def __init__(
        self,
        denoiser: FastDenoiser,
        folder: Path | None = None,
        library: bool = False,
        **options: Any,
    ) -> None:
        self.denoiser = denoiser
        self.folder = folder
        self.library = library
        self.options = options
        self.is_compiled = True
        self.was_loaded = False
        self._calls: dict[str, Call] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """As FastDenoiser."""
        signature = json.dumps(describe(arguments))
        call = self._calls.get(signature)
        if call is None:
            call = self._calls[signature] = self._prepare(arguments, signature)
        return call(*arguments)

    def _prepare(self, arguments: tuple[Any, ...], signature: str) -> Call:
        suffix = denoiser_library.SUFFIX if self.library else _SUFFIX
        with nullcontext(self.folder) if self.folder else tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"denoiser-{self._key(signature)}{suffix}"
            if (loaded := self._load(file, arguments)) is not None:
                return loaded
            expected = self.denoiser(*arguments)
            for compile_ in (self._compile_to, self._compile):
                try:
                    compiled = compile_(file, arguments)
                    check(compiled(*arguments), expected)
                    return compiled
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # compilers fail in many ways
                    file.unlink(missing_ok=True)
                    reason = _first_line(error)
                    if compile_ == self._compile:
                        logger.warning("Sampling without compiled kernels: %s", reason)
                    else:
                        logger.info("Compiled kernels cannot be kept as a file: %s", reason)
        self.is_compiled = False
        return self.denoiser

    def _load(self, file: Path, arguments: tuple[Any, ...]) -> Call | None:
        """The form kept in `file`; None if there is none that can be used."""
        if not file.exists():
            return None
        try:
            if self.library:
                call = denoiser_library.load(file, self.denoiser, arguments)
            else:
                call = self._load_traced(file)
                check(call(*arguments), self.denoiser(*arguments))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # made elsewhere, damaged
            logger.info("Compiling anew: %s cannot be used (%s).", file, _first_line(error))
            return None
        self.was_loaded = True
        return call

    def _compile_to(self, file: Path, arguments: tuple[Any, ...]) -> Call:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Jobs that start together need not all compile the same.
        lock = wait_for_lock(file.with_suffix(".lock"), logger.info)
        try:
            if (loaded := self._load(file, arguments)) is not None:
                return loaded
            self.was_loaded = False
            if self.library:
                return denoiser_library.make(file, self.denoiser, arguments, self.options)
            with _ahead_of_time():
                traced: Any = self._torch_compiled().aot_compile(((self.denoiser, *arguments), {}))
            with atomic_path(file) as temporary:
                traced.save_compiled_function(str(temporary))
            return self._with_weights(traced)
        finally:
            lock.release()

    def _compile(self, _: Path, __: tuple[Any, ...]) -> Call:
        self.was_loaded = False
        return self._with_weights(self._torch_compiled())

    def _torch_compiled(self) -> Any:
        options = self.options or None
        return torch.compile(_run, dynamic=False, fullgraph=True, options=options)

    def _load_traced(self, file: Path) -> Call:
        with file.open("rb") as stream:
            return self._with_weights(torch.compiler.load_compiled_function(stream))  # type: ignore[attr-defined,unused-ignore]

    def _with_weights(self, function: Any) -> Call:
        return lambda *arguments: function(self.denoiser, *arguments)

    def _key(self, signature: str) -> str:
        """Names everything that kernels depend on but the values of weights."""
        d = self.denoiser
        cuda = d.denoiser.device.type == "cuda"
        content = {
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
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
                for module in (
                    denoiser_module,
                    denoiser_program,
                    fast_denoiser,
                    denoiser_library,
                    compiled_form,
                )
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _run(denoiser: FastDenoiser, *arguments: Any) -> Tensor:
    # The network is an argument, so that compiled code takes whichever weights it is given.
    return denoiser(*arguments)


def _ahead_of_time() -> AbstractContextManager[Any]:
    import torch._dynamo

    config: Any = torch._dynamo.config
    has_switch = hasattr(config, "enable_aot_compile")
    return config.patch(enable_aot_compile=True) if has_switch else nullcontext()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
