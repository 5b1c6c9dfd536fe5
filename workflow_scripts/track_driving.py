"""Rule track_driving: the head-model fit and camera path of one driving sequence."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.settings import TrackingSettings
    from cap4d_core.tracking.precomputed import import_driving
    from cap4d_core.tracking.track import track_driving

    settings = TrackingSettings(**job.params["settings"])
    output, head_model = job.output_file("fit").parent, job.input_file("head_model")
    if job.input_files("fit"):
        trajectory = job.input_files("trajectory")
        import_driving(
            job.input_file("fit"),
            trajectory[0] if trajectory else None,
            output,
            job.params["start_frame"],
            job.params["num_frames"],
            settings,
            head_model,
        )
    else:
        track_driving(
            job.input_file("recording"),
            output,
            head_model,
            settings,
            job.progress("frames"),
            device=job.device,
            correspondence=job.input_file("landmarks"),
        )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
