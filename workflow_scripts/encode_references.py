"""Rule encode_references: reference crops and their latents."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.diffusion.references import encode_references
    from cap4d_core.settings import SamplingSettings

    encode_references(
        job.input_file("fit").parent,
        job.input_file("head_model"),
        job.input_file("mmdm"),
        job.output_file("index").parent,
        SamplingSettings(**job.params["settings"]),
        job.device,
        callback=job.progress("references"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
