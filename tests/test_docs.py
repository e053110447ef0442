"""The Python in README and in the pages of docs runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def program(page: str) -> str:
    """All Python blocks of a page as one program, on the lines where they stand."""
    text = (ROOT / page).read_text(encoding="utf-8")
    inside = [False] * (text.count("\n") + 1)
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        first, last = (text.count("\n", 0, place) for place in block.span(1))
        inside[first:last] = [True] * (last - first)
    lines = text.splitlines()
    return "\n".join(line if use else "" for line, use in zip(lines, inside, strict=False))


DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
PAGES = [page for page in ("README.md", *map(str, DOCS)) if program(page).strip()]


@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """In a new directory with the configs and pages of the repository."""
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(program(page), page, "exec"), {"__name__": "page"})


def test_the_pages_with_python_are_found():
    assert {"README.md", "docs/data.md", "docs/extending.md", "docs/training.md"} <= set(PAGES)


def test_a_broken_page_would_be_noticed():
    broken = program("README.md").replace("NeuralMemory(dim=256", "NeuralMemory(dimension=256")
    with pytest.raises(TypeError):
        exec(compile(broken, "README.md", "exec"), {"__name__": "page"})
