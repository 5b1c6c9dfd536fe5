"""A fit that tests kill, see `killable`."""

from __future__ import annotations

from cap4d_core.avatar.fitting import fit_avatar
from cap4d_core.flame.model import HeadModel
from cap4d_core.settings import FittingSettings
from tests.core.killable import serve, tell


def run(arguments: list[str]) -> None:
    """Fits, telling every iteration."""
    head_model, output, settings, *image_sets = arguments
    fit_avatar(
        image_sets, HeadModel.load(head_model, lower_jaw=True),
        FittingSettings.model_validate_json(settings), output, tell,
    )  # fmt: skip


if __name__ == "__main__":
    serve(run)
