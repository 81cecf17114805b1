"""Information-intensive frame selection: what is drawn, how often, and that the rest of the model can't tell."""

import dataclasses
import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

import everest_ds
from everest_ds.config.errors import UserError
from everest_ds.config.schema import FrameSelectionConfig, ModelConfig
from everest_ds.models import MaskedAutoencoder
from everest_ds.models.frames import draw_slots, kept_per_slot, take_slots
from everest_ds.models.importance import importance
from everest_ds.models.patches import patchify, unpatchify

OFF = ModelConfig(size="vit_micro", image_size=48, decoder_depth=1, keep_ratio=0.5)
ON = dataclasses.replace(OFF, frame_selection=FrameSelectionConfig(alpha=1.5))  # 8 of 12 slots
DRAWS = 10_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(config: ModelConfig, batch: int = 3) -> torch.Tensor:
    shape = (batch, 3, config.candidate_frames, config.image_size, config.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator())


def noise_for(model: MaskedAutoencoder, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, model.noise_length, generator=generator(1))


def seeded(config: ModelConfig) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(config)


def step(model: MaskedAutoencoder, batch: torch.Tensor, noise: torch.Tensor):
    out = model(batch, noise)
    model.zero_grad()
    out.loss.backward()
    return out, [p.grad.clone() for p in model.parameters()]


def exact_chances(counts: list[float], number: int) -> dict[tuple[int, ...], float]:
    """The probability of each set under successive sampling, over all orders in which it can be drawn."""
    chances: dict[tuple[int, ...], float] = dict.fromkeys(itertools.combinations(range(len(counts)), number), 0.0)
    for order in itertools.permutations(range(len(counts)), number):
        chance, left = 1.0, sum(counts)
        for slot in order:
            chance *= counts[slot] / left
            left -= counts[slot]
        chances[tuple(sorted(order))] += chance
    return chances


def draws(counts: list[float], number: int) -> Counter[tuple[int, ...]]:
    noise = torch.rand(DRAWS, len(counts), generator=generator())
    return Counter(tuple(row) for row in draw_slots(torch.tensor(counts).expand(DRAWS, -1), noise, number).tolist())


def fit(counts: list[float], number: int, expected: dict[tuple[int, ...], float]) -> float:
    """How likely draws as far from the expected chances as ours would be: the p-value of a chi-square test."""
    seen = draws(counts, number)
    assert set(seen) <= set(expected)
    distance = sum((seen[slots] - DRAWS * chance) ** 2 / (DRAWS * chance) for slots, chance in expected.items())
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(distance / 2)).item()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("counts", [[4.0, 1.0, 3.0, 0.5, 2.0], [1.0] * 5], ids=["uneven", "equal"])
def test_slots_are_drawn_one_after_another_in_proportion_to_their_counts(counts, number):
    assert fit(counts, number, exact_chances(counts, number)) > 0.01


def test_the_comparison_notices_other_ways_to_draw():
    counts = [4.0, 1.0, 3.0, 0.5, 2.0]
    assert fit(counts, 3, exact_chances([1.0] * 5, 3)) < 1e-9
    # Sets in proportion to the product of their counts, as conditional Poisson sampling draws them.
    products = {s: counts[s[0]] * counts[s[1]] * counts[s[2]] for s in itertools.combinations(range(5), 3)}
    assert fit(counts, 3, {s: p / sum(products.values()) for s, p in products.items()}) < 1e-9


def test_slots_without_kept_tokens_only_fill_up_and_evenly():
    counts = [4.0, 0.0, 0.0, 1e-3, 0.0]
    assert draws(counts, 2) == {(0, 3): DRAWS}
    assert fit(counts, 3, {(0, 1, 3): 1 / 3, (0, 2, 3): 1 / 3, (0, 3, 4): 1 / 3}) > 0.01
    assert fit([0.0] * 5, 3, exact_chances([1.0] * 5, 3)) > 0.01


def test_the_smallest_and_largest_numbers_draw_too():
    counts = torch.tensor([[0.0, 5.0, 0.0, 2.0]])
    for number in (0.0, 1 - 2**-24):
        assert draw_slots(counts, torch.full((1, 4), number), 2).tolist() == [[1, 3]]


def test_ties_with_the_last_kept_token_share_what_is_left():
    scores = torch.tensor([[9.0, 5.0, 5.0, 1.0, 7.0, 5.0, 0.0, 1.0, 2.0]])
    # Kept: 9 and 7, and two of three fives.
    assert kept_per_slot(scores, 4, 3)[0].tolist() == pytest.approx([1 + 2 * 2 / 3, 1 + 2 / 3, 0])
    assert kept_per_slot(scores, 5, 3).tolist() == [[3, 2, 0]]
    assert kept_per_slot(torch.zeros(2, 9), 4, 3).tolist() == [[pytest.approx(4 / 3)] * 3] * 2


@pytest.mark.parametrize("levels", [2, 5, 10**6])
def test_counts_are_those_of_a_count_by_hand(levels):
    scores = torch.randint(levels, (4, 60), generator=generator()).float()
    for kept in (1, 17, 60):
        counts = kept_per_slot(scores, kept, 6)
        for row, counted in zip(scores.tolist(), counts.tolist(), strict=True):
            last = sorted(row, reverse=True)[kept - 1]
            share = Fraction(kept - sum(s > last for s in row), sum(s == last for s in row))
            by_slot = [row[i : i + 10] for i in range(0, 60, 10)]
            exact = [sum(s > last for s in slot) + share * sum(s == last for s in slot) for slot in by_slot]
            assert sum(exact) == kept
            assert counted == pytest.approx([float(c) for c in exact])


def test_alpha_1_is_off():
    reference = seeded(OFF)
    out, grads = step(reference, clips(OFF), noise_for(reference))
    assert out.slot_idx is None
    model = seeded(dataclasses.replace(OFF, frame_selection=FrameSelectionConfig(alpha=1.0)))
    assert model.noise_length == reference.noise_length == reference.budget.kept
    again, grads_again = step(model, clips(OFF), noise_for(reference))
    assert again.slot_idx is None
    assert torch.equal(again.loss, out.loss)
    assert torch.equal(again.visible_idx, out.visible_idx)
    assert all(torch.equal(a, b) for a, b in zip(grads_again, grads, strict=True))


def test_an_alpha_that_adds_no_slot_is_refused():
    with pytest.raises(UserError, match=r"1.05 x 8 slots leaves none to choose from; at least 1.125"):
        dataclasses.replace(OFF, frame_selection=FrameSelectionConfig(alpha=1.05))


@pytest.mark.parametrize("selector", ["auto", "least"])
def test_what_is_taken_is_trained_on_as_a_clip_that_never_had_other_slots(selector):
    """Importance anew between the neighbours, positions from 0, the same noise for the tokens; targets too."""
    model = seeded(dataclasses.replace(ON, selector=selector))
    plain = seeded(dataclasses.replace(OFF, selector=selector))
    batch, noise = clips(ON), noise_for(model)
    out, grads = step(model, batch, noise)
    assert out.slot_idx.shape == (3, 8)
    assert torch.equal(out.slot_idx, out.slot_idx.sort(dim=1).values)
    assert len({tuple(row) for row in out.slot_idx.tolist()}) == 3  # or the clips would show little
    frames = [[2 * slot + frame for slot in row for frame in range(2)] for row in out.slot_idx.tolist()]
    by_hand = torch.stack([clip[:, of_clip] for clip, of_clip in zip(batch, frames, strict=True)])
    expected, expected_grads = step(plain, by_hand, noise[:, : plain.noise_length])
    assert torch.equal(out.visible_idx, expected.visible_idx)
    assert torch.equal(out.target_idx, expected.target_idx)
    # Not bit for bit: a matrix product may round a row differently when there are more rows.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.loss, expected.loss, **close)
    torch.testing.assert_close(grads, expected_grads, **close)
    targets = model.targets(batch, out.target_idx, out.slot_idx)
    assert torch.equal(targets, plain.targets(by_hand, expected.target_idx))
    torch.testing.assert_close(F.mse_loss(out.prediction, targets), out.loss, **close)


def test_the_slots_taken_depend_on_the_noise_behind_the_tokens_alone():
    model = MaskedAutoencoder(ON)
    batch, noise = clips(ON), noise_for(model)
    tokens = model.noise_length - ON.candidate_slots
    assert tokens == model.budget.kept
    slots = model(batch, noise).slot_idx
    other_tokens, other_slots = noise.clone(), noise.clone()
    other_tokens[:, :tokens] = torch.rand(3, tokens)
    other_slots[:, tokens:] = 1 - noise[:, tokens:]
    assert torch.equal(model(batch, other_tokens).slot_idx, slots)
    assert not torch.equal(model(batch, other_slots).slot_idx, slots)


def test_slots_that_change_are_taken():
    # Five of twelve slots change; fewer tokens than theirs are kept, or slots in which nothing moves had a share.
    config = dataclasses.replace(ON, keep_ratio=0.4)
    batch = clips(config, 1)
    batch[:, :, 8:] = batch[:, :, 8:9]  # slot 4 differs from slot 3; nothing moves after it
    model = MaskedAutoencoder(config)
    assert model.budget.candidate_kept < 5 * model.budget.per_slot
    taken = model(batch.expand(64, -1, -1, -1, -1), noise_for(model, 64)).slot_idx
    assert all(set(range(5)) < set(row) for row in taken.tolist())


def test_a_static_video_takes_any_slot():
    model = MaskedAutoencoder(ON)
    batch = clips(ON, 1)[:, :, :1].expand(64, -1, ON.candidate_frames, -1, -1)
    out = model(batch, noise_for(model, 64))
    assert out.loss.isfinite()
    assert out.slot_idx.unique().tolist() == list(range(12))
    scores = importance(patchify(batch, *model.encoder.cut), model.encoder.patch_embed.weight, 12, torch.float32)
    counts = kept_per_slot(scores, model.budget.candidate_kept, 12)
    assert torch.equal(counts, torch.full((64, 12), model.budget.candidate_kept / 12))


def test_bf16_takes_the_slots_that_fp32_takes():
    model = MaskedAutoencoder(ON).bfloat16()
    batch, noise = clips(ON), noise_for(model)
    low = model(batch, noise)
    reference = model.float()(batch, noise)  # the same weights, rounded before
    assert low.prediction.dtype == torch.bfloat16
    assert low.loss.dtype == torch.float32
    assert torch.equal(low.slot_idx, reference.slot_idx)
    assert torch.equal(low.visible_idx, reference.visible_idx)


def test_take_slots_takes_whole_slots():
    batch = clips(ON)
    slot_idx = torch.tensor([[0, 11], [3, 4], [5, 9]])
    taken = take_slots(patchify(batch, 2, 16), slot_idx, 12)
    for clip, patches, (first, second) in zip(batch, taken, slot_idx.tolist(), strict=True):
        expected = torch.cat([clip[:, 2 * first : 2 * first + 2], clip[:, 2 * second : 2 * second + 2]], dim=1)
        assert torch.equal(unpatchify(patches.unsqueeze(0), (2, 3, 3), 2, 16)[0], expected)


def test_clips_have_all_candidate_frames():
    model = everest_ds.create_model("vit_micro", image_size=48, frame_selection={"alpha": 1.5})
    assert model.budget.candidate_slots == 12
    with pytest.raises(UserError, match=r"expected uint8 \(B, 3, 24, 48, 48\), got torch.uint8 \(3, 3, 16, 48, 48\)"):
        model(clips(OFF))
    with pytest.raises(UserError, match="noise: expected"):
        model(clips(ON), torch.rand(3, model.noise_length - 1))
