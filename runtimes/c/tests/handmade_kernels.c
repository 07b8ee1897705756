/* The kernels of the hand-made model of tests/runtime/handmade.py; C, V and N as there. Every kernel clamps what it
 * reads from the io block, so that a vandalised plan cannot make the kernels themselves the crash. */
#include <edgeseq.h>

enum { C = 16, V = 32, N = 64 };

/* e[b] = E[token[b]] */
static void gather(void *const *args, int32_t begin, int32_t end)
{
    const int64_t *tokens = (const int64_t *)args[0];
    const float *E = (const float *)args[1];
    float *e = (float *)args[2];
    for (int32_t b = begin; b < end; b++)
        for (int c = 0; c < C; c++)
            e[b * C + c] = E[(tokens[b] & (V - 1)) * C + c];
}

/* s <- s/2 + e; h[position] <- e; m <- m + position, for T tokens */
static void leak(void *const *args, int T)
{
    const float *e = (const float *)args[0];
    const int64_t *position = (const int64_t *)args[1];
    float *s = (float *)args[2], *h = (float *)args[3];
    int32_t *m = (int32_t *)args[4];
    for (int t = 0; t < T; t++) {
        int64_t row = (*position + t) & (N - 1);
        for (int c = 0; c < C; c++) {
            s[c] = s[c] * 0.5f + e[t * C + c];
            h[row * C + c] = e[t * C + c];
        }
        *m += (int32_t)(*position + t);
    }
}

/* logits = W s + sum(h[0 .. position + T]) + m */
static void logits(void *const *args, int32_t begin, int32_t end, int T)
{
    const float *s = (const float *)args[0], *h = (const float *)args[1], *W = (const float *)args[4];
    const int32_t *m = (const int32_t *)args[2];
    const int64_t *position = (const int64_t *)args[3];
    float *y = (float *)args[5], sum = 0;
    int64_t rows = *position + T < N ? *position + T : N;
    for (int64_t i = 0; i < rows * C; i++)
        sum += h[i];
    for (int32_t v = begin; v < end; v++) {
        float dot = 0;
        for (int c = 0; c < C; c++)
            dot += W[v * C + c] * s[c];
        y[v] = dot + sum + (float)*m;
    }
}

#define FOR_TOKENS(T)                                                                                                  \
    static void leak##T(void *const *args, int32_t begin, int32_t end)                                                 \
    {                                                                                                                  \
        if (begin < end)                                                                                               \
            leak(args, T);                                                                                             \
    }                                                                                                                  \
    static void logits##T(void *const *args, int32_t begin, int32_t end)                                               \
    {                                                                                                                  \
        logits(args, begin, end, T);                                                                                   \
    }
FOR_TOKENS(1)
FOR_TOKENS(4)
FOR_TOKENS(8)

static const es_kernel_entry entries[] = {{"gather", gather},  {"leak1", leak1},     {"leak4", leak4},
                                          {"leak8", leak8},    {"logits1", logits1}, {"logits4", logits4},
                                          {"logits8", logits8}};
static const char *const features[] = {
#if defined(__x86_64__)
    "sse4.2",
#elif defined(__aarch64__)
    "neon",
#endif
    0};
#ifndef PLAN_ID
#error "compile with -DPLAN_ID=0x..."
#endif
const es_kernel_table es_linked_kernels = {(uint32_t)sizeof(es_kernel_table),
                                           PLAN_ID,
                                           7,
                                           (uint32_t)(sizeof features / sizeof *features) - 1,
                                           entries,
                                           features,
                                           0,
                                           0,
                                           NULL};
