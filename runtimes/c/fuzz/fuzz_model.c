/* libFuzzer target: any bytes as a bundle. What opens must run: every argument lies in the session's memory, every
 * name ends, a session of exactly the announced size suffices. The kernels of the plan do nothing here.
 *   clang -g -fsanitize=fuzzer,address,undefined -I../include fuzz_model.c ../src/[a-z]*.c -pthread */
#include "../src/es_internal.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LARGEST_SESSION = 1 << 24, LONGEST_PROMPT = 600, MOST_KERNELS = 1000 };

const es_kernel_table es_linked_kernels = {(uint32_t)sizeof(es_kernel_table), 0, 0, 0, NULL, NULL, 0, 0, NULL};

static void nothing(void *const *args, int32_t begin, int32_t end)
{
    (void)args;
    if (begin >= end)
        abort();
}

/* The table that the plan asks for, so that fuzzing gets past it. */
static es_kernel_table table_of(const es_i_plan *plan, const es_i_crc *crc, es_kernel_entry *entries)
{
    es_kernel_table table = es_linked_kernels;
    for (uint32_t kind = ES_KERNELS; kind <= ES_ARGS; kind++)
        table.plan_id = es_i_crc32(crc, table.plan_id, plan->data + plan->section[kind]->offset,
                                   (size_t)plan->section[kind]->bytes);
    for (uint32_t i = 0; i < plan->n_kernels; i++) {
        entries[i].name = plan->strings + plan->kernels[i].name;
        entries[i].fn = nothing;
    }
    table.n_kernels = plan->n_kernels;
    table.kernels = entries;
    return table;
}

static size_t read_names(const es_model *model)
{
    es_model_info info = ES_MODEL_INFO_INIT;
    es_graph_info graph = ES_GRAPH_INFO_INIT;
    es_tensor_info tensor = ES_TENSOR_INFO_INIT;
    size_t letters = 0;
    if (es_model_get_info(model, &info) != ES_OK)
        abort();
    for (uint32_t i = 0; i < info.n_graphs; i++)
        letters += es_model_graph(model, i, &graph) == ES_OK ? strlen(graph.name) : 0;
    for (uint32_t i = 0; i < info.n_slots; i++)
        letters += es_model_slot(model, i, &tensor) == ES_OK ? strlen(tensor.name) : 0;
    for (uint32_t i = 0; i < info.n_io; i++)
        letters += es_model_io(model, i, &tensor) == ES_OK ? strlen(tensor.name) : 0;
    return letters;
}

/* Touches both ends of every argument as its access allows. */
static uint8_t touch(const es_session *session)
{
    const es_i_plan *plan = &session->model->plan;
    volatile uint8_t sum = 0;
    for (uint32_t i = 0; i < plan->n_args; i++) {
        volatile uint8_t *first = (volatile uint8_t *)session->args[i], *last = first + plan->args[i].bytes - 1;
        sum = (uint8_t)(sum ^ *first ^ *last);
        if (plan->args[i].access & ES_ACCESS_WRITE) {
            *first = *first;
            *last = *last;
        }
    }
    return sum;
}

static void drive(es_session *session)
{
    int32_t prompt[LONGEST_PROMPT] = {0}, token;
    const es_i_plan *plan = &session->model->plan;
    size_t bytes = 0;
    for (uint32_t g = 0; g < plan->n_graphs && plan->graphs[g].tokens < LONGEST_PROMPT; g++)
        (void)es_run(session, g);
    (void)es_reset(session);
    if (es_prefill(session, prompt, LONGEST_PROMPT) != ES_OK)
        (void)es_prefill(session, prompt, 5);
    if (es_logits(session) != NULL && es_sample(session, NULL, NULL, 0, &token) == ES_OK)
        (void)es_step(session, token);
    if (es_state_bytes(session, &bytes) != ES_OK || bytes > 2 * (size_t)LARGEST_SESSION)
        abort();
    void *state = malloc(bytes);
    if (state == NULL || es_state_save(session, state, bytes, &bytes) != ES_OK ||
        es_state_load(session, state, bytes, NULL) != ES_OK)
        abort();
    free(state);
}

static void open_and_run(const uint8_t *data, size_t size, const es_kernel_table *table)
{
    es_options options = ES_OPTIONS_INIT;
    es_model *model = NULL;
    es_session *session = NULL;
    es_error why = ES_ERROR_INIT;
    size_t need = 0;
    options.n_threads = 1;
    options.flags = ES_POISON;
    options.kernels = table;
    if (es_model_open_memory(data, size, &options, &model, &why) != ES_OK) {
        if (why.text[0] == '\0')
            abort();
        return;
    }
    (void)es_model_check(model, NULL);
    (void)read_names(model);
    if (es_session_need(model, &need) == ES_OK && need <= LARGEST_SESSION) {
        void *memory = malloc(need);
        if (memory == NULL || es_session_create(model, memory, need, &session, NULL) != ES_OK)
            abort();
        (void)touch(session);
        drive(session);
        (void)es_session_close(&session);
        free(memory);
    }
    if (es_model_close(&model) != ES_OK)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static es_i_crc crc;
    es_i_plan plan;
    void *copy = NULL;
    if (size == 0 || posix_memalign(&copy, 64, size) != 0)
        return 0;
    memcpy(copy, data, size);
    es_i_crc_init(&crc);
    es_kernel_table table = es_linked_kernels;
    es_kernel_entry *entries = (es_kernel_entry *)calloc(MOST_KERNELS, sizeof *entries);
    if (entries != NULL && es_i_plan_read(&plan, &crc, copy, size, NULL) == ES_OK && plan.n_kernels <= MOST_KERNELS)
        table = table_of(&plan, &crc, entries);
    open_and_run((const uint8_t *)copy, size, &table);
    free(entries);
    free(copy);
    return 0;
}
