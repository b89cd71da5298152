/* The methods of a step, but for attention: each is one call, and one team of threads. */
#include "native.h"

#define LOG2_E 1.44269504f

int64_t native_abi(void) { return sizeof(Step); }

int64_t native_has_bfloat16(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

static float *row_memory(const Step *step, int thread) {
    return (float *)(step->scratch + thread * step->scratch_bytes);
}

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* hidden [rows, hidden] = the rows' embeddings; x = their norm. */
void native_embed(const Step *step, const float *table, const float *norm, float *hidden, char *x) {
    int64_t width = step->hidden, row_bytes = native_row_bytes(width, step->is_int8);
#pragma omp parallel num_threads(step->num_threads)
    {
        float *memory = row_memory(step, omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step->num_rows; row++) {
            float *to = hidden + row * width;
            memcpy(to, table + step->token_ids[row] * width, (size_t)width * sizeof(float));
            norm_row(to, norm, width, step->norm_eps, memory);
            write_row(memory, width, x + row * row_bytes, step->is_int8);
        }
    }
}

/* out [rows, outputs] = x W^T (+ bias). */
void native_linear(const Step *step, int64_t num_rows, const char *x, const Linear *linear,
                   float *out) {
#pragma omp parallel num_threads(step->num_threads)
    product(x, num_rows, linear, out, 0);
}

/* hidden += x W^T, and its norm. */
void native_add_norm(const Step *step, float *hidden, const char *x, const Linear *linear,
                     const float *norm, char *out) {
    int64_t width = step->hidden, row_bytes = native_row_bytes(width, step->is_int8);
#pragma omp parallel num_threads(step->num_threads)
    {
        float *memory = row_memory(step, omp_get_thread_num());
        product(x, step->num_rows, linear, hidden, 1);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step->num_rows; row++) {
            norm_row(hidden + row * width, norm, width, step->norm_eps, memory);
            write_row(memory, width, out + row * row_bytes, step->is_int8);
        }
    }
}

static void silu_multiply(const float *gate, const float *up, int64_t width, float *to) {
    for (int64_t i = 0; i < width; i += LANES) {
        int64_t num = smaller(width - i, LANES);
        floats g = num < LANES ? load_part(gate + i, num) : load(gate + i);
        floats u = num < LANES ? load_part(up + i, num) : load(up + i);
        floats power = choose(g < splat(-87.0f), splat(126.0f), g * splat(-LOG2_E));
        floats y = g / (splat(1.0f) + power_of_two(power)) * u;
        memcpy(to + i, &y, (size_t)num * sizeof(float));
    }
}

/* out = silu(gate) * up of x W^T, which is kept in both [rows, 2 * width]. */
void native_gate_up(const Step *step, const char *x, const Linear *linear, float *both, char *out) {
    int64_t width = linear->outputs / 2, row_bytes = native_row_bytes(width, step->is_int8);
#pragma omp parallel num_threads(step->num_threads)
    {
        product(x, step->num_rows, linear, both, 0);
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < step->num_rows; row++) {
            float *gate = both + row * 2 * width;
            silu_multiply(gate, gate + width, width, gate);
            write_row(gate, width, out + row * row_bytes, step->is_int8);
        }
    }
}
