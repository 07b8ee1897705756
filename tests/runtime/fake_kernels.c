/* The kernels that the fake driver finds: those of the hand-made model, its choice of the next token, and the runtime's
 * own helpers. */
#define PLAN_ID 0u
#include "handmade_kernels.c"

#include <string.h>

/* next = the first of the largest logits; *next is int64, or int32 under the name choose32 */
static int64_t best(const float *y)
{
    int64_t most = 0;
    for (int v = 1; v < V; v++)
        most = y[v] > y[most] ? v : most;
    return most;
}

static void choose(void *const *args, int32_t begin, int32_t end)
{
    if (begin < end)
        *(int64_t *)args[1] = best((const float *)args[0]);
}

static void choose32(void *const *args, int32_t begin, int32_t end)
{
    if (begin < end)
        *(int32_t *)args[1] = (int32_t)best((const float *)args[0]);
}

static void narrow_gather(void *const *args, int32_t begin, int32_t end)
{
    const int32_t *tokens = (const int32_t *)args[0];
    for (int32_t b = begin; b < end; b++) {
        int64_t wide = tokens[b];
        void *const one[] = {&wide, args[1], (float *)args[2] + b * C};
        gather(one, 0, 1);
    }
}

static void es_read(void *const *args, int32_t begin, int32_t end)
{
    const uint8_t *data = (const uint8_t *)args[0];
    uint64_t bytes = 16 * (uint64_t)(uintptr_t)args[1];
    uint8_t sum = 0;
    for (uint64_t i = 0; begin < end && i < bytes; i++)
        sum ^= data[i];
    *(volatile uint8_t *)args[3] = sum;
}

static void es_advance(void *const *args, int32_t begin, int32_t end)
{
    uint32_t *control = (uint32_t *)args[3], i = (*control)++;
    uint64_t widths = (uint64_t)(uintptr_t)args[4];
    size_t width = widths & 1 ? 8 : 4;
    (void)begin;
    (void)end;
    memcpy(args[1], args[0], width);
    memcpy((char *)control + 64 + i * width, args[0], width);
    if (args[2] != NULL && (widths & 2))
        ++*(int64_t *)args[2];
    else if (args[2] != NULL)
        ++*(int32_t *)args[2];
}

static void es_nothing(void *const *args, int32_t begin, int32_t end)
{
    (void)args;
    (void)begin;
    (void)end;
}

es_kernel_fn fake_kernel(const char *name);
es_kernel_fn fake_kernel(const char *name)
{
    static const es_kernel_entry more[] = {
        {"choose", choose},         {"choose32", choose32},  {"narrow_gather", narrow_gather}, {"es_read", es_read},
        {"es_advance", es_advance}, {"es_spin", es_nothing}, {"es_nothing", es_nothing}};
    for (size_t i = 0; i < sizeof more / sizeof *more; i++)
        if (strcmp(more[i].name, name) == 0)
            return more[i].fn;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (strcmp(entries[i].name, name) == 0)
            return entries[i].fn;
    return NULL;
}
