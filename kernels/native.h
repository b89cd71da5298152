/* What the native kernels share: vectors, and the structs that Python fills in.
 *
 * Every sum has one order, which depends on the width of what is summed and on nothing else: not on
 * the rows beside a row, the threads, or where a chunk of a prompt began. Hence no -ffast-math, no
 * contraction by the compiler: a fused multiply-add is written where one is meant.
 */
#ifndef AGENTRT_NATIVE_H
#define AGENTRT_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* Vectors are the processor's own: what is wider than its registers, gcc keeps in memory (a prefill
 * of 2,048 tokens took 70 s so on AVX2). The pool, packed weights and the order of sums are the
 * same at either width: what is summed by lane is summed in SUM_LANES lanes, which are SUMS vectors. */
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define LANES 8
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7
#define REPEAT(x) x, x, x, x, x, x, x, x
#else
#define LANES 16
#define COUNT 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define REPEAT(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#endif
#define SUM_LANES 16
#define SUMS (SUM_LANES / LANES)

/* Rows that one pass over weights or keys makes, and vectors of these that it takes at a time. 6
 * rows x 4 vectors fit the 32 registers of AVX-512. AVX2 has 16: it goes over a panel in parts. */
#define ROWS 6
#define PASS(rows) (LANES == 16 ? 4 : (rows) == 1 ? 8 : (rows) <= 3 ? 4 : 2)
#define MOST_PASS (64 / LANES)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

/* A packed matrix [outputs, inputs]; native.py packs it and says how. */
typedef struct {
    int64_t inputs, outputs;
    const void *weights;
    const float *scale; /* a scale an output, where weights are int8; else null */
    const float *bias;  /* or null */
} Linear;

/* Consecutive rows of one request, see agentrt.kernels.Segment. */
typedef struct {
    int64_t first_row, num_rows, start_position;
    int64_t first_block; /* index into Step.block_ids */
} Segment;

/* Query rows that attend together: they read the same blocks. */
typedef struct {
    int64_t segment;      /* whose block table all of them share */
    int64_t first_member; /* index into Step.members */
    int64_t num_members;
    int64_t split; /* the one part of the context to read, or -1: all parts */
} Item;

/* One forward: its rows, its place in the KV pool, and memory to work in. */
typedef struct {
    int64_t num_rows, num_segments, num_threads;
    int64_t num_heads, num_kv_heads, head_dim, hidden;
    int64_t pool_blocks, block_tokens;
    int64_t is_int8, is_bfloat16; /* the form of activations; the type of the pool */
    int64_t scratch_bytes;        /* of one thread */
    int64_t num_items;            /* set by native_plan */
    double norm_eps;
    const int64_t *token_ids, *positions;
    const float *cos, *sin; /* [context, head_dim / 2] */
    char *kv;               /* [layers, 2, blocks, kv_heads, block_tokens, head_dim] */
    const Segment *segments;
    const int32_t *block_ids;
    Item *items;
    int32_t *members;       /* rows, item after item */
    int64_t *first_partial; /* of a short segment's row: its first slot in `partials`; else -1 */
    float *partials;        /* [slots, kv_heads, groups, padded dim + 2] */
    char *scratch;
} Step;

/* Into the second cache: what is fetched into the first, at 7,000 tokens, costs a step 2 ms more. */
#define FETCH(at) __builtin_prefetch(at, 0, 2)

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE floats load(const void *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(void *to, floats v) { memcpy(to, &v, sizeof v); }

/* The first n < LANES numbers, and zeros. */
INLINE floats load_part(const float *from, int64_t n) {
    floats v = {0};
    memcpy(&v, from, (size_t)n * sizeof(float));
    return v;
}

INLINE floats splat(float x) {
    return (floats){REPEAT(x)};
}

INLINE ints splat_int(int32_t x) {
    return (ints){REPEAT(x)};
}

/* a * b + c with one rounding. */
INLINE floats multiply_add(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    floats out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return out;
#endif
}

INLINE floats maximum(floats a, floats b) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    floats out;
    for (int lane = 0; lane < LANES; lane++) out[lane] = a[lane] > b[lane] ? a[lane] : b[lane];
    return out;
#endif
}

/* Lanes of `a` where `mask` is all ones, of `b` where it is 0. */
INLINE floats choose(ints mask, floats a, floats b) {
    return (floats)((mask & (ints)a) | (~mask & (ints)b));
}

#define FOLD(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#if LANES == 8
#define HALVES(op, v)                             \
    v = op(v, FOLD(v, 4, 5, 6, 7, 0, 1, 2, 3));   \
    v = op(v, FOLD(v, 2, 3, 0, 1, 6, 7, 4, 5));   \
    v = op(v, FOLD(v, 1, 0, 3, 2, 5, 4, 7, 6))
#else
#define HALVES(op, v)                                                                     \
    v = op(v, FOLD(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));             \
    v = op(v, FOLD(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));             \
    v = op(v, FOLD(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));             \
    v = op(v, FOLD(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#endif

INLINE floats plus(floats a, floats b) { return a + b; }

/* The sum of SUM_LANES lanes, the same way at any width of a vector: halves are added. */
INLINE float sum_lanes(const floats sums[SUMS]) {
    floats v = sums[0];
    for (int i = 1; i < SUMS; i++) v += sums[i];
    HALVES(plus, v);
    return v[0];
}

INLINE float max_lanes(floats v) {
    HALVES(maximum, v);
    return v[0];
}

/* 2^x for x <= 127, within 2e-7 of it; 0 below 2^-126; exactly 1 at 0. The Taylor series of 2^r for
 * |r| <= 1/2, times a whole power of two. */
INLINE floats power_of_two(floats x) {
    const floats magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to whole numbers */
    ints underflow = x < splat(-126.0f);
    floats clamped = choose(underflow, splat(-126.0f), x);
    floats shifted = clamped + magic;
    floats r = clamped - (shifted - magic);
    floats p = splat(1.5403530e-4f);
    p = multiply_add(p, r, splat(1.3333558e-3f));
    p = multiply_add(p, r, splat(9.6181291e-3f));
    p = multiply_add(p, r, splat(5.5504109e-2f));
    p = multiply_add(p, r, splat(2.4022651e-1f));
    p = multiply_add(p, r, splat(6.9314718e-1f));
    p = multiply_add(p, r, splat(1.0f));
    ints scaled = (ints)p + (((ints)shifted - (ints)magic) << 23);
    return (floats)(~underflow & scaled);
}

INLINE float power_of_two_scalar(float x) { return power_of_two(splat(x))[0]; }

/* native_linear.c: rows in the form in which products read them ("normal" rows) */
int64_t native_row_bytes(int64_t width, int64_t is_int8);
void write_row(const float *row, int64_t width, char *to, int64_t is_int8);
/* out[row] (+)= x[row] W^T. Called by all threads of a team; ends without a barrier. */
void product(const char *x, int64_t num_rows, const Linear *linear, float *out, int64_t adds);
void norm_row(const float *row, const float *weight, int64_t width, double eps, float *to);

#endif
