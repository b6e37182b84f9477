"""Every tolerance of the tests of the numerical core, absolute, each with the reason for its size.

That a tolerance is tight enough to see a wrong kernel (keys passed as values, a mask off by one, a scale dropped) is
itself tested, in `test_attention_ops.py`: such errors must exceed `VISIBLE`.
"""

ATTENTION = 5e-6  # float32 sums of about 20 terms of size 1, against float64
STATISTIC = 2e-5  # the same, summed over query rows
VISIBLE = 1e-2  # the least error of a wrong kernel on the tests' inputs: 500 times any tolerance on attention
HIDDEN = 2e-5  # a float32 forward of two layers, hidden states of size 1, two orders of the same sums
ENTRIES = 2e-5  # keys and values that such a forward leaves in a cache, size 1 to 3
GOLDEN_LOGITS = 1e-4  # transformers' float32 logits of a tiny model, size up to 5 (issue 3)
MARGIN = 1e-5  # scores or thresholds nearer than this may fall either way in float32 and float64
UNDECIDED_SHARE = 0.02  # of cases whose kept set may differ for that reason: counted, capped
ROPE = 2e-6  # relative, float32 frequencies against float64 formulas
ROTATION = 2e-6  # float32 rotations of vectors of size 1
LINEAR = 5e-6  # a float32 product over 33 terms of size 1, against float64
