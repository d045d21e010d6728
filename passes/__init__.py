"""The passes that come with fxopt, one file each."""

from fxopt.passes.fold_conv_bn import FoldConvBn

BUILT_IN = (FoldConvBn,)

__all__ = ["BUILT_IN", "FoldConvBn"]
