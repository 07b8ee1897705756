/* One stream: its memory, its inputs and outputs. Layout of the memory, each part at a multiple of a cache line:
 * es_session, argument pointers, state, io, arena (which the sampler uses between steps). On a GPU pointers, state and
 * arena lie on the device, and here are the mirror of io and the sampler's scratch. */
#include "es_device.h"

#include <stdlib.h>
#include <string.h>

/* *total += bytes, rounded up to a line; 0 when that overflows. */
static int es_i_add(uint64_t *total, uint64_t bytes)
{
    if (bytes > UINT64_MAX - ES_LINE || *total > UINT64_MAX - ES_LINE - bytes)
        return 0;
    *total += (bytes + ES_LINE - 1) / ES_LINE * ES_LINE;
    return 1;
}

/* Bytes of the parts in the host's memory. */
typedef struct {
    uint64_t args, state, io, arena;
} es_i_parts;

static es_i_parts es_i_parts_of(const es_i_plan *plan, const es_i_backend *backend)
{
    es_i_parts p = {0, 0, plan->header->io_bytes, (uint64_t)plan->vocab * sizeof(float)};
    if (backend != NULL)
        return p;
    p.args = (uint64_t)plan->n_args * sizeof(void *);
    p.state = plan->header->state_bytes;
    p.arena = plan->arena_bytes > p.arena ? plan->arena_bytes : p.arena;
    return p;
}

size_t es_i_session_bytes(const es_i_plan *plan, const es_i_backend *backend)
{
    es_i_parts p = es_i_parts_of(plan, backend);
    uint64_t total = ES_LINE - 1, device = 0; /* the caller's memory may start anywhere */
    if (!es_i_add(&total, sizeof(es_session)) || !es_i_add(&total, p.args) || !es_i_add(&total, p.state) ||
        !es_i_add(&total, p.io) || !es_i_add(&total, p.arena) || total > SIZE_MAX / 2)
        return 0;
    if (!es_i_add(&device, plan->header->state_bytes) || !es_i_add(&device, plan->header->io_bytes) ||
        !es_i_add(&device, plan->arena_bytes) || device > SIZE_MAX / 2)
        return 0;
    return (size_t)total;
}

es_status es_session_need(const es_model *model, size_t *bytes)
{
    if (model == NULL || bytes == NULL)
        return ES_E_NULL;
    *bytes = model->need;
    return ES_OK;
}

static uint8_t *es_i_take(uint8_t **next, uint64_t bytes)
{
    uint8_t *start = *next;
    *next += (bytes + ES_LINE - 1) / ES_LINE * ES_LINE;
    return start;
}

/* Kernels get the pointers as they stand here; weights are never written, the plan was checked. */
static void es_i_args_resolve(es_session *session)
{
    const es_i_plan *plan = &session->model->plan;
    uint8_t *base[ES_N_SPACES];
    base[ES_SPACE_WEIGHTS] = (uint8_t *)(uintptr_t)plan->weights;
    base[ES_SPACE_ARENA] = session->arena;
    base[ES_SPACE_STATE] = session->state;
    base[ES_SPACE_IO] = session->io;
    for (uint32_t i = 0; i < plan->n_args; i++)
        session->args[i] = base[plan->args[i].space] + plan->args[i].offset;
}

es_status es_session_create(es_model *model, void *memory, size_t bytes, es_session **session, es_error *why)
{
    if (model == NULL || session == NULL)
        return es_i_fail(why, ES_E_NULL, "no model or no place for the session");
    *session = NULL;
    if (memory != NULL && bytes < model->need)
        return es_i_fail(why, ES_E_SMALL, "a session needs %llu bytes, %llu are given", (unsigned long long)model->need,
                         (unsigned long long)bytes);
    void *heap = memory == NULL ? malloc(model->need) : NULL;
    if (memory == NULL && heap == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a session of %llu bytes", (unsigned long long)model->need);
    const es_i_plan *plan = &model->plan;
    uint8_t *next = (uint8_t *)(heap != NULL ? heap : memory);
    next += (ES_LINE - (uintptr_t)next % ES_LINE) % ES_LINE;
    es_session *made = (es_session *)(void *)es_i_take(&next, sizeof(es_session));
    memset(made, 0, sizeof *made);
    made->model = model;
    made->heap = heap;
    es_i_parts p = es_i_parts_of(plan, model->backend);
    made->args = (void **)(void *)es_i_take(&next, p.args);
    made->state = es_i_take(&next, p.state);
    made->io = es_i_take(&next, p.io);
    made->arena = es_i_take(&next, p.arena);
    memset(made->state, 0, (size_t)p.state);
    memset(made->io, 0, (size_t)p.io);
    memset(made->arena, 0, (size_t)p.arena);
    if (model->backend == NULL) {
        es_i_args_resolve(made);
        es_i_state_init(plan, made->state);
    } else {
        es_status status = model->backend->stream_open(model->device, &made->stream, why);
        if (status != ES_OK) {
            free(heap);
            return status;
        }
    }
    __atomic_add_fetch(&model->n_sessions, 1, __ATOMIC_RELAXED);
    *session = made;
    return ES_OK;
}

es_status es_session_close(es_session **session)
{
    if (session == NULL || *session == NULL)
        return ES_OK;
    es_session *s = *session;
    *session = NULL;
    if (s->stream != NULL)
        s->model->backend->stream_close(s->stream);
    __atomic_sub_fetch(&s->model->n_sessions, 1, __ATOMIC_RELEASE);
    free(s->heap);
    return ES_OK;
}

es_status es_i_session_failed(es_session *session, es_status status, int halfway)
{
    if (status == ES_E_DEVICE_LOST || (status != ES_OK && halfway)) {
        session->failed = status;
        session->logits = NULL;
    }
    return status;
}

es_status es_session_copy(es_session *to, const es_session *from)
{
    if (to == NULL || from == NULL)
        return ES_E_NULL;
    if (to->model != from->model)
        return ES_E_OTHER_MODEL;
    if (to == from)
        return ES_OK;
    const es_i_header *header = from->model->plan.header;
    if (to->stream != NULL) {
        es_status status = to->failed != ES_OK ? to->failed : from->failed;
        if (status == ES_OK)
            status = es_i_session_failed(to, to->model->backend->copy(to->stream, from->stream, NULL), 0);
        if (status != ES_OK)
            return status;
    } else {
        memcpy(to->state, from->state, (size_t)header->state_bytes);
    }
    memcpy(to->io, from->io, (size_t)header->io_bytes);
    to->position = from->position;
    to->logits = NULL;
    if (from->logits != NULL)
        to->logits = (const float *)(const void *)(to->io + ((const uint8_t *)from->logits - from->io));
    return ES_OK;
}

es_status es_session_fork(const es_session *session, void *memory, size_t bytes, es_session **fork, es_error *why)
{
    if (session == NULL)
        return es_i_fail(why, ES_E_NULL, "no session to fork");
    es_status status = es_session_create(session->model, memory, bytes, fork, why);
    if (status != ES_OK)
        return status;
    status = es_session_copy(*fork, session);
    if (status == ES_OK)
        return ES_OK;
    (void)es_session_close(fork);
    return es_i_fail(why, status, "%s", es_status_text(status));
}

es_status es_reset(es_session *session)
{
    if (session == NULL)
        return ES_E_NULL;
    if (session->failed != ES_OK)
        return session->failed;
    if (session->stream != NULL) {
        es_status status = session->model->backend->reset(session->stream, NULL);
        if (status != ES_OK)
            return es_i_session_failed(session, status, 0);
    } else {
        es_i_state_init(&session->model->plan, session->state);
    }
    session->position = 0;
    session->logits = NULL;
    return ES_OK;
}

const float *es_logits(const es_session *session)
{
    return session != NULL ? session->logits : NULL;
}

uint64_t es_position(const es_session *session)
{
    return session != NULL ? session->position : 0;
}

static es_status es_i_io_find(const es_session *session, uint32_t graph, const char *name, uint32_t direction,
                              const es_i_io **found)
{
    if (session == NULL || name == NULL)
        return ES_E_NULL;
    const es_i_plan *plan = &session->model->plan;
    if (graph >= plan->n_graphs)
        return ES_E_RANGE;
    for (uint32_t i = 0; i < plan->n_io; i++) {
        const es_i_io *io = &plan->io[i];
        if (io->graph == graph && io->direction == direction && strcmp(plan->strings + io->name, name) == 0) {
            *found = io;
            return ES_OK;
        }
    }
    return ES_E_NAME;
}

es_status es_input(es_session *session, uint32_t graph, const char *name, void **data, size_t *bytes)
{
    const es_i_io *io = NULL;
    es_status status = data == NULL ? ES_E_NULL : es_i_io_find(session, graph, name, 0, &io);
    if (status != ES_OK)
        return status;
    *data = session->io + io->offset;
    if (bytes != NULL)
        *bytes = (size_t)io->bytes;
    return ES_OK;
}

es_status es_output(const es_session *session, uint32_t graph, const char *name, const void **data, size_t *bytes)
{
    const es_i_io *io = NULL;
    es_status status = data == NULL ? ES_E_NULL : es_i_io_find(session, graph, name, 1, &io);
    if (status != ES_OK)
        return status;
    *data = session->io + io->offset;
    if (bytes != NULL)
        *bytes = (size_t)io->bytes;
    return ES_OK;
}
