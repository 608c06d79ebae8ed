// Rows of a matrix added to the rows of a table that an index names: the gradient of a lookup.
//
// Definition: ops/embedding.py, and backend.py's add_at: target[index[n]] += values[n], for all n in their order. Atomic
// additions would give other bits each time; here the first n of each index adds up all that share it, in order, so the
// bits are NumPy's.
// A block for each n. Roofline: 12 bytes a value of `values` (read; target read and written), 10 microseconds at 4096
// rows of 768 and 3.0 TB/s; the search reads 8 N bytes of index for each of N blocks, from L2: 130 MB there, some 30
// microseconds more.

constexpr int BLOCK = 256;

template <typename Real>
__device__ __forceinline__ void add_rows(
    Real* target, const long long* index, const Real* values, int count, int width
) {
    __shared__ int earlier;
    __shared__ unsigned votes[BLOCK / 32];
    const int first = blockIdx.x;
    const long long row = index[first];
    if (threadIdx.x == 0) earlier = 0;
    __syncthreads();
    for (int n = threadIdx.x; n < first; n += BLOCK) {
        if (index[n] == row) earlier = 1;
    }
    __syncthreads();
    if (earlier) return;
    for (int start = first; start < count; start += BLOCK) {
        const int n = start + threadIdx.x;
        const unsigned vote = __ballot_sync(0xffffffffu, n < count && index[n] == row);
        __syncthreads();  // the votes before these have been read
        if (threadIdx.x % 32 == 0) votes[threadIdx.x / 32] = vote;
        __syncthreads();
        unsigned any = 0;
        for (int warp = 0; warp < BLOCK / 32; warp++) any |= votes[warp];
        if (any == 0) continue;
        for (int column = threadIdx.x; column < width; column += BLOCK) {
            Real sum = target[row * width + column];
            for (int warp = 0; warp < BLOCK / 32; warp++) {
                for (unsigned left = votes[warp]; left != 0; left &= left - 1) {
                    sum += values[(long long)(start + 32 * warp + __ffs(left) - 1) * width + column];
                }
            }
            target[row * width + column] = sum;
        }
    }
}

extern "C" __global__ void add_rows_float32(
    float* target, const long long* index, const float* values, int count, int width
) {
    add_rows(target, index, values, count, width);
}

extern "C" __global__ void add_rows_float64(
    double* target, const long long* index, const double* values, int count, int width
) {
    add_rows(target, index, values, count, width);
}
