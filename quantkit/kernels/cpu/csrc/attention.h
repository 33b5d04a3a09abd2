/* Causal attention over a paged KV cache.

   CHUNK keys at a time are converted to floats and scored. Each chunk gives each query a partial result: a maximum, a sum and
   a weighted value. Partial results are merged in the order of the keys, whichever thread computed them. So a query's result
   depends neither on the other queries of the batch nor on the number of threads. */
#ifndef QUANTKIT_ATTENTION_H
#define QUANTKIT_ATTENTION_H

#include "kv_cache.h"

/* `count` queries from `query` on against chunks chunk .. chunk_end-1 of keys; `part` numbers the items of the same
   queries. */
typedef struct { int32_t sequence, query, count, chunk, chunk_end, part; } WorkItem;

/* All work of a batch; each item is done once per KV head. */
typedef struct {
    WorkItem *items;
    int64_t count;
    int32_t *first_slot; /* [queries + 1]: query q has partial results first_slot[q] .. first_slot[q+1]-1, one per part */
} AttentionPlan;

AttentionPlan make_plan(const PagedBatch *paged, int64_t heads_per_kv_head);
void free_plan(AttentionPlan *plan);

/* Floats of one partial result (one slot, one query head). */
int64_t partial_floats(const AttentionConfig *config);

/* The attention of one layer. */
typedef struct {
    const AttentionConfig *config;
    const PagedBatch *paged;
    const AttentionPlan *plan;
    const float *queries; /* [queries, heads * dim], rows query_stride apart */
    int64_t query_stride;
    const KVArrays *keys, *values;
    float *partials; /* [slots, heads, partial_floats] */
} Attention;

/* This thread's part of the plan; writes `partials`. */
void attend_share(const Attention *attention);

/* Merges the partial results of one query: out [heads * value_dim]. */
void finish_query(const Attention *attention, int64_t query, float *out);

#endif
