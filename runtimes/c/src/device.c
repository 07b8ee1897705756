/* Which backend a plan needs, and what a model runs on. */
#include "es_device.h"

#include <stdio.h>

es_status es_i_backend_find(const es_i_plan *plan, const es_i_backend **backend, es_error *why)
{
    uint32_t id = plan->n_kernels > 0 ? plan->kernels[0].backend : ES_BACKEND_CPU;
    *backend = NULL;
#ifdef ES_WITH_OPENCL
    if (id == ES_BACKEND_OPENCL)
        *backend = &es_i_opencl;
#endif
#ifdef ES_WITH_CUDA
    if (id == ES_BACKEND_CUDA)
        *backend = &es_i_cuda;
#endif
    if (id == ES_BACKEND_CPU || *backend != NULL)
        return ES_OK;
    return es_i_fail(why, ES_E_BACKEND, "kernel '%s' needs %s, which this build lacks",
                     plan->strings + plan->kernels[0].name, id == ES_BACKEND_OPENCL ? "OpenCL" : "CUDA");
}

es_status es_model_device(const es_model *model, es_device_info *info)
{
    if (model == NULL || info == NULL)
        return ES_E_NULL;
    if (info->struct_size < sizeof *info)
        return ES_E_STRUCT;
    const es_i_plan *plan = &model->plan;
    info->backend = ES_BACKEND_CPU;
    info->weight_bytes = plan->weight_bytes;
    info->session_bytes = 0;
    if (model->backend == NULL) {
        (void)snprintf(info->text, sizeof info->text, "CPU, %u thread%s", model->pool.n_threads,
                       model->pool.n_threads == 1 ? "" : "s");
        return ES_OK;
    }
    info->backend = model->backend->id;
    info->session_bytes = plan->header->state_bytes + plan->header->io_bytes + plan->arena_bytes;
    return model->backend->describe(model->device, info->text, sizeof info->text);
}
