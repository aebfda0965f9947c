/* RVV 1.0, any vlenb: a strip is one register group of LMUL = L, and vl says how many lanes it has.
 *
 * Contract: see vec_avx512.h. Lanes past vl are never read, so tail policy does not matter; where the contract names
 * the lanes past n (load_or, keep, load_step_n), whole groups are written, the tail undisturbed. NaNs: vfmax and vfmin
 * drop them, so max, min and clip compare and merge. Sums run in the order of the lanes: the same bits on every chip of
 * one vlenb.
 */
#ifndef COLONNADE_VEC_H
#define COLONNADE_VEC_H
#include <riscv_vector.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define VEC_INLINE static inline __attribute__((always_inline, unused))
#define VEC_NOINLINE __attribute__((noinline, unused))
#define VEC_MAX_LANES 0 /* a strip is one group: bodies multiply this by register number 0 alone */
#define VEC_FROM_NAN_32 0x80400000u /* less the bits of a NaN */
#define VEC_FROM_NAN_16 0x8200u

/* Bits of a mask from `lane` on. With LMUL 1 and VLEN 128 a strip has four lanes and may start inside a byte; the
 * window's 64 bits hold the 32 lanes of VLEN 1024, and longer strips start on whole bytes again. */
VEC_INLINE vbool32_t vec_mask32(const uint8_t *bits, size_t lane, size_t vl)
{
    uint64_t window;
    if (lane % 8 == 0) return __riscv_vlm_v_b32(bits + lane / 8, vl);
    memcpy(&window, bits + lane / 8, sizeof window);
    return __riscv_vreinterpret_v_u64m1_b32(__riscv_vmv_s_x_u64m1(window >> (lane % 8), 1));
}
VEC_INLINE vbool16_t vec_mask16(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b16(bits + lane / 8, vl); }
VEC_INLINE vbool8_t vec_mask8(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b8(bits + lane / 8, vl); }
VEC_INLINE vbool4_t vec_mask4(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b4(bits + lane / 8, vl); }

/* setvl: vsetvli may answer anything from ceil(n / 2) up when n lies between one and two full groups, so what is
 * wanted is asked for, min(n, VLMAX) */
/* The inner loop of the convolution in the order it is written: compilers without a model of an in-order core put loads
 * right before their use. Between vec_type and the last of these stands no other vector instruction of another type.
 * fma_next: acc += s * v, behind the load of `next`, a weight for later. */
#define VEC_HALF(V, W, DOUBLE, T, L, H) \
    /* every second lane, from the first on; under the type of the result */ \
    VEC_INLINE V##H##_t V##L##_even_now(V##L##_t v) \
    { \
        V##H##_t even; \
        __asm__ volatile("vnsrl.wi %0, %1, 0" : "=&vr"(even) : "vr"(v)); \
        return even; \
    } \
    /* the same from the second one on; `by` is W */ \
    VEC_INLINE V##H##_t V##L##_odd_now(V##L##_t v, uint64_t by) \
    { \
        V##H##_t odd; \
        __asm__ volatile("vnsrl.wx %0, %1, %2" : "=&vr"(odd) : "vr"(v), "r"(by)); \
        return odd; \
    } \
    /* p[0], p[2], ..., vl of them: what lies between is read, nothing behind */ \
    VEC_INLINE V##H##_t V##H##_load_second(const T *p, size_t vl) \
    { \
        const vuint##W##m##L##_t all = __riscv_vreinterpret_v_f##W##m##L##_u##W##m##L(__riscv_vle##W##_v_f##W##m##L(p, 2 * vl - 1)); \
        return __riscv_vreinterpret_v_u##W##m##H##_f##W##m##H(__riscv_vnsrl_wx_u##W##m##H(__riscv_vreinterpret_v_u##W##m##L##_u##DOUBLE##m##L(all), 0, vl)); \
    } \
    /* every second lane, from the first and from the second on; vl of each */ \
    VEC_INLINE void V##L##_apart(V##L##_t v, V##H##_t *even, V##H##_t *odd, size_t vl) \
    { \
        const vuint##DOUBLE##m##L##_t pairs = __riscv_vreinterpret_v_u##W##m##L##_u##DOUBLE##m##L(__riscv_vreinterpret_v_f##W##m##L##_u##W##m##L(v)); \
        *even = __riscv_vreinterpret_v_u##W##m##H##_f##W##m##H(__riscv_vnsrl_wx_u##W##m##H(pairs, 0, vl)); \
        *odd = __riscv_vreinterpret_v_u##W##m##H##_f##W##m##H(__riscv_vnsrl_wx_u##W##m##H(pairs, W, vl)); \
    }
/* V: how they are called; W: bits of a lane, a T; L: registers of a group; RATIO: W / L */
#define VEC_GROUP(V, W, T, L, RATIO) \
    typedef vfloat##W##m##L##_t V##L##_t; \
    VEC_INLINE void V##L##_type(size_t vl) { __asm__ volatile("vsetvli zero, %0, e" #W ", m" #L ", ta, ma" : : "r"(vl)); } \
    VEC_INLINE V##L##_t V##L##_fma_next(V##L##_t acc, T s, V##L##_t v, T *next) \
    { \
        __asm__ volatile("vfmacc.vf %0, %2, %3" : "+vr"(acc), "+f"(*next) : "f"(s), "vr"(v)); \
        return acc; \
    } \
    VEC_INLINE V##L##_t V##L##_fma_now(V##L##_t acc, T s, V##L##_t v) \
    { \
        __asm__ volatile("vfmacc.vf %0, %1, %2" : "+vr"(acc) : "f"(s), "vr"(v)); \
        return acc; \
    } \
    VEC_INLINE V##L##_t V##L##_load_now(const T *p) \
    { \
        V##L##_t v; \
        __asm__ volatile("vle" #W ".v %0, %1" : "=vr"(v) : "A"(*p)); \
        return v; \
    } \
    VEC_INLINE void V##L##_store_now(T *p, V##L##_t v) { __asm__ volatile("vse" #W ".v %1, %0" : "=A"(*p) : "vr"(v) : "memory"); } \
    VEC_INLINE V##L##_t V##L##_splat_now(T x) \
    { \
        V##L##_t v; \
        __asm__ volatile("vfmv.v.f %0, %1" : "=vr"(v) : "f"(x)); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_plus_now(V##L##_t v, T x) \
    { \
        __asm__ volatile("vfadd.vf %0, %0, %1" : "+vr"(v) : "f"(x)); \
        return v; \
    } \
    /* the larger one as integers */ \
    VEC_INLINE V##L##_t V##L##_floor_now(V##L##_t v, int32_t x) \
    { \
        __asm__ volatile("vmax.vx %0, %0, %1" : "+vr"(v) : "r"(x)); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_larger_now(V##L##_t a, V##L##_t b) \
    { \
        V##L##_t v; \
        __asm__ volatile("vmax.vv %0, %1, %2" : "=vr"(v) : "vr"(a), "vr"(b)); \
        return v; \
    } \
    /* one lane up, behind the bits of x */ \
    VEC_INLINE V##L##_t V##L##_push_now(V##L##_t v, int64_t x) \
    { \
        V##L##_t pushed; \
        __asm__ volatile("vslide1up.vx %0, %1, %2" : "=&vr"(pushed) : "vr"(v), "r"(x)); \
        return pushed; \
    } \
    VEC_INLINE V##L##_t V##L##_clear_now(V##L##_t v, vbool##RATIO##_t holes) \
    { \
        __asm__ volatile("vmerge.vim %0, %0, 0, %1" : "+vr"(v) : "vm"(holes)); \
        return v; \
    } \
    /* the same, where limits are 0 in holes and all ones elsewhere */ \
    VEC_INLINE V##L##_t V##L##_limits_now(vbool##RATIO##_t holes) \
    { \
        V##L##_t limits; \
        __asm__ volatile("vmv.v.i %0, -1\n\tvmerge.vim %0, %0, 0, %1" : "=&vr"(limits) : "vm"(holes)); \
        return limits; \
    } \
    VEC_INLINE V##L##_t V##L##_least_now(V##L##_t v, V##L##_t limits) \
    { \
        __asm__ volatile("vminu.vv %0, %0, %1" : "+vr"(v) : "vr"(limits)); \
        return v; \
    } \
    /* the steps of a ceiling: the bits and x, the smaller one of both */ \
    VEC_INLINE V##L##_t V##L##_bits_plus_now(V##L##_t v, int64_t x) \
    { \
        __asm__ volatile("vadd.vx %0, %0, %1" : "+vr"(v) : "r"(x)); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_bits_most_now(V##L##_t v, int64_t x) \
    { \
        __asm__ volatile("vminu.vx %0, %0, %1" : "+vr"(v) : "r"(x)); \
        return v; \
    } \
    VEC_INLINE V##L##_t V##L##_scale_now(V##L##_t v, T x) \
    { \
        V##L##_t scaled; \
        __asm__ volatile("vfmul.vf %0, %1, %2" : "=vr"(scaled) : "vr"(v), "f"(x)); \
        return scaled; \
    } \
    VEC_INLINE V##L##_t V##L##_sum_now(V##L##_t a, V##L##_t b) \
    { \
        __asm__ volatile("vfadd.vv %0, %0, %1" : "+vr"(a) : "vr"(b)); \
        return a; \
    } \
    /* every lane's right neighbour, then `last` */ \
    VEC_INLINE V##L##_t V##L##_next_now(V##L##_t v, T last) \
    { \
        V##L##_t next; \
        __asm__ volatile("vfslide1down.vf %0, %1, %2" : "=vr"(next) : "vr"(v), "f"(last)); \
        return next; \
    } \
    /* all registers, whatever the vector type is */ \
    VEC_INLINE V##L##_t V##L##_load_whole_now(const T *p) \
    { \
        V##L##_t v; \
        __asm__ volatile("vl" #L "re" #W ".v %0, %1" : "=vr"(v) : "A"(*p)); \
        return v; \
    } \
    typedef vbool##RATIO##_t V##L##_mask_t; \
    VEC_INLINE size_t V##L##_setvl(size_t n) \
    { \
        const size_t most = __riscv_vsetvlmax_e##W##m##L(); \
        return n < most ? __riscv_vsetvl_e##W##m##L(n) : most; \
    } \
    VEC_INLINE V##L##_t V##L##_load(const T *p, size_t vl) { return __riscv_vle##W##_v_f##W##m##L(p, vl); } \
    VEC_INLINE void V##L##_store(T *p, V##L##_t v, size_t vl) { __riscv_vse##W##_v_f##W##m##L(p, v, vl); } \
    VEC_INLINE V##L##_t V##L##_load_n(const T *p, size_t n) { return __riscv_vle##W##_v_f##W##m##L(p, n); } \
    VEC_INLINE void V##L##_store_n(T *p, V##L##_t v, size_t n) { __riscv_vse##W##_v_f##W##m##L(p, v, n); } \
    VEC_INLINE V##L##_t V##L##_splat(T x, size_t vl) { return __riscv_vfmv_v_f_f##W##m##L(x, vl); } \
    VEC_INLINE V##L##_t V##L##_whole(T x) { return __riscv_vfmv_v_f_f##W##m##L(x, __riscv_vsetvlmax_e##W##m##L()); } \
    VEC_INLINE V##L##_t V##L##_load_or(const T *p, size_t n, T fill) \
    { \
        return __riscv_vle##W##_v_f##W##m##L##_tu(V##L##_whole(fill), p, n); \
    } \
    VEC_INLINE V##L##_t V##L##_keep(V##L##_t v, size_t n) \
    { \
        return __riscv_vmv_v_v_f##W##m##L##_tu(V##L##_whole(0.0f), v, n); \
    } \
    VEC_INLINE V##L##_t V##L##_load_step(const T *p, size_t step, size_t vl) \
    { \
        if (step == 1) return V##L##_load(p, vl); \
        return __riscv_vlse##W##_v_f##W##m##L(p, (ptrdiff_t)(step * sizeof(T)), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_load_step_n(const T *p, size_t step, size_t n) \
    { \
        if (step == 1) return V##L##_load_or(p, n, 0.0f); \
        return __riscv_vlse##W##_v_f##W##m##L##_tu(V##L##_whole(0.0f), p, (ptrdiff_t)(step * sizeof(T)), n); \
    } \
    VEC_INLINE void V##L##_store_step(T *p, size_t step, V##L##_t v, size_t vl) \
    { \
        __riscv_vsse##W##_v_f##W##m##L(p, (ptrdiff_t)(step * sizeof(T)), v, vl); \
    } \
    VEC_INLINE V##L##_t V##L##_fma(V##L##_t acc, T s, V##L##_t v, size_t vl) \
    { \
        return __riscv_vfmacc_vf_f##W##m##L(acc, s, v, vl); \
    } \
    VEC_INLINE V##L##_t V##L##_scale(V##L##_t v, T s, size_t vl) { return __riscv_vfmul_vf_f##W##m##L(v, s, vl); } \
    VEC_INLINE V##L##_t V##L##_fmav(V##L##_t acc, V##L##_t a, V##L##_t b, size_t vl) \
    { \
        return __riscv_vfmacc_vv_f##W##m##L(acc, a, b, vl); \
    } \
    VEC_INLINE V##L##_t V##L##_add(V##L##_t a, V##L##_t b, size_t vl) { return __riscv_vfadd_vv_f##W##m##L(a, b, vl); } \
    VEC_INLINE V##L##_t V##L##_sub(V##L##_t a, V##L##_t b, size_t vl) { return __riscv_vfsub_vv_f##W##m##L(a, b, vl); } \
    VEC_INLINE V##L##_t V##L##_mul(V##L##_t a, V##L##_t b, size_t vl) { return __riscv_vfmul_vv_f##W##m##L(a, b, vl); } \
    VEC_INLINE V##L##_t V##L##_div(V##L##_t a, V##L##_t b, size_t vl) { return __riscv_vfdiv_vv_f##W##m##L(a, b, vl); } \
    /* a division takes five cycles a lane on some cores: an estimate of 1 / b of 7 bits, a step of Newton's, and one more \
     * for a quotient */ \
    VEC_INLINE V##L##_t V##L##_inverse(V##L##_t b, size_t vl) \
    { \
        const V##L##_t r = __riscv_vfrec7_v_f##W##m##L(b, vl); \
        return __riscv_vfmul_vv_f##W##m##L(r, __riscv_vfrsub_vf_f##W##m##L(__riscv_vfmul_vv_f##W##m##L(b, r, vl), 2.0f, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_over(V##L##_t a, V##L##_t b, size_t vl) \
    { \
        const V##L##_t r = V##L##_inverse(b, vl); \
        const V##L##_t q = __riscv_vfmul_vv_f##W##m##L(a, r, vl); \
        return __riscv_vfmacc_vv_f##W##m##L(q, r, __riscv_vfnmsac_vv_f##W##m##L(a, b, q, vl), vl); \
    } \
    /* the larger one as integers: for a limit of 0, which keeps NaN */ \
    VEC_INLINE V##L##_t V##L##_floor(V##L##_t v, int32_t x, size_t vl) \
    { \
        const vint##W##m##L##_t whole = __riscv_vreinterpret_v_f##W##m##L##_i##W##m##L(v); \
        return __riscv_vreinterpret_v_i##W##m##L##_f##W##m##L(__riscv_vmax_vx_i##W##m##L(whole, x, vl)); \
    } \
    /* the smaller one of v and a limit that is not negative, as integers counted from NaN on, which comes first then */ \
    VEC_INLINE V##L##_t V##L##_ceiling(V##L##_t v, T high, size_t vl) \
    { \
        uint##W##_t most; \
        memcpy(&most, &high, sizeof most); \
        vuint##W##m##L##_t bits = __riscv_vadd_vx_u##W##m##L(__riscv_vreinterpret_v_f##W##m##L##_u##W##m##L(v), VEC_FROM_NAN_##W, vl); \
        bits = __riscv_vsub_vx_u##W##m##L(__riscv_vminu_vx_u##W##m##L(bits, most + VEC_FROM_NAN_##W, vl), VEC_FROM_NAN_##W, vl); \
        return __riscv_vreinterpret_v_u##W##m##L##_f##W##m##L(bits); \
    } \
    /* for any limit, in twice the time */ \
    VEC_INLINE V##L##_t V##L##_at_least(V##L##_t v, T low, size_t vl) \
    { \
        return __riscv_vfmerge_vfm_f##W##m##L(v, low, __riscv_vmflt_vf_f##W##m##L##_b##RATIO(v, low, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_at_most(V##L##_t v, T high, size_t vl) \
    { \
        return __riscv_vfmerge_vfm_f##W##m##L(v, high, __riscv_vmfgt_vf_f##W##m##L##_b##RATIO(v, high, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_clip(V##L##_t v, T low, T high, size_t vl) \
    { \
        if (low == 0.0f) v = V##L##_floor(v, 0, vl); \
        else if (low > -__builtin_inff()) v = V##L##_at_least(v, low, vl); \
        if (high < 0.0f) return V##L##_at_most(v, high, vl); \
        return high < __builtin_inff() ? V##L##_ceiling(v, high, vl) : v; \
    } \
    VEC_INLINE V##L##_t V##L##_within(V##L##_t v, T low, T high, size_t vl) \
    { \
        if (low > -__builtin_inff()) v = __riscv_vfmax_vf_f##W##m##L(v, low, vl); \
        return high < __builtin_inff() ? __riscv_vfmin_vf_f##W##m##L(v, high, vl) : v; \
    } \
    VEC_INLINE V##L##_t V##L##_unless_nan(V##L##_t v, V##L##_t x, size_t vl) \
    { \
        return __riscv_vmerge_vvm_f##W##m##L(v, x, __riscv_vmfne_vv_f##W##m##L##_b##RATIO(x, x, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_abs(V##L##_t v, size_t vl) { return __riscv_vfabs_v_f##W##m##L(v, vl); } \
    VEC_INLINE V##L##_t V##L##_below(V##L##_t x, V##L##_t a, V##L##_t b, size_t vl) \
    { \
        return __riscv_vmerge_vvm_f##W##m##L(b, a, __riscv_vmflt_vf_f##W##m##L##_b##RATIO(x, 0.0f, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_sqrt(V##L##_t v, size_t vl) { return __riscv_vfsqrt_v_f##W##m##L(v, vl); } \
    VEC_INLINE V##L##_t V##L##_max(V##L##_t a, V##L##_t b, size_t vl) \
    { \
        return __riscv_vmerge_vvm_f##W##m##L(b, a, __riscv_vmfgt_vv_f##W##m##L##_b##RATIO(a, b, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_min(V##L##_t a, V##L##_t b, size_t vl) \
    { \
        return __riscv_vmerge_vvm_f##W##m##L(b, a, __riscv_vmflt_vv_f##W##m##L##_b##RATIO(a, b, vl), vl); \
    } \
    /* bias and limits as scalars, a mask that stays in its register: for blocks whose sums fill all the others */ \
    VEC_INLINE V##L##_mask_t V##L##_holes(const uint8_t *bits, size_t lane, size_t vl) \
    { \
        return __riscv_vmnot_m_b##RATIO(vec_mask##RATIO(bits, lane, vl), vl); \
    } \
    /* the same in half of the time, where limits are 0 in holes and all ones elsewhere */ \
    VEC_INLINE V##L##_t V##L##_limits(V##L##_mask_t holes, size_t vl) \
    { \
        const vuint##W##m##L##_t all = __riscv_vmv_v_x_u##W##m##L((uint##W##_t)-1, vl); \
        return __riscv_vreinterpret_v_u##W##m##L##_f##W##m##L(__riscv_vmerge_vxm_u##W##m##L(all, 0, holes, vl)); \
    } \
    VEC_INLINE V##L##_t V##L##_least(V##L##_t v, V##L##_t limits, size_t vl) \
    { \
        const vuint##W##m##L##_t x = __riscv_vreinterpret_v_f##W##m##L##_u##W##m##L(v), y = __riscv_vreinterpret_v_f##W##m##L##_u##W##m##L(limits); \
        return __riscv_vreinterpret_v_u##W##m##L##_f##W##m##L(__riscv_vminu_vv_u##W##m##L(x, y, vl)); \
    } \
    VEC_INLINE V##L##_t V##L##_clear(V##L##_t v, V##L##_mask_t holes, size_t vl) \
    { \
        return __riscv_vfmerge_vfm_f##W##m##L(v, 0.0f, holes, vl); \
    } \
    VEC_INLINE V##L##_t V##L##_select(const uint8_t *bits, size_t lane, V##L##_t v, size_t vl) \
    { \
        return V##L##_clear(v, V##L##_holes(bits, lane, vl), vl); \
    } \
    VEC_INLINE V##L##_t V##L##_plus(V##L##_t v, T s, size_t vl) { return __riscv_vfadd_vf_f##W##m##L(v, s, vl); } \
    /* the larger one as integers: of numbers of which the larger one is positive, or both are of no interest */ \
    VEC_INLINE V##L##_t V##L##_larger(V##L##_t a, V##L##_t b, size_t vl) \
    { \
        const vint##W##m##L##_t x = __riscv_vreinterpret_v_f##W##m##L##_i##W##m##L(a), y = __riscv_vreinterpret_v_f##W##m##L##_i##W##m##L(b); \
        return __riscv_vreinterpret_v_i##W##m##L##_f##W##m##L(__riscv_vmax_vv_i##W##m##L(x, y, vl)); \
    } \
    /* first, then v without its last lane */ \
    VEC_INLINE V##L##_t V##L##_push(V##L##_t v, T first, size_t vl) { return __riscv_vfslide1up_vf_f##W##m##L(v, first, vl); } \
    VEC_INLINE T V##L##_sum(V##L##_t v, size_t vl) \
    { \
        const vfloat##W##m1_t zero = __riscv_vfmv_s_f_f##W##m1(0.0f, 1); \
        return __riscv_vfmv_f_s_f##W##m1_f##W(__riscv_vfredosum_vs_f##W##m##L##_f##W##m1(v, zero, vl)); \
    } \
    VEC_INLINE T V##L##_top(V##L##_t v, size_t vl) \
    { \
        const vfloat##W##m1_t start = __riscv_vfmv_s_f_f##W##m1(-__builtin_inff(), 1); \
        return __riscv_vfmv_f_s_f##W##m1_f##W(__riscv_vfredmax_vs_f##W##m##L##_f##W##m1(v, start, vl)); \
    }

#define VEC_SINGLE(L, RATIO) \
    /* lane by lane, `at` bytes from p on, offsets as bits */ \
    VEC_INLINE vec##L##_t vec##L##_gather_now(const float *p, vec##L##_t at) \
    { \
        vec##L##_t v; \
        __asm__ volatile("vluxei32.v %0, (%1), %2" : "=&vr"(v) : "r"(p), "vr"(at) : "memory"); \
        return v; \
    } \
    VEC_INLINE void vec##L##_scatter_now(float *p, vec##L##_t v, vec##L##_t at) { __asm__ volatile("vsuxei32.v %1, (%0), %2" : : "r"(p), "vr"(v), "vr"(at) : "memory"); } \
    VEC_INLINE vbool##RATIO##_t vec##L##_mask_now(uint32_t bits) \
    { \
        vbool##RATIO##_t mask; \
        __asm__ volatile("vmv.s.x %0, %1" : "=vm"(mask) : "r"(bits)); \
        return mask; \
    } \
    VEC_INLINE vec##L##_t vec##L##_power(vec##L##_t v, size_t vl) \
    { \
        const vuint32m##L##_t bits = __riscv_vsll_vx_u32m##L(__riscv_vreinterpret_v_f32m##L##_u32m##L(v), 23, vl); \
        return __riscv_vreinterpret_v_u32m##L##_f32m##L(__riscv_vadd_vx_u32m##L(bits, 127u << 23, vl)); \
    }

VEC_GROUP(vec, 32, float, 1, 32)
VEC_GROUP(vec, 32, float, 2, 16)
VEC_GROUP(vec, 32, float, 4, 8)
VEC_GROUP(vec, 32, float, 8, 4)
VEC_SINGLE(1, 32)
VEC_SINGLE(2, 16)
VEC_SINGLE(4, 8)
VEC_SINGLE(8, 4)
VEC_HALF(vec, 32, 64, float, 2, 1)
VEC_HALF(vec, 32, 64, float, 4, 2)
VEC_HALF(vec, 32, 64, float, 8, 4)
#ifdef __riscv_zvfh
/* float16: the same groups with twice as many lanes */
VEC_INLINE vbool2_t vec_mask2(const uint8_t *bits, size_t lane, size_t vl) { return __riscv_vlm_v_b2(bits + lane / 8, vl); }
#define VEC_HALF_WIDTH(L, RATIO) \
    VEC_GROUP(half, 16, _Float16, L, RATIO) \
    VEC_INLINE half##L##_t half##L##_power(half##L##_t v, size_t vl) \
    { \
        const vuint16m##L##_t bits = __riscv_vsll_vx_u16m##L(__riscv_vreinterpret_v_f16m##L##_u16m##L(v), 10, vl); \
        return __riscv_vreinterpret_v_u16m##L##_f16m##L(__riscv_vadd_vx_u16m##L(bits, 15u << 10, vl)); \
    } \
    /* for up to 32 lanes, by a type of its own: the next vector instruction needs its type again */ \
    VEC_INLINE vbool##RATIO##_t half##L##_mask_now(uint32_t bits) \
    { \
        vbool##RATIO##_t mask; \
        __asm__ volatile("vsetivli zero, 1, e32, m1, ta, ma\n\tvmv.s.x %0, %1" : "=vm"(mask) : "r"(bits)); \
        return mask; \
    }
#define VEC_CONVERT(L, H) \
    VEC_INLINE vec##L##_t half##H##_widened(half##H##_t v, size_t vl) { return __riscv_vfwcvt_f_f_v_f32m##L(v, vl); } \
    VEC_INLINE half##H##_t vec##L##_narrowed(vec##L##_t v, size_t vl) { return __riscv_vfncvt_f_f_w_f16m##H(v, vl); } \
    VEC_INLINE vec##L##_t vec##L##_plus_half(vec##L##_t v, half##H##_t x, size_t vl) { return __riscv_vfwadd_wv_f32m##L(v, x, vl); }
VEC_HALF_WIDTH(1, 16)
VEC_HALF_WIDTH(2, 8)
VEC_HALF_WIDTH(4, 4)
VEC_HALF_WIDTH(8, 2)
VEC_HALF(half, 16, 32, _Float16, 2, 1)
VEC_HALF(half, 16, 32, _Float16, 4, 2)
VEC_HALF(half, 16, 32, _Float16, 8, 4)
VEC_CONVERT(2, 1)
VEC_CONVERT(4, 2)
VEC_CONVERT(8, 4)
VEC_INLINE _Float16 half_float_now(const _Float16 *p)
{
    _Float16 x;
    __asm__ volatile("flh %0, %1" : "=f"(x) : "m"(*p));
    return x;
}
#endif

/* loads that stand where they are written */
VEC_INLINE uint64_t vec_word_now(const uint32_t *p)
{
    uint64_t x;
    __asm__ volatile("lwu %0, %1" : "=r"(x) : "m"(*p));
    return x;
}
VEC_INLINE uint64_t vec_shifted_now(uint64_t x, uint64_t by)
{
    __asm__ volatile("sll %0, %0, %1" : "+r"(x) : "r"(by));
    return x;
}
/* all ones where x is negative, else 0: what no compiler takes for a comparison */
VEC_INLINE int64_t vec_negative_now(int64_t x)
{
    int64_t sign;
    __asm__("srai %0, %1, 63" : "=r"(sign) : "r"(x));
    return sign;
}
VEC_INLINE float vec_float_now(const float *p)
{
    float x;
    __asm__ volatile("flw %0, %1" : "=f"(x) : "m"(*p));
    return x;
}
VEC_INLINE uint64_t vec_long_now(const uint64_t *p)
{
    uint64_t x;
    __asm__ volatile("ld %0, %1" : "=r"(x) : "m"(*p));
    return x;
}
#define vec_member_now(p, at) ({ uint64_t member; __asm__ volatile("ld %0, %2(%1)" : "=r"(member) : "r"(p), "i"(at) : "memory"); member; })
/* asks for a line of memory, never waits: a load into no register (Zicbop's hints are not in RVV 1.0) */
VEC_INLINE void vec_touch(const void *p) { __asm__ volatile("lw zero, %0" : : "m"(*(const int *)p)); }
VEC_INLINE void vec_prefetch(const void *p) { (void)p; } /* a hint needs Zicbop, which RVV 1.0 machines may lack */
#define VEC_SPLIT(L) \
    /* every lane's right neighbour, which the last of vl has too */ \
    VEC_INLINE vec##L##_t vec##L##_after(vec##L##_t v, size_t vl) { return __riscv_vslidedown_vx_f32m##L(v, 1, vl); } \
    VEC_INLINE vec##L##_t vec##L##_next(vec##L##_t v, float last, size_t vl) { return __riscv_vfslide1down_vf_f32m##L(v, last, vl); } \
    VEC_INLINE void vec##L##_split2(const float *p, vec##L##_t *a, vec##L##_t *b, size_t vl) \
    { \
        const vfloat32m##L##x2_t v = __riscv_vlseg2e32_v_f32m##L##x2(p, vl); \
        *a = __riscv_vget_v_f32m##L##x2_f32m##L(v, 0), *b = __riscv_vget_v_f32m##L##x2_f32m##L(v, 1); \
    } \
    VEC_INLINE void vec##L##_split4(const float *p, vec##L##_t *a, vec##L##_t *b, vec##L##_t *c, vec##L##_t *d, size_t vl) \
    { \
        const vfloat32m##L##x4_t v = __riscv_vlseg4e32_v_f32m##L##x4(p, vl); \
        *a = __riscv_vget_v_f32m##L##x4_f32m##L(v, 0), *b = __riscv_vget_v_f32m##L##x4_f32m##L(v, 1); \
        *c = __riscv_vget_v_f32m##L##x4_f32m##L(v, 2), *d = __riscv_vget_v_f32m##L##x4_f32m##L(v, 3); \
    }
VEC_SPLIT(1)
VEC_SPLIT(2)
#define VEC_JOIN(V, W, T, L) \
    VEC_INLINE void V##L##_join2(T *p, V##L##_t a, V##L##_t b, size_t vl) \
    { \
        __riscv_vsseg2e##W##_v_f##W##m##L##x2(p, __riscv_vcreate_v_f##W##m##L##x2(a, b), vl); \
    } \
    VEC_INLINE void V##L##_join4(T *p, V##L##_t a, V##L##_t b, V##L##_t c, V##L##_t d, size_t vl) \
    { \
        __riscv_vsseg4e##W##_v_f##W##m##L##x4(p, __riscv_vcreate_v_f##W##m##L##x4(a, b, c, d), vl); \
    }
VEC_JOIN(vec, 32, float, 1)
VEC_JOIN(vec, 32, float, 2)
#ifdef __riscv_zvfh
VEC_JOIN(half, 16, _Float16, 2)
#endif
#endif
