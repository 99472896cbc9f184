// A disk that fills or fails, for `tests/soak.py --faults`: loaded by LD_PRELOAD, so that the writers
// in C++ meet it as well. Files below FAULT_DIR take FAULT_BYTES bytes. Then writing gives the error
// FAULT_ERRNO: each time, or FAULT_TIMES times. FAULT_REPORT gets the bytes written, at the end.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_llong written, failed;

static long long setting(const char *name, long long otherwise) {
    const char *value = getenv(name);
    return value ? atoll(value) : otherwise;
}

static int ours(int fd) {
    char link[32], path[4096];
    const char *folder = getenv("FAULT_DIR");
    if (!folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

// Whether a write of this many bytes fails.
static int fails(int fd, size_t bytes) {
    if (!ours(fd)) return 0;
    long long before = atomic_fetch_add(&written, (long long)bytes);
    if (before + (long long)bytes <= setting("FAULT_BYTES", 1LL << 60)) return 0;
    if (atomic_fetch_add(&failed, 1) >= setting("FAULT_TIMES", 1LL << 60)) return 0;
    errno = (int)setting("FAULT_ERRNO", ENOSPC);
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t bytes) {
    return fails(fd, bytes) ? -1 : REAL(write)(fd, data, bytes);
}

ssize_t pwrite(int fd, const void *data, size_t bytes, off_t at) {
    return fails(fd, bytes) ? -1 : REAL(pwrite)(fd, data, bytes, at);
}

ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t at) {
    return fails(fd, bytes) ? -1 : REAL(pwrite64)(fd, data, bytes, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    size_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
    return fails(fd, bytes) ? -1 : REAL(writev)(fd, parts, count);
}

int fsync(int fd) { return fails(fd, 0) ? -1 : REAL(fsync)(fd); }

// Of the processes of a run only those that write there say so: some end after the one that does.
__attribute__((destructor)) static void report(void) {
    if (!written) return;
    const char *path = getenv("FAULT_REPORT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "%lld %lld\n", (long long)written, (long long)failed);
    fclose(file);
}

// How a process leaves that does not wait to be taken apart.
void _exit(int status) {
    report();
    syscall(SYS_exit_group, status);
    __builtin_unreachable();
}
