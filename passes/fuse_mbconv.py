"""Replace MBConv by Fused-MBConv (Tan & Le, EfficientNetV2, 2021, section 3.2).

Expansion 1×1 and depthwise k×k become one full k×k convolution: more MACs, and in early layers,
whose few channels leave depthwise hardware idle, less time. A block of ratio 1 becomes one k×k
convolution. Blocks are found by structure (:mod:`fxopt.patterns`); where their weights come from
is in :mod:`fxopt.fusing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from fxopt.analysis.cost import cost
from fxopt.blocks import MBCONV, InvertedResidual, NearMiss
from fxopt.calibration import Calibration
from fxopt.edit import Edit
from fxopt.errors import PreconditionError
from fxopt.fusing.form import Form, Weights
from fxopt.fusing.fuse import fuse
from fxopt.fusing.measure import Measurements, measured
from fxopt.fusing.options import Count, Stages
from fxopt.fusing.reconstruction import reconstruction
from fxopt.fusing.refused import why_not
from fxopt.obstacles import named
from fxopt.paths import Paths
from fxopt.patterns import inverted_residuals
from fxopt.program import Program
from fxopt.results import Declined
from fxopt.rewrite import Preserves, Site, declined, site

EARLY = 3
"""Stages that are fused unless told: what EfficientNetV2 found best (table 3)."""


@dataclass(frozen=True)
class _Choice:
    """The blocks of a program, which of them are fused into what, and why others are not."""

    blocks: tuple[InvertedResidual | NearMiss, ...]
    forms: Mapping[InvertedResidual, Form]
    refused: Mapping[InvertedResidual, str]
    measurements: Measurements | None = None


_CHOICES: WeakKeyDictionary[Program, dict[FuseMBConv, _Choice]] = WeakKeyDictionary()
"""What the sites of a program were, until its evidence is asked for."""


@dataclass(frozen=True)
class FuseMBConv:
    """Replace expansion and depthwise convolution by one full convolution, and train faster.

    ``stages`` (by default the first three), ``blocks``, or ``select=measured``: the set that is
    fastest here within ``max_params`` and ``max_macs`` of the whole network; its table is read
    from ``measurements`` if there is such a file, and else written there. ``kernel`` 3 crops larger
    kernels. ``weights`` are fitted by least squares where there is ``calibration`` data, and else
    linearised.
    """

    name: ClassVar[str] = "fuse_mbconv"
    once: ClassVar[bool] = True
    preserves: ClassVar[Preserves] = Preserves.INTERFACE
    stages: Stages | None = None
    blocks: Paths | None = None
    select: Literal["measured"] | None = None
    kernel: Literal["keep", 3] = "keep"
    se: Literal["keep", "drop"] = "keep"
    weights: Weights | None = None
    calibration: Calibration | None = None
    max_params: Count | None = None
    max_macs: Count | None = None
    measurements: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _OPTION_CLASSES.items():
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))
        if sum(each is not None for each in (self.stages, self.blocks, self.select)) > 1:
            raise ValueError("give one of stages, blocks and select")
        for name in ("max_params", "max_macs", "measurements"):
            if getattr(self, name) is not None and self.select is None:
                raise ValueError(f"{name} goes with select=measured")
        if self.weights is Weights.FIT and self.calibration is None:
            raise ValueError("weights=fit needs calibration data; give some, or weights=linearize")
        words = {"kernel": ("keep", 3), "se": ("keep", "drop"), "select": (None, "measured")}
        for name, allowed in words.items():
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} is {' or '.join(map(str, allowed))}, not {given!r}")

    def sites(self, program: Program) -> Iterator[Site | Declined]:
        choice = self._chosen(program)
        _CHOICES.setdefault(program, {})[self] = choice
        for block in choice.blocks:
            if isinstance(block, NearMiss):
                yield declined(program, block.node, block.reason)
            elif block in choice.forms:
                form = choice.forms[block]
                exact = Preserves.VALUES if form.is_exact else None
                nodes = (block.spatial.conv, *block.nodes, *_sizes(block))
                yield site(*nodes, facts=form, preserves=exact)
            elif block.kind == MBCONV:
                yield declined(program, block.spatial.conv, choice.refused[block])

    def rewrite(self, site: Site, edit: Edit) -> str | None:
        form: Form = site.facts
        fuse(form, edit)
        block = form.block
        rows, cols = form.kernel
        widths = [edit.program.types[n.name].shape[1] for n in (block.entry, block.end)]
        how = f"{rows}x{cols}, {widths[0]} to {widths[1]} channels, {form.weights.value}"
        if form.is_exact:
            how += ", exact"
        elif form.drops_activation:
            how += "; what was nonlinear in between is dropped"
        return f"stage {block.stage}: {how}"

    def evidence(self, before: Program, after: Program) -> Mapping[str, Any]:
        """Parameters and MACs, each block's error on the calibration data, the measurements."""
        choice = _CHOICES[before].pop(self)
        was, now = cost(before), cost(after)
        figures: dict[str, Any] = {
            "parameters": {"before": was.parameters, "after": now.parameters},
            "macs": {"before": was.macs, "after": now.macs},
        }
        if self.calibration is not None:
            blocks = [form.block for form in choice.forms.values()]
            figures |= reconstruction(before, after, blocks, self.calibration)
        if choice.measurements is not None:
            table = choice.measurements.to_dict()
            rows = table.pop("rows")
            figures |= {"measured": table, "measurements": rows}
        return figures

    def _chosen(self, program: Program) -> _Choice:
        """What is fused into what.

        Raises:
            PreconditionError: nothing can be, or what the user names does not exist.
        """
        found = inverted_residuals(program)
        blocks = [each for each in found if isinstance(each, InvertedResidual)]
        if self._needs_values and program.is_on_meta:
            raise PreconditionError(
                f"fuse_mbconv cannot run {program.name}, which is on the meta device; use "
                "weights=random there, and stages or blocks"
            )
        wanted = self._wanted(blocks)
        forms: dict[InvertedResidual, Form] = {}
        refused: dict[InvertedResidual, str] = {}
        for block in blocks:
            form = self._form(program, block)
            reason = wanted.get(block, "") or why_not(program, form)
            if reason:
                refused[block] = reason
            else:
                forms[block] = form
        candidates = [block for block in blocks if block.kind == MBCONV]
        if not forms:
            raise PreconditionError(_nothing(program, found, candidates, refused))
        if self.select is None:
            return _Choice(found, forms, refused)
        table = measured(program, tuple(forms.values()), self.measurements)
        names = table.best(cost(program), self.max_params, self.max_macs)
        slow = [block for block in forms if block.spatial.conv.name not in names]
        slower = dict.fromkeys(slow, "it is not of the set that is fastest within the budget")
        forms = {block: form for block, form in forms.items() if block not in slower}
        return _Choice(found, forms, refused | slower, table)

    @property
    def _needs_values(self) -> bool:
        return self.select is not None or self.calibration is not None

    def _form(self, program: Program, block: InvertedResidual) -> Form:
        largest = None if self.kernel == "keep" else 3
        default = Weights.LINEARIZE if self.calibration is None else Weights.FIT
        weights = default if self.weights is None else self.weights
        return Form.of(program, block, largest, self.se == "keep", weights, self.calibration)

    def _wanted(self, blocks: Sequence[InvertedResidual]) -> dict[InvertedResidual, str]:
        """Why each block is not asked for; empty for those that are."""
        if self.select is not None:
            return {}
        if self.blocks is not None:
            return _by_path(blocks, self.blocks)
        there = {block.stage for block in blocks}
        numbers = Stages(f"1-{EARLY}").numbers if self.stages is None else self.stages.numbers
        missing = sorted(numbers - there)
        if missing and self.stages is not None and blocks:
            raise PreconditionError(
                f"fuse_mbconv: there is no stage {missing[0]}; there are stages "
                f"{min(there)} to {max(there)}: {_stages_text(blocks)}"
            )
        asked = self.stages or f"1-{EARLY}"
        left = [block for block in blocks if block.stage not in numbers]
        return {block: f"stage {block.stage}, not of stages={asked}" for block in left}


_OPTION_CLASSES: Mapping[str, Any] = {
    "stages": Stages, "blocks": Paths, "weights": Weights, "calibration": Calibration,
    "max_params": Count, "max_macs": Count,
}  # fmt: skip


def _sizes(block: InvertedResidual) -> list[Any]:
    """The nodes that read sizes of inner values; those of the end read what they did."""
    users = (user for node in block.nodes for user in node.users)
    return [u for u in dict.fromkeys(users) if u.target == "size" and u not in block.end.users]


def _by_path(blocks: Sequence[InvertedResidual], paths: Paths) -> dict[InvertedResidual, str]:
    for name in paths.names:
        if not any(Paths(name).holding(block.path) for block in blocks):
            known = ", ".join(block.path for block in blocks) or "none"
            raise PreconditionError(f"fuse_mbconv: no block is at '{name}'; there are {known}")
    left = [block for block in blocks if not paths.holding(block.path)]
    return {block: f"'{block.path}' is not of blocks={','.join(paths.names)}" for block in left}


def _stages_text(blocks: Sequence[InvertedResidual]) -> str:
    firsts: dict[int, str] = {}
    for block in blocks:
        firsts.setdefault(block.stage, block.path)
    return ", ".join(f"{stage} from '{path}'" for stage, path in firsts.items())


def _nothing(
    program: Program, found: Sequence[InvertedResidual | NearMiss],
    candidates: Sequence[InvertedResidual], refused: Mapping[InvertedResidual, str],
) -> str:  # fmt: skip
    misses = [each for each in found if isinstance(each, NearMiss)]
    reasons = [f"'{block.path}': {refused[block]}" for block in candidates]
    reasons += [f"{named(each.node)}: {each.reason}" for each in misses]
    if not reasons:
        return f"fuse_mbconv finds no MBConv in {program.name}: it has no depthwise convolution"
    first = "; ".join(dict.fromkeys(reasons[:3]))
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    return f"fuse_mbconv finds no MBConv to fuse in {program.name}: {first}{more}"
