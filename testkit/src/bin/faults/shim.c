/*
 * Preloaded into the program under test: while the file named by FAULTS_SWITCH exists, nothing
 * under the folder FAULTS_UNDER can be made durable. fsync(2) then fails with EIO, as it does
 * where a disk does not take what was written; what was written is still read back, as from the
 * kernel's cache.
 *
 * QEMU inherits the environment and is left alone: there the guest's own disk would break.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(int fd)
{
    const char *file = getenv("FAULTS_SWITCH");
    const char *under = getenv("FAULTS_UNDER");
    const char *only = "replay-migrate";
    char link[64], path[PATH_MAX + 1];
    ssize_t length;

    if (!file || !under || strcmp(program_invocation_short_name, only) || access(file, F_OK))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, PATH_MAX);
    if (length < 0)
        return 0;
    path[length] = 0;
    return !strncmp(path, under, strlen(under));
}

#define FAILING(name)                                            \
    int name(int fd)                                             \
    {                                                            \
        static int (*real)(int);                                 \
        if (!real)                                               \
            *(void **)&real = dlsym(RTLD_NEXT, #name);           \
        if (fails(fd)) {                                         \
            errno = EIO;                                         \
            return -1;                                           \
        }                                                        \
        return real(fd);                                         \
    }

FAILING(fsync)
FAILING(fdatasync)
