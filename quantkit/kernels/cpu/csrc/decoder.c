/* All layers of a decoder-only transformer for one batch of tokens, in one parallel region.

   Differences between model families are data: a norm that a family lacks is NULL, a window of 0 is none. Activations are
   float. Steps that go token by token (norms, residuals, activation) are shared out by tokens; with a single token every
   thread does them for itself instead, which is cheaper than waiting for one. */
#include "decoder.h"
#include "hadamard.h"
#include "team.h"
#include "vec.h"

#include <math.h>
#include <stdlib.h>

/* What all threads share during a forward. */
typedef struct {
    const Decoder *model;
    const Batch *batch;
    Plan plan;
    float *hidden;   /* [threads or 1, tokens, hidden] */
    float *prepared; /* [threads or 1, tokens, widest] */
    float *row;      /* [threads, widest] */
    float *wide;     /* [tokens, widest]: output of qkv and of gate_up */
    float *delta;    /* [tokens, hidden]: output of out and of down */
    float *turns;    /* [ropes, tokens, turn_width]: cosines, then sines */
    float *partials;
    float *logits;   /* [rows, vocabulary] */
    int64_t widest, turn_width;
} Forward;

/* What one thread uses: its tokens and its buffers. */
typedef struct {
    const Forward *all;
    Range tokens;
    float *hidden, *prepared, *row;
    int alone;
} Worker;

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

/* row [2 * n], gate before up -> out [n] = activation(gate) * up. */
static void activate(int64_t kind, const float *row, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf gate = load_some(row + i, n - i);
        if (kind == SILU) gate = gate / (1.0f + exp_lanes(-gate));
        else if (kind == GELU_TANH)
            gate = 0.5f * gate * (1.0f + tanh_lanes(0.7978845608f * (gate + 0.044715f * gate * gate * gate)));
        else
            for (int j = 0; j < LANES; j++) gate[j] = 0.5f * gate[j] * (1.0f + erff(gate[j] * 0.7071067812f));
        store_some(out + i, gate * load_some(row + n + i, n - i), n - i);
    }
}

/* Cosines and sines of a token's position for one rope. */
static void make_turn(const Rope *rope, int64_t position, float *turn) {
    for (int64_t i = 0; i < rope->pairs; i++) {
        const float angle = (float)position * rope->frequencies[i];
        turn[i] = cosf(angle) * rope->scaling;
        turn[rope->pairs + i] = sinf(angle) * rope->scaling;
    }
}

static void rotate(float *head, const float *turn, int64_t pairs) {
    for (int64_t i = 0; i < pairs; i++) {
        const float a = head[i], b = head[i + pairs], cosine = turn[i], sine = turn[i + pairs];
        head[i] = a * cosine - b * sine;
        head[i + pairs] = b * cosine + a * sine;
    }
}

static void norm_heads(const Layer *l, const float *weight, float *heads, int64_t count, float epsilon) {
    const int64_t dim = l->heads.dim;
    if (l->norm_all_heads) rms_norm(heads, weight, count * dim, epsilon, heads);
    else
        for (int64_t h = 0; h < count; h++) rms_norm(heads + h * dim, weight, dim, epsilon, heads + h * dim);
}

/* Norm and rotate a token's queries and keys in place; keys and values go to the cache. */
static void place_token(const Forward *f, const Layer *l, int64_t token) {
    const Heads *h = &l->heads;
    const int64_t slot = f->batch->slots[token], pairs = f->model->ropes[l->rope].pairs;
    const float *turn = f->turns + (l->rope * f->batch->tokens + token) * f->turn_width;
    float *query = f->wide + token * l->qkv.rows, *key = query + h->heads * h->dim, *value = key + h->kv_heads * h->dim;
    if (l->norm_query) norm_heads(l, l->norm_query, query, h->heads, f->model->epsilon);
    if (l->norm_key) norm_heads(l, l->norm_key, key, h->kv_heads, f->model->epsilon);
    for (int64_t i = 0; i < h->heads + h->kv_heads; i++) /* keys lie behind the queries */
        rotate(query + i * h->dim, turn, pairs);
    if (slot < 0) return;
    const Side keys = key_side(h, &f->batch->pages, &l->keys), values = value_side(h, &f->batch->pages, &l->values);
    write_row(&keys, slot, key);
    write_row(&values, slot, value);
}

/* Quantize the pages that this batch has filled. */
static void settle_pages(const Forward *f, const Layer *l) {
    const Side keys = key_side(&l->heads, &f->batch->pages, &l->keys);
    const Side values = value_side(&l->heads, &f->batch->pages, &l->values);
    for (Range r = my_share(f->batch->tokens); r.first < r.last; r.first++) {
        settle_slot(&keys, f->batch->slots[r.first]);
        settle_slot(&values, f->batch->slots[r.first]);
    }
}

/* hidden += residual * (normed) delta, for a token; then its (normed) hidden state, prepared for the next matrix. */
static void enter(const Worker *w, int64_t token, const float *norm_delta, const float *norm, const Matrix *next, int add) {
    const Decoder *model = w->all->model;
    const int64_t n = model->hidden;
    float *hidden = w->hidden + token * n, *delta = w->all->delta + token * n;
    if (add) {
        if (norm_delta) rms_norm(delta, norm_delta, n, model->epsilon, w->row);
        else memcpy(w->row, delta, sizeof(float) * n);
        for (int64_t i = 0; i < n; i++) hidden[i] += model->residual * w->row[i];
    }
    if (!next) return;
    if (norm) rms_norm(hidden, norm, n, model->epsilon, w->row);
    prepare(next, norm ? w->row : hidden, w->prepared + token * prepared_floats(next));
}

/* All threads have done their tokens. */
static void meet(const Worker *w) {
    if (!w->alone) wait_for_team();
}

static void project(const Worker *w, const Matrix *matrix, float *out) {
    meet(w);
    matmul_share(matrix, w->prepared, w->all->batch->tokens, out);
    wait_for_team();
}

static void attention(const Worker *w, const Layer *l) {
    const Forward *f = w->all;
    const Attention a = {&l->heads, &f->batch->pages, &f->plan, f->wide, l->qkv.rows, &l->keys, &l->values, f->partials};
    for (Range r = my_share(f->batch->tokens); r.first < r.last; r.first++) place_token(f, l, r.first);
    wait_for_team();
    const int64_t measured = f->batch->measured_count, layer = l - f->model->layers, width = l->heads.heads * l->heads.dim;
    for (Range r = my_share(measured); r.first < r.last; r.first++)
        memcpy(f->batch->queries + (layer * measured + r.first) * width, f->wide + f->batch->measured[r.first] * l->qkv.rows,
               sizeof(float) * width);
    if (l->heads.type == I4) {
        settle_pages(f, l);
        wait_for_team();
    }
    attend_share(&a);
    wait_for_team();
    for (int64_t t = w->tokens.first; t < w->tokens.last; t++) {
        merge_query(&a, t, w->row);
        prepare(&l->out, w->row, w->prepared + t * prepared_floats(&l->out));
    }
    project(w, &l->out, f->delta);
}

static void mlp(const Worker *w, const Layer *l) {
    const Forward *f = w->all;
    const int64_t inner = f->model->inner;
    for (int64_t t = w->tokens.first; t < w->tokens.last; t++)
        enter(w, t, l->norm_attention_out, l->norm_mlp, &l->gate_up, 1);
    project(w, &l->gate_up, f->wide);
    for (int64_t t = w->tokens.first; t < w->tokens.last; t++) {
        activate(f->model->activation, f->wide + t * 2 * inner, inner, w->row);
        hadamard_row(w->row, inner, l->down_hadamard);
        prepare(&l->down, w->row, w->prepared + t * prepared_floats(&l->down));
    }
    project(w, &l->down, f->delta);
}

/* Logits of the chosen rows. */
static void head(const Worker *w) {
    const Forward *f = w->all;
    const Decoder *model = f->model;
    const Range rows = w->alone ? (Range){0, f->batch->rows} : my_share(f->batch->rows);
    meet(w); /* every token's last residual is in place */
    for (int64_t i = rows.first; i < rows.last; i++) {
        rms_norm(w->hidden + f->batch->logit_rows[i] * model->hidden, model->norm, model->hidden, model->epsilon, w->row);
        prepare(&model->head, w->row, w->prepared + i * prepared_floats(&model->head));
    }
    meet(w);
    matmul_share(&model->head, w->prepared, f->batch->rows, f->logits);
}

static void forward_body(void *argument) {
    const Forward *f = argument;
    const Decoder *model = f->model;
    const int64_t tokens = f->batch->tokens, me = omp_get_thread_num();
    Worker w = {.all = f, .alone = tokens == 1, .row = f->row + me * f->widest};
    w.tokens = w.alone ? (Range){0, tokens} : my_share(tokens);
    w.hidden = f->hidden + (w.alone ? me * model->hidden : 0);
    w.prepared = f->prepared + (w.alone ? me * f->widest : 0);
    for (Range r = my_share(tokens); r.first < r.last; r.first++) /* read behind the next barriers */
        for (int64_t i = 0; i < model->rope_count; i++)
            make_turn(model->ropes + i, f->batch->positions[r.first], f->turns + (i * tokens + r.first) * f->turn_width);
    for (int64_t t = w.tokens.first, n = model->hidden; t < w.tokens.last; t++)
        embed_row(model->embedding_type, model->embedding, f->batch->token_ids[t], n, model->embedding_scale, w.hidden + t * n);
    const float *norm_delta = NULL;
    for (int64_t i = 0; i < model->layer_count; i++) {
        const Layer *l = model->layers + i;
        for (int64_t t = w.tokens.first; t < w.tokens.last; t++) enter(&w, t, norm_delta, l->norm_attention, &l->qkv, i > 0);
        project(&w, &l->qkv, f->wide);
        attention(&w, l);
        mlp(&w, l);
        norm_delta = l->norm_mlp_out;
    }
    for (int64_t t = w.tokens.first; t < w.tokens.last; t++) enter(&w, t, norm_delta, NULL, NULL, 1);
    head(&w);
}

/* Floats of the widest row of any step, prepared or not; a multiple of a cache line. */
static int64_t widest_row(const Decoder *m) {
    int64_t widest = larger(m->hidden, prepared_floats(&m->head));
    for (int64_t i = 0; i < m->layer_count; i++) {
        const Layer *l = m->layers + i;
        widest = larger(widest, larger(l->qkv.rows, l->gate_up.rows));
        widest = larger(widest, larger(prepared_floats(&l->qkv), prepared_floats(&l->out)));
        widest = larger(widest, larger(prepared_floats(&l->gate_up), prepared_floats(&l->down)));
    }
    return round_up(widest, 16);
}

/* Logits [rows, vocabulary] of a batch; returns 0, or -1 without memory. */
EXPORT int quantkit_decoder_forward(const Decoder *model, const Batch *batch, float *logits, int threads) {
    const Heads *heads = &model->layers[0].heads;
    Forward f = {.model = model, .batch = batch, .logits = logits, .widest = widest_row(model)};
    f.plan = make_plan(&batch->pages, heads->heads / heads->kv_heads);
    for (int64_t i = 0; i < model->rope_count; i++) f.turn_width = larger(f.turn_width, 2 * model->ropes[i].pairs);
    const int64_t copies = batch->tokens == 1 ? threads : 1, tokens = batch->tokens;
    const int64_t sizes[7] = {copies * tokens * model->hidden, copies * tokens * f.widest, threads * f.widest,
                              tokens * f.widest, tokens * model->hidden, model->rope_count * tokens * f.turn_width,
                              (int64_t)f.plan.first_slot[tokens] * heads->heads * partial_floats(heads)};
    float **const places[7] = {&f.hidden, &f.prepared, &f.row, &f.wide, &f.delta, &f.turns, &f.partials};
    int64_t total = 0;
    for (int i = 0; i < 7; i++) total += round_up(sizes[i], 16);
    float *workspace = aligned_alloc(64, sizeof(float) * total);
    if (!workspace) return -1;
    total = 0;
    for (int i = 0; i < 7; i++) {
        *places[i] = workspace + total;
        total += round_up(sizes[i], 16);
    }
    run_team(forward_body, &f, (unsigned)threads);
    free(workspace);
    free_plan(&f.plan);
    return 0;
}
