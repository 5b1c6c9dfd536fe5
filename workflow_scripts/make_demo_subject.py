"""Rule make_demo_subject: photos and fit of a procedural person."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.world import write_demo_subject
    from cap4d_core.settings import DemoSettings

    settings = DemoSettings(**job.params["settings"])
    write_demo_subject(
        job.output_file("fit").parent,
        job.params["seed"],
        num_references=settings.num_references,
        resolution=settings.resolution,
        device=job.device,
        callback=job.progress("photos"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
