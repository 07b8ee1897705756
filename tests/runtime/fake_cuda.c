/* A CUDA driver over host memory, as far as the runtime uses one, for tests without a GPU.
 *
 * It is lazier than any device: what is put into a stream runs when somebody waits for it and not before, and pinned
 * memory is read and written then. Kernels are C functions of the runtime's CPU signature, looked up by the names in
 * ".entry name(" of the loaded text (which may follow 64 bytes of ELF header). Misuse of a handle aborts.
 *
 * fake_cuda_set("name", value) sets a property; fake_cuda_fail(symbol, nth, code) lets one call fail;
 * fake_cuda_live() counts what was made and not given back; fake_cuda_calls(symbol) counts calls. */
#define _GNU_SOURCE 1
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*kernel_fn)(void *const *args, int32_t begin, int32_t end);
kernel_fn fake_kernel(const char *name); /* fake_kernels.c */

enum { CONTEXT = 0x1001, MODULE, FUNCTION, MEMORY, PINNED, STREAM, EVENT, GRAPH, EXEC };
enum { COPY, FILL, KERNEL, RECORD, REPLAY };
enum { ARGS = 16 };

typedef struct op {
    int kind;
    uint8_t *to;
    const uint8_t *from;
    uint8_t *own; /* a copy of pageable memory */
    size_t bytes;
    uint8_t value;
    struct object *object; /* function, event or exec */
    uint64_t args[ARGS];
    int32_t blocks;
    struct op *next;
} op;

typedef struct object {
    int kind;
    struct object *next;    /* of all that live */
    uint8_t *data;          /* memory */
    size_t bytes;
    char name[64];          /* function */
    kernel_fn fn;
    uint32_t n_args;
    char *text;             /* module */
    op *first, **end;       /* stream, graph, exec */
    struct object *capture; /* stream: the graph that is being made */
    pthread_t capturer;
    int broken, references; /* capture invalidated; exec in use */
    struct object *stream;  /* event: where it is recorded and has not passed */
    uint64_t when;
    int recorded, timed;
} object;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static object *living;
static int sticky, n_contexts;
static uint64_t now_ns, n_kernels;
static __thread int depth;
static object the_context;
static char loaded[64];

static struct {
    const char *name;
    long long value;
} properties[] = {{"version", 12040}, {"devices", 1},    {"major", 9}, {"minor", 0}, {"memory", 1ll << 40},
                  {"fault", 0},       {"threads", 1024}, {"jit", 1},   {"init", 0},  {"early", 1}};
enum { VERSION, DEVICES, MAJOR, MINOR, MEMORY_LEFT, FAULT, THREADS, JIT, INIT, EARLY };

static struct {
    char symbol[64];
    long calls, fail_at;
    int code;
} counts[64];

static int count(const char *symbol)
{
    int i = 0;
    while (i < 63 && counts[i].symbol[0] != 0 && strcmp(counts[i].symbol, symbol) != 0)
        i++;
    strncpy(counts[i].symbol, symbol, sizeof counts[i].symbol - 1);
    return i;
}

static void misuse(const char *what)
{
    fprintf(stderr, "fake CUDA: %s\n", what);
    abort();
}

int fake_cuda_set(const char *name, long long value)
{
    for (size_t i = 0; i < sizeof properties / sizeof *properties; i++)
        if (strcmp(name, properties[i].name) == 0) {
            properties[i].value = value;
            return 0;
        }
    return -1;
}

void fake_cuda_fail(const char *symbol, long nth, int code)
{
    int i = count(symbol);
    counts[i].fail_at = counts[i].calls + nth;
    counts[i].code = code;
}

long fake_cuda_calls(const char *symbol)
{
    return counts[count(symbol)].calls;
}

/* Fresh properties, no failures, no lost device; what lives goes on living. */
void fake_cuda_reset(void)
{
    static const long long fresh[] = {12040, 1, 9, 0, 1ll << 40, 0, 1024, 1, 0, 1};
    for (size_t i = 0; i < sizeof fresh / sizeof *fresh; i++)
        properties[i].value = fresh[i];
    memset(counts, 0, sizeof counts);
    sticky = 0;
    n_kernels = 0;
}

/* The first line of the last module that is not the runtime's own. */
const char *fake_cuda_loaded(void)
{
    return loaded;
}

int fake_cuda_live(void)
{
    int n = n_contexts + (depth != 0);
    for (object *o = living; o != NULL; o = o->next)
        n++;
    return n;
}

#define BEGIN                                                                                                          \
    int result = 0;                                                                                                    \
    pthread_mutex_lock(&lock);                                                                                         \
    do {                                                                                                               \
        int entry_ = count(__func__);                                                                                  \
        if (++counts[entry_].calls == counts[entry_].fail_at) {                                                        \
            result = counts[entry_].code;                                                                              \
            if (result >= 700 && result < 720)                                                                         \
                sticky = result;                                                                                       \
            break;                                                                                                     \
        }
#define NEEDS_CONTEXT                                                                                                  \
    if (depth < 1) {                                                                                                   \
        result = 201;                                                                                                  \
        break;                                                                                                         \
    }                                                                                                                  \
    if (sticky) {                                                                                                      \
        result = sticky;                                                                                               \
        break;                                                                                                         \
    }
#define END_WITH(last)                                                                                                 \
    }                                                                                                                  \
    while (0)                                                                                                          \
        ;                                                                                                              \
    last;                                                                                                              \
    pthread_mutex_unlock(&lock);                                                                                       \
    return result;
#define END END_WITH((void)0)

static object *make(int kind)
{
    object *o = calloc(1, sizeof *o);
    o->kind = kind;
    o->end = &o->first;
    o->next = living;
    living = o;
    return o;
}

static object *as(void *handle, int kind)
{
    for (object *o = living; o != NULL; o = o->next)
        if (o == handle) {
            if (o->kind != kind)
                misuse("a handle of another kind");
            return o;
        }
    misuse("a handle that is not alive");
    return NULL;
}

static void drop_ops(object *o)
{
    while (o->first != NULL) {
        op *gone = o->first;
        o->first = gone->next;
        free(gone->own);
        if (gone->kind == REPLAY)
            gone->object->references--;
        free(gone);
    }
    o->end = &o->first;
}

static void destroy(object *o)
{
    for (object **at = &living; *at != NULL; at = &(*at)->next)
        if (*at == o) {
            *at = o->next;
            break;
        }
    drop_ops(o);
    free(o->data);
    free(o->text);
    free(o);
}

/* The living memory of a kind that holds the bytes; NULL when there is none. */
static object *holder(int kind, const void *start, size_t bytes)
{
    const uint8_t *p = start;
    for (object *o = living; o != NULL; o = o->next)
        if (o->kind == kind && p >= o->data && bytes <= o->bytes && p <= o->data + (o->bytes - bytes))
            return o;
    return NULL;
}

static void run_ops(op *first, op *last);

static void run_op(op *o)
{
    void *args[ARGS];
    if (sticky)
        return;
    switch (o->kind) {
    case COPY:
        if (holder(MEMORY, o->to, o->bytes) == NULL && holder(PINNED, o->to, o->bytes) == NULL)
            sticky = 700;
        else
            memcpy(o->to, o->own != NULL ? o->own : o->from, o->bytes);
        break;
    case FILL: memset(o->to, o->value, o->bytes); break;
    case KERNEL:
        now_ns += 1000;
        if (properties[FAULT].value > 0 && ++n_kernels == (uint64_t)properties[FAULT].value) {
            sticky = 700;
            return;
        }
        for (uint32_t i = 0; i < o->object->n_args; i++) {
            args[i] = (void *)(uintptr_t)o->args[i];
            if (strncmp(o->object->name, "es_", 3) != 0 && holder(MEMORY, args[i], 1) == NULL) {
                sticky = 700;
                return;
            }
        }
        o->object->fn(args, 0, o->blocks);
        break;
    case RECORD:
        o->object->when = now_ns;
        o->object->stream = NULL;
        break;
    case REPLAY: run_ops(o->object->first, NULL); break;
    }
}

static void run_ops(op *first, op *last)
{
    for (op *o = first; o != NULL; o = o->next) {
        run_op(o);
        if (o == last)
            return;
    }
}

/* What is in the stream up to `last`, or all. */
static void flush(object *stream, op *last)
{
    while (stream->first != NULL) {
        op *o = stream->first;
        int stop = o == last;
        run_op(o);
        stream->first = o->next;
        if (stream->first == NULL)
            stream->end = &stream->first;
        if (o->kind == REPLAY && --o->object->references == 0 && o->object->kind == -EXEC) {
            drop_ops(o->object);
            free(o->object);
        }
        free(o->own);
        free(o);
        if (stop)
            return;
    }
}

/* Into the stream, or into what it captures. */
static int put(void *handle, op *made)
{
    object *stream = as(handle, STREAM), *into = stream->capture != NULL ? stream->capture : stream;
    op *o = malloc(sizeof *o);
    *o = *made;
    o->next = NULL;
    *into->end = o;
    into->end = &o->next;
    return 0;
}

int cuInit(unsigned int flags)
{
    BEGIN result = flags != 0 ? 1 : (int)properties[INIT].value;
    END
}

int cuDriverGetVersion(int *version)
{
    *version = (int)properties[VERSION].value;
    return 0;
}

int cuGetErrorName(int code, const char **name)
{
    *name = code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
    return 0;
}

int cuGetErrorString(int code, const char **text)
{
    *text = code == 700 ? "an illegal memory access was encountered" : "a failure on purpose";
    return 0;
}

int cuDeviceGetCount(int *n)
{
    BEGIN *n = (int)properties[DEVICES].value;
    END
}

int cuDeviceGet(int *device, int ordinal)
{
    BEGIN *device = 40 + ordinal;
    END
}

int cuDeviceGetName(char *name, int bytes, int device)
{
    BEGIN snprintf(name, (size_t)bytes, "Fake %d", device - 40);
    END
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    BEGIN(void) device;
    *value = attribute == 75   ? (int)properties[MAJOR].value
             : attribute == 76 ? (int)properties[MINOR].value
             : attribute == 16 ? 2
             : attribute == 38 ? 4096
                               : 0;
    END
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    (void)device;
    *bytes = (size_t)1 << 30;
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    BEGIN(void) device;
    n_contexts++;
    *context = &the_context;
    END
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    BEGIN(void) device;
    if (n_contexts-- < 1)
        misuse("the context is released too often");
    END
}

int cuCtxPushCurrent_v2(void *context)
{
    BEGIN if (context != &the_context) misuse("a foreign context");
    depth++;
    END
}

int cuCtxPopCurrent_v2(void **context)
{
    BEGIN if (depth-- < 1) misuse("no context to pop");
    *context = &the_context;
    END
}

int cuModuleLoadDataEx(void **module, const void *image, unsigned int n, int *options, void **values)
{
    BEGIN NEEDS_CONTEXT const char *text = image;
    if (memcmp(text, "\177ELF", 4) == 0)
        text += 64;
    else if (!properties[JIT].value) {
        result = 221;
        break;
    }
    if (strstr(text, "error") != NULL) {
        for (unsigned int i = 0; i + 1 < n; i++)
            if (options[i] == 5)
                snprintf(values[i], (size_t)(uintptr_t)values[i + 1], "ptxas: line 7\nmore");
        result = 218;
        break;
    }
    if (strstr(text, "other arch") != NULL || strstr(text, "newer") != NULL) {
        result = strstr(text, "newer") != NULL ? 222 : 209;
        break;
    }
    object *o = make(MODULE);
    o->text = strdup(text);
    if (strstr(text, "es_advance") == NULL)
        snprintf(loaded, sizeof loaded, "%.*s", (int)strcspn(text, "\n"), text);
    *module = o;
    END
}

int cuModuleUnload(void *module)
{
    BEGIN object *m = as(module, MODULE);
    for (object *o = living, *next; o != NULL; o = next) {
        next = o->next;
        if (o->kind == FUNCTION && o->stream == m)
            destroy(o);
    }
    destroy(m);
    END
}

int cuModuleGetFunction(void **function, void *module, const char *name)
{
    BEGIN NEEDS_CONTEXT object *m = as(module, MODULE);
    char entry[96];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    const char *at = strstr(m->text, entry);
    kernel_fn fn = fake_kernel(name);
    if (at == NULL || fn == NULL) {
        result = 500;
        break;
    }
    object *o = make(FUNCTION);
    o->fn = fn;
    o->stream = m;
    snprintf(o->name, sizeof o->name, "%s", name);
    for (const char *end = strchr(at, ')'); (at = strstr(at, ".param")) != NULL && at < end; at++)
        o->n_args++;
    if (o->n_args > ARGS)
        misuse("too many parameters");
    *function = o;
    END
}

int cuFuncGetAttribute(int *value, int attribute, void *function)
{
    BEGIN as(function, FUNCTION);
    *value = attribute == 0 ? (int)properties[THREADS].value : 0;
    END
}

int cuFuncGetParamInfo(void *function, size_t index, size_t *offset, size_t *bytes)
{
    BEGIN object *o = as(function, FUNCTION);
    if (index >= o->n_args) {
        result = 1;
        break;
    }
    *offset = 8 * index;
    *bytes = 8;
    END
}

static int allocate(int kind, size_t bytes, void **address)
{
    if (kind == MEMORY && (long long)bytes > properties[MEMORY_LEFT].value)
        return 2;
    object *o = make(kind);
    o->bytes = bytes;
    o->data = aligned_alloc(256, (bytes + 255) / 256 * 256);
    memset(o->data, 0xcd, bytes < 1 << 20 ? bytes : 1 << 20); /* never zero by chance */
    *address = o->data;
    return 0;
}

static void release(int kind, const void *address)
{
    for (object *o = living; o != NULL; o = o->next)
        if (o->kind == kind && o->data == address) {
            destroy(o);
            return;
        }
    misuse("memory that is not alive is freed");
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes)
{
    BEGIN NEEDS_CONTEXT void *made = NULL;
    if (bytes == 0)
        misuse("an allocation of nothing");
    result = allocate(MEMORY, bytes, &made);
    *address = (uint64_t)(uintptr_t)made;
    END
}

int cuMemFree_v2(uint64_t address)
{
    BEGIN release(MEMORY, (void *)(uintptr_t)address);
    END
}

int cuMemGetInfo_v2(size_t *available, size_t *total)
{
    BEGIN *available = (size_t)properties[MEMORY_LEFT].value;
    *total = (size_t)1 << 30;
    END
}

int cuMemAllocHost_v2(void **address, size_t bytes)
{
    BEGIN NEEDS_CONTEXT result = allocate(PINNED, bytes, address);
    END
}

int cuMemFreeHost(void *address)
{
    BEGIN release(PINNED, address);
    END
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream)
{
    BEGIN NEEDS_CONTEXT op o = {.kind = COPY, .to = (uint8_t *)(uintptr_t)to, .from = from, .bytes = bytes};
    if (bytes == 0 || holder(MEMORY, o.to, bytes) == NULL) {
        result = 1;
        break;
    }
    if (holder(PINNED, from, bytes) == NULL) {
        o.own = malloc(bytes);
        memcpy(o.own, from, bytes);
    }
    result = put(stream, &o);
    END
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream)
{
    BEGIN NEEDS_CONTEXT op o = {.kind = COPY, .to = to, .from = (const uint8_t *)(uintptr_t)from, .bytes = bytes};
    if (bytes == 0 || holder(MEMORY, o.from, bytes) == NULL) {
        result = 1;
        break;
    }
    if (holder(PINNED, to, bytes) != NULL) {
        result = put(stream, &o);
        break;
    }
    if (as(stream, STREAM)->capture != NULL) {
        result = 900;
        break;
    }
    flush(as(stream, STREAM), NULL);
    if (!sticky)
        memcpy(to, o.from, bytes);
    result = sticky;
    END
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream)
{
    BEGIN NEEDS_CONTEXT op o = {.kind = COPY,
                                .to = (uint8_t *)(uintptr_t)to,
                                .from = (const uint8_t *)(uintptr_t)from,
                                .bytes = bytes};
    if (bytes == 0 || holder(MEMORY, o.from, bytes) == NULL || holder(MEMORY, o.to, bytes) == NULL) {
        result = 1;
        break;
    }
    result = put(stream, &o);
    END
}

int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream)
{
    BEGIN NEEDS_CONTEXT op o = {.kind = FILL, .to = (uint8_t *)(uintptr_t)to, .value = value, .bytes = bytes};
    if (holder(MEMORY, o.to, bytes) == NULL) {
        result = 1;
        break;
    }
    result = put(stream, &o);
    END
}

int cuStreamCreate(void **stream, unsigned int flags)
{
    BEGIN NEEDS_CONTEXT if (flags != 1) misuse("a stream that blocks the app's");
    *stream = make(STREAM);
    END
}

int cuStreamDestroy_v2(void *stream)
{
    BEGIN object *s = as(stream, STREAM);
    for (object *o = living; o != NULL; o = o->next)
        if (o->kind == EVENT && o->stream == s)
            o->stream = NULL;
    flush(s, NULL);
    destroy(s);
    END
}

int cuStreamSynchronize(void *stream)
{
    BEGIN NEEDS_CONTEXT object *s = as(stream, STREAM);
    if (s->capture != NULL) {
        s->broken = 1;
        result = 900;
        break;
    }
    flush(s, NULL);
    result = sticky;
    END
}

int cuStreamBeginCapture_v2(void *stream, int mode)
{
    BEGIN NEEDS_CONTEXT object *s = as(stream, STREAM);
    if (mode != 1 || s->capture != NULL)
        misuse("a capture that disturbs other threads, or a second one");
    s->capture = make(GRAPH);
    s->capturer = pthread_self();
    s->broken = 0;
    END
}

/* A failure on purpose ends the capture as well, as the driver's own do. */
int cuStreamEndCapture(void *stream, void **graph)
{
    int broken = 0;
    BEGIN object *s = as(stream, STREAM);
    if (s->capture == NULL || !pthread_equal(s->capturer, pthread_self()))
        misuse("no capture to end");
    *graph = s->capture;
    s->capture = NULL;
    broken = s->broken ? 901 : 0;
    END_WITH(
        if (result != 0 && as(stream, STREAM)->capture != NULL) {
            *graph = as(stream, STREAM)->capture;
            as(stream, STREAM)->capture = NULL;
            broken = result;
        } if (broken) {
            destroy(*graph);
            *graph = NULL;
            result = broken;
        })
}

int cuGraphInstantiateWithFlags(void **exec, void *graph, unsigned long long flags)
{
    BEGIN NEEDS_CONTEXT if (flags != 0) misuse("flags for a graph");
    object *e = make(EXEC);
    for (op *o = as(graph, GRAPH)->first; o != NULL; o = o->next) {
        op *copied = malloc(sizeof *copied);
        *copied = *o;
        copied->next = NULL;
        if (o->own != NULL)
            misuse("pageable memory in a graph");
        *e->end = copied;
        e->end = &copied->next;
    }
    *exec = e;
    END
}

int cuGraphLaunch(void *exec, void *stream)
{
    BEGIN NEEDS_CONTEXT op o = {.kind = REPLAY, .object = as(exec, EXEC)};
    o.object->references++;
    result = put(stream, &o);
    END
}

int cuGraphExecDestroy(void *exec)
{
    BEGIN object *e = as(exec, EXEC);
    if (e->references == 0) {
        destroy(e);
        break;
    }
    for (object **at = &living; *at != NULL; at = &(*at)->next)
        if (*at == e) {
            *at = e->next;
            break;
        }
    e->kind = -EXEC; /* goes with its last launch */
    END
}

int cuGraphDestroy(void *graph)
{
    BEGIN destroy(as(graph, GRAPH));
    END
}

int cuEventCreate(void **event, unsigned int flags)
{
    BEGIN NEEDS_CONTEXT object *o = make(EVENT);
    o->timed = flags == 0;
    *event = o;
    END
}

int cuEventRecord(void *event, void *stream)
{
    BEGIN NEEDS_CONTEXT object *e = as(event, EVENT);
    if (as(stream, STREAM)->capture != NULL)
        misuse("an event is recorded into a graph");
    e->stream = stream;
    e->recorded = 1;
    op o = {.kind = RECORD, .object = e};
    result = put(stream, &o);
    END
}

int cuEventSynchronize(void *event)
{
    BEGIN NEEDS_CONTEXT object *e = as(event, EVENT);
    if (e->stream != NULL) {
        op *last = NULL;
        for (op *o = e->stream->first; o != NULL; o = o->next)
            if (o->kind == RECORD && o->object == e)
                last = o;
        flush(e->stream, last);
    }
    result = sticky;
    END
}

int cuEventElapsedTime(float *ms, void *start, void *end)
{
    BEGIN NEEDS_CONTEXT object *a = as(start, EVENT), *b = as(end, EVENT);
    if (!a->timed || !b->timed || !a->recorded || !b->recorded)
        result = 400;
    else if (a->stream != NULL || b->stream != NULL)
        result = 600;
    else
        *ms = (float)((double)(b->when - a->when) * 1e-6);
    END
}

int cuEventDestroy_v2(void *event)
{
    BEGIN object *e = as(event, EVENT);
    if (e->stream != NULL)
        flush(e->stream, NULL);
    destroy(e);
    END
}

typedef struct {
    unsigned int grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned int n;
} config;

static int launch(void *function, const unsigned int grid[3], const unsigned int block[3], unsigned int shared,
                  void *stream, void **params, void **extra)
{
    op o = {.kind = KERNEL, .object = as(function, FUNCTION)};
    unsigned int threads = block[0] * block[1] * block[2];
    if (extra != NULL || shared != 0 || grid[0] * grid[1] * grid[2] == 0 || threads == 0 || threads > 1024)
        return 1;
    for (uint32_t i = 0; i < o.object->n_args; i++)
        memcpy(&o.args[i], params[i], sizeof o.args[i]);
    o.blocks = (int32_t)(grid[0] * grid[1] * grid[2]);
    return put(stream, &o);
}

int cuLaunchKernelEx(const config *c, void *function, void **params, void **extra)
{
    BEGIN NEEDS_CONTEXT if (c->n != 1 || *(int *)c->attributes != 6 || ((int *)c->attributes)[2] != 1)
        misuse("an attribute that is not known");
    object *s = as(c->stream, STREAM);
    if (s->capture != NULL && !properties[EARLY].value) {
        s->broken = 1;
        result = 900;
        break;
    }
    result = launch(function, c->grid, c->block, c->shared, c->stream, params, extra);
    END
}

int cuLaunchKernel(void *function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
                   unsigned int bz, unsigned int shared, void *stream, void **params, void **extra)
{
    BEGIN NEEDS_CONTEXT const unsigned int grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    result = launch(function, grid, block, shared, stream, params, extra);
    END
}
