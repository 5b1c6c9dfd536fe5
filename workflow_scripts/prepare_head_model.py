"""Rule prepare_head_model: head model and companions in one checked folder."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.batch.asset_cache import through_cache
    from cap4d_core.flame.assets import find_companions, find_model, prepare_head_model

    given = job.input_files("companions")
    companions = given[0] if given else None
    if companions is not None and companions.is_file():
        companions = companions.parent  # the record of a download lies beside what it lists
    source, output = job.input_file("source"), job.output_file("folder")
    model = find_model(source)
    through_cache(
        job,
        output,
        {"model": model, **find_companions(source, model, companions)},
        lambda: prepare_head_model(source, companions, output),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
