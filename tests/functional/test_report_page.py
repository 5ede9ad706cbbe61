"""The report in a real headless Chromium, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hyperp.reporting.page import write
from megatron_hyperp.reporting.runs import load_runs
from tests.browser import CHROMIUM, chromium
from tests.written_run import write_run

LATER = "a-run-with-a-name-that-is-much-longer-than-others-and-has-nowhere-to-break"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_page_renders(tmp_path: Path) -> None:
    """No complaint, no request, every picture shown, and no sideways scrolling on a desk or a telephone."""
    folders = [write_run(tmp_path / "hyperp", layers=4, experts=8), write_run(tmp_path / LATER, optimizer="adamw")]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"iteration": 1, "tokens": 10, "loss": null}\n')
    page_file = write(load_runs([*folders, bare]), tmp_path / "report.html")[0]
    with chromium(tmp_path / "profile") as page:
        for width in (1280, 400):
            page.open(page_file, width)
            page.value("document.querySelectorAll('details').forEach(part => part.open = true)")
            assert page.value("document.documentElement.clientWidth") == width
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value("document.images.length") > 20
            assert page.value("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
            # Tables alone are wider than their boxes, and scroll inside them.
            wide = "[...document.querySelectorAll('figure, h2, h3, p, nav, .notes, .scroll')]"
            assert page.value(f"Math.max(...{wide}.map(e => e.getBoundingClientRect().right))") <= width
            assert page.value("document.querySelectorAll('section').length") == 8
            page.screenshot(tmp_path / f"{width}.png")
            assert (tmp_path / f"{width}.png").stat().st_size > 50_000
        assert page.complaints == []
        assert {address.split(":")[0] for address in page.requests} == {"file", "data"}
        assert [address for address in page.requests if address.startswith("file")] == [page_file.as_uri()] * 2
