"""Manifests, recipes, overrides and DeepSpeed JSONs that nobody would write: taken, or one line says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzed_settings import DS_KEYS, as_json, as_yaml, fuzz, keys_of, refused, result_or_line, tree_with, values
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config.ds_config import Facts, load_ds_config, resolve_ds_config
from everest_ds.config.finetuning import FinetuneRecipe
from everest_ds.config.load import build, dump, load_as, load_recipe
from everest_ds.config.schema import Recipe
from everest_ds.data.decode import DecodeError, open_video
from everest_ds.data.manifest import read_manifest
from everest_ds.data.members import require_storage

FACTS = Facts(parameters=1_000, largest=100, width=96, ranks=2, on_cpu=True, bf16_supported=True, fp16_supported=False)


class TestManifests:
    lines = st.one_of(
        st.text(max_size=30),
        st.builds(
            "{}{}{}".format,
            st.sampled_from(
                ["a.mp4", "/x/b c.mkv", "", '"a.mp4"', '"', "#", "x.tar#1+2#a.mp4", "http://h/a.mp4", "nope://x"]
            ),
            st.sampled_from([" ", ",", "\t", ",,", "", '"', " ,"]),
            st.one_of(
                st.integers().map(str), st.sampled_from(["", "cat", "1e5", "9" * 5000, "x" * 100_000, "\0", "\ufeff"])
            ),
        ),
    )

    @fuzz
    @given(
        content=st.lists(lines, max_size=6).map("\n".join),
        encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-7", "utf-32"]),
    )
    def test_any_text(self, tmp_path: Path, content: str, encoding: str) -> None:
        self.check(tmp_path / "m.csv", content.encode(encoding, "replace"))

    @fuzz
    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path: Path, content: bytes) -> None:
        self.check(tmp_path / "m.csv", content)

    @pytest.mark.parametrize(
        "content",
        [
            b"x" * 3_000_000,
            b"a.mp4 " + b"9" * 3_000_000,
            b"a.mp4 " + b"cat " * 1_000_000,
            b'"' * 1_000_000,
            b'"a.mp4' + b"," * 1_000_000 + b'"',
            b"a.mp4 1\n" + b"b" * 1_000_000 + b".mp4",
            b".mp4 ," * 200_000,
            b"a.mp4" + b" " * 1_000_000 + b"x",
            ("a.mp4 3\n" * 3).encode("utf-16"),
            "fu\u00df.mp4 3".encode("latin-1"),
        ],
        ids=range(10),
    )
    def test_absurd_files_get_one_line(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "m.csv").write_bytes(content)
        refused(lambda: read_manifest(tmp_path / "m.csv", key="data.train"), "data.train", str(tmp_path / "m.csv"))

    def check(self, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        entries = result_or_line(lambda: read_manifest(file, key="data.train"), "data.train", str(file))
        if isinstance(entries, str):
            return
        assert entries
        result_or_line(lambda: require_storage(entry.path for entry in entries))
        for entry in entries:
            if "://" not in entry.path:
                with pytest.raises(DecodeError):
                    open_video(entry.path)

    @pytest.mark.parametrize(
        "place",
        ["99999999999999999999+9", "9+99999999999999999999", "0+999999999999", "9" * 5000 + "+1", "1+" + "9" * 5000],
    )
    def test_members_that_no_shard_has(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "x.tar").write_bytes(bytes(2048))
        (tmp_path / "m.csv").write_text(f"x.tar#{place}#a.mp4\n")
        (entry,) = read_manifest(tmp_path / "m.csv")
        with pytest.raises(DecodeError) as caught:
            open_video(entry.path)
        assert len(caught.value.reason) <= 200

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # half-made file systems
    def test_schemes_that_need_more_than_a_url(self) -> None:
        known = pytest.importorskip("fsspec").available_protocols()
        for scheme in [*known, "nope"]:
            result_or_line(lambda scheme=scheme: require_storage([f"{scheme}://a/b.mp4"]), scheme)


class TestRecipes:
    @pytest.mark.parametrize("kind", [Recipe, FinetuneRecipe])
    @fuzz
    @given(data=st.data())
    def test_any_value_at_any_key(self, tmp_path: Path, kind: type[Recipe], data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(keys_of(kind)))
        value = data.draw(values)
        found = result_or_line(lambda: build(kind, tree_with(key, value)), key.partition(".")[0])
        if not isinstance(found, str):
            (tmp_path / "again.yaml").write_text(dump(found), encoding="utf-8")
            assert load_as(kind, tmp_path / "again.yaml") == found

    @fuzz
    @given(text=st.one_of(st.text(max_size=60), values.map(as_yaml)))
    def test_any_text(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        result_or_line(lambda: load_recipe(file))

    @fuzz
    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "recipe.yaml"
        file.write_bytes(content)
        result_or_line(lambda: load_recipe(file))

    @fuzz
    @given(data=st.data())
    def test_any_override(self, data: st.DataObject) -> None:
        key = data.draw(st.one_of(st.sampled_from(keys_of(Recipe)), st.text(max_size=10)))
        text = data.draw(st.one_of(st.text(max_size=30), values.map(as_yaml)))
        result_or_line(lambda: load_recipe(None, [f"{key}={text}"]))


LAUGHS = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    ]
)
MERGES = "\n".join(
    [
        "a: &a {x: 1}",
        *(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    ]
)
ABSURD_RECIPES = {
    "laughs": LAUGHS + "\nmodel: {frames: *j}",
    "laughs_in_a_list": LAUGHS + "\noptim: {betas: [*j, *j]}",
    "laughs_for_text": LAUGHS + "\nmodel: {method: *j}",
    "merges": MERGES,
    "itself": "model: &a [*a]",
    "itself_merged": "model: &a {<<: *a}",
    "python_object": "model: !!python/object/apply:os.system ['touch /tmp/never']",
    "python_name": "model: !!python/name:os.system",
    "deep_lists": "[" * 10_000,
    "deep_groups": "{a: " * 10_000,
    "deep_blocks": "\n".join(" " * i + "a:" for i in range(1000)),
    "whole_numbers": "model: {frames: " + "9" * 10_000 + "}",
    "hexadecimal": "model: {frames: 0x" + "f" * 10_000 + "}",
    "hexadecimal_key": "0x" + "f" * 10_000 + ": 1",
    "hexadecimal_for_a_number": "optim: {base_lr: 0x" + "f" * 10_000 + "}",
    "hexadecimal_for_text": "data: {train: 0x" + "f" * 10_000 + "}",
    "sexagesimal": "model: {frames: 1" + ":00" * 3000 + "}",
    "large_list": "optim: {betas: [" + "0.1, " * 20_000 + "0.1]}",
    "not_a_number": "optim: {base_lr: .nan}",
    "infinite": "optim: {base_lr: 1e400}",
    "date": "model: {frames: 2024-01-01}",
    "no_date": "model: {frames: 2024-99-99}",
    "date_before_all": "model: {frames: !!timestamp '0001-01-01 00:00:00 +23:59'}",
    "empty_number": "model: {frames: !!int ''}",
    "empty_float": "optim: {base_lr: !!float ''}",
    "odd_truth": "data: {flip: !!bool maybe}",
    "odd_date": "data: {flip: !!timestamp maybe}",
    "set": "model: !!set {a, b}",
    "binary": "model: !!binary //8=",
    "duplicate_group": "model: {frames: 16}\nmodel: {frames: 8}",
    "duplicate_key": "model: {frames: 16, frames: 8}",
    "list_as_key": "? [a, b]\n: 1",
    "null_byte": 'data: {train: "a\\0b"}',
    "half_a_character": 'data: {train: "\\ud800"}',
    "long_text": "data: {train: " + "x" * 200_000 + "}",
    "long_key": "x" * 100_000 + ": 1",
    "two_documents": "model: {}\n---\nmodel: {}",
    "too_large": "# " + "x" * 20_000_000,
}


@pytest.mark.parametrize("name", ABSURD_RECIPES)
def test_absurd_recipes_get_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(ABSURD_RECIPES[name])
    refused(lambda: load_recipe(file))
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize("name", ABSURD_RECIPES)
def test_absurd_overrides_get_one_line(name: str) -> None:
    text = ABSURD_RECIPES[name]
    refused(lambda: load_recipe(None, [f"model={text}"]))
    refused(lambda: load_recipe(None, [text]))


@pytest.mark.parametrize("key", ["a." * 10_000 + "a", "model." + "x" * 1_000_000, "." * 1000, "model.size." * 500])
def test_absurd_keys_get_one_line(key: str) -> None:
    refused(lambda: load_recipe(None, [f"{key}=1"]))


def test_anchors_that_stay_small_are_read(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: &m {size: vit_base}\ntrain: {seed: &s 7, max_steps: *s}\n")
    recipe = load_recipe(file)
    assert (recipe.model.size, recipe.train.seed, recipe.train.max_steps) == ("vit_base", 7, 7)


def resolve(raw: dict[str, Any]) -> dict[str, Any]:
    return resolve_ds_config(raw, load_recipe(None, ["train.global_batch=8"]), FACTS)[0]


class TestDsConfigs:
    @fuzz
    @given(key=st.sampled_from(DS_KEYS), value=values)
    def test_any_value_at_any_key(self, tmp_path: Path, key: str, value: Any) -> None:
        file = tmp_path / "ds.json"
        file.write_text(as_json(tree_with(key, value)))
        self.check(file)

    @fuzz
    @given(text=st.one_of(st.text(max_size=60), values.map(as_json)))
    def test_any_text(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "ds.json"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        self.check(file)

    @fuzz
    @given(content=st.binary(max_size=200))
    def test_any_bytes(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "ds.json"
        file.write_bytes(content)
        self.check(file)

    def check(self, file: Path) -> None:
        raw = result_or_line(lambda: load_ds_config(file), "ds_config", str(file))
        if isinstance(raw, dict):
            found = result_or_line(lambda: resolve(raw), "ds_config")
            if isinstance(found, dict):
                # What is written beside the run, and read by whatever wants to know it.
                json.dumps(found, allow_nan=False)


ABSURD_DS_CONFIGS = {
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep_objects": '{"a":' * 500 + "1" + "}" * 500,
    "deep_section": '{"zero_optimization": ' + "[" * 900 + "]" * 900 + "}",
    "duplicate": '{"bf16": {"enabled": true}, "bf16": {"enabled": false}}',
    "duplicate_inside": '{"zero_optimization": {"stage": 1, "stage": 2}}',
    "nan": '{"gradient_clipping": NaN}',
    "infinity": '{"gradient_clipping": -Infinity}',
    "too_large_a_number": '{"gradient_clipping": 1e400}',
    "digits": '{"train_batch_size": ' + "9" * 10_000 + "}",
    "many_digits": '{"train_batch_size": ' + "9" * 4000 + "}",
    "half_a_character": '{"optimizer": {"type": "\\ud800"}, "train_batch_size": "\\ud800"}',
    "too_large": " " * 20_000_000 + "{}",
    "long_key": '{"train_batch_sizes' + "e" * 100 + '": 1, "train_batch_siz": 1}',
    "long_value": '{"train_batch_size": "' + "x" * 900_000 + '"}',
    "utf_16": '{"bf16": {}}'.encode("utf-16"),
    "latin_1": '{"k\u00df": 1}'.encode("latin-1"),
    "fractional_stage": '{"zero_optimization": {"stage": 2.5}}',
    "stage_of_truth": '{"zero_optimization": {"stage": true}}',
    "enabled_by_word": '{"bf16": {"enabled": "yes"}}',
    "enabled_by_number": '{"fp16": {"enabled": 1}}',
    "clipping_by_word": '{"gradient_clipping": "much"}',
    "clipping_below_zero": '{"gradient_clipping": -1}',
    "steps_by_list": '{"steps_per_print": [1]}',
    "nothing": "",
    "null": "null",
}


@pytest.mark.parametrize("name", ABSURD_DS_CONFIGS)
def test_absurd_ds_configs_get_one_line(tmp_path: Path, name: str) -> None:
    file, content = tmp_path / "ds.json", ABSURD_DS_CONFIGS[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: resolve(load_ds_config(file)), "ds_config")


@pytest.mark.parametrize("load", [load_ds_config, load_recipe, read_manifest], ids=lambda load: load.__name__)
def test_files_without_end_get_one_line(load: Callable[[str], Any]) -> None:
    refused(lambda: load("/dev/zero"), "/dev/zero")


@pytest.mark.parametrize("load", [load_ds_config, load_recipe, read_manifest], ids=lambda load: load.__name__)
@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/dev/null/x", "/"])
def test_paths_that_are_none_get_one_line(load: Callable[[str], Any], path: str) -> None:
    refused(lambda: load(path))
