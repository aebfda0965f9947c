/* One core's pipes: takes the executed instructions one by one, with the lines they touched, and advances its clock.
 *
 * In order: an instruction issues when a slot of the cycle, its operands and its unit are there, and nothing behind it
 * issues earlier. Vector registers of a group become ready one after the other, and a reader follows its writer register
 * by register (chaining). `vector_queue` > 0 lets the scalar side run ahead of that many waiting vector instructions.
 * Out of order: dispatch is bound by width and window, a start by operands and the throughput of units, registers are
 * renamed. A branch's operands and what a scalar store writes are read `late` cycles behind issue. `vec` is a pair of half-wide units where the model says 2: some classes use the first one alone.
 */
#ifndef COLONNADE_CORE_H
#define COLONNADE_CORE_H
#include "memory.h"

/* what an instruction waited for; the words of reports */
#define REASONS(X) X(none) X(arithmetic) X(load) X(vload) X(memory) X(tlb) X(branch) X(vector_unit) X(vector_memory) X(scalar_unit)
#define ENUM(name) W_##name,
enum reason { REASONS(ENUM) REASON_COUNT };
#undef ENUM

#define WINDOW 1024
#define QUEUE 64
#define LINES 512
#define HISTORY 4096

struct counts {
    uint64_t executed[CLASS_COUNT][5][4]; /* class, group size (1 2 4 8 fraction), element size (8 16 32 64) */
    double waited[REASON_COUNT];
    uint64_t instructions, mispredicted;
    struct traffic traffic;
};

struct core {
    double t;
    int issued;
    double ready[96], coming[96], read[96], vl_ready; /* coming: register by register; vl_ready: set by a fault-only-first load */
    uint8_t why[96];
    double free[UNIT_COUNT][8];
    double draining; /* until when stored vectors still take the cache's port from loads */
    double retired, window[WINDOW], queue[QUEUE];
    uint64_t at, vector_at;
    unsigned lmul, sew; /* index of the group size (4: a fraction), log2 bytes */
    double eighths;     /* LMUL in eighths */
    uint8_t predictor[HISTORY];
    unsigned history;
    struct memory memory;
    struct counts counts;
    int unknown_types;
};

static void core_setup(struct core *c)
{
    memset(c, 0, sizeof *c);
    memset(c->predictor, 2, sizeof c->predictor);
    c->sew = 2, c->eighths = 8;
    memory_setup(&c->memory);
}

static double later(double a, double b) { return a > b ? a : b; }

static unsigned group_index(double eighths) { return eighths < 8 ? 4 : eighths < 16 ? 0 : eighths < 32 ? 1 : eighths < 64 ? 2 : 3; }
static unsigned registers(double eighths) { return eighths < 16 ? 1 : eighths < 32 ? 2 : eighths < 64 ? 4 : 8; }

static void set_type(struct core *c, unsigned vtype)
{
    static const double lmul[8] = {8, 16, 32, 64, 8, 1, 2, 4};
    c->eighths = lmul[vtype & 7];
    c->sew = vtype >> 3 & 3;
}

/* Everything under way is done: what a fence or a clock's reader would wait for. */
static double drain(struct core *c)
{
    double t = c->t;
    for (int r = 0; r < 96; r++) t = later(t, c->ready[r]);
    for (int u = 0; u < UNIT_COUNT; u++)
        for (int i = 0; i < 8; i++) t = later(t, c->free[u][i]);
    return c->t = later(t, c->retired);
}

/* When `unit` can start at or after t, and its booking for `cycles`. Out of order, a waiting instruction does not keep
 * the unit idle: the backlog counts from `since`. */
static double book(struct core *c, int unit, double t, double since, double cycles)
{
    int count = (int)model.units[unit == U_vec1 ? U_vec : unit];
    double *free = c->free[unit == U_vec1 ? U_vec : unit], from = model.out_of_order ? since : t;
    if (unit == U_vec && count == 2) {
        /* both halves take work until they end together */
        double a = later(free[0], from), b = later(free[1], from), low = a < b ? a : b, end = (a + b) / 2 + cycles;
        if (end < later(a, b)) {
            if (a < b) free[0] = a + 2 * cycles;
            else free[1] = b + 2 * cycles;
        } else free[0] = free[1] = end;
        return later(t, low);
    }
    int best = 0;
    if (unit != U_vec1)
        for (int i = 1; i < count && i < 8; i++)
            if (free[i] < free[best]) best = i;
    double start = later(free[best], from);
    free[best] = start + cycles;
    return later(t, start);
}

static double unit_free(const struct core *c, int unit)
{
    int count = (int)model.units[unit == U_vec1 ? U_vec : unit];
    const double *free = c->free[unit == U_vec1 ? U_vec : unit];
    double least = free[0];
    if (unit != U_vec1)
        for (int i = 1; i < count && i < 8; i++)
            if (free[i] < least) least = free[i];
    return least;
}

/* Registers of a group, and how far apart in time they are read or written. */
struct group { unsigned first, count; double step; };

static struct group group_of(unsigned first, double eighths, double cycles)
{
    unsigned count = registers(eighths);
    if (first + count > 96) count = 96 - first;
    return (struct group){first, count, cycles / count};
}

/* `follow`: take a vector load's registers as they come, even where arithmetic must wait for all of them. */
static double wait_for(const struct core *c, struct group g, int chained, int follow, uint8_t *why, double t)
{
    for (unsigned i = 0; i < g.count; i++) {
        double ready = follow ? c->coming[g.first + i] : c->ready[g.first + i], need = ready - (chained ? i * g.step : 0);
        if (need > t) t = need, *why = c->why[g.first + i];
    }
    return t;
}

static void note_reads(struct core *c, struct group g, double start)
{
    for (unsigned i = 0; i < g.count; i++) c->read[g.first + i] = later(c->read[g.first + i], start + i * g.step);
}

/* One executed instruction. `next` is the address executed after it; lines: what it touched, in order. */
static void step(struct core *c, const struct instruction *i, uint64_t next, const uint64_t *lines, unsigned count)
{
    const struct cost *k = &model.cost[i->class];
    const int vector = i->class >= FIRST_VECTOR, vmemory = i->class >= FIRST_VECTOR_MEMORY;
    const int store = i->class == C_store || i->class == C_fstore || i->class >= FIRST_VECTOR_STORE;
    double eighths = c->eighths, cycles = k->cycles[0];
    struct group reads[4], write = {0, 0, 0};
    unsigned groups = 0;
    uint8_t why = W_none;

    if (vector) {
        unsigned sew = c->sew;
        if (i->class == C_vloadwhole || i->class == C_vstorewhole || i->class == C_vmovewhole) eighths = 8 * i->fields;
        else if (i->class == C_vloadmask || i->class == C_vstoremask) eighths = 8;
        else if (vmemory && i->class != C_vloadindexed && i->class != C_vstoreindexed) {
            eighths = eighths * (1 << i->eew) / (1 << c->sew);
            sew = i->eew;
        }
        if (eighths > 64) eighths = 64;
        unsigned index = group_index(eighths);
        cycles = k->cycles[index];
        if (k->per == BY_ELEMENT) cycles *= later(1, model.vlen / (8 << sew) * eighths / 8) * i->fields;
        if (sew == 3) cycles *= k->sew64;
        c->counts.executed[i->class][index][sew]++;
        /* the groups it reads */
        double total = eighths * (i->class == C_vloadsegment || i->class == C_vstoresegment ? i->fields : 1);
        if (total > 64) total = 64;
        if (i->v2 != NONE)
            reads[groups++] = group_of(i->v2, i->flags & ONE_SRC2 ? 8 : i->flags & WIDE_SRC2 ? 2 * eighths : i->flags & HALF_SRC2 ? eighths / 2 : eighths, cycles);
        if (i->v1 != NONE) reads[groups++] = group_of(i->v1, i->flags & ONE_SRC1 ? 8 : eighths, cycles);
        double wide = i->flags & ONE_DST ? 8 : i->flags & WIDE_DST ? 2 * eighths : total;
        if (i->vd != NONE && i->reads_vd) reads[groups++] = group_of(i->vd, wide, cycles);
        if (i->flags & MASKED) reads[groups++] = group_of(64, 8, cycles);
        if (i->vd != NONE && !(vmemory && store)) write = group_of(i->vd, wide, cycles);
    } else c->counts.executed[i->class][0][0]++;
    c->counts.instructions++;

    /* issue slot */
    double base = c->t;
    if (c->issued >= (int)model.width) base = c->t + 1;
    if (model.out_of_order) base = later(base, c->window[c->at % (unsigned)model.window]);
    double scalar = base;
    for (int s = 0; s < 3; s++) {
        if (i->src[s] == NONE) continue;
        int late = i->class == C_branch || (s == 1 && (i->class == C_store || i->class == C_fstore));
        double need = c->ready[i->src[s]] - (late ? model.late : 0);
        if (need > scalar) scalar = need, why = c->why[i->src[s]];
    }
    if ((vector || i->class == C_csr) && c->vl_ready > scalar) scalar = c->vl_ready, why = W_vload;
    double start = scalar;
    if (vector)
        for (unsigned g = 0; g < groups; g++) {
            int data = store && reads[g].first == i->vd; /* what is stored is read late, and followed from any pipe */
            double need = wait_for(c, reads[g], k->chained, data, &why, start + (data ? model.late : 0));
            start = later(start, need - (data ? model.late : 0));
        }
    if (vector && write.count && !model.out_of_order)
        for (unsigned r = 0; r < write.count; r++) {
            /* what stood there must have been read and written */
            double mine = k->latency + r * write.step, need = later(c->read[write.first + r], c->ready[write.first + r]) - mine;
            if (need > start) start = need, why = W_arithmetic;
        }
    if (vmemory && !store && c->draining > start) start = c->draining, why = W_vector_memory;
    double idle = unit_free(c, k->unit);
    if (!model.out_of_order && idle > start)
        start = idle, why = vmemory ? W_vector_memory : vector ? W_vector_unit : W_scalar_unit;
    const int queued = vector && model.vector_queue > 0 && !model.out_of_order;
    start = book(c, k->unit, start, queued ? start : base, cycles);

    if (vmemory && store) c->draining = start + cycles * (1 + model.store_drain);

    /* memory */
    double arrival = start, accepted = start;
    for (unsigned l = 0; l < count; l++) {
        double taken, extra = translate(&c->memory, lines[l] << c->memory.l1.shift);
        double there = access_line(&c->memory, lines[l], start + extra, store, &taken);
        arrival = later(arrival, there), accepted = later(accepted, taken);
        if (extra > 0) accepted = later(accepted, start + extra); /* a walk blocks the memory pipe */
    }
    if (accepted > start) {
        double *free = c->free[k->unit];
        int units = (int)model.units[k->unit];
        for (int u = 0; u < units && u < 8; u++) free[u] = later(free[u], accepted);
    }

    /* results */
    double complete = start + k->latency;
    uint8_t because = i->class == C_load || i->class == C_fload ? W_load : vmemory ? W_vload : W_arithmetic;
    if (!store && arrival > start) {
        if (arrival > complete) because = W_memory;
        complete = later(complete, arrival);
    }
    if (i->dst != NONE) c->ready[i->dst] = complete, c->why[i->dst] = because;
    if (vector && write.count) {
        const int whole = !k->chained || (vmemory && !model.load_chains);
        for (unsigned r = 0; r < write.count; r++) {
            c->ready[write.first + r] = complete + (whole ? (write.count - 1) * write.step : r * write.step);
            c->coming[write.first + r] = complete + r * write.step;
            c->why[write.first + r] = because;
        }
        complete += (write.count - 1) * write.step;
    }
    if (i->class == C_vloadff) c->vl_ready = complete;
    else if (i->class == C_vset) c->vl_ready = 0;
    if (vector)
        for (unsigned g = 0; g < groups; g++) note_reads(c, reads[g], start);
    if (i->flags & SETS_TYPE) set_type(c, i->vtype);
    else if (i->class == C_vset) c->unknown_types++;

    /* the clock */
    double dispatch = model.out_of_order ? base : start;
    if (queued) {
        unsigned depth = (unsigned)model.vector_queue;
        dispatch = later(scalar, c->queue[c->vector_at % depth]);
        c->queue[c->vector_at++ % depth] = start;
    }
    if (!model.out_of_order) c->counts.waited[why] += dispatch - base;
    if (dispatch > c->t) c->t = dispatch, c->issued = 1;
    else c->issued++;
    if (model.out_of_order) {
        c->retired = later(c->retired + 1 / model.retire, complete);
        c->window[c->at++ % (unsigned)model.window] = c->retired;
    }
    if (i->class == C_branch) {
        unsigned taken = next != i->address + i->size;
        uint8_t *bits = &c->predictor[(i->address >> 1 ^ c->history) % HISTORY];
        if ((*bits >= 2) != taken) {
            c->counts.mispredicted++;
            c->counts.waited[W_branch] += model.mispredict;
            c->t = (model.out_of_order ? complete : c->t) + model.mispredict, c->issued = 0;
        }
        if (taken) c->issued = (int)model.width; /* what follows is fetched from elsewhere */
        *bits = (uint8_t)(taken ? (*bits < 3 ? *bits + 1 : 3) : (*bits ? *bits - 1 : 0));
        c->history = (c->history << 1 | taken) & 255;
    }
}
#endif
