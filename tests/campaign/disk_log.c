/* Logs what a process does to the files of a folder, so that power cuts can be simulated (power_cuts.py).
 *
 *     cc -shared -fPIC -o disk_log.so disk_log.c -ldl
 *     DISK_LOG=/log DISK_LOG_FOLDER=/folder LD_PRELOAD=./disk_log.so PROGRAM
 *
 * The log has lines "NAME FOLDER-RELATIVE-PATH[\tPATH] OFFSET LENGTH", after each of which LENGTH bytes follow. Only calls
 * that go through libc's functions are seen; writes through a mapping or stdio are not.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *folder;
static size_t folder_length;
static int log_file = -1;

static ssize_t plain_write(int file, const void *data, size_t length) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    return real(file, data, length);
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("DISK_LOG");
    folder = getenv("DISK_LOG_FOLDER");
    if (!path || !folder) { folder = NULL; return; }
    folder_length = strlen(folder);
    log_file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* The path within the folder; NULL if it is elsewhere. */
static const char *within(const char *path) {
    if (!folder || !path || strncmp(path, folder, folder_length) || path[folder_length] != '/') return NULL;
    return path + folder_length + 1;
}

static const char *path_of(int file, char *buffer) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t length = readlink(name, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return within(buffer);
}

static const char *path_at(int directory, const char *path, char *buffer) {
    if (path[0] == '/') return within(path);
    char base[PATH_MAX];
    if (directory == AT_FDCWD) { if (!getcwd(base, sizeof base)) return NULL; }
    else {
        char name[64];
        snprintf(name, sizeof name, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(name, base, sizeof base - 1);
        if (length < 0) return NULL;
        base[length] = 0;
    }
    if (snprintf(buffer, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return NULL;
    return within(buffer);
}

static void note(const char *name, const char *path, const char *other, long offset, const void *data, size_t length) {
    if (log_file < 0 || (!path && !other)) return;
    int before = errno;
    char line[3 * PATH_MAX];
    int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%zu\n", name, path ? path : "", other ? other : "", offset,
                        data ? length : 0);
    pthread_mutex_lock(&lock);
    plain_write(log_file, line, size);
    if (data) plain_write(log_file, data, length);
    pthread_mutex_unlock(&lock);
    errno = before;
}

ssize_t write(int file, const void *data, size_t length) {
    REAL(ssize_t, write, int, const void *, size_t);
    char buffer[PATH_MAX];
    const char *path = file == log_file || !folder ? NULL : path_of(file, buffer);
    ssize_t done = real(file, data, length);
    if (path && done > 0) note("write", path, NULL, lseek(file, 0, SEEK_CUR) - done, data, done);
    return done;
}

#define WRITE_AT(name, offset_type)                                                           \
    ssize_t name(int file, const void *data, size_t length, offset_type offset) {             \
        REAL(ssize_t, name, int, const void *, size_t, offset_type);                          \
        char buffer[PATH_MAX];                                                                \
        const char *path = folder ? path_of(file, buffer) : NULL;                             \
        ssize_t done = real(file, data, length, offset);                                      \
        if (path && done > 0) note("write", path, NULL, offset, data, done);                  \
        return done;                                                                          \
    }
WRITE_AT(pwrite, off_t)
WRITE_AT(pwrite64, off64_t)

#define TRUNCATE(name, offset_type)                                                           \
    int name(int file, offset_type length) {                                                  \
        REAL(int, name, int, offset_type);                                                    \
        char buffer[PATH_MAX];                                                                \
        const char *path = folder ? path_of(file, buffer) : NULL;                             \
        int status = real(file, length);                                                      \
        if (path && !status) note("truncate", path, NULL, length, NULL, 0);                   \
        return status;                                                                        \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define SYNC(name)                                                                            \
    int name(int file) {                                                                      \
        REAL(int, name, int);                                                                 \
        char buffer[PATH_MAX];                                                                \
        const char *path = folder ? path_of(file, buffer) : NULL;                             \
        struct stat status;                                                                   \
        int is_folder = !fstat(file, &status) && S_ISDIR(status.st_mode);                     \
        char whole[PATH_MAX];                                                                 \
        if (!path && folder && is_folder) {                                                   \
            char name_of[64];                                                                 \
            snprintf(name_of, sizeof name_of, "/proc/self/fd/%d", file);                      \
            ssize_t size = readlink(name_of, whole, sizeof whole - 1);                        \
            if (size > 0 && (whole[size] = 0, !strcmp(whole, folder))) path = ".";            \
        }                                                                                     \
        int done = real(file);                                                                \
        if (path && !done) note(is_folder ? "sync-folder" : "sync", path, NULL, 0, NULL, 0);  \
        return done;                                                                          \
    }
SYNC(fsync)
SYNC(fdatasync)

static void note_open(int directory, const char *path, int flags, int existed, int done) {
    char buffer[PATH_MAX];
    const char *inside = done >= 0 && folder ? path_at(directory, path, buffer) : NULL;
    if (!inside) return;
    if ((flags & O_CREAT) && !existed) note("create", inside, NULL, 0, NULL, 0);
    else if (flags & O_TRUNC) note("truncate", inside, NULL, 0, NULL, 0);
}

#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        REAL(int, name, const char *, int, ...);                                              \
        va_list arguments; va_start(arguments, flags);                                        \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;        \
        va_end(arguments);                                                                    \
        int before = errno, existed = flags & O_CREAT ? !access(path, F_OK) : 1;              \
        errno = before;                                                                       \
        int done = real(path, flags, mode);                                                   \
        note_open(AT_FDCWD, path, flags, existed, done);                                      \
        return done;                                                                          \
    }
OPEN(open)
OPEN(open64)

#define OPEN_AT(name)                                                                         \
    int name(int directory, const char *path, int flags, ...) {                               \
        REAL(int, name, int, const char *, int, ...);                                         \
        va_list arguments; va_start(arguments, flags);                                        \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(arguments, mode_t) : 0;        \
        va_end(arguments);                                                                    \
        int before = errno, existed = flags & O_CREAT ? !faccessat(directory, path, F_OK, 0) : 1; \
        errno = before;                                                                       \
        int done = real(directory, path, flags, mode);                                        \
        note_open(directory, path, flags, existed, done);                                     \
        return done;                                                                          \
    }
OPEN_AT(openat)
OPEN_AT(openat64)

#define ON_PATH(name, kind, parameters, arguments, directory, path)                           \
    int name parameters {                                                                     \
        static int (*real) parameters; if (!real) real = dlsym(RTLD_NEXT, #name);             \
        char buffer[PATH_MAX];                                                                \
        const char *inside = folder ? path_at(directory, path, buffer) : NULL;                \
        int done = real arguments;                                                            \
        if (inside && !done) note(kind, inside, NULL, 0, NULL, 0);                            \
        return done;                                                                          \
    }
ON_PATH(unlink, "remove", (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, "remove", (int at, const char *path, int flags), (at, path, flags), at, path)
ON_PATH(rmdir, "remove", (const char *path), (path), AT_FDCWD, path)
ON_PATH(mkdir, "folder", (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, "folder", (int at, const char *path, mode_t mode), (at, path, mode), at, path)

#define ON_PATHS(name, kind, parameters, arguments, directory, path, other_directory, other)  \
    int name parameters {                                                                     \
        static int (*real) parameters; if (!real) real = dlsym(RTLD_NEXT, #name);             \
        char buffer[PATH_MAX], second[PATH_MAX];                                              \
        const char *inside = folder ? path_at(directory, path, buffer) : NULL;                \
        const char *target = folder ? path_at(other_directory, other, second) : NULL;         \
        int done = real arguments;                                                            \
        if ((inside || target) && !done) note(kind, inside, target, 0, NULL, 0);              \
        return done;                                                                          \
    }
ON_PATHS(rename, "rename", (const char *from, const char *to), (from, to), AT_FDCWD, from, AT_FDCWD, to)
ON_PATHS(renameat, "rename", (int one, const char *from, int two, const char *to), (one, from, two, to), one, from, two, to)
ON_PATHS(link, "link", (const char *from, const char *to), (from, to), AT_FDCWD, from, AT_FDCWD, to)
ON_PATHS(linkat, "link", (int one, const char *from, int two, const char *to, int flags), (one, from, two, to, flags),
         one, from, two, to)
