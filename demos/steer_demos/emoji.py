"""The emoji data set: three icon packages, rendered at 64 x 64, composed on plain backgrounds and captioned."""

import base64
import hashlib
import io
import json
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from steer_demos.cache import cache_dir

IMAGE_SIZE = 64
ICON_SIZE = 56  # leaves four pixels, one latent cell, of plain background on each side

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (180, 180, 180),
    "blue": (165, 210, 250),
    "green": (185, 230, 175),
    "yellow": (250, 232, 155),
    "pink": (250, 195, 215),
}


@dataclass(frozen=True)
class IconPackage:
    """One npm package of icons: its name, version, npm integrity (sha512) and licence."""

    name: str
    version: str
    integrity: str
    licence: str


STYLES: dict[str, IconPackage] = {
    "noto": IconPackage(
        "@iconify-json/noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
    ),
    "fluent": IconPackage(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
    ),
    "twemoji": IconPackage(
        "@iconify-json/twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
    ),
}


@cache
def concepts() -> dict[str, str]:
    """The concepts that all three packages draw: name in captions -> icon name."""
    return json.loads(files("steer_demos").joinpath("concepts.json").read_text())


def caption(concept: str, style: str | None = None, background: str | None = None, article: bool = False) -> str:
    """The caption of one picture, e.g. `a red apple on a blue background, noto style`; None leaves that part out."""
    text = concept
    if article:
        text = ("an " if concept[0] in "aeio" else "a ") + text
    if background:
        text += f" on a {background} background"
    if style:
        text += f", {style} style"
    return text


def fetch_package(package: IconPackage) -> Path:
    """The tarball of `package`, brought by `npm pack` on first use and checked against its integrity value.

    Raises:
        RuntimeError: npm is missing or failed.
        ValueError: the tarball is not the one that the models were trained on.
    """
    folder = cache_dir() / "npm"
    folder.mkdir(exist_ok=True)
    tarball = folder / f"{package.name.strip('@').replace('/', '-')}-{package.version}.tgz"
    if not tarball.exists():
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise RuntimeError(
                f"`{' '.join(command)}` failed in {folder}: {reason}. Install npm, or put {tarball.name} there."
            ) from error
    algorithm, _, expected = package.integrity.partition("-")
    found = base64.b64encode(hashlib.new(algorithm, tarball.read_bytes()).digest()).decode()
    if found != expected:
        raise ValueError(
            f"{tarball} has {algorithm} {found}, but {package.name} {package.version} has {expected}: delete the file."
        )
    return tarball


def render_icons(style: str) -> np.ndarray:
    """All concepts in one style, in the order of `concepts()`.

    Returns:
        (concepts, 64, 64, 4) uint8, RGBA with straight alpha.
    """
    import resvg_py

    with tarfile.open(fetch_package(STYLES[style])) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        data = json.load(member)
    renders = np.zeros((len(concepts()), IMAGE_SIZE, IMAGE_SIZE, 4), np.uint8)
    for index, icon_name in enumerate(concepts().values()):
        icon = data["icons"][icon_name]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = icon.get("width", data["width"]), icon.get("height", data["height"])
        box = f"{left} {top} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=ICON_SIZE, height=ICON_SIZE))
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
        row, column = ((IMAGE_SIZE - extent) // 2 for extent in pixels.shape[:2])
        renders[index, row : row + pixels.shape[0], column : column + pixels.shape[1]] = pixels
    return renders


@cache
def render_all() -> np.ndarray:
    """(concepts, styles, 64, 64, 4) uint8 RGBA renders of the whole data set."""
    return np.stack([render_icons(style) for style in STYLES], axis=1)


def compose(renders: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Renders over a plain colour: (..., 64, 64, 4) uint8 RGBA -> (..., 64, 64, 3) float32 in [-1, 1]."""
    alpha = renders[..., 3:].astype(np.float32) / 255
    colour = np.asarray(background, np.float32)
    pixels = renders[..., :3] * alpha + colour * (1 - alpha)
    return pixels / 127.5 - 1
