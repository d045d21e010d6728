"""Random inverted residual blocks, fused in every way: exact where that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from inverted import Block, Net, swish, unchanged
from seeded import image, seeded
from torch import nn

import fxopt
from fxopt.passes import FuseMBConv

SHAPE, OTHER = (2, 3, 13, 17), (1, 3, 18, 14)
ACTIVATIONS = [F.relu, F.relu6, swish, F.hardswish, torch.sigmoid]
PADS = [
    None, None, lambda x: F.pad(x, (0, 1, 2, 1)), nn.ZeroPad2d(1), nn.ReflectionPad2d((2, 1, 0, 1)),
    lambda x: F.pad(x, (1, 1, 2, 2), mode="replicate"), nn.CircularPad2d(1),
]  # fmt: skip


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    pair = st.tuples(st.integers(1, 5), st.integers(1, 5))
    linear, found, width = draw(st.booleans()), [], 6
    for _ in range(draw(st.integers(1, 2))):
        outputs = draw(st.sampled_from([width, width, width + 2]))
        options: dict[str, Any] = {
            "ratio": draw(st.sampled_from([1, 3])), "kernel": draw(pair),
            "stride": draw(st.sampled_from([1, 2, (1, 3)])), "before": draw(st.sampled_from(PADS)),
            "se": draw(st.booleans()), "norm": draw(st.sampled_from([True, True, False])),
            "act": draw(st.sampled_from(ACTIVATIONS)), "padding": draw(st.sampled_from([0, 1, 2, (2, 0)])),
            "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"])),
        }  # fmt: skip
        if options["stride"] == 1 and draw(st.booleans()):
            options["padding"] = "same"
        if linear:  # of ratio 1 the activation stands where the exact composition needs none
            options |= {"act": unchanged} if options["ratio"] == 1 else {"inner": unchanged}
        found.append(Block(width, outputs, **options))
        width = outputs
    return found


@pytest.mark.parametrize("weights", ["compose", "linearize", "fit", "random"])
@settings(max_examples=12, deadline=None)
@given(blocks=blocks(), kernel=st.sampled_from(["keep", 3]), se=st.sampled_from(["keep", "drop"]))
def test_fused_or_refused(weights: str, blocks: list[Block], kernel: Any, se: Any) -> None:
    """The driver proves what is promised; the rest has the original's shapes at other sizes too."""
    model = seeded(Net(blocks, last=blocks[-1].project.out_channels))
    program = fxopt.capture(model, image(*SHAPE))
    calibration = image(50, *SHAPE[1:], seed=3) if weights == "fit" else None
    which = FuseMBConv(
        blocks="blocks", weights=weights, kernel=kernel, se=se, calibration=calibration
    )  # type: ignore
    try:
        result = fxopt.run_pass(which, program)
    except fxopt.PreconditionError:
        return
    maps = [_maps(each, image(*OTHER)) for each in (program, result.after)]
    assert maps[0] == maps[1]
    for error in result.evidence.get("block_errors", {}).values():
        assert error <= 1 + 1e-3  # a constant is one of the convolutions; the ridge costs little


def _maps(program: fxopt.Program, x: torch.Tensor) -> list[torch.Size]:
    """The shapes of the residual sums and of what is averaged for the classifier."""
    shapes: dict[str, torch.Size] = {}

    class Kept(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            shapes[node.name] = getattr(value, "shape", torch.Size())
            return value

    Kept(program.graph_module).run(x)
    head = next(node for node in program.nodes if node.target == "head")
    last = head.all_input_nodes[0].all_input_nodes[0]
    sums = [node for node in program.nodes if node.target is torch.add]
    return [shapes[node.name] for node in (*sums, last)]
