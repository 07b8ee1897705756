/* Running graphs: inputs, launches and outputs into one in-order queue; the host waits once, at the end. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <string.h>

/* The queue that takes times; made when first wanted, since a driver may be slower with it. */
static es_i_cl_queue es_i_cl_timed(es_i_cl_stream *s, int32_t *code)
{
    if (s->timed == NULL)
        s->timed = s->device->cl.CreateCommandQueue(s->device->context, s->device->id, ES_CL_QUEUE_PROFILING, code);
    if (s->timed != NULL)
        *code = s->device->cl.Finish(s->queue);
    return s->timed;
}

/* Host copies of the inputs, so that the caller may change them: a slot is used again when its copy is over. */
static int32_t es_i_cl_stage(es_i_cl_stream *s, uint8_t **slot, es_i_cl_event **event)
{
    uint32_t i = s->next_slot;
    int32_t code = 0;
    s->next_slot = (i + 1) % ES_CL_SLOTS;
    *slot = s->slots + i * s->device->input_bytes;
    *event = &s->slot[i];
    if (s->slot[i] != NULL) {
        code = s->device->cl.WaitForEvents(1, &s->slot[i]);
        s->device->cl.ReleaseEvent(s->slot[i]);
        s->slot[i] = NULL;
    }
    return code;
}

/* staged: by way of a slot; else straight from io, and the caller waits before it returns. */
static int32_t es_i_cl_upload(es_i_cl_stream *s, es_i_cl_queue queue, uint32_t g, const uint8_t *io, int staged)
{
    const es_i_cl_device *device = s->device;
    uint32_t first = device->first_span[2 * g], end = device->first_span[2 * g + 1];
    uint8_t *slot = NULL;
    es_i_cl_event *event = NULL;
    int32_t code = staged && end > first ? es_i_cl_stage(s, &slot, &event) : 0;
    for (uint32_t i = first; i < end && code == 0; i++) {
        const es_i_cl_span *span = &device->spans[i];
        const uint8_t *from = io + span->offset;
        if (staged) {
            memcpy(slot, from, (size_t)span->bytes);
            from = slot;
            slot += span->bytes;
        }
        code = device->cl.EnqueueWriteBuffer(queue, s->space[ES_SPACE_IO], 0, (size_t)span->offset, (size_t)span->bytes,
                                             from, 0, NULL, i + 1 == end ? event : NULL);
    }
    return code;
}

static int32_t es_i_cl_download(es_i_cl_stream *s, es_i_cl_queue queue, uint32_t g, uint8_t *io)
{
    const es_i_cl_device *device = s->device;
    int32_t code = 0;
    for (uint32_t i = device->first_span[2 * g + 1]; i < device->first_span[2 * g + 2] && code == 0; i++)
        code =
            device->cl.EnqueueReadBuffer(queue, s->space[ES_SPACE_IO], 0, (size_t)device->spans[i].offset,
                                         (size_t)device->spans[i].bytes, io + device->spans[i].offset, 0, NULL, NULL);
    return code;
}

static int32_t es_i_cl_launches(es_i_cl_stream *s, es_i_cl_queue queue, uint32_t g, int outputs, es_i_cl_event *events)
{
    const es_i_plan *plan = s->device->plan;
    const es_i_graph *graph = &plan->graphs[g];
    int32_t code = 0;
    if (s->device->poison)
        code = es_i_cl_fill(s->device, queue, s->space[ES_SPACE_ARENA], plan->arena_bytes, 0xff);
    for (uint32_t i = 0; i < graph->n_launches && code == 0; i++) {
        const es_i_launch *launch = &plan->launches[graph->first_launch + i];
        size_t local[3], global[3];
        uint32_t rank = 1;
        if (!outputs && (launch->flags & ES_LAUNCH_OUTPUTS_ONLY))
            continue;
        for (uint32_t d = 0; d < 3; d++) {
            local[d] = launch->block[d];
            global[d] = (size_t)launch->grid[d] * launch->block[d];
            rank = global[d] > 1 ? d + 1 : rank;
        }
        code = s->device->cl.EnqueueNDRangeKernel(queue, s->kernels[graph->first_launch + i], rank, NULL, global, local,
                                                  0, NULL, events != NULL ? &events[i] : NULL);
    }
    return code;
}

/* Nanoseconds of the launches that ran, and their events gone. */
static int32_t es_i_cl_times(es_i_cl_stream *s, uint32_t n, uint64_t *ns)
{
    const es_i_cl_api *cl = &s->device->cl;
    int32_t code = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t start = 0, end = 0;
        ns[i] = 0;
        if (s->events[i] == NULL)
            continue;
        if (code == 0)
            code = cl->GetEventProfilingInfo(s->events[i], ES_CL_PROFILING_START, sizeof start, &start, NULL);
        if (code == 0)
            code = cl->GetEventProfilingInfo(s->events[i], ES_CL_PROFILING_END, sizeof end, &end, NULL);
        cl->ReleaseEvent(s->events[i]);
        s->events[i] = NULL;
        ns[i] = end > start ? end - start : 0;
    }
    return code;
}

/* What a failure during a run means: the state may be half written, so the stream is lost. */
static es_status es_i_cl_broken(es_i_cl_stream *s, int32_t code, es_error *why)
{
    (void)s->device->cl.Finish(s->queue); /* nothing may still read or write the host's io */
    if (s->timed != NULL)
        (void)s->device->cl.Finish(s->timed);
    s->lost = 1;
    return es_i_cl_fail(why, code, 0, "running a graph");
}

es_status es_i_cl_run(es_i_stream *stream, uint32_t g, int outputs, uint8_t *io, uint64_t *ns, es_error *why)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    const es_i_cl_api *cl = &s->device->cl;
    int32_t code = 0;
    if (s->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    es_i_cl_queue queue = ns != NULL ? es_i_cl_timed(s, &code) : s->queue;
    if (code != 0)
        return es_i_cl_fail(why, code, 0, "no queue with times");
    int waits = outputs || ns != NULL;
    code = es_i_cl_upload(s, queue, g, io, !waits);
    if (code == 0)
        code = es_i_cl_launches(s, queue, g, outputs, ns != NULL ? s->events : NULL);
    if (code == 0 && outputs)
        code = es_i_cl_download(s, queue, g, io);
    if (code == 0)
        code = waits ? cl->Finish(queue) : cl->Flush(queue);
    if (ns != NULL) {
        int32_t timed = es_i_cl_times(s, s->device->plan->graphs[g].n_launches, ns);
        code = code != 0 ? code : timed;
    }
    return code == 0 ? ES_OK : es_i_cl_broken(s, code, why);
}

static void es_i_cl_integer(uint8_t *to, const es_i_io *io, int64_t value)
{
    memcpy(to, &value, io->dtype == ES_INT64 ? 8 : 4); /* little-endian */
}

/* One step of a batch: its position and token from where they lie on the device, and the next token kept. */
static int32_t es_i_cl_step(es_i_cl_stream *s, uint32_t i, int first)
{
    const es_i_cl_api *cl = &s->device->cl;
    const es_i_roles *roles = &s->device->plan->roles[0];
    es_i_cl_mem io = s->space[ES_SPACE_IO];
    const size_t log = (ES_CL_BATCH + (size_t)i) * sizeof(int64_t), bytes = (size_t)roles->next->bytes;
    int32_t code = 0;
    if (roles->position != NULL)
        code = cl->EnqueueCopyBuffer(s->queue, s->steps, io, i * sizeof(int64_t), (size_t)roles->position->offset,
                                     (size_t)roles->position->bytes, 0, NULL, NULL);
    if (code == 0 && !first)
        code = cl->EnqueueCopyBuffer(s->queue, io, io, (size_t)roles->next->offset, (size_t)roles->tokens->offset,
                                     bytes, 0, NULL, NULL);
    if (code == 0)
        code = es_i_cl_launches(s, s->queue, 0, 1, NULL);
    if (code == 0)
        code = cl->EnqueueCopyBuffer(s->queue, io, s->steps, (size_t)roles->next->offset, log, bytes, 0, NULL, NULL);
    return code;
}

/* A batch of n <= ES_CL_BATCH steps; log receives their next tokens. */
static int32_t es_i_cl_batch(es_i_cl_stream *s, uint64_t position, uint32_t n, int first, int last, uint8_t *io)
{
    const es_i_cl_api *cl = &s->device->cl;
    const size_t half = ES_CL_BATCH * sizeof(int64_t);
    for (uint32_t i = 0; i < n; i++)
        s->batch[i] = (int64_t)(position + i);
    int32_t code = cl->EnqueueWriteBuffer(s->queue, s->steps, 0, 0, half, s->batch, 0, NULL, NULL);
    for (uint32_t i = 0; i < n && code == 0; i++)
        code = es_i_cl_step(s, i, first && i == 0);
    if (code == 0)
        code = cl->EnqueueReadBuffer(s->queue, s->steps, 0, half, half, s->batch + ES_CL_BATCH, 0, NULL, NULL);
    if (code == 0 && last)
        code = es_i_cl_download(s, s->queue, 0, io);
    return code == 0 ? cl->Finish(s->queue) : code;
}

/* A batch is waited for, so that tokens and times come in portions: a step's time is its batch's mean. */
es_status es_i_cl_greedy(es_i_stream *stream, int64_t first, uint64_t position, size_t n, int32_t *tokens, uint64_t *ns,
                         uint8_t *io, es_error *why)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    const es_i_roles *roles = &s->device->plan->roles[0];
    int32_t code = 0;
    if (s->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    es_i_cl_integer(io + roles->tokens->offset, roles->tokens, first);
    code = es_i_cl_upload(s, s->queue, 0, io, 0);
    tokens[0] = (int32_t)first;
    for (size_t done = 0; done < n && code == 0; done += ES_CL_BATCH) {
        uint32_t k = n - done < ES_CL_BATCH ? (uint32_t)(n - done) : ES_CL_BATCH;
        uint64_t start = es_i_now();
        code = es_i_cl_batch(s, position + done, k, done == 0, done + k == n, io);
        uint64_t each = (es_i_now() - start) / k;
        for (uint32_t i = 0; i < k && code == 0; i++) {
            int64_t next = 0;
            memcpy(&next, s->batch + ES_CL_BATCH + i, (size_t)roles->next->bytes);
            if (done + i + 1 < n)
                tokens[done + i + 1] = next >= 0 && next <= INT32_MAX ? (int32_t)next : -1;
            if (ns != NULL)
                ns[done + i] = each;
        }
    }
    return code == 0 ? ES_OK : es_i_cl_broken(s, code, why);
}
#endif
