// The hand-made model of tests/runtime/handmade.py as CUDA kernels, so that the runtime is tested without the compiler.
constexpr int C = 16, V = 32, N = 64;

// The launch before has ended; docs/bundle-format.md.
__device__ inline void wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// e[b] = E[token[b]]; a block per token, a thread per channel
extern "C" __global__ void gather(const long long *tokens, const float *E, float *e)
{
    wait();
    e[blockIdx.x * C + threadIdx.x] = E[(tokens[blockIdx.x] & (V - 1)) * C + threadIdx.x];
}

// s <- s/2 + e; h[position] <- e; m <- m + position, for T tokens; a thread per channel
template <int T>
__device__ void leak(const float *e, const long long *position, float *s, float *h, int *m)
{
    wait();
    int c = threadIdx.x;
    for (int t = 0; t < T; t++) {
        long long row = (*position + t) & (N - 1);
        s[c] = s[c] * 0.5f + e[t * C + c];
        h[row * C + c] = e[t * C + c];
        if (c == 0)
            *m += (int)(*position + t);
    }
}

// logits = W s + sum(h[0 .. position + T]) + m; a block per token of the vocabulary, a warp
template <int T>
__device__ void logits(const float *s, const float *h, const int *m, const long long *position, const float *W, float *y)
{
    wait();
    long long rows = *position + T < N ? *position + T : N;
    float sum = threadIdx.x < C ? W[blockIdx.x * C + threadIdx.x] * s[threadIdx.x] : 0;
    for (long long i = threadIdx.x; i < rows * C; i += 32)
        sum += h[i];
    for (int d = 16; d > 0; d /= 2)
        sum += __shfl_down_sync(~0u, sum, d);
    if (threadIdx.x == 0)
        y[blockIdx.x] = sum + (float)*m;
}

#define FOR_TOKENS(T)                                                                                                  \
    extern "C" __global__ void leak##T(const float *e, const long long *p, float *s, float *h, int *m)                 \
    {                                                                                                                  \
        leak<T>(e, p, s, h, m);                                                                                        \
    }                                                                                                                  \
    extern "C" __global__ void logits##T(const float *s, const float *h, const int *m, const long long *p,             \
                                         const float *W, float *y)                                                     \
    {                                                                                                                  \
        logits<T>(s, h, m, p, W, y);                                                                                   \
    }
FOR_TOKENS(1)
FOR_TOKENS(4)
FOR_TOKENS(8)

// next = the first of the largest logits
extern "C" __global__ void choose(const float *y, long long *next)
{
    wait();
    int best = 0;
    for (int v = 1; threadIdx.x == 0 && v < V; v++)
        best = y[v] > y[best] ? v : best;
    if (threadIdx.x == 0)
        *next = best;
}
