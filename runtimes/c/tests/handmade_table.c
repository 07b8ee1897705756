/* The kernel table of a plan whose kernels run on a GPU: none, for the plan of this number. */
#include <edgeseq.h>

#ifndef PLAN_ID
#error "compile with -DPLAN_ID=0x..."
#endif
const es_kernel_table es_linked_kernels = {(uint32_t)sizeof(es_kernel_table), PLAN_ID, 0, 0, 0, 0, 0, 0, 0};
