/* Which rows attend together, planned once a step: short segments (a decode row, with its draft) that
 * read the same blocks read them once (agents with one system prompt), and a chunk is cut so that all
 * threads have work. */
#include "native_tile.h"

static int64_t last_position(const Segment *segment) {
    return segment->start_position + segment->num_rows - 1;
}

static int64_t last_row(const Segment *segment) {
    return segment->first_row + segment->num_rows - 1;
}

/* Whether the part of both segments' contexts within a split lies in the same blocks. */
static int shares_split(const Step *step, const Segment *a, const Segment *b, int64_t split) {
    int64_t first = split * SPLIT / step->block_tokens;
    int64_t last_a = smaller((split + 1) * SPLIT - 1, last_position(a)) / step->block_tokens;
    int64_t last_b = smaller((split + 1) * SPLIT - 1, last_position(b)) / step->block_tokens;
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

/* Add to an item the rows of a short segment that a split belongs to. */
static void add_members(Step *step, const Segment *segment, int64_t split, int64_t *num_members) {
    for (int64_t row = segment->first_row; row <= last_row(segment); row++)
        if (num_splits(step, row) > split) step->members[(*num_members)++] = (int32_t)row;
}

/* The short segments that read a split in the same blocks as `leader` does, itself first. */
static void plan_split(Step *step, int64_t leader, int64_t num_short, int64_t split,
                       int64_t *next_split, int64_t *num_members) {
    int64_t most = larger(MOST_ROWS / groups_of(step), 1), before = *num_members;
    for (int64_t i = leader; i < num_short; i++) {
        const Segment *segment = step->segments + i;
        if (next_split[i] != split || num_splits(step, last_row(segment)) <= split) continue;
        if (!shares_split(step, step->segments + leader, segment, split)) continue;
        if (i > leader && *num_members - before + segment->num_rows > most) continue;
        add_members(step, segment, split, num_members);
        next_split[i] = split + 1;
    }
    add_item(step, leader, num_members, split);
}

/* Fill items, members and first_partial. `next_split` is memory: a number a segment. */
void native_plan(Step *step, int64_t *next_split) {
    int64_t num_members = 0, num_short = 0, num_partials = 0, most_splits = 0, num_chunk_rows = 0;
    step->num_items = 0;
    for (; num_short < step->num_segments; num_short++) {
        const Segment *segment = step->segments + num_short;
        if (segment->num_rows > short_rows(step)) break;
        next_split[num_short] = 0;
        for (int64_t row = segment->first_row; row <= last_row(segment); row++) {
            step->first_partial[row] = num_partials;
            num_partials += num_splits(step, row);
        }
        most_splits = larger(most_splits, num_splits(step, last_row(segment)));
    }
    for (int64_t i = num_short; i < step->num_segments; i++)
        num_chunk_rows += step->segments[i].num_rows;
    /* Enough items for all threads, few enough that a tile is read for many rows at once. */
    int64_t most = larger(MOST_ROWS / groups_of(step), 1);
    int64_t fair = num_chunk_rows * step->num_kv_heads / (8 * step->num_threads);
    int64_t rows_per_item = smaller(larger(fair, smaller(8, most)), most);
    for (int64_t i = num_short; i < step->num_segments; i++)
        plan_chunk(step, i, rows_per_item, &num_members);
    for (int64_t split = 0; split < most_splits; split++)
        for (int64_t i = 0; i < num_short; i++)
            if (next_split[i] == split && num_splits(step, last_row(step->segments + i)) > split)
                plan_split(step, i, num_short, split, next_split, &num_members);
}
