"""Rule import_avatar: an avatar that was fitted elsewhere."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.import_avatar import import_avatar
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.manifest import manifest

    head_model = HeadModel.load(job.input_file("head_model"), lower_jaw=job.params["lower_jaw"])
    output = job.output_file("avatar").parent
    with manifest(job, output):
        import_avatar(job.input_file("source"), head_model, output)


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
