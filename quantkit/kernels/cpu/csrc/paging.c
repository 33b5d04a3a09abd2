/* The work of a batch in pieces. */
#include "attention.h"
#include "team.h"
#include "vec.h"

#include <stdlib.h>

/* Rows (queries x heads of one KV head) that share a reading of the keys. */
#define ROWS 24

/* Few queries: one piece a chunk. Many: pieces of ROWS rows over all their keys; there are enough of those. Where a query
   sees its own page in another form than later ones do, the queries of a piece are all of one page. */
Plan make_plan(const Pages *p, int64_t heads_per_kv_head) {
    const int64_t most = larger(1, ROWS / heads_per_kv_head), queries = p->query_start[p->sequences];
    int64_t room = 0, slot = 0;
    for (int64_t s = 0; s < p->sequences; s++) {
        const int64_t count = p->query_start[s + 1] - p->query_start[s], chunks = p->lengths[s] / CHUNK + 2;
        const int64_t runs = count / most + 1 + (p->open_pages ? count / p->block_size + 1 : 0);
        room += runs * (count <= most ? chunks : 1);
    }
    Plan plan = {malloc(room * sizeof(Piece)), 0, malloc((queries + 1) * sizeof(int32_t))};
    for (int64_t s = 0; s < p->sequences; s++) {
        const int64_t first = p->query_start[s], end = p->query_start[s + 1], start = p->lengths[s] - (end - first);
        const int split = end - first <= most;
        for (int64_t query = first, count; query < end; query += count) {
            const int64_t position = start + query - first;
            count = smaller(most, end - query);
            if (p->open_pages) count = smaller(count, p->block_size - position % p->block_size);
            const int64_t chunks = (position + count + CHUNK - 1) / CHUNK, step = split ? 1 : chunks;
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
