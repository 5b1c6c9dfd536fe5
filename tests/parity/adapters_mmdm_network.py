"""Parity of the diffusion schedule, embeddings, denoiser and autoencoder.

Weights in the goldens carry the released names; they go through the same key maps as a checkpoint.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.diffusion.embeddings import encode_positions, time_projection
from cap4d_core.diffusion.released_config import config_from_released
from cap4d_core.diffusion.released_layout import (
    AUTOENCODER_PREFIX,
    DENOISER_PREFIX,
    autoencoder_key_map,
    convert_to_ours,
    denoiser_key_map,
    denoiser_module_names,
)
from cap4d_core.diffusion.schedule import NoiseSchedule, ScheduleConfig
from tests.parity.goldens import Golden, adapter

DENOISER_ATOL = 3e-5  # manifest: "atol 3e-5 on CPU float32"
AUTOENCODER_ATOL = 5e-5  # manifest: "atol 5e-5"


@adapter("A_schedule")
def check_schedule(g: Golden) -> None:
    config = ScheduleConfig(
        num_train_timesteps=len(g.peek("betas")),
        zero_snr=bool(g.input("cfg_zero_snr_shift")),
        shift_snr=bool(g.input("cfg_shift_schedule")),
        num_frames=int(g.input("cfg_n_frames")),
        image_size=int(g.input("cfg_image_size")),
        minus_one_shift=bool(g.input("cfg_minus_one_shift")),
        sqrt_shift=bool(g.input("cfg_sqrt_shift")),
        negative_shift=bool(g.input("cfg_negative_shift")),
    )
    schedule = NoiseSchedule.from_config(config)
    for name in (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "posterior_variance",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        g.compare(name, getattr(schedule, name), rtol=2e-6)
    # 1e-12 relative, but betas are differences from 1: allow the rounding of those.
    exact = {"rtol": 1e-12, "atol": 1e-14}
    g.compare("f64_betas_before_snr", schedule.base_betas_f64, rtol=1e-12)
    g.compare("f64_betas_after_snr_unclipped", schedule.unclipped_betas_f64, **exact)
    g.compare("f64_betas", schedule.betas_f64, **exact)
    g.compare("f64_shift_ratio", schedule.shift_ratio, rtol=1e-12)
    for name, actual in (
        ("f64_alphas_cumprod_before_shift", schedule.alphas_cumprod_before_shift_f64),
        ("f64_alphas_cumprod", schedule.alphas_cumprod_f64),
    ):
        g.compare_with(f"{name}[:-5]", g.peek(name)[:-5], actual[:-5], rtol=1e-12)
        g.compare(name, actual, rtol=1e-6)
    for steps in sorted({int(m[1]) for m, _ in g.match(r"S(\d+)_.*")}):
        grid = schedule.ddim(steps)
        g.check(
            schedule.num_steps_run(steps) == len(g.peek(f"S{steps}_timesteps")),
            f"S{steps}: number of steps",
        )
        g.compare(f"S{steps}_timesteps", grid.timesteps)
        for name in ("alphas", "alphas_prev", "sqrt_one_minus_alphas", "x_factor", "e_factor"):
            g.compare(f"S{steps}_{name}", getattr(grid, name), rtol=2e-6)
        g.compare(f"S{steps}_sigmas", grid.sigmas)


@adapter("B_embeddings")
def check_embeddings(g: Golden) -> None:
    timesteps = torch.from_numpy(g.input("timesteps"))
    for match, name in list(g.match(r"temb_(\d+)(?:_f64)?")):
        # Products t * f up to 1000 are rounded to float32 before the cosine.
        g.compare(name, time_projection(int(match[1]))(timesteps), atol=1e-4)
    encoded = encode_positions(
        torch.from_numpy(g.input("pos_in")), torch.from_numpy(g.input("pos_freqs"))
    )
    g.compare("pos_out", encoded, atol=2e-5)


def tensors(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """Stored weights (float16-exact) as a float32 state dict with released keys."""
    return {prefix + k: torch.from_numpy(v.astype(np.float32)) for k, v in arrays.items()}


def load_denoiser(weights: Golden, notes: dict[str, Any]) -> MMDMDenoiser:
    """Denoiser of the weights file, in the config that the manifest gives."""
    config = MMDMConfig.from_dict(config_from_released(notes))
    denoiser = MMDMDenoiser(config)
    state = convert_to_ours(
        tensors(weights.inputs(r".*"), DENOISER_PREFIX), denoiser_key_map(config)
    )
    denoiser.load_state_dict(state)
    return denoiser.eval().requires_grad_(False)


def load_autoencoder(weights: Golden, notes: dict[str, Any]) -> Autoencoder:
    """Autoencoder of the weights file."""
    partial = config_from_released(notes)["autoencoder"]
    config = MMDMConfig.from_dict({"autoencoder": partial}).autoencoder
    autoencoder = Autoencoder(config)
    state = convert_to_ours(
        tensors(weights.inputs(r".*"), AUTOENCODER_PREFIX), autoencoder_key_map(config)
    )
    autoencoder.vae.load_state_dict(state)
    return autoencoder.eval().requires_grad_(False)


@adapter("C_unet_small_weights")
def check_denoiser_weights(g: Golden) -> None:
    """Every tensor has its place, and shapes alone give the sizes stated in the manifest."""
    denoiser = load_denoiser(g, g.entry["notes"])
    ours = denoiser.state_dict()
    for key, name in denoiser_key_map(denoiser.config).items():
        g.compare(key.removeprefix(DENOISER_PREFIX), ours[name])


@adapter("D_vae_small_weights")
def check_autoencoder_weights(g: Golden) -> None:
    autoencoder = load_autoencoder(g, g.entry["notes"])
    ours = autoencoder.vae.state_dict()
    for key, name in autoencoder_key_map(autoencoder.config).items():
        released = key.removeprefix(AUTOENCODER_PREFIX)
        g.compare(released, ours[name].reshape(g.peek(released).shape))


@adapter("C_unet_small_io")
def check_denoiser(g: Golden) -> None:
    denoiser = load_denoiser(g.sibling("C_unet_small_weights"), g.entry["notes"]["config"])
    x, timesteps, z_input, ref_mask, pos_enc = (
        torch.from_numpy(g.input(n)) for n in ("x", "timesteps", "z_input", "ref_mask", "pos_enc")
    )
    cond = {"pos_enc": pos_enc, "z_input": z_input, "ref_mask": ref_mask}
    uncond = {
        "pos_enc": torch.zeros_like(pos_enc),
        "z_input": torch.zeros_like(z_input),
        "ref_mask": ref_mask,
    }
    no_reference = cond | {"ref_mask": torch.zeros_like(ref_mask)}
    blocks = record_blocks(denoiser)
    with torch.no_grad():
        g.compare("y", denoiser(x, timesteps, cond), atol=DENOISER_ATOL)
        recorded = dict(blocks)
        g.compare("y_uncond_zero_pos_and_z", denoiser(x, timesteps, uncond), atol=DENOISER_ATOL)
        g.compare("y_no_reference", denoiser(x, timesteps, no_reference), atol=DENOISER_ATOL)
    for match, name in list(g.match(r"act_(.+)")):
        # Statistics [mean, std, first 6, last 6]; wider, as inner activations are larger than y.
        g.compare(name, statistics(recorded[match[1]]), rel_to_peak=1e-4)


def statistics(activation: Tensor) -> np.ndarray:
    flat = activation.flatten().double().cpu().numpy()
    return np.concatenate([[flat.mean(), flat.std()], flat[:6], flat[-6:]])


def record_blocks(denoiser: MMDMDenoiser) -> dict[str, Tensor]:
    """Outputs of the released program's blocks (`in00`, `mid`, `out00`, `final`), by forward hooks.

    A released block ends with the last of its modules: resnet, attention, up-sampler.
    """
    outputs: dict[str, Tensor] = {}
    modules = dict(denoiser.named_modules())

    def hook(label: str) -> Any:
        def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[label] = (output[0] if isinstance(output, tuple) else output).detach()

        return store

    for ours, theirs in denoiser_module_names(denoiser.config).items():
        parts = theirs.split(".")
        if ours not in modules or (".resnets." in ours and ours.split(".resnets.")[1].count(".")):
            continue
        if parts[0] in ("input_blocks", "output_blocks"):
            label = f"{parts[0].removesuffix('put_blocks')}{int(parts[1]):02d}"
        else:
            label = {"middle_block": "mid", "out": "final"}.get(parts[0], "")
        if label:
            modules[ours].register_forward_hook(hook(label))
    return outputs


@adapter("C_unet_small_modules")
def check_denoiser_modules(g: Golden) -> None:
    weights = g.sibling("C_unet_small_weights")
    denoiser = load_denoiser(weights, weights.entry["notes"])
    modules = dict(denoiser.named_modules())
    ours = {theirs: name for name, theirs in denoiser_module_names(denoiser.config).items()}
    num_views = denoiser.config.views_per_call
    attention = {"cross_attention_kwargs": {"num_views": num_views}}
    emb = torch.from_numpy(g.input("emb"))

    def output(kind: str, released: str, x: Tensor) -> Tensor:
        if kind == "resblock":
            return modules[ours[released]](x, emb)
        if kind in ("spatial", "attn3d"):
            return modules[ours[released]](x, return_dict=False, **attention)[0]
        if kind == "block":  # a transformer block inside an attention module
            parent, inner = released.split(".transformer_blocks.")
            return modules[f"{ours[parent]}.transformer_blocks.{inner}"](x, **attention)
        if kind == "down":
            return modules[ours[f"{released}.op"].removesuffix(".conv")](x)
        if kind == "up":
            return modules[ours[f"{released}.conv"].removesuffix(".conv")](x)
        raise KeyError(kind)

    with torch.no_grad():
        for match, name in list(g.match(r"(resblock|spatial|attn3d|block|down|up)_(.+)_x")):
            x = torch.from_numpy(g.input(name))
            actual = output(match[1], match[2], x)
            g.compare(f"{name.removesuffix('_x')}_y", actual, atol=DENOISER_ATOL)
        x = torch.from_numpy(g.input("out_x"))
        x = denoiser.conv_out(denoiser.conv_act(denoiser.conv_norm_out(x)))
        g.compare("out_y", x, atol=DENOISER_ATOL)
        t = torch.from_numpy(g.input("time_embed_t"))
        y = denoiser.time_embedding(denoiser.time_proj(t))
        g.compare("time_embed_y", y, atol=DENOISER_ATOL)


@adapter("D_vae_small_io")
def check_autoencoder(g: Golden) -> None:
    autoencoder = load_autoencoder(g.sibling("D_vae_small_weights"), g.entry["notes"])
    scale = autoencoder.config.scaling_factor
    image = torch.from_numpy(g.input("image"))
    noise = torch.from_numpy(g.input("posterior_noise"))

    def compare(name: str, actual: Tensor) -> None:
        g.compare(name, actual, atol=AUTOENCODER_ATOL)

    with torch.no_grad():
        compare("encoder_out_before_quant", autoencoder.vae.encoder(image))
        mean, std = autoencoder.posterior(image)
        compare("mean", mean)
        compare("std", std)
        compare("logvar", 2 * std.log())
        latents = autoencoder.encode(image, noise)
        compare("sample", latents / scale)
        compare("z_scaled", latents)
        z = torch.from_numpy(g.input("decode_in"))
        compare("decode_out", autoencoder.decode(z * scale))
        compare("decode_first_stage_out", autoencoder.decode(z))
        mean, std = autoencoder.posterior_of_moments(torch.from_numpy(g.input("clamp_moments")))
        # std spans e^-15 to e^10, so it is compared relative to its values.
        g.compare("clamp_std", std, rtol=2e-6, atol=1e-12)
        g.compare("clamp_logvar", 2 * std.log(), atol=AUTOENCODER_ATOL)
