/* One NHWC f32 convolution by XNNPACK, one thread, marked for the instrument. Built by bench/riscv.py.
 *
 *   xnnpack_conv IC OC SIZE KERNEL STRIDE PADDING REPEATS
 *
 * Prints the sum of the output, so that nothing can be left out. The first inference is not marked.
 */
#include <stdio.h>
#include <stdlib.h>
#include <xnnpack.h>

#define MARK(n) __asm__ volatile("slti x0, x0, " #n ::: "memory")
#define DO(call) if ((call) != xnn_status_success) return fprintf(stderr, "%s failed\n", #call), 1

int main(int argc, char **argv)
{
    if (argc < 8) return 2;
    size_t v[7];
    for (int i = 0; i < 7; i++) v[i] = strtoull(argv[i + 1], 0, 10);
    size_t ic = v[0], oc = v[1], size = v[2], kernel = v[3], stride = v[4], padding = v[5], repeats = v[6];
    size_t out = (size + 2 * padding - kernel) / stride + 1, workspace = 0, alignment = 0, oh, ow;
    float *w = malloc(oc * kernel * kernel * ic * sizeof *w), *bias = calloc(oc, sizeof *bias);
    float *x = aligned_alloc(64, (size * size * ic * sizeof *x + XNN_EXTRA_BYTES + 63) / 64 * 64);
    float *y = aligned_alloc(64, (out * out * oc * sizeof *y + XNN_EXTRA_BYTES + 63) / 64 * 64), sum = 0;
    for (size_t i = 0; i < oc * kernel * kernel * ic; i++) w[i] = (float)(i % 13) - 6;
    for (size_t i = 0; i < size * size * ic; i++) x[i] = (float)(i % 7) - 3;
    xnn_operator_t op = 0;
    DO(xnn_initialize(0));
    uint32_t p = (uint32_t)padding, k = (uint32_t)kernel, s = (uint32_t)stride;
    DO(xnn_create_convolution2d_nhwc_f32(p, p, p, p, k, k, s, s, 1, 1, 1, ic, oc, ic, oc, w, bias, -1e30f, 1e30f, 0, 0, 0, &op));
    DO(xnn_reshape_convolution2d_nhwc_f32(op, 1, size, size, &workspace, &alignment, &oh, &ow, 0));
    void *scratch = workspace ? aligned_alloc(64, (workspace + 63) / 64 * 64) : 0;
    DO(xnn_setup_convolution2d_nhwc_f32(op, scratch, x, y));
    DO(xnn_run_operator(op, 0));
    for (size_t r = 0; r < repeats; r++) {
        MARK(1);
        DO(xnn_run_operator(op, 0));
        MARK(2);
    }
    for (size_t i = 0; i < out * out * oc; i++) sum += y[i];
    printf("%g\n", (double)sum);
    return 0;
}
