/* The state of a stream: its fresh value, and its saved form.
 * Saved: magic[8], u32 version, u32 crc (of all that follows), model_id[16], u64 position, u64 bytes, the slots. */
#include "es_device.h"

#include <string.h>

enum {
    ES_STATE_HEADER = 48,
    ES_STATE_CRC_AT = 12,
    ES_STATE_ID_AT = 16,
    ES_STATE_POSITION_AT = 32,
    ES_STATE_BYTES_AT = 40
};

static const char es_i_state_magic[8] = {'E', 'S', 'S', 'T', 'A', 'T', 'E', '\0'};

/* Round to nearest even, as hardware does. */
static uint16_t es_i_half(float value)
{
    uint32_t bits, small;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u)
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* subnormal: adding 0.5 puts its bits where the half has them */
        float shifted;
        memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        memcpy(&small, &shifted, sizeof small);
        return (uint16_t)(sign | (small - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (magnitude - 0x38000000u) >> 13);
}

static uint16_t es_i_bfloat(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* One element of the dtype, in the low bytes. */
static uint64_t es_i_element(uint32_t dtype, float value)
{
    uint64_t bits = 0;
    switch (dtype) {
    case ES_FLOAT32: memcpy(&bits, &value, sizeof value); return bits;
    case ES_FLOAT16: return es_i_half(value);
    case ES_BFLOAT16: return es_i_bfloat(value);
    default: return (uint64_t)(int64_t)value;
    }
}

uint64_t es_i_state_element(const es_i_slot *slot)
{
    return es_i_element(slot->dtype, slot->init);
}

static void es_i_fill(uint8_t *start, uint64_t bytes, uint32_t dtype, float value)
{
    uint64_t size = es_i_dtype_bytes(dtype), element = es_i_element(dtype, value);
    if (element == 0) {
        memset(start, 0, (size_t)bytes);
        return;
    }
    for (uint64_t at = 0; at < bytes; at += size)
        memcpy(start + at, &element, (size_t)size);
}

void es_i_state_init(const es_i_plan *plan, uint8_t *state)
{
    for (uint32_t i = 0; i < plan->n_slots; i++) {
        const es_i_slot *slot = &plan->slots[i];
        es_i_fill(state + slot->offset, slot->bytes, slot->dtype, slot->init);
    }
}

/* A slot as runs of rows along its time axis: `outer` times `rows` rows of `row` bytes, `kept` of them saved.
 * A slot that does not append is one row. */
typedef struct {
    uint64_t outer, rows, row, kept;
} es_i_rows;

static es_i_rows es_i_rows_of(const es_i_slot *slot, uint64_t position)
{
    es_i_rows r = {1, 1, slot->bytes, 1};
    if (slot->update != ES_UPDATE_APPEND)
        return r;
    for (int32_t i = 0; i < slot->axis; i++)
        r.outer *= slot->dims[i];
    r.rows = slot->dims[slot->axis];
    r.row = slot->bytes / r.outer / r.rows;
    r.kept = position < r.rows ? position : r.rows;
    return r;
}

static uint64_t es_i_payload(const es_i_plan *plan, uint64_t position)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < plan->n_slots; i++) {
        es_i_rows r = es_i_rows_of(&plan->slots[i], position);
        bytes += r.outer * r.kept * r.row;
    }
    return bytes;
}

es_status es_state_bytes(const es_session *session, size_t *bytes)
{
    if (session == NULL || bytes == NULL)
        return ES_E_NULL;
    *bytes = ES_STATE_HEADER + (size_t)es_i_payload(&session->model->plan, session->position);
    return ES_OK;
}

/* A span of the state from or to wherever it lives. */
static es_status es_i_state_read(const es_session *session, uint64_t offset, uint8_t *to, uint64_t bytes)
{
    if (session->stream != NULL && bytes > 0)
        return session->model->backend->read(session->stream, ES_SPACE_STATE, offset, to, bytes, NULL);
    if (bytes > 0)
        memcpy(to, session->state + offset, (size_t)bytes);
    return ES_OK;
}

static es_status es_i_state_write(es_session *session, uint64_t offset, const uint8_t *from, uint64_t bytes,
                                  es_error *why)
{
    if (session->stream != NULL && bytes > 0)
        return session->model->backend->write(session->stream, ES_SPACE_STATE, offset, from, bytes, why);
    if (bytes > 0)
        memcpy(session->state + offset, from, (size_t)bytes);
    return ES_OK;
}

es_status es_state_save(const es_session *session, void *buffer, size_t capacity, size_t *written)
{
    size_t bytes = 0;
    es_status status = buffer == NULL ? ES_E_NULL : es_state_bytes(session, &bytes);
    if (status != ES_OK)
        return status;
    if (capacity < bytes)
        return ES_E_ROOM;
    if (session->failed != ES_OK)
        return session->failed;
    const es_model *model = session->model;
    const uint32_t version = 1;
    const uint64_t payload = bytes - ES_STATE_HEADER;
    uint8_t *out = (uint8_t *)buffer, *next = out + ES_STATE_HEADER;
    memcpy(out, es_i_state_magic, sizeof es_i_state_magic);
    memcpy(out + 8, &version, sizeof version);
    memcpy(out + ES_STATE_ID_AT, model->plan.header->model_id, 16);
    memcpy(out + ES_STATE_POSITION_AT, &session->position, sizeof session->position);
    memcpy(out + ES_STATE_BYTES_AT, &payload, sizeof payload);
    for (uint32_t i = 0; i < model->plan.n_slots; i++) {
        const es_i_slot *slot = &model->plan.slots[i];
        es_i_rows r = es_i_rows_of(slot, session->position);
        for (uint64_t o = 0; o < r.outer; o++, next += r.kept * r.row)
            if ((status = es_i_state_read(session, slot->offset + o * r.rows * r.row, next, r.kept * r.row)) != ES_OK)
                return status;
    }
    uint32_t crc = es_i_crc32(&model->crc, 0, out + ES_STATE_ID_AT, bytes - ES_STATE_ID_AT);
    memcpy(out + ES_STATE_CRC_AT, &crc, sizeof crc);
    if (written != NULL)
        *written = bytes;
    return ES_OK;
}

static es_status es_i_state_check(const es_model *model, const uint8_t *in, size_t bytes, uint64_t *position,
                                  es_error *why)
{
    uint32_t version, crc;
    uint64_t payload;
    if (bytes < sizeof es_i_state_magic)
        return es_i_fail(why, ES_E_STATE_TRUNCATED, "truncated: %llu bytes", (unsigned long long)bytes);
    if (memcmp(in, es_i_state_magic, sizeof es_i_state_magic) != 0)
        return es_i_fail(why, ES_E_STATE_MAGIC, "not a saved state: it does not start with ESSTATE");
    if (bytes < ES_STATE_HEADER)
        return es_i_fail(why, ES_E_STATE_TRUNCATED, "truncated: %llu bytes", (unsigned long long)bytes);
    memcpy(&version, in + 8, sizeof version);
    memcpy(&crc, in + ES_STATE_CRC_AT, sizeof crc);
    memcpy(position, in + ES_STATE_POSITION_AT, sizeof *position);
    memcpy(&payload, in + ES_STATE_BYTES_AT, sizeof payload);
    if (version != 1)
        return es_i_fail(why, ES_E_STATE_VERSION, "saved state of version %u, this runtime reads version 1", version);
    if (payload > bytes - ES_STATE_HEADER)
        return es_i_fail(why, ES_E_STATE_TRUNCATED, "truncated: %llu of %llu bytes",
                         (unsigned long long)(bytes - ES_STATE_HEADER), (unsigned long long)payload);
    if (payload < bytes - ES_STATE_HEADER)
        return es_i_fail(why, ES_E_STATE_SIZE, "%llu bytes follow the state's end",
                         (unsigned long long)(bytes - ES_STATE_HEADER - payload));
    uint32_t sum = es_i_crc32(&model->crc, 0, in + ES_STATE_ID_AT, bytes - ES_STATE_ID_AT);
    if (sum != crc)
        return es_i_fail(why, ES_E_STATE_CRC, "the state is damaged: checksum %08x, computed %08x", crc, sum);
    if (memcmp(in + ES_STATE_ID_AT, model->plan.header->model_id, 16) != 0)
        return es_i_fail(why, ES_E_STATE_FOREIGN, "the state was saved by another model");
    if (*position > model->limit)
        return es_i_fail(why, ES_E_STATE_POSITION, "the state stands at %llu, the context ends at %llu",
                         (unsigned long long)*position, (unsigned long long)model->limit);
    if (payload != es_i_payload(&model->plan, *position))
        return es_i_fail(why, ES_E_STATE_SIZE, "the state has %llu bytes, this model's has %llu",
                         (unsigned long long)payload, (unsigned long long)es_i_payload(&model->plan, *position));
    return ES_OK;
}

es_status es_state_load(es_session *session, const void *buffer, size_t bytes, es_error *why)
{
    uint64_t position = 0;
    if (session == NULL || buffer == NULL)
        return es_i_fail(why, ES_E_NULL, "no session or no state");
    const es_i_plan *plan = &session->model->plan;
    const uint8_t *next = (const uint8_t *)buffer;
    es_status status = es_i_state_check(session->model, next, bytes, &position, why);
    if (status != ES_OK)
        return status;
    if (session->failed != ES_OK)
        return es_i_fail(why, session->failed, "%s", es_status_text(session->failed));
    next += ES_STATE_HEADER;
    if (session->stream == NULL)
        es_i_state_init(plan, session->state);
    else if ((status = session->model->backend->reset(session->stream, why)) != ES_OK)
        return es_i_session_failed(session, status, 0);
    for (uint32_t i = 0; i < plan->n_slots; i++) {
        const es_i_slot *slot = &plan->slots[i];
        es_i_rows r = es_i_rows_of(slot, position);
        for (uint64_t o = 0; o < r.outer; o++, next += r.kept * r.row)
            if ((status = es_i_state_write(session, slot->offset + o * r.rows * r.row, next, r.kept * r.row, why)) !=
                ES_OK)
                return es_i_session_failed(session, status, 1);
    }
    session->position = position;
    session->logits = NULL;
    return ES_OK;
}
