/* Attention: computes the partial results of work items and merges them into outputs. */
#include "attention.h"
#include "threads.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

/* Floats of converted keys (or values) that a thread holds at a time. */
#define CHUNK_FLOATS 65536

/* A partial result is {maximum, sum, weighted value [padded_dim(value_dim)]}, the value in lane order (see vec.h). */
int64_t partial_floats(const AttentionConfig *config) { return 2 + padded_dim(config->value_dim); }

/* Slots of up to CHUNK keys from `first` on; keys from position `tail_start` on are read from tail pages. */
static void locate_keys(const PagedBatch *p, int64_t sequence, int64_t first, int64_t end, int64_t tail_start,
                        KeyChunk *keys) {
    const int32_t *table = p->block_table + sequence * p->table_width;
    int64_t block = first / p->block_size, offset = first % p->block_size;
    keys->first = first;
    keys->count = min_i64(CHUNK, end - first);
    keys->quantized = min_i64(keys->count, max_i64(0, tail_start - first));
    for (int64_t i = 0; i < keys->count; i++) {
        const int64_t page = i < keys->quantized ? table[block] : p->tail_page_ids[table[block]];
        keys->slots[i] = page * p->block_size + offset;
        if (++offset == p->block_size) offset = 0, block++;
    }
}

/* Rows that are multiplied at a time: with four vectors each, their sums fill most vector registers. */
#define BLOCK_ROWS (LANES == 16 ? 6 : 3)
#define MOST_BLOCK_ROWS 6

/* out [rows, vectors * LANES] = a [rows, count] @ b [count, vectors * LANES]; rows of b are b_stride floats apart, and so on.
   Each sum is over `count` in order. rows and vectors are compile-time constants. */
INLINE void block_product(int rows, int vectors, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                          int64_t count, float *out, int64_t out_stride) {
    vf acc[MOST_BLOCK_ROWS][4] = {0};
    for (int64_t k = 0; k < count; k++, b += b_stride) {
        vf column[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = load_once(b + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            const vf factor = splat(a[m * a_stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) acc[m][v] += factor * column[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(out + m * out_stride + v * LANES, acc[m][v]);
}

typedef void BlockProduct(const float *a, int64_t a_stride, const float *b, int64_t b_stride, int64_t count, float *out,
                          int64_t out_stride);

#define INSTANCE(ROWS, VECTORS)                                                                                             \
    static NOINLINE void product_##ROWS##_##VECTORS(const float *a, int64_t a_stride, const float *b, int64_t b_stride,     \
                                                    int64_t count, float *out, int64_t out_stride) {                        \
        block_product(ROWS, VECTORS, a, a_stride, b, b_stride, count, out, out_stride);                                     \
    }
#define INSTANCES(VECTORS)                                                                                                  \
    INSTANCE(1, VECTORS) INSTANCE(2, VECTORS) INSTANCE(3, VECTORS)                                                          \
    INSTANCE(4, VECTORS) INSTANCE(5, VECTORS) INSTANCE(6, VECTORS)
INSTANCES(2) INSTANCES(4)

/* By vectors / 4 and rows. */
static BlockProduct *const BLOCK_PRODUCT[2][MOST_BLOCK_ROWS + 1] = {
    {0, product_1_2, product_2_2, product_3_2, product_4_2, product_5_2, product_6_2},
    {0, product_1_4, product_2_4, product_3_4, product_4_4, product_5_4, product_6_4},
};

/* out [rows, width] = a [rows, count] @ b [count, width] for rows <= BLOCK_ROWS; width is a multiple of 2 * LANES. */
static void rows_product(int64_t rows, int64_t width, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                         int64_t count, float *out, int64_t out_stride) {
    for (int64_t n = 0, step; n < width; n += step) {
        step = width - n >= 4 * LANES ? 4 * LANES : 2 * LANES;
        BLOCK_PRODUCT[step == 4 * LANES][rows](a, a_stride, b + n, b_stride, count, out + n, out_stride);
    }
}

/* keys [CHUNK, dim] -> transposed [dim, CHUNK]. */
static NOINLINE void transpose_keys(const float *keys, int64_t dim, float *transposed) {
    for (int64_t d = 0; d < dim; d += LANES)
        for (int64_t j = 0; j < CHUNK; j += LANES) {
            vf block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) block[i] = load(keys + (j + i) * dim + d);
            transpose_lanes(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(transposed + (d + i) * CHUNK + j, block[i]);
        }
}

/* Turns scores into weights e^(score - maximum) for keys low .. high-1, and into 0 elsewhere. Sets the maximum and the sum of
   the partial result. */
static NOINLINE void softmax_weights(const AttentionConfig *config, float *scores, int64_t low, int64_t high, float *partial) {
    vf row[CHUNK / LANES], largest = splat(-INFINITY), sum = {0};
#pragma GCC unroll 8
    for (int v = 0; v < CHUNK / LANES; v++) {
        vf score = load(scores + v * LANES);
        if (config->softcap > 0) score = config->softcap * vec_tanh(score / config->softcap);
        const vi key = LANE_NUMBERS + v * LANES, visible = (key >= (int32_t)low) & (key < (int32_t)high);
        row[v] = vec_select(visible, score, splat(-INFINITY));
        largest = vec_max(row[v], largest);
    }
    const float maximum = lane_max(largest);
#pragma GCC unroll 8
    for (int v = 0; v < CHUNK / LANES; v++) {
        const vf weight = vec_select(row[v] == -INFINITY, splat(0), vec_exp(row[v] - maximum));
        store(scores + v * LANES, weight);
        sum += weight;
    }
    partial[0] = maximum;
    partial[1] = lane_sum(sum);
}

/* Merges a partial result of later keys into `total`; an empty one (maximum -inf) changes nothing. */
static NOINLINE void merge_partial(const AttentionConfig *config, float *total, const float *partial) {
    if (partial[0] == -INFINITY) return;
    const float later = partial[0] - total[0], keep = later > 0 ? expf(-later) : 1.0f, add = later > 0 ? 1.0f : expf(later);
    total[0] = later > 0 ? partial[0] : total[0];
    total[1] = total[1] * keep + partial[1] * add;
    for (int64_t d = 2; d < partial_floats(config); d += LANES)
        store(total + d, load(total + d) * keep + load(partial + d) * add);
}

static void clear_partial(const AttentionConfig *config, float *partial) {
    partial[0] = -INFINITY;
    memset(partial + 1, 0, sizeof(float) * (partial_floats(config) - 1));
}

/* Attends from all rows of a work item, query [heads, rows, padded_dim(dim)], to one chunk of keys and values, and merges the
   partial results into total [heads, rows]. The first row is at `position`. */
static void attend_chunk(const Attention *a, int64_t head, int64_t heads, const KeyChunk *keys, int64_t position, int64_t rows,
                         const float *query, float *const *total) {
    const AttentionConfig *config = a->config;
    const int64_t repeat = config->heads / config->kv_heads, dim = padded_dim(config->dim), size = partial_floats(config);
    const KVSide key_rows = key_side(config, a->paged, a->keys), value_rows = value_side(config, a->paged, a->values);
    float chunk[heads * CHUNK * max_i64(dim, size - 2)] __attribute__((aligned(64)));
    float transposed[dim * CHUNK] __attribute__((aligned(64)));
    float weights[heads * rows * CHUNK] __attribute__((aligned(64))), partial[heads * rows * size];
    int64_t low[rows], high[rows];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t end = position + r / repeat + 1 - keys->first; /* counted from the chunk's first key */
        low[r] = config->window ? max_i64(0, end - config->window) : 0;
        high[r] = min_i64(keys->count, end);
    }
    gather_rows(&key_rows, head, heads, keys, chunk);
    for (int64_t h = 0; h < heads; h++) {
        transpose_keys(chunk + h * CHUNK * dim, dim, transposed);
        for (int64_t r = 0, i = h * rows, count; r < rows; r += count, i += count) {
            count = even_block(rows - r, BLOCK_ROWS);
            const int64_t seen = high[r + count - 1]; /* later rows see more keys */
            if (seen <= 0) continue;
            rows_product(count, round_up(seen, 2 * LANES), query + i * dim, dim, transposed, CHUNK, dim, weights + i * CHUNK,
                         CHUNK);
            for (int64_t m = 0; m < count; m++)
                softmax_weights(config, weights + (i + m) * CHUNK, low[r + m], high[r + m], partial + (i + m) * size);
        }
    }
    gather_rows(&value_rows, head, heads, keys, chunk);
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0, i = h * rows, count; r < rows; r += count, i += count) {
            count = even_block(rows - r, BLOCK_ROWS);
            const int64_t from = low[r], seen = high[r + count - 1];
            if (seen <= from) continue;
            rows_product(count, size - 2, weights + i * CHUNK + from, CHUNK, chunk + (h * CHUNK + from) * (size - 2), size - 2,
                         seen - from, partial + i * size + 2, size);
            for (int64_t m = 0; m < count; m++) merge_partial(config, total[i + m], partial + (i + m) * size);
        }
}

/* Loads the queries of a work item for KV heads head .. head+heads-1 as [heads, rows, padded_dim(dim)], and points total
   [heads, rows] to their partial results, which are cleared. */
static void load_queries(const Attention *a, const WorkItem *item, int64_t head, int64_t heads, float *query, float **total) {
    const AttentionConfig *config = a->config;
    const int64_t repeat = config->heads / config->kv_heads, rows = item->count * repeat;
    for (int64_t i = 0; i < heads * rows; i++, query += padded_dim(config->dim)) {
        const int64_t token = item->query + i % rows / repeat, query_head = (head + i / rows) * repeat + i % repeat;
        const float *from = a->queries + token * a->query_stride + query_head * config->dim;
        if (lane_order(config->type) == F32) to_lane_order(F32, from, config->dim, config->scale, query);
        else to_lane_order(BF16, from, config->dim, config->scale, query);
        const int64_t slot = a->plan->first_slot[token] + item->part;
        total[i] = a->partials + (slot * config->heads + query_head) * partial_floats(config);
        clear_partial(config, total[i]);
    }
}

static void attend_item(const Attention *a, const WorkItem *item, int64_t head, int64_t heads) {
    const AttentionConfig *config = a->config;
    const PagedBatch *p = a->paged;
    const int64_t rows = item->count * (config->heads / config->kv_heads), s = item->sequence;
    const int64_t position = item->query + p->lengths[s] - p->query_start[s + 1];
    const int64_t end = min_i64(position + item->count, item->chunk_end * CHUNK);
    /* With tail pages, queries see their own page in 16 bit. All queries of an item are in the same page. */
    const int64_t tail_start = p->tail_page_ids ? position / p->block_size * p->block_size : end;
    /* No query sees the chunks before the first query's window. */
    int64_t chunk = config->window ? max_i64(item->chunk, (position - config->window + 1) / CHUNK) : item->chunk;
    float query[heads * rows * padded_dim(config->dim)], *total[heads * rows];
    KeyChunk keys;
    load_queries(a, item, head, heads, query, total);
    for (; chunk < item->chunk_end; chunk++) {
        locate_keys(p, s, chunk * CHUNK, end, tail_start, &keys);
        attend_chunk(a, head, heads, &keys, position, rows, query, total);
    }
}

/* KV heads that a thread processes at a time: one if there are fewer items than threads, else as many as CHUNK_FLOATS
   allows. */
static int64_t heads_per_pass(const Attention *a) {
    const AttentionConfig *config = a->config;
    if (a->plan->count < omp_get_num_threads()) return 1;
    const int64_t floats = CHUNK * padded_dim(max_i64(config->dim, config->value_dim));
    return min_i64(config->kv_heads, max_i64(1, CHUNK_FLOATS / floats));
}

void attend_share(const Attention *a) {
    /* Round robin, because later queries of a prompt see more keys. */
    const int64_t kv_heads = a->config->kv_heads, heads_at_once = heads_per_pass(a);
    const int64_t parts = (kv_heads + heads_at_once - 1) / heads_at_once;
    for (int64_t i = omp_get_thread_num(); i < a->plan->count * parts; i += omp_get_num_threads()) {
        const int64_t head = i % parts * heads_at_once;
        attend_item(a, a->plan->items + i / parts, head, min_i64(heads_at_once, kv_heads - head));
    }
}

void finish_query(const Attention *a, int64_t query, float *out) {
    const AttentionConfig *config = a->config;
    const int64_t size = partial_floats(config);
    float total[size];
    for (int64_t head = 0; head < config->heads; head++, out += config->value_dim) {
        clear_partial(config, total);
        for (int64_t slot = a->plan->first_slot[query]; slot < a->plan->first_slot[query + 1]; slot++)
            merge_partial(config, total, a->partials + (slot * config->heads + head) * size);
        float scale = total[1] > 0 ? 1.0f / total[1] : 0.0f; /* padding queries, at negative positions, see nothing */
        if (config->sinks) {
            const float sink = config->sinks[head], maximum = total[0] > sink ? total[0] : sink;
            const float keep = expf(total[0] - maximum);
            scale = keep / (total[1] * keep + expf(sink - maximum));
        }
        if (lane_order(config->type) == F32) from_lane_order(F32, total + 2, config->value_dim, scale, out);
        else from_lane_order(BF16, total + 2, config->value_dim, scale, out);
    }
}

typedef struct { Attention attention; float *out; } AttentionCall;

static void attention_body(void *argument) {
    const AttentionCall *c = argument;
    const Attention *a = &c->attention;
    attend_share(a);
    thread_barrier();
    for (Range r = thread_range(a->paged->query_start[a->paged->sequences]); r.first < r.last; r.first++)
        finish_query(a, r.first, c->out + r.first * a->config->heads * a->config->value_dim);
}

/* queries [tokens, heads, dim] -> out [tokens, heads, value_dim], both float. */
EXPORT void quantkit_paged_attention(const AttentionConfig *config, const PagedBatch *paged, const float *queries,
                                     const KVArrays *keys, const KVArrays *values, float *out, int threads) {
    AttentionPlan plan = make_plan(paged, config->heads / config->kv_heads);
    const int64_t slots = plan.first_slot[paged->query_start[paged->sequences]];
    float *partials = malloc(sizeof(float) * slots * config->heads * partial_floats(config));
    AttentionCall call = {{config, paged, &plan, queries, config->heads * config->dim, keys, values, partials}, out};
    run_threads(attention_body, &call, (unsigned)threads);
    free(partials);
    free_plan(&plan);
}
