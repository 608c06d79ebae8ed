// Causal attention, forward and backward, without a T x T matrix in memory: a tile of scores lives in registers only.
//
// Definition: ops/attention.py. With s = scale q k^T over the keys that a query sees (those up to itself, of its own
// segment), and i a query, j a key:
//   forward    L_i = log sum_j exp(s_ij),  o_i = sum_j exp(s_ij - L_i) v_j         (kept: q, k, v, o and L)
//   backward   P_ij = exp(s_ij - L_i) again,  delta_i = do_i . o_i
//              dS = P (do v^T - delta),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T do
// Papers: Dao et al. 2022 (FlashAttention), Dao 2023 (FlashAttention-2); online softmax: Milakov and Gimelshein 2018.
//
// Tiling. A block of 4 warps holds its own rows in shared memory: queries in the forward and the dq kernel, keys in the
// dk-dv kernel. The other side streams through two buffers of TILE rows: while one tile is computed with, the next is
// on its way (cp.async). A warp owns 16 M of the block's rows. Every product is one of two:
//   scores       S (16 M, TILE)  = own rows . (tile rows)^T      both operands from shared memory
//   accumulate   C (16 M, d)    += P (16 M, TILE) . tile rows    P straight from the registers where it was computed
// so probabilities never pass through shared memory: the dk-dv kernel forms S and dP transposed for that.
//   kernel            own rows    tile      products
//   attention_forward queries     keys      S = Q K^T;  O += P V
//   attention_dq      queries     keys      S = Q K^T;  dP = dO V^T;  dQ += dS K
//   attention_dkdv    keys        queries   S^T = K Q^T;  dP^T = V dO^T;  dV += P^T dO;  dK += dS^T Q
// The dk-dv block visits all query heads of its key-value head, so nothing is added across blocks: no atomics, the same
// bits every time. The price is that backward forms S and dP twice, 7 products where 5 would do.
//
// Tiles that no row of the block sees are skipped: those past the diagonal, and with segments those whose range of
// segment numbers (least and greatest of each 32 tokens, from segment_ranges) does not meet the block's. Only tiles
// on the diagonal, or where segments change, are masked. Blocks with most tiles start first.
//
// Shared memory rows are d bfloat16 values in chunks of 16 bytes; chunk c of row r lies at c ^ (r mod 8), so that the
// eight rows that one ldmatrix reads come from different banks.
//
// Roofline. N = B H T (T + 1) / 2 pairs: forward 4 N d FLOP, backward 10 N d (executed: 14 N d); bytes B T d (4 H + 4 K)
// forward and about B T d (10 H + 12 K) backward, far below. At 1 x 2048, 32 heads of 128: 34 and 86 GFLOP, so 44 and
// 109 microseconds at 790 TFLOP/s (cuBLAS, which uses wgmma). These kernels issue mma.sync, which the H100 runs at 0.6
// to 0.65 of that rate: 70 and, with the recomputed products, 240 microseconds are the floor here.
// Measured on an H100 (python -m tests.gpu.flash), microseconds forward / backward, beside torch's flash backend:
//   1 x 2048, 32 heads of 128     129 /   397     168 /   430
//   8 x 512, 9 heads of 64 (3 KV)  22 /    83      20 /    80
//   8 x 512, 12 heads of 64        26 /    68      29 /    81
//   1 x 32768, 32 heads of 64 (8)  14,636 / 42,608     13,866 / 38,499
//
// Set by the launcher: HEAD (d), and for each kernel _M (16 M rows a warp), _TILE and _BLOCKS (resident blocks aimed at).

using uint32 = unsigned int;
using int64 = long long;
using bf16 = T;

constexpr int WARPS = 4;
constexpr int BLOCK = 32 * WARPS;
constexpr int CHUNKS = HEAD / 8;  // of 16 bytes in a row
constexpr int ROW = 2 * HEAD;     // bytes
constexpr int SPAN = 32;          // tokens that share an entry of `ranges`

#define LOG2_E 1.4426950408889634f

// --- instructions ----------------------------------------------------------------------------------------------------
// Lane l of a warp holds, of the operands of mma m16n8k16, with g = l / 4 and t = l % 4:
//   A (16 rows, 16 k)   a[0] (g, 2t..)   a[1] (g + 8, 2t..)   a[2] (g, 2t + 8..)   a[3] (g + 8, 2t + 8..)   pairs along k
//   B (16 k, 8 columns) b0 (2t.., g)     b1 (2t + 8.., g)                                                   pairs along k
//   C (16 rows, 8)      c[0], c[1] (g, 2t..)      c[2], c[3] (g + 8, 2t..)
// ldmatrix gives lane l, of each of four 8 x 8 matrices whose rows the lanes 8 i .. 8 i + 7 point at, the pair (g, 2t..);
// transposed, the pair (2t.., g).

__device__ __forceinline__ uint32 shared_address(const void* p) {
    return static_cast<uint32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void load_matrices(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(uint32 (&r)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// c += a b
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Start a copy of 16 (4) bytes to shared memory; where not `there`, zeros are written and nothing is read.
__device__ __forceinline__ void copy_16(uint32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy_4(uint32 to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" :: "r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// This thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ uint4 load_shared_16(uint32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ float2 load_shared_floats(uint32 address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}

__device__ __forceinline__ void store_shared_4(uint32 address, uint32 x) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(x) : "memory");
}

// Two floats rounded to bfloat16, the first in the lower half.
__device__ __forceinline__ uint32 pack(float low, float high) {
    uint32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

__device__ __forceinline__ float2 unpack(uint32 x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- tiles -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % 32; }

// Where a chunk lies in a tile of rows, in bytes.
__device__ __forceinline__ uint32 place(int row, int chunk) { return row * ROW + ((chunk ^ (row & 7)) << 4); }

// Start copying ROWS rows, `stride` elements apart; rows from `count` on become zeros. Row 0 exists.
template <int ROWS> __device__ __forceinline__ void load_rows(uint32 tile, const bf16* rows, int64 stride, int count) {
    constexpr int SWEEP = BLOCK / CHUNKS;  // rows that the block copies at once
    static_assert(SWEEP % 8 == 0 && ROWS % SWEEP == 0, "a thread's chunk keeps its place in every row it copies");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    const bf16* from = rows + row * stride + chunk * 8;
    tile += place(row, chunk);
#pragma unroll
    for (int i = 0; i < ROWS / SWEEP; i++) {
        const bool there = row + i * SWEEP < count;
        copy_16(tile + i * SWEEP * ROW, there ? from + i * SWEEP * stride : rows, there);
    }
}

// s (16 M, N) = own (16 M, d) . tile (N, d)^T
template <int M, int N> __device__ __forceinline__ void scores(float (&s)[M][N / 8][4], uint32 own, uint32 tile) {
    const int lane = lane_of_warp();
    own += place(lane % 16, lane / 16);
    tile += place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < N / 8; n++) s[i][n][0] = s[i][n][1] = s[i][n][2] = s[i][n][3] = 0;
#pragma unroll
    for (int k = 0; k < HEAD / 16; k++) {  // chunks 2 k and 2 k + 1: `^ 32 k` steps through the swizzled places
        uint32 a[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) load_matrices(a[i], (own ^ (32 * k)) + 16 * i * ROW);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            uint32 b[4];
            load_matrices(b, (tile ^ (32 * k)) + 16 * n * ROW);
#pragma unroll
            for (int i = 0; i < M; i++) {
                multiply_add(s[i][2 * n], a[i], b[0], b[1]);
                multiply_add(s[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// c (16 M, d) += p (16 M, N) . tile (N, d), p rounded to bfloat16: two neighbouring C fragments are one A fragment.
template <int M, int N>
__device__ __forceinline__ void accumulate(float (&c)[M][HEAD / 8][4], const float (&p)[M][N / 8][4], uint32 tile) {
    const int lane = lane_of_warp();
    tile += place(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        uint32 a[M][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            a[i][0] = pack(p[i][2 * k][0], p[i][2 * k][1]);
            a[i][1] = pack(p[i][2 * k][2], p[i][2 * k][3]);
            a[i][2] = pack(p[i][2 * k + 1][0], p[i][2 * k + 1][1]);
            a[i][3] = pack(p[i][2 * k + 1][2], p[i][2 * k + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < HEAD / 16; n++) {
            uint32 b[4];
            load_matrices_transposed(b, (tile ^ (32 * n)) + 16 * k * ROW);
#pragma unroll
            for (int i = 0; i < M; i++) {
                multiply_add(c[i][2 * n], a[i], b[0], b[1]);
                multiply_add(c[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

template <int M> __device__ __forceinline__ void clear(float (&c)[M][HEAD / 8][4]) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) c[i][n][0] = c[i][n][1] = c[i][n][2] = c[i][n][3] = 0;
}

// Write factor c (16 M, d) to the first `count` of the warp's rows, `stride` elements apart, by way of `room`: 16 M rows
// of shared memory that no other warp uses.
template <int M>
__device__ __forceinline__ void store_rows(
    const float (&c)[M][HEAD / 8][4], const float (&factor)[M][2], uint32 room, bf16* rows, int64 stride, int count
) {
    const int lane = lane_of_warp();
    __syncwarp();  // all lanes have read what lay here
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                const uint32 pair = pack(c[i][n][2 * half] * factor[i][half], c[i][n][2 * half + 1] * factor[i][half]);
                store_shared_4(room + place(16 * i + 8 * half + lane / 4, n) + lane % 4 * 4, pair);
            }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * M * CHUNKS / 32; i++) {
        const int row = (32 * i + lane) / CHUNKS, chunk = (32 * i + lane) % CHUNKS;
        const uint4 x = load_shared_16(room + place(row, chunk));
        if (row < count) *reinterpret_cast<uint4*>(rows + row * stride + chunk * 8) = x;
    }
}

// --- what is seen ----------------------------------------------------------------------------------------------------

// Segments of a batch row, or null pointers where all its tokens are one segment.
struct Segments {
    const int* numbers;  // (tokens,)
    const int2* ranges;  // (spans,): least and greatest number of each SPAN tokens
    int tokens;
};

__device__ __forceinline__ Segments segments_of_row(const int* numbers, const int2* ranges, int batch, int tokens) {
    if (numbers == nullptr) return {nullptr, nullptr, tokens};
    return {numbers + int64(batch) * tokens, ranges + int64(batch) * ((tokens + SPAN - 1) / SPAN), tokens};
}

// Least and greatest segment number of `count` tokens; (greatest int, least int) of none.
__device__ __forceinline__ int2 range_of(const Segments& segments, int first, int count) {
    int2 range = make_int2(0x7fffffff, -0x7fffffff - 1);
    if (segments.numbers == nullptr) return range;
    const int end = min(first + count, segments.tokens);
    for (int span = first / SPAN; span * SPAN < end; span++) {
        const int2 next = segments.ranges[span];
        range = make_int2(min(range.x, next.x), max(range.y, next.y));
    }
    return range;
}

__device__ __forceinline__ bool meet(int2 a, int2 b) { return a.x <= b.y && b.x <= a.y; }
__device__ __forceinline__ bool one_segment(int2 a, int2 b) { return a.x == a.y && b.x == b.y && a.x == b.x; }

// The first tile from `tile` on, going in STEP's direction and before `end`, that may share a segment with `own`; else
// `end`. Each lane looks at one tile.
template <int STEP, int TILE>
__device__ __forceinline__ int first_seen(int tile, int end, const Segments& segments, int2 own) {
    if (segments.numbers == nullptr) return tile;
    for (; STEP * (end - tile) > 0; tile += 32 * STEP) {
        const int candidate = tile + STEP * lane_of_warp();
        const bool seen = STEP * (end - candidate) > 0 && meet(range_of(segments, candidate * TILE, TILE), own);
        const uint32 votes = __ballot_sync(0xffffffffu, seen);
        if (votes != 0) return tile + STEP * (__ffs(votes) - 1);
    }
    return end;
}

// s = -infinity where the key is not seen. Rows of s start at token first_row, columns at first_column.
template <bool KEYS_ARE_ROWS, int M, int N>
__device__ __forceinline__ void hide(
    float (&s)[M][N / 8][4], int first_row, int first_column, const Segments& segments, bool by_segment
) {
    first_row += lane_of_warp() / 4;
    first_column += lane_of_warp() % 4 * 2;
    int row_number[M][2];
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * i + 8 * half;
            row_number[i][half] = by_segment && row < segments.tokens ? segments.numbers[row] : 0;
        }
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int column = first_column + 8 * n + e;
            const int number = by_segment && column < segments.tokens ? segments.numbers[column] : 0;
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = first_row + 16 * i + 8 * half;
                    const bool causal = KEYS_ARE_ROWS ? row <= column : column <= row;
                    if (!causal || number != row_number[i][half]) s[i][n][2 * half + e] = MINUS_INFINITY;
                }
        }
}

// numbers: the segments as int; ranges: see Segments. A warp for each span; grid (spans / 8, B), 256 threads.
extern "C" __global__ void segment_ranges(const void* given, int bytes, int* numbers, int2* ranges, int tokens) {
    const int spans = (tokens + SPAN - 1) / SPAN, span = blockIdx.x * 8 + threadIdx.x / 32;
    if (span >= spans) return;
    const int token = span * SPAN + lane_of_warp();
    const int64 index = int64(blockIdx.y) * tokens + min(token, tokens - 1);
    const int number = bytes == 8 ? int(static_cast<const int64*>(given)[index]) : static_cast<const int*>(given)[index];
    if (token < tokens) numbers[index] = number;
    const int least = __reduce_min_sync(0xffffffffu, number), greatest = __reduce_max_sync(0xffffffffu, number);
    if (lane_of_warp() == 0) ranges[int64(blockIdx.y) * spans + span] = make_int2(least, greatest);
}

// --- kernels ---------------------------------------------------------------------------------------------------------
// q, k, v: (B, T, H or K, d), the last axis contiguous, other strides in elements. o, do and the gradients are contiguous.
// lse: L log2 e, (B, H, T). Grid: (B H, tiles of queries), or (B K, tiles of keys).

extern __shared__ __align__(1024) unsigned char shared_memory[];

extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS) attention_forward(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, bf16* o, float* lse, const int* segment_numbers,
    const int2* segment_ranges, int tokens, int heads, int kv_heads, float scale
) {
    constexpr int M = FORWARD_M, TILE = FORWARD_TILE, OWN = 16 * M * WARPS;
    const int batch = blockIdx.x / heads, head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN, warp_row = threadIdx.x / 32 * 16 * M;
    const int warp_first = first + warp_row, warp_end = warp_first + 16 * M;
    q += batch * q_batch + head * q_head + first * q_token;
    k += batch * k_batch + kv_head * k_head;
    v += batch * v_batch + kv_head * v_head;
    const float scale_log2 = scale * LOG2_E;

    const Segments segments = segments_of_row(segment_numbers, segment_ranges, batch, tokens);
    const int2 block_range = range_of(segments, first, OWN), warp_range = range_of(segments, warp_first, 16 * M);

    const uint32 q_rows = shared_address(shared_memory), k_tiles = q_rows + OWN * ROW, v_tiles = k_tiles + 2 * TILE * ROW;
    auto load = [&](int tile, int stage) {
        const int64 key = tile * TILE;
        load_rows<TILE>(k_tiles + stage * TILE * ROW, k + key * k_token, k_token, tokens - key);
        load_rows<TILE>(v_tiles + stage * TILE * ROW, v + key * v_token, v_token, tokens - key);
    };

    float acc[M][HEAD / 8][4], greatest[M][2], sum[M][2];
    clear<M>(acc);
#pragma unroll
    for (int i = 0; i < M; i++) {
        greatest[i][0] = greatest[i][1] = MINUS_INFINITY;
        sum[i][0] = sum[i][1] = 0;
    }

    // From the diagonal back: the first tile that a row meets holds its own key, so `greatest` is finite from there on.
    int tile = first_seen<-1, TILE>((min(first + OWN, tokens) - 1) / TILE, -1, segments, block_range);
    load_rows<OWN>(q_rows, q, q_token, tokens - first);
    load(tile, 0);
    for (int stage = 0; tile >= 0; stage ^= 1) {
        const int next = first_seen<-1, TILE>(tile - 1, -1, segments, block_range), key = tile * TILE;
        wait_for_copies();
        __syncthreads();  // the tile is there for all, and all are done with the other buffer
        if (next >= 0) load(next, stage ^ 1);
        const int2 tile_range = range_of(segments, key, TILE);
        const bool by_segment = segments.numbers != nullptr && !one_segment(tile_range, warp_range);
        if (key < warp_end && (!by_segment || meet(tile_range, warp_range))) {
            float s[M][TILE / 8][4];
            scores<M, TILE>(s, q_rows + warp_row * ROW, k_tiles + stage * TILE * ROW);
            if (by_segment || key + TILE - 1 > warp_first) {
                hide<false, M, TILE>(s, warp_first, key, segments, by_segment);
            }
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float top = greatest[i][half];
#pragma unroll
                    for (int n = 0; n < TILE / 8; n++) {
                        top = fmaxf(top, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
                    }
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));  // the four lanes of a row
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                    const float kept = exp2_approximate((greatest[i][half] - top) * scale_log2);
                    greatest[i][half] = top;
                    top *= scale_log2;
                    float total = sum[i][half] * kept;
#pragma unroll
                    for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; e++) {
                            s[i][n][e] = exp2_approximate(fmaf(s[i][n][e], scale_log2, -top));
                            total += s[i][n][e];
                        }
                    sum[i][half] = total;
#pragma unroll
                    for (int n = 0; n < HEAD / 8; n++) {
                        acc[i][n][2 * half] *= kept;
                        acc[i][n][2 * half + 1] *= kept;
                    }
                }
            accumulate<M, TILE>(acc, s, v_tiles + stage * TILE * ROW);
        }
        tile = next;
    }

    const int lane = lane_of_warp();
    lse += (int64(batch) * heads + head) * tokens;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[i][half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const int query = warp_first + 16 * i + 8 * half + lane / 4;
            if (lane % 4 == 0 && query < tokens) lse[query] = greatest[i][half] * scale_log2 + log2f(total);
            sum[i][half] = 1 / total;
        }
    const int64 stride = int64(heads) * HEAD;
    o += (int64(batch) * tokens + warp_first) * stride + head * HEAD;
    store_rows<M>(acc, sum, q_rows + warp_row * ROW, o, stride, tokens - warp_first);
}

// dq, and on the way delta (B, H, T), which attention_dkdv reads.
extern "C" __global__ void __launch_bounds__(BLOCK, DQ_BLOCKS) attention_dq(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, const bf16* o, const bf16* d_o, const float* lse,
    float* delta, bf16* dq, const int* segment_numbers, const int2* segment_ranges, int tokens, int heads, int kv_heads,
    float scale
) {
    constexpr int M = DQ_M, TILE = DQ_TILE, OWN = 16 * M * WARPS;
    const int batch = blockIdx.x / heads, head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN, warp_row = threadIdx.x / 32 * 16 * M;
    const int warp_first = first + warp_row, warp_end = warp_first + 16 * M;
    const int64 stride = int64(heads) * HEAD, offset = (int64(batch) * tokens + first) * stride + head * HEAD;
    q += batch * q_batch + head * q_head + first * q_token;
    k += batch * k_batch + kv_head * k_head;
    v += batch * v_batch + kv_head * v_head;
    const float scale_log2 = scale * LOG2_E;

    const Segments segments = segments_of_row(segment_numbers, segment_ranges, batch, tokens);
    const int2 block_range = range_of(segments, first, OWN), warp_range = range_of(segments, warp_first, 16 * M);

    const uint32 q_rows = shared_address(shared_memory), do_rows = q_rows + OWN * ROW;
    const uint32 k_tiles = do_rows + OWN * ROW, v_tiles = k_tiles + 2 * TILE * ROW;
    auto load = [&](int tile, int stage) {
        const int64 key = tile * TILE;
        load_rows<TILE>(k_tiles + stage * TILE * ROW, k + key * k_token, k_token, tokens - key);
        load_rows<TILE>(v_tiles + stage * TILE * ROW, v + key * v_token, v_token, tokens - key);
    };

    int tile = first_seen<-1, TILE>((min(first + OWN, tokens) - 1) / TILE, -1, segments, block_range);
    load_rows<OWN>(q_rows, q, q_token, tokens - first);
    load_rows<OWN>(do_rows, d_o + offset, stride, tokens - first);
    load(tile, 0);
    wait_for_copies();
    __syncthreads();

    // delta: the four lanes of a row take a quarter of it each. Rows past the end have do = 0, so dS = 0.
    const int lane = lane_of_warp();
    float row_lse[M][2], row_delta[M][2];
    o += offset + warp_row * stride;
    lse += (int64(batch) * heads + head) * tokens;
    delta += (int64(batch) * heads + head) * tokens;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = 16 * i + 8 * half + lane / 4, query = warp_first + row;
            const bool there = query < tokens;
            float total = 0;
#pragma unroll
            for (int chunk = lane % 4; chunk < CHUNKS; chunk += 4) {
                const uint4 a = load_shared_16(do_rows + place(warp_row + row, chunk));
                uint4 b = make_uint4(0, 0, 0, 0);
                if (there) b = *reinterpret_cast<const uint4*>(o + row * stride + chunk * 8);
                const uint32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float2 x = unpack(left[e]), y = unpack(right[e]);
                    total += x.x * y.x + x.y * y.y;
                }
            }
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            row_delta[i][half] = total;
            row_lse[i][half] = there ? lse[query] : 0;
            if (there && lane % 4 == 0) delta[query] = total;
        }

    float acc[M][HEAD / 8][4];
    clear<M>(acc);
    for (int stage = 0; tile >= 0; stage ^= 1) {
        const int next = first_seen<-1, TILE>(tile - 1, -1, segments, block_range), key = tile * TILE;
        wait_for_copies();
        __syncthreads();
        if (next >= 0) load(next, stage ^ 1);
        const int2 tile_range = range_of(segments, key, TILE);
        const bool by_segment = segments.numbers != nullptr && !one_segment(tile_range, warp_range);
        if (key < warp_end && (!by_segment || meet(tile_range, warp_range))) {
            float s[M][TILE / 8][4], dp[M][TILE / 8][4];
            scores<M, TILE>(s, q_rows + warp_row * ROW, k_tiles + stage * TILE * ROW);
            if (by_segment || key + TILE - 1 > warp_first) {
                hide<false, M, TILE>(s, warp_first, key, segments, by_segment);
            }
            scores<M, TILE>(dp, do_rows + warp_row * ROW, v_tiles + stage * TILE * ROW);
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int n = 0; n < TILE / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float p = exp2_approximate(fmaf(s[i][n][e], scale_log2, -row_lse[i][e / 2]));
                        s[i][n][e] = p * (dp[i][n][e] - row_delta[i][e / 2]);
                    }
            accumulate<M, TILE>(acc, s, k_tiles + stage * TILE * ROW);
        }
        tile = next;
    }
#pragma unroll
    for (int i = 0; i < M; i++) row_lse[i][0] = row_lse[i][1] = scale;
    dq += offset + warp_row * stride;
    store_rows<M>(acc, row_lse, q_rows + warp_row * ROW, dq, stride, tokens - warp_first);
}

extern "C" __global__ void __launch_bounds__(BLOCK, DKDV_BLOCKS) attention_dkdv(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, const bf16* d_o, const float* lse, const float* delta,
    bf16* dk, bf16* dv, const int* segment_numbers, const int2* segment_ranges, int tokens, int heads, int kv_heads,
    float scale
) {
    constexpr int M = DKDV_M, TILE = DKDV_TILE, OWN = 16 * M * WARPS;
    const int group = heads / kv_heads, batch = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int first = blockIdx.y * OWN, warp_row = threadIdx.x / 32 * 16 * M, warp_first = first + warp_row;
    const int64 stride = int64(heads) * HEAD;
    q += batch * q_batch + kv_head * group * q_head;
    d_o += int64(batch) * tokens * stride + kv_head * group * HEAD;
    k += batch * k_batch + kv_head * k_head + first * k_token;
    v += batch * v_batch + kv_head * v_head + first * v_token;
    lse += (int64(batch) * heads + kv_head * group) * tokens;
    delta += (int64(batch) * heads + kv_head * group) * tokens;
    const float scale_log2 = scale * LOG2_E;

    const Segments segments = segments_of_row(segment_numbers, segment_ranges, batch, tokens);
    const int2 block_range = range_of(segments, first, OWN), warp_range = range_of(segments, warp_first, 16 * M);

    const uint32 k_rows = shared_address(shared_memory), v_rows = k_rows + OWN * ROW;
    const uint32 q_tiles = v_rows + OWN * ROW, do_tiles = q_tiles + 2 * TILE * ROW;
    const uint32 lse_tiles = do_tiles + 2 * TILE * ROW, delta_tiles = lse_tiles + 2 * TILE * 4;
    auto load = [&](int member, int tile, int stage) {  // queries past the end: q = do = lse = delta = 0, so dS = 0
        const int64 query = tile * TILE;
        load_rows<TILE>(q_tiles + stage * TILE * ROW, q + member * q_head + query * q_token, q_token, tokens - query);
        load_rows<TILE>(do_tiles + stage * TILE * ROW, d_o + member * HEAD + query * stride, stride, tokens - query);
        if (threadIdx.x < TILE) {
            const int64 index = member * int64(tokens) + query;
            const bool there = query + threadIdx.x < tokens;
            const int mine = there ? threadIdx.x : 0;
            copy_4(lse_tiles + (stage * TILE + threadIdx.x) * 4, lse + index + mine, there);
            copy_4(delta_tiles + (stage * TILE + threadIdx.x) * 4, delta + index + mine, there);
        }
    };

    float dk_acc[M][HEAD / 8][4], dv_acc[M][HEAD / 8][4];
    clear<M>(dk_acc);
    clear<M>(dv_acc);

    const int tiles = (tokens + TILE - 1) / TILE;
    const int start = first_seen<1, TILE>(first / TILE, tiles, segments, block_range);
    load_rows<OWN>(k_rows, k, k_token, tokens - first);
    load_rows<OWN>(v_rows, v, v_token, tokens - first);
    load(0, start, 0);
    for (int member = 0, tile = start, stage = 0; member < group; stage ^= 1) {
        int next = first_seen<1, TILE>(tile + 1, tiles, segments, block_range), next_member = member;
        if (next == tiles) {
            next = start;
            next_member++;
        }
        wait_for_copies();
        __syncthreads();
        if (next_member < group) load(next_member, next, stage ^ 1);
        const int query = tile * TILE;
        const int2 tile_range = range_of(segments, query, TILE);
        const bool by_segment = segments.numbers != nullptr && !one_segment(tile_range, warp_range);
        if (query + TILE > warp_first && (!by_segment || meet(tile_range, warp_range))) {
            float s[M][TILE / 8][4], dp[M][TILE / 8][4];
            scores<M, TILE>(s, k_rows + warp_row * ROW, q_tiles + stage * TILE * ROW);
            if (by_segment || query < warp_first + 16 * M - 1) {
                hide<true, M, TILE>(s, warp_first, query, segments, by_segment);
            }
            const uint32 lane_pair = (stage * TILE + lane_of_warp() % 4 * 2) * 4;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
                const float2 column_lse = load_shared_floats(lse_tiles + lane_pair + 32 * n);
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float own = e % 2 == 0 ? column_lse.x : column_lse.y;
                        s[i][n][e] = exp2_approximate(fmaf(s[i][n][e], scale_log2, -own));
                    }
            }
            accumulate<M, TILE>(dv_acc, s, do_tiles + stage * TILE * ROW);
            scores<M, TILE>(dp, v_rows + warp_row * ROW, do_tiles + stage * TILE * ROW);
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
                const float2 column_delta = load_shared_floats(delta_tiles + lane_pair + 32 * n);
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        s[i][n][e] *= dp[i][n][e] - (e % 2 == 0 ? column_delta.x : column_delta.y);
                    }
            }
            accumulate<M, TILE>(dk_acc, s, q_tiles + stage * TILE * ROW);
        }
        tile = next;
        member = next_member;
    }

    float factor[M][2];
    const int64 kv_stride = int64(kv_heads) * HEAD;
    const int64 offset = (int64(batch) * tokens + warp_first) * kv_stride + kv_head * HEAD;
#pragma unroll
    for (int i = 0; i < M; i++) factor[i][0] = factor[i][1] = scale;
    store_rows<M>(dk_acc, factor, k_rows + warp_row * ROW, dk + offset, kv_stride, tokens - warp_first);
#pragma unroll
    for (int i = 0; i < M; i++) factor[i][0] = factor[i][1] = 1;
    store_rows<M>(dv_acc, factor, v_rows + warp_row * ROW, dv + offset, kv_stride, tokens - warp_first);
}
