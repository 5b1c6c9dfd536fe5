"""Which numbers of denoising steps a schedule offers.

Standard library only: the configuration is checked with this before anything heavy is imported.

The grid for `num_steps` of T training timesteps has the spacing c = T // num_steps and holds
1, 1 + c, 1 + 2c, ... So the number of steps that are run is ceil(T / c), which differs from
`num_steps` where that does not divide T, and for some requests the last entry is T itself, one
past the end of the schedule: those requests are refused.
"""

from __future__ import annotations

from cap4d_core.errors import UserError


def is_valid_step_count(num_steps: int, num_train: int = 1000) -> bool:
    """Whether a grid for `num_steps` exists that stays inside the schedule."""
    return 1 <= num_steps <= num_train and (num_train - 1) % (num_train // num_steps) != 0


def validate_step_count(num_steps: int, num_train: int = 1000) -> None:
    """Refuses step counts whose grid leaves the schedule.

    Raises:
        UserError: names the closest step counts that work.
    """
    if is_valid_step_count(num_steps, num_train):
        return
    # range() is empty where nothing lies on that side (e.g. below 1).
    below = next(
        (
            n
            for n in range(min(num_steps - 1, num_train), 0, -1)
            if is_valid_step_count(n, num_train)
        ),
        None,
    )
    above = next(
        (n for n in range(max(num_steps + 1, 1), num_train) if is_valid_step_count(n, num_train)),
        None,
    )
    choices = " or ".join(str(n) for n in (below, above) if n is not None)
    if 1 <= num_steps <= num_train:
        reason = f"its time grid would end at {num_train}, past the last timestep {num_train - 1}"
    else:
        reason = f"the schedule has {num_train} timesteps"
    raise UserError(f"{num_steps} denoising steps are not possible: {reason}. Use {choices}.")


def ddim_timesteps(num_steps: int, num_train: int = 1000) -> list[int]:
    """Timesteps of the grid, ascending; sampling runs them from the last to the first.

    Raises:
        UserError: as `validate_step_count`.
    """
    validate_step_count(num_steps, num_train)
    return [t + 1 for t in range(0, num_train, num_train // num_steps)]


def ddim_step_count(num_steps: int, num_train: int = 1000) -> int:
    """Number of steps that are really run for a request of `num_steps`.

    Raises:
        UserError: as `validate_step_count`.
    """
    return len(ddim_timesteps(num_steps, num_train))


def jumps_at_the_end(num_steps: int, num_train: int = 1000) -> bool:
    """Whether the noisiest step is long and starts where next to nothing of the signal is left.

    With a schedule that ends near zero signal, an error of the predicted noise there is multiplied
    by the ratio of the signals at both ends of the step: 50 from timestep 997 to 914 of the demo
    weights' schedule (12 steps), 2.5 from 901 to 801 (10 steps), 3 from 997 to 993 (250 steps).
    """
    if not is_valid_step_count(num_steps, num_train):
        return False
    spacing = num_train // num_steps
    unused = num_train - 1 - ddim_timesteps(num_steps, num_train)[-1]
    return spacing > 10 and unused < spacing // 4
