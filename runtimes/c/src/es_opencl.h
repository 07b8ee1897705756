/* OpenCL without its headers: the types, numbers and functions of OpenCL 1.2 that the backend uses, and what its files
 * share. Values and signatures: Khronos OpenCL-Headers, CL/cl.h. */
#ifndef ES_OPENCL_H
#define ES_OPENCL_H

#include "es_device.h"

typedef struct es_i_cl_platform_ *es_i_cl_platform;
typedef struct es_i_cl_id_ *es_i_cl_id;
typedef struct es_i_cl_context_ *es_i_cl_context;
typedef struct es_i_cl_queue_ *es_i_cl_queue;
typedef struct es_i_cl_mem_ *es_i_cl_mem;
typedef struct es_i_cl_program_ *es_i_cl_program;
typedef struct es_i_cl_kernel_ *es_i_cl_kernel;
typedef struct es_i_cl_event_ *es_i_cl_event;
typedef void (*es_i_cl_notify)(const char *, const void *, size_t, void *);
typedef void (*es_i_cl_built)(es_i_cl_program, void *);

enum {
    ES_CL_DEVICE_NOT_AVAILABLE = -2,
    ES_CL_COMPILER_NOT_AVAILABLE = -3,
    ES_CL_ALLOCATION_FAILURE = -4,
    ES_CL_OUT_OF_RESOURCES = -5,
    ES_CL_OUT_OF_HOST_MEMORY = -6,
    ES_CL_INVALID_BUFFER_SIZE = -61,
    ES_CL_INVALID_CONTEXT = -34,
    ES_CL_INVALID_COMMAND_QUEUE = -36,
};
enum { ES_CL_PLATFORM_VERSION = 0x0901, ES_CL_PLATFORM_NAME = 0x0902 };
enum {
    ES_CL_DEVICE_TYPE = 0x1000,
    ES_CL_DEVICE_MAX_COMPUTE_UNITS = 0x1002,
    ES_CL_DEVICE_MAX_WORK_GROUP_SIZE = 0x1004,
    ES_CL_DEVICE_MAX_WORK_ITEM_SIZES = 0x1005,
    ES_CL_DEVICE_MAX_MEM_ALLOC_SIZE = 0x1010,
    ES_CL_DEVICE_GLOBAL_MEM_CACHE_SIZE = 0x101e,
    ES_CL_DEVICE_AVAILABLE = 0x1027,
    ES_CL_DEVICE_NAME = 0x102b,
    ES_CL_DEVICE_VENDOR = 0x102c,
    ES_CL_DRIVER_VERSION = 0x102d,
    ES_CL_DEVICE_VERSION = 0x102f,
    ES_CL_DEVICE_HOST_UNIFIED_MEMORY = 0x1035,
};
enum { ES_CL_TYPE_GPU = 4 };
enum { ES_CL_QUEUE_PROFILING = 2 };
enum { ES_CL_MEM_READ_WRITE = 1, ES_CL_MEM_READ_ONLY = 4, ES_CL_MEM_USE_HOST_PTR = 8 };
enum { ES_CL_PROGRAM_BINARY_SIZES = 0x1165, ES_CL_PROGRAM_BINARIES = 0x1166, ES_CL_PROGRAM_BUILD_LOG = 0x1183 };
enum { ES_CL_KERNEL_NUM_ARGS = 0x1191, ES_CL_KERNEL_WORK_GROUP_SIZE = 0x11b0 };
enum { ES_CL_PROFILING_START = 0x1282, ES_CL_PROFILING_END = 0x1283 };

/* result, name, arguments */
#define ES_CL_FUNCTIONS(X)                                                                                             \
    X(int32_t, GetPlatformIDs, (uint32_t, es_i_cl_platform *, uint32_t *))                                             \
    X(int32_t, GetPlatformInfo, (es_i_cl_platform, uint32_t, size_t, void *, size_t *))                                \
    X(int32_t, GetDeviceIDs, (es_i_cl_platform, uint64_t, uint32_t, es_i_cl_id *, uint32_t *))                         \
    X(int32_t, GetDeviceInfo, (es_i_cl_id, uint32_t, size_t, void *, size_t *))                                        \
    X(es_i_cl_context, CreateContext,                                                                                  \
      (const intptr_t *, uint32_t, const es_i_cl_id *, es_i_cl_notify, void *, int32_t *))                             \
    X(int32_t, ReleaseContext, (es_i_cl_context))                                                                      \
    X(es_i_cl_queue, CreateCommandQueue, (es_i_cl_context, es_i_cl_id, uint64_t, int32_t *))                           \
    X(int32_t, ReleaseCommandQueue, (es_i_cl_queue))                                                                   \
    X(es_i_cl_mem, CreateBuffer, (es_i_cl_context, uint64_t, size_t, void *, int32_t *))                               \
    X(int32_t, ReleaseMemObject, (es_i_cl_mem))                                                                        \
    X(es_i_cl_program, CreateProgramWithSource, (es_i_cl_context, uint32_t, const char **, const size_t *, int32_t *)) \
    X(es_i_cl_program, CreateProgramWithBinary,                                                                        \
      (es_i_cl_context, uint32_t, const es_i_cl_id *, const size_t *, const unsigned char **, int32_t *, int32_t *))   \
    X(int32_t, BuildProgram, (es_i_cl_program, uint32_t, const es_i_cl_id *, const char *, es_i_cl_built, void *))     \
    X(int32_t, ReleaseProgram, (es_i_cl_program))                                                                      \
    X(int32_t, GetProgramInfo, (es_i_cl_program, uint32_t, size_t, void *, size_t *))                                  \
    X(int32_t, GetProgramBuildInfo, (es_i_cl_program, es_i_cl_id, uint32_t, size_t, void *, size_t *))                 \
    X(es_i_cl_kernel, CreateKernel, (es_i_cl_program, const char *, int32_t *))                                        \
    X(int32_t, ReleaseKernel, (es_i_cl_kernel))                                                                        \
    X(int32_t, SetKernelArg, (es_i_cl_kernel, uint32_t, size_t, const void *))                                         \
    X(int32_t, GetKernelInfo, (es_i_cl_kernel, uint32_t, size_t, void *, size_t *))                                    \
    X(int32_t, GetKernelWorkGroupInfo, (es_i_cl_kernel, es_i_cl_id, uint32_t, size_t, void *, size_t *))               \
    X(int32_t, EnqueueNDRangeKernel,                                                                                   \
      (es_i_cl_queue, es_i_cl_kernel, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t,              \
       const es_i_cl_event *, es_i_cl_event *))                                                                        \
    X(int32_t, EnqueueWriteBuffer,                                                                                     \
      (es_i_cl_queue, es_i_cl_mem, uint32_t, size_t, size_t, const void *, uint32_t, const es_i_cl_event *,            \
       es_i_cl_event *))                                                                                               \
    X(int32_t, EnqueueReadBuffer,                                                                                      \
      (es_i_cl_queue, es_i_cl_mem, uint32_t, size_t, size_t, void *, uint32_t, const es_i_cl_event *,                  \
       es_i_cl_event *))                                                                                               \
    X(int32_t, EnqueueCopyBuffer,                                                                                      \
      (es_i_cl_queue, es_i_cl_mem, es_i_cl_mem, size_t, size_t, size_t, uint32_t, const es_i_cl_event *,               \
       es_i_cl_event *))                                                                                               \
    X(int32_t, EnqueueFillBuffer,                                                                                      \
      (es_i_cl_queue, es_i_cl_mem, const void *, size_t, size_t, size_t, uint32_t, const es_i_cl_event *,              \
       es_i_cl_event *))                                                                                               \
    X(int32_t, Flush, (es_i_cl_queue))                                                                                 \
    X(int32_t, Finish, (es_i_cl_queue))                                                                                \
    X(int32_t, WaitForEvents, (uint32_t, const es_i_cl_event *))                                                       \
    X(int32_t, ReleaseEvent, (es_i_cl_event))                                                                          \
    X(int32_t, GetEventProfilingInfo, (es_i_cl_event, uint32_t, size_t, void *, size_t *))

typedef struct {
#define ES_CL_MEMBER(result, name, arguments) result(*name) arguments;
    ES_CL_FUNCTIONS(ES_CL_MEMBER)
#undef ES_CL_MEMBER
} es_i_cl_api;

/* A part of WEIGHTS in one memory object; whole tensors. */
typedef struct {
    uint64_t offset, bytes;
    es_i_cl_mem mem;
} es_i_cl_piece;

/* Bytes of io that go in one copy. */
typedef struct {
    uint64_t offset, bytes;
} es_i_cl_span;

typedef struct {
    es_i_cl_api cl;
    const es_i_plan *plan;
    es_i_cl_platform platform;
    es_i_cl_id id;
    es_i_cl_context context;
    es_i_cl_program program;
    es_i_cl_piece *pieces;
    uint32_t n_pieces;
    es_i_cl_span *spans;  /* per graph: its inputs, then its outputs */
    uint32_t *first_span; /* [2 * graphs + 1]: inputs of graph g from [2g], outputs from [2g + 1] */
    uint64_t input_bytes; /* of the graph with most */
    uint64_t max_alloc, cache;
    uint32_t units;
    int poison, shared_memory;
    char name[128], driver[64], version[128], platform_text[256];
} es_i_cl_device;

/* opencl_driver.c */
ES_LOCAL es_status es_i_cl_driver_open(es_i_cl_api *cl, es_error *why);
ES_LOCAL es_status es_i_cl_device_choose(es_i_cl_device *device, es_error *why);
/* The status of an OpenCL error while `what` was done; memory: it was about memory, so running out is not a loss. */
ES_LOCAL es_status es_i_cl_fail(es_error *why, int32_t code, int memory, const char *what);

/* opencl_program.c: the plan's kernels, from a cache beside `path` or from source. */
ES_LOCAL es_status es_i_cl_program_open(es_i_cl_device *device, const char *path, es_error *why);
/* Builds source text; the driver's words go into the sentence. */
ES_LOCAL es_status es_i_cl_build(const es_i_cl_device *device, const char *source, size_t bytes,
                                 es_i_cl_program *program, es_error *why);

/* opencl_cache.c: programs as the driver built them. A program, or NULL: none is kept, or it is not for this driver or
 * damaged. */
ES_LOCAL es_i_cl_program es_i_cl_cache_read(const es_i_cl_device *device, const char *path);
ES_LOCAL void es_i_cl_cache_write(const es_i_cl_device *device, const char *path, es_i_cl_program program);

/* opencl_memory.c */
ES_LOCAL es_status es_i_cl_weights_open(es_i_cl_device *device, es_error *why);
ES_LOCAL void es_i_cl_weights_close(es_i_cl_device *device);
ES_LOCAL es_status es_i_cl_spans_find(es_i_cl_device *device, es_error *why);
ES_LOCAL es_status es_i_cl_buffer(const es_i_cl_device *device, uint64_t bytes, const char *what, es_i_cl_mem *mem,
                                  es_error *why);
/* Fills with a repeated byte. */
ES_LOCAL int32_t es_i_cl_fill(const es_i_cl_device *device, es_i_cl_queue queue, es_i_cl_mem mem, uint64_t bytes,
                              uint8_t value);

/* opencl_stream.c, opencl_run.c, opencl_measure.c: functions of the table. */
ES_LOCAL es_status es_i_cl_stream_open(es_i_device *device, es_i_stream **stream, es_error *why);
ES_LOCAL void es_i_cl_stream_close(es_i_stream *stream);
ES_LOCAL es_status es_i_cl_reset(es_i_stream *stream, es_error *why);
ES_LOCAL es_status es_i_cl_read(es_i_stream *stream, uint32_t space, uint64_t offset, void *to, uint64_t bytes,
                                es_error *why);
ES_LOCAL es_status es_i_cl_write(es_i_stream *stream, uint32_t space, uint64_t offset, const void *from, uint64_t bytes,
                                 es_error *why);
ES_LOCAL es_status es_i_cl_copy(es_i_stream *to, es_i_stream *from, es_error *why);
ES_LOCAL es_status es_i_cl_run(es_i_stream *stream, uint32_t g, int outputs, uint8_t *io, uint64_t *ns, es_error *why);
ES_LOCAL es_status es_i_cl_greedy(es_i_stream *stream, int64_t first, uint64_t position, size_t n, int32_t *tokens,
                                  uint64_t *ns, uint8_t *io, es_error *why);
ES_LOCAL es_status es_i_cl_measure_read(es_i_device *device, uint32_t repeats, double *rate, es_error *why);
ES_LOCAL es_status es_i_cl_measure_launch(es_i_device *device, uint32_t grid, uint32_t n, double *ns, es_error *why);

enum { ES_CL_SLOTS = 4, ES_CL_BATCH = 32 };

typedef struct {
    es_i_cl_device *device;
    es_i_cl_queue queue, timed; /* timed: made when first asked for */
    es_i_cl_mem space[ES_N_SPACES];
    es_i_cl_kernel *kernels; /* per launch, arguments set */
    es_i_cl_event *events;   /* per launch of the longest graph */
    uint8_t *slots;          /* ES_CL_SLOTS copies of inputs on their way to the device, or NULL: no tokens */
    es_i_cl_event slot[ES_CL_SLOTS];
    uint32_t next_slot;
    es_i_cl_mem steps; /* greedy: ES_CL_BATCH positions, then as many tokens; 8 bytes each */
    int64_t *batch;    /* the same on the host */
    int lost;
} es_i_cl_stream;

#endif
