"""The documentation's Python runs as it stands, its links lead somewhere, its files exist."""

import re

import pytest
from paths import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *PAGES]


def anchors(text):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_python_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(block, names)


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_local_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for link in links:
        if "://" not in link:
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in anchors(target.read_text()), link


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:galore_optax|models|train|tests|docs)/[\w/.-]+)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "page", [*TEXTS, *sorted((ROOT / "examples").glob("*.py"))], ids=lambda page: page.stem
)
def test_code_that_users_copy_imports_public_names_only(page):
    private = re.findall(r"^ *(?:from|import) galore_optax\.\S+", page.read_text(), re.MULTILINE)
    assert private == []
