/* One call of a kernel from standard input to standard output, all in int64: number of the kernel, pointers, blocks,
 * bytes of memory; where in memory each pointer points; the blocks in their order; the memory. */
#include "edgeseq.h"

#include <stdio.h>
#include <stdlib.h>

extern const es_kernel_table es_linked_kernels;

static void take(void *to, size_t bytes)
{
    if (fread(to, 1, bytes, stdin) != bytes) exit(3);
}

int main(void)
{
    int64_t head[4], at[64], blocks[4096];
    void *pointers[64];
    take(head, sizeof head);
    if (head[0] >= es_linked_kernels.n_kernels || head[1] > 64 || head[2] > 4096) return 2;
    take(at, (size_t)head[1] * 8);
    take(blocks, (size_t)head[2] * 8);
    char *memory = aligned_alloc(64, ((size_t)head[3] + 63) / 64 * 64);
    if (!memory) return 4;
    take(memory, (size_t)head[3]);
    for (int64_t i = 0; i < head[1]; i++) pointers[i] = memory + at[i];
    for (int64_t i = 0; i < head[2]; i++)
        es_linked_kernels.kernels[head[0]].fn(pointers, (int32_t)blocks[i], (int32_t)blocks[i] + 1);
    return fwrite(memory, 1, (size_t)head[3], stdout) == (size_t)head[3] ? 0 : 5;
}
