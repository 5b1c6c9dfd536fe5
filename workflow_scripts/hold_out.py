"""Rule hold_out: a part of a subject's own frames or cameras is kept back for the evaluation."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.evaluation.protocol import hold_out

    hold_out(
        job.input_file("fit").parent,
        job.input_file("head_model"),
        job.output_file("fit").parent,
        job.wildcards["subject"],
        protocol=job.params["protocol"],
        fraction=job.params["fraction"],
        seed=job.params["seed"],
        resolution=job.params["resolution"],
        callback=job.progress("pictures"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
