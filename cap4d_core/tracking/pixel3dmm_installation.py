"""Finds an installation of Pixel3DMM, and says what it lacks.

The checkout is `tracking.pixel3dmm_path` or PIXEL3DMM_PATH; its Python is PIXEL3DMM_PYTHON, or
`.venv/bin/python` in the checkout. Light: the standard library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cap4d_core.errors import MissingAssetError, UserError

PATH_VARIABLE, PYTHON_VARIABLE = "PIXEL3DMM_PATH", "PIXEL3DMM_PYTHON"
_SCRIPTS = ("run_preprocessing.py", "network_inference.py", "track.py")
# What its Python must be able to import.
_MODULES = ("torch", "pixel3dmm")


@dataclass(frozen=True)
class Installation:
    """A usable Pixel3DMM: its checkout and its Python."""

    checkout: Path
    python: Path


def find_installation(path: str | None) -> Installation:
    """Finds Pixel3DMM.

    Args:
        path: checkout; None = the environment variable.

    Raises:
        MissingAssetError: names everything that is missing.
    """
    given = path or os.environ.get(PATH_VARIABLE)
    if not given:
        raise MissingAssetError(
            "tracking.backend is 'pixel3dmm', but no checkout of Pixel3DMM is known. Set "
            f"tracking.pixel3dmm_path or {PATH_VARIABLE}, or use tracking.backend: landmarks."
        )
    # Absolute, because its scripts run in the checkout; links stay, a venv is found through them.
    checkout = Path(given).expanduser().absolute()
    own = os.environ.get(PYTHON_VARIABLE)
    python = Path(own).expanduser().absolute() if own else checkout / ".venv" / "bin" / "python"
    missing = []
    if not checkout.is_dir():
        missing.append(f"the checkout {checkout}")
    else:
        missing += [
            f"{checkout / 'scripts' / name}"
            for name in _SCRIPTS
            if not (checkout / "scripts" / name).is_file()
        ]
    if not python.is_file():
        missing.append(f"its Python {python} (set {PYTHON_VARIABLE})")
    elif checkout.is_dir():
        missing += [f"the module {name} in {python}" for name in _absent_modules(python, checkout)]
    if missing:
        raise MissingAssetError(
            "Pixel3DMM cannot be run; missing: "
            + "; ".join(missing)
            + ". `make install-pixel3dmm` installs it; or use tracking.backend: landmarks."
        )
    return Installation(checkout, python)


def _absent_modules(python: Path, checkout: Path) -> list[str]:
    """Modules that its Python does not find; they are looked for, not imported."""
    code = (
        "import importlib.util, sys\n"
        "print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    )
    try:
        result = subprocess.run(
            [str(python), "-c", code, *_MODULES],
            cwd=checkout,
            env=process_environment(checkout),
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [f"(it does not start: {type(error).__name__})"]
    return result.stdout.split()


def process_environment(checkout: Path) -> dict[str, str]:
    """Variables of its processes: its own modules, not ours."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PIXEL3DMM_CODE_BASE"] = str(checkout.resolve())
    environment["PYTHONPATH"] = str(checkout.resolve() / "src")
    return environment


if __name__ == "__main__":
    # Called by tools/install_pixel3dmm.sh: is the installation complete?
    try:
        find_installation(sys.argv[1] if len(sys.argv) > 1 else None)
    except UserError as problem:
        sys.exit(str(problem))
    print("Pixel3DMM is complete.")
