/* One session's memory on a CUDA device: a queue, the blocks of the plan, pinned copies of the io block. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <stdlib.h>
#include <string.h>

es_status es_i_cu_stream_enter(es_i_cu_stream *stream, es_error *why)
{
    if (stream->lost)
        return es_i_fail(why, ES_E_DEVICE_LOST, "CUDA: an earlier call failed halfway: create the session again");
    return es_i_cu_enter(stream->device, why);
}

es_status es_i_cu_broken(es_i_cu_stream *stream, es_status status)
{
    if (status == ES_OK)
        return ES_OK;
    stream->lost = 1;
    return ES_E_DEVICE_LOST;
}

/* One slot at its initial value: a few elements from here, then the slot doubles itself. */
static es_i_cu_result es_i_cu_slot_fill(es_i_cu_stream *stream, const es_i_slot *slot)
{
    const es_i_cu_api *api = &stream->device->api;
    uint64_t size = es_i_dtype_bytes(slot->dtype), element = es_i_state_element(slot);
    uint8_t start[1024];
    if (element == 0)
        return ES_CU_OK;
    for (size_t at = 0; at < sizeof start; at += (size_t)size)
        memcpy(start + at, &element, (size_t)size);
    uint64_t done = slot->bytes < sizeof start ? slot->bytes : sizeof start;
    es_i_cu_ptr to = stream->state + slot->offset;
    es_i_cu_result result = api->upload(to, start, (size_t)done, stream->queue);
    while (result == ES_CU_OK && done < slot->bytes) {
        uint64_t more = done < slot->bytes - done ? done : slot->bytes - done;
        result = api->move(to + done, to, (size_t)more, stream->queue);
        done += more;
    }
    return result;
}

static es_i_cu_result es_i_cu_state_fill(es_i_cu_stream *stream)
{
    const es_i_cu_api *api = &stream->device->api;
    const es_i_plan *plan = stream->device->plan;
    es_i_cu_result result = ES_CU_OK;
    if (plan->header->state_bytes > 0)
        result = api->fill(stream->state, 0, (size_t)plan->header->state_bytes, stream->queue);
    for (uint32_t i = 0; result == ES_CU_OK && i < plan->n_slots; i++)
        result = es_i_cu_slot_fill(stream, &plan->slots[i]);
    return result == ES_CU_OK ? api->queue_wait(stream->queue) : result;
}

static es_status es_i_cu_blocks_make(es_i_cu_stream *stream, es_error *why)
{
    es_i_cu_device *device = stream->device;
    const es_i_plan *plan = device->plan;
    const es_i_cu_api *api = &device->api;
    es_status status = es_i_cu_alloc(device, plan->header->state_bytes, "a session's states", &stream->state, why);
    if (status == ES_OK)
        status = es_i_cu_alloc(device, plan->header->io_bytes, "a session's inputs and outputs", &stream->io, why);
    if (status == ES_OK)
        status = es_i_cu_alloc(device, plan->arena_bytes, "a session's activations", &stream->arena, why);
    if (status == ES_OK)
        status = es_i_cu_alloc(device, ES_CU_CONTROL_BYTES, "a session's tokens", &stream->control, why);
    if (status != ES_OK)
        return status;
    es_i_cu_result result = api->fill(stream->control, 0, ES_CU_CONTROL_BYTES, stream->queue);
    if (result == ES_CU_OK && plan->header->io_bytes > 0)
        result = api->fill(stream->io, 0, (size_t)plan->header->io_bytes, stream->queue);
    if (result == ES_CU_OK && plan->arena_bytes > 0)
        result = api->fill(stream->arena, 0, (size_t)plan->arena_bytes, stream->queue);
    if (result == ES_CU_OK)
        result = es_i_cu_state_fill(stream);
    return es_i_cu_check(device, result, "clearing a session's memory", why);
}

static void es_i_cu_args_resolve(es_i_cu_stream *stream)
{
    const es_i_plan *plan = stream->device->plan;
    const es_i_cu_ptr base[ES_N_SPACES] = {stream->device->weights, stream->arena, stream->state, stream->io};
    for (uint32_t i = 0; i < plan->n_args; i++) {
        stream->args[i] = base[plan->args[i].space] + plan->args[i].offset;
        stream->params[i] = &stream->args[i];
    }
}

/* The helper's arguments: next, tokens, position (or 0), control, widths (1: tokens, 2: position is 64-bit). */
static void es_i_cu_advance_resolve(es_i_cu_stream *stream)
{
    const es_i_roles *roles = &stream->device->plan->roles[0];
    if (roles->tokens == NULL || roles->next == NULL)
        return;
    stream->advance_args[0] = stream->io + roles->next->offset;
    stream->advance_args[1] = stream->io + roles->tokens->offset;
    stream->advance_args[2] = roles->position != NULL ? stream->io + roles->position->offset : 0;
    stream->advance_args[3] = stream->control;
    stream->advance_args[4] = (roles->tokens->dtype == ES_INT64 ? 1u : 0u) |
                              (roles->position != NULL && roles->position->dtype == ES_INT64 ? 2u : 0u);
    for (int i = 0; i < 5; i++)
        stream->advance_params[i] = &stream->advance_args[i];
}

static es_status es_i_cu_host_make(es_i_cu_stream *stream, es_error *why)
{
    es_i_cu_device *device = stream->device;
    const es_i_plan *plan = device->plan;
    uint64_t io = plan->header->io_bytes, most = (SIZE_MAX >> 4) / ES_CU_SLOTS;
    void *pinned = NULL;
    if (io > most)
        return es_i_fail(why, ES_E_HEAP, "no memory for %llu bytes of inputs and outputs", (unsigned long long)io);
    stream->slot_bytes = (io + ES_LINE - 1) / ES_LINE * ES_LINE;
    stream->args = (es_i_cu_ptr *)calloc((size_t)plan->n_args + 1, sizeof *stream->args);
    stream->params = (void **)calloc((size_t)plan->n_args + 1, sizeof *stream->params);
    stream->captured = (es_i_cu_captured *)calloc(2 * (size_t)plan->n_graphs + 1, sizeof *stream->captured);
    if (stream->args == NULL || stream->params == NULL || stream->captured == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u arguments", plan->n_args);
    uint64_t bytes = ES_CU_SLOTS * stream->slot_bytes + ES_CU_CONTROL_BYTES + 8 * ES_CU_BATCH;
    es_i_cu_result result = device->api.pinned_alloc(&pinned, (size_t)bytes);
    if (result == ES_CU_NO_MEMORY)
        return es_i_fail(why, ES_E_HEAP, "no %llu bytes of host memory that CUDA can pin", (unsigned long long)bytes);
    if (result == ES_CU_OK) {
        stream->pinned = (uint8_t *)pinned;
        memset(pinned, 0, (size_t)bytes);
        result = device->api.queue_create(&stream->queue, ES_CU_NON_BLOCKING);
    }
    for (int i = 0; result == ES_CU_OK && i < ES_CU_SLOTS; i++)
        result = device->api.event_create(&stream->uploaded[i], ES_CU_EVENT_NO_TIMING);
    return es_i_cu_check(device, result, "creating a stream", why);
}

/* What was made, in the reverse order; a lost device refuses all of it, which frees it as well. */
static void es_i_cu_stream_free(es_i_cu_stream *stream)
{
    const es_i_cu_api *api = &stream->device->api;
    if (stream->queue != NULL)
        (void)api->queue_wait(stream->queue);
    for (uint32_t i = 0; stream->captured != NULL && i < 2 * stream->device->plan->n_graphs + 1; i++)
        if (stream->captured[i].exec != NULL)
            (void)api->exec_destroy(stream->captured[i].exec);
    for (uint32_t i = 0; i < stream->n_events; i++)
        (void)api->event_destroy(stream->events[i]);
    for (int i = 0; i < ES_CU_SLOTS; i++)
        if (stream->uploaded[i] != NULL)
            (void)api->event_destroy(stream->uploaded[i]);
    const es_i_cu_ptr blocks[] = {stream->state, stream->io, stream->arena, stream->control};
    for (size_t i = 0; i < sizeof blocks / sizeof blocks[0]; i++)
        if (blocks[i] != 0)
            (void)api->memory_free(blocks[i]);
    if (stream->queue != NULL)
        (void)api->queue_destroy(stream->queue);
    if (stream->pinned != NULL)
        (void)api->pinned_free(stream->pinned);
    free(stream->args);
    free(stream->params);
    free(stream->captured);
    free(stream);
}

es_status es_i_cu_stream_open(es_i_device *handle, es_i_stream **stream, es_error *why)
{
    es_i_cu_device *device = (es_i_cu_device *)(void *)handle;
    *stream = NULL;
    es_i_cu_stream *made = (es_i_cu_stream *)calloc(1, sizeof *made);
    if (made == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a session");
    made->device = device;
    es_status status = es_i_cu_enter(device, why);
    if (status != ES_OK) {
        free(made);
        return status;
    }
    status = es_i_cu_host_make(made, why);
    if (status == ES_OK)
        status = es_i_cu_blocks_make(made, why);
    if (status == ES_OK) {
        es_i_cu_args_resolve(made);
        es_i_cu_advance_resolve(made);
        *stream = (es_i_stream *)(void *)made;
    } else {
        es_i_cu_stream_free(made);
    }
    es_i_cu_leave(device);
    return status;
}

void es_i_cu_stream_close(es_i_stream *handle)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    if (stream == NULL)
        return;
    es_i_cu_device *device = stream->device;
    int entered = device->api.context_push(device->context) == ES_CU_OK;
    es_i_cu_stream_free(stream);
    if (entered)
        es_i_cu_leave(device);
}

es_status es_i_cu_reset(es_i_stream *handle, es_error *why)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    es_status status = es_i_cu_stream_enter(stream, why);
    if (status != ES_OK)
        return status;
    status = es_i_cu_check(stream->device, es_i_cu_state_fill(stream), "resetting the state", why);
    es_i_cu_leave(stream->device);
    return es_i_cu_broken(stream, status);
}

es_status es_i_cu_read(es_i_stream *handle, uint32_t space, uint64_t offset, void *to, uint64_t bytes, es_error *why)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    const es_i_cu_api *api = &stream->device->api;
    es_status status = es_i_cu_stream_enter(stream, why);
    if (status != ES_OK)
        return status;
    es_i_cu_ptr from = (space == ES_SPACE_STATE ? stream->state : stream->io) + offset;
    es_i_cu_result result = bytes > 0 ? api->download(to, from, (size_t)bytes, stream->queue) : ES_CU_OK;
    if (result == ES_CU_OK)
        result = api->queue_wait(stream->queue);
    status = es_i_cu_check(stream->device, result, "reading a session's memory", why);
    es_i_cu_leave(stream->device);
    return status;
}

es_status es_i_cu_write(es_i_stream *handle, uint32_t space, uint64_t offset, const void *from, uint64_t bytes,
                        es_error *why)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    const es_i_cu_api *api = &stream->device->api;
    es_status status = es_i_cu_stream_enter(stream, why);
    if (status != ES_OK)
        return status;
    es_i_cu_ptr to = (space == ES_SPACE_STATE ? stream->state : stream->io) + offset;
    es_i_cu_result result = bytes > 0 ? api->upload(to, from, (size_t)bytes, stream->queue) : ES_CU_OK;
    int begun = result == ES_CU_OK && bytes > 0;
    if (result == ES_CU_OK)
        result = api->queue_wait(stream->queue);
    status = es_i_cu_check(stream->device, result, "writing a session's memory", why);
    es_i_cu_leave(stream->device);
    return begun ? es_i_cu_broken(stream, status) : status;
}

es_status es_i_cu_copy(es_i_stream *to, es_i_stream *from, es_error *why)
{
    es_i_cu_stream *target = (es_i_cu_stream *)(void *)to, *source = (es_i_cu_stream *)(void *)from;
    es_i_cu_device *device = target->device;
    const es_i_header *header = device->plan->header;
    if (target == source)
        return ES_OK;
    if (source->lost)
        return es_i_fail(why, ES_E_DEVICE_LOST, "CUDA: the session to copy failed halfway in an earlier call");
    es_status status = es_i_cu_stream_enter(target, why);
    if (status != ES_OK)
        return status;
    es_i_cu_result result = device->api.queue_wait(source->queue);
    int begun = result == ES_CU_OK;
    if (result == ES_CU_OK && header->state_bytes > 0)
        result = device->api.move(target->state, source->state, (size_t)header->state_bytes, target->queue);
    if (result == ES_CU_OK && header->io_bytes > 0)
        result = device->api.move(target->io, source->io, (size_t)header->io_bytes, target->queue);
    if (result == ES_CU_OK)
        result = device->api.queue_wait(target->queue);
    status = es_i_cu_check(device, result, "copying a session", why);
    es_i_cu_leave(device);
    return begun ? es_i_cu_broken(target, status) : status;
}
#endif
