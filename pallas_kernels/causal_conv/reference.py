"""Causal convolution in float64 numpy: one number after another, over the list of what a row has read."""

import numpy as np


def causal_conv(x, filters, bias, taps, *, valid):
    """The arguments and results of `pallas_kernels.causal_conv` with heads, [B, N, T, H], none of them None."""
    x, filters, bias, taps = (np.asarray(a, np.float64) for a in (x, filters, bias, taps))
    out, left = np.zeros_like(x), np.zeros_like(taps)
    for b, n, h in np.ndindex(x.shape[0], x.shape[1], x.shape[3]):
        read = list(taps[b, n, :, h])
        for t in range(x.shape[2]):
            if valid[b, t]:
                read.append(x[b, n, t, h])
                newest = read[len(read) - len(filters) :]
                out[b, n, t, h] = sum(f * r for f, r in zip(filters[:, n, h], newest, strict=True)) + bias[n, h]
        left[b, n, :, h] = read[len(read) - taps.shape[2] :]
    return out, left


def gradients(x, filters, bias, taps, *, valid, out_gradient, taps_gradient):
    """Of sum(out * out_gradient) + sum(taps left * taps_gradient): those of x, filters, bias and taps, float64."""
    x, filters, taps = (np.asarray(a, np.float64) for a in (x, filters, taps))
    dx, df, db, dt = np.zeros_like(x), np.zeros_like(filters), np.zeros(np.shape(bias)), np.zeros_like(taps)
    width = len(filters)
    for b, n, h in np.ndindex(x.shape[0], x.shape[1], x.shape[3]):
        read = [(taps[b, n, i, h], dt, i) for i in range(width - 1)]  # a number, and where its gradient goes
        for t in range(x.shape[2]):
            if valid[b, t]:
                read.append((x[b, n, t, h], dx, t))
                for k, (number, gradient, at) in enumerate(read[len(read) - width :]):
                    gradient[b, n, at, h] += filters[k, n, h] * out_gradient[b, n, t, h]
                    df[k, n, h] += number * out_gradient[b, n, t, h]
                db[n, h] += out_gradient[b, n, t, h]
        for i, (_, gradient, at) in enumerate(read[len(read) - (width - 1) :] if width > 1 else ()):
            gradient[b, n, at, h] += taps_gradient[b, n, i, h]
    return dx, df, db, dt
