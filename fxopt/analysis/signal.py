"""How the variance of activations goes through a network: signal propagation.

Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized
ResNets", ICLR 2021, section 3: by depth, the average over channels of the squared mean and of the
variance (each over ``N, H, W``), and the variance at the end of each residual branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import fx

from fxopt.analysis.bookkeeping import Bookkeeping
from fxopt.analysis.channel_axis import channel_axis
from fxopt.analysis.expectation import Expectation
from fxopt.analysis.filters import is_fixed_filter
from fxopt.analysis.training_norms import Norms, as_in_training
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.flow import Flow
from fxopt.isolation import isolated
from fxopt.layers import SkipInit
from fxopt.measured_inputs import measured_on
from fxopt.moments import Moments
from fxopt.observe import Observer
from fxopt.program import Program
from fxopt.residuals import LAYERS, ResidualBlock, is_multiple, residual_blocks

BATCH = 8
"""Inputs that are drawn where none are given."""


@dataclass(frozen=True)
class SignalRow:
    """A residual block, or a layer outside of any.

    Attributes:
        node: the block's sum, or the layer.
        path: the user's module.
        kind: ``block`` or ``layer``.
        squared_mean: the average over channels of the squared mean.
        variance: the average over channels of the variance.
        branch_variance: that of the residual branch, before skip gains and numbers scale it.
        beta_squared: the variance that bookkeeping gives, β² of a block that reads this; None
            where it cannot, and where norms were deleted.
        expected: the same with what pools and the zeros around maps do to unit normal inputs.
    """

    node: str
    path: str
    kind: str
    squared_mean: float
    variance: float
    branch_variance: float | None
    beta_squared: float | None
    expected: float | None

    @property
    def ratio(self) -> float | None:
        """Measured over expected variance."""
        return self.variance / self.expected if self.expected else None


@dataclass(frozen=True)
class SignalPropagation:
    """What was measured, in the order of execution.

    Attributes:
        model: the class of the user's model.
        inputs: what it was measured on, in words.
        norms: whether norms normalised by the batch, or were left out.
        skip_gain: what all gains of residual branches were set to; None where they have their own,
            and where there is no ``SkipInit``.
        rows: blocks and layers.
    """

    model: str
    inputs: str
    norms: Norms
    skip_gain: float | None
    rows: tuple[SignalRow, ...]

    @property
    def blocks(self) -> tuple[SignalRow, ...]:
        """The residual blocks."""
        return tuple(row for row in self.rows if row.kind == "block")


def signal_propagation(
    program: Program,
    data: Any = None,
    *,
    norms: Norms = "batch",
    skip_gain: float | None = 1.0,
    batch: int = BATCH,
) -> SignalPropagation:
    """Measure ``program`` as it is initialised, or as it is trained.

    Norms of activations normalise by the batch, as in training; dropouts do not act. Expected
    values are those of unit normal inputs, whatever is measured on.

    Args:
        program: stays as it is.
        data: inputs, as :class:`fxopt.calibration.Calibration` takes them; by default seeded unit
            normal ones of the example's size.
        norms: ``deleted`` leaves BatchNorms out.
        skip_gain: what the gains of residual branches are set to (a fresh network has 0 there,
            and nothing to see); None leaves them.
        batch: how many inputs are drawn.

    Raises:
        PreconditionError: the program is on the meta device or has nothing to look at, or the data
            does not fit it.
        ValueError: ``norms``, ``skip_gain`` or ``batch`` is none of the above.
    """
    if norms not in get_args(Norms):
        raise ValueError(f"norms is {' or '.join(get_args(Norms))}, not {norms!r}")
    if skip_gain is not None and not math.isfinite(skip_gain):
        raise ValueError(f"skip_gain is finite or None, not {skip_gain}")
    if batch < 1:
        raise ValueError(f"batch is at least 1, not {batch}")
    if program.is_on_meta:
        raise PreconditionError(
            f"{program.name} is on the meta device and has no values; build it on the CPU"
        )
    with isolated():
        if not any(isinstance(program.module(node), SkipInit) for node in program.nodes):
            skip_gain = None
        shown = program if skip_gain is None else _with_gains(program, skip_gain)
        flow = Flow(shown)
        watched = list(_watched(flow))
        if not watched:
            raise PreconditionError(f"{program.name} has no convolution or linear layer")
        inputs, batches = measured_on(shown, data, batch)
        measured = _measured(flow, watched, (flat for flat, _ in batches), norms)
        predictions: list[Expectation] = []
        if norms == "batch":
            predictions = [Bookkeeping(flow), Expectation(flow)]
        for each in predictions:
            each.run()
        rows = tuple(each.row(shown, measured, predictions) for each in watched)
    return SignalPropagation(program.name, inputs, norms, skip_gain, rows)


def _with_gains(program: Program, gain: float) -> Program:
    calls = [node for node in program.nodes if isinstance(program.module(node), SkipInit)]
    edit = Edit(program)
    for node in calls:
        old: Any = edit.module(node)
        made = SkipInit(old.alpha, gain).to(old.gain)
        edit.replace_module(node, lambda made=made: made, key=node.target)  # type: ignore[misc]
    return edit.commit()


# ---- what is looked at -------------------------------------------------------------------------


def propagated(after: Program) -> dict[str, Any]:
    """Figures for the record of a pass: the variance of each residual block of ``after``."""
    if not any(_watched(Flow(after))):
        return {}
    found = signal_propagation(after, batch=2)
    rows = [
        {
            "block": row.path or row.node,
            "beta_squared": row.beta_squared,
            "expected": row.expected,
            "measured": row.variance,
        }
        for row in found.blocks
    ]
    return {"measured_on": f"{found.inputs}, skip gains at 1", "block_variances": rows}


@dataclass(frozen=True)
class _Watched:
    node: fx.Node
    value: fx.Node
    branch: fx.Node | None

    def row(
        self, program: Program, measured: dict[fx.Node, Moments],
        predictions: Sequence[Expectation],
    ) -> SignalRow:  # fmt: skip
        found = measured[self.value]
        predicted = [each.variance(self.value) for each in predictions] or [None, None]
        return SignalRow(
            self.node.name,
            program.origins[self.node.name].path if self.node.name in program.origins else "",
            "layer" if self.branch is None else "block",
            found.mean.square().mean().item(),
            _variance(found),
            None if self.branch is None else _variance(measured[self.branch]),
            *predicted,
        )


def _variance(moments: Moments) -> float:
    return (moments.deviation / moments.count).mean().item()


def _watched(flow: Flow) -> Iterator[_Watched]:
    """Every residual sum, and every layer outside of all blocks."""
    blocks = {block.total: block for block in residual_blocks(flow)}
    inside = {node for block in blocks.values() for node in _inside(flow, block)}
    for node in flow.program.nodes:
        if node in blocks:
            yield _Watched(node, node, _unscaled(flow, blocks[node].branch))
        elif flow.kind(node) in LAYERS and node not in inside and not _is_fixed(flow, node):
            yield _Watched(node, _normed(flow, node), None)


def _is_fixed(flow: Flow, node: fx.Node) -> bool:
    return is_fixed_filter(flow.program.module(node))


def _inside(flow: Flow, block: ResidualBlock) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [block.branch, block.shortcut]
    while todo:
        node = todo.pop()
        if node is not block.entry and node not in found:
            found.add(node)
            todo += flow.operands(node)
    return found


def _unscaled(flow: Flow, branch: fx.Node) -> fx.Node:
    """The end of a residual branch before gains and factors."""
    at = branch
    while is_multiple(at) or isinstance(flow.program.module(at), SkipInit):
        (at,) = flow.operands(at)
    return at


def _normed(flow: Flow, layer: fx.Node) -> fx.Node:
    """What a layer gives, with the norm that alone reads it."""
    readers = flow.readers(layer)
    alone = len(readers) == 1 and flow.kind(readers[0]) in ("batch_norm", "norm")
    return readers[0] if alone else layer


# ---- measuring ---------------------------------------------------------------------------------


def _measured(
    flow: Flow, watched: Sequence[_Watched], batches: Iterable[Sequence[torch.Tensor]],
    norms: Norms,
) -> dict[fx.Node, Moments]:  # fmt: skip
    values = [each.value for each in watched] + [w.branch for w in watched if w.branch is not None]
    moments = {node: Moments() for node in values}
    axes = {w.value: channel_axis(flow, w.branch or w.value) for w in watched}
    axes |= {w.branch: channel_axis(flow, w.branch) for w in watched if w.branch is not None}
    observe = Observer(list(moments), as_in_training(flow.program, norms))
    for inputs in batches:
        for node, found in observe.in_lockstep([inputs]):
            if node in moments:
                moments[node].add(found[0].movedim(axes[node], 1))
    return moments
