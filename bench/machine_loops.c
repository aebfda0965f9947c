/* The loops of the published rvv-bench tables whose code is implied by their description: strip-mined copy, fill and
 * string length, and byte by byte. Built by bench/machine_trust.py.
 *
 *   loops WHAT BYTES REPEATS     WHAT: copy, fill, length (fault-only-first) or plain (length by plain loads), with the
 *                                LMUL behind it, or bytes1 (copy) or count1 (length), one byte at a time
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MARK(n) __asm__ volatile("slti x0, x0, " #n ::: "memory")
#define EACH(X) X(1) X(2) X(4) X(8)

#define COPY(m) __attribute__((noinline)) static void copy##m(char *d, const char *s, size_t n) \
{ \
    size_t vl; \
    __asm__ volatile("1:\n vsetvli %3, %2, e8, m" #m ", ta, ma\n vle8.v v0, (%1)\n add %1, %1, %3\n sub %2, %2, %3\n" \
                     " vse8.v v0, (%0)\n add %0, %0, %3\n bnez %2, 1b" : "+r"(d), "+r"(s), "+r"(n), "=&r"(vl) :: "memory"); \
}
#define FILL(m) __attribute__((noinline)) static void fill##m(char *d, const char *s, size_t n) \
{ \
    size_t vl; \
    (void)s; \
    __asm__ volatile("vsetvli %2, x0, e8, m" #m ", ta, ma\n vmv.v.i v0, 1\n1:\n vsetvli %2, %1, e8, m" #m ", ta, ma\n" \
                     " vse8.v v0, (%0)\n sub %1, %1, %2\n add %0, %0, %2\n bnez %1, 1b" \
                     : "+r"(d), "+r"(n), "=&r"(vl) :: "memory"); \
}
#define LENGTH(m) __attribute__((noinline)) static void length##m(char *d, const char *s, size_t n) \
{ \
    size_t vl, at; \
    (void)d, (void)n; \
    __asm__ volatile("1:\n vsetvli %1, x0, e8, m" #m ", ta, ma\n vle8ff.v v8, (%0)\n csrr %1, vl\n vmseq.vi v0, v8, 0\n" \
                     " vfirst.m %2, v0\n add %0, %0, %1\n bltz %2, 1b" : "+r"(s), "=&r"(vl), "=&r"(at) :: "memory"); \
}
#define PLAIN(m) __attribute__((noinline)) static void plain##m(char *d, const char *s, size_t n) \
{ \
    size_t vl, at; \
    (void)d, (void)n; \
    __asm__ volatile("vsetvli %1, x0, e8, m" #m ", ta, ma\n1:\n vle8.v v8, (%0)\n vmseq.vi v0, v8, 0\n" \
                     " vfirst.m %2, v0\n add %0, %0, %1\n bltz %2, 1b" : "+r"(s), "=&r"(vl), "=&r"(at) :: "memory"); \
}
EACH(COPY) EACH(FILL) EACH(LENGTH) EACH(PLAIN)

__attribute__((noinline)) static void bytes1(char *d, const char *s, size_t n)
{
    char c;
    __asm__ volatile("1:\n lb %3, 0(%1)\n addi %1, %1, 1\n addi %2, %2, -1\n sb %3, 0(%0)\n addi %0, %0, 1\n bnez %2, 1b"
                     : "+r"(d), "+r"(s), "+r"(n), "=&r"(c) :: "memory");
}
__attribute__((noinline)) static void count1(char *d, const char *s, size_t n)
{
    char c;
    (void)d, (void)n;
    __asm__ volatile("1:\n lb %1, 0(%0)\n addi %0, %0, 1\n bnez %1, 1b" : "+r"(s), "=&r"(c) :: "memory");
}


typedef void loop(char *, const char *, size_t);
static const struct { const char *name; loop *run; } loops[] = {
#define ROWS(m) {"copy" #m, copy##m}, {"fill" #m, fill##m}, {"length" #m, length##m}, {"plain" #m, plain##m},
    EACH(ROWS){"bytes1", bytes1}, {"count1", count1},
};

int main(int argc, char **argv)
{
    if (argc < 4) return 2;
    size_t n = strtoull(argv[2], 0, 10), repeats = strtoull(argv[3], 0, 10);
    char *d = aligned_alloc(4096, n + 8192), *s = aligned_alloc(4096, n + 8192);
    memset(d, 2, n + 8192), memset(s, 3, n + 8192);
    memset(s + n, 0, 8192);
    for (size_t i = 0; i < sizeof loops / sizeof *loops; i++)
        if (!strcmp(argv[1], loops[i].name)) {
            for (size_t r = 0; r < repeats; r++) {
                MARK(1);
                loops[i].run(d, s, n);
                MARK(2);
            }
            return 0;
        }
    return 3;
}
