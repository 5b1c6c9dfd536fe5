"""Rule prepare_head_model: head model and companions in one checked folder."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.flame.assets import prepare_head_model

    companions = job.input_files("companions")
    prepare_head_model(
        job.input_file("source"),
        companions[0] if companions else None,
        job.output_file("folder"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
