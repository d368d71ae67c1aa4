"""Whether an installed fastattn works, by what a user would do first: a script, for where torch alone is installed beside it.

    python smoke.py               run it, with whatever was compiled
    python smoke.py --compiled    and demand the page pool and the CPU operators in C++; --pure: that there are none
"""

import sys
from pathlib import Path

import torch

import fastattn
from fastattn.extensions import cpu_operators
from fastattn.page_pool import COMPILED


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def attention() -> None:
    q, k, v = (torch.randn(2, 33, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    outs = [module.attention(q, k, v, causal=True, softcap=5.0) for module in (fastattn, fastattn.reference)]
    close(*outs)
    dout = torch.randn_like(outs[0])
    for grads in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out in outs), strict=True):
        close(*grads)


def cache() -> None:
    """Decoding over pages is what one pass over all tokens gives."""
    q, k, v = (torch.randn(1, 20, heads, 16) for heads in (4, 2, 2))
    cache = fastattn.PagedKVCache(1, 8, 16, 2, 16, dtype=torch.float32, device="cpu")
    sequence, outs = cache.allocate(), []
    for tokens in (slice(0, 18), slice(18, 19), slice(19, 20)):
        cache.step([sequence], tokens.stop - tokens.start)
        cache.append(0, k[:, tokens], v[:, tokens])
        outs.append(cache.attend(0, q[:, tokens]))
    close(torch.cat(outs, 1), fastattn.reference.attention(q, k, v, causal=True))


def experts() -> None:
    layer = fastattn.nn.MoE(32, 48, 8, 2)
    plan = fastattn.moe_dispatch(torch.tensor([[1, 0], [3, 1]]), 4)
    assert plan.order.tolist() == [1, 0, 3, 2] and plan.offsets.tolist() == [1, 3, 3, 4], plan
    x = torch.randn(10, 32, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad.isfinite().all()


def main() -> None:
    torch.manual_seed(0)
    wanted = {"--compiled": True, "--pure": False}.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if wanted is not None:
        assert wanted is COMPILED, f"the page pool is {'C++' if COMPILED else 'Python'}"
        assert wanted is (cpu_operators.why_not is None), f"the CPU operators: {cpu_operators.why_not or 'C++'}"
        for op in ("attention_fwd_cpp", "paged_attention_cpp", "moe_dispatch_cpp"):
            assert cpu_operators.available(op) is wanted, op
    for check in (attention, cache, experts):
        check()
    print(f"fastattn {fastattn.__version__} of {Path(fastattn.__file__).parent} works under torch {torch.__version__}")


main()
