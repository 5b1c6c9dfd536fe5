"""Rule make_demo_driving: a procedural motion with its camera path."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.world import write_demo_driving
    from cap4d_core.settings import DemoSettings

    settings = DemoSettings(**job.params["settings"])
    write_demo_driving(
        job.output_file("fit").parent,
        num_frames=settings.num_frames,
        resolution=settings.resolution,
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
