/* Causal attention over a paged KV cache, and the write into it.

   Keys and values are stored as reference.py and kv_store.py say, [blocks, block_size, kv_heads, dim or value_dim].
   CHUNK keys at a time are converted and scored, and give each query a partial result: a maximum, a sum and a weighted
   value. Partial results are merged in the order of the keys, wherever they were computed. So a query's result depends
   neither on its neighbours in the batch nor on the number of threads. */
#ifndef QUANTKIT_ATTENTION_H
#define QUANTKIT_ATTENTION_H

#include "vec.h"

#include <stdint.h>

/* Keys that are read and scored together. */
#define CHUNK 64

/* Queries q = query_start[s] .. query_start[s+1]-1 are the last tokens of sequence s; keys are in blocks of a table. */
typedef struct {
    const int32_t *block_table; /* [sequences, table_width] */
    const int32_t *query_start; /* [sequences + 1] */
    const int32_t *lengths;     /* [sequences], new tokens included */
    const int32_t *open_pages;  /* [blocks] or NULL: where I4 has a block's 16-bit page */
    int64_t sequences, table_width, block_size;
    int64_t draft;              /* I4: read upper planes only */
} Pages;

/* Keys or values of a layer. */
typedef struct {
    void *data;       /* numbers; codes of I8 [.., dim] and I4 [.., dim / 2] */
    uint16_t *params; /* halves: {scale, minimum} of a token and head, or scales [dim] and minima [dim] of a page and head */
    uint8_t *lower;   /* I4 with 4 more bits: [.., dim / 2], or NULL */
    uint16_t *open;   /* I4: [open pages, block_size, kv_heads, dim] bfloat16 */
} Store;

typedef struct {
    const float *sinks; /* [heads] or NULL: a logit that takes weight and has no value */
    int64_t heads, kv_heads, dim, value_dim;
    int64_t window;     /* keys that a query sees, itself included; 0: all */
    int64_t type;       /* of the caches, see vec.h */
    float scale, softcap;
} Heads;

/* A store and how it is laid out. */
typedef struct { const Store *store; const Pages *pages; int64_t type, kv_heads, dim, by_channel; } Side;

INLINE Side key_side(const Heads *h, const Pages *pages, const Store *store) {
    return (Side){store, pages, h->type, h->kv_heads, h->dim, h->type == I4};
}
INLINE Side value_side(const Heads *h, const Pages *pages, const Store *store) {
    return (Side){store, pages, h->type, h->kv_heads, h->value_dim, 0};
}

/* Up to CHUNK keys of a sequence from position `first` on, and their slots. Of I4 the first `settled` are read from the
   quantized pages, the others from open ones, and their slots are those of the open pages. */
typedef struct { int64_t first, count, settled, slots[CHUNK]; } Keys;

/* Floats of a converted row of `dim` numbers. */
INLINE int64_t padded(int64_t dim) { return round_up(dim, 2 * LANES); }

/* Rows of some keys, KV heads head .. head+heads-1, as floats [heads, CHUNK, padded(dim)]; of 16-bit types with even and odd
   elements apart. Read in the order in which they lie, all heads of a key together: the processor then fetches ahead, and
   memory gives twice as much. */
void gather(const Side *side, int64_t head, int64_t heads, const Keys *keys, float *to);

/* The order of `gather`, for what meets its rows. */
INLINE int order_of(int64_t type) { return type == BF16 || type == F16 ? BF16 : F32; }

/* row [kv_heads * dim] into a slot; of I4 into its open page. */
void write_row(const Side *side, int64_t slot, const float *row);

/* Quantizes the page of a slot, if it is the page's last and all others are written. */
void settle_slot(const Side *side, int64_t slot);

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
    const Store *keys, *values;
    float *partials; /* [slots, heads, partial_floats] */
} Attention;

/* This thread's share of the plan, into `partials`. */
void attend_share(const Attention *attention);

/* Result of one query from its partial results: out [heads * value_dim]. */
void merge_query(const Attention *attention, int64_t query, float *out);

#endif
