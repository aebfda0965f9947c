/* board_cpu.c: the binfmt_misc interpreter of the emulated board. It starts QEMU with the processor that the board's
 * own root names in /etc/board-cpu, because sshd servers clear the environment and QEMU_CPU with it.
 *
 * Registered with the flags P and F: argv is [this, program, argv[0] of the program, its arguments...].
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char qemu[] = "/usr/bin/qemu-riscv64-static";

int main(int argc, char **argv)
{
    char cpu[256] = "rv64";
    static char *command[1 << 16];
    size_t count = 0;
    FILE *file = fopen("/etc/board-cpu", "r");
    if (file) {
        if (fgets(cpu, sizeof cpu, file)) cpu[strcspn(cpu, "\n")] = 0;
        fclose(file);
    }
    if (argc < 3 || (size_t)argc + 8 > sizeof command / sizeof *command) return 127;
    command[count++] = (char *)qemu;
    command[count++] = "-cpu";
    command[count++] = cpu;
    command[count++] = "-0";
    command[count++] = argv[2];
    command[count++] = argv[1];
    for (int i = 3; i < argc; i++) command[count++] = argv[i];
    execv(qemu, command);
    fprintf(stderr, "%s: %s\n", qemu, strerror(errno));
    return 127;
}
