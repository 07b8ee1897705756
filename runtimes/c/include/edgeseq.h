/* edgeseq: run a compiled sequence model, one step or one chunk at a time.
 *
 *   es_model *model; es_session *session; int32_t id; es_error why = ES_ERROR_INIT;
 *   es_model_open("model.edgeseq", NULL, &model, &why);       map, check, start threads
 *   es_session_create(model, NULL, 0, &session, &why);        one stream; NULL = malloc once
 *   es_prefill(session, prompt, n_prompt);                    cut into chunk graphs, exact
 *   es_sample(session, NULL, NULL, 0, &id);                   NULL = greedy
 *   es_step(session, id);                                     as often as you like
 *   es_state_save(session, buffer, capacity, &bytes);         resume anywhere, on any target
 *   es_session_close(&session);
 *   es_model_close(&model);                                   after its sessions
 *
 * A model is immutable and shared: any number of sessions, from any threads; their steps take turns. A session is one
 * stream and is used by one thread at a time. Nothing is allocated, printed or locked for long once created; a call
 * that fails changes nothing. Integers are little-endian in files. docs/runtime.md tells the whole story. */
#ifndef EDGESEQ_H
#define EDGESEQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef ES_API
#if defined(__GNUC__) || defined(__clang__)
#define ES_API __attribute__((visibility("default")))
#else
#define ES_API
#endif
#endif

/* Grows when a function or a struct changes its meaning; additions keep it. */
#define ES_ABI_VERSION 1
ES_API uint32_t es_abi_version(void);

/* ---- Status: class in the low byte, detail in the next; 0 is success ---- */

typedef int32_t es_status;
#define ES_STATUS(class_, detail) ((es_status)((class_) | ((detail) << 8)))
#define ES_CLASS(status) ((status) & 0xff)
#define ES_DETAIL(status) (((status) >> 8) & 0xff)

#define ES_OK 0
#define ES_CLASS_ARGUMENT 1 /* the call is wrong */
#define ES_CLASS_SYSTEM 2   /* the operating system refused */
#define ES_CLASS_MEMORY 3   /* not enough of it */
#define ES_CLASS_FORMAT 4   /* the bundle is malformed */
#define ES_CLASS_LIBRARY 5  /* the kernels do not belong to the plan or to this CPU */
#define ES_CLASS_STATE 6    /* a saved state is malformed or foreign */
#define ES_CLASS_CONTEXT 7  /* the sequence would outgrow the model's context */
#define ES_CLASS_BUSY 8     /* sessions still use the model */
#define ES_CLASS_DEVICE 9   /* the GPU or its driver */

#define ES_E_NULL ES_STATUS(ES_CLASS_ARGUMENT, 1)        /* a pointer that must not be NULL is */
#define ES_E_STRUCT ES_STATUS(ES_CLASS_ARGUMENT, 2)      /* struct_size is smaller than version 1's */
#define ES_E_RANGE ES_STATUS(ES_CLASS_ARGUMENT, 3)       /* an index or a count is out of range */
#define ES_E_TOKEN ES_STATUS(ES_CLASS_ARGUMENT, 4)       /* a token id is not in the vocabulary */
#define ES_E_NO_TOKENS ES_STATUS(ES_CLASS_ARGUMENT, 5)   /* the model takes no tokens: use es_run */
#define ES_E_ROOM ES_STATUS(ES_CLASS_ARGUMENT, 6)        /* the caller's buffer is too small */
#define ES_E_NAME ES_STATUS(ES_CLASS_ARGUMENT, 7)        /* no input, output or slot has this name */
#define ES_E_OTHER_MODEL ES_STATUS(ES_CLASS_ARGUMENT, 8) /* two sessions of different models */
#define ES_E_NO_LOGITS ES_STATUS(ES_CLASS_ARGUMENT, 9)   /* nothing was run since create, reset or load */
#define ES_E_SAMPLER ES_STATUS(ES_CLASS_ARGUMENT, 10)    /* a sampler parameter is out of range */
#define ES_E_NAN ES_STATUS(ES_CLASS_ARGUMENT, 11)        /* no logit is a number */
#define ES_E_TOKENIZER ES_STATUS(ES_CLASS_ARGUMENT, 12)  /* the bundle has no tokenizer of its own */
#define ES_E_ALIGN ES_STATUS(ES_CLASS_ARGUMENT, 13)      /* a bundle in memory must be 64-byte aligned */

#define ES_E_OPEN ES_STATUS(ES_CLASS_SYSTEM, 1)
#define ES_E_MAP ES_STATUS(ES_CLASS_SYSTEM, 2)
#define ES_E_THREAD ES_STATUS(ES_CLASS_SYSTEM, 3)
#define ES_E_CORE ES_STATUS(ES_CLASS_SYSTEM, 4) /* a thread cannot be pinned to this core */

#define ES_E_HEAP ES_STATUS(ES_CLASS_MEMORY, 1)
#define ES_E_SMALL ES_STATUS(ES_CLASS_MEMORY, 2) /* the caller's memory is below es_session_need */

#define ES_E_TRUNCATED ES_STATUS(ES_CLASS_FORMAT, 1)
#define ES_E_MAGIC ES_STATUS(ES_CLASS_FORMAT, 2)
#define ES_E_VERSION ES_STATUS(ES_CLASS_FORMAT, 3)
#define ES_E_FILE_BYTES ES_STATUS(ES_CLASS_FORMAT, 4)
#define ES_E_HEADER_CRC ES_STATUS(ES_CLASS_FORMAT, 5)
#define ES_E_SECTION_KIND ES_STATUS(ES_CLASS_FORMAT, 6) /* unknown, missing or there twice */
#define ES_E_SECTION_ALIGN ES_STATUS(ES_CLASS_FORMAT, 7)
#define ES_E_SECTION_BOUNDS ES_STATUS(ES_CLASS_FORMAT, 8) /* beyond the file, or over the section before */
#define ES_E_SECTION_END ES_STATUS(ES_CLASS_FORMAT, 9)    /* the last does not end with the file */
#define ES_E_SECTION_GAP ES_STATUS(ES_CLASS_FORMAT, 10)   /* not zero between sections */
#define ES_E_SECTION_COUNT ES_STATUS(ES_CLASS_FORMAT, 11) /* count x record size is not its bytes */
#define ES_E_SECTION_CRC ES_STATUS(ES_CLASS_FORMAT, 12)
#define ES_E_STRINGS ES_STATUS(ES_CLASS_FORMAT, 13)     /* not from NUL to NUL */
#define ES_E_STRING ES_STATUS(ES_CLASS_FORMAT, 14)      /* a name outside STRINGS */
#define ES_E_ENUM ES_STATUS(ES_CLASS_FORMAT, 15)        /* dtype, update, role, space ... unknown */
#define ES_E_DIMS ES_STATUS(ES_CLASS_FORMAT, 16)        /* rank or dims disagree with bytes */
#define ES_E_TENSOR ES_STATUS(ES_CLASS_FORMAT, 17)      /* misplaced in WEIGHTS */
#define ES_E_SLOT ES_STATUS(ES_CLASS_FORMAT, 18)        /* misplaced in the state block, or overlapping */
#define ES_E_AXIS ES_STATUS(ES_CLASS_FORMAT, 19)        /* a slot's axis, or its rows against the context */
#define ES_E_IO ES_STATUS(ES_CLASS_FORMAT, 20)          /* misplaced in the io block, or overlapping */
#define ES_E_ROLE ES_STATUS(ES_CLASS_FORMAT, 21)        /* tokens, position or logits of the wrong kind */
#define ES_E_GRAPH ES_STATUS(ES_CLASS_FORMAT, 22)       /* order, launch range, or no step graph */
#define ES_E_KERNEL ES_STATUS(ES_CLASS_FORMAT, 23)      /* code outside CODE */
#define ES_E_LAUNCH ES_STATUS(ES_CLASS_FORMAT, 24)      /* kernel, flags, grid or argument range */
#define ES_E_ARG ES_STATUS(ES_CLASS_FORMAT, 25)         /* beyond its space, or weights written */
#define ES_E_WEIGHTS_CRC ES_STATUS(ES_CLASS_FORMAT, 26) /* es_model_check only */
#define ES_E_BUNDLE_TOKENIZER ES_STATUS(ES_CLASS_FORMAT, 27)

#define ES_E_PLAN_ID ES_STATUS(ES_CLASS_LIBRARY, 1)      /* library and plan were not compiled together */
#define ES_E_KERNEL_TABLE ES_STATUS(ES_CLASS_LIBRARY, 2) /* count or name of a kernel differs */
#define ES_E_BACKEND ES_STATUS(ES_CLASS_LIBRARY, 3)      /* the plan needs a backend this build lacks */
#define ES_E_FEATURE ES_STATUS(ES_CLASS_LIBRARY, 4)      /* this CPU lacks an instruction set */

#define ES_E_STATE_TRUNCATED ES_STATUS(ES_CLASS_STATE, 1)
#define ES_E_STATE_MAGIC ES_STATUS(ES_CLASS_STATE, 2)
#define ES_E_STATE_VERSION ES_STATUS(ES_CLASS_STATE, 3)
#define ES_E_STATE_CRC ES_STATUS(ES_CLASS_STATE, 4)
#define ES_E_STATE_FOREIGN ES_STATUS(ES_CLASS_STATE, 5)
#define ES_E_STATE_POSITION ES_STATUS(ES_CLASS_STATE, 6)
#define ES_E_STATE_SIZE ES_STATUS(ES_CLASS_STATE, 7)

#define ES_E_FULL ES_STATUS(ES_CLASS_CONTEXT, 1)
#define ES_E_SESSIONS ES_STATUS(ES_CLASS_BUSY, 1)

#define ES_E_DEVICE_DRIVER ES_STATUS(ES_CLASS_DEVICE, 1) /* the driver's library is not there or cannot be opened */
#define ES_E_DEVICE_OLD ES_STATUS(ES_CLASS_DEVICE, 2) /* the driver is too old: a function or a version is missing */
#define ES_E_DEVICE_NONE ES_STATUS(ES_CLASS_DEVICE, 3) /* the driver offers no device, or not the one asked for */
#define ES_E_DEVICE_MEMORY ES_STATUS(ES_CLASS_DEVICE, 4) /* not enough memory on the device */
#define ES_E_DEVICE_BUILD ES_STATUS(ES_CLASS_DEVICE, 5) /* the driver cannot build or load the kernels */
#define ES_E_DEVICE_ARCH ES_STATUS(ES_CLASS_DEVICE, 6) /* the bundle was compiled for another kind of device */
#define ES_E_DEVICE_LAUNCH ES_STATUS(ES_CLASS_DEVICE, 7) /* the driver refuses a launch or a copy */
#define ES_E_DEVICE_LOST ES_STATUS(ES_CLASS_DEVICE, 8) /* the device is gone or hung: every later call says so too */

/* A fixed sentence for a status, never NULL. */
ES_API const char *es_status_text(es_status status);

/* A sentence with the values, for the calls that can explain; each takes NULL too. */
typedef struct es_error {
    uint32_t struct_size;
    char text[252];
} es_error;
#define ES_ERROR_INIT {(uint32_t)sizeof(es_error), {0}}

/* ---- Kernels: what the compiler links beside this runtime ---- */

/* Runs the blocks begin <= b < end of a one-dimensional grid; any thread, any order. */
typedef void (*es_kernel_fn)(void *const *args, int32_t begin, int32_t end);

typedef struct es_kernel_entry {
    const char *name;
    es_kernel_fn fn;
} es_kernel_entry;

typedef struct es_kernel_table {
    uint32_t struct_size;
    uint32_t plan_id; /* CRC-32 of the plan's KERNELS, LAUNCHES and ARGS */
    uint32_t n_kernels;
    uint32_t n_features;
    const es_kernel_entry *kernels;
    const char *const *features; /* instruction sets the kernels use, see es_cpu_has */
    /* From the device's profile, for what es_options leaves open. */
    int32_t n_threads; /* 0 = as many as cores */
    uint32_t n_cores;  /* 0 = not pinned */
    const int32_t *cores;
} es_kernel_table;

extern const es_kernel_table es_linked_kernels;

/* 1 when this CPU and its system support the named instruction set ("avx2", "avx512vnni", "neon", "dotprod", "i8mm",
 * ...), 0 when not, -1 when the name is unknown. */
ES_API int es_cpu_has(const char *feature);

/* ---- Model ---- */

typedef struct es_model es_model;

#define ES_POISON 1u /* for tests: fill the arena with NaN before every graph */
#define ES_THREADS_MAX 256

typedef struct es_options {
    uint32_t struct_size;
    uint32_t flags;
    int32_t
        n_threads; /* the caller counts as one; 0 = as the kernel table says, at most one per core of this process */
    uint32_t spin; /* polls of an idle thread before it sleeps; 0 = sleep at once */
    const int32_t *cores; /* thread i of the pool runs on cores[i % n_cores]; see es_pin_caller */
    uint32_t n_cores; /* 0 = where the kernel table says, if this process may run on all of these; else not pinned */
    const es_kernel_table *kernels; /* NULL = es_linked_kernels */
} es_options;
#define ES_SPIN_DEFAULT 20000u
#define ES_OPTIONS_INIT {(uint32_t)sizeof(es_options), 0, 0, ES_SPIN_DEFAULT, NULL, 0, NULL}

/* Map a file read-only and check everything but the weights' checksum. The file must not change while it is open;
 * replace it by renaming. `options` and `why` may be NULL. */
ES_API es_status es_model_open(const char *path, const es_options *options, es_model **model, es_error *why);
/* The same from memory that stays valid and unchanged until close, aligned to 64 bytes. */
ES_API es_status es_model_open_memory(const void *data, size_t bytes, const es_options *options, es_model **model,
                                      es_error *why);
/* Read every weight and compare the checksum. */
ES_API es_status es_model_check(const es_model *model, es_error *why);
/* ES_E_SESSIONS, and nothing is closed, while sessions remain. *model becomes NULL. */
ES_API es_status es_model_close(es_model **model);
/* Pin the calling thread, which is thread 0 of the pool, to cores[0]. */
ES_API es_status es_pin_caller(const es_model *model);

typedef struct es_model_info {
    uint32_t struct_size;
    uint32_t vocab; /* logits per token; 0 when the model has none */
    uint32_t context; /* longest sequence; 0 = unbounded */
    uint32_t n_graphs; /* graph 0 is the step */
    uint32_t n_slots;
    uint32_t n_io;
    uint32_t n_threads;
    uint32_t tokenizer; /* 0 none, 1 bytes */
    uint32_t takes_tokens; /* 1: es_prefill and es_step; 0: es_input, es_run, es_output */
    uint32_t abi_version;
    uint8_t model_id[16];
    uint64_t file_bytes;
    uint64_t weight_bytes;
    uint64_t state_bytes;
    uint64_t io_bytes;
    uint64_t arena_bytes; /* of the largest graph */
} es_model_info;
#define ES_MODEL_INFO_INIT {(uint32_t)sizeof(es_model_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, {0}, 0, 0, 0, 0, 0}
ES_API es_status es_model_get_info(const es_model *model, es_model_info *info);

#define ES_BACKEND_CPU 0u
#define ES_BACKEND_OPENCL 1u
#define ES_BACKEND_CUDA 2u

/* What the model runs on. */
typedef struct es_device_info {
    uint32_t struct_size;
    uint32_t backend;
    uint64_t weight_bytes; /* that the device reads; on a GPU once per model, in its memory or shared with the host's */
    uint64_t session_bytes; /* device memory of one session; 0 on the CPU, where es_session_need counts all */
    char text[256]; /* vendor, device and driver in a line */
} es_device_info;
#define ES_DEVICE_INFO_INIT {(uint32_t)sizeof(es_device_info), 0, 0, 0, {0}}
ES_API es_status es_model_device(const es_model *model, es_device_info *info);

typedef struct es_graph_info {
    uint32_t struct_size;
    uint32_t tokens; /* steps that one run consumes */
    uint32_t n_launches;
    uint32_t reserved;
    uint64_t arena_bytes;
    const char *name; /* valid as long as the model */
} es_graph_info;
#define ES_GRAPH_INFO_INIT {(uint32_t)sizeof(es_graph_info), 0, 0, 0, 0, NULL}
ES_API es_status es_model_graph(const es_model *model, uint32_t index, es_graph_info *info);

#define ES_FLOAT32 0u
#define ES_FLOAT16 1u
#define ES_BFLOAT16 2u
#define ES_INT64 3u
#define ES_INT32 4u
#define ES_INT8 5u
#define ES_UINT8 6u
#define ES_BOOL 7u

#define ES_ROLE_DATA 0u
#define ES_ROLE_TOKENS 1u
#define ES_ROLE_POSITION 2u
#define ES_ROLE_LOGITS 3u
#define ES_ROLE_NEXT 4u /* the most likely next token, the first of equals */

#define ES_UPDATE_OVERWRITE 0u
#define ES_UPDATE_SHIFT 1u
#define ES_UPDATE_RING 2u
#define ES_UPDATE_APPEND 3u

/* One input, output or state slot. */
typedef struct es_tensor_info {
    uint32_t struct_size;
    uint32_t dtype;
    uint32_t rank;
    uint32_t role; /* inputs and outputs */
    uint32_t graph; /* inputs and outputs */
    uint32_t is_output; /* inputs and outputs */
    uint32_t update; /* slots */
    int32_t axis; /* slots: the time axis, -1 = none */
    uint64_t dims[4];
    uint64_t bytes;
    const char *name; /* valid as long as the model */
} es_tensor_info;
#define ES_TENSOR_INFO_INIT {(uint32_t)sizeof(es_tensor_info), 0, 0, 0, 0, 0, 0, -1, {0, 0, 0, 0}, 0, NULL}
ES_API es_status es_model_io(const es_model *model, uint32_t index, es_tensor_info *info);
ES_API es_status es_model_slot(const es_model *model, uint32_t index, es_tensor_info *info);

/* ---- Session ---- */

typedef struct es_session es_session;

/* Exact bytes of one session in the host's memory. Does not depend on how long the sequence gets. */
ES_API es_status es_session_need(const es_model *model, size_t *bytes);
/* In the caller's memory of at least es_session_need bytes (any alignment), or NULL, 0: malloc once. */
ES_API es_status es_session_create(es_model *model, void *memory, size_t bytes, es_session **session, es_error *why);
ES_API es_status es_session_close(es_session **session);

/* Consume n tokens: the largest chunk graphs first, then steps. All ids are checked, and the context, before anything
 * runs. n = 0 does nothing. */
ES_API es_status es_prefill(es_session *session, const int32_t *tokens, size_t n);
ES_API es_status es_step(es_session *session, int32_t token);
/* `vocab` logits after the last token, valid until the session's next call; NULL when nothing was run since create,
 * reset or load. */
ES_API const float *es_logits(const es_session *session);
/* Steps consumed so far. */
ES_API uint64_t es_position(const es_session *session);
/* Back to the fresh state, position 0. */
ES_API es_status es_reset(es_session *session);

/* For models whose steps are not tokens: fill the inputs of graph g, run it, read its outputs. The pointers are the
 * same for the session's whole life. tokens and position are set by the runtime in es_prefill and es_step; es_run sets
 * position alone. */
ES_API es_status es_input(es_session *session, uint32_t graph, const char *name, void **data, size_t *bytes);
ES_API es_status es_output(const es_session *session, uint32_t graph, const char *name, const void **data,
                           size_t *bytes);
ES_API es_status es_run(es_session *session, uint32_t graph);
/* es_run, with the nanoseconds of every launch of the graph in ns[0..n); n must be the graph's number of launches,
 * which es_model_graph tells. The tokens are those of the graph's last run. */
ES_API es_status es_profile(es_session *session, uint32_t graph, uint64_t *ns, size_t n);

/* ---- State: the whole memory of a stream, portable across targets ---- */

/* A second session at the same point, in memory as for es_session_create. */
ES_API es_status es_session_fork(const es_session *session, void *memory, size_t bytes, es_session **fork,
                                 es_error *why);
/* Make `to` what `from` is; both belong to one model. */
ES_API es_status es_session_copy(es_session *to, const es_session *from);
/* Bytes that es_state_save would write now. */
ES_API es_status es_state_bytes(const es_session *session, size_t *bytes);
ES_API es_status es_state_save(const es_session *session, void *buffer, size_t capacity, size_t *written);
/* All or nothing: a refused state leaves the session as it was. */
ES_API es_status es_state_load(es_session *session, const void *buffer, size_t bytes, es_error *why);

/* ---- Text and sampling ---- */

/* Byte tokenizer: id = byte. `tokens` NULL asks for the count alone. */
ES_API es_status es_encode(const es_model *model, const char *text, size_t bytes, int32_t *tokens, size_t capacity,
                           size_t *n);
ES_API es_status es_decode(const es_model *model, const int32_t *tokens, size_t n, char *text, size_t capacity,
                           size_t *bytes);

/* Applied in this order: repetition penalty, temperature, softmax, top_k, top_p, min_p, draw. The state of the
 * generator is here and nowhere else: the same seed gives the same tokens. */
typedef struct es_sampler {
    uint32_t struct_size;
    int32_t top_k; /* 0 = all */
    float temperature; /* 0 = greedy */
    float top_p; /* 1 = all; the fewest most likely tokens whose share reaches it */
    float min_p; /* 0 = all; share of the most likely token's probability */
    float repetition_penalty; /* 1 = none; divides positive, multiplies negative logits of recent tokens */
    uint64_t seed; /* advanced by every draw */
} es_sampler;
#define ES_SAMPLER_INIT {(uint32_t)sizeof(es_sampler), 0, 0.0f, 1.0f, 0.0f, 1.0f, 0}

/* Pick from the session's logits. `sampler` NULL = greedy (the first of equals); `recent` may be NULL. */
ES_API es_status es_sample(es_session *session, es_sampler *sampler, const int32_t *recent, size_t n_recent,
                           int32_t *token);
/* Pick from any logits[n]; `scratch` holds n floats and may be NULL when greedy without a penalty. */
ES_API es_status es_sample_logits(es_sampler *sampler, const float *logits, size_t n, const int32_t *recent,
                                  size_t n_recent, float *scratch, int32_t *token);

/* n times: sample, step. tokens[n] receives the ids, ns[n] (may be NULL) the nanoseconds of each sample and step.
 * Needs logits: prefill first. The penalty looks back at most `window` ids of this call. */
ES_API es_status es_generate(es_session *session, es_sampler *sampler, size_t n, size_t window, int32_t *tokens,
                             uint64_t *ns);

/* ---- Measuring: with the model's own threads ---- */

/* Best of `repeats` passes over the buffer (NULL = the model's weights), in bytes per second. */
ES_API es_status es_measure_read(es_model *model, const void *data, size_t bytes, uint32_t repeats, double *rate);
/* Mean nanoseconds of an empty launch of `grid` blocks, over n launches. */
ES_API es_status es_measure_launch(es_model *model, int32_t grid, uint32_t n, double *ns);

#ifdef __cplusplus
}
#endif
#endif
