"""Rule download_lpips: weights of the perceptual distance from the network."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.lpips_download import download_lpips

    output = job.output_file("weights")
    download_lpips(
        job.params["url"],
        output,
        output.parent.parent / "downloads" / "lpips",
        callback=job.progress("download"),
        retries=job.params["retries"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
