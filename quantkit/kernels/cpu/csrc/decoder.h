/* A decoder-only transformer as plain data, and a batch for it. structs.py mirrors these structures field for field. */
#ifndef QUANTKIT_DECODER_H
#define QUANTKIT_DECODER_H

#include "kv_cache.h"
#include "matrix.h"

enum { SILU = 0, GELU_TANH = 1, GELU = 2 };

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *pre_attention_norm, *post_attention_norm; /* [hidden_size] or NULL */
    const float *pre_mlp_norm, *post_mlp_norm;             /* [hidden_size] or NULL */
    const float *query_norm, *key_norm; /* [dim]: per head; [heads * dim]: over all heads; or NULL */
    AttentionConfig attention;
    int64_t norm_all_heads;
    int64_t rope;          /* index into the model's ropes */
    int64_t down_hadamard; /* block of the Hadamard transform of down's inputs, or 0 */
    KVArrays keys, values;
} Layer;

/* Rotary position embedding: elements i and i + pairs of a head (i < pairs) are rotated by position * frequencies[i] and
   multiplied by `scaling`; elements from 2 * pairs on are unchanged. */
typedef struct { const float *frequencies; int64_t pairs; float scaling; } Rope;

typedef struct {
    const void *embedding; /* [vocabulary, hidden_size], of a dense type; its rows are multiplied by embedding_scale */
    const Layer *layers;
    const Rope *ropes;
    const float *norm; /* [hidden_size] */
    Matrix head;
    int64_t layer_count, rope_count, hidden_size, intermediate_size, activation, embedding_type;
    float epsilon, residual, embedding_scale;
} Decoder;

typedef struct {
    PagedBatch paged;
    const int64_t *token_ids;  /* [tokens] */
    const int64_t *positions;  /* [tokens] */
    const int64_t *slots;      /* [tokens], -1: not written */
    const int64_t *logit_rows; /* [rows], different tokens */
    int64_t tokens, rows;
    const int64_t *measured; /* [measured_count], tokens whose queries are wanted, for the attention mass */
    float *queries;          /* [layers, measured_count, heads * dim], normed and rotated */
    int64_t measured_count;
} Batch;

#endif
