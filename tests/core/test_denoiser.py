"""The denoiser: laws of its structure on tiny random networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cap4d_core.diffusion.autoencoder import Autoencoder
from cap4d_core.diffusion.conditioning_types import FrameConditioning
from cap4d_core.diffusion.denoiser import MMDMConfig, MMDMDenoiser
from cap4d_core.errors import ConfigError
from tests.core.mmdm_models import TINY, random_denoiser, random_frames

FLOPS = Path(__file__).parents[1] / "goldens" / "mmdm" / "flops.json"

# float32 sums in another order; outputs are of order 1.
ATOL = 2e-5


def test_order_of_views_does_not_matter() -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=2, num_references=1)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = FrameConditioning(
        cond.pos_enc[:, order], cond.z_input[:, order], cond.ref_mask[:, order]
    )
    expected = denoiser(latents, timesteps, cond)[:, order]
    actual = denoiser(latents[:, order], timesteps[:, order], shuffled)
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_samples_of_a_batch_do_not_see_each_other() -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=2, num_references=1)
    both = denoiser(latents, timesteps, cond)
    for i in (0, 1):
        alone = denoiser(latents[i : i + 1], timesteps[i : i + 1], cond.index([i]))
        torch.testing.assert_close(alone[0], both[i], atol=ATOL, rtol=0)


def test_noisy_latents_of_references_are_replaced() -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=1, num_references=2)
    other = latents.clone()
    other[:, :2] += 5.0
    out, out_other = (denoiser(x, timesteps, cond) for x in (latents, other))
    torch.testing.assert_close(out[:, 2:], out_other[:, 2:], atol=0, rtol=0)
    torch.testing.assert_close(out[:, :2], latents[:, :2] - cond.z_input[:, :2])


def test_references_reach_the_other_views_through_attention_across_views() -> None:
    latents, timesteps, cond = random_frames(TINY, batch=1, num_references=1)
    changed = FrameConditioning(cond.pos_enc, cond.z_input + 1.0, cond.ref_mask)

    def gap(config: MMDMConfig) -> float:
        denoiser = random_denoiser(config)
        a, b = (denoiser(latents, timesteps, c)[:, 1:] for c in (cond, changed))
        return float((a - b).abs().max())

    assert gap(TINY) > 1e-4
    # No level wide enough for attention across views: views are independent.
    assert gap(TINY.model_copy(update={"multi_view_min_mult": 3})) == 0.0


def test_attention_spans_views_exactly_at_wide_levels() -> None:
    config = MMDMConfig(model_channels=32, head_channels=16)
    with torch.device("meta"):
        denoiser = MMDMDenoiser(config)
    spans: dict[str, set[bool]] = {}
    for name, module in denoiser.named_modules():
        if name.endswith("attn1"):
            block = ".".join(name.split(".")[:2]) if "mid" not in name else "mid_block"
            spans.setdefault(block, set()).add(module.processor.across_views)
    assert spans == {
        "down_blocks.0": {False},
        "down_blocks.1": {True},
        "down_blocks.2": {True},
        "mid_block": {True},
        "up_blocks.1": {True},
        "up_blocks.2": {True},
        "up_blocks.3": {False},
    }


def test_released_size() -> None:
    with torch.device("meta"):
        denoiser = MMDMDenoiser(MMDMConfig())
    assert sum(p.numel() for p in denoiser.parameters()) == 815_549_764
    assert len(denoiser.state_dict()) == 576


def test_cost_of_a_full_size_call() -> None:
    """Counted multiply-adds, attention across views included, equal the published network's."""
    expected = json.loads(FLOPS.read_text())
    config = MMDMConfig()
    v, s = config.views_per_call, config.latent_size
    with torch.device("meta"), torch.no_grad():
        denoiser, autoencoder = MMDMDenoiser(config), Autoencoder(config.autoencoder)
        latents = torch.empty(1, v, 4, s, s)
        cond = FrameConditioning(
            torch.empty(1, v, s, s, config.condition_channels), latents, latents[:, :, :1]
        )
        counts = []
        for call in (
            lambda: denoiser(latents, torch.zeros(1, v, dtype=torch.long), cond),
            lambda: autoencoder.vae.encode(torch.empty(1, 3, 512, 512)),
            lambda: autoencoder.vae.decode(torch.empty(1, 4, 64, 64)),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            counts.append(counter.get_total_flops())
    names = ("unet_b1_v8", "vae_encode_512", "vae_decode_512")
    assert counts == [expected[name] for name in names]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # Half precision keeps 8 (bf16) or 11 (fp16) bits; about 20 layers in sequence.
    [(torch.bfloat16, 0.05), (torch.float16, 0.01)],
)
def test_half_precision_stays_close(dtype: torch.dtype, bound: float) -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=2, num_references=1)
    exact = denoiser(latents, timesteps, cond)
    rounded = denoiser.to(dtype)(latents, timesteps, cond)
    assert rounded.dtype == torch.float32  # latents stay in their own type
    generated = slice(1, None)
    error = (rounded - exact)[:, generated].std() / exact[:, generated].std()
    assert 0 < error < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_compute_in_float32(dtype: torch.dtype) -> None:
    """A norm in half precision equals the float32 norm, rounded once at the end."""
    generator = torch.Generator().manual_seed(0)
    x = (100.0 + torch.randn(2, 64, 16, 16, generator=generator)).to(dtype)
    for norm, value in ((nn.GroupNorm(8, 64), x), (nn.LayerNorm(16), x)):
        half = norm.to(dtype)(value)
        full = norm.float()(value.float())
        # One unit in the last place of half precision; a mean of 100 in half would lose everything.
        spacing = torch.finfo(dtype).eps
        torch.testing.assert_close(half.float(), full, rtol=spacing, atol=spacing)


def test_softmax_scores_are_float32() -> None:
    """Scores of hundreds that differ by less than bfloat16's spacing are told apart."""
    query = torch.full((1, 1, 1, 8), 16.0, dtype=torch.bfloat16)
    key = torch.full((1, 1, 2, 8), 2.0, dtype=torch.bfloat16)
    key[0, 0, 1, 0] = 2.03125  # score 16 / sqrt(8) * 0.03125 higher at about 90: spacing is 0.5
    value = torch.tensor([[[[0.0] * 8, [1.0] * 8]]], dtype=torch.bfloat16)
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    expected = torch.sigmoid(torch.tensor(16 / 8**0.5 * 0.03125))
    assert out[0, 0, 0, 0].float() == pytest.approx(float(expected), abs=2e-3)


def test_channels_last_is_the_same_network() -> None:
    denoiser = random_denoiser()
    inputs = random_frames(TINY, batch=1, num_references=1)
    expected = denoiser(*inputs)
    actual = denoiser.to(memory_format=torch.channels_last)(*inputs)
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)


def test_mapping_and_dataclass_conditioning_agree() -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=1, num_references=1)
    as_mapping = {"pos_enc": cond.pos_enc, "z_input": cond.z_input, "ref_mask": cond.ref_mask}
    assert torch.equal(denoiser(latents, timesteps, as_mapping), denoiser(latents, timesteps, cond))


def test_gradients_reach_all_parameters() -> None:
    denoiser = random_denoiser().requires_grad_(True)
    inputs = random_frames(TINY, batch=1, num_references=1)
    denoiser(*inputs).square().mean().backward()
    without = [n for n, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_shapes_that_do_not_fit_are_refused() -> None:
    denoiser = random_denoiser()
    latents, timesteps, cond = random_frames(TINY, batch=1, num_references=1)
    with pytest.raises(ValueError, match="timesteps must be"):
        denoiser(latents, timesteps[:, :2], cond)
    with pytest.raises(ValueError, match="pos_enc must be"):
        denoiser(latents[:, :3], timesteps[:, :3], cond)
    with pytest.raises(ValueError, match="multiples of 2"):
        denoiser(latents[..., :7], timesteps, cond)
    with pytest.raises(ValueError, match="ref_mask of shape"):
        FrameConditioning(cond.pos_enc, cond.z_input, cond.ref_mask[:, :2])


def test_config_round_trip_and_messages() -> None:
    assert MMDMConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ConfigError) as error:
        MMDMConfig.from_dict({"model_channel": 320, "latent_size": "big"})
    assert "model_channel" in str(error.value) and "latent_size" in str(error.value)
    with pytest.raises(ConfigError, match="head_channels = 48"):
        MMDMConfig.from_dict({"head_channels": 48})


def test_conditioning_operations() -> None:
    _, _, cond = random_frames(TINY, batch=3, num_references=1)
    assert torch.equal(cond.index([2, 0]).pos_enc, cond.pos_enc[[2, 0]])
    blank = cond.unconditional()
    assert not blank.pos_enc.any() and not blank.z_input.any()
    assert torch.equal(blank.ref_mask, cond.ref_mask)
    stacked = FrameConditioning.stack([blank, cond])
    assert stacked.z_input.shape == (2, *cond.z_input.shape) and len(stacked) == 2
    assert len(FrameConditioning.cat([cond, blank])) == 6
    assert cond.to(dtype=torch.float16).ref_mask.dtype == torch.float16
