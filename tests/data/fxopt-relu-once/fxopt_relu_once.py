"""A pass in a package of its own: a ReLU of a ReLU is the first one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fxopt.edit import Edit
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site


@dataclass(frozen=True)
class ReluOnce:
    """Remove a ReLU whose input is a ReLU's."""

    name: ClassVar[str] = "relu_once"
    preserves: ClassVar[Preserves] = Preserves.VALUES
    limit: int = 100

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        relus = [node for node in program.nodes if isinstance(program.module(node), nn.ReLU)]
        for relu in relus[: self.limit]:
            if relu.args[0] in relus:
                yield site(relu, relu.args[0])
            else:
                yield declined(program, relu, f"its input '{relu.args[0]}' is no ReLU's result")

    def rewrite(self, site: Site, edit: Edit) -> None:
        relu = edit.node(site.node)
        edit.replace_uses(relu, relu.args[0])
