/* Runs kernel calls from a job file, checks what they write, and times them. The tuner's and the tests' hands on a target.
 *
 *   harness JOB [FIRST_RUN [SKIPPED_CANDIDATE...]]
 *   harness JOB walk WALKS
 *
 * JOB is written by colonnade.tune.job: little-endian, tables of u64 in the order of `struct job`, then blobs.
 * Prints one line an event, unbuffered, so that a crash or a kill loses the run in flight and nothing before it:
 *
 *   begin RUN CANDIDATE       check RUN ok|wrong ERROR SPACE OFFSET       times RUN NS...       done       walk NS...
 *
 * `check` compares every byte: expected regions within their tolerance (where the expectation is NaN the lane must
 * be exactly zero), all other bytes of arena and externals unchanged. ERROR is the largest absolute difference,
 * `nan` for one that is none, `inf` for a byte written out of place; SPACE and OFFSET say where (space 0 is the
 * arena, i + 1 external i). Each space stands between two inaccessible pages and is filled with NaN before the
 * initial segments are put in place. A run that takes longer than its limit is ended by SIGALRM.
 *
 * A repetition is timed as it would be inside a model: each thread's share of `flush` bytes of other memory
 * is read first, which drives weights out of the near caches, then the inputs are touched, as if just written.
 * Threads meet at a barrier before the first call, between calls and after the last one.
 *
 * A walk is a whole model: a list of candidates, one a step, run one after another on the same arena as a model would,
 * with nothing flushed or touched in between; its line has the time of every step. WALKS is u64: how many seconds one
 * may take, the number of steps, then the candidates of every walk in turn.
 * Exit codes: 0 done, 3 bad job file, 4 out of memory, 5 unknown kernel.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef CN_KERNELS
#error "CN_KERNELS names the table of the linked kernel library"
#endif

typedef void cn_kernel(const void *args, unsigned thread, unsigned threads);
typedef struct { const char *symbol; cn_kernel *kernel; } cn_entry;
extern const cn_entry CN_KERNELS[];

#define MAGIC 0x31424f4a4e43ull /* "CNJOB1" */
#define HUGE_PAGE (2u << 20)

struct job {
    uint64_t magic, bytes, threads, arena, flush;
    uint64_t externals, segments, expects, candidates, calls, relocations, runs;
};
struct external { uint64_t bytes; };
struct segment { uint64_t space, offset, file, bytes; };
struct expect { uint64_t space, offset, file, bytes, itemsize; double tolerance; }; /* sorted by space, offset */
struct candidate { uint64_t first_call, calls; };
struct call { uint64_t symbol, image, image_bytes, first_relocation, relocations, scratch, shared; };
struct relocation { uint64_t at, kind, value; };
struct run { uint64_t candidate, check, least, most, budget_ns, limit_s; };
enum { TO_ARENA, TO_CONST, TO_SCRATCH, TO_EXTERNAL };

struct bound { cn_kernel *kernel; void *args; };
struct space { char *at, *pristine; size_t bytes; };

static const struct job *job;
static const struct external *externals;
static const struct segment *segments;
static const struct expect *expects;
static const struct candidate *candidates;
static const struct call *calls;
static const struct relocation *relocations;
static const struct run *runs;
static const char *file;
static struct space *spaces; /* arena, externals */
static char *scratch;
static size_t scratch_bytes;
static struct bound *bound;

static void *die(int code, const char *what)
{
    fprintf(stderr, "%s\n", what);
    exit(code);
}

static void *memory(size_t bytes)
{
    void *p = 0;
    if (posix_memalign(&p, 4096, bytes ? bytes : 1)) die(4, "out of memory");
    return p;
}

/* whole pages between two inaccessible ones; huge pages where a model would ask for them */
static char *guarded(size_t bytes)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page + page * !bytes;
    size_t align = size >= HUGE_PAGE ? HUGE_PAGE : page;
    char *p = mmap(0, size + page + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die(4, "out of memory");
    p = (char *)(((uintptr_t)p + page + align - 1) / align * align);
    if (mprotect(p, size, PROT_READ | PROT_WRITE)) die(4, "out of memory");
    if (align == HUGE_PAGE) madvise(p, size, MADV_HUGEPAGE); /* a hint: it may be refused */
    return p;
}

static void poison(char *p, size_t bytes)
{
    memset(p, 0xff, bytes); /* every float of all ones is a NaN */
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* For the instrument of colonnade.machine: 1 and 2 stand around what is modelled, 4 and 5 around waiting at a barrier. An
 * encoding left to custom hints, which every chip ignores. */
#ifdef __riscv
#define MARK(n) __asm__ volatile("slti x0, x0, " #n ::: "memory")
#else
#define MARK(n) (void)0
#endif

/* ---- threads: a barrier that spins for a while and then yields ---- */

static atomic_uint arrived, generation;

static void barrier(void)
{
    unsigned threads = (unsigned)job->threads, round = atomic_load(&generation);
    if (threads == 1) return;
    MARK(4);
    if (atomic_fetch_add(&arrived, 1) + 1 == threads) {
        atomic_store(&arrived, 0);
        atomic_fetch_add(&generation, 1);
    } else {
        for (unsigned spins = 0; atomic_load(&generation) == round; spins++)
            if (spins > 20000) sched_yield();
    }
    MARK(5);
}

static volatile uint64_t sink;

static void touch(const char *p, size_t bytes)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes; i += 64) sum += (unsigned char)p[i];
    sink += sum;
}

struct task {
    const struct candidate *candidate;
    int cold, stop;
    uint64_t ns;
    const uint64_t *walk; /* null, or the candidate of every step */
    uint64_t steps, *ends;
};
static struct task task;
static char **flushed; /* one buffer a thread */

static void call(const struct candidate *candidate, unsigned thread)
{
    for (uint64_t i = 0; i < candidate->calls; i++) {
        struct bound *b = &bound[candidate->first_call + i];
        b->kernel(b->args, thread, (unsigned)job->threads);
        barrier();
    }
}

static void work(unsigned thread)
{
    unsigned threads = (unsigned)job->threads;
    if (task.walk) {
        for (uint64_t i = 0; i < task.steps; i++) {
            call(&candidates[task.walk[i]], thread);
            if (thread == 0) task.ends[i] = now();
        }
        return;
    }
    if (task.cold) {
        MARK(1);
        touch(flushed[thread], job->flush);
        for (uint64_t i = 0; i < job->segments; i++) {
            uint64_t share = segments[i].bytes / threads;
            touch(spaces[segments[i].space].at + segments[i].offset + thread * share, share);
        }
        MARK(2);
    }
    barrier();
    if (task.cold) MARK(1);
    uint64_t start = now();
    call(task.candidate, thread);
    if (thread == 0) task.ns = now() - start;
    if (task.cold) MARK(2);
}

static void *worker(void *argument)
{
    unsigned thread = (unsigned)(uintptr_t)argument;
    for (;;) {
        barrier();
        if (task.stop) return 0;
        work(thread);
        barrier();
    }
}

static uint64_t once(const struct candidate *candidate, int cold)
{
    task.candidate = candidate;
    task.cold = cold;
    barrier();
    work(0);
    barrier();
    return task.ns;
}

/* ---- job file ---- */

static const char *mapped(const char *path, size_t least, size_t *bytes)
{
    int fd = open(path, O_RDONLY);
    struct stat status;
    if (fd < 0 || fstat(fd, &status) || (size_t)status.st_size < least) die(3, "cannot read the job file");
    const char *at = mmap(0, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED) die(3, "cannot map the job file");
    close(fd);
    *bytes = (size_t)status.st_size;
    return at;
}

static void load(const char *path)
{
    size_t bytes;
    file = mapped(path, sizeof *job, &bytes);
    job = (const struct job *)file;
    if (job->magic != MAGIC || job->bytes != bytes) die(3, "bad or truncated job file");
    const char *p = file + sizeof *job;
#define TABLE(name) name = (const void *)p, p += job->name * sizeof *name
    TABLE(externals);
    TABLE(segments);
    TABLE(expects);
    TABLE(candidates);
    TABLE(calls);
    TABLE(relocations);
    TABLE(runs);
}

static void fill(void)
{
    for (uint64_t i = 0; i <= job->externals; i++) memcpy(spaces[i].at, spaces[i].pristine, spaces[i].bytes);
    poison(scratch, scratch_bytes);
}

static void allocate(void)
{
    spaces = memory((job->externals + 1) * sizeof *spaces);
    for (uint64_t i = 0; i <= job->externals; i++) {
        spaces[i].bytes = i ? externals[i - 1].bytes : job->arena;
        spaces[i].at = guarded(spaces[i].bytes);
        spaces[i].pristine = memory(spaces[i].bytes);
        poison(spaces[i].pristine, spaces[i].bytes);
    }
    for (uint64_t i = 0; i < job->segments; i++)
        memcpy(spaces[segments[i].space].pristine + segments[i].offset, file + segments[i].file, segments[i].bytes);
    for (uint64_t i = 0; i < job->calls; i++)
        if (calls[i].shared + calls[i].scratch * job->threads > scratch_bytes)
            scratch_bytes = calls[i].shared + calls[i].scratch * job->threads;
    scratch = guarded(scratch_bytes);
    flushed = memory(job->threads * sizeof *flushed);
    for (uint64_t i = 0; i < job->threads; i++) memset(flushed[i] = memory(job->flush), 1, job->flush);
}

static char *address(const struct relocation *r)
{
    switch (r->kind) {
    case TO_ARENA: return spaces[0].at + (int64_t)r->value;
    case TO_CONST: return (char *)(uintptr_t)(file + r->value);
    case TO_SCRATCH: return scratch + r->value;
    case TO_EXTERNAL: return spaces[r->value + 1].at;
    }
    return die(3, "bad relocation");
}

static void bind(void)
{
    bound = memory(job->calls * sizeof *bound);
    for (uint64_t i = 0; i < job->calls; i++) {
        const struct call *c = &calls[i];
        const cn_entry *entry = CN_KERNELS;
        while (entry->symbol && strcmp(entry->symbol, file + c->symbol)) entry++;
        if (!entry->symbol) die(5, file + c->symbol);
        char *image = memory(c->image_bytes);
        memcpy(image, file + c->image, c->image_bytes);
        for (uint64_t r = 0; r < c->relocations; r++) {
            const struct relocation *to = &relocations[c->first_relocation + r];
            char *target = address(to);
            memcpy(image + to->at, &target, sizeof target);
        }
        bound[i] = (struct bound){entry->kernel, image};
    }
}

/* ---- runs ---- */

struct verdict { double error; uint64_t space, offset; int wrong; };

static int changed(const struct space *s, uint64_t from, uint64_t to, uint64_t *where)
{
    if (to <= from || !memcmp(s->at + from, s->pristine + from, to - from)) return 0;
    for (*where = from; s->at[*where] == s->pristine[*where];) ++*where;
    return 1;
}

/* A float32, or a float16 (2 bytes), which not every compiler knows. */
static double number(const char *at, uint64_t itemsize)
{
    uint16_t half;
    float single;
    if (itemsize == 4) return memcpy(&single, at, sizeof single), single;
    memcpy(&half, at, sizeof half);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    return half >> 15 ? -size : size;
}

static struct verdict compare(void)
{
    struct verdict v = {0};
    uint64_t at = 0, where = 0;
    for (uint64_t i = 0; i <= job->externals; i++) {
        uint64_t checked = 0;
        for (; at < job->expects && expects[at].space == i; at++) {
            const struct expect *e = &expects[at];
            if (changed(&spaces[i], checked, e->offset, &where)) return (struct verdict){INFINITY, i, where, 1};
            checked = e->offset + e->bytes;
            for (uint64_t k = 0; k < e->bytes; k += e->itemsize) {
                const double got = number(spaces[i].at + e->offset + k, e->itemsize), want = number(file + e->file + k, e->itemsize);
                if (isinf(want)) continue; /* nobody knows what must stand there (see tune/job.py) */
                double error = isnan(want) ? (got == 0 ? 0 : INFINITY) : fabs(got - want);
                if (isnan(got)) error = NAN;
                if (!(error <= e->tolerance) || error > v.error) v.error = error, v.space = i, v.offset = e->offset + k;
                if (!(error <= e->tolerance)) return v.wrong = 1, v;
            }
        }
        if (changed(&spaces[i], checked, spaces[i].bytes, &where)) return (struct verdict){INFINITY, i, where, 1};
    }
    return v;
}

static uint64_t best = UINT64_MAX;

static void perform(uint64_t index)
{
    const struct run *r = &runs[index];
    const struct candidate *candidate = &candidates[r->candidate];
    static uint64_t ns[4096];
    uint64_t count = 0, spent = 0, fastest = UINT64_MAX;
    printf("begin %llu %llu\n", (unsigned long long)index, (unsigned long long)r->candidate);
    alarm((unsigned)r->limit_s);
    if (r->check) {
        fill();
        once(candidate, 0);
        struct verdict v = compare();
        printf("check %llu %s %g %llu %llu\n", (unsigned long long)index, v.wrong ? "wrong" : "ok", v.error,
               (unsigned long long)v.space, (unsigned long long)v.offset);
        if (v.wrong) {
            alarm(0);
            return;
        }
    }
    if (r->most > 1) once(candidate, 1); /* warm-up: code and branch history */
    while (count < r->most && count < 4096 && (count < r->least || spent < r->budget_ns)) {
        uint64_t t = once(candidate, 1);
        ns[count++] = t;
        spent += t;
        if (t < fastest) fastest = t;
        /* hopeless: twice the best so far even at its best */
        if (r->check && count >= 2 && fastest / 2 > best) break;
    }
    alarm(0);
    if (fastest < best) best = fastest;
    printf("times %llu", (unsigned long long)index);
    for (uint64_t i = 0; i < count; i++) printf(" %llu", (unsigned long long)ns[i]);
    printf("\n");
}

static void perform_walks(const char *path)
{
    size_t bytes;
    const uint64_t *words = (const uint64_t *)mapped(path, 2 * sizeof *words, &bytes);
    const uint64_t limit_s = words[0], steps = words[1], all = bytes / sizeof *words - 2;
    if (steps == 0 || all % steps) die(3, "bad or truncated walks");
    for (uint64_t i = 0; i < all; i++)
        if (words[2 + i] >= job->candidates) die(3, "a walk without its candidate");
    task.steps = steps;
    task.ends = memory(steps * sizeof *task.ends);
    for (uint64_t first = 0; first < all; first += steps) {
        alarm((unsigned)limit_s);
        task.walk = words + 2 + first;
        barrier();
        uint64_t before = now();
        work(0);
        barrier();
        alarm(0);
        printf("walk");
        for (uint64_t i = 0; i < steps; before = task.ends[i++])
            printf(" %llu", (unsigned long long)(task.ends[i] - before));
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, 0, _IOLBF, 1 << 16);
    if (argc < 2) die(3, "usage: harness JOB [FIRST_RUN [SKIPPED_CANDIDATE...]] | JOB walk WALKS");
    load(argv[1]);
    allocate();
    bind();
    fill();
    for (uint64_t i = 1; i < job->threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, worker, (void *)(uintptr_t)i)) die(4, "cannot create threads");
    }
    if (argc == 4 && !strcmp(argv[2], "walk")) perform_walks(argv[3]);
    else for (uint64_t i = argc > 2 ? strtoull(argv[2], 0, 10) : 0; i < job->runs; i++) {
        int skipped = 0;
        for (int a = 3; a < argc; a++) skipped |= strtoull(argv[a], 0, 10) == runs[i].candidate;
        if (!skipped) perform(i);
    }
    printf("done\n");
    task.stop = 1;
    barrier();
    return 0;
}
