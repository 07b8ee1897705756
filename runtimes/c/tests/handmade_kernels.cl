/* The kernels of the hand-made model of tests/runtime/handmade.py for a GPU; C, V and N as there. An argument of the
 * plan is a memory object and an offset in it. Tokens and positions are clamped, as in handmade_kernels.c. */
enum { C = 16, V = 32, N = 64 };

#define ARG(i) __global char *m##i, ulong o##i
#define AT(type, i) ((__global type *)(m##i + o##i))

/* Group b of C work-items: e[b] = E[token[b]] */
__kernel void gather(ARG(0), ARG(1), ARG(2))
{
    int b = get_group_id(0), c = get_local_id(0);
    AT(float, 2)[b * C + c] = AT(float, 1)[(AT(long, 0)[b] & (V - 1)) * C + c];
}

/* One group of C: s <- s/2 + e; h[position] <- e; m <- m + position, for T tokens */
#define LEAK(T)                                                                                                        \
    __kernel void leak##T(ARG(0), ARG(1), ARG(2), ARG(3), ARG(4))                                                      \
    {                                                                                                                  \
        int c = get_local_id(0);                                                                                       \
        long position = AT(long, 1)[0];                                                                                \
        float s = AT(float, 2)[c];                                                                                     \
        for (int t = 0; t < T; t++) {                                                                                  \
            float e = AT(float, 0)[t * C + c];                                                                         \
            s = s * 0.5f + e;                                                                                          \
            AT(float, 3)[((position + t) & (N - 1)) * C + c] = e;                                                      \
            if (c == 0)                                                                                                \
                AT(int, 4)[0] += (int)(position + t);                                                                  \
        }                                                                                                              \
        AT(float, 2)[c] = s;                                                                                           \
    }
LEAK(1)
LEAK(4)
LEAK(8)

/* One work-item per logit: W s + sum(h[0 .. position + T]) + m */
#define LOGITS(T)                                                                                                      \
    __kernel void logits##T(ARG(0), ARG(1), ARG(2), ARG(3), ARG(4), ARG(5))                                            \
    {                                                                                                                  \
        int v = get_global_id(0);                                                                                      \
        long rows = min(AT(long, 3)[0] + T, (long)N);                                                                  \
        float sum = 0, dot = 0;                                                                                        \
        for (long i = 0; i < rows * C; i++)                                                                            \
            sum += AT(float, 1)[i];                                                                                    \
        for (int c = 0; c < C; c++)                                                                                    \
            dot += AT(float, 4)[v * C + c] * AT(float, 0)[c];                                                          \
        AT(float, 5)[v] = dot + sum + (float)AT(int, 2)[0];                                                            \
    }
LOGITS(1)
LOGITS(4)
LOGITS(8)

/* One group of V: the first of the largest, by halves in local memory. */
__kernel void next(ARG(0), ARG(1))
{
    __local int best[V];
    int v = get_local_id(0);
    best[v] = v;
    for (int step = V / 2; step > 0; step /= 2) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (v < step) {
            int left = best[v], right = best[v + step];
            float a = AT(float, 0)[left], b = AT(float, 0)[right];
            if (b > a || (b == a && right < left))
                best[v] = right;
        }
    }
    if (v == 0)
        AT(long, 1)[0] = best[0];
}
