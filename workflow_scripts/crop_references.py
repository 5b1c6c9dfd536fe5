"""Rule crop_references: reference crops for fitting without a diffusion model."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.diffusion.references import crop_references
    from cap4d_core.settings import SamplingSettings

    crop_references(
        job.input_file("fit").parent,
        job.input_file("head_model"),
        job.output_file("index").parent,
        SamplingSettings(**job.params["settings"]),
        callback=job.progress("references"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
