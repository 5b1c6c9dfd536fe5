"""Rule sample_views: one shard of one round of denoising."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.kept import KEEPER
    from cap4d_core.read_ahead import read_ahead

    weights = job.input_file("mmdm")
    KEEPER.get("read ahead", str(weights), lambda: read_ahead(weights))  # once in a process

    from cap4d_core.diffusion.sampling import sample_views
    from cap4d_core.settings import SamplingSettings

    shard, _, _ = job.wildcards["scatteritem"].partition("-of-")
    sample_views(
        job.input_file("plan"),
        job.input_file("references"),
        weights,
        job.input_file("head_model"),
        job.input_files("previous"),
        job.output_file("latents"),
        round_index=int(job.wildcards["round"]) - 1,
        shard_index=int(shard) - 1,
        settings=SamplingSettings(**job.params["settings"]),
        checkpoint_path=job.checkpoint_file(f"{job.wildcards['scatteritem']}.safetensors"),
        device=job.device,
        callback=job.progress("steps"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
