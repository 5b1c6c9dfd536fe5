"""The training loop of both networks: optimizer, averages, resumable state, metrics."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cap4d_core.diffusion.training.averaging import WeightAverage
from cap4d_core.diffusion.training.pace import Pace
from cap4d_core.diffusion.training.processes import Group
from cap4d_core.errors import DivergedError, InputFileError
from cap4d_core.files.basic import atomic_path
from cap4d_core.progress import Progress, ProgressCallback, format_duration
from cap4d_core.training_settings import OptimizerSettings

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
# Losses of a batch by name; `loss` is what is minimised.
LossTerms = dict[str, Tensor]
# Called with the network and the number of the batch.
LossFunction = Callable[[Callable[..., Any], int], LossTerms]


@dataclass(frozen=True)
class Machine:
    """How to compute.

    Attributes:
        device: where.
        mixed_precision: bfloat16 autocast.
        compile: torch.compile; falls back to plain execution where that fails.
        group: of processes.
    """

    device: torch.device
    mixed_precision: bool = False
    compile: bool = False
    group: Group = field(default_factory=Group)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Context of the forward pass."""
        if not self.mixed_precision:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class Trainer:
    """Trains one network.

    Args:
        name: in logs and metrics.
        module: the network, on the device; its parameters are changed in place.
        loss: terms of one batch.
        settings: optimizer, sizes and intervals.
        machine: how to compute.
        pace: where the run is.
        state_file: resumable state; written atomically.
        metrics_file: one JSON object per line is appended; None writes none.
        fingerprint: what a state must have been made with to be resumed.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss: LossFunction,
        settings: OptimizerSettings,
        machine: Machine,
        pace: Pace,
        state_file: Path,
        metrics_file: Path | None,
        fingerprint: str,
    ) -> None:
        self.name, self.module, self.loss = name, module, loss
        self.settings, self.machine, self.pace = settings, machine, pace
        self.state_file, self.metrics_file = state_file, metrics_file
        self.fingerprint = fingerprint
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=machine.device.type == "cuda",
        )
        network: Any = module
        if machine.compile:
            from torch import _dynamo

            _dynamo.config.suppress_errors = True
            network = torch.compile(module, dynamic=False)
        if machine.group.size > 1:
            index = machine.device.index
            # Also gives all processes the weights of the first.
            network = DistributedDataParallel(network, None if index is None else [index])
        self.network = network
        self.average = WeightAverage(module, settings.ema_decay)
        self.last_metrics: dict[str, float] = {}

    # State ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the resumable state; the first process only."""
        if not self.machine.group.is_first:
            return
        with atomic_path(self.state_file) as temporary:
            torch.save(
                {
                    "fingerprint": self.fingerprint,
                    "step": self.pace.step,
                    "seconds": self.pace.elapsed,
                    "first_step": self.pace.first_step,
                    "first_seconds": self.pace.first_seconds,
                    "module": self.module.state_dict(),
                    "average": self.average.state(),
                    "updates": self.average.updates,
                    "optimizer": self.optimizer.state_dict(),
                },
                temporary,
            )

    def resume(self) -> bool:
        """Takes up the state file if it belongs to this run; says whether it did.

        Raises:
            InputFileError: a damaged file.
        """
        if not self.state_file.is_file():
            return False
        try:
            # Tensors and plain types only; runs no code from the file.
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputFileError(
                self.state_file,
                f"an unreadable state ({type(error).__name__})",
                "a training state",
                "Delete it to start over.",
            ) from None
        if state["fingerprint"] != self.fingerprint:
            kept = self.state_file.with_suffix(f".old{self.state_file.suffix}")
            logger.warning(
                "%s: data, model or settings changed; starting over. The state is kept as %s.",
                self.state_file, kept.name,
            )  # fmt: skip
            if self.machine.group.is_first:
                os.replace(self.state_file, kept)
            return False
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load(state["average"], state["updates"])
        for name in ("step", "seconds", "first_step", "first_seconds"):
            setattr(self.pace, name, state[name])
        logger.info("%s: resumed at step %d.", self.name, self.pace.step)
        return True

    # Loop ----------------------------------------------------------------------------------------

    def step(self) -> LossTerms:
        """One optimizer step; mean terms of its batches, not waited for."""
        accumulate = self.settings.accumulate
        total: LossTerms = {}
        for k in range(accumulate):
            with self._without_sync(k < accumulate - 1):
                with self.machine.autocast():
                    terms = self.loss(self.network, self.pace.step * accumulate + k)
                (terms["loss"] / accumulate).backward()
            for name, value in terms.items():
                total[name] = total.get(name, 0.0) + value.detach().float() / accumulate
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_gradient)
        for group in self.optimizer.param_groups:
            group["lr"] = self.pace.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update()
        self.pace.step += 1
        return total

    def run(
        self,
        callback: ProgressCallback | None = None,
        sample: Callable[[int], None] | None = None,
        sample_every: int = 0,
        is_interrupted: Callable[[], bool] | None = None,
    ) -> bool:
        """Trains until the run or the slice is over, saving states on the way.

        Sampling counts as training time.

        Args:
            callback: called after every step.
            sample: called with the step number, with averaged weights in the network.
            sample_every: steps between those calls.
            is_interrupted: asked before every step; true ends this call early, without a state.
                Not for several processes: they would wait for one another.

        Returns:
            Whether the run is complete.
        """
        pace, settings, group = self.pace, self.settings, self.machine.group
        sums: LossTerms = {}
        count, since, printed = 0, time.monotonic(), time.monotonic()
        pace.start()
        while not self._is_over():
            if is_interrupted is not None and is_interrupted():
                pace.pause()
                return False
            for name, value in self.step().items():
                sums[name] = sums[name] + value if name in sums else value
            count += 1
            now = time.monotonic()
            is_due = pace.step % settings.log_every == 0
            is_loud = now - printed >= LOG_SECONDS or pace.step <= 1
            # Clocks differ, and means over several processes need all of them.
            if is_due or (is_loud and group.size == 1):
                means = {name: float(value) / count for name, value in sums.items()}
                means = group.mean(means, self.machine.device)
                now = time.monotonic()
                rate = (
                    count * settings.batch_size * settings.accumulate * group.size / (now - since)
                )
                self._record(means, rate, is_loud)
                printed = now if is_loud else printed
                sums, count, since = {}, 0, now
            if callback is not None:
                callback(Progress(pace.step, settings.steps, "step", self.last_metrics))
            if pace.step % settings.checkpoint_every == 0:
                self.save()
            if sample is not None and sample_every and pace.step % sample_every == 0:
                with self.averaged():
                    sample(pace.step)
        pace.pause()
        self.save()
        group.wait()
        return pace.is_done

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the network, evaluation mode; the others are put back after."""
        kept = [p.detach().clone() for p in self.average.sources]
        with torch.no_grad():
            torch._foreach_copy_(self.average.sources, self.average.values)
        self.module.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.average.sources, kept)
            self.module.train()

    def _is_over(self) -> bool:
        """Whether to stop, as the first process sees it; clocks of the others follow its own."""
        pace, group = self.pace, self.machine.group
        pace.follow(None)
        over, elapsed = group.agree([pace.is_slice_over, pace.elapsed], self.machine.device)
        if group.size > 1:
            pace.follow(elapsed)
        return bool(over)

    def _without_sync(self, is_partial: bool) -> contextlib.AbstractContextManager[Any]:
        if is_partial and self.machine.group.size > 1:
            context: contextlib.AbstractContextManager[Any] = self.network.no_sync()
            return context
        return contextlib.nullcontext()

    def _record(self, means: dict[str, float], rate: float, is_loud: bool) -> None:
        if not all(math.isfinite(value) for value in means.values()):
            raise DivergedError(
                f"{self.name}: the loss is not finite at step {self.pace.step} "
                f"({means}). Lower the learning rate, or check the data."
            )
        self.last_metrics = means
        if not self.machine.group.is_first:
            return
        pace = self.pace
        entry = {
            "phase": self.name,
            "step": pace.step,
            "seconds": round(pace.elapsed, 2),
            "progress": round(pace.progress, 5),
            "learning_rate": pace.learning_rate(),
            "samples_per_second": round(rate, 2),
            **means,
        }
        if self.metrics_file is not None:
            self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.metrics_file, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(entry) + "\n")
        if is_loud:
            left = pace.elapsed * (1 - pace.progress) / max(pace.progress, 1e-9)
            logger.info(
                "%s: step %d (%.1f %%), %s, lr %.2g, %.1f samples/s, %s left",
                self.name,
                pace.step,
                100 * pace.progress,
                ", ".join(f"{name} {value:.4g}" for name, value in means.items()),
                pace.learning_rate(),
                rate,
                format_duration(left),
            )
