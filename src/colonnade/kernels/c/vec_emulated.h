/* RVV 1.0 with Zvfh on any machine, for its answers and not for its speed: what vec_rvv.h gives to kernel bodies, one register
 * group as one vector of the compiler's. VLEN is CN_VLEN.
 *
 * Contract: see vec_avx512.h. The answers are those of a chip, to the bit. Lanes past vl are all ones once they were loaded,
 * so a body that reads them is found out. Nothing is waited for, so nothing is asked for.
 */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef CN_VLEN
#define CN_VLEN 256
#endif
#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 0 /* a strip is one group: bodies multiply this by register number 0 alone */
#define VEC_FROM_NAN_32 0x80400000u /* less the bits of a NaN */
#define VEC_FROM_NAN_16 0x8200u
#define VEC_ALL(i, n) for (size_t i = 0; i < (n); i++)

/* what vsetvli sets: of the forms without vl */
static _Thread_local __attribute__((unused)) size_t vec_length;

/* V: how they are called; W: bits of a lane, a T; L: registers of a group */
#define VEC_GROUP(V, W, T, L) \
    enum { V##L##_lanes = CN_VLEN * L / W }; \
    typedef T V##L##_t __attribute__((vector_size(CN_VLEN / 8 * L))); \
    typedef int##W##_t V##L##_int_t __attribute__((vector_size(CN_VLEN / 8 * L))); \
    typedef uint##W##_t V##L##_word_t __attribute__((vector_size(CN_VLEN / 8 * L))); \
    typedef V##L##_int_t V##L##_mask_t; /* all ones or none */ \
    /* a where the mask is set, else b */ \
    VEC_INLINE V##L##_t V##L##_merge(V##L##_mask_t mask, V##L##_t a, V##L##_t b) \
    { \
        return (V##L##_t)(((V##L##_int_t)a & mask) | ((V##L##_int_t)b & ~mask)); \
    } \
    VEC_INLINE size_t V##L##_setvl(size_t n) { return n < V##L##_lanes ? n : V##L##_lanes; } \
    VEC_INLINE void V##L##_type(size_t vl) { vec_length = V##L##_setvl(vl); } \
    VEC_INLINE V##L##_t V##L##_whole(T x) \
    { \
        V##L##_t v; \
        VEC_ALL(i, V##L##_lanes) v[i] = x; \
        return v; \
    } \
    /* arithmetic makes one NaN, which is positive: limits as integers count on that */ \
    VEC_INLINE V##L##_t V##L##_made(V##L##_t v) { return V##L##_merge(v != v, V##L##_whole((T)__builtin_nanf("")), v); } \
    VEC_INLINE V##L##_t V##L##_load_whole_now(const T *p) \
    { \
        V##L##_t v; \
        memcpy(&v, p, sizeof v); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_load_into(V##L##_t v, const T *p, size_t n) \
    { \
        if (n >= V##L##_lanes) return V##L##_load_whole_now(p); \
        memcpy(&v, p, n * sizeof(T)); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_ones(void) { return (V##L##_t)~(V##L##_int_t){0}; } \
    VEC_INLINE V##L##_t V##L##_load(const T *p, size_t vl) { return V##L##_load_into(V##L##_ones(), p, vl); } \
    VEC_INLINE V##L##_t V##L##_load_n(const T *p, size_t n) { return V##L##_load(p, n); } \
    VEC_INLINE V##L##_t V##L##_load_now(const T *p) { return V##L##_load(p, vec_length); } \
    VEC_INLINE V##L##_t V##L##_load_or(const T *p, size_t n, T fill) { return V##L##_load_into(V##L##_whole(fill), p, n); } \
    VEC_INLINE V##L##_t V##L##_load_step_into(V##L##_t v, const T *p, size_t step, size_t n) \
    { \
        if (step == 1) return V##L##_load_into(v, p, n); \
        VEC_ALL(i, n) v[i] = p[i * step]; \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_load_step(const T *p, size_t step, size_t vl) { return V##L##_load_step_into(V##L##_ones(), p, step, vl); } \
    VEC_INLINE V##L##_t V##L##_load_step_n(const T *p, size_t step, size_t n) { return V##L##_load_step_into((V##L##_t){0}, p, step, n); } \
    VEC_INLINE void V##L##_store(T *p, V##L##_t v, size_t vl) { memcpy(p, &v, vl >= V##L##_lanes ? sizeof v : vl * sizeof(T)); } \
    VEC_INLINE void V##L##_store_n(T *p, V##L##_t v, size_t n) { V##L##_store(p, v, n); } \
    VEC_INLINE void V##L##_store_now(T *p, V##L##_t v) { V##L##_store(p, v, vec_length); } \
    VEC_INLINE void V##L##_store_step(T *p, size_t step, V##L##_t v, size_t vl) { VEC_ALL(i, vl) p[i * step] = v[i]; } \
    VEC_INLINE V##L##_t V##L##_keep(V##L##_t v, size_t n) \
    { \
        VEC_ALL(i, V##L##_lanes) if (i >= n) v[i] = 0; \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_splat(T x, size_t vl) { return (void)vl, V##L##_whole(x); } \
    VEC_INLINE V##L##_t V##L##_splat_now(T x) { return V##L##_whole(x); } \
    VEC_INLINE V##L##_t V##L##_fmav(V##L##_t acc, V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_made(V##L##_fused(a, b, acc)); } \
    VEC_INLINE V##L##_t V##L##_fma_now(V##L##_t acc, T s, V##L##_t v) { return V##L##_made(V##L##_fused(V##L##_whole(s), v, acc)); } \
    VEC_INLINE V##L##_t V##L##_fma(V##L##_t acc, T s, V##L##_t v, size_t vl) { return (void)vl, V##L##_fma_now(acc, s, v); } \
    VEC_INLINE V##L##_t V##L##_fma_next(V##L##_t acc, T s, V##L##_t v, T *next) { return (void)next, V##L##_fma_now(acc, s, v); } \
    VEC_INLINE V##L##_t V##L##_add(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_made(a + b); } \
    VEC_INLINE V##L##_t V##L##_sub(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_made(a - b); } \
    VEC_INLINE V##L##_t V##L##_mul(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_made(a * b); } \
    VEC_INLINE V##L##_t V##L##_div(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_made(a / b); } \
    VEC_INLINE V##L##_t V##L##_scale(V##L##_t v, T s, size_t vl) { return (void)vl, V##L##_made(v * V##L##_whole(s)); } \
    VEC_INLINE V##L##_t V##L##_scale_now(V##L##_t v, T s) { return V##L##_made(v * V##L##_whole(s)); } \
    VEC_INLINE V##L##_t V##L##_plus(V##L##_t v, T s, size_t vl) { return (void)vl, V##L##_made(v + V##L##_whole(s)); } \
    VEC_INLINE V##L##_t V##L##_plus_now(V##L##_t v, T s) { return V##L##_made(v + V##L##_whole(s)); } \
    VEC_INLINE V##L##_t V##L##_sum_now(V##L##_t a, V##L##_t b) { return V##L##_made(a + b); } \
    VEC_INLINE V##L##_t V##L##_abs(V##L##_t v, size_t vl) { return (void)vl, (V##L##_t)((V##L##_word_t)v << 1 >> 1); } \
    VEC_INLINE V##L##_t V##L##_sqrt(V##L##_t v, size_t vl) \
    { \
        (void)vl; \
        VEC_ALL(i, V##L##_lanes) v[i] = (T)sqrtf((float)v[i]); \
        return V##L##_made(v); \
    } \
    /* as integers */ \
    VEC_INLINE V##L##_t V##L##_larger_now(V##L##_t a, V##L##_t b) { return V##L##_merge((V##L##_int_t)a > (V##L##_int_t)b, a, b); } \
    VEC_INLINE V##L##_t V##L##_larger(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_larger_now(a, b); } \
    VEC_INLINE V##L##_t V##L##_floor_now(V##L##_t v, int32_t x) { return V##L##_larger_now(v, (V##L##_t)((V##L##_int_t){0} + (int##W##_t)x)); } \
    VEC_INLINE V##L##_t V##L##_floor(V##L##_t v, int32_t x, size_t vl) { return (void)vl, V##L##_floor_now(v, x); } \
    VEC_INLINE V##L##_t V##L##_least_now(V##L##_t v, V##L##_t limits) { return V##L##_merge((V##L##_word_t)v < (V##L##_word_t)limits, v, limits); } \
    VEC_INLINE V##L##_t V##L##_least(V##L##_t v, V##L##_t limits, size_t vl) { return (void)vl, V##L##_least_now(v, limits); } \
    VEC_INLINE V##L##_t V##L##_bits_plus_now(V##L##_t v, int64_t x) { return (V##L##_t)((V##L##_word_t)v + (uint##W##_t)x); } \
    VEC_INLINE V##L##_t V##L##_bits_most_now(V##L##_t v, int64_t x) { return V##L##_least_now(v, (V##L##_t)((V##L##_word_t){0} + (uint##W##_t)x)); } \
    VEC_INLINE V##L##_t V##L##_ceiling(V##L##_t v, T high, size_t vl) \
    { \
        uint##W##_t most; \
        memcpy(&most, &high, sizeof most); \
        (void)vl; \
        v = V##L##_bits_most_now(V##L##_bits_plus_now(v, VEC_FROM_NAN_##W), (uint##W##_t)(most + VEC_FROM_NAN_##W)); \
        return V##L##_bits_plus_now(v, -(int64_t)VEC_FROM_NAN_##W); \
    } \
    VEC_INLINE V##L##_t V##L##_at_least(V##L##_t v, T low, size_t vl) { return (void)vl, V##L##_merge(v < low, V##L##_whole(low), v); } \
    VEC_INLINE V##L##_t V##L##_at_most(V##L##_t v, T high, size_t vl) { return (void)vl, V##L##_merge(v > high, V##L##_whole(high), v); } \
    VEC_INLINE V##L##_t V##L##_clip(V##L##_t v, T low, T high, size_t vl) \
    { \
        if (low == 0) v = V##L##_floor(v, 0, vl); \
        else if ((float)low > -__builtin_inff()) v = V##L##_at_least(v, low, vl); \
        if (high < 0) return V##L##_at_most(v, high, vl); \
        return (float)high < __builtin_inff() ? V##L##_ceiling(v, high, vl) : v; \
    } \
    /* of a number and NaN the number */ \
    VEC_INLINE V##L##_t V##L##_within(V##L##_t v, T low, T high, size_t vl) \
    { \
        (void)vl; \
        if ((float)low > -__builtin_inff()) v = V##L##_merge(v > low, v, V##L##_whole(low)); \
        return (float)high < __builtin_inff() ? V##L##_merge(v < high, v, V##L##_whole(high)) : v; \
    } \
    VEC_INLINE V##L##_t V##L##_unless_nan(V##L##_t v, V##L##_t x, size_t vl) { return (void)vl, V##L##_merge(x != x, x, v); } \
    VEC_INLINE V##L##_t V##L##_below(V##L##_t x, V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_merge(x < 0, a, b); } \
    VEC_INLINE V##L##_t V##L##_max(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_merge(a > b, a, b); } \
    VEC_INLINE V##L##_t V##L##_min(V##L##_t a, V##L##_t b, size_t vl) { return (void)vl, V##L##_merge(a < b, a, b); } \
    VEC_INLINE V##L##_mask_t V##L##_holes(const uint8_t *bits, size_t lane, size_t vl) \
    { \
        V##L##_mask_t holes = {0}; \
        VEC_ALL(i, vl) holes[i] = (bits[(lane + i) / 8] >> (lane + i) % 8 & 1) - 1; \
        return holes; \
    } \
    VEC_INLINE V##L##_mask_t V##L##_mask_now(uint32_t bits) \
    { \
        V##L##_mask_t mask = {0}; \
        VEC_ALL(i, V##L##_lanes < 32 ? V##L##_lanes : 32) mask[i] = -(int##W##_t)(bits >> i & 1); \
        return mask; \
    } \
    VEC_INLINE V##L##_t V##L##_limits_now(V##L##_mask_t holes) { return (V##L##_t)~holes; } \
    VEC_INLINE V##L##_t V##L##_limits(V##L##_mask_t holes, size_t vl) { return (void)vl, (V##L##_t)~holes; } \
    VEC_INLINE V##L##_t V##L##_clear_now(V##L##_t v, V##L##_mask_t holes) { return (V##L##_t)((V##L##_int_t)v & ~holes); } \
    VEC_INLINE V##L##_t V##L##_clear(V##L##_t v, V##L##_mask_t holes, size_t vl) { return (void)vl, V##L##_clear_now(v, holes); } \
    VEC_INLINE V##L##_t V##L##_select(const uint8_t *bits, size_t lane, V##L##_t v, size_t vl) { return V##L##_clear_now(v, V##L##_holes(bits, lane, vl)); } \
    VEC_INLINE V##L##_t V##L##_push(V##L##_t v, T first, size_t vl) \
    { \
        V##L##_t pushed; \
        (void)vl; \
        VEC_ALL(i, V##L##_lanes) pushed[i] = i ? v[i - 1] : first; \
        return pushed; \
    } \
    VEC_INLINE V##L##_t V##L##_push_now(V##L##_t v, int64_t x) \
    { \
        const uint##W##_t bits = (uint##W##_t)x; \
        T first; \
        memcpy(&first, &bits, sizeof first); \
        return V##L##_push(v, first, 0); \
    } \
    VEC_INLINE V##L##_t V##L##_after(V##L##_t v, size_t vl) \
    { \
        (void)vl; \
        VEC_ALL(i, V##L##_lanes) v[i] = i + 1 < V##L##_lanes ? v[i + 1] : 0; \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_next(V##L##_t v, T last, size_t vl) \
    { \
        v = V##L##_after(v, vl); \
        v[vl - 1] = last; \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_next_now(V##L##_t v, T last) { return V##L##_next(v, last, vec_length); } \
    VEC_INLINE T V##L##_sum(V##L##_t v, size_t vl) \
    { \
        T sum = 0; \
        VEC_ALL(i, vl) sum += v[i]; \
        return sum; \
    } \
    VEC_INLINE T V##L##_top(V##L##_t v, size_t vl) \
    { \
        float top = -__builtin_inff(); \
        VEC_ALL(i, vl) top = fmaxf(top, (float)v[i]); \
        return (T)top; \
    }
/* every second lane, from the first or second on, as a group of half as many registers */
#define VEC_HALF(V, W, T, L, H) \
    VEC_INLINE V##H##_t V##L##_every_second(V##L##_t v, size_t first) \
    { \
        V##H##_t some; \
        VEC_ALL(i, V##H##_lanes) some[i] = v[2 * i + first]; \
        return some; \
    } \
    VEC_INLINE V##H##_t V##L##_even_now(V##L##_t v) { return V##L##_every_second(v, 0); } \
    VEC_INLINE V##H##_t V##L##_odd_now(V##L##_t v, uint64_t by) { return (void)by, V##L##_every_second(v, 1); } \
    VEC_INLINE V##H##_t V##H##_load_second(const T *p, size_t vl) { return V##L##_every_second(V##L##_load(p, 2 * vl - 1), 0); } \
    VEC_INLINE void V##L##_apart(V##L##_t v, V##H##_t *even, V##H##_t *odd, size_t vl) \
    { \
        (void)vl; \
        *even = V##L##_every_second(v, 0), *odd = V##L##_every_second(v, 1); \
    }
#define VEC_SINGLE(L) \
    /* an estimate of 1 / b as vfrec7's table has it, by the middle of what has the first 7 bits of b behind its point; then as \
     * in vec_rvv.h; b from 1 to 2^126 */ \
    VEC_INLINE vec##L##_t vec##L##_inverse(vec##L##_t b, size_t vl) \
    { \
        const vec##L##_word_t bits = (vec##L##_word_t)b, exponent = 253 - (bits >> 23); \
        const vec##L##_t middle = (vec##L##_t)((bits & 0x7f0000) | 0x3f808000); \
        const vec##L##_word_t parts = __builtin_convertvector((2.0f / middle - 1.0f) * 128.0f + 0.5f, vec##L##_word_t) << 16; \
        const vec##L##_mask_t tiny = (vec##L##_int_t)exponent == 0; \
        const vec##L##_t r = vec##L##_merge(tiny, (vec##L##_t)((parts | 0x800000) >> 1), (vec##L##_t)(exponent << 23 | parts)); \
        (void)vl; \
        return r * (2.0f - b * r); \
    } \
    VEC_INLINE vec##L##_t vec##L##_over(vec##L##_t a, vec##L##_t b, size_t vl) \
    { \
        const vec##L##_t r = vec##L##_inverse(b, vl), q = a * r; \
        return vec##L##_fused(r, vec##L##_fused(-b, q, a), q); \
    } \
    VEC_INLINE vec##L##_t vec##L##_gather_now(const float *p, vec##L##_t at) \
    { \
        const vec##L##_word_t bytes = (vec##L##_word_t)at; \
        vec##L##_t v = vec##L##_ones(); \
        VEC_ALL(i, vec_length) v[i] = *(const float *)((const char *)p + bytes[i]); \
        return v; \
    } \
    VEC_INLINE void vec##L##_scatter_now(float *p, vec##L##_t v, vec##L##_t at) \
    { \
        const vec##L##_word_t bytes = (vec##L##_word_t)at; \
        VEC_ALL(i, vec_length) *(float *)((char *)p + bytes[i]) = v[i]; \
    } \
    VEC_INLINE vec##L##_t vec##L##_power(vec##L##_t v, size_t vl) { return (void)vl, (vec##L##_t)(((vec##L##_word_t)v << 23) + (127u << 23)); }
/* a b + acc, rounded once */
#if __has_builtin(__builtin_elementwise_fma)
#define VEC_FUSE(a, b, acc, lanes) acc = __builtin_elementwise_fma(a, b, acc)
#else
#define VEC_FUSE(a, b, acc, lanes) VEC_ALL(i, lanes) acc[i] = __builtin_fmaf(a[i], b[i], acc[i])
#endif
#define VEC_SINGLE_FUSED(L) \
    typedef float vec_fused##L##_t __attribute__((vector_size(CN_VLEN / 8 * L))); \
    VEC_INLINE vec_fused##L##_t vec##L##_fused(vec_fused##L##_t a, vec_fused##L##_t b, vec_fused##L##_t acc) \
    { \
        VEC_FUSE(a, b, acc, CN_VLEN * L / 32); \
        return acc; \
    }
/* By float32, where products are exact. The sum is what float32 rounds it to, or of the two numbers around it the odd one if it
 * is neither (Boldo and Melquiond, "Emulation of a FMA and Correctly Rounded Sums", 2008): so float16 rounds what it should.
 * What is lost in the sum is found by Knuth's TwoSum. */
#define VEC_HALF_FUSED(L) \
    typedef _Float16 half_fused##L##_t __attribute__((vector_size(CN_VLEN / 8 * L))); \
    typedef float half_wide##L##_t __attribute__((vector_size(CN_VLEN / 4 * L))); \
    typedef int32_t half_bits##L##_t __attribute__((vector_size(CN_VLEN / 4 * L))); \
    VEC_INLINE half_fused##L##_t half##L##_fused(half_fused##L##_t a, half_fused##L##_t b, half_fused##L##_t acc) \
    { \
        const half_wide##L##_t x = __builtin_convertvector(acc, half_wide##L##_t); \
        const half_wide##L##_t y = __builtin_convertvector(a, half_wide##L##_t) * __builtin_convertvector(b, half_wide##L##_t); \
        const half_wide##L##_t sum = x + y, of_y = sum - x, lost = (x - (sum - of_y)) + (y - of_y); \
        const half_bits##L##_t bits = (half_bits##L##_t)sum, towards = ((bits ^ (half_bits##L##_t)lost) >> 31) | 1; \
        const half_bits##L##_t moved = ((lost < 0) | (lost > 0)) & ((bits & 1) - 1); /* nothing where they are no numbers */ \
        return __builtin_convertvector((half_wide##L##_t)(bits + (towards & moved)), half_fused##L##_t); \
    }
#define VEC_HALF_WIDTH(L) \
    VEC_INLINE half##L##_t half##L##_power(half##L##_t v, size_t vl) { return (void)vl, (half##L##_t)(((half##L##_word_t)v << 10) + (15u << 10)); } \
    /* likewise, of b from 1 to 2^13 */ \
    VEC_INLINE half##L##_t half##L##_inverse(half##L##_t b, size_t vl) \
    { \
        const half##L##_word_t bits = (half##L##_word_t)b, exponent = 29 - (bits >> 10); \
        const half_wide##L##_t middle = __builtin_convertvector((half##L##_t)((bits & 0x3f8) | 0x3c04), half_wide##L##_t); \
        const half##L##_word_t parts = __builtin_convertvector((2.0f / middle - 1.0f) * 128.0f + 0.5f, half##L##_word_t) << 3; \
        const half##L##_t r = (half##L##_t)(exponent << 10 | parts), product = b * r, left = 2 - product; /* each of them rounded */ \
        (void)vl; \
        return r * left; \
    }
#define VEC_CONVERT(L, H) \
    VEC_INLINE vec##L##_t half##H##_widened(half##H##_t v, size_t vl) { return (void)vl, vec##L##_made(__builtin_convertvector(v, vec##L##_t)); } \
    VEC_INLINE half##H##_t vec##L##_narrowed(vec##L##_t v, size_t vl) { return (void)vl, half##H##_made(__builtin_convertvector(v, half##H##_t)); } \
    VEC_INLINE vec##L##_t vec##L##_plus_half(vec##L##_t v, half##H##_t x, size_t vl) { return vec##L##_made(v + half##H##_widened(x, vl)); }
#define VEC_SPLIT(L) \
    VEC_INLINE void vec##L##_split2(const float *p, vec##L##_t *a, vec##L##_t *b, size_t vl) \
    { \
        *a = vec##L##_load_step(p, 2, vl), *b = vec##L##_load_step(p + 1, 2, vl); \
    } \
    VEC_INLINE void vec##L##_split4(const float *p, vec##L##_t *a, vec##L##_t *b, vec##L##_t *c, vec##L##_t *d, size_t vl) \
    { \
        *a = vec##L##_load_step(p, 4, vl), *b = vec##L##_load_step(p + 1, 4, vl); \
        *c = vec##L##_load_step(p + 2, 4, vl), *d = vec##L##_load_step(p + 3, 4, vl); \
    }
#define VEC_JOIN(V, T, L) \
    VEC_INLINE void V##L##_join2(T *p, V##L##_t a, V##L##_t b, size_t vl) { V##L##_store_step(p, 2, a, vl), V##L##_store_step(p + 1, 2, b, vl); } \
    VEC_INLINE void V##L##_join4(T *p, V##L##_t a, V##L##_t b, V##L##_t c, V##L##_t d, size_t vl) \
    { \
        V##L##_store_step(p, 4, a, vl), V##L##_store_step(p + 1, 4, b, vl); \
        V##L##_store_step(p + 2, 4, c, vl), V##L##_store_step(p + 3, 4, d, vl); \
    }
#define VEC_EACH(what) what(1) what(2) what(4) what(8)
#define VEC_HALVES(what, ...) what(__VA_ARGS__, 2, 1) what(__VA_ARGS__, 4, 2) what(__VA_ARGS__, 8, 4)
#define VEC_GROUPS(...) VEC_GROUP(__VA_ARGS__, 1) VEC_GROUP(__VA_ARGS__, 2) VEC_GROUP(__VA_ARGS__, 4) VEC_GROUP(__VA_ARGS__, 8)

VEC_EACH(VEC_SINGLE_FUSED)
VEC_EACH(VEC_HALF_FUSED)
VEC_GROUPS(vec, 32, float)
VEC_GROUPS(half, 16, _Float16)
VEC_EACH(VEC_SINGLE)
VEC_EACH(VEC_HALF_WIDTH)
VEC_HALVES(VEC_HALF, vec, 32, float)
VEC_HALVES(VEC_HALF, half, 16, _Float16)
VEC_CONVERT(2, 1)
VEC_CONVERT(4, 2)
VEC_CONVERT(8, 4)
VEC_SPLIT(1)
VEC_SPLIT(2)
VEC_JOIN(vec, float, 1)
VEC_JOIN(vec, float, 2)
VEC_JOIN(half, _Float16, 2)

VEC_INLINE _Float16 half_float_now(const _Float16 *p) { return *p; }
VEC_INLINE int64_t half_bits_now(const _Float16 *p)
{
    int16_t bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}
VEC_INLINE float vec_float_now(const float *p) { return *p; }
VEC_INLINE uint64_t vec_word_now(const uint32_t *p) { return *p; }
VEC_INLINE uint64_t vec_shifted_now(uint64_t x, uint64_t by) { return x << (by & 63); }
VEC_INLINE uint64_t vec_long_now(const uint64_t *p) { return *p; }
VEC_INLINE int64_t vec_negative_now(int64_t x) { return x < 0 ? -1 : 0; }
#define vec_member_now(p, at) ({ uint64_t member; memcpy(&member, (const char *)(p) + (at), sizeof member); member; })
VEC_INLINE void vec_touch(const void *p) { (void)p; }
VEC_INLINE void vec_prefetch(const void *p) { (void)p; }
#endif
