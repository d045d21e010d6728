"""The passes that come with fxopt, one file each."""

from fxopt.passes.fold_conv_bn import FoldConvBn
from fxopt.passes.fuse_mbconv import FuseMBConv
from fxopt.passes.patch_execution import PatchExecution

BUILT_IN = (FoldConvBn, FuseMBConv, PatchExecution)

__all__ = ["BUILT_IN", "FoldConvBn", "FuseMBConv", "PatchExecution"]
