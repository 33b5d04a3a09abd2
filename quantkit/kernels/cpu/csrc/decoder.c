/* All layers of a decoder-only transformer for one batch of tokens, in one parallel region.

   Model families differ in data only: a norm that a family lacks is NULL, and a window of 0 means no window. Activations are
   float. Steps that work token by token (norms, residuals, activation) are split over the threads by token. With a single
   token, each thread does them all itself, which is cheaper than waiting for one thread to do them. */
#include "decoder.h"
#include "attention.h"
#include "dense.h"
#include "hadamard.h"
#include "matmul.h"
#include "threads.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

/* Tokens that go through an MLP at a time: few enough for its widest activations to stay in the cache of a core. */
#define MLP_TOKENS 96

/* What all threads share during a forward pass. `widest` is the size of the widest row of any step. */
typedef struct {
    const Decoder *model;
    const Batch *batch;
    AttentionPlan plan;
    float *hidden;     /* [threads or 1, tokens, hidden_size] */
    float *prepared;   /* inputs of a matrix; for a single token, [threads, widest] */
    float *row;        /* [threads, widest] */
    float *projected;  /* output of qkv for all tokens, and of gate_up for up to MLP_TOKENS */
    float *delta;      /* [tokens, hidden_size]: output of out and of down */
    float *rope_table; /* [ropes, tokens, rope_width]: cosines, then sines */
    float *partials;   /* of the attention */
    float *logits;     /* [rows, vocabulary] */
    int64_t widest, rope_width;
} Forward;

/* What one thread works on: its tokens and its buffers. */
typedef struct {
    const Forward *forward;
    Range tokens;
    float *hidden, *prepared, *row;
    int single_token;
    int64_t rows;              /* tokens that still have to be computed: all; after the keys of the last layer, those of logits */
    const int64_t *row_tokens; /* [rows], their numbers; NULL: all */
} Worker;

static int64_t row_token(const Worker *w, int64_t row) { return w->row_tokens ? w->row_tokens[row] : row; }

/* This thread's part of `count` rows. With a single token, each thread processes it itself. */
static Range row_range(const Worker *w, int64_t count) { return w->single_token ? (Range){0, count} : thread_range(count); }

static void rms_norm(const float *x, const float *weight, int64_t n, float epsilon, float *out) {
    float part[16] = {0}, sum = 0;
    const int64_t whole = n / 16 * 16;
    for (int64_t i = 0; i < whole; i += 16)
        for (int j = 0; j < 16; j++) part[j] += x[i + j] * x[i + j];
    for (int64_t i = whole; i < n; i++) part[i - whole] += x[i] * x[i];
    for (int j = 0; j < 16; j++) sum += part[j];
    const float factor = 1.0f / sqrtf(sum / (float)n + epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

/* row [2 * n], the gate and then the up half -> out [n] = activation(gate) * up. */
static void activate(int64_t kind, const float *row, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf gate = load_partial(row + i, n - i);
        if (kind == SILU) gate = gate / (1.0f + vec_exp(-gate));
        else if (kind == GELU_TANH)
            gate = 0.5f * gate * (1.0f + vec_tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
        else
            for (int j = 0; j < LANES; j++) gate[j] = 0.5f * gate[j] * (1.0f + erff(gate[j] * 0.7071067812f));
        store_partial(out + i, gate * load_partial(row + n + i, n - i), n - i);
    }
}

/* Cosines, then sines, of a position for one rope. */
static void fill_rope_row(const Rope *rope, int64_t position, float *rope_row) {
    for (int64_t i = 0; i < rope->pairs; i++) {
        const float angle = (float)position * rope->frequencies[i];
        rope_row[i] = cosf(angle) * rope->scaling;
        rope_row[rope->pairs + i] = sinf(angle) * rope->scaling;
    }
}

static void rotate(float *head, const float *rope_row, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = head[i], b = head[i + pairs], cosine = rope_row[i], sine = rope_row[i + pairs];
        head[i] = a * cosine - b * sine;
        head[i + pairs] = b * cosine + a * sine;
    }
}

static void norm_heads(const Layer *l, const float *weight, float *heads, int64_t count, float epsilon) {
    const int64_t dim = l->attention.dim;
    if (l->norm_all_heads) rms_norm(heads, weight, count * dim, epsilon, heads);
    else
        for (int64_t h = 0; h < count; h++) rms_norm(heads + h * dim, weight, dim, epsilon, heads + h * dim);
}

/* Norms and rotates a token's queries and keys in place, and writes its keys and values to the cache. */
static void rotate_and_store(const Forward *f, const Layer *l, int64_t token) {
    const AttentionConfig *a = &l->attention;
    const int64_t slot = f->batch->slots[token], pairs = f->model->ropes[l->rope].pairs;
    const float *rope_row = f->rope_table + (l->rope * f->batch->tokens + token) * f->rope_width;
    float *query = f->projected + token * l->qkv.rows, *key = query + a->heads * a->dim, *value = key + a->kv_heads * a->dim;
    if (l->query_norm) norm_heads(l, l->query_norm, query, a->heads, f->model->epsilon);
    if (l->key_norm) norm_heads(l, l->key_norm, key, a->kv_heads, f->model->epsilon);
    for (int64_t i = 0; i < a->heads + a->kv_heads; i++) /* the keys follow the queries in memory */
        rotate(query + i * a->dim, rope_row, pairs);
    if (slot < 0) return;
    const KVSide keys = key_side(a, &f->batch->paged, &l->keys), values = value_side(a, &f->batch->paged, &l->values);
    write_token(&keys, slot, key);
    write_token(&values, slot, value);
}

/* Quantizes the pages that this batch has filled. */
static void quantize_full_pages(const Forward *f, const Layer *l) {
    const KVSide keys = key_side(&l->attention, &f->batch->paged, &l->keys);
    const KVSide values = value_side(&l->attention, &f->batch->paged, &l->values);
    for (Range r = thread_range(f->batch->tokens); r.first < r.last; r.first++) {
        quantize_if_full(&keys, f->batch->slots[r.first]);
        quantize_if_full(&values, f->batch->slots[r.first]);
    }
}

/* For the token of one row: if `add`, hidden += residual * delta, normed with delta_norm unless that is NULL. Then, if there is a
   next matrix, prepares the hidden state for it as its row `next_row`, normed with `norm` unless that is NULL. */
static void add_residual_norm(const Worker *w, int64_t row, int64_t next_row, int add, const float *delta_norm,
                              const float *norm, const Matrix *next) {
    const Decoder *model = w->forward->model;
    const int64_t n = model->hidden_size;
    float *hidden = w->hidden + row_token(w, row) * n, *delta = w->forward->delta + row * n;
    if (add) {
        if (delta_norm) rms_norm(delta, delta_norm, n, model->epsilon, w->row);
        else memcpy(w->row, delta, sizeof(float) * n);
        for (int64_t i = 0; i < n; i++) hidden[i] += model->residual * w->row[i];
    }
    if (!next) return;
    if (norm) rms_norm(hidden, norm, n, model->epsilon, w->row);
    prepare(next, norm ? w->row : hidden, w->prepared + next_row * prepared_floats(next));
}

/* Waits until all threads have processed their tokens. With a single token, each thread has processed it itself. */
static void token_barrier(const Worker *w) {
    if (!w->single_token) thread_barrier();
}

/* Multiplies `count` prepared rows. */
static void project(const Worker *w, const Matrix *matrix, int64_t count, float *out) {
    token_barrier(w);
    matmul_share(matrix, w->prepared, count, out);
    thread_barrier();
}

static void attention(const Worker *w, const Layer *l) {
    const Forward *f = w->forward;
    const Attention a = {&l->attention, &f->batch->paged, &f->plan, f->projected, l->qkv.rows,
                         &l->keys, &l->values, f->partials};
    for (Range r = thread_range(f->batch->tokens); r.first < r.last; r.first++) rotate_and_store(f, l, r.first);
    thread_barrier();
    const int64_t measured = f->batch->measured_count, layer = l - f->model->layers;
    const int64_t width = l->attention.heads * l->attention.dim;
    for (Range r = thread_range(measured); r.first < r.last; r.first++)
        memcpy(f->batch->queries + (layer * measured + r.first) * width,
               f->projected + f->batch->measured[r.first] * l->qkv.rows, sizeof(float) * width);
    if (l->attention.type == I4) {
        quantize_full_pages(f, l);
        thread_barrier();
    }
    attend_share(&a);
    thread_barrier();
    for (Range r = row_range(w, w->rows); r.first < r.last; r.first++) {
        finish_query(&a, row_token(w, r.first), w->row);
        prepare(&l->out, w->row, w->prepared + r.first * prepared_floats(&l->out));
    }
    project(w, &l->out, w->rows, f->delta);
}

/* The MLP of rows first .. first+count-1. */
static void mlp(const Worker *w, const Layer *l, int64_t first, int64_t count) {
    const Forward *f = w->forward;
    const int64_t inner = f->model->intermediate_size;
    const Range mine = row_range(w, count);
    for (int64_t t = mine.first; t < mine.last; t++)
        add_residual_norm(w, first + t, t, 1, l->post_attention_norm, l->pre_mlp_norm, &l->gate_up);
    project(w, &l->gate_up, count, f->projected);
    for (int64_t t = mine.first; t < mine.last; t++) {
        activate(f->model->activation, f->projected + t * 2 * inner, inner, w->row);
        hadamard_row(w->row, inner, l->down_hadamard);
        prepare(&l->down, w->row, w->prepared + t * prepared_floats(&l->down));
    }
    project(w, &l->down, count, f->delta + first * f->model->hidden_size);
}

/* Logits of the rows that the batch asks for. */
static void head(const Worker *w) {
    const Forward *f = w->forward;
    const Decoder *model = f->model;
    const Range rows = row_range(w, f->batch->rows);
    token_barrier(w); /* the last residual of every row has been added */
    for (int64_t i = rows.first; i < rows.last; i++) {
        const float *hidden = w->hidden + f->batch->logit_rows[i] * model->hidden_size;
        rms_norm(hidden, model->norm, model->hidden_size, model->epsilon, w->row);
        prepare(&model->head, w->row, w->prepared + i * prepared_floats(&model->head));
    }
    token_barrier(w);
    matmul_share(&model->head, w->prepared, f->batch->rows, f->logits);
}

static void forward_body(void *argument) {
    const Forward *f = argument;
    const Decoder *model = f->model;
    const int64_t tokens = f->batch->tokens, me = omp_get_thread_num();
    Worker w = {.forward = f, .single_token = tokens == 1, .row = f->row + me * f->widest, .rows = tokens};
    w.tokens = row_range(&w, tokens);
    w.hidden = f->hidden + (w.single_token ? me * model->hidden_size : 0);
    w.prepared = f->prepared + (w.single_token ? me * f->widest : 0);
    for (Range r = thread_range(tokens); r.first < r.last; r.first++) /* read after the next barriers only */
        for (int64_t i = 0; i < model->rope_count; i++)
            fill_rope_row(model->ropes + i, f->batch->positions[r.first],
                          f->rope_table + (i * tokens + r.first) * f->rope_width);
    for (int64_t t = w.tokens.first, n = model->hidden_size; t < w.tokens.last; t++)
        embed_row(model->embedding_type, model->embedding, f->batch->token_ids[t], n, model->embedding_scale,
                  w.hidden + t * n);
    const float *delta_norm = NULL;
    for (int64_t i = 0; i < model->layer_count; i++) {
        const Layer *l = model->layers + i;
        for (int64_t t = w.tokens.first; t < w.tokens.last; t++)
            add_residual_norm(&w, t, t, i > 0, delta_norm, l->pre_attention_norm, &l->qkv);
        project(&w, &l->qkv, tokens, f->projected);
        if (i == model->layer_count - 1) {
            w.rows = f->batch->rows;
            w.row_tokens = f->batch->logit_rows;
        }
        attention(&w, l);
        for (int64_t first = 0; first < w.rows; first += MLP_TOKENS) mlp(&w, l, first, min_i64(MLP_TOKENS, w.rows - first));
        delta_norm = l->post_mlp_norm;
    }
    for (Range r = row_range(&w, w.rows); r.first < r.last; r.first++)
        add_residual_norm(&w, r.first, 0, 1, delta_norm, NULL, NULL);
    head(&w);
}

/* Floats of the widest rows, prepared or not, that are kept for all tokens, and for the tokens in an MLP; rounded up to a cache
   line. */
typedef struct { int64_t token, mlp; } Widths;

static Widths widest_rows(const Decoder *m) {
    Widths widest = {max_i64(m->hidden_size, prepared_floats(&m->head)), 0};
    for (int64_t i = 0; i < m->layer_count; i++) {
        const Layer *l = m->layers + i;
        widest.token = max_i64(widest.token, max_i64(l->qkv.rows, max_i64(prepared_floats(&l->qkv), prepared_floats(&l->out))));
        widest.mlp = max_i64(widest.mlp, max_i64(l->gate_up.rows, max_i64(prepared_floats(&l->gate_up), prepared_floats(&l->down))));
    }
    return (Widths){round_up(widest.token, 16), round_up(widest.mlp, 16)};
}

/* Writes the logits [rows, vocabulary] of a batch. Returns 0, or -1 if memory cannot be allocated. */
EXPORT int quantkit_decoder_forward(const Decoder *model, const Batch *batch, float *logits, int threads) {
    const AttentionConfig *attention = &model->layers[0].attention;
    const Widths widths = widest_rows(model);
    Forward f = {.model = model, .batch = batch, .logits = logits, .widest = max_i64(widths.token, widths.mlp)};
    f.plan = make_plan(&batch->paged, attention->heads / attention->kv_heads);
    for (int64_t i = 0; i < model->rope_count; i++) f.rope_width = max_i64(f.rope_width, 2 * model->ropes[i].pairs);
    const int64_t copies = batch->tokens == 1 ? threads : 1, tokens = batch->tokens;
    const int64_t rows = max_i64(tokens * widths.token, min_i64(tokens, MLP_TOKENS) * widths.mlp);
    const int64_t sizes[7] = {copies * tokens * model->hidden_size, tokens == 1 ? threads * f.widest : rows,
                              threads * f.widest, rows, tokens * model->hidden_size,
                              model->rope_count * tokens * f.rope_width,
                              (int64_t)f.plan.first_slot[tokens] * attention->heads * partial_floats(attention)};
    float **const buffers[7] = {&f.hidden, &f.prepared, &f.row, &f.projected, &f.delta, &f.rope_table, &f.partials};
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += round_up(sizes[i], 16);
    float *workspace = aligned_alloc(64, sizeof(float) * total);
    if (!workspace) {
        free_plan(&f.plan);
        return -1;
    }
    total = 0;
    for (int i = 0; i < 7; i++) {
        *buffers[i] = workspace + total;
        total += round_up(sizes[i], 16);
    }
    run_threads(forward_body, &f, (unsigned)threads);
    free(workspace);
    free_plan(&f.plan);
    return 0;
}
