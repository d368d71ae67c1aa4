"""The written order of what to do next, from made-up results."""

import json

import pytest

from fastattn.benchmarks import next as order
from fastattn.benchmarks.suite import OPS


def figure(ms, percent=None, spread=0.001, ceiling="matmul"):
    shares = {} if percent is None else {f"percent_of_{ceiling}": percent}
    return {"ms": ms, "spread_ms": spread, "rounds": 9, **shares}


def row(name, modes, **others):
    return {"id": name, "verified": True, "checks": {}, "left_out": {}, "modes": modes} | others


def result(op, rows, provenance=None, absent=None):
    return {"format": 2, "provenance": provenance or {}, "ops": {op: {"rows": rows, "absent": absent or {}}}}


ATTENTION = result(
    "attention",
    provenance={"device": {"name": "NVIDIA H200"}, "date": "2026-11-29T10:00:00+00:00", "commit": "c303729abcdef"},
    absent= {"flash-attn": "ModuleNotFoundError: No module named 'flash_attn'"},
    rows=[
        row("S1024", {"fwd": {"fastattn": figure(2.0, 60), "SDPA flash": figure(1.0), "naive": figure(9.0)}}),
        row("S4096", {
            "fwd": {"fastattn": figure(1.5, 50), "fastattn (cuda)": figure(0.1), "SDPA flash": figure(1.0)},
            "bwd": {"fastattn": figure(1.0, 30), "SDPA flash": figure(2.0)},
        }),
        row("S8192", {}, verified=False, checks={"out": {"passed": True}, "dq": {"passed": False}}),
        row("S16384", {}, verified=False, error="OutOfMemoryError: no room"),
    ],
)  # fmt: skip
SOFTMAX = result(
    "softmax",
    [
        row("N1024", {"fwd": {"fastattn": figure(1.0, 90, ceiling="copy"), "torch": figure(1.2)}}),
        # 1 % behind, with measurements that are 2 % wide: not behind
        row("N4096", {"fwd": {"fastattn": figure(1.01, 40, spread=0.02, ceiling="copy"), "torch": figure(1.0)}}),
    ],
)


def test_the_furthest_behind_come_first():
    behind, roomy = order.order(order.read([SOFTMAX, ATTENTION]))
    assert [(cell.op, cell.which, cell.row, cell.peer, cell.behind) for cell in behind] == [("attention", "fwd", "S1024", "SDPA flash", 2.0)]
    assert [(cell.op, cell.which, cell.row, cell.room) for cell in roomy] == [("attention", "bwd", "S4096", 100 / 30), ("softmax", "fwd", "N4096", 2.5)]


def test_what_is_wrong_has_no_figure_and_is_named():
    found = order.read([ATTENTION])
    assert found.wrong == [("attention", "S8192", "outside the error budget: dq"), ("attention", "S16384", "OutOfMemoryError: no room")]
    assert {cell.row for cell in found.cells} == {"S1024", "S4096"}
    ours_raised = result("moe", [row("T8", {"fwd": {"torch": figure(1.0)}}, left_out={"fastattn": "RuntimeError: spills"})])
    assert order.read([ours_raised]).failed == [("moe", "T8", "RuntimeError: spills")]


def test_one_file_of_all_ops_reads_the_same():
    """And a share of the roofline goes before that of a ceiling."""
    one = ATTENTION | {"ops": ATTENTION["ops"] | SOFTMAX["ops"]}
    assert order.order(order.read([one])) == order.order(order.read([ATTENTION, SOFTMAX]))
    both = result("glu", [row("N8", {"fwd": {"fastattn": figure(1.0, 20) | {"percent_of_roofline": 50.0}}})])
    (cell,) = order.read([both]).cells
    assert (cell.percent, cell.ceiling, cell.peer, cell.is_behind) == (50.0, "roofline", None, False)


def test_markdown():
    text = order.as_markdown(order.read([ATTENTION, SOFTMAX]), ("attention", "softmax", "rotary"))
    assert "- attention: NVIDIA H200, 2026-11-29, commit c303729ab" in text
    assert "- `attention` S8192: outside the error budget: dq" in text
    first = text.index("| 1 | attention, fwd | S1024 | 2.000 | 2.00× of SDPA flash | 60 % of matmul | `fastattn tune attention --shape '^S1024$' --mode fwd` |")
    assert first < text.index("## 3.") < text.index("| 1 | attention, bwd | S4096 | 1.000 | nothing is faster | 30 % of matmul |")
    assert text.endswith("## 4. Not measured\n\n- `rotary`: `fastattn bench rotary`\n- beside flash-attn: ModuleNotFoundError: No module named 'flash_attn'\n")
    nothing = order.as_markdown(order.read([]))
    assert nothing.count("Nothing.") == 4


def test_what_cannot_be_tuned_is_not_said_to_be():
    assert set(order.TUNABLE) <= set(OPS)
    text = order.as_markdown(order.read([result("merge_attention", [row("x", {"fwd": {"fastattn": figure(2.0, 10), "torch": figure(1.0)}})])]))
    assert "`fastattn cards --op merge_attention`, then a profile" in text and "fastattn tune" not in text


def test_the_command(tmp_path, capsys):
    (tmp_path / "attention.json").write_text(json.dumps(ATTENTION))
    (tmp_path / "cards.json").write_text("[]")
    assert order.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("# What to measure and tune next") and "- `softmax`: `fastattn bench softmax`" in said
    assert order.main([str(tmp_path / "attention.json"), "--out", str(tmp_path / "next.md")]) == 0
    assert (tmp_path / "next.md").read_text() == said


@pytest.mark.parametrize("text, message", [("[]", "neither ops nor op and rows"), ("{", "must be a benchmark's result")])
def test_what_is_no_result_is_refused(text, message, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        order.main([str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match="there is none|must be a benchmark's result"):
        order.main([str(tmp_path)])
