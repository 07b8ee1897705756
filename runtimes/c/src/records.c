/* Checks every record of a plan: names, enumerations, shapes, places, ranges. */
#include "es_internal.h"

#include <stdlib.h>
#include <string.h>

/* Limits of a GPU's launch; no device allows less for a grid, many allow no more (CUDA C++ Programming Guide, table of
 * technical specifications per compute capability). */
enum { ES_GROUP_MAX = 1024, ES_GRID_YZ_MAX = 65535, ES_BLOCK_Z_MAX = 64 };

typedef struct {
    uint64_t offset, bytes;
    uint32_t graph;
} es_i_span;

uint64_t es_i_dtype_bytes(uint32_t dtype)
{
    static const uint8_t bytes[] = {4, 2, 2, 8, 4, 1, 1, 1};
    return dtype < sizeof bytes ? bytes[dtype] : 0;
}

static es_status es_i_name_check(const es_i_plan *plan, uint32_t name, const char *what, uint32_t index, es_error *why)
{
    if (name >= plan->section[ES_STRINGS]->bytes)
        return es_i_fail(why, ES_E_STRING, "the name of %s %u lies outside the strings", what, index);
    if (plan->strings[name] == '\0')
        return es_i_fail(why, ES_E_STRING, "%s %u has no name", what, index);
    return ES_OK;
}

/* Elements of a shape; 0 when the rank, a dimension or the product is out of range. Unused dimensions must be 0. */
static uint64_t es_i_elements(uint32_t rank, const uint64_t dims[4])
{
    uint64_t n = 1;
    if (rank > 4)
        return 0;
    for (uint32_t i = 0; i < 4; i++) {
        if (i >= rank) {
            if (dims[i] != 0)
                return 0;
        } else if (dims[i] == 0 || n > UINT64_MAX / dims[i]) {
            return 0;
        } else {
            n *= dims[i];
        }
    }
    return n;
}

/* dtype and shape against `bytes`. */
static es_status es_i_shape_check(uint32_t dtype, uint32_t rank, const uint64_t dims[4], uint64_t bytes,
                                  const char *name, es_error *why)
{
    uint64_t size = es_i_dtype_bytes(dtype), n = es_i_elements(rank, dims);
    if (size == 0)
        return es_i_fail(why, ES_E_ENUM, "'%s' has the unknown dtype %u", name, dtype);
    if (n == 0 || n > UINT64_MAX / size || n * size != bytes)
        return es_i_fail(why, ES_E_DIMS, "the shape of '%s' does not make its %llu bytes", name,
                         (unsigned long long)bytes);
    return ES_OK;
}

static int es_i_misplaced(uint64_t offset, uint64_t bytes, uint64_t space)
{
    return bytes == 0 || offset % 64 != 0 || offset > space || bytes > space - offset;
}

static es_status es_i_tensors_check(const es_i_plan *plan, es_error *why)
{
    uint64_t end = 0;
    for (uint32_t i = 0; i < plan->n_tensors; i++) {
        const es_i_tensor *t = &plan->tensors[i];
        es_status status = es_i_name_check(plan, t->name, "tensor", i, why);
        if (status != ES_OK)
            return status;
        const char *name = plan->strings + t->name;
        if (t->layout >= plan->section[ES_STRINGS]->bytes)
            return es_i_fail(why, ES_E_STRING, "the layout of '%s' lies outside the strings", name);
        if (es_i_dtype_bytes(t->dtype) == 0)
            return es_i_fail(why, ES_E_ENUM, "'%s' has the unknown dtype %u", name, t->dtype);
        if (es_i_elements(t->rank, t->dims) == 0)
            return es_i_fail(why, ES_E_DIMS, "the shape of '%s' is malformed", name);
        if (es_i_misplaced(t->offset, t->bytes, plan->weight_bytes))
            return es_i_fail(why, ES_E_TENSOR, "'%s' is misplaced in the weights", name);
        if (t->offset < end)
            return es_i_fail(why, ES_E_TENSOR, "'%s' overlaps the tensor before", name);
        end = t->offset + t->bytes;
    }
    return ES_OK;
}

static int es_i_span_order(const void *left, const void *right)
{
    const es_i_span *a = (const es_i_span *)left, *b = (const es_i_span *)right;
    if (a->graph != b->graph)
        return a->graph < b->graph ? -1 : 1;
    return a->offset < b->offset ? -1 : a->offset > b->offset;
}

/* 1 when two spans of one graph overlap. */
static int es_i_overlap(es_i_span *spans, uint32_t n)
{
    qsort(spans, n, sizeof *spans, es_i_span_order);
    for (uint32_t i = 1; i < n; i++)
        if (spans[i].graph == spans[i - 1].graph && spans[i].offset - spans[i - 1].offset < spans[i - 1].bytes)
            return 1;
    return 0;
}

/* Whether `init` is a value of the dtype: any number for the floats, a whole number in range for the rest. */
static int es_i_init_fits(uint32_t dtype, float init)
{
    static const float highest[] = {0, 0, 0, 9.2e18f, 2.1e9f, 127, 255, 1};
    static const float lowest[] = {0, 0, 0, -9.2e18f, -2.1e9f, -128, 0, 0};
    if (dtype <= ES_BFLOAT16)
        return init == init;
    return init >= lowest[dtype] && init <= highest[dtype] && (float)(int64_t)init == init;
}

static es_status es_i_slot_check(const es_i_plan *plan, uint32_t index, es_error *why)
{
    const es_i_slot *s = &plan->slots[index];
    es_status status = es_i_name_check(plan, s->name, "slot", index, why);
    if (status != ES_OK)
        return status;
    const char *name = plan->strings + s->name;
    status = es_i_shape_check(s->dtype, s->rank, s->dims, s->bytes, name, why);
    if (status != ES_OK)
        return status;
    if (s->update > ES_UPDATE_APPEND)
        return es_i_fail(why, ES_E_ENUM, "slot '%s' has the unknown update %u", name, s->update);
    if (!es_i_init_fits(s->dtype, s->init))
        return es_i_fail(why, ES_E_ENUM, "slot '%s' starts with a value that its dtype %u lacks", name, s->dtype);
    if (es_i_misplaced(s->offset, s->bytes, plan->header->state_bytes))
        return es_i_fail(why, ES_E_SLOT, "slot '%s' is misplaced in the state block", name);
    if (s->update == ES_UPDATE_OVERWRITE ? s->axis != -1 : (s->axis < 0 || (uint32_t)s->axis >= s->rank))
        return es_i_fail(why, ES_E_AXIS, "slot '%s' has the time axis %d", name, (int)s->axis);
    if (s->update == ES_UPDATE_APPEND && (plan->header->context == 0 || s->dims[s->axis] < plan->header->context))
        return es_i_fail(why, ES_E_AXIS, "slot '%s' has %llu rows for a context of %u", name,
                         (unsigned long long)s->dims[s->axis], plan->header->context);
    return ES_OK;
}

static es_status es_i_slots_check(const es_i_plan *plan, es_i_span *spans, es_error *why)
{
    for (uint32_t i = 0; i < plan->n_slots; i++) {
        es_status status = es_i_slot_check(plan, i, why);
        if (status != ES_OK)
            return status;
        spans[i] = (es_i_span){plan->slots[i].offset, plan->slots[i].bytes, 0};
    }
    if (es_i_overlap(spans, plan->n_slots))
        return es_i_fail(why, ES_E_SLOT, "two state slots overlap");
    return ES_OK;
}

static es_status es_i_io_check(const es_i_plan *plan, es_i_span *spans, es_error *why)
{
    for (uint32_t i = 0; i < plan->n_io; i++) {
        const es_i_io *io = &plan->io[i];
        es_status status = es_i_name_check(plan, io->name, "input or output", i, why);
        if (status != ES_OK)
            return status;
        const char *name = plan->strings + io->name;
        status = es_i_shape_check(io->dtype, io->rank, io->dims, io->bytes, name, why);
        if (status != ES_OK)
            return status;
        if (io->role > ES_ROLE_NEXT || io->direction > 1)
            return es_i_fail(why, ES_E_ENUM, "'%s' has role %u, direction %u", name, io->role, io->direction);
        if (io->graph >= plan->n_graphs)
            return es_i_fail(why, ES_E_IO, "'%s' belongs to graph %u of %u", name, io->graph, plan->n_graphs);
        if (es_i_misplaced(io->offset, io->bytes, plan->header->io_bytes))
            return es_i_fail(why, ES_E_IO, "'%s' is misplaced in the io block", name);
        spans[i] = (es_i_span){io->offset, io->bytes, io->graph};
    }
    if (es_i_overlap(spans, plan->n_io))
        return es_i_fail(why, ES_E_IO, "two inputs or outputs of one graph overlap");
    return ES_OK;
}

static es_status es_i_kernels_check(const es_i_plan *plan, es_error *why)
{
    for (uint32_t i = 0; i < plan->n_kernels; i++) {
        const es_i_kernel *k = &plan->kernels[i];
        es_status status = es_i_name_check(plan, k->name, "kernel", i, why);
        if (status != ES_OK)
            return status;
        const char *name = plan->strings + k->name;
        uint64_t code = plan->section[ES_CODE]->bytes;
        if (k->backend > 2 || k->code > 2)
            return es_i_fail(why, ES_E_ENUM, "kernel '%s' has backend %u, code %u", name, k->backend, k->code);
        if (k->code_offset > code || k->code_bytes > code - k->code_offset)
            return es_i_fail(why, ES_E_KERNEL, "the code of kernel '%s' lies outside its section", name);
        if ((k->backend == 0) != (k->code_bytes == 0) || (k->code == 0) != (k->code_bytes == 0))
            return es_i_fail(why, ES_E_KERNEL, "kernel '%s' has %llu bytes of code of kind %u", name,
                             (unsigned long long)k->code_bytes, k->code);
        const es_i_kernel *first = &plan->kernels[0];
        if (k->backend != first->backend)
            return es_i_fail(why, ES_E_KERNEL, "kernel '%s' is for backend %u, the first for %u: a plan has one", name,
                             k->backend, first->backend);
        if (k->backend != ES_BACKEND_CPU &&
            (k->code != k->backend || k->code_offset != first->code_offset || k->code_bytes != first->code_bytes))
            return es_i_fail(why, ES_E_KERNEL, "kernel '%s' has code of its own or of the wrong kind", name);
    }
    return ES_OK;
}

/* The tensor that holds a span of WEIGHTS, by bisection: tensors are sorted and disjoint. */
static int es_i_in_one_tensor(const es_i_plan *plan, uint64_t offset, uint64_t bytes)
{
    uint32_t low = 0, high = plan->n_tensors;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (plan->tensors[middle].offset <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0)
        return 0;
    const es_i_tensor *t = &plan->tensors[low - 1];
    return offset - t->offset <= t->bytes && bytes <= t->bytes - (offset - t->offset);
}

static es_status es_i_arg_check(const es_i_plan *plan, const es_i_graph *graph, uint32_t index, es_error *why)
{
    const es_i_arg *arg = &plan->args[index];
    const uint64_t space[ES_N_SPACES] = {plan->weight_bytes, graph->arena_bytes, plan->header->state_bytes,
                                         plan->header->io_bytes};
    if (arg->space >= ES_N_SPACES || arg->access < ES_ACCESS_READ || arg->access > (ES_ACCESS_READ | ES_ACCESS_WRITE))
        return es_i_fail(why, ES_E_ENUM, "argument %u has space %u, access %u", index, arg->space, arg->access);
    if (arg->bytes == 0 || arg->offset > space[arg->space] || arg->bytes > space[arg->space] - arg->offset)
        return es_i_fail(why, ES_E_ARG, "argument %u: %llu bytes at %llu of %llu", index,
                         (unsigned long long)arg->bytes, (unsigned long long)arg->offset,
                         (unsigned long long)space[arg->space]);
    if (arg->space != ES_SPACE_WEIGHTS)
        return ES_OK;
    if (arg->access != ES_ACCESS_READ)
        return es_i_fail(why, ES_E_ARG, "argument %u would write weights", index);
    if (!es_i_in_one_tensor(plan, arg->offset, arg->bytes))
        return es_i_fail(why, ES_E_ARG, "argument %u does not lie within one tensor", index);
    return ES_OK;
}

static es_status es_i_launch_check(const es_i_plan *plan, const es_i_graph *graph, uint32_t index, uint32_t *next_arg,
                                   es_error *why)
{
    const es_i_launch *launch = &plan->launches[index];
    if (launch->kernel >= plan->n_kernels)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u runs kernel %u of %u", index, launch->kernel, plan->n_kernels);
    const es_i_kernel *kernel = &plan->kernels[launch->kernel];
    if (launch->flags & ~(uint32_t)ES_LAUNCH_OUTPUTS_ONLY)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u has unknown flags %x", index, launch->flags);
    uint64_t blocks = 1, threads = 1;
    for (int i = 0; i < 3; i++) {
        blocks = blocks <= INT32_MAX ? blocks * launch->grid[i] : blocks;
        threads = threads <= INT32_MAX ? threads * launch->block[i] : threads;
    }
    if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > INT32_MAX)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u has a grid or block out of range", index);
    if (kernel->backend != ES_BACKEND_CPU && threads > ES_GROUP_MAX)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u has groups of %llu, at most %d are possible", index,
                         (unsigned long long)threads, ES_GROUP_MAX);
    if (kernel->backend == ES_BACKEND_CUDA &&
        (launch->grid[1] > ES_GRID_YZ_MAX || launch->grid[2] > ES_GRID_YZ_MAX || launch->block[2] > ES_BLOCK_Z_MAX))
        return es_i_fail(why, ES_E_LAUNCH, "launch %u has a grid or block out of CUDA's range", index);
    if (kernel->backend == 0 && (launch->grid[1] != 1 || launch->grid[2] != 1 || threads != 1))
        return es_i_fail(why, ES_E_LAUNCH, "launch %u runs a CPU kernel over more than one dimension", index);
    if (launch->n_args != kernel->n_args)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u gives %u arguments to a kernel of %u", index, launch->n_args,
                         kernel->n_args);
    if (launch->first_arg != *next_arg || launch->n_args > plan->n_args - *next_arg)
        return es_i_fail(why, ES_E_LAUNCH, "launch %u has arguments %u+%u, expected from %u and at most %u", index,
                         launch->first_arg, launch->n_args, *next_arg, plan->n_args);
    *next_arg += launch->n_args;
    for (uint32_t i = 0; i < launch->n_args; i++) {
        es_status status = es_i_arg_check(plan, graph, launch->first_arg + i, why);
        if (status != ES_OK)
            return status;
    }
    return ES_OK;
}

/* Graphs come with rising numbers of tokens from 1; launches and arguments follow each other without a gap. */
static es_status es_i_graphs_check(es_i_plan *plan, es_error *why)
{
    uint32_t next_launch = 0, next_arg = 0;
    for (uint32_t g = 0; g < plan->n_graphs; g++) {
        const es_i_graph *graph = &plan->graphs[g];
        es_status status = es_i_name_check(plan, graph->name, "graph", g, why);
        if (status != ES_OK)
            return status;
        if (g == 0 ? graph->tokens != 1 : graph->tokens <= plan->graphs[g - 1].tokens)
            return es_i_fail(why, ES_E_GRAPH, "graph %u consumes %u tokens, expected 1 and then rising numbers", g,
                             graph->tokens);
        if (graph->first_launch != next_launch || graph->n_launches > plan->n_launches - next_launch)
            return es_i_fail(why, ES_E_GRAPH, "graph %u has launches %u+%u, expected from %u and at most %u", g,
                             graph->first_launch, graph->n_launches, next_launch, plan->n_launches);
        for (uint32_t i = 0; i < graph->n_launches; i++)
            if ((status = es_i_launch_check(plan, graph, next_launch + i, &next_arg, why)) != ES_OK)
                return status;
        next_launch += graph->n_launches;
        if (graph->arena_bytes > plan->arena_bytes)
            plan->arena_bytes = graph->arena_bytes;
    }
    if (plan->n_graphs == 0)
        return es_i_fail(why, ES_E_GRAPH, "there is no step graph");
    if (next_launch != plan->n_launches || next_arg != plan->n_args)
        return es_i_fail(why, ES_E_GRAPH, "%u launches and %u arguments belong to no graph",
                         plan->n_launches - next_launch, plan->n_args - next_arg);
    return ES_OK;
}

es_status es_i_plan_records(es_i_plan *plan, es_error *why)
{
    uint32_t n = plan->n_slots > plan->n_io ? plan->n_slots : plan->n_io;
    es_i_span *spans = (es_i_span *)calloc(n > 0 ? n : 1, sizeof *spans);
    if (spans == NULL)
        return es_i_fail(why, ES_E_HEAP, "no memory to check %u slots, inputs and outputs", n);
    es_status status = es_i_tensors_check(plan, why);
    if (status == ES_OK)
        status = es_i_slots_check(plan, spans, why);
    if (status == ES_OK)
        status = es_i_kernels_check(plan, why);
    if (status == ES_OK)
        status = es_i_graphs_check(plan, why);
    if (status == ES_OK)
        status = es_i_io_check(plan, spans, why);
    free(spans);
    return status;
}

/* Remembers what plays a role in its graph, and checks that it can. */
static es_status es_i_role_take(const es_i_plan *plan, const es_i_io *io, es_i_roles *roles, es_error *why)
{
    const char *name = plan->strings + io->name;
    const es_i_io **place = io->role == ES_ROLE_TOKENS     ? &roles->tokens
                            : io->role == ES_ROLE_POSITION ? &roles->position
                            : io->role == ES_ROLE_LOGITS   ? &roles->logits
                                                           : &roles->next;
    if (*place != NULL)
        return es_i_fail(why, ES_E_ROLE, "'%s' plays a role that is taken in graph %u", name, io->graph);
    *place = io;
    uint64_t n = io->bytes / es_i_dtype_bytes(io->dtype);
    int integer = io->dtype == ES_INT64 || io->dtype == ES_INT32;
    int good = io->role == ES_ROLE_LOGITS ? io->direction == 1 && io->dtype == ES_FLOAT32 && n <= INT32_MAX
               : io->role == ES_ROLE_NEXT ? io->direction == 1 && integer && n == 1
                                          : io->direction == 0 && integer;
    if (io->role == ES_ROLE_TOKENS)
        good = good && n == plan->graphs[io->graph].tokens;
    if (io->role == ES_ROLE_POSITION)
        good = good && n == 1;
    return good ? ES_OK
                : es_i_fail(why, ES_E_ROLE, "'%s' has dtype %u and %llu elements, wrong for its role", name, io->dtype,
                            (unsigned long long)n);
}

es_status es_i_roles_find(const es_i_plan *plan, es_i_roles *roles, es_error *why)
{
    for (uint32_t i = 0; i < plan->n_io; i++) {
        const es_i_io *io = &plan->io[i];
        es_status status = io->role == ES_ROLE_DATA ? ES_OK : es_i_role_take(plan, io, &roles[io->graph], why);
        if (status != ES_OK)
            return status;
    }
    for (uint32_t g = 0; g < plan->n_graphs; g++) {
        const es_i_roles *r = &roles[g];
        if ((r->tokens == NULL) != (roles[0].tokens == NULL) || (r->logits == NULL) != (roles[0].logits == NULL) ||
            (r->logits != NULL && r->logits->bytes != roles[0].logits->bytes))
            return es_i_fail(why, ES_E_ROLE, "graph %u takes or gives other things than the step graph", g);
        if ((r->next == NULL) != (roles[0].next == NULL) ||
            (r->next != NULL && (r->tokens == NULL || r->next->dtype != r->tokens->dtype)))
            return es_i_fail(why, ES_E_ROLE, "the next token of graph %u does not match its tokens", g);
        if (r->tokens != NULL && r->logits == NULL)
            return es_i_fail(why, ES_E_ROLE, "graph %u takes tokens but gives no logits", g);
    }
    return ES_OK;
}
