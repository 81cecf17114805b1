"""Files of weights that run code, lie about themselves or were cut off: one line, and nothing was run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzed_settings import fuzz, refused, result_or_line
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

import everest_ds
from everest_ds.config.finetuning import ClassifierConfig
from everest_ds.config.load import to_tree
from everest_ds.models import MaskedAutoencoder, VideoClassifier
from everest_ds.models.weights import CONFIG_KEY, Match, load_encoder, load_pretrained, read_weights


def as_encoder(path: Path) -> Match:
    return load_encoder(
        VideoClassifier(ClassifierConfig(size="vit_micro", image_size=16, classes=3)), read_weights(path)
    )


WAYS = pytest.mark.parametrize("load", [read_weights, load_pretrained, as_encoder], ids=lambda load: load.__name__)


class Calls:
    """Its pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def dangers(ran: Path) -> dict[str, Any]:
    return {
        "system": Calls(os.system, f"touch {ran}"),
        "open": Calls(open, str(ran), "w"),
        "eval": Calls(eval, f"open({str(ran)!r}, 'w')"),
        "torch": Calls(torch.save, {}, str(ran)),
        "touch": Calls(Path.touch, ran),
    }


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("danger", dangers(Path()))
@pytest.mark.parametrize("packing", ["pickle", "torch", "torch_legacy"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, suffix: str, danger: str, packing: str) -> None:
    ran, file = tmp_path / "ran", tmp_path / f"weights{suffix}"
    content = {"model": {"x": torch.zeros(1), "y": dangers(ran)[danger]}}
    packed = io.BytesIO()
    if packing == "pickle":
        pickle.dump(content, packed)
    else:
        torch.save(content, packed, _use_new_zipfile_serialization=packing == "torch")
    packed.seek(0)
    # Read in good faith it runs: the test could fail.
    with contextlib.suppress(Exception):
        pickle.load(packed) if packing == "pickle" else torch.load(packed, weights_only=False)
    assert ran.exists()
    ran.unlink()
    file.write_bytes(packed.getvalue())
    for load in (read_weights, load_pretrained, as_encoder):
        refused(lambda load=load: load(file), str(file))
        assert not ran.exists()


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return everest_ds.create_model("vit_micro", image_size=16, decoder_depth=1)


@pytest.fixture(scope="module")
def whole(model: MaskedAutoencoder) -> bytes:
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(state, {CONFIG_KEY: json.dumps(to_tree(model.config))})


def split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: str, body: bytes, length: int | None = None) -> bytes:
    encoded = header.encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + body


TENSOR = "encoder.patch_embed.weight"
LIES = {
    "offsets_beyond": {"data_offsets": [0, 10**15]},
    "offsets_backwards": {"data_offsets": [100, 4]},
    "offsets_negative": {"data_offsets": [-4, 4]},
    "offsets_overlapping": {"data_offsets": [0, 4]},
    "offsets_of_text": {"data_offsets": ["0", "4"]},
    "no_offsets": {"data_offsets": None},
    "unknown_type": {"dtype": "F99"},
    "other_type": {"dtype": "F64"},
    "small_type": {"dtype": "F4"},
    "type_of_number": {"dtype": 32},
    "vast_shape": {"shape": [10**18, 10**18]},
    "negative_shape": {"shape": [-1, 5]},
    "nan_shape": {"shape": [float("nan")]},
    "infinite_shape": {"shape": [float("inf")]},
    "deep_shape": {"shape": [[[[1]]]]},
    "endless_shape": {"shape": [1] * 100_000},
}


@WAYS
@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_get_one_line(tmp_path: Path, whole: bytes, load: Callable[[Path], Any], lie: str) -> None:
    header, body = split(whole)
    header[TENSOR] |= LIES[lie]
    file = tmp_path / "model.safetensors"
    file.write_bytes(joined(json.dumps(header), body))
    refused(lambda: load(file), str(file))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1, 10**8])
def test_lying_lengths_get_one_line(tmp_path: Path, whole: bytes, length: int) -> None:
    header, body = split(whole)
    file = tmp_path / "model.safetensors"
    file.write_bytes(joined(json.dumps(header), body, length))
    refused(lambda: load_pretrained(file), str(file))


SETTINGS = {
    "deep": "[" * 100_000,
    "list": "[1]",
    "text": "much",
    "nan": '{"keep_ratio": NaN}',
    "twice": '{"frames": 16, "frames": 8}',
    "unknown": '{"x": 1}',
    "unknown_size": '{"size": "' + "x" * 100_000 + '"}',
    "other_size": '{"size": "vit_small", "image_size": 16}',
    "deeper": '{"size": "vit_micro", "image_size": 16, "decoder_depth": 2}',
    "vast_picture": '{"size": "vit_micro", "image_size": 1000000000}',
    "many_blocks": '{"size": "vit_micro", "image_size": 16, "decoder_depth": 1000000000}',
    "vast_decoder": '{"size": "vit_micro", "image_size": 16, "decoder_width": 3000000000, "decoder_heads": 3}',
    "long_clip": '{"size": "vit_micro", "image_size": 16, "frames": 1000000000}',
    "vast_token": '{"size": "vit_micro", "image_size": 1000000, "patch": 1000000}',
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_odd_settings_get_one_line(tmp_path: Path, whole: bytes, settings: str) -> None:
    header, body = split(whole)
    header["__metadata__"] = {CONFIG_KEY: SETTINGS[settings]}
    file = tmp_path / "model.safetensors"
    file.write_bytes(joined(json.dumps(header), body))
    refused(lambda: load_pretrained(file), str(file))


def test_a_head_of_no_classes_gets_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for head in (torch.zeros(()), torch.zeros(0, 0), torch.zeros(3, 3), torch.zeros(3, 3, dtype=torch.int64)):
        file.write_bytes(save({"head.weight": head}, {CONFIG_KEY: "{}"}))
        refused(lambda: load_pretrained(file), str(file))


STATES = {
    "bias_without_extent": {"a.q_bias": torch.zeros(()), "a.v_bias": torch.zeros(())},
    "bias_of_a_matrix": {"a.q_bias": torch.zeros(2, 2), "a.v_bias": torch.zeros(3)},
    "bias_alone": {"a.v_bias": torch.zeros(3)},
    "head_without_extent": {"head.weight": torch.zeros(()), "norm.weight": torch.zeros(96)},
    "sparse": {"head.weight": torch.eye(3, 96).to_sparse()},
    "complex": {"head.bias": torch.zeros(3, dtype=torch.complex64)},
    "whole_numbers": {"head.bias": torch.zeros(3, dtype=torch.int64)},
    "without_data": {"head.bias": torch.zeros(3, device="meta")},
    "vast": {"head.bias": torch.zeros(1).expand(10**12)},
    "vast_of_another": {"x": torch.zeros(1).expand(10**12)},
    "no_tensors": {"a": "b"},
    "nothing": {"model": None},
    "a_tensor": torch.zeros(3),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_odd_states_get_one_line(tmp_path: Path, state: str, legacy: bool) -> None:
    file = tmp_path / "official.pth"
    torch.save(STATES[state], file, _use_new_zipfile_serialization=not legacy)
    refused(lambda: as_encoder(file), str(file))


@fuzz
@given(data=st.data())
def test_damaged_weights_are_read_or_refused(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    header_bytes = len(whole) - len(split(whole)[1])
    damaged = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, header_bytes - 1), max_size=4)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole) - 1)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(damaged[:kept])
    result_or_line(lambda: load_pretrained(file))


@pytest.fixture(scope="module")
def official() -> bytes:
    packed = io.BytesIO()
    torch.save({"model": {"head.bias": torch.zeros(3), "fc_norm.weight": torch.zeros(96)}}, packed)
    return packed.getvalue()


@fuzz
@given(data=st.data())
def test_damaged_checkpoints_are_read_or_refused(tmp_path: Path, official: bytes, data: st.DataObject) -> None:
    damaged = bytearray(official)
    for place in data.draw(st.lists(st.integers(0, len(official) - 1), max_size=4)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    kept = data.draw(st.one_of(st.just(len(official)), st.integers(0, len(official) - 1)))
    file = tmp_path / "official.pth"
    file.write_bytes(damaged[:kept])
    result_or_line(lambda: as_encoder(file))


@fuzz
@given(pickled=st.binary(max_size=60), protocol=st.sampled_from([b"", b"\x80\x02", b"\x80\x04"]))
def test_any_pickle_is_refused(tmp_path: Path, official: bytes, pickled: bytes, protocol: bytes) -> None:
    """Inside of an archive that is whole."""
    file = tmp_path / "official.pth"
    with zipfile.ZipFile(io.BytesIO(official)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, protocol + pickled if name.endswith("data.pkl") else old.read(name))
    result_or_line(lambda: as_encoder(file))


@pytest.mark.parametrize("path", ["x" * 300, "a\0b", "/dev/null", "/dev/zero", "/dev/null/x"])
def test_paths_that_are_none_get_one_line(path: str) -> None:
    refused(lambda: read_weights(path))
