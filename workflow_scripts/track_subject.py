"""Rule track_subject: the head-model fit of one subject and its reference frames."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.settings import TrackingSettings
    from cap4d_core.tracking.precomputed import import_subject

    import_subject(
        job.input_file("fit").parent,
        job.output_file("fit").parent,
        TrackingSettings(**job.params["settings"]),
        job.input_file("head_model"),
        callback=job.progress("references"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
