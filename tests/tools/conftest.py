"""What tests of the tools share."""

import pytest
from launching import ROOT


@pytest.fixture
def memprof_main(monkeypatch):
    """The memprof command's main function, for what needs no process of its own."""
    monkeypatch.syspath_prepend(ROOT)
    from tools.memprof.__main__ import main  # noqa: PLC0415 - found once the path is set

    return main
