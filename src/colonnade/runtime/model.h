/* model.h: a compiled model as C functions.
 *
 * create maps the weights, allocates the working memory and starts the threads; run does neither. Arrays are dense,
 * row-major, little-endian, of the type and shape that colonnade_inputs and colonnade_outputs tell. There is no global
 * state: any number of models may live at once. One model serves one call at a time; calls from several threads must
 * be put in line by the caller. A model does not survive fork().
 */
#ifndef COLONNADE_MODEL_H
#define COLONNADE_MODEL_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define COLONNADE_API __attribute__((visibility("default")))

typedef struct colonnade_model colonnade_model;

/* What a call answers. COLONNADE_OK is 0; all the others are failures. */
enum {
    COLONNADE_OK = 0,
    COLONNADE_BAD_ARGUMENT = 1, /* a null pointer, a thread count out of range */
    COLONNADE_BAD_WEIGHTS = 2,  /* weights.bin is missing, damaged, or another model's */
    COLONNADE_BAD_MACHINE = 3,  /* this machine lacks instructions the model was built for */
    COLONNADE_NO_MEMORY = 4,    /* memory or threads could not be had */
    COLONNADE_FORKED = 5        /* the model was created by this process's parent */
};

/* An input or output. `type` is a numpy name ("float32"); `bytes` is the size of the whole array. */
typedef struct {
    const char *name;
    const char *type;
    const int64_t *shape;
    unsigned rank;
    size_t bytes;
} colonnade_port;

/* The model's inputs and outputs, in the order in which run takes them. */
COLONNADE_API const colonnade_port *colonnade_inputs(size_t *count);
COLONNADE_API const colonnade_port *colonnade_outputs(size_t *count);

/* JSON: name, isa, threads, inputs, outputs, steps (name, workload, kernels). */
COLONNADE_API const char *colonnade_describe(void);
/* The names of the model's steps, in the order in which they run. */
COLONNADE_API const char *const *colonnade_steps(size_t *count);

/* `threads` is the number of threads that run uses, the caller's included; 0 takes the one the model was built for.
 * On failure *out is null and `error` (if not null) holds one line of at most error_size - 1 bytes. */
COLONNADE_API int colonnade_create(const char *weights_path, int threads, colonnade_model **out, char *error, size_t error_size);

/* inputs[i] and outputs[i] are the arrays of port i, aligned to their element type; they may not overlap. */
COLONNADE_API int colonnade_run(colonnade_model *model, const void *const *inputs, void *const *outputs);

/* Like run, and tells how long every step took: ns_per_step has an element for each of colonnade_steps. */
COLONNADE_API int colonnade_profile(colonnade_model *model, const void *const *inputs, void *const *outputs, uint64_t *ns_per_step);

/* Stops the threads and frees everything; null is allowed. */
COLONNADE_API void colonnade_destroy(colonnade_model *model);

#ifdef __cplusplus
}
#endif
#endif
