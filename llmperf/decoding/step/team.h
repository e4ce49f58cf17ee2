// The threads of a step: they take items of work from one counter and meet at a spinning barrier.
// A step has about 200 short phases, for which threads that sleep are too slow. The spin has no
// pause instruction: in a virtual machine it may hand the core to the hypervisor each time.
#include <stdatomic.h>
#ifdef _WIN32
#include <windows.h>
static SRWLOCK lock = SRWLOCK_INIT;
static CONDITION_VARIABLE awake = CONDITION_VARIABLE_INIT;
#define LOCK() AcquireSRWLockExclusive(&lock)
#define UNLOCK() ReleaseSRWLockExclusive(&lock)
#define SLEEP() SleepConditionVariableSRW(&awake, &lock, INFINITE, 0)
#define WAKE() WakeAllConditionVariable(&awake)
#define YIELD() SwitchToThread()
#define EXPORT __declspec(dllexport)
#else
#include <pthread.h>
#include <sched.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t awake = PTHREAD_COND_INITIALIZER;
#define LOCK() pthread_mutex_lock(&lock)
#define UNLOCK() pthread_mutex_unlock(&lock)
#define SLEEP() pthread_cond_wait(&awake, &lock)
#define WAKE() pthread_cond_broadcast(&awake)
#define YIELD() sched_yield()
#define EXPORT __attribute__((visibility("default")))
#endif
#define BUSY_SPINS 10000   // before another program may have the core
#define IDLE_SPINS 100000  // after a step, since the next one often follows at once
#define MOST_THREADS 255

typedef struct {  // each counter on its own cache line
  _Alignas(64) _Atomic int32_t next;
  _Alignas(64) _Atomic int32_t arrived;
  _Alignas(64) _Atomic int32_t phase;
  int32_t threads;
} Team;

INLINE int take(Team *t, int items) {
  return atomic_fetch_add_explicit(&t->next, items, memory_order_relaxed);
}
static void barrier(Team *t) {
  int phase = atomic_load_explicit(&t->phase, memory_order_relaxed);
  const int last = t->threads - 1;  // read first: the next run may have another number
  if (atomic_fetch_add(&t->arrived, 1) == last) {
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
    return;
  }
  for (int spins = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase; spins++)
    if (spins > BUSY_SPINS) YIELD();
}
// Each i below `count` once, by whichever thread is free; then all threads meet. Of many items a
// thread takes several at a time: threads that ask at the same moment wait for each other.
#define FOR_ITEMS(i, count)                                                                       \
  for (int end = (count), several = end / (64 * team->threads) + 1, more = 1; more;                \
       more = 0, barrier(team))                                                                   \
    for (int first; (first = take(team, several)) < end;)                                         \
      for (int i = first; i < end && i < first + several; i++)

// ---- The pool: its first threads run `work`, as many as a run asks for, and the others sleep.
// cpu_step.py lets one caller at a time use it.

typedef void (*Work)(const void *model, const void *step, Team *team, int thread);
static struct {
  Work work;
  const void *model, *step;
  Team team;
  _Atomic uint64_t run;  // 256 x the number of this run, plus its threads
  uint64_t born;         // `run` when the newest threads were started: they wait for the next one
  int started;
  char asleep[MOST_THREADS + 1];
} pool;

// Whether there is a run after `seen` that the thread with this place takes part in.
static int called(int place, uint64_t *seen) {
  const uint64_t run = atomic_load_explicit(&pool.run, memory_order_acquire);
  if (run == *seen || place >= (int)(run & 255)) return 0;
  *seen = run;
  return 1;
}

#ifdef _WIN32
static DWORD WINAPI serve(void *given) {
#else
static void *serve(void *given) {
#endif
  const int place = (int)(intptr_t)given;
  for (uint64_t seen = pool.born;;) {
    for (int spins = 0; !called(place, &seen); spins++)
      if (spins > IDLE_SPINS) {
        LOCK();
        pool.asleep[place] = 1;
        while (!called(place, &seen)) SLEEP();
        pool.asleep[place] = 0;
        UNLOCK();
        break;
      }
    pool.work(pool.model, pool.step, &pool.team, place);
    barrier(&pool.team);
  }
  return 0;
}

static int start(int64_t place) {
#ifdef _WIN32
  HANDLE made = CreateThread(0, 0, serve, (void *)(intptr_t)place, 0, 0);
  return made && CloseHandle(made);
#else
  pthread_t made;
  return !pthread_create(&made, 0, serve, (void *)(intptr_t)place) && !pthread_detach(made);
#endif
}

// Run `work` in `threads` threads, the caller's among them. Returns 1 when they cannot be started.
static int run_together(Work work, const void *model, const void *step, int threads) {
  if (threads <= 1) {
    Team alone = {.threads = 1};
    work(model, step, &alone, 0);
    return 0;
  }
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  const uint64_t before = atomic_load(&pool.run);
  if (pool.started < threads - 1) pool.born = before;
  for (; pool.started < threads - 1; pool.started++)
    if (!start(pool.started + 1)) return 1;
  pool.work = work, pool.model = model, pool.step = step, pool.team.threads = threads;
  LOCK();
  atomic_store(&pool.run, ((before >> 8) + 1) << 8 | (uint64_t)threads);
  int sleeping = 0;
  for (int place = 1; place < threads; place++) sleeping |= pool.asleep[place];
  if (sleeping) WAKE();
  UNLOCK();
  work(model, step, &pool.team, 0);
  barrier(&pool.team);
  return 0;
}
