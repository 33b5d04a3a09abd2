/* Runs kernels on what it reads from standard input, and writes their results to standard output: for processors that can be
   emulated, but have no Python here.

   Each call begins with its kind, 0 for a matrix product and 1 for attention, and the sizes that it needs, all int64. Then
   come the arrays, in the order in which they are read below. */
#include "attention.h"
#include "matmul.h"

#include <stdio.h>
#include <stdlib.h>

void quantkit_pack(const Matrix *weight, const uint8_t *codes, const float *scales, const uint8_t *zeros, int threads);
void quantkit_matmul(const Matrix *weight, const float *x, int64_t m, float *prepared, float *out, int threads);
void quantkit_paged_attention(const AttentionConfig *config, const PagedBatch *paged, const float *queries,
                              const KVArrays *keys, const KVArrays *values, float *out, int threads);

#define THREADS 2

/* The next `size` bytes. The program ends soon, so nothing is freed. */
static void *read_bytes(int64_t size) {
    void *bytes = calloc(1, (size_t)size + 1);
    if (!bytes || fread(bytes, 1, (size_t)size, stdin) != (size_t)size) exit(2);
    return bytes;
}

static void write_floats(const float *floats, int64_t count) {
    if (fwrite(floats, sizeof *floats, (size_t)count, stdout) != (size_t)count) exit(3);
}

static void multiply(void) {
    const int64_t *n = read_bytes(8 * sizeof *n), m = n[0];
    Matrix w = {.rows = n[1], .columns = n[2], .group = n[3], .bits = (int32_t)n[4], .type = (int32_t)n[5],
                .activation_bits = (int32_t)n[6]};
    if (!w.bits) w.data = read_bytes(w.rows * w.columns * (w.type == F32 ? 4 : 2));
    else {
        const uint8_t *codes = read_bytes(w.rows * w.columns);
        const float *scales = read_bytes(w.rows * groups(&w) * 4);
        const uint8_t *zeros = read_bytes(w.rows * groups(&w));
        const int64_t tiles = (w.rows + TILE - 1) / TILE;
        w.data = malloc(sizeof(uint32_t) * tiles * tile_words(&w));
        w.scales = malloc(sizeof(float) * tile_scales(&w, tiles));
        w.zero = zeros[0];
        if (n[7]) w.zeros = calloc(tile_zeros(&w, tiles), sizeof *w.zeros);
        quantkit_pack(&w, codes, scales, zeros, THREADS);
    }
    const float *x = read_bytes(m * w.columns * 4);
    float *prepared = malloc(sizeof *prepared * m * prepared_floats(&w)), *out = malloc(sizeof *out * m * w.rows);
    quantkit_matmul(&w, x, m, prepared, out, THREADS);
    write_floats(out, m * w.rows);
}

static void attend(void) {
    const int64_t *n = read_bytes(9 * sizeof *n), blocks = n[8], size = n[4] == F32 ? 4 : 2;
    const AttentionConfig config = {.heads = n[0], .kv_heads = n[1], .dim = n[2], .value_dim = n[3], .type = n[4], .scale = 0.3f};
    PagedBatch paged = {.sequences = n[5], .table_width = n[6], .block_size = n[7]};
    paged.block_table = read_bytes(paged.sequences * paged.table_width * 4);
    paged.query_start = read_bytes((paged.sequences + 1) * 4);
    paged.lengths = read_bytes(paged.sequences * 4);
    const int64_t queries = paged.query_start[paged.sequences], rows = blocks * paged.block_size * config.kv_heads;
    const KVArrays keys = {.data = read_bytes(rows * config.dim * size)};
    const KVArrays values = {.data = read_bytes(rows * config.value_dim * size)};
    const float *query = read_bytes(queries * config.heads * config.dim * 4);
    float *out = malloc(sizeof *out * queries * config.heads * config.value_dim);
    quantkit_paged_attention(&config, &paged, query, &keys, &values, out, THREADS);
    write_floats(out, queries * config.heads * config.value_dim);
}

int main(void) {
    for (int64_t kind; fread(&kind, sizeof kind, 1, stdin) == 1;) {
        if (kind) attend();
        else multiply();
    }
    return 0;
}
