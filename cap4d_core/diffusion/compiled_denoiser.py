"""The fast denoiser compiled ahead of time (AOTInductor), kept as a file for later jobs.

The file holds kernels without weights. Loading it takes a fraction of a second, because nothing of
torch's compiler is imported; torch's own caches would still trace the network anew. It is a library
that runs as part of the job, so its folder must be as trusted as the code; jobs write it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion import denoiser as denoiser_module
from cap4d_core.diffusion import denoiser_program, fast_denoiser
from cap4d_core.diffusion.denoiser_program import Savings
from cap4d_core.diffusion.fast_denoiser import FastDenoiser, ReferenceFeatures
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.files.basic import atomic_path
from cap4d_core.locks import wait_for_lock

logger = logging.getLogger(__name__)

# Half-precision forms of one network differ by a few hundredths; wrong kernels by much more.
_PLAUSIBLE_DEVIATION = 0.1
# No weights in the file, neither as a copy nor, where they are a few numbers, as part of the code.
_OPTIONS = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}

Call = Callable[..., Tensor]


class CompiledDenoiser:
    """Called like a FastDenoiser; compiled at the first call of each shape.

    Where compiling fails, or what it gives deviates from the network, the network itself runs.

    Args:
        denoiser: fast denoiser, on its device.
        folder: where compiled forms are kept; None = nowhere.
        options: for torch's inductor, e.g. `coordinate_descent_tuning`.

    Attributes:
        is_compiled: False once compiling failed.
        was_loaded: whether the last form came from the folder.
    """

    def __init__(self, denoiser: FastDenoiser, folder: Path | None = None, **options: Any) -> None:
        self.denoiser = denoiser
        self.folder = folder
        self.options = _OPTIONS | options
        self.is_compiled = True
        self.was_loaded = False
        self._calls: dict[str, Call] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """As FastDenoiser."""
        signature = str(_describe(arguments))
        call = self._calls.get(signature)
        if call is None:
            call = self._calls[signature] = self._prepare(arguments, signature)
        return call(*arguments)

    def _prepare(self, arguments: tuple[Any, ...], signature: str) -> Call:
        with nullcontext(self.folder) if self.folder else tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"denoiser-{self._key(signature)}.pt2"
            if (loaded := self._load(file, arguments)) is not None:
                return loaded
            expected = self.denoiser(*arguments)
            for compile_ in (self._compile_to, self._compile):
                try:
                    compiled = compile_(file, arguments)
                    _check(compiled(*arguments), expected)
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
            with zipfile.ZipFile(file) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise RuntimeError(f"{damaged} is damaged")
            call = _Package(file, self.denoiser, arguments)
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
            failed = file.with_suffix(".failed")
            if failed.exists():
                raise RuntimeError(f"an earlier attempt failed, see {failed}")
            try:
                with atomic_path(file) as temporary:
                    compile_in_a_process(self.denoiser, arguments, temporary, self.options)
            except CompilerError as error:
                failed.write_text(f"{error}\nDelete this file to try again.\n", "utf-8")
                raise
        finally:
            lock.release()
        return _Package(file, self.denoiser, arguments)

    def _compile(self, _: Path, __: tuple[Any, ...]) -> Call:
        self.was_loaded = False
        options = {k: v for k, v in self.options.items() if k not in _OPTIONS}
        compiled: Call = torch.compile(
            self.denoiser.forward, dynamic=False, fullgraph=True, options=options
        )
        return compiled

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
                for module in (denoiser_module, denoiser_program, fast_denoiser)
            ]
            + [hashlib.sha256(Path(__file__).read_bytes()).hexdigest()],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class CompilerError(RuntimeError):
    """Compiling fails on this machine, and would again."""


def compile_in_a_process(
    denoiser: FastDenoiser, arguments: tuple[Any, ...], file: Path, options: dict[str, Any]
) -> None:
    """Compiles the network for arguments like these into `file`, which must end in .pt2.

    In a process of its own, and a second one runs the result once on random weights and compares:
    native code that crashes does not take the job along, and the compiler gives back its memory.

    Raises:
        CompilerError: it failed or crashed, or the result computes something else than the network.
        RuntimeError: it was killed, or there was too little memory or disk.
    """
    network = denoiser.denoiser
    request = {
        "file": str(file),
        "config": network.config.to_dict(),
        "device": str(network.device),
        "type": str(network.dtype).removeprefix("torch."),
        "format": str(denoiser.memory_format).removeprefix("torch."),
        "savings": asdict(denoiser.savings),
        "merge": denoiser.merge_upsampling,
        "arguments": _describe(arguments),
        "options": options,
    }
    for action in ("compile", "try"):
        _in_a_process(action, request)


def _in_a_process(action: str, request: dict[str, Any]) -> None:
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", __name__, action],
        input=json.dumps(request),
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return
    text = done.stderr.strip() or "no message"
    what = "the compiler" if action == "compile" else "the compiled network"
    if done.returncode < 0:
        text = f"{what} was ended by {signal.Signals(-done.returncode).name}\n{text}"
    else:
        text = f"{what}: {text.splitlines()[-1]}\n{text}"
    killed = -done.returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if killed or "OutOfMemory" in text or "No space left" in text:
        raise RuntimeError(text)
    raise CompilerError(text)


@torch.no_grad()
def _answer_request(action: str) -> None:
    """What the processes of `compile_in_a_process` do."""
    request = json.load(sys.stdin)
    file = Path(request["file"])
    device, kind = torch.device(request["device"]), getattr(torch, request["type"])
    layout = getattr(torch, request["format"])
    torch.manual_seed(0)
    with torch.device(device):
        network = denoiser_module.MMDMDenoiser(MMDMConfig.from_dict(request["config"], "request"))
        network = network.eval().requires_grad_(False).to(dtype=kind, memory_format=layout)  # type: ignore[call-overload]
        savings = Savings(**request["savings"])
        fast = FastDenoiser(network, savings, request["merge"], layout)
        latents, maps, biases, references, *others = _random(request["arguments"])
    if references is not None:
        references = ReferenceFeatures(*references)
    arguments = (latents, maps, biases, references, *others)
    if action == "try":
        _check(_Package(file, fast, arguments)(*arguments), fast(*arguments))
        return
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(_Flat(fast, arguments), tuple(_tensors(arguments)))
    aoti_compile_and_package(program, package_path=str(file), inductor_configs=request["options"])


class _Package:
    """A compiled file with the weights of a network."""

    def __init__(self, file: Path, denoiser: FastDenoiser, arguments: tuple[Any, ...]) -> None:
        flat = _Flat(denoiser, arguments)
        # The class behind torch._inductor.aoti_load_package, which would import the compiler.
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(file), "model", True, 1, -1)
        weights: dict[str, Tensor] = dict(flat.named_parameters(remove_duplicate=False))
        weights |= dict(flat.named_buffers(remove_duplicate=False))
        self.weights = {name: weights[name] for name in self.loader.get_constant_fqns()}
        # Not a copy of the weights, so the file's code sees them as long as `self` lives.
        self.loader.load_constants(self.weights, False, True, True)

    def __call__(self, *arguments: Any) -> Tensor:
        result: Tensor = self.loader.run(_tensors(arguments))[0]
        return result


class _Flat(nn.Module):
    """The network as a function of tensors alone."""

    def __init__(self, denoiser: FastDenoiser, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.denoiser = denoiser
        references = arguments[3]
        self.branches = 0 if references is None else len(references.hidden)
        self.others = arguments[4:]

    def forward(self, latents: Tensor, maps: Tensor, biases: Tensor, *features: Tensor) -> Tensor:
        references = None
        if self.branches:
            groups = [
                features[i : i + self.branches] for i in range(0, len(features), self.branches)
            ]
            references = ReferenceFeatures(groups[0], tuple(groups[1:]))
        return self.denoiser(latents, maps, biases, references, *self.others)


def _tensors(arguments: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of a call, in the order of `_Flat`."""
    references = arguments[3]
    features = [] if references is None else [references.hidden, *references.skips]
    return [*arguments[:3], *(tensor for branches in features for tensor in branches)]


def _check(actual: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError if the compiled network computes something else."""
    if not bool(torch.isfinite(expected).all()):
        return  # the sampler reports that
    deviation = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not deviation < _PLAUSIBLE_DEVIATION:
        raise RuntimeError(f"its result deviates from the network's by {deviation:.2g}")


def _describe(arguments: Any) -> Any:
    """Plain JSON types; what values of tensors are does not matter."""
    if isinstance(arguments, Tensor):
        kind = str(arguments.dtype).removeprefix("torch.")
        return {"shape": list(arguments.shape), "stride": list(arguments.stride()), "type": kind}
    if isinstance(arguments, tuple):
        return [_describe(part) for part in arguments]
    return arguments


def _random(description: Any) -> Any:
    """Arguments of this description, on the default device."""
    if isinstance(description, dict):
        shape, stride = description["shape"], description["stride"]
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        values = torch.randn(size, dtype=getattr(torch, description["type"]))
        return values.as_strided(shape, stride)
    if isinstance(description, list):
        return tuple(_random(part) for part in description)
    return description


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


if __name__ == "__main__":
    _answer_request(sys.argv[1])
