"""The benchmark: what it writes, and that it says nothing about a wrong answer."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.benchmarks import (
    attention_peers,
    bench_attention,
    command,
    provenance,
    report,
    results,
    suite,
    timing,
    verification,
)
from fastattn.cli import main
from fastattn.testing.budget import check_budget

CPU = torch.device("cpu")


CEILINGS = {"matmul_tflops": 0.1, "matmul_size": 2048, "copy_gbps": 10.0, "copy_bytes": 1 << 27}


def impatient(device, seconds):
    """A clock that takes its three rounds and no more."""
    return timing.Clock(device, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One real run at tiny shapes."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Clock", impatient)
        assert main(["bench", "attention", "--device", "cpu", "--suite", "tiny", "--json", str(folder / "bench.json")]) == 0
    return folder


@pytest.fixture
def rows_only(monkeypatch):
    """Leave out what is not under test: the ceilings and the overhead take longer than a tiny row."""
    monkeypatch.setattr(command, "Clock", impatient)
    monkeypatch.setattr(command, "measure_ceilings", lambda clock, dtype: dict(CEILINGS))
    monkeypatch.setattr(command, "host_microseconds", lambda call, device: 1.0)


def load(folder):
    return results.load(folder / "bench.json")


def rows_of(folder, op="attention"):
    return load(folder)["ops"][op]["rows"]


def run(folder, *arguments, shape="S32.*causal"):
    """One row, forward only: the shortest run there is."""
    options = ["--device", "cpu", "--suite", "tiny", "--shape", shape, "--mode", "fwd", "--json", str(folder / "bench.json")]
    return main(["bench", "attention", *options, *arguments])


def test_every_row_is_checked_and_timed(folder):
    result = load(folder)
    rows = rows_of(folder)
    assert [row["id"] for row in rows] == [
        "B2-S32-H2-D16-fp32-causal", "B1-S64-H2-D16-fp32-causal", "B2-S32-H2-D16-fp32-full", "B1-S64-H2-D16-fp32-full",
        "B1-S64-H4-Hkv2-D16-fp32-causal-window7", "B5-T64-H4-Hkv2-D16-fp32-causal-varlen", "B1-S64-H4-Hkv2-D16-fp32-causal-softcap30",
        "B1-S64-H4-Hkv2-D16-fp32-causal-dropout0.1", "B1-S64-H4-Hkv2-D16-fp32-causal-sinks",
    ]  # fmt: skip
    ceilings = result["ceilings"]["fp32"]
    for row in rows:
        assert row["verified"]
        assert set(row["checks"]) == {"out", "dq", "dk", "dv", *(["dsinks"] if row["sinks"] else [])}
        lacking = {"SDPA"} if row["softcap"] or row["sinks"] else set()
        assert set(row["left_out"]) == lacking
        assert list(row["modes"]) == ["fwd", "bwd", "fwd+bwd"]
        shape = next(s for s in bench_attention.PRESETS["cpu", "tiny"] if s.id("fp32") == row["id"])
        for mode, figures in row["modes"].items():
            assert set(figures) == {"fastattn", "naive", "SDPA"} - lacking
            work = row["work"][mode]
            assert work == {"flops": bench_attention.flops(shape, mode), "bytes": bench_attention.traffic(shape, mode, 4)}
            for figure in figures.values():
                assert figure["ms"] > 0
                assert figure["rounds"] >= timing.MIN_ROUNDS
                assert figure["ratio"] == pytest.approx(figure["ms"] / figures["fastattn"]["ms"])
                assert figure["resolution"] >= figures["fastattn"]["resolution"]
                assert figure["tflops"] == pytest.approx(work["flops"] / figure["ms"] / 1e9)
                assert figure["percent_of_ceiling"] == pytest.approx(100 * figure["tflops"] / ceilings["matmul_tflops"])
                bound = max(work["flops"] / ceilings["matmul_tflops"] / 1e9, work["bytes"] / ceilings["copy_gbps"] / 1e6)
                assert figure["percent_of_roofline"] == pytest.approx(100 * bound / figure["ms"])


@pytest.mark.parametrize("op", suite.OPS[1:])
def test_every_op_has_one(op, rows_only, tmp_path):
    assert main(["bench", op, "--device", "cpu", "--suite", "tiny", "--json", str(tmp_path / "bench.json")]) == 0
    entry, found = load(tmp_path)["ops"][op], suite.suite_of(op)
    assert entry["rows"] and entry["overhead_us"]
    for row in entry["rows"]:
        assert row["verified"] and set(row["left_out"]) <= {"torch linear_cross_entropy", "one by one"}, row["left_out"]
        assert list(row["modes"]) == list(found.modes)
        assert all(work["bytes"] > 0 and work["flops"] >= 0 for work in row["work"].values())
        for figures in row["modes"].values():
            assert {"fastattn", "naive", "torch"} <= set(figures)
            assert all(figure[found.ceiling.rate] > 0 and figure["peak_bytes"] is None for figure in figures.values())


@pytest.mark.parametrize("op", suite.OPS)
def test_every_op_has_the_shapes_of_models(op):
    from fastattn.benchmarks.models import MODELS

    found, names = suite.suite_of(op), {model.name for model in MODELS}
    for device in ("cpu", "cuda"):
        shapes = found.presets[device, "model"]
        assert shapes and {shape.model for shape in shapes} <= names
        ids = [shape.id("bf16") for shape in shapes]
        assert len(set(ids)) == len(ids)
        assert all(id.startswith(f"{shape.model}-") for id, shape in zip(ids, shapes))


def test_sizes_of_models_are_those_of_their_configurations():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from fastattn.benchmarks.models import GPT_2, MIXTRAL_8X7B

    config = transformers.GPT2Config()
    found = (config.n_embd, config.n_head, config.n_head, config.n_embd // config.n_head, 4 * config.n_embd, config.vocab_size)
    assert found == (GPT_2.hidden_size, GPT_2.num_heads, GPT_2.num_kv_heads, GPT_2.head_dim, GPT_2.intermediate_size, GPT_2.vocab_size)
    config, ours = transformers.MixtralConfig(), MIXTRAL_8X7B
    for name in ("hidden_size", "intermediate_size", "vocab_size"):
        assert getattr(config, name) == getattr(ours, name)
    assert (config.num_attention_heads, config.num_key_value_heads) == (ours.num_heads, ours.num_kv_heads)
    assert (config.num_local_experts, config.num_experts_per_tok) == (ours.num_experts, ours.top_k)


def test_rows_count_the_bytes_they_have_to_move():
    from fastattn.benchmarks.rows import RowShape

    shape = RowShape("softmax", 1000, 512)
    softmax = suite.suite_of("softmax")
    assert [softmax.traffic(shape, mode, 2) for mode in suite.MODES] == [n * 1000 * 512 * 2 for n in (2, 3, 5)]
    assert [softmax.flops(shape, mode) for mode in suite.MODES] == [n * 1000 * 512 for n in (5, 4, 9)]


def test_mixtures_count_flops_and_decoding_the_weights_it_reads():
    from fastattn.benchmarks.bench_moe import Shape, choose

    shape = Shape(num_tokens=3, hidden_size=32, intermediate_size=16, num_experts=64, top_k=2)
    product = 2 * 3 * 2 * 32 * 16
    assert [suite.suite_of("moe").flops(shape, mode) for mode in suite.MODES] == [n * product for n in (3, 6, 9)]
    distinct = len({*choose(shape).flatten().tolist()})
    assert 2 <= distinct <= 6
    assert suite.suite_of("moe_decode").traffic(shape, "fwd", 2) == 2 * (3 * 32 * 16 * distinct + 2 * 3 * 32)
    for function, cols in (("up", 2), ("down", 1)):
        rows = dataclasses.replace(suite.suite_of("grouped_mm").presets["cpu", "tiny"][0], function=function)
        product = 2 * rows.num_tokens * rows.top_k * cols * rows.hidden_size * rows.intermediate_size
        assert [suite.suite_of("grouped_mm").flops(rows, mode) for mode in suite.MODES] == [n * product for n in (1, 2, 3)]


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
        main(["bench", "softmax", "sort", "--json", str(tmp_path / "bench.json")])
    with pytest.raises(SystemExit, match="--mode bwd must be one that one of the ops has, none of sampling, moe_decode does"):
        main(["bench", "sampling", "moe_decode", "--device", "cpu", "--mode", "bwd"])
    with pytest.raises(SystemExit, match="--fail-if-slower must come with --base"):
        main(["bench", "softmax", "--fail-if-slower"])


def test_the_file_says_where_its_figures_come_from(folder):
    result = load(folder)
    where = result["provenance"]
    for key in ("date", "command", "commit", "python", "torch", "threads", "float32_matmul_precision", "fastattn"):
        assert key in where
    assert where["torch"] == torch.__version__
    assert where["device"]["type"] == "cpu"
    assert result["finished"]
    assert set(result["state"]) == {"before", "after"}
    assert result["ceilings"]["fp32"]["copy_gbps"] > 0
    overhead = result["ops"]["attention"]["overhead_us"]
    assert all(microseconds > 0 for microseconds in overhead.values())
    assert {"fastattn.attention", "torch SDPA"} < set(overhead)


def test_the_plot_is_a_png(folder):
    if missing := report.missing("matplotlib", "numpy"):
        pytest.skip(f"needs {' and '.join(missing)}")
    assert report.plot(suite.suite_of("attention"), load(folder), folder / "attention.png") is None
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


def test_flops_of_a_window_and_of_packed_sequences():
    plain = bench_attention.Shape(1, 1024, 8, 8, 64, True)
    assert bench_attention.flops(dataclasses.replace(plain, window=1023), "fwd") == bench_attention.flops(plain, "fwd")
    windowed = dataclasses.replace(plain, window=127)
    assert bench_attention.flops(windowed, "fwd") == 4 * 8 * 64 * (128 * 1024 - 128**2 / 2)
    packed = dataclasses.replace(plain, batch=2, seqlen=700, lengths=(700, 324))
    assert bench_attention.flops(packed, "fwd") == 4 * 8 * 64 * (700**2 + 324**2) / 2
    assert bench_attention.traffic(packed, "bwd", 2) == bench_attention.traffic(plain, "bwd", 2) == 8 * 8 * 1024 * 64 * 2


@pytest.mark.parametrize("op", suite.OPS)
def test_row_ids_are_unique(op):
    for shapes in suite.suite_of(op).presets.values():
        ids = [shape.id("bf16") for shape in shapes]
        assert len(set(ids)) == len(ids)


def test_a_wrong_answer_gets_no_number(rows_only, tmp_path, capsys, monkeypatch):
    right = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert run(tmp_path) == 1
    (row,) = rows_of(tmp_path)
    assert not row["verified"]
    assert row["modes"] == {}
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
    (row,) = rows_of(tmp_path)
    assert [name for name, c in row["checks"].items() if not c["passed"]] == ["dk"]
    assert row["modes"] == {}


def test_an_exception_of_ours_is_a_red_row(rows_only, tmp_path, capsys, monkeypatch):
    def broken(shape):
        def forward(q, k, v):
            raise RuntimeError("no such tile")

        return forward

    monkeypatch.setitem(bench_attention.ON_CPU, "fastattn", broken)
    assert run(tmp_path) == 1
    assert rows_of(tmp_path)[0]["error"] == "RuntimeError: no such tile"
    assert "no such tile" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_loses_its_numbers(rows_only, tmp_path, capsys, monkeypatch):
    other = attention_peers.sdpa_builder(None)
    monkeypatch.setitem(
        bench_attention.ON_CPU, "SDPA", lambda shape: other(dataclasses.replace(shape, causal=not shape.causal))
    )
    assert run(tmp_path) == 0
    (row,) = rows_of(tmp_path)
    assert list(row["modes"]["fwd"]) == ["fastattn", "naive"]
    assert "relative error" in row["left_out"]["SDPA"]
    assert "left out: SDPA in 1 rows" in capsys.readouterr().out


def test_naive_is_refused_where_its_matrices_do_not_fit():
    shape = bench_attention.Shape(1, 1 << 20, 8, 8, 64, causal=True)
    with pytest.raises(MemoryError, match=r"S × S matrices need about \d+"):
        bench_attention.refuse_beyond_memory(shape, torch.float32, CPU)


def test_a_peer_without_a_backward_keeps_its_forward(rows_only, tmp_path, monkeypatch):
    builder = bench_attention.ON_CPU["naive"]
    monkeypatch.setitem(bench_attention.ON_CPU, "SDPA", lambda shape: torch.no_grad()(builder(shape)))
    path = tmp_path / "bench.json"
    assert main(["bench", "attention", "--device", "cpu", "--suite", "tiny", "--shape", "S32.*causal", "--json", str(path)]) == 0
    (row,) = rows_of(tmp_path)
    assert ["SDPA" in figures for figures in row["modes"].values()] == [True, False, False]
    assert row["left_out"] == {"SDPA": "has no backward"}


def test_shape_must_match_a_row(tmp_path):
    with pytest.raises(SystemExit, match="B2-S32-H2-D16-fp32-causal"):
        run(tmp_path, shape="S33")


def test_runs_with_torch_alone(tmp_path):
    """No rich, matplotlib, numpy, triton or transformers: plain tables, no plot, and a word about it."""
    code = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'numpy', 'triton', 'transformers'): sys.modules[name] = None\n"
        "from fastattn.cli import main\n"
        f"sys.exit(main(['bench', 'attention', '--device', 'cpu', '--suite', 'tiny', '--shape', 'S32.*causal', '--json', {str(tmp_path / 'bench.json')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "<html" in (tmp_path / "bench.html").read_text()
    assert re.search(r"^B2-S32-H2-D16-fp32-causal +\d+\.\d{3} ", done.stdout, re.MULTILINE)
    assert "[5/5]" not in done.stdout  # progress is not part of the result
    assert rows_of(tmp_path)[0]["verified"]


def test_pytest_benchmark_runs_the_same_rows(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    root = provenance.checkout()
    if root is None:
        pytest.skip("there is no benchmarks/ beside an installed package")
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-k", "rotary-rotary", "--device", "cpu", "-p", "no:cacheprovider"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # whose workers measure nothing
    done = subprocess.run([*command, f"--benchmark-json={saved}"], cwd=root, env=alone, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(saved.read_text())["benchmarks"]
    shapes = suite.suite_of("rotary").presets["cpu", "tiny"]
    groups = {f"rotary {shape.id('fp32')} {mode}" for shape in shapes for mode in suite.MODES}
    assert {case["group"] for case in found} == groups and len(found) == 3 * len(groups)
    assert all(case["extra_info"]["bytes"] > 0 and case["stats"]["rounds"] == 5 for case in found)


@pytest.mark.gpu
def test_on_a_gpu_against_what_torch_has(tmp_path):
    options = ["--device", "cuda", "--suite", "tiny", "--peers", "naive|SDPA", "--json", str(tmp_path / "bench.json")]
    assert main(["bench", "attention", *options]) == 0
    result = load(tmp_path)
    assert result["provenance"]["device"]["capability"]
    for row in rows_of(tmp_path):
        assert {"fastattn", "naive"} <= set(row["modes"]["fwd"]), row["left_out"]
        for figures in row["modes"].values():
            assert figures["fastattn"]["graph_ms"] > 0, row["not_captured"]
    assert "SDPA flash" in rows_of(tmp_path)[0]["modes"]["fwd"]


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
