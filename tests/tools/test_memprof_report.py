"""The HTML report: self-contained, clean in a real browser, and never written over somebody's files."""

import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from launching import DS_CONFIGS

from everest_ds.config.ds_config import load_ds_config
from everest_ds.config.errors import UserError
from everest_ds.memory.charts import Series, line_chart, ticks
from everest_ds.memory.compare import Question, compare
from everest_ds.memory.gpus import Capacity
from everest_ds.memory.report import page, part_of, write_report
from everest_ds.memory.report_style import PARTS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OFFLINE = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --enable-logging=stderr --proxy-server=127.0.0.1:9"
).split()


@pytest.fixture(scope="module")
def rows():
    return compare(
        Question(
            models=("vit_micro",),
            global_batches=(64, 512),
            ds_configs={name: load_ds_config(DS_CONFIGS / f"{name}.json") for name in ("zero0", "zero3")},
            ranks=8,
            capacity_bytes=CAPACITY.size_bytes,
            overrides=("model.image_size=64",),
        )
    )


CAPACITY = Capacity(size_bytes=1_000_000_000, text="1GB")


@pytest.fixture
def report(rows, tmp_path):
    write_report(tmp_path / "report", rows, capacity=CAPACITY, ranks=8)
    return tmp_path / "report"


class Elements(HTMLParser):
    """Counts elements, and collects what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.references = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "data", "action")]


def test_the_page_has_the_table_the_plots_and_the_breakdowns(rows, report):
    text = (report / "index.html").read_text()
    elements = Elements(text)
    assert elements.tags.count("svg") == 2 + 2  # a plot per DeepSpeed file, bars per batch
    assert elements.tags.count("circle") == len(rows)
    assert {row.fits for row in rows} == {True, False}
    assert text.count("<b>OOM</b>") == sum(not row.fits for row in rows)
    assert text.count("out of memory above 1 GB") == 2
    assert {"caption", "details", "main", "title"} <= set(elements.tags)


def test_the_page_refers_to_nothing_but_its_csv_files(report):
    text = (report / "index.html").read_text()
    elements = Elements(text)
    assert set(elements.references) == {"data:,", "compare.csv", "breakdown.csv"}
    assert not {"script", "iframe", "img", "object"} & set(elements.tags)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_csv_files_hold_the_same_numbers(rows, report):
    with (report / "compare.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [int(line["predicted_peak_bytes"]) for line in table] == [row.predicted_peak_bytes for row in rows]
    with (report / "breakdown.csv").open() as file:
        items = list(csv.DictReader(file))
    assert {item["part"] for item in items} <= set(PARTS)
    assert sum(int(item["size_bytes"]) for item in items) == sum(row.predicted_peak_bytes for row in rows)


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("fp32 master parameters", "optimizer states"),
        ("gathered parameters", "parameters"),
        ("fp32 gradients", "gradients"),
        ("gradient staging buffer", "communication buffers"),
        ("cuBLAS workspace", "outside tensors"),
        ("saved activations: head and loss", "decoder activations"),
        ("saved activations: embedding", "encoder activations"),
        ("temporaries: forward", "inputs and temporaries"),
    ],
)
def test_items_belong_to_parts(item, part):
    assert part_of(item) == part


def test_names_are_escaped(rows):
    sly = Capacity(size_bytes=10**9, text="<script>alert(1)</script>")
    assert "<script" not in page(rows, capacity=sly, ranks=8)


def test_a_report_replaces_a_report_and_nothing_else(rows, report, tmp_path):
    (report / "mine.txt").write_text("kept")
    before = (report / "index.html").read_text()
    (report / "compare.csv").unlink()
    write_report(report, rows, capacity=CAPACITY, ranks=8)
    assert (report / "index.html").read_text() == before
    assert (report / "compare.csv").is_file()
    assert (report / "mine.txt").read_text() == "kept"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "index.html").write_text("<h1>my thesis</h1>")
    with pytest.raises(UserError, match="aren't a memprof report"):
        write_report(foreign, rows, capacity=CAPACITY, ranks=8)
    assert [path.name for path in foreign.iterdir()] == ["index.html"]
    with pytest.raises(UserError, match="is a file"):
        write_report(foreign / "index.html", rows, capacity=CAPACITY, ranks=8)


def test_ticks_enclose_the_values():
    assert ticks(3, 80) == [2, 5, 10, 20, 50, 100]
    assert ticks(0.4, 0.4) == pytest.approx([0.2, 0.5])


def test_a_chart_of_one_point_is_drawn_inside_its_frame():
    point = Series(name="EVEREST micro", kind="everest", marker=0, points=[(64, 1.5, True)])
    drawn = line_chart([point], limit=80, limit_name="full", unit="GB", title="one")
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', drawn).groups())
    x, y = map(float, re.search(r'cx="(\S+)" cy="(\S+)"', drawn).groups())
    assert 0 < x < width
    assert 0 < y < height


def console(page_path, profile):
    """Open a page and return (what Chromium logged to its console, the page's DOM)."""
    done = subprocess.run(
        [CHROMIUM, *OFFLINE, f"--user-data-dir={profile}", "--dump-dom", page_path.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_chromium_opens_it_without_an_error(report, tmp_path):
    messages, dom = console(report / "index.html", tmp_path / "profile")
    assert messages == []
    assert "Memory of EVEREST and VideoMAE pre-training" in dom

    # The same look at a page that does fetch something finds the browser refusing: the policy is in force.
    text = (report / "index.html").read_text()
    sly = tmp_path / "sly.html"
    sly.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/pixel.png" alt="">'))
    messages, _ = console(sly, tmp_path / "profile")
    assert any("Content Security Policy" in message for message in messages)
