"""Headers that claim more than any video has: decord would end its process on them."""

from __future__ import annotations

import io
import itertools
import struct
from pathlib import Path

import pytest
from fuzzed_videos import FRAMES, write_sources

from everest_ds.data import decode as decoding
from everest_ds.data.claims import MOST_FRAMES, exaggeration
from everest_ds.data.decode import DecodeError, decode


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {path.suffix: path for path in write_sources(tmp_path_factory.mktemp("sources"))}


def claiming(path: Path, at: bytes, distance: int, claim: bytes) -> bytes:
    """Return a file's bytes with a field overwritten, so far behind where ``at`` stands."""
    data = bytearray(path.read_bytes())
    place = data.index(at) + distance
    data[place : place + len(claim)] = claim
    return bytes(data)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg"])
def test_real_videos_claim_what_they_have(sources: dict[str, Path], suffix: str) -> None:
    assert exaggeration(io.BytesIO(sources[suffix].read_bytes())) is None
    assert len(decode(str(sources[suffix]), range)) == FRAMES


@pytest.mark.parametrize(
    ("suffix", "claim", "told"),
    [
        (".mp4", (b"stts", 12, struct.pack(">I", 2**31)), "2147483648 frames"),
        (".mov", (b"stts", 12, struct.pack(">I", 2**32 - 1)), "4294967295 frames"),
        (".mkv", (b"\x44\x89", 3, struct.pack(">d", 1e15)), "1e+12 seconds"),
        (".webm", (b"\x44\x89", 3, struct.pack(">d", float("inf"))), "inf seconds"),
        (".avi", (b"strh", 40, struct.pack("<I", 2**31 - 1)), "2147483647 frames"),
    ],
)
def test_claims_end_no_process(
    sources: dict[str, Path], tmp_path: Path, suffix: str, claim: tuple[bytes, int, bytes], told: str
) -> None:
    path = tmp_path / f"claims{suffix}"
    path.write_bytes(claiming(sources[suffix], *claim))
    with pytest.raises(DecodeError, match="claims to") as caught:
        decode(str(path), range)
    assert told in caught.value.reason


def test_boxes_without_end_are_left_alone() -> None:
    """A walk over them ends: by number, by depth, by what they lie about their sizes."""
    empty, endless = struct.pack(">I4s", 8, b"free"), struct.pack(">I4s", 0, b"moov")
    nested = b"".join(struct.pack(">I4s", 0, kind) for kind in itertools.repeat(b"moov", 100_000))
    for data in (empty * 1_000_000, endless, nested, struct.pack(">I4sQ", 1, b"moov", 3), b"\0\0\0\x01ftyp"):
        assert exaggeration(io.BytesIO(data)) is None


def test_sound_is_counted_in_more_than_frames(sources: dict[str, Path]) -> None:
    """A track of sound has millions of samples; only pictures count."""
    whole = claiming(sources[".mp4"], b"stts", 12, struct.pack(">I", 2 * MOST_FRAMES))
    assert exaggeration(io.BytesIO(whole)) is not None
    assert exaggeration(io.BytesIO(whole.replace(b"vide", b"soun"))) is None


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pictures_beyond_the_largest_are_refused(
    sources: dict[str, Path], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LARGEST_PICTURE", 48 * 64 - 1)
    with pytest.raises(DecodeError, match="pictures of 64 x 48 pixels"):
        decode(str(sources[suffix]), range)
