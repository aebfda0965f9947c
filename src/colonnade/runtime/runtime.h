/* runtime.h: what model.c and runtime.c say to each other. model.c is one constant, cn_program. */
#ifndef COLONNADE_RUNTIME_H
#define COLONNADE_RUNTIME_H
#include <stddef.h>
#include <stdint.h>

#include <string.h>

#include "model.h"
#include "ops.h"
#include "pool.h"

#define CN_WEIGHTS_HEADER 64 /* bytes of weights.bin before the constants */

/* What a step needs besides its arguments. */
typedef struct {
    cn_team *team;
    uint64_t *clock; /* null, or where the end of every step is written, in ns */
} cn_run;

uint64_t cn_now(void);

/* the end of step `step`: all threads are through with it */
static inline void cn_done(const cn_run *run, size_t step, unsigned thread)
{
    cn_barrier(run->team);
    if (run->clock && thread == 0) run->clock[step] = cn_now();
}

/* `offset` bytes after `base` */
static inline void *cn_at(const void *base, uint64_t offset) { return (char *)(uintptr_t)base + offset; }

/* a row of the table that a kernel library exports; a null symbol closes it */
typedef struct {
    const char *symbol;
    cn_kernel *kernel;
} cn_entry;

/* the kernel of that name, or null */
static inline cn_kernel *cn_find(const cn_entry *table, const char *symbol)
{
    while (table->symbol && strcmp(table->symbol, symbol) != 0) table++;
    return table->kernel;
}

typedef void cn_part(const void *args, const cn_run *run, unsigned thread, unsigned threads);

typedef struct {
    const char *name;
    const char *isa;
    const char *const *features; /* that the kernels use, as the kernel names them; closed by null */
    const char *json;            /* what colonnade_describe answers */
    const colonnade_port *inputs, *outputs;
    const char *const *step_names;
    size_t input_count, output_count, step_count;
    size_t once;                  /* the first step of `rest` */
    unsigned threads;             /* the number to use when nobody says otherwise */
    unsigned images;              /* equal parts of every input and output, for which the steps run in turn */
    uint64_t seam_bytes;          /* that they leave for `rest`, all images together */
    uint64_t weights_bytes;       /* of the whole file */
    uint64_t weights_checksum[2]; /* of the constants, see runtime.c */
    uint64_t arena_bytes;         /* activations */
    uint64_t shared_bytes;        /* behind the activations, for all threads of one step */
    uint64_t scratch_bytes;       /* behind those, for every thread */
    size_t args_bytes;            /* of struct args */
    /* point every argument at its memory */
    void (*fill)(void *args, char *arena, char *scratch, const char *weights);
    /* point those that read or write the user's arrays at them */
    void (*bind)(void *args, const void *const *inputs, void *const *outputs);
    /* the whole model for one image, by one of `threads` threads */
    cn_part *steps;
    /* what is run once, for all images, after that; or null. The seam is one input and one output more. */
    cn_part *rest;
} cn_program_t;

extern const cn_program_t cn_program;

/* machine.c: the first of `features` that this machine lacks, or null */
const char *cn_machine_lacks(const char *const *features);
#endif
