"""The matrix of transformers_matrix.py, a test a cell: a third of it in `make test`, the rest in `make test-more`; and its page."""

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers")

import transformers_matrix as matrix  # noqa: E402  (the skip comes first)

# Softcap, windows, two kinds of layers and 1 + weight; sinks and experts; position bias; cross-attention; a bidirectional mask; Conv1D.
OFTEN = {"gemma2", "gpt_oss", "t5", "bart", "bert", "gpt2"}
RUN = [cell for cell in matrix.cells() if matrix.why_not(*cell) is None]


def is_quick(family: str, scenario: str, route: str) -> bool:
    if scenario == "compile":
        return (family, route) == ("gemma2", "fastattn + patch")
    return family in OFTEN


def param(cell: tuple[str, str, str]):
    return pytest.param(*cell, id="-".join(cell).replace(" ", "_"), marks=() if is_quick(*cell) else pytest.mark.more)


@pytest.mark.parametrize(("family", "scenario", "route"), [param(cell) for cell in RUN])
def test_cell(family, scenario, route):
    matrix.run(family, scenario, route)


@pytest.mark.more
@pytest.mark.parametrize("reason", [reason for reason in matrix.WHY_NOT if reason.fails], ids=lambda reason: reason.text)
def test_what_is_said_to_fail_does(reason):
    """Otherwise the reason has gone, and its cells may be run."""
    cells = [cell for cell in matrix.cells() if reason.holds(cell) and matrix.why_not(*cell) == reason.text]
    assert cells or not reason.routes & set(matrix.ROUTES), "it holds for no cell"
    for cell in cells:
        with pytest.raises(Exception):  # noqa: B017  (each fails in its own way)
            matrix.run(*cell)


def test_the_page_is_what_the_table_says():
    """Every cell is named, those that do not apply with their reason. `python tests/transformers_matrix.py --write` runs them and writes it."""
    assert matrix.PAGE.read_text(encoding="utf-8") == matrix.page()


def test_a_third_of_the_cells_is_run_often():
    often = [cell for cell in RUN if is_quick(*cell)]
    assert len(RUN) / 4 <= len(often) <= len(RUN) / 2


def test_a_cell_notices_what_is_wrong(monkeypatch):
    """The comparisons mean something: without its option, a family's cell fails."""
    from fastattn.integrations import transformers as on_transformers

    forward = on_transformers.attention_forward
    for family, option in (("mistral", "sliding_window"), ("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("t5", "position_bias")):
        matrix.run(family, "logits", "fastattn")
        with monkeypatch.context() as patches:
            without = lambda *args, option=option, **kwargs: forward(*args, **{**kwargs, option: None})  # noqa: E731
            patches.setitem(transformers.AttentionInterface._global_mapping, "fastattn", without)
            patches.setattr(on_transformers, "register", lambda **options: None)
            with pytest.raises(AssertionError, match="exceeds the budget"):
                matrix.run(family, "logits", "fastattn")
