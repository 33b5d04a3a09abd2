/* The work of a batch in pieces, and the write into the paged cache. */
#include "attention.h"
#include "team.h"
#include "vec.h"

#include <stdlib.h>

/* Rows (queries x heads of one KV head) that share a reading of the keys. */
#define ROWS 24

/* Few queries: one piece a chunk. Many: pieces of ROWS rows over all their keys; there are enough of those. */
Plan make_plan(const Pages *p, int64_t heads_per_kv_head) {
    const int64_t most = larger(1, ROWS / heads_per_kv_head), queries = p->query_start[p->sequences];
    int64_t room = 0, slot = 0;
    for (int64_t s = 0; s < p->sequences; s++)
        room += (p->query_start[s + 1] - p->query_start[s]) / most + p->lengths[s] / CHUNK + 2;
    Plan plan = {malloc(room * sizeof(Piece)), 0, malloc((queries + 1) * sizeof(int32_t))};
    for (int64_t s = 0; s < p->sequences; s++) {
        const int64_t first = p->query_start[s], end = p->query_start[s + 1], start = p->lengths[s] - (end - first);
        const int split = end - first <= most;
        for (int64_t query = first; query < end; query += most) {
            const int64_t count = smaller(most, end - query);
            const int64_t chunks = (start + (query - first) + count + CHUNK - 1) / CHUNK, step = split ? 1 : chunks;
            int32_t part = 0;
            for (int64_t chunk = 0; chunk < chunks; chunk += step, part++)
                plan.pieces[plan.count++] = (Piece){(int32_t)s, (int32_t)query, (int32_t)count, (int32_t)chunk,
                                                    (int32_t)smaller(chunk + step, chunks), part};
            for (int64_t i = 0; i < count; i++, slot += part) plan.first_slot[query + i] = (int32_t)slot;
        }
    }
    plan.first_slot[queries] = (int32_t)slot;
    return plan;
}

void free_plan(Plan *plan) {
    free(plan->pieces);
    free(plan->first_slot);
}

void write_slot(void *cache, int64_t type, int64_t slot, int64_t width, const float *row) {
    if (type == F32) memcpy((float *)cache + slot * width, row, sizeof(float) * width);
    uint16_t *half = (uint16_t *)cache + slot * width;
    if (type == BF16)
        for (int64_t i = 0; i < width; i++) half[i] = to_bf16(row[i]);
    if (type == F16)
        for (int64_t i = 0; i < width; i++) half[i] = to_half(row[i]);
}

typedef struct { void *cache; const int64_t *slots; const float *rows; int64_t type, count, width; } WriteCall;

static void write_body(void *argument) {
    const WriteCall *c = argument;
    for (Range r = my_share(c->count); r.first < r.last; r.first++)
        if (c->slots[r.first] >= 0) write_slot(c->cache, c->type, c->slots[r.first], c->width, c->rows + r.first * c->width);
}

/* rows [count, width] into their slots; a slot of -1 is not written. */
EXPORT void quantkit_kv_write(void *cache, int64_t type, const int64_t *slots, int64_t count, int64_t width, const float *rows,
                              int threads) {
    WriteCall call = {cache, slots, rows, type, count, width};
    run_team(write_body, &call, (unsigned)threads);
}
