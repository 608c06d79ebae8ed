// One launch for all adapters: a list of arrays is cut into pieces of PIECE values, a block each.
//
// piece[block] = {which array, where it starts}; the arrays' addresses and sizes stand in tables on the device. Where an
// array may be part of a wider matrix, `rows` has its own width and the distance from row to row.
// Definitions: optim.py (AdamW.step, global_norm, clip_grad_norm).
// Roofline: AdamW reads 16 and writes 12 bytes a parameter in float: 20 million parameters (Llama-7B, r = 8) take 190
// microseconds at 3.0 TB/s (measured on an H100: 200), and a launch each would take 448 launches.

struct Piece {
    long long array;
    long long start;
};

#define PIECE_LOOP(sizes)                                                                                     \
    const Piece piece = pieces[blockIdx.x];                                                                   \
    const long long end = min(piece.start + PIECE, sizes[piece.array]);                                       \
    for (long long at = piece.start + threadIdx.x; at < end; at += blockDim.x)

// Where value `at` of an array lies that is `rows.x` wide, with `rows.y` values from row to row.
__device__ __forceinline__ long long place(long long at, int2 rows) {
    return rows.x == rows.y ? at : at / rows.x * rows.y + at % rows.x;
}

// Loshchilov & Hutter 2019, algorithm 2. rates[array] = {lr, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)}.
extern "C" __global__ void adamw(
    const Piece* pieces, const long long* sizes, float* const* ws, const float* const* gs, const int2* rows,
    float* const* ms, float* const* vs, const float3* rates, float beta1, float beta2, float eps, float weight_decay, float l2
) {
    PIECE_LOOP(sizes) {
        const float3 rate = rates[piece.array];
        float w = ws[piece.array][at], g = gs[piece.array][place(at, rows[piece.array])];
        g += l2 * w;
        w *= 1 - rate.x * weight_decay;
        const float m = beta1 * ms[piece.array][at] + (1 - beta1) * g;
        const float v = beta2 * vs[piece.array][at] + (1 - beta2) * g * g;
        ms[piece.array][at] = m;
        vs[piece.array][at] = v;
        ws[piece.array][at] = w - rate.y * m / (sqrtf(v) * rate.z + eps);
    }
}

// partial[block] = sum of squares of the block's piece.
extern "C" __global__ void squares(
    const Piece* pieces, const long long* sizes, const float* const* gs, const int2* rows, double* partial
) {
    float sum = 0;
    PIECE_LOOP(sizes) {
        const float g = gs[piece.array][place(at, rows[piece.array])];
        sum += g * g;
    }
    __shared__ float parts[32];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (int warp = 0; warp < blockDim.x / 32; warp++) total += parts[warp];
        partial[blockIdx.x] = total;
    }
}

// out = sqrt(sum of partial), by one block, in a fixed order.
extern "C" __global__ void root_of_sum(const double* partial, int count, double* out) {
    __shared__ double parts[256];
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += 256) sum += partial[i];
    parts[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *out = sqrt(parts[0]);
}

// g *= min(1, most / (norm + 1e-6))
extern "C" __global__ void clip(
    const Piece* pieces, const long long* sizes, float* const* gs, const int2* rows, const double* norm, double most
) {
    const float factor = (float)fmin(1.0, most / (*norm + 1e-6));
    PIECE_LOOP(sizes) { gs[piece.array][place(at, rows[piece.array])] *= factor; }
}

// to = from, rounded to T
extern "C" __global__ void narrow_all(
    const Piece* pieces, const long long* sizes, const float* const* from, T* const* to, const int2* rows
) {
    PIECE_LOOP(sizes) { to[piece.array][place(at, rows[piece.array])] = narrow<T>(from[piece.array][at]); }
}
