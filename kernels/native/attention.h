/* Causal attention over a paged KV cache, and the write into it.

   key_cache [blocks, block_size, kv_heads, dim], value_cache [blocks, block_size, kv_heads, value_dim], of `type`.
   CHUNK keys at a time are converted and scored, and give each query a partial result: a maximum, a sum and a weighted
   value. Partial results are merged in the order of the keys, wherever they were computed. So a query's result depends
   neither on its neighbours in the batch nor on the number of threads. */
#ifndef QUANTKIT_ATTENTION_H
#define QUANTKIT_ATTENTION_H

#include <stdint.h>

/* Keys that are read and scored together. */
#define CHUNK 64

/* Queries q = query_start[s] .. query_start[s+1]-1 are the last tokens of sequence s; keys are in blocks of a table. */
typedef struct {
    const int32_t *block_table; /* [sequences, table_width] */
    const int32_t *query_start; /* [sequences + 1] */
    const int32_t *lengths;     /* [sequences], new tokens included */
    int64_t sequences, table_width, block_size;
} Pages;

typedef struct {
    const float *sinks; /* [heads] or NULL: a logit that takes weight and has no value */
    int64_t heads, kv_heads, dim, value_dim;
    int64_t window;     /* keys that a query sees, itself included; 0: all */
    int64_t type;       /* of the caches */
    float scale, softcap;
} Heads;

/* `count` queries from `query` on against chunks chunk .. chunk_end-1 of keys; `part` numbers pieces of the same queries. */
typedef struct { int32_t sequence, query, count, chunk, chunk_end, part; } Piece;

/* All work of a batch; each piece is done once for every KV head. */
typedef struct {
    Piece *pieces;
    int64_t count;
    int32_t *first_slot; /* [queries + 1]: query q has partial results first_slot[q] .. first_slot[q+1]-1, one a part */
} Plan;

Plan make_plan(const Pages *pages, int64_t heads_per_kv_head);
void free_plan(Plan *plan);

/* Floats of one partial result (one slot, one query head). */
int64_t partial_floats(const Heads *heads);

/* The attention of one layer. */
typedef struct {
    const Heads *heads;
    const Pages *pages;
    const Plan *plan;
    const float *queries; /* [queries, heads * dim], rows query_stride apart */
    int64_t query_stride;
    const void *keys, *values; /* the caches */
    float *partials;           /* [slots, heads, partial_floats] */
} Attention;

/* This thread's share of the plan, into `partials`. */
void attend_share(const Attention *attention);

/* Result of one query from its partial results: out [heads * value_dim]. */
void merge_query(const Attention *attention, int64_t query, float *out);

/* row [width] into a slot of a cache of `type`. */
void write_slot(void *cache, int64_t type, int64_t slot, int64_t width, const float *row);

#endif
