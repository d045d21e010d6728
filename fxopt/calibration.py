"""Calibration data as an option of a pass: a tensor, batches, a loader, or a file of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.errors import GuardError, PreconditionError
from fxopt.infer import MetaInterpreter, MetaTwins, to_meta
from fxopt.program import Program

_BATCH = 8
"""Images of one tensor that run at a time."""


class Calibration:
    """Inputs that a model is used on, to be read as often as needed.

    ``source`` is a tensor of inputs, a tuple ``(inputs, labels)`` of tensors, an iterable of
    batches (a list, a ``DataLoader``), or the path of a file that ``torch.save`` made of one of
    these. A batch is a tensor, or a tuple that begins with the model's inputs (labels may follow),
    or a mapping by their names (and ``labels``). An iterator, which can be read once, is kept as a
    list.

    Raises:
        PreconditionError: the file cannot be read.
        ValueError: the source is nothing of the above.
    """

    form: ClassVar[str] = "FILE.pt"
    holds_data: ClassVar[bool] = True

    def __init__(self, source: Any) -> None:
        if isinstance(source, (str, Path)):
            path = Path(source)
            source, self._text = _loaded(path), str(source)
            if not isinstance(source, Iterable) or _is_scalar(source):
                raise PreconditionError(
                    f"the calibration file '{path}' holds {_described(source)}; write a tensor of "
                    "inputs with torch.save"
                )
        elif isinstance(source, Calibration):
            source, self._text = source._source, source._text
        else:
            self._text = _described(source)
        if isinstance(source, Mapping):
            source = [source]
        if not isinstance(source, Iterable) or _is_scalar(source):
            raise ValueError(
                f"calibration takes a tensor, batches or a DataLoader, not {_described(source)}"
            )
        self._source: Any = list(source) if isinstance(source, Iterator) else source

    def __str__(self) -> str:
        return self._text

    def batches(self, program: Program) -> Iterator[list[torch.Tensor]]:
        """The flat inputs of ``program``, batch by batch; a shuffling loader gives one order.

        Raises:
            PreconditionError: a batch does not fit the program, or there is none.
        """
        return (inputs for inputs, _ in self.labelled_batches(program))

    def labelled_batches(self, program: Program) -> Iterator[tuple[list[torch.Tensor], Any]]:
        """The same with what follows the inputs in a batch, or is its ``labels``; None if nothing.

        Raises:
            PreconditionError: as from :meth:`batches`.
        """
        torch.manual_seed(0)
        fitting: set[tuple[torch.Size, ...]] = set()
        for batch in self._split():
            tensors = _inputs(program, batch)
            if not all(tensor.numel() for tensor in tensors):
                continue
            shapes = tuple(tensor.shape for tensor in tensors)
            if shapes not in fitting:
                _check_shapes(program, tensors)
                fitting.add(shapes)
            yield tensors, _following(program, batch)
        if not fitting:
            raise PreconditionError(f"the calibration data, {self}, is empty")

    def _split(self) -> Iterable[Any]:
        if isinstance(self._source, torch.Tensor):
            return torch.split(self._source, _BATCH)
        if _is_labelled(self._source):
            return zip(*(torch.split(each, _BATCH) for each in self._source), strict=True)
        return self._source  # type: ignore[no-any-return]


def _is_labelled(source: Any) -> bool:
    """Whether it is one tuple ``(inputs, …, labels)``, and no batches."""
    if not isinstance(source, tuple) or not all(isinstance(t, torch.Tensor) for t in source):
        return False
    labels = source[-1]
    whole = labels.dim() == 1 and not labels.is_floating_point()
    return len(source) > 1 and whole and len({t.shape[:1] for t in source}) == 1


def _is_scalar(source: Any) -> bool:
    return isinstance(source, torch.Tensor) and source.dim() == 0


def _loaded(path: Path) -> Any:
    if not path.is_file():
        raise PreconditionError(f"there is no calibration file '{path}'")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PreconditionError(
            f"cannot read calibration data from '{path}' ({type(error).__name__}); write a tensor "
            "of inputs with torch.save"
        ) from error


def _described(source: Any) -> str:
    if isinstance(source, torch.Tensor):
        return f"a tensor of shape {tuple(source.shape)}"
    return f"a {type(source).__name__}"


def _inputs(program: Program, batch: Any) -> list[torch.Tensor]:
    types = program.inputs()
    if isinstance(batch, Mapping):
        given = [batch.get(name) for name in types]
    else:
        given = list(batch[: len(types)]) if isinstance(batch, (tuple, list)) else [batch]
    tensors = [each.detach() for each in given if isinstance(each, torch.Tensor)]
    if not len(given) == len(types) == len(tensors):
        raise PreconditionError(
            f"a calibration batch is {_described(batch)}; the model takes {', '.join(types)}"
        )
    device = next((t.device for t in program.graph_module.parameters()), torch.device("cpu"))
    for tensor, (name, kind) in zip(tensors, types.items(), strict=True):
        if kind.dtype.is_floating_point and not tensor.dtype.is_floating_point:
            raise PreconditionError(
                f"the calibration data for '{name}' is {str(tensor.dtype).removeprefix('torch.')}; "
                f"give what the model is given, {str(kind.dtype).removeprefix('torch.')}"
            )
    tensors = [t.to(device, k.dtype) for t, k in zip(tensors, types.values(), strict=True)]
    for tensor, name in zip(tensors, types, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise PreconditionError(f"the calibration data for '{name}' is not finite")
    return tensors


def _following(program: Program, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return None if "labels" in program.inputs() else batch.get("labels")
    following = batch[len(program.inputs()) :] if isinstance(batch, (tuple, list)) else ()
    return following[0] if following else None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _check_shapes(program: Program, tensors: list[torch.Tensor]) -> None:
    try:
        program.guards.check(tensors)
        MetaInterpreter(program.graph_module, MetaTwins()).run(*map(to_meta, tensors))
    except (GuardError, RuntimeError, ValueError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise PreconditionError(
            f"a calibration batch of shape {shapes} does not fit the model: {_first_line(error)}"
        ) from error
