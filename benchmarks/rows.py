"""What the benchmarks of row ops share: shapes, variants, peers, traffic.

A variant is one function of an op's family (rms_norm, add_rms_norm, …) with everything that competes with it, each called with the
same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .models import MODELS, Model, labelled
from .suite import COPY, OURS, Builder, Forward, Suite, backends, find_peers

ROW_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
ELEMENTS_AT_MOST = 1 << 31  # of one tensor on a GPU: 16384 rows of 131072, as published figures have them


def forward_only(wrap: Callable[[Callable], Forward]) -> Callable[[Callable], Forward]:
    """For a peer without a backward: its outputs carry no gradient, so that it is held to the forward's mode."""
    return lambda function: torch.no_grad()(wrap(function))


@dataclass(frozen=True)
class RowShape:
    """num_rows rows of num_cols columns, for one function of the family."""

    function: str
    num_rows: int
    num_cols: int
    model: str = ""

    def id(self, dtype: str) -> str:
        return labelled(self.model, f"{self.function}-M{self.num_rows}-N{self.num_cols}-{dtype}")


@dataclass(frozen=True)
class Variant:
    """One function: draw(shape, randn) gives its inputs and an upstream gradient for each output; implementations and reference take
    the inputs; traffic is how many (M, N) tensors the forward and the backward read and write, flops what they compute an element, where
    the suite does not count both by the shape."""

    draw: Callable[[Any, Callable[..., Tensor]], tuple[list[Tensor], list[Tensor]]]
    reference: Forward
    ours: Forward
    traffic: tuple[float, float] = (0, 0)
    flops: tuple[float, float] = (0, 0)
    torch: Forward | None = None
    others: Mapping[str, tuple[str, str, Callable[..., Forward]]] = field(default_factory=dict)  # name → module, name, wrap(it)
    has_backends: bool = False  # ours takes backend=, as there are two kernels


def row_presets(
    functions: Sequence[str], lengths: Sequence[int] = ROW_LENGTHS, rows: int = 32768,
    of_model: Callable[[Model], Sequence[tuple[str, int]]] = lambda model: (),
) -> dict:
    """Presets of every function over row lengths; of_model: the (function, row length) pairs that a model has."""

    def shapes(num_rows: int, lengths: Sequence[int]) -> list[RowShape]:
        return [
            RowShape(name, max(1, min(num_rows, ELEMENTS_AT_MOST // n)), n) for name in functions for n in lengths
        ]

    def model_shapes(num_rows: int) -> list[RowShape]:
        return [RowShape(name, num_rows, n, model.name) for model in MODELS for name, n in of_model(model)]

    return {
        ("cpu", "model"): model_shapes(512),
        ("cuda", "model"): model_shapes(8192),
        ("cpu", "tiny"): shapes(5, [min(lengths) // 2, min(lengths) + 2]),
        ("cpu", "quick"): shapes(256, [n for n in lengths if n in (1024, 8192, 32768)] or lengths[:2]),
        ("cpu", "full"): shapes(1024, [n for n in lengths if n <= 65536]),
        ("cuda", "tiny"): shapes(64, lengths[:2]),
        ("cuda", "quick"): shapes(rows, [n for n in lengths if n in (1024, 4096, 16384, 131072)] or lengths[:2]),
        ("cuda", "full"): shapes(rows, lengths),
    }


def row_suite(op: str, variants: Mapping[str, Variant], presets: dict, overhead: Callable, **options: Any) -> Suite:
    """The Suite of a family of row functions."""

    def peers(device: torch.device) -> tuple[dict[str, Builder], dict[str, str]]:
        def pick(attribute: str) -> Builder:
            def build(shape: RowShape) -> Forward:
                forward = getattr(variants[shape.function], attribute)
                if forward is None:
                    raise NotImplementedError(f"nothing of this name in {shape.function}")
                return forward

            return build

        def compiled(shape: RowShape) -> Forward:
            torch.compiler.reset()  # past its recompilation limit, dynamo would run the uncompiled function without an error
            return torch.compile(pick("torch")(shape), dynamic=False, fullgraph=True)

        candidates = {OURS: pick("ours"), "naive": pick("reference"), "torch": pick("torch")}
        requires: dict[str, tuple[str, str]] = {}
        if any(variant.has_backends for variant in variants.values()):
            candidates |= {f"{OURS} ({backend})": on(backend) for backend in backends(device)}
        if device.type == "cuda":
            candidates["torch.compile"] = compiled
            for variant in variants.values():
                for name, (module, attribute, _) in variant.others.items():
                    candidates[name], requires[name] = other(name), (module, attribute)
        return find_peers(candidates, requires)

    def on(backend: str) -> Builder:
        def build(shape: RowShape) -> Forward:
            if not variants[shape.function].has_backends:
                raise NotImplementedError("there is one kernel")
            return partial(variants[shape.function].ours, backend=backend)

        return build

    def other(name: str) -> Builder:
        def build(shape: RowShape) -> Forward:
            from .suite import import_name

            module, attribute, wrap = variants[shape.function].others[name]
            return wrap(import_name(module, attribute))

        return build

    def draw(shape: RowShape, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int, dtype: torch.dtype = dtype, learnt: bool = True) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype).requires_grad_(learnt)

        randn.generator, randn.device = generator, device
        return variants[shape.function].draw(shape, randn)

    def reference(
        shape: RowShape, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        cast = [
            t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs
        ]
        result = variants[shape.function].reference(*cast)
        outs = [result] if isinstance(result, Tensor) else list(result)
        learnt = [t for t in cast if t.requires_grad]
        upstream = [t.to(out.dtype) for t, out in zip(upstream, outs)]  # none where nothing is learnt
        grads = torch.autograd.grad(outs, learnt, upstream) if learnt else ()
        names = [f"out{i}" for i in range(len(outs))] + [f"d{i}" for i, t in enumerate(cast) if t.requires_grad]
        return dict(zip(names, [*(out.detach() for out in outs), *grads], strict=True))

    def traffic(shape: RowShape, mode: str, itemsize: int) -> float:
        # tensors of M·N elements that have to be read or written once each
        return _of_mode(variants[shape.function].traffic, mode) * shape.num_rows * shape.num_cols * itemsize

    def flops(shape: RowShape, mode: str) -> float:
        # each element of M·N takes this many
        return _of_mode(variants[shape.function].flops, mode) * shape.num_rows * shape.num_cols

    return Suite(
        op=op, presets=presets, peers=peers, draw=draw, reference=reference, overhead=overhead,
        **{
            "traffic": traffic, "flops": flops, "ceiling": COPY, "x_label": "columns",
            "panel": lambda row: (row["function"], row["num_cols"]), **options,
        },
    )  # fmt: skip


def _of_mode(figures: tuple[float, float], mode: str) -> float:
    """Of (forward, backward): one of them, or both."""
    forward, backward = figures
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
