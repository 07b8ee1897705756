/* Part of edgeseq_device.c: timing on the device. Prefill and decode at given depths, then memory, then the machine. */
#ifndef EDGESEQ_DEVICE_BENCH_H
#define EDGESEQ_DEVICE_BENCH_H

#include "device_args.h"

#include <sys/resource.h>

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

/* Times every launch of one graph, each time from the fresh state: one line of nanoseconds a repetition. */
static void profile(const device *d)
{
    uint32_t g = (uint32_t)d->graph;
    es_graph_info graph = ES_GRAPH_INFO_INIT;
    check(es_model_graph(d->model, g, &graph), "--graph", NULL);
    uint64_t *ns = (uint64_t *)grab(graph.n_launches * sizeof *ns);
    for (uint64_t r = 0; r < d->reps; r++) {
        check(es_reset(d->session), "profile", NULL);
        check(es_profile(d->session, g, ns, graph.n_launches), "profile", NULL);
        printf("{\"test\":\"profile\",\"graph\":%u,\"n_threads\":%u", g, d->info.n_threads);
        samples("launch_ns", ns, graph.n_launches);
        printf("}\n");
        fflush(stdout);
    }
    free(ns);
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

#endif
