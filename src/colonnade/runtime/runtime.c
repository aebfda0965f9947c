/* runtime.c: the functions of model.h for the model that cn_program describes. */
#define _GNU_SOURCE
#include "runtime.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define HUGE_PAGE (2u << 20)
#define MAX_THREADS 1024

struct colonnade_model {
    cn_run run;
    unsigned threads;
    pid_t owner; /* a forked child has the memory but not the threads */
    char *weights;
    size_t weights_bytes;
    char *block; /* activations and scratch, in one mapping */
    size_t block_bytes;
    char *seam; /* in that block */
    void *args;
    const void **inputs; /* the user's arrays, from the image at hand on, and the seam */
    void **outputs;
    cn_part *part; /* what the threads run */
    uint64_t *ends; /* of every step, when somebody profiles */
};

uint64_t cn_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

const colonnade_port *colonnade_inputs(size_t *count)
{
    *count = cn_program.input_count;
    return cn_program.inputs;
}

const colonnade_port *colonnade_outputs(size_t *count)
{
    *count = cn_program.output_count;
    return cn_program.outputs;
}

const char *colonnade_describe(void) { return cn_program.json; }

const char *const *colonnade_steps(size_t *count)
{
    *count = cn_program.step_count;
    return cn_program.step_names;
}

typedef struct {
    char *text;
    size_t size;
} message;

__attribute__((format(printf, 3, 4))) static int fail(message to, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (to.text && to.size) vsnprintf(to.text, to.size, format, arguments);
    va_end(arguments);
    return code;
}

/* The header of weights.bin, little-endian as the machines are. */
typedef struct {
    char magic[8];
    uint64_t format, bytes, checksum[2];
} header;

/* Fletcher's sums over 64-bit words: any flipped bit changes the first, any exchange of words the second. */
static int intact(const char *weights)
{
    const size_t words = (cn_program.weights_bytes - CN_WEIGHTS_HEADER) / sizeof(uint64_t);
    const uint64_t *word = cn_at(weights, CN_WEIGHTS_HEADER);
    uint64_t sum = 0, sums = 0;
    for (size_t i = 0; i < words; i++) {
        sum += word[i];
        sums += sum;
    }
    return sum == cn_program.weights_checksum[0] && sums == cn_program.weights_checksum[1];
}

/* `bytes` (whole pages) of zeros, in huge pages where there is room for one and the system has them; null: no memory. */
static char *map_memory(size_t bytes)
{
    const size_t align = bytes >= HUGE_PAGE ? HUGE_PAGE : PAGE;
    char *base = mmap(NULL, bytes + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return NULL;
    char *start = (char *)(((uintptr_t)base + align - 1) / align * align);
    if (start > base) munmap(base, (size_t)(start - base));
    if (start + bytes < base + bytes + align) munmap(start + bytes, (size_t)(base + align - start));
    if (align == HUGE_PAGE) madvise(start, bytes, MADV_HUGEPAGE); /* a hint: it may be refused */
    return start;
}

/* Up to `size` bytes of the file; how many there were, or -1. */
static ssize_t read_all(int file, char *to, size_t size)
{
    size_t done = 0;
    while (done < size) {
        const ssize_t got = read(file, to + done, size - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (ssize_t)done;
}

/* Read the file, and check that it is this model's, whole and undamaged. It is read rather than mapped for the huge
 * pages: weights pass by once an inference, so each of a file's small pages is one more miss in the TLB. */
static int read_weights(colonnade_model *model, const char *path, message to)
{
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0) return fail(to, COLONNADE_BAD_WEIGHTS, "%s: %s", path, strerror(errno));
    if (fstat(file, &status) != 0 || (uint64_t)status.st_size < CN_WEIGHTS_HEADER) {
        close(file);
        return fail(to, COLONNADE_BAD_WEIGHTS, "%s: not a weights file", path);
    }
    model->weights_bytes = (cn_program.weights_bytes + PAGE - 1) / PAGE * PAGE;
    if (!(model->weights = map_memory(model->weights_bytes))) {
        close(file);
        return fail(to, COLONNADE_NO_MEMORY, "no memory for %zu bytes of weights", model->weights_bytes);
    }
    const ssize_t got = read_all(file, model->weights, cn_program.weights_bytes);
    const int problem = errno;
    close(file);
    if (got < 0) return fail(to, COLONNADE_BAD_WEIGHTS, "%s: %s", path, strerror(problem));

    header found;
    memcpy(&found, model->weights, sizeof found);
    const char *wrong = NULL;
    if (memcmp(found.magic, "COLONNAD", 8) != 0 || found.format != 1)
        wrong = "not a weights file of this format";
    else if (found.bytes != cn_program.weights_bytes ||
             memcmp(found.checksum, cn_program.weights_checksum, sizeof found.checksum) != 0)
        wrong = "does not belong to this model";
    else if ((uint64_t)status.st_size != found.bytes || (uint64_t)got != found.bytes)
        wrong = "is truncated; copy the bundle again";
    else if (!intact(model->weights))
        wrong = "is damaged; copy the bundle again";
    return wrong ? fail(to, COLONNADE_BAD_WEIGHTS, "%s: %s", path, wrong) : COLONNADE_OK;
}

/* Activations and scratch, on zero pages. */
static int map_block(colonnade_model *model, message to)
{
    const size_t scratch = cn_program.shared_bytes + (size_t)cn_program.scratch_bytes * model->threads;
    const size_t seam = (cn_program.arena_bytes + scratch + 63) / 64 * 64;
    model->block_bytes = (seam + cn_program.seam_bytes + PAGE - 1) / PAGE * PAGE;
    if (!(model->block = map_memory(model->block_bytes)))
        return fail(to, COLONNADE_NO_MEMORY, "no memory for %zu bytes of activations", model->block_bytes);
    model->seam = model->block + seam;
    /* tests: whatever a step reads before it was written is NaN */
    if (getenv("COLONNADE_POISON")) memset(model->block, 0xff, model->block_bytes);
    return COLONNADE_OK;
}

int colonnade_create(const char *weights_path, int threads, colonnade_model **out, char *error, size_t error_size)
{
    const message to = {error, error_size};
    if (!out) return fail(to, COLONNADE_BAD_ARGUMENT, "no place for the model");
    *out = NULL;
    if (!weights_path) return fail(to, COLONNADE_BAD_ARGUMENT, "no path of weights.bin");
    if (threads < 0 || threads > MAX_THREADS)
        return fail(to, COLONNADE_BAD_ARGUMENT, "%d threads: expected 1 to %d, or 0 for the default", threads, MAX_THREADS);
    const char *lacking = cn_machine_lacks(cn_program.features);
    if (lacking)
        return fail(to, COLONNADE_BAD_MACHINE, "this bundle needs %s; this machine lacks %s", cn_program.isa, lacking);

    colonnade_model *model = calloc(1, sizeof *model);
    if (!model) return fail(to, COLONNADE_NO_MEMORY, "no memory");
    model->threads = threads ? (unsigned)threads : cn_program.threads;
    model->owner = getpid();
    model->args = calloc(1, cn_program.args_bytes);
    model->inputs = calloc(cn_program.input_count + 1, sizeof *model->inputs);
    model->outputs = calloc(cn_program.output_count + 1, sizeof *model->outputs);
    model->ends = calloc(cn_program.step_count + 1, sizeof *model->ends);
    const int there = model->args && model->inputs && model->outputs && model->ends;
    int code = there ? COLONNADE_OK : fail(to, COLONNADE_NO_MEMORY, "no memory");
    if (code == COLONNADE_OK) code = read_weights(model, weights_path, to);
    if (code == COLONNADE_OK) code = map_block(model, to);
    if (code == COLONNADE_OK && model->threads > 1 && !(model->run.team = cn_team_create(model->threads)))
        code = fail(to, COLONNADE_NO_MEMORY, "cannot start %u threads", model->threads);
    if (code != COLONNADE_OK) {
        colonnade_destroy(model);
        return code;
    }
    cn_program.fill(model->args, model->block, model->block + cn_program.arena_bytes, model->weights);
    *out = model;
    return COLONNADE_OK;
}

static void work(void *context, unsigned thread, unsigned threads)
{
    const colonnade_model *model = context;
    model->part(model->args, &model->run, thread, threads);
}

static int runnable(const colonnade_model *model, const void *const *inputs, void *const *outputs)
{
    if (!model || !inputs || !outputs) return COLONNADE_BAD_ARGUMENT;
    for (size_t i = 0; i < cn_program.input_count; i++)
        if (!inputs[i]) return COLONNADE_BAD_ARGUMENT;
    for (size_t i = 0; i < cn_program.output_count; i++)
        if (!outputs[i]) return COLONNADE_BAD_ARGUMENT;
    return model->owner == getpid() ? COLONNADE_OK : COLONNADE_FORKED;
}

/* the steps of `part`, on the arrays from what belongs to `image` on */
static void run_part(colonnade_model *model, cn_part *part, const void *const *inputs, void *const *outputs, unsigned image)
{
    model->part = part;
    for (size_t i = 0; i < cn_program.input_count; i++)
        model->inputs[i] = cn_at(inputs[i], image * (cn_program.inputs[i].bytes / cn_program.images));
    for (size_t i = 0; i < cn_program.output_count; i++)
        model->outputs[i] = cn_at(outputs[i], image * (cn_program.outputs[i].bytes / cn_program.images));
    model->inputs[cn_program.input_count] = model->seam;
    model->outputs[cn_program.output_count] = model->seam + image * (cn_program.seam_bytes / cn_program.images);
    cn_program.bind(model->args, model->inputs, model->outputs);
    if (model->run.team)
        cn_team_run(model->run.team, work, model);
    else
        work(model, 0, 1);
}

int colonnade_run(colonnade_model *model, const void *const *inputs, void *const *outputs)
{
    const int code = runnable(model, inputs, outputs);
    if (code != COLONNADE_OK) return code;
    for (unsigned image = 0; image < cn_program.images; image++) run_part(model, cn_program.steps, inputs, outputs, image);
    if (cn_program.rest) run_part(model, cn_program.rest, inputs, outputs, 0);
    return COLONNADE_OK;
}

int colonnade_profile(colonnade_model *model, const void *const *inputs, void *const *outputs, uint64_t *ns_per_step)
{
    const int code = ns_per_step ? runnable(model, inputs, outputs) : COLONNADE_BAD_ARGUMENT;
    if (code != COLONNADE_OK) return code;
    memset(ns_per_step, 0, cn_program.step_count * sizeof *ns_per_step);
    model->run.clock = model->ends;
    const unsigned parts = cn_program.images + (cn_program.rest ? 1 : 0);
    for (unsigned turn = 0; turn < parts; turn++) {
        const int last = turn == cn_program.images; /* the part for all images */
        uint64_t before = cn_now();
        run_part(model, last ? cn_program.rest : cn_program.steps, inputs, outputs, last ? 0 : turn);
        const size_t first = last ? cn_program.once : 0, end = last ? cn_program.step_count : cn_program.once;
        for (size_t i = first; i < end; before = model->ends[i++]) ns_per_step[i] += model->ends[i] - before;
    }
    model->run.clock = NULL;
    return COLONNADE_OK;
}

void colonnade_destroy(colonnade_model *model)
{
    if (!model) return;
    if (model->owner == getpid()) cn_team_destroy(model->run.team);
    if (model->block) munmap(model->block, model->block_bytes);
    if (model->weights) munmap(model->weights, model->weights_bytes);
    free(model->args);
    free(model->inputs);
    free(model->outputs);
    free(model->ends);
    free(model);
}
