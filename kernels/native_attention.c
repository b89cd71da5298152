/* Causal attention over KV blocks, the same arithmetic for a decode row and for a prompt's rows.
 *
 * A row's context is cut at absolute positions: into splits, and these into tiles. Within a split
 * the softmax runs on (Milakov, Gimelshein 2018) over ascending tiles; splits are then merged in
 * ascending order (Flash-Decoding). Keys lie in the pool so that a lane is a key (see kv_layout.py),
 * so nothing is moved before it is multiplied: a score is a sum over the head's dimensions in
 * ascending order, an output a sum over ascending keys. What a mask hides adds nothing. So a row's bits depend on its own context alone, and threads may share
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

/* The group of a position, which is in a block of a segment's request. */
static char *group_at(const Step *step, int64_t layer, int64_t which, const Segment *segment,
                      int64_t head, int64_t position) {
    int64_t block = step->block_ids[segment->first_block + position / step->block_tokens];
    int64_t offset = position % step->block_tokens / GROUP * GROUP;
    int64_t index = ((layer * 2 + which) * step->pool_blocks + block) * step->num_kv_heads + head;
    return step->kv + (index * step->block_tokens + offset) * step->head_dim * element_bytes(step);
}

/* One token's key into its group [units of dim][GROUP]. */
static void write_key(const Step *step, const float *from, char *group, int64_t token) {
    for (int64_t i = 0; i < step->head_dim; i++)
        if (step->is_bfloat16)
            ((uint16_t *)group)[(i / 2 * GROUP + token) * 2 + i % 2] = to_bfloat16(from[i]);
        else
            ((float *)group)[i * GROUP + token] = from[i];
}

/* One token's value into its group [units of GROUP][dim]. */
static void write_value(const Step *step, const float *from, char *group, int64_t token) {
    for (int64_t i = 0; i < step->head_dim; i++)
        if (step->is_bfloat16)
            ((uint16_t *)group)[(token / 2 * step->head_dim + i) * 2 + token % 2] =
                to_bfloat16(from[i]);
        else
            ((float *)group)[token * step->head_dim + i] = from[i];
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
        write_key(step, keys + head * dim, group_at(step, layer, 0, segment, head, position),
                  position % GROUP);
        write_value(step, values + head * dim, group_at(step, layer, 1, segment, head, position),
                    position % GROUP);
    }
}

/* A group's tokens are one thread's: they share cache lines. Decode rows share none. */
static int is_appended_by(const Segment *segment, int64_t index, int thread, int num_threads) {
    int64_t part = segment->num_rows == 1 ? segment->first_row
                                          : (segment->start_position + index) / GROUP;
    return part % num_threads == thread;
}

/* The tile of a head's keys first_key .. end. */
static Tile tile_at(const Step *step, int64_t layer, int64_t head, const Segment *segment,
                    int64_t first_key, int64_t end) {
    Tile tile = {.first_key = first_key, .num_keys = smaller(end - first_key, TILE)};
    for (int64_t i = 0; i < GROUPS; i++) { /* what is behind the last key is masked */
        int64_t key = first_key + smaller(i, (tile.num_keys - 1) / GROUP) * GROUP;
        tile.keys[i] = group_at(step, layer, 0, segment, head, key);
        tile.values[i] = group_at(step, layer, 1, segment, head, key);
    }
    return tile;
}

/* One tile for `num` query rows in order of position; `next` is fetched into the cache. */
static void attend_tile(const Step *step, const Memory *memory, int64_t num, const Tile *tile,
                        const Tile *next) {
    for (int64_t first = 0; first < num; first += ROWS) {
        int64_t num_rows = smaller(num - first, ROWS), last = 0;
        for (int64_t i = first; i < first + num_rows; i++)
            last = larger(last, memory->positions[i]);
        if (last >= tile->first_key)
            attend_some(num_rows, step, memory, first, tile, first ? 0 : next);
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

/* A row of float32 in the pool's type. */
static void write_elements(const Step *step, const float *from, int64_t num, char *to) {
    if (!step->is_bfloat16) {
        memcpy(to, from, (size_t)num * sizeof(float));
        return;
    }
    uint16_t *narrow = (uint16_t *)to;
    for (int64_t i = 0; i < num; i++) narrow[i] = to_bfloat16(from[i]);
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

/* `following` is what this thread reads behind the split, or null. */
static void attend_split(const Step *step, const Memory *memory, int64_t layer, int64_t head,
                         const Segment *segment, int64_t num, int64_t split, int64_t end,
                         const Tile *following) {
    int64_t padded = padded_dim(step);
    memset(memory->outputs, 0, (size_t)(num * padded) * sizeof(float));
    for (int64_t i = 0; i < num; i++) memory->running[i] = (Running){NOTHING, {splat(0)}};
    int64_t split_end = smaller((split + 1) * SPLIT, end);
    Tile tile = tile_at(step, layer, head, segment, split * SPLIT, split_end), next;
    for (int64_t first = split * SPLIT; first < split_end; first += TILE, tile = next) {
        int has_next = first + TILE < split_end;
        if (has_next) next = tile_at(step, layer, head, segment, first + TILE, split_end);
        attend_tile(step, memory, num, &tile, has_next ? &next : following);
    }
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

/* Where a row's context ends: the last member's is the longest of a chunk's item. */
static int64_t end_of(const Step *step, const Item *item) {
    int64_t end = 0;
    for (int64_t i = 0; i < item->num_members; i++)
        end = larger(end, step->positions[step->members[item->first_member + i]] + 1);
    return end;
}

/* Items of all heads are numbered; a split's heads follow one another. */
static void attend_item(const Step *step, const Memory *memory, int64_t layer, int64_t index,
                        int64_t following, const float *qkv, float *out) {
    int64_t groups = groups_of(step), dim = step->head_dim, padded = padded_dim(step);
    const Item *item = step->items + index / step->num_kv_heads;
    int64_t head = index % step->num_kv_heads, num = item->num_members * groups;
    int64_t end = end_of(step, item);
    const Segment *segment = step->segments + item->segment;
    load_queries(step, memory, item, head, qkv);
    if (item->split >= 0) {
        Tile next;
        const Item *after = step->items + following / step->num_kv_heads;
        int has_next = following < step->num_items * step->num_kv_heads && after->split >= 0;
        if (has_next)
            next = tile_at(step, layer, following % step->num_kv_heads,
                           step->segments + after->segment, after->split * SPLIT,
                           end_of(step, after));
        attend_split(step, memory, layer, head, segment, num, item->split, end,
                     has_next ? &next : 0);
        keep_partials(step, memory, item, head);
        return;
    }
    for (int64_t split = 0; split * SPLIT < end; split++) {
        attend_split(step, memory, layer, head, segment, num, split, end, 0);
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

/* The next item that no thread has taken. */
static int64_t take(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

/* A thread takes a decode row's item while it is at the one before, and fetches its first tile. */
static void attend_items(const Step *step, const Memory *memory, int64_t layer, int64_t *counter,
                         const float *qkv, float *out) {
    int64_t num = step->num_items * step->num_kv_heads, index = take(counter);
    while (index < num) {
        int is_split = step->items[index / step->num_kv_heads].split >= 0;
        int64_t following = is_split ? take(counter) : num;
        attend_item(step, memory, layer, index, following, qkv, out);
        index = is_split ? following : take(counter);
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
 * x the same in the form in which products read rows (null where out is that). Without an out, keys
 * and values are appended, and that is all. */
void native_attend(const Step *step, int64_t layer, float *qkv, const float *query_norm,
                   const float *key_norm, float *out, char *x) {
    int64_t width = step->num_heads * step->head_dim;
    int64_t qkv_width = width + 2 * step->num_kv_heads * step->head_dim, counter = 0;
#pragma omp parallel num_threads(step->num_threads)
    {
        Memory memory;
        lay_out(step, step->scratch + omp_get_thread_num() * step->scratch_bytes, &memory);
        for (int64_t i = 0; i < step->num_segments; i++) {
            const Segment *segment = step->segments + i;
            for (int64_t j = 0; j < segment->num_rows; j++) {
                int64_t row = segment->first_row + j;
                if (is_appended_by(segment, j, omp_get_thread_num(), omp_get_num_threads()))
                    append_row(step, layer, segment, row, qkv + row * qkv_width, query_norm,
                               key_norm);
            }
        }
        if (out) {
#pragma omp barrier
            attend_items(step, &memory, layer, &counter, qkv, out);
#pragma omp barrier
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
}
