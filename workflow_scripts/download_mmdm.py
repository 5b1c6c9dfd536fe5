"""Rule download_mmdm: the released diffusion weights from the network."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.batch.asset_cache import through_cache
    from cap4d_core.diffusion.mmdm_download import download_mmdm

    record = job.output_file("record")

    def download() -> None:
        download_mmdm(
            job.params["url"],
            record,
            config_url=job.params["config_url"],
            sha256=job.params["sha256"],
            callback=job.progress("download"),
            retries=job.params["retries"],
        )

    if job.params["sha256"] is None:  # what lies at the address may have changed
        download()
    else:
        through_cache(job, record.parent, {}, download, ("url", "config_url", "sha256"))


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
