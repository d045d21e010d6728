"""Operators whose result, or its size, is decided by values: what a refusal says of each."""

from __future__ import annotations

from fxopt.tracing.known import Unknown
from fxopt.tracing.trace import Untraceable

READERS = frozenset({
    "__bool__", "item", "tolist", "__int__", "__float__", "__index__", "__complex__", "numpy",
    "__array__", "__contains__", "equal", "allclose", "is_nonzero", "nonzero", "unique",
    "masked_select", "argwhere", "unique_consecutive", "bincount",
})  # fmt: skip
"""Names of the operators that answer by values, or give as many as values say."""

_SIZED = {
    "__getitem__": "indexing by a mask", "nonzero": "nonzero", "masked_select": "masked_select",
    "where": "where with one argument", "argwhere": "argwhere", "unique": "unique",
    "unique_consecutive": "unique_consecutive", "bincount": "bincount", "one_hot": "one_hot",
    "repeat_interleave": "repeat_interleave", "histogram": "histogram", "nms": "nms",
}  # fmt: skip
_REMEDIES = {
    "__getitem__": "use torch.where, or multiply by the mask",
    "nonzero": "use torch.where, or multiply by the mask",
    "masked_select": "use torch.where, or multiply by the mask",
    "where": "use torch.where with three arguments, or multiply by the mask",
    "argwhere": "use torch.where, or multiply by the mask",
    "one_hot": "give num_classes", "repeat_interleave": "give output_size",
}  # fmt: skip
_ARRAYS = ("numpy", "__array__")


def refusal(name: str, unknown: Unknown) -> Untraceable:
    """Why a call of ``name``, which needs values, cannot be followed."""
    if name in _SIZED:
        remedy = _REMEDIES.get(name)
        hint = f" ({remedy})" if remedy else ""
        return Untraceable(f"the size of a result depends on values: {_SIZED[name]}{hint}")
    if name in _ARRAYS:
        return Untraceable("it makes a NumPy array of a tensor, and NumPy cannot be followed")
    if str(unknown).startswith("the input"):
        differ = "which differ from input to input"
    else:
        differ = f"which depend on {unknown}"
    return Untraceable(f"it decides by the values of a tensor ({name.strip('_')}), {differ}")


def needs_values(error: Exception) -> bool:
    """Whether an operator failed because tensors on the meta device have no values."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        hint in text for hint in ("meta tensor", "Meta tensor", "data-dependent")
    )


def without_shape(name: str, error: Exception) -> Untraceable:
    """Why an operator that PyTorch cannot try out on shapes alone cannot be followed."""
    if name == "__getitem__" and "item()" in str(error):
        return Untraceable(
            "it indexes by a number that a tensor computes; index by a tensor of one dimension "
            "(i[None]), or use gather"
        )
    if name in _SIZED:
        return refusal(name, Unknown())
    return Untraceable(f"PyTorch cannot tell the shape of {name} without values")
