"""The passes that come with fxopt, one file each."""

from fxopt.passes.fold_conv_bn import FoldConvBn
from fxopt.passes.patch_execution import PatchExecution

BUILT_IN = (FoldConvBn, PatchExecution)

__all__ = ["BUILT_IN", "FoldConvBn", "PatchExecution"]
