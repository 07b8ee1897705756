/* The command-line driver that runs on a device beside a bundle: `edgeseq-device FILE COMMAND [OPTIONS]`.
 * Results are lines of JSON on stdout, errors one sentence on stderr. Exit code 0 done, 1 failed, 2 wrong use. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <edgeseq.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static const char usage[] =
    "usage: edgeseq-device model.edgeseq COMMAND [OPTIONS]\n"
    "  info                                   what the model is\n"
    "  check                                  read the weights and compare their checksum\n"
    "  run    TOKENS -n N [--raw]             generate N tokens; --raw writes their text alone\n"
    "  logits TOKENS --out FILE [--cut N,..]  feed pieces of N tokens (the last size repeats; default 1),\n"
    "                                         write float32 logits after each\n"
    "  state                                  what --load-state holds\n"
    "  bench  [-p N,..] [-n N,..] [-d N,..] [-r REPS] [--bytes N]\n"
    "TOKENS: --tokens 1,2,3 or --tokens-file FILE or --prompt TEXT\n"
    "state:  --load-state FILE, --save-state FILE\n"
    "sample: --temperature F --top-k N --top-p F --min-p F --penalty F --seed N\n"
    "pool:   --threads N --cores 0,1,.. --spin N --poison\n";

enum { LIST_MAX = 64, CORES_MAX = 256 };

typedef struct {
    size_t n;
    uint64_t at[LIST_MAX];
} list;

typedef struct {
    es_model *model;
    es_session *session;
    es_model_info info;
    es_options options;
    es_sampler sampler;
    int32_t cores[CORES_MAX];
    int32_t *tokens;
    size_t n_tokens;
    uint64_t bytes, reps;
    list prompts, gens, depths, cuts;
    const char *out, *load, *save, *prompt, *tokens_text, *tokens_file;
    int raw;
} device;

static void die(int code, const char *what, const char *why)
{
    fprintf(stderr, "edgeseq-device: %s%s%s\n", what, *why != '\0' ? ": " : "", why);
    exit(code);
}

static void check(es_status status, const char *what, const es_error *why)
{
    if (status != ES_OK)
        die(1, what, why != NULL && why->text[0] != '\0' ? why->text : es_status_text(status));
}

static void *grab(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL)
        die(1, "out of memory", "");
    return memory;
}

static uint64_t now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- Arguments ---- */

static uint64_t number(const char *text, const char *name, uint64_t largest)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || *text == '-' || value > largest)
        die(2, name, "not a number in range");
    return value;
}

static float real(const char *text, const char *name)
{
    char *end;
    float value = strtof(text, &end);
    if (end == text || *end != '\0')
        die(2, name, "not a number");
    return value;
}

/* The next number of a list separated by commas or white space; 0 at its end. */
static int next_number(const char **text, const char *name, uint64_t largest, uint64_t *value)
{
    char *end;
    const char *at = *text + strspn(*text, ", \t\r\n");
    if (*at == '\0')
        return 0;
    errno = 0;
    *value = strtoull(at, &end, 10);
    if (end == at || errno != 0 || *at == '-' || *value > largest || (*end != '\0' && strspn(end, ", \t\r\n") == 0))
        die(2, name, "not a list of numbers");
    *text = end;
    return 1;
}

static list numbers(const char *text, const char *name, uint64_t largest)
{
    list l = {0, {0}};
    uint64_t value;
    while (next_number(&text, name, largest, &value)) {
        if (l.n == LIST_MAX)
            die(2, name, "too long a list");
        l.at[l.n++] = value;
    }
    return l;
}

static void option(device *d, const char *name, const char *value)
{
    if (strcmp(name, "--tokens") == 0) d->tokens_text = value;
    else if (strcmp(name, "--tokens-file") == 0) d->tokens_file = value;
    else if (strcmp(name, "--prompt") == 0) d->prompt = value;
    else if (strcmp(name, "--out") == 0) d->out = value;
    else if (strcmp(name, "--load-state") == 0) d->load = value;
    else if (strcmp(name, "--save-state") == 0) d->save = value;
    else if (strcmp(name, "--cut") == 0) d->cuts = numbers(value, name, INT32_MAX);
    else if (strcmp(name, "-p") == 0) d->prompts = numbers(value, name, INT32_MAX);
    else if (strcmp(name, "-n") == 0) d->gens = numbers(value, name, INT32_MAX);
    else if (strcmp(name, "-d") == 0) d->depths = numbers(value, name, INT32_MAX);
    else if (strcmp(name, "-r") == 0) d->reps = number(value, name, 1000000);
    else if (strcmp(name, "--bytes") == 0) d->bytes = number(value, name, SIZE_MAX / 2);
    else if (strcmp(name, "--temperature") == 0) d->sampler.temperature = real(value, name);
    else if (strcmp(name, "--top-k") == 0) d->sampler.top_k = (int32_t)number(value, name, INT32_MAX);
    else if (strcmp(name, "--top-p") == 0) d->sampler.top_p = real(value, name);
    else if (strcmp(name, "--min-p") == 0) d->sampler.min_p = real(value, name);
    else if (strcmp(name, "--penalty") == 0) d->sampler.repetition_penalty = real(value, name);
    else if (strcmp(name, "--seed") == 0) d->sampler.seed = number(value, name, UINT64_MAX);
    else if (strcmp(name, "--threads") == 0) d->options.n_threads = (int32_t)number(value, name, ES_THREADS_MAX);
    else if (strcmp(name, "--spin") == 0) d->options.spin = (uint32_t)number(value, name, UINT32_MAX);
    else if (strcmp(name, "--cores") == 0) {
        list cores = numbers(value, name, INT32_MAX);
        for (size_t i = 0; i < cores.n; i++)
            d->cores[i] = (int32_t)cores.at[i];
        d->options.cores = d->cores;
        d->options.n_cores = (uint32_t)cores.n;
    } else die(2, name, "unknown option");
}

static void arguments(device *d, int argc, char **argv)
{
    for (int i = 3; i < argc; i++) {
        if (strcmp(argv[i], "--raw") == 0)
            d->raw = 1;
        else if (strcmp(argv[i], "--poison") == 0)
            d->options.flags |= ES_POISON;
        else if (i + 1 == argc)
            die(2, argv[i], "unknown option, or its value is missing");
        else {
            option(d, argv[i], argv[i + 1]);
            i++;
        }
    }
}

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
    check(es_session_need(d->model, &need), "info", NULL);
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
           "\"session_bytes\":%llu}\n",
           (unsigned long long)d->info.file_bytes, (unsigned long long)d->info.weight_bytes,
           (unsigned long long)d->info.state_bytes, (unsigned long long)d->info.io_bytes,
           (unsigned long long)d->info.arena_bytes, (unsigned long long)need);
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
        printf("],\"prompt_tokens\":%llu,\"position\":%llu,\"prefill_tok_s\":%.3f,\"decode_tok_s\":%.3f}\n",
               (unsigned long long)d->n_tokens, (unsigned long long)es_position(d->session),
               per_second(d->n_tokens, middle - start), per_second(n, end - middle));
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

static void state(const device *d)
{
    size_t bytes = 0;
    check(es_state_bytes(d->session, &bytes), "state", NULL);
    printf("{\"position\":%llu,\"bytes\":%llu}\n", (unsigned long long)es_position(d->session),
           (unsigned long long)bytes);
}

/* ---- Bench ---- */

static void fill(device *d, int32_t *ids, size_t n)
{
    static uint64_t seed = 1;
    for (size_t i = 0; i < n; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((seed >> 33) % d->info.vocab);
    }
}

static void samples(const char *name, const uint64_t *ns, size_t n)
{
    printf(",\"%s\":[", name);
    for (size_t i = 0; i < n; i++)
        printf("%s%llu", i > 0 ? "," : "", (unsigned long long)ns[i]);
    printf("]");
}

/* Times `n` tokens from where `from` stands, `reps` times: at once (prefill) or one by one (decode). */
static void bench_case(device *d, const es_session *from, size_t n, uint64_t depth, int decode)
{
    size_t reps = (size_t)d->reps;
    int32_t *ids = (int32_t *)grab(n * sizeof *ids);
    uint64_t *total = (uint64_t *)grab(reps * sizeof *total), *each = (uint64_t *)grab(reps * n * sizeof *each);
    for (size_t r = 0; r < reps; r++) {
        fill(d, ids, n);
        check(es_session_copy(d->session, from), "bench", NULL);
        uint64_t start = now(), before = start;
        for (size_t i = 0; decode && i < n; i++) {
            check(es_step(d->session, ids[i]), "decode", NULL);
            uint64_t after = now();
            each[r * n + i] = after - before;
            before = after;
        }
        if (!decode)
            check(es_prefill(d->session, ids, n), "prefill", NULL);
        total[r] = now() - start;
    }
    printf("{\"test\":\"%s%llu\",\"n_prompt\":%llu,\"n_gen\":%llu,\"n_depth\":%llu,\"n_threads\":%u",
           decode ? "tg" : "pp", (unsigned long long)n, (unsigned long long)(decode ? 0 : n),
           (unsigned long long)(decode ? n : 0), (unsigned long long)depth, d->info.n_threads);
    samples("samples_ns", total, reps);
    if (decode)
        samples("token_ns", each, reps * n);
    printf("}\n");
    fflush(stdout);
    free(ids);
    free(total);
    free(each);
}

static void bench_machine(device *d)
{
    double rate = 0, ns = 0;
    size_t bytes = d->bytes > 0 ? (size_t)d->bytes : 256u << 20;
    uint8_t *buffer = (uint8_t *)grab(bytes);
    memset(buffer, 1, bytes);
    check(es_measure_read(d->model, buffer, bytes, 5, &rate), "bench", NULL);
    check(es_measure_launch(d->model, (int32_t)d->info.n_threads * 4, 10000, &ns), "bench", NULL);
    printf("{\"test\":\"machine\",\"n_threads\":%u,\"read_bytes\":%llu,\"read_bw\":%.0f,\"launch_ns\":%.1f}\n",
           d->info.n_threads, (unsigned long long)bytes, rate, ns);
    fflush(stdout);
    free(buffer);
}

/* The process's own peak. getrusage alone would count whoever started it, whose peak survives fork and exec. */
static uint64_t peak_rss_bytes(void)
{
    struct rusage use;
    char line[128];
    unsigned long long kib = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status != NULL && kib == 0 && fgets(line, sizeof line, status) != NULL)
        (void)sscanf(line, "VmHWM: %llu kB", &kib);
    if (status != NULL)
        fclose(status);
    memset(&use, 0, sizeof use);
    if (kib == 0 && getrusage(RUSAGE_SELF, &use) == 0)
        kib = (unsigned long long)use.ru_maxrss;
    return (uint64_t)kib * 1024u;
}

static void bench_memory(const device *d)
{
    size_t need = 0;
    check(es_session_need(d->model, &need), "bench", NULL);
    printf("{\"test\":\"memory\",\"peak_rss_bytes\":%llu,\"session_bytes\":%llu,\"state_bytes\":%llu,"
           "\"weight_bytes\":%llu}\n",
           (unsigned long long)peak_rss_bytes(), (unsigned long long)need, (unsigned long long)d->info.state_bytes,
           (unsigned long long)d->info.weight_bytes);
}

static void bench(device *d)
{
    es_error why = ES_ERROR_INIT;
    es_session *base;
    uint64_t depth = 0;
    if (d->info.takes_tokens == 0 || d->reps == 0)
        die(2, "bench", "needs a model of tokens and at least one repetition");
    if (d->prompts.n + d->gens.n == 0) {
        d->prompts = numbers("512", "-p", 512);
        d->gens = numbers("128", "-n", 128);
    }
    check(es_session_create(d->model, NULL, 0, &base, &why), "bench", &why);
    for (size_t i = 0; i < (d->depths.n > 0 ? d->depths.n : 1); i++) {
        uint64_t wanted = d->depths.n > 0 ? d->depths.at[i] : 0;
        if (wanted < depth)
            die(2, "-d", "depths must rise");
        int32_t *ids = (int32_t *)grab((size_t)(wanted - depth) * sizeof *ids);
        fill(d, ids, (size_t)(wanted - depth));
        check(es_prefill(base, ids, (size_t)(wanted - depth)), "prefill to depth", NULL);
        free(ids);
        depth = wanted;
        for (size_t k = 0; k < d->prompts.n; k++)
            bench_case(d, base, (size_t)d->prompts.at[k], depth, 0);
        for (size_t k = 0; k < d->gens.n; k++)
            bench_case(d, base, (size_t)d->gens.at[k], depth, 1);
    }
    bench_memory(d); /* before the buffer of bench_machine counts as ours */
    bench_machine(d);
    check(es_session_close(&base), "bench", NULL);
}

int main(int argc, char **argv)
{
    static const device blank = {
        NULL, NULL, ES_MODEL_INFO_INIT, ES_OPTIONS_INIT, ES_SAMPLER_INIT, {0}, NULL, 0, 0, 5, {0, {0}}, {0, {0}},
        {0, {0}}, {0, {0}}, NULL, NULL, NULL, NULL, NULL, NULL, 0,
    };
    static const char *const commands[] = {"info", "check", "run", "logits", "state", "bench"};
    device d = blank;
    es_error why = ES_ERROR_INIT;
    size_t command = 0;
    if (argc < 3) {
        fputs(usage, stderr);
        return 2;
    }
    while (command < 6 && strcmp(argv[2], commands[command]) != 0)
        command++;
    if (command == 6)
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
    case 1: check(es_model_check(d.model, &why), argv[1], &why); puts("{\"weights\":\"good\"}"); break;
    case 2: run(&d); break;
    case 3: logits(&d); break;
    case 4: state(&d); break;
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
