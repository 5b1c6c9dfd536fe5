"""Checkpoints of a shard, so that a killed job goes on where it was.

A checkpoint belongs to one computation, named by a fingerprint of everything that enters it. It is
never a result: the workflow does not know the file, and it is removed once the shard is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from cap4d_core.errors import InputFileError
from cap4d_core.files.basic import read_safetensors, write_safetensors

logger = logging.getLogger(__name__)


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of plain JSON content, independent of key order."""
    text = json.dumps(dict(content), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class SamplingCheckpoint:
    """One checkpoint file of latents.

    Args:
        path: the file; its folder is made when needed.
        fingerprint: of all inputs and settings of the computation.
        every_steps: a checkpoint is written after each step whose number + 1 is a multiple.
    """

    def __init__(self, path: str | Path, fingerprint: str, every_steps: int) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.every_steps = every_steps
        self._writing: Future[None] | None = None

    def load(
        self, first_step: int, end_step: int, shape: tuple[int, ...]
    ) -> tuple[int, Tensor, Tensor | None] | None:
        """Next step to run, the latents and what was predicted as clean before it.

        None to start anew; logs which and why.
        """
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_safetensors(self.path, "a sampling checkpoint")
        except InputFileError as error:
            logger.warning("Starting anew: %s", error)
            return None
        if metadata.get("fingerprint") != self.fingerprint:
            logger.warning("Starting anew: %s was made from other inputs or settings.", self.path)
            return None
        latents = tensors.get("latents")
        step = int(metadata.get("next_step", "-1"))
        if latents is None or tuple(latents.shape) != shape or not first_step < step <= end_step:
            logger.warning("Starting anew: %s does not hold what it should.", self.path)
            return None
        logger.info("Resuming at step %d from %s.", step, self.path)
        return step, latents, tensors.get("clean")

    def save_if_due(self, finished_step: int, latents: Tensor, clean: Tensor | None = None) -> None:
        """Writes the state after `finished_step` when that step is due.

        The state is copied at once and written by a thread, so that a GPU need not wait for a disk.

        Raises:
            OSError: the write before failed.
        """
        if (finished_step + 1) % self.every_steps == 0:
            self.wait()
            latents = latents.detach().to("cpu", copy=True)
            clean = None if clean is None else clean.detach().to("cpu", copy=True)
            pool = ThreadPoolExecutor(1)
            self._writing = pool.submit(self._write, finished_step, latents, clean)
            pool.shutdown(wait=False)

    def save(self, finished_step: int, latents: Tensor, clean: Tensor | None = None) -> None:
        """Writes the latents after `finished_step`; `clean` for solvers that need it.

        Raises:
            OSError: this write or the one before failed.
        """
        self.wait()
        self._write(finished_step, latents, clean)

    def _write(self, finished_step: int, latents: Tensor, clean: Tensor | None) -> None:
        write_safetensors(
            self.path,
            {"latents": latents} | ({} if clean is None else {"clean": clean}),
            {"fingerprint": self.fingerprint, "next_step": str(finished_step + 1)},
        )

    def wait(self) -> None:
        """Until what `save_if_due` started is written.

        Raises:
            OSError: it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def remove(self) -> None:
        """Deletes the file, after success, and what a job killed while writing left of it."""
        try:
            self.wait()
        except OSError as error:
            # The result is written, so nobody will need this checkpoint.
            logger.warning("The last checkpoint could not be written: %s", error)
        self.path.unlink(missing_ok=True)
        for unfinished in self.path.parent.glob(f"{self.path.stem}.tmp-*{self.path.suffix}"):
            unfinished.unlink(missing_ok=True)
