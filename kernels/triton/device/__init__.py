"""What runs on the GPU; the launchers beside this folder lay out its programs.

Upper-case arguments are known when a kernel is compiled. Strides count elements; the stride of
the last dimension is 1 everywhere. Row r of a tile of queries is head `r % group` of its query
group at query row `r // group`, so K and V are read once for all heads that share them.
"""
