/* RVV 1.0, any vlenb: a strip is one register group of LMUL = L, and vl says how many lanes it has.
 * Contract: see vec_avx512.h. Lanes past vl are never read, so tail policy does not matter. */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <riscv_vector.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 0 /* a strip is one group: bodies multiply this by register number 0 alone */

/* vsetvli may answer anything from ceil(n / 2) up when n lies between one and two full groups: ask for what is wanted */
#define VEC_GROUP(L, RATIO) \
    typedef vfloat32m##L##_t vec##L##_t; \
    VEC_INLINE size_t vec##L##_setvl(size_t n) \
    { \
        const size_t most = __riscv_vsetvlmax_e32m##L(); \
        return n < most ? __riscv_vsetvl_e32m##L(n) : most; \
    } \
    VEC_INLINE vec##L##_t vec##L##_load(const float *p, size_t vl) { return __riscv_vle32_v_f32m##L(p, vl); } \
    VEC_INLINE void vec##L##_store(float *p, vec##L##_t v, size_t vl) { __riscv_vse32_v_f32m##L(p, v, vl); } \
    VEC_INLINE vec##L##_t vec##L##_load_n(const float *p, size_t n) { return __riscv_vle32_v_f32m##L(p, n); } \
    VEC_INLINE void vec##L##_store_n(float *p, vec##L##_t v, size_t n) { __riscv_vse32_v_f32m##L(p, v, n); } \
    VEC_INLINE vec##L##_t vec##L##_splat(float x, size_t vl) { return __riscv_vfmv_v_f_f32m##L(x, vl); } \
    VEC_INLINE vec##L##_t vec##L##_fma(vec##L##_t acc, float s, vec##L##_t v, size_t vl) \
    { \
        return __riscv_vfmacc_vf_f32m##L(acc, s, v, vl); \
    } \
    VEC_INLINE vec##L##_t vec##L##_fmav(vec##L##_t acc, vec##L##_t a, vec##L##_t b, size_t vl) \
    { \
        return __riscv_vfmacc_vv_f32m##L(acc, a, b, vl); \
    } \
    VEC_INLINE vec##L##_t vec##L##_add(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfadd_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_sub(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfsub_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_mul(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfmul_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_div(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfdiv_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_max(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfmax_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_min(vec##L##_t a, vec##L##_t b, size_t vl) { return __riscv_vfmin_vv_f32m##L(a, b, vl); } \
    VEC_INLINE vec##L##_t vec##L##_select(const uint8_t *bits, size_t lane, vec##L##_t v, size_t vl) \
    { \
        const vec##L##_t zero = __riscv_vfmv_v_f_f32m##L(0.0f, vl); \
        return __riscv_vmerge_vvm_f32m##L(zero, v, vec_mask##RATIO(bits, lane, vl), vl); \
    } \
    VEC_INLINE float vec##L##_sum(vec##L##_t v, size_t vl) \
    { \
        const vfloat32m1_t zero = __riscv_vfmv_v_f_f32m1(0.0f, 1); \
        return __riscv_vfmv_f_s_f32m1_f32(__riscv_vfredosum_vs_f32m##L##_f32m1(v, zero, vl)); \
    } \
    VEC_INLINE float vec##L##_top(vec##L##_t v, size_t vl) \
    { \
        const vfloat32m1_t start = __riscv_vfmv_v_f_f32m1(-__builtin_inff(), 1); \
        return __riscv_vfmv_f_s_f32m1_f32(__riscv_vfredmax_vs_f32m##L##_f32m1(v, start, vl)); \
    }

/* With LMUL 1 and VLEN 128 a strip has four lanes and may start inside a byte; at most 32 lanes (VLEN 1024) are asked. */
VEC_INLINE vbool32_t vec_mask32(const uint8_t *bits, size_t lane, size_t vl)
{
    uint64_t window;
    (void)vl;
    memcpy(&window, bits + lane / 8, sizeof window);
    return __riscv_vreinterpret_v_u64m1_b32(__riscv_vmv_v_x_u64m1(window >> (lane % 8), 1));
}
VEC_INLINE vbool16_t vec_mask16(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b16(bits + lane / 8, vl); }
VEC_INLINE vbool8_t vec_mask8(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b8(bits + lane / 8, vl); }
VEC_INLINE vbool4_t vec_mask4(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b4(bits + lane / 8, vl); }

VEC_GROUP(1, 32)
VEC_GROUP(2, 16)
VEC_GROUP(4, 8)
VEC_GROUP(8, 4)

VEC_INLINE void vec_prefetch(const void *p) { (void)p; }
#endif
