/* Cuts the attention of a batch into work items. */
#include "attention.h"
#include "vec.h"

#include <stdlib.h>

/* Rows (queries times query heads per KV head) that share one pass over the keys. */
#define ROWS 48

/* A sequence with few queries gets one item per chunk of keys. One with many gets items of ROWS rows over all their keys,
   which are enough to keep all threads busy. With tail pages, a query sees its own page in 16 bit and later queries see that
   page quantized; so all queries of an item must be in the same page. */
AttentionPlan make_plan(const PagedBatch *p, int64_t heads_per_kv_head) {
    const int64_t max_queries = max_i64(1, ROWS / heads_per_kv_head), queries = p->query_start[p->sequences];
    int64_t room = 0, slot = 0;
    for (int64_t s = 0; s < p->sequences; s++) {
        const int64_t count = p->query_start[s + 1] - p->query_start[s], chunks = p->lengths[s] / CHUNK + 2;
        const int64_t runs = count / max_queries + 1 + (p->tail_page_ids ? count / p->block_size + 1 : 0);
        room += runs * (count <= max_queries ? chunks : 1);
    }
    AttentionPlan plan = {malloc(room * sizeof(WorkItem)), 0, malloc((queries + 1) * sizeof(int32_t))};
    for (int64_t s = 0; s < p->sequences; s++) {
        const int64_t first = p->query_start[s], end = p->query_start[s + 1], start = p->lengths[s] - (end - first);
        const int split = end - first <= max_queries;
        for (int64_t query = first, count; query < end; query += count) {
            const int64_t position = start + query - first;
            count = min_i64(max_queries, end - query);
            if (p->tail_page_ids) count = min_i64(count, p->block_size - position % p->block_size);
            const int64_t chunks = (position + count + CHUNK - 1) / CHUNK, step = split ? 1 : chunks;
            int32_t part = 0;
            for (int64_t chunk = 0; chunk < chunks; chunk += step, part++)
                plan.items[plan.count++] = (WorkItem){(int32_t)s, (int32_t)query, (int32_t)count, (int32_t)chunk,
                                                    (int32_t)min_i64(chunk + step, chunks), part};
            for (int64_t i = 0; i < count; i++, slot += part) plan.first_slot[query + i] = (int32_t)slot;
        }
    }
    plan.first_slot[queries] = (int32_t)slot;
    return plan;
}

void free_plan(AttentionPlan *plan) {
    free(plan->items);
    free(plan->first_slot);
}
