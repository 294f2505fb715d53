"""Print docs/settings.md from the recipe's own docstrings: `make docs`."""

import json
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dist_sft.config import GenerateRecipe, Recipe
from dist_sft.recipe_errors import section_of

HEADER = """# Every setting of a recipe

Made by `make docs` from the docstrings in `dist_sft/config.py`, `generate_recipe.py`,
`sections.py` and `zero.py`. A setting is written in YAML under its section, or given as
`dotted.key=value` on the command line.
"""
HEADINGS = {"Training": Recipe, "Generation (`job: generate`)": GenerateRecipe}


def rows(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return a table row for every setting of a section and of those below it."""
    lines = []
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        many = inner is not None and "tuple" in str(field.annotation)
        if inner and inner.__module__ != "dist_sft.zero":
            lines += rows(inner, f"{prefix}{name}.{'N.' if many else ''}")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{shown(field.default)}`"
        text = " ".join((field.description or "").split())
        allowed = ", ".join(words(field.annotation))
        if "`" in allowed:
            text += f" Allowed: {allowed}."
        lines.append(f"| `{prefix}{name}` | {default} | {text} |")
    return lines


def words(annotation: object) -> list[str]:
    """Return what an annotation such as `Literal["auto"] | int` allows."""
    if get_origin(annotation) is Literal:
        return [f"`{word}`" for word in get_args(annotation)]
    if annotation is int:
        return ["a whole number"]
    return [word for inner in get_args(annotation) for word in words(inner)]


def shown(value: object) -> str:
    """Return a default as one would write it in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def page() -> str:
    """Return the whole page."""
    lines = [HEADER]
    for heading, recipe in HEADINGS.items():
        table = ["| setting | default | meaning |", "| --- | --- | --- |", *rows(recipe)]
        lines += [f"## {heading}", "", *table, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
