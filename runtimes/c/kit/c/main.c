/* Prints what the model says after a prompt: text where the model's tokens are bytes, else token ids.
 *   ./main model.edgeseq PROMPT N */
#include "edgeseq.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PROMPT_MAX = 4096 };

static void check(es_status status, const es_error *why)
{
    if (status == ES_OK)
        return;
    fprintf(stderr, "main: %s\n", why != NULL && why->text[0] != '\0' ? why->text : es_status_text(status));
    exit(1);
}

/* "1,2,3" */
static size_t ids_of(const char *text, int32_t *ids)
{
    size_t n = 0;
    char *end = NULL;
    for (const char *p = text; *p != '\0' && n < PROMPT_MAX; p = *end == ',' ? end + 1 : end) {
        ids[n++] = (int32_t)strtol(p, &end, 10);
        if (end == p || (*end != ',' && *end != '\0')) {
            fprintf(stderr, "main: a prompt of this model is token ids with commas between them\n");
            exit(2);
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    static int32_t ids[PROMPT_MAX];
    es_error why = ES_ERROR_INIT;
    es_model_info info = ES_MODEL_INFO_INIT;
    es_model *model;
    es_session *session;
    int32_t token;
    size_t n, bytes;
    char text[8];
    if (argc != 4)
        return fprintf(stderr, "usage: main model.edgeseq PROMPT N\n"), 2;
    check(es_model_open(argv[1], NULL, &model, &why), &why);
    check(es_model_get_info(model, &info), NULL);
    check(es_session_create(model, NULL, 0, &session, &why), &why);
    if (info.tokenizer == 0)
        n = ids_of(argv[2], ids);
    else
        check(es_encode(model, argv[2], strlen(argv[2]), ids, PROMPT_MAX, &n), NULL);
    check(es_prefill(session, ids, n), NULL);
    for (long i = 0, count = atol(argv[3]); i < count; i++) {
        check(es_sample(session, NULL, NULL, 0, &token), NULL); /* the most likely; see es_sampler */
        if (info.tokenizer == 0) {
            printf(i == 0 ? "%d" : ",%d", (int)token);
        } else {
            check(es_decode(model, &token, 1, text, sizeof text, &bytes), NULL);
            fwrite(text, 1, bytes, stdout);
        }
        check(es_step(session, token), NULL);
    }
    putchar('\n');
    check(es_session_close(&session), NULL);
    check(es_model_close(&model), NULL);
    return 0;
}
