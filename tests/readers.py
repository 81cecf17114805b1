"""The libraries that read videos, as a parameter of tests: torchcodec is an extra, and needs FFmpeg's libraries."""

from __future__ import annotations

import pytest

from everest_ds.config.errors import UserError
from everest_ds.data.decode import require_decoder


def have(decoder: str) -> bool:
    """Return whether a decoder can be loaded here."""
    try:
        require_decoder(decoder)
    except UserError:
        return False
    return True


decoders = pytest.mark.parametrize(
    "decoder",
    [
        "decord",
        pytest.param("torchcodec", marks=pytest.mark.skipif(not have("torchcodec"), reason="torchcodec is an extra")),
    ],
)
