// Attention's forward pass: see attention.cuh, and ops/attention.py for what it computes.
//
// q, k, v: (B, T, H or K, d), the last axis contiguous, other strides in elements. o is contiguous. lse: L log2 e,
// (B, H, T). Grid: (B H, tiles of queries).
//
// Roofline. N = B H T (T + 1) / 2 pairs: 4 N d FLOP, bytes B T d (4 H + 4 K), far below. At 1 x 2048, 32 heads of 128: 34
// GFLOP, so 44 microseconds at 790 TFLOP/s (cuBLAS, which uses wgmma). This kernel issues mma.sync, which the H100 runs at
// 0.6 to 0.65 of that rate: 70 microseconds are the floor here.
// Measured on an H100 (python -m tests.gpu.flash), microseconds, beside torch's flash backend:
//   1 x 2048, 32 heads of 128           129     168
//   8 x 512, 9 heads of 64 (3 KV)        22      20
//   8 x 512, 12 heads of 64              26      29
//   1 x 32768, 32 heads of 64 (8)    14,636  13,866

#include "attention.cuh"

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

extern "C" __global__ void __launch_bounds__(BLOCK, FORWARD_BLOCKS) attention_forward(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, bf16* o, float* lse, const int* segment_numbers,
    const int2* segment_ranges, int tokens, int heads, int kv_heads, float scale
) {
    constexpr int M = FORWARD_M, TILE = FORWARD_TILE, OWN = 16 * M * WARPS;
    const int batch = blockIdx.x / heads, head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN, warp_row = threadIdx.x / 32 * 16 * M;
    const int warp_first = first + warp_row;
    q += batch * q_batch + head * q_head + first * q_token;
    k += batch * k_batch + kv_head * k_head;
    v += batch * v_batch + kv_head * v_head;
    const float scale_log2 = scale * LOG2_E;

    const Segments segments = segments_of_row(segment_numbers, segment_ranges, batch, tokens);
    const int2 block_range = range_of(segments, first, OWN), warp_range = range_of(segments, warp_first, 16 * M);

    const uint32 q_rows = shared_address(shared_memory), k_tiles = q_rows + OWN * ROW, v_tiles = k_tiles + 2 * TILE * ROW;
    auto load = [&](int tile, int stage) {
        load_tiles<TILE>(k_tiles, k, k_token, v_tiles, v, v_token, tile, stage, tokens);
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
        const View view = view_of<false, 16 * M, TILE>(segments, warp_first, warp_range, key);
        if (view.seen) {
            float s[M][TILE / 8][4];
            seen_scores<false, M, TILE>(
                s, q_rows + warp_row * ROW, k_tiles + stage * TILE * ROW, warp_first, key, segments, view.by_segment
            );
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
