"""Rule fit_avatar: a Gaussian avatar from reference and generated images."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.fitting import fit_avatar
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.settings import FittingSettings

    settings = FittingSettings(**job.params["settings"])
    fit_avatar(
        job.input_files("references") + job.input_files("generated"),
        HeadModel.load(job.input_file("head_model"), lower_jaw=settings.use_lower_jaw),
        settings,
        job.output_file("avatar").parent,
        callback=job.progress("iterations"),
        device=job.device,
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
