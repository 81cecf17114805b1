"""Libraries that read videos: do they load, and are the frames right?"""

from __future__ import annotations

import importlib.util
import tempfile
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np

from everest_ds.config.errors import UserError
from everest_ds.config.schema import DataConfig
from everest_ds.data.decode import DECODERS, DecodeError, decode, require_decoder
from everest_ds.training.doctor.findings import Finding, Level

_SEED = 0
# Grey levels of 255, on average: compression leaves 2, and the next frame in a frame's place differs by 7.
_MOST_DIFFERENCE = 4.0


def loading() -> list[Finding]:
    """Load the decoders: the default one, and others that are installed."""
    found = []
    for name in _here():
        try:
            require_decoder(name)
        except UserError as error:
            subject = f"data.decoder={name}"
            found.append(Finding(subject=subject, level=_level(name), says=str(error), fix=_reinstall(name)))
        else:
            found.append(Finding(subject=f"data.decoder={name}", says="loads"))
    return found


def _reinstall(name: str) -> str:
    """Return a command; decord comes from the package decord or decord2, torchcodec finds FFmpeg on the system."""
    package = packages_distributions().get(name, ["everest_ds"])[0]
    return f"pip install --force-reinstall {package}{' and apt-get install ffmpeg' if name == 'torchcodec' else ''}"


def decoding() -> list[Finding]:
    """Write a video and read it with every decoder that loads."""
    # Not at the top: it imports av, and decoders are looked at without.
    from everest_ds.data.synthetic import render_motion, write_motion_videos  # noqa: PLC0415

    expected, _ = render_motion(_SEED, 0)
    with tempfile.TemporaryDirectory() as folder:
        write_motion_videos(Path(folder, "videos"), 1, seed=_SEED)
        video = next(Path(folder, "videos").glob("*.mp4"))
        return [_read(name, video, expected) for name in _here() if _loads(name)]


def _read(name: str, video: Path, expected: np.ndarray) -> Finding:
    subject = f"{name} reads"
    try:
        frames = decode(str(video), np.arange, decoder=name)
    except DecodeError as error:
        return Finding(subject=subject, level=_level(name), says=f"can't read a video just written: {error.reason}")
    if frames.shape != (*expected.shape, 3):
        says = f"frames {frames.shape} of a video of {(*expected.shape, 3)}"
        return Finding(subject=subject, level=_level(name), says=says)
    difference = float(np.abs(frames.astype(np.float32) - expected[..., None]).mean())
    if difference > _MOST_DIFFERENCE:
        says = f"wrong frames ({difference:.0f} of 255 grey levels off)"
        return Finding(subject=subject, level=_level(name), says=says)
    return Finding(subject=subject, says=f"a video just written, all {len(frames)} frames right")


def _here() -> list[str]:
    return [name for name in DECODERS if name == DataConfig().decoder or importlib.util.find_spec(name) is not None]


def _loads(name: str) -> bool:
    try:
        require_decoder(name)
    except UserError:
        return False
    return True


def _level(name: str) -> Level:
    return "problem" if name == DataConfig().decoder else "note"
