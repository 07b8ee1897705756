/* Embeds a bundle: prints a prompt and what the model says next.
 *   cc -std=c99 hello.c -I bundle -o hello bundle/libmodel.a -pthread
 *   ./hello bundle/model.edgeseq "Once" 64 */
#include <edgeseq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(es_status status, const es_error *why)
{
    if (status == ES_OK)
        return;
    fprintf(stderr, "hello: %s\n", why->text[0] != '\0' ? why->text : es_status_text(status));
    exit(1);
}

int main(int argc, char **argv)
{
    es_error why = ES_ERROR_INIT;
    es_sampler greedy = ES_SAMPLER_INIT; /* temperature 0; set .temperature and .seed to draw */
    es_model *model;
    es_session *session;
    int32_t ids[1024], token;
    size_t n, bytes;
    char text[8];
    if (argc != 4)
        return fprintf(stderr, "usage: hello model.edgeseq PROMPT N\n"), 2;
    check(es_model_open(argv[1], NULL, &model, &why), &why);
    check(es_session_create(model, NULL, 0, &session, &why), &why);
    check(es_encode(model, argv[2], strlen(argv[2]), ids, 1024, &n), &why);
    check(es_prefill(session, ids, n), &why);
    fputs(argv[2], stdout);
    for (int i = 0; i < atoi(argv[3]); i++) {
        check(es_sample(session, &greedy, NULL, 0, &token), &why);
        check(es_decode(model, &token, 1, text, sizeof text, &bytes), &why);
        fwrite(text, 1, bytes, stdout);
        check(es_step(session, token), &why);
    }
    putchar('\n');
    check(es_session_close(&session), &why);
    check(es_model_close(&model), &why);
    return 0;
}
