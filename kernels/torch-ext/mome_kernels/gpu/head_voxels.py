"""Kernels of the fusion head for eight channels: one voxel per thread, whose values stay in the thread's registers.

Only the gradients of weights are summed across threads, once per program, and almost every instruction multiplies and
adds. The values of a voxel are a tuple of (BLOCK,) tensors, unrolled. Weights are the same for all threads of a program
and are read in pairs.

Triton does not specialise the kernels to V and P. It would compile them anew for other numbers of prompts, and where 16
divides V it would give a thread neighbouring voxels, which splitting a block of features must undo in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair(at, AGAIN: tl.constexpr = False):
    """Two neighbouring float32 numbers in one load.

    AGAIN marks weights that the forward part has already read. Its hint makes the load a different instruction;
    otherwise the compiler would keep all weights in registers in between, and spill.
    """
    both = tl.load(at.to(tl.pointer_type(tl.int64)), eviction_policy="evict_last" if AGAIN else "")
    low, high = both.to(tl.int32), (both >> 32).to(tl.int32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _columns(x, COUNT: tl.constexpr):
    """The columns of a (BLOCK, COUNT) tensor as a tuple of (BLOCK,) tensors; COUNT is a power of two."""
    if COUNT == 1:
        columns = (tl.reshape(x, [x.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], COUNT // 2, 2]))
        evens, odds = _columns(even, COUNT // 2), _columns(odd, COUNT // 2)
        columns = ()
        for i in tl.static_range(COUNT // 2):
            columns = columns + (evens[i], odds[i])
    return columns


@triton.jit
def _matrix(columns, COUNT: tl.constexpr):
    """The inverse of `_columns`."""
    if COUNT == 1:
        matrix = tl.reshape(columns[0], [columns[0].shape[0], 1])
    else:
        evens, odds = (), ()
        for i in tl.static_range(0, COUNT, 2):
            evens, odds = evens + (columns[i],), odds + (columns[i + 1],)
        both = tl.join(_matrix(evens, COUNT // 2), _matrix(odds, COUNT // 2))
        matrix = tl.reshape(both, [both.shape[0], COUNT])
    return matrix


@triton.jit
def _rows(at, V, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Pointers to COUNT channels of every voxel, (COUNT, BLOCK)."""
    rows = FIRST + tl.arange(0, COUNT).to(tl.int64)
    return at[None, :] + rows[:, None] * V


@triton.jit
def _features(at, V, inside, COUNT: tl.constexpr):
    """The channels of every scale of a voxel; they are V apart in memory.

    Each bit of COUNT is one load of as many channels, since the time of Triton's coalescing pass grows with the number
    of loads times the square of the number of operations.
    """
    f = ()
    for bit in tl.static_range(6, -1, -1):
        if (COUNT >> bit) & 1:
            pointers = _rows(at, V, COUNT >> (bit + 1) << (bit + 1), 1 << bit)
            f = f + _columns(tl.trans(tl.load(pointers, mask=inside[None, :], other=0.0)), 1 << bit)
    return f


@triton.jit
def _store_features(at, f, V, inside, COUNT: tl.constexpr):
    """Writes what `_features` reads."""
    for bit in tl.static_range(6, -1, -1):
        if (COUNT >> bit) & 1:
            part = ()
            for i in tl.static_range(1 << bit):
                part = part + (f[(COUNT >> (bit + 1) << (bit + 1)) + i],)
            pointers = _rows(at, V, COUNT >> (bit + 1) << (bit + 1), 1 << bit)
            tl.store(pointers, tl.trans(_matrix(part, 1 << bit)), mask=inside[None, :])


@triton.jit
def _fuse(f, query, bias, S: tl.constexpr, C: tl.constexpr, TOP_K: tl.constexpr):
    """Softmax over the scales of ⟨query, f[s]⟩ + bias[s]; with TOP_K over the largest, the earlier of equal ones."""
    scores = ()
    for s in tl.static_range(S):
        score = tl.zeros_like(f[0]) + tl.load(bias + s)
        for c in tl.static_range(0, C, 2):
            q0, q1 = _pair(query + c)
            score += f[s * C + c] * q0
            score += f[s * C + c + 1] * q1
        scores = scores + (score,)
    if TOP_K > 0:
        kept = ()
        for s in tl.static_range(S):
            above = tl.zeros_like(f[0])
            for other in tl.static_range(S):
                if other < s:
                    above += (scores[other] >= scores[s]).to(tl.float32)
                elif other > s:
                    above += (scores[other] > scores[s]).to(tl.float32)
            kept = kept + (tl.where(above < TOP_K, scores[s], float("-inf")),)
        scores = kept
    largest = scores[0]
    for s in tl.static_range(1, S):
        largest = tl.maximum(largest, scores[s])
    total = tl.zeros_like(largest)
    powers = ()
    for s in tl.static_range(S):
        power = tl.exp2((scores[s] - largest) * 1.4426950408889634)
        total += power
        powers = powers + (power,)
    reciprocal = 1.0 / total
    weights = ()
    for s in tl.static_range(S):
        weights = weights + (powers[s] * reciprocal,)
    return weights


@triton.jit
def _mixture(f, weights, S: tl.constexpr, C: tl.constexpr):
    """Σ_s weights[s] · f[s], per channel."""
    x = ()
    for c in tl.static_range(C):
        value = weights[0] * f[c]
        for s in tl.static_range(1, S):
            value += weights[s] * f[s * C + c]
        x = x + (value,)
    return x


@triton.jit
def _layer(x, weight, bias, slope, C: tl.constexpr):
    """Leaky ReLU of W x + b."""
    y = ()
    for o in tl.static_range(0, C, 2):
        first, second = _pair(bias + o)
        first += tl.zeros_like(x[0])
        second += tl.zeros_like(x[0])
        for c in tl.static_range(0, C, 2):
            w0, w1 = _pair(weight + o * C + c)
            u0, u1 = _pair(weight + (o + 1) * C + c)
            first += x[c] * w0
            second += x[c] * u0
            first += x[c + 1] * w1
            second += x[c + 1] * u1
        y = y + (tl.maximum(first, first * slope), tl.maximum(second, second * slope))
    return y


@triton.jit
def _layer_backward(d_y, x, weight, slope, C: tl.constexpr):
    """Wᵀ d_y times the slope of the leaky ReLU whose result is x."""
    d_x = ()
    for c in tl.static_range(0, C, 2):
        first = tl.zeros_like(x[0])
        second = tl.zeros_like(x[0])
        for o in tl.static_range(C):
            w0, w1 = _pair(weight + o * C + c, AGAIN=True)
            first += d_y[o] * w0
            second += d_y[o] * w1
        d_x = d_x + (tl.where(x[c] > 0, first, first * slope), tl.where(x[c + 1] > 0, second, second * slope))
    return d_x


@triton.jit
def _last_backward(y, w3, g, slope, C: tl.constexpr):
    """w₃ g times the slope of the leaky ReLU whose result is y."""
    d_y = ()
    for c in tl.static_range(0, C, 2):
        w0, w1 = _pair(w3 + c)
        d_y = d_y + (tl.where(y[c] > 0, w0 * g, w0 * g * slope), tl.where(y[c + 1] > 0, w1 * g, w1 * g * slope))
    return d_y


@triton.jit
def _scores_backward(d_x, f, weights, S: tl.constexpr, C: tl.constexpr):
    """Gradients of the scores: weights[s] (⟨d_x, f[s]⟩ - Σ_t weights[t] ⟨d_x, f[t]⟩)."""
    d_weights = ()
    mean = tl.zeros_like(d_x[0])
    for s in tl.static_range(S):
        value = d_x[0] * f[s * C]
        for c in tl.static_range(1, C):
            value += d_x[c] * f[s * C + c]
        mean += weights[s] * value
        d_weights = d_weights + (value,)
    d_scores = ()
    for s in tl.static_range(S):
        d_scores = d_scores + (weights[s] * (d_weights[s] - mean),)
    return d_scores


@triton.jit(do_not_specialize=["V", "P"])
def forward(
    f_ptr, q_ptr, s_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, out_ptr, V, P, slope,
    S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = voxel < V
    f = _features(f_ptr + batch * (S * C) * V + voxel, V, inside, S * C)
    for p in range(P):
        row = batch * P + p
        x = f
        if S > 1:
            x = _mixture(f, _fuse(f, q_ptr + p * C, s_ptr + p * S, S, C, TOP_K), S, C)
        x = _layer(x, w1_ptr + row * (C * C), b1_ptr + row * C, slope, C)
        x = _layer(x, w2_ptr + row * (C * C), b2_ptr + row * C, slope, C)
        logit = tl.zeros_like(x[0]) + tl.load(b3_ptr + row)
        for c in tl.static_range(0, C, 2):
            w0, w1 = _pair(w3_ptr + row * C + c)
            logit += x[c] * w0
            logit += x[c + 1] * w1
        tl.store(out_ptr + row * V + voxel, logit, mask=inside)


@triton.jit(do_not_specialize=["V", "P"])
def backward_features(
    g_ptr, f_ptr, q_ptr, s_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, df_ptr, V, P, slope,
    S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the features, summed over the prompts in their order."""
    batch = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = voxel < V
    f = _features(f_ptr + batch * (S * C) * V + voxel, V, inside, S * C)
    d_f = ()
    for _ in tl.static_range(S * C):
        d_f = d_f + (tl.zeros([BLOCK], tl.float32),)
    for p in range(P):
        row = batch * P + p
        x = f
        if S > 1:
            weights = _fuse(f, q_ptr + p * C, s_ptr + p * S, S, C, TOP_K)
            x = _mixture(f, weights, S, C)
        y1 = _layer(x, w1_ptr + row * (C * C), b1_ptr + row * C, slope, C)
        y2 = _layer(y1, w2_ptr + row * (C * C), b2_ptr + row * C, slope, C)
        g = tl.load(g_ptr + row * V + voxel, mask=inside, other=0.0)
        d_y = _last_backward(y2, w3_ptr + row * C, g, slope, C)
        d_y = _layer_backward(d_y, y1, w2_ptr + row * (C * C), slope, C)
        # there is no activation before the mixture, so that its slope is one
        d_x = _layer_backward(d_y, y1, w1_ptr + row * (C * C), 1.0, C)
        summed = ()
        if S > 1:
            d_scores = _scores_backward(d_x, f, weights, S, C)
            for s in tl.static_range(S):
                for c in tl.static_range(0, C, 2):
                    q0, q1 = _pair(q_ptr + p * C + c)
                    summed = summed + (
                        d_f[s * C + c] + weights[s] * d_x[c] + d_scores[s] * q0,
                        d_f[s * C + c + 1] + weights[s] * d_x[c + 1] + d_scores[s] * q1,
                    )
        else:
            for c in tl.static_range(C):
                summed = summed + (d_f[c] + d_x[c],)
        d_f = summed
    _store_features(df_ptr + batch * (S * C) * V + voxel, d_f, V, inside, S * C)


@triton.jit(do_not_specialize=["V", "P", "TILES", "PROGRAMS", "ZERO"])
def backward_weights(
    g_ptr, f_ptr, q_ptr, s_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, w3_ptr, part_ptr, V, P, TILES, PROGRAMS, ZERO, slope,
    FIRST: tl.constexpr, S: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """A program's sums for one prompt, in a row of 2 C² + 4 C + S + 1 numbers.

    With FIRST these are d query C, d bias S, d W1 C² and d b1 C, else d W2 C², d b2 C, d w3 C and d b3, one after the
    other. All of them at once would not fit the registers.
    """
    prompt, program = tl.program_id(0) // PROGRAMS, tl.program_id(0) % PROGRAMS
    batch = tl.program_id(1).to(tl.int64)
    row = batch * P + prompt
    COUNT: tl.constexpr = C * C + 2 * C + S if FIRST else C * C + 2 * C + 1
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([BLOCK], tl.float32),)
    for tile in range(program, TILES, PROGRAMS):
        # ZERO is 0, but the compiler must not know it: it would read all weights before the loop, and spill them
        weight = row * (C * C) + tile * ZERO
        voxel = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = voxel < V
        f = _features(f_ptr + batch * (S * C) * V + voxel, V, inside, S * C)
        g = tl.load(g_ptr + row * V + voxel, mask=inside, other=0.0)
        x = f
        if S > 1:
            weights = _fuse(f, q_ptr + prompt * C, s_ptr + prompt * S, S, C, TOP_K)
            x = _mixture(f, weights, S, C)
        y1 = _layer(x, w1_ptr + weight, b1_ptr + row * C, slope, C)
        y2 = _layer(y1, w2_ptr + weight, b2_ptr + row * C, slope, C)
        d_y = _last_backward(y2, w3_ptr + row * C, g, slope, C)
        added = ()
        if FIRST:
            d_y = _layer_backward(d_y, y1, w2_ptr + weight, slope, C)
            if S > 1:
                d_x = _layer_backward(d_y, y1, w1_ptr + weight, 1.0, C)
                d_scores = _scores_backward(d_x, f, weights, S, C)
                for c in tl.static_range(C):
                    value = sums[c]
                    for s in tl.static_range(S):
                        value += d_scores[s] * f[s * C + c]
                    added = added + (value,)
                for s in tl.static_range(S):
                    added = added + (sums[C + s] + d_scores[s],)
            else:
                for i in tl.static_range(C + 1):
                    added = added + (sums[i],)
            BASE: tl.constexpr = C + S
        else:
            x = y1
            BASE: tl.constexpr = 0
        for o in tl.static_range(C):
            for c in tl.static_range(C):
                added = added + (sums[BASE + o * C + c] + d_y[o] * x[c],)
        for o in tl.static_range(C):
            added = added + (sums[BASE + C * C + o] + d_y[o],)
        if not FIRST:
            for c in tl.static_range(C):
                added = added + (sums[C * C + C + c] + y2[c] * g,)
            added = added + (sums[C * C + 2 * C] + g,)
        sums = added
    at = part_ptr + (row * PROGRAMS + program) * (2 * C * C + 4 * C + S + 1)
    if not FIRST:
        at += C * C + 2 * C + S
    for i in tl.static_range(COUNT):
        tl.store(at + i, tl.sum(sums[i], axis=0))
