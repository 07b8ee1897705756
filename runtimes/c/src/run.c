/* Running graphs: prefill by chunks, steps, and the models whose steps are not tokens. */
#include "es_device.h"

#include <string.h>

static void es_i_integer_write(const es_session *session, const es_i_io *io, uint64_t index, int64_t value)
{
    uint8_t *base = session->io + io->offset;
    if (io->dtype == ES_INT64) {
        memcpy(base + index * sizeof value, &value, sizeof value);
    } else {
        int32_t narrow = (int32_t)value;
        memcpy(base + index * sizeof narrow, &narrow, sizeof narrow);
    }
}

static int64_t es_i_integer_read(const es_session *session, const es_i_io *io, uint64_t index)
{
    const uint8_t *base = session->io + io->offset;
    int64_t wide;
    int32_t narrow;
    if (io->dtype == ES_INT64) {
        memcpy(&wide, base + index * sizeof wide, sizeof wide);
        return wide;
    }
    memcpy(&narrow, base + index * sizeof narrow, sizeof narrow);
    return narrow;
}

static void es_i_launches_run(es_session *session, uint32_t g, int outputs, uint64_t *ns)
{
    es_model *model = session->model;
    const es_i_plan *plan = &model->plan;
    const es_i_graph *graph = &plan->graphs[g];
    if (model->flags & ES_POISON)
        memset(session->arena, 0xff, (size_t)graph->arena_bytes);
    pthread_mutex_lock(&model->lock);
    uint64_t mode = es_i_float_mode_flush();
    for (uint32_t i = 0; i < graph->n_launches; i++) {
        const es_i_launch *launch = &plan->launches[graph->first_launch + i];
        if (!outputs && (launch->flags & ES_LAUNCH_OUTPUTS_ONLY))
            continue;
        uint64_t start = ns != NULL ? es_i_now() : 0;
        es_i_pool_launch(&model->pool, model->kernels->kernels[launch->kernel].fn, session->args + launch->first_arg,
                         (int32_t)launch->grid[0]);
        if (ns != NULL)
            ns[i] = es_i_now() - start;
    }
    es_i_float_mode_set(mode);
    pthread_mutex_unlock(&model->lock);
}

static void es_i_advance(es_session *session, uint32_t g, uint64_t n, int outputs)
{
    const es_i_io *logits = outputs ? session->model->roles[g].logits : NULL;
    session->position += n;
    session->logits = logits != NULL ? (const float *)(const void *)(session->io + logits->offset) : NULL;
}

/* Runs graph g on the inputs as they stand; the caller has checked that it fits. outputs = 0 skips what feeds outputs
 * alone. ns: NULL, or room for the nanoseconds of every launch. */
static es_status es_i_graph_run(es_session *session, uint32_t g, int outputs, uint64_t *ns)
{
    const es_model *model = session->model;
    if (model->roles[g].position != NULL)
        es_i_integer_write(session, model->roles[g].position, 0, (int64_t)session->position);
    if (session->stream != NULL) {
        es_status status = model->backend->run(session->stream, g, outputs, session->io, ns, NULL);
        if (status != ES_OK)
            return status;
    } else {
        es_i_launches_run(session, g, outputs, ns);
    }
    es_i_advance(session, g, model->plan.graphs[g].tokens, outputs);
    return ES_OK;
}

int es_i_greedy(es_session *session, size_t n, int32_t *tokens, uint64_t *ns, es_status *status)
{
    const es_model *model = session->model;
    const es_i_roles *step = &model->roles[0];
    if (session->stream == NULL || model->backend->greedy == NULL || step->next == NULL || n == 0)
        return 0;
    *status = es_sample(session, NULL, NULL, 0, &tokens[0]);
    if (*status != ES_OK)
        return 1;
    *status = model->backend->greedy(session->stream, tokens[0], session->position, n, tokens, ns, session->io, NULL);
    for (size_t i = 0; i < n && *status == ES_OK; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= model->plan.vocab)
            *status = es_i_session_failed(session, ES_E_NAN, 1);
    if (*status != ES_OK) {
        (void)es_i_session_failed(session, *status, 0);
        return 1;
    }
    es_i_integer_write(session, step->tokens, 0, tokens[n - 1]);
    es_i_advance(session, 0, n, 1);
    return 1;
}

es_status es_i_room_check(const es_session *session, uint64_t n)
{
    uint64_t limit = session->model->limit;
    return session->position > limit || n > limit - session->position ? ES_E_FULL : ES_OK;
}

static es_status es_i_chunk_run(es_session *session, uint32_t g, const int32_t *tokens, int outputs)
{
    const es_i_io *io = session->model->roles[g].tokens;
    for (uint32_t i = 0; i < session->model->plan.graphs[g].tokens; i++)
        es_i_integer_write(session, io, i, tokens[i]);
    return es_i_graph_run(session, g, outputs, NULL);
}

es_status es_prefill(es_session *session, const int32_t *tokens, size_t n)
{
    if (session == NULL || (tokens == NULL && n > 0))
        return ES_E_NULL;
    const es_i_plan *plan = &session->model->plan;
    if (session->model->roles[0].tokens == NULL)
        return ES_E_NO_TOKENS;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || (uint32_t)tokens[i] >= plan->vocab)
            return ES_E_TOKEN;
    es_status status = session->failed != ES_OK ? session->failed : es_i_room_check(session, n);
    if (status != ES_OK)
        return status;
    uint32_t g = plan->n_graphs - 1;
    for (size_t done = 0; done < n; done += plan->graphs[g].tokens) {
        while (plan->graphs[g].tokens > n - done)
            g--;
        status = es_i_chunk_run(session, g, tokens + done, done + plan->graphs[g].tokens == n);
        if (status != ES_OK)
            return es_i_session_failed(session, status, done > 0);
    }
    return ES_OK;
}

es_status es_step(es_session *session, int32_t token)
{
    return es_prefill(session, &token, 1);
}

static es_status es_i_run(es_session *session, uint32_t graph, uint64_t *ns, size_t n)
{
    if (session == NULL)
        return ES_E_NULL;
    const es_i_plan *plan = &session->model->plan;
    if (graph >= plan->n_graphs)
        return ES_E_RANGE;
    if (ns != NULL && n != plan->graphs[graph].n_launches)
        return ES_E_ROOM;
    uint32_t tokens = plan->graphs[graph].tokens;
    const es_i_io *io = session->model->roles[graph].tokens;
    for (uint32_t i = 0; io != NULL && i < tokens; i++) {
        int64_t id = es_i_integer_read(session, io, i);
        if (id < 0 || id >= (int64_t)plan->vocab)
            return ES_E_TOKEN;
    }
    es_status status = session->failed != ES_OK ? session->failed : es_i_room_check(session, tokens);
    if (status == ES_OK)
        status = es_i_session_failed(session, es_i_graph_run(session, graph, 1, ns), 0);
    return status;
}

es_status es_run(es_session *session, uint32_t graph)
{
    return es_i_run(session, graph, NULL, 0);
}

es_status es_profile(es_session *session, uint32_t graph, uint64_t *ns, size_t n)
{
    return ns == NULL ? ES_E_NULL : es_i_run(session, graph, ns, n);
}
