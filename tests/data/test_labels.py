from everest_ds.config.errors import LONGEST_MESSAGE
from everest_ds.data.labels import doubtful_labels
from everest_ds.data.manifest import Entry


def listed(*labels: int, folder: str = "/v") -> list[Entry]:
    return [Entry(f"{folder}/{number}.mp4", label) for number, label in enumerate(labels)]


def test_lists_that_have_every_class_and_every_video_once_leave_no_doubt() -> None:
    lists = {"data.train": listed(0, 1, 2), "data.val": listed(2, 1, 0, folder="/w")}
    assert doubtful_labels(lists, 3) == []
    # A video that is listed twice counts twice: some do that on purpose.
    assert doubtful_labels({"data.train": listed(0, 1) * 2}, 2) == []


def test_classes_that_a_list_lacks_are_named_in_one_line() -> None:
    (line,) = doubtful_labels({"data.train": listed(*range(1, 9)), "data.val": listed(*range(8), folder="/w")}, 9)
    assert line == "of 9 classes, counted from 0, data.train has no video of 0, data.val has none of 8"
    (line,) = doubtful_labels({"data.train": listed(0, 2, 4), "data.val": listed(4, 3, 2, 1, 0, folder="/w")}, 5)
    assert line == "of 5 classes, counted from 0, data.train has no video of 1, 3"
    (line,) = doubtful_labels({"data.train": listed(3)}, 100_000)
    assert "no video of 0, 1, 2, 4, 5, " in line
    assert line.endswith(" 99998, 99999 (99999 classes)")
    assert len(line) < LONGEST_MESSAGE / 4


def test_a_video_with_two_labels_is_named() -> None:
    train = [*listed(0, 1), Entry("/v/../v/0.mp4", 1), Entry("/v/0.mp4", 1), Entry("/v/1.mp4", 0)]
    shards = [Entry("/s.tar#512+9#a.mp4", 0), Entry("/s.tar#512+9#a.mp4", 1)]
    assert doubtful_labels({"data.train": train, "data.val": shards}, 2) == [
        "data.train: 2 videos have more than one label, such as /v/0.mp4 (0 and 1)",
        "data.val: 1 video has more than one label, such as /s.tar#512+9#a.mp4 (0 and 1)",
    ]


def test_videos_to_train_on_and_to_test_on_are_told() -> None:
    train, val = listed(0, 1, 1), listed(0, 1)
    assert doubtful_labels({"data.train": train, "data.val": val}, 2) == [
        "data.val: 2 of 2 videos are in data.train, too, such as /v/0.mp4: accuracy on them says little"
    ]
    (line,) = doubtful_labels({"data.train": train, "data.val": [*listed(1, 0), Entry("/w/x.mp4", 1)]}, 2)
    assert "2 of 3 videos are in data.train, too (2 with another label)," in line
