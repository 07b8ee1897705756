/* The device's memory: weights in as few objects as the driver allows, and what of io is copied. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ES_CL_SLICE = 1 << 26 };

es_status es_i_cl_buffer(const es_i_cl_device *device, uint64_t bytes, const char *what, es_i_cl_mem *mem,
                         es_error *why)
{
    char sentence[96];
    int32_t code = 0;
    *mem = NULL;
    if (bytes == 0)
        return ES_OK;
    if (device->max_alloc > 0 && bytes > device->max_alloc)
        return es_i_fail(why, ES_E_DEVICE_MEMORY, "%s need%s %llu bytes, %s allocates at most %llu at once", what,
                         what[strlen(what) - 1] == 's' ? "" : "s", (unsigned long long)bytes, device->name,
                         (unsigned long long)device->max_alloc);
    *mem = device->cl.CreateBuffer(device->context, ES_CL_MEM_READ_WRITE, (size_t)bytes, NULL, &code);
    if (*mem != NULL)
        return ES_OK;
    (void)snprintf(sentence, sizeof sentence, "%s of %llu bytes", what, (unsigned long long)bytes);
    return es_i_cl_fail(why, code, 1, sentence);
}

int32_t es_i_cl_fill(const es_i_cl_device *device, es_i_cl_queue queue, es_i_cl_mem mem, uint64_t bytes, uint8_t value)
{
    uint8_t pattern[16];
    size_t size = sizeof pattern; /* wide patterns fill faster */
    if (mem == NULL)
        return 0;
    while (bytes % size != 0)
        size /= 2;
    memset(pattern, value, sizeof pattern);
    return device->cl.EnqueueFillBuffer(queue, mem, pattern, size, 0, (size_t)bytes, 0, NULL, NULL);
}

/* One piece from `offset`: shared with the host's map where the device can, else copied. */
static es_status es_i_cl_piece_open(es_i_cl_device *device, es_i_cl_queue queue, es_i_cl_piece *piece, es_error *why)
{
    const es_i_cl_api *cl = &device->cl;
    const uint8_t *from = device->plan->weights + piece->offset;
    int32_t code = 0;
    if (device->shared_memory) {
        piece->mem = cl->CreateBuffer(device->context, ES_CL_MEM_READ_ONLY | ES_CL_MEM_USE_HOST_PTR,
                                      (size_t)piece->bytes, (void *)(uintptr_t)from, &code);
        if (piece->mem != NULL)
            return ES_OK;
    }
    piece->mem = cl->CreateBuffer(device->context, ES_CL_MEM_READ_ONLY, (size_t)piece->bytes, NULL, &code);
    for (uint64_t at = 0; piece->mem != NULL && at < piece->bytes && code == 0; at += ES_CL_SLICE) {
        uint64_t bytes = piece->bytes - at < ES_CL_SLICE ? piece->bytes - at : ES_CL_SLICE;
        code = cl->EnqueueWriteBuffer(queue, piece->mem, 1, (size_t)at, (size_t)bytes, from + at, 0, NULL, NULL);
    }
    return code == 0 ? ES_OK : es_i_cl_fail(why, code, 1, "the weights do not fit");
}

/* Cuts WEIGHTS at tensors' starts into pieces that one allocation can hold. */
static es_status es_i_cl_pieces_cut(es_i_cl_device *device, es_error *why)
{
    const es_i_plan *plan = device->plan;
    device->pieces = (es_i_cl_piece *)calloc(plan->n_tensors > 0 ? plan->n_tensors : 1, sizeof *device->pieces);
    if (device->pieces == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u weights", plan->n_tensors);
    for (uint32_t i = 0; i < plan->n_tensors; i++) {
        const es_i_tensor *t = &plan->tensors[i];
        es_i_cl_piece *last = device->n_pieces > 0 ? &device->pieces[device->n_pieces - 1] : NULL;
        if (device->max_alloc > 0 && t->bytes > device->max_alloc)
            return es_i_fail(why, ES_E_DEVICE_MEMORY, "'%s' has %llu bytes, %s allocates at most %llu at once",
                             plan->strings + t->name, (unsigned long long)t->bytes, device->name,
                             (unsigned long long)device->max_alloc);
        uint64_t end = t->offset + t->bytes;
        if (last != NULL && (device->max_alloc == 0 || end - last->offset <= device->max_alloc))
            last->bytes = end - last->offset;
        else
            device->pieces[device->n_pieces++] = (es_i_cl_piece){t->offset, t->bytes, NULL};
    }
    return ES_OK;
}

es_status es_i_cl_weights_open(es_i_cl_device *device, es_error *why)
{
    int32_t code = 0;
    es_status status = es_i_cl_pieces_cut(device, why);
    if (status != ES_OK || device->n_pieces == 0)
        return status;
    es_i_cl_queue queue = device->cl.CreateCommandQueue(device->context, device->id, 0, &code);
    if (queue == NULL)
        return es_i_cl_fail(why, code, 1, "no queue for the weights");
    for (uint32_t i = 0; i < device->n_pieces && status == ES_OK; i++)
        status = es_i_cl_piece_open(device, queue, &device->pieces[i], why);
    code = device->cl.Finish(queue);
    if (status == ES_OK && code != 0)
        status = es_i_cl_fail(why, code, 1, "the weights do not fit");
    device->cl.ReleaseCommandQueue(queue);
    return status;
}

void es_i_cl_weights_close(es_i_cl_device *device)
{
    for (uint32_t i = 0; i < device->n_pieces; i++)
        if (device->pieces[i].mem != NULL)
            device->cl.ReleaseMemObject(device->pieces[i].mem);
    free(device->pieces);
}

static int es_i_cl_span_order(const void *left, const void *right)
{
    const es_i_cl_span *a = (const es_i_cl_span *)left, *b = (const es_i_cl_span *)right;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

/* Neighbours but for the padding to 64 bytes go together: nothing else of the graph lies between them. Returns how many
 * are left. */
static uint32_t es_i_cl_spans_merge(es_i_cl_span *spans, uint32_t n)
{
    uint32_t kept = 0;
    qsort(spans, n, sizeof *spans, es_i_cl_span_order);
    for (uint32_t i = 0; i < n; i++) {
        es_i_cl_span *last = kept > 0 ? &spans[kept - 1] : NULL;
        if (last != NULL && spans[i].offset - (last->offset + last->bytes) < 64)
            last->bytes = spans[i].offset + spans[i].bytes - last->offset;
        else
            spans[kept++] = spans[i];
    }
    return kept;
}

es_status es_i_cl_spans_find(es_i_cl_device *device, es_error *why)
{
    const es_i_plan *plan = device->plan;
    uint32_t used = 0, sides = 2 * plan->n_graphs;
    device->spans = (es_i_cl_span *)calloc(plan->n_io > 0 ? plan->n_io : 1, sizeof *device->spans);
    device->first_span = (uint32_t *)calloc((size_t)sides + 1, sizeof *device->first_span);
    if (device->spans == NULL || device->first_span == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u inputs and outputs", plan->n_io);
    for (uint32_t side = 0; side < sides; side++) {
        uint32_t n = 0;
        uint64_t bytes = 0;
        device->first_span[side] = used;
        for (uint32_t i = 0; i < plan->n_io; i++) {
            const es_i_io *io = &plan->io[i];
            if (io->graph == side / 2 && io->direction == side % 2)
                device->spans[used + n++] = (es_i_cl_span){io->offset, io->bytes};
        }
        n = es_i_cl_spans_merge(device->spans + used, n);
        for (uint32_t i = 0; i < n; i++)
            bytes += device->spans[used + i].bytes;
        if (side % 2 == 0 && bytes > device->input_bytes)
            device->input_bytes = bytes;
        used += n;
    }
    device->first_span[sides] = used;
    return ES_OK;
}
#endif
