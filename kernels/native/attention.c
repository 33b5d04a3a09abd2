/* Attention itself: pieces of work to partial results, and those to outputs. */
#include "attention.h"
#include "team.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

static int64_t padded(int64_t dim) { return round_up(dim, 2 * LANES); }

/* A partial result is {maximum, sum, weighted value [padded(value_dim)]}, the value in the order of `convert_row`. */
int64_t partial_floats(const Heads *h) { return 2 + padded(h->value_dim); }

/* Up to CHUNK keys of a sequence: positions first .. first+count-1, and their slots in the caches. */
typedef struct { int64_t first, count, slots[CHUNK]; } Keys;

static void find_keys(const Pages *p, int64_t sequence, int64_t first, int64_t end, Keys *keys) {
    const int32_t *table = p->block_table + sequence * p->table_width;
    int64_t block = first / p->block_size, offset = first % p->block_size;
    keys->first = first;
    keys->count = smaller(CHUNK, end - first);
    for (int64_t i = 0; i < keys->count; i++) {
        keys->slots[i] = table[block] * p->block_size + offset;
        if (++offset == p->block_size) offset = 0, block++;
    }
}

/* One KV head of a cache: a slot's row is `stride` bytes from the next slot's. */
typedef struct { const char *rows; int64_t stride, dim, size; } Plane; /* size: bytes of an element */

static Plane plane_of(const Heads *h, const void *cache, int64_t dim, int64_t head) {
    const int64_t size = h->type == F32 ? 4 : 2;
    return (Plane){(const char *)cache + head * dim * size, h->kv_heads * dim * size, dim, size};
}

/* Ask for the rows of some keys: they lie apart, and the processor does not foresee the next. */
static void ask(const Plane *plane, const Keys *keys) {
    for (int64_t i = 0; i < keys->count; i++)
        for (int64_t byte = 0; byte < plane->dim * plane->size; byte += 64)
            __builtin_prefetch(plane->rows + keys->slots[i] * plane->stride + byte);
}

/* The rows of some keys as floats, padded by zeros: [count, padded(dim)]; 16-bit types with even and odd elements apart. */
INLINE void gather_as(int type, const Plane *plane, const Keys *keys, float *to) {
    const int64_t whole = plane->dim / (2 * LANES) * (2 * LANES), width = padded(plane->dim), size = plane->size;
    char tail[2 * LANES * 4] = {0};
    for (int64_t i = 0; i < keys->count; i++, to += width) {
        const char *row = plane->rows + keys->slots[i] * plane->stride;
        for (int64_t d = 0; d < width; d += 2 * LANES) {
            const char *at = row + d * size;
            if (d == whole) at = memcpy(tail, at, (plane->dim - whole) * size);
            vu words = load_words(at);
            store(to + d, type == F32 ? (vf)words : even_half(words, type));
            store(to + d + LANES, type == F32 ? load((const float *)at + LANES) : odd_half(words, type));
        }
    }
}

static NOINLINE void gather(int64_t type, const Plane *plane, const Keys *keys, float *to) {
    if (type == BF16) gather_as(BF16, plane, keys, to);
    else if (type == F16) gather_as(F16, plane, keys, to);
    else gather_as(F32, plane, keys, to);
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

/* scores -> weights e^(score - maximum) of keys low .. high-1, 0 elsewhere; a partial result takes them up (online softmax:
   its sum and value shrink where the maximum grows). */
static NOINLINE void take_up(const Heads *h, float *scores, int64_t low, int64_t high, float *partial) {
    vf most = splat(partial[0]), sum = {0};
    if (h->softcap > 0)
        for (int64_t j = 0; j < CHUNK; j += LANES) store(scores + j, h->softcap * tanh_lanes(load(scores + j) / h->softcap));
    for (int64_t j = 0; j < low; j++) scores[j] = -INFINITY;
    for (int64_t j = high; j < CHUNK; j++) scores[j] = -INFINITY;
    for (int64_t j = 0; j < CHUNK; j += LANES) most = at_least(load(scores + j), most);
    const float maximum = lane_maximum(most);
    const float shrink = partial[0] == maximum ? 1.0f : expf(partial[0] - maximum);
    for (int64_t j = 0; j < CHUNK; j += LANES) {
        const vf score = load(scores + j), weight = choose(score == -INFINITY, splat(0), exp_lanes(score - maximum));
        store(scores + j, weight);
        sum += weight;
    }
    partial[0] = maximum;
    partial[1] = partial[1] * shrink + lane_sum(sum);
    if (shrink != 1.0f)
        for (int64_t d = 0; d < padded(h->value_dim); d++) partial[2 + d] *= shrink;
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

/* One chunk for all rows: scores, weights, weighted values into `local`, a partial result a row. `next` is asked for. */
static void attend_chunk(const Heads *h, const Plane *key_plane, const Plane *value_plane, const Keys *now, const Keys *next,
                         int64_t position, int64_t rows, const float *query, float *local) {
    const int64_t repeat = h->heads / h->kv_heads, dim = padded(h->dim), size = partial_floats(h);
    float chunk[CHUNK * larger(dim, size - 2)] __attribute__((aligned(64))), weights[rows * CHUNK];
    int64_t low[rows], high[rows];
    gather(h->type, key_plane, now, chunk);
    ask(key_plane, next);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t end = position + r / repeat + 1 - now->first; /* in keys of this chunk */
        low[r] = h->window ? larger(0, end - h->window) : 0;
        high[r] = smaller(now->count, end);
        if (low[r] >= high[r]) continue;
        score(query + r * dim, chunk, dim, weights + r * CHUNK);
        take_up(h, weights + r * CHUNK, low[r], high[r], local + r * size);
    }
    gather(h->type, value_plane, now, chunk);
    ask(value_plane, next);
    for (int64_t r = 0; r < rows; r++)
        if (low[r] < high[r]) weigh(weights + r * CHUNK, chunk, size - 2, low[r], high[r], local + r * size + 2);
}

/* Queries of a piece, scaled, [rows, padded(dim)]: all heads of the KV head for each token. */
static void fetch_queries(const Attention *a, const Piece *piece, int64_t kv_head, float *to) {
    const Heads *h = a->heads;
    const int64_t repeat = h->heads / h->kv_heads, dim = padded(h->dim);
    memset(to, 0, sizeof(float) * piece->count * repeat * dim);
    for (int64_t r = 0; r < piece->count * repeat; r++, to += dim) {
        const int64_t token = piece->query + r / repeat, head = kv_head * repeat + r % repeat;
        const float *from = a->queries + token * a->query_stride + head * h->dim;
        for (int64_t d = 0; d < h->dim; d++) to[h->type == F32 ? d : split_place(d)] = h->scale * from[d];
    }
}

static void attend_piece(const Attention *a, const Piece *piece, int64_t kv_head) {
    const Heads *h = a->heads;
    const Pages *p = a->pages;
    const int64_t repeat = h->heads / h->kv_heads, rows = piece->count * repeat, size = partial_floats(h);
    const int64_t s = piece->sequence;
    const int64_t position = piece->query + p->lengths[s] - p->query_start[s + 1], end = position + piece->count;
    const Plane key_plane = plane_of(h, a->keys, h->dim, kv_head), value_plane = plane_of(h, a->values, h->value_dim, kv_head);
    /* Chunks before the first query's window are seen by nobody. */
    int64_t chunk = h->window ? larger(piece->chunk, (position - h->window + 1) / CHUNK) : piece->chunk;
    Keys some[2];
    find_keys(p, s, chunk * CHUNK, smaller(end, piece->chunk_end * CHUNK), &some[0]);
    ask(&key_plane, &some[0]);
    ask(&value_plane, &some[0]);
    float query[rows * padded(h->dim)], local[rows * size], *total[rows];
    fetch_queries(a, piece, kv_head, query);
    for (int64_t r = 0; r < rows; r++) {
        const int64_t slot = a->plan->first_slot[piece->query + r / repeat] + piece->part;
        total[r] = a->partials + (slot * h->heads + kv_head * repeat + r % repeat) * size;
        clear(h, total[r]);
        clear(h, local + r * size);
    }
    for (int now = 0; chunk < piece->chunk_end; chunk++, now = !now) {
        find_keys(p, s, (chunk + 1) * CHUNK, smaller(end, piece->chunk_end * CHUNK), &some[!now]);
        attend_chunk(h, &key_plane, &value_plane, &some[now], &some[!now], position, rows, query, local);
        if ((chunk + 1) % SPAN == 0 || chunk + 1 == piece->chunk_end)
            for (int64_t r = 0; r < rows; r++) {
                merge(h, total[r], local + r * size);
                clear(h, local + r * size);
            }
    }
}

void attend_share(const Attention *a, int64_t *counter) {
    /* One by one throughout: later queries of a prompt see more keys. */
    const int64_t kv_heads = a->heads->kv_heads, count = a->plan->count * kv_heads;
    for (int64_t i; (i = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED)) < count;)
        attend_piece(a, a->plan->pieces + i / kv_heads, i % kv_heads);
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
        for (int64_t d = 0; d < h->value_dim; d++) out[d] = scale * total[2 + (h->type == F32 ? d : split_place(d))];
    }
}

typedef struct { Attention attention; float *out; int64_t counter; } AttentionCall;

static void attention_body(void *argument) {
    AttentionCall *c = argument;
    const Attention *a = &c->attention;
    attend_share(a, &c->counter);
    wait_for_team();
    for (Range r = my_share(a->pages->query_start[a->pages->sequences]); r.first < r.last; r.first++)
        merge_query(a, r.first, c->out + r.first * a->heads->heads * a->heads->value_dim);
}

/* queries [tokens, heads, dim] -> out [tokens, heads, value_dim], both float. */
EXPORT void quantkit_paged_attention(const Heads *heads, const Pages *pages, const float *queries, const void *keys,
                                     const void *values, float *out, int threads) {
    Plan plan = make_plan(pages, heads->heads / heads->kv_heads);
    const int64_t slots = plan.first_slot[pages->query_start[pages->sequences]];
    float *partials = malloc(sizeof(float) * slots * heads->heads * partial_floats(heads));
    AttentionCall call = {{heads, pages, &plan, queries, heads->heads * heads->dim, keys, values, partials}, out, 0};
    run_team(attention_body, &call, (unsigned)threads);
    free(partials);
    free_plan(&plan);
}
