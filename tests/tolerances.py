"""Every tolerance of the tests of the numerical core, each with the reason for its size; absolute unless it says relative.

That a tolerance is tight enough to see a wrong kernel (keys passed as values, a mask off by one, a scale dropped) is
itself tested, in `test_attention_ops.py`: such errors must exceed `VISIBLE`.
"""

ATTENTION = 5e-6  # float32 sums of about 20 terms of size 1, against float64
STATISTIC = 2e-5  # the same, summed over query rows
VISIBLE = 1e-2  # the least error of a wrong kernel on the tests' inputs: 500 times any tolerance on attention
HIDDEN = 2e-5  # a float32 forward of two layers, hidden states of size 1, two orders of the same sums
ENTRIES = 2e-5  # keys and values that such a forward leaves in a cache, size 1 to 3
GOLDEN_LOGITS = 1e-4  # transformers' float32 logits of a tiny model, size up to 5 (issue 3)
SMOLLM2_LOGITS = 1e-3  # the same of the real model, 30 layers, size up to 20 (issue 3)
MARGIN = 1e-5  # scores or thresholds nearer than this may fall either way in float32 and float64
HIDDEN_TIED = 3e-4  # HIDDEN where a stored vector is seen to be one step of bfloat16 off; seen 1.4e-4
PACKED = 2e-5  # attention over codes of size up to 50, sums in another order
ROUNDED_SHARE = 0.02  # of scores kept in bfloat16 that two orders of the same sums may round apart, by one step
CALIBRATION = 2e-3  # of a level: two steps of the ranks that layers are cut at
STORED_MARGIN = 1e-4  # the same where scores are rounded to bfloat16 and what was read before was quantized
UNDECIDED_SHARE = 0.02  # of cases whose kept set may differ for that reason: counted, capped
ROPE = 2e-6  # relative, float32 frequencies against float64 formulas
FAR_ANGLES = 1e-4  # cos and sin in float32 of angles up to 1,200, which are rounded by up to 6e-5
ROTATION = 2e-6  # float32 rotations of vectors of size 1
ROPE_SCALE = 1e-6  # relative, one float32 number against its float64 formula
ROPE_DYNAMIC = 1e-5  # relative; there the base itself is a float32 power of the length
LINEAR = 5e-6  # a float32 product over 33 terms of size 1, against float64
BY_HAND_FLOAT32 = 1e-6  # relative, the same in float32
BY_HAND = 1e-14  # relative, float64 references on cases of a few operations: some units in the last place
CROWD = 1e-5  # relative, float32 sums of up to 23 x 35 weighted counts, which reach the hundreds
LOGITS = 2e-5  # of a tiny model, and their log-softmax, by two programs
LOGPROB = 1e-4  # relative, float32 log-softmax over 50 logits of size 10, values from 0.01 to 20, against float64
STANDARD_ERRORS = 4  # of a share of random draws: seeds are fixed, and one in 16,000 would be further off by chance
JACCARD = 0.9  # mean agreement of the 4-byte history of Scissorhands with the exact one (issue 3)
BYTES = 0.01  # relative, of a program's arguments: scalars and flags that it takes beside the state
GRADIENT = 5e-4  # absolute and relative: a float32 backward pass of two layers, against float64 central differences
CONVOLUTION = 5e-6  # float32 sums of up to 5 terms of size 1 to 3, against float64
CONVOLUTION_SUM = 2e-6  # relative to the largest: gradients of filters, float32 sums over all rows and positions
CONVOLUTION_BF16 = 2**-8  # relative: such a sum of size 1 to 8, rounded to bfloat16 once
DIFFERENCES = 1e-6  # float64 central differences of a function that is of second degree: rounding over the step of 1e-4
INTEGRAL = 1e-9  # relative, an exact integral and a sum over steps of 1.2e-5, kinks of the function included
QUANTIZED = 1e-5  # grid points of size 1 to 5, computed in float32 and in float64

# Storage in bfloat16, whose relative rounding error is 2**-9
BF16_STEP = 2**-7  # relative: one step of bfloat16, for numbers so near a midpoint that float32 and float64 round apart
HIDDEN_BF16_CACHE = (
    0.03  # float32 model: values of size 3 times attention weights rounded to bfloat16, two layers; seen 0.012
)
HIDDEN_BF16_MODEL = 0.2  # bfloat16 model: about 20 roundings in a row on hidden states of size up to 3; seen 0.084
ENTRIES_BF16_MODEL = 0.1  # keys and values that such a model leaves, half of those roundings; seen 0.04
# Of rows that attention decided otherwise while decoding; seen: 2 in 8 under scissorhands' yes-or-no counts, else 1 at most
UNDECIDED_BF16_SHARE = {"float32": 0.0, "bfloat16": 0.25}
# Decode attention over stored values of size 1 to 4, by dtype of the queries; its mistakes move outputs by 0.1 and more
DECODE = {"float32": 1e-5, "bfloat16": 2e-2}  # seen 3e-6 and 1.8e-2, of which the output's own rounding is 8e-3
DECODE_SHARES = {"float32": 5e-6, "bfloat16": 5e-3}  # of the probabilities; seen 1e-6 and 3.4e-3

# Training
LOSS = 2e-6  # relative, a float32 mean cross-entropy by two orders of the same sums
LOSS_GRADIENT = 2e-5  # of that loss, relative to the largest entry of each gradient
ADAM = 2e-6  # AdamW's arithmetic in float32 against float64, parameters of size 1 and rates of 0.1
DECODE_GPU = {"float32": 2e-5, "bfloat16": 2e-2}  # the same by the GPU's kernel
FLASH_GPU = 8e-3  # outputs of size 2, rounded to bfloat16 after weights were; seen 4.7e-3
FLASH_GPU_LSE = 2e-5  # sums of up to 384 terms in float32, by the GPU's exp2

# Flash attention: of out and of the log-sum-exp, and of a probability for each query that is summed over. Logits of size 1,
# sums of up to 677 terms; in bfloat16 queries are rounded once more when scale and temperature are multiplied in, and
# probabilities before they meet the values
FLASH = {"float32": (2e-5, 1e-5, 2e-6), "bfloat16": (0.05, 0.02, 0.01)}
FLASH_GRADIENT = 2e-5  # of the largest entry of a gradient, float32, against float32 autodiff with all logits in memory
FLASH_SLOPE = 2e-4  # of the size of the summed terms, float32 gradients against differences of the float64 reference
FLASH_VISIBLE = 0.2  # the least error of a wrong kernel: 4 times the tolerance in bfloat16

# Training: adapters, several devices, and what papers print
ADAPTED = 1e-5  # relative and absolute, a float32 product of rank 2 added to a kernel of size 1
ADAPTED_LOGITS = 1e-4  # of a model with adapters added at use, against one with them merged
MESH_LOSS = 2e-5  # relative, a loss after steps on another mesh: other orders of float32 sums
PROCESS_LOSS = 1e-5  # relative, of two processes that share a batch
PARTS = 1e-5  # relative, metrics of a batch in one part and in several
SLOPE = 5e-3  # relative, a float32 gradient against differences of a float32 loss
RATE = 1e-6  # relative, schedules and merged kernels in float32
PUBLISHED = 1e-4  # relative, of a number printed with four digits
DILUTION = (0.005, 0.02)  # absolute, of means printed with three and two digits over as many random rows
