/* Fails, shortens or interrupts the n-th call of the C library that touches a file below a folder.
 *
 * Preloaded into a process (LD_PRELOAD), it stands before the calls that open, write, sync, rename and remove. fault_arm()
 * says which call is to fail and how; without it, all calls pass. fault_count() is the number of calls below the folder.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS = 0, FAIL = 1, FAIL_FROM_HERE = 2, SHORT_WRITE = 3, SIGNAL_BEFORE = 4, SIGNAL_AFTER = 5 };
enum { READS = 1, WRITES = 2 };

static char folder[PATH_MAX], log_file[PATH_MAX];
static long wanted = -1, seen = 0;
static int kind = PASS, number = 0, armed = 0;

void fault_arm(const char *below, long call, int how, int which, const char *log) {
    strncpy(folder, below, sizeof folder - 1);
    strncpy(log_file, log, sizeof log_file - 1);
    wanted = call, kind = how, number = which, seen = 0, armed = 1;
}

void fault_disarm(void) { armed = 0; }
long fault_count(void) { return seen; }

static void say(const char *call, const char *path) {
    if (!log_file[0]) return;
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int fd = real_open(log_file, O_WRONLY | O_CREAT | O_APPEND, 0666);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", seen - 1, call, path);
    if (fd >= 0) real_write(fd, line, length), close(fd);
}

/* The absolute path of a name at a folder's descriptor, or of a descriptor if there is no name. */
static const char *path_of(int at, const char *name, char *buffer) {
    char link[64];
    if (name && name[0] == '/') return name;
    if (at == AT_FDCWD) {
        if (!getcwd(buffer, PATH_MAX)) return "";
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, buffer, PATH_MAX - 1);
        if (length < 0) return "";
        buffer[length] = 0;
    }
    if (name) {
        size_t length = strlen(buffer);
        snprintf(buffer + length, PATH_MAX - length, "/%s", name);
    }
    return buffer;
}

/* Counts a call below the folder. Returns 0 to go on, 1 to fail with errno set, 2 for a short write, 3 to signal afterwards. */
static int meets(const char *call, int at, const char *name, int access) {
    char buffer[PATH_MAX];
    if (!armed) return 0;
    int before = errno;
    const char *path = path_of(at, name, buffer);
    if (strncmp(path, folder, strlen(folder)) != 0) return errno = before, 0;
    long place = seen++;
    if (place == wanted) say(call, path);
    errno = before;
    if (place > wanted && kind == FAIL_FROM_HERE && access == WRITES) return errno = number, 1;
    if (place != wanted) return 0;
    if (kind == FAIL || kind == FAIL_FROM_HERE) return errno = number, 1;
    if (kind == SHORT_WRITE) return 2;
    if (kind == SIGNAL_BEFORE) raise(number);
    return kind == SIGNAL_AFTER ? 3 : 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)
#define DONE(met, type, value) do { type result_ = (value); if (met == 3) raise(number); return result_; } while (0)

static int mode_access(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) ? WRITES : READS; }

#define OPEN(name) int name(const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    REAL(int, #name, const char *, int, ...); \
    int met = meets(#name, AT_FDCWD, path, mode_access(flags)); if (met == 1) return -1; \
    DONE(met, int, real(path, flags, mode)); }
#define OPENAT(name) int name(int at, const char *path, int flags, ...) { \
    va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
    REAL(int, #name, int, const char *, int, ...); \
    int met = meets(#name, at, path, mode_access(flags)); if (met == 1) return -1; \
    DONE(met, int, real(at, path, flags, mode)); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *path, const char *mode) { \
    REAL(FILE *, #name, const char *, const char *); \
    int met = meets(#name, AT_FDCWD, path, mode[0] == 'r' ? READS : WRITES); if (met == 1) return NULL; \
    DONE(met, FILE *, real(path, mode)); }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    int met = meets("write", fd, NULL, WRITES);
    if (met == 1) return -1;
    DONE(met, ssize_t, real(fd, data, met == 2 && size > 1 ? size / 2 : size));
}

#define PWRITE(name) ssize_t name(int fd, const void *data, size_t size, off_t place) { \
    REAL(ssize_t, #name, int, const void *, size_t, off_t); \
    int met = meets(#name, fd, NULL, WRITES); if (met == 1) return -1; \
    DONE(met, ssize_t, real(fd, data, met == 2 && size > 1 ? size / 2 : size, place)); }
PWRITE(pwrite) PWRITE(pwrite64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    int met = meets("writev", fd, NULL, WRITES);
    if (met == 1) return -1;
    DONE(met, ssize_t, real(fd, parts, met == 2 ? 1 : count));
}

#define SENDFILE(name) ssize_t name(int to, int from, off_t *place, size_t size) { \
    REAL(ssize_t, #name, int, int, off_t *, size_t); \
    int met = meets(#name, to, NULL, WRITES); if (met == 1) return -1; \
    DONE(met, ssize_t, real(to, from, place, met == 2 && size > 1 ? 1 : size)); }
SENDFILE(sendfile) SENDFILE(sendfile64)

#define ON_FD(name) int name(int fd) { \
    REAL(int, #name, int); int met = meets(#name, fd, NULL, WRITES); if (met == 1) return -1; DONE(met, int, real(fd)); }
ON_FD(fsync) ON_FD(fdatasync)

#define TRUNCATE(name) int name(int fd, off_t size) { \
    REAL(int, #name, int, off_t); int met = meets(#name, fd, NULL, WRITES); if (met == 1) return -1; DONE(met, int, real(fd, size)); }
TRUNCATE(ftruncate) TRUNCATE(ftruncate64)

#define ALLOCATE(name) int name(int fd, off_t from, off_t size) { \
    REAL(int, #name, int, off_t, off_t); int met = meets(#name, fd, NULL, WRITES); if (met == 1) return number; \
    DONE(met, int, real(fd, from, size)); }
ALLOCATE(posix_fallocate) ALLOCATE(posix_fallocate64)

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    int met = meets("rename", AT_FDCWD, from, WRITES);
    if (met == 1) return -1;
    DONE(met, int, real(from, to));
}

int renameat(int at, const char *from, int other, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    int met = meets("renameat", at, from, WRITES);
    if (met == 1) return -1;
    DONE(met, int, real(at, from, other, to));
}

int renameat2(int at, const char *from, int other, const char *to, unsigned int flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned int);
    int met = meets("renameat2", at, from, WRITES);
    if (met == 1) return -1;
    DONE(met, int, real(at, from, other, to, flags));
}

#define ON_PATH(name) int name(const char *path) { \
    REAL(int, #name, const char *); int met = meets(#name, AT_FDCWD, path, READS); if (met == 1) return -1; DONE(met, int, real(path)); }
ON_PATH(unlink) ON_PATH(rmdir)

int unlinkat(int at, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    int met = meets("unlinkat", at, path, READS);
    if (met == 1) return -1;
    DONE(met, int, real(at, path, flags));
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    int met = meets("mkdir", AT_FDCWD, path, WRITES);
    if (met == 1) return -1;
    DONE(met, int, real(path, mode));
}

int mkdirat(int at, const char *path, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    int met = meets("mkdirat", at, path, WRITES);
    if (met == 1) return -1;
    DONE(met, int, real(at, path, mode));
}
