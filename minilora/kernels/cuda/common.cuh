// What every kernel here shares. T is the dtype of the activations, set with
// -DACTIVATION=... (__nv_bfloat16, __half or float).
// Memory is read and written 16 bytes a thread: a Pack is WIDE values of T; arithmetic is in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using T = ACTIVATION;

constexpr int WIDE = 16 / sizeof(T);

struct alignas(16) Pack {
    T value[WIDE];
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename S> __device__ __forceinline__ S narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// x rounded to T and back: where a definition in ops/ rounds an intermediate, the kernel does too.
__device__ __forceinline__ float rounded(float x) { return widen(narrow<T>(x)); }

__device__ __forceinline__ Pack load(const T* p) { return *reinterpret_cast<const Pack*>(p); }
__device__ __forceinline__ void store(T* p, const Pack& pack) { *reinterpret_cast<Pack*>(p) = pack; }

// Below every finite float, and its exponential is zero.
#define MINUS_INFINITY __int_as_float(0xff800000)

// Sum over the lanes of a warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Sums of two numbers over the THREADS threads of a row (a warp, or a whole block), in a fixed order, the same in every
// thread.
template <int THREADS> __device__ __forceinline__ float2 row_sum(float a, float b) {
    a = warp_sum(a);
    b = warp_sum(b);
    if constexpr (THREADS > 32) {
        __shared__ float2 part[THREADS / 32];
        __syncthreads();  // the last call's readers are done
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = make_float2(a, b);
        __syncthreads();
        a = b = 0;
        for (int warp = 0; warp < THREADS / 32; warp++) {
            a += part[warp].x;
            b += part[warp].y;
        }
    }
    return make_float2(a, b);
}
