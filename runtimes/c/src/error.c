/* Sentences: a fixed one per status, and one with the values for the calls that can explain. */
#include "es_internal.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <time.h>

es_status es_i_fail(es_error *why, es_status status, const char *format, ...)
{
    if (why != NULL && why->struct_size > offsetof(es_error, text)) {
        size_t room = why->struct_size - offsetof(es_error, text);
        va_list values;
        va_start(values, format);
        (void)vsnprintf(why->text, room < sizeof why->text ? room : sizeof why->text, format, values);
        va_end(values);
    }
    return status;
}

uint64_t es_i_now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint32_t es_abi_version(void)
{
    return ES_ABI_VERSION;
}

const char *es_status_text(es_status status)
{
    switch (status) {
    case ES_OK: return "done";
    case ES_E_NULL: return "a pointer that must not be NULL is";
    case ES_E_STRUCT: return "struct_size is too small";
    case ES_E_RANGE: return "an index or a count is out of range";
    case ES_E_TOKEN: return "a token id is not in the vocabulary";
    case ES_E_NO_TOKENS: return "the model takes no tokens";
    case ES_E_ROOM: return "the buffer is too small";
    case ES_E_NAME: return "no input or output has this name";
    case ES_E_OTHER_MODEL: return "the sessions belong to different models";
    case ES_E_NO_LOGITS: return "there are no logits: nothing was run since create, reset or load";
    case ES_E_SAMPLER: return "a sampler parameter is out of range";
    case ES_E_NAN: return "no logit is a number";
    case ES_E_TOKENIZER: return "the bundle has no tokenizer of its own";
    case ES_E_ALIGN: return "a bundle in memory must be aligned to 64 bytes";
    case ES_E_OPEN: return "the file cannot be opened";
    case ES_E_MAP: return "the file cannot be mapped";
    case ES_E_THREAD: return "a thread cannot be started";
    case ES_E_CORE: return "a thread cannot be pinned to a core";
    case ES_E_HEAP: return "there is not enough memory";
    case ES_E_SMALL: return "the memory is smaller than es_session_need";
    case ES_E_TRUNCATED: return "the bundle is truncated";
    case ES_E_MAGIC: return "this is not a bundle";
    case ES_E_VERSION: return "the bundle's version is not known to this runtime";
    case ES_E_FILE_BYTES: return "the bundle's size is not the one it states";
    case ES_E_HEADER_CRC: return "the bundle's header is damaged";
    case ES_E_SECTION_KIND: return "a section is unknown, missing or there twice";
    case ES_E_SECTION_ALIGN: return "a section is misaligned";
    case ES_E_SECTION_BOUNDS: return "a section lies outside the file or over another";
    case ES_E_SECTION_END: return "the last section does not end with the file";
    case ES_E_SECTION_GAP: return "the gap before a section is not zero";
    case ES_E_SECTION_COUNT: return "a section's count is not its size";
    case ES_E_SECTION_CRC: return "a section is damaged";
    case ES_E_STRINGS: return "the strings do not run from NUL to NUL";
    case ES_E_STRING: return "a name lies outside the strings";
    case ES_E_ENUM: return "a number stands for nothing known";
    case ES_E_DIMS: return "a tensor's shape disagrees with its size";
    case ES_E_TENSOR: return "a weight is misplaced";
    case ES_E_SLOT: return "a state slot is misplaced";
    case ES_E_AXIS: return "a state slot's time axis is wrong";
    case ES_E_IO: return "an input or output is misplaced";
    case ES_E_ROLE: return "tokens, position or logits are of the wrong kind";
    case ES_E_GRAPH: return "the graphs are not in order, or the step graph is missing";
    case ES_E_KERNEL: return "a kernel's code is misplaced";
    case ES_E_LAUNCH: return "a launch is wrong";
    case ES_E_ARG: return "an argument lies outside its space, or a weight would be written";
    case ES_E_WEIGHTS_CRC: return "the weights are damaged";
    case ES_E_BUNDLE_TOKENIZER: return "the tokenizer section is wrong";
    case ES_E_PLAN_ID: return "the library and the bundle were not compiled together";
    case ES_E_KERNEL_TABLE: return "the library's kernels are not the bundle's";
    case ES_E_BACKEND: return "the bundle needs a backend that this runtime lacks";
    case ES_E_FEATURE: return "this CPU lacks an instruction set that the kernels use";
    case ES_E_STATE_TRUNCATED: return "the saved state is truncated";
    case ES_E_STATE_MAGIC: return "this is not a saved state";
    case ES_E_STATE_VERSION: return "the saved state's version is not known to this runtime";
    case ES_E_STATE_CRC: return "the saved state is damaged";
    case ES_E_STATE_FOREIGN: return "the saved state belongs to another model";
    case ES_E_STATE_POSITION: return "the saved state lies beyond the context";
    case ES_E_STATE_SIZE: return "the saved state's size is not this model's";
    case ES_E_FULL: return "the sequence would outgrow the context";
    case ES_E_SESSIONS: return "sessions still use the model";
    case ES_E_DEVICE_DRIVER: return "the GPU's driver library cannot be opened";
    case ES_E_DEVICE_OLD: return "the GPU's driver is too old";
    case ES_E_DEVICE_NONE: return "the driver offers no such device";
    case ES_E_DEVICE_MEMORY: return "there is not enough memory on the device";
    case ES_E_DEVICE_BUILD: return "the driver cannot build the kernels";
    case ES_E_DEVICE_ARCH: return "the bundle was compiled for another kind of device";
    case ES_E_DEVICE_LAUNCH: return "the driver refused a launch or a copy";
    case ES_E_DEVICE_LOST: return "the device was lost: open the model again";
    default: return "unknown status";
    }
}
