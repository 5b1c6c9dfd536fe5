"""Typed settings of every stage: the only place for keys, defaults, ranges and meanings.

Light on purpose (pydantic only): the Snakefile is parsed again in every cluster job.
`cap4d_core.config` fills them from config.yaml, a quality preset and the command line.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cap4d_core.training_settings import TrainingSettings

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class StrictModel(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HeadModelSettings(StrictModel):
    """Morphable head model (rule prepare_head_model)."""

    path: str = Field(
        "auto",
        description="Folder with the head model and its companions, or its .pkl; 'demo' builds the "
        "procedural head; 'download' fetches FLAME 2023 and the companions (login: docs/usage.md); "
        "'auto' = 'demo' for demo subjects, else assets/flame.",
    )
    url: str = Field(
        "https://download.is.tue.mpg.de/download.php?domain=flame&sfile=FLAME2023.zip&resume=1",
        description="Where 'download' gets the archive of FLAME from.",
    )
    sha256: str | None = Field(
        None,
        description="Expected SHA-256 of that archive. The site publishes none: null = trust the "
        "first download, and ask the same of later ones.",
    )
    companions: str | None = Field(
        None,
        description="Folder of the companion files (templates, masks, blink, generation "
        "expressions) when they do not lie beside the model; 'download' fetches the public ones.",
    )
    companions_url: str = Field(
        "https://raw.githubusercontent.com/felixtaubner/cap4d/main/data/assets/",
        description="Folder where 'download' finds the companions, itself or in flame/, datasets/.",
    )
    companions_sha256: dict[str, str] | None = Field(
        None,
        description="Expected SHA-256 by file name; null = those of the released files.",
    )


class TrackingSettings(StrictModel):
    """Fit of the head model to the input (rules track_subject, track_driving)."""

    backend: Literal["landmarks", "pixel3dmm", "precomputed"] = Field(
        "landmarks",
        description="How photos and videos are tracked: 'landmarks' = the built-in tracker; "
        "'pixel3dmm' = an installed Pixel3DMM; 'precomputed' = not at all, only ready fits are "
        "taken. Rows that bring a ready fit are imported whatever is said here.",
    )
    frame_step: int | None = Field(
        None,
        ge=1,
        description="Use every n-th photo or video frame; null = all, of reference videos at most "
        "about 300.",
    )
    max_frames: int | None = Field(None, ge=1, description="Use at most so many frames.")
    start_s: float | None = Field(None, ge=0, description="Skip so many seconds of a video.")
    end_s: float | None = Field(None, gt=0, description="Stop there in a video, seconds.")
    focal_px: float | None = Field(
        None,
        gt=0,
        description="Known focal length in pixels; null = from EXIF, else estimated.",
    )
    smoothness: float = Field(
        1.0, ge=0, description="Smoothing over time of video fits; 0 = frames on their own."
    )
    face: Literal["largest", "central", "left", "right"] = Field(
        "largest", description="Which face to track when there are several."
    )
    max_references: int = Field(
        100, ge=1, description="Reference frames to choose from photos or a video."
    )
    networks: str | None = Field(
        None,
        description="Folder of face networks that replace the shipped ones of the same name, e.g. "
        "larger ones (tools/convert_face_models.py); 'download' = from networks_url.",
    )
    networks_url: str | None = Field(
        None, description="Where 'download' gets a .zip of such a folder from."
    )
    networks_sha256: str | None = Field(
        None, description="Expected SHA-256 of that .zip; must be given."
    )
    pixel3dmm_path: str | None = Field(
        None, description="Pixel3DMM checkout; null = the environment variable PIXEL3DMM_PATH."
    )
    foreign_basis: bool = Field(
        False,
        description="The fits were made with a head model of another shape/expression basis: keep "
        "pose, camera, gaze and blink, set the other coefficients to zero.",
    )


class MMDMSettings(StrictModel):
    """Weights of the multi-view diffusion model (rule prepare_mmdm)."""

    path: str | None = Field(
        "auto",
        description="Released .ckpt, a folder with one, or one written by prepare_mmdm; 'demo' = "
        "the small weights of the demo world; 'auto' = 'demo' for demo subjects, else assets/mmdm.",
    )
    url: str | None = Field(
        None,
        description="Where to download the .ckpt from (https) when it is not here yet; leave path "
        "at 'auto' then.",
    )
    config_url: str | None = Field(
        None, description="Where to download its config_dump.yaml from, when it has one."
    )
    sha256: str | None = Field(
        None, description="Expected SHA-256 of the .ckpt; checked when set. Pin it for downloads."
    )


def _in_order(interval: list[float]) -> list[float]:
    if interval != sorted(interval):
        raise ValueError("the end comes before the start")
    return interval


class SamplingSettings(StrictModel):
    """Multi-view diffusion sampling (rules plan_views to decode_views)."""

    num_views: int = Field(
        840,
        ge=0,
        description="Views to generate per subject; 0 fits the avatar on the reference images.",
    )
    num_inference_steps: int = Field(100, ge=1, description="Denoising steps.")
    solver: Literal["ddim", "dpm-solver++"] = Field(
        "ddim",
        description="'ddim' = first order, as published; 'dpm-solver++' = second order (2M), for "
        "fewer steps.",
    )
    guidance_scale: float = Field(
        2.0, ge=0, description="Classifier-free guidance; 1 switches it off."
    )
    guidance_interval: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]], AfterValidator(_in_order)
    ] = Field(
        [0.0, 1.0],
        min_length=2,
        max_length=2,
        description="Part of the steps that is guided, as fractions from the noisiest to the last; "
        "steps outside take half the time.",
    )
    max_references: int = Field(
        4,
        ge=1,
        description="References per network call (R is the smaller of this and their count).",
    )
    views_per_call: int = Field(
        8, ge=2, description="Views per network call, references included; fixed by the weights."
    )
    resolution: int = Field(
        512, ge=16, description="Side of reference and generated images, pixels."
    )
    yaw_range_deg: float = Field(55.0, ge=0, le=180, description="Half axis of the view ellipse.")
    pitch_range_deg: float = Field(20.0, ge=0, le=90, description="Half axis of the view ellipse.")
    expression_factor: float = Field(1.0, ge=0, description="Scales the generated expressions.")
    base_reference: int | None = Field(
        None, ge=0, description="Reference that views are planned around; null = the most frontal."
    )
    plan: str | None = Field(
        None,
        description="Own views instead of drawn ones: a .tsv with columns yaw_deg, pitch_deg "
        "(about the frontal view) and optionally expression_row, or an .npz with yaw_deg and "
        "pitch_deg or extr, and optionally expr and eye_rot; num_views is then its number of rows.",
    )
    num_shards: int = Field(
        8, ge=1, description="Parts of the views, one GPU job each per round; changes results."
    )
    sync_steps: list[float] = Field(
        [0.02, 0.06, 0.14, 0.30],
        description="Where all views are dealt to the shards anew: step indices (whole numbers) or "
        "fractions of the steps; each starts a new round.",
    )
    seed: int = Field(124, ge=0, description="Base seed; every view derives its own noise from it.")
    batches_per_call: int | None = Field(
        None, ge=1, description="Batches of views per network call; null = by GPU memory."
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="'auto' = bf16 on GPUs that have it, fp32 on the CPU; 'fp8' = bf16 with large "
        "layers in 8 bits (on Ada linear ones, from Hopper on convolutions, too): faster at hardly "
        "any loss (benchmarks/README.md).",
    )
    fast_path: Literal["auto", "off"] = Field(
        "auto",
        description="Leave out what cannot change the generated views; 'off' = the plain network.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile the networks; 'auto' = on GPUs, below fp32, in jobs long enough.",
    )
    low_memory: bool = Field(
        False, description="Tiles the autoencoder and shrinks batches: less than 8 GB at 512 px."
    )
    checkpoint_every_steps: int = Field(
        5, ge=1, description="A killed shard job resumes from its last multiple of this."
    )
    preview_every_steps: int = Field(
        0, ge=0, description="Decode a progress picture every so many steps; 0 = only at the end."
    )
    parity: bool = Field(
        False, description="Reproduce the published view planning, slips included (docs/parity.md)."
    )


class FittingSettings(StrictModel):
    """Gaussian avatar fitting (rule fit_avatar)."""

    iterations: int = Field(
        100_000,
        ge=1,
        description="Training views seen; a step takes batch_size of them. All schedules count so.",
    )
    batch_size: int = Field(
        1,
        ge=1,
        description="Views per step, B (parity: 1); learning rates are multiplied by B at the "
        "start of a fit, by sqrt(B) at its end.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile the training step; 'auto' = on GPUs, in fits long enough.",
    )
    use_generated_views: bool = Field(
        True, description="Fit on generated views too; false = reference images only."
    )
    reference_images: Literal["original", "autoencoded"] = Field(
        "original",
        description="Fit on the reference crops themselves or on their autoencoder round trips "
        "(published).",
    )
    uv_resolution: int = Field(128, description="Side of the UV grid the splats are bound to.")
    num_gaussians_init: int = Field(100_000, ge=1, description="Splats to place at the start.")
    min_gaussians_per_face: int = Field(2, ge=1, description="At least this many on every face.")
    use_lower_jaw: bool = Field(True, description="Lower half of the mouth interior.")
    sh_degree: int = Field(3, ge=0, le=3, description="Spherical harmonics degree of the colours.")
    sh_warmup: int = Field(1_000, ge=1, description="Views between increases of the active degree.")
    deform_net_channels: int = Field(64, ge=4, description="Width of the deformation U-Net.")
    deform_net_layers: int = Field(6, ge=2, description="Down-samplings of the deformation U-Net.")
    static_neck: bool = Field(False, description="No learned per-frame neck rotation.")
    densify_from: int = Field(8_000, ge=0)
    densify_until: int = Field(70_000, ge=0)
    densification_interval: int = Field(2_000, ge=1)
    opacity_reset_interval: int = Field(20_000, ge=1)
    densify_grad_threshold: float = Field(
        1e-6, ge=0, description="Loss per pixel, at 512 px images."
    )
    max_gaussians: int = Field(
        3_000_000, ge=1, description="More splats than this count as a diverged fit."
    )
    percent_dense: float = Field(0.01, ge=0, description="Splats larger than this (m) are split.")
    lr_position: float = Field(5e-3, ge=0, description="Initial; decays to a hundredth.")
    lr_position_final: float | None = Field(
        None, ge=0, description="null = a hundredth of lr_position."
    )
    lr_feature: float = Field(2.5e-3, ge=0)
    lr_opacity: float = Field(0.025, ge=0)
    lr_scaling: float = Field(5e-3, ge=0)
    lr_rotation: float = Field(1e-3, ge=0)
    lr_deform_net: float = Field(1e-5, ge=0, description="Initial; decays to a hundredth.")
    lr_deform_net_final: float | None = Field(
        None, ge=0, description="null = a hundredth of lr_deform_net."
    )
    lr_neck: float = Field(1e-5, ge=0, description="Initial; decays to a hundredth.")
    lr_neck_final: float | None = Field(None, ge=0, description="null = a hundredth of lr_neck.")
    weight_decay_deform_net: float = Field(2e-3, ge=0)
    lambda_dssim: float = Field(0.4, ge=0, le=1)
    lambda_lpips_end: float = Field(0.9, ge=0, le=1, description="Final share of the LPIPS term.")
    w_lpips: float = Field(0.1, ge=0)
    lpips_start: int = Field(10_000, ge=0)
    lpips_end: int = Field(60_000, ge=0)
    lpips_weights: str | None = Field(
        None,
        description="LPIPS (VGG16 + linear heads) weights file; 'download' fetches torchvision's "
        "VGG16 and adds the heads; null = fit without LPIPS.",
    )
    lpips_url: str = Field(
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        description="Where 'download' gets VGG16 from; digits of the SHA-256 at the end of the "
        "file name are checked.",
    )
    require_lpips: bool = Field(False, description="Absent LPIPS weights are an error.")
    lambda_scale: float = Field(1.0, ge=0)
    threshold_scale: float = Field(1.0, ge=0)
    metric_scale: bool = False
    lambda_xyz: float = Field(1e-3, ge=0)
    threshold_xyz: float = Field(2.0, ge=0)
    metric_xyz: bool = False
    lambda_laplacian: float = Field(1.0, ge=0)
    lambda_relative_deform: float = Field(0.4, ge=0)
    lambda_relative_rot: float = Field(0.005, ge=0)
    lambda_neck: float = Field(1.0, ge=0)
    evaluate_every: int = Field(10_000, ge=1, description="Views between evaluations and previews.")
    checkpoint_every_s: float = Field(
        120.0, gt=0, description="Seconds between checkpoints; a killed fit resumes from the last."
    )
    renderer: Literal["auto", "gsplat", "cpu", "torch"] = Field(
        "auto", description="'auto' = gsplat on CUDA, the built-in renderer on the CPU."
    )
    seed: int = Field(0, ge=0)
    parity: bool = Field(
        False, description="Reproduce the published arithmetic, defects included (docs/parity.md)."
    )

    @property
    def views_per_step(self) -> int:
        """B; the published arithmetic knows steps of one view only."""
        return 1 if self.parity else self.batch_size


class AnimationSettings(StrictModel):
    """Rendering of driven avatars (rule animate_avatar)."""

    fps: float | None = Field(
        None,
        gt=0,
        description="Playback rate; frames are not resampled. null = that of the trajectory, else "
        "of the driving sequence, else 24.",
    )
    camera: Literal["auto", "static", "orbit"] = Field(
        "auto",
        description="'auto' = the given trajectory, else 'static'; 'static' = the camera of the "
        "driving sequence; 'orbit' = that camera swinging about the head.",
    )
    short_trajectory: Literal["hold", "loop"] = Field(
        "hold", description="What follows the last camera of a trajectory that is too short."
    )
    resolution: int | None = Field(
        None, ge=16, description="Height in pixels; null = that of the trajectory."
    )
    background: tuple[float, float, float] = Field((1.0, 1.0, 1.0), description="RGB in 0..1.")
    sound: bool = Field(
        True,
        description="Add the sound of the driving video when the playback rate is that of its fit.",
    )
    transparent: bool = Field(False, description="Also write renders.mov (ProRes 4444 with alpha).")
    export_ply: bool = Field(True, description="Write exported_animation.ply.")
    compress_ply: bool = Field(False, description="8-bit vertex offsets in exported_animation.ply.")
    export_splats: bool = Field(
        True, description="Write avatar_frame0.ply: the first frame for any splat viewer."
    )
    png_frames: bool = Field(False, description="Also write frames/%05d.png.")
    depth: bool = Field(False, description="Also write depth/%05d.png: 16 bits, millimetres.")
    frame_batch: int = Field(8, ge=1, description="Frames rendered at once.")
    crf: int = Field(18, ge=0, le=51, description="H.264 quality; lower is better.")
    parity: bool = Field(
        False,
        description="Reproduce the published export: offsets rounded down, unused grid vertices "
        "left as they are, depth truncated (docs/parity.md).",
    )


class EvaluationSettings(StrictModel):
    """Measured quality (rules hold_out, evaluate_avatar, evaluate_reenactment, evaluate)."""

    protocol: Literal["ground_truth", "held_out_frames", "held_out_cameras"] = Field(
        "ground_truth",
        description="What avatars are compared with: 'ground_truth' = demo people and the column "
        "held_out of the subjects table; else a part of every subject's own frames or cameras, "
        "which neither views nor avatar are made from then (docs/evaluation.md).",
    )
    fraction: Fraction = Field(
        0.2, description="Share of the frames, or of the cameras, that is set aside."
    )
    seed: int = Field(0, ge=0, description="Which frames or cameras are set aside.")
    max_frames: int = Field(
        100, ge=3, description="Compare at most so many views, or frames of a performance."
    )
    mask_dilation: int = Field(
        5, ge=0, description="Pixels by which the matte is grown that pictures are compared in."
    )
    identity_model: str | None = Field(
        None,
        description="Face recognition network (.onnx; aligned faces, RGB in -1..1) for identity "
        "similarity; needs onnxruntime; null = without.",
    )


class DemoSettings(StrictModel):
    """The procedural world of demo subjects (rules make_demo_...)."""

    num_references: int = Field(64, ge=1, description="Photos per demo subject.")
    num_held_out: int = Field(16, ge=1, description="Views that demo avatars are evaluated on.")
    num_frames: int = Field(48, ge=1, description="Frames of a demo motion.")
    resolution: int = Field(160, ge=16, description="Side of photos and videos, pixels.")


class SubjectSettings(StrictModel):
    """Everything above, as one object: what config.yaml may hold besides tables."""

    head_model: HeadModelSettings = HeadModelSettings()
    tracking: TrackingSettings = TrackingSettings()
    mmdm: MMDMSettings = MMDMSettings()
    sampling: SamplingSettings = SamplingSettings()
    fitting: FittingSettings = FittingSettings()
    animation: AnimationSettings = AnimationSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    demo: DemoSettings = DemoSettings()
    training: TrainingSettings = TrainingSettings()


# What each quality preset sets; every other key keeps its default. Released values, except `demo`.
PRESETS: dict[str, dict[str, dict[str, object]]] = {
    # Minutes on two CPU cores: one photo of a procedural person, the small weights of their world.
    # Ten steps and this guidance are best for these weights (docs/sharding.md).
    "demo": {
        "demo": {"num_references": 1},
        "sampling": {
            "num_views": 56,
            "num_inference_steps": 10,
            "guidance_scale": 1.5,
            "resolution": 128,
            "num_shards": 2,
            "sync_steps": [0.06, 0.3],
        },
        # Short runs need rates well above the published ones, which suit 100 000 iterations; larger
        # splats are cheap here and stand in for the shoulders, which the head model lacks.
        "fitting": {
            "iterations": 1_200,
            "uv_resolution": 64,
            "deform_net_channels": 16,
            "deform_net_layers": 5,
            "num_gaussians_init": 8_000,
            "sh_warmup": 200,
            "static_neck": True,
            "densify_from": 0,
            "densify_until": 0,
            "lr_position": 1e-2,
            "lr_feature": 2e-2,
            "lr_opacity": 0.05,
            "lr_scaling": 2e-2,
            "lr_rotation": 3e-3,
            "lr_deform_net": 2e-3,
            "lambda_scale": 0.02,
            "lpips_start": 400,
            "lpips_end": 1_000,
            "evaluate_every": 400,
        },
    },
    "debug": {
        "sampling": {"num_inference_steps": 10, "num_views": 28, "num_shards": 1},
        "fitting": {
            "iterations": 1_000,
            "batch_size": 8,
            "sh_warmup": 100,
            "densify_from": 80,
            "densify_until": 700,
            "densification_interval": 200,
            "opacity_reset_interval": 200,
            "lpips_start": 100,
            "lpips_end": 600,
            "num_gaussians_init": 100_000,
        },
    },
    "low": {
        "sampling": {"num_inference_steps": 50, "num_views": 210},
        "fitting": {
            "iterations": 25_000,
            "batch_size": 8,
            "sh_warmup": 500,
            "densify_from": 2_000,
            "densify_until": 24_000,
            "densification_interval": 1_000,
            "opacity_reset_interval": 10_000,
            "lpips_start": 4_000,
            "lpips_end": 24_000,
            "num_gaussians_init": 25_000,
        },
    },
    "medium": {
        "sampling": {"num_inference_steps": 50, "num_views": 420},
        "fitting": {
            "iterations": 50_000,
            "batch_size": 8,
            "sh_warmup": 1_000,
            "densify_from": 4_000,
            "densify_until": 40_000,
            "densification_interval": 2_000,
            "opacity_reset_interval": 10_000,
            "lpips_start": 5_000,
            "lpips_end": 40_000,
            "num_gaussians_init": 50_000,
        },
    },
    "default": {"fitting": {"batch_size": 8}},
    "high": {"fitting": {"batch_size": 8}},
}
