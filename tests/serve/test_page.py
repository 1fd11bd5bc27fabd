"""The page's files: complete, and nothing in them leads elsewhere."""

import re

from densedino.serve.page import page_files


def test_every_file_that_is_pointed_to_is_there():
    files = page_files()
    html = files["index.html"].body.decode()
    named = set(re.findall(r'(?:src|href)="/app/([^"]+)"', html))
    for name, file in files.items():
        if name.endswith(".js"):
            named |= set(re.findall(r'from "\./([^"]+)"', file.body.decode()))
    named |= {"chelsea.jpg", "astronaut.jpg", "coffee.jpg"}
    assert named <= set(files) and {"main.js", "style.css", "dot.js"} <= named


def test_nothing_is_loaded_from_elsewhere_and_nothing_is_inline():
    for name, file in page_files().items():
        if file.media_type.startswith(("text/html", "text/javascript", "text/css")):
            text = file.body.decode()
            assert not re.search(r"https?://(?!www\.w3\.org)", text), name
            assert not re.search(r"\beval\(|new Function|\.innerHTML\s*=(?! HINTS\[)|document\.write", text), name
    html = page_files()["index.html"].body.decode()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", html)


def test_types_are_those_that_browsers_insist_on():
    files = page_files()
    assert files["main.js"].media_type == "text/javascript; charset=utf-8"
    assert files["icon.svg"].media_type == "image/svg+xml; charset=utf-8"
    assert files["chelsea.jpg"].media_type == "image/jpeg"
    assert len({file.etag for file in files.values()}) == len(files)
