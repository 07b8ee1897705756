/* Builds a program from source, and checks that its kernels are those that the plan launches. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <stdlib.h>
#include <string.h>

/* The driver's log as one line, from its first error on. */
static void es_i_cl_log(const es_i_cl_device *device, es_i_cl_program program, char *line, size_t capacity)
{
    size_t bytes = 0, n = 0;
    line[0] = '\0';
    if (device->cl.GetProgramBuildInfo(program, device->id, ES_CL_PROGRAM_BUILD_LOG, 0, NULL, &bytes) != 0 ||
        bytes == 0 || bytes > (1u << 24))
        return;
    char *log = (char *)calloc(1, bytes + 1);
    if (log == NULL)
        return;
    if (device->cl.GetProgramBuildInfo(program, device->id, ES_CL_PROGRAM_BUILD_LOG, bytes, log, NULL) == 0) {
        const char *from = (strstr)(log, "error"); /* the function: glibc has a macro of C11 */
        for (const char *p = from != NULL ? from : log; *p != '\0' && n + 1 < capacity; p++) {
            int blank = *p == ' ' || *p == '\n' || *p == '\r' || *p == '\t';
            if (!blank || (n > 0 && line[n - 1] != ' '))
                line[n++] = (char)(blank ? ' ' : *p);
        }
        line[n] = '\0';
    }
    free(log);
}

es_status es_i_cl_build(const es_i_cl_device *device, const char *source, size_t bytes, es_i_cl_program *program,
                        es_error *why)
{
    char line[160];
    int32_t code = 0;
    *program = device->cl.CreateProgramWithSource(device->context, 1, &source, &bytes, &code);
    if (*program == NULL)
        return es_i_cl_fail(why, code, 1, "the kernels' source is not taken");
    /* without an option some drivers compile OpenCL C 1.2, which lacks features that the source asks for */
    int newer = strncmp(device->version, "OpenCL 3", 8) == 0;
    code = device->cl.BuildProgram(*program, 1, &device->id, newer ? "-cl-std=CL3.0" : "", NULL, NULL);
    if (code != 0 && newer)
        code = device->cl.BuildProgram(*program, 1, &device->id, "", NULL, NULL);
    if (code == 0)
        return ES_OK;
    es_i_cl_log(device, *program, line, sizeof line);
    device->cl.ReleaseProgram(*program);
    *program = NULL;
    return es_i_fail(why, ES_E_DEVICE_BUILD, "%s cannot build the kernels (OpenCL error %d): %s", device->name,
                     (int)code, line[0] != '\0' ? line : "the driver does not say why");
}

/* Every launch of kernel k against what the device can do with it. */
static es_status es_i_cl_launches_check(const es_i_cl_device *device, uint32_t k, uint64_t group, const size_t items[3],
                                        es_error *why)
{
    const es_i_plan *plan = device->plan;
    for (uint32_t i = 0; i < plan->n_launches; i++) {
        const es_i_launch *launch = &plan->launches[i];
        uint64_t threads = (uint64_t)launch->block[0] * launch->block[1] * launch->block[2];
        if (launch->kernel != k)
            continue;
        if (threads > group || launch->block[0] > items[0] || launch->block[1] > items[1] ||
            launch->block[2] > items[2])
            return es_i_fail(why, ES_E_DEVICE_ARCH,
                             "kernel '%s' was compiled for work-groups of %u x %u x %u, which %s does not take",
                             plan->strings + plan->kernels[k].name, launch->block[0], launch->block[1],
                             launch->block[2], device->name);
    }
    return ES_OK;
}

static es_status es_i_cl_kernels_check(const es_i_cl_device *device, es_i_cl_program program, es_error *why)
{
    const es_i_cl_api *cl = &device->cl;
    const es_i_plan *plan = device->plan;
    size_t items[3] = {0, 0, 0};
    (void)cl->GetDeviceInfo(device->id, ES_CL_DEVICE_MAX_WORK_ITEM_SIZES, sizeof items, items, NULL);
    for (uint32_t k = 0; k < plan->n_kernels; k++) {
        const char *name = plan->strings + plan->kernels[k].name;
        int32_t code = 0;
        uint32_t n_args = 0;
        size_t group = 0;
        es_i_cl_kernel kernel = cl->CreateKernel(program, name, &code);
        if (kernel == NULL)
            return es_i_fail(why, ES_E_KERNEL_TABLE, "the bundle's code has no kernel '%s' (OpenCL error %d)", name,
                             (int)code);
        if (cl->GetKernelInfo(kernel, ES_CL_KERNEL_NUM_ARGS, sizeof n_args, &n_args, NULL) != 0)
            n_args = 0;
        code = cl->GetKernelWorkGroupInfo(kernel, device->id, ES_CL_KERNEL_WORK_GROUP_SIZE, sizeof group, &group, NULL);
        cl->ReleaseKernel(kernel);
        if (n_args != 2 * (uint64_t)plan->kernels[k].n_args)
            return es_i_fail(why, ES_E_KERNEL_TABLE, "kernel '%s' takes %u arguments, the plan gives 2 x %u", name,
                             n_args, plan->kernels[k].n_args);
        es_status status = es_i_cl_launches_check(device, k, code == 0 ? group : 0, items, why);
        if (status != ES_OK)
            return status;
    }
    return ES_OK;
}

es_status es_i_cl_program_open(es_i_cl_device *device, const char *path, es_error *why)
{
    const es_i_plan *plan = device->plan;
    device->program = es_i_cl_cache_read(device, path);
    if (device->program != NULL) {
        if (es_i_cl_kernels_check(device, device->program, NULL) == ES_OK)
            return ES_OK;
        device->cl.ReleaseProgram(device->program); /* source says whether the file or the bundle is at fault */
        device->program = NULL;
    }
    const char *code = (const char *)plan->data + plan->section[ES_CODE]->offset;
    es_status status = es_i_cl_build(device, code + plan->kernels[0].code_offset, (size_t)plan->kernels[0].code_bytes,
                                     &device->program, why);
    if (status == ES_OK)
        status = es_i_cl_kernels_check(device, device->program, why);
    if (status == ES_OK)
        es_i_cl_cache_write(device, path, device->program);
    return status;
}
#endif
