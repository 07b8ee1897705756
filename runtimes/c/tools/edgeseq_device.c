/* The command-line driver that runs on a device beside a bundle: `edgeseq-device FILE COMMAND [OPTIONS]`.
 * Results are lines of JSON on stdout, errors one sentence on stderr. Exit code 0 done, 1 failed, 2 wrong use. */
#include "device_args.h"
#include "device_bench.h"

static const char usage[] =
    "usage: edgeseq-device model.edgeseq COMMAND [OPTIONS]\n"
    "  info                                   what the model is\n"
    "  check                                  read the weights and compare their checksum\n"
    "  run    TOKENS -n N [--raw]             generate N tokens; --raw writes their text alone\n"
    "  logits TOKENS --out FILE [--cut N,..]  feed pieces of N tokens (the last size repeats; default 1),\n"
    "                                         write float32 logits after each\n"
    "  frames --in FILE --out FILE            run the step of a model with named inputs: FILE holds the inputs of\n"
    "                                         one step after another, in the model's order, as do the outputs\n"
    "  state                                  what --load-state holds\n"
    "  profile [--graph N] [-r REPS]          nanoseconds of every launch of a graph (0 is the step)\n"
    "  bench  [-p N,..] [-n N,..] [-d N,..] [-r REPS] [--bytes N]\n"
    "TOKENS: --tokens 1,2,3 or --tokens-file FILE or --prompt TEXT\n"
    "state:  --load-state FILE, --save-state FILE\n"
    "sample: --temperature F --top-k N --top-p F --min-p F --penalty F --seed N\n"
    "pool:   --threads N --cores 0,1,.. --spin N --poison\n";

/* ---- Files ---- */

static void *file_read(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0)
        die(1, path, "cannot be read");
    long size = ftell(file);
    if (size < 0)
        die(1, path, "cannot be read");
    *bytes = (size_t)size;
    char *data = (char *)grab(*bytes + 1);
    rewind(file);
    if (fread(data, 1, *bytes, file) != *bytes)
        die(1, path, "cannot be read");
    data[*bytes] = '\0';
    fclose(file);
    return data;
}

static void put(FILE *file, const void *data, size_t bytes, const char *path)
{
    if (fwrite(data, 1, bytes, file) != bytes)
        die(1, path, "cannot be written");
}

static FILE *create(const char *path)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL)
        die(1, path, "cannot be written");
    return file;
}

static void finish(FILE *file, const char *path)
{
    if (fclose(file) != 0)
        die(1, path, "cannot be written");
}

static void tokens_read(device *d)
{
    size_t bytes = 0;
    uint64_t value;
    char *owned = d->tokens_file != NULL ? (char *)file_read(d->tokens_file, &bytes) : NULL;
    const char *text = owned != NULL ? owned : d->tokens_text;
    if (d->prompt != NULL) {
        bytes = strlen(d->prompt);
        d->tokens = (int32_t *)grab(bytes * sizeof *d->tokens);
        check(es_encode(d->model, d->prompt, bytes, d->tokens, bytes, &d->n_tokens), "--prompt", NULL);
        return;
    }
    d->tokens = (int32_t *)grab((text != NULL ? strlen(text) / 2 + 1 : 1) * sizeof *d->tokens);
    while (text != NULL && next_number(&text, "--tokens", INT32_MAX, &value))
        d->tokens[d->n_tokens++] = (int32_t)value;
    free(owned);
}

static void state_load(device *d)
{
    size_t bytes = 0;
    es_error why = ES_ERROR_INIT;
    if (d->load == NULL)
        return;
    void *data = file_read(d->load, &bytes);
    check(es_state_load(d->session, data, bytes, &why), d->load, &why);
    free(data);
}

static void state_save(const device *d)
{
    size_t bytes = 0;
    if (d->save == NULL)
        return;
    check(es_state_bytes(d->session, &bytes), d->save, NULL);
    void *data = grab(bytes);
    check(es_state_save(d->session, data, bytes, &bytes), d->save, NULL);
    FILE *file = create(d->save);
    put(file, data, bytes, d->save);
    finish(file, d->save);
    free(data);
}

/* ---- Commands ---- */

static void info(const device *d)
{
    size_t need = 0;
    es_device_info on = ES_DEVICE_INFO_INIT;
    check(es_session_need(d->model, &need), "info", NULL);
    check(es_model_device(d->model, &on), "info", NULL);
    for (char *c = on.text; *c != '\0'; c++) /* a driver's words in a string of JSON */
        *c = (char)(*c == '"' || *c == '\\' || (unsigned char)*c < ' ' ? ' ' : *c);
    printf("{\"model_id\":\"");
    for (int i = 0; i < 16; i++)
        printf("%02x", d->info.model_id[i]);
    printf("\",\"abi\":%u,\"vocab\":%u,\"context\":%u,\"n_threads\":%u,\"graph_tokens\":[", d->info.abi_version,
           d->info.vocab, d->info.context, d->info.n_threads);
    for (uint32_t i = 0; i < d->info.n_graphs; i++) {
        es_graph_info graph = ES_GRAPH_INFO_INIT;
        check(es_model_graph(d->model, i, &graph), "info", NULL);
        printf("%s%u", i > 0 ? "," : "", graph.tokens);
    }
    printf("],\"file_bytes\":%llu,\"weight_bytes\":%llu,\"state_bytes\":%llu,\"io_bytes\":%llu,\"arena_bytes\":%llu,"
           "\"session_bytes\":%llu,\"device_session_bytes\":%llu,\"device\":\"%s\"}\n",
           (unsigned long long)d->info.file_bytes, (unsigned long long)d->info.weight_bytes,
           (unsigned long long)d->info.state_bytes, (unsigned long long)d->info.io_bytes,
           (unsigned long long)d->info.arena_bytes, (unsigned long long)need, (unsigned long long)on.session_bytes,
           on.text);
}

static void weights(const device *d)
{
    es_error why = ES_ERROR_INIT;
    check(es_model_check(d->model, &why), "check", &why);
    puts("{\"weights\":\"good\"}");
}

static double per_second(uint64_t n, uint64_t ns)
{
    return ns > 0 ? (double)n * 1e9 / (double)ns : 0.0;
}

static void run(device *d)
{
    size_t n = d->gens.n > 0 ? (size_t)d->gens.at[0] : 16, bytes = 0;
    int32_t *ids = (int32_t *)grab(n * sizeof *ids);
    if (d->n_tokens == 0)
        die(2, "run", "give --tokens, --tokens-file or --prompt");
    uint64_t start = now();
    check(es_prefill(d->session, d->tokens, d->n_tokens), "prefill", NULL);
    uint64_t middle = now();
    check(es_generate(d->session, &d->sampler, n, 64, ids, NULL), "generate", NULL);
    uint64_t end = now();
    if (d->raw) {
        char *text = (char *)grab(n);
        check(es_decode(d->model, ids, n, text, n, &bytes), "--raw", NULL);
        put(stdout, text, bytes, "stdout");
        free(text);
    } else {
        printf("{\"tokens\":[");
        for (size_t i = 0; i < n; i++)
            printf("%s%d", i > 0 ? "," : "", (int)ids[i]);
        printf("],\"prompt_tokens\":%llu,\"position\":%llu,\"prefill_tok_s\":%.3f,\"decode_tok_s\":%.3f,"
               "\"peak_rss_bytes\":%llu}\n",
               (unsigned long long)d->n_tokens, (unsigned long long)es_position(d->session),
               per_second(d->n_tokens, middle - start), per_second(n, end - middle),
               (unsigned long long)peak_rss_bytes());
    }
    free(ids);
}

static void logits(device *d)
{
    uint64_t rows = 0;
    if (d->out == NULL || d->n_tokens == 0)
        die(2, "logits", "give --out FILE and --tokens, --tokens-file or --prompt");
    FILE *file = create(d->out);
    for (size_t at = 0, cut = 0; at < d->n_tokens; rows++) {
        uint64_t piece = d->cuts.n > 0 ? d->cuts.at[cut < d->cuts.n ? cut : d->cuts.n - 1] : 1;
        if (piece == 0)
            die(2, "--cut", "a piece has at least one token");
        size_t n = piece < d->n_tokens - at ? (size_t)piece : d->n_tokens - at;
        check(es_prefill(d->session, d->tokens + at, n), "logits", NULL);
        put(file, es_logits(d->session), d->info.vocab * sizeof(float), d->out);
        at += n;
        cut++;
    }
    finish(file, d->out);
    printf("{\"rows\":%llu,\"vocab\":%u,\"position\":%llu}\n", (unsigned long long)rows, d->info.vocab,
           (unsigned long long)es_position(d->session));
}

/* Bytes of the step's inputs (or outputs); moves them from or to `data` unless it is NULL. */
static size_t frame_move(const device *d, int outputs, unsigned char *data)
{
    size_t total = 0;
    for (uint32_t i = 0; i < d->info.n_io; i++) {
        es_tensor_info io = ES_TENSOR_INFO_INIT;
        const void *from = NULL;
        void *to = NULL;
        size_t bytes = 0;
        check(es_model_io(d->model, i, &io), "frames", NULL);
        if (io.graph != 0 || (int)io.is_output != outputs || (!outputs && io.role != ES_ROLE_DATA))
            continue;
        if (outputs)
            check(es_output(d->session, 0, io.name, &from, &bytes), io.name, NULL);
        else
            check(es_input(d->session, 0, io.name, &to, &bytes), io.name, NULL);
        if (data != NULL && outputs)
            memcpy(data + total, from, bytes);
        else if (data != NULL)
            memcpy(to, data + total, bytes);
        total += bytes;
    }
    return total;
}

static void frames(const device *d)
{
    size_t bytes = 0, n = 0, in = frame_move(d, 0, NULL), out = frame_move(d, 1, NULL);
    uint64_t total = 0, worst = 0;
    if (d->info.takes_tokens || in == 0)
        die(2, "frames", "this model has no named inputs");
    if (d->in == NULL || d->out == NULL)
        die(2, "frames", "give --in FILE and --out FILE");
    unsigned char *data = (unsigned char *)file_read(d->in, &bytes), *made = (unsigned char *)grab(out);
    if (bytes % in != 0)
        die(1, d->in, "does not hold whole steps");
    FILE *file = create(d->out);
    for (n = 0; n < bytes / in; n++) {
        (void)frame_move(d, 0, data + n * in);
        uint64_t start = now();
        check(es_run(d->session, 0), "frames", NULL);
        uint64_t took = now() - start;
        total += took;
        worst = took > worst ? took : worst;
        (void)frame_move(d, 1, made);
        put(file, made, out, d->out);
    }
    finish(file, d->out);
    printf("{\"steps\":%llu,\"position\":%llu,\"mean_us\":%.3f,\"max_us\":%.3f}\n", (unsigned long long)n,
           (unsigned long long)es_position(d->session), n > 0 ? (double)total / 1e3 / (double)n : 0.0,
           (double)worst / 1e3);
    free(made);
    free(data);
}

static void state(const device *d)
{
    size_t bytes = 0;
    check(es_state_bytes(d->session, &bytes), "state", NULL);
    printf("{\"position\":%llu,\"bytes\":%llu}\n", (unsigned long long)es_position(d->session),
           (unsigned long long)bytes);
}

int main(int argc, char **argv)
{
    static const char *const commands[] = {"info", "check", "run", "logits", "frames", "state", "profile", "bench"};
    enum { N_COMMANDS = sizeof commands / sizeof commands[0] };
    device d = {.info = ES_MODEL_INFO_INIT, .options = ES_OPTIONS_INIT, .sampler = ES_SAMPLER_INIT, .reps = 5};
    es_error why = ES_ERROR_INIT;
    size_t command = 0;
    if (argc < 3) {
        fputs(usage, stderr);
        return 2;
    }
    while (command < N_COMMANDS && strcmp(argv[2], commands[command]) != 0)
        command++;
    if (command == N_COMMANDS)
        die(2, argv[2], "unknown command");
    arguments(&d, argc, argv);
    check(es_model_open(argv[1], &d.options, &d.model, &why), argv[1], &why);
    check(es_model_get_info(d.model, &d.info), argv[1], NULL);
    check(es_pin_caller(d.model), "--cores", NULL);
    check(es_session_create(d.model, NULL, 0, &d.session, &why), argv[1], &why);
    tokens_read(&d);
    state_load(&d);
    switch (command) {
    case 0: info(&d); break;
    case 1: weights(&d); break;
    case 2: run(&d); break;
    case 3: logits(&d); break;
    case 4: frames(&d); break;
    case 5: state(&d); break;
    case 6: profile(&d); break;
    default: bench(&d); break;
    }
    state_save(&d);
    free(d.tokens);
    check(es_session_close(&d.session), argv[1], NULL);
    check(es_model_close(&d.model), argv[1], NULL);
    if (fflush(stdout) != 0 || ferror(stdout))
        die(1, "stdout", "cannot be written");
    return 0;
}
