"""Rule track_subject: the head-model fit of one subject and its reference frames."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.settings import TrackingSettings
    from cap4d_core.tracking.face_models_download import networks_folder
    from cap4d_core.tracking.precomputed import import_subject
    from cap4d_core.tracking.track import track_subject

    networks = networks_folder(job.input_files("networks"))
    settings = TrackingSettings(**job.params["settings"] | {"networks": networks})
    output, head_model = job.output_file("fit").parent, job.input_file("head_model")
    progress = job.progress("frames")
    if job.input_files("fit"):
        import_subject(job.input_file("fit").parent, output, settings, head_model, progress)
    else:
        track_subject(
            job.input_file("recording"),
            output,
            head_model,
            settings,
            progress,
            device=job.device,
            correspondence=job.input_file("landmarks"),
        )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
