/* The machine's limits, measured: fused multiply-adds in registers, and reading memory; and how it runs just now.
 *
 *   peak THREADS READ_BYTES MILLISECONDS
 *
 * Prints `gflops X` (all threads together, two operations a multiply-add) and `gbps Y` (bytes read / 1e9 / s; only
 * when READ_BYTES > 0). Each is the best of its repetitions: a limit is not a median. `pace Z` is one: the bytes / 1e9 / s
 * at which a thread takes multiply-adds and additions from its second cache, the median of all passes and the lowest of
 * all threads. A neighbour on the other half of a core, whom multiply-adds in registers hardly notice, slows it.
 * With several threads, `handover W` is how fast they pass data on: each writes what its neighbour has read, and reads
 * what the other one wrote; bytes written and read / 1e9 / s, the median of all rounds and the lowest of all threads.
 * Independent chains of 6 and of 12 are tried: enough to hide the latency, few enough for 16 registers.
 */
#define _GNU_SOURCE
#include VEC_HEADER
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define ROUNDS 4096
/* the multiplication is part of the chain, or compilers would take it out of the loop */
#define CHAIN(n) a##n = vec1_fmav(x, a##n, y, vl);
#define SIX(m) m(0) m(1) m(2) m(3) m(4) m(5)
#define TWELVE(m) SIX(m) m(6) m(7) m(8) m(9) m(10) m(11)
#define START(n) vec1_t a##n = vec1_splat(0.0f, vl);
#define ADD(n) total = vec1_add(total, a##n, vl);
#define KERNEL(name, EACH) \
    static float name(float s, size_t vl) \
    { \
        vec1_t x = vec1_splat(1.0f, vl), y = vec1_splat(s, vl); \
        EACH(START) \
        for (int i = 0; i < ROUNDS; i++) { \
            EACH(CHAIN) \
        } \
        vec1_t total = x; \
        EACH(ADD) \
        return vec1_sum(total, vl); \
    }
KERNEL(six, SIX)
KERNEL(twelve, TWELVE)

#define PACE_BYTES (384 << 10)
#define PASSES 65536
static float pass(const float *p, float s, size_t vl)
{
    vec1_t y = vec1_splat(s, vl), a0 = y, a1 = y, b0 = y, b1 = y, c0 = y, c1 = y, d0 = y, d1 = y;
    for (size_t i = 0; i + 2 * vl <= PACE_BYTES / 4; i += 2 * vl) {
        vec1_t v0 = vec1_load(p + i, vl), v1 = vec1_load(p + i + vl, vl);
        a0 = vec1_fmav(a0, v0, y, vl), a1 = vec1_fmav(a1, v1, y, vl), b0 = vec1_add(b0, v0, vl), b1 = vec1_add(b1, v1, vl);
        c0 = vec1_fmav(c0, v1, y, vl), c1 = vec1_fmav(c1, v0, y, vl), d0 = vec1_sub(d0, v1, vl), d1 = vec1_sub(d1, v0, vl);
    }
    a0 = vec1_add(vec1_add(a0, a1, vl), vec1_add(b0, b1, vl), vl);
    return vec1_sum(vec1_add(a0, vec1_add(vec1_add(c0, c1, vl), vec1_add(d0, d1, vl), vl), vl), vl);
}
static int upwards(const void *a, const void *b) { return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b); }

static volatile float sink;
static volatile float one = 0.5f;
static double seconds;
static size_t read_bytes;
static char *block;
static unsigned threads;

#define HANDOVER_BYTES (64 << 10)
#define HANDOVERS 64
static float *handed; /* [threads][HANDOVER_BYTES] */
static atomic_uint arrived, generation;

struct result { unsigned number; double flops, bytes, pace, handover; float data[PACE_BYTES / 4 + 16]; double took[PASSES]; };

static void meet(void)
{
    unsigned seen = atomic_load(&generation);
    if (atomic_fetch_add(&arrived, 1) + 1 == threads) {
        atomic_store(&arrived, 0);
        atomic_store(&generation, seen + 1);
    } else {
        while (atomic_load(&generation) == seen) sched_yield();
    }
}

static void hand_over(struct result *result, size_t vl)
{
    const size_t count = HANDOVER_BYTES / sizeof(float);
    float *own = handed + result->number * count;
    const float *other = handed + (result->number + 1) % threads * count;
    for (int round = 0; round < HANDOVERS; round++) {
        const vec1_t value = vec1_splat((float)round, vl);
        meet();
        double t = now();
        for (size_t i = 0; i + vl <= count; i += vl) vec1_store(own + i, value, vl);
        double took = now() - t;
        meet();
        t = now();
        vec1_t total = vec1_splat(0.0f, vl);
        for (size_t i = 0; i + vl <= count; i += vl) total = vec1_add(total, vec1_load(other + i, vl), vl);
        sink = vec1_sum(total, vl);
        result->took[round] = took + now() - t;
    }
    qsort(result->took, HANDOVERS, sizeof *result->took, upwards);
    result->handover = 2.0 * HANDOVER_BYTES / result->took[HANDOVERS / 2];
}

static void *measure(void *argument)
{
    struct result *result = argument;
    size_t vl = vec1_setvl(1 << 20);
    double end = now() + seconds, flops = (double)vl * ROUNDS * 2;
    while (now() < end) {
        double t = now();
        sink = six(one, vl);
        double six_rate = flops * 6 / (now() - t);
        t = now();
        sink = twelve(one, vl);
        double twelve_rate = flops * 12 / (now() - t);
        if (six_rate > result->flops) result->flops = six_rate;
        if (twelve_rate > result->flops) result->flops = twelve_rate;
    }
    size_t passes = 0;
    for (size_t i = 0; i < PACE_BYTES / 4; i++) result->data[i] = 1.0f;
    for (end = now() + seconds; passes < PASSES && (passes < 3 || now() < end); passes++) {
        double t = now();
        sink = pass(result->data, one, vl);
        result->took[passes] = now() - t;
    }
    qsort(result->took, passes, sizeof *result->took, upwards);
    result->pace = PACE_BYTES / result->took[passes / 2];
    if (threads > 1) hand_over(result, vl);
    if (!read_bytes) return 0;
    size_t share = read_bytes / threads / 4096 * 4096;
    const float *p = (const float *)(block + share * result->number);
    for (int repeat = 0; repeat < 3; repeat++) {
        double t = now();
        vec1_t a0 = vec1_splat(0.0f, vl), a1 = a0, a2 = a0, a3 = a0;
        for (size_t i = 0; i + 4 * vl <= share / 4; i += 4 * vl) {
            a0 = vec1_add(a0, vec1_load(p + i, vl), vl);
            a1 = vec1_add(a1, vec1_load(p + i + vl, vl), vl);
            a2 = vec1_add(a2, vec1_load(p + i + 2 * vl, vl), vl);
            a3 = vec1_add(a3, vec1_load(p + i + 3 * vl, vl), vl);
        }
        sink = vec1_sum(vec1_add(vec1_add(a0, a1, vl), vec1_add(a2, a3, vl), vl), vl);
        double rate = (double)share / (now() - t);
        if (rate > result->bytes) result->bytes = rate;
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 4) return fprintf(stderr, "usage: peak THREADS READ_BYTES MILLISECONDS\n"), 2;
    threads = (unsigned)atoi(argv[1]);
    read_bytes = strtoull(argv[2], 0, 10);
    seconds = atoi(argv[3]) * 1e-3;
    if (threads < 1 || threads > 1024) return fprintf(stderr, "bad thread count\n"), 2;
    if (read_bytes) {
        if (!(block = malloc(read_bytes))) return fprintf(stderr, "out of memory\n"), 4;
        memset(block, 0, read_bytes);
        /* zero pages may be shared: write each one */
        for (size_t i = 0; i < read_bytes; i += 64) block[i] = 1;
    }
    struct result *results = calloc(threads, sizeof *results);
    pthread_t *ids = calloc(threads, sizeof *ids);
    handed = aligned_alloc(64, (size_t)threads * HANDOVER_BYTES);
    if (!results || !ids || !handed) return fprintf(stderr, "out of memory\n"), 4;
    for (unsigned i = 0; i < threads; i++) results[i].number = i;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(&ids[i], 0, measure, &results[i])) return fprintf(stderr, "no threads\n"), 4;
    measure(&results[0]);
    double flops = results[0].flops, bytes = results[0].bytes, pace = results[0].pace, handover = results[0].handover;
    for (unsigned i = 1; i < threads; i++) {
        pthread_join(ids[i], 0);
        flops += results[i].flops;
        bytes += results[i].bytes;
        if (results[i].pace < pace) pace = results[i].pace;
        if (results[i].handover < handover) handover = results[i].handover;
    }
    printf("gflops %.3f\npace %.3f\n", flops * 1e-9, pace * 1e-9);
    if (threads > 1) printf("handover %.3f\n", handover * 1e-9);
    if (read_bytes) printf("gbps %.3f\n", bytes * 1e-9);
    return 0;
}
