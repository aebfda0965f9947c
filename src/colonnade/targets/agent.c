/* agent.c: what Colonnade starts on a board: a static program of the architecture's baseline, without vectors.
 *
 *   agent probe                                  tell what this machine is
 *   agent run TOKEN SECONDS CPUS PROGRAM ARG...  run PROGRAM on the cores CPUS ("0-3,6", or "-" for all)
 *
 * `run` ends the program, with all its children, when standard input ends (whoever asked for it is gone), after
 * SECONDS, and when it is itself asked to end. Its last line on standard error is
 *
 *   TOKEN exit N | TOKEN signal N | TOKEN timeout | TOKEN gone | TOKEN cannot TEXT
 *
 * `probe` prints lines `name value`, and files as `file LENGTH PATH`, a newline, and LENGTH bytes. Instructions and
 * registers that the machine may not have are tried behind a handler for SIGILL.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* ---- probe ---- */

static void show(const char *path)
{
    static char content[1 << 18];
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t length = 0;
    ssize_t got = 0;
    if (fd < 0) return;
    while (length < sizeof content && (got = read(fd, content + length, sizeof content - length)) > 0) length += (size_t)got;
    close(fd);
    if (got < 0 && !length) return;
    printf("file %zu %s\n", length, path);
    fwrite(content, 1, length, stdout);
}

static void show_core(int cpu)
{
    static const char *const names[] = {"level", "type", "size", "coherency_line_size", "shared_cpu_list"};
    char path[256];
    const char *base = "/sys/devices/system/cpu/cpu";
    for (int index = 0; index < 5; index++)
        for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
            snprintf(path, sizeof path, "%s%d/cache/index%d/%s", base, cpu, index, names[n]);
            show(path);
        }
    snprintf(path, sizeof path, "%s%d/topology/cluster_cpus_list", base, cpu);
    show(path);
    snprintf(path, sizeof path, "%s%d/cpufreq/scaling_governor", base, cpu);
    show(path);
}

static void show_temperatures(void)
{
    DIR *folder = opendir("/sys/class/thermal");
    char path[512];
    for (struct dirent *entry; folder && (entry = readdir(folder));)
        if (strncmp(entry->d_name, "thermal_zone", 12) == 0) {
            snprintf(path, sizeof path, "/sys/class/thermal/%s/temp", entry->d_name);
            show(path);
        }
    if (folder) closedir(folder);
}

#if defined(__riscv)
static sigjmp_buf without;

static void illegal(int number)
{
    siglongjmp(without, number);
}

static void show_vectors(void)
{
    struct sigaction act = {.sa_handler = illegal};
    sigaction(SIGILL, &act, NULL);
    if (sigsetjmp(without, 1)) {
        puts("vlenb none");
    } else {
        unsigned long vlenb;
        __asm__ volatile("csrr %0, 0xc22" : "=r"(vlenb)); /* vlenb; the older vectors have it too */
        printf("vlenb %lu\n", vlenb);
    }
    if (sigsetjmp(without, 1)) {
        puts("vsetvli none");
    } else {
        /* vsetvli a0, zero, e32, m1, ta, ma. The older vectors read other fields from these bits, among them elements
         * of 256 bits, and answer vill. */
        register unsigned long vl __asm__("a0");
        unsigned long vtype;
        __asm__ volatile(".word 0x0d007557\n\tcsrr %1, 0xc21" : "=r"(vl), "=r"(vtype));
        printf("vsetvli %lu %lx\n", vl, vtype);
    }
}

static void show_hwprobe(void)
{
    /* keys: 0 vendor, 1 architecture, 2 implementation, 3 base behaviour, 4 extensions, 5 misaligned access; a key
     * that the kernel does not know comes back as -1 */
    struct { int64_t key; uint64_t value; } pairs[6];
    for (int i = 0; i < 6; i++) pairs[i].key = i, pairs[i].value = 0;
    if (syscall(258, pairs, 6, 0, NULL, 0) != 0) return;
    for (int i = 0; i < 6; i++)
        if (pairs[i].key >= 0) printf("hwprobe%d %llx\n", i, (unsigned long long)pairs[i].value);
}
#else
static void show_vectors(void) {}
static void show_hwprobe(void) {}
#endif

static int probe(void)
{
    cpu_set_t usable;
    if (sched_getaffinity(0, sizeof usable, &usable) != 0) return 1;
    printf("hwcap %lx\n", getauxval(AT_HWCAP));
    show_vectors();
    show_hwprobe();
    static const char *const files[] = {"/proc/cpuinfo", "/proc/meminfo", "/proc/sys/kernel/osrelease",
                                        "/proc/device-tree/model"};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) show(files[i]);
    printf("cpus");
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &usable)) printf(" %d", cpu);
    printf("\n");
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &usable)) show_core(cpu);
    show_temperatures();
    return fflush(stdout) == EOF;
}

/* ---- run ---- */

static volatile sig_atomic_t asked;

static void note(int number)
{
    if (number != SIGCHLD) asked = 1;
}

static int parse_cpus(const char *text, cpu_set_t *set)
{
    CPU_ZERO(set);
    for (char *end; *text; text = *end ? end + 1 : end) {
        long first = strtol(text, &end, 10), last = first;
        if (end == text) return -1;
        if (*end == '-') {
            text = end + 1;
            last = strtol(text, &end, 10);
            if (end == text) return -1;
        }
        if ((*end && *end != ',') || first < 0 || last < first || last >= CPU_SETSIZE) return -1;
        for (long cpu = first; cpu <= last; cpu++) CPU_SET(cpu, set);
    }
    return CPU_COUNT(set) ? 0 : -1;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void become(char **command, const cpu_set_t *cpus, const sigset_t *mask, int report)
{
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int null = open("/dev/null", O_RDONLY);
    if (null >= 0) dup2(null, 0);
    static const int ours[] = {SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGPIPE};
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) signal(ours[i], SIG_DFL);
    sigprocmask(SIG_SETMASK, mask, NULL);
    const char *what = "use these cores";
    if (!cpus || sched_setaffinity(0, sizeof *cpus, cpus) == 0) {
        what = "start the program";
        execv(command[0], command);
    }
    dprintf(report, "%s: %s", what, strerror(errno));
    _exit(127);
}

static int run(const char *token, double seconds, const char *cpus_text, char **command)
{
    cpu_set_t cpus;
    const int pinned = strcmp(cpus_text, "-") != 0;
    if (pinned && parse_cpus(cpus_text, &cpus)) return fprintf(stderr, "\n%s cannot use cores %s\n", token, cpus_text), 1;
    sigset_t block, before;
    sigemptyset(&block);
    struct sigaction act = {.sa_handler = note};
    static const int wanted[] = {SIGCHLD, SIGHUP, SIGINT, SIGTERM};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) sigaddset(&block, wanted[i]);
    sigprocmask(SIG_BLOCK, &block, &before); /* ppoll alone lets them in, so none is missed */
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) sigaction(wanted[i], &act, NULL);
    signal(SIGPIPE, SIG_IGN);
    int report[2];
    if (pipe2(report, O_CLOEXEC)) return fprintf(stderr, "\n%s cannot make a pipe: %s\n", token, strerror(errno)), 1;
    const pid_t child = fork();
    if (child < 0) return fprintf(stderr, "\n%s cannot start a process: %s\n", token, strerror(errno)), 1;
    if (child == 0) become(command, pinned ? &cpus : NULL, &before, report[1]);
    close(report[1]);

    const double deadline = now() + seconds;
    const char *end = NULL;
    int status = 0, watching = 1;
    while (waitpid(child, &status, WNOHANG) == 0) {
        const double left = deadline - now();
        if (asked) end = "gone";
        if (left <= 0) end = "timeout";
        if (end) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            break;
        }
        struct pollfd input = {.fd = watching ? 0 : -1, .events = POLLIN};
        const struct timespec wait = {(time_t)left, (long)((left - (double)(time_t)left) * 1e9)};
        sigset_t none;
        sigemptyset(&none);
        if (ppoll(&input, 1, &wait, &none) > 0) {
            char ignored[256];
            const ssize_t got = read(0, ignored, sizeof ignored);
            if (got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN)) asked = 1, watching = 0;
        }
    }
    kill(-child, SIGKILL); /* what it may have left behind in its session */
    char why[256];
    const ssize_t length = read(report[0], why, sizeof why);
    if (length > 0)
        fprintf(stderr, "\n%s cannot %.*s\n", token, (int)length, why);
    else if (end)
        fprintf(stderr, "\n%s %s\n", token, end);
    else if (WIFSIGNALED(status))
        fprintf(stderr, "\n%s signal %d\n", token, WTERMSIG(status));
    else
        fprintf(stderr, "\n%s exit %d\n", token, WEXITSTATUS(status));
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "probe") == 0) return probe();
    if (argc > 5 && strcmp(argv[1], "run") == 0) return run(argv[2], strtod(argv[3], NULL), argv[4], argv + 5);
    fputs("usage: agent probe | agent run TOKEN SECONDS CPUS PROGRAM ARG...\n", stderr);
    return 2;
}
