/* Two facts about the device: how fast it reads its weights, or memory where those would stay in its cache, by its own
 * timers; and the price of a launch. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <string.h>

/* Group g reads a run of its own; neighbours in a group read neighbouring 16 bytes. */
static const char es_i_cl_source[] =
    "__kernel void es_read(__global const uint4 *data, ulong n, __global uint *sink)\n"
    "{\n"
    "    ulong run = (n + get_num_groups(0) - 1) / get_num_groups(0), from = run * get_group_id(0);\n"
    "    ulong end = min(from + run, n);\n"
    "    uint4 a = (uint4)(0), b = a;\n"
    "    for (ulong i = from + get_local_id(0); i < end; i += 2 * get_local_size(0)) {\n"
    "        a ^= data[i];\n"
    "        if (i + get_local_size(0) < end)\n"
    "            b ^= data[i + get_local_size(0)];\n"
    "    }\n"
    "    a ^= b;\n"
    "    if ((a.x ^ a.y ^ a.z ^ a.w) == 0x9e3779b9u)\n"
    "        sink[0] = a.x;\n" /* keeps the loads */
    "}\n"
    "__kernel void es_nothing(void)\n"
    "{\n"
    "}\n";

enum { ES_CL_READ_GROUP = 128, ES_CL_READ_GROUPS = 16 };

typedef struct {
    es_i_cl_program program;
    es_i_cl_kernel kernel;
    es_i_cl_queue queue;
    es_i_cl_mem sink;
} es_i_cl_meter;

static void es_i_cl_meter_close(const es_i_cl_device *device, es_i_cl_meter *m)
{
    if (m->sink != NULL)
        device->cl.ReleaseMemObject(m->sink);
    if (m->queue != NULL)
        device->cl.ReleaseCommandQueue(m->queue);
    if (m->kernel != NULL)
        device->cl.ReleaseKernel(m->kernel);
    if (m->program != NULL)
        device->cl.ReleaseProgram(m->program);
}

static es_status es_i_cl_meter_open(const es_i_cl_device *device, const char *kernel, es_i_cl_meter *m, es_error *why)
{
    int32_t code = 0;
    memset(m, 0, sizeof *m);
    es_status status = es_i_cl_build(device, es_i_cl_source, sizeof es_i_cl_source - 1, &m->program, why);
    if (status != ES_OK)
        return status;
    m->kernel = device->cl.CreateKernel(m->program, kernel, &code);
    if (code == 0)
        m->queue = device->cl.CreateCommandQueue(device->context, device->id, ES_CL_QUEUE_PROFILING, &code);
    if (code == 0)
        m->sink = device->cl.CreateBuffer(device->context, ES_CL_MEM_READ_WRITE, 64, NULL, &code);
    if (code == 0)
        return ES_OK;
    es_i_cl_meter_close(device, m);
    return es_i_cl_fail(why, code, 1, "measuring");
}

/* Nanoseconds of one pass over a piece. */
static int32_t es_i_cl_pass(const es_i_cl_device *device, const es_i_cl_meter *m, const es_i_cl_piece *piece,
                            uint64_t *ns)
{
    const es_i_cl_api *cl = &device->cl;
    uint64_t n = piece->bytes / 16, start = 0, end = 0;
    size_t local = ES_CL_READ_GROUP, groups = (size_t)(device->units > 0 ? device->units : 1) * ES_CL_READ_GROUPS;
    size_t global = groups * local;
    es_i_cl_event event = NULL;
    int32_t code = cl->SetKernelArg(m->kernel, 0, sizeof piece->mem, &piece->mem);
    if (code == 0)
        code = cl->SetKernelArg(m->kernel, 1, sizeof n, &n);
    if (code == 0)
        code = cl->SetKernelArg(m->kernel, 2, sizeof m->sink, &m->sink);
    if (code == 0)
        code = cl->EnqueueNDRangeKernel(m->queue, m->kernel, 1, NULL, &global, &local, 0, NULL, &event);
    if (code == 0)
        code = cl->Finish(m->queue);
    if (code == 0)
        code = cl->GetEventProfilingInfo(event, ES_CL_PROFILING_START, sizeof start, &start, NULL);
    if (code == 0)
        code = cl->GetEventProfilingInfo(event, ES_CL_PROFILING_END, sizeof end, &end, NULL);
    if (event != NULL)
        cl->ReleaseEvent(event);
    *ns += end > start ? end - start : 1;
    return code;
}

/* Memory to read in the place of weights that would stay in the device's cache; bytes 0 where they would not. */
static es_i_cl_piece es_i_cl_scratch(const es_i_cl_device *device, const es_i_cl_meter *m, uint64_t weights)
{
    const uint64_t least = 64u << 20, most = 512u << 20;
    es_i_cl_piece scratch = {0, 0, NULL};
    int32_t code = 0;
    if (weights >= 4 * device->cache && weights >= least)
        return scratch;
    uint64_t bytes = 8 * device->cache < least ? least : 8 * device->cache > most ? most : 8 * device->cache;
    if (device->max_alloc > 0 && bytes > device->max_alloc)
        return scratch;
    scratch.mem = device->cl.CreateBuffer(device->context, ES_CL_MEM_READ_WRITE, (size_t)bytes, NULL, &code);
    if (scratch.mem == NULL)
        return scratch;
    scratch.bytes = bytes;
    if (es_i_cl_fill(device, m->queue, scratch.mem, bytes, 1) != 0 || device->cl.Finish(m->queue) != 0) {
        device->cl.ReleaseMemObject(scratch.mem);
        return (es_i_cl_piece){0, 0, NULL};
    }
    return scratch;
}

es_status es_i_cl_measure_read(es_i_device *opaque, uint32_t repeats, double *rate, es_error *why)
{
    const es_i_cl_device *device = (const es_i_cl_device *)(void *)opaque;
    es_i_cl_meter m;
    uint64_t best = UINT64_MAX, bytes = 0;
    int32_t code = 0;
    es_status status = es_i_cl_meter_open(device, "es_read", &m, why);
    if (status != ES_OK)
        return status;
    for (uint32_t i = 0; i < device->n_pieces; i++)
        bytes += device->pieces[i].bytes;
    es_i_cl_piece scratch = es_i_cl_scratch(device, &m, bytes);
    const es_i_cl_piece *pieces = scratch.mem != NULL ? &scratch : device->pieces;
    const uint32_t n = scratch.mem != NULL ? 1 : device->n_pieces;
    bytes = scratch.mem != NULL ? scratch.bytes : bytes;
    for (uint32_t r = 0; r < repeats && code == 0; r++) {
        uint64_t ns = 0;
        for (uint32_t i = 0; i < n && code == 0; i++)
            code = es_i_cl_pass(device, &m, &pieces[i], &ns);
        best = ns < best ? ns : best;
    }
    if (scratch.mem != NULL)
        device->cl.ReleaseMemObject(scratch.mem);
    es_i_cl_meter_close(device, &m);
    if (code != 0)
        return es_i_cl_fail(why, code, 0, "measuring");
    *rate = (double)bytes / ((double)(best > 0 ? best : 1) * 1e-9);
    return ES_OK;
}

es_status es_i_cl_measure_launch(es_i_device *opaque, uint32_t grid, uint32_t n, double *ns, es_error *why)
{
    const es_i_cl_device *device = (const es_i_cl_device *)(void *)opaque;
    es_i_cl_meter m;
    const size_t local = 1, global = grid;
    es_status status = es_i_cl_meter_open(device, "es_nothing", &m, why);
    if (status != ES_OK)
        return status;
    /* The first launch of a kernel may build it. */
    int32_t code = device->cl.EnqueueNDRangeKernel(m.queue, m.kernel, 1, NULL, &global, &local, 0, NULL, NULL);
    if (code == 0)
        code = device->cl.Finish(m.queue);
    uint64_t start = es_i_now();
    for (uint32_t i = 0; i < n && code == 0; i++)
        code = device->cl.EnqueueNDRangeKernel(m.queue, m.kernel, 1, NULL, &global, &local, 0, NULL, NULL);
    int32_t waited = device->cl.Finish(m.queue);
    code = code != 0 ? code : waited;
    *ns = (double)(es_i_now() - start) / (double)n;
    es_i_cl_meter_close(device, &m);
    return code == 0 ? ES_OK : es_i_cl_fail(why, code, 0, "measuring");
}
#endif
