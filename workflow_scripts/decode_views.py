"""Rule decode_views: the images of one shard of generated views."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.diffusion.decoding import decode_views
    from cap4d_core.settings import SamplingSettings

    index = job.output_file("index")
    decode_views(
        job.input_file("plan"),
        job.input_files("latents"),
        job.input_file("mmdm"),
        index.parent.parent,
        index,
        SamplingSettings(**job.params["settings"]),
        job.device,
        callback=job.progress("views"),
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
