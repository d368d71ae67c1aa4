"""The result's file, its statistics, resuming, regressions, and README's tables."""

from __future__ import annotations

import copy
import json
import math
import random
import statistics

import pytest

from fastattn.benchmarks import command, compare, readme, report, results, suite, timing
from fastattn.benchmarks.provenance import checkout
from fastattn.cli import main

CEILINGS = {"matmul_tflops": 0.1, "matmul_size": 2048, "copy_gbps": 10.0, "copy_bytes": 1 << 27}


def figure(ms, spread=0.0, rounds=50, **more):
    return {"ms": ms, "spread_ms": spread, "rounds": rounds, "peak_bytes": None, "ratio": 1.0, "resolution": 0.0, **more}


def result_of(*rows, commit="abc", ceilings=CEILINGS):
    """A result whose rows are (id, figures of the forward by name)."""
    where = {"commit": commit, "date": "2026-01-01T00:00:00+00:00", "torch": "2", "threads": 2, "device": {"type": "cpu", "name": "box"}}
    made = [
        {"id": id, "dtype": "fp32", "function": "softmax", "num_rows": 8, "num_cols": 512, "verified": True, "checks": {}, "left_out": {},
         "work": {"fwd": {"flops": 1e9, "bytes": 1e7}}, "modes": {"fwd": copy.deepcopy(figures)}}
        for id, figures in rows
    ]  # fmt: skip
    entry = {"absent": {}, "overhead_us": {}, "rows": made}
    return {
        "format": 2, "provenance": where, "state": {}, "ceilings": {"fp32": dict(ceilings)}, "finished": True, "ops": {"softmax": entry},
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Statistics.


def test_the_standard_error_of_a_median_is_what_repeated_medians_scatter_by():
    draw = random.Random(0)

    def once():
        values = [draw.gauss(10.0, 1.0) for _ in range(50)]
        lower, median, upper = statistics.quantiles(values, n=4)
        return median, timing.standard_error(figure(median, upper - lower))

    found = [once() for _ in range(2000)]
    scatter = statistics.stdev(median for median, _ in found) / 10.0
    assert statistics.fmean(error for _, error in found) == pytest.approx(scatter, rel=0.05)


def test_the_resolution_is_the_larger_of_noise_and_what_a_repetition_differed_by():
    noisy, still = figure(1.0, spread=0.2), figure(2.0)
    expected = 2 * timing.standard_error(noisy)
    assert timing.resolution(noisy, still) == pytest.approx(expected)
    assert timing.resolution(noisy, noisy) == pytest.approx(expected * math.sqrt(2))
    assert timing.resolution(noisy, still, repeated=0.5) == 0.5


def test_ratios_within_the_resolution_are_level():
    assert report.ratio_text(figure(1.0, ratio=1.04) | {"resolution": 0.05}) == "≈"
    assert report.ratio_text(figure(1.0, ratio=0.96) | {"resolution": 0.05}) == "≈"
    assert report.ratio_text(figure(1.0, ratio=1.06) | {"resolution": 0.05}) == "1.06×"


def test_the_roofline_is_the_longer_of_arithmetic_and_traffic():
    ceilings = {"matmul_tflops": 2.0, "copy_gbps": 100.0}
    assert results.bound_ms({"flops": 4e9, "bytes": 1}, ceilings) == pytest.approx(2.0)
    assert results.bound_ms({"flops": 4e9, "bytes": 1e9}, ceilings) == pytest.approx(10.0)
    result = result_of(("a", {"fastattn": figure(4.0, tflops=0.25)}), ceilings=CEILINGS | {"matmul_tflops": 1.0, "copy_gbps": 10.0})
    results.annotate(result)
    (_, _, figures) = next(results.each_mode(result))
    assert figures["fastattn"]["percent_of_ceiling"] == pytest.approx(25)
    assert figures["fastattn"]["percent_of_roofline"] == pytest.approx(25)


def test_ours_timed_twice_gives_the_resolution(monkeypatch):
    times = {"fastattn": 1.0, suite.AGAIN: 1.1, "naive": 2.0}

    def measure(self, works):
        assert list(works)[0] == "fastattn" and list(works)[-1] == suite.AGAIN
        return {name: timing.Measurement(times[name], 0.0, 50) for name in works}, {}

    monkeypatch.setattr(timing.Clock, "measure", measure)
    work = timing.Work(lambda _: None)
    clock = timing.Clock(command.device("cpu"), 0.0)
    figures, failures = suite._measure({"fastattn": work, "naive": work}, suite.MATMUL, {"flops": 1e9, "bytes": 1}, clock)
    assert not failures and list(figures) == ["fastattn", "naive"]
    assert figures["fastattn"]["resolution"] == figures["naive"]["resolution"] == pytest.approx(0.1)
    assert figures["naive"]["ratio"] == 2.0 and figures["naive"]["tflops"] == pytest.approx(0.5)


def test_what_cannot_be_captured_loses_its_graph_alone():
    class FakeClock:
        device = command.device("cpu")

        def replay(self, work):
            if work.run(None) == "synchronises":
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            return work

        def measure(self, works):
            return {name: timing.Measurement(0.5, 0.0, 50) for name in works}, {}

    candidates = {name: {"fwd": timing.Work(lambda _, name=name: name)} for name in ("fastattn", "synchronises")}
    modes = {"fwd": {name: figure(1.0) for name in candidates}}
    reasons = suite._measure_replays(candidates, modes, FakeClock())
    assert reasons == {"synchronises": "RuntimeError: operation not permitted when stream is capturing"}
    assert [modes["fwd"][name]["graph_ms"] for name in candidates] == [0.5, None]


# --------------------------------------------------------------------------------------------------------------------
# One file, gone on with.


@pytest.fixture
def measured(monkeypatch):
    """The rows that were measured; each costs nothing."""
    ids: list[str] = []

    def run_shape(of, shape, dtype, builders, clock, modes):
        ids.append(f"{of.op} {shape.id(dtype)}")
        if stop_at and len(ids) == stop_at[0]:
            raise KeyboardInterrupt
        figures = {name: figure(1.0, **{of.ceiling.rate: 1.0}) for name in builders}
        work = {mode: {"flops": 1.0, "bytes": 1.0} for mode in modes}
        row = {"id": shape.id(dtype), "function": "softmax", "num_cols": 1, "num_rows": 1, "dtype": dtype, "work": work, "left_out": {}, "checks": {}}
        return {**row, "verified": True, "modes": {mode: copy.deepcopy(figures) for mode in modes}}

    stop_at: list[int] = []
    monkeypatch.setattr(command, "run_shape", run_shape)
    monkeypatch.setattr(command, "Clock", lambda device, seconds: timing.Clock(device, 0.0))
    monkeypatch.setattr(command, "measure_ceilings", lambda clock, dtype: dict(CEILINGS))
    monkeypatch.setattr(command, "host_microseconds", lambda call, device: 1.0)
    return ids, stop_at


def bench(path, *arguments):
    return main(["bench", *arguments, "--device", "cpu", "--suite", "tiny", "--json", str(path)])


def test_ctrl_c_keeps_what_was_measured_and_the_next_run_goes_on(measured, tmp_path, capsys):
    (ids, stop_at), path = measured, tmp_path / "bench.json"
    stop_at.append(3)
    assert bench(path, "softmax", "rotary") == command.INTERRUPTED
    assert "interrupted: the same command goes on from here" in capsys.readouterr().out
    kept = results.load(path)
    assert not kept["finished"] and [row["id"] for _, row in results.each_row(kept)] == [id.split()[1] for id in ids[:2]]
    assert "Interrupted" in path.with_suffix(".html").read_text()

    stopped = ids.copy()
    stop_at.clear(), ids.clear()
    assert bench(path, "softmax", "rotary") == 0
    assert "2 rows are in" in capsys.readouterr().out
    assert ids[0] == stopped[2] and not set(ids) & set(stopped[:2])
    assert results.load(path)["finished"]

    ids.clear()
    assert bench(path, "softmax", "rotary") == 0
    assert not ids


def test_rows_are_measured_again_for_what_they_lack(measured, tmp_path):
    (ids, _), path = measured, tmp_path / "bench.json"
    bench(path, "softmax", "--mode", "fwd", "--peers", "naive")
    assert len(ids) == 2
    bench(path, "softmax", "--mode", "fwd", "--peers", "naive")
    assert len(ids) == 2
    bench(path, "softmax", "--mode", "bwd", "--peers", "naive")
    assert len(ids) == 4
    assert [set(row["modes"]) for _, row in results.each_row(results.load(path))] == [{"fwd", "bwd"}] * 2
    bench(path, "softmax", "--mode", "bwd")
    assert len(ids) == 6
    assert all({"torch", "naive"} < set(row["modes"]["bwd"]) for _, row in results.each_row(results.load(path)))


def test_the_quick_suite_leaves_out_what_is_a_sum(measured, tmp_path):
    path = tmp_path / "bench.json"
    arguments = ["bench", "rotary", "--device", "cpu", "--suite", "quick", "--json", str(path)]
    assert main(arguments) == 0
    assert all(set(row["modes"]) == {"fwd", "bwd"} for _, row in results.each_row(results.load(path)))
    assert main([*arguments, "--mode", "fwd+bwd"]) == 0
    assert all(set(row["modes"]) == {"fwd", "bwd", "fwd+bwd"} for _, row in results.each_row(results.load(path)))


@pytest.mark.parametrize("name", ["commit", "changes", "torch", "threads"])
def test_rows_of_another_environment_are_measured_again(name, measured, tmp_path):
    (ids, _), path = measured, tmp_path / "bench.json"
    bench(path, "softmax")
    other = json.loads(path.read_text())
    other["provenance"][name] = "another"
    path.write_text(json.dumps(other))
    bench(path, "softmax")
    assert len(ids) == 4


def test_a_finished_run_without_json_begins_anew(measured, tmp_path, monkeypatch):
    (ids, stop_at), _ = measured, monkeypatch.setattr(command, "_default_folder", lambda: tmp_path)
    arguments = ["bench", "softmax", "--device", "cpu", "--suite", "tiny"]
    stop_at.append(2)
    assert main(arguments) == command.INTERRUPTED
    stop_at.clear()
    assert main(arguments) == 0 and len(ids) == 3
    assert main(arguments) == 0 and len(ids) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "must be JSON"), ('{"op": "sort"}', "must be the result of `fastattn bench`, of format 2"), ("[]", "must be the result")],
)
def test_other_files_are_refused(text, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        results.load(path)
    with pytest.raises(SystemExit):
        main(["bench", "softmax", "--base", str(path)])
    assert message in capsys.readouterr().err


def test_time_left():
    assert report.time_left(0.0, 0, 10) == ""
    assert report.time_left(10.0, 1, 4) == "about 30 s left"
    assert report.time_left(60.0, 2, 7) == "about 2 min 30 s left"


# --------------------------------------------------------------------------------------------------------------------
# Regressions.


def verdicts(base, new):
    return {change.id: change.verdict for change in compare.compare(base, new)}


def test_slower_is_what_noise_does_not_explain():
    base = result_of(*((name, {"fastattn": figure(1.0, spread=0.1)}) for name in ("same", "slower", "faster", "gone")))
    three = 3 * math.sqrt(2) * timing.standard_error(figure(1.0, spread=0.1))
    times = {"same": 1 + 0.9 * three, "slower": 1.2, "faster": 0.8, "new": 5.0}
    new = result_of(*((name, {"fastattn": figure(ms, spread=0.1 * ms)}) for name, ms in times.items()))
    assert verdicts(base, new) == {"same": "≈", "slower": "slower", "faster": "faster"}


def test_a_run_that_differs_from_itself_or_a_machine_from_itself_resolves_less():
    base, new = (result_of(("row", {"fastattn": figure(ms)})) for ms in (1.0, 1.2))
    assert verdicts(base, new) == {"row": "slower"}
    restless = copy.deepcopy(base)
    restless["ops"]["softmax"]["rows"][0]["modes"]["fwd"]["fastattn"]["resolution"] = 0.25
    assert verdicts(restless, new) == {"row": "≈"}
    throttled = copy.deepcopy(new)
    throttled["ceilings"]["fp32"]["copy_gbps"] *= 0.75
    assert verdicts(base, throttled) == {"row": "≈"}


def test_two_files_are_compared_by_name(tmp_path, capsys):
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, ms in zip(paths, (1.0, 2.0)):
        result = result_of(("S1024", {"fastattn": figure(ms)}), commit="0123456789abcdef")
        if ms == 1.0:
            result["provenance"]["device"]["name"] = "some other machine"
        results.save(result, path)
    assert compare.main([*map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "softmax S1024" in printed and "slower" in printed and "2.00×" in printed
    assert "base: commit 012345678" in printed and "another device: some other machine, not box" in printed
    assert compare.main([*map(str, paths), "--fail-if-slower"]) == 1
    assert compare.main([*map(str, reversed(paths)), "--fail-if-slower"]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "none.json"), str(paths[1])])


def test_bench_fails_for_what_got_slower_only_if_asked(measured, tmp_path):
    old, path = tmp_path / "old.json", tmp_path / "bench.json"
    bench(old, "softmax")
    result = results.load(old)
    for _, _, figures in results.each_mode(result):
        figures["fastattn"]["ms"] = 0.5
    results.save(result, old)
    assert bench(path, "softmax", "--base", str(old)) == 0
    assert bench(path, "softmax", "--base", str(old), "--fail-if-slower") == 1
    assert bench(path, "softmax", "--base", str(path), "--fail-if-slower") == 0


# --------------------------------------------------------------------------------------------------------------------
# README.


def test_readme_says_what_the_results_do():
    root = checkout()
    if root is None:
        pytest.skip("there is no README beside an installed package")
    text = (root / "README.md").read_text(encoding="utf-8")
    assert readme.replaced(text, readme.generate(root)) == text, "run `make readme`"


def test_readme_has_a_table_of_attention_and_a_line_of_any_other_op(tmp_path):
    rows = [("S512", {"fastattn": figure(1.0, tflops=1.0), "SDPA": figure(2.0, ratio=2.0)}), ("S1024", {"fastattn": figure(3.21, tflops=1.0)})]
    result = result_of(*rows, ("S2048", {"fastattn": figure(5.0, tflops=1.0), "SDPA": figure(5.1, ratio=1.02) | {"resolution": 0.05}}))
    for row in result["ops"]["softmax"]["rows"]:
        row |= {"num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "causal": True, "seqlen": int(row["id"][1:])}
    result["ops"]["attention"] = copy.deepcopy(result["ops"]["softmax"])
    for of_op in result["ops"].values():
        for row in of_op["rows"]:
            row["modes"]["fwd"]["fastattn"]["gbps"] = 1.0
    folder = tmp_path / "benchmarks" / "results" / "box"
    results.save(result, folder / "bench.json")
    results.save(result, folder.parent / "local" / "bench.json")
    text = readme.generate(tmp_path)
    assert text.count("**box, 2 threads**") == 1
    assert "| `S512` | 1 | 2.00× |\n| `S1024` | 3.21 | – |\n| `S2048` | 5 | ≈ |" in text
    assert "![Speed of attention over its sizes](benchmarks/results/box/attention.png)" in text
    assert "| softmax | forward | 3 | " in text and "SDPA 1.43×" in text
    assert "Not yet run on a GPU: attention, softmax, norm" in text


def test_readme_is_replaced_between_its_markers_only():
    page = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter"
    assert readme.replaced(page, "new") == f"before\n{readme.BEGIN}\n\nnew\n\n{readme.END}\nafter"
    with pytest.raises(ValueError, match="must have the markers"):
        readme.replaced("before", "new")


@pytest.mark.parametrize("options, message", [
    (["--json", "{}/notes.txt"], "--json would overwrite what is no result"),
    (["--json", "{}/a.json", "--html", "{}/a.json"], "--html must be another file than --json"),
    (["--json", "{}"], "--json must be a file to write"),
    (["--json", "{}/a.json", "--html", "/proc/x.html"], "--html must be a file to write"),
])  # fmt: skip
def test_outputs_are_looked_at_before_anything_is_measured(options, message, tmp_path):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(SystemExit, match=message):
        main(["bench", "softmax", "--suite", "tiny", "--device", "cpu", *(option.format(tmp_path) for option in options)])
    assert (tmp_path / "notes.txt").read_text() == "notes" and not (tmp_path / "a.json").exists()
