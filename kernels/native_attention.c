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
#include "native_tile.h"

#define LOG2_E 1.44269504f

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

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

/* ---- the pool */

static char *pool_at(const Step *step, int64_t layer, int64_t which, int64_t block, int64_t head,
                     int64_t offset) {
    int64_t index = ((layer * 2 + which) * step->pool_blocks + block) * step->num_kv_heads + head;
    return step->kv + (index * step->block_tokens + offset) * step->head_dim * element_bytes(step);
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
