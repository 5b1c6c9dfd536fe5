"""The fast denoiser as a library that is compiled ahead of time (AOTInductor).

The file holds kernels without weights. Loading it takes a fraction of a second, because nothing of
torch's compiler is imported. It runs as part of the job, so its folder must be as trusted as the
code; jobs write it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cap4d_core.diffusion.compiled_form import Call, check, describe
from cap4d_core.diffusion.denoiser import MMDMDenoiser
from cap4d_core.diffusion.denoiser_program import Savings
from cap4d_core.diffusion.fast_denoiser import FastDenoiser, ReferenceFeatures
from cap4d_core.diffusion.model_config import MMDMConfig
from cap4d_core.files.basic import atomic_path

SUFFIX = ".pt2"
# No weights in the file, neither as a copy nor, where they are a few numbers, as part of the code.
_OPTIONS = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}


def load(file: Path, denoiser: FastDenoiser, arguments: tuple[Any, ...]) -> Call:
    """The library in `file` with the weights of a network.

    Raises:
        Exception: damaged, or made elsewhere.
    """
    with zipfile.ZipFile(file) as archive:
        if (damaged := archive.testzip()) is not None:
            raise RuntimeError(f"{damaged} is damaged")
    return _Library(file, denoiser, arguments)


def make(
    file: Path, denoiser: FastDenoiser, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Call:
    """Compiles for arguments like these, tries the result, keeps it in `file`.

    What failed once on a machine is not tried again: a note stays beside the file.

    Raises:
        RuntimeError: it failed.
    """
    failed = file.with_suffix(".failed")
    if failed.exists():
        raise RuntimeError(f"an earlier attempt failed, see {failed}")
    try:
        with atomic_path(file) as temporary:
            compile_in_a_process(denoiser, arguments, temporary, _OPTIONS | options)
    except CompilerError as error:
        failed.write_text(f"{error}\nDelete this file to try again.\n", "utf-8")
        raise
    return load(file, denoiser, arguments)


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
        "arguments": describe(arguments),
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
        network = MMDMDenoiser(MMDMConfig.from_dict(request["config"], "request"))
        network = network.eval().requires_grad_(False).to(dtype=kind, memory_format=layout)  # type: ignore[call-overload]
        savings = Savings(**request["savings"])
        fast = FastDenoiser(network, savings, request["merge"], layout)
        latents, maps, biases, references, *others = _random(request["arguments"])
    if references is not None:
        references = ReferenceFeatures(*references)
    arguments = (latents, maps, biases, references, *others)
    if action == "try":
        check(_Library(file, fast, arguments)(*arguments), fast(*arguments))
        return
    from torch._inductor import aoti_compile_and_package

    program = torch.export.export(_Flat(fast, arguments), tuple(_tensors(arguments)))
    aoti_compile_and_package(program, package_path=str(file), inductor_configs=request["options"])


class _Library:
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


if __name__ == "__main__":
    _answer_request(sys.argv[1])
