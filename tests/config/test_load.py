import contextlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config.errors import LONGEST_MESSAGE, RankError, UserError, one_line_errors, shown
from everest_ds.config.load import describe_keys, dump, load_recipe
from everest_ds.config.schema import Recipe


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(None, overrides)
    return str(caught.value)


def test_overrides_reach_their_fields():
    recipe = load_recipe(
        None, ["model.size=vit_large", "optim.base_lr=1e-3", "optim.betas=[0.9, 0.99]", "data.flip=no"]
    )
    assert recipe.model.size == "vit_large"
    assert recipe.optim.base_lr == 1e-3  # YAML 1.1 alone would read a string
    assert recipe.optim.betas == (0.9, 0.99)
    assert recipe.data.flip is False


def test_a_dump_reads_back_unchanged(tmp_path):
    recipe = load_recipe(None, ["model.size=vit_giant", "train.micro_batch=auto", "optim.base_lr=1.25e-05"])
    file = tmp_path / "config.yaml"
    file.write_text(dump(recipe))
    assert load_recipe(file) == recipe


def test_an_empty_group_is_a_group(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data:\n  # train: somewhere\n")
    assert load_recipe(file, ["data.train=x.csv"]).data.train == "x.csv"
    assert load_recipe(file) == load_recipe(None)


def test_sizes_fill_what_is_null():
    model = load_recipe(None, ["model.size=vit_giant"]).model
    assert (model.patch, model.decoder_width) == (14, 704)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.siez=vit_base", "'model.siez'; did you mean 'model.size'"),
        ("modle.size=vit_base", "'modle'; did you mean 'model'"),
        ("model.size=vit_bas", "did you mean 'vit_base'"),
        ("model.method=videomea", "did you mean 'videomae'"),
        ("model.frames=many", "model.frames: expected a whole number, got 'many'"),
        ("model.frames=16.5", "expected a whole number"),
        ("train.micro_batch=atuo", "expected a whole number or auto, got 'atuo'; did you mean 'auto'?"),
        ("train.micro_batch=2.5", "train.micro_batch: expected a whole number, got 2.5"),
        ("train.micro_batch=0", "train.micro_batch: must be positive, got 0"),
        ("data.flip=3", "expected true or false"),
        ("optim.betas=[0.9]", "a list of 2 numbers"),
        ("optim.base_lr=fast", "expected a number"),
        ("model=3", "expected a group of settings"),
        ("model.size.x=3", "model.size: expected text"),
        ("size", "expected key=value"),
        ("model.keep_ratio=0.05", "model.keep_ratio: 0.05 must be above model.visible_ratio = 0.1"),
        ("model.image_size=225", "225 is not divisible by model.patch = 16"),
        ("model.frames=15", "15 is not divisible by model.tubelet = 2"),
        ("model.frames=2", "at least 2 slots"),
        ("train.max_steps=0", "must be positive"),
        ("train.peak_flops=0", "train.peak_flops: must be positive, got 0"),
        ("train.peak_flops=H100", "train.peak_flops: expected a number"),
        ("optim.warmup_steps=-5", "must not be negative"),
        ("optim.base_lr=.inf", "expected a finite number"),
        ("data.crop_scales=[2.0]", "must be in (0, 1]"),
        ("model.image_size=160000", "model.image_size: makes 800000000 tokens; at most 131072"),
        ("model.frames=2000000", "model.image_size: makes 196000000 tokens"),
        ("model.decoder_depth=100000", "model.decoder_depth: must be at most 256"),
        ("model.decoder_width=30000000", "model.decoder_width: must be at most 16384"),
        ("model.patch=224", "makes tokens of 301056 numbers; at most 65536"),
        ("data.workers=100000", "data.workers: must be at most 1024, got 100000"),
        ("data.timeout_s=1e12", "data.timeout_s: must be at most 604800"),
        ("optim.warmup_epochs=1e300", "expected a number of at most 9007199254740992, got 1e+300"),
        ("train.seed=" + "1" * 30, "expected a number of at most 9007199254740992"),
        ("data.train='" + "x" * 5000 + "'", "expected text of at most 4096 characters"),
    ],
)
def test_mistakes_are_named(override, told):
    assert told in refusal(override)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"model: [unclosed", "not a YAML file"),
        (b"\xff\xfe\x00", "not a YAML file"),
        (b"- 1\n- 2\n", "expected groups"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, told):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_recipe(file)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")


@given(st.text(max_size=30))
def test_any_text_is_an_override_or_a_mistake(text):
    with contextlib.suppress(UserError):
        assert isinstance(load_recipe(None, [text]), Recipe)


def test_every_key_is_documented():
    assert len(list(describe_keys())) > 40
    assert all(": " in line and line.endswith("]") for line in describe_keys())


def test_messages_are_short_and_printable():
    """Whatever a file puts into one."""
    assert str(UserError("a\nb\x1b[2J\0\ud800\u00fc")) == "a b\\x1b[2J\\x00\\ud800\u00fc"
    long = str(UserError("begin " + "x" * 1_000_000 + " end"))
    assert (len(long), long[:6], long[-4:]) == (LONGEST_MESSAGE, "begin ", " end")
    again = pickle.loads(pickle.dumps(RankError("a\nb")))
    assert (type(again), str(again)) == (RankError, "a b")


def test_values_are_shown_short():
    assert shown("vit_bas") == "'vit_bas'"
    assert shown([1, 2.5, None, True]) == "[1, 2.5, None, True]"
    assert shown(10**5000) == "a number of 16610 bits"
    laughs = "x"
    for _ in range(50):
        laughs = [laughs] * 9
    itself: list = []
    itself.append(itself)
    for value in ("x" * 1_000_000, laughs, itself, dict.fromkeys(range(1000), "y" * 1000), b"z" * 1_000_000):
        assert len(shown(value)) <= 200


def test_a_mistake_ends_a_command_in_one_line(capsys):
    with pytest.raises(SystemExit) as caught, one_line_errors("prog"):
        raise UserError("two\nlines")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "prog: error: two lines\n"


def test_only_a_nodes_first_rank_reports_what_all_ranks_see(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), one_line_errors("prog"):
        raise UserError("mistake")
    assert capsys.readouterr().err == ""
