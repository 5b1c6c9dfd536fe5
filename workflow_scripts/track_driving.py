"""Rule track_driving: the head-model fit and camera path of one driving sequence."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.batch.asset_cache import library_versions, through_cache
    from cap4d_core.settings import TrackingSettings
    from cap4d_core.tracking.face_models_download import networks_folder
    from cap4d_core.tracking.precomputed import import_driving
    from cap4d_core.tracking.track import track_driving

    networks = networks_folder(job.input_files("networks"))
    settings = TrackingSettings(**job.params["settings"] | {"networks": networks})
    output, head_model = job.output_file("fit").parent, job.input_file("head_model")
    start_frame, num_frames = job.params["start_frame"], job.params["num_frames"]

    def make() -> None:
        if job.input_files("fit"):
            fit, given = job.input_file("fit"), job.input_files("trajectory")
            path = given[0] if given else None
            import_driving(fit, path, output, start_frame, num_frames, settings, head_model)
            return
        track_driving(
            job.input_file("recording"),
            output,
            head_model,
            settings,
            job.progress("frames"),
            device=job.device,
            correspondence=job.input_file("landmarks"),
        )

    inputs = {name: job.input_files(name) for name in job.input}
    params = ("settings", "start_frame", "num_frames")
    through_cache(job, output, inputs, make, params, library_versions(job.device))


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
