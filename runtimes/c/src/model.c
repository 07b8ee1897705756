/* Opening, describing and closing a model. */
#include "es_device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static es_status es_i_options_read(es_options *read, const es_options *given, es_error *why)
{
    static const es_options defaults = ES_OPTIONS_INIT;
    *read = defaults;
    if (given == NULL)
        return ES_OK;
    if (given->struct_size < sizeof *read)
        return es_i_fail(why, ES_E_STRUCT, "es_options has %u bytes, expected %u", given->struct_size,
                         (unsigned)sizeof *read);
    *read = *given;
    if (given->n_threads < 0 || given->n_threads > ES_THREADS_MAX)
        return es_i_fail(why, ES_E_RANGE, "%d threads: expected 0 to %d", (int)given->n_threads, ES_THREADS_MAX);
    if (given->n_cores > 0 && given->cores == NULL)
        return es_i_fail(why, ES_E_NULL, "%u cores are announced but not listed", given->n_cores);
    if (given->flags & ~ES_POISON)
        return es_i_fail(why, ES_E_RANGE, "unknown option flags %x", given->flags);
    return ES_OK;
}

/* `position` may be an int32; the context binds first where there is one. */
static uint64_t es_i_limit(const es_model *model)
{
    uint64_t limit = model->plan.header->context > 0 ? model->plan.header->context : INT64_MAX;
    for (uint32_t g = 0; g < model->plan.n_graphs; g++) {
        const es_i_io *position = model->roles[g].position;
        if (position != NULL && position->dtype == ES_INT32 && limit > INT32_MAX)
            limit = INT32_MAX;
    }
    return limit;
}

/* Everything that needs no thread: plan, roles, kernels. */
static es_status es_i_model_read(es_model *model, const void *data, size_t bytes, const es_kernel_table *table,
                                 es_error *why)
{
    es_i_plan *plan = &model->plan;
    es_i_crc_init(&model->crc);
    es_status status = es_i_plan_read(plan, &model->crc, data, bytes, why);
    if (status != ES_OK)
        return status;
    model->roles = (es_i_roles *)calloc(plan->n_graphs, sizeof *model->roles);
    if (model->roles == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for %u graphs", plan->n_graphs);
    status = es_i_roles_find(plan, model->roles, why);
    if (status == ES_OK)
        status = es_i_backend_find(plan, &model->backend, why);
    if (status != ES_OK)
        return status;
    plan->roles = model->roles;
    plan->vocab = model->roles[0].logits != NULL ? (uint32_t)(model->roles[0].logits->bytes / sizeof(float)) : 0;
    model->limit = es_i_limit(model);
    model->need = es_i_session_bytes(plan, model->backend);
    if (model->need == 0)
        return es_i_fail(why, ES_E_HEAP, "a session would need more memory than this machine can address");
    model->kernels = table != NULL ? table : &es_linked_kernels;
    return es_i_table_check(plan, &model->crc, model->kernels, why);
}

/* What the caller leaves open, the profile of the device decides, as far as this process has such cores. */
static void es_i_profile_apply(const es_kernel_table *table, es_options *options)
{
    int32_t cores = (int32_t)es_i_cores();
    if (options->n_threads == 0 && table->n_threads > 0)
        options->n_threads = table->n_threads < cores ? table->n_threads : cores;
    if (options->n_cores > 0)
        return;
    for (uint32_t i = 0; i < table->n_cores; i++)
        if (!es_i_may_run_on(table->cores[i]))
            return;
    options->cores = table->cores;
    options->n_cores = table->n_cores;
}

/* The device, or the threads. On a GPU the caller is the only thread. */
static es_status es_i_model_start(es_model *model, const char *path, es_options *options, es_error *why)
{
    if (pthread_mutex_init(&model->lock, NULL) != 0)
        return es_i_fail(why, ES_E_THREAD, "a mutex cannot be made");
    if (model->backend != NULL)
        options->n_threads = 1;
    else
        es_i_profile_apply(model->kernels, options);
    es_status status = es_i_pool_start(&model->pool, options, why);
    if (status == ES_OK && model->backend != NULL) {
        status = model->backend->open(&model->plan, path, options, &model->device, why);
        if (status != ES_OK)
            es_i_pool_stop(&model->pool);
    }
    if (status != ES_OK)
        pthread_mutex_destroy(&model->lock);
    return status;
}

/* `path`: the file that the bundle was mapped from, or NULL. */
static es_status es_i_model_open(const void *data, size_t bytes, const char *path, const es_options *options,
                                 es_model **model, es_error *why)
{
    es_options chosen;
    if (model == NULL)
        return es_i_fail(why, ES_E_NULL, "no place for the model");
    *model = NULL;
    if (data == NULL)
        return es_i_fail(why, ES_E_NULL, "no bundle");
    if ((uintptr_t)data % 64 != 0)
        return es_i_fail(why, ES_E_ALIGN, "a bundle in memory must be aligned to 64 bytes");
    es_status status = es_i_options_read(&chosen, options, why);
    if (status != ES_OK)
        return status;
    es_model *made = (es_model *)calloc(1, sizeof *made);
    if (made == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory for a model");
    made->flags = chosen.flags;
    status = es_i_model_read(made, data, bytes, chosen.kernels, why);
    if (status == ES_OK)
        status = es_i_model_start(made, path, &chosen, why);
    if (status != ES_OK) {
        free(made->roles);
        free(made);
        return status;
    }
    *model = made;
    return ES_OK;
}

es_status es_model_open_memory(const void *data, size_t bytes, const es_options *options, es_model **model,
                               es_error *why)
{
    return es_i_model_open(data, bytes, NULL, options, model, why);
}

static es_status es_i_map(const char *path, const void **map, size_t *bytes, es_error *why)
{
    struct stat file;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return es_i_fail(why, ES_E_OPEN, "'%s' cannot be opened (error %d)", path, errno);
    es_status status = ES_OK;
    if (fstat(fd, &file) != 0 || !S_ISREG(file.st_mode))
        status = es_i_fail(why, ES_E_OPEN, "'%s' is not a file", path);
    else if (file.st_size < (off_t)sizeof(es_i_header))
        status =
            es_i_fail(why, ES_E_TRUNCATED, "'%s' has %lld bytes, too few for a bundle", path, (long long)file.st_size);
    else if ((uint64_t)file.st_size > SIZE_MAX)
        status = es_i_fail(why, ES_E_MAP, "'%s' is too large for this machine", path);
    if (status == ES_OK) {
        *bytes = (size_t)file.st_size;
        void *mapped = mmap(NULL, *bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        if (mapped == MAP_FAILED)
            status = es_i_fail(why, ES_E_MAP, "'%s' cannot be mapped (error %d)", path, errno);
#ifdef MADV_HUGEPAGE
        else /* a wish: what is read from now on is read into large pages, where the file system has them */
            (void)madvise(mapped, *bytes, MADV_HUGEPAGE);
#endif
        *map = mapped;
    }
    close(fd);
    return status;
}

es_status es_model_open(const char *path, const es_options *options, es_model **model, es_error *why)
{
    const void *map = NULL;
    size_t bytes = 0;
    if (path == NULL || model == NULL)
        return es_i_fail(why, ES_E_NULL, "no path or no place for the model");
    *model = NULL;
    es_status status = es_i_map(path, &map, &bytes, why);
    if (status != ES_OK)
        return status;
    status = es_i_model_open(map, bytes, path, options, model, why);
    if (status != ES_OK) {
        (void)munmap((void *)(uintptr_t)map, bytes);
        return status;
    }
    (*model)->map = map;
    (*model)->map_bytes = bytes;
    return ES_OK;
}

es_status es_model_check(const es_model *model, es_error *why)
{
    if (model == NULL)
        return es_i_fail(why, ES_E_NULL, "no model");
    const es_i_section *section = model->plan.section[ES_WEIGHTS];
    uint32_t sum = es_i_crc32(&model->crc, 0, model->plan.weights, (size_t)section->bytes);
    if (sum != section->crc)
        return es_i_fail(why, ES_E_WEIGHTS_CRC, "the weights are damaged: checksum %08x, computed %08x", section->crc,
                         sum);
    return ES_OK;
}

es_status es_model_close(es_model **model)
{
    if (model == NULL || *model == NULL)
        return ES_OK;
    es_model *m = *model;
    if (__atomic_load_n(&m->n_sessions, __ATOMIC_ACQUIRE) > 0)
        return ES_E_SESSIONS;
    if (m->backend != NULL)
        m->backend->close(m->device);
    es_i_pool_stop(&m->pool);
    pthread_mutex_destroy(&m->lock);
    if (m->map_bytes > 0)
        (void)munmap((void *)(uintptr_t)m->map, m->map_bytes);
    free(m->roles);
    free(m);
    *model = NULL;
    return ES_OK;
}

es_status es_pin_caller(const es_model *model)
{
    if (model == NULL)
        return ES_E_NULL;
    if (model->pool.first_core < 0)
        return ES_OK;
    return es_i_pin_self(model->pool.first_core) == 0 ? ES_OK : ES_E_CORE;
}
