/* Reads the header and the section table of a bundle. Nothing is used before it was checked. */
#include "es_internal.h"

#include <string.h>

static const char es_i_magic[8] = {'E', 'D', 'G', 'E', 'S', 'E', 'Q', '\0'};

static const struct {
    const char *name;
    uint32_t record; /* bytes; 1 where the section is not made of records */
} es_i_kinds[ES_N_KINDS + 1] = {
    {"", 1},
    {"META", 1},
    {"STRINGS", 1},
    {"TENSORS", sizeof(es_i_tensor)},
    {"SLOTS", sizeof(es_i_slot)},
    {"IO", sizeof(es_i_io)},
    {"GRAPHS", sizeof(es_i_graph)},
    {"KERNELS", sizeof(es_i_kernel)},
    {"LAUNCHES", sizeof(es_i_launch)},
    {"ARGS", sizeof(es_i_arg)},
    {"CODE", 1},
    {"TOKENIZER", 1},
    {"WEIGHTS", 1},
};

static es_status es_i_header_check(const es_i_header *header, const es_i_crc *crc, uint64_t bytes, es_error *why)
{
    if (memcmp(header->magic, es_i_magic, sizeof es_i_magic) != 0)
        return es_i_fail(why, ES_E_MAGIC, "not a bundle: it does not start with EDGESEQ");
    if (header->version != 1)
        return es_i_fail(why, ES_E_VERSION, "bundle version %u, this runtime reads version 1", header->version);
    if (header->file_bytes > bytes)
        return es_i_fail(why, ES_E_TRUNCATED, "truncated: %llu of %llu bytes", (unsigned long long)bytes,
                         (unsigned long long)header->file_bytes);
    if (header->file_bytes != bytes)
        return es_i_fail(why, ES_E_FILE_BYTES, "%llu bytes follow the bundle's end",
                         (unsigned long long)(bytes - header->file_bytes));
    if (header->n_sections != ES_N_KINDS)
        return es_i_fail(why, ES_E_SECTION_KIND, "%u sections instead of %d", header->n_sections, ES_N_KINDS);
    uint64_t table = (uint64_t)header->n_sections * sizeof(es_i_section);
    if (table > bytes - sizeof *header)
        return es_i_fail(why, ES_E_TRUNCATED, "truncated: the section table needs %llu bytes",
                         (unsigned long long)table);
    es_i_header blank = *header;
    blank.header_crc = 0;
    uint32_t sum = es_i_crc32(crc, 0, &blank, sizeof blank);
    sum = es_i_crc32(crc, sum, header + 1, (size_t)table);
    if (sum != header->header_crc)
        return es_i_fail(why, ES_E_HEADER_CRC, "header checksum %08x, computed %08x", header->header_crc, sum);
    return ES_OK;
}

/* One entry of the table: kind, place, size. `end` is where the section before ended; the gap must be zero. */
static es_status es_i_section_check(const es_i_plan *plan, const es_i_section *section, uint64_t end, uint64_t bytes,
                                    es_error *why)
{
    if (section->kind < 1 || section->kind > ES_N_KINDS)
        return es_i_fail(why, ES_E_SECTION_KIND, "section kind %u is unknown", section->kind);
    const char *name = es_i_kinds[section->kind].name;
    if (plan->section[section->kind] != NULL)
        return es_i_fail(why, ES_E_SECTION_KIND, "section %s is there twice", name);
    uint64_t alignment = section->kind == ES_WEIGHTS ? 4096 : 64;
    if (section->offset % alignment != 0)
        return es_i_fail(why, ES_E_SECTION_ALIGN, "section %s starts at %llu, which is misaligned", name,
                         (unsigned long long)section->offset);
    if (section->offset > bytes || section->bytes > bytes - section->offset)
        return es_i_fail(why, ES_E_SECTION_BOUNDS, "section %s ends beyond the file", name);
    if (section->offset < end)
        return es_i_fail(why, ES_E_SECTION_BOUNDS, "section %s overlaps the one before", name);
    if (section->offset - end >= alignment)
        return es_i_fail(why, ES_E_SECTION_GAP, "section %s starts %llu bytes late", name,
                         (unsigned long long)(section->offset - end));
    uint32_t record = es_i_kinds[section->kind].record;
    if (section->bytes % record != 0 || section->count != section->bytes / record)
        return es_i_fail(why, ES_E_SECTION_COUNT, "section %s has %llu bytes for %llu records of %u", name,
                         (unsigned long long)section->bytes, (unsigned long long)section->count, record);
    if (record > 1 && section->count > UINT32_MAX)
        return es_i_fail(why, ES_E_SECTION_COUNT, "section %s has more records than a number can name", name);
    for (uint64_t i = end; i < section->offset; i++)
        if (plan->data[i] != 0)
            return es_i_fail(why, ES_E_SECTION_GAP, "byte %llu before section %s is not zero", (unsigned long long)i,
                             name);
    return ES_OK;
}

static es_status es_i_sections_check(es_i_plan *plan, const es_i_crc *crc, uint64_t bytes, es_error *why)
{
    const es_i_section *table = (const es_i_section *)(const void *)(plan->header + 1);
    uint64_t end = sizeof *plan->header + plan->header->n_sections * sizeof *table;
    for (uint32_t i = 0; i < plan->header->n_sections; i++) {
        es_status status = es_i_section_check(plan, &table[i], end, bytes, why);
        if (status != ES_OK)
            return status;
        plan->section[table[i].kind] = &table[i];
        end = table[i].offset + table[i].bytes;
        if (table[i].kind == ES_WEIGHTS)
            continue; /* es_model_check reads these */
        uint32_t sum = es_i_crc32(crc, 0, plan->data + table[i].offset, (size_t)table[i].bytes);
        if (sum != table[i].crc)
            return es_i_fail(why, ES_E_SECTION_CRC, "section %s is damaged: checksum %08x, computed %08x",
                             es_i_kinds[table[i].kind].name, table[i].crc, sum);
    }
    if (end != bytes)
        return es_i_fail(why, ES_E_SECTION_END, "the last section ends at %llu, the file at %llu",
                         (unsigned long long)end, (unsigned long long)bytes);
    return ES_OK;
}

static const void *es_i_at(const es_i_plan *plan, uint32_t kind, uint32_t *count)
{
    if (count != NULL)
        *count = (uint32_t)plan->section[kind]->count;
    return plan->data + plan->section[kind]->offset;
}

static es_status es_i_strings_check(es_i_plan *plan, es_error *why)
{
    plan->strings = (const char *)es_i_at(plan, ES_STRINGS, NULL);
    uint64_t bytes = plan->section[ES_STRINGS]->bytes;
    if (bytes == 0 || plan->strings[0] != '\0' || plan->strings[bytes - 1] != '\0')
        return es_i_fail(why, ES_E_STRINGS, "the strings do not run from NUL to NUL");
    return ES_OK;
}

static es_status es_i_tokenizer_check(es_i_plan *plan, es_error *why)
{
    if (plan->section[ES_TOKENIZER]->bytes < sizeof plan->tokenizer)
        return es_i_fail(why, ES_E_BUNDLE_TOKENIZER, "the tokenizer section has no kind");
    memcpy(&plan->tokenizer, es_i_at(plan, ES_TOKENIZER, NULL), sizeof plan->tokenizer);
    if (plan->tokenizer > 1)
        return es_i_fail(why, ES_E_BUNDLE_TOKENIZER, "tokenizer kind %u is unknown", plan->tokenizer);
    if (plan->section[ES_TOKENIZER]->bytes != sizeof plan->tokenizer)
        return es_i_fail(why, ES_E_BUNDLE_TOKENIZER, "tokenizer kind %u carries no data", plan->tokenizer);
    return ES_OK;
}

es_status es_i_plan_read(es_i_plan *plan, const es_i_crc *crc, const void *data, uint64_t bytes, es_error *why)
{
    memset(plan, 0, sizeof *plan);
    plan->data = (const uint8_t *)data;
    plan->header = (const es_i_header *)data;
    if (bytes < sizeof *plan->header)
        return es_i_fail(why, ES_E_TRUNCATED, "truncated: %llu bytes are less than a header",
                         (unsigned long long)bytes);
    es_status status = es_i_header_check(plan->header, crc, bytes, why);
    if (status == ES_OK)
        status = es_i_sections_check(plan, crc, bytes, why);
    if (status == ES_OK)
        status = es_i_strings_check(plan, why);
    if (status == ES_OK)
        status = es_i_tokenizer_check(plan, why);
    if (status != ES_OK)
        return status;
    plan->tensors = (const es_i_tensor *)es_i_at(plan, ES_TENSORS, &plan->n_tensors);
    plan->slots = (const es_i_slot *)es_i_at(plan, ES_SLOTS, &plan->n_slots);
    plan->io = (const es_i_io *)es_i_at(plan, ES_IO, &plan->n_io);
    plan->graphs = (const es_i_graph *)es_i_at(plan, ES_GRAPHS, &plan->n_graphs);
    plan->kernels = (const es_i_kernel *)es_i_at(plan, ES_KERNELS, &plan->n_kernels);
    plan->launches = (const es_i_launch *)es_i_at(plan, ES_LAUNCHES, &plan->n_launches);
    plan->args = (const es_i_arg *)es_i_at(plan, ES_ARGS, &plan->n_args);
    plan->weights = plan->data + plan->section[ES_WEIGHTS]->offset;
    plan->weight_bytes = plan->section[ES_WEIGHTS]->bytes;
    return es_i_plan_records(plan, why);
}
