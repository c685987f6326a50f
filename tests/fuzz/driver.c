/* driver.c - runs the target without libFuzzer: inputs from numbered seeds, and, where coverage is counted, inputs that
 * grow from those that found something new.
 *
 *   fuzz seeds FIRST COUNT [SECONDS]   one input a seed, reported as "seed N" where it fails
 *   fuzz sound FIRST COUNT [SECONDS]   the same, and nothing is damaged: proves the checks themselves
 *   fuzz grow FIRST SECONDS            guided by coverage, from the seeds on
 *   fuzz file PATH ...                 inputs that were kept
 *   fuzz case NAME | fuzz cases        scripted damage (cases.c), and what there is
 *
 * Each run is bounded: SIGALRM ends an input that takes longer than LIMIT_S. Exit 0: all ran; else the failure is told.
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT_S = 30, MOST = 1024 };

/* What runs now, for the parent of a process that dies. */
struct progress { uint64_t seed, runs; uint32_t size; uint8_t data[MOST]; };
static struct progress *progress;

static uint64_t next(uint64_t *x)
{
    *x += UINT64_C(0x9e3779b97f4a7c15); /* splitmix64 */
    uint64_t z = *x;
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static uint32_t from_seed(uint64_t seed, uint8_t *data)
{
    uint64_t x = seed;
    uint32_t size = 64 + (uint32_t)(next(&x) % (MOST - 64));
    for (uint32_t i = 0; i < size; i += 8) {
        uint64_t word = next(&x);
        memcpy(data + i, &word, size - i < 8 ? size - i : 8);
    }
    return size;
}

static void too_long(int signum)
{
    static const char text[] = "fuzz: hangs\n";
    (void)signum;
    if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(3);
    abort();
}

static void run(const uint8_t *data, uint32_t size)
{
    progress->size = size;
    memcpy(progress->data, data, size);
    alarm(LIMIT_S);
    /* A copy on the heap, so that a read beyond its end is seen. */
    uint8_t *copy = malloc(size ? size : 1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    alarm(0);
    progress->runs++;
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* Coverage: gcc's trace-pc calls this at each edge of the core; each place counts once. */
enum { PLACES = 1 << 16 };
static uint8_t places[PLACES];
static uint32_t places_new;

void __sanitizer_cov_trace_pc(void);
__attribute__((no_sanitize_coverage, no_sanitize("address", "undefined"))) void __sanitizer_cov_trace_pc(void)
{
    uintptr_t pc = (uintptr_t)__builtin_return_address(0);
    uint8_t *place = &places[(pc ^ pc >> 16) % PLACES];
    places_new += *place == 0;
    *place = 1;
}

static void seeds(uint64_t first, uint64_t count, double seconds)
{
    uint8_t data[MOST];
    double end = now_s() + seconds;
    for (uint64_t i = 0; i < count && (seconds == 0 || now_s() < end); i++) {
        progress->seed = first + i;
        run(data, from_seed(first + i, data));
    }
}

struct kept { uint32_t size; uint8_t data[MOST]; };

static uint32_t mutate(uint64_t *x, const struct kept *a, const struct kept *b, uint8_t *data)
{
    uint32_t size = a->size, changes = 1 + (uint32_t)(next(x) % 6);
    memcpy(data, a->data, size);
    if (next(x) % 4 == 0 && b->size > 2) { /* the end of another */
        uint32_t at = (uint32_t)(next(x) % (size < b->size ? size : b->size));
        memcpy(data + at, b->data + at, b->size - at);
        size = b->size;
    }
    for (uint32_t i = 0; i < changes; i++) {
        uint32_t at = (uint32_t)(next(x) % size), kind = (uint32_t)(next(x) % 4);
        if (kind == 0)
            data[at] ^= (uint8_t)(1u << next(x) % 8);
        else if (kind == 1)
            data[at] = (uint8_t)next(x);
        else if (kind == 2 && size < MOST) /* a byte more, a byte less */
            memmove(data + at + 1, data + at, size++ - at);
        else if (kind == 3 && size > 64)
            memmove(data + at, data + at + 1, --size - at);
    }
    return size;
}

static void grow(uint64_t first, double seconds)
{
    enum { KEPT = 1 << 14, BEGIN = 64 };
    struct kept *kept = calloc(KEPT, sizeof *kept);
    uint8_t data[MOST];
    uint64_t x = first, n = 0;
    double end = now_s() + seconds;
    for (uint64_t i = 0; now_s() < end; i++) {
        progress->seed = first;
        uint32_t size;
        if (i < BEGIN || n == 0)
            size = from_seed(first + i, data);
        else
            size = mutate(&x, &kept[next(&x) % n], &kept[next(&x) % n], data);
        places_new = 0;
        run(data, size);
        if (places_new && n < KEPT) {
            kept[n].size = size;
            memcpy(kept[n++].data, data, size);
        }
    }
    uint32_t covered = 0;
    for (uint32_t i = 0; i < PLACES; i++)
        covered += places[i];
    printf("%u places, %llu inputs kept\n", covered, (unsigned long long)n);
    free(kept);
}

static void run_file(const char *path)
{
    uint8_t data[MOST];
    int fd = open(path, O_RDONLY);
    ssize_t size = fd < 0 ? -1 : read(fd, data, sizeof data);
    if (size < 0)
        fail("cannot read %s", path);
    close(fd);
    run(data, (uint32_t)size);
}

static int work(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "";
    undamaged = strcmp(how, "sound") == 0;
    if ((strcmp(how, "seeds") == 0 || undamaged) && argc >= 4)
        seeds(strtoull(argv[2], NULL, 0), strtoull(argv[3], NULL, 0), argc > 4 ? strtod(argv[4], NULL) : 0);
    else if (strcmp(how, "grow") == 0 && argc == 4)
        grow(strtoull(argv[2], NULL, 0), strtod(argv[3], NULL));
    else if (strcmp(how, "cases") == 0)
        list_cases();
    else if (strcmp(how, "case") == 0 && argc == 3)
        return alarm(LIMIT_S), run_case(argv[2]) ? 0 : 2;
    else if (strcmp(how, "file") == 0)
        for (int i = 2; i < argc; i++)
            run_file(argv[i]);
    else
        return 2;
    return 0;
}

/* The child works, so that whatever it dies of is told with the input that did it. */
int main(int argc, char **argv)
{
    progress = mmap(NULL, sizeof *progress, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (progress == MAP_FAILED)
        return 2;
    pid_t pid = fork();
    if (pid == 0) {
        signal(SIGALRM, too_long);
        int rc = work(argc, argv);
        fflush(stdout);
        exit(rc);
    }
    int status = 0;
    if (pid < 0 || waitpid(pid, &status, 0) < 0)
        return 2;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        printf("%llu runs\n", (unsigned long long)progress->runs);
        return 0;
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 2)
        return 2;
    fprintf(stderr, "fuzz: seed %llu after %llu runs: %s %d; the input:\n", (unsigned long long)progress->seed,
            (unsigned long long)progress->runs, WIFSIGNALED(status) ? "signal" : "exit",
            WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
    for (uint32_t i = 0; i < progress->size; i++)
        fprintf(stderr, "%02x%s", progress->data[i], i % 40 == 39 ? "\n" : "");
    fputc('\n', stderr);
    return 1;
}
