"""The Python in README and docs/extending.md runs."""

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


@pytest.mark.parametrize("page", ["README.md", "docs/extending.md"])
def test_python_of_a_page_runs(page):
    exec(compile(program(page), page, "exec"), {"__name__": "page"})


def test_a_broken_page_would_be_noticed():
    broken = program("README.md").replace("NeuralMemory(dim=256", "NeuralMemory(dimension=256")
    with pytest.raises(TypeError):
        exec(compile(broken, "README.md", "exec"), {"__name__": "page"})
