"""Rule place_landmarks: where the face landmarks are on the head model."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.batch.asset_cache import library_versions, through_cache
    from cap4d_core.tracking.correspondence import load_or_compute
    from cap4d_core.tracking.face_models_download import networks_folder

    head_model, landmarks = job.input_file("head_model"), job.output_file("landmarks")
    given = job.input_files("networks")
    networks = networks_folder(given)
    through_cache(
        job,
        landmarks.parent,
        {"head_model": head_model} | ({"networks": given[0]} if given else {}),
        lambda: load_or_compute(head_model, landmarks, job.device, networks),
        versions=library_versions(job.device),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
