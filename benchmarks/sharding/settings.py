"""Which samplings are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cap4d_core.settings import SamplingSettings

# Higher-order solvers are tried with fewer steps: that is what they are for.
DDIM_STEPS = (10, 20, 25, 50, 100, 200, 250)
FAST_STEPS = (5, 10, 20, 25, 50)
SHARDS = (1, 2, 4, 8)
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
# Where guidance is applied, as fractions of the steps from the noisiest; the whole is the base.
INTERVALS = ((0.0, 0.5), (0.5, 1.0), (0.2, 0.8), (0.0, 0.8), (0.2, 1.0))
WHOLE = (0.0, 1.0)
PARTS = ("coupling", "shards", "steps", "guidance", "interval")


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        references: of every person.
        shards: parts of the views; 0 = as many as there are network calls, so that the views of a
            call never meet others ("independent batches").
        sync: none | default | every: where views are dealt anew.
        steps: denoising steps asked for.
        solver: of the steps.
        guidance: classifier-free guidance.
        interval: part of the steps that is guided.
    """

    references: int
    shards: int
    sync: str
    steps: int
    solver: str
    guidance: float
    interval: tuple[float, float] = WHOLE

    @property
    def key(self) -> str:
        """Name in the results."""
        shards = "independent" if self.shards == 0 else f"shards{self.shards}_{self.sync}"
        part = "" if self.interval == WHOLE else "_{:g}to{:g}".format(*self.interval)
        sampler = f"{self.solver}{self.steps}_guidance{self.guidance:g}{part}"
        return f"refs{self.references}_{shards}_{sampler}"

    def sync_steps(self, steps_run: int) -> list[float]:
        """Steps at which a round starts."""
        if self.sync == "every":
            return list(range(1, steps_run))
        return list(SamplingSettings().sync_steps) if self.sync == "default" else []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"key": self.key, **asdict(self)}


def solvers() -> tuple[str, ...]:
    """Solvers that this version offers, ddim first."""
    field = SamplingSettings.model_fields.get("solver")
    if field is None:
        return ("ddim",)
    offered = getattr(field.annotation, "__args__", ("ddim",))
    return ("ddim", *(name for name in offered if name != "ddim"))


def planned(
    parts: list[str], references: list[int], steps: int, guidance: float
) -> dict[str, list[Setting]]:
    """Settings of every part, the telling ones first; parts share settings."""
    base = dict(sync="none", steps=steps, solver="ddim", guidance=guidance)
    few = references[0]
    plan: dict[str, list[Setting]] = {
        "coupling": [Setting(references=r, shards=s, **base) for s in (1, 0) for r in references],
        "shards": [
            Setting(references=r, shards=s, **{**base, "sync": sync})
            for r in references
            for sync in ("default", "none", "every")
            for s in SHARDS
            if s > 1 or sync == "none"
        ],
        "steps": [
            Setting(references=few, shards=1, **{**base, "steps": n, "solver": solver})
            for solver in solvers()
            for n in (DDIM_STEPS if solver == "ddim" else FAST_STEPS)
        ],
        "guidance": [
            Setting(references=r, shards=1, **{**base, "guidance": g})
            for g in GUIDANCE
            for r in references
        ],
        "interval": [
            Setting(references=r, shards=1, interval=interval, **base)
            for r in references
            for interval in (WHOLE, *INTERVALS)
        ],
    }
    return {part: plan[part] for part in parts}
