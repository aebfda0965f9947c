/* main.c: the static program of a bundle. It uses model.h alone, like any other C program.
 *
 * Arrays come from files: .npy, or raw little-endian data of exactly the right size. Files are given in the order of
 * the model's ports, or by name.
 */
#define _GNU_SOURCE
#include "model.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char usage[] =
    "usage: run [options] -i [NAME=]FILE... [-o [NAME=]FILE...]\n"
    "  -i, --input    array for an input: .npy, or raw little-endian data\n"
    "  -o, --output   where an output goes: .npy, or raw little-endian data\n"
    "  --threads N    threads to use (default: as built)\n"
    "  --repeat N     run N times and tell the times\n"
    "  --warmup N     run N times more before the first that counts\n"
    "  --profile      tell the median time of every step\n"
    "  --json         tell times as JSON, in ns, all repetitions\n"
    "  --weights FILE default: weights.bin beside this program\n"
    "  --describe     print what the model is, as JSON\n"
    "Without -i, every input is zeros.\n";

enum { MINE = 1, YOURS = 2 }; /* whose mistake: exit codes */

__attribute__((format(printf, 2, 3), noreturn)) static void quit(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(code);
}

static void *need(void *memory)
{
    if (!memory) quit(MINE, "no memory");
    return memory;
}

/* ---- arrays in files ---- */

static int is_npy(const char *path)
{
    const size_t length = strlen(path);
    return length > 4 && strcmp(path + length - 4, ".npy") == 0;
}

/* numpy's short name of a type, as it stands in .npy files */
static const char *short_type(const colonnade_port *port)
{
    static const char *const names[][2] = {
        {"float32", "<f4"}, {"float16", "<f2"}, {"int64", "<i8"}, {"int32", "<i4"}, {"uint8", "|u1"}, {"int8", "|i1"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(names[i][0], port->type) == 0) return names[i][1];
    return "?";
}

/* the shape as Python writes it: "(1, 3, 224, 224)" */
static void shape_text(const colonnade_port *port, char *text, size_t size)
{
    size_t at = (size_t)snprintf(text, size, "(");
    for (unsigned i = 0; i < port->rank && at < size; i++)
        at += (size_t)snprintf(text + at, size - at, "%s%lld", i ? ", " : "", (long long)port->shape[i]);
    if (at < size) snprintf(text + at, size - at, port->rank == 1 ? ",)" : ")");
}

/* the position after `key` in the header, quotes, colon and blanks skipped */
static const char *field(const char *header, const char *key)
{
    const char *at = strstr(header, key);
    return at ? at + strlen(key) + strspn(at + strlen(key), "': ") : "";
}

static void check_npy(FILE *file, const char *path, const colonnade_port *port)
{
    unsigned char start[12] = {0};
    size_t length = 0;
    if (fread(start, 1, 10, file) == 10 && memcmp(start, "\x93NUMPY", 6) == 0) length = start[8] | (size_t)start[9] << 8;
    if (length && start[6] > 1) /* version 2 and 3 have four bytes of length */
        length = fread(start + 10, 1, 2, file) == 2 ? length | (size_t)start[10] << 16 | (size_t)start[11] << 24 : 0;
    if (!length || length > 65536) quit(YOURS, "%s: not a .npy file", path);
    char *header = need(calloc(1, length + 1));
    if (fread(header, 1, length, file) != length) quit(YOURS, "%s: truncated", path);

    char wanted[256], found[256];
    const char *type = field(header, "'descr'"), *shape = field(header, "'shape'");
    shape_text(port, wanted, sizeof wanted);
    snprintf(found, sizeof found, "%.*s)", (int)strcspn(shape, ")"), shape);
    if (strncmp(type, short_type(port), 3) != 0)
        quit(YOURS, "%s: type %.*s, but input %s is %s", path, (int)strcspn(type, "'"), type, port->name, port->type);
    if (strncmp(field(header, "'fortran_order'"), "False", 5) != 0)
        quit(YOURS, "%s: in Fortran order; save it with numpy.ascontiguousarray", path);
    if (strcmp(wanted, found) != 0) quit(YOURS, "%s: shape %s, but input %s is %s", path, found, port->name, wanted);
    free(header);
}

static void read_array(const char *path, const colonnade_port *port, void *data)
{
    FILE *file = fopen(path, "rb");
    if (!file) quit(YOURS, "%s: %s", path, strerror(errno));
    if (is_npy(path)) check_npy(file, path, port);
    const size_t got = fread(data, 1, port->bytes, file);
    if (got != port->bytes) quit(YOURS, "%s: %zu bytes of data, but input %s has %zu", path, got, port->name, port->bytes);
    if (fgetc(file) != EOF) quit(YOURS, "%s: more data than the %zu bytes of input %s", path, port->bytes, port->name);
    fclose(file);
}

static void write_npy_header(FILE *file, const colonnade_port *port)
{
    char shape[256], header[512];
    shape_text(port, shape, sizeof shape);
    int length = snprintf(header, sizeof header - 64, "{'descr': '%s', 'fortran_order': False, 'shape': %s, }",
                          short_type(port), shape);
    while ((10 + length + 1) % 64) header[length++] = ' '; /* data starts on a multiple of 64 bytes */
    header[length++] = '\n';
    fwrite("\x93NUMPY\x01\x00", 1, 8, file);
    fputc(length & 0xff, file);
    fputc(length >> 8, file);
    fwrite(header, 1, (size_t)length, file);
}

static void write_array(const char *path, const colonnade_port *port, const void *data)
{
    FILE *file = fopen(path, "wb");
    if (!file) quit(YOURS, "%s: %s", path, strerror(errno));
    if (is_npy(path)) write_npy_header(file, port);
    fwrite(data, 1, port->bytes, file);
    const int bad = ferror(file), worse = fclose(file);
    if (!bad && !worse) return;
    const int reason = errno;
    struct stat status;
    if (stat(path, &status) == 0 && S_ISREG(status.st_mode)) unlink(path); /* nothing half-written stays */
    quit(YOURS, "%s: cannot be written: %s", path, strerror(reason));
}

/* ---- options ---- */

static int number(const char *option, const char *text, int least)
{
    char *end;
    const long value = text ? strtol(text, &end, 10) : 0;
    if (!text || end == text || *end || value < least || value > 1000000000)
        quit(YOURS, "%s: expected a number from %d on", option, least);
    return (int)value;
}

/* the model's ports of one kind, and the file that each of them was given */
typedef struct {
    const char *what;
    const colonnade_port *ports;
    size_t count;
    const char **files;
} files;

static size_t port_called(const files *all, const char *name, size_t length)
{
    size_t i = 0;
    while (i < all->count && (strlen(all->ports[i].name) != length || strncmp(all->ports[i].name, name, length) != 0)) i++;
    return i;
}

/* "NAME=FILE" is for that port, a bare FILE for the next one that has none */
static void give(files *all, const char *text)
{
    const char *equals = strchr(text, '=');
    size_t port = equals ? port_called(all, text, (size_t)(equals - text)) : all->count;
    if (port < all->count) {
        if (all->files[port]) quit(YOURS, "%s: %s %s has a file already", text, all->what, all->ports[port].name);
        all->files[port] = equals + 1;
        return;
    }
    if (equals && access(text, F_OK) != 0 && !memchr(text, '/', (size_t)(equals - text)))
        quit(YOURS, "%s: the model has no %s of that name; --describe tells their names", text, all->what);
    for (port = 0; port < all->count && all->files[port];) port++;
    if (port == all->count) quit(YOURS, "%s: one %s too many, the model has %zu", text, all->what, all->count);
    all->files[port] = text;
}

/* the files behind an option; how many */
static int give_all(files *all, const char *option, char **texts)
{
    int count = 0;
    for (; texts[count] && texts[count][0] != '-'; count++) give(all, texts[count]);
    if (!count) quit(YOURS, "%s: expected a file", option);
    return count;
}

static const char *beside_me(const char *name)
{
    static char path[4096];
    const ssize_t length = readlink("/proc/self/exe", path, sizeof path - strlen(name) - 2);
    if (length <= 0) return name;
    path[length] = 0;
    strcpy(strrchr(path, '/') + 1, name);
    return path;
}

/* ---- times ---- */

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static double median(uint64_t *values, size_t count) /* sorts them */
{
    qsort(values, count, sizeof *values, ascending);
    return (double)(values[(count - 1) / 2] + values[count / 2]) / 2;
}

static void print_list(const uint64_t *values, size_t count, size_t stride)
{
    for (size_t i = 0; i < count; i++) printf("%s%llu", i ? ", " : "[", (unsigned long long)values[i * stride]);
    printf("]");
}

static void tell_times(uint64_t *total, uint64_t *steps, size_t repeat, int json)
{
    size_t count;
    const char *const *names = colonnade_steps(&count);
    if (!steps) count = 0;
    if (json) {
        printf("{\"run_ns\": ");
        print_list(total, repeat, 1);
        if (steps) printf(", \"step_ns\": [");
        for (size_t s = 0; s < count; s++) {
            if (s) printf(", ");
            print_list(steps + s, repeat, count);
        }
        printf(steps ? "]}\n" : "}\n");
        return;
    }
    const double middle = median(total, repeat);
    printf("%zu runs: median %.3f ms, min %.3f, max %.3f\n", repeat, middle / 1e6, (double)total[0] / 1e6,
           (double)total[repeat - 1] / 1e6);
    uint64_t *column = need(malloc(repeat * sizeof *column));
    for (size_t s = 0; s < count; s++) {
        for (size_t r = 0; r < repeat; r++) column[r] = steps[r * count + s];
        printf("%10.1f us  %s\n", median(column, repeat) / 1e3, names[s]);
    }
    free(column);
}

int main(int argc, char **argv)
{
    size_t input_count, output_count;
    const colonnade_port *input = colonnade_inputs(&input_count), *output = colonnade_outputs(&output_count);
    files from = {"input", input, input_count, need(calloc(input_count + 1, sizeof *from.files))};
    files to = {"output", output, output_count, need(calloc(output_count + 1, sizeof *to.files))};
    int threads = 0, repeat = 0, warmup = 0, profile = 0, json = 0;
    const char *weights = beside_me("weights.bin");

    for (int i = 1; i < argc; i++) {
        const char *option = argv[i];
        if (strcmp(option, "--describe") == 0) return puts(colonnade_describe()) == EOF;
        if (strcmp(option, "-h") == 0 || strcmp(option, "--help") == 0) return fputs(usage, stdout) == EOF;
        if (strcmp(option, "--profile") == 0) {
            profile = 1;
        } else if (strcmp(option, "--json") == 0) {
            json = 1;
        } else if (strcmp(option, "-i") == 0 || strcmp(option, "--input") == 0) {
            i += give_all(&from, option, argv + i + 1);
        } else if (strcmp(option, "-o") == 0 || strcmp(option, "--output") == 0) {
            i += give_all(&to, option, argv + i + 1);
        } else if (strcmp(option, "--threads") == 0) {
            threads = number(option, argv[++i], 1);
        } else if (strcmp(option, "--repeat") == 0) {
            repeat = number(option, argv[++i], 1);
        } else if (strcmp(option, "--warmup") == 0) {
            warmup = number(option, argv[++i], 0);
        } else if (strcmp(option, "--weights") == 0) {
            if (!(weights = argv[++i])) quit(YOURS, "%s: expected a file", option);
        } else {
            quit(YOURS, "%s: unknown option; --help tells what there is", option);
        }
    }

    void **inputs = need(calloc(input_count + 1, sizeof *inputs)), **outputs = need(calloc(output_count + 1, sizeof *outputs));
    for (size_t i = 0; i < input_count; i++) {
        inputs[i] = need(calloc(1, input[i].bytes));
        if (from.files[i]) read_array(from.files[i], &input[i], inputs[i]);
    }
    for (size_t i = 0; i < output_count; i++) outputs[i] = need(calloc(1, output[i].bytes));

    char error[512];
    colonnade_model *model;
    const int code = colonnade_create(weights, threads, &model, error, sizeof error);
    if (code != COLONNADE_OK) quit(code == COLONNADE_NO_MEMORY ? MINE : YOURS, "%s", error);

    const size_t times = repeat ? (size_t)repeat : 1;
    size_t steps;
    colonnade_steps(&steps);
    uint64_t *total = need(calloc(times, sizeof *total));
    uint64_t *each = profile ? need(calloc(times * steps + 1, sizeof *each)) : NULL;
    for (int i = 0; i < warmup; i++) colonnade_run(model, (const void *const *)inputs, outputs);
    for (size_t i = 0; i < times; i++) {
        const uint64_t start = now();
        const int ran = profile ? colonnade_profile(model, (const void *const *)inputs, outputs, each + i * steps)
                                : colonnade_run(model, (const void *const *)inputs, outputs);
        total[i] = now() - start;
        if (ran != COLONNADE_OK) quit(MINE, "the model failed with code %d", ran);
    }
    for (size_t i = 0; i < output_count; i++)
        if (to.files[i]) write_array(to.files[i], &output[i], outputs[i]);
    if (repeat || profile || json) tell_times(total, each, times, json);

    colonnade_destroy(model);
    for (size_t i = 0; i < input_count; i++) free(inputs[i]);
    for (size_t i = 0; i < output_count; i++) free(outputs[i]);
    free(inputs), free(outputs), free(from.files), free(to.files), free(total), free(each);
    if (fflush(stdout) == EOF || ferror(stdout)) quit(YOURS, "standard output cannot be written");
    return 0;
}
