"""Rule evaluate_reenactment: the avatar driven by somebody else's performance."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.gaussians import GaussianAvatar
    from cap4d_core.evaluation.identity import NOT_SET, OnnxIdentity
    from cap4d_core.evaluation.reenactment import evaluate_reenactment
    from cap4d_core.files.tracking import read_fit
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.settings import EvaluationSettings

    settings = EvaluationSettings(**job.params["settings"])
    head_model = HeadModel.load(job.input_file("head_model"), lower_jaw=job.params["lower_jaw"])
    identity = settings.identity_model
    evaluate_reenactment(
        GaussianAvatar.load(job.input_file("avatar").parent, head_model, job.device),
        head_model,
        read_fit(job.input_file("driving")),
        job.input_file("references").parent,
        job.output_file("metrics").parent,
        callback=job.progress("frames"),
        landmarks_file=job.input_file("landmarks"),
        truth=next(iter(job.input_files("truth")), None),
        max_frames=settings.max_frames,
        identity=OnnxIdentity.load(identity) if identity else None,
        identity_absent=NOT_SET,
        mask_dilation=settings.mask_dilation,
        lpips_weights=next(iter(job.input_files("lpips")), None),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
