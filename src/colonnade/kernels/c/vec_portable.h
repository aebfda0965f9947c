/* Portable C: one vector is 8 f32 lanes in an array; any compiler, any machine. Contract: see vec_avx512.h. */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 8

typedef struct { float at[8]; } vec1_t;

#define VEC_EACH(expression) \
    vec1_t r; \
    for (int i = 0; i < 8; i++) r.at[i] = (expression); \
    return r

VEC_INLINE size_t vec1_setvl(size_t n) { (void)n; return 8; }
VEC_INLINE vec1_t vec1_load(const float *p, size_t vl) { (void)vl; VEC_EACH(p[i]); }
VEC_INLINE void vec1_store(float *p, vec1_t v, size_t vl) { (void)vl; memcpy(p, v.at, sizeof v.at); }
VEC_INLINE vec1_t vec1_load_n(const float *p, size_t n) { VEC_EACH((size_t)i < n ? p[i] : 0.0f); }
VEC_INLINE void vec1_store_n(float *p, vec1_t v, size_t n) { memcpy(p, v.at, n * sizeof(float)); }
VEC_INLINE vec1_t vec1_splat(float x, size_t vl) { (void)vl; VEC_EACH(x); }
VEC_INLINE vec1_t vec1_fma(vec1_t acc, float s, vec1_t v, size_t vl) { (void)vl; VEC_EACH(acc.at[i] + s * v.at[i]); }
VEC_INLINE vec1_t vec1_fmav(vec1_t acc, vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(acc.at[i] + a.at[i] * b.at[i]); }
VEC_INLINE vec1_t vec1_add(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] + b.at[i]); }
VEC_INLINE vec1_t vec1_sub(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] - b.at[i]); }
VEC_INLINE vec1_t vec1_mul(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] * b.at[i]); }
VEC_INLINE vec1_t vec1_div(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] / b.at[i]); }
VEC_INLINE vec1_t vec1_over(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] / b.at[i]); }
VEC_INLINE vec1_t vec1_plus(vec1_t v, float s, size_t vl) { (void)vl; VEC_EACH(v.at[i] + s); }
VEC_INLINE vec1_t vec1_scale(vec1_t v, float s, size_t vl) { (void)vl; VEC_EACH(v.at[i] * s); }
VEC_INLINE vec1_t vec1_link(vec1_t p, vec1_t x, float s, size_t vl) { (void)vl; VEC_EACH(p.at[i] * x.at[i] + s); }
VEC_INLINE float vec_clip(float v, float low, float high) { return low > v ? low : high < v ? high : v; }
VEC_INLINE vec1_t vec1_clip(vec1_t v, float low, float high, size_t vl) { (void)vl; VEC_EACH(vec_clip(v.at[i], low, high)); }
VEC_INLINE vec1_t vec1_within(vec1_t v, float low, float high, size_t vl) { return vec1_clip(v, low, high, vl); }
VEC_INLINE vec1_t vec1_unless_nan(vec1_t v, vec1_t x, size_t vl) { (void)vl, (void)x; return v; }
VEC_INLINE vec1_t vec1_abs(vec1_t v, size_t vl) { (void)vl; VEC_EACH(__builtin_fabsf(v.at[i])); }
VEC_INLINE vec1_t vec1_below(vec1_t x, vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(x.at[i] < 0 ? a.at[i] : b.at[i]); }
VEC_INLINE float vec_power(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits << 23) + (127u << 23);
    memcpy(&x, &bits, sizeof x);
    return x;
}
VEC_INLINE vec1_t vec1_power(vec1_t v, size_t vl) { (void)vl; VEC_EACH(vec_power(v.at[i])); }
VEC_INLINE vec1_t vec1_sqrt(vec1_t v, size_t vl) { (void)vl; VEC_EACH(__builtin_sqrtf(v.at[i])); }
VEC_INLINE vec1_t vec1_max(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] > b.at[i] ? a.at[i] : b.at[i]); }
VEC_INLINE vec1_t vec1_min(vec1_t a, vec1_t b, size_t vl) { (void)vl; VEC_EACH(a.at[i] < b.at[i] ? a.at[i] : b.at[i]); }
typedef unsigned vec1_bits_t;
VEC_INLINE vec1_bits_t vec1_bits(const uint8_t *bits, size_t lane) { return bits[lane / 8]; }
VEC_INLINE vec1_t vec1_select(const uint8_t *bits, size_t lane, vec1_t v, size_t vl)
{
    (void)vl;
    unsigned m = vec1_bits(bits, lane);
    VEC_EACH(m >> i & 1 ? v.at[i] : 0.0f);
}
VEC_INLINE vec1_t vec1_max_where(vec1_bits_t bits, vec1_t a, vec1_t b)
{
    VEC_EACH(bits >> i & 1 ? a.at[i] > b.at[i] ? a.at[i] : b.at[i] : 0.0f);
}
VEC_INLINE vec1_t vec1_load_or(const float *p, size_t n, float fill) { VEC_EACH((size_t)i < n ? p[i] : fill); }
VEC_INLINE vec1_t vec1_keep(vec1_t v, size_t n) { VEC_EACH((size_t)i < n ? v.at[i] : 0.0f); }
VEC_INLINE vec1_t vec1_follow(vec1_t before, vec1_t v) { VEC_EACH(i ? v.at[i - 1] : before.at[7]); }
VEC_INLINE vec1_t vec1_load_step(const float *p, size_t step, size_t vl) { (void)vl; VEC_EACH(p[(size_t)i * step]); }
VEC_INLINE vec1_t vec1_load_step_n(const float *p, size_t step, size_t n) { VEC_EACH((size_t)i < n ? p[(size_t)i * step] : 0.0f); }
VEC_INLINE void vec1_split2(const float *p, vec1_t *a, vec1_t *b, size_t vl)
{
    (void)vl;
    for (int i = 0; i < 8; i++) a->at[i] = p[2 * i], b->at[i] = p[2 * i + 1];
}
VEC_INLINE void vec1_split4(const float *p, vec1_t *a, vec1_t *b, vec1_t *c, vec1_t *d, size_t vl)
{
    (void)vl;
    for (int i = 0; i < 8; i++) a->at[i] = p[4 * i], b->at[i] = p[4 * i + 1], c->at[i] = p[4 * i + 2], d->at[i] = p[4 * i + 3];
}
VEC_INLINE void vec1_join2(float *p, vec1_t a, vec1_t b, size_t vl)
{
    (void)vl;
    for (int i = 0; i < 8; i++) p[2 * i] = a.at[i], p[2 * i + 1] = b.at[i];
}
VEC_INLINE void vec1_join4(float *p, vec1_t a, vec1_t b, vec1_t c, vec1_t d, size_t vl)
{
    (void)vl;
    for (int i = 0; i < 8; i++) p[4 * i] = a.at[i], p[4 * i + 1] = b.at[i], p[4 * i + 2] = c.at[i], p[4 * i + 3] = d.at[i];
}
VEC_INLINE vec1_t vec1_next(vec1_t v, float last, size_t vl) { (void)vl; VEC_EACH(i < 7 ? v.at[i + 1] : last); }
VEC_INLINE float vec1_sum(vec1_t v, size_t vl)
{
    (void)vl;
    return ((v.at[0] + v.at[4]) + (v.at[2] + v.at[6])) + ((v.at[1] + v.at[5]) + (v.at[3] + v.at[7]));
}
VEC_INLINE float vec1_top(vec1_t v, size_t vl)
{
    (void)vl;
    float top = v.at[0];
    for (int i = 1; i < 8; i++) top = v.at[i] > top ? v.at[i] : top;
    return top;
}
/* the rows of a tile in the lanes, N of them */
#define VEC_ROWS(N) \
    typedef struct { float at[N]; } rows##N##_t; \
    VEC_INLINE rows##N##_t rows##N##_load(const float *p) \
    { \
        rows##N##_t r; \
        memcpy(r.at, p, sizeof r.at); \
        return r; \
    } \
    VEC_INLINE void rows##N##_store(float *p, rows##N##_t v) { memcpy(p, v.at, sizeof v.at); } \
    VEC_INLINE rows##N##_t rows##N##_splat(float x) \
    { \
        rows##N##_t r; \
        for (int i = 0; i < N; i++) r.at[i] = x; \
        return r; \
    } \
    VEC_INLINE rows##N##_t rows##N##_fma(rows##N##_t acc, float s, rows##N##_t v) \
    { \
        for (int i = 0; i < N; i++) acc.at[i] += s * v.at[i]; \
        return acc; \
    } \
    VEC_INLINE rows##N##_t rows##N##_max(rows##N##_t a, rows##N##_t b) \
    { \
        for (int i = 0; i < N; i++) b.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i]; \
        return b; \
    } \
    VEC_INLINE rows##N##_t rows##N##_min(rows##N##_t a, rows##N##_t b) \
    { \
        for (int i = 0; i < N; i++) b.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; \
        return b; \
    }
VEC_ROWS(4)
VEC_ROWS(8)
VEC_INLINE void vec_prefetch(const void *p) { __builtin_prefetch(p); }
#endif
