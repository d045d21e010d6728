"""The passes that come with fxopt, one file each."""

from fxopt.passes.bn_to_scaled_ws import BnToScaledWS
from fxopt.passes.fake_quantize import FakeQuantization
from fxopt.passes.fold_conv_bn import FoldConvBn
from fxopt.passes.fold_scaled_ws import FoldScaledWS
from fxopt.passes.fuse_mbconv import FuseMBConv
from fxopt.passes.patch_execution import PatchExecution

BUILT_IN = (BnToScaledWS, FakeQuantization, FoldConvBn, FoldScaledWS, FuseMBConv, PatchExecution)

__all__ = [
    "BUILT_IN", "BnToScaledWS", "FakeQuantization", "FoldConvBn", "FoldScaledWS", "FuseMBConv",
    "PatchExecution",
]  # fmt: skip
