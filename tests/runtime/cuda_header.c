/* es_cuda.h against NVIDIA's cuda.h, where there is one: numbers, sizes, versions of names. Prints "ok". */
#include <cuda.h>

#include <stdio.h>
#include <string.h>

#include "es_cuda.h"

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #ours)
SAME(ES_CU_NO_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(ES_CU_DEINITIALIZED, CUDA_ERROR_DEINITIALIZED);
SAME(ES_CU_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(ES_CU_INVALID_IMAGE, CUDA_ERROR_INVALID_IMAGE);
SAME(ES_CU_NO_BINARY, CUDA_ERROR_NO_BINARY_FOR_GPU);
SAME(ES_CU_ECC, CUDA_ERROR_ECC_UNCORRECTABLE);
SAME(ES_CU_OLD_FOR_PTX, CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
SAME(ES_CU_ILLEGAL_ADDRESS, CUDA_ERROR_ILLEGAL_ADDRESS);
SAME(ES_CU_TIMEOUT, CUDA_ERROR_LAUNCH_TIMEOUT);
SAME(ES_CU_DESTROYED, CUDA_ERROR_CONTEXT_IS_DESTROYED);
SAME(ES_CU_ASSERT, CUDA_ERROR_ASSERT);
SAME(ES_CU_STACK, CUDA_ERROR_HARDWARE_STACK_ERROR);
SAME(ES_CU_LAUNCH_FAILED, CUDA_ERROR_LAUNCH_FAILED);
SAME(ES_CU_UNKNOWN, CUDA_ERROR_UNKNOWN);
SAME(ES_CU_PROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(ES_CU_L2_BYTES, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE);
SAME(ES_CU_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(ES_CU_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(ES_CU_MAX_THREADS, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
SAME(ES_CU_JIT_LOG, CU_JIT_ERROR_LOG_BUFFER);
SAME(ES_CU_JIT_LOG_BYTES, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES);
SAME(ES_CU_NON_BLOCKING, CU_STREAM_NON_BLOCKING);
SAME(ES_CU_EVENT_DEFAULT, CU_EVENT_DEFAULT);
SAME(ES_CU_EVENT_NO_TIMING, CU_EVENT_DISABLE_TIMING);
SAME(ES_CU_CAPTURE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME(ES_CU_PROGRAMMATIC, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
SAME(sizeof(es_i_cu_ptr), sizeof(CUdeviceptr));
SAME(sizeof(es_i_cu_attribute), sizeof(CUlaunchAttribute));
SAME(offsetof(es_i_cu_attribute, value), offsetof(CUlaunchAttribute, value));
SAME(sizeof(es_i_cu_config), sizeof(CUlaunchConfig));
SAME(offsetof(es_i_cu_config, queue), offsetof(CUlaunchConfig, hStream));
SAME(offsetof(es_i_cu_config, attributes), offsetof(CUlaunchConfig, attrs));
SAME(offsetof(es_i_cu_config, n_attributes), offsetof(CUlaunchConfig, numAttrs));

#define TEXT_OF(name) #name
#define MAPPED(name) TEXT_OF(name)
/* The names that the header maps its own to; newer versions than ours are other functions. */
static const char *const mapped[] = {MAPPED(cuDeviceTotalMem),  MAPPED(cuDevicePrimaryCtxRelease),
                                     MAPPED(cuCtxPushCurrent),  MAPPED(cuCtxPopCurrent),
                                     MAPPED(cuMemAlloc),        MAPPED(cuMemFree),
                                     MAPPED(cuMemGetInfo),      MAPPED(cuMemAllocHost),
                                     MAPPED(cuMemcpyHtoDAsync), MAPPED(cuMemcpyDtoHAsync),
                                     MAPPED(cuMemcpyDtoDAsync), MAPPED(cuMemsetD8Async),
                                     MAPPED(cuStreamCreate),    MAPPED(cuStreamDestroy),
                                     MAPPED(cuEventDestroy),    MAPPED(cuStreamBeginCapture),
                                     MAPPED(cuLaunchKernel),    MAPPED(cuModuleLoadDataEx),
                                     MAPPED(cuGraphLaunch),     MAPPED(cuGraphInstantiate)};

#define SYMBOL(field, symbol, parameters) symbol,
int main(void)
{
    static const char *const ours[] = {ES_CU_API(SYMBOL)};
    for (size_t i = 0; i < sizeof mapped / sizeof *mapped; i++) {
        int found = 0;
        for (size_t j = 0; j < sizeof ours / sizeof *ours; j++)
            found |= strcmp(mapped[i], ours[j]) == 0;
        if (!found)
            return printf("%s is not used\n", mapped[i]), 1;
    }
    puts("ok");
    return 0;
}
