// What the engine computes on the GPU: digests of chunks, and chunks gathered into spare memory.
// The digest is phos-nh128, defined and explained in ../digest/src/lib.rs; both must give the same bits.

#define CHUNK (256u * 1024)
#define BLOCKS (CHUNK / 16)  // 16-byte blocks in a chunk
#define THREADS 256u
#define A 0x9e3779b97f4a7c15ull
#define B 0xc2b2ae3d27d4eb4full
#define C 0x165667b19e3779f9ull
#define D 0x27d4eb2f165667c5ull

static __device__ __forceinline__ unsigned long long fold(unsigned long long x, unsigned long long y) {
    return (x * y) ^ __umul64hi(x, y);
}

static __device__ __forceinline__ unsigned long long mix(unsigned long long h) {
    h ^= h >> 33;
    h *= 0xff51afd7ed558ccdull;
    h ^= h >> 33;
    h *= 0xc4ceb9fe1a85ec53ull;
    return h ^ (h >> 33);
}

// Digests of `count` chunks to `out`. Chunk n begins at list[n].
// One thread block takes one chunk at a time; loads are streaming: nothing is read twice.
extern "C" __global__ void __launch_bounds__(THREADS)
    phos_digest(const unsigned long long *list, unsigned long long count, ulonglong2 *out) {
    __shared__ unsigned long long sums[2][THREADS / 32];
    const unsigned t = threadIdx.x;
    for (unsigned long long n = blockIdx.x; n < count; n += gridDim.x) {
        const uint4 *p = reinterpret_cast<const uint4 *>(list[n]) + t;
        // Keys are odd multiples of a constant: from one block of this thread to its next they grow by a fixed step.
        const unsigned long long odd = 2 * t + 1;
        unsigned long long ka = A * odd, kb = B * odd, kc = C * odd, kd = D * odd, a = 0, b = 0;
#pragma unroll 16
        for (unsigned i = 0; i < BLOCKS / THREADS; i++) {
            const uint4 v = __ldcs(p + i * THREADS);
            const unsigned long long x = (unsigned long long)v.y << 32 | v.x, y = (unsigned long long)v.w << 32 | v.z;
            a += fold(x ^ ka, y ^ kb);
            b += fold((x << 32 | x >> 32) ^ kc, y ^ kd);
            ka += A * (2ull * THREADS), kb += B * (2ull * THREADS), kc += C * (2ull * THREADS), kd += D * (2ull * THREADS);
        }
        for (int o = 16; o; o >>= 1) {
            a += __shfl_xor_sync(~0u, a, o);
            b += __shfl_xor_sync(~0u, b, o);
        }
        if (t % 32 == 0) {
            sums[0][t / 32] = a;
            sums[1][t / 32] = b;
        }
        __syncthreads();
        if (t == 0) {
            for (unsigned w = 1; w < THREADS / 32; w++) {
                a += sums[0][w];
                b += sums[1][w];
            }
            out[n] = make_ulonglong2(mix(a ^ CHUNK), mix(b + CHUNK));
        }
        __syncthreads();
    }
}

// Copies `count` chunks, chunk n from list[n] to to + n * CHUNK.
extern "C" __global__ void __launch_bounds__(THREADS)
    phos_gather(const unsigned long long *list, unsigned long long count, unsigned long long to) {
    for (unsigned long long n = blockIdx.x; n < count; n += gridDim.x) {
        const uint4 *from = reinterpret_cast<const uint4 *>(list[n]) + threadIdx.x;
        uint4 *into = reinterpret_cast<uint4 *>(to + n * (unsigned long long)CHUNK) + threadIdx.x;
#pragma unroll 8
        for (unsigned i = 0; i < BLOCKS / THREADS; i++) {
            __stcs(into + i * THREADS, __ldcs(from + i * THREADS));
        }
    }
}
