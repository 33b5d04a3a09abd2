#include "matmul.h"
#include "team.h"
#include "vec.h"

/* Rows of x that are multiplied at a time: 6 x 2 accumulators, 2 weights and 1 input fit 16 vector registers. */
#define BLOCK 6
/* Words that are asked for ahead of their use. */
#define PREFETCH 1024
/* Rows of x that one unpacked panel serves. */
#define PANEL_ROWS 96

static int64_t at_most64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Columns of a packed group, and of all groups, with padding. */
static int64_t padded_group(const Matrix *w) { return round_up(w->group, 32 / w->bits); }
static int64_t groups(const Matrix *w) { return w->columns / w->group; }
static int64_t runs_in_group(const Matrix *w) { return (padded_group(w) + RUN - 1) / RUN; }
static int64_t padded_columns(const Matrix *w) { return groups(w) * padded_group(w); }

EXPORT int64_t quantkit_prepared_floats(const Matrix *w) { return prepared_floats(w); }

int64_t prepared_floats(const Matrix *w) {
    if (!w->bits) return round_up(w->columns, 2 * LANES);
    return padded_columns(w) + round_up(groups(w) * runs_in_group(w), LANES);
}

void prepare(const Matrix *w, const float *x, float *prepared) {
    if (!w->bits) {
        for (int64_t k = 0; k < round_up(w->columns, 2 * LANES); k++)
            prepared[w->type == F32 ? k : split_place(k)] = k < w->columns ? x[k] : 0;
        return;
    }
    const int fields = 32 / w->bits;
    const int64_t padded = padded_group(w);
    float factor[16], *sums = prepared + padded_columns(w);
    for (int j = 0; j < fields; j++) factor[j] = j == fields - 1 ? 1.0f : 1.0f / (float)(1u << j * w->bits);
    for (int64_t g = 0; g < groups(w); g++, x += w->group, prepared += padded) {
        for (int64_t first = 0; first < padded; first += RUN) {
            int64_t last = at_most64(first + RUN, padded), given = at_most64(last, w->group);
            float part[16] = {0}, sum = 0;
            for (int64_t k = first; k < last; k += fields)
                for (int j = 0; j < fields; j++) {
                    float value = k + j < given ? x[k + j] : 0;
                    part[j] += value;
                    prepared[k + j] = value * factor[j];
                }
            for (int j = 0; j < fields; j++) sum += part[j];
            *sums++ = sum;
        }
    }
}

/* Field j of each word as a float, times 2^(bits*j) except for the highest: one mask or one shift, one conversion. */
INLINE vf field(vu word, int bits, int j) {
    if (j == 32 / bits - 1) return __builtin_convertvector((vi)(word >> (32 - bits)), vf);
    return __builtin_convertvector((vi)(word & (((1u << bits) - 1) << (bits * j))), vf);
}

/* Weights are read once, in order, and faster than a processor's own prefetching brings them (measured: 7 instead of 14 GB/s
   a thread). Far enough for memory, near enough for the first cache; reading past the end only asks in vain. */
INLINE void prefetch_words(const uint32_t *words) {
    __builtin_prefetch(words + PREFETCH);
    __builtin_prefetch(words + PREFETCH + TILE / 2);
}

/* Sums of fields times x over `steps` words of columns (bits 0: over `steps` columns already unpacked, [steps, TILE] floats)
   for TILE weight rows and `rows` rows of x; sums [rows, TILE]. Constants of each instance: bits, rows. */
INLINE void run_sums(int bits, int rows, int64_t steps, const void *data, const float *x, int64_t x_stride, float *sums) {
    /* At least 8 chains of additions, to hide their latency, and at most 12, to fit the registers. */
    const int fields = bits ? 32 / bits : 1, vectors = rows <= 3 ? TILE / LANES : 2;
    for (int part = 0; part < TILE; part += vectors * LANES) {
        vf acc[BLOCK][TILE / LANES];
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[m][v] = (vf){0};
        for (int64_t step = 0; step < steps; step++) {
            const uint32_t *words = (const uint32_t *)data + step * TILE + part;
            if (bits) prefetch_words((const uint32_t *)data + step * TILE);
#pragma GCC unroll 16
            for (int j = 0; j < fields; j++) {
                vf weight[TILE / LANES];
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++)
                    weight[v] = bits ? field(load_words(words + v * LANES), bits, j) : load_once(words + v * LANES);
#pragma GCC unroll 8
                for (int m = 0; m < rows; m++) {
                    vf input = splat(x[m * x_stride + step * fields + j]);
#pragma GCC unroll 4
                    for (int v = 0; v < vectors; v++) acc[m][v] += input * weight[v];
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) store(sums + m * TILE + part + v * LANES, acc[m][v]);
    }
}

typedef void RunSums(int64_t steps, const void *data, const float *x, int64_t x_stride, float *sums);

#define INSTANCE(BITS, ROWS)                                                                                                \
    static NOINLINE void sums_##BITS##_##ROWS(int64_t steps, const void *data, const float *x,             \
                                                               int64_t x_stride, float *sums) {                             \
        run_sums(BITS, ROWS, steps, data, x, x_stride, sums);                                                               \
    }
#define INSTANCES(BITS)                                                                                                     \
    INSTANCE(BITS, 1) INSTANCE(BITS, 2) INSTANCE(BITS, 3) INSTANCE(BITS, 4) INSTANCE(BITS, 5)
INSTANCES(0) INSTANCE(0, 6) INSTANCES(2) INSTANCES(4) INSTANCES(8)

/* By bits / 2 (0: panel) and rows of x. */
static RunSums *const RUN_SUMS[5][BLOCK + 1] = {
    {0, sums_0_1, sums_0_2, sums_0_3, sums_0_4, sums_0_5, sums_0_6},
    {0, sums_2_1, sums_2_2, sums_2_3, sums_2_4, sums_2_5, 0},
    {0, sums_4_1, sums_4_2, sums_4_3, sums_4_4, sums_4_5, 0},
    {0},
    {0, sums_8_1, sums_8_2, sums_8_3, sums_8_4, sums_8_5, 0},
};

/* total += scale * (sum - zero * sum of x) for LANES weight rows and one run. */
INLINE void add_scaled(vf sum, vf scale, vf zero, float x_sum, float *total) {
    vf difference = sum - zero * x_sum;
    store(total, load(total) + scale * difference);
}

/* Zero points of group g from the words of a tile. */
INLINE vf zeros_of(const uint32_t *zeros, int64_t g) {
    return __builtin_convertvector((vi)(load_words(zeros + g / 4 * TILE) >> (uint32_t)(g % 4 * 8) & 0xffu), vf);
}

/* What one tile of a weight and some prepared rows of x are, with the counts that its loops need. */
typedef struct {
    const uint32_t *words;
    const float *scales;
    const uint32_t *zeros;
    const float *x;
    int64_t x_stride;
    int64_t groups, padded, columns; /* groups; columns of a group, and of all groups, with padding */
    int bits;
} Tile;

/* `add_scaled` for TILE weight rows and several rows of x; sums and totals [rows, TILE]. */
static void apply_scales(const Tile *t, int64_t g, int64_t rows, const float *sums, const float *x_sums, float *totals) {
    for (int v = 0; v < TILE; v += LANES) {
        const vf scale = load(t->scales + g * TILE + v), zero = zeros_of(t->zeros + v, g);
        for (int64_t m = 0; m < rows; m++)
            add_scaled(load(sums + m * TILE + v), scale, zero, x_sums[m * t->x_stride], totals + m * TILE + v);
    }
}

/* All columns of a tile for one row of x: two runs at a time have twice the independent chains of additions, and the same
   sums as one; totals [TILE]. Needs groups of at most RUN columns. */
INLINE void tile_one_row(int bits, const Tile *t, float *totals) {
    const int fields = 32 / bits;
    const int64_t steps = t->padded / fields;
    const uint32_t *words = t->words;
    const float *x = t->x, *x_sums = t->x + t->columns;
    for (int64_t g = 0; g < t->groups; g += 2) {
        vf acc[2][TILE / LANES] = {0};
        /* A last group without a pair is multiplied twice and used once. */
        const int64_t next = g + 1 < t->groups ? steps : 0;
        for (int64_t step = 0; step < steps; step++) {
            prefetch_words(words + step * TILE);
            prefetch_words(words + (next + step) * TILE);
#pragma GCC unroll 16
            for (int j = 0; j < fields; j++)
#pragma GCC unroll 2
                for (int run = 0; run < 2; run++) {
                    vf input = splat(x[(run * next + step) * fields + j]);
#pragma GCC unroll 4
                    for (int v = 0; v < TILE / LANES; v++)
                        acc[run][v] += input * field(load_words(words + (run * next + step) * TILE + v * LANES), bits, j);
                }
        }
        for (int run = 0; run < (next ? 2 : 1); run++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE; v += LANES)
                add_scaled(acc[run][v / LANES], load(t->scales + (g + run) * TILE + v), zeros_of(t->zeros + v, g + run),
                           x_sums[run], totals + v);
        words += 2 * steps * TILE;
        x += 2 * t->padded;
        x_sums += 2;
    }
}
static NOINLINE void tile_one_row_2(const Tile *t, float *totals) { tile_one_row(2, t, totals); }
static NOINLINE void tile_one_row_4(const Tile *t, float *totals) { tile_one_row(4, t, totals); }
static NOINLINE void tile_one_row_8(const Tile *t, float *totals) { tile_one_row(8, t, totals); }

/* All columns of a tile for fewer than BLOCK rows of x, fields unpacked on the way; totals [rows, TILE]. */
static void tile_direct(const Tile *t, int64_t rows, float *totals) {
    const int bits = t->bits, fields = 32 / bits;
    const float *x = t->x, *x_sums = t->x + t->columns;
    const uint32_t *words = t->words;
    float sums[BLOCK * TILE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < t->groups; g++)
        for (int64_t first = 0; first < t->padded; first += RUN, x_sums++) {
            int64_t steps = at_most64(RUN, t->padded - first) / fields;
            RUN_SUMS[bits / 2][rows](steps, words, x, t->x_stride, sums);
            apply_scales(t, g, rows, sums, x_sums, totals);
            words += steps * TILE;
            x += steps * fields;
        }
}

/* Size of the next block of `left` rows: as few blocks as possible, and none of them small. */
static int64_t even_block(int64_t left) {
    int64_t blocks = (left + BLOCK - 1) / BLOCK;
    return (left + blocks - 1) / blocks;
}

INLINE void unpack(int bits, const uint32_t *words, int64_t steps, float *panel) {
    const int fields = 32 / bits;
    for (int64_t step = 0; step < steps; step++) {
        prefetch_words(words + step * TILE);
#pragma GCC unroll 16
        for (int j = 0; j < fields; j++)
            for (int v = 0; v < TILE; v += LANES)
                store(panel + (step * fields + j) * TILE + v, field(load_words(words + step * TILE + v), bits, j));
    }
}

/* The same for many rows: each run is unpacked once into a panel that stays in the cache; m <= PANEL_ROWS. */
static void tile_by_panels(const Tile *t, int64_t m, float *totals) {
    const int bits = t->bits, fields = 32 / bits;
    const float *x = t->x, *x_sums = t->x + t->columns;
    const uint32_t *words = t->words;
    float panel[RUN * TILE] __attribute__((aligned(64))), sums[BLOCK * TILE] __attribute__((aligned(64)));
    for (int64_t g = 0; g < t->groups; g++)
        for (int64_t first = 0; first < t->padded; first += RUN, x_sums++) {
            int64_t columns = at_most64(RUN, t->padded - first), steps = columns / fields;
            if (bits == 2) unpack(2, words, steps, panel);
            else if (bits == 4) unpack(4, words, steps, panel);
            else unpack(8, words, steps, panel);
            for (int64_t row = 0, rows; row < m; row += rows) {
                rows = even_block(m - row);
                RUN_SUMS[0][rows](columns, panel, x + row * t->x_stride, t->x_stride, sums);
                apply_scales(t, g, rows, sums, x_sums + row * t->x_stride, totals + row * TILE);
            }
            words += steps * TILE;
            x += columns;
        }
}

/* One tile for up to PANEL_ROWS rows of x; totals [m, TILE]. */
static void tile_totals(const Tile *t, int64_t m, float *totals) {
    memset(totals, 0, sizeof(float) * m * TILE);
    if (m >= BLOCK) tile_by_panels(t, m, totals);
    else if (m > 1 || t->padded > RUN) tile_direct(t, m, totals);
    else if (t->bits == 2) tile_one_row_2(t, totals);
    else if (t->bits == 4) tile_one_row_4(t, totals);
    else tile_one_row_8(t, totals);
}

/* totals (+ bias) -> out, `count` of TILE. */
static void put_row(const float *totals, const float *bias, int64_t count, float *out) {
    if (!bias) memcpy(out, totals, sizeof(float) * count);
    else
        for (int64_t n = 0; n < count; n++) out[n] = totals[n] + bias[n];
}

static void packed_share(const Matrix *w, const float *prepared, int64_t m, float *out, int64_t out_stride) {
    Tile t = {.x_stride = prepared_floats(w), .groups = groups(w), .padded = padded_group(w), .columns = padded_columns(w),
              .bits = w->bits};
    const int64_t tile_words = t.columns / (32 / w->bits) * TILE;
    float totals[PANEL_ROWS * TILE] __attribute__((aligned(64)));
    for (Range r = my_share((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        const int64_t base = r.first * TILE, count = at_most64(TILE, w->rows - base);
        t.words = (const uint32_t *)w->data + r.first * tile_words;
        t.scales = w->scales + base * t.groups;
        t.zeros = w->zeros + base * ((t.groups + 3) / 4);
        for (int64_t row = 0, some; row < m; row += some) {
            some = at_most64(PANEL_ROWS, m - row);
            t.x = prepared + row * t.x_stride;
            tile_totals(&t, some, totals);
            for (int64_t i = 0; i < some; i++)
                put_row(totals + i * TILE, w->bias ? w->bias + base : NULL, count, out + (row + i) * out_stride + base);
        }
    }
}

/* One step of 2 * LANES columns: `count` rows of a dense weight times `rows` rows of x. */
INLINE void dense_step(int type, int count, int rows, const char *weight, int64_t weight_stride, const float *x,
                       int64_t x_stride, vf acc[8][4]) {
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        const char *from = weight + i * weight_stride;
        vu words = load_words(from);
        vf low = type == F32 ? (vf)words : even_half(words, type);
        vf high = type == F32 ? load((const float *)from + LANES) : odd_half(words, type);
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) {
            acc[i][m] += low * load(x + m * x_stride);
            acc[i][m] += high * load(x + m * x_stride + LANES);
        }
    }
}

/* Rows n .. n+count-1 of a dense weight times `rows` rows of x; lanes run along the columns. The tail is copied and padded
   by zeros, because the row behind it is another one's. Constants of each instance: type, count, rows. */
INLINE void dense_block(int type, int count, int rows, const Matrix *w, int64_t n, const float *x, int64_t x_stride, float *out,
                        int64_t out_stride) {
    enum { STEP = 2 * LANES };
    const int64_t size = type == F32 ? 4 : 2, whole = w->columns / STEP * STEP, stride = w->columns * size;
    const char *weight = (const char *)w->data + n * stride;
    vf acc[8][4];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) acc[i][m] = (vf){0};
    for (int64_t k = 0; k < whole; k += STEP) {
        const char *from = weight + k * size;
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) __builtin_prefetch(from + (count + i) * stride); /* the rows behind these */
        dense_step(type, count, rows, from, stride, x + k, x_stride, acc);
    }
    if (whole < w->columns) {
        char tail[8 * STEP * 4] = {0};
        for (int i = 0; i < count; i++)
            memcpy(tail + i * STEP * 4, weight + i * stride + whole * size, (w->columns - whole) * size);
        dense_step(type, count, rows, tail, STEP * 4, x + whole, x_stride, acc);
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
            out[m * out_stride + n + i] = lane_sum(acc[i][m]) + (w->bias ? w->bias[n + i] : 0.0f);
}

typedef void DenseBlock(const Matrix *w, int64_t n, const float *x, int64_t x_stride, float *out, int64_t out_stride);

#define DENSE(TYPE, COUNT, ROWS)                                                                                            \
    static NOINLINE void dense_##TYPE##_##COUNT##_##ROWS(const Matrix *w, int64_t n, const float *x,       \
                                                                          int64_t x_stride, float *out, int64_t out_stride) { \
        dense_block(TYPE, COUNT, ROWS, w, n, x, x_stride, out, out_stride);                                                 \
    }
#define DENSE_TYPE(TYPE)                                                                                                    \
    DENSE(TYPE, 1, 1) DENSE(TYPE, 1, 2) DENSE(TYPE, 1, 3) DENSE(TYPE, 1, 4) DENSE(TYPE, 8, 1) DENSE(TYPE, 4, 2)             \
    DENSE(TYPE, 3, 1) DENSE(TYPE, 3, 2) DENSE(TYPE, 3, 3) DENSE(TYPE, 3, 4)
#define DENSE_TABLE(TYPE)                                                                                                   \
    {[1] = {0, dense_##TYPE##_1_1, dense_##TYPE##_1_2, dense_##TYPE##_1_3, dense_##TYPE##_1_4},                             \
     [3] = {0, dense_##TYPE##_3_1, dense_##TYPE##_3_2, dense_##TYPE##_3_3, dense_##TYPE##_3_4},                             \
     [4] = {0, 0, dense_##TYPE##_4_2}, [8] = {0, dense_##TYPE##_8_1}}
DENSE_TYPE(F32) DENSE_TYPE(BF16) DENSE_TYPE(F16)

/* By type, rows of the weight and rows of x: at most 12 sums. */
static DenseBlock *const DENSE_BLOCK[3][9][5] = {DENSE_TABLE(F32), DENSE_TABLE(BF16), DENSE_TABLE(F16)};

static void dense_share(const Matrix *w, const float *x, int64_t m, float *out, int64_t out_stride) {
    const int64_t stride = prepared_floats(w), most = m == 1 ? 8 : m == 2 ? 4 : 3;
    Range r = my_share(w->rows);
    for (int64_t n = r.first, count; n < r.last; n += count) {
        count = n + most <= r.last ? most : 1;
        for (int64_t row = 0; row < m; row += 4)
            DENSE_BLOCK[w->type][count][at_most64(4, m - row)](w, n, x + row * stride, stride, out + row * out_stride, out_stride);
    }
}

void matmul_share(const Matrix *w, const float *prepared, int64_t m, float *out, int64_t out_stride) {
    if (w->bits) packed_share(w, prepared, m, out, out_stride);
    else dense_share(w, prepared, m, out, out_stride);
}

typedef struct { const Matrix *weight; const float *x; float *prepared, *out; int64_t m; } MatmulCall;

static void matmul_body(void *argument) {
    MatmulCall *c = argument;
    const int64_t stride = prepared_floats(c->weight);
    for (Range r = my_share(c->m); r.first < r.last; r.first++)
        prepare(c->weight, c->x + r.first * c->weight->columns, c->prepared + r.first * stride);
    GOMP_barrier();
    matmul_share(c->weight, c->prepared, c->m, c->out, c->weight->rows);
}

/* out [m, rows] = x [m, columns] @ weight^T + bias; prepared: room for m * prepared_floats(weight) floats. */
EXPORT void quantkit_matmul(const Matrix *weight, const float *x, int64_t m, float *prepared, float *out, int threads) {
    MatmulCall call = {weight, x, prepared, out, m};
    GOMP_parallel(matmul_body, &call, (unsigned)threads, 0);
}

typedef struct { const Matrix *w; const uint8_t *codes, *zeros; const float *scales; } PackCall;

/* Codes of row `row` (NULL: a row of padding) into place n of a tile. */
static void pack_row(const Matrix *w, const uint8_t *codes, uint32_t *words) {
    const int fields = 32 / w->bits;
    for (int64_t g = 0; g < groups(w); g++)
        for (int64_t k = 0; k < padded_group(w); k += fields, words += TILE) {
            uint32_t word = 0;
            for (int64_t j = 0; codes && j < at_most64(fields, w->group - k); j++)
                word |= (uint32_t)codes[g * w->group + k + j] << j * w->bits;
            *words = word;
        }
}

static void pack_body(void *argument) {
    const PackCall *c = argument;
    const Matrix *w = c->w;
    const int64_t all = groups(w), quads = (all + 3) / 4, tile_words = padded_columns(w) / (32 / w->bits) * TILE;
    for (Range r = my_share((w->rows + TILE - 1) / TILE); r.first < r.last; r.first++) {
        float *scales = (float *)w->scales + r.first * all * TILE;
        uint32_t *zeros = (uint32_t *)w->zeros + r.first * quads * TILE;
        memset(zeros, 0, sizeof *zeros * quads * TILE);
        for (int64_t n = 0; n < TILE; n++) {
            const int64_t row = r.first * TILE + n;
            const int given = row < w->rows;
            pack_row(w, given ? c->codes + row * w->columns : 0, (uint32_t *)w->data + r.first * tile_words + n);
            for (int64_t g = 0; g < all; g++) {
                scales[g * TILE + n] = given ? c->scales[row * all + g] : 0;
                zeros[g / 4 * TILE + n] |= (given ? (uint32_t)c->zeros[row * all + g] : 0) << g % 4 * 8;
            }
        }
    }
}

/* codes uint8 [rows, columns], scales float [rows, groups], zeros uint8 [rows, groups] -> the weight's arrays. */
EXPORT void quantkit_pack(const Matrix *weight, const uint8_t *codes, const float *scales, const uint8_t *zeros, int threads) {
    PackCall call = {weight, codes, zeros, scales};
    GOMP_parallel(pack_body, &call, (unsigned)threads, 0);
}

typedef struct { const Matrix *w; void *out; int64_t first, count; int type; } UnpackCall;

static void unpack_body(void *argument) {
    const UnpackCall *c = argument;
    const Matrix *w = c->w;
    const int fields = 32 / w->bits;
    const int64_t all = groups(w), words_in_group = padded_group(w) / fields;
    for (Range r = my_share(c->count); r.first < r.last; r.first++) {
        const int64_t row = c->first + r.first, tile = row / TILE, n = row % TILE;
        const uint32_t *words = (const uint32_t *)w->data + tile * all * words_in_group * TILE + n;
        for (int64_t k = 0; k < w->columns; k++) {
            const int64_t g = k / w->group, j = k % w->group;
            const uint32_t word = words[(g * words_in_group + j / fields) * TILE] >> j % fields * w->bits;
            const int code = (int)(word & ((1u << w->bits) - 1));
            const int zero = (int)(w->zeros[(tile * ((all + 3) / 4) + g / 4) * TILE + n] >> g % 4 * 8 & 0xffu);
            const float value = (float)(code - zero) * w->scales[(tile * all + g) * TILE + n];
            if (c->type == F32) ((float *)c->out)[r.first * w->columns + k] = value;
            else ((uint16_t *)c->out)[r.first * w->columns + k] = to_bf16(value);
        }
    }
}

/* Rows first .. first+count-1 of a packed weight as floats, or rounded to bf16: out [count, columns]. */
EXPORT void quantkit_dequantize(const Matrix *weight, int64_t first, int64_t count, int type, void *out, int threads) {
    UnpackCall call = {weight, out, first, count, type};
    GOMP_parallel(unpack_body, &call, (unsigned)threads, 0);
}
