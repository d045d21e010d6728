"""What a network is differentiated by, where no training says it: labels or seeded targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from fxopt.errors import PreconditionError
from fxopt.program import Program, TensorType
from fxopt.proof.evidence import SEED
from fxopt.quantizing.fidelity import outputs_of


class Objective:
    """What is differentiated: the same for every network, and for every batch of that number.

    With labels the cross-entropy of the first table of classes; without any, of each table with
    seeded ones, and seeded projections of all other outputs.
    """

    def __init__(self, program: Program) -> None:
        names = program.interface.output_names
        kinds = {name: program.types[node.name] for name, node in outputs_of(program)}
        if not kinds:
            raise PreconditionError(
                f"{program.name} has no floating output, so that nothing has a gradient"
            )
        self._places = {name: names.index(name) for name in kinds}
        self._classes = {n: k.shape[1] for n, k in kinds.items() if _is_table(k)}  # type: ignore
        self._labelled: set[bool] = set()
        self._generator = torch.Generator().manual_seed(SEED)

    def described(self) -> str:
        """In words."""
        if not self._classes:
            return "seeded projection of the outputs"
        if True in self._labelled:
            output = f" of '{next(iter(self._classes))}'" if len(self._places) > 1 else ""
            return f"cross-entropy{output}, the data's labels"
        maps = len(self._classes) < len(self._places)
        rest = ", and seeded projection of the rest" if maps else ""
        return f"cross-entropy, seeded labels{rest}"

    def targets(self, flat: Sequence[torch.Tensor], labels: Any) -> dict[str, torch.Tensor]:
        """Of a batch: classes of each table that counts."""
        if not self._classes:
            return {}
        self._labelled.add(labels is not None)
        if len(self._labelled) > 1:
            raise PreconditionError(
                "some batches of the data have labels and some have none; give labels with every "
                "batch, or with none"
            )
        samples, device = len(flat[0]), flat[0].device
        if labels is not None:
            table, classes = next(iter(self._classes.items()))
            return {table: _checked_labels(labels, samples, classes).to(device)}
        return {
            name: torch.randint(classes, (samples,), generator=self._generator).to(device)
            for name, classes in self._classes.items()
        }

    def __call__(
        self, outputs: Sequence[torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The sum over the samples of a batch."""
        generator = torch.Generator().manual_seed(SEED)
        terms = []
        for name, place in self._places.items():
            output = outputs[place]
            if name in targets:
                terms.append(F.cross_entropy(output, targets[name], reduction="sum"))
            elif True not in self._labelled:
                weights = torch.randn(output.shape, generator=generator).to(output)
                terms.append((output * weights).sum())
        return torch.stack(terms).sum()


def _is_table(kind: Any) -> bool:
    return isinstance(kind, TensorType) and len(kind.shape) == 2 and kind.shape[1] > 1


def _checked_labels(given: Any, samples: int, classes: int) -> torch.Tensor:
    known = isinstance(given, torch.Tensor) and not given.is_floating_point()
    if not known or given.shape != (samples,):
        what = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, torch.Tensor) else (
            f"a {type(given).__name__}"
        )  # fmt: skip
        raise PreconditionError(
            f"what follows the inputs in a batch of {samples} is {what}; labels are whole numbers "
            f"({samples},), one for each input"
        )
    low, high = int(given.min()), int(given.max())
    if not 0 <= low <= high < classes:
        raise PreconditionError(
            f"the labels are from {low} to {high} and the model has {classes} classes; give labels "
            f"from 0 to {classes - 1}"
        )
    labels: torch.Tensor = given.long()
    return labels
