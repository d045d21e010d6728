"""What is known of each operator, in one table.

An entry says what kind of operator it is, how many multiply-accumulates a call of it takes, and
whether its result is a tensor of its own or a view. Whoever needs to know an operator asks
:func:`describe`; to add one, add an entry and a test. Modules are found through their class and its
bases, functions by themselves, methods by the name of the function that does the same.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import layers, macs
from fxopt.macs import Formula, TypedCall
from fxopt.program import Program, TensorType, tensor_types


class Storage(enum.Enum):
    """Whose memory the result of an operator lies in.

    ``OWN`` it writes a tensor; ``VIEW`` it writes nothing and the elements keep their order;
    ``REARRANGED`` it writes nothing, and rows may lie apart or in another order; ``RESHAPED`` a
    view, or a tensor of its own where the operand is itself a rearranged view.
    """

    OWN = "own"
    VIEW = "view"
    REARRANGED = "rearranged view"
    RESHAPED = "reshaped"


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        kind: a word of the field, or what gives it for a call.
        macs: multiply-accumulates of one call.
        storage: where the result lies, or what gives it for a call.
    """

    kind: str | Callable[[TypedCall], str]
    macs: Formula = macs.none
    storage: Storage | Callable[[TypedCall], Storage] = Storage.OWN


@dataclass(frozen=True)
class Description:
    """What the table says of one node; the fields are those of :class:`Operator`."""

    kind: str
    macs: int
    storage: Storage


def _convolution_kind(call: TypedCall) -> str:
    weight = call.shape_of(1, "weight")
    groups = call.operand(6, "groups") if call.module is None else call.module.groups
    depthwise = (groups or 1) != 1 and weight[1] == 1
    return "depthwise" if depthwise else f"conv{len(weight) - 2}d"


def _indexing(call: TypedCall) -> Storage:
    """A tuple's item is its producer's; an index that is a tensor gathers into a new tensor."""
    if not isinstance(call.args[0], TensorType):
        return Storage.VIEW
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    gathers = any(isinstance(part, (TensorType, list)) for part in index)
    return Storage.OWN if gathers else Storage.REARRANGED


def _cast(call: TypedCall) -> Storage:
    """A cast to the dtype that a tensor has gives the tensor itself."""
    operand, result = call.args[0], call.result
    same = isinstance(operand, TensorType) and operand.dtype == result.dtype
    return Storage.VIEW if same else Storage.OWN


_CONVOLUTION = Operator(_convolution_kind, macs.convolution)
_TRANSPOSED = Operator("conv_transpose", macs.transposed_convolution)
_ATTENTION = Operator("attention", macs.multi_head_attention)
_RECURRENT = Operator("recurrent", macs.recurrent)
_BATCH_NORM, _NORM = Operator("batch_norm"), Operator("norm")
_ACTIVATION, _SOFTMAX = Operator("activation"), Operator("softmax")
_POOL, _RESIZE, _PAD = Operator("pool"), Operator("resize"), Operator("pad")
_DROPOUT = Operator("dropout", storage=Storage.VIEW)  # reports and plans are for inference
_SHAPE, _OPAQUE, _OTHER = Operator("shape"), Operator("opaque"), Operator("other")
_WEIGHT = Operator("weight", storage=Storage.VIEW)

MODULES: Mapping[type[nn.Module], Operator] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
    nn.Linear: Operator("linear", macs.linear),
    nn.Bilinear: Operator("linear", macs.bilinear),
    nn.MultiheadAttention: _ATTENTION,
    **dict.fromkeys((nn.RNNBase, nn.RNNCellBase), _RECURRENT),
    nn.modules.batchnorm._BatchNorm: _BATCH_NORM,
    **dict.fromkeys(
        (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
         nn.LocalResponseNorm, nn.CrossMapLRN2d), _NORM,
    ),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
         nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.GLU,
         nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
         nn.Threshold), _ACTIVATION,
    ),
    **dict.fromkeys((nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin), _SOFTMAX),
    **dict.fromkeys(
        (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
         nn.modules.pooling._LPPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
         nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d),
        _POOL,
    ),
    nn.modules.pooling._MaxUnpoolNd: Operator("unpool"),
    **dict.fromkeys((nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle), _RESIZE),
    **dict.fromkeys(
        (nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd,
         nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd), _PAD,
    ),
    **dict.fromkeys((nn.modules.dropout._DropoutNd, nn.Identity), _DROPOUT),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), Operator("embedding")),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), Operator("view", storage=Storage.RESHAPED)),
    **dict.fromkeys((nn.Fold, nn.Unfold), Operator("unfold")),
    nn.ChannelShuffle: Operator("copy"),
    layers.ScaleShift: Operator("elementwise"),
}  # fmt: skip

# Layers of other libraries that act in training only, by name: importing them here is no option.
FOREIGN_MODULES: Mapping[str, Operator] = dict.fromkeys(
    (
        "torchvision.ops.stochastic_depth.StochasticDepth",
        "torchvision.ops.drop_block.DropBlock2d",
        "timm.layers.drop.DropPath",
        "timm.layers.drop.DropBlock2d",
    ),
    _DROPOUT,
)

_NAMESPACES = (torch, F, torch.linalg, operator)


def _named(names: str, entry: Operator) -> dict[str, Operator]:
    return dict.fromkeys(names.split(), entry)


_BY_NAME: Mapping[str, Operator] = {
    **_named("conv1d conv2d conv3d", _CONVOLUTION),
    **_named("conv_transpose1d conv_transpose2d conv_transpose3d", _TRANSPOSED),
    "linear": Operator("linear", macs.linear),
    "bilinear": Operator("linear", macs.bilinear),
    **_named("matmul mm bmm", Operator("matmul", macs.matrix_product(0, "input"))),
    **_named("mv dot vdot inner", Operator("matmul", macs.matrix_product(0, "input"))),
    "addmm": Operator("matmul", macs.matrix_product(1, "mat1")),
    "addmv": Operator("matmul", macs.matrix_product(1, "mat")),
    "baddbmm": Operator("matmul", macs.matrix_product(1, "batch1")),
    "addbmm": Operator("matmul", macs.summed_batch_product),
    "tensordot": Operator("matmul", macs.tensordot),
    "einsum": Operator("matmul", macs.einsum),
    "scaled_dot_product_attention": Operator("attention", macs.attention),
    "multi_head_attention_forward": _ATTENTION,
    "batch_norm": _BATCH_NORM,
    **_named("layer_norm group_norm instance_norm rms_norm local_response_norm normalize", _NORM),
    **_named(
        "relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh "
        "softplus softsign glu hardswish hardsigmoid hardtanh hardshrink softshrink tanhshrink "
        "threshold",
        _ACTIVATION,
    ),
    **_named("softmax log_softmax softmin", _SOFTMAX),
    **_named(
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices "
        "max_pool2d_with_indices max_pool3d_with_indices",
        _POOL,
    ),
    **_named("interpolate upsample grid_sample pixel_shuffle pixel_unshuffle", _RESIZE),
    "pad": _PAD,
    **_named(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout",
        _DROPOUT,
    ),
    **_named("embedding embedding_bag one_hot", Operator("embedding")),
    **_named(
        "add sub mul div true_divide floor_divide remainder fmod neg abs square sqrt rsqrt exp "
        "expm1 log log2 log10 log1p sin cos tan atan atan2 erf pow reciprocal sign floor ceil "
        "round trunc clamp clip clamp_min clamp_max minimum maximum where lerp addcmul addcdiv "
        "eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and "
        "bitwise_or masked_fill isnan isfinite nan_to_num truediv floordiv mod rsub outer "
        "cumsum",
        Operator("elementwise"),
    ),
    **_named(
        "mean sum prod amax amin max min argmax argmin var std var_mean std_mean norm "
        "vector_norm logsumexp all any topk sort argsort",
        Operator("reduce"),
    ),
    **_named("cat concat concatenate stack hstack vstack dstack", Operator("concat")),
    **_named(
        "view view_as squeeze unsqueeze unflatten detach", Operator("view", storage=Storage.VIEW)
    ),
    **_named("reshape reshape_as flatten ravel", Operator("view", storage=Storage.RESHAPED)),
    **_named(
        "permute transpose t swapaxes swapdims movedim moveaxis adjoint",
        Operator("permute", storage=Storage.REARRANGED),
    ),
    **_named(
        "chunk split tensor_split split_with_sizes unbind narrow select diagonal",
        Operator("slice", storage=Storage.REARRANGED),
    ),
    "getitem": Operator("slice", storage=_indexing),
    **_named("expand expand_as broadcast_to", Operator("expand", storage=Storage.REARRANGED)),
    "contiguous": Operator("copy", storage=Storage.RESHAPED),
    **_named(
        "clone copy_ repeat tile repeat_interleave roll flip rot90 channel_shuffle",
        Operator("copy"),
    ),
    **_named(
        "to type type_as float double half bfloat16 int long bool", Operator("cast", storage=_cast)
    ),
    **_named(
        "gather index_select take_along_dim scatter scatter_add masked_select", Operator("gather")
    ),
    **_named(
        "zeros ones full empty arange linspace eye tensor zeros_like ones_like full_like "
        "empty_like rand randn rand_like randn_like new_zeros new_ones new_full new_empty",
        Operator("constant"),
    ),
}

FUNCTIONS: Mapping[Callable[..., Any], Operator] = {
    **{
        getattr(namespace, name): entry
        for namespace in _NAMESPACES
        for name, entry in _BY_NAME.items()
        if callable(getattr(namespace, name, None))
    },
    **dict.fromkeys((F.fold, F.unfold), Operator("unfold")),
    layers.assign_item: Operator("copy"),
    layers.assign_view: Operator("copy"),
    layers.initialised: Operator("elementwise"),
    layers.applied: Operator("elementwise"),
}

METHODS: Mapping[str, Operator] = {
    **_BY_NAME,
    "unfold": Operator("slice", storage=Storage.REARRANGED),
}


def _module_entry(cls: type[nn.Module]) -> Operator:
    for base in cls.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        entry = MODULES.get(base) or FOREIGN_MODULES.get(name)
        if entry:
            return entry
    return _OTHER


def _entry(program: Program, node: fx.Node, module: nn.Module | None) -> Operator:
    if node.name in program.opaque:
        return _OPAQUE
    if node.op == "get_attr":
        return _WEIGHT
    if not any(True for _ in tensor_types(program.types[node.name])):
        return _SHAPE
    if module is not None:
        return _module_entry(type(module))
    if node.op == "call_method":
        return METHODS.get(str(node.target), _OTHER)
    return FUNCTIONS.get(node.target, _OTHER) if callable(node.target) else _OTHER


def describe(program: Program, node: fx.Node) -> Description:
    """What the table says of ``node``, which is neither an input nor the output.

    An operator that the table does not hold is of kind ``other`` and has no MACs; arithmetic on
    sizes is of kind ``shape``; a module that could not be traced is ``opaque``, its MACs unknown
    and given as 0.
    """
    module = program.module(node)
    entry = _entry(program, node, module)
    call = TypedCall(
        module,
        fx.node.map_arg(node.args, lambda operand: program.types[operand.name]),
        fx.node.map_arg(node.kwargs, lambda operand: program.types[operand.name]),
        program.types[node.name],
    )
    return Description(
        entry.kind if isinstance(entry.kind, str) else entry.kind(call),
        entry.macs(call),
        entry.storage if isinstance(entry.storage, Storage) else entry.storage(call),
    )
