/* Attention itself: pieces of work to partial results, and those to outputs. */
#include "attention.h"
#include "team.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

/* Converted keys (or values) that a thread holds at a time. */
#define CHUNK_FLOATS 65536

/* A partial result is {maximum, sum, weighted value [padded(value_dim)]}, the value in the order of `to_order`. */
int64_t partial_floats(const Heads *h) { return 2 + padded(h->value_dim); }

/* Keys from `first` on; those of pages from position `open` on are read from open pages. */
static void find_keys(const Pages *p, int64_t sequence, int64_t first, int64_t end, int64_t open, Keys *keys) {
    const int32_t *table = p->block_table + sequence * p->table_width;
    int64_t block = first / p->block_size, offset = first % p->block_size;
    keys->first = first;
    keys->count = smaller(CHUNK, end - first);
    keys->settled = smaller(keys->count, larger(0, open - first));
    for (int64_t i = 0; i < keys->count; i++) {
        const int64_t place = i < keys->settled ? table[block] : p->open_pages[table[block]];
        keys->slots[i] = place * p->block_size + offset;
        if (++offset == p->block_size) offset = 0, block++;
    }
}

/* Scores of one row against all CHUNK keys: lanes run along the head, 8 keys at a time. */
static NOINLINE void score(const float *query, const float *keys, int64_t dim, float *scores) {
    for (int64_t j = 0; j < CHUNK; j += 8) {
        vf acc[8] = {0};
        for (int64_t d = 0; d < dim; d += LANES) {
            vf q = load(query + d);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) acc[i] += q * load(keys + (j + i) * dim + d);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) scores[j + i] = lane_sum(acc[i]);
    }
}

/* Part of `weigh`: `vectors` vectors of the value, each a chain of additions of its own. */
INLINE void weigh_part(int vectors, const float *weights, const float *values, int64_t dim, int64_t low, int64_t high,
                       float *value) {
    vf acc[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) acc[v] = load(value + v * LANES);
    for (int64_t j = low; j < high; j++) {
        vf weight = splat(weights[j]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) acc[v] += weight * load(values + j * dim + v * LANES);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(value + v * LANES, acc[v]);
}

/* value += sum over keys of weights [CHUNK] times values [CHUNK, dim], for keys low .. high-1. */
static NOINLINE void weigh(const float *weights, const float *values, int64_t dim, int64_t low, int64_t high, float *value) {
    int64_t d = 0;
    for (; d + 8 * LANES <= dim; d += 8 * LANES) weigh_part(8, weights, values + d, dim, low, high, value + d);
    for (; d < dim; d += 2 * LANES) weigh_part(2, weights, values + d, dim, low, high, value + d);
}

/* scores -> weights e^(score - maximum) of keys low .. high-1, 0 elsewhere; partial: their maximum and sum, value 0. */
static NOINLINE void make_weights(const Heads *h, float *scores, int64_t low, int64_t high, float *partial) {
    vf most = splat(-INFINITY), sum = {0};
    if (h->softcap > 0)
        for (int64_t j = 0; j < CHUNK; j += LANES) store(scores + j, h->softcap * tanh_lanes(load(scores + j) / h->softcap));
    for (int64_t j = 0; j < low; j++) scores[j] = -INFINITY;
    for (int64_t j = high; j < CHUNK; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < CHUNK; j += LANES) most = at_least(load(scores + j), most);
    const float maximum = lane_maximum(most);
    for (int64_t j = 0; j < CHUNK; j += LANES) {
        const vf score = load(scores + j), weight = choose(score == -INFINITY, splat(0), exp_lanes(score - maximum));
        store(scores + j, weight);
        sum += weight;
    }
    partial[0] = maximum;
    partial[1] = lane_sum(sum);
    memset(partial + 2, 0, sizeof(float) * padded(h->value_dim));
}

/* total takes up a later partial result; an empty one (maximum -inf) changes nothing. */
static NOINLINE void merge(const Heads *h, float *total, const float *partial) {
    if (partial[0] == -INFINITY) return;
    const float maximum = total[0] > partial[0] ? total[0] : partial[0];
    const float keep = expf(total[0] - maximum), add = expf(partial[0] - maximum);
    total[0] = maximum;
    for (int64_t d = 1; d < partial_floats(h); d++) total[d] = total[d] * keep + partial[d] * add;
}

static void clear(const Heads *h, float *partial) {
    partial[0] = -INFINITY;
    memset(partial + 1, 0, sizeof(float) * (partial_floats(h) - 1));
}

/* One chunk for all rows of a piece, the first of which stands at `position`: query [heads, rows, padded(dim)] against keys
   and values, partial results merged into total [heads, rows]. */
static void attend_chunk(const Attention *a, int64_t head, int64_t heads, const Keys *keys, int64_t position, int64_t rows,
                         const float *query, float *const *total) {
    const Heads *h = a->heads;
    const int64_t repeat = h->heads / h->kv_heads, dim = padded(h->dim), size = partial_floats(h);
    const Side key_rows = key_side(h, a->pages, a->keys), value_rows = value_side(h, a->pages, a->values);
    float chunk[heads * CHUNK * larger(dim, size - 2)] __attribute__((aligned(64)));
    float weights[heads * rows * CHUNK], partial[heads * rows * size];
    int64_t low[rows], high[rows];
    for (int64_t r = 0; r < rows; r++) {
        const int64_t end = position + r / repeat + 1 - keys->first; /* in keys of this chunk */
        low[r] = h->window ? larger(0, end - h->window) : 0;
        high[r] = smaller(keys->count, end);
    }
    gather(&key_rows, head, heads, keys, chunk);
    for (int64_t i = 0; i < heads * rows; i++) {
        const int64_t r = i % rows;
        if (low[r] >= high[r]) continue;
        score(query + i * dim, chunk + i / rows * CHUNK * dim, dim, weights + i * CHUNK);
        make_weights(h, weights + i * CHUNK, low[r], high[r], partial + i * size);
    }
    gather(&value_rows, head, heads, keys, chunk);
    for (int64_t i = 0; i < heads * rows; i++) {
        const int64_t r = i % rows;
        if (low[r] >= high[r]) continue;
        weigh(weights + i * CHUNK, chunk + i / rows * CHUNK * (size - 2), size - 2, low[r], high[r], partial + i * size + 2);
        merge(h, total[i], partial + i * size);
    }
}

/* Queries of a piece and where their partial results go, for KV heads head .. head+heads-1: [heads, rows, ...]. */
static void fetch_queries(const Attention *a, const Piece *piece, int64_t head, int64_t heads, float *query, float **total) {
    const Heads *h = a->heads;
    const int64_t repeat = h->heads / h->kv_heads, rows = piece->count * repeat;
    for (int64_t i = 0; i < heads * rows; i++, query += padded(h->dim)) {
        const int64_t token = piece->query + i % rows / repeat, of = (head + i / rows) * repeat + i % repeat;
        const float *from = a->queries + token * a->query_stride + of * h->dim;
        if (order_of(h->type) == F32) to_order(F32, from, h->dim, h->scale, query);
        else to_order(BF16, from, h->dim, h->scale, query);
        total[i] = a->partials + ((a->plan->first_slot[token] + piece->part) * h->heads + of) * partial_floats(h);
        clear(h, total[i]);
    }
}

static void attend_piece(const Attention *a, const Piece *piece, int64_t head, int64_t heads) {
    const Heads *h = a->heads;
    const Pages *p = a->pages;
    const int64_t rows = piece->count * (h->heads / h->kv_heads), s = piece->sequence;
    const int64_t position = piece->query + p->lengths[s] - p->query_start[s + 1];
    const int64_t end = smaller(position + piece->count, piece->chunk_end * CHUNK);
    const int64_t open = p->open_pages ? position / p->block_size * p->block_size : end; /* of its own page on */
    /* Chunks before the first query's window are seen by nobody. */
    int64_t chunk = h->window ? larger(piece->chunk, (position - h->window + 1) / CHUNK) : piece->chunk;
    float query[heads * rows * padded(h->dim)], *total[heads * rows];
    Keys some;
    fetch_queries(a, piece, head, heads, query, total);
    for (; chunk < piece->chunk_end; chunk++) {
        find_keys(p, s, chunk * CHUNK, end, open, &some);
        attend_chunk(a, head, heads, &some, position, rows, query, total);
    }
}

/* KV heads that a piece takes at a time: all where that leaves no thread without work, but no more than a cache holds. */
static int64_t heads_at_once(const Attention *a) {
    const Heads *h = a->heads;
    if (a->plan->count < omp_get_num_threads()) return 1;
    const int64_t floats = CHUNK * padded(larger(h->dim, h->value_dim));
    return smaller(h->kv_heads, larger(1, CHUNK_FLOATS / floats));
}

void attend_share(const Attention *a) {
    /* Dealt out in turn, because later queries of a prompt see more keys. */
    const int64_t kv_heads = a->heads->kv_heads, most = heads_at_once(a), parts = (kv_heads + most - 1) / most;
    for (int64_t i = omp_get_thread_num(); i < a->plan->count * parts; i += omp_get_num_threads()) {
        const int64_t head = i % parts * most;
        attend_piece(a, a->plan->pieces + i / parts, head, smaller(most, kv_heads - head));
    }
}

void merge_query(const Attention *a, int64_t query, float *out) {
    const Heads *h = a->heads;
    const int64_t size = partial_floats(h);
    float total[size];
    for (int64_t head = 0; head < h->heads; head++, out += h->value_dim) {
        clear(h, total);
        for (int64_t slot = a->plan->first_slot[query]; slot < a->plan->first_slot[query + 1]; slot++)
            merge(h, total, a->partials + (slot * h->heads + head) * size);
        float scale = total[1] > 0 ? 1.0f / total[1] : 0.0f; /* a query before its sequence sees nothing */
        if (h->sinks) {
            const float maximum = total[0] > h->sinks[head] ? total[0] : h->sinks[head], keep = expf(total[0] - maximum);
            scale = keep / (total[1] * keep + expf(h->sinks[head] - maximum));
        }
        if (order_of(h->type) == F32) from_order(F32, total + 2, h->value_dim, scale, out);
        else from_order(BF16, total + 2, h->value_dim, scale, out);
    }
}

typedef struct { Attention attention; float *out; } AttentionCall;

static void attention_body(void *argument) {
    const AttentionCall *c = argument;
    const Attention *a = &c->attention;
    attend_share(a);
    wait_for_team();
    for (Range r = my_share(a->pages->query_start[a->pages->sequences]); r.first < r.last; r.first++)
        merge_query(a, r.first, c->out + r.first * a->heads->heads * a->heads->value_dim);
}

/* queries [tokens, heads, dim] -> out [tokens, heads, value_dim], both float. */
EXPORT void quantkit_paged_attention(const Heads *heads, const Pages *pages, const float *queries, const Store *keys,
                                     const Store *values, float *out, int threads) {
    Plan plan = make_plan(pages, heads->heads / heads->kv_heads);
    const int64_t slots = plan.first_slot[pages->query_start[pages->sequences]];
    float *partials = malloc(sizeof(float) * slots * heads->heads * partial_floats(heads));
    AttentionCall call = {{heads, pages, &plan, queries, heads->heads * heads->dim, keys, values, partials}, out};
    run_team(attention_body, &call, (unsigned)threads);
    free(partials);
    free_plan(&plan);
}
