/* The CUDA backend's own types: the driver API as far as it is used, a device, a stream. No CUDA header is needed; the
 * numbers and signatures below are those of NVIDIA's cuda.h, and the names in ES_CU_API carry the versions that it
 * maps them to. */
#ifndef ES_CUDA_H
#define ES_CUDA_H

#include "es_device.h"

#ifdef ES_WITH_CUDA

typedef uint64_t es_i_cu_ptr; /* CUdeviceptr */
typedef int es_i_cu_result;   /* CUresult */

enum { ES_CU_LEAST_DRIVER = 11040 }; /* cuGraphInstantiateWithFlags */

/* CUresult */
enum { ES_CU_OK = 0, ES_CU_NO_MEMORY = 2, ES_CU_DEINITIALIZED = 4, ES_CU_STUB = 34, ES_CU_NO_DEVICE = 100 };
enum { ES_CU_INVALID_IMAGE = 200, ES_CU_NO_BINARY = 209, ES_CU_ECC = 214, ES_CU_OLD_FOR_PTX = 222 };
enum { ES_CU_CONTAINED = 226, ES_CU_ILLEGAL_ADDRESS = 700, ES_CU_TIMEOUT = 702, ES_CU_DESTROYED = 709 };
enum { ES_CU_ASSERT = 710, ES_CU_STACK = 714, ES_CU_LAUNCH_FAILED = 719, ES_CU_UNKNOWN = 999 };
/* CUdevice_attribute */
enum { ES_CU_PROCESSORS = 16, ES_CU_L2_BYTES = 38, ES_CU_MAJOR = 75, ES_CU_MINOR = 76 };
/* CUfunction_attribute, CUjit_option, CUstream_flags, CUevent_flags, CUstreamCaptureMode */
enum { ES_CU_MAX_THREADS = 0, ES_CU_JIT_LOG = 5, ES_CU_JIT_LOG_BYTES = 6, ES_CU_NON_BLOCKING = 1 };
enum { ES_CU_EVENT_DEFAULT = 0, ES_CU_EVENT_NO_TIMING = 2, ES_CU_CAPTURE_THREAD_LOCAL = 1 };

/* field, symbol, parameters */
#define ES_CU_API(X)                                                                                                   \
    X(init, "cuInit", (unsigned int flags))                                                                            \
    X(error_name, "cuGetErrorName", (es_i_cu_result result, const char **name))                                        \
    X(error_text, "cuGetErrorString", (es_i_cu_result result, const char **text))                                      \
    X(device_count, "cuDeviceGetCount", (int *count))                                                                  \
    X(device_get, "cuDeviceGet", (int *device, int ordinal))                                                           \
    X(device_name, "cuDeviceGetName", (char *name, int bytes, int device))                                             \
    X(device_attribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))                               \
    X(device_memory, "cuDeviceTotalMem_v2", (size_t *bytes, int device))                                               \
    X(context_retain, "cuDevicePrimaryCtxRetain", (void **context, int device))                                        \
    X(context_release, "cuDevicePrimaryCtxRelease_v2", (int device))                                                   \
    X(context_push, "cuCtxPushCurrent_v2", (void *context))                                                            \
    X(context_pop, "cuCtxPopCurrent_v2", (void **context))                                                             \
    X(module_load, "cuModuleLoadDataEx",                                                                               \
      (void **module, const void *image, unsigned int n, int *options, void **values))                                 \
    X(module_unload, "cuModuleUnload", (void *module))                                                                 \
    X(module_function, "cuModuleGetFunction", (void **function, void *module, const char *name))                       \
    X(function_attribute, "cuFuncGetAttribute", (int *value, int attribute, void *function))                           \
    X(memory_alloc, "cuMemAlloc_v2", (es_i_cu_ptr * address, size_t bytes))                                            \
    X(memory_free, "cuMemFree_v2", (es_i_cu_ptr address))                                                              \
    X(memory_info, "cuMemGetInfo_v2", (size_t *available, size_t *total))                                              \
    X(pinned_alloc, "cuMemAllocHost_v2", (void **address, size_t bytes))                                               \
    X(pinned_free, "cuMemFreeHost", (void *address))                                                                   \
    X(upload, "cuMemcpyHtoDAsync_v2", (es_i_cu_ptr to, const void *from, size_t bytes, void *queue))                   \
    X(download, "cuMemcpyDtoHAsync_v2", (void *to, es_i_cu_ptr from, size_t bytes, void *queue))                       \
    X(move, "cuMemcpyDtoDAsync_v2", (es_i_cu_ptr to, es_i_cu_ptr from, size_t bytes, void *queue))                     \
    X(fill, "cuMemsetD8Async", (es_i_cu_ptr to, unsigned char value, size_t bytes, void *queue))                       \
    X(queue_create, "cuStreamCreate", (void **queue, unsigned int flags))                                              \
    X(queue_destroy, "cuStreamDestroy_v2", (void *queue))                                                              \
    X(queue_wait, "cuStreamSynchronize", (void *queue))                                                                \
    X(capture_begin, "cuStreamBeginCapture_v2", (void *queue, int mode))                                               \
    X(capture_end, "cuStreamEndCapture", (void *queue, void **graph))                                                  \
    X(graph_instantiate, "cuGraphInstantiateWithFlags", (void **exec, void *graph, unsigned long long flags))          \
    X(graph_launch, "cuGraphLaunch", (void *exec, void *queue))                                                        \
    X(exec_destroy, "cuGraphExecDestroy", (void *exec))                                                                \
    X(graph_destroy, "cuGraphDestroy", (void *graph))                                                                  \
    X(event_create, "cuEventCreate", (void **event, unsigned int flags))                                               \
    X(event_record, "cuEventRecord", (void *event, void *queue))                                                       \
    X(event_wait, "cuEventSynchronize", (void *event))                                                                 \
    X(event_elapsed, "cuEventElapsedTime", (float *ms, void *start, void *end))                                        \
    X(event_destroy, "cuEventDestroy_v2", (void *event))                                                               \
    X(launch, "cuLaunchKernel",                                                                                        \
      (void *function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,            \
       unsigned int bz, unsigned int shared, void *queue, void **params, void **extra))

/* CUlaunchAttribute and CUlaunchConfig. */
enum { ES_CU_PROGRAMMATIC = 6 }; /* the launch may begin while the one before it ends: its kernel waits itself */
typedef struct {
    int id, pad;
    union {
        int on;
        char bytes[64];
    } value;
} es_i_cu_attribute;
typedef struct {
    unsigned int grid[3], block[3], shared;
    void *queue;
    es_i_cu_attribute *attributes;
    unsigned int n_attributes;
} es_i_cu_config;

#define ES_CU_FIELD(field, symbol, parameters) es_i_cu_result(*field) parameters;
typedef struct {
    void *library;
    ES_CU_API(ES_CU_FIELD)
    es_i_cu_result (*function_param)(void *function, size_t index, size_t *offset, size_t *bytes); /* 12.4, or NULL */
    es_i_cu_result (*launch_early)(const es_i_cu_config *config, void *function, void **params,
                                   void **extra); /* cuLaunchKernelEx, 11.8, or NULL */
} es_i_cu_api;

/* Inputs or outputs of one graph that are copied together. */
typedef struct {
    uint32_t graph, direction;
    uint64_t offset, bytes;
} es_i_cu_span;

typedef struct {
    es_i_cu_api api;
    const es_i_plan *plan;
    int id, driver, major, minor, processors, l2_bytes, poison;
    int early; /* the loaded kernels wait themselves for the launch before theirs, and graphs can hold such launches */
    uint32_t retained, lost; /* lost is read and set by several threads */
    void *context; /* the device's primary one: shared with the app, never reset */
    void *module, *helpers;
    void **functions; /* per KERNELS record */
    void *advance, *read, *spin, *nothing; /* cuda_helpers.c; NULL where the driver cannot compile PTX */
    es_i_cu_span *spans;
    uint32_t n_spans;
    es_i_cu_ptr weights;
    char name[96];
    char failed[128]; /* what the driver refused last, for describe; whoever sets `noting` writes or reads it */
    int noting;
} es_i_cu_device;

enum { ES_CU_SLOTS = 4 }; /* pinned copies of the io block; number 0 is for runs that wait */
enum { ES_CU_BATCH = 256 }; /* greedy steps, or profiled launches, between two waits */

/* Where the greedy step keeps what is not in the plan: a counter, then the tokens it chose. */
enum { ES_CU_CHOSEN_AT = 64, ES_CU_CONTROL_BYTES = ES_CU_CHOSEN_AT + 8 * ES_CU_BATCH };

typedef struct {
    void *exec; /* NULL: not captured yet, or `plain` */
    int plain; /* the driver could not capture it */
} es_i_cu_captured;

typedef struct {
    es_i_cu_device *device;
    void *queue;
    es_i_cu_ptr state, io, arena, control;
    es_i_cu_ptr *args; /* per ARGS record */
    void **params; /* the address of each */
    es_i_cu_ptr advance_args[5];
    void *advance_params[5];
    uint8_t *pinned; /* ES_CU_SLOTS io blocks, then the chosen tokens, then ES_CU_BATCH positions */
    uint64_t slot_bytes;
    void *uploaded[ES_CU_SLOTS]; /* events: the slot may be written again */
    uint32_t n_uploads, lost;
    es_i_cu_captured *captured; /* 2 g: graph g without outputs, 2 g + 1: with; 2 n_graphs: the greedy step */
    void *events[ES_CU_BATCH + 1];
    uint32_t n_events;
} es_i_cu_stream;

/* cuda_driver.c */
ES_LOCAL es_status es_i_cu_driver_open(es_i_cu_device *device, es_error *why);
ES_LOCAL void es_i_cu_driver_close(es_i_cu_device *device);
/* ES_OK, or a sentence "<what> failed: <the driver's words>"; a sticky error marks the device as lost. */
ES_LOCAL es_status es_i_cu_check(es_i_cu_device *device, es_i_cu_result result, const char *what, es_error *why);
/* Makes the device's context the thread's until leave; ES_E_DEVICE_LOST once it is. */
ES_LOCAL es_status es_i_cu_enter(es_i_cu_device *device, es_error *why);
ES_LOCAL void es_i_cu_leave(es_i_cu_device *device);
/* Device memory of at least one byte; `what` names it in the refusal, with needed and free bytes. */
ES_LOCAL es_status es_i_cu_alloc(es_i_cu_device *device, uint64_t bytes, const char *what, es_i_cu_ptr *address,
                                 es_error *why);

/* cuda_image.c: the kernels of the plan; cuda_helpers.c: the few of the runtime itself, absence is no error */
ES_LOCAL es_status es_i_cu_kernels_load(es_i_cu_device *device, es_error *why);
ES_LOCAL void es_i_cu_helpers_load(es_i_cu_device *device);
ES_LOCAL es_status es_i_cu_measure_read(es_i_device *handle, uint32_t repeats, double *rate, es_error *why);
ES_LOCAL es_status es_i_cu_measure_launch(es_i_device *handle, uint32_t grid, uint32_t n, double *ns, es_error *why);

/* cuda_stream.c */
ES_LOCAL es_status es_i_cu_stream_open(es_i_device *handle, es_i_stream **stream, es_error *why);
ES_LOCAL void es_i_cu_stream_close(es_i_stream *handle);
ES_LOCAL es_status es_i_cu_reset(es_i_stream *handle, es_error *why);
ES_LOCAL es_status es_i_cu_read(es_i_stream *handle, uint32_t space, uint64_t offset, void *to, uint64_t bytes,
                                es_error *why);
ES_LOCAL es_status es_i_cu_write(es_i_stream *handle, uint32_t space, uint64_t offset, const void *from, uint64_t bytes,
                                 es_error *why);
ES_LOCAL es_status es_i_cu_copy(es_i_stream *to, es_i_stream *from, es_error *why);
ES_LOCAL es_status es_i_cu_stream_enter(es_i_cu_stream *stream, es_error *why);
/* A failure that left the stream halfway: it is lost. */
ES_LOCAL es_status es_i_cu_broken(es_i_cu_stream *stream, es_status status);

/* cuda_run.c, cuda_greedy.c */
ES_LOCAL es_status es_i_cu_run(es_i_stream *handle, uint32_t g, int outputs, uint8_t *io, uint64_t *ns, es_error *why);
ES_LOCAL es_status es_i_cu_greedy(es_i_stream *handle, int64_t first, uint64_t position, size_t n, int32_t *tokens,
                                  uint64_t *ns, uint8_t *io, es_error *why);
enum { ES_CU_OUTPUTS = 1, ES_CU_COPIES = 2, ES_CU_ADVANCE = 4 };
/* Runs the launches of graph g, captured[index] when it can be captured. modes: ES_CU_OUTPUTS all launches,
 * ES_CU_COPIES inputs from and outputs to pinned slot 0 as well, ES_CU_ADVANCE the helper of the greedy step. */
ES_LOCAL es_status es_i_cu_replay(es_i_cu_stream *stream, uint32_t index, uint32_t g, int modes, es_error *why);
ES_LOCAL es_i_cu_result es_i_cu_spans_copy(es_i_cu_stream *stream, uint32_t g, uint32_t direction, uint8_t *slot);
ES_LOCAL void es_i_cu_inputs_take(const es_i_cu_stream *stream, uint32_t g, const uint8_t *io, uint8_t *slot);
ES_LOCAL void es_i_cu_outputs_give(const es_i_cu_stream *stream, uint32_t g, uint8_t *io);
ES_LOCAL es_status es_i_cu_events_make(es_i_cu_stream *stream, es_error *why);
ES_LOCAL es_status es_i_cu_events_read(es_i_cu_stream *stream, uint32_t n, uint64_t *ns, es_error *why);
#endif

#endif
