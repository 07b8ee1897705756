/* Finds the OpenCL driver, chooses a device, and says what went wrong. */
#include "es_opencl.h"

#ifdef ES_WITH_OPENCL
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The loader's name, then where Android's vendors keep theirs. Once opened it stays: drivers leave threads behind. */
static const char *const es_i_cl_libraries[] = {
    "libOpenCL.so.1",
    "libOpenCL.so",
    "/vendor/lib64/libOpenCL.so",
    "/system/vendor/lib64/libOpenCL.so",
    "/system/lib64/libOpenCL.so",
    "/vendor/lib64/egl/libGLES_mali.so",
    "/system/vendor/lib64/egl/libGLES_mali.so",
    "libOpenCL-pixel.so",
};

#define ES_CL_NAME(result, name, arguments) "cl" #name "\0"
static const char es_i_cl_names[] = ES_CL_FUNCTIONS(ES_CL_NAME);
#undef ES_CL_NAME

#define ES_CL_COUNT(result, name, arguments) +1
ES_ASSERT_SIZE(es_i_cl_api, (0 ES_CL_FUNCTIONS(ES_CL_COUNT)) * sizeof(void *));
#undef ES_CL_COUNT

es_status es_i_cl_driver_open(es_i_cl_api *cl, es_error *why)
{
    const char *chosen = getenv("EDGESEQ_OPENCL_LIBRARY");
    void *library = chosen != NULL ? dlopen(chosen, RTLD_NOW | RTLD_LOCAL) : NULL;
    for (size_t i = 0; chosen == NULL && library == NULL && i < sizeof es_i_cl_libraries / sizeof(char *); i++)
        library = dlopen(es_i_cl_libraries[i], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return es_i_fail(why, ES_E_DEVICE_DRIVER, "there is no OpenCL driver: %s cannot be opened",
                         chosen != NULL ? chosen : "libOpenCL.so");
    /* Google's libOpenCL-pixel.so hands out its functions only this way (TensorFlow Lite, opencl_wrapper.cc). */
    void (*enable)(void) = NULL;
    void *(*find)(const char *) = NULL;
    *(void **)(void *)&enable = dlsym(library, "enableOpenCL");
    *(void **)(void *)&find = dlsym(library, "loadOpenCLPointer");
    if (enable != NULL && find != NULL)
        enable();
    unsigned char *place = (unsigned char *)cl; /* a pointer per name, in order */
    for (const char *name = es_i_cl_names; *name != '\0'; name += strlen(name) + 1, place += sizeof(void *)) {
        void *address = enable != NULL && find != NULL ? find(name) : dlsym(library, name);
        if (address == NULL)
            return es_i_fail(why, ES_E_DEVICE_OLD, "the OpenCL driver is too old: it lacks %s", name);
        memcpy(place, &address, sizeof address);
    }
    return ES_OK;
}

es_status es_i_cl_fail(es_error *why, int32_t code, int memory, const char *what)
{
    es_status status = ES_E_DEVICE_LAUNCH;
    if (code == ES_CL_ALLOCATION_FAILURE || (memory && code == ES_CL_OUT_OF_RESOURCES) ||
        (memory && code == ES_CL_INVALID_BUFFER_SIZE))
        status = ES_E_DEVICE_MEMORY;
    else if (code == ES_CL_OUT_OF_HOST_MEMORY)
        status = ES_E_HEAP;
    else if (code == ES_CL_DEVICE_NOT_AVAILABLE || code == ES_CL_OUT_OF_RESOURCES || code == ES_CL_INVALID_CONTEXT ||
             code == ES_CL_INVALID_COMMAND_QUEUE)
        status = ES_E_DEVICE_LOST;
    return es_i_fail(why, status, "%s: %s (OpenCL error %d)", what, es_status_text(status), (int)code);
}

static uint64_t es_i_cl_number(const es_i_cl_api *cl, es_i_cl_id id, uint32_t what, size_t bytes)
{
    uint64_t value = 0; /* little-endian: the low bytes are the value */
    return cl->GetDeviceInfo(id, what, bytes, &value, NULL) == 0 ? value : 0;
}

/* Appends what fits. */
static void es_i_cl_append(char *text, size_t capacity, const char *more)
{
    size_t used = strlen(text);
    while (used + 1 < capacity && *more != '\0')
        text[used++] = *more++;
    text[used] = '\0';
}

static void es_i_cl_text(const es_i_cl_api *cl, es_i_cl_id id, uint32_t what, char *text, size_t capacity)
{
    char whole[1024];
    size_t bytes = 0;
    text[0] = '\0';
    if (cl->GetDeviceInfo(id, what, sizeof whole, whole, &bytes) != 0 || bytes == 0 || bytes > sizeof whole)
        return;
    whole[bytes - 1] = '\0';
    es_i_cl_append(text, capacity, whole);
}

static int es_i_cl_lower(int c)
{
    return c >= 'A' && c <= 'Z' ? c + ('a' - 'A') : c;
}

static int es_i_cl_contains(const char *text, const char *part)
{
    for (;; text++) {
        size_t i = 0;
        while (part[i] != '\0' && es_i_cl_lower(text[i]) == es_i_cl_lower(part[i]))
            i++;
        if (part[i] == '\0')
            return 1;
        if (*text == '\0')
            return 0;
    }
}

/* How much a device is wanted: 0 not at all, 1 as the last resort, 2 a GPU. */
static int es_i_cl_rank(es_i_cl_device *device, const char *wanted)
{
    const es_i_cl_api *cl = &device->cl;
    char vendor[64], both[256];
    es_i_cl_text(cl, device->id, ES_CL_DEVICE_NAME, device->name, sizeof device->name);
    es_i_cl_text(cl, device->id, ES_CL_DEVICE_VENDOR, vendor, sizeof vendor);
    if (!es_i_cl_number(cl, device->id, ES_CL_DEVICE_AVAILABLE, sizeof(uint32_t)))
        return 0;
    if (wanted != NULL) {
        (void)snprintf(both, sizeof both, "%s %s", vendor, device->name);
        return es_i_cl_contains(both, wanted) ? 2 : 0;
    }
    return (es_i_cl_number(cl, device->id, ES_CL_DEVICE_TYPE, sizeof(uint64_t)) & ES_CL_TYPE_GPU) ? 2 : 1;
}

static es_status es_i_cl_describe(es_i_cl_device *device, es_error *why)
{
    const es_i_cl_api *cl = &device->cl;
    size_t bytes = 0;
    unsigned major = 0, minor = 0;
    es_i_cl_text(cl, device->id, ES_CL_DEVICE_NAME, device->name, sizeof device->name);
    es_i_cl_text(cl, device->id, ES_CL_DRIVER_VERSION, device->driver, sizeof device->driver);
    es_i_cl_text(cl, device->id, ES_CL_DEVICE_VERSION, device->version, sizeof device->version);
    if (cl->GetPlatformInfo(device->platform, ES_CL_PLATFORM_VERSION, sizeof device->platform_text - 1,
                            device->platform_text, &bytes) != 0)
        device->platform_text[0] = '\0';
    device->max_alloc = es_i_cl_number(cl, device->id, ES_CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof(uint64_t));
    device->cache = es_i_cl_number(cl, device->id, ES_CL_DEVICE_GLOBAL_MEM_CACHE_SIZE, sizeof(uint64_t));
    device->units = (uint32_t)es_i_cl_number(cl, device->id, ES_CL_DEVICE_MAX_COMPUTE_UNITS, sizeof(uint32_t));
    device->shared_memory = es_i_cl_number(cl, device->id, ES_CL_DEVICE_HOST_UNIFIED_MEMORY, sizeof(uint32_t)) != 0;
    /* "OpenCL 3.0 ..." */
    const char *v = device->version;
    if (strncmp(v, "OpenCL ", 7) == 0) {
        for (v += 7; *v >= '0' && *v <= '9'; v++)
            major = major * 10 + (unsigned)(*v - '0');
        for (v += *v == '.'; *v >= '0' && *v <= '9'; v++)
            minor = minor * 10 + (unsigned)(*v - '0');
    }
    if (major * 100 + minor < 102)
        return es_i_fail(why, ES_E_DEVICE_OLD, "%s speaks '%s', needed is OpenCL 1.2", device->name, device->version);
    return ES_OK;
}

enum { ES_CL_PLATFORMS = 16, ES_CL_DEVICES = 32 };

es_status es_i_cl_device_choose(es_i_cl_device *device, es_error *why)
{
    const es_i_cl_api *cl = &device->cl;
    const char *wanted = getenv("EDGESEQ_OPENCL_DEVICE");
    es_i_cl_platform platforms[ES_CL_PLATFORMS], platform = NULL;
    es_i_cl_id ids[ES_CL_DEVICES], best = NULL;
    uint32_t n_platforms = 0, n_ids = 0;
    int rank = 0;
    char seen[128] = "";
    if (cl->GetPlatformIDs(ES_CL_PLATFORMS, platforms, &n_platforms) != 0)
        n_platforms = 0;
    for (uint32_t p = 0; p < n_platforms && p < ES_CL_PLATFORMS; p++) {
        if (cl->GetDeviceIDs(platforms[p], 0xffffffffu, ES_CL_DEVICES, ids, &n_ids) != 0)
            continue;
        for (uint32_t i = 0; i < n_ids && i < ES_CL_DEVICES; i++) {
            device->id = ids[i];
            int better = es_i_cl_rank(device, wanted);
            es_i_cl_append(seen, sizeof seen, seen[0] != '\0' ? ", " : "");
            es_i_cl_append(seen, sizeof seen, device->name);
            if (better > rank) {
                rank = better;
                best = ids[i];
                platform = platforms[p];
            }
        }
    }
    device->id = best;
    device->platform = platform;
    if (best != NULL)
        return es_i_cl_describe(device, why);
    if (seen[0] == '\0')
        return es_i_fail(why, ES_E_DEVICE_NONE, "the OpenCL driver offers no device");
    return es_i_fail(why, ES_E_DEVICE_NONE, "no OpenCL device is called '%s'; there is %s",
                     wanted != NULL ? wanted : "available", seen);
}
#endif
