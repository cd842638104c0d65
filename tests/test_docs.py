"""README.md and docs/ refer only to existing pages, files and modules, in standard terms."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from scripts.loadlib import plan

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "relay" / "protocols").glob("*/README.md")),
]
FOLDERS = "relay|producers|tests|scripts|docs"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")
        for heading in headings
    }


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists(), name


@pages
def test_modules_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:relay|producers)(?:\.[a-z_]\w*)+)`", prose(page)):
        # A file name such as relay.ini is not a module.
        if name.rpartition(".")[2] in {"ini", "service", "conf"}:
            continue
        assert importlib.util.find_spec(name), name


def test_every_page_is_in_the_index() -> None:
    index = prose(ROOT / "docs" / "README.md")
    for page in PAGES[1:]:
        name = page.name if page.parent.name == "docs" else f"{page.parent.name}/README.md"
        assert name == "README.md" or f"{name})" in index or f"{name}#" in index, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pages
def test_the_words_are_those_of_the_field(page: Path) -> None:
    """Documents write "protocol". *Door* is a term of the code."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = re.findall(r"[^\n]*\bdoors?\b[^\n]*", text, re.IGNORECASE)
    assert not found


def test_the_numbers_of_the_scaling_plan_are_computed() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    rows = plan.document_rows()
    expected = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    table = "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in expected)
    assert f"\n\n{table}\n\n" in page, f"put this table into docs/scaling.md:\n{table}"
    # The costs in the text, in the same units.
    costs, limits = plan.Costs(), plan.Limits()
    assert f"relay `{costs.delivery_us:g} f + {costs.read_us:g} w` µs" in page
    assert f"Redis `{costs.redis_append_us:g} + {costs.redis_read_us:g} w` µs" in page
    assert f"{costs.client_kb + costs.kernel_kb:g} KB per client" in page
    assert f"{costs.worker_mb:g} MB per worker" in page
    assert f"clients / {limits.clients_per_worker:,}" in page
    assert f"{limits.busy_share:.0%} minus {costs.redis_idle_share:.2%} per worker" in page.replace(
        " %", "%"
    )


@pytest.mark.parametrize("clients", [1, 10_000, 300_000, 40_000_000])
def test_a_plan_keeps_its_limits(clients: int) -> None:
    traffic, costs, limits = plan.typical(clients), plan.Costs(), plan.Limits()
    found = plan.plan(clients, traffic)
    assert found.workers <= limits.workers_per_site
    assert found.sites * found.workers * limits.clients_per_worker >= clients
    assert found.hosts * limits.workers_per_host >= found.workers >= found.hosts >= 2
    assert found.relay_cores <= found.sites * found.workers * limits.busy_share
    assert found.redis_cores <= found.sites * found.redis_servers * limits.busy_share + 1e-9
    # Twice the deliveries need more processor time, at the stated cost.
    (one,) = [each for each in traffic if each.name == "groups"]
    more = plan.relay_us_per_s([one, one], found.workers, costs)
    assert more == 2 * plan.relay_us_per_s([one], found.workers, costs)


def test_following_workers() -> None:
    assert plan.following(1, 64) == pytest.approx(1)
    assert plan.following(1000, 1) == 1
    assert plan.following(2, 2) == pytest.approx(1.5)
    assert plan.following(10_000, 64) == pytest.approx(64)
