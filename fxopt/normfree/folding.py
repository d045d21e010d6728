"""Standardised weights computed once and for all: for inference, in files that are written."""

from __future__ import annotations

from torch import fx

from fxopt.edit import Edit
from fxopt.program import Program
from fxopt.scaled_ws import ScaledWS, folded


def standardising(program: Program) -> list[fx.Node]:
    """The calls of layers with scaled weight standardisation."""
    return [node for node in program.nodes if isinstance(program.module(node), ScaledWS)]


def fold_call(edit: Edit, node: fx.Node | str) -> None:
    """Let ``node`` call the plain layer that computes the same; calls of one layer share it."""
    layer = edit.module(node)
    edit.replace_module(node, lambda: folded(layer), key=edit.node(node).target)


def folded_program(program: Program) -> Program:
    """``program`` with plain layers, or itself if it has no others."""
    calls = standardising(program)
    if not calls:
        return program
    edit = Edit(program)
    for node in calls:
        fold_call(edit, node)
    return edit.commit()
