/* The threads of a model. A launch gives every thread a range of its blocks, the same from launch to launch, so that
 * state stays near the core that wrote it and neighbours share no lines. A thread claims half of what is left of its
 * range (compare-and-swap on the range's ticket), again and again, and then of the others', so that fast and slow cores
 * finish together. The last block of a range is its owner's, who has asked for its memory already; and a thread without
 * work looks at its own ticket alone, as every look at another's makes that one's next claim slower. The caller waits
 * for blocks, not for threads, and when it has waited long it takes last blocks, too: a worker that got no core in time
 * costs little.
 *
 * A ticket names its launch, so a claim by a thread that slept through launches fails; fields read between loading a
 * ticket and swapping it are therefore those of its launch, and they are atomics because a late reader may look. */
#include "es_internal.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ES_LATE = 64, ES_POLLS = 4000, ES_YIELDS = 64, ES_STACK = 1 << 20 };

struct es_i_worker {
    es_i_pool *pool;
    pthread_t thread;
    uint32_t index; /* of the thread; the caller is 0 */
    int32_t core;
    uint32_t state; /* 0 starting, 1 running, 2 cannot be pinned */
};

static void es_i_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory"); /* `yield` is a no-op on most cores; isb waits some 30 cycles */
#endif
}

uint32_t es_i_cores(void)
{
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return (uint32_t)CPU_COUNT(&set);
#endif
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 ? (uint32_t)n : 1;
}

int es_i_may_run_on(int32_t core)
{
#if defined(__linux__)
    cpu_set_t set;
    return core >= 0 && core < CPU_SETSIZE && sched_getaffinity(0, sizeof set, &set) == 0 &&
           CPU_ISSET((size_t)core, &set) != 0;
#else
    (void)core;
    return 0;
#endif
}

int es_i_pin_self(int32_t core)
{
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (core < 0 || core >= CPU_SETSIZE)
        return -1;
    CPU_SET((size_t)core, &set);
    return sched_setaffinity(0, sizeof set, &set);
#else
    (void)core;
    return -1;
#endif
}

static uint64_t *es_i_ticket(const es_i_pool *pool, uint32_t thread)
{
    return pool->tickets + thread * (ES_LINE / sizeof(uint64_t));
}

/* Where the range of a thread begins, that of the thread before ends. */
static uint32_t es_i_range(const es_i_pool *pool, int32_t grid, uint32_t thread)
{
    return (uint32_t)((uint64_t)(uint32_t)grid * thread / pool->n_threads);
}

/* Runs blocks of one thread's range until none is unclaimed, or one if `spare`; returns how many. */
static uint32_t es_i_drain_range(const es_i_pool *pool, uint32_t thread, int spare)
{
    const es_i_board *board = pool->board;
    uint64_t *at = es_i_ticket(pool, thread);
    uint32_t finished = 0;
    uint64_t ticket = __atomic_load_n(at, __ATOMIC_ACQUIRE);
    while ((uint32_t)ticket != 0) {
        es_kernel_fn fn = __atomic_load_n(&board->fn, __ATOMIC_RELAXED);
        void *const *args = __atomic_load_n(&board->args, __ATOMIC_RELAXED);
        int32_t grid = __atomic_load_n(&board->grid, __ATOMIC_RELAXED);
        uint32_t left = (uint32_t)ticket, take = spare ? left / 2 : left - left / 2;
        if (take == 0)
            break;
        if (!__atomic_compare_exchange_n(at, &ticket, ticket - take, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            continue;
        int32_t begin = (int32_t)(es_i_range(pool, grid, thread + 1) - left);
        fn(args, begin, begin + (int32_t)take);
        finished += take;
        ticket = __atomic_load_n(at, __ATOMIC_ACQUIRE);
    }
    return finished;
}

/* The own range, then the others', all of them or but for the last block of each. What is run belongs to one launch: the
 * next is posted only when the count returned here has been added to `done`. */
static uint32_t es_i_drain(const es_i_pool *pool, uint32_t self, int spare)
{
    uint32_t finished = es_i_drain_range(pool, self, 0);
    for (uint32_t i = 1; i < pool->n_threads; i++)
        finished += es_i_drain_range(pool, (self + i) % pool->n_threads, spare);
    return finished;
}

static int es_i_work_waits(const es_i_pool *pool)
{
    for (uint32_t i = 0; i < pool->n_threads; i++)
        if ((uint32_t)__atomic_load_n(es_i_ticket(pool, i), __ATOMIC_SEQ_CST) != 0)
            return 1;
    return 0;
}

/* Sleeps until es_i_wake or work. A worker counts itself before it looks at the tickets, and the poster posts before
 * it looks at the count, both sequentially consistent: one of them sees the other. */
static void es_i_doze(es_i_pool *pool)
{
    pthread_mutex_lock(&pool->sleep_lock);
    uint32_t wakes = pool->wakes;
    __atomic_add_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    while (pool->wakes == wakes && !es_i_work_waits(pool) && !__atomic_load_n(&pool->stop, __ATOMIC_RELAXED))
        pthread_cond_wait(&pool->wake, &pool->sleep_lock);
    if (pool->wakes == wakes)
        __atomic_sub_fetch(&pool->sleepers, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&pool->sleep_lock);
}

static void es_i_wake(es_i_pool *pool)
{
    pthread_mutex_lock(&pool->sleep_lock);
    __atomic_store_n(&pool->sleepers, 0, __ATOMIC_SEQ_CST);
    pool->wakes++;
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
}

static void *es_i_worker_main(void *argument)
{
    struct es_i_worker *self = (struct es_i_worker *)argument;
    es_i_pool *pool = self->pool;
    int pinned = self->core < 0 || es_i_pin_self(self->core) == 0;
    __atomic_store_n(&self->state, pinned ? 1u : 2u, __ATOMIC_RELEASE);
    uint32_t idle = 0;
    uint64_t seen = 0; /* the launch that was worked on */
    (void)es_i_float_mode_flush();
    while (!__atomic_load_n(&pool->stop, __ATOMIC_ACQUIRE)) {
        uint64_t launch = __atomic_load_n(es_i_ticket(pool, self->index), __ATOMIC_ACQUIRE) >> 32;
        if (launch != seen) {
            uint32_t finished = es_i_drain(pool, self->index, 1);
            if (finished > 0)
                __atomic_add_fetch(pool->done, finished, __ATOMIC_RELEASE);
            seen = launch;
            idle = 0;
        } else if (idle < pool->spin) {
            idle++;
            es_i_relax();
        } else if (idle < pool->spin + ES_YIELDS) {
            idle++;
            sched_yield();
        } else {
            es_i_doze(pool);
            idle = 0;
        }
    }
    return NULL;
}

/* Waiting for blocks that others run. A worker that takes this long has lost its core: to this very thread when there
 * are more threads than cores, else to another process, which polling would only keep from finishing. */
static void es_i_wait(const es_i_pool *pool, uint32_t polls)
{
    const struct timespec nap = {0, 50000};
    if (pool->crowded)
        sched_yield();
    else if (polls < ES_POLLS)
        es_i_relax();
    else
        (void)nanosleep(&nap, NULL);
}

void es_i_pool_launch(es_i_pool *pool, es_kernel_fn fn, void *const *args, int32_t grid)
{
    if (grid == 1 || pool->n_started == 0) {
        fn(args, 0, grid);
        return;
    }
    es_i_board *board = pool->board;
    __atomic_store_n(pool->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&board->fn, fn, __ATOMIC_RELAXED);
    __atomic_store_n(&board->args, args, __ATOMIC_RELAXED);
    __atomic_store_n(&board->grid, grid, __ATOMIC_RELAXED);
    pool->launch++;
    for (uint32_t i = pool->n_threads; i-- > 0;) {
        uint32_t blocks = es_i_range(pool, grid, i + 1) - es_i_range(pool, grid, i);
        __atomic_store_n(es_i_ticket(pool, i), (uint64_t)pool->launch << 32 | blocks, __ATOMIC_SEQ_CST);
    }
    if (__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST) > 0)
        es_i_wake(pool);
    uint32_t others = (uint32_t)grid - es_i_drain(pool, 0, 1), late = pool->crowded ? 0 : ES_LATE;
    for (uint32_t polls = 0; __atomic_load_n(pool->done, __ATOMIC_ACQUIRE) != others; polls++) {
        if (polls >= late)
            others -= es_i_drain(pool, 0, 0);
        es_i_wait(pool, polls);
    }
}

/* Waits until a worker runs; its core is then right or wrong. */
static int es_i_worker_runs(const struct es_i_worker *worker)
{
    uint32_t state;
    while ((state = __atomic_load_n(&worker->state, __ATOMIC_ACQUIRE)) == 0)
        sched_yield();
    return state == 1;
}

static es_status es_i_worker_start(es_i_pool *pool, uint32_t index, int32_t core, es_error *why)
{
    struct es_i_worker *worker = &pool->workers[index - 1];
    worker->pool = pool;
    worker->index = index;
    worker->core = core;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0)
        return es_i_fail(why, ES_E_THREAD, "thread %u of %u cannot be started", index, pool->n_threads);
    (void)pthread_attr_setstacksize(&attributes, ES_STACK);
    int failed = pthread_create(&worker->thread, &attributes, es_i_worker_main, worker);
    (void)pthread_attr_destroy(&attributes);
    if (failed)
        return es_i_fail(why, ES_E_THREAD, "thread %u of %u cannot be started", index, pool->n_threads);
    pool->n_started++;
    if (!es_i_worker_runs(worker))
        return es_i_fail(why, ES_E_CORE, "thread %u cannot be pinned to core %d", index, (int)core);
    return ES_OK;
}

es_status es_i_pool_start(es_i_pool *pool, const es_options *options, es_error *why)
{
    memset(pool, 0, sizeof *pool);
    char *line = pool->lines + (ES_LINE - (uintptr_t)pool->lines % ES_LINE) % ES_LINE;
    pool->board = (es_i_board *)(void *)line;
    pool->done = (uint32_t *)(void *)(line + ES_LINE);
    uint32_t cores = es_i_cores();
    uint32_t wanted = options->n_threads > 0 ? (uint32_t)options->n_threads : cores;
    pool->n_threads = wanted < ES_THREADS_MAX ? wanted : ES_THREADS_MAX;
    pool->crowded = pool->n_threads > cores;
    pool->spin = pool->crowded ? 0 : options->spin;
    if (pool->spin > UINT32_MAX - ES_YIELDS)
        pool->spin = UINT32_MAX - ES_YIELDS;
    pool->first_core = options->n_cores > 0 ? options->cores[0] : -1;
    if (pthread_mutex_init(&pool->sleep_lock, NULL) != 0)
        return es_i_fail(why, ES_E_THREAD, "a mutex cannot be made");
    if (pthread_cond_init(&pool->wake, NULL) != 0) {
        pthread_mutex_destroy(&pool->sleep_lock);
        return es_i_fail(why, ES_E_THREAD, "a condition variable cannot be made");
    }
    pool->workers = (struct es_i_worker *)calloc(pool->n_threads, sizeof *pool->workers);
    pool->turns = calloc(pool->n_threads + 1, ES_LINE);
    es_status status =
        pool->workers != NULL && pool->turns != NULL ? ES_OK : es_i_fail(why, ES_E_HEAP, "no memory for the threads");
    if (status == ES_OK)
        pool->tickets =
            (uint64_t *)(void *)((char *)pool->turns + (ES_LINE - (uintptr_t)pool->turns % ES_LINE) % ES_LINE);
    for (uint32_t i = 1; i < pool->n_threads && status == ES_OK; i++)
        status = es_i_worker_start(pool, i, options->n_cores > 0 ? options->cores[i % options->n_cores] : -1, why);
    if (status != ES_OK)
        es_i_pool_stop(pool);
    return status;
}

void es_i_pool_stop(es_i_pool *pool)
{
    __atomic_store_n(&pool->stop, 1, __ATOMIC_SEQ_CST);
    es_i_wake(pool);
    for (uint32_t i = 0; i < pool->n_started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->sleep_lock);
    free(pool->workers);
    free(pool->turns);
    pool->workers = NULL;
    pool->turns = NULL;
}
