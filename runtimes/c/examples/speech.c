/* Streams a recording through a speech detector: frames in, decisions out, with what a frame cost.
 *   edgeseq compile silero_vad_op18_ifless.onnx --state state:stateN --value sr=16000 --shape input=1,576 --dim batch=1 \
 *       --target host -o bundle
 *   cc -std=c99 speech.c -I bundle -o speech bundle/libmodel.a -pthread -lm
 *   ./speech bundle/model.edgeseq recording.wav          16-bit mono, at the rate the model was trained on
 * The model has one input [1,n] of samples, of which the last HOP are new, and one output with one probability. */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200112L
#endif
#include <edgeseq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HOP 512u
#define BEGINS 0.5f /* speech begins above this probability ... */
#define ENDS 0.35f  /* ... and ends below this one, so that it does not flicker */

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "speech: %s: %s\n", what, why);
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

static uint32_t little(const unsigned char *at, int bytes)
{
    uint32_t value = 0;
    while (bytes-- > 0)
        value = value << 8 | at[bytes];
    return value;
}

/* Leaves `file` at the samples; returns how many there are, and their rate. */
static uint32_t wav_open(FILE *file, const char *path, uint32_t *rate)
{
    unsigned char head[12], chunk[8], format[16] = {0};
    int known = 0;
    if (fread(head, 12, 1, file) != 1 || memcmp(head, "RIFF", 4) != 0 || memcmp(head + 8, "WAVE", 4) != 0)
        fail(path, "is not a WAV file");
    while (fread(chunk, 8, 1, file) == 1) {
        uint32_t bytes = little(chunk + 4, 4), read = 0;
        if (memcmp(chunk, "data", 4) == 0 && known) {
            *rate = little(format + 4, 4);
            if (little(format, 2) != 1 || little(format + 2, 2) != 1 || little(format + 14, 2) != 16 || *rate == 0)
                fail(path, "is not 16-bit mono PCM");
            return bytes / 2;
        }
        if (memcmp(chunk, "fmt ", 4) == 0 && bytes >= 16) {
            if (fread(format, 16, 1, file) != 1)
                break;
            known = 1;
            read = 16;
        }
        if (fseek(file, (long)(bytes - read + bytes % 2), SEEK_CUR) != 0)
            break;
    }
    fail(path, "has no samples");
    return 0;
}

/* The model's only input of samples, and where its probability appears. */
static float *frame_of(const es_model *model, es_session *session, size_t *n, const float **probability)
{
    es_model_info info = ES_MODEL_INFO_INIT;
    float *frame = NULL;
    check(es_model_get_info(model, &info), "model", NULL);
    for (uint32_t i = 0; i < info.n_io; i++) {
        es_tensor_info io = ES_TENSOR_INFO_INIT;
        void *in;
        const void *out;
        size_t bytes;
        check(es_model_io(model, i, &io), "model", NULL);
        if (io.graph != 0 || io.dtype != ES_FLOAT32)
            continue;
        if (!io.is_output && frame == NULL) {
            check(es_input(session, 0, io.name, &in, &bytes), io.name, NULL);
            frame = (float *)in;
            *n = bytes / sizeof(float);
        } else if (io.is_output && io.bytes == sizeof(float)) {
            check(es_output(session, 0, io.name, &out, &bytes), io.name, NULL);
            *probability = (const float *)out;
        }
    }
    if (frame == NULL || *probability == NULL || *n < HOP)
        fail("model", "is no detector: it needs an input of at least 512 samples and an output of one number");
    return frame;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    es_options options = ES_OPTIONS_INIT;
    es_error why = ES_ERROR_INIT;
    es_model *model;
    es_session *session;
    const float *probability = NULL;
    size_t n = 0;
    uint32_t rate = 0, frames, speech = 0;
    if (argc != 3)
        return fprintf(stderr, "usage: speech model.edgeseq recording.wav\n"), 2;
    options.n_threads = 1; /* a frame is too short to share */
    check(es_model_open(argv[1], &options, &model, &why), argv[1], &why);
    check(es_session_create(model, NULL, 0, &session, &why), argv[1], &why);
    float *frame = frame_of(model, session, &n, &probability);

    FILE *file = fopen(argv[2], "rb");
    if (file == NULL)
        fail(argv[2], "cannot be read");
    frames = wav_open(file, argv[2], &rate) / HOP;
    double *took = (double *)malloc((frames > 0 ? frames : 1) * sizeof *took), total = 0;
    float *context = (float *)calloc(n, sizeof *context); /* what the model saw last; silence at first */
    if (took == NULL || context == NULL)
        fail(argv[2], "not enough memory");

    for (uint32_t i = 0; i < frames; i++) {
        unsigned char samples[2 * HOP];
        if (fread(samples, sizeof samples, 1, file) != 1) {
            frames = i;
            break;
        }
        memmove(context, context + HOP, (n - HOP) * sizeof *context);
        for (size_t s = 0; s < HOP; s++)
            context[n - HOP + s] = (float)(int16_t)little(samples + 2 * s, 2) / 32768.0f;
        double start = now();
        memcpy(frame, context, n * sizeof *frame);
        check(es_run(session, 0), "step", NULL);
        took[i] = now() - start;
        total += took[i];
        if (speech == 0 ? *probability > BEGINS : *probability < ENDS) {
            printf("%8.2f s  %s  %.3f\n", (double)i * HOP / rate, speech == 0 ? "speech" : "silence",
                   (double)*probability);
            speech = !speech;
        }
    }
    double seconds = (double)frames * HOP / rate;
    qsort(took, frames, sizeof *took, by_size);
    if (frames > 0)
        printf("%.2f s of sound in %.1f ms: real-time factor %.5f; a frame of %.0f ms takes %.1f us (p99 %.1f us)\n",
               seconds, 1e3 * total, total / seconds, 1e3 * HOP / rate, 1e6 * took[frames / 2],
               1e6 * took[frames - 1 - frames / 100]);
    free(took);
    free(context);
    (void)fclose(file);
    check(es_session_close(&session), "close", NULL);
    check(es_model_close(&model), "close", NULL);
    return 0;
}
