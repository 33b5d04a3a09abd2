#include "team.h"

#include <limits.h>
#include <stdatomic.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

/* Looks at the phase before a waiting thread gives its core away: some 40 us, longer than threads that all run are apart. */
#define LOOKS 1500

typedef struct {
    void (*body)(void *);
    void *argument;
    int threads;
    _Atomic int arrived, sleepers;
    _Atomic int phase; /* counts meetings */
} Team;

static _Thread_local Team *mine;

static void join_team(void *team) {
    mine = team;
    mine->threads = omp_get_num_threads(); /* all write the same number, and nobody reads it before */
    mine->body(mine->argument);
}

void run_team(void (*body)(void *), void *argument, unsigned threads) {
    Team team = {.body = body, .argument = argument};
    GOMP_parallel(join_team, &team, threads, 0);
}

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Sleeps while `phase` has that value; may come back early. */
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

void wait_for_team(void) {
    Team *team = mine;
    const int phase = atomic_load(&team->phase);
    if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
        atomic_store(&team->arrived, 0);
        atomic_store(&team->phase, phase + 1);
        if (atomic_load(&team->sleepers)) wake_all(&team->phase);
        return;
    }
    for (int looks = 0; looks < LOOKS; looks++) {
        if (atomic_load_explicit(&team->phase, memory_order_acquire) != phase) return;
        relax();
    }
    /* Counted before it sleeps: whoever ends the phase either sees the sleeper, or has changed the phase before the sleep. */
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->phase) == phase) sleep_while(&team->phase, phase);
    atomic_fetch_sub(&team->sleepers, 1);
}
