/* The CUDA backend: a model's part of it, and the table that the core calls. Only the driver's own library is used,
 * and only at run time. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ES_CU_STAGING = 16 << 20, ES_CU_SPAN_GAP = 1024 };

static int es_i_cu_span_order(const void *left, const void *right)
{
    const es_i_cu_span *a = (const es_i_cu_span *)left, *b = (const es_i_cu_span *)right;
    if (a->graph != b->graph)
        return a->graph < b->graph ? -1 : 1;
    if (a->direction != b->direction)
        return a->direction < b->direction ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

/* Neighbours within a small gap are copied together: a copy costs microseconds, a kilobyte nothing. */
static es_status es_i_cu_spans_find(es_i_cu_device *device, es_error *why)
{
    const es_i_plan *plan = device->plan;
    es_i_cu_span *spans = (es_i_cu_span *)calloc((size_t)plan->n_io + 1, sizeof *spans);
    if (spans == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u inputs and outputs", plan->n_io);
    for (uint32_t i = 0; i < plan->n_io; i++)
        spans[i] = (es_i_cu_span){plan->io[i].graph, plan->io[i].direction, plan->io[i].offset, plan->io[i].bytes};
    qsort(spans, plan->n_io, sizeof *spans, es_i_cu_span_order);
    uint32_t n = 0;
    for (uint32_t i = 0; i < plan->n_io; i++) {
        es_i_cu_span *last = n > 0 ? &spans[n - 1] : NULL;
        if (last != NULL && last->graph == spans[i].graph && last->direction == spans[i].direction &&
            spans[i].offset - (last->offset + last->bytes) <= ES_CU_SPAN_GAP)
            last->bytes = spans[i].offset + spans[i].bytes - last->offset;
        else
            spans[n++] = spans[i];
    }
    device->spans = spans;
    device->n_spans = n;
    return ES_OK;
}

/* Two halves of pinned memory in turn: one is filled from the file while the other travels. */
static es_i_cu_result es_i_cu_weights_send(es_i_cu_device *device, void *queue, uint8_t *staging, void *const events[2])
{
    const es_i_cu_api *api = &device->api;
    const uint8_t *from = device->plan->weights;
    uint64_t bytes = device->plan->weight_bytes;
    es_i_cu_result result = ES_CU_OK;
    for (uint64_t at = 0, i = 0; result == ES_CU_OK && at < bytes; at += ES_CU_STAGING, i ^= 1) {
        size_t now = bytes - at < ES_CU_STAGING ? (size_t)(bytes - at) : ES_CU_STAGING;
        uint8_t *half = staging + i * ES_CU_STAGING;
        result = api->event_wait(events[i]);
        if (result != ES_CU_OK)
            break;
        memcpy(half, from + at, now);
        result = api->upload(device->weights + at, half, now, queue);
        if (result == ES_CU_OK)
            result = api->event_record(events[i], queue);
    }
    return result == ES_CU_OK ? api->queue_wait(queue) : result;
}

static es_status es_i_cu_weights_upload(es_i_cu_device *device, es_error *why)
{
    const es_i_cu_api *api = &device->api;
    void *staging = NULL, *queue = NULL, *events[2] = {NULL, NULL};
    es_status status = es_i_cu_alloc(device, device->plan->weight_bytes, "the weights", &device->weights, why);
    if (status != ES_OK)
        return status;
    es_i_cu_result result = api->pinned_alloc(&staging, 2 * (size_t)ES_CU_STAGING);
    if (result == ES_CU_OK)
        result = api->queue_create(&queue, ES_CU_NON_BLOCKING);
    for (int i = 0; result == ES_CU_OK && i < 2; i++)
        result = api->event_create(&events[i], ES_CU_EVENT_NO_TIMING);
    if (result == ES_CU_OK)
        result = es_i_cu_weights_send(device, queue, (uint8_t *)staging, events);
    status = es_i_cu_check(device, result, "uploading the weights", why);
    if (queue != NULL)
        (void)api->queue_wait(queue);
    for (int i = 0; i < 2; i++)
        if (events[i] != NULL)
            (void)api->event_destroy(events[i]);
    if (queue != NULL)
        (void)api->queue_destroy(queue);
    if (staging != NULL)
        (void)api->pinned_free(staging);
    return status;
}

/* With the context entered, or without one on the thread: a lost device refuses, which frees as well. */
static void es_i_cu_device_free(es_i_cu_device *device)
{
    if (device->weights != 0)
        (void)device->api.memory_free(device->weights);
    if (device->module != NULL)
        (void)device->api.module_unload(device->module);
    if (device->helpers != NULL)
        (void)device->api.module_unload(device->helpers);
    free(device->functions);
    free(device->spans);
}

static es_status es_i_cu_device_fill(es_i_cu_device *device, es_error *why)
{
    device->functions = (void **)calloc((size_t)device->plan->n_kernels + 1, sizeof *device->functions);
    if (device->functions == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u kernels", device->plan->n_kernels);
    es_status status = es_i_cu_spans_find(device, why);
    if (status == ES_OK)
        status = es_i_cu_kernels_load(device, why);
    if (status == ES_OK) {
        es_i_cu_helpers_load(device);
        status = es_i_cu_weights_upload(device, why);
    }
    return status;
}

static es_status es_i_cu_open(const es_i_plan *plan, const char *path, const es_options *options, es_i_device **device,
                              es_error *why)
{
    (void)path; /* the driver keeps what it compiles from PTX in a cache of its own */
    *device = NULL;
    es_i_cu_device *made = (es_i_cu_device *)calloc(1, sizeof *made);
    if (made == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a device");
    made->plan = plan;
    made->poison = options != NULL && (options->flags & ES_POISON) != 0;
    es_status status = es_i_cu_driver_open(made, why);
    if (status == ES_OK)
        status = es_i_cu_enter(made, why);
    if (status == ES_OK) {
        status = es_i_cu_device_fill(made, why);
        if (status != ES_OK)
            es_i_cu_device_free(made);
        es_i_cu_leave(made);
    }
    if (status != ES_OK) {
        es_i_cu_driver_close(made);
        free(made);
        return status;
    }
    *device = (es_i_device *)(void *)made;
    return ES_OK;
}

static void es_i_cu_close(es_i_device *handle)
{
    es_i_cu_device *device = (es_i_cu_device *)(void *)handle;
    if (device == NULL)
        return;
    int entered = device->api.context_push(device->context) == ES_CU_OK;
    es_i_cu_device_free(device);
    if (entered)
        es_i_cu_leave(device);
    es_i_cu_driver_close(device);
    free(device);
}

/* After a failure its words too: most calls of the interface return no sentence. */
static es_status es_i_cu_describe(const es_i_device *handle, char *text, size_t capacity)
{
    es_i_cu_device *device = (es_i_cu_device *)(uintptr_t)handle;
    size_t bytes = 0;
    if (text == NULL || capacity == 0)
        return ES_E_ROOM;
    if (device->api.device_memory(&bytes, device->id) != ES_CU_OK)
        bytes = 0;
    int n =
        snprintf(text, capacity, "CUDA, %s, sm_%d%d, %.1f GiB, driver for CUDA %d.%d", device->name, device->major,
                 device->minor, (double)bytes / (double)(1u << 30), device->driver / 1000, device->driver % 1000 / 10);
    if (n < 0 || (size_t)n >= capacity || __atomic_exchange_n(&device->noting, 1, __ATOMIC_ACQUIRE))
        return ES_OK;
    if (device->failed[0] != '\0')
        (void)snprintf(text + n, capacity - (size_t)n, "; failed: %s", device->failed);
    __atomic_store_n(&device->noting, 0, __ATOMIC_RELEASE);
    return ES_OK;
}

const es_i_backend es_i_cuda = {
    .name = "CUDA",
    .id = ES_BACKEND_CUDA,
    .open = es_i_cu_open,
    .close = es_i_cu_close,
    .describe = es_i_cu_describe,
    .stream_open = es_i_cu_stream_open,
    .stream_close = es_i_cu_stream_close,
    .reset = es_i_cu_reset,
    .run = es_i_cu_run,
    .greedy = es_i_cu_greedy,
    .read = es_i_cu_read,
    .write = es_i_cu_write,
    .copy = es_i_cu_copy,
    .measure_read = es_i_cu_measure_read,
    .measure_launch = es_i_cu_measure_launch,
};
#endif
