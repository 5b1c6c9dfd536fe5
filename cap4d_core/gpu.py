"""Lease of GPUs on a shared host.

Snakemake counts GPUs but does not say which one a job may use. Every GPU has one lock file, held
with flock(2) through an open descriptor for as long as the process (or a child that inherited the
descriptor) lives. The kernel drops it when the process ends, whatever ended it: a lease cannot leak
and needs no daemon and no clean-up.

Locks are named by UUID, because indices are renumbered by schedulers and containers. The devices
that may be leased are those of CUDA_VISIBLE_DEVICES when that is set, as under SLURM.

Light: standard library only. It must run before torch is imported.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from cap4d_core.errors import NoGpuError

logger = logging.getLogger(__name__)

# For tests and for machines whose GPUs nvidia-smi cannot list: comma-separated names.
POOL_VARIABLE = "CAP4D_GPU_POOL"
LOCK_DIR_VARIABLE = "CAP4D_GPU_LOCK_DIR"
# auto: a GPU when there is one; cuda: a GPU or an error; cpu: never.
DEVICE_VARIABLE = "CAP4D_DEVICE"
_WAIT_NOTICE_S = 60.0


@dataclass(frozen=True)
class Device:
    """A GPU or MIG slice as `nvidia-smi -L` lists it."""

    index: str
    uuid: str


@dataclass(frozen=True)
class Lease:
    """GPUs held by this process; released when it ends or by `release`."""

    names: tuple[str, ...]
    descriptors: tuple[int, ...]

    def release(self) -> None:
        """Gives the GPUs back; only needed when the process goes on without them."""
        for descriptor in self.descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def lease_for_job(num_gpus: int, timeout_s: float | None = None) -> Lease | None:
    """Leases `num_gpus` and sets CUDA_VISIBLE_DEVICES, or hides all GPUs.

    Args:
        num_gpus: what the job asked for; 0 hides every GPU, so that nothing is used unleased.
        timeout_s: give up after this long; None waits for ever.

    Returns:
        The lease, None when the job runs on the CPU.

    Raises:
        NoGpuError: CAP4D_DEVICE is 'cuda' and there is no GPU, or none became free in time.
    """
    wanted = os.environ.get(DEVICE_VARIABLE, "auto").lower()
    if wanted not in ("auto", "cuda", "cpu"):
        raise NoGpuError(f"{DEVICE_VARIABLE} is '{wanted}'; it must be auto, cuda or cpu.")
    if num_gpus == 0 or wanted == "cpu":
        hide_gpus(os.environ)
        return None
    pool = visible_gpus()
    if not pool:
        if wanted == "cuda":
            raise NoGpuError(
                f"{DEVICE_VARIABLE} is 'cuda' but there is no GPU here: nvidia-smi lists none and "
                f"CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')!r}."
            )
        logger.warning("no GPU found: running on the CPU")
        hide_gpus(os.environ)
        return None
    if num_gpus > len(pool):
        raise NoGpuError(
            f"{num_gpus} GPUs asked for, {len(pool)} may be used here ({', '.join(pool)})."
        )
    lease = acquire(num_gpus, pool, lock_folder(), timeout_s)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(lease.names)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    logger.info("GPU leased: %s", ", ".join(lease.names))
    return lease


def hide_gpus(environment: MutableMapping[str, str]) -> None:
    """Makes CUDA report no device."""
    environment["CUDA_VISIBLE_DEVICES"] = ""


def visible_gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """Names of the GPUs that may be leased, by UUID where that is known."""
    environment = os.environ if environment is None else environment
    if POOL_VARIABLE in environment:
        return _split(environment[POOL_VARIABLE])
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _split(visible):
        return []
    devices = list_devices()
    if visible is None:
        return [device.uuid for device in devices]
    uuids = {device.index: device.uuid for device in devices}
    names: list[str] = []
    for entry in _split(visible):
        if entry.startswith("-"):
            break  # CUDA ignores everything after an invalid entry
        # A prefix of a UUID is a valid entry, too.
        full = [d.uuid for d in devices if d.uuid.startswith(entry)]
        name = full[0] if len(full) == 1 else uuids.get(entry, entry)
        if name not in names:
            names.append(name)
    return names


def list_devices() -> list[Device]:
    """GPUs of this host; where a GPU is cut into MIG slices, the slices. Empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        result = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("nvidia-smi -L failed, no GPU is used: %s", error)
        return []
    return parse_device_list(result.stdout)


def parse_device_list(text: str) -> list[Device]:
    """Reads the output of `nvidia-smi -L`."""
    devices: list[Device] = []
    for line in text.splitlines():
        gpu = re.match(r"GPU (\d+): .*\(UUID: (GPU-[^)]+)\)", line)
        if gpu:
            devices.append(Device(gpu[1], gpu[2]))
            continue
        slice_ = re.match(r"\s+MIG .*Device\s+(\d+): \(UUID: (MIG-[^)]+)\)", line)
        if slice_ and devices:
            parent = devices[-1].index.split(":")[0]
            if ":" not in devices[-1].index:
                devices.pop()  # a sliced GPU is used through its slices only
            devices.append(Device(f"{parent}:{slice_[1]}", slice_[2]))
    return devices


def lock_folder() -> Path:
    """Where the lock files are: local to the host, because flock on network disks is unreliable.

    Under SLURM the devices belong to the job, and so do the locks; indices mean something else in
    every job there.
    """
    default = Path(tempfile.gettempdir()) / "cap4d-gpu-locks"
    folder = Path(os.environ.get(LOCK_DIR_VARIABLE) or default)
    if "SLURM_JOB_ID" in os.environ:
        folder = folder.with_name(f"{folder.name}-job{os.environ['SLURM_JOB_ID']}")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):
        folder.chmod(0o1777)  # shared by all users of the host
    return folder


def lock_name(gpu: str) -> str:
    """A GPU's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", gpu)


def acquire(num_gpus: int, pool: list[str], folder: Path, timeout_s: float | None = None) -> Lease:
    """Leases `num_gpus` of `pool`, all or none; waits until they are free.

    Raises:
        NoGpuError: none became free within `timeout_s`.
    """
    start = time.monotonic()
    noticed = start - _WAIT_NOTICE_S
    while True:
        names: list[str] = []
        descriptors: list[int] = []
        for name in pool:
            descriptor = _try_lock(folder / f"{lock_name(name)}.lock")
            if descriptor is None:
                continue
            names.append(name)
            descriptors.append(descriptor)
            if len(names) == num_gpus:
                return Lease(tuple(names), tuple(descriptors))
        for descriptor in descriptors:  # all or nothing, else two jobs could wait for each other
            os.close(descriptor)
        now = time.monotonic()
        if timeout_s is not None and now - start > timeout_s:
            raise NoGpuError(
                f"No GPU became free within {timeout_s:g} s: {', '.join(pool)} are leased by other "
                f"jobs ({folder}). Wait, or allow fewer jobs at once (--resources gpu=N)."
            )
        if now - noticed >= _WAIT_NOTICE_S:
            noticed = now
            logger.info("waiting for a free GPU (%s)", ", ".join(pool))
        time.sleep(random.uniform(0.1, 0.4))


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, None when somebody else does."""
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    # Inherited by children, so that an orphaned worker keeps the GPU that it still uses.
    os.set_inheritable(descriptor, True)
    with contextlib.suppress(OSError):  # who holds it: for people only, never trusted
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} since {time.ctime()}\n".encode(), 0)
    return descriptor


def _open_lock(path: Path) -> int:
    """Opens a lock file of any user.

    An existing file is opened without O_CREAT: in sticky folders Linux refuses that flag for files
    of other users (fs.protected_regular), even where the file itself may be written.
    """
    for _ in range(3):
        for flags in (os.O_RDWR, os.O_RDONLY):
            try:
                return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                break
            except PermissionError:
                continue  # a lock on a file that may only be read works as well
        mask = os.umask(0)
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue  # somebody else made it just now
        finally:
            os.umask(mask)
    raise NoGpuError(
        f"{path}: the lock file cannot be opened; remove it or set {LOCK_DIR_VARIABLE}."
    )


def run_with_lease(command: list[str], num_gpus: int, timeout_s: float | None) -> None:
    """Becomes `command` with leased GPUs; the lease lasts as long as the command.

    Raises:
        NoGpuError: as `lease_for_job`.
    """
    lease_for_job(num_gpus, timeout_s)
    os.execvp(command[0], command)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
