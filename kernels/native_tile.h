/* What the attention kernels share: the sizes of their tiles, one thread's memory, and one tile's
 * arithmetic (see native_attention.c). */
#ifndef AGENTRT_NATIVE_TILE_H
#define AGENTRT_NATIVE_TILE_H

#include "native.h"

#define TILE 64      /* keys */
#define VECTORS 4    /* of a tile's scores */
#define SPLIT 256    /* keys */
#define ROWS 6       /* query rows of one pass over a tile: 6 x 4 vectors fit the registers */
#define MOST_ROWS 192 /* query rows of an item */
#define NOTHING -1e30f

/* The running softmax of one query row: sums are relative to 2^peak. */
typedef struct {
    float peak;
    floats weights; /* summed by lane */
} Running;

/* One thread's memory. */
typedef struct {
    char *keys;      /* [units of dim][TILE] of 32 bits */
    char *values;    /* [units of TILE][padded dim] of 32 bits */
    char *queries;   /* [MOST_ROWS][units of dim] */
    float *outputs;  /* [MOST_ROWS][padded dim], of the split */
    float *totals;   /* the same, of the splits before */
    float *peaks, *sums; /* [MOST_ROWS], of the splits before */
    Running *running;
    int64_t *positions; /* [MOST_ROWS] */
} Memory;

INLINE int64_t padded_dim(const Step *step) { return round_up(step->head_dim, LANES); }
INLINE int64_t groups_of(const Step *step) { return step->num_heads / step->num_kv_heads; }
INLINE int64_t element_bytes(const Step *step) { return step->is_bfloat16 ? 2 : 4; }
INLINE int64_t partial_floats(const Step *step) {
    return groups_of(step) * (padded_dim(step) + 2);
}

INLINE int64_t num_splits(const Step *step, int64_t row) {
    return step->positions[row] / SPLIT + 1;
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define SWAP(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define STAGE(step_, lower, upper)                                        \
    for (int i = 0; i < LANES; i++)                                       \
        if (!(i & step_)) {                                               \
            floats a = rows[i], b = rows[i + step_];                      \
            rows[i] = SWAP(a, b, lower);                                  \
            rows[i + step_] = SWAP(a, b, upper);                          \
        }
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31

/* 16 rows of 16 units to 16 columns: swap blocks of 8, 4, 2, 1. */
INLINE void turn(floats *rows) {
    STAGE(8, LOW8, HIGH8)
    STAGE(4, LOW4, HIGH4)
    STAGE(2, LOW2, HIGH2)
    STAGE(1, LOW1, HIGH1)
}

/* Keys [TILE] of `units` 32-bit units each -> [units][TILE]; null keys are zeros. What lies
 * `ahead_bytes` behind each is asked for: the next tile, as far as it is in the same block. */
static inline void turn_keys(const char *const *from, int64_t units, int64_t ahead_bytes, char *to) {
    for (int64_t key = 0; key < TILE; key += LANES)
        for (int64_t unit = 0; unit < units; unit += LANES) {
            floats rows[LANES];
            int64_t num = smaller(units - unit, LANES);
            for (int i = 0; i < LANES; i++) {
                const char *row = from[key + i];
                __builtin_prefetch(row + ahead_bytes + 4 * unit);
                if (!row)
                    rows[i] = splat(0);
                else if (num == LANES)
                    rows[i] = load(row + 4 * unit);
                else
                    rows[i] = load_part((const float *)row + unit, num);
            }
            turn(rows);
            for (int64_t i = 0; i < num; i++) store(to + ((unit + i) * TILE + key) * 4, rows[i]);
        }
}

/* Values [num_keys] -> [units of keys][padded dim]; a unit is a float, or two keys' bfloat16. */
static inline void line_up_values(const Step *step, const char *const *from, int64_t num_keys,
                           int64_t ahead_bytes, char *to) {
    int64_t dim = step->head_dim, padded = padded_dim(step);
    static const uint16_t zeros[1024];
    int64_t row_bytes = dim * element_bytes(step);
    for (int64_t key = 0; key < num_keys; key += step->is_bfloat16 ? 2 : 1) {
        for (int64_t at = 0; at < row_bytes * (step->is_bfloat16 ? 2 : 1); at += 64)
            __builtin_prefetch(from[key] + ahead_bytes + at);
        if (!step->is_bfloat16) {
            float *row = (float *)to + key * padded;
            memcpy(row, from[key], (size_t)dim * sizeof(float));
            memset(row + dim, 0, (size_t)(padded - dim) * sizeof(float));
            continue;
        }
        uint32_t *pairs = (uint32_t *)to + key / 2 * padded;
        const uint16_t *first = (const uint16_t *)from[key];
        const uint16_t *second = key + 1 < num_keys ? (const uint16_t *)from[key + 1] : zeros;
        for (int64_t i = 0; i < dim; i++) pairs[i] = first[i] | (uint32_t)second[i] << 16;
        for (int64_t i = dim; i < padded; i++) pairs[i] = 0;
    }
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

/* scores[row][key] of a tile: sums over the units of dim. */
INLINE void score_tile(int is_bfloat16, int num_rows, const char *queries, int64_t units,
                       const char *keys, floats scores[ROWS][VECTORS]) {
    floats sums[ROWS][VECTORS] = {0};
    for (int64_t unit = 0; unit < units; unit++, keys += TILE * 4) {
        floats k0 = load(keys), k1 = load(keys + 64), k2 = load(keys + 128), k3 = load(keys + 192);
        for (int row = 0; row < num_rows; row++) {
            floats q = splat_unit(queries + (row * units + unit) * 4);
            sums[row][0] = unit_product(is_bfloat16, q, k0, sums[row][0]);
            sums[row][1] = unit_product(is_bfloat16, q, k1, sums[row][1]);
            sums[row][2] = unit_product(is_bfloat16, q, k2, sums[row][2]);
            sums[row][3] = unit_product(is_bfloat16, q, k3, sums[row][3]);
        }
    }
    memcpy(scores, sums, sizeof sums);
}

/* outputs[row][columns] = decay * outputs + weights * values, over the units of keys. */
INLINE void value_columns(int is_bfloat16, int num_rows, int width, const char *weights,
                          const float *decay, const char *values, int64_t units, int64_t padded,
                          float *outputs) {
    floats sums[ROWS][VECTORS] = {0};
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < width; i++)
            sums[row][i] = load(outputs + row * padded + i * LANES) * splat(decay[row]);
    for (int64_t unit = 0; unit < units; unit++, values += padded * 4) {
        floats v[VECTORS] = {0};
        for (int i = 0; i < width; i++) v[i] = load(values + i * 64);
        for (int row = 0; row < num_rows; row++) {
            floats w = splat_unit(weights + (row * TILE + unit) * 4);
            for (int i = 0; i < width; i++)
                sums[row][i] = unit_product(is_bfloat16, w, v[i], sums[row][i]);
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int i = 0; i < width; i++) store(outputs + row * padded + i * LANES, sums[row][i]);
}

/* Turn scores into weights [row][TILE] (floats, or bfloat16 at the start of a row's place), and
 * say by how much what came before decays. */
INLINE void weigh(int is_bfloat16, int num_rows, floats scores[ROWS][VECTORS], int64_t first_key,
                  const int64_t *positions, Running *running, char *weights, float *decay) {
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int row = 0; row < num_rows; row++) {
        int64_t last = positions[row] - first_key; /* the last key that the row sees, if >= 0 */
        ints seen[VECTORS];
        floats peak = splat(NOTHING);
        for (int i = 0; i < VECTORS; i++) {
            seen[i] = lanes + splat_int(i * LANES) <= splat_int((int32_t)smaller(last, TILE));
            peak = maximum(peak, choose(seen[i], scores[row][i], splat(NOTHING)));
        }
        float before = running[row].peak, now = fmaxf(before, max_lanes(peak));
        decay[row] = power_of_two_scalar(before - now);
        running[row].peak = now;
        floats sum = running[row].weights * splat(decay[row]);
        float wide[TILE];
        for (int i = 0; i < VECTORS; i++) {
            floats p = power_of_two(scores[row][i] - splat(now));
            p = (floats)(seen[i] & (ints)p);
            sum += p;
            store(wide + i * LANES, p);
        }
        running[row].weights = sum;
        char *to = weights + row * TILE * 4;
        if (!is_bfloat16) {
            memcpy(to, wide, sizeof wide);
        } else {
            uint16_t narrow[TILE];
            for (int i = 0; i < TILE; i++) narrow[i] = to_bfloat16(wide[i]);
            memcpy(to, narrow, sizeof narrow);
        }
    }
}

INLINE void attend_rows(int is_bfloat16, int num_rows, const Step *step, const Memory *memory,
                        int64_t first, int64_t first_key, int64_t num_keys) {
    int64_t padded = padded_dim(step), per_unit = is_bfloat16 ? 2 : 1;
    int64_t units = (step->head_dim + per_unit - 1) / per_unit;
    int64_t key_units = (num_keys + per_unit - 1) / per_unit;
    floats scores[ROWS][VECTORS];
    char weights[ROWS * TILE * 4] __attribute__((aligned(64)));
    float decay[ROWS];
    score_tile(is_bfloat16, num_rows, memory->queries + first * units * 4, units, memory->keys,
               scores);
    weigh(is_bfloat16, num_rows, scores, first_key, memory->positions + first,
          memory->running + first, weights, decay);
    float *outputs = memory->outputs + first * padded;
    int64_t column = 0;
    for (; column + 64 <= padded; column += 64)
        value_columns(is_bfloat16, num_rows, 4, weights, decay, memory->values + column * 4,
                      key_units, padded, outputs + column);
    for (; column < padded; column += LANES)
        value_columns(is_bfloat16, num_rows, 1, weights, decay, memory->values + column * 4,
                      key_units, padded, outputs + column);
}

#define ROW_CASES(is_bfloat16)                                                                   \
    switch (num_rows) {                                                                          \
    case 1: attend_rows(is_bfloat16, 1, step, memory, first, first_key, num_keys); break;        \
    case 2: attend_rows(is_bfloat16, 2, step, memory, first, first_key, num_keys); break;        \
    case 3: attend_rows(is_bfloat16, 3, step, memory, first, first_key, num_keys); break;        \
    case 4: attend_rows(is_bfloat16, 4, step, memory, first, first_key, num_keys); break;        \
    case 5: attend_rows(is_bfloat16, 5, step, memory, first, first_key, num_keys); break;        \
    default: attend_rows(is_bfloat16, ROWS, step, memory, first, first_key, num_keys);           \
    }

static inline void attend_some(int64_t num_rows, const Step *step, const Memory *memory, int64_t first,
                        int64_t first_key, int64_t num_keys) {
    if (step->is_bfloat16) {
        ROW_CASES(1)
    } else {
        ROW_CASES(0)
    }
}

#endif
