"""The benchmark: what it writes, and that it says nothing about a wrong answer."""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.benchmarks import bench_attention, provenance, report, suite, timing, verification
from fastattn.cli import main
from fastattn.testing.budget import check_budget

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One real run at tiny shapes."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["bench", "--device", "cpu", "--shapes", "tiny", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def rows_only(monkeypatch):
    """Leave out what is not under test: the ceilings and the overhead take longer than a tiny row."""
    ceilings = {"matmul_tflops": 0.1, "matmul_size": 2048, "copy_gbps": 10.0, "copy_bytes": 1 << 27}
    monkeypatch.setattr(suite, "measure_ceilings", lambda clock, dtype: ceilings)
    monkeypatch.setattr(suite, "host_microseconds", lambda call, device: 1.0)


def load(folder):
    return json.loads((folder / "attention.json").read_text())


def run(folder, *arguments):
    """One row, forward only: the shortest run there is."""
    options = ["--device", "cpu", "--shapes", "tiny", "--only", "S32.*causal", "--passes", "fwd", "--out", str(folder)]
    return main(["bench", *options, *arguments])


def test_every_row_is_checked_and_timed(folder):
    result = load(folder)
    assert [row["id"] for row in result["rows"]] == [
        "B2-S32-H2-D16-fp32-causal", "B1-S64-H2-D16-fp32-causal", "B2-S32-H2-D16-fp32-full", "B1-S64-H2-D16-fp32-full",
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["verified"]
        assert set(row["checks"]) == {"out", "dq", "dk", "dv"}
        assert not row["left_out"]
        assert list(row["passes"]) == ["fwd", "bwd", "fwd+bwd"]
        for which, figures in row["passes"].items():
            assert list(figures) == ["fastattn", "naive", "SDPA"]
            for figure in figures.values():
                assert figure["ms"] > 0
                assert figure["rounds"] >= timing.MIN_ROUNDS
                assert figure["ratio"] == pytest.approx(figure["ms"] / figures["fastattn"]["ms"])
                share = figure["tflops"] / result["ceilings"]["matmul_tflops"]
                assert figure["percent_of_matmul"] == pytest.approx(100 * share)
            shape = next(s for s in bench_attention.PRESETS["cpu", "tiny"] if s.id("fp32") == row["id"])
            seconds = figures["naive"]["ms"] / 1e3
            assert figures["naive"]["tflops"] == pytest.approx(bench_attention.flops(shape, which) / seconds / 1e12)


@pytest.mark.parametrize("op", suite.OPS[1:])
def test_every_op_has_one(op, rows_only, tmp_path):
    assert main(["bench", op, "--device", "cpu", "--shapes", "tiny", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / f"{op}.json").read_text())
    assert result["op"] == op and result["rows"] and result["overhead_us"]
    ceiling = suite.suite_of(op).ceiling
    for row in result["rows"]:
        assert row["verified"] and set(row["left_out"]) <= {"torch linear_cross_entropy", "one by one"}, row["left_out"]
        assert list(row["passes"]) == list(suite.suite_of(op).passes)
        for figures in row["passes"].values():
            assert {"fastattn", "naive", "torch"} <= set(figures)
            assert all(figure[ceiling.rate] > 0 and figure["peak_bytes"] is None for figure in figures.values())


def test_rows_count_the_bytes_they_have_to_move():
    from fastattn.benchmarks.rows import RowShape

    shape = RowShape("softmax", 1000, 512)
    work = suite.suite_of("softmax").work
    assert [work(shape, which, 2) for which in suite.PASSES] == [n * 1000 * 512 * 2 for n in (2, 3, 5)]


def test_mixtures_count_flops_and_decoding_the_weights_it_reads():
    from fastattn.benchmarks.bench_moe import Shape, choose

    shape = Shape(num_tokens=3, hidden_size=32, intermediate_size=16, num_experts=64, top_k=2)
    product = 2 * 3 * 2 * 32 * 16
    assert [suite.suite_of("moe").work(shape, which, 2) for which in suite.PASSES] == [n * product for n in (3, 6, 9)]
    distinct = len({*choose(shape).flatten().tolist()})
    assert 2 <= distinct <= 6
    assert suite.suite_of("moe_decode").work(shape, "fwd", 2) == 2 * (3 * 32 * 16 * distinct + 2 * 3 * 32)
    for function, cols in (("up", 2), ("down", 1)):
        rows = dataclasses.replace(suite.suite_of("grouped_mm").presets["cpu", "tiny"][0], function=function)
        product = 2 * rows.num_tokens * rows.top_k * cols * rows.hidden_size * rows.intermediate_size
        assert [suite.suite_of("grouped_mm").work(rows, which, 2) for which in suite.PASSES] == [n * product for n in (1, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mixture_an_expert_at_a_time_is_the_reference(dtype):
    from fastattn.benchmarks import bench_moe

    shape = bench_moe.Shape(20, 16, 8, 6, 2)
    inputs, upstream = bench_moe.draw(shape, torch.float32, CPU)
    results = bench_moe.reference(shape, inputs, upstream, dtype)
    inputs = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = reference.moe(*inputs)
    whole = [out, *torch.autograd.grad(out, [t for t in inputs if t.requires_grad], upstream[0].to(dtype))]
    for result, expected in zip(results.values(), whole, strict=True):
        torch.testing.assert_close(result, expected, check_dtype=False)


def test_which_ops_to_run(tmp_path):
    with pytest.raises(SystemExit, match="OP must be all or some of attention, softmax, .*, got 'sort'"):
        main(["bench", "softmax", "sort", "--out", str(tmp_path)])


def test_the_file_says_where_its_figures_come_from(folder):
    result = load(folder)
    where = result["provenance"]
    for key in ("date", "command", "commit", "python", "torch", "threads", "float32_matmul_precision", "fastattn"):
        assert key in where
    assert where["torch"] == torch.__version__
    assert where["device"]["type"] == "cpu"
    assert result["ceilings"]["copy_gbps"] > 0
    assert all(microseconds > 0 for microseconds in result["overhead_us"].values())
    assert {"fastattn.attention", "torch SDPA"} < set(result["overhead_us"])


def test_the_plot_is_a_png(folder):
    if missing := report.missing("matplotlib", "numpy"):
        pytest.skip(f"needs {' and '.join(missing)}")
    data = (folder / "attention.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert width > 800
    assert height > 600


def test_flops_of_a_known_shape():
    shape = bench_attention.Shape(2, 1024, 8, 2, 64, causal=False)
    assert bench_attention.flops(shape, "fwd") == 4 * 2 * 8 * 1024 * 1024 * 64
    causal = bench_attention.Shape(2, 1024, 8, 2, 64, causal=True)
    assert bench_attention.flops(causal, "bwd") == 2.5 * bench_attention.flops(shape, "fwd") / 2
    assert bench_attention.flops(causal, "fwd+bwd") == 3.5 * bench_attention.flops(shape, "fwd") / 2


def test_row_ids_are_unique():
    for shapes in bench_attention.PRESETS.values():
        ids = [shape.id("bf16") for shape in shapes]
        assert len(set(ids)) == len(ids)


def test_a_wrong_answer_gets_no_number(rows_only, tmp_path, capsys, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert run(tmp_path) == 1
    (row,) = load(tmp_path)["rows"]
    assert not row["verified"]
    assert row["passes"] == {}
    assert row["checks"]["out"]["error"] > row["checks"]["out"]["budget"]
    lines = [line for line in capsys.readouterr().out.splitlines() if row["id"] in line]
    assert any("WRONG" in line for line in lines)
    table_line = next(line for line in lines if "so without numbers" not in line)
    assert not re.search(r"\d", table_line.replace(row["id"], "")), table_line


def test_a_wrong_gradient_gets_no_number_either(rows_only, tmp_path, monkeypatch):
    def without_dk(q, k, v, **kwargs):
        return right(q, k.detach() + 0 * k, v, **kwargs)

    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", without_dk)
    assert run(tmp_path) == 1
    (row,) = load(tmp_path)["rows"]
    assert [name for name, c in row["checks"].items() if not c["passed"]] == ["dk"]
    assert row["passes"] == {}


def test_an_exception_of_ours_is_a_red_row(rows_only, tmp_path, capsys, monkeypatch):
    def broken(shape):
        def forward(q, k, v):
            raise RuntimeError("no such tile")

        return forward

    monkeypatch.setitem(bench_attention.ON_CPU, "fastattn", broken)
    assert run(tmp_path) == 1
    assert load(tmp_path)["rows"][0]["error"] == "RuntimeError: no such tile"
    assert "no such tile" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_loses_its_numbers(rows_only, tmp_path, capsys, monkeypatch):
    other = bench_attention.sdpa_builder(None)
    monkeypatch.setitem(
        bench_attention.ON_CPU, "SDPA", lambda shape: other(dataclasses.replace(shape, causal=not shape.causal))
    )
    assert run(tmp_path) == 0
    (row,) = load(tmp_path)["rows"]
    assert list(row["passes"]["fwd"]) == ["fastattn", "naive"]
    assert "relative error" in row["left_out"]["SDPA"]
    assert "left out: SDPA in 1 rows" in capsys.readouterr().out


def test_naive_is_refused_where_its_matrices_do_not_fit():
    shape = bench_attention.Shape(1, 1 << 20, 8, 8, 64, causal=True)
    with pytest.raises(MemoryError, match=r"S × S matrices need about \d+"):
        bench_attention.refuse_beyond_memory(shape, torch.float32, CPU)


def test_comparison_with_an_older_file(rows_only, folder, tmp_path, capsys):
    old = load(folder)
    old["provenance"]["commit"] = "0123456789abcdef"
    old["provenance"]["device"]["name"] = "some other machine"
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert run(tmp_path, "--base", str(path)) == 0
    printed = capsys.readouterr().out
    assert "base 012345678" in printed
    assert "another device: some other machine" in printed
    with pytest.raises(SystemExit, match="--base is of attention: name that op, and no other"):
        main(["bench", "softmax", "--base", str(path), "--out", str(tmp_path)])
    path.write_text('{"op": "sort"}')
    with pytest.raises(SystemExit):
        run(tmp_path, "--base", str(path))
    assert "--base: must be an OP.json" in capsys.readouterr().err


def test_only_must_match_a_row(tmp_path):
    with pytest.raises(SystemExit, match="B2-S32-H2-D16-fp32-causal"):
        main(["bench", "--device", "cpu", "--shapes", "tiny", "--only", "S33", "--out", str(tmp_path)])


def test_runs_with_torch_alone(tmp_path):
    """No rich, matplotlib, numpy, triton or transformers: plain tables, no plot, and a word about it."""
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'numpy', 'triton', 'transformers'): sys.modules[name] = None\n"
        "from fastattn.cli import main\n"
        f"sys.exit(main(['bench', '--device', 'cpu', '--shapes', 'tiny', '--only', 'S32.*causal', '--out', {str(tmp_path)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no plot: matplotlib and numpy not installed" in done.stdout
    assert re.search(r"^B2-S32-H2-D16-fp32-causal +\d+\.\d{3} ", done.stdout, re.MULTILINE)
    assert "[5/5]" not in done.stdout  # progress is not part of the result
    assert load(tmp_path)["rows"][0]["verified"]
    assert not (tmp_path / "attention.png").exists()


@pytest.mark.gpu
def test_on_a_gpu_against_what_torch_has(tmp_path):
    options = ["--device", "cuda", "--shapes", "tiny", "--peers", "naive|SDPA", "--out", str(tmp_path)]
    assert main(["bench", *options]) == 0
    result = load(tmp_path)
    assert result["provenance"]["device"]["capability"]
    for row in result["rows"]:
        assert {"fastattn", "naive", "SDPA flash"} <= set(row["passes"]["fwd"]), row["left_out"]


# --------------------------------------------------------------------------------------------------------------------
# The parts.


def test_the_reference_in_blocks_is_the_reference(monkeypatch):
    monkeypatch.setattr(verification, "BLOCK_SCORES", 1)  # blocks of 64 rows
    for causal in (True, False):
        q, k, v = (torch.randn(2, 150, heads, 8, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
        dout = torch.randn(2, 150, 4, 8, dtype=torch.float64)
        out = reference.attention(q, k, v, causal=causal)
        whole = [out, *torch.autograd.grad(out, (q, k, v), dout)]
        for block, expected in zip(verification.reference_results(q, k, v, dout, causal, torch.float64), whole):
            torch.testing.assert_close(block, expected)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t,
        lambda t: t + 1e-3,
        lambda t: t.masked_fill(t > 1, math.nan),
        lambda t: t.masked_fill(t > 1, math.inf),
        lambda t: t.masked_fill(t == -math.inf, 0.0),
        lambda t: t.masked_fill(t == -math.inf, math.nan),
    ],
    ids=["right", "off", "nan", "inf", "lost_inf", "nan_for_inf"],
)
def test_figures_and_assertion_of_the_budget_agree(spoil):
    ref64 = torch.randn(500, dtype=torch.float64)
    ref64[3] = -math.inf
    naive = ref64.to(torch.bfloat16)
    out = spoil(ref64).float()
    try:
        check_budget("test", out, naive, ref64)
        allowed = True
    except AssertionError:
        allowed = False
    assert verification.check(out, naive, ref64).passed == allowed


def test_the_clock_goes_round_and_drops_what_raises():
    calls, prepared = [], []

    def broken(_):
        raise torch.OutOfMemoryError("too large\nby far")

    works = {
        "a": timing.Work(lambda _: calls.append("a")),
        "b": timing.Work(lambda argument: calls.append(argument), prepare=lambda: prepared.append(1) or "b"),
        "c": timing.Work(broken),
    }
    times, failures = timing.Clock(CPU, seconds=0.0).measure(works)
    assert failures == {"c": "OutOfMemoryError: too large"}
    assert {name: time.rounds for name, time in times.items()} == {"a": timing.MIN_ROUNDS, "b": timing.MIN_ROUNDS}
    assert "".join(calls[-2 * timing.MIN_ROUNDS :]) == "ab" * timing.MIN_ROUNDS
    assert len(prepared) == calls.count("b")


def test_the_backward_is_timed_without_its_forward():
    inputs = [torch.randn(1, 8, 1, 4).requires_grad_() for _ in range(3)]
    forwards = []

    def forward(q, k, v):
        forwards.append(torch.is_grad_enabled())
        return q + k + v

    works = suite.works(forward, inputs, [torch.ones(1, 8, 1, 4)])
    graph = works["bwd"].prepare()
    assert forwards == [True]
    assert len(works["bwd"].run(graph)) == 3
    assert forwards == [True]
    works["fwd"].run(None)
    assert forwards == [True, False]


def test_commit_comes_from_the_environment_outside_a_checkout(monkeypatch):
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    monkeypatch.setenv("COMMIT", "abc123")
    assert provenance.commit() == "abc123"
    monkeypatch.delenv("COMMIT")
    assert provenance.commit() is None


def test_absent_peers_are_named_with_the_reason():
    present, absent = bench_attention.peers(torch.device("cuda"))
    assert list(present)[:2] == ["fastattn", "naive"]
    assert {"SDPA flash", "SDPA cuDNN", "SDPA efficient", "SDPA math", "FlexAttention"} <= set(present)
    for name, package in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        if importlib.util.find_spec(package) is None:
            assert "No module named" in absent[name]


def test_plain_tables_line_up():
    table = report.plain_table(("name", "ms"), [("a", "1.5"), ("!long name", "!10.25")])
    assert table.splitlines() == ["name          ms", "----------------", "a            1.5", "long name  10.25"]
