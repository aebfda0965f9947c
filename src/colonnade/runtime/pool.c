/* pool.c: see pool.h. The barrier counts arrivals; the last thread turns the generation, which the others wait for.
 * They spin for a moment (a barrier in the middle of a network takes microseconds) and then sleep on a futex, so an
 * idle or oversubscribed machine is left alone. */
#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LINE 64            /* counters that different threads write stand on cache lines of their own */
#define SPIN_NS 100000     /* about two wake-ups of a sleeping thread */
#define STACK (1024 * 1024) /* kernels keep little on the stack; musl's default would be 128 KB */

typedef struct {
    cn_team *team;
    unsigned thread;
    pthread_t handle;
} seat;

struct cn_team {
    _Alignas(LINE) atomic_uint arrived;
    _Alignas(LINE) atomic_uint generation;
    _Alignas(LINE) atomic_uint sleepers;
    _Alignas(LINE) unsigned threads;
    int spin; /* is there a CPU for every thread? */
    int stop;
    cn_work *work;
    void *context;
    seat seats[]; /* threads - 1: the caller has none */
};

static inline void pause_cpu(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__riscv)
    __asm__ volatile(".insn i 0x0F, 0, x0, x0, 0x010"); /* pause: a hint, nothing on cores without Zihintpause */
#endif
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* until the generation is no longer `seen` */
static void wait_turn(cn_team *team, unsigned seen)
{
    for (uint64_t limit = 0; team->spin;) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&team->generation, memory_order_acquire) != seen) return;
            pause_cpu();
        }
        const uint64_t time = now();
        if (!limit) limit = time + SPIN_NS;
        if (time >= limit) break;
        sched_yield(); /* the one we wait for may need this very CPU */
    }
    /* Sequentially consistent on both sides: either the last thread sees the sleeper, or the sleeper the new turn. */
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->generation) == seen)
        syscall(SYS_futex, &team->generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&team->sleepers, 1);
}

void cn_team_barrier(cn_team *team)
{
    const unsigned seen = atomic_load_explicit(&team->generation, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < team->threads) {
        wait_turn(team, seen);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store(&team->generation, seen + 1);
    if (atomic_load(&team->sleepers)) syscall(SYS_futex, &team->generation, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void *live(void *argument)
{
    const seat *mine = argument;
    cn_team *team = mine->team;
    for (;;) {
        cn_team_barrier(team);
        if (team->stop) return NULL;
        team->work(team->context, mine->thread, team->threads);
    }
}

/* let the first `started` workers leave, and free */
static void dismiss(cn_team *team, unsigned started)
{
    team->stop = 1;
    atomic_fetch_add(&team->arrived, team->threads - 1 - started); /* for those that never came to be */
    cn_team_barrier(team);
    for (unsigned i = 0; i < started; i++) pthread_join(team->seats[i].handle, NULL);
    free(team);
}

cn_team *cn_team_create(unsigned threads)
{
    const size_t size = (sizeof(cn_team) + (threads - 1) * sizeof(seat) + LINE - 1) / LINE * LINE;
    cn_team *team = aligned_alloc(LINE, size);
    if (!team) return NULL;
    cpu_set_t cpus;
    const int known = sched_getaffinity(0, sizeof cpus, &cpus) == 0;
    atomic_init(&team->arrived, 0);
    atomic_init(&team->generation, 0);
    atomic_init(&team->sleepers, 0);
    team->threads = threads;
    team->spin = known && threads <= (unsigned)CPU_COUNT(&cpus);
    team->stop = 0;

    /* signals belong to the program's own threads */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    unsigned started = 0;
    for (; started < threads - 1; started++) {
        seat *next = &team->seats[started];
        *next = (seat){.team = team, .thread = started + 1};
        if (pthread_create(&next->handle, &attributes, live, next) != 0) break;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started == threads - 1) return team;
    dismiss(team, started);
    return NULL;
}

void cn_team_run(cn_team *team, cn_work *work, void *context)
{
    team->work = work;
    team->context = context;
    cn_team_barrier(team);
    work(context, 0, team->threads);
}

void cn_team_destroy(cn_team *team)
{
    if (team) dismiss(team, team->threads - 1);
}
