"""Version of each stage's results.

Snakemake does not see changes in this package, so every rule passes its number as a param: raising
it reruns exactly that stage and what follows. Raise it when results change, and write a line marked
"results change" in CHANGELOG.md.
"""

from __future__ import annotations

STAGE_VERSIONS: dict[str, int] = {
    "download_flame": 1,
    "download_companions": 1,
    "download_networks": 1,
    "download_mmdm": 1,
    "download_lpips": 1,
    "prepare_head_model": 1,
    "prepare_mmdm": 1,
    "track_subject": 3,
    "track_driving": 3,
    "plan_views": 1,
    "encode_references": 1,
    "sample_views": 1,
    "decode_views": 1,
    "fit_avatar": 2,
    "import_avatar": 1,
    "animate_avatar": 1,
    "hold_out": 1,
    "place_landmarks": 3,
    "evaluate_avatar": 1,
    "evaluate_reenactment": 1,
    "evaluate": 1,
    "write_report": 1,
    "make_demo": 3,
    "train_mmdm": 1,
}
