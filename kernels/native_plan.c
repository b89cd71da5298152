/* Which rows attend together, planned once a step: decode rows that read the same blocks read them
 * once (agents with one system prompt), and a chunk is cut so that all threads have work. */
#include "native_tile.h"

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
