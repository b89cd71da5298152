/* Part of native_linear.c: its tiles for AVX2, which has half as many registers as AVX-512, half as
 * wide, and no instruction that multiplies bytes. Sums are the same, to the bit. */
#define INT8_ROWS 2
#define INT8_VECTORS (INT8_PANEL / LANES)
#define INT8_PASS(rows) ((rows) == 1 ? 4 : 2) /* vectors: 8 sums, and what they read, fit */

/* sum + the products of 16-bit numbers, added in pairs: exact, 2 * 255 * 128 is far from 2^31. */
INLINE ints dot_pairs(ints sum, ints a, ints b) {
    sum += (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
    __asm__("" : "+x"(sum)); /* gcc adds products up first, and then has too few registers */
    return sum;
}

INLINE ints splat_pair(const Digit *from) {
    int32_t pair;
    memcpy(&pair, from, sizeof pair);
    return splat_int(pair);
}

/* An output's four bytes are widened as they lie: the first and third, then the second and fourth.
 * So digits lie in that order, in 16 bits each. A core of Zen 3 makes 34 products a ns (by both
 * digits; its limit is 41); with digits of 8 bits, widened here, 21. Bytes times bytes (vpmaddubsw)
 * saturate unless signs are moved from one side to the other: exact too, but 27. */
INLINE void int8_vectors(int num_rows, int first, int width, const char *x, int64_t row_bytes,
                         const Linear *linear, int64_t panel, float *out, int64_t adds) {
    typedef uint16_t words __attribute__((vector_size(32)));
    int64_t padded = round_up(linear->inputs, WIDTH_UNIT);
    const char *w = (const char *)linear->weights + panel * padded * INT8_PANEL;
    ints low[INT8_ROWS][INT8_VECTORS] = {0}, high[INT8_ROWS][INT8_VECTORS] = {0};
    for (int64_t i = 0; i < padded; i += 4, w += 4 * INT8_PANEL) {
        ints even[INT8_VECTORS], odd[INT8_VECTORS];
        for (int v = 0; v < width; v++) {
            ints bytes = load_ints(w + (first + v) * 32);
            even[v] = bytes & splat_int(0x00ff00ff);
            odd[v] = (ints)((words)bytes >> 8);
        }
        if (!first) FETCH(w + AHEAD_BYTES), FETCH(w + AHEAD_BYTES + 64);
        for (int row = 0; row < num_rows; row++) {
            const Digit *digits = (const Digit *)(x + row * row_bytes) + i;
            for (int v = 0; v < width; v++) {
                low[row][v] = dot_pairs(low[row][v], even[v], splat_pair(digits));
                high[row][v] = dot_pairs(high[row][v], even[v], splat_pair(digits + padded));
                low[row][v] = dot_pairs(low[row][v], odd[v], splat_pair(digits + 2));
                high[row][v] = dot_pairs(high[row][v], odd[v], splat_pair(digits + padded + 2));
            }
        }
    }
    for (int row = 0; row < num_rows; row++) {
        Tail tail;
        memcpy(&tail, (const Digit *)(x + row * row_bytes) + 2 * padded, sizeof tail);
        for (int v = 0; v < width; v++) {
            int64_t output = panel * INT8_PANEL + (first + v) * LANES;
            floats y = exact_product(low[row][v], high[row][v], &tail, linear, output);
            put(out + row * linear->outputs + output, y, linear->outputs - output, adds);
        }
    }
}

INLINE void int8_rows(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                      int64_t panel, float *out, int64_t adds) {
#pragma GCC unroll 4 /* a `first` known when compiled: 31 products a ns become 34 */
    for (int first = 0; first < INT8_VECTORS; first += INT8_PASS(num_rows))
        int8_vectors(num_rows, first, INT8_PASS(num_rows), x, row_bytes, linear, panel, out, adds);
}

INLINE void int8_tile(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                      int64_t panel, float *out, int64_t adds) {
    for (; num_rows > 1; num_rows -= 2, x += 2 * row_bytes, out += 2 * linear->outputs)
        int8_rows(2, x, row_bytes, linear, panel, out, adds);
    if (num_rows) int8_rows(1, x, row_bytes, linear, panel, out, adds);
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
