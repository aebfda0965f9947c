/* L1, L2 and data TLB of one core: set-associative, L1 least recently used, L2 random, write-back, write-allocate; a run
 * of stores to line after line does not read what it overwrites; only loads train the prefetcher. Lines carry the
 * time at which their data arrives, so that a late prefetch or a second access to a missing line waits for the rest.
 */
#ifndef COLONNADE_MEMORY_H
#define COLONNADE_MEMORY_H
#include "model.h"
#include <pthread.h>

struct line { uint64_t tag; uint32_t used; uint8_t valid, dirty, prefetched; double ready; const void *by; /* the core that asked for it */ };
struct cache { struct line *lines; uint64_t sets; unsigned ways, shift; uint32_t clock, chance; };
struct tlb { uint64_t *page; uint32_t *used; unsigned entries; uint32_t clock; };
struct stream { uint64_t next; uint32_t used; int count; };

#define MISS_SLOTS 64
#define STREAMS 32

struct traffic { uint64_t accesses, l1_misses, l2_misses, tlb_misses, tlb2_misses, prefetches, read_bytes, written_bytes; };

struct memory {
    struct cache l1;
    struct tlb tlb, tlb2;
    struct stream streams[STREAMS];
    uint32_t clock;
    double slots[MISS_SLOTS], l2_free, memory_free;
    uint64_t last_store_miss;
    int store_run;
    struct traffic traffic;
};

static struct cache l2; /* of all cores */
static pthread_mutex_t l2_lock = PTHREAD_MUTEX_INITIALIZER;

/* What the memory gives all cores together, by spans of SPAN lines' time, for their clocks are never quite the same: a
 * line goes into the first span from its own on that is not full. */
#define SPANS 4096
#define SPAN 32
static struct span { uint64_t number; unsigned lines; } spans[SPANS];

/* When the memory of all cores takes up a line asked for at time t. Called with l2_lock held. */
static double turn_of(double t)
{
    if (!(model.shared_interval > 0)) return t;
    const double length = SPAN * model.shared_interval;
    for (uint64_t n = (uint64_t)(t / length);; n++) {
        struct span *s = spans + n % SPANS;
        if (s->number > n) return t; /* long ago */
        if (s->number < n) *s = (struct span){n, 0};
        if (s->lines < SPAN) {
            s->lines++;
            const double begin = (double)n * length;
            return begin > t ? begin : t;
        }
    }
}

static void cache_setup(struct cache *c, const struct level *level)
{
    c->ways = (unsigned)level->ways;
    c->shift = (unsigned)__builtin_ctzll((uint64_t)level->line);
    c->sets = (uint64_t)(level->size / level->line / level->ways);
    if (!c->sets) c->sets = 1;
    free(c->lines);
    c->lines = calloc(c->sets * c->ways, sizeof *c->lines);
    c->clock = 0;
}

static struct line *cache_find(struct cache *c, uint64_t line)
{
    struct line *set = c->lines + line % c->sets * c->ways;
    for (unsigned w = 0; w < c->ways; w++)
        if (set[w].valid && set[w].tag == line) return set[w].used = ++c->clock, &set[w];
    return 0;
}

/* The place for `line`; *victim is what stood there. */
static struct line *cache_place(struct cache *c, uint64_t line, struct line *victim)
{
    struct line *set = c->lines + line % c->sets * c->ways, *oldest = set;
    for (unsigned w = 0; w < c->ways; w++) {
        if (!set[w].valid) {
            oldest = &set[w];
            break;
        }
        if (set[w].used < oldest->used) oldest = &set[w];
    }
    if (c->chance && oldest->valid) {
        c->chance = c->chance * 1664525u + 1013904223u;
        oldest = set + (c->chance >> 16) % c->ways;
    }
    *victim = *oldest;
    *oldest = (struct line){.tag = line, .used = ++c->clock, .valid = 1};
    return oldest;
}

static int tlb_hit(struct tlb *t, uint64_t page)
{
    unsigned oldest = 0;
    for (unsigned e = 0; e < t->entries; e++) {
        if (t->page[e] == page) return t->used[e] = ++t->clock, 1;
        if (t->used[e] < t->used[oldest]) oldest = e;
    }
    t->page[oldest] = page, t->used[oldest] = ++t->clock;
    return 0;
}

static void tlb_setup(struct tlb *t, double entries)
{
    t->entries = entries < 1 ? 1 : (unsigned)entries;
    free(t->page), free(t->used);
    t->page = malloc(t->entries * sizeof *t->page);
    memset(t->page, 0xff, t->entries * sizeof *t->page);
    t->used = calloc(t->entries, sizeof *t->used);
}

static void memory_setup(struct memory *m)
{
    cache_setup(&m->l1, &model.l1);
    tlb_setup(&m->tlb, model.tlb_entries);
    tlb_setup(&m->tlb2, model.tlb2_entries);
    memset(m->streams, 0, sizeof m->streams);
}

/* Extra cycles to translate the page of `address`. */
static double translate(struct memory *m, uint64_t address)
{
    uint64_t page = address >> 12;
    if (tlb_hit(&m->tlb, page)) return 0;
    m->traffic.tlb_misses++;
    if (tlb_hit(&m->tlb2, page)) return model.tlb_miss;
    m->traffic.tlb2_misses++;
    return model.tlb2_miss;
}

/* Ask L2 and what is behind it for `line` at time t; when its data is there. `fetch` 0: it will be overwritten whole. */
static double beyond(struct memory *m, uint64_t line, double t, int fetch)
{
    double start = t > m->l2_free ? t : m->l2_free, ready;
    m->l2_free = start + model.l2.interval;
    ready = start + model.l2.latency;
    pthread_mutex_lock(&l2_lock);
    struct line *found = cache_find(&l2, line);
    if (found) {
        /* clocks of cores differ a little: what another one asked for, at whatever time of its own, is waited for no
         * longer than if it were asked for now */
        const double longest = found->by == m ? found->ready : start + model.memory.latency;
        const double there = found->ready < longest ? found->ready : longest;
        if (there > ready) ready = there;
    } else {
        struct line victim;
        m->traffic.l2_misses++;
        if (fetch) {
            start = turn_of(start > m->memory_free ? start : m->memory_free);
            m->memory_free = start + model.memory.interval;
            ready = start + model.memory.latency;
            m->traffic.read_bytes += (uint64_t)model.l2.line;
        }
        found = cache_place(&l2, line, &victim);
        found->ready = ready, found->by = m;
        if (victim.valid && victim.dirty) {
            m->memory_free = turn_of(m->memory_free > t ? m->memory_free : t) + model.memory.line;
            m->traffic.written_bytes += (uint64_t)model.l2.line;
        }
    }
    pthread_mutex_unlock(&l2_lock);
    return ready;
}

static struct line *fill(struct memory *m, uint64_t line, double t, double ready)
{
    struct line victim, *place = cache_place(&m->l1, line, &victim);
    place->ready = ready;
    if (victim.valid && victim.dirty) {
        m->l2_free = (m->l2_free > t ? m->l2_free : t) + model.l2.interval;
        pthread_mutex_lock(&l2_lock);
        struct line *below = cache_find(&l2, victim.tag), gone;
        if (!below) {
            below = cache_place(&l2, victim.tag, &gone);
            if (gone.valid && gone.dirty) m->traffic.written_bytes += (uint64_t)model.l2.line;
        }
        below->dirty = 1;
        pthread_mutex_unlock(&l2_lock);
    }
    return place;
}

/* A miss, or the first touch of a prefetched line, feeds the stream that expected it. */
static void follow(struct memory *m, uint64_t line, double t)
{
    struct stream *s = 0, *oldest = m->streams;
    unsigned count = (unsigned)model.prefetch_streams;
    if (!count) return;
    for (unsigned i = 0; i < count && i < STREAMS; i++) {
        if (m->streams[i].count && line - m->streams[i].next <= 1) s = &m->streams[i];
        if (m->streams[i].used < oldest->used) oldest = &m->streams[i];
    }
    if (!s) {
        *oldest = (struct stream){line + 1, ++m->clock, 1};
        return;
    }
    s->next = line + 1, s->used = ++m->clock, s->count++;
    if (s->count < 3) return;
    for (uint64_t ahead = line + 1; ahead <= line + (uint64_t)model.prefetch_distance; ahead++) {
        if ((ahead << m->l1.shift) >> 12 != (line << m->l1.shift) >> 12) break; /* not over the page */
        if (cache_find(&m->l1, ahead)) continue;
        m->traffic.prefetches++;
        fill(m, ahead, t, beyond(m, ahead, t, 1))->prefetched = 1;
    }
}

/* One access to `line` at time t. When its data is usable (loads); *accepted is when a miss slot was free. */
static double access_line(struct memory *m, uint64_t line, double t, int store, double *accepted)
{
    struct line *found = cache_find(&m->l1, line);
    m->traffic.accesses++;
    *accepted = t;
    if (found) {
        double ready = found->ready;
        if (store) found->dirty = 1;
        if (found->prefetched && !store) found->prefetched = 0, follow(m, line, t);
        return ready > t ? ready : t;
    }
    unsigned slot = 0, slots = (unsigned)model.outstanding;
    int fetch = 1;
    m->traffic.l1_misses++;
    if (store && model.write_streaming > 0) {
        m->store_run = line == m->last_store_miss + 1 ? m->store_run + 1 : 0;
        m->last_store_miss = line;
        fetch = m->store_run < (int)model.write_streaming;
    }
    for (unsigned i = 1; i < slots && i < MISS_SLOTS; i++)
        if (m->slots[i] < m->slots[slot]) slot = i;
    if (m->slots[slot] > t) *accepted = m->slots[slot];
    double ready = beyond(m, line, *accepted, fetch);
    m->slots[slot] = ready;
    found = fill(m, line, *accepted, ready);
    found->dirty = (uint8_t)store;
    if (!store) follow(m, line, *accepted);
    return ready;
}
#endif
