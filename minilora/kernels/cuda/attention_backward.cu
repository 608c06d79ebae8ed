// Attention's backward pass in two kernels: see attention.cuh, and ops/attention.py for what they compute.
//
// q, k, v: (B, T, H or K, d), the last axis contiguous, other strides in elements. o and do are contiguous; rows of the
// gradients are dq_token and dkv_token values apart, their heads beside one another. lse: L log2 e, (B, H, T). Grid of
// attention_dq: (B H, tiles of queries); of attention_dkdv: (B K, tiles of keys).
//
// Roofline. N = B H T (T + 1) / 2 pairs: 10 N d FLOP (executed: 14 N d), bytes about B T d (10 H + 12 K), far below. At
// 1 x 2048, 32 heads of 128: 86 GFLOP, so 109 microseconds at 790 TFLOP/s; with mma.sync at 0.6 to 0.65 of that rate and
// the recomputed products 240 microseconds are the floor here.
// Measured on an H100 (python -m tests.gpu.flash), microseconds of both, beside torch's flash backend:
//   1 x 2048, 32 heads of 128           397     430
//   8 x 512, 9 heads of 64 (3 KV)        83      80
//   8 x 512, 12 heads of 64              68      81
//   1 x 32768, 32 heads of 64 (8)    42,608  38,499

#include "attention.cuh"

// dq, and on the way delta (B, H, T), which attention_dkdv reads.
extern "C" __global__ void __launch_bounds__(BLOCK, DQ_BLOCKS) attention_dq(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, const bf16* o, const bf16* d_o, const float* lse,
    float* delta, bf16* dq, int64 dq_token, const int* segment_numbers, const int2* segment_ranges, int tokens, int heads,
    int kv_heads, float scale
) {
    constexpr int M = DQ_M, TILE = DQ_TILE, OWN = 16 * M * WARPS;
    const int batch = blockIdx.x / heads, head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int first = (gridDim.y - 1 - blockIdx.y) * OWN, warp_row = threadIdx.x / 32 * 16 * M;
    const int warp_first = first + warp_row;
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
        load_tiles<TILE>(k_tiles, k, k_token, v_tiles, v, v_token, tile, stage, tokens);
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
        const View view = view_of<false, 16 * M, TILE>(segments, warp_first, warp_range, key);
        if (view.seen) {
            float s[M][TILE / 8][4], dp[M][TILE / 8][4];
            seen_scores<false, M, TILE>(
                s, q_rows + warp_row * ROW, k_tiles + stage * TILE * ROW, warp_first, key, segments, view.by_segment
            );
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
    dq += (int64(batch) * tokens + warp_first) * dq_token + head * HEAD;
    store_rows<M>(acc, row_lse, q_rows + warp_row * ROW, dq, dq_token, tokens - warp_first);
}

extern "C" __global__ void __launch_bounds__(BLOCK, DKDV_BLOCKS) attention_dkdv(
    const bf16* q, int64 q_batch, int64 q_token, int64 q_head, const bf16* k, int64 k_batch, int64 k_token, int64 k_head,
    const bf16* v, int64 v_batch, int64 v_token, int64 v_head, const bf16* d_o, const float* lse, const float* delta,
    bf16* dk, bf16* dv, int64 dkv_token, const int* segment_numbers, const int2* segment_ranges, int tokens, int heads,
    int kv_heads, float scale
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
        load_tiles<TILE>(
            q_tiles, q + member * q_head, q_token, do_tiles, d_o + member * HEAD, stride, tile, stage, tokens
        );
        if (threadIdx.x < TILE) {
            const int64 index = member * int64(tokens) + tile * TILE;
            const bool there = tile * TILE + threadIdx.x < tokens;
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
        const View view = view_of<true, 16 * M, TILE>(segments, warp_first, warp_range, query);
        if (view.seen) {
            float s[M][TILE / 8][4], dp[M][TILE / 8][4];
            seen_scores<true, M, TILE>(
                s, k_rows + warp_row * ROW, q_tiles + stage * TILE * ROW, warp_first, query, segments, view.by_segment
            );
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
    const int64 offset = (int64(batch) * tokens + warp_first) * dkv_token + kv_head * HEAD;
#pragma unroll
    for (int i = 0; i < M; i++) factor[i][0] = factor[i][1] = scale;
    store_rows<M>(dk_acc, factor, k_rows + warp_row * ROW, dk + offset, dkv_token, tokens - warp_first);
#pragma unroll
    for (int i = 0; i < M; i++) factor[i][0] = factor[i][1] = 1;
    store_rows<M>(dv_acc, factor, v_rows + warp_row * ROW, dv + offset, dkv_token, tokens - warp_first);
}
