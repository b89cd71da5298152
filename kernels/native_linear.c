/* Matrix products, and the rows that they read.
 *
 * int8: weights are int8 with a scale an output, stored plus 128 as the dot instruction wants one
 * unsigned side; activations are two int8 digits, so sums are integers and exact, with or without
 * that instruction. float32: sums run over the inputs in ascending order, one fused multiply-add
 * each. In both a lane is an output.
 */
#include "native.h"

#define DIGIT 256.0f
#define LARGEST (127.0f * DIGIT)
#define TINY 1e-30f      /* keeps the scale of an all-zero row finite */
#define WIDTH_UNIT 64    /* rows of digits are padded to whole cache lines */
#define INT8_PANEL 32    /* outputs that one pass over the inputs makes */
#define FLOAT_PANEL 64
#define AHEAD_BYTES 2048 /* of the weights: 5.2 ms of a decode step become 4.1; less or more: 4.6 */
#define CHUNK_BYTES (320 << 10) /* rows that a pass over all panels reads: they stay in L2 */

/* What stands behind a row's digits. */
typedef struct {
    float peak;
    int32_t sum_low, sum_high;
} Tail;

int64_t native_row_bytes(int64_t width, int64_t is_int8) {
    return is_int8 ? 2 * round_up(width, WIDTH_UNIT) + WIDTH_UNIT : width * (int64_t)sizeof(float);
}

/* A row's digits as the products read them: all low ones, then all high ones; or, where no
 * instruction multiplies bytes, 16 bits of both. */
#if LANES == 8
INLINE void put_digits(char *to, int64_t padded, int64_t i, int32_t low, int32_t high) {
    (void)padded;
    ((int16_t *)to)[i] = (int16_t)(256 * high + low);
}

/* Of four numbers a, b, c, d: a, c, b, d, as int8_vectors wants them. */
INLINE void end_digits(char *digits, int64_t padded) {
    typedef int16_t eight __attribute__((vector_size(16)));
    for (int64_t i = 0; i < padded; i += 8) {
        eight v;
        memcpy(&v, digits + 2 * i, sizeof v);
        v = FOLD(v, 0, 2, 1, 3, 4, 6, 5, 7);
        memcpy(digits + 2 * i, &v, sizeof v);
    }
}
#else
INLINE void put_digits(char *to, int64_t padded, int64_t i, int32_t low, int32_t high) {
    to[i] = (char)low;
    to[padded + i] = (char)high;
}

INLINE void end_digits(char *digits, int64_t padded) { (void)digits, (void)padded; }
#endif

/* row ~ peak / LARGEST * (256 * high + low), within half of that unit. */
static void split_digits(const float *row, int64_t width, char *to) {
    int64_t padded = round_up(width, WIDTH_UNIT);
    float peak = TINY;
    for (int64_t i = 0; i < width; i += LANES) {
        floats v = width - i < LANES ? load_part(row + i, width - i) : load(row + i);
        peak = fmaxf(peak, max_lanes(maximum(v, -v)));
    }
    float unit = LARGEST / peak;
    int32_t sum_low = 0, sum_high = 0;
    for (int64_t i = 0; i < width; i++) {
        int32_t whole = (int32_t)__builtin_rintf(row[i] * unit);
        int32_t low = (int8_t)whole; /* the low byte read as signed: `high` makes up for that */
        int32_t high = (whole - low) >> 8;
        put_digits(to, padded, i, low, high);
        sum_low += low;
        sum_high += high;
    }
    for (int64_t i = width; i < padded; i++) put_digits(to, padded, i, 0, 0);
    end_digits(to, padded);
    Tail tail = {peak, sum_low, sum_high};
    memcpy(to + 2 * padded, &tail, sizeof tail);
}

void write_row(const float *row, int64_t width, char *to, int64_t is_int8) {
    if (is_int8)
        split_digits(row, width, to);
    else if ((const char *)row != to)
        memcpy(to, row, (size_t)width * sizeof(float));
}

/* Root-mean-square norm (Zhang, Sennrich 2019). */
void norm_row(const float *row, const float *weight, int64_t width, double eps, float *to) {
    floats squares[SUMS] = {0};
    for (int64_t i = 0; i < width; i += LANES) {
        floats v = width - i < LANES ? load_part(row + i, width - i) : load(row + i);
        squares[i / LANES % SUMS] = multiply_add(v, v, squares[i / LANES % SUMS]);
    }
    float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)width + (float)eps);
    for (int64_t i = 0; i < width; i++) to[i] = row[i] * scale * weight[i];
}

/* Else a store waits for its line (Zen 3, 512 rows of 3,072 outputs: 34 products a ns, not 60). */
#define FETCH_OUTPUT(at) __builtin_prefetch(at, 1)

INLINE ints load_ints(const void *from) { return (ints)load(from); }

INLINE void put(float *to, floats y, int64_t num, int64_t adds) {
    if (num >= LANES) {
        store(to, adds ? load(to) + y : y);
    } else if (num > 0) {
        if (adds) y += load_part(to, num);
        memcpy(to, &y, (size_t)num * sizeof(float));
    }
}

/* What exact sums of digits times (weights + 128) come to, for the outputs from `first`: `low` and
 * 256 times `high`, whichever way the sum is shared between them. */
INLINE floats exact_product(ints low, ints high, const Tail *tail, const Linear *linear,
                            int64_t first) {
    low -= splat_int(128 * tail->sum_low);
    ints exact_low = low & splat_int(255);
    ints exact_high = high - splat_int(128 * tail->sum_high) + (low >> 8);
    floats y = __builtin_convertvector(exact_high, floats) * splat(DIGIT);
    y = (__builtin_convertvector(exact_low, floats) + y) * load(linear->scale + first);
    y = y * splat(tail->peak);
    if (linear->bias) y += load(linear->bias + first);
    return y;
}

/* Weights that a tile fetches into the cache beside its work: `lines` cache lines from `at` on for
 * its first four inputs, and so on `step` bytes further each time. */
typedef struct {
    const char *at;
    int64_t step;
    int lines;
} Ahead;

INLINE Ahead fetch_ahead(Ahead ahead) {
    for (int line = 0; line < ahead.lines; line++) FETCH(ahead.at + 64 * line);
    ahead.at += ahead.step;
    return ahead;
}

#if LANES == 8
#include "native_linear_avx2.h"
#else
#define INT8_ROWS ROWS
#define INT8_CASES CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)

INLINE ints dot_bytes(ints sum, ints unsigned_bytes, ints signed_bytes) {
#if defined(__AVX512VNNI__)
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#else
    const uint8_t *a = (const uint8_t *)&unsigned_bytes;
    const int8_t *b = (const int8_t *)&signed_bytes;
    for (int lane = 0; lane < LANES; lane++)
        for (int i = 4 * lane; i < 4 * lane + 4; i++) sum[lane] += a[i] * b[i];
    return sum;
#endif
}

INLINE void int8_tile(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                      int64_t panel, Ahead ahead, float *out, int64_t adds) {
    int64_t padded = round_up(linear->inputs, WIDTH_UNIT);
    const char *w = (const char *)linear->weights + panel * padded * INT8_PANEL;
    ints low[ROWS][2] = {0}, high[ROWS][2] = {0};
    for (int row = 0; row < num_rows; row++)
        for (int half = 0; half < 2; half++)
            FETCH_OUTPUT(out + row * linear->outputs + panel * INT8_PANEL + half * LANES);
    for (int64_t i = 0; i < padded; i += 4, w += 4 * INT8_PANEL) {
        ints w0 = load_ints(w), w1 = load_ints(w + 64);
        ahead = fetch_ahead(ahead);
        for (int row = 0; row < num_rows; row++) {
            int32_t four;
            memcpy(&four, x + row * row_bytes + i, 4);
            low[row][0] = dot_bytes(low[row][0], w0, splat_int(four));
            low[row][1] = dot_bytes(low[row][1], w1, splat_int(four));
            memcpy(&four, x + row * row_bytes + padded + i, 4);
            high[row][0] = dot_bytes(high[row][0], w0, splat_int(four));
            high[row][1] = dot_bytes(high[row][1], w1, splat_int(four));
        }
    }
    for (int row = 0; row < num_rows; row++) {
        Tail tail;
        memcpy(&tail, x + row * row_bytes + 2 * padded, sizeof tail);
        for (int half = 0; half < 2; half++) {
            int64_t first = panel * INT8_PANEL + half * LANES;
            floats y = exact_product(low[row][half], high[row][half], &tail, linear, first);
            put(out + row * linear->outputs + first, y, linear->outputs - first, adds);
        }
    }
}

INLINE void float_tile(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                       int64_t panel, float *out, int64_t adds) {
    const float *w = (const float *)linear->weights + panel * linear->inputs * FLOAT_PANEL;
    floats sums[ROWS][4] = {0};
    for (int64_t i = 0; i < linear->inputs; i++, w += FLOAT_PANEL) {
        floats w0 = load(w), w1 = load(w + 16), w2 = load(w + 32), w3 = load(w + 48);
        for (int part = 0; part < 4; part++) FETCH((const char *)w + AHEAD_BYTES + 64 * part);
        for (int row = 0; row < num_rows; row++) {
            floats v = splat(((const float *)(x + row * row_bytes))[i]);
            sums[row][0] = multiply_add(v, w0, sums[row][0]);
            sums[row][1] = multiply_add(v, w1, sums[row][1]);
            sums[row][2] = multiply_add(v, w2, sums[row][2]);
            sums[row][3] = multiply_add(v, w3, sums[row][3]);
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int part = 0; part < 4; part++) {
            int64_t first = panel * FLOAT_PANEL + part * LANES;
            floats y = sums[row][part];
            if (linear->bias) y += load(linear->bias + first);
            put(out + row * linear->outputs + first, y, linear->outputs - first, adds);
        }
}
#endif

_Static_assert(ROWS == 6, "a panel has a case for each number of rows of a tile");

/* All rows of a chunk, for one panel's outputs. */
static void float_panel(int64_t num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                        int64_t panel, float *out, int64_t adds) {
#define CASE(n) \
    case n: float_tile(n, x, row_bytes, linear, panel, out, adds); break;
    for (; num_rows > 0; num_rows -= ROWS, x += ROWS * row_bytes, out += ROWS * linear->outputs)
        switch (smaller(num_rows, ROWS)) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* The same, in tiles as even as can be. Where there are several, they share in fetching the next
 * panel, so that memory works while the processor does (159 MB of weights on two cores, 8 and 16
 * rows: 20 and 35 ms become 12 to 17 and 29 on a Zen 3, 10.5 and 15 become 8 and 10.5 with VNNI). A
 * lone one fetches shortly before it reads. */
static void int8_panel(int64_t num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                       int64_t panel, float *out, int64_t adds) {
#define CASE(n) \
    case n: int8_tile(n, x, row_bytes, linear, panel, ahead, out, adds); break;
    int64_t panel_bytes = round_up(linear->inputs, WIDTH_UNIT) * INT8_PANEL;
    int64_t num_tiles = (num_rows + INT8_ROWS - 1) / INT8_ROWS, step = 4 * INT8_PANEL / num_tiles;
    const char *w = (const char *)linear->weights + panel * panel_bytes;
    if (num_tiles == 1) {
        Ahead ahead = {w + AHEAD_BYTES, step, 2};
        switch (num_rows) { CASE(1) INT8_CASES }
        return;
    }
    for (Ahead ahead = {w + panel_bytes, step, 1}; num_tiles; num_tiles--) {
        int64_t some = (num_rows + num_tiles - 1) / num_tiles;
        switch (some) { INT8_CASES }
        ahead.at += panel_bytes / (4 * INT8_PANEL) * step;
        num_rows -= some, x += some * row_bytes, out += some * linear->outputs;
    }
#undef CASE
}

void product(const char *x, int64_t num_rows, const Linear *linear, float *out, int64_t adds) {
    int64_t row_bytes = native_row_bytes(linear->inputs, linear->scale != 0);
    int64_t width = linear->scale ? INT8_PANEL : FLOAT_PANEL;
    int64_t num_panels = (linear->outputs + width - 1) / width;
    int64_t chunk = larger(CHUNK_BYTES / row_bytes / ROWS, 1) * ROWS;
    int64_t num_chunks = (num_rows + chunk - 1) / chunk;
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < num_chunks * num_panels; item++) {
        int64_t first = item / num_panels * chunk, panel = item % num_panels;
        int64_t some = smaller(num_rows - first, chunk);
        (linear->scale ? int8_panel : float_panel)(some, x + first * row_bytes, row_bytes, linear,
                                                   panel, out + first * linear->outputs, adds);
    }
}

/* Whether bytes are multiplied fast: AVX-512 without VNNI does it one by one. */
int64_t native_has_int8(void) {
#if defined(__AVX512VNNI__)
    return 1;
#else
    return LANES == 8;
#endif
}
