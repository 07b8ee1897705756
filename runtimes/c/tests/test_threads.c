/* Several threads, each with sessions of its own, on one model: every stream is what it is alone. Meant for
 * ThreadSanitizer. Usage: test_threads model.edgeseq. Prints "ok". */
#include <edgeseq.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STREAMS = 4, STEPS = 40 };

typedef struct {
    es_model *model;
    int32_t first, tokens[STEPS];
    int failed;
} stream;

static void *run(void *argument)
{
    stream *s = (stream *)argument;
    es_session *session = NULL, *fork = NULL;
    const int32_t prompt[9] = {s->first, 1, 2, 3, 4, 5, 6, 7, 8};
    s->failed = 1;
    if (es_session_create(s->model, NULL, 0, &session, NULL) != ES_OK || es_prefill(session, prompt, 9) != ES_OK ||
        es_generate(session, NULL, STEPS / 2, 0, s->tokens, NULL) != ES_OK ||
        es_session_fork(session, NULL, 0, &fork, NULL) != ES_OK || es_session_close(&session) != ES_OK ||
        es_generate(fork, NULL, STEPS / 2, 0, s->tokens + STEPS / 2, NULL) != ES_OK)
        return NULL;
    s->failed = es_session_close(&fork) != ES_OK;
    return NULL;
}

int main(int argc, char **argv)
{
    static stream alone[STREAMS], together[STREAMS];
    pthread_t threads[STREAMS];
    es_options options = ES_OPTIONS_INIT;
    es_error why = ES_ERROR_INIT;
    es_model *model = NULL;
    if (argc != 2)
        return 2;
    options.n_threads = 3;
    options.spin = 100;
    if (es_model_open(argv[1], &options, &model, &why) != ES_OK)
        return printf("%s\n", why.text), 1;
    for (int32_t i = 0; i < STREAMS; i++) {
        alone[i].model = together[i].model = model;
        alone[i].first = together[i].first = i;
        (void)run(&alone[i]);
    }
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < STREAMS; i++)
            if (pthread_create(&threads[i], NULL, run, &together[i]) != 0)
                return 1;
        for (int i = 0; i < STREAMS; i++) {
            (void)pthread_join(threads[i], NULL);
            if (alone[i].failed || together[i].failed ||
                memcmp(alone[i].tokens, together[i].tokens, sizeof alone[i].tokens) != 0)
                return printf("stream %d differs\n", i), 1;
        }
    }
    if (es_model_close(&model) != ES_OK)
        return printf("a session is left\n"), 1;
    puts("ok");
    return 0;
}
