"""Rule fit_avatar: a Gaussian avatar from reference and generated images."""

from cap4d_core.job import Job, run


def main(job: Job) -> None:
    from cap4d_core.avatar.fitting import fit_avatar
    from cap4d_core.compiling import use_compile_cache
    from cap4d_core.files.image_set import read_image_index
    from cap4d_core.flame.model import HeadModel
    from cap4d_core.manifest import manifest
    from cap4d_core.settings import FittingSettings

    settings = FittingSettings(**job.params["settings"])
    if job.input_files("lpips"):  # also where the setting says 'download'
        weights = str(job.input_file("lpips"))
        settings = settings.model_copy(update={"lpips_weights": weights})
    head_model = job.input_file("head_model")
    if settings.compile != "off" and job.device != "cpu":
        use_compile_cache(head_model.parent / "compiled")
    pictures = "crops" if settings.reference_images == "original" else "images"
    references = read_image_index(job.input_file("references"), images=pictures)
    generated = [
        item
        for index in job.input_files("generated")  # one per shard, in index/ of the image set
        for item in read_image_index(index, index.parent.parent)
    ]
    output = job.output_file("avatar").parent
    with manifest(job, output):
        fit_avatar(
            [references, sorted(generated, key=lambda item: item.image.name)],
            HeadModel.load(head_model, lower_jaw=settings.use_lower_jaw),
            settings,
            output,
            callback=job.progress("iterations"),
            device=job.device,
        )


if __name__ == "__main__":
    run(main, globals().get("snakemake"))
