"""The documents say what is there: a page or a map that has gone stale is found here."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_settings_is_what_the_docstrings_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/settings.py"))["page"]()
    written = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert written == page, "docs/settings.md is stale: run `make docs`"


def test_the_map_names_every_module_once() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`dist_sft/[^|]*) \|", readme, re.MULTILINE)
    named = re.findall(r"(\w+\.py)`", " ".join(first_cells))
    modules = {path.name for path in (ROOT / "dist_sft").glob("*.py")} - {"__init__.py"}
    assert sorted(named) == sorted(modules), 'correct the table "Where things are" in README.md'
