"""Rule make_demo_held_out: views of a procedural person that no fit may see."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.demo.subject import write_demo_held_out

    write_demo_held_out(
        job.output_file("folder"),
        seed=job.params["seed"],
        head_model_dir=job.input_file("head_model"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
