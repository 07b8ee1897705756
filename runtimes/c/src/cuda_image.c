/* The kernels of a plan: an archive of cubins and PTX texts in CODE, of which one fits the device.
 *
 * Archive, little-endian: magic[8], u32 n, u32 zero, then n records (u32 kind, u32 sm, u64 offset, u64 bytes); offsets
 * count from the archive's start. Nothing is used before it was checked. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ES_CU_CUBIN = 1, ES_CU_PTX = 2 };
enum { ES_CU_WAITS = 90 }; /* kernels compiled for less have no instruction to wait, whatever runs them */
enum { ES_CU_ARCHIVE_HEADER = 16, ES_CU_RECORD = 24, ES_CU_ELF_HEADER = 64, ES_CU_SMS = 64 };

static const char es_i_cu_magic[8] = {'E', 'S', 'I', 'M', 'A', 'G', 'E', 'S'};

typedef struct {
    uint32_t kind, sm;
    uint64_t offset, bytes;
} es_i_cu_image;

static uint64_t es_i_cu_number(const uint8_t *at, size_t bytes)
{
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

/* A 64-bit ELF file whose tables of sections and segments lie within it. The driver is told no size. */
static int es_i_cu_elf(const uint8_t *data, uint64_t bytes)
{
    static const uint8_t magic[5] = {0x7f, 'E', 'L', 'F', 2};
    if (bytes < ES_CU_ELF_HEADER || memcmp(data, magic, sizeof magic) != 0)
        return 0;
    const struct {
        size_t offset, size, count;
    } tables[] = {{32, 54, 56}, {40, 58, 60}};
    for (size_t i = 0; i < 2; i++) {
        uint64_t at = es_i_cu_number(data + tables[i].offset, 8);
        uint64_t length = es_i_cu_number(data + tables[i].size, 2) * es_i_cu_number(data + tables[i].count, 2);
        if (at > bytes || length > bytes - at)
            return 0;
    }
    return 1;
}

static es_status es_i_cu_image_read(const uint8_t *archive, uint64_t bytes, uint32_t n, uint32_t i,
                                    es_i_cu_image *image, es_error *why)
{
    const uint8_t *record = archive + ES_CU_ARCHIVE_HEADER + (uint64_t)i * ES_CU_RECORD;
    image->kind = (uint32_t)es_i_cu_number(record, 4);
    image->sm = (uint32_t)es_i_cu_number(record + 4, 4);
    image->offset = es_i_cu_number(record + 8, 8);
    image->bytes = es_i_cu_number(record + 16, 8);
    if (image->kind != ES_CU_CUBIN && image->kind != ES_CU_PTX)
        return es_i_fail(why, ES_E_ENUM, "CUDA image %u has the unknown kind %u", i, image->kind);
    uint64_t start = ES_CU_ARCHIVE_HEADER + (uint64_t)n * ES_CU_RECORD;
    if (image->offset % 16 != 0 || image->offset < start || image->offset > bytes || image->bytes == 0 ||
        image->bytes > bytes - image->offset)
        return es_i_fail(why, ES_E_KERNEL, "CUDA image %u lies outside the code", i);
    const uint8_t *data = archive + image->offset;
    if (image->kind == ES_CU_PTX ? data[image->bytes - 1] != 0 : !es_i_cu_elf(data, image->bytes))
        return es_i_fail(why, ES_E_KERNEL, "CUDA image %u is not what its kind says", i);
    return ES_OK;
}

/* The cubin of the device's major version with the highest minor not above the device's; the PTX with the highest
 * version not above the device's. bytes = 0 where there is none; sms says what there is. */
static es_status es_i_cu_images_choose(const es_i_cu_device *device, const uint8_t *archive, uint64_t bytes,
                                       es_i_cu_image chosen[2], char sms[ES_CU_SMS], es_error *why)
{
    uint32_t own = (uint32_t)(device->major * 10 + device->minor);
    memset(chosen, 0, 2 * sizeof *chosen);
    sms[0] = '\0';
    if (bytes < ES_CU_ARCHIVE_HEADER || memcmp(archive, es_i_cu_magic, sizeof es_i_cu_magic) != 0 ||
        es_i_cu_number(archive + 12, 4) != 0)
        return es_i_fail(why, ES_E_KERNEL, "the CUDA code is no archive of images");
    uint32_t n = (uint32_t)es_i_cu_number(archive + 8, 4);
    if (n > (bytes - ES_CU_ARCHIVE_HEADER) / ES_CU_RECORD)
        return es_i_fail(why, ES_E_KERNEL, "the CUDA code is truncated: %u images are announced", n);
    for (uint32_t i = 0; i < n; i++) {
        es_i_cu_image image;
        es_status status = es_i_cu_image_read(archive, bytes, n, i, &image, why);
        if (status != ES_OK)
            return status;
        es_i_cu_image *best = &chosen[image.kind == ES_CU_CUBIN ? 0 : 1];
        int fits = image.sm <= own && (image.kind == ES_CU_PTX || image.sm / 10 == own / 10);
        if (fits && (best->bytes == 0 || image.sm > best->sm))
            *best = image;
        size_t used = strlen(sms);
        (void)snprintf(sms + used, ES_CU_SMS - used, "%ssm_%u", used > 0 ? ", " : "", image.sm);
    }
    return ES_OK;
}

static es_i_cu_result es_i_cu_image_load(es_i_cu_device *device, const uint8_t *archive, const es_i_cu_image *image,
                                         char *log, size_t log_bytes)
{
    int options[2] = {ES_CU_JIT_LOG, ES_CU_JIT_LOG_BYTES};
    void *values[2] = {log, (void *)(uintptr_t)(log_bytes - 1)};
    const uint8_t *data = archive + image->offset;
    void *aligned = NULL;
    if (image->kind == ES_CU_PTX)
        return device->api.module_load(&device->module, data, 2, options, values);
    if ((uintptr_t)data % 16 != 0) { /* the driver reads the ELF structures where they lie */
        if (image->bytes > SIZE_MAX || posix_memalign(&aligned, 16, (size_t)image->bytes) != 0)
            return ES_CU_NO_MEMORY;
        data = (const uint8_t *)memcpy(aligned, data, (size_t)image->bytes);
    }
    es_i_cu_result result = device->api.module_load(&device->module, data, 0, NULL, NULL);
    free(aligned);
    return result;
}

static es_status es_i_cu_module_load(es_i_cu_device *device, const uint8_t *archive, uint64_t bytes, es_error *why)
{
    es_i_cu_image chosen[2];
    char log[160] = {0}, sms[ES_CU_SMS];
    es_status status = es_i_cu_images_choose(device, archive, bytes, chosen, sms, why);
    if (status != ES_OK)
        return status;
    es_i_cu_result result = ES_CU_NO_BINARY;
    for (int i = 0; i < 2 && (result == ES_CU_NO_BINARY || result == ES_CU_INVALID_IMAGE); i++)
        if (chosen[i].bytes > 0) {
            result = es_i_cu_image_load(device, archive, &chosen[i], log, sizeof log);
            device->early = chosen[i].sm >= ES_CU_WAITS;
        }
    if (result == ES_CU_OK)
        return ES_OK;
    device->module = NULL;
    if (result == ES_CU_NO_BINARY)
        return es_i_fail(why, ES_E_DEVICE_ARCH, "compiled for %s, %s is sm_%d%d", sms[0] != '\0' ? sms : "no GPU",
                         device->name, device->major, device->minor);
    if (result == ES_CU_OLD_FOR_PTX)
        return es_i_fail(why, ES_E_DEVICE_OLD, "the NVIDIA driver for CUDA %d.%d is older than the kernels' PTX",
                         device->driver / 1000, device->driver % 1000 / 10);
    for (size_t i = 0; i < sizeof log; i++)
        log[i] = (char)(log[i] == '\n' ? '\0' : log[i]);
    status = es_i_cu_check(device, result, log[0] != '\0' ? log : "loading the kernels", why);
    return status == ES_E_DEVICE_LAUNCH ? ES_E_DEVICE_BUILD : status;
}

/* The block of a launch against what the loaded function can have; registers may allow less than the device. */
static es_status es_i_cu_launch_check(const es_i_cu_device *device, uint32_t index, es_error *why)
{
    const es_i_plan *plan = device->plan;
    const es_i_launch *launch = &plan->launches[index];
    const char *name = plan->strings + plan->kernels[launch->kernel].name;
    uint64_t threads = (uint64_t)launch->block[0] * launch->block[1] * launch->block[2];
    int most = 0;
    if (device->api.function_attribute(&most, ES_CU_MAX_THREADS, device->functions[launch->kernel]) == ES_CU_OK &&
        threads > (uint64_t)most)
        return es_i_fail(why, ES_E_DEVICE_BUILD, "kernel '%s' runs with at most %d threads a block, %llu are asked",
                         name, most, (unsigned long long)threads);
    return ES_OK;
}

static es_status es_i_cu_params_check(const es_i_cu_device *device, uint32_t index, es_error *why)
{
    const es_i_kernel *kernel = &device->plan->kernels[index];
    size_t offset = 0, bytes = 0;
    uint32_t n = 0;
    if (device->api.function_param == NULL)
        return ES_OK;
    void *function = device->functions[index];
    while (n < kernel->n_args && device->api.function_param(function, n, &offset, &bytes) == ES_CU_OK &&
           bytes == sizeof(es_i_cu_ptr))
        n++;
    if (n == kernel->n_args && device->api.function_param(function, n, &offset, &bytes) != ES_CU_OK)
        return ES_OK;
    return es_i_fail(why, ES_E_KERNEL, "kernel '%s' does not take %u pointers", device->plan->strings + kernel->name,
                     kernel->n_args);
}

es_status es_i_cu_kernels_load(es_i_cu_device *device, es_error *why)
{
    const es_i_plan *plan = device->plan;
    const es_i_kernel *first = &plan->kernels[0]; /* all have the same code, the plan was checked */
    const uint8_t *code = plan->data + plan->section[ES_CODE]->offset;
    es_status status = es_i_cu_module_load(device, code + first->code_offset, first->code_bytes, why);
    for (uint32_t i = 0; status == ES_OK && i < plan->n_kernels; i++) {
        const char *name = plan->strings + plan->kernels[i].name;
        es_i_cu_result result = device->api.module_function(&device->functions[i], device->module, name);
        if (result != ES_CU_OK) {
            status = es_i_cu_check(device, result, name, why);
            return status == ES_E_DEVICE_LAUNCH ? ES_E_DEVICE_BUILD : status;
        }
        status = es_i_cu_params_check(device, i, why);
    }
    for (uint32_t i = 0; status == ES_OK && i < plan->n_launches; i++)
        status = es_i_cu_launch_check(device, i, why);
    return status;
}
#endif
