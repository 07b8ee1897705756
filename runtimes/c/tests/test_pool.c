/* The pool by itself: every block of every launch runs exactly once, launches are ordered, sleeping threads wake,
 * the caller takes over what a worker that is held up has not claimed. Prints "ok"; meant to run under ThreadSanitizer
 * too. */
#include "../src/es_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { BLOCKS = 700 };

/* Plain memory on purpose: a lost or doubled block, or a launch that overtakes another, is a race. */
static int32_t counts[BLOCKS], values[BLOCKS];

static void count_blocks(void *const *args, int32_t begin, int32_t end)
{
    (void)args;
    for (int32_t b = begin; b < end; b++)
        counts[b]++;
}

/* values[b] of this launch depends on what another thread wrote in the launch before. */
static void shift_blocks(void *const *args, int32_t begin, int32_t end)
{
    const int32_t *from = (const int32_t *)args[0];
    int32_t *to = (int32_t *)args[1];
    for (int32_t b = begin; b < end; b++)
        to[b] = from[(b + 1) % BLOCKS] + 1;
}

static void rest(long ns)
{
    struct timespec t = {0, ns};
    (void)nanosleep(&t, NULL);
}

static int counted(es_i_pool *pool, uint32_t seed, int launches)
{
    for (int i = 0; i < launches; i++) {
        seed = seed * 1664525u + 1013904223u;
        int32_t grid = 1 + (int32_t)((seed >> 16) % BLOCKS);
        memset(counts, 0, sizeof counts);
        es_i_pool_launch(pool, count_blocks, NULL, grid);
        for (int32_t b = 0; b < BLOCKS; b++)
            if (counts[b] != (b < grid)) {
                printf("launch %d of %d blocks: block %d ran %d times\n", i, (int)grid, (int)b, (int)counts[b]);
                return 1;
            }
        if ((seed >> 8) % 64 == 0)
            rest(3000000); /* long enough to fall asleep */
    }
    return 0;
}

static int ordered(es_i_pool *pool)
{
    static int32_t other[BLOCKS];
    memset(values, 0, sizeof values);
    for (int i = 0; i < 200; i++) {
        void *const even[] = {values, other}, *const odd[] = {other, values};
        es_i_pool_launch(pool, shift_blocks, i % 2 == 0 ? even : odd, BLOCKS);
    }
    for (int32_t b = 0; b < BLOCKS; b++)
        if (values[b] != 200) {
            printf("block %d is at %d after 200 launches\n", (int)b, (int)values[b]);
            return 1;
        }
    return 0;
}

static pthread_t caller;
static uint32_t by_caller, by_worker;

static void await(const uint32_t *count, uint32_t least)
{
    for (int i = 0; i < 10000 && __atomic_load_n(count, __ATOMIC_SEQ_CST) < least; i++)
        rest(1000000);
}

/* The worker claims two blocks of its four, and they end when the caller has run the other six. */
static void hold_worker(void *const *args, int32_t begin, int32_t end)
{
    int called = pthread_equal(pthread_self(), caller) != 0;
    (void)args;
    __atomic_add_fetch(called ? &by_caller : &by_worker, (uint32_t)(end - begin), __ATOMIC_SEQ_CST);
    await(called ? &by_worker : &by_caller, called ? 1 : 6);
}

static int taken_over(void)
{
    static es_i_pool pool;
    es_options options = ES_OPTIONS_INIT;
    es_error why = ES_ERROR_INIT;
    options.n_threads = 2;
    if (es_i_pool_start(&pool, &options, &why) != ES_OK)
        return printf("%s\n", why.text), 1;
    caller = pthread_self();
    es_i_pool_launch(&pool, hold_worker, NULL, 8);
    es_i_pool_stop(&pool);
    if (by_caller < 6)
        return printf("a worker is held up and the caller ran %u of 8 blocks\n", by_caller), 1;
    return 0;
}

int main(void)
{
    if (taken_over())
        return 1;
    static es_i_pool pool; /* as in a model: it does not move */
    for (int32_t threads = 1; threads <= 5; threads++)
        for (uint32_t spin = 0; spin <= 2000; spin += 1000) {
            es_options options = ES_OPTIONS_INIT;
            es_error why = ES_ERROR_INIT;
            options.n_threads = threads;
            options.spin = spin;
            if (es_i_pool_start(&pool, &options, &why) != ES_OK)
                return printf("%s\n", why.text), 1;
            int failed = counted(&pool, (uint32_t)threads * 77u + spin, 300) || ordered(&pool);
            es_i_pool_stop(&pool);
            if (failed)
                return 1;
        }
    puts("ok");
    return 0;
}
