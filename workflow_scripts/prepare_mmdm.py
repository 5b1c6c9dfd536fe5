"""Rule prepare_mmdm: diffusion weights as safetensors, tied to the head model."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.batch.asset_cache import through_cache
    from cap4d_core.diffusion.checkpoint import prepare_mmdm
    from cap4d_core.diffusion.mmdm_download import downloaded_checkpoint
    from cap4d_core.diffusion.model_weights import weight_files
    from cap4d_core.diffusion.renderer_tables import head_model_tables

    if job.input_files("download"):
        source = downloaded_checkpoint(job.input_file("download"))
    else:
        source = job.input_file("source")
    head_model, output = job.input_file("head_model"), job.output_file("folder")

    def prepare() -> None:
        prepare_mmdm(
            source,
            output,
            head_tables=head_model_tables(head_model),
            sha256=job.params["sha256"],
            callback=job.progress("tensors"),
        )

    through_cache(
        job,
        output,
        {"weights": weight_files(source), "head_model": head_model},
        prepare,
        params=["sha256"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
