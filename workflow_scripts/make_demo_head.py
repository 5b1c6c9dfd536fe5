"""Rule make_demo_head: the procedural head model, in the layout of the real one."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.head import write_demo_head

    write_demo_head(job.output_file("folder"))


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
