"""Inverted residual blocks, found by structure (Sandler et al., MobileNetV2, 2018, section 3.3).

A block is an expansion 1×1, a depthwise k×k, perhaps a squeeze-excite gate, and a linear projection
1×1, each with its norm or with a norm folded in, the first two with any activation. Without the
expansion it is a block of ratio 1 (a depthwise convolution and a linear projection). Fused, a full
k×k convolution stands in place of expansion and depthwise (Tan & Le, EfficientNetV2, 2021,
figure 2). Names of models and of modules say nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx, nn

from fxopt.blocks import FUSED_MBCONV, MBCONV, Gate, InvertedResidual, Layer, NearMiss
from fxopt.flow import Flow
from fxopt.layers import standard_kind
from fxopt.obstacles import is_quantiser, named, obstacle
from fxopt.program import Origin, Program
from fxopt.scaled_ws import ScaledWSConv2d
from fxopt.spans import ELEMENTWISE, gate_of, is_activation, operand

_SHARED = ("dropout", "opaque", "elementwise")
"""What may stand between a projection and its residual sum: stochastic depth, a layer scale."""


class _Differs(Exception):
    """The reason for which a convolution is in no block."""


def inverted_residuals(program: Program) -> tuple[InvertedResidual | NearMiss, ...]:
    """The blocks of ``program`` in its order, and every depthwise convolution that is in none."""
    flow = Flow(program)
    found: list[InvertedResidual | NearMiss] = []
    projections: set[fx.Node] = set()
    for node in program.nodes:
        if flow.kind(node) == "depthwise":
            try:
                found.append(_mbconv(flow, node, projections))
            except _Differs as reason:
                found.append(NearMiss(node, str(reason)))
        elif flow.kind(node) == "conv2d":
            found += _fused(flow, node)
        if found and isinstance(found[-1], InvertedResidual) and found[-1].project is not None:
            projections.add(found[-1].project.conv)
    return tuple(_numbered(program, found))


def _numbered(
    program: Program, found: list[InvertedResidual | NearMiss]
) -> Iterator[InvertedResidual | NearMiss]:
    stage = 0
    given: object = None
    blocks = [each for each in found if isinstance(each, InvertedResidual)]
    homes = Counter(_home(program, block) for block in blocks)
    inside = {parent for home in homes for parent in _parents(home)}
    for each in found:
        if isinstance(each, NearMiss):
            yield each
            continue
        home = _home(program, each)
        own = home and homes[home] == 1 and home not in inside
        conv = each.spatial.conv
        path = home if own else program.origins.get(conv.name, Origin()).path or conv.name
        read, gives = (program.types[node.name].shape for node in (each.entry, each.end))
        if read != gives or read != given:
            stage += 1
        given = gives
        yield replace(each, stage=stage, path=path)


def _home(program: Program, block: InvertedResidual) -> str:
    """The module that holds all layers of ``block``, which others may be in too."""
    layers = (block.expand, block.spatial, block.project)
    paths = [program.origins.get(each.conv.name, Origin()).path for each in layers if each]
    split = [path.split(".") for path in paths]
    columns = takewhile(lambda atoms: len(set(atoms)) == 1, zip(*split, strict=False))
    return ".".join([atoms[0] for atoms in columns] if len(split) > 1 else split[0][:-1])


def _parents(path: str) -> list[str]:
    atoms = path.split(".")
    return [".".join(atoms[:depth]) for depth in range(len(atoms))]


# ---- MBConv: from the depthwise convolution upwards, then downwards ----------------------------


def _mbconv(flow: Flow, node: fx.Node, projections: set[fx.Node]) -> InvertedResidual:
    conv: Any = flow.program.module(node)
    if conv is None:
        raise _Differs("its weight is computed by the forward")
    if not isinstance(conv.weight, nn.Parameter):
        raise _Differs("its kernel is a buffer, a fixed filter that is not trained")
    if len(flow.program.types[node.name].shape) != 4:
        raise _Differs("it is no convolution over rows and columns")
    spatial = _layer(flow, node)
    pad, read = _pad_before(flow, node)
    bare = InvertedResidual(MBCONV, read, None, (), pad, spatial, (), None, (), None)
    block = _projected(flow, bare)
    expand, inner = _expansion(flow, read)
    ends = expand is not None and _is_a_blocks_end(flow, expand, inner, projections)
    if expand is None:
        _no_expansion_above(flow, read, projections)
    elif not ends and not _is_separable(flow, expand, block):
        entry = operand(expand.conv)
        block = replace(block, entry=entry, expand=expand, inner=inner)
    inverted = block.expand is not None and _widens(flow, block.entry, block.expand.conv, block.end)
    if not inverted and _is_activated(flow, block.end):
        raise _Differs("its pointwise convolution is not linear: an activation follows it")
    block = replace(block, residual=_residual(flow, block))
    linear = not (block.expand or block.activation or block.final)
    if linear and not _is_on_the_way(flow, block):
        raise _Differs("with the pointwise convolution it is a linear branch beside others")
    return replace(block, obstacle=obstacle(flow, block))


def _no_expansion_above(flow: Flow, read: fx.Node, projections: set[fx.Node]) -> None:
    """Raises where ``read`` comes from a pointwise convolution that widens, in a way of its own."""
    between: list[fx.Node] = []
    at = read
    while flow.kind(at) != "conv2d":
        start = flow.before(at)
        span = () if start is None else flow.above(start, at)
        alone = len(span) == 1 or is_activation(flow, span)
        if start is None or not alone or not {*span}.issuperset(flow.readers(start)):
            return
        between = [*span, *between]
        at = start
    if at in projections or not _widens_pointwise(flow, at):
        return
    odd = [each for each in between if not _is_plain(flow, each)]
    if any(flow.kind(each) in ("pool", "resize", "concat") for each in odd):
        return
    if odd and is_quantiser(flow.program, odd[0]):
        raise _Differs(f"{named(odd[0])} quantises it; fuse before quantising")
    if odd:
        raise _Differs(f"{named(odd[0])} stands between its expansion {named(at)} and it")
    raise _Differs(f"its expansion {named(at)} has groups, or a weight that the forward computes")


def _widens_pointwise(flow: Flow, conv: fx.Node) -> bool:
    """Whether ``conv``, whatever its groups and its weight, is 1×1, has no stride and widens."""
    types, module = flow.program.types, flow.program.module(conv)
    weight: Any = types.get(str(conv.args[1])) if module is None else module.weight
    read, gives = types[operand(conv).name].shape, types[conv.name].shape
    pointwise = weight is not None and set(weight.shape[2:]) == {1} and read[2:] == gives[2:]
    return pointwise and bool(gives[1] > read[1])


def _is_plain(flow: Flow, node: fx.Node) -> bool:
    return flow.kind(node) in ("batch_norm", "norm") or is_activation(flow, (node,))


def _is_a_blocks_end(
    flow: Flow, layer: Layer, inner: tuple[fx.Node, ...], projections: set[fx.Node]
) -> bool:
    """Whether a pointwise convolution is an earlier block's projection.

    So is one that gives a linear map which others read too, a residual sum say.
    """
    return layer.conv in projections or (not inner and len(flow.readers(layer.last)) > 1)


def _is_separable(flow: Flow, expand: Layer, block: InvertedResidual) -> bool:
    """Whether ``expand`` belongs to a depthwise convolution that it reads: nothing is inverted.

    Xception's separable convolutions in a row are so; what MobileNetV4 expands is wider than both
    ends of its block.
    """
    read = operand(expand.conv)
    before = operand(read) if flow.kind(read) in ("batch_norm", "norm") else read
    return flow.kind(before) == "depthwise" and not _widens(flow, read, expand.conv, block.end)


def _widens(flow: Flow, entry: fx.Node, inside: fx.Node, end: fx.Node) -> bool:
    """Whether ``inside`` has more channels than both ends of a block."""
    widths = [flow.program.types[node.name].shape[1] for node in (entry, inside, end)]
    return bool(widths[1] > max(widths[0], widths[2]))


def _is_on_the_way(flow: Flow, block: InvertedResidual) -> bool:
    """Whether all that the network computes goes through ``block`` or around it, in a residual."""
    return _has_shortcut(block) or flow.on_every_path(block.end)


def _has_shortcut(block: InvertedResidual) -> bool:
    """Whether the residual sum adds what ``block`` reads as it is."""
    return block.residual is not None and block.entry in block.residual.all_input_nodes


def _layer(flow: Flow, conv: fx.Node) -> Layer:
    readers = flow.readers(conv)
    alone = len(readers) == 1 and flow.kind(readers[0]) in ("batch_norm", "norm")
    return Layer(conv, readers[0] if alone else None)


def _pad_before(flow: Flow, node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    read = operand(node)
    return (read, operand(read)) if flow.kind(read) == "pad" else (None, read)


def _expansion(flow: Flow, read: fx.Node) -> tuple[Layer | None, tuple[fx.Node, ...]]:
    """The pointwise convolution whose activated result ``read`` is, and that activation."""
    inner: tuple[fx.Node, ...] = ()
    at = read
    while is_activation(flow, (at,)):
        start = flow.before(at)
        span = () if start is None else flow.above(start, at)
        if start is None or not is_activation(flow, span):
            return None, ()
        at = start
        inner = (*span, *inner)
    norm = at if flow.kind(at) in ("batch_norm", "norm") else None
    conv = at if norm is None else operand(norm)
    if conv is None or not _is_pointwise(flow, conv):
        return None, ()
    return Layer(conv, norm), inner


def _is_pointwise(flow: Flow, node: fx.Node) -> bool:
    conv: Any = flow.program.module(node)
    if conv is None or standard_kind(conv) not in (nn.Conv2d, ScaledWSConv2d):
        return False
    plain = set(conv.stride) == {1} and conv.padding in ((0, 0), "valid", "same")
    return set(conv.kernel_size) == {1} and plain and conv.groups == 1


def _projected(flow: Flow, begun: InvertedResidual) -> InvertedResidual:
    """``begun`` with what follows its spatial convolution, as far as the projection."""
    activation: tuple[fx.Node, ...] = ()
    final: tuple[fx.Node, ...] = ()
    gate: Gate | None = None
    at = begun.spatial.last
    while True:
        reader = flow.after(at)
        if reader is None:
            raise _Differs(_astray(flow, at))
        if _is_pointwise(flow, reader) and flow.readers(at) == [reader]:
            project = _layer(flow, reader)
            return replace(begun, activation=activation, gate=gate, final=final, project=project)
        span = flow.between(at, reader) if flow.dominates(at, reader) else ()
        found = gate_of(flow, at, span) if gate is None else None
        if found is not None:
            gate = found
        elif not is_activation(flow, span):
            raise _Differs(_astray(flow, at))
        elif gate is None:
            activation = (*activation, *span)
        else:
            final = (*final, *span)
        at = reader


def _astray(flow: Flow, at: fx.Node) -> str:
    readers = flow.readers(at)
    if len(readers) > 1:
        both = " and ".join(named(each) for each in readers[:2])
        return f"{named(at)} is read by {both}"
    (reader,) = readers
    what = f"{named(reader)} ({flow.kind(reader) or 'output'})"
    return f"{named(at)} goes to {what}, not to a linear pointwise convolution"


def _is_activated(flow: Flow, end: fx.Node) -> bool:
    reader = flow.after(end)
    span = () if reader is None else flow.between(end, reader)
    only = all(flow.kind(each) in ELEMENTWISE for each in span)
    own = reader is not None and flow.dominates(end, reader)
    return only and own and any(flow.kind(each) == "activation" for each in span)


def _residual(flow: Flow, block: InvertedResidual) -> fx.Node | None:
    """The sum of the block's end, perhaps dropped or scaled, and of what the block came from."""
    at = block.end
    while True:
        reader = flow.after(at)
        if reader is None or reader not in flow.readers(at):
            return None
        if reader.target is torch.add:
            start = flow.before(reader)
            return reader if start is not None and flow.dominates(start, block.entry) else None
        if flow.readers(at) != [reader] or flow.kind(reader) not in _SHARED:
            return None
        at = reader


# ---- Fused-MBConv -----------------------------------------------------------------------------


def _fused(flow: Flow, node: fx.Node) -> Iterator[InvertedResidual]:
    """The fused block whose full convolution ``node`` is, if it is one."""
    conv: Any = flow.program.module(node)
    if conv is None or conv.groups != 1 or set(conv.weight.shape[2:]) == {1}:
        return
    spatial = _layer(flow, node)
    pad, entry = _pad_before(flow, node)
    block = InvertedResidual(FUSED_MBCONV, entry, None, (), pad, spatial, (), None, (), None)
    try:
        found = _projected(flow, block)
    except _Differs:
        single = _single(flow, block, conv)
        if single is not None:
            yield single
        return
    expands = _widens(flow, entry, node, found.end) and not _is_activated(flow, found.end)
    if getattr(conv, "block", "") == FUSED_MBCONV or (expands and found.activation):
        yield replace(found, residual=_residual(flow, found))


def _single(flow: Flow, block: InvertedResidual, conv: Any) -> InvertedResidual | None:
    """A fused block of ratio 1: one convolution, perhaps activated, in a residual sum."""
    end = block.end
    reader = flow.after(end)
    span = () if reader is None else flow.between(end, reader)
    if span and all(flow.kind(each) == "activation" for each in span):
        end = span[-1]
    residual = _residual(flow, replace(block, spatial=Layer(block.spatial.conv, end)))
    single = replace(block, activation=span if end in span else (), residual=residual)
    is_block = getattr(conv, "block", "") == FUSED_MBCONV
    return single if is_block or (single.activation and _has_shortcut(single)) else None
