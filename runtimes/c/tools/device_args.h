/* Part of edgeseq_device.c: what one call of the driver knows, and how the command line fills it. */
#ifndef EDGESEQ_DEVICE_ARGS_H
#define EDGESEQ_DEVICE_ARGS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <edgeseq.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
    uint64_t bytes, reps, graph;
    list prompts, gens, depths, cuts;
    const char *in, *out, *load, *save, *prompt, *tokens_text, *tokens_file;
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

typedef enum { TEXT, LIST, REAL, INT32, UINT32, UINT64, CORES } kind;

static const struct {
    const char *name;
    kind kind;
    size_t at; /* in `device` */
    uint64_t largest;
} options[] = {
    {"--tokens", TEXT, offsetof(device, tokens_text), 0},
    {"--tokens-file", TEXT, offsetof(device, tokens_file), 0},
    {"--prompt", TEXT, offsetof(device, prompt), 0},
    {"--in", TEXT, offsetof(device, in), 0},
    {"--out", TEXT, offsetof(device, out), 0},
    {"--load-state", TEXT, offsetof(device, load), 0},
    {"--save-state", TEXT, offsetof(device, save), 0},
    {"--cut", LIST, offsetof(device, cuts), INT32_MAX},
    {"-p", LIST, offsetof(device, prompts), INT32_MAX},
    {"-n", LIST, offsetof(device, gens), INT32_MAX},
    {"-d", LIST, offsetof(device, depths), INT32_MAX},
    {"-r", UINT64, offsetof(device, reps), 1000000},
    {"--graph", UINT64, offsetof(device, graph), UINT32_MAX},
    {"--bytes", UINT64, offsetof(device, bytes), SIZE_MAX / 2},
    {"--temperature", REAL, offsetof(device, sampler.temperature), 0},
    {"--top-k", INT32, offsetof(device, sampler.top_k), INT32_MAX},
    {"--top-p", REAL, offsetof(device, sampler.top_p), 0},
    {"--min-p", REAL, offsetof(device, sampler.min_p), 0},
    {"--penalty", REAL, offsetof(device, sampler.repetition_penalty), 0},
    {"--seed", UINT64, offsetof(device, sampler.seed), UINT64_MAX},
    {"--threads", INT32, offsetof(device, options.n_threads), ES_THREADS_MAX},
    {"--spin", UINT32, offsetof(device, options.spin), UINT32_MAX},
    {"--cores", CORES, 0, INT32_MAX},
};

static void cores_read(device *d, const char *name, const char *value)
{
    list cores = numbers(value, name, INT32_MAX);
    for (size_t i = 0; i < cores.n; i++)
        d->cores[i] = (int32_t)cores.at[i];
    d->options.cores = d->cores;
    d->options.n_cores = (uint32_t)cores.n;
}

static void option(device *d, const char *name, const char *value)
{
    size_t i = 0, n = sizeof options / sizeof options[0];
    while (i < n && strcmp(name, options[i].name) != 0)
        i++;
    if (i == n)
        die(2, name, "unknown option");
    void *place = (char *)d + options[i].at;
    switch (options[i].kind) {
    case TEXT: *(const char **)place = value; break;
    case LIST: *(list *)place = numbers(value, name, options[i].largest); break;
    case REAL: *(float *)place = real(value, name); break;
    case INT32: *(int32_t *)place = (int32_t)number(value, name, options[i].largest); break;
    case UINT32: *(uint32_t *)place = (uint32_t)number(value, name, options[i].largest); break;
    case UINT64: *(uint64_t *)place = number(value, name, options[i].largest); break;
    case CORES: cores_read(d, name, value); break;
    }
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

#endif
