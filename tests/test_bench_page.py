"""The report as a browser shows it: whole, without errors, light and dark, and no wider than a phone."""

from __future__ import annotations

import copy

import pytest

from fastattn.benchmarks import charts, page, results, suite
from fastattn.benchmarks.charts import Point


def synthetic(on_gpu: bool = False):
    """A result of two ops by the shapes of their quick suites, with times that mean nothing: what was measured is no matter here."""
    ceilings = {"matmul_tflops": 0.3, "matmul_size": 2048, "copy_gbps": 20.0, "copy_bytes": 1 << 27}
    device = {"type": "cpu", "name": "a box", "cores": 2}
    where = {"date": "2026-01-01T00:00:00+00:00", "commit": "0" * 40, "changes": None, "torch": "2.13", "triton": "3.9", "threads": 2}
    result = {
        "format": 2, "provenance": where | {"device": device}, "state": {"before": {"load": 0.1}}, "ceilings": {"fp32": ceilings},
        "finished": True, "ops": {},
    }  # fmt: skip
    for op in ("attention", "norm"):
        found, rows = suite.suite_of(op), []
        for number, shape in enumerate(found.presets["cpu", "quick"]):
            row = {**shape.__dict__, "id": shape.id("fp32"), "dtype": "fp32", "verified": True, "checks": {}, "left_out": {}, "work": {}, "modes": {}}
            for mode in ("fwd", "bwd"):
                work = row["work"][mode] = {"flops": found.flops(shape, mode), "bytes": found.traffic(shape, mode, 4)}
                ms = 3 * results.bound_ms(work, ceilings)
                ratios = {"fastattn": 1.0, "naive": 1.0 + number / 4, "SDPA <b>": 0.7, "a level one": 1.01}
                row["modes"][mode] = {
                    name: {
                        "ms": ms * ratio, "spread_ms": ms / 100, "rounds": 50, "ratio": ratio, "resolution": 0.02,
                        found.ceiling.rate: work[found.ceiling.work] / ms / ratio * found.ceiling.scale, "peak_bytes": number << 20 if on_gpu else None,
                    }
                    for name, ratio in ratios.items()
                }  # fmt: skip
            rows.append(row)
        result["ops"][op] = {"absent": {"xformers": "No module named 'xformers'"}, "overhead_us": {"torch.ops.aten.add": 1.0}, "rows": rows}
    results.annotate(result)
    return result


def measured_points(result) -> int:
    """Circles that the page has to have: one in its op's roofline for each figure of ours; one in a panel for each figure in a line."""
    from fastattn.benchmarks.report import panels

    count = 0
    for op, entry in result["ops"].items():
        found = suite.suite_of(op)
        count += sum(mode in row["modes"] for row in entry["rows"] for mode in ("fwd", "bwd"))
        for mode in ("fwd", "bwd"):
            for figure in (found.ceiling.rate, "peak_bytes"):
                for of_panel in panels(found, result, mode, figure).values():
                    if len({x for points in of_panel.values() for x, _ in points}) > 1:
                        count += sum(map(len, of_panel.values()))
    return count


def test_the_page_needs_nothing_else():
    text = page.render(synthetic())
    assert "http" not in text.replace("http-equiv", "") and "src=" not in text and "@import" not in text and "<script" not in text
    assert "SDPA <b>" not in text and "SDPA &lt;b&gt;" in text
    assert text.count("<circle") == measured_points(synthetic())
    assert "not measured in this run" in text.lower()


def test_memory_is_drawn_where_it_was_measured():
    text = page.render(synthetic(on_gpu=True))
    assert "Peak memory of a call" in text and "Not measured in this run" not in text
    assert text.count("<circle") == measured_points(synthetic(on_gpu=True))


def test_the_page_says_what_is_wrong_and_where_a_peer_is_faster():
    result = synthetic()
    row = result["ops"]["norm"]["rows"][0]
    row |= {"verified": False, "modes": {}, "checks": {"out0": {"error": 1.0, "budget": 1e-5, "passed": False}}}
    text = page.render(result)
    assert "1 of 28 shapes wrong" in text and "out0: error 1.0e+00, budget 1.0e-05" in text
    gaps = page._gaps(result)
    assert {gap["peer"] for gap in gaps} == {"SDPA <b>"} and {gap["ratio"] for gap in gaps} == {0.7}


def test_a_heat_map_is_neutral_within_the_resolution_and_full_at_three():
    assert page._heat(1.4, "≈", "", level=True)["strength"] == "0%"
    assert page._heat(3.0, "", "")["strength"] == page._heat(9.0, "", "")["strength"] == page._heat(1 / 3, "", "")["strength"] == "70%"
    assert (page._heat(1.5, "", "")["tone"], page._heat(0.9, "", "")["tone"]) == ("good", "bad")


def test_charts_place_their_points():
    scale = charts.Scale(1.0, 100.0, 0.0, 200.0)
    assert [round(scale(value)) for value in (1, 10, 100)] == [0, 100, 200]
    assert charts.Scale(0.0, 4.0, 100.0, 0.0, log=False)(1.0) == 75.0
    assert charts.decades(0.05, 200) == [0.1, 1, 10, 100] and charts.decades(0.3, 6) == [0.5, 1, 2, 5]
    assert charts.round_steps(87.0) == [0, 50] and charts.round_steps(350) == [0, 100, 200, 300]
    assert [charts.number(v) for v in (0.02, 3.5, 120, 2048, 1 << 21)] == ["0.02", "3.5", "120", "2k", "2M"]
    drawn = charts.lines({"fastattn": [Point(1, 1, "a & b"), Point(2, 4, "c")]}, "x", "y", {"fastattn": 0})
    assert "a &amp; b" in drawn and drawn.count("<circle") == 2


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_a_browser_shows_it(scheme, width, browser, tmp_path):
    result = synthetic(on_gpu=True)
    path = tmp_path / "report.html"
    page.write(result, path)
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    tab, errors = context.new_page(), []
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("requestfailed", lambda request: errors.append(request.url))
    tab.goto(path.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert not errors
    assert tab.locator("svg circle").count() == measured_points(result)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    box = tab.locator("svg").first.bounding_box()
    assert box["width"] > 250 and box["x"] >= 0 and box["x"] + box["width"] <= width
    inside = "[...document.querySelectorAll('svg')].every(s => { const b = s.getBoundingClientRect(); return [...s.querySelectorAll('circle')]"
    inside += ".every(c => { const r = c.getBoundingClientRect(); return r.left >= b.left && r.right <= b.right && r.top >= b.top && r.bottom <= b.bottom }) })"
    assert tab.evaluate(inside)
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(","))) > 380) == (scheme == "light")
    context.close()


def test_a_result_without_ceilings_has_a_page():
    """An interruption may come before the first row."""
    result = synthetic()
    result = copy.deepcopy(result) | {"ceilings": {}, "ops": {}, "finished": False}
    assert "Interrupted" in page.render(result)
