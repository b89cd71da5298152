/* What the attention kernels share: the sizes of their tiles, one thread's memory, and one tile's
 * arithmetic (see native_attention.c). */
#ifndef AGENTRT_NATIVE_TILE_H
#define AGENTRT_NATIVE_TILE_H

#include "native.h"

#define GROUP 16     /* tokens that lie interleaved in the pool, see kv_layout.py */
#define GROUPS 4     /* of a tile */
#define TILE (GROUPS * GROUP) /* keys */
#define VECTORS (TILE / LANES) /* of a row's scores of a tile */
#define SPLIT 256    /* keys */
#define SHORT_ROWS 16 /* of a segment whose splits are items of their own */
#define MOST_ROWS 192 /* query rows of an item */
#define NOTHING -1e30f

/* The running softmax of one query row: sums are relative to 2^peak. */
typedef struct {
    float peak;
    floats weights[SUMS]; /* summed by lane */
} Running;

/* Where a tile's groups lie in the pool. A unit is 32 bits: a float, or two bfloat16. */
typedef struct {
    const char *keys[GROUPS];   /* [units of dim][GROUP] */
    const char *values[GROUPS]; /* [units of GROUP][dim] */
    int64_t first_key, num_keys;
} Tile;

/* One thread's memory. */
typedef struct {
    char *queries;   /* [MOST_ROWS][units of dim] */
    float *outputs;  /* [MOST_ROWS][padded dim], of the split */
    float *totals;   /* the same, of the splits before */
    float *peaks, *sums; /* [MOST_ROWS], of the splits before */
    Running *running;
    int64_t *positions; /* [MOST_ROWS] */
} Memory;

INLINE int64_t padded_dim(const Step *step) { return round_up(step->head_dim, 16); }
INLINE int64_t groups_of(const Step *step) { return step->num_heads / step->num_kv_heads; }
INLINE int64_t element_bytes(const Step *step) { return step->is_bfloat16 ? 2 : 4; }
INLINE int64_t partial_floats(const Step *step) {
    return groups_of(step) * (padded_dim(step) + 2);
}

INLINE int64_t short_rows(const Step *step) {
    return smaller(SHORT_ROWS, larger(MOST_ROWS / groups_of(step), 1));
}

INLINE int64_t num_splits(const Step *step, int64_t row) {
    return step->positions[row] / SPLIT + 1;
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* sum + a * b, or the two products of a pair of bfloat16. */
INLINE floats unit_product(int is_bfloat16, floats a, floats b, floats sum) {
#if defined(__AVX512BF16__)
    if (is_bfloat16) return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)is_bfloat16;
    return multiply_add(a, b, sum);
}

INLINE floats splat_unit(const char *from) {
    int32_t bits;
    memcpy(&bits, from, 4);
    return (floats)splat_int(bits);
}

/* scores[row][key] of a tile, `width` vectors of keys from `first`: sums over the units of dim. */
INLINE void score_vectors(int is_bfloat16, int num_rows, int first, int width, const char *queries,
                          int64_t units, const Tile *tile, const Tile *next,
                          floats scores[ROWS][VECTORS]) {
    floats sums[ROWS][MOST_PASS] = {0};
    for (int64_t unit = 0; unit < units; unit++) {
        floats keys[MOST_PASS];
        for (int i = 0; i < width; i++) {
            int group = (first + i) * LANES / GROUP, inside = (first + i) * LANES % GROUP;
            keys[i] = load(tile->keys[group] + (unit * GROUP + inside) * 4);
            if (next && !inside) FETCH(next->keys[group] + unit * GROUP * 4);
        }
        for (int row = 0; row < num_rows; row++) {
            floats q = splat_unit(queries + (row * units + unit) * 4);
            for (int i = 0; i < width; i++)
                sums[row][i] = unit_product(is_bfloat16, q, keys[i], sums[row][i]);
        }
    }
    if (width == VECTORS)
        memcpy(scores, sums, sizeof sums);
    else
        for (int row = 0; row < num_rows; row++)
            for (int i = 0; i < width; i++) scores[row][first + i] = sums[row][i];
}

INLINE void score_tile(int is_bfloat16, int num_rows, const char *queries, int64_t units,
                       const Tile *tile, const Tile *next, floats scores[ROWS][VECTORS]) {
    for (int first = 0; first < VECTORS; first += PASS(num_rows))
        score_vectors(is_bfloat16, num_rows, first, PASS(num_rows), queries, units, tile, next,
                      scores);
}

INLINE floats value_lanes(const char *at, int width, int64_t num_lanes) {
    return width == 1 && num_lanes < LANES ? load_part((const float *)at, num_lanes) : load(at);
}

/* outputs[row][columns] = decay * outputs + weights * values, over the units of keys. */
INLINE void value_columns(int is_bfloat16, int num_rows, int width, const char *weights,
                          const float *decay, const Tile *tile, const Tile *next, int64_t column,
                          int64_t dim, int64_t padded, float *outputs) {
    int64_t per_unit = is_bfloat16 ? 2 : 1, units = (tile->num_keys + per_unit - 1) / per_unit;
    int64_t per_group = GROUP / per_unit, num_lanes = dim - column;
    floats sums[ROWS][MOST_PASS] = {0};
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < width; i++)
            sums[row][i] = load(outputs + row * padded + column + i * LANES) * splat(decay[row]);
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t group = unit / per_group, inside = (unit % per_group * dim + column) * 4;
        floats v[MOST_PASS] = {0};
        for (int i = 0; i < width; i++) {
            v[i] = value_lanes(tile->values[group] + inside + i * LANES * 4, width, num_lanes);
            if (next && i * LANES % 16 == 0) FETCH(next->values[group] + inside + i * LANES * 4);
        }
        if ((unit + 1) * per_unit > tile->num_keys) /* nobody wrote the second of the pair */
            for (int i = 0; i < width; i++) v[i] = (floats)((ints)v[i] & splat_int(0xffff));
        for (int row = 0; row < num_rows; row++) {
            floats w = splat_unit(weights + (row * TILE + unit) * 4);
            for (int i = 0; i < width; i++)
                sums[row][i] = unit_product(is_bfloat16, w, v[i], sums[row][i]);
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < width; i++)
            store(outputs + row * padded + column + i * LANES, sums[row][i]);
}

/* Sixteen floats as bfloat16, rounded to the nearest. */
INLINE void store_bfloat16(uint16_t *to, floats v) {
#if defined(__AVX512BF16__)
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    memcpy(to, &narrow, sizeof narrow);
#else
    for (int lane = 0; lane < LANES; lane++) to[lane] = to_bfloat16(v[lane]);
#endif
}

/* Hide the keys that a row does not see; most tiles are seen by all rows as a whole. */
INLINE void mask_scores(int num_rows, floats scores[ROWS][VECTORS], int64_t first_key,
                        const int64_t *positions) {
    const ints lanes = {COUNT};
    for (int row = 0; row < num_rows; row++) {
        int64_t last = positions[row] - first_key; /* the last key that the row sees, if >= 0 */
        if (last >= TILE - 1) continue;
        for (int i = 0; i < VECTORS; i++) {
            ints seen = lanes + splat_int(i * LANES) <= splat_int((int32_t)last);
            scores[row][i] = choose(seen, scores[row][i], splat(-INFINITY));
        }
    }
}

/* Turn scores into weights [row][TILE] (floats, or bfloat16 at the start of a row's place), and
 * say by how much what came before decays. A hidden key's weight is exactly 0. */
INLINE void weigh(int is_bfloat16, int num_rows, floats scores[ROWS][VECTORS], Running *running,
                  char *weights, float *decay) {
    float before[LANES] = {0}, now[LANES] = {0}, factors[LANES];
    for (int row = 0; row < num_rows; row++) {
        floats peak = maximum(maximum(scores[row][0], scores[row][1]),
                              maximum(scores[row][2], scores[row][3]));
        for (int i = 4; i < VECTORS; i++) peak = maximum(peak, scores[row][i]);
        before[row] = running[row].peak;
        now[row] = fmaxf(before[row], max_lanes(peak));
        running[row].peak = now[row];
    }
    store(factors, power_of_two(load(before) - load(now)));
    for (int row = 0; row < num_rows; row++) {
        decay[row] = factors[row];
        floats sums[SUMS];
        for (int i = 0; i < SUMS; i++) sums[i] = running[row].weights[i] * splat(decay[row]);
        char *to = weights + row * TILE * 4;
        for (int i = 0; i < VECTORS; i++) {
            floats p = power_of_two(scores[row][i] - splat(now[row]));
            sums[i % SUMS] += p;
            if (is_bfloat16)
                store_bfloat16((uint16_t *)to + i * LANES, p);
            else
                store(to + i * LANES * 4, p);
        }
        for (int i = 0; i < SUMS; i++) running[row].weights[i] = sums[i];
    }
}

INLINE void attend_rows(int is_bfloat16, int num_rows, const Step *step, const Memory *memory,
                        int64_t first, const Tile *tile, const Tile *next) {
    int64_t dim = step->head_dim, padded = padded_dim(step), units = dim >> is_bfloat16;
    floats scores[ROWS][VECTORS];
    char weights[ROWS * TILE * 4] __attribute__((aligned(64)));
    float decay[ROWS];
    score_tile(is_bfloat16, num_rows, memory->queries + first * units * 4, units, tile, next,
               scores);
    mask_scores(num_rows, scores, tile->first_key, memory->positions + first);
    weigh(is_bfloat16, num_rows, scores, memory->running + first, weights, decay);
    float *outputs = memory->outputs + first * padded;
    int64_t column = 0;
    for (; column + PASS(num_rows) * LANES <= dim; column += PASS(num_rows) * LANES)
        value_columns(is_bfloat16, num_rows, PASS(num_rows), weights, decay, tile, next, column,
                      dim, padded, outputs);
    for (; column < dim; column += LANES)
        value_columns(is_bfloat16, num_rows, 1, weights, decay, tile, next, column, dim, padded,
                      outputs);
}

#define ROW_CASES(is_bfloat16)                                                    \
    switch (num_rows) {                                                           \
    case 1: attend_rows(is_bfloat16, 1, step, memory, first, tile, next); break;  \
    case 2: attend_rows(is_bfloat16, 2, step, memory, first, tile, next); break;  \
    case 3: attend_rows(is_bfloat16, 3, step, memory, first, tile, next); break;  \
    case 4: attend_rows(is_bfloat16, 4, step, memory, first, tile, next); break;  \
    case 5: attend_rows(is_bfloat16, 5, step, memory, first, tile, next); break;  \
    default: attend_rows(is_bfloat16, ROWS, step, memory, first, tile, next);     \
    }

static inline void attend_some(int64_t num_rows, const Step *step, const Memory *memory,
                               int64_t first, const Tile *tile, const Tile *next) {
    if (step->is_bfloat16) {
        ROW_CASES(1)
    } else {
        ROW_CASES(0)
    }
}

#endif
