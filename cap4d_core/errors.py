"""Errors that a user can cause.

Each carries one message: which file or setting, what was found, what was expected, what to do.
`cap4d_core.job` prints it as a plain sentence; every other exception is shown with its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """Something the user can put right; shown without a traceback."""


class ConfigError(UserError):
    """The configuration or a table is not valid. Lists all problems at once."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{source} is not valid ({count}):", *self.problems]))


class InputFileError(UserError):
    """A file is missing, unreadable or not what was expected."""

    def __init__(self, path: str | Path, found: str, expected: str, hint: str = "") -> None:
        self.path = Path(path)
        message = f"{path}: found {found}; expected {expected}."
        super().__init__(f"{message} {hint}".rstrip())


class MissingAssetError(UserError):
    """A licensed or optional asset (head model, weights) is absent."""


class NoGpuError(UserError):
    """A GPU was asked for and none can be had."""


class DivergedError(UserError):
    """An optimisation produced NaN or exploded; the last good checkpoint is kept."""


class DeadlineError(UserError):
    """The job's time limit is near; long stages write a checkpoint before they pass this on."""
