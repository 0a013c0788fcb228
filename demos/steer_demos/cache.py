"""Where downloads, converted weights, classifiers and checkpoints are kept."""

import os
from pathlib import Path

from huggingface_hub import constants


def cache_dir() -> Path:
    """`STEER_CACHE` where it is set, else the folder `steer` among the assets of the Hugging Face cache.

    The latter is `~/.cache/huggingface/assets/steer` unless `HF_HOME` or `HF_ASSETS_CACHE` say otherwise. It is made.
    """
    folder = Path(os.environ.get("STEER_CACHE") or Path(constants.HF_ASSETS_CACHE) / "steer").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
