// Norms with the residual addition before them, one row of the (N, D) activations at a time.
//
// Definitions: ops/fused.py, add_rms_norm and add_layer_norm.
//   forward:   s = x + delta;  y = norm(s)
//   backward:  ds = dres + norm's dx(dy), where dres is the gradient that reaches s past the norm
//   again:     y from s and its statistics, for a layer that would otherwise have to keep y
// Roofline, bytes per token of D values in bfloat16: forward reads 4 D and writes 4 D (2 D and 2 D without delta),
// backward reads 6 D and writes 2 D, again reads 2 D and writes 2 D. A few FLOP each: memory-bound. At 2048 x 4096 and
// 3.0 TB/s the floors are 22 (11 without delta), 22 and 11 microseconds; measured on an H100 within a training step:
// 16 on average over both kinds, 25 and 12.
//
// A row is held in registers by LANES threads with PACKS packs of 16 bytes each (-DLANES, -DPACKS): D <= LANES * PACKS *
// WIDE.

#define ROW_LOOP for (int i = 0, column = lane * WIDE; i < PACKS; i++, column += LANES * WIDE) if (column < width)

__device__ __forceinline__ int lane_of_row() { return threadIdx.x % LANES; }
__device__ __forceinline__ long long row_of_block() {
    return (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
}

extern "C" __global__ void add_rms_norm(
    const T* x, const T* delta, const T* weight, T* sum, T* y, float* inverse, long long rows, int width, float eps
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const long long start = row * width;
    Pack held[PACKS];
    float squares = 0;
    ROW_LOOP {
        held[i] = load(x + start + column);
        if (delta != nullptr) {
            Pack added = load(delta + start + column);
            for (int k = 0; k < WIDE; k++) held[i].value[k] = narrow<T>(widen(held[i].value[k]) + widen(added.value[k]));
            store(sum + start + column, held[i]);
        }
        for (int k = 0; k < WIDE; k++) squares += widen(held[i].value[k]) * widen(held[i].value[k]);
    }
    const float scale = rsqrtf(row_sum<LANES>(squares, 0).x / width + eps);
    ROW_LOOP {
        Pack w = load(weight + column);
        for (int k = 0; k < WIDE; k++) {
            held[i].value[k] = narrow<T>(rounded(widen(held[i].value[k]) * scale) * widen(w.value[k]));
        }
        store(y + start + column, held[i]);
    }
    if (lane == 0) inverse[row] = scale;
}

extern "C" __global__ void rms_norm_again(
    const T* s, const T* weight, const float* inverse, T* y, long long rows, int width
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const float scale = inverse[row];
    ROW_LOOP {
        Pack held = load(s + row * width + column), w = load(weight + column);
        for (int k = 0; k < WIDE; k++) {
            held.value[k] = narrow<T>(rounded(widen(held.value[k]) * scale) * widen(w.value[k]));
        }
        store(y + row * width + column, held);
    }
}

// ds = dres + (g - n mean(g n)) / rho with g = dy w and n = s / rho.
extern "C" __global__ void rms_norm_backward(
    const T* s, const T* weight, const float* inverse, const T* dy, const T* dres, T* ds, long long rows, int width
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const long long start = row * width;
    const float scale = inverse[row];
    float n[PACKS][WIDE], g[PACKS][WIDE];
    float product = 0;
    ROW_LOOP {
        Pack held = load(s + start + column), w = load(weight + column), arriving = load(dy + start + column);
        for (int k = 0; k < WIDE; k++) {
            n[i][k] = widen(held.value[k]) * scale;
            g[i][k] = widen(arriving.value[k]) * widen(w.value[k]);
            product += g[i][k] * n[i][k];
        }
    }
    const float mean = row_sum<LANES>(product, 0).x / width;
    ROW_LOOP {
        Pack past, result;
        if (dres != nullptr) past = load(dres + start + column);
        for (int k = 0; k < WIDE; k++) {
            float value = (g[i][k] - n[i][k] * mean) * scale;
            if (dres != nullptr) value += widen(past.value[k]);
            result.value[k] = narrow<T>(value);
        }
        store(ds + start + column, result);
    }
}

// statistics: mean and 1 / sigma of each row.
extern "C" __global__ void add_layer_norm(
    const T* x, const T* delta, const T* weight, const T* bias, T* sum, T* y, float2* statistics, long long rows,
    int width, float eps
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const long long start = row * width;
    Pack held[PACKS];
    float total = 0;
    ROW_LOOP {
        held[i] = load(x + start + column);
        if (delta != nullptr) {
            Pack added = load(delta + start + column);
            for (int k = 0; k < WIDE; k++) held[i].value[k] = narrow<T>(widen(held[i].value[k]) + widen(added.value[k]));
            store(sum + start + column, held[i]);
        }
        for (int k = 0; k < WIDE; k++) total += widen(held[i].value[k]);
    }
    const float mean = row_sum<LANES>(total, 0).x / width;
    float squares = 0;
    ROW_LOOP {
        for (int k = 0; k < WIDE; k++) {
            const float centred = widen(held[i].value[k]) - mean;
            squares += centred * centred;
        }
    }
    const float scale = rsqrtf(row_sum<LANES>(squares, 0).x / width + eps);
    ROW_LOOP {
        Pack w = load(weight + column), b = load(bias + column);
        for (int k = 0; k < WIDE; k++) {
            const float n = rounded((widen(held[i].value[k]) - mean) * scale);
            held[i].value[k] = narrow<T>(n * widen(w.value[k]) + widen(b.value[k]));
        }
        store(y + start + column, held[i]);
    }
    if (lane == 0) statistics[row] = make_float2(mean, scale);
}

extern "C" __global__ void layer_norm_again(
    const T* s, const T* weight, const T* bias, const float2* statistics, T* y, long long rows, int width
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const float2 known = statistics[row];
    ROW_LOOP {
        Pack held = load(s + row * width + column), w = load(weight + column), b = load(bias + column);
        for (int k = 0; k < WIDE; k++) {
            const float n = rounded((widen(held.value[k]) - known.x) * known.y);
            held.value[k] = narrow<T>(n * widen(w.value[k]) + widen(b.value[k]));
        }
        store(y + row * width + column, held);
    }
}

// ds = dres + (g - mean(g) - n mean(g n)) / sigma with g = dy w and n = (s - mean) / sigma.
extern "C" __global__ void layer_norm_backward(
    const T* s, const T* weight, const float2* statistics, const T* dy, const T* dres, T* ds, long long rows, int width
) {
    const int lane = lane_of_row();
    const long long row = row_of_block();
    if (row >= rows) return;
    const long long start = row * width;
    const float2 known = statistics[row];
    float n[PACKS][WIDE], g[PACKS][WIDE];
    float total = 0, product = 0;
    ROW_LOOP {
        Pack held = load(s + start + column), w = load(weight + column), arriving = load(dy + start + column);
        for (int k = 0; k < WIDE; k++) {
            n[i][k] = (widen(held.value[k]) - known.x) * known.y;
            g[i][k] = widen(arriving.value[k]) * widen(w.value[k]);
            total += g[i][k];
            product += g[i][k] * n[i][k];
        }
    }
    const float2 sums = row_sum<LANES>(total, product);
    const float mean = sums.x / width, along = sums.y / width;
    ROW_LOOP {
        Pack past, result;
        if (dres != nullptr) past = load(dres + start + column);
        for (int k = 0; k < WIDE; k++) {
            float value = (g[i][k] - mean - n[i][k] * along) * known.y;
            if (dres != nullptr) value += widen(past.value[k]);
            result.value[k] = narrow<T>(value);
        }
        store(ds + start + column, result);
    }
}
