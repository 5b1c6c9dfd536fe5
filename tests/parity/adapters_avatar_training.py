"""Parity of losses, schedules, optimisers, densification, data loading and the training loop."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cap4d_core.avatar import densification, losses, optimizers, schedules
from cap4d_core.avatar.deformation import DeformationUNet, positional_encoding
from cap4d_core.avatar.gaussians import GaussianAvatar
from cap4d_core.avatar.image_data import composite_truncated, load_image_data, split_views
from cap4d_core.avatar.lpips import STAGES, TAP_CHANNELS, Lpips
from cap4d_core.avatar.renderer import RenderOutput
from cap4d_core.avatar.training import AvatarTrainer
from cap4d_core.files.image_set import read_view_parameters
from cap4d_core.geometry import crops
from cap4d_core.geometry.cameras import head_to_origin, invert_rigid
from cap4d_core.settings import PRESETS, FittingSettings
from tests.parity.adapters_avatar_geometry import recipe_tensor
from tests.parity.goldens import Golden, adapter
from tests.parity.head import load_head

GROUPS = optimizers.SPLAT_GROUPS


def tensor(array: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(array))


def number(golden: Golden, name: str) -> int:
    return int(golden.input(name).reshape(-1)[0])


@adapter("B3_posenc")
def check_positional_encoding(golden: Golden) -> None:
    rows = golden.peek("out.pos_enc_rows")
    encoding = positional_encoding(rows.shape[1])
    half = encoding.shape[0] // 2
    golden.compare("out.pos_enc_rows", encoding[:half, :, 0], atol=1e-5)
    golden.compare("out.pos_enc_cols", encoding[half:, 0, :], atol=1e-5)
    step = rows.shape[1] // golden.peek("out.full_probe").shape[1]
    golden.compare("out.full_probe", encoding[:, ::step, ::step], atol=1e-5)
    spread = (encoding[:half] - encoding[:half, :, :1]).abs().max()
    golden.compare("out.row_channels_constant_along_cols", spread.reshape(1), atol=1e-5)


@adapter("B5_unet_small")
def check_unet(golden: Golden) -> None:
    state = {
        name.removeprefix("in.sd."): tensor(array.astype(np.float32))
        for name, array in golden.inputs(r"in\.sd\..*").items()
    }
    channels = state["model.model.0.weight"].shape[0]
    layers = sum(t.ndim == 4 for t in state.values()) // 2
    network = DeformationUNet(channels, layers)
    network.load_state_dict(state)
    offsets = tensor(golden.input("in.offsets_f16").astype(np.float32))[None]
    encoding = positional_encoding(offsets.shape[-1])[None]
    with torch.no_grad():
        both = network(
            torch.cat([torch.cat([o, encoding], 1) for o in (offsets, torch.zeros_like(offsets))])
        )
    golden.compare("out.y", both[:1], atol=2e-4)
    golden.compare("out.y_zero_offsets", both[1:], atol=2e-4)


@adapter("C1_l1_ssim")
def check_image_losses(golden: Golden) -> None:
    a = tensor(golden.input("in.a"))[None].requires_grad_()
    b = tensor(golden.input("in.b"))[None]
    window = losses.gaussian_window(torch.float64)
    golden.compare("out.window", torch.outer(window, window), atol=1e-7)
    l1 = losses.l1_loss(a, b)
    golden.compare("out.l1", l1, atol=1e-6)
    golden.compare("out.l1_grad_a", torch.autograd.grad(l1, a)[0][0], atol=1e-8)
    # The golden's own rounding is 1.4e-7, of the 2-D convolution.
    similarity = losses.ssim(a, b, blur="window")
    golden.compare("out.ssim", similarity, atol=1e-5)
    golden.compare("out.ssim_grad_a", torch.autograd.grad(similarity, a)[0][0], atol=1e-7)
    golden.compare("out.ssim_identical", losses.ssim(a, a), atol=1e-6)


def recipe_lpips(seed: int, parity: bool = True) -> Lpips:
    """LPIPS with the random weights that the goldens name."""
    random = np.random.RandomState(seed)
    model = Lpips(parity=parity)
    widths = [3, *(w for stage in STAGES for w in stage)]
    with torch.no_grad():
        for layer, (i, o) in zip(model.convolutions, itertools.pairwise(widths), strict=True):
            layer.weight.copy_(tensor(random.randn(o, i, 3, 3) * math.sqrt(2 / (9 * i))))
            layer.bias.copy_(tensor(random.randn(o) * 0.05))
        for head, channels in zip(model.heads, TAP_CHANNELS, strict=True):
            head.copy_(tensor(np.abs(random.randn(1, channels, 1, 1))))
    return model


@adapter("C2_lpips_structure")
def check_lpips(golden: Golden) -> None:
    model = recipe_lpips(number(golden, "in.weight_seed"))
    x = tensor(golden.input("in.x"))[None].requires_grad_()
    y = tensor(golden.input("in.y"))[None]
    layers = model.distances(x, y)
    golden.compare("out.per_layer", layers[0], rtol=1e-4)
    distance = model(x, y)
    golden.compare("out.lpips", distance.reshape(1, 1, 1, 1), rtol=1e-4)
    golden.ignore("out.lpips_shape", "distances are returned per image, shape (B,)")
    golden.compare("out.grad_x", torch.autograd.grad(distance.sum(), x)[0][0], rel_to_peak=1e-3)
    golden.ignore("out.batch_sum", "the file does not say which images form the batch")


@adapter("C3_schedules")
def check_schedules(golden: Golden) -> None:
    for match, name in golden.match(r"out\.(.*)_f64"):
        preset = match[1].removesuffix("_quality")
        settings = FittingSettings(**PRESETS[preset].get("fitting", {}))
        rows = []
        for iteration in golden.peek(name)[:, 0].astype(int).tolist():
            weights = schedules.loss_weights(iteration, settings)
            rates = schedules.scheduled_rates(iteration, settings)
            rows.append(
                [
                    *(iteration, weights.lpips, weights.l1, weights.ssim),
                    *(rates["xyz"], rates["deform_net"], rates["neck"]),
                    schedules.sh_degree_at(iteration, settings),
                ]
            )
        golden.compare(name, np.array(rows), rtol=1e-6)


def splats_of(golden: Golden) -> tuple[densification.SplatTensors, torch.optim.Adam]:
    """Splats and optimiser state of a densification file."""
    tensors = {name: tensor(golden.input(f"in.{name}")) for name in GROUPS}
    counter = golden.input("in.binding_counter")
    splats = densification.SplatTensors(tensors, tensor(golden.input("in.binding")), len(counter))
    golden.check(np.array_equal(splats.binding_counter, counter), "binding_counter of the input")
    adam = optimizers.make_adam(splats.groups(), torch.nn.Linear(1, 1), FittingSettings())
    for name, parameter in splats.groups().items():
        adam.state[parameter] = {
            "step": tensor(golden.input(f"in.{name}.step")).clone(),
            "exp_avg": tensor(golden.input(f"in.{name}.exp_avg")),
            "exp_avg_sq": tensor(golden.input(f"in.{name}.exp_avg_sq")),
        }
    return splats, adam


def statistics_of(golden: Golden) -> densification.SplatStatistics:
    return densification.SplatStatistics(
        tensor(golden.input("in.xyz_gradient_accum")).clone(),
        tensor(golden.input("in.denom")).clone(),
        tensor(golden.input("in.max_radii2D")).clone(),
    )


def compare_splats(
    golden: Golden,
    splats: densification.SplatTensors,
    adam: torch.optim.Adam,
    statistics: densification.SplatStatistics,
) -> None:
    for name, parameter in splats.groups().items():
        golden.compare(f"out.{name}", parameter, atol=1e-6)
        for part in ("exp_avg", "exp_avg_sq"):
            golden.compare(f"out.{name}.{part}", adam.state[parameter][part], atol=1e-6)
        golden.compare(f"out.{name}.step", adam.state[parameter]["step"], atol=0)
    golden.compare("out.binding", splats.binding)
    golden.compare("out.binding_counter", splats.binding_counter)
    golden.compare("out.max_radii2D", statistics.max_radius, atol=1e-6)
    golden.compare("out.xyz_gradient_accum", statistics.gradient_sum, atol=1e-6)
    golden.compare("out.denom", statistics.count, atol=1e-6)


@adapter("D1_densify_noscreen", "D2_densify_screen")
def check_densification(golden: Golden) -> None:
    splats, adam = splats_of(golden)
    statistics = statistics_of(golden)
    views = sorted({match[1] for match, _ in golden.match(r"in\.(view\d+)\..*")})
    for view in views:
        visible = tensor(golden.input(f"in.{view}.visible"))[None]
        statistics.add(
            tensor(golden.input(f"in.{view}.means2d_grad"))[None],
            tensor(golden.input(f"in.{view}.radii"))[None],
            visible,
        )
    golden.compare("mid.xyz_gradient_accum", statistics.gradient_sum, atol=1e-6)
    golden.compare("mid.denom", statistics.count, atol=1e-6)
    golden.compare("mid.max_radii2D", statistics.max_radius, atol=1e-6)
    screen = number(golden, "in.max_screen_size")
    arguments = re.search(r"grad ([\d.e-]+)", golden.entry.get("pins", ""))
    densification.densify_and_prune(
        splats,
        adam,
        statistics,
        tensor(golden.input("in.face_scaling")),
        threshold=float(arguments[1]) if arguments else FittingSettings().densify_grad_threshold,
        dense_size=FittingSettings().percent_dense,
        max_screen_radius=screen if screen > 0 else None,
        noise=tensor(golden.input("in.split_eps")),
        parity=True,
    )
    golden.ignore(r"in\.face_(orien.*|center)", "not used by densification")
    compare_splats(golden, splats, adam, statistics)


@adapter("D3_prune")
def check_prune(golden: Golden) -> None:
    splats, adam = splats_of(golden)
    statistics = statistics_of(golden)
    flagged = tensor(golden.input("in.prune_mask"))
    removed = densification.prune(splats, adam, statistics, flagged, parity=True)
    golden.compare("out.effective_prune_mask", removed)
    golden.ignore(r"in\.face_.*", "not used by pruning")
    compare_splats(golden, splats, adam, statistics)


@adapter("D4_opacity_reset")
def check_opacity_reset(golden: Golden) -> None:
    opacity = tensor(golden.input("in.opacity"))
    zeros = {
        "xyz": (3,), "f_dc": (1, 3), "f_rest": (15, 3), "scaling": (3,), "rotation": (4,)
    }  # fmt: skip
    tensors = {name: torch.zeros(len(opacity), *shape) for name, shape in zeros.items()}
    binding = torch.zeros(len(opacity), dtype=torch.int64)
    splats = densification.SplatTensors({**tensors, "opacity": opacity}, binding, 1)
    adam = optimizers.make_adam(splats.groups(), torch.nn.Linear(1, 1), FittingSettings())
    # Any state will do: the moments are cleared and the counter kept.
    step = torch.as_tensor(golden.peek("out.step"))
    adam.state[splats.opacity] = {
        "step": step.clone(),
        "exp_avg": torch.ones_like(opacity),
        "exp_avg_sq": torch.ones_like(opacity),
    }
    densification.reset_opacity(splats, adam)
    golden.compare("out.opacity", splats.opacity, atol=1e-5)
    state = adam.state[splats.opacity]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        golden.compare(f"out.{name}", state[name], atol=1e-5)


@adapter("D6_sparse_adam")
def check_row_adam(golden: Golden) -> None:
    rows = golden.input("in.rows").tolist()
    cotangents = tensor(golden.input("in.cotangents"))
    table = torch.nn.Parameter(torch.zeros(golden.peek("out.weights").shape[1:]))
    neck = optimizers.RowAdam(table, 0.0)
    weights = []
    for row, cotangent, lr in zip(rows, cotangents, golden.input("in.lrs_f64"), strict=True):
        neck.lr = float(lr)
        loss = (cotangent * table[row]).sum() + losses.neck_loss(table[row][None])
        loss.backward()
        neck.step(torch.tensor([row]))
        weights.append(table.detach().clone())
    golden.compare("out.weights", torch.stack(weights), atol=2e-9)


@adapter("D7_adam")
def check_adam(golden: Golden) -> None:
    shapes = {"f_dc": (1, 3), "f_rest": (15, 3), "opacity": (1,), "scaling": (3,), "rotation": (4,)}
    xyz = tensor(golden.input("in.xyz0"))
    splats = {name: torch.nn.Parameter(torch.zeros(1, *shape)) for name, shape in shapes.items()}
    splats["xyz"] = torch.nn.Parameter(xyz.clone())
    net = torch.nn.ParameterList([tensor(golden.input("in.net0")).clone()])
    adam = optimizers.make_adam(splats, net, FittingSettings())
    have: dict[str, list[torch.Tensor]] = {"xyz": [], "net": []}
    gradients = tensor(golden.input("in.grads"))
    for of_xyz, of_net in zip(*gradients, strict=True):
        splats["xyz"].grad, net[0].grad = of_xyz.clone(), of_net[: len(net[0])].clone()
        adam.step()
        have["xyz"].append(splats["xyz"].detach().clone())
        have["net"].append(net[0].detach().clone())
    for name, values in have.items():
        golden.compare(f"out.{name}", torch.stack(values), atol=1e-6)


def dataset(golden: Golden) -> list[Path]:
    """Folders of the golden image sets, references first."""
    folder = golden.directory / "E_dataset"
    return [folder / "reference_images", folder / "generated_images"]


@adapter("E1_imageset")
def check_image_sets(golden: Golden) -> None:
    data = load_image_data(dataset(golden), parity=True)
    split = split_views(len(data), parity=True)
    ids = list(range(len(data)))
    golden.compare("out.rt", data.world_to_camera, atol=2e-6)
    golden.compare("out.K", data.intrinsics, atol=1e-3)
    mask = data.mask(torch.arange(len(data)))
    golden.compare("out.mask_bool", mask)
    first = read_view_parameters(sorted((dataset(golden)[0] / "flame").glob("*.npz"))[0])
    inside = crops.crop(np.ones(first.resolution, np.float32), first.crop_box, 0.0)
    golden.compare("out.mask_raw0", crops.resize(inside, data.size[0]), atol=1e-6)
    golden.compare("out.uid", ids)
    golden.compare("out.timestep", ids)
    # Width first in the file; crops are square.
    golden.compare("out.wh", [data.size[::-1]] * len(data))
    # The published lists are shuffled once; only membership matters.
    for name, members in {
        "train": split.train, "test": split.held_out, "val": split.validation
    }.items():  # fmt: skip
        golden.compare(f"out.{name}_uid", sorted(members, key=golden_order(golden, name)))
    golden.compare("out.mesh_shape0", data.shape, atol=1e-6)
    golden.compare("out.mesh_expr", data.expr, atol=1e-6)
    golden.compare("out.mesh_eye_rot", data.eye_rot, atol=1e-6)
    for name in ("rot", "tra"):  # the head stays at the origin
        golden.compare(f"out.mesh_{name}", torch.zeros(len(data), 3), atol=1e-6)
    golden.ignore("out.tgt_uid", "numbering of the driving sequence: frames are not numbered here")
    golden.ignore("out.extent", "the scene extent is the constant 1 (percent_dense is in metres)")


def golden_order(golden: Golden, name: str) -> Any:
    order = golden.peek(f"out.{name}_uid").tolist()
    return lambda uid: order.index(uid) if uid in order else len(order)


@adapter("E2_image_decode")
def check_image_decode(golden: Golden) -> None:
    images = load_image_data(dataset(golden), parity=True).images
    uids = tensor(golden.input("in.sel_uid")).long()
    golden.compare("out.images", images[uids].permute(0, 3, 1, 2) / 255.0, atol=1e-6)
    opaque = np.full((1, 256, 4), 255, np.uint8)
    opaque[0, :, :3] = golden.input("in.ramp")[:, None]
    ramp = composite_truncated(opaque)[0, :, 0]
    golden.compare("out.ramp_u8_effective", ramp.astype(np.int64))
    golden.compare("out.ramp_float", ramp / 255.0, atol=1e-6)
    rgba = composite_truncated(golden.input("in.rgba"))
    golden.compare("out.rgba_float", rgba.transpose(2, 0, 1) / 255.0, atol=1e-6)
    default = load_image_data(dataset(golden)).images.int()
    golden.check(int((default - images.int()).abs().max()) <= 1, "default decoding differs by > 1")


@adapter("E5_reverse_transform")
def check_head_to_origin(golden: Golden) -> None:
    extr, rot, tra = (tensor(golden.input(f"in.{name}")) for name in ("extr", "rot", "tra"))
    golden.compare("out.extr", head_to_origin(extr, rot, tra), atol=2e-6)
    # One entry of the published cameras.json: inverse of a camera of the image sets.
    uid = re.search(r"camera uid (\d+)", golden.entry.get("pins", ""))
    data = load_image_data(dataset(golden), parity=True)
    camera = invert_rigid(data.world_to_camera[int(uid[1]) if uid else 0].numpy())
    golden.compare("out.json_position", camera[:3, 3], atol=2e-6)
    golden.compare("out.json_rotation", camera[:3, :3], atol=2e-6)
    golden.compare("out.json_wh", data.size[::-1])


@adapter("E6_split_counts")
def check_split_counts(golden: Golden) -> None:
    counts = [split_views(n, parity=True) for n in golden.input("in.N").tolist()]
    golden.compare("out.n", [[len(s.train), len(s.held_out)] for s in counts])


def mock_render(
    means: torch.Tensor,
    quats: torch.Tensor,
    scales: torch.Tensor,
    opacities: torch.Tensor,
    sh: torch.Tensor,
    world_to_camera: torch.Tensor,
    intrinsics: torch.Tensor,
    width: int,
    height: int,
    *,
    sh_degree: int,
    background: Any,
    backend: str,
) -> RenderOutput:
    """The renderer of the golden training loop: one bilinear dab per splat."""
    extr, matrix = world_to_camera[0], intrinsics[0]
    camera = means[0] @ extr[:3, :3].T + extr[:3, 3]
    depth = camera[:, 2]
    u = matrix[0, 0] * camera[:, 0] / depth + matrix[0, 2]
    v = matrix[1, 1] * camera[:, 1] / depth + matrix[1, 2]
    means2d = torch.stack([u, v], -1)[None]
    means2d.requires_grad_() if not means2d.requires_grad else None
    colour = 0.5 + 0.28209479177387814 * sh[:, 0]
    if sh_degree > 0:
        colour = colour + 0.1 * sh[:, 1 : (sh_degree + 1) ** 2].mean(1)
    radius = 3 * scales[0].mean(-1) * matrix[0, 0] / depth
    weight = opacities * (0.5 + radius.clamp(max=5)) * (1 + 0.1 * quats[0, :, 0] ** 2)
    point = means2d[0] - 0.5
    corner = point.detach().floor()
    fraction = point - corner
    inside = (corner >= 0).all(-1) & (corner[:, 0] < width - 1) & (corner[:, 1] < height - 1)
    inside &= depth > 0.01
    numerator = torch.zeros(height * width, 3)
    denominator = torch.zeros(height * width)
    for dx in (0, 1):
        for dy in (0, 1):
            wx = fraction[:, 0] if dx else 1 - fraction[:, 0]
            wy = fraction[:, 1] if dy else 1 - fraction[:, 1]
            share = (weight * wx * wy)[inside]
            column, row = corner[inside, 0].long() + dx, corner[inside, 1].long() + dy
            pixel = row * width + column
            denominator = denominator.index_add(0, pixel, share)
            numerator = numerator.index_add(0, pixel, share[:, None] * colour[inside])
    image = (numerator + 0.5 * torch.as_tensor(background)) / (denominator[:, None] + 0.5)
    image = image.view(1, height, width, 3)
    radii = (radius * inside).detach()[None]
    return RenderOutput(image, denominator.view(1, height, width, 1), None, means2d, radii)


# Published configuration keys, by ours.
OPTIMISATION_KEYS = {
    "iterations": "iterations", "sh_warmup_iterations": "sh_warmup",
    "feature_lr": "lr_feature", "opacity_lr": "lr_opacity", "scaling_lr": "lr_scaling",
    "rotation_lr": "lr_rotation", "densify_until_iter": "densify_until",
    "densify_from_iter": "densify_from", "position_lr_init": "lr_position",
    "position_lr_final": "lr_position_final", "deform_net_w_decay": "weight_decay_deform_net",
    "deform_net_lr_init": "lr_deform_net", "deform_net_lr_final": "lr_deform_net_final",
    "neck_lr_init": "lr_neck", "neck_lr_final": "lr_neck_final",
    "lpips_linear_start": "lpips_start", "lpips_linear_end": "lpips_end",
    "n_unet_layers": "deform_net_layers", "n_points_per_triangle": "min_gaussians_per_face",
    "n_gaussians_init": "num_gaussians_init",
}  # fmt: skip


def published_settings(text: str) -> FittingSettings:
    """Settings from the published YAML."""
    content = yaml.safe_load(text)
    values: dict[str, Any] = {}
    for section in ("opt_params", "model_params"):
        for key, value in content[section].items():
            name = OPTIMISATION_KEYS.get(key, key)
            if name in FittingSettings.model_fields:
                values[name] = float(value) if isinstance(value, str) else value
    return FittingSettings(**values, parity=True, seed=0)


@adapter("D8_train_loop")
def check_training_loop(golden: Golden) -> None:
    settings = published_settings(str(golden.input("in.config_json")))
    data = load_image_data(dataset(golden), parity=True)
    head = load_head(golden.head_folder, mouth=True, lower_jaw=True)
    avatar = GaussianAvatar.create(head, data.shape, settings)
    offset = number(golden, "in.recipe_offset")
    state = {
        name: recipe_tensor(name, list(t.shape), offset)
        for name, t in avatar.deformation.state_dict().items()
    }
    avatar.deformation.load_state_dict(state)
    with torch.no_grad():
        avatar.deformation.last_layer.weight.zero_()
        avatar.deformation.last_layer.bias.zero_()
    golden.compare("out.init_xyz_head", avatar.splats.xyz[:20], atol=1e-6)
    order = tensor(golden.input("in.camera_timesteps")).long()
    seed = number(golden, "in.split_seed_base")
    trainer = AvatarTrainer(
        avatar,
        data,
        settings,
        lpips=recipe_lpips(number(golden, "in.lpips_seed")),
        render_fn=mock_render,
        view_order=lambda step, _: order[step : step + 1],
        split_noise=lambda call, rows: tensor(
            np.random.RandomState(seed + call).randn(rows, 3)
        ).float(),
    )
    rows, rates = [], []
    for iteration in range(1, len(order) + 1):
        count = len(avatar.splats)
        losses_now = trainer.step(iteration)
        rows.append([iteration, count, avatar.active_sh_degree, *losses_now.tolist()])
        groups = {group["name"]: group["lr"] for group in trainer.adam.param_groups}
        assert trainer.neck_adam is not None
        rates.append(
            [groups[n] for n in ("xyz", "f_dc", "f_rest", "opacity", "scaling", "rotation")]
            + [groups["deform_net"], trainer.neck_adam.lr]
        )
    expected = golden.peek("out.rows_f64")
    have = np.array(rows)
    golden.compare_with("rows: N", expected[:, 1], have[:, 1], rtol=2e-3)
    # A loss that is all rounding noise at the start has no relative accuracy.
    golden.compare("out.rows_f64", have, rtol=1e-3, atol=1e-9)
    golden.compare("out.lrs_f64", np.array(rates), rtol=1e-6)
    golden.compare("out.neck_offset", trainer.neck_offsets, rel_to_peak=2e-2)
    network = avatar.deformation
    golden.compare("out.last_layer_bias", network.last_layer.bias, rel_to_peak=2e-2)
    golden.compare(
        "out.last_layer_weight_norm", network.last_layer.weight.norm().reshape(1), rtol=2e-2
    )
    first = network.model.model[0].weight.flatten()
    golden.compare("out.first_layer_weight_head", first[:50], rel_to_peak=2e-2)
    ids = tensor(golden.input("out.final_ids")).long()
    splats = avatar.splats
    if expected[-1, 1] != have[-1, 1]:
        golden.ignore(r"out\.final_.*", "another number of splats: rows do not correspond")
        return
    golden.compare("out.final_binding", splats.binding[ids])
    finals = {
        "xyz": splats.xyz, "features_dc": splats.f_dc, "opacity": splats.opacity,
        "scaling": splats.scaling, "rotation": splats.rotation,
    }  # fmt: skip
    for name, value in finals.items():
        want = golden.peek(f"out.final_{name}")
        golden.compare(
            f"out.final_{name}", value[ids], atol=np.inf, mean_atol=0.02 * float(want.std())
        )
    rest = splats.f_rest.abs().mean((0, 2))
    golden.compare("out.final_f_rest_mean_abs_per_coeff", rest, rtol=2e-2)
