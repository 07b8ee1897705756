/* Drives a libFuzzer target without libFuzzer: `standalone N SEED FILE...` runs every file as it is and N mutations of
 * each, the same ones for the same seed. Most mutations get true checksums again, so that they reach deeper. */
#include "../src/es_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t next(uint64_t *seed)
{
    *seed += 0x9e3779b97f4a7c15u;
    uint64_t z = *seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static void sections_reseal(uint8_t *data, size_t size, const es_i_crc *crc)
{
    es_i_header header;
    memcpy(&header, data, sizeof header);
    size_t room = (size - sizeof header) / sizeof(es_i_section),
           n = header.n_sections < room ? header.n_sections : room;
    for (size_t i = 0; i < n; i++) {
        uint8_t *at = data + sizeof header + i * sizeof(es_i_section);
        es_i_section section;
        memcpy(&section, at, sizeof section);
        if (section.offset > size || section.bytes > size - section.offset)
            continue;
        section.crc = es_i_crc32(crc, 0, data + section.offset, (size_t)section.bytes);
        memcpy(at, &section, sizeof section);
    }
    header.header_crc = 0;
    uint32_t sum = es_i_crc32(crc, 0, &header, sizeof header);
    header.header_crc = es_i_crc32(crc, sum, data + sizeof header, n * sizeof(es_i_section));
    memcpy(data, &header, sizeof header);
}

static void reseal(uint8_t *data, size_t size)
{
    static es_i_crc crc;
    es_i_crc_init(&crc);
    if (size >= sizeof(es_i_header) && memcmp(data, "EDGESEQ", 8) == 0)
        sections_reseal(data, size, &crc);
    if (size >= 16 && memcmp(data, "ESSTATE", 8) == 0) {
        uint32_t sum = es_i_crc32(&crc, 0, data + 16, size - 16);
        memcpy(data + 12, &sum, sizeof sum);
    }
}

/* Returns the new size. Most damage goes to the first `plan` bytes, where the structures are. */
static size_t mutate(uint8_t *data, size_t size, size_t plan, uint64_t *seed)
{
    static const uint64_t odd[] = {0,
                                   1,
                                   2,
                                   63,
                                   64,
                                   0x7fffffff,
                                   0x80000000u,
                                   0xffffffffu,
                                   0x7fffffffffffffffu,
                                   0x8000000000000000u,
                                   0xffffffffffffffffu,
                                   0xffffffffffffffc0u};
    size_t changes = 1 + next(seed) % 3;
    for (size_t i = 0; i < changes && size > 16; i++) {
        size_t at = next(seed) % (next(seed) % 8 > 0 && plan < size ? plan : size);
        uint64_t value = odd[next(seed) % (sizeof odd / sizeof *odd)], small = next(seed) % 9;
        switch (next(seed) % 6) {
        case 0: data[at] ^= (uint8_t)(1u << next(seed) % 8); break;
        case 1: data[at] = (uint8_t)next(seed); break;
        case 2:
            at = at / 4 * 4;
            memcpy(data + at, &value, size - at < 4 ? size - at : 4);
            break;
        case 3:
            at = at / 8 * 8;
            memcpy(data + at, &value, size - at < 8 ? size - at : 8);
            break;
        case 4:
            at = at / 4 * 4;
            memcpy(data + at, &small, size - at < 4 ? size - at : 4);
            break;
        default: size = next(seed) % 4 == 0 ? at : size; break;
        }
    }
    if (next(seed) % 8 > 0)
        reseal(data, size);
    return size;
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return fprintf(stderr, "usage: standalone N SEED FILE...\n"), 2;
    uint64_t n = strtoull(argv[1], NULL, 10), seed = strtoull(argv[2], NULL, 10);
    for (int f = 3; f < argc; f++) {
        FILE *file = fopen(argv[f], "rb");
        if (file == NULL || fseek(file, 0, SEEK_END) != 0)
            return fprintf(stderr, "%s cannot be read\n", argv[f]), 2;
        size_t size = (size_t)ftell(file);
        uint8_t *whole = (uint8_t *)malloc(size + 1), *copy = (uint8_t *)malloc(size + 1);
        rewind(file);
        if (whole == NULL || copy == NULL || fread(whole, 1, size, file) != size)
            return fprintf(stderr, "%s cannot be read\n", argv[f]), 2;
        fclose(file);
        (void)LLVMFuzzerTestOneInput(whole, size);
        for (uint64_t i = 0; i < n; i++) {
            memcpy(copy, whole, size);
            size_t left = mutate(copy, size, 4096, &seed);
            (void)LLVMFuzzerTestOneInput(copy, left);
        }
        free(whole);
        free(copy);
    }
    puts("ok");
    return 0;
}
