"""The table of attention variants: one file and one line each.

A variant is a Linen module that owns its projections: `project(x, place) -> Projected` before the cache, and
`output(heads) -> x` behind it. What lies between, attention over tiers, is the same for all (`jaxkv.cache`).
"""

from jaxkv.attention.gqa import GroupedQueryAttention
from jaxkv.attention.rcmha import RelativeConvolutionalAttention
from jaxkv.attention.ssa import SelectiveAttention

ATTENTION = {"gqa": GroupedQueryAttention, "ssa": SelectiveAttention, "rcmha": RelativeConvolutionalAttention}
