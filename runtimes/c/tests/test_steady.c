/* A stream of steps allocates nothing: linked with --wrap for the allocator, which fails the test once it is armed.
 * Usage: test_steady model.edgeseq STEPS. Prints "ok". */
#include <edgeseq.h>

#include <stdio.h>
#include <stdlib.h>

static int armed;
static long calls;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t n, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);
void *__wrap_realloc(void *old, size_t bytes);

void *__wrap_malloc(size_t bytes)
{
    calls += armed;
    return __real_malloc(bytes);
}

void *__wrap_calloc(size_t n, size_t bytes)
{
    calls += armed;
    return __real_calloc(n, bytes);
}

void *__wrap_realloc(void *old, size_t bytes)
{
    calls += armed;
    return __real_realloc(old, bytes);
}

int main(int argc, char **argv)
{
    static const int32_t prompt[13] = {1, 2, 3};
    static char state[1 << 16];
    es_options options = ES_OPTIONS_INIT;
    es_sampler sampler = ES_SAMPLER_INIT;
    es_error why = ES_ERROR_INIT;
    es_model *model = NULL;
    es_session *session = NULL;
    int32_t token = 0;
    size_t bytes = 0;
    if (argc != 3)
        return 2;
    options.n_threads = 2;
    options.spin = 1000000;
    sampler.temperature = 1.0f;
    sampler.top_k = 5;
    sampler.top_p = 0.9f;
    if (es_model_open(argv[1], &options, &model, &why) != ES_OK ||
        es_session_create(model, NULL, 0, &session, &why) != ES_OK)
        return printf("%s\n", why.text), 1;
    fprintf(stderr, "steady\n");
    armed = 1;
    for (int i = 0; i < atoi(argv[2]); i++) {
        if (i % 20 == 0 && (es_reset(session) != ES_OK || es_prefill(session, prompt, 13) != ES_OK))
            return 1;
        if (es_sample(session, &sampler, NULL, 0, &token) != ES_OK || es_step(session, token) != ES_OK ||
            es_state_save(session, state, sizeof state, &bytes) != ES_OK ||
            es_state_load(session, state, bytes, NULL) != ES_OK || es_step(session, token) != ES_OK)
            return printf("a step failed\n"), 1;
    }
    armed = 0;
    fprintf(stderr, "over\n");
    (void)es_session_close(&session);
    (void)es_model_close(&model);
    if (calls > 0)
        return printf("%ld allocations\n", calls), 1;
    puts("ok");
    return 0;
}
