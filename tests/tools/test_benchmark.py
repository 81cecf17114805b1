"""The benchmark command: mistakes are told before anything is measured."""

import sys
from pathlib import Path

import pytest
from launching import ROOT


@pytest.fixture
def benchmark_main(monkeypatch):
    """The command's main function, given its arguments."""
    monkeypatch.syspath_prepend(ROOT)
    from tools import benchmark  # noqa: PLC0415 - found once the path is set

    def main(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", *map(str, arguments)])
        return benchmark.main()

    return main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--sizes", "vit_gaint"], "did you mean 'vit_giant'?"),
        (["step", "--pairs", "0"], "--pairs: must be positive, got 0"),
        (["step", "--write", "results.json"], "--write: name a Markdown file such as FILE.md"),
        (["step", "--write", "{folder}/a file/x.md"], "--write: cannot write"),
        (["data", "--views", "0"], "--views: must be positive"),
        (["data", "--folder", "{folder}/a file/data"], "--folder: cannot write to"),
        (["data", "--folder", "{folder}", "--manifest", "{folder}/none.csv"], "No such file"),
        (["scoring", "--clips", "0"], "--clips: must be positive"),
        (["scoring", "--manifest", "{folder}/none.csv"], "No such file"),
        (["learning", "--seeds", "1,x"], "--seeds: expected whole numbers"),
        (["learning", "--seeds", "1,1"], "--seeds: each once"),
        (["learning", "--side-by-side", "0"], "--side-by-side: must be positive"),
        (["learning", "--folder", "{folder}", "--finetune", "optim.base_rate=1"], "optim.base_rate"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(arguments, message, benchmark_main, capsys, tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(SystemExit) as ended:
        benchmark_main(*(argument.format(folder=tmp_path) for argument in arguments))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-1].startswith("benchmark: error: ")
    assert message in said[-1]


def test_what_is_written(benchmark_main, tmp_path, capsys):
    written = tmp_path / "new" / "step.md"
    keys = ["model.image_size=32", "model.frames=4", "model.decoder_depth=1"]
    assert (
        benchmark_main("step", "--sizes", "vit_micro", "--batch", "1", "--pairs", "1", "--write", written, *keys) == 0
    )
    assert written.read_text() == capsys.readouterr().out
    assert "tools/benchmark.py step --sizes vit_micro" in written.read_text()
    assert '"machine"' in written.with_suffix(".json").read_text()
