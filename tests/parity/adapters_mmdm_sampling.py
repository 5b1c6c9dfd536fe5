"""Parity of conditioning maps, stochastic I/O sampling and the geometry of reference and views."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cap4d_core.diffusion.conditioning import RendererTables, conditioning_maps
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.frames import (
    composite_over_white,
    crop_and_normalise,
    crop_mask,
    head_in_crops,
    head_in_pixels,
    ray_maps,
    with_crop_boxes,
)
from cap4d_core.diffusion.grouping import RecordedGrouping
from cap4d_core.diffusion.model_config import ConditioningConfig
from cap4d_core.diffusion.sampler import SamplingProgress, sample_stochastic_io
from cap4d_core.diffusion.schedule import NoiseSchedule, ScheduleConfig
from cap4d_core.diffusion.view_cloud import (
    FLIP,
    draw_angles,
    published_head_direction,
    published_yaw_pitch,
)
from cap4d_core.diffusion.view_plan import choose_rows, view_cameras
from cap4d_core.files.image_set import ViewParameters
from cap4d_core.flame.model import HeadModel
from cap4d_core.flame.template import HeadTemplate, load_flame_template
from cap4d_core.geometry.cameras import pivot_camera
from cap4d_core.geometry.crops import (
    CROP_SCALE,
    crop,
    crop_box_from_points,
    pixels_to_ndc,
    resize,
)
from cap4d_core.geometry.mesh_rasterizer import rasterize
from cap4d_core.progress import Progress
from cap4d_core.settings import SamplingSettings
from tests.parity.adapters_mmdm_network import load_denoiser
from tests.parity.goldens import Golden, adapter
from tests.parity.head import load_head, prepared_head


def head_model(g: Golden) -> HeadModel:
    return load_head(g.head_folder)


def flame_template(g: Golden) -> HeadTemplate:
    return load_flame_template(prepared_head(g.head_folder))


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


# manifest: "1e-4 relative to the peak of each step's latents"
SAMPLER_TOLERANCE = {"rel_to_peak": 1e-4}

SCHEDULE_NAMES = {
    "n_frames": "num_frames",
    "shift_schedule": "shift_snr",
    "zero_snr_shift": "zero_snr",
}


def schedule_of(g: Golden) -> NoiseSchedule:
    """The released schedule with the overrides that the manifest notes."""
    found = re.search(r"sched overrides: (\{.*?\})", str(g.entry.get("notes", "")))
    overrides: dict[str, Any] = ast.literal_eval(found[1]) if found else {}
    return NoiseSchedule.from_config(
        ScheduleConfig(**{SCHEDULE_NAMES.get(k, k): v for k, v in overrides.items()})
    )


def toy_network(schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Closed-form noise model that depends on slots, references and poses (mmdm.md, F)."""
    table = torch.from_numpy(schedule.alphas_cumprod)

    def predict(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = table[timesteps][..., None, None, None]
        m, x, z = c.ref_mask, latents, c.z_input
        free = 1 - m
        xr = z * m + x * free
        p = c.pos_enc[..., :4].movedim(-1, -3)
        rm = (xr * m).sum(1, keepdim=True) / m.sum(1, keepdim=True).clamp(min=1)
        gm = (xr * free).sum(1, keepdim=True) / free.sum(1, keepdim=True).clamp(min=1)
        w = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None, None, None]
        signal = 0.3 * rm + 0.2 * p + 0.1 * torch.tanh(gm) + 0.02 * w * rm
        eps = (1 - a).sqrt() * x / (0.25 * a + 1 - a) - (a * (1 - a)).sqrt() * signal
        return free * eps + m * (x - z)

    return predict


def blended(network: Callable[..., Tensor], schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """The network's output mixed into the noise of a Gaussian prior, which keeps latents O(1)."""
    table = torch.from_numpy(schedule.alphas_cumprod)

    def predict(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
        a = table[timesteps][..., None, None, None]
        prior = (1 - a).sqrt() * latents / (0.25 * a + 1 - a)
        return prior + (a * (1 - a)).sqrt() * network(latents, timesteps, c)

    return predict


def frames(g: Golden, prefix: str, mask: float) -> FrameConditioning:
    pos_enc = torch.from_numpy(g.input(f"{prefix}_pos_enc"))
    z = torch.from_numpy(g.input(f"{prefix}_z"))
    return FrameConditioning(pos_enc, z, torch.full_like(z[:, :1], mask))


class SamplerRun:
    """One run of the sampler on a golden's inputs; `batches_per_call` must not matter."""

    def __init__(self, g: Golden) -> None:
        self.schedule = schedule_of(g)
        self.num_steps = int(g.input("S"))
        self.views_per_call = int(g.input("V"))
        self.max_references = int(g.input("R_max"))
        self.guidance_scale = float(g.input("cfg_scale"))
        self.noise = torch.from_numpy(g.input("x_T"))
        self.references, self.views = frames(g, "ref", 1.0), frames(g, "gen", 0.0)
        self.grouping = RecordedGrouping(g.input("ref_batches"), g.input("gen_batches"))
        g.ignore("torch_seed|numpy_seed", "the draws themselves are in the file")
        self.first_timesteps: Tensor | None = None

    def __call__(
        self, network: Callable[..., Tensor], batches_per_call: int = 1
    ) -> tuple[Tensor, list[Tensor]]:
        """Final latents and the latents after every step; the first call is remembered."""
        after: list[Tensor] = []

        def recorded(latents: Tensor, timesteps: Tensor, c: FrameConditioning) -> Tensor:
            if self.first_timesteps is None:
                self.first_timesteps = timesteps
            return network(latents, timesteps, c)

        def keep(progress: Progress) -> None:
            assert isinstance(progress, SamplingProgress) and progress.latents is not None
            after.append(progress.latents)

        final = sample_stochastic_io(
            recorded, self.schedule, self.references, self.views, self.num_steps,
            self.guidance_scale, self.views_per_call, self.max_references, self.noise,
            self.grouping, callback=keep, batches_per_call=batches_per_call,
        )  # fmt: skip
        return final, after


def compare_run(
    g: Golden, run: SamplerRun, network: Callable[..., Tensor], prefix: str = ""
) -> None:
    """Checks final latents and each stored step against its own peak."""
    final, after = run(network)
    g.compare(f"{prefix}final", final, **SAMPLER_TOLERANCE)
    name = f"{prefix}latents_after_step"
    expected = g.input(name)
    which = f"{name}_which"
    steps = g.input(which).tolist() if which in g else range(len(expected))
    for row, step in enumerate(steps):
        g.compare_with(f"{name}[{step}]", expected[row], after[step], **SAMPLER_TOLERANCE)


@adapter("F_sampler_toy", "F_sampler_toy_R1", "F_sampler_toy_Rmax1")
def check_sampler_toy(g: Golden) -> None:
    run = SamplerRun(g)
    grid = run.schedule.ddim(run.num_steps)
    g.compare("timesteps_in_order", grid.timesteps[::-1])
    compare_run(g, run, toy_network(run.schedule))
    g.compare("first_call_t", run.first_timesteps)
    together, _ = run(toy_network(run.schedule), batches_per_call=3)
    g.compare_with("final, 3 batches per call", g.peek("final"), together, **SAMPLER_TOLERANCE)


@adapter("F_sampler_unet", "F_sampler_unet_R1")
def check_sampler_unet(g: Golden) -> None:
    run = SamplerRun(g)
    weights = g.sibling("C_unet_small_weights")
    network = load_denoiser(weights, weights.entry["notes"])
    g.compare("timesteps_in_order", run.schedule.ddim(run.num_steps).timesteps[::-1])
    compare_run(g, run, network)
    compare_run(g, run, blended(network, run.schedule), "blend_")
    g.compare("first_call_t", run.first_timesteps)


@adapter("E_conditioning")
def check_conditioning(g: Golden) -> None:
    faces = torch.from_numpy(g.input("faces").astype(np.int64))
    tables = RendererTables.from_template(
        g.input("template_verts"), faces.numpy(), g.input("head_vertex_ids").astype(np.int64)
    )
    g.compare("props", tables.props, atol=1e-6)
    g.compare("face_mask", tables.face_mask)
    vertices = torch.from_numpy(g.input("verts_2d"))
    offsets = torch.from_numpy(g.input("offsets_3d"))
    rays = torch.from_numpy(g.input("ray_map"))
    reference_mask = torch.from_numpy(g.input("reference_mask"))
    crop_masks = torch.from_numpy(g.input("out_crop_mask"))
    (fine,) = {int(m[1]) for m, _ in g.match(r"pix_to_face_(\d+)")}
    fragments = rasterize(vertices, faces, (fine, fine))
    expected = g.input(f"pix_to_face_{fine}").astype(np.int64)
    covered = expected >= 0
    actual = as_array(fragments.face_index)
    for view in range(len(expected)):
        # manifest: "allow ~0.3 % of covered pixels"; mmdm.md: at most 5 silhouette pixels per view.
        size = int(covered[view].sum())
        silhouette = int(((actual[view] >= 0) != covered[view]).sum())
        g.check(silhouette <= 5, f"view {view}: {silhouette} silhouette pixels differ")
        g.compare_with(
            f"pix_to_face_{fine}[{view}]",
            expected[view][covered[view]],
            actual[view][covered[view]],
            max_outliers=max(0.003, 5 / size),
        )
    same = (actual == expected) & covered
    shown = np.where(same[..., None], as_array(fragments.barycentrics), 0)
    # Float32 barycentrics of slivers; everything else agrees to a few 1e-7.
    g.compare_with(
        "barycentrics", np.where(same[..., None], g.input(f"bary_{fine}"), 0), shown, atol=1e-4
    )
    depth = g.input(f"zbuf_{fine}")
    g.compare_with(
        "depth", np.where(same, depth, 0), np.where(same, as_array(fragments.depth), 0), rtol=1e-5
    )
    inside = covered & as_array(tables.face_mask)[np.clip(actual, 0, None)]
    different = int((inside != g.input(f"render_mask_{fine}")).sum())
    g.check(different <= 5 * len(expected), f"render mask: {different} pixels differ")

    for match, name in list(g.match(r"pos_enc_(\d+)_view(\d+)(?:_and_(\d+))?")):
        size, views = int(match[1]), [int(v) for v in match.groups()[1:] if v]
        step = rays.shape[-1] // size  # a smaller model sees every n-th ray and mask pixel
        thin = [t[views][..., ::step, ::step] for t in (rays, reference_mask, crop_masks)]
        maps = as_array(
            conditioning_maps(
                vertices[views],
                offsets[views],
                thin[0],
                thin[1],
                thin[2],
                tables,
                ConditioningConfig(),
            )
        )
        # mmdm.md: 2e-4 away from silhouettes, where at most 5 fine pixels per view may differ.
        share = 5 / size**2
        picked = maps if len(views) > 1 else maps[0]
        g.compare(name, picked, atol=2e-4, max_outliers=share)


HEAD_TOLERANCE = {"xy": 2e-5, "z": 1e-6, "offsets": 1e-6, "rays": 1e-6, "image": 2e-5}


@adapter("G_datasets")
def check_datasets(g: Golden) -> None:
    fit = {name.removeprefix("fit_"): array for name, array in g.inputs(r"fit_.*").items()}
    head = head_model(g)
    ids = flame_template(g).head_vertex_ids
    resolution = int(g.input("resolution"))
    names = [str(name) for name in fit["camera_order"]]
    cameras = [names.index(str(c)) for c in g.input("frames_cam")]
    times = g.input("frames_t").tolist()
    g.inputs(r"img_.*")
    g.inputs(r"bg_.*")
    bare = [
        ViewParameters(
            shape=fit["shape"], expr=fit["expr"][t], rot=fit["rot"][t], tra=fit["tra"][t],
            eye_rot=fit["eye_rot"][t], fx=float(fit["fx"][c, 0]), fy=float(fit["fy"][c, 0]),
            cx=float(fit["cx"][c, 0]), cy=float(fit["cy"][c, 0]), extr=fit["extr"][c],
            resolution=tuple(fit["resolutions"][c].tolist()), crop_box=(0, 0, 1, 1),
            timestep_id=t,
        )
        for c, t in zip(cameras, times, strict=True)
    ]  # fmt: skip
    references = with_crop_boxes(head, bare, ids)
    for i, (view, camera, t) in enumerate(zip(references, cameras, times, strict=True)):
        compare_frame(g, f"ref{i}", view, references[0], head, is_reference=True)
        frames_of = [int(m[1]) for m, _ in g.match(rf"img_{names[camera]}_(\d+)")]
        image = g.peek(f"img_{names[camera]}_{min(t, max(frames_of))}")
        matte_name = f"bg_{names[camera]}_{min(t, max(frames_of))}"
        matte = g.peek(matte_name) if matte_name in g else None
        cropped = crop_and_normalise(composite_over_white(image, matte), view.crop_box, resolution)
        g.compare(f"ref{i}_jpg", cropped, atol=HEAD_TOLERANCE["image"])

    base = references[0]
    settings = SamplingSettings(
        parity=True,
        seed=int(g.input("gen_numpy_seed")),
        yaw_range_deg=float(g.input("gen_yaw_range")),
        pitch_range_deg=float(g.input("gen_pitch_range")),
    )
    count = len(g.peek("gen_extr"))
    extr, yaw, pitch = view_cameras(base, count, settings, "subject")
    g.compare("gen_draws", np.stack([yaw, pitch], axis=-1), atol=1e-9)
    direction = published_head_direction(base.rot) * FLIP
    g.compare("gen_head_dir_cv", direction[None], atol=1e-6)
    g.compare("gen_center_yaw_pitch", published_yaw_pitch(direction, base.extr), atol=1e-4)
    g.compare("gen_extr", extr, atol=1e-6)
    factor = np.float32(g.input("gen_expr_factor"))
    rows, gaze = choose_rows(count, len(g.peek("gen_expr_in")), settings.seed, "subject")
    expr = g.input("gen_expr_in")[rows] * factor
    eye_rot = g.input("gen_eye_rot_in")[gaze] * factor
    g.compare("gen_expr_out", expr, atol=1e-6)
    g.compare("gen_eye_rot_out", eye_rot, atol=1e-6)
    for i in sorted({int(m[1]) for m, _ in g.match(r"gen(\d+)_.*")}):
        view = replace(base, expr=expr[i], eye_rot=eye_rot[i], extr=extr[i], timestep_id=None)
        (boxed,) = with_crop_boxes(head, [view], ids)
        compare_frame(g, f"gen{i}", boxed, base, head, is_reference=False)


def compare_frame(
    g: Golden,
    prefix: str,
    view: ViewParameters,
    base: ViewParameters,
    head: HeadModel,
    is_reference: bool,
) -> None:
    """Everything stored about one frame: mesh, rays, masks, box."""
    pixels, offsets = head_in_pixels(head, [view])
    crops, _ = head_in_crops(head, [view])
    name = f"{prefix}_verts_2d_pixels"
    if name in g:
        # Pixels: 1.4e-4 between implementations (mmdm.md, I).
        expected = g.input(name)
        g.compare_with(f"{name} xy", expected[:, :2], pixels[0, :, :2], atol=3e-4)
        g.compare_with(f"{name} z", expected[:, 2], pixels[0, :, 2], rtol=HEAD_TOLERANCE["z"])
    name = f"{prefix}_verts_2d"
    if name in g:
        expected = g.input(name)
        tolerance = HEAD_TOLERANCE["xy"]
        g.compare_with(f"{name} xy", expected[:, :2], crops[0, :, :2], atol=tolerance)
        g.compare_with(f"{name} z", expected[:, 2], crops[0, :, 2], rtol=HEAD_TOLERANCE["z"])
    if f"{prefix}_offsets_3d" in g:
        g.compare(f"{prefix}_offsets_3d", offsets[0], atol=HEAD_TOLERANCE["offsets"])
    g.compare(f"{prefix}_crop_box", view.crop_box)
    name = f"{prefix}_ray_map"
    size = g.peek(name).shape[-1]
    g.compare(name, ray_maps([view], size, np.asarray(base.extr))[0], atol=HEAD_TOLERANCE["rays"])
    inside = (
        crop_mask(view.resolution, view.crop_box, size) if is_reference else np.ones((size, size))
    )
    g.compare(f"{prefix}_out_crop_mask", inside)
    g.compare(f"{prefix}_reference_mask", np.full((size, size), float(is_reference)))


GEOMETRY = {"atol": 1e-9}  # manifest: "geometry 1e-9"
RESIZE_F64 = {"atol": 1e-4}  # manifest: "resize f64 1e-4"


@adapter("G_utils")
def check_utils(g: Golden) -> None:
    g.check(float(g.input("crop_margin")) == pytest.approx(CROP_SCALE - 1), "crop margin")
    boxes = []
    for x0, y0, x1, y1 in g.input("bbox_in"):
        boxes.append(crop_box_from_points(np.array([[x0, y0], [x1, y1]])))
    g.compare("bbox_out", boxes)
    vertices = g.input("bbox_verts")
    g.compare("bbox_from_verts", crop_box_from_points(vertices[g.input("bbox_ids")]))

    image = g.input("crop_img")
    for i, box in enumerate(tuple(b) for b in g.input("crop_boxes").tolist()):
        if f"crop_out{i}" in g:
            g.compare(f"crop_out{i}", crop(image, box, 255))
        if f"crop_mask{i}" in g:
            g.compare(f"crop_mask{i}", crop(np.ones((*image.shape[:2], 1), np.uint8), box, 0))
        if f"crop_float_out{i}" in g:
            # The float input is the same image divided by 3.
            g.compare(f"crop_float_out{i}", crop(image / 3, box, 255), **GEOMETRY)
    for kind in ("f64", "u8", "mask"):
        source = g.input("resize_mask_in" if kind == "mask" else f"resize_in_{kind}")
        for match, name in list(g.match(rf"resize_{kind}_(\d+)")):
            size = int(match[1])
            # OpenCV's fixed-point bilinear kernel may be off by one, its area average is exact.
            exact = 0.0 if size <= source.shape[0] else 1.0
            tolerance = RESIZE_F64 if kind == "f64" else {"atol": exact}
            g.compare(name, resize(source, size), **tolerance)
    g.compare("bg_out", composite_over_white(image, g.input("bg_matte")), **GEOMETRY)
    box = tuple(g.input("p3d_crop_box").tolist())
    # float32 arithmetic on coordinates in the thousands.
    g.compare("p3d_out", pixels_to_ndc(torch.from_numpy(vertices), box), atol=1e-6, rtol=1e-6)

    intrinsics, extr = g.input("ray_K"), g.input("ray_E")
    view = ViewParameters(
        shape=np.zeros(150), expr=np.zeros(65), rot=np.zeros(3), tra=np.zeros(3),
        eye_rot=np.zeros(3), fx=intrinsics[0, 0], fy=intrinsics[1, 1], cx=intrinsics[0, 2],
        cy=intrinsics[1, 2], extr=extr, resolution=(1, 1),
        crop_box=tuple(g.input("ray_box").tolist()),
    )  # fmt: skip
    size = g.peek("ray_out").shape[-1]
    g.compare("ray_out", ray_maps([view], size, np.eye(4))[0], **GEOMETRY)
    angles = g.input("pivot_angles")
    pivoted = pivot_camera(extr, g.input("pivot_target"), angles[:, 0], angles[:, 1])
    g.compare("pivot_out", pivoted, **GEOMETRY)
    rotations = g.input("headdir_rot")
    directions = np.stack([published_head_direction(rot) for rot in rotations])
    # Given as float32 rotation vectors.
    g.compare("headdir_out", directions, atol=1e-6)
    expected_directions = g.peek("headdir_out")
    cameras = [extr if i % 2 else np.eye(4) for i in range(len(rotations))]
    g.compare(
        "yawpitch_out",
        [
            published_yaw_pitch(d * FLIP, e)
            for d, e in zip(expected_directions, cameras, strict=True)
        ],
        **GEOMETRY,
    )
    stream = np.random.RandomState(int(g.input("ellipse_seed")))
    count = len(g.peek("ellipse_out"))
    # Limits as stated in the manifest's notes.
    limits = re.search(r"limits \((\d+),\s*(\d+)\)", str(g.entry.get("notes", "")))
    yaw_range, pitch_range = (float(v) for v in limits.groups()) if limits else (55.0, 20.0)
    drawn = [draw_angles(stream, yaw_range, pitch_range) for _ in range(count)]
    g.compare("ellipse_out", drawn, **GEOMETRY)
    g.compare("ellipse_next_uniform", stream.uniform(), **GEOMETRY)
