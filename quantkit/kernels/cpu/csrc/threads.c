/* A barrier for the threads of an OpenMP parallel region: waiting threads spin briefly, then sleep. */
#include "threads.h"

#include <limits.h>
#include <stdatomic.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

/* How often a waiting thread checks the phase before it sleeps: for about 40 us. Threads that all have a core arrive within
   less. */
#define SPINS 1500

typedef struct {
    void (*body)(void *);
    void *argument;
    int threads;
    _Atomic int arrived, sleepers;
    _Atomic int phase; /* counts completed barriers */
} ThreadGroup;

static _Thread_local ThreadGroup *current_group;

static void thread_main(void *group) {
    current_group = group;
    current_group->threads = omp_get_num_threads(); /* all threads write the same number before any reads it */
    current_group->body(current_group->argument);
}

void run_threads(void (*body)(void *), void *argument, unsigned threads) {
    ThreadGroup group = {.body = body, .argument = argument};
    GOMP_parallel(thread_main, &group, threads, 0);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleeps while *phase == value; may return early. */
static void sleep_while(_Atomic int *phase, int value) {
#ifdef __linux__
    syscall(SYS_futex, phase, FUTEX_WAIT_PRIVATE, value, 0, 0, 0);
#else
    (void)phase, (void)value;
    sched_yield();
#endif
}

static void wake_all(_Atomic int *phase) {
#ifdef __linux__
    syscall(SYS_futex, phase, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
#else
    (void)phase;
#endif
}

void thread_barrier(void) {
    ThreadGroup *group = current_group;
    const int phase = atomic_load(&group->phase);
    if (atomic_fetch_add(&group->arrived, 1) == group->threads - 1) {
        atomic_store(&group->arrived, 0);
        atomic_store(&group->phase, phase + 1);
        if (atomic_load(&group->sleepers)) wake_all(&group->phase);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load_explicit(&group->phase, memory_order_acquire) != phase) return;
        cpu_relax();
    }
    /* A sleeper is counted before it sleeps. So the thread that ends the phase either sees the sleeper and wakes it, or has
       changed the phase before the sleep, which then returns at once. */
    atomic_fetch_add(&group->sleepers, 1);
    while (atomic_load(&group->phase) == phase) sleep_while(&group->phase, phase);
    atomic_fetch_sub(&group->sleepers, 1);
}
