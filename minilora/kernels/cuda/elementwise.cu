// Activations, rotary positions and biases: one pass each, 16 bytes a thread at a time.
//
// Definitions: ops/activation.py (silu_mul, gelu_tanh), ops/rotary.py (rotary), ops/linalg.py (the bias of linear).
// Roofline: bytes only. In bfloat16 per value: silu_mul 6 forward and 10 backward, gelu 4 and 6, rotary 4, bias 4 (read
// and written). SwiGLU of Llama-7B at 2048 tokens (2048 x 11008): 45 and 75 microseconds at 3.0 TB/s;
// measured on an H100 within a training step: 47 and 71. Rotary of 2048 x 32 heads of 128: floor 11, measured 13.

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }

__device__ __forceinline__ long long pack_index() {
    return ((long long)blockIdx.x * blockDim.x + threadIdx.x) * WIDE;
}

// Rows of `width` values; the rows of gate and of up (and of their gradients) are `stride` values apart, since both may
// be columns of one matrix. A block's threads go along a row.
extern "C" __global__ void silu_mul(const T* gate, const T* up, T* h, long long stride, int width) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE;
    if (column >= width) return;
    const long long row = blockIdx.x, at = row * stride + column;
    Pack a = load(gate + at), b = load(up + at);
    for (int k = 0; k < WIDE; k++) {
        const float x = widen(a.value[k]);
        a.value[k] = narrow<T>(x * sigmoid(x) * widen(b.value[k]));
    }
    store(h + row * width + column, a);
}

// dgate = dh up s (1 + gate (1 - s)), dup = dh gate s, with s = sigmoid(gate).
extern "C" __global__ void silu_mul_backward(
    const T* gate, const T* up, const T* dh, T* dgate, T* dup, long long stride, long long stride_out, int width
) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * WIDE;
    if (column >= width) return;
    const long long row = blockIdx.x, at = row * stride + column, to = row * stride_out + column;
    Pack a = load(gate + at), b = load(up + at), d = load(dh + row * width + column);
    for (int k = 0; k < WIDE; k++) {
        const float x = widen(a.value[k]), s = sigmoid(x), arriving = widen(d.value[k]);
        a.value[k] = narrow<T>(arriving * widen(b.value[k]) * s * (1 + x * (1 - s)));
        d.value[k] = narrow<T>(arriving * x * s);
    }
    store(dgate + to, a);
    store(dup + to, d);
}

// to[r, part] = from_part[r] for three arrays of (rows, width): q, k and v side by side.
extern "C" __global__ void side_by_side(
    const T* first, const T* second, const T* third, T* to, long long size, int width_1, int width_2, int width_3
) {
    const long long at = pack_index();
    if (at >= size) return;
    const int width = width_1 + width_2 + width_3;
    const long long row = at / width;
    int column = at % width;
    const T* from = first;
    int own = width_1;
    if (column >= width_1) {
        column -= width_1;
        from = second;
        own = width_2;
        if (column >= width_2) {
            column -= width_2;
            from = third;
            own = width_3;
        }
    }
    store(to + at, load(from + row * own + column));
}

constexpr float GELU_C = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float GELU_CUBE = 0.044715f;

// With u = c (x + 0.044715 x^3): (1 + tanh u) / 2 = sigmoid(2 u), one exponential where tanhf takes some twenty steps.

extern "C" __global__ void gelu_tanh(const T* x, T* y, long long size) {
    const long long at = pack_index();
    if (at >= size) return;
    Pack a = load(x + at);
    for (int k = 0; k < WIDE; k++) {
        const float v = widen(a.value[k]);
        a.value[k] = narrow<T>(v * sigmoid(2 * GELU_C * (v + GELU_CUBE * v * v * v)));
    }
    store(y + at, a);
}

extern "C" __global__ void gelu_tanh_backward(const T* x, const T* dy, T* dx, long long size) {
    const long long at = pack_index();
    if (at >= size) return;
    Pack a = load(x + at), d = load(dy + at);
    for (int k = 0; k < WIDE; k++) {
        const float v = widen(a.value[k]), s = sigmoid(2 * GELU_C * (v + GELU_CUBE * v * v * v));
        const float slope = s + v * s * (1 - s) * 2 * GELU_C * (1 + 3 * GELU_CUBE * v * v);
        d.value[k] = narrow<T>(widen(d.value[k]) * slope);
    }
    store(dx + at, d);
}

// sum = a + b
extern "C" __global__ void add(const T* a, const T* b, T* sum, long long size) {
    const long long at = pack_index();
    if (at >= size) return;
    Pack x = load(a + at), y = load(b + at);
    for (int k = 0; k < WIDE; k++) x.value[k] = narrow<T>(widen(x.value[k]) + widen(y.value[k]));
    store(sum + at, x);
}

// y (rows, width) += bias (width)
extern "C" __global__ void add_bias(T* y, const T* bias, long long size, int width) {
    const long long at = pack_index();
    if (at >= size) return;
    Pack a = load(y + at), b = load(bias + at % width);
    for (int k = 0; k < WIDE; k++) a.value[k] = narrow<T>(widen(a.value[k]) + widen(b.value[k]));
    store(y + at, a);
}

// y[b, t, h] = x[b, t, h] with each pair (i, i + half) turned by the angle of (b, t, i); direction -1 turns back.
// x has any strides (in values) but the last; y is contiguous. The tables are (1 or B, T, half) in float.
extern "C" __global__ void rotary(
    const T* x, T* y, const float* cosines, const float* sines, long long stride_b, long long stride_t,
    long long stride_h, long long count, int time, int heads, int half, int table_per_row, float direction
) {
    const int packs = half / WIDE;
    const long long index = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count * packs) return;  // count: B T H heads in all
    const int i = (int)(index % packs) * WIDE;
    const long long head_index = index / packs;
    const int head = head_index % heads;
    const long long token = head_index / heads;
    const int t = token % time;
    const long long b = token / time;
    const float* c = cosines + ((table_per_row ? b * time : 0) + t) * half + i;
    const float* s = sines + ((table_per_row ? b * time : 0) + t) * half + i;
    const T* from = x + b * stride_b + t * stride_t + head * stride_h;
    Pack first = load(from + i), second = load(from + half + i);
    for (int k = 0; k < WIDE; k++) {
        const float u = widen(first.value[k]), v = widen(second.value[k]);
        const float cosine = c[k], sine = direction * s[k];
        first.value[k] = narrow<T>(u * cosine - v * sine);
        second.value[k] = narrow<T>(v * cosine + u * sine);
    }
    T* to = y + head_index * 2 * half;
    store(to + i, first);
    store(to + half + i, second);
}
