"""What a rank sends to the others in an optimizer step, per ZeRO stage: what DeepSpeed hands to its collectives.

Sizes are those that DeepSpeed's comms logger counts, so that they can be checked against it (``memprof measure``). The
ZeRO paper's volumes (Rajbhandari et al. 2020, section 7: 2, 2 and 3 times the parameters for stages 1, 2 and 3) are
those of reduce-scatter and all-gather; DeepSpeed's stages 1 and 2 all-reduce their gradients instead, which costs one
more. Norms and overflow flags, some bytes each, are left out. ``communication_data_type``, quantised ZeRO++ and
``use_multi_rank_bucket_allreduce: false`` are not modelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from everest_ds.memory.plan import Plan
from everest_ds.memory.setting import FlatGroup, groups_of, share
from everest_ds.memory.step_zero3 import StepZero3

_STAGE12 = "runtime/zero/stage_1_and_2.py"
_STAGE3 = "runtime/zero/stage3.py"
_PARAMETERS = "runtime/zero/partition_parameters.py, all_gather_coalesced"

# Of n ranks, the bytes that each passes on per byte of its message, by the algorithms that move least: rings
# (Thakur, Rabenseifner and Gropp 2005, sections 3 and 4). The message of an all-gather is one rank's share.
_PASSED_ON: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """What one rank gives to a kind of collective in an optimizer step.

    ``size_bytes``: the messages' own size, as the comms logger counts it; ``sent_bytes``: what the rank passes on.
    """

    name: str
    collective: str
    ranks: int
    size_bytes: int
    formula: str
    source: str

    @property
    def sent_bytes(self) -> int:
        """Bytes that leave the rank."""
        return passed_on(self.collective, self.size_bytes, self.ranks)


def passed_on(collective: str, size_bytes: int, ranks: int) -> int:
    """Bytes that leave each of ``ranks`` ranks for a message of ``size_bytes``; 0 for one rank.

    Raises:
        KeyError: a collective that no stage uses.
    """
    return round(_PASSED_ON[collective](ranks) * size_bytes)


def messages(plan: Plan) -> list[Message]:
    """Itemise what one rank gives to collectives in an optimizer step, in the steady state.

    A single rank reduces its gradients all the same, and sends nothing; it doesn't gather.
    """
    found = {0: _stage0, 1: _stage12, 2: _stage12, 3: _stage3}[plan.setting.stage](plan)
    return [message for message in found if plan.setting.ranks > 1 or message.name == "gradients"]


def message_bytes(plan: Plan) -> int:
    """Bytes of one rank's messages in an optimizer step, as the comms logger counts them."""
    return sum(message.size_bytes for message in messages(plan))


def sent_bytes(plan: Plan) -> int:
    """Bytes that leave one rank in an optimizer step."""
    return sum(message.sent_bytes for message in messages(plan))


def _stage0(plan: Plan) -> Iterator[Message]:
    yield Message(
        name="gradients",
        collective="all_reduce",
        ranks=plan.setting.ranks,
        size_bytes=plan.trace.elements * plan.setting.element_bytes,
        formula="n x b",
        source="runtime/engine.py, allreduce_bucket",
    )


def _stage12(plan: Plan) -> Iterator[Message]:
    setting = plan.setting
    passes = setting.accumulation if setting.stage == 2 else 1
    yield Message(
        name="gradients",
        collective="all_reduce",
        ranks=setting.ranks,
        size_bytes=passes * plan.trace.elements * setting.element_bytes,
        formula="n x b" + (" x passes: every pass is reduced" if passes > 1 else ""),
        source=f"{_STAGE12}, allreduce_and_scatter",
    )
    groups = [FlatGroup(group, setting.ranks) for group in groups_of(plan.trace.parameters)]
    yield Message(
        name="parameters",
        collective="all_gather",
        ranks=setting.ranks,
        size_bytes=sum(group.partition for group in groups) * setting.element_bytes,
        formula="p x b",
        source="runtime/utils.py, all_gather_into_tensor_dp_groups",
    )


def _stage3(plan: Plan) -> Iterator[Message]:
    setting = plan.setting
    step = StepZero3(plan.trace, setting, plan.states)
    step.run()
    whole = sum(share(p, setting.ranks) for p in step.kept_whole())
    first, last = step.gathered[0], step.gathered[-1]
    for group in {setting.ranks: 0} | first | last:
        elements = first[group] + (setting.accumulation - 1) * last[group]
        within = group != setting.ranks
        yield Message(
            name="parameters within nodes" if within else "parameters",
            collective="all_gather",
            ranks=group,
            size_bytes=(elements + (0 if within else whole)) * setting.element_bytes,
            formula="what modules need and isn't whole any more x b x passes"
            + ("" if within else ", and those kept whole once a step"),
            source=_PARAMETERS,
        )
    yield Message(
        name="gradients",
        collective="reduce_scatter",
        ranks=setting.ranks,
        size_bytes=setting.accumulation
        * sum(share(p, setting.ranks) * setting.ranks for p in plan.trace.parameters)
        * setting.element_bytes,
        formula="n x b x passes, each parameter padded to the ranks",
        source=f"{_STAGE3}, __avg_scatter_grads",
    )
