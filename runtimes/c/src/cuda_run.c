/* Running a graph on a CUDA device: what was captured of it is replayed, with the copies of inputs and outputs. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <string.h>

es_i_cu_result es_i_cu_spans_copy(es_i_cu_stream *stream, uint32_t g, uint32_t direction, uint8_t *slot)
{
    const es_i_cu_device *device = stream->device;
    es_i_cu_result result = ES_CU_OK;
    for (uint32_t i = 0; result == ES_CU_OK && i < device->n_spans; i++) {
        const es_i_cu_span *span = &device->spans[i];
        if (span->graph != g || span->direction != direction)
            continue;
        es_i_cu_ptr address = stream->io + span->offset;
        size_t bytes = (size_t)span->bytes;
        result = direction == 0 ? device->api.upload(address, slot + span->offset, bytes, stream->queue)
                                : device->api.download(slot + span->offset, address, bytes, stream->queue);
    }
    return result;
}

void es_i_cu_inputs_take(const es_i_cu_stream *stream, uint32_t g, const uint8_t *io, uint8_t *slot)
{
    const es_i_cu_device *device = stream->device;
    for (uint32_t i = 0; i < device->n_spans; i++) {
        const es_i_cu_span *span = &device->spans[i];
        if (span->graph == g && span->direction == 0)
            memcpy(slot + span->offset, io + span->offset, (size_t)span->bytes);
    }
}

/* Each output by itself: between those of a span may lie what the caller has put there. */
void es_i_cu_outputs_give(const es_i_cu_stream *stream, uint32_t g, uint8_t *io)
{
    const es_i_plan *plan = stream->device->plan;
    for (uint32_t i = 0; i < plan->n_io; i++)
        if (plan->io[i].graph == g && plan->io[i].direction == 1)
            memcpy(io + plan->io[i].offset, stream->pinned + plan->io[i].offset, (size_t)plan->io[i].bytes);
}

/* early: kernels wait themselves for the launch before theirs (docs/bundle-format.md), so it need not have ended. */
static es_i_cu_result es_i_cu_launch(es_i_cu_stream *stream, const es_i_launch *launch, int early)
{
    const es_i_cu_device *device = stream->device;
    if (early && __atomic_load_n(&device->early, __ATOMIC_RELAXED) && device->api.launch_early != NULL) {
        es_i_cu_attribute attribute;
        es_i_cu_config config;
        memset(&attribute, 0, sizeof attribute);
        memset(&config, 0, sizeof config);
        attribute.id = ES_CU_PROGRAMMATIC;
        attribute.value.on = 1;
        memcpy(config.grid, launch->grid, sizeof config.grid);
        memcpy(config.block, launch->block, sizeof config.block);
        config.queue = stream->queue;
        config.attributes = &attribute;
        config.n_attributes = 1;
        return device->api.launch_early(&config, device->functions[launch->kernel], stream->params + launch->first_arg,
                                        NULL);
    }
    return device->api.launch(device->functions[launch->kernel], launch->grid[0], launch->grid[1], launch->grid[2],
                              launch->block[0], launch->block[1], launch->block[2], 0, stream->queue,
                              stream->params + launch->first_arg, NULL);
}

static es_i_cu_result es_i_cu_poison(es_i_cu_stream *stream)
{
    const es_i_cu_device *device = stream->device;
    uint64_t bytes = device->plan->arena_bytes;
    if (!device->poison || bytes == 0)
        return ES_CU_OK;
    return device->api.fill(stream->arena, 0xff, (size_t)bytes, stream->queue);
}

/* Puts a graph into the queue. *begun becomes 1 when something that writes the state is in it. */
static es_i_cu_result es_i_cu_enqueue(es_i_cu_stream *stream, uint32_t g, int modes, int *begun)
{
    const es_i_cu_device *device = stream->device;
    const es_i_graph *graph = &device->plan->graphs[g];
    es_i_cu_result result = es_i_cu_poison(stream);
    if (result == ES_CU_OK && (modes & ES_CU_COPIES))
        result = es_i_cu_spans_copy(stream, g, 0, stream->pinned);
    for (uint32_t i = 0; result == ES_CU_OK && i < graph->n_launches; i++) {
        const es_i_launch *launch = &device->plan->launches[graph->first_launch + i];
        if (!(modes & ES_CU_OUTPUTS) && (launch->flags & ES_LAUNCH_OUTPUTS_ONLY))
            continue;
        result = es_i_cu_launch(stream, launch, *begun);
        if (result == ES_CU_OK)
            *begun = 1;
    }
    if (result == ES_CU_OK && (modes & ES_CU_ADVANCE) && device->advance != NULL)
        result = device->api.launch(device->advance, 1, 1, 1, 1, 1, 1, 0, stream->queue, stream->advance_params, NULL);
    if (result == ES_CU_OK && (modes & ES_CU_COPIES) && (modes & ES_CU_OUTPUTS))
        result = es_i_cu_spans_copy(stream, g, 1, stream->pinned);
    return result;
}

/* exec, or plain when the driver cannot: then the launches themselves say why. */
static void es_i_cu_capture(es_i_cu_stream *stream, es_i_cu_captured *captured, uint32_t g, int modes)
{
    const es_i_cu_api *api = &stream->device->api;
    void *graph = NULL;
    int begun = 0;
    captured->plain = 1;
    if (api->capture_begin(stream->queue, ES_CU_CAPTURE_THREAD_LOCAL) != ES_CU_OK)
        return;
    es_i_cu_result result = es_i_cu_enqueue(stream, g, modes, &begun);
    es_i_cu_result ended = api->capture_end(stream->queue, &graph);
    if (result == ES_CU_OK && ended == ES_CU_OK && graph != NULL) {
        captured->plain = api->graph_instantiate(&captured->exec, graph, 0) != ES_CU_OK;
        if (captured->plain)
            captured->exec = NULL;
    }
    if (graph != NULL)
        (void)api->graph_destroy(graph);
}

es_status es_i_cu_replay(es_i_cu_stream *stream, uint32_t index, uint32_t g, int modes, es_error *why)
{
    es_i_cu_device *device = stream->device;
    es_i_cu_captured *captured = &stream->captured[index];
    int begun = 0;
    if (captured->exec == NULL && !captured->plain)
        es_i_cu_capture(stream, captured, g, modes);
    if (captured->plain && __atomic_exchange_n(&device->early, 0, __ATOMIC_RELAXED)) /* needs CUDA 12.3 in a graph */
        es_i_cu_capture(stream, captured, g, modes);
    if (captured->exec != NULL) {
        es_i_cu_result result = device->api.graph_launch(captured->exec, stream->queue);
        es_status status = es_i_cu_check(device, result, "launching a graph", why);
        if (status == ES_OK || status == ES_E_DEVICE_LOST)
            return status;
        (void)device->api.exec_destroy(captured->exec); /* too large for this device, say */
        captured->exec = NULL;
        captured->plain = 1;
    }
    es_i_cu_result result = es_i_cu_enqueue(stream, g, modes, &begun);
    es_status status = es_i_cu_check(device, result, "launching a kernel", why);
    return begun ? es_i_cu_broken(stream, status) : status;
}

es_status es_i_cu_events_make(es_i_cu_stream *stream, es_error *why)
{
    es_i_cu_result result = ES_CU_OK;
    while (result == ES_CU_OK && stream->n_events < ES_CU_BATCH + 1) {
        result = stream->device->api.event_create(&stream->events[stream->n_events], ES_CU_EVENT_DEFAULT);
        stream->n_events += result == ES_CU_OK;
    }
    return es_i_cu_check(stream->device, result, "creating timers", why);
}

/* Nanoseconds between each two of the events 0 to n, which have passed. */
es_status es_i_cu_events_read(es_i_cu_stream *stream, uint32_t n, uint64_t *ns, es_error *why)
{
    es_i_cu_result result = ES_CU_OK;
    for (uint32_t i = 0; result == ES_CU_OK && i < n; i++) {
        float ms = 0;
        result = stream->device->api.event_elapsed(&ms, stream->events[i], stream->events[i + 1]);
        ns[i] = ms > 0 ? (uint64_t)((double)ms * 1e6 + 0.5) : 0;
    }
    return es_i_cu_check(stream->device, result, "reading timers", why);
}

/* Launches *next and those after it, at most ES_CU_BATCH, with an event after each. The spinning kernel before them
 * gives the host time to queue them all, so that what passes between two events is the device's time alone. */
static es_i_cu_result es_i_cu_batch(es_i_cu_stream *stream, const es_i_graph *graph, int outputs, uint32_t *next,
                                    uint32_t taken[ES_CU_BATCH], uint32_t *n, int *begun)
{
    const es_i_cu_device *device = stream->device;
    uint32_t left = graph->n_launches - *next;
    es_i_cu_ptr pause = 20000 + 10000 * (uint64_t)(left < ES_CU_BATCH ? left : ES_CU_BATCH); /* ns */
    void *params[] = {&pause};
    es_i_cu_result result = ES_CU_OK;
    *n = 0;
    if (device->spin != NULL)
        result = device->api.launch(device->spin, 1, 1, 1, 1, 1, 1, 0, stream->queue, params, NULL);
    if (result == ES_CU_OK)
        result = device->api.event_record(stream->events[0], stream->queue);
    for (; result == ES_CU_OK && *next < graph->n_launches && *n < ES_CU_BATCH; (*next)++) {
        const es_i_launch *launch = &device->plan->launches[graph->first_launch + *next];
        if (!outputs && (launch->flags & ES_LAUNCH_OUTPUTS_ONLY))
            continue;
        result = es_i_cu_launch(stream, launch, 0);
        if (result != ES_CU_OK)
            break;
        *begun = 1;
        taken[(*n)++] = *next;
        result = device->api.event_record(stream->events[*n], stream->queue);
    }
    return result == ES_CU_OK ? device->api.queue_wait(stream->queue) : result;
}

static es_status es_i_cu_profile(es_i_cu_stream *stream, uint32_t g, int outputs, uint64_t *ns, es_error *why)
{
    es_i_cu_device *device = stream->device;
    const es_i_graph *graph = &device->plan->graphs[g];
    uint32_t next = 0, n = 0, taken[ES_CU_BATCH];
    uint64_t passed[ES_CU_BATCH];
    int begun = 0;
    es_status status = es_i_cu_events_make(stream, why);
    if (status != ES_OK)
        return status;
    memset(ns, 0, graph->n_launches * sizeof *ns);
    es_i_cu_result result = es_i_cu_poison(stream);
    if (result == ES_CU_OK)
        result = es_i_cu_spans_copy(stream, g, 0, stream->pinned);
    status = es_i_cu_check(device, result, "copying inputs", why);
    while (status == ES_OK && next < graph->n_launches) {
        result = es_i_cu_batch(stream, graph, outputs, &next, taken, &n, &begun);
        status = es_i_cu_check(device, result, "timing launches", why);
        if (status == ES_OK)
            status = es_i_cu_events_read(stream, n, passed, why);
        for (uint32_t i = 0; status == ES_OK && i < n; i++)
            ns[taken[i]] = passed[i];
    }
    if (status == ES_OK && outputs)
        status = es_i_cu_check(device, es_i_cu_spans_copy(stream, g, 1, stream->pinned), "copying outputs", why);
    return begun ? es_i_cu_broken(stream, status) : status;
}

/* Inputs go through a ring of slots, so that chunks follow each other without waiting for the device. */
static es_status es_i_cu_run_on(es_i_cu_stream *stream, uint32_t g, const uint8_t *io, es_error *why)
{
    const es_i_cu_api *api = &stream->device->api;
    uint32_t i = 1 + stream->n_uploads++ % (ES_CU_SLOTS - 1);
    uint8_t *slot = stream->pinned + i * stream->slot_bytes;
    es_i_cu_result result = api->event_wait(stream->uploaded[i]);
    if (result == ES_CU_OK) {
        es_i_cu_inputs_take(stream, g, io, slot);
        result = es_i_cu_spans_copy(stream, g, 0, slot);
    }
    if (result == ES_CU_OK)
        result = api->event_record(stream->uploaded[i], stream->queue);
    es_status status = es_i_cu_check(stream->device, result, "copying inputs", why);
    return status == ES_OK ? es_i_cu_replay(stream, 2 * g, g, 0, why) : status;
}

static es_status es_i_cu_run_through(es_i_cu_stream *stream, uint32_t g, int outputs, uint8_t *io, uint64_t *ns,
                                     es_error *why)
{
    es_i_cu_inputs_take(stream, g, io, stream->pinned);
    es_status status = ns != NULL ? es_i_cu_profile(stream, g, outputs, ns, why)
                                  : es_i_cu_replay(stream, 2 * g + 1, g, ES_CU_OUTPUTS | ES_CU_COPIES, why);
    if (status != ES_OK)
        return status;
    es_i_cu_result result = stream->device->api.queue_wait(stream->queue);
    status = es_i_cu_broken(stream, es_i_cu_check(stream->device, result, "running a graph", why));
    if (status == ES_OK && outputs)
        es_i_cu_outputs_give(stream, g, io);
    return status;
}

es_status es_i_cu_run(es_i_stream *handle, uint32_t g, int outputs, uint8_t *io, uint64_t *ns, es_error *why)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    es_status status = es_i_cu_stream_enter(stream, why);
    if (status != ES_OK)
        return status;
    status = outputs || ns != NULL ? es_i_cu_run_through(stream, g, outputs, io, ns, why)
                                   : es_i_cu_run_on(stream, g, io, why);
    es_i_cu_leave(stream->device);
    return status;
}
#endif
