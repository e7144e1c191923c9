"""README.md, docs/ and the other documents: generated parts, links, and what they say is where."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from localdisk.status import problems
from tests import troubleshooting
from tests.readme import DOCS, DOCUMENTS, PAGES, README, ROOT, filled, generated, parts

NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
PACKAGE = ROOT / "localdisk"
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix(""))
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
}
FOLDERS = ("localdisk", "tests", "docs", "examples", "schema", "pins")


def prose(path: Path) -> str:
    """A document without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.S | re.M)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(
            " ", "-"
        )
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def links(path: Path) -> list[str]:
    """Where a document's links and pictures lead, but for other sites."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def leads_somewhere(path: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    there = (path.parent / name).resolve() if name else path
    return there.exists() and (not anchor or anchor in anchors(there))


def table(path: Path, head: str) -> list[str]:
    """The first column of a table that begins with the line `head`, without its marks of code."""
    rows = path.read_text().partition(f"\n{head}\n")[2].splitlines()[1:]
    end = next(number for number, row in enumerate(rows) if not row.startswith("|"))
    return [row.split("|")[1].strip().strip("`") for row in rows[:end]]


# -- generated parts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_current(page: Path) -> None:
    """`python -m tests.readme` writes them again."""
    text = page.read_text()
    assert text == filled(text)


def test_every_generated_part_is_in_one_document() -> None:
    assert sorted(name for page in PAGES for name in parts(page.read_text())) == sorted(generated())


def test_every_error_is_explained() -> None:
    """tests/troubleshooting.py has the explanations, written by hand."""
    assert list(troubleshooting.BEHIND) == list(troubleshooting.classes())


def test_messages_are_shown_as_they_are_printed() -> None:
    shown = troubleshooting.reference()
    assert "| `no_thin_pool` | `no thin pool <vg>/<pool>` : `create it (lvcreate" in shown
    assert "`set `cache: {templates: on}`" not in shown  # code in code
    assert "`` set `cache: {templates: on}` in /etc/localdisk.yaml ``" in shown
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in shown.splitlines()}
    assert cells == {4}


# -- what is written by hand


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    assert [target for target in links(path) if not leads_somewhere(path, target)] == []


def test_links_are_found() -> None:
    """The test above would see if there were none."""
    assert len(links(README)) > 20
    assert "docs/operations.md#troubleshooting-by-message" in links(README)
    assert not leads_somewhere(README, "docs/operations.md#nowhere")
    assert not leads_somewhere(README, "docs/nothing.md")


def test_every_page_is_linked_from_readme() -> None:
    led = {(ROOT / target.partition("#")[0]).resolve() for target in links(README)}
    assert [page.name for page in DOCS.glob("*.md") if page not in led] == []


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]*)`", prose(ROOT / name))
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


def test_every_module_is_in_architecture() -> None:
    text = (DOCS / "architecture.md").read_text().partition("\n## Modules\n")[2].partition("\n## ")[0]
    rooms = re.split(r"^(?:The ground, )?`localdisk/(\w*)/?`, ", text, flags=re.M)[1:]
    named = {
        f"{room}/{module}".lstrip("/")
        for room, part in zip(rooms[::2], rooms[1::2])
        for module in re.findall(r"^\| `(\w+)` \|", part, re.M)
    }
    assert named == set(MODULES)


def test_what_is_to_be_found_is_there() -> None:
    """The functions and classes that architecture.md names with their file."""
    text = (DOCS / "architecture.md").read_text()
    named = re.findall(r"`(\w+)`(?: and `(\w+)`)? in `(localdisk/[\w/]+\.py)`", text)
    assert len(named) > 10
    wrong = []
    for first, second, path in named:
        source = (ROOT / path).read_text()
        for name in filter(None, (first, second)):
            if not re.search(rf"^(def {name}\(|class {name}\b|{name}\b.* = )", source, re.M):
                wrong.append(f"{name} in {path}")
    assert wrong == []


def test_every_kind_of_problem_is_explained() -> None:
    assert tuple(table(DOCS / "operations.md", "| kind | problem |")) == problems.KINDS
