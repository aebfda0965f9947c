/* Runs kernel calls that come in on standard input and sends their memory back: the hands of emulated.py on a machine
 * that this process cannot be. Every buffer ends at a page that cannot be touched (less what alignment takes), another
 * such page stands in front of it, and all between them is poisoned beforehand.
 *
 * Little-endian words of 64 bits. A request: buffers, relocations, calls, threads, backwards; of every buffer its size,
 * alignment, poison (32 bits), whether its content follows; of every relocation buffer, byte, target buffer, offset; of
 * every call the buffer of its arguments and the length of its symbol; then contents and symbols in that order.
 * The answer: 0 and all buffers; or 1 and a call whose symbol is unknown, or 2 and a buffer in front of which was written.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef void cn_kernel(const void *args, unsigned thread, unsigned threads);
typedef struct { const char *symbol; cn_kernel *kernel; } cn_entry;
extern const cn_entry CN_KERNELS[];

enum { PAGE = 4096, LIMIT = 120 /* seconds: a kernel that takes longer hangs */ };
struct head { uint64_t buffers, relocations, calls, threads, backwards; };
struct buffer { uint64_t size, align, poison, given; };
struct relocation { uint64_t buffer, at, target, offset; };
struct call { uint64_t args, length; };
struct place { char *whole, *at; size_t room; };

static void *need(void *memory)
{
    if (!memory || memory == MAP_FAILED) exit(4);
    return memory;
}

static void get(void *to, size_t size)
{
    if (size && fread(to, size, 1, stdin) != 1) exit(3);
}

static void put(const void *from, size_t size)
{
    if (size && fwrite(from, size, 1, stdout) != 1) exit(3);
}

static void poison(char *p, size_t size, uint32_t bits)
{
    for (size_t i = 0; i < size; i += 4) memcpy(p + i, &bits, 4);
}

static struct place guarded(const struct buffer *b)
{
    struct place p;
    p.room = (b->size + PAGE - 1) / PAGE * PAGE + PAGE * !b->size;
    p.whole = need(mmap(0, p.room + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mprotect(p.whole + PAGE, p.room, PROT_READ | PROT_WRITE)) exit(4);
    poison(p.whole + PAGE, p.room, (uint32_t)b->poison);
    p.at = p.whole + PAGE + p.room - (b->size + b->align - 1) / b->align * b->align;
    return p;
}

static void answer(uint64_t status, uint64_t which)
{
    put(&status, 8), put(&which, 8);
}

static int untouched(const struct buffer *b, const struct place *p)
{
    uint32_t bits = (uint32_t)b->poison;
    for (const char *at = p->whole + PAGE; at < p->at; at += 4)
        if (memcmp(at, &bits, 4)) return 0;
    return 1;
}

static void serve(const struct head *h)
{
    struct buffer *buffers = need(malloc(h->buffers * sizeof *buffers + 1));
    struct relocation *relocations = need(malloc(h->relocations * sizeof *relocations + 1));
    struct call *calls = need(malloc(h->calls * sizeof *calls + 1));
    struct place *places = need(malloc(h->buffers * sizeof *places + 1));
    cn_kernel **kernels = need(malloc(h->calls * sizeof *kernels + 1));
    uint64_t status = 0, which = 0;
    get(buffers, h->buffers * sizeof *buffers);
    get(relocations, h->relocations * sizeof *relocations);
    get(calls, h->calls * sizeof *calls);
    for (uint64_t i = 0; i < h->buffers; i++) {
        places[i] = guarded(&buffers[i]);
        if (buffers[i].given) get(places[i].at, buffers[i].size);
    }
    for (uint64_t i = 0; i < h->calls; i++) {
        char symbol[256] = {0};
        if (calls[i].length >= sizeof symbol) exit(3);
        get(symbol, calls[i].length);
        const cn_entry *entry = CN_KERNELS;
        while (entry->symbol && strcmp(entry->symbol, symbol)) entry++;
        kernels[i] = entry->kernel;
        if (!entry->symbol) status = 1, which = i;
    }
    for (uint64_t i = 0; i < h->relocations; i++) {
        const struct relocation *r = &relocations[i];
        char *target = places[r->target].at + (int64_t)r->offset;
        memcpy(places[r->buffer].at + r->at, &target, sizeof target);
    }
    for (uint64_t i = 0; !status && i < h->calls; i++)
        for (uint64_t t = 0; t < h->threads; t++)
            kernels[i](places[calls[i].args].at, (unsigned)(h->backwards ? h->threads - 1 - t : t), (unsigned)h->threads);
    for (uint64_t i = 0; !status && i < h->buffers; i++)
        if (!untouched(&buffers[i], &places[i])) status = 2, which = i;
    for (uint64_t i = 0; i < h->relocations; i++) /* addresses mean nothing elsewhere */
        memset(places[relocations[i].buffer].at + relocations[i].at, 0, 8);
    answer(status, which);
    for (uint64_t i = 0; i < h->buffers; i++) {
        if (!status) put(places[i].at, buffers[i].size);
        munmap(places[i].whole, places[i].room + 2 * PAGE);
    }
    fflush(stdout);
    free(buffers), free(relocations), free(calls), free(places), free(kernels);
}

int main(void)
{
    struct head head;
    while (fread(&head, sizeof head, 1, stdin) == 1) {
        alarm(LIMIT);
        serve(&head);
        alarm(0);
    }
    return 0;
}
