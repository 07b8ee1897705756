/* A session on the device: its memory, its kernels with their arguments set once, and moving its blocks. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <stdlib.h>
#include <string.h>

static const es_i_cl_piece *es_i_cl_piece_of(const es_i_cl_device *device, uint64_t offset)
{
    uint32_t low = 0, high = device->n_pieces;
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (device->pieces[middle].offset <= offset)
            low = middle;
        else
            high = middle;
    }
    return &device->pieces[low];
}

/* Two arguments per argument of the plan: the memory and the offset in it. */
static int32_t es_i_cl_args_set(const es_i_cl_stream *s, const es_i_launch *launch, es_i_cl_kernel kernel)
{
    const es_i_cl_api *cl = &s->device->cl;
    int32_t code = 0;
    for (uint32_t i = 0; i < launch->n_args && code == 0; i++) {
        const es_i_arg *arg = &s->device->plan->args[launch->first_arg + i];
        es_i_cl_mem mem = s->space[arg->space];
        uint64_t offset = arg->offset;
        if (arg->space == ES_SPACE_WEIGHTS) {
            const es_i_cl_piece *piece = es_i_cl_piece_of(s->device, offset);
            mem = piece->mem;
            offset -= piece->offset;
        }
        code = cl->SetKernelArg(kernel, 2 * i, sizeof mem, &mem);
        if (code == 0)
            code = cl->SetKernelArg(kernel, 2 * i + 1, sizeof offset, &offset);
    }
    return code;
}

static es_status es_i_cl_kernels_open(es_i_cl_stream *s, es_error *why)
{
    const es_i_plan *plan = s->device->plan;
    for (uint32_t i = 0; i < plan->n_launches; i++) {
        const es_i_launch *launch = &plan->launches[i];
        int32_t code = 0;
        s->kernels[i] =
            s->device->cl.CreateKernel(s->device->program, plan->strings + plan->kernels[launch->kernel].name, &code);
        if (s->kernels[i] != NULL)
            code = es_i_cl_args_set(s, launch, s->kernels[i]);
        if (code != 0)
            return es_i_cl_fail(why, code, 1, plan->strings + plan->kernels[launch->kernel].name);
    }
    return ES_OK;
}

static es_status es_i_cl_blocks_open(es_i_cl_stream *s, es_error *why)
{
    es_i_cl_device *device = s->device;
    const es_i_plan *plan = device->plan;
    int32_t code = 0;
    s->queue = device->cl.CreateCommandQueue(device->context, device->id, 0, &code);
    if (s->queue == NULL)
        return es_i_cl_fail(why, code, 1, "no queue for a session");
    es_status status = es_i_cl_buffer(device, plan->arena_bytes, "scratch", &s->space[ES_SPACE_ARENA], why);
    if (status == ES_OK)
        status = es_i_cl_buffer(device, plan->header->state_bytes, "the state", &s->space[ES_SPACE_STATE], why);
    if (status == ES_OK)
        status = es_i_cl_buffer(device, plan->header->io_bytes, "inputs and outputs", &s->space[ES_SPACE_IO], why);
    if (status == ES_OK && plan->roles[0].next != NULL)
        status = es_i_cl_buffer(device, 2 * ES_CL_BATCH * sizeof(int64_t), "positions", &s->steps, why);
    if (status != ES_OK)
        return status;
    code = es_i_cl_fill(device, s->queue, s->space[ES_SPACE_ARENA], plan->arena_bytes, 0);
    if (code == 0)
        code = es_i_cl_fill(device, s->queue, s->space[ES_SPACE_IO], plan->header->io_bytes, 0);
    return code == 0 ? ES_OK : es_i_cl_fail(why, code, 1, "a session's memory");
}

es_status es_i_cl_stream_open(es_i_device *opaque, es_i_stream **stream, es_error *why)
{
    es_i_cl_device *device = (es_i_cl_device *)(void *)opaque;
    const es_i_plan *plan = device->plan;
    uint32_t longest = 1;
    for (uint32_t g = 0; g < plan->n_graphs; g++)
        longest = plan->graphs[g].n_launches > longest ? plan->graphs[g].n_launches : longest;
    es_i_cl_stream *s = (es_i_cl_stream *)calloc(1, sizeof *s);
    if (s == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a session");
    s->device = device;
    s->kernels = (es_i_cl_kernel *)calloc(plan->n_launches > 0 ? plan->n_launches : 1, sizeof *s->kernels);
    s->events = (es_i_cl_event *)calloc(longest, sizeof(es_i_cl_event));
    s->batch = (int64_t *)calloc(2 * ES_CL_BATCH, sizeof *s->batch);
    if (plan->roles[0].tokens != NULL)
        s->slots = (uint8_t *)malloc((size_t)device->input_bytes * ES_CL_SLOTS);
    es_status status = ES_OK;
    if (s->kernels == NULL || s->events == NULL || s->batch == NULL ||
        (plan->roles[0].tokens != NULL && s->slots == NULL))
        status = es_i_fail(why, ES_E_HEAP, "no memory for a session");
    if (status == ES_OK)
        status = es_i_cl_blocks_open(s, why);
    if (status == ES_OK)
        status = es_i_cl_kernels_open(s, why);
    if (status == ES_OK)
        status = es_i_cl_reset((es_i_stream *)(void *)s, why);
    if (status != ES_OK)
        es_i_cl_stream_close((es_i_stream *)(void *)s);
    else
        *stream = (es_i_stream *)(void *)s;
    return status;
}

void es_i_cl_stream_close(es_i_stream *stream)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    const es_i_cl_api *cl = &s->device->cl;
    es_i_cl_queue queues[] = {s->queue, s->timed};
    for (int i = 0; i < 2; i++)
        if (queues[i] != NULL)
            (void)cl->Finish(queues[i]);
    for (uint32_t i = 0; i < ES_CL_SLOTS; i++)
        if (s->slot[i] != NULL)
            cl->ReleaseEvent(s->slot[i]);
    for (uint32_t i = 0; s->kernels != NULL && i < s->device->plan->n_launches; i++)
        if (s->kernels[i] != NULL)
            cl->ReleaseKernel(s->kernels[i]);
    for (uint32_t i = 0; i < ES_N_SPACES; i++)
        if (s->space[i] != NULL)
            cl->ReleaseMemObject(s->space[i]);
    if (s->steps != NULL)
        cl->ReleaseMemObject(s->steps);
    for (int i = 0; i < 2; i++)
        if (queues[i] != NULL)
            cl->ReleaseCommandQueue(queues[i]);
    free(s->kernels);
    free(s->events);
    free(s->batch);
    free(s->slots);
    free(s);
}

/* Waits for the queue; a failure here or before (code) leaves the blocks half written, so the stream is lost. */
static es_status es_i_cl_settle(es_i_cl_stream *s, int32_t code, const char *what, es_error *why)
{
    int32_t waited = s->device->cl.Finish(s->queue);
    code = code != 0 ? code : waited;
    if (code == 0)
        return ES_OK;
    s->lost = 1;
    return es_i_cl_fail(why, code, 1, what);
}

es_status es_i_cl_reset(es_i_stream *stream, es_error *why)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    const es_i_plan *plan = s->device->plan;
    es_i_cl_mem state = s->space[ES_SPACE_STATE];
    if (s->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    int32_t code = es_i_cl_fill(s->device, s->queue, state, plan->header->state_bytes, 0);
    for (uint32_t i = 0; i < plan->n_slots && code == 0; i++) {
        const es_i_slot *slot = &plan->slots[i];
        uint64_t element = es_i_state_element(slot);
        if (element != 0)
            code = s->device->cl.EnqueueFillBuffer(s->queue, state, &element, (size_t)es_i_dtype_bytes(slot->dtype),
                                                   (size_t)slot->offset, (size_t)slot->bytes, 0, NULL, NULL);
    }
    return es_i_cl_settle(s, code, "the state's memory", why);
}

es_status es_i_cl_read(es_i_stream *stream, uint32_t space, uint64_t offset, void *to, uint64_t bytes, es_error *why)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    if (s->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    int32_t code =
        s->device->cl.EnqueueReadBuffer(s->queue, s->space[space], 1, (size_t)offset, (size_t)bytes, to, 0, NULL, NULL);
    return code == 0 ? ES_OK : es_i_cl_fail(why, code, 0, "reading from the device");
}

es_status es_i_cl_write(es_i_stream *stream, uint32_t space, uint64_t offset, const void *from, uint64_t bytes,
                        es_error *why)
{
    es_i_cl_stream *s = (es_i_cl_stream *)(void *)stream;
    if (s->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    int32_t code = s->device->cl.EnqueueWriteBuffer(s->queue, s->space[space], 1, (size_t)offset, (size_t)bytes, from,
                                                    0, NULL, NULL);
    return code == 0 ? ES_OK : es_i_cl_fail(why, code, 0, "writing to the device");
}

es_status es_i_cl_copy(es_i_stream *to_stream, es_i_stream *from_stream, es_error *why)
{
    es_i_cl_stream *to = (es_i_cl_stream *)(void *)to_stream, *from = (es_i_cl_stream *)(void *)from_stream;
    const es_i_cl_api *cl = &to->device->cl;
    const es_i_header *header = to->device->plan->header;
    if (to->lost || from->lost)
        return es_i_cl_fail(why, ES_CL_DEVICE_NOT_AVAILABLE, 0, "this session");
    int32_t code = cl->Finish(from->queue);
    if (code != 0)
        return es_i_cl_fail(why, code, 0, "copying a session");
    if (header->state_bytes > 0)
        code = cl->EnqueueCopyBuffer(to->queue, from->space[ES_SPACE_STATE], to->space[ES_SPACE_STATE], 0, 0,
                                     (size_t)header->state_bytes, 0, NULL, NULL);
    if (code == 0 && header->io_bytes > 0)
        code = cl->EnqueueCopyBuffer(to->queue, from->space[ES_SPACE_IO], to->space[ES_SPACE_IO], 0, 0,
                                     (size_t)header->io_bytes, 0, NULL, NULL);
    return es_i_cl_settle(to, code, "copying a session", why);
}
#endif
