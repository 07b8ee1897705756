/* Two facts about the machine, taken with the model's own threads or device: read bandwidth and the price of a launch. */
#include "es_device.h"

#include <string.h>

enum { ES_READ_BLOCK = 256 * 1024, ES_READ_LINE = 256, ES_READ_STREAMS = 8 };

typedef uint64_t es_i_wide __attribute__((vector_size(64)));

/* args: the first byte, the number of bytes, the streams. Block b reads 256 KiB as that many streams in turns, the last
 * block what is left of it. The widest loads that the CPU has, since one core reaches its bandwidth with nothing less;
 * several streams, since prefetchers of some cores follow each on its own. */
#define ES_READER(name, target_attribute)                                                                              \
    target_attribute static void name(void *const *args, int32_t begin, int32_t end)                                   \
    {                                                                                                                  \
        const uint8_t *data = (const uint8_t *)args[0];                                                                \
        uint64_t bytes = *(const uint64_t *)args[1];                                                                   \
        uint64_t first = (uint64_t)begin * ES_READ_BLOCK, last = (uint64_t)end * ES_READ_BLOCK;                        \
        uint64_t streams = *(const uint64_t *)args[2], far = ES_READ_BLOCK / streams;                                  \
        es_i_wide a = {0}, b = {0}, c = {0}, d = {0}, w[4];                                                            \
        for (uint64_t block = first; block < last; block += ES_READ_BLOCK)                                             \
            for (uint64_t near = block; near < block + far; near += ES_READ_LINE)                                      \
                for (uint64_t at = near; at < block + ES_READ_BLOCK && at < bytes; at += far) {                        \
                    memcpy(w, data + at, sizeof w);                                                                    \
                    a ^= w[0];                                                                                         \
                    b ^= w[1];                                                                                         \
                    c ^= w[2];                                                                                         \
                    d ^= w[3];                                                                                         \
                }                                                                                                      \
        a ^= b ^ c ^ d;                                                                                                \
        uint64_t sum = a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];                                          \
        __asm__ __volatile__("" : : "r"(sum) : "memory"); /* keeps the loads */                                        \
    }

ES_READER(es_i_read_any, )
#if defined(__x86_64__)
ES_READER(es_i_read_avx2, __attribute__((target("avx2"))))
ES_READER(es_i_read_avx512, __attribute__((target("avx512f"))))
#endif

static es_kernel_fn es_i_reader(void)
{
#if defined(__x86_64__)
    if (es_cpu_has("avx512f") == 1)
        return es_i_read_avx512;
    if (es_cpu_has("avx2") == 1)
        return es_i_read_avx2;
#endif
    return es_i_read_any;
}

es_status es_measure_read(es_model *model, const void *data, size_t bytes, uint32_t repeats, double *rate)
{
    if (model == NULL || rate == NULL)
        return ES_E_NULL;
    if (data == NULL && model->backend != NULL)
        return repeats < 1 || model->plan.weight_bytes < 1
                   ? ES_E_RANGE
                   : model->backend->measure_read(model->device, repeats, rate, NULL);
    if (data == NULL) {
        data = model->plan.weights;
        bytes = (size_t)model->plan.weight_bytes;
    }
    uint64_t whole = bytes / ES_READ_LINE * ES_READ_LINE, blocks = (whole + ES_READ_BLOCK - 1) / ES_READ_BLOCK;
    if (blocks < 1 || blocks > INT32_MAX || repeats < 1)
        return ES_E_RANGE;
    uint64_t streams = 1;
    void *const args[] = {(void *)(uintptr_t)data, &whole, &streams};
    es_kernel_fn reader = es_i_reader();
    uint64_t best = UINT64_MAX;
    pthread_mutex_lock(&model->lock);
    for (uint32_t i = 0; i < 2 * repeats; i++) {
        streams = i % 2 == 0 ? 1 : ES_READ_STREAMS;
        uint64_t start = es_i_now();
        es_i_pool_launch(&model->pool, reader, args, (int32_t)blocks);
        uint64_t ns = es_i_now() - start;
        best = ns < best ? ns : best;
    }
    pthread_mutex_unlock(&model->lock);
    *rate = (double)whole / ((double)(best > 0 ? best : 1) * 1e-9);
    return ES_OK;
}

static void es_i_nothing(void *const *args, int32_t begin, int32_t end)
{
    (void)args;
    (void)begin;
    (void)end;
}

es_status es_measure_launch(es_model *model, int32_t grid, uint32_t n, double *ns)
{
    if (model == NULL || ns == NULL)
        return ES_E_NULL;
    if (grid < 1 || n < 1)
        return ES_E_RANGE;
    if (model->backend != NULL)
        return model->backend->measure_launch != NULL
                   ? model->backend->measure_launch(model->device, (uint32_t)grid, n, ns, NULL)
                   : ES_E_BACKEND;
    pthread_mutex_lock(&model->lock);
    uint64_t start = es_i_now();
    for (uint32_t i = 0; i < n; i++)
        es_i_pool_launch(&model->pool, es_i_nothing, NULL, grid);
    *ns = (double)(es_i_now() - start) / (double)n;
    pthread_mutex_unlock(&model->lock);
    return ES_OK;
}
