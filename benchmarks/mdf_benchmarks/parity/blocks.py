"""An engine in; every block, decoder layer and constant of it against the reference's, out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdf_benchmarks.parity.checks import (
    CONSTANT_TOLERANCES,
    GOLDEN_TOLERANCE,
    Check,
    Fault,
    output_tolerance,
)
from mdf_benchmarks.parity.reference import Reference
from mdf_export.proof.constants import ConstantDifference, GraphDifference, compare_graphs
from mdf_export.proof.differences import (
    Difference,
    LayerDifference,
    compare_blocks,
    compare_cases,
    compare_layers,
)
from mdf_sdk.engine import Engine
from mdf_sdk.manifest import BLOCKS, GOLDEN_NAME
from mdf_sdk.sessions import Array
from mdf_sdk.verify import load_golden


def check_blocks(engine: Engine, engine_dir: Path, reference: Reference) -> list[Check]:
    """Hold each block against the reference, which feeds it: one check for each, in their order.

    A block answers for its constants and its outputs, the decoder for each of its layers too. The
    constants come first: they tell a factor of 1.02 on one weight, which four bits would hide in
    any output, and name it.
    """
    manifest = engine.manifest
    outputs = compare_blocks(engine, reference.probe.tensors)
    graphs = compare_graphs(engine_dir, manifest, reference.checkpoint)
    layers = compare_layers(engine_dir, manifest, reference.probe)
    checks = []
    for block in BLOCKS:
        precision = manifest.blocks[block].precision
        tolerance = output_tolerance(precision, engine.backend.device)
        graph = graphs.get(block, GraphDifference((), ()))
        faults = [fault for fault in map(_constant_fault, graph.constants) if fault]
        results: dict[str, Any] = {
            "precision": precision,
            "tolerance": tolerance,
            "outputs": {name: d.to_dict() for name, d in outputs[block].items()},
            "constants": _summarize(graph.constants),
        }
        if block == "decoder":
            # They run on the CPU, whatever runs the engine.
            own = output_tolerance(precision, "cpu")
            faults += _layer_faults(layers, own)
            results["layers"] = [_layer_dict(layer) for layer in layers]
        faults += [Fault(name, "another node or none", "the model's") for name in graph.nodes]
        faults += [
            _too_far(f"output {name}", difference, tolerance)
            for name, difference in outputs[block].items()
            if not difference.relative_l2 <= tolerance
        ]
        checks.append(Check(block, tuple(faults), results))
    return checks


def check_golden(engine_dir: Path, reference: Reference) -> Check:
    """Show that golden.npz, which `mdf verify` goes by without torch, is the reference's."""
    found = load_golden(engine_dir / GOLDEN_NAME)
    faults, worst = [], 0.0
    for number, due in enumerate(reference.golden):
        tensors = found.get(number, {})
        for name, expected in due.items():
            where = f"{GOLDEN_NAME}, case{number}/{name}"
            if name not in tensors or tensors[name].shape != expected.shape:
                faults.append(Fault(where, "none of this shape", "the reference's"))
                continue
            error = _golden_error(tensors[name], expected)
            worst = max(worst, error)
            if not error <= GOLDEN_TOLERANCE:
                faults.append(
                    Fault(where, f"relative L2 {error:.2e}", f"{GOLDEN_TOLERANCE:g} at most")
                )
    results = {
        "cases": len(reference.golden),
        "relative_l2": worst if np.isfinite(worst) else None,
        "tolerance": GOLDEN_TOLERANCE,
    }
    return Check("golden", tuple(faults), results)


def _golden_error(found: Array, expected: Array) -> float:
    if expected.dtype.kind != "f":
        return 0.0 if (found == expected).all() else float("inf")
    error = compare_cases([(found, expected)]).relative_l2
    return error if np.isfinite(error) else float("inf")


def _constant_fault(constant: ConstantDifference) -> Fault | None:
    if constant.kind == "missing":
        return Fault(constant.name, "no such constant", "it")
    if constant.kind == "index":
        same = constant.relative_l2 == 0
        return None if same else Fault(constant.name, "other indices or shapes", "the model's")
    limit = CONSTANT_TOLERANCES[constant.kind]
    measures = (
        (
            constant.spread,
            limit.spread,
            f"groups whose scales are off by {constant.spread:.3f}",
            f"{limit.spread:g} at most",
        ),
        (
            abs(constant.gain - 1),
            limit.gain,
            f"weights {constant.gain:.4f} times the checkpoint's",
            f"1 within {limit.gain:g}",
        ),
        (
            constant.relative_l2,
            limit.relative_l2,
            f"relative L2 {constant.relative_l2:.2e} off the checkpoint's",
            f"{limit.relative_l2:g} at most",
        ),
    )
    for value, most, found, expected in measures:
        if not value <= most:  # NaN too
            return Fault(constant.name, found, f"{expected}, for {constant.kind}")
    return None


def _layer_faults(layers: Iterable[LayerDifference], tolerance: float) -> list[Fault]:
    faults = []
    for layer in layers:
        parts = ((", cross-attention", layer.cross), ("", layer.own))
        faults += [
            _too_far(f"layer {layer.layer}{part}", difference, tolerance)
            for part, difference in parts
            if difference is not None and not difference.relative_l2 <= tolerance
        ]
    return faults


def _too_far(where: str, difference: Difference, tolerance: float) -> Fault:
    if not np.isfinite(difference.relative_l2):
        return Fault(where, "NaN or infinity", "finite values")
    return Fault(where, f"relative L2 {difference.relative_l2:.2e}", f"{tolerance:g} at most")


def _layer_dict(layer: LayerDifference) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "stream": layer.stream.to_dict(),
        "own": layer.own.to_dict(),
        "cross_attention": None if layer.cross is None else layer.cross.to_dict(),
    }


def _summarize(constants: Sequence[ConstantDifference]) -> Mapping[str, Any]:
    """By kind: how many, and the worst of each measure."""
    summary = {}
    for kind in dict.fromkeys(constant.kind for constant in constants):
        of_kind = [constant for constant in constants if constant.kind == kind]
        worst = {
            "relative_l2": float(np.max([c.relative_l2 for c in of_kind])),
            "gain_off_1": float(np.max([abs(c.gain - 1) for c in of_kind])),
            "spread": float(np.max([c.spread for c in of_kind])),
        }
        summary[kind] = {
            "n": len(of_kind),
            **{name: value if np.isfinite(value) else None for name, value in worst.items()},
        }
    return summary
