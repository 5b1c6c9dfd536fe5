"""What shards, rounds, solver, steps and references do to sampled views, on demo people.

    python -m benchmarks.sharding_experiment MMDM --json results.json [--seconds 540] ...
    python -m benchmarks.sharding_experiment --plot results.json [more.json ...]

MMDM is a folder written by prepare_mmdm (or cap4d_core/demo/weights). People with the numbers
`--seeds` (never trained on) are photographed once (1 reference) or four times, views are planned as
in the workflow, sampled in every setting, and compared with true pictures of the same views:

    psnr       inside the true matte grown by 5 pixels; `psnr_far`: views at least 10 degrees from
               every reference; `gain_far`: above showing the nearest reference
    std, consistency_psnr      disagreement of the views about surface colours
    shared_psnr, differing_psnr    error on the surface: the same in all views / different
    avatar_psnr    of an avatar fitted on the views, on held-out views (with --avatars)

Results are written after every setting; the same command goes on where the last one stopped, also
when `--seconds` ran out. Several cards can share the work: each gets other --parts, --references or
--seeds and a --json of its own, and --plot takes them all. Needs torch, diffusers, scipy, OpenCV,
Pillow; `--plot` also matplotlib.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.sharding import measures
from benchmarks.sharding.sampling import sample
from benchmarks.sharding.settings import PARTS, SHARDS, WHOLE, Setting, planned
from benchmarks.sharding.world import (
    Head,
    Person,
    common_view_count,
    conditioning_of,
    load_head,
    make_person,
)
from cap4d_core.diffusion.checkpoint import MMDM
from cap4d_core.diffusion.denoiser_setup import choose_route, route_denoiser
from cap4d_core.diffusion.network_setup import choose_precision, load_model, matmul_precision
from cap4d_core.diffusion.sampler import Denoiser
from cap4d_core.diffusion.step_grid import ddim_step_count
from cap4d_core.evaluation.surface import SurfacePoints, sample_surface
from cap4d_core.files.basic import sha256_file, write_json
from cap4d_core.settings import SamplingSettings

FORMAT = 1
# Enough frames per network call to fill a large GPU with a small network.
BATCHES_PER_CALL = {"cuda": 64, "cpu": 4}


def main() -> None:
    arguments = parse_arguments()
    if arguments.plot:
        # Needs matplotlib, which machines that measure may lack.
        from benchmarks.sharding.report import write_report

        write_report(arguments.plot, arguments.docs, arguments.pictures)
        return
    Experiment(arguments).run()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mmdm", type=Path, nargs="?", help="folder of a prepared model")
    parser.add_argument("--json", type=Path, default=Path("sharding.json"), help="results")
    parser.add_argument("--head", type=Path, help="prepared head model; default: the demo head")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(9000, 9008)))
    parser.add_argument("--views", type=int, default=224, help="views per person, rounded up")
    parser.add_argument("--references", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=50, help="where steps are not the question")
    parser.add_argument("--guidance", type=float, default=2.0, help="likewise")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--avatars", type=int, default=0, help="people to fit avatars of")
    parser.add_argument("--avatar-iterations", type=int, default=4800)
    parser.add_argument("--avatar-batch", type=int, default=8)
    parser.add_argument("--batches-per-call", type=int, help="default: by device")
    parser.add_argument("--precision", default="auto", help="as sampling.precision")
    parser.add_argument("--compile", action="store_true", help="compile the network: about 1 min")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time to spend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pictures", type=Path, help="folder of a row of views per setting")
    parser.add_argument(
        "--plot", type=Path, nargs="+", help="write docs from these results, measure nothing"
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where --plot writes")
    arguments = parser.parse_args()
    if (arguments.mmdm is None) == (arguments.plot is None):
        parser.error("give a model folder, or --plot with results")
    return arguments


class Experiment:
    """People of one number of references at a time, all settings of that number."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.results = self._open_results()
        self.plan = planned(
            arguments.parts, arguments.references, arguments.steps, arguments.guidance
        )
        self.seconds_per_call: float | None = None
        self.seconds_per_fit = 0.0

    def run(self) -> None:
        """Everything that is not measured yet, as far as time allows."""
        by_references: dict[int, dict[str, Setting]] = {}
        for settings in self.plan.values():
            for setting in settings:
                if not self._is_done(setting):
                    by_references.setdefault(setting.references, {})[setting.key] = setting
        left = sum(len(group) for group in by_references.values())
        print(f"{left} settings to measure on {self.machine()}", flush=True)
        with tempfile.TemporaryDirectory() as work, torch.no_grad():
            groups = [
                self._measure_group(references, list(group.values()), Path(work))
                for references, group in by_references.items()
            ]
        if all(groups):
            print("Everything is measured.", flush=True)
        else:
            print("Out of time: the same command goes on.", flush=True)

    def _measure_group(self, references: int, group: list[Setting], work: Path) -> bool:
        """Measures settings of one number of references; False when time ran out."""
        if self._left() <= 0:
            return False
        model, head, points, people = self._prepare(references, work)
        of_references, generated = conditioning_of(people, model, head)
        names = [person.name for person in people]
        per_call = model.config.views_per_call - references
        calls = len(generated) // per_call
        denoiser, batches_per_call = self._fast(model, calls)
        complete = True
        for setting in group:
            steps = ddim_step_count(setting.steps)
            cost = steps * calls * (1 if setting.guidance == 1 else 2)
            if self.seconds_per_call is not None and cost * self.seconds_per_call > self._left():
                complete = False  # a cheaper one may still fit
                continue
            begin = time.monotonic()
            shards = setting.shards or self.num_views(model) // per_call
            with matmul_precision(self.precision):
                latents = sample(
                    model, names, of_references, generated,
                    num_steps=setting.steps, guidance_scale=setting.guidance,
                    max_references=references, seed=self.sampling(model).seed, num_shards=shards,
                    sync_steps=setting.sync_steps(steps), batches_per_call=batches_per_call,
                    solver=setting.solver, guidance_interval=setting.interval,
                    denoiser=denoiser,
                )  # fmt: skip
                images = measures.decode(model.autoencoder, latents).to(self.device)
            self._synchronise()
            seconds = time.monotonic() - begin
            self.seconds_per_call = seconds / cost
            parts = images.split(len(images) // len(people))
            figures = [
                {"seed": person.seed, **measures.measure(person, part, head, points)}
                for person, part in zip(people, parts, strict=True)
            ]
            if self._wants_avatars(setting):
                self._fit_avatars(people, parts, head, figures)
            self._add(setting, figures, seconds)
            if self.arguments.pictures:
                row = measures.strip(people[0], parts[0])
                measures.write_strip(self.arguments.pictures / f"{setting.key}.png", row)
        return complete

    def _prepare(
        self, references: int, work: Path
    ) -> tuple[MMDM, Head, SurfacePoints, list[Person]]:
        begin = time.monotonic()
        plain = SamplingSettings()
        probe = load_model_for(self.arguments.mmdm, plain, self.device)
        settings = self.sampling(probe)
        head = load_head(self.arguments.head, work, self.device)
        points = sample_surface(head.template)
        people = [
            make_person(
                seed, references, settings, head, probe.autoencoder, points, work, self.device
            )
            for seed in self.arguments.seeds
        ]
        self._synchronise()
        key = f"refs{references}"
        if key not in self.results["worlds"]:
            world = []
            for person in people:
                coded = measures.round_trip(probe.autoencoder, person.truth).to(self.device)
                far = person.angles >= measures.FAR_DEG
                world.append(
                    {
                        "seed": person.seed,
                        "nearest_reference": float(person.baseline.mean()),
                        "nearest_reference_far": float(person.baseline[far].mean()),
                        "mean_angle_deg": float(person.angles.mean()),
                        "truth": measures.measure(person, person.truth, head, points),
                        "autoencoder": measures.measure(person, coded, head, points),
                    }
                )
            self.results["worlds"][key] = world
            self.results["num_views"] = self.num_views(probe)
            self._write()
        if self.arguments.pictures:
            row = measures.strip(people[0], None)
            measures.write_strip(self.arguments.pictures / f"refs{references}_truth.png", row)
        print(
            f"{len(people)} people with {references} reference(s), {self.num_views(probe)} views "
            f"each: {time.monotonic() - begin:.1f} s",
            flush=True,
        )
        return probe, head, points, people

    def sampling(self, model: MMDM) -> SamplingSettings:
        """Settings of plan and sampler that fit the model."""
        return SamplingSettings(
            num_views=self.num_views(model),
            num_shards=1,
            resolution=model.config.image_size,
            views_per_call=model.config.views_per_call,
            max_references=max(self.arguments.references),
        )

    def num_views(self, model: MMDM) -> int:
        """Views per person: every setting deals the same ones."""
        return common_view_count(
            self.arguments.views,
            model.config.views_per_call,
            self.arguments.references,
            max(SHARDS),
        )

    def _wants_avatars(self, setting: Setting) -> bool:
        """Fits take longest, so only the ends of the scale get them."""
        usual = (self.arguments.steps, "ddim", self.arguments.guidance)
        is_usual = (setting.steps, setting.solver, setting.guidance) == usual
        return is_usual and setting.interval == WHOLE and setting.shards in (0, 1, max(SHARDS))

    def _fit_avatars(
        self,
        people: list[Person],
        views: tuple[torch.Tensor, ...],
        head: Head,
        figures: list[dict[str, Any]],
    ) -> None:
        """Adds the quality of avatars to the figures of the first people."""
        for number in range(min(self.arguments.avatars, len(people))):
            begin = time.monotonic()
            if self.seconds_per_fit > self._left():
                return
            with torch.enable_grad():
                figures[number]["avatar_psnr"] = measures.avatar_psnr(
                    people[number], views[number], head, self.arguments.avatar_iterations,
                    self.arguments.avatar_batch, str(self.device),
                )  # fmt: skip
            self.seconds_per_fit = time.monotonic() - begin

    # --- results

    def _open_results(self) -> dict[str, Any]:
        arguments = self.arguments
        header = {
            "format": FORMAT,
            "weights": sha256_file(arguments.mmdm / "denoiser.safetensors"),
            "seeds": arguments.seeds,
            "views": arguments.views,
            "references": arguments.references,
            "steps": arguments.steps,
            "guidance": arguments.guidance,
        }
        if arguments.precision != "auto":
            header["precision"] = arguments.precision
        if arguments.json.exists():
            found = json.loads(arguments.json.read_text("utf-8"))
            different = [key for key, value in header.items() if found.get(key) != value]
            if different:
                raise SystemExit(
                    f"{arguments.json} was measured with other {', '.join(different)}; "
                    "give another --json, or the arguments it was measured with."
                )
            return found
        return {**header, "machine": self.machine(), "worlds": {}, "settings": {}}

    def _is_done(self, setting: Setting) -> bool:
        return setting.key in self.results["settings"]

    def _add(self, setting: Setting, figures: list[dict[str, Any]], seconds: float) -> None:
        self.results["settings"][setting.key] = {
            **setting.to_dict(),
            "seconds": round(seconds, 2),
            "subjects": figures,
        }
        self._write()
        shown = []
        for name in ("psnr", "psnr_far", "consistency_psnr", "differing_psnr", "avatar_psnr"):
            values = [f[name] for f in figures if f.get(name) is not None]
            shown += [f"{name} {np.mean(values):.2f}"] if values else []
        print(f"{setting.key}: {seconds:.1f} s, {', '.join(shown)}", flush=True)

    def _write(self) -> None:
        write_json(self.arguments.json, self.results)

    # --- machine

    def machine(self) -> str:
        """Where this runs."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        return f"{platform.machine()} CPU, torch {torch.__version__}"

    @property
    def precision(self) -> str:
        """Arithmetic of the network."""
        return choose_precision(self.arguments.precision, self.device)

    def _fast(self, model: MMDM, calls: int) -> tuple[Denoiser, int]:
        """The denoiser in the form that the jobs use, and batches of views in one network call."""
        settings = self.sampling(model).model_copy(
            update={
                "batches_per_call": self.arguments.batches_per_call
                or BATCHES_PER_CALL[self.device.type],
                "compile": "on" if self.arguments.compile else "off",
                "precision": self.arguments.precision,
            }
        )
        route = choose_route(settings, self.device, calls, self.arguments.steps)
        return route_denoiser(model.denoiser, route), route.batches_per_call

    def _left(self) -> float:
        return self.arguments.seconds - (time.monotonic() - self.started)

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def load_model_for(folder: Path, settings: SamplingSettings, device: torch.device) -> MMDM:
    """The model whatever its size: resolution and views per call follow the weights."""
    from cap4d_core.diffusion.model_weights import read_prepared

    config = read_prepared(folder).config
    fitting = settings.model_copy(
        update={"resolution": config.image_size, "views_per_call": config.views_per_call}
    )
    return load_model(folder, fitting, device)


if __name__ == "__main__":
    main()
