"""What is known of each operator, in one table.

An entry says what kind of operator it is, how many multiply-accumulates a call of it takes,
whether its result is a tensor of its own or a view, which operands the result may overwrite, and
what a fused kernel can make of it. Whoever needs to know an operator asks :func:`describe`; to add
one, add an entry and a test. Modules are found through their class and its
bases, functions by themselves, methods by the name of the function that does the same.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxopt import kernels, layers, macs
from fxopt.fake_quantize import FakeQuantize, fake_quantize
from fxopt.kernels import Fusion, InPlace, Integer, Window
from fxopt.macs import Formula, TypedCall
from fxopt.patching import tiles
from fxopt.patching.stage import PatchedStage
from fxopt.program import Program, TensorType, tensor_types
from fxopt.quantized_tensors import quantized_bias, quantized_weight


class Storage(enum.Enum):
    """Whose memory the result of an operator lies in.

    ``OWN`` it writes a tensor; ``VIEW`` it writes nothing and the elements keep their order;
    ``REARRANGED`` it writes nothing, and rows may lie apart or in another order; ``RESHAPED`` a
    view, or a tensor of its own where the operand is itself a rearranged view; ``KEPT`` it writes
    its second operand into the first, a buffer of the model's; ``INTO`` it writes its second
    operand into a part of the first, which it gives.
    """

    OWN = "own"
    VIEW = "view"
    REARRANGED = "rearranged view"
    RESHAPED = "reshaped"
    KEPT = "kept"
    INTO = "into"


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        kind: a word of the field, or what gives it for a call.
        macs: multiply-accumulates of one call.
        storage: where the result lies, or what gives it for a call.
        inplace: what the result may be written over, or what gives it for a call.
        scratch: elements that a kernel needs beside the result to write it in place.
        fusion: what it is to a fused kernel, or what gives it for a call.
        window: what slides over its first operand, or what gives it for a call.
        padding: the constant that it puts around its operand and takes nothing away; None for all
            that is no such pad.
        template: position and name of the operand of which only the shape and dtype are read.
        composite: it keeps tensors inside of which nothing is known here.
        integer: what it is to kernels that count in whole numbers.
    """

    kind: str | Callable[[TypedCall], str]
    macs: Formula = macs.none
    storage: Storage | Callable[[TypedCall], Storage] = Storage.OWN
    inplace: InPlace | Callable[[TypedCall], InPlace] = InPlace.NONE
    scratch: Formula = lambda call: 0
    fusion: Fusion | Callable[[TypedCall], Fusion] = Fusion.NONE
    window: Window | Callable[[TypedCall], Window] = Window.NONE
    padding: Callable[[TypedCall], float | None] = lambda call: None
    template: tuple[int, str] | None = None
    composite: bool = False
    integer: Integer = Integer.NONE


@dataclass(frozen=True)
class Description:
    """What the table says of one node; the fields are those of :class:`Operator`."""

    kind: str
    macs: int
    storage: Storage
    inplace: InPlace
    scratch: int
    fusion: Fusion
    window: Window
    padding: float | None
    template: tuple[int, str] | None
    composite: bool
    integer: Integer


def _convolution_kind(call: TypedCall) -> str:
    weight = call.shape_of(1, "weight")
    depthwise = kernels.groups(call) != 1 and weight[1] == 1
    return "depthwise" if depthwise else f"conv{len(weight) - 2}d"


def _indexing(call: TypedCall) -> Storage:
    """A tuple's item is its producer's; an index that is a tensor gathers into a new tensor.

    A slice of all elements (``x[:, :8]`` of 8 channels) keeps them in their order.
    """
    operand = call.args[0]
    if not isinstance(operand, TensorType):
        return Storage.VIEW
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(part, (TensorType, list)) for part in index):
        return Storage.OWN
    everything = call.result.elements == operand.elements
    return Storage.VIEW if everything else Storage.REARRANGED


def _cast(call: TypedCall) -> Storage:
    """A cast to the dtype that a tensor has gives the tensor itself."""
    operand, result = call.args[0], call.result
    same = isinstance(operand, TensorType) and operand.dtype == result.dtype
    return Storage.VIEW if same else Storage.OWN


def _quantizing(call: TypedCall) -> Storage:
    """What lies on the grid already stays as it is."""
    quantizer: Any = call.module
    return Storage.VIEW if quantizer.settled else Storage.OWN


def _requantizing(call: TypedCall) -> Fusion:
    quantizer: Any = call.module
    return Fusion.NONE if quantizer.settled else Fusion.RESULT


_CONVOLUTION = Operator(
    _convolution_kind, macs.convolution, inplace=kernels.planes, scratch=kernels.plane,
    fusion=Fusion.HOST, window=kernels.convolution_window, integer=Integer.WEIGHTED,
)  # fmt: skip
_TRANSPOSED = Operator(
    "conv_transpose", macs.transposed_convolution, fusion=Fusion.HOST, integer=Integer.WEIGHTED
)
_LINEAR = Operator("linear", macs.linear, fusion=Fusion.HOST, integer=Integer.WEIGHTED)
_BILINEAR = Operator("linear", macs.bilinear)
_ATTENTION = Operator("attention", macs.multi_head_attention, composite=True)
_RECURRENT = Operator("recurrent", macs.recurrent, composite=True)
_BATCH_NORM = Operator("batch_norm", inplace=kernels.norm_inplace, fusion=kernels.norm_fusion)
_NORM = Operator("norm")
_SOFTMAX, _LOG_SOFTMAX = Operator("softmax", integer=Integer.RESCALED), Operator("softmax")
_RESIZE = Operator("resize", integer=Integer.SAME)
_ACTIVATION = Operator(
    "activation", inplace=InPlace.ELEMENTWISE, fusion=Fusion.EPILOGUE, integer=Integer.RESCALED
)
_GATED = Operator("activation", integer=Integer.RESCALED)  # half of the operand gates the other
_ELEMENTWISE = Operator("elementwise", inplace=InPlace.ELEMENTWISE)
_ARITHMETIC = replace(_ELEMENTWISE, integer=Integer.RESCALED)
_EPILOGUE = replace(_ARITHMETIC, fusion=Fusion.EPILOGUE)
_QUANTIZER = replace(
    _ELEMENTWISE, kind="quantize", storage=_quantizing, fusion=_requantizing, integer=Integer.SAME
)
_ACCUMULATED = Operator("elementwise")  # elements of the result read several of the operand
_POOL = Operator("pool", window=Window.SUM, integer=Integer.RESCALED)
_MAX_POOL = Operator("pool", window=Window.MAX, integer=Integer.SAME)
_PAD = Operator("pad", integer=Integer.SAME)
_CONSTANT_PAD = replace(_PAD, padding=kernels.padding)
_DROPOUT = Operator(  # reports and plans are for inference
    "dropout", storage=Storage.VIEW, integer=Integer.SAME
)
_ACTING_DROPOUT = Operator("dropout", inplace=InPlace.ELEMENTWISE)  # in evaluation too
_VIEW = Operator("view", storage=Storage.VIEW, integer=Integer.SAME)
_RESHAPED = replace(_VIEW, storage=Storage.RESHAPED)
_EXPANDED = Operator("expand", storage=Storage.REARRANGED, integer=Integer.SAME)
_CAST = Operator("cast", storage=_cast, inplace=InPlace.ELEMENTWISE)
_CROP = Operator("slice", storage=Storage.REARRANGED, integer=Integer.SAME)
_COPY = Operator("copy", integer=Integer.SAME)
_CHANGED = Operator("copy", inplace=InPlace.FIRST)
_CONSTANT, _RANDOM = Operator("constant"), Operator("random")
_SHAPE, _OPAQUE, _OTHER = Operator("shape"), Operator("opaque"), Operator("other")
_WEIGHT = Operator("weight", storage=Storage.VIEW)
_LIKE_FIRST, _LIKE_SECOND = (0, "input"), (1, "other")

MODULES: Mapping[type[nn.Module], Operator] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
    nn.Linear: _LINEAR,
    nn.Bilinear: _BILINEAR,
    nn.MultiheadAttention: _ATTENTION,
    **dict.fromkeys((nn.RNNBase, nn.RNNCellBase), _RECURRENT),
    nn.modules.batchnorm._BatchNorm: _BATCH_NORM,
    **dict.fromkeys(
        (nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm,
         nn.LocalResponseNorm, nn.CrossMapLRN2d), _NORM,
    ),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU,
         nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
         nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
         nn.Threshold), _ACTIVATION,
    ),
    nn.GLU: _GATED,
    **dict.fromkeys((nn.Softmax, nn.Softmax2d, nn.Softmin), _SOFTMAX),
    nn.LogSoftmax: _LOG_SOFTMAX,
    **dict.fromkeys(
        (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._LPPoolNd,
         nn.modules.pooling._AdaptiveAvgPoolNd), _POOL,
    ),
    **dict.fromkeys(
        (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
         nn.FractionalMaxPool2d, nn.FractionalMaxPool3d), _MAX_POOL,
    ),
    nn.modules.pooling._MaxUnpoolNd: Operator("unpool"),
    **dict.fromkeys((nn.Upsample, nn.PixelShuffle, nn.PixelUnshuffle), _RESIZE),
    nn.modules.padding._ConstantPadNd: _CONSTANT_PAD,
    **dict.fromkeys(
        (nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd,
         nn.modules.padding._CircularPadNd), _PAD,
    ),
    **dict.fromkeys((nn.modules.dropout._DropoutNd, nn.Identity), _DROPOUT),
    **dict.fromkeys((nn.Embedding, nn.EmbeddingBag), Operator("embedding")),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _RESHAPED),
    nn.Fold: Operator("unfold"),
    nn.Unfold: Operator("unfold", integer=Integer.SAME),
    nn.ChannelShuffle: _COPY,
    **dict.fromkeys((layers.ScaleShift, layers.SkipInit), _EPILOGUE),
    FakeQuantize: _QUANTIZER,
    layers.BorderedConv2d: Operator("conv2d", macs.convolution, fusion=Fusion.HOST),
    PatchedStage: Operator("patched_stage", macs.patched_stage),
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
    "linear": _LINEAR,
    "bilinear": _BILINEAR,
    **_named(
        "matmul mm bmm",
        Operator("matmul", macs.matrix_product(0, "input"), integer=Integer.RESCALED),
    ),
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
        "softplus softsign hardswish hardsigmoid hardtanh hardshrink softshrink tanhshrink "
        "threshold",
        _ACTIVATION,
    ),
    "glu": _GATED,
    **_named("softmax softmin", _SOFTMAX),
    "log_softmax": _LOG_SOFTMAX,
    **_named(
        "avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d",
        _POOL,
    ),
    **_named(
        "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
        "max_pool3d_with_indices",
        _MAX_POOL,
    ),
    **_named("interpolate upsample pixel_shuffle pixel_unshuffle", _RESIZE),
    "grid_sample": Operator("resize"),
    "pad": _CONSTANT_PAD,
    **_named(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout",
        _DROPOUT,
    ),
    **_named("embedding embedding_bag one_hot", Operator("embedding")),
    **_named(
        "div true_divide floor_divide remainder fmod sqrt rsqrt exp expm1 log log2 log10 log1p "
        "sin cos tan atan atan2 erf pow reciprocal sign floor ceil round trunc where lerp addcmul "
        "addcdiv eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and "
        "bitwise_or masked_fill isnan isfinite nan_to_num truediv floordiv mod",
        _ELEMENTWISE,
    ),
    **_named("sub rsub mul neg abs square minimum maximum", _ARITHMETIC),
    "add": replace(_ARITHMETIC, fusion=kernels.sum_fusion),
    **_named("clamp clip clamp_min clamp_max", _EPILOGUE),
    **_named("outer cumsum", _ACCUMULATED),
    **_named(
        "prod max min argmax argmin var std var_mean std_mean norm vector_norm logsumexp all any "
        "topk sort argsort",
        Operator("reduce"),
    ),
    **_named("mean sum", Operator("reduce", integer=Integer.RESCALED)),
    **_named("amax amin", Operator("reduce", integer=Integer.SAME)),
    **_named(
        "cat concat concatenate stack hstack vstack dstack",
        Operator("concat", integer=Integer.SAME),
    ),
    **_named("view squeeze unsqueeze unflatten detach", _VIEW),
    "view_as": replace(_VIEW, template=_LIKE_SECOND),
    **_named("reshape flatten ravel", _RESHAPED),
    "reshape_as": replace(_RESHAPED, template=_LIKE_SECOND),
    **_named(
        "permute transpose t swapaxes swapdims movedim moveaxis adjoint",
        Operator("permute", storage=Storage.REARRANGED, integer=Integer.SAME),
    ),
    **_named("chunk split tensor_split split_with_sizes unbind narrow select diagonal", _CROP),
    "getitem": replace(_CROP, storage=_indexing),
    **_named("expand broadcast_to", _EXPANDED),
    "expand_as": replace(_EXPANDED, template=_LIKE_SECOND),
    "contiguous": replace(_COPY, storage=Storage.RESHAPED),
    "copy_": Operator("copy", storage=Storage.KEPT),
    **_named("clone repeat tile repeat_interleave roll flip rot90 channel_shuffle", _COPY),
    **_named("type float double half bfloat16 int long bool", _CAST),
    **_named("to type_as", replace(_CAST, template=_LIKE_SECOND)),
    **_named("gather index_select take_along_dim", Operator("gather", integer=Integer.SAME)),
    **_named("scatter scatter_add masked_select", Operator("gather")),
    **_named("zeros ones full empty arange linspace eye tensor", _CONSTANT),
    **_named(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty",
        replace(_CONSTANT, template=_LIKE_FIRST),
    ),
    **_named("rand randn randint randperm normal bernoulli multinomial poisson", _RANDOM),
    **_named("rand_like randn_like randint_like", replace(_RANDOM, template=_LIKE_FIRST)),
}

FUNCTIONS: Mapping[Callable[..., Any], Operator] = {
    **{
        getattr(namespace, name): entry
        for namespace in _NAMESPACES
        for name, entry in _BY_NAME.items()
        if callable(getattr(namespace, name, None))
    },
    F.fold: Operator("unfold"),
    F.unfold: Operator("unfold", integer=Integer.SAME),
    tiles.conv2d: _CONVOLUTION,
    fake_quantize: replace(_QUANTIZER, storage=Storage.OWN, fusion=Fusion.RESULT),
    **dict.fromkeys((quantized_weight, quantized_bias), Operator("weight")),
    tiles.max_pool2d: _MAX_POOL,
    tiles.avg_pool2d: _POOL,
    tiles.pad2d: Operator("pad", padding=kernels.tile_padding),
    tiles.enlarge: _RESIZE,
    tiles.scale_shift: _EPILOGUE,
    tiles.same: _DROPOUT,
    tiles.cast: _CAST,
    **dict.fromkeys((tiles.crop, tiles.first_tile, tiles.channels), _CROP),
    tiles.regroup: _VIEW,
    tiles.regrouped: _COPY,
    tiles.buffer: Operator("buffer", template=(0, "x")),
    tiles.write_tile: Operator("tile", storage=Storage.INTO),
    **dict.fromkeys((layers.assign_item, layers.assign_view), _CHANGED),
    **dict.fromkeys((layers.applied, layers.initialised), replace(_RANDOM, inplace=InPlace.FIRST)),
}

METHODS: Mapping[str, Operator] = {
    **_BY_NAME,
    "unfold": _CROP,
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
        entry = _module_entry(type(module))
        acts = entry is _DROPOUT and _acts(program, node, module)
        return _ACTING_DROPOUT if acts else entry
    if node.op == "call_method":
        return METHODS.get(str(node.target), _OTHER)
    return FUNCTIONS.get(node.target, _OTHER) if callable(node.target) else _OTHER


def _acts(program: Program, node: fx.Node, module: nn.Module) -> bool:
    """Whether a dropout acts in evaluation, as ``F.dropout(x)`` without ``training`` does."""
    in_evaluation, _ = program.modes.fixed.get(str(node.target), (False, False))
    return in_evaluation and not isinstance(module, nn.Identity)


def describe(
    program: Program, node: fx.Node, sizes: Mapping[str, Any] = MappingProxyType({})
) -> Description:
    """What the table says of ``node``, which is neither an input nor the output.

    An operator that the table does not hold is of kind ``other`` and has no MACs; arithmetic on
    sizes is of kind ``shape``; a module that could not be traced is ``opaque``, its MACs unknown
    and given as 0. ``sizes`` has what nodes of kind ``shape`` give, where that is known.
    """
    module = program.module(node)
    entry = _entry(program, node, module)

    def type_or_size(operand: fx.Node) -> Any:
        return sizes.get(operand.name, program.types[operand.name])

    call = TypedCall(
        module,
        fx.node.map_arg(node.args, type_or_size),
        fx.node.map_arg(node.kwargs, type_or_size),
        program.types[node.name],
    )
    return Description(
        entry.kind if isinstance(entry.kind, str) else entry.kind(call),
        entry.macs(call),
        entry.storage if isinstance(entry.storage, Storage) else entry.storage(call),
        entry.inplace if isinstance(entry.inplace, InPlace) else entry.inplace(call),
        entry.scratch(call),
        entry.fusion if isinstance(entry.fusion, Fusion) else entry.fusion(call),
        entry.window if isinstance(entry.window, Window) else entry.window(call),
        entry.padding(call),
        entry.template,
        entry.composite,
        entry.integer,
    )


def reads(node: fx.Node, description: Description) -> tuple[fx.Node, ...]:
    """The operands of ``node`` in the order of its arguments, each as often as it is given.

    Without the one of which only the shape is read.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    if description.template is not None:
        position, name = description.template
        del args[position : position + 1]
        kwargs.pop(name, None)
    found: list[fx.Node] = []
    fx.node.map_arg((tuple(args), kwargs), found.append)
    return tuple(found)
