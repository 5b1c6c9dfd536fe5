"""Rule make_demo_held_out: views of a procedural person that no fit may see."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.world import write_demo_held_out
    from cap4d_core.settings import DemoSettings

    settings = DemoSettings(**job.params["settings"])
    write_demo_held_out(
        job.output_file("folder"),
        job.params["seed"],
        num_views=settings.num_held_out,
        resolution=settings.resolution,
        crop_size=job.params["crop_size"],
        device=job.device,
        callback=job.progress("views"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
