/* Which instruction sets this CPU has, and whether a kernel table belongs to a plan and to this CPU. */
#include "es_internal.h"

#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

/* leaf, subleaf, register (0 eax .. 3 edx), bit, and which register state the system must save:
 * 0 none, 1 ymm, 2 zmm, 3 tiles. */
typedef struct {
    const char *name;
    uint32_t leaf, subleaf;
    uint8_t reg, bit, state;
} es_i_feature;

static const es_i_feature es_i_features[] = {
    {"sse3", 1, 0, 2, 0, 0},
    {"ssse3", 1, 0, 2, 9, 0},
    {"sse4.1", 1, 0, 2, 19, 0},
    {"sse4.2", 1, 0, 2, 20, 0},
    {"popcnt", 1, 0, 2, 23, 0},
    {"avx", 1, 0, 2, 28, 1},
    {"fma", 1, 0, 2, 12, 1},
    {"f16c", 1, 0, 2, 29, 1},
    {"avx2", 7, 0, 1, 5, 1},
    {"bmi", 7, 0, 1, 3, 0},
    {"bmi2", 7, 0, 1, 8, 0},
    {"avx512f", 7, 0, 1, 16, 2},
    {"avx512dq", 7, 0, 1, 17, 2},
    {"avx512cd", 7, 0, 1, 28, 2},
    {"avx512bw", 7, 0, 1, 30, 2},
    {"avx512vl", 7, 0, 1, 31, 2},
    {"avx512vbmi", 7, 0, 2, 1, 2},
    {"avx512vbmi2", 7, 0, 2, 6, 2},
    {"avx512vnni", 7, 0, 2, 11, 2},
    {"avx512bitalg", 7, 0, 2, 12, 2},
    {"avx512vpopcntdq", 7, 0, 2, 14, 2},
    {"avx512ifma", 7, 0, 1, 21, 2},
    {"avx512fp16", 7, 0, 3, 23, 2},
    {"avx512bf16", 7, 1, 0, 5, 2},
    {"avxvnni", 7, 1, 0, 4, 1},
    {"avxvnniint8", 7, 1, 3, 4, 1},
    {"avxifma", 7, 1, 0, 23, 1},
    {"gfni", 7, 0, 2, 8, 0},
    {"amx-tile", 7, 0, 3, 24, 3},
    {"amx-int8", 7, 0, 3, 25, 3},
    {"amx-bf16", 7, 0, 3, 22, 3},
    {"lzcnt", 0x80000001u, 0, 2, 5, 0},
};

/* XCR0: bits 1-2 ymm, 5-7 zmm, 17-18 tiles. */
static int es_i_state_saved(uint8_t state)
{
    static const uint32_t masks[] = {0, 0x6, 0xe6, 0x60000};
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (state == 0)
        return 1;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !((ecx >> 27) & 1u))
        return 0;
    __asm__ __volatile__("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax & masks[state]) == masks[state];
}

static int es_i_has(const es_i_feature *feature)
{
    uint32_t r[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(feature->leaf, feature->subleaf, &r[0], &r[1], &r[2], &r[3]))
        return 0;
    return ((r[feature->reg] >> feature->bit) & 1u) && es_i_state_saved(feature->state);
}

#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Bits of AT_HWCAP (word 0) and AT_HWCAP2 (word 1), from the kernel's ABI. */
typedef struct {
    const char *name;
    uint8_t word, bit;
} es_i_feature;

static const es_i_feature es_i_features[] = {
    {"neon", 0, 1}, {"crc", 0, 7},  {"lse", 0, 8},   {"fp16", 0, 10}, {"rdm", 0, 12}, {"dotprod", 0, 20},
    {"sve", 0, 22}, {"sve2", 1, 1}, {"i8mm", 1, 13}, {"bf16", 1, 14}, {"sme", 1, 23},
};

static int es_i_has(const es_i_feature *feature)
{
    unsigned long word = getauxval(feature->word == 0 ? 16ul : 26ul);
    return (int)((word >> feature->bit) & 1ul);
}

#else
typedef struct {
    const char *name;
} es_i_feature;
static const es_i_feature es_i_features[] = {{""}};

static int es_i_has(const es_i_feature *feature)
{
    (void)feature;
    return 0;
}
#endif

#if defined(__x86_64__)
enum { ES_FLUSH = 0x8040 }; /* MXCSR: results and operands */

uint64_t es_i_float_mode_flush(void)
{
    uint32_t before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | ES_FLUSH);
    return before;
}

void es_i_float_mode_set(uint64_t mode)
{
    __builtin_ia32_ldmxcsr((uint32_t)mode);
}
#elif defined(__aarch64__)
enum { ES_FLUSH = 1 << 24 }; /* FPCR.FZ */

uint64_t es_i_float_mode_flush(void)
{
    uint64_t before;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(before));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(before | ES_FLUSH) : "memory");
    return before;
}

void es_i_float_mode_set(uint64_t mode)
{
    __asm__ __volatile__("msr fpcr, %0" : : "r"(mode) : "memory");
}
#else
uint64_t es_i_float_mode_flush(void)
{
    return 0;
}

void es_i_float_mode_set(uint64_t mode)
{
    (void)mode;
}
#endif

int es_cpu_has(const char *feature)
{
    if (feature == NULL)
        return -1;
    for (size_t i = 0; i < sizeof es_i_features / sizeof es_i_features[0]; i++)
        if (strcmp(feature, es_i_features[i].name) == 0)
            return es_i_has(&es_i_features[i]);
    return -1;
}

static es_status es_i_features_check(const es_kernel_table *table, es_error *why)
{
    for (uint32_t i = 0; i < table->n_features; i++) {
        const char *name = table->features[i];
        int has = es_cpu_has(name);
        if (has < 0)
            return es_i_fail(why, ES_E_FEATURE, "the kernels need '%s', which this runtime cannot look for",
                             name != NULL ? name : "");
        if (has == 0)
            return es_i_fail(why, ES_E_FEATURE, "this CPU lacks %s, which the kernels need", name);
    }
    return ES_OK;
}

es_status es_i_table_check(const es_i_plan *plan, const es_i_crc *crc, const es_kernel_table *table, es_error *why)
{
    if (table->struct_size < sizeof *table)
        return es_i_fail(why, ES_E_KERNEL_TABLE, "the kernel table is of another version");
    uint32_t id = 0;
    for (uint32_t kind = ES_KERNELS; kind <= ES_ARGS; kind++)
        id = es_i_crc32(crc, id, plan->data + plan->section[kind]->offset, (size_t)plan->section[kind]->bytes);
    if (id != table->plan_id)
        return es_i_fail(why, ES_E_PLAN_ID, "the library was compiled for plan %08x, the bundle is plan %08x",
                         table->plan_id, id);
    uint32_t n = plan->n_kernels > 0 && plan->kernels[0].backend != ES_BACKEND_CPU ? 0 : plan->n_kernels;
    if (table->n_kernels != n)
        return es_i_fail(why, ES_E_KERNEL_TABLE, "the library has %u kernels, the bundle needs %u", table->n_kernels,
                         n);
    for (uint32_t i = 0; i < n; i++) {
        const char *name = plan->strings + plan->kernels[i].name;
        if (table->kernels[i].fn == NULL || strcmp(table->kernels[i].name, name) != 0)
            return es_i_fail(why, ES_E_KERNEL_TABLE, "kernel %u is '%s' in the library, '%s' in the bundle", i,
                             table->kernels[i].name, name);
    }
    return es_i_features_check(table, why);
}
