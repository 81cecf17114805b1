"""What a training run shows of a logged step, in a plain line and on a terminal."""

import io
import sys

import pytest

from everest_ds.config.progress import ProgressLine

GIB = 2**30
ON_CPU = {"step": 10, "loss": 0.54321, "lr": 1.5e-4, "clips_per_s": 1234.56, "step_s": 2.0}
ON_CPU |= {"peak_memory_bytes": round(3.14 * GIB)}
ON_GPU = ON_CPU | {"mfu": 0.4123, "reserved_memory_bytes": round(3.44 * GIB)}
CPU_NUMBERS = "loss 0.5432  lr 1.50e-04  1234.6 clips/s  peak 3.1 GiB"
GPU_NUMBERS = "loss 0.5432  lr 1.50e-04  1234.6 clips/s  MFU 41.2 %  allocated 3.1, reserved 3.4 GiB"
SCALER = {"loss_scale": 65536.0, "skipped_steps": 3}
RECORDS = [
    (ON_CPU, CPU_NUMBERS),
    (ON_CPU | {"mfu": 0.05}, CPU_NUMBERS.replace("clips/s", "clips/s  MFU 5.0 %")),
    (ON_GPU, GPU_NUMBERS),
    (ON_GPU | SCALER, f"{GPU_NUMBERS}  scale 65536  skipped 3"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("record", "numbers"), RECORDS)
def test_a_plain_line_has_the_numbers_that_are_there(record, numbers, capsys):
    with ProgressLine(400_000, start_step=0, speaks=True) as progress:
        progress.report(record)
    assert capsys.readouterr().err == f"step 10/400000  {numbers}  left 222:13:00\n"


def test_a_terminal_of_100_columns_shows_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for name, value in {"TERM": "xterm", "COLUMNS": "100", "LINES": "40", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    with ProgressLine(400_000, start_step=0, speaks=True) as progress:
        progress.report(ON_GPU)
    lines = terminal.getvalue().splitlines()
    assert any(GPU_NUMBERS in line for line in lines), lines
    assert any("10/400000" in line and "left" in line for line in lines), lines
    assert "…" not in terminal.getvalue()
