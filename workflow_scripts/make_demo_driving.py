"""Rule make_demo_driving: a procedural motion with its camera path."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.driving import write_demo_driving

    write_demo_driving(job.output_file("fit").parent, head_model_dir=job.input_file("head_model"))


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
