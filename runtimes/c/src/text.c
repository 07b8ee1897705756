/* The byte tokenizer: a token is a byte. */
#include "es_internal.h"

enum { ES_TOKENIZER_BYTES = 1 };

es_status es_encode(const es_model *model, const char *text, size_t bytes, int32_t *tokens, size_t capacity, size_t *n)
{
    if (model == NULL || n == NULL || (text == NULL && bytes > 0))
        return ES_E_NULL;
    if (model->plan.tokenizer != ES_TOKENIZER_BYTES)
        return ES_E_TOKENIZER;
    *n = bytes;
    if (tokens == NULL)
        return ES_OK;
    if (capacity < bytes)
        return ES_E_ROOM;
    for (size_t i = 0; i < bytes; i++)
        tokens[i] = (uint8_t)text[i];
    return ES_OK;
}

es_status es_decode(const es_model *model, const int32_t *tokens, size_t n, char *text, size_t capacity, size_t *bytes)
{
    if (model == NULL || bytes == NULL || (tokens == NULL && n > 0))
        return ES_E_NULL;
    if (model->plan.tokenizer != ES_TOKENIZER_BYTES)
        return ES_E_TOKENIZER;
    for (size_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] > 255)
            return ES_E_TOKEN;
    *bytes = n;
    if (text == NULL)
        return ES_OK;
    if (capacity < n)
        return ES_E_ROOM;
    for (size_t i = 0; i < n; i++)
        text[i] = (char)(uint8_t)tokens[i];
    return ES_OK;
}
