/* The paged KV cache of one layer: how it is laid out, reading rows as floats, and writing tokens.

   reference.py and quantized_kv.py say what is stored: [blocks, block_size, kv_heads, dim or value_dim]. */
#ifndef QUANTKIT_KV_CACHE_H
#define QUANTKIT_KV_CACHE_H

#include "vec.h"

#include <stdint.h>

/* Keys that are read and scored together. */
#define CHUNK 64

/* Queries q = query_start[s] .. query_start[s+1]-1 are the last tokens of sequence s. A sequence's keys lie in the blocks that
   its row of the block table lists. */
typedef struct {
    const int32_t *block_table;   /* [sequences, table_width] */
    const int32_t *query_start;   /* [sequences + 1] */
    const int32_t *lengths;       /* [sequences], new tokens included */
    const int32_t *tail_page_ids; /* [blocks] or NULL; I4: which tail page holds a block's 16-bit copy */
    int64_t sequences, table_width, block_size;
    int64_t draft;                /* I4: read the upper 4 bits only */
} PagedBatch;

/* The arrays that hold the keys, or the values, of a layer. */
typedef struct {
    void *data;           /* numbers; or codes, of I8 [.., dim] and of I4 [.., dim / 2] */
    uint16_t *params;     /* halves: {scale, minimum} per token and head, or scales [dim] and minima [dim] per page and head */
    uint8_t *lower;       /* I4 with 4 more bits: the lower 4 bits [.., dim / 2]; or NULL */
    uint16_t *tail_pages; /* I4: [tail pages, block_size, kv_heads, dim] bfloat16 */
} KVArrays;

typedef struct {
    const float *sinks; /* [heads] or NULL: a logit that takes weight and has no value */
    int64_t heads, kv_heads, dim, value_dim;
    int64_t window;     /* keys that a query sees, its own included; 0: all */
    int64_t type;       /* of the caches, see vec.h */
    float scale, softcap;
} AttentionConfig;

/* One side of the cache, keys or values: its arrays and how they are laid out. */
typedef struct { const KVArrays *arrays; const PagedBatch *paged; int64_t type, kv_heads, dim, by_channel; } KVSide;

INLINE KVSide key_side(const AttentionConfig *config, const PagedBatch *paged, const KVArrays *arrays) {
    return (KVSide){arrays, paged, config->type, config->kv_heads, config->dim, config->type == I4};
}
INLINE KVSide value_side(const AttentionConfig *config, const PagedBatch *paged, const KVArrays *arrays) {
    return (KVSide){arrays, paged, config->type, config->kv_heads, config->value_dim, 0};
}

/* Up to CHUNK keys of a sequence from position `first` on, and their slots. For I4 the first `quantized` keys are read from
   quantized pages and the others from tail pages; the slots of the latter count in tail pages. */
typedef struct { int64_t first, count, quantized, slots[CHUNK]; } KeyChunk;

/* Floats that a converted row of `dim` numbers takes. */
INLINE int64_t padded_dim(int64_t dim) { return round_up(dim, 2 * LANES); }

/* Rows of a chunk for KV heads head .. head+heads-1, as floats [heads, CHUNK, padded_dim(dim)]; for 16-bit types, even and odd
   elements are apart. Rows are read in memory order, all heads of a key together: the processor then prefetches them, which
   doubles the bandwidth. */
void gather_rows(const KVSide *side, int64_t head, int64_t heads, const KeyChunk *keys, float *to);

/* The type (BF16 or F32) whose lane order `gather_rows` produces for a cache type. Queries are put into the same order. */
INLINE int lane_order(int64_t type) { return type == BF16 || type == F16 ? BF16 : F32; }

/* Writes row [kv_heads * dim] into a slot; for I4 into the slot's tail page. */
void write_token(const KVSide *side, int64_t slot, const float *row);

/* For I4: if the slot is the last one of its page, quantizes the page. The page's other slots must have been written. */
void quantize_if_full(const KVSide *side, int64_t slot);

#endif
