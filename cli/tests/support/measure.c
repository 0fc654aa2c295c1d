/* Loaded into the binary under test (LD_PRELOAD): bounds what it may take and writes what it took, so that the tests
   measure the binary that users get. KESTREL_MEASURE names the file that is written at exit:
   "PEAK_HEAP_BYTES CPU_MICROSECONDS". glibc only. */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/time.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static atomic_long live, peak;

static void count(long change) {
    long now = atomic_fetch_add(&live, change) + change;
    long top = atomic_load(&peak);
    while (now > top && !atomic_compare_exchange_weak(&peak, &top, now)) {
    }
}

static void *counted(void *p) {
    if (p) count((long)malloc_usable_size(p));
    return p;
}

void *malloc(size_t n) { return counted(__libc_malloc(n)); }
void *calloc(size_t n, size_t size) { return counted(__libc_calloc(n, size)); }
void *memalign(size_t align, size_t n) { return counted(__libc_memalign(align, n)); }
void *aligned_alloc(size_t align, size_t n) { return counted(__libc_memalign(align, n)); }

int posix_memalign(void **out, size_t align, size_t n) {
    *out = counted(__libc_memalign(align, n));
    return *out ? 0 : ENOMEM;
}

void free(void *p) {
    if (p) count(-(long)malloc_usable_size(p));
    __libc_free(p);
}

void *realloc(void *p, size_t n) {
    long before = p ? (long)malloc_usable_size(p) : 0;
    void *q = __libc_realloc(p, n);
    /* While bytes are moved both blocks may live: the new one is counted first. */
    if (q) counted(q), count(-before);
    else if (n == 0) count(-before);
    return q;
}

static void limit(int what, rlim_t n) {
    struct rlimit r = {n, n};
    setrlimit(what, &r);
}

__attribute__((constructor)) static void start(void) {
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_CPU, 10);           /* seconds; then SIGXCPU, which fails the test */
    limit(RLIMIT_DATA, 512UL << 20); /* heap and thread stacks; maps of files do not count */
}

__attribute__((destructor)) static void end(void) {
    const char *path = getenv("KESTREL_MEASURE");
    long top = atomic_load(&peak);
    struct rusage used;
    FILE *f = path ? fopen(path, "w") : NULL;
    if (!f) return;
    getrusage(RUSAGE_SELF, &used);
    fprintf(f, "%ld %ld\n", top,
            (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000L + used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    fclose(f);
}
