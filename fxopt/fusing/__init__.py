"""MBConv to Fused-MBConv: the algebra, the regression, the graph, the measurements."""
