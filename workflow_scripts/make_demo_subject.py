"""Rule make_demo_subject: photos and fit of a procedural person."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.subject import write_demo_subject

    write_demo_subject(
        job.output_file("fit").parent,
        seed=job.params["seed"],
        head_model_dir=job.input_file("head_model"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
