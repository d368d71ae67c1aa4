"""DTensors, tensor parallelism and FSDP2 on two ranks of gloo: tests/dtensor_cases.py and parallel_cases.py, started once for all."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import INTERPRETING

import fastattn

if INTERPRETING:  # spares that process the imports
    pytest.skip("compiled: runs in the process without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("torch.distributed.tensor.experimental", reason="needs torch.distributed")
if not torch.distributed.is_gloo_available():
    pytest.skip("needs gloo", allow_module_level=True)

from two_ranks import load_cases, main


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """What went wrong in each case, on either rank."""
    out = tmp_path_factory.mktemp("dtensor") / "failures.json"
    main(out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", load_cases())
def test_two_ranks_are_one(name, failures):
    assert not failures[name], failures[name]


def test_every_operator_has_a_rule_or_a_reason():
    from fastattn.integrations.dtensor import RULES

    without = {
        "append_paged_kv": "writes into its arguments, which DTensor would have to leave where they are",
        "sample": "draws one number a row from one seed, which equal seeds on all ranks would make the same",
        "moe_update_bias": "is torch's own ops",
    }
    operators = vars(fastattn.ops.operator.operators).keys()
    assert operators - RULES.keys() == without.keys() & operators
    assert RULES.keys() <= operators
