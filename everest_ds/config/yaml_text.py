"""YAML that may be anything: what is small, flat, and says nothing twice."""

from __future__ import annotations

from typing import Any

import yaml

from everest_ds.config.files import LARGEST_SETTINGS_BYTES

# Settings have three levels, and there are a hundred of them.
_DEEPEST = 20
_MOST_NODES = 10_000
_MERGE = "tag:yaml.org,2002:merge"


class YamlTextError(Exception):
    """Why a text is not what we take for YAML, in one line."""


def parse_yaml(text: str) -> Any:
    """Return the plain values that a YAML text holds.

    Aliases count as what they stand for: nine lines of nine aliases each would make a billion values. A key that is
    there twice is refused, since YAML would silently take the second.

    Raises:
        YamlTextError: it is not YAML, or too large, too deep or of more than plain values.
    """
    # Characters, of which there are no more than bytes.
    if len(text) > LARGEST_SETTINGS_BYTES:
        raise YamlTextError(f"larger than {LARGEST_SETTINGS_BYTES:,} bytes")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlTextError(f"{place}{error.problem}") from error
    except RecursionError as error:
        raise YamlTextError("nested too deep") from error
    except Exception as error:  # a value that its tag doesn't fit can raise anything
        raise YamlTextError(str(error).partition("\n")[0] or type(error).__name__) from error


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _Weigher().weigh(node, 1)
        return node


class _Weigher:
    """Counts the nodes of a document with its aliases written out, without writing them out."""

    def __init__(self) -> None:
        self._weights: dict[int, int | None] = {}

    def weigh(self, node: yaml.Node, depth: int) -> int:
        if depth > _DEEPEST:
            raise _refused("nested too deep", node)
        if id(node) in self._weights:
            known = self._weights[id(node)]
            if known is None:
                raise _refused("a value that holds itself", node)
            return known
        self._weights[id(node)] = None
        weight = 1 + sum(self.weigh(inner, depth + 1) for inner in _inside(node))
        if weight > _MOST_NODES:
            raise _refused(f"more than {_MOST_NODES} values", node)
        self._weights[id(node)] = weight
        return weight


def _inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            # Other keys than text are refused when they are looked up.
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if (key.tag, key.value) in seen:
                    raise _refused(f"the key {key.value!r:.80} is there twice", key)
                seen.add((key.tag, key.value))
        return [inner for pair in node.value for inner in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
