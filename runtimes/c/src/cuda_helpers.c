/* The few kernels of the runtime itself, as PTX that every driver compiles for every device, and what measures with
 * them. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

/* es_read: `passes` times, thread t of n reads the 16-byte vectors t, t + n, ... four in flight; their exclusive-or is
 * written when it is one certain number, so no load can be left out.
 * es_advance: control[0]++; chosen[control[0] before] = tokens = next; position++; see es_i_cu_advance_resolve.
 * es_spin: waits for some nanoseconds, or a million looks at the clock. es_nothing: an empty launch. */
static const char es_i_cu_ptx[] =
    ".version 6.0\n.target sm_50\n.address_size 64\n"
    ".visible .entry es_read(.param .u64 data, .param .u64 vectors, .param .u64 passes, .param .u64 out)\n{\n"
    ".reg .pred %p<4>;\n.reg .b32 %r<40>;\n.reg .b64 %d<20>;\n"
    "ld.param.u64 %d1, [data];\nld.param.u64 %d2, [vectors];\nld.param.u64 %d3, [out];\n"
    "cvta.to.global.u64 %d1, %d1;\ncvta.to.global.u64 %d3, %d3;\n"
    "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmov.u32 %r3, %tid.x;\nmov.u32 %r4, %nctaid.x;\n"
    "mad.lo.u32 %r5, %r1, %r2, %r3;\nmul.lo.u32 %r6, %r4, %r2;\n"
    "ld.param.u64 %d16, [passes];\ncvt.u64.u32 %d17, %r5;\ncvt.u64.u32 %d5, %r6;\n"
    "shl.b64 %d6, %d5, 4;\nshl.b64 %d7, %d17, 4;\nadd.u64 %d18, %d1, %d7;\n" /* step and address in bytes */
    "shl.b64 %d9, %d5, 2;\nsub.u64 %d10, %d9, %d5;\nshl.b64 %d11, %d6, 2;\n"
    "mov.u32 %r7, 0;\n"
    "pass:\nmov.u64 %d4, %d17;\nmov.u64 %d8, %d18;\n"
    "whole:\nadd.u64 %d12, %d4, %d10;\nsetp.ge.u64 %p1, %d12, %d2;\n@%p1 bra rest;\n"
    "add.u64 %d13, %d8, %d6;\nadd.u64 %d14, %d13, %d6;\nadd.u64 %d15, %d14, %d6;\n"
    "ld.global.nc.v4.u32 {%r8, %r9, %r10, %r11}, [%d8];\n"
    "ld.global.nc.v4.u32 {%r12, %r13, %r14, %r15}, [%d13];\n"
    "ld.global.nc.v4.u32 {%r16, %r17, %r18, %r19}, [%d14];\n"
    "ld.global.nc.v4.u32 {%r20, %r21, %r22, %r23}, [%d15];\n"
    "xor.b32 %r8, %r8, %r9;\nxor.b32 %r10, %r10, %r11;\nxor.b32 %r12, %r12, %r13;\nxor.b32 %r14, %r14, %r15;\n"
    "xor.b32 %r16, %r16, %r17;\nxor.b32 %r18, %r18, %r19;\nxor.b32 %r20, %r20, %r21;\nxor.b32 %r22, %r22, %r23;\n"
    "xor.b32 %r8, %r8, %r10;\nxor.b32 %r12, %r12, %r14;\nxor.b32 %r16, %r16, %r18;\nxor.b32 %r20, %r20, %r22;\n"
    "xor.b32 %r8, %r8, %r12;\nxor.b32 %r16, %r16, %r20;\nxor.b32 %r8, %r8, %r16;\nxor.b32 %r7, %r7, %r8;\n"
    "add.u64 %d4, %d4, %d9;\nadd.u64 %d8, %d8, %d11;\nbra whole;\n"
    "rest:\nsetp.ge.u64 %p1, %d4, %d2;\n@%p1 bra done;\n"
    "ld.global.nc.v4.u32 {%r8, %r9, %r10, %r11}, [%d8];\n"
    "xor.b32 %r8, %r8, %r9;\nxor.b32 %r10, %r10, %r11;\nxor.b32 %r8, %r8, %r10;\nxor.b32 %r7, %r7, %r8;\n"
    "add.u64 %d4, %d4, %d5;\nadd.u64 %d8, %d8, %d6;\nbra rest;\n"
    "done:\nsub.u64 %d16, %d16, 1;\nsetp.ne.u64 %p3, %d16, 0;\n@%p3 bra pass;\n"
    "setp.eq.u32 %p2, %r7, 1540483477;\n@%p2 st.global.u32 [%d3], %r7;\nret;\n}\n"
    ".visible .entry es_advance(.param .u64 next, .param .u64 tokens, .param .u64 position, .param .u64 control,\n"
    ".param .u64 widths)\n{\n"
    ".reg .pred %p<4>;\n.reg .b32 %r<8>;\n.reg .b64 %d<12>;\n"
    "ld.param.u64 %d1, [next];\nld.param.u64 %d2, [tokens];\nld.param.u64 %d3, [position];\n"
    "ld.param.u64 %d4, [control];\nld.param.u64 %d5, [widths];\n"
    "cvta.to.global.u64 %d1, %d1;\ncvta.to.global.u64 %d2, %d2;\ncvta.to.global.u64 %d4, %d4;\n"
    "cvt.u32.u64 %r1, %d5;\nand.b32 %r2, %r1, 1;\nand.b32 %r3, %r1, 2;\n"
    "setp.ne.u32 %p1, %r2, 0;\nsetp.ne.u32 %p2, %r3, 0;\nsetp.eq.u64 %p3, %d3, 0;\n"
    "ld.global.u32 %r4, [%d4];\ncvt.u64.u32 %d6, %r4;\nadd.u32 %r5, %r4, 1;\nst.global.u32 [%d4], %r5;\n"
    "@%p1 bra wide;\n"
    "ld.global.u32 %r6, [%d1];\nst.global.u32 [%d2], %r6;\n"
    "shl.b64 %d7, %d6, 2;\nadd.u64 %d7, %d7, %d4;\nst.global.u32 [%d7+64], %r6;\nbra counted;\n"
    "wide:\nld.global.u64 %d8, [%d1];\nst.global.u64 [%d2], %d8;\n"
    "shl.b64 %d7, %d6, 3;\nadd.u64 %d7, %d7, %d4;\nst.global.u64 [%d7+64], %d8;\n"
    "counted:\n@%p3 bra done;\ncvta.to.global.u64 %d3, %d3;\n@%p2 bra wider;\n"
    "ld.global.u32 %r7, [%d3];\nadd.u32 %r7, %r7, 1;\nst.global.u32 [%d3], %r7;\nbra done;\n"
    "wider:\nld.global.u64 %d9, [%d3];\nadd.u64 %d9, %d9, 1;\nst.global.u64 [%d3], %d9;\n"
    "done:\nret;\n}\n"
    ".visible .entry es_spin(.param .u64 ns)\n{\n"
    ".reg .pred %p<3>;\n.reg .b32 %r<2>;\n.reg .b64 %d<5>;\n"
    "ld.param.u64 %d1, [ns];\nmov.u64 %d2, %globaltimer;\nmov.u32 %r1, 0;\n"
    "again:\nmov.u64 %d3, %globaltimer;\nsub.u64 %d4, %d3, %d2;\nadd.u32 %r1, %r1, 1;\n"
    "setp.lt.u64 %p1, %d4, %d1;\nsetp.lt.and.u32 %p2, %r1, 1000000, %p1;\n@%p2 bra again;\nret;\n}\n"
    ".visible .entry es_nothing()\n{\nret;\n}\n";

/* A JIT compiler may be missing or switched off; what would use the helpers then does without. */
void es_i_cu_helpers_load(es_i_cu_device *device)
{
    const es_i_cu_api *api = &device->api;
    const struct {
        const char *name;
        void **place;
    } helpers[] = {{"es_read", &device->read},
                   {"es_advance", &device->advance},
                   {"es_spin", &device->spin},
                   {"es_nothing", &device->nothing}};
    if (api->module_load(&device->helpers, es_i_cu_ptx, 0, NULL, NULL) != ES_CU_OK) {
        device->helpers = NULL;
        return;
    }
    for (size_t i = 0; i < sizeof helpers / sizeof helpers[0]; i++)
        if (api->module_function(helpers[i].place, device->helpers, helpers[i].name) != ES_CU_OK)
            *helpers[i].place = NULL;
}

/* A queue and two timers for one measurement. */
typedef struct {
    void *queue, *start, *end;
} es_i_cu_clock;

static void es_i_cu_clock_close(const es_i_cu_api *api, es_i_cu_clock *clock)
{
    if (clock->queue != NULL)
        (void)api->queue_wait(clock->queue);
    if (clock->start != NULL)
        (void)api->event_destroy(clock->start);
    if (clock->end != NULL)
        (void)api->event_destroy(clock->end);
    if (clock->queue != NULL)
        (void)api->queue_destroy(clock->queue);
}

static es_i_cu_result es_i_cu_clock_open(const es_i_cu_api *api, es_i_cu_clock *clock)
{
    es_i_cu_result result = api->queue_create(&clock->queue, ES_CU_NON_BLOCKING);
    if (result == ES_CU_OK)
        result = api->event_create(&clock->start, ES_CU_EVENT_DEFAULT);
    if (result == ES_CU_OK)
        result = api->event_create(&clock->end, ES_CU_EVENT_DEFAULT);
    return result;
}

static es_i_cu_result es_i_cu_clock_stop(const es_i_cu_api *api, es_i_cu_clock *clock, float *ms)
{
    es_i_cu_result result = api->event_record(clock->end, clock->queue);
    if (result == ES_CU_OK)
        result = api->queue_wait(clock->queue);
    return result == ES_CU_OK ? api->event_elapsed(ms, clock->start, clock->end) : result;
}

enum { ES_CU_READ_THREADS = 256, ES_CU_READ_BLOCKS = 8 }; /* per multiprocessor: 2048 threads */

/* The best of `repeats` readings of `bytes` at `data`, each of as many passes as make some gigabytes: a short one would
 * time its start and end. */
static es_i_cu_result es_i_cu_read_best(es_i_cu_device *device, es_i_cu_ptr data, uint64_t bytes, es_i_cu_ptr out,
                                        uint32_t repeats, double *rate)
{
    const es_i_cu_api *api = &device->api;
    es_i_cu_clock clock = {NULL, NULL, NULL};
    es_i_cu_ptr vectors = bytes / 16, pause = 50000, passes = 1 + ((uint64_t)1 << 32) / bytes;
    void *params[] = {&data, &vectors, &passes, &out}, *spin_params[] = {&pause};
    es_i_cu_result result = es_i_cu_clock_open(api, &clock);
    *rate = 0;
    for (uint32_t i = 0; result == ES_CU_OK && i <= repeats; i++) { /* the first one warms up */
        float ms = 0;
        if (device->spin != NULL)
            result = api->launch(device->spin, 1, 1, 1, 1, 1, 1, 0, clock.queue, spin_params, NULL);
        if (result == ES_CU_OK)
            result = api->event_record(clock.start, clock.queue);
        if (result == ES_CU_OK)
            result = api->launch(device->read, (unsigned int)device->processors * ES_CU_READ_BLOCKS, 1, 1,
                                 ES_CU_READ_THREADS, 1, 1, 0, clock.queue, params, NULL);
        if (result == ES_CU_OK)
            result = es_i_cu_clock_stop(api, &clock, &ms);
        double found = ms > 0 ? (double)(vectors * 16 * passes) / ((double)ms * 1e-3) : 0;
        *rate = i > 0 && found > *rate ? found : *rate;
    }
    es_i_cu_clock_close(api, &clock);
    return result;
}

/* The weights; where the device's cache would hold much of them, scratch memory of sixteen times its size. */
es_status es_i_cu_measure_read(es_i_device *handle, uint32_t repeats, double *rate, es_error *why)
{
    es_i_cu_device *device = (es_i_cu_device *)(void *)handle;
    uint64_t bytes = device->plan->weight_bytes, cache = device->l2_bytes > 0 ? (uint64_t)device->l2_bytes : 0;
    es_i_cu_ptr scratch = 0, out = 0, data = device->weights;
    es_status status = es_i_cu_enter(device, why);
    if (status != ES_OK)
        return status;
    if (device->read == NULL)
        status = es_i_fail(why, ES_E_DEVICE_BUILD, "the driver cannot compile the kernel that measures");
    else
        status = es_i_cu_alloc(device, 64, "the results of measuring", &out, why);
    if (status == ES_OK && bytes < 4 * cache + ES_LINE) {
        bytes = 16 * cache + ES_LINE;
        status = es_i_cu_alloc(device, bytes, "measuring the memory would", &scratch, why);
        data = scratch;
    }
    if (status == ES_OK)
        status = es_i_cu_check(device, es_i_cu_read_best(device, data, bytes, out, repeats, rate),
                               "measuring the memory", why);
    if (scratch != 0)
        (void)device->api.memory_free(scratch);
    if (out != 0)
        (void)device->api.memory_free(out);
    es_i_cu_leave(device);
    return status;
}

static es_i_cu_result es_i_cu_nothing_launch(es_i_cu_device *device, void *queue, uint32_t grid, uint32_t n)
{
    es_i_cu_result result = ES_CU_OK;
    void *none = NULL;
    for (uint32_t i = 0; result == ES_CU_OK && i < n; i++)
        result = device->api.launch(device->nothing, grid, 1, 1, 1, 1, 1, 0, queue, &none, NULL);
    return result;
}

/* n launches as one graph, as the steps run them; by themselves where the driver cannot capture. */
static es_i_cu_result es_i_cu_nothing_time(es_i_cu_device *device, uint32_t grid, uint32_t n, float *ms)
{
    const es_i_cu_api *api = &device->api;
    es_i_cu_clock clock = {NULL, NULL, NULL};
    void *graph = NULL, *exec = NULL;
    es_i_cu_result result = es_i_cu_clock_open(api, &clock);
    if (result == ES_CU_OK && api->capture_begin(clock.queue, ES_CU_CAPTURE_THREAD_LOCAL) == ES_CU_OK) {
        es_i_cu_result launched = es_i_cu_nothing_launch(device, clock.queue, grid, n);
        if (api->capture_end(clock.queue, &graph) == ES_CU_OK && launched == ES_CU_OK && graph != NULL &&
            api->graph_instantiate(&exec, graph, 0) != ES_CU_OK)
            exec = NULL;
        if (graph != NULL)
            (void)api->graph_destroy(graph);
    }
    for (int i = 0; result == ES_CU_OK && i < 2; i++) { /* the first one warms up */
        result = api->event_record(clock.start, clock.queue);
        if (result == ES_CU_OK)
            result = exec != NULL ? api->graph_launch(exec, clock.queue)
                                  : es_i_cu_nothing_launch(device, clock.queue, grid, n);
        if (result == ES_CU_OK)
            result = es_i_cu_clock_stop(api, &clock, ms);
    }
    if (exec != NULL)
        (void)api->exec_destroy(exec);
    es_i_cu_clock_close(api, &clock);
    return result;
}

es_status es_i_cu_measure_launch(es_i_device *handle, uint32_t grid, uint32_t n, double *ns, es_error *why)
{
    enum { MOST = 1000 }; /* nodes of a graph; more tell nothing more */
    es_i_cu_device *device = (es_i_cu_device *)(void *)handle;
    float ms = 0;
    uint32_t launches = n < MOST ? n : MOST;
    es_status status = es_i_cu_enter(device, why);
    if (status != ES_OK)
        return status;
    if (device->nothing == NULL || launches < 1 || grid < 1)
        status = es_i_fail(why, ES_E_DEVICE_BUILD, "the driver cannot compile the kernel that measures");
    else
        status = es_i_cu_check(device, es_i_cu_nothing_time(device, grid, launches, &ms), "measuring launches", why);
    *ns = status == ES_OK ? (double)ms * 1e6 / (double)launches : 0;
    es_i_cu_leave(device);
    return status;
}
#endif
