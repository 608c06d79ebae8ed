// Causal attention without a T x T matrix in memory: a tile of scores lives in registers only. What the kernels of
// attention_forward.cu and attention_backward.cu share: the tiles, their products, and which keys a query sees.
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
// Rooflines and measured times stand with the kernels.
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

// Start copying tile `tile` of two arrays of rows, which stand beside one another there, to buffer `stage` of each.
template <int TILE>
__device__ __forceinline__ void load_tiles(
    uint32 tiles_a, const bf16* a, int64 stride_a, uint32 tiles_b, const bf16* b, int64 stride_b, int tile, int stage,
    int tokens
) {
    const int64 first = tile * TILE;
    load_rows<TILE>(tiles_a + stage * TILE * ROW, a + first * stride_a, stride_a, tokens - first);
    load_rows<TILE>(tiles_b + stage * TILE * ROW, b + first * stride_b, stride_b, tokens - first);
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

// How a warp's ROWS rows stand to a tile of columns: whether any sees any, and whether segments hide some.
struct View {
    bool seen, by_segment;
};

template <bool KEYS_ARE_ROWS, int ROWS, int TILE>
__device__ __forceinline__ View view_of(const Segments& segments, int first_row, int2 row_range, int first_column) {
    const int2 range = range_of(segments, first_column, TILE);
    const bool by_segment = segments.numbers != nullptr && !one_segment(range, row_range);
    const bool causal = KEYS_ARE_ROWS ? first_column + TILE > first_row : first_column < first_row + ROWS;
    return {causal && (!by_segment || meet(range, row_range)), by_segment};
}

// s = own . tile^T, -infinity where the key is not seen.
template <bool KEYS_ARE_ROWS, int M, int N>
__device__ __forceinline__ void seen_scores(
    float (&s)[M][N / 8][4], uint32 own, uint32 tile, int first_row, int first_column, const Segments& segments,
    bool by_segment
) {
    scores<M, N>(s, own, tile);
    const bool on_diagonal = KEYS_ARE_ROWS ? first_column < first_row + 16 * M - 1 : first_column + N - 1 > first_row;
    if (by_segment || on_diagonal) hide<KEYS_ARE_ROWS, M, N>(s, first_row, first_column, segments, by_segment);
}

extern __shared__ __align__(1024) unsigned char shared_memory[];
