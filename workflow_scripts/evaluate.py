"""Rule evaluate: the figures of all subjects and reenactments beside one another."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.evaluation.summary import summarise_evaluations

    pairs = [(subject, driving) for subject, driving in job.params["reenactments"]]
    summarise_evaluations(
        dict(zip(job.params["subjects"], job.input_files("subjects"), strict=True)),
        dict(zip(pairs, job.input_files("reenactments"), strict=True)),
        job.output_file("summary").parent,
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
