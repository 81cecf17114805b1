"""The moving average of the weights."""

import pytest
import torch

from everest_ds.training.average import Average


def test_updates_follow_the_rule_with_its_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = Average(model, decay=0.15)
        model.weight.fill_(2.0)
        average.update()  # decay 1 / 11
        model.weight.fill_(4.0)
        average.update()  # decay 0.15, less than 2 / 12
    first = 1 / 11 * 1.0 + 10 / 11 * 2.0
    assert average.state["weight"].item() == pytest.approx(0.15 * first + 0.85 * 4.0)


def test_half_precision_is_averaged_in_fp32():
    model = torch.nn.Linear(2, 2).bfloat16()
    average = Average(model, decay=0.9)
    assert all(value.dtype == torch.float32 for value in average.state.values())


def test_weights_come_back_bit_for_bit_also_after_an_error():
    model = torch.nn.Linear(3, 2)
    average = Average(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        assert torch.equal(model.weight, average.state["weight"])
        assert not torch.equal(model.weight, before["weight"])
    with pytest.raises(KeyError), average.in_place():
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
