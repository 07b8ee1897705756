/* What a model is made of. */
#include "es_internal.h"

#include <string.h>

es_status es_model_get_info(const es_model *model, es_model_info *info)
{
    if (model == NULL || info == NULL)
        return ES_E_NULL;
    if (info->struct_size < sizeof *info)
        return ES_E_STRUCT;
    const es_i_plan *plan = &model->plan;
    info->vocab = plan->vocab;
    info->context = plan->header->context;
    info->n_graphs = plan->n_graphs;
    info->n_slots = plan->n_slots;
    info->n_io = plan->n_io;
    info->n_threads = model->pool.n_threads;
    info->tokenizer = plan->tokenizer;
    info->takes_tokens = model->roles[0].tokens != NULL;
    info->abi_version = ES_ABI_VERSION;
    memcpy(info->model_id, plan->header->model_id, sizeof info->model_id);
    info->file_bytes = plan->header->file_bytes;
    info->weight_bytes = plan->weight_bytes;
    info->state_bytes = plan->header->state_bytes;
    info->io_bytes = plan->header->io_bytes;
    info->arena_bytes = plan->arena_bytes;
    return ES_OK;
}

es_status es_model_graph(const es_model *model, uint32_t index, es_graph_info *info)
{
    if (model == NULL || info == NULL)
        return ES_E_NULL;
    if (info->struct_size < sizeof *info)
        return ES_E_STRUCT;
    if (index >= model->plan.n_graphs)
        return ES_E_RANGE;
    const es_i_graph *graph = &model->plan.graphs[index];
    info->tokens = graph->tokens;
    info->n_launches = graph->n_launches;
    info->reserved = 0;
    info->arena_bytes = graph->arena_bytes;
    info->name = model->plan.strings + graph->name;
    return ES_OK;
}

es_status es_model_io(const es_model *model, uint32_t index, es_tensor_info *info)
{
    if (model == NULL || info == NULL)
        return ES_E_NULL;
    if (info->struct_size < sizeof *info)
        return ES_E_STRUCT;
    if (index >= model->plan.n_io)
        return ES_E_RANGE;
    const es_i_io *io = &model->plan.io[index];
    info->dtype = io->dtype;
    info->rank = io->rank;
    info->role = io->role;
    info->graph = io->graph;
    info->is_output = io->direction;
    info->update = 0;
    info->axis = -1;
    memcpy(info->dims, io->dims, sizeof info->dims);
    info->bytes = io->bytes;
    info->name = model->plan.strings + io->name;
    return ES_OK;
}

es_status es_model_slot(const es_model *model, uint32_t index, es_tensor_info *info)
{
    if (model == NULL || info == NULL)
        return ES_E_NULL;
    if (info->struct_size < sizeof *info)
        return ES_E_STRUCT;
    if (index >= model->plan.n_slots)
        return ES_E_RANGE;
    const es_i_slot *slot = &model->plan.slots[index];
    info->dtype = slot->dtype;
    info->rank = slot->rank;
    info->role = 0;
    info->graph = 0;
    info->is_output = 0;
    info->update = slot->update;
    info->axis = slot->axis;
    memcpy(info->dims, slot->dims, sizeof info->dims);
    info->bytes = slot->bytes;
    info->name = model->plan.strings + slot->name;
    return ES_OK;
}
