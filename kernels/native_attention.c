/* Causal attention over KV blocks, the same arithmetic for a decode row and for a prompt's rows.
 *
 * A row's context is cut at absolute positions: into splits, and these into tiles. Within a split
 * the softmax runs on (Milakov, Gimelshein 2018) over ascending tiles; splits are then merged in
 * ascending order (Flash-Decoding). A tile's keys are turned so that a lane is a key: a score is a
 * sum over the head's dimensions in ascending order, an output a sum over ascending keys. What a
 * mask hides adds nothing. So a row's bits depend on its own context alone, and threads may share
 * the work in any way: a prompt's rows go through all splits in one item, decode rows make an item
 * of each split, together with the other rows that read the same blocks.
 *
 * A pool in bfloat16 is multiplied in pairs of dimensions (scores) and of keys (values), where the
 * processor does that: queries and weights are rounded to bfloat16 too, sums are float32.
 */
#include "native.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define LOG2_E 1.44269504f
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

static int64_t padded_dim(const Step *step) { return round_up(step->head_dim, LANES); }
static int64_t groups_of(const Step *step) { return step->num_heads / step->num_kv_heads; }
static int64_t element_bytes(const Step *step) { return step->is_bfloat16 ? 2 : 4; }
static int64_t partial_floats(const Step *step) {
    return groups_of(step) * (padded_dim(step) + 2);
}

static int64_t lay_out(const Step *step, char *base, Memory *memory) {
    int64_t dim = padded_dim(step), row = dim * 4, at = 0;
#define TAKE(field, bytes) memory->field = (void *)(base + at), at = round_up(at + (bytes), 64)
    TAKE(keys, row * TILE);
    TAKE(values, row * TILE);
    TAKE(queries, row * MOST_ROWS);
    TAKE(outputs, row * MOST_ROWS);
    TAKE(totals, row * MOST_ROWS);
    TAKE(peaks, 4 * MOST_ROWS);
    TAKE(sums, 4 * MOST_ROWS);
    TAKE(running, (int64_t)sizeof(Running) * MOST_ROWS);
    TAKE(positions, 8 * MOST_ROWS);
#undef TAKE
    return at;
}

/* What a thread needs, here and for a row of hidden values. */
int64_t native_scratch_bytes(const Step *step) {
    Memory memory;
    return round_up(larger(lay_out(step, 0, &memory), step->hidden * 4), 4096);
}

int64_t native_most_group_rows(void) { return MOST_ROWS; }

/* ---- which rows go together */

static int64_t num_splits(const Step *step, int64_t row) {
    return step->positions[row] / SPLIT + 1;
}

/* Whether the part of both rows' contexts within a split lies in the same blocks. */
static int shares_split(const Step *step, const Segment *a, const Segment *b, int64_t split) {
    int64_t first = split * SPLIT / step->block_tokens;
    int64_t last_a = smaller((split + 1) * SPLIT - 1, a->start_position) / step->block_tokens;
    int64_t last_b = smaller((split + 1) * SPLIT - 1, b->start_position) / step->block_tokens;
    return last_a == last_b &&
           !memcmp(step->block_ids + a->first_block + first,
                   step->block_ids + b->first_block + first,
                   (size_t)(last_a - first + 1) * sizeof(int32_t));
}

static void add_item(Step *step, int64_t segment, int64_t *num_members, int64_t split) {
    int64_t before = step->num_items ? step->items[step->num_items - 1].first_member +
                                           step->items[step->num_items - 1].num_members
                                     : 0;
    step->items[step->num_items++] = (Item){segment, before, *num_members - before, split};
}

static void plan_chunk(Step *step, int64_t index, int64_t rows_per_item, int64_t *num_members) {
    const Segment *segment = step->segments + index;
    for (int64_t i = 0; i < segment->num_rows; i++) {
        step->first_partial[segment->first_row + i] = -1;
        step->members[(*num_members)++] = (int32_t)(segment->first_row + i);
        if (i % rows_per_item == rows_per_item - 1 || i == segment->num_rows - 1)
            add_item(step, index, num_members, -1);
    }
}

/* The decode rows that read a split in the same blocks as `leader` does, itself first. */
static void plan_split(Step *step, int64_t leader, int64_t num_decode, int64_t split,
                       int64_t *next_split, int64_t *num_members) {
    int64_t most = larger(MOST_ROWS / groups_of(step), 1), num = 0;
    for (int64_t i = leader; i < num_decode && num < most; i++) {
        int64_t row = step->segments[i].first_row;
        if (next_split[i] != split || num_splits(step, row) <= split) continue;
        if (!shares_split(step, step->segments + leader, step->segments + i, split)) continue;
        step->members[(*num_members)++] = (int32_t)row;
        next_split[i] = split + 1;
        num++;
    }
    add_item(step, leader, num_members, split);
}

/* Fill items, members and first_partial. `next_split` is memory: a number a segment. */
void native_plan(Step *step, int64_t *next_split) {
    int64_t num_members = 0, num_decode = 0, num_partials = 0, most_splits = 0, num_chunk_rows = 0;
    step->num_items = 0;
    while (num_decode < step->num_segments && step->segments[num_decode].num_rows == 1) {
        int64_t row = step->segments[num_decode].first_row;
        next_split[num_decode++] = 0;
        step->first_partial[row] = num_partials;
        num_partials += num_splits(step, row);
        most_splits = larger(most_splits, num_splits(step, row));
    }
    for (int64_t i = num_decode; i < step->num_segments; i++)
        num_chunk_rows += step->segments[i].num_rows;
    /* Enough items for all threads, few enough that turning a tile's keys costs little. */
    int64_t most = larger(MOST_ROWS / groups_of(step), 1);
    int64_t fair = num_chunk_rows * step->num_kv_heads / (8 * step->num_threads);
    int64_t rows_per_item = smaller(larger(fair, smaller(8, most)), most);
    for (int64_t i = num_decode; i < step->num_segments; i++)
        plan_chunk(step, i, rows_per_item, &num_members);
    for (int64_t split = 0; split < most_splits; split++)
        for (int64_t i = 0; i < num_decode; i++)
            if (next_split[i] == split && num_splits(step, step->segments[i].first_row) > split)
                plan_split(step, i, num_decode, split, next_split, &num_members);
}

/* ---- the pool */

static char *pool_at(const Step *step, int64_t layer, int64_t which, int64_t block, int64_t head,
                     int64_t offset) {
    int64_t index = ((layer * 2 + which) * step->pool_blocks + block) * step->num_kv_heads + head;
    return step->kv + (index * step->block_tokens + offset) * step->head_dim * element_bytes(step);
}

INLINE uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static void write_elements(const Step *step, const float *from, int64_t num, char *to) {
    if (!step->is_bfloat16) {
        memcpy(to, from, (size_t)num * sizeof(float));
        return;
    }
    uint16_t *narrow = (uint16_t *)to;
    for (int64_t i = 0; i < num; i++) narrow[i] = to_bfloat16(from[i]);
}

/* Rotary embedding, half-split form (Su et al. 2021), times a factor. */
static void rotate(float *head, int64_t dim, const float *cos, const float *sin, float factor) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float x = head[i], y = head[half + i];
        head[i] = (x * cos[i] - y * sin[i]) * factor;
        head[half + i] = (y * cos[i] + x * sin[i]) * factor;
    }
}

/* Norm and rotate one row's queries and keys; append its keys and values to the pool. */
static void append_row(const Step *step, int64_t layer, const Segment *segment, int64_t row,
                       float *qkv, const float *query_norm, const float *key_norm) {
    int64_t dim = step->head_dim, position = step->positions[row];
    int64_t block = step->block_ids[segment->first_block + position / step->block_tokens];
    const float *cos = step->cos + position * (dim / 2), *sin = step->sin + position * (dim / 2);
    float scale = LOG2_E / sqrtf((float)dim);
    for (int64_t head = 0; head < step->num_heads + step->num_kv_heads; head++) {
        int is_query = head < step->num_heads;
        float *at = qkv + head * dim;
        if (query_norm) norm_row(at, is_query ? query_norm : key_norm, dim, step->norm_eps, at);
        rotate(at, dim, cos, sin, is_query ? scale : 1.0f);
    }
    const float *keys = qkv + step->num_heads * dim, *values = keys + step->num_kv_heads * dim;
    for (int64_t head = 0; head < step->num_kv_heads; head++) {
        int64_t offset = position % step->block_tokens;
        write_elements(step, keys + head * dim, dim,
                       pool_at(step, layer, 0, block, head, offset));
        write_elements(step, values + head * dim, dim,
                       pool_at(step, layer, 1, block, head, offset));
    }
}

/* ---- one tile */

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
static void turn_keys(const char *const *from, int64_t units, int64_t ahead_bytes, char *to) {
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
static void line_up_values(const Step *step, const char *const *from, int64_t num_keys,
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

static void attend_some(int64_t num_rows, const Step *step, const Memory *memory, int64_t first,
                        int64_t first_key, int64_t num_keys) {
    if (step->is_bfloat16) {
        ROW_CASES(1)
    } else {
        ROW_CASES(0)
    }
}

/* Keys first_key .. end of one head, for `num` query rows in order of position. */
static void attend_tile(const Step *step, const Memory *memory, int64_t layer, int64_t head,
                        const Segment *segment, int64_t num, int64_t first_key, int64_t end) {
    const char *keys[TILE] = {0}, *values[TILE] = {0};
    int64_t num_keys = smaller(end - first_key, TILE);
    int64_t index = first_key / step->block_tokens, offset = first_key % step->block_tokens;
    for (int64_t i = 0; i < num_keys; index++, offset = 0) {
        int64_t block = step->block_ids[segment->first_block + index];
        const char *key = pool_at(step, layer, 0, block, head, offset);
        const char *value = pool_at(step, layer, 1, block, head, offset);
        int64_t row_bytes = step->head_dim * element_bytes(step);
        for (; i < num_keys && offset < step->block_tokens; i++, offset++) {
            keys[i] = key, key += row_bytes;
            values[i] = value, value += row_bytes;
        }
    }
    int64_t units = step->head_dim * element_bytes(step) / 4;
    int64_t ahead_bytes = first_key + TILE < end ? TILE * step->head_dim * element_bytes(step) : 0;
    turn_keys(keys, units, ahead_bytes, memory->keys);
    line_up_values(step, values, num_keys, ahead_bytes, memory->values);
    for (int64_t first = 0; first < num; first += ROWS) {
        int64_t num_rows = smaller(num - first, ROWS);
        int64_t last = 0;
        for (int64_t i = first; i < first + num_rows; i++)
            last = larger(last, memory->positions[i]);
        if (last >= first_key) attend_some(num_rows, step, memory, first, first_key, num_keys);
    }
}

/* ---- items */

/* total = total + (output, of weight sum, relative to 2^peak) */
static void merge(int64_t padded, float *total_peak, float *total_sum, float *total, float peak,
                  float sum, const float *output) {
    float now = fmaxf(*total_peak, peak);
    float keep = power_of_two_scalar(*total_peak - now), take = power_of_two_scalar(peak - now);
    *total_peak = now;
    *total_sum = *total_sum * keep + sum * take;
    for (int64_t i = 0; i < padded; i += LANES)
        store(total + i, load(total + i) * splat(keep) + load(output + i) * splat(take));
}

static void finish_row(const Step *step, float sum, const float *total, float *out) {
    for (int64_t i = 0; i < step->head_dim; i++) out[i] = total[i] / sum;
}

static float *partial_at(const Step *step, int64_t row, int64_t split, int64_t head) {
    int64_t slot = step->first_partial[row] + split;
    return step->partials + (slot * step->num_kv_heads + head) * partial_floats(step);
}

static void load_queries(const Step *step, const Memory *memory, const Item *item, int64_t head,
                         const float *qkv) {
    int64_t dim = step->head_dim, groups = groups_of(step), padded = padded_dim(step);
    int64_t qkv_width = (step->num_heads + 2 * step->num_kv_heads) * dim;
    for (int64_t i = 0; i < item->num_members * groups; i++) {
        int64_t row = step->members[item->first_member + i / groups];
        memory->positions[i] = step->positions[row];
        memory->peaks[i] = NOTHING;
        memory->sums[i] = 0;
        write_elements(step, qkv + row * qkv_width + (head * groups + i % groups) * dim, dim,
                       memory->queries + i * dim * element_bytes(step));
    }
    memset(memory->totals, 0, (size_t)(item->num_members * groups * padded) * sizeof(float));
}

static void attend_split(const Step *step, const Memory *memory, int64_t layer, int64_t head,
                         const Segment *segment, int64_t num, int64_t split, int64_t end) {
    int64_t padded = padded_dim(step);
    memset(memory->outputs, 0, (size_t)(num * padded) * sizeof(float));
    for (int64_t i = 0; i < num; i++) memory->running[i] = (Running){NOTHING, splat(0)};
    int64_t split_end = smaller((split + 1) * SPLIT, end);
    for (int64_t first = split * SPLIT; first < split_end; first += TILE)
        attend_tile(step, memory, layer, head, segment, num, first, split_end);
}

/* One item of decode rows: its split's results, for later. */
static void keep_partials(const Step *step, const Memory *memory, const Item *item, int64_t head) {
    int64_t groups = groups_of(step), padded = padded_dim(step);
    for (int64_t i = 0; i < item->num_members * groups; i++) {
        int64_t row = step->members[item->first_member + i / groups];
        float *to = partial_at(step, row, item->split, head) + i % groups * (padded + 2);
        to[0] = memory->running[i].peak;
        to[1] = sum_lanes(memory->running[i].weights);
        memcpy(to + 2, memory->outputs + i * padded, (size_t)padded * sizeof(float));
    }
}

static void attend_item(const Step *step, const Memory *memory, int64_t layer, int64_t head,
                        const Item *item, const float *qkv, float *out) {
    int64_t groups = groups_of(step), dim = step->head_dim, padded = padded_dim(step);
    int64_t num = item->num_members * groups, end = 0;
    const Segment *segment = step->segments + item->segment;
    load_queries(step, memory, item, head, qkv);
    for (int64_t i = 0; i < num; i++) end = larger(end, memory->positions[i] + 1);
    if (item->split >= 0) {
        attend_split(step, memory, layer, head, segment, num, item->split, end);
        keep_partials(step, memory, item, head);
        return;
    }
    for (int64_t split = 0; split * SPLIT < end; split++) {
        attend_split(step, memory, layer, head, segment, num, split, end);
        for (int64_t i = 0; i < num; i++)
            if (memory->positions[i] >= split * SPLIT)
                merge(padded, memory->peaks + i, memory->sums + i, memory->totals + i * padded,
                      memory->running[i].peak, sum_lanes(memory->running[i].weights),
                      memory->outputs + i * padded);
    }
    for (int64_t i = 0; i < num; i++) {
        int64_t row = step->members[item->first_member + i / groups];
        finish_row(step, memory->sums[i], memory->totals + i * padded,
                   out + (row * step->num_heads + head * groups + i % groups) * dim);
    }
}

/* Merge the splits of one head of a decode row. */
static void merge_row(const Step *step, int64_t row, int64_t query_head, float *total, float *out) {
    int64_t groups = groups_of(step), padded = padded_dim(step);
    float peak = NOTHING, sum = 0;
    memset(total, 0, (size_t)padded * sizeof(float));
    for (int64_t split = 0; split < num_splits(step, row); split++) {
        const float *from = partial_at(step, row, split, query_head / groups) +
                            query_head % groups * (padded + 2);
        merge(padded, &peak, &sum, total, from[0], from[1], from + 2);
    }
    finish_row(step, sum, total, out + (row * step->num_heads + query_head) * step->head_dim);
}

/* qkv [rows, (heads + 2 * kv_heads) * dim] is changed; out [rows, heads * dim] is float memory, and
 * x the same in the form in which products read rows (null where out is that). */
void native_attend(const Step *step, int64_t layer, float *qkv, const float *query_norm,
                   const float *key_norm, float *out, char *x) {
    int64_t width = step->num_heads * step->head_dim;
    int64_t qkv_width = width + 2 * step->num_kv_heads * step->head_dim;
#pragma omp parallel num_threads(step->num_threads)
    {
        Memory memory;
        lay_out(step, step->scratch + omp_get_thread_num() * step->scratch_bytes, &memory);
        for (int64_t i = 0; i < step->num_segments; i++) {
            const Segment *segment = step->segments + i;
            for (int64_t j = 0; j < segment->num_rows; j++) {
                int64_t row = segment->first_row + j;
                if (row % omp_get_num_threads() == omp_get_thread_num())
                    append_row(step, layer, segment, row, qkv + row * qkv_width, query_norm,
                               key_norm);
            }
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < step->num_items * step->num_kv_heads; i++)
            attend_item(step, &memory, layer, i % step->num_kv_heads,
                        step->items + i / step->num_kv_heads, qkv, out);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step->num_rows; row++) {
            if (step->first_partial[row] >= 0)
                for (int64_t head = 0; head < step->num_heads; head++)
                    merge_row(step, row, head, memory.totals, out);
            if (x) write_row(out + row * width, width,
                             x + row * native_row_bytes(width, step->is_int8), step->is_int8);
        }
    }
}
