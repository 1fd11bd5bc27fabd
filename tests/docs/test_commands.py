"""Every command and snippet in README.md and docs/*.md is run, and everything that they point to is there.

A fenced ```bash or ```python block is run in the order of its page, in a folder that looks like a clone: it has
examples/photos and hubconf.py, and a video. On the line before a block may stand

    <!-- not run: the reason -->        it needs what a test has not: the network, a licence
    <!-- fails -->                      the block shows an error: it must end with one

A line that ends in "# ci: …" installs things, and is left to the script that it is for; but of "# ci: use", in the
README, all is run that comes after the installation.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from densedino.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKER = re.compile(r"<!-- (?:(?P<fails>fails)|not run: (?P<reason>\S.*)) -->")
pytestmark = pytest.mark.filterwarnings("ignore::densedino.errors.UntrainedWarning")  # the default weights
SHELL = frozenset("|&;<>$`*?~\\")


@dataclass(frozen=True)
class Block:
    language: str
    line: int
    """Of the page, of the first line of `code`."""
    code: str
    fails: bool


def blocks_of(page: Path) -> list[Block]:
    """The blocks that are to be run."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, number = [], 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)```(\w*)", lines[number])
        if fence is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
        marker = MARKER.fullmatch(lines[number - 1].strip()) if number else None
        if fence[2] in ("bash", "python") and not (marker and marker["reason"]):
            assert not fence[1], f"{page.name}:{number + 1}: an indented block is not run; take it out of the list"
            code = [uninstalled(line) for line in lines[number + 1 : end]]
            found.append(Block(fence[2], number + 2, "\n".join(code), bool(marker)))
        number = end + 1
    return found


def uninstalled(line: str) -> str:
    """What of a line is to be run where densedino is installed already."""
    if used := re.fullmatch(r"pip install \S+ && (.*) # ci: use", line):
        return used[1]
    return "" if "# ci:" in line else line


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a page."""
    shutil.copytree(ROOT / "examples" / "photos", tmp_path / "examples" / "photos")
    (tmp_path / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    write_video(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    return tmp_path


def write_video(path: Path, *, frames: int = 8) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            image = np.full((48, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, clone: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}  # of all python blocks of the page
    for block in blocks_of(page):
        error = run_python(block, page, names) if block.language == "python" else run_bash(block, page)
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.fails:
            assert error, f"{where}: this block is to show an error, and ran"
        else:
            assert not error, f"{where}: {error}"


def run_python(block: Block, page: Path, names: dict[str, object]) -> str:
    """Run it, and return the traceback, with the lines of the page."""
    try:
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    except Exception:
        return traceback.format_exc()
    return ""


def run_bash(block: Block, page: Path) -> str:
    """Run it and return what went wrong, with the lines of the page.

    The README is run by bash as it stands: there it is what a newcomer does. On the other pages plain densedino
    commands are run in this process, which saves the seconds that every import of PyTorch takes.
    """
    lines = block.code.splitlines()
    here = [page.name != "README.md" and is_plain_command(line) for line in lines]
    for plain, numbers in itertools.groupby(range(len(lines)), key=here.__getitem__):
        part = {number: lines[number] for number in numbers}
        script = "".join(f"{part.get(number, '')}\n" for number in range(max(part) + 1))
        error = "".join(map(run_here, part.values())) if plain else run_shell("\n" * (block.line - 1) + script)
        if error:
            return error
    return ""


def is_plain_command(line: str) -> bool:
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"", "", line.partition(" #")[0])
    return line.startswith("densedino ") and not SHELL & set(unquoted)


def run_here(line: str) -> str:
    try:
        status = main(shlex.split(line, comments=True)[1:])
    except SystemExit as error:  # of wrong arguments
        status = error.code
    return f"exit status {status}: {line}" if status else ""


def run_shell(script: str) -> str:
    Path("block.sh").write_text(script)
    command = 'trap "echo \\"line \\$LINENO\\" >&2" ERR; . ./block.sh'
    done = subprocess.run(
        ["bash", "-Eeuo", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    Path("block.sh").unlink()
    return f"exit status {done.returncode}: {done.stdout}{done.stderr}" if done.returncode else ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_points_to_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    for path, name in re.findall(r"`((?:tests|benchmarks|src|dev|docs|examples)/[\w/.]+)(?:::(\w+))?`", text):
        if not (ROOT / path).exists():
            missing.append(path)
        elif name and f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8"):
            missing.append(f"{path}::{name}")
    assert not missing


def test_pages_are_all_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.stem != "README" and f"({page.name})" not in index] == []


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n```python\n1 / 0\n```\n```bash\ntrue\nfalse\n```\n"
        "<!-- not run: a reason -->\n```bash\nfalse\n```\n```bash\ndensedino nonsense\npip install x # ci: test\n```\n"
        "```bash\npip install . && true && false # ci: use\n```\n```\ntext\n```\n"
    )
    one, two, three, four = blocks_of(page)
    assert "page.md" in run_python(one, page, {}) and "line 3" in run_python(one, page, {})
    assert "line 7" in run_bash(two, page)
    assert "exit status 2: densedino nonsense" in run_bash(three, page)
    assert four.code == "true && false" and run_bash(four, page)
