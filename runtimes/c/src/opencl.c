/* The OpenCL backend's table, and opening and closing its device. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <stdio.h>
#include <stdlib.h>

static void es_i_cl_close(es_i_device *opaque)
{
    es_i_cl_device *device = (es_i_cl_device *)(void *)opaque;
    if (device->pieces != NULL)
        es_i_cl_weights_close(device);
    if (device->program != NULL)
        device->cl.ReleaseProgram(device->program);
    if (device->context != NULL)
        device->cl.ReleaseContext(device->context);
    free(device->spans);
    free(device->first_span);
    free(device);
}

static es_status es_i_cl_open(const es_i_plan *plan, const char *path, const es_options *options, es_i_device **opened,
                              es_error *why)
{
    es_i_cl_device *device = (es_i_cl_device *)calloc(1, sizeof *device);
    if (device == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a device");
    device->plan = plan;
    device->poison = (options->flags & ES_POISON) != 0;
    es_status status = es_i_cl_driver_open(&device->cl, why);
    if (status == ES_OK)
        status = es_i_cl_device_choose(device, why);
    if (status == ES_OK) {
        int32_t code = 0;
        device->context = device->cl.CreateContext(NULL, 1, &device->id, NULL, NULL, &code);
        if (device->context == NULL)
            status = es_i_cl_fail(why, code, 1, device->name);
    }
    if (status == ES_OK)
        status = es_i_cl_spans_find(device, why);
    if (status == ES_OK)
        status = es_i_cl_program_open(device, path, why);
    if (status == ES_OK)
        status = es_i_cl_weights_open(device, why);
    if (status != ES_OK)
        es_i_cl_close((es_i_device *)(void *)device);
    else
        *opened = (es_i_device *)(void *)device;
    return status;
}

static es_status es_i_cl_line(const es_i_device *opaque, char *text, size_t capacity)
{
    const es_i_cl_device *device = (const es_i_cl_device *)(const void *)opaque;
    (void)snprintf(text, capacity, "OpenCL, %s, %s, driver %s", device->name, device->version, device->driver);
    return ES_OK;
}

const es_i_backend es_i_opencl = {
    "OpenCL",     ES_BACKEND_OPENCL,    es_i_cl_open,           es_i_cl_close,
    es_i_cl_line, es_i_cl_stream_open,  es_i_cl_stream_close,   es_i_cl_reset,
    es_i_cl_run,  es_i_cl_greedy,       es_i_cl_read,           es_i_cl_write,
    es_i_cl_copy, es_i_cl_measure_read, es_i_cl_measure_launch,
};
#endif
