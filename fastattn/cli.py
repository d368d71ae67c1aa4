"""The `fastattn` command and its subcommands. argparse and plain prints: it runs where torch alone is installed."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import itertools
import platform
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

from .command_line import INTERRUPTED, device, regex, silence_stdout


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 when all went well, 1 when a check was red or a file could not be read or written, 130
    after Ctrl-C; argparse exits 2 on bad arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return 1
    except OSError as error:  # a path or a disk
        print(f"fastattn {arguments[0]}: {error}", file=sys.stderr)
        return 1


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in _OF_THEIR_OWN:
        return importlib.import_module(_OF_THEIR_OWN[arguments[0]]).main(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    return options.command(options)


# Commands whose arguments are their own.
_OF_THEIR_OWN = {"cards": "fastattn.testing.cards", "dump": "fastattn.testing.dump", "tune": "fastattn.benchmarks.tune"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print the usage as well
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    from fastattn import __version__
    from fastattn.benchmarks import command, suite
    from fastattn.models import explain_command, generate_command, train_command

    parser = _Parser(prog="fastattn", description="Exact attention in Triton, behind PyTorch's signatures.")
    parser.add_argument("--version", action="version", version=f"fastattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=description, description=description)
        sub.set_defaults(command=command)
        return sub

    bench = add("bench", command.run, "verify each op, then time it against the naive one and the peers at hand")
    command.add_arguments(bench)
    add("info", _info, "versions, devices, and which code runs on them")
    verify = add("verify", _verify, "check each op's outputs and gradients against its float64 reference")
    verify.add_argument("ops", nargs="*", metavar="OP", help=f"all, or some of {', '.join(suite.OPS)} (default: all)")
    verify.add_argument("--device", type=device, default=None, help="cuda where there is one, else cpu; or name it")
    dtypes = suite.DTYPES
    verify.add_argument("--dtype", choices=dtypes, nargs="+", default=None, help="default: all on cuda, fp32 on cpu")
    verify.add_argument("--only", type=regex, metavar="REGEX", default="", help="cases to run, by name")
    warmup = add("warmup", _warmup, "compile the ops' usual variants ahead of their first use")
    warmup.add_argument("--device", type=device, default=None, help="cuda where there is one, else cpu; or name it")
    warmup.add_argument("--hidden-size", type=int, nargs="+", default=[4096], help="rows of norms and activations (4096)")
    warmup.add_argument("--vocab-size", type=int, nargs="+", default=[128256], help="rows of logits (128256)")
    warmup.add_argument(
        "--experts", type=int, nargs=4, metavar=("H", "I", "E", "K"), action="append", default=[],
        help="a mixture of experts: hidden size, intermediate size, experts, experts a token; may be repeated",
    )  # fmt: skip
    train_command.add_arguments(add("train", train_command.run, "train a transformer on text, on one device or by torchrun on several"))
    explain_command.add_arguments(add("explain", explain_command.run, "one text's way through a model, as a page to look at"))
    generate_command.add_arguments(add("generate", generate_command.run, "continue prompts with a model, streaming"))
    add("cards", None, "show what the compiler makes of every kernel (--update: compile and record it; --check: compare)")
    add("tune", None, "measure an op's tiles around the table's on this GPU, and keep the better ones")
    add("dump", None, "write the compiler's stages of an op's kernels, for any part")
    return parser


def _device(asked: torch.device | None) -> torch.device:
    return asked or torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _info(options: argparse.Namespace) -> int:
    import fastattn
    from fastattn.benchmarks import report
    from fastattn.benchmarks.bench_attention import peers
    from fastattn.benchmarks.provenance import PACKAGES, commit, device_details, version
    from fastattn.extensions import cpu_operators, cuda_operators
    from fastattn.ops.dispatch import INTERPRET
    from fastattn.page_pool import COMPILED

    lines = [
        ("fastattn", f"{fastattn.__version__}, commit {commit() or 'unknown'}"),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU only'}"),
        *((name, version(name) or "absent") for name in PACKAGES),
        ("page pool", "C++" if COMPILED else "Python (no compiler, or no pybind11, when it was installed)"),
        ("CPU operators", f"{cpu_operators.why_not}: torch's ops instead" if cpu_operators.why_not else "C++ (fastattn._C)"),
        ("CUDA operators", f"{cuda_operators.why_not}: Triton's kernels instead" if cuda_operators.why_not else "C++ (fastattn._cuda)"),
    ]
    details = device_details(torch.device("cpu"))
    path = "the Triton kernels in the interpreter (TRITON_INTERPRET is set)" if INTERPRET else "torch code"
    lines.append(("cpu", f"{details['name']}, {details['cores']} cores, {torch.get_num_threads()} threads: {path}"))
    lines += [(f"cuda:{i}", _describe_gpu(torch.device("cuda", i))) for i in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        lines.append(("cuda", "no device"))
    present, absent = peers(_device(None))
    lines.append(("bench peers", ", ".join(name for name in present if name != "fastattn")))
    lines += [(f"  no {name}", reason) for name, reason in absent.items()]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    report.print_table("which code an op runs here", ("op", "on the CPU", "on CUDA"), list(_implementations()), left=3)
    return 0


# Ops of two implementations on a device: their compiled operator, and when it is the one.
_COMPILED = {
    "attention": ("attention_fwd_cpp", "short sequences with softcap, dropout, ALiBi, sinks or a window"),
    "paged_attention": ("paged_attention_cpp", "few rows of a group"),
    "append_paged_kv": ("append_paged_kv_cpp", ""),
    "sampling": ("sample_cpp", ""),
    "moe_routing": ("moe_dispatch_cpp", "the sort of slots by expert"),
}
_COMPILED_CUDA = {
    "norm": ("norm_fwd_cuda", "few rows, forward"),
    "softmax": ("softmax_fwd_cuda", "few rows, forward"),
    "paged_attention": ("paged_attention_cuda", "few rows of a group"),
    "append_paged_kv": ("append_paged_kv_cuda", "few tokens"),
    "sampling": ("sample_cuda", "few rows"),
    "moe_routing": ("moe_route_dispatch_cuda", "few slots"),
}


def _implementations():
    """(op, what runs for CPU tensors, what for CUDA ones)"""
    from fastattn.benchmarks.suite import OPS
    from fastattn.extensions import cpu_operators, cuda_operators
    from fastattn.ops.dispatch import INTERPRET

    def describe(compiled: tuple[str, str], operators, name: str, otherwise: str) -> str:
        operator, when = compiled
        if not operators.available(operator):
            return otherwise
        return f"{name}: {when}; else {otherwise}" if when else name

    for op in OPS:
        on_cpu = describe(_COMPILED.get(op, ("", "")), cpu_operators, "C++", "torch's ops")
        on_cuda = describe(_COMPILED_CUDA.get(op, ("", "")), cuda_operators, "CUDA C++", "Triton")
        yield op, on_cuda.replace("Triton", "Triton's interpreter") if INTERPRET else on_cpu, on_cuda


def _describe_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    text = f"{properties.name}, capability {properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    if importlib.util.find_spec("triton") is None:
        return f"{text}: cannot run fastattn, triton is not installed"
    from fastattn.kernels.tiles import part_of

    try:
        part = part_of((properties.major, properties.minor), properties.shared_memory_per_block_optin)
    except RuntimeError as error:
        return f"{text}: {error}"
    return f"{text}: the Triton kernels, {part} tiles"


def _verify(options: argparse.Namespace) -> int:
    from fastattn.benchmarks import report, suite
    from fastattn.benchmarks.timing import describe_error

    device = _device(options.device)
    dtypes = options.dtype or (list(suite.DTYPES) if device.type == "cuda" else ["fp32"])
    ops = suite.OPS if options.ops in ([], ["all"]) else options.ops
    if unknown := [op for op in ops if op not in suite.OPS]:
        raise SystemExit(f"fastattn verify: OP must be all or some of {', '.join(suite.OPS)}, got {unknown[0]!r}")
    cases = [(op, name, case) for op in ops for name, case in _cases(op, device)]
    selected = [case for case in cases if options.only.search(case[1])]
    if not selected:
        raise SystemExit(f"fastattn verify: --only must match a case: {', '.join(name for _, name, _ in cases)}")
    rows, red = [], 0
    with report.progress("verify", len(selected) * len(dtypes)) as step:
        for dtype, (op, name, case) in itertools.product(dtypes, selected):
            step(f"{dtype} {op} {name}")
            try:
                checks = case(suite.DTYPES[dtype])
            except NotImplementedError as error:  # of one kernel that is asked for by name, and does less than the other
                rows.append([op, name, dtype, "left out", describe_error(error), "", "", ""])
                continue
            except Exception as error:  # a case that raises is a red row; the others still run
                red += 1
                rows.append([f"!{op}", name, dtype, "!RAISED", describe_error(error), "", "", ""])
                continue
            worst = max(checks, key=lambda name: checks[name].share)
            failed = [name for name, check in checks.items() if not check.passed]
            red += bool(failed)
            verdict = f"!WRONG: {', '.join(failed)}" if failed else "ok"
            numbers = (f"{checks[worst].error:.1e}", f"{checks[worst].budget:.1e}", f"{checks[worst].share:.0%}")
            rows.append([op, name, dtype, verdict, f"{worst} (of {', '.join(checks)})", *numbers])
    header = ("op", "case", "dtype", "verdict", "worst tensor", "error", "budget", "share")
    report.print_table(f"against the float64 reference on {device}", header, rows, left=5)
    checked = sum(row[3] != "left out" for row in rows)
    print(f"{checked - red} of {checked} cases within the error budget")
    return 1 if red else 0


def _cases(op: str, device: torch.device):
    """(name, checks of a dtype) of what an op is held to: attention's options one by one, and its benchmark's smallest shapes, by each of
    our implementations."""
    from fastattn.benchmarks import suite, verification

    if op == "attention":
        for case in verification.CASES:
            yield case.name, functools.partial(verification.verify_case, case, device=device)
    found = suite.suite_of(op)
    ours = {name: builder for name, builder in found.peers(device)[0].items() if name.startswith(suite.OURS)}
    ours = {name: builder for name, builder in ours.items() if name == suite.OURS or name not in found.checked}

    def checks(shape, name: str, dtype: torch.dtype):
        return suite.verify_shape(found, shape, dtype, device, {name: ours[name]})[name]

    for shape, name in itertools.product(found.presets[device.type, "tiny"], ours):
        label = "-".join(filter(None, shape.id("").split("-"))) + name.removeprefix(suite.OURS)
        yield label, functools.partial(checks, shape, name)


def _warmup(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if device.type == "cpu":
        print("nothing to do: the CPU path compiles nothing")
        return 0
    for dtype in (torch.bfloat16, torch.float16):
        works = {f"attention D{d}": functools.partial(_warm_attention, device, dtype, d) for d in (64, 128)}
        works |= {f"decoding D{d}": functools.partial(_warm_decoding, device, dtype, d) for d in (64, 128)}
        works |= {f"rows of {n}": functools.partial(_warm_rows, device, dtype, n) for n in options.hidden_size}
        works |= {f"logits of {n}": functools.partial(_warm_logits, device, dtype, n) for n in options.vocab_size}
        works |= {f"experts {sizes}": functools.partial(_warm_experts, device, dtype, *sizes) for sizes in options.experts}
        for name, work in works.items():
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            print(f"{str(dtype).removeprefix('torch.')} {name}: {seconds:.1f} s", flush=True)
    return 0


def _warm_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    import fastattn

    for num_kv_heads, packed, causal in itertools.product((8, 2), (False, True), (False, True)):
        shape = (256,) if packed else (1, 256)
        q, k, v = (
            torch.randn(*shape, heads, head_dim, device=device, dtype=dtype).requires_grad_()
            for heads in (8, num_kv_heads, num_kv_heads)
        )
        lengths = {"max_seqlen_q": 256, "max_seqlen_k": 256} if packed else {}
        for name in ("cu_seqlens_q", "cu_seqlens_k") if packed else ():
            lengths[name] = torch.tensor([0, 100, 256], dtype=torch.int32, device=device)
        fastattn.attention(q, k, v, causal=causal, **lengths).sum().backward()
    rotary = fastattn.nn.RotaryEmbedding(head_dim, device=device)
    sum(t.sum() for t in rotary(*(torch.randn_like(t).requires_grad_() for t in (q[None], k[None])))).backward()


def _warm_decoding(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    import fastattn

    rotary = fastattn.nn.RotaryEmbedding(head_dim, device=device)
    for page_size, group, new in itertools.product((16, 64), (1, 4, 8), (1, 64)):
        cache = fastattn.PagedKVCache(1, 64, page_size, 4, head_dim, dtype=dtype, device=device)
        cache.step([cache.allocate(), cache.allocate()], new)
        for shape in ((2, new), (2 * new,)):
            k, v = torch.randn(2, *shape, 4, head_dim, device=device, dtype=dtype)
            cache.append(0, k, v, cos=rotary.cos, sin=rotary.sin)
            for num_splits in (1, 2):
                cache.attend(0, torch.randn(*shape, 4 * group, head_dim, device=device, dtype=dtype), num_splits=num_splits)


def _warm_rows(device: torch.device, dtype: torch.dtype, num_cols: int) -> None:
    import fastattn

    x, residual = torch.randn(2, 64, num_cols, device=device, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(2, num_cols, device=device, dtype=dtype, requires_grad=True)
    outs = [
        fastattn.softmax(x), fastattn.layer_norm(x, num_cols, weight, bias), fastattn.rms_norm(x, num_cols, weight),
        *fastattn.add_layer_norm(x, residual, num_cols, weight, bias), *fastattn.add_rms_norm(x, residual, num_cols, weight),
        fastattn.swiglu(x, residual), fastattn.geglu(x, residual),
    ]  # fmt: skip
    sum(out.sum() for out in outs).backward()


def _warm_experts(
    device: torch.device, dtype: torch.dtype, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int
) -> None:
    import fastattn

    layer = fastattn.nn.MoE(hidden_size, intermediate_size, num_experts, top_k, device=device, dtype=dtype)
    for rows in (1, 16, 64, 128):  # an expert, on the average: 16, 64 and more have tiles of their own, few slots a sort of theirs
        x = torch.randn(max(1, rows * num_experts // top_k), hidden_size, device=device, dtype=dtype, requires_grad=True)
        layer(x)[0].sum().backward()
        with torch.no_grad():
            layer(x)


def _warm_logits(device: torch.device, dtype: torch.dtype, vocab_size: int) -> None:
    import fastattn

    logits = torch.randn(4, vocab_size, device=device, dtype=dtype, requires_grad=True)
    fastattn.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=device)).backward()
    for options in ({}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}):
        fastattn.sample(logits.detach(), temperature=0.8, **options)
