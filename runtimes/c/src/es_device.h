/* What a backend other than the CPU does for the core: one table of functions per backend (opencl.c, cuda.c).
 *
 * The driver's library is opened at run time; nothing here links against it. A device belongs to a model (context,
 * programs, weights), a stream to a session (its arena, state and io blocks on the device, and what was captured of
 * its launches). Functions that can fail return a status and leave a sentence in `why`, which may be NULL; after a
 * failure the stream is as before the call, or, when the device was lost, every later call on it returns
 * ES_E_DEVICE_LOST. A stream is used by one thread at a time; streams of one device may be used by several.
 *
 * es_i_device and es_i_stream are never defined: a backend casts them to structs of its own (es_i_cl_device, ...), so
 * that all files fit into one unit. */
#ifndef ES_DEVICE_H
#define ES_DEVICE_H

#include "es_internal.h"

struct es_i_backend {
    const char *name; /* "OpenCL", "CUDA" */
    uint32_t id;      /* backend number of KERNELS records */

    /* Finds the driver and a device, loads the programs in CODE, uploads the weights once. The plan stays where it is
     * until close; its roles say what tokens, position and next are. `path` is the bundle's file or NULL; compiled
     * programs may be kept beside it. options->flags & ES_POISON: fill the arena with 0xff before every graph. */
    es_status (*open)(const es_i_plan *plan, const char *path, const es_options *options, es_i_device **device,
                      es_error *why);
    void (*close)(es_i_device *device);
    /* Vendor, device, driver: one line for people, NUL-terminated, cut where it does not fit. */
    es_status (*describe)(const es_i_device *device, char *text, size_t capacity);

    /* Device memory of one session, state at its initial value, io and arena zero. */
    es_status (*stream_open)(es_i_device *device, es_i_stream **stream, es_error *why);
    void (*stream_close)(es_i_stream *stream);
    /* State at its initial value again (es_i_state_element); bytes between the slots are 0. */
    es_status (*reset)(es_i_stream *stream, es_error *why);

    /* Uploads the inputs of graph g from the host's io block, runs its launches and, when outputs != 0, waits and
     * brings its outputs to the host's io block. outputs = 0 skips launches that feed outputs alone and need not wait,
     * but the caller changes the inputs at once, so they are copied before it returns. The position is among the
     * inputs. ns: NULL, or room for the device's nanoseconds of every launch (then it waits). */
    es_status (*run)(es_i_stream *stream, uint32_t g, int outputs, uint8_t *io, uint64_t *ns, es_error *why);
    /* n >= 1 greedy steps of graph 0 without a round trip: `first` is the token of the first, each next one is the
     * graph's output of role "next". tokens[n] receives what was consumed, `first` and then n - 1 more; io the outputs
     * of the last step; ns[n] (may be NULL) the nanoseconds of each step. position: steps consumed before. Asked only
     * of plans that have `next`. NULL where the backend cannot. */
    es_status (*greedy)(es_i_stream *stream, int64_t first, uint64_t position, size_t n, int32_t *tokens, uint64_t *ns,
                        uint8_t *io, es_error *why);

    /* Between host memory and a block of the stream (state, io); they wait. */
    es_status (*read)(es_i_stream *stream, uint32_t space, uint64_t offset, void *to, uint64_t bytes, es_error *why);
    es_status (*write)(es_i_stream *stream, uint32_t space, uint64_t offset, const void *from, uint64_t bytes,
                       es_error *why);
    /* State and io of `from` to `to`; same device. */
    es_status (*copy)(es_i_stream *to, es_i_stream *from, es_error *why);
    /* Best of `repeats` passes of a read-only kernel over the weights, or over other memory where they would stay in a
     * cache of the device, bytes per second, by event timers. */
    es_status (*measure_read)(es_i_device *device, uint32_t repeats, double *rate, es_error *why);
    /* Mean nanoseconds of an empty launch of `grid` groups of one work-item, over n launches in one queue, waiting at
     * the end. May be NULL. */
    es_status (*measure_launch)(es_i_device *device, uint32_t grid, uint32_t n, double *ns, es_error *why);
};

/* The table of the backend that the plan's kernels name; NULL and ES_OK for the CPU; ES_E_BACKEND when this build has
 * none for it. */
ES_LOCAL es_status es_i_backend_find(const es_i_plan *plan, const es_i_backend **backend, es_error *why);

#ifdef ES_WITH_OPENCL
extern ES_LOCAL const es_i_backend es_i_opencl;
#endif
#ifdef ES_WITH_CUDA
extern ES_LOCAL const es_i_backend es_i_cuda;
#endif

#endif
