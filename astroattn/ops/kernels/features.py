"""Inside kernels: rows of matrices, products on the tensor cores, and the hidden layer's response (`ops.features`).

The products are those of the tensor cores, with float32 sums: bfloat16 as it is; float16 with phi and the states in
tf32, which has float16's digits and float32's range; float32 as three tf32 products, which keeps float32's digits.
Gains are logarithms to base 2, for the hardware's exponential, and rounded operands enter products alone: rounding
them for the sums as well would take the slow conversion of single numbers.
"""

from __future__ import annotations

from math import log, pi

import torch
import triton
import triton.language as tl

LOG_150 = tl.constexpr(log(150.0))
LOG_2 = tl.constexpr(log(2))
TO_BASE_2 = tl.constexpr(1 / log(2))
LOG_2_OVER_PI = tl.constexpr(log(2 / pi))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 4)  # the gain of a feature that no key has reached
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_rows(pointer, stride, rows, limit, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows of a matrix with SIZE columns, as [rows, PADDED]; zeros beyond its rows and columns."""
    columns = tl.arange(0, PADDED)
    mask = rows[:, None] < limit
    if SIZE != PADDED:
        mask = mask & (columns[None, :] < SIZE)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def narrow(x, TO: tl.constexpr):
    """x in the dtype TO, rounded to the nearest."""
    if INTERPRETED and tl.bfloat16 == TO and x.dtype == tl.float32:  # where the interpreter cuts digits off
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(TO)


@triton.jit
def store_rows(pointer, stride, rows, limit, x, SIZE: tl.constexpr, PADDED: tl.constexpr):
    columns = tl.arange(0, PADDED)
    mask = rows[:, None] < limit
    if SIZE != PADDED:
        mask = mask & (columns[None, :] < SIZE)
    x = narrow(x, pointer.dtype.element_ty)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], x, mask=mask)


@triton.jit
def operand(x, LIKE: tl.constexpr):
    """Float32 x as it enters a product, rounded, in a program whose inputs are LIKE."""
    if tl.bfloat16 == LIKE:
        x = narrow(x, tl.bfloat16)
    elif tl.float16 == LIKE:  # to tf32: the tensor cores would cut digits off, which is biased
        rounded = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a NaN stays one
    return x


@triton.jit
def widen(x):
    """An input as it enters a product with an `operand`."""
    if x.dtype == tl.float16:
        x = x.to(tl.float32)
    return x


@triton.jit
def product(x, y, LIKE: tl.constexpr):
    """x y; LIKE: the dtype of the program's inputs."""
    if INTERPRETED:  # which would multiply the bits of bfloat16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="tf32x3" if tl.float32 == LIKE else "tf32")


@triton.jit
def half_square_of(x, scale_root):
    x = x.to(tl.float32)
    return tl.sum(x * x, 1) * (0.5 * scale_root * scale_root)


@triton.jit
def respond(reach, scale_root, half_square, phase, log_m, ACTIVATION: tl.constexpr):
    """Gain and base of phi = 2^gain base (`ops.features`), and 2^-gain d phi / d drive; drive = scale_root reach."""
    drive = reach * scale_root
    base = 1.0
    slope = 1.0
    gain = tl.zeros_like(drive) - 0.5 * TO_BASE_2 * log_m
    if ACTIVATION == "positive_exp":
        gain = reach * (scale_root * TO_BASE_2) - (half_square + 0.5 * log_m) * TO_BASE_2
    elif ACTIVATION == "exp":
        gain = (drive + phase - 0.5 * log_m) * TO_BASE_2
    elif ACTIVATION == "truncated_exp":
        gain = (tl.where(drive > LOG_150, LOG_150, drive) - 0.5 * log_m) * TO_BASE_2
        slope = tl.where(drive > LOG_150, 0.0, 1.0)
    elif ACTIVATION == "cosine":
        gain = tl.zeros_like(drive) + (half_square + 0.5 * (LOG_2 - log_m)) * TO_BASE_2
        base = tl.cos(drive + phase)
        slope = -tl.sin(drive + phase)
    elif ACTIVATION == "positive_cosine":
        gain = tl.zeros_like(drive) + (half_square + 0.5 * (LOG_2_OVER_PI - log_m)) * TO_BASE_2
        base = tl.cos(drive + phase)
        slope = tl.where(base < 0, 0.0, -tl.sin(drive + phase))
        base = tl.where(base < 0, 0.0, base)  # a NaN stays one
    elif ACTIVATION == "clipped_sine":
        base = tl.sin(drive + phase)
        slope = tl.where(base < 0, 0.0, tl.cos(drive + phase))
        base = tl.where(base < 0, 0.0, base)
    elif ACTIVATION == "linear":
        gain = tl.zeros_like(drive)
        base = 1.0 + drive - half_square - 0.5 * log_m
    elif ACTIVATION == "elu1":
        low = tl.exp(tl.where(drive > 0, 0.0, drive))
        base = tl.where(drive > 0, 1.0 + drive, low)
        slope = tl.where(drive > 0, 1.0, low)
    else:  # constant
        slope = 0.0
    return gain, base, slope


@triton.jit
def locate(pid, chunks, chunk, num_tokens, heads):
    """Of a program: sequence, batch, head, chunk, its first token, and how many tokens it has."""
    sequence = (pid // chunks).to(tl.int64)
    part = pid % chunks
    first = part.to(tl.int64) * chunk
    count = tl.minimum(chunk, num_tokens - first).to(tl.int32)
    return sequence, sequence // heads, sequence % heads, part, first, count


@triton.jit
def at(x, b, h, first):
    """Where the rows of x = (pointer, strides of batch, head and token) begin, and their stride."""
    return x[0] + b * x[1] + h * x[2] + first * x[3], x[3]


@triton.jit
def load_neurons(pointer, neurons, num_hidden, missing):
    """One number per neuron, as [1, neurons]; `missing` for those that do not exist."""
    return tl.load(pointer + neurons, mask=neurons < num_hidden, other=missing).to(tl.float32)[None, :]


@triton.jit
def load_layer(
    weight, phase, states, neurons, num_hidden,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """Of a block of neurons: weights and states as operands, phases, z and top; neurons beyond the last respond 0."""
    return (
        narrow(load_rows(weight, D, neurons, num_hidden, D, DP), LIKE),
        operand(load_rows(states[0], DV, neurons, num_hidden, DV, DVP), LIKE),
        load_neurons(phase, neurons, num_hidden, 0.0),
        load_neurons(states[1], neurons, num_hidden, 0.0),
        load_neurons(states[2], neurons, num_hidden, float("-inf")),
    )
