/* A genome through a model of bytes, base by base: what a step costs as the sequence grows, and what the model knows.
 *   edgeseq export docs/examples/dna.py:model -o dna
 *   edgeseq compile dna --target host -o dna.bundle
 *   cc -std=c99 -O2 genome.c -I dna.bundle -o genome dna.bundle/libmodel.a -pthread -lm
 *   ./genome dna.bundle/model.edgeseq ecoli.fna [FIRST [COUNT]]     a FASTA file, from base FIRST on, COUNT bases
 * One line at 128, 10 000, 100 000 and every further 100 000 bases: bits per base of those since the start and since the
 * line before, bases a second since the line before, and the most memory that the process ever had resident. The file is
 * read as it is used, so that nothing in the process grows with the genome. Last, what a base takes after 128 and after
 * all of them. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200112L
#endif
#include <edgeseq.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define BLOCK 128
#define PROBES 401

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "genome: %s: %s\n", what, why);
    exit(1);
}

static void check(es_status status, const char *what, const es_error *why)
{
    if (status != ES_OK)
        fail(what, why != NULL && why->text[0] != '\0' ? why->text : es_status_text(status));
}

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static long resident(void)
{
    struct rusage use;
    return getrusage(RUSAGE_SELF, &use) == 0 ? use.ru_maxrss : 0; /* KiB on Linux */
}

/* The next letter of a FASTA file, or EOF; lines that begin with > are names. */
static int base(FILE *file)
{
    for (;;) {
        int c = fgetc(file);
        if (c == '>')
            while (c != '\n' && c != EOF)
                c = fgetc(file);
        if (c != '\n' && c != '\r')
            return c;
    }
}

/* -log2 of the probability that the model gave to `letter`. */
static double bits(const float *logits, uint32_t n, int letter)
{
    double sum = 0, most = (double)logits[0];
    for (uint32_t i = 1; i < n; i++)
        most = (double)logits[i] > most ? (double)logits[i] : most;
    for (uint32_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - most);
    return (log(sum) - ((double)logits[letter] - most)) / log(2.0);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double block(es_session *session, const int32_t *letters)
{
    double start = now();
    for (int i = 0; i < BLOCK; i++)
        check(es_step(session, letters[i]), "step", NULL);
    return (now() - start) / BLOCK;
}

/* Seconds a base of a stream that never is more than 128 bases deep and of one that is, in turns, so that whatever else
 * the machine does meets both; the median of many blocks. */
static void compare(es_session *young, es_session *old, const int32_t *letters, double *shallow, double *deep)
{
    double one[PROBES], other[PROBES];
    for (int i = 0; i < PROBES; i++) {
        check(es_reset(young), "reset", NULL);
        one[i] = block(young, letters);
        other[i] = block(old, letters);
    }
    qsort(one, PROBES, sizeof *one, by_size);
    qsort(other, PROBES, sizeof *other, by_size);
    *shallow = one[PROBES / 2];
    *deep = other[PROBES / 2];
}

int main(int argc, char **argv)
{
    es_options options = ES_OPTIONS_INIT;
    es_model_info info = ES_MODEL_INFO_INIT;
    es_error why = ES_ERROR_INIT;
    es_model *model;
    es_session *session, *young;
    int32_t letters[BLOCK];
    if (argc < 3 || argc > 5)
        return fprintf(stderr, "usage: genome model.edgeseq genome.fna [FIRST [COUNT]]\n"), 2;
    unsigned long first = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
    unsigned long count = argc > 4 ? strtoul(argv[4], NULL, 10) : 1000000;
    options.n_threads = 1; /* a step is too short to share */
    check(es_model_open(argv[1], &options, &model, &why), argv[1], &why);
    check(es_model_get_info(model, &info), argv[1], NULL);
    if (!info.takes_tokens || info.vocab < 256)
        fail(argv[1], "is no model of bytes");
    check(es_session_create(model, NULL, 0, &session, &why), argv[1], &why);
    check(es_session_create(model, NULL, 0, &young, &why), argv[1], &why);

    FILE *file = fopen(argv[2], "rb");
    if (file == NULL)
        fail(argv[2], "cannot be read");
    int letter = base(file);
    for (unsigned long i = 0; i < first && letter != EOF; i++)
        letter = base(file);
    if (letter == EOF)
        fail(argv[2], "has no such base");

    double all = 0, since = 0, speed = 0, start = now();
    unsigned long done = 0, line = 128, before = 0;
    long small = 0;
    for (int next = base(file); done < count && next != EOF;) {
        check(es_step(session, letter), "step", NULL);
        double cost = bits(es_logits(session), info.vocab, next);
        all += cost;
        since += cost;
        letters[done % BLOCK] = letter;
        letter = next;
        next = base(file);
        if (++done != line && done != count && next != EOF)
            continue;
        double spent = now() - start;
        speed = (double)(done - before) / spent;
        small = done == 10000 ? resident() : small;
        printf("%8lu bases  %.4f bits per base, %.4f of the last %-6lu  %7.0f bases a second  peak %ld KiB\n", done,
               all / (double)done, since / (double)(done - before), done - before, speed, resident());
        (void)fflush(stdout);
        before = done;
        since = 0;
        line = line == 128 ? 10000 : line == 10000 ? 100000 : line + 100000;
        start = now();
    }
    double shallow, deep;
    long grown = small > 0 ? resident() - small : 0;
    unsigned long depth = (unsigned long)es_position(session);
    for (unsigned long i = done; i < BLOCK; i++)
        letters[i] = letter;
    compare(young, session, letters, &shallow, &deep);
    printf("memory since 10000 bases: %+ld KiB\n", grown);
    printf("steps alone: %.0f a second at depth 128, %.0f at depth %lu (%.2f us and %.2f us, %+.1f %%)\n", 1 / shallow,
           1 / deep, depth, 1e6 * shallow, 1e6 * deep, 100 * (deep / shallow - 1));
    (void)fclose(file);
    check(es_session_close(&young), "close", NULL);
    check(es_session_close(&session), "close", NULL);
    check(es_model_close(&model), "close", NULL);
    return 0;
}
