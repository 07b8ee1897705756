/* libFuzzer target: any bytes as a saved state. A refused state changes nothing; an accepted one saves back to the
 * same bytes. Needs the hand-made kernels and, in EDGESEQ_FUZZ_MODEL, the path of their bundle. */
#include "../src/es_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void *saved(const es_session *session, size_t *bytes)
{
    void *state = es_state_bytes(session, bytes) == ES_OK ? malloc(*bytes) : NULL;
    if (state == NULL || es_state_save(session, state, *bytes, bytes) != ES_OK)
        abort();
    return state;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const int32_t prompt[3] = {1, 2, 3};
    es_options options = ES_OPTIONS_INIT;
    es_model *model = NULL;
    es_session *session = NULL;
    es_error why = ES_ERROR_INIT;
    size_t before_bytes = 0, after_bytes = 0;
    options.n_threads = 1;
    if (es_model_open(getenv("EDGESEQ_FUZZ_MODEL"), &options, &model, &why) != ES_OK ||
        es_session_create(model, NULL, 0, &session, &why) != ES_OK || es_prefill(session, prompt, 3) != ES_OK) {
        fprintf(stderr, "EDGESEQ_FUZZ_MODEL: %s\n", why.text);
        abort();
    }
    void *exact = malloc(size > 0 ? size : 1);
    if (exact == NULL)
        abort();
    if (size > 0)
        memcpy(exact, data, size);
    void *before = saved(session, &before_bytes);
    es_status status = es_state_load(session, exact, size, &why);
    void *after = saved(session, &after_bytes);
    if (status == ES_OK ? after_bytes != size || memcmp(after, exact, size) != 0
                        : after_bytes != before_bytes || memcmp(after, before, before_bytes) != 0 || !why.text[0])
        abort();
    (void)es_step(session, 1);
    free(exact);
    free(before);
    free(after);
    (void)es_session_close(&session);
    return es_model_close(&model) == ES_OK ? 0 : -1;
}
