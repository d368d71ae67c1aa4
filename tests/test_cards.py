"""Kernel cards: no row of the tile table compiles to something worse than what its golden card says, and the rules hold.

`make test` recompiles the rows whose sources changed and a fixed sample; `make cards-check`, a part of `make test-more`, recompiles all.
"""

import json
import shutil

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from fastattn.kernels.row_tiles import ROW_TILES, RowConfig  # noqa: E402
from fastattn.kernels.tiles import TILES, Config  # noqa: E402
from fastattn.testing import cards, cuda_cards  # noqa: E402
from fastattn.testing.families import PARTS, Job, attention, families  # noqa: E402
from fastattn.testing.stub_driver import SHARED_MEMORY_LIMITS  # noqa: E402


@pytest.fixture
def golden():
    if cards.comparable() is not None:
        pytest.skip(cards.comparable())
    return cards.read_golden()


def compiled(jobs):
    return {name: card for found in cards.compile_all(jobs) for name, card in found.items()}


def test_changed_rows_and_a_sample_are_not_worse(golden):
    changed = cards.changed_jobs(golden)
    assert len(changed) <= cards.MAX_CHANGED, (
        f"{len(changed)} of {len(cards.all_jobs())} jobs have other sources or tiles than their golden cards: too many to recompile "
        "here; `make cards-check` says what got worse, `make cards` rewrites the files"
    )
    wrong = cards.judge(compiled(dict.fromkeys([*cards.sample(), *changed])), golden)
    assert not wrong, "\n".join(wrong)


def test_golden_cards_satisfy_the_rules_and_cover_the_tables(golden):
    wrong = [what for name, card in golden.items() for what in cards.violations(name, card)]
    assert not wrong, "\n".join(wrong)
    assert {card["job"] for card in golden.values()} == set(map(str, cards.all_jobs()))
    assert {card["triton"].rsplit(".", 1)[0] for card in golden.values()} == {cards.TRITON}
    rows = {
        (kernel, part, dtype_class, int(head_dim))
        for kernel, part, dtype_class, head_dim, *_ in map(str.split, golden)
        if kernel.startswith("attention")
    }
    assert rows == set(TILES)
    assert sum(name.endswith("dbias") for name in golden) == sum(row[0] == "attention_bwd_dq" for row in TILES)


def test_every_row_of_the_row_table_is_compiled():
    jobs = {(job.launcher, job.dtype_class, job.size) for job in cards.all_jobs()}
    assert set(ROW_TILES) <= jobs


def test_the_sample_holds_every_row_with_a_strict_rule():
    sample = cards.sample()
    assert len(set(sample)) == len(sample) and set(sample) <= set(cards.all_jobs())
    required = {job for job in families()["attention"].jobs() if attention.is_required(job)}
    assert set(sample) >= required and len(required) == 2 * 4 * 2  # forward and backward, parts, head dims
    assert {job.launcher for job in sample} >= {job[0] for job in ROW_TILES}


def test_golden_files_hold_one_card_a_line(tmp_path):
    written = {
        f"{kernel} sm80 half 64 plain": {"config": "64x64", "hash": "0", "job": f"{kernel[:13]} sm80 half 64 plain"}
        for kernel in ("attention_fwd", "attention_bwd_dq")
    }
    cards.write_golden(written, tmp_path)
    lines = (tmp_path / "attention_fwd.json").read_text().splitlines()
    card = '{"config": "64x64", "hash": "0", "job": "attention_fwd sm80 half 64 plain"}'
    assert lines == ["{", f'"attention_fwd sm80 half 64 plain": {card}', "}"]
    assert cards.read_golden(tmp_path) == written


NAME = "attention_fwd sm90 half 128 plain"
GOOD = dict(
    job=NAME, access={"LDG.128": 8}, config="128x128 w8 s2 tma overlap", registers=240, stack=0, local=0, shared=164864, mma={"HGMMA": 48}, tma=11, hot_loop_mma=16,
    hot_loop_instructions=500, hot_loop_local=0, overlap=0.9,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stack=8), "8 bytes of spills where none are allowed"),
        (dict(shared=232449), "shared memory 232449 is over sm90's 232448"),
        (dict(mma={"HMMA": 48}), "no HGMMA"),
        (dict(mma={}), "no matrix instructions"),
        (dict(tma=0), "says tma and there is no TMA load"),
        (dict(hot_loop_mma=None), "no loop holds a matrix instruction"),
        (dict(overlap=0.4), "only 0.4 of the exponentials"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_rules_are_named(change, message):
    assert cards.violations(NAME, GOOD) == []
    (wrong,) = cards.violations(NAME, GOOD | change)
    assert wrong.startswith(f"{NAME}: ") and message in wrong


def test_rules_of_other_rows_are_looser():
    spilling = GOOD | dict(stack=100, overlap=0.0)

    def violations(name, card):
        kernel, *rest = name.split()
        return cards.violations(name, card | {"job": " ".join([kernel[:13], *rest])})

    assert violations("attention_fwd sm90 half 128 all", spilling) == []
    assert violations("attention_fwd sm90 half 256 plain", spilling) == []
    assert violations("attention_bwd_dq sm90 half 128 plain", GOOD | dict(overlap=0.0)) == []
    scalar = dict(config="16x16 w8 s1", mma={}, hot_loop_mma=None, overlap=None)
    assert violations("attention_fwd sm90 single 64 plain", spilling | scalar) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stack=8), "stack grew from 0 to 8"),
        (dict(local=1), "local grew"),
        (dict(hot_loop_local=1), "hot_loop_local grew"),
        (dict(shared=164865), "shared grew"),
        (dict(hot_loop_instructions=511), "hot_loop_instructions grew from 500 to 511"),
        (dict(registers=249), "registers grew from 240 to 249"),
        (dict(mma={"HMMA": 48}), "matrix instructions were {'HGMMA': 48}, now {'HMMA': 48}"),
        (dict(mma={"HGMMA": 47}), "matrix instructions were {'HGMMA': 48}, now {'HGMMA': 47}"),
        (dict(tma=0), "TMA loads are gone"),
        (dict(access={"LDG.128": 8, "LDG.16": 1}), "accesses narrower than 128 bits grew"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_worse_figures_are_named(change, message):
    assert cards.regressions(NAME, GOOD | dict(registers=248, hot_loop_instructions=510, tma=5), GOOD) == []
    (wrong,) = cards.regressions(NAME, GOOD | change, GOOD)
    assert wrong.startswith(f"{NAME}: ") and message in wrong


def test_another_tile_may_have_fewer_products():
    assert cards.regressions(NAME, GOOD | dict(config="128x64 w8 s2 tma overlap", mma={"HGMMA": 24}), GOOD) == []


def test_a_worse_card_is_shown_with_all_that_changed():
    loop = {"warps": 8, "loop": True, "instructions": 500, "ex2": 64}
    golden = GOOD | dict(hash="0", loop=loop)
    now = golden | dict(stack=64, local=18, registers=248, loop=loop | {"ex2": 65, "barriers": 1})
    assert cards.judge({NAME: now}, {NAME: golden}) == [
        f"{NAME}: 64 bytes of spills where none are allowed",
        f"{NAME}: stack grew from 0 to 64",
        f"{NAME}: local grew from 0 to 18",
        "    local: 0 → 18",
        "    loop barriers: 0 → 1",
        "    loop ex2: 64 → 65",
        "    registers: 240 → 248",
        "    stack: 0 → 64",
    ]
    del golden["loop"]  # of a card that is older than they are
    assert [line for line in cards.judge({NAME: now}, {NAME: golden}) if "loop" in line] == []


def test_a_reader_that_reads_otherwise_is_seen():
    """Its source is not hashed, so that the same code has to read the same."""
    golden = GOOD | dict(hash="0", loop={"warps": 8, "loop": True, "instructions": 500})
    now = golden | dict(loop={"warps": 8, "loop": True, "instructions": 501})
    first, _ = cards.judge({NAME: now}, {NAME: golden})
    assert first == f"{NAME}: its hot loop reads otherwise than its card says, from the same code: see hot_loop.py"
    assert cards.judge({NAME: now | dict(hash="1")}, {NAME: golden}) == [], "other code may"
    del golden["loop"]
    assert cards.judge({NAME: now}, {NAME: golden}) == []


ROW = "softmax_fwd sm90 half 4096 aligned"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(stack=8), "8 bytes of spills where none are allowed"),
        (dict(access={"LDG.16": 8}), "no 128-bit access"),
        (dict(access={"LDG.128": 4, "STG.16": 1}), "narrow accesses to aligned rows"),
        (dict(shared=232449), "shared memory 232449 is over sm90's 232448"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_broken_rules_of_row_kernels_are_named(change, message):
    good = GOOD | dict(job=ROW, mma={}, tma=0)
    assert cards.violations(ROW, good) == []
    assert message in cards.violations(ROW, good | change)[0]


def test_a_changed_tile_or_a_missing_card_is_seen(monkeypatch):
    def of(op):
        return [job for job in cards.changed_jobs(now) if job.launcher.startswith(op)]

    now = {str(job): {"hash": cards.job_hash(job), "job": str(job)} for job in cards.all_jobs()}
    assert cards.changed_jobs(now) == []
    missing = Job("attention_bwd", "sm90", "half", 256, "plain")
    del now[str(missing)]
    assert cards.changed_jobs(now) == [missing]
    monkeypatch.setitem(TILES, ("attention_bwd_dkdv", "sm80", "single", 64), Config(16, 16, 4, 3))
    assert {str(job) for job in of("attention")} == {
        str(missing), "attention_bwd sm80 single 64 plain", "attention_bwd sm80 single 64 all"
    }  # fmt: skip
    monkeypatch.setitem(ROW_TILES, ("softmax_fwd", "half", 4096), RowConfig(1, 4096, 8))
    assert {(job.launcher, job.size) for job in of("softmax")} == {("softmax_fwd", 4096)}


def test_hash_follows_calls():
    text = "\n".join(cards._sources("attention_bwd"))
    for name in ("def_gather_queries(", "defvisible_blocks(", "classProblem:", "LENGTHS = [", "LOG2E = "):
        assert name in text, name
    assert "Add what the query blocks" not in text and "TILES" not in text
    rows = "\n".join(cards._sources("softmax_fwd"))
    for name in ("def_softmax_fwd_long_kernel(", "defedge(", "classRows:"):
        assert name in rows, name
    assert "ROW_TILES" not in rows


def test_hash_is_of_code_not_of_its_layout():
    code = "def f(x):\n    if x:\n        g(x, 1)\n    return x\n"
    same = 'def f(x):\n    """Doc."""\n    if x:  # why\n        g(\n            x,\n            1,\n        )\n\n    return x\n'
    assert cards._code(code) == cards._code(same)
    assert cards._code(code)[1] == {"x", "g"}
    assert cards._code(code)[0] != cards._code(code.replace("    return", "        return"))[0]
    assert cards._code(code)[0] != cards._code(code.replace("1", "2"))[0]


def test_another_triton_is_skipped_by_name(monkeypatch, capsys):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert cards.comparable() == "golden cards hold for Triton 3.9, this is 3.6.0"
    assert cards.main(["--check"]) == 0
    assert capsys.readouterr().out == "skipped: golden cards hold for Triton 3.9, this is 3.6.0\n"


def test_command_outside_a_checkout(tmp_path, capsys):
    if cards.comparable() is not None:
        pytest.skip(cards.comparable())
    assert cards.main(["--check", "--golden", str(tmp_path)]) == 1
    assert "no golden cards in" in capsys.readouterr().err


def test_cards_are_plain_json():
    """One real job end to end, in this process."""
    found = cards.compile_cards(Job("attention_fwd", "sm80", "half", 64, "plain"))
    (card,) = found.values()
    assert json.loads(json.dumps(found)) == found
    assert card["config"] == attention.tile(TILES["attention_fwd", "sm80", "half", 64]) and card["mma"]["HMMA"] > 0


# --------------------------------------------------------------------------------------------------------------------
# Cards as objects.


def listed(tmp_path, *arguments):
    file = tmp_path / "cards.json"
    assert cards.main(["--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def test_every_card_is_an_object(tmp_path, capsys):
    found = listed(tmp_path)
    assert len(found) == len(cards.read_golden()) + len(cuda_cards.read(cards.GOLDEN))
    assert len({one["name"] for one in found}) == len(found)
    assert {one["op"] for one in found} == set(families())
    assert {one["arch"] for one in found} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert {frozenset(one) for one in found} == {frozenset(found[0])}
    for one in found:
        if one["loop"] is not None:
            assert one["bound"]["cycles"]["issue"] > 0
            assert one["bound"]["percent"] is None or 0 < one["bound"]["percent"] <= 100
        if one["occupancy"] is not None and one["shared"] <= SHARED_MEMORY_LIMITS[PARTS[one["arch"].replace("_", "")]]:
            assert one["occupancy"]["programs"] >= 1, one["name"]
    assert f"{len(found)} cards: " in capsys.readouterr().out


def test_an_attention_card(tmp_path):
    (one,) = (one for one in listed(tmp_path, "--op", "attention", "--arch", "sm_90", "--only", "plain") if one["name"] == NAME)
    assert one["op"] == "attention" and one["arch"] == "sm_90" and one["flags"] == [] and one["dtype"] == "bf16"
    assert one["head_dim"] == one["size"] == 128 and one["warps"] == 8 and one["spills"] == 0
    assert one["occupancy"] == {"programs": 1, "warps": 8, "share": 0.125, "limited_by": "registers"}
    # Two products of 128 queries by 128 keys, D = 128, are 2048 cycles; as many exponentials 1024, and two more a row's maximum.
    assert one["loop"]["mma_flops"] == 2 * 2 * 128**3 and one["bound"]["cycles"]["tensor"] == 2048
    assert 1024 <= one["bound"]["cycles"]["mufu"] <= 1100 and one["bound"]["percent"] == 100
    assert one["ex2_under_pv"] > 0.5 * one["loop"]["ex2"] and one["bound"]["in_order_percent"] > 70


def test_options_are_named(tmp_path):
    found = {one["name"]: one["flags"] for one in listed(tmp_path, "--op", "attention", "--op", "softmax", "--op", "paged_attention", "--arch", "sm_90")}
    assert "dropout" in found["attention_fwd sm90 half 128 all"] and found[NAME] == found[ROW] == []
    assert found["softmax_fwd sm90 half 4096 odd"] == ["odd"]
    assert found["paged_attention sm90 half 128 decode"] == ["decode"]
    assert found["paged_attention sm90 half 128 decode_all"][:2] == ["decode", "varlen"]


def test_the_table(capsys):
    assert cards.main(["--op", "softmax", "--arch", "sm_90"]) == 0
    said = capsys.readouterr().out
    assert ROW in said and "of memory" in said and "not measured" in said


def test_stale_cards_are_marked(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ROW_TILES, ("softmax_fwd", "half", 4096), RowConfig(1, 4096, 8))
    found = {one["name"]: one["stale"] for one in listed(tmp_path, "--op", "softmax", "--arch", "sm_90")}
    assert found[ROW] and not found["softmax_fwd sm90 half 8192 aligned"]
    assert "2 jobs have other sources or tiles than their cards" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [(["--json", "x", "--check"], "--json goes with none of"), (["--all"], "--all goes with --update"), (["--only", "("], "must be a regular expression, got '('"), (["--arch", "sm_70"], "invalid choice: 'sm_70'")],
    ids=str,
)
def test_options_that_do_not_go_together(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cards.main(arguments)
    assert message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------------
# CUDA kernels.

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_90a'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 132 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90a'
ptxas info    : Function properties for _Z1bv
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
PTX = """
.visible .entry _Z1av(
	.param .align 8 .b8 _Z1av_param_0[96]
)
.maxntid 1024
.minnctapersm 2
{
	ret;
}
.visible .entry _Z1bv()
{
"""


def test_what_ptxas_and_ptx_say():
    assert cuda_cards.resource_usage(PTXAS) == {
        "_Z1av": {"registers": 40, "stack": 0, "spills": 0, "shared": 132}, "_Z1bv": {"registers": 255, "stack": 16, "spills": 20, "shared": 0}
    }  # fmt: skip
    assert cuda_cards.max_warps(PTX) == {"_Z1av": 32, "_Z1bv": 32}
    assert cuda_cards.max_warps(PTX.replace("1024", "96")) == {"_Z1av": 3, "_Z1bv": 32}
    assert cuda_cards.short_name("void fastattn::(anonymous namespace)::k<fastattn::Sum<float>, (bool)1>(fastattn::P)") == "k<Sum<float>, (bool)1>"


def test_cuda_cards_cover_the_sources_and_spill_nothing():
    golden = cuda_cards.read(cards.GOLDEN)
    have = {(card["source"], card["part"]) for card in golden.values()}
    assert have == {(source.name, part) for source in cuda_cards.sources() for part in cuda_cards.ARCHS}
    assert {card["cuda"] for card in golden.values()} == {cuda_cards.CUDA}
    assert not [name for name, card in golden.items() if card["spills"]]
    assert cuda_cards.stale(golden) == [], "run `fastattn cards --update` where there is an nvcc"


def test_cuda_kernels_that_no_card_covers_are_left_out_by_name(tmp_path, monkeypatch, capsys):
    cards.write_golden(cards.read_golden(), tmp_path)
    monkeypatch.setattr(cuda_cards.shutil, "which", lambda name: None)
    file = tmp_path / "out.json"
    assert cards.main(["--golden", str(tmp_path), "--op", "softmax", "--arch", "sm_90", "--json", str(file)]) == 0
    assert "left out: csrc/cuda/softmax.cu for sm90: there is no nvcc" in capsys.readouterr().out
    assert not [one for one in json.loads(file.read_text()) if "cuda" in one["flags"]]


def test_a_changed_header_makes_cuda_cards_stale(tmp_path):
    for folder in ("cuda", "common"):
        shutil.copytree(cuda_cards.CSRC / folder, tmp_path / folder)
    golden = cuda_cards.read(cards.GOLDEN)
    header = tmp_path / "cuda" / "softmax.hpp"
    header.write_text(header.read_text() + "// more\n")
    assert {source.name for source, _ in cuda_cards.stale(golden, tmp_path)} == {"softmax.cu"}


@pytest.mark.more  # half a minute of nvcc
def test_a_cuda_file_compiles_to_its_cards():
    if cuda_cards.why_not() or cuda_cards.toolkit() != cuda_cards.CUDA:
        pytest.skip(f"no nvcc of CUDA {cuda_cards.CUDA} on this machine")
    golden = cuda_cards.read(cards.GOLDEN)
    found = cuda_cards.compile_cards(cuda_cards.CSRC / "cuda" / "softmax.cu", "sm90")
    assert found == {name: card for name, card in golden.items() if (card["source"], card["part"]) == ("softmax.cu", "sm90")}
