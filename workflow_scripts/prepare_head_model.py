"""Rule prepare_head_model: head model and companions in one checked folder."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.flame.assets import prepare_head_model

    given = job.input_files("companions")
    companions = given[0] if given else None
    if companions is not None and companions.is_file():
        companions = companions.parent  # the record of a download lies beside what it lists
    prepare_head_model(job.input_file("source"), companions, job.output_file("folder"))


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
