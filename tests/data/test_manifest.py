from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.config.errors import UserError
from everest_ds.data.manifest import Entry, can_list, check_labels, count_classes, format_manifest, read_manifest


def read(tmp_path: Path, text: str | bytes, root: str | None = "/r") -> list[Entry]:
    manifest = tmp_path / "list.csv"
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_manifest(manifest, root)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.mp4 3\nb.mp4 0\n", [("/r/a.mp4", 3), ("/r/b.mp4", 0)]),
        ("my holiday 2.mp4 3\n", [("/r/my holiday 2.mp4", 3)]),
        ("a.mp4\t3\n", [("/r/a.mp4", 3)]),
        ("a.mp4,3\nb c.mp4 , 4\n", [("/r/a.mp4", 3), ("/r/b c.mp4", 4)]),
        ("a,b.mp4,3\n", [("/r/a,b.mp4", 3)]),
        ("a,b.mp4 3\n", [("/r/a,b.mp4", 3)]),
        ('"a, b.mp4",3\n"c ""d"".mp4", 4\n', [("/r/a, b.mp4", 3), ('/r/c "d".mp4', 4)]),
        ("a.mp4\nb c.mp4\n", [("/r/a.mp4", None), ("/r/b c.mp4", None)]),
        ("a, b.mp4\n", [("/r/a, b.mp4", None)]),
        ("a.mp4, b.mp4\n", [("/r/a.mp4, b.mp4", None)]),
        ('"a b.mp4"\n', [("/r/a b.mp4", None)]),
        ("/abs/a.mp4 1\nrel/b.mp4 2\n", [("/abs/a.mp4", 1), ("/r/rel/b.mp4", 2)]),
        ("path,label\na.mp4,3\n", [("/r/a.mp4", 3)]),
        ("# made by hand\n\nVideo,Class\na.mp4,3\n", [("/r/a.mp4", 3)]),
        ("path\na.mp4\n", [("/r/a.mp4", None)]),
        ("# a comment\n\n   \na.mp4 3\n#b.mp4 4\n", [("/r/a.mp4", 3)]),
        ("a.mp4 3\r\nb.mp4 4\r\n", [("/r/a.mp4", 3), ("/r/b.mp4", 4)]),
        (b"\xef\xbb\xbfa.mp4 3\n", [("/r/a.mp4", 3)]),
        ("\u00fcn\u00ef.MP4 3\n", [("/r/\u00fcn\u00ef.MP4", 3)]),
        ("a.mp4 3", [("/r/a.mp4", 3)]),
    ],
)
def test_formats(tmp_path: Path, text: str | bytes, expected: list[tuple[str, int | None]]) -> None:
    assert read(tmp_path, text) == [Entry(*pair) for pair in expected]


def test_labels_that_count_from_1_are_told_so() -> None:
    entries = [Entry(f"/x/{label}.mp4", label) for label in range(1, 9)]
    with pytest.raises(UserError, match=r"8\.mp4 has label 8, .* whose labels seem to count from 1: they must count"):
        check_labels(entries, 8, key="data.val")
    with pytest.raises(UserError, match="or train a head of more classes"):
        check_labels([Entry("/x/0.mp4", 0), *entries], 8, key="data.val")


def test_a_trailing_number_is_a_label_unless_another_line_has_none(tmp_path: Path) -> None:
    assert read(tmp_path, "take 1\ntake 2\n") == [Entry("/r/take", 1), Entry("/r/take", 2)]
    assert read(tmp_path, "take 1\nb.mp4\n") == [Entry("/r/take 1", None), Entry("/r/b.mp4", None)]
    assert read(tmp_path, "take 1\nb.mp4 5\n") == [Entry("/r/take", 1), Entry("/r/b.mp4", 5)]


def test_relative_paths_start_from_the_manifest_or_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path, "a.mp4 1\n", root=None)[0].path == f"{tmp_path}/a.mp4"
    assert read(tmp_path, "a.mp4 1\n", root="videos/")[0].path == "videos/a.mp4"
    assert read(tmp_path, "a.mp4 1\n", root="/")[0].path == "/a.mp4"
    monkeypatch.chdir(tmp_path)
    assert read_manifest("list.csv")[0].path == "a.mp4"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_manifest("~/list.csv", "~/v")[0].path == f"{tmp_path}/v/a.mp4"


@pytest.mark.parametrize("label", [7, None])
def test_what_is_written_is_read(tmp_path: Path, label: int | None) -> None:
    names = [
        "a.mp4",
        "b 2.mp4",
        "c,3.mp4",
        'd"e" 4.mp4',
        "#f.mp4",
        "path",
        "path,label",
        "g",
        "take 5",
        "\u00fc\u2028.mp4",
    ]
    entries = [Entry(f"/r/{name}", label) for name in names]
    assert read(tmp_path, format_manifest([Entry(name, label) for name in names])) == entries
    assert read(tmp_path, format_manifest(entries)) == entries
    assert all(can_list(name) for name in names)


@pytest.mark.parametrize("name", ["a\nb.mp4", "a\rb.mp4", "a\0.mp4", " a.mp4", "a.mp4 ", "\udcff.mp4"])
def test_names_that_no_line_can_hold(name: str) -> None:
    assert not can_list(name)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a.mp4 3\nb.mp4 cat\n", 2, "the label 'cat' is not a whole number"),
        ("a.mp4,playing guitar\n", 1, "the label 'playing guitar' is not a whole number"),
        ("a.mp4 playing guitar\n", 1, "the label 'playing guitar' is not a whole number"),
        ("a.mp4 1.5\n", 1, "the label '1.5' is not a whole number"),
        ('"a.mp4",x\n', 1, "the label 'x' is not a whole number"),
        ("# first\n\na.mp4 -1\n", 3, "the label -1 is not in 0 ... 2147483647"),
        ("a.mp4 2147483648\n", 1, "the label 2147483648 is not in"),
        ("a.mp4 " + "9" * 5000, 1, "is not in 0"),
        ("a.mp4,\n", 1, "the label is missing"),
        (",3\n", 1, "the path is empty"),
        ('"",3\n', 1, "the path is empty"),
        ('"a.mp4,3\n', 1, "a quoted path must end in a quote"),
        ('"a.mp4" 3\n', 1, "a quoted path must end in a quote"),
        ('"a.mp4",3,4\n', 1, "found 3 fields"),
        ("a.mp4 3\nb.mp4\n", 2, "('b.mp4') has no whole number as label, but line 1 ('a.mp4') has"),
        ("a.mp4\ntake 3\nb.mp4 3\n", 1, "('a.mp4') has no whole number as label, but line 3 ('b.mp4') has"),
    ],
)
def test_mistakes_name_file_and_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"manifest: {tmp_path / 'list.csv'}")
    assert f"line {line}" in message
    assert words in message
    assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("folder", "is a folder"),
        (b"", "lists no video"),
        (b"# nothing\n\n", "lists no video"),
        (b"path,label\n", "lists no video"),
        (b"\xff\xfe\x00\x80", "is not text in UTF-8"),
        (b"\0\0\0\x18ftypmp42", "is not a text file"),
    ],
)
def test_unusable_manifests_name_the_key(tmp_path: Path, content: bytes | str | None, words: str) -> None:
    manifest = tmp_path / "train.csv"
    if content == "folder":
        manifest.mkdir()
    elif isinstance(content, bytes):
        manifest.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(manifest, key="data.train")
    assert str(caught.value).startswith("data.train: ")
    assert str(manifest) in str(caught.value)


def test_videos_need_not_exist(tmp_path: Path) -> None:
    assert len(read(tmp_path, "".join(f"{i}.mp4 {i}\n" for i in range(10_000)), root="/nowhere")) == 10_000


def test_classes_are_counted_from_zero() -> None:
    assert count_classes([Entry("/a.mp4", 4), Entry("/b.mp4", 0)]) == 5
    assert count_classes([Entry("/a.mp4", 0)]) == 1
    assert count_classes([Entry("/a.mp4", None)]) == count_classes([]) == 0


def test_labels_of_known_classes_pass() -> None:
    check_labels([Entry("/a.mp4", 0), Entry("/b.mp4", 7)], 8, key="data.val")
    check_labels([], 8, key="data.val")


@pytest.mark.parametrize("label", [8, 9, -1])
def test_a_label_out_of_range_is_named(label: int) -> None:
    entries = [Entry("/x/6.mp4", 7), Entry("/x/7.mp4", label), Entry("/x/8.mp4", 99)]
    with pytest.raises(UserError) as caught:
        check_labels(entries, 8, key="data.val")
    message = str(caught.value)
    assert message.startswith(f"data.val: /x/7.mp4 has label {label}, but the classifier knows classes 0 ... 7; ")
    assert "correct the manifest" in message
    assert "\n" not in message


@pytest.mark.parametrize(("classes", "known"), [(8, "0 ... 7"), (0, "0, 1, ...")])
def test_a_missing_label_is_named(classes: int, known: str) -> None:
    with pytest.raises(UserError) as caught:
        check_labels([Entry("/x/7.mp4", None)], classes, key="data.train")
    message = str(caught.value)
    assert message.startswith(f"data.train: /x/7.mp4 has no label; a classifier needs one of {known} for every video")
    assert "path,label" in message
    assert "\n" not in message


def test_a_shard_with_a_key_twice_is_named(tmp_path: Path) -> None:
    """As an older index left it: the first video has the last one's label. The same place twice is one video, twice."""
    once = "a.tar#512+9#x/clip.1.mp4,0\na.tar#512+9#x/clip.1.mp4,0\nb.tar#9999+9#x/clip.1.mp4,0\n"
    assert len(read(tmp_path, once)) == 3
    with pytest.raises(UserError) as caught:
        read(tmp_path, f"{once}a.tar#2048+9#x/clip.1.mp4,0\n")
    assert str(caught.value) == (
        f"manifest: {tmp_path}/list.csv: /r/a.tar holds the key 'x/clip' twice (x/clip.1.mp4), and labels go "
        "by keys; write it anew with a key for each video, and index it again"
    )
