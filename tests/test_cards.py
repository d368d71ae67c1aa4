"""Kernel cards: no row of the tile table compiles to something worse than what its golden card says, and the rules hold.

`make test` recompiles the rows whose sources changed and a fixed sample; `make cards-check`, a part of `make test-more`, recompiles all.
"""

import json

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from fastattn.kernels.row_tiles import ROW_TILES, RowConfig  # noqa: E402
from fastattn.kernels.tiles import TILES, Config  # noqa: E402
from fastattn.testing import cards  # noqa: E402
from fastattn.testing.families import Job, attention, families  # noqa: E402


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
        (dict(mma={"HMMA": 48}), "matrix instructions were"),
        (dict(tma=0), "TMA loads are gone"),
        (dict(access={"LDG.128": 8, "LDG.16": 1}), "accesses narrower than 128 bits grew"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_worse_figures_are_named(change, message):
    assert cards.regressions(NAME, GOOD | dict(registers=248, hot_loop_instructions=510, tma=5), GOOD) == []
    (wrong,) = cards.regressions(NAME, GOOD | change, GOOD)
    assert wrong.startswith(f"{NAME}: ") and message in wrong


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
