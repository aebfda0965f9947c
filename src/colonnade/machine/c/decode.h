/* RV64GCV instructions as the core model sees them: a class, registers read and written, vector memory shape.
 *
 * Registers are numbered over all three files: x 0-31, f 32-63, v 64-95; NONE where there is none (x0 is none).
 * What cannot be told from the encoding alone (LMUL, SEW) is left to run time.
 */
#ifndef COLONNADE_DECODE_H
#define COLONNADE_DECODE_H
#include <stdint.h>

/* X(name): the class's word in model files and reports. Scalar first, then vector arithmetic, then vector memory. */
#define CLASSES(X) \
    X(alu) X(mul) X(div) X(branch) X(jump) X(load) X(store) X(amo) X(fload) X(fstore) X(fadd) X(fmul) X(ffma) X(fdiv) \
    X(fmove) X(fcompare) X(csr) X(system) X(vset) \
    X(vadd) X(vlogic) X(vshift) X(vmul) X(vdiv) X(vwiden) X(vnarrow) X(vextend) X(vcompare) X(vmask) X(vpopcount) \
    X(viota) X(vmove) X(vmovewhole) X(vfromscalar) X(vtoscalar) X(vslide) X(vgather) X(vgatherscalar) X(vcompress) \
    X(vreduce) X(vfadd) X(vfminmax) X(vfmul) X(vfma) X(vfsign) X(vfdiv) X(vfsqrt) X(vfconvert) X(vfreduce) \
    X(vfreduceordered) X(vftoscalar) \
    X(vload) X(vloadff) X(vloadwhole) X(vloadmask) X(vloadstrided) X(vloadindexed) X(vloadsegment) \
    X(vstore) X(vstorewhole) X(vstoremask) X(vstorestrided) X(vstoreindexed) X(vstoresegment)

#define ENUM(name) C_##name,
enum class { CLASSES(ENUM) CLASS_COUNT };
#undef ENUM
#define FIRST_VECTOR C_vadd
#define FIRST_VECTOR_MEMORY C_vload
#define FIRST_VECTOR_STORE C_vstore

#define NONE 255
enum { WIDE_DST = 1, WIDE_SRC2 = 2, HALF_SRC2 = 4, ONE_DST = 8, ONE_SRC1 = 16, ONE_SRC2 = 32, MASKED = 64, SETS_TYPE = 128 };

struct instruction {
    uint64_t address;
    uint8_t size, class, flags;
    uint8_t dst, src[3];  /* scalars of either file; vector registers stand in v* */
    uint8_t vd, v1, v2;   /* first register of a group written / read */
    uint8_t reads_vd;     /* multiply-add, or stores: vd is a source */
    uint8_t eew;          /* vector memory: log2 bytes of an element (index elements where indexed) */
    uint8_t fields;       /* segments, or registers of a whole-register access */
    uint8_t marker;       /* slti x0, x0, n: 0 is none */
    uint16_t vtype;       /* SETS_TYPE: the new vtype */
    uint64_t times;       /* for the profile: executions, */
    double spent;         /* cycles that the clock moved on */
};

static inline uint8_t x_(unsigned r) { return r ? (uint8_t)r : NONE; }
static inline uint8_t f_(unsigned r) { return (uint8_t)(32 + r); }
static inline uint8_t v_(unsigned r) { return (uint8_t)(64 + r); }

static inline void set_(struct instruction *i, enum class c, uint8_t dst, uint8_t a, uint8_t b)
{
    i->class = (uint8_t)c, i->dst = dst, i->src[0] = a, i->src[1] = b;
}

static void decode_compressed(struct instruction *i, unsigned w)
{
    unsigned op = w & 3, f3 = w >> 13, rd = w >> 7 & 31, rs2 = w >> 2 & 31, rdp = 8 + (w >> 2 & 7), rsp = 8 + (w >> 7 & 7);
    switch (op << 3 | f3) {
    case 000: set_(i, C_alu, x_(rdp), 2, NONE); break;
    case 001: set_(i, C_fload, f_(rdp), x_(rsp), NONE); break;
    case 002: case 003: set_(i, C_load, x_(rdp), x_(rsp), NONE); break;
    case 005: set_(i, C_fstore, NONE, x_(rsp), f_(rdp)); break;
    case 006: case 007: set_(i, C_store, NONE, x_(rsp), x_(rdp)); break;
    case 010: case 011: set_(i, C_alu, x_(rd), x_(rd), NONE); break;
    case 012: set_(i, C_alu, x_(rd), NONE, NONE); break;
    case 013: set_(i, C_alu, x_(rd), rd == 2 ? 2 : NONE, NONE); break;
    case 014: set_(i, C_alu, x_(rsp), x_(rsp), (w >> 10 & 3) == 3 ? x_(rdp) : NONE); break;
    case 015: set_(i, C_jump, NONE, NONE, NONE); break;
    case 016: case 017: set_(i, C_branch, NONE, x_(rsp), NONE); break;
    case 020: set_(i, C_alu, x_(rd), x_(rd), NONE); break;
    case 021: set_(i, C_fload, f_(rd), 2, NONE); break;
    case 022: case 023: set_(i, C_load, x_(rd), 2, NONE); break;
    case 024:
        if (!rs2) set_(i, rd ? C_jump : C_system, w >> 12 & 1 ? 1 : NONE, x_(rd), NONE); /* jr, jalr, ebreak */
        else set_(i, C_alu, x_(rd), w >> 12 & 1 ? x_(rd) : NONE, x_(rs2));               /* add, mv */
        break;
    case 025: set_(i, C_fstore, NONE, 2, f_(rs2)); break;
    case 026: case 027: set_(i, C_store, NONE, 2, x_(rs2)); break;
    default: set_(i, C_system, NONE, NONE, NONE);
    }
}

static void decode_vector_memory(struct instruction *i, uint32_t w, int store)
{
    static const uint8_t widths[8] = {0, 9, 9, 9, 9, 1, 2, 3};
    unsigned mop = w >> 26 & 3, nf = w >> 29, umop = w >> 20 & 31;
    i->eew = widths[w >> 12 & 7];
    i->vd = v_(w >> 7 & 31);
    i->src[0] = x_(w >> 15 & 31);
    i->fields = (uint8_t)(nf + 1);
    i->reads_vd = (uint8_t)store;
    if (!(w >> 25 & 1)) i->flags |= MASKED;
    if (mop == 0 && umop == 8) i->class = store ? C_vstorewhole : C_vloadwhole;
    else if (mop == 0 && umop == 11) i->class = store ? C_vstoremask : C_vloadmask;
    else if (nf) i->class = store ? C_vstoresegment : C_vloadsegment;
    else if (mop == 0) i->class = store ? C_vstore : umop == 16 ? C_vloadff : C_vload;
    else if (mop == 2) i->class = store ? C_vstorestrided : C_vloadstrided;
    else i->class = store ? C_vstoreindexed : C_vloadindexed;
    if (mop == 2) i->src[1] = x_(umop);
    if (mop & 1) i->v2 = v_(umop);
}

/* OPIVV, OPIVX, OPIVI */
static int integer_class(unsigned f6, int vv, int vi)
{
    if (f6 >= 0x09 && f6 <= 0x0b) return C_vlogic;
    if (f6 == 0x0c) return vv ? C_vgather : C_vgatherscalar;
    if (f6 == 0x0e) return vv ? C_vgather : C_vslide;
    if (f6 == 0x0f) return C_vslide;
    if (f6 == 0x11 || f6 == 0x13 || (f6 >= 0x18 && f6 <= 0x1f)) return C_vcompare;
    if (f6 == 0x17) return C_vmove;
    if (f6 == 0x27) return vi ? C_vmovewhole : C_vmul;
    if (f6 == 0x25 || f6 == 0x28 || f6 == 0x29 || f6 == 0x2a || f6 == 0x2b) return C_vshift;
    if (f6 >= 0x2c && f6 <= 0x2f) return C_vnarrow;
    if (f6 == 0x30 || f6 == 0x31) return C_vreduce;
    return C_vadd;
}

/* OPMVV, OPMVX */
static int mixed_class(unsigned f6, unsigned vs1, int vv)
{
    if (vv && f6 < 0x08) return C_vreduce;
    if (f6 == 0x0e || f6 == 0x0f) return C_vslide;
    if (f6 == 0x10) return !vv ? C_vfromscalar : vs1 ? C_vpopcount : C_vtoscalar;
    if (f6 == 0x12) return C_vextend;
    if (f6 == 0x14) return C_viota;
    if (f6 == 0x17) return C_vcompress;
    if (f6 >= 0x18 && f6 <= 0x1f) return C_vmask;
    if (f6 >= 0x20 && f6 <= 0x23) return C_vdiv;
    if (f6 >= 0x24 && f6 <= 0x2f) return C_vmul;
    if (f6 >= 0x30) return C_vwiden;
    return C_vadd;
}

/* OPFVV, OPFVF */
static int float_class(unsigned f6, unsigned vs1, int vv)
{
    if (vv && (f6 == 0x01 || f6 == 0x05 || f6 == 0x07)) return C_vfreduce;
    if (vv && (f6 == 0x03 || f6 == 0x31 || f6 == 0x33)) return C_vfreduceordered;
    if (f6 == 0x04 || f6 == 0x06) return C_vfminmax;
    if (f6 >= 0x08 && f6 <= 0x0a) return C_vfsign;
    if (f6 == 0x0e || f6 == 0x0f) return C_vslide;
    if (f6 == 0x10) return vv ? C_vftoscalar : C_vfromscalar;
    if (f6 == 0x12) return vs1 < 8 ? C_vfconvert : vs1 < 16 ? C_vwiden : C_vnarrow;
    if (f6 == 0x13) return vs1 ? C_vfsign : C_vfsqrt; /* estimates of 7 bits, classes: as long as a sign */
    if (f6 == 0x17) return C_vmove;
    if (f6 >= 0x18 && f6 <= 0x1f) return C_vcompare;
    if (f6 == 0x20 || f6 == 0x21) return C_vfdiv;
    if (f6 == 0x24) return C_vfmul;
    if (f6 >= 0x28 && f6 <= 0x2f) return C_vfma;
    if (f6 >= 0x30) return C_vwiden;
    return C_vfadd;
}

static void decode_vector(struct instruction *i, uint32_t w)
{
    unsigned f3 = w >> 12 & 7, f6 = w >> 26, rd = w >> 7 & 31, rs1 = w >> 15 & 31, rs2 = w >> 20 & 31;
    int vv = f3 < 3, floats = f3 == 1 || f3 == 5, mixed = f3 == 2 || f3 == 6;
    if (f3 == 7) {
        set_(i, C_vset, x_(rd), (w >> 30) == 3 ? NONE : x_(rs1), NONE);
        if (!(w >> 31) || (w >> 30) == 3) i->flags = SETS_TYPE, i->vtype = w >> 20 & (w >> 31 ? 0x3ff : 0x7ff);
        else i->src[1] = x_(rs2); /* vsetvl: the type is in a register, unknown here */
        return;
    }
    int c = floats ? float_class(f6, rs1, vv) : mixed ? mixed_class(f6, rs1, vv) : integer_class(f6, vv, f3 == 3);
    i->class = (uint8_t)c;
    if (!(w >> 25 & 1)) i->flags |= MASKED;
    i->vd = v_(rd), i->v2 = v_(rs2);
    if (f3 == 0 || (vv && !(floats && (f6 == 0x12 || f6 == 0x13)) && !(mixed && (f6 == 0x10 || f6 == 0x12 || f6 == 0x14))))
        i->v1 = v_(rs1);
    if (f3 == 4 || f3 == 6) i->src[0] = x_(rs1);
    if (f3 == 5) i->src[0] = f_(rs1);
    switch (c) {
    case C_vmul: i->reads_vd = mixed && f6 >= 0x29; break;
    case C_vfma: i->reads_vd = 1; break;
    case C_vwiden:
        i->flags |= WIDE_DST;
        if ((floats || mixed) && f6 >= 0x3c) i->reads_vd = 1;
        if (f6 >= 0x34 && f6 <= 0x37) i->flags |= WIDE_SRC2;
        break;
    case C_vnarrow: i->flags |= WIDE_SRC2; break;
    case C_vextend: i->flags |= HALF_SRC2; break;
    case C_vcompare: i->flags |= ONE_DST; break;
    case C_vmask: case C_vpopcount: case C_viota: i->flags |= ONE_SRC1 | ONE_SRC2 | (c == C_viota ? 0 : ONE_DST); break;
    case C_vreduce: case C_vfreduce: case C_vfreduceordered: i->flags |= ONE_DST | ONE_SRC1; break;
    case C_vfromscalar: i->flags |= ONE_DST, i->v2 = NONE; break;
    case C_vtoscalar: case C_vftoscalar: i->flags |= ONE_SRC2; break;
    case C_vmove: if (w >> 25 & 1) i->v2 = NONE; break; /* unmasked: v1 or a scalar is the source; masked: vmerge */
    case C_vmovewhole: i->fields = (uint8_t)((rs1 & 7) + 1); break;
    case C_vslide: i->reads_vd = f6 == 0x0e; break;
    }
    if (c == C_vpopcount || c == C_vtoscalar) i->vd = NONE, i->dst = x_(rd);
    if (c == C_vftoscalar) i->vd = NONE, i->dst = f_(rd);
}

/* All fields of *i but address and size. */
static void decode(struct instruction *i, uint32_t w)
{
    unsigned rd = w >> 7 & 31, rs1 = w >> 15 & 31, rs2 = w >> 20 & 31, f3 = w >> 12 & 7, f7 = w >> 25, f5 = w >> 27;
    i->class = C_system, i->flags = 0, i->marker = 0, i->vtype = 0, i->reads_vd = 0, i->fields = 1, i->eew = 0;
    i->dst = i->src[0] = i->src[1] = i->src[2] = i->vd = i->v1 = i->v2 = NONE;
    if ((w & 3) != 3) {
        decode_compressed(i, w & 0xffff);
        return;
    }
    switch (w & 0x7f) {
    case 0x03: set_(i, C_load, x_(rd), x_(rs1), NONE); break;
    case 0x07: case 0x27:
        if (f3 == 0 || f3 >= 5) decode_vector_memory(i, w, (w & 0x7f) == 0x27);
        else if ((w & 0x7f) == 0x07) set_(i, C_fload, f_(rd), x_(rs1), NONE);
        else set_(i, C_fstore, NONE, x_(rs1), f_(rs2));
        break;
    case 0x0f: set_(i, C_alu, NONE, NONE, NONE); break;
    case 0x13:
        set_(i, C_alu, x_(rd), x_(rs1), NONE);
        if (f3 == 2 && !rd && !rs1) i->marker = (uint8_t)(w >> 20); /* slti x0, x0: left to custom hints */
        break;
    case 0x1b: set_(i, C_alu, x_(rd), x_(rs1), NONE); break;
    case 0x17: case 0x37: set_(i, C_alu, x_(rd), NONE, NONE); break;
    case 0x23: set_(i, C_store, NONE, x_(rs1), x_(rs2)); break;
    case 0x2f: set_(i, C_amo, x_(rd), x_(rs1), x_(rs2)); break;
    case 0x33: case 0x3b: set_(i, f7 != 1 ? C_alu : f3 < 4 ? C_mul : C_div, x_(rd), x_(rs1), x_(rs2)); break;
    case 0x43: case 0x47: case 0x4b: case 0x4f:
        set_(i, C_ffma, f_(rd), f_(rs1), f_(rs2));
        i->src[2] = f_(w >> 27);
        break;
    case 0x53:
        if (f5 < 2 || f5 == 4 || f5 == 5 || f5 == 8)
            set_(i, f5 == 8 ? C_fmove : C_fadd, f_(rd), f_(rs1), f5 == 8 ? NONE : f_(rs2));
        else if (f5 == 2) set_(i, C_fmul, f_(rd), f_(rs1), f_(rs2));
        else if (f5 == 3 || f5 == 0xb) set_(i, C_fdiv, f_(rd), f_(rs1), f5 == 3 ? f_(rs2) : NONE);
        else if (f5 == 0x14) set_(i, C_fcompare, x_(rd), f_(rs1), f_(rs2));
        else if (f5 == 0x18 || f5 == 0x1c) set_(i, C_fmove, x_(rd), f_(rs1), NONE);
        else set_(i, C_fmove, f_(rd), x_(rs1), NONE);
        break;
    case 0x57: decode_vector(i, w); break;
    case 0x63: set_(i, C_branch, NONE, x_(rs1), x_(rs2)); break;
    case 0x67: set_(i, C_jump, x_(rd), x_(rs1), NONE); break;
    case 0x6f: set_(i, C_jump, x_(rd), NONE, NONE); break;
    case 0x73: set_(i, f3 ? C_csr : C_system, x_(rd), f3 && f3 < 4 ? x_(rs1) : NONE, NONE); break;
    }
}
#endif
