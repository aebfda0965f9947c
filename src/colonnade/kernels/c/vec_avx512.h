/* AVX-512: one vector is 16 f32 lanes in a zmm register.
 *
 * Contract of every vec_<isa>.h. L is the register group (1 here; LMUL on RVV). A strip starts at a lane that is a
 * multiple of 8. `vl` is what vecL_setvl returned; fixed-length ISAs move whole vectors whatever it says (planes are
 * whole cache lines), the _n forms touch exactly n <= lanes elements (arrays of the user, rows, weights of a tile).
 */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 16

typedef __m512 vec1_t;

/* lanes one vector handles when n are left: always all of them on a fixed-length ISA */
VEC_INLINE size_t vec1_setvl(size_t n) { (void)n; return 16; }
VEC_INLINE vec1_t vec1_load(const float *p, size_t vl) { (void)vl; return _mm512_loadu_ps(p); }
VEC_INLINE void vec1_store(float *p, vec1_t v, size_t vl) { (void)vl; _mm512_storeu_ps(p, v); }
VEC_INLINE __mmask16 vec_first(size_t n) { return (__mmask16)((1u << n) - 1); }
VEC_INLINE vec1_t vec1_load_n(const float *p, size_t n) { return _mm512_maskz_loadu_ps(vec_first(n), p); }
VEC_INLINE void vec1_store_n(float *p, vec1_t v, size_t n) { _mm512_mask_storeu_ps(p, vec_first(n), v); }
VEC_INLINE vec1_t vec1_splat(float x, size_t vl) { (void)vl; return _mm512_set1_ps(x); }
/* acc + s * v */
VEC_INLINE vec1_t vec1_fma(vec1_t acc, float s, vec1_t v, size_t vl) { (void)vl; return _mm512_fmadd_ps(_mm512_set1_ps(s), v, acc); }
/* v + *s, acc + *s * v: the scalar is an operand in memory, whatever the compiler thinks of it. On some cores a broadcast by
 * itself takes a turn of the pipes that add. */
VEC_INLINE vec1_t vec1_add_at(vec1_t v, const float *s)
{
    vec1_t sum;
    __asm__("vaddps %2%{1to16%}, %1, %0" : "=v"(sum) : "v"(v), "m"(*s));
    return sum;
}
VEC_INLINE vec1_t vec1_fma_at(vec1_t acc, const float *s, vec1_t v)
{
    __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(v), "m"(*s));
    return acc;
}
/* the lanes outside of -most .. most, those that are no numbers too */
VEC_INLINE __mmask16 vec1_beyond(vec1_t v, vec1_t most) { return _mm512_cmp_ps_mask(_mm512_abs_ps(v), most, _CMP_NLE_UQ); }
VEC_INLINE vec1_t vec1_fmav(vec1_t acc, vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_fmadd_ps(a, b, acc); }
VEC_INLINE vec1_t vec1_add(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_add_ps(a, b); }
VEC_INLINE vec1_t vec1_sub(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_sub_ps(a, b); }
VEC_INLINE vec1_t vec1_mul(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_mul_ps(a, b); }
VEC_INLINE vec1_t vec1_div(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_div_ps(a, b); }
/* a / b within two roundings, for b from 1 to 2^126 */
VEC_INLINE vec1_t vec1_over(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_div_ps(a, b); }
VEC_INLINE vec1_t vec1_plus(vec1_t v, float s, size_t vl) { (void)vl; return _mm512_add_ps(v, _mm512_set1_ps(s)); }
VEC_INLINE vec1_t vec1_scale(vec1_t v, float s, size_t vl) { (void)vl; return _mm512_mul_ps(v, _mm512_set1_ps(s)); }
/* p x + s, a link of a polynomial's chain */
VEC_INLINE vec1_t vec1_link(vec1_t p, vec1_t x, float s, size_t vl) { (void)vl; return _mm512_fmadd_ps(p, x, _mm512_set1_ps(s)); }
/* v, but low or high where it is beyond; a NaN that arithmetic made stays one */
VEC_INLINE vec1_t vec1_clip(vec1_t v, float low, float high, size_t vl) { (void)vl; return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), v)); }
/* likewise, where a NaN may become a limit */
VEC_INLINE vec1_t vec1_within(vec1_t v, float low, float high, size_t vl) { return vec1_clip(v, low, high, vl); }
/* v, but NaN where x is and v came from x by `within` */
VEC_INLINE vec1_t vec1_unless_nan(vec1_t v, vec1_t x, size_t vl) { (void)vl, (void)x; return v; }
VEC_INLINE vec1_t vec1_abs(vec1_t v, size_t vl) { (void)vl; return _mm512_abs_ps(v); }
/* a where x < 0, else b; for x = -0 and NaN either */
VEC_INLINE vec1_t vec1_below(vec1_t x, vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a); }
/* 2^n of whole numbers n from -127 (where it is 0) to 127, given n + 1.5 * 2^23 */
VEC_INLINE vec1_t vec1_power(vec1_t v, size_t vl) { (void)vl; return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(v), 23), _mm512_set1_epi32(127 << 23))); }
VEC_INLINE vec1_t vec1_sqrt(vec1_t v, size_t vl) { (void)vl; return _mm512_sqrt_ps(v); }
/* a NaN in the second operand stays a NaN */
VEC_INLINE vec1_t vec1_max(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_max_ps(a, b); }
VEC_INLINE vec1_t vec1_min(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm512_min_ps(a, b); }
/* which of the lanes from `lane` on have their bit set in `bits` */
typedef __mmask16 vec1_bits_t;
VEC_INLINE vec1_bits_t vec1_bits(const uint8_t *bits, size_t lane)
{
    uint16_t m;
    memcpy(&m, bits + lane / 8, 2);
    return (__mmask16)m;
}
/* v where bit `lane + i` of `bits` is set, else 0 (a select, never a product: 0 * NaN is NaN) */
VEC_INLINE vec1_t vec1_select(const uint8_t *bits, size_t lane, vec1_t v, size_t vl)
{
    (void)vl;
    return _mm512_maskz_mov_ps(vec1_bits(bits, lane), v);
}
/* max(a, b) where the bit is set, else 0 */
VEC_INLINE vec1_t vec1_max_where(vec1_bits_t bits, vec1_t a, vec1_t b) { return _mm512_maskz_max_ps(bits, a, b); }
/* the first n lanes of p (never more is read), `fill` in all the others */
VEC_INLINE vec1_t vec1_load_or(const float *p, size_t n, float fill)
{
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), vec_first(n), p);
}
/* the first n lanes of v, 0 in all the others */
VEC_INLINE vec1_t vec1_keep(vec1_t v, size_t n) { return _mm512_maskz_mov_ps(vec_first(n), v); }
/* the last lane of `before`, then v without its last one */
VEC_INLINE vec1_t vec1_follow(vec1_t before, vec1_t v)
{
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(v), _mm512_castps_si512(before), 15));
}
/* p[0], p[step], p[2 * step], ...: nothing beyond the n-th (1 <= n <= lanes) is read, lanes from n on are 0 */
VEC_INLINE vec1_t vec1_load_step_n(const float *p, size_t step, size_t n)
{
    if (step == 1) return vec1_load_n(p, n);
    if (step == 2) { /* two vectors that share lane 15, so that element 2 * lanes is not touched */
        const size_t last = 2 * n - 1;
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
        __m512 low = _mm512_maskz_loadu_ps(vec_first(last < 16 ? last : 16), p);
        if (last <= 16) return _mm512_maskz_permutexvar_ps(0xff, even, low);
        return _mm512_permutex2var_ps(low, even, _mm512_maskz_loadu_ps(vec_first(last - 15), p + 15));
    }
    const __m512i at = _mm512_mullo_epi32(
        _mm512_set1_epi32((int)step), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), vec_first(n), at, p, 4);
}
VEC_INLINE vec1_t vec1_load_step(const float *p, size_t step, size_t vl)
{
    if (step == 1) return vec1_load(p, vl);
    if (step == 2) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
        return _mm512_permutex2var_ps(_mm512_loadu_ps(p), even, _mm512_loadu_ps(p + 15));
    }
    return vec1_load_step_n(p, step, 16);
}
/* p[0], p[2], ... and p[1], p[3], ...; p[0], p[4], ... to p[3], p[7], ...: of 2 and 4 whole vectors (RVV: vl lanes each) */
VEC_INLINE void vec1_split2(const float *p, vec1_t *a, vec1_t *b, size_t vl)
{
    (void)vl;
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const __m512 low = _mm512_loadu_ps(p), high = _mm512_loadu_ps(p + 16);
    *a = _mm512_permutex2var_ps(low, even, high), *b = _mm512_permutex2var_ps(low, odd, high);
}
VEC_INLINE void vec1_split4(const float *p, vec1_t *a, vec1_t *b, vec1_t *c, vec1_t *d, size_t vl)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    __m512 ac_low, ac_high, bd_low, bd_high;
    vec1_split2(p, &ac_low, &bd_low, vl), vec1_split2(p + 32, &ac_high, &bd_high, vl);
    *a = _mm512_permutex2var_ps(ac_low, even, ac_high), *c = _mm512_permutex2var_ps(ac_low, odd, ac_high);
    *b = _mm512_permutex2var_ps(bd_low, even, bd_high), *d = _mm512_permutex2var_ps(bd_low, odd, bd_high);
}
/* and back */
VEC_INLINE void vec1_join2(float *p, vec1_t a, vec1_t b, size_t vl)
{
    (void)vl;
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(a, low, b)), _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(a, high, b));
}
VEC_INLINE void vec1_join4(float *p, vec1_t a, vec1_t b, vec1_t c, vec1_t d, size_t vl)
{
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    vec1_join2(p, _mm512_permutex2var_ps(a, low, c), _mm512_permutex2var_ps(b, low, d), vl);
    vec1_join2(p + 32, _mm512_permutex2var_ps(a, high, c), _mm512_permutex2var_ps(b, high, d), vl);
}
/* every lane's right neighbour, `last` in lane vl - 1 */
VEC_INLINE vec1_t vec1_next(vec1_t v, float last, size_t vl)
{
    (void)vl;
    return _mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(_mm512_set1_ps(last)), _mm512_castps_si512(v), 1));
}
VEC_INLINE float vec1_sum(vec1_t v, size_t vl) { (void)vl; return _mm512_reduce_add_ps(v); }
VEC_INLINE float vec1_top(vec1_t v, size_t vl) { (void)vl; return _mm512_reduce_max_ps(v); }
/* The rows of a tile in the lanes, n of them: rowsN_fma is acc + s * v, as above. */
#define VEC_ROWS(N, TYPE, PREFIX) \
    typedef TYPE rows##N##_t; \
    VEC_INLINE rows##N##_t rows##N##_load(const float *p) { return PREFIX##_loadu_ps(p); } \
    VEC_INLINE void rows##N##_store(float *p, rows##N##_t v) { PREFIX##_storeu_ps(p, v); } \
    VEC_INLINE rows##N##_t rows##N##_splat(float x) { return PREFIX##_set1_ps(x); } \
    VEC_INLINE rows##N##_t rows##N##_fma(rows##N##_t acc, float s, rows##N##_t v) { return PREFIX##_fmadd_ps(PREFIX##_set1_ps(s), v, acc); } \
    VEC_INLINE rows##N##_t rows##N##_mul(rows##N##_t a, rows##N##_t b) { return PREFIX##_mul_ps(a, b); } \
    VEC_INLINE rows##N##_t rows##N##_max(rows##N##_t a, rows##N##_t b) { return PREFIX##_max_ps(a, b); } \
    VEC_INLINE rows##N##_t rows##N##_min(rows##N##_t a, rows##N##_t b) { return PREFIX##_min_ps(a, b); }
VEC_ROWS(4, __m128, _mm)
VEC_ROWS(8, __m256, _mm256)
VEC_ROWS(16, __m512, _mm512)
VEC_INLINE void vec_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
#endif
