"""Demo people as the sampler meets them, with true pictures of every view it is asked for."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cap4d_core.demo.rendering import SubjectRenderer, Views
from cap4d_core.demo.subject import make_subject
from cap4d_core.demo.world import write_demo_head, write_demo_subject
from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.checkpoint import MMDM
from cap4d_core.diffusion.conditioning import ConditioningRenderer, RendererTables
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.frames import read_reference_image, reference_views
from cap4d_core.diffusion.seeding import derived_normal
from cap4d_core.diffusion.view_plan import make_plan
from cap4d_core.diffusion.view_plan_file import ViewPlan
from cap4d_core.evaluation.metrics import dilated_mask, psnr_of_views
from cap4d_core.evaluation.rendering import viewing_direction
from cap4d_core.evaluation.surface import SurfaceColors, SurfacePoints, surface_colors
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.files.tracking import read_tracked_subject
from cap4d_core.flame.assets import prepare_head_model
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_flame_template
from cap4d_core.geometry.crops import crop_intrinsics
from cap4d_core.settings import SamplingSettings

MASK_DILATION_PX = 5
# Photos are this much larger than the crops that the network sees, as in the demo.
PHOTO_SCALE = 1.25
MAP_BATCH = 32


@dataclass(frozen=True)
class Head:
    """The head model on the device, its template and its folder."""

    model: HeadModel
    template: HeadTemplate
    folder: Path


@dataclass(frozen=True)
class Person:
    """One subject with a number of references.

    Attributes:
        seed: subject number.
        name: enters the draws of the plan and the sampler.
        plan: N views and R references.
        reference_images: (R, S, S, 3) crops, 0..1.
        reference_latents: (R, 4, h, w), base reference first.
        truth: (N, S, S, 3) over white, 0..1; masks: (N, S, S) bool, true matte grown by 5 pixels.
        angles: (N,) degrees to the nearest reference; baseline: (N,) dB of showing that one.
        surface: colours of the truth.
    """

    seed: int
    name: str
    plan: ViewPlan
    reference_images: Tensor
    reference_latents: Tensor
    truth: Tensor
    masks: Tensor
    angles: Tensor
    baseline: Tensor
    surface: SurfaceColors


def load_head(folder: Path | None, work: Path, device: torch.device) -> Head:
    """The demo head: prepared in `folder`, or made in `work`."""
    if folder is None:
        folder = work / "head_model"
        if not (folder / "flame.npz").is_file():
            with tempfile.TemporaryDirectory(dir=work) as source:
                write_demo_head(source)
                prepare_head_model(source, None, folder)
    model = HeadModel.load(folder).to(device)
    return Head(model, load_flame_template(folder), folder)


def common_view_count(wanted: int, views_per_call: int, references: list[int], shards: int) -> int:
    """The smallest count from `wanted` on that every number of references and shards divides."""
    units = [shards * (views_per_call - count) for count in references]
    unit = math.lcm(*units)
    return -(-wanted // unit) * unit


def make_person(
    seed: int,
    num_references: int,
    settings: SamplingSettings,
    head: Head,
    autoencoder: Autoencoder,
    points: SurfacePoints,
    work: Path,
    device: torch.device,
) -> Person:
    """Photographs a demo subject, plans its views and renders the truth of each."""
    size = settings.resolution
    folder = work / f"{seed}_{num_references}"
    photo = round(PHOTO_SCALE * size)
    write_demo_subject(
        folder, seed, num_references=num_references, resolution=photo, device=str(device)
    )
    tracked = read_tracked_subject(folder)
    references = reference_views(tracked, head.model, head.template.head_vertex_ids)
    name = f"demo_{seed}"
    cameras = [reference.camera for reference in tracked.references]
    plan = make_plan(
        references, cameras, head.model, head.template, settings, name,
        head.folder / "gen_data.npz",
    )  # fmt: skip
    crops, latents = [], []
    for view, reference in zip(references, tracked.references, strict=True):
        image = read_reference_image(reference, view.crop_box, size)
        crops.append(torch.from_numpy(image))
        batch = torch.from_numpy(np.moveaxis(image, -1, 0)[None].copy()).to(device)
        key = ("posterior", settings.seed, reference.camera, reference.timestep)
        shape = (1, autoencoder.config.latent_channels, *[size // autoencoder.config.downscale] * 2)
        latents.append(autoencoder.encode(batch, noise=derived_normal(shape, *key)).cpu())
    images = (torch.stack(crops).to(device) + 1) / 2
    truth, masks = render_truth(seed, plan.views, size, device)
    angles, nearest = angles_to_references(plan)
    return Person(
        seed=seed,
        name=name,
        plan=plan,
        reference_images=images,
        reference_latents=torch.cat(latents)[plan.reference_order],
        truth=truth,
        masks=masks,
        angles=angles,
        baseline=psnr_of_views(images[nearest.to(device)], truth, masks).cpu(),
        surface=surface_colors(head.model, plan.views, truth, points),
    )


def render_truth(
    seed: int, views: tuple[ViewParameters, ...], size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """True crops (N, S, S, 3) over white, and dilated mattes (N, S, S) bool."""
    intrinsics = [crop_intrinsics(v.fx, v.fy, v.cx, v.cy, v.crop_box, size) for v in views]
    fx, fy, cx, cy = torch.tensor(intrinsics, dtype=torch.float32).unbind(1)

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(getattr(v, name), np.float32) for v in views]))

    poses = Views(
        expr=stacked("expr"), eye_rot=stacked("eye_rot"), rot=stacked("rot"), tra=stacked("tra"),
        extr=stacked("extr"), fx=fx, fy=fy, cx=cx, cy=cy,
    )  # fmt: skip
    out = SubjectRenderer(make_subject(seed), device).render(poses, (size, size), supersample=3)
    matte = out.matte[..., None]
    masks = [
        dilated_mask((m * 255).round().byte().cpu().numpy(), MASK_DILATION_PX) for m in out.matte
    ]
    truth = out.rgb * matte + 1 - matte
    return truth, torch.from_numpy(np.stack(masks)).to(truth.device)


def angles_to_references(plan: ViewPlan) -> tuple[Tensor, Tensor]:
    """Angle (N,) in degrees to the nearest reference, and which one that is."""
    of_references = np.stack([viewing_direction(r) for r in plan.references])
    cosines = np.stack([viewing_direction(v) for v in plan.views]) @ of_references.T
    nearest = cosines.argmax(1)
    angles = np.degrees(np.arccos(np.clip(cosines.max(1), -1, 1)))
    return torch.from_numpy(angles), torch.from_numpy(nearest)


def conditioning_of(
    people: list[Person], model: MMDM, head: Head
) -> tuple[FrameConditioning, FrameConditioning]:
    """Conditioning of all references and of all views, person after person."""
    if model.tables is not None:
        tables = RendererTables.from_weights(model.tables)
    else:
        t = head.template
        tables = RendererTables.from_template(t.vertices, t.faces, t.head_vertex_ids)
    references, generated = [], []
    config = model.config
    latent = (config.in_channels, config.latent_size, config.latent_size)
    for person in people:
        plan = person.plan
        base = plan.references[plan.base_reference]
        renderer = ConditioningRenderer(head.model, tables, config, np.asarray(base.extr))
        ordered = [plan.references[i] for i in plan.reference_order]
        references.append(renderer.references(ordered, person.reference_latents))
        for first in range(0, len(plan.views), MAP_BATCH):
            maps = renderer.maps(plan.views[first : first + MAP_BATCH], is_reference=False)
            zeros = maps.new_zeros(len(maps), *latent)
            generated.append(FrameConditioning(maps, zeros, zeros[:, :1]))
    return FrameConditioning.cat(references), FrameConditioning.cat(generated)
