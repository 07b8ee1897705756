/* Shared by the files of the core; nothing here leaves the library. Names start with es_i_. */
#ifndef ES_INTERNAL_H
#define ES_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1 /* CPU affinity, clock_gettime, mmap under -std=c99 */
#endif

#include <edgeseq.h>
#include <pthread.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "a bundle is little-endian and used where it lies"
#endif

#define ES_LOCAL __attribute__((visibility("hidden")))
#define ES_LINE 64u /* cache line; every block of a session starts at a multiple of it */

/* ---- The records of docs/bundle-format.md, as they lie in the file ---- */

/* Section kinds, 1 to 12. */
enum { ES_META = 1, ES_STRINGS, ES_TENSORS, ES_SLOTS, ES_IO, ES_GRAPHS };
enum { ES_KERNELS = 7, ES_LAUNCHES, ES_ARGS, ES_CODE, ES_TOKENIZER, ES_WEIGHTS, ES_N_KINDS = ES_WEIGHTS };
enum { ES_SPACE_WEIGHTS, ES_SPACE_ARENA, ES_SPACE_STATE, ES_SPACE_IO, ES_N_SPACES };
enum { ES_ACCESS_READ = 1, ES_ACCESS_WRITE = 2 };
enum { ES_LAUNCH_OUTPUTS_ONLY = 1 };

typedef struct {
    uint8_t magic[8];
    uint32_t version, n_sections;
    uint64_t file_bytes;
    uint8_t model_id[16];
    uint64_t state_bytes, io_bytes;
    uint32_t context, header_crc;
} es_i_header;

typedef struct {
    uint32_t kind, crc;
    uint64_t offset, bytes, count;
} es_i_section;

typedef struct {
    uint32_t name, layout, dtype, rank;
    uint64_t dims[4], offset, bytes;
} es_i_tensor;

typedef struct {
    uint32_t name, dtype, rank, update;
    int32_t axis;
    float init;
    uint64_t dims[4], offset, bytes;
} es_i_slot;

typedef struct {
    uint32_t name, dtype, rank, role, graph, direction;
    uint64_t dims[4], offset, bytes;
} es_i_io;

typedef struct {
    uint32_t name, tokens, first_launch, n_launches;
    uint64_t arena_bytes;
} es_i_graph;

typedef struct {
    uint32_t name, n_args, backend, code;
    uint64_t code_offset, code_bytes;
} es_i_kernel;

typedef struct {
    uint32_t kernel, flags, grid[3], block[3], first_arg, n_args;
} es_i_launch;

typedef struct {
    uint32_t space, access;
    uint64_t offset, bytes;
} es_i_arg;

#define ES_ASSERT_SIZE(type, n) typedef char type##_has_its_size[sizeof(type) == (n) ? 1 : -1]
ES_ASSERT_SIZE(es_i_header, 64);
ES_ASSERT_SIZE(es_i_section, 32);
ES_ASSERT_SIZE(es_i_tensor, 64);
ES_ASSERT_SIZE(es_i_slot, 72);
ES_ASSERT_SIZE(es_i_io, 72);
ES_ASSERT_SIZE(es_i_graph, 24);
ES_ASSERT_SIZE(es_i_kernel, 32);
ES_ASSERT_SIZE(es_i_launch, 40);
ES_ASSERT_SIZE(es_i_arg, 24);

/* ---- Plan: checked pointers into the file ---- */

typedef struct {
    const es_i_io *tokens, *position, *logits, *next; /* NULL where the graph has none */
} es_i_roles;

typedef struct {
    const uint8_t *data;
    const es_i_header *header;
    const es_i_section *section[ES_N_KINDS + 1]; /* by kind */
    const char *strings;
    const es_i_tensor *tensors;
    const es_i_slot *slots;
    const es_i_io *io;
    const es_i_graph *graphs;
    const es_i_kernel *kernels;
    const es_i_launch *launches;
    const es_i_arg *args;
    const uint8_t *weights;
    const es_i_roles *roles; /* per graph; the model's */
    uint32_t n_tensors, n_slots, n_io, n_graphs, n_kernels, n_launches, n_args;
    uint32_t vocab, tokenizer;
    uint64_t arena_bytes; /* of the largest graph */
    uint64_t weight_bytes;
} es_i_plan;

typedef struct {
    uint32_t table[8][256];
} es_i_crc;

ES_LOCAL void es_i_crc_init(es_i_crc *crc);
ES_LOCAL uint32_t es_i_crc32(const es_i_crc *crc, uint32_t value, const void *data, size_t bytes);

ES_LOCAL es_status es_i_plan_read(es_i_plan *plan, const es_i_crc *crc, const void *data, uint64_t bytes,
                                  es_error *why);
ES_LOCAL es_status es_i_plan_records(es_i_plan *plan, es_error *why);
ES_LOCAL es_status es_i_roles_find(const es_i_plan *plan, es_i_roles *roles, es_error *why);
ES_LOCAL es_status es_i_table_check(const es_i_plan *plan, const es_i_crc *crc, const es_kernel_table *table,
                                    es_error *why);
/* From here on this thread counts subnormal numbers as zero, as a decaying state would pass through them and many CPUs
 * are slow there. Returns the mode before, for es_i_float_mode_set. */
ES_LOCAL uint64_t es_i_float_mode_flush(void);
ES_LOCAL void es_i_float_mode_set(uint64_t mode);
ES_LOCAL uint64_t es_i_dtype_bytes(uint32_t dtype);

/* Formats into `why` (may be NULL) and returns `status`. */
ES_LOCAL es_status es_i_fail(es_error *why, es_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
ES_LOCAL uint64_t es_i_now(void);

/* ---- Pool: threads that drain the blocks of one launch at a time (pool.c) ---- */

typedef struct es_i_pool es_i_pool;
struct es_i_worker;

/* What is launched. */
typedef struct {
    es_kernel_fn fn;
    void *const *args;
    int32_t grid;
} es_i_board;

struct es_i_pool {
    es_i_board *board; /* line-aligned, in `lines` */
    uint64_t *tickets; /* of every thread's range, a line each: launch number << 32 | blocks unclaimed; in `turns` */
    void *turns;
    uint32_t *done;    /* blocks finished by workers; on a line of its own */
    struct es_i_worker *workers;
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
    uint32_t sleepers, wakes, stop;
    uint32_t n_threads, n_started, spin, launch;
    uint32_t crowded;   /* more threads than cores */
    int32_t first_core; /* -1 = not pinned */
    char lines[4 * ES_LINE];
};

ES_LOCAL es_status es_i_pool_start(es_i_pool *pool, const es_options *options, es_error *why);
ES_LOCAL void es_i_pool_stop(es_i_pool *pool);
ES_LOCAL void es_i_pool_launch(es_i_pool *pool, es_kernel_fn fn, void *const *args, int32_t grid);
ES_LOCAL uint32_t es_i_cores(void);
ES_LOCAL int es_i_pin_self(int32_t core);
/* 1 when the system lets this process run on the core. */
ES_LOCAL int es_i_may_run_on(int32_t core);

/* ---- Model and session ---- */

/* es_device.h; the structs are each backend's own. */
typedef struct es_i_backend es_i_backend;
typedef struct es_i_device es_i_device;
typedef struct es_i_stream es_i_stream;

struct es_model {
    es_i_plan plan;
    es_i_roles *roles; /* per graph */
    const es_kernel_table *kernels;
    const es_i_backend *backend; /* NULL: the CPU */
    es_i_device *device;
    const void *map;
    size_t map_bytes; /* 0: the caller's memory */
    uint64_t limit;   /* longest sequence: the context, or what `position` can count */
    size_t need;      /* bytes of one session */
    uint32_t flags;
    uint32_t n_sessions;
    pthread_mutex_t lock; /* one graph at a time */
    es_i_crc crc;
    es_i_pool pool;
};

struct es_session {
    es_model *model;
    uint64_t position;
    uint8_t *state, *io, *arena; /* a GPU's session: no state, io is a mirror, arena is the sampler's scratch */
    void **args;         /* per ARGS record; none for a GPU */
    es_i_stream *stream; /* NULL: the CPU */
    es_status failed;    /* ES_OK, or what every call returns since the stream on the device was lost */
    const float *logits; /* within io, or NULL */
    void *heap;          /* what to free, or NULL: the caller's memory */
};

/* Bytes of one session, 0 when they cannot be counted (plan too large for this machine). */
ES_LOCAL size_t es_i_session_bytes(const es_i_plan *plan, const es_i_backend *backend);
/* Every state slot at its initial value. */
ES_LOCAL void es_i_state_init(const es_i_plan *plan, uint8_t *state);
/* One element of a slot's initial value in the low bytes. */
ES_LOCAL uint64_t es_i_state_element(const es_i_slot *slot);
/* `status`; a loss of the device is remembered, and so is every failure that leaves the stream halfway. */
ES_LOCAL es_status es_i_session_failed(es_session *session, es_status status, int halfway);
/* n greedy steps on the device, where its backend and the plan can: 1 and *status; else 0. */
ES_LOCAL int es_i_greedy(es_session *session, size_t n, int32_t *tokens, uint64_t *ns, es_status *status);
/* ES_E_FULL when n more steps would not fit. */
ES_LOCAL es_status es_i_room_check(const es_session *session, uint64_t n);

#endif
