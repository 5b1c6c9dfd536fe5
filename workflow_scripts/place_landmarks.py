"""Rule place_landmarks: where the face landmarks are on the head model."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.tracking.correspondence import load_or_compute

    load_or_compute(job.input_file("head_model"), job.output_file("landmarks"), job.device)


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
