"""Rule download_mmdm: the released diffusion weights from the network."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.diffusion.mmdm_download import download_mmdm

    download_mmdm(
        job.params["url"],
        job.output_file("record"),
        config_url=job.params["config_url"],
        sha256=job.params["sha256"],
        callback=job.progress("download"),
        retries=job.params["retries"],
    )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
