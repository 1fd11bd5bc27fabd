"""The page: whole, well formed, and on its own."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from densedino.pretrain.report_page import render_page
from densedino.pretrain.report_panels import panels, verdicts
from densedino.pretrain.run_data import read_run

if TYPE_CHECKING:
    from pathlib import Path


def render(folder: Path) -> str:
    run = read_run(folder)
    return render_page(run, verdicts(run), panels(run))


class Collector(HTMLParser):
    """Start tags with their attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_runs_nothing(run_folder: Path) -> None:
    page = render(run_folder)
    found = Collector()
    found.feed(page)
    links = [str(v) for _, attributes in found.tags for k, v in attributes.items() if k in ("src", "href", "data")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert "url(" not in page
    assert "@import" not in page


def test_names_from_outside_are_escaped(run_folder: Path) -> None:
    found = Collector()
    found.feed(render(run_folder))
    assert "my <run>" in found.text
    assert "<b>.jpg" in found.text
    assert "OSError: <disk> full" in found.text
    assert '"note": "a < b & c"' in found.text
    assert not {"run", "b", "disk"} & {tag for tag, _ in found.tags if tag != "b"}


def test_every_picture_has_words_for_those_who_do_not_see_it(run_folder: Path) -> None:
    found = Collector()
    found.feed(render(run_folder))
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in found.tags if tag == "svg")


def test_light_and_dark_name_the_same_colours(run_folder: Path) -> None:
    page = render(run_folder)
    light, dark = page.split("@media(prefers-color-scheme:dark)")
    assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark.split("}")[0]))


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "No look at the features was taken yet" in render(tmp_path)
