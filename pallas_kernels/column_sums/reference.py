"""Column sums in float64 numpy, from the probabilities written out."""

from pallas_kernels.flash_attention import reference


def column_sums(q, k, **options):
    """The arguments of `pallas_kernels.column_sums` but the log-sum-exp. Returns: [B, K, S] numpy float64."""
    _, _, probabilities = reference.flash_attention(q, k, k, **options)
    return probabilities.sum((2, 3))
