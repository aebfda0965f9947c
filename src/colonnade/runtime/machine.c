/* machine.c: does this machine have the instructions that the kernels use? Asked before the first of them runs. */
#define _GNU_SOURCE
#include "runtime.h"

#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>

enum { EBX, ECX };
enum { SSE_STATE = 0x2, AVX_STATE = 0x6, AVX512_STATE = 0xe6 }; /* what the kernel must save and restore (XCR0) */

static const struct {
    const char *name;
    unsigned leaf, reg, bit, state;
} known[] = {
    {"fma", 1, ECX, 12, AVX_STATE},          {"avx", 1, ECX, 28, AVX_STATE},
    {"f16c", 1, ECX, 29, AVX_STATE},         {"avx2", 7, EBX, 5, AVX_STATE},
    {"avx512f", 7, EBX, 16, AVX512_STATE},   {"avx512dq", 7, EBX, 17, AVX512_STATE},
    {"avx512cd", 7, EBX, 28, AVX512_STATE},  {"avx512bw", 7, EBX, 30, AVX512_STATE},
    {"avx512vl", 7, EBX, 31, AVX512_STATE},  {"avx512_vnni", 7, ECX, 11, AVX512_STATE},
};

static unsigned saved_state(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return SSE_STATE;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a;
}

static int has(const char *feature)
{
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        unsigned a, b, c, d;
        if (strcmp(known[i].name, feature) != 0) continue;
        if (!__get_cpuid_count(known[i].leaf, 0, &a, &b, &c, &d)) return 0;
        const unsigned bits = known[i].reg == EBX ? b : c;
        return (bits >> known[i].bit & 1) && (saved_state() & known[i].state) == known[i].state;
    }
    return 0;
}
#elif defined(__riscv)
/* Kernels of vendors set the bit of V for the vectors of draft 0.7.1 too. Both drafts and 1.0 have vsetvli, but only 1.0
 * takes this type (e32, m1, tail and mask agnostic); others answer with vill, the top bit. */
static uint64_t vector_lanes(uint64_t *type)
{
    uint64_t lanes;
    __asm__ volatile(".4byte 0x0d007557\n\t" /* vsetvli a0, zero, e32, m1, ta, ma */
                     "mv %0, a0\n\t"
                     "csrr %1, 0xc21"         /* vtype */
                     : "=&r"(lanes), "=r"(*type) : : "a0", "memory");
    return lanes;
}

static int is_vector_1_0(void)
{
    enum { TYPE = 0xd0 };
    uint64_t type;
    vector_lanes(&type);
    return type == TYPE;
}

/* Memory is laid out for vectors of up to 1024 bits. */
static int is_too_long(void)
{
    uint64_t type;
    return vector_lanes(&type) > 1024 / 32;
}

/* Extensions of several letters, as newer kernels answer riscv_hwprobe, or as others list them in /proc/cpuinfo. */
static int has_named(const char *feature)
{
    static const struct { const char *name; unsigned bit; } known[] = {{"zvfh", 30}};
    struct { int64_t key; uint64_t value; } pair = {4, 0};
    char line[4096], name[32];
    enum { HWPROBE = 258 };
    if (syscall(HWPROBE, &pair, 1L, 0L, NULL, 0L) == 0 && pair.key == 4)
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            if (!strcmp(known[i].name, feature) && pair.value >> known[i].bit & 1) return 1;
    FILE *const file = fopen("/proc/cpuinfo", "re");
    int found = 0;
    snprintf(name, sizeof name, "_%s", feature);
    while (file && !found && fgets(line, sizeof line, file))
        for (const char *at = strncmp(line, "isa", 3) ? NULL : strstr(line, name); at && !found; at = strstr(at + 1, name))
            found = strchr("_ \t\n", at[strlen(name)]) != NULL;
    if (file) fclose(file);
    return found;
}

/* single-letter extensions are bits of AT_HWCAP */
static int has(const char *feature)
{
    if (feature[0] && feature[1]) return has_named(feature);
    if (feature[0] < 'a' || feature[0] > 'z' || feature[1] || !(getauxval(AT_HWCAP) >> (feature[0] - 'a') & 1)) return 0;
    return feature[0] != 'v' || is_vector_1_0();
}
#else
static int has(const char *feature) { return (void)feature, 0; }
#endif

const char *cn_machine_lacks(const char *const *features)
{
    for (; *features; features++) {
        if (!has(*features)) return *features;
#ifdef __riscv
        if (!strcmp(*features, "v") && is_too_long()) return "vectors of 1024 bits or less";
#endif
    }
    return NULL;
}
