/* The threads that torch already has.

   torch loads an OpenMP runtime for everyone (libtorch_global_deps, RTLD_GLOBAL). Calling its GOMP entry points by name,
   instead of linking a runtime of our own, leaves one pool of threads; and no compiler flag is needed. Where no such
   runtime is loaded the library does not load, and the callers' fall-backs serve.

   Threads meet some 150 times a token. The runtime's own barrier spins for milliseconds: where another program wants a core,
   the thread that waits then keeps the one that is waited for from running, and a token takes a second. Ours sleeps soon. */
#ifndef QUANTKIT_TEAM_H
#define QUANTKIT_TEAM_H

#include <stdint.h>

extern void GOMP_parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

/* What Python calls; all else is hidden, so that no other library's function of the same name can take its place. */
#define EXPORT __attribute__((visibility("default")))

/* Runs `body` on that many threads; inside, `wait_for_team` returns in every thread once all have come to it. */
void run_team(void (*body)(void *), void *argument, unsigned threads);
void wait_for_team(void);

typedef struct { int64_t first, last; } Range;

/* This thread's share of `count` items: contiguous, sizes differ by at most one. */
static inline Range my_share(int64_t count) {
    int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Range){count * me / threads, count * (me + 1) / threads};
}

#endif
