"""The GPU kernels, in Triton; :mod:`msunet_core.gpu` calls them and says where they apply.

Images lie in channels_last memory: a matrix of pixels by channels, of which each program computes one tile
or sums one strip of rows. Sums are in FP32, and in two stages instead of by atomic additions, so that the
same input gives the same bits. ``TRITON_INTERPRET=1`` runs all of it on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- ternary weights: all layers lie one after the other in a flat buffer, cut into chunks ----------------
#
# chunks : int32 (chunks, 3): first element, elements, layer
# layers : int32 (layers, 3): first chunk, chunks, elements


@triton.jit
def ternary_moments(flat, chunks, moments, BLOCK: tl.constexpr):
    """Mean, sum of squared deviations from it, largest magnitude of each chunk: float32 (chunks, 3)."""
    chunk = tl.program_id(0)
    first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    i = tl.arange(0, BLOCK)
    values = tl.load(flat + first + i, mask=i < count, other=0.0).to(tl.float32)
    mean = tl.sum(values) / count
    deviation = tl.where(i < count, values - mean, 0.0)
    tl.store(moments + 3 * chunk, mean)
    tl.store(moments + 3 * chunk + 1, tl.sum(deviation * deviation))
    tl.store(moments + 3 * chunk + 2, tl.max(tl.abs(values)))


@triton.jit
def ternary_signs(
    flat, chunks, layers, moments, alphas, signs, counts, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """T of each element (int8) and the non-zeros of each chunk (int32); a negative alpha means binary."""
    chunk = tl.program_id(0)
    first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    layer = tl.load(chunks + 3 * chunk + 2)
    part, size = tl.arange(0, PARTS), tl.load(layers + 3 * layer + 2)
    is_part = part < tl.load(layers + 3 * layer + 1)
    part += tl.load(layers + 3 * layer)
    # The moments of the parts combined as Chan, Golub and LeVeque do: no difference of large squares.
    elements = tl.load(chunks + 3 * part + 1, mask=is_part, other=0).to(tl.float32)
    means = tl.load(moments + 3 * part, mask=is_part, other=0.0)
    mean = tl.sum(elements * means) / size
    away = means - mean
    squares = tl.load(moments + 3 * part + 1, mask=is_part, other=0.0) + elements * away * away
    std = tl.sqrt_rn(tl.sum(squares) / tl.maximum(size - 1, 1))
    largest = tl.max(tl.load(moments + 3 * part + 2, mask=is_part, other=0.0))

    i = tl.arange(0, BLOCK)
    deviation = tl.load(flat + first + i, mask=i < count, other=0.0).to(tl.float32) - mean
    alpha = tl.load(alphas + layer)
    beyond = tl.where(deviation < 0, -1, 1) * (tl.abs(deviation) > alpha * std).to(tl.int32)
    # As ternarize(): below 4 units in the last place the spread of a constant is its rounding.
    beyond = tl.where(std > 4 * 1.1920928955078125e-07 * largest, beyond, 0)
    sign = tl.where(alpha < 0, tl.where(deviation >= 0, 1, -1), beyond)
    sign = tl.where(i < count, sign, 0)
    tl.store(signs + first + i, sign.to(tl.int8), mask=i < count)
    tl.store(counts + chunk, tl.sum(tl.abs(sign)))


@triton.jit
def ternary_fold(
    signs, chunks, layers, counts, factors, folded, scales, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """sqrt(factor / non-zeros) of each layer, and that times T in the weights' dtype."""
    chunk = tl.program_id(0)
    first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    layer = tl.load(chunks + 3 * chunk + 2)
    first_part, part = tl.load(layers + 3 * layer), tl.arange(0, PARTS)
    is_part = part < tl.load(layers + 3 * layer + 1)
    nonzeros = tl.sum(tl.load(counts + first_part + part, mask=is_part, other=0))
    nonzeros = tl.maximum(nonzeros, 1).to(tl.float32)
    scale = tl.sqrt_rn(tl.div_rn(tl.load(factors + layer), nonzeros))
    i = tl.arange(0, BLOCK)
    sign = tl.load(signs + first + i, mask=i < count, other=0).to(tl.float32)
    tl.store(folded + first + i, (sign * scale).to(folded.dtype.element_ty), mask=i < count)
    if chunk == first_part:
        tl.store(scales + layer, scale)


@triton.jit
def ternary_gradient(grads, chunks, scales, result, BLOCK: tl.constexpr):
    """Each layer's gradient times its scale, which is rounded to the gradient's dtype first."""
    chunk = tl.program_id(0)
    first, count = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    scale = tl.load(scales + tl.load(chunks + 3 * chunk + 2)).to(grads.dtype.element_ty).to(tl.float32)
    i = tl.arange(0, BLOCK)
    grad = tl.load(grads + first + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(result + first + i, (grad * scale).to(result.dtype.element_ty), mask=i < count)


# --- batch norm, activation and skip ----------------------------------------------------------------------
#
# x, y, dy, dx, skip : (pixels, channels) in memory
# affine : float32 (4, channels): mean, 1 / std, weight / std, bias; y = act((x - mean) * scale + bias)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, z)  # not maximum(): NaN has to stay NaN
    if ACT == 2:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    if ACT == 1:
        z = tl.where(z <= 0, 0.0, 1.0)
    elif ACT == 2:
        p = tl.sigmoid(z)
        z = p * (1 + z * (1 - p))
    else:
        z = tl.full(z.shape, 1.0, tl.float32)
    return z


@triton.jit
def norm_moments(
    x, moments, pixels, strip, channels, STRIPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and sum of squared deviations of each strip of rows: float32 (2, STRIPS, channels)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = tl.program_id(0) * strip
    end = tl.minimum(begin + strip, pixels)
    rows = begin + tl.arange(0, BLOCK_P)
    # Deviations from about the mean: a variance by E[x^2] - E[x]^2 would lose its digits far from zero.
    inside = (rows < end)[:, None] & (c < channels)[None, :]
    values = tl.load(x + rows.to(tl.int64)[:, None] * channels + c[None, :], mask=inside, other=0.0)
    pivot = tl.sum(values.to(tl.float32), axis=0) / tl.minimum(BLOCK_P, end - begin)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for row in range(begin, end, BLOCK_P):
        rows = row + tl.arange(0, BLOCK_P)
        inside = (rows < end)[:, None] & (c < channels)[None, :]
        values = tl.load(x + rows.to(tl.int64)[:, None] * channels + c[None, :], mask=inside, other=0.0)
        away = tl.where(inside, values.to(tl.float32) - pivot[None, :], 0.0)
        total += away
        squares += away * away
    count = (end - begin).to(tl.float32)
    away = tl.sum(total, axis=0) / count
    at = moments + tl.program_id(0) * channels + c
    tl.store(at, pivot + away, mask=c < channels)
    tl.store(at + STRIPS * channels, tl.sum(squares, axis=0) - count * away * away, mask=c < channels)


@triton.jit
def norm_affine(
    moments, weight, bias, running_mean, running_var, affine, pixels, strip, strips, channels, momentum, eps,
    STRIPS: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combine the strips, update the running statistics in place, write ``affine``."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    part = tl.arange(0, PARTS)
    inside = (part < strips)[:, None] & has_c[None, :]
    count = tl.maximum(tl.minimum(pixels - part * strip, strip), 0).to(tl.float32)
    at = moments + part[:, None] * channels + c[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    mean = tl.sum(count[:, None] * means, axis=0) / pixels
    away = means - mean[None, :]
    squares = tl.load(at + STRIPS * channels, mask=inside, other=0.0)
    squares = tl.sum(tl.where(inside, squares + count[:, None] * away * away, 0.0), axis=0)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(squares / pixels + eps))
    old = tl.load(running_mean + c, mask=has_c, other=0.0)
    tl.store(running_mean + c, old + momentum * (mean - old), mask=has_c)
    old = tl.load(running_var + c, mask=has_c, other=0.0)
    tl.store(running_var + c, old + momentum * (squares / (pixels - 1) - old), mask=has_c)
    scale = inverse * tl.load(weight + c, mask=has_c, other=0.0)
    tl.store(affine + c, mean, mask=has_c)
    tl.store(affine + channels + c, inverse, mask=has_c)
    tl.store(affine + 2 * channels + c, scale, mask=has_c)
    tl.store(affine + 3 * channels + c, tl.load(bias + c, mask=has_c, other=0.0), mask=has_c)


@triton.jit
def norm_apply(
    x, skip, y, affine, pixels, channels,
    ACT: tl.constexpr, HAS_SKIP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(norm(x)) + skip."""
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    inside = (rows < pixels)[:, None] & has_c[None, :]
    at = rows.to(tl.int64)[:, None] * channels + c[None, :]
    mean = tl.load(affine + c, mask=has_c, other=0.0)
    scale = tl.load(affine + 2 * channels + c, mask=has_c, other=0.0)
    bias = tl.load(affine + 3 * channels + c, mask=has_c, other=0.0)
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    result = _activate((values - mean[None, :]) * scale[None, :] + bias[None, :], ACT)
    if HAS_SKIP:
        result += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_sums(
    dy, x, affine, sums, pixels, strip, channels,
    ACT: tl.constexpr, STRIPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and of g * xhat over each strip, g = dy * act'(.): float32 (2, STRIPS, channels)."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    mean = tl.load(affine + c, mask=has_c, other=0.0)
    inverse = tl.load(affine + channels + c, mask=has_c, other=0.0)
    scale = tl.load(affine + 2 * channels + c, mask=has_c, other=0.0)
    bias = tl.load(affine + 3 * channels + c, mask=has_c, other=0.0)
    begin = tl.program_id(0) * strip
    end = tl.minimum(begin + strip, pixels)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for row in range(begin, end, BLOCK_P):
        rows = row + tl.arange(0, BLOCK_P)
        inside = (rows < end)[:, None] & has_c[None, :]
        at = rows.to(tl.int64)[:, None] * channels + c[None, :]
        away = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        grad *= _slope(away * scale[None, :] + bias[None, :], ACT)
        total += grad
        product += grad * away
    at = sums + tl.program_id(0) * channels + c
    tl.store(at, tl.sum(total, axis=0), mask=has_c)
    tl.store(at + STRIPS * channels, tl.sum(product, axis=0) * inverse, mask=has_c)


@triton.jit
def norm_gradient(
    dy, x, dx, affine, sums, pixels, channels,
    ACT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = scale * (g - mean of g - xhat * mean of g * xhat); ``sums`` float32 (2, channels)."""
    rows = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    inside = (rows < pixels)[:, None] & has_c[None, :]
    at = rows.to(tl.int64)[:, None] * channels + c[None, :]
    mean = tl.load(affine + c, mask=has_c, other=0.0)
    inverse = tl.load(affine + channels + c, mask=has_c, other=0.0)
    scale = tl.load(affine + 2 * channels + c, mask=has_c, other=0.0)
    bias = tl.load(affine + 3 * channels + c, mask=has_c, other=0.0)
    of_all = tl.load(sums + c, mask=has_c, other=0.0) / pixels
    of_each = tl.load(sums + channels + c, mask=has_c, other=0.0) / pixels * inverse
    away = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    grad *= _slope(away * scale[None, :] + bias[None, :], ACT)
    result = scale[None, :] * (grad - of_all[None, :] - away * of_each[None, :])
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)


# --- depthwise convolution --------------------------------------------------------------------------------
#
# One convolution of ``channels`` channels from ``first`` on, of images that have ``total``; (H, W) -> (P, Q)


@triton.jit
def depthwise_forward(
    x, weight, y, pixels, H, W, P, Q, first, channels, total,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of output pixels; neighbours' reads of the same input meet in the cache."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    image, row, column = pixel // (P * Q), pixel // Q % P, pixel % Q
    result = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            h, w = row * STRIDE + i - K // 2, column * STRIDE + j - K // 2
            inside = (pixel < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = ((image * H + h) * W + w).to(tl.int64) * total + first
            mask = inside[:, None] & has_c[None, :]
            values = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tap = tl.load(weight + c * (K * K) + i * K + j, mask=has_c, other=0.0).to(tl.float32)
            result += values * tap[None, :]
    own = pixel.to(tl.int64)[:, None] * total + first + c[None, :]
    tl.store(y + own, result.to(y.dtype.element_ty), mask=(pixel < pixels)[:, None] & has_c[None, :])


@triton.jit
def depthwise_input_gradient(
    dy, weight, dx, pixels, H, W, P, Q, first, channels, total,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of input pixels: from each output that has read them."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    image, row, column = pixel // (H * W), pixel // W % H, pixel % W
    result = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            h, w = row + K // 2 - i, column + K // 2 - j  # STRIDE times the output's row and column
            inside = (pixel < pixels) & (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
            h, w = h // STRIDE, w // STRIDE
            inside = inside & (h < P) & (w < Q)
            at = ((image * P + h) * Q + w).to(tl.int64) * total + first
            mask = inside[:, None] & has_c[None, :]
            values = tl.load(dy + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tap = tl.load(weight + c * (K * K) + i * K + j, mask=has_c, other=0.0).to(tl.float32)
            result += values * tap[None, :]
    own = pixel.to(tl.int64)[:, None] * total + first + c[None, :]
    tl.store(dx + own, result.to(dx.dtype.element_ty), mask=(pixel < pixels)[:, None] & has_c[None, :])


@triton.jit
def depthwise_weight_gradient(
    dy, x, parts, pixels, H, W, P, Q, first, channels, total,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of output pixels for each tap: float32 (tiles, K * K, channels)."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    has_c = c < channels
    image, row, column = pixel // (P * Q), pixel // Q % P, pixel % Q
    own = pixel.to(tl.int64)[:, None] * total + first + c[None, :]
    has_own = (pixel < pixels)[:, None] & has_c[None, :]
    grad = tl.load(dy + own, mask=has_own, other=0.0).to(tl.float32)
    for i in range(K):
        for j in tl.static_range(K):
            h, w = row * STRIDE + i - K // 2, column * STRIDE + j - K // 2
            inside = (pixel < pixels) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            at = ((image * H + h) * W + w).to(tl.int64) * total + first
            mask = inside[:, None] & has_c[None, :]
            values = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tap = (tl.program_id(0).to(tl.int64) * (K * K) + i * K + j) * channels
            tl.store(parts + tap + c, tl.sum(grad * values, axis=0), mask=has_c)
