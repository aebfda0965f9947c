/* The instrument: a QEMU plugin that counts a riscv64 program's instructions and runs them through one core's model.
 *
 *   qemu-riscv64 -B BASE -plugin FILE.so,model=FILE,out=FILE,base=BASE[,outside=skip][,profile=FILE] PROGRAM
 *
 * A program marks what counts by `slti x0, x0, N` (an encoding left to custom hints, ignored by every chip):
 * 1 begins a region, 2 ends it, 3 empties the caches; 4 and 5 stand around waiting at a barrier, whose spinning is not
 * counted and after which all cores show the latest clock among them. Without a mark, everything counts.
 * outside=skip leaves out of the model what runs outside regions (faster; caches keep the state of the last region).
 *
 * profile=FILE writes where the cycles went, by address; of one thread alone.
 *
 * The program's own clock_gettime tells modelled time, so unchanged benchmarks report it, and the alarms it sets for
 * itself come later by PATIENCE. Written at exit, as JSON:
 * counts by class, group size and element size, misses and bytes, what was waited for, cycles of each region; under
 * `last` the counts of the last region alone.
 */
#include "core.h"
#include "qemu_plugin.h"

#define CORES 64
#define REGIONS 65536
#define CLOCK_GETTIME 113
#define SETITIMER 103
#define PATIENCE 100 /* seconds of emulation for one that a program allows itself */
enum { MARK_BEGIN = 1, MARK_END, MARK_COLD, MARK_WAIT, MARK_MET };

PLUGIN_EXPORT int qemu_plugin_version = PLUGIN_API;

static struct thread {
    struct core core;
    const struct instruction *pending;
    uint64_t lines[LINES];
    unsigned count;
    int used, inside, waiting;
    unsigned number, generation;
    double checked; /* the clock at which others were last looked for */
    double begun, region[REGIONS];
    unsigned regions;
    struct counts before, sum, last;
    double cycles;
    uint64_t time_at;
} *threads[CORES];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double met[2];
static unsigned met_generation[2], arrived[2];
static int skip_outside, marked;
static const char *out_path = "instrument.json";
static const char *profile_path;
static struct block { struct instruction *all; size_t n; struct block *next; } *blocks; /* kept for the profile */
static uint64_t guest_base;
static double newest; /* the clock a new thread starts with */

/* Cores that work together keep pace, or one would have the cache that they share for itself as long as the host lets it
 * run: whoever is PACE cycles ahead of the slowest waits for it. Nobody waits for a core that is AWAY: at a barrier, in a
 * system call, outside regions, or when nobody has moved for PATIENT turns of TURN ns of the host's. */
#define PACE 512
#define TURN 20000000
#define PATIENT 50
#define AWAY 1e300
static double shown[CORES];
static unsigned known;
static pthread_mutex_t pace_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;

static void show(unsigned core, double t)
{
    pthread_mutex_lock(&pace_lock);
    for (; known <= core; known++) shown[known] = AWAY;
    shown[core] = t;
    pthread_cond_broadcast(&moved);
    pthread_mutex_unlock(&pace_lock);
}

static int alone_ahead(double t)
{
    for (unsigned i = 0; i < known; i++)
        if (shown[i] < t - PACE) return 1;
    return 0;
}

static void keep_pace(unsigned core, double t)
{
    show(core, t);
    pthread_mutex_lock(&pace_lock);
    for (unsigned turns = 0; alone_ahead(t);) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += TURN;
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        if (!pthread_cond_timedwait(&moved, &pace_lock, &until)) turns = 0;
        else if (++turns == PATIENT)
            for (unsigned i = 0; i < known; i++)
                if (shown[i] < t - PACE) shown[i] = AWAY;
    }
    pthread_mutex_unlock(&pace_lock);
}

static struct thread *thread_of(unsigned cpu)
{
    cpu %= CORES;
    if (threads[cpu]) return threads[cpu];
    pthread_mutex_lock(&lock);
    if (!threads[cpu]) {
        struct thread *t = calloc(1, sizeof *t);
        core_setup(&t->core);
        t->core.t = newest, t->number = cpu;
        threads[cpu] = t;
    }
    pthread_mutex_unlock(&lock);
    return threads[cpu];
}

static void add(struct counts *sum, const struct counts *a, const struct counts *b)
{
    for (int c = 0; c < CLASS_COUNT; c++)
        for (int g = 0; g < 5; g++)
            for (int e = 0; e < 4; e++) sum->executed[c][g][e] += a->executed[c][g][e] - b->executed[c][g][e];
    for (int w = 0; w < REASON_COUNT; w++) sum->waited[w] += a->waited[w] - b->waited[w];
    sum->instructions += a->instructions - b->instructions;
    sum->mispredicted += a->mispredicted - b->mispredicted;
    const uint64_t *x = (const uint64_t *)&a->traffic, *y = (const uint64_t *)&b->traffic;
    uint64_t *s = (uint64_t *)&sum->traffic;
    for (size_t i = 0; i < sizeof a->traffic / sizeof *x; i++) s[i] += x[i] - y[i];
}

static void snapshot(struct thread *t)
{
    t->core.counts.traffic = t->core.memory.traffic;
    t->before = t->core.counts;
    t->begun = drain(&t->core);
}

static void finish_region(struct thread *t)
{
    double cycles = drain(&t->core) - t->begun;
    t->core.counts.traffic = t->core.memory.traffic;
    add(&t->sum, &t->core.counts, &t->before);
    memset(&t->last, 0, sizeof t->last);
    add(&t->last, &t->core.counts, &t->before);
    t->cycles += cycles;
    if (t->regions < REGIONS) t->region[t->regions++] = cycles;
}

static void cold(struct thread *t)
{
    struct traffic keep = t->core.memory.traffic;
    memory_setup(&t->core.memory);
    t->core.memory.traffic = keep;
    pthread_mutex_lock(&l2_lock);
    cache_setup(&l2, &model.l2), l2.chance = 1;
    pthread_mutex_unlock(&l2_lock);
}

static void mark(struct thread *t, int what)
{
    marked = 1;
    switch (what) {
    case MARK_BEGIN:
        if (!t->inside) t->inside = 1, snapshot(t);
        show(t->number, t->core.t);
        break;
    case MARK_END:
        if (t->inside) finish_region(t), t->inside = 0;
        show(t->number, AWAY);
        break;
    case MARK_COLD: cold(t); break;
    case MARK_WAIT: {
        double now = drain(&t->core);
        unsigned g = ++t->generation;
        pthread_mutex_lock(&lock);
        if (met_generation[g & 1] != g) met_generation[g & 1] = g, met[g & 1] = 0, arrived[g & 1] = 0;
        if (now > met[g & 1]) met[g & 1] = now;
        t->waiting = 1;
        const int all = ++arrived[g & 1] == (unsigned)model.cores;
        /* the last one: all others go on, whenever the host lets them */
        for (unsigned i = 0; all && i < known; i++) show(i, met[g & 1]);
        if (!all) show(t->number, AWAY);
        pthread_mutex_unlock(&lock);
        break;
    }
    case MARK_MET:
        if (t->waiting) {
            t->waiting = 0;
            t->core.t = later(t->core.t, met[t->generation & 1]) + model.barrier;
        }
        break;
    }
}

static void settle(struct thread *t, uint64_t next)
{
    const struct instruction *i = t->pending;
    if (!i) return;
    t->pending = 0;
    if (i->marker >= MARK_BEGIN && i->marker <= MARK_MET) mark(t, i->marker);
    else if (t->waiting) (void)0;
    else if (skip_outside && !t->inside) {
        if (i->flags & SETS_TYPE) set_type(&t->core, i->vtype);
    } else {
        double before = t->core.t;
        step(&t->core, i, next, t->lines, t->count);
        if (model.cores > 1 && t->core.t > t->checked + PACE / 4) t->checked = t->core.t, keep_pace(t->number, t->core.t);
        if (profile_path) {
            struct instruction *mine = (struct instruction *)i;
            mine->times++, mine->spent += t->core.t - before;
        }
    }
    if (t->core.t > newest) newest = t->core.t;
}

static void executed(unsigned cpu, void *data)
{
    struct thread *t = thread_of(cpu);
    const struct instruction *i = data;
    settle(t, i->address);
    t->pending = i, t->count = 0;
}

static void accessed(unsigned cpu, uint32_t access, uint64_t address, void *data)
{
    struct thread *t = threads[cpu % CORES];
    (void)data;
    if (!t) return;
    unsigned shift = t->core.memory.l1.shift;
    uint64_t first = address >> shift, last = (address + (1u << qemu_plugin_mem_size_shift(access)) - 1) >> shift;
    if (t->count && t->lines[t->count - 1] == last) return; /* elements come one by one */
    for (; first <= last && t->count < LINES; first++)
        if (!t->count || t->lines[t->count - 1] != first) t->lines[t->count++] = first;
}

static void translated(plugin_id id, struct qemu_plugin_tb *block)
{
    size_t n = qemu_plugin_tb_n_insns(block);
    struct instruction *all = calloc(n, sizeof *all); /* lives as long as the translation may be executed */
    (void)id;
    for (size_t k = 0; k < n; k++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(block, k);
        uint32_t word = 0;
        all[k].address = qemu_plugin_insn_vaddr(insn);
        all[k].size = (uint8_t)qemu_plugin_insn_size(insn);
        const size_t bytes = all[k].size < sizeof word ? all[k].size : sizeof word;
#if PLUGIN_API < 3
        memcpy(&word, qemu_plugin_insn_data(insn), bytes);
#else
        qemu_plugin_insn_data(insn, &word, bytes);
#endif
        decode(&all[k], word);
        qemu_plugin_register_vcpu_insn_exec_cb(insn, executed, PLUGIN_NO_REGISTERS, &all[k]);
        int c = all[k].class;
        if (c == C_load || c == C_store || c == C_fload || c == C_fstore || c == C_amo || c >= FIRST_VECTOR_MEMORY)
            qemu_plugin_register_vcpu_mem_cb(insn, accessed, PLUGIN_NO_REGISTERS, PLUGIN_READ_WRITE, &all[k]);
    }
    if (profile_path) {
        struct block *b = malloc(sizeof *b);
        pthread_mutex_lock(&lock);
        *b = (struct block){all, n, blocks}, blocks = b;
        pthread_mutex_unlock(&lock);
    }
}

static void called(plugin_id id, unsigned cpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)a1, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (!thread_of(cpu)->waiting) show(thread_of(cpu)->number, AWAY);
    thread_of(cpu)->time_at = number == CLOCK_GETTIME ? a2 : 0;
    if (number == SETITIMER && a2) {
        uint64_t *value = (uint64_t *)(uintptr_t)(guest_base + a2) + 2; /* behind the interval: seconds, microseconds */
        value[0] *= PATIENCE;
    }
}

static void returned(plugin_id id, unsigned cpu, int64_t number, int64_t result)
{
    struct thread *t = thread_of(cpu);
    (void)id;
    if (number != CLOCK_GETTIME || result || !t->time_at) return;
    settle(t, 0);
    uint64_t ns = (uint64_t)(drain(&t->core) / model.ghz), parts[2] = {1000 + ns / 1000000000u, ns % 1000000000u};
    memcpy((void *)(uintptr_t)(guest_base + t->time_at), parts, sizeof parts);
}

static void report_one(FILE *f, const struct counts *n)
{
    const char *comma = "";
    fprintf(f, "\"instructions\": %llu, \"mispredicted\": %llu, \"executed\": {", (unsigned long long)n->instructions,
            (unsigned long long)n->mispredicted);
    for (int c = 0; c < CLASS_COUNT; c++) {
        static const char *const sizes[] = {"1", "2", "4", "8", "f"};
        const char *inner = "";
        int any = 0;
        for (int g = 0; g < 5; g++)
            for (int e = 0; e < 4; e++) {
                if (!n->executed[c][g][e]) continue;
                if (!any++) fprintf(f, "%s\"%s\": {", comma, class_names[c]), comma = ", ";
                if (c >= FIRST_VECTOR)
                    fprintf(f, "%s\"e%dm%s\": %llu", inner, 8 << e, sizes[g], (unsigned long long)n->executed[c][g][e]);
                else fprintf(f, "%s\"all\": %llu", inner, (unsigned long long)n->executed[c][g][e]);
                inner = ", ";
            }
        if (any) fprintf(f, "}");
    }
    fprintf(f, "}, \"waited\": {");
#define REASON(name) if (W_##name) fprintf(f, "%s\"" #name "\": %.1f", W_##name > 1 ? ", " : "", n->waited[W_##name]);
    REASONS(REASON)
#undef REASON
    const struct traffic *m = &n->traffic;
    fprintf(f, "}, \"memory\": {\"accesses\": %llu, \"l1_misses\": %llu, \"l2_misses\": %llu, \"tlb_misses\": %llu, "
               "\"tlb2_misses\": %llu, \"prefetches\": %llu, \"read_bytes\": %llu, \"written_bytes\": %llu}",
            (unsigned long long)m->accesses, (unsigned long long)m->l1_misses, (unsigned long long)m->l2_misses,
            (unsigned long long)m->tlb_misses, (unsigned long long)m->tlb2_misses, (unsigned long long)m->prefetches,
            (unsigned long long)m->read_bytes, (unsigned long long)m->written_bytes);
}

/* One line an instruction and translation of it: address, executions, cycles that the clock moved on at it. */
static void write_profile(void)
{
    FILE *f = fopen(profile_path, "w");
    if (!f) return;
    for (struct block *b = blocks; b; b = b->next)
        for (size_t k = 0; k < b->n; k++)
            if (b->all[k].times)
                fprintf(f, "%llx %llu %.1f\n", (unsigned long long)b->all[k].address, (unsigned long long)b->all[k].times, b->all[k].spent);
    fclose(f);
}

static void ended(plugin_id id, void *data)
{
    (void)id, (void)data;
    if (profile_path) write_profile();
    FILE *f = fopen(out_path, "w");
    if (!f) return;
    fprintf(f, "{\"threads\": [");
    const char *comma = "";
    for (int i = 0; i < CORES; i++) {
        struct thread *t = threads[i];
        if (!t) continue;
        settle(t, 0);
        if (!marked) finish_region(t);
        fprintf(f, "%s\n{\"cycles\": %.1f, \"regions\": [", comma, t->cycles);
        for (unsigned r = 0; r < t->regions; r++) fprintf(f, "%s%.1f", r ? ", " : "", t->region[r]);
        fprintf(f, "], \"unknown_types\": %d, ", t->core.unknown_types);
        report_one(f, &t->sum);
        fprintf(f, ", \"last\": {");
        report_one(f, &t->last);
        fprintf(f, "}}");
        comma = ",";
    }
    fprintf(f, "]}\n");
    fclose(f);
}

PLUGIN_EXPORT int qemu_plugin_install(plugin_id id, const struct plugin_info *info, int count, char **words)
{
    const char *path = 0;
    (void)info;
    for (int i = 0; i < count; i++) {
        if (!strncmp(words[i], "model=", 6)) path = words[i] + 6;
        else if (!strncmp(words[i], "out=", 4)) out_path = words[i] + 4;
        else if (!strncmp(words[i], "base=", 5)) guest_base = strtoull(words[i] + 5, 0, 0);
        else if (!strncmp(words[i], "profile=", 8)) profile_path = words[i] + 8;
        else if (!strcmp(words[i], "outside=skip")) skip_outside = 1;
        else return fprintf(stderr, "instrument: unknown argument %s\n", words[i]), -1;
    }
    if (!path || read_model(path)) return fprintf(stderr, "instrument: cannot read the model\n"), -1;
    cache_setup(&l2, &model.l2), l2.chance = 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    qemu_plugin_register_vcpu_syscall_ret_cb(id, returned);
    qemu_plugin_register_atexit_cb(id, ended, 0);
    return 0;
}
