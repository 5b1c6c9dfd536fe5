"""Rule evaluate_avatar: the avatar against images that it was not fitted on."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.gaussians import GaussianAvatar
    from cap4d_core.evaluation.evaluate import evaluate_avatar
    from cap4d_core.evaluation.identity import NOT_SET, OnnxIdentity
    from cap4d_core.evaluation.protocol import read_split
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.settings import EvaluationSettings

    settings = EvaluationSettings(**job.params["settings"])
    head_model = HeadModel.load(job.input_file("head_model"), lower_jaw=job.params["lower_jaw"])
    identity = settings.identity_model
    evaluate_avatar(
        GaussianAvatar.load(job.input_file("avatar").parent, head_model, job.device),
        head_model,
        job.input_file("held_out"),
        job.input_file("references").parent,
        job.output_file("metrics").parent,
        callback=job.progress("views"),
        mask_dilation=settings.mask_dilation,
        lpips_weights=next(iter(job.input_files("lpips")), None),
        identity=OnnxIdentity.load(identity) if identity else None,
        identity_absent=NOT_SET,
        max_frames=settings.max_frames,
        protocol=read_split(next(iter(job.input_files("split")), None)),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
