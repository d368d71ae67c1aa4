"""`fastattn tune` and the tiles that it writes, without a GPU: Triton compiles under the stub driver, a made-up clock takes the times."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import fastattn
from fastattn.benchmarks import suite, tune
from fastattn.benchmarks.timing import Work
from fastattn.benchmarks.tune import Case, Row
from fastattn.kernels.grouped_tiles import GROUPED_TILES, GroupedConfig
from fastattn.kernels.paged_tiles import PAGED_TILES, PagedConfig
from fastattn.kernels.row_tiles import LONG, ROW_TILES, RowConfig, pick_row_config
from fastattn.kernels.tiles import TILES, Config, pick_config
from fastattn.ops import dispatch, tuned
from fastattn.testing.stub_driver import stub_driver

CPU = torch.device("cpu")
H200 = tuned.Gpu("NVIDIA H200", (9, 0))
SOFTMAX = Row("rows", ("softmax_fwd", "half", 4096))
WHERE = {
    "device": {"name": "NVIDIA H200", "nvidia_smi": {"clocks.sm": "1980 MHz", "driver_version": "580.1"}}, "torch": "2.13", "triton": "3.9.0",
    "date": "2026-11-29T12:00:00+00:00", "commit": "c303729abcdef",
}  # fmt: skip


@pytest.fixture(autouse=True)
def shipped_tiles():
    """What a test installs is gone after it."""
    yield
    tuned.install([])


@pytest.fixture
def stub(monkeypatch):
    """An H100's launch path, by the public functions, on CPU tensors; nothing runs."""
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    with stub_driver((9, 0)) as driver:
        yield driver


# --------------------------------------------------------------------------------------------------------------------
# Tables.


def test_an_installed_row_comes_before_the_shipped_one():
    key, shipped, mine = SOFTMAX.key, ROW_TILES[SOFTMAX.key], RowConfig(1, 4096, 8)
    ROW_TILES.install({key: mine})
    assert pick_row_config("softmax_fwd", 4000, 2) == mine and ROW_TILES[key] == shipped
    assert pick_row_config("softmax_fwd", 8000, 2) == ROW_TILES["softmax_fwd", "half", 8192]
    with pytest.raises(KeyError, match="a row must be one of the table's, got"):
        ROW_TILES.install({("softmax_fwd", "half", 4097): mine})
    with pytest.raises(TypeError, match="a tile must be a RowConfig, got Config"):
        ROW_TILES.install({key: Config(16, 16, 4, 1)})
    assert pick_row_config("softmax_fwd", 4000, 2) == mine, "a table that was refused a row keeps what it had"
    ROW_TILES.install({})
    assert pick_row_config("softmax_fwd", 4000, 2) == shipped


def test_an_installed_attention_tile_is_halved_like_a_shipped_one():
    mine = Config(128, 128, 4, 2, tma=True, overlap=True)
    TILES.install({("attention_fwd", "sm90", "half", 64): mine})
    picked = [pick_config("attention_fwd", (9, 0), 227 * 1024, 64, 2, plain) for plain in (True, False)]
    assert picked == [mine, dataclasses.replace(mine, BLOCK_N=64)]


# --------------------------------------------------------------------------------------------------------------------
# Candidates.


@pytest.mark.parametrize("table", [TILES, ROW_TILES, PAGED_TILES, GROUPED_TILES], ids=["attention", "rows", "paged", "grouped"])
def test_candidates_are_neighbours(table):
    for tile in dict.fromkeys(table.values()):
        found = tune.candidates(tile)
        assert found[0] == tile and len(set(found)) == len(found) <= 80
        for other in found[1:]:
            changed = [name for name, value in vars(other).items() if value != getattr(tile, name)]
            assert 1 <= len(changed) <= 2
            for name in changed:
                now, then = getattr(other, name), getattr(tile, name)
                assert now in (2 * then, then // 2) if name.startswith(("BLOCK", "ROWS", "num_warps")) else abs(now - then) == 1
            assert 1 <= other.num_warps <= 16 and all(16 <= v <= 256 for n, v in vars(other).items() if n in changed and n in ("BLOCK_M", "BLOCK_N"))


def test_candidates_hold_the_row():
    """A row of 4096 columns in registers stays one block; a long one is walked in blocks of any size."""
    assert {tile.BLOCK for tile in tune.candidates(ROW_TILES["softmax_fwd", "half", 4096])} == {4096}
    assert {tile.BLOCK for tile in tune.candidates(ROW_TILES["softmax_fwd", "half", LONG])} == {4096, 8192, 16384}
    assert len(tune.candidates(Config(128, 128, 8, 2), reach=1)) == 1 + 8
    assert Config(64, 128, 4, 2) in tune.candidates(Config(128, 128, 8, 2)) and Config(64, 64, 4, 2) not in tune.candidates(Config(128, 128, 8, 2))


def test_rows_that_a_call_asks_for(stub):
    found = tune.asked_by(lambda: fastattn.softmax(torch.randn(8, 4000, dtype=torch.bfloat16)))
    assert found == [SOFTMAX] and ROW_TILES.asked is None
    assert tune.asked_by(lambda: None) == []


@pytest.mark.parametrize(
    "row, job",
    [
        (SOFTMAX, "softmax_fwd sm90 half 4096 aligned"),
        (Row("attention", ("attention_bwd_dq", "sm90", "half", 128)), "attention_bwd sm90 half 128 plain"),
        (Row("paged", ("sm90", "quantized", 128, 16)), "paged_attention sm90 int8 128 decode"),
        (Row("grouped", ("product", "sm90", "half", 16, 1024)), "grouped_mm_fwd sm90 half 1024 few"),
        (Row("grouped", ("gated_bwd", "sm90", "half", 1 << 31, 1 << 31)), "moe_bwd sm90 half 2048 plain"),
    ],
    ids=str,
)
def test_the_job_that_compiles_a_row(row, job):
    assert str(tune.job_of(row, "sm90")) == job


def test_what_spills_or_does_not_fit_is_not_run():
    job = tune.job_of(SOFTMAX, "sm90")
    present, fine, spilling = ROW_TILES[SOFTMAX.key], RowConfig(1, 4096, 8), RowConfig(4, 4096, 1)
    kept, dropped = tune.prune(SOFTMAX, [present, fine, spilling], job)
    assert kept == [present, fine] and list(dropped) == [spilling]
    assert "spills" in dropped[spilling] and ROW_TILES.installed == {}
    decode = Row("paged", ("sm90", "half", 64, 16))
    said = tune.compile_tile(decode, PagedConfig(16, 256, 4, 6, 4), tune.job_of(decode, "sm90"))
    assert said.startswith("OutOfResources: out of resource: shared memory")


# --------------------------------------------------------------------------------------------------------------------
# Measuring.

ONE, TWO, THREE = RowConfig(1, 4096, 4), RowConfig(1, 4096, 8), RowConfig(2, 4096, 8)


def clock(times, spread=0.01):
    """A made-up clock: {(tile, case): ms}. It runs what it times once, under the tile it says."""

    def measure(works):
        found, failures = {}, {}
        for name, work in works.items():
            try:
                case = work.run(work.prepare())
                found[name] = times[name, case], spread
            except RuntimeError as error:
                failures[name] = f"RuntimeError: {error}"
        return found, failures

    return measure


def case(name, verify=lambda: None, run=None):
    return Case(name, Work(run or (lambda _: name)), verify)


def measured(times, cases, spread=0.01, tiles=(ONE, TWO, THREE)):
    return tune.measure_row(SOFTMAX, tiles, {}, cases, clock({(str(tile), name): ms for (tile, name), ms in times.items()}, spread))


def test_the_fastest_over_all_cases_is_proposed():
    times = {(ONE, "a"): 1.0, (ONE, "b"): 1.0, (TWO, "a"): 0.5, (TWO, "b"): 1.2, (THREE, "a"): 0.9, (THREE, "b"): 0.9}
    result = measured(times, [case("a"), case("b")])
    assert result.ratios == pytest.approx({ONE: 1.0, TWO: 0.6**0.5, THREE: 0.9})
    assert result.best == TWO and result.is_better and result.resolution == pytest.approx(0.01)


def test_within_the_spread_nothing_is_better():
    times = {(ONE, "a"): 1.0, (TWO, "a"): 0.97, (THREE, "a"): 1.1}
    assert measured(times, [case("a")]).is_better
    result = measured(times, [case("a")], spread=0.05)
    assert result.best == TWO and not result.is_better
    assert not measured({(ONE, "a"): 1.0, (TWO, "a"): 0.995, (THREE, "a"): 1.1}, [case("a")], spread=0.0).is_better


def test_a_tile_that_is_wrong_or_raises_has_no_number():
    def verify():
        if ROW_TILES.pick(*SOFTMAX.key) == TWO:
            raise ArithmeticError("outside the error budget: out")

    def run(_):
        if ROW_TILES.pick(*SOFTMAX.key) == THREE:
            raise RuntimeError("misaligned")
        return "a"

    result = measured({(ONE, "a"): 1.0, (TWO, "a"): 0.1}, [case("a", verify, run)])
    assert result.ratios == {ONE: 1.0} and not result.is_better
    assert result.dropped == {TWO: "ArithmeticError: outside the error budget: out", THREE: "RuntimeError: misaligned"}
    assert ROW_TILES.installed == {}


def test_a_present_tile_that_is_wrong_raises():
    def verify():
        raise ArithmeticError("outside the error budget: out")

    with pytest.raises(ArithmeticError, match="outside the error budget: out"):
        measured({}, [case("a", verify)])


def test_cases_are_the_benchmarks_own():
    softmax = suite.suite_of("softmax")
    shape = softmax.presets["cpu", "tiny"][0]
    forward, backward = tune.cases_of(softmax, shape, torch.float32, CPU, ("fwd", "bwd", "fwd+bwd"))
    assert [forward.name, backward.name] == [f"{shape.id('fp32')} fwd", f"{shape.id('fp32')} bwd"]
    forward.verify()
    wrong = dataclasses.replace(softmax, reference=lambda *args: {n: t + 1 for n, t in softmax.reference(*args).items()})
    with pytest.raises(ArithmeticError, match="outside the error budget: out0"):
        tune.cases_of(wrong, shape, torch.float32, CPU, ("fwd",))[0].verify()


def test_a_whole_run(stub, tmp_path, capsys, monkeypatch):
    """The suite's shape, launched under every candidate that compiles; the proposal, its receipts, the file, and what it does."""
    x = torch.zeros(8, 4096, dtype=torch.bfloat16)

    def cases_of(found, shape, dtype, device, modes):
        def run(_):
            before = len(stub.launches)
            fastattn.softmax(x)
            (launched,) = stub.launches[before:]
            return launched.num_warps

        return [Case(shape.id("bf16"), Work(run), lambda: None)]

    def measure(works):  # eight warps are fastest
        return {name: (1.0 + abs(work.run(work.prepare()) - 8) / 10, 0.001) for name, work in works.items()}, {}

    found = suite.suite_of("softmax")
    (result,) = tune.tune(
        found, found.presets["cuda", "tiny"][:1], torch.bfloat16, CPU, "sm90", modes=("fwd",), measure=measure, reach=1, cases_of=cases_of
    )
    assert result.row == SOFTMAX and result.present == RowConfig(1, 4096, 4) and result.best == RowConfig(1, 4096, 8)
    assert result.ratios[result.best] == pytest.approx(1 / 1.4)

    tune.show(result, WHERE)
    said = capsys.readouterr().out
    source = '    ("softmax_fwd", "half", 4096): RowConfig(1, 4096, 8),  # 1.40x of ROWS=1, BLOCK=4096, num_warps=4 on NVIDIA H200, 2026-11-29, commit c303729ab'
    assert source in said.splitlines()

    file = tune.keep(tmp_path, H200, result, WHERE)
    assert file.name == "NVIDIA-H200-sm90.jsonl"
    (row,) = tuned.read(file, H200)
    assert row[:3] == ("rows", SOFTMAX.key, RowConfig(1, 4096, 8))
    assert row.receipt["faster_by"] == 1.4 and row.receipt["clocks.sm"] == "1980 MHz" and row.receipt["commit"] == "c303729abcdef"
    ((_, times),) = row.receipt["cases"].items()
    assert times == {"ms": 1.0, "spread_ms": 0.001, "present_ms": pytest.approx(1.4)}

    monkeypatch.setattr(tuned, "visible_gpus", lambda: [H200])
    for install, warps in ((lambda: None, 4), (lambda: tuned.install_from(tmp_path), 8)):
        install()
        fastattn.softmax(x)
        assert stub.launches[-1].num_warps == warps


@pytest.mark.parametrize("table", [TILES, ROW_TILES, PAGED_TILES, GROUPED_TILES], ids=["attention", "rows", "paged", "grouped"])
def test_printed_rows_are_the_tables_source(table):
    name = next(name for name, known in tuned.tables().items() if known is table)
    classes = {cls.__name__: cls for cls in (Config, RowConfig, PagedConfig, GroupedConfig)}
    for key, tile in table.items():
        line = tune.as_source(Row(name, key), tile, "static")
        assert eval("{" + line + "\n}", classes) == {key: tile}


def test_a_row_that_keeps_its_tile_says_so(capsys):
    tune.show(measured({(ONE, "a"): 1.0, (TWO, "a"): 1.5, (THREE, "a"): 1.1}, [case("a")]), WHERE)
    assert "keeps its tile: nothing is faster by more than 1.0%" in capsys.readouterr().out


def test_the_command_without_a_gpu(monkeypatch, capsys):
    from fastattn.cli import main

    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "softmax"]) == 1
    assert "needs a CUDA device, torch sees none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "softmax", "--write"])
    assert "--write needs FASTATTN_TUNE_DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tune", "softmax", "--rows", "("])
    assert "must be a regular expression, got '('" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# The user's file.

HEADER = '{"gpu": "NVIDIA H200", "capability": "9.0"}'
TILE = {"ROWS": 1, "BLOCK": 4096, "num_warps": 8, "long": False}
LINE = {"table": "rows", "row": list(SOFTMAX.key), "tile": TILE}


def line(**changes):
    return json.dumps(LINE | changes)


@pytest.mark.parametrize(
    "lines, number, message",
    [
        ([], 1, "the first line must say what the file is for, there is none"),
        (["["], 1, "Expecting value"),
        (["[]"], 1, r'the first line must have {"gpu": "NVIDIA H200", "capability": "9.0"}, got \[\]'),
        (['{"gpu": "NVIDIA B200", "capability": "10.0"}'], 1, 'got {"gpu": "NVIDIA B200", "capability": "10.0"}'),
        ([HEADER, line(), "{"], 3, "Expecting property name"),
        ([HEADER, "", line()], 2, "Expecting value"),
        ([HEADER, "3"], 2, "a line must have table, row and tile, and may have a receipt, got 3"),
        ([HEADER, line(extra=1)], 2, "a line must have table, row and tile, and may have a receipt"),
        ([HEADER, line(table="tiles")], 2, "table must be one of attention, rows, paged, grouped, got 'tiles'"),
        ([HEADER, line(row=["softmax_fwd", "half", 4097])], 2, r"row must be one of the rows table's of this version, got \[\"softmax_fwd\", \"half\", 4097\]"),
        ([HEADER, line(row=[["a"]])], 2, "row must be one of the rows table's"),
        ([HEADER, line(row="softmax_fwd")], 2, "row must be one of the rows table's"),
        ([HEADER, line(tile={"ROWS": 1})], 2, "tile must have ROWS, BLOCK, num_warps, long, got"),
        ([HEADER, line(tile=TILE | {"ROWS": "1"})], 2, "tile: ROWS must be of type int, got '1'"),
        ([HEADER, line(tile=TILE | {"ROWS": True})], 2, "tile: ROWS must be of type int, got True"),
        ([HEADER, line(tile=TILE | {"BLOCK": 4000})], 2, "tile: BLOCK must be a power of two, got 4000"),
        ([HEADER, line(tile=TILE | {"num_warps": 0})], 2, "tile: num_warps must be a power of two, got 0"),
        ([HEADER, line(tile=TILE | {"num_warps": 64})], 2, "tile: num_warps must be at most 32, got 64"),
        ([HEADER, line(tile=TILE | {"long": True})], 2, "tile: long must be the shipped row's False: it names another kernel"),
        ([HEADER, line(), line()], None, "a row must be there once, got"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_the_line(lines, number, message, tmp_path):
    file = tmp_path / "NVIDIA-H200-sm90.jsonl"
    file.write_text("\n".join(lines))
    place = f"{file}:" if number is None else f"{file}:{number}: "
    with pytest.raises(ValueError, match=message) as caught:
        tuned.read(file, H200)
    assert str(caught.value).startswith(f"FASTATTN_TUNE_DIR: {place}")


def test_rows_are_added_in_place_of_their_like(tmp_path):
    file = tuned.file_of(tmp_path / "new", H200)
    grouped = tuned.TunedRow("grouped", ("product", "sm90", "half", 16, 1024), GroupedConfig(16, 64, 64, 4, 3, 2, tma=True), {"ms": 1})
    rows = [tuned.TunedRow("rows", SOFTMAX.key, tile, {}) for tile in (ONE, TWO)]
    tuned.write(file, H200, rows[:1])
    tuned.write(file, H200, [grouped])
    tuned.write(file, H200, rows[1:])
    assert sorted(tuned.read(file, H200)) == sorted([grouped, rows[1]])
    assert file.read_text().splitlines()[0] == HEADER


def test_files_are_named_after_the_gpu(tmp_path):
    assert tuned.file_of(tmp_path, tuned.Gpu("NVIDIA GeForce RTX 4090 (Laptop)", (8, 9))).name == "NVIDIA-GeForce-RTX-4090-Laptop-sm89.jsonl"


def test_a_folder_without_this_gpus_file_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "visible_gpus", lambda: [H200])
    tuned.write(tuned.file_of(tmp_path, tuned.Gpu("NVIDIA B200", (10, 0))), tuned.Gpu("NVIDIA B200", (10, 0)), [])
    assert tuned.install_from(tmp_path) is None
    with pytest.raises(ValueError, match="FASTATTN_TUNE_DIR must be a folder, got"):
        tuned.install_from(tmp_path / "none")


def test_gpus_of_two_kinds_are_refused(tmp_path, monkeypatch):
    other = tuned.Gpu("NVIDIA A100", (8, 0))
    monkeypatch.setattr(tuned, "visible_gpus", lambda: [H200, other])
    assert tuned.install_from(tmp_path) is None
    tuned.write(tuned.file_of(tmp_path, other), other, [])
    with pytest.raises(ValueError, match="the visible GPUs must be of one kind, got NVIDIA H200, NVIDIA A100: choose by CUDA_VISIBLE_DEVICES"):
        tuned.install_from(tmp_path)


def test_the_first_call_on_a_gpu_installs(tmp_path, monkeypatch):
    calls = []
    assert tuned.before(calls.append) == calls.append, "no variable, no code in the way"
    monkeypatch.setattr(tuned, "TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "visible_gpus", lambda: [H200])
    tuned._install_once.cache_clear()
    call, file = tuned.before(calls.append), tuned.file_of(tmp_path, H200)
    assert ROW_TILES.installed == {}
    file.write_text(f"{HEADER}\n{{")
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=f"{file}:2: Expecting property name"):
            call(1)
    file.write_text(f"{HEADER}\n{line()}\n")
    call(2)
    assert calls == [2] and ROW_TILES.installed == {SOFTMAX.key: TWO}
    tuned.install([])
    call(3)
    assert ROW_TILES.installed == {}, "a file is read once"
    tuned._install_once.cache_clear()


def test_every_operators_cuda_implementation_reads_it():
    """In a process of its own, as operators are defined at import."""
    code = (
        "import fastattn, torch\n"
        "from fastattn.ops import operator, tuned\n"
        "for name, call in vars(operator.operators).items():\n"
        "    on_cuda = call.args[2]\n"
        "    assert on_cuda.__code__ is tuned.before(print).__code__, name\n"
        "print(len(vars(operator.operators)))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {tuned.VARIABLE: "/nowhere"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
