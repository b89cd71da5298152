/* Part of native_linear.c: its tiles for AVX2, which has half as many registers as AVX-512, half as
 * wide, and no instruction that multiplies bytes. Sums are the same, to the bit. */
#define INT8_ROWS 4
#define INT8_VECTORS (INT8_PANEL / LANES)
#define BLOCK_INPUTS 256 /* times LARGEST times 255 is the most that 32 bits hold */

/* sum + the products of 16-bit numbers, added in pairs. */
INLINE ints dot_pairs(ints sum, ints a, ints b) {
    sum += (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    __asm__("" : "+x"(sum)); /* gcc adds products up first, and then has too few registers */
    return sum;
}

INLINE ints splat_pair(const char *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return splat_int(pair);
}

/* Weights that a tile fetches into the cache beside its work: `lines` cache lines from `at` on for
 * its first four inputs, and so on `step` bytes further each time. */
typedef struct {
    const char *at;
    int64_t step;
    int lines;
} Ahead;

/* sums[row][vector] of up to BLOCK_INPUTS inputs: digits (16 bits each) times weights, which are
 * widened as they lie: an output's first and third byte, then the second and fourth. So digits lie
 * in that order. */
INLINE void int8_block(int num_rows, int width, const char *x, int64_t row_bytes, const char *w,
                       int64_t inputs, Ahead ahead, ints sums[INT8_ROWS][INT8_VECTORS]) {
    typedef uint16_t words __attribute__((vector_size(32)));
    for (int64_t i = 0; i < inputs; i += 4, x += 8, w += 4 * INT8_PANEL) {
        ints even[INT8_VECTORS], odd[INT8_VECTORS];
        for (int v = 0; v < width; v++) {
            ints bytes = load_ints(w + v * 32);
            even[v] = bytes & splat_int(0x00ff00ff);
            odd[v] = (ints)((words)bytes >> 8);
        }
        for (int line = 0; line < ahead.lines; line++) FETCH(ahead.at + 64 * line);
        ahead.at += ahead.step;
        for (int row = 0; row < num_rows; row++)
            for (int v = 0; v < width; v++) {
                const char *digits = x + row * row_bytes;
                sums[row][v] = dot_pairs(sums[row][v], even[v], splat_pair(digits));
                sums[row][v] = dot_pairs(sums[row][v], odd[v], splat_pair(digits + 4));
            }
    }
}

/* A core of Zen 3 makes 70 products a ns (it can 77: two multiplications a cycle, and additions
 * beside them). With the two digits in 16 bits each, 36; with digits of 8 bits, widened here, 21.
 * Bytes times bytes (vpmaddubsw) saturate unless signs are moved from one side to the other: 27. */
INLINE void int8_vectors(int num_rows, int first, int width, const char *x, int64_t row_bytes,
                         const Linear *linear, int64_t panel, Ahead ahead, float *out,
                         int64_t adds) {
    int64_t padded = round_up(linear->inputs, WIDTH_UNIT);
    int64_t output = panel * INT8_PANEL + first * LANES;
    const char *w = (const char *)linear->weights + panel * padded * INT8_PANEL + first * 32;
    ints low[INT8_ROWS][INT8_VECTORS] = {0}, high[INT8_ROWS][INT8_VECTORS] = {0};
    /* Else a store of 512 rows of 3,072 outputs waits for its line: 34 products a ns, not 60. */
    for (int row = 0; row < num_rows; row++)
        __builtin_prefetch(out + row * linear->outputs + output, 1);
    for (int64_t begin = 0; begin < padded; begin += BLOCK_INPUTS) {
        ints sums[INT8_ROWS][INT8_VECTORS] = {0};
        int8_block(num_rows, width, x + 2 * begin, row_bytes, w + begin * INT8_PANEL,
                   smaller(padded - begin, BLOCK_INPUTS), ahead, sums);
        ahead.at += BLOCK_INPUTS / 4 * ahead.step;
        for (int row = 0; row < num_rows; row++)
            for (int v = 0; v < width; v++) {
                low[row][v] += sums[row][v] & splat_int(255);
                high[row][v] += sums[row][v] >> 8;
            }
    }
    for (int row = 0; row < num_rows; row++) {
        Tail tail;
        memcpy(&tail, x + row * row_bytes + 2 * padded, sizeof tail);
        for (int v = 0; v < width; v++) {
            int64_t at = output + v * LANES;
            floats y = exact_product(low[row][v], high[row][v], &tail, linear, at);
            put(out + row * linear->outputs + at, y, linear->outputs - at, adds);
        }
    }
}

INLINE void int8_rows(int num_rows, int lines, const char *x, int64_t row_bytes,
                      const Linear *linear, int64_t panel, Ahead ahead, float *out, int64_t adds) {
    int width = num_rows == 1 ? 4 : 2; /* vectors: 8 sums, and what they read, fit registers */
    ahead.lines = lines;
#pragma GCC unroll 2 /* a `first` known when compiled */
    for (int first = 0; first < INT8_VECTORS; first += width, ahead.lines = 0)
        int8_vectors(num_rows, first, width, x, row_bytes, linear, panel, ahead, out, adds);
}

/* All rows, in tiles as even as can be. Where there are several, they share in fetching the next
 * panel, so that memory works while the processor does (8 rows: 20 ms a step become 12 to 16); a
 * lone one fetches shortly before it reads. */
static void int8_panel(int64_t num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                       int64_t panel, float *out, int64_t adds) {
    int64_t panel_bytes = round_up(linear->inputs, WIDTH_UNIT) * INT8_PANEL;
    int64_t num_tiles = (num_rows + INT8_ROWS - 1) / INT8_ROWS, step = 4 * INT8_PANEL / num_tiles;
    const char *w = (const char *)linear->weights + panel * panel_bytes;
    Ahead ahead = {w + (num_tiles == 1 ? AHEAD_BYTES : panel_bytes), step, 0};
    for (int64_t row = 0; num_tiles; num_tiles--) {
        int64_t some = (num_rows - row + num_tiles - 1) / num_tiles;
        const char *from = x + row * row_bytes;
        float *to = out + row * linear->outputs;
#define ROWS_CASE(n, lines) \
    int8_rows(n, lines, from, row_bytes, linear, panel, ahead, to, adds)
        if (step == 4 * INT8_PANEL) switch (some) {
            case 1: ROWS_CASE(1, 2); break;
            case 2: ROWS_CASE(2, 2); break;
            case 3: ROWS_CASE(3, 2); break;
            default: ROWS_CASE(4, 2);
        }
        else switch (some) {
            case 2: ROWS_CASE(2, 1); break;
            case 3: ROWS_CASE(3, 1); break;
            default: ROWS_CASE(4, 1);
        }
        ahead.at += panel_bytes / (4 * INT8_PANEL) * step;
        row += some;
    }
}

INLINE void float_vectors(int num_rows, int first, int width, const char *x, int64_t row_bytes,
                          const Linear *linear, int64_t panel, float *out, int64_t adds) {
    const float *w = (const float *)linear->weights + panel * linear->inputs * FLOAT_PANEL;
    floats sums[ROWS][MOST_PASS] = {0};
    for (int64_t i = 0; i < linear->inputs; i++, w += FLOAT_PANEL) {
        floats weights[MOST_PASS];
        for (int v = 0; v < width; v++) weights[v] = load(w + (first + v) * LANES);
        if (!first)
            for (int part = 0; part < 4; part++) FETCH((const char *)w + AHEAD_BYTES + 64 * part);
        for (int row = 0; row < num_rows; row++) {
            floats one = splat(((const float *)(x + row * row_bytes))[i]);
            for (int v = 0; v < width; v++)
                sums[row][v] = multiply_add(one, weights[v], sums[row][v]);
        }
    }
    for (int row = 0; row < num_rows; row++)
        for (int v = 0; v < width; v++) {
            int64_t output = panel * FLOAT_PANEL + (first + v) * LANES;
            floats y = sums[row][v];
            if (linear->bias) y += load(linear->bias + output);
            put(out + row * linear->outputs + output, y, linear->outputs - output, adds);
        }
}

INLINE void float_tile(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                       int64_t panel, float *out, int64_t adds) {
    for (int first = 0; first < FLOAT_PANEL / LANES; first += PASS(num_rows))
        float_vectors(num_rows, first, PASS(num_rows), x, row_bytes, linear, panel, out, adds);
}
