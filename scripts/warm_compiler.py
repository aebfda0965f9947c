"""Have the compiler build its C libraries for this machine (or the one named) now: the first model shall not wait."""

import sys

from colonnade.build.toolchain import Toolchain, host

SOURCE = """
#include <math.h>
#include <pthread.h>
#include <stdio.h>
static void *work(void *x) { return x; }
int main(void) {
    pthread_t thread;
    if (pthread_create(&thread, 0, work, 0) || pthread_join(thread, 0)) return 1;
    printf("%f\\n", exp(0.0));
    return 0;
}
"""

if __name__ == "__main__":
    arch = sys.argv[1] if len(sys.argv) > 1 else host()
    for kind in ("shared", "program"):
        Toolchain().compile({"warm.c": SOURCE}, kind, arch)
