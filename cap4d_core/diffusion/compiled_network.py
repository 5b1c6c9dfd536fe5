"""A network under torch.compile, kept as a file so that the next job need not compile.

torch's own caches save code generation but not the tracing of the network, which takes seconds. The
file holds kernels without weights and ends in its checksum. Like torch's caches it is unpickled, so
its folder must be as trusted as the code: it is written by the jobs themselves.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.files.basic import atomic_path
from cap4d_core.locks import wait_for_lock

logger = logging.getLogger(__name__)

_SUFFIX = ".bin"
# Half-precision forms of one network differ by a few hundredths; wrong kernels by much more.
_PLAUSIBLE_DEVIATION = 0.1

Call = Callable[..., Tensor]


class CompiledNetwork:
    """Called like the network; compiled at the first call of each shape.

    Where compiling fails, or what it gives deviates from the network, the network itself runs.

    Args:
        name: what files are called after.
        network: on its device, in its final type and layout.
        depends_on: plain JSON types: all that kernels depend on besides arguments, device and
            `code`, but not the values of weights.
        code: modules whose source the network is made of.
        folder: where compiled forms are kept; None = nowhere.
        options: for torch's inductor, e.g. `coordinate_descent_tuning`.

    Attributes:
        is_compiled: False once compiling failed.
        was_loaded: whether the last form came from the folder.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        depends_on: Mapping[str, Any],
        code: Sequence[ModuleType],
        folder: Path | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.network = network
        self.depends_on = depends_on
        self.code = code
        self.folder = folder
        self.options = options
        self.is_compiled = True
        self.was_loaded = False
        self._calls: dict[str, Call] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """As the network."""
        signature = json.dumps(describe(arguments))
        if (call := self._calls.get(signature)) is not None:
            return call(*arguments)
        self._calls[signature], result = self._prepare(arguments, signature)
        return result

    def _prepare(self, arguments: tuple[Any, ...], signature: str) -> tuple[Call, Tensor]:
        """What to call for such arguments, and its result for these."""
        with nullcontext(self.folder) if self.folder else tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{self.name}-{self._key(signature)}{_SUFFIX}"
            if (loaded := self._load(file, arguments)) is not None:
                return loaded
            expected = self.network(*arguments)
            for compile_ in (self._compile_to, self._compile):
                try:
                    return compile_(file, arguments, expected)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # compilers fail in many ways
                    reason = first_line(error)
                    if compile_ == self._compile:
                        logger.warning(
                            "The %s runs without compiled kernels: %s", self.name, reason
                        )
                    else:
                        logger.info("Compiled kernels cannot be kept as a file: %s", reason)
        self.is_compiled = False
        return self.network, expected

    def _load(self, file: Path, arguments: tuple[Any, ...]) -> tuple[Call, Tensor] | None:
        """The form kept in `file`; None if there is none that can be used.

        Its results were compared with the network's before it was written: running the network
        here as well would take a part of the few seconds that a job needs to start.
        """
        if not file.exists():
            return None
        try:
            stream = io.BytesIO(_without_checksum(file.read_bytes()))
            function = torch.compiler.load_compiled_function(stream)  # type: ignore[attr-defined,unused-ignore]
            call = self._with_weights(function)
            result = call(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # made elsewhere, damaged
            logger.info("Compiling anew: %s cannot be used (%s).", file, first_line(error))
            return None
        self.was_loaded = True
        return call, result

    def _compile_to(
        self, file: Path, arguments: tuple[Any, ...], expected: Tensor
    ) -> tuple[Call, Tensor]:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Jobs that start together need not all compile the same.
        lock = wait_for_lock(file.with_suffix(".lock"), logger.info)
        try:
            if (loaded := self._load(file, arguments)) is not None:
                return loaded
            self.was_loaded = False
            # The file's key and the signature say all that guards would check, and some guards
            # cannot be written.
            with _ahead_of_time():
                compiler = self._torch_compiled(guard_filter_fn=_no_guards)
                traced: Any = compiler.aot_compile(((self.network, *arguments), {}))
            made = self._checked(traced, arguments, expected)
            with atomic_path(file) as temporary:
                traced.save_compiled_function(str(temporary))
                temporary.write_bytes(_with_checksum(temporary.read_bytes()))
            return made
        finally:
            lock.release()

    def _compile(
        self, _: Path, arguments: tuple[Any, ...], expected: Tensor
    ) -> tuple[Call, Tensor]:
        self.was_loaded = False
        return self._checked(self._torch_compiled(), arguments, expected)

    def _checked(
        self, function: Any, arguments: tuple[Any, ...], expected: Tensor
    ) -> tuple[Call, Tensor]:
        call = self._with_weights(function)
        result = call(*arguments)
        check(result, expected)
        return call, result

    def _torch_compiled(self, **options: Any) -> Any:
        options = self.options | options
        return torch.compile(_run, dynamic=False, fullgraph=True, options=options or None)

    def _with_weights(self, function: Any) -> Call:
        return lambda *arguments: function(self.network, *arguments)

    def _key(self, signature: str) -> str:
        """Names everything that kernels depend on but the values of weights."""
        cuda = next(self.network.parameters()).device.type == "cuda"
        content = {
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "libraries": [torch.version.cuda, torch.backends.cudnn.version()] if cuda else [],
            "tf32": torch.backends.cudnn.allow_tf32,
            "network": dict(self.depends_on),
            "arguments": signature,
            "options": str(self.options),
            "code": [
                hashlib.sha256(Path(file).read_bytes()).hexdigest()
                for file in [__file__, *(str(module.__file__) for module in self.code)]
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def check(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError if the compiled network computes something else."""
    if not bool(torch.isfinite(expected).all()):
        return  # whoever uses it reports that
    deviation = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not deviation < _PLAUSIBLE_DEVIATION:
        raise RuntimeError(f"its result deviates from the network's by {deviation:.2g}")


def describe(arguments: Any) -> Any:
    """Plain JSON types; what values of tensors are does not matter."""
    if isinstance(arguments, Tensor):
        kind = str(arguments.dtype).removeprefix("torch.")
        return {"shape": list(arguments.shape), "stride": list(arguments.stride()), "type": kind}
    if isinstance(arguments, tuple):
        return [describe(part) for part in arguments]
    return arguments


def _run(network: nn.Module, *arguments: Any) -> Tensor:
    # The network is an argument, so that compiled code takes whichever weights it is given.
    result: Tensor = network(*arguments)
    return result


def _no_guards(guards: Sequence[Any]) -> list[bool]:
    return [False] * len(guards)


def _ahead_of_time() -> AbstractContextManager[Any]:
    import torch._dynamo

    config: Any = torch._dynamo.config
    has_switch = hasattr(config, "enable_aot_compile")
    return config.patch(enable_aot_compile=True) if has_switch else nullcontext()


def _with_checksum(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def _without_checksum(content: bytes) -> bytes:
    """Raises ValueError if the content is not what was written."""
    rest = content[: -hashlib.sha256().digest_size]
    if _with_checksum(rest) != content:
        raise ValueError("its checksum is wrong")
    return rest


def first_line(error: Exception) -> str:
    """What a compiler's error says first, for a log."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
