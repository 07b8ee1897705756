/* Greedy steps without a round trip. The captured step ends with a kernel of one thread that makes the chosen token the
 * next input, counts the position and notes the token: one launch per step for the host, and nothing on the device that
 * waits for a copy engine (a copy node costs microseconds where a kernel node costs one). Where the driver cannot
 * compile that kernel, three small copies between the steps do the same. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <string.h>

static size_t es_i_cu_width(const es_i_io *io)
{
    return io->dtype == ES_INT64 ? sizeof(int64_t) : sizeof(int32_t);
}

/* Little-endian: the low bytes of an int64 are the int32. */
static void es_i_cu_number_put(uint8_t *to, const es_i_io *io, uint64_t value)
{
    memcpy(to, &value, es_i_cu_width(io));
}

static uint8_t *es_i_cu_pinned_control(const es_i_cu_stream *stream)
{
    return stream->pinned + ES_CU_SLOTS * stream->slot_bytes;
}

/* What the helper does, by copies: `i` counts within the batch, `position` is the next step's. */
static es_i_cu_result es_i_cu_advance_by_copies(es_i_cu_stream *stream, uint32_t i, uint64_t position)
{
    const es_i_cu_api *api = &stream->device->api;
    const es_i_roles *roles = &stream->device->plan->roles[0];
    const es_i_cu_ptr next = stream->advance_args[0], tokens = stream->advance_args[1];
    size_t width = es_i_cu_width(roles->tokens);
    es_i_cu_result result = api->move(stream->control + ES_CU_CHOSEN_AT + i * width, next, width, stream->queue);
    if (result == ES_CU_OK)
        result = api->move(tokens, next, width, stream->queue);
    if (result == ES_CU_OK && roles->position != NULL) {
        uint8_t *place = es_i_cu_pinned_control(stream) + ES_CU_CONTROL_BYTES + 8 * (size_t)i;
        es_i_cu_number_put(place, roles->position, position);
        result = api->upload(stream->advance_args[2], place, es_i_cu_width(roles->position), stream->queue);
    }
    return result;
}

static es_status es_i_cu_greedy_begin(es_i_cu_stream *stream, int64_t first, uint64_t position, const uint8_t *io,
                                      es_error *why)
{
    const es_i_roles *roles = &stream->device->plan->roles[0];
    es_i_cu_inputs_take(stream, 0, io, stream->pinned);
    es_i_cu_number_put(stream->pinned + roles->tokens->offset, roles->tokens, (uint64_t)first);
    if (roles->position != NULL)
        es_i_cu_number_put(stream->pinned + roles->position->offset, roles->position, position);
    return es_i_cu_check(stream->device, es_i_cu_spans_copy(stream, 0, 0, stream->pinned), "copying inputs", why);
}

/* n <= ES_CU_BATCH steps; their chosen tokens are in the pinned control block afterwards. */
static es_status es_i_cu_greedy_batch(es_i_cu_stream *stream, uint64_t position, uint32_t n, int last, uint64_t *ns,
                                      es_error *why)
{
    es_i_cu_device *device = stream->device;
    const es_i_cu_api *api = &device->api;
    uint32_t index = 2 * device->plan->n_graphs;
    es_i_cu_result result = api->fill(stream->control, 0, ES_CU_CHOSEN_AT, stream->queue);
    if (result == ES_CU_OK && ns != NULL)
        result = api->event_record(stream->events[0], stream->queue);
    for (uint32_t i = 0; result == ES_CU_OK && i < n; i++) {
        es_status status = es_i_cu_replay(stream, index, 0, ES_CU_OUTPUTS | ES_CU_ADVANCE, why);
        if (status != ES_OK)
            return status;
        if (device->advance == NULL)
            result = es_i_cu_advance_by_copies(stream, i, position + i + 1);
        if (result == ES_CU_OK && ns != NULL)
            result = api->event_record(stream->events[i + 1], stream->queue);
    }
    if (result == ES_CU_OK && last)
        result = es_i_cu_spans_copy(stream, 0, 1, stream->pinned);
    if (result == ES_CU_OK)
        result = api->download(es_i_cu_pinned_control(stream), stream->control, ES_CU_CONTROL_BYTES, stream->queue);
    if (result == ES_CU_OK)
        result = api->queue_wait(stream->queue);
    es_status status = es_i_cu_check(device, result, "running greedy steps", why);
    return status == ES_OK && ns != NULL ? es_i_cu_events_read(stream, n, ns, why) : status;
}

static int32_t es_i_cu_chosen(const es_i_cu_stream *stream, uint32_t i)
{
    const es_i_io *io = stream->device->plan->roles[0].tokens;
    int32_t token;
    memcpy(&token, es_i_cu_pinned_control(stream) + ES_CU_CHOSEN_AT + i * es_i_cu_width(io), sizeof token);
    return token;
}

static es_status es_i_cu_greedy_run(es_i_cu_stream *stream, int64_t first, uint64_t position, size_t n, int32_t *tokens,
                                    uint64_t *ns, uint8_t *io, es_error *why)
{
    es_status status = ns != NULL ? es_i_cu_events_make(stream, why) : ES_OK;
    if (status == ES_OK)
        status = es_i_cu_greedy_begin(stream, first, position, io, why);
    if (status != ES_OK)
        return status;
    tokens[0] = (int32_t)first;
    for (size_t done = 0; done < n;) {
        uint32_t now = n - done < ES_CU_BATCH ? (uint32_t)(n - done) : ES_CU_BATCH;
        status =
            es_i_cu_greedy_batch(stream, position + done, now, done + now == n, ns != NULL ? ns + done : NULL, why);
        if (status != ES_OK) /* some steps are taken */
            return es_i_cu_broken(stream, status);
        for (uint32_t i = 0; i < now && done + i + 1 < n; i++)
            tokens[done + i + 1] = es_i_cu_chosen(stream, i);
        done += now;
    }
    es_i_cu_outputs_give(stream, 0, io);
    return ES_OK;
}

es_status es_i_cu_greedy(es_i_stream *handle, int64_t first, uint64_t position, size_t n, int32_t *tokens, uint64_t *ns,
                         uint8_t *io, es_error *why)
{
    es_i_cu_stream *stream = (es_i_cu_stream *)(void *)handle;
    const es_i_roles *roles = &stream->device->plan->roles[0];
    if (roles->tokens == NULL || roles->next == NULL || n < 1)
        return es_i_fail(why, ES_E_NO_TOKENS, "the plan does not choose its next token itself");
    es_status status = es_i_cu_stream_enter(stream, why);
    if (status != ES_OK)
        return status;
    status = es_i_cu_greedy_run(stream, first, position, n, tokens, ns, io, why);
    es_i_cu_leave(stream->device);
    return status;
}
#endif
