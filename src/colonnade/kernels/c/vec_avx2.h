/* AVX2 and FMA: one vector is 8 f32 lanes in a ymm register. Contract: see vec_avx512.h. */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 8

typedef __m256 vec1_t;

/* all bits in the first n lanes, none in the others: a window on eight ones and eight zeros */
static const int32_t vec_ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
VEC_INLINE __m256i vec_first(size_t n) { return _mm256_loadu_si256((const __m256i *)(vec_ones + 8 - n)); }

VEC_INLINE size_t vec1_setvl(size_t n) { (void)n; return 8; }
VEC_INLINE vec1_t vec1_load(const float *p, size_t vl) { (void)vl; return _mm256_loadu_ps(p); }
VEC_INLINE void vec1_store(float *p, vec1_t v, size_t vl) { (void)vl; _mm256_storeu_ps(p, v); }
VEC_INLINE vec1_t vec1_load_n(const float *p, size_t n) { return _mm256_maskload_ps(p, vec_first(n)); }
VEC_INLINE void vec1_store_n(float *p, vec1_t v, size_t n) { _mm256_maskstore_ps(p, vec_first(n), v); }
VEC_INLINE vec1_t vec1_splat(float x, size_t vl) { (void)vl; return _mm256_set1_ps(x); }
VEC_INLINE vec1_t vec1_fma(vec1_t acc, float s, vec1_t v, size_t vl) { (void)vl; return _mm256_fmadd_ps(_mm256_set1_ps(s), v, acc); }
VEC_INLINE vec1_t vec1_fmav(vec1_t acc, vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_fmadd_ps(a, b, acc); }
VEC_INLINE vec1_t vec1_add(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_add_ps(a, b); }
VEC_INLINE vec1_t vec1_sub(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_sub_ps(a, b); }
VEC_INLINE vec1_t vec1_mul(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_mul_ps(a, b); }
VEC_INLINE vec1_t vec1_div(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_div_ps(a, b); }
VEC_INLINE vec1_t vec1_over(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_div_ps(a, b); }
VEC_INLINE vec1_t vec1_plus(vec1_t v, float s, size_t vl) { (void)vl; return _mm256_add_ps(v, _mm256_set1_ps(s)); }
VEC_INLINE vec1_t vec1_scale(vec1_t v, float s, size_t vl) { (void)vl; return _mm256_mul_ps(v, _mm256_set1_ps(s)); }
VEC_INLINE vec1_t vec1_link(vec1_t p, vec1_t x, float s, size_t vl) { (void)vl; return _mm256_fmadd_ps(p, x, _mm256_set1_ps(s)); }
VEC_INLINE vec1_t vec1_clip(vec1_t v, float low, float high, size_t vl) { (void)vl; return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), v)); }
VEC_INLINE vec1_t vec1_within(vec1_t v, float low, float high, size_t vl) { return vec1_clip(v, low, high, vl); }
VEC_INLINE vec1_t vec1_unless_nan(vec1_t v, vec1_t x, size_t vl) { (void)vl, (void)x; return v; }
VEC_INLINE vec1_t vec1_abs(vec1_t v, size_t vl) { (void)vl; return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
VEC_INLINE vec1_t vec1_below(vec1_t x, vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_blendv_ps(b, a, x); }
VEC_INLINE vec1_t vec1_power(vec1_t v, size_t vl) { (void)vl; return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(v), 23), _mm256_set1_epi32(127 << 23))); }
VEC_INLINE vec1_t vec1_sqrt(vec1_t v, size_t vl) { (void)vl; return _mm256_sqrt_ps(v); }
VEC_INLINE vec1_t vec1_max(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_max_ps(a, b); }
VEC_INLINE vec1_t vec1_min(vec1_t a, vec1_t b, size_t vl) { (void)vl; return _mm256_min_ps(a, b); }
typedef __m256 vec1_bits_t;
VEC_INLINE vec1_bits_t vec1_bits(const uint8_t *bits, size_t lane)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[lane / 8]), bit), bit));
}
VEC_INLINE vec1_t vec1_select(const uint8_t *bits, size_t lane, vec1_t v, size_t vl)
{
    (void)vl;
    return _mm256_and_ps(v, vec1_bits(bits, lane));
}
VEC_INLINE vec1_t vec1_max_where(vec1_bits_t bits, vec1_t a, vec1_t b) { return _mm256_and_ps(_mm256_max_ps(a, b), bits); }
VEC_INLINE vec1_t vec1_load_or(const float *p, size_t n, float fill)
{
    const __m256i first = vec_first(n);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, first), _mm256_castsi256_ps(first));
}
VEC_INLINE vec1_t vec1_keep(vec1_t v, size_t n) { return _mm256_and_ps(v, _mm256_castsi256_ps(vec_first(n))); }
VEC_INLINE vec1_t vec1_follow(vec1_t before, vec1_t v)
{
    const __m256i middle = _mm256_castps_si256(_mm256_permute2f128_ps(before, v, 0x21));
    return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(v), middle, 12));
}
/* two vectors that share element 7, so that element 2 * lanes is not touched */
VEC_INLINE vec1_t vec_even(__m256 low, __m256 high)
{
    const __m256d pairs = _mm256_castps_pd(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 2, 0)));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(pairs, _MM_SHUFFLE(3, 1, 2, 0)));
}
VEC_INLINE vec1_t vec1_load_step_n(const float *p, size_t step, size_t n)
{
    if (step == 1) return vec1_load_n(p, n);
    if (step == 2) {
        const size_t last = 2 * n - 1;
        if (last <= 8) return vec_even(_mm256_maskload_ps(p, vec_first(last)), _mm256_setzero_ps());
        return vec_even(_mm256_loadu_ps(p), _mm256_maskload_ps(p + 7, vec_first(last - 7)));
    }
    const __m256i at = _mm256_mullo_epi32(_mm256_set1_epi32((int)step), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), p, at, _mm256_castsi256_ps(vec_first(n)), 4);
}
VEC_INLINE vec1_t vec1_load_step(const float *p, size_t step, size_t vl)
{
    if (step == 1) return vec1_load(p, vl);
    if (step == 2) return vec_even(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 7));
    return vec1_load_step_n(p, step, 8);
}
VEC_INLINE void vec_apart(__m256 low, __m256 high, vec1_t *even, vec1_t *odd)
{
    const __m256d e = _mm256_castps_pd(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
    const __m256d o = _mm256_castps_pd(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)));
    *even = _mm256_castpd_ps(_mm256_permute4x64_pd(e, _MM_SHUFFLE(3, 1, 2, 0)));
    *odd = _mm256_castpd_ps(_mm256_permute4x64_pd(o, _MM_SHUFFLE(3, 1, 2, 0)));
}
VEC_INLINE void vec1_split2(const float *p, vec1_t *a, vec1_t *b, size_t vl)
{
    (void)vl;
    vec_apart(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8), a, b);
}
VEC_INLINE void vec1_split4(const float *p, vec1_t *a, vec1_t *b, vec1_t *c, vec1_t *d, size_t vl)
{
    __m256 ac_low, ac_high, bd_low, bd_high;
    vec1_split2(p, &ac_low, &bd_low, vl), vec1_split2(p + 16, &ac_high, &bd_high, vl);
    vec_apart(ac_low, ac_high, a, c), vec_apart(bd_low, bd_high, b, d);
}
VEC_INLINE void vec_beside(__m256 even, __m256 odd, __m256 *low, __m256 *high)
{
    const __m256 l = _mm256_unpacklo_ps(even, odd), h = _mm256_unpackhi_ps(even, odd);
    *low = _mm256_permute2f128_ps(l, h, 0x20), *high = _mm256_permute2f128_ps(l, h, 0x31);
}
VEC_INLINE void vec1_join2(float *p, vec1_t a, vec1_t b, size_t vl)
{
    (void)vl;
    __m256 low, high;
    vec_beside(a, b, &low, &high);
    _mm256_storeu_ps(p, low), _mm256_storeu_ps(p + 8, high);
}
VEC_INLINE void vec1_join4(float *p, vec1_t a, vec1_t b, vec1_t c, vec1_t d, size_t vl)
{
    __m256 ac_low, ac_high, bd_low, bd_high;
    vec_beside(a, c, &ac_low, &ac_high), vec_beside(b, d, &bd_low, &bd_high);
    vec1_join2(p, ac_low, bd_low, vl), vec1_join2(p + 16, ac_high, bd_high, vl);
}
VEC_INLINE vec1_t vec1_next(vec1_t v, float last, size_t vl)
{
    (void)vl;
    const __m256 turned = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0));
    return _mm256_blend_ps(turned, _mm256_set1_ps(last), 0x80);
}
VEC_INLINE float vec1_sum(vec1_t v, size_t vl)
{
    (void)vl;
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VEC_INLINE float vec1_top(vec1_t v, size_t vl)
{
    (void)vl;
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
/* The rows of a tile in the lanes, n of them: rowsN_fma is acc + s * v, as above. */
#define VEC_ROWS(N, TYPE, PREFIX) \
    typedef TYPE rows##N##_t; \
    VEC_INLINE rows##N##_t rows##N##_load(const float *p) { return PREFIX##_loadu_ps(p); } \
    VEC_INLINE void rows##N##_store(float *p, rows##N##_t v) { PREFIX##_storeu_ps(p, v); } \
    VEC_INLINE rows##N##_t rows##N##_splat(float x) { return PREFIX##_set1_ps(x); } \
    VEC_INLINE rows##N##_t rows##N##_fma(rows##N##_t acc, float s, rows##N##_t v) { return PREFIX##_fmadd_ps(PREFIX##_set1_ps(s), v, acc); } \
    VEC_INLINE rows##N##_t rows##N##_max(rows##N##_t a, rows##N##_t b) { return PREFIX##_max_ps(a, b); } \
    VEC_INLINE rows##N##_t rows##N##_min(rows##N##_t a, rows##N##_t b) { return PREFIX##_min_ps(a, b); }
VEC_ROWS(4, __m128, _mm)
VEC_ROWS(8, __m256, _mm256)
VEC_INLINE void vec_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }
#endif
