/* A decoder-only transformer as plain data, and a batch for it; structs.py lays out the same. */
#ifndef QUANTKIT_DECODER_H
#define QUANTKIT_DECODER_H

#include "attention.h"
#include "matmul.h"

enum { SILU = 0, GELU_TANH = 1, GELU = 2 };

typedef struct {
    Matrix qkv, out, gate_up, down;
    const float *norm_attention, *norm_attention_out; /* before and behind attention, [hidden] or NULL */
    const float *norm_mlp, *norm_mlp_out;             /* before and behind the MLP, [hidden] or NULL */
    const float *norm_query, *norm_key;               /* [dim]: per head; [heads * dim]: over all heads; or NULL */
    Heads heads;
    int64_t norm_all_heads;
    int64_t rope; /* which of the model's */
    int64_t down_hadamard; /* block of the Hadamard transform of down's inputs, or 0 */
    Store keys, values;
} Layer;

/* Rotary position embedding: element i < pairs of a head turns with element i + pairs by position * frequencies[i]; both
   are multiplied by `scaling`; further elements stay. */
typedef struct { const float *frequencies; int64_t pairs; float scaling; } Rope;

typedef struct {
    const void *embedding; /* [vocabulary, hidden], of a dense type; its rows are multiplied by embedding_scale */
    const Layer *layers;
    const Rope *ropes;
    const float *norm; /* [hidden] */
    Matrix head;
    int64_t layer_count, rope_count, hidden, inner, activation, embedding_type;
    float epsilon, residual, embedding_scale;
} Decoder;

typedef struct {
    Pages pages;
    const int64_t *token_ids;  /* [tokens] */
    const int64_t *positions;  /* [tokens] */
    const int64_t *slots;      /* [tokens], -1: not written */
    const int64_t *logit_rows; /* [rows], rows <= tokens */
    int64_t tokens, rows;
    const int64_t *measured; /* [measured_count], tokens whose queries are wanted */
    float *queries;          /* [layers, measured_count, heads * dim], normed and rotated */
    int64_t measured_count;
} Batch;

#endif
