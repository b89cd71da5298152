/* Part of native_linear.c: its tiles for AVX2, which has half as many registers as AVX-512, half as
 * wide, and no instruction that multiplies bytes. Sums are the same, to the bit. */
#define INT8_ROWS 4
#define INT8_CASES CASE(2) CASE(3) CASE(4)
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

/* An output's first and third byte as 16 bits each, or its second and fourth. */
INLINE ints two_bytes(const char *from, int second) {
    typedef uint16_t words __attribute__((vector_size(32)));
    ints bytes = load_ints(from);
    return second ? (ints)((words)bytes >> 8) : bytes & splat_int(0x00ff00ff);
}

/* sums[row][vector] of up to BLOCK_INPUTS inputs: digits (16 bits each) times weights, which are
 * widened as they lie, so that digits lie in that order. */
INLINE void int8_block(int num_rows, int width, const char *x, int64_t row_bytes, const char *w,
                       int64_t inputs, Ahead ahead, ints sums[INT8_ROWS][INT8_VECTORS]) {
    for (int64_t i = 0; i < inputs; i += 4, x += 8, w += 4 * INT8_PANEL) {
        ahead = fetch_ahead(ahead);
        for (int second = 0; second < 2; second++) {
            ints weights[INT8_VECTORS];
            for (int v = 0; v < width; v++) weights[v] = two_bytes(w + v * 32, second);
            for (int row = 0; row < num_rows; row++) {
                ints digits = splat_pair(x + row * row_bytes + 4 * second);
                for (int v = 0; v < width; v++)
                    sums[row][v] = dot_pairs(sums[row][v], weights[v], digits);
            }
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
    for (int row = 0; row < num_rows; row++) FETCH_OUTPUT(out + row * linear->outputs + output);
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

INLINE void int8_tile(int num_rows, const char *x, int64_t row_bytes, const Linear *linear,
                      int64_t panel, Ahead ahead, float *out, int64_t adds) {
    int width = num_rows == 1 ? 4 : 2; /* vectors: 8 sums, and what they read, fit registers */
#pragma GCC unroll 2 /* a `first` known when compiled */
    for (int first = 0; first < INT8_VECTORS; first += width, ahead.lines = 0)
        int8_vectors(num_rows, first, width, x, row_bytes, linear, panel, ahead, out, adds);
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
