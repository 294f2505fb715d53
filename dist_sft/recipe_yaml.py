"""The text of a recipe: YAML and `dotted.key=value` overrides -> a plain tree, not yet checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dist_sft.errors import UserError

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """Read scalars as YAML 1.2 does, and refuse a key that stands twice in one place.

    YAML 1.1 reads `packing: off` as false, reads `1e-4` as text, and keeps the last of two
    sections of one name without a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  (SafeLoader declares it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # SafeLoader has words for a key that is a list
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is here a second time", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML recipe and apply `dotted.key=value` overrides in order.

    Raises UserError for a file that cannot be read, is not YAML or holds no mapping, and for an
    override that has no place in it.
    """
    try:
        tree = _parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of settings, got {type(tree).__name__}")
    for override in overrides:
        apply_override(tree, override)
    return tree


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in a plain tree, in place; list items go by their number.

    The value is read as YAML, so `null`, `true`, numbers and `[a, b]` mean what they mean there.
    """
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(
            f"override {override!r} is not of the form dotted.key=value, "
            "for example optimizer.lr=1e-4"
        )
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not valid YAML: {error}") from None
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            node = node[_index(node, part, ".".join(parents[:depth]), override)]
    if isinstance(node, dict):
        node[last] = value
    else:
        node[_index(node, last, ".".join(parents), override)] = value


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def _index(node: Any, part: str, at: str, override: str) -> int:
    if not isinstance(node, list):
        raise UserError(f"override {override!r}: {at} is {node!r} and has no settings in it")
    if not part.isdecimal() or int(part) >= len(node):
        allowed = f"0 to {len(node) - 1}" if node else "none, the list is empty"
        raise UserError(f"override {override!r}: {at} has no item {part!r}, allowed: {allowed}")
    return int(part)
