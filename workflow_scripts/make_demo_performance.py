"""Rule make_demo_performance: true pictures of a demo person who performs a driving sequence."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.evaluation.demo_truth import write_demo_performance
    from cap4d_core.files.tracking import read_fit

    write_demo_performance(
        job.output_file("folder"),
        job.params["seed"],
        read_fit(job.input_file("driving")),
        max_frames=job.params["max_frames"],
        crop_size=job.params["crop_size"],
        device=job.device,
        callback=job.progress("pictures"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
