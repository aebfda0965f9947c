/* The numbers of one core, read from the lines that colonnade.machine.model writes: `name value...`. Times in cycles. */
#ifndef COLONNADE_MODEL_H
#define COLONNADE_MODEL_H
#include "decode.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum unit { U_alu, U_lsu, U_fpu, U_vec, U_vec1, U_vmem, UNIT_COUNT };
enum { BY_LMUL, BY_ELEMENT };

struct cost {
    double latency;     /* from start to the first register of the result */
    double cycles[5];   /* the unit's, for groups of 1, 2, 4, 8 registers and for a fraction of one */
    double sew64;       /* factor on cycles for 64-bit elements */
    int unit, per, chained;
};

struct level { double size, ways, line, latency, interval; }; /* memory: line is the interval of written lines */

static struct {
    double out_of_order, width, window, retire, vector_queue, load_chains, store_drain, late, mispredict, ghz, vlen;
    double units[UNIT_COUNT];
    struct cost cost[CLASS_COUNT];
    struct level l1, l2, memory;
    double outstanding, prefetch_distance, prefetch_streams, write_streaming, cores;
    double shared_interval; /* between lines of all cores' memory; 0: a core alone draws at its own intervals */
    double tlb_entries, tlb_miss, tlb2_entries, tlb2_miss, barrier;
} model;

static const char *const class_names[] = {
#define NAME(name) #name,
    CLASSES(NAME)
#undef NAME
};

static int numbers(const char *text, double *into, int count)
{
    int found = 0;
    for (char *end; found < count; found++, text = end) {
        into[found] = strtod(text, &end);
        if (end == text) break;
    }
    return found;
}

/* 0 when the file is read and whole. */
static int read_model(const char *path)
{
    static const struct { const char *name; double *into; int count; } fields[] = {
        {"out_of_order", &model.out_of_order, 1}, {"width", &model.width, 1}, {"window", &model.window, 1},
        {"retire", &model.retire, 1}, {"vector_queue", &model.vector_queue, 1}, {"load_chains", &model.load_chains, 1},
        {"store_drain", &model.store_drain, 1}, {"late", &model.late, 1},
        {"mispredict", &model.mispredict, 1}, {"ghz", &model.ghz, 1}, {"vlen", &model.vlen, 1},
        {"units", model.units, UNIT_COUNT}, {"l1", &model.l1.size, 5}, {"l2", &model.l2.size, 5},
        {"memory", &model.memory.size, 5}, {"outstanding", &model.outstanding, 1},
        {"prefetch_distance", &model.prefetch_distance, 1}, {"prefetch_streams", &model.prefetch_streams, 1},
        {"write_streaming", &model.write_streaming, 1}, {"cores", &model.cores, 1},
        {"shared_interval", &model.shared_interval, 1},
        {"tlb_entries", &model.tlb_entries, 1}, {"tlb_miss", &model.tlb_miss, 1},
        {"tlb2_entries", &model.tlb2_entries, 1}, {"tlb2_miss", &model.tlb2_miss, 1}, {"barrier", &model.barrier, 1},
    };
    FILE *file = fopen(path, "r");
    char line[512], name[64];
    int at, missing = CLASS_COUNT + (int)(sizeof fields / sizeof *fields);
    if (!file) return -1;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%63s%n", name, &at) != 1) continue;
        if (!strcmp(name, "class")) {
            double v[10];
            int used;
            if (sscanf(line + at, "%63s%n", name, &used) != 1) continue;
            for (int c = 0; c < CLASS_COUNT; c++)
                if (!strcmp(name, class_names[c]) && numbers(line + at + used, v, 10) == 10) {
                    struct cost *k = &model.cost[c];
                    k->unit = (int)v[0], k->latency = v[1], k->sew64 = v[7], k->per = (int)v[8], k->chained = (int)v[9];
                    memcpy(k->cycles, v + 2, sizeof k->cycles);
                    missing--;
                }
            continue;
        }
        for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
            if (!strcmp(name, fields[f].name) && numbers(line + at, fields[f].into, fields[f].count) == fields[f].count)
                missing--;
    }
    fclose(file);
    return missing;
}
#endif
