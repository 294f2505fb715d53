"""The documents say what is there: a page or a map that has gone stale is found here."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_settings_is_what_the_docstrings_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/settings.py"))["page"]()
    written = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert written == page, "docs/settings.md is stale: run `make docs`"
