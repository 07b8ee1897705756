/* The contract of edgeseq.h against the hand-made bundle: memory to the byte, NULL, sizes of structs, order of
 * closing, one thread or several sessions. Usage: test_api model.edgeseq. Prints "ok". For a bundle whose kernels run on
 * a GPU, what is about kernel tables is left out, and a session has no threads to vary. */
#include "../src/es_internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                                             \
            failures++;                                                                                                \
        }                                                                                                              \
    } while (0)

static const int32_t prompt[13] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13};

static int32_t greedy_after(es_session *session)
{
    int32_t token = -1;
    EXPECT(es_prefill(session, prompt, 13) == ES_OK);
    EXPECT(es_sample(session, NULL, NULL, 0, &token) == ES_OK);
    return token;
}

/* Every size below the need is refused; the need suffices at every alignment and nothing outside it is touched. */
static void memory_to_the_byte(es_model *model)
{
    size_t need = 0;
    es_session *session = NULL;
    EXPECT(es_session_create(model, NULL, 0, &session, NULL) == ES_OK);
    int32_t token = greedy_after(session);
    EXPECT(es_session_close(&session) == ES_OK && session == NULL);
    EXPECT(es_session_need(model, &need) == ES_OK);
    uint8_t *memory = (uint8_t *)malloc(need + 256);
    for (size_t bytes = 0; bytes < need; bytes++) {
        es_error why = ES_ERROR_INIT;
        session = (es_session *)(void *)memory;
        EXPECT(es_session_create(model, memory, bytes, &session, &why) == ES_E_SMALL);
        EXPECT(session == NULL && strstr(why.text, "needs") != NULL);
    }
    for (size_t shift = 0; shift < 70; shift += es_linked_kernels.n_kernels == 0 ? 23 : 1) {
        memset(memory, 0xa5, need + 256);
        EXPECT(es_session_create(model, memory + shift, need, &session, NULL) == ES_OK);
        EXPECT(greedy_after(session) == token);
        EXPECT(es_session_close(&session) == ES_OK);
        size_t touched = 0;
        for (size_t i = 0; i < need + 256; i++)
            touched += (i < shift || i >= shift + need) && memory[i] != 0xa5;
        EXPECT(touched == 0);
    }
    free(memory);
}

/* The plan of es_need and the arena hold exactly: a heap block of need bytes, under AddressSanitizer. */
static void memory_under_the_sanitizer(es_model *model)
{
    size_t need = 0, bytes = 0;
    es_session *session = NULL, *fork = NULL;
    EXPECT(es_session_need(model, &need) == ES_OK);
    void *memory = malloc(need), *other = malloc(need);
    EXPECT(es_session_create(model, memory, need, &session, NULL) == ES_OK);
    (void)greedy_after(session);
    EXPECT(es_session_fork(session, other, need, &fork, NULL) == ES_OK);
    EXPECT(memcmp(es_logits(session), es_logits(fork), 32 * sizeof(float)) == 0 &&
           es_logits(session) != es_logits(fork));
    EXPECT(es_state_bytes(session, &bytes) == ES_OK);
    void *state = malloc(bytes);
    for (size_t room = 0; room < bytes; room++)
        EXPECT(es_state_save(session, state, room, NULL) == ES_E_ROOM);
    EXPECT(es_state_save(session, state, bytes, &bytes) == ES_OK);
    for (size_t cut = 0; cut < bytes; cut++) {
        void *exact = malloc(cut > 0 ? cut : 1);
        memcpy(exact, state, cut);
        EXPECT(ES_CLASS(es_state_load(fork, exact, cut, NULL)) == ES_CLASS_STATE);
        free(exact);
    }
    EXPECT(es_logits(fork) != NULL);
    EXPECT(es_state_load(fork, state, bytes, NULL) == ES_OK && es_logits(fork) == NULL);
    free(state);
    EXPECT(es_session_close(&fork) == ES_OK && es_session_close(&session) == ES_OK);
    free(memory);
    free(other);
}

static void wrong_calls(es_model *model, const char *path)
{
    es_model *none = model;
    es_session *session = NULL, *foreign = NULL;
    es_model *second = NULL;
    es_options options = ES_OPTIONS_INIT;
    es_model_info info = ES_MODEL_INFO_INIT;
    int32_t token = 0;
    size_t n = 0;
    char unaligned[200] = {0};
    EXPECT(es_model_open(NULL, NULL, &none, NULL) == ES_E_NULL);
    EXPECT(es_model_open(path, NULL, NULL, NULL) == ES_E_NULL);
    EXPECT(es_model_open("/nowhere/at/all", NULL, &none, NULL) == ES_E_OPEN && none == NULL);
    EXPECT(es_model_open("/", NULL, &none, NULL) == ES_E_OPEN);
    EXPECT(es_model_open_memory(NULL, 64, NULL, &none, NULL) == ES_E_NULL);
    EXPECT(es_model_open_memory(unaligned + 1 + (64 - (uintptr_t)unaligned % 64) % 64, 64, NULL, &none, NULL) ==
           ES_E_ALIGN);
    options.struct_size = 4;
    EXPECT(es_model_open(path, &options, &none, NULL) == ES_E_STRUCT);
    options.struct_size = sizeof options;
    options.n_threads = -1;
    EXPECT(es_model_open(path, &options, &none, NULL) == ES_E_RANGE);
    options.n_threads = 1;
    options.n_cores = 1;
    EXPECT(es_model_open(path, &options, &none, NULL) == ES_E_NULL);
    info.struct_size = 8;
    EXPECT(es_model_get_info(model, &info) == ES_E_STRUCT);
    EXPECT(es_model_close(NULL) == ES_OK && es_session_close(NULL) == ES_OK && es_session_close(&session) == ES_OK);
    EXPECT(es_logits(NULL) == NULL && es_step(NULL, 1) == ES_E_NULL);
    EXPECT(es_session_create(model, NULL, 0, &session, NULL) == ES_OK);
    EXPECT(es_sample(session, NULL, NULL, 0, &token) == ES_E_NO_LOGITS);
    EXPECT(es_prefill(session, NULL, 0) == ES_OK && es_logits(session) == NULL);
    EXPECT(es_prefill(session, NULL, 1) == ES_E_NULL);
    EXPECT(es_run(session, 3) == ES_E_RANGE);
    EXPECT(es_encode(model, "abc", 3, NULL, 0, &n) == ES_OK && n == 3);
    EXPECT(es_encode(model, "abc", 3, &token, 1, &n) == ES_E_ROOM);
    EXPECT(es_generate(session, NULL, 1, 0, &token, NULL) == ES_E_NO_LOGITS);
    EXPECT(es_model_close(&model) == ES_E_SESSIONS && model != NULL);
    EXPECT(es_model_open(path, NULL, &second, NULL) == ES_OK);
    EXPECT(es_session_create(second, NULL, 0, &foreign, NULL) == ES_OK);
    EXPECT(es_session_copy(session, foreign) == ES_E_OTHER_MODEL);
    EXPECT(es_session_close(&foreign) == ES_OK && es_model_close(&second) == ES_OK && second == NULL);
    EXPECT(es_session_close(&session) == ES_OK);
    for (es_status status = 0; status < 0x2000; status++)
        EXPECT(es_status_text(status) != NULL);
}

/* A long reason is cut, a short buffer is respected, text always ends. */
static void reasons(void)
{
    es_error why = ES_ERROR_INIT;
    char path[600];
    es_model *model;
    memset(path, 'x', sizeof path);
    path[sizeof path - 1] = '\0';
    EXPECT(es_model_open(path, NULL, &model, &why) == ES_E_OPEN);
    EXPECT(strlen(why.text) == sizeof why.text - 1);
    memset(why.text, 'y', sizeof why.text);
    why.struct_size = sizeof why.struct_size + 8;
    EXPECT(es_model_open(path, NULL, &model, &why) == ES_E_OPEN);
    EXPECT(strlen(why.text) == 7 && why.text[8] == 'y');
}

static int32_t output_blocks;

static void count_output(void *const *args, int32_t begin, int32_t end)
{
    (void)args;
    (void)__atomic_add_fetch(&output_blocks, end - begin, __ATOMIC_RELAXED);
}

/* 13 tokens are chunks of 8 and 4 and a step: the launches that feed logits alone run in the last of them only. */
static void outputs_are_skipped(const char *path)
{
    es_kernel_entry entries[7];
    es_kernel_table table = es_linked_kernels;
    es_options options = ES_OPTIONS_INIT;
    es_model *model = NULL;
    es_session *session = NULL;
    memcpy(entries, table.kernels, sizeof entries);
    for (int i = 4; i < 7; i++)
        entries[i].fn = count_output;
    table.kernels = entries;
    options.kernels = &table;
    EXPECT(es_model_open(path, &options, &model, NULL) == ES_OK);
    EXPECT(es_session_create(model, NULL, 0, &session, NULL) == ES_OK);
    output_blocks = 0;
    EXPECT(es_prefill(session, prompt, 13) == ES_OK);
    EXPECT(output_blocks == 32);
    EXPECT(es_prefill(session, prompt, 12) == ES_OK);
    EXPECT(output_blocks == 64);
    EXPECT(es_session_close(&session) == ES_OK && es_model_close(&model) == ES_OK);
}

static void tables_that_do_not_belong(const char *path)
{
    static const char *const wanted[] = {"made-up"};
    static const char *const rare[] = {"amx-int8", "avx512fp16", "avxvnniint8", "sme", "sve2", "i8mm"};
    es_kernel_entry entries[7];
    es_options options = ES_OPTIONS_INIT;
    es_model *model = NULL;
    es_error why = ES_ERROR_INIT;
    es_kernel_table table = es_linked_kernels;
    options.kernels = &table;
    table.features = wanted;
    EXPECT(es_model_open(path, &options, &model, &why) == ES_E_FEATURE && strstr(why.text, "made-up") != NULL);
    for (size_t i = 0; i < sizeof rare / sizeof *rare; i++) {
        if (es_cpu_has(rare[i]) != 0)
            continue;
        table.features = &rare[i];
        EXPECT(es_model_open(path, &options, &model, &why) == ES_E_FEATURE && strstr(why.text, rare[i]) != NULL);
        EXPECT(strstr(why.text, "lacks") != NULL);
    }
    table = es_linked_kernels;
    table.n_kernels = 6;
    EXPECT(es_model_open(path, &options, &model, &why) == ES_E_KERNEL_TABLE);
    memcpy(entries, es_linked_kernels.kernels, sizeof entries);
    entries[3].name = "leak9";
    table = es_linked_kernels;
    table.kernels = entries;
    EXPECT(es_model_open(path, &options, &model, &why) == ES_E_KERNEL_TABLE && strstr(why.text, "leak9") != NULL);
    table = es_linked_kernels;
    table.plan_id++;
    EXPECT(es_model_open(path, &options, &model, &why) == ES_E_PLAN_ID);
    table = es_linked_kernels;
    table.struct_size = 8;
    EXPECT(es_model_open(path, &options, &model, &why) == ES_E_KERNEL_TABLE);
    EXPECT(es_cpu_has("made-up") == -1 && es_cpu_has(NULL) == -1);
}

/* Threads of a model opened with this table, and whether its caller was pinned to `core`. */
static void opened(const char *path, const es_kernel_table *table, int32_t threads, uint32_t expected, int32_t core)
{
    es_options options = ES_OPTIONS_INIT;
    es_model_info info = ES_MODEL_INFO_INIT;
    es_model *model = NULL;
    cpu_set_t before, now;
    options.kernels = table;
    options.n_threads = threads;
    EXPECT(sched_getaffinity(0, sizeof before, &before) == 0);
    EXPECT(es_model_open(path, &options, &model, NULL) == ES_OK);
    EXPECT(es_model_get_info(model, &info) == ES_OK && info.n_threads == expected);
    EXPECT(es_pin_caller(model) == ES_OK && sched_getaffinity(0, sizeof now, &now) == 0);
    EXPECT(core < 0 ? CPU_EQUAL(&before, &now) : CPU_COUNT(&now) == 1 && CPU_ISSET((size_t)core, &now));
    EXPECT(sched_setaffinity(0, sizeof before, &before) == 0);
    EXPECT(es_model_close(&model) == ES_OK);
}

/* What the profile says of threads and cores holds where the caller says nothing and the machine has them. */
static void threads_of_the_profile(const char *path)
{
    int32_t mine[2] = {0, CPU_SETSIZE};
    es_kernel_table table = es_linked_kernels;
    uint32_t cores = es_i_cores();
    while (!es_i_may_run_on(mine[0]))
        mine[0]++;
    opened(path, &table, 0, cores, -1);
    table.n_threads = 1;
    opened(path, &table, 0, 1, -1);
    opened(path, &table, 2, 2, -1);
    table.n_threads = ES_THREADS_MAX;
    opened(path, &table, 0, cores < ES_THREADS_MAX ? cores : ES_THREADS_MAX, -1);
    table.n_threads = 1;
    table.cores = mine;
    table.n_cores = 1;
    opened(path, &table, 0, 1, mine[0]);
    opened(path, &table, 3, 3, mine[0]);
    table.n_cores = 2; /* one of them is not there */
    opened(path, &table, 0, 1, -1);
}

int main(int argc, char **argv)
{
    es_model *model = NULL;
    es_error why = ES_ERROR_INIT;
    if (argc != 2)
        return 2;
    const int gpu = es_linked_kernels.n_kernels == 0;
    for (int32_t threads = 1; threads <= (gpu ? 1 : 3); threads++) {
        es_options options = ES_OPTIONS_INIT;
        options.n_threads = threads;
        options.flags = ES_POISON;
        if (es_model_open(argv[1], &options, &model, &why) != ES_OK)
            return printf("%s\n", why.text), 1;
        memory_to_the_byte(model);
        memory_under_the_sanitizer(model);
        wrong_calls(model, argv[1]);
        EXPECT(es_model_close(&model) == ES_OK && model == NULL);
    }
    reasons();
    if (!gpu) {
        outputs_are_skipped(argv[1]);
        tables_that_do_not_belong(argv[1]);
        threads_of_the_profile(argv[1]);
    }
    if (failures == 0)
        puts("ok");
    return failures != 0;
}
