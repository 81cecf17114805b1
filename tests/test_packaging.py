"""What pip is told: an environment's torch, in a wide range, stays as it is."""

from importlib.metadata import PackageNotFoundError, requires

import pytest
from launching import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from everest_ds.training.doctor.declared import declared

TOGETHER = {"2.6.0": "0.21.0", "2.9.1": "0.24.1", "2.11.0": "0.26.0", "2.14.1": "0.29.1"}


@pytest.mark.parametrize("torch", TOGETHER)
@pytest.mark.parametrize("local", ["", "+cu130"])
def test_torch_and_its_torchvision_are_in_the_range(torch, local):
    wanted = declared().here()
    assert wanted["torch"].specifier.contains(torch + local)
    assert wanted["torchvision"].specifier.contains(TOGETHER[torch] + local)


def test_what_was_not_tested_is_not():
    wanted = declared().here()
    assert not any(wanted["torch"].specifier.contains(one) for one in ("2.5.1", "2.15.0", "3.0.0"))
    assert not any(wanted["torchvision"].specifier.contains(one) for one in ("0.20.1", "0.30.0"))
    assert not any(wanted["deepspeed"].specifier.contains(one) for one in ("0.19.7", "0.20.0"))


def test_every_package_has_a_lower_bound_and_none_but_decord_is_pinned():
    for name, one in declared().here().items():
        operators = {part.operator for part in one.specifier}
        assert operators <= ({"=="} if name == "decord" else {">=", "<"}), name
        assert operators & {"==", ">="}, name


def test_nothing_that_comes_along_asks_for_another_torch():
    """Of all that is needed, torchvision alone, whose versions go with torch's."""
    asking = {name: one for name, needs in closure().items() for one in needs if one.name == "torch"}
    assert {"timm", "deepspeed"} <= asking.keys()
    for name in asking.keys() - {"torchvision", "everest-ds"}:
        assert all(asking[name].specifier.contains(torch) for torch in TOGETHER), name


def test_the_readme_says_the_same():
    bounds = {part.operator: Version(part.version) for part in declared().here()["torch"].specifier}
    newest = f"{bounds['<'].major}.{bounds['<'].minor - 1}"
    assert f"torch {bounds['>=']} to {newest} " in (ROOT / "README.md").read_text(encoding="utf-8")


def closure() -> dict[str, list[Requirement]]:
    """What every package asks for that we need here, by the metadata of what is installed."""
    found = {"everest-ds": list(declared().here().values())}
    waiting = [one.name for one in found["everest-ds"]]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            parsed = [Requirement(one) for one in requires(name) or [] if "extra ==" not in one]
        except PackageNotFoundError:
            continue
        found[name] = [one for one in parsed if one.marker is None or one.marker.evaluate()]
        waiting += [one.name for one in found[name]]
    return found
