/* Parallel regions on the threads that torch already has.

   torch loads an OpenMP runtime for the whole process (libtorch_global_deps, RTLD_GLOBAL). We call its GOMP entry points by
   name instead of linking a runtime of our own. So there is one pool of threads, and no compiler flag is needed. Where no such
   runtime is loaded, this library fails to load and the callers fall back to torch.

   Threads meet at a barrier about 150 times per token. The runtime's own barrier spins for milliseconds. If another program
   wants a core, a thread that spins there keeps the thread it waits for from running, and a token takes a second. Our barrier
   goes to sleep much sooner. */
#ifndef QUANTKIT_THREADS_H
#define QUANTKIT_THREADS_H

#include <stdint.h>

extern void GOMP_parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);

/* Marks what Python calls. All other symbols are hidden, so that a function of the same name in another library cannot
   replace ours. */
#define EXPORT __attribute__((visibility("default")))

/* Runs `body` on `threads` threads. Inside, `thread_barrier` returns in each thread once all threads have called it. */
void run_threads(void (*body)(void *), void *argument, unsigned threads);
void thread_barrier(void);

typedef struct { int64_t first, last; } Range;

/* This thread's part of `count` items: contiguous; the parts differ in size by at most one. */
static inline Range thread_range(int64_t count) {
    int64_t me = omp_get_thread_num(), threads = omp_get_num_threads();
    return (Range){count * me / threads, count * (me + 1) / threads};
}

#endif
