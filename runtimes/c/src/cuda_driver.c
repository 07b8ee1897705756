/* The CUDA driver: its library, opened at run time, a device of it, and its errors as sentences. */
#include "es_cuda.h"

#ifdef ES_WITH_CUDA

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ES_CU_SYMBOL(field, symbol, parameters) {symbol, offsetof(es_i_cu_api, field)},
static const struct {
    const char *name;
    size_t at;
} es_i_cu_symbols[] = {ES_CU_API(ES_CU_SYMBOL)};

static int es_i_cu_sticky(es_i_cu_result result)
{
    return result == ES_CU_ECC || result == ES_CU_CONTAINED || result == ES_CU_ILLEGAL_ADDRESS ||
           result == ES_CU_TIMEOUT || result == ES_CU_DESTROYED || result == ES_CU_ASSERT ||
           (result >= ES_CU_STACK && result <= ES_CU_LAUNCH_FAILED) || result == ES_CU_DEINITIALIZED ||
           result == ES_CU_UNKNOWN;
}

es_status es_i_cu_check(es_i_cu_device *device, es_i_cu_result result, const char *what, es_error *why)
{
    const char *name = NULL, *text = NULL;
    if (result == ES_CU_OK)
        return ES_OK;
    (void)device->api.error_name(result, &name);
    (void)device->api.error_text(result, &text);
    int lost = es_i_cu_sticky(result);
    if (!__atomic_exchange_n(&device->noting, 1, __ATOMIC_ACQUIRE)) {
        if (!__atomic_load_n(&device->lost, __ATOMIC_RELAXED)) /* what comes after a loss says nothing new */
            (void)snprintf(device->failed, sizeof device->failed, "%s: %s (%d)", what, text != NULL ? text : "",
                           result);
        __atomic_store_n(&device->noting, 0, __ATOMIC_RELEASE);
    }
    if (lost)
        __atomic_store_n(&device->lost, 1, __ATOMIC_RELEASE);
    return es_i_fail(why, lost ? ES_E_DEVICE_LOST : ES_E_DEVICE_LAUNCH, "CUDA: %s failed%s: %s (%s, %d)", what,
                     lost ? ", the device is lost" : "", text != NULL ? text : "no message",
                     name != NULL ? name : "unknown", result);
}

es_status es_i_cu_enter(es_i_cu_device *device, es_error *why)
{
    if (__atomic_load_n(&device->lost, __ATOMIC_ACQUIRE))
        return es_i_fail(why, ES_E_DEVICE_LOST, "CUDA: %s was lost in an earlier call: open the model again",
                         device->name);
    return es_i_cu_check(device, device->api.context_push(device->context), "entering the context", why);
}

void es_i_cu_leave(es_i_cu_device *device)
{
    void *popped = NULL;
    (void)device->api.context_pop(&popped);
}

es_status es_i_cu_alloc(es_i_cu_device *device, uint64_t bytes, const char *what, es_i_cu_ptr *address, es_error *why)
{
    size_t available = 0, total = 0;
    *address = 0;
    es_i_cu_result result =
        bytes > SIZE_MAX ? ES_CU_NO_MEMORY : device->api.memory_alloc(address, bytes > 0 ? (size_t)bytes : 1);
    if (result == ES_CU_OK)
        return ES_OK;
    *address = 0;
    if (result != ES_CU_NO_MEMORY)
        return es_i_cu_check(device, result, what, why);
    (void)device->api.memory_info(&available, &total);
    return es_i_fail(why, ES_E_DEVICE_MEMORY, "%s need %llu bytes on %s, where %llu of %llu are free", what,
                     (unsigned long long)bytes, device->name, (unsigned long long)available, (unsigned long long)total);
}

/* The version comes first: it explains why a symbol is missing. */
static es_status es_i_cu_symbols_find(es_i_cu_device *device, es_error *why)
{
    es_i_cu_result (*version)(int *) = NULL;
    void *symbol = dlsym(device->api.library, "cuDriverGetVersion");
    memcpy(&version, &symbol, sizeof version);
    if (symbol == NULL || version(&device->driver) != ES_CU_OK)
        return es_i_fail(why, ES_E_DEVICE_OLD, "the NVIDIA driver does not tell its version");
    if (device->driver < ES_CU_LEAST_DRIVER)
        return es_i_fail(why, ES_E_DEVICE_OLD, "the NVIDIA driver is for CUDA %d.%d, this bundle needs %d.%d or newer",
                         device->driver / 1000, device->driver % 1000 / 10, ES_CU_LEAST_DRIVER / 1000,
                         ES_CU_LEAST_DRIVER % 1000 / 10);
    for (size_t i = 0; i < sizeof es_i_cu_symbols / sizeof es_i_cu_symbols[0]; i++) {
        symbol = dlsym(device->api.library, es_i_cu_symbols[i].name);
        if (symbol == NULL)
            return es_i_fail(why, ES_E_DEVICE_OLD, "the NVIDIA driver for CUDA %d.%d lacks %s", device->driver / 1000,
                             device->driver % 1000 / 10, es_i_cu_symbols[i].name);
        memcpy((char *)&device->api + es_i_cu_symbols[i].at, &symbol, sizeof symbol);
    }
    symbol = dlsym(device->api.library, "cuFuncGetParamInfo");
    memcpy(&device->api.function_param, &symbol, sizeof symbol);
    symbol = dlsym(device->api.library, "cuLaunchKernelEx");
    memcpy(&device->api.launch_early, &symbol, sizeof symbol);
    return ES_OK;
}

static es_status es_i_cu_library_open(es_i_cu_device *device, es_error *why)
{
    const char *given = getenv("EDGESEQ_CUDA_LIBRARY");
    const char *file = given != NULL && given[0] != '\0' ? given : "libcuda.so.1";
    /* NODELETE: the driver's own threads outlive its last user */
    device->api.library = dlopen(file, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (device->api.library == NULL) {
        const char *words = dlerror();
        return es_i_fail(why, ES_E_DEVICE_DRIVER, "the NVIDIA driver cannot be opened: %s",
                         words != NULL ? words : file);
    }
    return es_i_cu_symbols_find(device, why);
}

/* EDGESEQ_CUDA_DEVICE, or the first. */
static es_status es_i_cu_ordinal(int count, int *ordinal, es_error *why)
{
    const char *given = getenv("EDGESEQ_CUDA_DEVICE");
    char *end = NULL;
    *ordinal = 0;
    if (count < 1)
        return es_i_fail(why, ES_E_DEVICE_NONE, "the NVIDIA driver offers no device");
    if (given == NULL || given[0] == '\0')
        return ES_OK;
    long asked = strtol(given, &end, 10);
    if (given[0] < '0' || given[0] > '9' || *end != '\0' || asked >= count)
        return es_i_fail(why, ES_E_DEVICE_NONE, "EDGESEQ_CUDA_DEVICE is '%.40s', expected a number from 0 to %d", given,
                         count - 1);
    *ordinal = (int)asked;
    return ES_OK;
}

static es_status es_i_cu_device_find(es_i_cu_device *device, es_error *why)
{
    int count = 0, ordinal = 0;
    es_i_cu_result result = device->api.init(0);
    if (result == ES_CU_OK)
        result = device->api.device_count(&count);
    if (result == ES_CU_NO_DEVICE)
        count = 0;
    else if (result != ES_CU_OK) { /* stub library, kernel module of another version, no permission, ... */
        (void)es_i_cu_check(device, result, "starting the driver", why);
        return ES_E_DEVICE_DRIVER;
    }
    es_status status = es_i_cu_ordinal(count, &ordinal, why);
    if (status != ES_OK)
        return status;
    const struct {
        int attribute, *value;
    } facts[] = {{ES_CU_MAJOR, &device->major},
                 {ES_CU_MINOR, &device->minor},
                 {ES_CU_PROCESSORS, &device->processors},
                 {ES_CU_L2_BYTES, &device->l2_bytes}};
    result = device->api.device_get(&device->id, ordinal);
    if (result == ES_CU_OK)
        result = device->api.device_name(device->name, (int)sizeof device->name - 1, device->id);
    for (size_t i = 0; result == ES_CU_OK && i < sizeof facts / sizeof facts[0]; i++)
        result = device->api.device_attribute(facts[i].value, facts[i].attribute, device->id);
    if (result == ES_CU_OK)
        result = device->api.context_retain(&device->context, device->id);
    device->retained = result == ES_CU_OK;
    status = es_i_cu_check(device, result, "opening the device", why); /* another process may have it for itself */
    if (status != ES_E_DEVICE_LAUNCH)
        return status;
    return result == ES_CU_NO_MEMORY ? ES_E_DEVICE_MEMORY : ES_E_DEVICE_NONE;
}

es_status es_i_cu_driver_open(es_i_cu_device *device, es_error *why)
{
    es_status status = es_i_cu_library_open(device, why);
    return status == ES_OK ? es_i_cu_device_find(device, why) : status;
}

void es_i_cu_driver_close(es_i_cu_device *device)
{
    if (device->retained)
        (void)device->api.context_release(device->id);
    if (device->api.library != NULL)
        (void)dlclose(device->api.library);
}
#endif
