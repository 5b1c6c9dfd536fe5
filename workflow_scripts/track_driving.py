"""Rule track_driving: the head-model fit and camera path of one driving sequence."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.settings import TrackingSettings
    from cap4d_core.tracking.precomputed import import_driving

    trajectory = job.input_files("trajectory")
    import_driving(
        job.input_file("fit"),
        trajectory[0] if trajectory else None,
        job.output_file("fit").parent,
        job.params["start_frame"],
        job.params["num_frames"],
        TrackingSettings(**job.params["settings"]),
        job.input_file("head_model"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
